"""The user's own code, by name: `package.module:factory` or `path/to/file.py:factory`.

Learners, datasets and losses are loaded here, and their `NAME=VALUE` arguments parsed. Code is imported only
if the user named it on the command line, never because a checkpoint names it (commands/resolve.py).
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from common.errors import UsageError, fold_message
from common.names import parse_name

TOOL = Path(__file__).resolve().parent.parent
OUTPUTS = {"output", "outputs", "pred", "preds", "prediction", "predictions", "logits", "y_pred", "y_hat"}
TARGETS = {"target", "targets", "true", "truth", "label", "labels", "gt", "y", "y_true"}


def load_code(name: str, flag: str) -> Callable[..., Any]:
    """Import a function or class of the user's; `flag` names the flag in errors.

    Modules are found in the working directory too, a file's imports in its folder. Raises UsageError if there
    is no such code or its import fails.
    """
    _, source, attribute = parse_name(name)
    is_file = source.endswith(".py")
    if is_file and not os.path.isfile(source):  # noqa: PTH113 (which fails on a name too long)
        raise UsageError(f"{flag} {name}: there is no file {source}")
    folder = str(Path(source).resolve().parent if is_file else Path.cwd())
    if folder not in sys.path:  # before installed packages, but behind the tool's own modules
        sys.path.insert(1, folder)
    try:
        module = _import_file(Path(source).resolve()) if is_file else importlib.import_module(source)
    except (Exception, SystemExit) as error:  # the user's code may fail in any way
        reason = f"{type(error).__name__}: {fold_message(error):.300}"
        raise UsageError(f"{flag} {name}: importing {source} failed: {reason}") from error
    code = getattr(module, attribute, None)
    if not callable(code):
        public = ", ".join(key for key, value in vars(module).items() if callable(value) and key[0] != "_")
        raise UsageError(f"{flag} {name}: {source} has no {attribute} to call: it has {public}"[:300])
    return code


def _import_file(path: Path) -> Any:
    name = f"own_code_of_{path.stem}_{abs(hash(str(path)))}"  # never that of another module
    if name in sys.modules:
        return sys.modules[name]
    _check_neighbours(path)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_neighbours(path: Path) -> None:
    """Raise ImportError if the file imports a neighbour for which Python would take a module of this tool."""
    tools = {*TOOL.glob("*.py"), *(init.parent for init in TOOL.glob("*/__init__.py"))}
    for name in sorted(tool.stem for tool in tools if path.parent != TOOL):
        imported = re.search(
            rf"^\s*(from|import) {name}\b", path.read_text(encoding="utf-8", errors="replace"), re.MULTILINE
        )
        if imported and ((path.parent / name).is_dir() or (path.parent / f"{name}.py").is_file()):
            raise ImportError(f"it imports {name}, and this tool has a module of that name: rename yours")


def parse_arguments(pairs: Iterable[str]) -> dict[str, Any]:
    """Return `NAME=VALUE` pairs as keyword arguments; a value is a Python literal, or else text."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, _, text = pair.partition("=")
        try:
            values[name] = ast.literal_eval(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: nested too deeply
            values[name] = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    return values


def call_factory(
    factory: Callable[..., Any], name: str, flag: str, /, *arguments: Any, **options: Any
) -> Any:
    """Call a factory; raise UsageError, which names the flag and the arguments, if it fails."""
    try:
        return factory(*arguments, **options)
    except UsageError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {fold_message(error):.300}"
        words = [*map(reprlib.repr, arguments), *(f"{key}={reprlib.repr(options[key])}" for key in options)]
        hint = _wrapper_for(factory, arguments, options, name) if flag == "--learner" else ""
        raise UsageError(f"{flag} {name} fails, called with ({', '.join(words)}): {reason}{hint}") from error


def _wrapper_for(
    factory: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any], name: str
) -> str:
    """Return the two lines that make a learner of a class with other arguments, where these do not fit."""
    try:
        inspect.signature(factory).bind(*arguments, **select_accepted(factory, options))
        return ""
    except TypeError:
        needs = [n for n, p in find_parameters(factory).items() if p.default is p.empty and p.kind < 2]
    except ValueError:  # of some functions in C
        return ""
    texts = {"device": '"cpu"', "n_classes": "outputs", "num_classes": "outputs", "classes": "outputs"}
    texts |= dict.fromkeys(("input_channels", "in_channels", "channels"), "inputs[0]")
    values = ", ".join(f"{need}={texts.get(need, '...')}" for need in needs)
    source, _, attribute = name.rpartition(":")
    wrapper = f"def learner(outputs, inputs): return {attribute}({values})"
    return f"; it gets the number of outputs: add to {source} the line `{wrapper}`, and name {source}:learner"


def select_accepted(factory: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return those options for which the factory has a parameter of that name."""
    return {name: value for name, value in options.items() if name in find_parameters(factory)}


def find_parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return a function's parameters by name; none where Python cannot tell them."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions in C
        return {}


def check_order(function: Callable[..., Any], flag: str) -> None:
    """Raise UsageError for a function whose parameters' names say that targets come before outputs."""
    names = [*find_parameters(function)][:2]
    if len(names) == 2 and names[0].lower() in TARGETS and names[1].lower() in OUTPUTS:
        raise UsageError(f"{flag} takes ({', '.join(names)}), and is called with outputs first: swap them")
