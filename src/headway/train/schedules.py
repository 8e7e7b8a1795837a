"""How the learning rate moves: a schedule gives the share of the peak rate at a step, and depends on nothing else.

    warm-up:   (step + 1) / warmup                                        while step < warmup
    constant:  1
    linear:    1 − (1 − floor) · x
    cosine:    floor + (1 − floor) · (1 + cos πx) / 2
    wsd:       1, then over the last `decay` steps  1 − (1 − floor) · f(x)     (warm-up, stable, decay)

x is the part of the steps after the warm-up (of the decay, for wsd) that lies behind: 0 at its first step, 1 after its
last. Steps count from 0. Since a schedule remembers nothing, a resumed run needs nothing of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from headway.errors import ArgumentError, unknown

#: The share of the peak learning rate at a step, counted from 0.
Schedule = Callable[[int], float]

#: How wsd falls: the share of the way down after the part x of the decay.
FALLS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: x,
    "sqrt": math.sqrt,
    "cosine": lambda x: 0.5 * (1 - math.cos(math.pi * x)),
}
#: The part of a wsd schedule that is decay when nothing else is said; 10 to 20 per cent are usual.
WSD_DECAY = 0.2


def constant(steps: int, *, warmup: int = 0) -> Schedule:
    """The peak rate after the warm-up, for ever."""
    _check(steps, warmup)
    return lambda step: _rise(step, warmup) if step < warmup else 1.0


def linear(steps: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """A straight line from the peak to `floor` of it."""
    _check(steps, warmup, floor)

    def share(step: int) -> float:
        return _rise(step, warmup) if step < warmup else 1 - (1 - floor) * _part(step, warmup, steps)

    return share


def cosine(steps: int, *, warmup: int = 0, floor: float = 0.0) -> Schedule:
    """Half a cosine from the peak to `floor` of it."""
    _check(steps, warmup, floor)

    def share(step: int) -> float:
        if step < warmup:
            return _rise(step, warmup)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * _part(step, warmup, steps)))

    return share


def wsd(steps: int, *, warmup: int = 0, decay: int | None = None, floor: float = 0.0, fall: str = "linear") -> Schedule:
    """Warm-up, stable, decay: the peak until `decay` steps before the end (a fifth of all by default), then down to
    `floor` of it, in the manner `fall`: "linear", "sqrt" (steep first), or "cosine"."""
    _check(steps, warmup, floor)
    if fall not in FALLS:
        raise unknown("fall", fall, FALLS)
    decay = max(1, round(WSD_DECAY * steps)) if decay is None else decay
    if not 0 <= decay <= steps - warmup:
        raise ArgumentError(
            f"decay: got {decay} steps, expected 0..{steps - warmup}: {steps} steps in all, {warmup} of them warm-up."
        )
    start, down = steps - decay, FALLS[fall]

    def share(step: int) -> float:
        if step < warmup:
            return _rise(step, warmup)
        return 1.0 if step < start else 1 - (1 - floor) * down(_part(step, start, steps))

    return share


SCHEDULES: dict[str, Callable[..., Schedule]] = {
    "cosine": cosine,
    "wsd": wsd,
    "linear": linear,
    "constant": constant,
}


def schedule(kind: str | Schedule, steps: int, *, warmup: int = 0) -> Schedule:
    """A schedule by its name, or the given function of the step as it is (its warm-up is its own)."""
    if callable(kind):
        return kind
    if kind not in SCHEDULES:
        raise unknown("schedule", kind, SCHEDULES)
    return SCHEDULES[kind](steps, warmup=warmup)


def _rise(step: int, warmup: int) -> float:
    return (step + 1) / warmup


def _part(step: int, start: int, end: int) -> float:
    return min(1.0, (step - start) / max(end - start, 1))


def _check(steps: int, warmup: int, floor: float = 0.0) -> None:
    if steps < 1:
        raise ArgumentError(f"steps: got {steps}, expected at least 1.")
    if not 0 <= warmup <= steps:
        raise ArgumentError(f"warmup: got {warmup} steps, expected 0..{steps} (all steps).")
    if not 0 <= floor <= 1:
        raise ArgumentError(f"floor: got {floor}, expected a share of the peak rate in 0..1.")
