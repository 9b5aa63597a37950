"""Files as people have them: separators, decimal commas, gaps, lists, and classes that tasks are made of."""

import json
from collections import Counter
from functools import partial
from random import Random

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import read_table, refused
from pyarrow import parquet
from runs import command

from common.errors import UsageError
from common.random import SPLITS
from tasks.tables import Columns, TableTasks

SHARES = {"train": 2, "validation": 1, "test": 2}
BY_CLASS = Columns(None, ("kind",), by_class=True)


table_of = partial(read_table, shares={"train": 1})
FILES = {  # each holds task a, a, b with x 1.5, -2, 1000 and y 0, 0.25, 3e3
    "comma": "task,x,y\na,1.5,0\na,-2,.25\nb,1000,3e3\n",
    "quoted": '"task","x","y"\n"a","1.5","0"\n"a","-2",".25"\n"b","1000","3e3"\n',
    "quoted commas": 'task,x,y\na,"1,5",0\na,-2,"0,25"\nb,1000,3e3\n',
    "decimal comma": "task;x;y\r\na;1,5;0\r\na;-2;0,25\r\nb;1000,000;3e3\r\n",
    "tab": "task\tx\ty\na\t1,5\t0\na\t-2,0\t0,250\nb\t1000\t3,0e3\n",
    "pipe": "task|x|y\na| 1.5|0\na|-2|.25\nb|1000|3e3\n",
    "colon": "task:x:y\na:1.5:0\na:-2:.25\nb:1000:3e3\n",
    "spaces": "task   x     y\na      1.5   0\n  a   -2    .25\nb   1000    3e3  \n",
    "caret": "task^x^y\na^1.5^0\na^-2^.25\nb^1000^3e3\n",
    "comma in a quoted name": 'task;"x";y\n"a";1.5;0\na;-2;.25\n"b";1000;3e3\n',
    "gap": "task,x,y\na,1.5,0\na,-2,.25\n,,\nc,7,NA\nb,1000,3e3\nb,,?\n",
}


@pytest.mark.parametrize("name", FILES)
def test_any_usual_text_is_read_to_the_same_numbers(tmp_path, name):
    for number, content in enumerate([FILES[name].encode(), b"\xef\xbb\xbf" + FILES[name].encode()]):
        (tmp_path / f"{number}.csv").write_bytes(content)
    (tmp_path / "2.csv").write_text(FILES[name], encoding="utf-16")
    for number in range(3):
        table = table_of(tmp_path / f"{number}.csv")
        assert table.tasks == ["a", "b"] and table.task.tolist() == [0, 0, 1]
        assert table.x.tolist() == [[1.5], [-2], [1000]] and table.y.tolist() == [[0], [0.25], [3e3]]
        assert table.left_out == {"rows without a target": 3 if name == "gap" else 0}


def test_true_and_false_are_numbers(tmp_path):
    table = pa.table({"task": ["a", "a"], "x": [True, False], "y": [1, 2]})
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("task,x,y\na,True,1\na,false,2\n")
    assert all(table_of(tmp_path / name).x.tolist() == [[1], [0]] for name in ("a.parquet", "a.csv"))


def test_rows_without_a_target_are_left_out_and_cells_are_counted_as_in_the_file(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("task,x,y,split\na,1,NA,\na,2,1,train\nb,3,,test\n")
    table = table_of(path, shares=SHARES)
    assert table.x.tolist() == [[2]] and table.tasks == ["a"]
    assert table.left_out == {"rows without a target": 2}
    labels = pa.table({"task": ["a"] * 3, "x": [1, 2, 3], "y": [1.0, None, float("nan")]})
    parquet.write_table(labels, tmp_path / "a.parquet")
    table = table_of(tmp_path / "a.parquet", classification=True)
    assert table.classes == ["1"] and table.y.tolist() == [0]
    path.write_text("task,x,y\na,1,NA\na,,2\n")
    with refused("column 'x', data row 2 is empty"):
        table_of(path)


@pytest.mark.parametrize("seed", range(3))
def test_files_of_a_hundred_kinds_are_read_or_refused_in_a_line(tmp_path, seed):
    """Cells that people have by mistake, in any column, never end in another error."""
    random = Random(seed)
    cells = ["NA", "", "1,5", "1,234", "inf", "abc", "1e400", "?", "é", "5%", "2024-01-01", "True", '"a"']
    for _ in range(35):
        mark = random.choice(",;\t| ")
        names = random.sample(["task", "y", "x", "x2", "split", "a b"], random.randint(2, 5))
        usual = {"task": "abc", "y": "012", "split": ["train", "val", "test"]}
        rows = []
        for _ in range(random.randint(0, 12)):
            kinds = [cells if random.random() < 0.05 else usual.get(name, ["0.5", "-1"]) for name in names]
            rows.append(mark.join(map(random.choice, kinds)))
        text = "\n".join([mark.join(names), *rows]) + random.choice(["", "\n", "\n\n"])
        coding = random.choice(["utf-8", "utf-8-sig", "utf-16", "latin-1"])
        (tmp_path / "a.csv").write_bytes(text.encode(coding))
        ways = random.choice([None, 2])
        try:
            table = table_of(tmp_path / "a.csv", classification=bool(ways), shares=SHARES)
            scales = table.measure_scales(targets=True)
            tasks = TableTasks(table=table, ways=ways, shots=1, queries=1, scales=scales)
            for split in SPLITS:
                batch = tasks.sample(split, 0, 0, range(3))
                assert all(part.isfinite().all() for part in batch)
        except UsageError as error:
            assert "\n" not in str(error)


def test_lists_are_columns_and_class_labels_have_their_names(tmp_path):
    vectors = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    data = pa.table({"kind": [1, 0, -1, 1], "vector": vectors.tolist(), "more": [9, 8, 7, 6]})
    features = {"kind": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    parquet.write_table(data.replace_schema_metadata(metadata), tmp_path / "a.parquet")
    table = table_of(tmp_path / "a.parquet", BY_CLASS, classification=True)
    assert table.classes == ["cat", "dog"] and table.y.tolist() == [1, 0, 1]
    assert table.inputs == ("vector", "more") and table.left_out == {"rows without a target": 1}
    expected = np.concatenate([vectors.reshape(4, 6), [[9], [8], [7], [6]]], 1)[[0, 1, 3]]
    assert np.array_equal(table.x.numpy(), expected)


# ---- classes that tasks are made of --------------------------------------------------------------


def write_classes(path, sizes: dict[str, int], header: str = "kind,code,number", more: str = "") -> None:
    rows = [f"{name},{ord(name)},{i}{more}" for name, size in sizes.items() for i in range(size)]
    path.write_text("\n".join([header, *rows]))


def test_tasks_are_made_of_the_classes_of_one_split(tmp_path):
    write_classes(tmp_path / "a.csv", dict.fromkeys("abcdefghij", 4))
    table = table_of(tmp_path / "a.csv", BY_CLASS, classification=True, shares=SHARES)
    tasks = TableTasks(table=table, ways=2, shots=1, queries=2)
    names = tasks.record.splits
    assert [len(names[split]) for split in SPLITS] == [4, 2, 4] and tasks.record.inputs == ["code", "number"]
    assert sorted("".join("".join(names[split]) for split in SPLITS)) == list("abcdefghij")
    for split in SPLITS:
        batch = tasks.sample(split, 0, 0, range(600))
        assert torch.equal(batch.support_y, torch.tensor([[0, 1]]).expand(600, 2))
        x = torch.cat([part.unflatten(1, (2, -1)) for part in (batch.support_x, batch.query_x)], 2).long()
        code, number = x.unbind(3)
        assert (code == code[..., :1]).all()  # a label is a class
        assert all(len(set(rows)) == 3 for rows in number.flatten(0, 1).tolist())  # of different rows
        pairs = Counter(map(tuple, code[..., 0].tolist()))
        ways = [(ord(a), ord(b)) for a in names[split] for b in names[split] if a != b]
        assert pairs.keys() == {*ways} and min(pairs.values()) > 600 / len(ways) / 2  # in any order


def test_a_split_of_the_file_divides_the_classes(tmp_path):
    (tmp_path / "a.csv").write_text("kind,x,split\nu,1,Train\nv,1,TEST\nw,1,validation\nu,2,train\n")
    table = table_of(tmp_path / "a.csv", BY_CLASS, classification=True)
    assert table.split_names == {"train": ["u"], "validation": ["w"], "test": ["v"]}
    (tmp_path / "a.csv").write_text("kind,x,split\nu,1,train\nu,1,test\n")
    with refused("u is in train and in test"):
        table_of(tmp_path / "a.csv", BY_CLASS, classification=True)


def test_small_groups_are_counted_and_left_out(tmp_path):
    write_classes(tmp_path / "a.csv", dict.fromkeys("abcdefgh", 4) | dict.fromkeys("ij", 2))
    few = table_of(tmp_path / "a.csv", BY_CLASS, classification=True, shares=SHARES)
    with refused(r"class 'i' has 2 rows.*\(2 of 10 have too few\).*--min-examples 3"):
        TableTasks(table=few, ways=2, shots=1, queries=2)
    options = {"classification": True, "shares": SHARES, "min_examples": 3}
    table = table_of(tmp_path / "a.csv", BY_CLASS, **options)
    assert table.classes == list("abcdefgh") and table.left_out["classes with fewer than 3 rows"] == 2
    TableTasks(table=table, ways=2, shots=1, queries=2)
    rows = ["a,u,1", "a,u,2", "a,v,3", "a,v,4", "b,u,5", "b,u,6", "b,v,7", "c,u,8", "c,u,8", "c,w,9", "c,w,9"]
    (tmp_path / "b.csv").write_text("\n".join(["task,y,x", *rows]))
    options = {"classification": True, "min_examples": 2, "min_classes": 2}
    table = table_of(tmp_path / "b.csv", **options)  # task b has one class of two rows
    assert table.tasks == ["a", "c"] and table.x[:, 0].tolist() == [1, 2, 3, 4, 8, 8, 9, 9]
    assert table.classes == ["u", "v", "w"]
    few = {"classes with fewer than 2 rows": 1, "tasks with fewer than 2 classes of them": 1}
    assert table.left_out == few | {"rows without a target": 0}


def test_class_tasks_are_learned_tested_and_adapted_to(tmp_path, capsys):
    write_classes(tmp_path / "a.csv", dict.fromkeys("abcdefghij", 4), "kind,code,number,note", ",text")
    line = ["--dataset", f"table:{tmp_path / 'a.csv'}", "-n", 2, "-k", 1, "-q", 2, "--iterations", 2]
    line += ["--columns", "class=kind", "--split-shares", "2,1,2", "--eval-tasks", 4]
    run = ["--checkpoint-path", tmp_path, "--run-name", "run"]
    assert command(*line, *run) == 2
    assert "'note', data row 1: Failed to parse string: 'text'" in capsys.readouterr().err
    assert command(*line, *run, "--exclude-columns", "note") == 0
    printed = capsys.readouterr().out
    assert "  data     40 rows; classes: 4 train, 2 validation, 4 test" in printed
    assert "inputs: code, number\n" in printed
    assert command("--eval", "--load", tmp_path / "run") == 0
    (tmp_path / "mine.csv").write_text("number,code,kind\n0,97,a\n1,98,b\n2,98,\n")
    assert command("--adapt", tmp_path / "mine.csv", "--load", tmp_path / "run") == 0
    header = (tmp_path / "run" / "best-adapted-mine.csv").read_text().splitlines()[0]
    assert header == "row,prediction,p(a),p(b)"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--columns", "class=a"], "--columns class=NAME: give -n"),
        (["--columns", "class=a", "task=b", "-n", 2], "leave task= and target= out"),
        (["--columns", "task=a", "task=b"], "--columns: task= is given twice"),
    ],
)
def test_roles_that_contradict_each_other_are_refused(flags, message, capsys):
    assert command("--dataset", "table:a.csv", *flags) == 2
    assert message in capsys.readouterr().err
