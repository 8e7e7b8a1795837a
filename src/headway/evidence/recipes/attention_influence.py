"""AttentionInfluence: retrieval heads of a real model and of a toy, masked beside controls, and what they rank first.

SmolLM2 copies sentences out of an object. In planted decoders it is known which heads retrieve; a toy that learns to
recall shows what training makes of them, and scores texts. Trained students (what the paper's tables are about) are
toys too: the paper's take 7 billion parameters and a trillion tokens.

Paper: AttentionInfluence, arXiv 2505.07293.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, between, interval_excludes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _influence_stages as stages
from headway.evidence.recipes import _influence_toy as toy
from headway.methods.diagnosis.attention_influence import HeadScores
from headway.statistics import Measurement, bootstrap, bootstrap_difference, bootstrap_over_seeds

COPIES = at_least(0.95, of="accuracy", by="value", label="answer tokens of the probes that SmolLM2 predicts")
ANSWERS = at_least(0.95, of="accuracy", by="value", label="accuracy of the intact planted decoders")
LEARNED = at_least(0.95, of="accuracy", by="value", label="recall of the intact toy")
MATCHED = between(0.35, 0.65, of="perplexity", by="value", label="AUROC of the loss among matched texts")

CRITERIA = {
    "few-stable-heads": all_of(
        at_most(0.1, by="value", label="share of heads with a score above 0.5"),
        at_least(0.8, of="halves", by="value", label="Spearman's ρ between halves of the probes"),
        requires=COPIES,
    ),
    "masking-ends-copying": all_of(
        at_most(0.2, by="value", label="share of copying that is left without the retrieval heads"),
        at_least(0.9, of="controls", by="value", label="the same with layer-matched heads, median"),
        requires=COPIES,
    ),
    "answers-must-be-right": interval_excludes(
        0.0, side="above", minimum_n=6, label="AI of lists with right answers minus that with wrong ones"
    ),
    "planted-heads-found": all_of(
        at_least(1.0, by="value", label="share of planted heads found"),
        at_most(0.0, of="wrong", by="value", label="other heads found"),
        requires=ANSWERS,
    ),
    "planted-masking-ends-recall": all_of(
        at_most(1.5, by="value", label="accuracy without the detected heads, times that of guessing by frequency"),
        at_least(0.9, of="controls", by="value", label="accuracy without as many others of the same layers, median"),
        requires=ANSWERS,
    ),
    "toy-heads-found": all_of(
        at_most(0.5, by="value", label="share of heads with a score above 0.5"),
        at_least(0.8, of="halves", by="value", label="Spearman's ρ between halves of the probes"),
        requires=LEARNED,
    ),
    "toy-masking-ends-recall": all_of(
        at_most(0.2, by="value", label="recall without the retrieval heads"),
        at_least(0.9, of="controls", by="value", label="recall with as many others, median over intact"),
        requires=LEARNED,
    ),
    "toy-row-of-the-prediction": at_least(
        0.3, by="value", label="highest score at the predicting row minus that one row later", requires=LEARNED
    ),
    "toy-recall-ranks-first": at_least(
        0.9, by="value", label="least AUROC of recall against another kind", requires=(LEARNED, MATCHED)
    ),
    "toy-selection-helps-students": all_of(
        interval_excludes(
            0.0, side="above", minimum_n=3, label="recall loss after random texts minus after the selected"
        ),
        interval_excludes(
            0.0, of="against_perplexity", side="above", minimum_n=3, label="the same against texts of low perplexity"
        ),
        requires=LEARNED,
    ),
}


def run(context: Context) -> list[Claim]:
    found = context.stage("heads", lambda: stages.detected(context))
    heads = [(layer, head) for layer, head in found["chosen"]]
    scores = HeadScores.from_json(found["json"])
    copying = context.stage("masking", lambda: stages.masked_copying(context, heads, scores))
    texts = context.stage("texts", lambda: stages.scored_texts(context, heads))
    count = context.choose(smoke=1, small=3, full=5)
    sown = [context.stage(f"planted-{number}", partial(stages.planted_run, context, number)) for number in range(count)]
    toys = [context.stage(f"toy-{number}", partial(stages.toy_run, context, number)) for number in range(count)]
    return [
        _heads_claim(context, found),
        _copying_claim(context, found, copying),
        _texts_claim(context, texts),
        *_planted_claims(context, sown),
        *_toy_claims(context, toys),
        _ranking_claim(context, toys),
        _student_claim(context, [found["students"] for found in toys], toys),
    ]


def _heads_claim(context: Context, found: dict[str, Any]) -> Claim:
    return Claim(
        id="few-stable-heads",
        statement="Few heads of a real model retrieve, and one half of the probes finds the same as the other.",
        paper=PaperValue("top 5 % of heads", "16 of 320", "section 3"),
        measured=Measurement(found["above"], n=len(found["accuracy"])),
        criterion=CRITERIA["few-stable-heads"],
        others={
            "halves": Measurement(found["halves"], n=len(found["accuracy"])),
            "accuracy": bootstrap(found["accuracy"], generator=context.generator("accuracy")),
        },
        notes="A trial with four probes had shown scores, and an agreement of 0.51 between two and two of them, before "
        "the criteria were written; these are those of the design. The gate on answer tokens was first 0.8; it is now "
        "0.95, as for the toys, and sentences have up to 30 tokens, as in the paper, where they had up to 20: SmolLM2 "
        "often misses the first word, which the key alone tells (two of three on twelve probes), and copies the rest.",
        details={"highest": found["highest"], "chosen": found["chosen"]},
    )


def _copying_claim(context: Context, found: dict[str, Any], copying: dict[str, Any]) -> Claim:
    right = {name: np.array(values) for name, values in copying["right"].items()}
    controls = [values for name, values in right.items() if name.startswith("control")]
    added = right["intact"].mean() - right["floor"].mean()

    def left(values: np.ndarray) -> float:
        return float((values.mean() - right["floor"].mean()) / added) if added > 0 else float("nan")

    generator = context.generator("copying")
    return Claim(
        id="masking-ends-copying",
        statement="Without its retrieval heads a real model copies no more; without others of the same layers it does.",
        paper=PaperValue("GSM8K .182 to .007, random heads .127", "1.3 billion, 5 % masked", "table 2"),
        measured=Measurement(left(right["masked"]), n=len(right["masked"])),
        baseline=bootstrap(right["intact"], generator=generator),
        criterion=CRITERIA["masking-ends-copying"],
        others={
            "controls": Measurement(float(np.median([left(values) for values in controls])), n=len(controls)),
            "accuracy": bootstrap(found["accuracy"], generator=generator),
            "masked_accuracy": bootstrap(right["masked"], generator=generator),
            "floor": bootstrap(right["floor"], generator=generator),
            "controls_over_intact": Measurement(
                float(np.median([values.mean() for values in controls])) / max(float(right["intact"].mean()), 1e-9),
                n=len(controls),
            ),
            "below_controls": bootstrap_difference(
                np.mean(controls, 0), right["masked"], paired=True, generator=generator
            ),
        },
        notes="The share of what the object adds to the accuracy: 0 is the accuracy without the object, from the "
        "beginning of the sentence alone. Held-out probes; the answer is given token by token. A run with the "
        "same settings had been seen (0.20 masked, 0.28 without the object, 0.84 with controls, 0.93 intact) when the "
        "share of the intact accuracy was added beside the criterion, which stayed.",
        details={"right": copying["right"], "controls": copying["controls"], "heads": found["chosen"]},
    )


def _texts_claim(context: Context, texts: dict[str, Any]) -> Claim:
    right, wrong, prose = (np.array(texts[name]["influence"]) for name in ("right", "wrong", "prose"))
    generator = context.generator("texts intervals")
    return Claim(
        id="answers-must-be-right",
        statement="Texts whose answers stand in them have a higher AI than the same texts with wrong answers.",
        paper=PaperValue("selected texts are rated higher for reasoning", ".87 against .76", "table 4"),
        measured=bootstrap_difference(right, wrong, paired=True, generator=generator),
        baseline=bootstrap(wrong, generator=generator),
        criterion=CRITERIA["answers-must-be-right"],
        others={"right": bootstrap(right, generator=generator), "prose": bootstrap(prose, generator=generator)},
        notes="Both texts of a pair have nearly the same words in another order, so length and vocabulary say little. "
        "A trial with longer lists had shown a difference of 0.03.",
        details=texts,
    )


def _planted_claims(context: Context, sown: Sequence[dict[str, Any]]) -> list[Claim]:
    random = context.generator("planted")
    accuracy = {"accuracy": Measurement(min(s["intact"] for s in sown), n=len(sown))}

    def over(values: Sequence[float]) -> Measurement:
        return bootstrap_over_seeds(dict(enumerate([[v] for v in values])), generator=random)

    return [
        Claim(
            id="planted-heads-found",
            statement="Where it is known which heads retrieve, the score finds all of them and no others.",
            paper=PaperValue("not reported"),
            measured=over([s["found"] for s in sown]),
            criterion=CRITERIA["planted-heads-found"],
            others=accuracy | {"wrong": Measurement(max(s["wrong"] for s in sown), n=len(sown))},
        ),
        Claim(
            id="planted-masking-ends-recall",
            statement="Masking the detected heads ends recall; masking as many others of the same layers does not.",
            paper=PaperValue("Banking77 .415 to .0001, random heads .384", "1.3 billion", "table 2"),
            measured=over([s["masked"] / max(s["frequency"], 1e-9) for s in sown]),
            baseline=over([s["intact"] for s in sown]),
            criterion=CRITERIA["planted-masking-ends-recall"],
            others=accuracy
            | {
                "controls": over([float(np.median(s["controls"])) for s in sown]),
                "masked": over([s["masked"] for s in sown]),
                "frequency": over([s["frequency"] for s in sown]),
            },
            notes="A uniform head still tells how often each value stands in the text, so chance is guessing by "
            "frequency. The bound was first written as an accuracy of 0.2, as if chance were one in eight; runs that "
            "had shown 0.16 to 0.23 for three seeds made the mistake plain, and it became 1.5 times chance.",
            details={"controls": [s["controls"] for s in sown]},
        ),
    ]


def _toy_claims(context: Context, toys: Sequence[dict[str, Any]]) -> list[Claim]:
    random = context.generator("toys")
    seeds = tuple(range(len(toys)))
    accuracy = {"accuracy": Measurement(min(t["accuracy"] for t in toys), n=len(toys), seeds=seeds)}

    def over(values: Sequence[float]) -> Measurement:
        return bootstrap_over_seeds(dict(enumerate([[v] for v in values])), generator=random)

    halves = min((t["halves"] for t in toys), key=lambda value: (value == value, value))
    kept = [float(np.median(t["controls"])) / max(t["accuracy"], 1e-9) for t in toys if t["controls"]]
    controls = over(kept) if len(kept) == len(toys) else Measurement(float("nan"), n=len(kept))
    return [
        Claim(
            id="toy-heads-found",
            statement="The toy's retrieval heads stand out, and halves of the probes agree on them.",
            paper=PaperValue("not reported"),
            measured=over([t["above"] for t in toys]),
            criterion=CRITERIA["toy-heads-found"],
            others=accuracy | {"halves": Measurement(halves, n=len(toys))},
            details={"scores": [t["scores"] for t in toys]},
        ),
        Claim(
            id="toy-masking-ends-recall",
            statement="Recall needs the detected heads, all of them together, and not others.",
            paper=PaperValue("Banking77 .415 to .0001, random heads .384", "1.3 billion", "table 2"),
            measured=over([t["masked"] for t in toys]),
            baseline=over([t["accuracy"] for t in toys]),
            criterion=CRITERIA["toy-masking-ends-recall"],
            others=accuracy | {"controls": controls, "chance": Measurement(toy.CHANCE)},
            notes="Controls come from the same layer, and from later ones where it has too few other heads: heads of "
            "earlier layers write what retrieval heads read. The criteria were written for a toy in which pairs "
            "were two tokens, which did not learn; this one was made, and its steps chosen, after trials of it had "
            "been seen. A first record had four heads a layer, which share the keys among themselves: heads below the "
            "threshold left 0.37 of the recall, controls kept 0.87, and longer training lowered the scores. Two heads "
            "a layer were then looked at on one other seed after 250 steps: 0.12 left, and all of it without either "
            "later layer. The criteria stayed.",
            details={
                name: [t[name] for t in toys]
                for name in ("chosen", "by number", "by layer", "controls", "control heads")
            },
        ),
        Claim(
            id="toy-row-of-the-prediction",
            statement="A score taken at the row of the answer token, not the one that predicts it, misses the heads.",
            paper=PaperValue("not reported"),
            measured=over([float(np.nanmax(np.array(t["scores"], dtype=float))) - t["late"] for t in toys]),
            criterion=CRITERIA["toy-row-of-the-prediction"],
            others=accuracy,
        ),
    ]


def _ranking_claim(context: Context, toys: Sequence[dict[str, Any]]) -> Claim:
    def auroc(name: str, sign: float = 1.0) -> dict[str, float]:
        """Of recall against each other kind: the mean over toys."""
        return {
            kind: float(np.mean([_auroc(sign * _array(t, "recall", name), sign * _array(t, kind, name)) for t in toys]))
            for kind in toy.KINDS[1:]
        }

    by = {name: auroc(name) for name in ("influence", "random", "repetition")}
    losses = auroc("loss")
    worst = max(losses.values(), key=lambda value: abs(value - 0.5) if value == value else float("inf"))
    count = sum(t["kinds"]["matched"] for t in toys)
    return Claim(
        id="toy-recall-ranks-first",
        statement="Among texts that are equally hard and long, AI puts those that need long-range recall first.",
        paper=PaperValue("selects reasoning-intensive texts", where="section 4"),
        measured=Measurement(min(by["influence"].values()), n=count),
        criterion=CRITERIA["toy-recall-ranks-first"],
        others={
            "accuracy": Measurement(min(t["accuracy"] for t in toys), n=len(toys)),
            "perplexity": Measurement(worst, n=count),
            "random_heads": Measurement(min(by["random"].values()), n=count),
            "repetition": Measurement(min(by["repetition"].values()), n=count),
        },
        notes=f"Losses of matched texts differ by at most {stages.CALIPER} nats. AUROC of a record against a chain, a "
        "skip-gram, a phrase that is repeated, and symbols drawn by frequency; the least of the four. A first record "
        "had no skip-grams, and 0.85 against phrases. In a first trial other texts weighed so little in training that "
        "hardly any record had a match, so they now weigh as much as answers.",
        details={
            "auroc": by,
            "mean influence": {
                kind: [float(np.mean(_array(t, kind, "influence"))) if t["kinds"]["matched"] else None for t in toys]
                for kind in toy.KINDS
            },
            "guessed answers": [float(np.mean(t["kinds"]["guessed"])) for t in toys],
        },
    )


def _array(found: dict[str, Any], kind: str, name: str) -> np.ndarray:
    return np.array(found["kinds"][kind][name], dtype=float)


def _auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The share of pairs in which the positive is higher, ties counted half; NaN without pairs."""
    if not len(positive) or not len(negative):
        return float("nan")
    from scipy.stats import mannwhitneyu

    return float(mannwhitneyu(positive, negative).statistic / (len(positive) * len(negative)))


def _student_claim(context: Context, students: Sequence[dict[str, float]], toys: Sequence[dict[str, Any]]) -> Claim:
    def against(arm: str) -> Measurement:
        if len(students) < 2:
            return Measurement(float("nan"), n=len(students))
        return bootstrap_difference(
            [s[arm] for s in students],
            [s["influence"] for s in students],
            paired=True,
            generator=context.generator(f"students {arm}"),
            unit="nats",
        )

    return Claim(
        id="toy-selection-helps-students",
        statement="A wider model learns recall better when the texts of highest AI are seen more often.",
        paper=PaperValue("average 44.51 to 45.26", "7 billion parameters, 1 trillion tokens", "table 1"),
        measured=against("random"),
        criterion=CRITERIA["toy-selection-helps-students"],
        others={
            "against_perplexity": against("perplexity"),
            "accuracy": Measurement(min(t["accuracy"] for t in toys), n=len(toys)),
        },
        notes="A student sees the corpus and a fifth of it twice as often, for the same steps. All texts have one "
        "length, so a selection matched in length is the same. A trial with one seed and longer training had shown "
        "0.72, 0.18 and 0.16 nats after random texts, highest AI and lowest loss.",
        details={"losses": list(students)},
    )


RECIPE = Recipe(slug="attention-influence", title="AttentionInfluence", run=run, criteria=CRITERIA)
