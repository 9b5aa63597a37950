"""Task distributions: their laws, and that what must not meet never meets."""

import math
from pathlib import Path

import pytest
import torch
from conftest import write_part

from commands import config
from common.errors import UsageError
from common.random import task_stream
from dataset import FAMILIES, Harmonic, Sinusoid, SinusoidLine
from tasks import omniglot
from tasks.image_tasks import ImageTasks
from tasks.images import ImageSet
from tasks.omniglot import load_omniglot, split_characters

MANY = range(20_000)


def uniform_within(values: torch.Tensor, low: float, high: float) -> bool:
    """Inside, close to both ends, and with the mean in the middle (six standard errors)."""
    width = high - low
    inside = values.min() >= low and values.max() <= high
    filled = values.min() < low + 0.01 * width and values.max() > high - 0.01 * width
    error = width / math.sqrt(12 * values.numel())
    return bool(inside and filled and abs(values.mean() - (low + high) / 2) < 6 * error)


# ---- synthetic families ---------------------------------------------------------------------


def test_sinusoid_is_the_assignments():
    family = Sinusoid(10, 15, dtype=torch.float64)
    batch = family.sample("train", 0, 0, MANY)
    assert batch.support_x.shape == (20_000, 10, 1) and batch.query_y.shape == (20_000, 15, 1)
    assert uniform_within(batch.support_x, -5, 5) and uniform_within(batch.query_x, -5, 5)
    # a sin(x + phase) is linear in a cos(phase) and a sin(phase): solve for them, from the support
    design = torch.cat([batch.support_x.sin(), batch.support_x.cos()], 2)
    cosine, sine = torch.linalg.lstsq(design, batch.support_y).solution.squeeze(2).T
    amplitude, phase = torch.hypot(cosine, sine), torch.atan2(sine, cosine)
    assert uniform_within(amplitude, 0.1, 5) and uniform_within(phase, 0, math.pi)
    predicted = amplitude[:, None, None] * torch.sin(batch.query_x + phase[:, None, None])
    assert torch.allclose(predicted, batch.query_y, atol=1e-8)  # the query is of the same task


def test_sinusoid_line_mixes_both_kinds_evenly():
    family = SinusoidLine(3, 3, dtype=torch.float64)
    batch = family.sample("train", 0, 0, MANY)
    (x1, x2, x3), (y1, y2, y3) = (t.squeeze(2).T for t in (batch.support_x, batch.support_y))
    straight = ((y2 - y1) * (x3 - x1) - (y3 - y1) * (x2 - x1)).abs() < 1e-9
    assert abs(straight.double().mean() - 0.5) < 0.02
    slope = (y2 - y1)[straight] / (x2 - x1)[straight]
    intercept = y1[straight] - slope * x1[straight]
    assert uniform_within(slope, -3, 3) and uniform_within(intercept, -3, 3)


def test_harmonic_has_two_frequencies_and_inputs_around_the_tasks_mean():
    family = Harmonic(200, 1, dtype=torch.float64)
    tasks = range(5000)
    x, y = (t.squeeze(2) for t in family.sample("train", 0, 0, tasks)[:2])
    stream = task_stream("train", 0, 0, tasks, family.device)
    frequency, *_, mean = family.parameters(stream.at("parameters"))
    assert uniform_within(frequency, 5, 7) and uniform_within(mean, -4, 4)
    assert abs((x - mean).mean()) < 0.01 and abs((x - mean).std() - 1) < 0.01
    # each a sin(w x + b) is linear in a cos(b) and a sin(b): solve for the four, and look at them
    waves = [f(k * frequency * x) for k in (1, 2) for f in (torch.sin, torch.cos)]
    design = torch.stack(waves, 2)
    solution = torch.linalg.lstsq(design, y[..., None]).solution
    assert torch.allclose((design @ solution).squeeze(2), y, atol=1e-8)
    cosine_1, sine_1, cosine_2, sine_2 = solution.squeeze(2).T
    for cosine, sine in ((cosine_1, sine_1), (cosine_2, sine_2)):
        assert abs((cosine**2 + sine**2).mean() - 1) < 0.1  # a is standard normal
        assert abs((cosine**2).mean() - (sine**2).mean()) < 0.1  # b has no preferred direction


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_is_added_to_the_targets_alone_and_never_to_the_picture(name):
    clean, noisy = (
        FAMILIES[name](20, 20, noise=noise, dtype=torch.float64).sample("test", 0, 0, range(5000))
        for noise in (0.0, 0.3)
    )
    assert torch.equal(clean.support_x, noisy.support_x)
    for noise in (noisy.support_y - clean.support_y, noisy.query_y - clean.query_y):
        assert abs(noise.mean()) < 0.01 and abs(noise.std() - 0.3) < 0.01
    grids = [
        FAMILIES[name](5, 5, noise=noise).sample("test", 0, 0, range(3), grid=50) for noise in (0.0, 0.3)
    ]
    assert torch.equal(grids[0].query_y, grids[1].query_y)
    assert (grids[0].query_x.diff(dim=1) > 0).all()  # sorted


@pytest.mark.parametrize("name", FAMILIES)
def test_tasks_depend_on_split_seed_iteration_and_number_alone(name):
    family = FAMILIES[name](5, 5)
    batch = family.sample("train", 3, 7, range(10))
    part = family.sample("train", 3, 7, range(4, 6))
    assert all(torch.equal(a[4:6], b) for a, b in zip(batch, part, strict=True))
    for other in (("validation", 3, 7), ("test", 3, 7), ("train", 4, 7), ("train", 3, 8)):
        assert not (family.sample(*other, range(10)).support_x == batch.support_x).any()


def test_the_same_test_tasks_whatever_the_shots():
    few, many = (Sinusoid(shots, 10).sample("test", 0, 0, range(5)) for shots in (5, 10))
    assert torch.equal(few.query_y, many.query_y)
    assert torch.equal(few.support_x, many.support_x[:, :5])


# ---- Omniglot -------------------------------------------------------------------------------


def labelled_pixels(characters=30, drawings=20) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """2 x 2 images that say what they are: character, drawing, and two corners that show the turn."""
    images = torch.zeros(characters, drawings, 2, 2, dtype=torch.uint8)
    images[..., 0, 0] = torch.arange(characters, dtype=torch.uint8)[:, None]
    images[..., 0, 1] = torch.arange(drawings, dtype=torch.uint8) + 100
    images[..., 1, 1] = 255
    order = torch.arange(characters)
    return images, {"train": order[:15], "validation": order[15:20], "test": order[20:]}


def read_back(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(character, drawing, quarter turns) of each image."""
    x = (x.squeeze(-3) * 255).round().int()
    turned_back = torch.stack([torch.rot90(x, -q, (-2, -1)) for q in range(4)])
    upright = (turned_back[..., 1, 1] == 255) & (turned_back[..., 1, 0] == 0)
    quarters = upright.int().argmax(0)
    image = turned_back.gather(0, quarters[None, ..., None, None].expand(1, *x.shape))[0]
    return image[..., 0, 0], image[..., 0, 1] - 100, quarters


def test_omniglot_tasks_are_built_as_the_protocol_says():
    images, splits = labelled_pixels()
    ways, shots, queries = 5, 3, 4
    found = ImageSet.of_equal_classes(images, splits, "drawings")
    distribution = ImageTasks(found, ways=ways, shots=shots, queries=queries, quarter_turns=True)
    seen_turns = []
    for split, characters in splits.items():
        batch = distribution.sample(split, 0, 0, range(400))
        support, query = (
            [part.view(400, ways, n) for part in read_back(x)]
            for x, n in ((batch.support_x, shots), (batch.query_x, queries))
        )
        both = [torch.cat(pair, 2) for pair in zip(support, query, strict=True)]
        character, drawing, turn = both
        labels = torch.cat([batch.support_y.view(400, ways, -1), batch.query_y.view(400, ways, -1)], 2)
        assert (labels == torch.arange(ways)[:, None]).all()
        for part in (character, turn):  # one character and one rotation a class
            assert (part == part[..., :1]).all()
        chosen = character[..., 0]
        assert all(len(set(task)) == ways for task in chosen.tolist())  # never two turns of one
        assert set(chosen.unique().tolist()) == set(characters.tolist())  # all of this split, no other
        first_label = torch.bincount(chosen[:, 0].long() - characters[0], minlength=len(characters))
        assert (first_label > 0).all()  # any character under any label
        assert all(len(set(d)) == shots + queries for task in drawing.tolist() for d in task)
        seen_turns.append(torch.bincount(turn[..., 0].flatten(), minlength=4))
    assert all((turns > 350).all() for turns in seen_turns)  # a quarter of 2,000 each, in every split


def test_folders_and_archives_are_read_and_cached(small_omniglot, monkeypatch):
    images, splits = load_omniglot(small_omniglot, split="random", resize="lanczos")
    assert images.shape == (16, 20, 28, 28) and images.dtype == torch.uint8
    assert images[0, 0, 0, 0] == 255 and images[0, 0, -1, -1] == 0  # ink is 255
    assert not torch.equal(images[0, 0], images[0, 1])
    assert sorted(torch.cat(list(splits.values())).tolist()) == list(range(16))
    (cache,) = (small_omniglot / "omniglot-py").glob("*.npz")
    monkeypatch.setattr(omniglot, "_decode", None)  # from here on, reading a drawing would fail
    again, _ = load_omniglot(small_omniglot, split="random", resize="lanczos")
    assert torch.equal(images, again)
    monkeypatch.undo()
    monkeypatch.setattr(omniglot, "PARTS", {"images_background": 12, "images_evaluation": 4})
    cache.write_bytes(cache.read_bytes()[:1000])  # a damaged cache is made again
    again, _ = load_omniglot(small_omniglot, split="alphabet", resize="lanczos")
    assert torch.equal(images, again)
    nearest, _ = load_omniglot(small_omniglot, split="alphabet", resize="nearest")
    assert set(nearest.unique().tolist()) == {0, 255} and len(images.unique()) > 2


def test_a_read_only_data_folder_is_left_alone(small_omniglot):
    (small_omniglot / "omniglot-py").chmod(0o555)
    load_omniglot(small_omniglot, split="random", resize="lanczos")
    (small_omniglot / "omniglot-py").chmod(0o755)
    assert not list((small_omniglot / "omniglot-py").glob("*.npz"))
    assert len(list((small_omniglot / "cache" / "maml").glob("*.npz"))) == 1


def test_damaged_data_is_named(small_omniglot):
    victim = small_omniglot / "omniglot-py/images_background/A3/character01/0001_07.png"
    content = victim.read_bytes()
    victim.write_bytes(content[:40])
    with pytest.raises(UsageError, match="images_background is damaged"):
        load_omniglot(small_omniglot, split="random", resize="lanczos")
    victim.unlink()
    with pytest.raises(UsageError, match="A3/character01 has 19 drawings instead of 20"):
        load_omniglot(small_omniglot, split="random", resize="lanczos")


def test_data_that_cannot_be_fetched_is_said_in_one_line(tmp_path, monkeypatch):
    import torchvision

    def no_network(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "Omniglot", no_network)
    with pytest.raises(UsageError, match=r"no route to host.*put images_background.zip"):
        load_omniglot(tmp_path, split="random", resize="lanczos")


def test_fetching_leaves_what_is_read(tmp_path, monkeypatch, small_omniglot):
    import torchvision

    def download(root, background, download):
        part = "images_background" if background else "images_evaluation"
        write_part(Path(root) / "omniglot-py", part, 6 if background else 2, archive=False)

    monkeypatch.setattr(torchvision.datasets, "Omniglot", download)
    fetched, _ = load_omniglot(tmp_path / "empty", split="random", resize="lanczos")
    local, _ = load_omniglot(small_omniglot, split="random", resize="lanczos")
    assert torch.equal(fetched, local)


@pytest.mark.parametrize("split", config.OMNIGLOT_CLASSES)
def test_real_omniglot_splits_are_disjoint_complete_and_of_the_stated_sizes(split, omniglot_root):
    images, splits = load_omniglot(omniglot_root, split=split, resize="lanczos")
    assert {name: len(part) for name, part in splits.items()} == config.OMNIGLOT_CLASSES[split]
    everything = torch.cat(list(splits.values()))
    assert len(everything) == len(everything.unique()) == len(images) == 1623
    pictures = {name: {images[c].numpy().tobytes() for c in part} for name, part in splits.items()}
    assert not (pictures["train"] & pictures["test"]) and not (pictures["train"] & pictures["validation"])
    assert 0.05 < images.float().mean() / 255 < 0.12  # ink on an empty ground, not the reverse


def test_alphabet_split_keeps_alphabets_together():
    names = [
        f"{part}/{a}/character{c:02}"
        for part, alphabets in (("images_background", "ABCDEFGHIJKLM"), ("images_evaluation", "VW"))
        for a in alphabets
        for c in range(3)
    ]
    splits = split_characters(names, "alphabet")
    alphabets = {split: {names[c].rpartition("/")[0] for c in part} for split, part in splits.items()}
    assert alphabets["validation"] == {"images_background/F", "images_background/L"}
    assert alphabets["test"] == {"images_evaluation/V", "images_evaluation/W"}
    assert not alphabets["train"] & alphabets["validation"] and len(alphabets["train"]) == 11
