"""Where the sink stands among hidden states and keys.

    position   p_{l,t} = mean over inputs of h_{l,t};   its principal components say how much of it is one direction
    drift      d_l = mean_t cos(h_{l,t}, h_{l,s})       other tokens turn towards the sink, block by block
    key        cos(k_s, k̄)                              the sink's key stands apart from the mean key

Survey: arXiv 2604.10098 (sinks as a frame of reference). Borders are ours.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.methods.sinks.sink_survey.interpretation.finding import Finding, judged
from headway.methods.sinks.sink_survey.metrics import cosine_to_mean, token_mask

#: Rise of the mean cosine from the first to the last quarter of the blocks that counts as a drift.
DRIFT = 0.1
#: Share of the positional part's variance in its first component from which it counts as one direction.
ONE_DIRECTION = 0.5
#: Cosine with the mean key below which a key stands apart.
APART = 0.0


def positional_part(hidden: Float[Tensor, "inputs tokens width"]) -> Float[Tensor, "tokens width"]:
    """What a state owes to its position alone: the mean over inputs, with the mean over positions taken off."""
    mean = hidden.float().mean(0)
    return mean - mean.mean(0, keepdim=True)


def positional_direction(hidden: Float[Tensor, "inputs tokens width"]) -> Finding:
    """The share of the positional part's variance in its first principal component; "yes" when it is one direction,
    as when the sink's position alone differs. `details`: the shares of the first components, and the share of all
    variance that is positional."""
    if hidden.shape[0] < 2:
        raise ArgumentError(f"hidden: got {hidden.shape[0]} input, expected at least 2 with different texts.")
    part = positional_part(hidden)
    energy = torch.linalg.svdvals(part).square()
    total = hidden.float() - hidden.float().mean((0, 1))
    share = float(energy[0] / energy.sum()) if float(energy.sum()) > 0 else float("nan")
    positional = float(part.square().sum() * hidden.shape[0] / total.square().sum().clamp(min=1e-30))
    return judged(
        "one positional direction",
        share,
        at_least=ONE_DIRECTION,
        sentence=f"{share:.0%} of the positional part lies in one direction",
        details={"components": (energy / energy.sum())[:8].tolist(), "positional_share": positional},
    )


def drift_to_sink(states: Sequence[Float[Tensor, "batch tokens width"]], *, sink: int = 0) -> Finding:
    """The rise of d_l from the first to the last quarter of the states, which are those that enter the blocks in order;
    `details` hold d_l."""
    if len(states) < 4:
        raise ArgumentError(f"states: got {len(states)}, expected at least 4 blocks to compare early with late.")
    course = [float(_cosines(h, sink).mean()) for h in states]
    quarter = max(len(course) // 4, 1)
    early, late = sum(course[:quarter]) / quarter, sum(course[-quarter:]) / quarter
    return judged(
        "drift towards the sink",
        late - early,
        at_least=DRIFT,
        sentence=f"the mean cosine with the sink goes from {early:.2f} to {late:.2f}",
        details={"by_block": course},
    )


def _cosines(hidden: Tensor, sink: int) -> Tensor:
    h = nn.functional.normalize(hidden.float(), dim=-1)
    others = [t for t in range(h.shape[1]) if t != sink]
    return (h[:, others] * h[:, sink : sink + 1]).sum(-1)


def key_apart(key: Float[Tensor, "*batch keys dim"], sinks: Bool[Tensor, " keys"] | Sequence[int] = (0,)) -> Finding:
    """The mean cosine of the sinks' keys with the mean key; "yes" when they point away from it."""
    cosine = cosine_to_mean(key)
    mask = token_mask(sinks, key.shape[-2], key.device)
    own, others = float(cosine[..., mask].mean()), float(cosine[..., ~mask].mean())
    return judged(
        "key apart",
        own,
        at_most=APART,
        sentence=f"cosine with the mean key {own:.2f}, of other keys {others:.2f}",
        details={"others": others},
    )


@torch.no_grad()
def geometry_of_model(model: nn.Module, ids: Int[Tensor, "inputs tokens"], *, sink: int = 0) -> dict[str, Finding]:
    """`drift_to_sink`, and `positional_direction` of the state that enters the middle block, for unpadded inputs."""
    states: Any = model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states[:-1]
    return {
        "drift": drift_to_sink(states, sink=sink),
        "position": positional_direction(states[len(states) // 2]),
    }
