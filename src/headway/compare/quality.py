"""The tasks of a comparison: what is asked of a model, and the scores that say how well it did.

Each task is made once (`prepare`), so that every method gets the same tokens, and measured in whatever scope is open.
Questions are asked in two modes: question-blind (the context is prefilled before the question is known) and
question-aware (both together). A driver wraps `generate`, so it is asked through it, question-aware only.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.compare.cells import Score
from headway.errors import HeadwayError, HostError, unknown
from headway.hosts import Text, default_text
from headway.tasks.agreement import Reference, agree, record
from headway.tasks.answering import Answer, Running, answer, decode, feed, fork, prefill
from headway.tasks.needle import needle_grid, score_planted
from headway.tasks.perplexity import negative_log_likelihood, perplexity
from headway.tasks.recall import recall_samples
from headway.tasks.ruler import ruler_samples
from headway.tasks.samples import Sample
from headway.tasks.turns import SharedContext, answer_turns, shared_contexts

MODES = ("blind", "aware")
#: Tokens of a block that counts as one draw when an interval of a perplexity is made.
BLOCK = 64
#: Tokens whose perplexity is taken one by one, and those of a block of them.
DECODED = 128
DECODED_BLOCK = 16
PHASES = ("prefill", "decode")
QUESTIONS = 4
AGREEMENT_TOKENS = 16
AGREEMENT_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What every task is given. `ids` are the text's first tokens, `tokens` the length of a generated prompt, `count`
    how many samples a task has, `chunk` how much is prefilled at once (None: everything)."""

    model: nn.Module
    tokenizer: Any
    text: Text
    ids: Int[Tensor, "1 tokens"]
    count: int
    seed: int
    modes: tuple[str, ...]
    chunk: int | None

    @property
    def tokens(self) -> int:
        return self.ids.shape[1]


class UnshowableError(HeadwayError):
    """A task cannot show what a method does."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """`prepare(setting)` makes the material, `measure(setting, material, mode, drives)` scores it, once for each of its
    `modes` (by default those of the setting). `ready` is called with the material while nothing is attached, and gives
    what `measure` takes. `judges` says that the first score counts in the recommendation."""

    name: str
    summary: str
    prepare: Callable[[Setting], Any]
    measure: Callable[[Setting, Any, str, bool], tuple[list[Score], int | None]]
    ready: Callable[[Any], Any] = lambda material: material
    modes: tuple[str, ...] = ()
    judges: bool = True


def check_tasks(names: Sequence[str]) -> None:
    if isinstance(names, str) or not names:
        raise unknown("tasks", names, TASKS, fix="Give at least one.")
    for name in names:
        if name not in TASKS:
            raise unknown("tasks", name, TASKS)


def interval_of_share(parts: Sequence[float]) -> tuple[float, float]:
    """Wilson's 95 % interval of the mean of scores in [0, 1]. Scores between 0 and 1 vary less than right and wrong
    with the same mean, so for them it is a little too wide."""
    n, mean, z = len(parts), float(np.mean(parts)), 1.959964
    middle = (mean + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * math.sqrt(mean * (1 - mean) / n + z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def bootstrap_mean(parts: Sequence[float]) -> tuple[float, float]:
    """A bootstrap percentile interval of a mean; NaN for fewer than two parts."""
    values = np.asarray(parts, dtype=float)
    if values.size < 2:
        return math.nan, math.nan
    means = values[np.random.default_rng(0).integers(values.size, size=(2000, values.size))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _perplexity(setting: Setting, _: Any, phase: str, drives: bool) -> tuple[list[Score], int | None]:
    """Prefill: of the whole text at once. Decode: of its last tokens, given one by one after the rest was prefilled,
    which shows what a policy that drops keys after the prompt has lost."""
    _refuse_driver(drives, "perplexity")
    if phase == "prefill":
        found = perplexity(setting.model, setting.ids, chunk=setting.chunk or setting.tokens)
        nll, block, held = found.nll, BLOCK, found.cache_bytes
    else:
        nll, held = _decoded_nll(setting, min(DECODED, setting.tokens // 2))
        block = DECODED_BLOCK
    whole = nll.numel() // block * block
    parts = nll[:whole].double().view(-1, block).mean(1).tolist()
    low, high = (math.exp(x) for x in bootstrap_mean(parts))
    score = Score(
        task="perplexity",
        name="perplexity",
        mode=phase,
        value=math.exp(float(nll.double().mean())),
        low=low,
        high=high,
        n=nll.numel(),
        unit="per token",
        higher_is_better=False,
        parts=parts,
    )
    return [score], held


@torch.no_grad()
def _decoded_nll(setting: Setting, count: int) -> tuple[Float[Tensor, " count"], int]:
    """−ln p of the last `count` tokens, each given as the decoder gives its own."""
    ids = setting.ids
    running = prefill(setting.model, ids[:, :-count], chunk=setting.chunk)
    nll = []
    for token in ids[0, -count:]:
        nll.append(negative_log_likelihood(running.logits[-1:], token.view(1)))
        if len(nll) < count:
            feed(setting.model, running, token.view(1, 1))
    return torch.cat(nll), running.cache_bytes


def _needles(setting: Setting) -> list[Sample]:
    depths = np.linspace(0, 100, setting.count).tolist() if setting.count > 1 else [50.0]
    return list(
        needle_grid(setting.tokenizer, [setting.tokens], depths=depths, text=setting.text.text, seed=setting.seed)
    )


def _needle(setting: Setting, samples: list[Sample], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    return _ask("needle", setting, samples, mode, drives, graded=not drives)


def _recalls(setting: Setting) -> list[Sample]:
    return list(recall_samples(setting.tokenizer, setting.tokens, count=setting.count, seed=setting.seed))


def _recall(setting: Setting, samples: list[Sample], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    return _ask("recall", setting, samples, mode, drives)


def _rulers(setting: Setting) -> list[Sample]:
    return list(
        ruler_samples(
            setting.tokenizer,
            setting.tokens,
            text=setting.text.text,
            documentation=default_text().text,
            seed=setting.seed,
        )
    )


def _ruler(setting: Setting, samples: list[Sample], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    """The mean of the thirteen tasks, and beside it the score of each."""
    scores, most = _ask("ruler", setting, samples, mode, drives)
    each = [
        Score(task="ruler", name=sample.task, mode=mode, value=part, low=math.nan, high=math.nan, n=1, primary=False)
        for sample, part in zip(samples, scores[0].parts, strict=True)
    ]
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
    scores = [_share(task, name, mode, [found.score for found in answers])]
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


def _contexts(setting: Setting) -> list[SharedContext]:
    return list(
        shared_contexts(
            setting.tokenizer,
            setting.tokens,
            count=max(setting.count // QUESTIONS, 1),
            questions=QUESTIONS,
            text=setting.text.text,
            seed=setting.seed,
        )
    )


def _turns(setting: Setting, contexts: list[SharedContext], mode: str, drives: bool) -> tuple[list[Score], int | None]:
    """Blind: the context is prefilled once and each question gets a copy of its cache, or, where that cannot be
    copied, a prefill of its own."""
    _refuse_driver(drives, "turns")
    answers = [found for shared in contexts for found in _turn_answers(setting, shared, mode)]
    return [_share("turns", "exact match", mode, [found.score for found in answers])], _most_bytes(answers)


def _turn_answers(setting: Setting, shared: SharedContext, mode: str) -> list[Answer]:
    ask = functools.partial(answer_turns, setting.model, setting.tokenizer, shared, prefill_chunk=setting.chunk)
    if mode == "aware":
        return ask(mode="aware")
    try:
        return ask(mode="copy")
    except HostError:
        return ask(mode="rerun")


def _reference(setting: Setting) -> Callable[[], Reference]:
    """Dense's own answer, recorded when it is first asked for."""

    @functools.cache
    def recorded() -> Reference:
        return record(
            setting.model,
            setting.ids,
            max_new_tokens=AGREEMENT_TOKENS,
            rows=AGREEMENT_ROWS,
            prefill_chunk=setting.chunk or setting.tokens,
        )

    return recorded


def _agreement(setting: Setting, reference: Reference, mode: str, drives: bool) -> tuple[list[Score], int | None]:
    _refuse_driver(drives, "agreement")
    found = agree(setting.model, reference, prefill_chunk=setting.chunk or setting.tokens)
    same, kl = found.same.double().tolist(), found.kl.double().tolist()
    tokens = Score(
        task="agreement", name="greedy tokens", value=found.token_agreement, low=math.nan, high=math.nan,
        n=found.answer_ids.numel(), primary=False,
    )  # fmt: skip
    low, high = bootstrap_mean(kl)
    divergence = Score(
        task="agreement", name="KL from dense", value=found.mean_kl, low=low, high=high, n=len(kl), unit="nats",
        higher_is_better=False, primary=False, parts=kl,
    )  # fmt: skip
    return [_share("agreement", "same next token", "", same), tokens, divergence], None


def _share(task: str, name: str, mode: str, parts: list[float]) -> Score:
    low, high = interval_of_share(parts)
    return Score(
        task=task, name=name, mode=mode, value=float(np.mean(parts)), low=low, high=high, n=len(parts), parts=parts
    )


def _refuse_driver(drives: bool, task: str) -> None:
    if drives:
        raise UnshowableError(f"{task}: a driver wraps generate and leaves forwards as they are; ask needle or recall.")


def _nothing(setting: Setting) -> None:
    return None


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="perplexity",
            summary="how well the text is predicted: all of it in one prefill, and its last tokens given one by one",
            prepare=_nothing,
            measure=_perplexity,
            modes=PHASES,
        ),
        Task(
            name="needle",
            summary="one planted number in the text, at depths from end to end; also graded by the nll of the value",
            prepare=_needles,
            measure=_needle,
        ),
        Task(
            name="recall",
            summary="the value of one key in an object of random pairs",
            prepare=_recalls,
            measure=_recall,
        ),
        Task(
            name="ruler",
            summary="thirteen generated questions on a long context, after RULER",
            prepare=_rulers,
            measure=_ruler,
        ),
        Task(
            name="turns",
            summary="several questions on one context; blind, it is prefilled once for all of them",
            prepare=_contexts,
            measure=_turns,
        ),
        Task(
            name="agreement",
            summary="how often the next token is the one dense attention gives",
            prepare=_reference,
            measure=_agreement,
            ready=lambda recorded: recorded(),
            modes=("",),
            judges=False,
        ),
    )
}
