"""Out of memory: one line that names a value that fits, exit code 2, and nothing of the run is lost."""

import re
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT

import main
from commands import config
from common import memory
from maml import MAML
from training import trainer
from training.checkpoint import BEST, LAST, load_checkpoint

SHORT = ["--meta-batch-size", 25, "-k", 2, "-q", 2, "--compile", "off", "--val-every", 3, "--iterations", 6]


def command(*arguments: object) -> int:
    return main.main([str(a) for a in arguments])


def assert_same_weights(a: Path, b: Path) -> None:
    a_weights, b_weights = (load_checkpoint(file).parameters for file in (a, b))
    for name, weight in a_weights.items():
        assert torch.allclose(weight, b_weights[name], rtol=1e-3, atol=1e-6), name


# ---- for real ---------------------------------------------------------------------------------


LIMITED = """
import contextlib, io, re, resource, sys
sys.path.insert(0, sys.argv[1])
import main, trainer
import torch._dynamo  # which torch.func imports when it is used
take, limit = trainer.Trainer.step, []
trainer.VALIDATION_TASKS = 3

def step(self, bar):  # from the second iteration on there are so many MB more than now
    if self.iteration >= 1 and not limit:
        now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        limit.append(now + 500 * 2**20)
        resource.setrlimit(resource.RLIMIT_AS, (limit[0], limit[0]))
    return take(self, bar)

trainer.Trainer.step = step
with contextlib.redirect_stderr(io.StringIO()) as said:
    code = main.main(sys.argv[2:])
print("CODE", code, said.getvalue().splitlines()[-1])
(hint,) = re.findall("with (--load .* --tasks-at-once .*)", said.getvalue())
sys.exit(main.main(hint.split()))
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="limits the address space, as Linux counts it"
)
def test_the_named_value_fits_under_the_same_limit(tmp_path):
    flags = ["-q", 40_000, "-k", 2, "--iterations", 2, "--compile", "off", "--meta-batch-size", 32]
    flags += ["--checkpoint-path", tmp_path, "--run-name"]
    line = [sys.executable, "-c", LIMITED, str(ROOT), *map(str, flags), "run"]
    done = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    last = tmp_path / "run" / LAST
    found = re.search(
        r"CODE 2 main.py: error: out of memory at iteration 2 with 32 tasks at once: --tasks-at-once (\d+) "
        rf"fits; the run goes on from iteration 1 with --load {last} --tasks-at-once (\d+)\n",
        done.stdout,
    )
    assert found and found[1] == found[2] and "Traceback" not in done.stdout, done.stdout
    assert done.returncode == 0 and 1 < int(found[1]) < 32, done.stdout
    assert f"Goes on to rounding, not to the bit: it had tasks at once all, now {found[1]}\n" in done.stdout
    assert load_checkpoint(last).iteration == 2


# ---- as other devices say it --------------------------------------------------------------------


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB."


@pytest.fixture
def room_for(monkeypatch):
    """Lets so many tasks at once fit, in the meta-gradient and in predictions, from a call on."""

    def limit(training: int = 1000, predicting: int = 1000, *, calls: int = 0) -> None:
        for name, most in (("meta_gradient", training), ("predictions", predicting)):
            monkeypatch.setattr(MAML, name, _limited(getattr(MAML, name), most, calls))

    return limit


def _limited(function, most: int, calls: int):
    made = []

    def call(self, parameters, batch, *arguments, **named):
        made.append(1)
        if min(self.tasks_at_once or 1000, len(batch.support_x)) > most and len(made) > calls:
            raise torch.OutOfMemoryError(CUDA)
        return function(self, parameters, batch, *arguments, **named)

    return call


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("whole")
    assert command(*SHORT, "--checkpoint-path", home, "--run-name", "run") == 0
    return home / "run"


@pytest.mark.parametrize(
    ("room", "expected", "iteration"),
    [
        ({"training": 5, "calls": 2}, "at iteration 3 with 25 tasks at once: --tasks-at-once 3 fits", 2),
        (
            {"predicting": 70},
            "in the validation at iteration 3 with 200 tasks at once: --tasks-at-once 50 fits",
            3,
        ),
        (
            {"training": 12, "predicting": 6},
            "at iteration 1 with 25 tasks at once: --tasks-at-once 6 fits",
            0,
        ),
    ],
)
def test_the_last_whole_iteration_is_saved_and_the_run_goes_on_with_the_named_value(
    room, expected, iteration, room_for, whole, tmp_path, capsys
):
    room_for(**room)
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run", "--save-every", 1000) == 2
    last = tmp_path / "run" / LAST
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith(
        f"main.py: error: out of memory {expected}; the run goes on from iteration {iteration} "
    )
    assert load_checkpoint(last).iteration == iteration
    assert command(*said.partition(" with --load ")[2].replace(f"{last}", f"--load {last}").split()) == 0
    assert_same_weights(last, whole / LAST)
    progress = [load_checkpoint(file).progress for file in (last, whole / LAST)]
    assert progress[0]["validation"]["iteration"] == progress[1]["validation"]["iteration"] == [3, 6]


def test_where_not_even_one_task_fits_other_ways_are_named(room_for, tmp_path, capsys):
    room_for(training=0)
    assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert (
        "out of memory at iteration 1, even with one task at a time: begin with smaller tasks (-q, " in said
    )
    assert "--tasks-at-once" not in said and "--engine adjoint" in said


def test_many_runs_go_on_with_the_named_value(room_for, tmp_path, capsys):
    line = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "many", "--seeds", "0-1"]
    room_for(training=6, calls=4)
    assert command(*line) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.endswith("the same command with --run-name many --resume --tasks-at-once 6")
    iterations = {load_checkpoint(tmp_path / "many" / f"seed-{seed}" / LAST).iteration for seed in (0, 1)}
    assert len(iterations) == 1 and f"goes on from iteration {iterations.pop()} with" in said
    assert command(*line, "--resume", "--tasks-at-once", 6) == 0


def test_of_many_runs_none_loses_a_validation_to_another_ones_shortage(tmp_path, monkeypatch):
    line = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "many", "--seeds", "0-1", "--save-every", 1]
    evaluated, calls = trainer.evaluate, []

    def second_fails(*arguments, **named):
        calls.append(1)
        if len(calls) == 2:
            raise MemoryError
        return evaluated(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "evaluate", second_fails)
        assert command(*line) == 2
    assert command(*line, "--resume") == 0
    for seed in (0, 1):
        validation = load_checkpoint(tmp_path / "many" / f"seed-{seed}" / LAST).progress["validation"]
        assert validation["iteration"] == [3, 6]


def test_a_checkpoint_that_cannot_be_replaced_stays(room_for, tmp_path, capsys, monkeypatch):
    line = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*line, "--iterations", 1) == 0
    before = (tmp_path / "run" / LAST).read_bytes()
    room_for(training=12, calls=1)

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("common.saving.save_checkpoints", full)
    assert command(*line, "--resume", "--save-every", 1000) == 2
    assert "--tasks-at-once 12 fits; the run goes on from its last checkpoint" in capsys.readouterr().err
    assert (tmp_path / "run" / LAST).read_bytes() == before


def test_an_evaluation_names_a_value_that_fits(room_for, whole, tmp_path, capsys):
    room_for(predicting=11)
    line = ["--eval", "--load", whole / BEST, "--eval-tasks", 30, "--eval-steps", 1, "--out", tmp_path]
    assert command(*line) == 2
    said = capsys.readouterr().err
    assert said == (
        "main.py: error: out of memory in the evaluation with 30 tasks at once: --tasks-at-once 7 fits\n"
    )
    assert command(*line, "--tasks-at-once", 7) == 0


def test_a_shortage_before_the_first_iteration_is_said_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    def none(*_, **__):
        raise RuntimeError(
            "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"
        )

    for name, where in (("read_first", "while the data are read"), ("build", "before the first iteration")):
        with monkeypatch.context() as patch:
            patch.setattr(f"building.{name}", none)
            assert command(*SHORT, "--checkpoint-path", tmp_path / "new", "--run-name", "run") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"main.py: error: out of memory {where}: take ") and said.count("\n") == 1
    assert not (tmp_path / "new").exists()


# ---- the parts ------------------------------------------------------------------------------------


def real_errors():
    with pytest.raises(RuntimeError) as on_cpu:
        torch.empty(2**60)
    with pytest.raises(MemoryError) as of_numpy:
        np.empty(2**55)
    return [on_cpu.value, of_numpy.value]


def test_memory_errors_are_told_from_others():
    for error in (
        *real_errors(),
        MemoryError(),
        torch.OutOfMemoryError(CUDA),
        OSError(12, "Cannot allocate"),
    ):
        assert memory.ran_out(error), error
    for error in (RuntimeError("shapes differ"), OSError(28, "No space left"), ValueError("out of memory")):
        assert not memory.ran_out(error), error


def test_what_a_failed_computation_holds_is_given_back():
    seen = []

    def inner():
        tensor = torch.zeros(10)
        seen.append(weakref.ref(tensor))
        raise MemoryError

    def outer():
        other = torch.zeros(10)
        seen.append(weakref.ref(other))
        try:
            inner()
        except MemoryError as error:
            raise RuntimeError("out of memory") from error

    with pytest.raises(RuntimeError) as raised:
        outer()
    assert all(each() is not None for each in seen)
    memory.free(raised.value)
    assert all(each() is None for each in seen)


def test_the_first_of_the_halves_that_fits_is_taken():
    tried, cpu = [], torch.device("cpu")

    def attempt(number):
        tried.append(number)
        if number > 3:
            raise MemoryError

    assert memory.fitting(attempt, 25, cpu) == 3 and tried == [12, 6, 3]
    assert memory.fitting(attempt, 1, cpu) is None


def test_a_chunk_above_the_meta_batch_is_for_validations_and_leaves_the_iteration_whole():
    settled = config.resolve({"tasks_at_once": 50})
    assert settled.tasks_at_once == 50 and settled.meta_batch_size == 25
    from commands.members import compiles

    assert compiles(settled) and not compiles(config.resolve({"tasks_at_once": 5}))
