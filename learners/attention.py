"""Attention as products and a softmax: PyTorch's fused kernels have no second derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from learners.draws import Draws, Replacements
from learners.dropout import drop


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
    weights = drop(draws, weights, dropout_p, True, weights.shape, "attention's dropout")
    return weights @ v, weights


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask to add to scores, from one that is True where attention is allowed."""
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
    if is_causal:
        if attn_mask is not None:
            raise ValueError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
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
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Compute `nn.MultiheadAttention`; `query` is `[queries, batch, features]`, or has no batch axis."""
    if bias_k is not None or add_zero_attn or static_k is not None or static_v is not None:
        raise ValueError("multi-head attention is supported without add_bias_kv, add_zero_attn and static_k")
    if is_causal and attn_mask is None:
        raise ValueError("multi-head attention: give the attn_mask that is_causal is a hint for")
    if query.shape[-1] != embed_dim_to_check:
        raise ValueError(f"query has {query.shape[-1]} features: expected {embed_dim_to_check}")
    weights: Sequence[Tensor | None] = (q_proj_weight, k_proj_weight, v_proj_weight)
    if in_proj_weight is not None and not use_separate_proj_weight:
        weights = in_proj_weight.chunk(3)
    heads = _project((query, key, value), weights, in_proj_bias, num_heads)
    mask = _join_masks(attn_mask, key_padding_mask, len(heads[0]), query.dtype)
    scale = heads[0].shape[-1] ** -0.5
    output, attention = _attend(
        draws, heads[0], heads[1], heads[2], mask, scale, dropout_p if training else 0.0
    )
    output = F.linear(output.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if query.dim() == 2:
        output, attention = output.squeeze(1), attention.squeeze(0)
    if not need_weights:
        return output, None
    return output, attention.mean(-3) if average_attn_weights else attention


def _project(
    inputs: Sequence[Tensor], weights: Sequence[Tensor | None], bias: Tensor | None, heads: int
) -> list[Tensor]:
    """Return query, key and value of each head: `[batch, heads, length, features of a head]`."""
    biases = (None,) * 3 if bias is None else bias.chunk(3)
    batches = [x if x.dim() == 3 else x.unsqueeze(1) for x in inputs]
    return [
        F.linear(x, weight, part).unflatten(2, (heads, -1)).permute(1, 2, 0, 3)
        for x, weight, part in zip(batches, weights, biases, strict=True)
        if weight is not None
    ]


def _join_masks(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype
) -> Tensor | None:
    """Return both masks of multi-head attention as one to add to scores `[batch, heads, queries, keys]`.

    Args:
        attn_mask: `[queries, keys]` or `[batch * heads, queries, keys]`; True: attention is not allowed.
        key_padding_mask: `[batch, keys]` or `[keys]`; True: the key is padding.
    """
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (batch, -1))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask.view(batch, 1, 1, -1)
    masks = [mask for mask in (attn_mask, key_padding_mask) if mask is not None]
    additive = [_additive(~mask if mask.dtype == torch.bool else mask, dtype) for mask in masks]
    return additive[0] + additive[1] if len(additive) == 2 else additive[0] if additive else None


def _nested_tensor_from_mask_left_aligned(draws: Draws, input: Tensor, mask: Tensor) -> bool:
    """Return False: a `TransformerEncoder` in evaluation mode then keeps its padding in a plain tensor."""
    return False


REPLACEMENTS: Replacements = {
    F.scaled_dot_product_attention: _scaled_dot_product_attention,
    F.multi_head_attention_forward: _multi_head_attention_forward,
    torch._nested_tensor_from_mask_left_aligned: _nested_tensor_from_mask_left_aligned,
}
