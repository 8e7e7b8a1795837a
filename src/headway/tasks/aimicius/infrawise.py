"""Infrawise: an intent to a query for benchmark records, then the records that answer it.

The query is JSON, {"Design": {"Target": …, "Baseline": …}, "Criterion": …, "Workload": …}. Each field counts when it
equals the gold field (letter case and white space aside), `dcw` when all four do. In the second turn about ten
records are shown, and the answer names those that fit by index, or says None: `bench recall` is the share of the
right ones that were named, `bench accuracy` whether exactly these were.

Metrics of Sigma, arXiv 2501.13629; the records here are made up.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FIELDS = ("target", "baseline", "criterion", "workload")


@dataclass(frozen=True)
class Intent:
    """A request, its query by field, the records that are shown, and the indices of those that answer it."""

    request: str
    query: dict[str, str]
    records: tuple[dict[str, str], ...]
    chosen: frozenset[int]


def _records() -> tuple[dict[str, str], ...]:
    return tuple(
        {"Hardware": hardware, "Workload": workload, "Metric": metric}
        for hardware, workload, metric in (
            ("MI300X", "Llama-2-70B inference", "tokens per second"),
            ("H100", "Llama-2-70B inference", "tokens per second"),
            ("A100", "Llama-2-70B inference", "tokens per second"),
            ("H100", "BERT training", "samples per second"),
            ("A100", "BERT training", "samples per second"),
            ("MI300X", "all-reduce 1 GB", "bus bandwidth"),
            ("H100", "all-reduce 1 GB", "bus bandwidth"),
            ("A100", "GEMM float16", "FLOP per second"),
            ("H100", "GEMM float16", "FLOP per second"),
            ("H100", "Llama-2-70B inference", "time to first token"),
        )
    )


def _intent(request: str, target: str, baseline: str, criterion: str, workload: str) -> Intent:
    """An intent whose records are those of its two designs under its workload and criterion."""
    records = _records()
    fits = frozenset(
        index
        for index, record in enumerate(records)
        if record["Hardware"] in (target, baseline) and record["Workload"] == workload and record["Metric"] == criterion
    )
    query = {"target": target, "baseline": baseline, "criterion": criterion, "workload": workload}
    return Intent(request, query, records, fits)


_SAMPLES = (
    _intent(
        "Does an MI300X serve Llama-2-70B faster than an H100, in tokens per second?",
        "MI300X", "H100", "tokens per second", "Llama-2-70B inference",
    ),
    _intent(
        "By how much does H100 raise the samples per second of BERT training over A100?",
        "H100", "A100", "samples per second", "BERT training",
    ),
    _intent(
        "Compare the bus bandwidth of a 1 GB all-reduce: MI300X against H100.",
        "MI300X", "H100", "bus bandwidth", "all-reduce 1 GB",
    ),
    _intent(
        "Is float16 GEMM on H100 better than on A100 in FLOP per second?",
        "H100", "A100", "FLOP per second", "GEMM float16",
    ),
    _intent(
        "What is the time to first token of Llama-2-70B on the H100, with no baseline?",
        "H100", "None", "time to first token", "Llama-2-70B inference",
    ),
    _intent(
        "How does a TPU v5p compare with a TPU v4 for ResNet-50 training in images per second?",
        "TPU v5p", "TPU v4", "images per second", "ResNet-50 training",
    ),
)  # fmt: skip


def samples() -> tuple[Intent, ...]:
    return _SAMPLES


def question(sample: Intent, answers: Sequence[str] = ()) -> str:
    if not answers:
        return (
            f"{sample.request}\nAnswer with JSON: "
            '{"Design": {"Target": …, "Baseline": …}, "Criterion": …, "Workload": …}.'
        )
    shown = "\n".join(f"[{index}] {json.dumps(record)}" for index, record in enumerate(sample.records))
    return f"Records that were found:\n{shown}\nName the indices of all that answer the question, or say None."


def gold(sample: Intent) -> tuple[str, str]:
    fields = sample.query
    design = {"Target": fields["target"], "Baseline": fields["baseline"]}
    query = {"Design": design, "Criterion": fields["criterion"], "Workload": fields["workload"]}
    return json.dumps(query), str(sorted(sample.chosen)) if sample.chosen else "None"


def score(sample: Intent, answers: Sequence[str]) -> dict[str, float]:
    given = parse_query(answers[0]) or {}
    right = {name: float(name in given and _plain(given[name]) == _plain(sample.query[name])) for name in FIELDS}
    chosen = parse_choice(answers[1]) if len(answers) > 1 else None
    named = frozenset() if chosen is None else chosen
    recall = len(named & sample.chosen) / len(sample.chosen) if sample.chosen else float(chosen == frozenset())
    return {
        **right,
        "dcw": float(all(right.values())),
        "bench recall": recall,
        "bench accuracy": float(chosen == sample.chosen),
    }


def parse_query(text: str) -> dict[str, Any] | None:
    """The fields that the first JSON object of that form in a text has; None where there is no such object."""
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            found, _ = json.JSONDecoder().raw_decode(text[start:])
        except (json.JSONDecodeError, RecursionError):
            continue
        design = found.get("Design")
        if isinstance(design, dict):
            both = {**found, **design}
            return {name: both[name.capitalize()] for name in FIELDS if name.capitalize() in both}
    return None


def parse_choice(text: str) -> frozenset[int] | None:
    """The indices of an answer, none of them for "None"; None where it says neither."""
    if re.fullmatch(r"\W*none\W*", text.strip(), re.IGNORECASE):
        return frozenset()
    listed = re.search(r"\[([\d,\s]*)\]", text)
    numbers = re.findall(r"\d+", listed.group(1) if listed else text)
    return frozenset(int(number) for number in numbers if len(number) < 6) if numbers else None


def _plain(value: Any) -> str | None:
    return " ".join(value.lower().split()) if isinstance(value, str) else ("none" if value is None else None)
