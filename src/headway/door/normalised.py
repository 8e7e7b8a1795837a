"""Attention with a normaliser, as every mixer that takes one runs it: fused where that is possible, and seen by scopes.

o_i = finish( Σ_{j visible} w(s_i·)_j v_j ) ,   w the normaliser's weights of the logits of row i
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from headway.door.own import Attend
from headway.kernels.normalizers import Normalizer, Operation, explicit_attention


def normalised_attention(
    attend: Attend,
    normalizer: Normalizer,
    call: Operation,
    x: Float[Tensor, "batch tokens width"],
    mask: Bool[Tensor, "batch tokens"] | None,
    *,
    whole: bool,
    by_rows: bool = False,
) -> Float[Tensor, "batch heads tokens value_dim"]:
    """The heads' outputs for layer inputs `x`. `whole` says that the call is a whole sequence, without padding, packing
    or a state; `by_rows` takes explicit weights all at once, which is the reference form."""
    weighing = normalizer.bind(x, mask, offset=call.offset, length=x.shape[1] if whole else None)
    mass: list[Tensor | None] = []

    def native() -> Tensor:
        given = explicit_attention(call, weighing, block=0) if by_rows else normalizer.attend(call, weighing)
        mass.append(given[1])
        return given[0]

    output = attend(
        call.query,
        call.key,
        call.value,
        native=native,
        visible=call.seen() if attend.watched and call.window is not None else call.visible,
        bias=call.bias,
        sinks=normalizer.sinks(call.query),
        weighing=None if normalizer.is_softmax else weighing,
    )
    if normalizer.needs_mass and not mass:
        mass.append(explicit_attention(call, weighing)[1])
    return normalizer.finish(output, mass[0] if mass else None)
