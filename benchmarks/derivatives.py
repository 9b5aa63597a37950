"""Derivatives of derivatives, as PyTorch's modules give them and as `learners/` repairs them.

    python benchmarks/derivatives.py

A Hessian-vector product of a loss with regard to a module's parameters and input, float64, in the orders that
the engines take: reverse over forward (adjoint) and reverse over reverse (unrolled), of one task and of three
under `vmap` with shared weights. The error is the largest difference to central differences of the gradient,
relative to the product's largest element.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from harness import RESULTS, Parser, launch, write_json
from tool import Elementary
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

STEP = 1e-5  # of the central differences, whose own error is some 1e-9
MODULES: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(8),
    "LayerNorm, no scale and shift": lambda: nn.LayerNorm(8, elementwise_affine=False),
    "InstanceNorm1d": lambda: nn.InstanceNorm1d(6, affine=True),
    "InstanceNorm1d, no scale and shift": lambda: nn.InstanceNorm1d(6),
    "GroupNorm": lambda: nn.GroupNorm(2, 6),
    "BatchNorm1d": lambda: nn.BatchNorm1d(6, track_running_stats=False),
    "Linear": lambda: nn.Linear(8, 8),
}
Weights = dict[str, Tensor]  # the parameters and "input"
Function = Callable[[Weights], Tensor]


def reverse_over_forward(loss: Function, weights: Weights, direction: Weights, tasks: int) -> Weights:
    def slope(w: Weights) -> Tensor:
        return jvp(loss, (w,), (direction,))[1]

    return grad(lambda w: mean_over_tasks(slope, w, tasks))(weights)


def reverse_over_reverse(loss: Function, weights: Weights, direction: Weights, tasks: int) -> Weights:
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}

    def slope(w: Weights) -> Tensor:
        return torch.stack([(g * direction[name]).sum() for name, g in grad(loss)(w).items()]).sum()

    gradients = torch.autograd.grad(mean_over_tasks(slope, leaves, tasks), list(leaves.values()))
    return dict(zip(leaves, gradients, strict=True))


def mean_over_tasks(slope: Function, weights: Weights, tasks: int) -> Tensor:
    """Return the mean over equal tasks under `vmap`; no tasks: without `vmap`."""
    if not tasks:
        return slope(weights)
    inputs = torch.stack([weights["input"]] * tasks)
    return vmap(lambda x: slope(weights | {"input": x}))(inputs).mean()


def central_differences(loss: Function, weights: Weights, direction: Weights) -> Weights:
    high, low = (grad(loss)({n: w + s * direction[n] for n, w in weights.items()}) for s in (STEP, -STEP))
    return {name: (high[name] - low[name]) / (2 * STEP) for name in weights}


def errors_of(module: nn.Module, *, repaired: bool) -> dict[str, float]:
    """Return the relative error by order of the derivatives."""
    draw = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=torch.float64)

    weights = {name: w.detach() + 0.3 * random(w) for name, w in module.named_parameters()}
    weights["input"] = random(torch.empty(4, 6, 8))
    direction = {name: random(w) for name, w in weights.items()}

    def loss(weights: Weights) -> Tensor:
        parameters = {name: w for name, w in weights.items() if name != "input"}
        with Elementary() if repaired else nullcontext():
            outputs = functional_call(module, parameters, (weights["input"],))
        return (outputs * outputs.cos() + 0.1 * outputs**3).sum()

    expected, errors = central_differences(loss, weights, direction), {}
    largest = max(float(w.abs().max()) for w in expected.values())
    for product in (reverse_over_forward, reverse_over_reverse):
        for tasks in (0, 3):
            name = product.__name__.replace("_", " ") + ", vmap" * bool(tasks)
            result = product(loss, weights, direction, tasks)
            errors[name] = max(float((result[n] - w).abs().max()) for n, w in expected.items()) / largest
    return errors


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "derivatives.json", help="the JSON file")
    options = parser.parse_args()
    results: dict[str, dict[str, dict[str, float]]] = {}
    for name, build in MODULES.items():
        for how in ("torch", "elementary"):
            errors = errors_of(build().double(), repaired=how == "elementary")
            results.setdefault(name, {})[how] = errors
            print(f"{name:36}{how:12}", *(f"{order} {e:8.1e}" for order, e in errors.items()), sep="  ")
    write_json(options.out, {"torch": torch.__version__, "errors": results})


if __name__ == "__main__":
    launch(main)
