"""The benchmarks: their flags, the words for their numbers, and how runs are repeated and recorded."""

import importlib
import math
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gpu
import pages
import pytest
import reproduce
import torch
from conftest import ROOT
from harness import UsageError, call_main, launch, read_json
from pages import find_row, judge, quote
from reproduce import Job
from tables import README, TABLES

from commands.call import check_call
from commands.parser import parse
from commands.resolve import resolve, resolve_from
from evaluation.tables import write_json

RECORDS = {name: record for name, table in TABLES.items() if (record := reproduce.read_records(table))}
FREQUENCY, SINUSOID, OMNIGLOT = (TABLES[n] for n in ("sinusoid-frequency", "sinusoid", "omniglot-5way-1shot"))


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_the_flags_of_every_method_are_valid(table):
    columns = table.columns.values()
    for method in table.methods:
        trained = resolve(parse(table.flags_of(method).split()))
        for test in table.tests:
            settings = parse(["--eval", "--load", "run", *table.test_flags(test, method)])
            other = check_call(settings).eval_dataset
            tested = resolve_from(trained, settings, evaluate=True, eval_dataset=other).evaluation
            steps = [column.steps for column in columns if column.test == test]
            assert tested.eval_steps >= max([*steps, trained.evaluation.test_steps])
    assert {column.test for column in columns} - {""} == {*table.tests}
    words = {"source", "note"}
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
    jobs = [*reproduce.list_jobs(options)]
    order = [(job.table.name, job.method) for job in jobs]
    assert order[:4] == [*((table.name, "maml") for table in options.tables), (order[0][0], "maml++")]
    assert len({*order}) == len(order)
    assert {len(job.seeds) for job in jobs if "20way" in job.table.name} == {1}
    assert [t.name for t in reproduce.parse_arguments(["sinusoid", "sinusoid"]).tables] == ["sinusoid"]


def test_an_initialisation_is_tested_on_its_own_data_and_on_other_data():
    table = TABLES["icons-5way-1shot"]
    for method, own, other in (("maml", "icons", "omniglot"), ("maml, from omniglot", "omniglot", "icons")):
        flags = table.test_flags(f"on {own}", method)
        assert "--eval-dataset" not in flags and ("--baselines" in flags) is (method == "maml")
        assert table.test_flags(f"on {other}", method)[-2:] == ["--eval-dataset", other]


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
    tests = {"1 query per class": {"results": rows, "test_steps": 3}}
    entry = {"runs": [run_of()], "tests": tests}
    assert find_row(OMNIGLOT, "1 query, transductive", entry)["mean"] == 0.6
    assert find_row(OMNIGLOT, "1 query, inductive", entry)["mean"] == 0.4
    assert find_row(OMNIGLOT, "1 query, per-step statistics", entry) is None
    assert find_row(OMNIGLOT, "15 queries, transductive", entry) is None
    assert find_row(TABLES["assignment"], "the last 500 tasks", entry)["mean"] == 0.25
    tests["K = 5"] = tests["1 query per class"]
    assert find_row(FREQUENCY, "K = 5, 1 step", entry)["mean"] == 0.5
    tests["K = 5"] = {"results": {"transductive": [row(0.7)]}, "test_steps": 3}  # it does not adapt
    assert find_row(FREQUENCY, "K = 5, 1 step", entry)["mean"] == 0.7


@pytest.mark.parametrize(
    ("table", "ours", "published", "words"),
    [
        (OMNIGLOT, row(0.986, 3, 0.001), "98.5 ±0.4", "**met** (3 seeds)"),
        (OMNIGLOT, row(0.982, 3, 0.004), "98.5", "not met, by 0.30, within its interval (3 seeds)"),
        (OMNIGLOT, row(0.982, 3, 0.002), "98.5", "not met, by 0.30 (3 seeds)"),
        (OMNIGLOT, row(0.982, 3), "98.5", "not met, by 0.30 (3 seeds)"),
        (OMNIGLOT, row(0.986, 1, 0.004), "98.5", "reached (a single run)"),
        (OMNIGLOT, row(0.982, 1, 0.004), "98.5", "short by 0.30, within its interval (a single run)"),
        (OMNIGLOT, row(0.986, 2, 0.004), "98.5", "reached (2 seeds of 3)"),
        (OMNIGLOT, row(0.97, 1, 0.004), "98.5", "short by 1.50 (a single run)"),
        (SINUSOID, row(0.3, 5), "0.35", "**met** (5 seeds)"),
        (SINUSOID, row(0.3, 4), "0.35", "reached (4 seeds of 5)"),
        (SINUSOID, row(2e7, 5, 3.9e7), "0.35", "not met, by 2e7, within its interval (5 seeds)"),
        (SINUSOID, row(4e15, 5, mean_without_diverged=0.3), "0.35", "not met, by 4e15 (5 seeds)"),
        (SINUSOID, row(None, 5, mean_without_diverged=0.3), "0.35", "not met, not finite (5 seeds)"),
    ],
)
def test_only_all_seeds_meet_a_published_number_and_never_without_their_diverged_tasks(
    table, ours, published, words
):
    assert judge(table, published, ours, [run_of()] * ours["runs"]) == words


def test_only_finished_runs_meet_a_published_number():
    assert (
        judge(SINUSOID, "0.35", row(0.3, 5), [run_of()] * 4 + [run_of(50)])
        == "reached (5 seeds, 50 to 90 of 90 iterations)"
    )


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
        return pages.summary({FREQUENCY.name: {"maml": entry}}).splitlines()[-1]

    assert "| short by 0.870 (a single run) |" in line(run_of())
    assert "(a single run, 50 of 90 iterations, ended by non-finite numbers in 1 of 1)" in line(
        run_of(50, "NaN")
    )
    assert "(2 seeds of 5, 50 to 90 of 90 iterations, ended" in line(run_of(), run_of(50, "NaN"))
    assert "1.13" not in line(run_of(20))  # not a quarter of its way


def test_a_table_has_few_columns_side_by_side():
    titles = [*SINUSOID.columns]
    first, *others = pages.format_tables(SINUSOID, RECORDS["sinusoid"], titles)
    assert [text.splitlines()[0].count("K = 5") for text in (first, *others)] == [3, 0, 0]
    maml, published = first.splitlines()[2:4]
    assert maml.startswith("| **maml** | 0.") and maml.endswith(" | 5 |")
    assert published == "| *Finn et al. 2017, table 2* | 0.67 | 0.38 | 0.35 |  |"
    wide = TABLES["omniglot-one-training"]
    tables = pages.format_tables(wide, RECORDS[wide.name], [*wide.columns])
    assert [text.splitlines()[0].count("-shot, ") for text in tables] == [4, 4]


def test_the_pages_say_what_the_records_say():
    shown = set()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for mark, words in pages.render_marks(text, RECORDS).items():
            assert f"<!-- {mark} -->\n{words}<!-- /{mark} -->" in text
            shown.add(mark)
    assert {*RECORDS, "published", "published: README"} <= shown
    assert len(pages.summary(RECORDS, README).splitlines()) == 12  # ten rows
    for name, record in RECORDS.items():
        for method in record.keys() & TABLES[name].methods.keys():
            assert record[method]["flags"] == TABLES[name].flags_of(method)
        assert all(entry["tests"].keys() <= TABLES[name].tests.keys() for entry in record.values()), name
        text = pages.table_text(TABLES[name], record)
        assert text == (reproduce.RECORDS / f"{name}.md").read_text()
        picture = reproduce.RECORDS / f"{name}.png"
        assert picture.is_file() == TABLES[name].has_picture


# ---- from runs to numbers ------------------------------------------------------------------------


@pytest.fixture
def _no_checkpoints(monkeypatch):
    def load(file: Path, *, weights: bool) -> SimpleNamespace:
        return SimpleNamespace(settings={}, iteration=int(file.read_text()))

    monkeypatch.setattr(reproduce, "load_checkpoint", load)


def write_runs(job: Job, iterations: Sequence[int], flags: str = "") -> None:
    """Write the files of runs from seed 0 on, which end at these of 90 iterations, and of their tests."""
    runs = [{"name": f"seed-{seed}", "seed": seed} for seed in range(len(iterations))]
    for run, iteration in zip(runs, iterations, strict=True):
        progress = {"iterations": 90, "iteration": iteration, "best_iteration": iteration}
        progress |= {"failure": None, "final_training_loss": None}
        (job.folder / run["name"]).mkdir(parents=True)
        write_json(job.folder / run["name"] / "training.json", progress)
        (job.folder / run["name"] / "last.pt").write_text(str(iteration))
    write_json(job.folder / "runs.json", {"runs": runs})
    times = {str(run["seed"]): {"seconds": 4.0, "machine": "here"} for run in runs}
    ledger = {"flags": flags or job.table.flags_of(job.method), "seeds": times}
    write_json(job.folder / "reproduce.json", ledger)
    without = {"mean_without_diverged": 1.0, "interval_95_without_diverged": None}
    rows = [row(1.0, len(iterations), steps=steps, **without) for steps in range(11)]
    about = {"tasks": 40, "test_steps": 1, "device": "cpu", "versions": {"torch": "2"}, "compiled": True}
    about["runs"] = [run | {"iteration": n} for run, n in zip(runs, iterations, strict=True)]
    for test in job.table.tests:
        job.out(test).mkdir()
        write_json(job.out(test) / "test-40tasks.json", {"settings": {"all": rows}} | about)
        baselines = {"over_runs": dict.fromkeys(job.table.baselines, rows[:1]), "runs": about["runs"]}
        write_json(job.out(test) / "test-40tasks-baselines.json", baselines)


@pytest.mark.usefixtures("_no_checkpoints")
def test_a_record_is_what_the_runs_and_their_tests_say(tmp_path):
    job = Job(SINUSOID, SINUSOID.measured_with, (0, 1), tmp_path)
    assert not job.record()
    write_runs(job, (90, 90))
    entry, oracle = job.record(), job.record("oracle")
    assert entry["runs"][1] == {
        **dict(zip(reproduce.FACTS, (90, 90, 90, None, None), strict=True)),
        **{"seed": 1, "seconds": 4.0, "machine": "here", "versions": {"torch": "2"}},
    }
    assert entry["tests"]["K = 5"]["conditions"] == ["cpu, torch 2, compiled"]
    assert find_row(SINUSOID, "K = 5, 10 steps", entry)["runs"] == 2
    assert oracle["tests"]["K = 5"]["test_steps"] == 0
    assert find_row(SINUSOID, "K = 5, 10 steps", oracle)["steps"] == 0
    baselines = job.out("K = 20") / "test-40tasks-baselines.json"
    content = baselines.read_text()
    baselines.unlink()  # killed while it measured them
    assert job.record() == entry and not job.record("oracle")
    baselines.write_text(content)
    (job.folder / "seed-1" / "training.json").unlink()  # killed before it was written
    assert not job.record() and "; not tested before the others" in job.test()
    shutil.rmtree(job.folder)
    write_runs(job, (90, 90), "--iterations 5")
    assert not job.record()
    shutil.rmtree(job.folder)
    write_runs(job, (90, 90))
    progress = read_json(job.folder / "seed-0" / "training.json") | {"best_iteration": 60}
    write_json(job.folder / "seed-0" / "training.json", progress)  # the tests are of another checkpoint
    assert not job.record()
    assert not Job(SINUSOID, "maml", (0,), tmp_path).record()


@pytest.mark.usefixtures("_no_checkpoints")
def test_a_record_stays_until_there_are_more_seeds_or_further_ones(tmp_path):
    flags = ["sinusoid-frequency", "--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    options = reproduce.parse_arguments(flags)

    def recorded(*iterations: int) -> list[int]:
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        job = Job(FREQUENCY, "maml", (), options.folder)
        if iterations:
            write_runs(job, iterations)
        reproduce.write_records(job, options.results)
        entry = reproduce.read_records(FREQUENCY, options.results)["maml"]
        return [run["iteration"] for run in entry["runs"]]

    assert recorded(50) == recorded(40) == recorded() == [50]
    assert recorded(40, 40) == [40, 40] == recorded(90)


@pytest.mark.usefixtures("_no_checkpoints")
def test_runs_are_tested_when_all_have_ended_and_never_with_other_flags(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(reproduce, "call_main", lambda line, seconds: called.append(line) or (0, ""))
    monkeypatch.setattr(reproduce, "run_main", lambda line: called.append(line[0]))
    images = Job(OMNIGLOT, "maml", (0, 1, 2), tmp_path)
    images.train(math.inf)
    assert images.test() == "not begun"
    assert [line[line.index("--seeds") + 1] for line in called] == ["0", "1", "2"]
    called.clear()
    for ended, tests in (((90, 40), 0), ((90, 90), 2), ((40, 40), 2)):
        job = Job(OMNIGLOT, "fomaml", (0, 1), tmp_path / str(ended))
        write_runs(job, ended)
        for test in OMNIGLOT.tests:
            shutil.rmtree(job.out(test))
        job.test()
        assert called == ["--eval"] * tests
        called.clear()
    curves = Job(FREQUENCY, "maml", (0, 1), tmp_path)
    write_runs(curves, (90, 40))
    curves.train(math.inf)
    assert curves.test() == "of seeds 0, 1 have ended: 0; not tested before the others have"
    assert called[0][called[0].index("--seeds") + 1] == "0,1" and len(called) == 1
    other = Job(FREQUENCY, "meta-sgd", (0,), tmp_path)
    write_runs(other, (90,), "--iterations 5")
    with pytest.raises(UsageError, match="was trained with other flags, --iterations 5: remove it"):
        other.train(math.inf)


@pytest.mark.slow
def test_the_command_of_a_table_writes_it_and_repeats_nothing(tmp_path, monkeypatch, capsys):
    short = {"maml": "--iterations 30 --meta-batch-size 2 -k 5 --val-every 15 --compile off"}
    tests = {
        test: f"{flags.partition(' --eval-tasks')[0]} --eval-tasks 100"
        for test, flags in SINUSOID.tests.items()
    }
    table = replace(SINUSOID, flags="--dataset sinusoid", methods=short, tests=tests, measured_with="maml")
    monkeypatch.setitem(TABLES, "sinusoid", table)
    folders = ["--folder", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    monkeypatch.setattr(
        sys, "argv", ["reproduce.py", "sinusoid", *folders, "--seeds", "0", "1", "--minutes", "0"]
    )
    assert reproduce.main() == 0 and ": not begun" in capsys.readouterr().out
    sys.argv = sys.argv[:-2]
    assert (
        reproduce.main() == 0
        and "maml: 30 iterations; of seeds 0, 1 have ended: 0, 1" in capsys.readouterr().out
    )
    entry, oracle = (read_json(tmp_path / "results" / "sinusoid" / f"{n}.json") for n in ("maml", "oracle"))
    assert {k: test["tasks"] for k, test in entry["tests"].items()} == {f"K = {k}": 100 for k in (5, 10, 20)}
    assert (entry["settings"]["seed"], entry["settings"]["iterations"]) == (0, 30)
    assert [run["seed"] for run in oracle["runs"]] == [0, 1]
    text = (tmp_path / "results" / "sinusoid.md").read_text()
    assert "| **maml** | 30 iterations | " in text and f" | `{short['maml']}` |" in text
    assert all(
        f"| **{name}** |" in text for name in ("scratch, sgd", "scratch, adam", "pretrained", "oracle")
    )
    assert (tmp_path / "results" / "sinusoid.png").stat().st_size > 10_000
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")}
    assert reproduce.main() == 0
    assert files == {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")}


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
        ("--seeds -1", "--minutes and --seeds of at least 0"),
        ("nothing", "no table nothing; choose from sinusoid"),
        ("sinusoid --methods protomaml", "no method protomaml"),
        ("sinusoid --results FILE --minutes 0", "exists"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_code_2(flags, message, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    arguments = [*flags.replace("FILE", str(tmp_path / "file")).split(), "--folder", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *arguments])
    monkeypatch.setattr(reproduce, "list_jobs", lambda options: pytest.fail("it runs"))
    with pytest.raises(SystemExit) as ended:
        launch(reproduce.main)
    errors = capsys.readouterr().err
    assert ended.value.code == 2 and errors.count("\n") == 1 and message in errors
