"""Image benchmarks with published classes: CIFAR-FS and FC100, mini-ImageNet and tiered-ImageNet.

CIFAR-100 is fetched by torchvision. ImageNet's pictures are looked for in a folder of the benchmark's name,
and must be the published classes: results compare over nothing else.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UsageError, one_line
from tasks.cache import cached_pixels
from tasks.images import Form, ImageSet, find_classes, image_set, prepare
from tasks.splits import as_positions, published_splits

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR100

T = TypeVar("T")
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
CIFAR_IMAGES = 600  # of each class, training and test images together


def open_benchmark(name: str, data_root: Path, form: Form) -> ImageSet:
    """Return a benchmark: "cifar-fs", "fc100", "mini-imagenet" or "tiered-imagenet".

    Raises UsageError where the data is not in `data_root`, or its classes are not the published ones.
    """
    published = published_splits(name)
    if name in ("cifar-fs", "fc100"):
        return _open_cifar(name, data_root, published, form)
    folder = data_root / name
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is not there: put the benchmark's folders train, val and test of class folders there, "
            "or name another --data-root"
        )
    groups, has_splits = find_classes(folder)
    classes = {wnid: files for group in groups.values() for wnid, files in group.items()}
    if not has_splits:  # ImageNet's other classes may lie there too
        classes = {wnid: classes[wnid] for wnid in chain(*published.values()) if wnid in classes}
        groups = {split: {w: classes[w] for w in part if w in classes} for split, part in published.items()}
    for split, group in groups.items():
        different = sorted(group.keys() ^ set(published[split]))
        if different:
            problem = "does not belong" if different[0] in group else "is missing"
            raise UsageError(
                f"{folder}: the class {different[0]} {problem} in the {split} split ({len(different)} differ "
                "from the published ones): mend it, or load the folder as your own, images:FOLDER"
            )
    return image_set(folder, classes, groups, form, published=True)


def fetch(download: Callable[[], T], what: str, remedy: str) -> T:
    """Call torchvision's download; raise UsageError with the remedy where it fails."""
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return download()
    except Exception as error:  # of the network, the disk, an archive, a pickle
        raise UsageError(f"{what} and could not be fetched ({one_line(error)}): {remedy}") from error
    finally:
        socket.setdefaulttimeout(timeout)


def _open_cifar(name: str, data_root: Path, published: Mapping[str, list[str]], form: Form) -> ImageSet:
    names = sorted(chain(*published.values()))
    folder = data_root / "cifar-100-python"
    files = [folder / "train", folder / "test"]
    if not all(file.is_file() for file in files):
        _read_cifar(data_root)

    def load() -> Tensor:
        shape = (len(names) * CIFAR_IMAGES, form.channels, form.size, form.size)
        return cached_pixels(
            folder, files, (form, names), shape, lambda: _cifar_images(data_root, names, form)
        )

    count = torch.full((len(names),), CIFAR_IMAGES)
    return ImageSet(names, count, as_positions(published, names, name), load, name, published=True)


def _read_cifar(data_root: Path) -> list[CIFAR100]:
    """Return CIFAR-100's training and test half, fetched if need be; torchvision checks their MD5 sums."""
    from torchvision.datasets import CIFAR100  # slow to import, and needed once in a lifetime

    return fetch(
        lambda: [CIFAR100(data_root, train=train, download=True) for train in (True, False)],
        f"CIFAR-100 is not whole in {data_root}",
        f"put the unpacked folder cifar-100-python into {data_root}, or name another --data-root",
    )


def _cifar_images(data_root: Path, names: list[str], form: Form) -> Iterator[np.ndarray]:
    """Yield CIFAR-100's images class by class, the training before the test images."""
    halves = _read_cifar(data_root)
    labels = np.concatenate([half.targets for half in halves])
    data = np.concatenate([half.data for half in halves])  # [60000, 32, 32, 3]
    for name in names:
        for position in np.flatnonzero(labels == halves[0].class_to_idx[name]):
            yield prepare(Image.fromarray(data[position]), form)
