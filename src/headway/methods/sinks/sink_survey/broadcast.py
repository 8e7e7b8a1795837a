"""Head broadcast: the head that sinks most gives its map to other heads of its layer.

    A_h ← A_h*  for h ∈ H ,   h* = argmax_h mean_i Σ_{s ∈ S} A^h_is

The survey (arXiv 2604.10098) lists it for image models, where the map of the densest sink head is the clearest. The
choice of h* here is made beforehand, on a text or picture of the user's (`densest_heads`): a choice from the rows of
the prompt at hand would look ahead in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.attach import observe as attach
from headway.door.call import AttentionCall, Site
from headway.door.stages import Editor, Observer
from headway.errors import ArgumentError
from headway.kernels.dense import DEFAULT_BLOCK
from headway.methods.sinks.sink_survey.places import (
    Places,
    check_heads_of,
    heads_in,
    marked_keys,
)


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadBroadcast(Editor):
    """Copies one head's weights to others: `headway.use(model, HeadBroadcast(sources=densest_heads(model, inputs)))`.

    sources: the head whose map is copied, by layer; other layers are left alone. heads: by layer, the heads that get
    it; a layer that is not named gives it to all its heads."""

    sources: Mapping[int, int]
    heads: Mapping[int, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        for layer in self.heads or ():
            if layer not in self.sources:
                raise ArgumentError(f"heads: got layer {layer}, which has no source; expected layers of `sources`.")

    def acts_at(self, site: Site) -> bool:
        return site.kind != "cross" and site.layer in self.sources

    def prepare(self, sites: Sequence[Site]) -> None:
        named = [(layer, head) for layer, heads in (self.heads or {}).items() for head in heads]
        check_heads_of([*self.sources.items(), *named], sites)

    def heads_at(self, site: Site) -> list[int]:
        chosen = (self.heads or {}).get(site.layer, range(site.heads))
        return sorted({self.sources[site.layer], *chosen})

    def edit_weights(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        here, _ = heads_in(call, self.heads_at(call.site))
        (source,), _ = heads_in(call, [self.sources[call.site.layer]])
        weights = weights.clone()
        weights[:, here] = weights[:, source : source + 1].clone()
        return weights


@dataclass(frozen=True, kw_only=True)
class _SinkDensity(Observer):
    """Mean weight on some keys, by layer and head, over the rows that see another key as well."""

    sinks: Places
    found: dict[int, list[Tensor]]
    reads_weights = True

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        column, padded = marked_keys(call, self.sinks, "sinks"), call.padded_rows()
        total = torch.zeros(call.heads, 2, device=call.query.device)
        for rows in torch.arange(call.queries, device=call.query.device).split(DEFAULT_BLOCK):
            seen = call.visible(rows)
            counts = (seen & ~column).any(-1) & (seen & column).any(-1)
            if padded is not None:
                counts = counts & ~padded[:, None, rows]
            mass = (call.weights(rows) * column).sum(-1)
            counts = counts.expand_as(mass)
            total[:, 0] += (mass * counts).sum((0, 2))
            total[:, 1] += counts.sum((0, 2))
        self.found.setdefault(call.site.layer, []).append(total)

    def result(self) -> dict[int, Float[Tensor, " heads"]]:
        sums = {layer: torch.stack(parts).sum(0) for layer, parts in self.found.items()}
        return {layer: total[:, 0] / total[:, 1].clamp(min=1) for layer, total in sums.items()}


def sink_density(
    model: nn.Module, inputs: Mapping[str, Any], *, sinks: Places = (0,)
) -> dict[int, Float[Tensor, " heads"]]:
    """Mean attention on the sinks, by layer and head, in one forward of `inputs`."""
    observer = _SinkDensity(sinks=sinks, found={})
    with attach(model, observer), torch.no_grad():
        model(**inputs)
    return observer.result()


def densest_heads(
    model: nn.Module, inputs: Mapping[str, Any], *, sinks: Places = (0,), least: float = 0.0
) -> dict[int, int]:
    """The head with most attention on the sinks, by layer; layers where that is below `least` are left out."""
    density = sink_density(model, inputs, sinks=sinks)
    return {layer: int(d.argmax()) for layer, d in density.items() if float(d.max()) >= least}
