"""The four tasks behind one interface: samples, questions, gold answers, and scores averaged over samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from headway.errors import ArgumentError, unknown
from headway.tasks.aimicius import cmdgen, infrawise, kql, optiflow
from headway.tasks.aimicius.similarity import Similarity, ngram_similarity

#: A model: the turns so far (question, answer, question, …) to the next answer.
Answerer = Callable[[Sequence[str]], str]


@dataclass(frozen=True, kw_only=True)
class Task:
    """`samples()`, one question per turn from (sample, answers so far), gold answers per turn, and scores in [0, 1].

    `headline` is the metric the paper's comparison leads with."""

    name: str
    samples: Callable[[], Sequence[Any]]
    turns: int
    question: Callable[[Any, Sequence[str]], str]
    gold: Callable[[Any], Sequence[str]]
    score: Callable[..., dict[str, float]]
    headline: str
    compares_text: bool = False


TASKS: Mapping[str, Task] = {
    "cmdgen": Task(
        name="cmdgen",
        samples=cmdgen.samples,
        turns=1,
        question=cmdgen.question,
        gold=cmdgen.gold,
        score=cmdgen.score,
        headline="accuracy",
        compares_text=True,
    ),
    "infrawise": Task(
        name="infrawise",
        samples=infrawise.samples,
        turns=2,
        question=infrawise.question,
        gold=infrawise.gold,
        score=infrawise.score,
        headline="bench accuracy",
    ),
    "optiflow": Task(
        name="optiflow",
        samples=optiflow.samples,
        turns=2,
        question=optiflow.question,
        gold=optiflow.gold,
        score=optiflow.score,
        headline="plan improved",
    ),
    "nl2kql": Task(
        name="nl2kql",
        samples=kql.samples,
        turns=1,
        question=kql.question,
        gold=kql.gold,
        score=kql.score,
        headline="database recall",
    ),
}


def evaluate(name: str, answer: Answerer, *, similarity: Similarity = ngram_similarity) -> dict[str, float]:
    """Every metric of a task, averaged over its samples; `answer(turns)` gives the answer to the last of the turns."""
    task = _task(name)
    totals: dict[str, float] = {}
    samples = task.samples()
    for sample in samples:
        answers = converse(task, sample, answer)
        options: dict[str, Any] = {"similarity": similarity} if task.compares_text else {}
        for metric, value in task.score(sample, answers, **options).items():
            totals[metric] = totals.get(metric, 0.0) + value
    return {metric: total / len(samples) for metric, total in totals.items()}


def converse(task: Task, sample: Any, answer: Answerer) -> list[str]:
    """The answers to all turns of a sample."""
    turns: list[str] = []
    for _ in range(task.turns):
        turns.append(task.question(sample, turns[1::2]))
        given = answer(tuple(turns))
        if not isinstance(given, str):
            raise ArgumentError(f"answer: got {type(given).__name__}, expected a text. Decode the tokens first.")
        turns.append(given)
    return turns[1::2]


def model_answers(model: Any, tokenizer: Any, *, max_new_tokens: int = 256) -> Answerer:
    """An answerer that is a language model: greedy, with the tokenizer's chat template where it has one."""
    if max_new_tokens < 1:
        raise ArgumentError(f"max_new_tokens: got {max_new_tokens}, expected at least 1.")

    def answer(turns: Sequence[str]) -> str:
        if getattr(tokenizer, "chat_template", None):
            said = [{"role": ("user", "assistant")[at % 2], "content": turn} for at, turn in enumerate(turns)]
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
            batch = tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            batch = tokenizer("\n\n".join(turns) + "\n\n", return_tensors="pt")
        ids = batch["input_ids"].to(model.device)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        made = model.generate(
            input_ids=ids,
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=pad,
        )
        return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)

    return answer


def gold_answers(name: str) -> Answerer:
    """An answerer that knows the gold answers of a task: it must score 1 on every metric."""
    task = _task(name)
    known = {task.question(sample, ()): task.gold(sample) for sample in task.samples()}

    def answer(turns: Sequence[str]) -> str:
        return known[turns[0]][len(turns) // 2]

    return answer


def _task(name: str) -> Task:
    if name not in TASKS:
        raise unknown("task", name, TASKS)
    return TASKS[name]
