"""Make the shipped checkpoints from the runs of benchmarks/reproduce.py.

    python benchmarks/pretrained.py                          # all methods of CHOSEN that are far enough
    python benchmarks/pretrained.py sinusoid                 # of one table

Of each method the first seed's best.pt, chosen on validation tasks: never the best of several seeds. The
optimizer is taken out; each is tested by `python main.py --eval --load checkpoints/pretrained/NAME`, as by a
user, and gets a card with the numbers.
"""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import harness
from harness import ROOT, Parser, evaluate
from pages import FAR_ENOUGH
from reproduce import RUNS, Job
from tables import TABLES, Table, slug
from tool import copy_initialisation

from commands.parser import parse
from commands.resolve import resolve
from evaluation.ledger import RESULTS
from evaluation.tables import write_csv
from learners.losses import loss_name

FOLDER = ROOT / "checkpoints" / "pretrained"
CARD = "card.json"
IMAGES = ("maml", "maml, an hour", "fomaml", "anil", "meta-sgd", "maml++", "reptile")
CHOSEN: dict[str, tuple[str, ...]] = {
    "sinusoid": tuple(TABLES["sinusoid-line"].methods),
    "sinusoid-frequency": ("maml", "meta-sgd"),
    "sinusoid-line": ("maml", "meta-sgd", "cavia"),
    **{name: IMAGES for name in TABLES if name.startswith("omniglot-") and "shot" in name},
    "omniglot-one-training": ("prototype head",),
    "icons-5way-1shot": ("maml", "protonet"),
}
FIRST = 100  # tasks of images that the test suite measures again
FEW = ("-q", "1")  # few queries, since the test suite runs them
TEST_FLAGS = {  # where they differ from training
    "omniglot-5way-5shot": FEW,
    "omniglot-20way-5shot": FEW,
    "omniglot-one-training": ("-n", "20", "-k", "1"),
}
KEPT = ("accuracy", "loss", "loss_without_diverged", "diverged_tasks")  # and their intervals


def name_checkpoint(table: Table, method: str) -> str:
    return f"{table.name}-{slug(method)}"


def select_numbers(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Return what people compare: the numbers after the test steps, by normalisation."""
    return {
        normalisation: {n: value for n, value in row.items() if n.removesuffix("_interval_95") in KEPT}
        for normalisation, row in harness.rows_after_test_steps(result).items()
    }


def publish(table: Table, method: str, root: Path) -> bool:
    """Write a method's checkpoint and card; return whether it has been trained far enough."""
    job = Job(table, method, (0,), root)
    progress = job.runs().get(0)
    if not progress or progress["iteration"] < FAR_ENOUGH * progress["iterations"]:
        return False
    folder = FOLDER / name_checkpoint(table, method)
    copied = copy_initialisation(job.folder / "seed-0", folder)
    flags = [*TEST_FLAGS.get(table.name, ())]
    if table.is_accuracy:  # no further than its own number of steps
        flags += ["--eval-steps", str(copied["test_steps"])]
    result = evaluate(folder, flags)
    first = evaluate(folder, [*flags, "--eval-tasks", str(FIRST)]) if table.is_accuracy else result
    tested_by = ["python", "main.py", "--eval", "--load", str(folder.relative_to(ROOT)), *flags]
    card = {
        "name": folder.name,
        "method": method,
        "trained_by": f"python main.py {job.ledger()['flags']} --seed 0",
        "iteration": copied["iteration"],
        "iterations_trained": progress["iteration"],
        "iterations_planned": progress["iterations"],
        "seed": 0,
        "data": copied["dataset"],
        "parameters": copied["parameters"],
        "sha256": hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest(),
        "tested_by": shlex.join(tested_by),
        "test_tasks": result["tasks"],
        "test_steps": result["test_steps"],
        "numbers": select_numbers(result),
        "first_tasks": first["tasks"],
        "numbers_of_first_tasks": select_numbers(first),
        "torch": result["versions"]["torch"],
        "device": result["device"],
    }
    harness.write_json(folder / CARD, card)
    print(f"{folder.name}: {describe_numbers(card)}", flush=True)
    return True


# ---- the folder's README -------------------------------------------------------------------------


def describe_numbers(card: Mapping[str, Any]) -> str:
    """Return the numbers of a card as a cell of a table."""
    parts = []
    for name, row in card["numbers"].items():
        if "accuracy" in row:
            parts.append(f"{100 * row['accuracy']:.2f} ±{100 * row['accuracy_interval_95']:.2f} % {name}")
        else:
            parts.append(f"MSE {row['loss']:.3g} ±{row['loss_interval_95']:.2g}")
            if row["diverged_tasks"]:
                without, count = row["loss_without_diverged"], row["diverged_tasks"]
                parts[-1] += f"; {without:.3g} without {count} tasks that diverged"
    return ", ".join(parts)


def row_texts(card: Mapping[str, Any]) -> list[str]:
    """Return a card's row in the folder's README."""
    trained = f"{card['iterations_trained']:,}"
    if card["iterations_trained"] < card["iterations_planned"]:
        trained += f" of {card['iterations_planned']:,}"
    steps = card["test_steps"]
    text = f"{describe_numbers(card)}, {steps} step{'s' * (steps != 1)}"
    settings = shlex.split(card["tested_by"])[5:]
    text += f" (`{shlex.join(settings)}`)" * bool(settings)
    return [f"`{card['name']}`", f"{card['parameters']:,}", f"{trained} ({card['iteration']:,})", text]


def result_row(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card's result as a row of results.csv, which `--list` reads."""
    trained, tested = (parse(shlex.split(card[command])[2:]) for command in ("trained_by", "tested_by"))
    config = resolve(trained)
    numbers = card["numbers"].get(config.choices.query_norm) or next(iter(card["numbers"].values()))
    name = "accuracy" if "accuracy" in numbers else "loss"
    return {
        "checkpoint": f"{card['name']}/best.pt",
        "iteration": card["iteration"],
        "dataset": config.tasks.dataset,
        "ways": tested.get("ways", config.tasks.ways),
        "shots": tested.get("shots", config.tasks.shots),
        "tasks": card["test_tasks"],
        "steps": card["test_steps"],
        "measure": loss_name(config.learner.loss) if name == "loss" else name,
        "result": numbers[name],
        "interval_95": numbers[f"{name}_interval_95"],
        "command": card["tested_by"],
    }


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(CHOSEN)} (default: all)")
    parser.add_argument("--folder", type=Path, default=RUNS, help="of the runs")
    options = parser.parse_args()
    for name in options.tables:
        if name not in CHOSEN:
            parser.error(f"no table {name}; choose from {', '.join(CHOSEN)}")
    pairs = [(TABLES[name], method) for name in options.tables or CHOSEN for method in CHOSEN[name]]
    published = [publish(table, method, options.folder) for table, method in pairs]
    if not any(published):
        parser.error(f"--folder {options.folder} has no run of these tables that is far enough")
    names = [name_checkpoint(TABLES[table], method) for table in CHOSEN for method in CHOSEN[table]]
    files = [FOLDER / name / CARD for name in names]
    cards = [harness.read_json(file) for file in files if file.exists()]
    results = [{n: "" if v is None else str(v) for n, v in result_row(card).items()} for card in cards]
    write_csv(FOLDER / RESULTS, [*results[0]], [[*row.values()] for row in results])
    rows = [row_texts(card) for card in cards]
    says = "`--eval` says (600 test tasks, ± 95 % interval)"
    head = ["name", "numbers learned", "iterations trained (best)", says]
    harness.put(FOLDER / "README.md", "cards", harness.markdown(head, rows) + "\n")


if __name__ == "__main__":
    harness.launch(main)
