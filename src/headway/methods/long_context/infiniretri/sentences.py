"""Sentences of a text of any length as they stand in it, with their tokens and places, and chunks of whole sentences.

    Σ text of sentences = the text,  character by character;  each is at most `longest` tokens;  chunk ≤ `window` tokens

A sentence ends behind `. ? !` before white space, behind `。 ！ ？`, or behind a blank line; white space leads the next
one, so that its tokens are those of running text. Pieces of white space and marks join the sentence before them, and so
do pieces of up to GLUED characters behind a full stop (initials, "e. g."). What has no end is cut at white space, or
anywhere. Text may come in parts: only the sentence under way is held, and the sentences do not depend on the parts.

Text is tokenized sentence by sentence and never decoded, so that a tokenizer that does not give a text back exactly
does no harm. Tokens that are given are kept as they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from headway.errors import ArgumentError
from headway.tasks.samples import plain_ids

#: Ends of sentences: marks that need white space behind them, marks that need none, a blank line.
ENDS = re.compile(r"[.?!]+(?=\s)|[。！？]+|\n[^\S\n]*\n")
#: Characters up to which a piece behind a full stop belongs to the sentence before it.
GLUED = 10
#: A piece without an end is cut at this many characters per token that a sentence may have: long before it must be.
CHARACTERS_PER_TOKEN = 16
#: Tokens of a sentence where nothing tells sentences apart (tokens without a tokenizer).
RUN = 16
#: Bytes of a character in UTF-8: so many tokens may share one.
BYTES = 4

Tokenise = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Sentence:
    """One sentence of a source: its number, tokens and text, and where it stands there in characters [start, stop) and
    in tokens [first_token, first_token + len(ids)). A source of bare tokens has no text, and start = stop = 0."""

    index: int
    ids: tuple[int, ...]
    text: str
    start: int
    stop: int
    first_token: int

    @property
    def tokens(self) -> int:
        return len(self.ids)


def split_text(text: str | Iterable[str], longest: int = 0) -> Iterator[str]:
    """The sentences of a text or of its parts, in order. `longest` > 0 bounds their characters."""
    held = ""
    for piece in _raw_pieces([text] if isinstance(text, str) else text, longest):
        bare = piece.strip()
        words = any(character.isalnum() for character in bare)
        glued = not words or (held.rstrip().endswith(".") and len(bare) <= GLUED)
        if held and glued and not (longest and len(held) + len(piece) > longest):
            held += piece
            continue
        if held:
            yield held
        held = piece
    if held:
        yield held


def sentences_of_text(text: str | Iterable[str], tokenizer: Any, longest: int) -> Iterator[Sentence]:
    """The sentences of a text, each of at most `longest` tokens."""
    index = start = first = 0
    for whole in split_text(text, longest * CHARACTERS_PER_TOKEN):
        for part, ids in _bounded(whole, lambda piece: plain_ids(tokenizer, piece), longest):
            if ids:
                yield Sentence(
                    index=index, ids=tuple(ids), text=part, start=start, stop=start + len(part), first_token=first
                )
                index, first = index + 1, first + len(ids)
            start += len(part)


def sentences_of_ids(ids: Sequence[int], tokenizer: Any | None, longest: int) -> Iterator[Sentence]:
    """The sentences of given tokens. A token belongs to the sentence of its last character; without a tokenizer
    sentences are runs of RUN tokens."""
    if tokenizer is None:
        step = min(RUN, longest)
        cuts = list(range(step, len(ids), step))
        pieces = [""] * len(ids)
    else:
        pieces = token_texts(tokenizer, ids)
        cuts = _token_cuts(pieces)
    index = first = start = 0
    for stop in [*cuts, len(ids)]:
        while first < stop:
            parts = -(-(stop - first) // longest)
            until = first + -(-(stop - first) // parts)
            text = "".join(pieces[first:until])
            yield Sentence(
                index=index,
                ids=tuple(ids[first:until]),
                text=text,
                start=start,
                stop=start + len(text),
                first_token=first,
            )
            index, first, start = index + 1, until, start + len(text)


def pack(sentences: Iterable[Sentence], window: int) -> Iterator[list[Sentence]]:
    """Chunks of whole sentences in order, each as full as `window` tokens allow."""
    chunk: list[Sentence] = []
    size = 0
    for sentence in sentences:
        if sentence.tokens > window:
            raise ArgumentError(
                f"window: got {window} tokens for a sentence of {sentence.tokens}, expected at least as many. Split "
                "sentences with longest=window."
            )
        if chunk and size + sentence.tokens > window:
            yield chunk
            chunk, size = [], 0
        chunk.append(sentence)
        size += sentence.tokens
    if chunk:
        yield chunk


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token as it stands behind a word, with the white space that belongs to it. Where several tokens
    share a character, the first of them has it."""
    word = plain_ids(tokenizer, "a")[-1:]
    front = _decode(tokenizer, word)

    def behind(tokens: list[int]) -> str:
        text = _decode(tokenizer, [*word, *tokens])
        return text[len(front) :] if text.startswith(front) else _decode(tokenizer, tokens)

    known = {token: behind([token]) for token in dict.fromkeys(ids)}
    texts = [known[token] for token in ids]
    pending: list[int] = []
    for at, text in enumerate(texts):
        if "\ufffd" not in text:
            pending = []
            continue
        pending.append(at)
        joined = behind([ids[i] for i in pending])
        if "\ufffd" not in joined or len(pending) == BYTES:
            for place in pending:
                texts[place] = ""
            texts[pending[0]], pending = joined, []
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)


def _raw_pieces(parts: Iterable[str], longest: int) -> Iterator[str]:
    """Pieces that end at ENDS, or before `longest` characters. An end counts once the character behind it is known."""
    held, seen = "", 0
    for part in parts:
        held += part
        while (cut := _first_cut(held, longest, seen)) is not None:
            yield held[:cut]
            held, seen = held[cut:], 0
        seen = len(held)
    while held:
        found = ENDS.search(held)
        cut = found.end() if found else len(held)
        cut = _cut_of_long(held, longest) if longest and cut > longest else cut
        yield held[:cut]
        held = held[cut:]


def _first_cut(held: str, longest: int, seen: int) -> int | None:
    """Where the first piece ends for certain; None: not yet. Up to `seen` no end was found, so the search begins at
    the last mark before that."""
    found = ENDS.search(held, max(len(held[:seen].rstrip()) - 1, 0))
    cut = found.end() if found and found.end() < len(held) else None
    if longest and (cut is None or cut > longest):
        return _cut_of_long(held, longest) if len(held) > longest else None
    return cut


def _cut_of_long(held: str, longest: int) -> int:
    """The last white space in the second half of what may be taken, else all of it."""
    for cut in range(longest, longest // 2, -1):
        if held[cut].isspace() and not held[cut - 1].isspace():
            return cut
    return longest


def _bounded(text: str, tokenise: Tokenise, longest: int) -> Iterator[tuple[str, list[int]]]:
    """A sentence and its tokens, halved near its middle until every part is short enough."""
    ids = tokenise(text)
    if len(ids) <= longest:
        yield text, ids
        return
    if len(text) == 1:
        raise ArgumentError(
            f"window: got sentences of at most {longest} tokens where the character {text!r} takes {len(ids)}; "
            "expected room for one. Give a larger window or budget."
        )
    cut = _middle(text)
    yield from _bounded(text[:cut], tokenise, longest)
    yield from _bounded(text[cut:], tokenise, longest)


def _middle(text: str) -> int:
    """The cut nearest the middle: behind a comma or semicolon, before white space, or anywhere; never at an end."""
    half = len(text) // 2
    for pattern in (r"[,;:，；：、]+(?=\s|\w)", r"(?<=\S)(?=\s)"):
        cuts = [
            found.end() for found in re.finditer(pattern, text) if len(text) / 4 <= found.end() <= 3 * len(text) / 4
        ]
        if cuts:
            return min(cuts, key=lambda cut: (abs(cut - half), cut))
    return max(half, 1)


def _token_cuts(pieces: Sequence[str]) -> list[int]:
    """Where in a row of tokens a new sentence begins."""
    ends: list[int] = []
    total = 0
    for sentence in split_text("".join(pieces)):
        total += len(sentence)
        ends.append(total)
    cuts: list[int] = []
    at = length = 0
    for number, piece in enumerate(pieces):
        length += len(piece)
        while at < len(ends) and length > ends[at]:
            at += 1
            if number and (not cuts or cuts[-1] != number):
                cuts.append(number)
    return cuts
