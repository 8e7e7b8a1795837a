"""Localisation from end to end: which heads a conflict moves, whether it is the conflict that moves them, and whether
they decide.

    1  drift on items of all kinds and relations, beside the lexical control: the same words without a conflict
    2  focal heads and layers by drift score, with their share in the middle third
    3  on items that were held out: drift of focal heads in conflict minus control, and what silencing them does to the
       margin between the two answers, beside as many heads at random

Paper: Diagnose, Localize, Align, arXiv 2509.23188; the controls and the held-out items are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import nn

from headway.door import use
from headway.methods.diagnosis.diagnose_localize_align.arbitration import CONDITIONS, Condition, margins
from headway.methods.diagnosis.diagnose_localize_align.drift import PARTS, Drift, MatchedPair, attention_drift
from headway.methods.diagnosis.diagnose_localize_align.focal import (
    COVER,
    SHARE,
    Concentration,
    GateEffect,
    Head,
    concentration,
    focal_heads,
    focal_layers,
    gate_effect,
)
from headway.methods.diagnosis.diagnose_localize_align.pairs import Item
from headway.parts import Parts
from headway.progress import Tell
from headway.statistics import Measurement, bootstrap_difference

#: Random head sets that focal heads are compared with.
DRAWS = 5


@dataclass(frozen=True, kw_only=True)
class Localisation:
    """What was found. Arrays are (layers, heads), rows in the order of `layers`; heads are (layer number, head).

    `scores` are the drift scores over all items, `control` those of the lexical control, `relations` by relation.
    `kinds` has a row for each kind and relation: mean drift of the focal heads in conflict and control. `specific` is
    the direction drift of the focal heads on held-out items, conflict minus control. `neutral` and `conflict` are the
    margins of the held-out items, `gates` what silencing does, with controls in the same layers."""

    layers: tuple[int, ...]
    scores: Float[np.ndarray, "layers heads"]
    control: Float[np.ndarray, "layers heads"]
    relations: dict[str, Float[np.ndarray, "layers heads"]]
    parts: dict[str, Float[np.ndarray, "layers heads"]]
    focal: list[Head]
    focal_layers: list[int]
    concentration: Concentration
    kinds: list[dict[str, Any]]
    specific: Measurement
    held_names: list[str]
    neutral: list[float]
    conflict: list[float]
    gates: GateEffect


def localize(
    model: nn.Module,
    items: Sequence[Item],
    held_out: Sequence[Item],
    *,
    gated: Sequence[Item] | None = None,
    weights: Sequence[float] | None = None,
    share: float = SHARE,
    cover: float = COVER,
    window: int | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    kept: Parts | None = None,
    name: str = "",
    tell: Tell | None = None,
) -> Localisation:
    """Finds focal heads on `items` and judges them on `held_out`; `gated` are the held-out items whose margins are
    measured under silenced heads (all of them by default, the costly part). `weights` are the ω of `items`. `kept`
    stores finished pieces under `name`, the model's."""
    keep = Parts() if kept is None else kept
    found, plain = _drifts(model, items, keep, name, tell, "reading pairs")
    scores = found.scores(weights)
    rows = focal_heads(scores, share=share)
    chosen_layers = focal_layers(scores, rows, cover=cover, window=window)
    held, held_plain = _drifts(model, held_out, keep, name, tell, "reading held-out pairs")
    random = np.random.default_rng(seed)
    focal = [(found.layers[row], head) for row, head in rows]
    judged = list(held_out if gated is None else gated)
    neutral, conflict = (_margins(model, judged, condition, keep, name, tell) for condition in CONDITIONS)
    gates = gate_effect(
        model,
        rows,
        lambda: margins(model, judged, "conflict"),
        before=conflict,
        shape=(scores.shape[0], scores.shape[1]),
        layers=found.layers,
        generator=random,
        draws=draws,
        keep=lambda heads, make: keep.data([name, "gated", [_asked(item) for item in judged], heads], make),
        progress=None if tell is None else lambda done, total: tell("silencing heads", done, total),
    )
    return Localisation(
        layers=found.layers,
        scores=scores,
        control=plain.scores(),
        relations={
            relation: found.of([i for i, item in enumerate(items) if item.relation == relation]).scores()
            for relation in dict.fromkeys(item.relation for item in items)
        },
        parts={part: found.part(part).mean(0) for part in PARTS},
        focal=focal,
        focal_layers=[found.layers[row] for row in chosen_layers],
        concentration=concentration(rows, (scores.shape[0], scores.shape[1])),
        kinds=_by_kind(held_out, held, held_plain, rows),
        specific=bootstrap_difference(
            _of_heads(held.direction, rows), _of_heads(held_plain.direction, rows), paired=True, generator=random
        ),
        held_names=[item.name for item in judged],
        neutral=neutral,
        conflict=conflict,
        gates=gates,
    )


def _drifts(
    model: nn.Module, items: Sequence[Item], keep: Parts, name: str, tell: Tell | None, words: str
) -> tuple[Drift, Drift]:
    """Drift of the items in conflict and in their lexical control."""
    both: list[list[Drift]] = [[], []]
    # The outer scope tests the host once for all readings inside.
    with use(model):
        for number, item in enumerate(items):
            for place, pair in enumerate((item.pair, item.control)):
                both[place].append(_kept_drift(model, pair, keep, name))
            if tell is not None:
                tell(words, number + 1, len(items))
    return _joined(both[0]), _joined(both[1])


def _kept_drift(model: nn.Module, pair: MatchedPair, keep: Parts, name: str) -> Drift:
    def make() -> dict[str, Any]:
        found = attention_drift(model, [pair])
        return {"layers": list(found.layers), **{part: found.part(part).tolist() for part in PARTS}}

    stored = keep.data([name, "drift", pair.neutral.tolist(), pair.conflict.tolist(), list(pair.rows)], make)
    parts = {part: np.array(stored[part]) for part in PARTS}
    return Drift(**parts, layers=tuple(stored["layers"]))


def _joined(drifts: Sequence[Drift]) -> Drift:
    parts = {part: np.concatenate([one.part(part) for one in drifts]) for part in PARTS}
    return Drift(**parts, layers=drifts[0].layers)


def _margins(
    model: nn.Module, items: Sequence[Item], condition: Condition, keep: Parts, name: str, tell: Tell | None
) -> list[float]:
    found = []
    for number, item in enumerate(items):
        made = keep.data([name, "margin", condition, *_asked(item)], partial(margins, model, [item], condition))
        found.append(float(made[0]))
        if tell is not None:
            tell(f"which rule wins ({condition})", number + 1, len(items))
    return found


def _asked(item: Item) -> list[Any]:
    """What a margin depends on beside the model."""
    return [item.texts, item.obeys_rule.tolist(), item.obeys_clause.tolist()]


def _of_heads(values: Float[np.ndarray, "pairs layers heads"], rows: Sequence[Head]) -> Float[np.ndarray, " pairs"]:
    return np.mean([values[:, row, head] for row, head in rows], axis=0)


def _by_kind(items: Sequence[Item], held: Drift, plain: Drift, rows: Sequence[Head]) -> list[dict[str, Any]]:
    table = []
    for kind, relation in dict.fromkeys((item.kind, item.relation) for item in items):
        index = [i for i, item in enumerate(items) if (item.kind, item.relation) == (kind, relation)]
        row: dict[str, Any] = {"kind": kind, "relation": relation, "items": len(index)}
        for part in PARTS:
            row[part] = float(_of_heads(held.part(part)[index], rows).mean())
            row[f"{part}_control"] = float(_of_heads(plain.part(part)[index], rows).mean())
        table.append(row)
    return table
