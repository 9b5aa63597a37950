"""Pictures: readable in both themes, true, the same from a resumed run; and the views of TensorBoard."""

import json
import re
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

import main
from common import choices
from common.batch import TaskBatch
from dataset import Sinusoid
from evaluation import features, figures
from evaluation.figures import DARK, LIGHT, THEMES, Theme
from evaluation.meta_test import Evaluation, features_of_task
from evaluation.tables import Words, write_figure
from inner_loop import NoFeaturesError
from learner import build_learner
from maml import MAML
from training.checkpoint import LAST
from training.tensorboard import CHARTS, METRICS

COLOURS = ("ink", "grey", "blue", "orange", "green", "red", "purple", "sky")
RUN = ["--iterations", 12, "--log-every", 3, "--val-every", 4, "--save-every", 4, "--meta-batch-size", 2]


def command(*arguments: object) -> int:
    return main.main([str(a) for a in arguments])


# ---- themes ---------------------------------------------------------------------------------


def linear(colour: str) -> np.ndarray:
    """Red, green and blue light, in [0, 1]."""
    channels = np.array([int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)])
    return np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)


def contrast(a: str, b: str) -> float:
    """As the WCAG has it."""
    dark, light = sorted(linear(colour) @ [0.2126, 0.7152, 0.0722] for colour in (a, b))
    return (light + 0.05) / (dark + 0.05)


# Machado et al. (2009), full severity
SEEN_BY = {
    "protanopes": [
        [0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopes": [
        [0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881],
    ],
    "tritanopes": [
        [1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039],
    ],
    "others": np.eye(3),
}  # fmt: skip


def lab(light: np.ndarray) -> np.ndarray:
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    f = np.cbrt(np.maximum(to_xyz @ np.clip(light, 0, 1) / [0.9505, 1, 1.089], 1e-6))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_every_colour_of_a_theme_has_a_contrast_of_three_to_its_background(theme: Theme):
    assert tuple(THEMES) == choices.THEMES
    assert all(contrast(getattr(theme, name), theme.background) >= 3 for name in COLOURS)
    assert contrast(theme.ink, theme.background) >= 7
    assert contrast(theme.grid, theme.background) < 1.5  # it is not what is looked at


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_colour_blind_readers_can_tell_the_colours_of_curves_apart(theme: Theme):
    for who, seen in SEEN_BY.items():
        places = [lab(np.array(seen) @ linear(colour)) for colour in theme.palette]
        assert min(np.linalg.norm(a - b) for a, b in combinations(places, 2)) > 12, who


def test_curves_that_share_a_colour_differ_in_line_and_marker():
    kinds = [tuple(figures.curve_style(number, LIGHT).values()) for number in range(24)]
    assert len(set(kinds)) == 24
    first, again = kinds[0], kinds[len(LIGHT.palette)]
    assert first[0] == again[0] and first[1] != again[1] and first[2] != again[2]


@pytest.mark.parametrize("theme", THEMES.values(), ids=THEMES)
def test_a_picture_has_the_themes_colours_in_its_pixels_also_where_it_is_drawn_later(theme: Theme, tmp_path):
    """Ticks are made when they are drawn, outside of the style."""
    from PIL import Image

    evaluation = Evaluation({"transductive": torch.rand(9, 3, dtype=torch.float64)}, {})
    figure = figures.evaluation_figure(evaluation, Words("MSE", 1, 1, "title"), theme=theme)
    write_figure(tmp_path / "picture.png", figure)
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB")).reshape(-1, 3)
    found = {tuple(pixel) for pixel in np.unique(pixels, axis=0)}
    wanted = {name: tuple(bytes.fromhex(getattr(theme, name)[1:])) for name in ("background", "ink", "blue")}
    assert set(wanted.values()) <= found
    other = DARK if theme is LIGHT else LIGHT
    assert tuple(bytes.fromhex(other.background[1:])) not in found
    ticks = figure.axes[0].xaxis.get_ticklabels() + figure.axes[0].yaxis.get_ticklabels()
    assert {label.get_color() for label in ticks} == {theme.ink}


# ---- task sheets ----------------------------------------------------------------------------


def sheet(ways: int, shots: int, queries: int, theme: Theme = LIGHT, size: int = 4):
    """One task whose answers are all wrong before, and right after but for the query of class 1."""
    images = [torch.rand(1, ways * each, 1, size, size) for each in (shots, queries)]
    labels = torch.arange(ways).repeat_interleave(queries)
    before, after = (labels + 1) % ways, torch.where(labels == 1, 0, labels)
    outputs = nn.functional.one_hot(torch.stack([before, labels, after])[None], ways).float()
    batch = TaskBatch(images[0], labels[None], images[1], labels[None])
    return figures.tasks_figure(
        batch, outputs, ways=ways, shots=shots, queries=queries, step=2, title="a title", theme=theme
    )  # fmt: skip


def test_a_task_sheet_says_before_and_after_for_each_query_and_marks_right_and_wrong_by_more_than_colour():
    (panel,) = sheet(3, 2, 1).axes
    words = [text.get_text() for text in panel.texts]
    assert [word for word in words if word[-1] in "✓✗"] == ["1 ✗", "0 ✓", "2 ✗", "0 ✗", "0 ✗", "2 ✓"]
    assert "right: 0 → 2 of 3" in words and "a title" in words
    lines = [patch.get_linestyle() for patch in panel.patches if patch.get_linewidth() > 1]
    assert lines == ["-", "--", "-"]
    assert not any(word.startswith("Shown") for word in words)


def test_a_task_sheet_says_what_it_leaves_out_and_counts_it_nevertheless():
    (panel,) = sheet(25, 7, 4).axes
    words = [text.get_text() for text in panel.texts]
    assert "Shown: 20 of 25 classes, 5 of 7 support images a class, 3 of 4 query images a class." in words
    assert "right: 0 → 96 of 100" in words
    assert sum(word[-1] in "✓✗" for word in words) == 20 * 3 * 2


def test_the_pixels_of_a_sheet_are_the_images():
    torch.manual_seed(0)
    (panel,) = sheet(2, 1, 1).axes
    torch.manual_seed(0)
    support, query = (torch.rand(1, 2, 1, 4, 4) for _ in range(2))
    paper, ink = (
        torch.tensor([int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)]) for c in (LIGHT.background, LIGHT.ink)
    )
    for images, shown in zip((support, query), panel.images, strict=True):
        first = torch.as_tensor(shown.get_array())[:4, :4]
        value = images[0, 0, 0, :, :, None]
        torch.testing.assert_close(first, paper * (1 - value) + ink * value)


def test_frames_lie_around_their_images_to_the_last_row():
    (panel,) = sheet(20, 1, 1, size=28).axes
    query = panel.images[1]
    left, _, bottom, top = query.get_extent()
    frames = [patch for patch in panel.patches if patch.get_linewidth() > 1]
    rows = [top + (bottom - top) / 20 * row for row in range(20)]
    assert [patch.get_xy() for patch in frames] == [(pytest.approx(left), pytest.approx(y)) for y in rows]


@pytest.mark.parametrize("ways, shots", [(5, 1), (20, 1), (20, 5)])
def test_nothing_of_a_sheet_is_clipped_or_covered(ways, shots):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure = sheet(ways, shots, 3)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [text.get_window_extent(renderer) for text in figure.axes[0].texts]
    for box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1
    for a, b in combinations(boxes, 2):
        assert not a.overlaps(b)


# ---- features -------------------------------------------------------------------------------


def test_principal_components_are_those_of_the_covariance_with_a_sign_that_does_not_depend_on_rounding():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(50, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 2.0, 0.1])
    positions, shares = features.principal_components(points)
    values, vectors = torch.linalg.eigh(points.T.cov())
    vectors = vectors[:, [3, 2]]
    vectors = vectors * vectors.gather(0, vectors.abs().argmax(0, keepdim=True)).sign()
    torch.testing.assert_close(positions, (points - points.mean(0)) @ vectors)
    torch.testing.assert_close(shares, values[[3, 2]] / values.sum())
    torch.testing.assert_close(features.principal_components(points.flip(0))[0].flip(0), positions)
    narrow, share = features.principal_components(points[:, :1])
    assert narrow.shape == (50, 2) and share.tolist() == [1.0, 0.0]
    torch.testing.assert_close(narrow[:, 0], points[:, 0] - points[:, 0].mean())


def test_how_far_features_moved_and_whose_mean_is_nearest():
    before = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.5, 0.0], [0.6, 0.0]])
    after = before + torch.tensor([0.0, 3.0])
    after[3, 0] = 1.9
    labels = torch.tensor([0, 1, 0, 1])
    seen = torch.stack([before, after])
    assert features.nearest_mean_accuracy(seen, labels, support=2).tolist() == [0.5, 1.0]
    assert features.moved(torch.stack([before, before])) == 0
    spread = (before - before.mean(0)).square().sum(1).mean().sqrt()
    assert features.moved(torch.stack([before, before + 3.0])) == pytest.approx(float(18**0.5 / spread))
    assert len(features.until_not_finite(torch.tensor([1.0, 2.0, torch.nan, 3.0])[:, None, None])) == 2


@pytest.mark.parametrize("fast_weights, moves", [("all", True), ("body", True), ("head", False)])
def test_the_features_of_anil_stay_and_those_of_maml_and_boil_move(fast_weights, moves):
    maml = MAML(
        build_learner("mlp", 1, init="torch", seed=0), nn.functional.mse_loss, inner_lr=0.1,
        fast_weights=fast_weights,
    )  # fmt: skip
    parameters = maml.initial_parameters()
    seen = features_of_task(
        maml, parameters, Sinusoid(shots=5, queries=5), "test", steps=3, normalisation="transductive"
    )
    assert seen is not None and seen.features.shape == (4, 5 + 200, 40) and seen.support == 5
    assert torch.equal(seen.features, seen.features[:1].expand_as(seen.features)) == (not moves)
    assert (features.moved(seen.features) > 0) == moves
    body = nn.Sequential(*list(maml.learner.children())[:-1])
    body.load_state_dict({name: w for name, w in parameters.items() if name in body.state_dict()})
    torch.testing.assert_close(seen.features[0], body(seen.x))


@pytest.mark.parametrize("normalisation", ["transductive", "inductive"])
def test_the_head_of_the_features_gives_the_predictions_under_either_normalisation(normalisation):
    learner = build_learner("conv", 3, init="torch", seed=0)
    maml = MAML(learner, nn.functional.cross_entropy, inner_lr=0.5, fast_weights="body")
    parameters = maml.initial_parameters()
    x = torch.rand(2, 9, 1, 28, 28)
    batch = TaskBatch(x[:, :3], torch.arange(3).repeat(2, 1), x[:, 3:], torch.arange(3).repeat(2, 2))
    seen = maml.features(parameters, batch, 2, normalisation)
    outputs = maml.predictions(parameters, batch, 2, (normalisation,))[normalisation]
    weight, bias = (parameters[name] for name in list(parameters)[-2:])
    torch.testing.assert_close(seen[:, :, 3:] @ weight.T + bias, outputs)


def test_a_learner_that_is_all_head_has_no_features():
    maml = MAML(nn.Linear(1, 1), nn.functional.mse_loss, inner_lr=0.1)
    batch = Sinusoid(shots=2, queries=2).sample("test", 0, 0, range(1))
    with pytest.raises(NoFeaturesError):
        maml.features(maml.initial_parameters(), batch, 1)


def test_the_picture_of_features_says_how_far_they_moved_and_the_share_of_variance():
    seen = torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    figure = figures.class_features_figure(seen, labels, 3, "a task")
    _, shares = features.on_components(seen)
    assert f"moved by {100 * features.moved(seen):.3g} % of their spread" in figure.get_suptitle()
    assert f"{100 * shares[0]:.3g} %" in figure.axes[1].get_xlabel()
    assert [panel.get_title() for panel in figure.axes] == ["before adaptation", "after 2 steps"]
    markers = {path.vertices.tobytes() for c in figure.axes[0].collections for path in c.get_paths()[:1]}
    assert len(markers) == 3


# ---- what a run writes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """`whole`, undisturbed; `resumed`, which went on twice; `rates`, with learned ones."""
    folder = tmp_path_factory.mktemp("runs")
    options = [*RUN, "--checkpoint-path", folder, "--theme", "dark"]
    assert command(*options, "--run-name", "whole") == 0
    assert command(*options, "--run-name", "resumed", "--iterations", 4) == 0
    assert command("--load", folder / "resumed" / LAST, "--iterations", 8) == 0  # with the other theme
    assert command("--load", folder / "resumed" / LAST, "--iterations", 12, "--theme", "dark") == 0
    assert command(*options, "--run-name", "rates", "--algorithm", "meta-sgd", "--on-nan", "skip") == 0
    return folder


def events(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(
        str(folder), size_guidance={"images": 0, "tensors": 0}, purge_orphaned_data=False
    )
    found.Reload()
    return found


def test_pictures_of_a_resumed_run_are_the_undisturbed_runs_bits(runs):
    for name in ("examples.png", "features.png", "training.png"):
        assert (runs / "whole" / name).read_bytes() == (runs / "resumed" / name).read_bytes(), name
    whole, resumed = (events(runs / name) for name in ("whole", "resumed"))
    assert set(whole.Tags()["images"]) == {"examples", "features", "training"}
    for tag in whole.Tags()["images"]:
        last = [each.Images(tag)[-1] for each in (whole, resumed)]
        assert last[0].encoded_image_string == last[1].encoded_image_string, tag
    (of_whole,), (of_resumed,) = (each.Images("training") for each in (whole, resumed))
    assert of_whole.step == of_resumed.step == 13


def hparams_records(folder):
    """The records of the plugin in all event files of a run, by tag."""
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found: dict[str, list] = {}
    for path in sorted(folder.glob("events*")):
        for event in EventFileLoader(str(path)).Load():
            for value in event.summary.value:
                if value.metadata.plugin_data.plugin_name == "hparams":
                    found.setdefault(value.tag, []).append(value.metadata.plugin_data.content)
    return found


def test_the_view_of_hyper_parameters_has_each_run_once_also_after_it_has_gone_on(runs):
    from tensorboard.plugins.hparams import api_pb2, metadata

    for name in ("whole", "resumed", "rates"):
        found = hparams_records(runs / name)
        tags = (metadata.EXPERIMENT_TAG, metadata.SESSION_START_INFO_TAG, metadata.SESSION_END_INFO_TAG)
        assert {tag: len(contents) for tag, contents in found.items()} == dict.fromkeys(tags, 1), name
        experiment, start, end = (found[tag][0] for tag in tags)
        columns = metadata.parse_experiment_plugin_data(experiment)
        row = metadata.parse_session_start_info_plugin_data(start).hparams
        assert row["meta_batch_size"].number_value == 2
        assert row["algorithm"].string_value == ("meta-sgd" if name == "rates" else "maml")
        assert metadata.parse_session_end_info_plugin_data(end).status == api_pb2.STATUS_SUCCESS
        assert {column.name for column in columns.hparam_infos} >= {"inner_lr", "steps", "seed", "algorithm"}
        scalars = events(runs / name).Tags()["scalars"]
        wanted = {tag for tag in METRICS if "loss" in tag}
        assert {metric.name.tag for metric in columns.metric_infos} & set(scalars) == wanted
        assert experiment == hparams_records(runs / "whole")[metadata.EXPERIMENT_TAG][0]


def test_the_best_validation_is_that_of_the_checkpoint(runs):
    best = events(runs / "whole").Scalars("validation/best_query_loss")
    losses = [e.value for e in events(runs / "whole").Scalars("validation/query_loss")]
    assert [e.value for e in best] == [min(losses[: n + 1]) for n in range(len(losses))]
    last = events(runs / "whole").Scalars("validation_by_step/query_loss/1")
    assert [e.value for e in last] == losses


def test_the_layouts_charts_have_every_curve_of_the_run_and_no_chart_without_one(runs):
    from tensorboard.plugins.custom_scalar import layout_pb2

    for name in ("whole", "rates"):
        found = events(runs / name)
        (tensor,) = found.Tensors("custom_scalars__config__")
        layout = layout_pb2.Layout.FromString(tensor.tensor_proto.string_val[0])
        patterns = [tag for group in layout.category for chart in group.chart for tag in chart.multiline.tag]
        scalars = [tag for tag in found.Tags()["scalars"] if not tag.startswith("validation/best_")]
        drawn = {pattern: [tag for tag in scalars if re.match(pattern, tag)] for pattern in patterns}
        assert all(drawn.values())
        assert sorted(tag for tags in drawn.values() for tag in tags) == sorted(scalars)
    assert {*CHARTS} - {group.title for group in layout.category} == set()


def test_evaluation_writes_its_pictures_in_the_theme(runs, tmp_path):
    line = ["--eval", "--load", runs / "whole" / LAST, "--eval-tasks", 4, "--eval-steps", 2]
    for theme in THEMES:
        assert command(*line, "--out", tmp_path / theme, "--theme", theme) == 0
    names = sorted(path.name for path in (tmp_path / "light").iterdir())
    assert [name[len("whole-last-test-sinusoid-10shot-10query-4tasks") :] for name in names] == [
        "-features.png",
        ".json",
        ".png",
    ]
    for name in names:
        a, b = ((tmp_path / theme / name).read_bytes() for theme in THEMES)
        if name.endswith(".json"):
            assert json.loads(a)["per_step"] == json.loads(b)["per_step"]
        else:
            assert a != b
