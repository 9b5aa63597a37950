"""The one style of every picture: colours, axes, legends and images, and how a picture becomes a file.

All modules that draw import this one. Sizes and fonts are in `pictures.mplstyle`. matplotlib is imported when
the first picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from common.files import write_whole

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLE_FILE = Path(__file__).with_name("pictures.mplstyle")

# The hues are Okabe and Ito's, darkened until each has a contrast of 3 : 1 to white and colour-blind readers
# still tell them apart.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#005A9C", "#BF8500", "#008F6B", "#B83A00", "#C565A0", "#3399DD"
GREY = "#767676"  # what is drawn for comparison
PALETTE = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY)  # of curves, in this order
DASHES = ("-", "--", "-.", ":")  # after the last colour they begin again with the next dash
MARKERS = "osD^vPX"  # seven, which has no divisor in common with the six colours
DISTINCT_CURVES = len(PALETTE) * len(DASHES)

DPI = 200
SMALL = 8  # font size in points of notes
LETTERS_PER_INCH = 17  # of a legend
WIDE = 50.0  # ratio of the largest to the smallest loss from which its axis is logarithmic


@contextmanager
def styled() -> Iterator[None]:
    """Make figures in this style: `with styled():`, or `@styled()` on a function that draws."""
    import matplotlib.style

    with matplotlib.style.context(STYLE_FILE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches, whose panels share the room among themselves."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def curve_style(number: int) -> dict[str, Any]:
    """Return colour, line style and marker of the curve with this number."""
    return {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": DASHES[number // len(PALETTE) % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
    }


def add_legend(figure: Figure, panel: Axes, place: str = "center") -> None:
    """Add a legend of the panel's curves below all panels; none where too many curves look alike.

    Args:
        place: "left", "center" or "right".
    """
    handles, labels = panel.get_legend_handles_labels()
    if 0 < len(labels) <= DISTINCT_CURVES:
        room = LETTERS_PER_INCH * figure.get_figwidth() // (max(map(len, labels)) + 8)
        columns = min(len(labels), max(1, int(room)))
        outside: Any = f"outside lower {place}"
        figure.legend(handles, labels, loc=outside, ncols=columns)


def draw_images(panel: Axes, images: Tensor, above: float = 0.0) -> None:
    """Draw a grid of images with gaps: the image at `row` and `column` fills that unit square of the panel.

    Args:
        images: `[rows, columns, channels, height, width]` in [0, 1]: colour, or one channel, drawn dark on
            white.
        above: additional gap above each row, in heights of an image.
    """
    images = images.float().clamp(0, 1)
    if images.shape[2] == 1:
        images = (1 - images).expand(-1, -1, 3, -1, -1)
    rows, columns, _, height, _ = images.shape
    gap = max(1, round(0.06 * height))
    padded = functional.pad(images, (gap, gap, gap + round(above * height), gap), value=1.0)
    pixels = padded.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [height, width, 3] of the grid
    aspect = padded.shape[3] / padded.shape[4]
    panel.imshow(pixels.numpy(), extent=(0, columns, rows, 0), aspect=aspect, interpolation="nearest")
    panel.grid(visible=False)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set(xticks=[], yticks=[])


# ---- axes -----------------------------------------------------------------------------------


def set_iteration_axis(panel: Axes) -> None:
    """Label the horizontal axis of a learning curve."""
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("iteration")
    panel.xaxis.set_major_formatter("{x:,.0f}")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def set_step_axis(panel: Axes) -> None:
    """Label the horizontal axis of results over inner steps."""
    from matplotlib.ticker import MaxNLocator

    panel.set_xlabel("inner steps")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def set_measure_axis(panel: Axes, name: str, *, accuracy: bool) -> None:
    """Label and scale the vertical axis of an accuracy, up to 100 %, or of a loss.

    A loss that varies little has an axis of its own range, one that varies more begins at 0, and one that
    varies by orders of magnitude is logarithmic. Call it when all curves are drawn.
    """
    import numpy as np
    from matplotlib.ticker import NullFormatter, PercentFormatter

    panel.set_ylabel(f"{name} (%)" if accuracy else name)
    if accuracy:
        panel.yaxis.set_major_formatter(PercentFormatter(xmax=1, symbol=""))
        panel.set_ylim(top=1.0)
        return
    values = [float(y) for line in panel.lines for y in np.asarray(line.get_ydata()) if 0 < y < math.inf]
    if values and max(values) > WIDE * min(values):
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter("{x:g}")  # plain numbers, not powers in mathematical notation
        panel.yaxis.set_minor_formatter(NullFormatter())
    elif values and max(values) > 2 * min(values):
        panel.set_ylim(bottom=0.0)


# ---- files ----------------------------------------------------------------------------------


def render(figure: Figure) -> np.ndarray:
    """Draw a figure: uint8 `[height, width, 3]`, the slow part of writing it."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def write_pixels(path: Path, pixels: np.ndarray) -> None:
    """Write a rendered figure as PNG, whole or not at all."""
    from PIL import Image

    image = Image.fromarray(pixels)
    write_whole(path, lambda file: image.save(file, format="png"))


def write_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG, whole or not at all."""
    write_pixels(path, render(figure))
