"""One audit of one model: describe its heads, score them, silence them beside equally many others, measure bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headway.diagnose.concepts.findings import findings
from headway.diagnose.concepts.measuring import Measure, Runs
from headway.diagnose.concepts.pictures import Pictures
from headway.diagnose.concepts.result import Concepts, Effect
from headway.errors import ArgumentError
from headway.hosts.facts import model_facts, versions
from headway.methods.diagnosis.clip_ccs import (
    HeadConcept,
    TextBank,
    Tower,
    by_class,
    concentrated_ratio,
    decompose,
    describe,
    equal_count,
    gather,
    histogram,
    last_layers,
    layer_matched,
    of_concept,
    score,
    tower,
)
from headway.methods.diagnosis.clip_ccs.bank import Tokenise
from headway.methods.diagnosis.clip_ccs.judges import Judge, Labeller
from headway.progress import Tell

Head = tuple[int, int]
#: One draw of an equal-count comparison: heads of the set, and as many others.
Pair = tuple[list[Head], list[Head]]
#: Texts of the bank that the text tower's own reconstruction is checked on.
CHECKED_TEXTS = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """`layers`: how many, from the last, are described. `draws`: random sets beside each silenced one. `top`: retrieved
    pictures per neutral prompt."""

    layers: int = 4
    texts: int = 5
    rank: int = 80
    draws: int = 5
    top: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "texts", "rank", "draws", "top"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, expected at least 1.")


def audit(
    model: nn.Module,
    tokenise: Tokenise,
    pictures: Pictures,
    bank: TextBank,
    *,
    settings: Settings | None = None,
    labeller: Labeller | None = None,
    judges: Mapping[str, Judge] | None = None,
    name: str | None = None,
    out: Path | None = None,
    progress: Tell | None = None,
) -> Concepts:
    """Everything `headway diagnose concepts` reports.

    labeller, judges: who names a head's concept and who says which texts fit it; by default the bank's own concepts and
    everyday words. out: a folder where each batch's contributions and each pruned run are kept as they come, and from
    which a second call goes on. Raises ReconstructionError before anything is scored where a tower's parts do not add
    up to its embeddings, and ArgumentError for fewer than two pictures."""
    wanted = Settings() if settings is None else settings
    tell: Tell = progress if progress is not None else lambda *_: None
    if len(pictures) < 2:
        raise ArgumentError(f"pictures: got {len(pictures)}, expected two or more; a head is described by what varies.")
    image, text = tower(model), tower(model, "text")
    text_error = decompose(text, tokenise(bank.texts[:CHECKED_TEXTS])).error
    layers = last_layers(image, wanted.layers)
    parts = None if out is None else out / "parts"
    found = gather(image, pictures.batches, layers=layers, folder=parts, progress=tell, total=len(pictures.batches))
    tell("describing heads", 0, 1)
    spans = describe(image, found, bank, texts=wanted.texts, rank=wanted.rank)
    heads = score(spans, bank, texts=wanted.texts, labeller=labeller, judges=judges)
    sets, against = head_sets(heads, wanted)
    total = 1 + len(sets) + 2 * sum(len(pairs) for _, pairs in sets.values()) + 2 * len(against)
    measure = Measure(text, tokenise, pictures, bank, wanted, Runs(image, pictures, parts, tell, total))
    effects = [_effect(measure, label, chosen, pairs) for label, (chosen, pairs) in sets.items()]
    result = Concepts(
        model=_model_facts(model, image, text, name),
        run=_run_facts(pictures, bank, wanted, judges),
        heads=[_row(h) for h in heads],
        shares=list(histogram(heads)),
        classes={kind: len(places) for kind, places in by_class(heads).items()},
        concentrated=concentrated_ratio(heads),
        base=measure.base(),
        effects=effects,
        against=measure.equal(against),
        errors={"image": found.error, "text": text_error},
    )
    result.findings = findings(result)
    result.warnings = _warnings(result, heads, pictures)
    return result


def head_sets(
    heads: Sequence[HeadConcept], settings: Settings
) -> tuple[dict[str, tuple[list[Head], list[Pair]]], list[Pair]]:
    """The sets that are silenced, each with its draws at equal count: the high heads, the low heads, and the heads of
    each concept, beside equally many described heads of the same layers that are not in the set. And draws of equally
    many high and low heads, wherever they stand. A set that leaves its layers no other head has no draws."""
    generator = torch.Generator().manual_seed(settings.seed)
    classes = by_class(heads)
    named: dict[str, list[Head]] = {kind: classes[kind] for kind in ("high", "low")}
    for concept in sorted({h.concept for h in heads}):
        named[f"concept: {concept}"] = of_concept(heads, concept)
    sets: dict[str, tuple[list[Head], list[Pair]]] = {}
    for label, chosen in named.items():
        if not chosen:
            continue
        others = [h.place for h in heads if h.place not in chosen]
        try:
            pairs = layer_matched(chosen, others, generator, draws=settings.draws)
        except ArgumentError:
            pairs = []
        sets[label] = (chosen, pairs)
    against: list[Pair] = []
    if classes["high"] and classes["low"]:
        against = [equal_count(classes["high"], classes["low"], generator) for _ in range(settings.draws)]
    return sets, against


def _effect(measure: Measure, label: str, chosen: Sequence[Head], pairs: Sequence[Pair]) -> Effect:
    return Effect(
        label=label,
        heads=[list(head) for head in chosen],
        questions=measure.drops(chosen),
        equal=measure.equal(pairs),
        skew=measure.skew(chosen),
    )


def _model_facts(model: nn.Module, image: Tower, text: Tower, name: str | None) -> dict[str, Any]:
    return model_facts(model, name) | {
        "layers": image.layers,
        "heads": image.heads,
        "kv_heads": image.heads,
        "head_dim": image.head_dim,
        "text_layers": text.layers,
        "text_heads": text.heads,
    }


def _run_facts(
    pictures: Pictures, bank: TextBank, settings: Settings, judges: Mapping[str, Judge] | None
) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
        "pictures": f"{len(pictures)} {pictures.what}",
        "bank": f"{len(bank)} texts",
        "judges": list(judges) if judges else ["lexicon"],
        "threads": torch.get_num_threads(),
        "settings": {name: getattr(settings, name) for name in ("layers", "texts", "rank", "draws", "top", "seed")},
    }


def _row(h: HeadConcept) -> dict[str, Any]:
    return {
        "layer": h.layer,
        "head": h.head,
        "concept": h.concept,
        "score": h.score,
        "of": h.asked,
        "kind": h.kind,
        "texts": list(h.texts),
        "fits": list(h.fits),
        "verdicts": {name: list(answers) for name, answers in h.verdicts.items()},
        "explained": h.explained,
        "abstentions": h.abstentions,
        "ties": h.ties,
    }


def _silences_a_layer(effect: Effect, heads: int) -> bool:
    return heads in Counter(layer for layer, _ in effect.heads).values()


def _warnings(result: Concepts, heads: Sequence[HeadConcept], pictures: Pictures) -> list[str]:
    found = []
    if pictures.left_out:
        found.append(f"{len(pictures.left_out)} pictures could not be used and were left out: {pictures.left_out[0]}")
    asked = sum(len(h.texts) * len(h.verdicts) for h in heads)
    silent = sum(h.abstentions for h in heads)
    if silent:
        found.append(f"The judges abstained on {silent} of {asked} questions; an abstention is no vote.")
    ties = sum(h.ties for h in heads)
    if ties:
        found.append(f"The judges were split evenly on {ties} texts, which count as no fit.")
    whole = [e.label for e in result.effects if _silences_a_layer(e, result.model["heads"])]
    if whole:
        found.append(
            f"These sets hold every head of a layer, whose attention then writes a constant: {', '.join(whole)}."
        )
    top = result.run["settings"]["top"]
    if pictures.neutral and top >= len(pictures):
        found.append(
            f"A neutral prompt retrieves {top} pictures and there are {len(pictures)}: every list holds them all, and "
            "no skew can be seen."
        )
    alone = [e.label for e in result.effects if not e.equal]
    if alone:
        found.append(f"No other heads are left in the same layers to compare with: {', '.join(alone)}.")
    if not pictures.questions:
        found.append(
            "The pictures have no classes, so what silencing costs is told by how often the nearest text of the bank "
            "changes. Sub-folders, or labels in a JSONL, give accuracies."
        )
    notes = sorted({note for h in heads for note in h.notes})
    return [*found, *(f"{note[0].upper()}{note[1:]}." for note in notes)]
