"""The benchmarks: their flags, the words for their numbers, and how runs are repeated and recorded."""

import importlib
import re
import shlex
import shutil
import signal
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
from harness import call_main, launch, read_json
from jobs import Run
from table_text import find_row, judge, quote
from tables import README, TABLES

from commands.call import check_call
from commands.parser import parse
from commands.resolve import resolve, resolve_from
from evaluation.meta_test import Evaluation
from evaluation.tables import evaluation_record, write_json

RECORDS = {name: record for name, table in TABLES.items() if (record := reproduce.read_record(table))}
FREQUENCY, SINUSOID, OMNIGLOT = (TABLES[n] for n in ("sinusoid-frequency", "sinusoid", "omniglot-5way-1shot"))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_flags_of_every_method_are_valid(table):
    columns = table.columns.values()
    for method, flags in table.methods.items():
        trained = resolve(parse(f"{table.flags} {flags}".split()))
        for test in table.tests:
            settings = parse(Run(table, method, 0, Path()).testing(test))
            other = check_call(settings).eval_dataset
            tested = resolve_from(trained, settings, evaluate=True, eval_dataset=other).evaluation
            steps = [column.steps for column in columns if column.test == test]
            assert tested.eval_steps >= max([*steps, trained.evaluation.test_steps])
    assert {column.test for column in columns} - {""} == {*table.tests}
    words = {"source", "note", "required"}
    for method, about in table.published.items():
        assert method in (*table.methods, *table.baselines) and about.keys() <= words | table.columns.keys()


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
    order = [(run.table.name, run.method, run.seed) for run in reproduce.list_runs(options)]
    assert order[:4] == [*((table.name, "maml", 0) for table in options.tables), (order[0][0], "maml++", 0)]
    assert {seed for name, _, seed in order if "20way" in name} == {0} and len({*order}) == len(order)
    assert [t.name for t in reproduce.parse_arguments(["sinusoid", "sinusoid"]).tables] == ["sinusoid"]


def test_an_initialisation_is_tested_on_its_own_data_and_on_other_data(tmp_path):
    table = TABLES["icons-5way-1shot"]
    for method, own, other in (("maml", "icons", "omniglot"), ("maml, from omniglot", "omniglot", "icons")):
        run = Run(table, method, 0, tmp_path)
        assert "--eval-dataset" not in run.testing(f"on {own}")
        assert ("--baselines" in run.testing(f"on {own}")) is (method == "maml")
        assert run.test_flags(f"on {other}")[-2:] == ["--eval-dataset", other]


# ---- from numbers to words -----------------------------------------------------------------------


def row(mean: float | None, runs: int = 1, interval: float | None = None, **more: object) -> dict:
    numbers = {"steps": 0, "runs": runs, "mean": mean, "lowest": mean, "highest": mean}
    return numbers | {"interval_95_over_tasks": interval} | more


def run_of(iteration: int = 90, failure: str | None = None) -> dict:
    return {
        "iteration": iteration,
        "iterations": 90,
        "failure": failure,
        "final_training_loss": {"mean": 0.25},
    }


def test_a_column_is_read_from_its_steps_and_normalisation_alone():
    rows = {"transductive": [row(0.5, steps=1), row(0.6, steps=3)], "inductive": [row(0.4, steps=3)]}
    tests = {"1 a class": {"results": rows, "test_steps": 3}}
    entry = {"runs": [run_of()], "tests": tests}
    assert find_row(OMNIGLOT, "1 query, transductive", entry)["mean"] == 0.6
    assert find_row(OMNIGLOT, "1 query, inductive", entry)["mean"] == 0.4
    assert find_row(OMNIGLOT, "1 query, per-step statistics", entry) is None
    assert find_row(OMNIGLOT, "15 queries, transductive", entry) is None
    assert find_row(TABLES["assignment"], "the last 500 tasks", entry)["mean"] == 0.25
    tests["K = 5"] = tests["1 a class"]
    assert find_row(FREQUENCY, "K = 5, 1 step", entry)["mean"] == 0.5
    tests["K = 5"] = {"results": {"transductive": [row(0.7)]}, "test_steps": 3}  # it does not adapt
    assert find_row(FREQUENCY, "K = 5, 1 step", entry)["mean"] == 0.7


@pytest.mark.parametrize(
    ("table", "ours", "published", "words"),
    [
        (OMNIGLOT, row(0.986, 3, 0.001), "98.5 ±0.4", "**met**"),
        (OMNIGLOT, row(0.982, 3, 0.004), "98.5", "not met, by 0.30, within its interval"),
        (OMNIGLOT, row(0.982, 3, 0.002), "98.5", "not met, by 0.30"),
        (OMNIGLOT, row(0.982, 3), "98.5", "not met, by 0.30"),
        (OMNIGLOT, row(0.986, 1, 0.004), "98.5", "reached by a single run"),
        (OMNIGLOT, row(0.982, 1, 0.004), "98.5", "short by 0.30, within its interval"),
        (OMNIGLOT, row(0.986, 2, 0.004), "98.5", "reached by 2 seeds of 3"),
        (OMNIGLOT, row(0.97, 1, 0.004), "98.5", "short by 1.50"),
        (SINUSOID, row(0.3, 5), "0.35", "**met**"),
        (SINUSOID, row(0.3, 4), "0.35", "reached by 4 seeds of 5"),
        (SINUSOID, row(2e7, 5, 3.9e7), "0.35", "not met, by 2e7, within its interval"),
        (SINUSOID, row(4e15, 5, mean_without_diverged=0.3), "0.35", "not met, by 4e15"),
        (SINUSOID, row(None, 5, mean_without_diverged=0.3), "0.35", "not met, not finite"),
    ],
)
def test_only_all_seeds_meet_a_published_number_and_never_without_their_diverged_tasks(
    table, ours, published, words
):
    assert judge(table, published, ours, [run_of()] * ours["runs"]) == words


def test_only_finished_runs_meet_a_published_number():
    assert judge(SINUSOID, "0.35", row(0.3, 5), [run_of()] * 4 + [run_of(50)]) == "reached by 5 seeds of 5"


def test_the_first_number_is_the_mean_over_all_tasks():
    without = {"diverged_tasks": 68, "mean_without_diverged": 0.6, "interval_95_without_diverged": 0.05}
    large = row(2.5e16, 1, 4e16, **without)
    assert quote(SINUSOID, large) == "2.5e16 ±4e16; 0.600 ±0.050 without 68 diverged"
    assert quote(SINUSOID, row(None, **without)) == "not finite; 0.600 ±0.050 without 68 diverged"
    assert quote(SINUSOID, row(0.5, 2, 0.01) | {"highest": 0.6}) == "0.500 ±0.010 (0.500 to 0.600)"
    assert quote(SINUSOID, row(0.0011, 1, 0.0002)) == "0.0011 ±0.0002"
    assert quote(OMNIGLOT, row(0.9633, 1, 0.0016)) == "96.33 ±0.16"


def test_unfinished_and_failed_runs_are_marked():
    def line(*runs: dict) -> str:
        results = {"transductive": [row(2.0, len(runs), steps=1)]}
        entry = {"runs": [*runs], "tests": {"K = 5": {"results": results, "test_steps": 1}}}
        return table_text.summary({FREQUENCY.name: {"maml": entry}}).splitlines()[-1]

    assert "| short by 0.870 (single run) |" in line(run_of())
    assert "(single run, 50 of 90 iterations, ended by non-finite numbers in 1 of 1)" in line(
        run_of(50, "NaN")
    )
    assert "(2 seeds, 50 to 90 of 90 iterations, ended" in line(run_of(), run_of(50, "NaN"))
    assert "1.13" not in line(run_of(20))  # not a quarter of its way


def test_each_test_has_a_table_of_its_own_and_small_ones_share_one():
    first, *others = table_text.format_tables(
        SINUSOID, RECORDS["sinusoid"], SINUSOID.columns, with_published=True
    )
    assert [text.splitlines()[0].count("K = 5") for text in (first, *others)] == [3, 0, 0]
    maml, published = first.splitlines()[2:4]
    assert maml.startswith("| **maml** | 0.") and maml.endswith(" | 5 |")
    assert published == "| *Finn et al. 2017, table 2* | 0.67 | 0.38 | 0.35 |  |"
    shared = TABLES["omniglot-one-training"]
    tables = table_text.format_tables(shared, RECORDS[shared.name], shared.columns)
    assert [text.splitlines()[0].count("-shot, ") for text in tables] == [4, 4]


def test_the_pages_say_what_the_records_say():
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for mark, words in table_text.render_marks(text, RECORDS).items():
            assert f"<!-- {mark} -->\n{words}<!-- /{mark} -->" in text
            shown.add(mark)
    assert {*RECORDS, "published", "published: README"} <= shown
    assert len(table_text.summary(RECORDS, README).splitlines()) == 12  # ten rows
    for name, record in RECORDS.items():
        for method in record.keys() & TABLES[name].methods.keys():
            for run in record[method]["runs"]:
                assert run["trained_by"] == Run(TABLES[name], method, run["seed"], Path()).trained_by
        text = table_text.table_text(TABLES[name], record)
        assert text == (reproduce.TABLE_RESULTS / f"{name}.md").read_text()


# ---- from runs to numbers ------------------------------------------------------------------------


@pytest.fixture
def _no_checkpoints(monkeypatch):
    monkeypatch.setattr(jobs, "load_checkpoint", lambda *_, **__: SimpleNamespace(settings={}))


def write_run(run: Run, iteration: int, losses: np.ndarray | None = None, trained_by: str = "") -> None:
    """Write the files of a run; with losses, `[tasks, steps + 1]`, those of its tests."""
    progress = {"iterations": 90, "iteration": iteration, "best_iteration": iteration}
    progress |= {"failure": None, "final_training_loss": None}
    run.folder.mkdir(parents=True, exist_ok=True)
    write_json(run.folder / "training.json", progress)
    ledger = {"trained_by": trained_by or run.trained_by, "seconds": 1.0, "machine": "here"}
    write_json(run.folder / "reproduce.json", ledger)
    for test in run.table.tests if losses is not None else ():
        result = {"command": shlex.join(["main.py", *run.testing(test)]), "iteration": iteration, "tasks": 40}
        result |= {"test_steps": 1, "device": "cpu", "versions": {"torch": "2"}, "compiled": True}
        file = run.folder / f"test {test}" / "result.json"
        file.parent.mkdir(exist_ok=True)
        write_json(file, result | evaluation_record(Evaluation({"transductive": torch.tensor(losses)}, {})))


@pytest.mark.usefixtures("_no_checkpoints")
def test_only_runs_of_the_same_command_with_tests_of_the_present_checkpoint_count(tmp_path):
    run, losses = Run(FREQUENCY, "maml", 0, tmp_path), np.ones((40, 2))
    assert not jobs.summarise_runs(FREQUENCY, "maml", [run])
    write_run(run, 50, losses, "python main.py --of-another-command")
    assert not jobs.summarise_runs(FREQUENCY, "maml", [run])
    write_run(run, 50, losses)
    assert jobs.summarise_runs(FREQUENCY, "maml", [run])["runs"][0]["iteration"] == 50
    write_run(run, 60)
    assert not jobs.summarise_runs(FREQUENCY, "maml", [run])


@pytest.mark.usefixtures("_no_checkpoints")
def test_a_record_stays_until_there_are_more_seeds_or_further_ones(tmp_path):
    flags = ["sinusoid-frequency", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    options = reproduce.parse_arguments(flags)

    def recorded(*iterations: int) -> list[int]:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        for seed, iteration in enumerate(iterations):
            write_run(Run(FREQUENCY, "maml", seed, options.folder), iteration, np.ones((40, 11)))
        assert reproduce.write_table(FREQUENCY, options)
        entry = reproduce.read_record(FREQUENCY, options.results)["maml"]
        return [run["iteration"] for run in entry["runs"]]

    assert recorded(50) == recorded(40) == recorded() == [50]
    assert recorded(40, 40) == [40, 40] == recorded(90)
    assert recorded(90, 90, 40) == [90, 90]  # one has begun


@pytest.mark.usefixtures("_no_checkpoints")
def test_the_interval_of_several_seeds_is_that_of_each_tasks_mean_over_them(tmp_path):
    losses = np.random.default_rng(0).uniform(0.5, 1.5, (3, 40, 2))  # [seeds, tasks, steps + 1]
    losses[1, 7, 1] = 1e6
    seeds = [Run(FREQUENCY, "maml", seed, tmp_path) for seed in range(3)]
    for run, values in zip(seeds, losses, strict=True):
        write_run(run, 90, values)
    entry = jobs.summarise_runs(FREQUENCY, "maml", seeds)
    assert entry["tests"]["K = 5"]["conditions"] == ["cpu, torch 2, compiled"]
    ours = find_row(FREQUENCY, "K = 5, 1 step", entry)
    of_tasks, of_seeds = losses[:, :, 1].mean(0), losses[:, :, 1].mean(1)
    assert ours["mean"] == pytest.approx(of_seeds.mean()) and ours["diverged_tasks"] == 1
    assert [ours["lowest"], ours["highest"]] == pytest.approx([of_seeds.min(), of_seeds.max()])
    assert ours["interval_95_over_tasks"] == pytest.approx(1.96 * of_tasks.std(ddof=1) / 40**0.5)
    of_tasks[7] = losses[[0, 2], 7, 1].mean()
    assert ours["mean_without_diverged"] == pytest.approx(of_tasks.mean(), rel=1e-5)
    assert ours["interval_95_without_diverged"] == pytest.approx(
        1.96 * of_tasks.std(ddof=1) / 40**0.5, rel=1e-5
    )


@pytest.mark.slow
def test_the_command_of_a_table_writes_it_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    flags = ["sinusoid-frequency", "--quick", "--methods", "maml", "--folder", str(tmp_path / "runs")]
    flags += ["--results", str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags, "--minutes", "0"])
    assert reproduce.main() == 0 and "not begun" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *flags])
    assert reproduce.main() == 0 and "iteration 300 of 300" in capsys.readouterr().out
    results = tmp_path / "results-quick"
    entry = read_json(results / FREQUENCY.name / "maml.json")
    assert {k: test["tasks"] for k, test in entry["tests"].items()} == {f"K = {k}": 100 for k in (5, 10, 20)}
    assert (entry["settings"]["seed"], entry["settings"]["iterations"]) == (0, 300)
    text = (results / f"{FREQUENCY.name}.md").read_text()
    assert " | 1 (single run) |\n" in text and "| **maml** | 300 | " in text
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
    assert code == 128 + signal.SIGTERM
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
    monkeypatch.setattr(reproduce, "train_and_test", lambda options: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as ended:
        launch(reproduce.main)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1 and message in errors
