"""What absmax quantisation loses, with and without the sinks kept exact.

    x̂ = s · round(x / s) ,   s = max|x| / (2^(bits−1) − 1)

One massive token sets the scale of all: the error of the rest shows what keeping sinks exact is worth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, NumericError, unknown
from headway.methods.sinks.sink_survey.metrics import token_mask


@dataclass(frozen=True)
class QuantisationError:
    """Relative errors ‖x − x̂‖ / ‖x‖ of absmax quantisation.

    `everything`: over all tokens. `rest`: over the tokens that are no sinks, when one scale serves all.
    `rest_sinks_exact`: over the same tokens when the sinks are kept exact and do not enter the scale."""

    everything: float
    rest: float
    rest_sinks_exact: float

    @property
    def gain(self) -> float:
        """How many times smaller the error of the rest gets when sinks are kept exact."""
        return self.rest / self.rest_sinks_exact if self.rest_sinks_exact else float("inf") if self.rest else 1.0


def quantise(
    x: Float[Tensor, "*batch tokens dim"], *, bits: int = 8, per: str = "tensor"
) -> Float[Tensor, "*batch tokens dim"]:
    """x̂ = s · round(x / s) with s = max|x| / (2^(bits−1) − 1): symmetric absmax, one scale per tensor or per channel.

    A channel is an index of the last dimension. Returns float32."""
    if per not in ("tensor", "channel"):
        raise unknown("per", per, ("tensor", "channel"))
    if bits < 2:
        raise ArgumentError(f"bits: got {bits}, expected at least 2 for a signed grid. Use 8 or 4.")
    x = x.float()
    size = x.abs().amax() if per == "tensor" else x.abs().amax(tuple(range(x.ndim - 1)), keepdim=True)
    step = size / (2 ** (bits - 1) - 1)
    return torch.where(step > 0, torch.round(x / torch.where(step > 0, step, 1.0)) * step, 0.0)


def quantisation_error(
    x: Float[Tensor, "*batch tokens dim"],
    sinks: Bool[Tensor, " tokens"] | Sequence[int] = (0,),
    *,
    bits: int = 8,
    per: str = "tensor",
) -> QuantisationError:
    """Error of INT-`bits` absmax quantisation of activations, keys or values, with and without the sinks kept exact.

    The error of the rest is what matters: a massive sink dominates ‖x‖, so the error over everything hides that all
    other tokens round to zero. Raises NumericError on NaN or infinity, ArgumentError when every token is a sink."""
    if not bool(torch.isfinite(x).all()):
        raise NumericError("x: got NaN or infinity, expected finite numbers to quantise. Check the states first.")
    x = x.float()
    is_sink = token_mask(sinks, x.shape[-2], x.device)
    if bool(is_sink.all()):
        raise ArgumentError(f"sinks: got all {x.shape[-2]} tokens, expected some that are no sinks. Name fewer sinks.")
    rest = x[..., ~is_sink, :]
    coarse = quantise(x, bits=bits, per=per)
    return QuantisationError(
        everything=_relative_error(x, coarse),
        rest=_relative_error(rest, coarse[..., ~is_sink, :]),
        rest_sinks_exact=_relative_error(rest, quantise(rest, bits=bits, per=per)),
    )


def _relative_error(x: Tensor, approximate: Tensor) -> float:
    size = float(x.norm())
    return float((x - approximate).norm()) / size if size else 0.0
