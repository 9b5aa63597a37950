"""Images in Parquet files, as Hugging Face exports them, read as Pillow reads the files themselves."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import class_names, refused
from PIL import Image
from pyarrow import parquet
from runs import command

from common.random import SPLITS
from tasks.images import image_set, open_images
from tasks.pixels import Form, ImageColumn, StoredImage

FORM = Form(6, 3)
SHARES = {"train": 2, "validation": 1, "test": 2}


def png(number: int) -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write(path, labels: list, first: int = 0, names: tuple[str, ...] = (), **more) -> None:
    """Write one image a label, numbered from `first`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(first + i), "path": f"{i}.png"} for i in range(len(labels))]
    table = pa.table({"image": images, "label": labels, **more})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(metadata)
    parquet.write_table(table, path, row_group_size=3)


def opened(path, columns=(), least=0):
    return open_images(path, FORM, SHARES, columns, least)


def resized(number: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png(number))).resize((6, 6), Image.Resampling.LANCZOS))


def test_the_pixels_are_those_of_the_same_images_in_folders(tmp_path):
    labels = ["b", "a", "c", "b", "a", "c", "e", "d", "e", "d"]
    write(tmp_path / "data" / "part-0.parquet", labels[:4])
    write(tmp_path / "data" / "part-1.parquet", labels[4:], first=4)
    for number, label in enumerate(labels):
        (tmp_path / "folder" / label).mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / label / f"{number}.png").write_bytes(png(number))
    stored, files = opened(tmp_path), opened(tmp_path / "folder")
    assert stored.names == files.names == list("abcde") and torch.equal(stored.count, files.count)
    assert torch.equal(stored.load(), files.load())
    assert all(torch.equal(stored.splits[split], files.splits[split]) for split in SPLITS)
    assert stored.load().shape == (10, 3, 6, 6)
    assert stored.summary[0].startswith("classes: 2 (4 images) for training, 1 (2 images) for validation, 2")


def test_a_class_label_has_its_name_and_images_without_one_are_left_out(tmp_path):
    path = tmp_path / "train-00000-of-00001.parquet"
    write(path, [2, 0, -1, 1, 3, 4, None], names=("ant", "bee", "cat", "dog", "elk"))
    images = opened(path)
    assert images.names == ["ant", "bee", "cat", "dog", "elk"] and images.count.tolist() == [1] * 5
    assert "left out: 2 images without a class" in images.summary
    assert np.array_equal(images.load()[1].permute(1, 2, 0), resized(3))  # the bee


def test_a_file_is_released_whoever_decoded_its_images(tmp_path):
    (tmp_path / "file").touch()
    column = ImageColumn(tmp_path / "file", "image", lambda: png)
    groups = {"all": {name: [StoredImage(column, row)] for row, name in enumerate("abc")}}
    splits = {"train": ["a"], "validation": ["b"], "test": ["c"]}
    images = image_set(tmp_path, groups, splits, FORM)
    for _ in ("decoded", "from the cache"):
        column.content(0)
        images.load()
        assert column.read is None


def test_splits_of_files_are_kept_if_their_classes_are_apart(tmp_path):
    write(tmp_path / "train-0.parquet", ["a", "b"])
    write(tmp_path / "validation-0.parquet", ["c"])
    write(tmp_path / "test-0.parquet", ["d", "e"])
    images = opened(tmp_path)
    assert class_names(images) == {"train": ["a", "b"], "validation": ["c"], "test": ["d", "e"]}
    write(tmp_path / "test-0.parquet", ["d", "e", "a"])
    with refused("a is in train and in test: leave it once"):
        opened(tmp_path)


@pytest.mark.parametrize("names", ["train val 0", "train vald test", "train/0 vald/0 test/0"])
def test_files_that_only_look_like_parts_of_a_split_are_refused_as_folders_are(names, tmp_path):
    for number, name in enumerate(names.split()):
        write(tmp_path / f"{name}.parquet", [f"{number}{label}" for label in "abcde"], first=5 * number)
    with refused("is not named after a split, and others are"):
        opened(tmp_path)
    alone = next(tmp_path.rglob("*.parquet"))
    assert len(opened(alone).names) == 5  # a file alone may have any name


def test_files_with_the_same_classes_are_put_together_and_said(tmp_path):
    for number, part in enumerate(("train", "test")):
        write(tmp_path / f"{part}-0.parquet", list("abcde"), first=5 * number)
    images = opened(tmp_path)
    assert [len(images.splits[split]) for split in SPLITS] == [2, 1, 2] and images.count.tolist() == [2] * 5
    assert "train, test have the same classes: put together, since tests are on other classes" in images.notes


def test_columns_are_chosen_and_another_choice_has_another_cache(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, list("abcde"), mask=[*map(png, range(100, 105))], species=list("edcba"))
    with refused(r"has 2 columns of images \(image, mask\): name one with --columns input"):
        opened(path)
    first = opened(path, ["input=image"]).load()
    by_species = ["input=image", "class=species"]
    for columns, pictures in ((["input=mask"], range(100, 105)), (by_species, range(4, -1, -1))):
        pixels = opened(path, columns).load()
        expected = [*map(resized, pictures)]
        assert np.array_equal(pixels.permute(0, 2, 3, 1), expected) and not torch.equal(pixels, first)


def test_small_classes_are_left_out(tmp_path):
    write(tmp_path / "a.parquet", list("aabbccddeef"))
    images = opened(tmp_path / "a.parquet", least=2)
    assert images.names == list("abcde") and images.count.tolist() == [2] * 5


def test_what_cannot_be_read_is_named_in_a_line(tmp_path):
    path = tmp_path / "a.parquet"
    write(path, ["a", "b", "c"])
    for columns, message in (
        (["class=nothing"], "has no column 'nothing', but"),
        (["input=label"], "column 'label' holds string, not the bytes of images"),
        (["task=label"], "images have class=NAME and input=NAME alone"),
    ):
        with refused(message):
            opened(path, columns)
    parquet.write_table(pa.table({"image": [b"no image"] * 3, "kind": ["a", "b", "c"]}), path)
    with refused(r"has 0 columns of classes \(image, kind\): name one with --columns class"):
        opened(path)
    with refused("column 'image', data row 1 is not a readable image"):
        opened(path, ["class=kind"]).load()
    parquet.write_table(pa.table({"image": [{"bytes": None, "path": "x.png"}], "label": ["a"]}), path)
    with refused("column 'image', data row 1 is not a readable image"):
        opened(path).load()
    write(path, [-1, None], names=("a", "b"))
    with refused("none of its 2 images has a class: name the column of classes with --columns class=NAME"):
        opened(path)
    path.write_bytes(b"PAR1")
    with refused("is not readable"):
        opened(path)


def test_tasks_are_learned_from_a_file(tmp_path, capsys):
    write(tmp_path / "a.parquet", [i % 10 for i in range(40)])
    line = ["--dataset", f"images:{tmp_path / 'a.parquet'}", "-n", 2, "-k", 1, "-q", 2, "--image-size", 8]
    line += ["--split-shares", "2,1,2", "--iterations", 1, "--eval-tasks", 2, "--learner", "fc"]
    assert command(*line, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    assert "classes: 4 (16 images) for training" in capsys.readouterr().out
    assert command("--eval", "--load", tmp_path / "run") == 0
