"""Focal heads and layers: which heads drift most, in which layers they stand, and whether they matter.

    focal heads    the top k % of all heads by drift score
    focal layers   the fewest layers that hold at least half of the focal heads' score, or the best window of m layers
    concentration  the share of focal heads in the middle third of the layers, beside what random heads would have
    causal check   the same number of heads silenced at random, in the same layers and anywhere

Paper: Diagnose, Localize, Align, arXiv 2509.23188. The paper gives neither k nor the rule for layers: k = 10 %, the
cover of one half and the controls are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from jaxtyping import Float
from scipy import stats
from torch import nn

from headway.door import HeadGate, use
from headway.errors import ArgumentError
from headway.statistics import Measurement, Null, against_null, bootstrap, matched_controls

Head = tuple[int, int]
SHARE, COVER = 0.10, 0.5
#: k of the sheet: at most a fifth of the heads is still a localisation.
LARGEST_SHARE = 0.20


@dataclass(frozen=True)
class Concentration:
    """Share of focal heads in the middle third of the layers, the share of all heads there, and the chance that as many
    random heads would hold at least as many (hypergeometric)."""

    share: float
    expected: float
    p_value: float


@dataclass(frozen=True)
class GateEffect:
    """What silencing the focal heads does to a measure, beside controls of as many heads.

    `focal` is the mean absolute change over items, `control` that of the controls (mean over sets). `ratio` is focal /
    control, `null` where the focal effect stands among the controls."""

    focal: Measurement
    control: Measurement
    ratio: float
    null: Null
    by_control: tuple[float, ...]


def focal_heads(scores: Float[np.ndarray, "layers heads"], *, share: float = SHARE) -> list[Head]:
    """The (layer row, head) pairs with the highest scores: `share` of all heads, at least one. Ties go to the earlier
    layer and head. Raises ArgumentError outside (0, 0.2]."""
    if not 0 < share <= LARGEST_SHARE:
        raise ArgumentError(f"share: got {share}, expected above 0 and at most {LARGEST_SHARE}: 0.1 is ten percent.")
    if scores.ndim != 2 or not np.isfinite(scores).all():
        raise ArgumentError(f"scores: got shape {scores.shape} or values not finite, expected (layers, heads) numbers.")
    count = max(1, round(share * scores.size))
    order = np.argsort(-scores.ravel(), kind="stable")[:count]
    return sorted((int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order)


def focal_layers(
    scores: Float[np.ndarray, "layers heads"],
    heads: Sequence[Head],
    *,
    cover: float = COVER,
    window: int | None = None,
) -> list[int]:
    """The fewest layers that hold `cover` of the score of the focal heads; with `window`, the run of so many
    neighbouring layers that holds most of it."""
    if not heads:
        raise ArgumentError("heads: got none, expected at least one focal head.")
    mass = np.zeros(scores.shape[0])
    for layer, head in heads:
        mass[layer] += scores[layer, head]
    if window is not None:
        if not 1 <= window <= mass.size:
            raise ArgumentError(f"window: got {window}, expected 1..{mass.size} layers.")
        sums = np.convolve(mass, np.ones(window), mode="valid")
        start = int(np.argmax(sums))
        return list(range(start, start + window))
    if not 0 < cover <= 1:
        raise ArgumentError(f"cover: got {cover}, expected a share in (0, 1].")
    order = np.argsort(-mass, kind="stable")
    if mass.sum() == 0:
        return [int(order[0])]
    enough = int(np.searchsorted(np.cumsum(mass[order]), cover * mass.sum() * (1 - 1e-12))) + 1
    return sorted(int(layer) for layer in order[:enough])


def inverse_layers(scores: Float[np.ndarray, "layers heads"], count: int) -> list[int]:
    """The `count` layers whose heads drift least on average: the control that should not help."""
    _check_count(count, scores.shape[0])
    return sorted(int(layer) for layer in np.argsort(scores.mean(1), kind="stable")[:count])


def random_layers(layers: int, count: int, *, generator: np.random.Generator, avoid: Sequence[int] = ()) -> list[int]:
    """`count` random layers; not those of `avoid` as far as enough others are left."""
    _check_count(count, layers)
    free = [layer for layer in range(layers) if layer not in set(avoid)]
    taken = generator.permutation(free)[:count].tolist()
    rest = generator.permutation(sorted(set(avoid)))[: count - len(taken)].tolist()
    return sorted(int(layer) for layer in taken + rest)


def middle_third(layers: int) -> list[int]:
    """The layers whose middle lies in the middle third of the depth."""
    return [layer for layer in range(layers) if 1 / 3 <= (layer + 0.5) / layers < 2 / 3]


def concentration(heads: Sequence[Head], shape: tuple[int, int]) -> Concentration:
    """How far focal heads gather in the middle third of a model with `shape` (layers, heads)."""
    layers, per_layer = shape
    middle = set(middle_third(layers))
    inside = sum(layer in middle for layer, _ in heads)
    total = layers * per_layer
    chance = float(stats.hypergeom.sf(inside - 1, total, len(middle) * per_layer, len(heads)))
    return Concentration(inside / len(heads), len(middle) / layers, chance)


def gate_effect(
    model: nn.Module,
    heads: Sequence[Head],
    measure: Callable[[], Sequence[float]],
    *,
    shape: tuple[int, int],
    generator: np.random.Generator,
    draws: int = 8,
    same_layer: bool = True,
    gate: float = 0.0,
    layers: Sequence[int] | None = None,
    before: Sequence[float] | None = None,
    keep: Callable[[list[Head], Callable[[], list[float]]], list[float]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GateEffect:
    """Silences the focal heads, then as many others, and compares how far `measure` moves.

    `measure()` runs the model and gives one number per item (which rule wins, and by how much); whatever is attached is
    measured. Controls are drawn in the same layers, or anywhere. `layers` are the layer numbers where rows of scores
    are not (heads name rows), `before` what `measure` gives with nothing silenced, `keep(heads, make)` may answer for
    `make()` from a store."""
    controls = matched_controls(heads, shape, generator, same_layer=same_layer, draws=draws)
    numbers = range(shape[0]) if layers is None else layers
    moved: list[np.ndarray] = []

    def silenced(some: Sequence[Head]) -> list[float]:
        with use(model, HeadGate(gates=dict.fromkeys([(numbers[row], head) for row, head in some], gate))):
            return [float(value) for value in measure()]

    with use(model):
        start = np.asarray(measure() if before is None else before, dtype=float)
        for number, some in enumerate([list(heads), *controls]):
            values = silenced(some) if keep is None else keep(some, partial(silenced, some))
            moved.append(np.abs(np.asarray(values, dtype=float) - start))
            if progress is not None:
                progress(number + 1, draws + 1)
    means = [float(values.mean()) for values in moved[1:]]
    control = float(np.mean(means))
    return GateEffect(
        focal=bootstrap(moved[0], generator=generator),
        control=bootstrap(np.mean(moved[1:], 0), generator=generator),
        ratio=float(moved[0].mean()) / control if control > 0 else math.inf,
        null=against_null(float(moved[0].mean()), means),
        by_control=tuple(means),
    )


def _check_count(count: int, layers: int) -> None:
    if not 1 <= count <= layers:
        raise ArgumentError(f"count: got {count}, expected 1..{layers} layers.")
