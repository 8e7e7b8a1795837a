"""Tokens of packed, padded, split sequences, sorted into the chunks of their documents.

The token at position p of its document belongs to slot p mod size of a chunk that begins at the last position with
slot 0. Rows of a batch begin and end chunks at different places, so each row's chunks are numbered for themselves:
chunk 0 is the one an earlier call left open, where there is one. Slots without a token of this call are holes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from headway.errors import ArgumentError


@dataclass(frozen=True)
class Chunks:
    """Where each token goes. `token` is −1 at holes. `place` is chunk · size + slot; masked tokens have the place 0 and
    must be hidden by the caller."""

    token: Int[Tensor, "batch chunks size"]
    place: Int[Tensor, "batch tokens"]
    #: The chunk begins a document: what is carried must be emptied before it.
    opens: Bool[Tensor, "batch chunks"]
    #: All slots are filled when the chunk ends.
    closes: Bool[Tensor, "batch chunks"]
    #: The chunk is the last of its row and stays open: some slots are filled and some are not.
    stays: Bool[Tensor, "batch chunks"]
    #: Slots of chunk 0 that an earlier call filled.
    carried: Int[Tensor, " batch"]

    @property
    def count(self) -> int:
        return self.token.shape[1]

    @property
    def real(self) -> Bool[Tensor, "batch chunks size"]:
        return self.token >= 0

    def gather(self, x: Tensor) -> Tensor:
        """(batch, …, tokens, dim) into (batch, …, chunks, size, dim), zero at holes."""
        batch, chunks, size = self.token.shape
        middle = [1] * (x.ndim - 3)
        index = self.token.clamp(min=0).view(batch, *middle, chunks * size, 1)
        found = x.gather(-2, index.expand(*x.shape[:-2], chunks * size, x.shape[-1]))
        found = found.unflatten(-2, (chunks, size))
        return torch.where(self.real.view(batch, *middle, chunks, size, 1), found, 0.0)

    def scatter(self, x: Tensor) -> Tensor:
        """(batch, …, chunks, size, dim) back into (batch, …, tokens, dim)."""
        flat = x.flatten(-3, -2)
        tokens = self.place.shape[1]
        index = self.place.view(self.place.shape[0], *[1] * (x.ndim - 4), tokens, 1)
        return flat.gather(-2, index.expand(*flat.shape[:-2], tokens, flat.shape[-1]))


def document_chunks(
    position: Int[Tensor, "batch tokens"],
    size: int,
    *,
    mask: Bool[Tensor, "batch tokens"] | None = None,
    seen: Int[Tensor, " batch"] | None = None,
) -> Chunks:
    """Chunks of `size` tokens each. `position` is that of each token in its document, `seen` how many tokens of the
    present document an earlier call read. Raises ArgumentError for a size below 1."""
    if size < 1:
        raise ArgumentError(f"size: got {size}, expected chunks of at least one token.")
    batch, tokens = position.shape
    device = position.device
    real = torch.ones_like(position, dtype=torch.bool) if mask is None else mask
    carried = torch.zeros(batch, dtype=torch.long, device=device) if seen is None else seen % size
    slot = position % size
    chunk = (real & (slot == 0)).long().cumsum(1) - (carried == 0).long()[:, None]
    last = chunk[:, -1] if tokens else carried.sign() - 1
    count = int(last.max()) + 1 if batch else 0
    place = torch.where(real, chunk * size + slot, 0)
    # Masked tokens are thrown into one place too many, which is cut off.
    target = torch.where(real, place, count * size)
    order = torch.arange(tokens, device=device).expand(batch, tokens)
    token = torch.full((batch, count * size + 1), -1, device=device).scatter(1, target, order)[:, :-1]
    token = token.view(batch, count, size)
    filled = (token >= 0).sum(-1)
    opens = torch.zeros(batch, count, dtype=torch.bool, device=device)
    if count:
        filled[:, 0] += carried
        first = token[:, :, 0]
        opens = (first >= 0) & (position.gather(1, first.clamp(min=0)) == 0) if tokens else opens
    is_last = torch.arange(count, device=device) == last[:, None]
    return Chunks(token, place, opens, filled == size, is_last & (filled > 0) & (filled < size), carried)
