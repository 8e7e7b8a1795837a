"""What H2O, A2SF, KeyDiff and OrthoRank share: a cache that keeps, per KV head, the keys of highest score.

    kept = first S tokens ∪ last R tokens ∪ the B − S − R others of highest score

Methods differ in the score alone. A forward reads what is stored and its own tokens; after that the lowest scores
leave, layer by layer, so that a long prompt is never held in all layers at once. Scores, sinks and budgets are those of
each sequence of a batch, counted from its first real token. A host with learned sinks or with a gate on
the output of attention needs no first token: there nothing is protected, and a warning says so.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door.caches import PolicyCache, PolicyLayer, TokenStore
from headway.door.call import AttentionCall
from headway.door.policy_hosts import require_plain_decoder, require_plain_positions, text_config
from headway.door.stages import CachePolicy
from headway.errors import ArgumentError, HostError
from headway.kernels.dense import DEFAULT_BLOCK
from headway.methods.budget import check_share
from headway.methods.sinks.sink_survey.places import first_of, sink_free

log = logging.getLogger(__name__)

#: First tokens that stay; four are enough for most models (arXiv 2309.17453).
SINKS = 4
#: Position of a slot that holds nothing: another sequence of the batch kept more.
EMPTY = -1
Ranked = TypeVar("Ranked", bound="RankedEviction")


@dataclass(frozen=True, kw_only=True, eq=False)
class RankedEviction(CachePolicy):
    """Keeps `budget` keys per KV head: the first `sinks` tokens, the last `recent` ones, and the others of highest
    score. A method overrides `rank`.

    Raises ArgumentError for a budget that cannot hold sinks and recent tokens, HostError for hosts with a position bias
    or compressed keys."""

    by_forward = "keys leave once for all rows of a forward, by scores that these rows have changed"
    budget: int = 512
    recent: int = 32
    sinks: int = SINKS

    def __post_init__(self) -> None:
        if self.budget < 1 or self.recent < 0 or self.sinks < 0 or self.sinks + self.recent > self.budget:
            raise ArgumentError(
                f"budget, recent, sinks: got {self.budget}, {self.recent}, {self.sinks}; expected a budget of at least "
                "1 that holds both, and none below 0. Raise the budget or lower the others."
            )

    def rank(
        self, call: AttentionCall, layer: RankedLayer, given: AttentionCall, real: Bool[Tensor, "batch kv_heads slots"]
    ) -> Float[Tensor, "batch kv_heads slots"]:
        """The scores of all slots once the rows of this call have been read; higher stays.

        `layer.score` holds those from before, 0 for the new tokens. `given` is the call over the slots of the store,
        `real` where these hold a token."""
        raise NotImplementedError

    def make_cache(self, model: nn.Module) -> RankedCache:
        return RankedCache(self, model)

    def read(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        if call.site.kind != "self" or not isinstance(call.forward.cache, RankedCache):
            return None
        require_plain_positions(call)
        layer = call.forward.cache.layers[call.site.layer]
        if layer.store.key.shape[3] != call.key.shape[3]:
            raise HostError(
                f"{call.site.name}: got keys of {call.key.shape[3]} dimensions, {layer.store.key.shape[3]} in the "
                "cache; expected as many: multi-head latent attention stores its keys compressed."
            )
        whole = layer.seen == call.queries
        real = _real(call, layer)
        given = call if whole else _over_store(call, layer, real)
        with torch.no_grad():
            layer.score = self.rank(call, layer, given, real)
            if bool((real.sum(-1) > self.budget).any()):
                self._evict(call, layer, real)
        return None if whole else [given]

    def _evict(self, call: AttentionCall, layer: RankedLayer, real: Bool[Tensor, "batch kv_heads slots"]) -> None:
        places = layer.store.positions
        stays = places >= layer.seen - self.recent
        instead = sink_free(call)
        if instead is None:
            first = first_of(call).to(places.device)
            stays = stays | (places - first[:, None, None] < self.sinks)
        elif self.sinks:
            call.forward.cache.tell(
                f"{self.title}: the host has {instead}, so its first tokens are not kept for their sake."
            )
        score = layer.score.masked_fill(real & stays, torch.inf).masked_fill(~real, -torch.inf)
        place = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        layer.keep(real & (place < self.budget))


class RankedLayer(PolicyLayer):
    """One layer: keys by KV head in the order of positions, empty slots first, and the score of each slot.

    `anchor` is one vector per sequence that a method may keep (a sink's direction)."""

    def __init__(self) -> None:
        super().__init__()
        self.store = TokenStore(per_head=True)
        self._forget()

    def _forget(self) -> None:
        self.score = torch.empty(0)
        self.anchor: Tensor | None = None

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        return (self.store,)

    def file(self, key: Tensor, value: Tensor, positions: Int[Tensor, " new"]) -> None:
        if self.store.empty:
            self.score = torch.zeros(*key.shape[:2], 0, device=key.device)
        self.store.append(key, value, positions)
        self.score = torch.nn.functional.pad(self.score, (0, key.shape[2]))

    def keep(self, chosen: Bool[Tensor, "batch kv_heads slots"]) -> None:
        """Keeps the chosen slots in their order; sequences and heads with fewer get empty slots in front."""
        most = int(chosen.sum(-1).max())
        slots = torch.arange(self.store.length, device=chosen.device).expand_as(chosen)
        index = torch.where(chosen, slots, EMPTY).sort(-1).values[..., self.store.length - most :]
        empty, index = index < 0, index.clamp(min=0)
        self.store.keep(index)
        self.store.positions[empty] = EMPTY
        self.score = self.score.gather(-1, index).masked_fill(empty, 0.0)

    def reset(self) -> None:
        super().reset()
        self._forget()

    def select(self, index: Int[Tensor, " rows"]) -> None:
        super().select(index)
        if self.score.numel():
            self.score = self.score[index.to(self.score.device)]
        if self.anchor is not None:
            self.anchor = self.anchor[index.to(self.anchor.device)]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.store.empty:
            self.select(torch.arange(self.store.key.shape[0]).repeat_interleave(repeats))


class RankedCache(PolicyCache):
    """The cache of one request."""

    layers: list[RankedLayer]  # type: ignore[assignment]

    def __init__(self, policy: RankedEviction, model: nn.Module) -> None:
        require_plain_decoder(model)
        super().__init__(policy, [RankedLayer() for _ in range(text_config(model).num_hidden_layers)])
        self._told: set[str] = set()

    def stored_bytes(self) -> int:
        """Bytes of keys, values and scores."""
        extra = [t for layer in self.layers for t in (layer.score, layer.anchor) if t is not None]
        return super().stored_bytes() + sum(t.numel() * t.element_size() for t in extra)

    def held(self) -> list[Int[Tensor, "batch kv_heads slots"]]:
        """Positions that each layer holds, in order; −1 where a slot is empty."""
        return [layer.store.positions for layer in self.layers]

    def tell(self, words: str) -> None:
        """Warns once in a request."""
        if words not in self._told:
            self._told.add(words)
            log.warning(words)


def accumulated(
    given: AttentionCall, kv_heads: int, *, forgetting: float = 1.0, block: int = DEFAULT_BLOCK
) -> Float[Tensor, "batch kv_heads keys"]:
    """Σ_t γ^(n−1−t) A_tj over the n query rows of a call, the mean over the query heads that share a key head.

    Rows that are padding give nothing. Taken block by block: O(block × keys) memory."""
    batch, heads, queries = given.query.shape[:3]
    real = real_rows(given)
    total = torch.zeros(batch, kv_heads, given.keys, device=given.query.device)
    for rows in torch.arange(queries, device=given.query.device).split(block):
        weights = given.weights(rows)
        if forgetting != 1:
            weights = weights * (forgetting ** (queries - 1 - rows).float())[:, None]
        if real is not None:
            weights = torch.where(real[:, None, rows, None], weights, 0.0)
        total += weights.sum(2).unflatten(1, (kv_heads, heads // kv_heads)).mean(2)
    return total


def real_rows(call: AttentionCall) -> Bool[Tensor, "batch queries"] | None:
    """Query rows that are tokens; None when all are."""
    start = int(call.forward.cache.get_seq_length(call.site.layer)) - call.queries if call.forward.cache else 0
    return call.real_tokens(start, start + call.queries)


def ranked_at_budget(
    policy: type[Ranked], share: float, *, tokens: int, model: nn.Module, recent: float, **options: Any
) -> tuple[Ranked]:
    """The policy with about `share` of `tokens` tokens as its budget, of which a share `recent` are the last ones. At 1
    the budget covers every position that the host has, and nothing is evicted."""
    check_share(share, tokens)
    if share == 1:
        positions = getattr(text_config(model), "max_position_embeddings", None)
        budget = max(tokens, positions if isinstance(positions, int) else 2 * tokens)
    else:
        budget = max(round(share * tokens), 1)
    return (policy(budget=budget, recent=int(recent * budget), sinks=min(SINKS, budget // 4), **options),)


def _real(call: AttentionCall, layer: RankedLayer) -> Bool[Tensor, "batch kv_heads slots"]:
    """Slots that hold a token: neither empty nor padding."""
    places = layer.store.positions
    real = places >= 0
    known = call.real_tokens(0, layer.seen)
    if known is not None:
        real = real & known[:, None].expand(-1, places.shape[1], -1).gather(2, places.clamp(min=0))
    return real


def _over_store(call: AttentionCall, layer: RankedLayer, real: Bool[Tensor, "batch kv_heads slots"]) -> AttentionCall:
    """The call over everything that the layer holds."""
    places, rows = layer.store.positions, call.query_positions
    seen = real[:, :, None] & (places[:, :, None] <= rows[:, None])
    if call.site.window is not None:
        seen = seen & (places[:, :, None] > rows[:, None] - call.site.window)
    return call.replace(
        key=layer.store.key, value=layer.store.value, mask=seen.repeat_interleave(call.groups, 1), causal=False,
        key_at=places, first_key=0, first_query=None,
    )  # fmt: skip
