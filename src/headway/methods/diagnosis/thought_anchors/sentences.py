"""A chain of thought as sentences, by characters and by tokens.

The reasoning is what stands between `<think>` and `</think>`, or everything where there are no marks. Sentences join to
the reasoning exactly; an unterminated last one is kept (the released splitter drops it). Tokens come from the
tokenizer's own offsets of the whole text, in one pass: tokenizing each prefix again, as the released code does, can
place a border one token off. Prefixes are cut by position, never by replacing text, so a sentence that occurs twice
("Wait.") is cut where it stands.
"""

from __future__ import annotations

import hashlib
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.tasks.sentences import piece_offsets, split_sentences

Span = tuple[int, int]
OPENING, CLOSING = "<think>", "</think>"
#: Letters of a text that an error shows.
SHOWN = 60
#: How much of a sentence must agree before an error names a place as its nearest.
NEAREST_CHARACTERS = 400


@dataclass(frozen=True)
class Prefix:
    """What comes before a sentence: token ids, and the same as text for engines that take text."""

    ids: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class Trace:
    """A prompt and the sentences of a reasoning.

    `text` is prompt and reasoning together; `characters` and `tokens` are the [start, stop) ranges of the sentences in
    it and in `ids`; `starts` the first character of every token. `name` tells traces apart in tables."""

    text: str
    ids: tuple[int, ...]
    starts: tuple[int, ...]
    characters: tuple[Span, ...]
    tokens: tuple[Span, ...]
    name: str = "trace"
    answer: str | None = None

    def __len__(self) -> int:
        return len(self.characters)

    @cached_property
    def sentences(self) -> list[str]:
        """The sentences as they stand in the text, with the white space behind them."""
        return [self.text[start:stop] for start, stop in self.characters]

    @property
    def input_ids(self) -> Int[Tensor, "1 tokens"]:
        return torch.tensor([self.ids], dtype=torch.long)

    def prefix(self, sentence: int) -> Prefix:
        """Everything before sentence `sentence`; `len(trace)` gives the prefix with all sentences."""
        if not 0 <= sentence <= len(self):
            raise ArgumentError(f"sentence: got {sentence}, expected 0 to {len(self)} for {len(self)} sentences.")
        cut = self.tokens[sentence][0] if sentence < len(self) else self.tokens[-1][1]
        return Prefix(self.ids[:cut], self.text[: self.starts[cut]] if cut < len(self.ids) else self.text)

    def fingerprint(self) -> str:
        """A hash of the tokens and of where the sentences are: what stored rollouts belong to."""
        return hashlib.sha256(repr((self.ids, self.tokens, self.text)).encode("utf-8", "replace")).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """The exchange format: prompt, reasoning, what follows it, and the sentences as character ranges."""
        return {"name": self.name, "text": self.text, "sentences": [list(s) for s in self.characters]} | (
            {} if self.answer is None else {"answer": self.answer}
        )


def read_trace(
    text: str,
    tokenizer: Any,
    *,
    prompt: str = "",
    sentences: Sequence[str] | Sequence[Span] | None = None,
    name: str = "trace",
    answer: str | None = None,
    add_special_tokens: bool = True,
) -> Trace:
    """The trace of `prompt` + `text`. Sentences are split, or given as strings in their order, or as character ranges
    of `prompt` + `text`. `answer` is the right final answer, where it is known.

    Raises ArgumentError for a text without sentences, for a given sentence that is not in the text (naming the nearest
    place), for ranges that overlap or run backwards, and for sentences that are neither."""
    whole = prompt + text
    if sentences is None:
        start, stop = reasoning_range(text)
        spans = [(len(prompt) + start + a, len(prompt) + start + b) for a, b in split_sentences(text[start:stop])]
    else:
        spans = _given(sentences, whole, len(prompt))
    ids, offsets = encode(tokenizer, whole, add_special_tokens=add_special_tokens)
    kept = [(s, t) for s, t in zip(spans, token_ranges(spans, offsets), strict=True) if t[0] < t[1]]
    if not kept or not text.strip():
        raise ArgumentError(f"text: got {_cut(text)!r}, expected reasoning with at least one sentence.")
    return Trace(
        text=whole,
        ids=tuple(ids),
        starts=tuple(start for start, _ in offsets),
        characters=tuple(s for s, _ in kept),
        tokens=tuple(t for _, t in kept),
        name=name,
        answer=answer,
    )


def _given(sentences: Any, whole: str, start: int) -> list[Span]:
    """Character ranges of sentences that a caller, or a line of a file, names."""
    listed = isinstance(sentences, list | tuple) and len(sentences) > 0
    if listed and all(isinstance(one, str) for one in sentences):
        return locate(whole, sentences, start=start)
    if listed and all(isinstance(one, list | tuple) and all(type(end) is int for end in one) for one in sentences):
        return check_ranges(sentences, len(whole))
    raise ArgumentError(
        f"sentences: got {_cut(repr(sentences))}, expected a list of strings, or one of [start, stop) characters. "
        "Leave them out to have the text split."
    )


def reasoning_range(text: str) -> Span:
    """The characters between the first `<think>` and the `</think>` behind it. A missing mark is the end of the text
    on its side; text without marks is all reasoning."""
    opening = text.find(OPENING)
    start = opening + len(OPENING) if opening >= 0 else 0
    closing = text.find(CLOSING, start)
    return start, closing if closing >= 0 else len(text)


def encode(tokenizer: Any, text: str, *, add_special_tokens: bool = True) -> tuple[list[int], list[Span]]:
    """Token ids and the (start, stop) characters of each. Tokenizers without offsets are asked for the text of each
    token; ArgumentError where those do not join to the text."""
    if getattr(tokenizer, "is_fast", False):
        found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=add_special_tokens, verbose=False)
        return list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    joined, offsets = piece_offsets([tokenizer.decode([i]) for i in ids])
    if joined != text:
        raise ArgumentError(
            f"tokenizer: got {type(tokenizer).__name__}, whose tokens join to {_cut(joined)!r} and not to the text, "
            "expected offsets or exact pieces. Load the fast tokenizer of this model."
        )
    return ids, offsets


def token_ranges(spans: Sequence[Span], offsets: Sequence[Span]) -> list[Span]:
    """The [start, stop) tokens of each character range. A token belongs to the range of its last character; a range
    that owns no token is empty. Special tokens (no characters) belong to none."""
    places = [(i, stop - 1) for i, (start, stop) in enumerate(offsets) if stop > start]
    last = [character for _, character in places]
    if last != sorted(last):
        raise ArgumentError(
            "offsets: got character ranges that run backwards, expected those of one text in order. Pass the "
            "offset_mapping of the tokenizer for this very text."
        )
    found = []
    for start, stop in spans:
        first, after = bisect_left(last, start), bisect_left(last, stop)
        found.append((places[first][0], places[after - 1][0] + 1) if first < after else (0, 0))
    return found


def check_ranges(spans: Sequence[Sequence[int]], length: int) -> list[Span]:
    """The ranges as pairs. Raises ArgumentError unless they run forward, apart, and inside the text."""
    before = 0
    for span in spans:
        if len(span) != 2 or not before <= span[0] < span[1] <= length:
            raise ArgumentError(
                f"sentences: got the range {list(span)} behind {before}, expected [start, stop) ranges in order, "
                f"apart from each other and inside the {length} characters of the text."
            )
        before = span[1]
    return [(int(a), int(b)) for a, b in spans]


def locate(text: str, sentences: Sequence[str], *, start: int = 0) -> list[Span]:
    """Character ranges of given sentences, each sought behind the one before it, so that repeated ones are told apart.

    Raises ArgumentError for a sentence that is not there, with the nearest match (a different kind of space, say)."""
    spans: list[Span] = []
    at = start
    for number, sentence in enumerate(sentences):
        wanted = sentence.strip()
        found = text.find(wanted, at) if wanted else -1
        if found < 0:
            raise ArgumentError(_not_found(text, wanted, number, at))
        stop = found + len(wanted)
        trailing = re.match(r"\s*", text[stop:])
        at = stop + (trailing.end() if trailing else 0)
        spans.append((found, at))
    return spans


def _not_found(text: str, wanted: str, number: int, at: int) -> str:
    message = f"sentences: got sentence {number}, {_cut(wanted)!r}, which is not in the text behind character {at}"
    if not wanted:
        return f"sentences: got an empty sentence {number}, expected some words. Leave it out."
    flat = " ".join(wanted.split())
    loose = re.search(r"\s+".join(map(re.escape, flat.split(" "))), text[at:])
    if loose:
        near, why = loose.group(), " (its white space differs)"
    else:
        rest = text[at : at + 20 * NEAREST_CHARACTERS]
        match = SequenceMatcher(None, rest, wanted[:NEAREST_CHARACTERS], autojunk=False).find_longest_match()
        begin = max(match.a - match.b, 0)
        near, why = rest[begin : begin + len(wanted)], ""
    return (
        f"{message}, expected it as it stands there. The nearest is {_cut(near)!r}{why}. Give the sentences in order."
    )


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
