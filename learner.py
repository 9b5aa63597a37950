"""Base learners: the networks that are meta-learned. Plain modules that know nothing of meta-learning.

A new one is a function from the number of outputs to an `nn.Module`, an entry in `LEARNERS`, and a
line about it in `presets.LEARNERS`.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn

from normalisation import BatchNorm
from partition import add_context

CHANNELS = 64


class SpatialMean(nn.Module):
    """`[batch, channels, height, width]` to `[batch, channels]`."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def mlp(outputs: int, inputs: int = 1) -> nn.Module:
    """1-40-40-1 with ReLU: the sinusoid network of Finn et al. (2017)."""
    return nn.Sequential(
        nn.Linear(inputs, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, outputs)
    )


# Below, a bias in front of a batch normalisation would be subtracted with the mean: there is none.


def conv(outputs: int) -> nn.Module:
    """Four 3x3 convolutions of stride 2, mean over space: Finn et al.'s Omniglot network."""
    blocks: list[nn.Module] = []
    for channels_in in (1, CHANNELS, CHANNELS, CHANNELS):
        convolution = nn.Conv2d(channels_in, CHANNELS, 3, stride=2, padding=1, bias=False)
        blocks += [convolution, BatchNorm(CHANNELS), nn.ReLU()]
    return nn.Sequential(*blocks, SpatialMean(), nn.Linear(CHANNELS, outputs))


def conv_pool(outputs: int) -> nn.Module:
    """`conv` with 2x2 max pooling in the place of the strides (Vinyals et al. 2016)."""
    blocks: list[nn.Module] = []
    for channels_in in (1, CHANNELS, CHANNELS, CHANNELS):
        convolution = nn.Conv2d(channels_in, CHANNELS, 3, padding=1, bias=False)
        blocks += [convolution, BatchNorm(CHANNELS), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*blocks, SpatialMean(), nn.Linear(CHANNELS, outputs))


def convnet(outputs: int) -> nn.Module:
    """Four unpadded 3x3 convolutions with PyTorch's own batch norm, flattened: 25,600 features at 28 x 28."""
    blocks: list[nn.Module] = []
    for channels_in in (1, CHANNELS, CHANNELS, CHANNELS):
        blocks += [nn.Conv2d(channels_in, CHANNELS, 3), nn.BatchNorm2d(CHANNELS), nn.ReLU()]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(20 * 20 * CHANNELS, outputs))


def fc(outputs: int) -> nn.Module:
    """784-256-128-64-64 with batch norm and ReLU: Finn et al.'s fully connected Omniglot network."""
    sizes = (28 * 28, 256, 128, 64, 64)
    layers: list[nn.Module] = [nn.Flatten()]
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out, bias=False), BatchNorm(size_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


LEARNERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "conv": conv,
    "conv-pool": conv_pool,
    "convnet": convnet,
    "fc": fc,
}


def initialise_as_paper(learner: nn.Module) -> None:
    """Finn et al.'s initialisation, in place.

    Convolutions Xavier uniform and the layer above them N(0, 1); fully connected networks truncated
    normal with std 0.01 (cut at two std, as TensorFlow does); biases 0.
    """
    convolutional = any(isinstance(layer, nn.Conv2d) for layer in learner.modules())
    for layer in learner.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, nn.Linear) and convolutional:
            nn.init.normal_(layer.weight)
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def build_learner(
    name: str, outputs: int, *, inputs: int = 1, init: str = "torch", context: int = 0, seed: int = 0
) -> nn.Module:
    """A fresh learner; the same weights for the same seed, whatever else has drawn random numbers.

    Arguments:
        inputs: numbers that describe an example, where there is more than one (regression only).
        context: size of the context vector that modulates a layer (see partition.py); 0: there is none.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        learner = LEARNERS[name](outputs) if inputs == 1 else LEARNERS[name](outputs, inputs)
        if init == "paper":
            initialise_as_paper(learner)
    return add_context(learner, context, seed=seed) if context else learner
