"""A model with a known answer: it repeats what followed the last earlier place of its most recent tokens.

Its cache may keep only the last tokens of the past, as a window does, so that what is lost is known too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 259
#: Logit of the predicted token above all others.
SURE = 30.0


class TokenCache:
    """Past tokens; after every forward only the last `keep` are left."""

    is_croppable = True

    def __init__(self, keep: int | None = None) -> None:
        self.keep = keep
        self.tokens = torch.empty(0, dtype=torch.long)

    def stored_bytes(self) -> int:
        return self.tokens.numel() * 8

    def crop(self, tokens_to_remove: int) -> None:
        self.tokens = self.tokens[:tokens_to_remove] if tokens_to_remove else self.tokens


class Recaller(nn.Module):
    """Induction over `match` tokens. `lengths` are the tokens of each forward that was run."""

    def __init__(self, match: int = 10, keep: int | None = None, end: int | None = None) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.match, self.keep = match, keep
        self.config = SimpleNamespace(eos_token_id=end)
        self.lengths: list[int] = []
        self.kept_logits: list[int] = []

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        use_cache: bool = True,
        logits_to_keep: int = 0,
    ) -> Any:
        cache = TokenCache(self.keep) if past_key_values is None else past_key_values
        past = cache.tokens
        everything = torch.cat([past, input_ids[0]])
        rows = range(len(everything) - input_ids.shape[1], len(everything))
        rows = list(rows)[-logits_to_keep:] if logits_to_keep else rows
        logits = torch.stack([self._predict(everything[: row + 1].tolist()) for row in rows])[None]
        cache.tokens = everything if cache.keep is None else everything[-cache.keep :]
        self.lengths.append(input_ids.shape[1])
        self.kept_logits.append(logits.shape[1])
        return SimpleNamespace(logits=logits, past_key_values=cache)

    def _predict(self, tokens: list[int]) -> Tensor:
        logits = torch.zeros(VOCABULARY)
        recent = tokens[-self.match :]
        for place in range(len(tokens) - 1, self.match - 1, -1):
            if tokens[place - self.match : place] == recent:
                logits[tokens[place]] = SURE
                return logits
        return logits
