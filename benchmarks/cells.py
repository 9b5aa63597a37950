"""What reproduce.py reproduces: tables of cells, with the flags that train them and the tests they pass.

A cell is a method. What was published for it stands in published.toml, by table, method and column.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import harness  # noqa: F401  (puts the repository on the path)

from commands.presets import ALGORITHMS

CURVE_SEEDS, IMAGE_SEEDS = range(5), range(3)  # as many as a published number takes to be met
FAR_ENOUGH = 0.25  # of the planned iterations: shorter runs are in their own table alone
PUBLISHED = tomllib.loads(Path(__file__).with_name("published.toml").read_text(encoding="utf-8"))


class Published(NamedTuple):
    """A number as its authors print it: an error, or an accuracy in percent."""

    value: float
    text: str  # with the interval or the spread that the source gives


@dataclass(frozen=True)
class Test:
    """An evaluation of each run."""

    name: str
    flags: tuple[str, ...]
    dataset: str | None = None  # whose test tasks; None: the run's own


@dataclass(frozen=True)
class Column:
    """One number of an evaluation; accuracies are in percent."""

    title: str
    test: str | None  # by name; None: the training loss of the last 500 iterations
    steps: int | None = None  # None: the test steps of the method
    normalisation: str | None = None  # None: the only one


@dataclass(frozen=True)
class Cell:
    """A method of a table."""

    method: str
    flags: tuple[str, ...] = ()
    baselines: bool = False  # are measured in its tests
    baseline_of: str | None = None  # a baseline: measured in the tests of that method, never trained
    note: str = ""
    required: float | None = None  # the error that the source asks to stay below
    published: Mapping[str, Published] = field(default_factory=dict)  # by column title
    source: str = ""  # of the published numbers

    @property
    def slug(self) -> str:
        """The method's name as a part of a file name."""
        return re.sub("[^a-z0-9+]+", "-", self.method.lower())


@dataclass(frozen=True)
class Table:
    """Methods on one family of tasks."""

    name: str
    title: str
    flags: tuple[str, ...]  # shared by all cells
    tests: tuple[Test, ...]
    columns: tuple[Column, ...]
    cells: tuple[Cell, ...]
    accuracy: bool = False  # higher is better
    single: bool = False  # trained from one seed

    def cell(self, method: str) -> Cell:
        return next(cell for cell in self.cells if cell.method == method)

    @property
    def seeds(self) -> range:
        """The seeds that it is trained from: with fewer, no published number is met."""
        return range(1) if self.single else IMAGE_SEEDS if self.accuracy else CURVE_SEEDS

    @property
    def digits(self) -> int:
        return 2 if self.accuracy else 3

    @property
    def trained(self) -> tuple[Cell, ...]:
        """The cells that are trained, without the baselines."""
        return tuple(cell for cell in self.cells if cell.baseline_of is None)


def make_cell(table: str, method: str, flags: str | None = None, *, source_of: str = "", **more: Any) -> Cell:
    """Return a cell with its published numbers; without flags it is an algorithm of main.py.

    Args:
        source_of: the method whose published numbers count, if not its own.
    """
    entry = dict(PUBLISHED.get(table, {}).get(source_of or method, {}))
    source = entry.pop("source", "")
    more.setdefault("note", entry.pop("note", ""))
    published = {title: Published(float(text.split()[0]), text) for title, text in entry.items()}
    arguments = ("--algorithm", method) if flags is None else tuple(flags.split())
    return Cell(method, arguments, published=published, source=source, **more)


# ---- curves --------------------------------------------------------------------------------------

FAMILY = ("fomaml", "anil", "boil", "reptile", "meta-sgd", "maml++", "imaml", "cavia")
SHOTS = (5, 10, 20)
TEST_FLAGS = "-q 10 --eval-tasks 10000 --eval-steps 16"  # as many steps as any method trains
CURVE_TESTS = tuple(Test(f"K = {k}", (*f"-k {k} {TEST_FLAGS}".split(),)) for k in SHOTS)


def curve_columns(steps: Iterable[int], shots: Iterable[int] = SHOTS) -> tuple[Column, ...]:
    """Return a column for each number of points and of inner steps."""
    pairs = product(shots, steps)
    return tuple(Column(f"K = {k}, {after(n)}", f"K = {k}", n, "transductive") for k, n in pairs)


def after(steps: int) -> str:
    """Return "1 step", "2 steps", ..."""
    return f"{steps} step{'s' * (steps > 1)}"


def curve_table(name: str, title: str) -> Table:
    """Return the table of all algorithms and baselines on one family of curves, trained with 10 points."""
    baselines = ("scratch, sgd", "scratch, adam", "pretrained", "oracle")
    learner = ("--learner", "mlp") if name == "harmonic" else ()  # which stays at the mean
    measured_with, other = "maml", []
    if name == "sinusoid":  # the paper's text has 0.01, and its authors' code the default, 0.001
        measured_with = "maml, inner rate 0.01"
        flags = "--algorithm maml --inner-lr 0.01"
        other = [make_cell(name, measured_with, flags, source_of="maml", baselines=True)]
        other += [make_cell(name, f"maml, trained for {steps} steps", f"-s {steps}") for steps in (5, 10)]
    return Table(
        name,
        f"{title}: trained with K = 10 points (25 tasks, 70,000 iterations), query MSE",
        ("--dataset", name, *learner, "-k", "10", "--iterations", "70000", "--meta-batch-size", "25"),
        CURVE_TESTS,
        curve_columns((1, 5, 10)),
        (
            make_cell(name, "maml", baselines=not other),
            *other,
            *(make_cell(name, method) for method in FAMILY),
            *(make_cell(name, method, "", baseline_of=measured_with) for method in baselines),
        ),
    )


FREQUENCY = Table(
    "sinusoid-frequency",
    "Sinusoids of several frequencies: trained with K = 5 points, one step (60,000 iterations), query MSE",
    ("--dataset", "sinusoid-frequency", "-k", "5", "--iterations", "60000", "--meta-batch-size", "25"),
    CURVE_TESTS,
    curve_columns((1,)),
    tuple(make_cell("sinusoid-frequency", method) for method in ("maml", "meta-sgd")),
)
ASSIGNMENT = Table(
    "assignment",
    "The assignment: first order, one task an iteration, 40,000 iterations; mean training query loss of the "
    "last 500",
    (
        *("--dataset", "sinusoid", "--init", "torch", "--inner-lr", "0.01", "--first-order"),
        *("--meta-batch-size", "1", "--iterations", "40000"),
    ),
    (Test("K", ("--eval-tasks", "10000")),),
    (Column("the last 500 tasks", None), Column("10,000 test tasks, the trained steps", "K")),
    (
        make_cell("assignment", "K = 10, 1 step", "-k 10 -s 1 -q 40", required=0.7, baselines=True),
        make_cell("assignment", "K = 5, 5 steps", "-k 5 -s 5 -q 40", required=0.8, baselines=True),
    ),
)

# ---- images --------------------------------------------------------------------------------------

STATISTICS = {"transductive": "transductive", "inductive": "inductive", "per-step": "per-step statistics"}
QUERIES = {1: "1 query", 15: "15 queries"}


def image_tests(*queries: int) -> tuple[Test, ...]:
    """Return the tests with these numbers of query images a class."""
    return tuple(Test(f"{q} a class", ("-q", str(q), "--eval-tasks", "600")) for q in queries)


def image_columns(*queries: int) -> tuple[Column, ...]:
    """Return a column for each number of query images and each reading of batch norm."""
    return tuple(
        Column(f"{QUERIES[q]}, {words}", f"{q} a class", None, normalisation)
        for q in queries
        for normalisation, words in STATISTICS.items()
    )


# with a schedule that ends after about an hour on one CPU core, for those who do not have the paper's days
AN_HOUR = {(5, 1): 15_000, (5, 5): 3_000, (20, 1): 1_200, (20, 5): 300}


def omniglot(ways: int, shots: int) -> Table:
    """Return the table of one Omniglot setting."""
    name, iterations = f"omniglot-{ways}way-{shots}shot", AN_HOUR[ways, shots]
    note = f"PyTorch's initialisation and a cosine over {iterations:,} iterations, not the paper's 60,000"
    an_hour = f"--init torch --meta-lr-schedule cosine --iterations {iterations}"
    cells = [
        make_cell(name, "maml"),
        make_cell(name, "maml, an hour", an_hour, source_of="maml", note=note),
        *(make_cell(name, method) for method in ("fomaml", "anil", "reptile", "meta-sgd")),
        make_cell(name, "maml++", "--algorithm maml++ -q 1"),  # one query a class, as in its authors' code
    ]
    if ways == 5:
        cells.append(make_cell(name, "maml, fully connected", "--learner fc"))
    return Table(
        name,
        f"Omniglot, {ways}-way {shots}-shot, accuracy in percent",
        ("--dataset", "omniglot", "-n", str(ways), "-k", str(shots)),
        image_tests(1, 15),
        image_columns(1, 15),
        tuple(cells),
        accuracy=True,
    )


def one_training() -> Table:
    """Return the table of one initialisation for all four settings.

    The head is made of prototypes, which allows any number of classes, and only the head is adapted. That
    step changes next to nothing: in effect a prototypical network.
    """
    name, tests, columns = "omniglot-one-training", [], []
    for ways, shots in AN_HOUR:
        for queries, statistics in ((1, "transductive"), (15, "inductive")):
            test = f"{ways}-way {shots}-shot, {QUERIES[queries]}"
            sizes = ("-n", str(ways), "-k", str(shots), "-q", str(queries), "--eval-steps", "1")
            tests.append(Test(test, (*sizes, "--eval-tasks", "600")))
            columns.append(Column(f"{test}, {statistics}", test, None, statistics))
    flags = (
        "--head-init prototype --fast-weights head --init torch --inner-lr 0.4 -s 1 --test-steps 1 "
        "--meta-batch-size 2 --iterations 8000 --meta-lr 0.003 --meta-lr-schedule cosine --val-every 1000"
    )
    note = "in effect a prototypical network, with settings of our own"
    return Table(
        name,
        "Omniglot, one training for all four settings, accuracy in percent",
        ("--dataset", "omniglot", "-n", "60", "-k", "1", "-q", "1"),
        tuple(tests),
        tuple(columns),
        (make_cell(name, "prototype head", flags, note=note),),
        accuracy=True,
    )


# By shots, what differs from the defaults: the authors' own for Reptile (with the shots its pool of 15) and
# MAML++, else the meta-batch of Finn et al.
IMAGE_FLAGS = {
    1: {"reptile": "-q 14"},
    5: {"reptile": "-q 10 --eval-inner-batch 15", "maml++": ""},
}
USUAL_FLAGS = {1: "", 5: "--meta-batch-size 2"}


def image_table(dataset: str, title: str, shots: int) -> Table:
    """Return a 5-way table of a data set with 15 query images a class."""
    name = f"{dataset}-5way-{shots}shot"
    methods = ("maml", "fomaml", "anil", "boil", "reptile", "meta-sgd", "maml++")
    flags = {m: f"--algorithm {m} {IMAGE_FLAGS[shots].get(m, USUAL_FLAGS[shots])}" for m in methods}
    return Table(
        name,
        f"{title}, 5-way {shots}-shot, accuracy in percent",
        ("--dataset", dataset, "-n", "5", "-k", str(shots)),
        image_tests(15),
        image_columns(15),
        tuple(make_cell(name, method, flags[method]) for method in methods),
        accuracy=True,
    )


# ---- icons ---------------------------------------------------------------------------------------

FIRST = ("maml", "maml++", "protonet", "r2d2")  # methods, in this order; the other algorithms follow


def icons(ways: int, shots: int) -> Table:
    """Return the table of all algorithms, and of training from scratch, on one setting of the icons.

    Nothing is published: settings are Omniglot's, with PyTorch's initialisation and a cosine. With five ways
    and one shot each run is tested on Omniglot as well, and the first methods are also trained there.
    """
    name, crossed = f"icons-{ways}way-{shots}shot", (ways, shots) == (5, 1)
    iterations = 5_000 if ways == 5 else 2_000
    (test,), columns = image_tests(15), image_columns(15)
    tests: tuple[Test, ...] = (test,)
    if crossed:
        tests = tuple(Test(f"on {dataset}", test.flags, dataset) for dataset in ("icons", "omniglot"))
        pairs = product(tests, STATISTICS.items())
        columns = tuple(Column(f"{t.name}, {words}", t.name, None, n) for t, (n, words) in pairs)

    def cell(method: str, dataset: str = "icons") -> Cell:
        schedule = " --meta-lr-schedule cosine" * ("meta_lr_schedule" not in ALGORITHMS[method])
        title = method if dataset == "icons" else f"{method}, from {dataset}"
        flags = f"--dataset {dataset} --algorithm {method}{schedule}"
        return make_cell(name, title, flags, baselines=title == "maml")

    first = [method for method in FIRST if method in ALGORITHMS]
    others = [method for method in ALGORITHMS if method not in (*FIRST, "pretrain")]
    return Table(
        name,
        f"Icons, {ways}-way {shots}-shot, 15 queries, accuracy in percent",
        tuple(f"-n {ways} -k {shots} --learner conv --init torch --iterations {iterations}".split()),
        tests,
        columns,
        (
            *(cell(method) for method in (*first, *others)),
            *(cell(method, "omniglot") for method in first if crossed),
            *(
                make_cell(name, method, "", baseline_of="maml")
                for method in ("scratch, sgd", "scratch, adam")
            ),
        ),
        accuracy=True,
        single=ways == 20,
    )


TABLES = {
    table.name: table
    for table in (
        curve_table("sinusoid", "Sinusoid"),
        ASSIGNMENT,
        FREQUENCY,
        curve_table("harmonic", "Harmonic tasks"),
        curve_table("sinusoid-line", "Sinusoids and lines"),
        *(omniglot(ways, shots) for ways, shots in AN_HOUR),
        one_training(),
        *(icons(ways, shots) for ways, shots in ((5, 1), (5, 5), (20, 1))),
        *(image_table("cifar-fs", "CIFAR-FS", shots) for shots in (1, 5)),
        *(image_table("mini-imagenet", "mini-ImageNet", shots) for shots in (1, 5)),
    )
}
