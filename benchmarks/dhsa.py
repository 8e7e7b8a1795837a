"""What DHSA costs beside dense attention: prefill of a model, one decoding step, the choice alone, and memory.

The paper's memory gain is against eager attention, which holds the map of all pairs; the fused kernel holds none. Both
stand here as baselines.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

import headway
from benchmarks.harness import compare
from headway.door.call import AttentionCall, Forward
from headway.door.execute import execute
from headway.kernels.dense import dense_attention
from headway.methods.long_context.dhsa import DHSA, BoundaryPredictor, Predicted, Similarity

HEADS, KV_HEADS, DIM = 9, 3, 64
#: Budget of the paper's needle tests; the suffix is left out, so that every row reads as many keys.
STAGE: dict[str, Any] = {"budget": 1024, "suffix": 0, "approximates": False}


def tensors(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, n, tokens, DIM, generator=generator) for n in (HEADS, KV_HEADS, KV_HEADS))  # type: ignore[return-value]


def one_call(tokens: int, stage: DHSA) -> Callable[[], None]:
    query, key, value = tensors(tokens)

    def run() -> None:
        with torch.no_grad():
            call = AttentionCall.from_tensors(query, key, value, causal=True, forward=Forward())
            execute(call, [stage], [])

    return run


def dhsa_call_8192() -> None:
    """One layer at 8,192 tokens, boundaries by similarity included, against fused dense attention."""
    query, key, value = tensors(8192)

    def dense() -> None:
        scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    compare(
        "dhsa_call_8192",
        one_call(8192, DHSA(**STAGE)),
        dense,
        labels=("DHSA, budget 1024", "fused dense"),
        settings={"tokens": 8192, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM},
        memory=True,
    )


def dhsa_memory_8192() -> None:
    """Peak memory of one layer at 8,192 tokens against eager attention, which holds the map of all pairs."""
    query, key, value = tensors(8192)

    def eager() -> None:
        dense_attention(query, key, value, causal=True, mode="reference")

    compare(
        "dhsa_memory_8192",
        one_call(8192, DHSA(**STAGE)),
        eager,
        labels=("DHSA, budget 1024", "eager dense"),
        repeats=2,
        settings={"tokens": 8192, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM},
        memory=True,
    )


def dhsa_predictor_8192() -> None:
    """Finding the boundaries of 8,192 tokens: the predictor's network against key similarity."""
    call = AttentionCall.from_tensors(*tensors(8192), causal=True)
    from headway.methods.long_context.dhsa import Piece

    piece = Piece(call.key, torch.ones(1, 8192, dtype=torch.bool), call)
    predicted = Predicted(predictor=BoundaryPredictor(KV_HEADS * DIM).eval(), threshold=-torch.inf)
    compare(
        "dhsa_predictor_8192",
        lambda: predicted.starts(piece),
        lambda: Similarity().starts(piece),
        labels=("predictor", "similarity"),
        repeats=3,
        settings={"tokens": 8192, "width": KV_HEADS * DIM},
    )


def dhsa_prefill_4096() -> None:
    """Prefill of SmolLM2 at 4,096 tokens and a quarter of the causal triangle, against the host's own kernel."""
    from headway.hosts import default_text, tokenize
    from headway.methods.long_context.dhsa import at_budget

    model, tokenizer = headway.load("smollm2")
    ids = tokenize(tokenizer, default_text(), 4096)

    def plain() -> None:
        with torch.no_grad():
            model(ids, use_cache=False, logits_to_keep=1)

    stages = at_budget(0.25, tokens=4096, model=model)

    def sparse() -> None:
        with headway.use(model, *stages):
            plain()

    compare(
        "dhsa_prefill_4096",
        sparse,
        plain,
        labels=("DHSA, a quarter of the pairs", "dense"),
        repeats=3,
        settings={"model": "smollm2", "tokens": 4096, "share": 0.25},
    )


def dhsa_decode_8192() -> None:
    """One decoding step of one layer at 8,192 stored keys, in the middle of a generation: choosing and reading 1,024
    against reading all."""
    query, key, value = tensors(8193)
    stage, forward = DHSA(**STAGE), Forward()
    whole = AttentionCall.from_tensors(query, key, value, causal=True, forward=forward)

    def upto(stop: int, rows: int) -> AttentionCall:
        parts = query[:, :, stop - rows : stop], key[:, :, :stop], value[:, :, :stop]
        return whole.replace(query=parts[0], key=parts[1], value=parts[2], causal=rows > 1)

    with torch.no_grad():
        stage.select(upto(8191, 8191))
        stage.select(upto(8192, 1))
    known = {owner: dict(state) for owner, state in forward.scratch.items() if isinstance(owner, tuple)}
    step = upto(8193, 1)

    def sparse() -> None:
        fresh = Forward()
        fresh.scratch.update({owner: dict(state) for owner, state in known.items() if owner[0] == "remembered"})
        with torch.no_grad():
            execute(step.replace(forward=fresh), [stage], [])

    def dense() -> None:
        scaled_dot_product_attention(step.query, key, value, enable_gqa=True)

    compare(
        "dhsa_decode_8192",
        sparse,
        dense,
        labels=("DHSA, budget 1024", "fused dense"),
        repeats=15,
        settings={"tokens": 8192, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM},
    )
