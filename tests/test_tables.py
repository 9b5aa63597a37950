"""A user's table: what is read, what is refused in one line, and what is sampled."""

import gzip

import pyarrow as pa
import pytest
import torch
from conftest import read_table, refused
from pyarrow import csv, parquet
from runs import command

from common.random import SPLITS
from tasks.tables import Columns, Table, TableTasks


def write(path, columns: dict) -> None:
    data = pa.table(columns)
    if path.suffix == ".parquet":
        parquet.write_table(data, path)
    else:
        csv.write_csv(data, path)


def numbered(tmp_path, tasks=9, rows=6, classes=0) -> Table:
    """Make a table with x = (row number, task), in which neighbouring rows belong to different tasks.

    With classes, task t has the classes t, t + 1, ...
    """
    index = list(range(tasks * rows * max(classes, 1)))
    task = [i % tasks for i in index]
    label = [t + i // tasks % classes for i, t in zip(index, task, strict=True)] if classes else index
    path = tmp_path / "numbered.parquet"
    write(path, {"task": [f"t{t}" for t in task], "i": index, "t": task, "y": label})
    return read_table(path, classification=bool(classes))


@pytest.mark.parametrize("classification", [False, True])
def test_csv_and_parquet_give_the_same_table(tmp_path, classification):
    columns = {
        "task": pa.array([10, 9, 10, 9]).dictionary_encode(),
        "i": [1, 2, 3, 4],
        "f": [0.5, -1e-3, 1e300, 0.1],
        "y": [10.0, None, 2.0, 10.0],
    }
    for name in ("a.csv", "a.parquet"):
        write(tmp_path / name, columns)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress((tmp_path / "a.csv").read_bytes()))
    for name in ("a.csv", "a.csv.gz", "a.parquet"):
        table = read_table(tmp_path / name, dtype=torch.float64, classification=classification, shares=None)
        assert table.tasks == ["10", "9"] and table.task.tolist() == [0, 1, 0, 1]  # by first appearance
        assert table.x.tolist() == [[1, 0.5], [2, -1e-3], [3, 1e300], [4, 0.1]]
        if classification:
            assert table.classes == ["2", "10"] and table.y.tolist() == [1, -1, 0, 1]
        else:
            assert table.classes == [] and table.y[[0, 2, 3]].tolist() == [[10], [2], [10]]
            assert table.y.shape == (4, 1) and table.y[1].isnan().all()


def test_columns_have_the_roles_that_the_flag_gives_them(tmp_path):
    assert Columns.parse([]) == Columns("task", ("y",), ())
    columns = Columns.parse(["task=person", "target=w, u", "input=v"])
    assert columns == Columns("person", ("w", "u"), ("v",))
    (tmp_path / "a.csv").write_text("person, u,v,w ,spare\n007,1, 2,3,text\n")
    table = read_table(tmp_path / "a.csv", columns)
    assert table.tasks == ["007"] and table.x.tolist() == [[2]] and table.y.tolist() == [[3, 1]]
    (tmp_path / "a.csv").write_text("x,y\n1,7\n2, \n3, NA\n4,8\n")
    table = read_table(tmp_path / "a.csv", shares=None)  # all rows are one task, to predict
    assert table.tasks == ["task"] and table.y.isnan()[:, 0].tolist() == [False, True, True, False]
    table = read_table(tmp_path / "a.csv", classification=True, shares=None)
    assert table.classes == ["7", "8"] and table.y.tolist() == [0, -1, -1, 1]


def test_splits_of_the_file_are_kept(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("task,split,x,y\na,test,1,1\nb,train,1,1\nc,val,1,1\nd,valid,1,1\nb,train,1,1\n")
    table = read_table(path)
    splits = {name: part.tolist() for name, part in table.splits.items()}
    assert splits == {"train": [1], "validation": [2, 3], "test": [0]} and table.x.shape == (5, 1)


BAD = {
    "x,y\n1,2\n": r"has no column 'task', but \['x', 'y'\]",
    "task,x,x,y\na,1,2,3\n": "column 'x' is repeated, or has more than one role",
    ",task,x,y\n0,a,1,1\n": "has pandas' index, or another column",
    "Unnamed: 0,task,x,y\n0,a,1,1\n": "has pandas' index, or another column",
    "": "not readable .*[Ee]mpty",
    "task,x,y\n": r"has a header, \['task', 'x', 'y'\], and no rows: add some",
    "task;x;y\na;1,5;1.5\n": "column 'x' has '1,5', and 'y' has points: does the comma",
    'task,x,y\na,"1,234",1\n': "column 'x' has '1,234': does the comma",
    "task;x;y\na;1,234;1\nb;-5,678;1\n": "column 'x' has '1,234': does the comma",
    "task;x;y\na;1.234,5;1\n": "column 'x' has '1.234,5', and 'x' has points",
    "task;x;y\na;1,2;1\nb;1,2,3;1\n": "column 'x', data row 2: .*'1.2.3'",
    "task,x,y\na,1,1\nb,abc,1\nc,d,1\n": "column 'x', data row 2: .*'abc'",
    "task,x,y,\na,1,1,\nb,1,1,\n": "no separator at the ends of lines",
    "task,x,y\na,1,1\nb, ,1\n": "column 'x', data row 2 is empty, infinite",
    "task,x,y\na,1,1\nb,1e39,1\n": "column 'x', data row 2 .* too large for torch.float32",
    "task,x,y\na,1,NA\nb,1,\n": "column y: no row has a target: fill it",
    "task,x,y\na,1,1\nb,1,inf\n": "column 'y', data row 2 is empty, infinite",
    "task,x,y\na,1,1\n ,1,1\n": "column 'task', data row 2 is empty: fill it",
    "task,split,x,y\na,train,1,1\nb,trial,1,1\n": "a split is 'trial': it should be train, val or test",
    "task,Split,x,y\na,train,1,1\n": "column 'Split' looks like a split: call it split",
    "task,split,x,y\na,train,1,1\nb,test,1,1\na,test,1,1\n": "a is in train and in test",
}


def assert_refused(message: str, path, **options) -> None:
    with refused(message):
        read_table(path, dtype=torch.float32, **options)


@pytest.mark.parametrize("text", BAD)
def test_bad_data_is_named_in_one_line(tmp_path, text):
    (tmp_path / "a.csv").write_text(text)
    assert_refused(BAD[text], tmp_path / "a.csv")


def test_unreadable_files_and_bad_columns_are_named(tmp_path):
    assert_refused("there is no such file", tmp_path / "nowhere.csv")
    for name in ("a.csv", "a.parquet", "a.csv.gz"):
        (tmp_path / name).write_bytes(b"\x89PNG\r\n\x1a\n\0\xff\xfe")
        assert_refused(f"{name} is not readable", tmp_path / name)
        (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
        assert_refused(f"{name} is not readable .*git lfs pull", tmp_path / name)
    for name, content in (("a.xlsx", b"PK\3\4"), ("a.json", b'[{"x": 1}]'), ("a.pkl", b"\x80\4\0")):
        (tmp_path / name).write_bytes(content)
        assert_refused("no text with columns: save it as CSV or Parquet", tmp_path / name)
    path = tmp_path / "b.parquet"
    images = [{"bytes": b"PNG", "path": "a.png"}] * 3
    lists = {"l": [[1, 2, 3], [2, 3], [4, 5]], "i": images}
    write(path, {"task": [*"abc"], "x": [1, 2, 3], "c": [*"uvw"], **lists})
    assert_refused("'l', data row 1 has 3 elements, others 2", path, columns=Columns("task", ("x",), ("l",)))
    assert_refused("holds bytes; images are read with", path, columns=Columns("task", ("x",), ("i",)))
    two = Columns("task", ("x", "c"))
    assert_refused("one target column, not 2", path, columns=two, classification=True)


# ---- sampling -------------------------------------------------------------------------------


def test_a_regression_task_draws_distinct_rows_of_one_task(tmp_path):
    table = numbered(tmp_path)
    tasks = TableTasks(table=table, ways=None, shots=2, queries=3)
    assert not tasks.classification
    for split in SPLITS:
        batch = tasks.sample(split, 0, 0, range(300))
        assert batch.support_x.shape == (300, 2, 2) and batch.support_y.shape == (300, 2, 1)
        assert batch.query_x.shape == (300, 3, 2) and batch.query_y.shape == (300, 3, 1)
        row, task = torch.cat([batch.support_x, batch.query_x], 1).unbind(2)
        assert torch.equal(row[..., None], torch.cat([batch.support_y, batch.query_y], 1))
        assert (row % 9 == task).all() and (task == task[:, :1]).all()
        assert all(len(set(rows)) == 5 for rows in row.tolist())
        assert set(task[:, 0].tolist()) == set(table.splits[split].tolist())


def test_tasks_depend_on_split_seed_iteration_and_position_alone(tmp_path):
    tasks = TableTasks(table=numbered(tmp_path, classes=3), ways=2, shots=1, queries=3)
    whole = tasks.sample("train", 3, 7, range(10))
    parts = [tasks.sample("train", 3, torch.tensor(7), part) for part in (range(4), range(4, 10))]
    for tensor, *pieces in zip(whole, *parts, strict=True):
        assert torch.equal(tensor, torch.cat(pieces))
    for other in (("train", 4, 7), ("train", 3, 8)):
        assert not torch.equal(tasks.sample(*other, range(10)).support_x, whole.support_x)
    more = tasks.resized(3).sample("train", 3, 7, range(10))  # more shots: the same query
    assert more.support_x.shape == (10, 6, 2) and torch.equal(more.query_x, whole.query_x)


def test_all_tasks_and_all_rows_of_a_task_are_equally_likely(tmp_path):
    names = ["a"] * 4 + ["b"] * 8 + ["c"] * 12  # tasks of different sizes
    write(tmp_path / "a.csv", {"task": names, "x": range(24), "y": range(24)})
    table = read_table(tmp_path / "a.csv", shares={"train": 1})
    tasks = TableTasks(table=table, ways=None, shots=1, queries=3)
    batch = tasks.sample("train", 0, 0, range(24_000))
    expected = torch.tensor([8000 / names.count(name) for name in names])
    for x in (batch.support_x, batch.query_x[:, 0]):
        drawn = torch.bincount(x.flatten().long(), minlength=24)
        assert ((drawn - expected).abs() < 5 * expected.sqrt()).all()


def test_a_classification_task_draws_classes_of_one_task_and_labels_them_at_random(tmp_path):
    table = numbered(tmp_path, tasks=4, classes=3)
    batch = TableTasks(table=table, ways=2, shots=2, queries=3).sample("train", 0, 0, range(600))
    assert (batch.support_y == torch.tensor([0, 0, 1, 1])).all()
    assert (batch.query_y == torch.tensor([0, 0, 0, 1, 1, 1])).all()
    x = torch.cat([x.unflatten(1, (2, -1)) for x in (batch.support_x, batch.query_x)], 2)
    row, task = x.long().unbind(3)
    assert (task == task[:, :1, :1]).all() and all(len(set(r.tolist())) == 10 for r in row.flatten(1))
    label = table.y[row]
    assert (label == label[..., :1]).all()  # one class a label
    pairs = (label[..., 0] - task[..., 0]).tolist()  # task t has the classes t, t + 1 and t + 2
    counts = [pairs.count([a, b]) for a in range(3) for b in range(3) if a != b]
    assert sum(counts) == 600 and min(counts) > 60  # any two, in any order


@pytest.mark.parametrize(("classes", "ways", "kept"), [(2, 2, True), (3, 2, False)])
def test_labels_keep_their_meaning_where_all_tasks_have_the_same_classes(tmp_path, classes, ways, kept):
    label = ["b", "a", "c"][:classes] * 8
    task = sorted(["u", "v"] * 4 * classes)
    write(tmp_path / "a.csv", {"task": task, "x": [ord(name) for name in label], "y": label})
    table = read_table(tmp_path / "a.csv", classification=True)
    batch = TableTasks(table=table, ways=ways, shots=2, queries=2).sample("train", 0, 0, range(50))
    means_a = batch.query_x.squeeze(2)[batch.query_y == 0] == ord("a")
    assert means_a.all() == kept and means_a.any()


def test_a_table_that_is_too_small_is_refused(tmp_path):
    table = numbered(tmp_path)
    with refused(r"task 't0' has 6 rows, and -k plus -q is 7 \(9 of 9"):
        TableTasks(table=table, ways=None, shots=3, queries=3).resized(4)
    table = numbered(tmp_path, classes=3)
    with refused("task 't0' has 3 classes, and -n is 4"):
        TableTasks(table=table, ways=4, shots=1, queries=1)
    with refused("task 't0', class '0' has 6 rows, and -k plus -q is 7"):
        TableTasks(table=table, ways=2, shots=4, queries=3)


def test_a_table_without_validation_tasks_is_refused_before_training(tmp_path, capsys):
    (tmp_path / "t.csv").write_text("task,x,y,split\n" + 2 * "t,1,1,train\n")
    line = ["--dataset", f"table:{tmp_path / 't.csv'}", "-k", 1, "-q", 1]
    assert command(*line, "--checkpoint-path", tmp_path / "runs") == 2
    assert "has no validation tasks" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
