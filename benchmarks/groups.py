"""Which model predicts the other rows of a new group best? Held-out groups of real tables.

    python benchmarks/groups.py                          # all tables; finished runs are kept
    python benchmarks/groups.py gapminder --seeds 0

Every contender learns from the training groups. It is then given K rows of each test group, the same rows as
all others, and predicts the rest of them. Settings are those with the lowest error on the validation groups.
Errors are in units of the variance of the training targets: 1 is that of predicting their mean. Needs
`pip install '.[peers]'`.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness import (
    RESULTS,
    ROOT,
    Parser,
    UsageError,
    collect_conditions,
    launch,
    markdown,
    put,
    read_json,
    run_main,
    write_json,
)
from tool import load

from commands.initialisation import predict
from tasks.scales import apply_scale
from tasks.tables import Columns, load_table
from training.checkpoint import load_checkpoint
from training.folders import BEST

SIZES = {"insteval": (5, 5), "chem97": (4, 4), "mathachieve": (5, 9), "gapminder": (5, 7)}  # -k, -q
DRAWS = {"insteval": 2, "chem97": 4, "mathachieve": 20, "gapminder": 20}  # of a group's support rows
RUN = "--iterations 2000 --val-every 200 --log-every 200 --threads 1 --compile off"
TOOL = {  # flags, of which the sweep's are the candidates
    "MAML": "--sweep inner-lr=0.01,0.1 -s 5",
    "Meta-SGD": "--algorithm meta-sgd --sweep inner-lr=0.005,0.02 -s 5",
    "CAVIA": "--algorithm cavia --sweep inner-lr=0.1,1 -s 5",
    "R2D2": "--algorithm r2d2 --sweep meta-lr=0.001,0.003",
}
OPTIMISERS = ("powell", "bfgs")  # of MixedLM: each misses the maximum at times, its others more often

Rows = np.ndarray[Any, Any]  # float64 [rows, inputs], or [rows] of targets
Group = tuple[Rows, Rows]  # inputs and targets
Model = Callable[[Rows, Rows, Rows], Rows]  # support inputs and targets, query inputs -> query targets


@dataclass(frozen=True)
class Candidate:
    """A setting of a contender: its error on the validation groups, and its models, one for each seed."""

    validation: float
    models: Callable[[], list[Model]]


# ---- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """A table's groups by split, standardised by the training rows."""

    name: str
    file: Path
    groups: dict[str, list[Group]]

    @cached_property
    def training(self) -> tuple[Rows, Rows, Rows]:
        """Return inputs, targets and numbers of the groups of all training rows."""
        x, y = map(np.concatenate, zip(*self.groups["train"], strict=True))
        return x, y, np.repeat(range(len(self.groups["train"])), [len(y) for _, y in self.groups["train"]])

    def errors(self, model: Model, split: str) -> Rows:
        """Return the mean squared error of each group's other rows, over draws of its support rows."""
        groups, draws, support = self.groups[split], DRAWS[self.name], SIZES[self.name][0]
        errors = np.zeros((len(groups), draws))
        for number, (x, y) in enumerate(groups):
            for draw in range(draws):
                rows = np.random.default_rng([number, draw]).permutation(len(y))
                support_rows, others = rows[:support], rows[support:]
                predicted = model(x[support_rows], y[support_rows], x[others])
                errors[number, draw] = np.mean((predicted - y[others]) ** 2)
        return errors.mean(1)


def read_data(name: str, folder: Path) -> Data:
    """Return a table's groups with enough rows for a training task; its file is written if it is missing."""
    file = folder / f"{name}.csv"
    if not file.exists():
        script = [sys.executable, str(ROOT / "examples" / "grouped.py"), name, "--folder", str(folder)]
        if subprocess.run(script, check=False).returncode:
            raise UsageError(f"{file} could not be written")
    shares, rows = {"train": 1, "validation": 1, "test": 1}, sum(SIZES[name])  # the file has a split
    table = load_table(file, Columns(), torch.float64, classification=False, shares=shares, min_examples=rows)
    scales = table.measure_scales(targets=True)
    x = apply_scale(table.x, scales, "input", "").numpy()
    y = apply_scale(table.y, scales, "target", "").numpy()[:, 0]
    places = {s: [(table.task == task).numpy() for task in part] for s, part in table.splits.items()}
    return Data(name, file, {s: [(x[rows], y[rows]) for rows in part] for s, part in places.items()})


# ---- ridge regressions and mixed models ----------------------------------------------------------


def with_one(x: Rows) -> Rows:
    return np.concatenate([np.ones((len(x), 1)), x], 1)


def solve_ridge(x: Rows, y: Rows, penalties: Rows | float) -> Rows:
    """Return the weights with the least sum of squared errors and penalised squared weights."""
    return np.linalg.solve(x.T @ x + penalties * np.eye(x.shape[1]), x.T @ y)


def make_candidate(data: Data, model: Model) -> Candidate:
    return Candidate(float(data.errors(model, "validation").mean()), lambda: [model])


def pooled_ridge(data: Data) -> dict[str, Candidate]:
    """Fit one ridge regression to all training rows; it does not look at the support rows."""
    weights = {penalty: solve_ridge(*data.training[:2], penalty) for penalty in (1, 10, 100, 1000)}
    return {f"{p}": make_candidate(data, partial(lambda w, x, y, q: q @ w, w)) for p, w in weights.items()}


def ridge(data: Data) -> dict[str, Candidate]:
    """Fit a ridge regression to a group's residuals from a pooled one; its intercept has its own penalty."""
    pooled = solve_ridge(*data.training[:2], 10.0)

    def predict_group(penalties: Rows, x: Rows, y: Rows, query: Rows) -> Rows:
        return query @ pooled + with_one(query) @ solve_ridge(with_one(x), y - x @ pooled, penalties)

    pairs = product((0.01, 0.1, 1, 3, 10, 30, 100), (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1e9))
    penalties = {f"{a:g}, {b:g}": np.array([a, *[b] * len(pooled)]) for a, b in pairs}
    return {label: make_candidate(data, partial(predict_group, p)) for label, p in penalties.items()}


@dataclass(frozen=True)
class MixedModel:
    """A linear mixed model, which predicts a new group's effects from its support rows (BLUP).

    Of targets y = X b + Z u + e, with variances B of u between groups and s of e within, the best linear
    unbiased prediction of u is B Z' (Z B Z' + s I)^-1 (y - X b).
    """

    fixed: Rows
    between: Rows
    within: float
    columns: Sequence[int]  # of the inputs, with fixed effects
    slopes: Sequence[int]  # with random slopes, besides the random intercept

    def __call__(self, x: Rows, y: Rows, query: Rows) -> Rows:
        z = with_one(x[:, self.slopes])
        residual = y - with_one(x[:, self.columns]) @ self.fixed
        covariance = z @ self.between @ z.T + self.within * np.eye(len(z))
        effects = self.between @ z.T @ np.linalg.solve(covariance, residual)
        return with_one(query[:, self.columns]) @ self.fixed + with_one(query[:, self.slopes]) @ effects


def mixed_models(data: Data) -> dict[str, Candidate]:
    """Fit mixed models with random slopes of no number that varies within groups, of one, or of all."""
    x, groups = data.training[0], [x for x, _ in data.groups["train"]]
    numbers = [c for c in range(x.shape[1]) if len({*x[:, c]}) > 2 and any(np.ptp(g[:, c]) for g in groups)]
    slopes = dict.fromkeys([(), *((c,) for c in numbers), tuple(numbers)])
    return {f"slopes {part}": make_candidate(data, fit_mixed(*data.training, part)) for part in slopes}


def fit_mixed(x: Rows, y: Rows, group: Rows, slopes: Sequence[int]) -> MixedModel:
    """Fit a mixed model to rows of numbered groups by restricted maximum likelihood."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    columns = independent_columns(x)
    model = MixedLM(y, with_one(x[:, columns]), group, with_one(x[:, slopes]))
    with warnings.catch_warnings(action="ignore"):  # about variances near 0, and failed searches
        fits = [model.fit(reml=True, method=method) for method in OPTIMISERS]
    fit = max((fit for fit in fits if np.isfinite(fit.llf)), key=lambda fit: fit.llf)
    return MixedModel(fit.fe_params, np.asarray(fit.cov_re), fit.scale, columns, slopes)


def independent_columns(x: Rows) -> list[int]:
    """Return the columns that are no linear combination of a constant and columns before."""
    columns: list[int] = []
    for column in range(x.shape[1]):
        if np.linalg.matrix_rank(with_one(x[:, [*columns, column]])) == len(columns) + 2:
            columns.append(column)
    return columns


# ---- the tool ------------------------------------------------------------------------------------


def train(name: str, data: Data, folder: Path, seeds: Sequence[int]) -> dict[str, Candidate]:
    """Train a sweep of main.py; its candidates' validation errors are those of each run's best.pt."""
    (support, query), runs = SIZES[data.name], folder / f"{data.name}-{name}"
    task = f"--dataset table:{data.file} -k {support} -q {query} --min-examples {support + query}"
    place = ["--checkpoint-path", str(folder), "--run-name", runs.name, "--resume"]
    run_main([*f"{task} {RUN} {TOOL[name]}".split(), "--seeds", ",".join(map(str, seeds)), *place])
    settings: dict[str, list[dict[str, Any]]] = {}
    for run in read_json(runs / "summary.json")["runs"]:
        settings.setdefault(run["setting"], []).append(run)
    return {
        setting: Candidate(
            float(np.mean([run["best_validation"] for run in group])),
            partial(lambda group: [load_model(runs / run["name"], data) for run in group], group),
        )
        for setting, group in settings.items()
    }


def load_model(run: Path, data: Data) -> Model:
    """Return a run's initialisation as a function that adapts it to a group."""
    maml, parameters, _ = load(run, as_tensor(data.training[0][:1]))
    steps = load_checkpoint(run / BEST).settings["test_steps"]

    def predict_group(x: Rows, y: Rows, query: Rows) -> Rows:
        adapted = maml.adapt(parameters, as_tensor(x), as_tensor(y)[:, None], steps)
        return predict(maml, adapted, as_tensor(query))[:, 0].double().numpy()

    return predict_group


def as_tensor(values: Rows) -> torch.Tensor:
    return torch.from_numpy(values).float()


# ---- the contest ---------------------------------------------------------------------------------

CONTENDERS: dict[str, Callable[..., dict[str, Candidate]]] = {
    "pooled ridge, not adapted": lambda data, *_: pooled_ridge(data),
    "ridge on the residuals": lambda data, *_: ridge(data),
    "mixed model": lambda data, *_: mixed_models(data),
    **{name: partial(train, name) for name in TOOL},
}


def compete(data: Data, folder: Path, seeds: Sequence[int]) -> dict[str, Any]:
    """Return, for each contender, what was chosen on the validation groups, and the test groups' errors."""
    results: dict[str, Any] = {}
    for name, find_candidates in CONTENDERS.items():
        candidates = find_candidates(data, folder, seeds)
        validation = {label: round(c.validation, 4) for label, c in candidates.items()}
        chosen = min(validation, key=validation.__getitem__)
        tests = [data.errors(model, "test") for model in candidates[chosen].models()]
        errors = [test.round(5).tolist() for test in tests]
        results[name] = {"chosen": chosen, "validation": validation, "test": errors}
        print(f"{data.name}, {name}: {chosen}, {np.mean(tests):.4f}", flush=True)
    return results


def mean_and_interval(values: Rows) -> str:
    """Return the mean over groups and its 95 % interval."""
    return f"{values.mean():.3f} ±{1.96 * values.std(ddof=1) / len(values) ** 0.5:.3f}"


def describe_spread(seeds: Rows) -> str:
    return f" ({seeds.min():.3f} to {seeds.max():.3f})" if len(seeds) > 1 else ""


def tabulate(records: Mapping[str, Any]) -> str:
    """Return a table of errors, one of paired differences from the mixed model, and what was chosen."""
    parts = {name: [record["contenders"][name] for record in records.values()] for name in CONTENDERS}
    tests = {name: [np.array(part["test"]) for part in row] for name, row in parts.items()}
    reference = [test.mean(0) for test in tests["mixed model"]]
    errors, differences, chosen = [], [], []
    for name, row in tests.items():
        errors.append(
            [name, *(mean_and_interval(test.mean(0)) + describe_spread(test.mean(1)) for test in row)]
        )
        pairs = zip(row, reference, strict=True)
        differences.append([name, *(mean_and_interval(test.mean(0) - other) for test, other in pairs)])
        chosen.append([name, *(f"`{part['chosen']}`" for part in parts[name])])
    differences = [row for row in differences if row[0] != "mixed model"]
    titles = "Errors", "The same groups, minus the mixed model's errors", "Chosen on the validation groups"
    tables = zip(titles, (errors, differences, chosen), strict=True)
    return "\n".join(f"{title}:\n\n{markdown(['', *records], rows)}\n" for title, rows in tables)


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"of {', '.join(SIZES)} (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the tool's runs")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "groups", help="data and runs")
    parser.add_argument("--out", type=Path, default=RESULTS / "groups.json", help="the JSON file")
    options = parser.parse_args()
    if unknown := {*options.tables} - SIZES.keys():
        parser.error(f"there is no table {min(unknown)!r}: {', '.join(SIZES)}")
    records = read_json(options.out) if options.out.exists() else {}
    for name in options.tables or SIZES:
        data = read_data(name, options.folder)
        records[name] = {
            "groups": {split: len(part) for split, part in data.groups.items()},
            "contenders": compete(data, options.folder, options.seeds),
            "conditions": collect_conditions(),
        }
        records = {table: records[table] for table in SIZES if table in records}
        write_json(options.out, records)
    if options.out.parent == RESULTS:
        put(ROOT / "docs" / "tables.md", "groups", tabulate(records))
    else:
        print(tabulate(records))


if __name__ == "__main__":
    launch(main)
