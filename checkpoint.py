"""What is saved, atomically, and how it is loaded, safely.

A checkpoint is a dictionary of tensors and plain values. It is read with `weights_only=True`, which
refuses anything that would run code, and it says by itself which learner, dataset and algorithm it is
for. Nothing else in the project reads or writes one.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Config, config_from_plain, config_to_plain
from errors import UsageError

FORMAT = "maml checkpoint"
VERSION = 1
LAST = "last.pt"
BEST = "best.pt"


@dataclass(frozen=True)
class Checkpoint:
    """A run at an iteration: all that is needed to evaluate it, or to go on as if nothing had been."""

    config: Config
    iteration: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    progress: dict[str, Any]  # best result so far, running means, curves: see trainer.Progress


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes beside the file first, and renames: whenever it is cut short, the old one is whole."""
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": config_to_plain(checkpoint.config),
        "iteration": checkpoint.iteration,
        "parameters": checkpoint.parameters,
        "optimizer": checkpoint.optimizer,
        "progress": checkpoint.progress,
    }
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; raises UsageError for what is none, or is damaged."""
    if not path.is_file():
        raise UsageError(f"{path}: there is no such checkpoint")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path} is not a checkpoint of this tool: it was not loaded") from error
    except Exception as error:  # the unpickler may meet any bytes, and stumble in any way
        raise UsageError(f"{path} is damaged or not a checkpoint: it cannot be read") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a checkpoint of this tool")
    if content.get("version") != VERSION:
        raise UsageError(
            f"{path} has format version {content.get('version')!r}; this tool reads version {VERSION}"
        )
    try:
        config = config_from_plain(content.get("config"))
    except UsageError as error:
        raise UsageError(f"{path} cannot be used: {error}") from error
    checkpoint = Checkpoint(
        config,
        content.get("iteration", -1),
        content.get("parameters", {}),
        content.get("optimizer", {}),
        content.get("progress", {}),
    )
    if not _well_formed(checkpoint):
        raise UsageError(f"{path} is damaged: parts of it are missing")
    return checkpoint


def _well_formed(checkpoint: Checkpoint) -> bool:
    parameters = checkpoint.parameters
    return (
        isinstance(checkpoint.iteration, int)
        and checkpoint.iteration >= 0
        and isinstance(checkpoint.optimizer, dict)
        and isinstance(checkpoint.progress, dict)
        and isinstance(parameters, dict)
        and all(isinstance(k, str) and isinstance(w, Tensor) for k, w in parameters.items())
    )


def fitting_parameters(
    path: Path, saved: dict[str, Tensor], wanted: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """The saved parameters on the device and in the type of `wanted`.

    Raises UsageError where names or shapes are not those of the learner called `name`.
    """
    for key in wanted.keys() | saved.keys():
        if key not in saved or key not in wanted or saved[key].shape != wanted[key].shape:
            shapes = [tuple(p[key].shape) if key in p else "missing" for p in (saved, wanted)]
            raise UsageError(
                f"{path} does not fit the learner {name}: {key} is {shapes[0]} there, {shapes[1]} here"
            )
    return {key: saved[key].to(wanted[key], copy=True) for key in wanted}
