"""Depth: whole blocks and branches as units; what empty ones add is folded away, and fewer blocks compute the same."""

import itertools
import json
import math

import pytest
import timm
import torch
from micro import BOTH, DEPTH, MICRO, PRUNABLE, assert_same_tensors, card_model, load, rows_of, runner, vit_micro, wrap
from torch import nn

import export
from deployment.compaction import compact
from families import family_of
from families.branches import drop_empty_blocks_
from families.vit import VIT, vit_units
from models.resnet import res20s
from pruning.budget import emptied_levels, global_counts, levels_of
from pruning.depth import candidates, depth_count, rank_branches
from pruning.scores import score_units
from pruning.units import LayoutError, unit_masks

TIMM = {"img_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 4, "num_classes": 5}


def noisy(model):
    """Every parameter random, in float64."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def emptied(model, gone):
    """The ids that stay when all branches go whose keys start with one of `gone`; their weights are zero in `model`."""
    units = family_of(model).units(model)
    kept = {key: [] if key.startswith(gone) else list(range(group.count)) for key, group in units.items()}
    with torch.no_grad():
        for name, mask in unit_masks(units, kept, dict(model.named_parameters())).items():
            model.get_parameter(name).mul_(mask)
    return kept


def pictures(model):
    size = family_of(model).image_size(model)
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(2)).to(next(model.parameters()))


def vision(block=timm.models.vision_transformer.Block, **changes):
    return timm.models.VisionTransformer(**{**TIMM, "block_fn": block, **changes})


MODELS = {
    "ours": lambda: vit_micro(depth=4),
    "LayerScale": lambda: vit_micro(depth=4, init_values=0.1),
    "registers": lambda: vision(reg_tokens=3, init_values=0.1),
    "positions of patches only": lambda: vision(reg_tokens=2, no_embed_class=True),
    "no class token": lambda: vision(class_token=False, global_pool="avg"),
    "no positions": lambda: vision(pos_embed="none"),
    "parallel branches": lambda: vision(timm.models.vision_transformer.ParallelThingsBlock),
    "RoPE": lambda: timm.models.Eva(
        **TIMM | {"embed_dim": 32}, use_rot_pos_emb=True, use_abs_pos_emb=False, init_values=0.1
    ),
    "BEiT": lambda: timm.models.Beit(**TIMM, init_values=0.1),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("gone", [(0,), (0, 1, 3), (2,), (0, 1, 2)], ids=str)
def test_without_its_empty_blocks_a_model_computes_the_same(name, gone):
    model = noisy(MODELS[name]())
    kept = emptied(model, tuple(f"blocks.{index}." for index in gone))
    small, ids = compact(model, kept)
    assert small.blocks_left == [index for index in range(4) if index not in gone]
    assert len(small.blocks) == 4 - len(gone)
    assert ids == kept
    images = pictures(model)
    expected = model(images)
    assert (small(images) - expected).abs().max() < 1e-12 * max(1, expected.abs().max())
    # empty blocks do add something
    for parameter in model.blocks[gone[0]].parameters():
        nn.init.zeros_(parameter)
    assert (model(images) - expected).abs().max() > 1e-6


@pytest.mark.parametrize(("make", "stay"), [
    (lambda: vision(pre_norm=True), [0, 2]),  # a norm in front of all blocks: the second block goes into the first
    (lambda: vision(timm.models.vision_transformer.ResPostBlock, init_values=0.1), None),  # a norm behind branches
])  # fmt: skip
def test_blocks_stay_where_nothing_can_take_what_they_add(make, stay):
    model = noisy(make())
    kept = emptied(model, ("blocks.0.", "blocks.1.", "blocks.3."))
    small, _ = compact(model, kept)
    assert getattr(small, "blocks_left", None) == stay
    images = pictures(model)
    torch.testing.assert_close(small(images), model(images), rtol=1e-12, atol=1e-12)


def test_a_factor_of_zero_takes_nothing_and_one_branch_of_two_stays():
    model = noisy(vit_micro(depth=3, init_values=0.1))
    with torch.no_grad():
        model.blocks[0].ls2.gamma[5] = 0
    kept = emptied(model, ("blocks.1.", "blocks.2.mlp"))
    small, _ = compact(model, kept)
    assert len(small.blocks) == 3
    assert not hasattr(small, "blocks_left")
    with torch.no_grad():
        for branch in ("attn.proj", "mlp.fc2"):
            small.get_submodule(f"blocks.1.{branch}").bias[5] = 0
            model.get_submodule(f"blocks.1.{branch}").bias[5] = 0
    drop_empty_blocks_(small, VIT.branches(small))
    assert small.blocks_left == [0, 2]
    torch.testing.assert_close(small(pictures(model)), model(pictures(model)), rtol=1e-12, atol=1e-12)


def test_one_block_stays_of_a_model_that_has_nothing_else():
    model = noisy(vit_micro())
    small, _ = compact(model, emptied(model, "blocks."))
    assert small.blocks_left == [1]
    torch.testing.assert_close(small(pictures(model)), model(pictures(model)), rtol=1e-12, atol=1e-12)


# ------------------------------------------------------------------------------------------ scores
@pytest.mark.parametrize("init_values", [None, 0.1])
def test_a_branch_is_scored_by_what_it_adds(init_values):
    model = noisy(vit_micro(init_values=init_values))
    branches = VIT.branches_as_units(model)
    assert list(branches) == list(vit_units(model))
    images, labels = pictures(model), torch.tensor([0, 1, 2])
    seen = {}
    for name in branches:
        layer = model.get_submodule(name)
        layer.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out}))
    l1 = score_units(model, branches, "l1", batches=[(images, labels)])
    for key, score in l1.items():
        path, _, leaf = key.rpartition(".")
        output = model.get_submodule(f"{key}.{'proj' if leaf == 'attn' else 'fc2'}")
        scale = getattr(model.get_submodule(path), "ls1" if leaf == "attn" else "ls2")
        factors = getattr(scale, "gamma", torch.ones(24).double())
        expected = ((seen[key] - output.bias) * factors).abs().mean()
        torch.testing.assert_close(score, expected[None].detach())
    weights = score_units(model, branches, "magnitude")
    for key, score in weights.items():
        layers = [module.weight for module in model.get_submodule(key).modules() if isinstance(module, nn.Linear)]
        torch.testing.assert_close(score, sum(weight.abs().sum() for weight in layers)[None].detach())
    # together the units of a branch are worth no more than one by one
    together, single = (
        score_units(model, units, "saliency", batches=[(images, labels)]) for units in (branches, vit_units(model))
    )
    assert all(0 < together[key] <= single[key].sum() for key in branches)


def test_saliency_of_a_branch_is_the_slope_of_the_loss_as_it_fades():
    model = noisy(vit_micro(init_values=0.1))
    image, label = pictures(model)[:1], torch.tensor([3])
    scores = score_units(model, VIT.branches_as_units(model), "saliency", batches=[(image, label)])
    for key, score in scores.items():
        output = model.get_submodule(f"{key}.{'proj' if key.endswith('attn') else 'fc2'}")
        weight, losses = output.weight.detach().clone(), []
        for factor in (1 + 1e-5, 1 - 1e-5):
            output.weight.data = factor * weight
            losses.append(nn.functional.cross_entropy(model(image), label).detach())
        output.weight.data = weight
        torch.testing.assert_close(score[0], ((losses[0] - losses[1]) / 2e-5).abs(), rtol=1e-6, atol=1e-9)


def test_what_has_no_branches_of_its_own_is_refused_by_name():
    shared = vision(timm.models.vision_transformer.ParallelScalingBlock)
    with pytest.raises(LayoutError, match="blocks.0 computes attention and MLP in the same layers"):
        family_of(shared).branches_as_units(shared)
    cnn = res20s(num_classes=5)
    with pytest.raises(LayoutError, match="no attention and MLP"):
        family_of(cnn).branches_as_units(cnn)


# ------------------------------------------------------------------------------------------ ranking
def brute_force(values, count, target):
    """The best subset of that many, by its sum; with branches one of each kind at least."""
    best = max(
        (set(some) for some in itertools.combinations(values, count)
         if target == "block" or len({key.rpartition(".")[2] for key in some}) == 2),
        key=lambda some: sum(values[key] for key in some),
    )  # fmt: skip
    return best


@pytest.mark.parametrize("target", ["block", "branch"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.5, 0.75, 0.99])
def test_the_best_blocks_and_branches_stay(target, ratio):
    model = vit_micro(depth=4)
    branches, generator = VIT.branches_as_units(model), torch.Generator().manual_seed(5)
    # attentions are worth far less, and one has to stay nevertheless
    scores = {
        key: torch.rand(1, generator=generator, dtype=torch.float64) * (0.01 if key.endswith("attn") else 1)
        for key in branches
    }
    whole = {key: list(range(group.count)) for key, group in vit_units(model).items()}
    kept = rank_branches(branches, scores, target, ratio, whole)
    groups = candidates(branches, target)
    values = {name: float(sum(scores[key] for key in keys)) for name, keys in groups.items()}
    count = max(1 if target == "block" else 2, math.floor(len(groups) * (1 - ratio) + 1e-9))
    stays = {key for name in brute_force(values, count, target) for key in groups[name]}
    assert kept == {key: ids if key in stays else [] for key, ids in whole.items()}
    # what is gone does not come back, however good it is now
    better = {key: score + 10 * (key not in stays) for key, score in scores.items()}
    assert rank_branches(branches, better, target, ratio, kept) == kept


def test_counts_by_hand():
    assert [depth_count(12, "block", ratio) for ratio in (0, 0.25, 0.5, 0.7, 0.95)] == [12, 9, 6, 3, 1]
    assert [depth_count(24, "branch", ratio) for ratio in (0.5, 0.99)] == [12, 2]
    parallel = vision(timm.models.vision_transformer.ParallelThingsBlock, depth=1)
    keys = ["blocks.0.attns.0.attn", "blocks.0.attns.1.attn", "blocks.0.ffns.0.mlp", "blocks.0.ffns.1.mlp"]
    assert candidates(VIT.branches_as_units(parallel), "block") == {"blocks.0": keys}


@pytest.mark.parametrize("worth", [None, 4.0])
def test_a_branch_goes_whole_where_it_is_worth_little_together(worth):
    units = vit_units(vit_micro(), ("head",))
    scores = {
        "blocks.0.attn": torch.tensor([8.0, 1, 9, 9]).double(),
        "blocks.1.attn": torch.tensor([5.0, 6, 7, 20]).double(),
    }
    worth = {} if worth is None else {"blocks.0.attn": torch.tensor([worth]), "blocks.1.attn": torch.tensor([30.0])}
    levels = emptied_levels(levels_of(units, scores), units, scores, worth)
    assert levels == {"blocks.0.attn": [4, 3, 2, 1, 0], "blocks.1.attn": [4, 3, 2, 1]}

    def cost(counts):
        return sum({"blocks.0.attn": 4, "blocks.1.attn": 4, **counts}.values())

    counts = global_counts(scores, levels, cost, 4, worth)
    # one by one 1, 5, 6 and 7 are the lowest; together those of attention 0 are worth 1 each
    assert counts == ({"blocks.0.attn": 0, "blocks.1.attn": 4} if worth else {"blocks.0.attn": 3, "blocks.1.attn": 1})


# ------------------------------------------------------------------------------------------ runs
@pytest.fixture
def run(house, tmp_path, capsys):
    return runner(tmp_path, capsys, [word for word in MICRO if word != "--no-export"])


BLOCK = (*BOTH[:2], "block")


def test_rsst_fades_a_block_and_exports_fewer(run):
    done = run("--struct", "rsst", *BLOCK, "--rate", 0.5, "--min_units", 0, "--epochs", 4, "--reg_finish", 0.5)
    assert "note: --min_units: has no effect where blocks are ranked over the whole model" in done.out
    assert "1 of 2 blocks stay" in done.out
    rows = rows_of(done.dir / "states.csv")
    assert [float(row["density"]) for row in rows] == [1, 0.5, 0.5]
    cut = next(row for row in rows if row["residual"])
    assert float(cut["residual"]) < 1e-6
    assert cut["accuracy_before_cut"] == cut["accuracy_after_cut"]
    folder = done.dir / "model"
    config = json.loads((folder / "config.json").read_text())
    assert config["vit"]["depth"] == len(config["heads"]) == len(config["blocks"]) == DEPTH // 2
    kept = load(done.dir / "checkpoint.pt")["run"]["kept"]
    assert config["kept_heads"] == [kept[f"blocks.{block}.attn"] for block in range(DEPTH)]
    small = export.load(folder)
    assert sum(p.numel() for name, p in small.named_parameters() if name.endswith(("qkv.weight", "proj.weight"))
               and "blocks" in name) + 2 * 24 * sum(config["neurons"]) == PRUNABLE // 2  # fmt: skip
    # the lines of the card, with plain timm
    card = (folder / "README.md").read_text()
    assert f"Blocks of the dense model that are left, counted from 0: {config['blocks']}" in card
    loaded, code = card_model(folder)
    assert len(code.splitlines()) <= 20
    images = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(loaded(images), small(images), rtol=1e-5, atol=1e-5)
    assert type(loaded).__module__ == "timm.models.vision_transformer"


@pytest.mark.parametrize(("target", "criterion"), [("branch", "remain"), ("all", "saliency")])
def test_a_resumed_run_drops_the_same_branches(run, monkeypatch, target, criterion):
    flags = ("--struct", "refill", *BOTH[:2], target, "--rate", 0.5, "--criteria", criterion)
    whole = run(*flags, name="whole")

    def interrupt(training):
        if training.progress.state == 1 and training.progress.step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        wrap(patch, "step", after=interrupt)
        broken = run(*flags, name="broken", code=130)
    run("--resume", name="broken", base=())
    last, resumed = (load(folder / "checkpoint.pt") for folder in (whole.dir, broken.dir))
    assert_same_tensors(resumed["weights"], last["weights"])
    kept = last["run"]["kept"]
    assert resumed["run"]["kept"] == kept
    if target == "branch":
        assert sum(not ids for ids in kept.values()) == DEPTH  # of 2 x DEPTH branches
        assert all(len(ids) in (0, 4, 48) for ids in kept.values())
    proof = json.loads((whole.dir / "model" / "parity.json").read_text())
    assert proof["max_difference_float64"] <= proof["bound"]


def test_a_plan_counts_blocks(run):
    out = run("--struct", "refill", *BLOCK, "--rate", 0.5, "--dry_run").out
    assert "Which blocks go is up to the scores; here it is the last ones. All cost the same." in out
    assert [line.split()[2] for line in out.splitlines() if "%" in line] == ["2", "1", "1"]
    branches = run("--struct", "refill", *BOTH[:2], "branch", "--rate", 0.5, "--dry_run").out
    assert "of attentions and MLPs the same share. One costs" in branches
