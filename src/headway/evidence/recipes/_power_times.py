"""What the mask of PowerAttention costs in time as a text doubles, beside dense attention."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import Criterion
from headway.evidence.recipe import Context
from headway.evidence.timing import milliseconds
from headway.kernels.block_sparse import block_sparse_attention
from headway.methods.long_context.power_attention import power_mask
from headway.statistics import bootstrap_ratio

HEADS, DIM = 4, 64


def measure_times(context: Context) -> dict[str, Any]:
    """Milliseconds of one forward pass by length, under the mask and dense, and the pairs of blocks that the mask
    reads."""
    lengths, block, repeats = context.choose(
        smoke=((256, 512), 32, 2), small=((4096, 8192, 16_384), 128, 7), full=((16_384, 32_768, 65_536), 256, 15)
    )
    generator = context.torch_generator("times")
    sides: dict[str, list[Any]] = {"power": [], "dense": []}
    pairs = []
    for tokens in lengths:
        q, k, v = (torch.randn(1, HEADS, tokens, DIM, generator=generator) for _ in range(3))
        mask = power_mask(tokens // block)[None, None]
        sparse = partial(block_sparse_attention, q, k, v, mask, query_block=block, key_block=block, causal=True)
        sides["power"].append(sparse)
        sides["dense"].append(partial(scaled_dot_product_attention, q, k, v, is_causal=True))
        pairs.append(int(mask.sum()))
    with torch.no_grad():
        times = milliseconds(context, [*sides["power"], *sides["dense"]], repeats)
    return {
        "lengths": list(lengths),
        "block": block,
        "pairs": pairs,
        "power": times[: len(lengths)],
        "dense": times[len(lengths) :],
        "threads": torch.get_num_threads(),
    }


def times_claim(context: Context, found: dict[str, Any], criterion: Criterion) -> Claim:
    short, long = found["lengths"][-2:]
    pairs = found["pairs"][-1] / found["pairs"][-2]
    random = context.generator("time intervals")

    def grown(side: str, by: float) -> Any:
        before = [by * x for x in found[side][-2]]
        return bootstrap_ratio(found[side][-1], before, paired=True, statistic="median", generator=random)

    power, dense = ([float(np.median(x)) for x in found[side]] for side in ("power", "dense"))
    return Claim(
        id="time-growth",
        statement="Twice the text takes the mask as much longer as it reads more, and dense attention about four times "
        "as long.",
        paper=PaperValue("3.0× prefill, 21.6× attention kernel", "128k tokens, Qwen2-7B, A800", "experiments"),
        measured=grown("power", pairs),
        criterion=criterion,
        others={
            "dense": grown("dense", 1.0),
            "speed_up": bootstrap_ratio(
                found["dense"][-1], found["power"][-1], paired=True, statistic="median", generator=random
            ),
        },
        notes=f"{short:,} to {long:,} tokens on {found['threads']} threads, {HEADS} heads of {DIM}, blocks of "
        f"{found['block']}: the mask reads {pairs:.2f} times as many pairs, and takes {power[-1] / power[-2]:.2f} "
        f"times as long. Blocks are listed before the clock starts. Medians in ms: {power[-1]:.0f} under the mask, "
        f"{dense[-1]:.0f} dense.",
        details={name: found[name] for name in ("lengths", "pairs", "power", "dense")},
    )
