"""FlexPrefill: which blocks a prompt needs, head by head, from its last block of queries.

The last b queries attend to everything (exact probe Â). With v the mean of Â by key and s its mean by offset i − j:

    D = √JSD( softmax(mean q̂ · k̄ᵀ) ‖ block sums of v )
    D ≥ τ  "vertical-slash":  the columns and diagonals of largest mass, as many as cover a share γ of v and of s
    D < τ  "query-aware":     pooling can be trusted, so blocks of softmax(q̄ k̄ᵀ) that cover a share γ of its mass

Exact attention runs on the union, prefill only; decoding stays dense, since the estimate needs all keys and a step is
bound by memory. Paper: FlexPrefill, arXiv 2502.20766.

Where the released code slips, the corrected form is the default here: 0 · ln 0 is 0 (there a NaN that turns a head to
vertical-slash), offsets are pooled from the diagonal, density counts the causal triangle, and `count="blocks"` takes as
many blocks as hold the share γ. The code counts the tokens that do and divides by 128 (`count="tokens"`, by the block
size): tokens that lie scattered then leave their mass uncovered. Kept as options: `selection="global"` is the paper's
one quota for a whole head, which lets early rows take it all ("row" gives each row its own), `stop="separate"` covers
γ of v and of s each ("union" stops when columns and diagonals together cover γ of the last block). Which blocks early
rows read depends on later tokens through the probe; their outputs use no later keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.card import Card
from headway.door.call import AttentionCall, Site
from headway.door.selection import BlockMask, Blocks, Dense, Selection
from headway.door.stages import Selector
from headway.errors import ArgumentError, unknown
from headway.kernels.dense import grouped_scores
from headway.kernels.pooling import block_means, block_sums, cover, ranks, root_jensen_shannon

CARD = Card(
    slug="flexprefill",
    title="FlexPrefill: A Context-Aware Sparse Attention Mechanism for Efficient Long-Sequence Inference",
    year=2025,
    arxiv="2502.20766",
    family="long_context",
    stages=("Selector",),
    needs=("the whole prompt in one forward",),
    knobs={
        "gamma": "share of attention mass to cover",
        "tau": "divergence below which pooling is trusted",
        "min_budget": "least tokens a row reads",
        "block": "tokens per block",
    },
    summary="Chooses key blocks per head and prompt in prefill so that a given share of attention mass is covered.",
)

CHOICES = {
    "selection": ("global", "row"),
    "stop": ("separate", "union"),
    "count": ("blocks", "tokens"),
    "chunks": ("raise", "dense"),
}


@dataclass(frozen=True)
class FlexSelection:
    """What was selected for one call: the mask, which heads were query-aware, and their divergences D."""

    mask: BlockMask
    query_aware: Bool[Tensor, "batch heads"]
    divergence: Float[Tensor, "batch heads"]
    layer: int = -1

    @property
    def density(self) -> float:
        """Selected over visible pairs of the causal triangle."""
        return self.mask.density()


@dataclass(frozen=True, kw_only=True, eq=False)
class FlexPrefill(Selector):
    """`headway.use(model, FlexPrefill(gamma=0.9))`.

    gamma: share of mass to cover, 1 is dense. tau: 0 makes all heads vertical-slash, above 0.8326 all query-aware.
    min_budget, max_budget: tokens, None for one block and no limit. block: 16, 32, 64, 128 … tokens. selection, stop,
    count: see the module. chunks: what to do when the prompt does not come in one forward, "raise" or "dense". approximates:
    whether to run dense where that is as fast. record: a list that receives a `FlexSelection` per call."""

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int | None = 1024
    max_budget: int | None = None
    block: int = 128
    selection: str = "global"
    stop: str = "separate"
    count: str = "blocks"
    chunks: str = "raise"
    approximates: bool = True
    record: list[FlexSelection] | None = field(default=None, repr=False)

    phases = frozenset({"prefill"})

    def __post_init__(self) -> None:
        if not 0 < self.gamma <= 1:
            raise ArgumentError(f"gamma: got {self.gamma}, expected a share in (0, 1].")
        if self.tau < 0:
            raise ArgumentError(f"tau: got {self.tau}, expected at least 0.")
        if self.block < 1 or self.block & (self.block - 1):
            raise ArgumentError(f"block: got {self.block}, expected a power of two such as 64 or 128.")
        for name in ("min_budget", "max_budget"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ArgumentError(f"{name}: got {value}, expected at least 1 token, or None.")
        if self.min_budget and self.max_budget and self.min_budget > self.max_budget:
            raise ArgumentError(
                f"min_budget, max_budget: got {self.min_budget} and {self.max_budget}, expected the first to be no "
                "more than the second."
            )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)

    @property
    def min_blocks(self) -> int:
        return -(-(self.min_budget or 1) // self.block)

    @property
    def dense_up_to(self) -> int:
        """Prompt length up to which attention is dense."""
        return max(2, self.min_blocks) * self.block

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def select(self, call: AttentionCall) -> Selection:
        if call.queries == 1 or self.gamma >= 1 or (not call.causal and call.mask is None):
            return Dense()
        if call.queries != call.keys:
            if self.chunks == "dense":
                return Dense()
            raise ArgumentError(
                f"FlexPrefill at {call.site.name}: got {call.queries} queries on {call.keys} keys, expected the whole "
                "prompt in one forward. Prefill in one piece, or pass chunks='dense'."
            )
        if call.queries <= self.dense_up_to or (call.site.window or call.keys) < call.keys:
            return Dense()
        found = self.blocks_of(call)
        if self.record is not None:
            self.record.append(found)
        return Blocks(found.mask)

    def blocks_of(self, call: AttentionCall) -> FlexSelection:
        """The blocks for one call, whatever its length."""
        real = call.forward.padding
        if real is not None:
            real = real[:, call.first_key : call.first_key + call.keys].to(call.query.device)
        rows = _probe_rows(call, self.block, real)
        weights = _probe(call, rows, real)
        count = -(-call.keys // self.block)
        vertical = weights.mean(2)
        columns = block_sums(vertical, self.block)
        slash = _by_offset(weights, rows)
        diagonals = block_sums(slash, self.block)
        key_means = block_means(call.key, self.block, real)
        pooled = self._pooled_probe(call, rows, key_means, real)
        divergence = root_jensen_shannon(pooled, columns)
        aware = divergence < self.tau
        most = count if self.max_budget is None else max(self.max_budget // self.block, 1)
        least = min(self.min_blocks, count, most)
        if self.stop == "union":
            wide, deep = self._until_union(columns, diagonals)
        else:
            wide, deep = self._counts(vertical, columns), self._counts(slash, diagonals)
        wide, deep = (n.clamp(least, min(most, count)).masked_fill(aware, least) for n in (wide, deep))
        blocks = self._union(columns, diagonals, wide, deep, real)
        if bool(aware.any()):
            blocks = blocks | (self._query_aware(call, key_means, real) & aware[:, :, None, None])
        mask = BlockMask(blocks, call.queries, call.keys, self.block, self.block).causal()
        mask = BlockMask(_filled(mask.blocks, least), call.queries, call.keys, self.block, self.block)
        return FlexSelection(mask.with_diagonal(), aware, divergence, call.site.layer)

    def _counts(self, by_token: Tensor, by_block: Tensor) -> Int[Tensor, "batch heads"]:
        """Blocks that cover γ of a marginal."""
        if self.count == "tokens":
            return cover(by_token, self.gamma) // self.block + 1
        return cover(by_block, self.gamma)

    def _pooled_probe(
        self, call: AttentionCall, rows: Tensor, key_means: Tensor, real: Tensor | None
    ) -> Float[Tensor, "batch heads blocks"]:
        """softmax(mean q̂ · k̄ᵀ): what pooling says of the probe."""
        query = _rows_of(call.query, rows).float().mean(2, keepdim=True)
        logits = _capped(grouped_scores(query, key_means) * call.scale, call.softcap)[:, :, 0]
        return logits.masked_fill(~_real_blocks(real, self.block, logits), -torch.inf).softmax(-1)

    def _until_union(self, columns: Tensor, diagonals: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of columns and diagonals that together cover γ of the last block row. There, column k and the
        diagonal of distance n − 1 − k are the same block, covered as soon as either is taken."""
        count = columns.shape[-1]
        order = ranks(torch.cat([columns, diagonals], -1))
        first = torch.minimum(order[..., :count], order[..., count:].flip(-1))
        gained = torch.zeros_like(torch.cat([columns, diagonals], -1)).scatter_add_(-1, first, columns)
        taken = ((gained.cumsum(-1) < self.gamma).sum(-1, keepdim=True) + 1).clamp(max=2 * count)
        return (order[..., :count] < taken).sum(-1), (order[..., count:] < taken).sum(-1)

    def _union(
        self, columns: Tensor, diagonals: Tensor, wide: Tensor, deep: Tensor, real: Tensor | None
    ) -> Bool[Tensor, "batch heads blocks blocks"]:
        """Columns and diagonals of largest mass; the first real block and the diagonal are always among them."""
        columns, diagonals = columns.clone(), diagonals.clone()
        sink = torch.zeros(columns.shape[0], dtype=torch.long, device=columns.device)
        if real is not None:
            sink = real.long().argmax(1) // self.block
        columns.scatter_(-1, sink[:, None, None].expand(-1, columns.shape[1], 1), torch.inf)
        diagonals[..., 0] = torch.inf
        by_column = ranks(columns) < wide[..., None]
        by_distance = ranks(diagonals) < deep[..., None]
        count = columns.shape[-1]
        at = torch.arange(count, device=columns.device)
        distance = (at[:, None] - at).clamp(min=0)
        return by_column[:, :, None, :] | by_distance[..., distance]

    def _query_aware(
        self, call: AttentionCall, key_means: Tensor, real: Tensor | None
    ) -> Bool[Tensor, "batch heads blocks blocks"]:
        """Blocks of the pooled map that cover γ of its mass, over a whole head or in each row."""
        query = block_means(call.query, self.block, real)
        logits = _capped(grouped_scores(query, key_means) * call.scale, call.softcap)
        count = logits.shape[-1]
        future = torch.ones(count, count, dtype=torch.bool, device=logits.device).triu(1)
        hidden = future | ~_real_blocks(real, self.block, logits[:, :, 0])[:, :, None, :]
        weights = logits.masked_fill(hidden, -torch.inf).softmax(-1).nan_to_num(0.0)
        if self.selection == "row":
            return ranks(weights) < cover(weights, self.gamma)[..., None]
        flat = weights.flatten(2)
        taken = cover(flat, self.gamma * count)
        return (ranks(flat) < taken[..., None]).unflatten(-1, (count, count))


def _probe_rows(call: AttentionCall, block: int, real: Tensor | None) -> Int[Tensor, "batch rows"]:
    """The last `block` rows that are tokens, of each sequence; the first of them again where there are fewer."""
    count = min(block, call.queries)
    batch, device = call.query.shape[0], call.query.device
    if real is None:
        return torch.arange(call.queries - count, call.queries, device=device).expand(batch, -1)
    rows = []
    for row in real[:, -call.queries :]:
        own = row.nonzero()[:, 0][-count:]
        rows.append(torch.cat([own[:1].expand(count - own.numel()), own]))
    return torch.stack(rows)


def _rows_of(x: Tensor, rows: Int[Tensor, "batch rows"]) -> Float[Tensor, "batch heads rows dim"]:
    return x.gather(2, rows[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))


def _probe(
    call: AttentionCall, rows: Int[Tensor, "batch rows"], real: Tensor | None
) -> Float[Tensor, "batch heads rows keys"]:
    """Exact attention of the probe rows, in float32; the host's mask and padding hold."""
    logits = grouped_scores(_rows_of(call.query, rows).float(), call.key.float()) * call.scale
    logits = _capped(logits, call.softcap)
    keys = torch.arange(call.keys, device=logits.device)
    seen = keys <= rows[:, :, None]
    if real is not None:
        seen = seen & real[:, None]
    return logits.masked_fill(~seen[:, None], -torch.inf).softmax(-1)


def _by_offset(
    weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, "batch rows"]
) -> Float[Tensor, "batch heads keys"]:
    """s_o: mean weight at distance o, over the rows."""
    keys = weights.shape[-1]
    key = rows[:, :, None] - torch.arange(keys, device=weights.device)
    index = key.clamp(min=0)[:, None].expand(-1, weights.shape[1], -1, -1)
    return (weights.gather(-1, index) * (key >= 0)[:, None]).mean(2)


def _capped(logits: Tensor, softcap: float | None) -> Tensor:
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def _real_blocks(
    real: Tensor | None, block: int, like: Float[Tensor, "batch heads blocks"]
) -> Bool[Tensor, "batch 1 blocks"]:
    if real is None:
        return torch.ones(like.shape[0], 1, like.shape[-1], dtype=torch.bool, device=like.device)
    return (block_sums(real.float(), block) > 0)[:, None]


def _filled(blocks: Bool[Tensor, "batch heads rows blocks"], least: int) -> Bool[Tensor, "batch heads rows blocks"]:
    """Rows that read fewer than `least` blocks get the nearest ones that they could read."""
    count = blocks.shape[-1]
    visible = torch.ones(count, count, dtype=torch.bool, device=blocks.device).tril()
    missing = (least - blocks.sum(-1, keepdim=True)).clamp(min=0)
    free = visible & ~blocks
    nearest = free.flip(-1).cumsum(-1).flip(-1)
    return blocks | (free & (nearest <= missing))
