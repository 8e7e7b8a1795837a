"""Sinks of a model while it trains: numbers in the log of the run, beside its loss."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.methods.sinks.sink_emergence import EPSILON, measure_sinks
from headway.train import Measure


class SinkCourse(Measure):
    """Adds to the log, every `every` steps and at the last one, what `measure_sinks` says of held-out `ids`:

    sink_1, the share of heads that sink into the first token (Sink_1^ε, arXiv 2410.10781); sink_strongest, the
    highest share at any token that enough rows see, and sink_position, that token (0 is the first).

    Each look is a forward over `ids` through the door: a few dozen sequences are enough. It changes neither the
    weights nor the random generators, so the run is the one that nobody watched."""

    def __init__(
        self, ids: Int[Tensor, "sequences tokens"], *, every: int, epsilon: float = EPSILON, batch: int = 8
    ) -> None:
        super().__init__(self._now, every=every)
        if ids.ndim != 2 or not ids.numel():
            raise ArgumentError(
                f"ids: got shape {tuple(ids.shape)}, expected (sequences, tokens), at least one of each."
            )
        self.ids, self.epsilon, self.batch = ids, epsilon, batch

    def _now(self, model: nn.Module) -> dict[str, float]:
        found = measure_sinks(model, self.ids, epsilon=self.epsilon, length=None, special_ids=(), batch=self.batch)
        position, rate = found.strongest
        return {"sink_1": float(found.rates.overall[0]), "sink_strongest": rate, "sink_position": float(position)}
