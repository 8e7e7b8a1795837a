"""What a selection of keys loses on recorded query, key and value, block by block, without a full map of pairs.

    kept mass     m_i = Σ_{j ∈ S(i)} w_ij / Σ_j w_ij ,   w: dense attention weights, S(i): keys selected for row i
    output error  e_i = ‖o_i^S − o_i‖₂ / ‖o_i‖₂ ,   relative L2, by row; over all rows  ‖O^S − O‖_F / ‖O‖_F

o^S renormalises over the selected keys, as an executor does; a learned sink stays in the denominator of both outputs,
and its own mass is not counted as a key's. Rows that see nothing are NaN. Work is O(rows × keys), memory
O(block × keys).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall
from headway.door.selection import Blocks, Dense, Keys, Selection, Window
from headway.errors import ArgumentError, EmptyRowError
from headway.kernels.dense import grouped_values, normalise
from headway.kernels.gathered import row_block, unique_keys

#: Query rows at a time.
BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class Fidelity:
    """By row: kept mass, relative output error, squared norms of error and dense output; `density` is selected over
    visible pairs. `rows` are the query rows that were looked at."""

    rows: Int[Tensor, " rows"]
    kept_mass: Float[Tensor, "batch heads rows"]
    error: Float[Tensor, "batch heads rows"]
    squared_error: Float[Tensor, "batch heads"]
    squared_norm: Float[Tensor, "batch heads"]
    density: float

    @property
    def output_error(self) -> float:
        """Relative L2 error of the whole output."""
        return float((self.squared_error.sum() / self.squared_norm.sum()).sqrt())

    @property
    def head_error(self) -> Float[Tensor, "batch heads"]:
        """Relative L2 error of each head's output."""
        return (self.squared_error / self.squared_norm).sqrt()

    def mean_mass(self) -> float:
        return float(self.kept_mass.double().nanmean())

    def mass_quantile(self, q: float = 0.05) -> float:
        """The kept mass below which a share `q` of all rows of all heads lies."""
        import numpy as np

        found = self.kept_mass[~self.kept_mass.isnan()].double().numpy()
        return float(np.quantile(found, q))

    def last_mass(self, rows: int = BLOCK) -> float:
        """Mean kept mass of the last `rows` rows: where a prompt's question stands."""
        return float(self.kept_mass[..., -rows:].double().nanmean())


@torch.no_grad()
def fidelity(
    call: AttentionCall, selection: Selection, *, rows: Int[Tensor, " rows"] | None = None, block: int = BLOCK
) -> Fidelity:
    """Compares a selection with dense attention on one call, such as a recorded one
    (`AttentionCall.from_tensors(query, key, value, causal=True)`).

    `rows` limits the work to some query rows. Raises EmptyRowError for a row that sees keys and keeps none of them,
    unless the head has a learned sink to fall back on."""
    index = torch.arange(call.queries, device=call.query.device) if rows is None else rows.to(call.query.device)
    if block < 1 or index.numel() == 0:
        raise ArgumentError(f"block, rows: got {block} and {index.numel()} rows, expected at least 1 of each.")
    masses, errors = [], []
    shape = call.query.shape[:2]
    squared_error, squared_norm = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
    selected_pairs = visible_pairs = 0.0
    for part in index.split(block):
        chosen = selected_keys(selection, part, call.queries, call.keys)
        if chosen.shape[1] not in (1, call.heads):
            chosen = chosen.repeat_interleave(call.groups, 1)
        logits = call.logits(part)
        visible = call.visible(part)
        kept = visible & chosen
        if call.sinks is None:
            _refuse_empty(visible, kept, part)
        weights, _ = normalise(logits, call.sinks)
        narrowed, _ = normalise(logits.masked_fill(~kept, -torch.inf), call.sinks)
        dense = grouped_values(weights, call.value.float())
        difference = grouped_values(narrowed, call.value.float()) - dense
        norm = dense.norm(dim=-1)
        blind = ~visible.any(-1).expand(*shape, part.numel())
        masses.append(((weights * kept).sum(-1) / weights.sum(-1)).masked_fill(blind, torch.nan).cpu())
        errors.append((difference.norm(dim=-1) / norm).masked_fill(blind, torch.nan).cpu())
        squared_error += difference.double().square().sum((-1, -2)).cpu()
        squared_norm += dense.double().square().sum((-1, -2)).cpu()
        selected_pairs += float(kept.expand_as(logits).sum())
        visible_pairs += float(visible.expand_as(logits).sum())
    return Fidelity(
        rows=index.cpu(),
        kept_mass=torch.cat(masses, 2),
        error=torch.cat(errors, 2),
        squared_error=squared_error,
        squared_norm=squared_norm,
        density=selected_pairs / visible_pairs,
    )


def selected_keys(
    selection: Selection, rows: Int[Tensor, " rows"], queries: int, keys: int
) -> Bool[Tensor, "#batch #heads rows keys"]:
    """Which keys a selection gives to some query rows: `selection.to_bool(queries, keys)[:, :, rows]`, without the
    rest of it."""
    column = torch.arange(keys, device=rows.device)
    if isinstance(selection, Dense):
        return torch.ones(1, 1, rows.numel(), keys, dtype=torch.bool, device=rows.device)
    if isinstance(selection, Window):
        position = (rows + keys - queries)[:, None]
        near = (column <= position) & (column > position - selection.window)
        return (near | ((column < selection.sinks) & (column <= position)))[None, None]
    if isinstance(selection, Blocks):
        mask = selection.mask
        if (mask.queries, mask.keys) != (queries, keys):
            raise ArgumentError(
                f"block mask: got one for {mask.queries} queries and {mask.keys} keys, expected {queries} and {keys}. "
                "Build it from the call it is used on."
            )
        chosen = mask.blocks.to(rows.device)[:, :, rows // mask.query_block][..., column // mask.key_block]
        return chosen if selection.within is None else chosen & selection.within.to(rows.device)[:, :, rows]
    if not isinstance(selection, Keys):
        raise ArgumentError(f"selection: got {type(selection).__name__}, expected Dense, Window, Blocks or Keys.")
    size = row_block(selection.index, queries, selection.query_block)
    lists, valid = unique_keys(selection.index.to(rows.device), selection.valid, keys)
    chosen = torch.zeros(*lists.shape[:2], rows.numel(), keys, dtype=torch.int32, device=rows.device)
    of = rows // size
    return chosen.scatter_add_(3, lists[:, :, of], valid[:, :, of].int()) > 0


def _refuse_empty(visible: Tensor, kept: Tensor, rows: Tensor) -> None:
    lost = visible.any(-1) & ~kept.any(-1)
    if bool(lost.any()):
        row = int(rows[lost.flatten(0, 1).any(0).nonzero()[0, 0]])
        raise EmptyRowError(
            f"selection: query {row} keeps no key that it can see, expected at least one. Keep the diagonal or a sink."
        )
