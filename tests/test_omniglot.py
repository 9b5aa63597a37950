"""Omniglot is read from folders or archives, fetched if need be, and split in two ways."""

from pathlib import Path

import torch
import torchvision
from conftest import build_tasks, refused, write_part
from torch.testing import assert_close

from common.batch import TaskBatch
from common.random import SPLITS
from learner import build_learner
from tasks.pixels import Form
from tasks.published import open_benchmark, split_characters

INK_IS_ONE = Form(28, 1, invert=True)


def load(root: Path) -> torch.Tensor:
    return open_benchmark("omniglot", root, INK_IS_ONE).load()


def test_folders_and_archives_are_read_and_cached(small_omniglot, monkeypatch):
    pixels = load(small_omniglot)
    assert pixels.shape == (16 * 20, 1, 28, 28) and pixels.dtype == torch.uint8
    assert pixels[0, 0, 0, 0] == 255 and pixels[0, 0, -1, -1] == 0  # ink is 255
    assert not torch.equal(pixels[0], pixels[1])
    monkeypatch.setattr("tasks.pixels.prepare", None)  # from now on, reading a drawing fails
    assert torch.equal(load(small_omniglot), pixels)


def test_damaged_data_is_named(small_omniglot):
    folder = small_omniglot / "omniglot-py"
    drawing = folder / "images_background/A3/character01/0001_07.png"
    drawing.write_bytes(drawing.read_bytes()[:40])
    with refused(r"0001_07.png is not a readable image"):
        load(small_omniglot)
    drawing.unlink()
    with refused("images_background should have 12 characters of 20 drawings"):
        load(small_omniglot)
    write_part(folder, "images_background", 6, archive=False)
    archive = folder / "images_evaluation.zip"
    archive.write_bytes(archive.read_bytes()[:-3000])
    with refused("images_evaluation should have 4 characters"):
        load(small_omniglot)


def test_the_folder_of_the_data_itself_is_understood(small_omniglot):
    assert torch.equal(load(small_omniglot / "omniglot-py"), load(small_omniglot))


def test_a_failed_download_is_one_line(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", no_network)
    with refused(r"Omniglot is incomplete in .*no route to host.*--data-root"):
        load(tmp_path)


def test_what_was_fetched_is_read_from_archives_or_folders(tmp_path, monkeypatch, small_omniglot):
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


def test_omniglot_as_a_folder_of_images_gives_the_same_tasks(small_omniglot):
    data = small_omniglot / "omniglot-py"
    (data / "images_evaluation.zip").unlink()
    write_part(data, "images_evaluation", 2, archive=False)
    names = open_benchmark("omniglot", small_omniglot, INK_IS_ONE).names
    for split, characters in split_characters(names, "random").items():
        rows = [f"{path.name},{name}" for name in characters for path in (data / name).iterdir()]
        listing = data / f"{'val' if split == 'validation' else split}.csv"
        listing.write_text("\n".join(["filename,label", *rows]))

    def sample(dataset: str, split: str) -> TaskBatch:
        form = dict(image_size=28, invert=True, quarter_turns=True)
        tasks = build_tasks(dataset, small_omniglot, ways=2, shots=2, queries=3, **form)
        return tasks.sample(split, 3, 5, range(6))

    for split in SPLITS:
        ours, theirs = sample(f"images:{data}", split), sample("omniglot", split)
        assert all(map(torch.equal, ours.parts.values(), theirs.parts.values()))


def test_the_networks_padding_is_that_of_the_papers_code_on_images_turned_by_half():
    """TensorFlow pads even sizes below and to the right; tasks turn each class by random quarters anyway."""
    network = build_learner("conv", 5, inputs=(1, 28, 28), init="paper").double()
    x = torch.rand(4, 1, 28, 28, dtype=torch.float64)
    y = x.rot90(2, (2, 3))
    for layer in network:
        if isinstance(layer, torch.nn.Conv2d):
            before = 1 if y.shape[-1] % 2 else 0
            padded = torch.nn.functional.pad(y, (before, 1, before, 1))
            y = torch.nn.functional.conv2d(padded, layer.weight.rot90(2, (2, 3)), stride=2)
        else:
            y = layer(y)
    assert_close(network(x), y)
