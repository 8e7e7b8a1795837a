"""Turns marked by judges, put together as plain data: whole, by condition and by role, and how far judges agree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

from headway.methods.diagnosis import diagnose_localize_align as method
from headway.methods.diagnosis.diagnose_localize_align import Conversations, Judge, Scored, Turn
from headway.parts import Parts
from headway.progress import Tell

#: Fewest turns that two judges are compared on.
FEWEST = 3


def marked(
    given: Conversations, judges: Sequence[Judge], *, kept: Parts, tell: Tell, words: str
) -> tuple[dict[str, Any], dict[str, list[Scored]]]:
    """The marks of all judges as plain data, and as they are by judge.

    `judges`: for each the score over all, by condition and by role. `lost`: what each condition costs against the first
    one, over conversations that stand under both. `agreement`: of each two judges. `turns`: every turn with its marks.
    `bad` and `empty`: what could not be read."""
    found = {
        judge.name: method.score_turns(
            given.turns, judge, kept=kept, progress=_telling(tell, f"{words}, judge {judge.name}")
        )
        for judge in judges
    }
    conditions = list(dict.fromkeys(turn.condition for turn in given.turns))
    data = {
        "judges": [_judge(name, rows) for name, rows in found.items()],
        "conditions": conditions,
        "lost": [
            {"judge": name, "before": conditions[0], "after": after, "value": value.to_dict()}
            for name, rows in found.items()
            for after in conditions[1:]
            if (value := method.lost(rows, conditions[0], after)) is not None
        ],
        "agreement": _agreements(found),
        "turns": [_turn(turn, {name: rows[i] for name, rows in found.items()}) for i, turn in enumerate(given.turns)],
        "bad": [asdict(row) for row in given.bad],
        "empty": given.empty,
        "without_rules": sum(turn.rules == method.Rules() for turn in given.turns),
    }
    return data, found


def _judge(name: str, rows: Sequence[Scored]) -> dict[str, Any]:
    return {
        "name": name,
        "all": _score(rows),
        "conditions": _groups(rows, lambda one: one.condition),
        "roles": _groups(rows, lambda one: one.role),
        "invalid": sum(bool(one.invalid) for one in rows),
        "general": sum(one.general for one in rows),
    }


def _groups(rows: Sequence[Scored], key: Callable[[Scored], str]) -> list[dict[str, Any]]:
    names = dict.fromkeys(key(one) for one in rows)
    groups = ((name, [one for one in rows if key(one) == name]) for name in names)
    return [{"name": name, **score} for name, group in groups if (score := _score(group)) is not None]


def _score(rows: Iterable[Scored]) -> dict[str, Any] | None:
    """CRAS of some turns; None where no mark is valid."""
    group = list(rows)
    if all(one.invalid for one in group):
        return None
    found = method.cras(group)
    return {
        "score": found.score.to_dict(),
        "unit": found.unit,
        "dimensions": dict(found.dimensions),
        "queries": found.queries,
        "turns": found.turns,
    }


def _agreements(found: dict[str, list[Scored]]) -> list[dict[str, Any]]:
    names = list(found)
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return [
        _agreement(a, b, method.agreement(found[a], found[b]))
        for a, b in pairs
        if sum(not x.invalid and not y.invalid for x, y in zip(found[a], found[b], strict=True)) >= FEWEST
    ]


def _agreement(first: str, second: str, found: method.Agreement) -> dict[str, Any]:
    return {
        "first": first,
        "second": second,
        "kappa": dict(found.kappa),
        "weighted_kappa": dict(found.weighted_kappa),
        "spearman": {name: one.to_dict() for name, one in found.spearman.items()},
        "difference": dict(found.difference),
        "turns": found.turns,
    }


def _turn(turn: Turn, by_judge: dict[str, Scored]) -> dict[str, Any]:
    return {
        "conversation": turn.conversation,
        "index": turn.index,
        "role": turn.role,
        "condition": turn.condition,
        "line": turn.line,
        "question": turn.question,
        "reply": turn.reply,
        "marks": {
            name: {
                "scores": dict(one.scores),
                "reasons": dict(one.reasons),
                "invalid": one.invalid,
                "value": None if one.invalid else one.value(),
            }
            for name, one in by_judge.items()
        },
    }


def _telling(tell: Tell, words: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(words, done, total)
