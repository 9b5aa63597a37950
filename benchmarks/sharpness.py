"""Why some sinusoid tasks get worse with more inner steps: the curvature of their support loss.

    python benchmarks/sharpness.py checkpoints/reproduce/sinusoid/maml/seed-?

Gradient descent at a rate r on a loss whose largest curvature is c moves away from a minimum if r c > 2. For
test tasks of each number of points: r c after the trained step, the share of tasks beyond 2, and the query
error after 1, 5 and 10 steps of the tasks on either side.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import RESULTS, Parser, launch, write_json
from tool import assemble, load
from torch import Tensor
from torch.func import grad, vjp, vmap
from torch.nn.functional import mse_loss

from common.optimizers import Weights

POWER_STEPS = 40
SHOTS = (5, 10, 20)
STEPS = (1, 5, 10)


def curvature(loss: Callable[[Weights], Tensor], weights: Weights) -> Tensor:
    """Return the largest curvature of one task's loss, by power iteration."""
    direction = {name: torch.ones_like(weight) for name, weight in weights.items()}
    multiply = vjp(grad(loss), weights)[1]  # the Hessian is symmetric
    length = torch.zeros(())
    for _ in range(POWER_STEPS):
        (product,) = multiply(direction)
        length = torch.stack([(part**2).sum() for part in product.values()]).sum().sqrt()
        direction = {name: part / (length + 1e-12) for name, part in product.items()}
    return length


@torch.no_grad()
def measure(checkpoint: Path, shots: int, tasks: int) -> dict[str, Any]:
    """Measure one run's initialisation on the first test tasks."""
    maml, parameters, _ = load(checkpoint, torch.zeros(1, 1))
    batch = assemble(["-k", str(shots), "-q", "10"]).distribution.sample("test", 0, 0, range(tasks))
    rate = float(maml.optimizer.lr)

    def rate_times_curvature(x: Tensor, y: Tensor) -> Tensor:
        """Return r c of one task, x and y `[examples, 1]`, after one step."""

        def loss(weights: Weights) -> Tensor:
            return mse_loss(maml.call(weights, x), y)

        gradients = grad(loss)(parameters)
        return rate * curvature(loss, {name: w - rate * gradients[name] for name, w in parameters.items()})

    products = vmap(rate_times_curvature)(batch.support_x, batch.support_y)
    outputs = maml.predictions(parameters, batch, max(STEPS), ("transductive",))["transductive"]
    errors = ((outputs - batch.query_y[:, None]) ** 2).mean((-1, -2))  # [tasks, steps + 1]
    beyond = products > 2
    sides = {"all": torch.ones_like(beyond), "beyond 2": beyond, "below 2": ~beyond}
    return {
        "rate x curvature, median": float(products.median()),
        "share beyond 2": float(beyond.float().mean()),
        "query error": {
            side: {str(n): float(errors[chosen, n].mean()) for n in STEPS} for side, chosen in sides.items()
        },
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS / "sharpness.json")
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for run in options.runs:
        for shots in SHOTS:
            name = f"{run.parent.name}, {run.name}, K = {shots}"
            results[name] = measure(run, shots, options.tasks)
            print(f"{name}: {results[name]}", flush=True)
    write_json(options.out, {"tasks": options.tasks, "runs": results})


if __name__ == "__main__":
    launch(main)
