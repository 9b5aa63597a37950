"""Images by their true range: each kind of file against numpy's own arithmetic on the values written."""

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import refused, write_images
from PIL import Image

from tasks.images import ImageSet, open_images
from tasks.pixels import Form
from tasks.user_tasks import read_pixels, read_task_folder

SHARES = {"train": 1, "validation": 1, "test": 1}
GREY, COLOUR = Form(6, 1), Form(6, 3)

pytestmark = pytest.mark.usefixtures("user_cache")


def values(top: float, low: float = 0, seed: int = 0) -> np.ndarray:
    """Return random values `[6, 6]` that reach both bounds."""
    array = np.random.default_rng(seed).uniform(low, top, (6, 6))
    array[0, 0], array[-1, -1] = low, top
    return array


def write_png(path: Path, array: np.ndarray, colour_type: int) -> None:
    """Write a PNG of 16 bits by hand: Pillow writes none in colour."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    height, width = array.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)


def write_colour_tiff(path: Path, array: np.ndarray) -> None:
    """Write a TIFF of 16 bits a colour by hand: width, height, bits, RGB, one strip."""
    height, width = array.shape[:2]
    tags = [(256, width), (257, height), (258, 16), (259, 1), (262, 2), (273, 512), (277, 3), (278, height)]
    tags.append((279, array.nbytes))
    entries = b"".join(struct.pack("<HHII", tag, 3, 1, value) for tag, value in tags)
    entries = entries.replace(struct.pack("<HHII", 258, 3, 1, 16), struct.pack("<HHII", 258, 3, 3, 256))
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0)
    bits = struct.pack("<HHH", 16, 16, 16)
    path.write_bytes(head.ljust(256, b"\0") + bits.ljust(256, b"\0") + array.tobytes())


def opened(folder: Path, form: Form = GREY) -> ImageSet:
    return open_images(folder, form, SHARES)


def mapped(array: np.ndarray, low: float, high: float) -> torch.Tensor:
    return torch.from_numpy(np.rint(np.clip((array - low) / (high - low), 0, 1) * 255).astype(np.uint8))


def save_in_classes(folder: Path, image: Image.Image, suffix: str, **options) -> None:
    for name in "abc":
        (folder / name).mkdir(parents=True, exist_ok=True)
        file = folder / name / f"1{suffix}"
        if (suffix, image.mode) == (".pgm", "I;16"):  # which Pillow 10.0 reads and does not write
            header = f"P5 {image.width} {image.height} 65535\n".encode()
            file.write_bytes(header + np.asarray(image).astype(">u2").tobytes())
        else:
            image.save(file, **options)


# What the files hold -> the values that are black and white, and a part of the line that says so.
RANGES = {
    "12 bits in a 16-bit PNG": (values(4000).astype(np.uint16), ".png", 4095, "16-bit, 0 to 4000: .*12 bits"),
    "16 bits": (values(65535).astype(np.uint16), ".png", 65535, "16 bits"),
    "10 bits in a TIFF": (values(900).astype(np.uint16), ".tif", 1023, "10 bits"),
    "32-bit integers": (values(16000).astype(np.int32), ".tif", 16383, "integer, .*14 bits"),
    "floats": (values(0.7).astype(np.float32), ".tif", 1, "floating-point, 0 to 0.7: 0 is black, 1 white"),
    "a PGM": (values(65535).astype(np.uint16), ".pgm", 65535, "16-bit PGM: .* as the files declare"),
}


@pytest.mark.parametrize("case", RANGES)
def test_values_of_more_than_8_bits_keep_their_range(case, tmp_path):
    array, suffix, white, line = RANGES[case]
    save_in_classes(tmp_path, Image.fromarray(array), suffix)
    images = opened(tmp_path)
    assert torch.equal(images.load()[1, 0], mapped(array.astype(float), 0, white))
    assert len(images.notes) == 1 and re.search(line, images.notes[0])
    assert images.range_record[2] == repr(float(white))
    again = opened(tmp_path)  # from the cache
    assert again.notes == images.notes and torch.equal(again.load(), images.load())


SIGNED, HOUNSFIELD = values(100, -100).astype(np.int8), values(3000, -1000).astype(np.float32)
WITHOUT_RANGE = {  # what the files hold, and what is said
    "signed bytes": (SIGNED.view(np.uint8), {339: 2}, "signed 8-bit values from -100 to 100"),
    "floats": (HOUNSFIELD, {}, r"floating-point values from -1000 to 3000: .*--image-range=-1000,3000"),
    "negative integers": (values(90, -5).astype(np.int32), {}, "integer values from -5 to 90"),
    "NaN": (np.full((6, 6), np.nan, np.float32), {}, r"a/1.tif is not a readable image .*NaN"),
}


@pytest.mark.parametrize("case", WITHOUT_RANGE)
def test_values_that_do_not_tell_their_range_are_refused(case, tmp_path):
    array, tags, message = WITHOUT_RANGE[case]
    save_in_classes(tmp_path, Image.fromarray(array), ".tif", tiffinfo=tags)
    with refused(message):
        opened(tmp_path)


@pytest.mark.parametrize("kind", ["RGB.png", "RGBA.png", "RGB.tif"])
def test_16_bits_in_colour_are_not_cut_to_8(kind, tmp_path):
    array = np.stack([values(4095, seed=seed) for seed in range(4)], -1).astype("<u2")
    array[..., 3] = 65535  # opaque
    array[1, :, 3] = 0  # a transparent row
    expected = mapped(array[..., :3].astype(float), 0, 4095)
    for name in "abc":
        (tmp_path / name).mkdir()
        if kind == "RGBA.png":
            write_png(tmp_path / name / kind, array, 6)
            expected[1] = 255  # on white
        elif kind == "RGB.png":
            write_png(tmp_path / name / kind, array[..., :3], 2)
        else:
            write_colour_tiff(tmp_path / name / kind, array[..., :3])
    assert torch.equal(opened(tmp_path, COLOUR).load()[0].permute(1, 2, 0), expected)


def test_a_range_of_ones_own_cuts_off_the_rest(tmp_path):
    save_in_classes(tmp_path / "float", Image.fromarray(HOUNSFIELD), ".tif")
    images = opened(tmp_path / "float", Form(6, 1, range=(-100.0, 400.0)))
    assert torch.equal(images.load()[0, 0], mapped(HOUNSFIELD, -100, 400))
    assert "-100 is black, 400 white, by --image-range" in images.notes[0]
    save_in_classes(tmp_path / "signed", Image.fromarray(SIGNED.view(np.uint8)), ".tif", tiffinfo={339: 2})
    images = opened(tmp_path / "signed", Form(6, 1, range=(-100.0, 100.0)))
    assert torch.equal(images.load()[0, 0], mapped(SIGNED.astype(float), -100, 100))
    masks = np.random.default_rng(0).integers(0, 3, (6, 6)).astype(np.uint8)
    save_in_classes(tmp_path / "plain", Image.fromarray(masks), ".png")
    first, second = (opened(tmp_path / "plain", Form(6, 1, range=r)).load() for r in ((0.0, 2.0), (0.0, 4.0)))
    assert torch.equal(first[0, 0], mapped(masks, 0, 2)) and torch.equal(second[0, 0], mapped(masks, 0, 4))


def test_a_rare_form_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    write_png(tmp_path / "a" / "1.png", np.full((6, 6, 2), 900), 4)
    with refused("its form LA;16B is read with 8 of 16 bits: save it as RGB"):
        opened(tmp_path)


@pytest.mark.parametrize("other", ["8-bit", "floating-point"])
def test_mixed_kinds_are_refused_by_name(other, tmp_path):
    save_in_classes(tmp_path, Image.fromarray(values(4000).astype(np.uint16)), ".png")
    if other == "8-bit":
        write_images(tmp_path / "b", [7])
    else:
        Image.fromarray(values(1).astype(np.float32)).save(tmp_path / "b" / "000.tif")
    with refused(rf"b/000\.\w+ has {other} values and .*a/1.png 16-bit ones"):
        opened(tmp_path)


def test_plain_kinds_say_nothing(tmp_path):
    write_images(tmp_path / "a", [7])
    write_images(tmp_path / "b", [7], suffix=".jpg")
    (tmp_path / "c").mkdir()
    Image.new("1", (6, 6), 1).save(tmp_path / "c" / "1.tif")
    images = opened(tmp_path)
    assert (images.notes, images.range_record) == ([], [])
    assert images.load()[:, 0, 0, 0].tolist() == [7, 7, 255]


def test_colours_of_every_kind_are_pillows(tmp_path):
    """Compare with pixels set one by one, transparent ones included."""
    corner = Image.new("RGB", (6, 6), (10, 20, 30))
    corner.putpixel((0, 0), (200, 100, 50))
    palette = corner.quantize(4)
    for name in ("cmyk", "palette", "rgba", "clear"):
        (tmp_path / name).mkdir()
    corner.convert("CMYK").save(tmp_path / "cmyk" / "1.tif")
    corner.convert("RGBA").save(tmp_path / "rgba" / "1.png")
    palette.save(tmp_path / "palette" / "1.png")
    palette.save(tmp_path / "clear" / "1.png", transparency=palette.getpixel((0, 0)))
    images = opened(tmp_path, COLOUR)
    pixels = dict(zip(images.names, images.load().permute(0, 2, 3, 1).int(), strict=True))
    for name in ("cmyk", "palette", "rgba", "clear"):
        first = [255, 255, 255] if name == "clear" else [200, 100, 50]
        assert pixels[name][0, 0].tolist() == first and pixels[name][3, 3].tolist() == [10, 20, 30]


def test_the_first_of_several_frames_is_read_and_it_is_said(tmp_path):
    frames = [Image.new("L", (6, 6), value) for value in (40, 200)]
    save_in_classes(tmp_path, frames[0], ".tif", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match="several frames or pages: the first one is read"):
        assert opened(tmp_path).load().unique().tolist() == [40]


def test_orientation_and_white_is_zero_hold_for_deep_images(tmp_path):
    array, exif = values(4095).astype(np.uint16), Image.Exif()
    exif[0x0112] = 6
    save_in_classes(tmp_path / "turned", Image.fromarray(array), ".png", exif=exif)
    expected = mapped(np.rot90(array, -1).astype(float), 0, 4095)
    assert torch.equal(opened(tmp_path / "turned").load()[0, 0], expected)
    save_in_classes(tmp_path / "negative", Image.fromarray(array), ".tif", tiffinfo={262: 0})
    assert torch.equal(opened(tmp_path / "negative").load()[0, 0], 255 - mapped(array.astype(float), 0, 4095))


def test_bytes_are_bytes_whatever_the_training_images_were():
    array = values(255).astype(np.uint8)[None]
    for record in (["16-bit", "0.0", "4095.0"], []):
        same = (read_pixels(part, GREY, record, None) for part in (array, array / 255))
        assert torch.equal(*same)
    bounded = read_pixels(array, GREY, ["8-bit", "0.0", "510.0"], None)
    assert bounded.max() == 128  # of bytes that the user has bounded


def test_new_images_are_mapped_like_the_training_images(tmp_path):
    array = values(900).astype(np.uint16)  # alone, they would be taken for 10 bits
    for place in ("support/a", "support/b", "query"):
        (tmp_path / place).mkdir(parents=True)
        Image.fromarray(array).save(tmp_path / place / "1.png")

    def read(record: list[str], form: Form = GREY) -> torch.Tensor:
        task = read_task_folder(tmp_path, form, record, torch.device("cpu"), torch.float64)
        return task.query_x[0, 0] * 255

    own = read([], Form(6, 1, range=(0.0, 2000.0)))
    for pixels, white in ((read(["16-bit", "0.0", "4095.0"]), 4095), (own, 2000)):
        assert torch.equal(pixels.round(), mapped(array.astype(float), 0, white).double())
    for record, kind in (([], "8-bit"), (["floating-point", "0.0", "1.0"], "floating-point")):
        with refused(f"has 16-bit values and the training images {kind} ones"):
            read(record)
