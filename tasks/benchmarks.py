"""Image benchmarks with published classes: CIFAR-FS and FC100, mini-ImageNet and tiered-ImageNet.

CIFAR-100 is fetched by torchvision. ImageNet's pictures are looked for in a folder of the benchmark's name,
and must be the published classes: results compare over nothing else.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UsageError, one_line
from tasks.cache import cached_pixels
from tasks.images import Classes, Form, ImageSet, find_classes, image_set, prepare
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
    folder = _named_folder(name, data_root)
    groups, has_splits = find_classes(folder)
    classes = _by_last_part(folder, groups)
    if has_splits:
        for split, group in groups.items():
            _check_published(folder, split, _last_parts(group), published)
        published = {split: published[split] for split in groups}
    else:
        members = set(chain(*published.values()))  # ImageNet's other classes may lie there too
        classes = {wnid: files for wnid, files in classes.items() if wnid in members}
        for split, part in published.items():
            _check_published(folder, split, [wnid for wnid in part if wnid in classes], published)
    return image_set(folder, classes, published, form, published=True)


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


# ---- ImageNet ------------------------------------------------------------------------------------


def _named_folder(name: str, data_root: Path) -> Path:
    """Return the folder of that name, however people write it: miniImageNet, mini_imagenet, mini-imagenet."""
    for path in sorted(data_root.iterdir()) if data_root.is_dir() else ():
        if path.is_dir() and _letters(path.name) == _letters(name):
            return path
    raise UsageError(
        f"{name} is not in {data_root}: put its folders train, val and test of class folders into "
        f"{data_root / name}, or name another --data-root"
    )


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _last_parts(names: Iterable[str]) -> list[str]:
    return [name.rpartition("/")[2] for name in names]


def _by_last_part(folder: Path, groups: Mapping[str, Classes]) -> Classes:
    """Return the classes by their ImageNet number alone, wherever below the folder they lie."""
    classes: Classes = {}
    for name, files in chain(*(group.items() for group in groups.values())):
        (wnid,) = _last_parts([name])
        if wnid in classes:
            raise UsageError(f"{folder} has the class {wnid} twice: remove one of its folders")
        classes[wnid] = files
    return classes


def _check_published(folder: Path, split: str, names: list[str], published: Mapping[str, list[str]]) -> None:
    """Refuse a split of other classes than the published ones."""
    split_of = {wnid: name for name, part in published.items() for wnid in part}
    for wnid in names:
        if split_of.get(wnid) != split:
            truth = f"in {split_of[wnid]}" if wnid in split_of else "in no split"
            raise UsageError(
                f"{folder} has the class {wnid} in its {split} split, the published list has it {truth}: move it"
            )
    missing = sorted(set(published[split]) - set(names))
    if missing:
        raise UsageError(
            f"{folder} lacks the class {missing[0]} of the published {split} split ({len(missing)} of "
            f"{len(published[split])} are missing): add them, or load the folder as your own"
        )


# ---- CIFAR-100 -----------------------------------------------------------------------------------


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
    return ImageSet(names, count, as_positions(published, names), load, name, published=True)


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
