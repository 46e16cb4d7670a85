"""Every command and every line of Python in the READMEs works: short ones run, long ones plan."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import export
import main_imp_fillback as entry
import report

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh-CN.md"]
SMALL = [
    "--dataset",
    "digits",
    "--train_limit",
    "60",
    "--batch_size",
    "20",
    "--epochs",
    "1",
    "--pruning_times",
    "2",
    "--rate",
    "0.34",
]
RECORDER = """import json, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[0], *sys.argv[1:]]) + "\\n")
"""


def blocks(readme, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / readme).read_text(encoding="utf-8"), re.M | re.S)


def commands(readme):
    """The shell commands, one line each."""
    lines = "\n".join(blocks(readme, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


def words(command):
    """What follows the program's name."""
    tail = command.rpartition("&& ")[2]
    return shlex.split(tail)[2:]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with results/NAME and results/OTHER, two finished runs."""
    here = tmp_path_factory.mktemp("readme")
    flags = [*SMALL, "--struct", "rsst", "--vit_structured", "--vit_prune_target", "both"]
    for name, seed in (("NAME", "0"), ("OTHER", "1")):
        assert entry.main([*flags, "--seed", seed, "--save_dir", str(here / "results" / name)]) == 0
    return here


def plans(argv, capsys):
    capsys.readouterr()
    assert entry.main([*argv, "--dry_run"]) == 0
    assert "About" in capsys.readouterr().out


TRAINING = [command for command in commands("README.md") if "main_imp_fillback.py" in command]


@pytest.mark.parametrize("command", [c for c in TRAINING if "--resume" not in c and "--list_archs" not in c])
def test_training_commands_plan(command, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    plans(words(command), capsys)


def test_the_first_command_runs_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert TRAINING[0].startswith("source setup_env.sh && python main_imp_fillback.py ")
    assert entry.main([*words(TRAINING[0]), "--epochs", "1", "--train_limit", "60", "--save_dir", "run"]) == 0
    assert "removed" in capsys.readouterr().out


def test_commands_on_a_finished_run(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    on_runs = [command for command in commands("README.md") if "results/NAME" in command]
    assert len(on_runs) == 4
    programs = {"main_imp_fillback.py": entry.main, "export.py": export.main, "report.py": report.main}
    for command in on_runs:
        program = programs[shlex.split(command)[1]]
        if program is export.main:
            pytest.importorskip("onnxruntime")
        assert not program(words(command)), command
    assert (finished / "results" / "compare" / "compare.html").is_file()
    assert (finished / "results" / "NAME" / "model" / "model.onnx").is_file()


def test_python_blocks_run(finished, monkeypatch):
    monkeypatch.chdir(finished)
    for block in blocks("README.md", "python"):
        exec(block, {})


def test_scripts_start_what_plans(tmp_path, monkeypatch, capsys):
    """Scripts run on a copy whose programs write down how they were called; each call plans."""
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("benchmarks/*.sh")]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "setup_env.sh").write_text(f'python() {{ "{sys.executable}" "$@"; }}\n')
    for program in ("main_imp_fillback.py", "report.py"):
        (tmp_path / program).write_text(RECORDER)
    scripts = [command for command in commands("README.md") if "bash " in command]
    assert len(scripts) == 7
    folder = str(Path(sys.executable).parent)
    environment = {**os.environ, "PATH": folder + os.pathsep + os.environ["PATH"]}
    for command in scripts:
        (tmp_path / "calls.jsonl").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", "-c", command + "; wait"],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        wait_for(tmp_path / "calls.jsonl")
        calls = [eval(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
        assert calls
        monkeypatch.chdir(ROOT)
        for program, *argv in calls:
            if program.endswith("main_imp_fillback.py"):
                plans([*argv, "--save_dir", str(tmp_path / "unused")], capsys)


def wait_for(path):
    for _ in range(100):
        if path.exists():
            return
        subprocess.run(["sleep", "0.1"], check=True)


def test_the_test_command_is_what_continuous_integration_calls():
    command = next(command for command in commands("README.md") if command.endswith("python -m pytest"))
    assert command in (ROOT / ".ci" / "run").read_text()


def test_both_languages_show_the_same_commands():
    assert commands(READMES[0]) == commands(READMES[1])
    assert blocks(READMES[0], "python") == blocks(READMES[1], "python")


@pytest.mark.parametrize("readme", READMES)
def test_links_and_pictures_lead_somewhere(readme):
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / readme).read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
