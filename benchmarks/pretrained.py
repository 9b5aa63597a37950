"""Makes the checkpoints in the box from the runs of benchmarks/reproduce.py.

    python benchmarks/pretrained.py                          # all methods of CHOSEN that are far enough
    python benchmarks/pretrained.py sinusoid                 # of one table

Of each method the first seed's best.pt, chosen on validation tasks: never the best of several seeds. The
optimizer is taken out; each is tested by `python main.py --eval --load checkpoints/pretrained/NAME`, as by a
user, and gets a card with what that says.
"""

from __future__ import annotations

import hashlib
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from cells import FAMILY, FAR_ENOUGH, SEEDS, TABLES, Table  # noqa: E402
from inner_loop import SQUARE  # noqa: E402
from reproduce import Job  # noqa: E402
from script import Parser, launch  # noqa: E402

from common.errors import UsageError  # noqa: E402
from common.files import read_json, write_whole  # noqa: E402
from evaluation.tables import write_json  # noqa: E402
from training.checkpoint import load_checkpoint, save_checkpoint, strip_run  # noqa: E402
from training.folders import BEST  # noqa: E402

FOLDER = ROOT / "checkpoints" / "pretrained"
CARD = "card.json"
IMAGES = ("maml", "maml, an hour", "fomaml", "anil", "meta-sgd", "maml++", "reptile")
CHOSEN: dict[str, tuple[str, ...]] = {
    "sinusoid": ("maml", *FAMILY),
    "sinusoid-frequency": ("maml", "meta-sgd"),
    "sinusoid-line": ("maml", "meta-sgd", "cavia"),
    **{name: IMAGES for name in TABLES if name.startswith("omniglot-") and "shot" in name},
    "omniglot-one-training": ("prototype head",),
}
FIRST = 100  # tasks of images that a test measures again
SETTINGS = {  # of the test, where not those of training; few queries, since a test runs it
    **dict.fromkeys(("omniglot-5way-5shot", "omniglot-20way-5shot"), ("-q", "1")),
    "omniglot-one-training": ("-n", "20", "-k", "1"),
}


def name_of(table: Table, method: str) -> str:
    return f"{table.name}-{table.cell(method).slug}"


def test_of(table: Table, folder: Path) -> list[str]:
    """The flags that test a checkpoint; one of images no further than its own number of steps."""
    steps = load_checkpoint(ROOT / folder / BEST).settings["test_steps"]
    few = ["--eval-steps", str(steps)] if table.accuracy else []
    return ["--eval", "--load", str(folder), *SETTINGS.get(table.name, ()), *few]


def tested(flags: list[str]) -> dict[str, Any]:
    """What the command says of a checkpoint."""
    with tempfile.TemporaryDirectory() as out:
        line = [sys.executable, str(ROOT / "main.py"), *flags, "--out", out]
        subprocess.run(line, check=True, stdout=subprocess.DEVNULL)
        return read_json(next(Path(out).glob("*.json")))


def numbers(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """After the test steps, by normalisation: what people compare."""
    kept = (
        "accuracy", "accuracy_interval_95", "loss", "loss_interval_95", "loss_without_diverged",
        "diverged_tasks",
    )  # fmt: skip
    return {
        row["normalisation"]: {name: row[name] for name in kept if name in row}
        for row in record["per_step"]
        if row["steps"] == record["test_steps"]
    }


def card(job: Job, file: Path, record: dict[str, Any], first: dict[str, Any]) -> dict[str, Any]:
    """All that is to be known of a checkpoint; `first`: the record of the first of the test tasks."""
    source = load_checkpoint(job.checkpoint)
    planned = source.settings["iterations"]
    return {
        "name": file.parent.name,
        "method": job.cell.method,
        "trained_by": shlex.join(["python", "main.py", *job.training]),
        "iteration": source.iteration,
        "iterations_trained": job.progress["iteration"],
        "iterations_planned": planned,
        "seed": job.seed,
        "data": source.settings["dataset"],
        "parameters": sum(w.numel() for n, w in source.parameters.items() if not n.startswith(SQUARE)),
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "tested_by": shlex.join(["python", "main.py", *test_of(job.table, file.parent.relative_to(ROOT))]),
        "test_tasks": record["tasks"],
        "test_steps": record["test_steps"],
        "numbers": numbers(record),
        "first_tasks": first["tasks"],
        "numbers_of_first_tasks": numbers(first),
        "torch": record["versions"]["torch"],
        "device": record["device"],
    }


def words(found: dict[str, Any]) -> str:
    """The numbers of a card in a cell of a table."""
    parts = []
    for name, row in found["numbers"].items():
        if "accuracy" in row:
            parts.append(f"{100 * row['accuracy']:.2f} ±{100 * row['accuracy_interval_95']:.2f} % {name}")
        else:
            parts.append(f"MSE {row['loss_without_diverged']:.3g} ±{row['loss_interval_95']:.2g}")
            if row["diverged_tasks"]:
                parts[-1] = f"MSE {row['loss_without_diverged']:.3g}, {row['diverged_tasks']} tasks diverged"
    return ", ".join(parts)


HEADER = f"""# Trained initialisations

Each folder holds `best.pt`, the initialisation that a run's validation tasks chose, in float32 and without
the optimizer's state, and `{CARD}`: the command that trained it, seed, data, numbers and the file's SHA-256.
Always the first seed, never the best of several.

```sh
python main.py --eval --load checkpoints/pretrained/sinusoid-maml      # its number; writes beside it
python main.py --adapt points.csv --load checkpoints/pretrained/sinusoid-maml   # your points: docs/using.md
python main.py --init-from checkpoints/pretrained/sinusoid-maml --dataset sinusoid-line
```

| name | numbers learned | iterations trained (best) | `--eval` says (600 test tasks, ± 95 % interval) |
|-|-|-|-|
"""
FOOTER = """
Made by `python benchmarks/pretrained.py` from the runs of `benchmarks/reproduce.py`.
"""


def row(found: dict[str, Any]) -> str:
    """A card in the folder's README."""
    trained = f"{found['iterations_trained']:,}"
    if found["iterations_trained"] < found["iterations_planned"]:
        trained += f" of {found['iterations_planned']:,}"
    steps = found["test_steps"]
    said = f"{words(found)}, {steps} step{'s' * (steps > 1)}"
    settings = shlex.split(found["tested_by"])[5:]
    said += f" (`{shlex.join(settings)}`)" * bool(settings)
    return f"| `{found['name']}` | {found['parameters']:,} | {trained} ({found['iteration']:,}) | {said} |\n"


def publish(table: Table, method: str, root: Path) -> dict[str, Any] | None:
    """Writes a method's checkpoint and card; None where it has not been trained, or not far enough."""
    job = Job(table, table.cell(method), SEEDS[0], root, quick=False)
    problem = job.problem()
    if problem:
        raise UsageError(problem)
    if not (job.folder / BEST).exists() or not job.progress:
        return None
    if job.progress["iteration"] < FAR_ENOUGH * job.progress["planned"]:
        return None
    folder = FOLDER / name_of(table, method)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(folder / BEST, strip_run(load_checkpoint(job.checkpoint)))
    flags = test_of(table, folder)
    record = tested(flags)
    first = tested([*flags, "--eval-tasks", str(FIRST)]) if table.accuracy else record
    found = card(job, folder / BEST, record, first)
    write_json(folder / CARD, found)
    print(f"{folder.name}: {words(found)}", flush=True)
    return found


def main() -> int:
    parser = Parser(__doc__.partition("\n")[0])
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=", ".join(CHOSEN))
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "reproduce", help="of the runs")
    given = parser.parse_args()
    for name in given.tables:
        if name not in CHOSEN:
            parser.error(f"there is no table {name}: {', '.join(CHOSEN)}")
    if not given.folder.is_dir():
        parser.error(f"--folder {given.folder}: there is no such folder of runs")
    published = [
        publish(TABLES[name], method, given.folder)
        for name in given.tables or CHOSEN
        for method in CHOSEN[name]
    ]
    if not any(published):
        parser.error(f"--folder {given.folder} has no run of these tables that is far enough")
    names = [name_of(TABLES[table], method) for table, methods in CHOSEN.items() for method in methods]
    cards = [read_json(FOLDER / name / CARD) for name in names if (FOLDER / name / CARD).exists()]
    text = HEADER + "".join(map(row, cards)) + FOOTER
    write_whole(FOLDER / "README.md", lambda file: file.write(text.encode()))
    return 0


if __name__ == "__main__":
    launch(main)
