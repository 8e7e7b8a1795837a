"""Rollouts: continuations from the prefixes of a trace, drawn by any sampler and kept as they come.

D_i are the rollouts that start at sentence i, which is not in their prefix: they may say something else there. A
sampler is a callable `(prefix, seeds) -> texts`, one text for each seed; it may be a served engine. What it returns is
appended to a file at once, keyed by what was asked, so an interrupted run loses nothing and repeats nothing.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from headway.errors import ArgumentError, HeadwayError
from headway.methods.diagnosis.thought_anchors.answers import NO_ANSWER, Extractor
from headway.methods.diagnosis.thought_anchors.sentences import Prefix, Trace
from headway.tasks.sentences import split_sentences

log = logging.getLogger(__name__)
#: Rollouts for each sentence (the paper).
ROLLOUTS = 100
#: More sentences than this are announced with their cost first (the released code refuses them).
MANY_SENTENCES = 275
#: Seeds of rollouts from different sentences never meet below this many.
SEEDS_APART = 1_000_003
RESUME, FORCED = "resume", "forced"


class Sampler(Protocol):
    """Draws continuations of a prefix, one for each seed; the same seed gives the same text."""

    def __call__(self, prefix: Prefix, seeds: Sequence[int]) -> list[str]: ...


@dataclass(frozen=True)
class Rollout:
    """A continuation from the prefix before `sentence`. `kind` is "resume", or "forced" where the model was made to
    answer at once."""

    sentence: int
    seed: int
    text: str
    kind: str = RESUME

    @property
    def first(self) -> str:
        """Its first sentence, which stands in place of the trace's own."""
        spans = split_sentences(self.text) if self.text.strip() else []
        return self.text[spans[0][0] : spans[0][1]].strip() if spans else ""

    def sentences(self) -> list[str]:
        return [self.text[a:b].strip() for a, b in split_sentences(self.text)] if self.text.strip() else []


@dataclass
class RolloutCache:
    """Rollouts of one trace under one setting, in a JSONL file to which lines are only added.

    `settings` is everything that changes what the sampler returns (model, temperature, limits); it is part of the
    file's name with the trace's fingerprint, so other settings never mix. A last line that was cut by a crash is taken
    away; any other broken line is refused with its number."""

    folder: Path
    trace: Trace
    settings: Mapping[str, Any]
    rollouts: dict[tuple[str, int, int], Rollout] = field(default_factory=dict)

    def __post_init__(self) -> None:
        said = json.dumps(dict(self.settings), sort_keys=True, default=str)
        key = hashlib.sha256(f"{self.trace.fingerprint()} {said}".encode()).hexdigest()[:16]
        self.path = Path(self.folder) / f"rollouts-{key}.jsonl"
        if self.path.exists():
            self._read()

    def add(self, rollouts: Iterable[Rollout]) -> None:
        """Appends rollouts and sees them onto the disk."""
        fresh = [r for r in rollouts if (r.kind, r.sentence, r.seed) not in self.rollouts]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            for rollout in fresh:
                entry = {"kind": rollout.kind, "sentence": rollout.sentence, "seed": rollout.seed, "text": rollout.text}
                file.write((json.dumps(entry) + "\n").encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        self.rollouts |= {(r.kind, r.sentence, r.seed): r for r in fresh}

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole, cut = data.rpartition(b"\n")[0], data.rpartition(b"\n")[2]
        if cut:
            log.warning("%s: its last line was cut short by an interrupt; that rollout is drawn again.", self.path)
            os.truncate(self.path, len(data) - len(cut))
        for number, line in enumerate(whole.split(b"\n") if whole else [], 1):
            try:
                entry = json.loads(line)
                found = Rollout(int(entry["sentence"]), int(entry["seed"]), str(entry["text"]), str(entry["kind"]))
            except (ValueError, KeyError, TypeError) as error:
                raise HeadwayError(
                    f"{self.path}, line {number}: got {line[:60]!r}, expected a stored rollout ({error}). Correct or "
                    "delete that line; the rollout is drawn again."
                ) from None
            self.rollouts[found.kind, found.sentence, found.seed] = found


@dataclass(frozen=True)
class Cost:
    """What sampling would take: rollouts and, at most, tokens; seconds where the speed is known."""

    rollouts: int
    tokens: int
    seconds: float | None = None

    def __str__(self) -> str:
        time = "" if self.seconds is None else f", about {self.seconds / 60:,.0f} minutes"
        return f"{self.rollouts:,} rollouts of {self.tokens:,} tokens at most{time}"


def estimate(
    trace: Trace, *, rollouts: int = ROLLOUTS, max_tokens: int, tokens_per_second: float | None = None, stored: int = 0
) -> Cost:
    """The cost of D_0 … D_n with `rollouts` each, `stored` of which are there already."""
    count = max((len(trace) + 1) * rollouts - stored, 0)
    tokens = count * max_tokens
    return Cost(count, tokens, tokens / tokens_per_second if tokens_per_second else None)


def collect(
    trace: Trace,
    sampler: Sampler,
    *,
    rollouts: int = ROLLOUTS,
    sentences: Sequence[int] | None = None,
    seed: int = 0,
    batch: int = 25,
    kind: str = RESUME,
    force: str = "",
    cache: RolloutCache | None = None,
    settled: Callable[[dict[int, list[Rollout]]], set[int]] | None = None,
    max_tokens: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[int, list[Rollout]]:
    """D_i for each of `sentences` (0 … n by default; D_n starts behind the last).

    batch: rollouts asked of the sampler at once; every sentence gets one batch before any gets a second. settled: after
    each round, the starts that need no more (see `importance.settled_starts`). kind="forced" puts `force`, an
    answer-now text, behind each prefix. Rollout k of sentence i has the seed `seed` + 1000003 i + k."""
    _check(trace, rollouts, batch, sentences, kind, force)
    starts = list(range(len(trace) + 1)) if sentences is None else list(sentences)
    known = {} if cache is None else cache.rollouts
    if len(trace) > MANY_SENTENCES:
        told = estimate(trace, rollouts=rollouts, max_tokens=max_tokens or 1) if max_tokens else None
        cost = told or f"{len(starts) * rollouts:,} rollouts"
        log.warning("%s has %d sentences: sampling will take %s.", trace.name, len(trace), cost)
    found: dict[int, list[Rollout]] = {i: [] for i in starts}
    done: set[int] = set()
    for first in range(0, rollouts, batch):
        for i in [i for i in starts if i not in done]:
            if progress is not None:
                progress(sum(map(len, found.values())), len(starts) * rollouts)
            seeds = [seed + SEEDS_APART * i + k for k in range(first, min(first + batch, rollouts))]
            absent = [s for s in seeds if (kind, i, s) not in known]
            fresh = _drawn(sampler, trace.prefix(i), absent, force, i, kind)
            if cache is not None and fresh:
                cache.add(fresh)
            by_seed = {r.seed: r for r in fresh}
            found[i] += [by_seed[s] if s in by_seed else known[kind, i, s] for s in seeds]
        done = settled(found) if settled is not None else set()
        if done >= set(starts):
            break
    return found


def answers_of(rollouts: Sequence[Rollout], extract: Extractor, trace: Trace | None = None) -> list[str]:
    """The final answer of each rollout, NO_ANSWER where there is none.

    With the trace, a rollout without an answer has that of the sentences before it: behind the sentence that states the
    answer there is nothing left to say. Forced answers are taken from themselves alone."""
    found = []
    for rollout in rollouts:
        answer = extract(rollout.text)
        if answer is None and trace is not None and rollout.kind == RESUME and rollout.sentence:
            answer = extract("".join(trace.sentences[: rollout.sentence]))
        found.append(NO_ANSWER if answer is None else answer)
    return found


def _drawn(
    sampler: Sampler, prefix: Prefix, seeds: Sequence[int], force: str, sentence: int, kind: str
) -> list[Rollout]:
    if not seeds:
        return []
    asked = Prefix((), prefix.text + force) if force else prefix
    texts = list(sampler(asked, seeds))
    if len(texts) != len(seeds) or not all(isinstance(text, str) for text in texts):
        raise ArgumentError(
            f"sampler: got {len(texts)} results for {len(seeds)} seeds at sentence {sentence}, expected one text each."
        )
    return [Rollout(sentence, s, text, kind) for s, text in zip(seeds, texts, strict=True)]


def _check(trace: Trace, rollouts: int, batch: int, sentences: Sequence[int] | None, kind: str, force: str) -> None:
    if rollouts < 1 or batch < 1:
        raise ArgumentError(f"rollouts, batch: got {rollouts} and {batch}, expected at least 1 of both.")
    if rollouts > SEEDS_APART:
        raise ArgumentError(f"rollouts: got {rollouts:,}, expected at most {SEEDS_APART:,} for one sentence.")
    for i in sentences or ():
        trace.prefix(i)
    if kind not in (RESUME, FORCED) or (kind == FORCED) != bool(force):
        raise ArgumentError(
            f"kind, force: got {kind!r} with {force!r}, expected 'resume' without or 'forced' with a text such as "
            "'\\n\\nFinal answer:'."
        )
