"""Retrieval probes: one sentence to be found by a random key among many, and to be copied word for word.

    instruction   {"key": "sentence", …}   question, answer ×3   question, answer: "

Keys are random letters and digits, values sentences of a text. As many pairs are taken as a budget of tokens holds. The
answer is given to the model, so row p − 1 predicts the answer's token at p. It stands in quotes, as in the object, so
that tokenizers write it alike in both places; tokens that reach over a quote (a full stop with the quote behind it)
belong to neither. The places come from the offsets of the tokenizer.

After AttentionInfluence, arXiv 2505.07293 (800 samples of up to 4,096 tokens, keys of 32 characters, values of at most
30 tokens, three demonstrations), and Wu et al., arXiv 2404.15574. The paper's answers have no quotes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headway.errors import ArgumentError, HostError
from headway.files import write_atomically
from headway.tasks.copying import CopySample
from headway.tasks.samples import opening_ids, plain_ids
from headway.tasks.sentences import split_sentences

ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"
KEY_LENGTH = 32
DEMONSTRATIONS = 3
#: Shortest and longest sentence, in tokens: one of a few tokens is soon said without looking.
SENTENCE_TOKENS = (6, 30)
#: Draws of a probe before the tokenizer is held to write no sentence alike in both places.
ATTEMPTS = 20
INSTRUCTION = "Look up the key in the object and write its value word for word, and nothing else."


@dataclass(frozen=True, kw_only=True)
class RetrievalProbe(CopySample):
    """A copy sample whose value is a sentence.

    `object` is the JSON part of `text`, `asked` the key in question, `value` its sentence, `shown` the keys of the
    demonstrations."""

    object: str
    asked: str
    value: str
    shown: tuple[str, ...]


def probe_sentences(
    text: str, tokenizer: Any, *, least: int = SENTENCE_TOKENS[0], most: int = SENTENCE_TOKENS[1]
) -> list[str]:
    """The different sentences of a text, in order, of `least` to `most` tokens, on one line, that JSON writes as they
    are."""
    found: dict[str, None] = {}
    for start, stop in split_sentences(text):
        sentence = " ".join(text[start:stop].split())
        if "\n\n" in text[start:stop].strip() or json.dumps(sentence, ensure_ascii=False)[1:-1] != sentence:
            continue
        if least <= len(plain_ids(tokenizer, sentence)) <= most:
            found[sentence] = None
    return list(found)


def retrieval_probe(
    tokenizer: Any,
    sentences: Sequence[str],
    *,
    tokens: int,
    seed: int = 0,
    number: int = 0,
    key_length: int = KEY_LENGTH,
    demonstrations: int = DEMONSTRATIONS,
) -> RetrievalProbe:
    """The probe with the most pairs whose prompt and answer take at most `tokens` tokens. Each `number` of a `seed` is
    a probe of its own, and always the same one.

    Raises ArgumentError when the smallest probe does not fit or there are too few sentences, HostError when the
    tokenizer writes no sentence alike in both places."""
    least = demonstrations + 1
    if demonstrations < 0 or key_length < 4:
        raise ArgumentError(
            f"demonstrations, key_length: got {demonstrations}, {key_length}; expected at least 0 and at least 4."
        )
    if len(sentences) < least:
        raise ArgumentError(
            f"sentences: got {len(sentences)}, expected at least {least}: one for each demonstration and one for the "
            "question. Pass a longer text."
        )
    for attempt in range(ATTEMPTS):
        random = np.random.default_rng([seed, number, attempt])
        draw = _Draw(tokenizer, sentences, random, key_length, demonstrations)
        pairs = _most_pairs(draw, tokens, least)
        probe = draw.encode(pairs)
        if probe is not None:
            return probe
    raise HostError(
        f"tokenizer: got other tokens for a sentence in the object than in the answer in {ATTEMPTS} draws, expected "
        "the same. Retrieval heads cannot be found with this tokenizer."
    )


def retrieval_probes(
    tokenizer: Any, sentences: Sequence[str], *, count: int, tokens: int, seed: int = 0, **options: Any
) -> list[RetrievalProbe]:
    """The probes 0 … `count` − 1 of a seed; `options` are those of `retrieval_probe`."""
    if count < 1:
        raise ArgumentError(f"count: got {count}, expected at least 1.")
    return [retrieval_probe(tokenizer, sentences, tokens=tokens, seed=seed, number=i, **options) for i in range(count)]


def write_probes(path: str | Path, probes: Iterable[RetrievalProbe]) -> Path:
    """Writes one JSON object per line: text, key, answer, the keys shown and the ids. The same probes give the same
    bytes."""
    rows = [
        {
            "text": probe.text,
            "asked": probe.asked,
            "value": probe.value,
            "shown": list(probe.shown),
            "ids": probe.ids[0].tolist(),
            "answer_rows": probe.answer_rows.tolist(),
            "value_span": list(probe.value_span),
        }
        for probe in probes
    ]
    return write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


class _Draw:
    """The keys, sentences and questions of one probe, of which the first `pairs` are used."""

    def __init__(
        self, tokenizer: Any, sentences: Sequence[str], random: np.random.Generator, key_length: int, shown: int
    ) -> None:
        self.tokenizer = tokenizer
        self.values = [sentences[i] for i in random.permutation(len(sentences))]
        self.random_keys = random.integers(len(ALPHABET), size=(len(sentences), key_length))
        self.turn = random.random(len(sentences))
        self.demonstrations = shown

    def pieces(self, pairs: int) -> tuple[str, str, str, tuple[str, ...], str, str]:
        """(before the value, value, between value and answer, keys shown, the key asked for, the object)."""
        keys = ["".join(ALPHABET[i] for i in row) for row in self.random_keys[:pairs]]
        order = np.argsort(self.turn[:pairs])[: self.demonstrations + 1].tolist()
        *shown, asked = order
        lines = [f'"{key}": "{value}"' for key, value in zip(keys, self.values, strict=False)]
        head = "".join(line + ",\n" for line in lines[:asked]) + f'"{keys[asked]}": "'
        rest = '"' + "".join(",\n" + line for line in lines[asked + 1 :]) + "}"
        shots = "".join(f'Key: {keys[i]}\nAnswer: "{self.values[i]}"\n\n' for i in shown)
        before = f"{INSTRUCTION}\n\n{{{head}"
        between = f'{rest}\n\n{shots}Key: {keys[asked]}\nAnswer: "'
        value = self.values[asked]
        return before, value, between, tuple(keys[i] for i in shown), keys[asked], "{" + head + value + rest

    def length(self, pairs: int) -> int:
        """Tokens of the whole probe, the closing quote included."""
        before, value, between, *_ = self.pieces(pairs)
        return len(opening_ids(self.tokenizer)) + len(plain_ids(self.tokenizer, before + value + between + value + '"'))

    def encode(self, pairs: int) -> RetrievalProbe | None:
        """The probe, or None where value and answer are written differently or the object holds the value twice."""
        before, value, between, shown, asked, whole = self.pieces(pairs)
        if whole.count(value) != 1 or len({*shown, asked}) != len(shown) + 1 or whole.count(asked) != 1:
            return None
        text = before + value + between + value + '"'
        starts = len(before), len(before) + len(value) + len(between)
        ids, (first, last) = _located(self.tokenizer, text, [(start, start + len(value)) for start in starts])
        if first[0] >= first[1] or ids[slice(*first)] != ids[slice(*last)]:
            return None
        return RetrievalProbe(
            text=text[:-1],
            ids=torch.tensor([ids[: last[1]]]),
            answer=torch.tensor(ids[slice(*last)]),
            answer_rows=torch.arange(last[0], last[1]) - 1,
            value_span=first,
            object=whole,
            asked=asked,
            value=value,
            shown=shown,
        )


def _most_pairs(draw: _Draw, tokens: int, least: int) -> int:
    """The largest number of pairs whose probe takes at most `tokens` tokens."""
    smallest = draw.length(least)
    if smallest > tokens:
        raise ArgumentError(
            f"tokens: got {tokens:,}, expected at least {smallest:,}, which the smallest probe of {least} pairs takes. "
            "Ask for more tokens or shorter keys."
        )
    low, high = least, len(draw.values) + 1
    step = max((tokens - smallest) // 64, 1)
    while low + step < high:
        if draw.length(low + step) > tokens:
            high = low + step
            break
        low += step
    while high - low > 1:
        middle = (low + high) // 2
        if draw.length(middle) <= tokens:
            low = middle
        else:
            high = middle
    return low


def _located(tokenizer: Any, text: str, places: Sequence[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """The ids of a text, and the token range that lies wholly inside each range of characters.

    A tokenizer without offsets encodes the text piece by piece."""
    opening = opening_ids(tokenizer)
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = encoding["offset_mapping"]
        return [*opening, *encoding["input_ids"]], [_inside(offsets, *place, len(opening)) for place in places]
    ids, spans, done = list(opening), [], 0
    for start, stop in places:
        ids += plain_ids(tokenizer, text[done:start])
        inner = plain_ids(tokenizer, text[start:stop])
        spans.append((len(ids), len(ids) + len(inner)))
        ids, done = ids + inner, stop
    return ids + plain_ids(tokenizer, text[done:]), spans


def _inside(offsets: Sequence[tuple[int, int]], start: int, stop: int, shift: int) -> tuple[int, int]:
    inside = [i for i, (a, b) in enumerate(offsets) if start <= a < b <= stop]
    return (inside[0] + shift, inside[-1] + 1 + shift) if inside else (0, 0)
