"""Does the sink act as a constant: an implicit bias that each head adds, whatever is read?

    b_t = Σ_{i ∈ S} p_ti v_i ,      number: mean cos(b_t, b'_t') over pairs of different inputs

Within one input a single sink gives the same direction at every t, so that only pairs of different inputs say anything.
The causal form puts the mean of b in its place: a constant costs nothing. Survey: arXiv 2604.10098.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.attach import observe as attach
from headway.door.attach import use
from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor, Observer
from headway.errors import ArgumentError
from headway.kernels.dense import DEFAULT_BLOCK, grouped_values
from headway.methods.sinks.sink_survey.interpretation.finding import Finding, judged
from headway.methods.sinks.sink_survey.interpretation.no_op import SINKS_FROM
from headway.methods.sinks.sink_survey.places import Places, marked_keys

#: Mean cosine from which the contribution counts as a constant (the survey's "near 1").
CONSTANT = 0.9


def mean_cosine(
    vectors: Float[Tensor, "inputs rows dim"],
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Mean pairwise cosine of rows of different inputs, and of different rows of one input; zero vectors do not
    count."""
    size = vectors.float().norm(dim=-1, keepdim=True)
    unit = torch.where(size > 0, vectors.float() / size.clamp(min=1e-30), 0.0)
    count = (size > 0).float().sum((1, 2))
    sums = unit.sum(1)
    within = (sums.square().sum(-1) - count).sum() / (count.square() - count).sum()
    total, number = sums.sum(0), count.sum()
    across = (total.square().sum() - sums.square().sum()) / (number.square() - count.square().sum())
    return across, within


class _Bias(Observer):
    """b_t by layer, (inputs, heads, rows, dim), and the mean share on the set by head."""

    reads_weights = True

    def __init__(self, places: Places) -> None:
        self.places = places
        self.vectors: dict[int, Tensor] = {}
        self.share: dict[int, Tensor] = {}

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        column = marked_keys(call, self.places, "sinks")
        parts, share = [], []
        for rows in torch.arange(call.queries, device=call.query.device).split(DEFAULT_BLOCK):
            own = call.weights(rows) * column
            parts.append(grouped_values(own, call.value.float()))
            share.append(own.sum(-1))
        seen = call.visible()
        counts = ((seen & ~column).any(-1) & (seen & column).any(-1)).any(1).any(0)
        self.vectors[call.site.layer] = torch.cat(parts, 2)[:, :, counts].cpu()
        self.share[call.site.layer] = torch.cat(share, 2)[:, :, counts].mean((0, 2)).cpu()

    def result(self) -> dict[int, Tensor]:
        return self.vectors


@torch.no_grad()
def contributions(
    model: nn.Module, ids: Int[Tensor, "inputs tokens"], *, sinks: Places = (0,)
) -> tuple[dict[int, Float[Tensor, "inputs heads rows dim"]], dict[int, Float[Tensor, " heads"]]]:
    """b_t of every head for unpadded inputs of one length, and the mean share that it rests on."""
    if ids.shape[0] < 2:
        raise ArgumentError(f"ids: got {ids.shape[0]} input, expected at least 2: cosines are taken across inputs.")
    observer = _Bias(sinks)
    with attach(model, observer):
        model(input_ids=ids, use_cache=False)
    return observer.vectors, observer.share


def implicit_bias(
    model: nn.Module,
    ids: Int[Tensor, "inputs tokens"],
    *,
    sinks: Places = (0,),
    heads: Sequence[tuple[int, int]] | None = None,
    loss: bool = False,
) -> Finding:
    """The mean over heads of the mean cosine of b_t across inputs. Heads that sink (share at least 0.3) count, or those
    that `heads` names, whatever their share. `loss` adds the causal form: the loss with b_t replaced by its mean over
    rows and inputs, in the same heads."""
    vectors, share = contributions(model, ids, sinks=sinks)
    every = [(layer, head) for layer, s in share.items() for head in range(s.numel())]
    chosen = list(heads) if heads is not None else [(la, h) for la, h in every if share[la][h] >= SINKS_FROM]
    table = []
    for layer, head in chosen:
        across, within = mean_cosine(vectors[layer][:, head])
        table.append({"layer": layer, "head": head, "share": float(share[layer][head]), "across": float(across),
                      "within": float(within)})  # fmt: skip
    known = [row["across"] for row in table if row["across"] == row["across"]]
    value = sum(known) / len(known) if known else float("nan")
    details: dict[str, Any] = {"heads": table, "of": len(every)}
    if loss and chosen:
        means: dict[int, dict[int, Tensor]] = {}
        for layer, head in chosen:
            means.setdefault(layer, {})[head] = vectors[layer][:, head].mean((0, 1))
        details["loss"] = _loss(model, ids)
        with use(model, ConstantSink(means=means, sinks=sinks)):
            details["loss_with_constant"] = _loss(model, ids)
        with use(model, ConstantSink(means=means, sinks=sinks, keep=False)):
            details["loss_without"] = _loss(model, ids)
    return judged(
        "implicit bias",
        value,
        at_least=CONSTANT,
        sentence=f"what the set adds has a mean cosine of {value:.2f} across inputs in {len(table)} heads",
        requires=(bool(table), "no head gives the set enough attention"),
        details=details,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class ConstantSink(Editor):
    """Puts a constant in the place of what the sinks add: o_t ← Σ_{j ∉ S} w_tj v_j + b̄, in the heads that `means`
    names by layer and head. `keep=False` leaves the constant out. Rows of the sinks themselves stay as they are."""

    means: Mapping[int, Mapping[int, Float[Tensor, " dim"]]]
    sinks: Places = (0,)
    keep: bool = True

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self" and site.layer in self.means

    def _changed_rows(self, call: AttentionCall, rows: Tensor) -> Tensor:
        """Rows that see the sinks and something else, (batch, 1, rows)."""
        column, seen = marked_keys(call, self.sinks, "sinks"), call.visible(rows)
        return ((seen & ~column).any(-1) & (seen & column).any(-1)).any(1, keepdim=True)

    def edit_weights(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        column = marked_keys(call, self.sinks, "sinks")
        here = torch.zeros(call.heads, dtype=torch.bool, device=weights.device)
        here[list(self.means[call.site.layer])] = True
        gone = column & self._changed_rows(call, rows)[..., None] & here.view(1, -1, 1, 1)
        return weights.masked_fill(gone, 0.0)

    def edit_output(self, call: AttentionCall, output: Tensor, lse: Tensor | None) -> Tensor:
        if not self.keep:
            return output
        rows = torch.arange(call.queries, device=output.device)
        added = torch.zeros(call.heads, output.shape[3], device=output.device)
        for head, mean in self.means[call.site.layer].items():
            added[head] = mean.to(added)
        changed = self._changed_rows(call, rows)[..., None]
        return (output.float() + changed * added[None, :, None]).to(output.dtype)


@torch.no_grad()
def _loss(model: nn.Module, ids: Tensor) -> float:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
    return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))
