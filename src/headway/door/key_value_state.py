"""The state of mixers that store keys and values: every real token adds a column, and each query sees its own document.

Keys and values may differ in the number and the size of their heads, and each is stored as it is. While no padding and
no second document was read, nothing but the two is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.door.mixer import State, document_positions, segment_ids
from headway.errors import ArgumentError

#: Columns of room that are made at once.
ROOM = 64


@dataclass(frozen=True)
class Appended:
    """All keys and values so far. `visible` tells which columns each new token sees; None where all see all before
    them (`causal`) or, for a single token, simply all. `causal` is only set where there are as many keys as queries."""

    key: Float[Tensor, "batch key_heads keys key_dim"]
    value: Float[Tensor, "batch value_heads keys value_dim"]
    visible: Bool[Tensor, "batch 1 tokens keys"] | None
    causal: bool
    state: State


def empty_keys(
    batch: int,
    *,
    key_heads: int,
    key_dim: int,
    value_heads: int,
    value_dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> State:
    """The state before the first token."""
    return State(
        {
            "key": torch.empty(batch, key_heads, 0, key_dim, device=device, dtype=dtype),
            "value": torch.empty(batch, value_heads, 0, value_dim, device=device, dtype=dtype),
        },
        torch.zeros(batch, dtype=torch.long, device=device),
    )


def append(
    state: State | None,
    key: Float[Tensor, "batch key_heads tokens key_dim"],
    value: Float[Tensor, "batch value_heads tokens value_dim"],
    mask: Bool[Tensor, "batch tokens"] | None = None,
    resets: Bool[Tensor, "batch tokens"] | None = None,
) -> Appended:
    """The keys and values of some more tokens behind those of the state (None: there were none).

    A masked token is stored as a column that nobody sees. A query sees the real tokens of its document up to itself; a
    masked query sees nothing."""
    batch, tokens, device = key.shape[0], key.shape[2], key.device
    past = 0 if state is None else state.tensors["key"].shape[2]
    _, seen = document_positions((batch, tokens), mask, resets, None if state is None else state.seen, device)
    tensors, room = {"key": key, "value": value}, None
    if state is not None and past:
        tensors, room = _behind(state, tensors)
    plain = mask is None and resets is None and (state is None or "real" not in state.tensors)
    if not plain:
        tensors |= _columns(state, past, batch, tokens, device, mask, resets)
    after = State(tensors, seen, room)
    visible = None
    if not plain or (past and tokens > 1):
        order = torch.arange(past + tokens, device=device)
        visible = (order <= past + torch.arange(tokens, device=device)[:, None])[None, None]
        if not plain:
            real, document = tensors["real"], tensors["document"]
            same = document[:, None, past:, None] == document[:, None, None, :]
            visible = visible & same & real[:, None, None, :] & real[:, None, past:, None]
    return Appended(tensors["key"], tensors["value"], visible, visible is None and not past and tokens > 1, after)


@dataclass
class _Room:
    """Buffers longer than what they hold. A state that ends where they are filled may be continued in place; any other
    one, such as the common past of two continuations, is copied first."""

    buffers: dict[str, Tensor]
    filled: int

    def fits(self, past: int, new: dict[str, Tensor]) -> bool:
        return past == self.filled and all(
            x.shape[2] <= buffer.shape[2] - past
            and x.dtype == buffer.dtype
            and (torch.is_inference_mode_enabled() or not buffer.is_inference())
            for x, buffer in ((x, self.buffers[name]) for name, x in new.items())
        )


def _behind(state: State, new: dict[str, Tensor]) -> tuple[dict[str, Tensor], _Room | None]:
    """New columns behind those of the state. Without gradients they are written into room that is made for `ROOM`
    columns at once, so a step does not copy the past; a graph needs tensors that nobody writes into."""
    past, tokens = state.tensors["key"].shape[2], new["key"].shape[2]
    if torch.is_grad_enabled():
        return {name: torch.cat([state.tensors[name].to(x.dtype), x], 2) for name, x in new.items()}, None
    room = state.room if isinstance(state.room, _Room) and state.room.fits(past, new) else None
    if room is None:
        buffers = {name: x.new_empty(*x.shape[:2], past + tokens + ROOM, x.shape[3]) for name, x in new.items()}
        for name, buffer in buffers.items():
            buffer[:, :, :past] = state.tensors[name]
        room = _Room(buffers, past)
    for name, x in new.items():
        room.buffers[name][:, :, past : past + tokens] = x
    room.filled = past + tokens
    return {name: buffer[:, :, : room.filled] for name, buffer in room.buffers.items()}, room


def crop_keys(state: State, tokens: int) -> State:
    """The state without its last `tokens` columns, which must be real tokens of the present document."""
    length = state.tensors["key"].shape[2]
    if not 0 <= tokens <= length:
        raise ArgumentError(f"tokens: got {tokens}, expected 0..{length}, the tokens that are stored.")
    keep = length - tokens
    tensors = {name: t[:, :, :keep] if name in ("key", "value") else t[:, :keep] for name, t in state.tensors.items()}
    if "real" not in state.tensors:
        return State(tensors, state.seen - tokens)
    if tokens == 0:
        return state
    gone, document = state.tensors["real"][:, keep:], state.tensors["document"]
    if bool((document[:, keep:] != (document[:, keep - 1 : keep] if keep else document[:, :1])).any()):
        raise ArgumentError(
            f"tokens: got {tokens}, which reaches into a former document; expected to stay in this one."
        )
    return State(tensors, state.seen - gone.sum(1))


def _columns(
    state: State | None,
    past: int,
    batch: int,
    tokens: int,
    device: torch.device,
    mask: Tensor | None,
    resets: Tensor | None,
) -> dict[str, Tensor]:
    """Which columns are real tokens, and which document each belongs to."""
    real = torch.ones(batch, tokens, dtype=torch.bool, device=device) if mask is None else mask
    document = (
        torch.zeros(batch, tokens, dtype=torch.long, device=device) if resets is None else segment_ids(resets, mask)
    )
    if not past or state is None:
        return {"real": real, "document": document}
    known = "real" in state.tensors
    before = state.tensors["real"] if known else torch.ones(batch, past, dtype=torch.bool, device=device)
    numbers = state.tensors["document"] if known else torch.zeros(batch, past, dtype=torch.long, device=device)
    return {
        "real": torch.cat([before, real], 1),
        "document": torch.cat([numbers, numbers[:, -1:] + document], 1),
    }
