"""Spectral normalisation by the largest singular value of the weight at hand, in every pass.

PyTorch's layers follow slowly changing weights with one power iteration in each training pass. In the inner
loop weights move far in a step, and each task starts from the initialisation again. Here a pass does as many
iterations as it takes, at once, in training and evaluation alike. The vectors are constants in all
derivatives, as PyTorch's are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm

from learners.batch_norm import join_names

ITERATIONS = 10_000  # the relative error of the singular value is then below 1 / (4 e ITERATIONS)


@torch.no_grad()
def iterate(matrix: Tensor, u: Tensor, v: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the singular vectors after `ITERATIONS` power iterations from u `[rows]` and v `[columns]`.

    They are computed by eigenvalues, whose power weighs the components of the first vector.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    w, tall = matrix.detach().to(wide), matrix.shape[0] > matrix.shape[1]
    values, vectors = torch.linalg.eigh(w.mH @ w if tall else w @ w.mH)  # of the smaller one
    weights = (values / values[-1]).clamp(min=0.0) ** ITERATIONS
    first = vectors @ (weights * (vectors.mH @ (v if tall else u).to(wide)))
    first = F.normalize(first, dim=0, eps=eps)
    second = F.normalize((w if tall else w.mH) @ first, dim=0, eps=eps)
    u, v = (second, first) if tall else (first, second)
    return u.to(matrix.dtype), v.to(matrix.dtype)


class ExactSpectralNorm(_SpectralNorm):
    """The parametrisation of `torch.nn.utils.parametrizations.spectral_norm`."""

    def forward(self, weight: Tensor) -> Tensor:
        if weight.ndim == 1:
            return super().forward(weight)
        matrix = self._reshape_weight_to_matrix(weight)
        self._u, self._v = iterate(matrix, self._u, self._v, self.eps)
        return weight / torch.vdot(self._u, matrix @ self._v)


class ExactSpectralNormHook(SpectralNorm):
    """The hook of `torch.nn.utils.spectral_norm`."""

    def compute_weight(self, module: nn.Module, do_power_iteration: bool) -> Tensor:
        weight = getattr(module, f"{self.name}_orig")
        matrix = self.reshape_weight_to_matrix(weight)
        before = module.get_buffer(f"{self.name}_u"), module.get_buffer(f"{self.name}_v")
        u, v = iterate(matrix, *before, self.eps)
        setattr(module, f"{self.name}_u", u)
        setattr(module, f"{self.name}_v", v)
        return weight / torch.vdot(u, matrix @ v)


def vector_names(module: nn.Module) -> frozenset[str]:
    """Return the names of the buffers that hold the singular vectors of converted layers."""
    stems = []
    for name, layer in module.named_modules():
        hooks = layer._forward_pre_hooks.values()
        stems += [join_names(name, hook.name) for hook in hooks if isinstance(hook, ExactSpectralNormHook)]
        stems += [join_names(name, "")] * isinstance(layer, ExactSpectralNorm)
    return frozenset(f"{stem}{vector}" for stem in stems for vector in ("_u", "_v"))


def convert_spectral_norms(module: nn.Module) -> nn.Module:
    """Convert PyTorch's spectral norms, parametrisations and hooks, in place; return the module."""
    for layer in module.modules():
        if type(layer) is _SpectralNorm:
            layer.__class__ = ExactSpectralNorm
        for hook in layer._forward_pre_hooks.values():
            if type(hook) is SpectralNorm:
                hook.__class__ = ExactSpectralNormHook
    return module
