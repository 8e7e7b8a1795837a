"""Continued training with recycled attention, and its parallel form: one pass over text that is split in two.

    rows below L   attend to everything
    rows from L on read what the row before them chose, and every token since (no refresh inside)

The paper trains on samples of L tokens and the S behind them, with the language-model loss on all. This masks a dense
pass: it saves no time, and gives the gradients of decoding S tokens by recycling.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor
from headway.errors import ArgumentError, check_whole
from headway.methods.long_context.recycled_attention.selection import (
    check_scoring,
    key_scores,
    log_weights,
    recycled_mask,
)


@dataclass(frozen=True, kw_only=True)
class RecycledTraining(Editor):
    """Rows from `split` on read the keys that row split − 1 chose: `headway.use(model, RecycledTraining(split=4096))`.

    budget, pool and group as in `RecycledAttention`. No gradient flows through the choice. Raises ArgumentError for
    samples without tokens behind the split, or with so many that no chosen key would be left."""

    split: int
    budget: int = 2048
    pool: int = 7
    group: str = "max"

    def __post_init__(self) -> None:
        check_whole("split", self.split, 1)
        check_whole("budget", self.budget, 1)
        check_scoring(self.pool, self.group)

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self" and site.window is None

    def edit_call(self, call: AttentionCall) -> AttentionCall:
        steps = call.queries - self.split
        if call.keys != call.queries or steps < 1:
            raise ArgumentError(
                f"split: got {self.split} for {call.queries} queries and {call.keys} keys, expected whole samples "
                "longer than the split. Train on full sequences, without a cache."
            )
        visible = call.visible().expand(call.query.shape[0], call.heads, -1, -1)
        mask = torch.cat([visible[:, :, : self.split], visible[:, :, self.split :] & self._chosen(call, steps)], 2)
        return call.replace(mask=mask, causal=False)

    @torch.no_grad()
    def _chosen(self, call: AttentionCall, steps: int) -> Tensor:
        logs = log_weights(call, self.split - 1)[..., : self.split]
        scores = key_scores(logs, call.key.shape[1], pool=self.pool, group=self.group)
        return recycled_mask(scores, steps, self.budget).repeat_interleave(call.groups, 1)
