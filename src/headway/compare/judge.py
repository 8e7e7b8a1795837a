"""From cells to a comparison: losses and costs against dense, the warnings, and one sentence that recommends.

A loss is paired by sample. Of a perplexity it is the relative rise, exp(mean(nll − nll of dense)) − 1; of a score
between 0 and 1 the drop, mean(dense − score); of an output error the error itself. The recommended point is the
cheapest whose worst loss is within the tolerance; cheaper means that the interval of the paired time ratio lies below
1, or that fewer KV bytes are held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.compare.cells import FAILED, LEFT_OUT, MEASURED, REFUSED, Cell, Score, title
from headway.compare.methods import Candidate, percent
from headway.compare.quality import TASKS
from headway.compare.recommend import recommend, times, whole_loss
from headway.compare.result import Comparison, Loss, Point, pareto
from headway.compare.setting import bootstrap_mean
from headway.compare.speed import SPEED

#: Dense must reach this on a task before a drop from it says anything.
FLOOR = 0.2
#: One-minute load average above which something else is running and times mislead.
BUSY = 1.0


def conclude(
    chosen: Sequence[Candidate],
    cells: Sequence[Sequence[Cell]],
    model: dict[str, Any],
    run: dict[str, Any],
    notes: Sequence[str] = (),
) -> Comparison:
    """The comparison of candidates, dense first, each with its cells."""
    points = [point_of(candidate, found) for candidate, found in zip(chosen, cells, strict=True)]
    dense = points[0]
    qualities = [(score.task, score.mode) for score in dense.scores if score.primary]
    judged = _judged(dense, qualities)
    for point in points:
        point.losses = [
            loss_of(score, base)
            for task, mode in judged
            if (score := point.score(task, mode)) and (base := dense.score(task, mode))
        ]
        point.costs = costs_of(point, dense)
    recommendation = recommend(points, judged, tolerance=run["tolerance"], save=run["save"])
    return Comparison(
        model=model,
        run=run,
        qualities=qualities,
        judged=judged,
        points=points,
        recommendation=recommendation,
        findings=[recommendation.sentence, *_findings(points, qualities, judged)],
        warnings=[*notes, *_warnings(points, qualities, judged, run)],
    )


def point_of(candidate: Candidate, cells: Sequence[Cell]) -> Point:
    """A point from its cells; its times, bytes, densities and paths are those of the timed request."""
    speed = next(cell for cell in cells if cell.task == SPEED)
    states = {cell.status for cell in cells}
    return Point(
        method=candidate.method,
        budget=candidate.budget,
        summary=candidate.summary,
        stages=[repr(stage) for stage in candidate.stages],
        status=states.pop() if len(states) == 1 else "partly measured",
        reasons={cell.task: cell.reason for cell in cells if cell.status != MEASURED},
        states={cell.task: cell.status for cell in cells if cell.status != MEASURED},
        scores=[score for cell in cells for score in cell.scores],
        notes=list(dict.fromkeys(note for cell in cells for note in cell.notes)),
        timing=speed.timing,
        cache_bytes=speed.cache_bytes,
        density=speed.density,
        density_by_task={cell.task: cell.density for cell in cells if cell.status == MEASURED},
        density_by_head=speed.density_by_head,
        paths=speed.paths or _paths(cells),
    )


def _paths(cells: Sequence[Cell]) -> dict[str, int]:
    return next((cell.paths for cell in cells if cell.paths), {})


def loss_of(score: Score, dense: Score) -> Loss:
    """What was lost against dense, paired by part."""
    if score.task == "fidelity":
        low, high = bootstrap_mean((np.array(score.parts) - np.array(dense.parts)).tolist())
        return Loss(task=score.task, mode=score.mode, value=score.value - dense.value, low=low, high=high)
    if not score.higher_is_better:
        pairs = np.array(score.parts) - np.array(dense.parts)
        low, high = (math.expm1(x) for x in bootstrap_mean(pairs.tolist()))
        return Loss(task=score.task, mode=score.mode, value=score.value / dense.value - 1, low=low, high=high)
    pairs = np.array(dense.parts) - np.array(score.parts)
    low, high = bootstrap_mean(pairs.tolist())
    return Loss(task=score.task, mode=score.mode, value=dense.value - score.value, low=low, high=high)


def costs_of(point: Point, dense: Point) -> dict[str, float]:
    """Multiples of dense, which costs 1 whatever it was timed at against itself; of a request's pairs of query and key,
    the share that is read."""
    costs = dict.fromkeys(("request", "prefill", "decode", "memory", "density"), math.nan)
    if point.is_dense:
        costs |= {"request": 1.0, "prefill": 1.0, "decode": 1.0, "density": 1.0}
    elif point.timing is not None:
        costs |= {name: point.timing.ratio(name).value for name in ("request", "prefill", "decode")}
        read, written = point.timing.tokens / 2, point.timing.new_tokens
        prefill = point.density.get("prefill", math.nan)
        decode = point.density.get("decode", prefill)
        costs["density"] = (prefill * read + decode * written) / (read + written)
    if point.cache_bytes and dense.cache_bytes:
        costs["memory"] = point.cache_bytes / dense.cache_bytes
    return costs


def _judged(dense: Point, qualities: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those that count in losses: of tasks that judge (agreement, when there is no other) and that dense can do."""
    judging = [q for q in qualities if TASKS[q[0]].judges] or list(qualities)
    return [q for q in judging if not _is_beyond(dense, q)]


def _is_beyond(dense: Point, quality: tuple[str, str]) -> bool:
    score = dense.score(*quality)
    return score is None or not math.isfinite(score.value) or (score.higher_is_better and score.value < FLOOR)


def _findings(
    points: Sequence[Point], qualities: Sequence[tuple[str, str]], judged: Sequence[tuple[str, str]]
) -> list[str]:
    dense = points[0]
    scores = [score for quality in qualities if (score := dense.score(*quality))]
    said = "; ".join(f"{score.label} {score.value:.3g}" for score in scores)
    sentences = [f"Dense: {said}."]
    if dense.timing is not None:
        same = dense.timing.ratio("request")
        held = f", and {dense.cache_bytes / 1e6:.3g} MB of keys and values" if dense.cache_bytes else ""
        sentences[0] = (
            f"Dense: {said}. It takes {dense.timing.prefill_seconds:.3g} s to read {dense.timing.tokens:,} tokens, "
            f"{1e3 * dense.timing.decode_seconds:.3g} ms per token after that{held}."
        )
        sentences.append(
            f"Dense timed against itself: {times(same.value)} ({same.low:.2f} to {same.high:.2f}) for a whole request; "
            "differences of that size are noise."
        )
    worst = [whole_loss(point, judged) for point in points]
    front = pareto(worst, [point.costs["request"] for point in points], higher_is_better=False)
    if len(front) > 1:
        names = ", ".join(points[i].label for i in front)
        sentences.append(f"{len(front)} of {len(points)} points lie on the frontier of loss against time: {names}.")
    return sentences


def _warnings(
    points: Sequence[Point],
    qualities: Sequence[tuple[str, str]],
    judged: Sequence[tuple[str, str]],
    run: dict[str, Any],
) -> list[str]:
    dense, notes = points[0], []
    beyond = [quality for quality in qualities if _is_beyond(dense, quality)]
    if beyond:
        said = ", ".join(
            f"{title(*quality)} ({'nothing' if (score := dense.score(*quality)) is None else f'{score.value:.2g}'})"
            for quality in beyond
        )
        notes.append(f"Dense scores below {FLOOR} on {said}: a loss could not show there, so it does not count.")
    few = sorted({score.n for q in judged if (score := dense.score(*q)) and score.higher_is_better})
    if few and few[0] < 20:
        notes.append(f"{few[0]} samples of a task: one answer moves its score by {1 / few[0]:.2g}. Ask for more.")
    for method in dict.fromkeys(point.method for point in points[1:]):
        notes += dict.fromkeys(note for point in points if point.method == method for note in point.notes)
        notes += _method_notes([point for point in points if point.method == method])
    load = run.get("load_average")
    if load is not None and load > BUSY:
        notes.append(f"The load average was {load:.2g} when the run began: something else was running, times mislead.")
    return notes


def _method_notes(points: Sequence[Point]) -> list[str]:
    """What one method did not do: each kind once, with the first of its reasons; all stand with what ran."""
    notes = []
    words = {REFUSED: "refused", FAILED: "broke on", LEFT_OUT: "cannot be shown by"}
    for status, verb in words.items():
        found = [(point, task) for point in points for task, state in point.states.items() if state == status]
        if not found:
            continue
        tasks = list(dict.fromkeys(task for _, task in found))
        everything = all(point.status == status for point, _ in found)
        point, task = found[0]
        at = _budgets([point for point, _ in found])
        notes.append(f"{points[0].method}{at} {verb} {'everything' if everything else '; '.join(tasks)}: "
                     f"{point.reasons[task]}")  # fmt: skip
    idle = [
        point
        for point in points
        if point.budget is not None
        and point.budget < 1
        and {"prefill", "decode"} <= set(point.density)
        and min(point.density.values()) > 0.999
        and not any("edit" in path for path in point.paths)
    ]
    if idle:
        paths = ", ".join(dict.fromkeys(path for point in idle for path in point.paths)) or "native"
        notes.append(f"{points[0].method}{_budgets(idle)} read everything: the budget had no effect ({paths}).")
    return notes


def _budgets(points: Sequence[Point]) -> str:
    shares = list(dict.fromkeys(percent(point.budget) for point in points if point.budget is not None))
    return f" at {', '.join(shares)}" if shares else ""
