"""Files that are none, and checkpoints whose settings are valid and mean harm: one line each, at once."""

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, at_most

import main
from commands import build as building
from commands.beginning import has_results
from commands.config import resolve
from commands.members import LIST
from commands.several import listed_in
from common.device import Runtime
from common.errors import UsageError
from training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

SAMPLE = ROOT / "tests" / "checkpoints" / "version-2.pt"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(path.parent)  # names of sockets are short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def make_sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


NO_FILES = {
    "a folder": (Path.mkdir, "there is no such checkpoint"),
    "a named pipe": (make_fifo, "there is no such checkpoint (it is a named pipe)"),
    "a socket": (make_socket, "there is no such checkpoint (it is a socket)"),
    "a device": (lambda path: path.symlink_to("/dev/zero"), "there is no such checkpoint (it is a device)"),
    "a circle": (lambda path: path.symlink_to(path), "there is no such checkpoint (Too many levels of"),
    "a terabyte": (make_sparse, "is not a checkpoint of this tool: it was not loaded"),
    "noise": (lambda path: path.write_bytes(os.urandom(2**16)), "is not a checkpoint of this tool"),
}


@pytest.mark.parametrize("flags", ["--eval --load", "--load", "--init-from"])
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_checkpoint_is_refused_in_a_line_unread(kind, flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "last.pt"
    make, message = NO_FILES[kind]
    make(path)
    assert main.main([*flags.split(), str(path)]) == 2
    said = capsys.readouterr().err
    assert f"{path}" in said and message in said and said.count("\n") == 1, said
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_may_not_be_read_is_refused_in_a_line(tmp_path, monkeypatch):
    def forbidden(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "last.pt"
    path.write_bytes(b"")
    monkeypatch.setattr("common.files.opened", forbidden)
    with pytest.raises(UsageError, match=r"last.pt cannot be read \(Permission denied\)"):
        load_checkpoint(path)


DEEP = b'{"a":' * 10**5
JSON = {
    "deep": DEEP,
    "deep list": b"[" * 10**5,
    "long": b'{"iteration": 3, "runs": "' + b"x" * 2**26 + b'"}',
    "no text": b"\xff\xfe\x00",
    "no number": b'{"iteration": NaN, "runs": [{"name": "a", "setting": "", "seed": NaN}]}',
    "a list": b"[3]",
    "a number": b"3",
    "nothing": b"",
    "truth": b'{"iteration": true, "runs": true}',
    "another folder": b'{"runs": [{"name": "../a", "setting": "", "seed": 1}]}',
}


@pytest.mark.parametrize("kind", [*JSON, "a pipe"])
def test_json_that_this_tool_has_not_written_counts_as_none_or_is_refused(kind, tmp_path):
    for name in ("training.json", LIST):
        if kind == "a pipe":
            make_fifo(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(JSON[kind])
    assert not has_results(tmp_path, 3) and not has_results(tmp_path, 1)
    with pytest.raises(UsageError, match=LIST):
        listed_in(tmp_path)


# ---- valid settings -------------------------------------------------------------------------


def hostile(folder: Path, **changes: object) -> Path:
    """The sample, with other settings and a digest that is right."""
    saved = load_checkpoint(SAMPLE)
    save_checkpoint(folder / "last.pt", replace(saved, config=replace(saved.config, **changes)))
    return folder / "last.pt"


LARGE = 2**31 - 1
SETTINGS = {
    "width": ({"learner_args": ("width=100000000",)}, "does not fit the learner mlp width=100000000"),
    "layers": ({"learner_args": ("layers=1000000000",)}, "does not fit the learner mlp layers=1000000000"),
    "narrow": ({"learner_args": ("width=1", "layers=1000000000")}, "far larger"),
    "depth": ({"learner_args": ("width=" + "(" * 5000,)}, "--learner mlp fails"),
    "context": ({"fast_weights": "context", "context_size": 10**5}, "does not fit the learner mlp"),
    "shots": ({"shots": LARGE}, "GiB at the least, and there are"),
    "results": ({"eval_steps": LARGE}, "should be a whole number up to 100,000"),
    "steps": ({"steps": LARGE}, "should be a whole number up to 100,000"),
    "code": ({"learner": "evil:make", "init": "torch"}, "a file is no reason to run it"),
    "loss": ({"loss": "evil.py:loss"}, "a file is no reason to run it"),
    "dataset": ({"dataset": "evil:tasks"}, "a file is no reason to run it"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_checkpoint_that_claims_more_than_it_holds_is_refused_before_it_is_made(name, tmp_path, capsys):
    changes, message = SETTINGS[name]
    (tmp_path / "evil.py").write_text("raise SystemExit('imported')")
    file = hostile(tmp_path, **changes)
    kept = sorted(path.name for path in tmp_path.iterdir())
    for flags in (["--eval"], []):
        with at_most(seconds=30, megabytes=3000):
            assert main.main([*flags, "--load", str(file)]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
        assert sorted(path.name for path in tmp_path.iterdir()) == kept


@pytest.mark.parametrize("argument", ["weights=DEFAULT", "pretrained=True"])
def test_a_checkpoint_fetches_no_weights(argument, monkeypatch):
    asked = []

    def model(name: str, **arguments: object) -> torch.nn.Module:
        asked.append(arguments)
        return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))

    monkeypatch.setattr(torchvision.models, "get_model", model)
    flags = {"dataset": "images:x", "ways": 3, "learner": "torchvision:vgg11", "learner_args": (argument,)}
    config = resolve(flags)
    saved = Checkpoint(config, 1, {"1.weight": torch.zeros(3, 12)}, {}, {})  # nothing that is fixed
    runtime = Runtime(torch.device("cpu"), torch.float32)
    building.module_of(config, runtime, 3, torch.zeros(2, 3, 2, 2), saved=saved)
    assert asked == [{"num_classes": 3}]
