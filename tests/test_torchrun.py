"""Laws of a run that torchrun looks after: `--resume auto` makes one command of the first start and of all others.

Nothing is put in torchrun's place here: it starts two processes of the command, starts them again when one dies, and
passes signals on.
"""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch.distributed as dist
from micro import load, log_of
from test_reliable import BASE, MODE, MODES, assert_good, assert_same_bits, ending

from engine.processes import session_token

ROOT = Path(__file__).resolve().parent.parent
# the command with the tests' small model, in which rank 1 kills itself at a moment of its first life, if it is told to
PROGRAM = """
import os, signal, sys
sys.path[:0] = [{root!r}, {tests!r}]
import micro
import main_imp_fillback as entry
import models
from engine.training import StateTraining

models.BUILDERS["vit_micro"] = micro.vit_micro
entry.report.write = lambda _: None  # pictures take longer than these runs
step, moment = StateTraining.step, os.environ.get("DIES_AT")

def dying(training):
    step(training)
    first_life = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1"
    if first_life and f"{{training.progress.state}} {{training.progress.step}}" == moment:
        os.kill(os.getpid(), signal.SIGKILL)

StateTraining.step = dying
if __name__ == "__main__":
    sys.exit(entry.main())
"""


def test_processes_that_are_started_again_do_not_take_dead_ones_for_themselves():
    """A store that keeps what earlier lives left in it, as torchrun's does."""
    store, words = dist.HashStore(), []
    with ThreadPoolExecutor(3) as pool:
        for _ in range(3):
            others = [pool.submit(session_token, store, rank, 3) for rank in (2, 0)]
            time.sleep(0.05)  # the last one comes when the first has found the one of the life before
            others.append(pool.submit(session_token, store, 1, 3))
            (word,) = {other.result(timeout=20) for other in others}
            words.append(word)
    assert len(set(words)) == 3


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """torchrun(folder, *flags of torchrun) -> the started agent of two processes whose run is in that folder."""
    here = tmp_path_factory.mktemp("torchrun")
    (here / "program.py").write_text(PROGRAM.format(root=str(ROOT), tests=str(ROOT / "tests")))
    agents = []

    def start(folder, *flags, **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
        command += ["program.py", *BASE, *MODES[MODE], "--save_dir", str(folder), "--resume", "auto"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        agents.append(subprocess.Popen(command, cwd=here, env=environment, text=True, **pipes))
        return agents[-1]

    yield start
    for agent in agents:
        if agent.poll() is None:
            agent.terminate()  # and with it its processes, which a kill would leave alone
            agent.communicate(timeout=60)


@pytest.fixture(scope="module")
def unbroken(torchrun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    agent = torchrun(folder)
    out, err = agent.communicate(timeout=300)
    assert agent.returncode == 0, err
    assert out.count("state 0 epoch 1/3  ") == out.count("before cut") == 1  # one table, one log
    assert "2 processes: each shows 10 of the 20 images" in log_of(folder)
    return ending(folder)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["0 1", "1 5"])
def test_a_run_goes_on_by_itself_when_a_process_dies(moment, torchrun, unbroken, tmp_path):
    agent = torchrun(tmp_path / "run", "--max-restarts=1", DIES_AT=moment)
    out, err = agent.communicate(timeout=300)
    assert agent.returncode == 0, err
    assert err.count("program.py: error: rank 1 ended") == 1
    again = "holds no checkpoint yet" if moment == "0 1" else "resumed at state 1, step 4 of 9"
    assert again in out.split("rsst on vit_micro")[2]
    assert_same_bits(ending(tmp_path / "run"), unbroken)


@pytest.mark.slow
def test_a_signal_to_torchrun_ends_all_with_a_checkpoint_and_the_same_command_goes_on(torchrun, unbroken, tmp_path):
    folder = tmp_path / "run"
    agent = torchrun(folder)
    deadline = time.monotonic() + 200
    while not (folder / "checkpoint.pt").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    agent.send_signal(signal.SIGTERM)
    _, err = agent.communicate(timeout=100)
    assert agent.returncode != 0
    assert err.count("stopped by SIGTERM with a checkpoint") == 1
    assert_good(folder)
    assert load(folder / "checkpoint.pt")["run"]["state"] < 3
    agent = torchrun(folder)
    out, err = agent.communicate(timeout=300)
    assert (agent.returncode, "resumed at state " in out) == (0, True), err
    assert_same_bits(ending(folder), unbroken)
