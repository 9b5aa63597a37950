"""--report-to, offline: trackers have what TensorBoard has, and a resumed run continues there."""

import json
import struct
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from runs import command, curves, train

from common.errors import UsageError
from training import log
from training.folders import LAST
from training.log import RunLog
from training.trainer import Trainer

SHORT = ["--iterations", 24, "--log-every", 2, "--val-every", 6, "--save-every", 8, "--meta-batch-size", 2]
SHORT += ["--compile", "off"]
TRACKERS = (pytest.param("wandb", marks=pytest.mark.slow), "trackio")
History = list[tuple[int, dict]]  # what was logged at each iteration


@pytest.fixture(scope="module", autouse=True)
def _offline(tmp_path_factory):
    store = tmp_path_factory.mktemp("trackio")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("WANDB_SILENT", "true")
        patch.setenv("TRACKIO_DIR", str(store))  # read at import, which no other test does
        yield


def records_of(file: Path) -> Iterator[bytes]:
    """Yield the records of a log in LevelDB's format: blocks of 32 KiB, records in one piece or several."""
    data, position, record = file.read_bytes(), 7, b""  # after the file's own header
    while position < len(data):
        if 2**15 - position % 2**15 < 7:  # too little for another piece
            position += 2**15 - position % 2**15
        _, length, kind = struct.unpack_from("<IHB", data, position)
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def records_when_written(file: Path) -> list:
    """Return a file's records; W&B's service still writes some after `finish` has returned."""
    from wandb.proto.wandb_internal_pb2 import Record

    for _ in range(300):
        records = [Record.FromString(record) for record in records_of(file)]
        if records[-1:] and records[-1].HasField("exit"):
            return records
        time.sleep(0.1)
    raise AssertionError(f"{file} does not end")


def read_wandb(run: Path) -> tuple[list[str], dict, History]:
    """Return the ids, the settings and the history of the offline runs in a folder."""
    ids, config, history = [], {}, []
    for file in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        ids.append(file.stem.removeprefix("run-"))
        for record in records_when_written(file):
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
            row = {[*i.nested_key, i.key][0]: json.loads(i.value_json) for i in record.history.item}
            history += [(row["iteration"], row)] if row else []
    return ids, config, history


def read_trackio(run: Path) -> tuple[list[str], dict, History]:
    """Return the same from Trackio's local store."""
    from trackio.sqlite_storage import SQLiteStorage

    name = f"{run.name}-{json.loads((run / 'trackio.json').read_text())['id']}"
    rows = [(row.pop("step"), row) for row in SQLiteStorage.get_logs("maml", name)]
    return [name], SQLiteStorage.get_run_config("maml", name), rows


READERS = {"wandb": read_wandb, "trackio": read_trackio}


@pytest.mark.parametrize("tracker", TRACKERS)
def test_a_tracker_has_what_tensorboard_has_and_a_resumed_run_continues_there(tracker, tmp_path, monkeypatch):
    pytest.importorskip(tracker)
    run, step = tmp_path / "run", Trainer.step
    line = [*SHORT, "--checkpoint-path", tmp_path, "--run-name", "run"]
    line += ["--report-to", f"tensorboard,{tracker}"]

    def killed(self: Trainer) -> None:
        if self.iteration == 15:  # after the validation at 12, with last.pt of iteration 8
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", killed)
        assert command(*line) == 130
    assert command("--load", run / LAST) == 0
    ids, settings, history = READERS[tracker](run)
    assert len({*ids}) == 1
    assert settings["meta_batch_size"] == 2 and settings["algorithm"] == "maml"
    points = Counter((tag, iteration) for iteration, row in history for tag in row)
    for tag, iterations in curves(run).items():
        assert [points[tag, iteration] for iteration in iterations] == [1] * len(iterations), tag
    assert {"view/training", "results"} <= {tag for tag, _ in points}
    # a test joins them, once
    assert command("--eval", "--load", run, "--eval-tasks", 4, "--report-to", tracker) == 0
    after, _, history = READERS[tracker](run)
    assert {*after} == {*ids}
    tests = [row for _, row in history if "test-sinusoid-10shot-10query-4tasks" in row]
    assert len(tests) == 1


def test_runs_at_once_have_a_run_each_in_one_group(tmp_path):
    pytest.importorskip("trackio")
    train(tmp_path / "many", *SHORT, "--seeds", "0-1", "--report-to", "trackio")
    for seed in (0, 1):
        _, settings, history = read_trackio(tmp_path / "many" / f"seed-{seed}")
        assert (settings["seed"], settings["_Group"]) == (seed, "many")
        assert sum("train/query_loss" in row for _, row in history) == 12
    assert not [*tmp_path.glob("many/seed-0/events*")]  # TensorBoard was not asked for


@pytest.mark.parametrize("part", ["log", "finish"])
def test_a_tracker_that_fails_in_training_costs_one_line_and_no_point(part, tmp_path, monkeypatch, capsys):
    sent: list[tuple[str, int]] = []
    failing = {"on": True}

    def work(name: str) -> None:
        if name == part and failing["on"]:
            raise ConnectionError("the server\nhas gone")

    def open_stub(*_: object) -> tuple[object, object, object]:
        def log(values: dict, iteration: int) -> None:
            work("log")
            sent.extend((tag, iteration) for tag in values)

        library = SimpleNamespace(Image=lambda _: None, Table=lambda **_: None)
        return library, SimpleNamespace(finish=lambda: work("finish")), log

    def recovered(self: Trainer) -> None:
        failing["on"] = part == "finish" or self.iteration < 16  # after the checkpoint at 8
        step(self)

    step = Trainer.step
    monkeypatch.setitem(log.OPEN, "wandb", open_stub)
    monkeypatch.setattr(Trainer, "step", recovered)
    train(tmp_path / "run", *SHORT, "--report-to", "tensorboard,wandb")
    warning = "warning: --report-to wandb fails (ConnectionError: the server has gone): the run continues"
    assert capsys.readouterr().err.count(warning) == 1
    expected = [(tag, iteration) for tag, points in curves(tmp_path / "run").items() for iteration in points]
    assert {*expected} <= {*sent} and len({*sent}) == len(sent)
    assert {"view/training", "results"} <= {tag for tag, _ in sent}


def test_a_missing_package_and_an_unknown_tracker_are_one_line(refuse, monkeypatch, tmp_path):
    assert "expected some of tensorboard, wandb, trackio" in refuse("--report-to", "tensorboard,mlflow")
    assert "--report-to with --eval needs --load" in refuse("--eval", "--report-to", "tensorboard")
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = "--report-to wandb needs a package: pip install wandb"
    assert line in refuse("--report-to", "wandb")
    with pytest.raises(UsageError, match=line):  # of a checkpoint's settings
        RunLog(tmp_path, "wandb")
