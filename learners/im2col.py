"""Convolutions whose weights differ from task to task, as matrix products.

`vmap` over tasks makes one grouped convolution of them, which libraries compute slowly, and its second
derivatives more slowly still. As a product over gathered patches ("im2col", channels last) every derivative
is a matrix product again: one for each task, or a single one where tasks share their weights, as they do
before the first inner step. A compiler fuses the gathering with the layers around it; uncompiled, it costs
more than it saves (benchmarks/README.md). `MAML(convolution="im2col")` converts its copy of the learner.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Im2colConv2d(nn.Conv2d):
    """Compute `nn.Conv2d` as a matrix product over patches, with the same parameters and result.

    Made by `convert_convolutions`; requires `groups == 1` and zero padding.
    """

    elementary = True  # see `learners.elementary.is_elementary`

    def forward(self, x: Tensor) -> Tensor:
        batch = len(x)
        stride, dilation = self.stride, self.dilation
        # [batch, height, width, channels]: a patch is then a few runs of whole pixels
        x = F.pad(x, self._reversed_padding_repeated_twice).permute(0, 2, 3, 1)
        rows, columns = (
            (size - d * (kernel - 1) - 1) // s + 1
            for size, kernel, s, d in zip(x.shape[1:3], self.kernel_size, stride, dilation, strict=True)
        )
        patches = torch.cat(
            [
                x[
                    :,
                    dilation[0] * i : dilation[0] * i + stride[0] * (rows - 1) + 1 : stride[0],
                    dilation[1] * j : dilation[1] * j + stride[1] * (columns - 1) + 1 : stride[1],
                ]
                for i in range(self.kernel_size[0])
                for j in range(self.kernel_size[1])
            ],
            dim=-1,
        )
        kernels = self.weight.permute(2, 3, 1, 0).flatten(0, 2)  # [patch size, channels out]
        y = patches.reshape(batch * rows * columns, -1) @ kernels
        if self.bias is not None:
            y = y + self.bias
        return y.view(batch, rows, columns, self.out_channels).permute(0, 3, 1, 2)


def convert_convolutions(module: nn.Module) -> nn.Module:
    """Convert every `nn.Conv2d` to `Im2colConv2d`, in place.

    Grouped convolutions, paddings other than zeros and subclasses stay as they are.
    """
    for layer in module.modules():
        if type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros":
            layer.__class__ = Im2colConv2d
    return module
