"""The benchmark's peer: its network is ours to begin with, and is cut to the MACs that it was asked for."""

import sys

import pytest
import torch
from micro import HEAD_MACS, NEURON_MACS, vit_micro

from benchmarks import peer
from families import family_of


def test_its_network_computes_what_ours_does():
    torch.manual_seed(0)
    model, images = vit_micro().eval(), torch.rand(3, 3, 16, 16)
    assert torch.allclose(peer.timm_twin(model).eval()(images), model(images), atol=1e-6)


def test_without_the_package_nothing_is_made(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    folder = tmp_path / "run"
    assert peer.main(["--like", str(tmp_path), "--dataset", "digits", "--save_dir", str(folder)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pip install torch-pruning" in error
    assert not folder.exists()


@pytest.mark.parametrize("left", [0.8, 0.5])
def test_it_is_cut_to_the_macs_asked_for_and_no_more(left):
    pytest.importorskip("torch_pruning")
    model = peer.timm_twin(vit_micro())
    macs = left * family_of(model).cost(model, {})["macs"]
    small = peer.cut_to(model, macs)
    found = family_of(small).cost(small, {})["macs"]
    # a neuron more in both blocks, or a dimension of all their heads, would not fit
    assert macs - 2 * max(NEURON_MACS, 4 * HEAD_MACS / 6) < found <= macs
    assert len({block.mlp.fc1.out_features for block in small.blocks}) == 1
    assert torch.isfinite(small(torch.rand(2, 3, 16, 16))).all()


def test_whole_heads_go_as_many_as_the_other_run_removed():
    pytest.importorskip("torch_pruning")
    torch.manual_seed(0)
    model, images = peer.timm_twin(vit_micro()).eval(), torch.rand(3, 3, 16, 16)
    left = {"blocks.0.attn": 1, "blocks.0.mlp": 47, "blocks.1.attn": 4, "blocks.1.mlp": 1}
    small = peer.cut_to_counts(model, left).eval()
    units = family_of(small).units(small)
    assert {key: group.count for key, group in units.items()} == left
    # zeros in place of what is gone make the same network
    with torch.no_grad():
        attn, rows = model.blocks[0].attn, small.blocks[0].attn.qkv.weight
        whole = attn.qkv.weight.unflatten(0, (3, 4, 6))
        (head,) = [head for head in range(4) if torch.equal(whole[:, head].flatten(0, 1), rows)]
        attn.proj.weight.unflatten(1, (4, 6))[:, [other for other in range(4) if other != head]] = 0
        for block, few in zip(model.blocks, small.blocks, strict=True):
            there = (block.mlp.fc1.weight[:, None] == few.mlp.fc1.weight).all(2).any(1)
            block.mlp.fc2.weight[:, ~there] = 0
    assert torch.allclose(small(images), model(images), atol=1e-6)


@pytest.mark.parametrize(
    ("states", "kept", "words"), [(3, 2, "in each of 3 states"), (2, 0, "nothing is left of blocks.0.attn")]
)
def test_counts_that_it_cannot_follow_are_refused(tmp_path, states, kept, words):
    (tmp_path / "args.yaml").write_text(
        "{pruning_times: 2, arch: vit_mini, dataset: digits, epochs: 1, seed: 0, struct: refill}"
    )
    (tmp_path / "units.csv").write_text(
        f"state,layer,kind,kept,total\n0,blocks.0.attn,head,4,4\n1,blocks.0.attn,head,{kept},4\n"
    )
    with pytest.raises(peer.RunError, match=words):
        peer.counts_of_states(peer.load_run(tmp_path), states)
