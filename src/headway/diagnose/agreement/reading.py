"""One text read by all methods, and kept on disk so that an interrupted run goes on behind it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError
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
    relative_errors,
)
from headway.pages.plain import plain
from headway.parts import Parts
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
    what = _asked(classifier, example, methods, settings, seed)
    return dict(Parts(folder).data(what, lambda: plain(_read(classifier, example, methods, settings, seed))))


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
        relative = relative_errors([one])
        if relative.size:
            errors[name] = float(relative[0])
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


def _asked(
    classifier: Classifier, example: Example, methods: tuple[str, ...], settings: Settings, seed: int
) -> list[Any]:
    """Everything a reading depends on. The outputs stand for what a few sampled weights do not show."""
    return [
        fingerprint(classifier.module).weights,
        str(next(classifier.module.parameters()).dtype),
        np.round(classifier.predict([example])[0], 5).tolist()[:64],
        example.ids,
        example.real,
        example.special,
        example.rationale,
        example.label,
        methods,
        settings,
        seed,
    ]
