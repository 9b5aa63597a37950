"""What goes wrong while a run is trained: numbers that are not finite, disks that do not take it."""

import errno
import json
import os
import re
import resource
import shutil
import signal
import struct
from pathlib import Path

import pytest
import torch
from common.saving import Saver
from test_checkpoint import a_checkpoint
from test_runs import assert_same_bits, assert_same_run, command, curves
from torch.utils._python_dispatch import TorchDispatchMode

from common import saving
from dataset import Regression
from training import trainer
from training.checkpoint import BEST, LAST, load_checkpoint
from training.tensorboard import RunLog, drop_events

BAD = 37  # the iteration whose targets are made NaN
SHORT = ["--iterations", 60, "--log-every", 10, "--val-every", 20, "--save-every", 25, "--meta-batch-size", 4]


@pytest.fixture
def bad_iteration(monkeypatch):
    """The targets of one iteration are NaN, of the seeds 1 and above."""
    sample = Regression.sample

    def spoilt(self, split, seed, iteration, tasks, **options):
        batch = sample(self, split, seed, iteration, tasks, **options)
        if split != "train":
            return batch
        bad = torch.as_tensor(iteration == BAD) & torch.as_tensor(seed >= 1)
        return batch._replace(query_y=torch.where(bad, torch.nan, batch.query_y))

    monkeypatch.setattr(Regression, "sample", spoilt)


def weights_and_moments(folder: Path) -> dict[str, object]:
    saved = load_checkpoint(folder / LAST)
    return {"parameters": saved.parameters, "optimizer": saved.optimizer["state"], "window": saved.progress}


# ---- numbers that are not finite ------------------------------------------------------------


def test_a_run_stops_before_the_iteration_that_is_not_finite(bad_iteration, tmp_path, capsys):
    options = [*SHORT, "--seed", 1, "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "stopped") == trainer.FAILED
    said = capsys.readouterr().err.splitlines()[-1]
    assert f"iteration {BAD}: the query targets of task 0 are not all finite" in said
    assert f"--load {tmp_path / 'stopped' / LAST} --on-nan skip" in said
    stopped = load_checkpoint(tmp_path / "stopped" / LAST)
    assert stopped.iteration == BAD - 1 and curves(tmp_path / "stopped")["train/query_loss"] == [10, 20, 30]
    assert json.loads((tmp_path / "stopped" / "training.json").read_text())["failure"] in said
    # as if it had been asked for so many iterations; but for the validation at the end of those
    assert command(*options, "--iterations", BAD - 1, "--run-name", "short") == 0
    found, expected = (weights_and_moments(tmp_path / name) for name in ("stopped", "short"))
    assert_same_bits(found["parameters"], expected["parameters"])
    assert_same_bits(found["optimizer"], expected["optimizer"])
    assert found["window"]["window_size"] == 6


def test_a_compiled_run_stops_there_too(bad_iteration, tmp_path, capsys):
    compiled = ["--compile", "on", "--compile-after", 5, "--seed", 1, "--checkpoint-path", tmp_path]
    assert command(*SHORT, *compiled, "--run-name", "run") == trainer.FAILED
    assert f"iteration {BAD}: the query targets of task 0 are not all finite" in capsys.readouterr().err
    assert load_checkpoint(tmp_path / "run" / LAST).iteration == BAD - 1


def test_an_iteration_that_is_skipped_changes_nothing(bad_iteration, tmp_path):
    options = [*SHORT, "--seed", 1, "--checkpoint-path", tmp_path]
    skip = ["--on-nan", "skip"]
    assert command(*options, *skip, "--run-name", "whole") == 0
    assert command(*options, *skip, "--iterations", BAD, "--run-name", "skipped") == 0
    assert command(*options, "--iterations", BAD - 1, "--run-name", "before") == 0
    after, before = (load_checkpoint(tmp_path / name / LAST) for name in ("skipped", "before"))
    assert_same_bits(after.parameters, before.parameters)
    moments = ("exp_avg", "exp_avg_sq")
    for number, state in after.optimizer["state"].items():
        for moment in moments:
            assert_same_bits(state[moment], before.optimizer["state"][number][moment])
    # what stopped there goes on as what skipped it
    assert command(*options, "--run-name", "stopped") == trainer.FAILED
    assert command("--load", tmp_path / "stopped" / LAST, *skip) == 0
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")
    training = load_checkpoint(tmp_path / "whole" / LAST).progress["training"]
    assert all(0 < loss < 100 for loss in training["query_loss"])  # a mean of nine is one of nine


def test_of_several_runs_the_others_go_on(bad_iteration, tmp_path, capsys):
    options = [*SHORT, "--checkpoint-path", tmp_path]
    assert command(*options, "--seeds", "0-2", "--run-name", "many") == trainer.FAILED
    said = capsys.readouterr().err
    assert "2 of 3 runs stopped before their end, seed-1, iteration 37: " in said
    assert command(*options, "--seed", 0, "--run-name", "alone") == 0
    there, alone = (load_checkpoint(tmp_path / name / LAST) for name in ("many/seed-0", "alone"))
    assert there.iteration == 60
    for name, weight in alone.parameters.items():
        assert torch.allclose(there.parameters[name], weight, atol=1e-5)
    assert load_checkpoint(tmp_path / "many" / "seed-2" / LAST).iteration == BAD - 1
    again = [*options, "--seeds", "0-2", "--run-name", "many", "--resume", "--on-nan", "skip"]
    assert command(*again) == 0
    assert load_checkpoint(tmp_path / "many" / "seed-2" / LAST).iteration == 60


@pytest.mark.parametrize(
    ("flags", "cause"),
    [
        (["--inner-lr", 5, "-s", 5], r"the inner loop diverges in 4 of 4 tasks \(query loss of task"),
        (["--algorithm", "reptile", "--inner-lr", 5], r"the inner loop diverges in 4 of 4 tasks"),
        (["--meta-lr", 1e25], "before the first inner step: the weights have become too large"),
        (["--loss", "{own}:steep"], r"the losses are finite .*, but not the meta-gradient of"),
        (
            ["--loss", "{own}:large", "--inner-lr", 1e-30],
            r"the meta-gradient's norm is .*, too large for Adam",
        ),
    ],
)
def test_the_likely_cause_is_said(flags, cause, tmp_path, capsys):
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\n"
        "def steep(outputs, y):\n    still = (outputs - outputs.detach()).abs()\n"
        "    return (still.pow(1.5) + (outputs - y) ** 2).mean()\n"
        "def large(outputs, y):\n    return 1e25 * ((outputs - y) ** 2).mean()\n"
    )
    flags = [str(flag).format(own=own) for flag in flags]
    assert command(*SHORT, *flags, "--checkpoint-path", tmp_path) == trainer.FAILED
    assert re.search(cause, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("clip", [["--grad-clip", 10], ["--grad-clip-norm", 10]])
def test_clipping_does_not_hide_a_meta_gradient_that_is_not_finite(clip, tmp_path, capsys):
    own = tmp_path / "own.py"  # a loss of some 1, whose gradient's norm overflows
    own.write_text("def loss(outputs, y):\n    still = outputs.detach()\n"
                   "    return 1 + (1e25 * (outputs - still)).mean() * 1.0\n")  # fmt: skip
    line = [*SHORT, *clip, "--loss", f"{own}:loss", "--first-order", "--inner-lr", 1e-35]
    assert command(*line, "--checkpoint-path", tmp_path) == trainer.FAILED
    assert "iteration 1: the meta-gradient's norm is" in capsys.readouterr().err


def test_the_state_is_saved_before_the_cause_is_looked_for(bad_iteration, tmp_path, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("training.divergence.find_cause", fails)
    line = [*SHORT, "--seed", 1, "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*line) == trainer.FAILED
    assert load_checkpoint(tmp_path / "run" / LAST).iteration == BAD - 1


def test_no_iteration_asks_the_device_for_a_number(tmp_path, monkeypatch):
    class Asked(TorchDispatchMode):
        times = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            Asked.times += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    step = trainer.Trainer.step

    def watched(self, bar):
        with Asked():
            return step(self, bar)

    monkeypatch.setattr(trainer.Trainer, "step", watched)
    assert command(*SHORT, "--on-nan", "skip", "--checkpoint-path", tmp_path) == 0
    assert Asked.times == 0


# ---- disks ----------------------------------------------------------------------------------


@pytest.fixture
def at_iteration(monkeypatch):
    """Does things after iterations, by number."""
    plan: dict[int, object] = {}
    step = trainer.Trainer.step

    def planned(self, bar):
        taken = step(self, bar)
        plan.get(self.iteration, lambda: None)()
        return taken

    monkeypatch.setattr(trainer.Trainer, "step", planned)
    return plan


@pytest.fixture
def small_files():
    """The kernel cuts off every file of this process at a size; None lets them grow again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_run_outlives_a_disk_that_takes_nothing_for_a_while(at_iteration, small_files, tmp_path, capsys):
    options = [*SHORT, "--iterations", 100, "--checkpoint-path", tmp_path]
    assert command(*options, "--run-name", "whole") == 0
    found = {}

    def look():
        found["last"] = load_checkpoint(tmp_path / "run" / LAST).iteration
        small_files(None)

    at_iteration.update({31: lambda: small_files(4096), 79: look})
    assert command(*options, "--run-name", "run") == 0
    said = capsys.readouterr().err
    assert found["last"] == 25
    assert "Not saved at iteration 40 (file too large): training goes on" in said and "Saved again" in said
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert curves(tmp_path / "run") == curves(tmp_path / "whole")
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_run_that_cannot_save_its_end_says_so_and_saves_it_elsewhere(
    at_iteration, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run, aside = tmp_path / "run", tmp_path / "aside"

    def in_its_place():
        run.rename(aside)
        run.write_text("")  # no folder can be made there

    at_iteration[31] = in_its_place
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    (rescued,) = tmp_path.glob("maml-rescued-*")
    assert f"{run / LAST} could not be saved at iteration 60 (" in said and str(rescued) in said
    assert load_checkpoint(rescued / "run" / LAST).iteration == 60
    assert load_checkpoint(aside / LAST).iteration == 25


def test_a_disk_that_is_full_from_the_start_is_named_and_nothing_stays(small_files, tmp_path, capsys):
    small_files(0)
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    assert re.search(r"run/events\S+: file too large$", capsys.readouterr().err.strip())
    assert list(tmp_path.iterdir()) == []


def test_of_all_that_is_rescued_the_line_names_what_the_run_goes_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "run").write_text("")  # no folder can be made there
    saver = Saver(lambda line: None)
    for name in (LAST, BEST):
        saver.add(tmp_path / "run" / name, a_checkpoint())
        assert not saver.write([], 7)
    said = saver.rescued(7)
    (rescued,) = tmp_path.glob("maml-rescued-*/run")
    assert f"--load {rescued / LAST}" in said
    assert {file.name for file in rescued.iterdir()} == {LAST, BEST}


def test_a_folder_that_vanishes_is_made_again(at_iteration, tmp_path):
    at_iteration[31] = lambda: shutil.rmtree(tmp_path / "run")
    for name in ("run", "whole"):
        assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", name) == 0
        at_iteration.clear()
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_folder_that_has_become_another_runs_is_left_alone(at_iteration, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run = tmp_path / "run"

    def another():
        run.rename(tmp_path / "aside")
        run.mkdir()
        (run / LAST).write_text("another's")

    at_iteration[31] = another
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    assert "another folder has come in the place of" in capsys.readouterr().err
    assert (run / LAST).read_text() == "another's" and not (run / "best.pt").exists()
    (rescued,) = tmp_path.glob("maml-rescued-*")
    assert command("--load", rescued / "run" / LAST, "--iterations", 61) == 0


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_nothing_is_written_through_what_lies_in_the_place_of_a_temporary_file(kind, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    for name in (f".{LAST}.tmp", ".training.json.tmp"):
        (tmp_path / "run").mkdir(exist_ok=True)
        place = tmp_path / "run" / name
        place.symlink_to(precious) if kind == "link" else os.mkfifo(place)
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run", "--resume") == 0
    assert precious.read_text() == "mine" and not (tmp_path / "run" / LAST).is_symlink()


def test_results_that_cannot_be_written_are_written_by_the_next_call(tmp_path, capsys, monkeypatch):
    def full(log, tag, figure, iteration, file):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("training.run.RunLog.figure", full)
        assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    assert "the run is saved, but not its results (no space left on device)" in capsys.readouterr().err
    assert command("--load", tmp_path / "run" / LAST) == 0
    assert (tmp_path / "run" / "training.json").exists() and (tmp_path / "run" / "training.png").exists()


def test_an_event_file_that_is_cut_short_goes_on_without_a_gap(small_files, tmp_path):
    log = RunLog(tmp_path, begin_at=0)
    for iteration in range(1, 200):
        log.scalars({"loss": float(iteration)}, iteration)
        if iteration == 50:
            log.flush()
            small_files(log.events.path.stat().st_size + 1000)  # in the middle of a record
        if iteration == 150:
            with pytest.raises(OSError):
                log.flush()
            small_files(None)
    assert curves(tmp_path)["loss"] == list(range(1, 51))  # whole at any time
    log.flush()
    assert curves(tmp_path)["loss"] == list(range(1, 200))


def test_an_event_file_that_is_taken_away_begins_again_as_one(tmp_path):
    log = RunLog(tmp_path, begin_at=0)
    log.events.path.unlink()
    for iteration in range(1, 30):
        log.scalars({"loss": 1.0}, iteration)
    log.flush()
    drop_events(tmp_path, 20)
    assert curves(tmp_path)["loss"] == list(range(1, 20))


@pytest.mark.parametrize("length", [5, 2**40, 2**62, 2**63 + 5])
def test_a_record_that_is_longer_than_its_file_is_its_end(length, tmp_path):
    from tensorboard.compat.tensorflow_stub.pywrap_tensorflow import masked_crc32c

    log = RunLog(tmp_path, begin_at=0)
    log.scalars({"loss": 1.0}, 1)
    log.flush()
    with log.events.path.open("ab") as file:
        size = struct.pack("<Q", length)
        file.write(size + struct.pack("<I", masked_crc32c(size)) + b"abc")
    drop_events(tmp_path, 2)
    assert curves(tmp_path)["loss"] == [1] and b"abc" not in log.events.path.read_bytes()


@pytest.mark.parametrize("place", ["before a step", "after a validation"])
def test_a_signal_at_any_moment_is_followed_by_a_save(place, tmp_path, monkeypatch):
    """Also in the moments between the questions whether there has been one."""
    name = {"before a step": "_stopping", "after a validation": "_validate"}[place]
    whole = getattr(trainer.Trainer, name)

    def with_signal(self, *arguments, **options):
        found = whole(self, *arguments, **options)
        if self.iteration == 20:
            os.kill(os.getpid(), signal.SIGTERM)
        return found

    monkeypatch.setattr(trainer.Trainer, name, with_signal)
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 128 + signal.SIGTERM
    assert load_checkpoint(tmp_path / "run" / LAST).iteration in (20, 21)


def test_the_clock_saves_too(tmp_path, monkeypatch):
    seen = []
    write = saving.save_checkpoints
    monkeypatch.setattr(
        saving, "save_checkpoints", lambda each: (seen.extend(c.iteration for _, c in each), write(each))
    )
    line = [*SHORT, "--save-every", 1000, "--val-every", 1000, "--save-every-minutes", 1e-9]
    assert command(*line, "--checkpoint-path", tmp_path) == 0
    assert set(seen) == set(range(1, 61))
