"""A checkpoint is whole or refused in one line, and nothing in it is run."""

import pickle
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from runs import assert_same_bits

from commands.resolve import resolve
from common import files
from common.batch import DataRecord
from common.errors import UsageError
from training.checkpoint import (
    FORMAT,
    VERSION,
    Checkpoint,
    check_same_data,
    find_learned_names,
    fitting_parameters,
    load_checkpoint,
    save_checkpoints,
)

RECORD = DataRecord(
    {"train": ["a", "b"], "test": ["c"]}, ["x"], ["16-bit", "0.0", "4095.0"], {"2-way": ["0.1"]}
)


def a_checkpoint(record: DataRecord = RECORD) -> Checkpoint:
    names = ("0.weight", "0.bias")
    weights, first, second = ({name: torch.randn(3, 2) for name in names} for _ in range(3))
    return Checkpoint(
        settings=resolve({}).values(),
        iteration=7,
        parameters=weights,
        exp_avg=first,
        exp_avg_sq=second,
        progress={"best_score": -0.5, "training": {"iteration": [1.0], "query_loss": [2.0]}},
        statistics={"1.mean": torch.randn(5, 2)},
        fixed={"2.scale": torch.tensor(3)},
        **vars(record),
        computed_by={"threads": 1},
    )


@pytest.fixture
def saved(tmp_path) -> Path:
    save_checkpoints({tmp_path / "last.pt": a_checkpoint()})
    return tmp_path / "last.pt"


def test_what_is_saved_is_what_is_loaded(tmp_path):
    checkpoint = a_checkpoint()
    save_checkpoints({tmp_path / "last.pt": checkpoint})
    assert_same_bits(vars(load_checkpoint(tmp_path / "last.pt")), vars(checkpoint))
    assert [path.name for path in tmp_path.iterdir()] == ["last.pt"]  # nothing temporary stays


# ---- writing ---------------------------------------------------------------------------------------


def test_a_write_cut_short_leaves_the_old_file_and_nothing_else(saved, monkeypatch):
    before = saved.read_bytes()

    def cut_short(content, file):
        file.write(before[:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoints({saved: a_checkpoint()})
    assert saved.read_bytes() == before and list(saved.parent.iterdir()) == [saved]


def test_all_files_are_on_the_disk_before_the_first_takes_its_name(tmp_path, monkeypatch):
    events: list[str] = []
    fsync, rename = files.os.fsync, Path.replace
    monkeypatch.setattr(files.os, "fsync", lambda file: (events.append("sync"), fsync(file)))
    monkeypatch.setattr(Path, "replace", lambda a, b: (events.append("rename"), rename(a, b))[1])
    save_checkpoints({tmp_path / name: a_checkpoint() for name in ("best.pt", "last.pt")})
    assert events == ["sync", "sync", "rename", "rename", "sync"]  # the last one of the folder


# ---- reading ---------------------------------------------------------------------------------------


class RunsCode:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return Path.touch, (self.victim,)


def test_code_in_a_file_is_refused_and_never_run(tmp_path):
    victim = tmp_path / "victim"
    for name, write in (("pickle.pt", pickle.dump), ("torch.pt", torch.save)):
        with (tmp_path / name).open("wb") as file:
            write({"format": FORMAT, "parameters": RunsCode(victim)}, file)
        with pytest.raises(UsageError, match="not a checkpoint"):
            load_checkpoint(tmp_path / name)
    assert not victim.exists()


@pytest.mark.parametrize("part", [0, 0.999])
def test_a_truncated_file_is_one_line_and_exit_code_2(saved, part, refuse):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(part * len(content))])
    for flags in (["--eval"], []):
        assert "is truncated: it ends after" in refuse(*flags, "--load", saved)


def test_a_flipped_bit_in_a_tensor_is_refused(saved):
    content, checkpoint, draw = saved.read_bytes(), load_checkpoint(saved), random.Random(0)
    for tensors in (checkpoint.parameters, checkpoint.exp_avg, checkpoint.exp_avg_sq, checkpoint.statistics):
        for tensor in tensors.values():
            spoilt, begin = bytearray(content), content.index(tensor.numpy().tobytes())
            spoilt[begin + draw.randrange(tensor.nbytes)] ^= 1 << draw.randrange(8)
            saved.write_bytes(spoilt)
            with pytest.raises(UsageError, match="is damaged"):
                load_checkpoint(saved)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is damaged, or not a checkpoint of this tool"),  # noise
        ({"0.weight": torch.ones(2)}, "is damaged, or not a checkpoint of this tool"),
        ({"format": FORMAT, "version": VERSION, "later": 1}, "or of another version of this tool: "),
        ({"format": FORMAT, "version": 2}, f"has format version 2, and this tool reads version {VERSION}"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "last.pt")
    if content is None:
        (tmp_path / "last.pt").write_bytes(random.Random(1).randbytes(2**12))
    with pytest.raises(UsageError, match=message):
        load_checkpoint(tmp_path / "last.pt")


@pytest.mark.parametrize("flags", [["--eval", "--load"], ["--load"], ["--init-from"]])
def test_a_path_without_a_checkpoint_is_one_line_and_exit_code_2(tmp_path, flags, refuse):
    assert f"{tmp_path / 'nothing'}: there is no such checkpoint" in refuse(*flags, tmp_path / "nothing")
    assert f"{tmp_path} has no checkpoint, neither last.pt nor best.pt" in refuse(*flags, tmp_path)


# ---- does it fit? ----------------------------------------------------------------------------------


def test_weights_of_another_learner_are_refused_by_name_and_shape():
    ours, theirs = ({"w": torch.ones(size), "b": torch.ones(1)} for size in (2, 3))
    with pytest.raises(UsageError, match=r"does not fit the learner mlp .* w is \(3,\) there, \(2,\) here"):
        fitting_parameters(Path("x.pt"), theirs, ours, "mlp")
    copy = fitting_parameters(Path("x.pt"), ours, {k: v.double() for k, v in ours.items()}, "mlp")
    assert copy["w"].dtype == torch.float64


def test_names_of_learned_classes_are_found_in_what_other_data_hold_out():
    def find(learned: dict[str, list[str]], now: dict[str, list[str]], *splits: str) -> list[str]:
        return find_learned_names(a_checkpoint(DataRecord(learned)), DataRecord(now), *splits)

    now = {"train": ["b"], "validation": ["a", "d"], "test": ["c"]}
    assert find({"train": ["a", "b", "c"], "test": ["d"]}, now, "test") == ["c"]
    assert find({"train": ["a", "b", "c"], "test": ["d"]}, now, "validation", "test") == ["a", "c"]
    mixture = {"train": ["images:A: a"], "test": ["images:B: a"]}  # two sets of equal names
    assert find(mixture, now, "validation") == find({"train": ["a"]}, mixture, "test") == ["a"]
    assert find(mixture, mixture, "test") == find({}, now, "test") == []


def test_another_split_of_the_data_is_refused():
    saved, path = a_checkpoint(), Path("x.pt")
    check_same_data(path, saved, RECORD)
    check_same_data(path, saved, replace(RECORD, splits={"test": ["c"]}, fingerprint={"3-way": ["0.2"]}))
    for change, message in (
        ({"splits": {"test": ["d"]}}, r"different test names \(c differs\)"),
        ({"inputs": ["z"]}, r"different input names \(x differs\)"),
        ({"image_range": []}, r"another range \(16-bit, 0.0, 4095.0; now plain\)"),
        ({"fingerprint": {"2-way": ["0.2"]}}, "sample gave other tasks for the same seeds"),
    ):
        with pytest.raises(UsageError, match=message):
            check_same_data(path, saved, replace(RECORD, **change))
        if "inputs" not in change:
            check_same_data(path, saved, replace(RECORD, **change), other_data=True)
    swapped = a_checkpoint(DataRecord(inputs=["x", "z"]))
    with pytest.raises(UsageError, match=r"different input names \(their order differs\)"):
        check_same_data(path, swapped, DataRecord(inputs=["z", "x"]), other_data=True)
    check_same_data(path, a_checkpoint(DataRecord()), replace(RECORD, image_range=[]))  # of a built-in family
