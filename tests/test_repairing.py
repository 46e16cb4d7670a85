"""--repair, --dense_epochs and the network right after a cut as epoch 0: what runs of the command do about them."""

import json

import pytest
import torch
import torch.nn.functional as F
from micro import (
    BOTH,
    MICRO,
    STEPS,
    assert_one_line,
    assert_same_tensors,
    call,
    load,
    log_of,
    make_run,
    metrics,
    record,
    rows_of,
    runner,
    vit_micro,
)

import engine.training
import export
import main_imp_fillback as entry
from dataset import load_dataset, make_batches
from engine.sensitivity import sensitivity_curves
from families import family_of
from pruning.moments import Moments
from pruning.repair import repair
from settings.flags import FLAGS

TUNED = ("--prune_type", "finetune", "--rate", "0.5")
UNITS = (*BOTH, *TUNED, "--mlp_prune_ratio", "0.5")


@pytest.fixture
def run(house, tmp_path, capsys):
    return runner(tmp_path, capsys, [*MICRO, "--pruning_times", "2"])


@pytest.fixture
def trained(run):
    """The folder of an exported dense run."""
    return run("--pruning_times", "1", name="dense", base=[part for part in MICRO if part != "--no-export"]).dir


def first_images(count=512):
    splits = load_dataset("digits", "data", 16, 0.1, 60)
    images, _ = next(make_batches(splits.train, splits.facts, 60, "cpu").sequential())
    return images[:count]


def micro_with(weights):
    model = vit_micro()
    model.load_state_dict(weights)
    return model.eval()


# ------------------------------------------------------------------------------------------------------ at the cut


@pytest.mark.parametrize("how", ["mean", "ls"])
@pytest.mark.parametrize("compact", ["--compact_training", "--no-compact_training"])
def test_a_cut_before_training_leaves_what_the_library_repairs(how, compact, tmp_path):
    seen = record(tmp_path, [*MICRO, "--struct", "refill", *UNITS, "--repair", how, "--repair_images", "40", compact])
    for state in (1, 2):
        start, dense = seen.starts[state], micro_with(seen.ends[state - 1])
        expected = repair(dense, family_of(dense).units(dense), start.kept, first_images(40), how=how)
        for name, value in expected.state_dict().items():
            torch.testing.assert_close(start.weights[name], value, rtol=1e-5, atol=1e-6, msg=name)
    assert "repair of proj (2 layers): error " in seen.log
    assert all(row["accuracy_after_repair"] for row in rows_of(seen.dir / "states.csv")[1:])


def test_single_weights_are_repaired_row_by_row_and_refilled_ones_start_at_zero(tmp_path):
    seen = record(tmp_path, [*MICRO, "--struct", "refill", *TUNED, "--fillback_rate", "0.4", "--pruning_times", "2"])
    start, dense = seen.starts[1], micro_with(seen.ends[0])
    expected = repair(dense, {}, {}, first_images(), masks=start.elementwise)
    assert any(not torch.equal(start.masks[name], mask) for name, mask in start.elementwise.items())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(start.weights[name], value, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("average", [(), ("--ema_decay", "0.9")])
def test_the_cut_of_rsst_repairs_weights_and_their_average(average, tmp_path, around):
    flags = ["--struct", "rsst", *UNITS, "--pruning_times", "2", "--reg_granularity_prune", "0.01", "--epochs", "4"]
    folder, before, after = tmp_path / "run", [], []
    tensors = lambda training: {  # noqa: E731
        "weights": {k: v.clone() for k, v in training._dense_shaped(training.model).items()},
        "selected": {k: v.clone() for k, v in training._dense_shaped(training.selected).items()},
    }
    around("cut", before=lambda training: before.append(tensors(training)))
    around("cut", after=lambda training: after.append((tensors(training), training.progress.kept)))
    seen = record(folder, [*MICRO, *flags, *average])
    assert seen.code == 0, seen.err
    ((found, kept),) = after
    for which, value in before[0].items():
        dense = micro_with(value)
        expected = repair(dense, family_of(dense).units(dense), kept, first_images()).state_dict()
        for name, tensor in found[which].items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5, msg=f"{which} {name}")
    row = rows_of(seen.dir / "states.csv")[1]
    assert float(row["accuracy_after_repair"]) >= 0
    assert "% after, " in seen.log
    assert "% with repair; residual" in seen.log


def test_it_is_on_where_a_run_fine_tunes_and_off_where_it_rewinds(house):
    parse = lambda *flags: entry.parse_args([*MICRO, *flags])  # noqa: E731
    assert parse("--struct", "refill", "--prune_type", "finetune").repair == "ls"
    assert parse("--struct", "refill", "--prune_type", "finetune", "--repair", "none").repair == "none"
    assert parse("--struct", "refill").repair is None
    assert parse("--struct", "dense", "--prune_type", "finetune").repair is None
    assert FLAGS["repair_images"].idle(vars(parse("--struct", "refill")))
    note = "this run does not repair"
    for flags, said in ((("--prune_type", "lt"), True), (("--prune_type", "finetune"), False)):
        assert any(note in line for line in parse("--struct", "refill", "--criteria", "obs", *flags).notes) == said
    assert parse("--struct", "refill", "--init", "a.pt", "--dense_epochs", "0").prune_type == "finetune"
    assert parse("--struct", "refill", "--init", "a.pt", "--dense_epochs", "0", "--prune_type", "lt").repair is None


def test_without_repair_nothing_is_collected(run, monkeypatch):
    monkeypatch.setattr(Moments, "add", None)
    row = rows_of(run("--struct", "refill", *UNITS, "--repair", "none").dir / "states.csv")[1]
    assert row["accuracy_after_repair"] == "" != row["accuracy_after_cut"]


@pytest.mark.parametrize("method", ["cut_at_once", "select", "cut"])
def test_killed_around_the_cut_a_run_ends_with_the_same_bits(method, run, monkeypatch):
    flags = ["--struct", "rsst" if method == "cut" else "refill", *UNITS, "--checkpoint_every", "1"]
    whole = run(*flags, name="whole").dir
    with monkeypatch.context() as patch:
        owner = {"cut_at_once": entry.Run, "select": entry, "cut": entry.StateTraining}[method]
        name = "select_start" if method == "select" else method
        original, calls = getattr(owner, name), []

        def once(*arguments):
            original(*arguments)
            calls.append(arguments)
            if method != "select" or len(calls) == 2:
                raise KeyboardInterrupt

        patch.setattr(owner, name, once)
        run(*flags, name="killed", code=130)
    killed = run("--resume", name="killed", base=[]).dir
    assert_same_tensors(load(killed / "best.pt")["weights"], load(whole / "best.pt")["weights"])
    assert_same_tensors(load(killed / "checkpoint.pt")["weights"], load(whole / "checkpoint.pt")["weights"])
    assert metrics(killed, ("seconds", "images_per_second")) == metrics(whole, ("seconds", "images_per_second"))


@pytest.mark.parametrize(("amp", "tolerance"), [("off", 1e-4), ("bf16", 0.01)])
def test_a_probe_measures_the_loss_after_repair(amp, tolerance, house, tmp_path):
    flags = ["--struct", "refill", *UNITS, "--ratio_allocation", "sensitivity", "--amp", amp]
    probed = make_run(tmp_path / "run", *flags)
    probed.progress.state = 1
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in probed.dense.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    scores = {key: torch.arange(group.count, 0, -1).double() for key, group in probed.units.items()}
    curves = sensitivity_curves(probed, scores, {"blocks.1.mlp": [48, 12], "blocks.0.attn": [4, 1]})
    images, labels = next(probed.train_data.sequential(1))
    for key, points in curves.items():
        if key in ("blocks.1.mlp", "blocks.0.attn"):
            (_, whole), *_, (_, last) = points
            assert abs(whole - last) > 3 * tolerance * whole
        for left, loss in points if key in ("blocks.1.mlp", "blocks.0.attn") else ():
            small = repair(probed.dense, probed.units, {key: list(range(left))}, first_images()).eval()
            with torch.no_grad():
                seen = [(len(y), float(F.cross_entropy(small(x), y))) for x, y in probed.train_data.sequential(10)]
            assert loss == pytest.approx(sum(n * value for n, value in seen) / sum(n for n, _ in seen), rel=tolerance)
    probed.close()


# ------------------------------------------------------------------------------------------ epoch 0 is a candidate


def test_training_that_only_harms_hands_over_the_network_right_after_the_cut(run, trained):
    weights = trained / "model" / "model.safetensors"
    done = run(
        "--struct", "refill", *UNITS, "--pretrained", weights, "--dense_epochs", "0", "--lr", "2", "--clip_grad", "1"
    )
    row = rows_of(done.dir / "states.csv")[1]
    assert row["best_epoch"] == "-1"
    assert row["best_accuracy"] == row["accuracy_after_repair"]
    assert max(line["val_accuracy"] for line in metrics(done.dir)) <= float(row["best_accuracy"])
    assert "no epoch was better than the network right after the cut" in log_of(done.dir)
    assert "try a lower --lr than 2, or --teacher self" in log_of(done.dir)


def test_rsst_and_rewinding_runs_select_among_their_epochs(run):
    for flags in (["--struct", "rsst", *UNITS], ["--struct", "refill", *BOTH]):
        done = run(*flags, name=flags[1]).dir
        assert all(int(row["best_epoch"]) >= 0 for row in rows_of(done / "states.csv"))


# --------------------------------------------------------------------------------------- from what one has, untrained


def test_one_command_cuts_repairs_and_exports_given_weights_without_an_optimizer(run, trained, monkeypatch):
    monkeypatch.setattr(engine.training, "make_optimizer", None)
    flags = ["--struct", "refill", *BOTH, "--target_macs", "0.6", "--dense_epochs", "0", "--epochs", "0"]
    base = [part for part in MICRO if part not in ("--no-export", "--epochs", "2")]
    base[base.index("--pruning_times") + 1 : base.index("--pruning_times") + 1] = ["2"]
    base.pop(base.index("--pruning_times") + 2)
    done = run("--pretrained", trained / "model" / "model.safetensors", *flags, base=base)
    dense, small = rows_of(done.dir / "states.csv")
    (given,) = rows_of(trained / "states.csv")
    assert dense["best_accuracy"] == given["best_accuracy"]
    assert dense["test_accuracy"] == given["test_accuracy"]
    assert float(small["macs"]) <= 0.6 * float(dense["macs"])
    assert small["accuracy_trained"] == small["best_accuracy"] == small["accuracy_after_repair"]
    assert (done.dir / "metrics.jsonl").read_text() == ""
    assert "its classifier of 10 classes is kept" in log_of(done.dir)
    assert (done.dir / "report.html").is_file()
    assert (done.dir / "report.md").read_text().count("repaired")
    exported = json.loads((done.dir / "model" / "config.json").read_text())
    assert exported["metrics"]["test_accuracy"] == float(small["test_accuracy"])
    assert "is complete" in run("--resume", "auto", name="run", base=[]).out
    assert export.main([str(done.dir), "--out", str(done.dir / "again")]) == 0


@pytest.mark.parametrize("state", [0, 1])
def test_a_run_that_does_not_train_goes_on_where_it_was_killed(state, run, trained, monkeypatch):
    given = ["--pretrained", trained / "model" / "model.safetensors", "--dense_epochs", "0", "--epochs", "0"]
    flags = [*given, "--struct", "refill", *UNITS, "--ema_decay", "0.9"]
    whole = run(*flags, name="whole").dir
    with monkeypatch.context() as patch:
        original = entry.Run.end_state

        def end_state(self):
            if self.progress.state == state:
                raise KeyboardInterrupt
            original(self)

        patch.setattr(entry.Run, "end_state", end_state)
        run(*flags, name="killed", code=130)
    killed = run("--resume", name="killed", base=[]).dir
    assert_same_tensors(load(killed / "best.pt")["weights"], load(whole / "best.pt")["weights"])
    rows = [
        [{k: v for k, v in row.items() if k != "seconds"} for row in rows_of(d / "states.csv")] for d in (killed, whole)
    ]
    assert rows[0] == rows[1]


def test_state_0_has_epochs_of_its_own_in_a_schedule_of_the_same_shape(tmp_path):
    flags = ["--struct", "refill", *UNITS, "--dense_epochs", "4", "--warmup", "1", "--pruning_times", "2"]
    seen = record(tmp_path, [*MICRO, *flags])
    assert {key[0]: key[1] for key in seen.steps} == {0: 4 * STEPS, 1: 2 * STEPS}
    rates = [[step.rate for key, step in seen.steps.items() if key[0] == state] for state in (0, 1)]
    # a warm-up of half of the epochs, the first milestone at their half
    assert rates[0] == pytest.approx([0.05 * (k + 1) / 6 for k in range(6)] + [0.005] * 6)
    assert rates[1] == pytest.approx([0.05 * (k + 1) / 3 for k in range(3)] + [0.005] * 3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--struct", "refill", "--repair", "ls"], ["--repair ls", "--prune_type lt", "finetune"]),
        (["--struct", "refill", "--dense_epochs", "0"], ["--dense_epochs 0", "--pretrained or --init"]),
        (["--struct", "refill", "--epochs", "0"], ["--epochs 0", "--pretrained or --init, or --dense_epochs N"]),
        (["--struct", "rsst", "--epochs", "0", "--dense_epochs", "1"], ["--epochs 0", "penalty"]),
        (["--struct", "imp", "--epochs", "0", "--dense_epochs", "1", "--prune_type", "lt"], ["--prune_type lt"]),
        (["--struct", "dense", "--epochs", "0"], ["--epochs 0", "--struct dense"]),
        (["--repair_images", "0"], ["--repair_images 0"]),
        (["--prune_type", "rewind_lt", "--dense_epochs", "3", "--rewind_epoch", "3"], ["--dense_epochs"]),
    ],
)
def test_what_cannot_be_is_one_line(flags, words, capsys, tmp_path):
    code = call([*MICRO, "--arch", "vit_mini", "--save_dir", tmp_path / "run", *flags])
    assert_one_line((code, *capsys.readouterr()), *words)


def test_an_untrained_classifier_is_refused(house, tmp_path, capsys):
    torch.save(vit_micro(num_classes=7).state_dict(), tmp_path / "seven.pth")
    flags = ["--struct", "refill", *UNITS, "--pretrained", tmp_path / "seven.pth", "--dense_epochs", "0"]
    code = call([*MICRO, "--save_dir", tmp_path / "run", *flags])
    assert_one_line((code, *capsys.readouterr()), "--dense_epochs 0", "no classifier for the 10 classes", "head.weight")
