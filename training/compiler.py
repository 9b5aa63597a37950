"""Functions of tensors, compiled ahead of time to machine code and kept between runs.

The trainer hands its step to a `Compiler`. A function is traced to a graph of tensor operations (`make_fx`:
through `vmap`, `grad` and `jvp`), which AOTInductor compiles to a library that runs without Python. Libraries
are cached by a hash of their graph and of everything else they depend on; a cached one loads in milliseconds.

A library is code: it is loaded only from a folder that belongs to the user.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.errors import one_line
from common.files import one_at_a_time, sync, user_cache

Function = Callable[..., Any]
Signature = tuple[tuple[tuple[torch.Size, torch.dtype], ...], str | None]  # shapes and types, and structure

MOST_LIBRARIES = 500  # kept in the cache
LEFT_SECONDS = 86_400.0  # age from which an unfinished library is a killed process's
CPP_COMPILERS = {"linux": "g++", "darwin": "clang++", "win32": "cl"}  # where CXX names none


class CompilationError(Exception):
    """Say in one line why a function could not be compiled."""


def cpp_compiler() -> str | None:
    """Return the C++ compiler that Inductor would call, or None where this machine has none."""
    return shutil.which(os.environ.get("CXX") or CPP_COMPILERS.get(sys.platform, "g++"))


def cache_folder() -> Path | None:
    """Return the folder of compiled functions in the user's cache; None where it is not the user's own."""
    home = user_cache()
    if home is None:
        return None
    folder = home / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mine = not hasattr(os, "geteuid") or folder.stat().st_uid == os.geteuid()
        return folder if mine and os.access(folder, os.W_OK) else None
    except OSError:
        return None


class Compiler:
    """Compile functions of tensors; an instance is called with a function and returns the compiled one.

    The functions take and return tensors in tuples and dictionaries. They are compiled at their first call
    with inputs of new shapes. They run uncompiled until `active` is set, and while another compiled function
    that calls them is being traced.

    Args:
        device: where the tensors are; part of what a library depends on, like the number of threads.
        folder: of the libraries; None for the user's cache.
    """

    def __init__(self, device: torch.device, *, folder: Path | None = None) -> None:
        self.device = device
        self.folder = folder
        self.interrupted: Callable[[], bool] = lambda: False  # a signal may have hit the C++ compiler, too
        self.active = False
        self._tracing = False
        self.compiled = 0  # libraries built by this instance
        self.loaded = 0  # libraries found in the cache
        self.seconds = 0.0  # spent in tracing, compiling and loading

    def __call__(self, function: Function, options: dict[str, Any] | None = None) -> Function:
        """Return the compiled function; `options` are Inductor's."""
        libraries: dict[Signature, Library] = {}

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

    def _library(
        self, function: Function, tensors: list[Tensor], structure: Any, options: dict[str, Any]
    ) -> Library:
        """Load the function's library, which is built first if need be."""
        begin = time.monotonic()
        tensors = [tensor.detach() for tensor in tensors]  # one passed twice would become a single input
        self._tracing = True  # what this function calls becomes part of it
        try:
            with _quiet(), torch.enable_grad():
                graph, output_structure = _trace(function, tensors, structure)
                path = self._cache() / f"{self._key(graph, tensors, options)}.pt2"
                library = _load(path, output_structure)
                if library is None:
                    with one_at_a_time(path.with_suffix(".lock"), interrupted=self.interrupted):
                        library = _load(path, output_structure)  # another process may have built it
                        if library is None:
                            self._build(graph, tensors, options, path)
                            self.compiled += 1
                            return Library(path, output_structure)
                self.loaded += 1
                return library
        except Exception as error:  # a compiler may fail in any way; the run continues without it
            raise CompilationError(one_line(error)[:200]) from error
        finally:
            self._tracing = False
            self.seconds += time.monotonic() - begin

    def _cache(self) -> Path:
        folder = self.folder or cache_folder()
        if folder is None:
            raise CompilationError("there is no cache folder of this user's own: name one in XDG_CACHE_HOME")
        return folder

    def _build(
        self, graph: torch.fx.GraphModule, tensors: list[Tensor], options: dict[str, Any], path: Path
    ) -> None:
        from torch._inductor import aoti_compile_and_package

        trim(path.parent)
        exported = torch.export.export(graph, tuple(tensors))
        with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as temporary:
            built = aoti_compile_and_package(
                exported,
                package_path=str(Path(temporary) / path.name),
                inductor_configs={**options, "deterministic": torch.are_deterministic_algorithms_enabled()},
            )
            if self.interrupted():
                raise RuntimeError("interrupted")
            sync(Path(built))
            Path(built).replace(path)

    def _key(self, graph: torch.fx.GraphModule, tensors: list[Tensor], options: dict[str, Any]) -> str:
        """Return a hash of everything that the library depends on."""
        cuda = self.device.type == "cuda"
        content = [
            graph.code,
            [(name, str(c.dtype), tuple(c.shape), _bits(c)) for name, c in _constants(graph).items()],
            [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors],
            sorted(options.items()),
            torch.__version__,
            platform.platform(),
            cpp_compiler(),
            _processor(),
            torch.cuda.get_device_name(self.device) if cuda else None,
            str(self.device),
            torch.get_num_threads(),
            torch.backends.cuda.matmul.allow_tf32 if cuda else None,
            torch.are_deterministic_algorithms_enabled(),
        ]
        return hashlib.sha256(repr(content).encode()).hexdigest()[:32]


def _processor() -> str:
    """Return what distinguishes this machine's processor: the code is built for it, and for no other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        distinctive = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        distinctive = {platform.processor()}
    return f"{torch.backends.cpu.get_cpu_capability()} {sorted(distinctive)}"


def _bits(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


def trim(folder: Path) -> None:
    """Remove the libraries that were unused the longest, beyond `MOST_LIBRARIES`, and unfinished ones."""
    with suppress(OSError):  # another process trims, too
        libraries = sorted(folder.glob("*.pt2"), key=lambda path: path.stat().st_mtime)
        for path in libraries[:-MOST_LIBRARIES]:
            path.unlink()
        for path in folder.glob("*-*"):
            if path.stat().st_mtime < time.time() - LEFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


class Library:
    """A compiled function, loaded from the disk."""

    def __init__(self, path: Path, structure: Any) -> None:
        # single-threaded: one call at a time, and nothing that a CUDA graph could not capture
        self.model = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        self.run = self.model.loader.boxed_run  # without the parsing of structures at each call
        self.structure = structure
        with suppress(OSError):  # another process may have just removed it
            os.utime(path)  # for `trim`

    def __call__(self, tensors: list[Tensor]) -> Any:
        return _unflatten(self.run(tensors), self.structure)


def _load(path: Path, structure: Any) -> Library | None:
    """Return the library, or None where there is none or it cannot be loaded."""
    try:
        return Library(path, structure) if path.exists() else None
    except Exception:  # whatever is wrong with it, it is built again
        return None


# ---- from functions to graphs ---------------------------------------------------------------------


def _flatten(value: Any) -> tuple[list[Tensor], Any]:
    """Return the contiguous tensors in nested tuples and dictionaries, and the structure.

    A plain tuple has the structure None: pytree's functions take longer than a small step's arithmetic.
    """
    if type(value) is tuple and all(isinstance(part, Tensor) for part in value):
        return [tensor.contiguous() for tensor in value], None
    tensors, structure = pytree.tree_flatten(value)
    return [tensor.contiguous() for tensor in tensors], structure


def _unflatten(tensors: Sequence[Tensor], structure: Any) -> Any:
    return tuple(tensors) if structure is None else pytree.tree_unflatten(list(tensors), structure)


def _trace(function: Function, tensors: list[Tensor], structure: Any) -> tuple[torch.fx.GraphModule, Any]:
    """Return the function's graph, from flat inputs to flat contiguous outputs, and the outputs' structure."""
    from torch.fx.experimental.proxy_tensor import make_fx

    structures = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        outputs, output_structure = _flatten(function(*_unflatten(inputs, structure)))
        structures.append(output_structure)
        return outputs

    # traced by running: with shapes alone ("fake"), `jvp` under `vmap` fails
    graph = make_fx(flat, decomposition_table=REWRITINGS, tracing_mode="real")(*tensors)
    graph.graph.eliminate_dead_code()
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


def _constants(graph: torch.fx.GraphModule) -> dict[str, Tensor]:
    """Return the tensors that the graph holds apart from its inputs, by name."""
    names = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    return {name: getattr(graph, name) for name in sorted(names)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the compiler's own remarks off the user's terminal."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
