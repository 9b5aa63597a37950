"""How features move while a task is adapted to: the mathematics behind the picture (figures.py).

Features are what goes into the head, `[steps + 1, examples, features]` of one task: before adaptation and
after each inner step.
"""

from __future__ import annotations

import torch
from torch import Tensor


def principal_components(points: Tensor, count: int = 2) -> tuple[Tensor, Tensor]:
    """Points `[n, features]` on their first principal components `[n, count]`, and each one's share of the
    variance `[count]`, in float64.

    The sign of a component, which is arbitrary, is such that its largest loading is positive. Where there are
    fewer components, the rest is zero.
    """
    centred = points.double() - points.double().mean(0)
    _, sizes, loadings = torch.linalg.svd(centred, full_matrices=False)
    loadings = loadings[:count]
    largest = loadings.gather(1, loadings.abs().argmax(1, keepdim=True))
    missing = count - len(loadings)
    positions = centred @ torch.where(largest < 0, -loadings, loadings).T
    variances = sizes.square()
    shares = variances[:count] / variances.sum().clamp_min(torch.finfo(torch.float64).tiny)
    pad = torch.nn.functional.pad
    return pad(positions, (0, missing)), pad(shares, (0, missing))


def on_components(features: Tensor) -> tuple[Tensor, Tensor]:
    """All steps' features on two components, fitted on all of them together: `[steps + 1, examples, 2]`, and
    the shares of the variance `[2]`."""
    positions, shares = principal_components(features.flatten(0, 1))
    return positions.view(*features.shape[:2], 2), shares


def until_not_finite(features: Tensor) -> Tensor:
    """The steps before the first one with a number that is not finite."""
    finite = features.isfinite().all(-1).all(-1).long().cumprod(0)
    return features[: int(finite.sum())]


def moved(features: Tensor) -> float:
    """How far the examples have moved from the first to the last step, as a share of how far they were spread
    before: root mean squares of distances, to the start and to the mean. NaN where there was no spread."""
    before, after = features[0].double(), features[-1].double()
    spread = (before - before.mean(0)).square().sum(-1).mean().sqrt()
    distance = (after - before).square().sum(-1).mean().sqrt()
    return float(distance / spread) if spread > 0 else torch.nan


def nearest_mean_accuracy(features: Tensor, labels: Tensor, support: int) -> Tensor:
    """Share of query examples that are nearest to the mean of their own class's support, `[steps + 1]`.

    `labels` `[examples]`; the first `support` examples are the support set.
    """
    features = features.double()
    classes = labels[:support].unique()
    means = torch.stack([features[:, :support][:, labels[:support] == c].mean(1) for c in classes], 1)
    nearest = classes[torch.cdist(features[:, support:], means).argmin(-1)]
    return (nearest == labels[support:]).double().mean(-1)
