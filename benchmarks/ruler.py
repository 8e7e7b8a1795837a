"""Which of the thirteen RULER-like tasks a model of 135M parameters can do at all: scores of dense SmolLM2 by task.

What dense attention cannot do, no method can lose, so these scores tell which tasks say something in `headway compare`.
Dense attention gives the same answer to a context and a question in one piece or in two; the tasks are asked in one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import RESULTS, write_facts
from headway.hosts import default_text, load
from headway.tasks.answering import answer
from headway.tasks.ruler import RULER, ruler_samples

LENGTHS = (1024, 2048)
COUNT = 10


def ruler_dense(
    lengths: Sequence[int] = LENGTHS,
    *,
    count: int = COUNT,
    tasks: Sequence[str] = tuple(RULER),
    seed: int = 0,
    results: str | Path = RESULTS,
) -> None:
    """Dense SmolLM2 on ten samples of each RULER-like task at 1,024 and 2,048 tokens; goes on where it was ended."""
    model, tokenizer = load("smollm2")
    text = default_text().text
    for tokens in lengths:
        name = f"ruler_dense_{tokens}"
        settings = {"model": "smollm2", "tokens": tokens, "count": count, "seed": seed}
        scores = _finished(Path(results) / f"{name}.json", settings)
        for task in tasks:
            if task not in scores:
                samples = ruler_samples(
                    tokenizer, tokens, text=text, documentation=text, tasks=[task], count=count, seed=seed
                )
                scores[task] = [answer(model, tokenizer, sample, question_aware=True).score for sample in samples]
                facts = {
                    "settings": settings,
                    "scores": scores,
                    "means": {t: sum(s) / count for t, s in scores.items()},
                }
                write_facts(name, facts, results)
            mean = sum(scores[task]) / count
            print(f"{tokens:,} tokens, {task}: {mean:.2f} ({RULER[task].summary})", flush=True)


def _finished(path: Path, settings: dict[str, object]) -> dict[str, list[float]]:
    """The scores of tasks that an earlier run with the same settings has finished."""
    if not path.is_file():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    return dict(known["scores"]) if known.get("settings") == settings else {}


if __name__ == "__main__":
    ruler_dense()
