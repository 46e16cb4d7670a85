"""Laws of token merging: what merges, that it counts as much as before, what it costs, and that runs with it export."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from micro import DEPTH, DIM, HEAD_DIM, HEADS, HIDDEN, MICRO, assert_one_line, assert_same_tensors, call, load, log_of

# isort: split
from micro import metrics, rows_of, vit_micro

import export
import main_imp_fillback as entry
from deployment.compaction import compact, parity
from engine.distill import Answering
from families import family_of
from families.vit import vit_macs
from models import build_model
from models.merging import choices, match, matching_macs, merge, merge_tokens_, token_counts, unmerged
from pruning.scores import score_units
from pruning.units import unit_masks

UNITS = "--struct rsst --vit_structured --vit_prune_target both --rate 0.5 --pruning_times 2"
# of timm's: a distilled DeiT, QK norm and LayerScale with a pool of all patches, an attention pool, registers
TIMM = {
    "deit_tiny_distilled_patch16_224": {},
    "vit_base_patch16_224": {"qk_norm": True, "init_values": 0.5, "global_pool": "avg", "class_token": False},
    "vit_base_patch16_siglip_224": {},
    "vit_small_patch14_reg4_dinov2": {"patch_size": 16},
}


def timm_vit(name, **options):
    torch.manual_seed(4)
    sizes = {"img_size": 64, "embed_dim": 24, "depth": 2, "num_heads": 4, "num_classes": 5}
    return timm.create_model(name, **{**sizes, **TIMM[name], **options})


def micro(tokens=0, pixels=32, dtype=torch.float64, add_noise=None, **overrides):
    torch.manual_seed(4)
    model = vit_micro(5, pixels, **overrides)
    return merge_tokens_(add_noise(model) if add_noise else model, tokens).to(dtype).eval()


def images_of(model, count=3, seed=0):
    size, dtype = family_of(model).image_size(model), next(model.parameters()).dtype
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def chosen_by(model, images):
    seen = []
    with choices(model, lambda _, choice: seen.append(choice) or choice):
        model(images)
    return seen


# ------------------------------------------------------------------------------------------------------ what merges
def match_by_loops(metric, count, prefix):
    """The paper's matching of one image, pair by pair."""
    patches = list(range(prefix, len(metric)))
    edges = []
    for a in patches[::2]:
        similar = [float(F.cosine_similarity(metric[a], metric[b], dim=0)) for b in patches[1::2]]
        best = max(range(len(similar)), key=lambda j: (round(similar[j], 12), -j))
        edges.append((-round(similar[best], 12), a, patches[1::2][best]))
    return sorted((a, b) for _, a, b in sorted(edges)[:count])


@pytest.mark.parametrize(("tokens", "prefix", "count"), [(10, 1, 3), (11, 1, 5), (9, 0, 4), (7, 4, 1)])
def test_matching_is_the_papers(tokens, prefix, count):
    generator = torch.Generator().manual_seed(tokens)
    metric = torch.randint(-2, 3, (6, tokens, 2), generator=generator).double()  # of few values: many are equal
    found = match(metric, count, prefix)
    assert found.shape == (6, 2, count)
    for image, choice in zip(metric, found, strict=True):
        assert [tuple(pair) for pair in choice.T.tolist()] == match_by_loops(image, count, prefix)


def test_an_average_goes_by_sizes():
    x = torch.arange(12, dtype=torch.float64).view(1, 6, 2)
    first, size, place = merge(x, None, torch.tensor([[[1, 3], [2, 2]]]))
    assert first.tolist() == [[[0, 1], [4, 5], [8, 9], [10, 11]]]  # tokens 1, 2 and 3 lie around 2
    assert (size.tolist(), place.tolist()) == ([[1, 3, 1, 1]], [[0, 1, 1, 1, 2, 3]])
    second, size, place = merge(first, size, torch.tensor([[[1], [2]]]))
    torch.testing.assert_close(second[0, 1], torch.tensor([3 * 4 + 8, 3 * 5 + 9], dtype=torch.float64) / 4)
    assert (size.tolist(), place.tolist()) == ([[1, 4, 1]], [[0, 1, 1, 2]])


def test_what_is_no_number_merges_no_more_than_others():
    metric = torch.full((2, 9, 3), float("nan"))
    assert match(metric, 3, 1).tolist() == [[[1, 3, 5], [2, 2, 2]]] * 2


def test_zero_is_the_model_itself(add_noise):
    plain = micro(add_noise=add_noise)
    merged = micro(2, add_noise=add_noise)
    assert type(merge_tokens_(plain, 0).blocks) is torch.nn.Sequential
    assert_same_tensors(merged.state_dict(), plain.state_dict())
    images = images_of(plain)
    assert torch.equal(unmerged(merged)(images), plain(images))
    assert not torch.allclose(merged(images), plain(images), atol=1e-3)


@pytest.mark.parametrize("name", ["ours", *TIMM])
def test_equal_tokens_merge_into_the_same_function(name, add_noise):
    """Each patch stands twice, beside itself: what merges is equal, and proportional attention counts it twice."""
    model = micro(init_values=0.5) if name == "ours" else timm_vit(name)
    model = add_noise(model, scale=0.3).double().eval()
    patches = model.patch_embed.num_patches
    assert patches == 16
    with torch.no_grad():
        first = model.pos_embed.shape[1] - patches
        model.pos_embed[:, first::2] = model.pos_embed[:, first + 1 :: 2]
    images = images_of(model)
    pairs = images.unflatten(-1, (2, 2, images.shape[-1] // 4))  # of patches in a row
    images = torch.stack([pairs[..., 0, :]] * 2, -2).flatten(-3)
    expected = model(images)
    merged = merge_tokens_(model, patches // 2)
    gone, into = chosen_by(merged, images)[0].unbind(1)
    assert torch.equal(gone + 1, into)
    with choices(merged, lambda block, choice: choice if block == 0 else choice[..., :0]):
        found = merged(images)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_224"])
def test_features_have_a_token_for_each_patch(name, add_noise):
    model = merge_tokens_(add_noise(timm_vit(name)), 3).eval()
    images = images_of(model)
    logits = model(images)
    pooled = name == "vit_base_patch16_224"
    assert model.forward_features(images).shape[1] == (16 if pooled else 12)  # 16 - 3 - 3 and 2 prefix tokens
    answer = Answering(model, features=True)(images)
    assert answer.features.shape == (3, model.num_prefix_tokens + 16, 24)
    torch.testing.assert_close(answer.logits, logits)
    gone, into = chosen_by(model, images)[0].unbind(1)
    features = answer.features.gather(1, gone[..., None].expand(-1, -1, 24))
    assert torch.equal(features, answer.features.gather(1, into[..., None].expand(-1, -1, 24)))


def test_gradients_reach_every_weight(add_noise):
    model = micro(3, dtype=torch.float32, add_noise=add_noise).train()
    for precision in (torch.float32, torch.bfloat16):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision is torch.bfloat16):
            loss = F.cross_entropy(model(images_of(model, 4)), torch.arange(4))
        loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name
    with torch.autocast("cpu", torch.bfloat16):  # what merges does not go by the precision around
        keys = torch.randn(2, 17, 6, generator=torch.Generator().manual_seed(3))
        assert torch.equal(match(keys, 4, 1), match(keys.double(), 4, 1))


# ---------------------------------------------------------------------------------------------------- what it costs
def test_counts_by_hand():
    model = micro(5, dtype=torch.float32)  # 16 patches and a class token
    assert token_counts(model) == [(17, 12), (12, 7)]
    width, head = HEADS * HEAD_DIM, 5 * DIM
    linear = [4 * DIM * width * seen for seen, _ in token_counts(model)]
    products = [2 * seen**2 * width for seen, _ in token_counts(model)]
    mlp = [2 * DIM * HIDDEN * left for _, left in token_counts(model)]
    matching = 8 * 8 * HEAD_DIM + 6 * 5 * HEAD_DIM
    assert matching_macs(model) == matching
    assert vit_macs(model) == 16 * 3 * 64 * DIM + sum(linear + products + mlp) + matching + head
    kept = {"blocks.0.attn": [0], "blocks.1.mlp": range(8)}
    small, _ = compact(model, kept)
    assert family_of(model).cost(model, kept)["macs"] == vit_macs(small)
    assert vit_macs(model) - vit_macs(small) == 3 * (linear[0] + products[0]) // 4 + mlp[1] * 40 // 48


def test_no_block_merges_more_than_half():
    model = micro(8, dtype=torch.float32, depth=6)
    assert token_counts(model) == [(17, 9), (9, 5), (5, 3), (3, 2), (2, 2), (2, 2)]
    seen = []
    for block in model.blocks:
        block.mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(images_of(model))
    assert seen == [left for _, left in token_counts(model)]


# ------------------------------------------------------------------------------------------- with heads and neurons
@pytest.mark.parametrize("name", ["ours", "vit_base_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("heads", [[1, 3], []])
def test_masked_and_removed_units_are_one_function(name, heads, add_noise):
    model = micro(3, add_noise=add_noise) if name == "ours" else merge_tokens_(add_noise(timm_vit(name)), 3)
    model = model.double().eval()
    units = family_of(model).units(model)
    kept = {"blocks.0.attn": heads, "blocks.1.attn": [0, 2], "blocks.0.mlp": [3, 4, 40], "blocks.1.mlp": range(9)}
    with torch.no_grad():
        for parameter, mask in unit_masks(units, kept, dict(model.named_parameters())).items():
            model.get_parameter(parameter).mul_(mask)
    small, _ = compact(model, kept)
    images = images_of(model)
    assert len(chosen_by(model, images)) == DEPTH
    for masked, removed in zip(chosen_by(model, images), chosen_by(small, images), strict=True):
        assert torch.equal(masked, removed)
    torch.testing.assert_close(small(images), model(images), rtol=0, atol=1e-12)


def test_a_head_whose_keys_are_heard_stays(add_noise):
    model = micro(3, add_noise=add_noise)
    with torch.no_grad():
        for block in (0, 1):  # dead to attention: head 1 is not heard
            model.blocks[block].attn.proj.weight[:, HEAD_DIM : 2 * HEAD_DIM] = 0
        rows = slice(DIM + HEAD_DIM, DIM + 2 * HEAD_DIM)  # and in block 1 it has no keys either
        model.blocks[1].attn.qkv.weight[rows] = 0
        model.blocks[1].attn.qkv.bias[rows] = 0
    small, kept = compact(model)
    assert (kept["blocks.0.attn"], kept["blocks.1.attn"]) == ([0, 1, 2, 3], [0, 2, 3])
    assert compact(unmerged(model))[1]["blocks.0.attn"] == [0, 2, 3]
    torch.testing.assert_close(small(images_of(model)), model(images_of(model)), rtol=0, atol=1e-12)


def test_images_that_rounding_lets_merge_otherwise_are_compared_all_the_same(add_noise):
    model = micro(3, dtype=torch.float32, add_noise=add_noise)
    other, _ = compact(model, {})
    images = images_of(model, 8)
    batches = [(images, torch.zeros(8))]
    proof = parity(model, other, batches)
    assert (proof["merged_otherwise"], proof["max_difference_float32"]) == (0, 0.0)
    with torch.no_grad():  # what all keys share changes what they look like, and no softmax
        other.blocks[0].attn.qkv.bias[DIM : 2 * DIM] += 0.3
    proof = parity(model, other, batches)
    assert 0 < proof["merged_otherwise"] <= 8
    assert proof["max_difference_float64"] < proof["bound"]
    assert (model(images) - other(images)).abs().max() > 1e-3
    with torch.no_grad():  # a true difference is one
        other.head.bias += 0.01
    assert parity(model, other, batches)["max_difference_float32"] > 0.009


@pytest.mark.parametrize("criterion", ["l1", "l2", "saliency"])
def test_scores_see_merged_tokens(criterion, add_noise):
    model = micro(4, dtype=torch.float32, add_noise=add_noise)
    units, batch = family_of(model).units(model), [(images_of(model, 4), torch.arange(4))]
    scores = score_units(model, units, criterion, batches=batch)
    assert scores.keys() == units.keys()
    assert all(score.isfinite().all() and score.any() for score in scores.values())


# ----------------------------------------------------------------------------------------------------- whole commands
@pytest.fixture
def run_micro(house, tmp_path, monkeypatch):
    """run_micro(flags) -> the folder of a finished micro run."""
    monkeypatch.setattr(entry.report, "write", lambda _: None)
    monkeypatch.setattr(export, "size_table", lambda *_: "")  # nothing is timed

    def run(flags, name="run"):
        argv = [flag for flag in MICRO if flag != "--no-export"]
        assert call([*argv, "--img_size", "32", *flags.split(), "--save_dir", tmp_path / name]) == 0
        return tmp_path / name

    return run


def test_a_run_trains_goes_on_and_exports(run_micro, around, command, tmp_path):
    whole = run_micro(f"{UNITS} --token_merge 3 --init {_noisy(tmp_path)}", "whole")
    assert "token merging: 3 tokens a block; of 17 are left 14 11 behind each" in log_of(whole)

    def stop(training):
        if (training.progress.state, training.progress.step) == (1, 2):
            training.run.signals.heard = 15

    around("step", after=stop)
    argv = [flag for flag in MICRO if flag != "--no-export"]
    broken, flags = tmp_path / "broken", f"{UNITS} --token_merge 3 --init {_noisy(tmp_path)}"
    assert call([*argv, "--img_size", "32", *flags.split(), "--save_dir", broken]) != 0
    assert call(["--resume", "--save_dir", broken]) == 0
    assert_same_tensors(load(broken / "best.pt")["weights"], load(whole / "best.pt")["weights"])
    assert metrics(broken, ("seconds", "images_per_second")) == metrics(whole, ("seconds", "images_per_second"))

    config = json.loads((whole / "model" / "config.json").read_text())
    proof = json.loads((whole / "model" / "parity.json").read_text())
    assert config["token_merge"] == config["provenance"]["token_merge"] == 3
    assert proof["max_difference_float64"] < 1e-12
    assert "merged_otherwise" in proof
    small = export.load(whole / "model")
    assert config["macs"] == {"dense": vit_macs(vit_micro(10, 32)), "removed": vit_macs(small)}
    assert int(float(rows_of(whole / "states.csv")[-1]["macs"])) == vit_macs(small)
    assert_one_line(command(whole, "--onnx", "--int8"), "--int8", "merged tokens")
    card = (whole / "model" / "README.md").read_text()
    assert card.index('export.load("model")') < card.index("without merging") < card.index("import timm")


@pytest.mark.slow
def test_programs_merge_as_the_model_does(run_micro, command, tmp_path):
    """ONNX, torch.export and AOTInductor, each compared with the model at batch 1 and 3."""
    run = run_micro(f"{UNITS} --token_merge 3 --init {_noisy(tmp_path)}")
    code, _, err = command(run, "--onnx", "--opset", 18, "--torch_export", "--aot", "--latency")
    assert code == 0, err
    for name in ("model.onnx", "model.pt2", "model_aot.pt2", "latency.txt"):
        assert (run / "model" / name).exists(), name


def _noisy(folder):
    path = folder / "noisy.pt"
    if not path.exists():
        generator = torch.Generator().manual_seed(9)
        weights = vit_micro(10, 32).state_dict()
        torch.save({name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in weights.items()}, path)
    return path


def test_the_plan_says_what_merges(house, capsys):
    flags = "--dry_run --dataset digits --arch vit_micro --img_size 32 --pruning_times 1 --token_merge"
    plans = []
    for tokens in (0, 4):
        assert call([*flags.split(), tokens]) == 0
        plans.append(capsys.readouterr().out)
    assert "token merging" not in plans[0]
    assert "token merging: 4 tokens a block; of 17 are left 13 9 behind each" in plans[1]
    macs = [vit_macs(merge_tokens_(vit_micro(10, 32), tokens)) for tokens in (0, 4)]
    for plan, expected in zip(plans, macs, strict=True):
        assert f"{expected / 1e9:.4f} G" in plan


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_rope_224", "swin_tiny_patch4_window7_224", "vit_base_patch16_xp_224"]
)
def test_other_blocks_are_refused(name):
    with torch.device("meta"):
        model = build_model(f"timm/{name}", 5)
    with pytest.raises(ValueError, match="--token_merge 2: .*not a plain ViT.*leave it out"):
        merge_tokens_(model, 2)
