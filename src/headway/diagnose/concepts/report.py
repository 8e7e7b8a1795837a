"""The page of `headway diagnose concepts`: heads with their texts, what silencing costs, and the skew of retrieval. Its
shell is `headway.pages`."""

from __future__ import annotations

from typing import Any

from headway.diagnose.concepts.findings import CONCEPT, interval
from headway.diagnose.concepts.result import Concepts, Effect, mean_drops
from headway.diagnose.page import diagnosis_page, run_and_settings
from headway.pages.plain import rounded


def render(found: Concepts) -> str:
    """The page as one self-contained HTML file, without any network access."""
    sections = [("heads", "Heads"), ("scores", "Scores"), ("silenced", "Silencing heads")]
    if len(found.base["accuracy"]) > 1 and any(e.label.startswith(CONCEPT) for e in found.effects):
        sections.append(("questions", "Concepts and questions"))
    if found.base.get("skew") is not None:
        sections.append(("skew", "Skew of retrieval"))
    errors = {f"{name} tower off by": f"{error:.1e}" for name, error in found.errors.items()}
    return diagnosis_page(
        found,
        "concepts",
        about="concepts of its heads",
        counts=[f"{len(found.heads)} heads described"],
        sections=sections,
        data=payload(found),
        facts=[*run_and_settings(found), ("Reconstruction", list(errors.items()))],
        heads=found.heads,
    )


def payload(found: Concepts) -> dict[str, Any]:
    """What the scripts read."""
    return rounded(
        {
            "heads": found.heads,
            "shares": found.shares,
            "concentrated": found.concentrated,
            "accuracy": {name: row["value"] for name, row in found.base["accuracy"].items()},
            "effects": [_effect(e) for e in found.effects],
            "against": _equal(found.against),
            "skew": _skews(found),
        }
    )


def _effect(effect: Effect) -> dict[str, Any]:
    return {
        "label": effect.label.removeprefix(CONCEPT),
        "concept": effect.label.startswith(CONCEPT),
        "heads": len(effect.heads),
        "drop": effect.drop(),
        "drops": {name: row["drop"] for name, row in effect.questions.items()},
        "equal": _equal(effect.equal),
    }


def _equal(equal: dict[str, Any] | None) -> dict[str, Any] | None:
    """The mean of both sets over questions, and every draw's mean."""
    if equal is None:
        return None
    own, other = mean_drops(equal)
    by_draw = list(zip(*equal["drops"].values(), strict=True))
    draws = [[sum(pair[side] for pair in draw) / len(draw) for draw in by_draw] for side in (0, 1)]
    return {"count": equal["count"], "own": own, "other": other, "draws": draws}


def _skews(found: Concepts) -> list[dict[str, Any]]:
    base = found.base.get("skew")
    if base is None:
        return []
    rows = [("all heads at work", base)]
    rows += [(e.label.removeprefix(CONCEPT), e.skew) for e in found.effects if e.skew is not None]
    bars = [
        {"label": label, "value": s["value"], **dict(zip(("low", "high"), interval(s), strict=True))}
        for label, s in rows
    ]
    bars.insert(1, {"label": "drawn blindly", "value": base["chance"], "low": None, "high": None})
    return bars
