"""What TAPPA's applications cost and save on this machine: reading a prompt, decoding behind it, layers left out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import headway
from benchmarks.harness import compare
from headway.door.blocks import without_attention, without_blocks
from headway.methods.long_context.tappa import TappaEviction

PROMPT, BUDGET, STEPS = 4096, 512, 32


def _host(tokens: int) -> tuple[Any, torch.Tensor]:
    from headway.hosts import default_text, tokenize

    model, tokenizer = headway.load("smollm2")
    return model, tokenize(tokenizer, default_text(), tokens)


@torch.no_grad()
def _read(model: Any, ids: torch.Tensor, *stages: Any) -> Any:
    with headway.use(model, *stages):
        return model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values


def tappa_prefill() -> None:
    """Reading 2,048 tokens with budgets of 512 shared out layer by layer, against dense reading: what the scores, the
    similarity and the evictions cost."""
    model, ids = _host(2048)
    for level in ("layer", "head"):
        policy = TappaEviction(budget=BUDGET, level=level)
        compare(
            f"tappa_prefill_{level}",
            lambda policy=policy: _read(model, ids, policy),
            lambda: _read(model, ids),
            labels=(f"TAPPA, a budget per {level}", "dense"),
            repeats=3,
            memory=True,
            settings={"model": "smollm2", "tokens": 2048, "budget": BUDGET, "level": level},
        )


def tappa_decode() -> None:
    """32 tokens behind a prompt of 4,096 with 512 kept per layer, against the whole cache; and the bytes of both."""
    model, ids = _host(PROMPT + STEPS)

    def steps(cache: Any, *stages: Any) -> Callable[[], None]:
        def run() -> None:
            with torch.no_grad(), headway.use(model, *stages):
                for at in range(PROMPT, PROMPT + STEPS):
                    model(input_ids=ids[:, at : at + 1], past_key_values=cache)

        return run

    dense = _read(model, ids[:, :PROMPT])
    for level in ("layer", "head"):
        policy = TappaEviction(budget=BUDGET, level=level)
        cache = _read(model, ids[:, :PROMPT], policy)
        per_token = 2 * 3 * 64 * 4 * 30
        compare(
            f"tappa_decode_{level}",
            steps(cache, policy),
            steps(dense),
            labels=(f"TAPPA, a budget per {level}", "dense"),
            repeats=3,
            settings={
                "model": "smollm2",
                "prompt": PROMPT,
                "steps": STEPS,
                "budget": BUDGET,
                "bytes": cache.stored_bytes(),
                "dense_bytes": dense.get_seq_length() * per_token,
            },
        )
        print(f"keys and values: {cache.stored_bytes() / 2**20:.1f} MB; dense {PROMPT * per_token / 2**20:.1f} MB")


def tappa_pruned() -> None:
    """A forward of 1,024 tokens with six of 30 blocks left out, and with the attention of six, against the whole."""
    model, ids = _host(1024)
    layers = [10, 12, 14, 16, 18, 20]

    def without(context: Any) -> Callable[[], None]:
        def run() -> None:
            with context(model, layers), torch.no_grad():
                model(input_ids=ids, use_cache=False, logits_to_keep=1)

        return run

    def whole() -> None:
        with torch.no_grad():
            model(input_ids=ids, use_cache=False, logits_to_keep=1)

    for name, context in (("blocks", without_blocks), ("attention", without_attention)):
        compare(
            f"tappa_without_{name}",
            without(context),
            whole,
            labels=(f"six {name} left out", "whole model"),
            repeats=5,
            settings={"model": "smollm2", "tokens": 1024, "layers": layers},
        )
