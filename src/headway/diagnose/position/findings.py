"""What a diagnosis says, in sentences with numbers, and what to know before trusting them."""

from __future__ import annotations

import math
from typing import Any

from headway.diagnose.position.result import Position, Retriever
from headway.methods.diagnosis.posir.evaluation import WHOLE
from headway.methods.diagnosis.posir.retrieval import TOP
from headway.statistics import Measurement, number

#: Queries in the emptiest bin below which an index of twenty bins says little.
FEW = 10
SURE = 0.05
#: A slope below this is rounding.
EXACT = 1e-9


def findings(found: Position) -> list[str]:
    model, *others = found.retrievers
    return [
        _quality(model),
        *_index(model, "all lengths", model.overall),
        *(told for name, one in _whole(model)[-1:] for told in _index(model, name, one)),
        *_growth(model),
        *(told for other in others for told in _other(other)),
        *(told for one in found.retrievers for told in _moved(one)),
        *_saliency(found.saliency),
    ]


def warnings(found: Position, skipped: list[str]) -> list[str]:
    model = found.retrievers[0]
    told = []
    if skipped:
        told.append(f"{len(skipped)} rows could not be used and were left out: {skipped[0]}")
    for why, count in found.run.get("dropped", {}).items():
        told.append(f"{count} queries or documents were dropped: {why}.")
    if model.absent:
        told.append(f"{model.absent} queries have a positive that is not in the corpus; they score 0.")
    cut = [name for name, (kind, _) in model.reading.items() if kind != WHOLE and model.buckets[name]]
    if cut:
        told.append(
            f"The model reads {model.max_tokens:,} tokens: {', '.join(cut)} {'test' if len(cut) > 1 else 'tests'} that "
            "cut, not a bias."
        )
    told += _thin(model)
    if found.saliency is None and found.run["settings"]["saliency"]:
        least = found.run["settings"]["least_tokens"] or found.run["settings"]["edges"][1]
        told.append(
            "No saliency: it needs a model in float32 that gradients go through, and documents that are read whole, "
            f"have at least {least} tokens, and their answer in the middle."
        )
    if model.moved is None and found.run["settings"]["moved"]:
        told.append("No answer was moved: no document that is read whole has nine sentences around an answer.")
    return told


def _quality(model: Retriever) -> str:
    lost = f"; {model.not_found:,} positives are not among the first {TOP:,}" if model.not_found else ""
    return (
        f"{number(round(model.overall['mean'], 3))} is the nDCG@10 of {model.name} over {model.overall['queries']:,} "
        f"queries{lost}."
    )


def _index(model: Retriever, name: str, one: dict[str, Any]) -> list[str]:
    if one["undefined"]:
        return [f"{name}: no index, {one['undefined']}."]
    index = one["psi"]
    beyond = "more than" if index["p_value"] < SURE else "no more than"
    return [
        f"{number(round(index['value'], 2))} is the position sensitivity ({name}), where chance gives "
        f"{number(round(index['null_mean'], 2))} ({number(round(index['null_low'], 2))} to "
        f"{number(round(index['null_high'], 2))}): {beyond} chance (p = {_p(index['p_value'])}). {_wide(one)}"
        f"{_direction(one)}"
    ]


def _wide(one: dict[str, Any]) -> str:
    wide = one["wide"]
    if wide is None:
        return ""
    return (
        f"In five wide bins it is {number(round(wide['value'], 2))} against {number(round(wide['null_mean'], 2))} "
        f"(p = {_p(wide['p_value'])}). "
    )


def _direction(one: dict[str, Any]) -> str:
    slope = one["slope"]
    if slope is None:
        return ""
    if slope["p_value"] >= SURE:
        return f"No direction: the slope is {_signed(slope['value'])} (p = {_p(slope['p_value'])})."
    word = "Late answers are found less often" if slope["value"] < 0 else "Late answers are found more often"
    return f"{word}: nDCG changes by {_signed(slope['value'])} from start to end (p = {_p(slope['p_value'])})."


def _growth(model: Retriever) -> list[str]:
    known = [(name, one) for name, one in _whole(model) if one["wide"]]
    if len(known) < 2:
        return []
    (short, low), (long, high) = known[0], known[-1]
    return [
        f"{_signed(_excess(low))} is the index of five wide bins beyond chance for {short}, "
        f"{_signed(_excess(high))} for {long}; nDCG is {number(round(low['ndcg'], 2))} and "
        f"{number(round(high['ndcg'], 2))}."
    ]


def _other(other: Retriever) -> list[str]:
    one = other.overall
    if one["undefined"]:
        return [f"{other.name}: no index, {one['undefined']}."]
    index = one["psi"]
    return [
        f"{number(round(one['mean'], 3))} is the nDCG@10 of {other.name} on the same queries; its position sensitivity "
        f"is {number(round(index['value'], 2))} against {number(round(index['null_mean'], 2))} by chance "
        f"(p = {_p(index['p_value'])})."
    ]


def _moved(one: Retriever) -> list[str]:
    if one.moved is None:
        return []
    slope = Measurement.from_dict(one.moved["slope"])
    share = one.moved["share"]
    if abs(slope.value) < EXACT:
        return [f"Moved through the same {one.moved['documents']} documents, an answer leaves the score of {one.name}."]
    worth = f", {number(round(100 * share))} % of what the answer adds" if _finite(share) else ""
    low, high = (number(round(x, 3)) for x in (slope.low or slope.value, slope.high or slope.value))
    return [
        f"Moved from start to end of the same {one.moved['documents']} documents, an answer changes the score of "
        f"{one.name} by {number(round(slope.value, 3))} ({low} to {high}){worth}."
    ]


def _saliency(saliency: dict[str, Any] | None) -> list[str]:
    if not saliency or not saliency["first"]:
        return []
    first, last = (Measurement.from_dict(saliency[side]) for side in ("first", "last"))
    return [
        f"With the answer in the middle, the first fifth of a document has {number(round(100 * first.value, 1))} % of "
        f"the gradient and the last {number(round(100 * last.value, 1))} % ({saliency['documents']} documents; even "
        "would be 20 %)."
    ]


def _thin(model: Retriever) -> list[str]:
    thin = [
        name for name, one in model.buckets.items() if one and min((c for c in one["counts"] if c), default=0) < FEW
    ]
    told = []
    if thin:
        told.append(
            f"Fewer than {FEW} queries in some position bin ({', '.join(thin)}): there the raw index is mostly noise. "
            "Read it beside chance, or use the five wide bins and the line."
        )
    empty = [
        f"{name} ({sum(c == 0 for c in one['counts'])})"
        for name, one in model.buckets.items()
        if one and 0 in one["counts"]
    ]
    if empty:
        told.append(f"Position bins without a query: {', '.join(empty)}.")
    return told


def _whole(model: Retriever) -> list[tuple[str, dict[str, Any]]]:
    """Buckets with queries whose documents are read whole."""
    return [(name, one) for name, one in model.buckets.items() if one and model.reading[name][0] == WHOLE]


def _excess(one: dict[str, Any]) -> float:
    return float(one["wide"]["value"] - one["wide"]["null_mean"])


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{number(round(value, 2))}"


def _p(value: float) -> str:
    return number(float(f"{value:.2g}"))


def _finite(value: object) -> bool:
    return isinstance(value, float | int) and math.isfinite(value)
