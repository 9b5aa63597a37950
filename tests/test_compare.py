"""Runs side by side (--compare): paired on the same tasks, by seed, and refused where they cannot be."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import main
from commands import compare as comparing
from commands import config, measuring
from commands.build import prepare
from common import locks
from training.checkpoint import load_checkpoint

TINY = ["-k", "3", "-q", "4", "--meta-batch-size", "2", "--iterations", "6", "--val-every", "2",
        "--eval-tasks", "12", "--eval-steps", "3", "--compile", "off", "--precision", "float64"]  # fmt: skip
CHOSEN_BY = 4  # validation tasks of a run
DIGITS = 1e-6  # relative: files have seven


def run(*arguments: object) -> int:
    return main.main([str(each) for each in arguments])


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with trained runs."""
    folder = tmp_path_factory.mktemp("runs")
    patch = pytest.MonkeyPatch()
    patch.setattr("training.trainer.VALIDATION_TASKS", CHOSEN_BY)
    patch.setattr("training.run.Run.draw_examples", lambda *_: None)
    patch.setattr("training.run.learning_figure", lambda *_, **__: Figure(figsize=(1, 1)))
    patch.setattr("training.tensorboard._wait_for_a_later_second", lambda folder: None)

    def trained(name: str, *flags: object) -> None:
        assert run(*TINY, "--checkpoint-path", folder, "--run-name", name, *flags) == 0

    trained("maml")
    trained("fomaml", "--first-order", "--inner-lr", "0.1", "-s", "2")
    trained("fomaml-1", "--first-order", "--inner-lr", "0.1", "-s", "2", "--seed", "1")
    trained("longer", "--eval-steps", "5", "--seed", "1")
    trained("five", "-k", "5")
    trained("huber", "--loss", "huber")
    trained("grid", "--seeds", "0-2", "--sweep", "inner-lr=0.001,0.1")
    trained("seeds", "--seeds", "1-3", "--init", "torch")
    trained("late", "--seeds", "7,8")
    random = np.random.default_rng(0)
    for name in range(13):
        images = folder / "images" / f"class-{name:02}"
        images.mkdir(parents=True)
        for each in range(7):
            pixels = random.integers(0, 255, (12, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{each}.png")
    data = ["--dataset", f"images:{folder / 'images'}", "--image-size", "12", "--channels", "1", "-n", "2"]
    trained("batch-norm", *data, "--learner", "fc")
    trained("inductive", *data, "--learner", "fc", "--batch-norm", "inductive")
    yield folder
    patch.undo()


@pytest.fixture
def compare(place, tmp_path, capsys, monkeypatch):
    """Compares runs of the folder; what is written as JSON, and what is said."""
    monkeypatch.chdir(place)
    monkeypatch.setattr("evaluation.paired.figure", lambda *_: Figure(figsize=(3, 3)))

    def compared(*arguments: object) -> tuple[dict, str]:
        capsys.readouterr()
        assert run("--compare", *arguments, "--out", tmp_path) == 0
        said = capsys.readouterr().out
        file = Path(said.split("Written: ")[1].split(" and")[0])
        assert file.parent == tmp_path and file.with_name(f"{file.stem}.png").is_file()
        return json.loads(file.read_text()), said

    return compared


def difference_in(result: dict, side: int = 1) -> dict:
    return next(iter(result["sides"][side]["results"].values()))["difference"]


def measured(file: Path, *, tasks: int, skipped: int) -> np.ndarray:
    """Each validation task's loss after the quoted steps, measured by itself."""
    call = config.check_invocation({"eval": True, "load": file})
    subject = measuring.Subject.read(file, call, {"eval_tasks": tasks})
    runtime = prepare(subject.config, call)
    result = subject.built(call, runtime).measured(runtime, "validation", skipped)
    return result.losses["transductive"][:, subject.config.test_steps].numpy()


def mean_and_interval(values: np.ndarray) -> tuple[float, float]:
    return values.mean(), 1.96 * values.std(ddof=1) / len(values) ** 0.5


# ---- differences ---------------------------------------------------------------------------------


def test_differences_are_those_of_two_separate_evaluations(compare, place):
    result, _ = compare("maml", "fomaml")
    found = difference_in(result)
    one, other = (
        measured(place / name / "best.pt", tasks=12, skipped=CHOSEN_BY) for name in ("fomaml", "maml")
    )
    mean, interval = mean_and_interval(one - other)
    assert found["mean"] == pytest.approx(mean, rel=DIGITS) and mean != 0
    assert found["interval_95_over_tasks"] == pytest.approx(interval, rel=DIGITS)
    assert found["excludes_0"] == (abs(mean) > interval) and found["tasks"] == 12


def test_differences_on_test_tasks_are_those_of_eval(compare, place, tmp_path):
    result, _ = compare("maml", "fomaml", "--split", "test", "-k", 5)
    values = []
    for name in ("fomaml", "maml"):
        out = tmp_path / name
        assert run("--eval", "--load", place / name / "best.pt", "-k", 5, "--out", out) == 0
        (file,) = out.glob("*.json")
        values.append(np.array(json.loads(file.read_text())["per_task"]["loss"]["transductive"]))
    for each in next(iter(result["sides"][1]["results"].values()))["difference_per_step"]:
        mean, interval = mean_and_interval((values[0] - values[1])[:, each["steps"]])
        assert each["mean"] == pytest.approx(mean, rel=10 * DIGITS, abs=DIGITS)
        assert each["interval_95_over_tasks"] == pytest.approx(interval, rel=10 * DIGITS, abs=DIGITS)


def test_a_run_and_itself_differ_by_exactly_nothing(compare):
    result, said = compare("maml", "maml")
    found = difference_in(result)
    assert found["mean"] == found["interval_95_over_tasks"] == 0.0 and not found["excludes_0"]
    assert "All settings are the same." in said and "maml (2)" in said and "same" in said.splitlines()[-4]


def test_the_order_of_the_runs_changes_signs_alone(compare):
    one, other = (difference_in(compare(*names)[0]) for names in (("maml", "fomaml"), ("fomaml", "maml")))
    assert one.pop("mean") == -other.pop("mean") != 0
    assert one.pop("by_seed") == {seed: -value for seed, value in other.pop("by_seed").items()}
    assert one == other


def test_the_seeds_that_both_have_are_paired(compare, place):
    result, said = compare("seeds", "grid")
    names = [side["name"] for side in result["sides"]]
    assert names == ["seeds", "grid inner-lr-0.001", "grid inner-lr-0.1"]
    by_seed = {}
    for seed in (1, 2):
        one = measured(place / f"grid/inner-lr-0.1_seed-{seed}/best.pt", tasks=12, skipped=CHOSEN_BY)
        other = measured(place / f"seeds/seed-{seed}/best.pt", tasks=12, skipped=CHOSEN_BY)
        by_seed[seed] = one - other
    found = difference_in(result, 2)
    assert found["by_seed"] == {
        str(seed): pytest.approx(values.mean(), rel=DIGITS) for seed, values in by_seed.items()
    }
    mean, interval = mean_and_interval(np.mean(list(by_seed.values()), 0))
    assert found["mean"] == pytest.approx(mean, rel=DIGITS)
    assert found["interval_95_over_tasks"] == pytest.approx(interval, rel=DIGITS)
    assert "--init" in said and "--inner-lr" in said and "--seed " not in said


def test_runs_that_differ_in_their_seeds_alone_are_one_entry(compare, place):
    folders = sorted(folder for folder in (place / "grid").iterdir() if (folder / "best.pt").is_file())
    assert len(folders) == 6
    (as_runs, _), (as_many, _) = compare(*folders), compare("grid")
    assert [side["seeds"] for side in as_runs["sides"]] == [[0, 1, 2], [0, 1, 2]]
    assert [side["name"] for side in as_runs["sides"]] == ["0.001", "0.1"]
    assert [side["results"] for side in as_runs["sides"]] == [side["results"] for side in as_many["sides"]]
    incomplete, _ = compare(*folders[:-1])  # one setting lacks a seed
    last, _ = compare(*folders[:-1], folders[-1] / "last.pt")  # the others are the best
    assert (len(incomplete["sides"]), len(last["sides"])) == (5, 6)
    longer, _ = compare("maml", "longer", "fomaml", "fomaml-1")  # measured after other steps
    assert [side["name"] for side in longer["sides"]] == ["maml", "longer", "fomaml", "fomaml-1"]


def test_an_entry_of_several_runs_is_called_by_their_words():
    assert comparing._name_of_all(["maml-seed0", "maml-seed1"]) == "maml"
    assert comparing._name_of_all(["a/seed0", "a/seed1"]) == "a"
    assert comparing._name_of_all(["monday", "tuesday"]) == "monday and 1 more"
    assert comparing._name_of_all(["one_x"]) == "one_x"


# ---- what is compared ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "split", "first"), [([], "validation", CHOSEN_BY), (["--split", "test"], "test", 0)]
)
def test_tasks_are_of_validation_but_those_that_chose_the_checkpoints_and_on_demand_of_test(
    compare, monkeypatch, flags, split, first
):
    from dataset import Sinusoid

    sampled = []
    sample = Sinusoid.sample

    def recorded(self, *arguments, **options):
        sampled.append((arguments[0], arguments[3]))
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Sinusoid, "sample", recorded)
    result, said = compare("maml", "fomaml", *flags)
    assert {numbers for name, numbers in sampled if name == split} == {range(first, first + 12)}
    assert {name for name, _ in sampled} <= {"train", split}  # a training task tells the shapes
    assert (result["split"], result["first_task"], result["tasks"]) == (split, first, 12)
    assert f"12 {split} tasks" in said


def test_best_is_measured_and_the_curves_are_those_of_the_whole_run(compare, place):
    result, _ = compare("maml", "fomaml/last.pt", "grid")
    runs = result["runs"]
    assert runs[0]["checkpoint"].endswith("maml/best.pt") and runs[1]["checkpoint"].endswith("last.pt")
    assert runs[0]["iteration"] == load_checkpoint(place / "maml" / "best.pt").iteration
    for name, each in (("maml", runs[0]), ("grid/inner-lr-0.001_seed-2", runs[4])):
        saved = json.loads((place / name / "training.json").read_text())
        assert each["curves"] == {part: saved[part] for part in ("training", "validation")}
    level = result["common_validation_level"]
    best = [min(each["curves"]["validation"]["query_loss"]) for each in runs]
    assert level == max(best)
    for one in result["sides"]:
        first = [
            next(i for i, v in zip(curve["iteration"], curve["query_loss"], strict=True) if v <= level)
            for curve in (r["curves"]["validation"] for r in runs if r["name"] == one["name"])
        ]
        assert one["learning"]["reaches_common_level"]["mean"] == pytest.approx(np.mean(first))


def test_with_batch_norm_accuracies_as_trained_and_both_ways(compare):
    result, said = compare("batch-norm", "inductive")
    assert result["measure"] == "accuracy" and "accuracy %" in said
    found = [one["results"] for one in result["sides"]]
    norms = [[each["normalisation"] for each in one.values()] for one in found]
    assert list(found[0]) == ["as trained", "transductive", "inductive"]
    assert norms == [
        ["transductive", "transductive", "inductive"],
        ["inductive", "transductive", "inductive"],
    ]
    trained = [one["as trained"] for one in found]
    values = [np.array(one["per_task"]["0"]) for one in trained]
    alone = [found[0]["transductive"], found[1]["inductive"]]
    assert [one["per_task"] for one in trained] == [one["per_task"] for one in alone]
    mean, interval = mean_and_interval(values[1] - values[0])
    assert trained[1]["difference"]["mean"] == pytest.approx(mean, rel=DIGITS) and mean != 0
    assert trained[1]["difference"]["interval_95_over_tasks"] == pytest.approx(interval, rel=DIGITS)


def test_a_run_that_is_being_trained_is_read_and_nothing_is_left_in_its_folder(compare, place):
    with locks.training_in(place / "maml"):
        before = sorted((place / "maml").iterdir())
        compare("maml", "fomaml")
        assert sorted((place / "maml").iterdir()) == before


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["a/x", "a/y"], ["x", "y"]),
        (["a/x", "b/x", "b/y"], ["a/x", "b/x", "y"]),
        (["sin-maml-seed0", "sin-meta-sgd-seed0"], ["maml", "meta-sgd"]),
        (["run", "run-longer"], ["run", "run-longer"]),
        (["lr-0.1", "lr-0.01"], ["lr-0.1", "lr-0.01"]),
        (["x", "x"], ["x", "x (2)"]),
        (["x=best", "x=last"], ["x best", "x last"]),
        (["g:s-1", "g:s-2"], ["s-1", "s-2"]),
        (["g:s-1", "g:s-2", "h"], ["g s-1", "g s-2", "h"]),
    ],
)
def test_names_are_the_shortest_that_tell_runs_apart(given, names):
    places = []
    for text in given:
        text, _, named = text.partition("=")
        folder, _, setting = text.partition(":")
        places.append(comparing.Place(Path("/runs") / folder, setting, {}, named))
    assert comparing.names_of(places) == names


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("maml", "name another"),
        ("seeds", "name another"),
        ("maml gone", "gone: there is no such checkpoint"),
        ("maml .", "name the runs"),
        ("maml images", "name the runs"),
        ("maml maml/training.json", "not a checkpoint"),
        ("maml five", "-k 3) and five (-k 5)"),
        ("maml five", "give -k"),
        ("maml huber -k 3", "--loss"),
        ("maml batch-norm", "have other tasks"),
        ("seeds late", "no seed in common"),
        ("maml fomaml --iterations 3", "maml/best.pt: --iterations 3 disagrees"),
        ("maml fomaml --learner own.py:net", "none of the runs"),
        ("maml fomaml --eval", "leave out --eval"),
        ("maml fomaml --load maml/best.pt", "leave out --load"),
        ("maml fomaml --seeds 0-1 --resume", "leave out --seeds and --resume"),
        ("maml fomaml --compile on", "for training"),
        ("maml fomaml --eval-dataset harmonic", "--split test"),
        ("maml fomaml --split train", "expected one of validation, test"),
        ("maml fomaml --out maml/best.pt/x", "cannot write"),
        ("maml fomaml --out new -k 100000000000", "expected a whole number"),
        ("maml batch-norm --split test --eval-dataset harmonic --out new/er", "learned classification"),
        ("batch-norm inductive --split test --eval-dataset images:gone --out new/er", "gone"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line_and_leaves_nothing(
    place, monkeypatch, capsys, line, said
):
    monkeypatch.chdir(place)
    before = sorted(place.rglob("*"))
    assert run("--compare", *line.split()) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 1 and said in errors[0]
    assert sorted(place.rglob("*")) == before


def test_the_split_is_of_compare_alone(capsys):
    assert run("--eval", "--split", "test") == 2
    assert "--split is of --compare" in capsys.readouterr().err


def test_several_processes_are_refused(place, monkeypatch, capsys):
    from common.processes import World

    monkeypatch.chdir(place)
    monkeypatch.setattr("common.processes.launched", lambda: World(0, 2))
    assert run("--compare", "maml", "fomaml") == 2
    assert "--compare is for one process" in capsys.readouterr().err


def test_results_of_other_runs_are_never_overwritten(compare, place, tmp_path, capsys):
    compare("maml", "fomaml")
    compare("maml", "fomaml")  # the same may be
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    assert run("--compare", "maml/last.pt", "fomaml", "--out", tmp_path) == 2
    assert "of other runs: choose another --out" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_shots_that_are_given_make_other_tasks_the_same(compare):
    result, _ = compare("maml", "five", "-k", 4, "-q", 2)
    assert difference_in(result)["tasks"] == 12
    assert [each["settings"]["shots"] for each in result["runs"]] == [4, 4]


def test_by_default_results_are_beside_the_first_run(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    assert run("--compare", "maml", "fomaml", "--eval-tasks", 3) == 0
    names = {file.name for file in place.glob("comparison-*")}
    stem = "comparison-maml-vs-fomaml-validation-sinusoid-3shot-4query-3tasks"
    assert names == {f"{stem}.json", f"{stem}.png"}
    with Image.open(place / f"{stem}.png") as picture:
        assert min(picture.size) > 400
    for name in names:
        (place / name).unlink()
