"""A network of sines for `--dataset harmonic`: their periods are too many for a small ReLU network.

python main.py --dataset harmonic --learner examples/sines.py:sines -s 5 --compile on
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Sine(nn.Module):
    """The elementwise sine."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def sines(outputs: int, inputs: tuple[int, ...], width: int = 64, fastest: float = 14.0) -> nn.Module:
    """Return two hidden layers of `width` sines, which map `[examples, numbers]` to `[examples, outputs]`.

    Frequencies of the first layer start uniform between minus and plus `fastest`, in radians per unit of x
    (those of a harmonic task go up to 14), and phases at random. The second layer starts as in Sitzmann et
    al. (2020).
    """
    first, second = nn.Linear(inputs[0], width), nn.Linear(width, width)
    head = nn.Linear(width, outputs)
    nn.init.uniform_(first.weight, -fastest, fastest)
    nn.init.uniform_(first.bias, -math.pi, math.pi)
    bound = math.sqrt(6 / width)  # inputs of the sines have unit variance
    nn.init.uniform_(second.weight, -bound, bound)
    nn.init.uniform_(head.weight, -bound / 3, bound / 3)
    nn.init.zeros_(head.bias)
    return nn.Sequential(first, Sine(), second, Sine(), head)
