"""Schedules over the iterations of meta-training: the meta-learning rate and the multi-step weights.

Functions of tensors, so that they compile with the step. Iterations count from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from training.options import TrainingOptions

STAGES = 10  # in which the multi-step loss moves to the last step
FLOOR = 0.03  # the earlier steps keep this share of their first weights


def multi_step_weights(iteration: Tensor, steps: int, iterations: int, dtype: torch.dtype) -> Tensor:
    """Return the weights `[steps]` of the query losses after each inner step (Antoniou et al. 2019).

    They are equal at first. The earlier steps' fall linearly, in ten equal stages over `iterations`, to
    0.03 / steps, as in their code; the last step takes the rest.
    """
    stage = (iteration * STAGES // iterations).clamp(max=STAGES)
    earlier = (1 - stage.to(dtype) / STAGES).clamp(min=FLOOR) / steps
    last = 1 - (steps - 1) * earlier
    return torch.cat([earlier.expand(steps - 1), last[None]])


def meta_lr_at(options: TrainingOptions, members: Mapping[str, Tensor], iteration: Tensor) -> Tensor | float:
    """Return the learning rate of the outer loop, in the type of `iteration`.

    It is constant, is halved every so many iterations, or goes from the first to the final one: linearly, or
    by half a cosine wave. `members` has the rates of runs that differ in them.
    """
    first, final = (members.get(n, getattr(options, n)) for n in ("meta_lr", "meta_lr_final"))
    if options.meta_lr_schedule == "constant":
        return first
    if options.meta_lr_schedule == "halving":
        return first * torch.exp2(-torch.floor(iteration / options.meta_lr_halving))
    done = (iteration / options.iterations).clamp(max=1.0)
    if options.meta_lr_schedule == "linear":
        return first + (final - first) * done
    return final + (first - final) * 0.5 * (1 + torch.cos(math.pi * done))
