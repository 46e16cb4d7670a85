"""Laws of a run in several processes: it is the run of one process, and ends as one.

Most groups of processes here are forked off a server that has imported the command, with the environment that torchrun
gives and the store that its agent holds; torchrun itself starts a few.
"""

import datetime
import json
import os
import time
from types import SimpleNamespace

import pytest
import test_reliable
import torch
import torch.distributed as dist
from micro import BOTH, load, metrics, rows_of, wrap
from test_reliable import BASE, HERE, words

server = test_reliable.server

torch.set_num_threads(1)


def double():
    torch.set_default_dtype(torch.float64)


def remember(folder):
    """What each process ends a state with, in folder/rank."""

    def note(run):
        progress = run.progress
        state = {"masks": progress.masks, "kept": progress.kept, "weights": run.dense.state_dict()}
        torch.save(state, folder / f"{os.environ.get('RANK', 0)}.{progress.state}.pt")

    wrap(HERE, "end_state", before=note)


def _one_of_them(argv, output, patches, environment):
    os.environ.update(environment)
    test_reliable._process(argv, output, patches)


@pytest.fixture
def start(server, tmp_path_factory):
    """start(2, argv, patch, ...) -> the processes, running; `patches_of` one rank alone."""

    def start(size, argv, *patches, patches_of=None):
        output = tmp_path_factory.mktemp("processes")
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        running = []
        for rank in range(size):
            numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": store.port}
            environment = {name: str(value) for name, value in numbers.items()} if size > 1 else {}
            environment |= {"MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
            own = (patches_of or {}).get(rank, ())
            folder = output / str(rank)
            folder.mkdir()
            everything = ((test_reliable.without_report,), *patches, *own)
            given = ([str(part) for part in argv], folder, everything, environment)
            process = server.Process(target=_one_of_them, args=given)
            process.start()
            running.append(process)
        return SimpleNamespace(processes=running, output=output, store=store)

    return start


@pytest.fixture
def launch(start):
    """launch(2, argv, ...) -> codes, out and err of the processes, in the order of their ranks."""

    def launch(size, argv, *patches, **options):
        return finished(start(size, argv, *patches, **options))

    return launch


def finished(group, patience=120):
    deadline = time.monotonic() + patience
    for process in group.processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(group.processes) if process.is_alive()]
    for process in group.processes:
        process.kill()
        process.join()
    seen = {
        name: [(group.output / str(rank) / name).read_text() for rank in range(len(group.processes))]
        for name in ("out", "err")
    }
    assert not hanging, f"{hanging} hang: {seen}"
    return SimpleNamespace(codes=[process.exitcode for process in group.processes], **seen)


def test_it_runs(launch, tmp_path):
    for size in (1, 2):
        done = launch(
            size, [*BASE, *BOTH, "--save_dir", tmp_path / str(size)], (double,), (remember, tmp_path / str(size))
        )
        print(done.codes, *done.out, *done.err)
    print([row["train_loss"] for row in metrics(tmp_path / "1")])
    print([row["train_loss"] for row in metrics(tmp_path / "2")])
    assert 0
