"""What a diagnosis of roles says, in sentences with numbers, and what to mind before trusting them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from headway.diagnose.roles.result import Roles
from headway.methods.diagnosis.diagnose_localize_align import DIMENSIONS
from headway.methods.diagnosis.diagnose_localize_align.focal import COVER
from headway.statistics import Measurement, bootstrap_difference, number

#: Fewest held-out cases from which intervals are told without a warning.
MANY = 20
#: Numbers below this are told as 0.
NOTHING = 5e-5


def findings(found: Roles) -> list[str]:
    return [
        *_log(found.log),
        *_replies(found.replies),
        *_heads(found.localisation, found.run.get("settings", {})),
        *_aligned(found.alignment),
    ]


def warnings(found: Roles) -> list[str]:
    told = []
    if found.log is not None:
        told += _log_warnings(found.log)
    if found.localisation is not None:
        cases = len(found.localisation["held_out"])
        if cases < MANY:
            told.append(f"{cases} held-out cases give wide intervals; a higher --held-out narrows them.")
        told.append(
            f"Conflicts come from short templates of {_kinds(found.run.get('settings', {}))}. What they show need not "
            "hold for conflicts in long conversations."
        )
        weigh = found.run.get("settings", {}).get("weigh", "even")
        if weigh != "even" and found.localisation["weights"] is None:
            told.append(
                f"By {weigh} no conflict cost anything, so there was nothing to weigh by: all cases count alike."
            )
        if found.localisation["gates"]["focal"]["value"] == 0:
            told.append(
                "Silencing the focal heads changed nothing at all; the model may not use them for these answers."
            )
    return told


def _kinds(settings: Mapping[str, Any]) -> str:
    count = len(settings.get("kinds", ()))
    return "one kind" if count == 1 else f"{count} kinds" if count else "few kinds"


def _log_warnings(log: dict[str, Any]) -> list[str]:
    told = []
    if log["bad"]:
        first = log["bad"][0]
        told.append(
            f"{_counted(len(log['bad']), 'malformed row')} left out, the first in line {first['line']}: "
            f"{first['reason']}."
        )
    if log["empty"]:
        told.append(f"{log['empty']} turns have no role or no reply and were not marked.")
    turns = len(log["turns"])
    for judge in log["judges"]:
        if judge["invalid"]:
            told.append(
                f"Judge {judge['name']} gave no valid mark to {judge['invalid']} of {turns} turns; they are left out."
            )
        if judge["general"]:
            told.append(
                f"{judge['general']} of {turns} turns have a role without a rubric of its own and were marked by the "
                "general one."
            )
            break
    if log["without_rules"] and any(judge["name"] == "rules" for judge in log["judges"]):
        told.append(
            f"{log['without_rules']} of {turns} turns carry no rules: the rule judge gives them 3 in every dimension, "
            "which says nothing about them."
        )
    if any(judge["name"] == "model" for judge in log["judges"]):
        told.append("A small model is a weak judge. Trust its marks as far as they agree with another judge.")
    return told


def _log(log: dict[str, Any] | None) -> list[str]:
    if log is None:
        return []
    told = []
    for judge in log["judges"]:
        if judge["all"] is None:
            continue
        marks = judge["all"]["dimensions"]
        low, high = min(marks, key=marks.__getitem__), max(marks, key=marks.__getitem__)
        weakest = (
            f"; weakest is {DIMENSIONS[low]} ({_short(marks[low])}), strongest {DIMENSIONS[high]} "
            f"({_short(marks[high])})"
            if marks[low] < marks[high]
            else ""
        )
        told.append(
            f"Role adherence is {_measured(judge['all']['score'])} of 5 by judge {judge['name']}, over "
            f"{judge['all']['turns']} turns of {judge['all']['queries']} conversations{weakest}."
        )
        roles = judge["roles"]
        if len(roles) > 1:
            least = min(roles, key=lambda row: row["score"]["value"])
            told.append(f"The role with the lowest marks is {_cut(least['name'])}: {_measured(least['score'])}.")
    told += _costs(log)
    told += [
        f"Judges {pair['first']} and {pair['second']} rank turns with ρ = {_measured(pair['spearman']['all'])}; their "
        f"marks agree with a weighted κ of {_short(pair['weighted_kappa']['all'])} over {pair['turns']} turns."
        for pair in log["agreement"]
    ]
    return told


def _costs(marks: dict[str, Any]) -> list[str]:
    return [
        f"Under {one['after'] or 'no condition'} role adherence is {_measured(one['value'])} lower than under "
        f"{one['before'] or 'no condition'}, by judge {one['judge']} over {one['value']['n']} conversations in both."
        for one in marks["lost"]
    ]


def _replies(marks: dict[str, Any] | None) -> list[str]:
    if marks is None or not marks["judges"] or not marks["judges"][0]["conditions"]:
        return []
    judge = marks["judges"][0]
    kept = {row["name"]: row["dimensions"]["CC"] for row in judge["conditions"]}
    if set(kept) < {"neutral", "conflict"}:
        return []
    return [
        f"The model's own replies keep the rule with {_short(kept['neutral'])} of 5 in agreement and "
        f"{_short(kept['conflict'])} in conflict, by judge {judge['name']}."
    ]


def _heads(found: dict[str, Any] | None, settings: Mapping[str, Any]) -> list[str]:
    if found is None:
        return []
    neutral, conflict = found["neutral"], found["conflict"]
    near = found["concentration"]
    gates = found["gates"]
    total = sum(len(row) for row in found["scores"])
    return [
        f"{_wins(conflict)} of {len(conflict)} held-out conflicts are won by the rule "
        f"({_short(np.mean(conflict))} nats a token for its answer on average); in agreement it is {_wins(neutral)} of "
        f"{len(neutral)} ({_short(np.mean(neutral))}).",
        f"{len(found['focal'])} of {total} heads are focal, {_held(settings)} "
        f"layer{_s(found['focal_layers'])} {_listed(found['focal_layers'])}; {_percent(near['share'])} stand in "
        f"the middle third of the depth, where {_percent(near['expected'])} of all heads stand "
        f"(p = {_short(near['p_value'])}).",
        f"Focal heads turn {_more(found['specific'])} where the message contradicts the rule than where the same words "
        f"contradict nothing (difference {_measured(found['specific'])}).",
        f"Silencing the focal heads moves which rule wins by {_measured(gates['focal'])} nats a token, as many others "
        f"in the same layers by {_measured(gates['control'])} ({number(round(gates['ratio'], 2))} times, "
        f"p = {_short(gates['p_value'])}).",
    ]


def gains(found: dict[str, Any], row: dict[str, Any], *, seen: bool, condition: str = "conflict") -> Measurement | None:
    """How far training moved the margins of items of the kinds that it saw, or of the others."""
    cut = slice(None, found["seen"]) if seen else slice(found["seen"], None)
    after, before = row[condition][cut], found["before"][condition][cut]
    return bootstrap_difference(after, before, paired=True, generator=0) if after else None


def _aligned(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    told = []
    for row in found["rows"]:
        gain = gains(found, row, seen=True)
        other = gains(found, row, seen=False)
        kept = gains(found, row, seen=True, condition="neutral")
        if gain is None:
            continue
        told.append(
            f"LoRA on {row['layers_of']} layers moves held-out margins towards the rule by {_rounded(gain)} nats a "
            "token"
            + ("" if other is None else f", on kinds that were not trained on by {_rounded(other)}")
            + ("" if kept is None else f", in agreement by {_rounded(kept)}")
            + f" ({len(row['layers'])} layers, {row['parameters']:,} parameters, {found['steps']} steps)."
        )
    return told


def _held(settings: Mapping[str, Any]) -> str:
    """How the focal layers were chosen: those with the largest share of the drift, or the best run of layers."""
    if settings.get("window"):
        return "most of their drift among runs of that length in"
    return f"{_percent(settings.get('cover', COVER))} of their drift or more in"


def _more(difference: dict[str, Any]) -> str:
    found = Measurement.from_dict(difference)
    if found.low is None or found.high is None or found.low <= 0 <= found.high:
        return "no more and no less"
    return "more" if found.value > 0 else "less"


def _counted(count: int, word: str) -> str:
    return f"{count} {word} was" if count == 1 else f"{count} {word}s were"


def _wins(margins: Sequence[float]) -> int:
    return sum(margin > 0 for margin in margins)


def _measured(data: dict[str, Any]) -> str:
    return _rounded(Measurement.from_dict(data))


def _rounded(found: Measurement) -> str:
    if found.low is None or found.high is None:
        return _short(found.value)
    return f"{_short(found.value)} [{_short(found.low)}, {_short(found.high)}]"


def _short(value: float) -> str:
    """Two digits; what is too small to matter is 0."""
    return number(0.0 if abs(value) < NOTHING else float(f"{value:.2g}"))


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _s(values: Sequence[Any]) -> str:
    return "" if len(values) == 1 else "s"


def _listed(values: Sequence[int]) -> str:
    words = [str(value) for value in values]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def _cut(name: str) -> str:
    flat = " ".join(name.split())
    return flat if len(flat) <= 40 else f"{flat[:40].rstrip()}…"
