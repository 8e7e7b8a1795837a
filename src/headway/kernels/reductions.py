"""What attention weights say, without ever holding them: reductions over query blocks from q and k alone.

For each block of query rows the weights w_ij exist once, in O(block × keys) memory, and every reduction asked for is
taken from them before the next block:

    received      R_j  = Σ_i w_ij                      key          mass each key gets (Σ_i over rows that count)
    visible       N_j  = Σ_i 1[j visible from i]       key          rows that can see each key
    entropy       H_i  = −Σ_j w_ij ln w_ij             row, nats
    distance      D_i  = Σ_j w_ij |i − j|              row, tokens
    argmax        a_i  = argmax_j w_ij                 row, key index; −1 where nothing is visible
    first         F_i  = w_i0                          row
    previous      P_i  = w_i,i−1                       row (NaN for the first position)
    recent        W_i  = Σ_{|i − j| < window} w_ij     row
    span_mass     M_is = Σ_{j in span s} w_ij          row × span
    block_mean    B_st = mean of w_ij over visible pairs of segment s × segment t
    distance_histogram   mass by floor(log2 |i − j|), |i − j| = 0 apart; summed over rows
    top           the largest weights of each row; their keys come beside them as `top_index`, −1 for fill
    weights, logits      the selected rows themselves

With learned sinks the weights of a row sum to less than one and `entropy`, `distance` speak of the weights as they are.
With a `weighing` the weights are those it gives, of any sign, and `entropy` is that of |w| / Σ|w|.
Rows that see nothing are NaN in row statistics and add nothing to sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.kernels.dense import attention_logits, check_heads, normalise, soft_capped, visible_keys
from headway.kernels.rows import RowSample
from headway.kernels.weighing import Weighing, weighed_entropy

#: Elements of one block of weights: 1.2 M float32 are 5 MB and stay in the caches of a laptop.
BLOCK_ELEMENTS = 1_200_000
#: Stands for −inf inside the fast form, where 0 · −inf must be 0.
HIDDEN = -1e30

REDUCTIONS = (
    "received",
    "visible",
    "entropy",
    "distance",
    "argmax",
    "first",
    "previous",
    "recent",
    "span_mass",
    "block_mean",
    "distance_histogram",
    "top",
    "weights",
    "logits",
)


@dataclass
class Block:
    """The weights of some query rows against the first `weights.shape[-1]` keys (later keys are invisible to them)."""

    rows: Int[Tensor, " rows"]
    positions: Int[Tensor, " rows"]
    logits: Float[Tensor, "batch heads rows keys"]
    weights: Float[Tensor, "batch heads rows keys"]
    lse: Float[Tensor, "batch heads rows"]
    seen: Bool[Tensor, "#batch #heads rows keys"] | None
    empty: Bool[Tensor, "batch heads rows"] | None
    row_weight: Float[Tensor, "#batch rows"] | None
    causal: bool
    whole: bool
    weighed: bool = False

    def mass(self) -> Float[Tensor, "batch heads rows"] | float:
        """Row sums: one, unless there are learned sinks or rows that see nothing."""
        return 1.0 if self.whole else self.weights.sum(-1)

    def columns(self) -> Int[Tensor, " keys"]:
        return torch.arange(self.weights.shape[-1], device=self.weights.device)

    def visible(self) -> Bool[Tensor, "#batch #heads rows keys"]:
        if self.seen is not None:
            return self.seen
        if self.causal:
            return (self.columns() <= self.positions[:, None])[None, None]
        return torch.ones(1, 1, self.rows.numel(), self.weights.shape[-1], dtype=torch.bool, device=self.weights.device)

    def ranked(self) -> Float[Tensor, "batch heads rows keys"]:
        """The weights for finding the largest: where they may be negative, what is not visible stands below them."""
        return self.weights.masked_fill(~self.visible(), -torch.inf) if self.weighed else self.weights

    def nan_empty(self, statistic: Tensor) -> Tensor:
        if self.empty is None:
            return statistic
        return statistic.masked_fill(self.empty.view(*self.empty.shape, *(1,) * (statistic.ndim - 3)), torch.nan)

    def counted(self, x: Tensor) -> Tensor:
        """Rows times their sampling weight, zero where a row does not count."""
        return x if self.row_weight is None else x * self.row_weight[:, None, :, None]


@torch.no_grad()
def reduce_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    what: Sequence[str],
    *,
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    bias: Float[Tensor, "#batch #heads #queries keys"] | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    rows: RowSample | Int[Tensor, " rows"] | None = None,
    row_valid: Bool[Tensor, "batch queries"] | None = None,
    spans: Sequence[tuple[int, int]] | None = None,
    top: int = 8,
    window: int = 64,
    block: int | None = None,
    mode: str = "block",
    weighing: Weighing | None = None,
    workspace: dict[Any, Any] | None = None,
) -> dict[str, Tensor]:
    """The reductions named in `what`, each as (batch, heads, …) in float32 (or int64).

    `rows` limits the work to some query rows: a RowSample weights sums so that they estimate those of all rows.
    `row_valid` leaves out padding rows. `spans` are [start, stop) key ranges for `span_mass` and the segments of
    `block_mean`, `window` is the reach of `recent`. `mode="reference"` takes every reduction from the full
    matrix, by its definition. `workspace` is a dictionary in which calls that follow each other share their memory."""
    for name in what:
        if name not in REDUCTIONS:
            raise unknown("what", name, REDUCTIONS)
    if {"span_mass", "block_mean"} & set(what):
        check_spans(spans, key.shape[2])
    check_heads(query, key)
    keys, queries = key.shape[2], query.shape[2]
    common = {
        "scale": query.shape[3] ** -0.5 if scale is None else scale,
        "causal": causal,
        "offset": keys - queries if offset is None else offset,
        "mask": mask,
        "bias": bias,
        "softcap": softcap,
        "weighing": weighing,
    }
    index = _row_index(rows, queries, query.device)
    weight = _row_weight(rows, row_valid, index)
    if mode == "reference":
        return _reference(query, key, what, common, sinks, index, weight, spans, top, window)
    if mode != "block":
        raise ArgumentError(f"mode: got {mode!r}, expected 'reference' or 'block'.")
    step = block or max(BLOCK_ELEMENTS // max(query.shape[0] * query.shape[1] * keys, 1), 16)
    reducers = {name: _REDUCERS[name](query, key, spans, top, window) for name in what}
    key_columns = key.float().transpose(-1, -2)
    room = _room(query.shape[0] * query.shape[1] * min(step, index.numel()) * keys, query.device, workspace)
    for start in range(0, index.numel(), step):
        part = index[start : start + step]
        part_weight = None if weight is None else weight[:, start : start + step]
        piece = _weights(query, key_columns, part, part_weight, common, sinks, room)
        for reducer in reducers.values():
            reducer.update(piece)
    results = {name: reducer.result() for name, reducer in reducers.items()}
    if isinstance(found := reducers.get("top"), _Top):
        results["top_index"] = torch.cat(found.indices, 2)
    return results


def check_spans(spans: Sequence[tuple[int, int]] | None, keys: int) -> None:
    """Raises ArgumentError for spans that are missing, empty, out of range or overlapping."""
    if not spans:
        raise ArgumentError(
            "spans: got none, expected [start, stop) key ranges for span_mass or block_mean. Pass spans=[…]."
        )
    last = 0
    for start, stop in sorted(spans):
        if not 0 <= start < stop <= keys:
            raise ArgumentError(
                f"spans: got [{start}, {stop}), expected 0 ≤ start < stop ≤ {keys}. Clip it to the keys."
            )
        if start < last:
            raise ArgumentError(
                f"spans: got [{start}, {stop}), which overlaps the one before it; expected disjoint spans."
            )
        last = stop


def _row_index(rows: RowSample | Tensor | None, queries: int, device: torch.device) -> Tensor:
    if rows is None:
        return torch.arange(queries, device=device)
    index = (rows.index if isinstance(rows, RowSample) else rows).to(device)
    if index.numel() and (int(index.min()) < 0 or int(index.max()) >= queries):
        raise ArgumentError(f"rows: got {int(index.min())}..{int(index.max())}, expected 0..{queries - 1}.")
    return index


def _row_weight(rows: RowSample | Tensor | None, row_valid: Tensor | None, index: Tensor) -> Tensor | None:
    weight = None
    if isinstance(rows, RowSample) and not rows.exact:
        weight = rows.weight.to(index.device)[None]
    if row_valid is not None:
        valid = row_valid[:, index].float()
        weight = valid if weight is None else weight * valid
    return weight


def _weights(
    query: Tensor,
    key_columns: Tensor,
    rows: Tensor,
    row_weight: Tensor | None,
    common: dict[str, Any],
    sinks: Tensor | None,
    room: Float[Tensor, "2 elements"],
) -> Block:
    """The weights of some rows. Keys beyond what the last of the rows can see are left out of a causal call.

    Logits and weights are written to `room`, which the blocks share: memory that is made and dropped block by block in
    growing sizes costs more time than the arithmetic."""
    total = key_columns.shape[-1]
    positions = rows + common["offset"]
    keys = min(int(positions[-1]) + 1, total) if common["causal"] and rows.numel() else total
    keys = max(keys, 1)
    batch, heads, count = query.shape[0], query.shape[1], rows.numel()
    kv_heads = key_columns.shape[1]
    q = (query[:, :, rows].float() * common["scale"]).reshape(batch * kv_heads, -1, query.shape[3])
    k = key_columns[..., :keys].reshape(batch * kv_heads, query.shape[3], keys)
    logits, weights = room[:, : batch * heads * count * keys].view(2, batch, heads, count, keys)
    torch.bmm(q, k, out=logits.view(batch * kv_heads, q.shape[1], keys))
    softcap, bias, mask = common["softcap"], common["bias"], common["mask"]
    logits = soft_capped(logits, softcap)
    if bias is not None:
        logits = logits + (bias[:, :, rows] if bias.shape[2] > 1 else bias)[..., :keys].float()
        logits = logits.clamp(min=HIDDEN)
    seen = empty = None
    if mask is not None:
        narrow = mask[..., :keys]
        visible = visible_keys(rows, keys, causal=common["causal"], offset=common["offset"], mask=narrow)
        seen = narrow if visible is None else visible
        logits = logits.masked_fill(~seen, HIDDEN)
        empty = ~seen.any(-1).expand(batch, heads, count)
    elif common["causal"]:
        first = max(min(int(positions[0]) + 1, keys), 0)
        future = torch.arange(first, keys, device=rows.device) > positions[:, None]
        logits[..., first:].masked_fill_(future, HIDDEN)
        if int(positions[0]) < 0:
            empty = (positions < 0).expand(batch, heads, count)
    if common["weighing"] is not None:
        return _weighed(query, key_columns, rows, row_weight, common, logits, seen, empty)
    torch.ops.aten._softmax.out(logits, -1, False, out=weights)
    # The log-sum-exp follows from the largest entry: ln w_max = s_max − lse.
    lse = logits.amax(-1) - weights.amax(-1).log()
    if sinks is not None:
        full = torch.logaddexp(lse, sinks.float().view(1, -1, 1).expand_as(lse))
        weights = weights * torch.exp(lse - full)[..., None]
        lse = full
    whole = sinks is None
    if empty is not None and bool(empty.any()):
        weights = weights.masked_fill(empty[..., None], 0.0)
        whole = False
    return Block(rows, positions, logits, weights, lse, seen, empty, row_weight, common["causal"], whole)


def _weighed(
    query: Tensor,
    key_columns: Tensor,
    rows: Tensor,
    row_weight: Tensor | None,
    common: dict[str, Any],
    logits: Tensor,
    seen: Tensor | None,
    empty: Tensor | None,
) -> Block:
    """A block whose weights come from a weighing, of all keys: what is not visible has weight zero."""
    keys, positions = logits.shape[-1], rows + common["offset"]
    block = Block(
        rows, positions, logits, logits, logits[..., 0], seen, empty, row_weight, common["causal"], False, True
    )
    block.weights = common["weighing"](
        logits,
        block.visible(),
        positions=positions,
        query=query[:, :, rows].float(),
        key=key_columns[..., :keys].transpose(-1, -2),
    )
    return block


def _room(elements: int, device: torch.device, workspace: dict[Any, Any] | None) -> Float[Tensor, "2 elements"]:
    """Memory for the logits and the weights of one block, kept in the workspace when there is one."""
    token = ("reductions", device)
    kept = None if workspace is None else workspace.get(token)
    if kept is None or kept.shape[1] < elements:
        kept = torch.empty(2, elements, device=device)
        if workspace is not None:
            workspace[token] = kept
    return kept[:, :elements]


class _Reducer:
    def __init__(
        self, query: Tensor, key: Tensor, spans: Sequence[tuple[int, int]] | None, top: int, window: int
    ) -> None:
        self.batch, self.heads, self.keys = query.shape[0], query.shape[1], key.shape[2]
        self.device, self.spans, self.top, self.window = query.device, list(spans or ()), top, window
        self.parts: list[Tensor] = []
        self.start()

    def start(self) -> None:
        """Makes what is summed over blocks."""

    def update(self, block: Block) -> None:
        self.parts.append(block.nan_empty(self.row_statistic(block)))

    def row_statistic(self, block: Block) -> Tensor:
        raise NotImplementedError

    def result(self) -> Tensor:
        return torch.cat(self.parts, 2)

    def zeros(self, *shape: int) -> Tensor:
        return torch.zeros(self.batch, self.heads, *shape, device=self.device)


class _Received(_Reducer):
    def start(self) -> None:
        self.sum = self.zeros(self.keys)

    def update(self, block: Block) -> None:
        width = block.weights.shape[-1]
        if block.row_weight is None:
            self.sum[..., :width] += block.weights.sum(2)
            return
        row = block.row_weight[:, None, None].expand(-1, self.heads, -1, -1).expand(self.batch, -1, -1, -1)
        self.sum[..., :width] += (row.to(block.weights.dtype) @ block.weights)[:, :, 0]

    def result(self) -> Tensor:
        return self.sum


class _Visible(_Received):
    def update(self, block: Block) -> None:
        seen = block.counted(block.visible().float())
        self.sum[..., : seen.shape[-1]] += seen.sum(2)


class _Entropy(_Reducer):
    def row_statistic(self, block: Block) -> Tensor:
        if block.weighed:
            return weighed_entropy(block.weights)
        return block.mass() * block.lse - torch.linalg.vecdot(block.weights, block.logits)


class _Distance(_Reducer):
    def row_statistic(self, block: Block) -> Tensor:
        columns = block.columns()
        if not block.causal:
            gap = (block.positions[:, None] - columns).abs().to(block.weights.dtype)
            return torch.linalg.vecdot(block.weights, gap[None, None])
        back = (block.positions[0] - columns).to(block.weights.dtype)
        return block.weights @ back + block.mass() * (block.positions - block.positions[0])


class _ArgMax(_Reducer):
    def update(self, block: Block) -> None:
        found = block.ranked().argmax(-1)
        self.parts.append(found if block.empty is None else found.masked_fill(block.empty, -1))


class _First(_Reducer):
    def row_statistic(self, block: Block) -> Tensor:
        return block.weights[..., 0].clone()


class _Previous(_Reducer):
    def row_statistic(self, block: Block) -> Tensor:
        before = (block.positions - 1).clamp(0, block.weights.shape[-1] - 1)
        found = block.weights.gather(3, before.view(1, 1, -1, 1).expand(self.batch, self.heads, -1, 1))[..., 0]
        return found.masked_fill(block.positions < 1, torch.nan)


class _Recent(_Reducer):
    def row_statistic(self, block: Block) -> Tensor:
        first = max(int(block.positions[0]) - self.window + 1, 0)
        last = min(int(block.positions[-1]) + self.window, block.weights.shape[-1])
        gap = (block.positions[:, None] - torch.arange(first, last, device=self.device)).abs()
        return torch.linalg.vecdot(
            block.weights[..., first:last], (gap < self.window).to(block.weights.dtype)[None, None]
        )


class _SpanMass(_Reducer):
    def start(self) -> None:
        self.member = _membership(self.spans, self.keys, self.device)

    def row_statistic(self, block: Block) -> Tensor:
        return block.weights @ self.member[: block.weights.shape[-1]]


class _BlockMean(_Reducer):
    def start(self) -> None:
        count = len(self.spans)
        self.sum, self.pairs = self.zeros(count, count), self.zeros(count, count)
        self.bounds = torch.tensor(self.spans, device=self.device)

    def update(self, block: Block) -> None:
        place = block.positions[:, None]
        inside = (place >= self.bounds[:, 0]) & (place < self.bounds[:, 1])
        touched = inside.any(0).nonzero()[:, 0]
        member = inside[:, touched].to(block.weights.dtype).T
        # Only the segments of these rows change: the whole table is far larger than a block of weights.
        self.sum[:, :, touched] += member @ block.counted(self._by_span(block.weights))
        self.pairs[:, :, touched] += member @ block.counted(self._pairs(block))

    def _by_span(self, values: Float[Tensor, "... keys"]) -> Float[Tensor, "... spans"]:
        """Sums over the keys of each span, by differences of running sums: the cost does not grow with the spans."""
        running = torch.nn.functional.pad(values.cumsum(-1), (1, 0))
        ends = self.bounds.clamp(max=values.shape[-1])
        return running[..., ends[:, 1]] - running[..., ends[:, 0]]

    def _pairs(self, block: Block) -> Float[Tensor, "#batch #heads rows spans"]:
        """How many keys of each span a row sees."""
        if block.seen is not None or not block.causal:
            return self._by_span(block.visible().float())
        seen = (block.positions[:, None] + 1).clamp(self.bounds[:, 0], self.bounds[:, 1]) - self.bounds[:, 0]
        return seen.float()[None, None]

    def result(self) -> Tensor:
        return torch.where(self.pairs > 0, self.sum / self.pairs, torch.nan)


class _DistanceHistogram(_Reducer):
    def start(self) -> None:
        self.sum = self.zeros(distance_bins(self.keys))

    def update(self, block: Block) -> None:
        bins = _distance_bin(block.positions[:, None] - block.columns())
        weights = block.counted(block.weights)
        flat = weights.reshape(self.batch, self.heads, -1)
        self.sum.scatter_add_(2, bins.flatten().expand_as(flat), flat)

    def result(self) -> Tensor:
        return self.sum


class _Top(_Reducer):
    def start(self) -> None:
        self.indices: list[Tensor] = []

    def update(self, block: Block) -> None:
        found = block.ranked().topk(min(self.top, block.weights.shape[-1]), dim=-1)
        missing = min(self.top, self.keys) - found.values.shape[-1]
        hidden = found.values == -torch.inf if block.weighed else found.values <= 0
        values = found.values.masked_fill(hidden, 0.0)
        self.parts.append(block.nan_empty(torch.nn.functional.pad(values, (0, missing))))
        self.indices.append(torch.nn.functional.pad(found.indices.masked_fill(hidden, -1), (0, missing), value=-1))


class _Weights(_Reducer):
    def row_statistic(self, block: Block) -> Tensor:
        return torch.nn.functional.pad(block.weights.clone(), (0, self.keys - block.weights.shape[-1]))


class _Logits(_Reducer):
    def update(self, block: Block) -> None:
        shown = block.logits.masked_fill(block.logits <= HIDDEN / 2, -torch.inf)
        self.parts.append(torch.nn.functional.pad(shown, (0, self.keys - shown.shape[-1]), value=-torch.inf))


_REDUCERS: dict[str, type[_Reducer]] = {
    "received": _Received,
    "visible": _Visible,
    "entropy": _Entropy,
    "distance": _Distance,
    "argmax": _ArgMax,
    "first": _First,
    "previous": _Previous,
    "recent": _Recent,
    "span_mass": _SpanMass,
    "block_mean": _BlockMean,
    "distance_histogram": _DistanceHistogram,
    "top": _Top,
    "weights": _Weights,
    "logits": _Logits,
}


def distance_bins(keys: int) -> int:
    """Bins of the distance histogram: one for distance 0, then one per power of two that fits."""
    return 1 + max(keys - 1, 0).bit_length()


def _distance_bin(distance: Tensor) -> Tensor:
    far = distance.abs()
    return torch.where(far == 0, 0, 1 + far.clamp(min=1).double().log2().floor().long())


def _membership(spans: Sequence[tuple[int, int]], keys: int, device: torch.device) -> Float[Tensor, "keys spans"]:
    column = torch.arange(keys, device=device)[:, None]
    bounds = torch.tensor(spans, device=device)
    return ((column >= bounds[:, 0]) & (column < bounds[:, 1])).float()


def _reference(
    query: Tensor,
    key: Tensor,
    what: Sequence[str],
    common: dict[str, Any],
    sinks: Tensor | None,
    index: Tensor,
    row_weight: Tensor | None,
    spans: Sequence[tuple[int, int]] | None,
    top: int,
    window: int,
) -> dict[str, Tensor]:
    """Every reduction from the full matrix of weights, by its definition."""
    weighing = common.pop("weighing")
    query, key = query.float(), key.float()
    logits = attention_logits(query, key, index, **common)
    weights, _ = normalise(logits, sinks)
    if weighing is not None:
        visible = torch.isfinite(logits)
        positions = index + common["offset"]
        weights = weighing(logits, visible, positions=positions, query=query[:, :, index], key=key)
    batch, heads, rows, keys = weights.shape
    seen = visible_keys(index, keys, causal=common["causal"], offset=common["offset"], mask=common["mask"])
    seen = torch.ones_like(weights, dtype=torch.bool) if seen is None else seen.expand_as(weights)
    counts = torch.ones(1, 1, rows, 1, device=query.device) if row_weight is None else row_weight[:, None, :, None]
    empty = ~seen.any(-1)
    position = (index + common["offset"])[:, None]
    column = torch.arange(keys, device=query.device)
    gap = (position - column).abs()

    def nan(x: Tensor) -> Tensor:
        return x.masked_fill(empty.view(*empty.shape, *(1,) * (x.ndim - 3)), torch.nan)

    def block_mean() -> Tensor:
        out = torch.full((batch, heads, len(spans or ()), len(spans or ())), torch.nan, device=query.device)
        for s, (first, last) in enumerate(spans or ()):
            rows_in = ((position >= first) & (position < last)).view(1, 1, -1, 1) * counts
            for t, (start, stop) in enumerate(spans or ()):
                pairs = (seen[..., start:stop] * rows_in).sum((2, 3))
                out[:, :, s, t] = (weights[..., start:stop] * rows_in).sum((2, 3)) / pairs.masked_fill(
                    pairs == 0, torch.nan
                )
        return out

    def histogram() -> Tensor:
        bins = _distance_bin(gap)
        return torch.stack([(weights * counts * (bins == b)).sum((2, 3)) for b in range(distance_bins(keys))], -1)

    ranked = weights if weighing is None else weights.masked_fill(~seen, -torch.inf)

    def largest() -> tuple[Tensor, Tensor]:
        found = ranked.topk(min(top, keys), dim=-1)
        hidden = found.values <= 0 if weighing is None else found.values == -torch.inf
        return nan(found.values.masked_fill(hidden, 0.0)), found.indices.masked_fill(hidden, -1)

    forms: dict[str, Callable[[], Tensor]] = {
        "received": lambda: (weights * counts).sum(2),
        "visible": lambda: (seen * counts).expand(batch, heads, rows, keys).sum(2),
        "entropy": lambda: nan(torch.special.entr(weights).sum(-1) if weighing is None else weighed_entropy(weights)),
        "distance": lambda: nan((weights * gap).sum(-1)),
        "argmax": lambda: ranked.argmax(-1).masked_fill(empty, -1),
        "first": lambda: nan(weights[..., 0]),
        "previous": lambda: nan((weights * (column == position - 1)).sum(-1)).masked_fill(
            position[:, 0] < 1, torch.nan
        ),
        "recent": lambda: nan((weights * (gap < window)).sum(-1)),
        "span_mass": lambda: nan(torch.stack([weights[..., a:b].sum(-1) for a, b in spans or ()], -1)),
        "block_mean": block_mean,
        "distance_histogram": histogram,
        "weights": lambda: nan(weights),
        "logits": lambda: logits,
    }
    results = {name: forms[name]() for name in what if name != "top"}
    if "top" in what:
        results["top"], results["top_index"] = largest()
    return results
