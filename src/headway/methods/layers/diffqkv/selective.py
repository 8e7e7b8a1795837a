"""Selective values (Sel.V): a query reads the rows of V with its largest weights, and no others.

    S = top-k_j p_ij ,   o_i = Σ_{j∈S} p_ij v_j / Σ_{j∈S} p_ij

All scores are computed, which needs all keys. The paper takes k = 100 and does not say whether the kept weights are
made to sum to one; the top-k attention it builds on does so, and so do the defaults here.

Three forms: `DiffQKV(selective_values=k)` in a model of ours; `SelectiveValues`, a selector that makes any host's
decoding steps read k values per query head; `SelectedWeights`, an editor that shows what the choice would do to a
host's output at every position. The editor computes dense weights, and saves nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.door.selection import Dense, Keys
from headway.door.stages import Editor, Observer, Selector
from headway.kernels.unequal import check_top, covered_mass, safe_softmax, strongest

#: The paper's number of values.
TOP = 100


def keep_strongest(
    weights: Float[Tensor, "batch heads rows keys"], top: int, *, renormalize: bool = True
) -> Float[Tensor, "batch heads rows keys"]:
    """The weights with all but the `top` largest of each row at zero."""
    kept, columns = strongest(weights, top, renormalize=renormalize)
    return torch.zeros_like(weights).scatter(-1, columns, kept)


class TopWeights:
    """How logits become weights under Sel.V, for observers: softmax, then the `top` largest of each row."""

    def __init__(self, top: int, *, renormalize: bool = True) -> None:
        check_top(top)
        self.top, self.renormalize = top, renormalize
        self.name = f"softmax over the {top} largest"
        self.whole = renormalize

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        return keep_strongest(safe_softmax(logits, visible), self.top, renormalize=self.renormalize)


@dataclass(frozen=True, kw_only=True)
class SelectiveValues(Selector):
    """Decoding steps read the `top` keys of largest weight per query head, and their values; weights sum to one.

    Every key is read to choose, so this has no budget of keys (`headway compare` leaves it out); what it saves are the
    values that are not read. Prefill stays dense."""

    top: int = TOP

    phases = frozenset({"decode"})

    def __post_init__(self) -> None:
        check_top(self.top)

    def select(self, call: AttentionCall) -> Keys | Dense:
        if call.keys <= self.top:
            return Dense()
        logits = call.logits()
        best = logits.topk(self.top, dim=-1)
        return Keys(best.indices, best.values > -torch.inf)


@dataclass(frozen=True, kw_only=True)
class SelectedWeights(Editor):
    """Sets all but the `top` largest weights of a row to zero, in prefill and decoding. For measuring what Sel.V
    does to a host's answers; it computes every weight, so it saves nothing."""

    top: int = TOP
    renormalize: bool = True

    reads_parts = frozenset({"prefill", "decode"})

    def __post_init__(self) -> None:
        check_top(self.top)

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        return keep_strongest(weights, self.top, renormalize=self.renormalize)


class CoveredMass(Observer):
    """How much of each row's mass its largest weights hold: mean and smallest head mean for each of `tops`.

    Rows with fewer visible keys than the number asked are left out, as are padded ones: they are covered whole."""

    reads_weights = True

    def __init__(self, tops: tuple[int, ...] = (8, 32, TOP)) -> None:
        for top in tops:
            check_top(top)
        self.tops = tops
        self.start()

    def start(self) -> None:
        self._sums: dict[int, dict[int, tuple[Tensor, int]]] = {top: {} for top in self.tops}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.kind != "self":
            return
        padded = call.padded_rows()
        for start in range(0, call.queries, 64):
            rows = torch.arange(start, min(start + 64, call.queries), device=call.query.device)
            weights, seen = call.weights(rows), call.visible(rows)
            counts = seen.sum(-1).expand(weights.shape[:3])
            for top in self.tops:
                counted = counts > top
                if padded is not None:
                    counted = counted & ~padded[:, None, rows]
                mass = torch.where(counted, covered_mass(weights, top), 0.0).double().sum((0, 2))
                before, number = self._sums[top].get(call.site.layer, (torch.zeros_like(mass), 0))
                self._sums[top][call.site.layer] = (before + mass, number + int(counted[:, 0].sum()))

    def result(self) -> dict[int, dict[str, float]]:
        """For each number of values: mean over heads and rows, the least of the head means, and rows per head."""
        found = {}
        for top, layers in self._sums.items():
            means = [mass / number for mass, number in layers.values() if number]
            every = torch.cat(means) if means else torch.full((1,), math.nan, dtype=torch.float64)
            rows = sum(number for _, number in layers.values())
            found[top] = {"mean": float(every.mean()), "least": float(every.min()), "rows": rows}
        return found
