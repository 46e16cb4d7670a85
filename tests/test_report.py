"""Laws of reports and comparisons: what they say is what the files of a run hold, worked out by hand here."""

import base64
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
from micro import rows_of

import main_imp_fillback as entry
import report
import rsst
from reporting import run_report
from reporting.compare_paired import paired_comparisons, paired_text
from utils import RunError

PNG = b"\x89PNG\r\n\x1a\n"
FLAGS = {
    "seed": 42, "dataset": "digits", "data": "data", "arch": "vit_tiny", "struct": "rsst", "epochs": 4,
    "pruning_times": 3, "rate": 0.34, "mlp_prune_ratio": 0.5, "criteria": "magnitude", "vit_structured": True,
    "vit_prune_target": "both", "prune_type": "lt", "opt": "adamw", "lr": 0.0005, "sched": "cosine",
    "batch_size": 32, "aug": "none", "reg_finish": 0.25, "RST_schedule": "x", "ratio_schedule": "geometric",
    "refill": True, "export": True, "compact_training": True, "sorting_mode": "layer-wise", "device": "auto",
}  # fmt: skip
ENVIRONMENT = {"python": "3.11.7", "platform": "Linux", "versions": {"torch": "2.15.0"}, "device": "cpu",
               "device_name": "EPYC", "threads": 2, "commit": "0123456789abcdef", "precision": "bf16"}  # fmt: skip
PARITY = {"images": 1440, "max_difference_float32": 9.5e-7, "max_difference_float64": 2e-15, "largest_logit": 3.9,
          "bound": 3.9e-5, "top1_agreement": 1.0}  # fmt: skip
CONFIG = {"parameters": {"dense": 2_000_000, "removed": 800_000}, "macs": {"dense": 40_000_000, "removed": 10_000_000}}
IMP = {"struct": "imp", "vit_structured": False}
WEIGHTS = {"vit_structured": False}
CNN = {"arch": "res20s", "vit_structured": False}


def write_csv(path, rows):
    path.write_text("".join(",".join(map(str, row)) + "\n" for row in [rows[0], *(each.values() for each in rows)]))


def make_run(folder, densities=(1.0, 0.7, 0.4), done=None, model=True, val=None, test=None, top5=None, **flags):
    """A run's folder as training leaves it; `done` states of it are finished, all when None."""
    args = {"save_dir": str(folder), **FLAGS, **flags}
    epochs = args["epochs"] * (args["pruning_times"] if args["struct"] == "dense" else 1)
    filters = args["arch"].startswith("res")
    layers = [("head", "attn", 4), ("neuron", "mlp", 8)]
    layers = [(kind, f"blocks.{block}.{name}", total) for kind, name, total in layers for block in range(2)]
    history, states, units = [], [], []
    for state, density in enumerate(densities[:done]):
        cut = args["reg_finish"] * epochs if args["struct"] == "rsst" and state else 0
        counts = {name: round(100 * density) for name in (["filters"] if filters else ["heads", "neurons"])}
        counts |= {"parameters": round(2_000_000 * density), "macs": round(40_000_000 * density)}
        for epoch in range(epochs):
            row = {"state": state, "epoch": epoch, "train_accuracy": 0.5, "val_accuracy": 0.4 + 0.1 * epoch / epochs}
            row |= {"val_top5": 0.9 + 0.01 * epoch} if top5 else {}
            row |= {"density": densities[state - 1] if epoch + 1 < cut else density, **counts, "seconds": 10.0}
            history.append(row | {"lambda": float(epoch + 1 <= cut), "residual": 0.5 * (epoch + 1 < cut)})
        row = {"state": state, "density": density, **counts, "accuracy_before_cut": 0.5 if state else ""}
        row |= {"accuracy_after_cut": 0.5 - 0.01 * state if state else "", "residual": 1e-4 if cut else ""}
        row |= {"accuracy_trained": 0.475, "best_epoch": 3, "best_accuracy": val[state] if val else 0.6}
        row |= {"test_accuracy": test[state] if test else 0.55, "seconds": 40.5}
        states.append(row | ({"test_top5": top5[state]} if top5 else {}))
        for kind, layer, total in [("filter", "layer1.0.conv1", 16)] if filters else layers:
            cells = {"layer": layer, "kind": kind, "kept": round(total * density), "total": total}
            units.append({"state": state, **cells})
    (folder / "model").mkdir(parents=True)
    (folder / "args.yaml").write_text(yaml.safe_dump(args, sort_keys=False))
    (folder / "environment.json").write_text(json.dumps(ENVIRONMENT))
    if history:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in history))
        write_csv(folder / "states.csv", states)
        write_csv(folder / "units.csv", units)
    if model:
        (folder / "model" / "config.json").write_text(json.dumps(CONFIG))
        (folder / "model" / "parity.json").write_text(json.dumps(PARITY))
    return folder


def change_states(folder, *changes):
    """Cells of states.csv, a dictionary a row; rows without one go."""
    rows = rows_of(folder / "states.csv")
    write_csv(folder / "states.csv", [row | cells for row, cells in zip(rows, changes, strict=False)])


def written(folder):
    report.write(folder)
    return (folder / "report.md").read_text()


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.source, self.tags, self.text = path.read_text(), [], ""
        self.feed(self.source)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data

    def boxed_tables(self):
        """How many tables it has, each in a box that scrolls by itself."""
        boxed = self.source.count('<div class="table" tabindex="0">\n<table>')
        assert boxed == self.source.count("<table>") == self.source.count("</table>\n</div>")
        return boxed


def table_rows(text, header):
    """Rows of the Markdown table whose first header cell is `header`."""
    lines = text[text.index(f"| {header} |") :].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def one_line(capsys):
    """What went to standard error, which must be one line."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    return lines[0]


@pytest.fixture
def figures(monkeypatch):
    """The figures that a test draws, in order; none is rendered."""
    found = []

    def keep(figure, file, **_):
        found.append(figure)
        file.write(PNG + b"%d" % len(found))

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", keep)
    return found


def curves(ax):
    """(x, y) of what is drawn, without borders and cuts."""
    found = [(list(line.get_xdata()), list(line.get_ydata())) for line in ax.lines]
    return [(x, y) for x, y in found if len(set(x)) > 1]


def cuts(ax):
    return [line.get_xdata()[0] for line in ax.lines if line.get_linestyle() == ":"]


def labelled(ax, label):
    """Places and values of the line of that label."""
    line = next(line for line in ax.lines if str(line.get_label()).startswith(label))
    return list(line.get_xdata()), pytest.approx(list(line.get_ydata()))


# ---------------------------------------------------------------------------------------------------- report of one run


def test_report_says_what_the_files_hold(tmp_path, figures, monkeypatch):
    folder = make_run(tmp_path / "rsst_run")
    text = written(folder)
    monkeypatch.chdir(folder)
    assert report.main(["."]) == 0
    assert (folder / "report.md").read_text() == text  # the current folder changes nothing
    assert text.startswith("# rsst_run\n")
    assert table_rows(text, "state")[2] == {
        "state": "2", "density": "40.00%", "heads": "40", "neurons": "40", "parameters": "800,000",
        "MACs": "0.0160 G", "before cut": "50.00%", "after cut": "48.00%", "trained": "47.50%",
        "selected": "60.00%", "test": "55.00%", "time": "40 s",
    }  # fmt: skip
    assert table_rows(text, "state")[0]["before cut"] == "-"
    assert {row["measure"]: list(row.values())[1:] for row in table_rows(text, "measure")} == {
        "test accuracy": ["55.00%", "55.00%", "+0.00 points"], "density": ["100.00%", "40.00%", "2.50x less"],
        "validation accuracy": ["60.00%", "60.00%", "+0.00 points"], "heads": ["100", "40", "2.50x fewer"],
        "neurons": ["100", "40", "2.50x fewer"], "parameters": ["2,000,000", "800,000", "2.50x fewer"],
        "MACs per image": ["0.0400 G", "0.0160 G", "2.50x fewer"],
    }  # fmt: skip
    for words in (
        "3 states of 4 epochs each, from scratch, seed 42", "on vit_tiny and digits", "34.00% of all heads",
        "50.00% of all neurons", "layer-wise by criterion magnitude", "on a geometric schedule",
        "Every state starts from the initial weights", "Training: AdamW, learning rate 0.0005, cosine schedule",
        "augmentation none, bf16", "cpu EPYC (2 threads), Linux; Python 3.11.7, torch 2.15.0", "commit 0123456789.",
        "Training took 2 min 02 s", "at worst (state 2: 50.00% before, 48.00% after, residual 0.0001)",
        "The 2 cuts changed accuracy by -2.00 points", "2e-15 in float64 (allowed: 3.9e-05) and 9.5e-07 in float32",
        "100.00% of 1,440 validation images", "800,000 of 2,000,000 parameters (2.50x fewer)",
        "0.0100 G of 0.0400 G MACs per image (4.00x fewer)", f"python export.py {folder} --onnx",
    ):  # fmt: skip
        assert words in text, words
    assert "not finished" not in text
    assert "op-5" not in text
    for name in ("accuracy", "density", "penalty", "units"):
        assert f"](plots/{name}.png)" in text
        assert (folder / "plots" / f"{name}.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"dataset": "folder", "data": "my/solar_cells"}, "on vit_tiny and the image folder my/solar_cells: "),
        ({"pretrained": "dino.pth"}, "from the pretrained weights of dino.pth, seed"),
        ({"pretrained": True, "pretrained_tag": "dino"}, "from timm's pretrained weights, tag dino, seed"),
        ({"pretrained": True}, "from timm's pretrained weights, seed"),
        ({"pretrained": True, "pretrained_note": "no network"}, "from scratch, seed"),
        ({"pretrained": True, "init": "old/best.pt"}, "from the weights of old/best.pt, seed"),
    ],
)
def test_a_report_names_the_data_and_the_first_weights(flags, words, tmp_path):
    assert words in run_report.describe(report.load_run(make_run(tmp_path / "run", **flags)))


def test_numbers_are_rounded_and_absent_ones_are_dashes(tmp_path, figures):
    folder = make_run(tmp_path / "run", model=False, top5=(0.9, 0.85, 0.8125))
    (folder / "units.csv").unlink()
    text = (folder / "metrics.jsonl").read_text().replace('"val_accuracy": 0.4,', '"val_accuracy": NaN,')
    (folder / "metrics.jsonl").write_text(text)
    odd = {"density": 0.123456, "macs": 46_269_696, "parameters": 1234.6, "seconds": 3599.7}
    missing = {"test_accuracy": "nan", "macs": "", "accuracy_before_cut": "", "density": "", "parameters": ""}
    change_states(folder, odd, missing | {"seconds": 61}, {"seconds": "", "accuracy_after_cut": 0.51})
    text = written(folder)
    first, second, third = table_rows(text, "state")
    assert (first["density"], first["MACs"], first["parameters"]) == ("12.35%", "0.0463 G", "1,235")
    assert {second[name] for name in ("test", "MACs", "before cut", "density", "parameters")} == {"-"}
    assert (first["time"], second["time"], third["time"]) == ("1 h 00 min", "1 min 01 s", "-")
    assert [row["top-5"] for row in (first, second, third)] == ["90.00%", "85.00%", "81.25%"]
    key = {row["measure"]: list(row.values())[1:] for row in table_rows(text, "measure")}
    assert key["test top-5"] == ["90.00%", "81.25%", "-8.75 points"]
    assert key["validation top-5"] == ["93.00%", "93.00%", "+0.00 points"]  # of epoch 3, the selected one
    assert "Training took 1 h 01 min" in text
    assert "The cut lost no accuracy (state 2" in text
    assert "Proof" not in text
    assert "units.png" not in text


def test_web_page_needs_nothing_but_itself(tmp_path):
    folder = make_run(tmp_path / "run")
    report.write(folder)
    page = Page(folder / "report.html")
    expected = [(folder / "plots" / f"{name}.png").read_bytes() for name in ("accuracy", "density", "penalty", "units")]
    head = "data:image/png;base64,"
    pictures = [attrs["src"].removeprefix(head) for tag, attrs in page.tags if tag == "img"]
    assert [base64.b64decode(source, validate=True) for source in pictures] == expected
    for png in expected:
        assert png.startswith(PNG)
        assert png.endswith(b"IEND\xaeB`\x82")
        assert all(200 <= pixels <= 4000 for pixels in struct.unpack(">II", png[16:24]))
    assert not [tag for tag, _ in page.tags if tag in ("link", "script", "iframe", "object")]
    references = [attrs[key] for _, attrs in page.tags for key in ("href", "src") if key in attrs]
    assert all(reference.startswith((head, "#")) for reference in references)
    assert not [words for words in ("url(", "@import") if words in page.source]
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.tags
    assert "prefers-color-scheme: dark" in page.source
    assert page.boxed_tables() == 2


def test_unfinished_run_says_so_and_how_to_go_on(tmp_path, figures, capsys):
    folder = make_run(tmp_path / "run", done=2, model=False)
    assert "so far (state 1)" in written(folder)
    change_states(folder, {})
    text = written(folder)
    assert "**This run is not finished:** 1 of 3 states done, 8 epochs trained." in text
    assert "Training took 1 min 20 s so far" in text  # 40.5 s of state 0, four epochs of 10 s
    assert f"python main_imp_fillback.py --save_dir {folder} --resume" in text
    assert "export.py" not in text
    begun = make_run(tmp_path / "begun", done=0, model=False)
    assert report.main([str(begun)]) == 0
    text = (begun / "report.md").read_text()
    assert "0 of 3 states done" in text
    assert "No epoch has been trained yet." in text
    assert not (begun / "plots").exists()
    assert str(begun / "report.md") in capsys.readouterr().out


@pytest.mark.parametrize("flags", [{"pruning_times": 1}, {"struct": "dense"}])
def test_dense_run_has_one_state_and_no_penalty(tmp_path, figures, flags):
    folder = make_run(tmp_path / "run", densities=(1.0,), top5=(0.9,), **flags)
    (folder / "plots").mkdir()
    (folder / "plots" / "penalty.png").write_bytes(b"of an earlier run")
    text = written(folder)
    assert f"1 state of {4 if 'pruning_times' in flags else 12} epochs, from scratch" in text
    assert "not finished" not in text
    assert "validation 60.00% (top-5 93.00%), test 55.00% (top-5 90.00%), 2,000,000 parameters, 0.0400 G MACs" in text
    assert not (folder / "plots" / "penalty.png").exists()


def test_a_finish_is_called_so_and_stands_apart_from_the_states(tmp_path, figures):
    flags, densities = {"finish_epochs": 4, "finish_lr": 0.001}, (1.0, 0.7, 0.4, 0.4)
    tested = {"test": [0.5, 0.5, 0.5, 0.58], "val": [0.6, 0.6, 0.6, 0.63]}
    text = written(make_run(tmp_path / "held out", densities, **flags, **tested))
    assert "3 states of 4 epochs each" in text
    assert "A finish of 4 epochs behind the last state" in text
    assert "at learning rate 0.001; its best epoch on validation is the final model." in text
    assert [row["state"] for row in table_rows(text, "state")] == ["0", "1", "2", "finish"]
    assert table_rows(text, "measure")[0]["final (finish)"] == "58.00%"
    accuracy, density, *_ = figures
    assert accuracy.axes[0].child_axes[0].get_xticklabels()[-1].get_text() == "finish\n40%"
    assert curves(density.axes[0]) == [([100, 70, 40], [60, 60, 60]), ([100, 70, 40], [50, 50, 50])]
    assert labelled(density.axes[0], "test, after the finish") == ([40], [58])
    unfinished = written(make_run(tmp_path / "unfinished", densities, done=3, **flags))
    assert "3 of 3 states done, the finish not, 12 epochs trained" in unfinished

    folder = make_run(tmp_path / "on all", densities, finish_on_all=True, ema_decay=0.9, **flags, **tested)
    change_states(folder, {}, {}, {}, {"accuracy_trained": "", "best_accuracy": ""})
    text = written(folder)
    assert "nothing is left to select by, the final model is what its last step leaves, averaged." in text
    row = table_rows(text, "state")[-1]
    assert (row["trained"], row["selected"], row["test"]) == ("-", "-", "58.00%")
    assert table_rows(text, "measure")[1]["final (finish)"] == "-"
    out = report.compare([tmp_path / "held out", folder], tmp_path / "compare")
    states = [row["state"] for row in rows_of(out / "compare.csv")]
    assert states == ["0", "1", "2", "finish"] * 2
    assert "A finish on all images has no validation accuracy" in (out / "compare.md").read_text()


def test_names_are_shown_literally(tmp_path, figures):
    name = "<b>a|b*c*_d_[x](y)`z` &amp; $t$"
    folder = make_run(tmp_path / name, pretrained_note="<script>alert(1)</script> | *random* weights", criteria="<i>")
    (folder / "model" / "latency.txt").write_text("```\n<b>fast</b>\n")
    assert written(folder).split("\n\n")[1].startswith("> **Note:** ")
    make_run(tmp_path / "other", criteria="l1")
    for page in (folder / "report.html", report.compare([folder, tmp_path / "other"]) / "compare.html"):
        shown = Page(page)
        assert not {tag for tag, _ in shown.tags} & {"b", "i", "em", "script", "a"}
        words = [name, "<script>alert(1)</script> | *random* weights", "<i>"]
        assert [word for word in words if word not in shown.text] == []
    assert Page(folder / "report.html").text.count(name) >= 3  # title, heading, commands
    assert "<b>fast</b>" in Page(folder / "report.html").text


@pytest.mark.parametrize(
    ("flags", "single", "words"),
    [
        ({}, False, "are gone in the end"),
        (WEIGHTS, True, "Each of 2 prunings takes 34.00% of the prunable weights that are left. "),
        (WEIGHTS | {"fillback_rate": 0.1}, True, "gives back 10.00%, chosen by criterion magnitude. "),
        (CNN, False, "of the prunable weights that are left, chosen by criterion magnitude. "),
        (CNN | {"struct": "imp"}, True, "of the prunable weights that are left. "),
    ],
)  # fmt: skip
def test_what_goes_is_said(tmp_path, figures, flags, single, words):
    text = written(make_run(tmp_path / "run", **flags))
    assert words in text
    assert ("single zeros do not make the model faster" in text) == single
    assert ("| filters |" in text, "| heads |" in text) == (("arch" in flags), "arch" not in flags)


@pytest.mark.parametrize(
    "words",
    [
        "--dataset digits --struct rsst --vit_structured --vit_prune_target both --rate 0.34 --no-refill --seed 0",
        "--struct refill --fillback_rate 0.1 --criteria saliency --opt adamw --sched cosine --fc --train_limit 500",
        "--struct imp --prune_type rewind_lt --rewind_epoch 3 --epochs 10 --decreasing_lr 2,7 --pretrained",
        "--struct oneshot --vit_structured --vit_prune_target mlp --no-compact_training --no-export --exp_name=-x",
        "--struct dense --epochs 1 --label_smoothing 0.1 --clip_grad 1 --data /a/b",
        "--reg_form gradient --reg_clock state --RST_schedule x --block_loss_grad --exp_name 'a b' --no-flip",
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
    assert {word for word in shlex.split(words) if word.startswith("--")} <= set(again)
    repeated = vars(entry.parse_args(again))
    assert {name for name in given if repeated[name] != given[name]} <= report.flags_without_effect(run)


# -------------------------------------------------------------------------------------------------------------- plots


def test_pictures_show_the_files(tmp_path, figures):
    report.write(make_run(tmp_path / "run", (1.0, 0.5, 0.25), struct="refill", test=(0.5, 0.6, 0.55)))
    accuracy, density, heads, neurons = [figures[0].axes[0], figures[1].axes[0], *figures[2].axes[:2]]
    shown = [line for line in curves(accuracy) if line[1][0] == pytest.approx(40)]  # validation, a line a state
    assert [x for x, _ in shown] == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]]
    assert labelled(accuracy, "validation") == ([1, 2, 3, 4], [40, 42.5, 45, 47.5])
    assert labelled(accuracy, "train") == ([1, 2, 3, 4], [50] * 4)
    labels = [text.get_text() for axis in accuracy.child_axes for text in axis.get_xticklabels()]
    assert labels == ["state 0\n100%", "state 1\n50%", "state 2\n25%"]
    assert cuts(accuracy) == [4, 8]
    assert labelled(accuracy, "before the cut") == ([4, 8], [50, 50])
    assert labelled(accuracy, "after the cut") == ([4, 8], [49, 48])
    assert density.xaxis_inverted()
    assert labelled(density, "validation") == ([100, 50, 25], [60, 60, 60])
    assert labelled(density, "test") == ([100, 50, 25], [50, 60, 55])
    assert (heads.get_title(), neurons.get_title()) == ("heads kept", "neurons kept")
    assert heads.images[0].get_array().tolist() == [[1.0, 0.5, 0.25]] * 2
    assert [text.get_text() for text in neurons.texts] == ["100", "50", "25"] * 2
    assert [label.get_text() for label in heads.get_yticklabels()] == ["0", "1"]


@pytest.mark.parametrize("finish", [0.05, 0.25, 0.5])
@pytest.mark.parametrize("epochs", [1, 2, 3, 4, 5, 6, 8, 10, 13, 60])
def test_cut_is_drawn_where_training_cuts(tmp_path, epochs, finish):
    steps = 40
    expected = rsst.cut_step(steps * epochs, steps, finish) / steps
    folder = make_run(tmp_path / "run", densities=(1.0, 0.7), epochs=epochs, pruning_times=2, reg_finish=finish)
    run = report.load_run(folder)
    for epoch, row in enumerate(run.history[epochs:]):
        row["density"] = 0.7 if epoch + 1 >= expected else 1.0
    assert report.cut_epochs(run) == {1: pytest.approx(epochs + expected)}


def penalty_rows(state, cut, until=50):
    """What a state's ramp leaves in penalty.csv: linear lambda, residual falling to 1e-3 at the cut, in epochs."""
    steps = [(step, step / 50) for step in range(1, until + 1)]
    return [{"state": state, "epoch": cut * u, "step": k, "lambda": u, "residual": 1e-3**u} for k, u in steps]


def penalty_plot(folder, figures, *rows):
    if rows:
        write_csv(folder / "penalty.csv", [row for each in rows for row in each])
    report.write(folder)
    return next(figure.axes for figure in reversed(figures) if "lambda" in figure.axes[0].get_ylabel())


def test_penalty_is_drawn_from_its_steps_or_from_epochs(tmp_path, figures):
    folder = make_run(tmp_path / "run", epochs=2)
    strength, residual = penalty_plot(folder, figures, penalty_rows(1, 0.5), penalty_rows(2, 0.5))
    ramp = [step / 50 for step in range(51)]
    for before, strengths, left in zip((2, 4), curves(strength), curves(residual), strict=True):
        assert strengths[0] == left[0] == pytest.approx([before + 0.5 * u for u in ramp])
        assert strengths[1] == pytest.approx(ramp)
        assert left[1] == pytest.approx([1e-3**u for u in ramp])
    assert cuts(strength) == cuts(residual) == [2.5, 4.5]
    assert strength.get_xlim() == (0, 6)
    # while a state is in its first epoch, its rows are ahead of metrics.jsonl
    folder = make_run(tmp_path / "half", epochs=2, done=2)
    strength, residual = penalty_plot(folder, figures, penalty_rows(1, 0.5), penalty_rows(2, 0.5, until=30))
    assert curves(residual)[1][0][-1] == pytest.approx(4.3)
    assert strength.get_xlim() == (0, pytest.approx(4.3))
    # an older run has its epochs only, and what states.csv says at the cut
    folder = make_run(tmp_path / "older", epochs=8)
    strength, residual = penalty_plot(folder, figures)
    assert residual.get_yscale() == "log"
    assert [x for x, _ in curves(residual)] == [[8, 9, 10], [16, 17, 18]]
    assert curves(residual)[0][1] == pytest.approx([1.0, 0.5, 1e-4])
    assert [y for _, y in curves(strength)] == [[0, 1, 1], [0, 1, 1]]
    resumed = penalty_plot(folder, figures, penalty_rows(2, 2.0))  # by a program that writes the file
    assert [len(x) for x, _ in curves(resumed[1])] == [3, 51]


def test_many_states_and_layers_stay_readable(tmp_path, figures):
    layers = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    densities = [0.8**state for state in range(20)]
    folder = make_run(tmp_path / ("long_" * 30), densities, pruning_times=20, vit_structured=False)
    cells = [(state, f"blocks.{block}.{layer}") for state in range(20) for block in range(8) for layer in layers]
    rows = [{"state": s, "layer": layer, "kind": "weight", "kept": 0.8**s, "total": 1} for s, layer in cells]
    write_csv(folder / "units.csv", rows)
    report.write(folder)
    accuracy, density, _, units = figures
    assert all(figure.get_size_inches().max() <= 20 for figure in figures)
    assert len(accuracy.axes[0].child_axes[0].get_xticks()) == 10
    assert density.axes[0].get_xscale() == "log"
    assert [panel.get_title() for panel in units.axes[:4]] == [f"{layer}: weights kept" for layer in layers]
    assert all(panel.images[0].get_array().shape == (8, 20) for panel in units.axes[:4])


# ----------------------------------------------------------------------------------------------- damage, and atomicity


DAMAGE = [
    ("args.yaml", "a: [1"), ("args.yaml", "just words"), ("args.yaml", "struct: rsst\n"),
    ("args.yaml", yaml.safe_dump({**FLAGS, "epochs": "four"})),
    ("args.yaml", yaml.safe_dump({**FLAGS, "rate": "much"})),
    ("metrics.jsonl", '{"state": 0, "epoch": 0, "val_acc'), ("metrics.jsonl", "[1, 2]\n"),
    ("metrics.jsonl", '{"state": 0}\n'), ("states.csv", "state,density\n0,1.0\n1\n"),
    ("states.csv", "state,density\n0,1.0,3\n"), ("states.csv", "state,density\n0,dense\n"),
    ("states.csv", "state,density\n,1.0\n"), ("states.csv", "\udcff\udcfe\0"),
    ("units.csv", "state,layer,kept,total\n0,blocks.0.attn,1,2\n"),
    ("penalty.csv", "state,step,lambda,residual\n1,1,0.1,1.0\n"),
    ("penalty.csv", "state,epoch,step,lambda,residual\n1,,1,0.1,1.0\n"),
    ("environment.json", "{"), ("model/parity.json", "[]"), ("model/config.json", '{"parameters": '),
    ("model/onnx.csv", "model,megabytes\nremoved,1.5\n"),
    ("model/onnx.csv", "model,megabytes,test_accuracy\nremoved,x,1\n"),
]  # fmt: skip
REFUSED = [
    ("nothing", "nothing: not the folder of a run (no args.yaml in it)"),
    ("a nothing", "no args.yaml"),
    ("a --out x", "--out x: belongs to a comparison"),
    ("a half --out a/args.yaml", "--out a/args.yaml: is a file"),
    ("half ./half/../half half/. --out x", "no finished run to compare: half: not finished (1 of 3 states)"),
]


@pytest.mark.parametrize(
    ("words", "said", "damaged"),
    [(words, said, {}) for words, said in REFUSED]
    + [("a", f"a/{name} is damaged (", {name: content}) for name, content in DAMAGE],
)
def test_refusals_are_one_line_and_write_nothing(tmp_path, capsys, figures, monkeypatch, words, said, damaged):
    monkeypatch.chdir(tmp_path)
    folder = make_run(Path("a"))
    make_run(Path("half"), done=1)
    for name, content in damaged.items():
        (folder / name).write_bytes(os.fsencode(content))
    before = sorted(tmp_path.rglob("*"))
    try:
        code = report.main(words.split())
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    line = one_line(capsys)
    assert said in line
    assert ("restore the file, or run again" in line) == bool(damaged)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("package", ["matplotlib", "markdown"])
def test_missing_package_says_what_to_install(tmp_path, capsys, monkeypatch, package):
    folder = make_run(tmp_path / "run")
    for name in {package, *(name for name in sys.modules if name.partition(".")[0] == package)}:
        monkeypatch.setitem(sys.modules, name, None)
    assert report.main([str(folder)]) == 2
    assert "pip install matplotlib markdown" in one_line(capsys)
    assert not (folder / "report.md").exists()


def test_failing_write_leaves_what_was_there(tmp_path, monkeypatch, figures, capsys):
    failing = 5  # four plots, report.md, report.html: the last one
    folder = make_run(tmp_path / "run")
    report.write(folder)
    change_states(folder, {"test_accuracy": 0.56}, {}, {})
    old = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done, fsync = [], os.fsync

    def break_off(descriptor):
        if len(done) == failing:
            raise OSError(28, "No space left on device")
        done.append(fsync(descriptor))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", break_off)
        with pytest.raises(RunError, match="No space left") as stop:
            report.write(folder)
        done[:] = [None] * failing  # at its first file
        with pytest.raises(RunError, match="No space left"):
            report.compare([folder], tmp_path / "out")
    assert stop.value.code == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == old
    assert not (tmp_path / "out").exists()
    assert "56.00%" in written(folder)
    assert not [path for path in folder.rglob("*") if path.name.startswith(".")]
    (folder / "plots").rename(folder / "old")
    (folder / "plots").write_text("in the way")
    assert report.main([str(folder)]) == 1
    assert f"{folder}: cannot be written (File exists)" in one_line(capsys)


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


HEADS, REWIND = {"vit_prune_target": "head"}, {"prune_type": "rewind_lt"}
CIRCUMSTANCES = [
    {"exp_name": "again", "device": "cuda", "gpu": 3, "workers": 0, "print_freq": 1, "verbose": True, "seed": 1},
    {"resume": True, "checkpoint": "x", "overwrite": True, "wandb_mode": "offline", "config": "y", "data": "/z"},
    {"export": False, "label_smoothing": 0.0, "clip_grad": None, "checkpoint_every": 5},
]


@pytest.mark.parametrize(
    ("sizes", "flags"),
    [
        ([4], [{}, *CIRCUMSTANCES]), ([1, 1], [{"rate": 0.3}, {"rate": 0.4}]),
        ([2], [HEADS, HEADS | {"mlp_prune_ratio": 0.9}]), ([1, 1], [CNN, CNN | {"criteria": "l2"}]),
        ([2], [IMP, IMP | {"criteria": "l2", "mlp_prune_ratio": 0.9, "reg_finish": 1.0}]),
        ([2], [{"mlp_prune_ratio": None}, {"mlp_prune_ratio": 0.34}]),  # the neurons' ratio is --rate
        ([2], [{"fillback_rate": 0.1, "momentum": 0.5}, {"fillback_rate": 0.2}]),  # structured survivors are whole
        ([2], [{"rewind_epoch": 1}, {"decreasing_lr": "1,2", "exponents": 2, "prune_patch_embed": True}]),
        ([2, 1], [{"lr": 0.1}, {"lr": 0.01}, {"lr": 0.1, "seed": 7}]),
        ([1, 1], [IMP, IMP | {"prune_patch_embed": True}]),
        ([1, 1], [REWIND | {"rewind_epoch": 1}, REWIND | {"rewind_epoch": 2}]),
        ([2], [WEIGHTS, WEIGHTS | {"criteria": "l2"}]), ([1, 1], [{"pretrained_note": "random weights"}, {}]),
        ([2, 1], [{}, {"stem": "patch"}, {"stem": "conv"}]),  # before there was a choice it was the patch
        ([2], [{"struct": "dense", "rate": 0.9}, {"pruning_times": 1, "epochs": 12}]),
            ([2, 1], [{}, {"dense_epochs": 4}, {"dense_epochs": 0}]),
        # a network for each seed; then two seeds that share one
        ([3], [{"seed": seed, "init": f"dense_0.5_s{seed}/m.pth"} for seed in (0, 12, 1)]),
        ([1, 2], [{"seed": seed, "init": f"dense_0.5_s{name}/m.pth"} for seed, name in ((0, 0), (12, 12), (1, 12))]),
        ([1, 1], [{"seed": seed, "teacher": f"t_s{seed}{name}.pth"} for seed, name in ((0, ""), (1, 0))]),
        ([3], [{"seed": seed, "teacher": "t_s0.pth"} for seed in (0, 1, 2)]),  # one for all, with a seed of its own
    ],
)  # fmt: skip
def test_only_flags_with_effect_part_runs(tmp_path, sizes, flags):
    assert [len(group.runs) for group in groups_of(tmp_path, *flags)] == sizes


def test_labels_name_the_method_and_what_differs(tmp_path):
    l1 = {"criteria": "l1"}
    others = [
        l1 | {"struct": "refill", "label_smoothing": 0.0},
        l1 | {"block_loss_grad": True},
        IMP,
        {"struct": "dense"},
    ]
    labels = [group.label for group in groups_of(tmp_path, l1, {}, *others, l1 | {"struct": "oneshot"})]
    assert all(label.startswith("RSST (") for label in (labels[0], labels[1], labels[3]))
    assert ("l1" in labels[0], "magnitude" in labels[1], "block_loss_grad" in labels[3]) == (True, True, True)
    assert labels[2] == "Refill (l1, heads+neurons)"
    assert labels[4:] == ["IMP (weights)", "Dense", "One-shot (l1, heads+neurons)"]
    groups = groups_of(tmp_path / "lr", {"lr": 0.1}, {"lr": 0.01})
    assert [group.label for group in groups] == ["RSST (lr 0.1)", "RSST (lr 0.01)"]
    groups = groups_of(tmp_path / "cnn", CNN | {"struct": "refill"}, CNN | {"struct": "imp"})
    assert [group.label for group in groups] == ["Refill (filters)", "IMP (weights)"]


class Reached:
    """A group for matching: its label and the densities of its states."""

    def __init__(self, label, *densities):
        half = (0.5, math.nan)
        self.label, self.points = label, [report.Point(i, 1, d, {}, half, half) for i, d in enumerate(densities)]


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # within a point of each other, and no further
        ([(1.0, 0.50), (1.0, 0.49)], ["a0 b0", "a1 b1"]),
        ([(0.50,), (0.489,)], []),
        # both of b's states lie within a point of a's: the closer one takes it, the other finds what is near, too
        ([(0.50,), (0.509, 0.503)], ["a0 b0", "a0 b1"]),
        ([(0.50,), (0.509, 0.503), (0.495,)], ["a0 b0", "a0 b1 c0"]),
        # low densities of one schedule match state by state
        ([[0.8**state for state in range(20)]] * 3, [f"a{state} b{state} c{state}" for state in range(20)]),
        # no pair within a point is lost
        ([(0.500,), (0.492,), (0.485,)], ["a0 b0", "b0 c0"]),
    ],
)
def test_equal_density_is_within_one_point(groups, expected):
    found = report.equal_density([Reached(label, *each) for label, each in zip("abc", groups, strict=False)])
    assert [" ".join(f"{group.label}{point.state}" for group, point in members) for members in found] == expected


# ---------------------------------------------------------------------------------------------------- comparison


def test_comparison_by_hand(tmp_path, figures, capsys, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")  # the comparison lies beside the runs wherever it is started
    runs = tmp_path / "runs"
    make_run(runs / "r1", test=(0.50, 0.60, 0.40), val=(0.5, 0.7, 0.6), top5=(0.90, 0.80, 0.70))
    make_run(runs / "r2", test=(0.54, 0.62, 0.44), val=(0.5, 0.7, 0.6), top5=(0.94, 0.82, 0.70), seed=1)
    make_run(runs / "f1", (1.0, 0.695, 0.2), test=(0.52, 0.58, 0.41), struct="refill")
    make_run(runs / "d1", (1.0,), test=(0.64,), struct="dense")
    make_run(runs / "d2", (1.0,), test=(0.68,), struct="dense", seed=1)
    assert report.main(["../runs/r1", *(str(runs / name) for name in ("r2", "f1", "d1", "d2"))]) == 0
    out = (runs / "compare").resolve()
    assert str(out) in capsys.readouterr().out
    files = ["compare.csv", "compare.html", "compare.md", "compare.png", "compare_paired.csv"]
    assert sorted(path.name for path in out.iterdir()) == files
    rows = rows_of(out / "compare.csv")
    assert list(rows[0]) == [
        "dataset", "label", "n", "state", "density", "heads", "neurons", "parameters", "macs",
        "val_mean", "val_sd", "test_mean", "test_sd", "test_top5_mean", "test_top5_sd",
    ]  # fmt: skip
    assert [row["label"] for row in rows] == ["RSST"] * 3 + ["Refill"] * 3 + ["Dense"]
    pair, single = rows[1], rows[4]
    assert (pair["n"], pair["heads"], pair["parameters"], pair["val_sd"]) == ("2", "70.0", "1400000.0", "0.0")
    # deviations of one point, n - 1 = 1
    root = math.sqrt(2)
    for name, mean in (("test", 0.61), ("test_top5", 0.81)):
        assert [float(pair[f"{name}_{which}"]) for which in ("mean", "sd")] == pytest.approx([mean, 0.01 * root])
    assert [single[name] for name in ("n", "test_sd", "test_top5_mean", "test_top5_sd")] == ["1", "", "", ""]

    text = (out / "compare.md").read_text()
    equal = table_rows(text, "density level")
    assert [row["density level"] for row in equal] == ["100.00%", "", "", "69.75%", "", ""]
    assert [row["method"] for row in equal] == ["RSST", "Refill", "Dense"] * 2
    assert [row["test"] for row in equal[3:]] == ["61.00%", "58.00%", "66.00%"]
    assert [row["test sd"] for row in equal[3:]] == ["1.41", "-", "2.83"]
    assert [row["n"] for row in equal[3:]] == ["2", "1", "2"]
    assert [(row["top-5"], row["top-5 sd"]) for row in equal[:2]] == [("92.00%", "2.83"), ("-", "-")]
    assert "no ranking of methods follows" in text
    page = Page(out / "compare.html")
    assert [attrs["src"][:22] for tag, attrs in page.tags if tag == "img"] == ["data:image/png;base64,"]
    assert page.boxed_tables() == 4

    ax = figures[0].subfigs[0].axes[0]
    assert ax.xaxis_inverted()
    bars = ax.containers[0]
    assert bars.lines[0].get_ydata() == pytest.approx([52, 61, 42])
    assert bars.lines[2][0].get_segments()[0][:, 1].tolist() == pytest.approx([52 - 2 * root, 52 + 2 * root])
    drawn = [container.lines[0] for container in ax.containers]  # told apart without colours
    assert len({curve.get_linestyle() for curve in drawn}) == len({curve.get_marker() for curve in drawn}) == 2
    assert labelled(ax, "Dense, n = 2")[1] == [66, 66]
    (band,) = ax.patches  # mean and sd of the dense runs
    assert (band.get_y(), band.get_height()) == (pytest.approx(66 - 2 * root), pytest.approx(4 * root))
    assert "density" in ax.get_xlabel()
    assert "accuracy" in ax.get_ylabel()


def test_data_sets_are_kept_apart_and_nothing_in_common_is_said(tmp_path, figures):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", densities=(1.0, 0.6, 0.3), struct="refill")
    make_run(tmp_path / "c", dataset="folder", data="/one")
    make_run(tmp_path / "d", dataset="folder", data="/two", seed=1)
    out = report.compare([tmp_path / name for name in "abcd"], tmp_path / "out")
    text, names = (out / "compare.md").read_text(), ["digits", "folder /one", "folder /two"]
    assert [line for line in text.splitlines() if line.startswith("## ")] == [f"## Data set: {name}" for name in names]
    assert [figure.axes[0].get_title() for figure in figures[0].subfigs] == names
    rows = rows_of(out / "compare.csv")
    assert {row["dataset"] for row in rows} == set(names)
    assert "op-5" not in text  # as none was measured
    assert "test_top5_mean" not in rows[0]
    assert "No two groups reach the same density below 100%" in text
    assert "- RSST: 100.00%, 70.00%, 40.00%\n- Refill: 100.00%, 60.00%, 30.00%\n" in text
    assert text.count("| density level |") == 1


def test_unfinished_and_repeated_runs_are_named_and_left_out(tmp_path, figures, capsys):
    for name, value, seed in (("a", 0.5, 42), ("b", 0.7, 1), ("again", 0.9, 1), ("half", 0.1, 2)):
        make_run(tmp_path / name, test=(value,) * 3, seed=seed, done=1 if name == "half" else None)
    folders = [str(tmp_path / name) for name in ("a", "b", "again", "half", "a")]
    assert report.main([*folders, "--out", str(tmp_path / "out")]) == 0
    text, errors = (tmp_path / "out" / "compare.md").read_text(), capsys.readouterr().err
    for note in ("half: not finished (1 of 3 states)", "again: same flags and seed as b"):
        assert f"- {note}" in text
        assert f"left out: {note}" in errors
    row = rows_of(tmp_path / "out" / "compare.csv")[0]
    assert row["n"] == "2"
    assert float(row["test_mean"]) == pytest.approx(0.6)


# ------------------------------------------------------------------------------------------------ paired differences


def make_seeds(folder, name, accuracies, **flags):
    """A run a seed, with that test accuracy in its last state, or in all where it is a tuple."""
    for seed, value in accuracies.items():
        test = value if isinstance(value, tuple) else (0.9, 0.9, value)
        make_run(folder / f"{name}{seed}", test=test, seed=seed, **flags)
    return [folder / f"{name}{seed}" for seed in accuracies]


def test_differences_by_hand(tmp_path, figures, capsys):
    rsst = make_seeds(tmp_path, "rsst", {0: 0.62, 1: 0.66, 2: 0.67, 9: 0.99})
    refill = make_seeds(tmp_path, "refill", {2: 0.64, 1: 0.64, 0: 0.61}, struct="refill")
    dense = make_seeds(tmp_path, "dense", {0: (0.80,), 1: (0.80,)}, struct="dense", densities=(1.0,))
    assert report.main([*map(str, [*rsst, *refill, *dense]), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("compare.csv, compare_paired.csv\n")
    rows = rows_of(tmp_path / "out" / "compare_paired.csv")
    assert [[row[name] for name in ("level", "a", "a_state", "b", "b_state", "seeds")] for row in rows] == [
        ["0.7", "RSST", "1", "Refill", "1", "0 1 2"], ["0.7", "RSST", "1", "Dense", "0", "0 1"],
        ["0.7", "Refill", "1", "Dense", "0", "1 0"], ["0.4", "RSST", "2", "Refill", "2", "0 1 2"],
        ["0.4", "RSST", "2", "Dense", "0", "0 1"], ["0.4", "Refill", "2", "Dense", "0", "1 0"],
    ]  # fmt: skip
    assert [row["verdict"] for row in rows[:3]] == ["the same in every pair"] + ["no interval (no spread)"] * 2
    row = rows[3]
    # differences of 1, 2 and 3 points: sd 1; two degrees of freedom have (2 q - 1) / sqrt(2 q (1 - q)) as quantiles
    assert (float(row["mean"]), float(row["sd"])) == pytest.approx((0.02, 0.01))
    for name, q in (("t", 0.975), ("corrected", 1 - 0.025 / 6)):
        reach = 0.01 / math.sqrt(3) * (2 * q - 1) / math.sqrt(2 * q * (1 - q))
        assert (float(row[f"{name}_low"]), float(row[f"{name}_high"])) == pytest.approx((0.02 - reach, 0.02 + reach))
    assert (row["n"], row["comparisons"]) == ("3", "6")
    assert (rows[0]["t_low"], rows[0]["p"], rows[0]["sd"]) == ("", "1.0", "0.0")

    text = (tmp_path / "out" / "compare.md").read_text()
    table = table_rows(text, "equal in")
    assert table[3] == {
        "equal in": "density 40.00%", "A - B": "RSST - Refill", "states": "2, 2", "n": "3", "difference": "+2.00",
        "95% interval": "-0.48 to +4.48", "corrected": "-4.28 to +8.28", "bootstrap": "+1.00 to +3.00",
        "A is": "no difference found (t and bootstrap disagree about zero)",
    }  # fmt: skip
    assert (table[0]["difference"], table[0]["95% interval"]) == ("+0.00", "-")
    assert "(6 have two pairs or more)" in text
    for words in ("RSST against Refill: 9", "RSST against Dense: 2, 9", "Refill against Dense: 2"):
        assert f"- {words}\n" in text
    assert (tmp_path / "out" / "compare.html").read_text().count("no difference found (t and bootstrap disagree") == 1

    # without shared seeds there is no table, and that of an earlier comparison goes
    assert report.main([str(rsst[0]), str(refill[1]), str(refill[2]), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.endswith("compare.csv\n")
    text = (tmp_path / "out" / "compare.md").read_text()
    assert "share two seeds: their differences have no interval" in text
    assert "| equal in |" not in text
    assert not (tmp_path / "out" / "compare_paired.csv").exists()


def differences_of(*folders):
    groups = report.group_runs([report.load_run(folder) for runs in folders for folder in runs])
    found, lonely = paired_comparisons(groups)
    return [f"{each.place}: {each.a[0].label} - {each.b[0].label}" for each in found], lonely


def test_a_claim_needs_enough_seeds_and_the_same_images(tmp_path):
    points = [0.010, 0.011, 0.012, 0.009, 0.010, 0.011]
    ours = {seed: 0.6 + 0.02 * seed + gain for seed, gain in enumerate(points)}  # seeds differ more than methods do
    theirs = {seed: 0.6 + 0.02 * seed for seed in ours}
    first = make_seeds(tmp_path, "a", ours)
    second = make_seeds(tmp_path, "b", theirs, struct="refill")
    fewer = make_seeds(tmp_path, "c", theirs, struct="imp", train_limit=100, lr=0.1)
    groups = report.group_runs([report.load_run(folder) for folder in [*first, *second, *fewer]])
    found, lonely = paired_comparisons(groups)
    assert [each.difference.verdict for each in found] == ["the same in every pair", "better"]
    (backwards,) = [each for each in paired_comparisons(groups[1::-1])[0] if each.level < 0.5]
    assert backwards.difference.verdict == "worse"
    assert len(lonely) == 4  # each of two groups with the third, which sees fewer images, and the other way round
    assert all(seeds == "0, 1, 2, 3, 4, 5" and "imp" in (a.method, b.method) for a, b, seeds in lonely)
    text = "\n\n".join(paired_text("digits", groups, found, lonely))
    assert any(len(group.label) > 24 for group in groups)  # the table numbers them instead
    assert f"- group 2: {groups[1].label}\n" in text
    assert [row["A - B"] for row in table_rows(text, "equal in")] == ["group 1 - group 2"] * 2
    assert "- group 3 against group 2: 0, 1, 2, 3, 4, 5" in text


def test_groups_meet_at_equal_macs_too_and_never_twice(tmp_path):
    heads = make_seeds(tmp_path, "heads", {0: 0.5, 1: 0.6}, vit_prune_target="head")
    neurons = make_seeds(tmp_path, "neurons", {0: 0.4, 1: 0.6}, vit_prune_target="mlp", densities=(1.0, 0.6, 0.4))
    for folder in neurons:  # 28 and 16 million in the other: one within 2%, and one that meets at its density
        change_states(folder, {}, {"macs": 27_500_000}, {"macs": 16_000_000})
    rsst, other = "RSST (heads)", "RSST (neurons)"
    assert differences_of(heads, neurons)[0] == [
        f"density 40.00%: {rsst} - {other}",
        f"MACs 0.0278 G: {rsst} - {other}",
    ]
    for folder in neurons:
        change_states(folder, {}, {"macs": 27_000_000}, {"macs": 40_000_000, "density": 0.3})
    assert differences_of(heads, neurons)[0] == []  # 27 and 28 million differ, and 40 million are the whole network
    masks = [
        make_seeds(tmp_path, name, {0: 0.5, 1: 0.6}, densities=each, **flags)
        for name, each, flags in (("imp", (1, 0.5, 0.4), IMP), ("weights", (1, 0.8, 0.6), WEIGHTS))
    ]
    for folder in [path for runs in masks for path in runs]:
        change_states(folder, *[{"macs": 40_000_000}] * 3)
    assert differences_of(*masks)[0] == []  # zeros save no MACs


def test_many_groups_are_held_against_the_first_and_dense_ones_against_each_other(tmp_path):
    many = [make_seeds(tmp_path, f"r{i}", {0: 0.5, 1: 0.6}, densities=(1, 0.5), lr=i) for i in range(1, 6)]
    dense = [
        make_seeds(tmp_path, f"d{i}", {0: (0.8,), 1: (0.7,)}, densities=(1,), struct="dense", lr=i) for i in (1, 2)
    ]
    found, lonely = differences_of(*many, *dense)
    others = [f"RSST (lr {i})" for i in range(2, 6)] + ["Dense (lr 1)", "Dense (lr 2)"]
    expected = ["dense: Dense (lr 2) - Dense (lr 1)", *(f"density 50.00%: {name} - RSST (lr 1)" for name in others)]
    assert (found, lonely) == (expected, [])
    found, _ = differences_of(*many[:4], *dense)
    assert len(found) == 1 + 6 + 8  # dense; each pair of four; each with two dense ones
    assert found[0] == "dense: Dense (lr 1) - Dense (lr 2)"
    assert differences_of(many[0], dense[0])[0] == ["density 50.00%: RSST - Dense"]  # no other group is needed


def test_a_cut_is_compared_with_the_start_of_its_state(tmp_path, figures):
    """0.9137 at the end of state 0, 0.7868 just before and just after the cut: fading cost 12.69 points."""
    folder = make_run(tmp_path / "run", model=False)
    cut = {"accuracy_before_cut": 0.7868, "accuracy_after_cut": 0.7868, "accuracy_at_start": 0.9137}
    change_states(folder, {"accuracy_at_start": ""}, cut, cut)
    text = written(folder)
    assert "The 2 cuts, with the fading before them, changed accuracy by -12.69 points at worst" in text
    assert "91.37% at the end of the state before, 78.68% before, 78.68% after" in text
