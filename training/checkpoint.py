"""A run's state on the disk: written whole, loaded as data.

The trainer saves a `Checkpoint`; resuming, evaluating and adapting load one. The file is `torch.save`'s
dictionary of tensors and plain values, which `torch.load(weights_only=True)` reads without running anything.
It says by itself which learner, dataset and algorithm it is for: `settings` is a flat dictionary, of which
`commands.config` makes a `Config`.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UsageError, is_out_of_memory, reason_of
from common.files import write_all_whole, write_whole

FORMAT = "maml checkpoint"
VERSION = 3  # checkpoints/resave.py turns files of version 2 into this one

Curve = dict[str, list[float]]  # "iteration" and metrics, by name


@dataclass
class Progress:
    """A run's memory apart from weights and optimizer: its curves, and its best validation."""

    best_score: float | None = None  # of best.pt: validation accuracy, or minus the validation loss
    best_iteration: int | None = None
    window: dict[str, float] = field(default_factory=dict)  # sums behind the next point, by metric
    window_size: int = 0
    training: Curve = field(default_factory=dict)
    validation: Curve = field(default_factory=dict)
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
    splits: dict[str, list[str]] = field(default_factory=dict)  # the user's classes, or tasks, by split
    computed_by: dict[str, Any] = field(default_factory=dict)  # what the last bits depend on


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically; raises OSError where that fails, and the previous file stays."""
    save_checkpoints([(path, checkpoint)])


def save_checkpoints(checkpoints: Sequence[tuple[Path, Checkpoint]]) -> None:
    """Write several checkpoints; all are on the disk before the first is renamed."""
    header = {"format": FORMAT, "version": VERSION}
    write_all_whole([(path, partial(torch.save, header | vars(c))) for path, c in checkpoints])


def save_weights(path: Path, module: nn.Module) -> None:
    """Write a module's `state_dict`, for any program that has such a module."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    write_whole(path, partial(torch.save, state))


def strip_run(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint to be given away: without the moments and curves that only its run needs."""
    return replace(checkpoint, exp_avg={}, exp_avg_sq={}, progress=asdict(Progress()))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU.

    Raises:
        UsageError: there is none, it is damaged or foreign, or another version of the tool wrote it.
    """
    content = _load_plain(path)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise UsageError(f"{path} is not a checkpoint of this tool")
    version = content.pop("version", None)
    if version != VERSION:
        raise UsageError(f"{path} has format version {version!s:.20}, and this tool reads version {VERSION}")
    if content.keys() != {part.name for part in fields(Checkpoint)}:
        raise UsageError(f"{path} is damaged: parts of it are missing or unknown")
    return Checkpoint(**content)


def _load_plain(path: Path) -> Any:
    """Return the content of a file of `torch.save`, once the checksums of all its records have passed."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such checkpoint")
    try:
        with zipfile.ZipFile(path) as archive:
            whole = sum(record.file_size for record in archive.infolist()) <= path.stat().st_size
            if not whole or archive.testzip() is not None:
                raise UsageError(f"{path} is damaged: take another copy of it")
        return torch.load(path, map_location="cpu", weights_only=True)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({reason_of(error)})") from error
    except Exception as error:  # zipfile and the unpickler may meet any bytes
        if is_out_of_memory(error):
            raise
        raise UsageError(f"{path} is not a checkpoint of this tool, or damaged: it was not loaded") from error


def check_same_split(path: Path, saved: dict[str, list[str]], now: dict[str, list[str]]) -> None:
    """Raise UsageError where a split has other classes, or tasks, than when the run was trained.

    Some of those to be tested on might have been trained on.
    """
    for split in saved:
        different = set(saved[split]) ^ set(now.get(split, ()))
        if different:
            example = min(different)
            state = "gone" if example in saved[split] else "new"
            raise UsageError(
                f"{path}: the data had another {split} split ({len(different)} differ; {example}: {state}): "
                "restore them as they were, or test on other data with --eval-dataset"
            )


def fitting_parameters(
    path: Path, saved: dict[str, Tensor], wanted: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """Return saved parameters, or statistics, on the device and in the type of `wanted`.

    Raises UsageError where names or shapes are not those of the learner called `name`.
    """
    for key in sorted(wanted.keys() | saved.keys()):
        if key not in saved or key not in wanted or saved[key].shape != wanted[key].shape:
            shapes = [tuple(p[key].shape) if key in p else "missing" for p in (saved, wanted)]
            raise UsageError(
                f"{path} does not fit the learner {name} as it is adapted here: {key} is {shapes[0]} there, "
                f"{shapes[1]} here"
            )
    return {key: saved[key].to(wanted[key], copy=True) for key in wanted}
