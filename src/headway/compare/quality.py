"""The tasks of a comparison by name. Each is made once, so that every method gets the same tokens, and is measured in
whatever scope is open."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headway.compare import questions, streaming, texts
from headway.compare.cells import Score
from headway.compare.setting import Setting
from headway.errors import unknown
from headway.tasks.ruler import RULER


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


def _nothing(setting: Setting) -> None:
    return None


TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="perplexity",
            summary="how well the text is predicted: all of it in one prefill, and its last tokens given one by one",
            prepare=_nothing,
            measure=texts.measure_perplexity,
            modes=texts.PHASES,
        ),
        Task(
            name="streaming",
            summary="how well a text four times as long as a prompt is predicted as it streams by, behind the prompt's "
            "length; beside it the ratio to windows that are read afresh",
            prepare=streaming.prepare,
            measure=streaming.measure,
            ready=lambda stream: stream.ready(),
            modes=("",),
        ),
        Task(
            name="passkey",
            summary="one planted number in repeated filler, at depths from end to end; also graded by its nll",
            prepare=questions.passkeys,
            measure=questions.measure_passkey,
        ),
        Task(
            name="needle",
            summary="one planted number in the text, at depths from end to end; also graded by the nll of the value",
            prepare=questions.needles,
            measure=questions.measure_needle,
        ),
        Task(
            name="recall",
            summary="the value of one key in an object of random pairs",
            prepare=questions.recalls,
            measure=functools.partial(questions.measure_asked, "recall"),
        ),
        Task(
            name="ruler",
            summary="thirteen kinds of generated questions on a long context, after RULER; each is a task by name too",
            prepare=questions.rulers,
            measure=questions.measure_ruler,
        ),
        Task(
            name="turns",
            summary="several questions on one context; blind, it is prefilled once for all of them",
            prepare=questions.contexts_of,
            measure=questions.measure_turns,
        ),
        Task(
            name="choice",
            summary="multiple choice on short texts, in one forward without a cache: for methods that edit attention",
            prepare=questions.choices,
            measure=questions.measure_choice,
            modes=("",),
        ),
        Task(
            name="agreement",
            summary="how often the next token is the one dense attention gives",
            prepare=texts.dense_reference,
            measure=texts.measure_agreement,
            ready=lambda recorded: recorded(),
            modes=("",),
            judges=False,
        ),
        Task(
            name="fidelity",
            summary="relative error of attention's output where every layer gets dense attention's own query, key and "
            "value; beside it the share of attention mass on the keys that were read",
            prepare=texts.dense_record,
            measure=texts.measure_fidelity,
            ready=lambda recorded: recorded(),
            modes=texts.PHASES,
            judges=False,
        ),
        *(
            Task(
                name=name,
                summary=f"of RULER: {task.summary}",
                prepare=functools.partial(questions.rulers_of, name),
                measure=functools.partial(questions.measure_asked, name),
            )
            for name, task in RULER.items()
        ),
    )
}
