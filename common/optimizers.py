"""The inner loop's update rule: what a gradient does to a task's fast weights.

A rule is a function of tensors and differentiable in all of them, so that the meta-gradient passes through.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from common.choices import Choices

Weights = dict[str, Tensor]


class InnerState(NamedTuple):
    """State carried from one inner step to the next."""

    fast: Weights  # the fast weights
    slots: dict[str, Weights]  # the optimizer's memory of them, by purpose


@dataclass(frozen=True)
class InnerOptimizer:
    """Gradient descent, momentum (heavy ball), or Adam (Kingma and Ba 2015), as `torch.optim` computes them.

    "adam-carried" is Adam whose second moments start where earlier tasks have left them (Nichol et al. 2018).
    """

    lr: float | Tensor  # of every weight for which `update` gets no rate
    name: str = "sgd"  # "sgd", "momentum", "adam" or "adam-carried"
    momentum: float = 0.9  # decay of the mean gradient: momentum, or Adam's beta_1
    beta_2: float = 0.999
    eps: float = 1e-8
    clip_norm: float | None = None  # maximal norm of a task's gradient, all weights together
    proximal: float = 0.0  # lambda of lambda / 2 |w - anchor|^2 in the support loss (Rajeswaran et al. 2019)

    @classmethod
    def of(cls, choices: Choices) -> InnerOptimizer:
        rule, momentum, clip = choices.inner_optimizer, choices.inner_momentum, choices.inner_clip
        return cls(choices.inner_lr, rule, momentum=momentum, clip_norm=clip, proximal=choices.proximal)

    @property
    def is_carried(self) -> bool:
        return self.name == "adam-carried"

    @property
    def is_linear(self) -> bool:
        """Return whether the update is linear in the gradient, whose derivative then needs no gradient."""
        return self.name in ("sgd", "momentum") and self.clip_norm is None

    @property
    def is_plain(self) -> bool:
        """Return whether the update is w - lr * gradient and nothing else."""
        return self.name == "sgd" and self.clip_norm is None and not self.proximal

    def start(self, fast: Weights, squares: Weights | None = None, mass: Tensor | None = None) -> InnerState:
        """Return the state before the first step.

        "adam-carried" requires the second moments of earlier tasks, `squares`, and their `mass`, a scalar:
        how full these averages are, 1 - beta_2 ** steps if they began at zero.
        """
        if self.name == "sgd":
            return InnerState(fast, {})
        zeros = {name: torch.zeros_like(w) for name, w in fast.items()}
        if self.name == "momentum":
            return InnerState(fast, {"velocity": zeros})
        weight = next(iter(fast.values()))
        slots = {"mean": zeros, "square": squares or zeros, "count": {"steps": weight.new_zeros(())}}
        if mass is not None:
            slots["count"]["mass"] = mass
        return InnerState(fast, slots)

    def update(self, state: InnerState, gradients: Weights, rates: Weights, anchor: Weights) -> InnerState:
        """Return the state after a step along the gradients of the support loss.

        `rates` are learning rates by name of the weight, of its shape or scalars; `lr` serves the others.
        `anchor` are the weights that the proximal term pulls to; empty without such a term.
        """
        fast, slots = state
        if self.proximal:
            gradients = {n: g + self.proximal * (fast[n] - anchor[n]) for n, g in gradients.items()}
        if self.clip_norm is not None:
            norm = _root(torch.stack([(g * g).sum() for g in gradients.values()]).sum())
            scale = (self.clip_norm / (norm + 1e-6)).clamp(max=1.0)
            gradients = {n: scale * g for n, g in gradients.items()}
        directions = gradients
        if self.name == "momentum":
            velocity = slots["velocity"]
            directions = {n: self.momentum * velocity[n] + g for n, g in gradients.items()}
            slots = {"velocity": directions}
        if self.name.startswith("adam"):
            directions, slots = self._adam(gradients, slots)
        return InnerState({n: w - rates.get(n, self.lr) * directions[n] for n, w in fast.items()}, slots)

    def _adam(self, gradients: Weights, slots: dict[str, Weights]) -> tuple[Weights, dict[str, Weights]]:
        beta_1, beta_2 = self.momentum, self.beta_2
        steps = slots["count"]["steps"] + 1
        mean = {n: beta_1 * slots["mean"][n] + (1 - beta_1) * g for n, g in gradients.items()}
        square = {n: beta_2 * slots["square"][n] + (1 - beta_2) * g * g for n, g in gradients.items()}
        count, correction_1 = {"steps": steps}, bias_correction(beta_1, steps)
        if "mass" in slots["count"]:
            correction_2 = count["mass"] = beta_2 * slots["count"]["mass"] + (1 - beta_2)
        else:
            correction_2 = bias_correction(beta_2, steps)
        directions = {
            n: (mean[n] / correction_1) / (_root(square[n] / correction_2) + self.eps) for n in gradients
        }
        return directions, {"mean": mean, "square": square, "count": count}


def initial_rates(choices: Choices, adapted: Weights, seed: int) -> Weights:
    """Return fresh learned rates by name of the weight: `[steps]`, or of its shape."""
    low, high = choices.inner_lr, choices.inner_lr_max
    generator = torch.Generator().manual_seed(seed)
    rates = {}
    for name, weight in adapted.items():
        shape = (choices.steps,) if choices.inner_rates == "layer-step" else weight.shape
        rate = torch.full(shape, low, dtype=weight.dtype)
        if high is not None:
            rate += (high - low) * torch.rand(shape, generator=generator, dtype=weight.dtype)
        rates[name] = rate.to(weight.device)
    return rates


def bias_correction(beta: float, steps: Tensor) -> Tensor:
    """Return 1 - beta ** steps, by which Adam divides its moments, without losing digits."""
    return -torch.expm1(steps * math.log(beta)) if beta else torch.ones_like(steps)


def _root(x: Tensor) -> Tensor:
    """Return the square root, with derivative 0 at 0: an inactive unit has gradients of 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)
