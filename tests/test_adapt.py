"""--adapt predicts the rest of a folder or table, and the written weights predict the same."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from PIL import Image
from runs import adapt, command, read_csv
from torch import nn

SHORT = ["--iterations", 1, "--val-every", 1, "--eval-tasks", 2, "--meta-batch-size", 2, "--test-steps", 2]

OWN_CODE = """
from torch import nn

def network(outputs, inputs, dropout=0.0):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(inputs[0] * inputs[1] * inputs[2], 12), nn.BatchNorm1d(12), nn.Tanh(),
        nn.Dropout(dropout), nn.Linear(12, outputs))

def vectors(outputs):
    return nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, outputs))
"""


def write_images(folder: Path, level: int, count: int) -> None:
    """Write grey images of about that brightness."""
    folder.mkdir(parents=True, exist_ok=True)
    images = np.random.default_rng(level).integers(level - 9, level + 10, (count, 8, 8), dtype=np.uint8)
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(folder / f"{level}-{number}.png")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Make a folder with a user's code, images to learn from, images to adapt to, and a table with gaps."""
    folder = tmp_path_factory.mktemp("adapt")
    (folder / "own.py").write_text(OWN_CODE)
    for number in range(10):
        write_images(folder / "data" / f"class{number}", 20 * number + 20, 4)
    for number, level in enumerate((20, 120, 220)):
        write_images(folder / "task" / "support" / f"kind {number}", level, 2)
        write_images(folder / "task" / "query", level + 1, 2)
    (folder / "mine.csv").write_text("x,y\n0,1\n1,\n2,5\n3,\n4,9\n")
    return folder


def images(place: Path) -> list[object]:
    return ["--dataset", f"images:{place / 'data'}", "--image-size", 8, "--channels", 1, "-n", 2, "-q", 1]


def train(folder: Path, name: str, *flags: object) -> Path:
    return runs.train(folder / name, *SHORT, "-k", 2, "-q", 2, *flags) / "last.pt"


@pytest.fixture(scope="module")
def curves(tmp_path_factory) -> Path:
    """Return the checkpoint of a run on curves."""
    return train(tmp_path_factory.mktemp("curves"), "run")


def test_a_folder_is_predicted_and_the_written_weights_predict_the_same(
    place, tmp_path, monkeypatch, pictures
):
    code = ["--learner", f"{place / 'own.py'}:network"]
    flags = [*images(place), *code, "--head-init", "prototype", "--learner-args", "dropout=0.2"]
    last = train(tmp_path, "run", *flags)
    assert command("--adapt", place / "task", "--load", last, *code, "--out", tmp_path / "out") == 0
    stem = tmp_path / "out" / "last-adapted-task"
    header, *rows = read_csv(Path(f"{stem}.csv"))
    assert header == ["file", "prediction", "p(kind 0)", "p(kind 1)", "p(kind 2)"] and len(rows) == 6
    shares = torch.tensor([[float(cell) for cell in row[2:]] for row in rows])
    assert torch.allclose(shares.sum(1), torch.ones(6), atol=1e-5)
    kinds = {"21": "kind 0", "121": "kind 1", "221": "kind 2"}
    assert [row[1] for row in rows] == [kinds[row[0].partition("-")[0]] for row in rows]
    assert Path(f"{stem}.png").stat().st_size > 5000 and Path(f"{stem}.json").is_file()
    monkeypatch.syspath_prepend(place)
    import own  # the user's module, in the user's program

    network = own.network(3, (1, 8, 8), dropout=0.2)
    network.load_state_dict(torch.load(f"{stem}-weights.pt", weights_only=True))
    pixels = [np.array(Image.open(place / "task" / "query" / row[0])) for row in rows]
    x = torch.from_numpy(np.stack(pixels))[:, None] / 255
    assert torch.allclose(network.eval()(x).softmax(1), shares, atol=2e-5)


def test_names_of_folders_are_read_in_any_case_and_labels_count_from_0(place, tmp_path, capsys):
    last = train(tmp_path, "run", *images(place), "--learner", "fc", "--head-init", "prototype")
    shutil.copytree(place / "task" / "support", tmp_path / "Task" / "SUPPORT")
    shutil.copytree(place / "task" / "query", tmp_path / "Task" / "Query")
    assert adapt(last, place / "task") == adapt(last, tmp_path / "Task")
    x = np.random.default_rng(0).random((4, 1, 8, 8))
    for labels, code in (([1, 2, 2], 2), ([0, 1, 1], 0)):
        np.savez(tmp_path / "x.npz", support_x=x[:3], support_y=np.array(labels), query_x=x[3:])
        assert command("--adapt", tmp_path / "x.npz", "--load", last) == code
    said = capsys.readouterr().err
    assert "labels in support_y are 1, 2: count them from 0, without a gap" in said and "ink" not in said
    inverted = train(tmp_path, "inverted", *images(place), "--learner", "fc", "--invert")
    np.savez(tmp_path / "x.npz", support_x=x[:2], support_y=np.arange(2), query_x=x[2:])
    assert command("--adapt", tmp_path / "x.npz", "--load", inverted) == 0
    assert "pixels are taken as the network gets them: ink is 1" in capsys.readouterr().err


def test_the_inputs_of_a_table_are_those_of_training_by_name(tmp_path, refuse):
    rows = [f"{t},{i},{t - i},{3 * t + i}" for t in range(9) for i in range(5)]
    (tmp_path / "data.csv").write_text("\n".join(["task,width,height,y", *rows]))
    last = train(tmp_path, "run", "--dataset", f"table:{tmp_path / 'data.csv'}")
    a, b, c = (tmp_path / f"{name}.csv" for name in "abc")
    a.write_text("width,height,y\n1,2,3\n4,7,\n")
    b.write_text("y,height,note,width\n3,2,-,1\n,7,-,4\n")
    c.write_text("length,height,y\n1,2,3\n4,7,\n")
    assert adapt(last, a) == adapt(last, b)
    assert "has no column 'width'" in refuse("--adapt", c, "--load", last)
    assert adapt(last, c, "--columns", "input=length,height")
    (tmp_path / "data.csv").write_text("\n".join(["task,height,width,y", *rows]))
    assert "different input names (their order differs)" in refuse("--eval", "--load", last)


def test_tasks_of_a_table_are_adapted_to_separately(curves, tmp_path, refuse):
    both = tmp_path / "both.csv"
    both.write_text("task,x,y\na,0,1\nb,0,-1\na,1,\nb,1,\na,2,5\nb,2,3\n")
    header, *rows = adapt(curves, both)
    assert header == ["row", "task", "y"] and [row[:2] for row in rows] == [["3", "a"], ["4", "b"]]
    (tmp_path / "one.csv").write_text("x,y\n0,-1\n1,\n2,3\n")
    assert adapt(curves, tmp_path / "one.csv")[1][1] == rows[1][2]
    assert not (curves.parent / "last-adapted-both-weights.pt").exists()  # of which task?
    line = refuse("--adapt", both, "--load", curves, "--save-weights", tmp_path / "net.pt2")
    assert "net.pt2: there are 2 tasks: give one" in line


def test_per_step_statistics_predict_by_default_and_are_written(place, tmp_path):
    code = ["--learner", f"{place / 'own.py'}:vectors"]
    last = train(tmp_path, "run", *code, "--algorithm", "maml++", "-s", 2)
    predicted = []
    for norm in ([], ["--batch-norm", "inductive"]):
        predicted.append(float(adapt(last, place / "mine.csv", *code, *norm)[1][1]))
        network = nn.Sequential(nn.Linear(1, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 1))
        weights = last.parent / "last-adapted-mine-weights.pt"
        network.load_state_dict(torch.load(weights, weights_only=True))
        assert network.eval()(torch.tensor([[1.0]])).item() == pytest.approx(predicted[-1], abs=1e-4)
    assert predicted[0] != pytest.approx(predicted[1], abs=1e-3)


def test_data_that_does_not_fit_is_refused_in_one_line_and_leaves_nothing(place, curves, tmp_path, refuse):
    last = train(tmp_path, "run", *images(place), "--learner", "fc")
    (tmp_path / "full.csv").write_text("x,y\n1,2\n")
    (tmp_path / "bare.csv").write_text("x,y\n1,\n")
    for number, part in enumerate(("Support/a", "Support/b", "Query/more")):
        write_images(tmp_path / "deep" / part, 20 + 70 * number, 2)
    x = np.zeros((2, 1, 8, 8))
    arrays = {"support_x": x, "support_y": np.arange(2), "query_x": x}
    for name, wrong in {
        "from_one": {"support_y": np.arange(1, 3)},
        "below": {"support_y": np.arange(-1, 1)},
        "bytes": {"query_x": x + 255},
        "nan": {"support_x": x * np.nan},
    }.items():
        np.savez(tmp_path / f"{name}.npz", **arrays | wrong)
    np.save(tmp_path / "x.npy", np.zeros((2, 1)))
    folders = (tmp_path, curves.parent)
    before = [{*folder.rglob("*")} for folder in folders]
    out = ["--test-steps", 400, "--out", tmp_path / "full.csv"]
    for checkpoint, path, more, expected in (
        (last, place / "task", [], "3 classes, and the checkpoint learned 2"),
        (last, tmp_path / "deep", [], "1 others lie in folders: put images to predict directly into"),
        (last, tmp_path / "from_one.npz", [], "support_y has a label 2, and labels are 0 to 1"),
        (last, tmp_path / "below.npz", [], "support_y has a label -1, and labels are 0 to 1"),
        (last, tmp_path / "nan.npz", [], "not finite: support_x has numbers that are not: mend them"),
        (last, tmp_path / "bytes.npz", [], "have pixels above 1: give them from 0 to 1"),
        (curves, tmp_path / "x.npy", [], "x.npy is one array: give three, which numpy.savez"),
        (last, tmp_path / "nowhere", [], "there is no such file or folder"),
        (last, place / "task" / "support", [], "into support/<class>/"),
        (last, place / "mine.csv", [], "the checkpoint learned from images: give a folder"),
        (last, place / "task", ["-k", 3], "--adapt and -k"),
        (curves, place / "task", [], "the checkpoint learned from numbers: give a table"),
        (curves, tmp_path / "full.csv", [], "and others, to predict"),
        (curves, tmp_path / "bare.csv", [], "give rows with targets"),
        (curves, place / "mine.csv", out, "file exists"),
    ):
        assert expected in refuse("--adapt", path, "--load", checkpoint, *more)
    assert [{*folder.rglob("*")} for folder in folders] == before
