"""What benchmarks/reproduce.py reproduces: tables of cells, with the published numbers and their sources.

Data alone. A cell is a method: the flags that train it, and what was published for it. A table says on which
tests its cells are measured, and which numbers become columns.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

SEEDS = (0, 1, 2)
FAR_ENOUGH = 0.25  # of the planned iterations: shorter runs are in the tables, not in README and box


class Published(NamedTuple):
    """A number as its authors print it: an error, or an accuracy in percent."""

    value: float
    interval: float | None = None  # or the spread that the source gives

    def __str__(self) -> str:
        digits = f"{self.value:g}"
        if self.value >= 10 and float(digits).is_integer():  # an accuracy, of which papers give tenths
            digits += ".0"
        return digits + ("" if self.interval is None else f" ±{self.interval:g}")


@dataclass(frozen=True)
class Test:
    """An evaluation of each run."""

    name: str
    flags: tuple[str, ...]
    baselines: bool = False  # are measured beside MAML


@dataclass(frozen=True)
class Column:
    """One number of an evaluation; of an accuracy in percent."""

    title: str
    test: str | None  # by name; None: the training loss of the last 500 iterations
    steps: int | None = None  # None: the test steps of the method
    normalisation: str | None = None  # None: the method's own


@dataclass(frozen=True)
class Cell:
    """A method of a table."""

    method: str
    flags: tuple[str, ...] = ()
    published: Mapping[str, Published] = field(default_factory=dict)  # by column
    source: str = ""  # of the published numbers
    beside: str | None = None  # a baseline, measured beside that method; it is not trained by itself
    note: str = ""
    asked: float | None = None  # the error below which the source asks to be

    @property
    def slug(self) -> str:
        """Its name as a part of a file's."""
        return re.sub("[^a-z0-9+]+", "-", self.method.lower())


@dataclass(frozen=True)
class Table:
    """Methods on one family of tasks."""

    name: str
    title: str
    flags: tuple[str, ...]  # of all cells
    tests: tuple[Test, ...]
    columns: tuple[Column, ...]
    cells: tuple[Cell, ...]
    accuracy: bool = False  # higher is better
    steps_shown: int = 10  # in the figure, unless the tests go less far

    def cell(self, method: str) -> Cell:
        return next(cell for cell in self.cells if cell.method == method)


FINN = "Finn et al. 2017"
SNELL = "Snell et al. 2017"
NICHOL = "Nichol et al. 2018"
LI = "Li et al. 2017"
RAGHU = "Raghu et al. 2020"
ANTONIOU = "Antoniou et al. 2019, an ensemble of five checkpoints (as Papers with Code lists it)"

# ---- curves --------------------------------------------------------------------------------------

BASELINES = tuple(
    Cell(name, beside="maml") for name in ("scratch, sgd", "scratch, adam", "pretrained", "oracle")
)


def curve_columns(shots: tuple[int, ...], steps: tuple[int, ...] = (1, 5, 10)) -> tuple[Column, ...]:
    return tuple(
        Column(f"K = {k}, {n} step{'s' * (n > 1)}", f"K = {k}", n, "transductive")
        for k in shots
        for n in steps
    )


def curve_tests(shots: tuple[int, ...], *, baselines: bool = True) -> tuple[Test, ...]:
    """Evaluated for as many steps as the most that a method trains."""
    return tuple(
        Test(
            f"K = {k}",
            ("-k", str(k), "-q", "10", "--eval-tasks", "10000", "--eval-steps", "16"),
            baselines=baselines,
        )
        for k in shots
    )


def algorithm(name: str, published: Mapping[str, Published] | None = None, source: str = "") -> Cell:
    return Cell(name, ("--algorithm", name), published or {}, source)


FAMILY = ("fomaml", "anil", "boil", "reptile", "meta-sgd", "maml++", "imaml", "cavia")
CURVES = ("-k", "10", "--iterations", "70000", "--meta-batch-size", "25")


def errors(*values: float, shots: int = 5) -> dict[str, Published]:
    """Published errors after 1, 5 and 10 steps."""
    columns = curve_columns((shots,))
    return {column.title: Published(value) for column, value in zip(columns, values, strict=True)}


SINUSOID = Table(
    "sinusoid",
    "Sinusoid: trained with K = 10 points (25 tasks, 70,000 iterations), query MSE",
    ("--dataset", "sinusoid", *CURVES),
    curve_tests((5, 10, 20)),
    curve_columns((5, 10, 20)),
    (
        algorithm("maml", errors(0.67, 0.38, 0.35), f"{FINN}, table 2"),
        *(algorithm(name) for name in FAMILY),
        *(
            cell
            if cell.method != "pretrained"
            else Cell("pretrained", (), errors(2.41, 2.23, 2.19), f"{FINN}, table 2", "maml")
            for cell in BASELINES
        ),
    ),
)
HARMONIC, LINE = (
    Table(
        name,
        f"{title}: trained with K = 10 points (25 tasks, 70,000 iterations), query MSE",
        ("--dataset", name, *CURVES),
        curve_tests((5, 10, 20)),
        curve_columns((5, 10, 20)),
        (algorithm("maml"), *(algorithm(name) for name in FAMILY), *BASELINES),
    )
    for name, title in (("harmonic", "Harmonic tasks"), ("sinusoid-line", "Sinusoids and lines"))
)
FREQUENCY = Table(
    "sinusoid-frequency",
    "Sinusoids of several frequencies: trained with K = 5 points, one step (60,000 iterations), query MSE",
    ("--dataset", "sinusoid-frequency", "-k", "5", "--iterations", "60000", "--meta-batch-size", "25"),
    curve_tests((5, 10, 20), baselines=False),
    curve_columns((5, 10, 20), (1,)),
    tuple(
        algorithm(
            name,
            {
                column.title: Published(value)
                for column, value in zip(curve_columns((5, 10, 20), (1,)), values, strict=True)
            },
            f"{LI}, table 1",
        )
        for name, values in (("maml", (1.13, 0.85, 0.71)), ("meta-sgd", (0.90, 0.63, 0.50)))
    ),
)
ASSIGNMENT = Table(
    "assignment",
    "The assignment: first order, one task an iteration, 40,000 iterations; mean training query loss of the "
    "last 500",
    (
        *("--dataset", "sinusoid", "--init", "torch", "--first-order", "--meta-batch-size", "1"),
        *("--iterations", "40000"),
    ),
    (Test("K", ("--eval-tasks", "10000"), baselines=True),),
    (
        Column("the last 500 tasks", None),
        Column("10,000 test tasks, the trained steps", "K"),
    ),
    tuple(
        Cell(
            f"K = {k}, {steps} step{'s' * (steps > 1)}",
            ("-k", str(k), "-s", str(steps), "-q", "40"),
            {"the last 500 tasks": Published(published)},
            "its author's own test",
            asked=asked,
        )
        for k, steps, published, asked in ((10, 1, 0.533, 0.7), (5, 5, 0.651, 0.8))
    ),
)

# ---- images --------------------------------------------------------------------------------------

ONE, INDUCTIVE, PER_STEP, MANY, MANY_INDUCTIVE, MANY_PER_STEP = (
    f"{queries}, {statistics}"
    for queries in ("1 query", "15 queries")
    for statistics in ("transductive", "inductive", "per-step statistics")
)


def accuracies(one: Published | None = None, inductive: Published | None = None) -> dict[str, Published]:
    found = {ONE: one, INDUCTIVE: inductive}
    return {title: value for title, value in found.items() if value is not None}


def image_columns(tests: tuple[str, str]) -> tuple[Column, ...]:
    one, many = tests
    return (
        Column(ONE, one, None, "transductive"),
        Column(INDUCTIVE, one, None, "inductive"),
        Column(PER_STEP, one, None, "per-step"),
        Column(MANY, many, None, "transductive"),
        Column(MANY_INDUCTIVE, many, None, "inductive"),
        Column(MANY_PER_STEP, many, None, "per-step"),
    )


def image_tests(queries: tuple[int, ...], tasks: int = 600) -> tuple[Test, ...]:
    return tuple(Test(f"{q} a class", ("-q", str(q), "--eval-tasks", str(tasks))) for q in queries)


OMNIGLOT_PUBLISHED: dict[str, dict[tuple[int, int], dict[str, Published]]] = {
    "maml": {
        (5, 1): accuracies(Published(98.7, 0.4)),
        (5, 5): accuracies(Published(99.9, 0.1)),
        (20, 1): accuracies(Published(95.8, 0.3)),
        (20, 5): accuracies(Published(98.9, 0.2)),
    },
    "fomaml": {
        (5, 1): accuracies(Published(98.3, 0.5)),
        (5, 5): accuracies(Published(99.2, 0.2)),
        (20, 1): accuracies(Published(89.4, 0.5)),
        (20, 5): accuracies(Published(97.9, 0.1)),
    },
    "anil": {
        (20, 1): accuracies(Published(96.2, 0.5)),
        (20, 5): accuracies(Published(98.0, 0.3)),
    },
    "reptile": {
        (5, 1): accuracies(Published(97.68, 0.04), Published(95.39, 0.09)),
        (5, 5): accuracies(Published(99.48, 0.06), Published(98.90, 0.10)),
        (20, 1): accuracies(Published(89.43, 0.14), Published(88.14, 0.15)),
        (20, 5): accuracies(Published(97.12, 0.32), Published(96.65, 0.33)),
    },
    "meta-sgd": {
        (5, 1): accuracies(Published(99.53, 0.26)),
        (5, 5): accuracies(Published(99.93, 0.09)),
        (20, 1): accuracies(Published(95.93, 0.38)),
        (20, 5): accuracies(Published(98.97, 0.19)),
    },
    "maml++": {
        (5, 1): accuracies(Published(99.47)),
        (5, 5): accuracies(Published(99.85)),
        (20, 1): accuracies(Published(97.65, 0.05)),
        (20, 5): accuracies(Published(99.33, 0.03)),
    },
    "maml, fully connected": {
        (5, 1): accuracies(Published(89.7, 1.1)),
        (5, 5): accuracies(Published(97.5, 0.6)),
    },
}
OMNIGLOT_SOURCES = {
    "maml": FINN,
    "maml, fully connected": FINN,
    "fomaml": f"{NICHOL}, transductive",
    "reptile": NICHOL,
    "meta-sgd": LI,
    "anil": f"{RAGHU}, standard deviation of three",
    "maml++": ANTONIOU,
}


# with a schedule that ends after about an hour on one CPU core, for those who do not have the paper's days
AN_HOUR = {(5, 1): 15_000, (5, 5): 3_000, (20, 1): 1_200, (20, 5): 300}


def an_hour(ways: int, shots: int) -> Cell:
    iterations = AN_HOUR[ways, shots]
    return Cell(
        "maml, an hour",
        ("--init", "torch", "--meta-lr-schedule", "cosine", "--iterations", str(iterations)),
        OMNIGLOT_PUBLISHED["maml"][ways, shots],
        FINN,
        note=f"PyTorch's initialisation and a cosine over {iterations:,} iterations, not the paper's 60,000",
    )


def omniglot(ways: int, shots: int) -> Table:
    cells = []
    for method, published in OMNIGLOT_PUBLISHED.items():
        if method == "maml, fully connected":
            if ways > 5:
                continue
            flags: tuple[str, ...] = ("--learner", "fc")
        else:
            # one query a class, as its authors' code
            flags = ("--algorithm", method, *(["-q", "1"] if method == "maml++" else []))
        cells.append(Cell(method, flags, published.get((ways, shots), {}), OMNIGLOT_SOURCES[method]))
        if method == "maml":
            cells.append(an_hour(ways, shots))
    return Table(
        f"omniglot-{ways}way-{shots}shot",
        f"Omniglot, {ways}-way {shots}-shot, accuracy in percent",
        ("--dataset", "omniglot", "-n", str(ways), "-k", str(shots)),
        image_tests((1, 15)),
        image_columns(("1 a class", "15 a class")),
        tuple(cells),
        accuracy=True,
    )


PROTOTYPICAL = {(5, 1): 98.8, (5, 5): 99.7, (20, 1): 96.0, (20, 5): 98.9}  # table 1 of Snell et al. 2017


def one_training() -> Table:
    """All four settings from one initialisation: the head is made of prototypes, which allows any number of
    classes, and only the head is adapted. That step changes next to nothing: a prototypical network."""
    settings = [(ways, shots) for ways in (5, 20) for shots in (1, 5)]
    titles = {(n, k): f"{n}-way {k}-shot" for n, k in settings}
    tests, columns, published = [], [], {}
    for (n, k), title in titles.items():
        for queries, statistics in ((1, "transductive"), (15, "inductive")):
            test = f"{title}, {queries} quer{'ies' if queries > 1 else 'y'}"
            sizes = ("-n", str(n), "-k", str(k), "-q", str(queries), "--eval-steps", "1")
            tests.append(Test(test, (*sizes, "--eval-tasks", "600")))
            columns.append(Column(f"{test}, {statistics}", test, None, statistics))
        published[columns[-1].title] = Published(PROTOTYPICAL[n, k])
    flags = (
        *("--head-init", "prototype", "--fast-weights", "head", "--init", "torch", "--inner-lr", "0.4"),
        *("-s", "1", "--test-steps", "1", "--meta-batch-size", "2", "--iterations", "8000"),
        *("--meta-lr", "0.003", "--meta-lr-schedule", "cosine", "--val-every", "1000"),
    )
    return Table(
        "omniglot-one-training",
        "Omniglot, one training for all four settings, accuracy in percent",
        ("--dataset", "omniglot", "-n", "60", "-k", "1", "-q", "1"),
        tuple(tests),
        tuple(columns),
        (
            Cell(
                "prototype head",
                flags,
                published,
                f"{SNELL}, prototypical networks",
                note="in effect a prototypical network, with settings of our own",
            ),
        ),
        accuracy=True,
    )


# 1-shot and 5-shot, then the same inductive, where it was published
MINI_PUBLISHED: dict[str, tuple[str, tuple[Published, ...]]] = {
    "maml": (FINN, (Published(48.70, 1.84), Published(63.11, 0.92))),
    "fomaml": (FINN, (Published(48.07), Published(63.15))),
    "anil": (RAGHU, (Published(46.7), Published(61.5))),
    "boil": ("Oh et al. 2021", (Published(49.61), Published(66.45))),
    "reptile": (NICHOL, (Published(49.97), Published(65.99), Published(47.07), Published(62.74))),
    "meta-sgd": (LI, (Published(50.47), Published(64.03))),
    "maml++": (ANTONIOU, (Published(52.15, 0.26), Published(68.32, 0.44))),
}


# What is other than the defaults with five shots: the meta-batch of Finn et al., and the methods' own.
TWO_TASKS = ("--meta-batch-size", "2")
FIVE_SHOTS = {"reptile": ("-q", "10", "--eval-inner-batch", "15"), "maml++": ()}
ONE_SHOT = {"reptile": ("-q", "14")}  # with the shots its pool of 15


def other_images(
    name: str, title: str, published: Mapping[str, tuple[str, tuple[Published, ...]]]
) -> list[Table]:
    """5-way tables of a data set with 15 query images a class, 1-shot and 5-shot."""
    return [
        Table(
            f"{name}-5way-{shots}shot",
            f"{title}, 5-way {shots}-shot, accuracy in percent",
            ("--dataset", name, "-n", "5", "-k", str(shots)),
            image_tests((15,)),
            tuple(
                Column(title, "15 a class", None, how)
                for title, how in (
                    (MANY, "transductive"),
                    (MANY_INDUCTIVE, "inductive"),
                    (MANY_PER_STEP, "per-step"),
                )
            ),
            tuple(
                Cell(
                    method,
                    (
                        "--algorithm",
                        method,
                        *(FIVE_SHOTS.get(method, TWO_TASKS) if shots == 5 else ONE_SHOT.get(method, ())),
                    ),
                    dict(zip((MANY, MANY_INDUCTIVE), values[at::2], strict=False)),
                    source,
                )
                for method, (source, values) in published.items()
            ),
            accuracy=True,
        )
        for at, shots in enumerate((1, 5))
    ]


TABLES = {
    table.name: table
    for table in (
        SINUSOID,
        ASSIGNMENT,
        FREQUENCY,
        HARMONIC,
        LINE,
        *(omniglot(ways, shots) for ways in (5, 20) for shots in (1, 5)),
        one_training(),
        *other_images("cifar-fs", "CIFAR-FS", dict.fromkeys(MINI_PUBLISHED, ("", ()))),
        *other_images("mini-imagenet", "mini-ImageNet", MINI_PUBLISHED),
    )
}
