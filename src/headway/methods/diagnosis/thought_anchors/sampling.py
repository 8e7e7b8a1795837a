"""A sampler over a local model.

All rollouts of a prefix have the same length, so a batch needs no padding (right padding puts made-up tokens between a
prompt and its continuation). Each draws from its own generator, by the inverse of its cumulative distribution: a
rollout depends on its seed and not on what else is in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError
from headway.hosts import positions_of
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis.thought_anchors.sentences import Prefix, encode

#: Sampling of the paper. Its limit of 16,384 tokens is for reasoning models on a GPU.
TEMPERATURE, TOP_P, MAX_TOKENS = 0.6, 0.95, 16384


@dataclass(eq=False)
class LocalSampler:
    """Continues prefixes with a transformers model: `LocalSampler(model, tokenizer, max_tokens=200)`.

    temperature, top_p: of nucleus sampling. stop: token ids that end a rollout, by default the model's own. A rollout
    ends where the model has no position left. Raises ArgumentError for a temperature of 0, at which all rollouts are
    one, and for a prefix that fills all positions."""

    model: nn.Module
    tokenizer: Any
    temperature: float = TEMPERATURE
    top_p: float = TOP_P
    max_tokens: int = MAX_TOKENS
    stop: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ArgumentError(
                f"temperature: got {self.temperature}, expected a number above 0: at 0 all rollouts are the same, and "
                "no answer distribution can change. The paper samples at 0.6."
            )
        if not 0 < self.top_p <= 1 or self.max_tokens < 1:
            raise ArgumentError(
                f"top_p, max_tokens: got {self.top_p} and {self.max_tokens}, expected a share in (0, 1] and at least 1."
            )
        if self.stop is None:
            configured = getattr(getattr(self.model, "generation_config", None), "eos_token_id", None)
            own = configured if configured is not None else getattr(self.tokenizer, "eos_token_id", None)
            self.stop = () if own is None else tuple(own) if isinstance(own, list | tuple) else (own,)

    @property
    def settings(self) -> dict[str, Any]:
        """What a cache of rollouts must know: everything that changes them."""
        return {
            "model": getattr(self.model, "name_or_path", "") or type(self.model).__name__,
            "weights": list(fingerprint(self.model).weights),
            "dtype": str(next(self.model.parameters()).dtype),
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_tokens": self.max_tokens,
            "stop": list(self.stop or ()),
        }

    def __call__(self, prefix: Prefix, seeds: Sequence[int]) -> list[str]:
        ids = list(prefix.ids) or encode(self.tokenizer, prefix.text)[0]
        if not ids:
            raise ArgumentError("prefix: got no tokens, expected a prompt before the first sentence. Give one.")
        # The last token drawn is never read, so it needs no position.
        room = positions_of(self.model)
        limit = self.max_tokens if room is None else min(self.max_tokens, room - len(ids) + 1)
        if limit < 1:
            raise ArgumentError(
                f"prefix: got {len(ids):,} tokens, and the model has {room:,} positions, expected room for one more. "
                "Cut the trace."
            )
        generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        rows = self._continue(torch.tensor([ids], dtype=torch.long, device=self._device()), generators, limit)
        return [self.tokenizer.decode(row, skip_special_tokens=True) for row in rows]

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @torch.no_grad()
    def _continue(
        self, ids: Int[Tensor, "1 tokens"], generators: Sequence[torch.Generator], limit: int
    ) -> list[list[int]]:
        rows: list[list[int]] = [[] for _ in generators]
        going = list(range(len(generators)))
        with evaluating(self.model):
            output = self.model(input_ids=ids, use_cache=True)
            cache = output.past_key_values
            cache.batch_repeat_interleave(len(generators))
            logits = output.logits[:, -1].expand(len(generators), -1)
            for _ in range(limit):
                chosen = draw(logits, [generators[i] for i in going], temperature=self.temperature, top_p=self.top_p)
                for i, token in zip(going, chosen.tolist(), strict=True):
                    rows[i].append(token)
                kept = [at for at, token in enumerate(chosen.tolist()) if token not in set(self.stop or ())]
                if not kept:
                    break
                if len(kept) < len(going):
                    going = [going[at] for at in kept]
                    cache.batch_select_indices(torch.tensor(kept, device=ids.device))
                    chosen = chosen[kept]
                if len(rows[going[0]]) < limit:
                    output = self.model(input_ids=chosen[:, None], past_key_values=cache, use_cache=True)
                    logits = output.logits[:, -1]
        return rows


def draw(
    logits: Float[Tensor, "rows words"],
    generators: Sequence[torch.Generator],
    *,
    temperature: float = TEMPERATURE,
    top_p: float = TOP_P,
) -> Int[Tensor, " rows"]:
    """One token for each row from the smallest set of words that holds `top_p` of its mass."""
    shares, order = torch.softmax(logits.float() / temperature, -1).sort(-1, descending=True)
    before = shares.cumsum(-1) - shares
    nucleus = torch.where(before < top_p, shares, 0.0)
    total = nucleus.double().cumsum(-1)
    uniform = torch.stack([torch.rand((), generator=g, dtype=torch.float64) for g in generators]).to(logits.device)
    place = torch.searchsorted(total, (uniform * total[:, -1])[:, None], right=True)[:, 0]
    last = (nucleus > 0).sum(-1) - 1
    return order.gather(1, torch.minimum(place, last)[:, None])[:, 0]
