"""What a streaming step costs: beside recomputing its window, beside dense attention, and over 200,000 tokens.

The recipe of StreamingLLM measures the same ratios at sizes that fit a few minutes; this is the long form.
"""

from __future__ import annotations

import json
import time
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import track

import headway
from benchmarks.harness import RESULTS, compare, peak_memory, warn_if_busy
from headway.evidence.environment import environment
from headway.files import write_atomically
from headway.kernels.rope import rotate
from headway.methods.sinks.streaming_llm import StreamingLLM

SINKS = 4
#: Tokens of the long stream, of each of its chunks, and between two looks at a single step.
LONG, CHUNK, LOOK = 200_000, 512, 10_000
TIMED_STEPS = 16


def host(tokens: int) -> tuple[Any, torch.Tensor]:
    """SmolLM2 and so many tokens of the default text, from its beginning again where it ends."""
    from headway.hosts import default_text, tokenize

    model, tokenizer = headway.load("smollm2")
    ids = tokenize(tokenizer, default_text(), None, allow_longer=True)
    return model, ids[:, torch.arange(tokens) % ids.shape[1]]


class Request:
    """A request that is fed token by token; its cache lives as long as the scope it was made in."""

    def __init__(self, model: Any, ids: torch.Tensor, *, chunk: int = CHUNK) -> None:
        self.model, self.token, self.cache = model, ids[:, :1], None
        for piece in ids.split(chunk, 1):
            self.feed(piece)

    @torch.no_grad()
    def feed(self, ids: torch.Tensor) -> None:
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self.feed(self.token)


def streaming_step() -> None:
    """One streaming step against reading its window afresh, by the length of the window."""
    model, ids = host(5000)
    # A model of its own: inside the scope a forward without a cache streams as well.
    plain, _ = host(1)
    for capacity in (128, 256, 512, 1024, 4096):

        @torch.no_grad()
        def recompute(window: torch.Tensor = ids[:, :capacity]) -> None:
            plain(input_ids=window, use_cache=False, logits_to_keep=1)

        with headway.use(model, StreamingLLM(sinks=SINKS, window=capacity - SINKS)):
            request = Request(model, ids[:, : capacity + 16])
            compare(
                f"streaming_step_{capacity}",
                request.step,
                recompute,
                labels=("streaming step", "recomputation of the window"),
                repeats=7,
                settings={"model": "smollm2", "cache": capacity, "sinks": SINKS},
            )


def streaming_against_dense() -> None:
    """Sixteen steps behind 8,000 tokens: a stream of 1,024 against dense attention over everything."""
    model, ids = host(8000)
    plain, _ = host(1)
    dense = Request(plain, ids)
    with headway.use(model, StreamingLLM(sinks=SINKS, window=1024 - SINKS)):
        stream = Request(model, ids)
        compare(
            "streaming_against_dense",
            partial(stream.step, 16),
            partial(dense.step, 16),
            labels=("stream of 1,024", "dense"),
            repeats=5,
            settings={"model": "smollm2", "tokens": 8000, "steps": 16},
        )


def streaming_rotation() -> None:
    """A step that turns the sinks alone against one that turns every stored key too, as the released code does."""
    model, ids = host(5000)
    for capacity in (1024, 4096):
        with headway.use(model, StreamingLLM(sinks=SINKS, window=capacity - SINKS)):
            ours, theirs = Request(model, ids[:, : capacity + 16]), Request(model, ids[:, : capacity + 16])

            def released(request: Request = theirs) -> None:
                cache: Any = request.cache
                for layer in cache.layers:
                    key, _, places = layer.window_keys()
                    rotate(key, places, layer.frequencies, layer.layout)
                request.step()

            compare(
                f"streaming_rotation_{capacity}",
                ours.step,
                released,
                labels=("sinks turned", "every key turned"),
                repeats=15,
                settings={"model": "smollm2", "cache": capacity},
            )


def streaming_200k() -> None:
    """200,000 tokens through a cache of 1,024: bytes held, time of a step and resident memory along the way."""
    model, ids = host(LONG)
    load = warn_if_busy()
    looks: list[dict[str, float]] = []

    def run() -> None:
        request: Request | None = None
        with headway.use(model, StreamingLLM(sinks=SINKS, window=1024 - SINKS)):
            pieces = ids.split(CHUNK, 1)
            fed = 0
            for piece in track(pieces, description="200,000 tokens"):
                if request is None:
                    request = Request(model, piece)
                else:
                    request.feed(piece)
                fed += piece.shape[1]
                if fed % LOOK < CHUNK and fed > 2048:
                    seconds = []
                    for _ in range(TIMED_STEPS):
                        start = time.perf_counter()
                        request.step()
                        seconds.append(time.perf_counter() - start)
                    cache: Any = request.cache
                    looks.append({"tokens": fed, "bytes": cache.stored_bytes(), "seconds": float(np.median(seconds))})

    peak = peak_memory(run)
    half = len(looks) // 2
    late, early = (float(np.median([look["seconds"] for look in part])) for part in (looks[half:], looks[:half]))
    content = {
        "name": "streaming_200k",
        "tokens": LONG,
        "looks": looks,
        "bytes_most_over_least": max(x["bytes"] for x in looks) / min(x["bytes"] for x in looks),
        "late_over_early": late / early,
        "rise_of_resident_bytes": peak.rise,
        "load": load,
        "environment": environment(),
    }
    write_atomically(RESULTS / "streaming_200k.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    print(
        f"{LONG:,} tokens: {looks[-1]['bytes'] / 2**20:.1f} MiB held at the end, most ÷ least "
        f"{content['bytes_most_over_least']:.3f}; late ÷ early step {late / early:.3f}"
    )
