"""What the recipe of A Song of (Dis)agreement measures on one classifier, as plain data."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.evidence.recipes import _agreement_toys as toys
from headway.methods.diagnosis.song_of_disagreement import (
    METHODS,
    Classifier,
    Example,
    Settings,
    average_precision,
    encode,
    explain,
    faithfulness,
    fit_probe,
    frequency_scores,
    items_of,
    kendall,
    position_scores,
    prepare,
    random_scores,
    relative_errors,
)
from headway.methods.diagnosis.song_of_disagreement.probe import accuracy
from headway.statistics import auroc
from headway.tasks.planted_reviews import make_reviews

#: The paper's attributions, whose pairs are compared; the attention explanation stands beside them.
ATTRIBUTIONS = ("lime", "integrated_gradients", "grad_shap", "deep_lift", "deep_shap")
#: Pairs that approximate the same thing (Table 3 of the paper has them highest).
SAME_FAMILY = (("integrated_gradients", "grad_shap"), ("deep_lift", "deep_shap"))
REAL = (
    "attention_last", "attention_rollout", "attention_values", "input_x_gradient", "integrated_gradients", "grad_shap",
    "deep_lift", "lime", "ablation",
)  # fmt: skip
#: Rules that one text decides and that both families learn. The small BERT does not learn the third, negation, in 2,500
#: steps, so it stands for itself on recurrent networks.
RULES, TURNED = ("additive", "conjunction"), "negation"


def compared(
    classifier: Classifier, given: Sequence[Example], methods: Sequence[str], settings: Settings, seed: int
) -> dict[str, Any]:
    """By text: τ of every pair of methods, of methods that draw with themselves, and of methods with random scores;
    among tokens that decide nothing, τ with places (earlier first) and with rarity (rarer in these texts first); area
    under the curve and average precision against the rationale, comprehensiveness beyond random orders, and
    completeness errors."""
    drawn = [name for name in methods if METHODS[name].random]
    pairs: dict[str, list[float]] = {f"{a} {b}": [] for a, b in itertools.combinations(methods, 2)}
    found: dict[str, Any] = {
        "pairs": pairs,
        "again": {name: [] for name in drawn},
        "random": [],
        "place": {name: [] for name in methods},
        "rarity": {name: [] for name in methods},
        "auroc": {name: [] for name in methods},
        "precision": {name: [] for name in methods},
        "excess": {name: [] for name in methods},
        "errors": {},
    }
    rarity = frequency_scores(given)
    for number, example in enumerate(given):
        one = explain(classifier, example, methods, settings, seed=seed)
        again = explain(classifier, example, drawn, settings, seed=seed + 1)
        items = {name: items_of(e.scores, example) for name, e in one.items()}
        for a, b in itertools.combinations(methods, 2):
            pairs[f"{a} {b}"].append(kendall(items[a], items[b]))
        for name in drawn:
            found["again"][name].append(kendall(items[name], items_of(again[name].scores, example)))
        idle = _idle(example)
        for name, scores in items.items():
            found["place"][name].append(kendall(scores[idle], position_scores([scores])[0][idle]))
            found["rarity"][name].append(kendall(scores[idle], rarity[number][idle]))
        noise = random_scores([items[methods[0]]], seed + number)[0]
        found["random"].append(float(np.nanmean([kendall(noise, x) for x in items.values()])))
        problem = prepare(classifier, example, settings)
        for name, e in one.items():
            marks = example.rationale
            if marks is not None:
                ranked = marks[example.real & ~example.special]
                found["auroc"][name].append(auroc(items[name], ranked))
                found["precision"][name].append(average_precision(items[name], ranked))
            found["excess"][name].append(faithfulness(problem, e.scores, seed=seed).excess)
            if e.error is not None:
                found["errors"].setdefault(name, []).extend(relative_errors([e]).tolist())
    return found


def _idle(example: Example) -> np.ndarray:
    """Which of the ranked tokens decide nothing."""
    ranked = example.real & ~example.special
    return np.ones(int(ranked.sum()), bool) if example.rationale is None else ~example.rationale[ranked]


def toy(family: str, rule: str, seed: int, *, steps: int, texts: int, masks: int) -> dict[str, Any]:
    """One toy: trained, checked on fresh texts, and explained on others."""
    pair = rule == "pair"
    model: Classifier = toys.transformer(seed) if family == "transformer" else toys.recurrent(seed, pair=pair)
    right = toys.train(model, rule, steps, seed)
    attention = "attention_rollout" if family == "transformer" else "attention_last"
    settings = Settings(masks=masks, allow_unsupported=True)
    given = toys.examples(rule, texts, seed)
    return {
        "family": family,
        "rule": rule,
        "attention": attention,
        "accuracy": right,
        **compared(model, given, (attention, *ATTRIBUTIONS), settings, seed),
    }


def long_texts(seed: int, *, steps: int, texts: int, masks: int) -> dict[str, Any]:
    """LIME with itself under two seeds, on the longest and the shortest texts that a toy was trained on."""
    model = toys.transformer(seed)
    right = toys.train(model, "additive", steps, seed)
    found: dict[str, Any] = {"accuracy": right}
    for name, words in (("short", toys.LENGTHS[0]), ("long", toys.LENGTHS[1])):
        found[name] = []
        for example in toys.examples("additive", texts, seed, lengths=(words, words)):
            both = [explain(model, example, ["lime"], Settings(masks=masks), seed=s)["lime"].scores for s in (1, 2)]
            found[name].append(kendall(*(items_of(scores, example) for scores in both)))
    return found


def uniform(seed: int, *, steps: int) -> dict[str, float]:
    """Accuracy of recurrent networks with trained and with uniform attention, by rule."""
    found = {}
    for rule, activation in itertools.product(RULES, ("softmax", "uniform")):
        found[f"{rule} {activation}"] = toys.train(toys.recurrent(seed, activation=activation), rule, steps, seed)
    return found


def real(seed: int, *, reviews: int, texts: int, masks: int) -> dict[str, Any]:
    """MiniLM with a probe that tells praise from complaint, on reviews whose deciding words are known."""
    from headway.hosts import load

    host, tokenizer = load("minilm")
    made = make_reviews(reviews, np.random.default_rng(seed))
    given = [encode(tokenizer, r.text, tokens=128, label=r.label, rationale=r.rationale) for r in made]
    cut = reviews // 2
    probe = fit_probe(host, given[:cut], mask_id=tokenizer.mask_token_id)
    return {
        "accuracy": accuracy(probe, given[cut:]),
        **compared(probe, given[cut : cut + texts], REAL, Settings(masks=masks, allow_unsupported=True), seed),
    }


def stand_in(seed: int, *, texts: int, masks: int) -> dict[str, Any]:
    """The same measurement on an untrained toy, where the real model would take too long."""
    model = toys.transformer(seed)
    model.module.eval()
    given = toys.examples("additive", texts, seed)
    return {"accuracy": 0.5, **compared(model, given, REAL, Settings(masks=masks, allow_unsupported=True), seed)}
