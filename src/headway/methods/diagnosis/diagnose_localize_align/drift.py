"""Attention drift: how much each head changes when a message contradicts a rule.

For a head, a pair of prompts (n: in agreement, c: in conflict) of one token length, and query rows Q (the last prompt
token and the first r response tokens, the same response in both), let a be the mean over Q of the head's attention
rows and o that of its value-weighted output:

    M = | ‖o^c‖ − ‖o^n‖ | / (‖o^n‖ + ε)             magnitude shift
    D = 1 − cos(o^c, o^n)                            direction reorientation
    R = JSD(a^c, a^n) / ln 2                         distribution reshaping, without the first token, renormalised
    S = Σ_i ω_i ( rank M_i + rank D_i + rank R_i ) / 3

The rank of a head is the share of the other heads that moved strictly less in the same pair: values of early layers
would otherwise decide. ω_i ∝ max(0, CRAS(n) − CRAS(c)) where scores exist, else all alike.

Paper: Diagnose, Localize, Align, arXiv 2509.23188, names the three parts, S and the score difference; its formulas are
not public and these are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from inspect import signature

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy import stats
from torch import Tensor, nn

from headway.door import capture, use
from headway.door.evaluating import evaluating
from headway.errors import ArgumentError

EPS = 1e-6
PARTS = ("magnitude", "direction", "distribution")
Span = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class MatchedPair:
    """One prompt in agreement and one in conflict, each followed by the same response.

    `rows` are the query positions Q from the end of the sequence, negative: −1 is the last token. `spans` name
    [start, stop) token ranges of both sequences (they need not agree in place), such as "system" and "other"."""

    neutral: Int[Tensor, " tokens"]
    conflict: Int[Tensor, " tokens"]
    rows: tuple[int, ...]
    spans: dict[str, tuple[Span, Span]]
    kind: str = ""
    relation: str = ""
    name: str = ""


@dataclass(frozen=True)
class Drift:
    """The three parts for every pair, layer and head: arrays (pairs, layers, heads). `layers` are the layer numbers."""

    magnitude: Float[np.ndarray, "pairs layers heads"]
    direction: Float[np.ndarray, "pairs layers heads"]
    distribution: Float[np.ndarray, "pairs layers heads"]
    layers: tuple[int, ...]

    def part(self, name: str) -> Float[np.ndarray, "pairs layers heads"]:
        """One of `PARTS`."""
        return getattr(self, name)

    def scores(self, weights: Sequence[float] | None = None) -> Float[np.ndarray, "layers heads"]:
        """S by head, in [0, 1]. `weights` are the ω of the pairs, normalised here."""
        ranked = np.mean([_ranked(self.part(name)) for name in PARTS], axis=0)
        return np.einsum("p,plh->lh", _normalised(weights, ranked.shape[0]), ranked)

    def of(self, index: Sequence[int]) -> Drift:
        """The drift of some of the pairs."""
        picked = list(index)
        return Drift(self.magnitude[picked], self.direction[picked], self.distribution[picked], self.layers)


def attention_drift(
    model: nn.Module,
    pairs: Sequence[MatchedPair],
    *,
    by: str = "positions",
    progress: Callable[[int, int], None] | None = None,
) -> Drift:
    """The drift of every head over matched pairs, through the door: only the rows Q are read.

    by: "positions" compares attention key by key and needs pairs of one length; "spans" compares the masses on the
        named spans and on the rest, for pairs whose lengths differ.

    Raises ArgumentError for lengths that differ (naming both), spans outside the tokens, and rows outside."""
    if by not in ("positions", "spans"):
        raise ArgumentError(f"by: got {by!r}, expected 'positions' or 'spans'.")
    if not pairs:
        raise ArgumentError("pairs: got none, expected at least one matched pair.")
    found: list[Float[np.ndarray, "3 layers heads"]] = []
    layers: tuple[int, ...] = ()
    for pair in pairs:
        _check(pair, by)
    # The outer scope tests the host once; the readings inside need no test of their own.
    with evaluating(model), use(model):
        for number, pair in enumerate(pairs):
            same = pair.neutral.numel() == pair.conflict.numel()
            sides = [pair.neutral, pair.conflict]
            rows, outputs = [], []
            for ids in [torch.stack(sides)] if same else [side[None] for side in sides]:
                weights, output, layers = _read(model, ids, pair.rows)
                rows += list(weights.unbind(1))
                outputs += list(output.unbind(1))
            if by == "spans":
                rows = [_span_masses(r, pair.spans, side) for side, r in enumerate(rows)]
            found.append(np.stack(head_drift(rows[0], rows[1], outputs[0], outputs[1], drop_first=by == "positions")))
            if progress is not None:
                progress(number + 1, len(pairs))
    parts = np.stack(found, 1)
    return Drift(parts[0], parts[1], parts[2], layers)


def head_drift(
    neutral_rows: Float[Tensor, "layers heads keys"],
    conflict_rows: Float[Tensor, "layers heads keys"],
    neutral_output: Float[Tensor, "layers heads dim"],
    conflict_output: Float[Tensor, "layers heads dim"],
    *,
    drop_first: bool = True,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """M, D and R of heads from their mean attention rows and mean outputs in the two conditions."""
    if neutral_rows.shape != conflict_rows.shape:
        raise ArgumentError(
            f"neutral_rows, conflict_rows: got {neutral_rows.shape[-1]} and {conflict_rows.shape[-1]} keys, expected "
            "one length. Match the prompts token by token, or compare masses by span (by='spans')."
        )
    before, after = neutral_output.double(), conflict_output.double()
    length, changed = before.norm(dim=-1), after.norm(dim=-1)
    magnitude = (changed - length).abs() / (length + EPS)
    product = (length * changed).clamp(min=1e-30)
    # Rounding may leave a cosine of equal vectors at 1 − 1e-16; equal outputs have no drift at all.
    direction = (1 - (before * after).sum(-1) / product).clamp(0, 2)
    silent = (length == 0) & (changed == 0) | (before == after).all(-1)
    direction = torch.where(silent, torch.zeros_like(direction), direction)
    return magnitude.numpy(), direction.numpy(), jensen_shannon(neutral_rows, conflict_rows, drop_first=drop_first)


def jensen_shannon(
    first: Float[Tensor, "... keys"], second: Float[Tensor, "... keys"], *, drop_first: bool = True
) -> np.ndarray:
    """Jensen–Shannon divergence in bits, in [0, 1] and symmetric, of rows that are renormalised without their first
    key. A row with nothing else left counts as even."""
    a, b = (_distribution(rows.double(), drop_first) for rows in (first, second))
    middle = (a + b) / 2

    def to_middle(p: Tensor) -> Tensor:
        return torch.where(p > 0, p * (p.clamp(min=1e-300).log() - middle.clamp(min=1e-300).log()), 0.0).sum(-1)

    return ((to_middle(a) + to_middle(b)) / (2 * math.log(2))).clamp(0, 1).numpy()


def unpadded(ids: Int[Tensor, " tokens"], mask: Bool[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """A sequence without its padding, on whichever side that stands. Raises ArgumentError for gaps inside."""
    real = mask.bool().nonzero()[:, 0]
    if real.numel() == 0 or int(real[-1] - real[0]) + 1 != real.numel():
        raise ArgumentError(
            f"mask: got {real.numel()} real tokens of {mask.numel()} with gaps or none at all, expected one block."
        )
    return ids[real]


def last_logits(
    model: nn.Module, ids: Int[Tensor, "batch tokens"], count: int
) -> Float[Tensor, "batch count vocabulary"]:
    """The logits of the last `count` tokens; the others are not computed where the host can leave them out."""
    keywords = {"logits_to_keep": count} if "logits_to_keep" in signature(model.forward).parameters else {}
    return model(input_ids=ids, use_cache=False, **keywords).logits[:, -count:]


def condition_weights(neutral: Sequence[float], conflict: Sequence[float]) -> list[float] | None:
    """ω of pairs from scores in both conditions: what each lost, normalised; None where none lost anything.

    Scores are CRAS values, or plain accuracies for a localisation without any judge."""
    if len(neutral) != len(conflict):
        raise ArgumentError(f"neutral, conflict: got {len(neutral)} and {len(conflict)} scores, expected pairs.")
    lost = [max(0.0, before - after) for before, after in zip(neutral, conflict, strict=True)]
    total = sum(lost)
    return None if total == 0 else [value / total for value in lost]


@torch.no_grad()
def _read(
    model: nn.Module, ids: Int[Tensor, "batch tokens"], rows: Iterable[int]
) -> tuple[Float[Tensor, "layers batch heads keys"], Float[Tensor, "layers batch heads dim"], tuple[int, ...]]:
    """Mean attention rows and mean outputs of every head over the query rows."""
    device = next(model.parameters()).device
    index = torch.tensor([ids.shape[1] + row for row in rows], device=device)
    with capture(model, what=("weights", "head_output"), rows=index, selftest=False) as reading:
        last_logits(model, ids.to(device), 1)
    captured = reading.result()
    # An encoder-decoder or a layer that mixes by other means has no self-attention row to compare.
    layers = tuple(captured.sites[name].layer for name in captured)
    return captured.stack("weights").mean(3).cpu(), captured.stack("head_output").mean(3).cpu(), layers


def _span_masses(
    rows: Float[Tensor, "layers heads keys"], spans: dict[str, tuple[Span, Span]], side: int
) -> Float[Tensor, "layers heads parts"]:
    """The mass on each span and on all other keys, the first token left out."""
    places = [both[side] for both in spans.values()]
    inside = torch.zeros(rows.shape[-1], dtype=torch.bool)
    masses = []
    for start, stop in places:
        inside[start:stop] = True
        masses.append(rows[..., max(start, 1) : stop].sum(-1))
    inside[0] = True
    return torch.stack([*masses, rows[..., ~inside].sum(-1)], -1)


def _distribution(rows: Tensor, drop_first: bool) -> Tensor:
    kept = rows[..., 1:] if drop_first else rows
    total = kept.sum(-1, keepdim=True)
    return torch.where(total > 0, kept / total.clamp(min=1e-300), torch.full_like(kept, 1 / kept.shape[-1]))


def _ranked(values: Float[np.ndarray, "pairs layers heads"]) -> Float[np.ndarray, "pairs layers heads"]:
    flat = values.reshape(values.shape[0], -1)
    below = stats.rankdata(flat, method="min", axis=1) - 1
    return (below / max(flat.shape[1] - 1, 1)).reshape(values.shape)


def _normalised(weights: Sequence[float] | None, count: int) -> np.ndarray:
    if weights is None:
        return np.full(count, 1 / count)
    given = np.asarray(weights, dtype=float)
    if given.shape != (count,) or not np.isfinite(given).all() or (given < 0).any() or given.sum() == 0:
        raise ArgumentError(
            f"weights: got {list(weights)}, expected {count} numbers of at least 0, not all 0. Leave them out to weigh "
            "all pairs alike."
        )
    return given / given.sum()


def _check(pair: MatchedPair, by: str) -> None:
    lengths = pair.neutral.numel(), pair.conflict.numel()
    named = f" of pair {pair.name!r}" if pair.name else ""
    if by == "positions" and lengths[0] != lengths[1]:
        raise ArgumentError(
            f"neutral, conflict{named}: got {lengths[0]} and {lengths[1]} tokens, expected one length, so that "
            "positions agree. Paraphrase one of them, or use by='spans'."
        )
    if not pair.rows or any(not -min(lengths) <= row < 0 for row in pair.rows):
        raise ArgumentError(f"rows{named}: got {pair.rows}, expected numbers from {-min(lengths)} to −1.")
    if by == "spans" and not pair.spans:
        raise ArgumentError(f"spans{named}: got none, expected at least one to compare masses by span.")
    for name, both in pair.spans.items():
        for (start, stop), length in zip(both, lengths, strict=True):
            if not 0 <= start < stop <= length:
                raise ArgumentError(
                    f"spans{named}: got {name} at [{start}, {stop}), expected a range within {length} tokens."
                )
