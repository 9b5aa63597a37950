"""Omniglot as an `ImageSet`, from torchvision's archives or from unpacked folders, and its two splits."""

from __future__ import annotations

import zipfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from common.errors import UsageError, one_line
from tasks.images import Form, ImageFile, ImageSet, image_set
from tasks.options import OMNIGLOT_CLASSES, OMNIGLOT_DRAWINGS
from tasks.published import fetch
from tasks.splits import shuffle

PARTS = {"images_background": 964, "images_evaluation": 659}  # characters in each


def open_omniglot(data_root: Path, form: Form, split: str) -> ImageSet:
    """Return Omniglot's 1,623 characters of 20 drawings each; fetch it if it is not in `data_root`.

    Args:
        split: "random" or "alphabet", see `split_characters`.

    Raises UsageError where the data is neither there nor to be fetched, or is damaged.
    """
    classes: dict[str, list[ImageFile]] = {}
    sources: list[Path] = []
    for part, characters in PARTS.items():
        place = _find_part(data_root, part)
        drawings = _list_drawings(place)
        files = defaultdict(list)  # of each character of this half
        for path, drawing in drawings.items():
            files[f"{part}/{path.rpartition('/')[0]}"].append(drawing)
        for name in files:
            if len(files[name]) != OMNIGLOT_DRAWINGS:
                raise UsageError(
                    f"{place}: {name} has {len(files[name])} drawings, not {OMNIGLOT_DRAWINGS}: fetch again"
                )
        if len(files) != characters:
            raise UsageError(f"{place} has {len(files)} characters, not {characters}: fetch it again")
        classes |= files
        sources += [place] if place.is_file() else [place / path for path in drawings]
    splits = split_characters(sorted(classes), split)
    return image_set(data_root / "omniglot-py", classes, splits, form, sources=sources, published=True)


def split_characters(names: Sequence[str], split: str) -> dict[str, list[str]]:
    """Return the characters for training, validation and test.

    "random": all characters shuffled once, 1,100 / 100 / 423. "alphabet": the background alphabets but for
    every sixth, which validates, and the evaluation alphabets for test.
    """
    if split == "random":
        shuffled = iter(shuffle(names, "omniglot split"))
        return {part: [next(shuffled) for _ in range(size)] for part, size in OMNIGLOT_CLASSES[split].items()}
    alphabets = sorted({name.rpartition("/")[0] for name in names})
    background = [alphabet for alphabet in alphabets if alphabet.startswith("images_background/")]
    part_of = dict.fromkeys(alphabets, "test") | dict.fromkeys(background, "train")
    part_of |= dict.fromkeys(background[5::6], "validation")
    return {
        part: [name for name in names if part_of[name.rpartition("/")[0]] == part]
        for part in ("train", "validation", "test")
    }


def _find_part(data_root: Path, part: str) -> Path:
    """Return the archive or the folder of one half; fetch it if neither is there."""
    folder = data_root / "omniglot-py"
    places = [folder / f"{part}.zip", folder / part]
    if not any(place.exists() for place in places):
        from torchvision.datasets import Omniglot  # slow to import, and needed once in a lifetime

        fetch(
            lambda: Omniglot(str(data_root), background=part == "images_background", download=True),
            f"Omniglot is not in {data_root}",
            "put images_background.zip and images_evaluation.zip, or the folders of these names, into "
            f"{folder}, or name another --data-root",
        )
    return next(place for place in places if place.exists())


def _list_drawings(place: Path) -> dict[str, ImageFile]:
    """Return the drawings of one half by their paths, `alphabet/character/drawing.png`, sorted."""
    if place.is_dir():
        return {file.relative_to(place).as_posix(): file for file in sorted(place.glob("*/*/*.png"))}
    try:
        archive = zipfile.ZipFile(place)
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(
            f"{place} is damaged ({one_line(error)}): remove it, and it is fetched again"
        ) from error
    prefix = f"{place.stem}/"
    names = [name for name in sorted(archive.namelist()) if name.startswith(prefix) and name.endswith(".png")]
    return {name.removeprefix(prefix): zipfile.Path(archive, name) for name in names}
