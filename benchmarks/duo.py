"""What DuoAttention costs and saves beside a cache that keeps everything: a decoding step, a prefill, the memory.

The bar of the paper is a step whose time grows with the context r times as fast, r the share of retrieval heads. Step
benchmarks fill caches with random keys, for a context of 32,768 tokens is not read in reasonable time on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import headway
from benchmarks.harness import compare
from headway.evidence.recipes._duo_decode import DIM, HEADS, KV_HEADS, LAYERS, decoder, fill, policy, run_steps
from headway.methods.long_context.duo_attention import DuoAttention

#: Decoding steps of one repeat.
STEPS = 8


def step(model: Any, method: DuoAttention, tokens: int) -> tuple[Callable[[], Any], Any]:
    """Decoding steps behind `tokens` random tokens, and their cache; to be called inside a scope of the method."""
    cache = method.make_cache(model)
    fill(cache, tokens, torch.Generator().manual_seed(0))
    return lambda: run_steps(model, cache, STEPS), cache


def duo_decode() -> None:
    """Eight decoding steps at 4,096 to 32,768 tokens with a quarter and a half of the KV heads whole, against all of
    them whole in the same kind of cache. The stored share stands in the settings."""
    for tokens in (4_096, 16_384, 32_768):
        for share in (0.25, 0.5):
            few_host, all_host = decoder(), decoder()
            few, everything = policy(share, tokens), policy(1.0, tokens)
            with headway.use(few_host, few), headway.use(all_host, everything):
                (method, held), (baseline, whole) = (
                    step(few_host, few, tokens), step(all_host, everything, tokens)
                )  # fmt: skip
                stored = held.stored_bytes() / whole.stored_bytes()
                compare(
                    f"duo_decode_{round(share * 100)}_{tokens}",
                    method,
                    baseline,
                    labels=(f"{round(share * 100)} % retrieval heads", "all heads whole"),
                    repeats=11,
                    warmup=2,
                    settings={"tokens": tokens, "share": share, "stored": stored, "layers": LAYERS, "heads": HEADS,
                              "kv_heads": KV_HEADS, "dim": DIM, "steps": STEPS},
                )  # fmt: skip


def duo_prefill() -> None:
    """Prefill of 8,192 tokens in chunks of 2,048, half of the KV heads whole, against the host alone."""
    tokens, chunk = 8_192, 2_048
    host, model = decoder(), decoder()
    ids = torch.randint(8, 500, (1, tokens), generator=torch.Generator().manual_seed(0))

    def read(of: Any) -> Callable[[], None]:
        def run() -> None:
            cache = None
            with torch.no_grad():
                for piece in ids.split(chunk, 1):
                    cache = of(input_ids=piece, past_key_values=cache, use_cache=True).past_key_values

        return run

    with headway.use(model, policy(0.5, tokens)):
        compare(
            "duo_prefill_8192",
            read(model),
            read(host),
            labels=("50 % retrieval heads", "host"),
            repeats=5,
            memory=True,
            settings={"tokens": tokens, "chunk": chunk, "share": 0.5, "layers": LAYERS, "heads": HEADS},
        )


def duo_reordered() -> None:
    """Eight decoding steps at 8,192 tokens with scattered retrieval heads, heads reordered, against indexed heads."""
    from headway.methods.long_context.duo_attention import reordered_heads

    tokens = 8_192
    scattered = (torch.arange(KV_HEADS) % 2 == 0).expand(LAYERS, -1)
    mixed_host, sorted_host = decoder(), decoder()
    mixed = DuoAttention(gates=scattered.float(), threshold=0.5, reserve=tokens + 4096)
    with reordered_heads(sorted_host, scattered) as order:
        ordered = DuoAttention(gates=order.float(), threshold=0.5, reserve=tokens + 4096)
        with headway.use(mixed_host, mixed), headway.use(sorted_host, ordered):
            compare(
                "duo_reordered_8192",
                step(sorted_host, ordered, tokens)[0],
                step(mixed_host, mixed, tokens)[0],
                labels=("reordered heads", "indexed heads"),
                repeats=11,
                warmup=2,
                settings={"tokens": tokens, "share": 0.5, "steps": STEPS},
            )
