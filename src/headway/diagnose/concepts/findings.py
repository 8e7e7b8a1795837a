"""What an audit says, in sentences with numbers."""

from __future__ import annotations

import math
from collections import Counter
from statistics import median
from typing import Any

from headway.diagnose.concepts.measuring import SAME
from headway.diagnose.concepts.result import Concepts, Effect, mean_drops
from headway.statistics import Measurement

CONCEPT = "concept: "


def findings(found: Concepts) -> list[str]:
    return [
        *_scores(found),
        *_accuracy(found),
        *(sentence for label in ("high", "low") for sentence in _silenced(found.effect(label), label)),
        *_against(found),
        *(sentence for effect in found.effects for sentence in _own(effect)),
        *_skew(found),
    ]


def _scores(found: Concepts) -> list[str]:
    texts = found.heads[0]["of"]
    high = found.classes.get("high", 0)
    middle = median(row["score"] for row in found.heads)
    lines = [
        f"{high} of {len(found.heads)} described heads have {texts} texts of one concept; the texts of "
        f"{found.classes.get('low', 0)} share none. The median score is {middle:g}."
    ]
    named = Counter(row["concept"] for row in found.heads if row["kind"] == "high")
    if named:
        lines.append(f"What the high heads speak of: {', '.join(f'{name} {n}' for name, n in named.most_common())}.")
    return lines


def _accuracy(found: Concepts) -> list[str]:
    rows = found.base["accuracy"]
    if SAME in rows:
        return []
    shown = ", ".join(f"{name} {100 * row['value']:.1f} %" for name, row in rows.items())
    return [f"Zero-shot accuracy with all heads: {shown}."]


def _silenced(effect: Effect | None, label: str) -> list[str]:
    if effect is None:
        return []
    count = len(effect.heads)
    what = "of the nearest texts" if SAME in effect.questions else "of accuracy"
    sentence = f"Silencing the {count} {label} head{'s' if count > 1 else ''} costs {points(effect.drop())} {what}."
    own, other = mean_drops(effect.equal)
    if effect.equal is None or math.isnan(own):
        return [sentence]
    return [
        f"{sentence} At equal count, {effect.equal['count']} of them cost{'' if effect.equal['count'] > 1 else 's'} "
        f"{points(own)} and as many other heads of the same layers {points(other)}."
    ]


def _against(found: Concepts) -> list[str]:
    high, low = mean_drops(found.against)
    if found.against is None or math.isnan(high):
        return []
    return [f"{found.against['count']} random high heads cost {points(high)}, as many low heads {points(low)}."]


def _own(effect: Effect) -> list[str]:
    """A concept's heads on the questions of their concept and on the others."""
    concept = effect.label.removeprefix(CONCEPT)
    if not effect.label.startswith(CONCEPT) or concept not in effect.questions or len(effect.questions) < 2:
        return []
    others = [row["drop"][0] for name, row in effect.questions.items() if name != concept]
    own, count = effect.questions[concept]["drop"][0], len(effect.heads)
    return [
        f"Silencing the {count} {concept} head{'s' if count > 1 else ''} costs {points(own)} on {concept} and "
        f"{points(sum(others) / len(others))} on the other questions."
    ]


def _skew(found: Concepts) -> list[str]:
    base = found.base.get("skew")
    known = [(e.label, e.skew["value"]) for e in found.effects if e.skew is not None]
    if base is None or not known:
        return []
    start = (
        f"Retrieval by neutral prompts has a mean MaxSkew of {base['value']:.2f} nats, lists drawn blindly "
        f"{base['chance']:.2f}"
    )
    label, least = min(known, key=lambda row: row[1])
    low, high = interval(base)
    if low is None or high is None:
        return [f"{start}; one prompt has no interval to hold the silenced sets against."]
    if least >= low:
        return [f"{start}; no silenced set takes it below its interval, {low:.2f} to {high:.2f}."]
    return [f"{start}; silencing “{label.removeprefix(CONCEPT)}” heads lowers it most, to {least:.2f}."]


def interval(skew: dict[str, Any]) -> tuple[float | None, float | None]:
    """The bounds of a mean skew; None where they are unknown, as for one prompt."""
    found = Measurement.from_dict({name: skew[name] for name in ("value", "low", "high", "n", "seeds", "unit")})
    known = found.low is not None and found.high is not None and math.isfinite(found.low) and math.isfinite(found.high)
    return (found.low, found.high) if known else (None, None)


def points(share: float) -> str:
    """A share of accuracy as percentage points."""
    return f"{100 * share:.1f} points".replace("-", "−")
