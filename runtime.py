"""Device, precision and threads: decided here, once, and passed on as tensors' properties."""

from __future__ import annotations

import os
import platform
import warnings
from dataclasses import dataclass

import numpy as np
import torch

from errors import UsageError


@dataclass(frozen=True)
class Runtime:
    """Where tensors live and of what type they are."""

    device: torch.device
    dtype: torch.dtype
    compute_dtype: torch.dtype | None = None  # of the learner's arithmetic, where it is another

    def describe(self) -> str:
        """The device in words, for people and result files."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        name = platform.processor() or platform.machine()
        return f"{name} {self.device.type}, {torch.get_num_threads()} threads"


def set_up(device: str, precision: str, *, small_tensors: bool) -> Runtime:
    """The runtime of a name from --device ("auto": CUDA where there is any, else the CPU).

    With `small_tensors` one thread is used, unless OMP_NUM_THREADS says otherwise: splitting the
    sinusoid network's operations costs more than it saves (by a quarter on two cores).
    Raises UsageError where the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA GPU here; use --device cpu")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: PyTorch finds no Apple GPU here; use --device cpu")
    if device == "mps" and precision == "float64":
        raise UsageError("--device mps has no float64: use --precision float32 or --device cpu")
    if device != "cuda" and precision == "tf32":
        raise UsageError(f"--precision tf32 is for CUDA GPUs, not for --device {device}")
    if device == "cuda":  # float32 is float32, and the same run gives the same bits
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.allow_tf32 = precision == "tf32"
        torch.backends.cudnn.deterministic = True
    # torch.func's own, of a module that it imports
    warnings.filterwarnings("ignore", message=".*torch.jit.script.* is deprecated", category=FutureWarning)
    if small_tensors and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    dtype, compute_dtype = {
        "float64": (torch.float64, None),
        "float32": (torch.float32, None),
        "tf32": (torch.float32, None),
        "bf16": (torch.float32, torch.bfloat16),
    }[precision]
    return Runtime(torch.device(device), dtype, compute_dtype)


def versions() -> dict[str, str]:
    """What a result depends on beside the settings."""
    return {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
