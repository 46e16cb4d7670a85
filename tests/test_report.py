"""Laws of reports and comparisons: what they say is what the files of a run hold, worked out by hand here."""

import base64
import csv
import io
import json
import math
import os
import shlex
import struct
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.figure
import pytest
import yaml

import main_imp_fillback as entry
import report
import rsst
from utils import RunError

PNG = b"\x89PNG\r\n\x1a\n"
FLAGS = {
    "seed": 42, "dataset": "digits", "data": "data", "arch": "vit_tiny", "struct": "rsst", "epochs": 4,
    "pruning_times": 3, "rate": 0.34, "mlp_prune_ratio": 0.5, "criteria": "magnitude", "vit_structured": True,
    "vit_prune_target": "both", "prune_type": "lt", "opt": "adamw", "lr": 0.0005, "sched": "cosine",
    "batch_size": 32, "aug": "none", "reg_finish": 0.25, "ratio_schedule": "geometric", "refill": True,
    "export": True, "compact_training": True, "sorting_mode": "layer-wise", "device": "auto",
}  # fmt: skip
ENVIRONMENT = {"python": "3.11.7", "platform": "Linux", "versions": {"torch": "2.15.0", "timm": "1.0.31"},
               "device": "cpu", "device_name": "EPYC", "threads": 2, "commit": "0123456789abcdef",
               "precision": "bf16"}  # fmt: skip
PARITY = {"images": 1440, "max_difference_float32": 9.5e-7, "max_difference_float64": 2e-15, "largest_logit": 3.9,
          "bound_float32": 3.9e-5, "top1_agreement": 1.0}  # fmt: skip
CONFIG = {"parameters": {"dense": 2_000_000, "removed": 800_000}, "macs": {"dense": 40_000_000, "removed": 10_000_000}}


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def make_run(
    folder, densities=(1.0, 0.7, 0.4), test=None, val=None, top5=None, model=True, units=True, done=None, **flags
):
    """A run's folder as training leaves it; `done` states of it are finished, all when None."""
    args = {"save_dir": str(folder), **FLAGS, **flags}
    counted = ("filters",) if args["arch"].startswith("res") else ("heads", "neurons")
    folder.mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(args, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    densities = densities[: len(densities) if done is None else done]
    epochs = args["epochs"] * (args["pruning_times"] if args["struct"] == "dense" else 1)
    history, states, layers = [], [], []
    for state, density in enumerate(densities):
        soft = args["struct"] == "rsst" and state > 0
        common = {name: round(100 * density) for name in counted}
        common |= {"parameters": round(2_000_000 * density), "macs": round(40_000_000 * density)}
        for epoch in range(epochs):
            before_cut = soft and epoch + 1 < args.get("reg_finish", 1) * epochs
            doomed = soft and epoch + 1 <= args.get("reg_finish", 1) * epochs
            row = {"state": state, "epoch": epoch, "train_accuracy": 0.5, "val_accuracy": 0.4 + 0.1 * epoch / epochs}
            row |= {"density": densities[state - 1] if before_cut else density, **common, "lambda": float(doomed)}
            row |= {"val_top5": 0.9 + 0.01 * epoch} if top5 else {}
            history.append(row | {"residual": 0.5 if before_cut else 0.0, "seconds": 10.0})
        row = {"state": state, "density": density, **common}
        row |= {"accuracy_before_cut": 0.5 if state else "", "accuracy_after_cut": 0.5 - 0.01 * state if state else ""}
        row |= {"residual": 1e-4 if soft else "", "accuracy_trained": 0.475, "best_epoch": 3}
        row |= {"best_accuracy": val[state] if val else 0.6, "test_accuracy": test[state] if test else 0.55}
        row |= {"test_top5": top5[state]} if top5 else {}
        states.append(row | {"seconds": 40.5})
        if "filters" in counted:
            layers.append({"state": state, "layer": "layer1.0.conv1", "kind": "filter", "kept": 8, "total": 16})
        else:
            for kind, name, total in (("head", "attn", 4), ("neuron", "mlp", 8)):
                kept = round(total * density)
                layers += [
                    {"state": state, "layer": f"blocks.{block}.{name}", "kind": kind, "kept": kept, "total": total}
                    for block in range(2)
                ]
    if history:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        write_csv(folder / "states.csv", states)
        if units:
            write_csv(folder / "units.csv", layers)
    if model:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model" / "parity.json").write_text(json.dumps(PARITY))
    return folder


class Page(HTMLParser):
    """Tags with their attributes, the text, and for each table whether it has a box of its own."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.boxed, self.open = [], "", [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.boxed.append(("div", "table") in self.open)
        if tag == "div":
            self.open.append((tag, dict(attrs).get("class")))

    def handle_endtag(self, tag):
        if tag == "div":
            self.open.pop()

    def handle_data(self, data):
        self.text += data


def table_rows(text, header):
    """Cells of the Markdown table whose first header cell is `header`."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {header} |"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def read_csv(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def change_states(folder, changes):
    """Cells of states.csv: {row: {column: value}}."""
    rows = read_csv(folder / "states.csv")
    for index, cells in changes.items():
        rows[index] |= cells
    write_csv(folder / "states.csv", rows)


def written(folder):
    report.write(folder)
    return (folder / "report.md").read_text()


def one_line(capsys):
    """What went to standard error, which must be one line."""
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


def curves(ax):
    """(x, y) of what is drawn, without borders and cuts."""
    found = [(line.get_xdata(), line.get_ydata()) for line in ax.lines]
    return [(list(x), list(y)) for x, y in found if len(set(x)) > 1]


def cuts(ax):
    return [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws, in order; none is rendered."""
    found = []

    def keep(figure, file, **_):
        found.append(figure)
        file.write(PNG + b"%d" % len(found))

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return found


# ---------------------------------------------------------------------------------------------------- report of one run


def test_report_says_what_the_files_hold(tmp_path, figures):
    folder = make_run(tmp_path / "rsst_run")
    text = written(folder)
    assert text.startswith("# rsst_run\n")
    assert table_rows(text, "state")[2] == {
        "state": "2", "density": "40.00%", "heads": "40", "neurons": "40", "parameters": "800,000",
        "MACs": "0.0160 G", "before cut": "50.00%", "after cut": "48.00%", "trained": "47.50%",
        "selected": "60.00%", "test": "55.00%", "time": "40 s",
    }  # fmt: skip
    assert table_rows(text, "state")[0]["before cut"] == "-"
    assert {row["measure"]: list(row.values())[1:] for row in table_rows(text, "measure")} == {
        "test accuracy": ["55.00%", "55.00%", "+0.00 points"],
        "validation accuracy": ["60.00%", "60.00%", "+0.00 points"],
        "density": ["100.00%", "40.00%", "2.50x less"],
        "heads": ["100", "40", "2.50x fewer"],
        "neurons": ["100", "40", "2.50x fewer"],
        "parameters": ["2,000,000", "800,000", "2.50x fewer"],
        "MACs per image": ["0.0400 G", "0.0160 G", "2.50x fewer"],
    }
    for words in (
        "3 states of 4 epochs each, from scratch, seed 42", "on vit_tiny and digits", "34.00% of all heads",
        "50.00% of all neurons", "layer-wise by criterion magnitude", "on a geometric schedule",
        "Every state starts from the initial weights", "Training: AdamW, learning rate 0.0005, cosine schedule",
        "augmentation none, bf16", "cpu EPYC (2 threads), Linux; Python 3.11.7, torch 2.15.0", "commit 0123456789.",
        "Training took 2 min 02 s", "at worst (state 2: 50.00% before, 48.00% after, residual 0.0001)",
        "The 2 cuts changed accuracy by -2.00 points", "9.5e-07 in float32 (allowed: 3.9e-05) and 2e-15 in float64",
        "100.00% of 1,440 validation images", "800,000 of 2,000,000 parameters (2.50x fewer)",
        "0.0100 G of 0.0400 G MACs per image (4.00x fewer)", f"python export.py {folder} --onnx",
    ):  # fmt: skip
        assert words in text, words
    assert "not finished" not in text
    assert "op-5" not in text
    for name in ("accuracy", "density", "penalty", "units"):
        assert f"](plots/{name}.png)" in text
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(PNG)


def test_numbers_are_rounded_and_absent_ones_are_dashes(tmp_path, figures):
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text().replace('"val_accuracy": 0.4,', '"val_accuracy": NaN,')
    (folder / "metrics.jsonl").write_text(text)
    odd = {"density": 0.123456, "macs": 46_269_696, "parameters": 1234.6, "seconds": 3599.7}
    missing = {"test_accuracy": "nan", "macs": "", "accuracy_before_cut": "", "density": "", "parameters": ""}
    change_states(folder, {0: odd, 1: missing | {"seconds": 61}, 2: {"seconds": "", "accuracy_after_cut": 0.51}})
    text = written(folder)
    first, second, third = table_rows(text, "state")
    assert (first["density"], first["MACs"], first["parameters"]) == ("12.35%", "0.0463 G", "1,235")
    assert {second[name] for name in ("test", "MACs", "before cut", "density", "parameters")} == {"-"}
    assert (first["time"], second["time"], third["time"]) == ("1 h 00 min", "1 min 01 s", "-")
    assert "Training took 1 h 01 min" in text
    assert "The cut lost no accuracy (state 2" in text


def test_web_page_needs_nothing_but_itself(tmp_path):
    folder = make_run(tmp_path / "run")
    report.write(folder)
    text = (folder / "report.html").read_text()
    page = Page(text)
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    expected = [(folder / "plots" / f"{name}.png").read_bytes() for name in ("accuracy", "density", "penalty", "units")]
    head = "data:image/png;base64,"
    assert [base64.b64decode(source.removeprefix(head), validate=True) for source in pictures] == expected
    for png in expected:
        assert png.startswith(PNG)
        assert png.endswith(b"IEND\xaeB`\x82")
        assert all(200 <= pixels <= 4000 for pixels in struct.unpack(">II", png[16:24]))
    assert not [tag for tag, _ in page.tags if tag in ("link", "script", "iframe", "object")]
    references = [attrs[key] for _, attrs in page.tags for key in ("href", "src") if key in attrs]
    assert all(reference.startswith((head, "#")) for reference in references)
    assert "url(" not in text
    assert "@import" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text
    assert page.boxed == [True, True]


def test_finished_run_without_model_or_units(tmp_path, figures):
    text = written(make_run(tmp_path / "run", model=False, units=False))
    assert "Proof" not in text
    assert "units.png" not in text
    assert len(figures) == 3


def test_unfinished_run_says_so_and_how_to_go_on(tmp_path, figures):
    folder = make_run(tmp_path / "run", done=2, model=False)
    write_csv(folder / "states.csv", read_csv(folder / "states.csv")[:1])
    text = written(folder)
    assert "**This run is not finished:** 1 of 3 states done, 8 epochs trained." in text
    assert "Training took 1 min 20 s so far" in text  # 40.5 s of state 0, four epochs of 10 s
    assert f"python main_imp_fillback.py --save_dir {folder} --resume" in text
    assert "export.py" not in text
    assert "so far (state 1)" in written(make_run(tmp_path / "two", done=2))


def test_run_that_has_only_begun(tmp_path, capsys):
    folder = make_run(tmp_path / "run", done=0, model=False)
    assert report.main([str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "0 of 3 states done" in text
    assert "No epoch has been trained yet." in text
    assert not (folder / "plots").exists()
    assert str(folder / "report.md") in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{"pruning_times": 1}, {"struct": "dense"}])
def test_dense_run_has_one_state_and_no_penalty(tmp_path, figures, flags):
    folder = make_run(tmp_path / "run", densities=(1.0,), **flags)
    (folder / "plots").mkdir()
    (folder / "plots" / "penalty.png").write_bytes(b"of an earlier run")
    text = written(folder)
    assert f"1 state of {4 if 'pruning_times' in flags else 12} epochs, from scratch" in text
    assert "not finished" not in text
    assert "validation 60.00%, test 55.00%, 2,000,000 parameters, 0.0400 G MACs" in text
    assert not (folder / "plots" / "penalty.png").exists()


def test_network_of_convolutions_counts_filters(tmp_path, figures):
    row = table_rows(written(make_run(tmp_path / "run", arch="res20s", vit_structured=False)), "state")[1]
    assert row["filters"] == "70"
    assert "heads" not in row
    assert figures[-1].axes[0].get_title() == "filters kept"


def test_top5_is_shown_where_it_was_measured(tmp_path, figures):
    text = written(make_run(tmp_path / "run", top5=(0.9, 0.85, 0.8125)))
    assert [row["top-5"] for row in table_rows(text, "state")] == ["90.00%", "85.00%", "81.25%"]
    key = {row["measure"]: list(row.values())[1:] for row in table_rows(text, "measure")}
    assert key["test top-5"] == ["90.00%", "81.25%", "-8.75 points"]
    assert key["validation top-5"] == ["93.00%", "93.00%", "+0.00 points"]  # of epoch 3, the selected one
    text = written(make_run(tmp_path / "dense", top5=(0.9,), densities=(1.0,), struct="dense", epochs=2))
    assert "validation 60.00% (top-5 93.00%), test 55.00% (top-5 90.00%)" in text


def test_names_are_shown_literally(tmp_path, figures):
    name = "<b>a|b*c*_d_[x](y)`z` &amp; $t$"
    folder = make_run(tmp_path / name, pretrained_note="<script>alert(1)</script> | *random* weights", criteria="<i>")
    (folder / "model" / "latency.txt").write_text("```\n<b>fast</b>\n")
    text = written(folder)
    assert text.split("\n\n")[1].startswith("> **Note:** ")
    page = Page((folder / "report.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"b", "i", "em", "script", "a"}
    assert page.text.count(name) >= 3  # title, heading, commands
    for words in ("<script>alert(1)</script> | *random* weights", "criterion <i>", "<b>fast</b>"):
        assert words in page.text, words


@pytest.mark.parametrize(
    ("flags", "single", "words"),
    [
        ({}, False, "are gone in the end"),
        ({"fillback_rate": 0.0}, True, "Each of 2 prunings takes 34.00% of the prunable weights that are left. "),
        ({"fillback_rate": 0.1}, True, "left, and refill gives back 10.00%, chosen by criterion magnitude. "),
        ({"arch": "res20s"}, False, "of the prunable weights that are left, chosen by criterion magnitude. "),
        ({"arch": "res20s", "struct": "imp"}, True, "of the prunable weights that are left. "),
    ],
)
def test_what_goes_is_said(tmp_path, figures, flags, single, words):
    text = written(make_run(tmp_path / "run", vit_structured=not flags, **flags))
    assert words in text
    assert ("single zeros do not make the model faster" in text) == single


@pytest.mark.parametrize(
    "words",
    [
        "--dataset digits --struct rsst --vit_structured --vit_prune_target both --rate 0.34 --no-refill --seed 0",
        "--struct refill --fillback_rate 0.1 --criteria saliency --opt adamw --sched cosine --fc --train_limit 500",
        "--struct imp --prune_type rewind_lt --rewind_epoch 3 --epochs 10 --decreasing_lr 2,7 --pretrained",
        "--struct oneshot --vit_structured --vit_prune_target mlp --no-compact_training --no-export --exp_name=-x",
        "--struct dense --epochs 1 --label_smoothing 0.1 --clip_grad 1 --data /a/b",
        "--reg_form gradient --reg_clock state --RST_schedule x --block_loss_grad --exp_name 'a b'",
        "--arch res20s --criteria l2 --score_batches 3",
    ],
)
def test_printed_command_repeats_the_run(tmp_path, words):
    folder = make_run(tmp_path / "run", done=0)
    given = vars(entry.parse_args(shlex.split(words)))
    (folder / "args.yaml").write_text(yaml.safe_dump(given | {"save_dir": str(folder)}, sort_keys=False))
    run = report.load_run(folder)
    command = report.command(run)
    assert max(map(len, command.splitlines())) <= 110
    program, *again = shlex.split(command.replace("\\\n", " "))[1:]
    assert program == "main_imp_fillback.py"
    repeated = vars(entry.parse_args(again))
    assert {name for name in given if repeated[name] != given[name]} <= report.flags_without_effect(run)


# -------------------------------------------------------------------------------------------------------------- plots


def test_accuracy_plot_has_states_in_a_row(tmp_path, figures):
    report.write(make_run(tmp_path / "run", struct="refill"))
    ax = figures[0].axes[0]
    color = next(line.get_color() for line in ax.lines if line.get_label() == "validation")
    found = [line for line in ax.lines if line.get_color() == color]
    assert [line.get_xdata().tolist() for line in found] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert found[2].get_ydata() == pytest.approx([40, 42.5, 45, 47.5])
    labels = [text.get_text() for axis in ax.child_axes for text in axis.get_xticklabels()]
    assert labels == ["state 0\n100%", "state 1\n70%", "state 2\n40%"]
    before = next(line for line in ax.lines if line.get_label() == "before the cut (dotted)")
    after = next(line for line in ax.lines if line.get_label() == "after the cut")
    assert before.get_xdata().tolist() == cuts(ax) == [4.0, 8.0]
    assert before.get_ydata() == pytest.approx([50.0, 50.0])
    assert after.get_ydata() == pytest.approx([49.0, 48.0])


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6, 8, 10, 13, 60])
def test_cut_is_drawn_where_training_cuts(tmp_path, epochs):
    steps = 40
    expected = rsst.cut_step(steps * epochs, steps, 0.25) / steps
    run = report.load_run(make_run(tmp_path / "run", densities=(1.0, 0.7), epochs=epochs, pruning_times=2))
    for epoch, row in enumerate(run.history[epochs:]):
        row["density"] = 0.7 if epoch + 1 >= expected else 1.0
    assert report.cut_epochs(run) == {1: pytest.approx(epochs + expected)}


def test_density_falls_to_the_right(tmp_path, figures):
    report.write(make_run(tmp_path / "run", test=(0.5, 0.6, 0.55)))
    ax = figures[1].axes[0]
    assert ax.xaxis_inverted()
    test = next(line for line in ax.lines if line.get_label().startswith("test"))
    assert test.get_xdata() == pytest.approx([100, 70, 40])
    assert test.get_ydata() == pytest.approx([50, 60, 55])


def penalty_rows(state, cut, rows=50, until=50):
    """What a state's ramp leaves in penalty.csv: linear lambda, residual falling to 1e-3 at the cut, in epochs."""
    steps = [(step, step / rows) for step in range(1, until + 1)]
    return [{"state": state, "epoch": cut * u, "step": k, "lambda": u, "residual": 1e-3**u} for k, u in steps]


def test_penalty_of_short_states_is_drawn_from_its_steps(tmp_path, figures):
    folder = make_run(tmp_path / "run", epochs=2)
    write_csv(folder / "penalty.csv", penalty_rows(1, 0.5) + penalty_rows(2, 0.5))
    report.write(folder)
    strength, residual = figures[2].axes
    ramp = [step / 50 for step in range(51)]
    for before, strengths, left in zip((2, 4), curves(strength), curves(residual), strict=True):
        assert strengths[0] == left[0] == pytest.approx([before + 0.5 * u for u in ramp])
        assert strengths[1] == pytest.approx(ramp)
        assert left[1] == pytest.approx([1e-3**u for u in ramp])
    assert cuts(strength) == cuts(residual) == [2.5, 4.5]
    assert residual.get_yscale() == "log"
    assert strength.get_xlim() == (0, 6)


def test_penalty_of_older_states_is_drawn_from_their_epochs(tmp_path, figures):
    folder = make_run(tmp_path / "run", epochs=8)
    report.write(folder)
    strength, residual = figures[2].axes
    assert residual.get_yscale() == "log"
    assert [x for x, _ in curves(residual)] == [[8, 9, 10], [16, 17, 18]]
    assert curves(residual)[0][1] == pytest.approx([1.0, 0.5, 1e-4])  # start, one epoch, states.csv at the cut
    assert [y for _, y in curves(strength)] == [[0, 1, 1], [0, 1, 1]]
    write_csv(folder / "penalty.csv", penalty_rows(2, 2.0))  # resumed by a program that writes the file
    report.write(folder)
    assert [len(x) for x, _ in curves(figures[-2].axes[1])] == [3, 51]


def test_penalty_within_the_first_epoch_of_a_state_has_room(tmp_path, figures):
    folder = make_run(tmp_path / "run", epochs=2, done=2)
    write_csv(folder / "penalty.csv", penalty_rows(1, 0.5) + penalty_rows(2, 0.5, until=30))
    report.write(folder)
    strength, _ = figures[2].axes
    assert curves(strength)[1][0][-1] == pytest.approx(4.3)
    assert strength.get_xlim() == (0, pytest.approx(4.3))


def test_heat_map_has_a_panel_per_kind_and_its_shares(tmp_path, figures):
    report.write(make_run(tmp_path / "run", densities=(1.0, 0.5, 0.25)))
    heads, neurons = figures[3].axes[:2]
    assert (heads.get_title(), neurons.get_title()) == ("heads kept", "neurons kept")
    assert heads.images[0].get_array().tolist() == [[1.0, 0.5, 0.25]] * 2
    assert [text.get_text() for text in neurons.texts] == ["100", "50", "25"] * 2
    assert [label.get_text() for label in heads.get_yticklabels()] == ["0", "1"]


def test_many_states_and_layers_stay_readable(tmp_path, figures):
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    densities = [0.8**state for state in range(20)]
    folder = make_run(tmp_path / ("long_" * 30), densities=densities, pruning_times=20, vit_structured=False)
    cells = [(state, block, layer) for state in range(20) for block in range(24) for layer in layers]
    write_csv(
        folder / "units.csv",
        [
            {"state": state, "layer": f"blocks.{block}.{layer}", "kind": "weight", "kept": 0.8**state, "total": 1}
            for state, block, layer in cells
        ],
    )
    report.write(folder)
    accuracy, density, _, units = figures
    assert all(figure.get_size_inches().max() <= 20 for figure in figures)
    assert len(accuracy.axes[0].child_axes[0].get_xticks()) == 10
    assert density.axes[0].get_xscale() == "log"
    assert [panel.get_title() for panel in units.axes[:4]] == [f"{layer}: weights kept" for layer in layers]
    assert all(panel.images[0].get_array().shape == (24, 20) for panel in units.axes[:4])


# ----------------------------------------------------------------------------------------------- damage, and atomicity


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("args.yaml", "a: [1"),
        ("args.yaml", "just words"),
        ("args.yaml", "struct: rsst\n"),
        ("args.yaml", yaml.safe_dump({**FLAGS, "epochs": "four"})),
        ("args.yaml", yaml.safe_dump({**FLAGS, "rate": "much"})),
        ("metrics.jsonl", '{"state": 0, "epoch": 0, "val_acc'),
        ("metrics.jsonl", "[1, 2]\n"),
        ("metrics.jsonl", '{"state": 0}\n'),
        ("states.csv", "state,density\n0,1.0\n1\n"),
        ("states.csv", "state,density\n0,1.0,3\n"),
        ("states.csv", "state,density\n0,dense\n"),
        ("states.csv", "state,density\n,1.0\n"),
        ("states.csv", b"\xff\xfe\x00"),
        ("units.csv", "state,layer,kept,total\n0,blocks.0.attn,1,2\n"),
        ("penalty.csv", "state,step,lambda,residual\n1,1,0.1,1.0\n"),
        ("penalty.csv", "state,epoch,step,lambda,residual\n1,,1,0.1,1.0\n"),
        ("environment.json", "{"),
        ("model/parity.json", "[]"),
        ("model/config.json", '{"parameters": '),
    ],
)
def test_damaged_file_is_one_line_and_changes_nothing(tmp_path, capsys, figures, name, content):
    folder = make_run(tmp_path / "run")
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    before = sorted(tmp_path.rglob("*"))
    assert report.main([str(folder)]) == 2
    line = one_line(capsys)
    assert f"{folder / name} is damaged" in line
    assert "restore the file, or run again" in line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("others", [0, 1])
def test_folder_that_is_no_run(tmp_path, capsys, others):
    runs = [str(make_run(tmp_path / f"run{i}")) for i in range(others)]
    (tmp_path / "empty").mkdir()
    assert report.main([*runs, str(tmp_path / "empty")]) == 2
    assert "args.yaml" in one_line(capsys)
    assert not (tmp_path / "compare").exists()


def test_out_belongs_to_comparisons(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report.main([str(make_run(tmp_path / "run")), "--out", "x"])
    assert stop.value.code == 2
    assert "--out x" in one_line(capsys)


@pytest.mark.parametrize("package", ["matplotlib", "markdown"])
def test_missing_package_says_what_to_install(tmp_path, capsys, monkeypatch, package):
    folder = make_run(tmp_path / "run")
    for name in {package, *(name for name in sys.modules if name.partition(".")[0] == package)}:
        monkeypatch.setitem(sys.modules, name, None)
    assert report.main([str(folder)]) == 2
    assert "pip install matplotlib markdown" in one_line(capsys)
    assert not (folder / "report.md").exists()


@pytest.mark.parametrize("failing", [0, 3, 5])  # four plots, report.md, report.html
def test_failing_write_leaves_the_old_report(tmp_path, monkeypatch, figures, failing):
    folder = make_run(tmp_path / "run")
    report.write(folder)
    change_states(folder, {0: {"test_accuracy": 0.56}})
    old = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    calls, fsync = [], os.fsync

    def break_off(descriptor):
        calls.append(descriptor)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", break_off)
        with pytest.raises(RunError, match="No space left") as stop:
            report.write(folder)
    assert stop.value.code == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == old
    assert "56.00%" in written(folder)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_current_folder_changes_nothing(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "runs" / "run", densities=(1.0,), pruning_times=1, units=False)
    contents = set()
    for here, argument in ((tmp_path, "runs/run"), (folder, "."), (Path("/"), str(folder))):
        monkeypatch.chdir(here)
        assert report.main([argument]) == 0
        contents.add((folder / "report.html").read_bytes())
    assert len(contents) == 1


@pytest.mark.parametrize(("given", "expected"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_wait_without_spinning_unless_told_otherwise(tmp_path, given, expected):
    (tmp_path / "torch.py").write_text("import os\nprint(os.environ['OMP_WAIT_POLICY'])\nos._exit(0)\n")
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    environment |= {"PYTHONPATH": str(Path(report.__file__).parent), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run([sys.executable, "-c", "import report"], cwd=tmp_path, env=environment, capture_output=True)
    assert done.stdout.decode().split() == [expected], done.stderr.decode()


# ------------------------------------------------------------------------------------------------ groups of runs


def groups_of(tmp_path, *flags):
    folders = [make_run(tmp_path / f"run{i}", **each) for i, each in enumerate(flags)]
    return report.group_runs([report.load_run(folder) for folder in folders])


ELEMENTS = {"struct": "imp", "vit_structured": False}


@pytest.mark.parametrize(
    ("flags", "sizes"),
    [
        (
            [  # circumstances and seeds
                {},
                {
                    "seed": 1,
                    "exp_name": "x",
                    "device": "cuda",
                    "gpu": 3,
                    "workers": 0,
                    "print_freq": 1,
                    "verbose": True,
                },
                {"seed": 2, "resume": True, "checkpoint": "x", "overwrite": True, "wandb_mode": "off", "config": "y"},
                {"seed": 3, "data": "/elsewhere", "export": False, "label_smoothing": 0.0, "clip_grad": None},
            ],
            [4],
        ),
        ([ELEMENTS, {**ELEMENTS, "criteria": "l2", "mlp_prune_ratio": 0.9, "reg_finish": 1.0}], [2]),
        ([{"mlp_prune_ratio": None}, {"mlp_prune_ratio": 0.34}], [2]),  # the neurons' ratio is --rate
        ([{"vit_prune_target": "head"}, {"vit_prune_target": "head", "mlp_prune_ratio": 0.9}], [2]),
        ([{"fillback_rate": 0.1}, {"fillback_rate": 0.2}], [2]),  # structured survivors are whole
        ([{"rewind_epoch": 1, "momentum": 0.5}, {"decreasing_lr": "1,2", "exponents": 2}], [2]),
        ([{"rate": 0.3}, {"rate": 0.4}], [1, 1]),
        ([{"lr": 0.1}, {"lr": 0.01}, {"lr": 0.1, "seed": 7}], [2, 1]),
        ([ELEMENTS, {**ELEMENTS, "prune_patch_embed": True}], [1, 1]),
        ([{"prune_type": "rewind_lt", "rewind_epoch": epoch} for epoch in (1, 2)], [1, 1]),
        ([{"vit_structured": False, "arch": "res20s", "criteria": name} for name in ("l1", "l2")], [1, 1]),
        ([{"vit_structured": False, "criteria": name} for name in ("l1", "l2")], [2]),  # weights go by their size
        ([{"pretrained_note": "random weights"}, {}], [1, 1]),
    ],
)
def test_only_flags_with_effect_part_runs(tmp_path, flags, sizes):
    groups = groups_of(tmp_path, *flags)
    assert [len(group.runs) for group in groups] == sizes


def test_labels_name_the_method_and_what_differs(tmp_path):
    groups = groups_of(
        tmp_path,
        {"criteria": "l1"},
        {"criteria": "magnitude"},
        {"criteria": "l1", "struct": "refill"},
        {"criteria": "l1", "block_loss_grad": True},
        ELEMENTS,
        {"struct": "dense"},
        {"criteria": "l1", "struct": "oneshot"},
    )
    labels = [group.label for group in groups]
    assert labels[0].startswith("RSST (")
    assert "l1" in labels[0]
    assert "magnitude" in labels[1]
    assert "block_loss_grad" in labels[3]
    assert labels[2] == "Refill (l1, heads+neurons)"
    assert labels[4:] == ["IMP (weights)", "Dense", "One-shot (l1, heads+neurons)"]
    assert [group.label for group in groups_of(tmp_path / "lr", {"lr": 0.1}, {"lr": 0.01})] == [
        "RSST (lr 0.1)", "RSST (lr 0.01)"
    ]  # fmt: skip


class Reached:
    """A group for matching: its label and the densities of its states."""

    def __init__(self, label, *densities):
        half = (0.5, math.nan)
        self.label, self.points = label, [report.Point(i, 1, d, {}, half, half) for i, d in enumerate(densities)]


SCHEDULE = [0.8**state for state in range(20)]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # within a point of each other, and no further
        ([(1.0, 0.50), (1.0, 0.49)], [["a0", "b0"], ["a1", "b1"]]),
        ([(0.50,), (0.489,)], []),
        # both of b's states lie within a point of a's: the closer one takes it, the other finds what is near, too
        ([(0.50,), (0.509, 0.503)], [["a0", "b0"], ["a0", "b1"]]),
        # low densities of one schedule match state by state
        ([SCHEDULE] * 3, [[f"a{state}", f"b{state}", f"c{state}"] for state in range(20)]),
        # no pair within a point is lost
        ([(0.500,), (0.492,), (0.485,)], [["a0", "b0"], ["b0", "c0"]]),
    ],
)
def test_equal_density_is_within_one_point(groups, expected):
    found = report.equal_density([Reached(label, *each) for label, each in zip("abc", groups, strict=False)])
    assert [[f"{group.label}{point.state}" for group, point in members] for members in found] == expected


# ---------------------------------------------------------------------------------------------------- comparison


def test_comparison_by_hand(tmp_path, figures, capsys):
    runs = tmp_path / "runs"
    make_run(runs / "r1", test=(0.50, 0.60, 0.40), val=(0.5, 0.7, 0.6))
    make_run(runs / "r2", test=(0.54, 0.62, 0.44), val=(0.5, 0.7, 0.6), seed=1)
    make_run(runs / "f1", test=(0.52, 0.58, 0.41), densities=(1.0, 0.695, 0.2), struct="refill")
    make_run(runs / "d1", test=(0.66,), densities=(1.0,), struct="dense")
    assert report.main([str(runs / name) for name in ("r1", "r2", "f1", "d1")]) == 0
    assert str(runs / "compare") in capsys.readouterr().out
    rows = read_csv(runs / "compare" / "compare.csv")
    assert len(rows) == 3 + 3 + 1
    assert list(rows[0]) == [
        "dataset", "label", "n", "state", "density", "heads", "neurons", "parameters", "macs",
        "val_mean", "val_sd", "test_mean", "test_sd",
    ]  # fmt: skip
    pair = next(row for row in rows if row["label"] == "RSST" and row["state"] == "1")
    assert (pair["n"], pair["heads"], pair["parameters"]) == ("2", "70.0", "1400000.0")
    assert float(pair["test_mean"]) == pytest.approx(0.61)
    assert float(pair["test_sd"]) == pytest.approx(0.01 * math.sqrt(2))  # deviations of one point, n - 1 = 1
    assert float(pair["val_sd"]) == 0.0
    single = next(row for row in rows if row["label"] == "Refill" and row["state"] == "1")
    assert (single["n"], single["test_sd"]) == ("1", "")

    text = (runs / "compare" / "compare.md").read_text()
    equal = table_rows(text, "density level")
    assert [row["density level"] for row in equal] == ["100.00%", "", "", "69.75%", "", ""]
    assert [row["method"] for row in equal] == ["RSST", "Refill", "Dense"] * 2
    assert [(row["test"], row["test sd"], row["n"]) for row in equal[3:]] == [
        ("61.00%", "1.41", "2"), ("58.00%", "-", "1"), ("66.00%", "-", "1")
    ]  # fmt: skip
    assert "no ranking of methods follows" in text
    assert "op-5" not in text
    page = Page((runs / "compare" / "compare.html").read_text())
    assert [attrs["src"][:22] for tag, attrs in page.tags if tag == "img"] == ["data:image/png;base64,"]
    assert page.boxed == [True] * 3

    ax = figures[0].subfigs[0].axes[0]
    assert ax.xaxis_inverted()
    bars = ax.containers[0]
    assert bars.lines[0].get_ydata() == pytest.approx([52, 61, 42])
    root = math.sqrt(2)
    assert bars.lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([52 - 2 * root, 52 + 2 * root])
    drawn = [container.lines[0] for container in ax.containers]  # told apart without colours
    assert len({curve.get_linestyle() for curve in drawn}) == len({curve.get_marker() for curve in drawn}) == 2
    reference = next(line for line in ax.lines if line.get_label() == "Dense, n = 1")
    assert reference.get_ydata() == pytest.approx([66, 66])
    assert "density" in ax.get_xlabel()
    assert "accuracy" in ax.get_ylabel()


def test_comparison_shows_top5_where_it_was_measured(tmp_path, figures):
    make_run(tmp_path / "a", top5=(0.90, 0.80, 0.70))
    make_run(tmp_path / "b", top5=(0.94, 0.82, 0.70), seed=1)
    make_run(tmp_path / "c", struct="refill")
    out = report.compare([tmp_path / name for name in "abc"])
    rows = table_rows((out / "compare.md").read_text(), "density level")
    assert [(row["top-5"], row["top-5 sd"]) for row in rows[:2]] == [("92.00%", "2.83"), ("-", "-")]
    cells = [(row["test_top5_mean"], row["test_top5_sd"]) for row in read_csv(out / "compare.csv")]
    assert [float(cell) for cell in cells[1]] == pytest.approx([0.81, 0.01 * math.sqrt(2)])
    assert cells[3] == ("", "")


def test_nothing_in_common_is_said(tmp_path, figures):
    make_run(tmp_path / "a", densities=(1.0, 0.7, 0.4))
    make_run(tmp_path / "b", densities=(1.0, 0.6, 0.3), struct="refill")
    text = (report.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out") / "compare.md").read_text()
    assert "No two groups reach the same density below 100%" in text
    assert "- RSST: 100.00%, 70.00%, 40.00%" in text
    assert "- Refill: 100.00%, 60.00%, 30.00%" in text


def test_data_sets_are_kept_apart(tmp_path, figures):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", dataset="cifar10", struct="refill")
    make_run(tmp_path / "c", dataset="folder", data="/one")
    make_run(tmp_path / "d", dataset="folder", data="/two", seed=1)
    out = report.compare([tmp_path / name for name in "abcd"])
    text = (out / "compare.md").read_text()
    names = ["digits", "cifar10", "folder /one", "folder /two"]
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## Data set: {name}" for name in names]
    assert "| density level |" not in text
    assert [figure.axes[0].get_title() for figure in figures[0].subfigs] == names
    assert {row["dataset"] for row in read_csv(out / "compare.csv")} == set(names)


def test_unfinished_and_repeated_runs_are_named_and_left_out(tmp_path, figures, capsys):
    make_run(tmp_path / "a", test=(0.5, 0.5, 0.5))
    make_run(tmp_path / "b", test=(0.7, 0.7, 0.7), seed=1)
    make_run(tmp_path / "again", test=(0.9, 0.9, 0.9), seed=1)
    make_run(tmp_path / "half", done=1, seed=2)
    names = ("a", "b", "again", "half", "a")
    assert report.main([*(str(tmp_path / name) for name in names), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "half: not finished (1 of 3 states)" in text
    assert "again: same flags and seed as b" in text
    assert "half" in capsys.readouterr().err
    row = read_csv(tmp_path / "out" / "compare.csv")[0]
    assert row["n"] == "2"
    assert float(row["test_mean"]) == pytest.approx(0.6)


def test_no_finished_run_writes_nothing(tmp_path, capsys):
    folders = [str(make_run(tmp_path / name, done=1)) for name in "ab"]
    assert report.main([*folders, "--out", str(tmp_path / "out")]) == 2
    assert "no finished run" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_failing_comparison_leaves_nothing(tmp_path, figures, monkeypatch):
    folders = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        report.compare(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(tmp_path, capsys, figures):
    folders = [str(make_run(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    (tmp_path / "out").write_text("mine")
    assert report.main([*folders, "--out", str(tmp_path / "out")]) == 2
    assert "--out" in one_line(capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_labels_and_names_in_a_comparison_are_literal(tmp_path, figures):
    make_run(tmp_path / "<b>one", criteria="a|<u>b</u>", pretrained_note="<s>note</s>")
    make_run(tmp_path / "two", criteria="l1")
    out = report.compare([tmp_path / "<b>one", tmp_path / "two"])
    page = Page((out / "compare.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"b", "u", "s"}
    assert "RSST (a|<u>b</u>" in page.text
    assert "<s>note</s>" in page.text


def test_comparison_lies_beside_the_runs_wherever_it_is_started(tmp_path, figures, monkeypatch):
    make_run(tmp_path / "results" / "a")
    make_run(tmp_path / "results" / "b", seed=1)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    out = report.compare(["../results/a", tmp_path / "results" / "b"])
    assert out == (tmp_path / "results" / "compare").resolve()
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.html", "compare.md", "compare.png"]
