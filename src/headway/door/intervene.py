"""Interventions: changes to attention that can be named, composed and taken back.

    HeadGate         o_h ← g · o_h                      at the input of the output projection
    UniformHeads     w_ij ← 1 / (number of visible keys): the running mean of v in a causal host
    SuppressBlocks   s_ij ← −inf for rows × columns; rows renormalise
    FixedPattern     w_ij ← a given map (also one recorded in another run: pattern swap)
    ZeroValues       v_j ← 0 for some keys; weights stay as they are

Positions are key positions of the whole sequence, so the same intervention means the same in one forward, in chunks and
in cached decode.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.capture import Captured, check_head_indices
from headway.door.stages import PHASES, Editor
from headway.errors import ArgumentError, unknown
from headway.kernels.dense import grouped_values

Heads = Sequence[tuple[int, int]]
#: Rows of a given pattern may miss a sum of one by this much.
PATTERN_TOLERANCE = 1e-3


class _OnHeads(Editor):
    """An editor that names its heads as (layer, head) pairs."""

    def pairs(self) -> list[tuple[int, int]]:
        raise NotImplementedError

    def acts_at(self, site: Site) -> bool:
        return any(layer == site.layer for layer, _ in self.pairs())

    def prepare(self, sites: Sequence[Site]) -> None:
        known = {site.layer: site for site in sites}
        for layer, head in self.pairs():
            if sites and layer not in known:
                raise unknown("layer", layer, sorted(known))
            if sites:
                check_head_indices([head], known[layer])

    def at(self, call: AttentionCall) -> list[int]:
        return [head for layer, head in self.pairs() if layer == call.site.layer]


@dataclass(frozen=True, kw_only=True)
class HeadGate(_OnHeads):
    """Multiplies the output of heads by a factor: 1 is the identity, 0 removes the head. Two gates multiply.

    `gates` maps (layer, head) to its factor."""

    gates: Mapping[tuple[int, int], float]
    reads_parts = PHASES

    def pairs(self) -> list[tuple[int, int]]:
        return list(self.gates)

    def edit_output(self, call: AttentionCall, output: Tensor, lse: Tensor | None) -> Tensor:
        factor = torch.ones(call.heads, dtype=output.dtype, device=output.device)
        for head in self.at(call):
            factor[head] = self.gates[call.site.layer, head]
        return output * factor.view(1, -1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class UniformHeads(_OnHeads):
    """Lets heads weigh all visible keys alike (AttentionInfluence's way of masking a head, arXiv 2505.07293)."""

    heads: Heads

    def pairs(self) -> list[tuple[int, int]]:
        return list(self.heads)

    def edit_output(self, call: AttentionCall, output: Tensor, lse: Tensor | None) -> Tensor:
        index = self.at(call)
        value = call.value[:, [h // call.groups for h in index]]
        output = output.clone()
        output[:, index] = self._mean(call, value, index).to(output.dtype)
        return output

    @staticmethod
    def _mean(call: AttentionCall, value: Tensor, index: list[int]) -> Tensor:
        if call.causal and call.mask is None and call.bias is None:
            total = value.double().cumsum(2)[:, :, call.offset :]
            seen = torch.arange(call.offset + 1, call.keys + 1, device=value.device)
            return total / seen[:, None]
        seen = call.visible().double()
        seen = seen[:, index] if seen.shape[1] > 1 else seen.expand(-1, len(index), -1, -1)
        seen = seen.expand(value.shape[0], -1, -1, -1)
        return grouped_values(seen / seen.sum(-1, keepdim=True).clamp(min=1), value.double())


@dataclass(frozen=True, kw_only=True)
class SuppressBlocks(Editor):
    """Hides key columns from query rows. `blocks` are ((row start, row stop), (column start, column stop)) in positions
    of the sequence, stop excluded; `heads` limits it to (layer, head) pairs. Rows renormalise over what stays visible;
    a row with nothing left raises EmptyRowError."""

    blocks: Sequence[tuple[tuple[int, int], tuple[int, int]]]
    heads: Heads | None = None

    def __post_init__(self) -> None:
        for rows, columns in self.blocks:
            for name, (start, stop) in (("rows", rows), ("columns", columns)):
                if not 0 <= start < stop:
                    raise ArgumentError(f"blocks: got {name} [{start}, {stop}), expected 0 ≤ start < stop.")

    def acts_at(self, site: Site) -> bool:
        return self.heads is None or any(layer == site.layer for layer, _ in self.heads)

    def prepare(self, sites: Sequence[Site]) -> None:
        if self.heads is not None:
            UniformHeads(heads=self.heads).prepare(sites)

    def edit_call(self, call: AttentionCall) -> AttentionCall:
        row, column = call.query_positions[:, None], call.key_positions[None]
        hidden = torch.zeros(call.queries, call.keys, dtype=torch.bool, device=call.query.device)
        for (first, last), (start, stop) in self.blocks:
            hidden |= (row >= first) & (row < last) & (column >= start) & (column < stop)
        shaped = hidden[None, None]
        if self.heads is not None:
            chosen = torch.zeros(call.heads, dtype=torch.bool, device=hidden.device)
            chosen[[h for layer, h in self.heads if layer == call.site.layer]] = True
            shaped = shaped & chosen.view(1, -1, 1, 1)
        if not bool(shaped.any()):
            return call
        return call.replace(mask=~shaped if call.mask is None else call.mask & ~shaped)


@dataclass(frozen=True, kw_only=True)
class FixedPattern(_OnHeads):
    """Replaces the weights of heads by given maps. `patterns` maps (layer, head) to (queries, keys) weights whose rows
    sum to one; row i is the query at position i, so a decode step reads its own row."""

    patterns: Mapping[tuple[int, int], Float[Tensor, "queries keys"]]

    def __post_init__(self) -> None:
        for place, pattern in self.patterns.items():
            total = pattern.float().sum(-1)
            if pattern.ndim != 2 or bool((pattern < 0).any()) or bool(((total - 1).abs() > PATTERN_TOLERANCE).any()):
                raise ArgumentError(
                    f"patterns: got one at {place} of shape {tuple(pattern.shape)} with row sums in "
                    f"[{float(total.min()):.3g}, "
                    f"{float(total.max()):.3g}], expected (queries, keys) of weights ≥ 0 with rows that sum to one."
                )

    def pairs(self) -> list[tuple[int, int]]:
        return list(self.patterns)

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        weights = weights.clone()
        for head in self.at(call):
            pattern = self.patterns[call.site.layer, head]
            length = int(call.query_positions[-1]) + 1
            if min(pattern.shape) < length:
                raise ArgumentError(
                    f"patterns: got {tuple(pattern.shape)} at layer {call.site.layer}, head {head}, expected at least "
                    f"({length}, {length}) for a sequence of {length} tokens."
                )
            chosen = torch.zeros(rows.numel(), call.keys, dtype=weights.dtype, device=weights.device)
            span = pattern.to(weights)[call.query_positions[rows], call.first_key : call.first_key + call.keys]
            chosen[:, : span.shape[1]] = span
            seen = call.visible(rows)
            seen = seen[:, head] if seen.shape[1] > 1 else seen[:, 0]
            if bool(((chosen > 0) & ~seen).any()):
                raise ArgumentError(
                    f"patterns: got weight on keys that layer {call.site.layer}, head {head} cannot see, expected "
                    "a map inside the host's mask."
                )
            weights[:, head] = chosen
        return weights

    @classmethod
    def recorded(cls, captured: Captured, heads: Heads, *, batch: int = 0) -> FixedPattern:
        """The patterns that heads had in another run, captured with what=("weights",)."""
        return cls(patterns={(layer, head): captured[layer]["weights"][batch, head] for layer, head in heads})


@dataclass(frozen=True, kw_only=True)
class ZeroValues(Editor):
    """Makes the values of some key positions zero, in all heads or in (layer, head) pairs. Weights are not changed, so
    the mass on those keys contributes nothing (value zeroing, arXiv 2301.12971)."""

    positions: Sequence[int]
    heads: Heads | None = None
    keeps_weights = True

    def acts_at(self, site: Site) -> bool:
        return self.heads is None or any(layer == site.layer for layer, _ in self.heads)

    def prepare(self, sites: Sequence[Site]) -> None:
        if self.heads is not None:
            UniformHeads(heads=self.heads).prepare(sites)

    def edit_weights(
        self,
        call: AttentionCall,
        weights: Float[Tensor, "batch heads rows keys"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        columns = [p - call.first_key for p in self.positions if 0 <= p - call.first_key < call.keys]
        chosen = range(call.heads) if self.heads is None else [h for layer, h in self.heads if layer == call.site.layer]
        keep = torch.ones(call.heads, call.keys, dtype=weights.dtype, device=weights.device)
        keep[torch.tensor(list(chosen))[:, None], torch.tensor(columns, dtype=torch.long)[None]] = 0.0
        return weights * keep[None, :, None]
