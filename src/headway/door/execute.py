"""Runs one attention operation with what selectors and editors ask for, and says which path it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headway.door.call import AttentionCall
from headway.door.selection import Blocks, Dense, Keys, Selection, Window
from headway.door.stages import Editor, Selector
from headway.errors import ArgumentError, ConflictError, EmptyRowError
from headway.kernels.block_sparse import Band, block_sparse_attention, dense_is_faster
from headway.kernels.dense import dense_attention, grouped_values, normalise
from headway.kernels.fused import fused_attention, merge_attention
from headway.kernels.gathered import gathered_attention, row_block, unique_keys
from headway.kernels.weighing import part_of

#: Tokens per block of a sink-and-window selection.
WINDOW_BLOCK = 128


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


def execute(
    call: AttentionCall,
    selectors: Sequence[Selector],
    editors: Sequence[Editor],
    *,
    changed: bool = True,
    masked: bool = False,
) -> Executed | str:
    """Selectors intersect, editors of weights apply in the given order inside the kernel. One selection alone runs by
    the sparse kernels; several, or `masked` (somebody reads the weights of what was selected), by one boolean mask.

    A string, the name of the path, when the host's own kernel is to run: every selector asks for everything or gives
    way to dense attention, no editor asks for weights, and the call is not `changed` from what the host sent."""
    start = time.perf_counter()
    selections = [s for s in (selector.select(call) for selector in selectors) if not isinstance(s, Dense)]
    inside = [e for e in editors if "weights" in e.edits]
    if not selections and not inside and not changed:
        return "native"
    titles = " and ".join(s.title for s in selectors)
    plain = call.weighing is None
    if len(selections) == 1 and plain and not inside and not masked and not call.dropout and call.bias is None:
        density = selection_density(selections[0], call)
        if all(s.approximates for s in selectors) and dense_is_faster(call.keys, density) and not changed:
            return "native: dense is as fast"
        return _sparse(call, selections[0], density, titles, start)
    density = 1.0
    if selections:
        selected = _as_mask(selections[0], call)
        for selection in selections[1:]:
            selected = selected & _as_mask(selection, call)
        seen = call.visible()
        narrowed = seen & selected
        density = float(narrowed.double().mean() / seen.expand_as(narrowed).double().mean())
        before, call = call, call.replace(mask=narrowed)
        refuse_emptied_rows(before, call, titles)
    chosen = time.perf_counter()
    output, lse = _attend(call, inside)
    path = "masked" if selections else ("edited" if inside else "dense")
    return Executed(call, output, lse, path, density, chosen - start, time.perf_counter() - chosen)


def selection_density(selection: Selection, call: AttentionCall) -> float:
    """Selected over visible pairs, padding left out of the count (a selection of keys counts what is listed)."""
    if isinstance(selection, Blocks):
        if selection.within is None:
            return selection.mask.density(causal=call.causal)
        visible = call.visible()
        chosen = visible & _as_mask(selection, call)
        return float(chosen.double().mean() / visible.expand_as(chosen).double().mean())
    seen = (call.query_positions + 1 - call.first_key).clamp(max=call.keys) if call.causal else None
    if isinstance(selection, Window):
        reach = torch.full((call.queries,), call.keys, device=call.query.device) if seen is None else seen
        inside = reach.clamp(max=selection.window) + (reach - selection.window).clamp(0, selection.sinks)
        return float(inside.double().sum() / reach.double().sum())
    if isinstance(selection, Keys):
        rows = row_block(selection.index, call.queries, selection.query_block)
        index, valid = unique_keys(selection.index, selection.valid, call.keys)
        if seen is None:
            return float(valid.double().sum(-1).mean() / call.keys)
        starts = torch.arange(index.shape[2], device=index.device) * rows
        middle = seen[(starts + rows // 2).clamp(max=call.queries - 1)]
        return float(((index < middle[:, None]) & valid).double().sum(-1).mean() / middle.double().mean())
    return 1.0


def _sparse(call: AttentionCall, selection: Selection, density: float, titles: str, start: float) -> Executed:
    """One selection by the kernel made for it."""
    chosen = time.perf_counter()
    common: dict[str, Any] = {
        "scale": call.scale,
        "causal": call.causal,
        "offset": call.offset,
        "mask": call.mask,
        "softcap": call.softcap,
        "sinks": call.sinks,
    }
    tensors = call.query, call.key, call.value
    if isinstance(selection, Keys):
        path = "keys"
        output, lse = gathered_attention(
            *tensors, selection.index, selection.valid, query_block=selection.query_block, **common
        )
    elif isinstance(selection, Blocks):
        path, grid = "blocks", selection.mask
        if (grid.queries, grid.keys) != (call.queries, call.keys):
            selection.to_bool(call.queries, call.keys)
        if selection.within is not None:
            common["mask"] = selection.within if call.mask is None else selection.within & call.mask
        output, lse = block_sparse_attention(
            *tensors, grid.blocks, query_block=grid.query_block, key_block=grid.key_block, **common
        )
    elif isinstance(selection, Window):
        path = "window"
        rows, columns = (min(WINDOW_BLOCK, n) for n in (call.queries, call.keys))
        every = torch.ones(1, 1, -(-call.queries // rows), -(-call.keys // columns), dtype=torch.bool)
        band = Band(selection.sinks, selection.window)
        common["causal"] = True
        output, lse = block_sparse_attention(
            *tensors, every.to(call.query.device), query_block=rows, key_block=columns, band=band, **common
        )
    else:
        raise ArgumentError(f"selection: got {selection!r}, expected Dense, Window, Blocks or Keys.")
    _refuse_lost_rows(call, lse, titles)
    return Executed(call, output, lse, path, density, chosen - start, time.perf_counter() - chosen)


def _refuse_lost_rows(call: AttentionCall, lse: Tensor, titles: str) -> None:
    """Raises EmptyRowError when a row that could see a key has none left in the selection."""
    if call.sinks is not None:
        return
    empty = (lse == -torch.inf).flatten(0, 1).any(0).nonzero()[:, 0]
    if empty.numel() == 0:
        return
    lost = (lse[:, :, empty] == -torch.inf) & call.visible(empty).any(-1)
    if bool(lost.any()):
        row = int(empty[lost.flatten(0, 1).any(0).nonzero()[0, 0]])
        raise EmptyRowError(
            f"{titles} at {call.site.name}: query {row} has no visible key left, expected at least one. Leave the "
            "diagonal, a sink or an earlier key visible."
        )


def execute_parts(
    call: AttentionCall, parts: Sequence[AttentionCall], editors: Sequence[Editor], policy: str, read_seconds: float
) -> Executed:
    """Runs the calls that a cache policy put in place of `call` and puts their outputs together."""
    start = time.perf_counter()
    inside = [e for e in editors if "weights" in e.edits]
    groups: dict[tuple[tuple[int, ...] | None, tuple[int, int] | None], list[AttentionCall]] = {}
    for part in parts:
        at = None if part.of_heads is None else tuple(part.of_heads.tolist())
        groups.setdefault((at, part.of_rows), []).append(part)
    batch, heads, queries, _ = call.query.shape
    output = call.query.new_zeros(batch, heads, queries, call.value.shape[3])
    lse = torch.full((batch, heads, queries), -torch.inf, device=call.query.device)
    for (at, rows), members in groups.items():
        if inside and len(members) > 1:
            raise ConflictError(
                f"methods at {call.site.name}: got {inside[0].title}, which edits weights, on keys that {policy} reads "
                "in several parts of one softmax; expected whole rows. Use them in separate scopes."
            )
        done = [_attend(member, inside) for member in members]
        outputs, normalisers = zip(*done, strict=True)
        merged, total = merge_attention(outputs, normalisers) if len(done) > 1 else (outputs[0], normalisers[0])
        if at is None and rows is None:
            output, lse = merged, total
        else:
            index = slice(None) if at is None else torch.tensor(at, device=output.device)
            span = slice(None) if rows is None else slice(*rows)
            output[:, index, span], lse[:, index, span] = merged.to(output.dtype), total
    read = sum(part.keys * part.heads * part.queries for part in parts) / max(queries, 1)
    logical = call.keys + (0 if call.first_key is None else call.first_key)
    density = min(read / max(logical * heads, 1), 1.0)
    whole = parts[0] if len(parts) == 1 and parts[0].of_heads is None else call
    return Executed(whole, output, lse, "policy", density, read_seconds, time.perf_counter() - start)


def _attend(call: AttentionCall, editors: Sequence[Editor]) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a call with editors of weights inside; the fused kernel where it can do it."""
    if call.weighing is not None:
        return _attend_weighed(call, editors)
    if call.tell is not None:
        return _attend_telling(call, call.tell, editors)
    plain = call.bias is None and call.softcap is None and call.sinks is None and not call.dropout
    square = not call.causal or call.offset == call.keys - call.queries
    if plain and square and not editors:
        return fused_attention(call.query, call.key, call.value, scale=call.scale, causal=call.causal, mask=call.mask)

    named = _named_heads(call, editors)
    if named is not None:
        output, lse = _attend(call, [])
        if named:
            some, some_lse = _attend(over_heads(call, named), editors)
            index = torch.tensor(named, device=output.device)
            output, lse = output.index_copy(1, index, some), lse.index_copy(1, index, some_lse)
        return output, lse

    def edit(weights: Tensor, rows: Tensor) -> Tensor:
        for editor in editors:
            weights = editor.edit_weights(call, weights, rows)
        return weights

    return dense_attention(
        call.query,
        call.key,
        call.value,
        sinks=call.sinks,
        edit=edit if editors else None,
        dropout=call.dropout,
        empty_rows="zero",
        **call.arguments(),
    )


def _attend_telling(
    call: AttentionCall, tell: Callable[[Tensor, Tensor], None], editors: Sequence[Editor]
) -> tuple[Tensor, Tensor]:
    """The same from logits that somebody else needs as well: keys are read once, where a fused kernel and scores of
    one's own would read them twice."""
    logits = call.logits()
    weights, lse = normalise(logits, call.sinks)
    for editor in editors:
        weights = editor.edit_weights(call, weights, torch.arange(call.queries, device=call.query.device))
    if call.dropout:
        weights = torch.nn.functional.dropout(weights, call.dropout)
    output = grouped_values(weights.to(call.value.dtype), call.value)
    tell(logits, lse)
    return output, lse


def _attend_weighed(call: AttentionCall, editors: Sequence[Editor]) -> tuple[Tensor, Tensor]:
    """The same where weights are no softmax: by the explicit weights, and ln Σ|w| for the log-sum-exp."""
    if not editors:
        return call.attend()
    weights, rows = call.weights(), torch.arange(call.queries, device=call.query.device)
    for editor in editors:
        weights = editor.edit_weights(call, weights, rows)
    seen = call.visible().any(-1).expand(weights.shape[:3])
    size = weights.abs().sum(-1).clamp(min=1e-30).log().masked_fill(~seen, -torch.inf)
    return grouped_values(weights.to(call.value.dtype), call.value), size


def _named_heads(call: AttentionCall, editors: Sequence[Editor]) -> list[int] | None:
    """The heads that editors of weights name at a site where they leave others alone; None for all heads."""
    if not editors or call.of_heads is not None:
        return None
    found: set[int] = set()
    for editor in editors:
        heads = editor.heads_at(call.site)
        if heads is None:
            return None
        found.update(heads)
    return sorted(found) if len(found) < call.heads else None


def over_heads(call: AttentionCall, heads: Sequence[int]) -> AttentionCall:
    """The call over some of its query heads, each with its own copy of the key head it reads."""
    index = torch.tensor(list(heads), device=call.query.device)
    shared = index // call.groups
    pick = {
        name: tensor[:, index]
        for name in ("mask", "bias")
        if (tensor := getattr(call, name)) is not None and tensor.shape[1] > 1
    }
    return call.replace(
        query=call.query[:, index],
        key=call.key[:, shared],
        value=call.value[:, shared],
        sinks=None if call.sinks is None else call.sinks[index],
        weighing=part_of(call.weighing, heads, call.heads),
        of_heads=index,
        **pick,
    )


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
    chosen = selection.to_bool(call.queries, call.keys, call.query.device)
    return chosen if chosen.shape[1] in (1, call.heads) else chosen.repeat_interleave(call.groups, 1)
