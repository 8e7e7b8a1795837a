"""What heads read in one forward, as calls over groups of heads and blocks of rows.

Every function makes parts of one attention call: keys with their positions, and a mask that says everything. Row blocks
keep the work of a streaming head at O(rows · (S + R)) and no mask larger than a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.errors import ArgumentError
from headway.kernels.streaming import ROW_BLOCK, stream_spans, stream_visible
from headway.methods.long_context.duo_attention.store import DuoLayer, HeadGroup, over


class Padding(Protocol):
    """What a request knows of its padding: the position of each sequence's first token, whether anything is padding,
    and which keys are tokens."""

    first: Int[Tensor, " batch"]
    real: Bool[Tensor, "batch tokens"] | None

    def hides(self, columns: Int[Tensor, "#batch keys"]) -> Bool[Tensor, "batch 1 1 keys"] | None: ...


def first_parts(
    call: AttentionCall, groups: Sequence[HeadGroup], kv_heads: int, first: Int[Tensor, " batch"] | None
) -> list[AttentionCall] | None:
    """The first forward of a request: heads that see everything (or the host's own window) as the host has it, the
    others in row blocks. None where nothing is narrower than the host's own attention."""
    whole = [
        g for g in groups if g.recent is None or (call.site.window is not None and g.recent >= call.site.window - 1)
    ]
    if len(whole) == len(groups) or call.queries == 1:
        return None
    parts = []
    low, high = (0, 0) if first is None else (int(first.min()), int(first.max()))
    columns = torch.arange(call.queries, device=call.query.device)
    padding = call.forward.padding
    for group in groups:
        part = _heads_of(call, group, kv_heads)
        if group in whole:
            parts.append(part)
            continue
        assert group.recent is not None
        spans = stream_spans(call.queries, reach=group.recent, sinks_from=low, sinks_to=high + group.sinks)
        for (start, stop), ranges in spans:
            at = torch.cat([columns[a:b] for a, b in ranges])[None]
            seen = _visible(call, columns[start:stop], at, group, first)
            if padding is not None:
                seen = seen & padding.to(at.device)[:, at[0]][:, None, None]
            key, value = (torch.cat([x[:, :, a:b] for a, b in ranges], 2) for x in (part.key, part.value))
            parts.append(_rows_of(part, start, stop, 0, key, value, at, seen))
    return parts


def everything(call: AttentionCall, group: HeadGroup, kv_heads: int, cache: Padding) -> list[AttentionCall]:
    """Heads that keep all tokens, behind a past: a step, or row blocks over the keys up to each."""
    store = _store(group)
    part = _heads_of(call, group, kv_heads, store.key, store.value)
    past = store.length - call.queries
    columns = torch.arange(store.length, device=call.query.device)
    parts = []
    for start in range(0, call.queries, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, call.queries)
        end = past + stop
        seen = None
        if call.queries > 1:
            seen = (columns[:end] <= columns[past + start : end, None])[None, None]
        real = cache.hides(columns[None, :end])
        if real is not None:
            seen = real if seen is None else seen & real
        key, value = part.key[:, :, :end], part.value[:, :, :end]
        parts.append(_rows_of(part, start, stop, past, key, value, columns[None, :end], seen))
    return parts


def step(call: AttentionCall, group: HeadGroup, kv_heads: int, cache: Padding) -> AttentionCall:
    """One row of heads with a ring, which holds its token already."""
    store = _store(group)
    part = _heads_of(call, group, kv_heads, store.key, store.value)
    at = store.positions
    seen = None
    if cache.real is not None or (call.site.window is not None and group.sinks):
        seen = _visible(call, call.query_positions, at, group, cache.first)
        real = cache.hides(at)
        seen = seen if real is None else seen & real
    return _rows_of(part, 0, 1, int(call.query_positions[0]), part.key, part.value, at, seen)


def chunk(
    call: AttentionCall, group: HeadGroup, layer: DuoLayer, cache: Padding, past: int, *, same_chunk: bool
) -> list[AttentionCall]:
    """A chunk of heads with a ring: row blocks over what is held and the chunk itself.

    `same_chunk` lets every row see all that was held before the chunk and the chunk up to itself."""
    store = _store(group)
    assert layer.new is not None
    assert group.recent is not None
    part = _heads_of(call, group, layer.kv_heads, *(over(x, group.heads) for x in layer.new[:2]))
    columns = torch.arange(past, past + call.queries, device=call.query.device)
    batch = store.positions.shape[0]
    lacking = int(cache.first.max()) + group.sinks - past
    sinks_from = max(int(cache.first.min()) - past, 0)
    reach = call.queries if same_chunk else group.recent
    parts = []
    for (start, stop), ranges in stream_spans(call.queries, reach=reach, sinks_from=sinks_from, sinks_to=lacking):
        held = slice(0, store.length if same_chunk or start <= group.recent else min(group.sinks, store.length))
        at = torch.cat([store.positions[:, held], *(columns[None, a:b].expand(batch, -1) for a, b in ranges)], 1)
        seen = _visible(call, columns[start:stop], at, group, cache.first, before=past if same_chunk else None)
        real = cache.hides(at)
        seen = seen if real is None else seen & real
        key, value = (
            torch.cat([old[:, :, held], *(x[:, :, a:b] for a, b in ranges)], 2)
            for old, x in ((store.key, part.key), (store.value, part.value))
        )
        parts.append(_rows_of(part, start, stop, past, key, value, at, seen))
    return parts


def _visible(
    call: AttentionCall,
    rows: Int[Tensor, " rows"],
    at: Int[Tensor, "#batch keys"],
    group: HeadGroup,
    first: Int[Tensor, " batch"] | None,
    *,
    before: int | None = None,
) -> Bool[Tensor, "#batch 1 rows keys"]:
    """Sinks and recent keys, not outside the host's own window. With `before`, the start of a chunk, recent keys are
    those of the chunk and the last ones in front of it."""
    assert group.recent is not None
    if before is None:
        seen = stream_visible(rows, at, sinks=group.sinks, reach=group.recent, first=first)
    else:
        chunk = torch.full((1,), before, device=rows.device)
        known = stream_visible(chunk, at.clamp(max=before), sinks=group.sinks, reach=group.recent, first=first)
        seen = known & (at >= 0)[:, None, None] & (at[:, None] <= rows[:, None])[:, None]
    if call.site.window is not None:
        seen = seen & (rows[:, None] - at[:, None] < call.site.window)[:, None]
    return seen


def _heads_of(
    call: AttentionCall, group: HeadGroup, kv_heads: int, key: Tensor | None = None, value: Tensor | None = None
) -> AttentionCall:
    """The call over the query heads of a group, with the host's own keys or those given."""
    groups = call.heads // kv_heads
    rows = [h * groups + g for h in group.heads for g in range(groups)]
    if key is None or value is None:
        repeated = call.key.shape[1] // kv_heads
        key, value = (over(x[:, ::repeated], group.heads) for x in (call.key, call.value))
    mask = call.mask
    return call.replace(
        query=over(call.query, rows),
        key=key,
        value=value,
        mask=mask if mask is None or mask.shape[1] == 1 else over(mask, rows),
        sinks=None if call.sinks is None else call.sinks[rows],
        of_heads=torch.tensor(rows, device=call.query.device),
    )


def _rows_of(
    part: AttentionCall,
    start: int,
    stop: int,
    past: int,
    key: Tensor,
    value: Tensor,
    at: Int[Tensor, "#batch keys"],
    seen: Tensor | None,
) -> AttentionCall:
    """Some rows of a part, with the keys they read."""
    whole = (start, stop) == (0, part.queries)
    return part.replace(
        query=part.query if whole else part.query[:, :, start:stop],
        key=key,
        value=value,
        mask=seen,
        causal=False,
        of_rows=None if whole else (start, stop),
        key_at=at[:, None],
        first_key=0,
        first_query=past + start,
    )


def _store(group: HeadGroup) -> Any:
    store = group.store
    if store is None or store.empty:
        raise ArgumentError(
            "cache: got one whose past was never filed, expected one that went through whole forwards of the model. "
            "Run the model, not its parts."
        )
    return store
