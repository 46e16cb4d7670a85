"""The benchmark's peer: its network is ours to begin with, and is cut to the MACs that it was asked for."""

import sys
from pathlib import Path

import pytest
import torch
from micro import HEAD_MACS, NEURON_MACS, vit_micro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import peer  # noqa: E402
from families import family_of  # noqa: E402


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
