"""From image files to one uint8 tensor: finds classes and splits, decodes once, memory-maps ever after.

Three layouts are read: folders train/, val/ and test/ of class folders; lists train.csv, val.csv and
test.csv; or class folders alone, which a seeded shuffle splits. The four benchmarks that people compare
on come with their published splits. Decoded images go into a cache beside the data, or in the user's
cache folder where the data is read-only, named after its sources and settings.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import shutil
import socket
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from stat import S_ISREG
from typing import IO, TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from common.errors import UsageError, one_line, printable
from common.files import opened
from common.random import Stream
from tasks.cache import from_cache, summed_up, title_of

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR100

warnings.filterwarnings("ignore", module=r"PIL\.")  # on files that are read all the same
warnings.simplefilter("error", Image.DecompressionBombWarning)  # before any pixel is decoded

EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
FORMATS = (
    "PNG",
    "JPEG",
    "BMP",
    "GIF",
    "WEBP",
    "TIFF",
    "PPM",
)  # by content; Pillow's other readers see nothing
MOST_PIXELS = 2**26  # of an image: 8,192 x 8,192
BIG_PIXELS = 2**24  # larger ones are decoded one at a time, which bounds the memory
MOST_SCANS = 200  # of a JPEG: each goes over all pixels again
MOST_BYTES = 2**29  # of an image's file
MOST_LIST_BYTES = 2**28  # of a train.csv
MOST_LEVELS = 100  # of folders in folders
LITTER = {"thumbs.db", "desktop.ini", "__macosx"}  # what file managers leave; hidden files are ignored too
SPLIT_NAMES = {"train": ("train",), "validation": ("val", "validation", "valid"), "test": ("test",)}
RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "nearest": Image.Resampling.NEAREST}
CACHE_VERSION = 1
MOST_HEADER = 1024  # bytes of a cache before its pixels
AT_ONCE = 256  # images in work at a time: what bounds the memory
DOWNLOAD_TIMEOUT = 30  # seconds without an answer
PUBLISHED = Path(__file__).parent / "splits"
CIFAR_SETS = ("cifar-fs", "fc100")
IMAGENET_SETS = ("mini-imagenet", "tiered-imagenet")
BIG = threading.Lock()
CIFAR_IMAGES = 600  # of each class, training and test images together


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, sorted by class, and the classes of each split."""

    pixels: Tensor  # uint8 [images, channels, height, width], on the host, memory-mapped
    first: Tensor  # int64 [classes], position of a class's first image
    count: Tensor  # int64 [classes]
    names: list[str]  # [classes]
    splits: dict[str, Tensor]  # "train", "validation", "test" -> int64 positions of classes, disjoint
    own_splits: bool  # the data itself says which classes are for training
    source: str = "the images"  # for messages
    published: bool = False  # the split is the same for everyone, always

    @classmethod
    def of_equal_classes(cls, pixels: Tensor, splits: dict[str, Tensor], source: str) -> ImageSet:
        """From grey images `[classes, images, height, width]`."""
        classes, images = pixels.shape[:2]
        return cls(
            pixels.flatten(0, 1)[:, None],
            torch.arange(classes) * images,
            torch.full((classes,), images),
            [str(number) for number in range(classes)],
            splits,
            own_splits=True,
            source=source,
            published=True,
        )


@dataclass(frozen=True)
class Form:
    """How an image becomes a tensor; the cache is named after it."""

    size: int
    channels: int
    invert: bool
    resize: str


Check = Callable[[ImageSet], None]  # raises UsageError where a set will not do
Classes = dict[str, list[Path]]  # a class's name -> its image files, sorted


def load_images(
    folder: Path,
    *,
    size: int,
    channels: int,
    invert: bool = False,
    resize: str = "lanczos",
    split_seed: int = 0,
    shares: tuple[int, int, int] = (64, 16, 20),
    check: Check = lambda images: None,
) -> ImageSet:
    """All images of a folder, `[images, channels, size, size]`, and its splits.

    `shares` (train, validation, test) and `split_seed` split the classes where the folder does not; where
    it says training and test classes alone, they take validation classes from the training classes.
    `check` sees the set, without its pixels, before any image is decoded, and may refuse it.
    Raises UsageError, in one line, on anything that is not as it should be.
    """
    given, own_splits = _find_classes(folder)
    parts = dict(zip(SPLIT_NAMES, shares, strict=True))
    if not own_splits:
        splits = _shuffled_splits(sorted(given["all"]), parts, split_seed)
    else:
        splits = {split: list(classes) for split, classes in given.items()}
        if "train" in splits and "validation" not in splits:
            parts.pop("test")
            splits |= _shuffled_splits(sorted(splits["train"]), parts, split_seed)
    classes = {name: files for group in given.values() for name, files in group.items()}
    form = Form(size, channels, invert, resize)
    return _load(folder, classes, splits, form, check, own_splits=own_splits)


def load_named(
    name: str,
    data_root: Path,
    *,
    size: int,
    channels: int,
    invert: bool = False,
    resize: str = "lanczos",
    check: Check = lambda images: None,
) -> ImageSet:
    """A benchmark with its published classes: "cifar-fs", "fc100", "mini-imagenet" or "tiered-imagenet".

    CIFAR-100 is fetched where it is not in `data_root`; the others are looked for in a folder of their
    name. Raises UsageError where the data is not there, or its classes are not the published ones.
    """
    published = published_splits(name)
    form = Form(size, channels, invert, resize)
    if name in CIFAR_SETS:
        return _load_cifar(name, data_root, published, form)
    folder = _named_folder(name, data_root)
    given, has_splits = _find_classes(folder)
    classes = _by_last_part(folder, given)
    if has_splits:
        _check_published(folder, {split: _last_parts(group) for split, group in given.items()}, published)
        published = {split: published[split] for split in given}
    else:
        wanted = set(chain(*published.values()))  # ImageNet's other classes may lie there too
        classes = {wnid: files for wnid, files in classes.items() if wnid in wanted}
        there = {split: [wnid for wnid in part if wnid in classes] for split, part in published.items()}
        _check_published(folder, there, published)
    found = _load(folder, classes, published, form, check, own_splits=True)
    return replace(found, published=True)


def published_splits(name: str) -> dict[str, list[str]]:
    """The class names of each split of a benchmark, as its paper has them."""
    if name not in CIFAR_SETS + IMAGENET_SETS:
        raise ValueError(f"no published splits for {name!r}")
    content = json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))
    return {split: content[split] for split in SPLIT_NAMES}


def read_images(
    files: Sequence[Path], *, size: int, channels: int, invert: bool = False, resize: str = "lanczos"
) -> Tensor:
    """Images of no class, uint8 `[files, channels, size, size]`; UsageError names the first unreadable."""
    form = Form(size, channels, invert, resize)
    images = np.empty((len(files), channels, size, size), np.uint8)
    for position, image in enumerate(_decode_all(files, form)):
        images[position] = image
    return torch.from_numpy(images)


def image_files(folder: Path) -> list[Path]:
    """The images directly in a folder, sorted; other files are passed over."""
    return [path for path in _entries(folder)[0] if _is_image(path)]


# ---- which classes there are ---------------------------------------------------------------------


def _find_classes(folder: Path) -> tuple[dict[str, Classes], bool]:
    """The classes of each split that the folder names, and True; or {"all": classes}, and False."""
    files, folders = _entries(folder)
    parts = _named_splits(folder, folders, "")
    lists = _named_splits(folder, files, ".csv")
    if not all(image_files(path) for path in parts.values()):  # else they are classes of these names
        given = {split: _class_folders(path) for split, path in parts.items()}
    elif lists:
        given = {split: _listed_classes(folder, path) for split, path in lists.items()}
    else:
        return {"all": _class_folders(folder)}, False
    _check_disjoint(folder, given)
    return given, True


def _named_splits(folder: Path, paths: list[Path], suffix: str) -> dict[str, Path]:
    """The split folders or lists among these; none unless one is for training or for testing."""
    by_name = {path.name: path for path in paths}
    found: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        there = [by_name[name + suffix] for name in names if name + suffix in by_name]
        if len(there) > 1:
            raise UsageError(f"{folder} has both {there[0].name} and {there[1].name}: remove one of them")
        if there:
            found[split] = there[0]
    return found if {"train", "test"} & found.keys() else {}


def _class_folders(base: Path) -> Classes:
    """Every folder below `base` that directly holds images, by its path relative to `base`."""
    classes: Classes = {}
    seen: dict[Path, Path] = {}  # where a folder is -> as it was found

    def visit(folder: Path, above: tuple[Path, ...]) -> None:
        files, folders = _entries(folder)
        images = [path for path in files if _is_image(path)]
        if images and folder == base:
            raise UsageError(
                f"{base} holds images itself, such as {images[0].name}: put the images of each class into a "
                "folder of its own"
            )
        if folder != base and (images or not folders):
            classes[folder.relative_to(base).as_posix()] = _images_of_class(folder)
        real = folder.resolve()
        if real in above:
            raise UsageError(f"{folder} is a link to a folder that it lies in: remove it")
        if real in seen:  # the same images in two classes; and links to links would have no end
            raise UsageError(f"{folder} is the same folder as {seen[real]}: remove one of them")
        seen[real] = folder
        if len(above) > MOST_LEVELS:
            raise UsageError(
                f"{base} has folders {MOST_LEVELS} deep, such as {real.name}: name another folder"
            )
        for inner in folders:
            visit(inner, (*above, real))

    visit(base, ())
    if not classes:
        raise UsageError(f"{base} holds no classes: put the images of each class into a folder of its own")
    return classes


def _images_of_class(folder: Path) -> list[Path]:
    """All files of a class folder, every one an image."""
    files, _ = _entries(folder)
    images = [path for path in files if _is_image(path)]
    others = [path for path in files if not _is_image(path)]
    if images and others:
        raise UsageError(f"{others[0]} is no image, among the images of a class: remove it")
    if others:
        raise UsageError(f"class folder {folder} holds no images, but {others[0].name}: remove the folder")
    if not images:
        raise UsageError(f"class folder {folder} is empty: remove it, or put its images there")
    return images


def _listed_classes(folder: Path, path: Path) -> Classes:
    """The classes that a list names: of files and labels, or of labels that are class folders."""
    try:
        with io.TextIOWrapper(opened(path, MOST_LIST_BYTES), "utf-8-sig", newline="") as file:
            rows = csv.DictReader(file, skipinitialspace=True, strict=True)
            columns = list(rows.fieldnames or ())
            lines = [(rows.line_num, row) for row in rows]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{path} is no readable CSV file ({one_line(error)}): write it again") from error
    label_column = next((column for column in ("label", "class") if column in columns), None)
    if label_column is None:
        raise UsageError(
            f'{path} has the columns {columns}: it needs "filename" and "label", or "label" alone'
        )
    classes: Classes = {}
    for number, row in lines:
        label, filename = row[label_column], row.get("filename")
        if not label or ("filename" in columns and not filename):
            raise UsageError(f"{path}, line {number}, is incomplete: fill it, or remove it")
        if filename:
            classes.setdefault(label, []).append(_listed_file(folder, path, number, label, filename))
        elif label not in classes:
            classes[label] = _listed_folder(folder, path, number, label)
    if not classes:
        raise UsageError(f"{path} names no class: fill it, or remove it")
    return {label: sorted(files) for label, files in classes.items()}


def _listed_file(folder: Path, path: Path, number: int, label: str, filename: str) -> Path:
    for candidate in (folder / "images" / filename, folder / filename, folder / label / filename):
        if os.path.isfile(candidate):  # noqa: PTH113 (of any name, without an error)
            return candidate
    raise UsageError(
        f"{path}, line {number}, names {filename}, which is neither in {folder / 'images'} nor in {folder} "
        f"nor in {folder / label}: put it there, or remove the line"
    )


def _listed_folder(folder: Path, path: Path, number: int, label: str) -> list[Path]:
    if not os.path.isdir(folder / label):  # noqa: PTH112 (of any name, without an error)
        raise UsageError(
            f"{path}, line {number}, names the class {label}, but {folder / label} is no folder: "
            "put the class's images there, or remove the line"
        )
    return _images_of_class(folder / label)


def _check_disjoint(folder: Path, given: dict[str, Classes]) -> None:
    """No class in two splits, and no file in two places: what is tested was never trained on."""
    split_of: dict[str, str] = {}
    place_of: dict[str, str] = {}
    for split, classes in given.items():
        for name, files in classes.items():
            if name in split_of:
                raise UsageError(
                    f"{folder}: class {name} is in the {split_of[name]} and in the {split} split: leave it "
                    "in one, or put all classes into one folder, to have them split"
                )
            split_of[name] = split
            for file in files:
                key = os.path.normpath(file)
                if key in place_of:
                    raise UsageError(
                        f"{file} is listed twice, under {place_of[key]} and under {name} ({split}): "
                        "list it once"
                    )
                place_of[key] = f"{name} ({split})"


def _entries(folder: Path) -> tuple[list[Path], list[Path]]:
    """The visible files and folders directly in a folder, each sorted by name."""
    try:
        with os.scandir(folder) as entries:
            visible = sorted(
                (entry.name, entry.is_dir())
                for entry in entries
                if not entry.name.startswith(".") and entry.name.lower() not in LITTER
            )
    except FileNotFoundError as error:
        raise UsageError(f"{folder} does not exist: name a folder of images") from error
    except NotADirectoryError as error:
        raise UsageError(f"{folder} is not a folder: name a folder of images") from error
    except OSError as error:
        raise UsageError(f"{folder} cannot be read ({error.strerror}): see to its permissions") from error
    files = [folder / name for name, is_folder in visible if not is_folder]
    return files, [folder / name for name, is_folder in visible if is_folder]


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in EXTENSIONS


# ---- how classes are split -----------------------------------------------------------------------


def _shuffled_splits(names: list[str], shares: dict[str, int], seed: int) -> dict[str, list[str]]:
    """The classes in a random order that only the seed decides, cut in proportion to the shares."""
    if min(shares.values()) < 0 or not sum(shares.values()):
        raise UsageError(f"shares {', '.join(map(str, shares.values()))}: give whole numbers, one above zero")
    stream = Stream.from_seed(seed).at("class split").at(torch.zeros(1, dtype=torch.int64))
    order = stream.distinct(len(names), len(names))[0].tolist()
    ends = np.cumsum(_apportion(len(names), list(shares.values()))).tolist()
    starts = [0, *ends[:-1]]
    return {
        split: sorted(names[position] for position in order[start:end])
        for split, start, end in zip(shares, starts, ends, strict=True)
    }


def _apportion(total: int, shares: list[int]) -> list[int]:
    """Whole numbers in proportion, by largest remainder; none is 0 whose share is not, if they suffice."""
    exact = [total * share / sum(shares) for share in shares]
    sizes = [math.floor(part) for part in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: sizes[i] - exact[i])
    for i in by_remainder[: total - sum(sizes)]:
        sizes[i] += 1
    if total >= len(shares):
        for i, share in enumerate(shares):
            if share and not sizes[i]:
                sizes[sizes.index(max(sizes))] -= 1
                sizes[i] = 1
    return sizes


# ---- the published benchmarks --------------------------------------------------------------------


def _named_folder(name: str, data_root: Path) -> Path:
    """The folder of that name, however people write it: miniImageNet, mini_imagenet, mini-imagenet."""
    there = [path for path in _entries(data_root)[1] if _letters(path.name) == _letters(name)]
    if not there:
        raise UsageError(
            f"{name} is not in {data_root}: put its folders train, val and test of class folders into "
            f"{data_root / name}, or name another --data-root"
        )
    return there[0]


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _last_parts(names: Iterable[str]) -> list[str]:
    return [name.rpartition("/")[2] for name in names]


def _by_last_part(folder: Path, given: dict[str, Classes]) -> Classes:
    """Classes by their ImageNet number alone, wherever below the folder they lie."""
    classes: Classes = {}
    for name, files in chain(*(group.items() for group in given.values())):
        (wnid,) = _last_parts([name])
        if wnid in classes:
            raise UsageError(f"{folder} has the class {wnid} twice: remove one of its folders")
        classes[wnid] = files
    return classes


def _check_published(folder: Path, given: dict[str, list[str]], published: dict[str, list[str]]) -> None:
    """Results compare only over the published classes: all of them, and no other."""
    split_of = {wnid: split for split, part in published.items() for wnid in part}
    for split, part in given.items():
        for wnid in part:
            if split_of.get(wnid) != split:
                truth = f"in {split_of[wnid]}" if wnid in split_of else "in no split"
                raise UsageError(
                    f"{folder} has the class {wnid} in its {split} split, the published list has it {truth}: "
                    "move it"
                )
        missing = sorted(set(published[split]) - set(part))
        if missing:
            raise UsageError(
                f"{folder} lacks the class {missing[0]} of the published {split} split "
                f"({len(missing)} of {len(published[split])} are missing): add them, "
                "or load the folder as your own"
            )


def _load_cifar(name: str, data_root: Path, published: dict[str, list[str]], form: Form) -> ImageSet:
    folder = data_root / "cifar-100-python"
    sources = [folder / "train", folder / "test"]
    if not all(path.is_file() for path in sources):
        _cifar(data_root)
    names = sorted(chain(*published.values()))
    pixels = _from_cache_or_sources(
        folder,
        lambda: _fingerprint(folder, {"all": sources}, form),
        (len(names) * CIFAR_IMAGES, form.channels, form.size, form.size),
        lambda: _cifar_images(data_root, names, form),
    )
    counts = [CIFAR_IMAGES] * len(names)
    found = _image_set(pixels, names, counts, published, own_splits=True, source=name)
    return replace(found, published=True)


def _cifar_images(data_root: Path, names: list[str], form: Form) -> Iterator[np.ndarray]:
    """CIFAR-100's images class by class, the training before the test images."""
    halves = _cifar(data_root)
    labels = torch.tensor([label for half in halves for label in half.targets])
    data = np.concatenate([half.data for half in halves])  # [60000, 32, 32, 3]
    for name in names:
        members = (labels == halves[0].class_to_idx.get(name, -1)).nonzero().flatten().tolist()
        if len(members) != CIFAR_IMAGES:
            raise UsageError(
                f"CIFAR-100 in {data_root} has {len(members)} images of {name} instead of {CIFAR_IMAGES}: "
                "remove cifar-100-python there, and it is fetched again"
            )
        for position in members:
            yield _prepare(Image.fromarray(data[position]), form)


def _cifar(data_root: Path) -> list[CIFAR100]:
    """CIFAR-100's training and test half, fetched if need be; a failed fetch leaves nothing behind."""
    import torchvision  # slow to import, and needed once in a lifetime

    mine = [data_root, data_root / "cifar-100-python", data_root / "cifar-100-python.tar.gz"]
    mine = [path for path in mine if not path.exists()]
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        return [torchvision.datasets.CIFAR100(data_root, train=t, download=True) for t in (True, False)]
    except BaseException as error:
        for path in mine:
            shutil.rmtree(path, ignore_errors=True)
            with suppress(OSError):
                path.unlink(missing_ok=True)
        if not isinstance(error, Exception):
            raise
        raise UsageError(
            f"CIFAR-100 is not whole in {data_root} and could not be fetched ({one_line(error)}): put the "
            f"unpacked folder cifar-100-python into {data_root}, or name another --data-root"
        ) from error
    finally:
        socket.setdefaulttimeout(timeout)


# ---- from a file to pixels -----------------------------------------------------------------------


def _decode_all(files: Sequence[Path], form: Form) -> Iterator[np.ndarray]:
    """The files' images in order, decoded in parallel, few at a time."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(files), AT_ONCE):
            yield from pool.map(partial(_decode, form=form), files[start : start + AT_ONCE])


def _decode(path: Path, form: Form) -> np.ndarray:
    """Any image file as uint8 `[channels, size, size]`."""
    try:
        with opened(path, MOST_BYTES) as file, open_image(file) as image, _memory_for(image):
            return _prepare(image, form)
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        raise UsageError(
            f"{path} is no readable image ({one_line(error)}): remove it, or put a sound one there"
        ) from error


def _memory_for(image: Image.Image) -> AbstractContextManager[object]:
    return BIG if math.prod(image.size) > BIG_PIXELS else nullcontext()


def open_image(
    file: IO[bytes], *, formats: tuple[str, ...] = FORMATS, most_pixels: int = MOST_PIXELS
) -> Image.Image:
    """An image of which the head alone is read; raises ValueError where decoding it would take too much."""
    size = None
    try:
        image = Image.open(file, formats=formats)
        size = image.size
    except UnidentifiedImageError as error:
        raise ValueError(f"its content is none of {', '.join(formats)}, or damaged") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):  # beyond Pillow's own limits
        pass
    if size is None or math.prod(size) > most_pixels:
        has = "more pixels" if size is None else f"{size[0]:,} x {size[1]:,} pixels, more"
        raise ValueError(f"it has {has} than {most_pixels:,}")
    if image.format in ("JPEG", "MPO"):
        place = file.tell()
        file.seek(0)
        scans = sum(piece.count(b"\xff\xda") for piece in iter(partial(file.read, 1 << 20), b""))
        file.seek(place)
        if scans > MOST_SCANS:
            raise ValueError(f"it has {scans:,} scans, more than {MOST_SCANS}")
    return image


def _prepare(image: Image.Image, form: Form) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would cut off at 255
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Converted before it is resized: on one-bit images Pillow silently takes the nearest pixel.
    image = image.convert("L" if form.channels == 1 else "RGB")
    if image.size != (form.size, form.size):
        image = image.resize((form.size, form.size), RESAMPLING[form.resize])
    pixels = np.asarray(image).reshape(form.size, form.size, form.channels).transpose(2, 0, 1)
    return 255 - pixels if form.invert else pixels


# ---- the cache -----------------------------------------------------------------------------------


def _load(
    folder: Path,
    classes: Classes,
    splits: dict[str, list[str]],
    form: Form,
    check: Check,
    *,
    own_splits: bool,
) -> ImageSet:
    """The images of these classes, through the cache, as a set."""
    names = sorted(classes)
    counts = [len(classes[name]) for name in names]
    none = torch.zeros(0, form.channels, form.size, form.size, dtype=torch.uint8)
    found = _image_set(none, names, counts, splits, own_splits=own_splits, source=str(folder))
    check(found)
    files = [file for name in names for file in classes[name]]
    pixels = _from_cache_or_sources(
        folder,
        lambda: _fingerprint(folder, {name: classes[name] for name in names}, form),
        (len(files), form.channels, form.size, form.size),
        lambda: _decode_all(files, form),
    )
    return replace(found, pixels=pixels)


def _image_set(
    pixels: Tensor,
    names: list[str],
    counts: list[int],
    splits: dict[str, list[str]],
    *,
    own_splits: bool,
    source: str,
) -> ImageSet:
    position = {name: i for i, name in enumerate(names)}
    count = torch.tensor(counts)
    return ImageSet(
        pixels=pixels,
        first=count.cumsum(0) - count,
        count=count,
        names=names,
        splits={
            split: torch.tensor([position[name] for name in splits.get(split, ())], dtype=torch.int64)
            for split in SPLIT_NAMES
        },
        own_splits=own_splits,
        source=source,
    )


def _fingerprint(folder: Path, classes: Classes, form: Form) -> str:
    """Changes with the settings, the cache's format, the classes, and their files' names, sizes and times."""
    digest = hashlib.sha256(json.dumps([CACHE_VERSION, repr(form)]).encode())
    for name, files in classes.items():
        for file in files:
            try:
                stat = file.stat()
            except OSError as error:
                raise UsageError(f"{file} cannot be read ({error.strerror}): remove it") from error
            if not S_ISREG(stat.st_mode):
                raise UsageError(f"{file} is no ordinary file: remove it")
            part = [name, os.path.relpath(file, folder), stat.st_size, stat.st_mtime_ns]
            digest.update(json.dumps(part).encode())
    return digest.hexdigest()[:16]


def _from_cache_or_sources(
    folder: Path,
    fingerprint: Callable[[], str],
    shape: tuple[int, ...],
    images: Callable[[], Iterator[np.ndarray]],
) -> Tensor:
    """uint8 `shape`, memory-mapped: what is cached under this fingerprint, or else made from `images()`."""
    title, sources = title_of(folder), fingerprint()

    def write(file: IO[bytes]) -> None:
        # Written rather than memory-mapped, because a full disk is an error here and a crash there.
        desc = f"Preparing {printable(title)} (once)"
        with tqdm(total=shape[0], desc=desc, unit=" images") as bar:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image in images():
                file.write(image.tobytes())
                bar.update()
        if fingerprint() != sources:
            raise UsageError(f"{folder} has changed while its images were read: start again when it is whole")

    pixels, reasons = from_cache(
        folder, f".{title}-{sources}.npy", math.prod(shape), lambda path: _read_cache(path, shape), write
    )
    if pixels is None:
        raise UsageError(
            f"the prepared images, {math.prod(shape) / 1e6:,.0f} MB, fit into {summed_up(reasons)}: "
            "free room there, or set XDG_CACHE_HOME to another folder"
        )
    return pixels


def _read_cache(path: Path, shape: tuple[int, ...]) -> Tensor | None:
    """None where there is no such cache, or it is not whole: then it is made again."""
    try:
        with opened(path, math.prod(shape) + MOST_HEADER) as file:
            if np.lib.format.read_magic(file) != (1, 0):
                return None
            if np.lib.format.read_array_header_1_0(file) != (shape, False, np.dtype(np.uint8)):
                return None
            if os.fstat(file.fileno()).st_size != file.tell() + math.prod(shape):
                return None
            array = np.memmap(file, np.uint8, "r", file.tell(), shape)
    except (OSError, ValueError, EOFError):
        return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
        return torch.from_numpy(array)
