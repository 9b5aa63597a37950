"""What changes in the course of meta-training, as functions of the iteration: tensors in, tensors out."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.choices import check_choice
from training.options import SCHEDULES

EPOCHS = 10  # in which the multi-step loss goes over to the last step
FLOOR = 0.03  # what remains of the earlier steps' weights, of 1 / steps


def multi_step_weights(iteration: Tensor, steps: int, iterations: int, dtype: torch.dtype) -> Tensor:
    """Weights of the query losses after each inner step (Antoniou et al. 2019, their code): `[steps]`.

    Equal at first; those of the earlier steps fall linearly, in ten equal stages over so many iterations, to
    0.03 / steps; the last takes the rest. `iteration` counts from 0.
    """
    stage = (iteration * EPOCHS // iterations).clamp(max=EPOCHS)
    earlier = (1 - stage.to(dtype) / EPOCHS).clamp(min=FLOOR) / steps
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
    """The learning rate of the outer loop: constant, or from `first` to `final` in so many iterations,
    along a line or a half wave of the cosine. `iteration` counts from 0."""
    check_choice("the schedule", schedule, SCHEDULES)
    if schedule == "constant":
        return first
    done = (iteration.to(dtype) / iterations).clamp(max=1.0)
    if schedule == "linear":
        return first + (final - first) * done
    return final + (first - final) * 0.5 * (1 + torch.cos(math.pi * done))
