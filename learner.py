"""Base learners by name: built in, torchvision's, or the user's own factory.

A learner is a plain `nn.Module` that knows nothing of meta-learning; `MAML` takes it as it is.

    learner = build_learner("my_code.py:factory", outputs=5, arguments={"width": 64})

A new built-in one is a function from the number of outputs and the shape of an example to a module, an entry
in `FACTORIES`, and its facts in `learners/options.py`.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from common.batch import Tree
from common.errors import UsageError, fold_message
from common.names import is_own_code, parse_name
from common.own_code import call_factory, load_code, select_accepted
from learners.heads import add_context, linear_head, replace_module
from learners.modules import has_lazy, materialise, unwrap

Shape = tuple[int, ...]  # of one example
CHANNELS = 64


def mlp(outputs: int, inputs: Shape = (1,), *, width: int = 40, layers: int = 2) -> nn.Module:
    """Build 1-40-40-1 with ReLU: the sinusoid network of Finn et al. (2017)."""
    (size,) = inputs
    hidden: list[nn.Module] = []
    for _ in range(layers):
        hidden += [nn.Linear(size, width), nn.ReLU()]
        size = width
    return nn.Sequential(*hidden, nn.Linear(size, outputs))


class Sine(nn.Module):
    elementary = True  # see `learners.elementary.is_elementary`

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def sines(
    outputs: int, inputs: Shape = (1,), *, width: int = 64, layers: int = 2, fastest: float = 14.0
) -> nn.Module:
    """Build layers of sines, which draw curves of many periods where a small ReLU network stays at the mean.

    Frequencies of the first layer start uniform between minus and plus `fastest`, in radians per unit of x
    (those of a harmonic task go up to 14), and phases at random. The others start as in Sitzmann et al. 2020.
    """
    (size,) = inputs
    first, bound = nn.Linear(size, width), math.sqrt(6 / width)  # inputs of the others have unit variance
    nn.init.uniform_(first.weight, -fastest, fastest)
    nn.init.uniform_(first.bias, -math.pi, math.pi)
    hidden: list[nn.Module] = [first, Sine()]
    for _ in range(layers - 1):
        layer = nn.Linear(width, width)
        nn.init.uniform_(layer.weight, -bound, bound)
        hidden += [layer, Sine()]
    head = nn.Linear(width, outputs)
    nn.init.uniform_(head.weight, -bound / 3, bound / 3)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*hidden, head)


def normalise(layer: type[nn.Module], channels: int, *, scale: bool = False) -> nn.Module:
    """Return a layer of batch norm as in Finn et al.'s code: its eps and, without `scale`, a shift alone."""
    norm = layer(channels, eps=1e-3)
    norm.weight.requires_grad_(scale)  # otherwise 1 for ever
    return norm


class SpatialMean(nn.Module):
    """Average `[batch, channels, ...]` over space, or time: `[batch, channels]`."""

    elementary = True  # see `learners.elementary.is_elementary`

    def forward(self, x: Tensor) -> Tensor:
        return x.mean([*range(2, x.dim())])


def convolutional(
    outputs: int,
    inputs: Shape = (1, 28, 28),
    *,
    channels: int = CHANNELS,
    scale: bool = False,
    pool: bool = False,
    flat: bool = False,
) -> nn.Module:
    """Build four 3x3 convolutions with batch norm and ReLU, and a linear layer.

    Args:
        scale: batch norm has a scale as well as a shift.
        pool: 2x2 max pooling instead of strides of 2.
        flat: the linear layer sees all positions instead of their mean.
    """
    layers: list[nn.Module] = []
    for channels_in in (inputs[0], channels, channels, channels):
        convolution = nn.Conv2d(channels_in, channels, 3, stride=1 if pool else 2, padding=1, bias=False)
        layers += [convolution, normalise(nn.BatchNorm2d, channels, scale=scale), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] * pool
    positions = math.prod(size // 16 if pool else -(-size // 16) for size in inputs[1:])
    features = channels * positions if flat else channels
    return nn.Sequential(*layers, nn.Flatten() if flat else SpatialMean(), nn.Linear(features, outputs))


def conv1d(
    outputs: int, inputs: Shape = (1, 64), *, signals: int = 1, channels: int = CHANNELS, kernel: int = 5
) -> nn.Module:
    """Build four convolutions over time with strides of 2, batch norm and ReLU, and a linear layer.

    Inputs are `[signals, length]`, or rows of a table: `signals` of one length, one after another.
    """
    layers: list[nn.Module] = []
    if len(inputs) == 1:
        if inputs[0] % signals or inputs[0] <= signals:
            problem = f"a row of {inputs[0]} is not {signals} signals of one length, above 1"
            raise ValueError(f"{problem}: say how many with --learner-args signals=N")
        layers.append(nn.Unflatten(1, (signals, inputs[0] // signals)))
    elif len(inputs) == 2 and signals in (1, inputs[0]):
        signals = inputs[0]
    else:
        raise ValueError(f"examples are {inputs}: give [channels, length], and no other signals=N")
    for channels_in in (signals, channels, channels, channels):
        convolution = nn.Conv1d(channels_in, channels, kernel, stride=2, padding=kernel // 2, bias=False)
        layers += [convolution, normalise(nn.BatchNorm1d, channels, scale=True), nn.ReLU()]
    return nn.Sequential(*layers, SpatialMean(), nn.Linear(channels, outputs))


def convnet(outputs: int, inputs: Shape = (1, 28, 28), *, channels: int = CHANNELS) -> nn.Module:
    """Build four unpadded 3x3 convolutions with PyTorch's batch norm: 25,600 features at 28 x 28."""
    blocks: list[nn.Module] = []
    for channels_in in (inputs[0], channels, channels, channels):
        blocks += [nn.Conv2d(channels_in, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()]
    features = channels * (inputs[1] - 8) * (inputs[2] - 8)
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(features, outputs))


def fc(outputs: int, inputs: Shape = (1, 28, 28)) -> nn.Module:
    """Build 784-256-128-64-64 with batch norm and ReLU: Finn et al.'s fully connected Omniglot network."""
    sizes = (math.prod(inputs), 256, 128, 64, 64)
    layers: list[nn.Module] = [nn.Flatten()]
    for size_in, size_out in pairwise(sizes):
        layers += [nn.Linear(size_in, size_out, bias=False), normalise(nn.BatchNorm1d, size_out), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], outputs))


FACTORIES: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "sines": sines,
    "conv": convolutional,  # Finn et al.'s Omniglot network
    "conv-flat": partial(convolutional, scale=True, flat=True),  # Nichol et al.'s (2018)
    "conv-pool": partial(convolutional, pool=True),  # Vinyals et al. (2016)
    # the mini-ImageNet network of Ravi and Larochelle (2017)
    "conv4": partial(convolutional, inputs=(3, 84, 84), channels=32, pool=True, flat=True),
    "convnet": convnet,
    "conv1d": conv1d,
    "fc": fc,
}


class GreyAsColour(nn.Module):
    """Give a network for three channels images of one channel."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Any:
        return self.network(x.expand(-1, 3, -1, -1))


def build_torchvision(model: str, outputs: int, /, inputs: Any = None, **arguments: Any) -> nn.Module:
    """Build torchvision's model for colour or grey images; with `weights`, trained ones but for the head.

    Raises UsageError for a model that has other layers with weights than without: a checkpoint rebuilds it
    without.
    """
    import torchvision

    if arguments.get("weights") is None:
        network = torchvision.models.get_model(model, num_classes=outputs, **arguments)
    elif model in ("googlenet", "inception_v3"):
        own = "load the weights in a factory of yours, --learner file.py:factory"
        raise UsageError(f"--learner torchvision:{model}: weights= also changes its layers: {own}")
    else:
        network = torchvision.models.get_model(model, **arguments)
        name = linear_head(network)
        head = network.get_submodule(name)
        assert isinstance(head, nn.Linear)
        replace_module(network, name, nn.Linear(head.in_features, outputs))
    return GreyAsColour(network) if inputs and inputs[0] == 1 else network


def load_factory(name: str) -> Callable[..., nn.Module]:
    """Return a learner's factory by name; it takes the number of outputs. UsageError if there is none."""
    kind, model, _ = parse_name(name)
    if kind == "code":
        return load_code(name, "--learner")
    if name in FACTORIES:
        return FACTORIES[name]
    import torchvision

    models = torchvision.models.list_models(torchvision.models)
    if model not in models:
        nearest = ", ".join(difflib.get_close_matches(model, models, 5) or models[:5])
        raise UsageError(f"--learner {name}: torchvision has no classification model {model}: try {nearest}")
    return partial(build_torchvision, model)


def build_learner(
    name: str,
    outputs: int,
    *,
    inputs: Any = None,
    arguments: dict[str, Any] | None = None,
    init: str = "torch",
    context: int = 0,
    seed: int = 0,
    fetch_weights: bool = True,
    example: Tree | None = None,
) -> nn.Module:
    """Build a learner with fresh weights: the same for a seed, whatever else has drawn random numbers.

    Args:
        name: a key of `FACTORIES`, `torchvision:MODEL`, or the user's `file.py:factory`.
        inputs: the shape of an example, or a tree of shapes, for factories with a parameter `inputs`.
        init: "torch" leaves the weights; "paper" applies `initialise_as_paper`.
        context: size of a context vector that modulates a layer (`heads.add_context`); 0: none.
        fetch_weights: False leaves out torchvision's trained weights: a checkpoint's will replace them.
        example: inputs of a task, from which lazy layers take their sizes.

    Raises UsageError if the factory does not exist, fails with the arguments, or does not return a module.
    """
    factory = load_factory(name)
    options = {} if inputs is None else select_accepted(factory, {"inputs": inputs})
    options |= arguments or {}
    if not fetch_weights and not is_own_code(name):
        options.pop("weights", None)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        torch.manual_seed(seed)
        warnings.filterwarnings("ignore", message="Initializing zero-element")  # refused below
        learner = call_factory(factory, name, "--learner", outputs, **options)
        if not isinstance(learner, nn.Module):
            raise UsageError(f"--learner {name} makes a {type(learner).__name__}, not a torch.nn.Module")
        if name in FACTORIES and not all(weight.numel() for weight in learner.parameters()):
            raise UsageError(f"--learner {name}: inputs {inputs} are too small: use a larger --image-size")
        try:
            learner = unwrap(learner)
            if has_lazy(learner) and example is not None:
                materialise(learner, example)
        except Exception as error:  # the user's module may fail in any way
            raise UsageError(f"--learner {name}: {fold_message(error)[:200]}") from error
        if init == "paper":
            initialise_as_paper(learner)
    return add_context(learner, context, seed=seed) if context else learner


def initialise_as_paper(learner: nn.Module) -> None:
    """Set weights as Finn et al. (2017) do, in place.

    Convolutions, and linear layers after flattened ones, are Xavier uniform; linear layers after a mean over
    space N(0, 1); those of fully connected networks N(0, 0.01^2), cut at two std. Biases are 0.
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
