"""Paired differences: on the same tasks, by seed, without diverged tasks."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from evaluation import paired, style
from evaluation.figures import comparison_figure
from evaluation.meta_test import Evaluation
from evaluation.paired import Difference, Side
from evaluation.tables import Caption


def side(name: str, *losses: Tensor, **settings: str) -> Side:
    """Make a side with one seed for each tensor of losses `[tasks, steps + 1]`, quoted after one step."""
    evaluations = {
        seed: Evaluation({"loss": {"transductive": loss.double()}}) for seed, loss in enumerate(losses)
    }
    curves = dict.fromkeys(evaluations, ([1.0, 2.0], [3.0, 2.0]))
    return Side(name, settings, curves, evaluations, "transductive", 1)


def losses(after: Tensor) -> Tensor:
    return torch.stack([torch.ones_like(after), after], 1)


AFTER = torch.linspace(0.1, 0.5, 20)


# ---- differences ------------------------------------------------------------------------------


def test_a_difference_is_the_mean_over_pairs_with_its_interval():
    one, other = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)).double()
    difference = paired.difference(side("one", losses(one)), side("first", losses(other)))
    assert difference.mean == pytest.approx((one - other).mean().item())
    assert difference.interval_95_over_tasks == pytest.approx(1.96 * (one - other).std().item() / 20**0.5)
    swapped = paired.difference(side("one", losses(other)), side("first", losses(one)))
    assert (swapped.mean, swapped.by_seed) == (-difference.mean, {0: -difference.mean})


def test_shared_seeds_are_paired_and_averaged_before_the_interval():
    first = side("first", losses(AFTER), losses(AFTER), losses(AFTER))
    other = side("other", losses(AFTER + 0.1), losses(AFTER + 0.3))
    difference = paired.difference(other, first)
    assert difference.by_seed == {0: pytest.approx(0.1), 1: pytest.approx(0.3)}
    assert difference.mean == pytest.approx(0.2) and difference.interval_95_over_tasks == pytest.approx(
        0.0, abs=1e-6
    )
    assert paired.shared_seeds([3], [5]) == [(3, 5)]  # two single runs


def test_a_task_that_diverges_in_either_run_is_left_out_and_counted():
    ours, theirs = AFTER + 0.1, AFTER.clone()
    ours[3], ours[4], theirs[4], theirs[5] = 1e6, torch.nan, torch.inf, 50.0
    one, first = side("one", losses(ours)), side("first", losses(theirs))
    difference = paired.difference(one, first)
    assert (difference.tasks, difference.left_out) == (17, 3) and difference.mean == pytest.approx(0.1)
    table = paired.differences_table([first, one], "MSE", "20 tasks")
    assert "2 diverged" in table and table.splitlines()[2].split()[-2:] == ["3", "worse"]


def test_a_verdict_says_whether_seeds_agree_and_whether_the_interval_excludes_0():
    difference = Difference(0.05, 0.01, {0: 0.2, 1: -0.1}, tasks=50, left_out=0)
    assert difference.verdict(more_is_better=False) == "worse, but not in every seed"
    assert difference.verdict(more_is_better=True) == "better, but not in every seed"
    assert replace(difference, by_seed={0: 0.05}).verdict(more_is_better=False) == "worse"
    assert replace(difference, interval_95_over_tasks=0.06).verdict(more_is_better=False) == "not told apart"
    undefined = replace(difference, interval_95_over_tasks=float("nan"))
    assert undefined.verdict(more_is_better=False) == "not told apart"


def test_sides_with_different_normalisations_are_compared_as_trained_and_with_each():
    measured = {0: Evaluation({"loss": {n: losses(AFTER) for n in ("transductive", "inductive")}})}
    one = replace(side("one"), evaluations=measured)
    other = replace(one, normalisation="inductive")
    readings = paired.readings([one, other])
    assert {title: [s.normalisation for s in sides] for title, sides in readings.items()} == {
        "as trained": ["transductive", "inductive"],
        "transductive": ["transductive"] * 2,
        "inductive": ["inductive"] * 2,
    }
    assert list(paired.readings([one, one])) == ["transductive, as trained", "inductive"]


def test_only_settings_that_differ_are_shown():
    one = side("one", losses(AFTER), **{"--oracle": "no", "--noise": "0.0", "--steps": "1"})
    other = side("other", losses(AFTER), **{"--steps": "5", "--noise": "0.0"})
    assert paired.list_differing_settings([one, other]) == ["--steps"]
    assert paired.settings_table([one, other]).splitlines()[1].split() == ["--steps", "1", "5"]
    assert paired.settings_table([one, one]) == "All settings are the same."


# ---- record and picture -----------------------------------------------------------------------


def test_the_record_has_the_numbers_of_tables_and_picture():
    first, other = side("first", losses(AFTER)), side("other", losses(AFTER + 0.1))
    (_, record) = paired.record([first, other])
    assert record["differing_settings"] == {}
    (results,) = record["results"].values()
    assert results["difference"]["mean"] == pytest.approx(0.1)
    assert [row["mean"] for row in results["difference_per_step"]] == [0.0, pytest.approx(0.1)]
    assert results["per_step"][1]["mean"] == pytest.approx(AFTER.mean().item() + 0.1)
    assert torch.equal(results["per_task"][0], losses(AFTER + 0.1).double()[:, 1])


def test_a_figure_shows_many_sides_of_any_name():
    names = ["_hidden", "$x", *map(str, range(9))]
    sides = [side(name, losses(AFTER)) for name in names]
    figure = comparison_figure(sides, Caption("a_$title", "MSE", None, (1,)))
    style.render(figure)
    labels = [label.get_text() for label in figure.axes[-1].get_yticklabels()]
    assert labels == names
