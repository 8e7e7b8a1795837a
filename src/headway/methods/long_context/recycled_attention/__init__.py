"""Recycled Attention: most decoding steps read only the keys that the last full step attended to most.

    full step      o = softmax(q·Kᵀ/√d) V over all t keys;  C = the K keys of largest score, per layer and KV head
    recycled step  the new token takes the place of the entry of lowest score in C;  o = the same over C alone
    full again     every S steps, or when the mean cosine of q with that of the last full step falls to a threshold

Nothing is evicted: every key stays, so **memory is not reduced** (t + K tokens instead of t). What is saved is reading:
t + (S − 1)·K keys in S steps instead of S·t. Prefill, and any forward of several tokens, is dense. C is a contiguous
copy; keys keep their true positions.

Paper: Recycled Attention: Efficient inference for long-context language models, arXiv 2411.05787; its later version is
called RefreshKV. No code of it could be read. The versions differ, and so do the options:

    later version (the defaults)  scores are max-pooled along the keys, the query heads of a KV head joined by their
                                  maximum, and the victim is the lowest score of the last full step
    first version                 `RecycledAttention(pool=1, victim="latest")`: weights as they are, and the victim is
                                  the lowest weight in C now

Neither says how wide the pool is (7 here), how the heads of one layer agree on a cosine (their mean here, on queries
as the host rotated them), or that tokens since the last full step, which have no score, must stay (they do). Each
layer and each sequence of a batch decides for itself; a batch in which only some sequences do a full step reads all
keys for it. The default budget and stride are those of the paper's language-model runs.

A full step makes its output and its scores from one product of the query with the keys. Assisted decoding is refused
once a text has more tokens than the budget (stride=1 excepted): it checks guesses in one forward of several tokens,
which is dense here, so that it would give neither the method's text nor dense attention's. Taking back single steps, or
a forward as a whole, works.
"""

from __future__ import annotations

import math

from torch import nn

from headway.card import Card
from headway.door.stages import Stage
from headway.methods.budget import check_share
from headway.methods.long_context.recycled_attention.policy import RecycledAttention, RecycledCache
from headway.methods.long_context.recycled_attention.selection import (
    full_steps,
    has_drifted,
    ideal_speedup,
    key_scores,
    query_similarity,
    recovered_mass,
    recycled_mask,
    top_keys,
)
from headway.methods.long_context.recycled_attention.training import RecycledTraining

CARD = Card(
    slug="recycled-attention",
    title="Recycled Attention: Efficient inference for long-context language models",
    year=2024,
    arxiv="2411.05787",
    family="long_context",
    stages=("CachePolicy", "Editor"),
    knobs={
        "budget": "keys that a recycled step reads",
        "stride": "every so many steps one reads all keys",
        "threshold": "cosine of queries at which a layer reads all keys",
        "check": "steps between two looks at the cosine",
        "pool": "neighbours that share a maximum before the choice",
        "group": "how the query heads of a KV head are joined",
        "victim": "whose score decides what a new token replaces",
        "full_step": "whether full steps read, choose, or both",
    },
    summary="Decodes most tokens over the few keys that the last full step attended to, and reads all keys only now "
    "and then; keeps every key.",
)

#: The stride that `at_budget` asks for where the share of keys allows it.
USUAL_STRIDE = 10


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """Recycling that reads about `share` of the keys of `tokens` tokens of context, full steps included; 1 is dense.

    At most half of what is read goes into full steps, where the context is long enough for that."""
    check_share(share, tokens)
    if share == 1:
        return (RecycledAttention(budget=max(tokens, 2), stride=1),)
    stride = max(USUAL_STRIDE, math.ceil(2 / share))
    budget = _budget(share, tokens, stride)
    if budget <= stride:
        # A short context: the pair that comes nearest.
        pairs = [(max(_budget(share, tokens, s), s + 1), s) for s in range(2, stride + 1)]
        budget, stride = min(pairs, key=lambda pair: abs(1 / ideal_speedup(tokens, *pair) - share))
    return (RecycledAttention(budget=budget, stride=stride),)


def _budget(share: float, tokens: int, stride: int) -> int:
    """K for which (t + (S − 1)·K) / (S·t) is `share`."""
    return round(tokens * (share * stride - 1) / (stride - 1))


__all__ = [
    "CARD",
    "RecycledAttention",
    "RecycledCache",
    "RecycledTraining",
    "at_budget",
    "full_steps",
    "has_drifted",
    "ideal_speedup",
    "key_scores",
    "query_similarity",
    "recovered_mass",
    "recycled_mask",
    "top_keys",
]
