"""Attention in which queries, keys and values have head counts of their own.

    κ(i) = ⌊i·n_k / n_q⌋ ,   ν(i) = ⌊i·n_v / n_q⌋ ,   o_i = softmax( scale · q_i K_κ(i)ᵀ ) V_ν(i)

Query head i reads key head κ(i) and value head ν(i); n_k and n_v each divide n_q, and neither has to divide the other.
n_k = n_v is grouped-query attention. No form here but the reference repeats a key or a value head: a fused kernel wants
as many key as value heads, so it is called once for every value head of a key head (or the other way round), on strided
views; where that does not work out, rows go block by block through two batched products, one grouped by key heads and
one by value heads. A decoding step takes these two products as well, since they read each stored number once.

DiffQKV, arXiv 2501.13629. Memory beside the output is O(block · keys · n_q) at most.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headway.errors import ArgumentError, unknown
from headway.kernels.dense import grouped_scores, grouped_values

#: Query rows per block of the two products, and up to which a call takes them rather than the fused kernel.
ROW_BLOCK, FEW_ROWS = 128, 8


def check_head_counts(query_heads: int, key_heads: int, value_heads: int) -> None:
    """Raises ArgumentError, naming the three counts, unless key and value heads each divide the query heads."""
    if min(query_heads, key_heads, value_heads) < 1 or query_heads % key_heads or query_heads % value_heads:
        raise ArgumentError(
            f"heads: got {query_heads} query, {key_heads} key and {value_heads} value heads, expected the key heads "
            "and the value heads each to divide the query heads. Change one of the three counts."
        )


def shared_head(query_heads: int, stored_heads: int) -> Int[Tensor, " query_heads"]:
    """⌊i · stored / query⌋ for every query head i: the key or value head it reads."""
    return torch.arange(query_heads) * stored_heads // query_heads


def unequal_attention(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch value_heads keys value_dim"],
    *,
    scale: float | None = None,
    causal: bool = False,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    mode: str = "block",
    block: int = ROW_BLOCK,
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """The output in the dtype of `value`. `causal` aligns the last query with the last key; `visible` narrows it.

    A row that sees nothing gives zeros. `mode` is "reference" (heads repeated, one matrix of weights), "grouped" (two
    products by blocks of rows) or "block" (the fused kernel where it can be used, else "grouped")."""
    check_head_counts(query.shape[1], key.shape[1], value.shape[1])
    if query.shape[3] != key.shape[3]:
        raise ArgumentError(
            f"key: got heads of size {key.shape[3]} for queries of size {query.shape[3]}, expected equal sizes. "
            "Project one of them first."
        )
    if mode not in ("reference", "block", "grouped"):
        raise unknown("mode", mode, ("reference", "block", "grouped"))
    scale = query.shape[3] ** -0.5 if scale is None else scale
    if mode == "reference":
        return _repeated(query, key, value, scale, _seen(query, key, causal, visible, 0, query.shape[2]))
    if mode == "block" and _fusible(query, key, value):
        return _fused(query, key, value, scale, causal, visible)
    parts = [
        grouped_values(weights.to(value.dtype), value)
        for weights in _weights_by_block(query, key, scale, causal, visible, block)
    ]
    return torch.cat(parts, 2) if parts else query.new_zeros(*query.shape[:3], value.shape[3])


def selective_attention(
    query: Float[Tensor, "batch query_heads queries dim"],
    key: Float[Tensor, "batch key_heads keys dim"],
    value: Float[Tensor, "batch value_heads keys value_dim"],
    *,
    top: int,
    renormalize: bool = True,
    scale: float | None = None,
    causal: bool = False,
    visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    block: int = 16,
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """Attention over the `top` largest weights of each row: all scores are computed, other rows of V are never read.

    `renormalize=True` makes the kept weights sum to one; False leaves them as the softmax over all keys gave them. With
    `top` at the number of visible keys or above this is dense. Ties are broken by torch.topk, alike for alike input."""
    check_top(top)
    check_head_counts(query.shape[1], key.shape[1], value.shape[1])
    scale = query.shape[3] ** -0.5 if scale is None else scale
    parts = [
        _read_rows(*strongest(weights, top, renormalize=renormalize), value)
        for weights in _weights_by_block(query, key, scale, causal, visible, block)
    ]
    return torch.cat(parts, 2) if parts else query.new_zeros(*query.shape[:3], value.shape[3])


def check_top(top: int) -> None:
    if isinstance(top, bool) or not isinstance(top, int) or top < 1:
        raise ArgumentError(f"top: got {top!r}, expected a whole number of values to read, at least 1.")


def strongest(
    weights: Float[Tensor, "batch heads rows keys"], top: int, *, renormalize: bool = True
) -> tuple[Float[Tensor, "batch heads rows top"], Int[Tensor, "batch heads rows top"]]:
    """The min(top, keys) largest weights of each row and their columns."""
    kept, columns = weights.topk(min(top, weights.shape[-1]), dim=-1)
    if renormalize:
        kept = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
    return kept, columns


def covered_mass(weights: Float[Tensor, "... keys"], top: int) -> Float[Tensor, ...]:
    """The share of a row's mass that its `top` largest weights hold."""
    check_top(top)
    return weights.topk(min(top, weights.shape[-1]), dim=-1).values.sum(-1)


def safe_softmax(
    logits: Float[Tensor, "*any keys"], visible: Bool[Tensor, "*any keys"] | None = None
) -> Float[Tensor, "*any keys"]:
    """Softmax over visible keys; zeros, with zero gradients, in a row that sees none. At least float32."""
    work = torch.float64 if logits.dtype == torch.float64 else torch.float32
    logits = logits.to(work)
    if visible is None:
        return logits.softmax(-1)
    logits = logits.masked_fill(~visible, -torch.inf)
    highest = logits.detach().amax(-1, keepdim=True)
    powers = (logits - highest.masked_fill(highest == -torch.inf, 0.0)).exp()
    return powers / powers.sum(-1, keepdim=True).clamp(min=torch.finfo(work).tiny)


def _seen(
    query: Tensor, key: Tensor, causal: bool, visible: Tensor | None, start: int, stop: int
) -> Bool[Tensor, "#batch #heads rows keys"] | None:
    """Which keys the rows from `start` up to `stop` see; None for all."""
    seen = None
    if causal and query.shape[2] > 1:
        last = torch.arange(start, stop, device=query.device)[:, None] + key.shape[2] - query.shape[2]
        seen = (torch.arange(key.shape[2], device=query.device) <= last)[None, None]
    if visible is not None:
        rows = visible[:, :, start:stop] if visible.shape[2] > 1 else visible
        seen = rows if seen is None else seen & rows
    return seen


def _repeated(query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None) -> Tensor:
    heads = query.shape[1]
    keys, values = (x[:, shared_head(heads, x.shape[1]).to(x.device)] for x in (key, value))
    logits = torch.einsum("bhqd,bhkd->bhqk", query, keys) * scale
    return torch.einsum("bhqk,bhkd->bhqd", safe_softmax(logits, seen).to(value.dtype), values)


def _weights_by_block(
    query: Tensor, key: Tensor, scale: float, causal: bool, visible: Tensor | None, block: int
) -> Iterator[Float[Tensor, "batch query_heads rows keys"]]:
    for start in range(0, query.shape[2], block):
        stop = min(start + block, query.shape[2])
        logits = grouped_scores(query[:, :, start:stop], key) * scale
        yield safe_softmax(logits, _seen(query, key, causal, visible, start, stop))


def _read_rows(weights: Tensor, columns: Tensor, value: Tensor) -> Tensor:
    """Σ_j w_j v_j over the listed columns; a weight of zero reads nothing, whatever stands there."""
    batch, heads = weights.shape[:2]
    sequence = torch.arange(batch, device=value.device)[:, None, None, None]
    head = shared_head(heads, value.shape[1]).to(value.device)[None, :, None, None]
    rows = value[sequence, head, columns]
    rows = torch.where((weights > 0)[..., None], rows, 0.0)
    return (weights.to(value.dtype)[..., None, :] @ rows)[..., 0, :]


def _fusible(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the fused kernel can be called on views: one head count divides the other, sizes are equal, many rows."""
    counts = sorted((key.shape[1], value.shape[1]))
    alike = counts[1] % counts[0] == 0 and key.shape[3] == value.shape[3]
    return alike and query.shape[2] > FEW_ROWS and query.dtype == key.dtype == value.dtype


def _fused(
    query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool, visible: Tensor | None
) -> Float[Tensor, "batch query_heads queries value_dim"]:
    """One call for each of the max(n_k, n_v) / min(n_k, n_v) larger-side heads that share a smaller-side head."""
    heads, queries, keys = query.shape[1], query.shape[2], key.shape[2]
    few, many = min(key.shape[1], value.shape[1]), max(key.shape[1], value.shape[1])
    calls, inner = many // few, heads // many
    square = causal and queries == keys
    seen = visible if square or not causal else _seen(query, key, True, visible, 0, queries)
    if square and seen is not None:
        seen, square = _seen(query, key, True, visible, 0, queries), False
    empty = None
    if seen is not None:
        empty = ~seen.any(-1, keepdim=True)
        seen = seen | empty
    # Heads in the order (smaller-side head, larger-side head within it, query head within that).
    cells = query.unflatten(1, (few, calls, inner))
    wide = seen.unflatten(1, (few, calls, inner)) if seen is not None and seen.shape[1] == heads else None
    outputs = []
    for turn in range(calls):
        keyed = key[:, turn::calls] if key.shape[1] > few else key
        valued = value[:, turn::calls] if value.shape[1] > few else value
        out = scaled_dot_product_attention(
            cells[:, :, turn].flatten(1, 2),
            keyed,
            valued,
            attn_mask=seen if wide is None else wide[:, :, turn].flatten(1, 2),
            is_causal=square,
            scale=scale,
            enable_gqa=inner > 1,
        )
        outputs.append(out.unflatten(1, (few, inner)))
    output = torch.stack(outputs, 2).flatten(1, 3)
    return output if empty is None else torch.where(empty, 0.0, output)
