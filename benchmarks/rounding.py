"""Which products may be rounded to bfloat16: the error of the meta-gradient on real Omniglot, by product.

    python benchmarks/rounding.py --data-root data

Everything is computed in float64, but for convolutions whose inputs are rounded to eight bits of mantissa,
as `--precision bf16-products` rounds them. The weights are those of the shipped checkpoints, the tasks
validation tasks. Products are told apart by what computes them: the inner step, the query's gradient, or the
Hessian-vector product of the way back; and by their kind: outputs, or gradients in images or kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import torch
from tool import assemble, load_checkpoint, make_meta_gradient
from torch import Tensor

from common.batch import TaskBatch
from learners import im2col
from maml import MAML
from training import adjoint

FLAGS = "--dataset omniglot --conv im2col --engine adjoint --compile off --precision float64 -k 1 -q 1"
SHIPPED = harness.ROOT / "checkpoints" / "pretrained"
WORKS = {  # flags, and the checkpoint
    "5-way, 1 step": ("-n 5 -s 1 --meta-batch-size 8", "omniglot-5way-1shot-maml"),
    "20-way, 5 steps": ("-n 20 -s 5 --meta-batch-size 4", "omniglot-20way-1shot-maml-an-hour"),
}
INNER, QUERY, BACK = "inner step", "query", "Hessian-vector product"
OUTPUTS, IMAGES, KERNELS = "outputs", "image gradients", "kernel gradients"
KINDS = {"outputs": OUTPUTS, "images": IMAGES, "kernels": KERNELS}  # by name in `im2col.MAPS`
ALL = frozenset(product((INNER, QUERY, BACK), KINDS.values()))
Part = tuple[str, str]

ROUNDED: dict[str, frozenset[Part]] = {
    "all": ALL,
    **{f"the {phase}'s alone": frozenset(p for p in ALL if p[0] == phase) for phase in (INNER, QUERY, BACK)},
    "all but the inner step's": frozenset(p for p in ALL if p[0] != INNER),
    "the inner step's outputs alone": frozenset({(INNER, OUTPUTS)}),
    "all but the inner step's outputs": ALL - {(INNER, OUTPUTS)},
    "all gradients, no outputs": frozenset(p for p in ALL if p[1] != OUTPUTS),
}


def round_tensor(tensor: Tensor) -> Tensor:
    return tensor.bfloat16().to(tensor.dtype)


@contextmanager
def rounding(parts: frozenset[Part], *, first_layer: bool = True) -> Iterator[None]:
    """Round the factors of these products; `first_layer` False: but those of the largest images."""
    phase, largest = "", 0

    def round_in_phase(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            nonlocal phase
            before, phase = phase, name
            try:
                return function(*arguments)
            finally:
                phase = before

        return run

    def with_rounding(kind: str, forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(a: Tensor, b: Tensor, geometry: im2col.Geometry) -> Tensor:
            nonlocal largest
            largest = max(largest, geometry.size[0])
            if (phase, kind) in parts and (first_layer or geometry.size[0] < largest):
                a, b = round_tensor(a), round_tensor(b)
            return forward(a, b, geometry)

        return run

    rounded = {name: (with_rounding(KINDS[name], f), factors) for name, (f, factors) in im2col.MAPS.items()}
    query, slopes = adjoint.query_gradient, adjoint.gradient_of_slopes
    with (
        patch.object(MAML, "inner_step", round_in_phase(INNER, MAML.inner_step)),
        patch.object(adjoint, "query_gradient", lambda maml: round_in_phase(QUERY, query(maml))),
        patch.object(adjoint, "gradient_of_slopes", lambda *args: round_in_phase(BACK, slopes(*args))),
        patch.dict(im2col.MAPS, rounded),
    ):
        yield


def measure(flags: str, checkpoint: Path, data_root: str, batches: int) -> dict[str, list[float]]:
    """Return the errors in norm, relative to float64's meta-gradient, of several meta-batches."""
    run = assemble([*FLAGS.split(), *flags.split(), "--data-root", data_root])
    saved = load_checkpoint(checkpoint / "best.pt").parameters
    parameters = {name: saved[name].double() for name in run.parameters}
    tasks = range(run.trainer.options.meta_batch_size)
    meta_batches = [run.distribution.sample("validation", 0, number, tasks) for number in range(batches)]

    def meta_gradient(batch: TaskBatch) -> Tensor:
        gradients = make_meta_gradient(run.maml, engine="adjoint")(parameters, batch).gradients
        return torch.cat([gradient.flatten() for gradient in gradients.values()])

    exact = [meta_gradient(batch) for batch in meta_batches]
    results = {}
    for name, parts, first_layer in (
        *((name, parts, True) for name, parts in ROUNDED.items()),
        ("all but the first layer's", ALL, False),
    ):
        with rounding(parts, first_layer=first_layer):
            gradients = [meta_gradient(batch) for batch in meta_batches]
        results[name] = [float((g - e).norm() / e.norm()) for g, e in zip(gradients, exact, strict=True)]
        print(f"  {name}: {', '.join(f'{error:.3f}' for error in results[name])}", flush=True)
    return results


def main() -> None:
    parser = harness.Parser(__doc__)
    parser.add_argument("--data-root", default="data")
    parser.add_argument("--batches", type=harness.count, default=3)
    parser.add_argument("--out", type=Path, default=harness.RESULTS / "rounding.json")
    options = parser.parse_args()
    results = {}
    for name, (flags, checkpoint) in WORKS.items():
        print(name, flush=True)
        results[name] = measure(flags, SHIPPED / checkpoint, options.data_root, options.batches)
        harness.write_json(options.out, {"machine": harness.collect_conditions(), "results": results})


if __name__ == "__main__":
    harness.launch(main)
