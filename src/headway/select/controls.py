"""Is it the chosen heads? The same loss difference under as many other heads of the same layers, on some of the
records."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from headway.door import use
from headway.errors import ArgumentError
from headway.files import write_atomically
from headway.methods.diagnosis.attention_influence import QUARANTINED
from headway.pages.plain import plain, with_nan
from headway.progress import Tell
from headway.select.recipe import Head, InfluenceRecipe
from headway.select.records import Cursor
from headway.select.shards.ledger import Ledger
from headway.select.shards.plan import Plan
from headway.statistics import rank_correlation
from headway.statistics.later_controls import later_controls

#: Records that controls are scored on at most.
RECORDS = 32
#: Fewest records with a number that an order is compared on.
LEAST = 3


@dataclass(frozen=True)
class Control:
    """One set of other heads: the mean rise of the loss under the chosen heads and under these, and Spearman's ρ of
    both orders (NaN where there is none)."""

    heads: list[Head]
    records: int
    chosen: float
    control: float
    correlation: float


def measure_controls(
    plan: Plan,
    ledger: Ledger,
    recipe: InfluenceRecipe,
    model: nn.Module,
    tokenizer: Any,
    *,
    draws: int,
    seed: int,
    folder: Path,
    tell: Tell,
) -> list[Control]:
    """Scores some records, spread over the corpus, under `draws` sets of other heads of the same layers (of the next
    layers where those are too few). Kept in `folder` between runs; none where the model has too few other heads."""
    if draws == 0:
        return []
    asked = [plan.describe(), recipe.settings(), draws, seed, RECORDS]
    path = folder / f"controls-{hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return _read(path)
    layers = _attending(model)
    # Layers without heads must not be drawn from, so layers are counted among those that have some.
    chosen = [(layers.index(layer), head) for layer, head in recipe.heads]
    shape = (len(layers), json.loads(recipe.described)["heads"] or 0)
    try:
        drawn = later_controls(chosen, shape, torch.Generator().manual_seed(seed), draws=draws)
    except ArgumentError:
        return []
    sets = [[(layers[at], head) for at, head in control] for control in drawn]
    texts, own = _sample(plan, ledger)
    found = []
    for number, heads in enumerate(sets):
        tell("scoring with other heads", number, len(sets))
        scores = recipe.scorer(model, tokenizer, heads).score(texts) if texts else []
        found.append(_compare(heads, own, [score.influence for score in scores], seed))
    write_atomically(path, json.dumps(plain([asdict(control) for control in found])))
    return found


def _attending(model: nn.Module) -> list[int]:
    """The layers of a model that have heads of their own."""
    with use(model) as handle:
        return sorted({site.layer for site in handle.sites if site.kind == "self"})


def _sample(plan: Plan, ledger: Ledger) -> tuple[list[str], list[float]]:
    """Texts of up to `RECORDS` usable records, evenly over the corpus, and their influence."""
    sizes = plan.sizes()
    step = max(sum(sizes) // RECORDS, 1)
    cursor, texts, own, seen = Cursor(plan.reading), list[str](), list[float](), 0
    for number, size in enumerate(sizes):
        wanted = [at for at in range(size) if (seen + at) % step == 0]
        seen += size
        if not wanted or len(texts) >= RECORDS:
            continue
        shard, scores = plan.shard(number), ledger.scores(number)
        usable = {at for at in wanted if not QUARANTINED & set(scores[at].flags)}
        records = shard.records(cursor)
        texts += [records[at].text for at in sorted(usable)]
        own += [scores[at].influence for at in sorted(usable)]
    cursor.close()
    return texts[:RECORDS], own[:RECORDS]


def _compare(heads: Sequence[Head], own: Sequence[float], other: Sequence[float], seed: int) -> Control:
    both = np.array([pair for pair in zip(own, other, strict=True) if np.isfinite(pair).all()], float).reshape(-1, 2)
    rho = float("nan")
    if len(both) >= LEAST:
        generator = torch.Generator().manual_seed(seed)
        rho = rank_correlation(both[:, 0], both[:, 1], generator=generator, resamples=100).value
    means = both.mean(0) if len(both) else (float("nan"), float("nan"))
    return Control([(int(a), int(b)) for a, b in heads], len(both), float(means[0]), float(means[1]), rho)


def _read(path: Path) -> list[Control]:
    found = json.loads(path.read_text(encoding="utf-8"))
    numbers = ({name: with_nan(value) for name, value in each.items() if name != "heads"} for each in found)
    heads = ([(layer, head) for layer, head in each["heads"]] for each in found)
    return [Control(heads=own, **values) for own, values in zip(heads, numbers, strict=True)]
