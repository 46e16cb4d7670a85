"""How strongly a state trains: schedules with a floor, decay by layer, mixing, averages, teachers. All of it is off by
default, goes through masks, cuts and small networks, and goes on to the same bits after a stop."""

import copy
import json
import math
from functools import partial

import numpy as np
import pytest
import torch
from micro import (
    DEPTH,
    MICRO,
    TIMES,
    WHOLE,
    assert_same_tensors,
    broken_off,
    call,
    clones,
    dead_rows,
    dense_shaped,
    largest_difference,
    load,
    log_of,
    make_run,
    metrics,
    picture_folder,
    vit_micro,
    wrap,
)
from safetensors.torch import save_file

import export
import main_imp_fillback as entry
from dataset import DATASETS, Batches, Split, load_dataset, make_batches
from engine.choose import choose_target
from engine.distill import named_teacher
from engine.drop_path import StochasticDepth
from engine.mixing import Mixing
from engine.objective import count_right, cross_entropy, distillation
from engine.optimizer import Schedule, layer_scales, parameter_groups
from engine.training import StateTraining
from images.orders import random_seed
from images.randaugment import OPERATIONS, draw_operations, rand_augment
from models.vit import VisionTransformer

slow = partial(pytest.param, marks=pytest.mark.slow)


def parse(*flags):
    return entry.parse_args([*MICRO, *map(str, flags)])


REFUSED = {
    "--min_lr 0.01": "--sched cosine", "--sched cosine --min_lr 0.06": "--lr 0.05 --min_lr 0.06",
    "--layer_decay 0": "0.0 (0, 1]",
    "--layer_decay nan": "(0, 1]", "--layer_decay 0.5 --reg_form gradient": "--reg_form decay",
    "--layer_decay 0.5 --arch res20s": "0.5 res20s", "--mixup -1": "-1.0 or more", "--cutmix -1": "-1.0 or more",
    "--mixup nan": "nan", "--cutmix nan": "nan", "--drop_path 1": "[0, 1)", "--drop_path 0.1 --arch res20s": "res20s",
    "--drop_path 0.1 --compile graph": "--compile graph", "--layer_scale -1": "-1.0", "--ema_decay 1": "1.0 [0, 1)",
    "--layer_scale 0.1 --arch res20s": "res20s", "--layer_scale 0.1 --pretrained": "pretrained",
    "--ema_decay nan": "nan",
    "--kd_alpha 0.5": "0.5 --teacher", "--kd_alpha 1.5 --teacher self": "[0, 1]", "--kd_features 1": "1 --teacher",
    "--kd_temperature 0 --teacher self": "0.0", "--teacher self --pruning_times 1": "self state 0",
    "--teacher self --struct dense": "self", "--teacher none.pt": "no such file", "--teacher timm/none": "timm/none",
    "--teacher seven.pt": "(7, 24) (10, 24)", "--teacher empty": "empty", "--kd_hard": "--teacher",
    "--kd_features -1 --teacher self": "-1.0", "--kd_features inf --teacher self": "inf",
    "--kd_temperature 2 --teacher self --kd_hard": "2.0 --kd_hard",
}  # fmt: skip


def test_what_cannot_be_is_refused(refused, tmp_path):
    """The line names the flag and holds each word."""
    torch.save(vit_micro(num_classes=7).state_dict(), "seven.pt")
    (tmp_path / "cwd" / "empty").mkdir()
    for flags, said in REFUSED.items():
        flag = "--min_lr" if "--min_lr" in flags else flags.split()[0]
        refused(flags, flag, *said.split())


# -------------------------------------------------------------------------------------------------- learning rates
def test_a_cosine_with_a_floor_is_there_at_the_last_step():
    floor, lr = 0.002, 0.05
    rates = [Schedule("cosine", lr, 3, (), 15, floor).rate(step) for step in range(15)]
    expected = [lr / 3, 2 * lr / 3, lr]
    expected += [floor + (lr - floor) * (1 + math.cos(math.pi * k / 11)) / 2 for k in range(12)]
    assert rates == pytest.approx(expected)
    assert rates[-1] == floor
    assert Schedule("cosine", lr, 12, (), 13, floor).rate(12) == floor  # one step is left after the warm-up


def test_every_state_ends_at_the_floor(seen):
    run = seen("--struct", "refill", "--sched", "cosine", "--min_lr", "0.01", "--warmup", "0", "--pruning_times", "2")
    last = 2 * 3
    assert [run.steps[state, last].rate for state in (0, 1)] == pytest.approx([0.01, 0.01])
    assert run.steps[1, 1].rate == pytest.approx(0.05)


def test_layer_decay_by_hand_on_three_blocks():
    model = vit_micro(depth=3)
    scales = layer_scales(dict(model.named_parameters()), 3, 0.5)
    expected = {"patch_embed": 0.0625, "cls_token": 0.0625, "pos_embed": 0.0625, "norm": 1.0, "head": 1.0}
    for name, scale in scales.items():
        parts = name.split(".")
        by_hand = {"0": 0.125, "1": 0.25, "2": 0.5}[parts[1]] if parts[0] == "blocks" else expected[parts[0]]
        assert scale == by_hand, name


@pytest.mark.usefixtures("house")
@pytest.mark.parametrize("flags", [(), ("--layer_decay", "0.5")])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(flags):
    model, args = vit_micro(depth=3), parse("--weight_decay", "0.1", *flags)
    groups = parameter_groups(args, model)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    scales = layer_scales(names.values(), 3, 0.5 if flags else 1.0)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            matrix = name.endswith("weight") and "norm" not in name
            assert (group["weight_decay"], group["scale"]) == (0.1 if matrix else 0.0, scales[name]), name


def test_layer_decay_slows_early_layers_in_a_run(house, tmp_path):
    moved = {}
    for flags in ((), ("--layer_decay", "0.5")):
        run = make_run(tmp_path / "run", "--momentum", "0", "--weight_decay", "0", "--warmup", "0", *flags)
        run.begin_state()
        training, before = StateTraining(run), {n: p.detach().clone() for n, p in run.dense.named_parameters()}
        training.step()
        moved[flags] = {name: p.detach() - before[name] for name, p in run.dense.named_parameters()}
        run.close()
    full, slow = moved.values()
    for name in ("pos_embed", "blocks.0.mlp.fc1.weight", f"blocks.{DEPTH - 1}.attn.qkv.weight", "head.weight"):
        scale = layer_scales([name], DEPTH, 0.5)[name]
        torch.testing.assert_close(slow[name], full[name] * scale, rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------- mixing
@pytest.mark.parametrize(("mixup", "cutmix", "smoothing"), [(0.8, 0, 0.1), (0, 1.0, 0), (0.8, 1.0, 0.1)])
def test_batches_are_mixed_as_timm_mixes_them(mixup, cutmix, smoothing, make_batch):
    timm = pytest.importorskip("timm.data.mixup")
    mixing, reference = (
        Mixing(mixup, cutmix, smoothing, 5, seed=3),
        timm.Mixup(mixup, cutmix, label_smoothing=smoothing, num_classes=5),
    )
    for step in range(8):
        images, labels = make_batch(seed=step)
        before = images.clone()
        mixed, targets = mixing(images, labels, 1, 2, step)
        seed = random_seed(3, 1, 2, step, 1)
        np.random.seed([seed % 2**32, seed >> 32])
        expected = reference(images.clone(), labels)
        assert torch.equal(images, before)
        torch.testing.assert_close(mixed, expected[0])
        torch.testing.assert_close(targets, expected[1])


def test_mixing_is_a_pure_function_of_the_step_and_leaves_numpy_alone(make_batch):
    images, labels = make_batch()
    mixing = Mixing(1.0, 1.0, 0.0, 5, seed=0)
    np.random.seed(0)
    expected = np.random.rand()
    np.random.seed(0)
    first = mixing(images, labels, 0, 1, 2)[0]
    assert np.random.rand() == expected
    again = Mixing(1.0, 1.0, 0.0, 5, seed=0)
    assert torch.equal(again(images, labels, 0, 1, 2)[0], first)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 3)):
        assert not torch.equal(again(images, labels, *other)[0], first)
    assert not torch.equal(Mixing(1.0, 1.0, 0.0, 5, seed=1)(images, labels, 0, 1, 2)[0], first)


def test_a_mixed_image_is_right_at_its_larger_share_and_costs_by_its_shares():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 3.0, 0.0]])
    shares = torch.tensor([[0.7, 0.3, 0.0], [0.6, 0.4, 0.0]])
    assert int(count_right(logits, shares)) == 1
    assert int(count_right(logits, torch.tensor([0, 1]))) == 2
    by_hand = -(shares * logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(cross_entropy(logits, shares, 0.1), by_hand)  # smoothed already


# ------------------------------------------------------------------------------------------------------ RandAugment
def colours(count=4, side=16, channels=3):
    return torch.randint(0, 256, (count, channels, side, side), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_operations_are_those_of_torchvision(operation, sign, channels):
    v2 = pytest.importorskip("torchvision.transforms.v2")
    names = {name: name.title().replace("_", "") for name in OPERATIONS} | {"autocontrast": "AutoContrast"}
    policy = v2.RandAugment(num_ops=2)
    magnitudes = policy._AUGMENTATION_SPACE[names[operation]][0](31, 16, 16)
    magnitude = 0.0 if magnitudes is None else float(magnitudes[9]) if magnitudes.ndim else float(magnitudes)
    signed = policy._AUGMENTATION_SPACE[names[operation]][1]
    kind, images = OPERATIONS.index(operation), colours(channels=channels).clamp(20, 200)
    expected = images.to(torch.uint8)
    interpolation = v2.InterpolationMode.NEAREST
    for _ in range(2):
        magnitude_now = magnitude * sign if signed else magnitude
        expected = policy._apply_image_or_video_transform(
            expected, names[operation], magnitude_now, interpolation=interpolation, fill={}
        )
    shape = (len(images), 2)
    found = rand_augment(images.float(), torch.full(shape, kind), torch.full(shape, sign))
    differ = (found - expected).abs()
    assert float((differ > 1).float().mean()) < 0.01  # a pixel that comes from halfway between two
    assert torch.equal(found, found.round())
    assert 0 <= float(found.min()) <= float(found.max()) <= 255


def test_images_of_a_batch_get_their_own_operations_in_their_order():
    images = colours(6).float()
    kinds = torch.tensor([[0, 5], [5, 0], [6, 11], [11, 6], [13, 12], [3, 3]])
    signs = torch.tensor([[1, -1], [1, 1], [-1, 1], [1, -1], [1, 1], [1, -1]])
    together = rand_augment(images, kinds, signs)
    for i in range(6):
        assert torch.equal(together[i : i + 1], rand_augment(images[i : i + 1], kinds[i : i + 1], signs[i : i + 1]))
    assert not torch.equal(rand_augment(images, kinds.flip(1), signs.flip(1))[2], together[2])


def resident(aug, images=96, side=28, seed=0):
    split = Split(torch.full((images, 3, side, side), 200, dtype=torch.uint8), torch.zeros(images, dtype=torch.long))
    return Batches(split, DATASETS["cifar10"], images, "cpu", seed, aug)


def test_rand_erases_a_quarter_of_the_images_to_the_mean():
    data, shares = resident("rand", images=600), []
    images, _ = data.batch(0, 0, 0)
    erased = (images == 0).all(1)  # the mean, which no pixel of these images has
    for mask in erased:
        if mask.any():
            rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
            assert int(mask.sum()) == len(rows) * len(columns)  # one rectangle
            shares.append(float(mask.float().mean()))
    assert len(shares) / 600 == pytest.approx(0.25, abs=0.06)
    assert min(shares) > 0.01
    assert max(shares) < 0.4


def test_rand_is_a_pure_function_of_the_step_and_draws_every_operation():
    first = resident("rand").batch(1, 2, 0)[0]
    assert torch.equal(resident("rand").batch(1, 2, 0)[0], first)
    assert not torch.equal(resident("rand").batch(1, 3, 0)[0], first)
    kinds, signs = draw_operations(2000, torch.Generator().manual_seed(0))
    assert set(kinds.flatten().tolist()) == set(range(14))
    assert set(signs.flatten().tolist()) == {-1, 1}


# ------------------------------------------------------------------------------------------------- stochastic depth
def both_vits(make_micro_vit):
    ours = make_micro_vit(depth=3)
    timm = pytest.importorskip("timm.models.vision_transformer")
    geometry = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 3, "num_heads": 3, "mlp_ratio": 2}
    theirs = timm.VisionTransformer(num_classes=5, **geometry)
    theirs.load_state_dict(ours.state_dict())
    return ours.train(), theirs.train()


def test_dropped_branches_by_hand_in_our_model_and_in_timms(make_micro_vit, make_batch):
    images, _ = make_batch(images=8)
    for model in both_vits(make_micro_vit):
        whole = model(images)
        depth = StochasticDepth(model, 0.6, seed=0)
        depth.draw(images, 0, 0, 0)
        depth.show(0, 8)
        assert {float(factor) for factor in depth.factors.flatten()} <= {0.0, 1.0, *map(approximately, (0.7, 0.4))}
        tokens = model.patch_embed(images)
        tokens = torch.cat([model.cls_token.expand(8, -1, -1), tokens], 1) + model.pos_embed
        for block, (first, second) in zip(model.blocks, depth.factors[:, :, None, None].split(2), strict=True):
            tokens = tokens + first * block.attn(block.norm1(tokens))
            tokens = tokens + second * block.mlp(block.norm2(tokens))
        expected = model.head(model.norm(tokens)[:, 0])
        assert not torch.allclose(model(images), whole)
        torch.testing.assert_close(model(images), expected)
        torch.testing.assert_close(model.eval()(images), whole)  # only training drops


def approximately(keep):
    return float(torch.tensor(1 / keep))


def test_branches_are_dropped_as_often_as_the_rates_say(make_micro_vit):
    depth = StochasticDepth(make_micro_vit(depth=3), 0.5, seed=1)
    depth.draw(torch.zeros(4000, 1), 2, 3, 4)
    shares = (depth.factors == 0).float().mean(1)
    assert shares.tolist() == pytest.approx([0, 0, 0.25, 0.25, 0.5, 0.5], abs=0.03)
    assert depth.factors.mean(1).tolist() == pytest.approx([1] * 6, abs=0.06)
    first = depth.factors
    depth.draw(torch.zeros(4000, 1), 2, 3, 4)
    assert torch.equal(depth.factors, first)
    for key in ((1, 3, 4), (2, 2, 4), (2, 3, 5)):
        depth.draw(torch.zeros(4000, 1), *key)
        assert not torch.equal(depth.factors, first)


def test_each_part_of_an_accumulated_step_drops_its_own_images(house, tmp_path):
    run = make_run(tmp_path / "run", "--drop_path", "0.5", "--batch_size", "10", "--accum_steps", "2")
    run.begin_state()
    training, shown = StateTraining(run), []
    last = training.network.drop_path.paths[-1]
    last.register_forward_pre_hook(lambda path, _: shown.append(path.factor))
    training.step()
    assert [len(factor) for factor in shown] == [10, 10]
    assert torch.equal(torch.cat(shown), training.network.drop_path.factors[-1])
    assert not torch.equal(*shown)
    run.close()


@pytest.mark.usefixtures("float64")
def test_compact_and_masked_training_agree(seen):
    flags = f"{UNITS} {ALL} --pruning_times 2 --layer_decay 1".split()  # `seen` looks at one learning rate
    compact, masked = seen(*flags), seen(*flags, "--no-compact_training")
    assert compact.steps[1, 12].width < masked.steps[1, 12].width
    for key, step in compact.steps.items():
        assert largest_difference(step.weights, masked.steps[key].weights) < 1e-9, key


# -------------------------------------------------------------------------------------------------------- LayerScale
def test_layer_scale_is_timms_by_name_and_value(make_micro_vit, make_batch):
    timm = pytest.importorskip("timm.models.vision_transformer")
    ours, (images, _) = make_micro_vit(init_values=0.1), make_batch()
    geometry = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 2, "num_heads": 3, "mlp_ratio": 2}
    theirs = timm.VisionTransformer(num_classes=5, init_values=0.1, **geometry)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(images), theirs.eval()(images))
    fresh = VisionTransformer(init_values=0.25, depth=1, embed_dim=12)
    assert set(fresh.blocks[0].ls1.gamma.tolist()) == set(fresh.blocks[0].ls2.gamma.tolist()) == {0.25}
    assert not any("gamma" in name for name in make_micro_vit().state_dict())


@pytest.mark.parametrize("struct", ["rsst --vit_structured --vit_prune_target both", "imp"])
def test_layer_scale_stays_through_removal_export_and_reload(struct, train, monkeypatch):
    base = [flag for flag in MICRO if flag != "--no-export"]
    folder = train(f"--struct {struct} --rate 0.5 --pruning_times 2 --layer_scale 0.5 --opt adamw", "run", base)
    proof = json.loads((folder / "model" / "parity.json").read_text())
    assert proof["max_difference_float64"] < 1e-12
    small, config = export.load(folder / "model"), json.loads((folder / "model" / "config.json").read_text())
    assert config["vit"]["init_values"] == 0.5
    gamma = load(folder / "best.pt")["weights"]["blocks.1.ls2.gamma"]
    assert torch.equal(small.blocks[1].ls2.gamma, gamma)
    assert float((gamma - 0.5).abs().max()) > 0  # it learns
    dense = vit_micro(init_values=0.5)
    assert config["parameters"]["dense"] == sum(p.numel() for p in dense.parameters()) == WHOLE + 4 * 24
    snippet = (folder / "model" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    found = {}
    monkeypatch.chdir(folder / "model")
    exec(snippet, found)
    images = torch.randn(3, 3, 16, 16)
    torch.testing.assert_close(found["model"](images), small(images))


# ---------------------------------------------------------------------------------------------------------- averages
def averages_by_hand(flags, tmp_path, monkeypatch):
    """Runs the command; {(state, epoch): (average by hand, average of the run)} in dense shapes, and the folder."""
    monkeypatch.setattr(entry.report, "write", lambda _: None)
    hand, found = {}, {}

    def first(training):
        if training.progress.step == 0:
            hand.update(dense_shaped(training))

    def lerp(training):
        keep = min(0.9, (1 + training.progress.step) / (10 + training.progress.step))
        for name, value in dense_shaped(training).items():
            hand[name] = hand[name] * keep + value * (1 - keep)

    def mask(training):
        for name, kept in training.run.parameter_masks(training.progress.masks, training.progress.kept).items():
            hand[name] *= kept

    def compare(training):
        for name, (frozen, value) in training.network.frozen.items():  # what reads filters that are gone counts no more
            hand[name] = torch.where(frozen, value, hand[name])
        epoch = training.progress.step // training.run.round.steps_per_epoch - 1
        found[training.progress.state, epoch] = clones(hand), clones(training.run.average)

    with pytest.MonkeyPatch.context() as patch:
        wrap(patch, "step", before=first, after=lerp)
        wrap(patch, "cut", after=mask)
        wrap(patch, "end_epoch", after=compare)
        assert call([*MICRO, *flags.split(), "--save_dir", tmp_path / "run"]) == 0
    return found, tmp_path / "run"


@pytest.mark.parametrize("more", ["", slow("--no-compact_training"), "--opt adamw --lr 0.002 --mixup 1"])
def test_the_average_is_that_of_a_hand_loop_through_the_cut(more, house, tmp_path, monkeypatch):
    found, folder = averages_by_hand(f"{UNITS} --ema_decay 0.9 --pruning_times 2 {more}", tmp_path, monkeypatch)
    assert len(found) == 8
    for by_hand, average in found.values():
        assert largest_difference(average, by_hand) < 1e-5
    best, rows = load(folder / "best.pt"), metrics(folder)
    assert_same_tensors(best["weights"], found[1, best["epoch"]][1])  # what is kept is the average
    last = load(folder / "checkpoint.pt")
    assert_same_tensors(last["average"], found[1, 3][1])
    assert largest_difference(last["weights"], found[1, 3][1]) > 1e-6  # what goes on training is not
    kept = {key: sorted(ids) for key, ids in best["kept"].items()}
    for layer, ids in kept.items():
        rows_of_layer = "qkv" if layer.endswith("attn") else "fc1"
        assert not best["weights"][f"{layer}.{rows_of_layer}.weight"][dead_rows(layer, ids)].any()
    assert best["accuracy"] == max(row["val_accuracy"] for row in rows if row["state"] == 1 and row["epoch"] > 1)
    assert "ema: validated, selected, tested and exported is the average of the weights" in log_of(folder)


def test_the_average_is_what_is_validated_and_what_refill_measures_at_its_cut(house, tmp_path, around, monkeypatch):
    run = make_run(tmp_path / "run", *["--struct", "refill", "--vit_structured", "--rate", "0.5", "--ema_decay", "0.9"])
    run.begin_state()
    training, asked = StateTraining(run), []
    while not training.finished:
        training.step()
        if training.at_epoch_end:
            around("evaluate", before=lambda run, model, part: asked.append(model))
            training.end_epoch()
    assert {id(model) for model in asked} == {id(training.network.average.model)}
    dense = copy.deepcopy(run.dense)
    dense.load_state_dict(run.average)
    assert run.progress.history[-1]["val_accuracy"] == run.evaluate(dense, "val")["accuracy"]
    last = clones(run.dense.state_dict())
    run.end_state()
    run.begin_state()
    target = choose_target(run)
    asked = []
    monkeypatch.setattr(type(run), "evaluate", lambda run, model, part: asked.append(clones(model.state_dict())) or ONE)
    run.cut_at_once(target)
    masks = run.parameter_masks(*target)
    expected = {name: value * masks.get(name, 1) for name, value in run.average.items()}
    assert_same_tensors(asked[0], expected)
    assert_same_tensors(run.dense.state_dict(), {name: value * masks.get(name, 1) for name, value in last.items()})
    run.close()


ONE = {"accuracy": 1.0}


def test_filters_go_from_the_average_too(house, tmp_path, monkeypatch):
    flags = "--struct rsst --arch res20s --rate 0.4 --ema_decay 0.9 --pruning_times 2 --reg_finish 0.5 --epochs 2"
    found, _ = averages_by_hand(flags, tmp_path, monkeypatch)
    for by_hand, average in found.values():
        counts = [name for name in average if name.endswith("num_batches_tracked")]
        assert all(int(average.pop(name)) > 0 and by_hand.pop(name).any() for name in counts)
        assert largest_difference(average, by_hand) < 1e-4


# ------------------------------------------------------------------------------------------------------ distillation
TEACHING = "--struct refill --vit_structured --rate 0.5 --pruning_times 2"


def test_distillation_by_hand():
    logits = torch.tensor([[1.0, 2.0, -1.0], [0.5, 0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    loss = distillation(logits, teacher, 2.0)
    by_hand = 0.0
    for own, taught in zip(logits.detach().tolist(), teacher.tolist(), strict=True):
        p, q = ([math.exp(v / 2) / sum(math.exp(w / 2) for w in values) for v in values] for values in (taught, own))
        by_hand += 4 * sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) / 2
    assert float(loss.detach()) == pytest.approx(by_hand)
    (gradient,) = torch.autograd.grad(loss, logits)
    expected = 2 * ((logits / 2).softmax(1) - (teacher / 2).softmax(1)) / 2  # T^2 / T / B
    torch.testing.assert_close(gradient, expected)


def test_alpha_0_equals_no_teacher_bit_by_bit(train, tmp_path):
    without = left_by(train(TEACHING, "without"))
    silent = left_by(train(f"{TEACHING} --teacher self --kd_alpha 0", "silent"))
    outside = left_by(train(f"{TEACHING} --teacher {tmp_path}/without/best.pt --kd_alpha 0", "outside"))
    for found in (silent, outside):
        assert_same_tensors(found[0], without[0])
        assert found[1] == without[1]


def test_state_0_teaches_the_next_with_its_selected_weights(train, around):
    taught = []
    around("step", after=lambda training: taught.append((training.progress.state, training.run.teacher)))
    selected = {}

    def note(run):
        run.recorder.writer.wait()
        selected.setdefault(run.progress.state, load(run.save_dir / "best.pt")["weights"])

    around("end_state", before=note)
    folder = train(f"{TEACHING} --teacher self --ema_decay 0.9")
    assert {state for state, teacher in taught if teacher is not None} == {1}
    assert {state for state, teacher in taught if teacher is None} == {0}
    teacher = taught[-1][1].model
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert_same_tensors(teacher.state_dict(), load(folder / "teacher.pt"))
    assert_same_tensors(teacher.state_dict(), selected[0])
    assert "distillation: self teaches, with 0.5 of the loss at temperature 2" in log_of(folder)


def test_a_student_learns_the_teachers_answers_where_labels_count_nothing(train, noisy):
    """With alpha 1 the loss is the divergence from the teacher alone: zero where both are the same."""
    flags = f"--pruning_times 1 --epochs 1 --lr 1e-9 --warmup 0 --kd_alpha 1 --accum_steps 2 --teacher {noisy}"
    same = metrics(train(f"{flags} --init {noisy}", "same"))[0]["train_loss"]
    other = metrics(train(flags, "other"))[0]["train_loss"]
    assert abs(same) < 1e-5 < 1e-3 < other


def test_a_teacher_sees_the_images_of_its_student_in_their_order(house, tmp_path, noisy):
    run = make_run(tmp_path / "run", "--teacher", noisy, "--accum_steps", "2", "--batch_size", "10", "--mixup", "1")
    run.set_teacher(vit_micro())
    seen = {"student": [], "teacher": []}
    for name, model in (("student", run.dense), ("teacher", run.teacher.model)):
        model.register_forward_pre_hook(lambda _, images, name=name: seen[name].append(images[0].clone()))
    run.begin_state()
    StateTraining(run).step()
    assert len(seen["student"]) == 2
    assert torch.equal(torch.cat(seen["student"]), torch.cat(seen["teacher"]))
    run.close()


def test_who_can_teach(train, tmp_path):
    """A checkpoint, a file of weights, an exported model, a run; a checkpoint of another architecture."""
    folder = train(TEACHING, "teacher", [flag for flag in MICRO if flag != "--no-export"])
    small, dense, last = export.load(folder / "model"), vit_micro(), vit_micro()
    dense.load_state_dict(load(folder / "best.pt")["weights"])
    last.load_state_dict(load(folder / "checkpoint.pt")["weights"])
    torch.save(dense.state_dict(), tmp_path / "plain.pt")
    save_file(dense.state_dict(), tmp_path / "plain.safetensors")
    files = {folder / "checkpoint.pt": last, tmp_path / "plain.pt": dense, tmp_path / "plain.safetensors": dense}
    images = torch.randn(3, 3, 16, 16)

    for path, expected in {**files, folder / "model": small, folder: small}.items():
        args, student = parse("--teacher", path), vit_micro()
        before = torch.get_rng_state()
        teacher = named_teacher(args, DATASETS["digits"], student, export.load)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(teacher(images), expected.eval()(images))
    folder = train("--arch res20s --pruning_times 1 --epochs 1", "cnn")
    args = parse("--teacher", folder / "checkpoint.pt")
    assert hasattr(named_teacher(args, DATASETS["digits"], vit_micro(), export.load), "layer1")


# -------------------------------------------------------------------------------------------------- all of it, in runs
ALL = " ".join(
    [
        "--sched",
        "cosine",
        "--min_lr",
        "0.001",
        "--layer_decay",
        "0.7",
        "--mixup",
        "0.8",
        "--cutmix",
        "1",
        "--label_smoothing",
        "0.1",
        "--aug",
        "rand",
        "--ema_decay",
        "0.9",
        "--teacher",
        "self",
        "--kd_features",
        "0.7",
        "--kd_hard",
        "--layer_scale",
        "0.1",
        "--stem",
        "conv",
        "--drop_path",
        "0.3",
        "--accum_steps",
        "2",
        "--batch_size",
        "10",
    ]
)
UNITS = "--struct rsst --vit_structured --vit_prune_target both --rate 0.5 --epochs 4 --reg_finish 0.5"
FINISH = "--finish_epochs 2 --finish_on_all"


def left_by(folder):
    """All that a run leaves and that has to be the same."""
    content = load(folder / "checkpoint.pt")
    tensors = {name: content["weights"][name] for name in content["weights"]}
    for number, moments in content["moments"].items():
        tensors |= {f"{number}.{name}": value for name, value in moments.items()}
    best = load(folder / "best.pt")
    tensors |= {f"average.{name}": value for name, value in content["average"].items()}
    tensors |= {f"best.{name}": value for name, value in best["weights"].items()}
    return tensors, metrics(folder, drop=TIMES)


@pytest.fixture
def stopped(train, tmp_path):
    """stopped(flags, state, step): a run that is interrupted before this step and goes on leaves what another does."""

    def check(flags, state, step, base=MICRO):
        argv = [*base, *flags.split(), "--checkpoint_every", "1"]
        broken_off(argv, tmp_path / "broken", state, step)
        (found, rows), (expected, expected_rows) = map(left_by, (tmp_path / "broken", train("", "whole", argv)))
        assert_same_tensors(found, expected)
        assert rows == expected_rows

    return check


@pytest.mark.parametrize(("stop", "more"), [
    ((1, 4), ""), ((1, 10), ""), ((2, 4), FINISH), slow((1, 10), "--aug none"), slow((1, 10), "--ema_decay 0"),
])  # fmt: skip
def test_a_stopped_run_goes_on_to_the_same_bits(stop, more, stopped):
    """Before the cut, after it, in the finish; where a teacher's answers are kept; with the weights themselves."""
    stopped(f"{UNITS} {ALL} {more} --pruning_times 2", *stop)


@pytest.mark.parametrize(("finish", "stop"), [slow("", (1, 3)), (FINISH, (2, 3))])
def test_a_stopped_run_on_image_folders_goes_on_to_the_same_bits(finish, stop, stopped, tmp_path):
    data = picture_folder(tmp_path / "pictures")
    base = [*MICRO, "--dataset", "folder", "--data", str(data), "--workers", "0", "--img_size", "16"]
    stopped(f"{UNITS} {ALL} {finish} --pruning_times 2", *stop, base)


def test_folders_erase_to_the_mean(tmp_path):
    data = picture_folder(tmp_path)
    splits = load_dataset("folder", str(data), 16, 0.1, None)
    batches = {aug: make_batches(splits.train, splits.facts, 40, "cpu", 0, aug) for aug in ("strong", "rand")}
    plain, erased = (data.batch(0, 0, 0)[0] for data in batches.values())
    changed = (plain != erased).any(1)
    assert 2 <= int(changed.any((1, 2)).sum()) <= 20
    assert float(erased.abs().amax(1)[changed].max()) < 0.5 / 255 / min(splits.facts.std) * 1.01  # one level's rounding
