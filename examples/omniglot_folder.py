#!/usr/bin/env python3
"""Unpack Omniglot into a folder of images with the class lists of `--dataset omniglot`, for `images:FOLDER`.

python examples/omniglot_folder.py data omniglot-folder
"""

from __future__ import annotations

import argparse
import sys
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tasks.published import PARTS, split_characters


def write_folder(data_root: Path, folder: Path) -> None:
    """Write `folder/images_*/<alphabet>/<character>/*.png`, and train.csv, val.csv and test.csv."""
    for part in PARTS:
        zipfile.ZipFile(data_root / "omniglot-py" / f"{part}.zip").extractall(folder)
    names = sorted({path.parent.relative_to(folder).as_posix() for path in folder.glob("images_*/*/*/*.png")})
    for split, characters in split_characters(names, "random").items():
        rows = [
            f"{path.name},{name}" for name in characters for path in sorted((folder / name).glob("*.png"))
        ]
        name = "val" if split == "validation" else split
        (folder / f"{name}.csv").write_text("\n".join(["filename,label", *rows]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_root", type=Path, help="the folder that holds omniglot-py")
    parser.add_argument("folder", type=Path, help="where the images go")
    options = parser.parse_args()
    try:
        write_folder(options.data_root, options.folder)
    except (OSError, zipfile.BadZipFile) as error:
        parser.error(f"Omniglot is missing or damaged: {error}")
