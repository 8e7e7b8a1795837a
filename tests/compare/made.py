"""Comparisons that were made by hand, with known numbers: no model runs."""

from __future__ import annotations

import math
from typing import Any

from headway.compare.cells import Cell, Score, Timing
from headway.compare.judge import conclude
from headway.compare.methods import Candidate
from headway.compare.result import Comparison

RUN = {"tokens": 512, "tasks": ["perplexity", "needle"], "tolerance": 0.05, "save": "auto", "text": "a text"}


def made_timing(prefill: float = 1.0, decode: float = 0.01, *, spread: float = 0.01, repeats: int = 5) -> Timing:
    """`prefill` and `decode` are multiples of dense, which takes 1 s and 10 ms, give or take `spread`."""
    wobble = [1 + spread * (-1) ** i * (i + 1) / repeats for i in range(repeats)]
    return Timing(
        tokens=512,
        new_tokens=16,
        prefill=[prefill * w for w in wobble],
        decode=[decode * w for w in wobble],
        dense_prefill=[1.0] * repeats,
        dense_decode=[0.01] * repeats,
    )


def made_cells(
    method: str,
    budget: float | None,
    *,
    nll: float = 2.0,
    right: list[float] | None = None,
    timing: Timing | None = None,
    cache_bytes: int = 1000,
    density: float = 1.0,
) -> list[Cell]:
    """A perplexity of e^nll over eight blocks, needles `right` (both modes), and a timed request."""
    where: dict[str, Any] = {"method": method, "budget": budget}
    right = [1.0] * 8 if right is None else right
    blocks = [nll + 0.1 * (i % 2) for i in range(8)]
    text = Score(
        task="perplexity", name="perplexity", value=math.exp(sum(blocks) / 8), low=1.0, high=99.0, n=511,
        higher_is_better=False, parts=blocks,
    )  # fmt: skip
    cells = [Cell(**where, task="perplexity", scores=[text], density={"all": density})]
    for mode in ("blind", "aware"):
        share = Score(
            task="needle", name="exact match", mode=mode, value=sum(right) / len(right), low=0.5, high=1.0,
            n=len(right), parts=right,
        )  # fmt: skip
        cells.append(Cell(**where, task=f"needle, {mode}", scores=[share], density={"all": density}))
    cells.append(
        Cell(
            **where,
            task="speed",
            timing=made_timing() if timing is None else timing,
            density={"prefill": density, "decode": density},
            paths={"window": 90, "native": 10},
            cache_bytes=cache_bytes,
        )
    )
    return cells


def made(*points: list[Cell], **run: Any) -> Comparison:
    """The comparison of dense and some points."""
    cells = [made_cells("dense", None), *points]
    chosen = [Candidate(method=found[0].method, summary="made", budget=found[0].budget) for found in cells]
    return conclude(chosen, cells, {"name": "a host", "layers": 2, "heads": 4}, {**RUN, **run})
