"""Tasks that ask: needles, recall, RULER-like questions, several questions on one context, multiple choice.

Question-blind, the context is prefilled before the question is known; question-aware, both together. A driver wraps
`generate`, so it is asked through it, question-aware only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from headway.compare.cells import Score
from headway.compare.setting import Setting, UnshowableError, bootstrap_mean, refuse_driver, share_score
from headway.errors import HostError
from headway.hosts import default_text
from headway.tasks.answering import Answer, Running, answer, decode, feed, fork, prefill
from headway.tasks.choice import TASKS as CHOICE_TASKS
from headway.tasks.choice import Question, make_questions, score_choices
from headway.tasks.needle import needle_grid, score_planted
from headway.tasks.recall import recall_samples
from headway.tasks.ruler import ruler_samples
from headway.tasks.samples import Sample
from headway.tasks.turns import SharedContext, answer_turns, shared_contexts

#: Questions on one shared context.
QUESTIONS = 4
#: Multiple-choice questions of each kind for every sample of another task.
CHOICES = 4


def needles(setting: Setting) -> list[Sample]:
    return _grid(setting, setting.text.text)


def passkeys(setting: Setting) -> list[Sample]:
    return _grid(setting, None)


def _grid(setting: Setting, text: str | None) -> list[Sample]:
    depths = np.linspace(0, 100, setting.count).tolist() if setting.count > 1 else [50.0]
    return list(
        needle_grid(setting.tokenizer, [setting.tokens], depths=depths, text=text, seed=setting.seed, chat=setting.chat)
    )


def measure_needle(setting: Setting, samples: list[Sample], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    return _ask("needle", setting, samples, mode, drives, graded=not drives)


def measure_passkey(setting: Setting, samples: list[Sample], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    return _ask("passkey", setting, samples, mode, drives, graded=not drives)


def recalls(setting: Setting) -> list[Sample]:
    return list(
        recall_samples(setting.tokenizer, setting.tokens, count=setting.count, seed=setting.seed, chat=setting.chat)
    )


def measure_asked(
    task: str, setting: Setting, samples: list[Sample], mode: str, drives: bool
) -> tuple[list[Score], int | None]:
    """The score of greedy answers and nothing else."""
    return _ask(task, setting, samples, mode, drives)


def rulers(setting: Setting, tasks: Sequence[str] | None = None) -> list[Sample]:
    """`count` samples of each of the tasks (all thirteen for None)."""
    return list(
        ruler_samples(
            setting.tokenizer,
            setting.tokens,
            text=setting.text.text,
            documentation=default_text().text,
            tasks=tasks,
            count=setting.count,
            seed=setting.seed,
            chat=setting.chat,
        )
    )


def rulers_of(task: str, setting: Setting) -> list[Sample]:
    return rulers(setting, [task])


def measure_ruler(setting: Setting, samples: list[Sample], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    """The mean of the thirteen tasks, and beside it the score of each."""
    scores, most = _ask("ruler", setting, samples, mode, drives)
    by_task: dict[str, list[float]] = {}
    for sample, part in zip(samples, scores[0].parts, strict=True):
        by_task.setdefault(sample.task, []).append(part)
    each = [replace(share_score("ruler", name, mode, parts), primary=False) for name, parts in by_task.items()]
    return [*scores, *each], most


def _ask(
    task: str, setting: Setting, samples: list[Sample], mode: str, drives: bool, *, graded: bool = False
) -> tuple[list[Score], int | None]:
    """The score of the answers; with `graded`, also the teacher-forced one of the planted value."""
    if drives and mode != "aware":
        raise UnshowableError(f"{task}: a driver wraps generate, which takes context and question together.")
    answers, nll = [], []
    for sample in samples:
        found, graded_nll = _one(setting, sample, mode == "aware", drives, graded)
        answers.append(found)
        nll.append(graded_nll)
    name = "exact match" if samples[0].match == "exact" else "references found"
    scores = [share_score(task, name, mode, [found.score for found in answers])]
    if graded:
        low, high = bootstrap_mean(nll)
        scores.append(
            Score(
                task=task,
                name="nll of the value",
                mode=mode,
                value=float(np.mean(nll)),
                low=low,
                high=high,
                n=len(nll),
                unit="nats per token",
                higher_is_better=False,
                primary=False,
                parts=nll,
            )
        )
    return scores, _most_bytes(answers)


def _most_bytes(answers: Sequence[Answer]) -> int | None:
    return max((found.cache_bytes for found in answers if found.cache_bytes is not None), default=None)


def _one(setting: Setting, sample: Sample, aware: bool, drives: bool, graded: bool) -> tuple[Answer, float]:
    """One answer, and how surely the planted value is given after the same prefill (NaN when not asked for)."""
    model, tokenizer = setting.model, setting.tokenizer
    if drives:
        return answer(model, tokenizer, sample, question_aware=True, through="generate"), math.nan
    if not graded:
        return answer(model, tokenizer, sample, question_aware=aware, prefill_chunk=setting.chunk), math.nan
    running = _prompted(setting, sample, aware)
    try:
        beside = fork(running, model)
    except (TypeError, RuntimeError):
        beside = _prompted(setting, sample, aware)
    nll = score_planted(model, tokenizer, sample, beside).mean_nll
    seconds = running.seconds
    return decode(model, tokenizer, sample, running, aware, seconds, question_seconds=0.0), nll


def _prompted(setting: Setting, sample: Sample, aware: bool) -> Running:
    running = prefill(setting.model, sample.prompt_ids if aware else sample.context_ids, chunk=setting.chunk)
    if not aware:
        feed(setting.model, running, sample.question_ids, chunk=setting.chunk)
    return running


def contexts_of(setting: Setting) -> list[SharedContext]:
    return list(
        shared_contexts(
            setting.tokenizer,
            setting.tokens,
            count=max(setting.count // QUESTIONS, 1),
            questions=QUESTIONS,
            text=setting.text.text,
            seed=setting.seed,
            chat=setting.chat,
        )
    )


def measure_turns(
    setting: Setting, contexts: list[SharedContext], mode: str, drives: bool
) -> tuple[list[Score], int | None]:
    """Blind: the context is prefilled once and each question gets a copy of its cache, or, where that cannot be
    copied, a prefill of its own."""
    refuse_driver(drives, "turns")
    answers = [found for shared in contexts for found in _turn_answers(setting, shared, mode)]
    return [share_score("turns", "exact match", mode, [found.score for found in answers])], _most_bytes(answers)


def _turn_answers(setting: Setting, shared: SharedContext, mode: str) -> list[Answer]:
    ask = functools.partial(answer_turns, setting.model, setting.tokenizer, shared, prefill_chunk=setting.chunk)
    if mode == "aware":
        return ask(mode="aware")
    try:
        return ask(mode="copy")
    except HostError:
        return ask(mode="rerun")


def choices(setting: Setting) -> list[Question]:
    """As many of each kind as CHOICES times the samples of another task, for one of them costs little."""
    return [
        question
        for kind in CHOICE_TASKS
        for question in make_questions(kind, CHOICES * setting.count, seed=setting.seed, text=setting.text.text)
    ]


def measure_choice(setting: Setting, asked: list[Question], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    """Accuracy over all kinds, and beside it the share of probability that the right options have."""
    refuse_driver(drives, "choice")
    found = score_choices(setting.model, setting.tokenizer, asked)
    beside = replace(share_score("choice", "probability", mode, found.probability.tolist()), primary=False)
    return [share_score("choice", "accuracy", mode, found.correct.tolist()), beside], None
