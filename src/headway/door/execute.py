"""Runs one attention operation with what selectors and editors ask for, and says which path it took."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headway.door.call import AttentionCall
from headway.door.selection import Dense, Selection
from headway.door.stages import Editor, Selector
from headway.errors import EmptyRowError
from headway.kernels.dense import dense_attention


@dataclass(frozen=True)
class Executed:
    """The call as it ran (selections are part of its mask), its output (batch, heads, queries, value_dim) and
    log-sum-exp, and how it was made: the path's name, the density (selected over visible pairs) and the seconds spent
    on selecting and executing."""

    call: AttentionCall
    output: Tensor
    lse: Tensor | None
    path: str
    density: float
    select_seconds: float
    execute_seconds: float


def execute(call: AttentionCall, selectors: Sequence[Selector], editors: Sequence[Editor]) -> Executed:
    """Selectors intersect, editors of weights apply in the given order inside the kernel."""
    start = time.perf_counter()
    selected: Tensor | None = None
    for selector in selectors:
        selection = selector.select(call)
        if not isinstance(selection, Dense):
            mask = _as_mask(selection, call)
            selected = mask if selected is None else selected & mask
    density = 1.0
    if selected is not None:
        seen = call.visible()
        narrowed = seen & selected
        density = float(narrowed.double().mean() / seen.expand_as(narrowed).double().mean())
        before, call = call, call.replace(mask=narrowed)
        refuse_emptied_rows(before, call, " and ".join(s.title for s in selectors))
    chosen = time.perf_counter()
    inside = [e for e in editors if "weights" in e.edits]

    def edit(weights: Tensor, rows: Tensor) -> Tensor:
        for editor in inside:
            weights = editor.edit_weights(call, weights, rows)
        return weights

    output, lse = dense_attention(
        call.query,
        call.key,
        call.value,
        sinks=call.sinks,
        edit=edit if inside else None,
        dropout=call.dropout,
        empty_rows="zero",
        **call.arguments(),
    )
    path = "masked" if selected is not None else ("edited" if inside else "dense")
    return Executed(call, output, lse, path, density, chosen - start, time.perf_counter() - chosen)


def refuse_emptied_rows(before: AttentionCall, after: AttentionCall, stage: str) -> None:
    """Raises EmptyRowError when a row that saw a key before an edit sees none after it."""
    if after.mask is before.mask and after.bias is before.bias:
        return
    lost = before.visible().any(-1) & ~after.visible().any(-1)
    if bool(lost.any()):
        row = int(torch.nonzero(lost.flatten(0, 1).any(0))[0, 0])
        raise EmptyRowError(
            f"{stage} at {before.site.name}: query {row} has no visible key left, expected at least one. Leave the "
            "diagonal, a sink or an earlier key visible."
        )


def _as_mask(selection: Selection, call: AttentionCall) -> Tensor:
    return selection.to_bool(call.queries, call.keys, call.query.device)
