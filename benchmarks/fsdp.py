#!/usr/bin/env python3
"""Whether sharded weights (FSDP2, DTensor) go through what a meta-gradient is made of: torch.func.

    python benchmarks/fsdp.py      # two processes on the CPU, half a minute; once for each version of torch

Each attempt computes something of a small perceptron with weights `w` sharded over two processes, and the
same with plain tensors: they agree, differ, or it ends in an error. Prints a table, and writes it to
benchmarks/results/fsdp.json beside those of other versions.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.func import functional_call, grad, jvp, vjp, vmap
from torch.nn.functional import cross_entropy, mse_loss
from torch.utils import _pytree as pytree

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from script import Parser, launch  # noqa: E402

from common.batch import TaskBatch  # noqa: E402
from learner import build_learner  # noqa: E402
from maml import MAML  # noqa: E402

RESULTS = HERE / "results" / "fsdp.json"
PROCESSES, TASKS, ROUNDING = 2, 4, 1e-5
Attempt = Callable[[], tuple[Any, Any]]  # gives the sharded result and the plain one


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))  # Tanh: it has a second derivative


def square(outputs: Tensor, y: Tensor) -> Tensor:
    return ((outputs - y) ** 2).mean()  # F.mse_loss has a row of its own in the table


def trained(net: nn.Module, x: Tensor, y: Tensor, twice: bool) -> Any:
    """The gradients that `backward` leaves in a module; or the gradient of their square."""
    square(net(x), y).backward(create_graph=twice)  # type: ignore[no-untyped-call]
    found: list[Any] = [p.grad for p in net.parameters()]
    total = torch.stack([(g * g).sum() for g in found]).sum()
    return torch.autograd.grad(total, list(net.parameters())) if twice else found


def called(net: nn.Module, w: dict[str, Tensor], x: Tensor) -> Any:
    return functional_call(net, dict(w), (x,))  # a copy: after hooks of FSDP2 it holds their weights


def loss(net: nn.Module, w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return square(called(net, w, x), y)


def slope(net: nn.Module, w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    return jvp(lambda w: loss(net, w, x, y), (w,), (w,))[1]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "functional_call": lambda net, w, x, y: called(net, w, x),
    "grad": lambda net, *task: grad(partial(loss, net))(*task),
    "grad of F.mse_loss": lambda net, w, x, y: grad(lambda w: mse_loss(called(net, w, x), y))(w),
    "grad of grad": lambda net, *task: grad(lambda *t: grad(partial(loss, net))(*t)["2.bias"].sum())(*task),
    "vjp": lambda net, w, x, y: vjp(lambda w: called(net, w, x), w)[1](y),
    "jvp": slope,
    "jvp of grad": lambda net, *task: jvp(grad(partial(loss, net)), task, task)[1],
    "grad of jvp": lambda net, *task: grad(partial(slope, net))(*task),
    "vmap": lambda net, *tasks: vmap(partial(loss, net))(*tasks),
    "vmap of grad": lambda net, *tasks: vmap(grad(partial(loss, net)))(*tasks),
    "vmap of jvp": lambda net, *tasks: vmap(partial(slope, net))(*tasks),
}


def attempts(mesh: DeviceMesh) -> dict[str, Attempt]:
    torch.manual_seed(1)
    x, y = torch.randn(TASKS, 5, 4), torch.randn(TASKS, 5, 2)
    own = {n: w.detach().clone() for n, w in network().named_parameters()}
    moved = {n: w + 0.5 for n, w in own.items()}
    per_task = {n: torch.stack([w + 0.1 * task for task in range(TASKS)]) for n, w in own.items()}
    found: dict[str, Attempt] = {}

    def placed(tree: Any, placement: Any) -> Any:
        return pytree.tree_map(lambda t: distribute_tensor(t, mesh, [placement]), tree)

    def sharded_network(used: bool = True) -> nn.Module:
        net = network()
        for module in (net[0], net[2], net):
            fully_shard(module, mesh=mesh)
        if used:  # the first forward pass prepares the module
            net(x[0])
        return net

    def add(name: str, f: Callable[..., Any], sharded: tuple[Any, ...], plain: tuple[Any, ...]) -> None:
        found[name] = lambda: (f(*sharded), f(*plain))

    def tool(learner: nn.Module, objective: Any, x: Tensor, y: Tensor, **options: Any) -> tuple[Any, Any]:
        maml = MAML(learner, objective, inner_lr=0.1, steps=2, **options)
        w, batch = maml.initial_parameters(), TaskBatch(x, y, x, y)
        theirs = maml.meta_gradient(placed(w, Shard(0)), TaskBatch(*placed(tuple(batch), Replicate())))
        return theirs.gradients, maml.meta_gradient(w, batch).gradients

    one, net, fsdp, dtensor = (x[0], y[0]), network(), "b fully_shard, plain w: ", "c DTensor w: "
    for name, twice in (("backward", False), ("backward twice", True)):
        add(f"a fully_shard: {name}", trained, (sharded_network(), *one, twice), (network(), *one, twice))
    add(fsdp + "before its first pass", loss, (sharded_network(False), moved, *one), (net, moved, *one))
    add(fsdp + "compared with its own w", loss, (sharded_network(), moved, *one), (net, own, *one))
    add(dtensor + "plain inputs", loss, (net, placed(moved, Shard(0)), *one), (net, moved, *one))
    for name, f in FUNCTIONS.items():
        w, data, axis = (per_task, (x, y), 1) if name.startswith("vmap") else (moved, one, 0)
        add(fsdp + name, f, (sharded_network(), w, *data), (net, w, *data))
        add(dtensor + name, f, (net, placed(w, Shard(axis)), *placed(data, Replicate())), (net, w, *data))
    for axis, stack in product((0, 1), [per_task["0.weight"].mT]):
        pair = placed(x, Replicate()), placed(stack, Shard(axis))
        add(f"d DTensor: vmap of a product, axis {axis} sharded", vmap(torch.matmul), pair, (x, stack))
    for engine, first, v in product(("unrolled", "adjoint"), (False, True), (True, False)):
        name = f"e MAML, DTensor w: {engine}{', first-order' * first}, {'vmap' if v else 'one by one'}"
        found[name] = partial(tool, net, square, x, y, engine=engine, first_order=first, vectorised=v)
    images, labels = torch.randn(TASKS, 5, 3, 32, 32), torch.arange(5).expand(TASKS, 5).contiguous()
    found["f MAML, DTensor w: cross-entropy"] = partial(tool, net, cross_entropy, x, labels % 2)
    for name, how in product(("conv", "conv4"), ("grouped", "im2col")):
        learner = build_learner(name, 5, inputs=(3, 32, 32), arguments={"channels": 8})
        of_images = partial(tool, learner, cross_entropy, images, labels, convolution=how)
        found[f"f MAML, DTensor w: cross-entropy, {name}, {how}"] = of_images
    return found


def outcome(attempt: Attempt) -> str:
    try:
        results, expected = (pytree.tree_leaves(tree) for tree in attempt())
        sharded = all(isinstance(t, DTensor) and t.placements[0].is_shard() for t in results)
        full = [t.full_tensor() if isinstance(t, DTensor) else t for t in results]
        difference = max(float((a - b).detach().abs().max()) for a, b in zip(full, expected, strict=True))
    except Exception as error:  # whatever it is: that is the result
        return f"{type(error).__name__}: {' '.join(str(error).split())[:170]}"
    verdict = "works" if difference < ROUNDING else "differs"
    return f"{verdict}, max difference {difference:.1e}{', stays sharded' * sharded}"


def worker(rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", f"file://{folder}/store", timedelta(seconds=60), PROCESSES, rank)
    made = attempts(init_device_mesh("cpu", (PROCESSES,)))
    found = {name: outcome(made[name]) for name in sorted(made, key=lambda name: name[0])}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def main() -> None:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS, help="the JSON file")
    file: Path = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(worker, (folder,), nprocs=PROCESSES)  # type: ignore[no-untyped-call]
        found = json.loads(Path(folder, "0.json").read_text())
    print(f"torch {torch.__version__}, {PROCESSES} processes\n\n| attempt | outcome |\n|-|-|")
    print("\n".join(f"| {name} | {text} |" for name, text in found.items()))
    versions = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(versions | {torch.__version__: found}, indent=1))


if __name__ == "__main__":
    launch(main)
