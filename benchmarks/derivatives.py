"""Derivatives of derivatives, as PyTorch's modules give them and as `elementary.py` does.

    python benchmarks/derivatives.py

A Hessian-vector product of a loss with regard to a module's parameters and input, float64, in the orders that
the engines take: reverse over forward (adjoint) and reverse over reverse (unrolled), of one task and of three
under `vmap` with shared weights. The error is the largest difference to central differences of the gradient,
relative to the product's largest element. Writes benchmarks/results/derivatives.json.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from script import Parser, launch  # noqa: E402

from evaluation.tables import write_json  # noqa: E402
from learners.elementary import Elementary  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "derivatives.json"
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
Weights = dict[str, Tensor]
Function = Callable[[Weights], Tensor]


def reverse_over_forward(loss: Function, at: Weights, along: Weights, tasks: int) -> Weights:
    def slope(weights: Weights) -> Tensor:
        return jvp(loss, (weights,), (along,))[1]

    return grad(lambda weights: _mean(slope, weights, tasks))(at)


def reverse_over_reverse(loss: Function, at: Weights, along: Weights, tasks: int) -> Weights:
    leaves = {name: w.clone().requires_grad_() for name, w in at.items()}

    def slope(weights: Weights) -> Tensor:
        return dot(grad(loss)(weights), along)

    return dict(
        zip(leaves, torch.autograd.grad(_mean(slope, leaves, tasks), list(leaves.values())), strict=True)
    )


def _mean(slope: Function, weights: Weights, tasks: int) -> Tensor:
    """Over tasks that are all the same; 0: without `vmap`."""
    if not tasks:
        return slope(weights)
    inputs = torch.stack([weights["input"]] * tasks)
    return vmap(lambda x: slope(weights | {"input": x}))(inputs).mean()


def differences(loss: Function, at: Weights, along: Weights) -> Weights:
    high, low = (grad(loss)({n: w + s * along[n] for n, w in at.items()}) for s in (STEP, -STEP))
    return {name: (high[name] - low[name]) / (2 * STEP) for name in at}


def dot(a: Weights, b: Weights) -> Tensor:
    return torch.stack([(a[name] * b[name]).sum() for name in a]).sum()


def error(found: Weights, expected: Weights) -> float:
    """Relative to the largest element expected."""
    largest = max(float(w.abs().max()) for w in expected.values())
    return max(float((found[name] - w).abs().max()) for name, w in expected.items()) / largest


def errors(module: nn.Module, *, elementary: bool) -> dict[str, float]:
    """By the order of the derivatives."""
    draw = torch.Generator().manual_seed(0)

    def random(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=torch.float64)

    parameters = {name: w.detach() + 0.3 * random(w) for name, w in module.named_parameters()}
    at = parameters | {"input": random(torch.empty(4, 6, 8))}
    along = {name: random(w) for name, w in at.items()}

    def loss(weights: Weights) -> Tensor:
        inside = {name: w for name, w in weights.items() if name != "input"}
        with Elementary() if elementary else nullcontext():
            outputs = functional_call(module, inside, (weights["input"],))
        return (outputs * outputs.cos() + 0.1 * outputs**3).sum()

    expected, found = differences(loss, at, along), {}
    for product in (reverse_over_forward, reverse_over_reverse):
        for tasks in (0, 3):
            name = product.__name__.replace("_", " ") + ", vmap" * bool(tasks)
            found[name] = error(product(loss, at, along, tasks), expected)
    return found


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    out: Path = parser.parse_args().out
    record = {}
    for name, build in MODULES.items():
        record[name] = {
            how: errors(build().double(), elementary=how == "elementary") for how in ("torch", "elementary")
        }
        for how, found in record[name].items():
            print(f"{name:36}{how:12}", *(f"{order} {e:8.1e}" for order, e in found.items()), sep="  ")
    write_json(out, {"torch": torch.__version__, "errors": record})


if __name__ == "__main__":
    launch(main)
