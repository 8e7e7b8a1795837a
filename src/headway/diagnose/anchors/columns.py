"""Rows of the causal matrix on disk, so that an interrupted run goes on behind the last finished sentence."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, MutableMapping
from pathlib import Path
from typing import Any

import numpy as np

from headway.files import write_atomically


class Columns(MutableMapping[int, np.ndarray]):
    """Sentence -> the effects of hiding it, one file each, in a folder named after everything they depend on."""

    def __init__(self, folder: Path, *parts: Any) -> None:
        key = hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:16]
        self.folder = folder / f"effects-{key}"

    def __getitem__(self, sentence: int) -> np.ndarray:
        path = self._path(sentence)
        if not path.exists():
            raise KeyError(sentence)
        return np.load(path, allow_pickle=False)

    def __setitem__(self, sentence: int, effects: np.ndarray) -> None:
        content = io.BytesIO()
        np.save(content, effects)
        write_atomically(self._path(sentence), content.getvalue())

    def __delitem__(self, sentence: int) -> None:
        self._path(sentence).unlink()

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(int(p.stem) for p in self.folder.glob("[0-9]*.npy")))

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, sentence: object) -> bool:
        return isinstance(sentence, int) and self._path(sentence).exists()

    def _path(self, sentence: int) -> Path:
        return self.folder / f"{sentence}.npy"
