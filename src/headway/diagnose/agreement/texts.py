"""Texts to explain: files of the user's, or reviews whose deciding words are known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError
from headway.hosts import read_text
from headway.hosts.rows import check_policy, holds_rows, read_objects
from headway.tasks.planted_reviews import LABELS, make_reviews

FIELDS = ("name", "text", "label", "rationale")
#: Reviews that are made where no texts are given.
REVIEWS = 200
#: What a language model is asked to go on with where no texts are given.
PROMPTS = (
    "The capital of France is",
    "Water freezes when the temperature falls below zero degrees",
    "She opened the old wooden door with a small brass",
    "In the morning the farmer went out to milk the",
    "The opposite of hot is cold, and the opposite of up is",
    "Monday, Tuesday, Wednesday, Thursday,",
    "He was so tired after the long walk that he went straight to",
    "The librarian put the books back on the",
    "Two plus two equals four, and three plus three equals",
    "The chef cut the onions with a sharp",
    "When the rain stopped, a bright rainbow appeared in the",
    "The pilot told the passengers that the plane would soon",
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One text; its label as it was given, and the [start, end) characters that decide it, where they are known."""

    text: str
    name: str
    label: str | None = None
    rationale: tuple[tuple[int, int], ...] | None = None


def default_rows(seed: int) -> list[Row]:
    """Labelled reviews with their rationales."""
    return [
        Row(text=r.text, name=f"review {i + 1}", label=LABELS[r.label], rationale=r.rationale)
        for i, r in enumerate(make_reviews(REVIEWS, np.random.default_rng(seed)))
    ]


def prompts() -> list[Row]:
    """Beginnings of sentences, for models of the next token."""
    return [Row(text=text, name=f"prompt {i + 1}") for i, text in enumerate(PROMPTS)]


def read_rows(path: str | Path, *, bad_rows: str = "refuse", encoding: str = "utf-8") -> tuple[list[Row], list[str]]:
    """Texts of a file, and what was left out. JSONL (by its name) holds one object a line: `text`, and where known
    `label`, `name` and `rationale` (strings in the order of the text, or [start, end) characters). Any other file has
    one text a line.

    bad_rows: "refuse" raises HeadwayError with the line of the first row that cannot be used; "skip" lists them."""
    check_policy(bad_rows)
    given = read_text(path, encoding=encoding)
    if holds_rows(path):
        return read_objects(given, path, _row, fields=FIELDS, what="texts", bad_rows=bad_rows)
    lines = enumerate(given.text.split("\n"), 1)
    return [Row(text=line.strip(), name=f"line {number}") for number, line in lines if line.strip()], []


def _row(row: dict[str, Any], name: str) -> Row:
    label = row.get("label")
    if label is not None and (isinstance(label, bool) or not isinstance(label, str | int)):
        raise ArgumentError(f"label: got {label!r}, expected a word or a whole number.")
    return Row(
        text=row["text"],
        name=str(row.get("name") or name),
        label=None if label is None else str(label),
        rationale=_spans(row.get("rationale"), row["text"]),
    )


def _spans(given: object, text: str) -> tuple[tuple[int, int], ...] | None:
    if given is None:
        return None
    if not isinstance(given, list) or not given:
        raise ArgumentError(f"rationale: got {given!r}, expected a list of words or of [start, end) characters.")
    spans, reached = [], 0
    for one in given:
        if isinstance(one, str) and one:
            start = text.find(one, reached)
            if start < 0:
                raise ArgumentError(f"rationale: got {one!r}, which is not in the text behind the one before it.")
            spans.append((start, start + len(one)))
            reached = start + len(one)
        elif isinstance(one, list) and len(one) == 2 and all(type(end) is int for end in one):
            if not 0 <= one[0] < one[1] <= len(text):
                raise ArgumentError(f"rationale: got {one}, expected 0 ≤ start < end ≤ {len(text)} characters.")
            spans.append((one[0], one[1]))
        else:
            raise ArgumentError(f"rationale: got {one!r}, expected a word of the text or [start, end) characters.")
    return tuple(spans)
