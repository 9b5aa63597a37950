"""Convolutions over patches: values and derivatives of any order are those of PyTorch's convolution."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap

from learners.im2col import CONVERTED, convert_convolutions

TASKS = 3


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (nn.Conv2d, {"kernel_size": 3}),
        (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False}),
        (nn.Conv2d, {"kernel_size": (2, 3), "stride": (2, 1), "padding": (0, 2)}),
        (nn.Conv2d, {"kernel_size": 1, "stride": 2}),  # pixels that no tap sees
        (nn.Conv2d, {"kernel_size": 5, "stride": 3}),
        (nn.Conv2d, {"kernel_size": 4, "padding": "same"}),
        (nn.Conv1d, {"kernel_size": 5, "stride": 2, "padding": 2, "bias": False}),
        (nn.Conv1d, {"kernel_size": 4, "padding": "same"}),
    ],
)
def test_values_and_derivatives_are_those_of_the_convolution(kind, options):
    torch.manual_seed(0)
    plain = kind(2, 5, **options).double()
    ours = convert_convolutions(copy.deepcopy(plain))
    assert type(ours) is CONVERTED[kind]
    sides = (9, 8) if kind is nn.Conv2d else (9,)
    x, along_x = torch.randn(2, TASKS, 2, 2, *sides, dtype=torch.float64)
    weights, along = torch.randn(2, TASKS, *plain.weight.shape, dtype=torch.float64)

    def measure(layer: nn.Module) -> list[torch.Tensor]:
        def loss(w, x):
            return functional_call(layer, {"weight": w}, (x,)).sin().square().sum()

        def slope(w, x, along, along_x):
            return jvp(loss, (w, x), (along, along_x))[1]

        def curvature(w, x, along, along_x):  # in reverse mode
            return (grad(loss)(w, x) * along).sum()

        second = vmap(grad(slope, (0, 1)))(weights, x, along, along_x)
        third = vmap(grad(lambda *a: (grad(curvature, 1)(*a) * a[3]).sum()))(weights, x, along, along_x)
        shared = vmap(grad(loss, (0, 1)), (None, 0))(weights[0], x)
        return [vmap(loss)(weights, x), *vmap(grad(loss, (0, 1)))(weights, x), *second, third, *shared]

    for value, expected in zip(measure(ours), measure(plain), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)


def test_convolutions_that_patches_cannot_replace_are_left_alone():
    layers = (
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(2, 4, 3, dilation=2),
        nn.Conv1d(2, 4, 3, dilation=2),
        nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular"),
    )
    assert not any(type(convert_convolutions(layer)) in CONVERTED.values() for layer in layers)
