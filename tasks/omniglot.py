"""Reads Omniglot from disk: torchvision's folders or archives in, one uint8 tensor and its splits out.

The 32,460 drawings are decoded once into a cache beside the data, or in the user's cache folder where
the data is read-only. The cache is named after its source and settings, so that another source or
another resampling never meets it.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import math
import shutil
import socket
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.errors import UsageError, one_line
from common.files import opened
from common.random import Stream
from tasks.cache import from_cache, summed_up
from tasks.images import open_image
from tasks.options import OMNIGLOT_CLASSES, OMNIGLOT_DRAWINGS

SIZE = 28
PARTS = {"images_background": 964, "images_evaluation": 659}  # characters in each
CACHE_VERSION = 1
MOST_ARCHIVE_BYTES = 2**26  # those of the two archives are below 10 million
MOST_DRAWING_BYTES = 2**16  # of a drawing: 105 x 105 pixels, some hundred bytes
MOST_DRAWING_PIXELS = 2**18
MOST_NAMES_BYTES = 2**20
RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def load_omniglot(data_root: Path, *, split: str, resize: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Images `[1623, 20, 28, 28]`, uint8 with ink = 255, and the characters of each split.

    Raises UsageError where the data is neither there nor to be fetched, or is damaged.
    """
    sources = [_find_part(data_root, part) for part in PARTS]
    images, names = _from_cache_or_sources(sources, resize)
    return torch.from_numpy(images), split_characters(names, split)


def split_characters(names: list[str], split: str) -> dict[str, Tensor]:
    """Positions of the training, validation and test characters; no user seed changes them.

    "random": all characters shuffled once, 1,100 / 100 / 423. "alphabet": the background alphabets
    but for every sixth, which validates, and the evaluation alphabets.
    """
    if split == "random":
        order = Stream.from_seed(0).at("omniglot split").at(torch.zeros(1, dtype=torch.int64))
        shuffled = order.distinct(len(names), len(names))[0]
        sizes = OMNIGLOT_CLASSES["random"]
        return dict(zip(sizes, shuffled.split(list(sizes.values())), strict=True))
    part_and_alphabet = [tuple(name.split("/")[:2]) for name in names]
    background = sorted({a for part, a in part_and_alphabet if part == "images_background"})
    members: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for position, (part, alphabet) in enumerate(part_and_alphabet):
        if part == "images_evaluation":
            members["test"].append(position)
        elif background.index(alphabet) % 6 == 5:
            members["validation"].append(position)
        else:
            members["train"].append(position)
    return {name: torch.tensor(positions) for name, positions in members.items()}


# ---- where the data is ---------------------------------------------------------------------------


def _find_part(data_root: Path, part: str) -> Path:
    """The archive or the folder of one half, fetched if neither is there."""
    folder = data_root / "omniglot-py"
    archive = folder / f"{part}.zip"
    if _is_archive(archive):
        return archive
    if not (folder / part).is_dir():
        if archive.exists():
            raise UsageError(f"{archive} is damaged: remove it, and it is fetched again")
        _fetch(data_root, part)
        if _is_archive(archive):  # as the next call will find it
            return archive
    return folder / part


def _is_archive(path: Path) -> bool:
    return path.is_file() and zipfile.is_zipfile(path)  # to open a pipe would be to wait for ever


def _fetch(data_root: Path, part: str) -> None:
    from torchvision.datasets import Omniglot  # slow to import, and needed once in a lifetime

    there_before = data_root.exists(), (data_root / "omniglot-py").exists()
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        Omniglot(str(data_root), background=part == "images_background", download=True)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        for there, folder in zip(there_before, (data_root, data_root / "omniglot-py"), strict=True):
            if not there and folder.is_dir() and not any(folder.rglob("*.*")):
                shutil.rmtree(folder, ignore_errors=True)
        raise UsageError(
            f"Omniglot is not in {data_root} and could not be fetched ({error}): put images_background.zip "
            f"and images_evaluation.zip, or the folders of these names, into {data_root / 'omniglot-py'}, "
            "or name another --data-root"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


# ---- reading it ----------------------------------------------------------------------------------


Drawings = dict[str, Callable[[], IO[bytes]]]  # path inside the part -> what opens it


@contextmanager
def _drawings(source: Path) -> Iterator[Drawings]:
    """All drawings of a half, in sorted order. Of an archive, nothing is ever unpacked to the disk."""
    if source.is_dir():
        paths = sorted(source.glob("*/*/*.png"))
        yield {
            path.relative_to(source).as_posix(): functools.partial(opened, path, MOST_DRAWING_BYTES)
            for path in paths
        }
        return
    with opened(source, MOST_ARCHIVE_BYTES) as file, zipfile.ZipFile(file) as archive:
        names = Counter(archive.namelist())
        twice = [name for name, times in names.items() if times > 1]
        if twice:
            raise ValueError(f"it has {twice[0]} twice")
        inside = {name: name.removeprefix(f"{source.stem}/") for name in sorted(names)}
        yield {
            path: functools.partial(archive.open, name)
            for name, path in inside.items()
            if path != name and path.count("/") == 2 and path.endswith(".png")
        }


def _decode(content: bytes, resize: str) -> np.ndarray:
    # Converted to grey first: on one-bit images Pillow silently takes the nearest pixel.
    drawing = open_image(io.BytesIO(content), formats=("PNG",), most_pixels=MOST_DRAWING_PIXELS)
    return 255 - np.asarray(drawing.convert("L").resize((SIZE, SIZE), RESAMPLING[resize]))


def _bytes_of(drawing: IO[bytes]) -> bytes:
    """At most so many, whatever an archive says about their number."""
    content = drawing.read(MOST_DRAWING_BYTES + 1)
    if len(content) > MOST_DRAWING_BYTES:
        raise ValueError(f"a drawing has more than {MOST_DRAWING_BYTES:,} bytes")
    return content


def _read(sources: list[Path], resize: str) -> tuple[np.ndarray, list[str]]:
    """Images `[characters, 20, 28, 28]`, and the characters' names."""
    images, names = [], []
    total = sum(PARTS.values()) * OMNIGLOT_DRAWINGS
    with tqdm(total=total, desc="Preparing Omniglot (once)", unit=" drawings") as bar:
        for source, (part, expected) in zip(sources, PARTS.items(), strict=True):
            try:
                with _drawings(source) as drawings:
                    names += _characters(source, part, expected, drawings)
                    for path, drawing in drawings.items():
                        try:
                            with drawing() as file:
                                images.append(_decode(_bytes_of(file), resize))
                        except Exception as error:
                            raise ValueError(f"{path}: {one_line(error)}") from error
                        bar.update()
            except UsageError:
                raise
            except Exception as error:  # damaged archives and images raise errors of many kinds
                raise UsageError(f"{source} is damaged ({one_line(error)}): fetch it again") from error
    return np.stack(images).reshape(len(names), OMNIGLOT_DRAWINGS, SIZE, SIZE), names


def _characters(source: Path, part: str, expected: int, drawings: Iterable[str]) -> list[str]:
    """Their names, where there are as many as there should be, of as many drawings."""
    count = Counter(path.rpartition("/")[0] for path in drawings)
    for name, found in count.items():
        if found != OMNIGLOT_DRAWINGS:
            raise UsageError(
                f"Omniglot's {part}/{name} has {found} drawings instead of {OMNIGLOT_DRAWINGS}: "
                "fetch the data again"
            )
    if len(count) != expected:
        raise UsageError(f"{source} holds {len(count)} characters instead of {expected}: fetch it again")
    return [f"{part}/{name}" for name in count]


# ---- the cache -----------------------------------------------------------------------------------


def _fingerprint(sources: Iterable[Path], resize: str) -> str:
    """Changes with the settings, the cache's format and the names, sizes and times of the sources' files."""
    parts: list[object] = [CACHE_VERSION, SIZE, resize]
    for source in sources:
        try:
            members = sorted(source.glob("*/*/*.png")) if source.is_dir() else [source]
            for member in members:
                stat = member.stat()
                parts.append([member.relative_to(source.parent).as_posix(), stat.st_mtime_ns])
                parts.append(stat.st_size)
        except OSError as error:
            raise UsageError(f"{source} cannot be read ({one_line(error)}): fetch it again") from error
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _from_cache_or_sources(sources: list[Path], resize: str) -> tuple[np.ndarray, list[str]]:
    fingerprint = _fingerprint(sources, resize)
    folder, name = sources[0].parent, f"omniglot-{SIZE}-{resize}-{fingerprint}.npz"
    images_and_names = functools.cache(lambda: _read(sources, resize))

    def write(file: IO[bytes]) -> None:
        images, names = images_and_names()
        if _fingerprint(sources, resize) != fingerprint:
            raise UsageError(f"{folder} has changed while it was read: start again when it is whole")
        np.savez(file, images=images, names=np.array(names))

    found, reasons = from_cache(folder, name, math.prod(_shape()), _read_cache, write)
    if found is None:
        print(f"Omniglot's cache fits into {summed_up(reasons)}", file=sys.stderr)
        return images_and_names()
    return found


def _shape() -> tuple[int, ...]:
    return sum(PARTS.values()), OMNIGLOT_DRAWINGS, SIZE, SIZE


def _read_cache(path: Path) -> tuple[np.ndarray, list[str]] | None:
    """None where there is no such cache, or it is not whole: then it is made again.

    Its checksums are those of the zip format; as nothing in it is packed, neither can it grow in memory.
    """
    try:
        with opened(path, math.prod(_shape()) + MOST_NAMES_BYTES) as file:
            with zipfile.ZipFile(file) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    return None
            file.seek(0)
            with np.load(file, allow_pickle=False) as arrays:
                images, names = arrays["images"], arrays["names"].tolist()
    except Exception:  # whatever is wrong with it
        return None
    whole = images.dtype == np.uint8 and images.shape == _shape() and len(names) == len(images)
    return (images, names) if whole and all(isinstance(name, str) for name in names) else None
