"""The stage: FlexPrefill's blocks for a call of a host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.selection import BlockMask, Blocks, Dense, Selection
from headway.door.selector_calls import require_no_bias
from headway.door.stages import Selector
from headway.errors import ArgumentError, check_whole, is_number, unknown
from headway.methods.budget import check_share
from headway.methods.long_context.flexprefill.levels import (
    ALWAYS,
    block_levels,
    filled,
    gamma_for_density,
    map_levels,
    marginal_levels,
)
from headway.methods.long_context.flexprefill.probe import distrusted, pooled_map, probe_call

CHOICES = {
    "selection": ("global", "row"),
    "stop": ("separate", "union"),
    "count": ("blocks", "tokens"),
    "chunks": ("raise", "dense"),
}
#: Fewest blocks along a side at which a share of them can be met to within a few per cent.
BUDGET_BLOCKS = 32


@dataclass(frozen=True)
class FlexSelection:
    """What was selected for one call: the mask, which heads were query-aware, their divergences D, and the γ that was
    used (one per sequence; it varies when a density was asked for)."""

    mask: BlockMask
    query_aware: Bool[Tensor, "batch heads"]
    divergence: Float[Tensor, "batch heads"]
    gamma: Float[Tensor, " batch"]
    layer: int = -1

    @property
    def density(self) -> float:
        """Selected over visible pairs of the causal triangle."""
        return self.mask.density()

    def head_density(self) -> Float[Tensor, "batch heads"]:
        """The same for every head, to see where the blocks went."""
        pairs = self.mask.pairs().to(self.mask.blocks.device)
        return (self.mask.blocks * pairs).sum((-1, -2)) / pairs.sum()


@dataclass(frozen=True, kw_only=True, eq=False)
class FlexPrefill(Selector):
    """`headway.use(model, FlexPrefill(gamma=0.9))`.

    gamma: share of mass to cover, 1 is dense. density: in place of gamma, the share of the causal triangle to read;
    each call then gets the γ that reads it, with more blocks for heads that need more. tau: 0 makes all heads
    vertical-slash, above 0.8326 all query-aware. min_budget: least tokens a row reads (None: one block). max_budget:
    most tokens in columns, in diagonals and in a row of the pooled map (None: no limit). Budgets are rounded up to
    blocks. block: 16, 32, 64, 128 … tokens. selection, stop, count: see the package. chunks: what to do when the prompt
    does not come in one forward, "raise" or "dense". trust: in query-aware heads, blocks of queries or keys whose mean
    pairwise cosine is below it are read whole, beyond any budget, since their means hide what is in them (None: no such
    test). approximates: whether to run dense where that is as fast. record:
    a list that receives a `FlexSelection` per call."""

    gamma: float = 0.9
    density: float | None = None
    tau: float = 0.1
    min_budget: int | None = 1024
    max_budget: int | None = None
    block: int = 128
    selection: str = "global"
    stop: str = "separate"
    count: str = "blocks"
    chunks: str = "raise"
    trust: float | None = None
    approximates: bool = True
    record: list[FlexSelection] | None = field(default=None, repr=False)

    phases = frozenset({"prefill"})
    looks_ahead = "the probe is the last block of queries"

    def __post_init__(self) -> None:
        if not (is_number(self.gamma) and 0 < self.gamma <= 1):
            raise ArgumentError(f"gamma: got {self.gamma!r}, expected a share in (0, 1]. 1 is dense.")
        if self.density is not None and not (is_number(self.density) and 0 < self.density <= 1):
            raise ArgumentError(f"density: got {self.density!r}, expected a share in (0, 1], or None to use gamma.")
        if not (is_number(self.tau) and self.tau >= 0):
            raise ArgumentError(f"tau: got {self.tau!r}, expected at least 0. 0 switches the query-aware pattern off.")
        check_whole("block", self.block, 1)
        if self.block & (self.block - 1):
            raise ArgumentError(f"block: got {self.block}, expected a power of two such as 64 or 128.")
        for name in ("min_budget", "max_budget"):
            check_whole(name, getattr(self, name), 1, optional=True)
        if self.min_budget and self.max_budget and self.min_budget > self.max_budget:
            raise ArgumentError(
                f"min_budget, max_budget: got {self.min_budget} and {self.max_budget}, expected the first to be no "
                "more than the second."
            )
        if self.trust is not None and not (is_number(self.trust) and -1 <= self.trust <= 1):
            raise ArgumentError(f"trust: got {self.trust!r}, expected a cosine in [-1, 1], or None for no test.")
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
        if call.queries == 1 or (self.density or self.gamma) >= 1:
            return Dense()
        # A sliding layer is sparse already and stays the host's own.
        if call.site.window is not None and call.site.window < call.first_key + call.offset + call.queries:
            return Dense()
        if call.queries != call.keys:
            if self.chunks == "dense":
                return Dense()
            raise ArgumentError(
                f"FlexPrefill at {call.site.name}: got {call.queries} queries on {call.keys} keys, expected the whole "
                "prompt in one forward. Prefill in one piece, or pass chunks='dense'."
            )
        # An encoder sees both ways.
        if not call.causal or call.queries <= self.dense_up_to:
            return Dense()
        require_no_bias(call, self.title)
        found = self.blocks_of(call)
        if self.record is not None:
            self.record.append(found)
        return Blocks(found.mask)

    def blocks_of(self, call: AttentionCall) -> FlexSelection:
        """The blocks for one causal call, whatever its length."""
        probe = probe_call(call, self.block)
        count = -(-call.keys // self.block)
        most = count if self.max_budget is None else min(-(-self.max_budget // self.block), count)
        least = min(self.min_blocks, most)
        divergence = probe.divergence
        aware = divergence < self.tau
        pooled = None
        if bool(aware.any()):
            pooled = map_levels(pooled_map(call, self.block), selection=self.selection, most=most)
            if self.trust is not None:
                pooled = pooled.masked_fill(distrusted(call, self.block, self.trust), ALWAYS)
        columns, diagonals = marginal_levels(probe, least=least, most=most, stop=self.stop, count=self.count)
        levels = block_levels(columns, diagonals, pooled, aware, probe.tokens)
        gamma = torch.full(levels.shape[:1], self.gamma, device=levels.device)
        if self.density is not None:
            gamma = gamma_for_density(levels, probe.pairs(), self.density).to(levels.dtype)
        blocks = filled(levels < gamma[:, None, None, None], least)
        mask = BlockMask(blocks, call.queries, call.keys, self.block, self.block)
        return FlexSelection(mask, aware, divergence, gamma, call.site.layer)


def select_blocks(
    query: Float[Tensor, "batch heads tokens dim"],
    key: Float[Tensor, "batch kv_heads tokens dim"],
    *,
    scale: float | None = None,
    softcap: float | None = None,
    **options: Any,
) -> FlexSelection:
    """FlexPrefill's blocks for queries and keys without a host; `options` are the fields of `FlexPrefill`.

    The mask runs by `kernels.block_sparse.block_sparse_attention`, which also returns the log-sum-exp."""
    if query.shape[2] != key.shape[2]:
        raise ArgumentError(
            f"query, key: got {query.shape[2]} and {key.shape[2]} tokens, expected the whole prompt on both sides."
        )
    scale = query.shape[3] ** -0.5 if scale is None else scale
    call = AttentionCall.from_tensors(query, key, key, causal=True, scale=scale, softcap=softcap)
    return FlexPrefill(**options).blocks_of(call)


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[FlexPrefill]:
    """FlexPrefill that reads `share` of the causal triangle of a `tokens`-long prompt; decoding stays dense.

    The block shrinks from 128 to 16 tokens for short prompts, so that a share can be met; the sink and diagonal blocks,
    about 4 / blocks of the triangle, are read at any share. The budget holds also where dense would be as fast. What
    follows the prompt in a forward of its own, such as a question behind its context, is read densely."""
    check_share(share, tokens)
    block = 128
    while block > 16 and tokens < BUDGET_BLOCKS * block:
        block //= 2
    return (FlexPrefill(density=share, block=block, min_budget=None, approximates=False, chunks="dense"),)
