"""Functions of tensors, compiled ahead of time to machine code and kept between runs.

A function is traced to a graph of tensor operations (`make_fx`: through `vmap`, `grad` and `jvp`), which
Inductor compiles with AOTInductor to a library that runs without Python. Libraries are cached by a
hash of their graph and of all else that they depend on; a cached one loads in milliseconds.

A library is code, and its digest protects from damage alone: it is loaded only from a folder that is the
user's and that nobody else can write to.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import stat
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from common.files import one_at_a_time, user_cache

Function = Callable[..., Any]
Signature = tuple[tuple[tuple[torch.Size, torch.dtype], ...], str | None]  # and the structure

MOST_LIBRARIES, MOST_BYTES = 500, 2**31  # kept of all
LEFT_SECONDS = 86_400.0  # what is older, and no library, is of a process that was killed
CPP_COMPILERS = {"linux": "g++", "darwin": "clang++", "win32": "cl"}  # where CXX names none


class CompilationError(Exception):
    """Says in one line why a function could not be compiled."""


def cpp_compiler() -> str | None:
    """The C++ compiler that Inductor would call, if there is any on this machine."""
    return shutil.which(os.environ.get("CXX") or CPP_COMPILERS.get(sys.platform, "g++"))


def cache_folder() -> Path | None:
    """Where compiled functions are kept: in the user's cache folder; None where that is not his alone."""
    home = user_cache()
    if home is None:
        return None
    folder = home / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if _is_mine(folder) and not folder.is_symlink():
            folder.chmod(0o700)  # it may be older than this rule
        alone = _is_private(folder) and not any(_is_public(above) for above in folder.resolve().parents)
        return folder if alone and os.access(folder, os.W_OK) else None
    except OSError:  # read-only
        return None


def _is_mine(path: Path) -> bool:
    return not hasattr(os, "geteuid") or path.stat().st_uid == os.geteuid()


def _is_private(path: Path) -> bool:
    """Whether it is the user's, and no one else can write to it."""
    return _is_mine(path) and (os.name == "nt" or not path.stat().st_mode & 0o022)


def _is_public(folder: Path) -> bool:
    """Whether anyone could put another folder in the place of one in it.

    A group may be able to: many systems give each user one of his own.
    """
    mode = folder.stat().st_mode
    return os.name != "nt" and bool(mode & 0o002) and not mode & stat.S_ISVTX


class Compiler:
    """Makes compiled functions of functions of tensors; an instance is called with a function.

    The functions take and give tensors in tuples and dictionaries, and are compiled at their first call
    with inputs of new shapes. They run as they are until `active` is set, and while another one that
    calls them is being traced.

    Arguments:
        device: where the tensors are; part of what a library depends on, as is the number of threads.
        folder: of the libraries; None: the user's cache.
        on_wait: called with the seconds so far, once a second while a function is compiled.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        folder: Path | None = None,
        on_wait: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.device = device
        self.folder = folder
        self.on_wait = on_wait
        self.keeps = True  # libraries, for the next run
        self.interrupted: Callable[[], bool] = lambda: False  # a signal may have hit the C++ compiler, too
        self.active = False
        self._tracing = False
        self.compiled = 0  # libraries that this instance had to build
        self.loaded = 0  # and those that it found
        self.seconds = 0.0  # spent in tracing, compiling and loading

    def __call__(self, function: Function, options: dict[str, Any] | None = None) -> Function:
        """The compiled function; `options` are Inductor's."""
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
        begin = time.monotonic()
        tensors = [tensor.detach() for tensor in tensors]  # one given twice would become a single input
        self._tracing = True  # what this function calls becomes part of it
        try:
            with (
                _quiet(), _ticking(self.on_wait), torch.enable_grad(), self._where() as folder
            ):  # fmt: skip
                graph, output_structure = _trace(function, tensors, structure)
                path = folder / f"{self._key(graph, tensors, options)}.pt2"
                library = _kept(path, output_structure)
                if library is None:
                    with one_at_a_time(path.with_suffix(".lock"), interrupted=self.interrupted):
                        for left in path.parent.glob(f"{path.stem}-*"):  # of a killed process
                            shutil.rmtree(left, ignore_errors=True)
                        library = _kept(path, output_structure)
                        if library is None:
                            self._build(graph, tensors, options, path)
                            self.compiled += 1
                            trim(folder)
                            return Library(path, output_structure)
                self.loaded += 1
                return library
        except Exception as error:  # a compiler may stumble in any way; without it the run goes on
            text = " ".join(str(error).split()) or type(error).__name__
            raise CompilationError(text[:200]) from error
        finally:
            self._tracing = False
            self.seconds += time.monotonic() - begin

    @contextmanager
    def _where(self) -> Iterator[Path]:
        """The folder of the libraries; where none is private, one until they are loaded."""
        folder = self.folder or cache_folder()
        if folder is not None:
            yield folder
            return
        self.keeps = False
        with tempfile.TemporaryDirectory(prefix="maml-", ignore_cleanup_errors=True) as temporary:
            yield Path(temporary)

    def _build(
        self, graph: torch.fx.GraphModule, tensors: list[Tensor], options: dict[str, Any], path: Path
    ) -> None:
        from torch._inductor import aoti_compile_and_package
        from torch._inductor.runtime.cache_dir_utils import cache_dir

        scratch = Path(cache_dir())  # Inductor takes code from there, too; by default a known name in /tmp
        if not _is_mine(scratch) or _is_public(scratch):
            raise RuntimeError(f"{scratch} is not this user's alone: set TORCHINDUCTOR_CACHE_DIR")
        exported = torch.export.export(graph, tuple(tensors))
        # another process may be building the same, where files cannot be locked: the last one's stays
        with tempfile.TemporaryDirectory(prefix=f"{path.stem}-", dir=path.parent) as temporary:
            built = aoti_compile_and_package(
                exported,
                package_path=str(Path(temporary) / path.name),
                inductor_configs={**options, "deterministic": torch.are_deterministic_algorithms_enabled()},
            )
            if self.interrupted():
                raise RuntimeError("interrupted")
            with Path(built).open("rb+") as file:
                os.fsync(file.fileno())
            Path(built).chmod(0o600)
            _digest_file(path).write_text(_digest(Path(built)))
            Path(built).replace(path)

    def _key(self, graph: torch.fx.GraphModule, tensors: list[Tensor], options: dict[str, Any]) -> str:
        """A hash of all that the library depends on."""
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
    """What distinguishes this machine's processor: the code is built for it, and for no other."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        distinctive = {line for line in lines if line.startswith(("model name", "flags", "Features"))}
    except OSError:
        distinctive = {platform.processor()}
    return f"{torch.backends.cpu.get_cpu_capability()} {sorted(distinctive)}"


def _bits(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(content.numpy().tobytes()).hexdigest()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_suffix(".sha256")


def trim(folder: Path) -> None:
    """Removes the libraries that were not used for the longest time, beyond what is kept, and what processes
    that were killed have left. Another process that just wants one builds it again."""
    libraries = [(path, found) for path in folder.glob("*.pt2") if (found := _stat(path)) is not None]
    libraries.sort(key=lambda library: library[1].st_mtime, reverse=True)
    size = 0
    for number, (path, found) in enumerate(libraries):
        size += found.st_size
        if number and (number >= MOST_LIBRARIES or size > MOST_BYTES):
            for file in (path, _digest_file(path)):
                with suppress(OSError):
                    file.unlink()
    for path in folder.iterdir():
        found = _stat(path)
        if found is not None and path.suffix != ".pt2" and found.st_mtime < time.time() - LEFT_SECONDS:
            if stat.S_ISDIR(found.st_mode):
                shutil.rmtree(path, ignore_errors=True)
            elif not (path.suffix == ".sha256" and path.with_suffix(".pt2").exists()):
                with suppress(OSError):
                    path.unlink()


def _stat(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:  # another process has removed it
        return None


class Library:
    """A compiled function, as it lies on disk, loaded."""

    def __init__(self, path: Path, structure: Any) -> None:
        if not _is_private(path):
            raise RuntimeError(f"{path} may be another's code")
        if _digest_file(path).read_text() != _digest(path):
            raise RuntimeError(f"{path} is damaged")
        # single-threaded: one call at a time, and nothing that a CUDA graph could not capture
        self.model = torch._inductor.aoti_load_package(str(path), run_single_threaded=True)
        self.run = self.model.loader.boxed_run  # without the parsing of structures at each call
        self.structure = structure
        with suppress(OSError):  # another process may have just removed it
            os.utime(path)  # for `trim`

    def __call__(self, tensors: list[Tensor]) -> Any:
        return _unflatten(self.run(tensors), self.structure)


def _kept(path: Path, structure: Any) -> Library | None:
    """The library, if there is one and it is whole."""
    try:
        return Library(path, structure)
    except Exception:  # whatever is wrong with it, it will be built again
        return None


# The general functions take longer than a small step's arithmetic: tensors in a tuple, which need no
# structure, go without.


def _flatten(value: Any) -> tuple[list[Tensor], Any]:
    """The contiguous tensors in nested tuples and dictionaries, and the structure."""
    if type(value) is tuple and all(isinstance(part, Tensor) for part in value):
        return [tensor.contiguous() for tensor in value], None
    tensors, structure = pytree.tree_flatten(value)
    return [tensor.contiguous() for tensor in tensors], structure


def _unflatten(tensors: Sequence[Tensor], structure: Any) -> Any:
    return tuple(tensors) if structure is None else pytree.tree_unflatten(list(tensors), structure)


def _trace(function: Function, tensors: list[Tensor], structure: Any) -> tuple[torch.fx.GraphModule, Any]:
    """The function's graph, from flat inputs to flat contiguous outputs, and the outputs' structure."""
    from torch.fx.experimental.proxy_tensor import make_fx

    structures = []

    def flat(*inputs: Tensor) -> list[Tensor]:
        outputs, output_structure = _flatten(function(*_unflatten(inputs, structure)))
        structures.append(output_structure)
        return outputs

    # by running it: with shapes alone ("fake"), `jvp` under `vmap` fails
    graph = make_fx(flat, decomposition_table=REWRITINGS, tracing_mode="real")(*tensors)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, structures[-1]


def _threshold_backward(gradient: Tensor, x: Tensor, threshold: float) -> Tensor:
    """The derivative of ReLU as a product: Inductor keeps a mask that is used again as bytes, slowly.

    An infinite gradient of an inactive unit gives NaN in the place of 0.
    """
    return gradient * (x > threshold).to(gradient.dtype)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """A batched product in the form that libraries are quick at."""
    if a.shape[2] == 1:  # an outer product; pointwise, it fuses with what is around it
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
    """The tensors that the function holds beside its inputs."""
    names = {node.target for node in graph.graph.nodes if node.op == "get_attr"}
    return {name: getattr(graph, name) for name in sorted(names)}


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the compiler's own remarks from the user's terminal."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def _ticking(tick: Callable[[float], None]) -> Iterator[None]:
    """Calls `tick` once a second, from a thread, with the seconds since the start."""
    done = threading.Event()
    begin = time.monotonic()

    def run() -> None:
        while not done.wait(1.0):
            tick(time.monotonic() - begin)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
