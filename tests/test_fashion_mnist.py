"""The law of RSST on real images: once the penalty is done, cutting costs nothing."""

import csv
from pathlib import Path

import pytest
from micro import call

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is missing")
@pytest.mark.parametrize(("ratio", "finish"), [("0.7", "0.1"), ("0.5", "1.0")], ids=["K=100", "K=1000"])
def test_accuracy_is_the_same_before_and_after_the_cut(tmp_path, ratio, finish):
    command = (
        f"--dataset fashionmnist --data {FASHION} --img_size 28 --patch_size 7 --train_limit 2000 --batch_size 8 "
        f"--val_fraction 0.05 --aug none --opt adamw --lr 0.0005 --sched cosine --warmup 0 --epochs 4 "
        f"--pruning_times 2 --struct rsst --vit_structured --vit_prune_target both --criteria magnitude "
        f"--rate {ratio} --mlp_prune_ratio {ratio} --reg_finish {finish} --device cpu --save_dir {tmp_path / 'run'}"
    )
    assert call(command.split()) == 0
    dense, pruned = csv.DictReader((tmp_path / "run" / "states.csv").read_text().splitlines())
    assert float(dense["best_accuracy"]) > 0.5  # it has learnt something that a cut could destroy
    assert abs(float(pruned["accuracy_before_cut"]) - float(pruned["accuracy_after_cut"])) <= 0.002
    assert float(pruned["residual"]) < 0.1
