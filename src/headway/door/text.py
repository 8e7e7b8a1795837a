"""The text of a call: without the keys in front of it, and with the pieces in which a module reads it joined.

    w_ij = e^{s_ij} / (e^{f_i} + Σ_{j in text} e^{s_ij}) ,   f_i = ln Σ_{j in front} e^{s_ij}

Rows then sum to one less the share of what stands in front, as with a learned sink, and key j is token j of the text.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.errors import ArgumentError


@dataclass(frozen=True, eq=False)
class BehindFront:
    """The softmax over what stands in front and the text together, of which the text's part is given.

    front: log-sum-exp of the logits in front. seen: how many keys in front a row sees."""

    front: Float[Tensor, "batch heads queries"]
    seen: Int[Tensor, "#batch queries"]
    name: str = "softmax behind other keys"
    whole: bool = False

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        # Rows of a text that goes on stand behind earlier keys; `front` has the last of them.
        rows = positions - max(logits.shape[-1] - self.front.shape[2], 0)
        before = self.front[:, :, rows].to(logits.dtype)[..., None]
        return torch.cat([before, logits.masked_fill(~visible, -torch.inf)], -1).softmax(-1)[..., 1:]


class _Piece(NamedTuple):
    call: AttentionCall
    output: Tensor
    front: Tensor
    seen: Tensor


def text_call(call: AttentionCall, output: Tensor) -> tuple[AttentionCall, Tensor] | None:
    """The call on its text alone and its output; None for a piece that further pieces follow.

    A call without anything in front that is the whole text is given back as it is. Raises ArgumentError for pieces
    that do not begin with the first token of one unpadded text."""
    if not call.front and call.piece is None:
        return call, output
    start, total = (0, call.queries) if call.piece is None else call.piece
    if start + call.queries > total:
        raise ArgumentError(
            f"text at {call.site.name}: got rows of a padded, packed or continued text, which this layer reads in "
            "pieces; expected one text from its first token on. Run one unpadded text in one forward."
        )
    pieces: list[_Piece] = call.forward.scratch.setdefault(("pieces", call.site.name), [])
    if start == 0:
        pieces.clear()
    pieces.append(_piece(call, output))
    if start + call.queries < total:
        return None
    joined = _joined(pieces)
    pieces.clear()
    return joined


def _piece(call: AttentionCall, output: Tensor) -> _Piece:
    """The rows and the text's keys of one call, and what its rows see in front."""
    stop = call.keys if call.piece is None else call.front + call.queries
    ahead, own = _of_keys(call, 0, call.front), _of_keys(call, call.front, stop)
    front = ahead.logits().logsumexp(-1)
    seen = ahead.visible().sum(-1)[:, 0]
    return _Piece(own.replace(front=0, piece=None), output, front, seen)


def _of_keys(call: AttentionCall, start: int, stop: int) -> AttentionCall:
    part = slice(start, stop)
    return call.replace(
        key=call.key[:, :, part],
        value=call.value[:, :, part],
        mask=None if call.mask is None else call.mask[..., part],
        bias=None if call.bias is None else call.bias[..., part],
    )


def _joined(pieces: list[_Piece]) -> tuple[AttentionCall, Tensor]:
    calls = [piece.call for piece in pieces]
    query, key, value = (torch.cat([getattr(c, name) for c in calls], 2) for name in ("query", "key", "value"))
    mask = calls[0].visible()
    if len(calls) > 1:
        mask = mask.new_zeros(*mask.shape[:2], query.shape[2], key.shape[2])
        at = 0
        for c in calls:
            mask[:, :, at : at + c.queries, at : at + c.keys] = c.visible()
            at += c.queries
    # Channels that only keys in front have add nothing to any logit of the text.
    used = (key != 0).flatten(0, 2).any(0)
    square = query.shape[2] == key.shape[2]
    front = torch.cat([piece.front for piece in pieces], 2)
    seen = torch.cat([piece.seen.expand(front.shape[0], -1) for piece in pieces], 1)
    call = calls[0].replace(
        query=query[..., used] if bool(used.any()) else query,
        key=key[..., used] if bool(used.any()) else key,
        value=value,
        mask=mask,
        causal=square and not bool(mask.triu(1).any()),
        weighing=BehindFront(front, seen),
        hidden=calls[0].hidden if len(calls) == 1 else None,
    )
    return call, torch.cat([piece.output for piece in pieces], 2)
