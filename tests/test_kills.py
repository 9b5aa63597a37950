"""A run killed at any write, or on a full disk, resumes to the bits of an undisturbed one."""

import errno
import itertools
import multiprocessing
import os
from pathlib import Path

import pytest
from runs import assert_same_run, command, train

from common import files
from training.folders import LAST, RESULTS
from training.log import RunLog

SHORT = ["--iterations", 60, "--log-every", 10, "--val-every", 25, "--save-every", 20]
SHORT += ["--meta-batch-size", 4, "-k", 3, "-q", 3, "--compile", "off", "--val-tasks", 4]


@pytest.fixture
def whole(tmp_path) -> Path:
    """Return the folder of an undisturbed run."""
    return train(tmp_path / "whole", *SHORT)


METHOD = next(m for m in ("forkserver", "spawn") if m in multiprocessing.get_all_start_methods())
PROCESSES = multiprocessing.get_context(METHOD)  # not "fork": this process may have used autograd
PROCESSES.set_forkserver_preload(["commands.train", "runs"])


def run_counting(write: int, line: list[object]) -> None:
    """Run a command line in a process that ends at a write or rename, as by kill -9."""
    writes, fsync, rename = itertools.count(1), os.fsync, Path.replace

    def count() -> None:
        if next(writes) == write:
            os._exit(9)

    files.os.fsync = lambda file: (count(), fsync(file))
    Path.replace = lambda a, b: (count(), rename(a, b))[1]
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        os._exit(command(*line))


def run_until_killed(write: int, line: list[object]) -> bool:
    """Return whether the command was killed before it ended."""
    process = PROCESSES.Process(target=run_counting, args=(write, line))
    process.start()
    process.join()
    assert process.exitcode in (0, 9)
    return process.exitcode == 9


def kill_and_compare(writes: list[int], whole: Path, home: Path) -> bool:
    """Kill a run at these writes in turn, and resume it; return whether every kill came in time."""
    line = [*SHORT, "--checkpoint-path", home, "--run-name", "run", "--resume"]
    killed = [run_until_killed(write, line) for write in writes]
    assert command(*line) == 0
    assert_same_run(home / "run", whole)
    assert not list((home / "run").glob(".*.tmp"))  # no half-written file
    return all(killed)


def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(whole, tmp_path):
    # while points, a checkpoint and a best checkpoint are written, and between two renames
    assert kill_and_compare([2, 5, 7, 3], whole, tmp_path)


@pytest.mark.slow
def test_a_run_killed_at_any_write_ends_with_the_bits_of_an_undisturbed_one(whole, tmp_path):
    write = 1
    while kill_and_compare([write], whole, tmp_path / str(write)):
        write += 1
    assert write > 15


def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(tmp_path, refuse, monkeypatch):
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "events")

    monkeypatch.setattr("training.tensorboard.drop_events", fill)
    line = refuse(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run")
    assert "events: no space left on device; free some space" in line
    assert list(tmp_path.iterdir()) == []


def test_results_that_could_not_be_written_are_written_by_the_next_call(tmp_path, capsys, monkeypatch):
    def fill(log, tag, figure, iteration, file):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "figure", fill)
        assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    assert "training.png: no space left on device; free some" in capsys.readouterr().err.splitlines()[-1]
    assert command("--load", run / LAST) == 0
    assert (run / RESULTS).exists() and (run / "training.png").exists()
