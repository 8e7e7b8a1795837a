"""Local linear weights in a host that was trained with softmax."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor

from headway.door import AttentionCall, Editor
from headway.errors import ArgumentError, InterceptionError
from headway.kernels.local_linear import local_linear_weights


@dataclass(frozen=True, kw_only=True)
class LocalLinear(Editor):
    """Puts P in place of the softmax weights of a host, through the door.

    ridge: λ > 0 in units of the host's squared key length; large values are the host's own softmax.

    Weights are made explicitly, block by block, with a dim × dim solve per row: for study and as a start for training,
    not for speed. A host with learned sinks is refused, as its rows do not sum to one."""

    ridge: float = 10.0

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ArgumentError(f"ridge: got {self.ridge}, expected a positive number. Large ones give softmax.")

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        if call.sinks is not None:
            raise InterceptionError(
                f"attention at {call.site.name}: got a host with learned sinks, expected rows that sum to one. Use "
                "local linear attention on a host without them."
            )
        query = call.query[:, :, rows].to(weights.dtype)
        ridge = weights.new_full((1, 1, 1), self.ridge)
        return local_linear_weights(weights, query, call.key.to(weights.dtype), ridge)
