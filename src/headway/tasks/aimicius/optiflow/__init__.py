"""Optiflow: tables of link speeds to a program that prints an all-gather plan, then to a faster one.

    detected     the answer holds a Python function generate_plan(gpus, chunks)
    executable   it runs and prints transfers            valid       every GPU ends with every chunk
    improved     the second answer's plan is valid and faster than the first answer's was measured

The code is read by an interpreter of a small part of Python (`interpreter`), never by Python itself, and the plan
runs on a simulator (`simulator`). Metrics of Sigma, arXiv 2501.13629; machines are made up.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from headway.tasks.aimicius.optiflow.interpreter import run_program
from headway.tasks.aimicius.optiflow.known import ProgramError
from headway.tasks.aimicius.optiflow.machines import DIRECT, Machine, improved_program, machines
from headway.tasks.aimicius.optiflow.simulator import PlanError, all_gather_latency, parse_plan

__all__ = [
    "Machine",
    "Measured",
    "PlanError",
    "ProgramError",
    "all_gather_latency",
    "gold",
    "measure",
    "parse_plan",
    "question",
    "run_program",
    "samples",
    "score",
]

#: Name of the function that an answer must define.
FUNCTION = "generate_plan"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """How far an answer gets; the latency of its plan in µs, None where it is not valid, and why not."""

    detected: bool = False
    executable: bool = False
    latency: float | None = None
    reason: str = ""


@functools.cache
def samples() -> tuple[Machine, ...]:
    return machines()


def question(sample: Machine, answers: Sequence[str] = ()) -> str:
    if answers:
        latency = measure(sample, answers[0]).latency
        told = "is not valid" if latency is None else f"takes {latency:.2f} µs"
        return f"That plan {told} on this machine. Write a {FUNCTION} whose plan is faster."
    return (
        f"{sample.gpus} GPUs (G(0) to G({sample.gpus - 1})) and a switch, the last row and column.\n"
        f"Latency in µs: {_table(sample.latency)}\nBandwidth in GB/s: {_table(sample.bandwidth)}\n"
        f"Each GPU holds {sample.chunks} chunks of {sample.chunk_bytes} bytes. Write a Python function "
        f"{FUNCTION}(gpus, chunks) that prints the transfers of an all-gather, one a line, as D(source, chunk): "
        "G(a) => G(b). A line 'step' begins a new step."
    )


def gold(sample: Machine) -> tuple[str, str]:
    return f"```python\n{DIRECT}```", f"```python\n{improved_program(sample)}```"


def score(sample: Machine, answers: Sequence[str]) -> dict[str, float]:
    first = measure(sample, answers[0])
    second = measure(sample, answers[1]).latency if len(answers) > 1 else None
    faster = first.latency is not None and second is not None and second < first.latency
    return {
        "code detected": float(first.detected),
        "code executable": float(first.executable),
        "plan valid": float(first.latency is not None),
        "plan improved": float(faster),
    }


def measure(sample: Machine, answer: str) -> Measured:
    """Runs the program of an answer, and its plan on the machine."""
    code = code_in(answer)
    if code is None:
        return Measured(reason=f"no function {FUNCTION}")
    try:
        plan = parse_plan(run_program(code, FUNCTION, (sample.gpus, sample.chunks)))
    except (ProgramError, PlanError) as error:
        return Measured(detected=True, reason=str(error))
    try:
        return Measured(detected=True, executable=True, latency=all_gather_latency(plan, sample))
    except PlanError as error:
        return Measured(detected=True, executable=True, reason=str(error))


def code_in(text: str) -> str | None:
    """The code of an answer: the first code block with the function, or the text itself; None where there is none."""
    blocks = re.findall(r"```[\w-]*\n(.*?)```", text, re.DOTALL) or [text]
    return next((block for block in blocks if re.search(rf"^def {FUNCTION}\(", block, re.MULTILINE)), None)


def _table(rows: Sequence[Sequence[float]]) -> str:
    return "[" + ", ".join("[" + ", ".join(f"{x:g}" for x in row) + "]" for row in rows) + "]"
