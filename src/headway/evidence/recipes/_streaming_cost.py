"""What a StreamingLLM step costs: beside recomputing its window, by the size of the cache, and far into a stream.

Paper: section 4 and figure 10 of arXiv 2309.17453.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from headway.door.attach import use
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, between
from headway.evidence.recipe import Context
from headway.evidence.recipes._long_text import perplexity_of, perplexity_ratio
from headway.evidence.recipes._streaming_host import DEFAULT_SINKS, Host, Settings, policy
from headway.methods.sinks.streaming_llm import StreamingLLM, streaming_perplexity
from headway.statistics import Measurement, bootstrap_ratio
from headway.tasks.answering import clock, forward

#: Single steps that are timed together at one place of a long stream.
TIMED_STEPS = 6
#: Streaming steps for one recomputation: they are as much shorter.
STEPS_PER_RECOMPUTATION = 4

COST_CRITERIA = {
    "faster-than-recomputation": at_least(10, minimum_n=3, label="seconds of recomputation ÷ of a streaming step"),
    "cost-by-cache": all_of(
        at_least(5, minimum_n=3, label="seconds of recomputation ÷ of a streaming step, largest cache"),
        between(2, 6, of="growth", label="that ratio ÷ the same at a cache of a quarter"),
    ),
    "flat-memory": between(1, 1, minimum_n=16, label="most bytes ÷ fewest, once the cache is full"),
    "flat-step-time": between(0.8, 1.2, minimum_n=12, label="seconds of a late step ÷ an early one"),
    "rotation-work": between(1, 1, label="keys rotated per step, long window ÷ short one"),
}


@torch.no_grad()
def speed(host: Host, capacity: int) -> dict[str, list[float]]:
    """Seconds of single steps at a full cache, and of reading as many tokens afresh."""
    repeats = host.settings.recomputations
    model, ids, _ = host.get_long()
    found: dict[str, list[float]] = {"stream": [], "recompute": []}
    with use(model, StreamingLLM(**policy(capacity))):
        _, cache = forward(model, ids[:, : capacity + 8], None, keep=1)
        for step in range(2 + STEPS_PER_RECOMPUTATION * repeats):
            start = clock(model)
            _, cache = forward(model, ids[:, step : step + 1], cache, keep=1)
            found["stream"].append(clock(model) - start)
    forward(model, ids[:, :capacity], None, keep=1)
    for place in range(repeats):
        start = clock(model)
        forward(model, ids[:, place : place + capacity], None, keep=1)
        found["recompute"].append(clock(model) - start)
    found["stream"] = found["stream"][2:]
    return found


def by_capacity(host: Host, capacity: int) -> dict[str, list[float]]:
    """Seconds and per-token nll with a cache of one of the sizes."""
    settings = host.settings
    model, ids, _ = host.get()
    found = streaming_perplexity(model, ids, chunk=capacity, skip=settings.skip, **policy(capacity))
    return speed(host, capacity) | {"nll": found.nll.tolist()}


@torch.no_grad()
def long_stream(context: Context, host: Host) -> dict[str, Any]:
    """A long text in chunks with a few single steps behind each: bytes held, seconds of a step."""
    settings = host.settings
    model, ids, _ = host.get_long()
    capacity, rounds = settings.long_capacity, settings.long // (settings.chunk + TIMED_STEPS)
    start = 0
    cache: Any = None
    places: list[int] = []
    held: list[int] = []
    seconds: list[float] = []
    with use(model, StreamingLLM(**policy(capacity))):
        for _ in context.track(range(rounds), "long stream"):
            _, cache = forward(model, ids[:, start : start + settings.chunk], cache, keep=1)
            start += settings.chunk
            times = []
            for _ in range(TIMED_STEPS):
                began = time.perf_counter()
                _, cache = forward(model, ids[:, start : start + 1], cache, keep=1)
                times.append(clock(model) - began)
                start += 1
            if start > capacity + 1:
                places.append(start)
                held.append(cache.stored_bytes())
                seconds.append(float(np.median(times)))
    dense = held[-1] * start // capacity
    return {"places": places, "bytes": held, "seconds": seconds, "tokens": start, "dense_bytes": dense}


@torch.no_grad()
def rotations(host: Host) -> dict[str, float]:
    """Keys of a head that are rotated in a step, by the length of the window."""
    model, ids, _ = host.get()
    found = {}
    steps = 8
    for window in (host.settings.capacity // 4, host.settings.capacity):
        with use(model, StreamingLLM(sinks=DEFAULT_SINKS, window=window)):
            _, cache = forward(model, ids[:, : window + 16], None, keep=1)
            before = cache.layers[0].turned
            for step in range(steps):
                _, cache = forward(model, ids[:, window + 16 + step][None], cache, keep=1)
            found[str(window)] = (cache.layers[0].turned - before) / steps
    return found


def cost_claims(
    context: Context,
    settings: Settings,
    fast: dict[str, list[float]],
    sizes: dict[str, dict[str, list[float]]],
    long: dict[str, Any],
    turned: dict[str, float],
) -> list[Claim]:
    """The claims of COST_CRITERIA, in their order."""
    short, wide = (turned[name] for name in sorted(turned, key=int))
    seconds = long["seconds"]
    half = len(seconds) // 2
    return [
        Claim(
            id="faster-than-recomputation",
            statement="A streaming step is many times as fast as computing its window anew.",
            paper=PaperValue("up to 22.2×", "Llama-2, against sliding window with recomputation", "figure 10"),
            measured=_times(context, "speed", fast),
            criterion=COST_CRITERIA["faster-than-recomputation"],
            details={"cache": settings.long_capacity, "seconds": fast},
        ),
        _size_claim(context, settings, sizes),
        Claim(
            id="flat-memory",
            statement="The bytes of the cache do not change however long the stream.",
            paper=PaperValue("4 million tokens and more", "Llama-2, MPT, Falcon, Pythia", "abstract and figure 5"),
            measured=Measurement(max(long["bytes"]) / min(long["bytes"]), n=len(long["bytes"]), unit="×"),
            criterion=COST_CRITERIA["flat-memory"],
            notes=f"Streamed here: {long['tokens']:,} tokens. benchmarks/streaming.py streams 200,000.",
            details={
                "tokens": long["tokens"],
                "bytes": long["bytes"][-1],
                "bytes of a dense cache at that length": long["dense_bytes"],
                "cache": settings.long_capacity,
            },
        ),
        Claim(
            id="flat-step-time",
            statement="A step late in the stream takes as long as one soon after the cache has filled.",
            paper=PaperValue("stated without a number", where="section 4"),
            measured=bootstrap_ratio(
                seconds[-half:], seconds[:half], paired=False, statistic="median", generator=context.generator("late")
            ),
            criterion=COST_CRITERIA["flat-step-time"],
            notes=f"Second against first half of {len(seconds)} places, the median of {TIMED_STEPS} steps at each.",
            details={"places": long["places"], "seconds": seconds},
        ),
        Claim(
            id="rotation-work",
            statement="The keys that a step must rotate do not depend on the window.",
            paper=PaperValue("every cached key, at every step", where="released code"),
            measured=Measurement(wide / short if short else float("nan"), unit="×"),
            criterion=COST_CRITERIA["rotation-work"],
            notes="Here the window keeps its rotation and only the sinks are placed anew, a gain over the released "
            "code.",
            details={"keys rotated per step and head, by window": turned},
        ),
    ]


def _size_claim(context: Context, settings: Settings, sizes: dict[str, dict[str, list[float]]]) -> Claim:
    least, most = (sizes[name] for name in (min(sizes, key=int), max(sizes, key=int)))
    times = {name: _times(context, f"cache {name}", found) for name, found in sizes.items()}
    growth = bootstrap_ratio(
        _ratios(most), _ratios(least), paired=False, statistic="median", generator=context.generator("growth")
    )
    return Claim(
        id="cost-by-cache",
        statement="The larger the cache, the more a streaming step gains on computing the window anew.",
        paper=PaperValue("1.2 to 22.2×", "caches of 256 to 4096 tokens, Llama-2", "figure 10"),
        measured=times[max(sizes, key=int)],
        criterion=COST_CRITERIA["cost-by-cache"],
        others={
            "growth": growth,
            "perplexity_of_largest_to_smallest": perplexity_ratio(context, "sizes", most["nll"], least["nll"]),
            **{f"times_at_{name}": ratio for name, ratio in times.items()},
        },
        notes="A step has work that does not depend on the cache, and a recomputation hardly any: the ratio grows "
        "roughly as the cache does.",
        details={
            name: {
                "perplexity": perplexity_of(found["nll"]),
                "median ms of a step": 1e3 * float(np.median(found["stream"])),
                "median ms of a recomputation": 1e3 * float(np.median(found["recompute"])),
            }
            for name, found in sizes.items()
        },
    )


def _times(context: Context, name: str, found: dict[str, list[float]]) -> Measurement:
    return bootstrap_ratio(
        found["recompute"], found["stream"], paired=False, statistic="median", generator=context.generator(name)
    )


def _ratios(found: dict[str, list[float]]) -> list[float]:
    """Every recomputation ÷ the median of the steps that stand beside it."""
    steps = np.asarray(found["stream"]).reshape(-1, STEPS_PER_RECOMPUTATION)
    ratios: list[float] = (np.asarray(found["recompute"]) / np.median(steps, 1)).tolist()
    return ratios
