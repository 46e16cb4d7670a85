"""Laws of `--config`: what a YAML file of flags means, and that the ready ones plan, run and keep their numbers."""

import argparse
import sys
from pathlib import Path

import pytest
import yaml
from micro import call

from reporting.words import plural

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
words = str.split
RUN = words("--dataset digits --arch vit_micro --device cpu --amp off --train_limit 20 --batch_size 20 --epochs 1")

# Every value of each file, as the flags see it.
READY = {
    "vit_tiny_fast": "struct: rsst, epochs: 120, batch_size: 128, lr: 0.001, warmup: 20, decreasing_lr: '60,90', "
    "pruning_times: 10, rate: 0.15, reg_granularity_prune: 0.5, exponents: 3",
    "vit_small_standard": "arch: vit_small, struct: rsst, epochs: 150, batch_size: 64, lr: 0.0005, warmup: 40, "
    "decreasing_lr: '80,120', pruning_times: 15, rate: 0.12, reg_granularity_prune: 0.3, exponents: 2",
    "vit_tiny_refill": "struct: refill, criteria: magnitude, fillback_rate: 0.1, pruning_times: 18, rate: 0.18",
    "vit_small_pretrained": "arch: vit_small, struct: rsst, pretrained: true, epochs: 80, batch_size: 64, lr: 0.0005, "
    "warmup: 20, pruning_times: 15, rate: 0.15, reg_granularity_prune: 0.3, exponents: 2",
    "vit_tiny_head_mlp": "struct: rsst, vit_structured: true, vit_prune_target: both, epochs: 80, pruning_times: 20, "
    "prune_type: finetune, rate: 0.3, mlp_prune_ratio: 0.3, reg_granularity_prune: 1.0, exponents: 4",
    "res20s": "arch: res20s, struct: rsst, epochs: 120, batch_size: 256, lr: 0.01, warmup: 20, pruning_times: 20, "
    "rate: 0.2, reg_granularity_prune: 1.0, exponents: 4",
    "vit_tiny_deploy": "struct: rsst, vit_structured: true, vit_prune_target: both, epochs: 200, pruning_times: 2, "
    "prune_type: finetune, criteria: saliency, target_macs: 0.5, ratio_allocation: sensitivity, round_to: 8",
    "check": "struct: rsst, vit_structured: true, vit_prune_target: both, epochs: 5, pruning_times: 3, "
    "prune_type: finetune, rate: 0.3, mlp_prune_ratio: 0.3",
}
# what recipes share
DENSE = "struct: dense, pruning_times: 1, opt: adamw, weight_decay: 0.05, sched: cosine, clip_grad: 1.0, "
DENSE += "label_smoothing: 0.1, aug: rand, mixup: 0.8, cutmix: 1.0"
SCRATCH = f"{DENSE}, stem: conv, epochs: 200, batch_size: 128, warmup: 10, min_lr: 0.00001, ema_decay: 0.999"
TUNED = f"{DENSE}, pretrained: true, epochs: 30, warmup: 3, min_lr: 0.000001, layer_decay: 0.75, drop_path: 0.1"
DEIT = "dataset: imagenet, arch: timm/deit_small_patch16_224, pretrained: true, struct: rsst, vit_structured: true, "
DEIT += "vit_prune_target: both, rate: 0.5, mlp_prune_ratio: 0.5, criteria: saliency, sorting_mode: global, "
DEIT += "prune_type: finetune, batch_size: 256, opt: adamw, lr: 0.0001, weight_decay: 0.05, sched: cosine, warmup: 1, "
DEIT += "min_lr: 0.000001, clip_grad: 1.0, teacher: self, kd_alpha: 0.5, kd_temperature: 2.0"
READY |= {
    "recipe_vit_tiny_scratch": f"{SCRATCH}, arch: vit_tiny, lr: 0.0005",
    "recipe_vit_small_scratch": f"{SCRATCH}, arch: vit_small, lr: 0.0003, drop_path: 0.1",
    "recipe_finetune_cifar": f"{TUNED}, arch: vit_small, batch_size: 128, lr: 0.0003, ema_decay: 0.999",
    "recipe_finetune_imagenet": f"{TUNED}, dataset: imagenet, arch: timm/vit_small_patch16_224, batch_size: 256, "
    "pretrained_tag: augreg_in21k, accum_steps: 4, lr: 0.0005, ema_decay: 0.9995",
    "recipe_prune_deit_imagenet_30": f"{DEIT}, pruning_times: 3, epochs: 8, finish_epochs: 6, aug: basic, "
    "ema_decay: 0.999",
    "recipe_prune_deit_imagenet_100": f"{DEIT}, pruning_times: 5, epochs: 16, finish_epochs: 20, aug: rand, "
    "mixup: 0.8, cutmix: 1.0, ema_decay: 0.9999",
}
# Share of the weights that is left, of the heads and of the neurons of vit_tiny
LEFT = {
    "vit_tiny_fast": (0.85**9, 27, 3456),
    "vit_small_standard": (0.88**14, 72, 18432),
    "vit_tiny_refill": (0.82**17 + 0.1 * (1 - 0.82**17), 27, 3456),
    "vit_small_pretrained": (0.85**14, 72, 18432),
    "vit_tiny_head_mlp": (None, 18, 9 * 268),
    "check": (None, 18, 9 * 268),
    "recipe_vit_tiny_scratch": (1, 27, 3456),
    "recipe_finetune_imagenet": (1, 72, 18432),
    "recipe_prune_deit_imagenet_30": (None, 36, 9216),
    "recipe_prune_deit_imagenet_100": (None, 36, 9216),
}


@pytest.fixture(autouse=True)
def _in_house(house, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # pictures have tests of their own


@pytest.fixture
def flags(monkeypatch, capsys):
    """flags(*argv) -> the values of all flags of a command, which plans."""
    seen, real = [], argparse.ArgumentParser.parse_args

    def parse_args(parser, *arguments, **keywords):
        seen.append(real(parser, *arguments, **keywords))
        return seen[-1]

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)

    def plan(*argv):
        seen.clear()
        for name in ("a.pth", "b.pth", "some where/a.pth"):  # a plan asks whether weights are there
            Path(name).parent.mkdir(exist_ok=True)
            Path(name).touch()
        assert call([*argv, "--dry_run"]) == 0, capsys.readouterr().err
        return max((vars(namespace) for namespace in seen), key=len)

    return plan


@pytest.fixture
def parse(flags, tmp_path):
    """parse("epochs: 3", "--lr", "1") -> the flags of a command with this file."""

    def start(text, *argv, front=()):
        path = tmp_path / "a config.yaml"
        path.write_text(text)
        return flags(*words("--dataset digits --arch vit_micro"), *front, "--config", path, *argv)

    return start


@pytest.fixture
def refused(tmp_path, capsys):
    """The one line of an error."""

    def start(text, *argv):
        (tmp_path / "a config.yaml").write_text(text)
        capsys.readouterr()
        code = call(["--config", tmp_path / "a config.yaml", *argv])
        out, err = capsys.readouterr()
        assert (code, out, err.count("\n")) == (2, "", 1)
        return err

    return start


# ------------------------------------------------------------------------------------------------------ the ready ones


@pytest.mark.parametrize("name", READY)
def test_a_ready_configuration_has_its_values_and_plans(name, flags, capsys):
    assert {path.name for path in CONFIGS.glob("*")} == {f"{known}.yaml" for known in READY}
    expected = {"arch": "vit_tiny", "dataset": "cifar10", **yaml.safe_load(f"{{{READY[name]}}}")}
    dataset = ["--dataset", "cifar10"] if expected["dataset"] == "cifar10" else []
    plain, found = flags("--dataset", "cifar10"), flags(*dataset, "--config", CONFIGS / f"{name}.yaml")
    plan = capsys.readouterr().out.split("disk.")[1]
    # from epochs, rate and start
    follows = {"config", "notes", "warmup", "decreasing_lr", "rewind_epoch", "finish_lr", "repair"}
    assert {flag for flag in found.keys() - follows if found[flag] != plain[flag]} <= expected.keys()
    assert {flag: found[flag] for flag in expected} == expected
    told = [] if expected["pruning_times"] > 1 else ["nothing is pruned in this run: it trains dense"]
    assert (found.get("notes") or []) == told  # no flag without effect
    assert f"{plural(expected['pruning_times'], 'state')} x {plural(found['epochs'], 'epoch')}" in plan
    if name in LEFT:
        weights, heads, neurons = LEFT[name]
        states = expected["pruning_times"]
        (last,) = [row.split() for row in plan.splitlines() if row.split()[:1] == [str(states - 1)]]
        assert last[2:4] == [str(heads), f"{neurons:,}"]
        assert weights is None or last[1] == f"{100 * weights:.2f}%"
    if "target_macs" in expected:
        rows = [row.split() for row in plan.splitlines() if row.split()[:1] and row.split()[0].isdigit()]
        dense, last = rows[0], rows[expected["pruning_times"] - 1]
        share = float(last[5]) / float(dense[5])  # both are printed to 0.0001 of 0.19 G
        assert expected["target_macs"] - 0.02 < share < expected["target_macs"] + 0.001
        assert int(last[3].replace(",", "")) % expected["round_to"] == 0
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert (first[:2], first[-1]) == ("# ", ".")


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("recipe_*.yaml")), ids=lambda path: path.stem)
def test_every_line_of_a_recipe_has_its_reason_beside_it(path):
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    for line in lines:
        setting, _, reason = line.partition("  # ")
        assert yaml.safe_load(setting), line
        assert len(reason.split()) > 3, line
        assert len(line) <= 120, line
    settings = [line for line in lines if "own choice" in line or "arXiv:" in line]
    assert len(settings) > len(lines) / 2  # the others say what is done, not how well


def test_the_check_runs_and_ends_with_its_table(capsys):
    assert call(["--config", CONFIGS / "check.yaml", *RUN, "--no-export", "--save_dir", "run"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    header = next(i for i, row in enumerate(rows) if row[:4] == ["state", "density", "heads", "neurons"])
    # 2 blocks of 4 heads and 48 neurons: of each block keep floor(2.8) heads and floor(33.6) neurons
    assert [row[0] for row in rows[header + 2 : header + 5]] == ["0", "1", "2"]
    assert (rows[header + 2][2:4], rows[header + 4][2:4]) == (["8", "96"], ["4", "66"])


# -------------------------------------------------------------------------------------------------- what a file means


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("save_dir: results/dense", "--exp_name new", {"save_dir": None, "exp_name": "new"}),
        ("save_dir: results/dense", "--epochs 4", {"save_dir": "results/dense"}),
        (
            "pretrained: true\npretrained_tag: dino",
            "--pretrained a.pth",
            {"pretrained": "a.pth", "pretrained_tag": None},
        ),
    ],
)
def test_flags_by_hand_win_over_what_would_contradict_them(parse, text, argv, expected):
    found = parse(f"{text}\narch: vit_small", *words(argv))
    assert {flag: found[flag] for flag in expected} == expected


@pytest.mark.parametrize(
    ("text", "argv", "expected"),
    [
        ("epochs: 3", "--epochs 4", {"epochs": 4}),
        ("epochs: 3", "--lr 0.5", {"epochs": 3, "lr": 0.5}),
        ("refill: true", "--no-refill --vit_structured", {"refill": False}),
        ("compact_training: false", "--compact_training --vit_structured", {"compact_training": True}),
        ("compact_training: true", "--no-compact_training --vit_structured", {"compact_training": False}),
        ("pretrained: a.pth", "--pretrained=b.pth", {"pretrained": "b.pth"}),
        ("decreasing_lr: [60, 90]", "--decreasing_lr 7,8", {"decreasing_lr": "7,8"}),
    ],
)
def test_flags_by_hand_win_wherever_they_stand(parse, text, argv, expected):
    for found in (parse(text, *words(argv)), parse(text, front=words(argv))):
        assert {flag: found[flag] for flag in expected} == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("verbose: true\nno-export: true\nno-refill: true", {"verbose": True, "export": False, "refill": False}),
        ("verbose: false\nno-export: false\nno-refill: false", {"verbose": False, "export": True, "refill": True}),
        ("export: false\nrefill: false\nconv1: true", {"export": False, "refill": False, "prune_patch_embed": True}),
        ("export: true\nrefill: true\nconv1: false", {"export": True, "refill": True, "prune_patch_embed": False}),
        ("compact_training: false", {"compact_training": False}),
        ("no-compact_training: true", {"compact_training": False}),
        ("no-compact_training: false", {"compact_training": True}),
        ("pretrained: true\ncompile: true\narch: vit_small", {"pretrained": True, "compile": "default"}),
        ("pretrained: false\ncompile: false", {"pretrained": False, "compile": None}),
        ("vit_pretrained: some where/a.pth\ncompile: max-autotune", {"pretrained": "some where/a.pth"}),
        ("compile: max-autotune\ncheckpoint_every: 10m", {"compile": "max-autotune", "checkpoint_every": "10m"}),
        ("decreasing_lr: [60, 90]\nseed: 0\nlr: 1e-3", {"decreasing_lr": "60,90", "seed": 0, "lr": 0.001}),
        ("decreasing_lr: 60\ncheckpoint_every: 10", {"decreasing_lr": "60", "checkpoint_every": "10"}),
        ("decreasing_lr: []\nweight_decay: 0", {"decreasing_lr": "", "weight_decay": 0.0}),
        ("exp_name: -x\nRST_schedule: x^2", {"exp_name": "-x", "RST_schedule": "x^2"}),
        ("exp_name: two  words=1\nepochs: 60", {"exp_name": "two  words=1", "warmup": 10}),  # a sixth
        ("exp_name: null\nwarmup: 0\nepochs: 60\nrate: null", {"exp_name": None, "warmup": 0, "rate": 0.2}),
    ],
)
def test_values_mean_what_the_flag_means(parse, text, expected):
    found = parse(text, *(["--arch", "vit_small"] if "arch" in text else []))
    assert [(type(found[flag]), found[flag]) for flag in expected] == [(type(v), v) for v in expected.values()]


def test_args_of_a_run_are_a_config_that_repeats_it_and_a_resumed_run_refuses_others(flags, refused, capsys):
    Path("before.yaml").write_text("verbose: true\nrate: 0.3\nsorting_mode: global\n")
    argv = words("--no-refill --no-export --no-compact_training --checkpoint_every 10m --clip_grad 1 --struct refill")
    argv = [*RUN, *argv, "--pruning_times", 2, "--config", "before.yaml"]
    assert call([*argv, "--save_dir", "run"]) == 0
    # values of a file count as given
    assert "--sorting_mode: has no effect without --vit_structured" in capsys.readouterr().out
    content = yaml.safe_load(Path("run/args.yaml").read_text())
    del content["save_dir"]
    Path("again.yaml").write_text(yaml.safe_dump(content))
    first, again = flags(*argv), flags("--config", "again.yaml")
    assert {flag for flag in first if first[flag] != again[flag]} <= {"config", "notes"}

    err = refused("rate: 0.4\nepochs: 1", "--resume", "--save_dir", "run")
    assert "--rate 0.4" in err
    assert "--epochs" not in err
    Path("same.yaml").write_text("rate: 0.3\nprint_freq: 7\n")
    assert call(["--resume", "--save_dir", "run", "--config", "same.yaml"]) == 0


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch: 3", "'epoch'"),
        ("help: true", "'help'"),
        ("config: b.yaml", "'config'"),
        ("--epochs: 3", "'--epochs'"),
        ("5: 3", "5"),
        ("epochs: 1.5", "--epochs"),
        ("epochs: true", "--epochs"),
        ("verbose: 1", "verbose"),
        ("verbose: 'yes'", "verbose"),
        ("compact_training: 0", "compact_training"),
        ("training:\n  epochs: 3", "'training'"),
        ("epochs:\n  first: 3", "epochs"),
        ("decreasing_lr: [60, [90]]", "--decreasing_lr"),
        ("- epochs", "must hold flags"),
        ("", "must hold flags"),
        ("a: [", "not a YAML file"),
    ],
)
def test_what_is_no_flag_or_no_value_is_one_line(refused, text, named):
    assert named in refused(text)


def test_a_file_that_is_missing_is_one_line(capsys):
    assert call(["--config", "no such.yaml"]) == 2
    told = "--config no such.yaml: No such file or directory; give a YAML file of flags\n"
    assert capsys.readouterr().err.endswith(told)
