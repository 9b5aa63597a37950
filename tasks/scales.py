"""Standardise the columns of a table by their mean and standard deviation over the training rows.

Scales are a dictionary of tensors, which a checkpoint holds: "input", float64 `[2, inputs]` of means and
deviations, and "target" where targets are standardised too. Nothing is scaled by an empty dictionary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from common.errors import UsageError

Scales = Mapping[str, Tensor]


def measure_scale(values: Tensor) -> Tensor:
    """Return means and deviations `[2, columns]` of float64 `[rows, columns]`; 1 for a constant column."""
    size = values.abs().amax(0).clamp(min=torch.finfo(values.dtype).tiny)  # squares stay finite
    mean = (values / size).mean(0) * size
    deviation = (values / size).std(0, correction=0) * size
    constant = (values == values[:1]).all(0)
    return torch.stack([torch.where(constant, values[0], mean), deviation.where(~constant, 1.0)])


def apply_scale(values: Tensor, scales: Scales, part: str, source: str) -> Tensor:
    """Standardise `[rows, columns]`, "input" or "target"; UsageError for another number of columns."""
    if part not in scales:
        return values
    mean, deviation = scales[part].to(values.device)
    if values.shape[1:] != mean.shape:
        raise UsageError(f"{source} is {(*values.shape,)}, and the run's table has {len(mean)} {part}s")
    return (values.double() - mean) / deviation


def undo_scale(values: Tensor, scales: Scales, part: str, *, centre: bool = True) -> Tensor:
    """Return standardised values in the units of the table, float64 where these are not the same.

    Standard deviations are values without a `centre`.
    """
    if part not in scales:
        return values
    mean, deviation = scales[part].to(values.device)
    return values.double() * deviation + (mean if centre else 0)
