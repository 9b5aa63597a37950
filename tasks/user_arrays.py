"""Read a user's arrays, `[examples, ...]`, as numbers, and as images in the form of the training images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UsageError
from tasks.pixels import Form, Range, prepare, scale_values

Array = np.ndarray[Any, Any]


def read_numbers(name: str, values: Any, axes: int = 1) -> Array:
    """Return finite numbers of at least so many axes; UsageError, which has the array's name, for others."""
    array = np.asarray(values)
    if array.dtype == object:  # as of a data frame with columns of several types
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise UsageError(f"{name} should be numbers: {error}") from error
    if array.dtype.kind not in "biuf":
        raise UsageError(f"{name} should be numbers, not {array.dtype}")
    if array.ndim < axes or not array.size:
        shape = "[examples, ...]" if axes == 1 else "[examples, numbers] or images"
        raise UsageError(f"{name} is {array.shape}: give {shape}")
    if not np.isfinite(array).all():
        raise UsageError(f"{name} has NaN or infinity: mend it")
    return array


def read_pixels(values: Array, form: Form, record: Sequence[str], user_range: Range | None) -> Tensor:
    """Return images as the training images were made: uint8 `[images, channels, size, size]`.

    Args:
        values: `[images, height, width]` or `[images, channels, height, width]`, 1 or 3 channels: bytes, or
            numbers from 0 (black) to 1 (white); other whole numbers have the range of the training images.
        record: the range of the training images, see `Form`.
        user_range: the values that are black and white, if the user says so.
    """
    if values.ndim == 3:
        values = values[:, None]
    if values.ndim != 4 or values.shape[1] not in (1, 3):
        raise UsageError(f"x is {values.shape}: give images [n, height, width] or [n, 1 or 3, height, width]")
    is_integer, plain = values.dtype.kind in "iu", replace(form, range=None)
    low, high = user_range or ((form.recorded(record).range or (0.0, 255.0)) if is_integer else (0.0, 1.0))
    lowest, highest = float(values.min()), float(values.max())
    if not user_range and (lowest < low or highest > high or (is_integer and highest <= 1 < high)):
        raise UsageError(
            f"x has values from {lowest:.7g} to {highest:.7g}: give whole numbers from 0 to "
            f"{max(high, 255):.7g}, floats from 0 (black) to 1 (white), or say image_range='LOW,HIGH'"
        )
    pixels = scale_values(values, (low, high)).round().astype(np.uint8).transpose(0, 2, 3, 1)
    images = (Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image) for image in pixels)
    return torch.from_numpy(np.stack([prepare(image, plain) for image in images]))
