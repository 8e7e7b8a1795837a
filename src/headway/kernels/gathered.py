"""Attention over listed keys: each row, or each block of rows, names the keys it reads.

    o_i = Σ_{j in K(b(i))} w_ij v_j ,   b(i) = the block of row i

The listed keys of a few blocks at a time are copied side by side and run through the fused kernel; memory is O(step),
whatever the number of rows. A key that is listed twice counts once.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from headway.errors import ArgumentError
from headway.kernels.block_sparse import STEP_BYTES
from headway.kernels.dense import check_heads, dense_attention, with_learned_sinks
from headway.kernels.fused import fused_attention


def gathered_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    index: Int[Tensor, "#batch #heads blocks chosen"],
    valid: Bool[Tensor, "#batch #heads blocks chosen"] | None = None,
    *,
    query_block: int | None = None,
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Output (dtype of `value`) and log-sum-exp (float32).

    `index` has one list per block of `query_block` rows (None: one list for all rows, or one per row, by its size) and
    one entry for all heads, one per key head or one per query head; `valid` is False where an entry is only fill.
    `causal`, `mask` hide listed keys. Rows that see nothing give zeros and -inf."""
    check_heads(query, key)
    batch, heads, queries, _ = query.shape
    kv_heads, keys = key.shape[1], key.shape[2]
    scale = query.shape[3] ** -0.5 if scale is None else scale
    offset = keys - queries if offset is None else offset
    size = row_block(index, queries, query_block)
    if index.shape[0] not in (1, batch) or index.shape[1] not in (1, kv_heads, heads) or not index.shape[3]:
        raise ArgumentError(
            f"index: got shape {tuple(index.shape)}, expected (1 or {batch}, one of {(1, kv_heads, heads)}, lists, at "
            "least 1 key). Name the keys of all heads, of each key head or of each query head."
        )
    index, valid = unique_keys(index, valid, keys)
    count = index.shape[2]
    # Query heads of one key head that read the same keys are rows of one item: keys are copied once for all of them.
    apart = heads if index.shape[1] == heads or (mask is not None and mask.shape[1] > 1) else kv_heads
    together = heads // apart
    rows = query if queries == count * size else pad(query, (0, 0, 0, count * size - queries))
    rows = rows.reshape(batch, apart, together, count, size, -1).transpose(2, 3)
    rows = rows.reshape(-1, 1, together * size, query.shape[3])
    repeat = apart // index.shape[1]
    lists, real = (
        (x if repeat == 1 else x.repeat_interleave(repeat, 1)).expand(batch, -1, -1, -1).flatten(0, 2)
        for x in (index, valid)
    )
    flat_key, flat_value = (x.reshape(-1, x.shape[3]) for x in (key, value))
    per_item = max(lists.shape[1] * (key.shape[3] + value.shape[3]) * key.element_size(), 1)
    step = max(STEP_BYTES // per_item, 2 * torch.get_num_threads())
    full = bool(real.all())
    widths = [lists.shape[1]]
    if not full:
        # Lists are sorted with their fill last: a step copies as far as its longest list goes, and no fill.
        last = (real * torch.arange(1, real.shape[1] + 1, device=real.device)).amax(1).clamp(min=1)
        widths = [int(part.max()) for part in last.split(step)]
    hides = causal or mask is not None or not full
    item = torch.arange(lists.shape[0], device=query.device)
    base = (item // (count * apart // kv_heads) * keys)[:, None]
    # The fused kernel's log-sum-exp has no gradient, which a learned sink needs.
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    fused = softcap is None and not (sinks is not None and trains)
    outputs, normalisers = [], []
    for start in range(0, lists.shape[0], step):
        items = slice(start, start + step)
        chosen = lists[items, : widths[0 if full else start // step]]
        hidden = None
        if hides:
            seen = real[items, : chosen.shape[1]][:, None].expand(-1, size, -1)
            row = (item[items] % count * size)[:, None, None] + torch.arange(size, device=query.device)[:, None]
            if causal:
                seen = seen & (chosen[:, None] <= row + offset)
            if mask is not None:
                owner, head = (x[:, None, None] for x in (item[items] // (count * apart), item[items] // count % apart))
                owner, head = owner.clamp(max=mask.shape[0] - 1), head.clamp(max=mask.shape[1] - 1)
                seen = seen & mask[owner, head, row.clamp(max=mask.shape[2] - 1), chosen[:, None]]
            hidden = seen.repeat(1, together, 1)[:, None]
        copied = (chosen + base[items]).flatten()
        part = rows[items]
        gathered = [x.index_select(0, copied).view(part.shape[0], 1, -1, x.shape[1]) for x in (flat_key, flat_value)]
        if fused:
            output, lse = fused_attention(part, *gathered, scale=scale, mask=hidden)
        else:
            output, lse = dense_attention(part, *gathered, scale=scale, mask=hidden, softcap=softcap, empty_rows="zero")
        outputs.append(output[:, 0])
        normalisers.append(lse[:, 0])
    output, lse = (
        torch.cat(parts)
        .view(batch, apart, count, together, size, -1)
        .transpose(2, 3)
        .reshape(batch, heads, count * size, -1)
        for parts in (outputs, normalisers)
    )
    return with_learned_sinks(output[:, :, :queries], lse[:, :, :queries, 0], sinks)


def row_block(index: Int[Tensor, "#batch #heads blocks chosen"], queries: int, query_block: int | None) -> int:
    """Rows per list. Raises ArgumentError when the number of lists does not cover the rows."""
    lists = index.shape[2]
    if query_block is None:
        query_block = queries if lists == 1 else 1
    if query_block < 1 or lists != -(-queries // query_block):
        raise ArgumentError(
            f"index: got {lists} lists for {queries} rows in blocks of {query_block}, expected "
            f"{-(-queries // max(query_block, 1))}. Give one list per block of rows."
        )
    return query_block


def unique_keys(
    index: Int[Tensor, "#batch #heads blocks chosen"],
    valid: Bool[Tensor, "#batch #heads blocks chosen"] | None,
    keys: int,
) -> tuple[Int[Tensor, "#batch #heads blocks chosen"], Bool[Tensor, "#batch #heads blocks chosen"]]:
    """The lists in order, with fill and repeated keys marked as not valid. Raises ArgumentError for keys that are not
    there."""
    if valid is None:
        valid = torch.ones_like(index, dtype=torch.bool)
        if index.shape[-1] and bool((index[..., 1:] > index[..., :-1]).all()):
            _check_range(index[..., 0], index[..., -1], keys)
            return index, valid
    named = index[valid.expand_as(index)]
    _check_range(named, named, keys)
    ordered = index.masked_fill(~valid, keys)
    rising = (ordered[..., 1:] > ordered[..., :-1]) | (ordered[..., 1:] == keys)
    if bool(rising.all()):
        return ordered.clamp(max=keys - 1), ordered < keys
    ordered = ordered.sort(-1).values
    fresh = torch.ones_like(ordered, dtype=torch.bool)
    fresh[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return ordered.clamp(max=keys - 1), fresh & (ordered < keys)


def _check_range(smallest: Tensor, largest: Tensor, keys: int) -> None:
    if not smallest.numel():
        return
    low, high = int(smallest.min()), int(largest.max())
    if low < 0 or high >= keys:
        raise ArgumentError(f"index: got values from {low} to {high}, expected 0..{keys - 1}.")
