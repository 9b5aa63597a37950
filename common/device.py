"""Device, precision and threads: decided once by a command, and passed on as a `Runtime`."""

from __future__ import annotations

import ctypes
import getpass
import os
import platform
import timeit
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UsageError
from common.processes import ALONE, World

_INITIAL_THREADS = torch.get_num_threads()


@dataclass(frozen=True)
class Runtime:
    """Device and type of tensors, and the processes that share the work."""

    device: torch.device
    dtype: torch.dtype
    compute_dtype: torch.dtype | None = None  # of the learner's arithmetic; None: `dtype`
    world: World = ALONE

    def computed_by(self, *, processes: int, runs: int, tasks: int | None) -> dict[str, Any]:
        """Return what the last bits of a result depend on, apart from the settings; `tasks` None: all."""
        return {
            "processes": processes,
            "runs at once": runs,
            "tasks at once": tasks or "all",
            "threads": torch.get_num_threads(),
            "device": self.device.type,
            "products": "oneDNN" if torch.get_float32_matmul_precision() == "medium" else "as installed",
            "torch": str(torch.__version__),
            "deterministic": "yes" if torch.are_deterministic_algorithms_enabled() else "no",
        }

    def describe(self) -> str:
        """Return the device in words, for people and result files."""
        on_cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if on_cuda else f"{platform.machine()} {self.device}"
        processes = "" if self.world.size == 1 else f"{self.world.size} processes of "
        threads = torch.get_num_threads()
        return f"{name}, {processes}{threads} thread{'s' * (threads > 1)}"


def find_device(name: str, world: World) -> torch.device:
    """Return the device of a --device name, a GPU for each process; UsageError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if (kind := name.partition(":")[0]) not in available:
        raise UsageError(f"there is no device {name!r}: give {', '.join(available)}")
    if not available[kind]:
        raise UsageError(f"--device {name}: PyTorch finds no such GPU here; use --device cpu")
    if name == "mps" and world.size > 1:
        raise UsageError("--device mps runs one process: use --device cpu, or no torchrun")
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


def threads_for(requested: int | None, world: World, *, small_tensors: bool) -> int:
    """Return the threads of this process: as requested, or OMP_NUM_THREADS (but not torchrun's, which is 1).

    Else one with `small_tensors`, which two cores make a quarter slower, or its share of the cores.
    """
    if requested is not None:
        return requested
    by_user = os.environ.get("OMP_NUM_THREADS") not in (None, "" if world.size == 1 else "1")
    if by_user or (world.size == 1 and not small_tensors):
        return _INITIAL_THREADS
    if small_tensors:
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // world.local_size)


def machine_memory() -> int | None:
    """Return the bytes of memory that this process may use, or None if the system does not say."""
    try:
        limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has none, and other systems not every number
        return None
    with suppress(OSError, ValueError):  # of a container
        limit = min(limit, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return limit


def _name_user() -> None:
    """Name the user where the system cannot, as in some containers: PyTorch 2.11 calls a folder after it."""
    try:
        getpass.getuser()
    except (ImportError, KeyError, OSError):
        os.environ["USER"] = "user"


def keep_freed_memory() -> None:
    """Let glibc keep large tensors' memory for the next ones: the system clears what it is given back."""
    with suppress(AttributeError, OSError, TypeError):  # other C libraries have no `mallopt`
        libc = ctypes.CDLL(None)
        for parameter, size in ((-3, 2**30), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(parameter, size)


def choose_products(device: torch.device, precision: str, *, small_tensors: bool) -> None:
    """Choose the library that multiplies float32 matrices on a CPU.

    oneDNN's setting ("medium") allows it to round inputs to bfloat16 where the processor is faster so:
    "bf16-products". Without rounding, oneDNN is the fast one on AMD's processors with AVX-512, for which MKL
    has no code; one product shows whether it rounds. Small products take MKL less time.
    """
    if device.type != "cpu":  # the setting is CUDA's, too
        return
    cpuinfo = Path("/proc/cpuinfo")
    is_amd = cpuinfo.exists() and "AuthenticAMD" in cpuinfo.read_text(encoding="utf-8")
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    exact = is_amd and wide and precision in ("float32", "bf16") and not small_tensors
    torch.set_float32_matmul_precision("medium" if exact or precision == "bf16-products" else "highest")
    if exact and _rounds_products():
        torch.set_float32_matmul_precision("highest")


def _rounds_products() -> bool:
    a, b = torch.linspace(-1, 1, 2 * 128 * 128).view(2, 128, 128).sin().unbind()
    return bool((a @ b - (a.double() @ b.double())).abs().max() > 1e-3)  # bfloat16 has eight bits


@cache
def warn_if_not_faster(precision: str) -> None:
    """Warn of a reduced precision in which this CPU multiplies no faster than in float32."""
    if precision == "bf16-products" and not _rounds_products():
        warnings.warn("--precision bf16-products is float32 here: the library rounds nothing", stacklevel=2)
    if precision != "bf16":
        return
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(256, 256, dtype=dtype)
        seconds = min(timeit.repeat(partial(torch.mm, a, a), number=1, repeat=5))
        rates.append(2 * 256**3 / seconds / 1e9)
    if rates[1] < rates[0]:
        speeds = "{:.3g} GFLOP/s, float32 {:.3g}".format(*rates[::-1])
        warnings.warn(f"--precision bf16 saves no time on this processor ({speeds})", stacklevel=2)


def make_runtime(device: torch.device, precision: str, world: World = ALONE) -> Runtime:
    """Return the runtime of a device and a precision, and set nothing; UsageError for one that it lacks."""
    only = {"tf32": "cuda", "bf16-products": "cpu"}  # where there is such a thing
    if (device.type, precision) == ("mps", "float64") or only.get(precision, device.type) != device.type:
        raise UsageError(f"--device {device.type} has no {precision}: use float32, or another device")
    dtype = torch.float64 if precision == "float64" else torch.float32
    return Runtime(device, dtype, torch.bfloat16 if precision == "bf16" else None, world)


def set_up(
    device: torch.device,
    precision: str,
    *,
    small_tensors: bool,
    threads: int | None = None,
    world: World = ALONE,
    deterministic: bool = False,
) -> Runtime:
    """Configure PyTorch, of the whole process, for a device; return the runtime as `make_runtime` does.

    With `deterministic`, operators that cannot give the same bits every time raise RuntimeError.
    """
    runtime = make_runtime(device, precision, world)
    if device.type == "cuda":  # float32 is float32, and the same run gives the same bits
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.deterministic = True
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # before cuBLAS is first used
        torch.backends.cudnn.benchmark = False
    _name_user()
    torch.use_deterministic_algorithms(deterministic)
    # about operators that a loop would not make faster
    warnings.filterwarnings("ignore", message="There is a performance drop because we have not yet")
    torch.set_num_threads(threads_for(threads, world, small_tensors=small_tensors))
    choose_products(device, precision, small_tensors=small_tensors)
    if device.type == "cpu":
        warn_if_not_faster(precision)
    keep_freed_memory()
    return runtime


def collect_versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
