"""Batch norm in two passes (mean, then the mean of centred squares) against `torch.var_mean`, uncompiled.

    OMP_NUM_THREADS=2 python benchmarks/batch_norm.py

Paired, round by round, on random images of Omniglot's size. Writes benchmarks/results/batch_norm.json.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from script import Parser, conditions, launch  # noqa: E402

from evaluation.tables import write_json  # noqa: E402
from learner import build_learner  # noqa: E402
from learners.batch_norm import BatchNorm  # noqa: E402
from maml import MAML, TaskBatch  # noqa: E402

ROUNDS = 15
RESULTS = ROOT / "benchmarks" / "results" / "batch_norm.json"


def one_call(layer: BatchNorm, x: Tensor, per_channel: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """In the place of `BatchNorm._centred`."""
    axes = [0, *range(2, x.dim())]
    variance, mean = torch.var_mean(x[: layer.reference], axes, correction=0, keepdim=True)
    return x - mean, variance


def tasks(number: int, ways: int, queries: int) -> TaskBatch:
    """1-shot, of noise."""
    support, query = torch.arange(ways), torch.arange(ways).repeat(queries)
    return TaskBatch(
        torch.rand(number, ways, 1, 28, 28),
        support.repeat(number, 1),
        torch.rand(number, ways * queries, 1, 28, 28),
        query.repeat(number, 1),
    )


def cases() -> dict[str, Callable[[], object]]:
    def step(number: int, ways: int, **options: str) -> Callable[[], object]:
        maml = MAML(build_learner("conv", ways, inputs=(1, 28, 28)), F.cross_entropy, inner_lr=0.4, **options)
        parameters, batch = maml.initial_parameters(), tasks(number, ways, 1)
        return lambda: maml.meta_gradient(parameters, batch)

    maml = MAML(build_learner("conv", 5, inputs=(1, 28, 28)), F.cross_entropy, inner_lr=0.4)
    parameters, batch = maml.initial_parameters(), tasks(8, 5, 15)

    def evaluation() -> object:
        with torch.no_grad():
            return maml.predictions(parameters, batch, steps=3)

    return {
        "an iteration, 32 tasks of 5 classes": step(32, 5),
        "the same, first order": step(32, 5, meta_gradient="first-order"),
        "an iteration, 2 tasks of 60 classes, head alone adapted": step(2, 60, fast_weights="head"),
        "evaluation, 8 tasks of 5 classes, 15 queries, 3 steps": evaluation,
    }


def seconds(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    out: Path = parser.parse_args().out
    two_passes = BatchNorm._centred
    found = {}
    for name, work in cases().items():
        taken: dict[str, list[float]] = {"var_mean": [], "two passes": []}
        for _ in range(ROUNDS + 1):
            for way, function in (("var_mean", one_call), ("two passes", two_passes)):
                BatchNorm._centred = function  # type: ignore[method-assign]
                taken[way].append(seconds(work))
        one, two = (times[1:] for times in taken.values())
        ratios = [a / b for a, b in zip(one, two, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "var_mean_seconds": statistics.median(one),
            "two_passes_seconds": statistics.median(two),
            "ratio": {"median": middle, "quartiles": [low, high]},
        }
        print(f"{name}: {middle:.2f} times as fast ({low:.2f} to {high:.2f})", flush=True)
    write_json(out, conditions() | {"threads": torch.get_num_threads(), "rounds": ROUNDS, "cases": found})


if __name__ == "__main__":
    launch(main)
