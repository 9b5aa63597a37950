"""Several processes: what torchrun starts computes what one process does, ends together, and goes on.

Numbers are compared over batches of command lines, which the same processes run one after another, since to
start one takes seconds. Signals and kills are for jobs of their own, started as a user starts them.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from faults import alive, started, torchrun, wait_until, workers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_runs import assert_same_bits, assert_same_run, command, curves

from commands import build as building
from commands import config
from common.processes import World
from training.checkpoint import BEST, LAST, Checkpoint, load_checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")

# Runs command lines, given as JSON, in processes that stay together; writes what each returned and said.
BATCH = """
import functools, io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
sys.path.insert(0, {root!r})
import compiler, errors, main, world

leave, world.leave = world.leave, lambda: None
world.join = functools.cache(world.join)
main.BEFORE_MEETING = errors.AgreedError.seconds = 0.0
build = compiler.Compiler._build
built = []
compiler.Compiler._build = lambda self, *given: (built.append(given[-1].name), build(self, *given))[1]
lines, results = map(Path, sys.argv[1:])
found = {{}}
for name, line in json.loads(lines.read_text()).items():
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main.main(line)
    found[name] = dict(code=code, out=out.getvalue(), err=err.getvalue(), built=list(built))
    built.clear()
leave()
(results / ("rank" + os.environ["RANK"])).write_text(json.dumps(found))
main.end(0)
"""


def flags(text: str) -> list[str]:
    return text.split()


FIVE_TASKS = flags("--meta-batch-size 5 -k 5 --seed 3 --init torch --compile off")
SINUSOID = [*FIVE_TASKS, *flags("--iterations 200 --log-every 20 --val-every 50 --save-every 40")]
FLOAT64 = [*SINUSOID, "--precision", "float64"]
STAGES = (50, 150, 200)  # of a run that goes on with other numbers of processes
CLIPS = flags("--grad-clip 0.02 --grad-clip-norm 0.1")
COMPILED = flags("--compile on --compile-after 5 --iterations 30 --log-every 10 --val-every 30")
DISTURBED = [*FIVE_TASKS, *flags("--iterations 400 --log-every 7 --val-every 100 --save-every 20")]

# One iteration of plain descent with rate 1: it moves the weights by the meta-gradient.
DESCENT = flags("--iterations 1 --meta-optimizer sgd --meta-lr 1 --precision float64 --compile off")
IMAGES = flags("--image-size 14 --channels 1 --learner conv --learner-args channels=4 -n 3 -k 1 -q 2")
GRADIENTS = {
    "regression": flags("--meta-batch-size 7 -s 2 --noise 0.1"),
    "classification": [*IMAGES, *flags("--meta-batch-size 5 --inner-lr 0.4")],
    "maml++": [*IMAGES, *flags("--algorithm maml++ --meta-batch-size 5 -s 2 --msl-iterations 10")],
}
EVALUATION = flags("--eval-tasks 500 --eval-steps 2")  # several chunks, which are shared out


# ---- helpers ---------------------------------------------------------------------------------------


def numbers_of(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All that a run has learned, by name."""
    state = checkpoint.optimizer["state"]
    moments = {f"{key} {number}": state[number][key] for number in state for key in ("exp_avg", "exp_avg_sq")}
    return checkpoint.parameters | checkpoint.statistics | moments


def distance(a: Checkpoint, b: Checkpoint) -> float:
    """How far two runs are apart: of each tensor the norm of the difference over the norm; the largest."""
    ours, theirs = numbers_of(a), numbers_of(b)
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].double(), theirs[name].double()) for name in ours]
    return max(((x - y).norm() / y.norm().clamp(min=1e-12)).item() for x, y in pairs)


def last(folder: Path, name: str) -> Checkpoint:
    return load_checkpoint(folder / name / LAST)


def assert_same_learning(a: Checkpoint, b: Checkpoint, within: float) -> None:
    """Weights, moments and curves of the two are the same but for rounding."""
    assert a.iteration == b.iteration
    assert distance(a, b) < within
    assert a.progress["best_iteration"] == b.progress["best_iteration"]
    for curve in ("training", "validation"):
        for name, values in b.progress[curve].items():
            assert a.progress[curve][name] == pytest.approx(values, rel=within, abs=within), (curve, name)


def run_job(line: list[str], log: Path, seconds: float = 240, **environment: str) -> int:
    """Starts a job, and waits for its exit code."""
    job = started(line, log, **environment)
    try:
        return job.wait(seconds)
    finally:
        end(job)


def end(job: subprocess.Popen) -> None:
    for pid in [job.pid, *workers(job).values()]:
        if alive(pid):
            os.kill(pid, signal.SIGKILL)
    job.wait()


def batch(folder: Path, processes: int, lines: dict[str, list[object]], **environment: str) -> list[dict]:
    """Runs command lines in so many processes; what each of these had to say, by rank and name."""
    folder.mkdir()
    script, todo = folder / "batch.py", folder / "lines.json"
    script.write_text(BATCH.format(root=str(ROOT)))
    todo.write_text(json.dumps({name: [str(part) for part in line] for name, line in lines.items()}))
    log = folder / "log"
    code = run_job(torchrun(processes, script, [todo, folder]), log, **environment)
    assert code == 0, log.read_text(errors="replace")[-3000:]
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(processes)]


def said_once(found: list[dict], name: str, message: str) -> None:
    """All processes refused a command line, and the first has said so in one line."""
    assert [each[name]["code"] for each in found] == [2] * len(found)
    (line,) = found[0][name]["err"].splitlines()
    assert line.startswith("main.py: error: ") and message in line
    assert all(not each[name]["err"] and not each[name]["out"] for each in found[1:])
    assert not found[0][name]["out"]


# ---- runs that several tests look at -----------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds all runs, and a folder of images."""
    folder = tmp_path_factory.mktemp("world")
    draw = np.random.default_rng(0)
    for number in range(16):
        (folder / "images" / f"class{number:02}").mkdir(parents=True)
        for drawing in range(5):
            pixels = draw.integers(0, 256, (14, 14), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"class{number:02}" / f"{drawing}.png")
    return folder


def training(folder: Path, name: str, *own: object) -> list[object]:
    return [*own, "--checkpoint-path", folder, "--run-name", name]


def gradient_lines(folder: Path, processes: int) -> dict[str, list[object]]:
    lines = {}
    for case, own in GRADIENTS.items():
        data = [] if case == "regression" else ["--dataset", f"images:{folder / 'images'}"]
        lines[f"{case}-{processes}"] = training(folder, f"{case}-{processes}", *DESCENT, *data, *own)
    return lines


def sinusoid_lines(folder: Path, processes: int) -> dict[str, list[object]]:
    return {
        f"{precision}-{processes}": training(
            folder, f"{precision}-{processes}", *SINUSOID, "--precision", precision
        )
        for precision in ("float64", "float32")
    }


def stage_line(folder: Path, stage: int) -> list[object]:
    """A run's next part; the same for any number of processes."""
    return training(folder, "stages", *FLOAT64, "--iterations", STAGES[stage], "--resume")


def settings_of(line: list[object]) -> tuple[config.Config, config.Invocation]:
    given_flags = config.parse([str(part) for part in line])
    return config.resolve(given_flags), config.check_invocation(given_flags)


def evaluation_line(folder: Path, processes: int) -> list[object]:
    file, out = folder / "float32-1" / BEST, folder / f"eval-{processes}"
    return ["--eval", "--load", file, "--out", out, *EVALUATION]


@pytest.fixture(scope="module")
def alone(folder) -> Path:
    """The folder, with the runs of one process."""
    lines = {
        **gradient_lines(folder, 1),
        **sinusoid_lines(folder, 1),
        "clipped": training(folder, "clipped", *FLOAT64, *CLIPS),
        "uncompiled": training(folder, "uncompiled", *FLOAT64, *COMPILED, "--compile", "off"),
        "evaluation": evaluation_line(folder, 1),
    }
    assert [command(*line) for line in lines.values()] == [0] * len(lines)
    return folder


@pytest.fixture(scope="module")
def pair(alone) -> list[dict]:
    """What two processes said to a batch of command lines."""
    folder = alone
    lines = {
        **gradient_lines(folder, 2),
        **sinusoid_lines(folder, 2),
        "again": training(folder, "again", *SINUSOID, "--precision", "float32"),
        "undisturbed": training(folder, "undisturbed", *DISTURBED),
        "shard": training(folder, "shard", *FLOAT64, "--iterations", 150, "--shard"),
        "shard-clipped": training(folder, "shard-clipped", *FLOAT64, *CLIPS, "--shard"),
        "stage": stage_line(folder, 0),
        "evaluation": evaluation_line(folder, 2),
        "adapt": ["--adapt", folder / "images", "--load", folder / "classification-1" / LAST],
        "tasks": training(folder / "new" / "er", "tasks", *SINUSOID, "--meta-batch-size", 1),
        "flag": training(folder / "new" / "er", "flag", "--meta-lr", "fast"),
    }
    return batch(folder / "batch-2", 2, lines)


@pytest.fixture(scope="module")
def three(pair, folder) -> list[dict]:
    """What three processes said, after one has gone on with what two had begun."""
    assert command(*stage_line(folder, 1)) == 0
    lines = {
        "stage": stage_line(folder, 2),
        "shard": ["--load", folder / "shard" / LAST, "--iterations", 200],
        "evaluation": evaluation_line(folder, 3),
    }
    return batch(folder / "batch-3", 3, lines)


@pytest.fixture(scope="module")
def four(folder, alone) -> list[dict]:
    return batch(folder / "batch-4", 4, gradient_lines(folder, 4) | sinusoid_lines(folder, 4))


@pytest.fixture(scope="module")
def compiled(folder) -> list[dict]:
    """What two processes said that compiled a run twice, with an empty cache in the beginning."""
    lines = {name: training(folder, name, *FLOAT64, *COMPILED) for name in ("compiled", "compiled-again")}
    return batch(folder / "batch-compiled", 2, lines, XDG_CACHE_HOME=str(folder / "cache"))


# ---- shares ----------------------------------------------------------------------------------------


@given(count=st.integers(0, 10_000), size=st.integers(1, 64))
def test_the_shares_of_all_processes_are_the_whole_in_order_and_of_nearly_one_size(count, size):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("case", ["regression", "classification"])
def test_the_tasks_of_all_processes_are_those_of_one_to_the_bit(case, size, folder):
    settings, call = settings_of(gradient_lines(folder, 1)[f"{case}-1"])
    distribution = building.tasks_of(settings, call, building.prepare(settings, call))
    whole = distribution.sample("train", 3, 11, range(7))
    parts = [distribution.sample("train", 3, 11, World(rank, size).share(7)) for rank in range(size)]
    for field in whole._fields:
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(whole, field))
    assert not torch.equal(whole.query_x[0], whole.query_x[1])


# ---- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", GRADIENTS)
def test_processes_get_the_meta_gradient_of_one(case, processes, alone, request):
    request.getfixturevalue({2: "pair", 4: "four"}[processes])
    one, several = (last(alone, f"{case}-{number}") for number in (1, processes))
    settings, call = settings_of(gradient_lines(alone, 1)[f"{case}-1"])
    _, maml = building.build(settings, call, building.prepare(settings, call))
    initial = maml.initial_parameters(settings.seed)
    for name, start in initial.items():
        expected, found = (start - end.parameters[name] for end in (one, several))
        assert expected.dtype == torch.float64
        assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10 * expected.abs().max().item()), name
    moved = max((one.parameters[name] - start).abs().max().item() for name, start in initial.items())
    assert moved > 1e-3
    for name, statistics in one.statistics.items():
        assert torch.allclose(several.statistics[name], statistics, rtol=1e-10, atol=1e-12), name
    assert bool(one.statistics) == (case == "maml++")
    losses = [end.progress["training"]["query_loss"] for end in (one, several)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-10)


@pytest.mark.parametrize(("precision", "within"), [("float64", 1e-8), ("float32", 1e-5)])
@pytest.mark.parametrize("processes", [2, 4])
def test_processes_learn_what_one_does(processes, precision, within, alone, request):
    request.getfixturevalue({2: "pair", 4: "four"}[processes])
    one, several = (last(alone, f"{precision}-{number}") for number in (1, processes))
    assert several.iteration == 200 and len(several.progress["validation"]["iteration"]) == 4
    assert_same_learning(several, one, within)
    assert curves(alone / f"{precision}-{processes}") == curves(alone / f"{precision}-1")


def test_two_runs_of_as_many_processes_have_the_same_bits(pair, folder):
    assert_same_run(folder / "float32-2", folder / "again")


def test_compiled_processes_learn_what_uncompiled_ones_do_and_repeat_it_to_the_bit(compiled, alone):
    first, again, plain = (last(alone, name) for name in ("compiled", "compiled-again", "uncompiled"))
    assert first.config.compile == "on" and plain.config.compile == "off"
    assert distance(first, plain) < 1e-8
    assert_same_bits(vars(first), vars(again))


def test_processes_compile_a_library_once_each(compiled, folder):
    built = [name for each in compiled for name in each["compiled"]["built"]]
    assert len(built) == len(set(built)) == 3  # meta-gradients of two tasks and of three, and the update
    libraries = folder / "cache" / "maml" / "compiled"
    assert {path.name for path in libraries.glob("*.pt2")} == set(built)
    assert "Compiled in" in compiled[0]["compiled"]["err"]
    assert not any(each["compiled-again"]["built"] for each in compiled)
    assert "Found compiled code" in compiled[0]["compiled-again"]["err"]


def test_a_split_optimizer_learns_what_a_whole_one_does(pair, alone):
    assert_same_learning(last(alone, "shard-clipped"), last(alone, "clipped"), 1e-8)
    assert distance(last(alone, "clipped"), last(alone, "float64-1")) > 1e-3  # there was something to clip


def test_a_split_optimizers_checkpoint_goes_on_unsplit_in_other_processes(three, alone):
    assert "Going on from iteration 150" in three[0]["shard"]["out"]
    assert_same_learning(last(alone, "shard"), last(alone, "float64-1"), 1e-8)


def test_a_run_goes_on_with_other_numbers_of_processes(three, alone):
    assert "Going on from iteration 150" in three[0]["stage"]["out"]
    assert_same_learning(last(alone, "stages"), last(alone, "float64-1"), 1e-8)
    assert curves(alone / "stages") == curves(alone / "float64-1")


def test_evaluation_by_several_processes_writes_what_one_does(pair, three, alone):
    records = []
    for processes in (1, 2, 3):
        (file,) = (alone / f"eval-{processes}").glob("*.json")
        records.append(json.loads(file.read_text()))
        assert len(list((alone / f"eval-{processes}").iterdir())) == 3  # and two pictures
    for record in records[1:]:
        for part in ("per_step", "per_task", "settings"):
            assert record[part] == records[0][part]
        assert record.keys() == records[0].keys()
    assert [row["steps"] for row in records[0]["per_step"]] == [0, 1, 2]
    for found in (pair, three):
        first, *others = (each["evaluation"] for each in found)
        assert first["code"] == 0 and first["out"].count("95 % interval") == 1
        assert not any(other["out"] for other in others)


def test_the_first_process_alone_speaks_and_writes(pair, folder):
    worked = [name for name, found in pair[0].items() if found["code"] == 0]
    assert len(worked) == len(pair[0]) - 3  # which are refused
    for name in worked:
        assert pair[1][name] | {"built": []} == {"code": 0, "out": "", "err": "", "built": []}, name
    assert len(list((folder / "float64-2").glob("events*"))) == 1
    assert not [path for path in (folder / "float64-2").iterdir() if path.name.startswith(".")]


# ---- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tasks", "2 processes for a meta-batch of 1 tasks"),
        ("adapt", "--adapt is for one process"),
        ("flag", "--meta-lr"),
    ],
)
def test_what_one_process_refuses_all_do_and_one_says_so(name, message, pair, folder):
    said_once(pair, name, message)
    assert not (folder / "new").exists()
    assert not list((folder / "classification-1").glob("*adapted*"))


def test_a_refused_job_says_one_line_and_leaves_nothing_behind(tmp_path):
    line = torchrun(2, ROOT / "main.py", training(tmp_path / "runs", "no", "--meta-lr", "fast"))
    assert run_job(line, tmp_path / "log") == 1
    ours = [part for part in (tmp_path / "log").read_text().splitlines() if "main.py: " in part]
    assert len(ours) == 1 and ours[0].startswith("main.py: error: ") and "--meta-lr" in ours[0]
    assert not (tmp_path / "runs").exists()


def test_processes_with_different_flags_refuse_to_begin(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    where = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    jobs = []
    for rank, rate in enumerate((0.001, 0.002)):
        own = training(tmp_path / "runs", "run", *SINUSOID, "--meta-lr", rate)
        line = [sys.executable, str(ROOT / "main.py"), *map(str, own)]
        jobs.append(started(line, tmp_path / str(rank), **where, RANK=str(rank), LOCAL_RANK=str(rank)))
    try:
        assert [job.wait(60) for job in jobs] == [2, 2]
    finally:
        for job in jobs:
            end(job)
    (said,) = (tmp_path / "0").read_text().splitlines()
    assert said.startswith("main.py: error: process 1 has another --meta-lr than process 0 (0.002 and 0.001)")
    assert not (tmp_path / "1").read_text()
    assert not (tmp_path / "runs").exists()


FAILING = """
import os

import torch


class Failing:
    calls = 0

    def sample(self, split, seeds):
        self.calls += 1
        if os.environ["RANK"] == "1" and self.calls > 9:
            raise ValueError("no more")
        x = torch.zeros(len(seeds), 4, 1) + seeds[:, None, None] % 7
        return x, x, x, x
"""


def test_what_fails_in_one_process_alone_is_said_by_that_one(tmp_path):
    (tmp_path / "failing.py").write_text(FAILING)
    own = [*SINUSOID, "--dataset", f"{tmp_path / 'failing.py'}:Failing"]
    line = torchrun(2, ROOT / "main.py", training(tmp_path / "runs", "run", *own))
    assert run_job(line, tmp_path / "log") == 1
    assert "main.py: error: process 1: " in (tmp_path / "log").read_text()
    assert "no more" in (tmp_path / "log").read_text()


# ---- stops and kills -------------------------------------------------------------------------------


class Disturbed:
    """A run that is stopped again and again, and goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.file, self.number = folder, folder / "disturbed" / LAST, 0

    def line(self) -> list[str]:
        return torchrun(2, ROOT / "main.py", training(self.folder, "disturbed", *DISTURBED, "--resume"))

    def iteration(self) -> int:
        return load_checkpoint(self.file).iteration if self.file.exists() else 0

    def stopped(self, stop) -> str:
        """Starts it, and stops it by `stop(job, pids)` once it has saved; what it said."""
        self.number += 1
        log, begin = self.folder / f"log{self.number}", self.iteration()
        job = started(self.line(), log)
        try:
            assert wait_until(lambda: self.iteration() > begin or job.poll() is not None, 60)
            assert job.poll() is None, log.read_text()
            pids = workers(job)
            assert len(pids) == 2
            stop(job, pids)
            assert job.wait(30) == 1  # torchrun's code, whatever its processes'
            assert wait_until(lambda: not any(map(alive, pids.values())), 5)
            return log.read_text(errors="replace")
        finally:
            end(job)


@pytest.fixture(scope="module")
def disturbed(tmp_path_factory) -> dict[str, tuple[str, int]]:
    """What a job said when it was stopped in three ways, and at which iteration it then was; also its folder,
    in which it has then come to its end."""
    run = Disturbed(tmp_path_factory.mktemp("disturbed"))
    ways = {
        "SIGTERM": lambda job, pids: os.kill(pids[1], signal.SIGTERM),
        "SIGINT": lambda job, pids: os.killpg(job.pid, signal.SIGINT),
        "SIGKILL": lambda job, pids: os.kill(pids[0], signal.SIGKILL),
    }
    found = {name: (run.stopped(stop), run.iteration()) for name, stop in ways.items()}
    assert run.iteration() < 400
    assert run_job(run.line(), run.folder / "log-to-the-end") == 0
    return found | {"folder": run.file.parent}


@pytest.mark.parametrize(("way", "code"), [("SIGTERM", 128 + signal.SIGTERM), ("SIGINT", None)])
def test_a_signal_to_one_process_ends_all_at_the_same_iteration_saved(way, code, disturbed):
    said, iteration = disturbed[way]
    assert f"Saved at iteration {iteration:,}. Go on: torchrun --nproc-per-node=2 main.py --load" in said
    assert "another process of the job has ended" not in said
    assert code is None or said.count(f"exitcode  : {code} ") == 2  # in torchrun's report


def test_where_a_process_is_killed_the_others_end_and_say_so(disturbed):
    said, _ = disturbed["SIGKILL"]
    lines = [line for line in said.splitlines() if "main.py: error: " in line]
    assert len(lines) == 1 and "another process of the job has ended" in lines[0] and "--resume" in lines[0]


def test_a_run_stopped_in_all_ways_ends_with_the_bits_of_an_undisturbed_one(disturbed, pair, folder):
    assert_same_run(disturbed["folder"], folder / "undisturbed")
    assert curves(disturbed["folder"]) == curves(folder / "undisturbed")
    assert len(list(disturbed["folder"].glob("events*"))) == 4


@pytest.mark.parametrize(("kills", "way"), [(2, "by-hand"), (1, "by-torchrun")])
def test_kills_at_random_moments_leave_no_trace(kills, way, tmp_path):
    """tests/faults.py, in short; torchrun may start again as often as it is killed, and no more."""
    own = flags(f"--kills {kills} --seed 0 --iterations 200 --save-every 20 --val-every 40 --log-every 7")
    line = [sys.executable, str(ROOT / "tests" / "faults.py"), "--processes", "2", *own]
    where = ["--folder", str(tmp_path / "runs"), "--out", str(tmp_path / "faults.json")]
    where += ["--restarts-by-torchrun"] * (way == "by-torchrun")
    assert run_job([*line, *where], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    found = json.loads((tmp_path / "faults.json").read_text())[f"restarts-{way}"]
    assert len(found["kills"]) == kills and not any(kill["problem"] for kill in found["kills"])
    assert found["runs"] and not any(run["differences"] for run in found["runs"])
