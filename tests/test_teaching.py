"""What a teacher teaches beyond its logits: the features behind its last block, and the second head of a distilled
DeiT. Off it changes nothing; the laws of logits alone stand in test_recipes.py."""

import json
from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F
from micro import (
    DIM,
    MICRO,
    TOKENS,
    assert_same_tensors,
    clones,
    largest_difference,
    load,
    log_of,
    make_run,
    metrics,
    vit_micro,
)
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer

import export
import main_imp_fillback as entry
import models
from dataset import DATASETS
from engine import distill
from engine.distill import Answering, Renormalised, Teacher, named_teacher
from engine.model import has_two_heads
from engine.objective import Answer, Objective, cross_entropy, distillation, feature_distance
from engine.training import StateTraining
from families import family_of
from models.resnet import ResNet
from pruning.removal import remove_units
from utils import RunError

TEACHING = "--struct refill --vit_structured --rate 0.5 --pruning_times 2"
DISTILLED = "deit_tiny_distilled_patch16_224"
GEOMETRY = {"img_size": 16, "patch_size": 8, "embed_dim": DIM, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0}


def deit_micro(num_classes=None, img_size=None):
    arguments = {**GEOMETRY, "num_classes": num_classes or 10, "img_size": img_size or 16}
    model = timm.create_model(DISTILLED, **arguments)
    model.arch_name, model.arch_args, model.pretrained_report = f"timm/{DISTILLED}", arguments, None
    return model


@pytest.fixture
def deit(monkeypatch):
    """`--arch deit_micro`: a distilled DeiT of the micro model's size."""
    monkeypatch.setitem(models.BUILDERS, "deit_micro", deit_micro)


def numbers(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------------------- features: the loss
def test_the_distance_of_two_tokens_by_hand():
    """Two channels become -1 and 1: equal tokens are 0 apart, opposite ones 4, (2^2 + 2^2) / 2."""
    student = torch.tensor([[[1.0, 3.0], [20.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.0, 5.0], [5.0, 9.0]]], dtype=torch.float64)
    assert float(feature_distance(student, teacher)) == pytest.approx((0 + 4) / 2, abs=1e-4)
    # three channels: (-1, 0, 1) sqrt(3/2) and (0, -1, 1) sqrt(3/2) are correlated by 1/2
    student, teacher = (torch.tensor([[row]], dtype=torch.float64) for row in ([1.0, 2.0, 3.0], [5.0, 2.0, 8.0]))
    assert float(feature_distance(student, teacher)) == pytest.approx(2 * (1 - 0.5), abs=1e-4)


def test_a_teacher_that_equals_the_student_in_all_but_scale_is_not_far():
    features = numbers(2, 3, 8).requires_grad_()
    same = feature_distance(features, features.detach())
    (gradient,) = torch.autograd.grad(same, features)
    assert float(same.detach()) == 0
    assert not gradient.any()
    assert float(feature_distance(features.detach() * 7 + 3, features.detach())) < 1e-9
    assert float(feature_distance(-features.detach(), features.detach())) == pytest.approx(4, rel=1e-4)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_features_add_their_weight_to_what_the_logits_cost(alpha):
    logits, taught, own, features = numbers(4, 5), numbers(4, 5, seed=1), numbers(4, 3, 8), numbers(4, 3, 8, seed=2)
    labels = torch.tensor([0, 1, 4, 2])
    without = Objective(0.1, alpha, 2.0)(Answer((logits,)), labels, taught)
    expected = (1 - alpha) * F.cross_entropy(logits, labels, label_smoothing=0.1)
    expected += alpha * distillation(logits, taught, 2.0) if alpha else 0
    torch.testing.assert_close(without, expected, rtol=0, atol=0)
    found = Objective(0.1, alpha, 2.0, features=0.7)(Answer((logits,), own), labels, taught, features)
    torch.testing.assert_close(found, without + 0.7 * feature_distance(own, features))


def test_a_hard_teacher_is_a_label_without_smoothing():
    logits, taught, labels = numbers(4, 5), numbers(4, 5, seed=1), torch.tensor([0, 1, 4, 2])
    found = Objective(0.1, 0.25, hard=True)(Answer((logits,)), labels, taught)
    by_label = -logits.log_softmax(1)[range(4), taught.argmax(1)].mean()
    torch.testing.assert_close(found, 0.75 * cross_entropy(logits, labels, 0.1) + 0.25 * by_label)


# ---------------------------------------------------------------------------------------- features: whose, and of whom
SWIN = {"img_size": 32, "embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4, "patch_size": 2}
NETWORKS = {
    "ours": (vit_micro, lambda model, tokens: model.head(tokens[:, 0]), (5, DIM)),
    "distilled": (deit_micro, lambda m, t: (m.head(t[:, 0]) + m.head_dist(t[:, 1])) / 2, (6, DIM)),
    "registers": (
        lambda: timm.create_model("vit_small_patch16_dinov3", **{**GEOMETRY, "num_heads": 3}, num_classes=10),
        lambda model, tokens: model.head(tokens[:, 5:].mean(1)),
        (1 + 4 + 4, DIM),
    ),
    "averaged": (
        lambda: Eva(**GEOMETRY, num_classes=10),
        lambda model, tokens: model.head(model.fc_norm(tokens[:, 1:].mean(1))),
        (5, DIM),
    ),
    "Swin": (
        lambda: SwinTransformer(**SWIN, num_classes=10),
        lambda model, tokens: model.head.fc(tokens.mean(1)),
        (8 * 8, 16),
    ),
    "ResNet": (
        lambda: ResNet((1, 1), (4, 6), projected=False, img_size=16),
        lambda model, tokens: model.fc(tokens.mean(1)),
        (8 * 8, 6),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize(("build", "classify", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_the_classifier_reads_the_features_and_small_networks_have_as_many(build, classify, shape, add_noise):
    model = add_noise(build()).eval()
    family = family_of(model)
    images = torch.randn(2, 3, family.image_size(model), family.image_size(model))
    plain, answer = Answering(model)(images), Answering(model, features=True)(images)
    assert plain.features is None
    assert torch.equal(plain.logits, model(images))
    assert torch.equal(answer.logits, model(images))
    assert answer.features.shape == (2, *shape)
    torch.testing.assert_close(classify(model, answer.features), model(images))
    units = family.units(model)
    remove_units(model, units, {key: [0] for key, group in units.items() if group.removable})
    assert Answering(model, features=True)(images).features.shape == (2, *shape)


@pytest.mark.parametrize(("build", "heads"), [(vit_micro, 1), (deit_micro, 2)])
def test_a_compiled_network_gives_the_same_answer_in_one_graph(build, heads, add_noise):
    model, images = add_noise(build()).train(), torch.randn(2, 3, 16, 16)
    if heads == 2:
        model.set_distilled_training(True)
    eager = Answering(model, features=True)
    compiled = torch.compile(eager, backend="eager", fullgraph=True)
    answers = [network(images) for network in (eager, compiled)]
    assert [len(answer.heads) for answer in answers] == [heads, heads]
    for expected, found in zip(*([*answer.heads, answer.features] for answer in answers), strict=True):
        torch.testing.assert_close(found, expected)
    assert answers[1].features.requires_grad
    torch.compiler.reset()


@torch.no_grad()
def test_features_of_a_teacher_with_its_own_normalisation_are_of_the_images_that_it_wants():
    model, facts, images = vit_micro().eval(), DATASETS["cifar10"], torch.randn(2, 3, 16, 16)
    seen = Renormalised(model, facts, (0.5, 0.4, 0.3), (0.5, 0.2, 0.1))
    answer = Answering(seen, features=True)(images)
    assert torch.equal(answer.features, model.forward_features(images * seen.scale + seen.bias))
    assert torch.equal(answer.logits, seen(images))


def test_lessons_hold_features_and_small_ones_are_kept(house, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", "--aug", "none")
    model = vit_micro()
    lessons = partial(Teacher, model, run.round.data, torch.zeros(1), None, features=True)
    kept, fresh = lessons(True), lessons(False)
    images = len(run.round.data)
    bytes_of_all = images * TOKENS * DIM * 4
    monkeypatch.setattr(distill, "MOST_KEPT", bytes_of_all)
    assert [len(table) for table in lessons(True).tables] == [images, images]
    monkeypatch.setattr(distill, "MOST_KEPT", bytes_of_all - 1)
    assert lessons(True).tables == ()
    for step in range(2):
        images, _ = run.round.data.batch(1, 1, step)
        expected = model(images), model.forward_features(images)
        torch.testing.assert_close(kept.outputs(images, 2, 1, 1, step), expected)
        torch.testing.assert_close(fresh.outputs(images, 2, 1, 1, step), expected)
    run.close()


@pytest.mark.usefixtures("house")
def test_a_teacher_with_other_features_is_refused(tmp_path):
    args = entry.parse_args([*MICRO, "--teacher", str(tmp_path), "--kd_features", "2"])
    for teacher, words in {
        vit_micro(embed_dim=12): "5 tokens of 24 channels .* 5 tokens of 12 channels",
        vit_micro(patch_size=4): "5 tokens of 24 channels .* 17 tokens of 24 channels",
        deit_micro(): "5 tokens of 24 channels .* 6 tokens of 24 channels",
        timm.create_model("test_resnet", num_classes=10): "no transformer blocks",
    }.items():
        with pytest.raises(RunError, match=f"--kd_features 2: .*{words}"):
            named_teacher(args, DATASETS["digits"], vit_micro(), lambda _, found=teacher: found)
    args.kd_features = None
    assert named_teacher(args, DATASETS["digits"], vit_micro(), lambda _: vit_micro(embed_dim=12)) is not None


# ------------------------------------------------------------------------------------------------ features: in a run
def step_once(folder, model, *flags, teacher):
    """Loss and weights after one step at learning rate 0.05 that this teacher has a share in."""
    run = make_run(folder, "--teacher", __file__, "--warmup", "0", *flags)
    run.dense.load_state_dict(model.state_dict())
    run.set_teacher(teacher)
    run.begin_state()
    training = StateTraining(run)
    training.step()
    run.close()
    return float(training.sums[0]), clones(run.dense.state_dict())


@pytest.mark.usefixtures("house", "float64")
def test_in_parts_the_features_cost_what_they_cost_at_once(tmp_path, add_noise):
    student, teacher = add_noise(vit_micro()), add_noise(vit_micro(), seed=1)
    step = partial(step_once, tmp_path / "run", student, "--kd_features", "3", "--mixup", "0.5")
    (whole, weights), (parts, others) = (
        step("--batch_size", size, "--accum_steps", parts, teacher=teacher) for size, parts in (("21", "1"), ("7", "3"))
    )
    assert parts == pytest.approx(whole, abs=1e-9)
    assert largest_difference(weights, others) < 1e-9
    without, before = step_once(tmp_path / "run", student, "--batch_size", "21", "--mixup", "0.5", teacher=teacher)
    assert whole > without + 1  # of noise and noise the distance is about 2
    assert largest_difference(weights, before) > 1e-3


def test_weight_0_equals_no_features_bit_by_bit(train):
    flags = f"{TEACHING} --teacher self"
    without, off = train(flags, "without"), train(f"{flags} --kd_features 0", "off")
    on = train(f"{flags} --kd_features 1", "on")
    weights = [load(folder / "checkpoint.pt")["weights"] for folder in (without, off, on)]
    assert_same_tensors(weights[1], weights[0])
    assert not torch.equal(weights[2]["blocks.0.mlp.fc1.weight"], weights[0]["blocks.0.mlp.fc1.weight"])
    assert "at temperature 2 and its features at weight 1\n" in log_of(on)
    assert "features" not in log_of(off)


def test_who_teaches_nobody_leaves_no_file(train, capsys):
    silent = train(f"{TEACHING} --teacher self --kd_alpha 0 --epochs 1", "silent")
    assert not (silent / "teacher.pt").exists()
    assert "note: --teacher: has no effect with --kd_alpha 0 and no --kd_features" in log_of(silent)
    alone = train(f"{TEACHING} --teacher self --kd_alpha 0 --kd_features 1 --kd_hard --epochs 1 --aug none", "alone")
    assert (alone / "teacher.pt").exists()
    assert "note: --kd_hard: has no effect with --kd_alpha 0" in log_of(alone)
    assert "and its features at weight 1; its logits and features are kept" in log_of(alone)
    assert [row["state"] for row in metrics(alone)] == [0, 1]


# ---------------------------------------------------------------------------------------------------------- two heads
@pytest.mark.parametrize("hard", [False, True])
def test_each_head_has_its_own_master(hard, add_noise):
    """The class head hears nothing of the teacher, the distillation head nothing of the labels."""
    model = add_noise(deit_micro()).double().train()
    model.set_distilled_training(True)
    images = numbers(4, 3, 16, 16)
    objective = Objective(0.1, 0.4, None if hard else 2.0, hard)

    def gradients(labels, taught):
        loss = objective(Answering(model)(images), torch.tensor(labels), taught)
        return torch.autograd.grad(loss, (model.head.weight, model.head_dist.weight))

    (head, dist), taught = gradients([0, 1, 2, 3], numbers(4, 10)), numbers(4, 10)
    other_head, other_dist = gradients([4, 5, 6, 7], taught)
    assert not torch.equal(other_head, head)
    assert torch.equal(other_dist, dist)
    other_head, other_dist = gradients([0, 1, 2, 3], -taught)
    assert torch.equal(other_head, head)
    assert not torch.equal(other_dist, dist)
    # by hand: the softmax of a linear head
    tokens = model.forward_features(images).detach()
    wanted = torch.full((4, 10), 0.01, dtype=torch.float64)
    wanted[range(4), range(4)] = 0.91
    error = model.head(tokens[:, 0]).softmax(1) - wanted
    torch.testing.assert_close(head, 0.6 * (error.T @ tokens[:, 0]) / 4)


def test_without_a_teacher_both_heads_learn_from_the_labels():
    heads, labels = (numbers(4, 5).requires_grad_(), numbers(4, 5, seed=1).requires_grad_()), torch.tensor([0, 1, 4, 2])
    loss = Objective(0.1)(Answer(heads), labels)
    assert loss.item() == pytest.approx(sum(cross_entropy(head, labels, 0.1).item() for head in heads) / 2)
    for head, gradient in zip(heads, torch.autograd.grad(loss, heads), strict=True):
        (alone,) = torch.autograd.grad(cross_entropy(head, labels, 0.1), head)
        torch.testing.assert_close(gradient, alone / 2)
    torch.testing.assert_close(Answer(heads).logits, (heads[0] + heads[1]) / 2)
    # a teacher whose logits count nothing is none
    assert Objective(0.1, 0.0, 2.0)(Answer(heads), labels, numbers(4, 5)).item() == loss.item()


def test_networks_of_a_run_give_both_heads_in_training_and_their_mean_in_evaluation(house, deit, tmp_path):
    run = make_run(tmp_path / "run", "--arch", "deit_micro", "--vit_structured", "--rate", "0.5", "--ema_decay", "0.9")
    assert has_two_heads(run.dense)
    assert not has_two_heads(vit_micro())
    run.progress.kept = {key: [0, 2] for key in run.progress.kept}
    run.begin_state()
    training = StateTraining(run)
    assert training.network.model is not run.dense
    images = torch.randn(2, 3, 16, 16)
    for model in (training.network.model, training.network.selected, run.dense):
        assert len(model.train()(images)) == 2
        tokens = model.eval().forward_features(images)
        mean = (model.head(tokens[:, 0]) + model.head_dist(tokens[:, 1])) / 2
        torch.testing.assert_close(model(images), mean)
    run.close()


@pytest.mark.parametrize("fc", ["", "--fc"])
def test_a_distilled_model_is_taught_pruned_rewound_and_exported(fc, train, deit, around):
    """Both heads are the classifier, which stays where all else rewinds, but for --fc."""
    trained, started, ended = {}, {}, {}
    base = [flag for flag in MICRO if flag != "--no-export"]
    flags = f"{TEACHING} --arch deit_micro --teacher self --kd_features 0.5 --epochs 1 --weight_decay 0.1 {fc}"
    around("cut_at_once", before=lambda run, target: trained.update(clones(run.dense.state_dict())))
    around("rewind", after=lambda run: started.update(clones(run.dense.state_dict())))
    around("end_state", before=lambda run: ended.update(clones(run.dense.state_dict())))
    folder = train(flags, "run", base)
    first = load(folder / "init.pt")
    for name in ("head.weight", "head.bias", "head_dist.weight", "head_dist.bias"):
        assert torch.equal(started[name], first[name] if fc else trained[name]), name
        assert not torch.equal(trained[name], first[name])
        assert ended[name].all()  # no mask is on them
    for name in ("dist_token", "cls_token", "norm.weight"):
        assert torch.equal(started[name], first[name]), name
    assert "only the head of the distillation token sees its logits" in log_of(folder)
    small, best = export.load(folder / "model").eval(), deit_micro().eval()
    best.load_state_dict(load(folder / "best.pt")["weights"])
    images = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(small(images), best(images), rtol=0, atol=1e-5)
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["macs"]["dense"] == DEIT_MACS


TOKENS_OF_DEIT = 6
BLOCK_MACS = TOKENS_OF_DEIT * (4 * DIM * DIM + 2 * DIM * 2 * DIM) + 2 * TOKENS_OF_DEIT**2 * DIM
DEIT_MACS = 4 * 3 * 8 * 8 * DIM + 2 * BLOCK_MACS + 2 * DIM * 10  # both heads are counted
