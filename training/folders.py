"""Names, locks and leftovers in the folder of a run, and in the folder of many runs.

    RUN/last.pt, best.pt       checkpoints: the newest, and the best on the validation tasks
    RUN/training.json          curves and outcome, written whenever training ends
    RUN/settings.toml          the settings and the commands, which --config repeats
    RUN/events.out.tfevents.*  for TensorBoard
    RUN/wandb.json, trackio.json  the run's name in another tracker, and its last point there
    RUNS/runs.json             the runs of a sweep, each in a folder of its own below

Commands and the trainer find files through this module; it imports no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from common.errors import UsageError
from common.files import read_json
from common.options import find_nearest, list_names

LAST = "last.pt"
BEST = "best.pt"
RESULTS = "training.json"
SETTINGS = "settings.toml"
LIST = "runs.json"
LOCK = ".lock"
PATIENCE = 2.0  # seconds in which a killed process is gone


@contextmanager
def lock_folder(folder: Path, members: Sequence[str] = ()) -> Iterator[None]:
    """Hold a run's folder, and those of a sweep's members in it; a process that dies releases them too.

    Raises UsageError where another process trains there.
    """
    with ExitStack() as locks:
        for part in (folder, *(folder / name for name in members)):
            locks.enter_context(_lock(part))
        for file in folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            file.unlink(missing_ok=True)
        yield


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / LOCK, timeout=PATIENCE)
    try:
        lock.acquire()
    except Timeout:
        raise UsageError(
            f"{folder} is in use by another process: wait, end that one, or choose another --run-name"
        ) from None
    try:
        yield
    finally:
        lock.release()
        if not is_occupied(folder):  # nothing came of it
            with suppress(OSError):  # another process has just begun there
                (folder / LOCK).unlink(missing_ok=True)
                for path in created:
                    path.rmdir()


def is_occupied(folder: Path) -> bool:
    """Return whether anything lies in the folder, or in its place, apart from a lock."""
    return folder.exists() and (not folder.is_dir() or any(path.name != LOCK for path in folder.iterdir()))


def read_results(folder: Path) -> dict[str, Any]:
    """Return what a run has written at its end, "iteration" and "failure" among it; {} before that."""
    return read_json(folder / RESULTS) if (folder / RESULTS).is_file() else {}


def has_ended(folder: Path) -> bool:
    """Return whether a run was trained to its end, and its numbers stayed finite."""
    results = read_results(folder)
    return bool(results) and not results["failure"] and results["iteration"] >= results["iterations"]


def find_checkpoint(path: Path, *names: str) -> Path:
    """Return the path itself, or the first of these checkpoints in it where it is a run's folder.

    The folder of many runs is returned as it is, and so is FOLDER/last.pt or best.pt (see `find_runs`).
    Raises UsageError where there is no checkpoint.
    """
    of_many = path.name in (BEST, LAST) and (path.parent / LIST).is_file()
    if path.is_file() or (path / LIST).is_file() or of_many:
        return path
    for name in names:
        if (path / name).is_file():
            return path / name
    if not path.exists():
        run = path.parent if path.suffix == ".pt" else path
        others = [run.parent / "pretrained" / run.name, *run.parent.glob("*")]
        places = {other.name: other for other in others if is_run(other)}
        near = find_nearest(run.name, places)
        hint = f"did you mean {places[near]}?" if near else "--list shows all runs"
        raise UsageError(f"{path}: there is no such checkpoint or folder; {hint}")
    inside = sorted(part.name for part in path.iterdir() if is_run(part))
    if inside:
        runs = list_names(inside)
        raise UsageError(f"{path} is no run, but has some: {runs}; name one, such as {path / inside[0]}")
    raise UsageError(f"{path} has no checkpoint, neither {LAST} nor {BEST}, and no runs below")


def is_run(path: Path) -> bool:
    """Return whether a folder is that of a run, or of many."""
    return any((path / name).is_file() for name in (LAST, BEST, LIST))


def find_runs(path: Path) -> list[dict[str, Any]]:
    """Return "name", "setting", "seed" and checkpoint "file" of each run in a folder of many.

    The path is that folder, for the best checkpoints, or FOLDER/last.pt, FOLDER/best.pt; another path has
    none. Raises UsageError where a run has no such checkpoint.
    """
    folder, names = (path, (BEST, LAST)) if path.is_dir() else (path.parent, (path.name,))
    if path.is_file() or not (folder / LIST).is_file() or names[-1] not in (BEST, LAST):
        return []
    runs = read_json(folder / LIST)["runs"]
    return [run | {"file": find_checkpoint(folder / run["name"], *names)} for run in runs]
