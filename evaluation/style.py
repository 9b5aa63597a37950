"""The one style of every picture: colours, axes and legends, and how a picture becomes a file.

Sizes and fonts are in `pictures.mplstyle`.
"""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from common.files import write_bytes
from learners.gaussian import CENTRAL

STYLE_FILE = Path(__file__).with_name("pictures.mplstyle")

# The hues are Okabe and Ito's, darkened until each has a contrast of 3 : 1 to white and colour-blind readers
# still tell them apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#005A9C", "#BF8500", "#008F6B", "#B83A00", "#C565A0", "#3399DD"
GREY = "#767676"  # what is drawn for comparison
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)  # of curves, in this order
DASHES = ("-", "--", "-.", ":")  # after the last colour they begin again with other dashes
MARKERS = "osD^vPX"  # seven, which has no divisor in common with the six colours
DISTINCT_CURVES = len(PALETTE) * len(DASHES)

SMALL = 8  # font size in points of notes
LETTERS_OF_TITLE = 13  # in an inch
BEGINNING = 0.2  # share of a learning curve that a zoomed axis leaves out
WIDE = 50.0  # ratio of the largest to the smallest loss from which its axis is logarithmic


use_style = partial(matplotlib.style.context, STYLE_FILE)  # `with use_style():`, or `@use_style()`


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """Return an empty figure of this size in inches, whose panels share the room among themselves."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(textwrap.fill(title, max(20, int(LETTERS_OF_TITLE * width))))
    return figure


def curve_style(number: int) -> dict[str, Any]:
    """Return colour, line style and marker of the curve with this number."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": DASHES[(number // len(PALETTE) + number % 2) % len(DASHES)],  # neighbours differ
        "marker": MARKERS[number % len(MARKERS)],
        "zorder": 2 + 0.1 * (number % 2),  # a dashed curve is seen on a solid one
    }


def draw_bands(panel: Axes, x: Any, mean: Any, deviation: Any, colour: str = BLUE) -> None:
    """Draw the central 50 and 90 % of normal distributions around a curve of their means, as arrays."""
    label = f"central {' and '.join(map(str, CENTRAL))} %"
    for width in CENTRAL.values():
        with np.errstate(invalid="ignore"):  # of a task that diverges
            low, high = mean - width * deviation, mean + width * deviation
        panel.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0, label=label)
        label = ""  # one for both


def add_legend(figure: Figure | SubFigure, *panels: Axes) -> None:
    """Add a legend of these panels' curves below the figure; none where too many curves look alike.

    Of curves with the same label it names one.
    """
    pairs = [pair for panel in panels for pair in zip(*panel.get_legend_handles_labels(), strict=True)]
    curves = {label: handle for handle, label in pairs}
    if 0 < len(curves) <= DISTINCT_CURVES:
        place: Any = "outside lower center"  # which the stubs lack
        for columns in range(len(curves), 0, -1):
            legend = figure.legend(curves.values(), curves, loc=place, ncols=columns)
            if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
                break
            legend.remove()


def label_axes(panel: Axes, x: str, measure: str, wide: float = WIDE) -> None:
    """Label and scale the axes of whole numbers and of a measure. Call it when all curves are drawn.

    An accuracy is shown in percent, up to 100. The axis of a loss is logarithmic where the largest is more
    than `wide` times the smallest; that of others begins at 0 unless the loss varies by less than half.
    """
    accuracy = measure.split()[-1] == "accuracy"
    panel.set(xlabel=x, ylabel=f"{measure} (%)" if accuracy else measure)
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.xaxis.set_major_formatter("{x:,.0f}")
    values = [float(y) for line in panel.lines for y in np.asarray(line.get_ydata()) if abs(y) < math.inf]
    if accuracy:
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
        panel.set_ylim(min(values, default=0.0) - 0.02, 1.02)  # markers at the ends are whole
        return
    values = [] if min(values, default=0.0) < 0 else [y for y in values if y]  # of negative ones see all
    if values and max(values) > wide * min(values):
        panel.set_yscale("log")
        subs = (1, 2, 5) if max(values) > WIDE * min(values) else (1, 2, 3, 4, 5, 6, 8)
        panel.yaxis.set_major_locator(LogLocator(subs=subs))
        panel.yaxis.set_major_formatter("{x:g}")  # plain numbers, not powers in mathematical notation
        panel.yaxis.set_minor_formatter(NullFormatter())
    elif values and max(values) > 2 * min(values):
        panel.set_ylim(bottom=0.0)


def zoom(panel: Axes) -> None:
    """Leave the beginning out of the y axis, where curves change most and are not told apart."""
    bands = [np.asarray(path.vertices) for band in panel.collections for path in band.get_paths()]
    points = np.concatenate([np.empty((0, 2)), *bands])  # curves lie in their bands
    points = points[np.isfinite(points).all(1)]
    later = points[points[:, 0] >= BEGINNING * points[:, 0].max(initial=0.0), 1].tolist()
    if later and panel.get_yscale() == "linear":
        margin = 0.08 * (max(later) - min(later))
        low, high = panel.get_ylim()
        panel.set_ylim(max(low, min(later) - margin), min(high, max(later) + margin))


def render(figure: Figure) -> bytes:
    """Return a figure as PNG; drawing it is the slow part of writing it."""
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a box for each letter that the font lacks
        figure.savefig(png, format="png")
    return png.getvalue()


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_bytes(path, render(figure))
