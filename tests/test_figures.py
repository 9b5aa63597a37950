"""Pictures share one style that all readers can see, show the numbers, and survive a resumed run."""

import math
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from matplotlib import rc_params_from_file
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image
from runs import command, train

from common.batch import TaskBatch
from common.task import UserTask
from evaluation import style
from evaluation.examples import Examples, examples_figure
from evaluation.figures import MOST_DRAWN, learning_figure, results_figure, window_means
from evaluation.meta_test import Evaluation
from evaluation.predictions import predictions_figure, read_predictions
from evaluation.tables import Caption, results_of
from learners.reading import Reading
from training.folders import LAST

STYLE = rc_params_from_file(style.STYLE_FILE, use_default_template=False)
INK = to_hex(STYLE["text.color"])
CAPTION = Caption("sinusoid", "MSE", trained_steps=1, test_steps=(1,))

# what colour-blind readers see: Machado et al. (2009), full severity
SEEN_BY = {
    "protanopes": [[0.1523, 1.0526, -0.2049], [0.1145, 0.7863, 0.0992], [-0.0039, -0.0481, 1.0520]],
    "deuteranopes": [[0.3673, 0.8606, -0.2280], [0.2801, 0.6725, 0.0474], [-0.0118, 0.0429, 0.9689]],
    "tritanopes": [[1.2555, -0.0767, -0.1788], [-0.0784, 0.9308, 0.1476], [0.0047, 0.6914, 0.3039]],
    "others": np.eye(3),
}


def light_of(colour: str) -> np.ndarray:
    """Red, green and blue light of a colour, linear in [0, 1]."""
    channels = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """Contrast of two colours by WCAG 2."""
    dark, light = sorted(light_of(colour) @ [0.2126, 0.7152, 0.0722] for colour in (a, b))
    return (light + 0.05) / (dark + 0.05)


def lab(light: np.ndarray) -> np.ndarray:
    """CIE L*a*b*, in which distance is how different two colours look."""
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(np.maximum(to_xyz @ np.clip(light, 0, 1) / [0.9505, 1, 1.089], 1e-6))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def legend(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# ---- style ----------------------------------------------------------------------------------


def test_text_and_curves_stand_out_from_the_background():
    assert to_hex(STYLE["figure.facecolor"]) == "#ffffff"
    assert contrast(INK, "#ffffff") >= 7
    assert all(contrast(colour, "#ffffff") >= 3 for colour in (*style.PALETTE, style.GREY))
    assert contrast(to_hex(STYLE["grid.color"]), "#ffffff") < 1.5


@pytest.mark.parametrize("readers", SEEN_BY)
def test_colour_blind_readers_can_tell_the_curves_apart(readers):
    places = [lab(np.array(SEEN_BY[readers]) @ light_of(colour)) for colour in style.PALETTE]
    assert min(np.linalg.norm(a - b) for a, b in combinations(places, 2)) > 12


def test_a_picture_is_opaque_and_keeps_its_style_outside_of_the_function_that_drew_it(tmp_path):
    evaluation = Evaluation({"loss": {"transductive": torch.rand(9, 3)}})
    figure = results_figure(results_of({"all": [evaluation]}), CAPTION)
    style.write_figure(tmp_path / "picture.png", figure)  # ticks are made here
    picture = Image.open(tmp_path / "picture.png")
    assert picture.getextrema()[3] == (255, 255)
    picture = picture.convert("RGB")
    pixels = {tuple(pixel) for pixel in np.unique(np.asarray(picture).reshape(-1, 3), axis=0)}
    assert {tuple(bytes.fromhex(c[1:])) for c in ("#ffffff", INK, style.BLUE)} <= pixels
    assert {label.get_color() for label in figure.axes[0].get_xticklabels()} == {STYLE["xtick.color"]}


@pytest.mark.parametrize(
    ("least", "scale", "bottom"), [(3.0, "linear", 2.95), (1.0, "linear", 0.0), (0.01, "log", 0.0)]
)
def test_the_axis_of_a_loss_shows_its_range(least, scale, bottom):
    with style.use_style():
        panel = style.new_figure(4, 3).subplots()
        panel.plot([4.0, least])
        style.label_axes(panel, "iteration", "MSE")
    assert panel.get_yscale() == scale and panel.get_ylim()[0] == pytest.approx(bottom, abs=0.06)
    style.render(panel.figure)
    assert not any("$" in label.get_text() for label in panel.get_yticklabels(which="both"))


# ---- results and tasks ----------------------------------------------------------------------


def test_the_picture_of_a_result_leaves_diverged_tasks_out_and_says_so():
    losses = torch.tensor([[1.0, 0.5], [1.0, 0.7], [1.0, 1e6]])
    evaluation = Evaluation({"loss": {"transductive": losses}})
    (panel,) = results_figure(results_of({"all": [evaluation]}), CAPTION).axes
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([1.0, 0.6])
    assert "(without 1 that diverged)" in legend(panel.figure)[0]
    assert [panel.get_xlabel(), panel.get_ylabel()] == ["inner steps", "query MSE"]


def test_a_result_in_accuracy_is_drawn_as_its_error_so_that_small_ones_are_told_apart():
    right = torch.tensor([[0.2, 0.98, 1.0]]).expand(4, 3)
    evaluation = Evaluation({"loss": {"inductive": torch.ones(4, 3)}, "accuracy": {"inductive": right}})
    (panel,) = results_figure(results_of({"all": [evaluation]}), CAPTION).axes
    assert panel.lines[0].get_ydata().tolist() == pytest.approx([80, 2, 0.01], rel=1e-3)
    assert (panel.get_ylabel(), panel.get_yscale()) == ("query error (%)", "log")


def test_methods_are_drawn_over_inner_steps_and_one_that_is_not_adapted_as_a_line_across():
    adapted, oracle = (Evaluation({"loss": {"inductive": torch.ones(4, steps)}}) for steps in (3, 1))
    results = results_of({"maml": [adapted], "oracle": [oracle]})
    learning = {"maml": [([300, 600], [2.0, 1.0])], "scratch": [([300, 600], [4.0, 4.0])]}
    figure = results_figure(results, CAPTION, learning=learning, learning_measure="query MSE")
    steps, training = figure.axes
    assert [len(line.get_ydata()) for line in steps.lines] == [3, 2, 2]  # the last: trained for
    assert (training.get_xlabel(), training.get_ylabel()) == ("iteration", "query MSE")
    colours = [[line.get_color() for line in panel.lines] for panel in (steps, training)]
    assert colours[1][0] == colours[0][0] and colours[1][1] not in colours[0]
    assert legend(figure) == ["maml", "oracle", "95 % interval", "trained for, the result", "scratch"]


def test_a_legend_is_no_wider_than_its_figure():
    with style.use_style():
        figure = style.new_figure(3.4, 3, "")
        panel = figure.subplots()
        for name in ("maml", "fomaml", "anil", "boil", "reptile", "meta-sgd"):
            panel.plot([0, 1], [0, 1], label=name)
        style.add_legend(figure, panel)
        (legend,) = figure.legends
        assert 0 < legend.get_window_extent().width <= figure.bbox.width


def test_the_bands_of_one_run_beside_several_are_intervals_of_both():
    run = Evaluation({"loss": {"inductive": torch.ones(4, 3)}})
    other = Evaluation({"loss": {"inductive": torch.ones(4, 3) + 1}})
    for counts, band in {(1, 1): 0, (2, 2): 1, (1, 2): 0, (2, 1): 0}.items():  # comparable: all of one kind
        results = results_of({name: [run, other][:n] for name, n in zip("ab", counts, strict=True)})
        figure = results_figure(results, CAPTION)
        assert ["95 % interval", "range of the runs"][band] in legend(figure)
        heights = [np.ptp(b.get_paths()[0].vertices[:, 1]) for b in figure.axes[0].collections[:2]]
        assert heights == pytest.approx([band, band])


def test_a_learning_curve_is_the_mean_of_its_runs_in_a_band_of_all_of_them():
    curves = {"a": [([10, 20], [0.5, 0.75]), ([10, 20, 30], [1.0, 0.25, 0.1])], "b": [([10], [0.5])]}
    figure = learning_figure(curves, "validation MSE")
    (panel,) = figure.axes
    assert [line.get_ydata().tolist() for line in panel.lines] == [[0.75, 0.5], [0.5]]
    band = panel.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in band} == {(10, 0.5), (10, 1.0), (20, 0.25), (20, 0.75)}
    assert legend(figure) == ["a", "b"]
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("iteration", "validation MSE")


def test_runs_are_averaged_at_the_iterations_that_all_have():
    runs = [([10, 20, 30], [1.0, 2.0, 3.0]), ([20, 30, 40], [4.0, 5.0, 6.0])]
    curve, *_ = learning_figure({"a": runs}, "validation MSE").axes[0].lines
    assert [*zip(*curve.get_data(), strict=True)] == [(20, 3.0), (30, 4.0)]


def test_a_long_curve_is_drawn_as_means_of_windows():
    iterations, values = range(100, 100_100, 100), torch.arange(1000.0).tolist()
    gaps = [math.nan if number < 3 else value for number, value in enumerate(values)]
    first, second, *_ = window_means((iterations, gaps))[0][1]
    assert math.isnan(first) and second == 3.0  # the other one of its window is missing
    (ends, means), points = window_means((iterations, values))
    assert (points, len(means), ends[:2], ends[-1]) == (2, MOST_DRAWN, [200, 400], 100_000)
    assert means == torch.arange(1000.0).view(-1, 2).mean(1).tolist()
    assert window_means(([10, 20], [3.0, 4.0])) == (([10, 20], [3.0, 4.0]), 1)


def test_a_zoomed_axis_leaves_the_beginning_out_and_no_band_of_the_rest():
    runs = [(range(5), [9.0, 1.0, low, low, low]) for low in (0.5, 0.9)]
    low, high = learning_figure({"a": runs}, "validation MSE", zoom=True).axes[0].get_ylim()
    assert low < 0.5 and 1.0 < high < 2
    curves = {"a": [(range(1, 11), [9.0, *[1.1 - 0.01 * n for n in range(9)]])], "b": [([], [])]}
    figure = learning_figure(curves, "validation MSE", "grid", zoom=True)
    assert figure.axes[0].get_ylim() == pytest.approx((1.02 - 0.0064, 1.1 + 0.0064))
    assert "b: not recorded" in legend(figure)


def draw_fits(*levels: float) -> list:
    """Draw three lines from -1 to 1, whose predictions before adaptation and after 3 steps are constant."""
    x = torch.linspace(-1, 1, 7).expand(3, 7)[..., None]
    outputs = torch.tensor(levels)[:, None, None].expand(3, -1, 7, 1)
    examples = Examples(TaskBatch(x[:, :2], x[:, :2], x, -x), outputs, [0, 3][: len(levels)], ways=None)
    return examples_figure(examples, "title").axes


def test_all_curves_of_fits_lie_in_panels_of_one_scale_unless_one_diverges():
    for levels, top in (([1.5], 1.5), ([1.5, 1e9], 3.0)):  # at most one span of the truth beyond it
        *panels, _ = draw_fits(*levels)
        margin = 0.05 * (top + 1)
        assert len(panels) == 3
        for panel in panels:
            assert panel.get_ylim() == pytest.approx((-1 - margin, top + margin))


def test_fits_show_the_steps_that_were_asked_for():
    panel, *_ = draw_fits(0.0, 3.0)
    assert [line.get_label() for line in panel.lines] == ["true curve", "before adaptation", "after 3 steps"]
    assert [line.get_ydata()[0] for line in panel.lines] == [1.0, 0.0, 3.0]
    panel, *_ = draw_fits(3.0)
    assert [line.get_label() for line in panel.lines] == ["true curve", "prediction"]


def sheet(ways: int, shots: int, queries: int, size: int = 4, *, adapted: bool = True):
    """Three tasks whose labels are all wrong before, and right after except for class 1."""
    support, query = (torch.rand(3, ways * count, 1, size, size) for count in (shots, queries))
    of_support, labels = (torch.arange(ways).repeat_interleave(count) for count in (shots, queries))
    before, after = (labels + 1) % ways, torch.where(labels == 1, 0, labels)
    outputs = torch.stack([before, after]).expand(3, -1, -1)
    batch = TaskBatch(support, of_support.expand(3, -1), query, labels.expand(3, -1))
    steps = [0, 2][: 1 + adapted]
    return examples_figure(Examples(batch, outputs[:, : len(steps)], steps, ways=ways), "title")


@pytest.mark.parametrize(
    ("title", "marks"),
    [("correct: 0 → 2 of 3", "1 ✗, 0 ✓, 2 ✗, 0 ✗, 0 ✗, 2 ✓"), ("correct: 0 of 3", "1 ✗, 2 ✗, 0 ✗")],
)
def test_a_task_sheet_marks_each_label_by_more_than_colour(title, marks):
    adapted = "→" in title
    panel, *_ = sheet(3, 2, 1, adapted=adapted).axes
    words = [text.get_text() for text in panel.texts]
    assert ", ".join(word for word in words if word[-1] in "✓✗") == marks
    assert ("label" in words) is not adapted and panel.get_title(loc="left") == title


@pytest.mark.parametrize(("ways", "shots"), [(2, 1), (20, 5)])
def test_nothing_of_a_sheet_is_clipped_or_covered(ways, shots):
    figure = sheet(ways, shots, 3)
    style.render(figure)
    words = [text for panel in figure.axes for text in (*panel.texts, panel._left_title)]
    boxes = [text.get_window_extent() for text in words]
    assert all(b.x0 >= 0 and b.y0 >= 0 and b.x1 <= figure.bbox.x1 and b.y1 <= figure.bbox.y1 for b in boxes)
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))


def test_predictions_are_drawn_as_what_they_are():
    def drawn(x_shape: tuple[int, ...], classes: list[str], outputs: int) -> list:
        support_y = torch.arange(4) % len(classes) if classes else torch.rand(4, outputs)
        names = [f"file{n}" if len(x_shape) == 3 else str(n) for n in range(11, 81)]
        support, query = (torch.randint(2, (count, *x_shape)) for count in (4, 70))  # as arrays may be
        task = UserTask("$x", support, support_y, query, classes, names)
        shares = torch.rand(70, outputs).softmax(-1)
        reading = Reading("classes", outputs) if classes else Reading("numbers", numbers=outputs)
        targets = [f"y{number}" for number in range(outputs)]
        prediction = read_predictions(shares, shares, reading, classes, targets, predicts_targets=True)
        figure = predictions_figure([task], [prediction], "a $title")
        style.render(figure)
        return figure.axes

    (curve,), (numbers,), (shares,) = drawn((1,), [], 1), drawn((3,), [], 2), drawn((3,), ["a", "b"], 2)
    labels = [panel.get_ylabel() for panel in (curve, numbers, shares)]
    assert labels == ["prediction", "prediction", "probability"]
    assert numbers.lines[0].get_xdata().tolist() == [*range(11, 81)]  # rows of the table
    assert curve.lines[0].get_xdata().tolist() == sorted(curve.lines[0].get_xdata())
    (query,) = drawn((1, 6, 6), ["a", "b"], 2)
    assert [text.get_text() for text in query.texts[:4]] == [f"support: {name}" for name in "abab"]
    assert all(re.fullmatch(r"file\d+\n[ab] \d+\s%", text.get_text()) for text in query.texts[4:])
    (long,) = drawn((1, 6, 6), ["golden_retriever_puppy", "Old English sheepdog"], 2)
    shown = [text.get_text().partition("\n")[2] for text in long.texts[4:]]
    words = {re.sub(r"\s\d+\s%$", "", text).replace("\n", "") for text in shown}
    assert words <= {"golden_retriever_puppy", "Old Englishsheepdog"}
    assert len(query.texts) == 4 + 60 and query.figure.get_suptitle() == "a $title (the first 60 of 70)"


def test_dense_outputs_are_drawn_below_the_images_unless_there_are_classes():
    images, maps = torch.rand(3, 1, 5, 5), torch.randn(3, 1, 5, 5)
    task = UserTask("", images, torch.tensor([0, 1, 1]), images, ["a", "b"], ["x", "y", "z"])

    def panels(outputs: object, reading: Reading) -> list:
        main = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        prediction = read_predictions(outputs, main, reading, [], ["y"], predicts_targets=True)
        return predictions_figure([task], [prediction], "title").axes

    mask = [panel.images[0].get_array() for panel in panels(maps, Reading("labels")) if panel.images]
    assert len(mask) == 6 and np.array_equal(mask[3], maps[0, 0] > 0)
    (sheet,) = panels((torch.rand(3, 2), maps), Reading("classes", 2))
    assert len(sheet.texts) == 6


# ---- what a run writes ----------------------------------------------------------------------


def test_pictures_of_a_resumed_run_are_the_uninterrupted_runs_bits(tmp_path, pictures):
    flags = ["--log-every", 3, "--val-every", 4, "--meta-batch-size", 2, "--compile", "off", "--iterations"]
    whole, resumed = train(tmp_path / "whole", *flags, 8), train(tmp_path / "resumed" / "whole", *flags, 4)
    assert command("--load", resumed / LAST, "--iterations", 8) == 0
    names = sorted(path.name for path in whole.glob("*.png"))
    assert names == ["examples.png", "training.png"]
    for name in names:
        assert (whole / name).read_bytes() == (resumed / name).read_bytes(), name
