"""Laws of the shell scripts, on a copy of them beside a program that shows its arguments instead of training."""

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
from pathlib import Path

import packaging
import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.run import parse_args as parse_torchrun

from benchmarks.compare_commits import differences

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["setup_env.sh", "run_vit_rsst.sh", "launch_experiment.sh", ".ci/run"]
COMPARISONS = ["compare_criteria", "compare_methods", "compare_variants", "vit_vs_cnn"]

SHOW = """
import json, os, sys, time
print(json.dumps(sys.argv[1:]), flush=True)
open(os.environ["POLICY"], "a").write(os.environ["OMP_WAIT_POLICY"] + "\\n")
time.sleep(float(os.environ.get("SHOW_SLEEP", 0)))
sys.exit(int(os.environ.get("SHOW_STATUS", 0)))
"""
RECORD = """
import json, os, sys
with open(os.environ["RECORD"], "a+") as calls:
    calls.seek(0)
    number = len(calls.readlines())
    calls.write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
sys.exit(int(os.environ.get("RECORD_STATUS", 0)) if number == int(os.environ.get("RECORD_FAILS", -1)) else 0)
"""
FAKE_PIP = """
import os, signal, sys
with open(os.environ["PIP_CALLS"], "a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\\n")
if os.environ.get("PIP_MODE") == "kill":
    os.killpg(0, signal.SIGKILL)
sys.exit(os.environ.get("PIP_MODE") == "fail")
"""


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


class Project:
    """A copy of the scripts in a folder with a blank in its name; the active environment claims to have everything."""

    def __init__(self, tmp_path):
        self.root = tmp_path / "a project"
        self.logs = self.root / "launch_logs"
        self.requirements = write(self.root / "requirements.txt", "# nothing\n")
        write(self.root / "requirements-dev.txt", "-r requirements.txt\nnot-there-for-tests\n")
        write(self.root / "main_imp_fillback.py", SHOW)
        for name in SCRIPTS[:3]:
            shutil.copy(ROOT / name, self.root)
        shutil.copytree(ROOT / "benchmarks", self.root / "benchmarks", ignore=shutil.ignore_patterns("*.py", "*.json"))
        self.pip_calls = write(tmp_path / "pip_calls", "")
        python = f'#!/bin/sh\n[ "$1" != - ] || exit 0\nexec "{sys.executable}" "$@"\n'
        active = write(tmp_path / "active" / "bin" / "python", python).parent.parent
        self.environ = {k: os.environ[k] for k in ("PATH", "HOME", "LD_LIBRARY_PATH") if k in os.environ}
        self.environ |= {"LAUNCH_GRACE": "20", "PIP_CALLS": self.pip_calls, "VIRTUAL_ENV": active}
        self.environ["POLICY"] = tmp_path / "policy"

    def bash(self, *words, cwd=None, stdin=subprocess.DEVNULL, timeout=60, **environ):
        """Returns the status, standard output and standard error."""
        environ = {k: str(v) for k, v in (self.environ | environ).items()}
        options = {"capture_output": True, "text": True, "start_new_session": True, "timeout": timeout}
        result = subprocess.run(["bash", *words], cwd=cwd or self.root, env=environ, stdin=stdin, **options)
        return result.returncode, result.stdout, result.stderr


@pytest.fixture
def project(tmp_path):
    return Project(tmp_path)


def test_scripts_are_clean_and_ci_runs_the_documented_command():
    comparisons = [f"benchmarks/{name}.sh" for name in COMPARISONS]
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", *SCRIPTS, *comparisons, "benchmarks/compare.sh"], cwd=ROOT, check=True)
    assert {path.stem for path in (ROOT / "benchmarks").glob("*.sh")} == {*COMPARISONS, "compare"}
    assert all(os.access(ROOT / script, os.X_OK) for script in (*SCRIPTS, *comparisons))
    command, ci = "SETUP_DEV=1 source setup_env.sh && python -m pytest", (ROOT / ".ci" / "run").read_text()
    assert command in ci
    assert command in (ROOT / "README.md").read_text()
    assert 'export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"\n' in ci


@pytest.mark.parametrize("line", ["run_vit_rsst.sh", "launch_experiment.sh digits vit_tiny 1 1 4 false 0 y"])
def test_nothing_starts_when_the_set_up_fails_and_help_needs_none(project, line):
    project.environ |= {"VIRTUAL_ENV": "", "PYTHON": "no-such-python"}
    status, out, err = project.bash(*line.split())
    assert (status, err.count("\n"), "[" in out, project.logs.exists()) == (1, 1, False, False)
    status, out, err = project.bash(*line.split(), "--help")
    assert (status, err, "usage: " in out) == (0, "", True)


def test_waiting_threads_sleep_unless_the_user_wants_otherwise(project):
    for line in ("run_vit_rsst.sh", "launch_experiment.sh digits vit_tiny 1 1 4 false 0 y"):
        project.environ["POLICY"].unlink(missing_ok=True)
        assert project.bash(*line.split())[0] == project.bash(*line.split(), OMP_WAIT_POLICY="ACTIVE")[0] == 0
        calls = project.environ["POLICY"].read_text().split()
        assert calls == ["passive"] * (len(calls) // 2) + ["ACTIVE"] * (len(calls) // 2)
        assert calls


# run_vit_rsst.sh

RUN_DEFAULTS = shlex.split("""
    --dataset cifar100 --arch vit_tiny --struct rsst --criteria l1 --epochs 120 --batch_size 128 --lr 0.001
    --warmup 20 --decreasing_lr 60,90 --pruning_times 15 --rate 0.15 --RST_schedule exp_custom_exponents
    --reg_granularity_prune 0.5 --exponents 3 --seed 42
""")


def shown(project, *words, **options):
    """The arguments that arrived, the same that were printed."""
    status, out, err = project.bash(project.root / "run_vit_rsst.sh", *words, **options)
    assert (status, err) == (0, "")
    command, argv = out.splitlines()
    assert shlex.split(command) == ["python", "main_imp_fillback.py", *json.loads(argv)]
    return json.loads(argv)


def test_run_defaults_are_the_documented_experiment_whose_warmup_and_milestones_belong_to_its_epochs(project, tmp_path):
    assert shown(project, cwd=tmp_path) == RUN_DEFAULTS
    for words, environ in [([], {"EPOCHS": 6}), (["--epochs", "6"], {}), (["--epochs=6"], {})]:
        assert not {"--warmup", "--decreasing_lr"} & {*shown(project, *words, **environ)}


def test_run_environment_overrides_every_setting_and_extra_arguments_come_last(project):
    extra = ["--seed", "7", "--exp_name", "two  words", "--save_dir", "", "*", "it's"]
    environ = shlex.split("""
        DATASET=digits ARCH=vit_small STRUCT=imp CRITERIA=magnitude EPOCHS=9 BATCH_SIZE=64 LR=0.1 WARMUP=0
        DECREASING_LR=7,8 PRUNING_TIMES=3 RATE=0.4 PRETRAINED=true RST_SCHEDULE=x^2 REG=0 EXPONENTS=5 SEED=0
        SAVE_DIR='results/a b'
    """)
    expected = shlex.split("""
        --dataset digits --arch vit_small --struct imp --criteria magnitude --epochs 9 --batch_size 64 --lr 0.1
        --warmup 0 --decreasing_lr 7,8 --pruning_times 3 --rate 0.4 --pretrained --RST_schedule x^2
        --reg_granularity_prune 0 --exponents 5 --seed 0 --save_dir 'results/a b'
    """)
    assert shown(project, *extra, **dict(word.split("=") for word in environ)) == expected + extra
    assert project.bash("run_vit_rsst.sh", PRETRAINED="True")[:2] == (2, "")
    assert project.bash("run_vit_rsst.sh", SHOW_STATUS=5)[0] == 5  # that of the program


# several processes


@pytest.fixture
def launcher(project, tmp_path):
    """The environment's Python finds this torchrun, which shows how it was called."""
    for package in ("torch", "torch/distributed"):
        write(tmp_path / "stub" / package / "__init__.py", "")
    write(tmp_path / "stub" / "torch" / "distributed" / "run.py", SHOW)
    project.environ["PYTHONPATH"] = tmp_path / "stub"


@pytest.mark.usefixtures("launcher")
@pytest.mark.parametrize("script", ["run_vit_rsst.sh", "launch_experiment.sh"])
def test_nproc_puts_torchrun_before_the_same_command(project, script):
    words = LAUNCH_ARGUMENTS if script.startswith("launch") else ["--lr", "1"]

    def started(**environ):
        status, out, err = project.bash(script, *words, **environ)
        assert (status, err) == (0, "")
        (log,) = project.logs.iterdir() if project.logs.exists() else [None]
        arrived = json.loads(log.read_text() if log else out.splitlines()[1])
        shutil.rmtree(project.logs, ignore_errors=True)
        return re.search(r"^(?:command +)?(python .*)$", out, re.MULTILINE)[1], arrived

    command, flags = started()
    assert started(NPROC="1") == started(NPROC="") == (command, flags)
    torchrun = ["--standalone", "--nproc_per_node=12"]
    program = f"python -m torch.distributed.run {' '.join(torchrun)} "
    assert started(NPROC="12") == (command.replace("python ", program, 1), [*torchrun, "main_imp_fillback.py", *flags])
    parsed = parse_torchrun([*torchrun, "main_imp_fillback.py", *flags])
    assert (parsed.nproc_per_node, parsed.training_script_args) == ("12", flags)


@pytest.mark.parametrize("value", ["0", "two", "-1", "1.5", "08", "2 2"])
def test_nproc_is_a_number_of_processes(project, value):
    for script in ("run_vit_rsst.sh", "launch_experiment.sh"):
        status, out, err = project.bash(script, NPROC=value)
        assert (status, out, project.logs.exists()) == (2, "", False)
        assert err.splitlines()[0] == f"{script}: NPROC is '{value}', must be a whole number of at least 1"


# launch_experiment.sh

NAMES = ["dataset", "model", "epochs", "reg", "exp", "pretrained", "rate", "auto", "algorithm", "fillback"]
LAUNCH_DEFAULTS = ["cifar10", "vit_tiny", "80", "1.0", "4", "true", "0.2", "n", "rsst", "0.2"]
LAUNCH_ARGUMENTS = ["digits", "vit_small", "3", "0.5", "2.5", "true", "0.3", "y", "refill", "0.1"]
OTHER = shlex.split("algorithm=imp algorithm=dense pretrained=false reg=0 exp=.5 rate=1e-4 fillback=1.0")
WRONG = shlex.split("dataset= model=vit epochs=0 reg=nan exp=0 pretrained=1 rate=1 auto=Y algorithm=RSST fillback=1.1")


def launch(project, *arguments, answer="", **options):
    """With an answer, standard input is a terminal on which it is typed."""
    if not answer:
        return project.bash("launch_experiment.sh", *arguments, **options)
    keyboard, terminal = pty.openpty()
    with open(keyboard, "wb", 0) as typing, open(terminal, "rb", 0) as stdin:
        typing.write(answer.encode())
        return project.bash("launch_experiment.sh", *arguments, stdin=stdin, **options)


def with_argument(setting):
    name, value = setting.split("=")
    return [value if name == n else v for n, v in zip(NAMES, LAUNCH_ARGUMENTS, strict=True)]


def assert_started(project, result, arguments):
    """It printed the ten settings and the command, whose arguments are in the log of the one run."""
    status, out, err = result
    assert status == 0, err
    dataset, model, epochs, reg, exp, pretrained, rate, _, algorithm, fillback = arguments
    command = ["--dataset", dataset, "--arch", model, "--struct", algorithm, "--epochs", epochs, "--rate", rate]
    command += ["--pretrained"] if pretrained == "true" and model != "vit_tiny" else []
    command += ["--RST_schedule", "exp_custom_exponents", "--reg_granularity_prune", reg, "--exponents", exp]
    command += ["--fillback_rate", fillback] if algorithm in ("rsst", "refill") else []
    (log,) = project.logs.iterdir()
    assert json.loads(log.read_text()) == command
    assert out.split()[:20] == [word for pair in zip(NAMES, arguments, strict=True) for word in pair]
    assert f"\ncommand     python main_imp_fillback.py {' '.join(command)}\n" in out
    assert ("note: vit_tiny has no public weights" in out) == (pretrained == "true" and model == "vit_tiny")


@pytest.mark.parametrize("arguments", [LAUNCH_ARGUMENTS[:n] for n in (0, 5, 8)] + [*map(with_argument, OTHER)])
def test_launch_takes_zero_to_ten_arguments(project, arguments):
    result = launch(project, *arguments, answer="y\n" if len(arguments) < 8 else "")
    assert ("Start? [y/N]" in result[2]) == (len(arguments) < 8)
    assert_started(project, result, arguments + LAUNCH_DEFAULTS[len(arguments) :])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [(with_argument(setting), setting.replace("=", " is '") + "'") for setting in WRONG]
    + [([*LAUNCH_ARGUMENTS, "more"], "11 arguments, the eleventh is 'more'"), ([], "auto is 'n' and there is no term")],
)
def test_launch_refuses_wrong_arguments(project, arguments, reason):
    status, out, err = launch(project, *arguments)
    assert (status, out, project.logs.exists()) == (2, "", False)
    assert err.startswith(f"launch_experiment.sh: {reason}")
    assert err.splitlines()[1:] == ["usage: launch_experiment.sh " + " ".join(f"<{name}>" for name in NAMES)]


@pytest.mark.parametrize("answer", ["n\n", "\n", "\x04"])
def test_launch_starts_only_on_yes(project, answer):
    status, out, _ = launch(project, answer=answer)
    assert (status, "not started" in out, project.logs.exists()) == (1, True, False)


def test_launched_run_stays_and_can_be_followed_and_stopped(project):
    started = time.monotonic()
    result = launch(project, *LAUNCH_ARGUMENTS, SHOW_SLEEP=50, LAUNCH_GRACE=1)
    assert time.monotonic() - started < 40  # it does not wait for the run
    assert_started(project, result, LAUNCH_ARGUMENTS)
    told = dict(line.split(maxsplit=1) for line in result[1].splitlines())
    log, alive = Path(told["log"]), Path("/proc", told["process"], "cmdline")
    assert re.fullmatch(r"digits_vit_small_refill_\d{8}_\d{6}\.log", log.name)
    os.kill(int(told["process"]), 0)
    follow = told["follow"].replace("tail -f", "tail -n 1")
    assert project.bash("-c", follow, cwd="/") == (0, log.read_text(), "")
    assert project.bash("-c", told["stop"]) == (0, "", "")
    while alive.exists() and alive.read_bytes():  # gone, or waiting to be collected
        assert time.monotonic() - started < 40, "the run outlived its stop command"
        time.sleep(0.05)


def test_launches_within_one_second_have_logs_of_their_own_and_say_when_a_run_dies_at_once(project, tmp_path):
    write(tmp_path / "date", "#!/bin/sh\necho 20260101_000000\n")
    for _ in range(2):
        status, _, err = launch(project, *LAUNCH_ARGUMENTS, PATH=f"{tmp_path}:{os.environ['PATH']}", SHOW_STATUS=3)
        assert status == 1
        assert re.fullmatch(r".* status 3; .* ends with: \[.*\]\n", err)
    names = [f"digits_vit_small_refill_20260101_000000{number}.log" for number in ("", "_2")]
    assert sorted(log.name for log in project.logs.iterdir()) == names


# setup_env.sh


@pytest.fixture
def venv(project, tmp_path):
    """Where the set-up makes its environment, here with a pip that only writes down its calls."""
    tools = tmp_path / "tools"
    (write(tools / "pip" / "__main__.py", FAKE_PIP).parent / "_vendor").mkdir()
    (tools / "pip" / "_vendor" / "packaging").symlink_to(packaging.__path__[0])
    quick = f'#!/bin/sh\n[ "$2" != venv ] || set -- "$@" --without-pip\nexec "{sys.executable}" "$@"\n'
    project.environ |= {"PYTHON": write(tools / "python", quick), "PYTHONPATH": tools, "VIRTUAL_ENV": ""}
    project.environ["VENV"] = tmp_path / "made here"
    project.requirements.write_text("not-there-at-all>=1\n")
    return tmp_path / "made here"


def python_after(project, **environ):
    """Sources setup_env.sh and returns the status, the prefix of `python` and standard error."""
    script = f'source "{project.root}/setup_env.sh" && python -c "import sys; print(sys.prefix, end=str())"'
    return project.bash("-c", script, cwd="/", **environ)


def fill_by_hand(venv, *packages):
    """An environment without pip, with packages as far as their metadata goes: NAME VERSION [LINE OF METADATA]."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    for package in packages:
        name, version, *more = package.split(" ", 2)
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}", *more]
        write(site / f"{name}-{version}.dist-info" / "METADATA", "\n".join(lines))


def test_setup_uses_an_active_environment_that_has_everything(project, venv, tmp_path):
    active = tmp_path / "other"
    fill_by_hand(active, "handmade 1.10")
    before = sorted(active.rglob("*"))
    project.requirements.write_text("handmade>=1.2\n")
    for path in ({}, {"PATH": f"{active}/bin:{os.environ['PATH']}"}):
        assert python_after(project, PYTHON="no-such-python", VIRTUAL_ENV=active, **path) == (0, str(active), "")
    assert not venv.exists()
    project.requirements.write_text("handmade>=2\n")
    assert python_after(project, VIRTUAL_ENV=active)[:2] == (0, str(venv))
    assert sorted(active.rglob("*")) == before


def test_setup_installs_once_and_again_when_requirements_change(project, venv):
    said = "setup_env.sh: installing {} into {} (downloads several GB the first time)\n"
    for calls, (dev, lower) in enumerate([("", 1), ("", 2), ("1", 2)], start=1):
        project.requirements.write_text(f"not-there-at-all>={lower}\n")
        files = ["requirements.txt", "requirements-dev.txt"][: 2 if dev else 1]
        assert python_after(project, SETUP_DEV=dev) == (0, str(venv), said.format(" ".join(files), venv))
        assert python_after(project, SETUP_DEV=dev) == (0, str(venv), "")
        *_, last = made = project.pip_calls.read_text().splitlines()
        assert len(made) == calls
        assert last.endswith("-version-check " + " ".join(f"-r{file}" for file in files))
    assert python_after(project) == (0, str(venv), "")  # what the tests need includes what a run needs
    assert python_after(project, VENV="")[:2] == (0, str(project.root / ".venv"))


@pytest.mark.parametrize(("packages", "requirements", "fits"), [
    (["handmade 1.10"], "# what it takes\n\nhandmade>=1.2,<2  # as it is\n", True),
    (["handmade 1.10"], 'gone; python_version < "3"', True),
    (["handmade 1.10"], "-e .", False),  # not understood: pip decides
    (["torch 2.9.1+cpu", "torchvision 0.24.1+cpu Requires-Dist: torch==2.9.1"], "torchvision>=0.24", True),
    (["torch 2.9.2", "torchvision 0.24.1 Requires-Dist: torch (==2.9.1)"], "torch\ntorchvision>=0.24", False),
    (["torch 2.9.1+cpu", "torchvision 0.24.1 Requires-Dist: torch==2.9.1"], "torchvision", False),
])  # fmt: skip
def test_setup_only_stamps_an_environment_that_was_filled_by_hand(project, venv, packages, requirements, fits):
    fill_by_hand(venv, *packages)
    project.requirements.write_text(requirements)
    status, _, said = python_after(project)
    stamped = (venv / ".setup_env_stamp").exists()
    assert (status, said == "", project.pip_calls.read_text() == "", stamped) == (0, fits, fits, True)


def test_setup_that_fails_or_is_killed_or_loses_its_python_runs_again(project, venv):
    stamp = venv / ".setup_env_stamp"
    assert (project.bash("setup_env.sh")[0], stamp.exists()) == (0, True)
    project.requirements.write_text("not-there-at-all>=2\n")
    status, _, said = python_after(project, PIP_MODE="fail")
    assert (status, stamp.exists()) == (1, False)
    assert said.splitlines()[-1].startswith("setup_env.sh: pip failed (see above): check the network")
    assert (python_after(project, PIP_MODE="kill")[0], stamp.exists()) == (-signal.SIGKILL, False)
    assert (*python_after(project)[:2], stamp.exists()) == (0, str(venv), True)
    (venv / "bin" / "python").unlink()  # its base Python was removed
    (venv / "bin" / "python").symlink_to("/no/such/python")
    assert (*python_after(project)[:2], stamp.exists()) == (0, str(venv), True)
    assert len(project.pip_calls.read_text().splitlines()) == 5


@pytest.mark.parametrize("strict", [":", "set -euo pipefail -o noclobber"])
def test_sourcing_changes_only_the_environment(project, venv, tmp_path, strict):
    # Folder, options, functions, traps and variables before and after, but for what bash itself leaves.
    look = "{ pwd; shopt -o; shopt; declare -F; trap; compgen -v | grep -vxE '_|PIPESTATUS'; }"
    script = f"""{strict}
        {look} >before; source ./*/setup_env.sh; {look} >after; diff before after
        source "{project.root}/setup_env.sh"; python -c 'import sys; print(sys.prefix)'"""
    assert project.bash("-c", script, cwd=tmp_path)[:2] == (0, f"{venv}\n")


@pytest.mark.parametrize(("code", "said"), [
    ("", "no .*/strange-python found: install Python 3.10 or newer, or set PYTHON to one\n"),
    ("sys.version_info = (3, 9)", ".*/strange-python does not start or is older than 3.10: set PYTHON.*\n"),
    ("sys.modules['ensurepip'] = None", ".*/strange-python has no venv module: apt install python3-venv\n"),
    ("pass", "no\nsetup_env.sh: cannot make .*: set VENV to another folder\n"),
])  # fmt: skip
def test_setup_errors_are_one_clear_line(project, venv, tmp_path, code, said):
    project.environ["PYTHON"] = python = tmp_path / "strange-python"
    if code:
        run = f"""exec "{sys.executable}" -c "import sys; {code}; exec(sys.argv[1])" "$2"\n"""
        write(python, f'#!/bin/sh\n[ "$1" = -c ] || {{ echo no >&2; exit 1; }}\n{run}')
    for words in (["setup_env.sh"], ["-c", "set -eu; source setup_env.sh; echo went on"]):
        status, out, err = project.bash(*words)
        assert (status, out, venv.exists()) == (1, "", False)
        assert re.fullmatch(said, err.removeprefix("setup_env.sh: "))


# benchmarks/compare.sh and the scripts that source it


@pytest.fixture
def comparison(project, tmp_path):
    """comparison(NAME, *arguments) -> status, out, err and the arguments of each call of study.py."""
    record = tmp_path / "record"
    project.environ |= {"RECORD": record, "STUDY": write(tmp_path / "small programs" / "study.py", RECORD)}

    def start(name, *arguments, **environ):
        record.unlink(missing_ok=True)
        status, out, err = project.bash(project.root / "benchmarks" / f"{name}.sh", *arguments, cwd="/", **environ)
        calls = record.read_text().splitlines() if record.exists() else []
        return status, out, err, [json.loads(call)[1:] for call in calls]

    return start


@pytest.mark.parametrize("name", COMPARISONS)
def test_a_comparison_is_a_study_with_this_data_set_and_these_seeds_and_flags(comparison, name):
    study = [f"benchmarks/studies/{name}.yaml", "--report", "--out"]
    assert (ROOT / study[0]).is_file()
    seeds = ["--seeds", "0", "12", "--", "--dataset", "digits"]
    assert comparison(name, "digits", "0", "12") == (0, "", "", [[*study, f"results/{name}_digits", *seeds]])
    flags = ["--data", "/a folder/of 'data'", "--init", "{seed}.pth", "--", "", "*"]
    expected = [*study, "in here", "--processes", "3", *seeds, *flags]
    assert comparison(name, "digits", "0", "12", "--", *flags, OUT="in here", PROCESSES=3) == (0, "", "", [expected])
    assert comparison(name, "digits", "0", RECORD_FAILS=0, RECORD_STATUS=9)[0] == 9  # that of its study


def test_a_comparison_without_data_set_or_seeds_says_its_usage(comparison):
    for name in COMPARISONS:
        usage = f"usage: [OUT=DIR] [PROCESSES=N] bash benchmarks/{name}.sh DATASET SEED... [-- FLAG...]\n"
        lines = ["", "digits", "digits -- --lr 1", "digits one", "digits -1", "--lr 1", "digits "]
        for line in lines if name == "compare_methods" else lines[:1]:
            assert comparison(name, *line.split(" ")) == (2, "", usage, [])
    assert comparison(name, "--help") == comparison(name, "-h")
    assert comparison(name, "-h")[1].startswith(usage)


# benchmarks/compare_commits.py


def finished_run(folder, weight=0.0, accuracy="0.5", kept=2, seconds=1, top5=""):
    write(folder / "model" / "config.json", json.dumps({"kept_heads": [[0, 1], [kept]], "metrics": accuracy}))
    write(folder / "states.csv", f"state,accuracy{top5 and ',top5'},seconds\n0,{accuracy}{top5},{seconds}\n")
    write(folder / "units.csv", f"layer,kept\nblocks.0.attn,{kept}\n")
    save_file({"norm.weight": torch.tensor([weight]), "norm.bias": torch.zeros(2)}, folder / "model/model.safetensors")
    return folder


@pytest.mark.parametrize(("change", "expected"), [
    ({"seconds": 9}, ([], [])), ({"weight": -0.0}, (["tensor norm.weight"], [])),
    ({"accuracy": "0.50"}, (["states.csv accuracy"], [])),
    ({"kept": 1}, (["units.csv kept", "config.json kept_heads"], [])),
    ({"top5": ",0.9"}, ([], ["states.csv new column top5"])),
])  # fmt: skip
def test_commits_are_compared_to_the_bit(tmp_path, change, expected):
    assert differences(finished_run(tmp_path / "old"), finished_run(tmp_path / "new", **change)) == expected
