"""Data that someone else has made, or that broke: refused in one line or mended, within bounds, and nothing
of it is run or leaves its folder."""

import gzip
import io
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import tracemalloc
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from common.locks import one_at_a_time
from conftest import ROOT
from PIL import Image

import main
from common.errors import UsageError
from tasks import cache as caches
from tasks import images, omniglot, tables
from tasks.images import load_images, load_named, open_image, read_images
from tasks.omniglot import load_omniglot
from tasks.tables import Columns, load_table
from training import compiler

SMALL = {"size": 6, "channels": 1}
HAS_FORK = "fork" in multiprocessing.get_all_start_methods()


@pytest.fixture(autouse=True)
def cache_folder(tmp_path_factory, monkeypatch) -> Path:
    folder = tmp_path_factory.mktemp("user-cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _nothing_waits_for_ever() -> Iterator[None]:
    def late(*_):
        raise AssertionError("this takes too long")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def listing(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@contextmanager
def memory_below(megabytes: float) -> Iterator[None]:
    """Of what Python allocates, zlib's output included."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * 2**20
    finally:
        tracemalloc.stop()


def write_classes(folder: Path, classes: int = 3, count: int = 3) -> None:
    for c in range(classes):
        place = folder / f"c{c:02}"
        place.mkdir(parents=True)
        for i in range(count):
            Image.new("L", (6, 6), 10 * c + i).save(place / f"{i:03}.png")


def png(width: int, height: int, rows: bytes = b"") -> bytes:
    """A grey PNG that says it has this size."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def encoded(kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB" if kind not in ("MSP", "XBM") else "1", (32, 32)).save(buffer, kind, **options)
    return buffer.getvalue()


# ---- Omniglot -------------------------------------------------------------------------------

VICTIM = "images_evaluation/A1/character01/0001_19.png"
Members = dict[str, bytes]


def rewritten(root: Path, change: Callable[[Members], None]) -> Path:
    """The small Omniglot's archive, with its members changed."""
    path = root / "omniglot-py" / "images_evaluation.zip"
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def loaded(root: Path) -> torch.Tensor:
    return load_omniglot(root, split="random", resize="lanczos")[0]


def test_names_in_an_archive_are_never_places_on_the_disk(small_omniglot):
    expected = loaded(small_omniglot).clone()

    def add(members: Members) -> None:
        for name in (
            "../../x/y.png",
            "/x/y/z.png",
            r"images_evaluation\..\..\..\x.png",
            "/etc/x.png",
            "images_evaluation/../../../x.png",
            "images_evaluation/more.zip",
            "bomb.zip/a/b/c.png",
        ):
            members[name] = encoded("PNG")  # fmt: skip

    rewritten(small_omniglot, add)
    before = listing(small_omniglot.parent)
    assert torch.equal(loaded(small_omniglot), expected)
    new = set(listing(small_omniglot.parent)) - set(before)
    assert len(new) == 1 and new.pop().endswith(".npz")


def set_flag(path: Path, offset_local: int, offset_central: int, bits: int) -> None:
    """In the heads of all members, which stand twice in an archive."""
    content = bytearray(path.read_bytes())
    for mark, offset in ((b"PK\3\4", offset_local), (b"PK\1\2", offset_central)):
        at = content.find(mark)
        while at >= 0:
            content[at + offset] |= bits
            at = content.find(mark, at + 1)
    path.write_bytes(content)


def encrypt(root: Path) -> None:
    set_flag(rewritten(root, lambda members: None), 6, 8, 1)


def list_twice(root: Path) -> None:
    """A drawing in the place of another, so that their number is right."""
    path = rewritten(root, lambda members: members.pop(VICTIM))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr(VICTIM.replace("19", "18"), encoded("PNG"))


def cut(root: Path) -> None:
    path = root / "omniglot-py" / "images_evaluation.zip"
    path.write_bytes(path.read_bytes()[:-3000])
    shutil.rmtree(path.with_suffix(""))


def put_a_pipe(root: Path) -> None:
    path = root / "omniglot-py" / "images_evaluation.zip"
    path.unlink()
    os.mkfifo(path)
    shutil.rmtree(path.with_suffix(""))


def put_among_drawings(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def put(root: Path) -> None:
        path = root / "omniglot-py/images_background/A3/character01/0001_07.png"
        path.unlink()
        make(path)

    return put


def replaced(content: bytes) -> Callable[[Path], None]:
    return lambda root: rewritten(root, lambda members: members.update({VICTIM: content})) and None


def added(name: str) -> Callable[[Path], None]:
    return lambda root: rewritten(root, lambda members: members.update({name: b""})) and None


BAD_OMNIGLOT = {
    "outside": (added("images_evaluation/../x/y.png"), r"\.\./x has 1 drawings instead of 20"),
    "link": (
        replaced(b"../../../../etc/passwd"),
        r"zip is damaged \(A1/character01/0001_19.png: .*none of PNG",
    ),
    "bomb": (replaced(bytes(2**26)), r"a drawing has more than 65,536 bytes"),
    "huge": (replaced(png(60_000, 60_000)), r"0001_19.png: it has more pixels than 262,144"),
    "large": (replaced(png(600, 600, bytes(601 * 600))), r"600 x 600 pixels, more than 262,144"),
    "another format": (replaced(encoded("EPS")), "none of PNG"),
    "an archive in it": (replaced(b"PK\3\4" + bytes(50)), "none of PNG"),
    "encrypted": (encrypt, "is encrypted"),
    "twice": (list_twice, "0001_18.png twice"),
    "cut": (cut, "zip is damaged: remove it"),
    "pipe": (put_a_pipe, "zip is damaged: remove it"),
    "pipe in a folder": (put_among_drawings(os.mkfifo), "no ordinary file"),
    "device": (put_among_drawings(lambda path: path.symlink_to("/dev/zero")), "no ordinary file"),
    "lost": (put_among_drawings(lambda path: path.symlink_to("nowhere")), "cannot be read"),
}


@pytest.mark.parametrize("case", BAD_OMNIGLOT)
def test_a_hostile_omniglot_is_refused_in_one_line_within_bounds(case, small_omniglot):
    make, message = BAD_OMNIGLOT[case]
    make(small_omniglot)
    before = listing(small_omniglot)
    with memory_below(20), pytest.raises(UsageError, match=message) as raised:
        loaded(small_omniglot)
    assert "\n" not in str(raised.value) and listing(small_omniglot) == before


def test_a_member_that_lies_about_its_size_takes_no_memory(small_omniglot):
    path = rewritten(small_omniglot, lambda members: members.update({VICTIM: bytes(2**26)}))
    size = struct.pack("<I", 2**26)
    content = path.read_bytes()
    assert content.count(size) == 2
    path.write_bytes(content.replace(size, struct.pack("<I", 100)))
    with memory_below(20), pytest.raises(UsageError, match="zip is damaged"):
        loaded(small_omniglot)


def test_an_archive_of_another_size_than_omniglots_is_not_read(small_omniglot, monkeypatch):
    monkeypatch.setattr(omniglot, "MOST_ARCHIVE_BYTES", 1000)
    with pytest.raises(UsageError, match="and may have 1,000"):
        loaded(small_omniglot)


def test_links_to_drawings_elsewhere_are_followed(small_omniglot):
    expected = loaded(small_omniglot).clone()
    inside = small_omniglot / "omniglot-py" / "images_background"
    inside.rename(small_omniglot / "elsewhere")
    inside.symlink_to(small_omniglot / "elsewhere")
    assert torch.equal(loaded(small_omniglot), expected)


# ---- CIFAR-100, whose files are pickles -----------------------------------------------------


class Code:
    """A pickle that runs something."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_pickle_is_read_whose_checksum_is_not_that_of_cifar_100(tmp_path, monkeypatch):
    import torchvision

    mark, folder = tmp_path / "code has run", tmp_path / "data" / "cifar-100-python"
    folder.mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (folder / name).write_bytes(pickle.dumps(Code(mark)))
    (tmp_path / "data" / "cifar-100-python.tar.gz").write_bytes(b"not CIFAR's archive")
    before = listing(tmp_path)

    def no_network(*_, **__):
        raise OSError("no network")

    for name in ("_urlretrieve", "_get_redirect_url", "_download_file_from_remote_location"):
        monkeypatch.setattr(torchvision.datasets.utils, name, no_network)
    with pytest.raises(UsageError, match="no network"):
        load_named("cifar-fs", tmp_path / "data", size=4, channels=3)
    assert not mark.exists() and listing(tmp_path) == before
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    with pytest.raises(UsageError):
        load_named("cifar-fs", tmp_path / "data", size=4, channels=3)
    assert mark.exists()  # it is the checksum that has kept it from running


# ---- image files ----------------------------------------------------------------------------


def patched_jpeg(side: int) -> bytes:
    content = encoded("JPEG")
    at = content.index(b"\xff\xc0")
    return content[: at + 5] + struct.pack(">HH", side, side) + content[at + 9 :]


def many_scans() -> bytes:
    """A progressive JPEG whose last scan, which refines one coefficient, comes a thousand times."""
    content = encoded("JPEG", progressive=True)
    at = content.rindex(b"\xff\xda")
    return content[:at] + content[at:-2] * 1000 + content[-2:]


def large_gif() -> bytes:
    content = bytearray(encoded("GIF"))
    content[6:10] = struct.pack("<HH", 65535, 65535)
    return bytes(content)


BAD_IMAGES = {
    "png": (png(60_000, 60_000), "more pixels than 67,108,864"),
    "png, a little too large": (png(8192, 8193), "8,192 x 8,193 pixels, more than 67,108,864"),
    "jpeg": (patched_jpeg(65_535), "more pixels than"),
    "jpeg, between Pillow's limits": (patched_jpeg(10_000), "(pixels, more|more pixels) than"),
    "gif": (large_gif(), "more pixels than"),
    "ppm": (b"P6 60000 60000 255\n", "more pixels than"),
    "bmp": (encoded("BMP")[:18] + struct.pack("<ii", 60_000, 60_000) + encoded("BMP")[26:], "more pixels"),
    "scans": (many_scans(), "scans, more than 200"),
    "nothing": (b"", "none of PNG, JPEG"),
    **{
        kind: (encoded(kind), "none of PNG, JPEG")
        for kind in ("EPS", "PCX", "SGI", "TGA", "DDS", "IM", "MSP", "XBM", "ICNS", "ICO")
    },
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_hostile_image_is_refused_before_it_is_decoded(case, tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("Ghostscript was called"))
    monkeypatch.setattr(images, "_prepare", lambda *_: pytest.fail("it was decoded"))
    content, message = BAD_IMAGES[case]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with (
        memory_below(20),
        pytest.raises(UsageError, match=rf"x.png is no readable image \(.*{message}") as error,
    ):
        read_images([path], **SMALL)
    assert "\n" not in str(error.value)


def test_the_limit_of_pixels_is_inclusive():
    assert open_image(io.BytesIO(encoded("PNG")), most_pixels=1024).size == (32, 32)
    with pytest.raises(ValueError, match="more than 1,023"):
        open_image(io.BytesIO(encoded("PNG")), most_pixels=1023)


def test_of_a_film_the_first_picture_is_taken_and_no_other_read(tmp_path):
    pictures = [Image.new("L", (6, 6), value % 256) for value in range(7, 2007)]
    pictures[0].save(tmp_path / "film.gif", save_all=True, append_images=pictures[1:], disposal=2)
    begin = time.process_time()
    assert (read_images([tmp_path / "film.gif"], **SMALL) == 7).all()
    assert time.process_time() - begin < 1


def test_a_tag_that_claims_gigabytes_takes_no_memory(tmp_path):
    content = encoded("TIFF")
    at = content.index(struct.pack("<HHI", 273, 4, 1))  # where the strips begin
    path = tmp_path / "x.tif"
    path.write_bytes(content[: at + 4] + struct.pack("<I", 2**30 - 1) + content[at + 8 :])
    with memory_below(20), pytest.raises(UsageError, match="no readable image"):
        read_images([path], **SMALL)


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"]
)
def test_pipes_and_devices_are_refused_and_not_waited_for(make, tmp_path):
    write_classes(tmp_path / "data")
    make(tmp_path / "data" / "c01" / "x.png")
    with pytest.raises(UsageError, match=r"x.png is no ordinary file"):
        load_images(tmp_path / "data", **SMALL)
    with pytest.raises(UsageError, match=r"x.png is no readable image \(.*no ordinary file"):
        read_images([tmp_path / "data" / "c01" / "x.png"], **SMALL)
    make(tmp_path / "data" / "train.csv")
    with pytest.raises(UsageError, match=r"train.csv is no readable CSV file \(.*no ordinary file"):
        load_images(tmp_path / "data", **SMALL)


def test_files_and_lists_beyond_their_size_are_not_read(tmp_path, monkeypatch):
    write_classes(tmp_path / "data")
    monkeypatch.setattr(images, "MOST_BYTES", 10)
    with pytest.raises(UsageError, match=r"000.png is no readable image \(.*bytes, and may have 10"):
        load_images(tmp_path / "data", **SMALL)
    monkeypatch.setattr(images, "MOST_LIST_BYTES", 10)
    (tmp_path / "data" / "train.csv").write_text("filename,label\n")
    with pytest.raises(UsageError, match=r"train.csv is no readable CSV file \(.*and may have 10"):
        load_images(tmp_path / "data", **SMALL)


def test_folders_without_end_end(tmp_path):
    for level in range(40):  # two links a level: 2^40 paths
        (tmp_path / "links" / f"{level:02}").mkdir(parents=True)
        for name in "ab":
            (tmp_path / "links" / f"{level:02}" / name).symlink_to(tmp_path / "links" / f"{level + 1:02}")
    write_classes(tmp_path / "links" / "40")
    with pytest.raises(UsageError, match="is the same folder as"):
        load_images(tmp_path / "links" / "00", **SMALL)
    (tmp_path / "deep" / Path(*["d"] * 110)).mkdir(parents=True)
    with pytest.raises(UsageError, match="has folders 100 deep"):
        load_images(tmp_path / "deep", **SMALL)


def test_a_list_may_name_files_anywhere_but_nothing_of_them_is_told(tmp_path):
    write_classes(tmp_path / "elsewhere", classes=1)
    (tmp_path / "secret").write_text("P5 my password\n")
    folder = tmp_path / "data"
    folder.mkdir()

    def listed(name: str) -> str:
        (folder / "train.csv").write_text(f"filename,label\n{name},x\n")
        with pytest.raises(UsageError) as raised:
            load_images(folder, **SMALL)
        return str(raised.value)

    for name in ("../secret", str(tmp_path / "secret")):
        assert "is no readable image" in (said := listed(name)) and "password" not in said
    for name in ("a" * 5000, "../elsewhere", "/dev/zero"):
        assert "line 2, names" in listed(name) and listing(folder) == ["train.csv"]
    (folder / "train.csv").write_text("filename,label\n../elsewhere/c00/001.png,x\n")
    assert (load_images(folder, **SMALL).pixels == 1).all()


def test_files_that_vanish_or_change_while_they_are_read_leave_no_cache(tmp_path, monkeypatch):
    write_classes(tmp_path)
    before, decode = listing(tmp_path), images._decode

    def while_reading(act: Callable[[Path], None], message: str) -> None:
        def acting(path, form):
            if path.name == "001.png":
                act(path)
            return decode(path, form)

        with monkeypatch.context() as patch, pytest.raises(UsageError, match=message):
            patch.setattr(images, "_decode", acting)
            load_images(tmp_path, **SMALL)

    while_reading(lambda path: os.utime(path.with_name("000.png"), ns=(1, 1)), "has changed while its images")
    while_reading(lambda path: Image.new("L", (9, 9)).save(path), "has changed while its images")
    while_reading(lambda path: path.unlink(missing_ok=True), r"001.png is no readable image")
    assert set(listing(tmp_path)) < set(before)
    for path in tmp_path.glob("*/001.png"):  # not every one had its turn
        path.unlink()
    assert load_images(tmp_path, **SMALL).count.tolist() == [2, 2, 2]


NASTY = "a\n\x1b]0;owned\x07\x1b[2J\u202egnp\x9b31m"


def test_no_name_reaches_the_terminal_as_anything_but_text(tmp_path, capsys):
    write_classes(tmp_path, 12)
    for name in (NASTY, os.fsdecode(b"\xff\xfe")):
        bad = tmp_path / "c01" / f"{name}.png"
        bad.write_bytes(b"no image")
        assert (
            main.main(["--dataset", f"images:{tmp_path}", "-n", "2", "-k", "1", "-q", "1", "--device", "cpu"])
            == 2
        )
        said = capsys.readouterr().err
        assert "is no readable image" in said and said.count("\n") >= 1
        line = said.splitlines()[-1]
        assert line.isprintable() and line.startswith("main.py: error:")
        bad.unlink()


# ---- caches of images -----------------------------------------------------------------------


def array_file(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def header_of(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def put(path: Path, content: bytes | str) -> None:
    path.unlink()
    if content == "pipe":
        os.mkfifo(path)
    elif content == "link":
        path.symlink_to("/dev/zero")
    elif isinstance(content, bytes):
        path.write_bytes(content)


@pytest.mark.parametrize("kind", ["empty", "garbage", "code", "huge", "version 2", "pipe", "link"])
def test_what_is_no_cache_is_built_again_in_silence(kind, tmp_path, capsys):
    write_classes(tmp_path / "data")
    expected = load_images(tmp_path / "data", **SMALL).pixels.clone()
    (cache,) = (tmp_path / "data").glob(".*")
    sound = cache.read_bytes()
    code = array_file(np.array([Code(tmp_path / "code has run")] * 9, dtype=object))
    contents = {"empty": b"", "garbage": os.urandom(500), "code": code, "huge": header_of((2**40, 1, 6, 6)),
                "version 2": sound.replace(b"NUMPY\1", b"NUMPY\2")}  # fmt: skip
    put(cache, contents.get(kind, kind))
    capsys.readouterr()
    assert torch.equal(load_images(tmp_path / "data", **SMALL).pixels, expected)
    assert cache.read_bytes() == sound and listing(tmp_path / "data")[:1] == [cache.name]
    said = capsys.readouterr().err
    assert not (tmp_path / "code has run").exists() and "Preparing data" in said and "rror" not in said


def test_a_folder_in_the_place_of_a_cache_sends_it_to_the_users(tmp_path, cache_folder):
    write_classes(tmp_path)
    expected = load_images(tmp_path, **SMALL).pixels.clone()
    (cache,) = tmp_path.glob(".*")
    cache.unlink()
    (cache / "keep me").mkdir(parents=True)
    assert torch.equal(load_images(tmp_path, **SMALL).pixels, expected)
    assert (cache_folder / "maml" / cache.name).is_file() and (cache / "keep me").is_dir()
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob("*.lock"))


def test_a_cache_of_another_version_is_not_met(tmp_path, monkeypatch):
    write_classes(tmp_path)
    load_images(tmp_path, **SMALL)
    monkeypatch.setattr(images, "CACHE_VERSION", 2)
    load_images(tmp_path, **SMALL)
    assert len(list(tmp_path.glob(".*.npy"))) == 2


@pytest.mark.parametrize("kind", ["bit", "code", "packed", "huge", "names", "pipe", "link"])
def test_omniglots_cache_has_a_checksum_runs_nothing_and_is_built_again(kind, small_omniglot, tmp_path):
    expected = loaded(small_omniglot).clone()
    (cache,) = (small_omniglot / "omniglot-py").glob("*.npz")
    sound = cache.read_bytes()
    mark = tmp_path / "code has run"
    code = np.array([Code(mark)] * 16, dtype=object)
    zeros, names = np.zeros((16, 20, 28, 28), np.uint8), np.array(["a"] * 16)

    def saved(save=np.savez, **arrays) -> bytes:
        buffer = io.BytesIO()
        save(buffer, **arrays)
        return buffer.getvalue()

    def huge() -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("images.npy", header_of((2**44,)))
            archive.writestr("names.npy", array_file(names))
        return buffer.getvalue()

    flipped = bytearray(sound)
    flipped[len(sound) // 2] ^= 4
    contents = {"bit": bytes(flipped), "code": saved(images=code, names=names), "huge": huge(),
                "packed": saved(np.savez_compressed, images=zeros, names=names),
                "names": saved(images=zeros, names=np.arange(16))}  # fmt: skip
    put(cache, contents.get(kind, kind))
    assert torch.equal(loaded(small_omniglot), expected) and not mark.exists()
    assert cache.is_file() and not cache.is_symlink()


def test_a_drawing_that_changes_makes_another_cache_of_omniglot(small_omniglot):
    before = loaded(small_omniglot).clone()
    drawing = small_omniglot / "omniglot-py/images_background/A3/character01/0001_07.png"
    Image.new("1", (105, 105)).save(drawing)
    assert not torch.equal(loaded(small_omniglot), before)


def test_a_drawing_that_changes_while_omniglot_is_read_leaves_no_cache(small_omniglot, monkeypatch):
    drawing = small_omniglot / "omniglot-py/images_background/A3/character01/0001_07.png"
    read, before = omniglot._read, listing(small_omniglot)
    monkeypatch.setattr(omniglot, "_read", lambda *given: (read(*given), os.utime(drawing, ns=(1, 1)))[0])
    with pytest.raises(UsageError, match="has changed while it was read"):
        loaded(small_omniglot)
    assert listing(small_omniglot) == before


# ---- several processes ----------------------------------------------------------------------


def slowly(log: Path, stop_at: str = "") -> None:
    """Has each decoding take a while, and leave a line."""
    decode = images._decode

    def decoding(path, form):
        with log.open("a") as file:
            file.write(f"{path.name}\n")
        time.sleep(60 if path.name == stop_at else 0.02)
        return decode(path, form)

    images._decode = decoding


def load_and_tell(folder: Path, log: Path, start: Path, told: Path, stop_at: str = "") -> None:
    slowly(log, stop_at)
    while not start.exists():
        time.sleep(0.001)
    told.write_bytes(load_images(folder, **SMALL).pixels.numpy().tobytes())


@pytest.mark.skipif(not HAS_FORK, reason="needs fork")
@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("read_only", [False, True], ids=["beside", "user-cache"])
def test_of_processes_that_want_a_cache_one_builds_it_and_all_have_it(processes, read_only, tmp_path):
    write_classes(tmp_path / "data", 4, 5)
    (tmp_path / "data").chmod(0o555 if read_only else 0o755)
    fork = multiprocessing.get_context("fork")
    files = [tmp_path / f"told {number}" for number in range(processes)]
    started = [
        fork.Process(
            target=load_and_tell, args=(tmp_path / "data", tmp_path / "log", tmp_path / "start", file)
        )
        for file in files
    ]
    for process in started:
        process.start()
    (tmp_path / "start").touch()
    for process in started:
        process.join()
    (tmp_path / "data").chmod(0o755)
    assert [process.exitcode for process in started] == [0] * processes
    assert len((tmp_path / "log").read_text().splitlines()) == 20  # each image once
    expected = b"".join(bytes([10 * c + i]) * 36 for c in range(4) for i in range(5))
    assert all(file.read_bytes() == expected for file in files)
    assert not [name for name in listing(tmp_path) if name.endswith((".tmp", ".lock"))]


@pytest.mark.skipif(not HAS_FORK, reason="needs fork")
def test_a_builder_that_is_killed_leaves_nothing_that_stops_or_stays(tmp_path):
    write_classes(tmp_path / "data")
    arguments = tmp_path / "data", tmp_path / "log", tmp_path, tmp_path / "told", "002.png"
    process = multiprocessing.get_context("fork").Process(target=load_and_tell, args=arguments)
    process.start()
    while not (tmp_path / "log").exists() or "002.png" not in (tmp_path / "log").read_text():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert any(name.endswith(".tmp") for name in listing(tmp_path / "data"))
    os.utime(tmp_path / "data" / "c00" / "000.png", ns=(1, 1))  # it would have been another cache
    other = tmp_path / "data" / ".data-more-0123.npy.4567.tmp"  # of another folder, if it is the user's cache
    other.touch()
    load_images(tmp_path / "data", **SMALL)
    left = [path.name for path in (tmp_path / "data").glob(".*")]
    assert sorted(left)[1:] == [other.name] and left.count(other.name) == 1 and len(left) == 2


def test_a_lock_is_never_taken_by_two_though_it_goes_each_time(tmp_path):
    count, threads = tmp_path / "count", []
    count.write_text("0")
    script = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from common.locks import one_at_a_time
count = Path({str(count)!r})
for _ in range(30):
    with one_at_a_time(count.with_name("lock")) as sure:
        assert sure
        value = int(count.read_text())
        time.sleep(0.001)
        count.write_text(str(value + 1))
"""
    threads = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(3)]
    assert [process.wait() for process in threads] == [0, 0, 0]
    assert count.read_text() == "90" and listing(tmp_path) == ["count"]


def test_a_lock_whose_file_was_removed_just_before_it_was_had_is_taken_again(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")
    flock, calls = fcntl.flock, []

    def late(file: int, how: int) -> None:
        if not calls:
            (tmp_path / "lock").unlink()  # as whoever had it does
        calls.append(how)
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with one_at_a_time(tmp_path / "lock") as sure:
        assert sure and (tmp_path / "lock").exists()
    assert listing(tmp_path) == []


def test_a_lock_that_is_a_link_harms_nothing(tmp_path):
    (tmp_path / "precious").write_text("keep")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with one_at_a_time(tmp_path / "lock") as sure:
        assert not sure
    assert (tmp_path / "precious").read_text() == "keep" and (tmp_path / "lock").is_symlink()


def test_a_long_or_strange_folder_has_a_cache_too(tmp_path):
    folder = tmp_path / ("ä" * 120)
    write_classes(folder)
    load_images(folder, **SMALL)
    assert len(list(folder.glob(".*.npy"))) == 1
    assert caches.title_of(tmp_path / NASTY) == NASTY


# ---- tables ---------------------------------------------------------------------------------

ROW = b"task,x,y\na,1,1\n"
BAD_TABLES = {
    "infinite input": (ROW + b"a,1e400,1\n", "column 'x' is infinite in row 3"),
    "infinite target": (ROW + b"a,1,-1e400\n", "column 'y' is infinite in row 3"),
    "NUL": (ROW + b"a,1\0,1\n", r"column 'x' holds '1\\x00', not a number in row 3"),
    "escapes": (ROW + b"a,\x1b[2J,1\n", r"holds '\\x1b\[2J'"),
    "latin": (ROW + "é,1,1\n".encode("latin1"), "not readable as CSV"),
    "utf-16": (ROW.decode().encode("utf-16"), "not readable as CSV"),
    "huge number": (ROW + b"a," + b"9" * 3_500_000 + b",1\n", "a million bytes, or a quotation|infinite"),
    "long field": (ROW + b"a," + b"z" * 200_000 + b",1\n", "not a number in row 2 of the data"),
    "open quotation": (ROW + b'a,"1,1\n' + b"a,1,1\n" * 300_000, "not readable as CSV"),
    "ragged": (ROW + b"a,1\n", "not readable as CSV"),
    "long row": (ROW + b"a,1" + b",1" * 400_000, "columns in a line, more than 32,768"),
    "columns": (b"task,y" + b",a" * 40_000 + b"\na,1" + b",1" * 40_000, "40,002 columns in a line"),
    "header": (b"x" * 5_000_000, "a line has more than 4,194,304 characters"),
}


@pytest.mark.parametrize("case", BAD_TABLES)
@pytest.mark.parametrize("packed", [False, True], ids=["csv", "csv.gz"])
def test_a_hostile_csv_is_refused_in_one_line(case, packed, tmp_path):
    pytest.importorskip("pyarrow")
    content, message = BAD_TABLES[case]
    path = tmp_path / f"a.csv{'.gz' * packed}"
    path.write_bytes(gzip.compress(content, 1) if packed else content)
    with pytest.raises(UsageError, match=message) as raised:
        load_table(path, Columns(), classification=False)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_the_columns_of_a_line_are_counted_and_no_others(tmp_path):
    pytest.importorskip("pyarrow")
    lines = ["task,x,y", *(f"t{i % 3},{i},1" for i in range(200_000))]  # more than one piece
    for end in ("\n", "\r", "\r\n"):
        (tmp_path / "a.csv").write_bytes(end.join(lines).encode())
        assert load_table(tmp_path / "a.csv", Columns(), classification=False).x.sum() == 19999900000


def test_a_csv_that_unpacks_to_more_than_the_limit_is_not_unpacked_further(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.csv.gz"
    path.write_bytes(gzip.compress(ROW + b"a,1,1\n" * 5_000_000, 1))  # 30 MB
    monkeypatch.setattr(tables, "MOST_BYTES", 2**20)
    with memory_below(25), pytest.raises(UsageError, match=r"bytes, unpacked, more than 1,048,576"):
        load_table(path, Columns(), classification=False)
    monkeypatch.undo()
    monkeypatch.setattr(tables, "MOST_NAMES", 3)
    path = tmp_path / "b.csv"
    path.write_bytes(b"task,x,y\na,1,1\nb,1,1\nc,1,1\nd,1,1\n")
    with pytest.raises(UsageError, match="4 names in column 'task', more than 3"):
        load_table(path, Columns(), classification=False)


def test_a_parquet_that_repeats_a_text_a_million_times_takes_no_memory(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows, path = 200_000, tmp_path / "a.parquet"
    texts = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["z" * 100_000])
    parquet.write_table(
        pa.table({"task": texts, "x": [1.0] * rows, "y": [1.0] * rows}), path, store_schema=False
    )
    assert path.stat().st_size < 50_000  # and 20 GB in full
    before = pa.total_allocated_bytes()
    highest = []
    check = tables._check_size

    def watched(*given):
        highest.append(pa.total_allocated_bytes() - before)
        check(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "_check_size", watched)
        with pytest.raises(UsageError, match="bytes, unpacked, more than 2,147,483,648"):
            load_table(path, Columns(), classification=False)
    assert max(highest) < 100 * 2**20


def test_a_parquet_is_refused_for_what_it_says_about_its_size(tmp_path, monkeypatch):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pa.table({"task": ["a"] * 9, "x": [1.0] * 9, "y": [1.0] * 9}), path)
    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", lambda self: pytest.fail("it was read"))
    for name, most, message in (("MOST_CELLS", 26, "27 cells"), ("MOST_COLUMNS", 2, "3 columns"),
                                ("MOST_BYTES", 20, "bytes, more than 20")):  # fmt: skip
        with monkeypatch.context() as patch, pytest.raises(UsageError, match=message):
            patch.setattr(tables, name, most)
            load_table(path, Columns(), classification=False)


def test_whatever_is_in_a_parquet_it_is_read_or_refused(tmp_path):
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    offsets = [pa.py_buffer(np.array([0, 1, 2], np.int32)), pa.py_buffer(b"\xff\xfe")]
    columns = [
        pa.Array.from_buffers(pa.string(), 2, [None, *offsets]),  # no UTF-8
        pa.array([b"\xff", b"a"]), pa.nulls(2), pa.array([1, 2], pa.timestamp("us")), pa.array([[1], [2]]),
        pa.array([{"a": 1}] * 2), pa.array([[("a", 1)], []], pa.map_(pa.string(), pa.int64())),
        pa.array(["1", "2"], pa.large_string()), pa.array(["a", None]).dictionary_encode(),
        pa.array([2**64 - 1, 1], pa.uint64()), pa.array([1, 2], pa.duration("us")),
    ]  # fmt: skip
    path, refused = tmp_path / "a.parquet", 0
    for column in columns:
        for role in ("x", "y", "task", "split"):
            parquet.write_table(
                pa.table({"task": ["a", "b"], "x": [1.0, 2], "y": [1, 2]} | {role: column}), path
            )
            for classification in (False, True):
                try:
                    load_table(path, Columns(), classification=classification)
                except UsageError as error:
                    assert "\n" not in str(error)
                    refused += 1
    assert 40 < refused < 80
    parquet.write_table(pa.table({"task": ["a", "b"] * 50, "x": [1.0, 2] * 50, "y": [1, 2] * 50}), path)
    sound, draw, refused = path.read_bytes(), random.Random(0), 0
    for _ in range(60):
        damaged = bytearray(sound)
        for _ in range(3):
            damaged[draw.randrange(len(sound))] = draw.randrange(256)
        path.write_bytes(damaged if draw.random() < 0.7 else damaged[: draw.randrange(len(sound))])
        try:
            load_table(path, Columns(), classification=False)
        except UsageError:
            refused += 1
    assert refused > 20


# ---- compiled code --------------------------------------------------------------------------


@pytest.fixture
def private(cache_folder) -> Path:
    folder = cache_folder / "maml" / "compiled"
    assert compiler.cache_folder() == folder
    return folder


def test_libraries_lie_in_a_folder_that_is_the_users_alone(private, monkeypatch, tmp_path):
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    private.chmod(0o777)
    assert compiler.cache_folder() == private and stat.S_IMODE(private.stat().st_mode) == 0o700  # mended
    private.parent.chmod(0o777)
    assert compiler.cache_folder() is None  # anyone could put another folder there
    private.parent.chmod(0o1777)
    assert compiler.cache_folder() == private
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: private.stat().st_uid + 1)
        assert compiler.cache_folder() is None  # another's
    private.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o777)
    (tmp_path / "elsewhere").chmod(0o777)
    private.symlink_to(tmp_path / "elsewhere")
    assert compiler.cache_folder() is None
    assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o777  # nothing is changed behind a link


def test_a_library_that_others_may_write_is_not_loaded(private, monkeypatch):
    loads = []
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path, **_: loads.append(path) or loads_none
    )
    path = private / "a.pt2"
    path.write_bytes(b"code")
    compiler._digest_file(path).write_text(compiler._digest(path))
    path.chmod(0o620)
    assert compiler._kept(path, None) is None
    path.chmod(0o600)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    assert compiler._kept(path, None) is None and loads == []
    monkeypatch.undo()
    monkeypatch.setattr(
        torch._inductor, "aoti_load_package", lambda path, **_: loads.append(path) or loads_none
    )
    assert compiler._kept(path, None) is not None and loads == [str(path)]


class loads_none:  # noqa: N801 (stands for a package)
    class loader:  # noqa: N801
        boxed_run = None


def test_without_a_private_folder_code_lives_in_one_that_goes_at_once(private, monkeypatch):
    private.parent.chmod(0o777)
    places = []

    def build(self, graph, tensors, options, path):
        places.append(path.parent)
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700

    monkeypatch.setattr(compiler.Compiler, "_build", build)
    monkeypatch.setattr(compiler, "_kept", lambda *_: None)
    monkeypatch.setattr(compiler, "Library", lambda path, structure: lambda tensors: tensors)
    accelerate = compiler.Compiler(torch.device("cpu"))
    accelerate.active = True
    accelerate(lambda x: (x + 1,))(torch.ones(1))
    assert not accelerate.keeps and len(places) == 1 and not places[0].exists() and listing(private) == []


def test_inductors_own_cache_must_be_the_users_too(private, monkeypatch, tmp_path):
    scratch = tmp_path / "torchinductor"
    scratch.mkdir()
    scratch.chmod(0o777)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(scratch))
    accelerate = compiler.Compiler(torch.device("cpu"), folder=private)
    accelerate.active = True
    with pytest.raises(compiler.CompilationError, match="torchinductor is not this user's alone"):
        accelerate(lambda x: (x + 1,))(torch.ones(1))


def test_the_libraries_that_were_not_used_for_longest_go_first(private, monkeypatch):
    def put(count: int) -> None:
        for number in range(count):
            path = private / f"{number}.pt2"
            path.write_bytes(b"x" * 10)
            compiler._digest_file(path).touch()
            os.utime(path, (1000 + number, 1000 + number))

    put(6)
    os.utime(private / "1.pt2")  # just used
    monkeypatch.setattr(compiler, "MOST_LIBRARIES", 3)
    compiler.trim(private)
    assert listing(private) == [f"{n}.{kind}" for n in (1, 4, 5) for kind in ("pt2", "sha256")]
    put(6)
    monkeypatch.setattr(compiler, "MOST_BYTES", 25)
    compiler.trim(private)
    assert listing(private) == [f"{n}.{kind}" for n in (4, 5) for kind in ("pt2", "sha256")]
    monkeypatch.setattr(compiler, "MOST_BYTES", 5)
    compiler.trim(private)
    assert listing(private) == ["5.pt2", "5.sha256"]  # the one just built
    (private / "tmpdead" / "deep").mkdir(parents=True)
    (private / "tmpalive").mkdir()
    (private / "gone.lock").touch()
    for name in ("tmpdead", "gone.lock", "5.sha256"):
        os.utime(private / name, (1, 1))
    compiler.trim(private)
    assert listing(private) == ["5.pt2", "5.sha256", "tmpalive"]


# ---- what is written, and what is imported --------------------------------------------------


def test_nothing_is_imported_but_what_the_command_line_names(tmp_path):
    for name in (
        "numpy",
        "torch",
        "PIL",
        "pyarrow",
        "random",
        "csv",
        "config",
        "images",
        "tqdm",
        "sitecustomize",
    ):
        (tmp_path / f"{name}.py").write_text("import pathlib; pathlib.Path('code has run').touch()")
    (tmp_path / "mine.py").write_text(
        "def make():\n    import numpy, csv, PIL.Image, pyarrow.csv\n    raise ValueError('here')"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, ROOT / "main.py", "--dataset", "mine:make", "--device", "cpu", "--compile", "off"],
        cwd=tmp_path, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "ValueError: here" in done.stderr, done.stderr
    assert not (tmp_path / "code has run").exists()
