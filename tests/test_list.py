"""The list of runs, and results.csv, from which it has their tests."""

import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from runs import command, read_csv, stop_at, train

from commands.runs import ListedRun, sort_runs
from evaluation.ledger import RESULTS, SAME, add_result, quote_result, read_results
from evaluation.meta_test import Evaluation
from training.checkpoint import load_checkpoint
from training.folders import BEST, LAST

SHORT = ["--iterations", 8, "--val-every", 4, "--meta-batch-size", 2, "--compile", "off"]
TEST = ["--eval", "--eval-tasks", 4, "--eval-steps", 2]


def rows_of(folder: Path) -> list[dict[str, str]]:
    text = (folder / RESULTS).read_text()
    assert text.count("checkpoint,") == 1  # one header
    return read_results(folder / RESULTS)


# ---- results.csv ---------------------------------------------------------------------------------


def test_an_evaluation_is_a_row_which_its_repetition_replaces(tmp_path):
    run = train(tmp_path / "run", *SHORT)
    assert command(*TEST, "--load", run) == 0
    (first,) = rows_of(tmp_path)
    numbers = [first[name] for name in ("checkpoint", "measure", "tasks", "shots")]
    assert numbers == ["run/best.pt", "MSE", "4", "10"]
    assert float(first["result"]) > 0 and float(first["interval_95"]) > 0
    assert command(*TEST, "--load", run, "-k", 5) == 0
    assert command(*TEST, "--load", run, "--test-steps", 2) == 0
    text = (tmp_path / RESULTS).read_text().replace(",command", ",command,remark", 1)
    (tmp_path / RESULTS).write_text(text)  # a column of the user's
    assert command("--load", run / LAST, "--iterations", 12) == 0
    assert command(*TEST, "--load", run) == 0
    rows = rows_of(tmp_path)
    assert [(row["shots"], row["steps"]) for row in rows] == [("5", "1"), ("10", "2"), ("10", "1")]
    assert rows[-1]["command"].startswith("main.py --eval") and rows[-1]["remark"] == ""
    assert rows[-1]["iteration"] == str(load_checkpoint(run / BEST).iteration)


def test_rows_are_written_where_the_runs_are_or_in_out(tmp_path, monkeypatch):
    train(tmp_path / "a" / "many", *SHORT, "--seeds", "0-1")
    assert command(*TEST, "--load", tmp_path / "a" / "many") == 0
    checkpoints = [row["checkpoint"] for row in rows_of(tmp_path / "a")]
    assert checkpoints == ["many/seed-0/best.pt", "many/seed-1/best.pt"]
    monkeypatch.chdir(tmp_path / "a" / "many" / "seed-0")
    assert command(*TEST, "--load", "best.pt", "-k", 5) == 0
    assert rows_of(tmp_path / "a")[-1]["checkpoint"] == "many/seed-0/best.pt"
    assert command(*TEST, "--load", "best.pt", "--out", tmp_path / "out") == 0
    (row,) = rows_of(tmp_path / "out")
    assert row["checkpoint"] == (tmp_path / "a/many/seed-0/best.pt").as_posix()
    assert command(*TEST, "--checkpoint-path", tmp_path / "b") == 0
    assert rows_of(tmp_path / "b")[0]["checkpoint"].startswith("fresh-mlp-paper-seed0")


@pytest.mark.parametrize("normalisation", ["transductive", "inductive"])
def test_a_row_quotes_the_result_as_trained_and_the_inductive_one_where_it_differs(normalisation):
    losses = {
        name: torch.full((3, 2), value) for name, value in {"transductive": 1.0, "inductive": 2.0}.items()
    }
    row = quote_result(Evaluation({"loss": losses}), normalisation, 1)
    assert row["result"] == losses[normalisation][0, 0]
    assert row.get("inductive_result") == {"transductive": 2.0}.get(normalisation)


def test_evaluations_at_once_lose_no_row(tmp_path):
    rows = [dict.fromkeys(SAME, "") | {"checkpoint": f"{n}/best.pt", "result": n / 3} for n in range(40)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: add_result(tmp_path / RESULTS, row), rows))
    assert {row["checkpoint"] for row in rows_of(tmp_path)} == {row["checkpoint"] for row in rows}


# ---- the list ------------------------------------------------------------------------------------


def listed(folder: Path, *flags: object) -> dict[str, dict[str, str]]:
    """Return the rows of --csv by the names of the runs."""
    file = folder / "new" / "list.csv"
    assert command("--list", folder, "--csv", file, *flags) == 0
    header, *rows = read_csv(file)
    return {row[0]: dict(zip(header, row, strict=True)) for row in rows}


def test_runs_are_listed_with_their_results_and_sorted_by_them(tmp_path, capsys):
    good = train(tmp_path / "good", *SHORT, "--inner-lr", 0.01)
    train(tmp_path / "grid", *SHORT, "--sweep", "meta-lr=0.1,0.001")
    with pytest.MonkeyPatch.context() as patch:
        stop_at(5, patch)
        assert command(*SHORT, "--checkpoint-path", tmp_path, "--run-name", "stopped") == 130
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / LAST).write_text("no checkpoint")
    assert command(*TEST, "--load", good) == 0
    assert command(*TEST, "--load", good, "-k", 5) == 0  # other tasks than those of its training
    capsys.readouterr()
    rows = listed(tmp_path, "--sort", "validation")
    out, error = capsys.readouterr()
    assert f"{tmp_path / 'broken' / LAST} is damaged" in error
    header, *lines, _ = out.splitlines()
    assert header.split()[:6] == ["name", "dataset", "tasks", "algorithm", "seed", "iterations"]
    assert [*rows] == [line.split()[0] for line in lines]
    assert {*rows} == {"good", "grid/meta-lr-0.001_seed-0", "grid/meta-lr-0.1_seed-0", "stopped"}
    losses = [float(row["validation"]) for row in rows.values()]
    assert losses == sorted(losses)
    best = load_checkpoint(good / BEST).progress["best_score"]
    assert float(rows["good"]["validation"]) == pytest.approx(-best)
    (test,) = (row for row in rows_of(tmp_path) if row["shots"] == "10")
    assert (rows["good"]["test"], rows["good"]["interval_95"]) == (test["result"], test["interval_95"])
    assert f"{float(test['result']):.4f} ± " in out
    stopped = rows["stopped"]
    assert (stopped["iterations"], stopped["planned"], stopped["test"]) == ("5", "8", "") and "5 of 8" in out


def test_a_run_is_listed_with_the_test_of_what_it_is_now(tmp_path):
    many = train(tmp_path / "many", *SHORT, "--seeds", "0-1")
    run = many / "seed-1"
    assert command(*TEST, "--load", run / LAST) == 0

    def tests_of(folder: Path) -> dict[str, str]:
        return {name: row["test"] for name, row in listed(folder).items()}

    result = rows_of(tmp_path)[0]["result"]
    assert tests_of(tmp_path) == {"many/seed-0": "", "many/seed-1": result}
    assert tests_of(many) == {"seed-0": "", "seed-1": result}  # results.csv is above it
    assert tests_of(run) == {"seed-1": result}
    assert command("--load", run / LAST, "--iterations", 12) == 0
    assert tests_of(run) == {"seed-1": ""}
    assert command(*TEST, "--load", run / BEST) == 0
    assert tests_of(run) == {"seed-1": rows_of(tmp_path)[-1]["result"]}


def test_a_run_of_several_labels_is_listed_with_its_accuracy(tmp_path):
    rows = [f"{group},{x},{x % 2},{x % 3 // 2}" for group in range(12) for x in range(8)]
    (tmp_path / "labels.csv").write_text("\n".join(["task,x,a,b", *rows]))
    data = ["--dataset", f"table:{tmp_path / 'labels.csv'}", "--columns", "target=a,b", "-k", 2, "-q", 2]
    run = train(tmp_path / "run", *SHORT, *data, "--loss", "bce")
    assert command(*TEST, "--load", run) == 0
    (row,) = listed(tmp_path).values()
    assert row["measure"] == "accuracy" and 0 <= float(row["test"]) <= 1


def test_accuracies_come_highest_first_and_runs_without_a_result_last():
    accuracies = (0.5, None, 0.9, math.nan)
    runs = [
        ListedRun(str(n), "", "", "", 0, 0, 0, "accuracy", True, value, None, None, "")
        for n, value in enumerate(accuracies)
    ]
    assert [run.name for run in sort_runs(runs, "validation")] == ["2", "0", "1", "3"]


def test_mistakes_are_one_line(tmp_path, refuse):
    assert "none: there is no such folder" in refuse("--list", tmp_path / "none")
    assert "--seed has no meaning with --list" in refuse("--list", tmp_path, "--seed", 3)
    assert "did you mean validation?" in refuse("--list", tmp_path, "--sort", "valid")
    assert f"{tmp_path}: is a directory" in refuse("--list", tmp_path, "--csv", tmp_path)
    assert "--csv needs --list" in refuse("--csv", tmp_path / "list.csv")
    (tmp_path / RESULTS).write_bytes(b"checkpoint\n\xff\xfe\n")
    assert "results.csv is damaged" in refuse("--list", tmp_path)
