"""The law of RSST on real images: once the penalty is done, cutting heads, neurons or filters costs nothing."""

from pathlib import Path

import pytest
from micro import call, rows_of

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian's package dataset-fashion-mnist
UNITS = "--img_size 28 --patch_size 7 --train_limit 2000 --batch_size 8 --val_fraction 0.05 --aug none --lr 0.0005 "
UNITS += "--sched cosine --warmup 0 --epochs 4 --vit_structured --vit_prune_target both --criteria magnitude "
FILTERS = "--arch res20s --lr 0.003 --batch_size 64 --epochs 2 --decreasing_lr 2 --reg_finish 0.5 --train_limit 4096 "
FILTERS += "--val_fraction 0.04 --rate "


@pytest.mark.slow
@pytest.mark.skipif(not FASHION.is_dir(), reason="dataset-fashion-mnist is missing")
@pytest.mark.parametrize(("flags", "loss"), [
    (UNITS + "--rate 0.7 --mlp_prune_ratio 0.7 --reg_finish 0.1", 0.002),
    (UNITS + "--rate 0.5 --mlp_prune_ratio 0.5 --reg_finish 1.0", 0.002),
    (FILTERS + "0.36", 0.005), (FILTERS + "0.64", 0.005),
], ids=["K=100", "K=1000", "36% of the filters", "64% of the filters"])  # fmt: skip
def test_accuracy_is_the_same_before_and_after_the_cut(tmp_path, flags, loss):
    base = (
        f"--dataset fashionmnist --data {FASHION} --struct rsst --pruning_times 2 --opt adamw --device cpu --no-export"
    )
    assert call([*base.split(), *flags.split(), "--save_dir", tmp_path / "run"]) == 0
    dense, pruned = rows_of(tmp_path / "run" / "states.csv")
    before, after = (float(pruned[f"accuracy_{when}_cut"]) for when in ("before", "after"))
    assert float(dense["best_accuracy"]) > 0.5  # it has learnt something that a cut could destroy
    assert before - after <= loss
    assert float(pruned["residual"]) < 0.1
    if FILTERS not in flags:
        assert after - before <= loss
    else:
        assert before > 0.4
        assert float(pruned["density"]) == pytest.approx(1 - float(flags.split()[-1]), abs=0.03)
