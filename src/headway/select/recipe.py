"""What scores texts in a run: a model with the heads that are masked, made on whatever machine it is needed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from headway.errors import ArgumentError
from headway.files import write_atomically
from headway.hosts import load
from headway.hosts.facts import versions
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis.attention_influence import FLOOR, InfluenceScorer
from headway.methods.diagnosis.attention_influence.detection import HeadScores, check_choice, detect_heads
from headway.progress import Tell

Head = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Detection:
    """How retrieval heads are looked for: `samples` probes of up to `tokens` tokens, and which heads count (a threshold
    of the score or the highest share; the paper's 5 % where neither is given)."""

    samples: int = 16
    tokens: int = 512
    threshold: float | None = None
    fraction: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.threshold is not None or self.fraction is not None:
            check_choice(self.threshold, self.fraction)
        if self.samples < 1 or self.tokens < 1:
            raise ArgumentError(f"samples, tokens: got {self.samples} and {self.tokens}, expected 1 or more of both.")


@dataclass(frozen=True, kw_only=True)
class InfluenceRecipe:
    """An `InfluenceScorer`: of a model that is loaded by name, or of one that is there (`host`, a model and its
    tokenizer), which then travels with the recipe. `described` are the facts of the model that scores depend on."""

    name: str
    heads: tuple[Head, ...]
    described: str
    host: tuple[nn.Module, Any] | None = None
    dtype: str = "float32"
    device: str = "cpu"
    trust_remote_code: bool = False
    context: int | None = None
    batch_tokens: int = 4096
    floor: int = FLOOR

    def build(self) -> InfluenceScorer:
        model, tokenizer = self.host or load_model(self.name, self.dtype, self.device, self.trust_remote_code)
        return self.scorer(model, tokenizer)

    def scorer(self, model: nn.Module, tokenizer: Any, heads: Sequence[Head] | None = None) -> InfluenceScorer:
        """The scorer on a model that is loaded already; `heads` in place of the recipe's."""
        return InfluenceScorer(
            model,
            tokenizer,
            self.heads if heads is None else heads,
            context=self.context,
            batch_tokens=self.batch_tokens,
            floor=self.floor,
        )

    def settings(self) -> dict[str, Any]:
        """All that the scores depend on beside the texts."""
        return {
            "model": json.loads(self.described),
            "heads": [list(pair) for pair in sorted(self.heads)],
            "dtype": self.dtype,
            "context": self.context,
            "batch_tokens": self.batch_tokens,
            "floor": self.floor,
            **versions(),
        }


def load_model(name: str, dtype: str, device: str, trust_remote_code: bool) -> tuple[Any, Any]:
    return load(name, dtype=dtype, device=device, trust_remote_code=trust_remote_code)


def reachable_name(name: str) -> str:
    """A folder with its whole path, so that a process elsewhere finds it; any other name as it is."""
    local = name.startswith((".", "/", "~")) or os.path.isdir(os.path.expanduser(name))
    return str(Path(name).expanduser().resolve()) if local and name not in ("smollm2", "minilm", "vit") else name


def describe(model: nn.Module) -> str:
    """What tells this model's scores from another's, as JSON."""
    return json.dumps(fingerprint(model).to_dict(), sort_keys=True)


def find_heads(model: nn.Module, tokenizer: Any, wanted: Detection, folder: Path, tell: Tell) -> HeadScores:
    """The model's retrieval heads; those of an earlier run in `folder` where model and settings are the same."""
    asked = [describe(model), asdict(wanted), versions()]
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:16]
    path = folder / f"heads-{key}.json"
    if path.is_file():
        return HeadScores.from_json(path.read_text(encoding="utf-8"))
    found = detect_heads(
        model,
        tokenizer,
        samples=wanted.samples,
        tokens=wanted.tokens,
        seed=wanted.seed,
        progress=lambda done, total: tell("looking for retrieval heads", done, total),
        threshold=wanted.threshold,
        fraction=wanted.fraction,
    )
    write_atomically(path, found.to_json())
    return found
