"""The benchmarks: their flags, the words for their numbers, and how runs are repeated and recorded."""

import importlib
import json
import math
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu
import jobs
import reproduce
import table_text
from cells import TABLES, Column, Published
from harness import call_main, launch, read_json
from table_text import Number, distance, number, row_of

from commands.call import check_call
from commands.parser import parse
from commands.resolve import resolve, resolve_from
from evaluation.meta_test import Evaluation
from evaluation.tables import evaluation_record, write_json

RECORDS = reproduce.read_records()
WHOLE = {"iterations": 90, "planned": 90}
FREQUENCY, SINUSOID, OMNIGLOT = (TABLES[n] for n in ("sinusoid-frequency", "sinusoid", "omniglot-5way-1shot"))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_flags_of_every_cell_are_valid(table):
    for cell in table.trained:
        trained = resolve(parse([*table.flags, *cell.flags]))
        assert cell.published.keys() <= {column.title for column in table.columns}
        for test in table.tests:
            given = parse(jobs.Job(table, cell, 0, Path()).testing(test))
            other = check_call(given).eval_dataset
            tested = resolve_from(trained, given, evaluate=True, eval_dataset=other).evaluation
            steps = [column.steps for column in table.columns if column.test == test.name and column.steps]
            assert tested.eval_steps >= max([*steps, trained.evaluation.test_steps])
    assert {column.test for column in table.columns} - {None} == {test.name for test in table.tests}


SCRIPTS = [file.stem for file in ROOT.glob("benchmarks/*.py") if "launch(main)" in file.read_text()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_benchmark_has_its_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 0 and f"python benchmarks/{script}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("growth --rounds 0", "argument --rounds: invalid count value: '0'"),
        ("rounding --batches 0", "argument --batches: invalid count value: '0'"),
        ("speed nothing", "no work nothing; choose from sinusoid-1, .*, evaluation"),
        ("speed --precision sinusoid-1", "--precision has a work of its own"),
        ("speed --targets --quick", "--quick rehearses --targets, and needs --out"),
    ],
)
def test_a_mistake_on_a_benchmarks_line_is_one_line(line, error, monkeypatch, capsys):
    script, *flags = line.split()
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *flags])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(script).main()
    assert ended.value.code == 2
    assert re.search(error, capsys.readouterr().err)


@pytest.mark.slow
def test_the_script_for_a_gpu_is_rehearsed_on_the_cpu(tmp_path):
    script = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--quick"]
    done = subprocess.run([*script, "--out", str(tmp_path)], check=True, capture_output=True, text=True)
    record = read_json(tmp_path / "gpu.json")
    measured = {(row["name"], row["precision"]) for row in record["iterations"]}
    assert measured >= {
        (name, p) for name in ("sinusoid-1", "omniglot-5-way") for p in ("float64", "float32")
    }
    assert all(row["error"] < 1e-12 for row in record["iterations"] if row["precision"] == "float64")
    assert record["to 98 %"] and record["tests"][0]["exit code"] == 0
    reasons = ("no tf32", "measured on CUDA alone", "No module named 'higher'")
    assert all(any(reason in row["reason"] for reason in reasons) for row in record["left out"])
    assert "| sinusoid-1 | float64 | compile off |" in done.stdout


def test_what_has_another_meta_gradient_than_the_cpu_is_not_timed(tmp_path):
    def measure(session):
        error = gpu.check(lambda _: {"w": torch.ones(2)}, lambda _: {"w": torch.full((2,), 1.1)}, "float32")
        yield {"ms": 1.0, "error": error}

    options = SimpleNamespace(device="cpu", quick=True, data_root=tmp_path, out=tmp_path)
    session = gpu.Session(options, tmp_path)
    session.attempt("iterations", "sinusoid-1", 0, measure)
    assert session.failed and [*session.results] == ["left out"]


def test_a_gradient_on_the_cpu_may_fall_on_the_other_side_of_a_kink_in_two_meta_batches():
    def gradient(iteration: int) -> dict[str, torch.Tensor]:
        return {"w": torch.full((2,), (1.1, 1.1, 1.001)[iteration])}

    assert gpu.check(gradient, lambda _: {"w": torch.ones(2)}, "float32") == pytest.approx(1e-3, rel=1e-3)


def test_the_first_methods_come_first_in_all_tables_of_a_group():
    options = reproduce.parse_arguments(["icons"])
    assert [table.name for table in options.tables] == [n for n in TABLES if n.startswith("icons-")]
    runs = [(job.table.name, job.cell.method, job.seed) for job in reproduce.jobs_of(options)]
    assert runs[:4] == [*((table.name, "maml", 0) for table in options.tables), (runs[0][0], "maml++", 0)]
    assert {seed for name, _, seed in runs if "20way" in name} == {0} and len({*runs}) == len(runs)


def test_an_initialisation_is_tested_on_its_own_data_and_on_other_data(tmp_path):
    table = TABLES["icons-5way-1shot"]
    for method, own, other in (("maml", "icons", "omniglot"), ("maml, from omniglot", "omniglot", "icons")):
        job = jobs.Job(table, table.cell(method), 0, tmp_path)
        flags = {test.name: job.testing(test) for test in table.tests}
        assert "--eval-dataset" not in flags[f"on {own}"]
        assert ("--baselines" in flags[f"on {own}"]) is (method == "maml")
        assert flags[f"on {other}"][-4:-2] == ["--eval-dataset", other]  # and --out


# ---- from numbers to words -----------------------------------------------------------------------


def test_a_column_is_read_from_its_steps_and_normalisation_alone():
    numbers = [("transductive", 1, 0.5), ("transductive", 3, 0.6), ("inductive", 3, 0.4)]
    names = ("normalisation", "steps", "accuracy")
    rows = [dict(zip(names, row, strict=True)) | {"accuracy_interval_95": 0.01} for row in numbers]
    run = {"tests": {"1": {"per_step": rows, "test_steps": 3}}, "final_training_loss": {"mean": 0.25}}
    assert row_of(Column("", "1", None, "transductive"), run)["accuracy"] == 0.6
    assert row_of(Column("", "1", 1, "transductive"), run)["accuracy"] == 0.5
    assert row_of(Column("", "1", None, "per-step"), run) is row_of(Column("", "2"), run) is None
    assert number(OMNIGLOT, Column("", "1", None, "inductive"), {"runs": [run, run]}).means == [40.0, 40.0]
    assert row_of(Column("", None), run) == {"loss": 0.25}


@pytest.mark.parametrize(
    ("means", "interval", "published", "verdict"),
    [
        ([99.0, 98.0, 98.8], 0.1, 98.5, "**met**"),
        ([98.2, 98.2, 98.2], 0.4, 98.5, "**met**, within its interval"),
        ([98.2, 98.2, 98.2], 0.2, 98.5, "not met, by 0.30"),
        ([98.2, 98.2, 98.2], math.nan, 98.5, "not met, by 0.30"),
        ([98.6], 0.4, 98.5, "reached by a single run"),
        ([98.2], 0.4, 98.5, "reached by a single run, within its interval"),
        ([98.6, 98.6], 0.4, 98.5, "reached by 2 seeds of 3"),
        ([97.0], 0.4, 98.5, "short by 1.50"),
    ],
)
def test_only_three_seeds_meet_a_published_accuracy(means, interval, published, verdict):
    ours = Number(means, interval)
    assert distance(OMNIGLOT, Published(published, ""), ours, [WHOLE] * len(means)) == verdict


@pytest.mark.parametrize(
    ("means", "verdict"),
    [
        ([0.3] * 5, "**met**"),
        ([0.3] * 4, "reached by 4 seeds of 5"),
        ([0.3] * 4 + [2e16], "not met, by 4e15"),
        ([0.3] * 4 + [math.nan], "not met, not finite"),
    ],
)
def test_five_seeds_meet_a_published_error_and_never_without_their_diverged_tasks(means, verdict):
    ours = Number(means, diverged=3, kept=(0.3, 0.01))
    assert distance(SINUSOID, Published(0.35, ""), ours, [WHOLE] * len(means)) == verdict
    assert ours.text(3).endswith("; 0.300 ±0.010 without 3 diverged")


def test_the_first_number_of_a_record_is_the_mean_over_all_tasks():
    row = {"normalisation": "transductive", "steps": 5, "loss": 2.5e16, "loss_interval_95": 4e16}
    row |= {"diverged_tasks": 68, "loss_without_diverged": 0.6, "loss_without_diverged_interval_95": 0.05}
    column = next(column for column in SINUSOID.columns if column.title == "K = 5, 5 steps")

    def text(*rows: dict) -> str:
        runs = [{"tests": {"K = 5": {"per_step": [row]}}} for row in rows]
        return number(SINUSOID, column, {"runs": runs}).text(3)

    assert text(row) == "2.5e16 ±4e16; 0.600 ±0.050 without 68 diverged"
    lost = row | {"loss": None, "loss_interval_95": None}  # JSON has no NaN
    assert text(lost) == "not finite; 0.600 ±0.050 without 68 diverged"
    quiet = row | {"loss": 0.5, "diverged_tasks": 0, "loss_without_diverged": 0.5}
    assert text(quiet, lost) == "not finite (0.500 to not finite); 0.550 without 68 diverged"
    assert text(quiet, quiet) == "0.500 (0.500 to 0.500)"  # the tasks are not there: no interval


def test_unfinished_and_failed_runs_are_marked():
    early, whole = ({"iterations": n, "planned": 90, "failure": f} for n, f in ((50, "NaN"), (90, None)))
    row = {"normalisation": "transductive", "steps": 1, "loss": 2.0}
    tests = {"K = 5": {"per_step": [row], "test_steps": 1}}

    def texts(*runs: dict) -> tuple[str, str]:
        record = {"maml": {"runs": [{"tests": tests, "seed": 0} | run for run in runs]}}
        verdict = table_text.verdicts_of(FREQUENCY, record)[0]
        return table_text.verdict_text(FREQUENCY, verdict), table_text.summary({FREQUENCY.name: record})

    verdict, summary = texts(early)
    assert verdict.endswith("short by 0.870 (after 50 of 90 iterations, ended by non-finite numbers)")
    assert "(single run, 50 of 90 iterations, ended by non-finite numbers) |" in summary
    both = "(after 50 to 90 of 90 iterations, ended by non-finite numbers in 1 of 2 runs)"
    assert both in texts(early, whole)[0]
    good = {"tests": {"K = 5": {"per_step": [row | {"loss": 0.5}], "test_steps": 1}}}
    assert "reached by 5 seeds of 5 (after 50" in texts(*[whole | good] * 4, early | good)[0]
    assert "**met**" in texts(*[whole | good] * 5)[0]
    verdict, summary = texts(whole, early | {"tests": {}})  # an untested run does not count
    assert verdict.endswith("short by 0.870") and "(single run) |" in summary
    verdict, summary = texts(early | {"iterations": 20})  # not a quarter of its way
    assert "after 20 of 90 iterations" in verdict and "1.13" not in summary


def test_the_pages_say_what_the_records_say():
    page = (ROOT / "docs" / "results.md").read_text()
    pages = page + (ROOT / "docs" / "icons.md").read_text()
    for name, record in RECORDS.items():
        text = table_text.table_text(TABLES[name], record)
        assert text == (reproduce.TABLE_RESULTS / f"{name}.md").read_text()
        assert f"<!-- {name} -->\n{text}" in pages
    for other in sorted((ROOT / "docs").glob("*.md")):
        for mark, name, methods in table_text.excerpts_on(other.read_text()):
            text = table_text.excerpt(TABLES[name], RECORDS[name], methods)
            assert f"<!-- {mark} -->\n{text}<!-- /{mark} -->" in other.read_text()
    assert f"<!-- published -->\n{table_text.summary(RECORDS)}<!-- /published -->" in page
    readme = (ROOT / "README.md").read_text().partition("## Results")[2].partition("## ")[0]
    ours = re.findall(r"^\| .*? \| .*? \| .*? \| (\d.*?) \| .* \|$", readme, re.MULTILINE)
    assert ours and all(f"| {number} |" in page for number in ours)


# ---- from runs to numbers ------------------------------------------------------------------------


@pytest.fixture
def _no_checkpoints(monkeypatch):
    monkeypatch.setattr(jobs.Job, "settings", {})


def write_run(job: jobs.Job, iteration: int, trained_by: str) -> None:
    """Write the files of a run without tests."""
    progress = {"iterations": 90, "iteration": iteration, "best_iteration": iteration}
    progress |= {"failure": None, "final_training_loss": None, "validation": {}, "training": {}}
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / "training.json").write_text(json.dumps(progress))
    ledger = {"trained_by": trained_by, "seconds": 1.0, "machine": "here"}
    (job.folder / jobs.LEDGER).write_text(json.dumps(ledger))


@pytest.mark.usefixtures("_no_checkpoints")
def test_a_recorded_run_stays_until_the_same_command_has_equally_many_tests(tmp_path):
    job = jobs.Job(FREQUENCY, FREQUENCY.cell("maml"), 0, tmp_path)
    assert not jobs.record(FREQUENCY, [job])
    write_run(job, 50, "python main.py --of-another-command")
    assert not jobs.record(FREQUENCY, [job])
    write_run(job, 50, job.command)
    record = jobs.record(FREQUENCY, [job])
    (run,) = record["maml"]["runs"]
    assert run["iterations"] == 50 and not job.is_finished
    for tests, iterations in (({}, 50), ({"K = 5": {}}, 40)):
        recorded = {"maml": {"runs": [run | {"iterations": 40, "tests": tests}]}}
        (kept,) = jobs.record(FREQUENCY, [job], recorded)["maml"]["runs"]
        assert kept["iterations"] == iterations
    other = {"maml": {"runs": [run | {"seed": 7, "trained_by": "another seed's"}]}}
    assert [r["seed"] for r in jobs.record(FREQUENCY, [job], other)["maml"]["runs"]] == [0, 7]


@pytest.mark.usefixtures("_no_checkpoints")
def test_the_interval_of_several_seeds_is_that_of_each_tasks_mean_over_them(tmp_path):
    losses = np.random.default_rng(0).uniform(0.5, 1.5, (3, 40, 2))  # [seeds, tasks, steps + 1]
    losses[1, 7, 1] = 1e6
    seeds = [jobs.Job(FREQUENCY, FREQUENCY.cell("maml"), seed, tmp_path) for seed in range(3)]
    for job, values in zip(seeds, losses, strict=True):
        write_run(job, 90, job.command)
        evaluation = Evaluation({"transductive": torch.tensor(values)}, {})
        for test in FREQUENCY.tests:
            result = {"command": shlex.join(["main.py", *job.testing(test)]), "iteration": 90, "tasks": 40}
            result |= {"test_steps": 1, "device": "cpu", "versions": {"torch": "2"}}
            file = job.folder / f"test {test.name}" / "result.json"
            file.parent.mkdir()
            write_json(file, result | evaluation_record(evaluation))
    record = jobs.record(FREQUENCY, seeds)
    ours = number(FREQUENCY, FREQUENCY.columns[0], record["maml"])
    of_tasks = losses[:, :, 1].mean(0)
    assert ours.means == pytest.approx(losses[:, :, 1].mean(1).tolist()) and ours.diverged == 1
    assert ours.interval == pytest.approx(1.96 * of_tasks.std(ddof=1) / 40**0.5)
    of_tasks[7] = losses[[0, 2], 7, 1].mean()
    assert ours.kept == pytest.approx((of_tasks.mean(), 1.96 * of_tasks.std(ddof=1) / 40**0.5), rel=1e-5)
    again = jobs.record(FREQUENCY, [], json.loads(json.dumps(record)))  # the folders are gone
    assert number(FREQUENCY, FREQUENCY.columns[0], again["maml"]) == ours
    again["maml"]["runs"].pop()
    assert math.isnan(number(FREQUENCY, FREQUENCY.columns[0], again["maml"]).interval)


@pytest.mark.slow
def test_the_command_of_a_table_writes_it_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    flags = ["sinusoid-frequency", "--quick", "--methods", "maml", "--folder", str(tmp_path / "runs")]
    flags += ["--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags, "--minutes", "0"])
    assert reproduce.main() == 0 and "not begun" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
    assert reproduce.main() == 0 and "iteration 300 of 300" in capsys.readouterr().out
    results = tmp_path / "results-quick"
    (run,) = read_json(results / FREQUENCY.name / "maml.json")["runs"]
    assert {k: test["tasks"] for k, test in run["tests"].items()} == {f"K = {k}": 100 for k in (5, 10, 20)}
    assert (run["settings"]["seed"], run["settings"]["iterations"]) == (0, 300)
    assert "| 1 (single run) | 300; best at" in (results / f"{FREQUENCY.name}.md").read_text()
    assert (results / f"{FREQUENCY.name}.png").stat().st_size > 10_000
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs-quick").rglob("*")}
    assert reproduce.main() == 0
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs-quick").rglob("*")}


@pytest.mark.slow
def test_a_run_that_is_out_of_time_saves_and_is_resumed(tmp_path):
    line = "--meta-batch-size 2 --iterations 1000000 --val-every 1000000 --compile off --run-name run"
    flags = line.split()
    arguments = [*flags, "--checkpoint-path", str(tmp_path)]
    code, _ = call_main(arguments, seconds=30)
    assert code == jobs.STOPPED
    assert 0 < read_json(tmp_path / "run" / "training.json")["iteration"] < 1_000_000


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--minutes nan", "--minutes and --seeds of at least 0"),
        ("nothing", "no table nothing; choose from sinusoid"),
        ("sinusoid --methods protomaml", "no method protomaml"),
        ("sinusoid --results FILE --minutes 0", "exists"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    arguments = [*flags.replace("FILE", str(tmp_path / "file")).split(), "--folder", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    monkeypatch.setattr(reproduce, "run_jobs", lambda options: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as ended:
        launch(reproduce.main)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1 and message in errors
