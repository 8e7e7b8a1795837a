"""`diagnose_roles`: from a conversation log, a model, or both, to a `Roles`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import nn

from headway.diagnose.hosts import check_continues_text
from headway.diagnose.roles.aligning import Cases, align_layers, item_margin
from headway.diagnose.roles.findings import findings, warnings
from headway.diagnose.roles.marking import marked
from headway.diagnose.roles.result import Roles
from headway.errors import ArgumentError, unknown
from headway.hosts.facts import model_facts, versions
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis import diagnose_localize_align as method
from headway.methods.diagnosis.diagnose_localize_align import (
    AlignSettings,
    Conversations,
    Item,
    Judge,
    Localisation,
    RuleJudge,
    Scored,
)
from headway.methods.diagnosis.diagnose_localize_align.adapters import RANK
from headway.methods.diagnosis.diagnose_localize_align.arbitration import CONDITIONS, NEW_TOKENS
from headway.methods.diagnosis.diagnose_localize_align.focal import COVER, LARGEST_SHARE, SHARE
from headway.methods.diagnosis.diagnose_localize_align.localize import DRAWS
from headway.parts import Parts
from headway.progress import Tell

WEIGHING = ("even", "cras", "accuracy")
#: Kinds that alignment never sees, of those that are measured.
LEFT_OUT = 2
#: The released rate, 1e-5, is for thousands of pairs; this one is for a few dozen.
LEARNING_RATE = 2e-4
BATCH, ACCUMULATE = 2, 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is measured and how. `kinds` and `relations` of conflicts, `items` of each to find heads on and `held_out`
    to judge them by; `share`, `cover` and `window` choose focal heads and layers, `draws` are the control sets.
    `weigh`: "even", "cras" for what each conflict costs the marks of the model's own replies, or "accuracy" for how
    much less likely it makes the answer that obeys the rule, without any judge. `new_tokens` of the replies; 0 leaves
    them out. `align`: steps of LoRA training (0 for none) with token `weights`, `rank` and `learning_rate`."""

    kinds: tuple[str, ...] = tuple(method.KINDS)
    relations: tuple[str, ...] = method.RELATIONS
    items: int = 1
    held_out: int = 1
    share: float = SHARE
    cover: float = COVER
    window: int | None = None
    draws: int = DRAWS
    weigh: str = "even"
    new_tokens: int = NEW_TOKENS
    align: int = 0
    weights: str = "attention"
    rank: int = RANK
    learning_rate: float = LEARNING_RATE
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("items", 1), ("held_out", 1), ("draws", 1), ("new_tokens", 0), ("align", 0), ("rank", 1), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, expected at least {least}.")
        if self.window is not None and self.window < 1:
            raise ArgumentError(f"window: got {self.window}, expected at least 1 layer, or None for the cover.")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ArgumentError(f"learning_rate: got {self.learning_rate}, expected a number above 0.")
        for name, valid in (("kinds", tuple(method.KINDS)), ("relations", method.RELATIONS)):
            given = getattr(self, name)
            for one in given:
                if one not in valid:
                    raise unknown(name, one, valid)
            if not given or len(set(given)) != len(given):
                raise ArgumentError(f"{name}: got {given}, expected different ones of {', '.join(valid)}.")
        if self.items + self.items % 2 + self.held_out + self.held_out % 2 > method.pairs.ITEMS:
            raise ArgumentError(
                f"items, held_out: got {self.items} and {self.held_out}, expected at most {method.pairs.ITEMS} "
                "together, odd ones counted as the next even number: there are no more different cases of a kind."
            )
        if self.weigh not in WEIGHING:
            raise unknown("weigh", self.weigh, WEIGHING)
        if self.weigh == "cras" and not self.new_tokens:
            raise ArgumentError("weigh: got 'cras' without replies, expected new_tokens above 0, for marks of replies.")
        if self.weights not in ("attention", "uniform", "constant"):
            raise unknown("weights", self.weights, ("attention", "uniform", "constant"))
        if not 0 < self.share <= LARGEST_SHARE:
            raise ArgumentError(f"share: got {self.share}, expected above 0 and at most {LARGEST_SHARE}.")
        if not 0 < self.cover <= 1:
            raise ArgumentError(f"cover: got {self.cover}, expected a share in (0, 1].")
        if self.align and len(self.kinds) <= LEFT_OUT:
            raise ArgumentError(
                f"align: got {len(self.kinds)} kinds of conflict, expected at least {LEFT_OUT + 1}: the last "
                f"{LEFT_OUT} are left out of training."
            )


def diagnose_roles(
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    conversations: Conversations | None = None,
    judges: Sequence[Judge] = (RuleJudge(),),
    localize: bool = True,
    options: Options | None = None,
    out: str | Path | None = None,
    name: str | None = None,
    progress: Tell | None = None,
) -> Roles:
    """Marks a log by `judges`, finds the heads of a model that conflicting messages move, and trains on their layers.

    model, tokenizer: needed unless `localize` is off. conversations: see `read_conversations`. out: a folder for
    finished parts; a run that was interrupted goes on from there. Raises ArgumentError where there is nothing to do,
    for judges of one name, and for a tokenizer whose chat template drops what was said, HostError for a model that
    does not continue text."""
    start = time.perf_counter()
    wanted = options if options is not None else Options()
    tell = progress if progress is not None else lambda *_: None
    _check(model, tokenizer, conversations, judges, localize)
    store = None if out is None else Path(out)
    found = Roles(model={"name": name or "a log"} if model is None else model_facts(model, name), run={})
    if conversations is not None:
        found.log, _ = marked(conversations, judges, kept=_parts(store), tell=tell, words="marking the log")
    if localize and model is not None:
        _localised(model, tokenizer, judges, wanted, store, tell, found)
    found.run = _run_facts(wanted, judges)
    found.findings, found.warnings = findings(found), warnings(found)
    found.run["seconds"] = round(time.perf_counter() - start, 1)
    return found


def _localised(
    model: nn.Module,
    tokenizer: Any,
    judges: Sequence[Judge],
    options: Options,
    store: Path | None,
    tell: Tell,
    found: Roles,
) -> None:
    """Fills replies, localisation and alignment."""
    key = repr((fingerprint(model).weights, str(next(model.parameters()).dtype)))
    kept = _parts(store)
    choice: dict[str, Any] = {"kinds": options.kinds, "relations": options.relations}
    items = method.conflict_items(tokenizer, **choice, count=options.items)
    held = method.conflict_items(tokenizer, **choice, count=options.held_out, first=options.items)
    weights = None
    if options.new_tokens:
        replies = _replies(model, tokenizer, items, options, kept, key, tell)
        given = Conversations(tuple(replies))
        found.replies, rows = marked(given, judges, kept=_parts(store), tell=tell, words="marking replies")
        if options.weigh == "cras":
            weights = _lost(items, rows[judges[0].name])
    if options.weigh == "accuracy":
        weights = _less_likely(model, items, kept, key)
    where = method.localize(
        model,
        items,
        held,
        weights=weights,
        share=options.share,
        cover=options.cover,
        window=options.window,
        draws=options.draws,
        seed=options.seed,
        kept=kept,
        name=key,
        tell=tell,
    )
    found.localisation = _localisation(where, weights, items)
    if options.align:
        settings = AlignSettings(
            weights=options.weights,
            steps=options.align,
            learning_rate=options.learning_rate,
            batch=BATCH,
            accumulate=ACCUMULATE,
            seed=options.seed,
        )
        unseen = set(options.kinds[-LEFT_OUT:])
        # As many items in either turn: of one alone the model would learn the answer and not the rule.
        even, later = (count + count % 2 for count in (options.items, options.held_out))
        judged = method.conflict_items(tokenizer, **choice, count=later, first=even)
        cases = Cases(
            trained=[i for i in method.conflict_items(tokenizer, **choice, count=even) if i.kind not in unseen],
            seen=[item for item in judged if item.kind not in unseen],
            unseen=[item for item in judged if item.kind in unseen],
        )
        found.alignment = align_layers(
            model,
            cases,
            where,
            settings,
            rank=options.rank,
            seed=options.seed,
            kept=kept,
            name=key,
            out=store,
            tell=tell,
        )


def _replies(
    model: nn.Module, tokenizer: Any, items: Sequence[Item], options: Options, kept: Parts, key: str, tell: Tell
) -> list[method.Turn]:
    """The model's own replies, from the folder where they were made before."""
    turns = []
    for number, item in enumerate(items):
        made: list[method.Turn] = []

        def make(item: Item = item, made: list[method.Turn] = made) -> list[str]:
            made += method.replies(model, tokenizer, [item], new_tokens=options.new_tokens)
            return [turn.reply for turn in made]

        texts = kept.data([key, "replies", item.texts, options.new_tokens], make)
        turns += made or [
            method.Turn(
                conversation=item.name,
                index=0,
                role="assistant",
                reply=text,
                question=f"{item.rule} {item.question}",
                condition=condition,
                rules=item.rules,
            )
            for condition, text in zip(CONDITIONS, texts, strict=True)
        ]
        tell("the model replies", number + 1, len(items))
    return turns


def _lost(items: Sequence[Item], rows: Sequence[Scored]) -> list[float] | None:
    """ω of items: what the conflict took from the marks of the replies; 0 where a mark is missing."""
    before, after = (method.by_query(rows, condition=condition) for condition in CONDITIONS)
    known = [item.name in before and item.name in after for item in items]
    return method.condition_weights(
        [before[item.name] if there else 0.0 for item, there in zip(items, known, strict=True)],
        [after[item.name] if there else 0.0 for item, there in zip(items, known, strict=True)],
    )


def _less_likely(model: nn.Module, items: Sequence[Item], kept: Parts, key: str) -> list[float] | None:
    """ω of items: how much less likely the conflict makes the answer that obeys the rule, of the two answers."""
    before, after = (
        [1 / (1 + math.exp(-item_margin(model, item, condition, kept, key))) for item in items]
        for condition in CONDITIONS
    )
    return method.condition_weights(before, after)


def _localisation(found: Localisation, weights: Sequence[float] | None, items: Sequence[Item]) -> dict[str, Any]:
    return {
        "layers": list(found.layers),
        "scores": found.scores.tolist(),
        "control": found.control.tolist(),
        "relations": {name: scores.tolist() for name, scores in found.relations.items()},
        "parts": {name: values.tolist() for name, values in found.parts.items()},
        "focal": [list(head) for head in found.focal],
        "focal_layers": found.focal_layers,
        "concentration": asdict(found.concentration),
        "kinds": found.kinds,
        "specific": found.specific.to_dict(),
        "items": [item.name for item in items],
        "weights": None if weights is None else list(weights),
        "held_out": found.held_names,
        "neutral": found.neutral,
        "conflict": found.conflict,
        "gates": {
            "focal": found.gates.focal.to_dict(),
            "control": found.gates.control.to_dict(),
            "ratio": found.gates.ratio,
            "p_value": found.gates.null.p_value,
            "by_control": list(found.gates.by_control),
        },
    }


def _check(
    model: nn.Module | None,
    tokenizer: Any,
    conversations: Conversations | None,
    judges: Sequence[Judge],
    localize: bool,
) -> None:
    if localize and model is None:
        raise ArgumentError("model: got none, expected a model to find heads in. Give one, or localize=False.")
    if localize:
        check_continues_text(model, tokenizer)
    if conversations is None and not localize:
        raise ArgumentError("conversations, localize: got neither, expected a log to mark or a model to look into.")
    names = [judge.name for judge in judges]
    if not names or len(set(names)) != len(names):
        raise ArgumentError(f"judges: got {names}, expected at least one, each with its own name.")


def _parts(store: Path | None) -> Parts:
    return Parts(None if store is None else store / "parts")


def _run_facts(options: Options, judges: Sequence[Judge]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
        "judges": [judge.identity() for judge in judges],
        "settings": asdict(options),
    }
