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

from headway.card import Card
from headway.methods.sinks.streaming_llm.perplexity import recompute_perplexity, streaming_perplexity
from headway.methods.sinks.streaming_llm.policy import StreamingCache, StreamingLLM
from headway.methods.sinks.streaming_llm.sink_token import add_sink_token, sink_token_parameter, with_sink

CARD = Card(
    slug="streaming-llm",
    title="Efficient Streaming Language Models with Attention Sinks",
    year=2023,
    arxiv="2309.17453",
    family="sinks",
    stages=("CachePolicy",),
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

__all__ = [
    "CARD",
    "StreamingCache",
    "StreamingLLM",
    "add_sink_token",
    "recompute_perplexity",
    "sink_token_parameter",
    "streaming_perplexity",
    "with_sink",
]
