"""Perplexity of a stream, and of the baseline that computes the window anew for every token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.attach import use
from headway.errors import ArgumentError
from headway.methods.sinks.streaming_llm.policy import StreamingLLM
from headway.tasks.perplexity import Perplexity, negative_log_likelihood, perplexity


def streaming_perplexity(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], *, chunk: int = 256, skip: int = 0, tokenizer: Any = None,
    **options: Any,
) -> Perplexity:  # fmt: skip
    """Perplexity of a text of any length under `StreamingLLM(**options)`; memory does not grow with the text.

    Chunks are exact: every chunk size gives what token by token gives."""
    with use(model, StreamingLLM(**options)):
        return perplexity(model, ids, chunk=chunk, skip=skip, tokenizer=tokenizer)


@torch.no_grad()
def recompute_perplexity(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], places: Iterable[int], *, length: int, batch: int = 4
) -> Float[Tensor, " places"]:
    """−ln p of the tokens at `places`, each given the `length` tokens before it, read afresh: the sliding window with
    recomputation, O(length²) per token. Raises ArgumentError for a place that has no `length` tokens before it."""
    chosen = list(places)
    if length < 1 or not chosen or min(chosen) < length or max(chosen) >= ids.shape[1]:
        raise ArgumentError(
            f"places: got {chosen[:3]}… for windows of {length} in {ids.shape[1]} tokens, expected positions from "
            f"{length} to {ids.shape[1] - 1}."
        )
    found = []
    for start in range(0, len(chosen), batch):
        some: Sequence[int] = chosen[start : start + batch]
        windows = torch.stack([ids[0, place - length : place] for place in some])
        logits = model(input_ids=windows, use_cache=False, logits_to_keep=1).logits[:, -1]
        found.append(negative_log_likelihood(logits, ids[0, some]))
    return torch.cat(found)
