"""Reads Omniglot from disk: torchvision's folders or archives in, one uint8 tensor and its splits out.

The 32,460 drawings are decoded once into a cache beside the data, or in the user's cache folder where
the data is read-only. The cache is named after its source and settings, so that another source or
another resampling never meets it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import socket
import sys
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from config import OMNIGLOT_CLASSES, OMNIGLOT_DRAWINGS
from errors import UsageError
from randomness import Stream

SIZE = 28
PARTS = {"images_background": 964, "images_evaluation": 659}  # characters in each
CACHE_VERSION = 1
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
    if zipfile.is_zipfile(archive):
        return archive
    if not (folder / part).is_dir():
        if archive.exists():
            raise UsageError(f"{archive} is damaged: remove it, and it is fetched again")
        _fetch(data_root, part)
        if zipfile.is_zipfile(archive):  # as the next call will find it
            return archive
    return folder / part


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


def _drawings(source: Path) -> Iterator[tuple[str, bytes]]:
    """(path inside the part, file content) of every drawing, in sorted order."""
    if source.is_dir():
        for path in sorted(source.glob("*/*/*.png")):
            yield path.relative_to(source).as_posix(), path.read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        for name in sorted(archive.namelist()):
            inside = name.removeprefix(f"{source.stem}/")
            if inside != name and inside.count("/") == 2 and inside.endswith(".png"):
                yield inside, archive.read(name)


def _decode(content: bytes, resize: str) -> np.ndarray:
    # Converted to grey first: on one-bit images Pillow silently takes the nearest pixel.
    image = Image.open(io.BytesIO(content)).convert("L")
    return 255 - np.asarray(image.resize((SIZE, SIZE), RESAMPLING[resize]))


def _read(sources: list[Path], resize: str) -> tuple[np.ndarray, list[str]]:
    characters: dict[str, list[np.ndarray]] = {}
    total = sum(PARTS.values()) * OMNIGLOT_DRAWINGS
    with tqdm(total=total, desc="Preparing Omniglot (once)", unit=" drawings") as progress:
        for source, (part, expected) in zip(sources, PARTS.items(), strict=True):
            before = len(characters)
            try:
                for path, content in _drawings(source):
                    drawing = _decode(content, resize)
                    characters.setdefault(f"{part}/{path.rpartition('/')[0]}", []).append(drawing)
                    progress.update()
            except (OSError, UnidentifiedImageError, zipfile.BadZipFile, ValueError) as error:
                raise UsageError(f"{source} is damaged ({error}): fetch it again") from error
            found = len(characters) - before
            if found != expected:
                raise UsageError(f"{source} holds {found} characters instead of {expected}: fetch it again")
    for name, drawings in characters.items():
        if len(drawings) != OMNIGLOT_DRAWINGS:
            raise UsageError(
                f"Omniglot's {name} has {len(drawings)} drawings instead of {OMNIGLOT_DRAWINGS}: "
                "fetch the data again"
            )
    return np.stack([np.stack(drawings) for drawings in characters.values()]), list(characters)


# ---- the cache -----------------------------------------------------------------------------------


def _fingerprint(sources: Iterable[Path], resize: str) -> str:
    """Changes with the settings, the cache's format and the names, sizes and times of the sources."""
    parts: list[object] = [CACHE_VERSION, SIZE, resize]
    for source in sources:
        members = sorted(source.glob("*/*")) if source.is_dir() else [source]
        for member in members:
            stat = member.stat()
            parts.append([member.relative_to(source.parent).as_posix(), stat.st_mtime_ns])
            parts.append(stat.st_size)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


def _cache_folders(source: Path) -> list[Path]:
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return [source.parent, Path(user_cache) / "maml"]


def _from_cache_or_sources(sources: list[Path], resize: str) -> tuple[np.ndarray, list[str]]:
    name = f"omniglot-{SIZE}-{resize}-{_fingerprint(sources, resize)}.npz"
    folders = _cache_folders(sources[0])
    for folder in folders:
        cached = _read_cache(folder / name)
        if cached is not None:
            return cached
    images, names = _read(sources, resize)
    if not any(_write_cache(folder / name, images, names) for folder in folders):
        print(f"Omniglot's cache fits into neither {folders[0]} nor {folders[1]}", file=sys.stderr)
    return images, names


def _read_cache(path: Path) -> tuple[np.ndarray, list[str]] | None:
    """None where there is no such cache, or it is not whole: then it is made again."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            images, names = arrays["images"], arrays["names"].tolist()
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    expected = (sum(PARTS.values()), OMNIGLOT_DRAWINGS, SIZE, SIZE)
    whole = images.dtype == np.uint8 and images.shape == expected and len(names) == len(images)
    return (images, names) if whole else None


def _write_cache(path: Path, images: np.ndarray, names: list[str]) -> bool:
    """Atomically, so that a reader or a second writer never meets half a file."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.parent.stat().st_mode & 0o222:  # root may write there, but was told not to
            return False
        with temporary.open("wb") as file:
            np.savez(file, images=images, names=np.array(names))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        return False
    return True
