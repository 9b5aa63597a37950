"""Two runs never write one folder; the checkpoints of a folder are found, or refused in one line."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from runs import command

from common.errors import UsageError
from common.files import lock_file
from training import folders
from training.checkpoint import load_checkpoint
from training.folders import BEST, LAST, LOCK, find_checkpoint, find_runs, is_occupied, read_results

SHORT = ["--iterations", 4, "--val-every", 4, "--meta-batch-size", 2, "--compile", "off", "-k", 2, "-q", 2]

HOLD = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from training.folders import lock_folder
with lock_folder(Path(sys.argv[2]), sys.argv[3:]):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path, *members: str) -> Iterator[None]:
    """Let another process train in a folder; kill it afterwards (kill -9)."""
    line = [sys.executable, "-c", HOLD, str(ROOT), str(folder), *members]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield
        process.kill()


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(folders, "PATIENCE", 0.05)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Make a folder with one run, and a sweep of two."""
    home = tmp_path_factory.mktemp("home")
    assert command(*SHORT, "--checkpoint-path", home, "--run-name", "run") == 0
    assert command(*SHORT, "--checkpoint-path", home, "--run-name", "many", "--seeds", "0,1") == 0
    return home


# ---- locks -----------------------------------------------------------------------------------------


def test_a_run_that_another_process_trains_is_neither_resumed_nor_started_again(trained, refuse):
    before, again = (trained / "run" / LAST).read_bytes(), [*SHORT, "--iterations", 8]
    resumed = ["--checkpoint-path", trained, "--run-name", "run", "--resume"]
    with held(trained / "run"):
        for flags in (["--load", trained / "run" / LAST], resumed):
            line = refuse(*again, *flags)
            assert f"{trained / 'run'} is in use by another process" in line and "--run-name" in line
        assert command("--eval", "--load", trained / "run", "--eval-tasks", 4) == 0  # reading is free
    assert (trained / "run" / LAST).read_bytes() == before


def test_a_sweep_and_one_of_its_runs_exclude_each_other(trained, refuse):
    sweep = [*SHORT, "--checkpoint-path", trained, "--run-name", "many", "--seeds", "0,1", "--resume"]
    with held(trained / "many" / "seed-1"):
        assert "seed-1 is in use" in refuse(*sweep)
    with held(trained / "many", "seed-0", "seed-1"):
        member = trained / "many" / "seed-1" / LAST
        assert "seed-1 is in use" in refuse("--load", member, "--iterations", 8)


def test_a_lock_ends_with_its_process_however_that_ends(trained):
    with held(trained / "run"):
        pass
    with folders.lock_folder(trained / "run"):
        assert (trained / "run" / LOCK).exists()


def test_a_lock_removes_what_a_killed_process_left_half_written(tmp_path):
    (tmp_path / f".{LAST}.12345.tmp").write_bytes(b"half")
    with folders.lock_folder(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK]


def test_a_refused_start_leaves_nothing_behind(tmp_path, refuse):
    refuse(*SHORT, "--checkpoint-path", tmp_path / "new" / "er", "--dataset", "images:nowhere")
    assert not (tmp_path / "new").exists()


def test_one_at_a_time_works_and_the_others_wait(tmp_path):
    order, waiting = [], threading.Event()

    def second() -> None:
        with lock_file(tmp_path / "lock", on_wait=waiting.set):
            order.append("second")

    thread = threading.Thread(target=second)
    with lock_file(tmp_path / "lock"):
        thread.start()
        assert waiting.wait(5)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]


def test_waiting_can_be_interrupted(tmp_path):
    def second() -> None:
        with lock_file(tmp_path / "lock", interrupted=lambda: True):
            pass

    with ThreadPoolExecutor(1) as pool, lock_file(tmp_path / "lock"):  # released before the pool waits
        waiting = pool.submit(second)
        with pytest.raises(RuntimeError, match="interrupted"):
            waiting.result(5)


# ---- runs in a folder ------------------------------------------------------------------------------


def test_a_folder_with_anything_in_it_is_occupied(tmp_path):
    assert not is_occupied(tmp_path / "new") and not is_occupied(tmp_path)
    (tmp_path / LOCK).touch()
    assert not is_occupied(tmp_path)
    (tmp_path / "notes").touch()
    assert is_occupied(tmp_path) and is_occupied(tmp_path / "notes")


def test_a_runs_folder_stands_for_its_checkpoint(trained):
    assert find_checkpoint(trained / "run", BEST, LAST) == trained / "run" / BEST
    assert find_checkpoint(trained / "run" / LAST, BEST) == trained / "run" / LAST
    for folder in (trained / "many", trained / "many" / LAST):
        assert find_checkpoint(folder, BEST) == folder
    with pytest.raises(UsageError, match=r"is no run, but has some: many, run; name one, such as .*many"):
        find_checkpoint(trained, BEST, LAST)
    (trained / "run" / "empty").mkdir()
    with pytest.raises(UsageError, match=r"has no checkpoint, neither last.pt nor best.pt, and no runs"):
        find_checkpoint(trained / "run" / "empty", BEST, LAST)
    with pytest.raises(UsageError, match="there is no such checkpoint"):
        find_checkpoint(trained / "nowhere.pt", BEST, LAST)


def test_the_runs_of_a_sweep_are_found_by_its_list(trained):
    runs = find_runs(trained / "many")
    assert [(run["seed"], run["file"]) for run in runs] == [
        (seed, trained / "many" / f"seed-{seed}" / BEST) for seed in (0, 1)
    ]
    assert read_results(trained / "run")["iteration"] == 4 and read_results(trained / "many") == {}
    assert [run["file"].name for run in find_runs(trained / "many" / LAST)] == [LAST, LAST]
    assert find_runs(trained / "run") == []
    member, alone = trained / "many" / "seed-0" / LAST, trained / "run" / LAST
    assert load_checkpoint(member).settings == load_checkpoint(alone).settings
