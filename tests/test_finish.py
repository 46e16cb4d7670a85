"""The finish: behind the last state its selected model trains on, as small as it is, with a schedule of its own."""

import json

import pytest
import torch
from micro import BOTH, LAYERS, MICRO, STEPS, TIMES, assert_same_tensors, call, clones, load, log_of, make_run, metrics

# isort: split
from micro import rows_of, wrap
from safetensors.torch import load_file
from test_recipes import picture_folder

import engine.run
import export
import main_imp_fillback as entry
from engine.rounds import finish_schedule
from engine.training import StateTraining

FINISH = ("--finish_epochs", "2")
ON_ALL = (*FINISH, "--finish_on_all")
TWO = ("--pruning_times", "2")
RATES = ("--sched", "cosine", "--min_lr", "0.001")
ALL_STEPS = 10  # an epoch of 60 + 144 images, 20 a step
KINDS = {
    "rsst units": ("--struct", "rsst", *BOTH, *TWO, "--rate", "0.5", "--reg_finish", "0.5", *RATES),
    "refill whole": ("--struct", "refill", *BOTH, *TWO, "--no-compact_training", "--prune_type", "rewind_lt", "--fc"),
    "imp": ("--struct", "imp", *TWO),
    "oneshot": ("--struct", "oneshot", *BOTH),
    "dense": ("--struct", "dense", *TWO),
}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch):
    monkeypatch.setattr(entry.report, "write", lambda _: None)  # pictures take longer than these runs


def parse(*flags):
    return entry.parse_args([*MICRO, *map(str, flags)])


# ----------------------------------------------------------------------------------------------------------- its place
@pytest.mark.parametrize("kind", KINDS)
def test_it_begins_at_the_selected_weights_and_keeps_masks_and_units(kind, seen):
    run = seen(*KINDS[kind], *FINISH)
    table = rows_of(run.dir / "states.csv")
    last, first = int(table[-2]["state"]), run.starts[int(table[-1]["state"])]
    selected = run.epochs[last, int(table[-2]["best_epoch"])]
    assert_same_tensors(first.weights, selected.weights)
    before = run.steps[max(key for key in run.steps if key[0] == last)]
    finish = {step: now for (state, step), now in run.steps.items() if state == last + 1}
    assert list(finish) == list(range(1, 2 * STEPS + 1))
    for now in (first, *finish.values()):
        assert_same_tensors(now.masks, before.masks)
        assert now.kept == before.kept == now.target_kept
        for name in LAYERS:
            assert not now.weights[f"{name}.weight"][now.masks[name] == 0].any()
    assert {now.width for now in finish.values()} == {before.width}  # as small, or as large
    assert not any(now.penalised for now in finish.values())
    assert not torch.equal(finish[1].weights["head.weight"], first.weights["head.weight"])  # it trains
    best = load(run.dir / "best.pt")
    rows = [row for row in metrics(run.dir) if row["state"] == last + 1]
    assert [row["epoch"] for row in rows] == [0, 1]
    assert best["state"] == last + 1
    assert best["accuracy"] == max(row["val_accuracy"] for row in rows) == float(table[-1]["best_accuracy"])
    assert_same_tensors(best["weights"], run.epochs[last + 1, best["epoch"]].weights)
    assert table[-1]["density"] == table[-2]["density"]
    assert rows_of(run.dir / "units.csv")[-1]["state"] == str(last)  # no unit goes


def test_states_before_it_are_those_of_a_run_without(seen):
    bare, run = seen(*KINDS["rsst units"]), seen(*KINDS["rsst units"], *FINISH)
    for key, step in bare.steps.items():
        assert_same_tensors(run.steps[key].weights, step.weights)
    rows = metrics(bare.dir, drop=TIMES)
    assert metrics(run.dir, drop=TIMES)[: len(rows)] == rows
    for name, times in (("states.csv", "seconds"), ("units.csv", None)):
        tables = [[{**row, times: None} for row in rows_of(found.dir / name)] for found in (bare, run)]
        assert tables[1][: len(tables[0])] == tables[0]
    assert "finish" not in bare.log


def test_it_begins_at_the_average_where_that_is_selected(house, tmp_path):
    run = make_run(tmp_path / "run", *FINISH, "--pruning_times", "1", "--ema_decay", "0.9")
    run.begin_state()
    training = StateTraining(run)
    while not training.finished:
        training.step()
        if training.at_epoch_end:
            training.end_epoch()
    run.end_state()
    selected = load(run.save_dir / "best.pt")["weights"]
    run.begin_state()
    training = StateTraining(run)
    assert_same_tensors(run.dense.state_dict(), selected)
    assert_same_tensors(training.network.average.model.state_dict(), selected)
    run.close()


# ----------------------------------------------------------------------------------------------------------- its rates
@pytest.mark.usefixtures("house")
def test_its_schedule_is_a_states_over_its_own_steps():
    base = ("--epochs", 6, "--warmup", 2, "--finish_epochs", 3)
    cosine = finish_schedule(parse(*base, *RATES, "--finish_lr", 0.02), steps_per_epoch=4)
    rates = [cosine.rate(step) for step in range(12)]
    assert rates[:5] == pytest.approx([0.005, 0.01, 0.015, 0.02, 0.02])  # a third of it warms up
    assert rates[-1] == 0.001
    assert rates[4:] == sorted(rates[4:], reverse=True)
    steps = finish_schedule(parse(*base, "--decreasing_lr", "3,5"), steps_per_epoch=4)
    assert [steps.rate(step) for step in (5, 6, 9, 10)] == pytest.approx([0.05, 0.005, 0.005, 0.0005])


def test_it_ends_at_the_floor(seen):
    run = seen(*KINDS["rsst units"], *FINISH)
    assert run.steps[2, 2 * STEPS].rate == pytest.approx(0.001)
    assert run.steps[2, 1].rate == pytest.approx(0.05)


# ------------------------------------------------------------------------------------------------------- on all images
def in_order(images):
    """Images [N, 3, H, W] as rows, sorted: equal for the same images in any order."""
    return torch.tensor(sorted(images.flatten(1).tolist()))


@pytest.mark.parametrize("kind", ["resident", "folders"])
def test_on_all_every_training_and_validation_image_is_seen_once_an_epoch(kind, house, tmp_path):
    flags = ("--batch_size", "51") if kind == "resident" else ("--batch_size", "20", "--img_size", "16")
    if kind == "folders":  # 36 train, 4 validate
        flags += ("--dataset", "folder", "--data", picture_folder(tmp_path / "pictures"), "--workers", "0")
    run = make_run(tmp_path / "run", *flags, *ON_ALL, "--aug", "none", "--pruning_times", "1")
    splits = [torch.cat([images for images, _ in data.sequential()]) for data in (run.round.data, run.val_data)]
    run.begin_state()
    training = StateTraining(run)
    run.progress.step = run.round.total_steps
    run.progress.history, run.progress.best = [{"val_accuracy": 0.0}], {"epoch": 0, "accuracy": 0.0}
    torch.save({"state": 0, "weights": clones(run.dense.state_dict())}, run.save_dir / "best.pt")
    run.end_state()
    run.begin_state()
    training = StateTraining(run)
    shown = []
    training.update = lambda images, _: shown.append(images.clone())
    for epoch in range(2):
        training.bar = None
        for _ in range(run.round.steps_per_epoch):
            training.step()
        assert torch.equal(in_order(torch.cat(shown)), in_order(torch.cat(splits * (epoch + 1))))
    assert training.finished
    run.close()


def test_on_all_the_end_is_exported_and_nothing_counts_as_held_out(house, tmp_path, monkeypatch):
    ends, validated, steps = {}, [], []
    track = engine.recorder.Tracker.log
    monkeypatch.setattr(
        engine.recorder.Tracker, "log", lambda self, values, step: steps.append(step) or track(self, {}, step)
    )
    wrap(monkeypatch, "end_epoch", after=lambda training: ends.update(
        {training.progress.state: clones(training.run.average)}))  # fmt: skip
    wrap(monkeypatch, "evaluate", before=lambda run, model, part: validated.append((run.progress.state, part)))
    base = [flag for flag in MICRO if flag != "--no-export"]
    flags = [*base, *KINDS["rsst units"], *ON_ALL, "--ema_decay", "0.9", "--save_dir", tmp_path / "run"]
    assert call(flags) == 0
    folder = tmp_path / "run"
    best, (*_, state, finish) = load(folder / "best.pt"), rows_of(folder / "states.csv")
    assert_same_tensors(best["weights"], ends[2])
    assert (best["state"], best["epoch"], "accuracy" in best) == (2, 1, False)
    assert (2, "val") not in validated
    assert (2, "test") in validated
    assert state["best_accuracy"]
    assert (finish["best_accuracy"], finish["accuracy_trained"]) == ("", "")
    rows = [row for row in metrics(folder) if row["state"] == 2]
    assert len(rows) == 2
    assert not any(name.startswith("val_") for row in rows for name in row)
    axis = [3, 6, 7, 7 + 3, 7 + 6, 7 + 7, 14 + ALL_STEPS, 14 + 2 * ALL_STEPS, 14 + 2 * ALL_STEPS + 1]
    assert steps == axis  # epochs, and an end for each state
    log = log_of(folder)
    assert "204 images, training and validation together; nothing is held out to select by" in log
    assert "exported is what it ends with, the average of the weights at the last step" in log
    assert "2 epochs from the selected weights of state 1" in log
    assert "finish epoch 2/2" in log
    assert "finish done: density 50.00%, not selected on validation" in log
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["metrics"] == {"test_accuracy": float(finish["test_accuracy"])}
    assert config["provenance"]["finish_on_all"] is True
    card = (folder / "model" / "README.md").read_text()
    assert "- selection: none: it is what the finish ended with, on all images" in card
    assert "val_accuracy" not in card
    weights = load_file(folder / "model" / "model.safetensors")
    assert not export.main([str(folder)])  # later, from the run's files
    again = json.loads((folder / "model" / "config.json").read_text())
    assert {**again, "sha256": None} == {**config, "sha256": None}  # safetensors orders its metadata by chance
    assert_same_tensors(load_file(folder / "model" / "model.safetensors"), weights)


def test_its_teacher_knows_all_images(house, tmp_path, around):
    found = []
    around("step", after=lambda training: found.append((training.progress.state, training.run)))
    flags = [*MICRO, "--struct", "dense", *TWO, *ON_ALL, "--teacher", "self", "--aug", "none"]
    assert call([*flags, "--save_dir", tmp_path / "run"]) == 0
    assert {state for state, _ in found} == {0, 1}
    run = found[-1][1]
    images, _ = run.round.data.batch(1, 1, ALL_STEPS - 1)
    assert [len(table) for table in run.teacher.tables] == [204]
    assert_same_tensors(run.teacher.model.state_dict(), load(tmp_path / "run" / "teacher.pt"))
    (taught,) = run.teacher.outputs(images, 1, 1, 1, ALL_STEPS - 1)
    torch.testing.assert_close(taught, run.teacher.model(images).detach())


# ----------------------------------------------------------------------------------------------------- plan and resume
def test_the_plan_says_how_long_it_is(house, capsys):
    assert call([*MICRO, *ON_ALL, "--finish_lr", "0.01", "--dry_run"]) == 0
    out = capsys.readouterr().out
    assert "3 states x 2 epochs x 3 steps of 20 images (60 train, 144 validate)" in out
    assert "then a finish of 2 epochs x 10 steps of 20 images (204 train, none validate)" in out
    assert "lr 0.01" in out
    assert call([*MICRO, *FINISH, "--dry_run"]) == 0
    assert "then a finish of 2 epochs x 3 steps of 20 images (60 train, 144 validate)" in capsys.readouterr().out


def left_by(folder):
    content, best = load(folder / "checkpoint.pt"), load(folder / "best.pt")
    assert best["state"] == content["run"]["state"] - 1
    table = [{**row, "seconds": None} for row in rows_of(folder / "states.csv")]
    return {**content["weights"], **{f"best.{n}": v for n, v in best["weights"].items()}}, metrics(folder, TIMES), table


def assert_left_alike(one, other):
    (found, *rows), (expected, *expected_rows) = left_by(one), left_by(other)
    assert_same_tensors(found, expected)
    assert rows == expected_rows


@pytest.mark.parametrize("on_all", [False, True])
def test_a_kill_between_what_it_selects_and_its_checkpoint_changes_no_bit(on_all, seen, house, tmp_path):
    epochs = ("--finish_epochs", "1" if on_all else "2", *["--finish_on_all"] * on_all)  # either selects after one
    flags = (*KINDS["rsst units"], *epochs)
    whole = seen(*flags).dir

    def kill(run):
        if run.finishing and run.progress.step:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, "checkpoint", before=kill)
        assert call([*MICRO, *flags, "--save_dir", tmp_path / "broken"]) == 130
    assert load(tmp_path / "broken" / "best.new.pt")["state"] == 2
    assert load(tmp_path / "broken" / "best.pt")["state"] == 1  # the checkpoint's
    assert load(tmp_path / "broken" / "checkpoint.pt")["run"]["begun"] is False
    assert call(["--resume", "--save_dir", tmp_path / "broken"]) == 0
    assert_left_alike(tmp_path / "broken", whole)
    assert "resumed at finish, step 0 of" in log_of(tmp_path / "broken")
    if on_all:
        last = load(whole / "checkpoint.pt")["weights"]
        assert_same_tensors(load(whole / "best.pt")["weights"], last)


def test_states_may_come_before_it_but_not_behind_it(seen, house, tmp_path, capsys):
    flags, folder = ("--struct", "imp", *FINISH), tmp_path / "run"

    def interrupt(training):
        if training.progress.state == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, "step", before=interrupt)
        assert call([*MICRO, *flags, *TWO, "--save_dir", folder]) == 130
    resumed = ["--resume", "--save_dir", folder]
    assert call([*resumed, "--pruning_times", "3"]) == 0
    assert_left_alike(folder, seen(*flags).dir)
    capsys.readouterr()
    assert call([*resumed, "--pruning_times", "4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--pruning_times 4: this run is in its finish" in line


@pytest.mark.parametrize("flags", ["--struct imp --opt adamw", f"--struct refill {' '.join(BOTH)} --ema_decay 0.9"])
def test_a_run_that_is_done_goes_on_with_a_finish_as_if_asked_for_at_once(flags, house, tmp_path, capsys):
    runs = [tmp_path / name for name in ("whole", "later")]
    finish = ("--finish_epochs", "3", "--finish_lr", "0.02")
    for folder, more in zip(runs, (finish, ()), strict=True):
        assert call([*MICRO, *flags.split(), *TWO, *more, "--save_dir", folder]) == 0
    resumed = ["--resume", "--save_dir", runs[1]]
    assert call([*resumed, *finish]) == 0
    assert_left_alike(*runs)
    capsys.readouterr()
    for wrong in (("--finish_epochs", "2"), ("--finish_lr", "0.5"), ("--finish_on_all",)):
        assert call([*resumed, *wrong]) == 2
        assert wrong[0] in capsys.readouterr().err


@pytest.mark.parametrize("done", [True, False])
@pytest.mark.parametrize("more", [(), ("--finish_on_all",)])
def test_a_finish_goes_on_for_more_epochs(done, more, house, tmp_path, monkeypatch, capsys):
    """At a constant rate nothing tells the longer finish from one that was as long from the start."""
    constant = "--struct rsst --reg_finish 0.5 --opt adamw --lr 0.01 --warmup 0 --decreasing_lr 9"
    flags = [*MICRO, *constant.split(), *TWO, *more]
    runs = [tmp_path / name for name in ("whole", "longer")]
    assert call([*flags, "--finish_epochs", "4", "--save_dir", runs[0]]) == 0

    def stop(training):
        if training.run.finishing and training.progress.step == training.run.round.steps_per_epoch + 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if not done:
            wrap(patch, "step", after=stop)
        assert call([*flags, "--finish_epochs", "2", "--save_dir", runs[1]]) == (0 if done else 130)
    capsys.readouterr()
    assert call(["--resume", "--save_dir", runs[1], "--finish_epochs", "4"]) == 0
    assert "the epochs to come have the learning rates of so long a finish" in capsys.readouterr().out
    assert_left_alike(*runs)
