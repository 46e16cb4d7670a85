"""Every command and every line of Python in the READMEs works: short ones run, long ones plan."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from micro import call

import export
import report
from deployment.command import build_parser

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh-CN.md"]
SMALL = shlex.split("--train_limit 40 --batch_size 20 --epochs 1 --pruning_times 2")
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
    return shlex.split(command.rpartition("&& ")[2])[2:]


def plans(argv, capsys):
    capsys.readouterr()
    assert call([*argv, "--dry_run"]) == 0
    assert "About" in capsys.readouterr().out


TRAINING = [command for command in commands("README.md") if "main_imp_fillback.py" in command]


def test_training_commands_plan_and_the_first_one_runs_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures have tests of their own
    monkeypatch.chdir(ROOT)
    for command in TRAINING:
        if "--resume" not in command and "--list_archs" not in command:
            plans(words(command), capsys)
    assert TRAINING[0].startswith("source setup_env.sh && python main_imp_fillback.py ")
    assert call([*words(TRAINING[0]), *SMALL, "--img_size", 8, "--no-export", "--save_dir", tmp_path / "run"]) == 0
    assert "state 1 done" in capsys.readouterr().out


@pytest.mark.usefixtures("house")
def test_commands_and_python_on_a_finished_run():
    flags = [*SMALL, *shlex.split("--dataset digits --arch vit_micro --vit_structured --vit_prune_target both")]
    for name in ("NAME", "OTHER"):
        assert call([*flags, "--save_dir", f"results/{name}"]) == 0
    programs = {"main_imp_fillback.py": call, "export.py": export.main, "report.py": report.main}
    on_runs = [command for command in commands("README.md") if "results/NAME" in command]
    assert len(on_runs) == 7
    for command in on_runs:
        if "--int8" in command or "--demo" in command:  # test_shipping.py runs these
            build_parser().parse_args(words(command))
            continue
        program = programs[shlex.split(command)[1]]
        if program is export.main:
            pytest.importorskip("onnxruntime")
        assert not program(words(command)), command
    assert Path("results/compare/compare.html").is_file()
    assert Path("results/NAME/model/model.onnx").is_file()
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
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]}
    monkeypatch.chdir(ROOT)
    for command in scripts:
        record = tmp_path / "calls.jsonl"
        record.unlink(missing_ok=True)
        subprocess.run(
            ["bash", "-c", command + "; wait"], cwd=tmp_path, env=environment, capture_output=True, check=True
        )
        for _ in range(100):  # a launched run is on its own
            time.sleep(0 if record.exists() else 0.1)
        calls = [json.loads(line) for line in record.read_text().splitlines()]
        assert calls
        for program, *argv in calls:
            if program.endswith("main_imp_fillback.py"):
                plans([*argv, "--save_dir", tmp_path / "unused"], capsys)


def test_both_languages_show_the_same_commands():
    assert commands(READMES[0]) == commands(READMES[1])
    assert blocks(READMES[0], "python") == blocks(READMES[1], "python")


@pytest.mark.parametrize("readme", READMES)
def test_links_and_pictures_lead_somewhere(readme):
    targets = re.findall(r"\]\(([^)#:]+)\)", (ROOT / readme).read_text(encoding="utf-8"))
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []
