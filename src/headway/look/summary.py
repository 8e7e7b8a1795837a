"""Puts a reading into words and grids: head metrics, layer series, labels, and the sentences that come first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.look.gather import Reading
from headway.look.result import HeadMetric, Labels, LayerSeries
from headway.look.roles import role_metrics
from headway.methods.long_context.tappa import MEANING
from headway.methods.sinks.secondary_sinks import SecondarySinks
from headway.methods.sinks.sink_emergence import EPSILON, NO_SINK, SiteSinks, verdict

#: A head whose sinks and recent tokens hold this much of its attention could be served with a short cache.
STREAMING_HEAD = 0.9
#: A score this far above chance is called a role in the summary.
ROLE = 0.3
NAN = float("nan")


def head_metrics(reading: Reading) -> list[HeadMetric]:
    """Every number per layer and head, in the order in which the report offers them."""
    return [*_sink_metrics(reading), *_pattern_metrics(reading), *_role_metrics(reading)]


def _role_metrics(reading: Reading) -> list[HeadMetric]:
    retrieval = reading.retrieval if reading.retrieval is not None and reading.retrieval.usable else None
    return role_metrics(reading.roles, retrieval, reading.induction, sites=reading.sites)


def _sink_metrics(reading: Reading) -> list[HeadMetric]:
    if reading.sinks is None:
        return []
    measured = reading.sinks
    by_name = {
        site.site.name: (site, rates) for site, rates in zip(measured.sites, measured.rates.by_head, strict=True)
    }
    size = f"over {measured.sequences} sequences of {measured.length} tokens"

    def grid(value: Any) -> list[list[float]]:
        rows = []
        for place in reading.sites:
            row = [NAN] * _width(reading)
            if place.name in by_name:
                numbers = value(*by_name[place.name])
                for head in range(place.heads):
                    row[head] = float(numbers[head * len(numbers) // place.heads])
            rows.append(row)
        return rows

    def mean(name: str) -> Any:
        return lambda site, rates: getattr(site, name).nanmean(0)

    def first_alpha(site: SiteSinks, rates: Any) -> Any:
        return site.alpha[..., 0].nanmean(0)

    rows: list[tuple[str, str, str, str, Any]] = [
        (
            "first_token_alpha",
            "Received by the first token",
            "share",
            f"Mean weight α₁ on the first token {size}.",
            first_alpha,
        ),
        (
            "sink_rate",
            "Sink rate",
            "share",
            f"Share of sequences whose first token receives more than {EPSILON:g}, {size}.",
            lambda site, rates: rates[:, 0],
        ),
        (
            "value_drain",
            "Value norm of the first token",
            "ratio",
            "Norm of the first value over the mean of the others; mass on a small one adds little.",
            mean("value_ratio"),
        ),
        (
            "key_norm_ratio",
            "Key norm of the first token",
            "ratio",
            "Norm of the first key over the mean of the others.",
            mean("key_ratio"),
        ),
        (
            "key_cosine",
            "First key and mean key",
            "cosine",
            "Cosine between the first key and the mean key of the head's group.",
            mean("key_cosine"),
        ),
    ]
    return [
        HeadMetric(
            name, label, "sinks", unit, text, grid(value), scale="diverging" if unit == "cosine" else "sequential"
        )
        for name, label, unit, text, value in rows
    ]


def _pattern_metrics(reading: Reading) -> list[HeadMetric]:
    profiles = {p.site: p for p in reading.profiles}
    patterns = {p.site: p for p in reading.patterns}

    def grid(value: Any) -> list[list[float]]:
        rows = []
        for place in reading.sites:
            row = [NAN] * _width(reading)
            if place.name in profiles:
                numbers = value(profiles[place.name], patterns[place.name])
                row[: len(numbers)] = [float(x) for x in numbers]
            rows.append(row)
        return rows

    rows: list[tuple[str, str, str, str, Any, str]] = [
        (
            "query_similarity",
            "Query self-similarity",
            "cosine",
            "Mean cosine between all pairs of queries before the rotary embedding.",
            lambda p, q: p.query_similarity.all_pre_rope,
            "sequential",
        ),
        (
            "query_similarity_rotated",
            "Query self-similarity after RoPE",
            "cosine",
            "The same after the rotary embedding.",
            lambda p, q: p.query_similarity.all_post_rope,
            "sequential",
        ),
        (
            "vertical",
            "Vertical predictability r₀",
            "cosine",
            "Mean cosine between a row of attention and the next: stripes.",
            lambda p, q: p.vertical,
            "sequential",
        ),
        (
            "diagonal",
            "Diagonal predictability r₁",
            "cosine",
            "Mean cosine between a row moved by one and the next: diagonals.",
            lambda p, q: p.diagonal,
            "sequential",
        ),
        (
            "overlap",
            "Overlap of adjacent rows",
            "share",
            "Attention mass that a row shares with the next.",
            lambda p, q: p.overlap,
            "sequential",
        ),
        (
            "dominant_period",
            "Period of the dominant rotary pair",
            "tokens",
            "2π/θ of the rotary pair with most query-key energy, where one dominates.",
            lambda p, q: np.where(q.dominant_pair >= 0, q.dominant_period, NAN),
            "sequential",
        ),
    ]
    if not profiles:
        return []
    return [
        HeadMetric(name, label, "patterns", unit, text, grid(v), scale=scale)
        for name, label, unit, text, v, scale in rows
    ]


def labels(reading: Reading) -> list[Labels]:
    """The pattern class of every head."""
    found = {p.site: p for p in reading.patterns}
    if not found:
        return []
    rows = []
    for place in reading.sites:
        words = list(found[place.name].labels) if place.name in found else []
        rows.append(words + [""] * (_width(reading) - len(words)))
    return [Labels("pattern", "Pattern", rows, dict(MEANING))]


def layer_series(reading: Reading) -> list[LayerSeries]:
    """The line plots: first-token share, sink rate, norms, sink scores, similarity, by layer."""
    series: list[LayerSeries] = []

    def add(name: str, label: str, chart: str, unit: str, values: Sequence[float]) -> None:
        series.append(LayerSeries(name, label, chart, unit, list(range(len(values))), [float(v) for v in values]))

    if reading.sinks is not None:
        facts = reading.sinks.summary()
        add(
            "first_token_share",
            "share of attention",
            "Attention on the first token",
            "share",
            facts["first_token_share"],
        )
        add(
            "sink_rate_by_layer",
            f"heads above {EPSILON:g}",
            "Attention on the first token",
            "share",
            facts["sink_rate_first_by_layer"],
        )
        add("key_ratio_by_layer", "key norm", "First token against the rest", "ratio", facts["key_norm_ratio"])
        add("value_ratio_by_layer", "value norm", "First token against the rest", "ratio", facts["value_norm_ratio"])
        hidden = facts["hidden_norm_ratio"]
        add(
            "hidden_ratio_by_layer",
            "‖h₁‖ / mean ‖h‖",
            "Norm of the residual stream at the first token",
            "ratio",
            hidden,
        )
    found = reading.telling
    if found is not None:
        names = {"primary": "primary sink", "secondary": "secondary sinks", "rest": "other tokens"}
        for group, values in (found.score or {}).items():
            add(f"score_{group}", names.get(group, group), "Attention received per query", "share", values)
        for group, values in found.norms.get("hidden", {}).items():
            add(f"hidden_{group}", names.get(group, group), "Norm of the residual stream", "norm", values)
    if reading.profiles:
        add("similarity_by_layer", "query self-similarity", "Predictability", "cosine",
            [float(np.nanmean(p.query_similarity.all_pre_rope)) for p in reading.profiles])  # fmt: skip
        add("overlap_by_layer", "overlap of adjacent rows", "Predictability", "cosine",
            [float(np.nanmean(p.overlap)) for p in reading.profiles])  # fmt: skip
    return [s for s in series if np.isfinite(s.values).any()]


def sinks_section(reading: Reading) -> dict[str, Any]:
    if reading.sinks is None:
        return {}
    facts = reading.sinks.summary()
    kept = (
        "epsilon",
        "length",
        "sequences",
        "sink_rate_first",
        "strongest_position",
        "strongest_rate",
        "first_special",
    )
    rates = reading.sinks.rates.overall[:8].tolist()
    position, rate = reading.sinks.strongest
    positions = [position] if rate >= NO_SINK else []
    return {"sentence": verdict(reading.sinks), "positions": positions, "rates_by_position": rates} | {
        k: facts[k] for k in kept
    }


def secondary_section(reading: Reading) -> dict[str, Any]:
    """The secondary sinks as the report draws them, and all that was found beneath."""
    found = reading.telling
    if found is None:
        return {}
    data = found.to_dict()
    chosen = [s for s in data["sinks"]["sinks"] if s["label"] != "noise"]
    tokens = [
        {
            "position": s["position"],
            "token": _piece(reading, s["position"]),
            "start": s["start"],
            "lifetime": s["lifetime"],
            "label": s["label"],
        }
        for s in chosen
    ]
    levels = [
        {"start": start, "lifetime": lifetime, "count": count} for (start, lifetime), count in found.levels.common()
    ]
    stages = {name: mean for name, mean in _mean_stages(found.stages).items() if np.isfinite(mean)}
    triggers = {
        f"layer {t.layer}": {
            "sinks": t.sinks,
            "same tokens that are none": t.others,
            "largest |cosine| of a probe": max((abs(p.cosine) for p in t.probes), default=NAN),
        }
        for t in found.triggers
    }
    return {
        "found": found.primary is not None and bool(tokens),
        "sentence": secondary_sentence(reading),
        "primary": reading.secondary[0].to_dict()["primary"],
        "range of the secondary sinks": _span(found) if found is not reading.secondary[0] else None,
        "tokens": tokens,
        "levels": levels,
        "stages": stages,
        "triggers": triggers,
        "intervention": reading.intervention,
        "notes": [*data["notes"], *([reading.left_out] if reading.left_out else [])],
    }


def _mean_stages(stages: dict[int, dict[str, float]]) -> dict[str, float]:
    names = list(dict.fromkeys(name for table in stages.values() for name in table))
    return {name: float(np.nanmean([t[name] for t in stages.values() if name in t])) for name in names}


def _span(found: SecondarySinks) -> str | None:
    return None if found.primary is None else f"layers {found.primary.start} to {found.primary.end - 1}"


def secondary_sentence(reading: Reading) -> str:
    """Where the primary sink lives, and what was found beside it, in which range of layers."""
    if not reading.secondary:
        return ""
    found, telling = reading.secondary[0], reading.telling
    if found.primary is None or telling is None or telling.primary is None:
        return found.reason
    primary = found.primary
    where = (
        f"The primary sink is position {primary.position} ({_quoted(reading, primary.position)}), in layers "
        f"{primary.start} to "
        f"{primary.end - 1}"
    )
    seen = telling.sinks.positions("secondary")
    if not seen:
        return f"{where}; no secondary sink was found among {found.sinks.tokens} tokens"
    starts = telling.levels.starts()
    first = max(starts, key=lambda layer: starts[layer])
    plural = "s" if len(seen) != 1 else ""
    span = (
        "there"
        if telling is found
        else f"in its earlier range, layers {telling.primary.start} to {telling.primary.end - 1}"
    )
    some = list(dict.fromkeys(_quoted(reading, p) for p in seen))[:3]
    return (
        f"{where}; {len(seen)} secondary sink{plural} {span}, "
        f"{starts[first]} of them created in layer {first}: {', '.join(some)}"
    )


def patterns_section(reading: Reading) -> dict[str, Any]:
    if not reading.profiles:
        return {}
    counts = Counter(word for p in reading.patterns for word in p.labels)
    predictable = sum(int(p.predictable.sum()) for p in reading.patterns)
    section: dict[str, Any] = {"counts": dict(counts), "predictable": predictable, "heads": sum(counts.values())}
    rotary = [p for p in reading.profiles if len(p.periods)]
    if rotary:
        section["channels"] = {
            "layers": [p.layer for p in rotary],
            "periods": rotary[0].periods.tolist(),
            "energy": [np.nanmean(p.channel_shares, 0).tolist() for p in rotary],
        }
        section["bounds"] = [
            {
                "layer": p.layer,
                "vertical change": float(np.nanmean(p.vertical_bound.change)),
                "vertical bound": float(np.nanmean(p.vertical_bound.bound)),
                "diagonal change": float(np.nanmean(p.diagonal_bound.change)),
                "diagonal bound": float(np.nanmean(p.diagonal_bound.bound)),
            }
            for p in rotary
        ]
    return section


def roles_section(reading: Reading) -> dict[str, Any]:
    section: dict[str, Any] = {}
    if reading.retrieval is not None:
        r = reading.retrieval
        section["copy task"] = {
            "accuracy": r.accuracy,
            "answers right": r.solved,
            "chance": r.chance,
            "usable": r.usable,
        }
    if reading.induction is not None:
        section["repeated tokens"] = {"accuracy": reading.induction.accuracy, "chance": reading.induction.chance}
    return section


def findings(reading: Reading, metrics: Sequence[HeadMetric]) -> list[str]:
    """The summary: each sentence leads with a number and says what it means."""
    sentences = []
    if reading.sinks is not None:
        sentences.append(verdict(reading.sinks))
        sentences += _first_token_sentences(reading)
    sentence = secondary_sentence(reading)
    if sentence:
        sentences.append(sentence if sentence.endswith(".") else f"{sentence}.")
    if reading.patterns:
        sentences.append(_pattern_sentence(reading))
    table = {m.name: m.array() for m in metrics}
    if "streaming" in table:
        streaming = table["streaming"]
        many = int((streaming >= STREAMING_HEAD).sum())
        sentences.append(
            f"{many} of {int(np.isfinite(streaming).sum())} heads put {STREAMING_HEAD:.0%} or more of their "
            "attention on the "
            "first 4 and the last 64 tokens: a short cache would serve them."
        )
    if reading.retrieval is not None and reading.retrieval.usable:
        sentences.append(
            _role_sentence(table, "retrieval", "copy from afar", reading.retrieval.accuracy, "the copy task")
        )
    if reading.induction is not None:
        sentences.append(
            _role_sentence(table, "induction", "do induction", reading.induction.accuracy, "repeated tokens")
        )
    return sentences


def _first_token_sentences(reading: Reading) -> list[str]:
    assert reading.sinks is not None
    facts = reading.sinks.summary()
    share = np.asarray(facts["first_token_share"])
    top = int(np.nanargmax(share))
    sentences = [
        f"{np.nanmean(share):.0%} of attention goes to the first token, most in layer {top} ({share[top]:.0%}); "
        "its values have "
        f"{np.nanmean(facts['value_norm_ratio']):.2f} times the norm of the others, so mass there adds little."
        if np.nanmean(facts["value_norm_ratio"]) < 1
        else f"{np.nanmean(share):.0%} of attention goes to the first token, most in layer {top} ({share[top]:.0%})."
    ]
    hidden = np.asarray(facts["hidden_norm_ratio"], dtype=float)
    if np.isfinite(hidden).any():
        layer = int(np.nanargmax(hidden))
        word = "a massive activation" if hidden[layer] >= 10 else "no massive activation"
        sentences.append(
            f"{hidden[layer]:.1f} times the norm of other tokens: the residual stream of the first token at its "
            f"largest, entering layer {layer}: {word}."
        )
    return sentences


def _pattern_sentence(reading: Reading) -> str:
    section = patterns_section(reading)
    order = sorted(section["counts"].items(), key=lambda item: -item[1])
    words = ", ".join(f"{count} {word}" for word, count in order)
    return f"{section['predictable']} of {section['heads']} heads have predictable queries; by shape: {words}."


def _role_sentence(table: dict[str, np.ndarray], name: str, does: str, accuracy: float, task: str) -> str:
    values = table[name]
    layer, head = np.unravel_index(int(np.nanargmax(values)), values.shape)
    many = int((values >= ROLE).sum())
    return (
        f"{many} head{'s' if many != 1 else ''} "
        f"{does if many != 1 else does.replace('copy', 'copies').replace('do ', 'does ')} (score of at "
        f"least {ROLE:g}); the strongest is head {head} of layer {layer} with {values[layer, head]:.2f}. The "
        "model is right in "
        f"{accuracy:.0%} of {task}."
    )


def _width(reading: Reading) -> int:
    return max(site.heads for site in reading.sites)


def _piece(reading: Reading, position: int) -> str:
    return reading.pieces[position]


def _quoted(reading: Reading, position: int) -> str:
    return f"“{reading.pieces[position].strip() or repr(reading.pieces[position])}”"
