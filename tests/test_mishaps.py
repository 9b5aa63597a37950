"""What goes wrong while a run is trained: non-finite numbers, kills, full disks, signals, little memory."""

import errno
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits, assert_same_run, command, curves
from torch.utils._python_dispatch import TorchDispatchMode

from common import files
from dataset import Regression
from training import trainer
from training.checkpoint import load_checkpoint
from training.folders import LAST, RESULTS
from training.tensorboard import RunLog, drop_events
from training.trainer import FAILED, Trainer

BAD = 37  # the iteration whose targets are made NaN
SHORT = ["--iterations", 60, "--log-every", 10, "--val-every", 25, "--save-every", 20]
SHORT += ["--meta-batch-size", 4, "-k", 3, "-q", 3, "--compile", "off"]


@pytest.fixture(autouse=True)
def few_validation_tasks(monkeypatch):
    monkeypatch.setattr(trainer, "VALIDATION_TASKS", 10)


@pytest.fixture
def bad_iteration(monkeypatch):
    """Make the targets of one iteration NaN, for the seeds 1 and above."""
    sample = Regression.sample

    def spoilt(self, split, seed, iteration, tasks, **options):
        batch = sample(self, split, seed, iteration, tasks, **options)
        if split != "train":
            return batch
        bad = torch.as_tensor(iteration == BAD) & torch.as_tensor(seed >= 1)
        return batch._replace(query_y=torch.where(bad, torch.nan, batch.query_y))

    monkeypatch.setattr(Regression, "sample", spoilt)


@pytest.fixture
def at_iteration(monkeypatch):
    """Call functions before iterations, by number."""
    plan: dict[int, object] = {}
    step = Trainer.step

    def planned(self):
        plan.get(self.iteration + 1, lambda: None)()
        return step(self)

    monkeypatch.setattr(Trainer, "step", planned)
    return plan


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The folder of a run that nothing has disturbed."""
    home = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "VALIDATION_TASKS", 10)
        assert command(*SHORT, "--checkpoint-path", home, "--run-name", "run") == 0
    return home / "run"


def last_line(capsys) -> str:
    return capsys.readouterr().err.splitlines()[-1]


# ---- non-finite numbers ----------------------------------------------------------------------------


def test_a_run_stops_before_a_non_finite_iteration_and_says_why(bad_iteration, tmp_path, capsys):
    options = [*SHORT, "--seed", 1, "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "stopped") == FAILED
    line = last_line(capsys)
    assert f"iteration {BAD}: the query targets of task 0 are not all finite" in line
    assert f"--load {tmp_path / 'stopped' / LAST} --on-nan skip" in line
    stopped = load_checkpoint(tmp_path / "stopped" / LAST)
    assert stopped.iteration == BAD - 1 and curves(tmp_path / "stopped")["train/query_loss"] == [10, 20, 30]
    assert command(*options, "--iterations", BAD - 1, "--run-name", "short") == 0
    short = load_checkpoint(tmp_path / "short" / LAST)
    assert_same_bits(stopped.parameters | stopped.exp_avg, short.parameters | short.exp_avg)


def test_a_skipped_iteration_changes_neither_weights_nor_moments(bad_iteration, tmp_path, monkeypatch):
    seen: dict[int, torch.Tensor] = {}
    step = Trainer.step

    def look(self):
        state = self.state
        seen[self.iteration] = torch.cat([state.parameters, state.exp_avg, state.exp_avg_sq])
        return step(self)

    monkeypatch.setattr(Trainer, "step", look)
    options = [*SHORT, "--seed", 1, "--on-nan", "skip", "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "run") == 0
    assert torch.equal(seen[BAD - 1], seen[BAD]) and not torch.equal(seen[BAD], seen[BAD + 1])
    assert curves(tmp_path / "run")["train/skipped"] == [10, 20, 30, 40, 50, 60]


def test_of_several_runs_those_that_do_not_fail_continue(bad_iteration, tmp_path, capsys):
    options = [*SHORT, "--checkpoint-path", tmp_path]
    assert command(*options, "--seeds", "0-2", "--run-name", "many") == FAILED
    assert "2 of 3 runs stopped before their end, seed-1, iteration 37: " in capsys.readouterr().err
    iterations = [load_checkpoint(tmp_path / "many" / f"seed-{n}" / LAST).iteration for n in range(3)]
    assert iterations == [60, BAD - 1, BAD - 1]
    again = [*options, "--seeds", "0-2", "--run-name", "many", "--resume", "--on-nan", "skip"]
    assert command(*again) == 0
    assert load_checkpoint(tmp_path / "many" / "seed-2" / LAST).iteration == 60


OWN_LOSSES = """
import torch

def steep(outputs, y):
    still = (outputs - outputs.detach()).abs()
    return (still.pow(1.5) + (outputs - y) ** 2).mean()

def large(outputs, y):
    return 1e25 * ((outputs - y) ** 2).mean()
"""


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--inner-lr", 5, "-s", 5], r"the inner loop diverges in 4 of 4 tasks \(query loss of task"),
        (["--meta-lr", 1e25], "before the first inner step: the weights have become too large"),
        (["--loss", "own.py:steep"], r"the losses are finite .*, but not the meta-gradient of"),
        (
            ["--loss", "own.py:large", "--inner-lr", 1e-30],
            r"the meta-gradient's norm is .*, too large for Adam",
        ),
    ],
)
def test_the_likely_cause_of_non_finite_numbers_is_named(flags, cause, tmp_path, capsys, monkeypatch):
    (tmp_path / "own.py").write_text(OWN_LOSSES)
    flags = [str(flag).replace("own.py", str(tmp_path / "own.py")) for flag in flags]
    assert command(*SHORT, *flags, "--checkpoint-path", tmp_path) == FAILED
    assert re.search(cause, last_line(capsys))


def test_no_iteration_waits_for_the_device(tmp_path, monkeypatch):
    class Asked(TorchDispatchMode):
        times = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Asked.times += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    step = Trainer.step

    def watched(self):
        with Asked():
            return step(self)

    monkeypatch.setattr(Trainer, "step", watched)
    assert command(*SHORT, "--on-nan", "skip", "--checkpoint-path", tmp_path) == 0
    assert Asked.times == 0


# ---- kills -----------------------------------------------------------------------------------------


def run_and_be_killed(at_write: int, line: list[object]) -> bool:
    """Run a command line in a forked process that is gone, as by kill -9, at a write; False: it had ended."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            writes = 0
            fsync, rename = os.fsync, Path.replace

            def count() -> None:
                nonlocal writes
                writes += 1
                if writes == at_write:
                    os._exit(9)

            files.os.fsync = lambda file: (count(), fsync(file))
            Path.replace = lambda a, b: (count(), rename(a, b))[1]
            with open(os.devnull, "w") as nowhere:  # noqa: PTH123
                os.dup2(nowhere.fileno(), 1)
                os.dup2(nowhere.fileno(), 2)
                code = command(*line)
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 9)
    return code == 9


def kill_and_compare(writes: list[int], whole: Path, home: Path) -> bool:
    """Kill a run at these writes, one after another, and resume it to the end; False: it ended before."""
    line = [*SHORT, "--checkpoint-path", home, "--run-name", "run", "--resume"]
    killed = [run_and_be_killed(number, line) for number in writes]
    assert command(*line) == 0
    assert_same_run(home / "run", whole)
    assert {path.name for path in (home / "run").iterdir() if path.name.startswith(".")} == set()
    return all(killed)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_killed_again_and_again_ends_with_the_bits_of_an_undisturbed_one(whole, tmp_path):
    # at a log's sync, a checkpoint's sync, between best.pt and last.pt, at a rename, ...
    assert kill_and_compare([2, 5, 7, 3], whole, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_run_killed_at_any_write_ends_with_the_bits_of_an_undisturbed_one(whole, tmp_path):
    number = 1
    while kill_and_compare([number], whole, tmp_path / str(number)):
        number += 1
    assert number > 15


# ---- disks -----------------------------------------------------------------------------------------


def test_a_full_disk_ends_a_run_in_one_line_and_it_resumes_to_the_bit(whole, at_iteration, tmp_path, capsys):
    line = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        at_iteration[31] = lambda: patch.setattr(files.os, "fsync", full)
        assert command(*line) == 2
    message = last_line(capsys)
    assert "not saved at iteration 40 (no space left on device)" in message and "resume" in message
    assert load_checkpoint(tmp_path / "run" / LAST).iteration == 20
    assert not list((tmp_path / "run").glob(".*"))
    at_iteration.clear()
    assert command(*line, "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_disk_that_is_full_from_the_start_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "events")

    monkeypatch.setattr(RunLog, "_append", full)
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "events: no space left on device; free some space" in line
    assert list(tmp_path.iterdir()) == []


def test_results_that_could_not_be_written_are_written_by_the_next_call(tmp_path, capsys, monkeypatch):
    def full(log, tag, figure, iteration, file):
        raise OSError(errno.ENOSPC, "No space left on device", str(file))

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "figure", full)
        assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    assert "no space left on device; free some space" in last_line(capsys)
    assert command("--load", tmp_path / "run" / LAST) == 0
    assert (tmp_path / "run" / RESULTS).exists() and (tmp_path / "run" / "training.png").exists()


# ---- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("place", ["step", "_is_stopping", "_validate"])
def test_a_signal_at_any_moment_is_followed_by_a_save(place, number, whole, tmp_path, monkeypatch):
    function = getattr(Trainer, place)

    def with_signal(self):
        result = function(self)
        if self.iteration == 25:
            os.kill(os.getpid(), number)
        return result

    line = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, place, with_signal)
        assert command(*line) == 128 + number
    assert load_checkpoint(tmp_path / "run" / LAST).iteration in (25, 26)
    assert command(*line, "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


def test_the_state_is_saved_every_few_minutes_whatever_save_every_says(tmp_path, monkeypatch):
    saved = []
    save = trainer.save_checkpoints
    monkeypatch.setattr(
        trainer, "save_checkpoints", lambda files: (saved.extend(c.iteration for _, c in files), save(files))
    )
    monkeypatch.setattr(trainer, "SAVE_SECONDS", 0.0)
    line = [*SHORT, "--iterations", 5, "--save-every", 1000, "--val-every", 1000]
    assert command(*line, "--checkpoint-path", tmp_path) == 0
    assert set(saved) == {1, 2, 3, 4, 5}


# ---- memory ----------------------------------------------------------------------------------------


def test_out_of_memory_is_one_line_after_which_the_run_resumes_to_the_bit(
    whole, at_iteration, tmp_path, capsys
):
    def run_out() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    line = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]
    at_iteration[33] = run_out
    assert command(*line) == 2
    message = last_line(capsys)
    assert "out of memory at iteration 32 with 4 tasks at once: resume from iteration 32 with" in message
    assert "and a smaller --tasks-at-once" in message
    at_iteration.clear()
    assert command(*line, "--resume") == 0
    assert_same_run(tmp_path / "run", whole)


# ---- event files -----------------------------------------------------------------------------------


def log_points(folder: Path, first: int, last: int) -> RunLog:
    log = RunLog(folder, begin_at=first)
    for iteration in range(first, last + 1):
        log.scalars({"loss": 1.0}, iteration)
    log.flush()
    return log


def test_a_resumed_curve_has_neither_gaps_nor_doubled_points(tmp_path):
    log_points(tmp_path, 0, 50)
    log_points(tmp_path, 31, 60)  # in the same second: TensorBoard orders files by names
    assert curves(tmp_path)["loss"] == list(range(61))


def test_a_torn_record_and_a_foreign_file_do_no_harm(tmp_path):
    log = log_points(tmp_path, 0, 9)
    log.path.write_bytes(log.path.read_bytes()[:-3])
    foreign = tmp_path / "events.out.tfevents.notes"
    foreign.write_text("mine")
    drop_events(tmp_path, 5)
    assert curves(tmp_path)["loss"] == list(range(5)) and foreign.read_text() == "mine"


def test_points_reach_the_file_without_being_asked(tmp_path, monkeypatch):
    log = log_points(tmp_path, 0, 0)
    size = log.path.stat().st_size
    monkeypatch.setattr(time, "monotonic", lambda: 1e9)
    log.scalars({"loss": 1.0}, 1)
    assert log.path.stat().st_size > size
