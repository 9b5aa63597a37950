"""Attention as products and a softmax: PyTorch's fused kernels have no second derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from learners.draws import Draws
from learners.spellings import Replacements, spell_out


def _attend(
    draws: Draws, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Return the attended values `[..., queries, features]` and the weights `[..., queries, keys]`.

    `mask` is added to the scores. A query that may attend to no key has weights of zero.
    """
    scores = (q * scale) @ k.mT
    if mask is None:
        weights = scores.softmax(-1)
    else:
        scores = scores + mask
        alone = (scores == -math.inf).all(-1, keepdim=True)
        weights = scores.masked_fill(alone, 0.0).softmax(-1).masked_fill(alone, 0.0)
    weights = draws.drop(weights, dropout_p, True, weights.shape)
    return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -math.inf)


def _scaled_dot_product_attention(
    draws: Draws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    if is_causal and attn_mask is not None:
        raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal=True, not both")
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = None if attn_mask is None else _additive(attn_mask, query.dtype)
    return _attend(draws, query, key, value, mask, scale, dropout_p)[0]


def _multi_head_attention_forward(
    draws: Draws,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute `nn.MultiheadAttention`; `query` is `[queries, batch, features]`, or has no batch axis."""
    if bias_k is not None or add_zero_attn:
        raise ValueError("multi-head attention is supported without add_bias_kv and add_zero_attn")
    if options.get("is_causal") and options.get("attn_mask") is None:
        raise ValueError("multi-head attention: give the attn_mask that is_causal is a hint for")
    weights: Sequence[Tensor]
    if in_proj_weight is None or options.get("use_separate_proj_weight"):
        weights = [options[f"{name}_proj_weight"] for name in "qkv"]
    else:
        weights = in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    inputs = [x if x.dim() == 3 else x.unsqueeze(1) for x in (query, key, value)]
    q, k, v = (  # [batch, heads, length, features of a head]
        F.linear(x, weight, bias).unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3)
        for x, weight, bias in zip(inputs, weights, biases, strict=True)
    )
    mask = _join_masks(options.get("attn_mask"), options.get("key_padding_mask"), len(q), query.dtype)
    dropout_p = dropout_p if options.get("training", True) else 0.0
    output, attention = _attend(draws, q, k, v, mask, q.shape[-1] ** -0.5, dropout_p)
    output = F.linear(output.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if query.dim() == 2:
        output, attention = output.squeeze(1), attention.squeeze(0)
    if not options.get("need_weights", True):
        return output, None
    return output, attention.mean(-3) if options.get("average_attn_weights", True) else attention


def _join_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype
) -> Tensor | None:
    """Return both masks, True where attention is not allowed, as one to add to scores.

    `attn_mask` is `[queries, keys]` or `[batch * heads, queries, keys]`, the padding's `[batch, keys]` or
    `[keys]`; the result broadcasts against `[batch, heads, queries, keys]`.
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, -1))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(batch, 1, 1, -1)
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    masks = [_additive(~mask if mask.dtype == torch.bool else mask, dtype) for mask in masks]
    return sum(masks[1:], masks[0]) if masks else None


REPLACEMENTS: Replacements = spell_out({"scaled_dot_product_attention": _scaled_dot_product_attention}) | {
    F.multi_head_attention_forward: _multi_head_attention_forward,
    # False: a `TransformerEncoder` in evaluation mode then keeps its padding in a plain tensor
    torch._nested_tensor_from_mask_left_aligned: lambda draws, x, mask: False,
}
