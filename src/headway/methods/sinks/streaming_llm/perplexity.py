"""Perplexity of a stream, whatever its length, under the policy of StreamingLLM."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from headway.door.attach import use
from headway.methods.sinks.streaming_llm.policy import StreamingLLM
from headway.tasks.perplexity import Perplexity, perplexity


def streaming_perplexity(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], *, chunk: int = 256, skip: int = 0, tokenizer: Any = None,
    **options: Any,
) -> Perplexity:  # fmt: skip
    """Perplexity of a text of any length under `StreamingLLM(**options)`; memory does not grow with the text.

    Chunks are exact: every chunk size gives what token by token gives."""
    with use(model, StreamingLLM(**options)):
        return perplexity(model, ids, chunk=chunk, skip=skip, tokenizer=tokenizer)
