"""Laws of `--config`: what a YAML file of flags means, and that the ready ones plan, run and keep their numbers."""

from pathlib import Path

import pytest
import yaml

import main_imp_fillback as entry
import utils

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
words = str.split

# Every value of each file, as the flags see it.
READY = {
    "vit_tiny_fast": {
        "arch": "vit_tiny", "struct": "rsst", "epochs": 120, "batch_size": 128, "lr": 0.001, "warmup": 20,
        "decreasing_lr": "60,90", "pruning_times": 10, "rate": 0.15, "reg_granularity_prune": 0.5, "exponents": 3,
    },
    "vit_small_standard": {
        "arch": "vit_small", "struct": "rsst", "epochs": 150, "batch_size": 64, "lr": 0.0005, "warmup": 40,
        "decreasing_lr": "80,120", "pruning_times": 15, "rate": 0.12, "reg_granularity_prune": 0.3, "exponents": 2,
    },
    "vit_tiny_refill": {
        "arch": "vit_tiny", "struct": "refill", "criteria": "magnitude", "fillback_rate": 0.1, "pruning_times": 18,
        "rate": 0.18,
    },
    "vit_small_pretrained": {
        "arch": "vit_small", "struct": "rsst", "pretrained": True, "epochs": 80, "batch_size": 64, "lr": 0.0005,
        "warmup": 20, "pruning_times": 15, "rate": 0.15, "reg_granularity_prune": 0.3, "exponents": 2,
    },
    "vit_tiny_head_mlp": {
        "arch": "vit_tiny", "struct": "rsst", "vit_structured": True, "vit_prune_target": "both", "epochs": 80,
        "pruning_times": 20, "rate": 0.3, "mlp_prune_ratio": 0.3, "reg_granularity_prune": 1.0, "exponents": 4,
    },
    "res20s": {
        "arch": "res20s", "struct": "rsst", "epochs": 120, "batch_size": 256, "lr": 0.01, "warmup": 20,
        "pruning_times": 20, "rate": 0.2, "reg_granularity_prune": 1.0, "exponents": 4,
    },
    "check": {
        "arch": "vit_tiny", "struct": "rsst", "vit_structured": True, "vit_prune_target": "both", "epochs": 5,
        "pruning_times": 3, "rate": 0.3, "mlp_prune_ratio": 0.3,
    },
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_house(house):
    pass


@pytest.fixture
def parse(tmp_path):
    """parse("epochs: 3", "--lr", "1") -> the flags of a command with this file."""
    path = tmp_path / "a config.yaml"

    def start(text, *flags, front=()):
        path.write_text(text)
        return entry.parse_args([*front, "--config", str(path), *flags])

    return start


@pytest.fixture
def refused(parse, capsys):
    """The one line of an error."""

    def start(text, *flags):
        with pytest.raises(SystemExit) as stop:
            parse(text, *flags)
        out, err = capsys.readouterr()
        assert (stop.value.code, out, err.count("\n")) == (2, "", 1)
        return err

    return start


# ------------------------------------------------------------------------------------------------------ the ready ones


def test_all_ready_configurations_are_known():
    assert {path.stem for path in CONFIGS.glob("*")} == READY.keys()
    assert not [path for path in CONFIGS.glob("*") if path.suffix != ".yaml"]


@pytest.mark.parametrize("name", READY)
def test_a_ready_configuration_has_its_values_and_plans(name, capsys):
    argv = ["--config", str(CONFIGS / f"{name}.yaml"), "--dataset", "cifar10", "--dry_run"]
    args, plain = vars(entry.parse_args(argv)), vars(entry.parse_args(["--dataset", "cifar10", "--dry_run"]))
    filled_in = {"config", "notes", "warmup", "decreasing_lr", "rewind_epoch"}  # these follow from the epochs
    changed = {flag for flag in args.keys() - filled_in if args[flag] != plain[flag]}
    assert changed <= READY[name].keys()
    assert {flag: args[flag] for flag in READY[name]} == READY[name]
    assert args["notes"] == []  # no flag without effect
    assert entry.main(argv) == 0
    plan = capsys.readouterr().out
    expected = READY[name]
    assert f"{expected['pruning_times']} states x {args['epochs']} epochs" in plan
    first = (CONFIGS / f"{name}.yaml").read_text().splitlines()[0]
    assert first.startswith("# ")
    assert first.endswith(".")


@pytest.mark.parametrize(
    ("name", "weights_left"),
    [
        ("vit_tiny_fast", 0.85**9),
        ("vit_small_standard", 0.88**14),
        ("vit_tiny_refill", 0.82**17 + 0.1 * (1 - 0.82**17)),
        ("vit_small_pretrained", 0.85**14),
    ],
)
def test_an_element_wise_configuration_ends_at_its_density(name, weights_left, capsys):
    assert entry.main(["--config", str(CONFIGS / f"{name}.yaml"), "--dataset", "cifar10", "--dry_run"]) == 0
    states = READY[name]["pruning_times"]
    (last,) = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == [str(states - 1)]]
    assert last.split()[1] == f"{100 * weights_left:.2f}%"


def test_the_check_runs_and_ends_with_its_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(entry.report, "write", lambda _: None)  # pictures have tests of their own
    folder = tmp_path / "run"
    quick = words(
        "--dataset digits --img_size 8 --epochs 1 --train_limit 20 --batch_size 20 --device cpu --amp off --no-export"
    )
    assert entry.main(["--config", str(CONFIGS / "check.yaml"), *quick, "--save_dir", str(folder)]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    (header,) = [i for i, row in enumerate(rows) if row[:4] == ["state", "density", "heads", "neurons"]]
    table = {row[0]: row for row in rows[header + 2 : header + 5]}
    assert table.keys() == {"0", "1", "2"}
    # vit_tiny has 9 blocks of 3 heads and 384 neurons; of each block one head goes and 30% of the neurons
    assert table["0"][2:4] == ["27", "3,456"]
    assert table["2"][2] == "18"
    assert int(table["2"][3].replace(",", "")) == pytest.approx(0.7 * 3456, abs=9)
    assert yaml.safe_load((folder / "args.yaml").read_text())["mlp_prune_ratio"] == 0.3


# ------------------------------------------------------------------------------------------------- what a file means


@pytest.mark.parametrize("front", [True, False], ids=["before", "after"])
@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("epochs: 3", "--epochs 4", {"epochs": 4}),
        ("epochs: 3", "--lr 0.5", {"epochs": 3, "lr": 0.5}),
        ("refill: true", "--no-refill --vit_structured", {"refill": False}),
        ("compact_training: false", "--compact_training", {"compact_training": True}),
        ("compact_training: true", "--no-compact_training", {"compact_training": False}),
        ("pretrained: a.pth", "--pretrained b.pth", {"pretrained": "b.pth"}),
        ("pretrained: a.pth", "--pretrained=b.pth", {"pretrained": "b.pth"}),
        ("decreasing_lr: [60, 90]", "--decreasing_lr 7,8", {"decreasing_lr": "7,8"}),
        ("conv1: true", "--seed 1", {"prune_patch_embed": True, "seed": 1}),
    ],
)
def test_flags_by_hand_win_wherever_they_stand(parse, text, flags, expected, front):
    args = parse(text, front=words(flags)) if front else parse(text, *words(flags))
    assert {flag: getattr(args, flag) for flag in expected} == expected


@pytest.mark.parametrize(
    ("text", "flag", "value"),
    [
        ("verbose: true", "verbose", True),
        ("verbose: false", "verbose", False),
        ("no-export: true", "export", False),
        ("no-export: false", "export", True),
        ("export: false", "export", False),
        ("export: true", "export", True),
        ("no-refill: true", "refill", False),
        ("refill: false", "refill", False),
        ("refill: true", "refill", True),
        ("compact_training: false", "compact_training", False),
        ("compact_training: true", "compact_training", True),
        ("no-compact_training: true", "compact_training", False),
        ("no-compact_training: false", "compact_training", True),
        ("pretrained: true", "pretrained", True),
        ("pretrained: false", "pretrained", False),
        ("pretrained: some where/a.pth", "pretrained", "some where/a.pth"),
        ("vit_pretrained: true", "pretrained", True),
        ("conv1: true", "prune_patch_embed", True),
        ("compile: true", "compile", "default"),
        ("compile: max-autotune", "compile", "max-autotune"),
        ("compile: false", "compile", None),
        ("decreasing_lr: [60, 90]", "decreasing_lr", "60,90"),
        ("decreasing_lr: 60,90", "decreasing_lr", "60,90"),
        ("decreasing_lr: 60", "decreasing_lr", "60"),
        ("decreasing_lr: []", "decreasing_lr", ""),
        ("checkpoint_every: 10m", "checkpoint_every", "10m"),
        ("checkpoint_every: 10", "checkpoint_every", "10"),
        ("seed: 0", "seed", 0),
        ("lr: 1e-3", "lr", 0.001),
        ("weight_decay: 0", "weight_decay", 0.0),
        ("exp_name: -x", "exp_name", "-x"),
        ("exp_name: ''", "exp_name", ""),
        ("exp_name: two  words=1", "exp_name", "two  words=1"),
        ("RST_schedule: x^2", "RST_schedule", "x^2"),
    ],
)
def test_values_mean_what_the_flag_means(parse, text, flag, value):
    found = getattr(parse(text), flag)
    assert (type(found), found) == (type(value), value)


def test_null_leaves_a_flag_to_itself(parse):
    names = sorted({action.dest for action in entry.build_parser()._actions} - {"help", "config"})
    plain = vars(entry.parse_args([]))
    found = vars(parse("".join(f"{name}: null\n" for name in names)))
    assert {**found, "config": None} == plain


def test_values_of_a_file_count_as_given(parse):
    assert parse("sorting_mode: global").notes == ["--sorting_mode: has no effect without --vit_structured"]
    assert parse("warmup: 0\nepochs: 60").warmup == 0
    assert parse("epochs: 60").warmup == 10  # a sixth


def test_a_resumed_run_refuses_other_values_of_a_file(tmp_path, monkeypatch, refused, capsys):
    monkeypatch.setattr(entry.report, "write", lambda _: None)
    folder = str(tmp_path / "run")
    base = words("--dataset digits --arch vit_micro --device cpu --amp off --train_limit 20 --batch_size 20 --epochs 1")
    assert entry.main([*base, "--pruning_times", "2", "--rate", "0.3", "--no-export", "--save_dir", folder]) == 0
    capsys.readouterr()
    err = refused("rate: 0.4\nepochs: 1", "--resume", "--save_dir", folder)
    assert "--rate 0.4" in err
    assert "--epochs" not in err
    path = tmp_path / "same.yaml"
    path.write_text("rate: 0.3\nprint_freq: 7\n")
    args = entry.parse_args(["--resume", "--save_dir", folder, "--config", str(path)])
    assert (args.rate, args.print_freq, args.epochs) == (0.3, 7, 1)


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--epochs 1",
        "--struct refill --no-export --no-refill --vit_structured --vit_prune_target both --no-compact_training",
        "--pretrained some/weights.pth --checkpoint_every 10m --clip_grad 1 --compile",
        "--config before.yaml --seed 0",
    ],
)
def test_args_of_a_run_are_a_config_that_repeats_it(flags, parse, tmp_path):
    Path("before.yaml").write_text("epochs: 7\nverbose: true\n")
    first = entry.parse_args([*words("--dataset digits --save_dir a"), *words(flags)])
    first.pretrained_note = ""  # as a run that starts adds it
    utils.write_run_facts(tmp_path, first, utils.torch.device("cpu"))
    content = yaml.safe_load((tmp_path / "args.yaml").read_text())
    del content["save_dir"]
    again = vars(parse(yaml.safe_dump(content)))
    own = {"config", "save_dir", "notes", "pretrained_note"}
    assert {k: v for k, v in again.items() if k not in own} == {k: v for k, v in vars(first).items() if k not in own}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("epoch: 3", "'epoch'"),
        ("help: true", "'help'"),
        ("config: b.yaml", "'config'"),
        ("--epochs: 3", "'--epochs'"),
        ("5: 3", "5"),
        ("epochs: many", "--epochs"),
        ("epochs: 1.5", "--epochs"),
        ("epochs: true", "--epochs"),
        ("verbose: 1", "verbose"),
        ("verbose: 'yes'", "verbose"),
        ("compact_training: 0", "compact_training"),
        ("training:\n  epochs: 3", "'training'"),
        ("epochs:\n  first: 3", "epochs"),
        ("decreasing_lr: [60, [90]]", "--decreasing_lr"),
        ("- epochs", "must hold flags"),
        ("epochs", "must hold flags"),
        ("", "must hold flags"),
        ("a: [", "not a YAML file"),
    ],
)
def test_what_is_no_flag_or_no_value_is_one_line(refused, text, named):
    err = refused(text)
    assert named in err


def test_a_file_that_is_missing_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        entry.parse_args(["--config", "no such.yaml"])
    err = capsys.readouterr().err
    assert (stop.value.code, err.count("\n")) == (2, 1)
    assert "--config no such.yaml: No such file or directory; give a YAML file of flags" in err
