"""The thirteen RULER-like tasks on SmolLM2: which of them dense attention of 135M parameters can do, and what methods
keep of them.

What dense attention cannot do, no method can lose, so the scores of dense attention tell which tasks say something in
`headway compare`. Dense attention gives the same answer to a context and a question in one piece or in two; alone it is
asked in one.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import RESULTS, write_facts
from headway.compare import Comparison
from headway.compare import compare as compare_methods
from headway.hosts import default_text, load
from headway.tasks.answering import answer
from headway.tasks.ruler import RULER, ruler_samples

LENGTHS = (1024,)
COUNT = 10
METHODS = (
    "streaming-llm", "duo-attention", "flexprefill", "dhsa", "power-attention", "recycled-attention", "tappa",
)  # fmt: skip
BUDGETS = (0.5,)
#: Samples of each task for every method, the first of those that dense attention alone is asked.
METHOD_COUNT = 2
#: Tasks by what dense attention was seen to do, so that a run that is ended early has those that tell methods apart.
ORDER = (
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery", "fwe",
    "vt", "niah_multikey_2", "niah_multikey_3", "qa_1", "qa_2", "cwe",
)  # fmt: skip
#: Finished cells of `compare`, from which a run that was ended goes on.
CELLS = Path("compare-out") / "ruler"


def ruler_dense(
    lengths: Sequence[int] = LENGTHS,
    *,
    count: int = COUNT,
    tasks: Sequence[str] = tuple(RULER),
    seed: int = 0,
    results: str | Path = RESULTS,
) -> None:
    """Dense SmolLM2 on ten samples of each RULER-like task at 1,024 tokens; goes on where it was ended."""
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


def ruler_methods(
    tokens: int = 1024,
    *,
    methods: Sequence[str] = METHODS,
    budgets: Sequence[float] = BUDGETS,
    count: int = METHOD_COUNT,
    tasks: Sequence[str] = ORDER,
    seed: int = 0,
    cells: str | Path = CELLS,
    results: str | Path = RESULTS,
) -> None:
    """Seven methods at half of the keys beside dense SmolLM2 on the RULER-like tasks, question-blind and -aware,
    through `headway compare`, task by task; goes on where it was ended. About quality: its times are not kept."""
    model, tokenizer = load("smollm2")
    for done in range(1, len(tasks) + 1):
        found = compare_methods(
            model,
            tokenizer,
            methods=methods,
            budgets=budgets,
            tasks=tasks[:done],
            tokens=tokens,
            count=count,
            repeats=2,
            new_tokens=2,
            seed=seed,
            name="smollm2",
            out=cells,
        )
        facts = facts_of(found, seed)
        write_facts(f"ruler_methods_{tokens}", facts, results)
        print(table(facts).splitlines()[-1], flush=True)
    print(table(facts))


def facts_of(found: Comparison, seed: int) -> dict[str, Any]:
    """Scores of every sample by point, task and mode; densities and the paths that ran; what was refused and why."""
    settings = {name: found.run[name] for name in ("tokens", "budgets", "samples", "modes", "prefill_chunk")}
    return {
        "settings": {"model": "smollm2", **settings, "seed": seed},
        "judged": [list(pair) for pair in found.judged],
        "points": {
            point.label: {
                "scores": {score.label: score.parts for score in point.scores},
                "means": {score.label: score.value for score in point.scores},
                "density": point.density,
                "density_by_task": {task: of["all"] for task, of in point.density_by_task.items() if "all" in of},
                "paths": point.paths,
                "cache_bytes": point.cache_bytes,
                "reasons": point.reasons,
            }
            for point in found.points
        },
    }


def table(facts: dict[str, Any]) -> str:
    """A row per task and a column per point, blind / aware, as the documentation shows it."""
    points, modes = facts["points"], facts["settings"]["modes"]
    tasks = dict.fromkeys(label.rpartition(", ")[0] for label in points["dense"]["means"])
    lines = [f"| task | {' | '.join(points)} |", "|---|" + "---|" * len(points)]
    for task in tasks:
        cells = (
            " / ".join(_shown(point["means"].get(f"{task}, {mode}")) for mode in modes) for point in points.values()
        )
        lines.append(f"| `{task}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _shown(score: float | None) -> str:
    return "–" if score is None else f"{score:.2g}"


def _finished(path: Path, settings: dict[str, object]) -> dict[str, list[float]]:
    """The scores of tasks that an earlier run with the same settings has finished."""
    if not path.is_file():
        return {}
    known = json.loads(path.read_text(encoding="utf-8"))
    return dict(known["scores"]) if known.get("settings") == settings else {}


if __name__ == "__main__":
    logging.disable(logging.INFO)
    ruler_dense()
    ruler_methods()
