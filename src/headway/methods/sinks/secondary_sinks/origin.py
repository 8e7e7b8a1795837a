"""Where a secondary sink comes from: one MLP maps an unlike input onto the primary sink's direction.

At the layer that creates a sink (its first flagged layer l), each stage x of the MLP is compared with the primary
sink's own vector at the same stage of the same MLP:

    cos(x_t^l, x_b^l)   for x = input, gate, up, act(gate), act(gate)⊙up, down output

Low at the input and near 1 at the output (0.98 in the released code) means that this MLP makes the token a sink. Beside
it stand the cosine of the output with the stream of the primary at l, and with the output that made the primary itself
(its own start layer): all three lie in the basis of the stream. Paper: arXiv 2512.22213.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from headway.methods.sinks.secondary_sinks.detection import stream_cosines, token_norms
from headway.methods.sinks.secondary_sinks.structure import STAGES

#: Cosine from which an MLP output counts as aligned with the primary's, from the released code.
ALIGNED = 0.98


@dataclass(frozen=True, kw_only=True)
class Origin:
    """How one sink was written: its position and label, the layer, the norm of the MLP output there, and the cosine
    with the primary by stage. `to_stream` compares the output with the primary's stream at that layer (NaN in hosts
    whose stream is wider than their MLPs), `to_source` with the output that made the primary."""

    position: int
    label: str
    layer: int
    write_norm: float
    cosines: dict[str, float]
    to_stream: float
    to_source: float

    @property
    def aligned(self) -> bool:
        """Whether the output lies along the primary's direction (either sign)."""
        return any(abs(cosine) > ALIGNED for cosine in (self.cosines["down"], self.to_stream, self.to_source))


def stage_cosines(
    tokens: Mapping[str, Float[Tensor, "tokens dim"]], primary: Mapping[str, Float[Tensor, " dim"]]
) -> dict[str, Float[Tensor, " tokens"]]:
    """cos(x_t, x_b) for every stage that both have, in the order a token passes them."""
    return {
        stage: stream_cosines(tokens[stage], primary[stage]) for stage in STAGES if stage in tokens and stage in primary
    }


def trace_origins(
    positions: Sequence[int],
    labels: Sequence[str],
    layer: int,
    tokens: Mapping[str, Float[Tensor, "tokens dim"]],
    primary: Mapping[str, Float[Tensor, " dim"]],
    source: Float[Tensor, " width"],
) -> list[Origin]:
    """An Origin per token created at `layer`, from its stages, the primary's stages there, and the primary's source
    output. `primary` also holds its "stream" after the layer."""
    cosines = stage_cosines(tokens, primary)
    same_width = primary["stream"].numel() == source.numel()
    to_stream = (
        stream_cosines(tokens["down"], primary["stream"]) if same_width else torch.full((len(positions),), torch.nan)
    )
    to_source = stream_cosines(tokens["down"], source)
    norms = token_norms(tokens["down"])
    return [
        Origin(
            position=int(position),
            label=label,
            layer=layer,
            write_norm=float(norms[i]),
            cosines={stage: float(values[i]) for stage, values in cosines.items()},
            to_stream=float(to_stream[i]),
            to_source=float(to_source[i]),
        )
        for i, (position, label) in enumerate(zip(positions, labels, strict=True))
    ]


def stage_profile(origins: Sequence[Origin]) -> dict[int, dict[str, float]]:
    """Mean cosine by stage for each creating layer."""
    layers = sorted({origin.layer for origin in origins})
    profile = {}
    for layer in layers:
        members = [o for o in origins if o.layer == layer]
        profile[layer] = {stage: sum(o.cosines[stage] for o in members) / len(members) for stage in members[0].cosines}
    return profile
