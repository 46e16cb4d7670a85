"""Every command and every line of Python in README and docs works: short ones run, long ones plan."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from micro import call, picture_folder
from PIL import Image
from torch.distributed.run import parse_args as parse_torchrun

import export
import main_imp_fillback as entry
import report
from benchmarks import study
from benchmarks.grid import check, read_study
from deployment.command import build_parser
from settings.flag import markdown
from settings.flags import GROUPS
from settings.flags import build_parser as build_main_parser
from vit_structured_pruning import CRITERIA

ROOT = Path(__file__).resolve().parent.parent
READMES = ["README.md", "README.zh-CN.md"]
DOCS = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("docs/*.md"))]
PAGES = ["README.md", *DOCS]
SMALL = shlex.split("--train_limit 40 --batch_size 20 --epochs 1 --pruning_times 2")
RECORDER = """import json, sys
with open("calls.jsonl", "a") as file:
    file.write(json.dumps([sys.argv[0], *sys.argv[1:]]) + "\\n")
"""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


def commands(page):
    """The shell commands, one line each."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [" ".join(line.split()) for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [command for page in PAGES for command in commands(page)]
TRAINING = [each for each in COMMANDS if "main_imp_fillback.py" in each]
ON_A_RUN = [each for each in COMMANDS if "results/NAME" in each]
OWN_IMAGES = [each for each in COMMANDS if re.search("results/(tuned|pruned)|--exp_name (tuned|pruned)", each)]
SCRIPTS = [
    each for each in COMMANDS if each.startswith(("bash run", "bash launch", "bash benchmarks")) or "bash run" in each
]
STUDIES = [each for each in COMMANDS if "benchmarks/study.py" in each]
ELSEWHERE = [  # tried by the tests of scripts and of shipping, or by whoever reads this
    "SETUP_DEV=1 source setup_env.sh && python -m pytest",
    "bash .ci/run",
    "python -m http.server --directory demo",
    "python benchmarks/compare_commits.py main HEAD --kill",
]


def test_every_command_is_tried():
    tried = [*TRAINING, *ON_A_RUN, *OWN_IMAGES, *SCRIPTS, *STUDIES, *ELSEWHERE]
    assert [command for command in COMMANDS if command not in tried] == []
    assert [command for command in ELSEWHERE if command not in COMMANDS] == []


def words(command):
    """What follows the program's name; torchrun's own flags are read by torchrun."""
    launcher, *rest = shlex.split(command.rpartition("&& ")[2])
    return parse_torchrun(rest).training_script_args if launcher == "torchrun" else rest[1:]


def assert_shared(argv, torchrun, monkeypatch):
    """The processes of this call of torchrun can share the batch."""
    found = parse_torchrun(torchrun)
    assert Path(found.training_script).name == "main_imp_fillback.py"
    size = int(found.nnodes.partition(":")[0]) * int(found.nproc_per_node)
    assert size > 1
    with monkeypatch.context() as patch:
        patch.setenv("WORLD_SIZE", str(size))
        entry.parse_args(argv)


def plans(argv, capsys):
    capsys.readouterr()
    assert call([*argv, "--dry_run"]) == 0
    assert "About" in capsys.readouterr().out


def test_training_commands_plan_and_the_first_one_runs_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures have tests of their own
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    for part, count in (("train", 8), ("test", 2)):
        picture_folder("photos", ("cats", "dogs"), count, (part,), suffix="jpg")
    for command in TRAINING:
        if "--search" in command:
            entry.parse_args(words(command))
        elif not re.search("--resume(?! auto)|--list_archs", command) and command not in OWN_IMAGES:
            plans(words(command), capsys)
        if command.startswith("torchrun"):
            assert_shared(words(command), shlex.split(command)[1:], monkeypatch)
    assert sum(command.startswith("torchrun") for command in TRAINING) == 3
    assert TRAINING[0].startswith("source setup_env.sh && python main_imp_fillback.py ")
    assert call([*words(TRAINING[0]), *SMALL, "--img_size", 8, "--no-export", "--save_dir", tmp_path / "run"]) == 0
    assert "state 1 done" in capsys.readouterr().out


@pytest.mark.usefixtures("house")
def test_own_images_are_fine_tuned_pruned_and_exported(monkeypatch):
    monkeypatch.setattr(report, "write", lambda _: None)  # pictures take longer than these runs
    for part, count in (("train", 8), ("test", 2)):
        picture_folder("photos", ("cats", "dogs"), count, (part,), suffix="jpg")
    tuned, pruned, *exports = OWN_IMAGES
    for command in (tuned, pruned):
        known = re.sub("--arch timm/[^ ]+|--pretrained", "", command)
        small = shlex.split("--arch vit_micro --train_limit 12 --batch_size 4 --epochs 1")
        assert call([*words(known), *small]) == 0
    for command in exports:
        build_parser().parse_args(words(command))
        if "--predict" in command:  # test_shipping.py runs the others
            assert export.main(words(command)) == 0


@pytest.mark.usefixtures("house")
def test_commands_and_python_on_a_finished_run(monkeypatch):
    flags = [*SMALL, *shlex.split("--dataset digits --arch vit_micro --vit_structured --vit_prune_target both")]
    with monkeypatch.context() as patch:
        patch.setattr(report, "write", lambda _: None)  # which the commands below write
        for name in ("NAME", "OTHER"):
            assert call([*flags, "--save_dir", f"results/{name}"]) == 0
    programs = {"main_imp_fillback.py": call, "export.py": export.main, "report.py": report.main}
    assert len(ON_A_RUN) == 8
    Image.new("RGB", (20, 24)).save("photo.jpg")
    for command in ON_A_RUN:
        if "--int8" in command or "--demo" in command:  # test_shipping.py runs these
            build_parser().parse_args(words(command))
            continue
        program = programs[shlex.split(command)[1]]
        if program is export.main:
            pytest.importorskip("onnxruntime")
        assert not program(words(command)), command
    assert Path("results/compare/compare.html").is_file()
    assert Path("results/NAME/model/model.onnx").is_file()
    try:
        for page in PAGES:
            for block in blocks(page, "python"):
                exec(block, {})
    finally:
        CRITERIA.pop("largest")  # the documents' own


def test_scripts_start_what_plans(tmp_path, monkeypatch, capsys):
    """Scripts run on a copy whose programs write down how they were called; each call plans."""
    for path in [*ROOT.glob("*.sh"), *ROOT.glob("benchmarks/*.sh")]:
        target = tmp_path / path.relative_to(ROOT)
        target.parent.mkdir(exist_ok=True)
        shutil.copy(path, target)
    (tmp_path / "setup_env.sh").write_text(f'python() {{ "{sys.executable}" "$@"; }}\n')
    for program in ("main_imp_fillback.py", "benchmarks/study.py"):
        (tmp_path / program).write_text(RECORDER)
    assert len(SCRIPTS) == 7
    environment = {**os.environ, "PATH": str(Path(sys.executable).parent) + os.pathsep + os.environ["PATH"]}
    monkeypatch.chdir(ROOT)
    for command in SCRIPTS:
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
            if program.endswith("study.py"):
                assert_study_plans(argv, tmp_path, partial(plans, capsys=capsys))
            else:
                plans([*argv, "--save_dir", tmp_path / "unused"], capsys)


def assert_study_plans(argv, folder, plan):
    """Each of its runs would be accepted, and one of each kind plans."""
    own, _, flags = (list(part) for part in (argv, [], [])) if "--" not in argv else split_at(argv, "--")
    args = study.build_parser().parse_args(own)
    file = ROOT / (args.file or f"benchmarks/studies/{args.scale}.yaml")
    settings, runs = read_study(file, folder / "unused", seeds=args.seeds, words=flags)
    kinds = {run.kind: run for run in runs}
    for run in kinds.values():
        check(run, settings["base"])
        if flags:  # nothing that another run has to make first
            plan(run.argv[1:])


def split_at(argv, word):
    place = argv.index(word)
    return argv[:place], word, argv[place + 1 :]


def test_studies_start_what_plans(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert len(STUDIES) == 2
    for command in STUDIES:
        assert_study_plans(words(command), tmp_path, partial(plans, capsys=capsys))


SLURM = {  # what the batch script calls, in the place of Slurm and torchrun
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "scontrol $*" >>calls; fi',
    "scancel": 'echo "scancel $*" >>calls; kill -TERM "$(cat pid)"',
    "srun": 'exec "$@"',
    "torchrun": 'printf "%s\\0" "$@" >argv; echo $$ >pid; mv argv started; [ -z "$WAITS" ] || exec sleep 30',
}


@pytest.fixture
def batch_job(tmp_path):
    """batch_job(WAITS="yes") -> the started script of docs/distributed.md, with small programs for Slurm."""
    (script,) = blocks("docs/distributed.md", "sh")
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "setup_env.sh").write_text("")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, code in SLURM.items():
        (tools / name).write_text(f"#!/bin/sh\n{code}\n")
        (tools / name).chmod(0o755)

    def start(**environment):
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_NNODES": "2"}
        environment = {"WAITS": "", **slurm, "PATH": f"{tools}:{os.environ['PATH']}", **environment}
        return subprocess.Popen(["bash", "job.sh"], cwd=tmp_path, env=environment, start_new_session=True)

    return start


def test_the_batch_script_starts_what_plans(batch_job, tmp_path, monkeypatch, capsys):
    subprocess.run(["bash", "-n", tmp_path / "job.sh"], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-e", "SC1091", tmp_path / "job.sh"], check=True)
    assert batch_job().wait(30) == 0
    torchrun = (tmp_path / "started").read_text().split("\0")[:-1]
    found = parse_torchrun(torchrun)
    assert (found.nnodes, found.rdzv_endpoint, found.rdzv_id) == ("2", "node7:29500", "7")
    assert_shared(found.training_script_args, torchrun, monkeypatch)
    monkeypatch.chdir(ROOT)
    plans(found.training_script_args, capsys)
    assert not (tmp_path / "calls").exists()


def test_the_batch_script_ends_torchrun_and_then_queues_itself_again(batch_job, tmp_path):
    job = batch_job(WAITS="yes")
    deadline = time.monotonic() + 30
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(20) == 128 + signal.SIGUSR1
    assert (tmp_path / "calls").read_text().splitlines() == ["scancel --signal=TERM 7", "scontrol requeue 7"]


def test_both_languages_show_the_same_commands():
    assert commands(READMES[0]) == commands(READMES[1])
    assert blocks(READMES[0], "python") == blocks(READMES[1], "python")


@pytest.mark.parametrize("page", [*READMES, *DOCS, "RESULTS.md", "benchmarks/README.md"])
def test_links_and_pictures_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    targets = [target for target in re.findall(r"\]\(([^):]+)\)", text) if not target.startswith("#")]
    for target in targets:
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], target


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 12_000


def test_the_list_of_flags_is_current():
    """`python -m settings.flags > docs/flags.md` writes it."""
    assert (ROOT / "docs" / "flags.md").read_text(encoding="utf-8") == markdown(GROUPS)


def test_flags_in_the_text_exist():
    known = {"--help", "--list", "--scale", "--report", "--seeds", "--kill", "--only", "--set", "--models", "--repeats"}
    known |= {
        "--archs",
        "--threads",
        "--clock",
        "--requeue",
        "--signal",
        "--max-restarts",
        "--out",
        "--device",
        "--arch",
    }
    for parser in (build_main_parser(), build_parser(), study.build_parser()):
        known |= {string for action in parser._actions for string in action.option_strings}
    for page in [*READMES, *DOCS]:
        text = re.sub("^(```.*?^```|    .*?$)", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.M | re.S)
        named = {
            flag for code in re.findall("`([^`]*)`", text) for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", code)
        }
        assert named - known == set(), page
