"""What Windows and macOS lack is not needed: real commands run in a Python from which it is hidden."""

import csv
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, write_classes, write_noise

from common import device, errors, files
from tasks import cache

# Run before anything else is imported. What numpy and PyTorch use themselves, by `sys.platform`, stays.
HIDING = '''
import os, signal, sys, warnings

GONE = """
sysconf sysconf_names confstr fork forkpty sched_getaffinity geteuid getuid getegid getgid getgroups getpgid
getpgrp getsid setsid killpg nice getloadavg statvfs fchmod fchown chown lchown mkfifo pread pwrite sendfile
sync fdatasync posix_fadvise posix_fallocate memfd_create O_DIRECTORY O_NOFOLLOW O_CLOEXEC O_SYNC O_DSYNC
O_NONBLOCK O_TMPFILE O_PATH"""
SIGNALS = "SIGINT SIGTERM SIGABRT SIGFPE SIGILL SIGSEGV SIG_DFL SIG_IGN"

for name in GONE.split():
    os.__dict__.pop(name, None)
for name in dir(signal):
    if name.startswith("SIG") and name not in SIGNALS.split():
        delattr(signal, name)
for name in ("fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog"):
    sys.modules[name] = None

def check(path):
    if str(path).startswith(("/proc", "/sys/fs")):
        raise FileNotFoundError(2, "No such file or directory", str(path))

def stat(path, *arguments, _stat=os.stat, **options):
    check(path)
    return _stat(path, *arguments, **options)

sys.addaudithook(lambda event, arguments: check(arguments[0]) if event == "open" else None)
os.stat = stat
warnings.filterwarnings("ignore", message="only soft file lock")  # Windows has another
warnings.filterwarnings("ignore", category=EncodingWarning, module="matplotlib")
'''

OWN_CODE = '''
"""A user's code, in UTF-8 — \u201c\u65e5\u672c\u201d."""
import warnings

import torch
from torch import nn


def net(outputs, inputs):
    for kind in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
        warnings.warn_explicit("`torch.jit.script` is deprecated", kind, torch.__file__, 1)
    warnings.warn("mind\\nthe step")
    return nn.Sequential(nn.Flatten(), nn.Linear(64, outputs))
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make images whose classes no Windows console can write, a task, and a user's code at a Windows path."""
    folder = tmp_path_factory.mktemp("systems")
    (folder / "hiding").mkdir()
    (folder / "hiding" / "sitecustomize.py").write_text(HIDING, encoding="utf-8")
    write_classes(folder / "data", 10, 4, prefix="\u65e5\u672c")
    write_noise(folder / "task", 8, "support/\u65e5\u672c", "support/b", "query")
    (folder / r"C:\nets\mine.py").write_text(OWN_CODE, encoding="utf-8")
    return folder


def run(place: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a command line in a Python without what other systems lack, with a console in cp1252."""
    line = [sys.executable, str(ROOT / "main.py"), *map(str, arguments)]
    names = ("LOGNAME", "USER", "LNAME", "USERNAME")  # of the user: a container may have none
    more = {k: v for k, v in os.environ.items() if k not in names}
    more |= {"PYTHONPATH": str(place / "hiding"), "XDG_CACHE_HOME": str(place / "cache")}
    more |= {"PYTHONIOENCODING": "cp1252", "PYTHONWARNDEFAULTENCODING": "1"}
    return subprocess.run(line, cwd=place, env=more, capture_output=True, encoding="cp1252", timeout=300)


LEARNER = ("--learner", r"C:\nets\mine.py:net")
SHORT = ("--iterations", 2, "--val-every", 2, "--eval-tasks", 2, "--meta-batch-size", 2, "--compile", "off")


def test_images_are_trained_on_and_evaluated_and_a_users_task_is_predicted(place):
    images = ["--dataset", "images:data", "--image-size", 8, "--channels", 1, "-n", 2, "-k", 2, "-q", 1]
    done = run(place, *images, *SHORT, *LEARNER, "--run-name", "images")
    assert done.returncode == 0 and str(ROOT) not in done.stderr, done.stderr
    done = run(place, "--eval", "--load", "checkpoints/images", *LEARNER, "--eval-tasks", 5)
    assert done.returncode == 0 and str(ROOT) not in done.stderr, done.stderr
    assert "\u00b1" in done.stdout and "Written" in done.stdout
    done = run(place, "--adapt", "task", "--load", "checkpoints/images", *LEARNER)
    assert done.returncode == 0 and r"p(\u65e5\u672c)" in done.stdout, done.stderr
    (line,) = done.stderr.splitlines()  # no deprecation: those are for programmers
    assert line.startswith("main.py: warning: mind the step (") and "mine.py, line " in line
    with (place / "checkpoints" / "images" / "best-adapted-task.csv").open(encoding="utf-8") as file:
        assert "p(\u65e5\u672c)" in next(csv.reader(file))


@pytest.mark.parametrize(
    ("silent", "asked", "expected"),
    [
        (False, [], ["main.py: warning: mind the step (net.py, line 7)"]),
        (True, [], []),
        (False, ["default"], ["FutureWarning", "UserWarning", "UserWarning"]),  # as Python shows them
        (True, ["default"], []),
    ],
)
def test_a_warning_is_one_line_once_unless_this_process_is_silent_or_python_was_asked(
    silent, asked, expected, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "warnoptions", asked)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setattr(errors.logging, "disable", lambda level: None)
    with warnings.catch_warnings(action="always"):
        warnings.showwarning = print_category
        errors.show_warnings(silent=silent)
        warnings.warn_explicit("`torch.jit.script` is deprecated", FutureWarning, "net.py", 3)
        for _ in range(2):
            warnings.warn_explicit("mind\nthe step", UserWarning, "net.py", 7)
    assert capsys.readouterr().err.splitlines() == expected


def print_category(message: Warning | str, category: type[Warning], *_: object) -> None:
    print(category.__name__, file=sys.stderr)


@pytest.mark.parametrize("error", [AttributeError, ValueError, OSError])
def test_a_system_that_does_not_tell_its_memory_has_enough(error, monkeypatch):
    def sysconf(name: str) -> int:
        raise error(name)

    monkeypatch.setattr(device.os, "sysconf", sysconf)
    assert device.machine_memory() is None


def test_a_file_that_is_being_read_on_windows_is_replaced_a_moment_later(tmp_path, monkeypatch):
    refusals, rename = iter([PermissionError(), PermissionError()]), Path.replace

    def replace(a: Path, b: Path) -> Path:
        if refusal := next(refusals, None):
            raise refusal
        return rename(a, b)

    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(Path, "replace", replace)
    files.write_whole(tmp_path / "last.pt", lambda file: file.write(b"new"))
    assert (tmp_path / "last.pt").read_bytes() == b"new"
    refusals = iter([PermissionError("in use")] * 4)
    with pytest.raises(PermissionError):
        files.write_whole(tmp_path / "last.pt", lambda file: file.write(b"newer"))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]


def test_images_on_another_drive_have_a_cache(tmp_path, monkeypatch):
    def relpath(path: Path, start: Path) -> str:
        raise ValueError("path is on mount 'D:', start on mount 'C:'")

    monkeypatch.setattr(cache.os.path, "relpath", relpath)
    monkeypatch.setattr(cache, "is_writable", lambda folder: True)
    (tmp_path / "image").touch()
    image = np.arange(4, dtype=np.uint8).reshape(1, 2, 2)
    pixels = cache.cache_pixels(tmp_path, [tmp_path / "image"], (), (1, 1, 2, 2), lambda: [image])
    assert pixels.flatten().tolist() == [0, 1, 2, 3]


def test_a_folder_that_takes_no_file_is_known(tmp_path):
    assert files.is_writable(tmp_path) and not [*tmp_path.iterdir()]
    assert not files.is_writable(tmp_path / "missing")
