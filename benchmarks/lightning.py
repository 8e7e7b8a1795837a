"""What lightning attention costs on this machine: beside softmax, by length, with gradients, per decoded token."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.harness import compare, write_facts
from headway.evidence.timing import keep_freed_memory
from headway.kernels.scan import causal_scan
from headway.kernels.scan_blocks import scan_blocks
from headway.kernels.slopes import head_slopes
from headway.methods.layers.lightning import tnl_fields
from headway.models import HeadwayConfig, HeadwayForCausalLM

HEADS, DIM = 9, 64
LONG = 16_384
LENGTHS = (1024, 2048, 4096, 8192, 16_384, 32_768)
NEAR, FAR, STEPS = 100, 10_000, 100
REPEATS = 7


def _inputs(tokens: int, *, heads_last: bool = False) -> list[torch.Tensor]:
    """Query, key and value; `heads_last` as a projection lays them out."""
    torch.manual_seed(0)
    if heads_last:
        return [torch.randn(1, tokens, HEADS, DIM).transpose(1, 2) for _ in range(3)]
    return [torch.randn(1, HEADS, tokens, DIM) for _ in range(3)]


def lightning_forward() -> None:
    """The block form at 16,384 tokens in float32 against causal SDPA: at least 30 times as fast."""
    slopes = head_slopes(HEADS)
    for heads_last in (False, True):
        q, k, v = _inputs(LONG, heads_last=heads_last)
        with torch.no_grad():
            compare(
                "lightning_forward" + ("_heads_last" if heads_last else ""),
                partial(causal_scan, q, k, v, slopes),
                partial(scaled_dot_product_attention, q, k, v, is_causal=True),
                labels=("lightning, blocks", "causal SDPA"),
                repeats=REPEATS,
                memory=True,
                settings={"heads": HEADS, "dim": DIM, "tokens": LONG, "dtype": "float32", "heads_last": heads_last},
            )


def lightning_padded() -> None:
    """The same with a tenth of the tokens padding, in the middle too, against no padding: what masks cost."""
    slopes, (q, k, v) = head_slopes(HEADS), _inputs(LONG)
    mask = torch.rand(1, LONG, generator=torch.Generator().manual_seed(0)) < 0.9
    with torch.no_grad():
        compare(
            "lightning_padded",
            lambda: causal_scan(q, k, v, slopes, mask=mask),
            lambda: causal_scan(q, k, v, slopes),
            labels=("padded", "all real"),
            repeats=REPEATS,
            settings={"heads": HEADS, "dim": DIM, "tokens": LONG, "dtype": "float32"},
        )


def lightning_backward() -> None:
    """Forward and backward pass at 8,192 tokens against those of causal SDPA."""
    slopes = head_slopes(HEADS)
    q, k, v = (x.requires_grad_() for x in _inputs(8192))
    upstream = torch.randn(1, HEADS, 8192, DIM)

    def gradients(function: Callable[[], torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(function(), (q, k, v), upstream)

        return run

    compare(
        "lightning_backward",
        gradients(lambda: causal_scan(q, k, v, slopes)[0]),
        gradients(lambda: scaled_dot_product_attention(q, k, v, is_causal=True)),
        labels=("lightning, forward and backward", "causal SDPA, forward and backward"),
        repeats=3,
        memory=True,
        settings={"heads": HEADS, "dim": DIM, "tokens": 8192, "dtype": "float32"},
    )


def lightning_linear() -> None:
    """Tokens per second from 1,024 to 32,768 tokens: within a tenth of their middle, a slope of about zero."""
    slopes = head_slopes(HEADS)
    inputs = [_inputs(tokens) for tokens in LENGTHS]
    with torch.no_grad():
        times = _in_turn([partial(causal_scan, q, k, v, slopes) for q, k, v in inputs])
    speeds = [tokens / seconds for tokens, seconds in zip(LENGTHS, times, strict=True)]
    slope = float(np.polyfit(np.log(LENGTHS), np.log(np.asarray(times) / LENGTHS), 1)[0])
    facts = {
        "settings": {"heads": HEADS, "dim": DIM, "dtype": "float32", "lengths": LENGTHS},
        "seconds": times,
        "tokens_per_second": speeds,
        "highest_over_lowest": max(speeds) / min(speeds),
        "slope": slope,
    }
    write_facts("lightning_linear", facts)
    for tokens, speed in zip(LENGTHS, speeds, strict=True):
        print(f"{tokens:>7,} tokens: {speed:>12,.0f} tokens/s")
    print(f"highest / lowest {max(speeds) / min(speeds):.3f}, slope of log time per token {slope:+.3f}")


def lightning_tiles() -> None:
    """Seconds at 16,384 tokens by the tokens of a tile and of a block: what `scan_blocks.WORK` and `BLOCK` rest on."""
    q, k, v = _inputs(LONG)
    slopes, state = head_slopes(HEADS), torch.zeros(1, HEADS, DIM, DIM)
    sizes = [(block, tile) for block in (32, 64, 128) for tile in (512, 1024, 2048, 4096)]
    with torch.no_grad():
        times = _in_turn([partial(scan_blocks, q, k, v, slopes, state, block=b, tile=t) for b, t in sizes])
    write_facts(
        "lightning_tiles",
        {
            "settings": {"heads": HEADS, "dim": DIM, "tokens": LONG, "dtype": "float32"},
            "seconds": [{"block": b, "tile": t, "seconds": s} for (b, t), s in zip(sizes, times, strict=True)],
        },
    )
    for (block, tile), seconds in zip(sizes, times, strict=True):
        print(f"blocks of {block:>3}, tiles of {tile:>4}: {1000 * seconds:.1f} ms")


def lightning_decode() -> None:
    """A token decoded behind 10,000 tokens against one behind 100, for a TNL and a softmax model, with their bytes."""
    fields: dict[str, Any] = {"vocab_size": 256, "layers": 4, "heads": 4}
    configs = {
        "lightning": HeadwayConfig(**fields, **tnl_fields(width=256)),
        "softmax": HeadwayConfig(**fields, width=256, mixer="softmax", tie=False),
    }
    for name, config in configs.items():
        torch.manual_seed(0)
        model = HeadwayForCausalLM(config).eval()
        near, near_bytes = _decoder(model, NEAR)
        far, far_bytes = _decoder(model, FAR)
        compare(
            f"lightning_decode_{name}",
            far,
            near,
            labels=(f"{name}, behind {FAR:,}", f"{name}, behind {NEAR}"),
            repeats=REPEATS,
            settings={"near": NEAR, "far": FAR, "steps": STEPS, "near_bytes": near_bytes, "far_bytes": far_bytes},
        )
        print(f"{name}: {near_bytes:,} bytes of state behind {NEAR}, {far_bytes:,} behind {FAR:,}")


def lightning_training() -> None:
    """A training step of a TNL of 8,192 tokens against one of a softmax model of equal width."""
    fields: dict[str, Any] = {"vocab_size": 256, "layers": 4, "heads": 4}
    ids = torch.randint(256, (1, 8192), generator=torch.Generator().manual_seed(0))

    def step(config: HeadwayConfig) -> Callable[[], None]:
        torch.manual_seed(0)
        model = HeadwayForCausalLM(config)

        def run() -> None:
            model(input_ids=ids, labels=ids).loss.backward()
            model.zero_grad()

        return run

    compare(
        "lightning_training",
        step(HeadwayConfig(**fields, **tnl_fields(width=256))),
        step(HeadwayConfig(**fields, width=256, mixer="softmax", tie=False)),
        labels=("TNL", "softmax"),
        repeats=3,
        memory=True,
        settings={"width": 256, **fields, "tokens": 8192},
    )


@torch.no_grad()
def _decoder(model: Any, tokens: int) -> tuple[Callable[[], None], int]:
    """A function that decodes `STEPS` tokens behind a prompt, and the bytes of the cache behind the prompt."""
    ids = torch.randint(256, (1, tokens), generator=torch.Generator().manual_seed(0))
    cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    size, token = cache.bytes, ids[:, :1]

    def run() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                model(input_ids=token, past_key_values=cache, use_cache=True)

    return run, size


def _in_turn(calls: Sequence[Callable[[], Any]]) -> list[float]:
    """Median seconds of each call, repeats interleaved."""
    keep_freed_memory()
    times: list[list[float]] = [[] for _ in calls]
    for call in calls:
        call()
    for _ in range(REPEATS):
        for call, found in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
    return [float(np.median(found)) for found in times]
