"""A network of sines for `--dataset harmonic`: its curves have more periods than a small ReLU network draws.

python main.py --dataset harmonic --learner examples/sines.py:sines -s 5 --compile on
"""

from __future__ import annotations

import math

import torch
from torch import nn


class Sine(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x)


def sines(outputs: int, inputs: tuple[int, ...], width: int = 64, fastest: float = 14.0) -> nn.Module:
    """Two hidden layers of `width` sines: [examples, numbers] to [examples, outputs].

    The first layer's frequencies begin uniform within `fastest` radians for a unit of x (a harmonic task's go
    up to 14), its phases at random; the second layer begins as that of Sitzmann et al. (2020).
    """
    first, second = nn.Linear(inputs[0], width), nn.Linear(width, width)
    head = nn.Linear(width, outputs)
    nn.init.uniform_(first.weight, -fastest, fastest)
    nn.init.uniform_(first.bias, -math.pi, math.pi)
    bound = math.sqrt(6 / width)  # keeps what goes into a sine at unit variance
    nn.init.uniform_(second.weight, -bound, bound)
    nn.init.uniform_(head.weight, -bound / 3, bound / 3)
    nn.init.zeros_(head.bias)
    return nn.Sequential(first, Sine(), second, Sine(), head)
