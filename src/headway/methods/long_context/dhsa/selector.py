"""The stage: DHSA in a host, in prefill (whole or in pieces) and decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.row_memory import remembered
from headway.door.selection import Dense, Keys, Selection
from headway.door.selector_calls import require_no_bias, require_one_way
from headway.door.stages import Selector
from headway.errors import ArgumentError, ConflictError, check_whole, unknown
from headway.kernels.pooling import block_means
from headway.methods.budget import check_share
from headway.methods.long_context.dhsa.boundaries import BoundarySource, Piece, Similarity
from headway.methods.long_context.dhsa.choosing import choose_for_row, choose_tokens, key_lists
from headway.methods.long_context.dhsa.chunks import NORMS, Chunks, chunks_of

CHOICES = {
    "norm": NORMS,
    "heads": ("kv", "mean"),
    "queries": ("blocks", "chunks"),
    "query_pool": ("mean", "max"),
    "decode": ("sparse", "dense"),
}
#: Dense tokens at the end of a prompt in the released code, and the part of a share that they may take.
SUFFIX, SUFFIX_SHARE = 64, 0.1
#: Rows × tokens × heads that are looked at together while keys are chosen (a few tensors of 32 MB).
STEP_ELEMENTS = 1 << 22


@dataclass(frozen=True, kw_only=True, eq=False)
class DHSA(Selector):
    """`headway.use(model, DHSA(boundaries=Predicted(predictor=…), budget=1024))`.

    boundaries: where chunks come from. budget: keys that a query reads, N_b (None: all, which is dense).
    decode_budget: the same for generated tokens (None: `budget`); decode="dense" reads all keys then, as the released
    code does. block: queries that share a list of keys. local_tokens: the last keys up to the end of the block, always
    read. global_tokens: the first keys (of a sliding layer, those at the start of its window), always read. suffix: the
    last tokens of a prompt (of each piece of one that comes in pieces); they form a chunk, and blocks of queries that
    hold any of them read everything. norm: see `chunks`. heads: every KV head chooses for itself ("kv"), or one choice
    by queries and keys averaged over heads ("mean", released code). queries: "blocks" of fixed size (released code), or
    rows scored by their own "chunks" with a list per row (paper; slower). query_pool: "mean", or "max" over a block
    (released option). share_boundaries: the first layer's serve all layers. share_selection: the first layer's keys
    serve all layers of one reach. approximates: whether to run dense where that is as fast.

    Beside the cache of a request it keeps the sums of its chunks, one float32 vector per chunk and KV head.
    Blocks of queries are counted from the first row of a forward: padding in front by a multiple of `block`, and any
    behind, changes nothing."""

    boundaries: BoundarySource = field(default_factory=Similarity)
    budget: int | None = 2048
    decode_budget: int | None = None
    block: int = 64
    local_tokens: int = 128
    global_tokens: int = 128
    suffix: int = SUFFIX
    norm: str = "sqrt"
    heads: str = "kv"
    queries: str = "blocks"
    query_pool: str = "mean"
    decode: str = "sparse"
    share_boundaries: bool = True
    share_selection: bool = False
    approximates: bool = True

    looks_ahead = "a block of queries chooses by its mean, and boundaries are ranked over the whole prompt"

    def __post_init__(self) -> None:
        if not isinstance(self.boundaries, BoundarySource):
            raise ArgumentError(
                f"boundaries: got {self.boundaries!r}, expected a source such as Similarity() or Fixed(size=32)."
            )
        check_whole("block", self.block, 1)
        for name in ("local_tokens", "global_tokens", "suffix"):
            check_whole(name, getattr(self, name), 0)
        least = self.block if self.queries == "blocks" else 1
        if self.local_tokens < least:
            raise ArgumentError(
                f"local_tokens: got {self.local_tokens}, expected at least {least}, so that every query reads itself."
            )
        for name in ("budget", "decode_budget"):
            value = getattr(self, name)
            check_whole(name, value, 0, optional=True)
            if value is not None and value < self.local_tokens + self.global_tokens:
                raise ArgumentError(
                    f"{name}: {value} is smaller than local ({self.local_tokens}) + global ({self.global_tokens}) "
                    "tokens. Raise it, or keep fewer of them."
                )
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, getattr(self, name), known)
        if self.queries == "chunks" and self.query_pool == "max":
            raise ArgumentError("query_pool: got 'max' with query chunks, expected 'mean'. Use queries='blocks'.")

    def __deepcopy__(self, memo: dict[int, Any]) -> DHSA:
        """The stage itself: a copied cache keeps what this stage remembers in it."""
        return self

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def prepare(self, sites: Sequence[Site]) -> None:
        for site in sites:
            if self.acts_at(site):
                self.boundaries.check_width(site.kv_heads * site.head_dim, site.name)

    @torch.no_grad()
    def select(self, call: AttentionCall) -> Selection:
        budget = self._budget(call)
        if budget is None:
            return Dense()
        if call.site.window is not None and call.site.window <= budget:
            # The layer's own window is all that the budget could choose from.
            return Dense()
        require_one_way(call, self.title)
        require_no_bias(call, self.title)
        tokens = call.first_key + call.offset + call.queries
        shared = call.forward.scratch.setdefault((self, "keys", call.site.window, tokens), {})
        if self.share_selection and "keys" in shared:
            return shared["keys"]
        state = remembered(call.forward, (self, call.site.name))
        if call.queries == 1 and tokens > 1:
            chosen = self._step(call, self._known(call, state, tokens - 1), state, budget)
        else:
            chosen = self._prompt(call, state, budget)
        shared["keys"] = chosen
        return chosen

    def _budget(self, call: AttentionCall) -> int | None:
        """Keys a row may read in this call; None for all."""
        if self.budget is None or call.queries > 1:
            return self.budget
        return None if self.decode == "dense" else self.decode_budget or self.budget

    def _prompt(self, call: AttentionCall, state: dict[str, Any], budget: int) -> Selection:
        """A prompt, or a piece of one behind what is known."""
        tokens = call.first_key + call.offset + call.queries
        past = tokens - call.queries
        if past:
            key, real = self._new_keys(call, past, tokens)
            chunks = self._known(call, state, past).with_piece(key, real, self._starts(call, past, tokens))
        else:
            chunks = self._cut(call, tokens)
        _store(state, chunks)
        return Dense() if tokens <= max(budget, self.suffix) else self._lists(call, chunks, budget)

    def _step(self, call: AttentionCall, chunks: Chunks, state: dict[str, Any], budget: int) -> Selection:
        """A generated token: it reads itself, the latest keys, the first, and chunks by their score before it came."""
        chunks = chunks.opened()
        scores = chunks.scores(self._choosers(call.query, call), self.norm)
        key, real = self._new_keys(call, chunks.tokens, chunks.tokens + 1)
        chunks = chunks.with_token(key, real)
        _store(state, chunks)
        if chunks.tokens <= budget:
            return Dense()
        first = self._first_seen(call, chunks.tokens)
        if first is not None and call.offset + 1 - int(first.max()) >= budget:
            ends = chunks.ends - call.first_key
            forced = {"early": self.global_tokens, "local": self.local_tokens}
            index = choose_for_row(scores[:, :, 0], ends, first, call.offset, **forced, budget=budget)
            return Keys(index[:, :, None], query_block=1)
        at = torch.full((1,), call.offset, device=call.query.device)
        allowed, forced_keys = self._sides(_real(call, call.first_key, chunks.tokens), at, at, call.site.window)
        member = chunks.of_tokens(call.first_key, chunks.tokens)
        return Keys(*key_lists(choose_tokens(scores, member, allowed, forced_keys, budget)), query_block=1)

    def _first_seen(self, call: AttentionCall, tokens: int) -> Int[Tensor, " batch"] | None:
        """The first key that the last row of each sequence sees; None where padding stands between tokens."""
        oldest = 0 if call.site.window is None else max(call.offset - call.site.window + 1, 0)
        real = call.real_tokens(call.first_key, tokens)
        if real is None or bool(real.all()):
            return torch.full((call.query.shape[0],), oldest, device=call.query.device)
        first = real.int().argmax(1)
        return first.clamp(min=oldest) if bool((real.sum(1) == real.shape[1] - first).all()) else None

    def _known(self, call: AttentionCall, state: dict[str, Any], tokens: int) -> Chunks:
        """The chunks of the first tokens: remembered, or made anew for a request that began elsewhere."""
        chunks = _stored(state)
        if chunks is not None and chunks.tokens == tokens:
            return chunks
        if call.first_key:
            raise ConflictError(
                f"{call.site.name}: got a cache that has dropped {call.first_key} keys which {self.title} has not "
                "seen, expected a request from its beginning. Start it inside the scope."
            )
        return self._cut(call, tokens)

    def _cut(self, call: AttentionCall, tokens: int) -> Chunks:
        return chunks_of(*self._new_keys(call, 0, tokens), self._starts(call, 0, tokens))

    def _new_keys(self, call: AttentionCall, start: int, stop: int) -> tuple[Tensor, Bool[Tensor, "batch tokens"]]:
        """Keys of whoever chooses at positions from `start` to `stop`, and which are real."""
        key = call.key[:, :, start - call.first_key : stop - call.first_key]
        key = key.float().mean(1, keepdim=True) if self.heads == "mean" else key
        return key, _real(call, start, stop)

    def _starts(self, call: AttentionCall, start: int, stop: int) -> Bool[Tensor, "batch tokens"]:
        shared = call.forward.scratch.setdefault((self, "boundaries", start, stop), {})
        if "starts" not in shared or not self.share_boundaries:
            key = call.key[:, :, start - call.first_key : stop - call.first_key]
            shared["starts"] = self.boundaries.starts(Piece(key, _real(call, start, stop), call, self.suffix))
        return shared["starts"]

    def _lists(self, call: AttentionCall, chunks: Chunks, budget: int) -> Keys:
        """The keys of every block of queries (of every row, for query chunks)."""
        rows, device = call.queries, call.query.device
        size = self.block if self.queries == "blocks" else 1
        real = _real(call, call.first_key, chunks.tokens)
        vectors = chunks.vectors(self.norm)
        member = chunks.of_tokens(call.first_key, chunks.tokens)
        query = self._pooled(call, real[:, -rows:], member[:, -rows:])
        count = -(-rows // size)
        firsts = torch.arange(count, device=device) * size + call.offset
        lasts = (firsts + size).clamp(max=call.offset + rows) - 1
        # A block ends with its last token: what pads behind a prompt see is not what its last rows read.
        ends = (real.shape[1] - real.flip(1).int().argmax(1))[:, None]
        lasts = torch.where(firsts < ends, torch.minimum(lasts, ends - 1), lasts)
        in_suffix = (lasts >= ends - self.suffix) & (firsts < ends)
        step = max(STEP_ELEMENTS // (vectors.shape[1] * member.numel()), 1)
        lists = []
        for part in torch.arange(count, device=device).split(step):
            scores = query[:, :, part] @ vectors.transpose(-1, -2)
            allowed, forced = self._sides(real, firsts[part], lasts[:, part], call.site.window)
            kept = choose_tokens(scores, member, allowed, forced, budget)
            whole = in_suffix[:, part, None] & allowed
            lists.append(key_lists(kept | whole[:, None]))
        most = max(index.shape[3] for index, _ in lists)
        index, valid = (
            torch.cat([torch.nn.functional.pad(entry[i], (0, most - entry[i].shape[3])) for entry in lists], 2)
            for i in (0, 1)
        )
        return Keys(index, valid, query_block=size)

    def _sides(self, real: Tensor, first: Tensor, last: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Keys from which rows that stand from `first` to `last` may choose, and those that they always read.

        A window is counted from the last row of a block, as in the released code."""
        at = torch.arange(real.shape[1], device=real.device)
        oldest = torch.zeros_like(last) if window is None else last - window + 1
        own = (at >= first[:, None]) & (at <= last[..., None])
        seen = real[:, None] & (at <= last[..., None]) & (at >= oldest[..., None])
        early = seen & (seen.int().cumsum(-1) <= self.global_tokens)
        # A row of padding reads its own block, which the host's mask hides or not as it does without this method.
        return seen | own, (seen & (at > (last - self.local_tokens)[..., None])) | early | own

    def _choosers(self, query: Tensor, call: AttentionCall) -> Float[Tensor, "batch choosers rows dim"]:
        """Queries averaged over the heads that choose together."""
        batch, _, rows, dim = query.shape
        choosers = 1 if self.heads == "mean" else call.key.shape[1]
        return query.float().reshape(batch, choosers, -1, rows, dim).mean(2)

    def _pooled(self, call: AttentionCall, real: Tensor, member: Tensor) -> Float[Tensor, "batch choosers blocks dim"]:
        """What stands for a block of queries, or for the chunk of each row: √n · mean of its real rows."""
        query = self._choosers(call.query, call)
        if self.queries == "chunks":
            starts = torch.ones_like(real)
            starts[:, 1:] = member[:, 1:] != member[:, :-1]
            own = starts.long().cumsum(1) - 1
            vectors = chunks_of(query, real, starts).vectors()
            return vectors.gather(2, own[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        extra = -query.shape[2] % self.block
        if self.query_pool == "max":
            hidden = torch.nn.functional.pad(query.masked_fill(~real[:, None, :, None], -torch.inf), (0, 0, 0, extra))
            hidden[:, :, query.shape[2] :] = -torch.inf
            return hidden.unflatten(2, (-1, self.block)).amax(3).clamp(min=torch.finfo(torch.float32).min)
        rows = torch.nn.functional.pad(real, (0, extra)).unflatten(1, (-1, self.block)).sum(-1)
        return block_means(query, self.block, real) * rows.sqrt()[:, None, :, None]


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[DHSA]:
    """DHSA that reads `share` of the causal triangle of a `tokens`-long prompt, and `share` of all keys when it
    generates; 1 is dense. Boundaries are those of key similarity, which needs no training.

    A budget of N keys per row reads N·t − N²/2 of t²/2 pairs. Local and global tokens take half of it at most, and a
    dense suffix what is left of a tenth of the share (none for short prompts)."""
    check_share(share, tokens)
    if share == 1:
        return (DHSA(budget=None, approximates=False),)
    suffix = SUFFIX if 2 * SUFFIX * tokens <= SUFFIX_SHARE * share * tokens**2 else 0
    left = share - 2 * suffix / tokens
    budget = max(round(tokens * (1 - (1 - left) ** 0.5)), 2)
    near = max(min(budget // 4, 128), 1)
    block = 1 << (min(near, 64).bit_length() - 1)
    return (
        DHSA(
            budget=budget,
            decode_budget=max(round(share * tokens), budget),
            block=block,
            local_tokens=near,
            global_tokens=min(near, budget - near),
            suffix=suffix,
            approximates=False,
        ),
    )


def _real(call: AttentionCall, start: int, stop: int) -> Bool[Tensor, "batch tokens"]:
    """Which positions of the sequence are tokens and no padding; all where the host told nothing."""
    real = call.real_tokens(start, stop)
    if real is None:
        real = torch.ones(call.query.shape[0], stop - start, dtype=torch.bool, device=call.query.device)
    return real


def _store(state: dict[str, Any], chunks: Chunks) -> None:
    state.update(vars(chunks))


def _stored(state: dict[str, Any]) -> Chunks | None:
    return Chunks(**state) if state else None
