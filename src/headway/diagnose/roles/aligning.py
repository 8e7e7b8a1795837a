"""LoRA on the focal layers, and on as many random, least moved, or all layers, trained alike and measured alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from headway.methods.diagnosis import diagnose_localize_align as method
from headway.methods.diagnosis.diagnose_localize_align import AlignSettings, Item, Localisation, PreferencePair
from headway.methods.diagnosis.diagnose_localize_align.arbitration import CONDITIONS, Condition
from headway.parts import Parts, key_of
from headway.progress import Tell


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Items to train on, items of the same kinds and items of other kinds to judge by."""

    trained: Sequence[Item]
    seen: Sequence[Item]
    unseen: Sequence[Item]


def align_layers(
    model: nn.Module,
    cases: Cases,
    found: Localisation,
    settings: AlignSettings,
    *,
    rank: int,
    seed: int,
    kept: Parts,
    name: str,
    out: Path | None,
    tell: Tell,
) -> dict[str, Any]:
    """Trains each set of layers from the same start. Rows have the margins of held-out items, in conflict and in
    agreement, in the order of `items`. The model is as before afterwards; the adapters of the focal layers are in
    the folder of `out` that their row names."""
    rows, items = [], [*cases.seen, *cases.unseen]
    before = {c: [item_margin(model, item, c, kept, name) for item in items] for c in CONDITIONS}
    sets = _sets(found, seed)
    for number, (label, layers) in enumerate(sets.items()):
        tell(f"training adapters on {label} layers", number, len(sets))
        what = [
            name,
            "align",
            layers,
            rank,
            repr(settings),
            found.focal,
            *(_asked(i) for i in [*cases.trained, *items]),
        ]
        folder = out / f"adapter-{key_of(what)[:8]}" if out is not None and label == "focal" else None
        trial = partial(_trial, model, cases.trained, items, found, layers, settings, rank, folder)
        row = kept.data(what, trial, anew=folder is not None and not folder.exists())
        rows.append({"layers_of": label, "adapter": None if folder is None else folder.name, **row})
    return {
        "before": before,
        "rows": rows,
        "items": [item.name for item in items],
        "seen": len(cases.seen),
        "steps": rows[0]["steps"],
        "weights": settings.weights,
    }


def _sets(found: Localisation, seed: int) -> dict[str, list[int]]:
    """The layers of each trial, by label."""
    count, rows = len(found.focal_layers), {layer: row for row, layer in enumerate(found.layers)}
    focal_rows = [rows[layer] for layer in found.focal_layers]
    random = method.random_layers(len(rows), count, generator=np.random.default_rng(seed), avoid=focal_rows)
    chosen = {
        "focal": focal_rows,
        "random": random,
        "least moved": method.inverse_layers(found.scores, count),
        "all": list(range(len(rows))),
    }
    return {label: [found.layers[row] for row in picked] for label, picked in chosen.items()}


def _trial(
    model: nn.Module,
    trained: Sequence[Item],
    items: Sequence[Item],
    found: Localisation,
    layers: Sequence[int],
    settings: AlignSettings,
    rank: int,
    folder: Path | None,
) -> dict[str, Any]:
    trained_before = [parameter.requires_grad for parameter in model.parameters()]
    adapted = method.add_lora(model, layers, rank=rank, seed=settings.seed)
    try:
        run = method.align(adapted.model, [_pair(item) for item in trained], settings, heads=found.focal)
        base = adapted.model.get_base_model()
        margins: dict[str, Any] = {c: [method.margins(base, [item], c)[0] for item in items] for c in CONDITIONS}
        if folder is not None:
            adapted.model.save_pretrained(folder)
    finally:
        adapted.model.unload()
        for parameter, was in zip(model.parameters(), trained_before, strict=True):
            parameter.requires_grad_(was)
    return {
        "layers": list(layers),
        "modules": len(adapted.modules),
        "parameters": adapted.trainable,
        "steps": run.steps,
        "losses": list(run.trained.losses),
        "margin": list(run.trained.column("margin")),
        "plain_margin": list(run.trained.column("plain_margin")),
        "dropped": run.dropped,
        **margins,
    }


def _pair(item: Item) -> PreferencePair:
    """The answer that obeys the rule, preferred to the one that obeys the clause, after the prompt in conflict."""
    return PreferencePair(
        prompt=item.conflict, chosen=item.obeys_rule, rejected=item.obeys_clause, system=item.pair.spans["system"][1]
    )


def item_margin(model: nn.Module, item: Item, condition: Condition, kept: Parts, name: str) -> float:
    """A margin under the key of `localize`, which has most of them."""
    found = kept.data([name, "margin", condition, *_asked(item)], partial(method.margins, model, [item], condition))
    return float(found[0])


def _asked(item: Item) -> list[Any]:
    return [item.texts, item.obeys_rule.tolist(), item.obeys_clause.tolist()]
