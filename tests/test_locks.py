"""Two processes, one folder: whoever comes second is refused, and nothing is lost, whoever is killed."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import main
from commands import config
from commands.beginning import fresh_folder
from common import locks
from common.errors import UsageError
from common.files import write_whole
from common.locks import LOCK, training_in
from training.checkpoint import BEST, LAST, load_checkpoint

SHORT = ["--meta-batch-size", 2, "-k", 2, "-q", 2, "--compile", "off", "--val-every", 1000]


def command(*arguments: object) -> int:
    return main.main([str(a) for a in arguments])


def start(code: str, *arguments: object) -> subprocess.Popen:
    """Python, with the project's modules on its path."""
    line = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}",
        *map(str, arguments),
    ]
    return subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLD = """
from pathlib import Path
from common.locks import training_in
with training_in(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder():
    """Starts processes that train in a folder, as far as others can see."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        started.append(start(HOLD, folder))
        assert said(started[-1]) == "locked"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture(autouse=True)
def _no_patience(monkeypatch):
    monkeypatch.setattr(locks, "PATIENCE", 0.0)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run, and a folder of two."""
    home = tmp_path_factory.mktemp("trained")
    flags = [*SHORT, "--iterations", 2, "--checkpoint-path", home]
    assert command(*flags, "--run-name", "run") == 0
    assert command(*flags, "--run-name", "many", "--seeds", "0-1") == 0
    assert not list(home.rglob(LOCK))  # a folder that nobody trains in has none
    return home


def contents(folder: Path) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != LOCK}


def test_a_run_that_is_being_trained_is_neither_gone_on_with_nor_begun_again(trained, holder, capsys):
    home, before = ["--checkpoint-path", trained], contents(trained)
    (trained / "link").symlink_to(trained / "run")
    process = holder(trained / "run")
    for line in (
        ["--load", trained / "run" / LAST, "--iterations", 3],
        ["--load", trained / "run" / BEST],
        ["--load", trained / "link" / LAST],
        [*home, "--run-name", "run", "--resume"],
        [*home, "--run-name", "run"],
        [*home, "--run-name", "link", "--resume"],
        [*home, "--run-name", "run", "--seeds", "0-1", "--resume"],
        ["--checkpoint-path", trained / "run", "--run-name", "inside"],
    ):
        assert command(*SHORT, *line) == 2
        error = capsys.readouterr().err
        assert f"is being trained in by process {process.pid} on {socket.gethostname()} since " in error
        assert error.count("\n") == 1 and error.endswith(": wait, end it, or choose another --run-name\n")
    (trained / "link").unlink()
    assert contents(trained) == before and not (trained / "run" / "inside").exists()
    assert (
        command("--eval", "--load", trained / "run" / LAST, "--eval-tasks", 2, "--out", trained / "out") == 0
    )


def test_many_runs_and_one_of_them_exclude_each_other_and_two_of_them_do_not(trained, holder, capsys):
    many = trained / "many"
    line = [*SHORT, "--iterations", 3, "--checkpoint-path", trained, "--run-name", "many", "--seeds", "0-1"]
    one = [*SHORT, "--iterations", 3, "--load", many / "seed-0" / LAST]
    process = holder(many)
    assert command(*one) == 2
    assert f"{many} is being trained in by process {process.pid} on" in capsys.readouterr().err
    process.kill()
    process.wait()
    process = holder(many / "seed-1")
    assert command(*line, "--resume") == 2
    assert f"{many / 'seed-1'} is being trained in by process {process.pid} on" in capsys.readouterr().err
    assert command(*one) == 0
    assert load_checkpoint(many / "seed-0" / LAST).iteration == 3
    process.kill()
    process.wait()
    assert command(*line, "--resume") == 0
    assert {load_checkpoint(many / f"seed-{n}" / LAST).iteration for n in (0, 1)} == {3}
    assert not list(many.rglob(LOCK))


def test_the_lock_is_held_from_before_the_checkpoint_is_read_until_the_results_are_written(
    trained, tmp_path, monkeypatch
):
    from commands import beginning
    from training.run import Run

    states = []

    def locked() -> bool:
        code = "import os, fcntl; fcntl.flock(os.open(sys.argv[1], os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)"
        return start(code, tmp_path / "run" / LOCK).wait() != 0

    def watched(function):
        def call(*arguments, **named):
            states.append(locked())
            result = function(*arguments, **named)
            states.append(locked())
            return result

        return call

    monkeypatch.setattr(subprocess, "Popen", _quiet(subprocess.Popen))
    monkeypatch.setattr(beginning, "load_checkpoint", watched(beginning.load_checkpoint))
    monkeypatch.setattr(Run, "end", watched(Run.end))
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LAST).write_bytes((trained / "run" / LAST).read_bytes())
    assert command(*SHORT, "--load", tmp_path / "run" / LAST, "--iterations", 4) == 0
    assert states == [True] * 4


def _quiet(popen):
    return lambda *a, **k: popen(*a, **{**k, "stderr": subprocess.DEVNULL})


def test_of_processes_that_begin_in_a_fresh_folder_at_once_one_does(tmp_path):
    """Again and again: also while the first removes lock and folder, one at a time is inside."""
    code = """
import os, time
from pathlib import Path
from common import locks
from contextlib import ExitStack, suppress
from common.errors import UsageError
locks.PATIENCE = 0.02
home, entered = Path(sys.argv[1]), 0
sys.stdin.readline()
end = time.monotonic() + 2
while time.monotonic() < end:
    with suppress(UsageError), locks.training_in(home / "run"):
        inside = os.open(home / "inside", os.O_CREAT | os.O_EXCL)  # fails where another is inside
        entered += 1
        os.close(inside)
        os.unlink(home / "inside")
    with suppress(OSError):
        os.rmdir(home / "run")
print(entered)
"""
    processes = [start(code, tmp_path) for _ in range(3)]
    outputs = [process.communicate("go\n")[0] for process in _all_ready(processes)]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert all(int(output) > 0 for output in outputs)
    assert not list(tmp_path.rglob(LOCK))


def _all_ready(processes: list[subprocess.Popen]) -> list[subprocess.Popen]:
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    return processes


def test_a_killed_process_keeps_nothing_and_neither_do_its_children(tmp_path, monkeypatch):
    code = (
        HOLD.replace("sys.stdin.read()", "")
        + """
    import os, subprocess, time
    os.set_inheritable(0, False)
    grandchildren = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stdout=2).pid]
    if not (pid := os.fork()):
        os.close(1)
        time.sleep(60)
    print(*grandchildren, pid, flush=True)
    time.sleep(60)
"""
    )
    process = start(code, tmp_path / "run")
    assert said(process) == "locked"
    children = [int(pid) for pid in said(process).split()]
    with pytest.raises(UsageError), training_in(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    try:
        for pid in children:
            os.kill(pid, 0)  # they live
        monkeypatch.setattr(locks, "PATIENCE", 10.0)  # until the fork has come to let go
        with training_in(tmp_path / "run"):
            pass
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def test_two_that_write_one_file_at_once_leave_it_whole(tmp_path):
    code = """
from pathlib import Path
from common.files import write_whole
print("ready", flush=True)
sys.stdin.readline()
letter = sys.argv[2].encode()
for number in range(30):
    write_whole(Path(sys.argv[1]), lambda f: [f.write(letter * 50000) for _ in range(20)])
"""
    file = tmp_path / "result.json"
    processes = [start(code, file, letter) for letter in "ab"]
    assert [said(process) for process in processes] == ["ready", "ready"]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    while any(process.poll() is None for process in processes):
        if file.exists():
            content = file.read_bytes()
            assert content in (b"a" * 1_000_000, b"b" * 1_000_000)
        time.sleep(0.001)
    assert [process.wait() for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_where_the_file_system_has_no_locks_everything_goes_on_as_before(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", none)
    with training_in(tmp_path / "run"), training_in(tmp_path / "run"):
        write_whole(tmp_path / "file", lambda file: file.write(b"whole"))
    monkeypatch.setattr(locks, "fcntl", None)
    with training_in(tmp_path / "run"), training_in(tmp_path / "run"):
        write_whole(tmp_path / "file", lambda file: file.write(b"whole"))
    assert (tmp_path / "file").read_bytes() == b"whole"


def test_a_fresh_folder_is_locked_from_its_birth(tmp_path):
    with ExitStack() as locked:
        folder = fresh_folder(tmp_path, config.resolve({}), locked)
        with pytest.raises(UsageError, match="is being trained in by process"), training_in(folder):
            pass
    with training_in(folder):
        pass


def test_a_refused_beginning_leaves_nothing_behind(tmp_path, capsys):
    for line in (["--load", tmp_path / "no" / LAST], ["--learner", "no.py:f", "--run-name", "x"]):
        assert command(*SHORT, "--checkpoint-path", tmp_path / "new", *line) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_the_lock_that_a_killed_run_left_is_no_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / LOCK).write_text("process 1 on nowhere since 1970-01-01 00:00\n")
    assert command(*SHORT, "--iterations", 1, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    assert load_checkpoint(tmp_path / "run" / LAST).iteration == 1


def test_a_baseline_that_another_evaluation_trains_is_not_trained_twice(trained, holder, capsys):
    folder = trained / "run" / "baselines" / "pretrained"
    process = holder(folder)
    line = ["--eval", "--load", trained / "run" / LAST, "--baselines", "--eval-tasks", 2, "--eval-steps", 1]
    assert command(*line) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{folder} is being trained in by process {process.pid}" in error
    assert error.endswith(": wait, end it, or do without --baselines")
    assert not (folder / LAST).exists()


def test_adapted_weights_are_never_written_over_a_checkpoint_or_anything_else(trained, tmp_path, capsys):
    table = tmp_path / "mine.csv"
    table.write_text("x,y\n0,1\n1,2\n2,\n")
    line = ["--adapt", table, "--load", trained / "run" / LAST, "--out", tmp_path / "out", "--save-weights"]
    (tmp_path / "copy.pt").write_bytes((trained / "run" / LAST).read_bytes())
    before = contents(trained) | contents(tmp_path)
    for victim in (trained / "run" / LAST, tmp_path / "copy.pt", table, tmp_path / BEST):
        assert command(*line, victim) == 2
        assert f"--save-weights {victim}: " in capsys.readouterr().err
    assert contents(trained) | contents(tmp_path) == before
    for _ in range(2):
        assert command(*line, tmp_path / "weights.pt") == 0
    assert torch.load(tmp_path / "weights.pt", weights_only=True).keys() >= {"0.weight"}


def test_runs_whose_values_differ_in_case_alone_have_folders_that_do_so_in_more(tmp_path):
    from commands.members import _texts

    names = list(_texts(["a/B", "A-b", "A_b"]).values())
    assert len({name.casefold() for name in names}) == 3


def test_a_run_is_not_named_as_a_file_of_a_run(tmp_path, capsys):
    for name in (LAST, "training.json", "examples.png"):
        assert command("--checkpoint-path", tmp_path, "--run-name", name) == 2
        assert "is no name for a folder" in capsys.readouterr().err
