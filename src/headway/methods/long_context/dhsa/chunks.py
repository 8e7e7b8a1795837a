"""Chunks of keys and what stands for each: sums that grow with the sequence, made into vectors by their length.

    k_c = √n_c · mean = (Σ_{j in c} k_j) / √n_c        ("sqrt", the default)

With independent noise of spread σ on every key the mean of n keys has spread σ/√n: short chunks score high and low by
chance. √n makes the spread of all scores the same; the mean favours short chunks, the sum long ones.

`Chunks` is the state of one layer of one request. A new piece of prompt adds its chunks, a generated token joins the
last, growing chunk; keys that are in are never read again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import unknown

NORMS = ("sqrt", "mean", "sum")


@dataclass(frozen=True)
class Chunks:
    """Consecutive chunks of the first `tokens` tokens of each sequence, in float32.

    `counts` are real tokens (padding does not count), `ends` the positions behind each chunk. Sequences with fewer
    chunks than others have empty ones, whose end is that of the chunk before."""

    sums: Float[Tensor, "batch heads chunks dim"]
    counts: Int[Tensor, "batch chunks"]
    ends: Int[Tensor, "batch chunks"]
    tokens: int
    growing: bool = False

    @property
    def starts(self) -> Int[Tensor, "batch chunks"]:
        return torch.nn.functional.pad(self.ends[:, :-1], (1, 0))

    def of_tokens(self, first: int, last: int) -> Int[Tensor, "batch tokens"]:
        """The chunk of each token from position `first` up to `last`."""
        at = torch.arange(first, last, device=self.ends.device).expand(self.ends.shape[0], -1).contiguous()
        return torch.searchsorted(self.ends.contiguous(), at, right=True).clamp(max=self.ends.shape[1] - 1)

    def vectors(self, norm: str = "sqrt") -> Float[Tensor, "batch heads chunks dim"]:
        """What stands for each chunk; zero for an empty one."""
        return normalised(self.sums, self.counts, norm)

    def scores(
        self, query: Float[Tensor, "batch heads rows dim"], norm: str = "sqrt"
    ) -> Float[Tensor, "batch heads rows chunks"]:
        """q · k_c of every chunk. Scales scores, not sums: for a row at a time, chunks are read once and not copied."""
        return query @ self.sums.transpose(-1, -2) / _sizes(self.counts, norm)[:, None, None]

    def with_piece(self, key: Tensor, real: Tensor, starts: Tensor) -> Chunks:
        """With the chunks of new tokens behind these; the first new token begins a chunk."""
        added = chunks_of(key, real, starts)
        return Chunks(
            torch.cat([self.sums, added.sums], 2),
            torch.cat([self.counts, added.counts], 1),
            torch.cat([self.ends, added.ends + self.tokens], 1),
            self.tokens + added.tokens,
        )

    def opened(self) -> Chunks:
        """With a growing chunk at the end, empty at first."""
        if self.growing:
            return self
        sums, counts, ends = self.sums[:, :, :1] * 0, self.counts[:, :1] * 0, self.ends[:, -1:]
        return Chunks(
            torch.cat([self.sums, sums], 2),
            torch.cat([self.counts, counts], 1),
            torch.cat([self.ends, ends], 1),
            self.tokens,
            growing=True,
        )

    def with_token(self, key: Float[Tensor, "batch heads 1 dim"], real: Bool[Tensor, "batch 1"]) -> Chunks:
        """With one generated token in the growing chunk. The sums are added to in place."""
        grown = self.opened()
        grown.sums[:, :, -1] += key[:, :, 0].float() * real[:, :, None]
        counts, ends = grown.counts.clone(), grown.ends.clone()
        counts[:, -1] += real[:, 0]
        ends[:, -1] = self.tokens + 1
        return Chunks(grown.sums, counts, ends, self.tokens + 1, growing=True)


def chunks_of(
    key: Float[Tensor, "batch heads tokens dim"],
    real: Bool[Tensor, "batch tokens"],
    starts: Bool[Tensor, "batch tokens"],
) -> Chunks:
    """The chunks of a piece of the sequence; `starts` is True where a chunk begins (the first token always does)."""
    batch, heads, tokens, dim = key.shape
    opened = starts.clone()
    opened[:, 0] = True
    member = opened.long().cumsum(1) - 1
    count = int(member.max()) + 1
    weighted = key.float() * real[:, None, :, None]
    sums = torch.zeros(batch, heads, count, dim, device=key.device)
    sums.scatter_add_(2, member[:, None, :, None].expand_as(weighted), weighted)
    blank = torch.zeros(batch, count, dtype=torch.long, device=key.device)
    counts = blank.scatter_add(1, member, real.long())
    return Chunks(sums, counts, blank.scatter_add(1, member, torch.ones_like(member)).cumsum(1), tokens)


def normalised(
    sums: Float[Tensor, "batch heads chunks dim"], counts: Int[Tensor, "batch chunks"], norm: str = "sqrt"
) -> Float[Tensor, "batch heads chunks dim"]:
    """Sums of n keys over √n, n or 1. Raises ArgumentError for another `norm`."""
    return sums / _sizes(counts, norm)[:, None, :, None]


def _sizes(counts: Int[Tensor, "batch chunks"], norm: str) -> Float[Tensor, "batch chunks"]:
    """What sums are divided by; an empty chunk counts as one key."""
    if norm not in NORMS:
        raise unknown("norm", norm, NORMS)
    size = counts.clamp(min=1).float()
    return {"sqrt": size.sqrt, "mean": size.clone, "sum": lambda: torch.ones_like(size)}[norm]()
