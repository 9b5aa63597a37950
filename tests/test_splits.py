"""Training, validation and test never meet, whatever the dataset, and a split depends on names alone."""

from itertools import chain, combinations

import pytest
import torch
from conftest import SHARES, build_tasks, write_classes

from common.batch import TaskDistribution
from common.random import SPLITS
from dataset import FAMILIES
from tasks.options import DATASETS, OMNIGLOT_CLASSES
from tasks.splits import published_splits, split_at_random

PUBLISHED = {
    "icons": [222, 48, 76],
    "cifar-fs": [64, 16, 20],
    "fc100": [60, 20, 20],
    "mini-imagenet": [64, 16, 20],
    "tiered-imagenet": [351, 97, 160],
}


def inputs_by_split(distribution: TaskDistribution, tasks: int = 400) -> dict[str, set[bytes]]:
    """Return the inputs of many tasks of each split."""
    inputs = {}
    for split in SPLITS:
        batch = distribution.sample(split, 0, 0, range(tasks))
        x = torch.cat([batch.support_x, batch.query_x], 1).flatten(0, 1)
        inputs[split] = {example.numpy().tobytes() for example in x}
    return inputs


def assert_apart(inputs: dict[str, set[bytes]]) -> None:
    for a, b in combinations(SPLITS, 2):
        assert inputs[a] and not inputs[a] & inputs[b], (a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_curves_of_different_splits_have_no_point_in_common(name):
    assert_apart(inputs_by_split(build_tasks(name, shots=5, queries=5), tasks=50))


@pytest.mark.parametrize("parts", [[""], ["train", "test"], ["train", "val", "test"]])
def test_images_of_different_splits_never_meet(tmp_path, parts):
    for number, part in enumerate(parts):
        write_classes(tmp_path / part, 12, prefix=f"{part}c", first=60 * number)
    distribution = build_tasks(f"images:{tmp_path}", ways=2)
    assert_apart(inputs_by_split(distribution))
    names = distribution.record.splits
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 12 * len(parts)


@pytest.mark.parametrize("split_column", [False, True])
def test_a_task_of_a_table_is_in_one_split_only(tmp_path, split_column):
    path = tmp_path / "a.csv"
    splits = ["train", "validation", "test"]
    rows = [f"{t},{4 * t + i},1{f',{splits[t % 3]}' * split_column}" for t in range(20) for i in range(4)]
    path.write_text("\n".join([f"task,x,y{',split' * split_column}", *rows]))
    distribution = build_tasks(f"table:{path}")
    assert_apart(inputs_by_split(distribution))
    names = distribution.record.splits
    assert distribution.record.inputs == ["x"] and len(set().union(*names.values())) == 20


@pytest.mark.parametrize("split", OMNIGLOT_CLASSES)
def test_real_omniglots_characters_never_meet(split, omniglot_root, shared_cache):
    form = dict(image_size=28, invert=True)
    distribution = build_tasks("omniglot", omniglot_root, ways=5, omniglot_split=split, **form)
    splits = distribution.images.splits
    assert {name: len(part) for name, part in splits.items()} == OMNIGLOT_CLASSES[split]
    assert sorted(torch.cat(list(splits.values())).tolist()) == list(range(1623))
    drawings = distribution.tensors["pixels"].view(1623, 20, 28, 28)
    pictures = {name: {drawings[c].numpy().tobytes() for c in part} for name, part in splits.items()}
    assert_apart(pictures)
    assert 0.05 < drawings.float().mean() / 255 < 0.12  # ink is 1 and paper is 0


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_splits_are_disjoint_and_of_the_published_sizes(name):
    splits = published_splits(name)
    assert [len(part) for part in splits.values()] == PUBLISHED[name]
    assert len(set().union(*splits.values())) == sum(PUBLISHED[name])


def test_every_dataset_has_its_test_here():
    assert {*FAMILIES, *PUBLISHED, "omniglot"} == set(DATASETS)


def test_a_random_split_depends_on_names_and_shares_alone():
    names = [f"class {c}" for c in range(25)]
    splits = split_at_random(names, SHARES)
    assert {split: len(part) for split, part in splits.items()} == {"train": 16, "validation": 4, "test": 5}
    assert sorted(chain(*splits.values())) == sorted(names)
    assert split_at_random(names[::-1], SHARES) == splits
    assert split_at_random([*names[1:], "another"], SHARES) != splits


@pytest.mark.parametrize("classes", [3, 4, 7])
def test_three_classes_suffice_for_three_splits(classes):
    splits = split_at_random("abcdefg"[:classes], {"train": 98, "validation": 1, "test": 1})
    assert all(splits.values()) and sum(map(len, splits.values())) == classes
    assert split_at_random("abc", {"train": 1, "validation": 0, "test": 1})["validation"] == []


def test_all_classes_are_for_test_without_training(tmp_path):
    write_classes(tmp_path, 6)
    names = build_tasks(f"images:{tmp_path}", ways=2, for_test=True).record.splits
    assert (names["train"], names["validation"], len(names["test"])) == ([], [], 6)
