"""What sparse prefill costs on this machine, beside dense attention: FlexPrefill on queries and keys of SmolLM2, a
whole prefill of the model, and PowerAttention by length.

Selection and execution are timed apart, since a method that selects well can still lose its time in selecting. Every
result is stored with the density that was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

import headway
from benchmarks.harness import compare
from headway.door import AttentionCall, Observer
from headway.door.selection import BlockMask
from headway.kernels.block_sparse import block_sparse_attention
from headway.methods.long_context.flexprefill import FlexPrefill
from headway.methods.long_context.power_attention import power_mask

LENGTHS = (4096, 8192)
#: Of 30: an early layer that reads much, a middle one and the last.
LAYERS = (6, 15, 29)
GAMMA, BLOCK = 0.9, 128


def recorded(tokens: int, layers: tuple[int, ...] = LAYERS) -> list[AttentionCall]:
    """Calls of some layers of SmolLM2 on real text, with all that a selector may ask of them."""
    from headway.hosts import default_text, tokenize

    model, tokenizer = headway.load("smollm2")
    ids = tokenize(tokenizer, default_text(), tokens)
    watch = _Recorder(layers)
    with headway.observe(model, watch), torch.no_grad():
        model(ids, use_cache=False, logits_to_keep=1)
    return watch.result()


class _Recorder(Observer):
    def __init__(self, layers: tuple[int, ...]) -> None:
        self.layers = layers
        self.start()

    def start(self) -> None:
        self.calls: list[AttentionCall] = []

    def acts_at(self, site: Any) -> bool:
        return site.layer in self.layers

    def observe(self, call: AttentionCall, output: Any, lse: Any = None) -> None:
        tensors = (getattr(call, name).clone() for name in ("query", "key", "value"))
        self.calls.append(AttentionCall.from_tensors(*tensors, layer=call.site.layer, causal=True, scale=call.scale))

    def result(self) -> list[AttentionCall]:
        return self.calls


def dense(call: AttentionCall) -> Callable[[], Any]:
    return lambda: scaled_dot_product_attention(
        call.query, call.key, call.value, is_causal=True, scale=call.scale, enable_gqa=call.groups > 1
    )


def sparse(call: AttentionCall, mask: BlockMask) -> Callable[[], Any]:
    return lambda: block_sparse_attention(
        call.query,
        call.key,
        call.value,
        mask.blocks,
        query_block=mask.query_block,
        key_block=mask.key_block,
        causal=True,
        scale=call.scale,
    )


def sides(call: AttentionCall, method: FlexPrefill) -> dict[str, Callable[[], Any]]:
    """Selecting, executing what was selected, and both."""
    mask = method.blocks_of(call).mask
    return {
        "select": lambda: method.blocks_of(call),
        "execute": sparse(call, mask),
        "both": lambda: sparse(call, method.blocks_of(call).mask)(),
    }


def flexprefill_parts() -> None:
    """FlexPrefill at γ = 0.9 on recorded q and k of SmolLM2, 4,096 and 8,192 tokens: selecting, executing, and both,
    each against dense causal SDPA. The bar: at 8,192 selecting costs less than 15 % of dense."""
    method = FlexPrefill(gamma=GAMMA, block=BLOCK, approximates=False)
    for tokens in LENGTHS:
        for call in recorded(tokens):
            mask = method.blocks_of(call).mask
            settings = {
                "model": "smollm2", "tokens": tokens, "layer": call.site.layer, "gamma": GAMMA, "block": BLOCK,
                "density": mask.density(),
            }  # fmt: skip
            for part, run in sides(call, method).items():
                found = compare(
                    f"flexprefill_{part}_{tokens}_layer{call.site.layer}",
                    run,
                    dense(call),
                    labels=(f"FlexPrefill, {part}", "dense causal SDPA"),
                    repeats=7,
                    settings=settings,
                )
                print(f"density {settings['density']:.3f}, {part}: {found.ratio.value:.2f} × dense")


def flexprefill_low_density() -> None:
    """8,192 tokens, 4 heads of 64, density at most 0.25; selecting, executing, and both."""
    method = FlexPrefill(density=0.25, block=BLOCK, min_budget=None, approximates=False)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 4, 8192, 64, generator=generator) for _ in range(3))
    call = AttentionCall.from_tensors(query, key, value, causal=True)
    mask = method.blocks_of(call).mask
    for part, run in sides(call, method).items():
        compare(
            f"flexprefill_quarter_{part}",
            run,
            dense(call),
            labels=(f"FlexPrefill, {part}", "dense causal SDPA"),
            repeats=11,
            warmup=2,
            settings={"tokens": 8192, "heads": 4, "dim": 64, "block": BLOCK, "density": mask.density()},
        )


def flexprefill_model() -> None:
    """A whole prefill of SmolLM2 under FlexPrefill at γ = 0.9 against the plain model, 4,096 and 8,192 tokens; and the
    seconds of one prefill that went into selecting and executing."""
    from headway.hosts import default_text, tokenize

    model, tokenizer = headway.load("smollm2")
    for tokens in LENGTHS:
        ids = tokenize(tokenizer, default_text(), tokens)
        method = FlexPrefill(gamma=GAMMA, block=BLOCK)

        def plain(ids: torch.Tensor = ids) -> None:
            with torch.no_grad():
                model(ids, use_cache=False, logits_to_keep=1)

        def under(method: FlexPrefill = method, plain: Callable[[], None] = plain) -> None:
            with headway.use(model, method, selftest=False):
                plain()

        with headway.use(model, method, selftest=False) as handle:
            start = time.perf_counter()
            plain()
            whole = time.perf_counter() - start
        rows = handle.report()
        settings = {
            "model": "smollm2", "tokens": tokens, "gamma": GAMMA, "block": BLOCK,
            "density": float(np.mean([row["density"] for row in rows])),
            "sparse_sites": sum("blocks" in row["paths"] for row in rows), "sites": len(rows),
            "share_selecting": sum(row["select_seconds"] for row in rows) / whole,
            "share_executing": sum(row["execute_seconds"] for row in rows) / whole,
        }  # fmt: skip
        print({name: round(v, 3) for name, v in settings.items() if isinstance(v, float)})
        labels = ("FlexPrefill", "plain SDPA forward")
        compare(f"flexprefill_model_{tokens}", under, plain, labels=labels, repeats=3, settings=settings)


def power_attention_lengths() -> None:
    """PowerAttention's executor against dense causal SDPA by length, blocks of 128 (5 local, 1 sink): twice the text
    should cost 2 (log₂ 2N + 6) / (log₂ N + 6) times as much, dense four times."""
    for tokens in (2048, 4096, 8192, 16384):
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 4, tokens, 64, generator=generator) for _ in range(3))
        call = AttentionCall.from_tensors(query, key, value, causal=True)
        mask = BlockMask(power_mask(tokens // BLOCK)[None, None], tokens, tokens, BLOCK, BLOCK)
        compare(
            f"power_attention_{tokens}",
            sparse(call, mask),
            dense(call),
            labels=("PowerAttention", "dense causal SDPA"),
            repeats=7,
            warmup=2,
            settings={"tokens": tokens, "heads": 4, "dim": 64, "block": BLOCK, "density": mask.density()},
        )


PREFILL = (flexprefill_parts, flexprefill_low_density, flexprefill_model, power_attention_lengths)
