"""The benchmarks' pickles are read as data, with numpy's own values, and run nothing."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SHARES, refused
from PIL import Image

from tasks.archives import load_data
from tasks.images import ImageSet, open_images
from tasks.pixels import Form
from tasks.published import open_benchmark
from tasks.splits import published_splits

COLOUR = Form(6, 3)
CLASSES = {"train": 4, "val": 2, "test": 3}
IMAGES = 5  # of each class

pytestmark = pytest.mark.usefixtures("user_cache")


def images_of(split: str, classes: int) -> np.ndarray:
    return np.random.default_rng(len(split)).integers(0, 256, (classes * IMAGES, 6, 6, 3), dtype=np.uint8)


def dump(path: Path, content: object, protocol: int = 2) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))


def png(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return np.frombuffer(file.getvalue(), np.uint8)


def write_mini(folder: Path, split: str, names: list[str], protocol: int = 2) -> None:
    places = {name: list(range(i * IMAGES, (i + 1) * IMAGES)) for i, name in enumerate(names)}
    content = {"image_data": images_of(split, len(names)), "class_dict": places}
    dump(folder / f"mini-imagenet-cache-{split}.pkl", content, protocol)


def write_cifar(folder: Path, split: str, names: list[str], protocol: int = 2) -> None:
    labels = [7 + i for i in range(len(names)) for _ in range(IMAGES)]
    content = {"data": images_of(split, len(names)), "labels": labels}
    dump(folder / f"CIFAR_FS_{split}.pickle", content, protocol)


def write_tiered(folder: Path, split: str, names: list[str], protocol: int = 2) -> None:
    dump(folder / f"{split}_images_png.pkl", [png(image) for image in images_of(split, len(names))], protocol)
    labels = np.arange(len(names)).repeat(IMAGES)
    content = {"label_specific": labels, "label_specific_str": names, "label_general": labels}
    dump(folder / f"{split}_labels.pkl", content, protocol)


def write_npz(folder: Path, split: str, names: list[str], protocol: int = 2) -> None:
    folder.mkdir(exist_ok=True)
    np.savez(folder / f"{split}_images.npz", images=images_of(split, len(names)))
    dump(folder / f"{split}_labels.pkl", {"labels": [i for i in range(len(names)) for _ in range(IMAGES)]})


def opened(folder: Path, **options) -> ImageSet:
    return open_images(folder, COLOUR, SHARES, **options)


@pytest.mark.parametrize(
    ("write", "protocol"),
    [(write_mini, 2), (write_mini, 5), (write_cifar, 2), (write_tiered, 2), (write_npz, 2)],
)
def test_archives_of_a_benchmark_have_their_images_and_splits(write, protocol, tmp_path):
    np.savez(tmp_path / "more.npz")
    for split, number in CLASSES.items():
        write(tmp_path, split, [f"n{split}{c}" for c in range(number)], protocol)
    for _ in range(2):  # the second time from the cache
        images = opened(tmp_path)
        assert images.notes == ["left out: more.npz"]
        assert [len(part) for part in images.splits.values()] == [*CLASSES.values()]
        pixels = images.load().unflatten(0, (-1, IMAGES)).permute(0, 1, 3, 4, 2)
        for part, (split, number) in zip(images.splits.values(), CLASSES.items(), strict=True):
            expected = torch.from_numpy(images_of(split, number)).unflatten(0, (number, IMAGES))
            assert torch.equal(pixels[part], expected)


class Malicious:
    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


@pytest.mark.parametrize("protocol", [0, 2, 5])
@pytest.mark.parametrize("function", [os.mkdir, exec, np.save])
def test_a_malicious_pickle_does_not_run(function, protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = {os.mkdir: ["made"], exec: ["open('made', 'w')"], np.save: ["made", 0]}[function]
    dump(tmp_path / "train.pkl", {"data": Malicious(function, *arguments)}, protocol)
    message = rf"train.pkl cannot be read as data .*\.{function.__name__}, which is not loaded"
    with refused(message):
        opened(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train.pkl"]


def test_pickles_of_python_2_are_read(tmp_path):
    dtype = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R(K\x01K\x03\x85"
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02" + array + dtype + b"\x89U\x03\x01\xff\x80tb.")
    assert load_data(tmp_path / "x.pkl").tolist() == [1, 255, 128]


def test_named_benchmarks_are_read_from_their_pickles(tmp_path):
    for split, names in published_splits("mini-imagenet").items():
        write_mini(tmp_path / "mini-imagenet", {"validation": "val"}.get(split, split), names)
    images = open_benchmark("mini-imagenet", tmp_path, COLOUR)
    for split, part in images.splits.items():
        assert [images.names[c] for c in part] == published_splits("mini-imagenet")[split]
    for split, number in {"train": 64, "val": 16, "test": 20}.items():
        write_cifar(tmp_path / "cifar-fs", split, ["x"] * number)
    images = open_benchmark("cifar-fs", tmp_path, COLOUR)
    assert images.count.tolist() == [IMAGES] * 100 and "numbered" in images.notes[0]
    write_cifar(tmp_path / "cifar-fs", "test", ["x"] * 19)
    with refused("test should have the 20 published classes, and has 19"):
        open_benchmark("cifar-fs", tmp_path, COLOUR)
    for split, number in {"train": 64, "val": 16, "test": 20}.items():
        write_mini(tmp_path / "mini-imagenet", split, [f"class/{n}" for n in range(number)])
    with refused("class/0 is in train and in validation: leave it once"):
        open_benchmark("mini-imagenet", tmp_path, COLOUR)


TWO = np.zeros((2, 6, 6, 3), np.uint8)
BAD = {
    "other parts": ({"pictures": 1}, "has the parts pictures: it should have image_data and class_dict"),
    "floats": ({"data": TWO.astype(float), "labels": [0, 1]}, "images of type float64"),
    "lengths": ({"data": TWO, "labels": [0]}, "2 images and 1 labels"),
    "places": ({"image_data": TWO, "class_dict": {"a": [2]}}, "class a has no"),
    "shared": ({"image_data": TWO, "class_dict": {"a": [0, 1], "b": [1]}}, "an image is in two classes"),
}


@pytest.mark.parametrize("case", BAD)
def test_other_content_is_refused_by_name(case, tmp_path):
    content, message = BAD[case]
    dump(tmp_path / "train.pkl", content)
    with refused(message):
        opened(tmp_path)


def test_files_that_contradict_each_other_are_refused(tmp_path):
    write_mini(tmp_path, "train", ["a", "b"])
    (tmp_path / "test.pkl").write_bytes((tmp_path / "mini-imagenet-cache-train.pkl").read_bytes())
    with refused(r"test.pkl has images of another split"):
        opened(tmp_path)
    (tmp_path / "test.pkl").write_bytes(b"\x80\x04damaged")
    with refused(r"test.pkl cannot be read as data .*numpy.savez"):
        opened(tmp_path)
    (tmp_path / "test.pkl").write_text("version https://git-lfs.github.com/spec/v1")
    with refused(r"test.pkl cannot be read as data .*git lfs pull"):
        opened(tmp_path)
    (tmp_path / "vald.pkl").touch()
    with refused(r"vald.pkl looks like part of a split: call it train, val or test"):
        opened(tmp_path)
    (tmp_path / "vald.pkl").unlink()
    (tmp_path / "cifar_test.pkl").touch()
    with refused(r"cifar_test.pkl, test.pkl may all hold test images"):
        opened(tmp_path)
