"""The user's own measure, --metric: a number for each task, from torchmetrics or from the user's code.

It is computed at validations and evaluations alone, task by task on the CPU. Where it is undefined for a task
(AUROC with one class), it is NaN, which tables count.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable
from functools import cache, partial
from typing import Any

from torch import Tensor

from common.batch import Tree, first_tensor
from common.errors import UsageError
from common.names import is_own_code, parse_name
from common.own_code import check_order, find_parameters, load_code, select_accepted
from learners.reading import Metric, Reading, main_tensor

SHORT = {  # of torchmetrics' names, without underscores
    **{"f1": "f1score", "fbeta": "fbetascore", "iou": "jaccardindex", "jaccard": "jaccardindex"},
    **{"r2": "r2score", "mse": "meansquarederror", "mae": "meanabsoluteerror", "ap": "averageprecision"},
    **{"mcc": "matthewscorrcoef", "kappa": "cohenkappa", "ece": "calibrationerror"},
    **{"pearson": "pearsoncorrcoef", "spearman": "spearmancorrcoef"},
}
FAMILIES = ("multiclass", "multilabel", "binary")  # prefixes of torchmetrics' names
# Undefined where the targets do not vary; torchmetrics gives 0 for some.
OF_VARIATION = {"r2score", "explainedvariance", "pearsoncorrcoef", "spearmancorrcoef", "kendallrankcorrcoef"}


def build_metric(name: str, mode: str | None = None) -> Metric:
    """Return a metric by its name in `torchmetrics.functional`, or `file.py:function`.

    The user's function maps outputs and targets of one task to a number. `mode`, "min" or "max", says what is
    better where the library or the function's attribute `higher_is_better` does not. Raises UsageError if
    nobody says it, there is no such metric, or torchmetrics is missing.
    """
    flag = f"--metric {name}"
    if is_own_code(name):
        custom_metric, title = load_code(name, "--metric"), parse_name(name).factory
        check_order(custom_metric, flag)
        higher = getattr(custom_metric, "higher_is_better", None)
        function: Callable[..., Any] = partial(_call_own, custom_metric)
    else:
        key = SHORT.get(_plain(name), _plain(name))
        title, higher = _find_in_library(key, name)
        function = partial(_call_library, key, flag)
    if title in ("accuracy", "loss"):
        raise UsageError(f"{flag}: {title} is measured anyway; give your own function another name")
    if mode is None and not isinstance(higher, bool):
        raise UsageError(f"{flag}: say with --metric-mode min or max which value is better")
    return Metric(title, bool(higher) if mode is None else mode == "max", function, flag)


def _call_own(function: Callable[..., Any], outputs: Tree, targets: Tree, reading: Reading) -> Any:
    return function(outputs, targets)


# ---- torchmetrics --------------------------------------------------------------------------------


def _plain(name: str) -> str:
    return re.sub("[-_ ]", "", name).lower()


@cache
def _load_library() -> tuple[dict[str, tuple[str, Callable[..., Any]]], dict[str, Any]]:
    """Return torchmetrics' functions with their names, and whether higher is better, by plain name."""
    import torchmetrics  # slow, and for --metric alone
    from torchmetrics import classification, functional
    from torchmetrics.functional import classification as of_classes

    functions, classes = (
        {name: part for module in modules for name in module.__all__ if (part := getattr(module, name, None))}
        for modules in ((functional, of_classes), (torchmetrics, classification))
    )
    directions = {_plain(name): getattr(kind, "higher_is_better", None) for name, kind in classes.items()}
    return {_plain(name): (name, function) for name, function in functions.items()}, directions


def _find_in_library(key: str, name: str) -> tuple[str, Any]:
    """Return the full name of torchmetrics' function, and whether higher is better (None: unknown)."""
    try:
        functions, directions = _load_library()
    except ImportError as error:
        hint = "pip install torchmetrics, or give file.py:function"
        raise UsageError(f"--metric {name} is a name of torchmetrics, which is missing: {hint}") from error
    keys = [prefix + key for prefix in ("", *FAMILIES) if prefix + key in functions]
    if not keys:
        near = ", ".join([functions[n][0] for n in difflib.get_close_matches(key, functions, 3)] or SHORT)
        raise UsageError(f"--metric {name}: torchmetrics has no such metric: try {near}, or file.py:function")
    values = [directions.get(k) for k in keys]
    return functions[keys[0]][0], next((value for value in values if isinstance(value, bool)), None)


def _call_library(key: str, flag: str, outputs: Tree, targets: Tree, reading: Reading) -> Any:
    """Call the function of torchmetrics that fits the outputs; NaN where there is nothing to measure."""
    functions, _ = _load_library()
    by_kind = {"numbers": "", "normal": "", "labels": "binary" if reading.numbers == 1 else "multilabel"}
    full = by_kind.get(reading.kind, "multiclass") + key
    full = full if full in functions else key
    _, function = functions.get(full, ("", None))
    family = next((family for family in FAMILIES if full.startswith(family)), "")
    wrong = function is None or "task" in find_parameters(function)  # chooses among the others itself
    wrong |= {"multiclass": not reading.has_accuracy, "": reading.classes > 0}.get(family, False)
    wrong |= family == "binary" and reading.kind != "labels" and reading.classes != 2
    if function is None or wrong:
        raise UsageError(f"{flag} does not fit the outputs, which are {reading.describe()} (see --outputs)")
    convert = {"": _convert_numbers, "multilabel": _convert_labels}.get(family, _convert_classes)
    x, y, sizes = convert(outputs, targets, reading)
    if family == "binary" and x.dim() > 1:
        x = x[:, 1]
    if not len(y) or (full in OF_VARIATION and (y == y[:1]).all(0).any()):
        return math.nan
    return function(x, y, **select_accepted(function, sizes))


def _convert_classes(outputs: Tree, targets: Tree, reading: Reading) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return probabilities `[examples, classes]` and labels; pixels are examples, those left out are not.

    Of labels, probabilities are `[examples]`; of ordinal outputs for more than two classes, classes are.
    """
    predicted = reading.predict(outputs)
    labels, valid = reading.decode_labels(targets, predicted)
    x = predicted if reading.kind == "ordinal" and reading.classes > 2 else reading.probabilities(outputs)
    if x.dim() > predicted.dim():
        x = x.movedim(1, -1)
    return x[valid], labels[valid].long(), {"num_classes": reading.classes}


def _convert_labels(outputs: Tree, targets: Tree, reading: Reading) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return probabilities and labels `[examples, labels, ...]`; others than 0 and 1 are left out."""
    labels, valid = reading.decode_labels(targets, main_tensor(outputs))
    sizes = {"num_labels": labels.shape[1]} | ({} if valid.all() else {"ignore_index": -1})
    return reading.probabilities(outputs), labels.long().where(valid, -1), sizes


def _convert_numbers(outputs: Tree, targets: Tree, reading: Reading) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Return numbers and targets `[examples, ...]`, `[examples]` if there is one; without targets of NaN.

    The numbers of normal distributions are their means.
    """
    x = reading.probabilities(outputs) if reading.has_accuracy else main_tensor(outputs)
    y = first_tensor(targets)
    if x.shape != y.shape:
        shapes = f"outputs {tuple(x.shape)} and targets {tuple(y.shape)}"
        raise UsageError(f"--metric does not fit {shapes}: give a function of your own, file.py:function")
    x, y = (part.flatten(1) if part.dim() > 1 else part[:, None] for part in (x, y.to(x.dtype)))
    valid = ~y.isnan().any(1)
    x, y = x[valid], y[valid]
    return (x[:, 0], y[:, 0], {}) if y.shape[1] == 1 else (x, y, {})
