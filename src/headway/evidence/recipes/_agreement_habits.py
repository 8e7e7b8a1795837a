"""What an attribution may follow in place of the model, the place of a token or its rarity, and what it must find where
one token matters for another: the negator of a word. Criteria were written before any measurement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most
from headway.evidence.recipe import Context
from headway.evidence.recipes._agreement_claims import LEARNED, least_accuracy
from headway.evidence.recipes._agreement_measures import RULES, TURNED
from headway.statistics import Measurement, bootstrap

#: Of a τ with place or rarity that explains nothing of an attribution; twice the bound of random scores.
LITTLE = 0.1

CRITERIA = {
    "place-explains-little": all_of(
        at_most(LITTLE, label="largest mean τ, either way, of an attribution with places on toys"),
        at_most(LITTLE, of="real", label="the same on MiniLM"),
        requires=LEARNED,
    ),
    "rarity-explains-little": all_of(
        at_most(LITTLE, label="largest mean τ, either way, of an attribution with rarity on toys"),
        at_most(LITTLE, of="real", label="the same on MiniLM"),
        requires=LEARNED,
    ),
    "negation-is-found": all_of(
        at_least(0.9, label="area under the curve of integrated gradients for the turned word and its negator"),
        at_least(0.9, of="lime", label="the same of LIME"),
        requires=LEARNED,
    ),
}


def habit_claims(context: Context, found: Sequence[dict[str, Any]], real: dict[str, Any]) -> list[Claim]:
    """Claims about toys and about MiniLM."""
    single = [t for t in found if t["rule"] in RULES]
    turned = [t for t in found if t["rule"] == TURNED]
    gate = least_accuracy([*single, real])

    def habit(name: str, part: str, statement: str) -> Claim:
        toys, own = _leanings(single, part), _leanings([real], part)
        return Claim(
            id=name,
            statement=statement,
            paper=PaperValue("not reported; a control of the tables"),
            measured=_largest(context, toys, f"{part}, toys"),
            criterion=CRITERIA[name],
            others={**gate, "real": _largest(context, own, f"{part}, MiniLM")},
            details={
                name: {method: float(np.mean(values)) for method, values in some.items()}
                for name, some in (
                    ("toys", toys),
                    ("MiniLM", own),
                    ("MiniLM, attention", _leanings([real], part, attention=True)),
                )
            },
            notes="Mean τ over the texts of all toys by method, among tokens that decide nothing: the others have a "
            "place and a rarity of their own. The interval is that of the method with the largest mean, so it is a "
            "little wide of the truth. A first form took the largest mean of any single toy; six texts of one toy "
            "showed that so few do not tell it from noise, and the bound stayed.",
        )

    def area(method: str) -> Measurement:
        values = [value for t in turned for value in t["auroc"][method]]
        return bootstrap(values, generator=context.generator(f"negation {method}"))

    return [
        habit("place-explains-little", "place", "Attributions do not order tokens by their place."),
        habit("rarity-explains-little", "rarity", "Attributions do not order tokens by their rarity."),
        Claim(
            id="negation-is-found",
            statement="Where a negator turns a word over, attributions of a recurrent network find both.",
            paper=PaperValue("not reported; known words are named as future work", where="conclusion"),
            measured=area("integrated_gradients"),
            criterion=CRITERIA["negation-is-found"],
            others={**least_accuracy(turned), "lime": area("lime"), "attention": area("attention_last")},
            details={"by toy": [{m: float(np.mean(v)) for m, v in t["auroc"].items()} for t in turned]},
            notes="In half of the texts the negator stands elsewhere and does nothing; then the word alone is to be "
            "found. The small BERT does not learn this rule.",
        ),
    ]


def _leanings(found: Sequence[dict[str, Any]], part: str, *, attention: bool = False) -> dict[str, list[float]]:
    """τ of each attribution, or attention explanation, with the part, by text; texts without any order are left out."""
    values: dict[str, list[float]] = {}
    for one in found:
        for name, own in one[part].items():
            if name.startswith("attention") == attention:
                values.setdefault(name, []).extend(v for v in own if np.isfinite(v))
    return {name: some for name, some in values.items() if some}


def _largest(context: Context, leanings: dict[str, list[float]], name: str) -> Measurement:
    """The mean of the method that leans most, without its sign."""
    if not leanings:
        return Measurement(float("nan"), n=0)
    most = max(leanings.values(), key=lambda values: abs(float(np.mean(values))))
    return bootstrap(np.sign(np.mean(most)) * np.array(most), generator=context.generator(name))
