"""A quantised cache whose sinks stay exact.

    cache = Quantize(KV ∖ S) ∪ KV_S        S the first tokens of each sequence

Sinks carry outlying keys and drained values: in one scale with them the rest rounds to nothing, and an error in them is
read by every query. Papers: IntactKV: Improving Large Language Model Quantization by Keeping Pivot Tokens Intact, arXiv
2403.01241 (which keeps the tokens of a prompt that the user chooses); the survey's rule is arXiv 2604.10098. Keys get a
step per channel and values one per token by default, as in KIVI (arXiv 2402.02750); absmax, symmetric.

A forward reads its own tokens as they are; they turn into codes after it. Decoded tokens wait, exact, until a group of
them is full. Reading turns a layer's codes back into numbers, one layer at a time: this saves memory, not time.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.card import Card
from headway.door.caches import PolicyCache, PolicyLayer, TokenStore, first_tokens
from headway.door.call import AttentionCall
from headway.door.policy_hosts import require_plain_decoder, require_plain_positions, text_config
from headway.door.stages import CachePolicy, Stage
from headway.errors import ArgumentError, HostError, unknown
from headway.methods.budget import check_share
from headway.methods.sinks.sink_survey.packed import BITS, PER, PackedTokens
from headway.methods.sinks.sink_survey.places import sink_free

log = logging.getLogger(__name__)

CARD = Card(
    slug="intactkv",
    title="IntactKV: Improving Large Language Model Quantization by Keeping Pivot Tokens Intact",
    year=2024,
    arxiv="2403.01241",
    family="sinks",
    stages=("CachePolicy",),
    knobs={
        "bits": "8 or 4, or None for a cache that stays exact",
        "sinks": "first tokens that stay exact",
        "key_per": "what shares a step among keys: tensor, channel or token; or exact",
        "value_per": "the same for values",
        "group": "tokens that are quantised together",
    },
    summary="Keeps keys and values as 8- or 4-bit integers, and the sinks exact.",
)

#: First tokens that stay exact.
SINKS = 4
GROUP = 64


@dataclass(frozen=True, kw_only=True, eq=False)
class IntactKV(CachePolicy):
    """A quantised cache with exact sinks: `headway.use(model, IntactKV(bits=4))`.

    bits: 8 or 4; None keeps everything exact. sinks: first real tokens of each sequence that stay exact; 0 quantises
    them with the rest. key_per, value_per: what shares a step, "tensor" (a group over all heads), "channel" or
    "token"; "exact" leaves them as they are.
    group: tokens that wait until they are quantised together; a prompt of at least as many is one group."""

    by_forward = "tokens of one forward are read before they become codes"
    bits: int | None = 4
    sinks: int = SINKS
    key_per: str = "channel"
    value_per: str = "token"
    group: int = GROUP

    def __post_init__(self) -> None:
        if self.bits is not None and self.bits not in BITS:
            raise ArgumentError(f"bits: got {self.bits}, expected 8, 4, or None for an exact cache.")
        if self.sinks < 0 or self.group < 1:
            raise ArgumentError(f"sinks, group: got {self.sinks}, {self.group}; expected sinks ≥ 0 and group ≥ 1.")
        for name in ("key_per", "value_per"):
            if getattr(self, name) not in PER:
                raise unknown(name, getattr(self, name), PER)

    def make_cache(self, model: nn.Module) -> IntactCache:
        return IntactCache(self, model)

    def enter(self, cache: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        mask = inputs.get("attention_mask")
        cache.padding = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        return inputs

    def read(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        if call.site.kind != "self" or not isinstance(call.forward.cache, IntactCache):
            return None
        require_plain_positions(call)
        cache = call.forward.cache
        layer = cache.layers[call.site.layer]
        if layer.exact.key.shape[3] != call.key.shape[3]:
            raise HostError(
                f"{call.site.name}: got keys of {call.key.shape[3]} dimensions, {layer.exact.key.shape[3]} in the "
                "cache; expected as many: multi-head latent attention stores its keys compressed."
            )
        instead = sink_free(call) if self.sinks and not cache.told else None
        if instead is not None:
            cache.told = True
            log.warning("IntactKV: the host has %s, so its first tokens need not be exact.", instead)
        return None if layer.seen == call.queries else [self._part(call, layer)]

    def settle(self, cache: Any) -> None:
        if self.bits is not None:
            with torch.no_grad():
                for layer in cache.layers:
                    layer.settle(cache.padding)

    def _part(self, call: AttentionCall, layer: IntactLayer) -> AttentionCall:
        """The call over sinks, codes turned back, and what waits."""
        key, value, places = layer.everything()
        rows = call.query_positions
        seen = (places >= 0)[:, None] & (places[:, None] <= rows[:, None])
        if call.site.window is not None:
            seen = seen & (places[:, None] > rows[:, None] - call.site.window)
        known = call.real_tokens(0, layer.seen)
        if known is not None:
            seen = seen & known.gather(1, places.clamp(min=0))[:, None]
        return call.replace(
            key=key, value=value, mask=seen[:, None], causal=False, key_at=places[:, None], first_key=0,
            first_query=None,
        )  # fmt: skip


class IntactLayer(PolicyLayer):
    """Columns of the sequence: codes first, then those that wait, exact; and the sinks of each sequence beside them.

    `group` (batch, columns) is the group of each column, −1 while it waits; `ready` the columns of each sequence that
    are in closed groups. Columns move into codes once they are ready in all sequences."""

    def __init__(self, policy: IntactKV) -> None:
        super().__init__()
        self.policy = policy
        self.exact, self.sinks = TokenStore(), TokenStore()
        bits = policy.bits or 8
        self.halves = PackedTokens(bits=bits, per=policy.key_per), PackedTokens(bits=bits, per=policy.value_per)
        self._forget()

    def _forget(self) -> None:
        self.group = self.ready = torch.empty(0, dtype=torch.long)
        self.groups = 0
        for half in self.halves:
            half.clear()

    @property
    def stores(self) -> tuple[TokenStore, ...]:
        return self.exact, self.sinks

    @property
    def stored(self) -> int:
        return self.halves[0].tokens + self.exact.length

    @property
    def bytes(self) -> int:
        """Bytes of everything: codes, steps, sinks and what waits."""
        return sum(half.bytes for half in self.halves) + sum(store.bytes for store in self.stores)

    def file(self, key: Tensor, value: Tensor, positions: Int[Tensor, " new"]) -> None:
        batch = key.shape[0]
        if not self.seen:
            self.group = torch.empty(batch, 0, dtype=torch.long, device=key.device)
            self.ready = torch.zeros(batch, dtype=torch.long, device=key.device)
        self.exact.append(key, value, positions)
        self.group = torch.nn.functional.pad(self.group, (0, key.shape[2]), value=-1)

    def settle(self, padding: Tensor | None) -> None:
        """Closes the group of each sequence that has enough waiting, and packs what is ready everywhere."""
        start = self.halves[0].tokens
        device = self.group.device
        columns = torch.arange(start, self.seen, device=device)
        real = _real_columns(padding, self.ready.shape[0], self.seen, device)
        first = first_tokens(real)
        self._take_sinks(first)
        counts = real[:, start:] & (columns - first[:, None] >= self.policy.sinks)
        waiting = counts & (columns >= self.ready[:, None])
        closing = waiting.sum(1) >= self.policy.group
        if bool(closing.any()):
            closes = closing[:, None] & (columns >= self.ready[:, None])
            key, value = (
                half.close(x, waiting & closes, closes)
                for half, x in zip(self.halves, (self.exact.key, self.exact.value), strict=True)
            )
            self.exact.key.copy_(key)
            self.exact.value.copy_(value)
            self.group[:, start:] = torch.where(closes, self.groups, self.group[:, start:])
            self.groups += 1
            self.ready = torch.where(closing, self.seen, self.ready)
        self._pack(start, int(self.ready.min()))

    def _pack(self, start: int, stop: int) -> None:
        if stop <= start:
            return
        for half, x in zip(self.halves, (self.exact.key, self.exact.value), strict=True):
            half.pack(x[:, :, : stop - start], self.group)
        batch = self.group.shape[0]
        left = torch.arange(stop - start, self.exact.length, device=self.group.device)
        self.exact.keep(left.expand(batch, -1))

    def _take_sinks(self, first: Int[Tensor, " batch"]) -> None:
        """Copies the first real tokens of each sequence while they are exact."""
        wanted = self.policy.sinks
        if not wanted:
            return
        key, value, start = self.exact.key, self.exact.value, self.halves[0].tokens
        if self.sinks.empty:
            batch, heads = key.shape[:2]
            blank_key, blank_value = (x.new_zeros(batch, heads, wanted, x.shape[3]) for x in (key, value))
            self.sinks.append(blank_key, blank_value, torch.full((batch, wanted), -1, device=key.device))
        places = first[:, None] + torch.arange(wanted, device=first.device)
        fresh = (self.sinks.positions < 0) & (places < self.seen) & (places >= start)
        if not bool(fresh.any()):
            return
        at = (places - start).clamp(0, self.exact.length - 1)[:, None, :, None]
        for store, x in ((self.sinks.key, key), (self.sinks.value, value)):
            found = x.gather(2, at.expand(-1, x.shape[1], -1, x.shape[3]))
            store.copy_(torch.where(fresh[:, None, :, None], found, store))
        self.sinks.positions.copy_(torch.where(fresh, places, self.sinks.positions))

    def everything(self) -> tuple[Tensor, Tensor, Int[Tensor, "batch slots"]]:
        """Keys, values and positions of sinks, codes and what waits; −1 where a sink is not there yet, and where a
        column holds a token that is among the sinks."""
        keys, values, batch = [self.exact.key], [self.exact.value], self.exact.key.shape[0]
        packed = self.halves[0].tokens
        if packed:
            group = self.group[:, :packed]
            keys.insert(0, self.halves[0].unpack(group, keys[-1].dtype))
            values.insert(0, self.halves[1].unpack(group, values[-1].dtype))
        places = torch.arange(self.seen, device=self.group.device).expand(batch, -1)
        if not self.sinks.empty:
            taken = (places[:, :, None] == self.sinks.positions[:, None]).any(-1)
            places = torch.cat([self.sinks.positions, places.masked_fill(taken, -1)], 1)
            keys.insert(0, self.sinks.key)
            values.insert(0, self.sinks.value)
        return torch.cat(keys, 2), torch.cat(values, 2), places

    def reset(self) -> None:
        super().reset()
        self._forget()

    def select(self, index: Int[Tensor, " rows"]) -> None:
        if self.exact.empty:
            return
        super().select(index)
        at = index.to(self.group.device, torch.long)
        self.group, self.ready = self.group[at], self.ready[at]
        for half in self.halves:
            half.select(at)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.exact.empty:
            self.select(torch.arange(self.group.shape[0]).repeat_interleave(repeats))


class IntactCache(PolicyCache):
    """The cache of one request. `padding` is the host's mask of the forward at hand."""

    layers: list[IntactLayer]  # type: ignore[assignment]

    def __init__(self, policy: IntactKV, model: nn.Module) -> None:
        require_plain_decoder(model)
        super().__init__(policy, [IntactLayer(policy) for _ in range(text_config(model).num_hidden_layers)])
        self.padding: Tensor | None = None
        self.told = False

    def stored_bytes(self) -> int:
        """Bytes of codes, steps, sinks and what waits."""
        return sum(layer.bytes for layer in self.layers)


def _real_columns(padding: Tensor | None, batch: int, columns: int, device: torch.device) -> Tensor:
    """Which columns so far hold tokens; those that the host said nothing of do."""
    if padding is None or padding.shape[0] != batch:
        return torch.ones(batch, columns, dtype=torch.bool, device=device)
    known = padding[:, :columns].to(device)
    return torch.nn.functional.pad(known, (0, columns - known.shape[1]), value=True)


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[Stage, ...]:
    """The most bits whose codes take about `share` of the host's own bytes or less, and no fewer than 4. At 1 the cache
    stays exact."""
    check_share(share, tokens)
    if share == 1:
        return (IntactKV(bits=None),)
    width = 8 * next(model.parameters()).element_size()
    return (IntactKV(bits=8 if 8 / width <= share else 4),)
