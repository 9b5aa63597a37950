"""The optimizer's state split over processes: each keeps, and updates, its slice of the meta-parameters.

The first two stages of ZeRO (Rajbhandari et al. 2020). The meta-gradient is summed by a reduce-scatter, which
leaves each process with its slice of the sum; the moments of Adam exist for that slice alone; the updated
slices are gathered. Over NCCL the bytes that travel are those of an all-reduce, over gloo half as many again.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from common.processes import World
from training.step import MetaStep, State, all_finite


def padded(vector: Tensor, world: World) -> Tensor:
    """With zeros behind, so that all processes have slices of one length."""
    return functional.pad(vector, (0, -len(vector) % world.size))


def slice_of(vector: Tensor, world: World) -> Tensor:
    """This process's slice of a vector that all processes have."""
    return padded(vector, world).chunk(world.size)[world.rank]


class ShardedStep(MetaStep):
    """An iteration whose state has all meta-parameters, and a slice of each moment."""

    def rehearse(self, state: State, iteration: int | None = None) -> None:
        self.message(state, iteration)

    def exchanged(self, state: State, message: Tensor, iteration: int | None) -> State:
        world, size = self.world, self.layout.size
        sum_of_rest = world.summed(message[size:].clone())
        gradient = world.slice_of_sum(padded(message[:size], world))
        self._fetch_ahead(iteration)
        rest = sum_of_rest()
        self.stop_asked = rest[-1]
        _, measures, seen = self._parts(torch.cat([message[:size], rest]))
        norm = _norm_over(world)(gradient)
        of_slice = state._replace(parameters=slice_of(state.parameters, world))
        counted = self._counted(of_slice, measures, norm, seen)
        moved = self._moved(counted, gradient, norm, self.member, _norm_over(world))
        unfit = (~all_finite(moved, measures, norm)).to(measures.dtype)
        guarded = self._guarded(of_slice, moved, world.summed(unfit)() == 0)
        return guarded._replace(parameters=world.whole_of_slices(guarded.parameters)[:size])


def _norm_over(world: World) -> Callable[[Tensor], Tensor]:
    """The norm of a vector of which each process has a slice."""
    return lambda part: world.summed((part * part).sum())().sqrt()
