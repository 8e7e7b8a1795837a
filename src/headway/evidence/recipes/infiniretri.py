"""InfiniRetri: needles in 64k tokens with an 8k model, and planted retrieval at any length with a known truth.

The planted host has one retrieval head whose attention is known; there everything about the loop itself is tried: that
needles stay at any length and depth, linear cost, the phrase window, two hops, provenance; a second one also answers.
On SmolLM2 needles are asked for in real text, against three ways of truncation with the model's whole window and BM25
with as many tokens as were kept; the layer that reads best is found on texts of its own.

Paper: Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing, arXiv 2502.12962.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, between, interval_excludes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes._infiniretri_claims import (
    answers_claim,
    best_truncation,
    gain,
    grid_claim,
    phrase_claim,
    planted_claims,
    rate,
    rows_claim,
    time_claim,
    two_hop_claim,
)
from headway.evidence.recipes._infiniretri_measures import chosen_layer, last_and_best, measure_long, measure_study
from headway.evidence.recipes._infiniretri_planted import (
    TRUNCATIONS,
    WIDTHS,
    measure_answers,
    measure_phrases,
    measure_planted,
    measure_rows,
    measure_slopes,
    measure_two_hops,
)
from headway.statistics import Measurement, bootstrap, bootstrap_difference, rank_correlation

CRITERIA = {
    "planted-flat": at_least(0.95, minimum_n=40, label="needles kept"),
    "planted-gain": interval_excludes(0, side="above", minimum_n=40, label="kept minus the best truncation's"),
    "planted-answers": all_of(
        at_least(-0.05, minimum_n=30, label="right answers minus those in the window"),
        at_least(0.95, of="longest", by="value", label="right answers at the longest text"),
        interval_excludes(0, of="over_truncation", side="above", minimum_n=30, label="over the best truncation"),
        interval_excludes(0, of="over_majority", side="above", minimum_n=30, label="over a vote of sliding chunks"),
        requires=at_least(0.95, of="in_window", by="value", label="right answers in the window"),
    ),
    "linear-cost": between(0.85, 1.15, label="exponent of tokens processed in tokens of text"),
    "linear-time": all_of(
        between(0.85, 1.15, by="value", minimum_n=3, label="exponent of its seconds"),
        at_least(1.6, of="dense", by="value", minimum_n=3, label="exponent of a dense forward's"),
    ),
    "rows-exact": at_most(1e-5, label="largest difference from the full map"),
    "phrase-width": interval_excludes(0, side="above", minimum_n=100, label="hits with smoothing minus without"),
    "phrase-grid": all_of(
        interval_excludes(0, side="above", minimum_n=400, label="hits at a phrase's own width minus the best other's"),
        *(
            at_least(-0.02, of=f"length_{width}", minimum_n=100, label=f"the same for {width} tokens")
            for width in WIDTHS
        ),
    ),
    "two-hop": at_most(0.5, minimum_n=20, label="first hops kept by replacement"),
    "provenance": at_most(0, minimum_n=40, label="kept sentences that are not their source's span"),
    "needles-64k": at_least(0.9, minimum_n=20, by="value", label="needles kept"),
    "needles-64k-gain": interval_excludes(0, side="above", minimum_n=20, label="kept minus the best truncation's"),
    "bm25-64k": at_least(-0.05, minimum_n=20, label="kept minus BM25's at equal tokens"),
    "not-below-bm25": at_least(-0.05, minimum_n=12, label="kept minus BM25's at equal tokens"),
    "in-window-accuracy": at_least(-0.05, minimum_n=12, label="right answers minus those in the window"),
    "fewer-tokens": at_least(0.9, label="share of the tokens that the answer does not read"),
    "last-layers": at_least(
        -0.05, minimum_n=12, label="hits of the last quarter of layers minus those of the best quarter before"
    ),
}


def run(context: Context) -> list[Claim]:
    planted = context.stage("planted", lambda: measure_planted(context))
    answers = context.stage("answers", lambda: measure_answers(context))
    slopes = context.stage("slopes", lambda: measure_slopes(context))
    phrases = context.stage("phrase", lambda: measure_phrases(context))
    claims = [
        *planted_claims(context, planted, CRITERIA),
        answers_claim(context, answers, CRITERIA["planted-answers"]),
        time_claim(slopes, CRITERIA["linear-time"]),
        rows_claim(context.stage("rows", lambda: measure_rows(context)), CRITERIA["rows-exact"]),
        phrase_claim(context, phrases, CRITERIA["phrase-width"]),
        grid_claim(context, phrases, CRITERIA["phrase-grid"]),
        two_hop_claim(context.stage("two-hop", lambda: measure_two_hops(context)), CRITERIA["two-hop"]),
    ]
    study = context.stage("study", lambda: measure_study(context))
    layer = chosen_layer(study["margin"])
    long = context.stage("long", lambda: measure_long(context, layer))
    claims += [*_long_claims(context, long), *_study_claims(context, study), _layer_claim(context, study)]
    return sorted(claims, key=lambda claim: list(CRITERIA).index(claim.id))


def _long_claims(context: Context, found: Sequence[dict[str, Any]]) -> list[Claim]:
    rows = [row for text in found for row in text["needles"]]
    best = best_truncation(rows)
    facts = {f"text {number}": {k: v for k, v in text.items() if k != "needles"} for number, text in enumerate(found)}
    asked = len(found[0]["needles"])
    note = (
        f"Read in layer {found[0]['layer']}: the one by which the study's needles, in texts of their own, stood "
        "furthest above the best other sentence on average (the last of equal ones). An earlier run took the layer of "
        "the best mean rank, in which two layers tied, and kept 5 of 8 in one text by the first of them; this rule was "
        f"set before any text was read by it. {asked} needles of a text are asked for at once."
    )
    return [
        Claim(
            id="needles-64k",
            statement="A model of 8k positions keeps the needles of a text of 64k tokens.",
            paper=PaperValue("100 %", "Qwen2.5-0.5B-Instruct (32k), up to 1M tokens", "needle figure"),
            measured=rate(rows, "kept"),
            criterion=CRITERIA["needles-64k"],
            others={name: rate(rows, name) for name in ("answer", "bm25", "random", *TRUNCATIONS)},
            notes=note,
            details=facts,
        ),
        Claim(
            id="needles-64k-gain",
            statement="It keeps more needles than the best truncation to its whole window.",
            paper=PaperValue("1.000 against 0.446 of the full cache up to 128k", where="needle figure"),
            measured=gain(context, rows, "kept", best),
            criterion=CRITERIA["needles-64k-gain"],
            baseline=rate(rows, best),
            notes=f"Best truncation: {best}. {note}",
        ),
        Claim(
            id="bm25-64k",
            statement="In a text of 64k tokens it keeps no fewer needles than BM25 with as many tokens.",
            paper=PaperValue("not compared"),
            measured=gain(context, rows, "kept", "bm25"),
            criterion=CRITERIA["bm25-64k"],
            baseline=rate(rows, "bm25"),
            notes="Needles name what is asked for, which suits BM25; it gets the tokens that were kept of each text.",
            details={"kept tokens": [text["kept tokens"] for text in found]},
        ),
        Claim(
            id="fewer-tokens",
            statement="The answer reads a small part of the text's tokens.",
            paper=PaperValue("90 to 95 % fewer", where="digest of the paper"),
            measured=Measurement(min(1 - text["prompt"] / text["tokens"] for text in found), n=len(found)),
            criterion=CRITERIA["fewer-tokens"],
            notes="The least of the texts. The passes before it read every token once, and the kept ones again.",
            details=facts,
        ),
    ]


def _study_claims(context: Context, found: dict[str, Any]) -> list[Claim]:
    rows = found["needles"]
    kept = {name: rate(rows, name) for name in ("kept", "bm25", "random", *TRUNCATIONS)}
    return [
        Claim(
            id="not-below-bm25",
            statement="By the paper's last layer, no fewer needles are kept than by BM25 with as many tokens.",
            paper=PaperValue("not compared"),
            measured=gain(context, rows, "kept", "bm25"),
            criterion=CRITERIA["not-below-bm25"],
            baseline=kept["bm25"],
            others=kept,
            notes="Needles name what is asked for, which suits BM25. Four are asked for in one question and share the "
            "budget of a pass. The host is a base model of 135M parameters; what its other layers find of these "
            "needles is in last-layers, and what the best of them keeps of other texts in bm25-64k. One text under "
            "another seed was measured before.",
            details={"kept sentences": found["sentences"], "not their span": found["displaced"]},
        ),
        Claim(
            id="in-window-accuracy",
            statement="Answers from what was kept are as often right as answers from a text that fits the window.",
            paper=PaperValue(
                "0.951 against 0.271 of the full cache", "Llama-3-8B-Instruct, 1k to 32k", "needle figure"
            ),
            measured=gain(context, rows, "answer", "in_window"),
            criterion=CRITERIA["in-window-accuracy"],
            baseline=rate(rows, "in_window"),
            others={"answer": rate(rows, "answer"), "kept": kept["kept"]},
            notes="The text in the window is as long as what was kept and holds all needles of its text, so a needle "
            "that was not kept is a wrong answer on one side only: the kept rate bounds the other. Kept by the paper's "
            "last layer. One text under another seed was measured before.",
        ),
    ]


def _layer_claim(context: Context, found: dict[str, Any]) -> Claim:
    every = np.array(found["hit"], dtype=float)
    hits = every.mean(axis=0)
    ranks = np.mean(np.array(found["reciprocal"], dtype=float), axis=0)
    last, best = last_and_best(found["hit"], found["text"])
    random = context.generator("layers interval")
    upper = min(len(hits) // 2, len(hits) - 3)
    return Claim(
        id="last-layers",
        statement="The last layers' attention finds what is asked for as often as that of any layers before them.",
        paper=PaperValue("attention sharpens toward the output layers; the last one is used", where="layer study"),
        measured=bootstrap_difference(last, best, paired=True, generator=random),
        criterion=CRITERIA["last-layers"],
        baseline=bootstrap(best, generator=random),
        others={
            "last quarter": bootstrap(last, generator=random),
            "last layer": bootstrap(every[:, -1], generator=random),
            "best layer": Measurement(float(hits.max()), n=len(every)),
            "rank correlation of layer and hit rate": rank_correlation(range(len(hits)), hits, generator=random),
            "the same in the upper half": rank_correlation(range(upper, len(hits)), hits[upper:], generator=random),
        },
        notes="A hit: the needle's sentence is among as many best sentences of its pass as needles are asked for. The "
        "best quarter before is chosen on the other texts. An earlier criterion asked that the rank correlation of "
        "layer and hit rate lie above 0 over all layers. In SmolLM2 it was 0.75 [0.47, 0.88] and the claim held, "
        "though only because the first twelve of its 30 layers find nothing: from layer 14 on the correlation was "
        "−0.40, the last seven layers hit 0.71 and layers 17 to 23 hit 0.98 of 16 needles. The criterion was changed "
        "after these numbers were seen, to ask what the layer study says of the last layers.",
        details={
            "hit rate by layer": hits,
            "mean reciprocal rank by layer": ranks,
            "mean margin by layer": np.mean(np.array(found["margin"], dtype=float), axis=0),
            "best layer": chosen_layer(found["margin"]),
        },
    )


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    found = next(claim for claim in claims if claim.id == "last-layers")
    figure = go.Figure()
    for name in ("hit rate by layer", "mean reciprocal rank by layer"):
        values: Any = found.details[name]
        figure.add_scatter(y=values, mode="lines+markers", name=name.removesuffix(" by layer"))
    figure.update_layout(title="Which layer finds needles", xaxis_title="layer", yaxis_title="rate")
    context.save_plot(figure, "layers")


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "a million tokens take hours without a GPU. Run --size small."
    try:
        import bm25s  # noqa: F401
    except ImportError:
        return "BM25 needs the extra 'retrieval': pip install 'headway[retrieval]'."
    return None


RECIPE = Recipe(
    slug="infiniretri",
    title="Infinite Retrieval: Attention Enhanced LLMs in Long-Context Processing",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
    obstacle=_obstacle,
)
