#!/usr/bin/env python3
"""Data parallelism over tasks: a model of its cost, and measurements to hold the model to.

    python benchmarks/scaling.py                   # measure on this machine, compare, predict; 20 minutes
    python benchmarks/scaling.py --quick           # the same path in some 8 minutes, less exact
    python benchmarks/scaling.py --model-only      # operations counted, predictions for GPUs: a minute
    python benchmarks/scaling.py --rate cuda       # the rate of one GPU, in the place of the assumed one

Every process computes the meta-gradient of its share of the tasks; one all-reduce adds the gradients up. The
model (docs/scaling.md has its formulas) is the pure functions of the first half; they measure nothing. The
second half measures what the model is held to: the all-reduce over gloo, the time of an iteration over the
size of the share, runs of main.py with 1, 2 and 4 processes, and the bytes that these send.

Omniglot is looked for in MAML_DATA_ROOT; without it the sinusoid alone is measured. Prints Markdown, and
writes benchmarks/results/scaling.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")

# below the path and the threads, which they need (E402)
import numpy as np  # noqa: E402
import torch  # noqa: E402
from script import Parser, conditions, launch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.func import functional_call  # noqa: E402
from torch.nn.functional import cross_entropy, mse_loss  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from common.batch import TaskBatch  # noqa: E402
from learner import build_learner  # noqa: E402
from maml import MAML  # noqa: E402

BYTES = 4  # of a float32
EXTRA_NUMBERS = 4  # metrics that travel with the gradient; their number changes nothing that is printed
PROCESSES = (1, 2, 4)
TASKS = (4, 16, 32, 256, 4096)
GPUS = (8, 64, 512)
MOST_GPUS = 4096  # up to which the model looks for the end of scaling
MARK = "scaling: measured"


# ---- the networks ---------------------------------------------------------------------------


class ResidualBlock(nn.Module):
    """Three 3x3 convolutions with batch norm, beside them a 1x1 one; then 2x2 max pooling."""

    def __init__(self, channels_in: int, channels: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for first, last in ((channels_in, False), (channels, False), (channels, True)):
            layers += [nn.Conv2d(first, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)]
            layers += [] if last else [nn.LeakyReLU(0.1)]
        self.main = nn.Sequential(*layers)
        self.beside = nn.Sequential(nn.Conv2d(channels_in, channels, 1, bias=False), nn.BatchNorm2d(channels))
        self.end = nn.Sequential(nn.LeakyReLU(0.1), nn.MaxPool2d(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.main(x) + self.beside(x))


def resnet12(outputs: int, channels: Sequence[int] = (64, 160, 320, 640)) -> nn.Module:
    """The ResNet-12 of few-shot learning: Lee et al. (2019), without DropBlock, which has no weights.

    The narrow one of Oreshkin et al. (2018) has `channels` 64, 128, 256, 512.
    """
    blocks = [ResidualBlock(*pair) for pair in pairwise((3, *channels))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels[-1], outputs))


def vit_b_16(outputs: int, size: int = 224) -> nn.Module:
    """torchvision's ViT-B/16; for smaller images the same blocks on fewer patches."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(size, 16, 12, 12, 768, 3072, num_classes=outputs)


@dataclass(frozen=True)
class Network:
    """A network, and what is assumed of the rate at which a GPU computes it.

    Arguments:
        small: a factory and the shape of an example with which the same operations are cheap: they are
            counted, not their arithmetic.
        efficiency: of the peak; an assumption, for tasks with weights of their own, in eager PyTorch.
    """

    make: Callable[[int], nn.Module]
    inputs: tuple[int, ...]
    small: tuple[Callable[[int], nn.Module], tuple[int, ...]]
    efficiency: float


def _built_in(name: str, inputs: tuple[int, ...], efficiency: float) -> Network:
    def make(outputs: int) -> nn.Module:
        return build_learner(name, outputs, inputs=inputs)

    return Network(make, inputs, (make, inputs), efficiency)


NETWORKS = {
    "mlp": _built_in("mlp", (1,), 0.01),
    "conv": _built_in("conv", (1, 28, 28), 0.05),
    "conv4": _built_in("conv4", (3, 84, 84), 0.1),
    "resnet12": Network(resnet12, (3, 84, 84), (resnet12, (3, 32, 32)), 0.2),
    "resnet12-narrow": Network(
        lambda outputs: resnet12(outputs, (64, 128, 256, 512)), (3, 84, 84), (resnet12, (3, 32, 32)), 0.2
    ),
    "vit-b-16": Network(vit_b_16, (3, 224, 224), (lambda outputs: vit_b_16(outputs, 32), (3, 32, 32)), 0.4),
}
PUBLISHED = {"resnet12": 12.4e6, "resnet12-narrow": 8.0e6}  # parameters without the head


@dataclass(frozen=True)
class Work:
    """Meta-training on one kind of task; `engine` is what the tool chooses for these steps."""

    title: str
    network: str
    outputs: int
    support: int  # examples of a task
    query: int
    steps: int
    order: str = "exact"

    @property
    def engine(self) -> str:
        return "unrolled" if self.steps == 1 or self.network == "mlp" else "adjoint"


WORKS = (
    Work("conv, Omniglot 5-way 1-shot, 1 step", "conv", 5, 5, 5, 1),
    Work("conv, Omniglot 20-way 1-shot, 5 steps", "conv", 20, 20, 20, 5),
    Work("ResNet-12, mini-ImageNet 5-way 5-shot, 5 steps", "resnet12", 5, 25, 75, 5),
    Work("ViT-B/16, 224 x 224, 5-way 5-shot, 5 steps", "vit-b-16", 5, 25, 75, 5),
)


# ---- the model: arithmetic ------------------------------------------------------------------


def support_passes(order: str, engine: str) -> int:
    """What an inner step costs for each support example, in forward passes.

    A forward pass is one matrix product y = W x a layer. Its backward pass is two (for x and for W): a
    gradient is 3. First order needs no more. The exact meta-gradient needs a Hessian-vector product for each
    step beside:

        unrolled  the derivative of the gradient's three products, each in both of its factors: 6
        adjoint   the gradient of the slope along v. The slope is y = W x again, and dy = v x + W dx: 3
                  products; back through them it is 2 for each but for v, which is constant: 5. Together 8
    """
    if order == "first-order":
        return 3
    return 3 + {"unrolled": 6, "adjoint": 8}[engine]


def task_flops(
    forward: float, support: int, query: int, steps: int, *, order: str = "exact", engine: str = "unrolled"
) -> float:
    """FLOPs of a task's meta-gradient; `forward` is those of one example's forward pass.

    An upper bound: the first layer needs no gradient in the images.
    """
    return forward * (steps * support * support_passes(order, engine) + 3 * query)


def share(tasks: int, processes: int) -> int:
    """Tasks of the process that has the most: all others wait for it."""
    return -(-tasks // processes)


# ---- the model: communication ---------------------------------------------------------------


@dataclass(frozen=True)
class Link:
    """Seconds until a message begins to arrive, and bytes a second from then on, each way."""

    latency: float
    bandwidth: float


def ring_bytes(numbers: int, processes: int) -> float:
    """Bytes that each process sends in a ring all-reduce of so many float32 numbers.

    Reduce-scatter, then all-gather, N - 1 messages of 1/N of the vector in each. A sharded update takes place
    between the two, and sends as much.
    """
    return 2 * (processes - 1) / processes * numbers * BYTES


def ring_seconds(numbers: int, processes: int, link: Link) -> float:
    """2 (N - 1) messages one after another, each of 1/N of the vector."""
    return 2 * (processes - 1) * link.latency + ring_bytes(numbers, processes) / link.bandwidth


@dataclass(frozen=True)
class Cluster:
    """Machines full of GPUs.

    Arguments:
        peak: FLOP/s of a GPU.
        memory_bandwidth: of a GPU, bytes a second.
        inside, between: links of a GPU to those of its machine, and to its like in another one.
        tree_latency: of a step of a tree between machines.
        call: seconds that a collective takes beside.
        launch: seconds that the host needs for an operation; the GPU waits for it where it has less to do.
    """

    peak: float
    memory_bandwidth: float
    gpus_per_machine: int
    inside: Link
    between: Link
    tree_latency: float
    call: float
    launch: float


H100 = Cluster(
    peak=66.9e12,
    memory_bandwidth=3.35e12,
    gpus_per_machine=8,
    inside=Link(1.9e-6, 370e9),
    between=Link(4.0e-6, 45e9),
    tree_latency=8.5e-6,
    call=14e-6,
    launch=10e-6,
)
# Where each number comes from. Those marked "assumed" are nobody's measurement.
SOURCES = {
    "peak": "66.9 TFLOP/s: FP32 of an H100 SXM, the tool's default precision (TF32: 494.7, dense); "
    "https://glennklockwood.com/garden/processors/h100",
    "memory_bandwidth": "3.35 TB/s: HBM3; as above",
    "inside": "370 GB/s: what NCCL reaches of NVLink's 450 GB/s each way, by its author in "
    "https://github.com/NVIDIA/nccl-tests/issues/212; 1.9 us: NCCL's own model, ring, LL128, NVLink, "
    "https://github.com/NVIDIA/nccl/blob/master/src/graph/tuning.cc",
    "between": "a ConnectX-7 of 400 Gb/s for each GPU, eight in a DGX H100 "
    "(https://chippub.substack.com/p/disassembling-nvidias-16t-network), of which 90 % are assumed: 45 GB/s; "
    "4.0 us: tuning.cc, ring, LL128, network",
    "tree_latency": "8.5 us: tuning.cc, tree, LL128, network",
    "call": "14 us: tuning.cc, base latency, LL128",
    "launch": "10 us: assumed, of an eager operation under vmap; on the measured CPU it is some 25 us",
    "recorded": "1 us: assumed, of an operation in a CUDA graph of compiled kernels",
    "efficiency": "assumed: 5 % (conv), 20 % (ResNet-12), 40 % (ViT)",
}
RECORDED = 1e-6  # seconds an operation in a CUDA graph


def all_reduce_seconds(numbers: int, gpus: int, cluster: Cluster) -> float:
    """Of float32 numbers: inside the machines by a ring, between them by a ring or a tree, the faster one.

    A machine first adds up: each of its GPUs has a part of the sum then, and exchanges it with its like in
    the other machines over its own network card. At the end the parts are gathered inside.
    """
    if gpus == 1:
        return 0.0
    local = min(gpus, cluster.gpus_per_machine)
    machines = -(-gpus // cluster.gpus_per_machine)
    seconds = cluster.call + ring_seconds(numbers, local, cluster.inside)
    if machines > 1:
        part = -(-numbers // local)
        depth = math.ceil(math.log2(machines))
        tree = 2 * depth * cluster.tree_latency + 2 * part * BYTES / cluster.between.bandwidth
        seconds += min(ring_seconds(part, machines, cluster.between), tree)
    return seconds


# ---- the model: an iteration ----------------------------------------------------------------


UPDATE_PASSES = (
    30  # over a vector of parameters, read or written: Adam from elementary operations, and flattening
)


@dataclass(frozen=True)
class Cost:
    """Of a work, whatever computes it."""

    parameters: int
    task_flops: float
    operations: int  # that the host launches for a meta-gradient, however many tasks


@dataclass(frozen=True)
class Iteration:
    """Seconds."""

    compute: float
    update: float
    communication: float

    @property
    def total(self) -> float:
        return self.compute + self.update + self.communication


def gpu_iteration(
    cost: Cost,
    tasks: int,
    gpus: int,
    cluster: Cluster,
    efficiency: float,
    *,
    sharded: bool = False,
    local_steps: int = 1,
) -> Iteration:
    """One iteration: the largest share's meta-gradient, the all-reduce after it, the outer update.

    Nothing overlaps. The host launches while the GPU computes, so that the slower of the two counts.

    Arguments:
        sharded: each process updates its part of the parameters, and keeps that part of the moments.
        local_steps: iterations from one exchange to the next.
    """
    arithmetic = share(tasks, gpus) * cost.task_flops / (cluster.peak * efficiency)
    part = cost.parameters / (gpus if sharded else 1)
    return Iteration(
        max(arithmetic, cost.operations * cluster.launch),
        UPDATE_PASSES * BYTES * part / cluster.memory_bandwidth,
        all_reduce_seconds(cost.parameters + EXTRA_NUMBERS, gpus, cluster) / local_steps,
    )


@dataclass(frozen=True)
class End:
    """Where scaling ends."""

    half: int  # the most GPUs of which at least half the time is used: efficiency 50 % or more
    last: int  # the fewest that are within 5 % of the shortest time: more of them gain nothing


def end_of_scaling(seconds: Callable[[int], float], tasks: int) -> End:
    """Looks at every number of GPUs up to that of tasks; those beyond would have none."""
    counts = range(1, min(tasks, MOST_GPUS) + 1)
    times = [seconds(n) for n in counts]
    half = max(n for n, t in zip(counts, times, strict=True) if times[0] / (n * t) >= 0.5)
    last = next(n for n, t in zip(counts, times, strict=True) if t <= 1.05 * min(times))
    return End(half, last)


@dataclass(frozen=True)
class Cpu:
    """Of one process, measured: seconds of an iteration of n tasks are `fixed + per_task * n`."""

    fixed: float
    per_task: float
    cores: int


def cpu_iteration(cpu: Cpu, tasks: int, processes: int, parameters: int, link: Link | None) -> Iteration:
    """Processes of one thread on few cores: where they are more, each computes slower by processes / cores.

    The link is that of so many processes on these cores: it has been measured under the same crowding.
    """
    slower = max(1.0, processes / cpu.cores)
    compute = slower * (cpu.fixed + cpu.per_task * share(tasks, processes))
    communication = ring_seconds(parameters + EXTRA_NUMBERS, processes, link) if link else 0.0
    return Iteration(compute, 0.0, communication)


# ---- the model: fits ------------------------------------------------------------------------


def fit_line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Offset and slope, neither below 0, with the least relative error."""
    rows = np.array([[1.0, value] for value in x]) / np.array(y)[:, None]
    (offset, slope), *_ = np.linalg.lstsq(rows, np.ones(len(y)))
    if offset < 0:
        ratio = np.array(x) / np.array(y)
        return 0.0, float(ratio.sum() / (ratio**2).sum())
    if slope < 0:
        return float(np.mean(y)), 0.0
    return float(offset), float(slope)


def fit_link(numbers: Sequence[int], seconds: Sequence[float], processes: int) -> Link:
    """The latency and the bandwidth of a ring with which the model comes closest."""
    offset, slope = fit_line([ring_bytes(count, processes) for count in numbers], seconds)
    return Link(offset / (2 * (processes - 1)), 1 / slope if slope else math.inf)


# ---- counting, on real networks -------------------------------------------------------------


def flops_of(function: Callable[[], Any]) -> float:
    """Of the matrix products and convolutions, a multiplication and an addition being two."""
    with FlopCounterMode(display=False) as counter:
        function()
    return float(counter.get_total_flops())


def forward_flops(network: Network, outputs: int = 5) -> float:
    """Of the forward pass of one example through the real network, batch norm in training."""
    module, x = network.make(outputs), torch.randn(2, *network.inputs)
    with torch.no_grad():
        return flops_of(lambda: module(x)) / 2


def parameters_of(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def random_batch(inputs: tuple[int, ...], outputs: int, tasks: int, examples: int) -> TaskBatch:
    """Noise: what it shows does not change the work. One output is regression."""
    x = torch.randn(tasks, examples, *inputs)
    y = torch.randn(tasks, examples, 1) if outputs == 1 else torch.randint(0, outputs, (tasks, examples))
    return TaskBatch(x, y, x, y)


def _maml(module: nn.Module, outputs: int, work: Work, **options: Any) -> MAML:
    loss = mse_loss if outputs == 1 else cross_entropy
    chosen: dict[str, Any] = {"steps": work.steps, "meta_gradient": work.order, "engine": work.engine}
    return MAML(module, loss, inner_lr=0.01, **chosen | options)


def counted_passes(work: Work, engine: str, tasks: int = 4, examples: int = 5) -> float:
    """FLOPs of the real `MAML.meta_gradient` over those of a forward pass of each support example.

    By im2col: for the weights of a grouped convolution the counter of torch 2.15 counts every group's
    gradient as if it were that of all groups.
    """
    network = NETWORKS[work.network]
    module = network.make(work.outputs)
    maml = _maml(module, work.outputs, work, engine=engine, convolution="im2col")
    batch = random_batch(network.inputs, work.outputs, tasks, examples)
    total = flops_of(lambda: maml.meta_gradient(maml.initial_parameters(), batch))
    return total / (tasks * examples * forward_flops(network, work.outputs))


def counted_passes_by_autograd(network: Network, steps: int, order: str) -> float:
    """The same by a plain loop for one task, on tensors without numbers, where large networks are cheap."""
    with torch.device("meta"):
        module = network.make(5)
        x = torch.empty(2, *network.inputs)
        y = torch.zeros(2, dtype=torch.int64)

    def meta_gradient() -> None:
        fast: dict[str, Tensor] = dict(module.named_parameters())
        for _ in range(steps):
            loss = cross_entropy(functional_call(module, fast, x), y)
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=order == "exact")
            fast = {k: w - 0.01 * g for (k, w), g in zip(fast.items(), gradients, strict=True)}
        cross_entropy(functional_call(module, fast, x), y).backward()

    with torch.no_grad():
        forward = flops_of(lambda: module(x))
    return flops_of(meta_gradient) / forward


class _Operations(TorchDispatchMode):
    """Counts operations that do something: a view launches nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += not func.is_view
        return func(*args, **(kwargs or {}))


def operations_of(work: Work) -> int:
    """Operations of a meta-gradient, whatever the number of tasks; they grow with the steps by a constant."""
    make, inputs = NETWORKS[work.network].small
    module = make(work.outputs)
    batch = random_batch(inputs, work.outputs, 1, 2)
    counts = []
    for steps in (1, 2) if work.steps > 1 else (1,):
        maml = _maml(module, work.outputs, work, steps=steps)
        with _Operations() as counted:
            maml.meta_gradient(maml.initial_parameters(), batch)
        counts.append(counted.number)
    return counts[0] if work.steps == 1 else counts[0] + (work.steps - 1) * (counts[1] - counts[0])


def cost_of(work: Work) -> Cost:
    network = NETWORKS[work.network]
    flops = task_flops(
        forward_flops(network, work.outputs),
        work.support,
        work.query,
        work.steps,
        order=work.order,
        engine=work.engine,
    )
    return Cost(parameters_of(network.make(work.outputs)), flops, operations_of(work))


# ---- measuring ------------------------------------------------------------------------------


def bytes_received() -> int:
    """By the loopback interface since the machine began, headers included (Linux)."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split(":")[1].split()[0]) for line in lines if line.strip().startswith("lo:"))


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"}


def several(processes: int, script: Path, arguments: Sequence[str]) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launcher, str(script), *arguments]


def called(line: Sequence[str]) -> str:
    """The command's output; ends with its last words where it fails."""
    done = subprocess.run(line, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(line)}\n{done.stderr[-2000:]}")
    return done.stdout


COLLECTIVES = ("all_reduce", "reduce_scatter", "all_gather")


def collective(name: str, numbers: int, processes: int) -> Callable[[], Any]:
    from torch import distributed

    whole = torch.zeros(-(-numbers // processes) * processes)
    part = torch.zeros(len(whole) // processes)
    return {
        "all_reduce": lambda: distributed.all_reduce(whole),
        "reduce_scatter": lambda: distributed.reduce_scatter_tensor(part, whole),
        "all_gather": lambda: distributed.all_gather_into_tensor(whole, part),
    }[name]


def collectives_worker(sizes: list[int], rounds: int, file: Path) -> None:
    """What each of the processes does: times the collectives; the first writes seconds and bytes down."""
    from torch import distributed

    distributed.init_process_group("gloo")
    processes, first = distributed.get_world_size(), distributed.get_rank() == 0
    found: list[dict[str, Any]] = []
    for name in COLLECTIVES:
        for numbers in sizes:
            call = collective(name, numbers, processes)
            times = max(3, min(100, 2_000_000 // numbers))
            seconds, sent = [], []
            call()
            for _ in range(rounds):
                distributed.barrier()
                before, begin = bytes_received(), time.perf_counter()
                for _ in range(times):
                    call()
                seconds.append((time.perf_counter() - begin) / times)
                distributed.barrier()
                sent.append((bytes_received() - before) / times)
            row = {
                "collective": name,
                "numbers": numbers,
                "seconds": seconds,
                "bytes": statistics.median(sent),
            }
            found.append(row)
    if first:
        file.write_text(json.dumps(found))
    distributed.destroy_process_group()


def measure_collectives(processes: int, sizes: Sequence[int], rounds: int) -> list[dict[str, Any]]:
    """Medians over the rounds, in processes of their own."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "collectives.json"
        plan = json.dumps([list(sizes), rounds, str(file)])
        called(several(processes, Path(__file__), ["--worker", plan]))
        rows = json.loads(file.read_text())
    return [row | {"seconds": statistics.median(row["seconds"])} for row in rows]


@dataclass(frozen=True)
class Run:
    """A work that main.py trains on, uncompiled, and how long."""

    name: str
    flags: tuple[str, ...]
    network: str
    outputs: int
    tasks: int
    log_every: int
    points: int  # of the curves; the first is left out


RUNS = (
    Run("sinusoid, 25 tasks", ("--dataset", "sinusoid"), "mlp", 1, 25, 100, 7),
    Run("Omniglot 5-way 1-shot, 32 tasks", ("--dataset", "omniglot"), "conv", 5, 32, 4, 7),
)


@dataclass(frozen=True)
class Outcome:
    """Of a run: seconds of an iteration, between the points of its curves, and what the loopback received."""

    seconds: list[float]
    bytes: int
    wall: float


def train(run: Run, processes: int, tasks: int, points: int, threads: bool) -> Outcome:
    """main.py for so many points; reads the rates from its event files, the first left out."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    iterations = str(points * run.log_every)
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            *run.flags,
            "--meta-batch-size",
            str(tasks),
            "--iterations",
            iterations,
            "--compile",
            "off",
            "--log-every",
            str(run.log_every),
            "--val-every",
            iterations,
            "--save-every",
            iterations,
            "--checkpoint-path",
            folder,
            "--run-name",
            "run",
            *(["--threads", "1"] if threads else []),
        ]
        before, begin = bytes_received(), time.monotonic()
        alone = [sys.executable, str(ROOT / "main.py"), *flags]
        called(alone if processes == 1 else several(processes, ROOT / "main.py", flags))
        received, wall = bytes_received() - before, time.monotonic() - begin
        events = EventAccumulator(str(Path(folder) / "run"))
        events.Reload()
        rates = [event.value for event in events.Scalars("speed/iterations_per_second")]
    return Outcome([1 / rate for rate in rates[1:]], received, wall)


def background(seconds: float = 3.0) -> float:
    """Bytes a second that the loopback receives from others."""
    before = bytes_received()
    time.sleep(seconds)
    return (bytes_received() - before) / seconds


def quartiles(values: Sequence[float]) -> list[float]:
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


class Others:
    """How many cores others have used meanwhile: the machine's time less that of this process's children."""

    def __init__(self, found: list[float]) -> None:
        self.found = found

    @staticmethod
    def seconds() -> tuple[float, float]:
        user, nice, system, _, _, irq, soft_irq, *_ = (
            Path("/proc/stat").read_text().split("\n")[0].split()[1:]
        )
        ticks = sum(map(int, (user, nice, system, irq, soft_irq)))
        return ticks / os.sysconf("SC_CLK_TCK") - sum(os.times()[:4]), time.monotonic()

    def __enter__(self) -> None:
        self.begin = self.seconds()

    def __exit__(self, *_: object) -> None:
        used, now = self.seconds()
        self.found.append(max(0.0, used - self.begin[0]) / (now - self.begin[1]))


def measure_run(run: Run, processes: Sequence[int], rounds: int, threads: bool) -> dict[str, Any]:
    """In turn, round after round: the shares of one process, copies of it at once, and runs with several.

    The copies know nothing of each other: what they lose is lost to shared cores and caches alone. Bytes are
    those of a long run less those of a short one, so that what is sent at start and end drops out.
    """
    shares = sorted({share(run.tasks, n) for n in PROCESSES}, reverse=True)
    of_share: dict[int, list[float]] = {tasks: [] for tasks in shares}
    of_copies: dict[int, list[float]] = {n: [] for n in PROCESSES[1:]}
    of_run: dict[int, list[float]] = {n: [] for n in processes[1:]}
    outcomes: dict[int, Outcome] = {}
    others: list[float] = []
    for _ in range(rounds):
        for tasks in shares:
            with Others(others):
                of_share[tasks] += train(run, 1, tasks, run.points, threads).seconds
        for number in PROCESSES[1:]:

            def copy(_: int, tasks: int = share(run.tasks, number)) -> list[float]:
                return train(run, 1, tasks, run.points, threads).seconds

            with Others(others), ThreadPoolExecutor(number) as pool:
                of_copies[number] += [s for found in pool.map(copy, range(number)) for s in found]
        for number in processes[1:]:
            with Others(others):
                outcomes[number] = train(run, number, run.tasks, run.points, threads)
            of_run[number] += outcomes[number].seconds
    of_run[1] = of_share[run.tasks]
    sent = {}
    for number, long in outcomes.items():
        short = train(run, number, run.tasks, 2, threads)
        idle = background() * (long.wall - short.wall)
        sent[number] = (long.bytes - short.bytes - idle) / ((run.points - 2) * run.log_every)
    print(f"  {run.name}: done", flush=True)
    return {
        "run": asdict(run),
        "parameters": parameters_of(NETWORKS[run.network].make(run.outputs)),
        "shares": {n: quartiles(values) for n, values in of_share.items()},
        "copies": {n: quartiles(values) for n, values in of_copies.items()},
        "processes": {n: quartiles(values) for n, values in of_run.items()},
        "bytes": sent,
        "others": statistics.median(others),
    }


def runs_in_parallel() -> bool:
    """Whether main.py takes several processes and threads for each: without, several would train the same."""
    return "--threads" in called([sys.executable, str(ROOT / "main.py"), "--help"])


# ---- the rate of one GPU --------------------------------------------------------------------


def measure_rate(work: Work, device: torch.device, sizes: Sequence[int], peak: float) -> dict[str, Any]:
    """Seconds of the tool's meta-gradient over the number of tasks, and the share of the peak it makes."""
    network = NETWORKS[work.network]
    module = network.make(work.outputs).to(device)
    maml = _maml(module, work.outputs, work)
    parameters = {name: w.to(device) for name, w in maml.initial_parameters().items()}
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    seconds = []
    for tasks in sizes:
        x = torch.randn(tasks, work.support + work.query, *network.inputs, device=device)
        y = torch.randint(0, work.outputs, x.shape[:2], device=device)
        halves = [work.support, work.query]
        (support_x, query_x), (support_y, query_y) = x.split(halves, 1), y.split(halves, 1)
        batch = TaskBatch(support_x, support_y, query_x, query_y)
        times = []
        for _ in range(4):
            wait()
            begin = time.perf_counter()
            maml.meta_gradient(parameters, batch)
            wait()
            times.append(time.perf_counter() - begin)
        seconds.append(statistics.median(times[1:]))
    fixed, per_task = fit_line(sizes, seconds)
    cost = cost_of(work)
    rate = cost.task_flops / per_task if per_task else math.inf
    return {
        "work": work.title,
        "tasks": list(sizes),
        "seconds": seconds,
        "fixed": fixed,
        "per_task": per_task,
        "tflop_per_s": rate / 1e12,
        "efficiency": rate / peak,
        "seconds_an_operation": min(seconds) / cost.operations,
    }


# ---- tables ---------------------------------------------------------------------------------


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [" | ".join(head), "|".join("-" * len(head)), *(" | ".join(row) for row in rows)]
    return "\n".join(f"|{line}|" if set(line) <= {"-", "|"} else f"| {line} |" for line in lines)


def duration(seconds: float) -> str:
    """Three digits, in s, ms or us."""
    if seconds >= 1000:
        return f"{seconds:,.0f} s"
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def size(number: float) -> str:
    for unit, limit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= limit:
            return f"{number / limit:.3g} {unit}"
    return f"{number:.3g} "


def networks_table() -> tuple[str, list[dict[str, Any]]]:
    """What one forward pass costs, and parameters beside the published ones."""
    rows, found = [], []
    for name, network in NETWORKS.items():
        module = network.make(5 if len(network.inputs) > 1 else 1)
        head = [m for m in module.modules() if isinstance(m, nn.Linear)][-1]
        record: dict[str, Any] = {
            "network": name,
            "parameters": parameters_of(module),
            "without_head": parameters_of(module) - parameters_of(head),
            "forward_flops": forward_flops(network, 5 if len(network.inputs) > 1 else 1),
        }
        published = PUBLISHED.get(name)
        if published and not abs(record["without_head"] / published - 1) < 0.02:
            raise SystemExit(f"{name} has {record['without_head']} parameters, published are {published:.3g}")
        found.append(record)
        shape = " x ".join(map(str, network.inputs))
        rows.append([name, shape, f"{record['parameters']:,}", f"{size(record['forward_flops'])}FLOP"])
    return table(["network", "example", "parameters", "forward pass"], rows), found


def passes_table() -> tuple[str, list[dict[str, Any]]]:
    """The multipliers of the model beside counted ones, for as many query as support examples."""
    rows, found = [], []
    for name in ("mlp", "conv", "conv4"):
        for steps in (1, 5):
            outputs = 1 if name == "mlp" else 5
            cells = []
            for order, engine in (("first-order", "unrolled"), ("exact", "unrolled"), ("exact", "adjoint")):
                work = Work("", name, outputs, 5, 5, steps, order)
                counted = counted_passes(work, engine)
                model = task_flops(1, 1, 1, steps, order=order, engine=engine)
                found.append(
                    {
                        "network": name,
                        "steps": steps,
                        "order": order,
                        "engine": engine,
                        "how": "MAML.meta_gradient",
                        "counted": counted,
                        "model": model,
                    }
                )
                cells.append(f"{counted:.2f} ({model:.0f})")
            rows.append([name, "`meta_gradient`", str(steps), *cells])
    for name in ("resnet12", "vit-b-16"):
        for steps in (1, 2):
            cells = []
            for order in ("first-order", "exact"):
                counted = counted_passes_by_autograd(NETWORKS[name], steps, order)
                model = task_flops(1, 1, 1, steps, order=order)
                found.append(
                    {
                        "network": name,
                        "steps": steps,
                        "order": order,
                        "engine": "unrolled",
                        "how": "autograd",
                        "counted": counted,
                        "model": model,
                    }
                )
                cells.append(f"{counted:.2f} ({model:.0f})")
            rows.append([name, "plain loop", str(steps), *cells, ""])
    head = ["network", "counted on", "steps", "first order", "exact, unrolled", "exact, adjoint"]
    return table(head, rows), found


def costs_table(costs: dict[str, Cost]) -> str:
    rows = [
        [
            title,
            f"{c.parameters:,}",
            f"{size(c.task_flops)}FLOP",
            f"{c.operations:,}",
            f"{size(BYTES * c.parameters)}B",
        ]
        for title, c in costs.items()
    ]
    return table(["work", "meta-parameters P", "a task's meta-gradient", "operations", "gradient"], rows)


def predict(
    work: Work, cost: Cost, tasks: int, cluster: Cluster, efficiency: float, **options: Any
) -> dict[str, Any]:
    def seconds(gpus: int, factor: float = 1.0) -> float:
        return gpu_iteration(cost, tasks, gpus, cluster, factor * efficiency, **options).total

    iterations = {n: gpu_iteration(cost, tasks, n, cluster, efficiency, **options) for n in (1, *GPUS)}
    return {
        "work": work.title,
        "tasks": tasks,
        "efficiency_assumed": efficiency,
        "launch_assumed": cluster.launch,
        "shortest": min(seconds(n) for n in range(1, min(tasks, MOST_GPUS) + 1)),
        "gpus": {
            n: asdict(i)
            | {
                "seconds": i.total,
                "speed_up": iterations[1].total / i.total,
                "communication_share": i.communication / i.total,
                "bytes_each": ring_bytes(cost.parameters, n),
            }
            for n, i in iterations.items()
        },
        "ends": {
            str(factor): asdict(end_of_scaling(lambda n, f=factor: seconds(n, f), tasks))  # type: ignore[misc]
            for factor in (0.5, 1.0, 2.0)
        },
    }


def predictions_table(predictions: Sequence[dict[str, Any]]) -> str:
    """More GPUs than tasks have no column: those beyond would idle."""
    rows = []
    for p in predictions:
        cells = [
            f"{p['gpus'][n]['speed_up']:.3g} x, {duration(p['gpus'][n]['seconds'])}"
            if n <= p["tasks"]
            else ""
            for n in GPUS
        ]
        ends = p["ends"]
        half = f"{ends['1.0']['half']:,} ({ends['0.5']['half']:,}, {ends['2.0']['half']:,})"
        first = [p["work"], f"{p['tasks']:,}", duration(p["gpus"][1]["seconds"])]
        rows.append([*first, *cells, half, f"{ends['1.0']['last']:,}", duration(p["shortest"])])
    head = ["work", "T", "1 GPU", *(f"{n} GPUs" for n in GPUS), "GPUs at 50 %", "no gain beyond", "shortest"]
    return table(head, rows)


def communication_table(costs: dict[str, Cost], cluster: Cluster) -> str:
    rows = []
    for title, cost in costs.items():
        numbers = cost.parameters + EXTRA_NUMBERS
        rows.append(
            [
                title,
                f"{size(ring_bytes(numbers, 512))}B",
                *(duration(all_reduce_seconds(numbers, n, cluster)) for n in GPUS),
                duration(ring_seconds(numbers, 512, cluster.between)),
            ]
        )
    return table(
        ["work", "sent by each of 512", *(f"{n} GPUs" for n in GPUS), "512 in one ring over the network"],
        rows,
    )


def collectives_table(rows: dict[int, list[dict[str, Any]]], links: dict[int, Link]) -> str:
    lines = []
    for processes, found in rows.items():
        if processes == 1:
            continue
        for row in found:
            model = {"all_reduce": 1.0, "reduce_scatter": 0.5, "all_gather": 0.5}[row["collective"]]
            expected = model * processes * ring_bytes(row["numbers"], processes)
            fitted = ring_seconds(row["numbers"], processes, links[processes])
            name = row["collective"].replace("_", "-")
            lines.append(
                [
                    name,
                    str(processes),
                    f"{row['numbers']:,}",
                    duration(row["seconds"]),
                    duration(fitted) if name == "all-reduce" else "",
                    f"{size(row['bytes'])}B",
                    f"{row['bytes'] / expected:.2f}",
                ]
            )
    head = ["gloo", "processes", "numbers", "measured", "fit", "bytes on lo", "over the model's"]
    fits = [
        f"{n} processes: latency {duration(link.latency)}, bandwidth {size(link.bandwidth)}B/s"
        for n, link in links.items()
    ]
    return table(head, lines) + "\n\nFit of the all-reduce: " + "; ".join(fits) + "."


def compare(measured: dict[str, Any], links: dict[int, Link], cores: int) -> dict[str, Any]:
    """Of one run: the fit over the shares, and prediction beside measurement."""
    shares = {int(n): q[1] for n, q in measured["shares"].items()}
    cpu = Cpu(*fit_line(list(shares), list(shares.values())), cores)
    run, parameters = measured["run"], measured["parameters"]
    rows = []
    alone = cpu_iteration(cpu, run["tasks"], 1, parameters, None).total
    for processes in PROCESSES:
        link = links.get(processes)
        predicted = cpu_iteration(cpu, run["tasks"], processes, parameters, link)
        row: dict[str, Any] = {
            "processes": processes,
            "tasks_each": share(run["tasks"], processes),
            "compute": predicted.compute,
            "communication": predicted.communication,
            "predicted": predicted.total,
            "predicted_speed_up": alone / predicted.total,
            "predicted_bytes": processes * ring_bytes(parameters + EXTRA_NUMBERS, processes),
        }
        if processes in measured["copies"]:
            row["copies"] = measured["copies"][processes][1]
        if processes in measured["processes"]:
            row["measured"] = measured["processes"][processes]
            row["measured_speed_up"] = measured["processes"][1][1] / row["measured"][1]
            row["measured_bytes"] = measured["bytes"].get(processes)
        rows.append(row)
    return {
        "run": run["name"],
        "others": measured["others"],
        "cpu": asdict(cpu),
        "parameters": parameters,
        "shares": shares,
        "rows": rows,
    }


def measured_table(comparisons: Sequence[dict[str, Any]]) -> str:
    rows, byte_rows, fits = [], [], []
    for c in comparisons:
        fits.append(f"{c['run']} {duration(c['cpu']['fixed'])} + {duration(c['cpu']['per_task'])} a task")
        for r in c["rows"]:
            several = r["processes"] > 1
            first = [c["run"], str(r["processes"])]
            model = [
                duration(r["compute"]),
                duration(r["communication"]) if several else "",
                duration(r["predicted"]),
            ]
            copies = duration(r["copies"]) if "copies" in r else ""
            found = ["not measured", "", f"{r['predicted_speed_up']:.2f}", ""]
            if "measured" in r:
                low, middle, high = r["measured"]
                found = [
                    f"{duration(middle)} ({duration(low)} to {duration(high)})",
                    f"{middle / r['predicted']:.2f}",
                    f"{r['predicted_speed_up']:.2f}",
                    f"{r['measured_speed_up']:.2f}",
                ]
            rows.append([*first, str(r["tasks_each"]), *model, copies, *found])
            if several:
                sent, expected = r.get("measured_bytes"), r["predicted_bytes"]
                counted = [f"{sent:,.0f}", f"{100 * (sent / expected - 1):+.1f} %"] if sent else ["", ""]
                byte_rows.append([*first, f"{expected:,.0f}", *counted])
    head = ["run", "processes", "tasks of each", "compute", "all-reduce", "predicted", "copies alone"]
    head += ["measured (quartiles)", "measured / predicted", "speed-up predicted", "measured"]
    bytes_head = ["run", "processes", "bytes an iteration, model", "counted on lo", "headers and others"]
    busy = ", ".join(f"{c['others']:.1f}" for c in comparisons)
    fitted = f"One process, fitted: {'; '.join(fits)}. Cores that others used meanwhile: {busy}."
    return f"{table(head, rows)}\n\n{fitted}\n\n{table(bytes_head, byte_rows)}"


# ---- the command ----------------------------------------------------------------------------


def model(cluster: Cluster, efficiencies: dict[str, float]) -> dict[str, Any]:
    """Counts, predicts, prints."""
    networks, network_records = networks_table()
    print(f"Counted by FlopCounterMode, one example:\n\n{networks}\n")
    passes, pass_records = passes_table()
    print(f"Forward passes a support example, counted (model), as many query examples:\n\n{passes}\n")
    costs = {work.title: cost_of(work) for work in WORKS}
    print(f"{costs_table(costs)}\n")
    print(f"Predicted, an all-reduce of P float32 numbers:\n\n{communication_table(costs, cluster)}\n")
    predictions = [
        predict(work, costs[work.title], tasks, cluster, efficiencies[work.network])
        for work in WORKS
        for tasks in TASKS
    ]
    print(f"Predicted:\n\n{predictions_table(predictions)}\n")
    graph = replace(cluster, launch=RECORDED)
    recorded = [
        predict(work, costs[work.title], tasks, graph, efficiencies[work.network])
        for work in WORKS
        if work.network == "conv"
        for tasks in TASKS
    ]
    print(f"Predicted, replayed as a CUDA graph:\n\n{predictions_table(recorded)}\n", flush=True)
    return {
        "networks": network_records,
        "passes": pass_records,
        "cluster": asdict(cluster),
        "sources": SOURCES,
        "costs": {title: asdict(cost) for title, cost in costs.items()},
        "predictions": predictions,
        "predictions_recorded": recorded,
    }


def measure(quick: bool) -> dict[str, Any]:
    """Measures on this machine, compares, prints."""
    cores = len(os.sched_getaffinity(0))
    sizes = (1761, 111_749, 1_000_000, 10_000_000)[: 3 if quick else 4]
    collectives = {n: measure_collectives(n, sizes, 3 if quick else 9) for n in PROCESSES}
    links = {}
    for n, rows in collectives.items():
        if n > 1:
            chosen = [row for row in rows if row["collective"] == "all_reduce"]
            links[n] = fit_link([r["numbers"] for r in chosen], [r["seconds"] for r in chosen], n)
    parallel = runs_in_parallel()
    if not parallel:
        print("main.py has no --threads: one process alone is measured", file=sys.stderr)
    root = Path(os.environ.get("MAML_DATA_ROOT") or ROOT / "data")
    runs = [run for run in RUNS if "omniglot" not in run.flags or (root / "omniglot-py").is_dir()]
    if quick:
        runs = [replace(run, points=5) for run in runs]
    processes = PROCESSES if parallel else (1,)
    measured = [measure_run(run, processes, 1 if quick else 3, parallel) for run in runs]
    comparisons = [compare(m, links, cores) for m in measured]
    print(
        f"\n<!-- {MARK} -->\n{cores} cores, torch {torch.__version__}, one thread a process, uncompiled; on"
    )
    print("more processes than cores compute is predicted slower by processes / cores. Copies alone: as many")
    print("processes at once, each with its share of the tasks, that exchange nothing.\n")
    print(
        f"{measured_table(comparisons)}\n\n{collectives_table(collectives, links)}\n<!-- /{MARK} -->",
        flush=True,
    )
    return {
        "collectives": collectives,
        "links": {n: asdict(link) for n, link in links.items()},
        "runs": measured,
        "comparisons": comparisons,
    }


def parse() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, shorter runs, smaller vectors")
    parser.add_argument("--model-only", action="store_true", help="count and predict, measure nothing")
    parser.add_argument("--rate", metavar="DEVICE", help="measure the rate of a device instead")
    parser.add_argument("--rate-works", type=int, default=3, help="how many of the works, the first ones")
    parser.add_argument("--rate-tasks", type=int, nargs="+", default=[1, 2, 4, 8], help="tasks at once")
    parser.add_argument("--peak", type=float, default=H100.peak, help="FLOP/s of a GPU")
    parser.add_argument("--launch", type=float, default=H100.launch, help="seconds of the host an operation")
    parser.add_argument("--efficiency", nargs="*", default=[], metavar="NETWORK=SHARE", help="of that peak")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    given = parse()
    torch.set_num_threads(1)
    if given.worker:
        sizes, rounds, file = json.loads(given.worker)
        collectives_worker(sizes, rounds, Path(file))
        return
    if given.rate:
        device = torch.device(given.rate)
        for work in WORKS[: given.rate_works]:
            print(json.dumps(measure_rate(work, device, given.rate_tasks, given.peak)), flush=True)
        return
    efficiencies = {name: network.efficiency for name, network in NETWORKS.items()}
    for pair in given.efficiency:
        name, _, value = pair.partition("=")
        if name not in efficiencies:
            raise SystemExit(f"--efficiency {pair}: no network {name}; of {', '.join(efficiencies)}")
        efficiencies[name] = float(value)
    result: dict[str, Any] = {"machine": conditions(), "quick": given.quick}
    cluster = replace(H100, peak=given.peak, launch=given.launch)
    result["model"] = model(cluster, efficiencies)
    given.out.mkdir(parents=True, exist_ok=True)
    written = given.out / ("scaling-model.json" if given.model_only else "scaling.json")
    if not given.model_only:
        result["measured"] = measure(given.quick)
    written.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\nWritten: {written}")


if __name__ == "__main__":
    launch(main)
