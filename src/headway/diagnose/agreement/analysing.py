"""`diagnose_agreement`: from a classifier and examples to an `Agreement`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from headway.diagnose.agreement.findings import findings, warnings
from headway.diagnose.agreement.reading import read
from headway.diagnose.agreement.result import Agreement
from headway.errors import ArgumentError
from headway.hosts.facts import versions
from headway.methods.diagnosis import song_of_disagreement as method
from headway.methods.diagnosis.song_of_disagreement import METHODS, Classifier, Example, Settings
from headway.methods.diagnosis.song_of_disagreement.explaining import method_named
from headway.methods.diagnosis.song_of_disagreement.table import MINIMUM, Special
from headway.pages.plain import plain
from headway.progress import Tell
from headway.statistics import bootstrap

#: What is compared unless methods are named. The rest of METHODS are variants of these.
DEFAULT = (
    "attention_last",
    "attention_rollout",
    "attention_flow",
    "attention_values",
    "value_zeroing",
    "input_x_gradient",
    "integrated_gradients",
    "grad_shap",
    "deep_lift",
    "lime",
    "ablation",
)
#: Masks of LIME here; the paper's 1,000 take three times as long.
MASKS = 300
TOP = "top-25%"
Rows = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is compared and how. methods: None for DEFAULT, of which those that the classifier does not allow are left
    out and named; named methods must all work. measure: see `measure_named`. special, words: what is ranked (see
    `items_of`), for all methods alike. minimum: texts with fewer items are left out of the correlations."""

    methods: tuple[str, ...] | None = None
    settings: Settings = field(default_factory=lambda: Settings(masks=MASKS))
    measure: str = "kendall"
    special: Special = "exclude"
    words: Literal["tokens", "sum", "max"] = "tokens"
    minimum: int = MINIMUM
    seed: int = 0

    def __post_init__(self) -> None:
        method.measure_named(self.measure)
        for name in self.methods or ():
            method_named(name)
        if self.methods is not None and len(self.methods) < 2:
            raise ArgumentError(f"methods: got {', '.join(self.methods) or 'none'}, expected two or more to compare.")
        if self.special not in ("exclude", "include") or self.words not in ("tokens", "sum", "max"):
            raise ArgumentError(
                f"special, words: got {self.special!r} and {self.words!r}, expected exclude or include, and tokens, "
                "sum or max."
            )
        if self.seed < 0:
            raise ArgumentError(f"seed: got {self.seed}, expected at least 0.")
        if self.minimum < 2:
            raise ArgumentError(f"minimum: got {self.minimum}, expected at least 2.")


def diagnose_agreement(
    classifier: Classifier,
    examples: Sequence[Example],
    *,
    options: Options | None = None,
    names: Sequence[str] | None = None,
    name_of: Callable[[int], str] = str,
    out: Path | None = None,
    model: Mapping[str, Any] | None = None,
    progress: Tell | None = None,
) -> Agreement:
    """How explanations of a classifier agree on examples, and which of them is right.

    names: of the examples. name_of: the name of an output. out: a folder for finished texts; a run that was interrupted
    goes on from there. model: facts for the report. Raises ArgumentError for no examples, for a named method that the
    classifier does not allow, and where fewer than two methods are left."""
    start = time.perf_counter()
    wanted = options or Options()
    tell = progress or (lambda *_: None)
    if not examples:
        raise ArgumentError("examples: got none, expected at least one text to explain.")
    chosen, refused = _methods(classifier, examples, wanted)
    readings: Rows = []
    for i, example in enumerate(examples):
        tell("explaining texts", i, len(examples))
        readings.append(
            read(classifier, example, chosen, wanted.settings, wanted.seed, None if out is None else out / "parts")
        )
    tell("comparing methods", 0, 1)
    compared = _Compared(examples, readings, chosen, wanted)
    pairs = compared.pairs()
    found = Agreement(
        model=plain(dict(model or {"name": type(classifier).__name__})),
        run=plain(_run_facts(wanted, examples)),
        methods=plain([compared.method(name, pairs) for name in chosen]),
        pairs=plain(pairs),
        texts=_texts(examples, readings, names, name_of),
        controls=plain(compared.controls(pairs)),
        refused=refused,
    )
    found.findings, found.warnings = findings(found), warnings(found)
    found.run["seconds"] = round(time.perf_counter() - start, 1)
    return found


def _methods(
    classifier: Classifier, examples: Sequence[Example], options: Options
) -> tuple[tuple[str, ...], dict[str, str]]:
    """Methods that work on the longest example, and why the others do not."""
    longest = max(examples, key=lambda example: int(example.real.sum()))
    masks = min(options.settings.masks, 8) if options.settings.ridge else options.settings.masks
    quick = replace(options.settings, masks=masks, steps=2, samples=1)
    good, refused = method.usable_methods(classifier, longest, options.methods or DEFAULT, quick)
    if refused and options.methods is not None:
        raise ArgumentError(f"methods: {next(iter(refused.values()))}")
    if len(good) < 2:
        raise ArgumentError(
            f"methods: got {len(good)} that work on this classifier, expected two or more. "
            f"{next(iter(refused.values()), '')}"
        )
    return tuple(good), refused


class _Compared:
    """The readings of all texts, as ranked items by method."""

    def __init__(self, examples: Sequence[Example], readings: Rows, methods: tuple[str, ...], options: Options) -> None:
        self.examples, self.readings, self.methods, self.options = examples, readings, methods, options
        self.items = {name: self.ranked("scores", name) for name in methods}

    def ranked(self, part: str, name: str, special: Special | None = None) -> list[np.ndarray]:
        return [
            method.items_of(
                np.array(reading[part][name], float), example, special=special or self.options.special,
                words=self.options.words,
            )
            for example, reading in zip(self.examples, self.readings, strict=True)
        ]  # fmt: skip

    def agreement(self, first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> dict[str, Any] | None:
        found = method.pair_agreement(
            ("", ""), first, second, measure=self.options.measure, minimum=self.options.minimum, seed=self.options.seed
        )
        return found.mean.to_dict() if found.n else None

    def table(self, items: dict[str, list[np.ndarray]], measure: str) -> list[method.PairAgreement]:
        return method.agreement_table(items, measure=measure, minimum=self.options.minimum, seed=self.options.seed)

    def ceilings(self) -> dict[str, dict[str, Any] | None]:
        """Agreement of each method that draws with itself under another seed."""
        return {
            name: self.agreement(self.items[name], self.ranked("again", name))
            for name in self.methods
            if METHODS[name].random
        }

    def pairs(self) -> Rows:
        tables = zip(self.table(self.items, self.options.measure), self.table(self.items, TOP), strict=True)
        ceilings = {name: (found or {}).get("value", math.nan) for name, found in self.ceilings().items()}
        return [
            {
                "first": pair.first,
                "second": pair.second,
                "tau": pair.mean.to_dict() if pair.n else None,
                "sd": pair.sd,
                "undefined": pair.undefined,
                "short": pair.short,
                "top": top.mean.to_dict() if top.n else None,
                "corrected": method.disattenuated(
                    pair.mean.value, float(ceilings.get(pair.first, 1.0)), float(ceilings.get(pair.second, 1.0))
                ),
            }
            for pair, top in tables
        ]

    def method(self, name: str, pairs: Rows) -> dict[str, Any]:
        faithful = np.array([reading["faithful"][name] for reading in self.readings], float)
        right = [reading["right"][name] for reading in self.readings if name in reading["right"]]
        errors = [reading["errors"][name] for reading in self.readings if name in reading["errors"]]
        others = [p["tau"]["value"] for p in pairs if name in (p["first"], p["second"]) and p["tau"]]
        given = self.examples
        frequency = method.frequency_scores(given, special=self.options.special, words=self.options.words)
        return {
            "name": name,
            "family": METHODS[name].family,
            "words": METHODS[name].words,
            "with_others": float(np.mean(others)) if others else math.nan,
            "ceiling": self.ceilings().get(name),
            "position": self.agreement(self.items[name], method.position_scores(self.items[name])),
            "frequency": self.agreement(self.items[name], frequency),
            "near_ties": method.near_tie_share(self.items[name]),
            "comprehensiveness": self._mean(faithful[:, 0]),
            "sufficiency": self._mean(faithful[:, 1]),
            "excess": self._mean(faithful[:, 2]),
            "auroc": self._mean([row[0] for row in right]),
            "precision": self._mean([row[1] for row in right]),
            "completeness": float(np.median(errors)) if errors else math.nan,
            "note": next((r["notes"][name] for r in self.readings if name in r["notes"]), ""),
        }

    def controls(self, pairs: Rows) -> dict[str, Any]:
        """What the table is held against."""
        counts = [len(x) for x in self.items[self.methods[0]] if len(x) >= self.options.minimum]
        special: Special = "include" if self.options.special == "exclude" else "exclude"
        other = {name: self.ranked("scores", name, special) for name in self.methods}
        like = self.items[self.methods[0]]
        known = [p["tau"]["value"] for p in pairs if p["tau"]]
        return {
            "items": float(np.median(counts)) if counts else math.nan,
            "chance": list(method.chance_interval(int(np.median(counts)))) if counts else None,
            "random": self.agreement(like, method.random_scores(like, self.options.seed)),
            "pairs": float(np.mean(known)) if known else math.nan,
            "pairs_other_special": method.mean_off_diagonal(self.table(other, self.options.measure)),
            "baselines": self._baselines(),
        }

    def _baselines(self) -> dict[str, Any]:
        """Agreement of integrated gradients with themselves from another baseline."""
        kinds = set.intersection(*(set(reading["baselines"]) for reading in self.readings))
        own = self.items.get("integrated_gradients")
        if own is None:
            return {}
        return {kind: self.agreement(own, self.ranked("baselines", kind)) for kind in sorted(kinds)}

    def _mean(self, values: Sequence[float | None] | np.ndarray) -> dict[str, Any] | None:
        known = [float(v) for v in values if v is not None and math.isfinite(v)]
        return bootstrap(known, generator=self.options.seed, resamples=2000).to_dict() if known else None


def _texts(
    examples: Sequence[Example], readings: Rows, names: Sequence[str] | None, name_of: Callable[[int], str]
) -> Rows:
    return [
        {
            "name": names[i] if names is not None else f"text {i + 1}",
            "tokens": list(example.tokens),
            "special": (example.special | ~example.real).tolist(),
            "words": example.words.tolist(),
            "predicted": name_of(reading["target"]),
            "output": reading["value"],
            "label": None if example.label is None else name_of(example.label),
            "rationale": None if example.rationale is None else example.rationale.tolist(),
            "scores": reading["scores"],
        }
        for i, (example, reading) in enumerate(zip(examples, readings, strict=True))
    ]


def _run_facts(options: Options, examples: Sequence[Example]) -> dict[str, Any]:
    return {
        "date": datetime.now(UTC).date().isoformat(),
        **versions(),
        "texts": len(examples),
        "settings": {k: v for k, v in asdict(options).items() if k != "methods"},
    }
