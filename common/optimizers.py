"""The update rule of the inner loop: what a gradient does to a task's fast weights.

A rule is a function of tensors that can be differentiated in everything it is given, so that the
meta-gradient passes through it, whatever it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.choices import INNER_OPTIMIZERS, check_choice

Weights = dict[str, Tensor]


class InnerState(NamedTuple):
    """All that an inner step changes."""

    fast: Weights  # the fast weights
    slots: dict[str, Weights]  # the optimizer's memory of them, by purpose


class Carried(NamedTuple):
    """What Adam's second moments are where earlier tasks have left them."""

    squares: Weights
    mass: Tensor  # scalar, how far these averages are filled: 1 - beta_2 ** steps of one that began at zero


@dataclass(frozen=True)
class InnerOptimizer:
    """Gradient descent, with momentum, or Adam, as `torch.optim` has them.

    Arguments:
        lr: the rate of all weights for which `update` is given none.
        name: "sgd", "momentum" (heavy ball) or "adam" (Kingma and Ba 2015).
        momentum, beta_1, beta_2, eps: of the latter two.
        weight_decay: adds that many times the weights to their gradient.
        clip_norm: shortens the gradient of a task's loss, all weights together, to that norm.
        proximal: lambda of the term lambda / 2 |w - anchor|^2 that is added to the support loss
            (Rajeswaran et al. 2019).
        carried: whether Adam's second moments begin where earlier tasks have left them (Nichol et al. 2018),
            not at zero.
    """

    lr: float | Tensor
    name: str = "sgd"
    momentum: float = 0.9
    beta_1: float = 0.9
    beta_2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float | None = None
    proximal: float = 0.0
    carried: bool = False

    def __post_init__(self) -> None:
        check_choice("the inner optimizer", self.name, INNER_OPTIMIZERS)

    @property
    def linear(self) -> bool:
        """Whether the update is linear in the gradient, so that its derivative needs no gradient."""
        return self.name != "adam" and self.clip_norm is None

    @property
    def plain(self) -> bool:
        """Whether it is nothing but w - lr * gradient."""
        return self == InnerOptimizer(self.lr)

    def start(self, fast: Weights, carried: Carried | None = None) -> InnerState:
        """The state before the first step; with Adam's second moments, where they are `carried`."""
        zeros = {name: torch.zeros_like(w) for name, w in fast.items()}
        if self.name == "momentum":
            return InnerState(fast, {"velocity": zeros})
        if self.name == "adam":
            some = next(iter(fast.values()))
            count = {"steps": torch.zeros((), dtype=some.dtype, device=some.device)}
            if carried is not None:
                squares = {name: carried.squares[name] for name in fast}
                count["mass"] = carried.mass
                return InnerState(fast, {"mean": zeros, "square": squares, "count": count})
            return InnerState(fast, {"mean": zeros, "square": dict(zeros), "count": count})
        return InnerState(fast, {})

    def update(self, state: InnerState, gradients: Weights, rates: Weights, anchor: Weights) -> InnerState:
        """The state after a step along these gradients of the support loss.

        Arguments:
            rates: learning rates by name of the weight, of its shape or scalars; may be empty.
            anchor: the weights that the proximal term pulls to; empty where there is no such term.
        """
        fast, slots = state
        if self.proximal:
            gradients = {n: g + self.proximal * (fast[n] - anchor[n]) for n, g in gradients.items()}
        if self.clip_norm is not None:
            norm = _root(torch.stack([(g * g).sum() for g in gradients.values()]).sum())
            scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {n: scale * g for n, g in gradients.items()}
        if self.weight_decay:
            gradients = {n: g + self.weight_decay * fast[n] for n, g in gradients.items()}
        directions = gradients
        if self.name == "momentum":
            velocity = slots["velocity"]
            directions = {n: self.momentum * velocity[n] + g for n, g in gradients.items()}
            slots = {"velocity": directions}
        if self.name == "adam":
            directions, slots = self._adam(gradients, slots)
        return InnerState({n: w - rates.get(n, self.lr) * directions[n] for n, w in fast.items()}, slots)

    def _adam(self, gradients: Weights, slots: dict[str, Weights]) -> tuple[Weights, dict[str, Weights]]:
        steps = slots["count"]["steps"] + 1
        mean = {n: self.beta_1 * slots["mean"][n] + (1 - self.beta_1) * g for n, g in gradients.items()}
        square = {
            n: self.beta_2 * slots["square"][n] + (1 - self.beta_2) * g * g for n, g in gradients.items()
        }
        count, correction_1 = {"steps": steps}, _correction(self.beta_1, steps)
        if "mass" in slots["count"]:
            correction_2 = count["mass"] = self.beta_2 * slots["count"]["mass"] + (1 - self.beta_2)
        else:
            correction_2 = _correction(self.beta_2, steps)
        directions = {
            n: (mean[n] / correction_1) / (_root(square[n] / correction_2) + self.eps) for n in gradients
        }
        return directions, {"mean": mean, "square": square, "count": count}


def _correction(beta: float, steps: Tensor) -> Tensor:
    """1 - beta ** steps, without losing digits where it is small."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)


def _root(x: Tensor) -> Tensor:
    """The square root, with derivative 0 at 0: a unit that is not active has gradients of 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
