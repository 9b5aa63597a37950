"""Why some sinusoid tasks get worse with more inner steps: the curvature of their support loss.

    python benchmarks/sharpness.py checkpoints/reproduce/sinusoid/maml-seed?

Gradient descent at a rate r on a loss whose largest curvature is c moves away from a minimum where r c > 2.
For test tasks of each number of points: r c after the trained step, the share of tasks beyond 2, and the
query error after 1, 5 and 10 steps of the tasks on either side.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from script import Parser, launch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.func import functional_call, grad, vjp, vmap  # noqa: E402
from torch.nn.functional import mse_loss  # noqa: E402

from commands import adapt as using  # noqa: E402
from dataset import Sinusoid  # noqa: E402
from evaluation import meta_test as evaluation  # noqa: E402
from evaluation.tables import write_json  # noqa: E402
from learner import build_learner  # noqa: E402

POWER_STEPS = 40
SHOTS = (5, 10, 20)
STEPS = (1, 5, 10)


def curvature(learner: torch.nn.Module, weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """The largest curvature of one task's support loss: power iteration with Hessian-vector products."""

    def loss(at: dict[str, Tensor]) -> Tensor:
        return mse_loss(functional_call(learner, at, (x,)), y)

    direction = {name: torch.ones_like(weight) for name, weight in weights.items()}
    times = vjp(grad(loss), weights)[1]  # the Hessian is symmetric
    length = x.new_zeros(())
    for _ in range(POWER_STEPS):
        (product,) = times(direction)
        length = torch.stack([(part**2).sum() for part in product.values()]).sum().sqrt()
        direction = {name: part / (length + 1e-12) for name, part in product.items()}
    return length


def measured(checkpoint: Path, shots: int, count: int) -> dict[str, Any]:
    """Of one run's initialisation, on the first `count` test tasks."""
    maml, parameters, _ = using.load(checkpoint, torch.zeros(1, 1))
    learner = build_learner("mlp", 1)
    batch = Sinusoid(shots=shots, queries=10).sample("test", evaluation.SEED, 0, range(count))
    rate = float(maml.optimizer.lr)

    def one_step(x: Tensor, y: Tensor) -> dict[str, Tensor]:
        slopes = grad(lambda at: mse_loss(functional_call(learner, at, (x,)), y))(parameters)
        return {name: weight - rate * slopes[name] for name, weight in parameters.items()}

    support = batch.support_x, batch.support_y
    after_one = vmap(one_step)(*support)
    found = rate * vmap(lambda w, x, y: curvature(learner, w, x, y))(after_one, *support)
    outputs = maml.predictions(parameters, batch, max(STEPS), ("transductive",))["transductive"]
    errors = ((outputs - batch.query_y[:, None]) ** 2).mean((-1, -2))  # [tasks, steps + 1]
    beyond = found > 2
    sides = {"all": torch.ones_like(beyond), "beyond 2": beyond, "below 2": ~beyond}
    return {
        "rate x curvature, median": float(found.median()),
        "share beyond 2": float(beyond.float().mean()),
        "query error": {
            side: {str(n): float(errors[those, n].mean()) for n in STEPS} for side, those in sides.items()
        },
    }


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "sharpness.json")
    given = parser.parse_args()
    results: dict[str, Any] = {}
    for run in given.runs:
        for shots in SHOTS:
            with torch.no_grad():
                results[f"{run.name}, K = {shots}"] = found = measured(run, shots, given.tasks)
            print(f"{run.name}, K = {shots}: {found}", flush=True)
    write_json(given.out, {"tasks": given.tasks, "runs": results})


if __name__ == "__main__":
    launch(main)
