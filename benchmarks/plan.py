"""What `headway plan` predicts beside what this machine takes: times of a prompt and of a step, and bytes of the cache.

Rates of arithmetic, memory and attention are measured in the same run (`headway plan --check`), so a ratio of predicted
to measured time tells what the cost model leaves out. Bytes have to agree exactly where a method's are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from benchmarks.harness import RESULTS, write_facts
from headway.hosts import load
from headway.plan.check import check
from headway.plan.command import check_table

LENGTHS = (1024, 2048, 4096)
METHODS = ("streaming-llm", "duo-attention", "flexprefill")
SHARE = 0.25


def plan_check(
    lengths: Sequence[int] = LENGTHS,
    *,
    methods: Sequence[str] = METHODS,
    steps: int = 16,
    repeats: int = 3,
    results: str | Path = RESULTS,
) -> None:
    """SmolLM2, dense and three methods at a quarter of the keys: predicted to measured time of a prompt and a step."""
    model, _ = load("smollm2")
    for tokens in lengths:
        found = check(model, tokens=tokens, methods=[(name, SHARE) for name in methods], steps=steps, repeats=repeats)
        Console().print(check_table(found))
        ratios = {phase: [row.ratio for row in found.rows if row.phase == phase] for phase in ("prompt", "step")}
        said = "; ".join(f"{phase} {min(r):.2f} to {max(r):.2f}" for phase, r in ratios.items())
        print(f"{tokens:,} tokens, predicted / measured: {said}")
        facts = {
            "model": "smollm2",
            "budget": SHARE,
            "steps": steps,
            "repeats": repeats,
            **found.to_dict(),
            "ratios": {phase: {"least": min(r), "most": max(r)} for phase, r in ratios.items()},
            "bytes_agree": {row.method: row.predicted_bytes == row.held_bytes for row in found.rows},
        }
        write_facts(f"plan_check_{tokens}", facts, results)


if __name__ == "__main__":
    plan_check()
