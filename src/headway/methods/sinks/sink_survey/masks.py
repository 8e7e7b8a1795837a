"""Sink-enforced masks: a sparse pattern that never hides the sinks.

    M_ij = 1  for j ∈ S ,   else the pattern's        Λ: 0 ≤ i − j < w;  vertical–slash: j ∈ V or i − j ∈ D;
                                                      block: j in the block of i or the `keep` blocks before it

Survey: arXiv 2604.10098. Λ is the mask of LM-Infinite, arXiv 2308.16137. The patterns are fixed ones, good beside the
estimated ones of FlexPrefill. Sinks are the first real tokens of each sequence, wherever padding puts them. A host with
learned sinks or a gate on the output of attention is masked alike, and told that it needs none of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakSet

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headway.door import AttentionCall, Dense, Keys, Selection, Selector, Site, Stage, Window
from headway.door.selector_calls import require_one_way
from headway.errors import ArgumentError, unknown
from headway.methods.budget import check_share
from headway.methods.sinks.sink_survey.places import first_of, sink_free

log = logging.getLogger(__name__)

PATTERNS = ("lambda", "vertical_slash", "block")
SINKS = 4
#: Models that were told that they need no first tokens.
_TOLD: WeakSet[nn.Module] = WeakSet()


@dataclass(frozen=True, kw_only=True)
class SinkMask(Selector):
    """A pattern that keeps the sinks: `headway.use(model, SinkMask(window=512))`.

    pattern: "lambda" (the last `window` keys), "vertical_slash" (the columns `verticals` counted from the first real
    token, and the distances `slashes`), "block" (a row's own block of `block` keys and the `keep` before it). sinks:
    first real tokens that every row reads. The row's own key is always read."""

    pattern: str = "lambda"
    sinks: int = SINKS
    window: int = 512
    verticals: Sequence[int] = ()
    slashes: Sequence[int] = field(default=(0,))
    block: int = 64
    keep: int = 1

    def __post_init__(self) -> None:
        if self.pattern not in PATTERNS:
            raise unknown("pattern", self.pattern, PATTERNS)
        if self.sinks < 0 or min(self.window, self.block) < 1 or self.keep < 0:
            raise ArgumentError(
                f"sinks, window, block, keep: got {self.sinks}, {self.window}, {self.block}, {self.keep}; expected "
                "sinks and keep ≥ 0, window and block ≥ 1."
            )
        if any(place < 0 for place in (*self.verticals, *self.slashes)):
            raise ArgumentError("verticals, slashes: got a negative one, expected positions and distances from 0.")

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def select(self, call: AttentionCall) -> Selection:
        require_one_way(call, self.title)
        self._tell(call)
        if call.first_key:
            return Dense()
        if self.pattern == "lambda" and call.keys <= self.window:
            return Dense()
        first = first_of(call)
        if self.pattern == "lambda" and not bool(first.any()) and call.offset == call.keys - call.queries:
            return Window(self.sinks, self.window)
        own = call.offset + torch.arange(call.queries, device=first.device)
        index = self._columns(own, first)
        valid = (index >= first[:, None, None]) & (index <= own[:, None])
        # Rows of padding read their own key, which the host hides.
        valid[..., 0] = True
        return Keys(index.clamp(0, call.keys - 1)[:, None], valid[:, None], query_block=1)

    def _tell(self, call: AttentionCall) -> None:
        model = call.forward.model
        if model is None or model in _TOLD or not self.sinks:
            return
        instead = sink_free(call)
        if instead is not None:
            _TOLD.add(model)
            log.warning("%s: the host has %s, so its first tokens need not be read by every row.", self.title, instead)

    def _columns(
        self, own: Int[Tensor, " queries"], first: Int[Tensor, " batch"]
    ) -> Int[Tensor, "batch queries chosen"]:
        """The keys of each row, its own first; some may lie outside what it sees."""
        sinks = (first[:, None] + torch.arange(self.sinks, device=own.device))[:, None].expand(-1, own.numel(), -1)
        if self.pattern == "lambda":
            near = own[:, None] - torch.arange(self.window, device=own.device)
        elif self.pattern == "block":
            # Blocks are counted from the first real token, so that padding moves none.
            place = own[None, :, None] - first[:, None, None]
            start = (place // self.block - self.keep).clamp(min=0) * self.block
            span = torch.arange((self.keep + 1) * self.block, device=own.device)
            inside = torch.where(start + span <= place, start + span, -1 - own.numel() - first.max())
            return torch.cat([own[None, :, None].expand(len(first), -1, -1), sinks, inside + first[:, None, None]], -1)
        else:
            near = own[:, None] - torch.tensor(list(self.slashes), dtype=torch.long, device=own.device)
            columns = torch.tensor(list(self.verticals), dtype=torch.long, device=own.device) + first[:, None]
            sinks = torch.cat([sinks, columns[:, None].expand(-1, own.numel(), -1)], -1)
        parts = [own[:, None].expand(len(first), -1, 1), near.expand(len(first), -1, -1), sinks]
        return torch.cat(parts, -1)

    def mask(self, tokens: int) -> Bool[Tensor, "tokens tokens"]:
        """Which keys each row of a text reads."""
        own, zero = torch.arange(tokens), torch.zeros(1, dtype=torch.long)
        index = self._columns(own, zero)[0]
        valid = (index >= 0) & (index <= own[:, None])
        chosen = torch.zeros(tokens, tokens, dtype=torch.int32)
        chosen.scatter_add_(1, index.clamp(0, tokens - 1), valid.int())
        return (chosen > 0) | torch.eye(tokens, dtype=torch.bool)


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """The Λ-mask whose rows read about `share` of `tokens` keys at the end of the context. At 1 nothing is masked."""
    check_share(share, tokens)
    if share == 1:
        return ()
    wide = max(round(share * tokens), 1)
    sinks = min(SINKS, wide - 1)
    return (SinkMask(sinks=sinks, window=wide - sinks),)
