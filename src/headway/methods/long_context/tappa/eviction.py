"""The cache policy: keeps few keys where attention can be foretold, and many where it cannot.

After a prompt has been read, each layer's budget follows from how alike its last queries are, and its keys are ranked
by the attention of those queries. Budgets are shared out anew after every layer over the layers so far, and keys leave
at once, so that the cache never holds the whole prompt in all layers (the cascade of CAKE, arXiv 2503.12491).

The released TAPPA forwards record scores and never call the eviction; its cache stays full. Here keys leave. The code
gives a budget to a layer (`level="layer"`); `level="head"` gives one to each KV head. Statistics are taken of every
sequence, without padding, where the released code takes those of the first. arXiv 2601.21709.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headway.door.caches import PolicyCache
from headway.door.call import AttentionCall
from headway.door.policy_hosts import require_plain_decoder, require_plain_positions, text_config
from headway.door.rotary import host_frequencies
from headway.door.stages import CachePolicy
from headway.errors import ArgumentError, HostError, check_whole, is_number, unknown
from headway.kernels.rope import Layout
from headway.methods.long_context.tappa.budget import (
    PREFERENCES,
    allocate,
    dispersion,
    preferences,
    shift,
    temperatures,
    token_scores,
)
from headway.methods.long_context.tappa.similarity import PAIRS, STAGES, Pairs, Stage, query_similarity
from headway.methods.long_context.tappa.store import UNCUT, TappaLayer

LEVELS = ("layer", "head")
WINDOW = 32
#: While a prompt's layers are read, a layer lets go once it holds this many times its share of the moment.
EARLY = 1.25
#: Keys that decoding may add before the budget is restored, as a share of it; every step would cost more than it saves.
SLACK = 1 / 16


@dataclass(frozen=True, kw_only=True, eq=False)
class TappaEviction(CachePolicy):
    """KV budgets by query similarity: `headway.use(model, TappaEviction(budget=512))`.

    budget: mean keys per layer B, the window among them; (B − window) · layers are shared out. window: last tokens that
    stay, whose queries are the judges. level: a budget for each layer, or for each KV head. preference: what budgets
    follow, see `preferences`; alpha, tau and normalise are those of its mixed form (tau=None: by model type). pairs and
    stage: the reading of query similarity. gamma, pool: those of `token_scores`. slack: keys beyond the budget that
    decoding may add before they leave together; None is a sixteenth of the budget, 0 the released code's every step.

    Sequences of up to budget + window tokens are left whole. A later forward of at least `window` tokens shares out
    anew; in shorter ones what exceeds the budget leaves by the attention of the current queries. While the layers of a
    prompt are read, each may hold a quarter more than its share. In a batch a layer has as many slots as its largest
    sequence needs. Raises ArgumentError for a budget that is no more than the window, HostError for position biases."""

    by_forward = "keys leave once for all rows of a forward, by the attention of these rows"
    budget: int = 1024
    window: int = WINDOW
    level: str = "layer"
    preference: str = "similarity"
    alpha: float = 1.0
    tau: tuple[float, float] | None = None
    normalise: bool = True
    pairs: Pairs = "all"
    stage: Stage = "post_rope"
    gamma: float = 200.0
    pool: int = 5
    slack: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        check_whole("window", self.window, 1)
        check_whole("budget", self.budget, 1)
        if self.budget <= self.window:
            raise ArgumentError(
                f"budget, window: got {self.budget}, {self.window}; expected a budget above the window. Raise the one "
                "or lower the other."
            )
        for name, valid in (("level", LEVELS), ("preference", PREFERENCES), ("pairs", PAIRS), ("stage", STAGES)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        check_whole("pool", self.pool, 1)
        if self.pool % 2 == 0:
            raise ArgumentError(f"pool: got {self.pool}, expected an odd number of neighbours; 1 is no pooling.")
        for name in ("gamma", "alpha"):
            if not (is_number(getattr(self, name)) and getattr(self, name) >= 0):
                raise ArgumentError(f"{name}: got {getattr(self, name)!r}, expected a number of at least 0.")
        both = isinstance(self.tau, Sequence) and len(self.tau) == 2
        if self.tau is not None and not (both and all(is_number(t) and t > 0 for t in self.tau)):
            raise ArgumentError(
                f"tau: got {self.tau!r}, expected two temperatures above 0, or None for those of the model type."
            )
        check_whole("slack", self.slack, 0, optional=True)
        check_whole("seed", self.seed, 0)

    @property
    def room(self) -> int:
        """Keys beyond the budget that decoding may add."""
        return int(self.budget * SLACK) if self.slack is None else self.slack

    def make_cache(self, model: nn.Module) -> TappaCache:
        return TappaCache(self, model)

    def read(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        if call.site.kind != "self" or not isinstance(call.forward.cache, TappaCache):
            return None
        require_plain_positions(call)
        cache, index = call.forward.cache, call.site.layer
        layer = cache.layers[index]
        if layer.width != call.key.shape[3]:
            raise HostError(
                f"{call.site.name}: got keys of {call.key.shape[3]} dimensions, {layer.width} in the cache; expected "
                "as many: multi-head latent attention stores its keys compressed."
            )
        rows = call.query_positions
        whole = layer.seen == call.queries
        parts = None if whole else [self._part(call, layer, n, call.query, rows) for n in range(len(layer.parts))]
        with torch.no_grad():
            self._judge(call, cache, index)
        return parts

    def settle(self, cache: Any) -> None:
        for layer in cache.layers:
            layer.scores = []

    def _judge(self, call: AttentionCall, cache: TappaCache, index: int) -> None:
        """Scores, budgets and evictions that this layer's read brings about."""
        layer = cache.layers[index]
        tokens = _real_tokens(call, layer.seen)
        cut = layer.budget[:, 0] < UNCUT
        share = (~cut & (tokens > self.budget + self.window)) | (cut & (call.queries >= self.window))
        recent = layer.remember(call.query, self.window)
        layer.scores = []
        if bool(share.any()):
            layer.past = self._past(call, layer)
            layer.held = torch.where(share[:, None], layer.past, layer.held)
            self._measure(call, layer, recent, cache.rotary[index])
            self._cascade(call, cache, index, share)
        trim = cut & ~share
        layer.held = torch.where(trim[:, None], layer.held + call.queries, layer.held)
        over = trim & (layer.held > layer.budget + self.room).any(1)
        if bool(over.any()):
            fresh = self._score(call, layer, call.query)
            # Sequences that are cut in this very forward keep their scores for the layers that follow.
            layer.scores = [
                torch.where(over[:, None, None], new, old)
                for new, old in zip(fresh, layer.scores or fresh, strict=True)
            ]
            self._evict(call, layer, over)
        # Whoever is cut in a short forward has passed the budget at least a window ago: earlier queries are not needed.
        waiting = (layer.budget[:, 0] == UNCUT) & (tokens > self.budget)
        layer.recent = recent.clone() if bool(waiting.any()) else None

    def _measure(
        self, call: AttentionCall, layer: TappaLayer, recent: Tensor, rotary: tuple[Tensor | None, Layout]
    ) -> None:
        """Token scores and what the preference is made of, from the window's queries."""
        weights = self._window_weights(call, layer, recent)
        layer.scores = self.prompt_scores(call, layer, weights, rotary)
        positions = _recent_positions(layer.seen, recent.shape[2], call.query.device)
        similarity = query_similarity(
            recent,
            pairs=self.pairs,
            stage=self.stage,
            valid=_real_columns(call, positions),
            positions=positions,
            frequencies=rotary[0],
            layout=rotary[1],
        )
        by_store = similarity.unflatten(1, (len(layer.parts), -1)).mean(-1)
        layer.measures = {"similarity": by_store}
        if self.preference in ("mixed", "cake"):
            layer.measures |= {
                "spread": torch.stack([dispersion(w).mean(-1) for w in weights], 1),
                "variance": torch.stack([shift(w).mean(-1) for w in weights], 1),
            }

    def prompt_scores(
        self,
        call: AttentionCall,
        layer: TappaLayer,
        weights: Sequence[Tensor],
        rotary: tuple[Tensor | None, Layout],
    ) -> list[Tensor]:
        """The rank of every slot of each store when a prompt is cut, from the window's weights on them."""
        return self._padded_scores(call, layer, weights)

    def _cascade(self, call: AttentionCall, cache: TappaCache, index: int, share: Bool[Tensor, " batch"]) -> None:
        """Shares the total out over the layers so far, and lets go of what exceeds it."""
        layers = cache.layers[: index + 1]
        stores = len(layers[0].parts)
        if any(len(layer.parts) != stores for layer in layers):
            raise HostError(
                f"{call.site.name}: got layers with different numbers of KV heads, or without keys of their own, "
                "expected as many in all. Use level='layer' where only their number differs."
            )
        measures = [torch.cat([layer.measures[name] for layer in layers], 1) for name in layers[0].measures]
        tau = self.tau or temperatures(cache.model_type, self.budget)
        wish = preferences(
            self.preference, *measures, alpha=self.alpha, tau=tau, normalise=self.normalise, seed=self.seed
        )
        total = (self.budget - self.window) * len(cache.layers) * stores
        caps = torch.cat([layer.past for layer in layers], 1)
        final = index == len(cache.layers) - 1
        for row in share.nonzero()[:, 0].tolist():
            # The last layer makes the sum exact; before it every share is rounded up, so that nothing leaves that a
            # later rounding would have kept.
            budgets = allocate(wish[row], total, caps[row], exact=final)
            for number, layer in enumerate(layers):
                layer.budget[row] = budgets[number * stores : (number + 1) * stores].to(layer.budget.device)
        for layer in layers:
            if final or bool((layer.held > EARLY * layer.budget)[share].any()):
                self._evict(call, layer, share)

    def _evict(self, call: AttentionCall, layer: TappaLayer, rows: Bool[Tensor, " batch"]) -> None:
        for number, store in enumerate(layer.parts):
            real = self._real(call, layer, number)
            last = store.positions >= layer.seen - self.window
            score = layer.scores[number].masked_fill(~real, -torch.inf).masked_fill(real & last, torch.inf)
            rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
            past = (real & ~last).sum(-1)
            wanted = torch.minimum(layer.budget[:, number, None], past) + (real & last).sum(-1)
            kept = real & ((rank < wanted[..., None]) | ~rows[:, None, None])
            if not bool(kept.all()):
                layer.keep(number, kept)
        layer.held = torch.where(rows[:, None], torch.minimum(layer.held, layer.budget), layer.held)

    def _past(self, call: AttentionCall, layer: TappaLayer) -> Int[Tensor, "batch stores"]:
        """Keys before the window that each sequence holds (the same number in all heads of a store)."""
        counts = []
        for number, store in enumerate(layer.parts):
            real = self._real(call, layer, number) & (store.positions < layer.seen - self.window)
            counts.append(real.sum(-1)[:, 0])
        return torch.stack(counts, 1)

    def _real(self, call: AttentionCall, layer: TappaLayer, number: int) -> Bool[Tensor, "batch heads slots"]:
        """Slots that hold a token: neither empty nor padding."""
        places = layer.parts[number].positions
        real = places >= 0
        padding = call.forward.padding
        if padding is not None:
            known = padding.to(places.device)[:, None].expand(-1, places.shape[1], -1)
            real = real & known.gather(2, places.clamp(0, padding.shape[1] - 1))
        return real

    def _part(
        self, call: AttentionCall, layer: TappaLayer, number: int, query: Tensor, rows: Int[Tensor, " rows"]
    ) -> AttentionCall:
        """The call of some queries (at positions `rows`) over one store."""
        store = layer.parts[number]
        heads = torch.tensor(
            [h * call.groups + g for h in layer.heads_of(number) for g in range(call.groups)], device=query.device
        )
        places = store.positions
        seen = self._real(call, layer, number)[:, :, None] & (places[:, :, None] <= rows[:, None])
        if call.site.window is not None:
            seen = seen & (places[:, :, None] > rows[:, None] - call.site.window)
        return call.replace(
            query=query[:, heads],
            key=store.key,
            value=store.value,
            mask=seen.repeat_interleave(call.groups, 1),
            sinks=None if call.sinks is None else call.sinks[heads],
            causal=False,
            key_at=places,
            of_heads=heads if layer.split else None,
            first_key=0,
            first_query=None,
        )

    def _window_weights(self, call: AttentionCall, layer: TappaLayer, query: Tensor) -> list[Tensor]:
        """The weights of the last queries on the slots before the window, store by store."""
        rows = _recent_positions(layer.seen, query.shape[2], query.device)
        found = []
        for number in range(len(layer.parts)):
            part = self._part(call, layer, number, query, rows)
            found.append(part.weights()[..., : part.keys - self.window])
        return found

    def _score(self, call: AttentionCall, layer: TappaLayer, query: Tensor) -> list[Tensor]:
        return self._padded_scores(call, layer, self._window_weights(call, layer, query[:, :, -self.window :]))

    def _padded_scores(self, call: AttentionCall, layer: TappaLayer, weights: Sequence[Tensor]) -> list[Tensor]:
        """Scores of all slots; those of the window do not matter."""
        found = []
        for store, given in zip(layer.parts, weights, strict=True):
            score = token_scores(given, call.groups, gamma=self.gamma, pool=self.pool)
            found.append(torch.nn.functional.pad(score, (0, store.length - score.shape[-1])))
        return found


class TappaCache(PolicyCache):
    """The cache of one request."""

    layers: list[TappaLayer]  # type: ignore[assignment]

    def __init__(self, policy: TappaEviction, model: nn.Module) -> None:
        require_plain_decoder(model)
        config = text_config(model)
        self.model_type = str(getattr(config, "model_type", ""))
        count = config.num_hidden_layers
        rotary: list[tuple[Tensor | None, Layout]] = [(None, "half")] * count
        if policy.stage == "pre_rope":
            rotary = [host_frequencies(model, index) for index in range(count)]
            if any(frequencies is None for frequencies, _ in rotary):
                raise HostError(
                    f"{type(model).__name__}: got layers without rotary positions for stage='pre_rope', expected RoPE "
                    "in all. Use stage='post_rope'."
                )
        self.rotary = rotary
        super().__init__(policy, [TappaLayer(policy.level == "head") for _ in range(count)])

    def stored_bytes(self) -> int:
        """Bytes of keys, values and remembered queries."""
        return super().stored_bytes() + sum(layer.extra_bytes for layer in self.layers)

    def held(self) -> Int[Tensor, "layers batch kv_heads"]:
        """Tokens that each KV head holds, empty slots and padding of a batch not counted out."""
        counts = [torch.cat([(s.positions >= 0).sum(-1) for s in layer.parts], 1) for layer in self.layers]
        return torch.stack(counts)


def _recent_positions(seen: int, rows: int, device: torch.device) -> Int[Tensor, " rows"]:
    return torch.arange(seen - rows, seen, device=device)


def _real_tokens(call: AttentionCall, seen: int) -> Int[Tensor, " batch"]:
    padding = call.forward.padding
    if padding is None:
        return torch.full((call.query.shape[0],), seen, device=call.query.device)
    return padding[:, :seen].sum(1).to(call.query.device)


def _real_columns(call: AttentionCall, positions: Int[Tensor, " rows"]) -> Bool[Tensor, "batch rows"] | None:
    padding = call.forward.padding
    return None if padding is None else padding.to(positions.device)[:, positions]
