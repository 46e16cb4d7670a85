"""Laws of reports and comparisons: what they say is what the files of a run hold, worked out by hand here."""

import base64
import csv
import io
import json
import math
import os
import shlex
import struct
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

import main_imp_fillback
import report
import rsst
import utils
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


def make_run(folder, densities=(1.0, 0.7, 0.4), test=None, val=None, model=True, units=True, done=None, **flags):
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
            history.append(row | {"residual": 0.5 if before_cut else 0.0, "seconds": 10.0})
        row = {"state": state, "density": density, **common}
        row |= {"accuracy_before_cut": 0.5 if state else "", "accuracy_after_cut": 0.5 - 0.01 * state if state else ""}
        row |= {"residual": 1e-4 if soft else "", "accuracy_trained": 0.475, "best_epoch": 3}
        row |= {"best_accuracy": val[state] if val else 0.6, "test_accuracy": test[state] if test else 0.55}
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


@pytest.fixture
def no_drawing(monkeypatch):
    """Pictures of nothing, for tests that look at words."""
    monkeypatch.setattr(report, "_draw", lambda width, height, paint: PNG + b"drawn")


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws, in order."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = []

    def draw(width, height, paint):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        paint(figure)
        found.append(figure)
        return PNG + b"drawn"

    monkeypatch.setattr(report, "_draw", draw)
    return found


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


def one_line(capsys):
    """What went to standard error, which must be one line."""
    text = capsys.readouterr().err
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text


# ---------------------------------------------------------------------------------------------------- small things


def test_sample_standard_deviation_by_hand():
    # mean 4, deviations -3, -1, 4: (9 + 1 + 16) / 2 = 13
    mean, sd = report.mean_and_sd([1.0, 3.0, 8.0])
    assert mean == pytest.approx(4.0)
    assert sd == pytest.approx(math.sqrt(13.0))


def test_one_value_has_no_standard_deviation_and_nan_is_no_value():
    mean, sd = report.mean_and_sd([math.nan, 0.25])
    assert mean == 0.25
    assert math.isnan(sd)
    assert all(map(math.isnan, report.mean_and_sd([])))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (report.percent(0.123456), "12.35%"),
        (report.percent(1.0), "100.00%"),
        (report.percent(math.nan), "-"),
        (report.percent(None), "-"),
        (report.thousands(2688394.0), "2,688,394"),
        (report.thousands(math.nan), "-"),
        (report.giga(46_269_696), "0.0463 G"),
        (report.duration(59.4), "59 s"),
        (report.duration(61), "1 min 01 s"),
        (report.duration(3599.7), "1 h 00 min"),
        (report.duration(5400), "1 h 30 min"),
        (report.duration(math.nan), "-"),
    ],
)
def test_numbers_as_words(shown, expected):
    assert shown == expected


@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6, 8, 10, 13, 60])
def test_cut_is_drawn_where_training_cuts(tmp_path, epochs):
    steps = 40
    expected = rsst.cut_step(steps * epochs, steps, 0.25) / steps
    run = report.load_run(make_run(tmp_path / "run", densities=(1.0, 0.7), epochs=epochs, pruning_times=2))
    for epoch, row in enumerate(run.history[epochs:]):
        row["density"] = 0.7 if epoch + 1 >= expected else 1.0
    assert report.cut_epochs(run) == {1: pytest.approx(epochs + expected)}


def test_cut_of_refill_lies_on_the_border_of_states(tmp_path):
    run = report.load_run(make_run(tmp_path / "run", struct="refill"))
    assert report.cut_epochs(run) == {1: 4.0, 2: 8.0}


# ---------------------------------------------------------------------------------------------------- report of one run


def test_report_says_what_the_files_hold(tmp_path, no_drawing):
    folder = make_run(tmp_path / "rsst_run")
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert text.startswith("# rsst_run\n")
    assert table_rows(text, "state")[2] == {
        "state": "2", "density": "40.00%", "heads": "40", "neurons": "40", "parameters": "800,000",
        "MACs": "0.0160 G", "before cut": "50.00%", "after cut": "48.00%", "trained": "47.50%",
        "selected": "60.00%", "test": "55.00%", "time": "40 s",
    }  # fmt: skip
    assert table_rows(text, "state")[0]["before cut"] == "-"
    key = {row["measure"]: row for row in table_rows(text, "measure")}
    assert key["parameters"]["change"] == "2.50x fewer"  # 2,000,000 over 800,000
    assert key["MACs per image"]["final (state 2)"] == "0.0160 G"
    assert key["test accuracy"]["change"] == "+0.00 points"
    assert key["heads"]["dense (state 0)"] == "100"
    assert "The 2 cuts changed accuracy by -2.00 points at worst (state 2: 50.00% before, 48.00% after" in text
    assert "9.5e-07 in float32 (allowed: 3.9e-05) and 2e-15 in float64" in text
    assert "100.00% of 1,440 validation images" in text
    assert "800,000 of 2,000,000 parameters (2.50x fewer)" in text
    assert "0.0100 G of 0.0400 G MACs per image (4.00x fewer)" in text
    for words in ("vit_tiny", "digits", "3 states of 4 epochs each", "seed 42", "34.00% of all heads",
                  "50.00% of all neurons", "criterion magnitude", "torch 2.15.0", "cpu EPYC (2 threads)",
                  "augmentation none, bf16", "commit 0123456789", "Training took 2 min 02 s"):  # fmt: skip
        assert words in text, words
    assert "not finished" not in text
    for name in ("accuracy", "density", "penalty", "units"):
        assert f"](plots/{name}.png)" in text
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(PNG)


def test_web_page_needs_nothing_but_itself(tmp_path):
    folder = make_run(tmp_path / "run")
    report.write(folder)
    text = (folder / "report.html").read_text()
    page = Page(text)
    pictures = [attrs["src"] for tag, attrs in page.tags if tag == "img"]
    expected = [(folder / "plots" / f"{name}.png").read_bytes() for name in ("accuracy", "density", "penalty", "units")]
    head = "data:image/png;base64,"
    assert all(source.startswith(head) for source in pictures)
    assert [base64.b64decode(source.removeprefix(head), validate=True) for source in pictures] == expected
    for png in expected:
        assert png.startswith(PNG)
        assert png.endswith(b"IEND\xaeB`\x82")
        width, height = struct.unpack(">II", png[16:24])
        assert 600 <= width <= 4000
        assert 200 <= height <= 4000
    assert not [tag for tag, _ in page.tags if tag in ("link", "script", "iframe", "object")]
    references = [attrs.get(key) for _, attrs in page.tags for key in ("href", "src") if key in attrs]
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert "url(" not in text
    assert "@import" not in text
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in text
    assert page.boxed == [True, True]


def test_finished_run_without_model_or_units(tmp_path, no_drawing):
    folder = make_run(tmp_path / "run", model=False, units=False)
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert "Proof" not in text
    assert "units.png" not in text
    assert not (folder / "plots" / "units.png").exists()


def test_unfinished_run_says_so_and_how_to_go_on(tmp_path, no_drawing):
    folder = make_run(tmp_path / "run", done=2, model=False)
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert "**This run is not finished:** 2 of 3 states done, 8 epochs trained." in text
    assert f"python main_imp_fillback.py --save_dir {folder} --resume" in text
    assert "so far (state 1)" in text
    assert "export.py" not in text


def test_epochs_of_an_unfinished_state_count(tmp_path, figures):
    folder = make_run(tmp_path / "run", done=2, model=False)
    rows = list(csv.DictReader(io.StringIO((folder / "states.csv").read_text())))
    write_csv(folder / "states.csv", rows[:1])
    report.write(folder)
    text = (folder / "report.md").read_text()
    assert "1 of 3 states done, 8 epochs trained" in text
    assert "Training took 1 min 20 s so far" in text  # 40.5 s of state 0, four epochs of 10 s


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
    report.write(folder)
    text = (folder / "report.md").read_text()
    epochs = 4 if "pruning_times" in flags else 12
    assert f"1 state of {epochs} epochs, from scratch" in text
    assert "not finished" not in text
    assert "validation 60.00%, test 55.00%, 2,000,000 parameters, 0.0400 G MACs" in text
    assert not (folder / "plots" / "penalty.png").exists()


def test_network_of_convolutions_counts_filters(tmp_path, figures):
    folder = make_run(tmp_path / "run", arch="res20s", vit_structured=False)
    report.write(folder)
    row = table_rows((folder / "report.md").read_text(), "state")[1]
    assert row["filters"] == "70"
    assert "heads" not in row
    assert figures[-1].axes[0].get_title() == "filters kept"


def test_empty_and_nan_cells_are_dashes(tmp_path, figures):
    folder = make_run(tmp_path / "run")
    text = (folder / "metrics.jsonl").read_text().replace('"val_accuracy": 0.4,', '"val_accuracy": NaN,')
    (folder / "metrics.jsonl").write_text(text)
    rows = list(csv.DictReader(io.StringIO((folder / "states.csv").read_text())))
    rows[1] |= {"test_accuracy": "nan", "macs": "", "accuracy_before_cut": ""}
    rows[2] |= {"density": "", "parameters": ""}
    write_csv(folder / "states.csv", rows)
    report.write(folder)
    shown = table_rows((folder / "report.md").read_text(), "state")
    assert (shown[1]["test"], shown[1]["MACs"], shown[1]["before cut"]) == ("-", "-", "-")
    assert (shown[2]["density"], shown[2]["parameters"]) == ("-", "-")


def test_names_are_shown_literally(tmp_path, no_drawing):
    name = "<b>a|b*c*_d_[x](y)`z` &amp; $t$"
    folder = make_run(tmp_path / name, pretrained_note="<script>alert(1)</script> | *random* weights", criteria="<i>")
    (folder / "model" / "latency.txt").write_text("```\n<b>fast</b>\n")
    report.write(folder)
    page = Page((folder / "report.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"b", "i", "em", "script", "a"}
    assert page.text.count(name) >= 3  # title, heading, commands
    assert "<script>alert(1)</script> | *random* weights" in page.text
    assert "criterion <i>" in page.text
    assert "<b>fast</b>" in page.text


def test_fallback_to_random_weights_stands_before_all_else(tmp_path, no_drawing):
    folder = make_run(tmp_path / "run", pretrained_note="no network: random weights")
    report.write(folder)
    assert (folder / "report.md").read_text().split("\n\n")[1] == "> **Note:** no network: random weights"


def test_legend_counts_single_weights_only_where_they_go(tmp_path, no_drawing):
    flags = {"units": {}, "weights": {"vit_structured": False}, "filters": {"arch": "res20s", "vit_structured": False}}
    flags["kernels"] = {**flags["filters"], "struct": "imp"}
    said = {}
    for name, each in flags.items():
        report.write(make_run(tmp_path / name, **each))
        said[name] = "single zeros do not make the model faster" in (tmp_path / name / "report.md").read_text()
    assert said == {"units": False, "weights": True, "filters": False, "kernels": True}


@pytest.mark.parametrize(
    "words",
    [
        "--dataset digits --struct rsst --vit_structured --vit_prune_target both --rate 0.34 --no-refill --seed 0",
        "--struct refill --fillback_rate 0.1 --criteria saliency --opt adamw --sched cosine --fc --train_limit 500",
        "--struct imp --prune_type rewind_lt --rewind_epoch 3 --epochs 10 --decreasing_lr 2,7 --pretrained",
        "--struct oneshot --vit_structured --vit_prune_target mlp --no-compact_training --no-export --exp_name=-x",
        "--struct dense --epochs 1 --label_smoothing 0.1 --clip_grad 1 --data /a/b",
        "--reg_form gradient --reg_clock state --RST_schedule x --block_loss_grad --exp_name 'a b'",
    ],
)
def test_printed_command_repeats_the_run(tmp_path, words):
    folder = make_run(tmp_path / "run", done=0)
    given = utils.plain_args(main_imp_fillback.parse_args(shlex.split(words)))
    (folder / "args.yaml").write_text(yaml.safe_dump(given | {"save_dir": str(folder)}, sort_keys=False))
    run = report.load_run(folder)
    command = report.command(run)
    assert max(map(len, command.splitlines())) <= 110
    program, *again = shlex.split(command.replace("\\\n", " "))[1:]
    assert program == "main_imp_fillback.py"
    repeated = utils.plain_args(main_imp_fillback.parse_args(again))
    differs = {name for name in given if repeated[name] != given[name]}
    assert differs <= report.idle_flags(run)


# -------------------------------------------------------------------------------------------------------------- plots


def test_accuracy_plot_has_states_in_a_row(tmp_path, figures):
    folder = make_run(tmp_path / "run", struct="refill")
    report.write(folder)
    ax = figures[0].axes[0]
    curves = [line.get_xdata().tolist() for line in ax.lines if line.get_color() == report.BLUE]
    assert curves == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    labels = [text.get_text() for axis in ax.child_axes for text in axis.get_xticklabels()]
    assert labels == ["state 0\n100%", "state 1\n70%", "state 2\n40%"]
    before = next(line for line in ax.lines if line.get_label() == "before the cut (dotted)")
    after = next(line for line in ax.lines if line.get_label() == "after the cut")
    assert before.get_xdata().tolist() == [4.0, 8.0]
    assert before.get_ydata() == pytest.approx([50.0, 50.0])
    assert after.get_ydata() == pytest.approx([49.0, 48.0])


def test_density_falls_to_the_right(tmp_path, figures):
    report.write(make_run(tmp_path / "run", test=(0.5, 0.6, 0.55)))
    ax = figures[1].axes[0]
    assert ax.xaxis_inverted()
    test = next(line for line in ax.lines if line.get_label().startswith("test"))
    assert test.get_xdata() == pytest.approx([100, 70, 40])
    assert test.get_ydata() == pytest.approx([50, 60, 55])


def test_penalty_plot_ends_at_the_cut_on_a_logarithmic_axis(tmp_path, figures):
    report.write(make_run(tmp_path / "run", epochs=8))
    strength, residual = figures[2].axes
    assert residual.get_yscale() == "log"
    curves = [line for line in residual.lines if line.get_color() == report.BLUE]
    assert [line.get_xdata().tolist() for line in curves] == [[8, 9, 10], [16, 17, 18]]
    assert curves[0].get_ydata() == pytest.approx([1.0, 0.5, 1e-4])  # start, one epoch, states.csv at the cut
    assert [line.get_ydata().tolist() for line in strength.lines if line.get_color() == report.PURPLE] == [
        [0, 1, 1], [0, 1, 1]
    ]  # fmt: skip


def test_heat_map_has_a_panel_per_kind_and_its_shares(tmp_path, figures):
    report.write(make_run(tmp_path / "run", densities=(1.0, 0.5, 0.25)))
    heads, neurons = figures[3].axes[:2]
    assert (heads.get_title(), neurons.get_title()) == ("heads kept", "neurons kept")
    assert heads.images[0].get_array().tolist() == [[1.0, 0.5, 0.25]] * 2
    assert [text.get_text() for text in neurons.texts] == ["100", "50", "25"] * 2
    assert [label.get_text() for label in heads.get_yticklabels()] == ["0", "1"]


def test_many_states_and_layers_stay_readable(tmp_path, figures):
    states, layers = 20, ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    densities = [0.8**state for state in range(states)]
    folder = make_run(tmp_path / ("long_" * 30), densities=densities, pruning_times=states, vit_structured=False)
    write_csv(
        folder / "units.csv",
        [
            {
                "state": state,
                "layer": f"blocks.{block}.{layer}",
                "kind": "weight",
                "kept": 1000 * density,
                "total": 1000,
            }
            for state, density in enumerate(densities)
            for block in range(24)
            for layer in layers
        ],
    )
    report.write(folder)
    accuracy, density, penalty, units = figures
    assert all(figure.get_size_inches().max() <= 20 for figure in figures)
    assert len(accuracy.axes[0].child_axes[0].get_xticks()) == 10
    assert density.axes[0].get_xscale() == "log"
    panels = units.axes[:4]
    assert [panel.get_title() for panel in panels] == [f"{layer}: weights kept" for layer in layers]
    assert all(panel.images[0].get_array().shape == (24, 20) for panel in panels)


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
        ("states.csv", "density\n1.0\n"),
        ("states.csv", "state,density\n,1.0\n"),
        ("units.csv", "state,layer,kept,total\n0,blocks.0.attn,1,2\n"),
        ("environment.json", "{"),
        ("model/parity.json", "[]"),
        ("model/config.json", '{"parameters": '),
    ],
)
def test_damaged_file_is_one_line_and_changes_nothing(tmp_path, capsys, no_drawing, name, content):
    folder = make_run(tmp_path / "run")
    (folder / name).write_text(content)
    before = sorted(path for path in tmp_path.rglob("*"))
    assert report.main([str(folder)]) == 2
    assert str(folder / name) in one_line(capsys)
    assert sorted(path for path in tmp_path.rglob("*")) == before


def test_bytes_that_are_no_text(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    (folder / "states.csv").write_bytes(b"\xff\xfe\x00")
    assert report.main([str(folder)]) == 2
    assert "states.csv" in one_line(capsys)


@pytest.mark.parametrize("others", [0, 1])
def test_folder_that_is_no_run(tmp_path, capsys, no_drawing, others):
    runs = [str(make_run(tmp_path / f"run{i}")) for i in range(others)]
    (tmp_path / "empty").mkdir()
    assert report.main([*runs, str(tmp_path / "empty")]) == 2
    assert "args.yaml" in one_line(capsys)
    assert not (tmp_path / "compare").exists()


def test_out_belongs_to_comparisons(tmp_path, capsys):
    folder = make_run(tmp_path / "run")
    with pytest.raises(SystemExit) as stop:
        report.main([str(folder), "--out", "x"])
    assert stop.value.code == 2
    assert "--out x" in one_line(capsys)


@pytest.mark.parametrize("package", ["matplotlib", "markdown"])
def test_missing_package_says_what_to_install(tmp_path, capsys, monkeypatch, package):
    folder = make_run(tmp_path / "run")
    for name in [name for name in sys.modules if name.partition(".")[0] == package] or [package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    assert report.main([str(folder)]) == 2
    assert "pip install matplotlib markdown" in one_line(capsys)
    assert not (folder / "report.md").exists()


@pytest.mark.parametrize("failing", range(6))  # four plots, report.md, report.html
def test_failing_write_leaves_the_old_report(tmp_path, monkeypatch, failing):
    folder = make_run(tmp_path / "run")
    monkeypatch.setattr(report, "_draw", lambda width, height, paint: PNG + b"old")
    report.write(folder)
    old = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(report, "_draw", lambda width, height, paint: PNG + b"new")
    rows = (folder / "states.csv").read_text()
    (folder / "states.csv").write_text(rows.replace("0.55", "0.56"))
    old[folder / "states.csv"] = (folder / "states.csv").read_bytes()
    calls, fsync = [], os.fsync

    def break_off(descriptor):
        calls.append(descriptor)
        if len(calls) == failing + 1:
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(utils.os, "fsync", break_off)
        with pytest.raises(RunError, match="No space left"):
            report.write(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == old
    report.write(folder)
    assert "56.00%" in (folder / "report.md").read_text()
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_current_folder_changes_nothing(tmp_path, monkeypatch, no_drawing):
    folder = make_run(tmp_path / "runs" / "run")
    contents = []
    for here, argument in ((tmp_path, "runs/run"), (folder, "."), (Path("/"), str(folder))):
        monkeypatch.chdir(here)
        assert report.main([argument]) == 0
        contents.append((folder / "report.html").read_bytes())
    assert contents[0] == contents[1] == contents[2]


# ------------------------------------------------------------------------------------------------ groups of runs


def groups_of(tmp_path, *flags):
    folders = [make_run(tmp_path / f"run{i}", **each) for i, each in enumerate(flags)]
    return report.group_runs([report.load_run(folder) for folder in folders])


def test_circumstances_and_seeds_do_not_part_runs(tmp_path):
    groups = groups_of(
        tmp_path,
        {},
        {"seed": 1, "exp_name": "again", "device": "cuda", "gpu": 3, "workers": 0, "print_freq": 1, "verbose": True},
        {"seed": 2, "resume": True, "checkpoint": "x", "overwrite": True, "wandb_mode": "offline", "config": "y"},
        {"seed": 3, "data": "/elsewhere", "export": False, "label_smoothing": 0.0, "clip_grad": None},
    )
    assert [len(group.runs) for group in groups] == [4]
    assert groups[0].label == "RSST"


def test_flags_without_effect_do_not_part_runs(tmp_path):
    imp = {"struct": "imp", "vit_structured": False}
    groups = groups_of(tmp_path, imp, {**imp, "criteria": "l2", "mlp_prune_ratio": 0.9, "reg_finish": 1.0, "seed": 1})
    assert [len(group.runs) for group in groups] == [2]


def test_flags_with_effect_part_runs(tmp_path):
    assert len(groups_of(tmp_path / "a", {"rate": 0.3}, {"rate": 0.4})) == 2
    assert len(groups_of(tmp_path / "b", {"mlp_prune_ratio": None}, {"mlp_prune_ratio": 0.34, "seed": 1})) == 1
    imp = {"struct": "imp", "vit_structured": False}
    assert len(groups_of(tmp_path / "c", imp, {**imp, "prune_patch_embed": True})) == 2
    assert len(groups_of(tmp_path / "d", {}, {"pretrained_note": "random weights"})) == 2


def test_labels_name_the_method_and_what_differs(tmp_path):
    groups = groups_of(
        tmp_path,
        {"criteria": "l1"},
        {"criteria": "magnitude"},
        {"criteria": "l1", "struct": "refill"},
        {"criteria": "l1", "block_loss_grad": True},
        {"struct": "imp", "vit_structured": False},
        {"struct": "dense"},
        {"criteria": "l1", "struct": "oneshot"},
    )
    labels = [group.label for group in groups]
    assert len(set(labels)) == 7
    assert labels[0].startswith("RSST (")
    assert "l1" in labels[0]
    assert "magnitude" in labels[1]
    assert labels[2] == "Refill (l1, heads+neurons)"
    assert "block_loss_grad" in labels[3]
    assert labels[4:] == ["IMP (weights)", "Dense", "One-shot (l1, heads+neurons)"]


def test_learning_rates_make_groups(tmp_path):
    groups = groups_of(tmp_path, {"lr": 0.1}, {"lr": 0.01}, {"lr": 0.1, "seed": 7})
    assert [(group.label, len(group.runs)) for group in groups] == [("RSST (lr 0.1)", 2), ("RSST (lr 0.01)", 1)]


def points(*densities):
    return [report.Point(i, 1, d, {}, (0.5, math.nan), (0.5, math.nan)) for i, d in enumerate(densities)]


class Reached:
    """A group for matching: its label and the densities of its states."""

    def __init__(self, label, *densities):
        self.label, self.points = label, points(*densities)


def levels(*groups):
    found = report.equal_density(groups)
    return [[(group.label, point.state) for group, point in members] for members in found]


def test_equal_density_is_within_one_point():
    assert levels(Reached("a", 1.0, 0.50), Reached("b", 1.0, 0.49)) == [[("a", 0), ("b", 0)], [("a", 1), ("b", 1)]]
    assert levels(Reached("a", 0.50), Reached("b", 0.489)) == []


def test_a_level_holds_a_group_once_and_takes_the_closest():
    # b's states 0 and 1 are both within a point of a's; 0.503 is closer, 0.509 stays with its own neighbour
    found = levels(Reached("a", 0.50), Reached("b", 0.509, 0.503))
    assert [("a", 0), ("b", 1)] in found
    assert all(len({label for label, _ in members}) == len(members) for members in found)


def test_low_densities_of_one_schedule_match_state_by_state():
    schedule = [0.8**state for state in range(20)]
    assert levels(Reached("a", *schedule), Reached("b", *schedule), Reached("c", *schedule)) == [
        [("a", state), ("b", state), ("c", state)] for state in range(20)
    ]


def test_no_pair_within_a_point_is_lost():
    found = levels(Reached("a", 0.500), Reached("b", 0.492), Reached("c", 0.485))
    assert found == [[("a", 0), ("b", 0)], [("b", 0), ("c", 0)]]


# ---------------------------------------------------------------------------------------------------- comparison


def test_comparison_by_hand(tmp_path, no_drawing, capsys):
    runs = tmp_path / "runs"
    make_run(runs / "r1", test=(0.50, 0.60, 0.40), val=(0.5, 0.7, 0.6))
    make_run(runs / "r2", test=(0.54, 0.62, 0.44), val=(0.5, 0.7, 0.6), seed=1)
    make_run(runs / "f1", test=(0.52, 0.58, 0.41), densities=(1.0, 0.695, 0.2), struct="refill")
    make_run(runs / "d1", test=(0.66,), densities=(1.0,), struct="dense")
    assert report.main([str(runs / name) for name in ("r1", "r2", "f1", "d1")]) == 0
    assert str(runs / "compare") in capsys.readouterr().out
    rows = list(csv.DictReader(io.StringIO((runs / "compare" / "compare.csv").read_text())))
    assert len(rows) == 3 + 3 + 1
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
    assert (equal[3]["test"], equal[3]["test sd"], equal[3]["n"]) == ("61.00%", "1.41", "2")
    assert (equal[4]["test"], equal[4]["test sd"], equal[4]["n"]) == ("58.00%", "-", "1")
    assert equal[5]["test"] == "66.00%"
    assert "no ranking of methods follows" in text
    page = Page((runs / "compare" / "compare.html").read_text())
    assert [attrs["src"][:22] for tag, attrs in page.tags if tag == "img"] == ["data:image/png;base64,"]
    assert page.boxed == [True] * 3


def test_comparison_plot_reads_without_colour(tmp_path, figures):
    make_run(tmp_path / "r1", test=(0.50, 0.60, 0.40))
    make_run(tmp_path / "r2", test=(0.54, 0.62, 0.44), seed=1)
    make_run(tmp_path / "f1", struct="refill")
    make_run(tmp_path / "d1", densities=(1.0,), test=(0.66,), struct="dense")
    report.compare([tmp_path / name for name in ("r1", "r2", "f1", "d1")])
    ax = figures[0].subfigs[0].axes[0]
    assert ax.xaxis_inverted()
    bars = ax.containers[0]
    assert bars.lines[0].get_ydata() == pytest.approx([52, 61, 42])
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    root = math.sqrt(2)
    assert ends[0] == pytest.approx([52 - 2 * root, 52 + 2 * root])
    curves = [container.lines[0] for container in ax.containers]
    assert len({curve.get_linestyle() for curve in curves}) == len({curve.get_marker() for curve in curves}) == 2
    reference = next(line for line in ax.lines if line.get_label() == "Dense, n = 1")
    assert reference.get_ydata() == pytest.approx([66, 66])
    assert "density" in ax.get_xlabel()
    assert "accuracy" in ax.get_ylabel()


def test_nothing_in_common_is_said(tmp_path, no_drawing):
    make_run(tmp_path / "a", densities=(1.0, 0.7, 0.4))
    make_run(tmp_path / "b", densities=(1.0, 0.6, 0.3), struct="refill")
    out = report.compare([tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    text = (out / "compare.md").read_text()
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
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## Data set: digits", "## Data set: cifar10", "## Data set: folder /one", "## Data set: folder /two"
    ]  # fmt: skip
    assert "| density level |" not in text
    titles = [figure.axes[0].get_title() for figure in figures[0].subfigs]
    assert titles == ["digits", "cifar10", "folder /one", "folder /two"]
    assert {row["dataset"] for row in csv.DictReader(io.StringIO((out / "compare.csv").read_text()))} == set(titles)


def test_unfinished_and_repeated_runs_are_named_and_left_out(tmp_path, no_drawing, capsys):
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
    row = next(csv.DictReader(io.StringIO((tmp_path / "out" / "compare.csv").read_text())))
    assert row["n"] == "2"
    assert float(row["test_mean"]) == pytest.approx(0.6)


def test_no_finished_run_writes_nothing(tmp_path, capsys):
    folders = [str(make_run(tmp_path / name, done=1)) for name in "ab"]
    assert report.main([*folders, "--out", str(tmp_path / "out")]) == 2
    assert "no finished run" in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_failing_comparison_leaves_nothing(tmp_path, no_drawing, monkeypatch):
    folders = [make_run(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(utils.os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        report.compare(folders, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_out_that_is_a_file(tmp_path, capsys, no_drawing):
    folders = [str(make_run(tmp_path / name, seed=seed)) for seed, name in enumerate("ab")]
    (tmp_path / "out").write_text("mine")
    assert report.main([*folders, "--out", str(tmp_path / "out")]) == 2
    assert "--out" in one_line(capsys)
    assert (tmp_path / "out").read_text() == "mine"


def test_labels_and_names_in_a_comparison_are_literal(tmp_path, no_drawing):
    make_run(tmp_path / "<b>one", criteria="a|<u>b</u>", pretrained_note="<s>note</s>")
    make_run(tmp_path / "two", criteria="l1")
    out = report.compare([tmp_path / "<b>one", tmp_path / "two"])
    page = Page((out / "compare.html").read_text())
    assert not {tag for tag, _ in page.tags} & {"b", "u", "s"}
    assert "RSST (a|<u>b</u>" in page.text
    assert "<s>note</s>" in page.text


def test_comparison_lies_beside_the_runs_wherever_it_is_started(tmp_path, no_drawing, monkeypatch):
    make_run(tmp_path / "results" / "a")
    make_run(tmp_path / "results" / "b", seed=1)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    out = report.compare(["../results/a", tmp_path / "results" / "b"])
    assert out == (tmp_path / "results" / "compare").resolve()
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.html", "compare.md", "compare.png"]
