"""From a folder of texts to token files: `tokenize_folder`, resumable after any kind of end.

Shards are written one after the other, each whole or absent, and the header behind each. A run that was ended goes on
with the first document that is in no shard.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError, HostError, unknown
from headway.files import write_atomically
from headway.progress import Tell, silent
from headway.train.tokenizers import Encoder
from headway.train.tokens import FORMAT, HEADER, Tokens, array_bytes

PATTERNS = ("**/*.txt", "**/*.md", "**/*.jsonl")
SPLITS = ("file", "line", "paragraph")
#: Tokens of a shard: 64 MB of uint16.
SHARD = 2**25


@dataclass(frozen=True)
class Source:
    """A file of texts, and what would tell that it has changed."""

    path: Path
    name: str
    size: int


def tokenize_folder(
    folder: str | Path,
    out: str | Path,
    *,
    tokenizer: str = "bytes",
    patterns: Sequence[str] = PATTERNS,
    split: str = "file",
    field: str = "text",
    separator: int | None = None,
    shard_tokens: int = SHARD,
    tell: Tell = silent,
) -> Tokens:
    """Tokenizes the texts of a folder (or one file) into `out`, and opens the result.

    tokenizer: "bytes", a folder, a hub id, or an embedded model. patterns: which files, in the order of their names.
    split: a document is a "file", a "line" or a "paragraph" (parts between empty lines). In .jsonl files it is the
        `field` of each line. separator: id behind each document; the tokenizer's end of text by default.
    shard_tokens: a shard is closed behind the document with which it reaches so many.

    Done already: returns at once. Begun with the same settings: goes on. Raises ArgumentError for other settings or
    changed texts, HostError for files that cannot be read."""
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if shard_tokens < 1:
        raise ArgumentError(f"shard_tokens: got {shard_tokens}, expected at least 1.")
    sources = find_sources(Path(folder), patterns)
    out = Path(out)
    encoder = Encoder(tokenizer, separator=separator)
    listed = "\n".join(f"{source.name}\t{source.size}" for source in sources)
    settings = {
        "format": FORMAT,
        "tokenizer": encoder.name,
        "vocabulary": encoder.vocabulary,
        "separator": encoder.separator,
        "dtype": encoder.dtype.name,
        "split": split,
        "field": field,
        "shard_tokens": shard_tokens,
        "sources": len(sources),
        "sources_sha256": hashlib.sha256(listed.encode()).hexdigest(),
    }
    header = _begun(out, settings)
    if header["complete"]:
        return Tokens(out)
    encoder.tokenizer.save_pretrained(out / "tokenizer")
    shard, first = _Shard(encoder.dtype), sum(entry["documents"] for entry in header["shards"])
    number = 0
    for place, source in enumerate(sources):
        tell(source.name, place, len(sources))
        for text in documents(source, split, field):
            number += 1
            if number <= first:
                continue
            shard.add(encoder(text))
            if shard.tokens >= shard_tokens:
                _close(out, header, shard)
                shard = _Shard(encoder.dtype)
    if number == 0:
        raise ArgumentError(f"folder: {folder} has {len(sources)} files with no text in them. Give some with words.")
    if shard.tokens:
        _close(out, header, shard)
    header["complete"] = True
    write_atomically(out / HEADER, json.dumps(header, indent=1) + "\n")
    tell("done", len(sources), len(sources))
    return Tokens(out)


def find_sources(folder: Path, patterns: Sequence[str]) -> list[Source]:
    """The files of a folder that match a pattern, by name; the file itself where one is given."""
    if folder.is_file():
        return [Source(folder, folder.name, folder.stat().st_size)]
    if not folder.is_dir():
        raise HostError(f"folder: there is no folder or file {folder}; check the path.")
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    if not found:
        raise ArgumentError(
            f"folder: {folder} has no file like {', '.join(patterns)}. Give another folder, or other patterns."
        )
    named = sorted((path.relative_to(folder).as_posix(), path) for path in found)
    return [Source(path, name, path.stat().st_size) for name, path in named]


def documents(source: Source, split: str, field: str) -> Iterator[str]:
    """The texts of a file, without those of nothing but white space. Lines are read one by one; files and paragraphs
    as a whole. Raises HostError for a file that is not UTF-8, naming the place."""
    try:
        if source.path.suffix == ".jsonl":
            with source.path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if line.strip() and (text := _field(line, field, source, number)).strip():
                        yield text
            return
        if split == "line":
            with source.path.open(encoding="utf-8-sig") as file:
                yield from (text for line in file if (text := line.rstrip("\n")).strip())
            return
        text = source.path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise HostError(
            f"folder: {source.path} is not UTF-8 (byte 0x{error.object[error.start]:02x}); save it as UTF-8, or "
            "leave it out with other patterns."
        ) from error
    except OSError as error:
        raise HostError(f"folder: {source.path} cannot be read ({error.strerror}).") from error
    parts = [text] if split == "file" else text.replace("\r\n", "\n").split("\n\n")
    yield from (part for part in parts if part.strip())


def _field(line: str, field: str, source: Source, number: int) -> str:
    try:
        found: Any = json.loads(line)
    except ValueError as error:
        raise HostError(f"folder: line {number} of {source.path} is not JSON ({error}).") from error
    if not isinstance(found, dict) or not isinstance(found.get(field), str):
        got = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise HostError(
            f"folder: line {number} of {source.path} has {got}, expected an object with text under {field!r}. Name the "
            "field that has it."
        )
    return found[field]


class _Shard:
    """Documents that are not on the disk yet."""

    def __init__(self, dtype: np.dtype[Any]) -> None:
        self.dtype, self.tokens = dtype, 0
        self.parts: list[np.ndarray] = []
        self.starts: list[int] = []

    def add(self, ids: np.ndarray) -> None:
        self.starts.append(self.tokens)
        self.parts.append(ids)
        self.tokens += len(ids)


def _close(out: Path, header: dict[str, Any], shard: _Shard) -> None:
    """Writes a shard and then the header that knows it."""
    stem = f"shard-{len(header['shards']):05d}"
    data = array_bytes(np.concatenate(shard.parts))
    starts = array_bytes(np.asarray(shard.starts, dtype="<u8"))
    write_atomically(out / f"{stem}.npy", data)
    write_atomically(out / f"{stem}.starts.npy", starts)
    header["shards"].append(
        {
            "name": stem,
            "tokens": shard.tokens,
            "documents": len(shard.starts),
            "sha256": hashlib.sha256(data).hexdigest(),
            "starts_sha256": hashlib.sha256(starts).hexdigest(),
        }
    )
    write_atomically(out / HEADER, json.dumps(header, indent=1) + "\n")


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The header of what is in `out` already, or a new one."""
    path = out / HEADER
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"out: got {out}, which is a file; expected a folder.")
    if not path.is_file():
        return {**settings, "complete": False, "shards": []}
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        different = [name for name, value in settings.items() if header[name] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise HostError(
            f"out: the header {path} cannot be read ({error}). Remove the folder, or name another."
        ) from error
    if different:
        shown = "; ".join(f"{name} was {header[name]!r} and is {settings[name]!r}" for name in different)
        raise ArgumentError(f"out: {out} was made otherwise: {shown}. Name another folder, or remove it.")
    return header
