"""StreamingLLM: endless text at constant memory, with attention sinks and a window.

The keys and values of the first S tokens stay for ever beside those of the last W; positions are those in the cache,
not in the text. With C = S + W, a query at text position t stands at cache position min(t, C), so that

    q_t · k_j   is taken at distance  t − j          for window keys,  S ≤ j,  t − j ≤ W
                     and at distance  min(t, C) − j  for sinks,        j < S

Paper: Efficient Streaming Language Models with Attention Sinks, arXiv 2309.17453. What is evicted is gone: this bounds
memory, it does not lengthen the context.

Keys are stored as the host rotated them, at their places in the text; window distances are then true without any work.
Only the few sinks are placed anew at each step (equally: the query is turned back for them). The released code keeps
keys before rotation and turns the whole cache at every step, which gives the same logits. It evicts after a step, so
that a step sees up to C + 1 entries (`evict="after"`, the default); `evict="before"` holds every step to C entries.
`positions="text"` leaves sinks at their true distances, which is the mask of LM-Infinite without its distance ceiling.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from headway.card import Card
from headway.door.policy_hosts import text_config
from headway.door.stages import Stage
from headway.errors import ArgumentError
from headway.methods.sinks.streaming_llm.perplexity import streaming_perplexity
from headway.methods.sinks.streaming_llm.policy import StreamingCache, StreamingLLM
from headway.methods.sinks.streaming_llm.sink_token import (
    ZeroSink,
    add_sink_token,
    sink_token_of,
    with_sink,
)

CARD = Card(
    slug="streaming-llm",
    title="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    arxiv="2309.17453",
    family="sinks",
    stages=("CachePolicy", "Editor"),
    needs=("rotary positions",),
    knobs={
        "sinks": "first tokens that stay",
        "window": "last tokens that stay",
        "positions": "cache (the paper) or text",
        "evict": "after a step (released code) or before it",
        "rebase_at": "position at which stored keys are turned back",
    },
    summary="Keeps the first tokens and a window of the last ones, so that generation runs on without end at constant "
    "memory.",
)

#: Sinks that suffice for models trained without a token for it (the paper's default).
USUAL_SINKS = 4


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """Sinks and a window that together hold about `share` of `tokens` tokens. At 1 the window is as long as the host
    has positions, and nothing is ever evicted in them."""
    if not 0 < share <= 1 or tokens < 1:
        raise ArgumentError(f"share, tokens: got {share}, {tokens}; expected a share in (0, 1] and at least 1 token.")
    if share == 1:
        positions: Any = getattr(text_config(model), "max_position_embeddings", None)
        return (StreamingLLM(sinks=0, window=max(tokens, positions if isinstance(positions, int) else 2 * tokens)),)
    capacity = max(round(share * tokens), 1)
    sinks = min(USUAL_SINKS, capacity - 1)
    return (StreamingLLM(sinks=sinks, window=capacity - sinks),)


__all__ = [
    "CARD",
    "StreamingCache",
    "StreamingLLM",
    "ZeroSink",
    "add_sink_token",
    "at_budget",
    "sink_token_of",
    "streaming_perplexity",
    "with_sink",
]
