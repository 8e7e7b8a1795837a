"""The claims of the CLIP recipe: criteria, written before any measurement, and how numbers answer them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, interval_excludes
from headway.evidence.recipe import Context
from headway.statistics import Measurement, bootstrap, bootstrap_difference, bootstrap_ratio, proportion

#: A model counts when it answers its own questions; chance is 0.27.
LEARNED = at_least(0.8, of="accuracy", by="value", label="zero-shot accuracy of the least of the models")
BIASED = at_least(0.3, of="before", by="value", label="skew of circles towards red with all heads, in nats")
#: A model counts as one with high heads when the heads that were confined to a concept score five of five on it.
CARRIES = at_least(0.66, of="planted_high", by="value", label="share of planted heads that score five")

CRITERIA = {
    "parts-add-up": all_of(
        at_most(1e-4, label="distance of the sum of all parts from the embedding"),
        at_most(1e-4, of="real_vit", label="the same on the embedded ViT and photographs"),
    ),
    "built-heads-score": all_of(
        at_least(5, label="score of a head built to write colour alone", by="value"),
        at_least(0.5, of="mixtures_at_most_two", by="value", label="share of built mixtures that score at most 2"),
        requires=LEARNED,
    ),
    "texts-keep-answers": at_least(
        0.8, by="value", label="accuracy left by five texts per head over that of the model", requires=LEARNED
    ),
    "high-heads-matter-more": all_of(
        interval_excludes(
            0.0, of="difference", side="above", minimum_n=3, label="drop by high heads above that by others"
        ),
        at_least(2.0, by="value", label="drop by high heads over that by as many others of the same layers"),
        requires=LEARNED,
    ),
    "high-against-low": interval_excludes(
        0.0, side="above", minimum_n=3, label="drop by high heads above that by as many low heads", requires=LEARNED
    ),
    "colour-heads-serve-colour": interval_excludes(
        0.0, side="above", minimum_n=3, label="colour answers lost above shape answers lost", requires=LEARNED
    ),
    "planted-high-heads-matter-more": all_of(
        interval_excludes(
            0.0, of="difference", side="above", minimum_n=3, label="drop by high heads above that by others"
        ),
        at_least(2.0, by="value", label="drop by high heads over that by as many others of the same layer"),
        requires=(LEARNED, CARRIES),
    ),
    "planted-heads-serve-their-concept": interval_excludes(
        0.0, side="above", minimum_n=3, label="drop of a head's own concept above that of the others",
        requires=(LEARNED, CARRIES),
    ),
    "colour-heads-carry-the-planted-bias": all_of(
        interval_excludes(
            0.0, side="above", minimum_n=3, label="skew of circles towards red, lowered by silencing colour heads"
        ),
        at_least(0.0, of="beyond_others", by="value", label="lowered beyond what as many other heads do"),
        requires=(LEARNED, BIASED),
    ),
}  # fmt: skip
#: What is kept of the scores of a model.
SCORES = ("classes", "shares", "concentrated", "heads")
NONE = Measurement(math.nan, n=0)


def decomposition_claim(models: Sequence[dict[str, Any]], real: float) -> Claim:
    errors = {name: max(m["errors"][name] for m in models) for name in ("image", "text", "pruned")}
    return Claim(
        id="parts-add-up",
        statement="What heads and MLPs write adds up to the embedding, in both towers, pruned or not.",
        paper=PaperValue("exact up to rounding", where="arXiv 2310.05916, section 3"),
        measured=Measurement(max(errors.values()), n=len(models)),
        criterion=CRITERIA["parts-add-up"],
        others={"real_vit": Measurement(real)},
        details={"errors": errors},
        notes="The largest over scenes, both towers and three gated heads. The embedding has length one.",
    )


def toy_claims(context: Context, models: Sequence[dict[str, Any]]) -> list[Claim]:
    learned = {"accuracy": _least(models)}
    colour = [s for m in models for s in m["planted"]["colour"]]
    mixtures = [s for m in models for s in m["planted"]["mixtures"]]
    kept = [m["kept"]["texts"] / m["kept"]["whole"] for m in models]
    pairs = _by_model(models, "high")
    special = [m["specialised"] for m in models]
    against = _by_model(special, "against")
    # Pictures and prompts of one model share its heads: a model is a sample.
    lost = [float(np.mean(m["interaction"])) for m in models if m["interaction"]]
    return [
        Claim(
            id="built-heads-score",
            statement="A head built to write one concept scores five; heads built to write mixtures score two or less.",
            paper=PaperValue("not reported; a positive control"),
            measured=Measurement(float(min(colour)), n=len(colour)),
            criterion=CRITERIA["built-heads-score"],
            others={
                **learned,
                "mixtures_at_most_two": proportion(sum(s <= 2 for s in mixtures), len(mixtures)),
                "mixtures": bootstrap(mixtures, generator=context.generator("mixtures")),
            },
            notes="Five texts drawn evenly from five concepts would score at most two in 71 % of the draws.",
        ),
        Claim(
            id="texts-keep-answers",
            statement="Heads replaced by what their five texts explain keep most of the accuracy.",
            paper=PaperValue("72.77 % against 75.25 %", "ImageNet, ViT-L, 60 texts", "arXiv 2310.05916, section 4"),
            measured=bootstrap(kept, generator=context.generator("kept")),
            criterion=CRITERIA["texts-keep-answers"],
            others={
                **learned,
                "by_means": bootstrap(
                    [m["kept"]["means"] / m["kept"]["whole"] for m in models], generator=context.generator("means")
                ),
            },
            notes="`by_means`: every head at its mean. What the MLPs write stays in both.",
        ),
        Claim(
            id="high-heads-matter-more",
            statement="Silencing heads of a high score costs more accuracy than silencing as many other heads.",
            paper=PaperValue(
                "68.22 to 51.70 (high) and 65.38 (low)", "CIFAR-100, ViT-B-16 OpenAI, sets of unequal size", "pruning"
            ),
            measured=_ratio(context, pairs, "high"),
            criterion=CRITERIA["high-heads-matter-more"],
            others={**learned, "difference": _difference(context, pairs, "high")},
            details={name: [m[name] for m in models] for name in ("high", "matched", "all high", *SCORES)},
            notes="Three texts describe a head: with the paper's five, a first run found no high head among 96, since "
            "four values of an attribute span three directions. Mean drop over five questions. As many heads are "
            "silenced as there are others in the same layers; the mean of five draws for each model, which is a "
            "sample: a first form took the draws as independent, and held by one head of one model. Heads are scored "
            "and silenced on different scenes. A model without a high head has nothing to silence.",
        ),
        Claim(
            id="high-against-low",
            statement="At equal count, high heads cost more accuracy than low heads.",
            paper=PaperValue("columns of the published equal-count table look swapped", where="equal-count table"),
            measured=_difference(context, against, "against"),
            criterion=CRITERIA["high-against-low"],
            others=learned,
            details={"pairs": against, **{name: [m[name] for m in special] for name in ("high", "low")}},
            notes="On the models with planted heads, described by the paper's five texts: of three texts one always "
            "fits the concept that is named after them, so no head is low, and a first record, which asked the other "
            "models, had no pair. With five concepts a low head needs five texts of five concepts; models without one "
            "have nothing to compare. Low heads stand in any layer.",
        ),
        Claim(
            id="colour-heads-serve-colour",
            statement="Silencing the heads labelled with colour costs more answers about colour than about shape.",
            paper=PaperValue(
                "Country-211 22.81 to 14.09 by location heads, 22.67 by animal heads", "ViT-B-16 OpenAI", "by concept"
            ),
            measured=bootstrap(lost, generator=context.generator("lost")) if lost else NONE,
            criterion=CRITERIA["colour-heads-serve-colour"],
            others=learned,
            details={"colour heads": [m["colour heads"] for m in models]},
            notes="Colour answers lost minus shape answers lost, a mean for each model that has colour heads: two or "
            "three texts of colour. A first form took the pictures of one model as independent.",
        ),
    ]  # fmt: skip


def _by_model(models: Sequence[dict[str, Any]], name: str) -> list[list[float]]:
    """The mean of both sides over the draws of a model; none for models without a draw."""
    return [[float(np.mean(side)) for side in zip(*m[name], strict=True)] for m in models if m[name]]


def specialised_claims(context: Context, models: Sequence[dict[str, Any]]) -> list[Claim]:
    planted = [high for m in models for high in m["planted high"]]
    gates = {
        "accuracy": _least(models),
        "planted_high": proportion(sum(planted), len(planted)),
    }
    # Draws of one model share its heads: a model is a sample.
    drops = _by_model(models, "drops")
    serve = [float(np.mean(m["own"]) - np.mean(m["other"])) for m in models]
    note = (
        "Two of the eight heads of the last layer may write along the directions of one concept each (colour, "
        "position) and nowhere else; the image tower was trained on under that bound, the other heads are free. What a "
        "head says is planted so, how much is lost without it is not. The paper's five texts describe a head here. A "
        "first record, of three models, planted a third concept, shape, which has four values and is worded like "
        "colour: its heads scored two or three, and the gate was missed at 4 of 9 heads. What silencing cost was seen "
        "then: 0.0002 by high heads, 0.004 by others. The criteria stayed."
    )
    return [
        Claim(
            id="planted-high-heads-matter-more",
            statement="Where heads are consistent by construction, silencing high heads costs more accuracy than "
            "silencing as many others of their layer.",
            paper=PaperValue("high heads cost more in most tables, at unequal count", where="pruning"),
            measured=_ratio(context, drops, "planted"),
            criterion=CRITERIA["planted-high-heads-matter-more"],
            others={**gates, "difference": _difference(context, drops, "planted")},
            details={name: [m[name] for m in models] for name in ("heads", "high", "drops")},
            notes=note,
        ),
        Claim(
            id="planted-heads-serve-their-concept",
            statement="Silencing a head that writes of one concept costs answers about that concept more than others.",
            paper=PaperValue(
                "Country-211 22.81 to 14.09 by location heads, 22.67 by animal heads", "ViT-B-16 OpenAI", "by concept"
            ),
            measured=bootstrap(serve, generator=context.generator("serve")),
            criterion=CRITERIA["planted-heads-serve-their-concept"],
            others=gates,
            details={name: [m[name] for m in models] for name in ("own", "other")},
            notes=note,
        ),
    ]


def bias_claim(context: Context, models: Sequence[dict[str, Any]]) -> Claim:
    known = [m for m in models if m["after"]]
    before = [float(np.mean(m["before"])) for m in known]
    after = [float(np.mean(m["after"])) for m in known]
    # At equal count: how much lower the skew is with colour heads silenced than with as many others.
    beyond = [float(np.mean(other) - np.mean(own)) for m in known for own, other in m["draws"]]
    cost = [float(np.mean(list(m["cost"].values()))) for m in known]
    lower = NONE
    if before:
        lower = bootstrap_difference(before, after, paired=True, generator=context.generator("bias"), unit="nats")
    return Claim(
        id="colour-heads-carry-the-planted-bias",
        statement="Where nearly all circles were red in training, silencing colour heads lowers the skew of circles "
        "towards red.",
        paper=PaperValue("MaxSkew of race 64.6 to 55.6 by high heads, 66.6 by low", "FairFace, B-16 OpenAI", "bias"),
        measured=lower,
        criterion=CRITERIA["colour-heads-carry-the-planted-bias"],
        others={
            "accuracy": _least(models),
            "before": bootstrap(before, generator=context.generator("before"), unit="nats") if before else NONE,
            "after": bootstrap(after, generator=context.generator("after"), unit="nats") if after else NONE,
            "beyond_others": bootstrap(beyond, generator=context.generator("beyond"), unit="nats") if beyond else NONE,
            "accuracy_cost": bootstrap(cost, generator=context.generator("cost")) if cost else NONE,
        },
        details={"models": list(models)},
        notes="300 steps: after 250, in a first run on other seeds, one model missed the gate by 0.02. 95 % of the "
        "circles are red in training; scenes of the test are balanced. A model's mean over six "
        "prompts is a sample; a first form took the prompts as independent, and held by one model. The paper sums over "
        "104 prompts; this is the skew of red in nats.",
    )


def _least(models: Sequence[dict[str, Any]]) -> Measurement:
    return Measurement(min(float(np.mean(list(m["accuracy"].values()))) for m in models), n=len(models))


def _ratio(context: Context, pairs: Sequence[Sequence[float]], name: str) -> Measurement:
    if not pairs or np.mean([other for _, other in pairs]) <= 0:
        return NONE
    first, second = zip(*pairs, strict=True)
    return bootstrap_ratio(first, second, paired=True, generator=context.generator(f"{name} ratio"))


def _difference(context: Context, pairs: Sequence[Sequence[float]], name: str) -> Measurement:
    if not pairs:
        return NONE
    first, second = zip(*pairs, strict=True)
    return bootstrap_difference(first, second, paired=True, generator=context.generator(f"{name} difference"))
