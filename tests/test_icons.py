"""Icons: a package is drawn to the same bytes, one concept a class, and splits by concept and designer."""

import json
import os
import shutil
import sys
import tarfile
from itertools import chain, combinations
from pathlib import Path

import icons
import numpy as np
import pytest
from conftest import class_names, refused

from common.random import SPLITS
from tasks.options import ICON_DRAWINGS
from tasks.pixels import Form
from tasks.published import open_benchmark
from tasks.splits import read_published

INK_IS_ONE = Form(28, 1, invert=True)
DOT, RING = '<circle cx="8" cy="8" r="6"/>', '<circle cx="8" cy="8" r="6" fill="none" stroke="currentColor"/>'
BAR, TALL = '<path d="M2 6h12v4H2z"/>', '<path d="M5 1h6v14H5z"/>'
CROSS, WEDGE = '<path d="M7 1h2v6h6v2H9v6H7V9H1V7h6z"/>', '<path d="M2 2h12L8 14z"/>'
SETS = {  # of each designer: the name of an icon -> its drawing
    "aa": {"dot": DOT, "dot-fill": WEDGE, "bar-outline": BAR, "cross": "", "more": WEDGE},
    "bb": {"spot": RING, "bar": TALL, "cross": CROSS, "plus": WEDGE},
    "cc": {"dot": DOT.replace("6", "6.1"), "bar-24-solid": TALL.replace("1h", "8h"), "cross": WEDGE},
    "dd": {"dot-o": RING.replace("6", "3"), "spot": WEDGE, "bar": BAR, "cross": BAR},
}
FACTS = {
    "source": "made up",
    "version": "1.0.0",
    "digest": "eb72005f70c23bb8062b15b1c0f8f3cfefd0636b3fd094aecdd68892a008804a",
    "train": ["dot"],
    "validation": ["bar"],
    "test": ["cross"],
    "synonyms": {"spot": "dot", "plus": "cross"},
    "designers": {"train": ["aa", "dd"], "validation": ["bb"], "test": ["cc"]},
}


def write_package(folder: Path, version: str = "1.0.0", licence: str = "MIT") -> Path:
    (folder / "json").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "@iconify/json", "version": version}))
    for name, drawn in SETS.items():
        info = {"name": name.upper(), "palette": False, "author": {"name": f"Designer of {name}"}}
        info["license"] = {"spdx": licence, "url": "https://example.org/licence"}
        bodies = {icon: {"body": body} for icon, body in drawn.items()}
        content = {"prefix": name, "info": info, "icons": bodies, "width": 16, "height": 16}
        (folder / "json" / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """Write a package of four sets, and the published facts about it."""
    pytest.importorskip("resvg_py")
    monkeypatch.setattr("tasks.splits.PUBLISHED", tmp_path)
    monkeypatch.setattr("tasks.published.ICON_DRAWINGS", {"concept": 2, "designer": 1})
    (tmp_path / "icons.json").write_text(json.dumps(FACTS))
    return write_package(tmp_path / "package")


def draw(root: Path, *arguments: object) -> int:
    return icons.main(["--data-root", str(root), *map(str, arguments)])


def test_a_package_is_drawn_to_the_same_bytes(package, tmp_path, capsys):
    for root in (tmp_path / "one", tmp_path / "two"):
        assert draw(root, "--package", package) == 0
        assert f"digest {FACTS['digest']}" in capsys.readouterr().out
    files = {path.name for path in (tmp_path / "one" / "icons").iterdir() if path.name[0] != "."}
    assert files == {"icons.npz", "sheet.png", "LICENCES.md"}
    for name in files:
        first, second = ((tmp_path / root / "icons" / name).read_bytes() for root in ("one", "two"))
        assert first == second, name
    credit = "| aa | AA | Designer of aa | [MIT](https://example.org/licence) |"
    assert credit in (tmp_path / "one" / "icons" / "LICENCES.md").read_text()


def test_a_designer_draws_a_concept_once_and_nothing_blank_repeated_or_ambiguous(package):
    """Leave out aa's blank cross, cc's dot, nearly aa's, dd's bar, which is aa's, and both for dd's cross."""
    drawn = icons.draw_icons(package, FACTS)
    assert list(zip(drawn.concepts, drawn.sets, strict=True)) == [
        *(("bar", "bb"), ("bar", "cc"), ("cross", "bb"), ("cross", "cc")),
        *(("dot", "aa"), ("dot", "bb"), ("dot", "dd")),
    ]
    tall, ring = drawn.pixels[0], drawn.pixels[5]
    assert tall.dtype == np.uint8 and tall[14, 14] == 0 and tall[14, 2] == 255  # ink is black
    assert ring[14, 14] == 255 and ring[14, 3] < 128  # bb's dot is its only one, under a synonym
    assert drawn.pixels[6, 14, 3] == 255 and drawn.pixels[6, 14, 9] < 128  # dd's dot-o comes before its spot


def put_npm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put an npm of that shell script in front of the path."""
    npm = tmp_path / "bin" / "npm"
    npm.parent.mkdir(parents=True)
    npm.write_text(f"#!/bin/sh\n{script}\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{npm.parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.skipif(sys.platform == "win32", reason="npm is a shell script here")
def test_npm_fetches_the_published_version(package, tmp_path, monkeypatch, capsys):
    with tarfile.open(tmp_path / "made-up.tgz", "w:gz") as archive:
        archive.add(package, "package")
    put_npm(tmp_path, monkeypatch, f'[ "$2" = @iconify/json@1.0.0 ] && cp {tmp_path}/made-up.tgz "$4"')
    assert draw(tmp_path / "data") == 0 and FACTS["digest"] in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["icons"]  # the package is gone
    put_npm(tmp_path / "none", monkeypatch, "echo npm error code ENOTFOUND >&2; exit 1")
    assert draw(tmp_path / "data") == 2
    assert "npm cannot fetch @iconify/json@1.0.0 (ENOTFOUND): " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no npm", "npm is missing: install Node.js, or unpack @iconify/json@1.0.0"),
        ("no resvg", "resvg-py is missing: pip install resvg-py=="),
        ("another version", "holds @iconify/json 2.0.0: the published split needs @iconify/json 1.0.0"),
        ("another licence", "aa is not in one colour, or not under MIT, "),
        (
            "another drawing",
            f"the digest of the published split is {FACTS['digest']}: the package or resvg-py",
        ),
    ],
)
def test_what_is_missing_or_changed_is_one_line(change, message, package, tmp_path, monkeypatch, capsys):
    shutil.rmtree(package)
    if change == "another drawing":
        monkeypatch.setitem(SETS["cc"], "cross", TALL.replace("7", "8"))
    version = "2.0.0" if change == "another version" else "1.0.0"
    write_package(package, version, "GPL-3.0" if change == "another licence" else "MIT")
    if change == "no resvg":
        monkeypatch.setitem(sys.modules, "resvg_py", None)
    monkeypatch.setattr(icons.shutil, "which", lambda name: None)
    assert draw(tmp_path / "data", *([] if change == "no npm" else ["--package", package])) == 2
    error = capsys.readouterr().err.rpartition("\r")[2].splitlines()[-1]
    assert error.startswith("icons.py: error: ") and message in error
    assert not (tmp_path / "data").exists()


def test_both_splits_keep_concepts_apart_and_one_keeps_designers_apart(package, tmp_path):
    assert draw(tmp_path, "--package", package) == 0
    whole, parts = (open_benchmark("icons", tmp_path, INK_IS_ONE, icons_split=s) for s in ICON_DRAWINGS)
    assert class_names(whole) == {"train": ["dot"], "validation": ["bar"], "test": ["cross"]}
    assert class_names(parts) == class_names(whole)
    assert [*whole.count] == [2, 2, 3] and [*parts.count] == [1, 1, 2]  # bar, cross, dot
    assert "split: --icons-split designer" in parts.summary[0]
    drawn = icons.draw_icons(package, FACTS).pixels
    assert np.array_equal(whole.load()[:, 0], 255 - drawn)
    assert np.array_equal(parts.load()[:, 0], 255 - drawn[[0, 3, 4, 6]])


def test_missing_and_other_drawings_are_one_line(package, tmp_path):
    with refused(r"there is no .*icons.npz: python examples/icons.py --data-root .* draws it"):
        open_benchmark("icons", tmp_path, INK_IS_ONE)
    assert draw(tmp_path, "--package", package) == 0
    (tmp_path / "icons.json").write_text(json.dumps(FACTS | {"test": ["crossing"]}))
    with refused("has other concepts than the published ones"):
        open_benchmark("icons", tmp_path, INK_IS_ONE)


def test_the_published_designers_and_synonyms_are_in_one_place_each():
    facts = read_published("icons")
    concepts = [*chain(*(facts[split] for split in SPLITS))]
    designers = [*chain(*(facts["designers"][split] for split in SPLITS))]
    assert len({*designers}) == len(designers) == 113 and len({*concepts}) == len(concepts)
    assert not facts["synonyms"].keys() & {*concepts} and {*facts["synonyms"].values()} <= {*concepts}
    assert not any(icons.VARIANT.search(name) for name in (*concepts, *facts["synonyms"]))


# ---- the real package ----------------------------------------------------------------------------


@pytest.mark.slow
def test_the_real_icons_are_the_published_ones_and_never_meet(icons_root):
    """The fixture draws them where they are not yet: examples/icons.py compares their digest."""
    rows = (icons_root / "icons" / "LICENCES.md").read_text().splitlines()[4:]
    author_of = {row.split(" | ")[0].strip("| "): row.split(" | ")[2] for row in rows}
    designers = read_published("icons")["designers"]
    for a, b in combinations(SPLITS, 2):
        assert not {author_of[name] for name in designers[a]} & {author_of[name] for name in designers[b]}
    for split, least in ICON_DRAWINGS.items():
        images = open_benchmark("icons", icons_root, INK_IS_ONE, icons_split=split)
        assert images.count.min() >= least
        drawings = images.load().split(images.count.tolist())
        pictures = {
            part: {image.numpy().tobytes() for c in classes.tolist() for image in drawings[c]}
            for part, classes in images.splits.items()
        }
        assert sum(map(len, pictures.values())) == len(set().union(*pictures.values())) == images.count.sum()
