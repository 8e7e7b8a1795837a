"""Which keys a row of chunk scores gives under a budget.

    kept = forced ∪ the (N − |forced|) other allowed tokens of highest score,   score of a token = that of its chunk

Equal scores, those inside a chunk above all, go to the later token. So chunks are taken whole in the order of their
scores, and of the last one its latest tokens: it is enough to sort chunks. A key is listed once.

For one row that sees a run of tokens without gaps, `choose_for_row` works on chunks alone, whatever the length of what
was stored: what is kept of a chunk is its last tokens, so that a list is a row of ranges.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from headway.errors import ArgumentError, unknown

MODES = ("chunks", "reference")


def choose_tokens(
    scores: Float[Tensor, "batch heads rows chunks"],
    member: Int[Tensor, "batch tokens"],
    allowed: Bool[Tensor, "#batch rows tokens"],
    forced: Bool[Tensor, "#batch rows tokens"],
    budget: int,
    *,
    mode: str = "chunks",
) -> Bool[Tensor, "batch heads rows tokens"]:
    """The tokens that each row keeps: at most `budget`, all forced ones among them, none that is not allowed.

    `member` is the chunk of each token; chunks are consecutive. `mode="reference"` sorts tokens. Raises ArgumentError
    where more tokens are forced than the budget holds."""
    if mode not in MODES:
        raise unknown("mode", mode, MODES)
    batch = scores.shape[0]
    forced = (forced & allowed).expand(batch, -1, -1)
    free = (allowed & ~forced).expand(batch, -1, -1)
    room = budget - forced.sum(-1)
    if bool((room < 0).any()):
        raise ArgumentError(
            f"budget: got {budget} keys where {budget - int(room.min())} are always kept, expected at least as many. "
            "Raise the budget, or keep fewer local and global tokens."
        )
    best = _by_chunks if mode == "chunks" else _by_tokens
    return forced[:, None] | best(scores, member, free, room)


def _by_chunks(scores: Tensor, member: Tensor, free: Tensor, room: Tensor) -> Tensor:
    batch, heads, rows, chunks = scores.shape
    so_far = pad(free.int().cumsum(-1), (1, 0))
    sizes = torch.zeros(batch, chunks, dtype=torch.long, device=member.device)
    ends = sizes.scatter_add_(1, member, torch.ones_like(member)).cumsum(1)
    at_end = so_far.gather(2, ends[:, None].expand(-1, rows, -1))
    held = at_end - pad(at_end[..., :-1], (1, 0))
    order = chunks - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    in_order = held[:, None].expand(-1, heads, -1, -1).gather(3, order)
    before = torch.empty_like(in_order).scatter_(3, order, in_order.cumsum(-1).to(in_order.dtype) - in_order)
    later = at_end.gather(2, member[:, None].expand(-1, rows, -1)) - so_far[..., 1:]
    taken = before.gather(3, member[:, None, None].expand(-1, heads, rows, -1)) + later[:, None]
    return free[:, None] & (taken < room[:, None, :, None])


def _by_tokens(scores: Tensor, member: Tensor, free: Tensor, room: Tensor) -> Tensor:
    heads, rows = scores.shape[1:3]
    of_tokens = scores.gather(3, member[:, None, None].expand(-1, heads, rows, -1))
    of_tokens = of_tokens.masked_fill(~free[:, None], -torch.inf)
    order = of_tokens.shape[-1] - 1 - of_tokens.flip(-1).argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(of_tokens.shape[-1], device=scores.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(3, order, places)
    return free[:, None] & (ranks < room[:, None, :, None])


def choose_for_row(
    scores: Float[Tensor, "batch heads chunks"],
    ends: Int[Tensor, "batch chunks"],
    first: Int[Tensor, " batch"],
    last: int,
    *,
    early: int,
    local: int,
    budget: int,
) -> Int[Tensor, "batch heads budget"]:
    """The tokens that one row keeps, in order: the choice of `choose_tokens` for a row that sees all positions from
    `first` to `last`, both among them, and always reads the `early` first and the `local` last of them.

    `ends` are the positions behind each chunk, the last of which is behind `last`. Raises ArgumentError where a row
    sees fewer tokens than the budget, or is forced to read more."""
    batch, heads, chunks = scores.shape
    room = budget - early - local
    fewest = last + 1 - int(first.max())
    if room < 0 or fewest < budget:
        raise ArgumentError(
            f"budget: got {budget} keys for rows that see {fewest} and always read {early + local}, expected a number "
            "between the two."
        )
    begin, end = first + early, last + 1 - local
    highs = ends.clamp(max=end)
    held = (highs - torch.maximum(pad(ends[:, :-1], (1, 0)), begin[:, None])).clamp(min=0)
    order = chunks - 1 - scores.flip(-1).argsort(dim=-1, descending=True, stable=True)
    in_order = held[:, None].expand(-1, heads, -1).gather(2, order)
    left = (room - in_order.cumsum(-1) + in_order).clamp(min=0)
    taken = torch.empty_like(in_order).scatter_(2, order, torch.minimum(left, in_order)).flatten()
    # Token t of the flat list is the range's first token plus the place of t behind the ranges before.
    offsets = highs[:, None].expand(-1, heads, -1).flatten() - taken.cumsum(0)
    total = batch * heads * room
    middle = offsets.repeat_interleave(taken, output_size=total) + torch.arange(total, device=scores.device)
    near = torch.arange(end, last + 1, device=scores.device).expand(batch, heads, -1)
    far = (first[:, None] + torch.arange(early, device=scores.device))[:, None].expand(-1, heads, -1)
    return torch.cat([far, middle.view(batch, heads, room), near], -1)


def key_lists(
    kept: Bool[Tensor, "batch heads rows tokens"],
) -> tuple[Int[Tensor, "batch heads rows most"], Bool[Tensor, "batch heads rows most"]]:
    """The kept tokens of each row as a list in order, and which entries are real: as wide as the longest list."""
    counts = kept.sum(-1)
    most = max(int(counts.max()), 1)
    index = torch.zeros(*kept.shape[:3], most, dtype=torch.long, device=kept.device)
    where = kept.nonzero(as_tuple=True)
    slots = kept.int().cumsum(-1)[where] - 1
    index[(*where[:3], slots.long())] = where[3]
    return index, torch.arange(most, device=kept.device) < counts[..., None]
