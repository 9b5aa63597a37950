"""The user's own code, by name: `package.module:factory` or `path/to/file.py:factory`.

Only names from the command line come here; what a checkpoint names is never imported because it says so
(`config.resolve_from`).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from common.errors import UsageError

TOOL = Path(__file__).resolve().parent.parent
# Prefixes of names with a colon that are not the user's code: `images:FOLDER`, `torchvision:MODEL`.
RESERVED_PREFIXES = ("images", "table", "torchvision")
WINGS = ("common", "learners", "tasks", "evaluation", "training", "commands")


def is_own_code(name: str) -> bool:
    """Return whether the name is a factory in the user's code, such as `file.py:factory`."""
    prefix, colon, _ = name.partition(":")
    return bool(colon) and prefix not in RESERVED_PREFIXES


def is_well_formed_code(name: str) -> bool:
    """Return whether a name has the form of the user's code; nothing is imported."""
    module, _, factory = name.rpartition(":")
    dotted = all(part.isidentifier() for part in module.split("."))
    return (dotted or module.endswith(".py")) and factory.isidentifier()


def load_code(name: str, flag: str) -> Callable[..., Any]:
    """The function or class of that name; raises UsageError, which names the flag, where there is none.

    Modules are found as Python finds them, and in the working directory; what a file imports, beside it.
    """
    where, _, attribute = name.rpartition(":")
    try:
        module = _from_file(Path(where)) if where.endswith(".py") else _by_name(where)
    except UsageError as error:
        raise UsageError(f"{flag} {name}: {error}") from error
    except (Exception, SystemExit) as error:  # it is the user's code, and may fail in any way
        hint = ""
        if "attempted relative import" in str(error):
            hint = ": name it as a package has it, package.module:factory"
        raise UsageError(f"{flag} {name}: importing {where} failed: {_in_a_line(error)}{hint}") from error
    found = getattr(module, attribute, None)
    if not callable(found):
        there = ", ".join(n for n, v in vars(module).items() if callable(v) and not n.startswith("_"))
        raise UsageError(
            f"{flag} {name}: {where} has no {attribute} to call: it has {there or 'nothing'}"[:300]
        )
    return found


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise UsageError("there is no such file")
    path = path.resolve()
    name = f"own_code_of_{path.stem}_{abs(hash(str(path)))}"  # never one of ours, nor an installed one
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with _first_in_line(path.parent):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextmanager
def _first_in_line(folder: Path) -> Iterator[None]:
    """Within it, modules are looked for in the folder first, even where this tool has one of that name, whose
    own comes back afterwards."""
    ours = {
        name: module
        for name, module in sys.modules.items()
        if _is_ours(module) and (folder / f"{name}.py").is_file() and folder != TOOL
    }
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.path.append(str(folder))  # for what is imported later
        sys.modules.update(ours)


def _is_ours(module: Any) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).parent in (TOOL, *(TOOL / wing for wing in WINGS))


def _by_name(name: str) -> Any:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    module = importlib.import_module(name)
    if _is_ours(module):
        raise UsageError(f"{name} is a module of this tool: name the file, {name}.py:factory")
    return module


def arguments_from(pairs: Iterable[str]) -> dict[str, Any]:
    """`NAME=VALUE` as keyword arguments: values are Python literals, or else text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deep
            values[name] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return values


def called(factory: Callable[..., Any], name: str, flag: str, /, *given: Any, **arguments: Any) -> Any:
    """What the factory makes; raises UsageError, which names the flag, where it fails."""
    try:
        return factory(*given, **arguments)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        words = ", ".join([*map(repr, given), *(f"{n}={v!r}" for n, v in arguments.items())])
        raise UsageError(f"{flag} {name} fails, called with ({words}): {_in_a_line(error)}") from error


def asked_for(factory: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments that are offered, those that the factory has a parameter of that name for."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return {}
    return {name: value for name, value in offered.items() if name in parameters}


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
