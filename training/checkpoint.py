"""A run's state on the disk: written whole, loaded as data.

The trainer saves a `Checkpoint`; resuming, evaluating and adapting load one. The file is `torch.save`'s
dictionary of tensors and plain values, which `torch.load(weights_only=True)` reads without running anything.
It says by itself which learner, dataset and algorithm it is for: `settings` is a flat dictionary, of which
`commands.config` makes a `Config`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.batch import TABLE, DataRecord
from common.errors import UsageError, is_out_of_memory
from common.files import write_all_whole
from training.folders import LIST

FORMAT = "maml checkpoint"
VERSION = 3  # checkpoints/resave.py turns files of version 2 into this one

History = dict[str, list[float]]  # "iteration" and metrics, by name


@dataclass
class Progress:
    """A run's memory apart from weights and optimizer: its curves, and its best validation."""

    best_score: float | None = None  # of best.pt; a loss, or a metric of which less is better, is negated
    best_iteration: int | None = None
    window: dict[str, float] = field(default_factory=dict)  # sums behind the next point, by metric
    window_size: int = 0
    training: History = field(default_factory=dict)
    validation: History = field(default_factory=dict)
    origin: str | None = None  # the checkpoint whose weights the run began with, if any


@dataclass(frozen=True)
class Checkpoint:
    """A run at an iteration: enough to evaluate it, or to resume it to the bit.

    Tensors lie on the CPU and are named after the learner's parameters.
    """

    settings: dict[str, Any]  # by name, as `commands.config.Config.values` gives them
    iteration: int
    parameters: dict[str, Tensor]
    exp_avg: dict[str, Tensor]  # Adam's moments; empty where only the weights are given away
    exp_avg_sq: dict[str, Tensor]
    progress: dict[str, Any]  # the fields of Progress
    statistics: dict[str, Tensor] = field(default_factory=dict)  # running ones of per-step batch norm
    fixed: dict[str, Tensor] = field(default_factory=dict)  # frozen parameters and buffers of the learner
    splits: dict[str, list[str]] = field(default_factory=dict)  # this and the next three: see `DataRecord`
    inputs: list[str] = field(default_factory=list)
    image_range: list[str] = field(default_factory=list)
    fingerprint: dict[str, list[str]] = field(default_factory=dict)
    scales: dict[str, Tensor] = field(default_factory=dict)  # of a table's columns (tasks/scales.py)
    computed_by: dict[str, Any] = field(default_factory=dict)  # what the last bits depend on
    updates: int | None = None  # iterations that were not skipped; None in older files: all


def save_checkpoints(checkpoints: Mapping[Path, Checkpoint]) -> None:
    """Write checkpoints: all are on the disk before the first takes the place of the previous one."""
    header = {"format": FORMAT, "version": VERSION}
    write_all_whole({path: partial(torch.save, header | vars(c)) for path, c in checkpoints.items()})


def load_checkpoint(path: Path, *, weights: bool = True) -> Checkpoint:
    """Read a checkpoint onto the CPU, and run nothing in it; UsageError if it is damaged or foreign.

    Without `weights`, tensors are read from the disk when they are used, and the file is not tested.
    """
    if not path.is_file():
        many = "has many runs: name one of them" if (path / LIST).is_file() else "is not a checkpoint file"
        raise UsageError(f"{path} {many}")
    content: Any = None
    try:
        with zipfile.ZipFile(path) as archive:
            if not weights or archive.testzip() is None:
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=not weights)
    except Exception as error:  # zipfile and the unpickler may meet any bytes
        if isinstance(error, OSError) or is_out_of_memory(error):
            raise
    if content is None and _is_truncated(path):
        size = f"{path.stat().st_size:,} bytes"
        raise UsageError(f"{path} is truncated: it ends after {size}; copy it again, or load another")
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UsageError(f"{path} is damaged, or not a checkpoint of this tool")
    version = content.pop("version", None)
    if version != VERSION:
        raise UsageError(f"{path} has format version {version}, and this tool reads version {VERSION}")
    try:
        return Checkpoint(**content)
    except TypeError as error:  # other fields
        raise UsageError(f"{path} is damaged, or of another version of this tool: {error}") from error


def _is_truncated(path: Path) -> bool:
    """Return whether a file is empty, or is a zip archive without its end, the list of contents."""
    with path.open("rb") as file:
        begin = file.read(4)
    return not begin or (begin == b"PK\x03\x04"[: len(begin)] and not zipfile.is_zipfile(path))


def check_same_data(path: Path, saved: Checkpoint, now: DataRecord, *, other_data: bool = False) -> None:
    """Raise UsageError where data differ from those trained on: a test class may have been seen.

    Names of inputs alone matter for `other_data`.
    """
    pairs = {"input": (saved.inputs, now.inputs)}
    if not other_data:
        pairs |= {split: (names, now.splits.get(split, [])) for split, names in saved.splits.items()}
    for part, (before, after) in pairs.items():
        if before and after and before != after:
            different = min({*before} ^ {*after}, default="their order")
            raise UsageError(
                f"{path}: the data had different {part} names ({different} differs): restore them, "
                "or test on other data with --eval-dataset"
            )
    if other_data:
        return
    if saved.image_range != now.image_range:
        ranges = "; now ".join(", ".join(part) or "plain" for part in (saved.image_range, now.image_range))
        raise UsageError(f"{path}: the images had another range ({ranges}): restore them")
    for sizes in saved.fingerprint.keys() & now.fingerprint.keys():
        if saved.fingerprint[sizes] != now.fingerprint[sizes]:
            if sizes == TABLE:
                raise UsageError(
                    f"{path}: the table has other values, or rows in another order: restore it, or test on "
                    "a copy of it with --eval-dataset"
                )
            why = "its code has changed, or draws from hash() of text, which differs in each process"
            way = "restore it, or test on other data with --eval-dataset"
            raise UsageError(f"{path}: sample gave other tasks for the same seeds ({why}): {way}")


def find_learned_names(saved: Checkpoint, now: DataRecord, *splits: str) -> list[str]:
    """Return names of classes that a checkpoint has learned, and that other data have in these splits."""
    if saved.splits == now.splits:
        return []
    learned, held_out = (
        {name.rpartition(": ")[2] for part in parts for name in part}  # in a mixture after its data set's
        for parts in ([saved.splits.get("train", ())], [now.splits.get(split, ()) for split in splits])
    )
    return sorted(learned & held_out)


def fitting_parameters(
    path: Path | str, saved: dict[str, Tensor], wanted: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Return saved parameters, or statistics, on the device and in the type of `wanted`.

    Raises UsageError where names or shapes are not those of the learner called `name`.
    """
    before, now = ({n: tuple(w.shape) for n, w in weights.items()} for weights in (saved, wanted))
    for key in sorted(now.keys() | before.keys()):
        if before.get(key) != now.get(key):
            raise UsageError(
                f"{path} does not fit the learner {name} as it is adapted here: {key} is "
                f"{before.get(key, 'missing')} there, {now.get(key, 'missing')} here"
                + " (have the examples as many inputs as those of the training?)"
                * (key in now.keys() & before)
            )
    return {key: saved[key].to(wanted[key], copy=True) for key in wanted}
