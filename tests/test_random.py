"""Laws of every run, on runs drawn at random; `python -m tests.random_runs` draws more of them."""

import pytest
from random_runs import try_seed

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("kills", [False, True], ids=["whole", "killed"])
@pytest.mark.parametrize("seed", range(12))
def test_a_run_drawn_at_random(seed, kills, tmp_path):
    if why := try_seed(seed, kills, tmp_path):
        pytest.skip(f"refused: {why}")
