"""Functions for which PyTorch lacks a second derivative or a rule for `vmap`, from elementary operations."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from learners.draws import Draws, Replacements, refuse


def _embedding(
    draws: Draws, input: Tensor, weight: Tensor, padding_idx: int | None = None, **options: object
) -> Tensor:
    if options.get("max_norm") is not None:
        raise ValueError("an embedding with max_norm overwrites its weights in a forward pass: leave it out")
    rows = F.embedding(input, weight, scale_grad_by_freq=bool(options.get("scale_grad_by_freq")))
    if padding_idx is None:
        return rows
    # under `vmap`, PyTorch's second derivative does not leave out the padding's row
    padding = (input == padding_idx % weight.shape[0]).unsqueeze(-1)
    return torch.where(padding, rows.detach(), rows)


def _one_hot(draws: Draws, tensor: Tensor, num_classes: int = -1) -> Tensor:
    if num_classes < 0:
        raise ValueError("one_hot: give num_classes, which would depend on each task's values")
    return (tensor.unsqueeze(-1) == torch.arange(num_classes, device=tensor.device)).long()


def _hardsigmoid(draws: Draws, input: Tensor, inplace: bool = False) -> Tensor:
    return F.relu6(input + 3.0) / 6.0


def _data(draws: Draws, input: Tensor) -> Tensor:
    """Return `tensor.data`, which `vmap` does not know."""
    return input.detach()


REPLACEMENTS: Replacements = {
    F.embedding: _embedding,
    F.one_hot: _one_hot,
    F.hardsigmoid: _hardsigmoid,
    Tensor.data.__get__: _data,  # type: ignore[attr-defined]  # a descriptor, which mypy takes for its value
    **refuse(F.embedding_bag, "has no second derivative: average rows of nn.Embedding"),
    **refuse(torch.linalg.householder_product, 'has wrong derivatives: use orthogonal_map="matrix_exp"'),
}
