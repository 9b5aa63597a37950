"""Convolutions whose weights differ from task to task, as matrix products.

`vmap` over tasks makes one grouped convolution of them, which libraries compute slowly, and its second
derivatives more slowly still. As a product over gathered patches ("im2col", channels last) every derivative
is a matrix product again. A compiler fuses the gathering with the layers around it; uncompiled, it costs more
than it saves (benchmarks/README.md).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Im2colConv2d(nn.Conv2d):
    """Compute `nn.Conv2d` (one group, zero padding) as a matrix product over patches: the same result."""

    elementary = True  # see `learners.elementary.is_elementary`

    def forward(self, x: Tensor) -> Tensor:
        # [batch, height, width, channels]: a patch is then a few runs of whole pixels
        x = F.pad(x, self._reversed_padding_repeated_twice).permute(0, 2, 3, 1)
        (down, right), (row, column), (height, width) = self.stride, self.dilation, self.kernel_size
        rows = x.shape[1] - row * (height - 1)  # where a patch may begin
        columns = x.shape[2] - column * (width - 1)
        patches = torch.cat(
            [
                x[:, row * i : row * i + rows : down, column * j : column * j + columns : right]
                for i in range(height)
                for j in range(width)
            ],
            dim=-1,
        )
        kernels = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [patch size, channels out]
        y = patches.flatten(0, 2) @ kernels
        if self.bias is not None:
            y = y + self.bias
        return y.unflatten(0, patches.shape[:3]).permute(0, 3, 1, 2)


def convert_convolutions(module: nn.Module) -> nn.Module:
    """Convert every `nn.Conv2d` in place, but not grouped ones, other paddings than zeros, and subclasses."""
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            layer.__class__ = Im2colConv2d
    return module
