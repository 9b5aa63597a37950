"""What changes over the iterations of meta-training: the meta-learning rate, and the multi-step weights.

Functions of tensors, so that they compile with the step.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.choices import check_choice
from training.options import SCHEDULES

STAGES = 10  # in which the multi-step loss moves to the last step
FLOOR = 0.03  # the earlier steps keep this share of their first weights


def multi_step_weights(iteration: Tensor, steps: int, iterations: int, dtype: torch.dtype) -> Tensor:
    """Return the weights `[steps]` of the query losses after each inner step (Antoniou et al. 2019).

    They are equal at first. The earlier steps' fall linearly, in ten equal stages over `iterations`, to
    0.03 / steps, as in their code; the last step takes the rest. `iteration` counts from 0.
    """
    stage = (iteration * STAGES // iterations).clamp(max=STAGES)
    earlier = (1 - stage.to(dtype) / STAGES).clamp(min=FLOOR) / steps
    last = 1 - (steps - 1) * earlier
    return torch.cat([earlier.expand(steps - 1), last[None]])


def meta_lr_at(
    schedule: str,
    iteration: Tensor,
    first: Tensor | float,
    final: Tensor | float,
    iterations: int,
    dtype: torch.dtype,
) -> Tensor | float:
    """Return the learning rate of the outer loop; `iteration` counts from 0.

    It is constant, or goes from `first` to `final` over `iterations`: linearly, or by half a cosine wave.
    """
    check_choice("the schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return first
    done = (iteration.to(dtype) / iterations).clamp(max=1.0)
    if schedule == "linear":
        return first + (final - first) * done
    return final + (first - final) * 0.5 * (1 + torch.cos(math.pi * done))
