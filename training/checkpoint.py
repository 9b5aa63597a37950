"""What is saved, atomically, and how it is loaded, safely.

A checkpoint is a dictionary of tensors and plain values, with a digest of all of them. `torch.save` writes
it, and `torch.load` can read it; here it is read as data alone (see archive.py), checked part by part, and
refused in one line unless it is whole. It says by itself which learner, dataset and algorithm it is for.
Nothing else in the project reads or writes one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from commands.config import Config, config_from_plain
from common.errors import UsageError
from common.files import write_all_whole, write_whole
from training.archive import NotPlainError, read_archive

FORMAT = "maml checkpoint"
VERSION = 2  # 1 had no digest; tests/checkpoints/README.md says what to do where this grows
MOST_ITERATIONS = 2**53  # float64 counts as far


Curve = dict[str, list[float]]  # "iteration" and metrics, by name


@dataclass
class Progress:
    """What a run remembers beside weights and optimizer."""

    best_score: float | None = None  # of best.pt: validation accuracy, or minus the validation loss
    best_iteration: int | None = None
    window: dict[str, float] = field(default_factory=dict)  # sums behind the next point, by metric
    window_size: int = 0
    training: Curve = field(default_factory=dict)
    validation: Curve = field(default_factory=dict)
    origin: str | None = None  # the checkpoint whose weights the run began with, if any


@dataclass(frozen=True)
class Checkpoint:
    """A run at an iteration: all that is needed to evaluate it, or to go on as if nothing had been."""

    config: Config
    iteration: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]  # empty: only to be measured, used, and begun from
    progress: dict[str, Any]  # the fields of Progress
    statistics: dict[str, Tensor] = field(default_factory=dict)  # running ones of per-step batch norm
    fixed: dict[str, Tensor] = field(default_factory=dict)  # frozen parameters and buffers of the learner
    splits: dict[str, list[str]] = field(default_factory=dict)  # of the user's classes, or tasks
    computed_by: dict[str, Any] = field(default_factory=dict)  # what its last bits depend on (see runtime.py)


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Writes beside the file first, and renames: whenever it is cut short, the old one is whole."""
    save_checkpoints([(path, checkpoint)])


def save_checkpoints(checkpoints: Sequence[tuple[Path, Checkpoint]]) -> None:
    """The same of several: all are written before the first is renamed, so that they are of one iteration
    unless the process is killed just between two names."""
    write_all_whole([(path, partial(torch.save, _plain_content(c))) for path, c in checkpoints])


def _plain_content(checkpoint: Checkpoint) -> dict[str, Any]:
    content = {
        "format": FORMAT,
        "version": VERSION,
        "config": checkpoint.config.values(),
        "iteration": checkpoint.iteration,
        "parameters": checkpoint.parameters,
        "optimizer": checkpoint.optimizer,
        "progress": checkpoint.progress,
        "statistics": checkpoint.statistics,
        "fixed": checkpoint.fixed,
        "splits": checkpoint.splits,
        "computed_by": checkpoint.computed_by,
    }
    return content | {"digest": digest_of(content)}


def digest_of(content: Any) -> str:
    """SHA-256 of a tree of plain values and tensors: of every name, type, shape, bit and their order."""
    found = hashlib.sha256()
    for part in _canonical(content):
        found.update(part)
    return found.hexdigest()


def _canonical(value: Any) -> Iterator[Any]:
    """Bytes that no other tree has."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{list(value.shape)}".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    elif isinstance(value, float):
        yield b"float" + struct.pack(">d", value)
    elif isinstance(value, str):
        text = value.encode("utf-8", "surrogatepass")
        yield b"text%d:" % len(text) + text
    elif isinstance(value, dict | list | tuple):
        yield f"{type(value).__name__}{len(value)}:".encode()
        for item in value:
            yield from _canonical(item)
            if isinstance(value, dict):
                yield from _canonical(value[item])
    else:
        yield f"{value!r};".encode()  # None, a truth value, or a whole number


def save_weights(path: Path, module: nn.Module) -> None:
    """Writes a module's `state_dict`, for any program that has such a module."""
    state = {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}
    write_whole(path, partial(torch.save, state))


def replaceable(path: Path) -> bool:
    """Whether `save_weights` may write there: there is nothing yet, or other weights."""
    if not path.exists():
        return True
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # the unpickler may meet any bytes
        return False
    return isinstance(content, dict) and all(isinstance(value, Tensor) for value in content.values())


def initialisation_of(checkpoint: Checkpoint) -> Checkpoint:
    """What it has learned, to be given away: without the optimizer and the curves that only its run needs."""
    return dataclasses.replace(checkpoint, optimizer={}, progress=dataclasses.asdict(Progress()))


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint onto the CPU; raises UsageError, in one line, for what is none, or is damaged."""
    try:
        content = read_archive(path)
    except NotPlainError as error:
        raise UsageError(f"{path} {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"{path} is not a checkpoint of this tool")
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        update = ": update the tool" if type(version) is int and version > VERSION else ""
        said = version if type(version) is int else f"of type {type(version).__name__}"
        raise UsageError(f"{path} has format version {said}; this tool reads up to {VERSION}{update}")
    try:
        config = config_from_plain(content.get("config"))
    except UsageError as error:
        raise UsageError(" ".join(f"{path} cannot be used: {error}".split())) from error
    checkpoint = Checkpoint(
        config,
        content.get("iteration", -1),
        content.get("parameters", {}),
        content.get("optimizer", {}),
        content.get("progress", {}),
        content.get("statistics", {}),
        content.get("fixed", {}),
        content.get("splits", {}),
        content.get("computed_by", {}),
    )
    if not _well_formed(checkpoint):
        raise UsageError(f"{path} is damaged: parts of it are missing or of the wrong kind")
    if version > 1 and content.pop("digest", None) != digest_of(content):
        raise UsageError(f"{path} is damaged: its checksum does not match; take another copy of it")
    return checkpoint


def _well_formed(checkpoint: Checkpoint) -> bool:
    parameters = checkpoint.parameters
    return (
        _count(checkpoint.iteration)
        and _named_tensors(parameters)
        and _named_tensors(checkpoint.statistics)
        and _named_tensors(checkpoint.fixed, of_numbers=False)
        and _names_by_split(checkpoint.splits)
        and _plain_facts(checkpoint.computed_by)
        and _adam_state_fits(checkpoint.optimizer, parameters)
        and _progress_fits(checkpoint.progress)
    )


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MOST_ITERATIONS


def _names_by_split(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(split, str) and isinstance(names, list) and all(isinstance(name, str) for name in names)
        for split, names in value.items()
    )


def _plain_facts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and type(fact) in (int, str) and f"{name}{fact}".isprintable()
        for name, fact in value.items()
    )


def check_same_split(path: Path, saved: dict[str, list[str]], now: dict[str, list[str]]) -> None:
    """Raises UsageError where data have other classes, or tasks, in a split than when the run was trained:
    some of those to be tested on may have been trained on."""
    for split in saved:
        different = set(saved[split]) ^ set(now.get(split, ()))
        if different:
            one = min(different)
            there = "not there any more" if one in saved[split] else "new there"
            raise UsageError(
                f"{path}: its data had another {split} split ({len(different)} differ; {one} is {there}): "
                "restore them as they were, or test on other data with --eval-dataset"
            )


def _named_tensors(value: Any, *, of_numbers: bool = True) -> bool:
    return isinstance(value, dict) and all(
        isinstance(name, str) and _plain_tensor(tensor, of_numbers=of_numbers)
        for name, tensor in value.items()
    )


def adam_state(iteration: int, *moments: dict[str, Tensor]) -> dict[str, Any]:
    """First and second moments by parameter, as `torch.optim.Adam` lays its state out."""
    first, second = moments
    step = torch.tensor(float(iteration))
    entries = zip(first.values(), second.values(), strict=True)
    return {
        "state": {
            number: {"step": step.clone(), "exp_avg": m, "exp_avg_sq": v}
            for number, (m, v) in enumerate(entries)
        }
    }


def moments_of(checkpoint: Checkpoint, names: Iterable[str]) -> list[dict[str, Tensor]]:
    """The inverse: first and second moments by name of the parameter, in the names' order."""
    entries = checkpoint.optimizer["state"]
    return [
        {name: entries[number][moment] for number, name in enumerate(names)}
        for moment in ("exp_avg", "exp_avg_sq")
    ]


def _plain_tensor(value: Any, *, of_numbers: bool = True) -> bool:
    """Dense, whole, and of floating-point numbers unless integers and truth values will do, too."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and (value.is_floating_point() or not of_numbers)
        and value.is_contiguous()
    )


def _adam_state_fits(optimizer: Any, parameters: dict[str, Tensor]) -> bool:
    """Moments of each parameter's shape, or none at all (see `initialisation_of`): fused kernels would not
    check, and write past the end."""
    if optimizer == {}:
        return True
    state = optimizer.get("state") if isinstance(optimizer, dict) else None
    if not isinstance(state, dict) or state.keys() != set(range(len(parameters))):
        return False
    for entry, parameter in zip((state[i] for i in range(len(state))), parameters.values(), strict=True):
        if not isinstance(entry, dict) or entry.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            return False
        if not all(_plain_tensor(value) for value in entry.values()) or entry["step"].shape != ():
            return False
        if any(
            entry[moment].shape != parameter.shape or entry[moment].dtype != parameter.dtype
            for moment in ("exp_avg", "exp_avg_sq")
        ):
            return False
    return True


def _progress_fits(progress: Any) -> bool:
    def numbers(values: Any) -> bool:
        return isinstance(values, list) and all(type(v) in (int, float) for v in values)

    def curve(values: Any) -> bool:
        return (
            isinstance(values, dict)
            and all(isinstance(name, str) and numbers(points) for name, points in values.items())
            and len({len(points) for points in values.values()}) <= 1
            and (not values or {"iteration", "query_loss"} <= values.keys())
            and all(map(_count, values.get("iteration", [])))
            and all(a < b for a, b in pairwise(values.get("iteration", [])))
        )

    return (
        isinstance(progress, dict)
        and progress.keys() == {field.name for field in dataclasses.fields(Progress)}
        and type(progress["best_score"]) in (float, type(None))
        and (progress["best_iteration"] is None or _count(progress["best_iteration"]))
        and isinstance(progress["window"], dict)
        and all(isinstance(name, str) for name in progress["window"])
        and numbers(list(progress["window"].values()))
        and _count(progress["window_size"])
        and type(progress["origin"]) in (str, type(None))
        and curve(progress["training"])
        and curve(progress["validation"])
    )


def fitting_parameters(
    path: Path, saved: dict[str, Tensor], wanted: dict[str, Tensor], name: str
) -> dict[str, Tensor]:
    """The saved parameters, or statistics, on the device and in the type of `wanted`.

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
