"""The papers' tables: what is declared, what is said of it, and a small one from its command."""

import json
import math
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import reproduce
import reproduced
import table_figures
from cells import TABLES, Column, Published
from reproduced import Number, number, row_of
from script import launch

from commands import config
from training.checkpoint import load_checkpoint

RESULTS = ROOT / "benchmarks" / "results" / "reproduce"
RECORDS = {name: json.loads((RESULTS / f"{name}.json").read_text()) for name in TABLES
           if (RESULTS / f"{name}.json").exists()}  # fmt: skip
CELLS = [(table, cell) for table in TABLES.values() for cell in table.cells if cell.beside is None]


@pytest.mark.parametrize(
    ("table", "cell"), CELLS, ids=[f"{table.name}-{cell.method}" for table, cell in CELLS]
)
def test_each_cells_flags_are_a_run_and_its_tests(table, cell):
    trained = config.resolve(config.parse([*table.flags, *cell.flags]))
    titles = {column.title for column in table.columns}
    assert cell.published.keys() <= titles
    for test in table.tests:
        given = config.parse(["--eval", "--load", "best.pt", *test.flags])
        config.check_invocation(given)
        tested = config.resolve_from(trained, given, evaluate=True)
        wanted = [column.steps for column in table.columns if column.test == test.name and column.steps]
        assert tested.eval_steps >= max([*wanted, trained.test_steps])
    assert {column.test for column in table.columns} - {None} == {test.name for test in table.tests}


def test_a_published_number_is_met_where_ours_reaches_it_or_has_it_in_its_interval():
    ours, published = Number([98.0, 98.4], [0.4, 0.4], 0), Published(98.5)
    assert ours.mean == pytest.approx(98.2) and ours.meets(published, higher=True)
    assert not ours.reaches(published, higher=True) and ours.reaches(published, higher=False)
    assert not ours.meets(Published(98.7), higher=True)
    assert not ours.meets(Published(97.7), higher=False)
    assert not Number([0.7], [math.nan], 0).meets(Published(0.6), higher=False)


def test_a_column_is_read_from_its_steps_and_normalisation_and_from_no_others():
    rows = [
        {"normalisation": norm, "steps": step, "accuracy": accuracy, "accuracy_interval_95": 0.01}
        for norm, step, accuracy in (
            ("transductive", 1, 0.5),
            ("transductive", 3, 0.6),
            ("inductive", 3, 0.4),
        )
    ]
    run = {"tests": {"1": {"per_step": rows, "test_steps": 3}}, "final_training_loss": {"mean": 0.25}}
    assert row_of(Column("", "1", None, "transductive"), run)["accuracy"] == 0.6
    assert row_of(Column("", "1", 1, "transductive"), run)["accuracy"] == 0.5
    assert row_of(Column("", "1", None, "per-step"), run) is row_of(Column("", "2"), run) is None
    table = TABLES["omniglot-5way-1shot"]
    assert number(table, Column("", "1", None, "inductive"), [run, run]).means == [40.0, 40.0]
    assert row_of(Column("", None), run) == {"loss_without_diverged": 0.25}


def test_a_run_says_how_far_it_is_and_where_its_numbers_ended():
    early, whole = ({"iterations": n, "planned": 90, "failure": f} for n, f in ((50, "NaN"), (90, None)))
    table = TABLES["sinusoid-frequency"]
    row = {"normalisation": "transductive", "steps": 1, "loss_without_diverged": 2.0}
    tests = {"K = 5": {"per_step": [row], "test_steps": 1}}

    def said(*runs: dict) -> tuple[str, str]:
        record = {"methods": {"maml": {"runs": [{"tests": tests, "seed": 0} | run for run in runs]}}}
        return reproduced.verdicts(table, record)[0][-1], reproduced.summary({table.name: record})

    verdict, summary = said(early)
    assert verdict.endswith("short by 0.870 (after 50 of 90 iterations, where numbers were no longer finite)")
    assert "(single run, 50 of 90 iterations, where numbers were no longer finite) |" in summary
    verdict, _ = said(early, whole)
    assert "(after 50 to 90 of 90 iterations, where numbers were no longer finite in 1 of 2 runs)" in verdict
    verdict, summary = said(whole)
    assert verdict.endswith("short by 0.870") and "(single run) |" in summary
    verdict, summary = said(whole, early | {"tests": {}})  # of which nothing is known
    assert verdict.endswith("short by 0.870") and "(single run) |" in summary
    verdict, summary = said(early | {"iterations": 20})  # not a quarter of its way
    assert "after 20 of 90 iterations" in verdict and "1.13" not in summary


def test_the_pages_say_what_the_records_say(tmp_path):
    assert "sinusoid" in RECORDS
    page = (ROOT / "docs" / "results.md").read_text()
    for name, record in RECORDS.items():
        text = reproduced.table_text(TABLES[name], record)
        assert text == (RESULTS / f"{name}.md").read_text()
        assert f"<!-- {name} -->\n{text}" in page
    summary = reproduced.summary(RECORDS)
    assert f"<!-- published -->\n{summary}<!-- /published -->" in (ROOT / "README.md").read_text()


def test_a_table_comes_from_its_command_which_stops_where_it_is_told_and_repeats_nothing(tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / "reproduce.py", "sinusoid-frequency", "--quick"]
    command += ["--methods", "maml", "--folder", tmp_path / "runs", "--results", tmp_path / "results"]

    def run(*more):
        done = subprocess.run([*command, *more], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = run("--minutes", "0")
    assert (code, "not begun" in said) == (0, True), said
    code, said = run()
    assert (code, "iteration 300 of 300" in said) == (0, True), said
    folder = tmp_path / "results-quick"
    record = json.loads((folder / "sinusoid-frequency.json").read_text())
    (found,) = record["methods"]["maml"]["runs"]
    assert found["iterations"] == found["planned"] == 300 and set(found["tests"]) == {
        "K = 5",
        "K = 10",
        "K = 20",
    }
    assert all(test["tasks"] == 100 for test in found["tests"].values())
    text = (folder / "sinusoid-frequency.md").read_text()
    assert (
        "1 (single run)" in text
        and "published 1.13, ours" in text
        and "meta-sgd, K = 5, 1 step: published" in text
    )
    for suffix in ("", "-dark"):
        assert (folder / f"sinusoid-frequency{suffix}.png").stat().st_size > 10_000
    table, root = TABLES["sinusoid-frequency"], tmp_path / "runs-quick"
    job = reproduce.Job(table, table.cell("maml"), 0, root, quick=True)
    other = reproduce.Job(
        replace(table, flags=(*table.flags, "--inner-lr", "0.05")), job.cell, 0, root, quick=True
    )
    assert job.finished and job.problem() is None and "other settings" in other.problem()
    same, more = (
        replace(table.tests[0], flags=(*table.tests[0].flags, *flags))
        for flags in ([], ["--test-steps", "2"])
    )
    assert job.result(same) and not job.result(more)
    files = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    assert run()[0] == 0
    assert files == {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    assert "maml" in reproduce.record(table, [job])["methods"]
    assert not reproduce.record(table, [other])["methods"]  # not shown as what it is not
    gone = reproduce.Job(table, job.cell, 0, tmp_path / "gone", quick=True)
    assert reproduce.record(table, [gone], record) == record
    assert not reproduce.record(table, [replace(gone, seed=1)], record)["methods"]
    assert not reproduce.record(table, [replace(gone, table=other.table)], record)["methods"]
    for other_run, kept in (  # what has been tested comes first, then what is further
        ({"iterations": 400}, 400),
        ({"iterations": 400, "tests": {}}, 300),
        ({"iterations": 200}, 300),
    ):
        known = {"methods": {"maml": {"runs": [found | other_run]}}}
        assert reproduce.record(table, [job], known)["methods"]["maml"]["runs"][0]["iterations"] == kept
    old = {"methods": {"maml": {"runs": [found | {"tests": {"K = 5": {"tasks": 100}}}]}}}
    assert reproduce.record(table, [gone], old)["methods"]["maml"]["runs"][0]["tests"] == {}
    shorter = replace(table, tests=(replace(same, flags=("-k", "7")), *table.tests[1:]))
    kept = reproduce.record(shorter, [replace(gone, table=shorter)], record)["methods"]["maml"]["runs"][0]
    assert set(kept["tests"]) == {"K = 10", "K = 20"}
    seventh = found | {"seed": 7, "trained_by": replace(job, seed=7).command}
    (folder / "sinusoid-frequency.json").write_text(json.dumps({"methods": {"maml": {"runs": [seventh]}}}))
    assert run("--collect")[0] == 0
    runs = json.loads((folder / "sinusoid-frequency.json").read_text())["methods"]["maml"]["runs"]
    assert [each["seed"] for each in runs] == [0, 7]
    (folder / "sinusoid-frequency.json").write_text('{"methods": {"maml": {"ru')
    code, said = run()
    assert code == 2 and "sinusoid-frequency.json is damaged: remove it" in said.splitlines()[-1]
    assert (folder / "sinusoid-frequency.json").read_text().endswith('"ru')
    job.note(1.0, "NaN")
    assert (job.failure, job.finished) == ("NaN", True)
    assert reproduce.record(table, [job])["methods"]["maml"]["runs"][0]["failure"] == "NaN"
    job.note(1.0, None)  # somebody has gone on with it
    assert job.failure is None
    (folder / "sinusoid-frequency.json").write_text(json.dumps(record))
    last = job.folder / "last.pt"
    last.write_bytes(last.read_bytes()[:500])
    code, said = run("--collect")
    assert code == 0 and "left out" in said and "is not a checkpoint" in said and "Traceback" not in said
    assert json.loads((folder / "sinusoid-frequency.json").read_text())["methods"]  # what is recorded stays
    code, said = run()
    assert code == 1 and "is not a checkpoint" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--minutes nan", "expected a number of at least 0"),
        ("--run-minutes -1", "expected a number of at least 0"),
        ("--seeds -1", "expected a whole number of at least 0"),
        ("--jobs 0", "at least 1"),
        ("nothing", "there is no table nothing"),
        ("sinusoid --methods protomaml", "no method protomaml"),
        ("sinusoid --results FILE", "file exists; name a folder"),
        ("sinusoid --folder FILE/runs", "not a directory; name a folder"),
        ("sinusoid --collect --folder FILE", "not a folder"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    file = tmp_path / "file"
    file.write_text("")
    arguments = flags.replace("FILE", str(file)).split()
    if "--results" not in arguments:
        arguments += ["--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        launch(reproduce.main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.count("\n") == 1 and message in said


def test_a_table_names_what_is_not_run_and_not_tested():
    table = TABLES["sinusoid"]
    tests = {test.name: {} for test in table.tests}
    runs = {"maml": [{"tests": tests}], "anil": [{"tests": tests}, {"tests": {}}]}
    record = {"methods": {method: {"runs": of} for method, of in runs.items()}}
    others = "fomaml, boil, reptile, meta-sgd, maml++, imaml, cavia"
    assert reproduced.lacking(table, record) == (
        f" Not run: {others}. Not tested in all columns, or not all seeds: anil."
    )


def test_runs_that_are_not_tested_yet_have_no_picture():
    record = {"methods": {"maml": {"published": {}, "runs": [{"tests": {}}]}}}
    assert table_figures.errors_figure(TABLES["sinusoid"], record, table_figures.THEMES["light"]) is None


def test_an_axis_begins_above_what_lies_far_below_all_others():
    assert table_figures.left_end([24.6, 75.0, 90.0, 91.0, 99.0]) == 75.0
    assert table_figures.left_end([70.0, 75.0, 90.0, 91.0, 99.0]) == 70.0
    assert table_figures.left_end([20.0, 90.0]) == 20.0


def test_a_run_that_is_stopped_saves_what_it_has(tmp_path):
    stop, run = threading.Event(), tmp_path / "run"

    def once_it_trains() -> None:
        while not list(run.glob("events*")):
            time.sleep(0.1)
        time.sleep(1)
        stop.set()

    threading.Thread(target=once_it_trains, daemon=True).start()
    work = reproduce.Work(until=math.inf, run_minutes=math.inf, jobs=2, stop=stop)
    flags = [
        "--meta-batch-size",
        "2",
        "--iterations",
        "1000000",
        "--val-every",
        "1000000",
        "--compile",
        "off",
    ]
    code, _ = work.command([*flags, "--checkpoint-path", str(tmp_path), "--run-name", "run"], math.inf)
    assert code == reproduce.STOPPED
    assert 0 < load_checkpoint(run / "last.pt").iteration < 1_000_000
