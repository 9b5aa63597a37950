"""Leave padding out: tasks of different sizes lie in one batch, padded to the largest.

A mask `[examples]` says which examples count. Batch norm, losses, heads and metrics ask it. Whatever else
mixes examples gets each task without its padding, one after another.
"""

from __future__ import annotations

from torch import Tensor

from common.batch import Tree, append_axes, tree_map


def masked_mean(values: Tensor, mask: Tensor | None, before: int = 0) -> Tensor:
    """Return the mean of values `[..., examples, ...]` of the examples that count, by the first axes `[...]`.

    `before` is their number; `mask` is `[..., examples]`, None: all.
    """
    if mask is None:
        return values.flatten(before).mean(-1)
    counts = append_axes(mask, values.dim()).expand_as(values)
    return (values * counts).flatten(before).sum(-1) / counts.flatten(before).sum(-1)


def cut(tree: Tree, mask: Tensor | None) -> Tree:
    """Return the examples that count; a tensor that is no `[examples, ...]` stays whole. Not under `vmap`."""
    if mask is None:
        return tree
    return tree_map(lambda t: t[mask] if t.shape[:1] == mask.shape else t, tree)


def pad_again(tree: Tree, mask: Tensor) -> Tree:
    """Put the examples that `cut` leaves back to their places, with some of them where it took others out."""
    rows, count = (mask.cumsum(0) - 1).clamp(min=0), int(mask.sum())
    return tree_map(lambda t: t[rows] if t.shape[:1] == (count,) else t, tree)
