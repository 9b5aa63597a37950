"""Several runs: mean and spread over seeds and by the size of tasks, in tables and records."""

import math
import re

import numpy as np
import pytest
import torch

from evaluation import tables
from evaluation.meta_test import Evaluation
from evaluation.tables import Caption, Spread, Summary


def run(setting: str, seed: int, loss: float | None, curve: list[float], **changes: object) -> Summary:
    best = min(filter(math.isfinite, curve), default=None)
    return {
        "name": f"{setting}_seed-{seed}",
        "setting": setting,
        "failure": None,
        "measure": "MSE",
        "final_training_loss": loss,
        "best_validation": best,
        "best_iteration": 10 * curve.index(best) + 10 if best else None,
    } | changes


RUNS = [
    run("a-1", 0, 1.0, [0.5, 0.75]),
    run("a-1", 1, 3.0, [1.0, 0.25]),
    run("a-2", 0, None, []),
    run("a-2", 1, 2.0, [math.nan]),
]


def cells(line: str) -> list[str]:
    return re.split(" {2,}", line.strip())


def evaluation(*tasks: list[float], shots: list[int] | None = None) -> Evaluation:
    """Make an evaluation of the losses of each task after each step."""
    losses = {"transductive": torch.tensor(tasks, dtype=torch.float64)}
    return Evaluation({"loss": losses}, sizes={"shots": torch.tensor(shots)} if shots else {})


def test_a_spread_has_mean_and_range_and_one_nan_makes_it_nan():
    assert Spread.over([1.0, 2.0, 6.0]) == Spread(3, 3.0, pytest.approx(7**0.5), 1.0, 6.0)
    assert Spread.over([4.0]).standard_deviation is None
    undefined = Spread.over([1.0, math.nan, 0.0])
    assert all(map(math.isnan, (undefined.mean, undefined.lowest, undefined.highest)))


# ---- training ---------------------------------------------------------------------------------


def test_training_is_grouped_by_setting_in_table_and_record():
    heading, first, second = tables.training_table(RUNS).splitlines()
    assert cells(heading) == ["ended", "training loss", "best validation MSE", "at iteration"]
    spread = ["2.0000 (1.0000 to 3.0000)", "0.3750 (0.2500 to 0.5000)", "15 (10 to 20)"]
    assert cells(first) == ["a-1", "2 of 2", *spread]
    assert cells(second) == ["a-2", "2 of 2", "2.0000", "-", "-"]
    record = tables.training_record(RUNS)
    assert record["settings"]["a-1"]["final_training_loss"]["mean"] == 2.0
    assert record["settings"]["a-1"]["best_iteration"]["highest"] == 20
    assert record["settings"]["a-2"]["final_training_loss"]["runs"] == 1
    assert [run.get("best_validation") for run in record["runs"]][:2] == [0.5, 0.25]


def test_the_table_of_training_names_the_measure_and_counts_finished_runs():
    table = tables.training_table([run("", 0, 1.0, [0.5, 0.25], measure="accuracy")])
    assert "best validation accuracy %" in table and "25.00" in table
    failed = [RUNS[0], RUNS[1] | {"failure": "iteration 7: ...", "measure": "Huber"}]
    table = tables.training_table(failed)
    assert "1 of 2" in table and "best validation  " in table and "3.0000" not in table


def test_each_measure_has_its_own_unit_where_settings_have_different_ones():
    runs = [run("scores", 0, 1.0, [0.25], measure="accuracy"), run("numbers", 0, 1.0, [1.5], measure="loss")]
    heading, scores, numbers = tables.training_table(runs).splitlines()
    assert cells(heading)[2] == "best validation"
    assert (cells(scores)[3], cells(numbers)[3]) == ("25.00 accuracy %", "1.5000 loss")


# ---- test -------------------------------------------------------------------------------------


def test_the_mean_over_all_tasks_comes_first_and_the_one_without_diverged_tasks_after_it():
    quiet = evaluation(*[[2.0, 1.0]] * 4)
    diverging = evaluation(*[[4.0, 2.0]] * 3, [4.0, 1e6])
    results, caption = {"all": [quiet, diverging]}, Caption("", "MSE", 1, (1,))
    after_one = tables.results_of(results)["all"].record()[1]
    assert (after_one["mean"], after_one["lowest"], after_one["highest"]) == (125001.25, 1.0, 250001.5)
    # three tasks have a mean of 1.5 over the seeds, and one has 1.0, of the seed in which it did not diverge
    assert (after_one["diverged_tasks"], after_one["mean_without_diverged"]) == (1, 1.375)
    table = tables.results_table(tables.results_of(results), caption)
    heading, before, after, *_, footer = table.splitlines()
    assert cells(heading) == ["steps", "MSE", "diverged", "without them"]
    assert cells(before)[1] == "3.0000 ± 0.0000 (2.0000 to 4.0000)"
    assert before.index("±") == after.index("±")
    mean, *others = cells(after)[1:]
    assert (mean, others[:2]) == ("125,001 ± 245,000 (1.0000 to 250,002)", ["1", "1.3750 ± 0.2450"])
    assert footer.endswith("'without them' is the mean without those that diverged.")


@pytest.mark.parametrize("lost", [math.nan, 1e19])
def test_one_diverged_task_of_one_seed_is_seen_in_the_first_number(lost):
    runs = [evaluation(*[[1.0, 0.5]] * 3), evaluation(*[[1.0, 0.5]] * 2, [1.0, lost])]
    table = tables.results_table(tables.results_of({"all": runs}), Caption("", "MSE", 1, (1,)))
    mean = "1.7e18 ± " if lost == 1e19 else "not finite ("
    assert cells(table.splitlines()[2])[1].startswith(mean)
    assert cells(table.splitlines()[2])[2:4] == ["1", "0.5000 ± 0.0000"]


def test_the_interval_over_seeds_is_that_of_each_tasks_mean_over_them():
    draw = np.random.default_rng(0)
    losses = draw.uniform(0.5, 1.5, (5, 50, 3))  # [seeds, tasks, steps + 1]
    losses[1, 7, 2], losses[:, 9, 1] = math.inf, 1e6
    results = tables.results_of({"all": [evaluation(*seed) for seed in losses.tolist()]})["all"]
    finite = losses[..., :2].mean(0)
    interval = 1.96 * finite.std(0, ddof=1) / 50**0.5
    np.testing.assert_allclose(results.intervals[:2], interval)
    apart = 1.96 * losses[..., :2].std(1, ddof=1).mean(0) / 50**0.5  # the mean of the seeds' intervals
    assert 2.1 * interval[0] < apart[0]  # it would hide that seeds average out
    assert not math.isfinite(results.means[2, 1]) and not math.isfinite(results.intervals[2])
    kept = np.where(losses > 100, math.nan, losses)
    of_tasks = [np.nanmean(np.delete(kept[..., 1], 9, 1), 0), np.nanmean(kept[..., 2], 0)]
    for step, values in enumerate(of_tasks, 1):
        assert results.kept_mean[step].item() == pytest.approx(values.mean())
        expected = 1.96 * values.std(ddof=1) / len(values) ** 0.5
        assert results.kept_intervals[step].item() == pytest.approx(expected)
    assert results.diverged == [0, 5, 1]


def test_the_table_of_many_settings_has_a_few_steps_as_columns():
    results = {f"a-{n}": [evaluation([n, n, n, n / 2], [n, n, n, n / 2])] for n in range(1, 5)}
    results["oracle"] = [evaluation([0.0], [0.0])]  # is not adapted
    text = tables.results_table(
        tables.results_of(results), Caption("", "MSE", None, (1, 2))
    )  # trained for other numbers
    assert cells(text.splitlines()[0]) == ["after 0 steps", "after 1 step", "after 2 steps", "after 3 steps"]
    heading, *rows = tables.results_table(
        tables.results_of(results), Caption("", "MSE", 1, (1,))
    ).splitlines()
    assert cells(heading) == ["after 0 steps", "after 1 step", "after 3 steps"]
    assert [cells(row)[0] for row in rows[:5]] == list(results)
    assert cells(rows[0])[1:] == ["1.0000 ± 0.0000", "1.0000 ± 0.0000", "0.5000 ± 0.0000"]
    assert cells(rows[4])[1:] == ["0.0000 ± 0.0000"]


# ---- by size ----------------------------------------------------------------------------------


def test_a_size_of_one_task_has_no_interval_and_several_runs_have_their_spread():
    shots = [1, 2, 2]
    runs = [
        evaluation([9.0, 1.0, 8.0], [9.0, 2.0, 8.0], [9.0, 4.0, 8.0], shots=shots),
        evaluation([9.0, 2.0, 8.0], [9.0, 5.0, 8.0], [9.0, 9.0, 8.0], shots=shots),
    ]
    _, one, two = tables.sizes_table(runs, Caption("", "MSE", 1, (1,)), 1).splitlines()
    assert one.split() == ["1", "1", "1.5000", "(1.0000", "to", "2.0000)"]
    assert two.split()[:3] == ["2", "2", "5.0000"] and "(3.0000 to 7.0000)" in two


def test_many_sizes_are_put_together_and_none_is_left_out():
    record = tables.sizes_record([evaluation(*[[1.0]] * 60, shots=[*range(1, 21)] * 3)])["shots"]
    assert [*record][:2] == ["1-3", "4-6"] and len(record) == 8
    assert sum(part["tasks"] for part in record.values()) == 60


def test_a_task_that_has_diverged_among_all_has_diverged_among_those_of_its_size():
    whole = evaluation(*[[1.0, 1.0]] * 3, [1.0, 50.0], [1e-6, 1.0], shots=[1, 1, 1, 2, 2])
    part = tables.StepResults.over([whole], "transductive", whole.sizes["shots"] == 2)
    assert whole.find_diverged("transductive")[:, 1].tolist() == [False, False, False, True, False]
    assert part.diverged == [0, 1]
