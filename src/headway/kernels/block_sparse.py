"""Block-sparse attention: exact softmax attention over the key blocks that each query block selects.

    o_i = Σ_{j in K(i)} w_ij v_j ,   K(i) = { j visible from i : the block pair of (i, j) is selected }

Three forms behind one function. `masked` is the reference: one boolean mask, dense work. `gather` is the CPU form:
query blocks that read equally many key blocks are grouped, their keys and values are copied side by side into one small
buffer that stays in cache, and the platform's fused kernel runs on the group. Where the causal diagonal is all that
needs a mask, it stands last in every group, which then shares one small mask; where much is selected, it runs apart as
one causal batch, since a mask costs the kernel time at every key. Otherwise pairs of blocks that are visible as a whole
run without a mask, the others (window edges, ragged ends, padding) apart. Parts meet by their log-sum-exp. Keys and
values of grouped heads are not repeated. `flex` builds a FlexAttention mask for CUDA.

Queries and keys are cut into blocks of `query_block` and `key_block` tokens from their first token; the last block of
either may be ragged. Query row i stands at key position i + offset.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from headway.errors import ArgumentError, unknown
from headway.kernels.dense import check_heads, dense_attention, soft_capped, with_learned_sinks
from headway.kernels.fused import fused_attention

FORMS = ("auto", "masked", "gather", "flex")
#: Bytes of gathered keys and values per step: more falls out of the cache before it is read, less costs calls (4 MiB
#: was best of 1 to 32, and loses least where other programs use the cache).
STEP_BYTES = 1 << 22
#: Where selecting stops paying on a CPU, measured by `benchmarks/run.py crossover`: fewer keys than this, or a larger
#: share of the visible pairs.
CROSSOVER_KEYS = 1024
CROSSOVER_DENSITY = 0.7
#: Selected keys per query from which the causal diagonal runs apart: measured at 8,192 tokens in blocks of 128.
DIAGONAL_APART_KEYS = 1024


@dataclass(frozen=True)
class Band:
    """The first `sinks` keys and the last `window` keys up to the query itself."""

    sinks: int
    window: int

    def tile(self, at: Int[Tensor, "... queries"], key_at: Int[Tensor, "... keys"]) -> Bool[Tensor, "... queries keys"]:
        distance = at[..., :, None] - key_at[..., None, :]
        return (distance < self.window) | (key_at < self.sinks)[..., None, :]


def block_sparse_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys value_dim"],
    blocks: Bool[Tensor, "#batch #heads query_blocks key_blocks"],
    *,
    query_block: int,
    key_block: int,
    scale: float | None = None,
    causal: bool = False,
    offset: int | None = None,
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None,
    band: Band | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    form: str = "auto",
) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"]]:
    """Output (dtype of `value`) and log-sum-exp (float32) over the selected blocks.

    `blocks` may have one entry for all heads, one per key head, or one per query head. `causal`, `mask` and `band` hide
    pairs inside selected blocks. Rows that see nothing give zeros and -inf. `sinks` are learned sink logits. `form`:
    "auto" is "flex" on CUDA and "gather" elsewhere. With gradients, "gather" runs in one masked pass: the log-sum-exp
    of the fused kernel has none. "flex" with gradients on the CPU raises ArgumentError: torch has no backward pass
    there."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    work = _Work.of(query, key, value, blocks, query_block, key_block, scale, causal, offset, mask, band, softcap)
    if form == "auto":
        form = "flex" if query.device.type == "cuda" else "gather"
    work = replace(work, exact_lse=sinks is not None and work.needs_gradients)
    run = {"masked": _masked, "gather": _gather, "flex": _flex}[form]
    return with_learned_sinks(*run(work), sinks)


def dense_is_faster(keys: int, density: float) -> bool:
    """Whether dense attention is expected to be as fast as the selected blocks."""
    return keys < CROSSOVER_KEYS or density > CROSSOVER_DENSITY


@dataclass(frozen=True)
class _Work:
    """The operands in one place, with what each form asks about them."""

    query: Tensor
    key: Tensor
    value: Tensor
    blocks: Tensor
    query_block: int
    key_block: int
    scale: float
    causal: bool
    offset: int
    mask: Tensor | None
    band: Band | None
    softcap: float | None
    #: Whether gradients flow through the log-sum-exp, as they do when a learned sink scales the output by it.
    exact_lse: bool = False

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: Tensor,
        query_block: int,
        key_block: int,
        scale: float | None,
        causal: bool,
        offset: int | None,
        mask: Tensor | None,
        band: Band | None,
        softcap: float | None,
    ) -> _Work:
        check_heads(query, key)
        if query_block < 1 or key_block < 1:
            raise ArgumentError(
                f"query_block, key_block: got {query_block}, {key_block}; expected at least 1 token each."
            )
        queries, keys = query.shape[2], key.shape[2]
        wanted = (-(-queries // query_block), -(-keys // key_block))
        heads = (1, key.shape[1], query.shape[1])
        if (
            blocks.ndim != 4
            or blocks.dtype != torch.bool
            or tuple(blocks.shape[2:]) != wanted
            or blocks.shape[0] not in (1, query.shape[0])
            or blocks.shape[1] not in heads
        ):
            raise ArgumentError(
                f"blocks: got {blocks.dtype} of shape {tuple(blocks.shape)}, expected bool (1 or {query.shape[0]}, one "
                f"of {heads}, {wanted[0]}, {wanted[1]}) for {queries} queries in blocks of {query_block} and {keys} "
                f"keys in blocks of {key_block}."
            )
        return cls(
            query, key, value, blocks, query_block, key_block,
            query.shape[3] ** -0.5 if scale is None else scale,
            causal, keys - queries if offset is None else offset, mask, band, softcap,
        )  # fmt: skip

    @property
    def groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    @property
    def needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.query, self.key, self.value))

    def query_at(self) -> Int[Tensor, "query_blocks query_block"]:
        """Key position of every row of every query block."""
        rows = torch.arange(self.blocks.shape[2] * self.query_block, device=self.query.device)
        return (rows + self.offset).view(-1, self.query_block)

    def key_at(self) -> Int[Tensor, "key_blocks key_block"]:
        return torch.arange(self.blocks.shape[3] * self.key_block, device=self.query.device).view(-1, self.key_block)

    def visible(self) -> Bool[Tensor, "#batch #heads queries keys"]:
        """Every pair that is selected and visible, as one mask."""
        queries, keys = self.query.shape[2], self.key.shape[2]
        seen = self.blocks.repeat_interleave(self.query_block, 2)[:, :, :queries]
        seen = seen.repeat_interleave(self.key_block, 3)[..., :keys]
        if seen.shape[1] not in (1, self.query.shape[1]):
            seen = seen.repeat_interleave(self.groups, 1)
        at = torch.arange(queries, device=seen.device) + self.offset
        key_at = torch.arange(keys, device=seen.device)
        if self.causal:
            seen = seen & (key_at <= at[:, None])
        if self.band is not None:
            seen = seen & self.band.tile(at, key_at)
        return seen if self.mask is None else seen & self.mask

    def relation(self) -> tuple[Tensor, Tensor]:
        """For each pair of blocks, whether some and whether all of its pairs are visible:
        (#batch, #heads, query_blocks, key_blocks) twice. Rows beyond the last query count as visible."""
        at, key_at = self.query_at(), self.key_at()
        keys = self.key.shape[2]
        first, last = at[:, 0], at[:, -1].clamp(max=self.offset + self.query.shape[2] - 1)
        key_first, key_last = key_at[:, 0], key_at[:, -1].clamp(max=keys - 1)
        some = torch.ones(at.shape[0], key_at.shape[0], dtype=torch.bool, device=at.device)
        whole = (key_at[:, -1] < keys).expand_as(some)
        if self.causal:
            some = some & (key_first <= last[:, None])
            whole = whole & (key_last <= first[:, None])
        if self.band is not None:
            low, high = first[:, None] - self.band.window, last[:, None] - self.band.window
            some = some & ((key_last > low) | (key_first < self.band.sinks))
            whole = whole & ((key_first > high) | (key_last < self.band.sinks))
        some, whole = some[None, None], whole[None, None]
        if self.mask is not None:
            rows, columns = at.numel() - self.query.shape[2], key_at.numel() - keys
            tiles = self.mask.shape[:2]
            full = pad(self.mask, (0, columns, 0, 0), value=False)
            full = full.expand(-1, -1, self.query.shape[2], -1) if full.shape[2] == 1 else full
            if rows:
                full = torch.cat([full, full[:, :, -1:].expand(-1, -1, rows, -1)], 2)
            full = full.view(*tiles, at.shape[0], self.query_block, key_at.shape[0], self.key_block)
            some = some & full.any(5).any(3)
            whole = whole & full.all(5).all(3)
        return some, whole

    def tile_mask(
        self, batch: Tensor, head: Tensor, query_blocks: Tensor, key_blocks: Tensor
    ) -> Bool[Tensor, "rows query_block chosen_keys"]:
        """Visibility inside chosen pairs of blocks: `key_blocks` is (rows, chosen)."""
        at = self.query_at()[query_blocks]
        key_at = self.key_at()[key_blocks].flatten(1)
        seen = (key_at < self.key.shape[2])[:, None].expand(-1, self.query_block, -1)
        if self.causal:
            seen = seen & (key_at[:, None] <= at[:, :, None])
        if self.band is not None:
            seen = seen & self.band.tile(at, key_at)
        if self.mask is not None:
            rows = (at - self.offset).clamp(max=self.mask.shape[2] - 1)
            batch = batch.clamp(max=self.mask.shape[0] - 1)[:, None, None]
            head = head.clamp(max=self.mask.shape[1] - 1)[:, None, None]
            columns = key_at.clamp(max=self.key.shape[2] - 1)[:, None]
            seen = seen & self.mask[batch, head, rows[:, :, None], columns]
        return seen


def _masked(work: _Work) -> tuple[Tensor, Tensor]:
    return dense_attention(
        work.query, work.key, work.value, scale=work.scale, mask=work.visible(), softcap=work.softcap,
        empty_rows="zero",
    )  # fmt: skip


def _gather(work: _Work) -> tuple[Tensor, Tensor]:
    some, whole = work.relation()
    blocks = work.blocks
    if some.shape[1] > 1 and blocks.shape[1] not in (1, some.shape[1]):
        blocks = blocks.repeat_interleave(some.shape[1] // blocks.shape[1], 1)
    selected = blocks & some
    tiles = _Tiles(work)
    if work.needs_gradients:
        return tiles.differentiable(selected)
    partial = selected & ~whole
    plain = _is_plain_diagonal(work, partial)
    if plain and float(selected.double().sum(-1).mean()) * work.key_block < DIAGONAL_APART_KEYS:
        return tiles.whole(*tiles.with_diagonal(selected))
    result = tiles.diagonal() if plain else tiles.nothing()
    tiles.add(result, selected & whole, masked=False)
    if not plain and bool(partial.any()):
        tiles.add(result, partial, masked=True)
    return tiles.whole(*result)


def _is_plain_diagonal(work: _Work, partial: Tensor) -> bool:
    """Whether the pairs that need a mask are exactly the causal diagonal of equal, aligned blocks."""
    queries, keys = work.query.shape[2], work.key.shape[2]
    aligned = work.query_block == work.key_block and work.offset == 0 and queries == keys
    if not aligned or not work.causal or work.mask is not None or work.softcap is not None:
        return False
    if work.band is not None and work.band.window < work.query_block:
        return False
    eye = torch.eye(partial.shape[2], dtype=torch.bool, device=partial.device)
    return bool((partial == eye).all())


@dataclass(frozen=True)
class _Step:
    """Some items: their numbers (rows · groups), the key blocks that each row of them reads (rows, chosen), the head
    and the query block of each row, and how many query heads share a row."""

    items: Tensor
    blocks: Tensor
    owner: Tensor
    block: Tensor
    groups: int


class _Tiles:
    """Queries, keys and values cut into blocks, and the passes over chosen pairs of them. An item is one query block of
    one head: (batch · heads · query_blocks, query_block, dim)."""

    def __init__(self, work: _Work) -> None:
        self.work = work
        self.batch, self.heads, self.queries, _ = work.query.shape
        self.kv_heads = work.key.shape[1]
        self.count = work.blocks.shape[2]
        self.query = self._cut(work.query, work.query_block)
        self.key, self.value = (self._cut(x, work.key_block).flatten(1) for x in (work.key, work.value))
        self.buffers: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def _cut(x: Tensor, size: int) -> Float[Tensor, "blocks size dim"]:
        extra = -x.shape[2] % size
        return (pad(x, (0, 0, 0, extra)) if extra else x).reshape(-1, size, x.shape[3])

    def whole(self, output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """Items as (batch, heads, queries, value_dim) and (batch, heads, queries)."""
        output = output.view(self.batch, self.heads, -1, output.shape[2])
        return output[:, :, : self.queries], lse.view(self.batch, self.heads, -1)[:, :, : self.queries]

    def nothing(self) -> tuple[Tensor, Tensor]:
        items, size, _ = self.query.shape
        lse = torch.full((items, size), -torch.inf, dtype=torch.float32, device=self.query.device)
        return self.query.new_zeros(items, size, self.work.value.shape[3]), lse

    def with_diagonal(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over every item. The diagonal is the last of an item's blocks, so all items share one small mask,
        and nothing has to be merged."""
        size, keys = self.work.key_block, self.work.blocks.shape[3] * self.work.key_block
        output = self.query.new_empty(*self.query.shape[:2], self.work.value.shape[3])
        lse = torch.empty(self.query.shape[:2], dtype=torch.float32, device=self.query.device)
        future = torch.ones(size, size, dtype=torch.bool, device=output.device).triu(1)
        hiding = output.new_zeros(size, keys)
        hiding[:, -size:].masked_fill_(future, -torch.inf)
        for step in self._steps(selected, fold=True):
            query, key, value = self._gathered(step)
            bias = hiding[:, -key.shape[2] :]
            bias = bias.repeat(step.groups, 1) if step.groups > 1 else bias
            part, part_lse = fused_attention(query, key, value, scale=self.work.scale, bias=bias[None, None])
            output.index_copy_(0, step.items, part.reshape(step.items.numel(), size, -1))
            lse.index_copy_(0, step.items, part_lse.reshape(-1, size))
        return output, lse

    def diagonal(self) -> tuple[Tensor, Tensor]:
        """Every block with itself, head by head: the blocks of a head are one causal batch, and nothing is copied."""
        output = self.query.new_empty(*self.query.shape[:2], self.work.value.shape[3])
        lse = torch.empty(self.query.shape[:2], dtype=torch.float32, device=self.query.device)
        key, value = (x.view(x.shape[0], self.work.key_block, -1) for x in (self.key, self.value))
        for head in range(self.batch * self.heads):
            own = slice(head * self.count, (head + 1) * self.count)
            kv_head = head // self.work.groups
            theirs = slice(kv_head * self.count, (kv_head + 1) * self.count)
            part, part_lse = fused_attention(
                self.query[own, None], key[theirs, None], value[theirs, None], scale=self.work.scale, causal=True
            )
            output[own] = part[:, 0]
            lse[own] = part_lse[:, 0]
        return output, lse

    def add(self, result: tuple[Tensor, Tensor], selected: Tensor, *, masked: bool) -> None:
        """Merges the chosen pairs into a result, a step at a time while it is in cache:
        o ← o + σ(lse′ − lse)(o′ − o)."""
        output, lse = result
        for step in self._steps(selected, fold=not masked):
            part, part_lse = self._attend(step, masked)
            before = lse.index_select(0, step.items)
            share = torch.sigmoid(part_lse - before).nan_to_num_(0.0)[..., None]
            merged = output.index_select(0, step.items).float().lerp_(part.float(), share)
            output.index_copy_(0, step.items, merged.to(output.dtype))
            lse.index_copy_(0, step.items, torch.logaddexp(before, part_lse))

    def differentiable(self, selected: Tensor) -> tuple[Tensor, Tensor]:
        """One masked pass that gradients can flow through."""
        steps = list(self._steps(selected, fold=False))
        if not steps:
            return self.whole(*self.nothing())
        outputs, normalisers = zip(*(self._attend(step, masked=True) for step in steps), strict=True)
        items = torch.cat([step.items for step in steps])
        empty, no_lse = self.nothing()
        return self.whole(
            empty.index_copy(0, items, torch.cat(outputs)), no_lse.index_copy(0, items, torch.cat(normalisers))
        )

    def _steps(self, selected: Tensor, fold: bool) -> Iterator[_Step]:
        """Items that select equally many blocks, some at a time. With `fold`, and where the query heads of a group
        select alike, these heads share one gathered copy of their keys."""
        fold = fold and selected.shape[1] in (1, self.kv_heads)
        heads = self.kv_heads if fold else self.heads
        groups = self.work.groups if fold else 1
        if selected.shape[1] not in (1, heads):
            selected = selected.repeat_interleave(heads // selected.shape[1], 1)
        chosen = selected.expand(self.batch, heads, -1, -1).flatten(0, 2)
        counts = chosen.sum(-1)
        order = counts.argsort(stable=True)
        owner, block = order // self.count, order % self.count
        member = torch.arange(groups, device=chosen.device)
        items = (owner[:, None] * groups + member) * self.count + block[:, None]
        kv_head = owner if fold else owner // self.work.groups
        # All blocks of all items in the order of the items: each step then is a slice.
        columns = chosen[order].nonzero()
        blocks = columns[:, 1] + kv_head[columns[:, 0]] * self.work.blocks.shape[3]
        values, lengths = torch.unique_consecutive(counts[order], return_counts=True)
        step_rows = self._step_rows(groups)
        row = place = 0
        for count, length in zip(values.tolist(), lengths.tolist(), strict=True):
            end = row + length
            if count == 0:
                row = end
                continue
            size = step_rows(count)
            while row < end:
                stop = min(row + size, end)
                rows = slice(row, stop)
                part = slice(place, place + (stop - row) * count)
                yield _Step(items[rows].flatten(), blocks[part].view(-1, count), owner[rows], block[rows], groups)
                row, place = stop, part.stop

    def _gathered(self, step: _Step) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (rows, 1, groups · query_block, dim), and the keys and values of the step's blocks side by side."""
        work, rows = self.work, step.blocks.shape[0]
        query = self.query.index_select(0, step.items).view(rows, 1, -1, self.query.shape[2])
        index = step.blocks.flatten()
        key, value = (
            self._copy(which, x, index).view(rows, 1, -1, like.shape[3])
            for which, (x, like) in enumerate(((self.key, work.key), (self.value, work.value)))
        )
        return query, key, value

    def _attend(self, step: _Step, masked: bool) -> tuple[Tensor, Tensor]:
        """Output and log-sum-exp of the items of a step over their chosen blocks."""
        work = self.work
        query, key, value = self._gathered(step)
        seen = None
        if masked:
            columns = step.blocks % work.blocks.shape[3]
            seen = work.tile_mask(step.owner // self.heads, step.owner % self.heads, step.block, columns)[:, None]
        if work.softcap is None and not work.exact_lse:
            part, lse = fused_attention(query, key, value, scale=work.scale, mask=seen)
        else:
            part, lse = dense_attention(
                query, key, value, scale=work.scale, mask=seen, softcap=work.softcap, empty_rows="zero"
            )
        return part.reshape(step.items.numel(), -1, part.shape[3]), lse.reshape(step.items.numel(), -1)

    def _step_rows(self, groups: int) -> Callable[[int], int]:
        """Rows per step for a number of chosen blocks, so that what is gathered stays in cache."""
        per_block = self.work.key_block * (self.work.key.shape[3] + self.work.value.shape[3]) * self.key.element_size()
        least = 2 * torch.get_num_threads()
        return lambda chosen: max(least, STEP_BYTES // max(chosen * per_block, 1))

    def _copy(self, which: int, x: Tensor, index: Tensor) -> Tensor:
        """The chosen blocks side by side, in a buffer that is used again (a fresh one where gradients flow)."""
        if self.work.needs_gradients:
            return x.index_select(0, index)
        need = index.numel() * x.shape[1]
        if self.buffers is None or self.buffers[which].numel() < need:
            grown = [x.new_empty(max(need, STEP_BYTES // 2 // x.element_size())) for _ in range(2)]
            self.buffers = (grown[0], grown[1])
        out = self.buffers[which][:need].view(index.numel(), x.shape[1])
        return torch.index_select(x.detach(), 0, index, out=out)


def _flex(work: _Work) -> tuple[Tensor, Tensor]:
    """FlexAttention with the same selection. Not run on a GPU here; its CPU reference is in the contract."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if work.query.device.type == "cpu" and work.needs_gradients:
        raise ArgumentError(
            "form: got 'flex' with gradients on the CPU, where FlexAttention has no backward pass; expected 'masked' "
            "or 'gather'. Leave the form out, or run under torch.no_grad()."
        )
    batch, heads, queries, _ = work.query.shape
    keys = work.key.shape[2]
    blocks = work.blocks

    def visible(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        item = h if blocks.shape[1] == heads else h * 0 if blocks.shape[1] == 1 else h // work.groups
        seen = blocks[b if blocks.shape[0] > 1 else b * 0, item, row // work.query_block, column // work.key_block]
        at = row + work.offset
        if work.causal:
            seen = seen & (column <= at)
        if work.band is not None:
            seen = seen & ((at - column < work.band.window) | (column < work.band.sinks))
        if work.mask is not None:
            inner = work.mask[
                b if work.mask.shape[0] > 1 else b * 0,
                h if work.mask.shape[1] > 1 else h * 0,
                row if work.mask.shape[2] > 1 else row * 0,
                column,
            ]
            seen = seen & inner
        return seen

    def capped(score: Tensor, b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return soft_capped(score, work.softcap)

    block_mask = create_block_mask(visible, batch, heads, queries, keys, device=work.query.device)
    attend: Any = torch.compile(flex_attention) if work.query.device.type == "cuda" else flex_attention
    output, lse = attend(
        work.query, work.key, work.value, score_mod=capped, block_mask=block_mask, scale=work.scale,
        enable_gqa=work.groups > 1, return_lse=True,
    )  # fmt: skip
    return output, lse.float()
