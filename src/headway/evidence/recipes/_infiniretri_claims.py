"""Claims of the InfiniRetri recipe about planted hosts and the loop itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import Criterion
from headway.evidence.recipe import Context
from headway.evidence.recipes._infiniretri_planted import SIGNAL, TRUNCATIONS, WIDTHS
from headway.statistics import Measurement, bootstrap_difference, proportion


def rate(rows: Sequence[dict[str, Any]], name: str) -> Measurement:
    """The share of rows in which something holds."""
    return proportion(sum(bool(row[name]) for row in rows), len(rows))


def gain(context: Context, rows: Sequence[dict[str, Any]], first: str, second: str) -> Measurement:
    """Paired difference of two rates."""
    sides = ([float(row[name]) for row in rows] for name in (first, second))
    return bootstrap_difference(*sides, paired=True, generator=context.generator(f"{first} {second}"))


def best_truncation(rows: Sequence[dict[str, Any]]) -> str:
    """The truncation that serves most rows."""
    return max(TRUNCATIONS, key=lambda way: sum(bool(row[way]) for row in rows))


def planted_claims(context: Context, rows: Sequence[dict[str, Any]], criteria: Mapping[str, Criterion]) -> list[Claim]:
    lengths = sorted({row["tokens"] for row in rows})
    by_length: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_length.setdefault(round(np.log2(row["tokens"])), []).append(row)
    best = best_truncation(rows)
    logs = np.log([[row["tokens"], row["read"]] for row in rows])
    slope = float(np.polyfit(logs[:, 0], logs[:, 1], 1)[0])
    table = {
        f"about {round(float(np.mean([row['tokens'] for row in some]))):,} tokens": {
            name: sum(bool(row[name]) for row in some) / len(some) for name in ("kept", "bm25", "random", *TRUNCATIONS)
        }
        for some in by_length.values()
    }
    return [
        Claim(
            id="planted-flat",
            statement="A needle at any depth of a text of any length is kept to the end by a known retrieval head.",
            paper=PaperValue("100 %", "Qwen2.5-0.5B-Instruct (32k), up to 1M tokens", "needle figure"),
            measured=rate(rows, "kept"),
            criterion=criteria["planted-flat"],
            others={name: rate(rows, name) for name in ("bm25", "random", *TRUNCATIONS)},
            notes="BM25 and random sentences get as many tokens as were kept, truncation the model's 512 positions. "
            "The needle shares its name with the question, which BM25 finds as surely. Short texts are repeated since "
            "a trial had shown that 44 of 44 leave an interval from 0.92.",
            details={"kept by length": table, "largest pass": max(row["longest_pass"] for row in rows)},
        ),
        Claim(
            id="planted-gain",
            statement="More needles are kept than by the best of cutting the head, the tail or the middle out.",
            paper=PaperValue("1.000 against 0.446 of the full cache up to 128k", where="needle figure"),
            measured=gain(context, rows, "kept", best),
            criterion=criteria["planted-gain"],
            baseline=rate(rows, best),
            notes=f"Best truncation: {best}.",
        ),
        Claim(
            id="linear-cost",
            statement="The tokens that go through the model grow linearly with the text, and no pass grows at all.",
            paper=PaperValue("linear", where="the loop itself"),
            measured=Measurement(slope, n=len(rows)),
            criterion=criteria["linear-cost"],
            notes="Exponent of a power law over all runs. Time and memory are in the benchmarks.",
            details={"tokens": lengths, "largest pass": max(row["longest_pass"] for row in rows)},
        ),
        Claim(
            id="provenance",
            statement="Every kept sentence is, character by character, the span of the text that it names.",
            paper=PaperValue("no provenance", where="released package"),
            measured=Measurement(
                sum(row["displaced"] for row in rows), n=sum(row["sentences"] for row in rows), unit="sentences"
            ),
            criterion=criteria["provenance"],
        ),
    ]


def rows_claim(worst: dict[str, float], criterion: Criterion) -> Claim:
    return Claim(
        id="rows-exact",
        statement="The question's rows alone give the same attention as the full map of the layer.",
        paper=PaperValue("full maps of every layer", where="released package"),
        measured=Measurement(max(worst.values()), n=len(worst)),
        criterion=criterion,
        details={"by host": worst},
    )


def phrase_claim(context: Context, found: dict[str, list[bool]], criterion: Criterion) -> Claim:
    with_window, without = ([float(hit) for hit in found[f"8 {width}"]] for width in (8, 1))
    return Claim(
        id="phrase-width",
        statement="Smoothing over as many tokens as an answer has finds a phrase of 8 tokens in noise more often.",
        paper=PaperValue("window of about the answer's length", where="method"),
        measured=bootstrap_difference(
            with_window, without, paired=True, generator=context.generator("phrase interval")
        ),
        criterion=criterion,
        notes=f"Scores of 512 tokens with unit noise; a phrase lies {SIGNAL:g} above it.",
        details={"hits by phrase length and width": {name: float(np.mean(hits)) for name, hits in found.items()}},
    )


def grid_claim(context: Context, found: dict[str, list[bool]], criterion: Criterion) -> Claim:
    """Every length of phrase at its own width, beside the width that does best of the others at that length."""
    own, other = list[float](), list[float]()
    others = {}
    for length in WIDTHS:
        rest = {width: found[f"{length} {width}"] for width in WIDTHS if width != length}
        best = max(rest, key=lambda width: sum(rest[width]))
        sides = [float(hit) for hit in found[f"{length} {length}"]], [float(hit) for hit in rest[best]]
        random = context.generator(f"phrase grid {length}")
        others[f"length_{length}"] = bootstrap_difference(*sides, paired=True, generator=random)
        own += sides[0]
        other += sides[1]
    return Claim(
        id="phrase-grid",
        statement="A phrase of any length is found most often by a window as wide as it is long.",
        paper=PaperValue("window of about the answer's length", where="method"),
        measured=bootstrap_difference(own, other, paired=True, generator=context.generator("phrase grid")),
        criterion=criterion,
        others=others,
        notes=f"Phrases of {', '.join(str(width) for width in WIDTHS)} tokens against windows of these widths, on the "
        "scores of phrase-width. The best other width is picked on the same trials, which favours it. The rates of an "
        "earlier record, which has no claim about them, were known when the criterion was set: each length was found "
        "most often at its own width, 16 tokens as often at 4 and 8.",
    )


def two_hop_claim(found: dict[str, list[dict[str, bool]]], criterion: Criterion) -> Claim:
    others = {
        f"{rule}: {hop} hop": rate(rows, hop)
        for rule, rows in found.items()
        for hop in ("first", "second")
        if (rule, hop) != ("replace", "first")
    }
    return Claim(
        id="two-hop",
        statement="A fact that the question shows only through a later one is mostly lost by the replacement rule.",
        paper=PaperValue("not measured; LongBench's two-hop tasks gain", where="LongBench table"),
        measured=rate(found["replace"], "first"),
        criterion=criterion,
        others=others,
        notes="A failure mode, stated as such. Accumulating keeps what a pass has chosen once (with 160 tokens of "
        "budget against 96); what no pass chose it cannot bring back either.",
    )


def answers_claim(context: Context, rows: Sequence[dict[str, Any]], criterion: Criterion) -> Claim:
    by_length: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_length.setdefault(round(np.log2(row["tokens"])), []).append(row)
    best = best_truncation(rows)
    names = ("answer", "kept", "in_window", "majority", *TRUNCATIONS)
    return Claim(
        id="planted-answers",
        statement="A host that answers facts in its window answers them in a text of any length, where truncation and "
        "a vote of sliding chunks fail.",
        paper=PaperValue(
            "0.951 against 0.271 of the full cache", "Llama-3-8B-Instruct, 1k to 32k", "needle figure"
        ),
        measured=gain(context, rows, "answer", "in_window"),
        criterion=criterion,
        baseline=rate(rows, best),
        others={
            "answer": rate(rows, "answer"),
            "in_window": rate(rows, "in_window"),
            "majority": rate(rows, "majority"),
            "longest": rate(by_length[max(by_length)], "answer"),
            "over_truncation": gain(context, rows, "answer", best),
            "over_majority": gain(context, rows, "answer", "majority"),
        },
        notes=f"Weights are set by hand, with 512 positions. Best truncation: {best}. In the window: the fact and its "
        "neighbours alone. The vote reads chunks of 256 tokens that overlap by half, and every chunk has an answer.",
        details={
            "right by length": {
                f"about {round(float(np.mean([row['tokens'] for row in some]))):,} tokens": {
                    name: sum(bool(row[name]) for row in some) / len(some) for name in names
                }
                for some in by_length.values()
            }
        },
    )  # fmt: skip


def exponent(found: dict[str, dict[str, float]], name: str) -> float:
    """The power of the length with which a quantity grows: the slope of a line through the logarithms."""
    lengths = [int(length) for length in found]
    return float(np.polyfit(np.log(lengths), np.log([row[name] for row in found.values()]), 1)[0])


def time_claim(found: dict[str, dict[str, float]], criterion: Criterion) -> Claim:
    return Claim(
        id="linear-time",
        statement="Its time grows linearly with the text, that of a dense forward over all of it nearly as the square.",
        paper=PaperValue("linear against quadratic", where="the loop itself"),
        measured=Measurement(exponent(found, "own"), n=len(found)),
        criterion=criterion,
        others={
            "dense": Measurement(exponent(found, "dense"), n=len(found)),
            "pairs": Measurement(exponent(found, "own pairs"), n=len(found)),
            "dense_pairs": Measurement(exponent(found, "dense pairs"), n=len(found)),
        },
        notes="Planted host, seconds of the quickest run of each length; the dense host has as many positions as the "
        "text has tokens. Pairs of tokens that attend are counted.",
        details=found,
    )
