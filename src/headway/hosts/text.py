"""Texts: where they come from, and how the first N tokens of one reach a model.

The default text needs no download: the documentation topics that every CPython carries for `help()`.
"""

from __future__ import annotations

import hashlib
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.errors import ArgumentError, HostError

# Tokens read beyond those asked for: cutting a text changes the tokens nearest the cut, and no others.
MARGIN = 64
# Characters per token to begin with; English with a vocabulary of about 50,000 has four to five.
CHARACTERS_PER_TOKEN = 6


@dataclass(frozen=True)
class Text:
    """A text, where it came from, and the SHA-256 of its UTF-8 bytes."""

    text: str
    source: str
    sha256: str

    @classmethod
    def of(cls, text: str, source: str) -> Text:
        """Raises ArgumentError for a text of nothing but white space, and for one that UTF-8 cannot hold."""
        if not text.strip():
            raise ArgumentError(f"text: {source} is empty; give a text with some words in it")
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ArgumentError(
                f"text: {source} holds half of a character pair (U+{ord(text[error.start]):04X} at character "
                f"{error.start:,}); save it as UTF-8"
            ) from error
        return cls(text, source, hashlib.sha256(data).hexdigest())


def default_text() -> Text:
    """The documentation topics of this Python, in the order of their names, as running text.

    About 450,000 characters. The words differ a little from one version of Python to the next: `source` names it."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise HostError(
            "text: this Python comes without its documentation topics (pydoc_data); give a text with: --text FILE"
        ) from error
    text = "\n\n".join(_as_prose(topics[name]) for name in sorted(topics))
    return Text.of(text, f"pydoc_data.topics of {platform.python_implementation()} {platform.python_version()}")


def _as_prose(topic: str) -> str:
    """Paragraphs on one line each, without the rulers under headings; indented blocks (code, lists) as they are."""
    blocks = []
    for block in re.split(r"\n\s*\n", topic.strip("\n")):
        lines = [line for line in block.split("\n") if not re.fullmatch(r"([*=~^\-\"])\1{2,}", line)]
        running = all(line[:1].strip() for line in lines)
        blocks.append((" " if running else "\n").join(lines))
    return "\n\n".join(blocks)


def read_text(path: str | Path, *, encoding: str = "utf-8") -> Text:
    """A text from a file, or from standard input for "-". A byte order mark at the start of UTF-8 is dropped.

    Raises HostError for a file that cannot be read or is not in `encoding` (naming the byte), ArgumentError for an
    empty text and an unknown encoding."""
    source = "standard input" if str(path) == "-" else str(path)
    data = _read_bytes(path, source)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise HostError(
            f"text: {source} is not {encoding}: byte 0x{error.object[error.start]:02x} at offset {error.start:,}; save "
            "it as UTF-8, or name its encoding, for example: --encoding latin-1"
        ) from error
    except UnicodeError as error:
        raise HostError(f"text: {source} cannot be read as {encoding} ({error}); save it as UTF-8") from error
    except (LookupError, ValueError) as error:
        raise ArgumentError(
            f"encoding: got {encoding!r}, expected a text encoding that Python knows, as utf-8, latin-1 or cp1252"
        ) from error
    return Text.of(text.removeprefix("\ufeff"), source)


def _read_bytes(path: str | Path, source: str) -> bytes:
    if str(path) == "-":
        return sys.stdin.buffer.read()
    try:
        return Path(path).expanduser().read_bytes()
    except FileNotFoundError as error:
        raise HostError(f"text: there is no file {source}; check the path, or give - for standard input") from error
    except IsADirectoryError as error:
        raise HostError(f"text: {source} is a folder, expected a file; give one of the files in it") from error
    except (OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HostError(f"text: {source!r} cannot be read ({reason}); check the path and its permissions") from error


def tokenize(
    tokenizer: Any,
    text: Text | str,
    tokens: int | None = None,
    *,
    positions: int | None = None,
    needed: int = 1,
    allow_longer: bool = False,
) -> Int[Tensor, "1 tokens"]:
    """The first `tokens` tokens of a text (all of them for None), as the model wants to see them.

    Special tokens are added only where the tokenizer itself adds them, and count: an encoder's closing token stays at
    the end. `positions` is what the model has room for (`positions_of`), `needed` the least that makes sense for the
    caller. A text with fewer than `tokens` tokens gives what it has. Of a long text only a prefix is tokenized.

    Raises ArgumentError for more tokens than positions unless `allow_longer`, and for a text that is too short."""
    given = text if isinstance(text, Text) else Text.of(text, "the given text")
    tokenizer = _text_tokenizer(tokenizer)
    check_counts(tokens, positions=positions, needed=needed, allow_longer=allow_longer)
    # One token more than the model has positions is enough to know that the text does not fit.
    limit = tokens if tokens is not None else None if allow_longer or positions is None else positions + 1
    ids = _first_tokens(tokenizer, given.text, limit)
    if tokens is None and limit is not None and len(ids) >= limit:
        raise ArgumentError(
            f"tokens: {given.source} has more tokens than the model has positions ({positions:,}); take the first of "
            f"them with --tokens {positions}, or pass allow_longer=True"
        )
    if len(ids) < needed:
        raise ArgumentError(
            f"text: {given.source} has {len(ids):,} tokens, expected at least {needed:,}; give a longer text"
        )
    return torch.tensor([ids], dtype=torch.long)


def starts_with_special(tokenizer: Any, ids: Int[Tensor, "1 tokens"]) -> bool:
    """Whether position 0 holds a special token (BOS, CLS …). Many tokenizers add none, and it is a word of the text."""
    return int(ids[0, 0]) in set(_text_tokenizer(tokenizer).all_special_ids)


def positions_of(model: Any) -> int | None:
    """How many tokens the text part of a model was built for; None where its positions have no limit of their own."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, module in model.named_modules():
        # RoBERTa and its kin count positions from the padding index on, which takes that many rows off the table.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return module.num_embeddings - module.padding_idx - 1
    return limit if isinstance(limit, int) and limit > 0 else None


def _text_tokenizer(tokenizer: Any) -> Any:
    found = tokenizer if hasattr(tokenizer, "all_special_ids") else getattr(tokenizer, "tokenizer", None)
    if not hasattr(found, "all_special_ids"):
        raise ArgumentError(
            f"tokenizer: got {type(tokenizer).__name__}, which does not read text; choose a text model, such as smollm2"
        )
    return found


def check_counts(
    tokens: int | None, *, positions: int | None = None, needed: int = 1, allow_longer: bool = False
) -> None:
    """Refuses numbers of tokens that no text could have; `positions` is None where the model is not known yet."""
    if tokens is None:
        return
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ArgumentError(f"tokens: got {tokens!r}, expected a whole number of at least 1")
    if tokens < needed:
        raise ArgumentError(f"tokens: got {tokens:,}, expected at least {needed:,} here; use --tokens {needed}")
    if positions is not None and tokens > positions and not allow_longer:
        raise ArgumentError(
            f"tokens: got {tokens:,}, but the model has {positions:,} positions; use --tokens {positions}, or pass "
            "allow_longer=True"
        )


def _first_tokens(tokenizer: Any, text: str, limit: int | None) -> list[int]:
    """At most `limit` token ids, the special tokens at the end kept."""
    reach = len(text) if limit is None else (limit + MARGIN) * CHARACTERS_PER_TOKEN
    while True:
        encoded = tokenizer(text[:reach], return_special_tokens_mask=True, verbose=False)
        ids = encoded["input_ids"]
        if limit is None or reach >= len(text) or len(ids) >= limit + MARGIN:
            break
        reach *= 2
    if all(encoded["special_tokens_mask"]):
        raise ArgumentError("text: the tokenizer finds no token in it; give a text with some words in it")
    if limit is None or len(ids) <= limit:
        return ids
    closing = _closing(encoded["special_tokens_mask"])
    if closing >= limit:
        raise ArgumentError(f"tokens: got {limit}, expected at least {closing + 1} with this tokenizer")
    return ids[: limit - closing] + ids[len(ids) - closing :]


def _closing(special: list[int]) -> int:
    """How many special tokens the tokenizer put after the text."""
    return next((count for count, mark in enumerate(reversed(special)) if not mark), 0)
