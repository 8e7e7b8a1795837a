"""Tokenizers for training: bytes, which need no download, or that of a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError, HostError

BYTES = "bytes"
#: Ends a document; the id behind the 256 bytes.
END = "<|end|>"
#: Longest piece of text given to a tokenizer at once, in characters.
PIECE = 1_000_000


def byte_tokenizer() -> Any:
    """A transformers tokenizer whose ids are the bytes of UTF-8, with 256 as the end of a document. It saves and loads
    as every other one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())} | {END: 256}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=END, pad_token=END, clean_up_tokenization_spaces=False
    )


def load_tokenizer(name: str | os.PathLike[str]) -> Any:
    """The tokenizer "bytes", of a local folder or hub id, or of an embedded model such as "smollm2"."""
    name = os.fspath(name)
    if name == BYTES:
        return byte_tokenizer()
    from headway.hosts import load
    from headway.hosts.registry import embedded_hosts

    if name in embedded_hosts():
        found = load(name)[1]
    else:
        from transformers import AutoTokenizer

        local = Path(name).expanduser()
        try:
            found = AutoTokenizer.from_pretrained(local if local.is_dir() else name, local_files_only=local.is_dir())
        except Exception as error:  # Every failure of a foreign file or address becomes one line.
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise HostError(
                f"tokenizer: {name!r} cannot be loaded ({reason}). Name bytes, a folder with a tokenizer, a hub id, or "
                f"one of {', '.join(embedded_hosts())}."
            ) from error
    if not hasattr(found, "all_special_ids"):
        raise ArgumentError(f"tokenizer: got {type(found).__name__} of {name!r}, expected one that reads text.")
    return found


class Encoder:
    """Documents to ids, each with a separator behind it."""

    def __init__(self, name: str, *, separator: int | None = None) -> None:
        self.name, self.tokenizer = str(name), load_tokenizer(name)
        self.vocabulary = len(self.tokenizer)
        ends = (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id, self.tokenizer.bos_token_id)
        given = separator if separator is not None else next((end for end in ends if end is not None), None)
        if given is None:
            raise ArgumentError(f"separator: {name!r} has no end of text; give the id of a token that ends documents.")
        if not 0 <= given < self.vocabulary:
            raise ArgumentError(f"separator: got {given}, expected an id in 0..{self.vocabulary - 1}.")
        self.separator = int(given)

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest of uint16 and uint32 that holds every id."""
        return np.dtype("<u2") if self.vocabulary <= 2**16 else np.dtype("<u4")

    def __call__(self, text: str) -> np.ndarray:
        """Ids of a document and its separator. A text longer than a million characters is cut at line ends first."""
        if self.name == BYTES:
            ids = np.frombuffer(text.encode("utf-8"), np.uint8)
        else:
            found = [self.tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"] for piece in
                     pieces(text)]  # fmt: skip
            ids = np.concatenate([np.asarray(part, dtype=np.int64) for part in found])
        return np.concatenate([ids.astype(self.dtype), np.array([self.separator], self.dtype)])


def pieces(text: str, size: int = PIECE) -> list[str]:
    """The text in pieces of at most `size` characters, cut behind the last line end where there is one."""
    found = []
    start = 0
    while len(text) - start > size:
        line = text.rfind("\n", start, start + size)
        end = start + size if line < start else line + 1
        found.append(text[start:end])
        start = end
    return [*found, text[start:]]


def _byte_characters() -> list[str]:
    """The printable character by which byte-level tokenizers write each byte: itself where it is printable, else the
    next one from U+0100 on."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
