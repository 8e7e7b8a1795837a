"""Attention by the fused kernel of the platform, with its log-sum-exp, and the merge of parts of one softmax.

    lse = ln Σ_p exp(lse_p) ,   o = Σ_p exp(lse_p − lse) · o_p

The parts p split the keys of a row; every part holds its own softmax. The identity is the one behind FlashAttention
(arXiv 2205.14135) and FlashDecoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError
from headway.kernels.dense import check_heads, dense_attention

_CPU_KERNEL = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def fused_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    bias: Float[Tensor, "1 1 queries keys"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Softmax attention and the log-sum-exp of its scaled logits (float32).

    `bias` is added to the scaled logits in place of a mask, for callers who keep one for many calls; it may hide keys
    by -inf, but no whole row. `causal` aligns the last query with the last key. Key and value may have fewer heads than
    the query; they are not repeated. A row that sees nothing gives zeros and -inf. `dense_attention` is the reference,
    and what runs where no fused kernel gives a log-sum-exp (other devices, value_dim ≠ dim)."""
    check_heads(query, key)
    queries, keys = query.shape[2], key.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if causal and queries != keys:
        if queries > keys:
            raise ArgumentError(f"queries: got {queries} for {keys} keys, expected no more than keys if causal.")
        reach = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)[None, None]
        mask, causal = (reach if mask is None else mask & reach) if queries > 1 else mask, False
    if bias is not None and (causal or mask is not None):
        raise ArgumentError("bias: got one beside a mask or causal=True, expected one of them. Put the mask into it.")
    same = key.shape[3] == value.shape[3]
    if query.device.type == "cpu" and same and keys and not (mask is not None and causal):
        if mask is not None:
            bias = torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        if bias is not None:
            bias = bias.expand(query.shape[0], query.shape[1] if bias.shape[1] > 1 else 1, -1, -1)
        output, lse = _CPU_KERNEL(query, key, value, 0.0, causal, attn_mask=bias, scale=scale)
        if mask is not None:
            lse = lse.masked_fill(~mask.any(-1), -torch.inf)
        return output, lse.float()
    return dense_attention(query, key, value, scale=scale, causal=causal, mask=mask, bias=bias, empty_rows="zero")


def merge_attention(
    outputs: Sequence[Float[Tensor, "batch heads queries value_dim"]],
    normalisers: Sequence[Float[Tensor, "batch heads queries"]],
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """One softmax from its parts over disjoint keys. A part that saw nothing (-inf) adds nothing."""
    if not outputs or len(outputs) != len(normalisers):
        raise ArgumentError(
            f"outputs: got {len(outputs)} with {len(normalisers)} log-sum-exps, expected as many of both, at least one."
        )
    parts = torch.stack([lse.float() for lse in normalisers])
    total = torch.logsumexp(parts, 0)
    shares = torch.exp(parts - total.masked_fill(total == -torch.inf, 0.0))
    merged = torch.zeros_like(outputs[0], dtype=torch.float32)
    for share, output in zip(shares, outputs, strict=True):
        merged = merged + share[..., None] * output.float()
    return merged.to(outputs[0].dtype), total
