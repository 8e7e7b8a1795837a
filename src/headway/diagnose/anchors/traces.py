"""Where traces come from: files, or the model itself on a question."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from torch import nn

from headway.errors import ArgumentError, HeadwayError, unknown
from headway.hosts import read_text
from headway.methods.diagnosis.thought_anchors import LocalSampler, Prefix, Trace, read_trace
from headway.methods.diagnosis.thought_anchors.sentences import encode

log = logging.getLogger(__name__)
#: What a model is asked where neither traces nor a question are given.
QUESTIONS = (
    "A shop sells pens for 3 dollars each and notebooks for 5 dollars each. Ann buys 4 pens and 2 notebooks and pays "
    "with a 50 dollar note. How much change does she get? Explain every step, then check your result.",
    "Should a small town build a new library or a new swimming pool? Think it through step by step, weigh both sides, "
    "and then decide.",
)
FIELDS = ("name", "prompt", "text", "sentences", "answer")
POLICIES = ("refuse", "skip")
CHATS_WITHOUT_TEMPLATE = "Question: {question}\nLet me think step by step.\n"


def read_traces(
    path: str | Path, tokenizer: Any, *, bad_rows: str = "refuse", encoding: str = "utf-8"
) -> tuple[list[Trace], list[str]]:
    """Traces of a file, and what was left out. JSONL (by its name) holds one object a line: `text` (the reasoning), and
    where known `prompt`, `sentences` (strings, or character ranges of prompt + text), `answer` and `name`. Any other
    file is the reasoning itself.

    bad_rows: "refuse" raises HeadwayError with the line of the first row that cannot be used; "skip" lists them."""
    if bad_rows not in POLICIES:
        raise unknown("bad_rows", bad_rows, POLICIES)
    given = read_text(path, encoding=encoding)
    if Path(path).suffix not in (".jsonl", ".ndjson"):
        return [read_trace(given.text, tokenizer, name=Path(path).name)], []
    found, left_out = [], []
    for number, line in enumerate(given.text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_row(line, tokenizer, f"line {number}"))
        except ArgumentError as error:
            if bad_rows == "refuse":
                raise HeadwayError(
                    f"{path}, line {number}: {error} Mend it, or leave such rows out with --bad-rows skip."
                ) from None
            left_out.append(f"line {number}: {error}")
    for what in left_out:
        log.warning("%s, %s", path, what)
    if not found:
        raise ArgumentError(f"traces: got {path} without a usable row, expected one JSON object with a text a line.")
    return found, left_out


def think(model: nn.Module, tokenizer: Any, question: str, *, name: str, tokens: int, seed: int = 0) -> Trace:
    """The model's own reasoning on a question, sampled as in the paper, as a trace."""
    prompt = chat(tokenizer, question)
    ids, _ = encode(tokenizer, prompt, add_special_tokens=not _templated(tokenizer))
    text = LocalSampler(model, tokenizer, max_tokens=tokens)(Prefix(tuple(ids), prompt), [seed])[0]
    if not text.strip():
        raise HeadwayError(f"question: the model said nothing on {question[:60]!r}; ask another, or give --traces.")
    return read_trace(text, tokenizer, prompt=prompt, name=name, add_special_tokens=not _templated(tokenizer))


def chat(tokenizer: Any, question: str) -> str:
    """The question as the model's own chat has it, or plainly where it has none."""
    if not _templated(tokenizer):
        return CHATS_WITHOUT_TEMPLATE.format(question=question)
    turn = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False))


def _templated(tokenizer: Any) -> bool:
    return bool(getattr(tokenizer, "chat_template", None))


def _row(line: str, tokenizer: Any, name: str) -> Trace:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"got {line[:40]!r}, which is no JSON ({error}).") from None
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ArgumentError(f"got {line[:40]!r}, expected an object with a 'text'.")
    strange = sorted(set(row) - set(FIELDS))
    if strange:
        raise unknown("field", strange[0], FIELDS)
    return read_trace(
        row["text"],
        tokenizer,
        prompt=str(row.get("prompt") or ""),
        sentences=row.get("sentences"),
        name=str(row.get("name") or name),
        answer=None if row.get("answer") is None else str(row["answer"]),
    )
