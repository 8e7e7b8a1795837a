"""The estimates that FlexPrefill reads its blocks from: one exact block of rows, and pooled maps."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.kernels.dense import grouped_scores, soft_capped
from headway.kernels.pooling import (
    block_means,
    block_sums,
    offset_blocks,
    root_jensen_shannon,
    self_similarity,
)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What the last block of queries says of a call, in float32.

    vertical, slash: mean attention of the rows by key and by offset i − j; each sums to one. pooled: the same by key
    block, estimated from means of queries and keys. tokens: how many each block holds, padding left out."""

    vertical: Float[Tensor, "batch heads keys"]
    slash: Float[Tensor, "batch heads keys"]
    pooled: Float[Tensor, "batch heads blocks"]
    tokens: Int[Tensor, "batch blocks"]
    block: int

    @property
    def columns(self) -> Float[Tensor, "batch heads blocks"]:
        """Mass by key block."""
        return block_sums(self.vertical, self.block)

    @property
    def diagonals(self) -> Float[Tensor, "batch heads blocks"]:
        """Mass by distance in blocks; none lies beyond the first block that holds a token."""
        mass = offset_blocks(self.slash, self.block)
        furthest = (self.tokens > 0).sum(1, keepdim=True) - 1
        distance = torch.minimum(torch.arange(mass.shape[-1], device=mass.device), furthest.clamp(min=0))
        return torch.zeros_like(mass).scatter_add_(-1, distance[:, None].expand_as(mass), mass)

    @property
    def sink(self) -> Int[Tensor, " batch"]:
        """The first block that holds a token."""
        return (self.tokens > 0).long().argmax(1)

    def pairs(self) -> Float[Tensor, "batch blocks blocks"]:
        """Pairs of a token and an earlier one, or itself, in each pair of blocks."""
        tokens = self.tokens.double()
        below = (tokens[:, :, None] * tokens[:, None]).tril(-1)
        return below + torch.diag_embed(tokens * (tokens + 1) / 2)

    @property
    def divergence(self) -> Float[Tensor, "batch heads"]:
        """D: how far pooling is from the truth."""
        return root_jensen_shannon(self.pooled, self.columns)


def probe_call(call: AttentionCall, block: int) -> Probe:
    """The probe of a causal call whose queries are all its keys. Cost O(block × keys)."""
    real = _real(call)
    rows = probe_rows(call, block, real)
    weights = probe_weights(call, rows, real)
    every = torch.ones(weights.shape[0], call.keys, dtype=torch.long, device=weights.device)
    return Probe(
        vertical=weights.mean(2),
        slash=mean_by_offset(weights, rows),
        pooled=_pooled_row(call, rows, block, real),
        tokens=block_sums(every if real is None else real.long(), block),
        block=block,
    )


def pooled_map(call: AttentionCall, block: int) -> Float[Tensor, "batch heads blocks blocks"]:
    """softmax(q̄ k̄ᵀ · scale) over the key blocks up to each query block. Rows without a token give zeros."""
    real = _real(call)
    query, key = (block_means(x, block, real) for x in (call.query, call.key))
    logits = soft_capped(grouped_scores(query, key) * call.scale, call.softcap)
    count = logits.shape[-1]
    future = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu(1)
    tokens = _real_blocks(real, block, logits[:, :, 0])
    hidden = future | ~tokens[:, :, None, :] | ~tokens[..., None]
    return logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)


def distrusted(call: AttentionCall, block: int, trust: float) -> Bool[Tensor, "batch heads blocks blocks"]:
    """Pairs of blocks of which one, queries or keys, is less like itself than `trust`: a mean stands for neither."""
    real = _real(call)
    rows, columns = (self_similarity(x, block, real) < trust for x in (call.query, call.key))
    return rows[..., :, None] | columns.repeat_interleave(call.groups, 1)[..., None, :]


def probe_rows(call: AttentionCall, block: int, real: Bool[Tensor, "batch keys"] | None) -> Int[Tensor, "batch rows"]:
    """The last `block` rows that are tokens, of each sequence; the first of them again where there are fewer."""
    count = min(block, call.queries)
    batch, device = call.query.shape[0], call.query.device
    if real is None:
        return torch.arange(call.queries - count, call.queries, device=device).expand(batch, -1)
    rows = []
    for row in real[:, -call.queries :]:
        own = row.nonzero()[:, 0][-count:] if bool(row.any()) else torch.tensor([call.queries - 1], device=device)
        rows.append(torch.cat([own[:1].expand(count - own.numel()), own]))
    return torch.stack(rows)


def probe_weights(
    call: AttentionCall, rows: Int[Tensor, "batch rows"], real: Bool[Tensor, "batch keys"] | None
) -> Float[Tensor, "batch heads rows keys"]:
    """Exact attention of the probe rows, in float32; the host's mask and padding hold. Learned sinks are left out, so
    that rows sum to one. A row that sees nothing gives zeros."""
    logits = grouped_scores(_rows_of(call.query, rows).float(), call.key.float()) * call.scale
    logits = soft_capped(logits, call.softcap)
    keys = torch.arange(call.keys, device=logits.device)
    seen = (keys <= rows[:, :, None])[:, None]
    if real is not None:
        seen = seen & real[:, None, None]
    if call.mask is not None:
        mask = call.mask.expand(rows.shape[0], -1, call.queries, -1)
        seen = seen & _rows_of(mask, rows)
    return logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)


def mean_by_offset(
    weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch heads keys"]:
    """s_o: mean weight at offset o = i − j, over the rows."""
    keys = weights.shape[-1]
    key = rows[:, :, None] - torch.arange(keys, device=weights.device)
    index = key.clamp(min=0)[:, None].expand(-1, weights.shape[1], -1, -1)
    return (weights.gather(-1, index) * (key >= 0)[:, None]).mean(2)


def _real(call: AttentionCall) -> Bool[Tensor, "batch keys"] | None:
    return call.real_tokens(call.first_key, call.first_key + call.keys)


def _pooled_row(
    call: AttentionCall, rows: Int[Tensor, "batch rows"], block: int, real: Tensor | None
) -> Float[Tensor, "batch heads blocks"]:
    """softmax(mean q̂ · k̄ᵀ): what pooling says of the probe."""
    query = _rows_of(call.query, rows).float().mean(2, keepdim=True)
    logits = soft_capped(grouped_scores(query, block_means(call.key, block, real)) * call.scale, call.softcap)[:, :, 0]
    return logits.masked_fill(~_real_blocks(real, block, logits), -torch.inf).softmax(-1).nan_to_num(0.0)


def _rows_of(x: Tensor, rows: Int[Tensor, "batch rows"]) -> Tensor:
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _real_blocks(
    real: Tensor | None, block: int, like: Float[Tensor, "batch heads blocks"]
) -> Bool[Tensor, "batch 1 blocks"]:
    if real is None:
        return torch.ones(like.shape[0], 1, like.shape[-1], dtype=torch.bool, device=like.device)
    return (block_sums(real.float(), block) > 0)[:, None]
