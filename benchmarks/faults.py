"""Kills one process of a torchrun job again and again, and compares what comes of it with an undisturbed run.

    python benchmarks/faults.py                          # 20 kills, the same command with --resume after each
    python benchmarks/faults.py --restarts-by-torchrun   # 20 kills, torchrun --max-restarts starts again
    python benchmarks/faults.py --kills 2 --iterations 300 --save-every 30 --val-every 60    # in a minute

Each kill (SIGKILL, of a process drawn at random) hits one of five stages of a run, all of them equally
often: its start, training, the writing of last.pt, validation, and the end. After each, every process of the
job must end within --bound seconds, and last.pt must load. A run that has got through to its end must be the
undisturbed one to the bit: weights, optimizer, progress, and the points of all curves. Writes
benchmarks/results/faults.json; Linux, since it looks for processes in /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from checkpoint import BEST, LAST, load_checkpoint  # noqa: E402

STAGES = ("start", "training", "saving", "validating", "end")
SPEED = "speed/iterations_per_second"  # the one curve that no two runs share
POLL = 0.0005  # seconds; a checkpoint is written in a few thousandths


# ---- jobs ----------------------------------------------------------------------------------------


def torchrun(processes: int, script: Path, arguments: Sequence[object], *options: str) -> list[str]:
    """The command line of a job on this machine, as a user types it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", *options]
    return [*launcher, f"--nproc-per-node={processes}", str(script), *map(str, arguments)]


def started(line: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """A job, in a session of its own; OMP_NUM_THREADS is torchrun's to set."""
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("ab") as out:
        return subprocess.Popen(
            line, stdout=out, stderr=subprocess.STDOUT, env=inherited | environment, start_new_session=True
        )


def workers(job: subprocess.Popen[bytes]) -> dict[int, int]:
    """The processes of a job that live, by rank."""
    found = {}
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    try:
        pids = [int(pid) for pid in children.read_text().split()]
    except OSError:  # it has ended
        return {}
    for pid in pids:
        try:
            environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        except OSError:
            continue
        ranks = [int(part[5:]) for part in environment if part.startswith(b"RANK=")]
        if ranks and alive(pid):
            found[ranks[0]] = pid
    return found


def alive(pid: int) -> bool:
    """Whether a process runs: neither gone nor a zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in ("Z", "X")


def wait_until(condition: Callable[[], object], seconds: float) -> bool:
    """Whether it became true within so many seconds."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            return False
        time.sleep(POLL)
    return True


# ---- what a run has left behind --------------------------------------------------------------------


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """All points of the scalar curves, as TensorBoard's own reader sees them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def same(a: object, b: object) -> bool:
    """To the bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def differences(run: Path, undisturbed: Path) -> list[str]:
    """What two runs differ in; none where the one is the other to the bit."""
    found = []
    for name in (LAST, BEST):
        ours, theirs = (vars(load_checkpoint(folder / name)) for folder in (run, undisturbed))
        found += [f"{name}: {part}" for part in ours if not same(ours[part], theirs[part])]
    ours, theirs = curves(run), curves(undisturbed)
    for tag in sorted(ours.keys() | theirs.keys()):
        a, b = ours.get(tag, []), theirs.get(tag, [])
        if [step for step, _ in a] != [step for step, _ in b]:
            found.append(f"iterations of {tag}")
        elif tag != SPEED and a != b:
            found.append(f"values of {tag}")
    for name in ("training.json", "training.png", "examples.png"):
        if not (run / name).exists():
            found.append(f"no {name}")
        elif (run / name).read_bytes() != (undisturbed / name).read_bytes():
            found.append(name)
    left = [path.name for path in run.iterdir() if path.name.startswith(".")]
    return found + [f"{name} left behind" for name in left]


# ---- kills -------------------------------------------------------------------------------------------


@dataclass
class Kill:
    """One of them, and what came of it."""

    run: int
    stage: str
    rank: int
    seconds: float  # after the start of the process
    iteration: int | None  # of last.pt afterwards; None: there was none yet
    until_ended: float  # seconds until no process of the job was left, or the next ones had been started
    problem: str | None = None


class Job:
    """A job of a run's command line, and a way to kill one of its processes at a stage."""

    def __init__(self, given: argparse.Namespace, name: str, *options: str) -> None:
        self.folder = given.folder / name
        flags = [
            *("--iterations", given.iterations, "--save-every", given.save_every),
            *("--val-every", given.val_every, "--log-every", given.log_every, "--compile", "off"),
            *("--checkpoint-path", given.folder, "--run-name", name, "--resume"),
        ]
        given.folder.mkdir(parents=True, exist_ok=True)
        self.log = given.folder / f"{name}.log"
        self.job = started(torchrun(given.processes, ROOT / "main.py", flags, *options), self.log)
        self.begin = time.monotonic()

    def kill(self, stage: str, draw: random.Random, start: float, bound: float) -> tuple[int, float] | None:
        """Kills a process at a moment of the stage; its rank and the seconds since the start, or None where
        the job ended first. `start`: seconds that a run takes before its first iteration."""
        if not self._reached(stage, draw, start, bound):
            return None
        living = workers(self.job)
        if not living:
            return None
        rank = draw.choice(sorted(living))
        os.kill(living[rank], signal.SIGKILL)
        return rank, time.monotonic() - self.begin

    def _reached(self, stage: str, draw: random.Random, start: float, bound: float) -> bool:
        """Waits for a moment of the stage; False where the job ended first."""
        if stage == "start":
            time.sleep(draw.uniform(0, start))
            return wait_until(lambda: self._ended() or workers(self.job), bound) and not self._ended()
        if not wait_until(lambda: self._ended() or self._training(), bound):
            return False
        if stage == "training":
            time.sleep(draw.uniform(0, 3))
            return not self._ended()
        names = {
            "saving": f".{LAST}.tmp",
            "validating": draw.choice([f".{BEST}.tmp", ".examples.png.tmp"]),
            "end": draw.choice([".training.json.tmp", "training.json", "training.png"]),
        }
        # of the many times that last.pt is written, one of the next few
        for _ in range(draw.choice([1, 2, 3]) if stage == "saving" else 1):
            sign = self.folder / names[stage]
            self._wait_for(sign, there=False, seconds=5)
            self._wait_for(sign, there=True, seconds=600)
        return not self._ended()

    def _wait_for(self, sign: Path, *, there: bool, seconds: float) -> None:
        wait_until(lambda: sign.exists() == there or self._ended(), seconds)

    def _training(self) -> bool:
        """Whether this attempt has told where it trains."""
        text = self.log.read_bytes()[self.read :]
        return b"Meta-training in" in text or b"Going on from" in text

    read = 0  # bytes of the log that earlier attempts wrote

    def _ended(self) -> bool:
        return self.job.poll() is not None

    def last(self) -> int | None:
        """The iteration of last.pt; raises UsageError where it does not load."""
        file = self.folder / LAST
        return load_checkpoint(file).iteration if file.exists() else None

    def wait(self, seconds: float) -> str | None:
        """Until the job has ended; what is wrong, if it does not, which ends it."""
        pids = [self.job.pid, *workers(self.job).values()]
        if wait_until(lambda: self._ended() and not any(map(alive, pids)), seconds):
            return None
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        self.job.wait()
        return f"a process did not end within {seconds:g} s"


def stages_of(kills: int, draw: random.Random) -> list[str]:
    """As many, all equally often, in any order."""
    stages = [STAGES[number % len(STAGES)] for number in range(kills)]
    draw.shuffle(stages)
    return stages


def last_or_problem(job: Job) -> tuple[int | None, str | None]:
    try:
        return job.last(), None
    except Exception as error:  # any at all would be the finding
        return None, f"{LAST}: {error}"


def killed_runs(
    given: argparse.Namespace, start: float, draw: random.Random, undisturbed: Path
) -> tuple[list[Kill], list[dict[str, Any]]]:
    """Kills until all kills are spent, run by run; the kills, and the runs with what is wrong with them."""
    kills: list[Kill] = []
    runs: list[dict[str, Any]] = []
    stages = stages_of(given.kills, draw)
    options = [f"--max-restarts={given.kills}"] if given.restarts_by_torchrun else []
    job = None
    while True:
        number = len(runs) + 1
        if job is None or not given.restarts_by_torchrun:
            job = Job(given, f"{variant(given)}-{number}", *options)
        before = workers(job.job)
        hit = job.kill(stages[0], draw, start, given.bound) if stages else None
        if hit is not None:
            rank, seconds = hit
            killed = time.monotonic()
            problem = next_attempt(job, before, given) if options else job.wait(given.bound)
            took = time.monotonic() - killed
            iteration, damage = last_or_problem(job)
            kills.append(Kill(number, stages.pop(0), rank, seconds, iteration, took, problem or damage))
            print(describe(kills[-1]), flush=True)
            continue
        problem = job.wait(600)
        code = job.job.returncode
        failed = [problem or f"exit code {code}"] if problem or code else []
        found = failed or differences(job.folder, undisturbed)
        of_run = sum(kill.run == number for kill in kills)
        runs.append({"run": number, "kills": of_run, "differences": found})
        print(f"run {number}, killed {of_run} times: {', '.join(found) or 'the undisturbed run to the bit'}")
        job = None
        if not stages:
            return kills, runs
        if len(runs) > 2 * given.kills + 5:
            raise RuntimeError("the runs end before they can be killed: take more --iterations")


def next_attempt(job: Job, before: dict[int, int], given: argparse.Namespace) -> str | None:
    """Waits until torchrun has started all processes anew; what is wrong, if it does not."""
    old = before or workers(job.job)

    def anew() -> bool:
        now = workers(job.job)
        return len(now) == given.processes and not set(now.values()) & set(old.values())

    if not wait_until(lambda: job.job.poll() is not None or anew(), given.bound):
        return f"not started again within {given.bound:g} s"
    job.read = job.log.stat().st_size
    job.begin = time.monotonic()
    return None


# ---- the report --------------------------------------------------------------------------------------


def variant(given: argparse.Namespace) -> str:
    return "restarts-by-torchrun" if given.restarts_by_torchrun else "restarts-by-hand"


def describe(kill: Kill) -> str:
    at = "no checkpoint yet" if kill.iteration is None else f"last.pt at iteration {kill.iteration:,}"
    outcome = kill.problem or f"{kill.until_ended:.1f} s until it was over, {at}"
    return f"run {kill.run}, {kill.stage}, {kill.seconds:.1f} s after the start, rank {kill.rank}: {outcome}"


def table(kills: Sequence[Kill]) -> str:
    lines = ["| stage | kills | of rank 0 | longest until it was over | problems |", "|-|-|-|-|-|"]
    for stage in STAGES:
        of_stage = [kill for kill in kills if kill.stage == stage]
        if of_stage:
            longest = max(kill.until_ended for kill in of_stage)
            first, bad = (sum(map(bool, found)) for found in (
                [kill.rank == 0 for kill in of_stage], [kill.problem for kill in of_stage]
            ))  # fmt: skip
            lines.append(f"| {stage} | {len(of_stage)} | {first} | {longest:.1f} s | {bad} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when (default: 0)")
    parser.add_argument("--restarts-by-torchrun", action="store_true", help="torchrun --max-restarts")
    parser.add_argument("--iterations", type=int, default=2000)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--val-every", type=int, default=250)
    parser.add_argument("--log-every", type=int, default=70)
    parser.add_argument("--bound", type=float, default=60.0, help="seconds for all to end (default: 60)")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "faults")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    return parser.parse_args()


def main() -> int:
    given = parse()
    if given.folder.exists():
        shutil.rmtree(given.folder)
    draw = random.Random(given.seed)
    begin = time.monotonic()
    whole = Job(given, "undisturbed")
    wait_until(lambda: whole._ended() or whole._training(), 600)
    start = time.monotonic() - begin
    problem = whole.wait(600)
    if problem or whole.job.returncode:
        raise RuntimeError(problem or whole.log.read_text(errors="replace")[-1000:])
    seconds = time.monotonic() - begin
    print(f"undisturbed: {seconds:.1f} s, of which {start:.1f} s until the first iteration", flush=True)
    kills, runs = killed_runs(given, start, draw, whole.folder)
    print(table(kills))
    wrong = sum(bool(run["differences"]) for run in runs)
    print(f"{len(runs)} runs went to their end; {wrong} of them differ from the undisturbed one")
    names = ("kills", "processes", "seed", "iterations", "save_every", "val_every", "log_every", "bound")
    result = {
        "settings": {name: getattr(given, name) for name in names} | {"torch": torch.__version__},
        "seconds_undisturbed": round(seconds, 1),
        "kills": [asdict(kill) for kill in kills],
        "runs": runs,
    }
    results = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.write_text(json.dumps(results | {variant(given): result}, indent=1) + "\n")
    print(f"Written: {given.out}")
    return int(bool(wrong) or any(kill.problem for kill in kills))


if __name__ == "__main__":
    sys.exit(main())
