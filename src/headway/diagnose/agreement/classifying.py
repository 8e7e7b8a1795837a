"""From a model and texts to something that can be explained: its own classes, its next token, or a probe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from headway.diagnose.agreement.texts import Row, default_rows, prompts
from headway.diagnose.hosts import check_reads_text
from headway.errors import ArgumentError
from headway.hosts import positions_of
from headway.methods.diagnosis.song_of_disagreement import (
    Classifier,
    Example,
    HostClassifier,
    NextToken,
    accuracy,
    encode,
    fit_probe,
)
from headway.methods.diagnosis.song_of_disagreement.classifier import Readout, readout_of

#: Share of labelled texts on which a probe is not fitted.
HELD_OUT = 0.25


@dataclass(frozen=True, kw_only=True, eq=False)
class Ready:
    """What is explained. `kind` is "classifier", "next token" or "probe"; `classes` names the outputs (empty for next
    tokens: see `name_of`); `accuracy` of a probe or classifier on `held_out` labelled texts, NaN without labels."""

    classifier: Classifier
    examples: list[Example]
    names: list[str]
    kind: str
    classes: tuple[str, ...] = ()
    tokenizer: Any = None
    accuracy: float = math.nan
    held_out: int = 0

    def name_of(self, target: int) -> str:
        """The class, or the token, of an output."""
        if self.classes:
            return self.classes[target]
        return str(self.tokenizer.decode([target])) if self.kind == "next token" else str(target)


def make_ready(
    host: Any,
    tokenizer: Any,
    rows: Sequence[Row] | None = None,
    *,
    count: int = 12,
    tokens: int = 128,
    readout: Readout = "mean",
    seed: int = 0,
) -> Ready:
    """A host with a classification head is explained by its classes, a causal one by its next token, and a bare encoder
    by a probe that is fitted on labelled texts. `count` texts are explained, none of which a probe was fitted on.

    Raises ArgumentError for texts that a probe cannot be fitted on, and for more tokens than the model has places, and
    HostError for a model that does not read text."""
    check_reads_text(host, tokenizer)
    room = positions_of(host)
    if room is not None and tokens > room:
        raise ArgumentError(f"--tokens: got {tokens}, but the model has {room} positions; use --tokens {room}.")
    if count < 1:
        raise ArgumentError(f"--count: got {count}, expected at least 1.")
    kind = type(host).__name__
    if kind.endswith("ForSequenceClassification"):
        return _with_classes(host, tokenizer, rows or default_rows(seed), count, tokens)
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        chosen = list(rows or prompts())[:count]
        return Ready(
            classifier=NextToken(host),
            examples=[encode(tokenizer, r.text, tokens=tokens, rationale=r.rationale) for r in chosen],
            names=[r.name for r in chosen],
            kind="next token",
            tokenizer=tokenizer,
        )
    return _with_probe(host, tokenizer, rows or default_rows(seed), count, tokens, readout, seed)


def _with_classes(host: Any, tokenizer: Any, rows: Sequence[Row], count: int, tokens: int) -> Ready:
    names = host.config.id2label
    classes = tuple(str(names[i]) for i in sorted(names)) if host.config.num_labels > 1 else ("no", "yes")
    chosen = list(rows)[:count]
    labels = [classes.index(r.label) if r.label in classes else None for r in chosen]
    examples = [
        encode(tokenizer, r.text, tokens=tokens, label=label, rationale=r.rationale)
        for r, label in zip(chosen, labels, strict=True)
    ]
    classifier = HostClassifier(
        host,
        readout=readout_of(host, examples[0].ids[None].to(host.device)),
        mask_id=getattr(tokenizer, "mask_token_id", None),
    )
    known = [e for e in examples if e.label is not None]
    return Ready(
        classifier=classifier,
        examples=examples,
        names=[r.name for r in chosen],
        kind="classifier",
        classes=classes,
        accuracy=accuracy(classifier, known) if known else math.nan,
        held_out=len(known),
    )


def _with_probe(
    host: Any, tokenizer: Any, rows: Sequence[Row], count: int, tokens: int, readout: Readout, seed: int
) -> Ready:
    without = [r.name for r in rows if r.label is None]
    if without:
        raise ArgumentError(
            f"texts: got {len(without)} without a label (first: {without[0]}), expected one for each: the model has no "
            "classes of its own, so a probe is fitted. Give a 'label', or a model with a classification head."
        )
    classes = tuple(sorted({cast(str, r.label) for r in rows}))
    kept = max(count, round(HELD_OUT * len(rows)))
    if len(rows) - kept < 2 * len(classes) or len(classes) < 2:
        raise ArgumentError(
            f"texts: got {len(rows)} of {len(classes)} classes, {kept} of them not to be fitted on, expected two or "
            "more classes and two or more texts of each to fit a probe on. Give more texts, or a smaller --count."
        )
    order = np.random.default_rng(seed).permutation(len(rows)).tolist()
    examples = [
        encode(tokenizer, r.text, tokens=tokens, label=classes.index(cast(str, r.label)), rationale=r.rationale)
        for r in rows
    ]
    held, fitted = [examples[i] for i in order[:kept]], [examples[i] for i in order[kept:]]
    probe = fit_probe(host, fitted, readout=readout, mask_id=getattr(tokenizer, "mask_token_id", None))
    return Ready(
        classifier=probe,
        examples=held[:count],
        names=[rows[i].name for i in order[:count]],
        kind="probe",
        classes=classes,
        accuracy=accuracy(probe, held),
        held_out=kept,
    )
