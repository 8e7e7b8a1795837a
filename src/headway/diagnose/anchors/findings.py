"""What a diagnosis says, in sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.diagnose.anchors.result import Anchors, TraceAnchors
from headway.methods.diagnosis.thought_anchors import agreement, concordance
from headway.statistics import Measurement, number

SHOWN = 70
#: Method -> its words.
METHODS = {"effect": "hiding a sentence", "receiver": "receiver heads", "importance": "resampled answers"}


def findings(found: Anchors) -> list[str]:
    return [
        *(_anchor(t) for t in found.traces if _known(t.effect)),
        *(_decides(t) for t in found.traces if t.importance),
        *_heads(found),
        *_places(found.traces),
        *_ablated(found),
        *_agreement(found),
    ]


def scores(trace: TraceAnchors) -> dict[str, list[float]]:
    """The three scores of each sentence: causal effect, receiver score, counterfactual importance. The last falls back
    on resampling importance where no resample differed (or all did not)."""
    decided = [math.nan] * len(trace.sentences)
    for one in trace.importance:
        values = (one[kind]["divergence"]["value"] for kind in ("counterfactual", "resampling"))
        decided[one["sentence"]] = next((float(v) for v in values if _number(v)), math.nan)
    receiver = trace.receiver or [math.nan] * len(trace.sentences)
    return {"effect": trace.effect, "receiver": receiver, "importance": decided}


def agreements(traces: Sequence[TraceAnchors]) -> tuple[list[dict[str, Any]], float]:
    """Spearman's ρ of each two methods over sentences, ranked within their trace, and Kendall's W of all there are."""
    columns: dict[str, list[float]] = {name: [] for name in METHODS}
    for trace in traces:
        for name, values in scores(trace).items():
            columns[name] += _ranked(values)
    names = [name for name, values in columns.items() if _known(values)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    found = [
        {"first": a, "second": b, "rho": agreement(columns[a], columns[b], generator=0).to_dict()} for a, b in pairs
    ]
    return found, concordance([columns[n] for n in names]) if len(names) > 1 else math.nan


def _ranked(values: Sequence[float]) -> list[float]:
    from scipy import stats

    table = np.asarray(values, dtype=float)
    known = np.isfinite(table)
    ranks = np.full(len(table), np.nan)
    if known.any():
        ranks[known] = stats.rankdata(table[known]) / known.sum()
    return [float(r) for r in ranks]


def _anchor(trace: TraceAnchors) -> str:
    top = int(np.nanargmax(trace.effect))
    targets = sum(1 for source, _, _ in trace.edges if source == top)
    later = len(trace.sentences) - 1 - top
    return (
        f"In {trace.name}, sentence {top} of {len(trace.sentences)} matters most to what follows it: “"
        f"{_cut(trace.sentences[top])}” It is among the two strongest sources of {targets} of {later} later sentences."
    )


def _decides(trace: TraceAnchors) -> str:
    ranked = sorted(
        (one for one in trace.importance if _number(one["resampling"]["divergence"]["value"])),
        key=lambda one: -one["resampling"]["divergence"]["value"],
    )
    sure = [one for one in ranked if one["resampling"]["p_value"] < 0.05]
    if not sure:
        return f"In {trace.name} no sentence changes the answers more than chance does, at this number of rollouts."
    one = sure[0]
    told = Measurement.from_dict(one["resampling"]["divergence"])
    return (
        f"In {trace.name} the answers change most with sentence {one['sentence']}: “"
        f"{_cut(trace.sentences[one['sentence']])}” Drawing it anew moves them by {told}; {len(sure)} of "
        f"{len(trace.importance)} sentences move them more than chance (p < 0.05)."
    )


def _heads(found: Anchors) -> list[str]:
    if not found.receivers:
        return []
    layer, head, peak = found.receivers[0]
    values = [v for row in found.kurtosis for v in row if math.isfinite(v)]
    told = [
        f"The strongest receiver head is layer {int(layer)}, head {int(head)}, with a kurtosis of "
        f"{number(round(peak, 1))}; the median head has {number(round(float(np.median(values)), 1))}."
    ]
    if found.reliability is not None and _number(found.reliability["value"]):
        r = Measurement.from_dict(found.reliability)
        told.append(f"Across halves of the traces the heads' kurtoses agree with r = {r}.")
    return told


def _places(traces: Sequence[TraceAnchors]) -> list[str]:
    quantiles = [row[2] for t in traces for row in t.receiver_null if _number(row[2])]
    if not quantiles:
        return []
    above = sum(
        1
        for t in traces
        for score, (_, high, _) in zip(t.receiver, t.receiver_null, strict=False)
        if _number(score) and _number(high) and score > high
    )
    return [
        f"{above} of {len(quantiles)} sentences draw more attention from receiver heads than other sentences do at the "
        "same place; for the rest, where they stand explains it."
    ]


def _ablated(found: Anchors) -> list[str]:
    if found.ablation is None:
        return []
    rise, others = found.ablation["rise"], found.ablation["controls"]
    return [
        f"Without its {len(found.receivers)} receiver heads the loss on {found.ablation['trace']} changes by "
        f"{number(round(rise, 3))} nats per token; without as many other heads of the same layers by "
        f"{number(round(float(np.mean(others)), 3))} (p = {number(round(found.ablation['p'], 2))})."
    ]


def _agreement(found: Anchors) -> list[str]:
    told = []
    for pair in found.agreement:
        if _number(pair["rho"]["value"]):
            rho = Measurement.from_dict(pair["rho"])
            told.append(
                f"{METHODS[pair['first']].capitalize()} and {METHODS[pair['second']]} rank the sentences with "
                f"ρ = {rho}."
            )
    return told


def _known(values: Sequence[float]) -> bool:
    return any(math.isfinite(v) for v in values)


def _number(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)


def _cut(sentence: str) -> str:
    text = " ".join(sentence.split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN].rstrip()}…"
