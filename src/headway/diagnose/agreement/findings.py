"""What a diagnosis of agreement says, in sentences with numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from headway.diagnose.agreement.result import Agreement
from headway.statistics import Measurement, number

#: An explanation finds the words that decide from this area under the curve on.
FINDS = 0.9
#: Relative completeness error beyond which an attribution that promises to add up is warned of.
ERROR = 0.05
#: Agreement of integrated gradients across baselines below which the choice is warned of.
STEADY = 0.7
#: Characters of a reason that are shown; `refused` has it whole.
SHOWN = 200
#: Texts below which the averages are warned of.
FEW = 10


def findings(found: Agreement) -> list[str]:
    return [*_alike(found), *_ceilings(found), *_right(found), *_top(found), *_faithful(found), *_people(found)]


def warnings(found: Agreement) -> list[str]:
    told = []
    accuracy, held = found.model.get("accuracy"), found.model.get("held_out")
    if isinstance(accuracy, float) and accuracy < FINDS:
        told.append(
            f"The classifier is right on {_share(accuracy)} of {held} labelled texts: explanations of a model that "
            "errs need not mark the words that people would."
        )
    if len(found.texts) < FEW:
        told.append(f"{len(found.texts)} texts are few; intervals over texts are wide. Use more with --count.")
    for name, reason in found.refused.items():
        told.append(f"{name} was left out. {reason if len(reason) <= SHOWN else reason[:SHOWN] + '…'}")
    lost = [(p["undefined"], p["short"]) for p in found.pairs]
    short, undefined = max(s for _, s in lost), max(u for u, _ in lost)
    if short:
        told.append(
            f"{short} of {len(found.texts)} texts have too few tokens to be ranked and count in no correlation."
        )
    if undefined:
        told.append(f"In up to {undefined} of {len(found.texts)} texts a method gives all tokens one score: no order.")
    for m in found.methods:
        if _known(m["completeness"]) and m["completeness"] > ERROR and m["name"] != "input_x_gradient":
            told.append(
                f"The attributions of {m['words']} miss what they should add up to by {_share(m['completeness'])} "
                f"(median).{' ' + m['note'].capitalize() + '.' if m['note'] else ''}"
            )
    other = {kind: tau["value"] for kind, tau in found.controls["baselines"].items() if tau is not None}
    if other and min(other.values()) < STEADY:
        listed = ", ".join(f"{kind} {_short(value)}" for kind, value in other.items())
        told.append(
            f"Integrated gradients from other baselines than {found.run['settings']['settings']['baseline']} agree "
            f"with themselves by {listed} only: the baseline is part of the explanation."
        )
    told.append(
        "Agreement between methods is no evidence that either is right, and disagreement none that one is wrong. Read "
        "it beside the noise ceilings and the tests of being right."
    )
    return told


def _alike(found: Agreement) -> list[str]:
    known = [p for p in found.pairs if p["tau"] is not None]
    if not known:
        return ["No two methods order any text."]
    most, least = max(known, key=_value), min(known, key=_value)
    mean = found.controls["pairs"]
    measure = _measure(found)
    return [
        f"Two methods order the tokens of a text with {measure} = {_short(mean)} on average over {len(known)} pairs; "
        f"most alike are {_words(found, most['first'])} and {_words(found, most['second'])} ({_short(_value(most))}), "
        f"least {_words(found, least['first'])} and {_words(found, least['second'])} ({_short(_value(least))})."
    ]


def _ceilings(found: Agreement) -> list[str]:
    told = []
    for m in found.methods:
        if m["ceiling"] is not None:
            told.append(
                f"{_capital(m['words'])} agrees with itself under another seed by {_tau(m['ceiling'])}: so much its "
                "own noise leaves."
            )
    return told


def _right(found: Agreement) -> list[str]:
    """High faithfulness with low mutual agreement, where the words that decide are known."""
    scored = [m for m in found.methods if m["auroc"] is not None]
    if not scored:
        return []
    good = [m["name"] for m in scored if m["auroc"]["value"] >= FINDS]
    best = max(scored, key=lambda m: m["auroc"]["value"])
    worst = min(scored, key=lambda m: m["auroc"]["value"])
    told = [
        f"{len(good)} of {len(scored)} methods find the words that decide (area under the curve ≥ {FINDS}): best is "
        f"{best['words']} with {_short(best['auroc']['value'])}, worst {worst['words']} with "
        f"{_short(worst['auroc']['value'])}."
    ]
    between = [_value(p) for p in found.pairs if p["first"] in good and p["second"] in good and p["tau"] is not None]
    if between:
        told.append(
            f"Those {len(good)} agree with each other by {_measure(found)} = {_short(sum(between) / len(between))}: "
            "what they share are the words that matter, and most pairs of tokens are pairs of other words."
        )
    return told


def _top(found: Agreement) -> list[str]:
    known = [p["top"]["value"] for p in found.pairs if p["top"] is not None]
    if not known:
        return []
    ties = [m["near_ties"] for m in found.methods if _known(m["near_ties"])]
    return [
        f"Over the quarter of the tokens on top alone, τ is {_short(sum(known) / len(known))}; "
        f"{_share(sum(ties) / max(len(ties), 1))} of all pairs of tokens have scores within 1 % of the range of each "
        "other, and τ counts them as much as any."
    ]


def _faithful(found: Agreement) -> list[str]:
    scored = [m for m in found.methods if m["excess"] is not None]
    better = [m for m in scored if (Measurement.from_dict(m["excess"]).low or 0.0) > 0]
    best = max(scored, key=lambda m: m["excess"]["value"])
    return [
        f"Taking out the best tokens lowers the output more than taking out random ones for {len(better)} of "
        f"{len(scored)} methods; most for {best['words']}, by {_short(best['excess']['value'])} more."
    ]


def _people(found: Agreement) -> list[str]:
    if not found.people:
        return []
    preferred = found.people["preferred"]
    told = [f"{len(found.people['people'])} people gave {found.people['answers']} answers."]
    if preferred:
        best = max(preferred, key=lambda name: preferred[name]["value"])
        told = [
            f"{told[0][:-1]}; {_words(found, best)} was preferred most, in "
            f"{Measurement.from_dict(preferred[best])} of its comparisons."
        ]
    return told


def _words(found: Agreement, name: str) -> str:
    return next((str(m["words"]) for m in found.methods if m["name"] == name), name)


def _measure(found: Agreement) -> str:
    measure = found.run["settings"]["measure"]
    return "τ" if measure == "kendall" else str(measure)


def _tau(given: Mapping[str, Any]) -> str:
    return str(Measurement.from_dict({**given, **{k: _round(given[k]) for k in ("value", "low", "high")}}))


def _round(value: Any) -> Any:
    return round(value, 2) if isinstance(value, float) else value


def _value(pair: Mapping[str, Any]) -> float:
    return float(pair["tau"]["value"])


def _short(value: float) -> str:
    return number(round(value, 2))


def _share(value: float) -> str:
    return f"{number(round(100 * value, 1))} %"


def _known(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
