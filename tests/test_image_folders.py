"""Layouts of image folders: usual names of splits are followed, what only looks like one is refused."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SHARES, class_names, refused, write_classes, write_images

from tasks.images import ImageSet, ImageTasks, open_images
from tasks.pixels import Form
from tasks.splits import find_part, parse_split

FOR_TEST = {"train": 0, "validation": 0, "test": 1}

pytestmark = pytest.mark.usefixtures("user_cache")


def make(folder: Path, *parts: str, classes: int = 2) -> None:
    """Write classes of different names into each part."""
    for number, part in enumerate(parts):
        write_classes(folder / part, classes, prefix=f"n{number}_", first=20 * number)


def opened(folder: Path, shares: dict[str, int] = SHARES, **options) -> ImageSet:
    return open_images(folder, Form(6, 1), shares, **options)


USUAL = """
Train Val Test, TRAIN VALID TEST, training validation testing, base val novel, seen val unseen,
meta-train meta-val meta-test, metatrain metaval metatest, Meta_Training Meta_Validation Meta_Test,
train2017 val2017 test2017, train_images val_images test_images, trainset devset testset"""


def test_usual_names_of_splits_are_known():
    for names in USUAL.split(","):
        assert [parse_split(name) for name in names.split()] == ["train", "validation", "test"], names


@pytest.mark.parametrize("names", ["TRAIN VALID TEST", "base val novel"])
def test_folders_with_names_of_splits_are_followed(names, tmp_path):
    make(tmp_path, *names.split())
    images = opened(tmp_path)
    expected = {split: [f"n{i}_00", f"n{i}_01"] for i, split in enumerate(("train", "validation", "test"))}
    assert class_names(images) == expected
    train, val, test = names.split()
    counts = "2 (6 images) for training, 2 (6 images) for validation, 2 (6 images) for test"
    assert images.summary == [f"classes: {counts}; split: {train}/, {val}/, {test}/"]


def test_omniglots_halves_hold_nested_classes_and_validation_comes_from_training(tmp_path):
    for part, alphabets in {"images_background": "ABCDE", "images_evaluation": "XY"}.items():
        for alphabet in alphabets:
            write_images(tmp_path / part / alphabet / "character01", [ord(alphabet)])
    images = opened(tmp_path)
    names = class_names(images)
    assert names["test"] == ["X/character01", "Y/character01"] and len(names["validation"]) == 1
    assert sorted(names["train"] + names["validation"]) == [f"{a}/character01" for a in "ABCDE"]
    assert "images_background/, images_evaluation/, validation classes drawn from" in images.summary[0]
    assert images.notes == ["classes are whole paths: character01 of 7 folders is 7 classes"]


def test_classes_may_be_called_like_splits_and_nest(tmp_path):
    write_classes(tmp_path, 4)
    for name in ("train", "base", "Valyrian/letter1", "Valyrian/letter2"):
        write_images(tmp_path / name, [1])
    images = opened(tmp_path)
    assert len(images.names) == sum(map(len, images.splits.values())) == 8
    assert "a fixed shuffle of the classes, --split-shares 64,16,20" in images.summary[0]


# What lies in the folder: parts with classes of different names, or a function that writes it.
REFUSED = {
    "train Training test": "Training/ and train/ may both hold train classes",
    "train test my_test_2": "my_test_2/ looks like part of a split",
    "fold0 fold1 fold2": "fold0/ looks like part of a split",
    "train tuning test": "test/, train/ looks like a split, and tuning/ does not",
    "train Greek Latin": "train/ looks like a split",
    "val test": "val/, test/ and no training classes",
    "data/train data/test": "/data: test/, train/ look like a split: give images:",
    "data/tr data/te": "/data: te/, tr/ look like a split",
    "train/support train/query test/support": "/train: query/, support/ look like a split",
}


def add(path: str, content: str = "") -> Callable[[Path], object]:
    """Return a function that writes class folders, and a file among them."""

    def write(folder: Path) -> None:
        make(folder, "")
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)

    return write


LIST = "filename,label\n000.png,n0_00\n"
COLUMNS = 'looks like the list of a split: .* "filename" and "label", a comma between'
WRITTEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "images without classes": (
        lambda f: [write_images(f / part, [i]) for i, part in enumerate(("train", "test"))],
        "test: put the images of each class into a folder of its own",
    ),
    "flat test": (
        lambda f: (make(f, "train"), write_images(f / "test", [1])),
        "test: put the images of each class into a folder of its own",
    ),
    "a task": (
        lambda f: [write_images(f / part, [1]) for part in ("support", "query")],
        "query/ looks like part of a split",
    ),
    "one class in two parts": (
        lambda f: (make(f, "train", "test"), write_images(f / "test" / "n0_01", [9])),
        "n0_01 is in train and in test: leave it once",
    ),
    "an archive": (lambda f: (f.mkdir(), (f / "a.tar.gz").touch()), "holds a.tar.gz: unpack it there first"),
    "other columns": (add("train.csv", "image,class\n"), f"train.csv {COLUMNS}"),
    "another form": (add("val.txt", "n0_00/000.png 0\n"), f"val.txt {COLUMNS}"),
    "semicolons": (
        lambda f: (add("train.csv", LIST)(f), add("test.csv", LIST.replace(",", ";"))(f)),
        f"test.csv {COLUMNS}",
    ),
    "another name": (add("mini_test.csv", LIST), f"mini_test.csv {COLUMNS}"),
    "other formats": (add("a/0.jp2"), "/a holds files such as 0.jp2, of no format that is read"),
    "no endings": (add("a/img1"), "/a holds files such as img1, .*: convert or rename them"),
    "Parquet files further down": (add("x/train/0.parquet"), "x/train holds 0.parquet: give its folder"),
    "Git LFS": (
        add("n0_00/000.png", "version https://git-lfs.github.com"),
        "n0_00/000.png is not a readable image .*git lfs pull",
    ),
}


@pytest.mark.parametrize("case", [*REFUSED, *WRITTEN])
def test_what_looks_like_a_split_and_is_none_is_refused(case, tmp_path):
    write, message = WRITTEN.get(case) or (lambda folder: make(folder, *case.split()), REFUSED[case])
    write(tmp_path / "data")
    with refused(message):
        opened(tmp_path / "data")


def test_names_that_only_hint_at_a_part_of_a_split_are_known():
    names = ("cub_test_a", "tr", "va", "te", "fold0", "support", "query", "vald", "Validierung")
    assert all(map(find_part, names)) and not any(map(parse_split, names))


def test_a_folder_of_test_classes_serves_for_a_test(tmp_path):
    make(tmp_path, "test")
    assert class_names(opened(tmp_path, FOR_TEST))["test"] == ["n0_00", "n0_01"]


@pytest.mark.parametrize("lists", [False, True])
def test_parts_with_the_same_classes_are_put_together_and_said(lists, tmp_path):
    for number, part in enumerate(("train", "test")):
        write_classes(tmp_path / part, 5, first=20 * number)
        rows = [f"{part}/c{c:02}/00{i}.png,c{c:02}" for c in range(5) for i in range(3)]
        if lists:
            (tmp_path / f"{part}.csv").write_text("\n".join(["filename,label", *rows]))
    images = opened(tmp_path)
    names = [name for part in class_names(images).values() for name in part]
    assert sorted(names) == [f"c{c:02}" for c in range(5)] and images.count.tolist() == [6] * 5
    ends = ".csv" if lists else "/"
    line = f"train{ends}, test{ends} have the same classes: put together, since tests are on other classes"
    assert images.notes == [line]
    assert images.load()[:6, 0, 0, 0].tolist() == [0, 1, 2, 20, 21, 22]


def test_other_folders_and_files_are_left_out_with_a_count(tmp_path):
    make(tmp_path, "train", "val", "test", "extra")
    for name in ("Thumbs.db", ".DS_Store", "._1.png", "notes.txt"):
        (tmp_path / "train" / "n0_00" / name).touch()
    (tmp_path / "train" / "n0_01" / "Thumbs.db").touch()
    (tmp_path / "README.md").touch()
    images = opened(tmp_path)
    assert len(images.names) == 6 and images.load().shape[0] == 18
    names = "extra/, .DS_Store, ._1.png, ..."
    assert images.notes == [f"left out: 6 other files and folders ({names})"]


def test_classes_with_too_few_images_are_counted_and_can_be_left_out(tmp_path):
    write_classes(tmp_path, 20, count=6)
    for number, count in enumerate((2, 4, 0)):
        write_images(tmp_path / f"small{number}", range(count))
    with refused(r"small2: put the images .*--min-examples 1"):
        opened(tmp_path)
    few = r"'small0' has 2 images, and -k plus -q is 6 \(2 of 22 have too few\).*--min-examples 6"
    with refused(few):
        ImageTasks(opened(tmp_path, min_examples=1), ways=2, shots=1, queries=5)
    images = opened(tmp_path, min_examples=6)
    assert images.notes == ["left out: 3 classes with fewer than 6 images"]
    names = [name for part in class_names(images).values() for name in part]
    assert sorted(names) == [f"c{c:02}" for c in range(20)]
    ImageTasks(images, ways=2, shots=1, queries=5)
    with refused("--min-examples 7 leaves no classes"):
        opened(tmp_path, min_examples=7)
