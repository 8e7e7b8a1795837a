"""Sliding-window attention with learned tokens that every row sees, and a state of constant size.

    j visible from i   ⇔   same document and 0 ≤ p_i − p_j < w ,   and every persistent token

The keys of the last w − 1 tokens are kept. Persistent tokens have no position: their logits use the query before its
rotation. Both kinds of logits come from one product of vectors twice as long, [rotated ; plain].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention

from headway.door.own import Attend
from headway.errors import ArgumentError
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.layers.titans.memory import Tensors, split

ROPE_BASE = 10_000.0
PERSISTENT_STD = 0.02


@dataclass(frozen=True)
class Line:
    """Kept keys and new ones in one line, with what says who sees whom."""

    key: Float[Tensor, "batch heads line dim"]
    value: Float[Tensor, "batch heads line dim"]
    position: Int[Tensor, "batch line"]
    document: Int[Tensor, "batch line"]
    real: Bool[Tensor, "batch line"]

    def sorted_tokens(self, kept: int) -> tuple[Line, Tensor]:
        """The new tokens with padding behind the real ones, and where each of them stood."""
        order = torch.argsort(~self.real[:, kept:], dim=1, stable=True)
        index = torch.cat([torch.arange(kept, device=order.device).expand(order.shape[0], kept), order + kept], 1)
        wide = index[:, None, :, None].expand_as(self.key)
        key, value = self.key.gather(2, wide), self.value.gather(2, wide)
        return Line(key, value, *(x.gather(1, index) for x in (self.position, self.document, self.real))), order


class WindowAttention(nn.Module):
    """(batch, tokens, width) to the heads' outputs side by side, not projected.

    window: keys a token sees, its own included. persistent: learned tokens in front."""

    def __init__(self, width: int, heads: int, *, window: int, persistent: int, layer: int = 0) -> None:
        super().__init__()
        if window < 1:
            raise ArgumentError(f"window: got {window}, expected at least 1 key, that of the token itself.")
        if persistent < 0:
            raise ArgumentError(f"persistent: got {persistent} tokens, expected 0 or more.")
        self.width, self.heads, self.window = width, heads, window
        self.dim = width // heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.persistent = nn.Parameter(torch.randn(persistent, width) * PERSISTENT_STD) if persistent else None
        self.attend = Attend(layer=layer, scale=self.dim**-0.5, text_dim=self.dim)
        self.frequencies = tuple(rope_frequencies(self.dim, ROPE_BASE).tolist())

    def start(self, batch: int, dtype: torch.dtype | None = None) -> Tensors:
        shape = (batch, self.heads, self.window - 1, self.dim)
        return {name: self.project.weight.new_zeros(shape, dtype=dtype) for name in ("key", "value")}

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        *,
        position: Int[Tensor, "batch tokens"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        seen: Int[Tensor, " batch"] | None = None,
        after: Int[Tensor, " batch"] | None = None,
        tensors: Tensors | None = None,
        mode: str = "block",
    ) -> tuple[Float[Tensor, "batch tokens width"], Tensors | None]:
        """Outputs, and the keys kept behind the last token where `tensors`, `seen` and `after` (tokens of the document
        before and behind this call) were given. Rows of masked tokens mean nothing."""
        batch, tokens = position.shape
        plain, key, value = (split(part, self.heads) for part in self.project(x).chunk(3, -1))
        frequencies = torch.tensor(self.frequencies, dtype=torch.float64, device=x.device)
        query, key = (rotate(part, position, frequencies) for part in (plain, key))
        kept = self.window - 1 if tensors is not None else 0
        real = torch.ones_like(position, dtype=torch.bool) if mask is None else mask
        line = self._line(key, value, position, real, seen, tensors)
        learned = self._persistent(batch)
        if learned:
            query = torch.cat([query, plain], -1)
        keys, values = _with(learned, line)

        def visible() -> Tensor:
            return _see(line, position, line.document[:, kept:], self.window, kept, self._learned)

        def native() -> Tensor:
            if mode == "block" and tokens > self.window:
                return self._banded(query, line, learned, kept)
            return _attend(query, keys, values, visible(), self.attend.scaling, explicit=mode == "reference")

        watched = self.attend.watched
        found = self.attend(
            query, keys, values, native=native, visible=visible() if watched else None, front=self._learned
        )
        found = found.transpose(1, 2).flatten(2)
        if tensors is None or after is None:
            return found, None
        return found, self._kept(line, after)

    @property
    def _learned(self) -> int:
        return 0 if self.persistent is None else self.persistent.shape[0]

    def _persistent(self, batch: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the persistent tokens."""
        if self.persistent is None:
            return None
        both = linear(self.persistent, self.project.weight[self.width :]).chunk(2, -1)
        key, value = (split(part[None], self.heads).expand(batch, -1, -1, -1) for part in both)
        return key, value

    def _line(
        self, key: Tensor, value: Tensor, position: Tensor, real: Tensor, seen: Tensor | None, tensors: Tensors | None
    ) -> Line:
        opens = real & (position == 0)
        document = opens.long().cumsum(1)
        if tensors is None or seen is None:
            return Line(key, value, position, document, real)
        kept = self.window - 1
        before = seen[:, None] - kept + torch.arange(kept, device=seen.device)
        return Line(
            torch.cat([tensors["key"].to(key.dtype), key], 2),
            torch.cat([tensors["value"].to(value.dtype), value], 2),
            torch.cat([before, position], 1),
            torch.cat([torch.zeros_like(before), document], 1),
            torch.cat([before >= 0, real], 1),
        )

    def _kept(self, line: Line, after: Int[Tensor, " batch"]) -> Tensors:
        """The last w − 1 tokens of the document that goes on, the latest last."""
        room = self.window - 1
        slot = room - (after[:, None] - line.position)
        current = line.document == line.document.amax(1, keepdim=True)
        slot = torch.where(line.real & current & (slot >= 0) & (slot < room), slot, room)
        index = slot[:, None, :, None].expand_as(line.key)
        empty = line.key.new_zeros(*line.key.shape[:2], room + 1, self.dim)
        return {
            name: empty.scatter(2, index, tensor)[:, :, :room]
            for name, tensor in (("key", line.key), ("value", line.value))
        }

    def _banded(self, query: Tensor, line: Line, learned: tuple[Tensor, Tensor] | None, kept: int) -> Tensor:
        """Blocks of w rows, each with the 2w − 1 keys it can see: work in proportion to the length."""
        size, span = self.window, 2 * self.window - 1
        batch, _, tokens, _ = query.shape
        line, order = line.sorted_tokens(kept)
        query = query.gather(2, order[:, None, :, None].expand_as(query))
        blocks = -(-tokens // size)
        room, extra = size - 1 - kept, blocks * size - tokens

        def spans(x: Tensor, fill: int | bool | float) -> Tensor:
            """(batch, …, line, dim) as (batch · blocks, …, span, dim)."""
            windows = pad(x, (0, 0, room, extra), value=fill).unfold(-2, span, size)
            return windows.movedim(-3, 1).transpose(-1, -2).flatten(0, 1)

        key, value = spans(line.key, 0.0), spans(line.value, 0.0)
        document = spans(line.document[..., None], -1)[..., 0]
        real = spans(line.real[..., None].long(), 0)[..., 0] > 0
        rows = pad(query, (0, 0, 0, extra)).unflatten(2, (blocks, size)).movedim(2, 1).flatten(0, 1)
        row, column = torch.arange(size, device=query.device)[:, None], torch.arange(span, device=query.device)
        band = (column >= row) & (column <= row + size - 1)
        same = document[:, size - 1 :, None] == document[:, None]
        seen = ((band & same & real[:, None]) | (column == row + size - 1))[:, None]
        seen = pad(seen, (self._learned, 0), value=True)
        repeated = None if learned is None else tuple(x.repeat_interleave(blocks, 0) for x in learned)
        parts = _with(repeated, Line(key, value, document, document, real))
        found = _attend(rows, *parts, seen, self.attend.scaling)
        found = found.unflatten(0, (batch, blocks)).movedim(1, 2).flatten(2, 3)[:, :, :tokens]
        back = torch.argsort(order, dim=1)
        return found.gather(2, back[:, None, :, None].expand_as(found))


def _with(learned: tuple[Tensor, ...] | None, line: Line) -> tuple[Tensor, Tensor]:
    """Keys and values with the persistent ones in front, as queries [rotated ; plain] meet them."""
    if learned is None:
        return line.key, line.value
    key, value = learned
    keys = torch.cat([pad(key, (key.shape[-1], 0)), pad(line.key, (0, key.shape[-1]))], 2)
    return keys, torch.cat([value, line.value], 2)


def _see(
    line: Line, position: Tensor, document: Tensor, window: int, kept: int, learned: int
) -> Bool[Tensor, "batch 1 tokens keys"]:
    """Every persistent token, and the tokens of one's document within the window; a masked row sees itself."""
    distance = position[:, :, None] - line.position[:, None]
    near = (distance >= 0) & (distance < window)
    order = torch.arange(line.position.shape[1], device=position.device)
    own = order == kept + torch.arange(position.shape[1], device=position.device)[:, None]
    seen = (near & (document[:, :, None] == line.document[:, None]) & line.real[:, None]) | own
    return pad(seen, (learned, 0), value=True)[:, None]


def _attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, *, explicit: bool = False
) -> Tensor:
    if not explicit:
        return scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    logits = (query @ key.transpose(-1, -2)) * scale
    return logits.masked_fill(~visible, -torch.inf).softmax(-1) @ value
