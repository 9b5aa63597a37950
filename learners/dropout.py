"""Dropout whose masks are functions of the task's keys (draws.py).

Never in place: tasks may share the tensor that is dropped from, but not its mask.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor
from torch.nn import functional as F

from learners.draws import Draws, Replacements


def drop(draws: Draws, x: Tensor, p: float, training: bool, shape: Sequence[int], function: str) -> Tensor:
    """Return x with elements set to zero with probability p, and the others divided by 1 - p.

    Args:
        shape: of the mask, which broadcasts against x.
        function: the caller's name, for errors.

    Raises:
        ValueError: p is not a probability, or there are no keys to draw by.
    """
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")
    if p == 0.0 or not training:
        return x
    if p == 1.0:
        return x * 0.0
    return x * (draws.mask(p, shape, x, function) / (1.0 - p))


def _dropout(
    draws: Draws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    return drop(draws, input, p, training, input.shape, "dropout")


def _drop_channels(
    unbatched: int, draws: Draws, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    """Drop whole channels of `[batch, channels, ...]`; inputs of `unbatched` axes have no batch axis."""
    leading = 1 if input.dim() == unbatched else 2
    per_channel = (*input.shape[:leading], *(1,) * (input.dim() - leading))
    return drop(draws, input, p, training, per_channel, "dropout of channels")


REPLACEMENTS: Replacements = {
    F.dropout: _dropout,
    F.dropout1d: partial(_drop_channels, 2),
    F.dropout2d: partial(_drop_channels, -1),  # PyTorch takes three axes for a batch here
    F.dropout3d: partial(_drop_channels, 4),
}
