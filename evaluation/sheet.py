"""Canvas for pictures made of images and words: task sheets and contact sheets.

Everything is placed by coordinates in units of one image height from the upper left corner. That is faster by
far than a panel for each image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from evaluation import style

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 0.12  # between images


class Sheet:
    """A figure of images and words alone.

    Args:
        width, height: in image heights.
        inch: inches of an image height.
        top: image heights above 0, for titles.
    """

    def __init__(self, width: float, height: float, *, inch: float, top: float) -> None:
        from matplotlib.figure import Figure

        self.figure: Figure = Figure(figsize=(width * inch, height * inch))
        self.panel = self.figure.add_axes((0, 0, 1, 1))
        self.panel.set_axis_off()
        self.panel.set(xlim=(0, width), ylim=(height - top, -top), autoscale_on=False)

    def text(self, x: float, y: float, words: str, **look: Any) -> None:
        """Write words, by default centred vertically on `y`."""
        self.panel.text(x, y, words, **{"va": "center", **look})

    def images(self, images: Tensor, x: float, y: float, below: float = GAP) -> None:
        """Draw a grid of images, each of height and width 1 and with a gap to the next.

        Args:
            images: `[rows, columns, channels, height, width]` in [0, 1]: colour, or one channel from the
                background (0) to the ink (1).
            below: gap between rows, for example for words.
        """
        from matplotlib.colors import to_rgb

        background, ink = (
            torch.tensor(to_rgb(colour))[:, None, None] for colour in (style.BACKGROUND, style.INK)
        )
        images = images.float().clamp(0, 1)
        if images.shape[2] == 1:
            images = background + images * (ink - background)
        rows, columns, _, height, width = images.shape
        down, right = round(below * height), round(GAP * width)
        grid = background.repeat(rows, columns, 1, height + down, width + right)
        grid[..., :height, :width] = images
        pixels = grid.permute(0, 3, 1, 4, 2).reshape(rows * (height + down), columns * (width + right), 3)
        extent = (x, x + columns * (1 + right / width), y + rows * (1 + down / height), y)
        self.panel.imshow(pixels.numpy(), extent=extent, aspect="auto", interpolation="nearest", zorder=0)

    def frame(self, x: float, y: float, colour: str, line: str, width: float) -> None:
        """Draw a frame around the image at this place."""
        from matplotlib.patches import Rectangle

        frame = Rectangle((x, y), 1, 1, fill=False, edgecolor=colour, linestyle=line, linewidth=width)
        self.panel.add_patch(frame)


def pitch(images: Tensor, gap: float = GAP) -> float:
    """Return the distance from an image to the next, with a gap of whole pixels, as `Sheet.images` has it.

    Args:
        images: `[..., height, width]`.
    """
    return 1 + round(gap * images.shape[-1]) / images.shape[-1]
