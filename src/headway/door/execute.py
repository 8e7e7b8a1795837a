"""Runs one attention operation with what selectors and editors ask for, and says which path it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
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
    log-sum-exp, and how it was made: the path's name, the density of every query head (selected over visible pairs)
    and of all of them, and the seconds spent on selecting and executing."""

    call: AttentionCall
    output: Tensor
    lse: Tensor | None
    path: str
    density: float
    density_by_head: Float[Tensor, " heads"]
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
        chosen, visible = selected_pairs(selections[0], call)
        shares = float(chosen.sum() / visible.sum()), chosen / visible
        if all(s.approximates for s in selectors) and dense_is_faster(call.keys, shares[0]) and not changed:
            return "native: dense is as fast"
        return _sparse(call, selections[0], shares, titles, start)
    density, by_head = 1.0, torch.ones(call.heads, dtype=torch.float64)
    if selections:
        selected = _as_mask(selections[0], call)
        for selection in selections[1:]:
            selected = selected & _as_mask(selection, call)
        seen = call.visible()
        narrowed = seen & selected
        read, visible = _pairs_by_head(narrowed, call), _pairs_by_head(seen, call)
        density, by_head = float(read.sum() / visible.sum()), read / visible
        before, call = call, call.replace(mask=narrowed)
        refuse_emptied_rows(before, call, titles)
    chosen_at = time.perf_counter()
    output, lse = _attend(call, inside)
    path = "masked" if selections else ("edited" if inside else "dense")
    return Executed(call, output, lse, path, density, by_head, chosen_at - start, time.perf_counter() - chosen_at)


def selection_density(selection: Selection, call: AttentionCall) -> float:
    """Selected over visible pairs of all heads."""
    chosen, visible = selected_pairs(selection, call)
    return float(chosen.sum() / visible.sum())


def selected_pairs(
    selection: Selection, call: AttentionCall
) -> tuple[Float[Tensor, " heads"], Float[Tensor, " heads"]]:
    """Selected and visible pairs of every query head, in double precision on the CPU and as means over the batch, both
    up to one factor. Padding is left out of the count (a selection of keys counts what is listed)."""
    seen = (call.query_positions + 1 - call.first_key).clamp(max=call.keys) if call.causal else None
    if isinstance(selection, Blocks) and selection.within is None:
        pairs = selection.mask.pairs(causal=call.causal)
        inside = selection.mask.blocks.double().mean(0).cpu() * pairs
        return _over_heads(inside.sum((1, 2)), call), _over_heads(pairs.sum()[None], call)
    if isinstance(selection, Blocks):
        visible = call.visible()
        return _pairs_by_head(visible & _as_mask(selection, call), call), _pairs_by_head(visible, call)
    if isinstance(selection, Window):
        reach = torch.full((call.queries,), call.keys, device=call.query.device) if seen is None else seen
        inside = reach.clamp(max=selection.window) + (reach - selection.window).clamp(0, selection.sinks)
        return _over_heads(inside.double().sum()[None], call), _over_heads(reach.double().sum()[None], call)
    if isinstance(selection, Keys):
        rows = row_block(selection.index, call.queries, selection.query_block)
        index, valid = unique_keys(selection.index, selection.valid, call.keys)
        if seen is None:
            listed, visible = valid, valid.new_full((1,), call.keys, dtype=torch.float64)
        else:
            starts = torch.arange(index.shape[2], device=index.device) * rows
            middle = seen[(starts + rows // 2).clamp(max=call.queries - 1)]
            listed, visible = (index < middle[:, None]) & valid, middle.double().mean()[None]
        return _over_heads(listed.double().sum(-1).mean((0, 2)), call), _over_heads(visible, call)
    return _over_heads(torch.ones(1), call), _over_heads(torch.ones(1), call)


def _pairs_by_head(mask: Bool[Tensor, "#batch #heads queries keys"], call: AttentionCall) -> Float[Tensor, " heads"]:
    return _over_heads(mask.double().mean((0, 2, 3)), call)


def _over_heads(values: Float[Tensor, " #heads"], call: AttentionCall) -> Float[Tensor, " heads"]:
    """Values of query heads from those of query heads, of key heads, or one for all."""
    values = values.double().cpu()
    return values.expand(call.heads) if values.numel() == 1 else values.repeat_interleave(call.heads // values.numel())


def _sparse(
    call: AttentionCall, selection: Selection, shares: tuple[float, Tensor], titles: str, start: float
) -> Executed:
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
    return Executed(call, output, lse, path, *shares, chosen - start, time.perf_counter() - chosen)


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
            output[:, index, span], lse[:, index, span] = merged.to(output.dtype), total.to(lse.dtype)
    read = [0] * heads
    for (at, _), members in groups.items():
        pairs = sum(part.keys * part.queries for part in members)
        for head in range(heads) if at is None else at:
            read[head] += pairs
    logical = call.keys + (0 if call.first_key is None else call.first_key)
    visible = max(logical * queries, 1)
    density = min(sum(read) / (visible * heads), 1.0)
    by_head = torch.tensor([min(pairs / visible, 1.0) for pairs in read], dtype=torch.float64)
    whole = parts[0] if len(parts) == 1 and parts[0].of_heads is None else call
    return Executed(whole, output, lse, "policy", density, by_head, read_seconds, time.perf_counter() - start)


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
            output, lse = output.index_copy(1, index, some), lse.index_copy(1, index, some_lse.to(lse.dtype))
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
