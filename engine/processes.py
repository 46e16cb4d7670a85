"""Processes: ranks from torchrun's environment, and the operations that all processes of a run do together.

    torchrun --nproc_per_node=2 main_imp_fillback.py ...    # the same program twice, with RANK, WORLD_SIZE, ...

All processes of a run hold the same weights and take the same decisions; they differ in the images that they show
(`images.orders.Share`), and the first one alone writes. What is called here is called by all of them in the same order,
but for `reports_end` and `dead_ranks`. Alone, every call returns at once with what it was given.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from images.orders import Share
from pruning.scores import evaluating
from utils import RunError, Stopped, cause, pick_device

Value = TypeVar("Value")

# of DistributedDataParallel; the second is the name that PyTorch is giving up
_ARGUMENTS = inspect.signature(DistributedDataParallel).parameters
SYNC_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in _ARGUMENTS else "broadcast_buffers"
DEATH_NOTICE = 2.0  # seconds in which the system tells that a process which closed its connections has ended


def world_size() -> int:
    """How many processes torchrun has started this program in; 1 without it."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def first_of_all() -> bool:
    """Whether this process has rank 0 of those that torchrun has started."""
    return int(os.environ.get("RANK") or 0) == 0


class Processes:
    """The processes of a run, seen by one of them.

    Numbers travel over the group of the device that computes (`pick_device`), decisions and messages over groups on the
    CPU, so that nothing waits for a device.

    Args:
        rank: this one's number, 0 .. size - 1.
        local_rank: its number among those of its machine.
        store: the key-value store of the rendezvous; None for a process that is alone.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, store: dist.Store | None = None):
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store, self._device_group, self._vote_group = store, None, None
        self._vote: tuple[dist.Work, Tensor] | None = None
        self._places: list[tuple[str, int]] = []  # host and process number of each
        if size > 1:
            self._vote_group = dist.new_group(backend="gloo")
            self._places = self.gathered((socket.gethostname(), os.getpid()))

    @property
    def several(self) -> bool:
        return self.size > 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, logs and selects."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """What it shows of every batch."""
        return Share(self.rank, self.size)

    @property
    def name(self) -> str:
        """What its lines on standard error start with; nothing for the first."""
        return "" if self.first else f"rank {self.rank}: "

    def check_enough(self, images: int) -> None:
        """Raises: RunError, for so few training images that a process would have none."""
        if images < self.size:
            raise RunError(
                f"--nproc_per_node: {images} training images are too few for {self.size} processes; start fewer"
            )

    # -- numbers

    def pick_device(self, name: str, gpu: int) -> torch.device:
        """The device of `--device` and, for a process that is alone, `--gpu`; of several each takes its own GPU.

        Tensors travel from it from now on: by NCCL those of CUDA, by gloo all others.

        Raises:
            RunError: there is none.
        """
        if not self.several:
            return pick_device(name, gpu)
        gpus = torch.cuda.device_count() if name in ("auto", "cuda") else 0
        if 0 < gpus <= self.local_rank:
            raise RunError(
                f"--nproc_per_node: more than the {gpus} CUDA GPU(s) of this machine; start as many or use --device cpu"
            )
        device = pick_device(name, self.local_rank)
        if device.type == "mps":
            raise RunError("--device mps: cannot be shared by several processes; use --device cpu")
        self._device_group = dist.new_group(backend="nccl" if device.type == "cuda" else "gloo")
        return device

    def sum_(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, in place."""
        if self.several:
            dist.all_reduce(tensor, group=self._group_of(tensor))
        return tensor

    def mean_(self, tensor: Tensor) -> Tensor:
        """The mean over all processes, in place."""
        return self.sum_(tensor).div_(self.size) if self.several else tensor

    def mean_each_(self, tensors: Sequence[Tensor]) -> None:
        """The means over all processes of floating-point tensors, in place, by one message."""
        if self.several and tensors:
            means = self.mean_(torch.cat([tensor.flatten() for tensor in tensors]))
            for tensor, mean in zip(tensors, means.split([tensor.numel() for tensor in tensors]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def min_(self, tensor: Tensor) -> Tensor:
        """The smallest value of any process, element by element, in place."""
        if self.several:
            dist.all_reduce(tensor, dist.ReduceOp.MIN, group=self._group_of(tensor))
        return tensor

    def broadcast_(self, tensors: Iterable[Tensor]) -> None:
        """The first process's values, in place."""
        if self.several:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0, group=self._group_of(whole))
                tensor.detach().copy_(whole)

    def gather_rows(self, own: Tensor, count: int) -> Tensor:
        """The rows [count, ...] of which each process has its share."""
        if not self.several:
            return own
        rows = own.new_zeros(count, *own.shape[1:])
        rows[self.share.of(count)] = own
        return self.sum_(rows)

    def wrap(self, network: nn.Module, image: Tensor, unused: bool) -> nn.Module:
        """The network with a backward pass that averages gradients over all processes; alone, the network itself.

        Starts from the first process's weights and buffers; later each has buffers of its own.

        Args:
            network: gives an `objective.Answer`.
            image: [1, ...], any that the model takes.
            unused: some parameters have no effect, as those of layers whose units are all gone.
        """
        if not self.several:
            return network
        wrapped = DistributedDataParallel(
            network,
            process_group=self._device_group,
            find_unused_parameters=unused,
            gradient_as_bucket_view=True,
            **{SYNC_BUFFERS: False},
        )
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view")  # of dimensions of length 1
        if not unused:
            # After its first backward pass it lays its messages out anew. That shall be this one, since the order of
            # sums follows the layout, and a resumed run has the bits of an unbroken one.
            with evaluating(network):
                wrapped(image).logits.sum().backward()
            network.zero_grad(set_to_none=True)
        return wrapped

    def _group_of(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._device_group if tensor.device.type == "cuda" else None  # None: the first group, gloo

    # -- decisions and turns

    def from_first(self, value: Value) -> Value:
        """The first process's value, which can be pickled; what the others give is not looked at."""
        if not self.several:
            return value
        held = [value]
        dist.broadcast_object_list(held, 0)
        return held[0]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all processes, which can be pickled."""
        held = [value] * self.size
        if self.several:
            dist.all_gather_object(held, value)
        return held

    def vote(self, *values: int) -> tuple[int, ...]:
        """The largest of what any process gave at the call before, number by number; zeros at the first.

        Nothing waits: votes travel while the next step runs. Alone: the values themselves.
        """
        if not self.several:
            return values
        result = self.last_vote() or (0,) * len(values)
        given = torch.tensor(values, dtype=torch.int64)
        self._vote = dist.all_reduce(given, dist.ReduceOp.MAX, group=self._vote_group, async_op=True), given
        return result

    def last_vote(self) -> tuple[int, ...]:
        """The result of a vote that is still on its way; empty without one."""
        pending, self._vote = self._vote, None
        if pending is None:
            return ()
        work, given = pending
        work.wait()
        return tuple(given.tolist())

    def barrier(self) -> None:
        """Return when all processes have reached this call."""
        if self.several:
            self.sum_(torch.zeros(()))

    @contextlib.contextmanager
    def in_turn(self) -> Iterator[None]:
        """One process of each machine enters the block first: what is missing is downloaded once."""
        if self.local_rank:
            self.barrier()
        yield
        if not self.local_rank:
            self.barrier()

    def on_first(self, write: Callable, *arguments) -> None:
        """The first process alone writes files, and reads those that change."""
        if self.first:
            write(*arguments)

    # -- the end

    def close(self) -> None:
        """Wait for all, then end the process group; the first process may go on alone."""
        if self.several:
            self.barrier()
            self.last_vote()
            dist.destroy_process_group()

    @contextlib.contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Who leaves the block because of a signal waits until all have, the first one with its checkpoint written."""
        try:
            yield
        except Stopped:
            self.close()
            raise

    def reports_end(self) -> bool:
        """Whether this process is the one to report on standard error why the run ends: the first to ask."""
        if self._store is None:
            return True
        try:
            return self._store.add("reported", 1) == 1
        except RuntimeError:  # the process that held the store is gone
            return True

    def dead_ranks(self) -> str:
        """A line that names the ranks that died, for when a message to them failed."""
        host, _ = self._places[self.rank]
        deadline = time.monotonic() + DEATH_NOTICE
        while True:
            gone = [rank for rank, (where, number) in enumerate(self._places) if where == host and _ended(number)]
            if gone:
                return f"rank {', '.join(map(str, gone))} ended"
            if time.monotonic() > deadline:
                return "another process cannot be reached"
            time.sleep(0.05)


ALONE = Processes()


def running_statistics(model: nn.Module) -> list[Tensor]:
    """Means and variances that batch norms keep of the images that they have seen; they differ between processes."""
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._NormBase)]
    return [tensor for norm in norms for tensor in (norm.running_mean, norm.running_var) if tensor is not None]


def processes_lines(processes: Processes, images: int, model: nn.Module) -> list[str]:
    """How several processes share a forward pass of so many images, for the log; none for one process."""
    if not processes.several:
        return []
    size = processes.size
    lines = [f"{size} processes: each shows {images // size} of the {images} images of a forward pass"]
    if running_statistics(model):
        lines.append("  batch norm goes by the images of each process; its running statistics are averaged")
    return lines


def _ended(number: int) -> bool:
    """Whether no such process runs on this machine; one that has ended counts so before its parent asks for it."""
    if os.name != "posix":
        return False
    try:
        os.kill(number, 0)
        return Path(f"/proc/{number}/stat").read_text().rpartition(") ")[2].startswith("Z")
    except ProcessLookupError:
        return True
    except OSError:  # of another user, or no /proc here
        return False


def session_token(store: dist.Store, rank: int, size: int) -> str:
    """A token that these processes share, and none of an earlier start on the same store.

    torchrun starts processes again with the store in which the dead ones' addresses stand, and its count of restarts
    may differ between machines. So the first process answers each other one under a name that has never been there
    before, until that one has said that it heard.

    Raises:
        RuntimeError: another process does not come.
    """
    own = f"{socket.gethostname()} {os.getpid()} {time.time_ns()}"
    if rank:
        store.set(f"here {rank}", own)
        token = store.get(f"token for {own}").decode()  # waits for it
        store.set(f"{token} heard by {rank}", "")
        return token
    deadline, missing = time.monotonic() + store.timeout.total_seconds(), set(range(1, size))
    while missing:
        for other in missing.copy():
            who = store.get(f"here {other}").decode()  # one of an earlier life, maybe
            store.set(f"token for {who}", own)
            if store.check([f"{own} heard by {other}"]):
                missing.remove(other)
        if time.monotonic() > deadline:
            raise RuntimeError(f"rank {min(missing)} does not answer")
        time.sleep(0.01)
    return own


@contextlib.contextmanager
def joined() -> Iterator[Processes]:
    """The processes of this run: those that torchrun started, or this one alone.

    All but the first are quiet on standard output from here on.

    Raises:
        RunError: the others cannot be found.
    """
    if world_size() == 1:
        yield ALONE
        return
    try:
        store, rank, size = next(dist.rendezvous("env://"))
        own = dist.PrefixStore(session_token(store, rank, size), store)
        dist.init_process_group("gloo", store=dist.PrefixStore("groups", own), rank=rank, world_size=size)
        processes = Processes(rank, size, int(os.environ.get("LOCAL_RANK", rank)), own)
    except (KeyError, ValueError, RuntimeError) as error:
        raise RunError(f"WORLD_SIZE {world_size()}: the other processes cannot be found ({cause(error)})", 1) from error
    with contextlib.ExitStack() as stack:
        if not processes.first:
            stack.enter_context(contextlib.redirect_stdout(stack.enter_context(open(os.devnull, "w"))))
        yield processes
