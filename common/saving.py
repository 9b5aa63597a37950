"""Checkpoints on their way to the disk: what it does not take is kept, and written with the next ones."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from common.errors import reason_of
from common.locks import keep
from training.checkpoint import LAST, Checkpoint, save_checkpoints
from training.tensorboard import RunLog


class Saver:
    """Writes checkpoints, now or later; `say` tells the user that it has to be later."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say = say
        self.unsaved: dict[Path, Checkpoint] = {}
        self.failing: OSError | None = None

    def add(self, path: Path, checkpoint: Checkpoint) -> None:
        """Notes what is to be written, in the place of what was to be written there."""
        self.unsaved[path] = checkpoint

    def write(self, logs: Iterable[RunLog], iteration: int) -> bool:
        """Writes all that there is, its folders if need be; what a checkpoint has seen is in the event files
        first. Whether nothing is left."""
        if not self.unsaved:
            return True
        try:
            for folder in {path.parent for path in self.unsaved}:
                keep(folder)
            for log in logs:
                log.flush()
            save_checkpoints(list(self.unsaved.items()))
        except OSError as error:
            if self.failing is None:
                self.say(
                    f"Not saved at iteration {iteration:,} ({reason_of(error)}): training goes on, and tries "
                    "again with the next checkpoint; the last one is whole"
                )
            self.failing = error
            return False
        if self.failing is not None:
            self.say(f"Saved again at iteration {iteration:,}")
        self.failing = None
        self.unsaved.clear()
        return True

    def rescued(self, iteration: int) -> str:
        """Writes what is left to a folder for temporary files, since the run ends; what has become of it."""
        assert self.failing is not None
        file = max(self.unsaved, key=lambda path: path.name == LAST)  # of one run what it goes on from
        said = f"{file} could not be saved at iteration {iteration:,} ({reason_of(self.failing)})"
        try:
            folder = Path(tempfile.mkdtemp(prefix="maml-rescued-"))
            for path in self.unsaved:
                (folder / path.parent.name).mkdir(exist_ok=True)
            save_checkpoints([(folder / path.parent.name / path.name, c) for path, c in self.unsaved.items()])
        except OSError:
            return f"{said}, nor in {tempfile.gettempdir()}: the one before is whole, go on from it"
        return (
            f"{said}: go on with --load {folder / file.parent.name / file.name}; the one before is whole, too"
        )
