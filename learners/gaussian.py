"""Read outputs as normal distributions, one for each target: a mean and a variance (`--loss gaussian-nll`).

A network gives twice as many numbers as there are targets: the means, then numbers whose softplus, plus a
floor, are the variances. Softplus instead of an exponential: an inner step can then change a variance by a
bounded amount, and more steps than in training do not overflow.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from torch import Tensor
from torch.nn import functional as F

from learners.padding import masked_mean

FLOOR = 1e-4  # of a variance; targets are of the order of 1
# Central parts of a normal distribution in percent, and their half widths in standard deviations.
CENTRAL = {percent: NormalDist().inv_cdf(0.5 + percent / 200) for percent in (50, 90)}


def target_axis(axes: int) -> int:
    """Return the axis of the numbers of targets, or outputs, with so many axes: the channels of images."""
    return -3 if axes == 4 else -1


def split_normal(outputs: Tensor, floor: float, before: int = 0) -> tuple[Tensor, Tensor]:
    """Return the means and the variances in outputs `[..., examples, ..., 2 * targets]`, a half each.

    `before` is the number of axes before that of the examples. Raises ValueError for a floor that is not
    above 0.
    """
    if not floor > 0:
        raise ValueError(f"the floor of a variance should be above 0, not {floor}")
    mean, raw = outputs.chunk(2, target_axis(outputs.dim() - before))
    return mean, F.softplus(raw) + floor


def log_density(targets: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Return the logarithm of the density of each target, in nats."""
    return -0.5 * ((targets - mean).square() / variance + variance.log() + math.log(2 * math.pi))


def measure_normal(
    targets: Tensor, mean: Tensor, deviation: Tensor, mask: Tensor | None, before: int
) -> dict[str, Tensor]:
    """Return measures of each task `[...]`, the first `before` axes, by name.

    "mse" is the squared error of the mean; "coverage_50" and "coverage_90" are the shares of targets in the
    central 50 and 90 % of their distributions, which are 0.5 and 0.9 where these are calibrated. `mask`,
    `[..., examples]`, says which examples count.
    """
    error = targets - mean
    values = {"mse": error.square()}
    for percent, width in CENTRAL.items():
        values[f"coverage_{percent}"] = (error.abs() <= width * deviation).to(error.dtype)
    return {name: masked_mean(value, mask, before) for name, value in values.items()}
