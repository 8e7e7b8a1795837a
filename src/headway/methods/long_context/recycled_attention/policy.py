"""The cache policy: when a step is full, what it chooses, and what the steps between read."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door.caches import PolicyCache, key_visible
from headway.door.call import AttentionCall, Site
from headway.door.policy_hosts import require_plain_decoder, require_plain_positions, text_config
from headway.door.stages import CachePolicy
from headway.errors import ArgumentError, check_whole, is_number, unknown
from headway.methods.long_context.recycled_attention.selection import (
    check_scoring,
    has_drifted,
    key_scores,
    log_weights,
    normalised_logs,
    query_similarity,
)
from headway.methods.long_context.recycled_attention.store import RecycledLayer

log = logging.getLogger(__name__)

FULL_STEPS = ("both", "attend", "select")
VICTIMS = ("refresh", "latest")
FIRST = ("recycled", "full")


@dataclass(frozen=True, kw_only=True, eq=False)
class RecycledAttention(CachePolicy):
    """Decoding that reads K keys and, now and then, all: `headway.use(model, RecycledAttention(budget=2048))`.

    budget: keys that a recycled step reads per KV head, K. stride: every so many steps one is full, S (None: never by
    count; 1: always, which is dense). threshold, check: every `check` steps a layer does a full step when the cosine of
    its query with that of its last full step is at most `threshold` (0.8 in the paper; None: not asked). Both schedules
    may be given: either calls for a full step. Without a stride, a layer also does one when fresh tokens fill half the
    budget. Without both, the prefill's choice stays; fresh tokens then keep to half the budget.

    pool, group: how weights become scores, see `key_scores`. victim: a new token takes the place of the entry of lowest
    score at the last full step ("refresh") or of lowest weight at the last step ("latest"). first: the first decoding
    step uses the prefill's choice ("recycled"), or is full. full_step: a full step reads all keys and chooses anew
    ("both"); "attend" reads without choosing, "select" chooses and reads only that, which are the paper's ablations.
    sinks: first tokens that are always chosen.

    Raises ArgumentError for numbers that cannot be, HostError for hosts whose keys it cannot gather."""

    budget: int = 2048
    stride: int | None = 10
    threshold: float | None = None
    check: int = 5
    pool: int = 7
    group: str = "max"
    victim: str = "refresh"
    first: str = "recycled"
    full_step: str = "both"
    sinks: int = 0

    narrows = frozenset({"decode"})

    def __post_init__(self) -> None:
        check_whole("budget", self.budget, 1)
        check_whole("stride", self.stride, 1, optional=True)
        check_whole("sinks", self.sinks, 0)
        check_whole("check", self.check, 1)
        # Without a stride, fresh tokens keep to half the budget.
        fresh = max(self.budget // 2, 1) if self.stride is None else self.stride
        needed = fresh + self.sinks
        if self.stride != 1 and self.budget <= needed:
            raise ArgumentError(
                f"budget: got {self.budget}, which cannot hold the {fresh - 1} tokens generated between "
                f"refreshes plus {self.sinks} sinks and any context; expected more than {needed}. Raise the budget or "
                "lower the stride."
            )
        if self.threshold is not None and not (is_number(self.threshold) and -1 <= self.threshold <= 1):
            raise ArgumentError(f"threshold: got {self.threshold!r}, expected a cosine from -1 to 1, or None.")
        check_scoring(self.pool, self.group)
        for name, valid in (("victim", VICTIMS), ("first", FIRST), ("full_step", FULL_STEPS)):
            if getattr(self, name) not in valid:
                raise unknown(name, getattr(self, name), valid)
        if self.full_step == "attend" and self.threshold is not None:
            raise ArgumentError(
                "full_step: got 'attend' with a threshold, expected a stride alone: a choice that is never renewed has "
                "no query to compare with. Leave the threshold out."
            )

    @property
    def recycles(self) -> bool:
        """Whether any step reads less than everything."""
        return self.stride != 1 or self.full_step == "select"

    @property
    def most_fresh(self) -> int:
        """Fresh tokens that the small cache holds before the oldest of them goes: all, where the schedule bounds
        them."""
        renewed = self.full_step != "attend" and (self.stride is not None or self.threshold is not None)
        return self.budget if renewed else max(self.budget // 2, 1)

    def prepare(self, sites: Sequence[Site]) -> None:
        sliding = sorted({site.layer for site in sites if site.window is not None})
        if sliding:
            log.warning("RecycledAttention: layers %s have a window of their own and stay as they are.", sliding)

    def make_cache(self, model: nn.Module) -> RecycledCache:
        return RecycledCache(self, model)

    def settle(self, cache: Any) -> None:
        for layer in cache.layers:
            layer.settle()

    def read(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        cache = call.forward.cache
        if call.site.kind != "self" or not isinstance(cache, RecycledCache):
            return None
        require_plain_positions(call)
        layer = cache.layers[call.site.layer]
        if call.site.window is not None:
            return _read_window(call, layer, call.site.window)
        whole = _whole(call, layer)
        if not layer.full_steps.numel():
            layer.full_steps = torch.zeros(call.query.shape[0], dtype=torch.long, device=call.query.device)
        if call.queries > 1 or layer.seen == 1:
            if self.recycles:
                layer.refresh(self._scores(whole), call.query[:, :, -1:])
            return None if call.keys == layer.seen else [whole]
        return [self._step(call, whole, layer)]

    def _step(self, call: AttentionCall, whole: AttentionCall, layer: RecycledLayer) -> AttentionCall:
        """One decoding step: all keys, the small cache, or by sequence the one or the other."""
        due = self._due(call.query, layer)
        layer.full_steps = layer.full_steps + due
        if not self.recycles:
            return whole
        if not layer.chosen:
            return self._choosing(call, whole, layer)
        every, some = bool(due.all()), bool(due.any())
        chooses = some and self.full_step != "attend"
        if every and self.full_step == "both":
            return self._choosing(call, whole, layer)
        if not (every and chooses):
            layer.push(self.most_fresh, None if whole.mask is None else whole.mask[:, 0, 0, -1])
        if chooses:
            layer.refresh(self._scores(whole), call.query, due)
        small = whole if layer.small.empty else _small(call, layer)
        if self.victim == "latest" and not every:
            self._rescore(small, layer, due)
        if every and not chooses:
            return whole
        alone = not some or self.full_step == "select" or layer.small.empty
        return small if alone else _mixed(whole, layer, due)

    def _due(self, query: Float[Tensor, "batch heads 1 dim"], layer: RecycledLayer) -> Bool[Tensor, " batch"]:
        """Which sequences do a full step now."""
        index = layer.steps + (self.first == "recycled")
        layer.steps += 1
        counted = self.stride is not None and index % self.stride == 0
        due = torch.full((query.shape[0],), counted or not layer.chosen, device=query.device)
        if self.threshold is None or bool(due.all()):
            return due
        if index % self.check == 0:
            due = due | has_drifted(query_similarity(query, layer.reference), self.threshold)
        if self.stride is None:
            due = due | (2 * (layer.seen - 1 - layer.full_at) >= self.budget)
        return due

    def _choosing(self, call: AttentionCall, whole: AttentionCall, layer: RecycledLayer) -> AttentionCall:
        """The call over all keys, which renews the choice from the logits that its output is made of."""

        def choose(logits: Tensor, lse: Tensor) -> None:
            logs = normalised_logs(logits.detach(), lse.detach())[:, :, -1]
            layer.refresh(self._ranked(logs, whole.key.shape[1]), call.query)

        return whole.replace(tell=choose)

    def _scores(self, call: AttentionCall) -> Float[Tensor, "batch kv_heads keys"]:
        """Scores of all keys by the last query row."""
        return self._ranked(log_weights(call, call.queries - 1), call.key.shape[1])

    def _ranked(self, logs: Float[Tensor, "batch heads keys"], kv_heads: int) -> Float[Tensor, "batch kv_heads keys"]:
        scores = key_scores(logs, kv_heads, pool=self.pool, group=self.group)
        if self.sinks:
            place = (scores > -torch.inf).cumsum(-1)
            scores = scores.masked_fill((scores > -torch.inf) & (place <= self.sinks), torch.inf)
        return scores

    def _rescore(self, small: AttentionCall, layer: RecycledLayer, due: Bool[Tensor, " batch"]) -> None:
        """Replaces the scores of the entries that may go by their weights in this step."""
        now = key_scores(log_weights(small, small.queries - 1), small.key.shape[1], pool=1, group=self.group)
        old = layer.score.isfinite() & ~due[:, None, None]
        layer.score = torch.where(old, now, layer.score)


class RecycledCache(PolicyCache):
    """The caches of one request: every token is kept, and K of them a second time."""

    layers: list[RecycledLayer]  # type: ignore[assignment]

    def __init__(self, policy: RecycledAttention, model: nn.Module) -> None:
        require_plain_decoder(model)
        layers = text_config(model).num_hidden_layers
        super().__init__(policy, [RecycledLayer(policy.budget) for _ in range(layers)])

    def crop(self, tokens_to_remove: int) -> None:
        """Takes the last tokens back; the next step is a full one.

        Raises ArgumentError when a part of the last forward is taken back (none of it included, which only a check of
        guesses asks for) and that forward had several tokens and more keys than the budget: it read all of them, where
        single steps would have recycled, so that what stays is not what decoding would have given."""
        count, last = abs(int(tokens_to_remove)), self.layers[0].last
        if self.policy.recycles and count < last and last > 1 and self.layers[0].seen > self.policy.budget:
            raise ArgumentError(
                f"RecycledAttention: got a request to take back {count} of the {last} tokens of one forward, expected "
                "all of them or single steps: a forward of several tokens reads every key, so guesses that it checks "
                f"are judged by dense attention as soon as there are more than {self.policy.budget:,} tokens. Generate "
                "without assisted decoding, raise the budget, or use stride=1."
            )
        super().crop(tokens_to_remove)

    def small_bytes(self) -> int:
        """Bytes that the method adds to those of the full cache."""
        return sum(layer.small.bytes for layer in self.layers)

    def full_steps(self) -> Int[Tensor, "layers batch"]:
        """Full steps among the decoding steps so far; sliding layers have none."""
        counts = [layer.full_steps for layer in self.layers]
        batch = max((count.numel() for count in counts), default=0)
        return torch.stack([count.cpu() if count.numel() else torch.zeros(batch, dtype=torch.long) for count in counts])


def _whole(call: AttentionCall, layer: RecycledLayer) -> AttentionCall:
    """The call over every key."""
    padding = call.forward.padding
    mask = None
    if padding is not None and padding.shape[1] >= layer.seen and not bool(padding.all()):
        mask = padding[:, None, None, : layer.seen].to(call.query.device)
    return call.replace(
        key=layer.full.key, value=layer.full.value, mask=mask, causal=call.queries > 1, first_key=0,
        first_query=layer.seen - call.queries,
    )  # fmt: skip


def _small(call: AttentionCall, layer: RecycledLayer) -> AttentionCall:
    """The call over the small cache, empty slots hidden."""
    held = layer.small.positions >= 0
    mask = None if bool(held.all()) else held.repeat_interleave(call.groups, 1)[:, :, None]
    return call.replace(
        key=layer.small.key, value=layer.small.value, mask=mask, causal=False, first_key=0, first_query=None,
        key_at=layer.small.positions,
    )  # fmt: skip


def _mixed(whole: AttentionCall, layer: RecycledLayer, due: Bool[Tensor, " batch"]) -> AttentionCall:
    """All keys for the sequences that are due, those of the small cache for the others: one call, which reads all."""
    places, held = layer.small.positions, layer.small.positions >= 0
    chosen = torch.zeros(*places.shape[:2], whole.keys, dtype=torch.int32, device=places.device)
    chosen.scatter_add_(2, places.clamp(min=0), held.int())
    mask = (chosen > 0) | due[:, None, None]
    mask = mask.repeat_interleave(whole.heads // mask.shape[1], 1)[:, :, None]
    return whole.replace(mask=mask if whole.mask is None else mask & whole.mask)


def _read_window(call: AttentionCall, layer: RecycledLayer, window: int) -> list[AttentionCall] | None:
    """A layer with a window of its own: what the host would read."""
    layer.window = window
    if call.keys == layer.seen:
        return None
    start = max(layer.full.length - (window - 1 + call.queries), 0)
    positions = layer.full.positions[:, start:]
    rows = call.query_positions
    mask = key_visible(rows, positions, call.forward.padding)
    mask = mask & (positions[:, None, None] > (rows[:, None] - window))
    return [
        call.replace(
            key=layer.full.key[:, :, start:], value=layer.full.value[:, :, start:], mask=mask, causal=False,
            first_key=0, first_query=None, key_at=positions[:, None],
        )
    ]  # fmt: skip
