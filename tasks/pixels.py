"""Decode image files to 8-bit pixels, by the range that their values really have.

A file's header says its kind. What it does not say (how many of 16 bits are used, what a float means) is
found from the values of all files, and said; what stays open is refused.
"""

from __future__ import annotations

import io
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.errors import UsageError
from tasks.cache import cache_array
from tasks.file_tasks import explain
from tasks.options import TaskOptions

warnings.filterwarnings("ignore", module=r"PIL\.")  # about files that are read anyway

AT_ONCE = 256  # images in work at a time: bounds the memory
PLAIN = "8-bit"
TRAINED = "the training images"
DECLARED = {PLAIN: (0.0, 255.0), "12-bit TIFF": (0.0, 4095.0), "16-bit PGM": (0.0, 65535.0)}
BITS = (8, 10, 12, 14, 16)  # that cameras and scanners have

T = TypeVar("T")
Range = tuple[float, float]  # the values that are black and white


@dataclass(frozen=True)
class Form:
    """The form of a decoded image: uint8 `[channels, size, size]`."""

    size: int
    channels: int
    invert: bool = False
    resize: str = "lanczos"  # or "nearest"
    range: Range | None = None  # None: the whole range of 8 bits
    kind: str = PLAIN  # of the files

    @classmethod
    def of(cls, options: TaskOptions) -> Form:
        size, channels = options.image_size, options.channels
        assert size and channels
        return cls(size, channels, options.invert, options.resize, options.black_and_white)

    @property
    def record(self) -> list[str]:
        """Return what a checkpoint keeps of kind and range; nothing where they are plain."""
        if self.kind == PLAIN and self.range is None:
            return []
        low, high = self.range or DECLARED[self.kind]
        return [self.kind, repr(low), repr(high)]

    def recorded(self, record: Sequence[str]) -> Form:
        """Return the form with the kind and range of a record; plain if it has none, or those of several."""
        if not record or ": " in record[0]:  # of a mixture
            return replace(self, kind=PLAIN, range=None)
        return replace(self, kind=record[0], range=(float(record[1]), float(record[2])))


# ---- images in a Parquet file or an archive, opened as if each was a file ------------------------


@dataclass(eq=False)
class ImageColumn:
    """Many images of a file, which is read when the first one is opened."""

    path: Path
    name: str  # of the images, before their number
    load: Callable[[], Callable[[int], bytes]] = field(repr=False)  # gives what returns an image's file
    read: Callable[[int], bytes] | None = None
    lock: Lock = field(default_factory=Lock, repr=False)

    def content(self, row: int) -> bytes:
        """Return the content of the image file in a row, from 0."""
        with self.lock:
            read = self.read = self.read or self.load()
        return read(row)

    def forget(self) -> None:
        self.read = None


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image of a column, opened as a file is."""

    column: ImageColumn
    row: int

    def open(self, mode: str = "rb") -> IO[bytes]:
        return io.BytesIO(self.column.content(self.row))

    def __str__(self) -> str:
        return f"{self.column.path}, {self.column.name} {self.row + 1}"


def as_file(image: Any) -> bytes:
    """Return the content of an image file: PNG or JPEG as it is, an array of uint8 as PPM or PGM."""
    data = np.frombuffer(image, np.uint8) if isinstance(image, bytes) else np.asarray(image)
    if data.size == max(data.shape):
        return data.tobytes()
    data = data.squeeze(-1) if data.shape[-1] == 1 else data
    return f"P{data.ndim + 3} {data.shape[1]} {data.shape[0]} 255\n".encode() + data.tobytes()


ImagePath = Path | zipfile.Path | StoredImage


def find_sources(files: Sequence[ImagePath]) -> list[Path]:
    """Return the files that hold the images: an archive counts once."""
    paths: dict[Path, None] = {}
    for file in files:
        if isinstance(file, zipfile.Path):
            paths[Path(str(file.root.filename))] = None
        else:
            paths[file.column.path if isinstance(file, StoredImage) else file] = None
    return [*paths]


def find_rows(files: Sequence[ImagePath]) -> list[tuple[str, int]]:
    """Return columns and rows of images that lie in tables; two columns of a table are other images."""
    return [(file.column.name, file.row) for file in files if isinstance(file, StoredImage)]


# ---- kinds and ranges ----------------------------------------------------------------------------


def detect_kind(image: Image.Image) -> str:
    """Return how a file stores its values, by its header."""
    storage = str([part[3] for part in getattr(image, "tile", ())])
    if image.mode == "F":
        return "floating-point"
    if image.mode.startswith("I"):
        if image.format == "PPM":
            return "16-bit PGM"  # Pillow has scaled them by the file's maximum
        if "I;12" in storage:
            return "12-bit TIFF"
        return "16-bit" if image.mode != "I" or image.format == "PNG" else "integer"
    if image.mode == "L" and 2 in getattr(image, "tag_v2", {}).get(339, ()):
        return "signed 8-bit"  # Pillow takes it for unsigned
    return "16-bit" if image.format in ("PNG", "TIFF") and ";16" in storage else PLAIN


def settle_range(folder: Path, files: Sequence[ImagePath], form: Form) -> tuple[Form, list[str]]:
    """Return the form with the files' kind and range, and lines that say them where they are not plain.

    Raises UsageError where files are of different kinds, or do not tell their range.
    """
    kind = _kind_of_first(folder, files[0])
    if kind == PLAIN and not form.range:
        return form, []
    if form.range or kind in DECLARED:
        low, high = form.range or DECLARED[kind]
        source = "by --image-range" if form.range else "as the files declare"
        note = f"image values are {kind}: {low:.7g} is black, {high:.7g} white, {source}"
        return replace(form, kind=kind, range=(low, high)), [note]
    settings = ("range", kind, *find_rows(files))
    low, high = cache_array(folder, find_sources(files), settings, lambda: _survey(files, kind)).tolist()
    values = f"{files[0]} and {len(files) - 1:,} others" if files[1:] else str(files[0])
    values = f"{values} have {kind} values from {low:.7g} to {high:.7g}"
    is_integer, bits = kind != "floating-point", next((bits for bits in BITS if high < 2**bits), 0)
    if low < 0 or (not bits if is_integer else high > 1):
        command = f"--image-range={low:.7g},{high:.7g}"
        raise UsageError(f"{values}: say which are black and white, for example {command}")
    top = float(2**bits - 1) if is_integer else 1.0
    how = f"({bits} bits)" if is_integer else "(a float's usual range)"
    note = f"image values are {kind}, {low:.7g} to {high:.7g}: 0 is black, {top:.7g} white {how}; "
    return replace(form, kind=kind, range=(0.0, top)), [note + "another range: --image-range=LOW,HIGH"]


def _kind_of_first(folder: Path, file: ImagePath) -> str:
    if not isinstance(file, StoredImage):
        return _open(file, detect_kind)
    settings = ("kind", *find_rows([file]))  # to read a large table or archive takes long
    sources = find_sources([file])
    return str(cache_array(folder, sources, settings, lambda: np.array(_open(file, detect_kind))))


def _survey(files: Sequence[ImagePath], kind: str) -> np.ndarray:
    """Return the lowest and the highest value of all files."""

    def find_extremes(image: Image.Image) -> Range:
        colour, _ = _read_deep(image)
        return float(colour.min()), float(colour.max())

    extremes = _read_all(files, find_extremes, kind, str(files[0]))
    low, high = zip(*tqdm(extremes, "Finding the range of values (once)", len(files)), strict=True)
    return np.array([min(low), max(high)])


# ---- pixels --------------------------------------------------------------------------------------


def decode_all(files: Sequence[ImagePath], form: Form, reference: str = "") -> Iterator[np.ndarray]:
    """Yield the files' images in order, decoded in parallel, as uint8 `[channels, size, size]`.

    Raises UsageError if one is unreadable, or not of the form's kind; `reference` names what is.
    """
    return _read_all(files, partial(prepare, form=form), form.kind, reference or str(files[0]))


def _read_all(
    files: Sequence[ImagePath], read: Callable[[Image.Image], T], kind: str, reference: str
) -> Iterator[T]:
    """Yield what `read` makes of each file, in order and in parallel.

    Raises UsageError if a file's values are of another kind than those of `reference`: no range fits both.
    """

    def read_checked(image: Any) -> T:
        if (other := detect_kind(image)) != kind:
            problem = f"{image.filename} has {other} values and {reference} {kind} ones"
            way_out = "give --image-range for these" if reference == TRAINED else "take one kind out"
            raise UsageError(f"{problem}: convert them to one kind, or {way_out}")
        return read(image)

    with ThreadPoolExecutor() as pool:
        for start in range(0, len(files), AT_ONCE):
            yield from pool.map(partial(_open, read=read_checked), files[start : start + AT_ONCE])


def _open(path: ImagePath, read: Callable[[Image.Image], T]) -> T:
    """Return what `read` makes of an image file; UsageError if it is unreadable."""
    try:
        with path.open("rb") as file, Image.open(file) as image:
            image.filename = str(path)
            return read(image)
    except UsageError:
        raise
    except Exception as error:  # Pillow's readers raise errors of many kinds on damaged files
        reason = explain(path, error)
        raise UsageError(f"{path} is not a readable image ({reason}): mend or remove it") from error


def prepare(image: Image.Image, form: Form) -> np.ndarray:
    """Return an image as uint8 `[channels, size, size]`: upright, on white, grey or in colour."""
    if getattr(image, "is_animated", False) and image.format != "MPO":  # a camera's, with its own preview
        warnings.warn("images with several frames or pages: the first one is read, of each", stacklevel=2)
    if form.kind != PLAIN:
        image = _to_8_bits(image, form.range or DECLARED[form.kind])
    image = ImageOps.exif_transpose(image)
    if image.mode.endswith("a"):  # premultiplied
        image = image.convert(image.mode.upper())
    if image.mode.endswith("A") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Converted before it is resized: on one-bit images Pillow silently takes the nearest pixel.
    image = image.convert("L" if form.channels == 1 else "RGB")
    if form.kind == PLAIN and form.range:
        image = image.point([*scale_values(np.arange(256), form.range).round()] * form.channels)
    image = image.resize((form.size, form.size), Image.Resampling[form.resize.upper()])
    pixels = np.asarray(image).reshape(form.size, form.size, form.channels).transpose(2, 0, 1)
    return 255 - pixels if form.invert else pixels


def scale_values(values: np.ndarray, bounds: Range) -> np.ndarray:
    """Return values from 0 to 255; those outside the bounds are black or white."""
    low, high = bounds
    return ((values - low) / (high - low)).clip(0, 1) * 255


def _to_8_bits(image: Image.Image, bounds: Range) -> Image.Image:
    """Return an image of more than 8 bits in L or RGB, upright, on white."""
    colour, alpha = _read_deep(image)
    pixels = (alpha * scale_values(colour, bounds) + (1 - alpha) * 255).round().astype(np.uint8)
    if getattr(image, "tag_v2", {}).get(262) == 0:
        pixels = 255 - pixels  # a TIFF's WhiteIsZero, which Pillow heeds for 8 bits alone
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _read_deep(image: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the values of an image of more than 8 bits, upright: colour and opacity `[height, width, n]`."""
    high_bytes = image.mode[0] not in "IFL"
    low = ImageOps.exif_transpose(_read_low_bytes(image)) if high_bytes else None
    stored = np.asarray(ImageOps.exif_transpose(image))
    values = (stored.view(np.int8) if image.mode == "L" else stored).astype(np.float64)
    if low is not None:
        values = values * 256 + np.asarray(low)
        colour, alpha = values[..., :3], values[..., 3:] / 65535
    else:
        colour, clear = values[..., None], image.info.get("transparency")
        alpha = colour[..., :0] if clear is None else (colour != clear).astype(np.float64)
    if not np.isfinite(colour).all():
        raise ValueError("it has values that are NaN or infinite")
    return colour, alpha if alpha.size else np.ones_like(colour[..., :1])


def _read_low_bytes(image: Any) -> Image.Image:
    """Read a colour image of 16 bits, of which Pillow keeps the high byte, with its bytes exchanged."""
    tiles = []
    for tile in image.tile:
        raw, *others = [tile[3]] if isinstance(tile[3], str) else tile[3]
        if not re.fullmatch("RGB[AX]?;16[BLN]", raw):
            raise ValueError(f"its form {raw} is read with 8 of 16 bits: save it as RGB, RGBA or grey")
        exchanged = raw[:-1] + ("L" if raw.endswith("B") else "B")  # N is L on the processors of today
        arguments = (exchanged, *others) if others else exchanged
        # a plain tuple before Pillow 11
        tiles.append(tile._replace(args=arguments) if hasattr(tile, "_replace") else (*tile[:3], arguments))
    image.fp.seek(0)
    other: Any = Image.open(io.BytesIO(image.fp.read()))
    other.tile = tiles
    return other
