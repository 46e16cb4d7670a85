"""Laws of the shell scripts, on a copy of them beside a program that shows its arguments instead of training."""

import contextlib
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["setup_env.sh", "run_vit_rsst.sh", "launch_experiment.sh", ".ci/run"]
SETTINGS = shlex.split("""
    ARCH DATASET STRUCT CRITERIA EPOCHS BATCH_SIZE LR WARMUP DECREASING_LR PRUNING_TIMES RATE RST_SCHEDULE REG
    EXPONENTS SEED PRETRAINED SAVE_DIR MAIN LAUNCH_GRACE VENV PYTHON SETUP_DEV VIRTUAL_ENV CONDA_PREFIX
    PYTHONPATH PYTHONHOME BASH_ENV
""")

SHOW = """
import json, os, sys, time
print(json.dumps(sys.argv[1:]), flush=True)
time.sleep(float(os.environ.get("SHOW_SLEEP", 0)))
if "SHOW_STATUS" in os.environ:
    print("boom")
    sys.exit(int(os.environ["SHOW_STATUS"]))
"""

# Found before the real pip through PYTHONPATH; writes down its calls.
FAKE_PIP = """
import os, sys, time
with open(os.environ["PIP_CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
mode = os.environ.get("PIP_MODE")
if mode == "fail":
    sys.exit("ERROR: no such thing")
time.sleep(60 if mode == "hang" else float(mode or 0))
"""


class Project:
    """A copy of the scripts in a folder with a blank in its name, requirements that every Python satisfies."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "a project"
        self.root.mkdir()
        for name in SCRIPTS[:3]:
            shutil.copy(ROOT / name, self.root / name)
        (self.root / "requirements.txt").write_text("# nothing\n")
        (self.root / "requirements-dev.txt").write_text("-r requirements.txt\n")
        (self.root / "main_imp_fillback.py").write_text(SHOW)
        tools = tmp_path / "tools"
        (tools / "pip").mkdir(parents=True)
        (tools / "pip" / "__init__.py").touch()
        (tools / "pip" / "__main__.py").write_text(FAKE_PIP)
        for name in ("python", "python3"):
            (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
            (tools / name).chmod(0o755)
        self.tools = tools
        self.calls = tmp_path / "pip_calls"
        self.environ = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("PIP_")}
        self.environ |= {
            "PATH": f"{tools}:{os.environ['PATH']}",
            "LAUNCH_GRACE": "20",
            "PIP_CALLS": str(self.calls),
        }

    def bash(self, *words, cwd=None, stdin=subprocess.DEVNULL, **environ):
        return subprocess.run(
            ["bash", *map(str, words)],
            cwd=cwd or self.root,
            env=self.environ | {k: str(v) for k, v in environ.items()},
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def pip_calls(self):
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def require(self, text):
        (self.root / "requirements.txt").write_text(text)


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def flags(argv):
    """["--rate", "0.2", "--pretrained"] -> {"rate": "0.2", "pretrained": True}"""
    found = {}
    for i, word in enumerate(argv):
        if word.startswith("--"):
            value = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else True
            found[word[2:]] = value
    return found


# run_vit_rsst.sh

RUN_DEFAULTS = shlex.split("""
    --dataset cifar100 --arch vit_tiny --struct rsst --criteria l1 --epochs 120 --batch_size 128 --lr 0.001
    --warmup 20 --decreasing_lr 60,90 --pruning_times 15 --rate 0.15 --RST_schedule exp_custom_exponents
    --reg_granularity_prune 0.5 --exponents 3 --seed 42
""")


def shown(result):
    """The command that was printed and the arguments that arrived."""
    assert result.returncode == 0, result.stderr
    command, argv = result.stdout.splitlines()
    return command, json.loads(argv)


def test_run_defaults_are_the_documented_experiment(project, tmp_path):
    command, argv = shown(project.bash(project.root / "run_vit_rsst.sh", cwd=tmp_path))
    assert argv == RUN_DEFAULTS
    assert command == "python main_imp_fillback.py " + " ".join(RUN_DEFAULTS)


@pytest.mark.parametrize(
    ("variable", "flag", "value"),
    [
        ("ARCH", "arch", "vit_small"),
        ("DATASET", "dataset", "digits"),
        ("STRUCT", "struct", "imp"),
        ("CRITERIA", "criteria", "magnitude"),
        ("BATCH_SIZE", "batch_size", "64"),
        ("LR", "lr", "0.1"),
        ("WARMUP", "warmup", "0"),
        ("DECREASING_LR", "decreasing_lr", "7,8"),
        ("PRUNING_TIMES", "pruning_times", "3"),
        ("RATE", "rate", "0.4"),
        ("RST_SCHEDULE", "RST_schedule", "x^2"),
        ("REG", "reg_granularity_prune", "0"),
        ("EXPONENTS", "exponents", "5"),
        ("SEED", "seed", "0"),
        ("PRETRAINED", "pretrained", "true"),
        ("SAVE_DIR", "save_dir", "results/a b"),
    ],
)
def test_run_environment_overrides_one_setting(project, variable, flag, value):
    command, argv = shown(project.bash("run_vit_rsst.sh", **{variable: value}))
    assert flags(argv) == flags(RUN_DEFAULTS) | {flag: True if flag == "pretrained" else value}
    assert shlex.split(command)[2:] == argv  # what is printed is what runs, blanks and all


@pytest.mark.parametrize("way", ["variable", "word", "equals"])
def test_run_other_epochs_leave_warmup_and_milestones_to_the_program(project, way):
    words = {"variable": [], "word": ["--epochs", "6"], "equals": ["--epochs=6"]}[way]
    environ = {"EPOCHS": "6"} if way == "variable" else {}
    argv = shown(project.bash("run_vit_rsst.sh", *words, **environ))[1]
    assert "--warmup" not in argv
    assert "--decreasing_lr" not in argv
    argv = shown(project.bash("run_vit_rsst.sh", *words, WARMUP=1, DECREASING_LR="3,4", **environ))[1]
    assert flags(argv)["warmup"] == "1"
    assert flags(argv)["decreasing_lr"] == "3,4"


def test_run_extra_arguments_come_last_as_they_are(project):
    extra = ["--seed", "7", "--exp_name", "two  words", "--save_dir", "", "*", "it's"]
    argv = shown(project.bash("run_vit_rsst.sh", *extra, SAVE_DIR="x"))[1]
    assert argv == [*RUN_DEFAULTS, "--save_dir", "x", *extra]


@pytest.mark.parametrize("value", ["True", "yes", "1", "weights.pth"])
def test_run_refuses_other_values_of_pretrained(project, value):
    result = project.bash("run_vit_rsst.sh", PRETRAINED=value)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == f"run_vit_rsst.sh: PRETRAINED is '{value}', must be true or false\n"


def test_run_ends_with_the_status_of_the_program(project):
    assert project.bash("run_vit_rsst.sh", SHOW_STATUS=5).returncode == 5


@pytest.mark.parametrize("script", ["run_vit_rsst.sh", "launch_experiment.sh"])
@pytest.mark.parametrize("words", [["--help"], ["-h"], ["digits", "--help"]])
def test_help_needs_no_set_up(project, script, words):
    project.require("not-there-at-all\n")
    result = project.bash(script, *words, PYTHON="no-such-python")
    assert (result.returncode, result.stderr) == (0, "")
    assert "usage: " in result.stdout


@pytest.mark.parametrize("line", ["run_vit_rsst.sh", "launch_experiment.sh digits vit_tiny 1 1 4 false 0 y"])
def test_nothing_starts_when_the_set_up_fails(project, line):
    project.require("not-there-at-all\n")
    result = project.bash(*line.split(), PYTHON="no-such-python")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "[" not in result.stdout
    assert not (project.root / "launch_logs").exists()


# launch_experiment.sh

LAUNCH_ARGUMENTS = ["digits", "vit_small", "3", "0.5", "2.5", "true", "0.3", "y", "refill", "0.1"]
LAUNCH_DEFAULTS = ["cifar10", "vit_tiny", "80", "1.0", "4", "true", "0.2", "n", "rsst", "0.2"]
NAMES = ["dataset", "model", "epochs", "reg", "exp", "pretrained", "rate", "auto", "algorithm", "fillback"]


def expected_flags(arguments):
    dataset, model, epochs, reg, exp, pretrained, rate, _, algorithm, fillback = arguments
    expected = {"dataset": dataset, "arch": model, "struct": algorithm, "epochs": epochs, "rate": rate}
    expected |= {"RST_schedule": "exp_custom_exponents", "reg_granularity_prune": reg, "exponents": exp}
    if pretrained == "true" and model != "vit_tiny":
        expected["pretrained"] = True
    if algorithm in ("rsst", "refill"):
        expected["fillback_rate"] = fillback
    return expected


def launch(project, *arguments, answer=None, **environ):
    """With an answer, standard input is a terminal on which it is typed."""
    if answer is None:
        return project.bash("launch_experiment.sh", *arguments, **environ)
    keyboard, terminal = pty.openpty()
    try:
        os.write(keyboard, answer.encode())
        return project.bash("launch_experiment.sh", *arguments, stdin=terminal, **environ)
    finally:
        os.close(keyboard)
        os.close(terminal)


def started(project):
    """The arguments of the one run that was started, from its log."""
    (log,) = (project.root / "launch_logs").iterdir()
    return json.loads(log.read_text().splitlines()[0])


@pytest.mark.parametrize("count", range(11))
def test_launch_takes_zero_to_ten_arguments(project, count):
    arguments = LAUNCH_ARGUMENTS[:count] + LAUNCH_DEFAULTS[count:]
    result = launch(project, *LAUNCH_ARGUMENTS[:count], answer=None if count >= 8 else "y\n")
    assert result.returncode == 0, result.stderr
    argv = started(project)
    assert flags(argv) == expected_flags(arguments)
    lines = result.stdout.splitlines()
    table = dict(line.split(maxsplit=1) for line in lines[:10])
    assert table == dict(zip(NAMES, arguments, strict=True))
    assert len({line.index(value) for line, value in zip(lines, arguments, strict=False)}) == 1
    assert f"command     python main_imp_fillback.py {' '.join(argv)}" in lines
    assert ("Start? [y/N]" in result.stderr) == (count < 8)


@pytest.mark.parametrize("algorithm", ["rsst", "refill", "imp", "dense"])
def test_launch_passes_fillback_only_where_it_means_something(project, algorithm):
    arguments = [*LAUNCH_ARGUMENTS[:8], algorithm, "1"]
    assert launch(project, *arguments).returncode == 0
    assert flags(started(project)) == expected_flags(arguments)


def assert_refused(project, result, *words):
    assert (result.returncode, result.stdout) == (2, "")
    reason, usage = result.stderr.splitlines()
    assert reason.startswith("launch_experiment.sh: ")
    for word in words:
        assert word in reason
    assert usage == "usage: launch_experiment.sh " + " ".join(f"<{name}>" for name in NAMES)
    assert not (project.root / "launch_logs").exists()


def test_launch_refuses_an_eleventh_argument(project):
    assert_refused(project, launch(project, *LAUNCH_ARGUMENTS, "more"), "11 arguments", "'more'")


WRONG = {
    "dataset": ["mnist", "", "CIFAR10"],
    "model": ["res20s", "vit"],
    "epochs": ["0", "-1", "1.5", "ten", ""],
    "reg": ["-0.1", "nan", "inf", "1e999", "x", "1,5"],
    "exp": ["0", "0.0", "-4", "."],
    "pretrained": ["yes", "True"],
    "rate": ["1", "1.0", "-0.1", "1.5", "20%"],
    "auto": ["yes", "Y", ""],
    "algorithm": ["oneshot", "RSST"],
    "fillback": ["1.01", "-1", "2", ""],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name in NAMES for value in WRONG[name]])
def test_launch_refuses_a_wrong_value(project, name, value):
    arguments = list(LAUNCH_ARGUMENTS)
    arguments[NAMES.index(name)] = value
    assert_refused(project, launch(project, *arguments), f"{name} is '{value}'")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("reg", "0"),
        ("reg", "1e-4"),
        ("exp", ".5"),
        ("rate", "0"),
        ("rate", "0.999"),
        ("fillback", "0"),
        ("fillback", "1.0"),
    ],
)
def test_launch_takes_values_at_the_border(project, name, value):
    arguments = list(LAUNCH_ARGUMENTS)
    arguments[NAMES.index(name)] = value
    assert launch(project, *arguments).returncode == 0
    assert flags(started(project)) == expected_flags(arguments)


def test_launch_does_not_ask_without_a_terminal(project):
    assert_refused(project, launch(project), "auto is 'n'", "terminal")


@pytest.mark.parametrize("answer", ["n\n", "\n", "\x04", "yikes\n"])
def test_launch_starts_only_on_yes(project, answer):
    result = launch(project, "digits", answer=answer)
    assert result.returncode == 1
    assert "not started" in result.stdout
    assert not (project.root / "launch_logs").exists()


def test_launch_says_that_vit_tiny_has_no_public_weights(project):
    arguments = [*LAUNCH_ARGUMENTS]
    note = "note: vit_tiny has no public weights"
    assert note not in launch(project, *arguments).stdout
    shutil.rmtree(project.root / "launch_logs")
    arguments[1] = "vit_tiny"
    assert note in launch(project, *arguments).stdout
    assert "--pretrained" not in started(project)
    arguments[5] = "false"
    assert note not in launch(project, *arguments).stdout


def test_launched_run_stays_and_can_be_followed_and_stopped(project, tmp_path):
    script = project.root / "launch_experiment.sh"
    before = time.monotonic()
    result = project.bash(script, *LAUNCH_ARGUMENTS, cwd=tmp_path, SHOW_SLEEP=50, LAUNCH_GRACE=1)
    assert time.monotonic() - before < 40  # it does not wait for the run
    assert result.returncode == 0, result.stderr
    process = int(re.search(r"^process +(\d+)$", result.stdout, re.M)[1])
    try:
        log = re.search(r"^log +(.*)$", result.stdout, re.M)[1]
        assert re.fullmatch(r"digits_vit_small_refill_\d{8}_\d{6}\.log", Path(log).name)
        assert Path(log).parent == project.root / "launch_logs"
        assert flags(json.loads(Path(log).read_text())) == expected_flags(LAUNCH_ARGUMENTS)
        os.kill(process, 0)
        follow = re.search(r"^follow +tail -f (.*)$", result.stdout, re.M)[1]
        assert project.bash("-c", f"tail -n 1 {follow}", cwd=tmp_path).stdout == Path(log).read_text()
        stop = re.search(r"^stop +(.*)$", result.stdout, re.M)[1]
        assert project.bash("-c", stop).returncode == 0
        for _ in range(100):
            if not Path(f"/proc/{process}/cmdline").exists() or not Path(f"/proc/{process}/cmdline").read_bytes():
                break
            time.sleep(0.05)
        else:
            pytest.fail("the run outlived its stop command")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def test_launch_reports_a_run_that_dies_at_once(project):
    result = launch(project, *LAUNCH_ARGUMENTS, SHOW_STATUS=3)
    assert result.returncode == 1
    (line,) = result.stderr.splitlines()
    assert "status 3" in line
    assert line.endswith("ends with: boom")
    result = launch(project, *LAUNCH_ARGUMENTS, MAIN="no_such_program.py")
    assert result.returncode == 1
    assert "no_such_program.py" in result.stderr


def test_launches_within_one_second_have_logs_of_their_own(project):
    (project.tools / "date").write_text("#!/bin/sh\necho 20260101_000000\n")
    (project.tools / "date").chmod(0o755)
    for _ in range(3):
        assert launch(project, *LAUNCH_ARGUMENTS).returncode == 0
    stem = "digits_vit_small_refill_20260101_000000"
    logs = {path.name for path in (project.root / "launch_logs").iterdir()}
    assert logs == {f"{stem}.log", f"{stem}_2.log", f"{stem}_3.log"}


# setup_env.sh


def python_after(project, *, before="", cwd=None, **environ):
    """Sources setup_env.sh and returns the prefix of `python`, standard error and the status."""
    script = f'{before}\nsource "{project.root}/setup_env.sh" && python -c "import sys; print(sys.prefix)"'
    result = project.bash("-c", script, cwd=cwd, **environ)
    return result.stdout.strip(), result.stderr, result.returncode


@pytest.fixture
def venv(project, tmp_path):
    """Where the set-up makes its environment, with a pip that only writes down its calls."""
    project.environ |= {"VENV": str(tmp_path / "made here"), "PYTHONPATH": str(project.tools)}
    project.require("not-there-at-all>=1\n")
    return tmp_path / "made here"


STAMP = ".setup_env_stamp"


def test_setup_uses_an_active_environment_as_it_is(project, tmp_path):
    shutil.copy(ROOT / "requirements.txt", project.root / "requirements.txt")  # those of the tests' own Python
    other = tmp_path / "other"
    environ = {"VIRTUAL_ENV": sys.prefix, "VENV": other, "PYTHON": "no-such-python"}
    if sys.prefix == sys.base_prefix:
        pytest.skip("the tests do not run in a virtual environment")
    assert python_after(project, **environ) == (sys.prefix, "", 0)
    assert not other.exists()
    result = project.bash("setup_env.sh", **environ)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_setup_uses_a_python_that_has_everything(project):
    assert python_after(project, PYTHON="no-such-python") == (sys.prefix, "", 0)
    assert not (project.root / ".venv").exists()


def test_setup_leaves_an_active_environment_that_lacks_something(project, venv, tmp_path):
    active = tmp_path / "active"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", active], check=True)
    before = sorted(active.rglob("*"))
    prefix, _, status = python_after(project, VIRTUAL_ENV=active, PATH=f"{active}/bin:{project.environ['PATH']}")
    assert (prefix, status) == (str(venv), 0)
    assert sorted(active.rglob("*")) == before


def test_setup_installs_once_and_again_when_requirements_change(project, venv):
    prefix, said, status = python_after(project)
    assert (prefix, status) == (str(venv), 0)
    assert said == f"setup_env.sh: installing requirements.txt into {venv} (downloads several GB the first time)\n"
    assert len(project.pip_calls()) == 1
    assert project.pip_calls()[0].endswith("-r requirements.txt")

    for _ in range(2):
        assert python_after(project) == (str(venv), "", 0)
    assert len(project.pip_calls()) == 1

    project.require("not-there-at-all>=2\n")
    assert python_after(project)[2] == 0
    assert len(project.pip_calls()) == 2
    assert python_after(project) == (str(venv), "", 0)
    assert len(project.pip_calls()) == 2


def test_setup_installs_the_test_tools_when_asked(project, venv):
    project.bash("setup_env.sh")
    assert python_after(project, before="export SETUP_DEV=1")[2] == 0
    assert len(project.pip_calls()) == 2
    assert project.pip_calls()[1].endswith("-r requirements.txt -r requirements-dev.txt")
    # The line of the README; and what the tests need includes what a run needs.
    line = f'SETUP_DEV=1 source "{project.root}/setup_env.sh" && python -c "import sys; print(sys.prefix)"'
    assert project.bash("-c", line).stdout.strip() == str(venv)
    project.bash("setup_env.sh")
    assert len(project.pip_calls()) == 2


def fill_by_hand(venv, **versions):
    """An environment without pip, in which the named packages are there as far as their metadata goes."""
    if not venv.exists():
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    for name, version in versions.items():
        version, _, requires = version.partition(" ")
        metadata = site / f"{name}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")


def test_setup_takes_an_environment_that_was_filled_by_hand(project, venv):
    fill_by_hand(venv, hand_made="1.10")
    project.require("hand-made>=1.2,<2  # as this one is\n")
    assert python_after(project) == (str(venv), "", 0)
    assert project.pip_calls() == []


@pytest.mark.parametrize(
    ("torch", "torchvision", "fits"),
    [
        ("2.9.1+cpu", "0.24.1+cpu Requires-Dist: torch==2.9.1", True),
        ("2.9.1", "0.24.1 Requires-Dist: torch (==2.9.1)", True),
        ("2.9.1+cpu", "0.24.1 Requires-Dist: torch==2.9.1", False),
        ("2.10.0", "0.24.1 Requires-Dist: torch==2.9.1", False),
        ("2.9.0rc1", "0.24.1", False),
        ("2.9.0", "0.24.0", True),
    ],
)
def test_setup_takes_torch_and_torchvision_only_as_a_pair(project, venv, torch, torchvision, fits):
    fill_by_hand(venv, torch=torch, torchvision=torchvision)
    project.require("torch>=2.9\ntorchvision>=0.24\n")
    assert project.bash("setup_env.sh").returncode == 0
    assert (project.pip_calls() == []) == fits


@pytest.mark.parametrize(
    "line", ["hand-made>=1.11", "hand-made<1.2", "hand-made<=1.9", "hand-made==1.1", "hand-made==1.10.*", "other"]
)
def test_setup_asks_pip_when_a_requirement_is_not_met(project, venv, line):
    fill_by_hand(venv, hand_made="1.10")
    project.require(line + "\n")
    assert project.bash("setup_env.sh", PYTHONOPTIMIZE=1).returncode == 0
    assert len(project.pip_calls()) == 1


def test_setup_that_fails_leaves_no_stamp(project, venv):
    project.bash("setup_env.sh")
    project.require("not-there-at-all>=3\n")
    prefix, said, status = python_after(project, PIP_MODE="fail")
    assert (prefix, status) == ("", 1)
    assert said.splitlines()[-1].startswith("setup_env.sh: pip failed (see above): check the network")
    assert not (venv / STAMP).exists()
    assert project.bash("setup_env.sh", PIP_MODE="fail").returncode == 1
    assert python_after(project)[::2] == (str(venv), 0)
    assert (venv / STAMP).exists()
    assert not Path(f"{venv}.lock").exists()


def test_setup_that_was_killed_starts_over(project, venv):
    process = subprocess.Popen(
        ["bash", "setup_env.sh"],
        cwd=project.root,
        env=project.environ | {"PIP_MODE": "hang"},
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        for _ in range(200):
            if project.pip_calls():
                break
            time.sleep(0.05)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert project.pip_calls()
    assert not (venv / STAMP).exists()
    half_written = venv / "half_written"
    half_written.touch()
    assert python_after(project)[::2] == (str(venv), 0)
    assert not half_written.exists()
    assert (venv / STAMP).exists()


def test_two_set_ups_at_once_install_once(project, venv):
    command = ["bash", "setup_env.sh"]
    environ = project.environ | {"PIP_MODE": "1"}
    both = [subprocess.Popen(command, cwd=project.root, env=environ, stderr=subprocess.PIPE, text=True) for _ in "ab"]
    said = sorted(process.communicate(timeout=30)[1] for process in both)
    assert [process.returncode for process in both] == [0, 0]
    assert len(project.pip_calls()) == 1
    assert "installing" in said[0]
    assert re.fullmatch(r"(setup_env.sh: waiting for process \d+, which .*\n)?", said[1])


@pytest.mark.parametrize("strict", ["", "set -euo pipefail"])
def test_sourcing_changes_only_the_environment(project, venv, tmp_path, strict):
    # Folder, options, functions, traps and variables before and after, but for what bash and `deactivate` leave.
    moves = "_|PS1|_OLD_VIRTUAL_PS1|PIPESTATUS|BASH_REMATCH"
    look = f"{{ pwd; shopt -o; shopt; declare -F; trap; compgen -v | grep -vxE '{moves}'; }}"
    script = f"""{strict}
        {look} >before; source "{project.root}/setup_env.sh"; deactivate; {look} >after; diff before after
        source ./*/setup_env.sh; python -c 'import sys; print(sys.prefix)'"""
    result = project.bash("-c", script, cwd=tmp_path)
    assert result.returncode == 0, result.stderr + result.stdout
    assert result.stdout == f"{venv}\n"


def test_setup_of_a_moved_environment_finds_its_python(project, venv, tmp_path):
    project.bash("setup_env.sh")
    moved = tmp_path / "moved"
    venv.rename(moved)
    assert python_after(project, VENV=moved) == (str(moved), "", 0)
    assert len(project.pip_calls()) == 1


def test_setup_makes_a_broken_environment_anew(project, venv):
    project.bash("setup_env.sh")
    for link in (venv / "bin").glob("python*"):
        link.unlink()
        link.symlink_to("/no/such/python")
    assert python_after(project)[::2] == (str(venv), 0)
    assert len(project.pip_calls()) == 2


def test_setup_borrows_what_is_there_when_only_the_name_python_is_missing(project, tmp_path):
    base = sys.executable if sys.prefix == sys.base_prefix else f"{sys.base_prefix}/bin/python3"
    (project.tools / "python").write_text("#!/bin/sh\nexit 127\n")
    (project.tools / "python3").write_text(f'#!/bin/sh\nexec "{base}" "$@"\n')
    venv = project.root / ".venv"
    assert python_after(project) == (str(venv), "", 0)
    assert "include-system-site-packages = true" in (venv / "pyvenv.cfg").read_text()
    assert project.pip_calls() == []


def fake_python(project, code):
    """A python3 in which `code` runs first."""
    path = project.tools / "strange-python"
    path.write_text(
        f"""#!/bin/sh
[ "$1" = -c ] || exec "{sys.executable}" "$@"
exec "{sys.executable}" -c 'import sys; {code}; exec(sys.argv[1])' "$2"
"""
    )
    path.chmod(0o755)
    return path


def test_setup_errors_are_one_clear_line(project, venv, tmp_path):
    def error(**environ):
        for line in (["setup_env.sh"], ["-c", "set -eu; source setup_env.sh; echo went on"]):
            result = project.bash(*line, **environ)
            assert (result.returncode, result.stdout) == (1, "")
            (line,) = result.stderr.splitlines()
        assert not Path(f"{environ.get('VENV', venv)}.lock").exists()
        return line.removeprefix("setup_env.sh: ")

    assert error(PYTHON="no-such-python").startswith("no no-such-python found: install Python 3.10 or newer")
    old = fake_python(project, "sys.version_info = (3, 9, 18)")
    assert error(PYTHON=old).startswith(f"{old} is not Python 3.10 or newer: set PYTHON")
    bare = fake_python(project, 'sys.modules["ensurepip"] = None')
    assert error(PYTHON=bare).endswith("as in apt install python3-venv")
    assert not venv.exists()
    assert error(VENV=project.root).endswith("is no Python environment: set VENV to another folder")
    assert error(VENV=project.root / "setup_env.sh" / "x").startswith("cannot write to ")


def test_setup_with_the_real_pip(project, tmp_path):
    info = "tiny_one-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tiny_one-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tiny_one.py", "")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-one\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    environ = {"PIP_NO_INDEX": 1, "PIP_FIND_LINKS": tmp_path.as_uri(), "PIP_CONFIG_FILE": os.devnull}
    venv = project.root / ".venv"

    project.require("tiny-one>=1\n")
    script = "source setup_env.sh && python -c 'import sys, tiny_one; print(sys.prefix)'"
    result = project.bash("-c", script, **environ)
    assert result.stdout == f"{venv}\n", result.stderr
    assert (venv / STAMP).exists()

    project.require("tiny-two\n")
    _, said, status = python_after(project, **environ)
    assert status == 1
    assert "tiny-two" in said
    assert said.splitlines()[-1].startswith("setup_env.sh: pip failed")
    assert not (venv / STAMP).exists()


# all of them


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_scripts_are_clean_under_shellcheck():
    result = subprocess.run(["shellcheck", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_can_be_executed(script):
    assert os.access(ROOT / script, os.X_OK)


def test_ci_runs_the_test_command_of_the_readme():
    command = "SETUP_DEV=1 source setup_env.sh && python -m pytest"
    assert command in (ROOT / ".ci" / "run").read_text()
    readme = ROOT / "README.md"
    assert not readme.exists() or command in readme.read_text()
