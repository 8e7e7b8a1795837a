"""The grid: every arm with every seed, each kept once it is finished, so that a second call goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from headway.errors import ArgumentError, HeadwayError, NumericError
from headway.files import write_atomically
from headway.hosts import Text, default_text
from headway.lab.arms import Arm, Experiment
from headway.lab.data import Split, split_bytes
from headway.lab.result import ArmResult, SinkLab
from headway.lab.table import conclude
from headway.lab.training import EVALUATION, build, run_arm
from headway.pages.plain import plain
from headway.progress import Tell

log = logging.getLogger(__name__)

#: Raised when the meaning of a stored number changes, so that older ones are measured again.
MEASURES = 1


def run_sinks(
    experiment: Experiment,
    *,
    text: Text | None = None,
    out: str | Path | None = None,
    evaluation: int = EVALUATION,
    progress: Tell | None = None,
) -> SinkLab:
    """Trains and measures every arm with every seed.

    text: what is read, a built-in text by default. out: a folder for finished arms and for the checkpoint of the one at
    hand; a second call with the same settings goes on from them, also after a kill. evaluation: held-out sequences. An
    arm whose training breaks (a loss that is not finite) is kept as a failure, and the others go on. Every model is
    built once before the first is trained, so that a wrong option of the last arm is told at once: ArgumentError with
    a note of the arm."""
    given = default_text() if text is None else text
    split = split_bytes(given)
    for arm in experiment.arms:
        if len(split.held_out) // arm.length < evaluation:
            raise ArgumentError(
                f"text: got {len(split.held_out):,} held-out bytes, expected {evaluation} sequences of {arm.length} "
                f"for arm {arm.name!r}. Give a longer text, or fewer sequences with evaluation=."
            )
        with _told(arm):
            build(arm, 0)
    folder = None if out is None else Path(out)
    jobs = [(arm, seed) for arm in experiment.arms for seed in experiment.seeds]
    results, reused = [], 0
    for number, (arm, seed) in enumerate(jobs):
        place = None if folder is None else folder / "arms" / f"{_key(arm, seed, given, evaluation)}.json"
        found = _stored(place, arm, seed)
        reused += found is not None

        def tell(what: str, done: int, total: int, number: int = number) -> None:
            if progress is not None:
                progress(
                    f"{what} ({number + 1} of {len(jobs)})", number * 1000 + 1000 * done // total, 1000 * len(jobs)
                )

        if found is None:
            found = _run(arm, seed, split, place, evaluation, tell)
            if place is not None and not found.failure:
                write_atomically(place, json.dumps(plain(asdict(found)), ensure_ascii=False, indent=1) + "\n")
        tell(arm.name, 1, 1)
        results.append(found)
    lab = SinkLab(
        name=experiment.name,
        about=experiment.about,
        arms={arm.name: arm.changes() for arm in experiment.arms},
        groups={arm.name: arm.group for arm in experiment.arms},
        seeds=list(experiment.seeds),
        results=results,
        run=_facts(experiment, given, evaluation, reused),
    )
    lab.findings, lab.warnings = conclude(lab)
    return lab


def _run(arm: Arm, seed: int, split: Split, place: Path | None, evaluation: int, tell: Tell) -> ArmResult:
    folder = None if place is None else place.with_suffix("")
    try:
        with _told(arm):
            return run_arm(arm, seed, split, folder=folder, evaluation=evaluation, progress=tell)
    except NumericError as error:
        log.warning("%s, seed %d: %s", arm.name, seed, error)
        return ArmResult(arm=arm.name, group=arm.group, seed=seed, failure=str(error))


@contextmanager
def _told(arm: Arm) -> Iterator[None]:
    """Adds the name of the arm to an ArgumentError."""
    try:
        yield
    except ArgumentError as error:
        error.add_note(f"in arm {arm.name!r}")
        raise


def _key(arm: Arm, seed: int, text: Text, evaluation: int) -> str:
    """The arm's own key, and what else its numbers depend on."""
    rest = f"{text.sha256} {evaluation} {MEASURES} {torch.__version__}"
    return f"{arm.key(seed)}-{hashlib.sha256(rest.encode()).hexdigest()[:8]}"


def _stored(place: Path | None, arm: Arm, seed: int) -> ArmResult | None:
    if place is None or not place.is_file():
        return None
    try:
        found = ArmResult.from_dict(json.loads(place.read_text(encoding="utf-8")))
    except (ValueError, TypeError, KeyError, HeadwayError) as error:
        log.warning("%s is no result of this version (%s); the arm is trained again.", place, error)
        return None
    # Names are not part of the key: an arm that was renamed keeps its numbers.
    return replace(found, arm=arm.name, group=arm.group, seed=seed)


def _facts(experiment: Experiment, text: Text, evaluation: int, reused: int) -> dict[str, Any]:
    import transformers

    from headway import __version__

    shared = {
        name: value
        for name, value in experiment.baseline.settings().items()
        if all(arm.settings()[name] == value for arm in experiment.arms)
    }
    return {
        "text": text.source,
        "text_sha256": text.sha256,
        "evaluation_sequences": evaluation,
        "settings_of_all_arms": {k: v for k, v in shared.items() if v not in (None, {}, "")},
        "arms_reused": reused,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "headway": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
