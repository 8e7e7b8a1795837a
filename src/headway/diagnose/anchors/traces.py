"""Where traces come from: files, or the model itself on a question."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from headway.errors import ArgumentError, HeadwayError
from headway.hosts import read_text
from headway.hosts.rows import check_policy, holds_rows, read_objects
from headway.methods.diagnosis.thought_anchors import LocalSampler, Prefix, Trace, read_trace
from headway.methods.diagnosis.thought_anchors.sentences import encode

#: What a model is asked where neither traces nor a question are given.
QUESTIONS = (
    "A shop sells pens for 3 dollars each and notebooks for 5 dollars each. Ann buys 4 pens and 2 notebooks and pays "
    "with a 50 dollar note. How much change does she get? Explain every step, then check your result.",
    "Should a small town build a new library or a new swimming pool? Think it through step by step, weigh both sides, "
    "and then decide.",
)
FIELDS = ("name", "prompt", "text", "sentences", "answer")
CHATS_WITHOUT_TEMPLATE = "Question: {question}\nLet me think step by step.\n"


def read_traces(
    path: str | Path, tokenizer: Any, *, bad_rows: str = "refuse", encoding: str = "utf-8"
) -> tuple[list[Trace], list[str]]:
    """Traces of a file, and what was left out. JSONL (by its name) holds one object a line: `text` (the reasoning), and
    where known `prompt`, `sentences` (strings, or character ranges of prompt + text), `answer` and `name`. Any other
    file is the reasoning itself.

    bad_rows: "refuse" raises HeadwayError with the line of the first row that cannot be used; "skip" lists them."""
    check_policy(bad_rows)
    given = read_text(path, encoding=encoding)
    if not holds_rows(path):
        return [read_trace(given.text, tokenizer, name=Path(path).name)], []
    read = partial(_row, tokenizer)
    return read_objects(given, path, read, fields=FIELDS, what="traces", bad_rows=bad_rows)


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


def _row(tokenizer: Any, row: dict[str, Any], name: str) -> Trace:
    if not isinstance(row.get("prompt") or "", str):
        raise ArgumentError(f"prompt: got {row['prompt']!r}, expected text.")
    return read_trace(
        row["text"],
        tokenizer,
        prompt=row.get("prompt") or "",
        sentences=row.get("sentences"),
        name=str(row.get("name") or name),
        answer=None if row.get("answer") is None else str(row["answer"]),
    )
