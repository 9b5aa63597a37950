"""Kills runs of main.py again and again, at random moments, and compares their ends with undisturbed runs.

    python tests/faults.py                             # 200 kills of runs of one process
    python tests/faults.py --resume                    # goes on with that, where it was left
    python tests/faults.py --processes 2 --kills 20    # of one process of a torchrun job
    python tests/faults.py --processes 2 --kills 20 --restarts-by-torchrun    # started again by torchrun

Kills (SIGKILL) hit all stages of a run equally often: start-up, training, compiling, validating, saving and
plotting. In which stage a run is, is told from outside: inotify says at once what happens to its files, and
the progress bar, drawn at each iteration, where it is. An undisturbed run says how long each part of a stage
takes; the moment of a kill is drawn from that time, evenly or, half of the times, soon after it has begun,
where most is at stake. A kill that comes too late for its stage is kept, and repeated. Half of the attempts
at runs of one process are `python main.py`, half are forks of a server that has PyTorch imported, which start
in a tenth of the time; half of the kills take the C++ compiler along. Those that are to hit the compiling
begin with no compiled code.

After each kill last.pt and best.pt must load, and no more than --save-every iterations may be lost. A run
that has got through to its end must be the undisturbed one to the bit: weights, optimizer, progress, all
points of all curves as TensorBoard's reader finds them on the disk, training.json and the pictures; nothing
temporary may be left. Writes benchmarks/results/faults.json, after each kill; Linux only.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import random
import re
import select
import shutil
import signal
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

STAGES = ("start", "training", "compiling", "validating", "saving", "plotting")  # in a run's order
LAST, BEST = "last.pt", "best.pt"
PICTURES = ("examples.png", "features.png", "training.png", "training.json")
SPEED = "speed/iterations_per_second"  # the one curve that no two runs share
NAMED = f"{LAST} has its name"  # a part of saving
LATE = 5  # kills in a row that miss their stage, after which another one has its turn
UNHURT = 10  # runs in a row that no kill hits, after which the harness gives up
POLL = 0.0005  # seconds


# ---- processes -----------------------------------------------------------------------------------


class Process(Protocol):
    """A job's first process."""

    pid: int

    def poll(self) -> int | None: ...


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


FORKS = multiprocessing.get_context("forkserver") if sys.platform == "linux" else None
IMPORTED = (
    *("main", "beginning", "building", "trainer", "torchvision", "torch.utils.tensorboard", "torch.export"),
    *("torch._inductor.compile_fx", "torch._inductor.package", "matplotlib.backends.backend_agg"),
)


class Forked:
    """main.py, in a session of its own, as a fork of a process that has imported what it needs."""

    def __init__(self, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
        assert FORKS is not None
        self.process = FORKS.Process(target=_main, args=([*arguments], str(log), dict(environment)))
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode


def _main(arguments: list[str], log: str, environment: Mapping[str, str]) -> None:
    os.setsid()
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    from main import main

    sys.exit(main(arguments))


def workers(job: Process) -> dict[int, int]:
    """The processes of a torchrun job that live, by rank."""
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


# ---- in which stage a run is -----------------------------------------------------------------------


class Inotify:
    """What happens in folders, as Linux tells it: at once, and in order."""

    MODIFIED, MOVED_IN, CREATED = 0x2, 0x80, 0x100

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.file = self.libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        self.folders: dict[int, Path] = {}

    def watch(self, folder: Path) -> None:
        mask = self.MODIFIED | self.MOVED_IN | self.CREATED
        number = self.libc.inotify_add_watch(self.file, bytes(folder), mask)
        if number < 0:
            raise OSError(ctypes.get_errno(), "inotify_add_watch", str(folder))
        self.folders[number] = folder

    def events(self, seconds: float) -> Iterable[tuple[int, Path]]:
        """What has happened, after at most so many seconds: MODIFIED, MOVED_IN or CREATED, and what."""
        if not select.select([self.file], [], [], max(0.0, seconds))[0]:
            return
        content = os.read(self.file, 1 << 16)
        while content:
            number, mask, _, size = struct.unpack_from("iIII", content)
            name = content[16 : 16 + size].rstrip(b"\0").decode()
            content = content[16 + size :]
            for kind in (self.CREATED, self.MOVED_IN, self.MODIFIED):
                if mask & kind:
                    yield kind, self.folders[number] / name

    def close(self) -> None:
        os.close(self.file)


@dataclass
class Visit:
    """Some time that a run spends in a part of a stage."""

    stage: str
    part: str
    begin: float  # seconds since the start of the process
    end: float = 0.0


class Timeline:
    """The stages of an attempt at a run, as they are seen from outside."""

    BAR = re.compile(r"\s*\d+%\|[^|]*\| (\d+)/(\d+) \[")  # of the training: it has no title
    COMPILED = re.compile(r"Compiled in|Found compiled code in|Not compiled")

    def __init__(self, folder: Path, log: Path, compiled: Path | None, images: Path | None) -> None:
        self.folder, self.log, self.compiled, self.images = folder, log, compiled, images
        self.events = Inotify()
        for each in (log.parent, folder, compiled, images):
            if each is not None and each.exists():
                self.events.watch(each)
        self.read = log.stat().st_size if log.exists() else 0
        self.again()

    def again(self) -> None:
        """The process starts, maybe anew."""
        self.begin = time.monotonic()
        self.visits = [Visit("start", "importing", 0.0)]
        self.rest = ""
        self.first: int | None = None  # iterations before this attempt
        self.iteration: int | None = None
        self.total = 0
        self.to_first: float | None = None  # seconds to the first iteration
        self.is_compiled = self.validating = False

    @property
    def now(self) -> Visit:
        return self.visits[-1]

    @property
    def built_code(self) -> bool:
        return any(visit.part == "building" for visit in self.visits)

    def enter(self, stage: str, part: str) -> None:
        if (self.now.stage, self.now.part) != (stage, part):
            self.now.end = time.monotonic() - self.begin
            self.visits.append(Visit(stage, part, self.now.end))

    def update(self, seconds: float) -> None:
        """Takes in what has happened, or waits for it, at most so many seconds."""
        for kind, path in self.events.events(seconds):
            if kind == Inotify.CREATED and path == self.folder:
                self.events.watch(path)
            elif path == self.log:
                self._read_log()
            elif path.parent == self.folder:
                self._see(kind, path.name)
            elif path.parent == self.compiled and kind == Inotify.CREATED and path.suffix == ".lock":
                self.enter("compiling", "building")
            elif path.parent == self.images and path.name.startswith("."):
                self.enter("start", "building" if kind == Inotify.MOVED_IN else "decoding images")

    def _see(self, kind: int, name: str) -> None:
        stages = {LAST: "saving", BEST: "validating"} | dict.fromkeys(PICTURES, "plotting")
        if kind == Inotify.MOVED_IN and name == BEST and self.validating:
            self.enter("plotting", "drawing examples.png")
        elif kind == Inotify.MOVED_IN and name == LAST:
            self.enter("saving", NAMED)  # the folder is synced; a file that is not whole yet would be lost
        elif kind == Inotify.MOVED_IN and name in stages:
            self._leave()
        elif kind != Inotify.MOVED_IN and (stage := stages.get(name[1:].removesuffix(".tmp"))):
            self.enter(stage, name)  # created, or one that a killed process has left is written anew

    def _leave(self) -> None:
        """Back to what is done between two stages."""
        if self.iteration == self.total and not self.validating:
            self.enter("plotting", "drawing training.png, the end")
        else:
            self.enter("training", "compiled" if self.is_compiled else "uncompiled")

    def _read_log(self) -> None:
        with self.log.open("rb") as file:
            file.seek(self.read)
            new = file.read()
        self.read += len(new)
        *lines, self.rest = re.split(r"[\r\n]", self.rest + new.decode(errors="replace"))
        for line in (*lines, self.rest):
            self._read_line(line)

    def _read_line(self, line: str) -> None:
        if "Meta-training in" in line or "Going on from" in line:
            if self.first is None:
                self.enter("start", "opening event files")
        elif self.COMPILED.search(line):
            self.is_compiled = True
            self.enter("training", "compiled")
        elif bar := self.BAR.match(line):
            self.iteration, self.total = int(bar[1]), int(bar[2])
            self.first = self.iteration if self.first is None else self.first
            if self.to_first is None and self.iteration > self.first:
                self.to_first = time.monotonic() - self.begin
            self._read_bar(line)

    def _read_bar(self, line: str) -> None:
        was, self.validating = self.validating, ", validating" in line
        if ", compiling" in line and not self.is_compiled and self.now.stage in ("start", "training"):
            self.enter("compiling", "tracing")
        elif self.validating:
            if not was:
                self.enter("validating", "evaluating")
        elif was or self.now.part == NAMED or (self.now.stage == "start" and self._has_begun()):
            self._leave()

    def _has_begun(self) -> bool:
        """Whether the first iteration is over, or there is none left."""
        return self.to_first is not None or self.first == self.total


# ---- what a run has left behind --------------------------------------------------------------------


Points = list[tuple[int, object]]


def curves(folder: Path) -> dict[str, Points]:
    """All points of the curves, and the pictures, as TensorBoard's own reader finds them on the disk: none is
    taken out because an earlier iteration follows."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sizes = {"scalars": 0, "images": 0, "tensors": 0}
    events = EventAccumulator(str(folder), size_guidance=sizes, purge_orphaned_data=False)
    events.Reload()
    tags = events.Tags()
    found: dict[str, Points] = {}
    found |= {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags["scalars"]}
    found |= {tag: [(e.step, e.encoded_image_string) for e in events.Images(tag)] for tag in tags["images"]}
    return found | {tag: [(e.step, None) for e in events.Tensors(tag)] for tag in tags["tensors"]}


def same(a: object, b: object) -> bool:
    """To the bit."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def differences(run: Path, undisturbed: Path) -> list[str]:
    """What two runs differ in; none where the one is the other to the bit."""
    from training.checkpoint import load_checkpoint

    found = []
    for name in (LAST, BEST):
        try:
            ours, theirs = (vars(load_checkpoint(folder / name)) for folder in (run, undisturbed))
        except Exception as error:  # any at all would be the finding
            found.append(f"{name}: {error}")
            continue
        found += [f"{name}: {part}" for part in ours if not same(ours[part], theirs[part])]
    curves_of_run, wanted = curves(run), curves(undisturbed)
    for tag in sorted(curves_of_run.keys() | wanted.keys()):
        a, b = curves_of_run.get(tag, []), wanted.get(tag, [])
        if [step for step, _ in a] != [step for step, _ in b]:
            found.append(f"iterations of {tag}")
        elif tag != SPEED and a != b:
            found.append(f"values of {tag}")
    for name in PICTURES:
        if not (run / name).exists():
            found.append(f"no {name}")
        elif (run / name).read_bytes() != (undisturbed / name).read_bytes():
            found.append(name)
    return found + [f"{name} left behind" for name in left_over(run)]


def left_over(folder: Path) -> list[str]:
    """Names of what is temporary in a folder; the file that a run is locked by is not."""
    hidden = [path.name for path in folder.iterdir() if path.name.startswith(".") or path.suffix == ".tmp"]
    return sorted(name for name in hidden if name != ".lock" and not name.endswith(".npy"))


# ---- the runs ----------------------------------------------------------------------------------------


def flags(text: str) -> list[str]:
    return text.split()


ALONE = {  # with two validations, so that each of them draws examples.png
    "sinusoid, compiled": "--compile on --compile-after 300 --iterations 1200 --save-every 99 --log-every 70",
    "sinusoid, meta-sgd": "--compile off --iterations 400 --save-every 24 --log-every 21 "
    "--algorithm meta-sgd",
    "images, maml++": "--compile off --algorithm maml++ --iterations 60 --save-every 8 --log-every 7 "
    "--images-on host --image-size 14 --channels 1 --learner conv --learner-args channels=4 -n 3 -k 1 -q 2 "
    "--meta-batch-size 2 -s 2 --eval-tasks 50",
}


def sorts(given: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of the runs, by the names of their sorts."""
    if given.processes > 1:
        every = f"--save-every {given.save_every} --val-every {given.val_every} --log-every {given.log_every}"
        return {"sinusoid": flags(f"--iterations {given.iterations} {every} --compile off")}
    found = {}
    for name in given.sorts or ALONE:
        text = flags(ALONE[name])
        iterations = int(text[text.index("--iterations") + 1])
        text += ["--val-every", str(iterations // 2), "--threads", "1"]
        images = ["--dataset", f"images:{given.folder / 'images'}"] if name.startswith("images") else []
        found[name] = [*images, *text]
    return found


def write_images(folder: Path, classes: int = 20, images: int = 6, size: int = 14) -> None:
    """Small noisy images, by class."""
    import numpy as np
    from PIL import Image

    noise = np.random.default_rng(0)
    for number in range(classes):
        (folder / f"class{number:02}").mkdir(parents=True)
        pattern = noise.integers(0, 200, (size, size))
        for image in range(images):
            pixels = (pattern + noise.integers(0, 56, (size, size))).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"class{number:02}" / f"{image}.png")


def stages_of(sort_flags: Sequence[str]) -> list[str]:
    compiled = sort_flags[sort_flags.index("--compile") + 1] == "on"
    return [stage for stage in STAGES if stage != "compiling" or compiled]


def save_every(sort_flags: Sequence[str]) -> int:
    return int(sort_flags[sort_flags.index("--save-every") + 1])


class Attempt:
    """A process, or a torchrun job, that begins a run or goes on with it, and a way to kill it in a stage."""

    def __init__(self, given: argparse.Namespace, name: str, sort: str, kind: str, *options: str) -> None:
        self.given, self.sort, self.kind = given, sort, kind
        self.folder, self.log = given.folder / name, given.folder / f"{name}.log"
        line = [*sorts(given)[sort], "--checkpoint-path", str(given.folder), "--run-name", name, "--resume"]
        self.compiled = compiled_code(given, sort) if "compiling" in stages_of(line) else None
        environment = {"XDG_CACHE_HOME": str(cache(given, sort))}
        images = given.folder / "images" if "images" in sort else None
        self.timeline = Timeline(self.folder, self.log, self.compiled, images)
        self.job: Process
        if kind == "fork":
            self.job = Forked(line, self.log, environment)
        elif kind == "python":
            self.job = started([sys.executable, str(ROOT / "main.py"), *line], self.log, **environment)
        else:
            self.job = started(torchrun(given.processes, ROOT / "main.py", line, *options), self.log)

    def living(self) -> dict[int, int]:
        """The processes that could be killed, by rank."""
        if self.kind == "torchrun":
            return workers(self.job)
        return {0: self.job.pid} if self.job.poll() is None else {}

    def ended(self) -> bool:
        return self.job.poll() is not None

    def reached(self, moment: Moment) -> bool:
        """Waits for it; False where the run ended first, or stands still."""
        limit = time.monotonic() + self.given.limit
        skip, share, visit, due = moment.skip, moment.share, -1, None
        while not self.ended() and time.monotonic() < limit:
            now = time.monotonic()
            self.timeline.update(min(0.05, due - now) if due else 0.05)
            at, number = self.timeline.now, len(self.timeline.visits)
            if (at.stage, at.part) != (moment.stage, moment.part):
                if due:  # it took less time than the undisturbed run: the next one, and earlier
                    share *= 0.5
                due = None
            elif number != visit:
                visit, skip = number, skip - 1
                due = self.timeline.begin + at.begin + share * moment.seconds if skip < 0 else None
            if due and time.monotonic() >= due and (self.kind != "torchrun" or self.living()):
                return not self.ended()
        return False

    def kill(self, draw: random.Random) -> tuple[int, bool] | None:
        """Kills a process, with all that it has started or without; which one, and whether with all. None
        where it ended by itself just before."""
        living = sorted(self.living().items())
        if not living:
            return None
        rank, pid = draw.choice(living)
        whole = self.kind != "torchrun" and draw.random() < 0.5
        with suppress(ProcessLookupError):
            (os.killpg if whole else os.kill)(pid, signal.SIGKILL)
        if self.kind != "torchrun":
            wait_until(self.ended, 60)
            self.timeline.update(0)  # what it has done before it died
            if self.job.poll() != -signal.SIGKILL:
                return None
        return rank, whole

    def wait(self, seconds: float) -> str | None:
        """Until all has ended; what is wrong, if it does not, which ends it."""
        pids = [self.job.pid, *workers(self.job).values()]
        limit = time.monotonic() + seconds
        while time.monotonic() < limit:
            self.timeline.update(0.005)
            if self.ended() and not any(map(alive, pids)):
                self.timeline.update(0)
                return None
        for pid in pids:
            if alive(pid):
                os.kill(pid, signal.SIGKILL)
        wait_until(self.ended, 60)
        return f"it did not end within {seconds:g} s"

    def next_of_job(self, before: Mapping[int, int]) -> str | None:
        """Waits until torchrun has started all processes anew; what is wrong, if it does not."""

        def anew() -> bool:
            now = workers(self.job)
            return len(now) == self.given.processes and not set(now.values()) & set(before.values())

        if not wait_until(lambda: self.ended() or anew(), self.given.bound):
            return f"not started again within {self.given.bound:g} s"
        self.timeline.update(0)
        self.timeline.again()
        return None

    def close(self) -> None:
        """Ends what is left of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.job.pid, signal.SIGKILL)
        self.timeline.events.close()


def cache(given: argparse.Namespace, sort: str) -> Path:
    return given.folder / "cache" / sort.replace(", ", "-")


def compiled_code(given: argparse.Namespace, sort: str) -> Path:
    """The folder, which exists from now on: it is watched."""
    folder = cache(given, sort) / "maml" / "compiled"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


# ---- kills -------------------------------------------------------------------------------------------


@dataclass
class Moment:
    """When a run is to be killed."""

    stage: str
    part: str
    skip: int  # times that it comes by before
    seconds: float  # that the undisturbed run spent there
    share: float  # of these


@dataclass
class Kill:
    """One, and what came of it."""

    number: int
    run: int
    sort: str
    kind: str
    planned: str
    stage: str
    part: str
    rank: int
    whole: bool  # with all that it had started
    resumed: bool  # whether a process was hit that had gone on with the run
    seconds: float  # after the start of the process
    until_ended: float  # seconds until no process of the job was left, or the next ones had been started
    shown: int | None  # the last iteration; None: before the first
    saved: int  # the iteration that the next process goes on from
    writing: bool  # whether a checkpoint was just being written
    again_in: float | None = None  # seconds in which the next process, if it need not compile, went on
    problem: str | None = None


def moment_in(stage: str, timeline: Sequence[Visit], draw: random.Random, missed: int) -> Moment:
    """A part of it, and when: the earlier, the more often a run has got through it before."""
    part = draw.choice(sorted({visit.part for visit in timeline if visit.stage == stage}))
    visits = [visit for visit in timeline if (visit.stage, visit.part) == (stage, part)]
    visit = draw.choice(visits)
    skip = 0 if missed else draw.randrange(min(3, len(visits)))
    share = draw.choice([draw.random(), 10 ** (-3 * draw.random())])
    return Moment(stage, part, skip, visit.end - visit.begin, share * 0.5**missed)


def saved_at(folder: Path) -> tuple[int, str | None]:
    """Where the next process will go on, and what is wrong with the checkpoints, if anything is."""
    from training.checkpoint import load_checkpoint

    found = {}
    for name in (BEST, LAST):
        if (folder / name).exists():
            try:
                found[name] = load_checkpoint(folder / name).iteration
            except Exception as error:  # any at all would be the finding
                return 0, f"{name}: {error}"
    return found.get(LAST, found.get(BEST, 0)), None


class Harness:
    """The kills that are due, what they hit, and what came of it."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.kills: list[Kill] = []
        self.runs: list[dict[str, Any]] = []
        self.timelines: dict[str, list[Visit]] = {}  # of undisturbed runs, by sort and kind
        self.seconds: dict[str, float] = {}
        self.missed: dict[int, int] = {}  # how often a run has ended before this kill
        self.kinds = ("torchrun",) if given.processes > 1 else given.kinds
        draw = random.Random(given.seed)
        self.plan = planned(given, draw)

    # ---- results

    @property
    def variant(self) -> str:
        if self.given.processes == 1:
            return "single"
        return "restarts-by-torchrun" if self.given.restarts_by_torchrun else "restarts-by-hand"

    def settings(self) -> dict[str, Any]:
        import torch

        names = ["kills", "processes", "seed", "kills_per_run"]
        if self.given.processes > 1:
            names += ["iterations", "save_every", "val_every", "log_every", "bound"]
        found = {name: getattr(self.given, name) for name in names}
        return found | {"kinds": [*self.kinds], "sorts": [*sorts(self.given)], "torch": torch.__version__}

    def write(self) -> None:
        from common.files import write_whole

        results = json.loads(self.given.out.read_text()) if self.given.out.exists() else {}
        timelines = {name: [asdict(visit) for visit in visits] for name, visits in self.timelines.items()}
        results[self.variant] = {
            "settings": self.settings(),
            "seconds_undisturbed": self.seconds,
            "stages": {name: spent(visits) for name, visits in self.timelines.items()},
            "kills": [asdict(kill) for kill in self.kills],
            "runs": self.runs,
        }
        write_whole(self.given.out, lambda file: file.write(f"{json.dumps(results, indent=1)}\n".encode()))
        write_whole(
            self.given.folder / "timelines.json", lambda file: file.write(json.dumps(timelines).encode())
        )

    def read(self) -> None:
        """What an earlier call of the same command has found."""
        result = json.loads(self.given.out.read_text())[self.variant]
        if result["settings"] != self.settings():
            raise SystemExit(f"{self.given.out} is of other settings than these: begin without --resume")
        timelines = json.loads((self.given.folder / "timelines.json").read_text())
        self.timelines = {name: [Visit(**v) for v in visits] for name, visits in timelines.items()}
        self.seconds = result["seconds_undisturbed"]
        self.kills = [Kill(**kill) for kill in result["kills"]]
        self.runs = result["runs"]

    # ---- runs

    def undisturbed(self, sort: str, kind: str) -> None:
        """One of them, compared with the first of its sort."""
        self.forget_images()
        name = f"undisturbed-{sort}-{kind}".replace(", ", "-")
        with closing(Attempt(self.given, name, sort, kind)) as attempt:
            problem = attempt.wait(self.given.limit)
        if problem or attempt.job.poll():
            raise RuntimeError(problem or attempt.log.read_text(errors="replace")[-1000:])
        if attempt.compiled is not None and not attempt.timeline.is_compiled:
            raise RuntimeError(f"{attempt.log}: it was not compiled")
        different = differences(attempt.folder, self.reference(sort))
        if different:
            raise RuntimeError(f"two undisturbed runs differ ({sort}, {kind}): {', '.join(different)}")
        self.timelines[f"{sort}, {kind}"] = attempt.timeline.visits[:-1]
        seconds = self.seconds[f"{sort}, {kind}"] = round(attempt.timeline.visits[-1].begin, 2)
        say(f"undisturbed, {sort}, {kind}: {seconds:.1f} s; {attempt.timeline.to_first:.1f} s to iteration 1")
        if attempt.compiled is not None and not self.kept(sort).exists():
            shutil.copytree(attempt.compiled, self.kept(sort))

    def reference(self, sort: str) -> Path:
        """The folder of the undisturbed run."""
        return self.given.folder / f"undisturbed-{sort}-{self.kinds[0]}".replace(", ", "-")

    def kept(self, sort: str) -> Path:
        """A copy of the compiled code that the undisturbed run has left."""
        return cache(self.given, sort) / "kept"

    def due(self) -> list[int]:
        hit = {kill.number for kill in self.kills if kill.stage == kill.planned or self.given.processes > 1}
        return [number for number in range(len(self.plan)) if number not in hit]

    def go(self) -> None:
        """All kills, run by run."""
        while due := self.due():
            number, sort = 1 + max((run["run"] for run in self.runs), default=0), self.plan[due[0]][0]
            if self.kills and self.kills[-1].run == number:  # an earlier call was left within this run
                sort = self.kills[-1].sort
            numbers = [each for each in due if self.plan[each][0] == sort][: self.given.kills_per_run]
            draw = random.Random(f"{self.given.seed} {number}")
            # as they come in a run's life; each process has a start
            order = {
                each: STAGES.index(stage)
                if (stage := self.plan[each][1]) != "start"
                else draw.uniform(-1, len(STAGES))
                for each in numbers
            }
            self.run(number, sort, sorted(numbers, key=order.__getitem__))
            if len(self.runs) >= UNHURT and not any(run["kills"] for run in self.runs[-UNHURT:]):
                raise RuntimeError(f"{UNHURT} runs have ended before they could be killed")

    def run(self, number: int, sort: str, numbers: list[int]) -> None:
        """One, killed as planned as long as there is something left to kill, and compared at its end."""
        with closing(self.killed(number, sort, numbers)) as attempt:
            problem = attempt.wait(self.given.limit)
        self.went_on(attempt)
        code = attempt.job.poll()
        wrong = [problem or f"exit code {code}: {tail(attempt.log)}"] if problem or code else []
        wrong = wrong or differences(attempt.folder, self.reference(sort))
        if "images" in sort:
            wrong += [f"{each} left beside the data" for each in left_over(self.given.folder / "images")]
        of_run = sum(kill.run == number for kill in self.kills)
        self.runs.append({"run": number, "sort": sort, "kills": of_run, "differences": wrong})
        self.write()
        outcome = ", ".join(wrong) or "the undisturbed run to the bit"
        say(f"run {number}, {sort}, killed {of_run} times: {outcome}")
        if not wrong:
            shutil.rmtree(attempt.folder)
            attempt.log.unlink()

    def killed(self, number: int, sort: str, numbers: list[int]) -> Attempt:
        """The attempt at a run that is left to go to the end, after those that have been killed."""
        late, attempts = 0, 0
        options = [f"--max-restarts={len(numbers)}"] if self.given.restarts_by_torchrun else []
        attempt: Attempt | None = None
        while True:
            draw = random.Random(f"{self.given.seed} {number} {len(self.kills)}")
            stage = self.plan[numbers[0]][1] if numbers else None
            if attempt is None:
                attempts += 1
                kind = self.kinds[(number + attempts) % len(self.kinds)]
                self.prepare(sort, stage, draw)
                attempt = Attempt(self.given, f"run-{number}", sort, kind, *options)
            if stage is None:
                return attempt
            try:
                kind = self.kinds[0] if stage == "compiling" else attempt.kind  # the one that had to compile
                missed = self.missed.get(numbers[0], 0)
                if not attempt.reached(moment_in(stage, self.timelines[f"{sort}, {kind}"], draw, missed)):
                    self.missed[numbers[0]] = missed + 1
                    return attempt
                kill = self.kill(attempt, number, numbers[0], stage, draw)
                if kill is None:
                    return attempt
            except BaseException:
                attempt.close()
                raise
            late = 0 if kill.stage == stage else late + 1
            if kill.stage == stage or late == LATE or self.given.processes > 1:
                numbers.pop(0)
            if not self.given.restarts_by_torchrun:
                attempt = None

    def prepare(self, sort: str, stage: str | None, draw: random.Random) -> None:
        """What an attempt finds: nothing compiled if it is to be killed while compiling, else, half of the
        times, what another run has compiled meanwhile, else what there is; no decoded images if it is to be
        killed at the start."""
        if "compiling" in stages_of(sorts(self.given)[sort]):
            folder = compiled_code(self.given, sort)
            if stage == "compiling":
                shutil.rmtree(folder)
                folder.mkdir()
            elif self.given.quick or draw.random() < 0.5:
                shutil.copytree(self.kept(sort), folder, dirs_exist_ok=True)
        if stage == "start":
            self.forget_images()

    def forget_images(self) -> None:
        """They are to be decoded again."""
        for decoded in (self.given.folder / "images").glob(".*.npy"):
            decoded.unlink()

    def kill(
        self, attempt: Attempt, run: int, number: int, planned_stage: str, draw: random.Random
    ) -> Kill | None:
        """What came of it; None where there was nothing left to kill."""
        timeline, before = attempt.timeline, attempt.living()
        seconds = time.monotonic() - timeline.begin
        at = timeline.now
        hit = attempt.kill(draw)
        if hit is None:
            return None
        killed = time.monotonic()
        if attempt.kind != "torchrun":
            at = timeline.now
        writing = at.part in (f".{LAST}.tmp", f".{BEST}.tmp")
        first, shown = timeline.first, timeline.iteration if timeline.to_first is not None else None
        self.went_on(attempt)
        if self.given.restarts_by_torchrun:
            problem = attempt.next_of_job(before)
        else:
            problem = attempt.wait(self.given.bound)
            attempt.close()
        took = time.monotonic() - killed
        saved, damage = saved_at(attempt.folder)
        problem, lost = problem or damage, (shown or 0) - saved
        if lost > save_every(sorts(self.given)[attempt.sort]):
            problem = problem or f"{lost} iterations lost"
        kill = Kill(
            number, run, attempt.sort, attempt.kind, planned_stage, at.stage, at.part, *hit,
            bool(first), round(seconds, 3), round(took, 3), shown, saved, writing, problem=problem,
        )  # fmt: skip
        self.kills.append(kill)
        self.write()
        say(describe(kill))
        return kill

    def went_on(self, attempt: Attempt) -> None:
        """Notes how soon after the last kill of a run this attempt was at its first iteration."""
        timeline, name = attempt.timeline, attempt.folder.name
        before = [kill for kill in self.kills if f"run-{kill.run}" == name]
        if before and timeline.to_first is not None and not timeline.built_code:
            before[-1].again_in = round(timeline.to_first, 3)


def planned(given: argparse.Namespace, draw: random.Random) -> list[tuple[str, str]]:
    """Sort and stage of each kill: stages equally often, each by turns in the sorts of runs that have it."""
    by_sort = {sort: stages_of(line) for sort, line in sorts(given).items()}
    stages = [stage for stage in STAGES if any(stage in of_sort for of_sort in by_sort.values())]
    plan = []
    for number in range(given.kills):
        stage = stages[number % len(stages)]
        having = [sort for sort, of_sort in by_sort.items() if stage in of_sort]
        plan.append((having[number // len(stages) % len(having)], stage))
    draw.shuffle(plan)
    return plan


# ---- the report --------------------------------------------------------------------------------------


say = partial(print, flush=True)


def tail(log: Path) -> str:
    lines = re.split(r"[\r\n]+", log.read_text(errors="replace"))
    return " ".join([line for line in lines if not Timeline.BAR.match(line)][-6:])[-600:]


def spent(visits: Sequence[Visit]) -> dict[str, float]:
    """Seconds by stage and part."""
    found: dict[str, float] = {}
    for visit in visits:
        name = f"{visit.stage}: {visit.part}"
        found[name] = round(found.get(name, 0.0) + visit.end - visit.begin, 4)
    return found


def describe(kill: Kill) -> str:
    late = f", too late for {kill.planned}" if kill.planned != kill.stage else ""
    reached = "before an iteration" if kill.shown is None else f"iteration {kill.shown:,}"
    at = f"{reached}, saved {kill.saved:,}{', writing a checkpoint' * kill.writing}"
    outcome = kill.problem or f"{kill.until_ended:.1f} s until it was over, {at}"
    which = f"{kill.kind}, rank {kill.rank}{' and all it started' * kill.whole}"
    where = f"{kill.stage} ({kill.part}{late})"
    return f"run {kill.run}, {kill.sort}, {where}, {kill.seconds:.2f} s, {which}: {outcome}"


def lost_kills(kills: Sequence[Kill], runs: Sequence[Mapping[str, Any]]) -> list[Kill]:
    """Those with a problem, or whose run differs at its end or has not got there."""
    sound = {run["run"] for run in runs if not run["differences"]}
    return [kill for kill in kills if kill.problem or kill.run not in sound]


def table(kills: Sequence[Kill], runs: Sequence[Mapping[str, Any]]) -> str:
    """A row a stage."""
    titles = ["stage", "kills", "of resumed processes", "while a checkpoint was written"]
    titles += ["most iterations lost", "going on after (median, longest)", "all ended after", "problems"]
    lines = [f"| {' | '.join(titles)} |", f"|{'-|' * len(titles)}"]
    bad = {id(kill) for kill in lost_kills(kills, runs)}
    for stage in (*STAGES, "all"):
        of_stage = [kill for kill in kills if stage in (kill.stage, "all")]
        if not of_stage:
            continue
        again = [kill.again_in for kill in of_stage if kill.again_in is not None]
        cells = [
            len(of_stage),
            sum(kill.resumed for kill in of_stage),
            sum(kill.writing for kill in of_stage),
            max((kill.shown or kill.saved) - kill.saved for kill in of_stage),
            f"{statistics.median(again):.1f} s, {max(again):.1f} s" if again else "",
            f"{max(kill.until_ended for kill in of_stage):.1f} s",
            sum(id(kill) in bad for kill in of_stage),
        ]
        lines.append(f"| {stage} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def summary(harness: Harness) -> str:
    kills, runs = harness.kills, harness.runs
    lost = len(lost_kills(kills, runs))
    by_kind = {kind: sum(kill.kind == kind for kill in kills) for kind in harness.kinds}
    late = sum(kill.planned != kill.stage for kill in kills)
    different = sum(bool(run["differences"]) for run in runs)
    return (
        f"faults injected {len(kills)}, survived {len(kills) - lost}, lost {lost}\n"
        f"{', '.join(f'{count} of {kind}' for kind, count in by_kind.items())}; {late} too late for their "
        f"stage; {len(runs)} runs went to their end, {different} of them differ from the undisturbed one"
    )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--kills-per-run", type=int, default=4, help="at most (default: 4)")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0, help="of what is killed and when (default: 0)")
    parser.add_argument("--resume", action="store_true", help="go on where an earlier call was left")
    parser.add_argument("--quick", action="store_true", help="what is compiled once stays")
    parser.add_argument("--sorts", nargs="+", choices=ALONE, help="runs of one process (default: all)")
    parser.add_argument("--kinds", nargs="+", choices=("python", "fork"), default=["python", "fork"])
    parser.add_argument("--limit", type=float, default=900.0, help="seconds for a run to end (default: 900)")
    parser.add_argument("--bound", type=float, default=60.0, help="seconds for all to end (default: 60)")
    jobs = parser.add_argument_group("jobs of several processes")
    jobs.add_argument("--restarts-by-torchrun", action="store_true", help="torchrun --max-restarts")
    jobs.add_argument("--iterations", type=int, default=2000)
    jobs.add_argument("--save-every", type=int, default=100)
    jobs.add_argument("--val-every", type=int, default=250)
    jobs.add_argument("--log-every", type=int, default=70)
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "faults")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "faults.json")
    given = parser.parse_args(arguments)
    if given.restarts_by_torchrun and given.processes == 1:
        parser.error("--restarts-by-torchrun is for --processes 2, or more")
    given.folder = given.folder.absolute()
    return given


def main() -> int:
    given = parse()
    if given.folder.exists() and not given.resume:
        shutil.rmtree(given.folder)
    given.folder.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "TQDM_MININTERVAL": "0",  # a bar at each iteration
        "MPLCONFIGDIR": str(given.folder / "matplotlib"),
        "PYTHONPATH": str(ROOT),  # of the server that forks
        "PYTHONWARNINGS": "ignore:resource_tracker",  # it misses what killed processes have not given back
    }
    if not given.quick:  # which would take half as long again without precompiled headers
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(given.folder / "inductor")
    if "fork" in given.kinds and FORKS is not None:
        FORKS.set_forkserver_preload([*IMPORTED])
        FORKS.Process(target=os.getpid).start()  # starts it
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # with what it has started
    harness = Harness(given)
    if given.resume:
        harness.read()
    if not (given.folder / "images").exists() and any("images" in sort for sort in sorts(given)):
        write_images(given.folder / "images")
    for sort in sorts(given):
        for kind in harness.kinds:
            if f"{sort}, {kind}" not in harness.timelines:
                harness.undisturbed(sort, kind)
                harness.write()
    harness.go()
    harness.write()
    say(table(harness.kills, harness.runs))
    say(summary(harness))
    say(f"Written: {given.out}")
    return int(bool(lost_kills(harness.kills, harness.runs)))


if __name__ == "__main__":
    sys.exit(main())
