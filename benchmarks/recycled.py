"""What recycling saves: attention alone up to 65,536 tokens, and whole steps of SmolLM2 up to its 8,192 positions.

Prefill is dense and is not timed. Every ratio is over whole strides, their full step included.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

import headway
from benchmarks.harness import compare
from benchmarks.streaming import SINKS, Request, host
from headway.evidence.recipes._recycled_toys import DIM, HEADS, KV_HEADS, LayerByHand
from headway.methods.long_context.recycled_attention import RecycledAttention, ideal_speedup
from headway.methods.sinks.streaming_llm import StreamingLLM

BUDGET, STRIDE = 1024, 32


class Cycle:
    """One layer of attention behind `tokens` random tokens, run a stride at a time."""

    def __init__(self, stride: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(0)
        key = torch.randn(1, KV_HEADS, tokens, DIM, generator=generator)
        self.query = torch.randn(1, HEADS, 1, DIM, generator=generator)
        self.key = key[:, :, -1:].clone()
        self.attention = LayerByHand(RecycledAttention(budget=BUDGET, stride=stride))
        layer = self.attention.cache.layers[0]
        layer.full.reserve(tokens + 2000, key, key)
        self.attention(self.query, self.key, self.key)
        layer.update(key, key)
        layer.crop(-1)
        self.attention(self.query, self.key, self.key)

    def run(self) -> None:
        with torch.no_grad():
            for _ in range(STRIDE):
                self.attention(self.query, self.key, self.key)


def recycled_attention() -> None:
    """A stride of 32 steps of attention, 9 heads of 64, budget 1,024, against 32 dense steps over the same cache."""
    for tokens in (16_384, 32_768, 65_536):
        ideal = ideal_speedup(tokens, BUDGET, STRIDE)
        found = compare(
            f"recycled_attention_{tokens}",
            Cycle(STRIDE, tokens).run,
            Cycle(1, tokens).run,
            labels=("recycled", "dense"),
            repeats=9,
            settings={"tokens": tokens, "budget": BUDGET, "stride": STRIDE, "ideal_speedup": ideal},
        )
        share = 1 / (found.ratio.value * ideal)
        print(f"{tokens:,} tokens: {share:.2f} of the ideal speed-up of {ideal:.1f} (bar 0.67)")


def recycled_steps() -> None:
    """Whole steps of SmolLM2 behind 7,500 tokens against dense attention, in the host's own cache and in a buffer that
    grows in place."""
    model, ids = host(7500)
    plain, _ = host(1)
    settings = {"model": "smollm2", "tokens": 7500, "budget": BUDGET, "stride": STRIDE}
    with headway.use(model, RecycledAttention(budget=BUDGET, stride=STRIDE)):
        recycled = Request(model, ids)
        dense = Request(plain, ids)
        steps = partial(recycled.step, STRIDE), partial(dense.step, STRIDE)
        labels = ("recycled", "dense, host's cache")
        compare("recycled_steps", *steps, labels=labels, repeats=5, settings=settings)
        with headway.use(plain, RecycledAttention(budget=BUDGET, stride=1)):
            same = Request(plain, ids)
            steps = partial(recycled.step, STRIDE), partial(same.step, STRIDE)
            labels = ("recycled", "dense, same cache")
            compare("recycled_steps_same_cache", *steps, labels=labels, repeats=5, settings=settings)


def recycled_slope() -> None:
    """How the time of a step grows with the context: recycled and streaming beside dense attention in the same kind of
    cache, from 1,024 to 7,500 tokens of SmolLM2."""
    medians: dict[str, list[float]] = {"dense": [], "recycled": [], "streaming": []}
    lengths = (1024, 2048, 4096, 7500)
    policies: dict[str, Any] = {
        "recycled": RecycledAttention(budget=BUDGET // 2, stride=STRIDE),
        "streaming": StreamingLLM(sinks=SINKS, window=BUDGET // 2 - SINKS),
    }
    model, ids = host(lengths[-1])
    plain, _ = host(1)
    for tokens in lengths:
        for name, policy in policies.items():
            with (
                headway.use(model, policy),
                headway.use(plain, RecycledAttention(budget=BUDGET // 2, stride=1)),
            ):
                method, dense = Request(model, ids[:, :tokens]), Request(plain, ids[:, :tokens])
                found = compare(
                    f"recycled_slope_{name}_{tokens}",
                    partial(method.step, STRIDE),
                    partial(dense.step, STRIDE),
                    labels=(name, "dense"),
                    repeats=5,
                    settings={"model": "smollm2", "tokens": tokens, "budget": BUDGET // 2, "stride": STRIDE},
                )
            medians[name].append(float(np.median(found.method)) / STRIDE)
            if name == "recycled":
                medians["dense"].append(float(np.median(found.baseline)) / STRIDE)
    for name, seconds in medians.items():
        rises = [
            1e6 * (b - a) / (long - short)
            for (a, b), (short, long) in zip(pairwise(seconds), pairwise(lengths), strict=True)
        ]
        print(f"{name}: " + ", ".join(f"{rise:.2f}" for rise in rises) + " µs per step and token of context")
