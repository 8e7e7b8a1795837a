"""Attention to sinks and recent tokens, row block by row block: what a streaming head reads.

    j visible from i   ⇔   j ≤ i  and  ( j − f < S  or  i − j ≤ reach )

f is the position of a sequence's first token (behind left padding), S the number of sinks. A block of rows meets the
sinks and the keys within reach alone, so the work is O(rows · (S + reach)) and no mask of rows × keys is ever made. The
function is differentiable.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from headway.errors import ArgumentError
from headway.kernels.dense import check_heads, dense_attention

#: Rows per block: as many as the released window is long, so that about half of what a block meets is visible.
ROW_BLOCK = 256


def stream_visible(
    rows: Int[Tensor, " rows"],
    columns: Int[Tensor, "#batch keys"],
    *,
    sinks: int,
    reach: int,
    first: Int[Tensor, " #batch"] | None = None,
) -> Bool[Tensor, "#batch 1 rows keys"]:
    """Which keys, given by their positions, the rows at the given positions see. A negative position is no key; padding
    in front of `first` must be hidden by the caller."""
    at, own = columns[:, None], rows[:, None].to(columns.device)
    origin = 0 if first is None else first.to(columns.device)[:, None, None]
    near = own - at <= reach
    return ((at >= 0) & (at <= own) & (near | (at - origin < sinks)))[:, None]


def stream_spans(
    rows: int, *, reach: int, sinks_to: int, sinks_from: int = 0, block: int = ROW_BLOCK
) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Blocks of the rows [start, stop) of a self-attending piece, each with the key ranges it meets.

    The sinks that lie in the piece stand in [sinks_from, sinks_to); ranges are disjoint and in order."""
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        low = max(start - reach, 0)
        sinks = (sinks_from, min(sinks_to, stop))
        if sinks[0] >= sinks[1]:
            yield (start, stop), [(low, stop)]
        elif sinks[1] >= low:
            yield (start, stop), [(min(low, sinks[0]), stop)]
        else:
            yield (start, stop), [sinks, (low, stop)]


def streaming_attention(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    value: Float[Tensor, "batch kv_heads tokens value_dim"],
    *,
    sinks: int,
    reach: int,
    scale: float | None = None,
    softcap: float | None = None,
    sink_logits: Float[Tensor, " heads"] | None = None,
    first: Int[Tensor, " batch"] | None = None,
    block: int = ROW_BLOCK,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """Self-attention in which every head is a streaming head. Rows before `first` (padding) give no meaningful output.

    `reach` is the largest distance of a recent key, so `reach + 1` recent keys with the token itself. Raises
    ArgumentError for negative numbers or tensors of different lengths."""
    check_heads(query, key)
    if sinks < 0 or reach < 0:
        raise ArgumentError(f"sinks, reach: got {sinks}, {reach}; expected both to be at least 0.")
    tokens = query.shape[2]
    if key.shape[2] != tokens:
        raise ArgumentError(f"key: got {key.shape[2]} tokens for {tokens} queries, expected as many. Pass one piece.")
    low, high = (0, 0) if first is None else (int(first.min()), int(first.max()))
    places = torch.arange(tokens, device=query.device)
    outputs = []
    for (start, stop), spans in stream_spans(tokens, reach=reach, sinks_from=low, sinks_to=high + sinks, block=block):
        columns = torch.cat([places[a:b] for a, b in spans])[None]
        seen = stream_visible(places[start:stop], columns, sinks=sinks, reach=reach, first=first)
        if first is not None:
            seen = seen & (columns >= first.to(columns.device)[:, None])[:, None, None]
        keys, values = (torch.cat([x[:, :, a:b] for a, b in spans], 2) for x in (key, value))
        outputs.append(_attend(query[:, :, start:stop], keys, values, seen, scale, softcap, sink_logits))
    return torch.cat(outputs, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scale: float | None,
    softcap: float | None,
    sink_logits: Tensor | None,
) -> Tensor:
    if softcap is None and sink_logits is None:
        options: dict[str, Any] = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
        return scaled_dot_product_attention(query, key, value, attn_mask=seen, **options)
    return dense_attention(
        query, key, value, scale=scale, mask=seen, softcap=softcap, sinks=sink_logits, empty_rows="zero"
    )[0]
