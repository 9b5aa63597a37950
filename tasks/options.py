"""Declare the options of tasks, and the facts about datasets that flags need. The standard library alone."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from common.names import AND, check_code_name, parse_name, split_mixture
from common.options import (
    BY_DATASET,
    at_least,
    expect,
    flag,
    key_and_value,
    list_names,
    not_negative,
    sizes_from,
)
from common.sizes import Size

CURVES = ("sinusoid", "sinusoid-frequency", "sinusoid-line", "harmonic")
AUGMENTATIONS = ("flip", "crop", "rotate")
OMNIGLOT_DRAWINGS = 20  # of each character
OMNIGLOT_CLASSES = {  # characters in each split
    "random": {"train": 1100, "validation": 100, "test": 423},
    "alphabet": {"train": 806, "validation": 158, "test": 659},
}
ICON_DRAWINGS = {"concept": 20, "designer": 6}  # of each concept at least, by split


@dataclass(frozen=True)
class DataFacts:
    """Facts about a dataset that decide which flags fit it and what their defaults are."""

    inputs: str  # "vectors", "images", or "any"
    classification: bool | None  # None: classification where -n is given
    image_size: int | None = None  # default height and width, in pixels
    channels: int | None = None
    invert: bool = False  # default of --invert: ink on paper


DATASETS = {name: DataFacts("vectors", False) for name in CURVES} | {
    "omniglot": DataFacts("images", True, 28, 1, invert=True),
    "icons": DataFacts("images", True, 28, 1, invert=True),
    "cifar-fs": DataFacts("images", True, 32, 3),
    "fc100": DataFacts("images", True, 32, 3),
    "mini-imagenet": DataFacts("images", True, 84, 3),
    "tiered-imagenet": DataFacts("images", True, 84, 3),
}
FILE_KINDS = {  # prefixes of a path
    "images": DataFacts("images", True, 84, 3),
    "table": DataFacts("vectors", None),
}


def find_data_facts(dataset: str) -> DataFacts:
    """Return the facts of a dataset by its name or by the prefix of its path.

    Those of several are what they share: sizes that differ are None.
    """
    kind, source, _ = parse_name(dataset)
    if kind != "mixture":
        return FILE_KINDS.get(kind, DataFacts("any", None)) if kind else DATASETS[source]
    facts = [find_data_facts(name) for name in split_mixture(dataset)]
    sizes, channels = ({getattr(part, name) for part in facts} for name in ("image_size", "channels"))
    return replace(
        facts[0],
        image_size=sizes.pop() if len(sizes) == 1 else None,
        channels=channels.pop() if len(channels) == 1 else None,
        invert=all(part.invert for part in facts),
    )


def is_classification(dataset: str, ways: Size | None) -> bool:
    """Return whether targets are classes: as the dataset says or, where it may be either, if -n is given."""
    classification = find_data_facts(dataset).classification
    return ways is not None if classification is None else classification


examples = sizes_from(1, 100_000)  # of a task, or of each of its classes


def check_dataset(name: str) -> str | None:
    kind, path, _ = parse_name(name)
    if name in DATASETS or (kind in FILE_KINDS and path):
        return None
    for prefix, exists in (("images", os.path.isdir), ("table", os.path.isfile)):
        if name and kind == "" and exists(name):
            return f"{prefix}:{name} for the data there"
    return check_code_name(name, f"{list_names(DATASETS)}, images:FOLDER, table:FILE")


def check_datasets(names: str) -> str | None:
    """Return what was expected of one or several datasets; None if they are valid and go together."""
    parts = split_mixture(names)
    if problem := next(filter(None, map(check_dataset, parts)), None):
        return problem
    curves, images = {*parts} <= {*CURVES}, {find_data_facts(name).inputs for name in parts} == {"images"}
    if len(parts) > 1 and not (curves or images):
        return f"several data sets to be curves ({list_names(CURVES)}), or to be images"
    return None if len({*parts}) == len(parts) else "each data set once: weights are those of --mix"


WEIGHT = r"\d{1,9}(\.\d{1,9})?"
check_mix = expect(
    "numbers above 0 with commas between",
    lambda text: re.fullmatch(f"{WEIGHT}(,{WEIGHT})*", text) and all(map(float, text.split(","))),
)
check_columns = expect(
    "task=NAME, class=NAME, target=NAMES or input=NAMES, with commas between names",
    re.compile("((task|class)=[^,]+)|((target|input)=[^,]+(,[^,]+)*)").fullmatch,
)


def parse_roles(pairs: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Return the names of `task=NAME`, `target=NAME,...`, `input=NAME,...` or `class=NAME` by role."""
    roles = (pair.split("=", 1) for pair in pairs)
    return {role: tuple(map(str.strip, names.split(","))) for role, names in roles}


check_names = expect("names with commas between", re.compile("[^,]+(,[^,]+)*").fullmatch)
check_augmentations = expect(
    f"some of {', '.join(AUGMENTATIONS)}, with commas between",
    lambda text: {*text.split(",")} <= {*AUGMENTATIONS},
)
check_channels = expect("1 or 3", lambda value: value in (1, 3))
check_shares = expect(
    "three whole numbers with commas between, the first and the last above 0",
    re.compile(r"[1-9]\d{0,8},\d{1,9},[1-9]\d{0,8}").fullmatch,
)


def parse_range(text: str) -> tuple[float, float]:
    """Return the two numbers of `--image-range LOW,HIGH`; ValueError if it has others."""
    low, high = map(float, text.split(","))
    return low, high


def is_range(text: str) -> bool:
    try:
        low, high = parse_range(text)
    except ValueError:
        return False
    return -math.inf < low < high < math.inf


check_range = expect("two numbers, LOW,HIGH, the first below the second", is_range)


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Options that choose the dataset and the size of its tasks."""

    # fmt: off
    dataset: str = flag(
        "--dataset", group="tasks", check=check_datasets, default="sinusoid", metavar="NAME", common=True,
        suggestions=tuple(DATASETS), joint=AND,
        help=f"{', '.join(DATASETS)}, images:FOLDER, table:FILE, or file.py:factory; FOLDER has a folder per "
        "class, FILE is CSV or Parquet, and package.module:factory is your own code too; several names, of "
        "curves or of images: each task comes from one of them")
    mix: str | None = flag(
        "--mix", group="tasks", check=check_mix, metavar="A,B,...", default=None, only="mixture",
        help="weights of several data sets: how often a training task comes from each (default: equal)")
    dataset_args: tuple[str, ...] = flag(
        "--dataset-args", group="tasks", check=key_and_value, metavar="NAME=VALUE", default=(),
        only="own data", help="arguments of your own dataset's factory")
    ways: Size | None = flag(
        "-n", group="tasks", check=sizes_from(2), metavar="WAYS", only="classification", common=True,
        help="classes per task; makes a table or your own dataset a classification")
    shots: Size = flag("-k", group="tasks", check=examples, metavar="SHOTS", free_on_eval=True, common=True,
        help="support examples per task; in classification, per class; from a range such as 1-10, as with -n "
        "and -q, each task draws its own number")
    queries: Size = flag(
        "-q", group="tasks", check=examples, metavar="QUERIES", free_on_eval=True, common=True,
        help="query examples per task; in classification, per class")
    train_shots: Size | None = flag(
        "--train-shots", group="tasks", check=examples, metavar="SHOTS", default=None,
        help="support examples of a training task, if not -k; for the Reptile meta-gradient all of its "
        "examples, query included (default k + q)")
    noise: float = flag(
        "--noise", group="tasks", check=not_negative, metavar="STD", only="curves", default=0.0,
        help="standard deviation of Gaussian noise on the targets")
    oracle: bool = flag("--oracle", group="tasks", default=False, only="a curve",
        help="a baseline: the task's parameters (amplitude, phase, ...) join the inputs")
    omniglot_split: str = flag(
        "--omniglot-split", group="tasks", choices=tuple(OMNIGLOT_CLASSES), only="omniglot", default="random",
        help="random: 1,100 / 100 / 423 characters for training, validation and test; alphabet: the original "
        "background and evaluation alphabets (806 / 158 / 659)")
    icons_split: str = flag(
        "--icons-split", group="tasks", choices=tuple(ICON_DRAWINGS), only="icons", default="concept",
        help="concept: the published concepts for training, validation and test; designer: each of these "
        "splits has its own designers, too")
    resize: str = flag(
        "--resize", group="tasks", choices=("lanczos", "nearest"), only="any images", default="lanczos",
        help="resampling of images; nearest is what the paper's script does to Omniglot")
    image_size: int | None = flag(
        "--image-size", group="tasks", check=at_least(1), metavar="PIXELS", only="images", default=BY_DATASET,
        help="height and width of images (default: 84; omniglot and icons 28; cifar-fs and fc100 32)")
    channels: int | None = flag(
        "--channels", group="tasks", check=check_channels, metavar="{1,3}", only="images", default=BY_DATASET,
        help="1: grey images; 3: colour (default: 3; omniglot and icons 1)")
    image_range: str | None = flag(
        "--image-range", group="tasks", check=check_range, metavar="LOW,HIGH", default=None, only="images",
        help="values of image files that are black and white; others are cut off (default: the range of 8 "
        "bits, or what the files say: docs/data.md)")
    invert: bool = flag("--invert", group="tasks", default=BY_DATASET, only="any images",
        help="exchange black and white, so that ink on paper is 1 (default: no; omniglot and icons yes)")
    quarter_turns: bool = flag("--quarter-turns", group="tasks", default=False, only="images",
        help="turn each class of a task by a random multiple of 90 degrees, in every split, as with Omniglot")
    augment: str | None = flag(
        "--augment", group="tasks", check=check_augmentations, metavar="NAMES", default=None, only="images",
        help="random changes of training images: some of flip, crop, rotate, with commas between")
    split_shares: str = flag(
        "--split-shares", group="tasks", check=check_shares, metavar="A,B,C", default="64,16,20",
        only="files", help="shares of training, validation and test among the classes of a folder or the "
        "tasks of a table without a split of its own")
    min_examples: int = flag(
        "--min-examples", group="tasks", check=at_least(0), metavar="N", default=0, only="files",
        help="leave out classes, and tasks of a table, with fewer examples")
    columns: tuple[str, ...] = flag(
        "--columns", group="tasks", check=check_columns, metavar="ROLE=NAMES", only="files", default=(),
        help="columns of a table by role: task=NAME target=NAMES input=NAMES (default task=task target=y, "
        "and all others but `split` as inputs); class=NAME: tasks are made of a column's classes; for "
        "images in Parquet files: input=NAME class=NAME")
    exclude_columns: str | None = flag(
        "--exclude-columns", group="tasks", check=check_names, metavar="NAMES", default=None, only="table",
        help="columns of a table that are no inputs, with commas between")
    standardise: bool = flag("--standardise", group="tasks", default=True, only="table",
        help="subtract the mean of each input of a table, and of each target with mse, huber or "
        "gaussian-nll, and divide by the standard deviation, both of the training rows")
    # fmt: on

    @property
    def facts(self) -> DataFacts:
        return find_data_facts(self.dataset)

    @property
    def datasets(self) -> tuple[str, ...]:
        """Return the names of the data sets, of which there may be several."""
        return split_mixture(self.dataset)

    @property
    def weights(self) -> tuple[float, ...]:
        return tuple(map(float, self.mix.split(","))) if self.mix else (1.0,) * len(self.datasets)

    def of(self, name: str) -> TaskOptions:
        """Return the options of one of several data sets; where defaults of --invert differ, with its own."""
        defaults = {other: find_data_facts(other).invert for other in self.datasets}
        invert = defaults[name] if len({*defaults.values()}) > 1 else self.invert
        return replace(self, dataset=name, mix=None, invert=invert)

    @property
    def black_and_white(self) -> tuple[float, float] | None:
        """Return --image-range as numbers."""
        return parse_range(self.image_range) if self.image_range else None

    @property
    def classification(self) -> bool:
        return is_classification(self.dataset, self.ways)
