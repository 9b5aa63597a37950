"""Several processes compute what one does, print once, end together, and resume.

Starting processes takes seconds, so the same processes run a batch of command lines one after another.
Signals and kills go to separate jobs, started as a user starts them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import ROOT, write_classes
from hypothesis import given
from hypothesis import strategies as st
from runs import assert_same_bits, assert_same_run, command, curves

from common.processes import World
from training.checkpoint import Checkpoint, load_checkpoint
from training.folders import BEST, LAST

pytestmark = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in /proc")

# Run command lines from a JSON file in the same processes, with their rank for RANK; write codes and outputs.
BATCH = """
import functools, io, json, os, sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
sys.path.insert(0, {root!r})
import commands.build, main
from training.compiler import Compiler

commands.build.join = functools.cache(commands.build.join)
main.PATIENCE = 0.0
build, built = Compiler._build, []
Compiler._build = lambda self, *inputs: (built.append(inputs[-1].name), build(self, *inputs))[1]
lines, results = map(Path, sys.argv[1:])
rank = os.environ["RANK"]
outcomes = {{}}
for name, line in json.loads(lines.read_text()).items():
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main.main([part.replace("RANK", rank) for part in line])
    outcomes[name] = dict(code=code, out=out.getvalue(), err=err.getvalue(), built=list(built))
    built.clear()
(results / ("rank" + rank)).write_text(json.dumps(outcomes))
os._exit(0)
"""


def flags(text: str) -> list[str]:
    return text.split()


FIVE_TASKS = flags("--meta-batch-size 5 -k 5 --seed 3 --init torch --compile off --val-tasks 5")
SINUSOID = [*FIVE_TASKS, *flags("--iterations 60 --log-every 10 --val-every 20 --save-every 20")]
FLOAT64 = [*SINUSOID, "--precision", "float64"]
COMPILED = flags("--compile on --iterations 120 --log-every 10 --val-every 120")
DISTURBED = [*FIVE_TASKS, *flags("--iterations 400 --log-every 7 --val-every 100 --save-every 20")]
EVALUATION = flags("--eval-tasks 300 --eval-steps 2 -k 1-8")  # several chunks, which are shared out


# ---- helpers ---------------------------------------------------------------------------------------


def last(folder: Path, name: str) -> Checkpoint:
    return load_checkpoint(folder / name / LAST)


def assert_same_learning(a: Checkpoint, b: Checkpoint, within: float) -> None:
    """Compare weights, moments, statistics and curves of two runs to rounding."""
    assert a.iteration == b.iteration
    for part in ("parameters", "exp_avg", "exp_avg_sq", "statistics"):
        for name, theirs in getattr(b, part).items():
            ours = getattr(a, part)[name]
            assert (ours - theirs).norm() <= within * theirs.norm().clamp(min=1e-12), (part, name)
    assert a.progress["best_iteration"] == b.progress["best_iteration"]
    for curve in ("training", "validation"):
        for name, values in b.progress[curve].items():
            assert a.progress[curve][name] == pytest.approx(values, rel=max(within, 1e-7)), (curve, name)


def torchrun(processes: int, script: Path, arguments: list[object]) -> list[str]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc-per-node={processes}", str(script), *map(str, arguments)]


def start_job(line: list[str], log: Path, **environment: str) -> subprocess.Popen:
    """Start a job in a new session, without OMP_NUM_THREADS, which torchrun sets."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("ab") as out:
        return subprocess.Popen(
            line, stdout=out, stderr=subprocess.STDOUT, env=inherited | environment, start_new_session=True
        )


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


def find_workers(job: subprocess.Popen) -> dict[int, int]:
    """Return the living processes of a torchrun job, by rank."""
    workers = {}
    with suppress(OSError):  # one has just ended
        for pid in map(int, Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()):
            rank = re.search(rb"\0RANK=(\d+)", Path(f"/proc/{pid}/environ").read_bytes())
            if rank and is_alive(pid):
                workers[int(rank[1])] = pid
    return workers


def end_job(job: subprocess.Popen) -> None:
    for pid in [*find_workers(job).values(), job.pid]:
        if is_alive(pid):
            os.kill(pid, signal.SIGKILL)
    job.wait()


def run_job(line: list[str], log: Path, **environment: str) -> int:
    job = start_job(line, log, **environment)
    try:
        return job.wait(240)
    finally:
        end_job(job)


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def run_batch(folder: Path, processes: int, lines: dict[str, list[object]], **environment: str) -> list[dict]:
    """Run command lines in the same processes; return exit codes and outputs, by rank and name."""
    folder.mkdir()
    script, todo = folder / "batch.py", folder / "lines.json"
    script.write_text(BATCH.format(root=str(ROOT)))
    todo.write_text(json.dumps({name: [str(part) for part in line] for name, line in lines.items()}))
    log = folder / "log"
    code = run_job(torchrun(processes, script, [todo, folder]), log, **environment)
    assert code == 0, log.read_text(errors="replace")[-3000:]
    return [json.loads((folder / f"rank{rank}").read_text()) for rank in range(processes)]


# ---- runs that several tests share -----------------------------------------------------------------

# One iteration of plain descent at rate 1 moves the weights by the meta-gradient.
DESCENT = flags("--iterations 1 --meta-optimizer sgd --meta-lr 1 --precision float64 --compile off")
DESCENT += flags("--val-tasks 5")
GRADIENTS = {
    "maml": flags("--meta-batch-size 7 -s 2 --noise 0.1"),
    "sizes": flags("--meta-batch-size 5 -s 2 -k 1-6 -q 1-9"),
    "maml++": flags(
        "--image-size 14 --channels 1 --learner conv --learner-args channels=4 -n 3 -k 1 -q 2 "
        "--algorithm maml++ --meta-batch-size 5 -s 2 --msl-iterations 10"
    ),
}


def training(folder: Path, name: str, *options: object) -> list[object]:
    return [*options, "--checkpoint-path", folder, "--run-name", name]


def common_lines(folder: Path, processes: int) -> dict[str, list[object]]:
    """Return command lines with the same result for any number of processes."""
    images = {"maml++": ["--dataset", f"images:{folder / 'images'}"]}
    options = {name: [*DESCENT, *images.get(name, []), *line] for name, line in GRADIENTS.items()}
    options["float64"] = FLOAT64
    lines = {name: training(folder, f"{name}-{processes}", *line) for name, line in options.items()}
    evaluation = ["--eval", "--load", folder / "float64-1" / BEST, "--out", folder / f"eval-{processes}"]
    return lines | {"evaluation": [*evaluation, *EVALUATION]}


def stage_line(folder: Path, iterations: int) -> list[object]:
    """Return the command line that continues a run, with any number of processes."""
    return training(folder, "stages", *FLOAT64, "--iterations", iterations, "--resume")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """Return the folder of all runs, after those of one process."""
    folder = tmp_path_factory.mktemp("world")
    write_classes(folder / "images", 16, 5)
    for line in common_lines(folder, 1).values():
        assert command(*line) == 0
    return folder


@pytest.fixture(scope="module")
def pair(alone) -> list[dict]:
    """Return what two processes answered to a batch of command lines."""
    assert command(*stage_line(alone, 40)) == 0
    lines = {
        **common_lines(alone, 2),
        "stage": stage_line(alone, 60),
        "adapt": ["--adapt", alone, "--load", alone / "float64-1" / LAST],
        "tasks": training(alone / "new" / "er", "tasks", *SINUSOID, "--meta-batch-size", 1),
        "flag": training(alone / "new" / "er", "flag", "--meta-lr", "fast"),
        "differ": training(alone / "new" / "er", "differ", *SINUSOID, "--meta-lr", "1e-RANK"),
    }
    return run_batch(alone / "batch-2", 2, lines)


@given(count=st.integers(0, 10_000), size=st.integers(1, 64))
def test_the_shares_of_all_processes_are_the_whole_in_order_and_nearly_equal(count, size):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    lengths = [len(share) for share in shares]
    assert max(lengths) - min(lengths) <= 1


# ---- numbers ---------------------------------------------------------------------------------------


def assert_learned_as_one(folder: Path, processes: int) -> None:
    """Compare all runs of so many processes with those of one."""
    for name, within in {"maml": 1e-10, "sizes": 1e-10, "maml++": 1e-10, "float64": 1e-9}.items():
        assert_same_learning(last(folder, f"{name}-{processes}"), last(folder, f"{name}-1"), within)
    assert last(folder, "maml++-1").statistics


def test_two_processes_learn_what_one_does(pair, alone):
    assert_learned_as_one(alone, 2)
    assert curves(alone / "float64-2") == curves(alone / "float64-1")


def test_a_run_resumes_with_another_number_of_processes(pair, alone):
    assert "iteration 40" in pair[0]["stage"]["out"]
    assert_same_learning(last(alone, "stages"), last(alone, "float64-1"), 1e-9)


def test_two_processes_evaluate_as_one_does(pair, alone):
    ours, theirs = (json.loads(next((alone / f"eval-{n}").glob("*.json")).read_text()) for n in (2, 1))
    for part in ("per_step", "per_task", "sizes", "by_size", "settings"):
        assert ours[part] == theirs[part]


# ---- output ----------------------------------------------------------------------------------------


def test_only_the_first_process_prints_and_writes(pair, alone):
    for name, outcome in pair[1].items():
        assert (outcome["out"], outcome["err"]) == ("", ""), name
    assert all(pair[0][name]["out"] for name in common_lines(alone, 2))
    assert len(list((alone / "float64-2").glob("events*"))) == 1


def test_all_processes_refuse_a_mistake_and_one_prints_it(pair, alone):
    mistakes = {
        "tasks": "2 processes for a meta-batch of 1 tasks",
        "adapt": "are for one process",
        "flag": "--meta-lr",
        "differ": "error: process 1 has another meta_lr than process 0 (0.1 and 1.0)",
    }
    for name, message in mistakes.items():
        assert [outcomes[name]["code"] for outcomes in pair] == [2, 2]
        (line,) = pair[0][name]["err"].splitlines()
        assert line.startswith("main.py: error: ") and message in line
    assert not (alone / "new").exists()


# ---- more processes, compiled ----------------------------------------------------------------------


@pytest.mark.slow
def test_four_processes_learn_what_one_does(alone):
    run_batch(alone / "batch-4", 4, common_lines(alone, 4))
    assert_learned_as_one(alone, 4)


@pytest.mark.slow
def test_processes_compile_each_library_once_and_repeat_a_run_to_the_bit(tmp_path):
    lines = {name: training(tmp_path, name, *FLOAT64, *COMPILED) for name in ("first", "again")}
    outcomes = run_batch(tmp_path / "batch", 2, lines, XDG_CACHE_HOME=str(tmp_path / "cache"))
    built = [name for outcome in outcomes for name in outcome["first"]["built"]]
    assert len(built) == len(set(built)) == 3  # meta-gradients of two tasks and of three, and the update
    assert not any(outcome["again"]["built"] for outcome in outcomes)
    assert "Found compiled code" in outcomes[0]["again"]["err"]
    assert_same_bits(vars(last(tmp_path, "first")), vars(last(tmp_path, "again")))
    plain = training(tmp_path, "plain", *FLOAT64, *COMPILED, "--compile", "off")
    assert command(*plain) == 0
    assert_same_learning(last(tmp_path, "first"), last(tmp_path, "plain"), 1e-8)


# ---- stops and kills -------------------------------------------------------------------------------


def stop_once_saved(line: list[str], folder: Path, log: Path, stop: Callable) -> str:
    """Start a job, and call `stop(job, pids)` once it has saved; return its output."""
    file = folder / LAST
    begin = load_checkpoint(file).iteration if file.exists() else 0
    job = start_job(line, log)
    try:
        saved = wait_until(lambda: file.exists() and load_checkpoint(file).iteration > begin, 90)
        assert saved, log.read_text()
        assert job.poll() is None, log.read_text()
        pids = find_workers(job)
        assert len(pids) == 2
        stop(job, pids)
        assert job.wait(60) == 1  # torchrun's code, whatever its processes'
        assert wait_until(lambda: not any(map(is_alive, pids.values())), 5)
        return log.read_text(errors="replace")
    finally:
        end_job(job)


@pytest.mark.slow
def test_a_job_stopped_by_signals_and_kills_ends_with_the_bits_of_an_undisturbed_one(tmp_path):
    line = torchrun(2, ROOT / "main.py", training(tmp_path, "disturbed", *DISTURBED, "--resume"))
    stop = {
        "SIGTERM": lambda job, pids: os.kill(pids[1], signal.SIGTERM),
        "SIGINT": lambda job, pids: os.killpg(job.pid, signal.SIGINT),
        "SIGKILL": lambda job, pids: os.kill(pids[0], signal.SIGKILL),
    }
    for way, how in stop.items():
        text = stop_once_saved(line, tmp_path / "disturbed", tmp_path / way, how)
        iteration = last(tmp_path, "disturbed").iteration
        assert iteration < 400
        if way == "SIGKILL":
            (message,) = (part for part in text.splitlines() if "main.py: error: " in part)
            assert "another process of the job has ended" in message and "--resume" in message
        else:
            assert f"Saved at iteration {iteration:,}. Resume: torchrun --nproc-per-node=2 main.py" in text
            assert "another process of the job has ended" not in text
    assert run_job(line, tmp_path / "end") == 0
    undisturbed = torchrun(2, ROOT / "main.py", training(tmp_path, "undisturbed", *DISTURBED))
    assert run_job(undisturbed, tmp_path / "undisturbed.log") == 0
    assert_same_run(tmp_path / "disturbed", tmp_path / "undisturbed")
