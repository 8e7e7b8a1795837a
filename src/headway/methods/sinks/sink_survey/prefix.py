"""Prefix sinks: K vectors in front of every input that take the place of the first token as sink.

    [P; X] ,   P ∈ R^(K × width) trainable, its keys and values cached once for all requests

Survey: arXiv 2604.10098 (learnable sink and register tokens; a prefix of real tokens that makes what follows easier to
quantise, as CushionCache, arXiv 2406.12016, searches it). Losses that train a prefix are in `losses`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.methods.sinks.sink_survey.quantisation import quantise

INIT_STD = 0.02


class PrefixTokens(nn.Module):
    """K trainable input vectors: `prefix = PrefixTokens(4, model)`, `model(**prefix.inputs(model, ids))`.

    They start as noise around the mean embedding. Logits of the prefix come first: `output.logits[:, prefix.count:]`
    are those of the text."""

    def __init__(self, count: int, model: nn.Module, *, seed: int = 0) -> None:
        super().__init__()
        if count < 1:
            raise ArgumentError(f"count: got {count}, expected at least 1 vector.")
        table = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(count, table.shape[1], generator=generator).to(table)
        self.vectors = nn.Parameter(table.mean(0) + INIT_STD * noise)

    @property
    def count(self) -> int:
        return self.vectors.shape[0]

    def inputs(
        self, model: nn.Module, ids: Int[Tensor, "batch tokens"], attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The keyword inputs of a forward over [P; X]. Padding stays between prefix and text and is masked."""
        embedded = model.get_input_embeddings()(ids)  # type: ignore[operator]
        front = self.vectors.to(embedded).expand(ids.shape[0], -1, -1)
        mask = torch.ones_like(ids) if attention_mask is None else attention_mask.long()
        mask = torch.nn.functional.pad(mask, (self.count, 0), value=1)
        places = (mask.cumsum(1) - 1).clamp(min=0)
        return {"inputs_embeds": torch.cat([front, embedded], 1), "attention_mask": mask, "position_ids": places}

    @torch.no_grad()
    def cache(self, model: nn.Module, batch: int = 1) -> Any:
        """The keys and values of the prefix as a cache for `batch` requests; pass a copy of it to each
        (`copy.deepcopy`), with positions and mask that count the prefix."""
        front = self.vectors[None]
        found = model(inputs_embeds=front, use_cache=True).past_key_values
        if batch > 1:
            found.batch_repeat_interleave(batch)
        return copy.deepcopy(found)


def prefix_search(
    candidates: Sequence[int],
    loss: Callable[[tuple[int, ...]], float],
    *,
    longest: int = 4,
    least_gain: float = 0.0,
) -> tuple[tuple[int, ...], list[float]]:
    """Real tokens for a prefix, one after another: each time the candidate that makes `loss(prefix)` least, while that
    falls by more than `least_gain` (a share). The prefix, and the loss before it and after each token."""
    if not candidates or longest < 1:
        raise ArgumentError(f"candidates, longest: got {len(candidates)}, {longest}; expected at least 1 of each.")
    chosen: tuple[int, ...] = ()
    path = [float(loss(chosen))]
    while len(chosen) < longest:
        tried = {token: float(loss((*chosen, token))) for token in dict.fromkeys(candidates)}
        best = min(tried, key=tried.__getitem__)
        if not tried[best] < path[-1] * (1 - least_gain):
            break
        chosen, path = (*chosen, best), [*path, tried[best]]
    return chosen, path


@torch.no_grad()
def activation_error(
    model: nn.Module, ids: Int[Tensor, "batch tokens"], prefix: Sequence[int] = (), *, bits: int = 8
) -> float:
    """What a prefix is searched for: the mean over blocks of ‖h − ĥ‖ / ‖h‖ of the text's hidden states under absmax
    quantisation with one scale per tensor. The prefix is read, and is not quantised."""
    front = torch.tensor(list(prefix), dtype=torch.long, device=ids.device).expand(ids.shape[0], -1)
    states = model(input_ids=torch.cat([front, ids], 1), output_hidden_states=True, use_cache=False).hidden_states[1:-1]
    errors = []
    for h in states:
        text: Float[Tensor, "batch tokens width"] = h[:, len(prefix) :].float()
        errors.append(float((text - quantise(text, bits=bits)).norm() / text.norm()))
    return sum(errors) / len(errors)
