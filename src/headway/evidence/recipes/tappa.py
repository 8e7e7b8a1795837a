"""TAPPA: bounds and periods on planted queries and keys, predictability, classification, a real model.

The planted heads are built so that their class is the truth; the bounds are tried on random tensors in float64. On a
real model two readings of "similar queries, predictable rows" stand side by side, rows of weights and rows of logits
(the paper's proposition speaks of logits), since an attention sink alone makes rows of weights alike.

Paper: Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis, arXiv 2601.21709. Its applications, KV
budgets and pruning, are measured in `_tappa_applications`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from headway.door.call import AttentionCall
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import at_least, at_most, rank_correlation_at_least
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _tappa_applications as applications
from headway.evidence.recipes import _tappa_real as real
from headway.evidence.recipes._tappa_planted import angles, noise_vectors, of_pairs, planted_head
from headway.kernels.dense import grouped_scores
from headway.kernels.rope import LAYOUTS, periods, rope_frequencies, rotate
from headway.methods.long_context.tappa import (
    MEANING,
    classify,
    diagonal_bound,
    lag_bound,
    peak_lag,
    predictability,
    profile_call,
    query_similarity,
    row_autocorrelation,
    vertical_bound,
)
from headway.statistics import Measurement, proportion, rank_correlation

CLASSES = tuple(MEANING)
#: (base, pair) of the period claims, head dimension 128 as in the paper's figures.
PERIOD_CASES = ((1e6, 2), (1e6, 3), (1e6, 5), (1e5, 2), (1e5, 3), (1e5, 5))
#: Pairs whose period changes by more than two tokens from base 1e6 to 1e5.
SHIFT_PAIRS = (5, 8, 10)
PERIOD_DIM = 128
AR_LEVELS = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9, 0.99)
#: Noise on the planted heads of the claim, as a fraction of the planted vectors, and the levels reported beside it.
NOISE, MORE_NOISE = 0.2, (0.5, 1.0)
#: Relative slack for float64 rounding when a change is compared with its bound.
SLACK = 1e-9

CRITERIA = {
    "bounds": at_most(0, minimum_n=3000, label="violations"),
    "period": at_most(1.0, label="largest error of the peak in tokens"),
    "period-shift": at_most(1.0, label="largest error of the shift in tokens"),
    "predictability": rank_correlation_at_least(0.9, minimum_n=32),
    "classification": at_least(0.9, minimum_n=60, label="accuracy"),
    **real.CRITERIA,
    **applications.CRITERIA,
}


def run(context: Context) -> list[Claim]:
    return [
        _bounds_claim(context.stage("bounds", lambda: _bounds(context))),
        _period_claim(context.stage("period", lambda: _periods(context))),
        _shift_claim(context.stage("period-shift", lambda: _shifts(context))),
        _predictability_claim(context, context.stage("predictability", lambda: _autoregression(context))),
        _classification_claim(
            {
                noise: context.stage(f"classification-{noise}", partial(_classification, context, noise))
                for noise in (NOISE, *MORE_NOISE)
            }
        ),
        *real.claims(context),
        *applications.claims(context),
    ]


def _bounds(context: Context) -> dict[str, Any]:
    """Violations and tightness of the three bounds over random trials (one head of one draw each)."""
    draws, heads = context.choose(smoke=(4, 25), small=(60, 50), full=(600, 50))
    generator = context.torch_generator("bounds")
    violations = 0
    ratios: dict[str, list[float]] = {"vertical": [], "diagonal": [], "lag": []}
    for _ in context.track(range(draws), "random trials of the bounds"):
        dim, rows, keys = 2 * _pick(generator, 2, 33), _pick(generator, 6, 13), _pick(generator, 6, 17)
        lag, layout = _pick(generator, 2, 5), LAYOUTS[_pick(generator, 0, 2)]
        frequencies = rope_frequencies(2 * _pick(generator, 1, dim // 2 + 1), 10.0 ** _pick(generator, 2, 7))
        smooth = float(torch.rand((), generator=generator))
        query = _walk(generator, heads, rows, dim, smooth)
        key = _walk(generator, heads, keys, dim, smooth)
        start = _pick(generator, 0, 2000)
        turned = rotate(query, start + torch.arange(rows), frequencies, layout)
        scores = grouped_scores(turned, rotate(key, torch.arange(keys), frequencies, layout))
        pairs = {
            "vertical": (scores[:, :, 1:] - scores[:, :, :-1], vertical_bound(query, key, frequencies, layout=layout)),
            "diagonal": (scores[:, :, 1:, 1:] - scores[:, :, :-1, :-1], diagonal_bound(query, key, frequencies)),
            "lag": (
                scores[:, :, lag:] - scores[:, :, :-lag],
                lag_bound(query, key, frequencies, lag=lag, layout=layout),
            ),
        }
        broken = torch.zeros(heads, dtype=torch.bool)
        for name, (change, bound) in pairs.items():
            broken |= (change.abs() > bound * (1 + SLACK) + SLACK).flatten(2).any(-1)[0]
            ratios[name].append(float((change.abs() / bound).mean()))
        violations += int(broken.sum())
    tightness = {name: float(np.mean(values)) for name, values in ratios.items()}
    return {"violations": violations, "trials": draws * heads, "tightness": tightness}


def _pick(generator: torch.Generator, low: int, high: int) -> int:
    return int(torch.randint(low, high, (1,), generator=generator))


def _walk(generator: torch.Generator, heads: int, tokens: int, dim: int, smooth: float) -> Tensor:
    """Random sequences in float64 that change a lot or little from token to token."""
    steps = torch.randn(1, heads, tokens, dim, dtype=torch.float64, generator=generator)
    steps[:, :, 1:] *= 1 - smooth
    return steps.cumsum(2)


def _periods(context: Context) -> list[dict[str, Any]]:
    repeats = context.choose(smoke=1, small=10, full=50)
    return [_peak(context, base, pair, number) for base, pair in PERIOD_CASES for number in range(repeats)]


def _shifts(context: Context) -> list[dict[str, Any]]:
    """The move of the peak from base 1e6 to base 1e5 beside the predicted one."""
    repeats = context.choose(smoke=1, small=10, full=50)
    shifts = []
    for pair in SHIFT_PAIRS:
        for number in range(repeats):
            slow, fast = (_peak(context, base, pair, number) for base in (1e6, 1e5))
            shifts.append(
                {
                    "pair": pair,
                    "predicted": slow["period"] - fast["period"],
                    "measured": slow["peak"] - fast["peak"],
                }
            )
    return shifts


def _peak(context: Context, base: float, pair: int, number: int, tokens: int = 512) -> dict[str, Any]:
    """Where the autocorrelation of a row of logits peaks when one pair holds most of the energy."""
    generator = context.torch_generator(f"period {base} {pair} {number}")
    frequencies = rope_frequencies(PERIOD_DIM, base)
    ends = []
    for _ in range(2):
        constant = of_pairs(torch.tensor([pair]), angles(generator, PERIOD_DIM), PERIOD_DIM)
        plain = constant + 0.3 * noise_vectors(generator, tokens, PERIOD_DIM)
        ends.append(rotate(plain[None, None], torch.arange(tokens), frequencies))
    call = AttentionCall.from_tensors(ends[0], ends[1], ends[1], causal=True)
    curves = row_autocorrelation(call.logits(torch.arange(tokens // 2, tokens))[0, 0], tokens // 4)
    mean = curves.nanmean(0).double().numpy()
    return {"base": base, "pair": pair, "period": float(periods(frequencies)[pair]), "peak": peak_lag(mean)}


def _autoregression(context: Context) -> dict[str, list[float]]:
    """Heads with AR(1) queries: their similarity, and what their adjacent rows share."""
    heads, tokens, dim = context.choose(smoke=(4, 128, 32), small=(8, 512, 64), full=(64, 2048, 128))
    generator = context.torch_generator("autoregression")
    frequencies = rope_frequencies(dim, 1e4)
    found: dict[str, list[float]] = {"level": [], "adjacent": [], "all": [], "overlap": []}
    for level in context.track(AR_LEVELS, "autoregressive queries"):
        query = torch.randn(1, heads, tokens, dim, generator=generator)
        for step in range(1, tokens):
            query[:, :, step] = level * query[:, :, step - 1] + (1 - level**2) ** 0.5 * query[:, :, step]
        key = torch.randn(1, heads, tokens, dim, generator=generator)
        turned, against = (rotate(x, torch.arange(tokens), frequencies) for x in (2 * query, key))
        call = AttentionCall.from_tensors(turned, against, key, causal=True)
        found["level"] += [level] * heads
        found["adjacent"] += query_similarity(query, pairs="adjacent")[0].tolist()
        found["all"] += query_similarity(query)[0].tolist()
        found["overlap"] += predictability(call.weights())[0].tolist()
    return found


def _classification(context: Context, noise: float) -> list[dict[str, str]]:
    """The truth and the label of every planted head."""
    heads, tokens = context.choose(smoke=(2, 256), small=(20, 384), full=(200, 1024))
    generator = context.torch_generator(f"classification {noise}")
    frequencies = rope_frequencies(64, 1e4)
    truth = [kind for kind in CLASSES for _ in range(heads)]
    planted = [planted_head(kind, generator, tokens=tokens, noise=noise) for kind in truth]
    before = [torch.stack(side)[None] for side in zip(*planted, strict=True)]
    query, key = (rotate(x, torch.arange(tokens), frequencies) for x in before)
    call = AttentionCall.from_tensors(query, key, key, causal=True)
    labels = classify(profile_call(call, frequencies=frequencies))[0].labels
    return [{"truth": kind, "label": label} for kind, label in zip(truth, labels, strict=True)]


def _bounds_claim(found: dict[str, Any]) -> Claim:
    return Claim(
        id="bounds",
        statement="The change of a logit down a column, along a diagonal and over a lag never exceeds its bound.",
        paper=PaperValue("theorems 5.1 to 5.4 (bounds with unnamed constants)", "RoPE attention", "section 5"),
        measured=Measurement(found["violations"], n=found["trials"], unit="violations"),
        criterion=CRITERIA["bounds"],
        notes="The published proofs have gaps; these bounds follow from the triangle inequality and replace them.",
        details={"mean change / bound": found["tightness"]},
    )


def _period_claim(peaks: Sequence[dict[str, Any]]) -> Claim:
    errors = [abs(peak["peak"] - peak["period"]) for peak in peaks]
    return Claim(
        id="period",
        statement="With one dominant rotary pair m the logits of a row repeat every 2π·c^(2m/d) tokens.",
        paper=PaperValue("9.7, 12.0, 18.5 (m = 2, 3, 5)", "d = 128, c = 1e6; 15.4 for c = 1e5, m = 5", "theorem 5.3"),
        measured=Measurement(max(errors), n=len(errors), unit="tokens"),
        criterion=CRITERIA["period"],
        details={"peaks": list(peaks)},
    )


def _shift_claim(shifts: Sequence[dict[str, Any]]) -> Claim:
    errors = [abs(shift["measured"] - shift["predicted"]) for shift in shifts]
    return Claim(
        id="period-shift",
        statement="Lowering the rotary base from 1e6 to 1e5 shortens the period as 2π·c^(2m/d) says.",
        paper=PaperValue("shorter period", "Qwen2.5, base 1e6 to 1e5", "third-party note"),
        measured=Measurement(max(errors), n=len(errors), unit="tokens"),
        criterion=CRITERIA["period-shift"],
        details={"shifts": list(shifts)},
    )


def _predictability_claim(context: Context, found: dict[str, list[float]]) -> Claim:
    random = context.generator("predictability interval")
    return Claim(
        id="predictability",
        statement="The more alike adjacent queries are, the more do adjacent attention rows agree.",
        paper=PaperValue("stated without a number", where="section 4"),
        measured=rank_correlation(found["adjacent"], found["overlap"], generator=random),
        criterion=CRITERIA["predictability"],
        others={"all_pairs": rank_correlation(found["all"], found["overlap"], generator=random)},
        notes="AR(1) queries, random keys, RoPE; rows compared by r_0, the mean cosine of adjacent rows.",
        details=found,
    )


def _classification_claim(by_noise: dict[float, list[dict[str, str]]]) -> Claim:
    accuracy = {
        noise: proportion(sum(head["truth"] == head["label"] for head in heads), len(heads))
        for noise, heads in by_noise.items()
    }
    tables = {}
    for noise, heads in by_noise.items():
        counts = Counter((head["truth"], head["label"]) for head in heads)
        tables[str(noise)] = {truth: {label: counts[truth, label] for label in CLASSES} for truth in CLASSES}
    return Claim(
        id="classification",
        statement=f"The class of a planted head is read off its profile, with noise of {NOISE} times the signal.",
        paper=PaperValue("classes named, no classifier given", where="sections 4 and 5"),
        measured=accuracy[NOISE],
        criterion=CRITERIA["classification"],
        others={f"accuracy at noise {noise}": accuracy[noise] for noise in MORE_NOISE},
        notes="Default rules: threshold at the 25th percentile of query similarity over all planted heads.",
        details={"truth by label": tables},
    )


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    found = next(claim for claim in claims if claim.id == "classification")
    table = cast(dict[str, dict[str, int]], found.details["truth by label"][str(NOISE)])
    counts = [[table[truth][label] for label in CLASSES] for truth in CLASSES]
    figure = go.Figure(go.Heatmap(z=counts, x=list(CLASSES), y=list(CLASSES), texttemplate="%{z}", colorscale="Blues"))
    figure.update_layout(title="Planted heads", xaxis_title="label", yaxis_title="truth")
    context.save_plot(figure, "classification")


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "its model has 7 billion parameters and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="tappa",
    title="Why Attention Patterns Exist: A Unifying Temporal Perspective Analysis",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
    obstacle=_obstacle,
)
