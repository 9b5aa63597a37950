"""Images from files to tasks: what is read, what is refused, and that nothing half-done stays behind."""

import csv
import hashlib
import os
import shutil
import zipfile
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from common.errors import UsageError
from common.random import Stream
from tasks import images
from tasks.image_tasks import ImageTasks, augmented
from tasks.images import ImageSet, image_files, load_images, load_named, published_splits, read_images
from tasks.omniglot import load_omniglot

SMALL = {"size": 6, "channels": 1}


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> Path:
    """The user's cache is a fresh folder, not that of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


def write_images(folder: Path, values: Sequence[int], suffix: str = ".png", side: int = 6) -> None:
    """Images of one grey each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, value in enumerate(values):
        Image.new("L", (side, side), value).save(folder / f"{number:03}{suffix}")


def write_classes(folder: Path, classes: int, count: int = 3, prefix: str = "c") -> None:
    for c in range(classes):
        write_images(folder / f"{prefix}{c:02}", [10 * c + i for i in range(count)])


def write_list(path: Path, rows: Sequence[Sequence[str]]) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def class_names(found: ImageSet) -> dict[str, list[str]]:
    return {split: [found.names[c] for c in part] for split, part in found.splits.items()}


# ---- layouts and splits ---------------------------------------------------------------------


def test_split_folders_are_taken_as_they_are(tmp_path):
    for split, names in {"train": "ab", "val": "c", "test": "de"}.items():
        for name in names:
            write_images(tmp_path / split / "deep" / name, [ord(name), ord(name) + 1])
    found = load_images(tmp_path, **SMALL)
    assert found.own_splits
    assert class_names(found) == {
        "train": ["deep/a", "deep/b"],
        "validation": ["deep/c"],
        "test": ["deep/d", "deep/e"],
    }
    assert found.pixels[:, 0, 0, 0].tolist() == [ord(n) + i for n in "abcde" for i in (0, 1)]
    assert found.pixels.dtype == torch.uint8 and found.pixels.shape == (10, 1, 6, 6)
    assert found.first.tolist() == [0, 2, 4, 6, 8] and found.count.tolist() == [2] * 5


def test_lists_of_files_and_lists_of_classes_are_followed(tmp_path):
    files = tmp_path / "files"
    write_images(files / "images", range(8))
    for split, rows in {
        "train": [(5, "x"), (1, "y")],
        "val": [(2, "z")],
        "test": [(0, "w"), (7, "w")],
    }.items():
        write_list(
            files / f"{split}.csv", [("filename", "label"), *((f"{n:03}.png", label) for n, label in rows)]
        )
    found = load_images(files, **SMALL)
    assert class_names(found) == {"train": ["x", "y"], "validation": ["z"], "test": ["w"]}
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 7, 5, 1, 2]  # of w, x, y and z
    folders = tmp_path / "folders"
    for c, name in enumerate(("A/1", "A/2", "B/1", "unlisted")):
        write_images(folders / name, [c, c])
    for split, name in {"train": "B/1", "validation": "A/2", "test": "A/1"}.items():
        write_list(folders / f"{split}.csv", [("label",), (name,)])
    found = load_images(folders, **SMALL)
    assert found.own_splits
    assert class_names(found) == {"train": ["B/1"], "validation": ["A/2"], "test": ["A/1"]}
    assert found.pixels[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_class_folders_are_split_by_the_seed_alone(tmp_path):
    write_classes(tmp_path, 25, count=1)
    found = load_images(tmp_path, **SMALL, shares=(64, 16, 20))
    assert not found.own_splits
    assert {split: len(part) for split, part in found.splits.items()} == {
        "train": 16,
        "validation": 4,
        "test": 5,
    }
    assert sorted(torch.cat(list(found.splits.values())).tolist()) == list(range(25))
    again, other = (load_images(tmp_path, **SMALL, split_seed=seed) for seed in (0, 1))
    assert class_names(again) == class_names(found) != class_names(other)
    assert len(list(tmp_path.glob(".*.npy"))) == 1  # the pixels are the same, whatever the split


@pytest.mark.parametrize("classes", [3, 4, 7])
def test_every_split_has_a_class_where_there_are_three(tmp_path, classes):
    write_classes(tmp_path, classes, count=1)
    splits = load_images(tmp_path, **SMALL, shares=(98, 1, 1)).splits
    assert all(len(part) for part in splits.values()) and sum(map(len, splits.values())) == classes
    assert len(load_images(tmp_path, **SMALL, shares=(1, 0, 1)).splits["validation"]) == 0


def test_validation_classes_come_out_of_training_where_the_folder_has_none(tmp_path):
    write_classes(tmp_path / "train", 10, prefix="a")
    write_classes(tmp_path / "test", 3, prefix="b")
    names = class_names(load_images(tmp_path, **SMALL))
    assert len(names["train"]) == 8 and len(names["validation"]) == 2
    assert sorted(names["train"] + names["validation"]) == [f"a{c:02}" for c in range(10)]
    shutil.rmtree(tmp_path / "train")
    names = class_names(load_images(tmp_path, **SMALL))
    assert (names["train"], names["validation"], len(names["test"])) == ([], [], 3)


def test_a_class_may_be_called_train(tmp_path):
    write_classes(tmp_path, 3)
    write_images(tmp_path / "train", [1, 2])
    assert load_images(tmp_path, **SMALL).names == ["c00", "c01", "c02", "train"]


# ---- from a file to pixels ------------------------------------------------------------------


def test_images_of_every_kind_become_the_same_pixels(tmp_path):
    left_dark = np.zeros((6, 6), np.uint8)
    left_dark[:, 3:] = 200
    grey = Image.fromarray(left_dark)
    grey.save(tmp_path / "grey.png")
    Image.fromarray(left_dark.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    grey.convert("RGB").save(tmp_path / "rgb.bmp")
    grey.convert("P").save(tmp_path / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn me by a quarter to see me upright"
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    opaque = np.where(left_dark == 0, 255, 0).astype(np.uint8)
    see_through = Image.merge("LA", [Image.new("L", (6, 6), 0), Image.fromarray(opaque)])
    see_through.save(tmp_path / "zalpha.png")  # black, and glass on its right
    (tmp_path / "notes.txt").write_text("passed over")
    (tmp_path / ".hidden.png").write_text("passed over")
    files = image_files(tmp_path)
    assert len(files) == 6
    read = read_images(files, **SMALL)
    assert (read[:5] == torch.from_numpy(left_dark)).all()
    assert read[5, 0, 0].tolist() == [0, 0, 0, 255, 255, 255]  # on white
    colour = read_images(files, size=6, channels=3, invert=True)
    assert torch.equal(colour, (255 - read).expand(-1, 3, -1, -1))
    assert read_images([], **SMALL).shape == (0, 1, 6, 6)


def test_one_bit_images_are_resized_smoothly_unless_nearest_is_asked_for(tmp_path):
    checks = np.indices((40, 40)).sum(0) % 2 == 0
    Image.fromarray(checks).save(tmp_path / "bits.png")
    smooth, nearest = (read_images(image_files(tmp_path), **SMALL, resize=r) for r in ("lanczos", "nearest"))
    assert ((smooth > 60) & (smooth < 195)).all() and set(nearest.unique().tolist()) <= {0, 255}


# ---- bad data -------------------------------------------------------------------------------


def three_classes(folder: Path) -> None:
    write_classes(folder, 3)


def listed(folder: Path, *rows: Sequence[str]) -> None:
    write_images(folder / "images", range(3))
    write_list(folder / "train.csv", rows)


def damage(folder: Path) -> None:
    write_classes(folder, 3)
    path = folder / "c01" / "001.png"
    path.write_bytes(path.read_bytes()[:50])


def share_a_class(folder: Path) -> None:
    write_classes(folder / "train", 3)
    write_classes(folder / "test", 1)


def leave_labels_out(folder: Path) -> None:
    write_classes(folder / "train", 3)
    write_images(folder / "test", range(3))


def link_to_itself(folder: Path) -> None:
    write_classes(folder, 3)
    (folder / "loop").symlink_to(folder, target_is_directory=True)


def hang_a_link(folder: Path) -> None:
    write_classes(folder, 3)
    (folder / "c02" / "lost.png").symlink_to(folder / "nowhere.png")


BAD = {
    "damaged image": (damage, r"c01/001.png is no readable image .*remove it"),
    "no image": (
        lambda f: (three_classes(f), (f / "c00/x.jpg").write_text("text")),
        r"c00/x.jpg is no readable image",
    ),
    "lost link": (hang_a_link, r"lost.png cannot be read .*remove it"),
    "empty class": (lambda f: (three_classes(f), (f / "A/empty").mkdir(parents=True)), r"A/empty is empty"),
    "notes alone": (
        lambda f: (three_classes(f), (f / "docs").mkdir(), (f / "docs/a.txt").write_text("")),
        r"docs holds no images, but a.txt",
    ),
    "notes among images": (
        lambda f: (three_classes(f), (f / "c01/notes.txt").write_text("")),
        r"c01/notes.txt is no image",
    ),
    "loose images": (lambda f: write_images(f, range(3)), r"holds images itself, such as 000.png"),
    "nothing": (lambda f: f.mkdir(), r"holds no classes"),
    "not there": (lambda f: None, r"does not exist"),
    "a file": (lambda f: f.write_text(""), r"is not a folder"),
    "loop": (link_to_itself, r"loop is a link to a folder that it lies in"),
    "a class in two splits": (share_a_class, r"class c00 is in the train and in the test split"),
    "split without labels": (leave_labels_out, r"test holds images itself"),
    "two names of a split": (
        lambda f: [write_classes(f / s, 1, prefix=s) for s in ("train", "val", "valid")],
        r"has both val and valid",
    ),
    "columns": (lambda f: listed(f, ("file", "kind"), ("000.png", "x")), r"columns \['file', 'kind'\]"),
    "empty list": (lambda f: listed(f), r"has the columns \[\]"),
    "header alone": (lambda f: listed(f, ("filename", "label")), r"names no class"),
    "short row": (lambda f: listed(f, ("filename", "label"), ("000.png",)), r"line 2, is incomplete"),
    "missing file": (
        lambda f: listed(f, ("filename", "label"), ("000.png", "x"), ("9.png", "x")),
        r"line 3, names 9.png",
    ),
    "missing class": (lambda f: listed(f, ("label",), ("x",)), r"names the class x, but .*/x is no folder"),
    "listed twice": (
        lambda f: listed(f, ("filename", "label"), ("000.png", "x"), ("000.png", "y")),
        r"000.png is listed twice, under x \(train\) and under y \(train\)",
    ),
    "not text": (
        lambda f: (three_classes(f), (f / "train.csv").write_bytes(b"\xff\xfe")),
        r"no readable CSV file",
    ),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("read_only", [False, True], ids=["beside", "user-cache"])
def test_bad_data_is_refused_in_one_line_and_leaves_nothing(case, read_only, tmp_path, cache_folder):
    folder = tmp_path / "data"
    make, message = BAD[case]
    make(folder)
    if read_only and folder.is_dir():
        folder.chmod(0o555)
    before = listing(tmp_path)
    with pytest.raises(UsageError, match=message) as raised:
        load_images(folder, **SMALL)
    if folder.exists():
        folder.chmod(0o755)
    assert "\n" not in str(raised.value)
    assert listing(tmp_path) == before and listing(cache_folder) == []


def test_litter_and_hidden_files_are_passed_over(tmp_path):
    write_classes(tmp_path, 3)
    (tmp_path / "c00" / "Thumbs.db").touch()
    (tmp_path / "c01" / ".DS_Store").touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / "README.md").touch()  # beside class folders, not in one
    assert load_images(tmp_path, **SMALL).count.tolist() == [3, 3, 3]


# ---- the cache ------------------------------------------------------------------------------


def test_images_are_decoded_once(tmp_path, monkeypatch):
    write_classes(tmp_path, 3)
    made = load_images(tmp_path, **SMALL)
    (cache,) = tmp_path.glob(".*")
    with monkeypatch.context() as patch:
        patch.setattr(images, "_decode", None)  # from here on, reading an image would fail
        assert torch.equal(load_images(tmp_path, **SMALL).pixels, made.pixels)
    sound = cache.read_bytes()
    for damaged in (b"", sound[:-1], sound + b"x", sound.replace(b"|u1", b"|i1")):
        cache.unlink()  # others have it mapped
        cache.write_bytes(damaged)
        assert torch.equal(load_images(tmp_path, **SMALL).pixels, made.pixels)
        assert cache.read_bytes() == sound
    os.utime(tmp_path / "c01" / "001.png", ns=(1, 1))  # another file now, perhaps
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(images, "_decode", None)
        load_images(tmp_path, **SMALL)
    assert load_images(tmp_path, **SMALL, invert=True).pixels[0, 0, 0, 0] == 255


def test_a_read_only_folder_is_left_alone(tmp_path, cache_folder):
    write_classes(tmp_path / "data", 3)
    before = listing(tmp_path)
    (tmp_path / "data").chmod(0o555)
    load_images(tmp_path / "data", **SMALL)
    (tmp_path / "data").chmod(0o755)
    assert listing(tmp_path) == before and len(list((cache_folder / "maml").iterdir())) == 1


def test_where_nothing_can_be_written_one_line_says_so(tmp_path, cache_folder, monkeypatch):
    write_classes(tmp_path, 3)
    before = listing(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(UsageError, match=r"fit into neither .*free room"):
        patch.setattr(images.shutil, "disk_usage", lambda _: SimpleNamespace(free=10))
        load_images(tmp_path, **SMALL)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UsageError, match="No space left") as raised:
        patch.setattr(images.os, "fsync", full)
        load_images(tmp_path, **SMALL)
    assert "\n" not in str(raised.value)
    assert listing(tmp_path) == before and listing(cache_folder) == []


def test_an_interrupt_leaves_nothing(tmp_path, monkeypatch):
    write_classes(tmp_path, 3)
    before = listing(tmp_path)
    decode = images._decode

    def interrupted(path, form):
        if path.name == "002.png":
            raise KeyboardInterrupt
        return decode(path, form)

    monkeypatch.setattr(images, "_decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_images(tmp_path, **SMALL)
    assert listing(tmp_path) == before


# ---- the published benchmarks ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("cifar-fs", [64, 16, 20]),
        ("fc100", [60, 20, 20]),
        ("mini-imagenet", [64, 16, 20]),
        ("tiered-imagenet", [351, 97, 160]),
    ],
)
def test_published_splits_are_disjoint_and_of_the_published_sizes(name, sizes):
    splits = published_splits(name)
    assert [len(part) for part in splits.values()] == sizes
    assert len(set().union(*splits.values())) == sum(sizes)


class FakeCIFAR100:
    """As torchvision's, with images that say their class and number; "fetching" makes two files."""

    classes = sorted(chain(*published_splits("fc100").values()))

    def __init__(self, root, train, download):
        file = Path(root) / "cifar-100-python" / ("train" if train else "test")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        count = 500 if train else 100
        self.targets = [c for _ in range(count) for c in range(100)]
        self.class_to_idx = {name: c for c, name in enumerate(self.classes)}
        self.data = np.zeros((len(self.targets), 32, 32, 3), np.uint8)
        self.data[..., 0] = np.array(self.targets)[:, None, None]
        self.data[..., 1] = 255 if train else 0


@pytest.mark.parametrize("name", ["cifar-fs", "fc100"])
def test_cifar_has_600_images_of_each_class_under_its_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCIFAR100)
    found = load_named(name, tmp_path / "data", size=4, channels=3)
    assert class_names(found) == published_splits(name)
    assert found.count.tolist() == [600] * 100 and found.pixels.shape == (60_000, 3, 4, 4)
    for c, class_name in enumerate(found.names):
        of_class = found.pixels[found.first[c] :][:600, :2, 0, 0]
        assert (of_class[:, 0] == FakeCIFAR100.classes.index(class_name)).all()
        assert (of_class[:500, 1] == 255).all() and (of_class[500:, 1] == 0).all()
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", None)
    assert torch.equal(load_named(name, tmp_path / "data", size=4, channels=3).pixels, found.pixels)


def test_a_failed_fetch_is_said_in_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    def broken(root, **_):
        (Path(root) / "cifar-100-python").mkdir(parents=True)
        (Path(root) / "cifar-100-python.tar.gz").write_text("half")
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", broken)
    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(UsageError, match=r"no route to host.*put the unpacked folder cifar-100-python"):
            load_named("cifar-fs", root, size=4, channels=3)
    assert listing(tmp_path) == []


def write_published(folder: Path, name: str) -> None:
    for split, wnids in published_splits(name).items():
        for wnid in wnids:
            write_images(folder / {"validation": "val"}.get(split, split) / wnid, [len(split)])


def test_mini_imagenet_is_read_from_split_folders_lists_or_one_folder(tmp_path):
    write_published(tmp_path / "a" / "miniImageNet", "mini-imagenet")
    one = tmp_path / "b" / "mini_imagenet"
    for part in ("train", "val", "test"):
        shutil.copytree(tmp_path / "a" / "miniImageNet" / part, one, dirs_exist_ok=True)
    write_images(one / "n99999999", [0])  # another of ImageNet's
    lists = tmp_path / "c" / "mini-imagenet"
    for split, wnids in published_splits("mini-imagenet").items():
        for wnid in wnids:
            write_images(lists / "images", [])
            shutil.copy(one / wnid / "000.png", lists / "images" / f"{wnid}01.png")
        rows = [("filename", "label"), *((f"{wnid}01.png", wnid) for wnid in wnids)]
        write_list(lists / f"{split.removesuffix('idation')}.csv", rows)
    for root in "abc":
        found = load_named("mini-imagenet", tmp_path / root, **SMALL)
        assert found.own_splits and class_names(found) == published_splits("mini-imagenet")
        for split, part in found.splits.items():
            assert (found.pixels[found.first[part], 0, 0, 0] == len(split)).all()


def test_a_benchmark_with_other_classes_than_the_published_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"mini-imagenet is not in .*train, val and test"):
        load_named("mini-imagenet", tmp_path, **SMALL)
    folder = tmp_path / "miniimagenet"
    write_published(folder, "mini-imagenet")
    moved = published_splits("mini-imagenet")["test"][3]
    (folder / "test" / moved).rename(folder / "train" / moved)
    with pytest.raises(UsageError, match=rf"{moved} in its train split, the published list has it in test"):
        load_named("mini-imagenet", tmp_path, **SMALL)
    shutil.rmtree(folder / "train" / moved)
    with pytest.raises(UsageError, match=rf"lacks the class {moved} of the published test split"):
        load_named("mini-imagenet", tmp_path, **SMALL)


def test_real_omniglot_as_a_folder_of_images_is_omniglot(tmp_path, omniglot_root):
    with zipfile.ZipFile(omniglot_root / "omniglot-py" / "images_background.zip") as archive:
        wanted = [n for n in archive.namelist() if n.split("/")[1] in ("Braille", "Greek", "Korean")]
        archive.extractall(tmp_path, wanted)
    found = load_images(tmp_path, size=28, channels=1, invert=True)
    drawings, _ = load_omniglot(omniglot_root, split="random", resize="lanczos")
    with zipfile.ZipFile(omniglot_root / "omniglot-py" / "images_background.zip") as archive:
        every = sorted({n.rpartition("/")[0] for n in archive.namelist() if n.endswith(".png")})
    expected = torch.stack([drawings[every.index(name)] for name in found.names])
    assert len(found.names) == 90 and torch.equal(found.pixels.view(90, 20, 28, 28), expected)


# ---- tasks ----------------------------------------------------------------------------------


def image_set(counts: Sequence[int], side: int = 4, channels: int = 1) -> ImageSet:
    """Random images whose first two pixels say what they are: class and number."""
    count = torch.tensor(counts)
    words = Stream.from_seed(0).at(torch.arange(int(count.sum()))).words(channels * side * side)
    pixels = (words & 255).to(torch.uint8).view(-1, channels, side, side)
    pixels[:, :, 0, 0] = torch.arange(len(counts)).repeat_interleave(count)[:, None].to(torch.uint8)
    pixels[:, :, 0, 1] = torch.cat([torch.arange(n) for n in counts])[:, None].to(torch.uint8)
    order = torch.arange(len(counts))
    third = len(counts) // 3
    splits = {"train": order[: -2 * third], "validation": order[-2 * third : -third], "test": order[-third:]}
    names = [f"class {c}" for c in range(len(counts))]
    return ImageSet(pixels, count.cumsum(0) - count, count, names, splits, own_splits=False)


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_tasks_are_what_they_have_been_from_the_first_release():
    """The tasks that published numbers were measured on: other bits here, other test tasks for all."""
    tasks = ImageTasks(image_set([20] * 30, side=7), ways=5, shots=2, queries=3, quarter_turns=True)
    digest = hashlib.sha256()
    for split, iteration in (("train", 3), ("validation", torch.tensor(4)), ("test", 0)):
        for tensor in tasks.sample(split, 7, iteration, range(2, 9)):
            digest.update(tensor.contiguous().numpy().tobytes())
    assert digest.hexdigest()[:16] == "571942fab207f2ec"


def test_ragged_classes_never_repeat_or_mix_an_image():
    counts = [5, 9, 30, 6, 5, 12, 7, 8, 40, 5, 6, 7]
    tasks = ImageTasks(image_set(counts), ways=3, shots=2, queries=3)
    seen: set[tuple[int, int]] = set()
    for split, classes in tasks.images.splits.items():
        batch = tasks.sample(split, 0, 0, range(500))
        x = torch.cat([x.view(500, 3, -1, 4, 4) for x in (batch.support_x, batch.query_x)], 2)
        classes_of, numbers = ((x[..., 0, i] * 255).round().long() for i in (0, 1))
        assert (classes_of == classes_of[..., :1]).all() and set(classes_of.unique().tolist()) == set(
            classes.tolist()
        )
        assert all(len(set(task)) == 3 for task in classes_of[..., 0].tolist())
        assert (numbers.sort(-1).values.diff() > 0).all()  # five different images of each class
        seen |= set(zip(classes_of.flatten().tolist(), numbers.flatten().tolist(), strict=True))
        expected = torch.arange(3).repeat_interleave(2).expand(500, -1)
        assert torch.equal(batch.support_y, expected)
    assert seen == {(c, n) for c, count in enumerate(counts) for n in range(count)}  # each has its turn


@pytest.mark.parametrize("augment", [(), ("flip", "crop", "rotate")])
def test_the_host_gives_the_devices_bits_and_fetches_training_ahead(augment):
    images = image_set([6] * 12, channels=3)
    options = dict(ways=3, shots=1, queries=2, quarter_turns=True, augment=augment)
    device = ImageTasks(images, **options, place="device")
    host = ImageTasks(images, **options, place="host")
    assert host.on_host and not device.on_host
    calls = [("train", 0, i, range(4)) for i in (0, 1, 2, 9, 10)]
    calls[2:2] = [("validation", 0, 0, range(4)), ("validation", 0, 0, range(4, 6))]
    for arguments in [*calls, ("train", 1, 11, range(4)), ("train", 1, torch.tensor(12), range(2))]:
        assert same(host.sample(*arguments), device.sample(*arguments))
    other = host.resized(2)  # one that has its own batch ahead
    assert same(other.sample("train", 1, 13, range(2)), device.resized(2).sample("train", 1, 13, range(2)))
    fetched = []
    fetch = host._fetch
    host._fetched.fetch = lambda *arguments: (fetched.append(arguments), fetch(*arguments))[1]
    host.sample("train", 5, 0, range(4))
    host.sample("train", 5, 1, range(4))
    host.sample("test", 5, 0, range(4))
    host._fetched.thread.shutdown(wait=True)
    assert [f[:3] for f in fetched if f[0] == "train"] == [("train", 5, i) for i in (0, 1, 2)]
    assert [f for f in fetched if f[0] == "test"] == [("test", 5, 0, range(4))]


def test_each_of_several_seeds_has_its_tasks_fetched_ahead():
    host = ImageTasks(image_set([6] * 12), ways=3, shots=1, queries=2, place="host")
    asked = []
    fetch = host._fetched.fetch
    host._fetched.fetch = lambda *wanted: (asked.append(wanted[1:3]), fetch(*wanted))[1]
    for iteration in range(3):
        for seed in (0, 1):
            host.sample("train", seed, iteration, range(2))
    host._fetched.thread.shutdown()
    assert sorted(asked) == [(seed, iteration) for seed in (0, 1) for iteration in range(4)]


def test_an_error_of_the_background_thread_reaches_the_caller():
    host = ImageTasks(image_set([6] * 12), ways=3, shots=1, queries=2, place="host")
    host.sample("train", 0, 0, range(2))
    key, _ = host._fetched.coming[0]
    failed: Future = Future()
    failed.set_exception(OSError("the disk is gone"))
    host._fetched.coming[0] = key, failed
    with pytest.raises(OSError, match="the disk is gone"):
        host.sample("train", 0, 1, range(2))


def test_pixels_stay_on_the_host_where_memory_is_scarce(monkeypatch):
    options = dict(ways=3, shots=1, queries=2)
    images = image_set([6] * 12)
    for free, on_host in ((2 * images.pixels.nbytes, False), (2 * images.pixels.nbytes - 2, True)):
        monkeypatch.setattr("tasks.image_tasks._free_memory", lambda _, free=free: free)
        assert ImageTasks(images, **options).on_host is on_host


def test_what_the_images_do_not_suffice_for_is_refused():
    images = image_set([6] * 11 + [4])
    with pytest.raises(UsageError, match="-n 5 is more than the 4 classes of the train split"):
        ImageTasks(images, ways=5, shots=1, queries=1)
    with pytest.raises(UsageError, match=r"-k 2 plus -q 3 is 5, but class class 11 \(test\) .* has 4 images"):
        ImageTasks(images, ways=3, shots=2, queries=3)
    tasks = ImageTasks(images, ways=3, shots=1, queries=3)
    with pytest.raises(UsageError, match="-k 2 plus -q 3"):
        tasks.resized(2)
    images.splits["train"] = torch.tensor([], dtype=torch.int64)
    tasks = ImageTasks(images, ways=3, shots=1, queries=3)
    assert tasks.sample("test", 0, 0, range(2)).query_x.shape == (2, 9, 1, 4, 4)
    with pytest.raises(UsageError, match="no train classes"):
        tasks.sample("train", 0, 0, range(2))


# ---- augmentation ---------------------------------------------------------------------------


def gradient(images: int, side: int = 32) -> torch.Tensor:
    """Images `[1, images, 2, side, side]`: the x and the y coordinate in [-1, 1] of every pixel."""
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    return torch.stack([line.expand(side, side), line[:, None].expand(side, side)]).expand(
        1, images, 2, -1, -1
    )


def stream() -> Stream:
    return Stream.from_seed(3).at(torch.zeros(1, dtype=torch.int64))


def test_flip_mirrors_half_of_the_images_exactly():
    x = gradient(400)
    flipped = augmented(x, ("flip",), stream())
    mirrored = (flipped == x.flip(-1)).flatten(2).all(-1)
    assert (mirrored ^ (flipped == x).flatten(2).all(-1)).all()
    assert 140 < mirrored.sum() < 260
    assert torch.equal(augmented(flipped, ("flip",), stream()), x)  # the same numbers: turned back


def test_rotation_and_crop_stay_within_their_bounds():
    x = gradient(400)
    centre = augmented(x, ("rotate",), stream())[0, :, :, 12:20, 12:20]  # nothing from outside is here
    slope_x, slope_y = (centre[:, 0, 4, 7] - centre[:, 0, 4, 0]), (centre[:, 1, 4, 7] - centre[:, 1, 4, 0])
    angles = torch.rad2deg(torch.atan2(slope_y, slope_x))
    assert -15 <= angles.min() < -14 and 14 < angles.max() <= 15
    assert torch.allclose(torch.hypot(slope_x, slope_y), torch.tensor(7 / 16, dtype=torch.float64))
    centre = augmented(x, ("crop",), stream())[0, :, :, 12:20, 12:20]
    zoom = (centre[:, 0, 4, 7] - centre[:, 0, 4, 0]) * 16 / 7
    assert 0.8 <= zoom.min() < 0.82 and 0.98 < zoom.max() <= 1.0
    shift = centre.mean((2, 3)) / 2  # in sides of the image
    assert -0.125 <= shift.min() < -0.12 and 0.12 < shift.max() <= 0.125
    assert torch.corrcoef(torch.stack([zoom, *shift.T]))[~torch.eye(3).bool()].abs().max() < 0.2


def test_only_training_images_are_augmented_each_by_itself_and_reproducibly():
    images = image_set([6] * 12, side=8)
    options = dict(ways=3, shots=2, queries=2)
    plain, changed = (ImageTasks(images, **options, augment=a) for a in ((), ("flip", "crop", "rotate")))
    for split in ("validation", "test"):
        assert same(plain.sample(split, 0, 0, range(4)), changed.sample(split, 0, 0, range(4)))
    batch = changed.sample("train", 0, 5, range(4))
    clean = plain.sample("train", 0, 5, range(4))
    for x, original in ((batch.support_x, clean.support_x), (batch.query_x, clean.query_x)):
        assert (x != original).flatten(2).any(-1).all() and x.min() >= 0 and x.max() <= 1
    assert same(changed.sample("train", 0, 5, range(4)), batch)
    part = changed.sample("train", 0, 5, range(2, 3))
    assert all(torch.allclose(a, b[2:3], atol=1e-6) for a, b in zip(part, batch, strict=True))
    uniform = torch.full((1, 40, 1, 8, 8), 0.5)  # what comes into view is reflected, not black
    assert torch.allclose(augmented(uniform, ("crop", "rotate"), stream()), uniform)
    low = augmented(gradient(5).bfloat16(), ("crop",), stream())
    assert torch.allclose(low.double(), augmented(gradient(5), ("crop",), stream()), atol=0.02)
