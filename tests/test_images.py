"""Images from files to pixels: what is read, what is refused in one line, and what is cached."""

import os
import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SHARES, class_names, refused, write_classes, write_images
from PIL import Image
from runs import command

from tasks import published
from tasks.folders import image_files
from tasks.images import open_images
from tasks.pixels import Form, decode_all
from tasks.published import open_benchmark
from tasks.splits import find_seen, published_splits

SMALL = Form(6, 1)

pytestmark = pytest.mark.usefixtures("user_cache")


def read_images(folder: Path, form: Form) -> torch.Tensor:
    return torch.from_numpy(np.stack([*decode_all(image_files(folder)[0], form)]))


def load(folder: Path, form: Form = SMALL) -> torch.Tensor:
    return open_images(folder, form, SHARES).load()


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# ---- layouts --------------------------------------------------------------------------------


def test_lists_of_files_and_labels_are_followed(tmp_path):
    write_images(tmp_path / "images", range(8))
    (tmp_path / "train.csv").write_text("filename,label\n005.png,x\n001.png,y\n")
    (tmp_path / "val.csv").write_text("filename,label\n002.png,z\n")
    (tmp_path / "test.csv").write_text("label,filename\nw,000.png\nw,007.png\n")
    opened = open_images(tmp_path, SMALL, SHARES)
    assert class_names(opened) == {"train": ["x", "y"], "validation": ["z"], "test": ["w"]}
    assert opened.load()[:, 0, 0, 0].tolist() == [0, 7, 5, 1, 2]  # w, x, y, z


def test_class_folders_are_split_with_one_cache_for_all_shares(tmp_path):
    write_classes(tmp_path, 25, count=1)
    (tmp_path / "README.md").touch()
    (tmp_path / ".git").mkdir()
    opened = open_images(tmp_path, SMALL, SHARES)
    other = open_images(tmp_path, SMALL, SHARES | {"test": 0})
    assert class_names(other)["test"] == []
    assert [len(part) for part in opened.splits.values()] == [16, 4, 5]
    assert torch.equal(opened.load(), other.load()) and len(list(tmp_path.glob(".*.npy"))) == 1


# ---- from a file to pixels ------------------------------------------------------------------


def test_images_of_every_kind_become_the_same_pixels(tmp_path):
    left_dark = np.zeros((6, 6), np.uint8)
    left_dark[:, 3:] = 200
    grey = Image.fromarray(left_dark)
    grey.save(tmp_path / "grey.png")
    grey.convert("RGB").save(tmp_path / "rgb.bmp")
    grey.convert("P").save(tmp_path / "palette.gif")
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by a quarter
    grey.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    opaque = np.where(left_dark == 0, 255, 0).astype(np.uint8)
    see_through = Image.merge("LA", [Image.new("L", (6, 6), 0), Image.fromarray(opaque)])
    see_through.save(tmp_path / "zalpha.png")  # black, with a transparent right half
    for other in ("notes.txt", ".hidden.png"):
        (tmp_path / other).write_text("ignored")
    read = read_images(tmp_path, SMALL)
    assert len(read) == 5 and (read[:4] == torch.from_numpy(left_dark)).all()
    assert read[4, 0, 0].tolist() == [0, 0, 0, 255, 255, 255]  # on white
    colour = read_images(tmp_path, Form(6, 3, invert=True))
    assert torch.equal(colour, (255 - read).expand(-1, 3, -1, -1))


def test_one_bit_images_are_resized_smoothly_by_default(tmp_path):
    for folder in "abc":
        (tmp_path / folder).mkdir()
        Image.fromarray(np.indices((40, 40)).sum(0) % 2 == 0).save(tmp_path / folder / "bits.png")
    smooth, nearest = (load(tmp_path, form) for form in (SMALL, Form(6, 1, resize="nearest")))  # from a cache
    assert ((smooth > 60) & (smooth < 195)).all() and set(nearest.unique().tolist()) <= {0, 255}


# ---- bad data -------------------------------------------------------------------------------


def three(change):
    """Return a function that writes three classes, c00 to c02, and changes them."""
    return lambda folder: (write_classes(folder, 3), change(folder))


def listed(rows: str):
    return lambda folder: (write_images(folder / "images", [0]), (folder / "train.csv").write_text(rows))


BAD = {
    "damaged": (
        three(lambda f: os.truncate(f / "c01/001.png", 50)),
        "c01/001.png is not a readable .*remove",
    ),
    "empty class": (three(lambda f: (f / "A/empty").mkdir(parents=True)), "A/empty: put the images"),
    "loose images": (lambda f: write_images(f, range(3)), "into a folder of its own"),
    "missing": (lambda f: None, "there is no folder"),
    "an image in two splits": (
        lambda f: (
            write_classes(f / "train", 3),
            write_classes(f / "test", 1, prefix="d"),
            (f / "test" / "link").symlink_to(f / "train" / "c00"),
        ),
        "c00/000.png is in train and in test",
    ),
    "an image linked into another split": (
        lambda f: (
            write_classes(f / "train", 3),
            write_classes(f / "test", 1, prefix="d"),
            (f / "test" / "d00" / "link.png").symlink_to(f / "train" / "c00" / "000.png"),
        ),
        "c00/000.png is in train and in test",
    ),
    "short row": (listed("filename,label\n000.png"), 'should have a "filename" and a "label"'),
    "missing file": (listed("filename,label\n000.png,x\n9.png,x"), "there is no 9.png in"),
    "listed twice": (listed("filename,label\n000.png,x\n000.png,y"), "000.png is twice in train"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_refused_in_one_line_and_leaves_nothing(case, tmp_path, user_cache):
    folder = tmp_path / "data"
    make, message = BAD[case]
    make(folder)
    before = listing(tmp_path)
    with refused(message):
        load(folder)
    assert listing(tmp_path) == before and not [p for p in user_cache.rglob("*") if p.is_file()]


# ---- the cache ------------------------------------------------------------------------------


def test_images_are_decoded_once(tmp_path, monkeypatch):
    write_classes(tmp_path, 3)
    made = load(tmp_path).clone()
    assert load(tmp_path, Form(6, 1, invert=True))[0, 0, 0, 0] == 255
    monkeypatch.setattr("tasks.pixels.prepare", None)  # from now on, decoding fails
    assert torch.equal(load(tmp_path), made)
    os.utime(tmp_path / "c01" / "001.png", ns=(1, 1))  # as after a change
    with pytest.raises(TypeError):
        load(tmp_path)


def test_a_read_only_data_folder_is_cached_in_the_users_folder(tmp_path, user_cache, monkeypatch):
    write_classes(tmp_path, 3)
    before = listing(tmp_path)
    monkeypatch.setattr("tasks.cache.is_writable", lambda folder: False)
    load(tmp_path)
    assert listing(tmp_path) == before and len(list((user_cache / "maml").iterdir())) == 1


# ---- the published benchmarks ---------------------------------------------------------------


class FakeCIFAR100:
    """Stand in for torchvision's class; the pixels encode an image's class and half."""

    classes = sorted(chain(*published_splits("fc100").values()))

    def __init__(self, root, train, download):
        file = Path(root) / "cifar-100-python" / ("train" if train else "test")
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            file.touch()
        self.targets = [c for _ in range(5 if train else 1) for c in range(100)]
        self.class_to_idx = {name: c for c, name in enumerate(self.classes)}
        self.data = np.zeros((len(self.targets), 32, 32, 3), np.uint8)
        self.data[..., 0] = np.array(self.targets)[:, None, None]
        self.data[..., 1] = 255 if train else 0


@pytest.mark.parametrize("name", ["cifar-fs", "fc100"])
def test_cifar_has_the_right_images_under_each_class_name(name, tmp_path, monkeypatch):
    monkeypatch.setattr(published, "CIFAR_IMAGES", 6)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCIFAR100)
    opened = open_benchmark(name, tmp_path / "data", Form(4, 3))
    assert class_names(opened) == published_splits(name) and opened.count.tolist() == [6] * 100
    pixels = opened.load().view(100, 6, 3, 4, 4)[..., 0, 0]
    for c, class_name in enumerate(opened.names):
        assert (pixels[c, :, 0] == FakeCIFAR100.classes.index(class_name)).all()
    assert (pixels[:, :5, 1] == 255).all() and (pixels[:, 5:, 1] == 0).all()


def test_benchmarks_of_the_same_images_are_no_test_of_each_other(tmp_path, monkeypatch, refuse, capsys):
    assert len(find_seen("cifar-fs", "fc100", "test")) == 11
    assert len(find_seen("mini-imagenet", "tiered-imagenet", "test")) == 13
    assert find_seen("omniglot", "icons", "test") == find_seen("fc100", "fc100", "test") == []
    monkeypatch.setattr(published, "CIFAR_IMAGES", 6)
    monkeypatch.setattr(torchvision.datasets, "CIFAR100", FakeCIFAR100)
    run = ["--dataset", "cifar-fs", "--learner", "fc", "-n", 2, "-q", 1, "--image-size", 4, "--iterations", 1]
    run += ["--val-tasks", 2, "--data-root", tmp_path / "data"]
    assert command(*run, "--checkpoint-path", tmp_path, "--run-name", "run") == 0
    message = refuse("--eval", "--load", tmp_path / "run", "--eval-dataset", "fc100", *run[-2:])
    assert "--eval-dataset fc100: cifar-fs trains on 11 of the test classes of fc100, such as" in message
    line = refuse(
        "--init-from", tmp_path / "run", "--dataset", "fc100", *run[2:], "--checkpoint-path", tmp_path
    )
    assert f"--init-from {tmp_path / 'run'}/best.pt: cifar-fs trains on" in line
    shipped = ROOT / "checkpoints" / "pretrained" / "omniglot-5way-1shot-maml"
    line = refuse("--init-from", shipped, "--dataset", "omniglot", "--omniglot-split", "alphabet")
    assert "another split of omniglot holds out: give --omniglot-split random" in line
    assert command("--dataset", "fc100", *run[1:], "--checkpoint-path", tmp_path) == 2
    assert "trains on what validates or tests" in capsys.readouterr().err


def write_published(folder: Path) -> None:
    for split, wnids in published_splits("mini-imagenet").items():
        for wnid in wnids:
            write_images(folder / {"validation": "val"}.get(split, split) / wnid, [len(split)])


def test_mini_imagenet_is_read_from_split_folders_or_one_folder(tmp_path):
    parts, one = (tmp_path / root / "mini-imagenet" for root in "ab")
    write_published(parts)
    for part in parts.iterdir():
        shutil.copytree(part, one, dirs_exist_ok=True)
    write_images(one / "n99999999", [0])  # another class of ImageNet
    for root in "ab":
        opened = open_benchmark("mini-imagenet", tmp_path / root, SMALL)
        for split, names in class_names(opened).items():
            assert sorted(names) == sorted(published_splits("mini-imagenet")[split])
        pixels = opened.load()
        for split, part in opened.splits.items():
            assert (pixels[part, 0, 0, 0] == len(split)).all()  # one image a class


def test_a_benchmark_must_have_the_published_classes(tmp_path):
    with refused(r"there is no folder .*mini-imagenet: .* train, val and test"):
        open_benchmark("mini-imagenet", tmp_path, SMALL)
    folder = tmp_path / "mini-imagenet"
    write_published(folder)
    moved = published_splits("mini-imagenet")["test"][3]
    (folder / "test" / moved).rename(folder / "train" / moved)
    with refused(f"{moved} is missing in train, or was not published there"):
        open_benchmark("mini-imagenet", tmp_path, SMALL)
