"""Finished parts of long work on disk, so that an interrupted run goes on behind them.

A part is a file of its own, written whole, under the fingerprint of everything it depends on. It carries that
fingerprint and the digest of its content: a part that was cut short, altered, or belongs to other work is told in the
log and made again, and none is ever read for another.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError
from headway.files import write_atomically

log = logging.getLogger(__name__)
Arrays = dict[str, np.ndarray]


class Parts:
    """Finished parts in a folder; `prefix` starts the names of their files. Without a folder nothing is stored, and
    results of `data` are remembered as long as the object lives. `reused` counts the parts that were not made again."""

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, prefix: str = "") -> None:
        self.folder = None if folder is None else Path(folder)
        self.prefix = prefix
        self.reused = 0
        self._known: dict[str, Any] = {}

    def data(self, what: Any, make: Callable[[], Any], *, anew: bool = False) -> Any:
        """The stored result of `what`, or that of `make()`, which is then stored; plain JSON data, and NaN. With `anew`
        it is made in any case. `what` is everything the result depends on (see `key_of`)."""
        key = key_of(what)
        found = None if anew else self._known.get(key) or self._read_data(key)
        if found is not None:
            self.reused += 1
        else:
            found = [json.loads(json.dumps(make()))]
            if self.folder is not None:
                kept = {"key": key, "digest": _digest_of_data(found[0]), "result": found[0]}
                write_atomically(self._path(key, "json"), json.dumps(kept))
        self._known[key] = found
        return found[0]

    def arrays(self, what: Any, make: Callable[[], Mapping[str, np.ndarray]], *, anew: bool = False) -> Arrays:
        """The same for arrays by name, kept as safetensors."""
        key = key_of(what)
        found = None if anew else self._read_arrays(key)
        if found is not None:
            self.reused += 1
            return found
        made = {name: np.ascontiguousarray(value) for name, value in make().items()}
        self._write_arrays(key, made)
        return made

    def stored(self, what: Any) -> Arrays | None:
        """The arrays of `what` where they were made before."""
        return self._read_arrays(key_of(what))

    def _path(self, key: str, ending: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.prefix}{key}.{ending}"

    def _read_data(self, key: str) -> list[Any] | None:
        """The result in a list of its own, for None is a result too."""
        if self.folder is None or not self._path(key, "json").exists():
            return None
        try:
            kept = json.loads(self._path(key, "json").read_bytes())
            sound = kept["key"] == key and kept["digest"] == _digest_of_data(kept["result"])
        except (OSError, ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            self._tell(key, "json")
            return None
        return [kept["result"]]

    def _read_arrays(self, key: str) -> Arrays | None:
        from safetensors import SafetensorError, safe_open

        if self.folder is None or not self._path(key, "safetensors").exists():
            return None
        try:
            with safe_open(self._path(key, "safetensors"), framework="numpy") as file:
                marks = file.metadata() or {}
                found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            sound = marks.get("key") == key and marks.get("digest") == _digest_of_arrays(found)
        except (OSError, SafetensorError, ValueError):
            sound = False
        if not sound:
            self._tell(key, "safetensors")
            return None
        return found

    def _write_arrays(self, key: str, made: Arrays) -> None:
        from safetensors.numpy import save

        if self.folder is not None:
            marks = {"key": key, "digest": _digest_of_arrays(made)}
            write_atomically(self._path(key, "safetensors"), save(made, metadata=marks))

    def _tell(self, key: str, ending: str) -> None:
        log.warning("%s is damaged, or a part of other work; it is made again.", self._path(key, ending))


def key_of(what: Any) -> str:
    """The fingerprint of plain data, data classes, arrays and tensors. Raises ArgumentError for anything else, whose
    text may not tell all of it."""
    text = json.dumps(what, sort_keys=True, default=_plain)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:24]


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return [type(value).__name__, asdict(value)]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    if isinstance(value, np.ndarray) and value.dtype != object:
        return [str(value.dtype), list(value.shape), hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()]
    raise ArgumentError(f"what: got {type(value).__name__}, expected plain data, data classes, arrays or tensors.")


def _digest_of_data(result: Any) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()[:24]


def _digest_of_arrays(arrays: Arrays) -> str:
    whole = hashlib.sha256()
    for name in sorted(arrays):
        value = arrays[name]
        whole.update(f"{name}\0{value.dtype}\0{value.shape}\0".encode())
        whole.update(np.ascontiguousarray(value).tobytes())
    return whole.hexdigest()[:24]
