"""Functions of tensors, compiled ahead of time to machine code and kept between runs.

The trainer hands its step to a `Compiler`. A function is traced to a graph of tensor operations (`make_fx`:
through `vmap`, `grad` and `jvp`), which AOTInductor compiles to a library that runs without Python. Libraries
are cached by a hash of their graph and of everything else they depend on; a cached one loads in milliseconds.

A library is code: it is loaded only from a folder that belongs to the user.
"""

from __future__ import annotations

import hashlib
import io
import logging
import os
import platform
import shutil
import sys
import warnings
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.errors import fold_message
from common.files import find_user_cache, lock_file, write_bytes

Function = Callable[..., Any]

CPP_COMPILERS = {"darwin": "clang++", "win32": "cl"}  # where CXX names none; else g++


BUILDING: dict[str, Any] = {
    "aot_inductor.package": True,
    # headers compiled in advance, and a program that tries the vector instructions: they take longer than
    # they save, since a run compiles one to five functions, and one that fails runs uncompiled
    "aot_inductor.precompile_headers": False,
    "cpp.vec_isa_ok": True,
}


class CompilationError(Exception):
    """Say in one line why a function could not be compiled."""


def cpp_compiler_name() -> str:
    return os.environ.get("CXX") or CPP_COMPILERS.get(sys.platform, "g++")


def cpp_compiler() -> str | None:
    """Return the C++ compiler that Inductor would call, or None where this machine has none."""
    return shutil.which(cpp_compiler_name())


def explain_uncompiled(device: torch.device) -> str | None:
    """Return a line that says what this machine lacks to compile for a device; None if it lacks nothing."""
    if device.type != "mps" and cpp_compiler():
        return None
    return f"main.py: not compiled: that needs a C++ compiler (install {cpp_compiler_name()}), and no MPS"


def cache_folder() -> Path:
    """Make the folder of compiled functions; raise CompilationError if it is another user's: code is run."""
    folder = find_user_cache() / "compiled"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "geteuid") and folder.stat().st_uid != os.geteuid():
        raise CompilationError(f"{folder} is another user's: name a folder of your own in XDG_CACHE_HOME")
    return folder


class Compiler:
    """Compile functions of tensors; an instance is called with a function and returns the compiled one.

    The functions take and return tensors in tuples and dictionaries, and are compiled for each new shape of
    their inputs. They run uncompiled until `active` is set, and while a function that calls them is traced.

    Args:
        device: where the tensors are; part of what a library depends on, like the number of threads.
        folder: of the libraries; None for the user's cache.
    """

    def __init__(self, device: torch.device, *, folder: Path | None = None) -> None:
        self.device, self.folder = device, folder
        self.interrupted: Callable[[], bool] = lambda: False  # ends building a library, or waiting for it
        self.active = False
        self.compiled = 0  # libraries built by this instance; others were in the cache
        self.failed = False  # a function of `or_plain` could not be compiled
        self._tracing = False

    def __call__(self, function: Function, options: dict[str, Any] | None = None) -> Function:
        """Return the compiled function; `options` are Inductor's."""
        libraries: dict[Any, Function] = {}  # by shapes, types and structure of the inputs

        def run(*arguments: Any) -> Any:
            if not self.active or self._tracing:
                return function(*arguments)
            tensors, structure = _flatten(arguments)
            shapes = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
            signature = shapes, structure and str(structure)
            if signature not in libraries:
                libraries[signature] = self._library(function, tensors, structure, options or {})
            return libraries[signature](tensors)

        return run

    def or_plain(self, function: Function) -> Function:
        """Return the compiled function, which is the function itself once compiling has failed."""
        fast = self(function)

        def run(*arguments: Any) -> Any:
            nonlocal fast
            try:
                return fast(*arguments)
            except CompilationError as error:
                warnings.warn(f"predictions are not compiled: {error}", stacklevel=2)
                fast, self.failed = function, True
                return function(*arguments)

        return run

    def _library(
        self, function: Function, tensors: list[Tensor], structure: Any, options: dict[str, Any]
    ) -> Function:
        """Load the function's library, which is built first if need be."""
        tensors = [tensor.detach() for tensor in tensors]  # one passed twice would become a single input
        self._tracing = True  # what this function calls becomes part of it
        log_level = logging.root.manager.disable
        try:
            logging.disable(logging.WARNING)  # remarks of PyTorch's compiler
            with warnings.catch_warnings(action="ignore"), torch.enable_grad():
                graph, output_structure = _trace(function, tensors, structure)
                path = (self.folder or cache_folder()) / f"{self._key(graph, tensors, options)}.pt2"
                with lock_file(path.with_suffix(".lock"), interrupted=self.interrupted):
                    self._check_interrupted()
                    if not is_whole(path):  # another process may have just built it
                        self._build(graph, tensors, options, path)
                        self.compiled += 1
                    return load_library(path, output_structure)
        except Exception as error:  # a compiler may fail in any way; the run continues without it
            raise CompilationError(fold_message(error)[:200]) from error
        finally:
            self._tracing = False
            logging.disable(log_level)

    def _build(
        self, graph: torch.fx.GraphModule, tensors: list[Tensor], options: dict[str, Any], path: Path
    ) -> None:
        import sympy
        from torch._inductor import aot_compile
        from torch._inductor.package import package_aoti

        configs = {**BUILDING, **options, "deterministic": torch.are_deterministic_algorithms_enabled()}
        # Inductor simplifies an index to learn its strides, which takes half of its time; expanding it
        # tells the same, and the code is the same
        with patch.object(sympy, "simplify", sympy.expand):
            files: Any = aot_compile(graph, tuple(tensors), options=configs)
        self._check_interrupted()
        package = io.BytesIO()  # where the disk is full, PyTorch's own writer ends the process
        package_aoti(package, files)
        write_bytes(path, package.getbuffer())

    def _check_interrupted(self) -> None:
        if self.interrupted():  # PyTorch's compiler may have swallowed the exception
            raise InterruptedError("interrupted")

    def _key(self, graph: torch.fx.GraphModule, tensors: list[Tensor], options: dict[str, Any]) -> str:
        """Return a hash of everything that the library depends on."""
        cuda = self.device.type == "cuda"
        names = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
        constants = {name: getattr(graph, name).detach().cpu().contiguous() for name in sorted(names)}
        digests = {n: hashlib.sha256(c.flatten().view(torch.uint8).numpy()) for n, c in constants.items()}
        cpuinfo = Path("/proc/cpuinfo")  # Linux's: the code is built for this processor, and for no other
        lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
        content = [
            graph.code,
            [(name, str(c.dtype), c.shape, digests[name].hexdigest()) for name, c in constants.items()],
            [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors],
            sorted(options.items()),
            torch.__version__,
            platform.platform(),
            cpp_compiler(),
            torch.backends.cpu.get_cpu_capability(),
            sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))}),
            torch.cuda.get_device_name(self.device) if cuda else None,
            str(self.device),
            torch.get_num_threads(),
            torch.backends.cuda.matmul.allow_tf32 if cuda else None,
            torch.are_deterministic_algorithms_enabled(),
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def is_whole(path: Path) -> bool:
    """Return whether there is such a library, undamaged: PyTorch does not look at its checksums."""
    try:
        with zipfile.ZipFile(path) as library:
            return library.testzip() is None
    except Exception:  # a damaged file may fail in any way
        return False


def load_library(path: Path, structure: Any) -> Function:
    """Load a compiled function of a list of tensors; `structure` is its outputs'."""
    # single-threaded: one call at a time, and nothing that a CUDA graph could not capture
    model = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
    run = model.loader.boxed_run  # without the parsing of structures at each call
    return lambda tensors: _unflatten(run(tensors), structure)


# ---- from functions to graphs ---------------------------------------------------------------------


def _flatten(value: Any) -> tuple[list[Tensor], Any]:
    """Return contiguous tensors and their structure; None is a tuple's, which is faster than pytree."""
    if type(value) is tuple and all(isinstance(part, Tensor) for part in value):
        return [tensor.contiguous() for tensor in value], None
    tensors, structure = pytree.tree_flatten(value)
    return [tensor.contiguous() for tensor in tensors], structure


def _unflatten(tensors: Sequence[Tensor], structure: Any) -> Any:
    return tuple(tensors) if structure is None else pytree.tree_unflatten(list(tensors), structure)


def _trace(function: Function, tensors: list[Tensor], structure: Any) -> tuple[torch.fx.GraphModule, Any]:
    """Return the function's graph, from flat inputs to flat contiguous outputs, and their structure."""
    from torch.fx.experimental.proxy_tensor import make_fx

    structures = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        outputs, output_structure = _flatten(function(*_unflatten(inputs, structure)))
        structures.append(output_structure)
        return outputs

    # traced by running: with shapes alone ("fake"), `jvp` under `vmap` fails
    graph = make_fx(flat, decomposition_table=REWRITINGS, tracing_mode="real")(*tensors)
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        node.meta.clear()  # Inductor infers the shapes itself
    graph.recompile()
    return graph, structures[-1]


def _threshold_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Write the derivative of ReLU as a product: Inductor keeps a reused mask as bytes, which is slow.

    An infinite gradient of an inactive unit gives NaN instead of 0.
    """
    return gradient * (x > threshold).to(gradient.dtype)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Write a batched product `[b, m, k] @ [b, k, n]` in the form at which libraries are fast."""
    if a.shape[2] == 1:  # an outer product: as a pointwise one it fuses with its neighbours
        return a * b
    rows, columns = a.shape[1], b.shape[2]
    if a.device.type == "cpu" and columns % 8 and rows % 8 == 0:
        # MKL is up to six times slower at rows of such lengths than at the transposed product
        return torch.bmm(b.mT, a.mT).mT
    return NotImplemented


REWRITINGS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.threshold_backward.default: _threshold_backward,
    torch.ops.aten.bmm.default: _bmm,
}
