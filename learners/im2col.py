"""Convolutions whose weights differ from task to task, as matrix products.

`vmap` over tasks makes one grouped convolution of them, which libraries compute slowly, and its second
derivatives more slowly still. A convolution is bilinear in images and kernels, and so are its derivatives:
each of the three maps below is one product over gathered patches ("im2col", channels last), and the
derivatives of each are the other two, to any order. A compiler fuses the gathering with the layers around it;
uncompiled, it costs more than it saves (docs/speed.md).
"""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class Geometry(NamedTuple):
    """Sizes of a convolution, rows and columns; images are `[images, rows, columns, channels]`, padded."""

    size: tuple[int, ...]  # of the images
    kernel: tuple[int, ...]
    stride: tuple[int, ...]


def gather(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...] = (1, 1)) -> Tensor:
    """Return the patches under a kernel, `[images, rows, columns, size of the kernel * channels]`."""
    (height, width), (down, right) = kernel, stride
    rows, columns = x.shape[1] - height + 1, x.shape[2] - width + 1  # where a patch may begin
    taps = product(range(height), range(width))
    return torch.cat([x[:, i : i + rows : down, j : j + columns : right] for i, j in taps], dim=-1)


def multiply(patches: Tensor, matrix: Tensor) -> Tensor:
    """Return the product over the patches' last axis: one matrix product for all images."""
    return (patches.flatten(0, -2) @ matrix).unflatten(0, patches.shape[:-1])


def convolve(x: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Map padded images, and kernels `[outputs, rows, columns, channels]`, to outputs, channels last."""
    return multiply(gather(x, geometry.kernel, geometry.stride), kernels.flatten(1).mT)


def spread(slope: Tensor, kernels: Tensor, geometry: Geometry) -> Tensor:
    """Map a gradient in the outputs, and the kernels, to the gradient in the padded images.

    Pixels whose positions leave the same remainders by the stride see the same taps of the kernel: their part
    is a convolution of the outputs' gradient with these taps in reverse.
    """
    (height, width), (down, right) = geometry.size, geometry.stride
    rows, columns = -(-height // down), -(-width // right)  # of the pixels with one remainder
    parts = []
    for i, j in product(range(down), range(right)):
        taps = kernels[:, i::down, j::right].flip(1, 2)
        up, left = taps.shape[1:3]
        if not up * left:  # a stride beyond the kernel
            parts.append(slope.new_zeros(len(slope), rows, columns, kernels.shape[3]))
            continue
        margins = (left - 1, columns - slope.shape[2], up - 1, rows - slope.shape[1])
        patches = gather(F.pad(slope, (0, 0, *margins)), (up, left))
        parts.append(multiply(patches, taps.permute(1, 2, 0, 3).flatten(0, 2)))
    x = torch.stack(parts, 3).unflatten(3, (down, right)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)[:, :height, :width]


def correlate(x: Tensor, slope: Tensor, geometry: Geometry) -> Tensor:
    """Map padded images, and a gradient in the outputs, to the gradient in the kernels."""
    patches = gather(x, geometry.kernel, geometry.stride)
    kernels = slope.flatten(0, 2).mT @ patches.flatten(0, 2)
    return kernels.unflatten(1, (*geometry.kernel, x.shape[3]))


# Each of a convolution's three tensors: the map that gives it, or a gradient in it, and the map's factors.
MAPS = {
    "outputs": (convolve, ("images", "kernels")),
    "images": (spread, ("outputs", "kernels")),
    "kernels": (correlate, ("images", "outputs")),
}


class Bilinear(Function):
    """One of `MAPS`, by name, with derivatives: `Bilinear.apply(*factors, geometry, name)`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, geometry: Geometry, name: str) -> Tensor:
        return MAPS[name][0](a, b, geometry)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *factors, ctx.geometry, ctx.name = inputs
        ctx.save_for_backward(*factors)
        ctx.save_for_forward(*factors)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        names = MAPS[ctx.name][1]
        tensors = {ctx.name: slope} | dict(zip(names, ctx.saved_tensors, strict=True))
        factors = {name: [tensors[factor] for factor in MAPS[name][1]] for name in names}
        return *(Bilinear.apply(*factors[name], ctx.geometry, name) for name in names), None, None

    @staticmethod
    def jvp(ctx: Any, along_a: Tensor | None, along_b: Tensor | None, *_: None) -> Tensor:
        a, b = ctx.saved_tensors
        pairs = [(along_a, b)] * (along_a is not None) + [(a, along_b)] * (along_b is not None)
        parts = [Bilinear.apply(*pair, ctx.geometry, ctx.name) for pair in pairs]
        return sum(parts[1:], parts[0])


class Im2colConv2d(nn.Conv2d):
    """Compute `nn.Conv2d` (one group, no dilation, zero padding) as a matrix product: the same result."""

    elementary = True  # see `learners.elementary.is_elementary`

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self._reversed_padding_repeated_twice).permute(0, 2, 3, 1)
        sizes = Geometry((x.shape[1], x.shape[2]), self.kernel_size, self.stride)
        y = Bilinear.apply(x, self.weight.permute(0, 2, 3, 1), sizes, "outputs")
        return (y if self.bias is None else y + self.bias).permute(0, 3, 1, 2)


class Im2colConv1d(nn.Conv1d):
    """Compute `nn.Conv1d` (one group, no dilation, zero padding) as the convolution of images of one row."""

    elementary = True

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x, self._reversed_padding_repeated_twice).mT[:, None]
        sizes = Geometry((1, x.shape[2]), (1, *self.kernel_size), (1, *self.stride))
        y = Bilinear.apply(x, self.weight.mT[:, None], sizes, "outputs")[:, 0]
        return (y if self.bias is None else y + self.bias).mT


CONVERTED: dict[type, type] = {nn.Conv1d: Im2colConv1d, nn.Conv2d: Im2colConv2d}


def convert_convolutions(module: nn.Module) -> nn.Module:
    """Convert convolutions in place, but not grouped or dilated ones, other paddings, and subclasses."""
    for layer in module.modules():
        if type(layer) in CONVERTED:
            assert isinstance(layer, nn.Conv1d | nn.Conv2d)
            if layer.groups == 1 and layer.padding_mode == "zeros" and {*layer.dilation} == {1}:
                layer.__class__ = CONVERTED[type(layer)]
    return module
