"""Copy tasks with a known answer: what a head must read is known token by token.

Repeated random tokens: a row r of random ids, once more right after it, r r … . From the second r on, a model that
finds the last earlier place of its present token knows the next one (Olsson et al., In-context Learning and Induction
Heads, arXiv 2209.11895).

Key-value copy: a JSON object of random keys and values, a few answered questions, and one open question. The answer
a_1 … a_m stands in the object exactly once, in the value span V. The answer is given to the model (teacher-forced), so
that token a_i at position p_i is predicted by row p_i − 1. After Wu et al., arXiv 2404.15574, and AttentionInfluence,
arXiv 2505.07293; those use sentences as values and fill 4,096 tokens, here values are short, for small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.errors import ArgumentError, HostError

#: Without l, o, 0 and 1, which are easily taken for one another.
ALPHABET = "abcdefghijkmnpqrstuvwxyz23456789"
KEY_LENGTH = 4
VALUE_LENGTH = 6
#: Draws of a value before the tokenizer is held to write no value the same way in both places.
ATTEMPTS = 20
INSTRUCTION = "Read the records and give the value of each key that is asked for."


@dataclass(frozen=True, kw_only=True)
class CopySample:
    """One key-value question with its answer. `ids` ends with the answer; `answer_rows[i]` is the row that predicts
    `answer[i]`; `value_span` is the [start, stop) token range of the value in the object."""

    text: str
    ids: Int[Tensor, "1 tokens"]
    answer: Int[Tensor, " answer"]
    answer_rows: Int[Tensor, " answer"]
    value_span: tuple[int, int]


def repeated_random_tokens(
    vocabulary: Sequence[int] | Int[Tensor, " size"],
    length: int,
    repeats: int,
    generator: torch.Generator,
    *,
    prefix: Sequence[int] = (),
) -> Int[Tensor, "1 tokens"]:
    """`prefix`, then `length` different random ids of `vocabulary`, `repeats` times over: prefix r r … .

    Ids within r are drawn without replacement, so every token of a later copy has one earlier place per copy. Raises
    ArgumentError when the vocabulary is too small for that."""
    pool = torch.unique(torch.as_tensor(vocabulary, dtype=torch.long))
    if length < 2 or repeats < 2:
        raise ArgumentError(f"length, repeats: got {length}, {repeats}; expected both to be at least 2.")
    if pool.numel() < length:
        raise ArgumentError(
            f"vocabulary: got {pool.numel()} different ids, expected at least length = {length}. Ask for shorter rows "
            "or pass more ids."
        )
    row = pool[torch.randperm(pool.numel(), generator=generator)[:length]]
    return torch.cat([torch.tensor(list(prefix), dtype=torch.long), row.repeat(repeats)])[None]


def ordinary_ids(tokenizer: Any) -> Int[Tensor, " size"]:
    """The ids of a tokenizer that are neither special nor added: material for random sequences."""
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    return torch.tensor([i for i in range(len(tokenizer)) if i not in special], dtype=torch.long)


def key_value_copy(
    tokenizer: Any, records: int = 10, generator: torch.Generator | None = None, *, demonstrations: int = 2
) -> CopySample:
    """One sample: `records` pairs of keys and values, `demonstrations` answered questions, one question, its answer.

    The keys of demonstrations and question differ. Spans come from the offsets of the tokenizer; one without offsets
    encodes the text piece by piece. Raises HostError when the tokenizer writes the value differently in the object and
    in the answer, so that no key could hold the answer's tokens."""
    if demonstrations < 0 or records < demonstrations + 1:
        raise ArgumentError(
            f"records: got {records} for {demonstrations} demonstrations and a question, expected at least "
            f"{max(demonstrations, 0) + 1}. Ask for more records."
        )
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    for _ in range(ATTEMPTS):
        pieces = _draw_pieces(records, demonstrations, generator)
        sample = _encode(tokenizer, pieces)
        if sample is not None:
            return sample
    raise HostError(
        f"tokenizer: got other tokens for a value in the records than in the answer in {ATTEMPTS} draws, expected the "
        "same. The retrieval score cannot be measured with this tokenizer; leave it out."
    )


def _draw_pieces(records: int, demonstrations: int, generator: torch.Generator) -> tuple[str, str, str, str]:
    """The text as (before the value, value, between value and answer, after the answer)."""
    words: dict[str, None] = {}
    while len(words) < 2 * records:
        words[_word(KEY_LENGTH if len(words) < records else VALUE_LENGTH, generator)] = None
    keys, values = list(words)[:records], list(words)[records:]
    asked = torch.randperm(records, generator=generator)[: demonstrations + 1].tolist()
    target = asked[-1]
    lines = [f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True)]
    before = f"{INSTRUCTION}\n\n{{{''.join(line + ', ' for line in lines[:target])}" + f'"{keys[target]}": "'
    rest = "".join(f", {line}" for line in lines[target + 1 :])
    shots = "".join(f'The value of "{keys[i]}" is "{values[i]}".\n' for i in asked[:-1])
    between = f'"{rest}}}\n\n{shots}The value of "{keys[target]}" is "'
    return before, values[target], between, '".'


def _word(length: int, generator: torch.Generator) -> str:
    return "".join(ALPHABET[i] for i in torch.randint(len(ALPHABET), (length,), generator=generator).tolist())


def _encode(tokenizer: Any, pieces: tuple[str, str, str, str]) -> CopySample | None:
    """The sample of a text, or None when value and answer are written with different tokens."""
    before, value, between, after = pieces
    text = before + value + between + value + after
    if getattr(tokenizer, "is_fast", False):
        encoding = tokenizer(text, return_offsets_mapping=True)
        ids, offsets = list(encoding["input_ids"]), encoding["offset_mapping"]
        first = _overlapping(offsets, len(before), len(before) + len(value))
        start = len(before) + len(value) + len(between)
        last = _overlapping(offsets, start, start + len(value))
    else:
        parts = [tokenizer(p, add_special_tokens=False)["input_ids"] for p in (before, value, between, value)]
        opening = _opening_ids(tokenizer)
        ids = [*opening, *(i for part in parts for i in part)]
        first = (len(opening) + len(parts[0]), len(opening) + len(parts[0]) + len(parts[1]))
        last = (len(ids) - len(parts[3]), len(ids))
    if ids[slice(*first)] != ids[slice(*last)]:
        return None
    return CopySample(
        text=text[: len(text) - len(after)],
        ids=torch.tensor([ids[: last[1]]]),
        answer=torch.tensor(ids[slice(*last)]),
        answer_rows=torch.arange(last[0], last[1]) - 1,
        value_span=first,
    )


def _overlapping(offsets: Sequence[tuple[int, int]], start: int, stop: int) -> tuple[int, int]:
    """The token range whose characters touch [start, stop); a token that reaches beyond a border counts."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < stop and b > start]
    return inside[0], inside[-1] + 1


def _opening_ids(tokenizer: Any) -> list[int]:
    """The special ids a tokenizer puts in front of a text."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    return list(full[: full.index(plain[0])]) if plain and plain[0] in full else []
