"""Heads that are computed from a task's support set instead of learned: prototypes, and a ridge regression.

A head is a linear layer on the embeddings, which are the outputs of the learner without it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from common.optimizers import Weights
from common.task import Extras
from learners.linear_algebra import solve

RIDGE = "ridge/"  # prefix of the meta-parameters of a ridge head, both scalars:
LOG_LAMBDA, SCALE = RIDGE + "log_lambda", RIDGE + "scale"


def initial_ridge(penalty: float, scale: float, like: Tensor) -> Weights:
    """Return a ridge head's first meta-parameters, on the device and in the type of `like`."""
    return {LOG_LAMBDA: like.new_tensor(math.log(penalty)), SCALE: like.new_tensor(scale)}


def compute_head(
    kind: str, embeddings: Tensor, targets: Tensor, head: Weights, meta_parameters: Weights, extras: Extras
) -> Weights:
    """Return the head of one task, by name.

    Args:
        kind: "prototype" or "ridge".
        embeddings: of the support set, `[examples, features]`.
        targets: classes, int64 `[examples]`; for "ridge" also numbers, `[examples, outputs]`.
        head: gives names and shapes: weight `[outputs, features]` and bias `[outputs]`.
        meta_parameters: among them those of a ridge head.
        extras: which examples count; classes from its `ways` on have none, and get weights of zero.

    Raises ValueError where the shapes are not these.
    """
    weight, bias = sorted(head, key=lambda name: head[name].dim(), reverse=True)
    if embeddings.dim() != 2:
        raise ValueError(f"a computed head needs inputs [examples, features], not {tuple(embeddings.shape)}")
    if kind == "prototype":
        values = prototypes(embeddings, targets, len(head[weight]), extras)
    else:
        values = ridge(embeddings, targets, len(head[weight]), meta_parameters, extras)
    return dict(zip((weight, bias), values, strict=True))


def prototypes(embeddings: Tensor, labels: Tensor, ways: int, extras: Extras) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the classifier by distance to the class means (Snell et al. 2017).

    A class with mean embedding c has weights 2 c and bias -|c|^2: logits are minus the squared distances, up
    to what is the same for all classes (Triantafillou et al. 2020).
    """
    in_class, present = _classes_of(labels, ways, extras)
    in_class = in_class.to(embeddings.dtype)
    means = (in_class.mT @ embeddings) / in_class.sum(0).where(present, 1.0)[:, None]
    return 2 * means, -(means * means).sum(1)


def ridge(
    embeddings: Tensor, targets: Tensor, outputs: int, meta_parameters: Weights, extras: Extras
) -> tuple[Tensor, Tensor]:
    """Return weight and bias of the ridge regression of the targets (Bertinetto et al. 2019).

    With rows x = (embedding, 1), W minimises the mean of |x W - y|^2 plus lambda |W|^2; the head is W times a
    scale. Lambda and scale are meta-parameters. The linear system is as small as examples and features allow.
    """
    y, mask = _as_numbers(targets, outputs, extras)
    y, mask = y.to(embeddings.dtype), mask.to(embeddings.dtype)[:, None]
    x = torch.cat([embeddings, torch.ones_like(mask)], 1) * mask
    y = y * mask
    penalty = mask.sum() * meta_parameters[LOG_LAMBDA].exp()
    examples, features = x.shape
    diagonal = penalty * torch.eye(min(x.shape), dtype=x.dtype, device=x.device)
    if examples < features:  # Woodbury's identity
        solution = x.mT @ solve(x @ x.mT + diagonal, y)
    else:
        solution = solve(x.mT @ x + diagonal, x.mT @ y)
    solution = meta_parameters[SCALE] * solution
    return solution[:-1].mT, solution[-1]


def _classes_of(labels: Tensor, ways: int, extras: Extras) -> tuple[Tensor, Tensor]:
    """Return which examples count for which class, bool `[examples, ways]`, and the task's own classes."""
    classes = torch.arange(ways, device=labels.device)
    in_class = labels[:, None] == classes
    in_class = in_class if extras.mask is None else in_class & extras.mask[:, None]
    return in_class, torch.ones_like(classes).bool() if extras.ways is None else classes < extras.ways


def _as_numbers(targets: Tensor, outputs: int, extras: Extras) -> tuple[Tensor, Tensor]:
    """Return targets as numbers `[examples, outputs]`, and which examples have some, bool `[examples]`.

    Classes become 1 for the class and -1 for the others, so that logits lie on both sides of 0. A label that
    is no class says nothing.
    """
    if targets.is_floating_point() or outputs == 1 or targets.numel() != len(targets):
        numbers = targets.reshape(len(targets), -1)
        if numbers.shape[1] != outputs:
            raise ValueError(f"a ridge head of {outputs} outputs has targets {tuple(targets.shape)}")
        mask = torch.ones_like(numbers[:, 0]).bool() if extras.mask is None else extras.mask
        return numbers, mask
    in_class, present = _classes_of(targets.flatten(), outputs, extras)
    return (2 * in_class.int() - 1) * present, in_class.any(1)
