"""Split classes, or the tasks of a table, into training, validation and test; refuse overlaps.

`splits/` holds the published classes; Omniglot's split is computed in `published.py`. Any other split is a
function of names and shares, not of the seed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.errors import UsageError
from common.random import SPLITS, Stream

PUBLISHED = Path(__file__).parent / "splits"
RELATED = {  # benchmarks by the images that they divide
    **dict.fromkeys(("cifar-fs", "fc100"), "CIFAR-100"),
    **dict.fromkeys(("mini-imagenet", "tiered-imagenet"), "ImageNet"),
}
PLAIN_WORDS = dict.fromkeys(("train", "training"), "train") | dict.fromkeys(("test", "testing"), "test")
PLAIN_WORDS |= dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
# These may be classes, too: they say a split only together with another one.
SPLIT_WORDS = PLAIN_WORDS | dict.fromkeys(("base", "background", "seen"), "train")
SPLIT_WORDS |= dict.fromkeys(("novel", "evaluation", "unseen"), "test")
# Several such names are parts of a split, of which kind nobody knows.
PARTS = "tr|trn|train.*|va|vl|vald.*|valid.*|te|ts|tst|test.*|eval.*|holdout|folds?|split|cv"
PARTS += "|support|quer(y|ies)|gallery"
FILLERS = {"meta", "set", "data", "images", "image", "imgs", "img", "classes", "class", "split"}


def _split_words(name: str) -> list[str]:
    """Return the words of a name in lower case: of metatrain and trainset, "train"."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return [re.sub("^meta(?=.)|(?<=.)set$", "", word.lower()) for word in words]


def parse_split(name: str) -> str | None:
    """Return the split that a folder or list is named after: Train, val2017, meta-test, images_background."""
    words = [word for word in _split_words(name) if word not in FILLERS]
    return SPLIT_WORDS.get(words[0]) if len(words) == 1 else None


def is_plain(name: str) -> bool:
    """Return whether a name says a split by itself: train or images_background, but not base."""
    words = {*_split_words(name)}
    return parse_split(name) is not None and bool(words & {*PLAIN_WORDS} or words & FILLERS)


def find_part(name: str) -> str | None:
    """Return the split that a name says or mentions, as trial_test_2, or the name if it is like a part's."""
    words = _split_words(name)
    mentioned = next((PLAIN_WORDS[word] for word in words if word in PLAIN_WORDS), None)
    is_part = any(re.fullmatch(PARTS, word) for word in words)
    return parse_split(name) or mentioned or (name if is_part else None)


def shuffle(names: Iterable[str], purpose: str) -> list[str]:
    """Return the names in a random order that depends on the set of names and on the purpose alone."""
    ordered = sorted(names)
    stream = Stream.from_seed(0).at(purpose).at(torch.zeros(1, dtype=torch.int64))
    return [ordered[position] for position in stream.distinct(len(ordered), len(ordered))[0].tolist()]


def split_at_random(names: Collection[str], shares: Mapping[str, int]) -> dict[str, list[str]]:
    """Split the names at random in proportion to the shares, `{"train": 64, ...}`; each part is sorted.

    Sizes are by largest remainder, and 0 only for a share of 0, if there are enough names.
    """
    shuffled, total = iter(shuffle(names, "class split")), len(names)
    exact = {split: total * share / sum(shares.values()) for split, share in shares.items()}
    sizes = {split: int(size) for split, size in exact.items()}
    by_remainder = sorted(shares, key=lambda split: sizes[split] - exact[split])
    for split in by_remainder[: total - sum(sizes.values())]:
        sizes[split] += 1
    for split, share in shares.items():
        if share and not sizes[split] and total >= len(shares):
            sizes[max(sizes, key=sizes.__getitem__)] -= 1
            sizes[split] = 1
    return {split: sorted(next(shuffled) for _ in range(size)) for split, size in sizes.items()}


def read_published(name: str) -> dict[str, Any]:
    """Return what the file of a benchmark holds: its classes by split, their source, and more."""
    return json.loads((PUBLISHED / f"{name}.json").read_text(encoding="utf-8"))


def published_splits(name: str) -> dict[str, list[str]]:
    """Return the class names of each split of a benchmark, as its paper has them."""
    content = read_published(name)
    return {split: content[split] for split in SPLITS}


def find_seen(trained: str, tested: str, *splits: str) -> list[str]:
    """Return the classes of a benchmark's splits that another one of the same images trains on."""
    images = RELATED.get(trained)
    if trained == tested or images is None or images != RELATED.get(tested):
        return []
    now = published_splits(tested)
    return sorted({*published_splits(trained)["train"]} & {*chain(*(now[split] for split in splits))})


def check_unseen(trained: Iterable[str], tested: Iterable[str], source: str, *splits: str) -> None:
    """Raise UsageError, which names the source, where a benchmark trains on classes of another's splits."""
    for name, other in product(trained, tested):
        if seen := find_seen(name, other, *splits):
            words = f"{name} trains on {len(seen)} of the {' and '.join(splits)} classes of {other}"
            raise UsageError(f"{source}: {words}, such as {seen[0]}: take another data set")


def divide_classes(
    groups: Mapping[str, Mapping[str, Collection[Any]]],
    shares: Mapping[str, int],
    place: str,
    source: str,
    min_examples: int,
) -> tuple[dict[str, list[str]], str, list[str]]:
    """Split classes as their parts are, or at random where these are one, or all have the same classes.

    Validation classes come out of the training classes if there are none. Returns the names of each split's
    classes, where the split comes from, and lines on what was left out or changed.

    Args:
        groups: the images of each class of each part, "train", "validation", "test" or "all".
        shares: of each split; for training 0 where all classes may be for test.
        source: the names of the parts, for messages.
    """
    notes: list[str] = []
    counts = {split: Counter({n: len(group[n]) for n in group}) for split, group in groups.items()}
    parts = [*counts.values()]
    if len(parts) > 1 and all(part.keys() == parts[0].keys() for part in parts):
        notes = [f"{source} have the same classes: put together, since tests are on other classes"]
        counts = {"all": sum(parts, Counter())}
    check_disjoint(counts, place)
    splits = {s: [n for n in part if part[n] >= min_examples] for s, part in counts.items()}
    if small := sum(map(len, counts.values())) - sum(map(len, splits.values())):
        notes.append(f"left out: {small:,} classes with fewer than {min_examples:,} images")
    if not any(splits.values()):
        raise UsageError(f"--min-examples {min_examples} leaves no classes: lower it")
    if "all" in splits:
        numbers = ",".join(map(str, shares.values()))
        source = f"a fixed shuffle of the classes, --split-shares {numbers}"
        source = source if shares["train"] else "none in the folder, all classes are for test"
        splits = split_at_random(splits["all"], shares)
    elif "train" not in splits and shares["train"]:
        raise UsageError(f"{place} has {source} and no training classes: name a folder, list or file train")
    elif "validation" not in splits and shares["train"]:
        splits |= split_at_random(splits["train"], {name: shares[name] for name in ("train", "validation")})
        source += ", validation classes drawn from those for training"
    return splits, source, notes


def check_disjoint(splits: Mapping[str, Iterable[str]], source: str) -> None:
    """Raise a UsageError that names the source if a name is in two splits, or twice in one."""
    split_by_name: dict[str, str] = {}
    for split, members in splits.items():
        for name in members:
            if name in split_by_name:
                other = split_by_name[name]
                where = f"in {other} and in {split}" if other != split else f"twice in {split}"
                raise UsageError(f"{source}: {name} is {where}: leave it once")
            split_by_name[name] = split


def as_positions(splits: Mapping[str, Iterable[str]], names: Sequence[str]) -> dict[str, Tensor]:
    """Return the positions of each split's members in `names`, int64; a missing split is empty."""
    position = {name: number for number, name in enumerate(names)}
    members = {split: [position[name] for name in splits.get(split, ())] for split in SPLITS}
    return {split: torch.tensor(part, dtype=torch.int64) for split, part in members.items()}
