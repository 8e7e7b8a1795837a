"""DuoAttention: retrieval heads keep every key, streaming heads keep sinks and recent tokens.

    out_h = softmax over all keys                             α_h among the highest gates      (retrieval head)
          = softmax over the first S and the last R keys      otherwise                        (streaming head)
    stored share at t tokens = r + (1 − r)(S + R)/t ,   r the share of retrieval heads

The decision is one per KV head, so the query heads of a group share it. Gates come from `learn_gates` (distillation on
generated pass-keys), from `score_heads` (no training) or from a file.

Paper: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, arXiv 2410.10819.

Where paper and released code differ: in training the code mixes the teacher's full attention in (`teacher_full=True`,
the default), the paper's equation the student's own (`False`); the code supervises questions and answers
(`supervise="suffix"`, the default), the paper speaks of answers ("answers"). In serving the code leaves the first
chunk of a prompt dense (`prefill="dense"`); the default here is the paper's streaming prefill, exact for every split.
The code breaks ties of gates by noise, here they go by layer and head. Its training mask counts the token itself among
the R recent ones (i − j < R), its cache keeps R beside it (i − j ≤ R); both are kept.

Differences to StreamingLLM: keys stay at their true positions, and only some heads forget.
"""

from __future__ import annotations

import torch
from torch import nn

from headway.card import Card
from headway.door.policy_hosts import text_config
from headway.door.rotary import host_frequencies
from headway.door.stages import Stage
from headway.errors import ArgumentError
from headway.methods.long_context.duo_attention.gates import (
    Gates,
    kv_geometry,
    retrieval_count,
    select_heads,
    top_heads,
)
from headway.methods.long_context.duo_attention.learning import GateMix, Learned, learn_gates, mixed_loss, rate_factor
from headway.methods.long_context.duo_attention.passkeys import GateSample, PasskeyData
from headway.methods.long_context.duo_attention.policy import DuoAttention, DuoCache
from headway.methods.long_context.duo_attention.reorder import reordered_heads
from headway.methods.long_context.duo_attention.scores import rope_profile, score_heads
from headway.methods.long_context.duo_attention.store import DuoLayer, SinkRing

CARD = Card(
    slug="duo-attention",
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    year=2024,
    arxiv="2410.10819",
    family="long_context",
    stages=("CachePolicy",),
    needs=("gates of the model: learned, scored or loaded",),
    knobs={
        "gates": "one number per KV head, high for retrieval",
        "sparsity": "share of streaming heads (or threshold on the gates)",
        "sinks": "first tokens a streaming head keeps",
        "recent": "last tokens a streaming head keeps",
        "prefill": "streaming (exact in chunks) or dense (released code; goes with a selector of prefill)",
        "reserve": "tokens for which room is made at once",
    },
    summary="Learns which heads retrieve from far back; only they keep all keys, the others keep sinks and recent "
    "tokens.",
)

#: What streaming heads keep in the paper's deployment.
SINKS, RECENT = 64, 256
#: Share of the budget that streaming heads may take, so that some is left for retrieval heads.
STREAM_SHARE = 0.5
#: Tokens and number of the random texts on which `at_budget` scores heads.
PROBE_TOKENS, PROBE_TEXTS = 256, 4


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """DuoAttention that stores about `share` of the keys of a `tokens`-long context; 1 is dense.

    r + (1 − r)(S + R)/t = share is solved for r, the share of retrieval heads; S + R shrink for short contexts so that
    they take half of the budget at most. Heads are ranked by the rope profile on random tokens (by distant mass where a
    host has no RoPE); for better heads pass `DuoAttention(gates=…)` learned or scored on text."""
    if not 0 < share <= 1:
        raise ArgumentError(f"share: got {share}, expected a share of the keys in (0, 1]; 1 is dense.")
    if tokens < 1:
        raise ArgumentError(f"tokens: got {tokens}, expected at least 1.")
    shape = kv_geometry(model)
    if share == 1:
        return (DuoAttention(gates=torch.ones(shape), sparsity=0.0),)
    sinks, recent, count = budget_split(share, tokens=tokens, heads=shape[0] * shape[1])
    kept = top_heads(_probe_scores(model, sinks, recent).values, count)
    gates = Gates.of(model, kept.float(), how="budget", share=share, tokens=tokens)
    return (DuoAttention(gates=gates, threshold=0.5, sinks=sinks, recent=recent),)


def budget_split(share: float, *, tokens: int, heads: int) -> tuple[int, int, int]:
    """Sinks and recent tokens of streaming heads, and how many of all KV heads keep everything, for a share below 1."""
    room = min(SINKS + RECENT, max(int(STREAM_SHARE * share * tokens), 2))
    sinks = room * SINKS // (SINKS + RECENT)
    near = min(room / tokens, 1.0)
    whole = max(int((share - near) / (1 - near) * heads), 0) if near < 1 else 0
    return sinks, room - sinks, whole


def _probe_scores(model: nn.Module, sinks: int, recent: int) -> Gates:
    """Scores on random tokens: there is no tokenizer at hand."""
    config = text_config(model)
    generator = torch.Generator().manual_seed(0)
    length = min(PROBE_TOKENS, getattr(config, "max_position_embeddings", None) or PROBE_TOKENS)
    low = min(8, config.vocab_size - 1)
    texts = [torch.randint(low, config.vocab_size, (1, length), generator=generator) for _ in range(PROBE_TEXTS)]
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    layer = next((i for i, kind in enumerate(kinds) if kind == "full_attention"), 0)
    if host_frequencies(model, layer)[0] is not None:
        return score_heads(model, texts, scoring="rope_profile")
    near = min(sinks + recent, length // 2)
    return score_heads(model, texts, scoring="distant_mass", sinks=near // 5, recent=near - near // 5)


__all__ = [
    "CARD",
    "DuoAttention",
    "DuoCache",
    "DuoLayer",
    "GateMix",
    "GateSample",
    "Gates",
    "Learned",
    "PasskeyData",
    "SinkRing",
    "at_budget",
    "budget_split",
    "learn_gates",
    "mixed_loss",
    "rate_factor",
    "reordered_heads",
    "retrieval_count",
    "rope_profile",
    "score_heads",
    "select_heads",
]
