"""The page of `headway compare`: the table, the frontier, curves by budget, and what ran. Its shell is
`headway.pages`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from headway.compare.cells import Score, title
from headway.compare.methods import percent
from headway.compare.quality import TASKS
from headway.compare.recommend import is_judged, ratio_of, whole_loss
from headway.compare.result import COSTS, Comparison, Loss, Point, pareto
from headway.pages.plain import rounded
from headway.pages.shell import flat, model_parts, provenance, render_page

SCRIPTS = ("frontier.js", "budgets.js")
STYLES = ("compare.css",)
WORST = "worst loss"
MISSING = "–"
#: Characters of a stage with its options; some hold tensors.
STAGE_SHOWN = 260


def render(comparison: Comparison) -> str:
    """The page as one self-contained HTML file, without any network access."""
    name = comparison.model.get("name", "model")
    run = comparison.run
    return render_page(
        "headway.compare",
        "compare.html.j2",
        styles=STYLES,
        scripts=SCRIPTS,
        data=payload(comparison),
        verb="compare",
        heading=name,
        title=f"{name}: methods beside dense attention",
        subtitle=" · ".join([*model_parts(comparison.model), f"{run.get('tokens', 0):,} tokens"]),
        provenance=provenance(run),
        findings=[tied(sentence) for sentence in comparison.findings],
        warnings=[tied(sentence) for sentence in comparison.warnings],
        recommendation=tied(comparison.recommendation.sentence),
        facts=[("Model", list(flat(comparison.model))), ("Run", list(flat(run)))],
        sections=[
            ("table", "All points"),
            ("frontier", "Frontier"),
            ("budgets", "By budget"),
            *([("scores", "More scores")] if more_scores(comparison)[0] else []),
            ("ran", "What ran"),
        ],
        more=more_scores(comparison),
        headings=headings(comparison),
        rows=[row(comparison, point) for point in comparison.points],
        ran=[ran(point) for point in comparison.points],
        tasks=[(task, TASKS[task].summary) for task in run.get("tasks", ()) if task in TASKS],
        tolerance=percent(comparison.recommendation.tolerance),
    )


def payload(comparison: Comparison) -> dict[str, Any]:
    """What the scripts read: points with their numbers, the axes, and the frontier for every pair of axes."""
    points = comparison.points
    qualities: list[dict[str, Any]] = [
        {"name": title(*quality), "label": quality_label(comparison, quality), "higher": is_higher(points[0], quality)}
        for quality in comparison.qualities
    ]
    if any(point.worst for point in points):
        qualities.insert(0, {"name": WORST, "label": "worst loss against dense", "higher": False})
    values = {q["name"]: [_value(point, q["name"]) for point in points] for q in qualities}
    costs = [{"name": name, "label": label} for name, label in COSTS.items() if _known(points, name)]
    frontiers = {
        f"{q['name']}|{c['name']}": pareto(
            [whole_loss(point, comparison.judged) for point in points]
            if q["name"] == WORST
            else [value[0] for value in values[q["name"]]],
            [point.costs.get(c["name"], math.nan) for point in points],
            higher_is_better=q["higher"],
        )
        for q in qualities
        for c in costs
    }
    return rounded(
        {
            "points": [
                {
                    "label": point.label,
                    "method": point.method,
                    "budget": point.budget,
                    "whole": point.is_dense or is_judged(point, comparison.judged),
                    "missing": list(point.states),
                    "costs": point.costs,
                    "noise": [name for name in ("request", "prefill", "decode") if ratio_of(point, name).is_noise],
                    "values": {name: found[i] for name, found in values.items()},
                }
                for i, point in enumerate(points)
            ],
            "qualities": qualities,
            "costs": costs,
            "frontiers": frontiers,
            "noise": {name: _interval(points[0], name) for name in ("request", "prefill", "decode")},
            "recommended": comparison.recommendation.label,
            "saves": comparison.recommendation.saves,
            "tolerance": comparison.recommendation.tolerance,
        }
    )


def headings(comparison: Comparison) -> list[tuple[str, str]]:
    """Column heads of the table: words, and what the number is."""
    dense = comparison.dense
    found = [("Method", ""), ("Budget", "of the keys")]
    for quality in comparison.qualities:
        score = dense.score(*quality)
        found.append((title(*quality), score.name if score and score.name != quality[0] else ""))
    return [
        *found,
        ("Worst loss", "against dense"),
        ("Prefill", "s (× dense)"),
        ("Decode", "ms per token (× dense)"),
        ("KV bytes", "MB (× dense)"),
        ("Density", "prefill, decode"),
    ]


def row(comparison: Comparison, point: Point) -> dict[str, Any]:
    """One row of the table: cells of (value, note); a point without numbers has its reason in their place."""
    cells = [_score_cell(point.score(*quality), point) for quality in comparison.qualities]
    cells.append(_loss_cell(point.worst, point))
    cells += [_time_cell(point, "prefill"), _time_cell(point, "decode"), _bytes_cell(point), _density_cell(point)]
    return {
        "method": point.method,
        "summary": point.summary,
        "budget": MISSING if point.budget is None else percent(point.budget),
        "cells": cells,
        "reason": "" if point.scores or point.timing else listed(point.reasons.values()),
        "status": point.status,
        "dense": point.is_dense,
        "recommended": point.label == comparison.recommendation.label,
    }


def more_scores(comparison: Comparison) -> tuple[list[tuple[str, str]], list[tuple[str, list[tuple[str, str]]]]]:
    """The scores that stand beside the first ones: column heads, and a row of cells for every point that has any."""
    found = [score for point in comparison.points for score in point.scores if not score.primary]
    columns = list(dict.fromkeys((score.name, score.label) for score in found))
    rows = []
    for point in comparison.points:
        known = {(score.name, score.label): score for score in point.scores if not score.primary}
        if known:
            rows.append((point.label, [_score_cell(known.get(column), point) for column in columns]))
    return columns, rows


def ran(point: Point) -> dict[str, Any]:
    """Which paths ran in the timed request, the densities by task, and the stages."""
    calls = sum(point.paths.values())
    densities = [f"{task} {number(found['all'])}" for task, found in point.density_by_task.items() if "all" in found]
    for phase, sites in point.density_by_head.items():
        heads = [share for shares in sites.values() for share in shares]
        if heads and min(heads) < max(heads):
            densities.append(f"{phase} by head {number(min(heads), 2)} to {number(max(heads), 2)}")
    return {
        "label": point.label,
        "stages": ", ".join(stage if len(stage) <= STAGE_SHOWN else f"{stage[:STAGE_SHOWN]}…" for stage in point.stages)
        or ("nothing attached" if point.is_dense else MISSING),
        "paths": ", ".join(f"{path} {percent(_short(count / calls))}" for path, count in point.paths.items())
        or ("native 100 %" if point.timing and not point.stages else MISSING),
        "densities": "; ".join(densities) or MISSING,
        "reasons": listed(f"{task}: {reason}" for task, reason in point.reasons.items()),
    }


def listed(sentences: Iterable[str]) -> str:
    """Sentences one after the other, each once."""
    return "; ".join(dict.fromkeys(sentence.removesuffix(".") for sentence in sentences))


def tied(sentence: str) -> str:
    """The sentence with its units tied to their numbers, so that no line begins with one."""
    return re.sub(r"(?<=\d) (?=[%×])", "\u00a0", sentence)


def number(value: float | None, digits: int = 3) -> str:
    """A number for reading, with an en dash for a missing one."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value and abs(value) < 10.0 ** -(digits + 1):
        return f"{value:.1e}".replace("-", "−")
    short = f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"
    return (f"{float(short):.{digits}g}" if "e" in short else short).replace("-", "−")


def quality_label(comparison: Comparison, quality: tuple[str, str]) -> str:
    score = comparison.dense.score(*quality)
    return title(*quality) if score is None or score.name == quality[0] else f"{title(*quality)}: {score.name}"


def is_higher(dense: Point, quality: tuple[str, str]) -> bool:
    score = dense.score(*quality)
    return score is None or score.higher_is_better


def _interval(point: Point, what: str) -> list[float]:
    ratio = ratio_of(point, what)
    return [ratio.low, ratio.high]


def _known(points: Sequence[Point], cost: str) -> bool:
    return any(math.isfinite(point.costs.get(cost, math.nan)) for point in points)


def _value(point: Point, name: str) -> list[float]:
    """Value, low and high of a quality."""
    if name == WORST:
        found: Any = Loss(task="", mode="", value=0.0, low=0.0, high=0.0) if point.is_dense else point.worst
    else:
        found = next((s for s in point.scores if s.primary and s.label == name), None)
    return [math.nan] * 3 if found is None else [found.value, found.low, found.high]


def _score_cell(score: Score | None, point: Point) -> tuple[str, str]:
    if score is None:
        return MISSING, ""
    interval = f"{number(score.low, 2)} to {number(score.high, 2)}" if math.isfinite(score.low) else ""
    return number(score.value), interval


def _loss_cell(loss: Loss | None, point: Point) -> tuple[str, str]:
    if point.is_dense or loss is None:
        return MISSING, ""
    unit = " %" if loss.task in ("perplexity", "streaming", "fidelity") else " points"
    return f"{number(100 * loss.value, 2)}{unit}", loss.label


def _time_cell(point: Point, what: str) -> tuple[str, str]:
    if point.timing is None:
        return MISSING, ""
    seconds = point.timing.prefill_seconds if what == "prefill" else 1e3 * point.timing.decode_seconds
    ratio = ratio_of(point, what)
    noise = ", noise" if ratio.is_noise and not point.is_dense else ""
    shown = "" if point.is_dense or not math.isfinite(ratio.value) else f"{number(ratio.value, 2)}×{noise}"
    return number(seconds), shown


def _bytes_cell(point: Point) -> tuple[str, str]:
    if point.cache_bytes is None:
        return MISSING, ""
    return number(point.cache_bytes / 1e6), "" if point.is_dense else f"{number(point.costs['memory'], 2)}×"


def _density_cell(point: Point) -> tuple[str, str]:
    found = [number(point.density[phase], 2) for phase in ("prefill", "decode") if phase in point.density]
    return ", ".join(found) or MISSING, ""


def _short(share: float) -> float:
    return float(f"{share:.2g}")
