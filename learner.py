"""Base learners: the networks that are meta-learned. Plain modules that know nothing of meta-learning.

One's own stay in one's own code: `--learner module:factory`. A new built-in one is a function from the
number of outputs and the shape of an example to an `nn.Module`, an entry in `LEARNERS`, and a line about it
in `presets.LEARNERS`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import UsageError
from common.own_code import asked_for, called, is_own_code, load_code
from learners.batch_norm import BatchNorm
from learners.heads import add_context, linear_head

CHANNELS = 64


class SpatialMean(nn.Module):
    """`[batch, channels, height, width]` to `[batch, channels]`."""

    elementary = True  # see elementary.py

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


Shape = tuple[int, ...]  # of one example


def mlp(outputs: int, inputs: Shape = (1,), *, width: int = 40, layers: int = 2) -> nn.Module:
    """1-40-40-1 with ReLU: the sinusoid network of Finn et al. (2017)."""
    (size,) = inputs
    hidden: list[nn.Module] = []
    for _ in range(layers):
        hidden += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*hidden, nn.Linear(size, outputs))


# Below, a bias in front of a batch normalisation would be subtracted with the mean: there is none.


def _strided(inputs: Shape, channels: int, scale: bool) -> list[nn.Module]:
    """Four 3x3 convolutions of stride 2, each with batch norm and ReLU."""
    blocks: list[nn.Module] = []
    for channels_in in (inputs[0], channels, channels, channels):
        convolution = nn.Conv2d(channels_in, channels, 3, stride=2, padding=1, bias=False)
        blocks += [convolution, BatchNorm(channels, scale=scale), nn.ReLU()]
    return blocks


def conv(
    outputs: int, inputs: Shape = (1, 28, 28), *, channels: int = CHANNELS, scale: bool = False
) -> nn.Module:
    """Four 3x3 convolutions of stride 2, mean over space: Finn et al.'s Omniglot network."""
    blocks = _strided(inputs, channels, scale)
    return nn.Sequential(*blocks, SpatialMean(), nn.Linear(channels, outputs))


def conv_flat(
    outputs: int, inputs: Shape = (1, 28, 28), *, channels: int = CHANNELS, scale: bool = True
) -> nn.Module:
    """`conv` flattened, with batch norm's scale: Nichol et al.'s Omniglot network (Reptile, 2018)."""
    features = channels * math.prod(-(-size // 16) for size in inputs[1:])
    return nn.Sequential(*_strided(inputs, channels, scale), nn.Flatten(), nn.Linear(features, outputs))


def _pooled(inputs: Shape, channels: int, scale: bool) -> list[nn.Module]:
    """Four 3x3 convolutions, each with batch norm, ReLU and 2x2 max pooling."""
    blocks: list[nn.Module] = []
    for channels_in in (inputs[0], channels, channels, channels):
        convolution = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
        blocks += [convolution, BatchNorm(channels, scale=scale), nn.ReLU(), nn.MaxPool2d(2)]
    return blocks


def conv_pool(
    outputs: int, inputs: Shape = (1, 28, 28), *, channels: int = CHANNELS, scale: bool = False
) -> nn.Module:
    """`conv` with 2x2 max pooling in the place of the strides (Vinyals et al. 2016)."""
    blocks = _pooled(inputs, channels, scale)
    return nn.Sequential(*blocks, SpatialMean(), nn.Linear(channels, outputs))


def conv4(outputs: int, inputs: Shape = (3, 84, 84), *, channels: int = 32, scale: bool = False) -> nn.Module:
    """The mini-ImageNet network of Ravi and Larochelle (2017) and Finn et al.: max pooling, flattened."""
    features = channels * (inputs[1] // 16) * (inputs[2] // 16)
    return nn.Sequential(*_pooled(inputs, channels, scale), nn.Flatten(), nn.Linear(features, outputs))


def convnet(outputs: int, inputs: Shape = (1, 28, 28), *, channels: int = CHANNELS) -> nn.Module:
    """Four unpadded 3x3 convolutions with PyTorch's own batch norm, flattened: 25,600 features at 28 x 28."""
    blocks: list[nn.Module] = []
    for channels_in in (inputs[0], channels, channels, channels):
        blocks += [nn.Conv2d(channels_in, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
    features = channels * (inputs[1] - 8) * (inputs[2] - 8)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(features, outputs))


def fc(outputs: int, inputs: Shape = (1, 28, 28)) -> nn.Module:
    """784-256-128-64-64 with batch norm and ReLU: Finn et al.'s fully connected Omniglot network."""
    sizes = (math.prod(inputs), 256, 128, 64, 64)
    layers: list[nn.Module] = [nn.Flatten()]
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out, bias=False), BatchNorm(size_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


def of_torchvision(name: str, outputs: int, inputs: Shape | None, /, **arguments: Any) -> nn.Module:
    """A classification model of torchvision with a last layer for `outputs`, for grey images, too.

    With `weights` (a name of torchvision's, "DEFAULT" say) it is a trained one, whose last layer is new.
    """
    import torchvision

    trained = arguments.get("weights") is not None
    model = torchvision.models.get_model(name, **({} if trained else {"num_classes": outputs}), **arguments)
    if trained:
        head = model.get_submodule(linear_head(model))
        assert isinstance(head, nn.Linear)
        parent, _, child = linear_head(model).rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Linear(head.in_features, outputs))
    return GreyAsColour(model) if inputs and inputs[0] == 1 else model


class GreyAsColour(nn.Module):
    """A network for images of three channels, for those of one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x.expand(-1, 3, -1, -1))


LEARNERS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "conv": conv,
    "conv-flat": conv_flat,
    "conv-pool": conv_pool,
    "conv4": conv4,
    "convnet": convnet,
    "fc": fc,
}


def initialise_as_paper(learner: nn.Module) -> None:
    """Finn et al.'s initialisation, in place.

    Convolutions Xavier uniform, the layer above their mean N(0, 1), and above them flattened Xavier uniform;
    fully connected networks truncated normal with std 0.01 (cut at two std, as TensorFlow does); biases 0.
    """
    layers = list(learner.modules())
    convolutional = any(isinstance(layer, nn.Conv2d) for layer in layers)
    flattened = convolutional and any(isinstance(layer, nn.Flatten) for layer in layers)
    for layer in layers:
        if isinstance(layer, nn.Conv2d) or (isinstance(layer, nn.Linear) and flattened):
            nn.init.xavier_uniform_(layer.weight)
        elif isinstance(layer, nn.Linear) and convolutional:
            nn.init.normal_(layer.weight)
        elif isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.01, a=-0.02, b=0.02)
        if isinstance(layer, nn.Conv2d | nn.Linear) and layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_learner(name: str) -> None:
    """Raises UsageError where there is no learner of that name; before there are data to build it for."""
    if is_own_code(name):
        load_code(name, "--learner")
    elif name.startswith("torchvision:"):
        import torchvision

        there = torchvision.models.list_models(torchvision.models)
        if name.partition(":")[2] not in there:
            raise UsageError(
                f"--learner {name}: torchvision has no classification model of that name; it has "
                f"{', '.join(there)}"
            )


def build_learner(
    name: str,
    outputs: int,
    *,
    inputs: Any = None,
    arguments: dict[str, Any] | None = None,
    init: str = "torch",
    context: int = 0,
    seed: int = 0,
) -> nn.Module:
    """A fresh learner; the same weights for the same seed, whatever else has drawn random numbers.

    Raises UsageError where a factory is not there, does not take the arguments, or makes no module.

    Arguments:
        name: a built-in one, `torchvision:MODEL`, or a factory in the user's code, which is called with the
            number of outputs, the arguments and, where it has a parameter `inputs`, the shape of an example.
        inputs: that shape, or nested tuples or dictionaries of shapes where an example has several parts.
        context: size of the context vector that modulates a layer (see partition.py); 0: there is none.
    """
    given = arguments or {}
    shape = {} if inputs is None else {"inputs": inputs}
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        if name in LEARNERS:
            warnings.filterwarnings("ignore", message="Initializing zero-element")  # refused here
            learner = called(LEARNERS[name], name, "--learner", outputs, **shape | given)
            if not all(weight.numel() for weight in learner.parameters()):
                raise UsageError(
                    f"--learner {name}: of inputs {inputs} nothing is left for its last layers: larger ones "
                    "(--image-size), or other --learner-args"
                )
        elif name.startswith("torchvision:"):
            model = partial(of_torchvision, name.partition(":")[2], outputs, inputs)
            learner = called(model, name, "--learner", **given)
        else:
            factory = load_code(name, "--learner")
            learner = called(factory, name, "--learner", outputs, **asked_for(factory, shape) | given)
        if not isinstance(learner, nn.Module):
            raise UsageError(f"--learner {name} makes a {type(learner).__name__}, not a torch.nn.Module")
        if init == "paper":
            initialise_as_paper(learner)
    return add_context(learner, context, seed=seed) if context else learner
