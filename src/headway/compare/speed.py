"""Times a method beside dense attention, so that what disturbs the machine disturbs both.

One request reads the text's first tokens (prefill) and then is given the next ones, token by token (decode). After one
unmeasured run of each side, method and dense run in pairs and take turns at going first. What counts is the ratio of
each pair; medians of seconds are shown beside it. Dense is timed against itself in the same way: that is the noise.

A driver wraps `generate`, so both sides are timed through it: prefill is a generation of one token, decode what each
further token takes.
"""

from __future__ import annotations

import gc
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.compare.cells import Cell, Timing
from headway.compare.methods import Candidate
from headway.compare.setting import Setting
from headway.door import Handle, use
from headway.errors import ArgumentError
from headway.tasks.answering import clock, ending_ids, feed, prefill

SPEED = "speed"
#: Digits of the densities by head.
DIGITS = 4


@dataclass(frozen=True, kw_only=True)
class Once:
    """One request: seconds of prefill and per token of decode, most bytes of its cache, and what ran in each phase."""

    prefill: float
    decode: float
    cache_bytes: int | None
    density: dict[str, float] = field(default_factory=dict)
    density_by_head: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    paths: dict[str, int] = field(default_factory=dict)


def check_repeats(repeats: int, new_tokens: int, tokens: int | None) -> None:
    """Refuses what cannot be timed; `tokens` is None where the length of the text is not known yet."""
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 2:
        raise ArgumentError(f"repeats: got {repeats!r}, expected a whole number of at least 2, for an interval.")
    whole = isinstance(new_tokens, int) and not isinstance(new_tokens, bool)
    if tokens is None:
        if not whole or new_tokens < 2:
            raise ArgumentError(f"new_tokens: got {new_tokens!r}, expected a whole number of at least 2.")
    elif not whole or not 2 <= new_tokens <= tokens // 2:
        raise ArgumentError(
            f"new_tokens: got {new_tokens!r}, expected 2..{tokens // 2}, half of the {tokens:,} tokens of the text."
        )


def measure_speed(setting: Setting, candidate: Candidate, *, repeats: int, new_tokens: int) -> Cell:
    """Times of a candidate and of dense, in pairs."""
    once = _generated if candidate.drives else _fed
    sides: dict[str, list[Once]] = {"method": [], "dense": []}
    with use(setting.model, *candidate.stages) as handle:
        once(setting, new_tokens, handle)
    once(setting, new_tokens, None)
    with _no_collection():
        for side in (s for r in range(repeats) for s in (("method", "dense") if r % 2 == 0 else ("dense", "method"))):
            if side == "dense" or not candidate.stages:
                sides[side].append(once(setting, new_tokens, None))
                continue
            with use(setting.model, *candidate.stages, selftest=False) as handle:
                sides[side].append(once(setting, new_tokens, handle))
    last = sides["method"][-1]
    tokens = setting.tokens - new_tokens
    return Cell(
        method=candidate.method,
        budget=candidate.budget,
        task=SPEED,
        timing=Timing(
            tokens=tokens,
            new_tokens=new_tokens,
            prefill=[run.prefill for run in sides["method"]],
            decode=[run.decode for run in sides["method"]],
            dense_prefill=[run.prefill for run in sides["dense"]],
            dense_decode=[run.decode for run in sides["dense"]],
        ),
        density=last.density or {"prefill": 1.0, "decode": 1.0},
        density_by_head=last.density_by_head,
        paths=last.paths,
        cache_bytes=last.cache_bytes,
    )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage is collected before, and not in the middle of a timed run."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _fed(setting: Setting, new_tokens: int, handle: Handle | None) -> Once:
    ids = setting.ids
    running = prefill(setting.model, ids[:, :-new_tokens], chunk=setting.chunk)
    read = running.seconds
    after_prefill = Counts.of(handle)
    for token in ids[0, -new_tokens:]:
        feed(setting.model, running, token.view(1, 1))
    after_decode = Counts.of(handle)
    return Once(
        prefill=read,
        decode=(running.seconds - read) / new_tokens,
        cache_bytes=running.cache_bytes,
        density={} if handle is None else after_prefill.split(after_decode),
        density_by_head={} if handle is None else after_prefill.split_heads(after_decode),
        paths=dict(after_decode.paths),
    )


def _generated(setting: Setting, new_tokens: int, handle: Handle | None) -> Once:
    prompt = setting.ids[:, :-new_tokens]
    first, _ = _generate(setting, prompt, 1)
    after_prefill = Counts.of(handle)
    whole, made = _generate(setting, prompt, new_tokens)
    more = (whole - first) / (made - 1) if made > 1 else math.nan
    return Once(
        prefill=first,
        decode=more if more > 0 else math.nan,
        cache_bytes=None,
        density={} if handle is None else {"prefill": after_prefill.density},
        density_by_head={} if handle is None else {"prefill": after_prefill.by_head()},
        paths=dict(Counts.of(handle).paths),
    )


@torch.no_grad()
def _generate(setting: Setting, prompt: Int[Tensor, "1 tokens"], new_tokens: int) -> tuple[float, int]:
    """Seconds and new tokens of one generation."""
    model: Any = setting.model
    ends = sorted(ending_ids(model, setting.tokenizer))
    prompt = prompt.to(next(model.parameters()).device)
    start = clock(model)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=ends[0] if ends else 0,
    )
    return clock(model) - start, out.shape[1] - prompt.shape[1]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a scope has reported so far: calls, the sum of their densities, and how often each path ran; by site, calls
    and the sums of every query head."""

    calls: int
    density_sum: float
    paths: Counter[str]
    heads: Mapping[str, tuple[int, Float[np.ndarray, " heads"]]]

    @classmethod
    def of(cls, handle: Handle | None) -> Counts:
        """Of an open scope. Sites at which no stage acts are not in its report: they ran as often as the others,
        dense."""
        rows: Sequence[dict[str, Any]] = [] if handle is None else handle.report()
        paths: Counter[str] = Counter()
        for row in rows:
            paths.update(row["paths"])
        ran = {row["site"] for row in rows}
        apart = sum(site.name not in ran for site in handle.sites) if handle is not None and rows else 0
        apart *= max((row["calls"] for row in rows), default=0)
        if apart:
            paths["native: no stage acts there"] += apart
        return cls(
            calls=sum(row["calls"] for row in rows) + apart,
            density_sum=sum(row["density"] * row["calls"] for row in rows if row["calls"]) + apart,
            paths=paths,
            heads={row["site"]: (row["calls"], row["calls"] * np.array(row["density_by_head"])) for row in rows},
        )

    @property
    def density(self) -> float:
        """Mean over calls; 1 where no stage acted, for then everything is read."""
        return self.density_sum / self.calls if self.calls else 1.0

    def split(self, later: Counts) -> dict[str, float]:
        """The density of each phase, when this was taken at its border and `later` at the end."""
        calls = later.calls - self.calls
        decode = (later.density_sum - self.density_sum) / calls if calls else 1.0
        return {"prefill": self.density, "decode": decode}

    def by_head(self) -> dict[str, list[float]]:
        """Mean density of every query head over the calls, by site; sites at which no stage acts are left out."""
        return {site: _rounded(sums / calls) for site, (calls, sums) in self.heads.items() if calls}

    def split_heads(self, later: Counts) -> dict[str, dict[str, list[float]]]:
        """The same of each phase."""
        decode = {}
        for site, (calls, sums) in later.heads.items():
            before, at_border = self.heads.get(site, (0, np.zeros_like(sums)))
            if calls > before:
                decode[site] = _rounded((sums - at_border) / (calls - before))
        return {"prefill": self.by_head(), "decode": decode}


def _rounded(values: Float[np.ndarray, " heads"]) -> list[float]:
    return [round(float(value), DIGITS) for value in values]
