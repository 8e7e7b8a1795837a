"""Token files: texts as memory-mapped arrays of ids, and windows of them for training.

    out/
      tokens.json            tokenizer, vocabulary, separator, dtype; tokens, documents and SHA-256 of each shard
      shard-00000.npy        ids, uint16 or uint32, documents one behind the other, each with a separator at its end
      shard-00000.starts.npy where each document starts in its shard
      tokenizer/             the tokenizer itself

Arrays are plain .npy files, read without loading them: a corpus may be larger than memory.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.errors import ArgumentError, HostError
from headway.train.losses import IGNORE
from headway.train.streams import Stream

FORMAT = 1
HEADER = "tokens.json"


class Tokens:
    """The token files of a folder, opened without reading them. `verify` compares the SHA-256 of each shard.

    Raises HostError for a folder without complete, undamaged token files."""

    def __init__(self, folder: str | Path, *, verify: bool = False) -> None:
        self.folder = Path(folder)
        self.header = _read_header(self.folder)
        self.vocabulary, self.separator = int(self.header["vocabulary"]), int(self.header["separator"])
        self._shards = [_open(self.folder, entry, self.header["dtype"], verify) for entry in self.header["shards"]]
        self._edges = np.cumsum([0, *(len(ids) for ids, _ in self._shards)])
        self.starts = np.concatenate(
            [starts.astype(np.int64) + edge for (_, starts), edge in zip(self._shards, self._edges, strict=False)]
        )

    def __len__(self) -> int:
        """Number of tokens."""
        return int(self._edges[-1])

    @property
    def documents(self) -> int:
        return len(self.starts)

    def document(self, number: int) -> np.ndarray:
        """The ids of one document, its separator included."""
        end = self.starts[number + 1] if number + 1 < self.documents else len(self)
        return self.read(int(self.starts[number]), int(end))

    def read(self, start: int, end: int) -> np.ndarray:
        """The ids from `start` to before `end`, over shard edges, as int64."""
        if not 0 <= start <= end <= len(self):
            raise ArgumentError(f"start, end: got {start}, {end}, expected 0 ≤ start ≤ end ≤ {len(self)}.")
        first = int(np.searchsorted(self._edges, start, side="right")) - 1
        parts = []
        while start < end:
            stop = min(end, int(self._edges[first + 1]))
            parts.append(self._shards[first][0][start - self._edges[first] : stop - self._edges[first]])
            start, first = stop, first + 1
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def begins(self, start: int, end: int) -> np.ndarray:
        """Which of these tokens is the first of its document."""
        found = np.zeros(end - start, bool)
        low, high = np.searchsorted(self.starts, [start, end])
        found[self.starts[low:high] - start] = True
        return found


class Packed(Stream):
    """Windows of `tokens` ids out of token files, documents packed one behind the other.

    Each epoch reads every window once, in an order of its own and from an offset of its own; batch number i depends on
    the seed and i alone. The windows at the end of the files that make up the share `held_out` are kept for
    `Packed.held_out`, and training never reads them.

    resets: also gives `resets`, True at the first token of each document, for models whose state is then emptied. The
        first token of a document is not scored in that case, as nothing before it tells of it."""

    def __init__(
        self,
        tokens: Tokens | str | Path,
        length: int,
        *,
        rows: int = 8,
        seed: int = 0,
        resets: bool = False,
        held_out: float = 0.05,
    ) -> None:
        self.tokens = tokens if isinstance(tokens, Tokens) else Tokens(tokens)
        if length < 2 or rows < 1 or not 0 <= held_out < 1:
            raise ArgumentError(
                f"length, rows, held_out: got {length}, {rows}, {held_out}; expected at least 2 tokens, at least 1 "
                "row, and a share in 0..1."
            )
        self.length, self.rows, self.seed, self.resets = length, rows, seed, resets
        whole = len(self.tokens) // length
        self.kept = min(whole, max(1, round(whole * held_out))) if held_out else 0
        self._end = len(self.tokens) - self.kept * length
        # One window less than fits, so that every offset leaves room.
        self.windows = max(self._end // length - 1, 0) or int(self._end >= length)
        if self.windows < 1:
            raise ArgumentError(
                f"length: got {length}, but {self.tokens.folder} has {len(self.tokens):,} tokens, of which {self.kept} "
                "windows are held out. Take shorter windows, or more text."
            )
        self._epoch, self._order, self._offset = -1, np.zeros(0, np.int64), 0

    def made_of(self) -> dict[str, Any]:
        shards = ",".join(entry["sha256"] for entry in self.tokens.header["shards"])
        return {
            "tokens": hashlib.sha256(shards.encode()).hexdigest()[:16],
            "length": self.length,
            "rows": self.rows,
            "seed": self.seed,
            "resets": self.resets,
            "held_out": self.kept,
        }

    def batch(self, index: int) -> dict[str, Tensor]:
        if index < 0:
            return self._held_out(-1 - index)
        starts = []
        for number in range(index * self.rows, (index + 1) * self.rows):
            epoch, place = divmod(number, self.windows)
            self._turn(epoch)
            starts.append(self._offset + int(self._order[place]) * self.length)
        return self._at(starts)

    def _held_out(self, number: int) -> dict[str, Tensor]:
        first = number * self.rows
        if first >= self.kept:
            raise ArgumentError(
                f"held_out: got batch {number}, expected fewer than {self.held_out_batches}: {self.kept} windows "
                f"of {self.length} tokens are held out. Hold out a larger share, or ask for fewer."
            )
        return self._at([self._end + i * self.length for i in range(first, min(first + self.rows, self.kept))])

    @property
    def held_out_batches(self) -> int:
        """How many batches `held_out` can give; the last may have fewer rows."""
        return -(-self.kept // self.rows)

    def _at(self, starts: list[int]) -> dict[str, Tensor]:
        ids = torch.from_numpy(np.stack([self.tokens.read(start, start + self.length) for start in starts]))
        if not self.resets:
            return {"input_ids": ids, "labels": ids}
        begins = torch.from_numpy(np.stack([self.tokens.begins(start, start + self.length) for start in starts]))
        return {"input_ids": ids, "labels": ids.masked_fill(begins, IGNORE), "resets": begins}

    def _turn(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        random = np.random.default_rng([self.seed, epoch])
        self._epoch, self._order = epoch, random.permutation(self.windows)
        self._offset = int(random.integers(0, self._end - self.windows * self.length + 1))


def array_bytes(array: np.ndarray) -> bytes:
    """The array as the content of a .npy file."""
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _read_header(folder: Path) -> dict[str, Any]:
    path = folder / HEADER
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
        complete, form = header["complete"], header["format"]
    except FileNotFoundError as error:
        raise HostError(
            f"tokens: {folder} has no {HEADER}; make it with: headway data tokenize TEXTS --out {folder}"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HostError(f"tokens: {path} cannot be read ({error}); make the token files again.") from error
    if form != FORMAT:
        raise HostError(f"tokens: {path} has format {form}, expected {FORMAT}; make the token files again.")
    if not complete:
        raise HostError(f"tokens: {folder} is not complete; run the same `headway data tokenize` again to go on.")
    return header


def _open(folder: Path, entry: dict[str, Any], dtype: str, verify: bool) -> tuple[np.ndarray, np.ndarray]:
    found = []
    for suffix, checksum, count in (
        ("", entry["sha256"], entry["tokens"]),
        (".starts", entry["starts_sha256"], entry["documents"]),
    ):
        path = folder / f"{entry['name']}{suffix}.npy"
        fault = None
        try:
            array = np.load(path, mmap_mode="r", allow_pickle=False)
            if array.shape != (count,) or (not suffix and array.dtype.name != dtype):
                fault = f"has {array.dtype} of shape {array.shape}, expected {count} entries"
            elif verify and _sha256(path) != checksum:
                fault = "has another checksum"
        except (OSError, ValueError) as error:
            fault = f"cannot be read ({error})"
        if fault is not None:
            raise HostError(f"tokens: {path} {fault}; make the token files again.")
        found.append(array)
    return found[0], found[1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
