"""The sizes of the StreamingLLM recipe, and the model and text that its measurements share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headway.evidence.recipes._long_text import host_and_text
from headway.evidence.recipes._streaming_bytes import Bytes

#: Sinks of the paper's sweep; 4 is its default.
SINKS = (0, 1, 2, 4, 8)
DEFAULT_SINKS = 4


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Perplexities are of the text's first `tokens`, from `skip` on, with a cache of `capacity` or of `capacities`, and
    with a `window`; `documents` stretches of `document` tokens are also read afresh, in runs of `run` tokens. `long`
    tokens are streamed with `long_capacity`, in chunks; the `beyond_scored` tokens from `beyond` on, where the model's
    own positions end, are scored on the way. Each recomputation is timed `recomputations` times."""

    model: str
    capacity: int
    capacities: tuple[int, ...]
    window: int
    tokens: int
    skip: int
    documents: int
    document: int
    run: int
    long_capacity: int
    long: int
    chunk: int
    beyond: int
    beyond_scored: int
    recomputations: int
    planted_steps: int
    bytes: Bytes
    workers: int = 1


class Host:
    """The model and its text, loaded once and only when a stage is not there yet."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._loaded: tuple[Any, Tensor, int] | None = None

    def get(self) -> tuple[Any, Tensor, int]:
        """Model, the text's first `tokens`, and the id of a line break."""
        model, ids, newline = self.get_long()
        return model, ids[:, : self.settings.tokens], newline

    def get_long(self) -> tuple[Any, Tensor, int]:
        """The same with as much of the text as is streamed."""
        if self._loaded is None:
            wanted = max(self.settings.tokens, self.settings.long, self.settings.beyond + self.settings.beyond_scored)
            self._loaded = host_and_text(self.settings.model, wanted, positions=4 * wanted)
        return self._loaded

    def documents(self) -> list[Tensor]:
        """Stretches of the text at even distances, (1, document) each."""
        _, ids, _ = self.get_long()
        step = (ids.shape[1] - self.settings.document) // max(self.settings.documents - 1, 1)
        return [ids[:, i * step : i * step + self.settings.document] for i in range(self.settings.documents)]


def policy(capacity: int, sinks: int = DEFAULT_SINKS) -> dict[str, Any]:
    """Options of a cache of so many tokens."""
    return {"sinks": sinks, "window": capacity - sinks}


def conditions(settings: Settings) -> dict[str, Any]:
    return {"model": settings.model, "cache": settings.capacity, "tokens": settings.tokens, "from": settings.skip}
