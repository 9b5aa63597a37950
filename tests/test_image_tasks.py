"""Tasks of images: which images they draw, where the pixels lie, and what augmentation does."""

import hashlib
from collections.abc import Sequence

import pytest
import torch
from conftest import refused

from common.random import Stream
from tasks.images import ImageSet, ImageTasks, augment_images


def image_set(counts: Sequence[int], side: int = 4, channels: int = 1) -> ImageSet:
    """Make random images whose first two pixels are their class and their number within it."""
    count = torch.tensor(counts)
    words = Stream.from_seed(0).at(torch.arange(int(count.sum()))).words(channels * side * side)
    pixels = (words & 255).to(torch.uint8).view(-1, channels, side, side)
    pixels[:, :, 0, 0] = torch.arange(len(counts)).repeat_interleave(count)[:, None].to(torch.uint8)
    pixels[:, :, 0, 1] = torch.cat([torch.arange(n) for n in counts])[:, None].to(torch.uint8)
    order, third = torch.arange(len(counts)), len(counts) // 3
    splits = {"train": order[: -2 * third], "validation": order[-2 * third : -third], "test": order[-third:]}
    return ImageSet([f"class {c}" for c in order.tolist()], count, splits, lambda: pixels, "the images")


def on_the_host(images: ImageSet, **options) -> ImageTasks:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.images.machine_memory", lambda: 0)
        return ImageTasks(images, **options)


def same(a: Sequence[torch.Tensor], b: Sequence[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


def test_tasks_are_the_same_as_in_the_first_release():
    """Compare a digest: published numbers were measured on these tasks."""
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
        label, number = ((x[..., 0, i] * 255).round().long() for i in (0, 1))
        assert (label == label[..., :1]).all() and set(label.unique().tolist()) == set(classes.tolist())
        assert all(len(set(task)) == 3 for task in label[..., 0].tolist())
        assert (number.sort(-1).values.diff() > 0).all()  # five different images of each class
        seen |= set(zip(label.flatten().tolist(), number.flatten().tolist(), strict=True))
        assert torch.equal(batch.support_y, torch.arange(3).repeat_interleave(2).expand(500, -1))
    assert seen == {(c, n) for c, count in enumerate(counts) for n in range(count)}  # all of them


def test_labels_and_quarter_turns_are_random():
    corner = torch.zeros(30, 20, 1, 2, 2, dtype=torch.uint8)
    corner[..., 0, 0] = torch.arange(1, 31, dtype=torch.uint8)[:, None, None]  # one corner is the class
    splits = dict.fromkeys(("train", "validation", "test"), torch.arange(30))
    images = ImageSet([*map(str, range(30))], torch.full((30,), 20), splits, lambda: corner.flatten(0, 1), "")
    tasks = ImageTasks(images, ways=5, shots=1, queries=2, quarter_turns=True)
    for split in splits:
        batch = tasks.sample(split, 0, 0, range(400))
        x = torch.cat([x.view(400, 5, -1, 4) for x in (batch.support_x, batch.query_x)], 2)  # [..., corners]
        turn, number = x.argmax(-1), (x.amax(-1) * 255).round().long()
        assert (turn == turn[..., :1]).all()  # one turn a class
        assert (torch.bincount(turn[..., 0].flatten(), minlength=4) > 350).all()  # a quarter of 2,000 each
        assert set(number[:, 0].unique().tolist()) == set(range(1, 31))


@pytest.mark.parametrize("augment", [(), ("flip", "crop", "rotate")])
def test_pixels_on_the_host_give_the_same_bits_as_on_the_device(augment):
    options = dict(ways=3, shots=1, queries=2, quarter_turns=True, augment=augment)
    images = image_set([6] * 12, channels=3)
    device, host = ImageTasks(images, **options), on_the_host(images, **options)
    calls = [("train", 0, i, range(4)) for i in (0, 1, 2, 9, 10)]
    calls[2:2] = [("validation", 0, 0, range(4)), ("validation", 0, 0, range(4, 6))]
    for arguments in [*calls, ("train", 1, 11, range(4)), ("train", 1, torch.tensor(12), range(2))]:
        assert same(host.sample(*arguments), device.sample(*arguments))
    other = host.resized(2)  # it prefetches separately
    assert same(other.sample("train", 1, 13, range(2)), device.resized(2).sample("train", 1, 13, range(2)))


def test_training_tasks_are_prefetched_for_every_seed():
    host = on_the_host(image_set([6] * 12), ways=3, shots=1, queries=2)
    fetched, fetch = [], host.prefetch.fetch
    host.prefetch.fetch = lambda *arguments: (fetched.append(arguments[:3]), fetch(*arguments))[1]
    for iteration in range(3):
        for seed in (0, 1):
            host.sample("train", seed, iteration, range(2))
    host.sample("test", 0, 0, range(2))
    host.prefetch.thread.shutdown()
    training = [("train", seed, iteration) for seed in (0, 1) for iteration in range(4)]
    assert sorted(fetched) == [("test", 0, 0), *training]


def test_pixels_stay_on_the_host_where_memory_is_scarce(monkeypatch):
    images = image_set([6] * 12)
    size = images.load().nbytes
    for free, on_host in ((2 * size, False), (2 * size - 2, True)):
        monkeypatch.setattr("tasks.images.machine_memory", lambda free=free: free)
        assert ImageTasks(images, ways=3, shots=1, queries=2).on_host is on_host


def test_too_few_classes_or_images_are_refused():
    images = image_set([6] * 11 + [4])
    with refused("the images has 4 train classes, and -n is 5: lower it"):
        ImageTasks(images, ways=5, shots=1, queries=1)
    tasks = ImageTasks(images, ways=3, shots=1, queries=3)
    few = r"'class 11' has 4 images, and -k plus -q is 5 \(1 of 12 .*--min-examples 5"
    with refused(few):
        tasks.resized(2)
    images.splits["train"] = torch.tensor([], dtype=torch.int64)
    with refused("no train classes"):
        ImageTasks(images, ways=3, shots=1, queries=3).sample("train", 0, 0, range(2))


# ---- augmentation ---------------------------------------------------------------------------


def gradient(images: int, side: int = 32) -> torch.Tensor:
    """Make images `[1, images, 2, side, side]` of each pixel's x and y coordinate in [-1, 1]."""
    line = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    pair = torch.stack([line.expand(side, side), line[:, None].expand(side, side)])
    return pair.expand(1, images, 2, -1, -1)


def stream() -> Stream:
    return Stream.from_seed(3).at(torch.zeros(1, dtype=torch.int64))


def test_flip_mirrors_half_of_the_images_exactly():
    x = gradient(400)
    flipped = augment_images(x, ("flip",), stream())
    mirrored = (flipped == x.flip(-1)).flatten(2).all(-1)
    assert (mirrored ^ (flipped == x).flatten(2).all(-1)).all() and 140 < mirrored.sum() < 260


def test_rotation_and_crop_stay_within_their_bounds():
    x = gradient(400)
    centre = augment_images(x, ("rotate",), stream())[0, :, :, 12:20, 12:20]  # never shows the border
    slope_x, slope_y = (centre[:, 0, 4, 7] - centre[:, 0, 4, 0]), (centre[:, 1, 4, 7] - centre[:, 1, 4, 0])
    angles = torch.rad2deg(torch.atan2(slope_y, slope_x))
    assert -15 <= angles.min() < -14 and 14 < angles.max() <= 15
    assert torch.allclose(torch.hypot(slope_x, slope_y), torch.tensor(7 / 16, dtype=torch.float64))
    centre = augment_images(x, ("crop",), stream())[0, :, :, 12:20, 12:20]
    zoom = (centre[:, 0, 4, 7] - centre[:, 0, 4, 0]) * 16 / 7
    assert 0.8 <= zoom.min() < 0.82 and 0.98 < zoom.max() <= 1.0
    shift = centre.mean((2, 3)) / 2  # in sides of the image
    assert -0.125 <= shift.min() < -0.12 and 0.12 < shift.max() <= 0.125
    assert torch.corrcoef(torch.stack([zoom, *shift.T]))[~torch.eye(3).bool()].abs().max() < 0.2
    uniform = torch.full((1, 40, 1, 8, 8), 0.5)  # the border is reflected, not black
    assert torch.allclose(augment_images(uniform, ("crop", "rotate"), stream()), uniform)


def test_only_training_images_are_augmented_independently_and_reproducibly():
    options = dict(ways=3, shots=2, queries=2)
    images, kinds = image_set([6] * 12, side=8), ("flip", "crop", "rotate")
    plain, changed = (ImageTasks(images, **options, augment=augment) for augment in ((), kinds))
    for split in ("validation", "test"):
        assert same(plain.sample(split, 0, 0, range(4)), changed.sample(split, 0, 0, range(4)))
    batch, clean = (tasks.sample("train", 0, 5, range(4)) for tasks in (changed, plain))
    for x, original in ((batch.support_x, clean.support_x), (batch.query_x, clean.query_x)):
        assert (x != original).flatten(2).any(-1).all() and x.min() >= 0 and x.max() <= 1
    assert same(changed.sample("train", 0, 5, range(4)), batch)
    part = changed.sample("train", 0, 5, range(2, 3))
    assert all(torch.allclose(a, b[2:3], atol=1e-6) for a, b in zip(part, batch, strict=True))
    low = augment_images(gradient(5).bfloat16(), ("crop",), stream())
    assert torch.allclose(low.double(), augment_images(gradient(5), ("crop",), stream()), atol=0.02)
