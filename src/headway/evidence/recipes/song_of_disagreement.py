"""A Song of (Dis)agreement: rank correlation between explanations against what is true, on toys and on MiniLM.

Toys are a stock BERT and the paper's recurrent network, trained on texts whose label depends on planted words and gated
on their accuracy. MiniLM with a probe reads reviews in plain English whose deciding words are known. The paper's five
data sets and its fine-tuned DistilBERT are not here, and its released self-attention is not the standard function; what
is tested is the direction of its tables, its thesis with a known truth, and the controls that it lacks.

Paper: A Song of (Dis)agreement, HHAI 2022, doi 10.3233/FAIA220190 (workshop form arXiv 2105.03287).
"""

from __future__ import annotations

from functools import partial

import torch

from headway.evidence.claims import Claim
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _agreement_claims as claims
from headway.evidence.recipes import _agreement_habits as habits
from headway.evidence.recipes import _agreement_measures as measures

CRITERIA = claims.CRITERIA | habits.CRITERIA
#: What is trained: each family on the rules that a single text decides, the recurrent one also on negation and pairs.
TOYS = (
    ("transformer", "additive"),
    ("transformer", "conjunction"),
    ("recurrent", "additive"),
    ("recurrent", "conjunction"),
    ("recurrent", measures.TURNED),
    ("recurrent", "pair"),
)


def run(context: Context) -> list[Claim]:
    seeds = [seed % 2**31 for seed in context.seeds(context.choose(smoke=1, small=3, full=3))]
    steps, texts, masks = context.choose(smoke=(3, 2, 12), small=(3000, 20, 500), full=(3000, 500, 1000))
    toys = [
        context.stage(
            f"{family}-{rule}-{i}", partial(measures.toy, family, rule, seed, steps=steps, texts=texts, masks=masks)
        )
        for family, rule in TOYS
        for i, seed in enumerate(seeds)
    ]
    uniform = [
        context.stage(f"uniform-{i}", partial(measures.uniform, seed, steps=steps)) for i, seed in enumerate(seeds)
    ]
    many, long = context.choose(smoke=(12, 2), small=(1000, 8), full=(1000, 100))
    ceiling = context.stage("long-texts", partial(measures.long_texts, seeds[0], steps=steps, texts=long, masks=many))
    reviews, explained, tried = context.choose(smoke=(0, 4, 12), small=(500, 20, 300), full=(1000, 500, 1000))
    if context.size == "smoke":
        real = context.stage("minilm", partial(measures.stand_in, seeds[0], texts=explained, masks=tried))
    else:
        real = context.stage(
            "minilm", partial(measures.real, context.seed, reviews=reviews, texts=explained, masks=tried)
        )
    return [
        *claims.toy_claims(context, toys),
        *claims.control_claims(context, uniform, ceiling),
        *claims.real_claims(context, real),
        *habits.habit_claims(context, toys, real),
    ]


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "it explains 500 texts of each classifier with 1,000 masks and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="song-of-disagreement",
    title="A Song of (Dis)agreement: Evaluating the Evaluation of Explainable Artificial Intelligence in NLP",
    run=run,
    criteria=CRITERIA,
    obstacle=_obstacle,
)
