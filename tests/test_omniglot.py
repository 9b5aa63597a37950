"""Omniglot is read from folders or archives, fetched if need be, and split in two ways."""

import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import write_part

from common.errors import UsageError
from common.random import SPLITS
from dataset import build_distribution
from tasks import images
from tasks.images import Form, open_folder
from tasks.options import TaskOptions
from tasks.published import open_benchmark, split_characters

INK_IS_ONE = Form(28, 1, invert=True)


def load(root: Path, form: Form = INK_IS_ONE) -> torch.Tensor:
    return open_benchmark("omniglot", root, form).load()


def test_folders_and_archives_are_read_and_cached(small_omniglot, monkeypatch):
    pixels = load(small_omniglot)
    assert pixels.shape == (16 * 20, 1, 28, 28) and pixels.dtype == torch.uint8
    assert pixels[0, 0, 0, 0] == 255 and pixels[0, 0, -1, -1] == 0  # ink is 255
    assert not torch.equal(pixels[0], pixels[1])
    paper, nearest = (load(small_omniglot, Form(28, 1, *more)) for more in ((False,), (True, "nearest")))
    assert torch.equal(paper, 255 - pixels)
    assert set(nearest.unique().tolist()) == {0, 255} and len(pixels.unique()) > 2
    monkeypatch.setattr(images, "_decode", None)  # from here on, reading a drawing would fail
    assert torch.equal(load(small_omniglot), pixels)


def test_an_archive_and_its_folder_are_the_same_characters(small_omniglot):
    folder = small_omniglot / "omniglot-py"
    archived = open_benchmark("omniglot", small_omniglot, INK_IS_ONE, "alphabet")
    pixels = archived.load()
    (folder / "images_evaluation.zip").unlink()
    write_part(folder, "images_evaluation", 2, archive=False)
    unpacked = open_benchmark("omniglot", small_omniglot, INK_IS_ONE, "alphabet")
    assert unpacked.names == archived.names and torch.equal(unpacked.load(), pixels)
    assert all(torch.equal(unpacked.splits[split], part) for split, part in archived.splits.items())


def test_damaged_data_is_named(small_omniglot):
    folder = small_omniglot / "omniglot-py"
    drawing = folder / "images_background/A3/character01/0001_07.png"
    drawing.write_bytes(drawing.read_bytes()[:40])
    with pytest.raises(UsageError, match=r"0001_07.png is no readable image"):
        load(small_omniglot)
    drawing.unlink()
    with pytest.raises(UsageError, match="images_background has not 12 characters of 20 drawings"):
        load(small_omniglot)
    write_part(folder, "images_background", 6, archive=False)
    archive = folder / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-3000])
    with pytest.raises(UsageError, match="images_evaluation has not 4 characters"):
        load(small_omniglot)


def test_data_that_cannot_be_fetched_is_said_in_one_line(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", no_network)
    with pytest.raises(UsageError, match=r"Omniglot is not whole in .*no route to host.*--data-root"):
        load(tmp_path)


def test_what_was_fetched_is_read(tmp_path, monkeypatch, small_omniglot):
    def download(root, background, download):
        part = "images_background" if background else "images_evaluation"
        write_part(Path(root) / "omniglot-py", part, 6 if background else 2, archive=False)

    monkeypatch.setattr(torchvision.datasets, "Omniglot", download)
    assert torch.equal(load(tmp_path / "empty"), load(small_omniglot))


def test_alphabet_split_keeps_alphabets_together():
    names = [
        f"{part}/{alphabet}/character{c:02}"
        for part, alphabets in (("images_background", "ABCDEFGHIJKLM"), ("images_evaluation", "VW"))
        for alphabet in alphabets
        for c in range(3)
    ]
    splits = split_characters(names, "alphabet")
    alphabets = {split: {name.rpartition("/")[0] for name in part} for split, part in splits.items()}
    assert alphabets["validation"] == {"images_background/F", "images_background/L"}
    assert alphabets["test"] == {"images_evaluation/V", "images_evaluation/W"}
    assert not alphabets["train"] & alphabets["validation"] and len(alphabets["train"]) == 11


def test_real_omniglot_as_a_folder_of_images_is_omniglot(tmp_path, omniglot_root, shared_cache):
    with zipfile.ZipFile(omniglot_root / "omniglot-py" / "images_background.zip") as archive:
        wanted = [n for n in archive.namelist() if n.split("/")[1] in ("Braille", "Greek", "Korean")]
        archive.extractall(tmp_path, wanted)
    folder = open_folder(tmp_path, INK_IS_ONE, {"train": 1})
    omniglot = open_benchmark("omniglot", omniglot_root, INK_IS_ONE)
    numbers = [omniglot.names.index(name) for name in folder.names]
    expected = omniglot.load().view(1623, 20, 28, 28)[numbers]
    assert len(numbers) == 90 and torch.equal(folder.load().view(90, 20, 28, 28), expected)


def test_class_lists_of_the_same_split_make_the_same_tasks(small_omniglot):
    data = small_omniglot / "omniglot-py"
    (data / "images_evaluation.zip").unlink()
    write_part(data, "images_evaluation", 2, archive=False)
    names = open_benchmark("omniglot", small_omniglot, INK_IS_ONE).names
    for split, characters in split_characters(names, "random").items():
        rows = [f"{path.name},{name}" for name in characters for path in (data / name).iterdir()]
        name = "val" if split == "validation" else split
        (data / f"{name}.csv").write_text("\n".join(["filename,label", *rows]))
    common = dict(ways=2, shots=2, queries=3, image_size=28, channels=1, invert=True)
    omniglot, folder = (
        build_distribution(
            TaskOptions(**options, **common), data_root=small_omniglot, device=torch.device("cpu")
        )
        for options in ({"dataset": "omniglot"}, {"dataset": f"images:{data}", "quarter_turns": True})
    )
    for split in SPLITS:
        batches = (tasks.sample(split, 3, 5, range(6)) for tasks in (folder, omniglot))
        assert all(torch.equal(a, b) for a, b in zip(*batches, strict=True))
