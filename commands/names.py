"""What may stand for a dataset, a learner, a loss and the like on the command line.

Each check takes a value and says what was expected, or None where it is all right (see flags.py). The
standard library alone.
"""

from __future__ import annotations

from commands.presets import DATA_KINDS, DATASETS, LEARNERS
from common.choices import AUGMENTATIONS, LOSSES


def _well_formed_code(name: str) -> bool:
    module, _, factory = name.rpartition(":")
    dotted = all(part.isidentifier() for part in module.split("."))
    return (dotted or module.endswith(".py")) and factory.isidentifier()


def a_dataset(name: str) -> str | None:
    kind, colon, rest = name.partition(":")
    if name in DATASETS or (kind in DATA_KINDS and rest):
        return None
    if colon and kind not in DATA_KINDS and _well_formed_code(name):
        return None
    kinds = "images:FOLDER, table:FILE, package.module:factory, file.py:factory"
    return f"one of {', '.join(DATASETS)}, {kinds}"


def a_learner(name: str) -> str | None:
    kind, colon, rest = name.partition(":")
    if name in LEARNERS or (kind == "torchvision" and rest):
        return None
    if colon and kind != "torchvision" and _well_formed_code(name):
        return None
    kinds = "torchvision:MODEL, package.module:factory, file.py:factory"
    return f"one of {', '.join(LEARNERS)}, {kinds}"


def a_loss(name: str) -> str | None:
    if name in LOSSES or (":" in name and _well_formed_code(name)):
        return None
    return f"one of {', '.join(LOSSES)}, package.module:function, file.py:function"


def column_names(text: str) -> str | None:
    return None if all(name.strip() for name in text.split(",")) else "names with commas between"


def augmentations(text: str) -> str | None:
    names = text.split(",")
    if set(names) <= set(AUGMENTATIONS) and len(set(names)) == len(names):
        return None
    return f"some of {', '.join(AUGMENTATIONS)}, with commas between"


def one_or_three(value: int) -> str | None:
    return None if value in (1, 3) else "1 or 3"


def three_shares(text: str) -> str | None:
    parts = text.split(",")
    whole = len(parts) == 3 and all(part.isdecimal() and len(part) < 10 for part in parts)
    if whole and int(parts[0]) and int(parts[2]):
        return None
    return "three whole numbers below 10^9 with commas between, the first and the last above 0"
