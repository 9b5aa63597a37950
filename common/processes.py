"""The processes of a job, as torchrun starts them: each one's share of the work, and sums over all.

A process on its own is a world of one, in which every operation leaves things as they are. Tensors are
summed over NCCL between CUDA GPUs and over gloo between CPUs; plain values travel over gloo.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from common.errors import AgreedError, LostError, UsageError, explain, fold_message

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process's place among those of the job."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on this machine
    local_size: int = 1
    group: Any = None  # PyTorch's group for plain values

    @property
    def first(self) -> bool:
        """Return whether this process logs, saves and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """Return this process's part of `count` things in a row; the first processes may have one more."""
        length, rest = divmod(count, self.size)
        begin = self.rank * length + min(self.rank, rest)
        return range(begin, begin + length + (self.rank < rest))

    def sum(self, tensor: Tensor, *, patiently: bool = False) -> Tensor:
        """Sum a tensor over all processes, in place; every process gets the same bits.

        `patiently`: a tensor on the CPU, with the timeout of plain values.
        """
        if self.size > 1:
            with _as_lost():
                dist.all_reduce(tensor, group=self.group if patiently else None)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor with the first process's."""
        if self.size > 1:
            with _as_lost():
                dist.broadcast(tensor, 0)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with _as_lost():
            dist.all_gather_object(values, value, self.group)
        return values

    def from_first(self, make: Callable[[], T]) -> T:
        """Call `make` in the first process alone, and return its result, or raise its error, in all."""
        result: Any = None
        with self.together():
            if self.first:
                result = make()
        return self.gather(result)[0]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Raise in all processes what one raises in the block, which must not wait for the others."""
        problem = None
        try:
            yield
        except (UsageError, OSError) as error:
            if self.size == 1:
                raise
            problem = explain(error)
        if problems := list(filter(None, self.gather(problem))):
            raise AgreedError(problems[0])

    def check_same(self, facts: dict[str, Any]) -> None:
        """Raise UsageError in all processes where their facts differ, and name the first difference."""
        first, *others = self.gather(facts)
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                values = f"{other.get(name)!s:.60} and {first.get(name)!s:.60}"
                if other.get(name) != first.get(name):
                    problem = f"process {rank} has another {name} than process 0 ({values})"
                    raise AgreedError(f"{problem}: start all with the same flags, versions and files")

    def wait(self) -> None:
        """Wait until all processes are here."""
        self.gather(None)


ALONE = World()


@contextmanager
def _as_lost() -> Iterator[None]:
    """Turn the many errors of a broken connection into LostError."""
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        raise LostError(fold_message(error)[:160]) from error


def read_world() -> World:
    """Return the world that torchrun describes in the environment; without torchrun, a world of one."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR", "LOCAL_RANK"} <= os.environ.keys():
        return ALONE
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return World(*(int(os.environ.get(name, 1)) for name in names))


def join(world: World, device: torch.device, minutes: float, values_minutes: float) -> World:
    """Meet the other processes, and return the world in which they can talk.

    Each waits `minutes` for the others' tensors, and `values_minutes` for plain values, which may come after
    compiling. Raises LostError where the others do not come.
    """
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # torchrun keeps its store over restarts
    timeout = timedelta(minutes=minutes)
    with _as_lost():
        rendezvous, *_ = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(f"attempt-{attempt}", rendezvous)
        dist.init_process_group(backend, store=store, rank=world.rank, world_size=world.size, timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timedelta(minutes=values_minutes))
    return replace(world, group=group)
