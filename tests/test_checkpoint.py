"""Checkpoints: whole or refused, in one line, and never run."""

import pickle
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from commands import config
from common.errors import UsageError
from training import checkpoint
from training.checkpoint import Checkpoint, Progress, load_checkpoint, save_checkpoint


def a_checkpoint() -> Checkpoint:
    weights = torch.randn(3, 2)
    optimizer = torch.optim.Adam([weights], fused=True)
    weights.grad = torch.ones(3, 2)
    optimizer.step()
    return Checkpoint(
        config.resolve({}), 7, {"0.weight": weights}, optimizer.state_dict(), asdict(Progress())
    )


class RunsCode:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = a_checkpoint()
    save_checkpoint(tmp_path / "last.pt", saved)
    loaded = load_checkpoint(tmp_path / "last.pt")
    assert loaded.config == saved.config and loaded.iteration == 7
    assert torch.equal(loaded.parameters["0.weight"], saved.parameters["0.weight"])
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]  # nothing temporary stays


def test_a_write_cut_short_leaves_the_old_checkpoint_whole(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    save_checkpoint(path, a_checkpoint())
    before = path.read_bytes()

    def half(content, file):
        file.write(before[:100])
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", half)
    with pytest.raises(OSError):
        save_checkpoint(path, a_checkpoint())
    assert path.read_bytes() == before


def test_code_in_a_checkpoint_is_refused_before_it_runs(tmp_path):
    victim = tmp_path / "victim"
    for name, write in (("pickle.pt", pickle.dump), ("torch.pt", torch.save)):
        with (tmp_path / name).open("wb") as file:
            write({"format": checkpoint.FORMAT, "parameters": RunsCode(victim)}, file)
        with pytest.raises(UsageError, match="checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not victim.exists()


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(tmp_path, keep):
    path = tmp_path / "last.pt"
    save_checkpoint(path, a_checkpoint())
    content = path.read_bytes()
    path.write_bytes(content[: keep if isinstance(keep, int) else int(keep * len(content))])
    with pytest.raises(UsageError, match=r"last.pt is"):
        load_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a checkpoint of this tool"),
        ({"version": 99}, "has format version 99; this tool reads up to 2: update the tool"),
        ({"version": 0}, "has format version 0; this tool reads up to 2"),
        ({"version": 2**40}, "has format version 1099511627776; this tool reads up to 2: update"),
        ({"config": {}}, "its settings are not those of this version"),
        ({"config": [1]}, "its settings are missing"),
        ({"iteration": 8}, "is damaged: its checksum does not match"),
        ({"version": 2**70}, "cannot be read"),
        ({"parameters": {"0.weight": torch.ones(3, 2)}}, "is damaged: its checksum does not match"),
        ({"splits": {"train": "ab"}}, "parts of it are missing or of the wrong kind"),
        ({"splits": {"train": [1]}}, "parts of it are missing or of the wrong kind"),
        ({"statistics": {"1": [0.0]}}, "parts of it are missing or of the wrong kind"),
        ({"fixed": {1: torch.ones(2)}}, "parts of it are missing or of the wrong kind"),
        ({"computed_by": {"threads": 0.5}}, "parts of it are missing or of the wrong kind"),
        ({"more": 1}, "is damaged: its checksum does not match"),
        ({"digest": "0" * 64}, "is damaged: its checksum does not match"),
        ({"digest": None}, "is damaged: its checksum does not match"),
        ({"iteration": "7"}, "is damaged"),
        ({"iteration": -1}, "is damaged"),
        ({"parameters": [1]}, "is damaged"),
        ({"version": torch.ones(2)}, "has format version"),
        ({"iteration": True}, "is damaged"),
        ({"iteration": 2**53 + 1}, "is damaged"),
        ({"parameters": {"0.weight": torch.eye(2).to_sparse()}}, "would call torch._utils._rebuild_sparse"),
        (
            {"parameters": {"0.weight": torch.zeros(3, 2, device="meta")}},
            "would call torch._utils._rebuild_m",
        ),
        ({"parameters": {"0.weight": torch.zeros(3, 2, dtype=torch.complex64)}}, "would call torch.Complex"),
        ({"parameters": {"0.weight": torch.zeros(3, 2, dtype=torch.int64)}}, "is damaged"),
        ({"optimizer": None}, "is damaged"),
        ({"optimizer": {"state": {}}}, "is damaged"),
        ({"progress": {}}, "is damaged"),
    ],
)
def test_other_content_is_refused(tmp_path, change, message):
    path = tmp_path / "last.pt"
    save_checkpoint(path, a_checkpoint())
    torch.save(torch.load(path, weights_only=True) | change, path)
    with pytest.raises(UsageError, match=message):
        load_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"exp_avg": torch.zeros(1000)},  # a fused kernel would read past its end
        {"exp_avg_sq": torch.zeros(3, 2, dtype=torch.float64)},
        {"step": torch.zeros(5)},
        {"exp_avg": None},
        {"exp_avg": torch.zeros(1).expand(3, 2)},  # one number in memory
    ],
)
def test_moments_that_do_not_fit_are_refused(tmp_path, change):
    saved = a_checkpoint()
    saved.optimizer["state"][0] |= change
    save_checkpoint(tmp_path / "last.pt", saved)
    with pytest.raises(UsageError, match="is damaged"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize(
    "change",
    [
        {"best_score": "x"},
        {"window_size": 1.5},
        {"window_size": -1},
        {"training": {"iteration": [float("nan")], "query_loss": [1.0]}},
        {"training": {"iteration": [2, 1], "query_loss": [1.0, 1.0]}},
        {"training": {"iteration": [1], "query_loss": [1.0, 2.0]}},
        {"validation": {"iteration": ["1"], "query_loss": [1.0]}},
        {"window": {"query_loss": None}},
    ],
)
def test_curves_of_the_wrong_kind_are_refused(tmp_path, change):
    saved = a_checkpoint()
    saved.progress.update(change)
    save_checkpoint(tmp_path / "last.pt", saved)
    with pytest.raises(UsageError, match="is damaged"):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("content", [b"", b"text", b"\x80\x04K\x01.", b"PK\x03\x04 no archive"])
def test_a_foreign_file_is_refused(tmp_path, content):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UsageError, match="checkpoint"):
        load_checkpoint(tmp_path / "x.pt")


def test_weights_of_another_shape_are_refused():
    wanted = {"a": torch.zeros(2), "b": torch.zeros(3)}
    for saved in ({"a": torch.zeros(2)}, {**wanted, "c": torch.zeros(1)}, {**wanted, "b": torch.zeros(4)}):
        with pytest.raises(UsageError, match=r"x\.pt does not fit the learner conv"):
            checkpoint.fitting_parameters(Path("x.pt"), saved, wanted, "conv")
