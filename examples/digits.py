#!/usr/bin/env python3
"""Write scikit-learn's handwritten digits as images, one folder per class: a data set to test on.

pip install scikit-learn
python examples/digits.py digits
python main.py --eval --load checkpoints/RUN/best.pt --eval-dataset images:digits -q 10
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits


def write_digits(folder: Path) -> None:
    """Write 1,797 images, 8 x 8, white on black, as `folder/<digit>/<number>.png`."""
    digits = load_digits()
    for number, (pixels, digit) in enumerate(zip(digits.images, digits.target, strict=True)):
        path = folder / str(digit) / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where the images go")
    write_digits(parser.parse_args().folder)
