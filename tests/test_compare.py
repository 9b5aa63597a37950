"""--compare: runs are paired on the same tasks and by seed, and refused where they cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import write_classes
from runs import command, read_record

from commands.call import Call
from commands.evaluate import Subject
from training.checkpoint import load_checkpoint
from training.folders import lock_folder

CHOSEN_BY = 4  # validation tasks of a run
TINY = ["-k", 3, "-q", 4, "--meta-batch-size", 2, "--iterations", 6, "--val-every", 2, "--threads", 1]
TINY += ["--eval-tasks", 12, "--eval-steps", 3, "--compile", "off", "--precision", "float64"]
TINY += ["--val-tasks", CHOSEN_BY]
DIGITS = 1e-6  # relative: files have seven


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Make a folder of trained runs."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, *flags: object) -> None:
        assert command(*TINY, "--checkpoint-path", folder, "--run-name", name, *flags) == 0

    train("maml")
    train("fomaml", "--first-order", "--inner-lr", 0.1, "-s", 2)
    train("ridge", "--algorithm", "r2d2", "--eval-steps", 0)
    train("five", "-k", 5)
    train("huber", "--loss", "huber")
    train("grid", "--seeds", "0-2", "--sweep", "inner-lr=0.001,0.1")
    train("seeds", "--seeds", "1-3", "--init", "torch")
    train("late", "--seeds", "7")
    write_classes(folder / "images", 12, 7)
    data = ["--dataset", f"images:{folder / 'images'}", "--image-size", 6, "--channels", 1, "-n", 2]
    train("fc", *data, "--learner", "fc")
    code = "def own(outputs, targets):\n    return (outputs[:, 0] - targets).abs().mean()\n"
    (folder / "own.py").write_text(code)
    own = ["--loss", f"{folder / 'own.py'}:own", "--outputs", "numbers"]
    train("numbers", *data, "--learner", "fc", *own)
    return folder


@pytest.fixture
def compare(place, tmp_path, capsys, monkeypatch):
    """Compare runs of the folder; return the record, and what was printed."""
    monkeypatch.chdir(place)

    def compared(*arguments: object) -> tuple[dict, str]:
        capsys.readouterr()
        assert command("--compare", *arguments, "--out", tmp_path) == 0
        output = capsys.readouterr().out
        file = Path(output.split("Written: ")[1].split(" and")[0])
        assert file.parent == tmp_path and file.with_suffix(".png").is_file()
        return json.loads(file.read_text()), output

    return compared


def difference_in(result: dict, side: int = 1) -> dict:
    return next(iter(result["sides"][side]["results"].values()))["difference"]


def measure(file: Path) -> np.ndarray:
    """Return each validation task's loss after the quoted steps, of the tasks that chose no checkpoint."""
    call = Call(eval=True, load=file)
    subject = Subject.read(file, call, {"eval_tasks": 12})
    subject.build(call)
    subject.evaluate("validation", first_task=CHOSEN_BY)
    return subject.result.losses["transductive"][:, subject.config.evaluation.test_steps].numpy()


# ---- differences ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flag", "steps"), [("fomaml", "--inner-lr", 2), ("ridge", "--head-init", 0)]
)
def test_a_difference_equals_that_of_two_evaluations_on_tasks_that_chose_no_checkpoint(
    compare, place, name, flag, steps
):
    result, output = compare("maml", name)
    one, other = (measure(place / run / "best.pt") for run in (name, "maml"))
    assert difference_in(result)["mean"] == pytest.approx((one - other).mean(), rel=DIGITS)
    assert [side["steps"] for side in result["sides"]] == [1, steps]
    assert (result["split"], result["first_task"], result["tasks"]) == ("validation", CHOSEN_BY, 12)
    assert flag in output and "none of which chose a checkpoint" in output


def test_a_difference_on_test_tasks_equals_that_of_two_evals(compare, place, tmp_path):
    result, _ = compare("maml", "five", "--split", "test", "-k", 5)
    values = []
    for name in ("five", "maml"):
        assert command("--eval", "--load", place / name, "-k", 5, "--out", tmp_path / name) == 0
        per_task = read_record(tmp_path / name)["per_task"]
        values.append(np.array(per_task["loss"]["transductive"]))
    assert result["first_task"] == 0
    mean = (values[0] - values[1])[:, 1].mean()
    assert difference_in(result)["mean"] == pytest.approx(mean, rel=10 * DIGITS, abs=DIGITS)


def test_the_seeds_that_both_have_are_paired(compare, place):
    result, output = compare("seeds", "grid")
    names = [side["name"] for side in result["sides"]]
    assert names == ["seeds", "grid inner-lr-0.001", "grid inner-lr-0.1"]
    by_seed = {
        str(seed): measure(place / f"grid/inner-lr-0.1_seed-{seed}/best.pt")
        - measure(place / f"seeds/seed-{seed}/best.pt")
        for seed in (1, 2)
    }
    measured = difference_in(result, 2)["by_seed"]
    assert measured == {s: pytest.approx(v.mean(), rel=DIGITS) for s, v in by_seed.items()}
    assert "--init" in output and "--inner-lr" in output and "--seed " not in output


def test_best_is_measured_and_curves_cover_the_whole_run(compare, place):
    with lock_folder(place / "maml"):  # it is being trained
        result, _ = compare("maml", "fomaml/last.pt")
    best, last = result["runs"]
    assert best["checkpoint"].endswith("maml/best.pt") and last["checkpoint"].endswith("fomaml/last.pt")
    assert best["iteration"] == load_checkpoint(place / "maml" / "best.pt").iteration
    for name, run in (("maml", best), ("fomaml", last)):
        saved = read_record(place / name, "training.json")
        assert run["curves"] == {part: saved[part] for part in ("training", "validation")}


# ---- names and files -----------------------------------------------------------------------------


def test_sides_are_named_after_their_path_and_setting_and_results_lie_next_to_the_first(
    place, monkeypatch, pictures
):
    monkeypatch.chdir(place)
    line = ["maml", "grid/inner-lr-0.1_seed-0", "maml/last.pt", "grid", "--eval-tasks", 3]
    assert command("--compare", *line) == 0
    (picture,) = place.glob("comparison-*.png")
    file = picture.with_suffix(".json")
    names = [side["name"] for side in json.loads(file.read_text())["sides"]]
    settings = ["grid inner-lr-0.001", "grid inner-lr-0.1"]
    assert names == ["maml", "grid/inner-lr-0.1_seed-0", "maml/last", *settings]
    joined = "maml-vs-grid-inner-lr-0.1_seed-0-vs-maml-last-vs-grid-inner-lr-0.001-vs-grid-inner-lr-0.1"
    assert picture.stem == f"comparison-{joined}-validation-sinusoid-3shot-4query-3tasks"
    file.unlink()
    picture.unlink()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("maml", "name another"),
        ("seeds", "name another"),
        ("maml gone", "there is no such checkpoint"),
        ("maml maml/training.json", "not a checkpoint"),
        ("maml five", "maml (-k 3) and five (-k 5) have different tasks, which cannot be paired: give -k"),
        ("maml huber -k 3", "--loss"),
        ("maml fc", "have different tasks"),
        ("seeds late", "no seed in common"),
        ("maml fomaml maml", "names maml twice"),
        ("maml fomaml --iterations 3", "maml/best.pt: --iterations 3 disagrees"),
        ("fc numbers --loss own.py:own", "is measured by accuracy, and numbers/best.pt, iteration "),
        ("maml fomaml --eval", "--eval"),
        ("maml fomaml --seeds 0-1", "--seeds"),
        ("maml fomaml --out maml/best.pt/x", "not a directory"),
        ("fc fc/last.pt --split test --eval-dataset images:gone", "gone"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused_in_one_line_and_leave_nothing(
    place, monkeypatch, refuse, line, message
):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert message in refuse("--compare", *line.split())
    assert sorted(place.rglob("*")) == before
