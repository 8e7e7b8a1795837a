"""Which point to use, in one sentence with its numbers: what it loses, what it saves, and what of that is noise."""

from __future__ import annotations

import math
from collections.abc import Sequence

from headway.compare.cells import Ratio, title
from headway.compare.methods import percent
from headway.compare.result import Loss, Point, Recommendation
from headway.errors import unknown

#: KV bytes below this multiple of dense are worth a recommendation …
FEWER_BYTES = 0.95
#: … unless a request takes longer than this multiple; who wants the bytes anyway asks for them.
SLOWER = 1.1
SAVES = ("auto", "time", "memory")


def recommend(
    points: Sequence[Point], judged: Sequence[tuple[str, str]], *, tolerance: float, save: str = "auto"
) -> Recommendation:
    """The cheapest point whose worst loss is at most `tolerance`; dense when there is none. `points[0]` is dense.

    save: "time" of a whole request, "memory" (KV bytes), or "auto": time where any can be saved beyond noise, else KV
    bytes at no more than 1.1 times the time."""
    if save not in SAVES:
        raise unknown("save", save, SAVES)
    whole = [point for point in points[1:] if judged and is_judged(point, judged)]
    within = [point for point in whole if point.worst is not None and point.worst.value <= tolerance]
    faster = [point for point in within if ratio_of(point).is_faster]
    smaller = [point for point in within if point.costs.get("memory", math.nan) < FEWER_BYTES]
    quick = [point for point in smaller if ratio_of(point).value <= SLOWER]
    if save != "memory" and faster:
        best = min(faster, key=lambda point: (ratio_of(point).value, point.worst_value))
        return _use(best, "request", faster, tolerance)
    if (save == "memory" and smaller) or (save == "auto" and quick):
        pool = smaller if save == "memory" else quick
        best = min(pool, key=lambda point: (point.costs["memory"], point.worst_value))
        return _use(best, "memory", pool, tolerance)
    return _stay(judged, whole, within, smaller, tolerance, save)


def is_judged(point: Point, judged: Sequence[tuple[str, str]]) -> bool:
    """Whether every loss that counts was measured."""
    known = {(loss.task, loss.mode) for loss in point.losses if math.isfinite(loss.value)}
    return set(judged) <= known


def whole_loss(point: Point, judged: Sequence[tuple[str, str]]) -> float:
    """The worst loss of a point that was measured on everything that counts; NaN for others."""
    return point.worst.value if point.worst is not None and is_judged(point, judged) else math.nan


def ratio_of(point: Point, what: str = "request") -> Ratio:
    return Ratio(value=math.nan, low=math.nan, high=math.nan) if point.timing is None else point.timing.ratio(what)


def _use(best: Point, saves: str, pool: Sequence[Point], tolerance: float) -> Recommendation:
    loss, timing = best.worst, best.timing
    assert loss is not None
    assert timing is not None
    ratio, memory = ratio_of(best), best.costs["memory"]
    time = f"{times(ratio.value)} dense's time ({ratio.low:.2f} to {ratio.high:.2f})"
    held = "" if math.isnan(memory) else f"{times(memory)} the KV bytes"
    density = best.costs["density"]
    read = [f"reads {percent(_short(density))} of the pairs of query and key"] if math.isfinite(density) else []
    request = f"a request of {timing.tokens:,} tokens read and {timing.new_tokens} written"
    first, then = (f"takes {time} for {request}", f"holds {held}") if saves == "request" else (
        f"holds {held}", f"takes {time} for {request}")  # fmt: skip
    gains = " and ".join([", ".join(part for part in (first, then if held else "") if part), *read])
    sentences = [f"Use {best.label}: it {loss_words(loss, tolerance)}, {gains}."]
    if loss.high > tolerance:
        sentences.append(
            f"The interval of that loss reaches {percent(_short(loss.high))}, so more samples may change this."
        )
    noise = [f"{name} time" for name in ("request", "prefill", "decode") if ratio_of(best, name).is_noise]
    if noise:
        sentences.append(f"No difference from dense beyond noise: {', '.join(noise)}.")
    rivals = [point.label for point in pool if point is not best and _overlaps(ratio_of(point), ratio)]
    if saves == "request" and rivals:
        sentences.append(f"Its lead in time over {', '.join(rivals)} is within noise.")
    return Recommendation(label=best.label, saves=saves, tolerance=tolerance, sentence=" ".join(sentences))


def _stay(
    judged: Sequence[tuple[str, str]],
    whole: Sequence[Point],
    within: Sequence[Point],
    smaller: Sequence[Point],
    tolerance: float,
    save: str,
) -> Recommendation:
    allowed = percent(tolerance)
    if not judged:
        why = "no task was measured on which a loss could show."
    elif not whole:
        why = f"no other point was measured on all of {'; '.join(title(*q) for q in judged)}."
    elif not within:
        near = min(whole, key=lambda point: point.worst_value)
        assert near.worst is not None
        why = (
            f"every point loses more than the {allowed} allowed. The nearest, {near.label}, {loss_words(near.worst)} "
            f"and takes {times(ratio_of(near).value)} dense's time."
        )
    else:
        why = f"{len(within)} of {len(whole)} points stay within a loss of {allowed}, but none saves what counts."
        timed = [point for point in within if math.isfinite(ratio_of(point).value)]
        if save != "memory" and timed:
            best = min(timed, key=lambda point: ratio_of(point).value)
            ratio = ratio_of(best)
            word = "which is within noise" if ratio.is_noise else "slower than dense"
            why += (
                f" The fastest, {best.label}, takes {times(ratio.value)} dense's time ({ratio.low:.2f} to "
                f"{ratio.high:.2f}), {word}."
            )
        if smaller:
            least = min(smaller, key=lambda point: point.costs["memory"])
            why += (
                f" {least.label} holds {times(least.costs['memory'])} the KV bytes at "
                f"{times(ratio_of(least).value)} the time; --save memory would take it."
            )
        elif save != "time":
            why += " None holds fewer KV bytes."
    return Recommendation(label="dense", saves="", tolerance=tolerance, sentence=f"Stay dense: {why}")


def loss_words(loss: Loss, tolerance: float | None = None) -> str:
    """A loss as a verb and numbers: "raises perplexity by 1.2 % (0.3 to 2.1 %; 5 % allowed)"."""
    share = loss.task in ("perplexity", "streaming", "fidelity")
    notes = []
    if math.isfinite(loss.low) and math.isfinite(loss.high):
        notes.append(f"{_points(loss.low)} to {_points(loss.high)}{' %' if share else ''}")
    if tolerance is not None:
        notes.append(f"{percent(tolerance)} allowed")
    aside = f" ({'; '.join(notes)})" if notes else ""
    if loss.value <= 0:
        return f"loses nothing that was measured, at worst {_points(loss.value)} % on {loss.label}{aside}"
    if loss.task == "fidelity":
        return f"moves the output of attention by {_points(loss.value)} %, {loss.mode}{aside}"
    if share:
        return f"raises {loss.label} by {_points(loss.value)} %{aside}"
    return f"loses {_points(loss.value)} points of 100 on {loss.label}{aside}"


def times(value: float) -> str:
    return "an unknown multiple of" if not math.isfinite(value) else f"{value:.2f} ×"


def _points(share: float) -> str:
    return f"{100 * share:.2g}".replace("-", "−") if abs(share) < 1 else f"{100 * share:,.0f}".replace("-", "−")


def _short(share: float) -> float:
    return float(f"{share:.2g}")


def _overlaps(a: Ratio, b: Ratio) -> bool:
    return a.low <= b.high and b.low <= a.high
