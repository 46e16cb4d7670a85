# ruff: noqa: E402  the modules of tests and of the program are found from anywhere
"""Whole runs drawn at random: what every run must leave, and the same bits after kills.

    python -m tests.random_runs --seeds 0:200            whole runs: final state, budget, parity, report, reload
    python -m tests.random_runs --seeds 0:200 --kill     killed once to three times, resumed: bits of the unbroken run

A seed draws method, target, allocation, criterion, optimizer, recipe, teacher, finish, pattern, merging, stem and
model class. Every process is forked off this one, which has imported the command once, on one thread; a kill is a
SIGKILL. A seed that fails prints its command line and what was wrong. What the command refuses in one line is counted.
"""

import argparse
import collections
import functools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]

import sklearn.datasets  # noqa: F401 what the command imports late
import timm.data  # noqa: F401
import torch
import torch._dynamo
import torchvision.transforms.v2  # noqa: F401
from micro import load, masks_of, metrics, rows_of, vit_micro
from test_backbones import tiny
from test_cnn import res_micro, res_micro_projected
from test_reliable import _process, at, ending, kill, without_report
from test_swin import swin_micro  # noqa: F401  registers timm/swin_micro and timm/swinv2_micro

import export
import models
from families import family_of

torch.set_num_threads(1)
words = str.split

CNNS = {"res_micro": res_micro, "res_micro_projected": res_micro_projected}
TIMM = [
    "vit_small_patch16_dinov3", "eva02_base_patch16_clip_224", "vit_small_patch16_rope_mixed_224",
    "vit_giant_patch14_dinov2", "beit3_base_patch16_224", "beit_base_patch16_224", "vit_base_patch16_xp_224",
    "vit_small_patch16_18x2_224",
]  # fmt: skip
MODELS = {"vit_micro": vit_micro, **CNNS, **{f"small_{name}": functools.partial(tiny, name) for name in TIMM}}
SWINS = ["timm/swin_micro", "timm/swinv2_micro"]
PLAIN = ["vit_micro", "vit_mini", "timm/test_vit", "timm/test_vit4"]
DISTILLED = "timm/deit_tiny_distilled_patch16_224"


# ------------------------------------------------------------------------------------------------------------ drawing


def draw(seed: int, weights: Path, timed: bool = False) -> list[str]:
    """Flags of a run; `weights` is a file of `vit_micro`, `timed` allows budgets that a clock decides."""
    rng = random.Random(seed)
    flags: list[str] = []

    def maybe(chance, text):
        if rng.random() < chance:
            flags.extend(words(text))

    def pick(*choices):
        return rng.choice(choices)

    struct = rng.choices(["rsst", "refill", "imp", "oneshot", "dense"], [4, 4, 1.5, 1, 0.7])[0]
    arch = rng.choices(
        ["vit_micro", "vit_mini", pick("timm/test_vit", "timm/test_vit4"), DISTILLED, pick(*SWINS), pick(*CNNS),
         f"small_{pick(*TIMM)}"],
        [5, 1.5, 1, 0.3, 1, 2, 3],
    )[0]  # fmt: skip
    if struct == "oneshot" and arch in CNNS:
        arch = "vit_micro"
    cnn, swin = arch in CNNS, arch in SWINS
    states, epochs = rng.choices([1, 2, 3, 4], [1, 5, 5, 1])[0], rng.choices([1, 2, 3], [2, 3, 2])[0]
    pixels = {"vit_mini": pick(8, 16), "timm/test_vit": 32, "timm/test_vit4": 32, DISTILLED: 32}.get(
        arch, 8 if cnn else 16
    )
    flags += words(
        f"--dataset digits --device cpu --workers 0 --wandb_mode disabled --struct {struct} --arch {arch} "
        f"--img_size {pixels} --train_limit {rng.randint(40, 64)} --batch_size {pick(8, 12, 16, 20)} "
        f"--epochs {epochs} --pruning_times {states} --seed {rng.randint(0, 99)}"
    )
    flags += ["--amp", "bf16" if rng.random() < 0.1 else "off"]
    if arch == "vit_mini":
        flags += words(f"--patch_size {pixels // 2}")
        maybe(0.4, "--stem conv")
        maybe(0.3, "--layer_scale 0.1")
    if arch in PLAIN:
        maybe(0.15, "--token_merge 1")
    if arch == "vit_micro" and rng.random() < 0.25:
        flags += ["--pretrained" if rng.random() < 0.6 else "--init", str(weights)]

    structured = not cnn and (
        struct == "oneshot" or (struct != "dense" and rng.random() < (0.2 if struct == "imp" else 0.7))
    )
    target = "head"
    if structured:
        depth = [] if swin or "xp" in arch or "18x2" in arch else ["branch", "block", "all", "all"]
        target = pick("head", "mlp", "both", *depth)
        flags += ["--vit_structured", "--vit_prune_target", target]
        maybe(0.4, "--min_units 0")
        maybe(0.15, "--no-refill")
        maybe(0.2, "--no-compact_training")
        if target != "head":
            maybe(0.4, f"--mlp_prune_ratio {pick(0.2, 0.5, 0.8)}")
    units = structured or (cnn and struct in ("rsst", "refill"))
    flags += words(f"--rate {pick(0.15, 0.3, 0.4, 0.6, 0.8)}")
    if units and target not in ("branch", "block"):
        maybe(0.3, f"--round_to {pick(2, 4)}")
        how = rng.random()
        if how < 0.3:
            flags += words(f"--target_{pick('macs', 'params')} {pick(0.4, 0.6, 0.8)}")
        elif how < 0.33 and timed:
            flags += words("--target_latency_ms 1")
        if target != "all":
            maybe(0.4, f"--ratio_allocation {pick('uniform', 'global', 'sensitivity')} --score_batches {pick(1, 2)}")
        if target == "both" and "--ratio_allocation" not in flags:
            maybe(0.3, "--sorting_mode global")
            if "--sorting_mode" in flags:
                maybe(0.5, "--rank_by score_per_mac")
    if units:
        maybe(0.4, f"--ratio_schedule {pick('linear', 'constant')}")
        maybe(0.6, f"--criteria {pick('remain', 'magnitude', 'l1', 'l2', 'saliency', 'random')}")
    elif struct in ("imp", "refill", "rsst"):
        if not cnn or struct == "imp":
            maybe(0.25, f"--nm {pick('2:4', '1:4', '1:2')}")
        if "--nm" not in flags:
            maybe(0.3, f"--fillback_rate {pick(0.2, 0.5)}")
        maybe(0.3, "--prune_patch_embed")
    kinds = ["lt", "rewind_lt", "finetune"] + ["pt"] * ("--pretrained" in flags)
    flags += ["--prune_type", pick(*kinds)]
    if "rewind_lt" in flags:
        flags += words(f"--rewind_epoch {rng.randrange(epochs)}")
    maybe(0.2, "--fc")

    gradient = False
    if struct == "rsst":
        gradient = rng.random() < 0.35
        flags += ["--reg_form", "gradient" if gradient else "decay"]
        if gradient:
            maybe(0.4, f"--reg_clock {pick('epoch', 'state')}")
        maybe(0.6, f"--reg_finish {pick(0.25, 0.5, 0.75, 1.0)}")
        maybe(0.3, f"--RST_schedule {pick('x', 'x^2', 'x^3')}")
        maybe(0.3, f"--reg_granularity_prune {pick(0.5, 2)}")
        maybe(0.2, "--block_loss_grad")

    adamw = rng.random() < 0.5
    flags += words(f"--opt {'adamw' if adamw else 'sgd'} --lr {pick(0.001, 0.005) if adamw else pick(0.01, 0.05)}")
    if not adamw:
        maybe(0.2, "--momentum 0")
    maybe(0.4, f"--weight_decay {pick(0, 0.05)}")
    maybe(0.4, f"--warmup {rng.randint(0, epochs)}")
    if rng.random() < 0.4:
        flags += words("--sched cosine")
        maybe(0.4, "--min_lr 0.0001")
    if not (cnn or swin or gradient):
        maybe(0.15, "--layer_decay 0.75")
    for chance, text in (
        (0.4, f"--clip_grad {pick(0.5, 1)}"), (0.2, "--label_smoothing 0.1"), (0.2, "--mixup 0.8"), (0.2, "--cutmix 1"),
        (0.25, f"--ema_decay {pick(0.5, 0.99)}"), (0.15, "--accum_steps 2"),
        (0.6, f"--aug {pick('none', 'strong', 'rand')}"),
    ):  # fmt: skip
        maybe(chance, text)
    if not (cnn or "xp" in arch or "18x2" in arch):
        maybe(0.2, "--drop_path 0.2")
    finish = rng.random() < 0.35
    if finish:
        flags += words(f"--finish_epochs {rng.randint(1, 3)}")
        maybe(0.3, "--finish_lr 0.002")
        maybe(0.3, "--finish_on_all")
    if rng.random() < 0.3 and ((states > 1 and struct != "dense") or finish):
        flags += ["--teacher", "self"]
    elif arch == "vit_micro" and rng.random() < 0.1:
        flags += ["--teacher", str(weights)]
    if "--teacher" in flags:
        maybe(0.5, f"--kd_alpha {pick(0, 0.3, 1)}")
        maybe(0.4, pick("--kd_hard", "--kd_temperature 4"))
        if not cnn:
            maybe(0.4, "--kd_features 0.5")
    return flags


def value_of(flags: list[str], name: str, default=None):
    return flags[flags.index(name) + 1] if name in flags else default


def rounds_of(flags: list[str]) -> tuple[int, int, int]:
    """States, epochs of each, and epochs of the finish."""
    states, epochs = int(value_of(flags, "--pruning_times")), int(value_of(flags, "--epochs"))
    if value_of(flags, "--struct") == "dense":
        states, epochs = 1, states * epochs
    return states, epochs, int(value_of(flags, "--finish_epochs", 0))


def draw_kill(rng: random.Random, flags: list[str], first_state: int) -> tuple[str, int, int]:
    """point, state and count of a kill, as `test_reliable.at` takes them; a finish is the state behind the last."""
    states, epochs, finish = rounds_of(flags)
    points = ["step"] * 6 + ["cut", "cut done"] * 2
    points += ["end_epoch", "end_epoch done", "end_state", "end_state done", "begin_state", "begin_state done"]
    points += ["os.replace", "os.replace", "write", "os.replace best.pt", "os.replace checkpoint.pt"]
    point, last = rng.choice(points), states - 1 + bool(finish)
    state = max(rng.randint(min(first_state, last), last) for _ in range(2))  # most of what can go wrong comes late
    if finish and rng.random() < 0.2:
        state = last
    if rng.random() < 0.05:
        return "hand_over", last + 1, 1
    in_state = epochs if state < states else finish
    most = {"step": 4 * in_state, "end_epoch": in_state, "end_epoch done": in_state, "os.replace": 8, "write": 40}
    return point, state, rng.randint(1, most.get(point, 1))


# ---------------------------------------------------------------------------------------------------------- processes


class Failure(Exception):
    """What is wrong with a run."""


class Refused(Exception):
    """The command says in one line that these flags cannot be, or that this run diverges."""


def _child(argv, output, patches):
    models.BUILDERS.update(MODELS)
    _process(argv, output, patches)


def fork(target, *arguments, limit=180):
    """Exit status of `target(*arguments)` in a process of its own."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        raise Failure(f"hangs for {limit} s")
    return process.exitcode


def launch(argv, work: Path, *patches):
    """Exit status, standard output and error of the command."""
    output = work / "process"
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir()
    code = fork(_child, [str(part) for part in argv], output, patches)
    return code, *((output / name).read_text() if (output / name).exists() else "" for name in ("out", "err"))


def first_run(flags, folder, work, *patches):
    code, out, err = launch([*flags, "--save_dir", folder], work, *patches)
    if code in (1, 2) and err.count("\n") == 1 and "error: " in err:
        raise Refused(err.strip().split("error: ", 1)[1])
    return code, out, err


# ------------------------------------------------------------------------------------------------------------- checks


def check(fine: bool, *said) -> None:
    if not fine:
        raise Failure(" ".join(map(str, said)))


def check_whole(flags: list[str], work: Path) -> None:
    """A run, unbroken: what it leaves."""
    folder = work / "run"
    code, _, err = first_run(flags, folder, work)
    err = re.sub(r".*UserWarning: .*\n.*\n", "", err)  # PyTorch's, of norms in bf16
    check((code, err) == (0, ""), "exit", code, err[-2000:])
    states, epochs, finish = rounds_of(flags)
    rounds = states + bool(finish)
    run = load(folder / "checkpoint.pt")["run"]
    check((run["state"], run["begun"]) == (rounds, False), "final state", run["state"], run["begun"])
    expected = [(state, epoch) for state in range(states) for epoch in range(epochs)]
    expected += [(states, epoch) for epoch in range(finish)]
    check([(row["state"], row["epoch"]) for row in metrics(folder)] == expected, "epochs")
    rows = rows_of(folder / "states.csv")
    check([int(row["state"]) for row in rows] == list(range(rounds)), "states")
    for name in ("density", "macs", "parameters"):
        values = [float(row[name]) for row in rows]
        check(all(a >= b for a, b in zip(values, values[1:], strict=False)), name, "grows", values)
    check_budget(flags, rows, json.loads((folder / "model" / "config.json").read_text()))
    check((folder / "report.html").stat().st_size > 1000, "report")
    proof = json.loads((folder / "model" / "parity.json").read_text())
    check(proof["max_difference_float64"] < 1e-7, "parity", proof)  # folded constants are rounded to float32
    check_best(folder)
    code = fork(_reload, folder / "model", work / "reload")
    check(code == 0, "reload:", (work / "reload").read_text()[-2000:] if (work / "reload").exists() else code)


def check_budget(flags: list[str], rows: list[dict], config: dict) -> None:
    """A target is a share of the dense network, whose tokens do not merge."""
    pruned = int(value_of(flags, "--pruning_times")) > 1 and value_of(flags, "--struct") != "dense"
    for flag, name in (("--target_macs", "macs"), ("--target_params", "parameters")):
        if pruned and flag in flags:
            share = float(rows[-1][name]) / config[name]["dense"]
            check(share <= float(value_of(flags, flag)) + 1e-9, flag, value_of(flags, flag), "left", share)
    if pruned and "--nm" in flags:
        keep, group = map(int, value_of(flags, "--nm").split(":"))
        check(float(rows[-1]["density"]) <= keep / group + 0.05, "--nm density", rows[-1]["density"])
    elementwise = not {"--vit_structured", "--nm", "--fillback_rate"} & set(flags)
    cnn_units = value_of(flags, "--arch") in CNNS and value_of(flags, "--struct") in ("rsst", "refill")
    if pruned and elementwise and not cnn_units:
        wanted = (1 - float(value_of(flags, "--rate"))) ** (int(value_of(flags, "--pruning_times")) - 1)
        check(abs(float(rows[-1]["density"]) - wanted) < 0.02, "density", rows[-1]["density"], "wanted", wanted)


def check_best(folder: Path) -> None:
    """What the masks of the last state cut is zero in the selected model, which the tables speak of."""
    best, checkpoint = load(folder / "best.pt"), load(folder / "checkpoint.pt")
    row = rows_of(folder / "states.csv")[-1]
    found = (best["state"], best["epoch"], str(best.get("accuracy", "")))
    check(found == (int(row["state"]), int(row["best_epoch"]), row["best_accuracy"]), "best.pt", found, row)
    for layer, bits in masks_of(checkpoint, "masks").items():
        alive = best["weights"][f"{layer}.weight"].flatten() != 0
        check(not alive[torch.from_numpy(bits) == 0].any(), "a cut weight of", layer, "is not zero")


def _reload(model: Path, said: Path) -> None:
    """`export.load` and the lines of the card give one network."""
    try:
        models.BUILDERS.update(MODELS)
        network = export.load(model)
        pixels = family_of(network).image_size(network)
        images = torch.randn(3, 3, pixels, pixels, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            expected = network(images)
            (code,) = re.findall(r"```python\n(.*?)```", (model / "README.md").read_text(), re.DOTALL)[:1]
            os.chdir(model.parent if "import export" in code else model)  # timm alone does not merge tokens
            sys.path.insert(0, str(model))  # as for who starts Python there: load_model.py may lie beside the card
            space: dict = {}
            exec(code, space)
            difference = float((space["model"](images) - expected).abs().max())
        check(difference <= 1e-5 * max(1, float(expected.abs().max())), "the card's model differs by", difference)
    except BaseException as error:
        said.write_text(f"{type(error).__name__}: {error}")
        os._exit(1)
    os._exit(0)


def check_kills(flags: list[str], work: Path, seed: int) -> int:
    """A run killed and resumed ends as the unbroken one. Returns how often it was killed."""
    rng = random.Random(-1 - seed)
    every = ["--checkpoint_every", str(rng.randint(1, 4))] if rng.random() < 0.8 else []
    whole, folder = work / "whole", work / "run"
    code, _, err = first_run([*flags, *every], whole, work, (without_report,))
    check((code, err) == (0, ""), "unbroken: exit", code, err[-2000:])
    expected = ending(whole)

    def go_on(*patches):
        if any((folder / name).exists() for name in ("checkpoint.pt", "checkpoint.prev.pt")):
            return launch(["--resume", "--save_dir", folder], work, (without_report,), *patches)
        anew = ["--overwrite"] if folder.exists() else []
        return launch([*flags, *every, "--save_dir", folder, *anew], work, (without_report,), *patches)

    killed, moments = 0, []
    for _ in range(rng.choices([1, 2, 3], [5, 3, 1])[0]):
        reached = load(folder / "checkpoint.pt")["run"]["state"] if (folder / "checkpoint.pt").exists() else 0
        moments.append(draw_kill(rng, flags, reached))
        code, _, err = go_on((at, *moments[-1], kill))
        check(code in (0, -signal.SIGKILL) and not err, "kill at", moments, "exit", code, err[-2000:])
        killed += code != 0
        if code == 0:
            break  # that moment never came
    else:
        code, _, err = go_on()
    check((code, err) == (0, ""), "after kills at", moments, "exit", code, err[-2000:])
    found = ending(folder)
    check(found.keys() == expected.keys(), "files", found.keys() ^ expected.keys())
    wrong = [name for name in expected if found[name] != expected[name]]
    check(not wrong, "after kills at", moments, "other bits in", wrong, first_difference(found, expected, wrong))
    check(not [name for name in os.listdir(folder) if name.startswith(".") or "new" in name], os.listdir(folder))
    return killed


def first_difference(found, expected, wrong):
    if not wrong:
        return ""
    found, expected, way = found[wrong[0]], expected[wrong[0]], []
    while isinstance(expected, dict | list) and type(found) is type(expected) and len(found) == len(expected):
        keys = expected if isinstance(expected, dict) else range(len(expected))
        keys = [key for key in keys if not isinstance(expected, dict) or key in found]
        key = next((key for key in keys if found[key] != expected[key]), None)
        if key is None:
            break
        way.append(str(key))
        found, expected = found[key], expected[key]
    return f"{'.'.join(way)}: {str(found)[:80]} for {str(expected)[:80]}"


# ------------------------------------------------------------------------------------------------------------ the seeds


def weights_file(work: Path) -> Path:
    path = work / "weights.pt"
    generator = torch.Generator().manual_seed(9)
    torch.save(
        {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in vit_micro().state_dict().items()}, path
    )
    return path


def try_seed(seed: int, kills: bool, work: Path) -> str:
    """Runs what the seed draws in an empty folder of `work`; returns "" or why the command refused it.

    Raises:
        Failure: with the command line.
    """
    here = work / f"seed{seed}"
    shutil.rmtree(here, ignore_errors=True)
    here.mkdir()
    weights = weights_file(work)
    flags = draw(seed, weights, timed=not kills)
    try:
        check_kills(flags, here, seed) if kills else check_whole(flags, here)
    except Refused as refused:
        return str(refused)
    except Exception as error:
        said = error if isinstance(error, Failure) else f"{type(error).__name__}: {error}"
        raise Failure(f"seed {seed}: {said}\n  main_imp_fillback.py {' '.join(flags)}") from error
    finally:
        shutil.rmtree(here, ignore_errors=True)
    return ""


def kinds_of(flags: list[str]) -> list[str]:
    """What a draw counts as in the summary."""
    names = words(
        "--nm --teacher --finish_epochs --token_merge --ema_decay --drop_path --stem --min_units --target_macs "
        "--target_params --target_latency_ms --pretrained --compile --mixup --cutmix"
    )
    shown = words("--struct --opt --arch --vit_prune_target --ratio_allocation")
    found = [value_of(flags, name) for name in shown]
    return [kind for kind in found if kind] + [name for name in names if name in flags]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", default="0:20", metavar="FROM:TO")
    parser.add_argument("--kill", action="store_true", help="kill and resume, and compare bits")
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no seed after so many")
    parser.add_argument("--show", action="store_true", help="print the command lines and run nothing")
    args = parser.parse_args()
    first, last = map(int, args.seeds.split(":"))
    started, failed, refused, counted, done = time.time(), [], [], collections.Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for seed in range(first, last):
            flags = draw(seed, weights_file(work), timed=not args.kill)
            if args.show:
                print(seed, *flags)
                continue
            if time.time() - started > 60 * args.minutes:
                break
            done += 1
            try:
                if why := try_seed(seed, args.kill, work):
                    refused.append(seed)
                    print(f"seed {seed} refused: {why}", flush=True)
                else:
                    counted.update(kinds_of(flags))
            except Failure as failure:
                failed.append(seed)
                print(f"FAILED {failure}", flush=True)
    print(f"{done} draws in {time.time() - started:.0f} s: {len(failed)} failed {failed}, {len(refused)} refused")
    print(", ".join(f"{kind} {count}" for kind, count in counted.most_common()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
