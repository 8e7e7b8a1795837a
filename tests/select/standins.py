"""A scorer whose scores follow from the text, so that what an engine should bring is known; and corpora for it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.methods.diagnosis.attention_influence import Influence


def expected(text: str) -> float:
    """The influence that the stand-in gives a text, in [0, 1)."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:6], 16) / 16**6


class StandIn:
    """Scores by hash. `slow` seconds pass for every call; `die` is a file whose making ends the process, once."""

    def __init__(self, slow: float = 0.0, die: str | None = None) -> None:
        self.slow, self.die, self.calls = slow, die, 0

    def score(self, texts: Sequence[str]) -> list[Influence]:
        self.calls += 1
        time.sleep(self.slow)
        if self.die is not None and self.calls == 2:
            try:
                os.close(os.open(self.die, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                pass
            else:
                os._exit(1)
        return [
            Influence(base_loss=1.0, masked_loss=1 + expected(text), tokens=100, influence=expected(text), flags=())
            for text in texts
        ]


@dataclass(frozen=True)
class StandInRecipe:
    slow: float = 0.0
    die: str | None = None

    def build(self) -> StandIn:
        return StandIn(self.slow, self.die)

    def settings(self) -> dict[str, Any]:
        return {"scorer": "stand-in"}


def text(number: int) -> str:
    return f"Record number {number} says something of its own, and nothing that another one says."


def write_corpus(folder: Path, records: int = 200, files: int = 3) -> Path:
    """JSON lines over several files, two domains."""
    folder.mkdir(parents=True, exist_ok=True)
    for part in range(files):
        rows = [
            {"id": f"r{n}", "text": text(n), "kind": "even" if n % 2 == 0 else "odd", "extra": [n]}
            for n in range(part, records, files)
        ]
        (folder / f"part-{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder
