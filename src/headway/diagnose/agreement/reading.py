"""One text read by all methods, and kept on disk so that an interrupted run goes on behind it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError
from headway.files import write_atomically
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis.song_of_disagreement import (
    METHODS,
    Classifier,
    Example,
    Settings,
    average_precision,
    explain,
    faithfulness,
    prepare,
)
from headway.pages.plain import plain
from headway.statistics import auroc

#: Baselines that the first complete method is held against its own.
BASELINES = ("pad", "mask", "mean", "zero")
#: The method whose baseline is changed.
SENSITIVE = "integrated_gradients"
#: Random orders that faithfulness is held against, in each text.
ORDERS = 5


def read(
    classifier: Classifier,
    example: Example,
    methods: tuple[str, ...],
    settings: Settings,
    seed: int,
    folder: Path | None,
) -> dict[str, Any]:
    """Scores of one text by every method, with what is known of each: `scores`, `again` (random methods under another
    seed), `errors` (relative, of methods that promise to add up), `faithful`, `right` (against the rationale),
    `baselines`, and the explained class with its output. Taken from `folder` where it was read before."""
    path = None if folder is None else folder / f"{_key(classifier, example, methods, settings, seed)}.json"
    if path is not None and path.exists():
        return dict(json.loads(path.read_text(encoding="utf-8")))
    found = plain(_read(classifier, example, methods, settings, seed))
    if path is not None:
        write_atomically(path, json.dumps(found))
    return dict(found)


def _read(
    classifier: Classifier, example: Example, methods: tuple[str, ...], settings: Settings, seed: int
) -> dict[str, Any]:
    found = explain(classifier, example, methods, settings, seed=seed)
    drawn = [name for name in methods if METHODS[name].random]
    again = explain(classifier, example, drawn, settings, seed=seed + 1) if drawn else {}
    problem = prepare(classifier, example, settings)
    ordinary = example.real & ~example.special
    faithful, right, errors = {}, {}, {}
    for name, one in found.items():
        measured = faithfulness(problem, one.scores, random_orders=ORDERS, seed=seed)
        faithful[name] = [measured.aopc_comprehensiveness, measured.aopc_sufficiency, measured.excess]
        if example.rationale is not None and example.rationale.any():
            marks = example.rationale[ordinary]
            right[name] = [auroc(one.scores[ordinary], marks), average_precision(one.scores[ordinary], marks)]
        if one.error is not None and one.baseline_value is not None:
            errors[name] = abs(one.error) / max(abs(one.value - one.baseline_value), 0.01)
    return {
        "target": problem.target,
        "value": problem.value,
        "scores": {name: one.scores for name, one in found.items()},
        "again": {name: one.scores for name, one in again.items()},
        "notes": {name: one.note for name, one in found.items() if one.note},
        "errors": errors,
        "faithful": faithful,
        "right": right,
        "baselines": _baselines(classifier, example, settings, problem.target) if SENSITIVE in methods else {},
    }


def _baselines(classifier: Classifier, example: Example, settings: Settings, target: int) -> dict[str, Any]:
    """Scores of one method by baseline, of the same class, for the baselines that the classifier has."""
    found = {}
    for kind in BASELINES:
        if kind == settings.baseline:
            continue
        try:
            other = replace(settings, baseline=kind, target=target)
            found[kind] = explain(classifier, example, [SENSITIVE], other)[SENSITIVE].scores
        except ArgumentError:
            # The classifier has no such token.
            continue
    return found


def _key(classifier: Classifier, example: Example, methods: tuple[str, ...], settings: Settings, seed: int) -> str:
    """A name for everything a reading depends on. The outputs stand for what a few sampled weights do not show."""
    parts = (
        fingerprint(classifier.module).weights,
        str(next(classifier.module.parameters()).dtype),
        np.round(classifier.predict([example])[0], 5).tolist()[:64],
        example.ids.tolist(),
        example.real.tolist(),
        None if example.rationale is None else example.rationale.tolist(),
        example.label,
        methods,
        settings,
        seed,
    )
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:20]
