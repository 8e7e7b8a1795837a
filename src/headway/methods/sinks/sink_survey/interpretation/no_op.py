"""Is the sink a no-op: does attention go there to do nothing?

    share  mean_i Σ_{s∈S} A_is                      much attention,
    rest   mean_i ‖Σ_{s∈S} A_is v_s‖ / ‖Σ_j A_ij v_j‖     little of the output

The causal form trains the same model with a normaliser that can be silent: if the sink was there to be silent, it goes.
Survey: arXiv 2604.10098.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door.attach import observe as attach
from headway.door.call import AttentionCall, Site
from headway.door.stages import Observer
from headway.errors import ArgumentError
from headway.kernels.dense import DEFAULT_BLOCK, grouped_values
from headway.methods.sinks.sink_survey.interpretation.finding import Finding, judged
from headway.methods.sinks.sink_survey.places import Places, marked_keys

#: Attention from which a head sinks (the ε of arXiv 2410.10781), and contribution up to which a sink is silent. The
#: second border, and how much of a sink must go for "vanishes", are ours.
SINKS_FROM, SILENT, VANISHES = 0.3, 0.3, 0.5


def sink_contribution(
    weights: Float[Tensor, "batch heads rows keys"],
    value: Float[Tensor, "batch kv_heads keys dim"],
    sinks: Bool[Tensor, "#batch #heads #rows keys"],
) -> tuple[Float[Tensor, "batch heads rows"], Float[Tensor, "batch heads rows"]]:
    """The share of each row on the sinks, and ‖A_S V_S‖ / ‖A V‖: 0 where attended sinks add nothing, also to an output
    of zero; NaN for other outputs of zero."""
    weights, value = weights.float(), value.float()
    own = weights * sinks
    part, whole = (grouped_values(w, value).norm(dim=-1) for w in (own, weights))
    share, ratio = own.sum(-1), part / whole.masked_fill(whole == 0, torch.nan)
    return share, torch.where((part == 0) & (share > 0), 0.0, ratio)


def no_op(
    weights: Float[Tensor, "batch heads rows keys"],
    value: Float[Tensor, "batch kv_heads keys dim"],
    sinks: Bool[Tensor, "#batch #heads #rows keys"],
    *,
    rows: Bool[Tensor, "#batch #heads rows"] | None = None,
) -> Finding:
    """The verdict on given weights and values; `rows` are those that count (those that see more than the sinks)."""
    share, contribution = sink_contribution(weights, value, sinks)
    counts = torch.ones_like(share, dtype=torch.bool) if rows is None else rows.expand_as(share)
    return _judge(float(share[counts].mean()), float(contribution[counts].nanmean()), {})


def _judge(share: float, contribution: float, details: dict[str, Any]) -> Finding:
    return judged(
        "no-op",
        contribution,
        at_most=SILENT,
        sentence=f"{share:.0%} of the attention makes {contribution:.0%} of the output's length",
        requires=(share >= SINKS_FROM, f"{share:.0%} of the attention is on the sinks, too little for a sink"),
        details={"share": share, **details},
    )


class _Contribution(Observer):
    """Share and contribution by layer: sums over rows, by head."""

    reads_weights = True

    def __init__(self, sinks: Places) -> None:
        self.sinks = sinks
        self.sums: dict[int, Tensor] = {}

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        column, padded = marked_keys(call, self.sinks, "sinks"), call.padded_rows()
        total = self.sums.setdefault(call.site.layer, torch.zeros(3, call.heads))
        for rows in torch.arange(call.queries, device=call.query.device).split(DEFAULT_BLOCK):
            seen = call.visible(rows)
            counts = (seen & ~column).any(-1) & (seen & column).any(-1)
            if padded is not None:
                counts = counts & ~padded[:, None, rows]
            share, part = sink_contribution(call.weights(rows), call.value, column)
            counts = counts.expand_as(share) & ~part.isnan()
            parts = [(x.masked_fill(~counts, 0.0)).sum((0, 2)) for x in (share, part)]
            total += torch.stack([*parts, counts.sum((0, 2)).float()]).cpu()

    def result(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {layer: (t[0] / t[2], t[1] / t[2]) for layer, t in sorted(self.sums.items())}


def no_op_of_model(model: nn.Module, inputs: Mapping[str, Any], *, sinks: Places = (0,)) -> Finding:
    """The verdict on the heads of a model that sink (mean share at least 0.3) in one forward of `inputs`; `details`
    name them with their share and contribution."""
    observer = _Contribution(sinks)
    with attach(model, observer), torch.no_grad():
        model(**inputs)
    heads = [
        {"layer": layer, "head": head, "share": float(share[head]), "contribution": float(part[head])}
        for layer, (share, part) in observer.result().items()
        for head in range(share.numel())
    ]
    sinking = [head for head in heads if head["share"] >= SINKS_FROM]
    if not sinking:
        return _judge(max((h["share"] for h in heads), default=0.0), float("nan"), {"heads": []})
    share, part = (sum(h[name] for h in sinking) / len(sinking) for name in ("share", "contribution"))
    return _judge(share, part, {"heads": sinking, "of": len(heads)})


def normaliser_swap(softmax: Sequence[float], other: Sequence[float]) -> Finding:
    """Causal: the mass at rows that need nothing, of paired runs (one per seed) with softmax and with a normaliser that
    can be silent. The number is the mean of other ÷ softmax; "yes" when at least half of the sink is gone."""
    if len(softmax) != len(other) or not softmax:
        raise ArgumentError(f"softmax, other: got {len(softmax)} and {len(other)} runs, expected pairs, at least one.")
    base = sum(softmax) / len(softmax)
    ratio = (
        sum(o / s for s, o in zip(softmax, other, strict=True) if s > 0) / len(softmax) if base > 0 else float("nan")
    )
    return judged(
        "no-op, by another normaliser",
        ratio,
        at_most=VANISHES,
        sentence=f"{ratio:.0%} of softmax's sink mass is left",
        requires=(base >= SINKS_FROM, f"softmax puts {base:.0%} on the sink, too little for a sink"),
        details={"softmax": list(softmax), "other": list(other)},
    )
