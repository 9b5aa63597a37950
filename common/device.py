"""Device, precision, threads and processes: decided here, once, and passed on."""

from __future__ import annotations

import logging
import os
import platform
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UsageError
from common.processes import ALONE, World


@dataclass(frozen=True)
class Runtime:
    """Where tensors live, of what type they are, and which processes work on them."""

    device: torch.device
    dtype: torch.dtype
    compute_dtype: torch.dtype | None = None  # of the learner's arithmetic, where it is another
    world: World = ALONE

    def computed_by(
        self, *, processes: int | None = None, runs: int = 1, tasks: int | None = None
    ) -> dict[str, Any]:
        """What the last bits of a result depend on beside what is learned: of so many runs and tasks at
        once, by so many processes; None: all tasks, by all of them."""
        return {
            "processes": processes or self.world.size,
            "runs at once": runs,
            "tasks at once": tasks or "all",
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "torch": str(torch.__version__),
            "deterministic": "yes" if torch.are_deterministic_algorithms_enabled() else "no",
        }

    def describe(self) -> str:
        """The device in words, for people and result files."""
        threads = torch.get_num_threads()
        of_each = "" if self.world.size == 1 else f"{self.world.size} processes of "
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"{platform.processor() or platform.machine()} {self.device.type}"
        return f"{name}, {of_each}{threads} thread{'s' * (threads > 1)}"


def device_of(name: str, world: World) -> torch.device:
    """The device of a name from --device ("auto": CUDA where there is any, else the CPU), of several GPUs
    this process's own.

    Raises UsageError where it is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
    if name == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if name == "mps" and world.size > 1:
        raise UsageError("--device mps is for a process on its own: use --device cpu, or no torchrun")
    if name != "cuda" or world.size == 1:
        return torch.device(name)
    gpus = torch.cuda.device_count()
    if world.local_size > gpus:
        raise UsageError(
            f"{world.local_size} processes on a machine with {gpus} GPUs: torchrun --nproc-per-node={gpus}"
        )
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    return device


THREADS_AT_FIRST = torch.get_num_threads()


def threads_for(asked: int | None, world: World, *, small_tensors: bool) -> int:
    """Threads of this process.

    Without --threads: as OMP_NUM_THREADS says, else one with `small_tensors`, since splitting the sinusoid
    network's operations costs more than it saves (by a quarter on two cores). Several processes share the
    machine's cores; that torchrun sets OMP_NUM_THREADS to one is no decision of the user's.
    """
    if asked is not None:
        return asked
    by_environment = os.environ.get("OMP_NUM_THREADS")
    if by_environment is not None and (world.size == 1 or by_environment != "1"):
        return THREADS_AT_FIRST
    if small_tensors:
        return 1
    return THREADS_AT_FIRST if world.size == 1 else max(1, _cores() // world.local_size)


def _cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_memory() -> int | None:
    """Bytes that this process may use at the most, where the system says so."""
    limits = []
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for file in ("memory.max", "memory/memory.limit_in_bytes"):  # of a container
        with suppress(OSError, ValueError):
            limits.append(int(Path("/sys/fs/cgroup", file).read_text()))
    return min(limits, default=None)


def set_up(
    device: torch.device,
    precision: str,
    *,
    small_tensors: bool,
    threads: int | None = None,
    world: World = ALONE,
    deterministic: bool = False,
) -> Runtime:
    """The runtime on a device; raises UsageError for a precision that it has not.

    `deterministic`: an operator that cannot give the same bits every time raises RuntimeError (see
    `not_deterministic`); Inductor is told so where code is compiled (compiler.py).
    """
    if device.type == "mps" and precision == "float64":
        raise UsageError("--device mps has no float64: use --precision float32 or --device cpu")
    if device.type != "cuda" and precision == "tf32":
        raise UsageError(f"--precision tf32 is for CUDA GPUs, not for --device {device.type}")
    if device.type == "cuda":  # float32 is float32, and the same run gives the same bits
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.deterministic = True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read where cuBLAS is first used
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(deterministic)
    # torch.func's own, of a module that it imports; of an operator of the user's, which the loop over tasks
    # that it asks for would not make faster
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet")
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that it has no folder for its cache
    torch.set_num_threads(threads_for(threads, world, small_tensors=small_tensors))
    dtype, compute_dtype = {
        "float64": (torch.float64, None),
        "float32": (torch.float32, None),
        "tf32": (torch.float32, None),
        "bf16": (torch.float32, torch.bfloat16),
    }[precision]
    return Runtime(device, dtype, compute_dtype, world)


def not_deterministic(error: BaseException | None) -> str | None:
    """What to do, in one line, where an error or one of its causes is an operator without a deterministic
    form."""
    while error is not None:
        operator, sign, _ = str(error).partition(" does not have a deterministic implementation")
        if sign and isinstance(error, RuntimeError):
            return (
                f"--deterministic: the operator {operator.split()[-1]} has no deterministic form here: use "
                "another in the learner or the loss, or leave --deterministic out"
            )
        error = error.__cause__
    return None


def versions() -> dict[str, str]:
    """What a result depends on beside the settings."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
