"""TensorBoard's own readers see every point of a run once, and every run in its views."""

import re
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from runs import command, curves, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import api_pb2, metadata

from training.log import RunLog
from training.tensorboard import CHARTS, METRICS, drop_events


def log_points(folder: Path, first: int, last: int) -> RunLog:
    log = RunLog(folder, begin_at=first)
    for iteration in range(first, last + 1):
        log.add({"loss": 1.0}, iteration)
    log.sync()
    return log


# ---- event files -----------------------------------------------------------------------------------


def test_a_resumed_curve_has_neither_gaps_nor_doubled_points(tmp_path):
    log_points(tmp_path, 0, 50)
    log_points(tmp_path, 31, 60)  # in the same second: TensorBoard orders files by name
    assert curves(tmp_path)["loss"] == list(range(61))


def test_a_torn_record_is_dropped_and_a_foreign_file_kept(tmp_path):
    log = log_points(tmp_path, 0, 9)
    file = Path(log.sinks[0].file.name)
    file.write_bytes(file.read_bytes()[:-3])
    foreign = tmp_path / "events.out.tfevents.notes"
    foreign.write_text("mine")
    drop_events(tmp_path, 5)
    foreign_text = foreign.read_text()
    foreign.unlink()
    assert curves(tmp_path)["loss"] == list(range(5)) and foreign_text == "mine"


def test_a_picture_is_the_same_in_tensorboard_and_in_its_file(tmp_path):
    log = RunLog(tmp_path)
    log.figure("fit", Figure(figsize=(1, 1)), 3, tmp_path / "fit.png")
    log.sync()
    events = EventAccumulator(str(tmp_path)).Reload()
    (image,) = events.Images("fit")
    assert (image.step, image.width, image.height) == (3, 100, 100)
    assert (tmp_path / "fit.png").read_bytes()[:4] == image.encoded_image_string[:4] == b"\x89PNG"


# ---- views -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A resumed run, one with learned rates and a ridge head, and one with bands on two data sets."""
    home = tmp_path_factory.mktemp("views")
    line = ["--iterations", 6, "--log-every", 3, "--val-every", 3, "--meta-batch-size", 2]
    line += ["--compile", "off", "--resume"]
    train(home / "maml", *line, "--iterations", 4)
    train(home / "maml", *line)
    train(home / "rates", *line, "--algorithm", "maml++", "--head-init", "ridge")
    train(home / "mixed", *line, "--dataset", "sinusoid", "harmonic", "--loss", "gaussian-nll")
    return home


def hparams_records(folder: Path) -> dict[str, list[bytes]]:
    """Return the records of the hyper-parameter plugin in all event files of a run, by tag."""
    records: dict[str, list[bytes]] = {}
    for path in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    records.setdefault(value.tag, []).append(value.metadata.plugin_data.content)
    return records


def test_the_view_of_hyper_parameters_has_each_run_once(home):
    tags = (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)
    for name in ("maml", "rates"):
        records = hparams_records(home / name)
        assert {tag: len(contents) for tag, contents in records.items()} == dict.fromkeys(tags, 1), name
        experiment, start, end = (records[tag][0] for tag in tags)
        columns = metadata.parse_experiment_plugin_data(experiment)
        row = metadata.parse_session_start_info_plugin_data(start).hparams
        assert row["with/meta_batch_size"].number_value == 2
        assert row["with/algorithm"].string_value == ("maml" if name == "maml" else "maml++")
        assert metadata.parse_session_end_info_plugin_data(end).status == api_pb2.STATUS_SUCCESS
        assert {column.name for column in columns.hparam_infos} >= {"inner_steps", "with/algorithm"}
        first = ["dataset", "inner_lr", "inner_steps", "method", "seed"]
        assert sorted(column.name for column in columns.hparam_infos)[:5] == first
        assert {metric.name.tag for metric in columns.metric_infos} == {*METRICS}
        assert experiment == hparams_records(home / "maml")[metadata.EXPERIMENT_TAG][0]  # the same columns


def test_train_and_validation_come_first_and_the_settings_are_for_people(home):
    for name in ("maml", "rates", "mixed"):
        events = EventAccumulator(str(home / name), size_guidance={"tensors": 0}).Reload()
        tags = [*events.Tags()["scalars"], *events.Tags()["images"]]
        groups = sorted({tag.partition("/")[0] for tag in tags})
        assert groups[:2] == ["train", "validation"]
        text = events.Tensors("settings/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "None" not in text and "()" not in text and "| meta batch size | 2 |" in text


def test_an_evaluation_adds_its_result_to_the_runs_log(home):
    for flags in ((), ("-k", 3), ("-q", 3)):  # the second has other tasks than those of training
        assert command("--eval", "--load", home / "maml", "--eval-tasks", 4, "--eval-steps", 1, *flags) == 0
    assert curves(home / "maml")["verdict/test_query_loss"] in ([3, 3], [6, 6])  # of the best iteration


def test_no_chart_of_a_run_is_empty(home):
    titles = set()
    for name in ("maml", "rates", "mixed"):
        events = EventAccumulator(str(home / name), size_guidance={"tensors": 0}).Reload()
        (tensor,) = events.Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
        patterns = [tag for group in layout.category for chart in group.chart for tag in chart.multiline.tag]
        scalars = events.Tags()["scalars"]
        assert all(any(re.match(pattern, tag) for tag in scalars) for pattern in patterns)
        titles |= {group.title for group in layout.category}
    assert titles == {*CHARTS}
