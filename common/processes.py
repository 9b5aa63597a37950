"""The processes of a job, as torchrun starts them: which share of the work is whose, and sums over all.

A process on its own is a world of one, in which every operation leaves things as they are. Tensors are
summed over NCCL between CUDA GPUs, over gloo between CPUs; what processes say to each other goes over gloo.
"""

from __future__ import annotations

import os
import re
import textwrap
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import AgreedError, LostError, UsageError

T = TypeVar("T")
PLACE_IN_SOURCE = re.compile(r"^\[[^]]*\] *")  # with which gloo's errors begin


@dataclass(frozen=True)
class World:
    """Where this process stands among those of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    words: Any = None  # over which group of PyTorch's they talk

    @property
    def first(self) -> bool:
        """Whether this is the process that logs, saves and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Of so many things in a row, those of this process; the first processes may have one more."""
        each, more = divmod(count, self.size)
        begin = self.rank * each + min(self.rank, more)
        return range(begin, begin + each + (self.rank < more))

    # ---- tensors ------------------------------------------------------------------------------

    def summed(self, tensor: Tensor, *, patiently: bool = False) -> Callable[[], Tensor]:
        """Begins to sum a tensor over all processes, in place; the result, once it is asked for.

        Each process gets the same bits. `patiently`: on the CPU, waiting as long as for words.
        """
        if self.size == 1:
            return lambda: tensor
        with _losses_are_said():
            work = dist.all_reduce(tensor, group=self.words if patiently else None, async_op=True)

        def result() -> Tensor:
            with _losses_are_said():
                work.wait()
            return tensor

        return result

    def slice_of_sum(self, vector: Tensor) -> Tensor:
        """Of the sum of `[size * n]` over all processes, this one's `[n]`."""
        if self.size == 1:
            return vector
        part = vector.new_empty(len(vector) // self.size)
        with _losses_are_said():
            dist.reduce_scatter_tensor(part, vector)
        return part

    def whole_of_slices(self, part: Tensor) -> Tensor:
        """The slices `[n]` of all processes in a row: `[size * n]`."""
        if self.size == 1:
            return part
        whole = part.new_empty(len(part) * self.size)
        with _losses_are_said():
            dist.all_gather_into_tensor(whole, part.contiguous())
        return whole

    def from_first_tensor(self, tensor: Tensor) -> Tensor:
        """The first process's, in place."""
        if self.size > 1:
            with _losses_are_said():
                dist.broadcast(tensor, 0)
        return tensor

    # ---- words --------------------------------------------------------------------------------

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _losses_are_said():
            dist.all_gather_object(values, value, self.words)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """What `make` gives in the first process, or raises there; the others do not call it."""
        if self.size == 1:
            return make()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = make()
            except (UsageError, OSError) as error:
                outcome[1] = str(error)
        with _losses_are_said():
            dist.broadcast_object_list(outcome, 0, self.words)
        if outcome[1] is not None:
            raise AgreedError(outcome[1])
        return outcome[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """What one process refuses to do, all refuse: they would wait for it. Nothing in it may wait."""
        if self.size == 1:
            yield
            return
        problem = None
        try:
            yield
        except (UsageError, OSError) as error:
            problem = str(error)
        found = next((each for each in self.gathered(problem) if each is not None), None)
        if found is not None:
            raise AgreedError(found)

    def check_same(self, facts: Mapping[str, Any]) -> None:
        """Raises UsageError in all processes where they do not agree, and names what they disagree about."""
        others = self.gathered(dict(facts))
        for rank, other in enumerate(others):
            names = sorted(others[0].keys() | other.keys())
            different = [name for name in names if other.get(name) != others[0].get(name)]
            if different:
                name = different[0]
                raise AgreedError(
                    f"process {rank} has another {name} than process 0 ({other.get(name)!s:.60} and "
                    f"{others[0].get(name)!s:.60}): start all with the same flags, versions and files"
                )

    def wait(self) -> None:
        """Until all processes are here."""
        self.gathered(None)


ALONE = World()


@contextmanager
def _losses_are_said() -> Iterator[None]:
    """Turns the many errors of a broken connection into one."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        reason = PLACE_IN_SOURCE.sub("", " ".join(str(error).split()))
        raise LostError(textwrap.shorten(reason, 160, placeholder=" ...")) from error


class Late:
    """Reads a number on a device a few calls late, so that nothing waits for the device; on a CPU at once."""

    def __init__(self, device: torch.device) -> None:
        self.lag = 2 if device.type == "cuda" else 0
        self.coming: deque[tuple[torch.cuda.Event, Tensor]] = deque()

    def __call__(self, number: Tensor) -> bool:
        """Whether the number of `lag` calls ago is above 0."""
        if not self.lag:
            return bool(number > 0)
        copy = torch.empty_like(number, device="cpu", pin_memory=True)
        copy.copy_(number, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self.coming.append((event, copy))
        if len(self.coming) <= self.lag:
            return False
        event, copy = self.coming.popleft()
        event.synchronize()
        return bool(copy > 0)


def launched() -> World:
    """As torchrun says in the environment; a world of one without."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"} <= os.environ.keys():
        return ALONE
    return World(
        int(os.environ["RANK"]),
        int(os.environ["WORLD_SIZE"]),
        int(os.environ["LOCAL_RANK"]),
        int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
    )


def join(world: World, device: torch.device, minutes: float, words_minutes: float) -> World:
    """Meets the other processes. From then on each waits so long for the others' tensors, and for their
    words, which may have to wait until data are read or code is compiled.

    Raises LostError where they do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # torchrun keeps its store when it starts all again: what the dead have left there is not for the living
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    timeout = timedelta(minutes=minutes)
    with _losses_are_said():
        found, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt-{attempt}", found)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        words = dist.new_group(backend="gloo", timeout=timedelta(minutes=words_minutes))
    return replace(world, words=words)


def leave() -> None:
    """Ends what `join` began."""
    if dist.is_initialized():
        dist.destroy_process_group()
