"""The cache policy: sinks and a window of the last tokens, at positions in the cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door.caches import PolicyCache, first_tokens
from headway.door.call import AttentionCall
from headway.door.policy_hosts import require_plain_decoder, require_plain_positions, text_config
from headway.door.rotary import changing_frequencies, host_frequencies
from headway.door.stages import CachePolicy
from headway.errors import ArgumentError, HostError, check_whole, unknown
from headway.kernels.rope import Layout, rotate
from headway.methods.sinks.streaming_llm.store import StreamingLayer

log = logging.getLogger(__name__)

#: Query rows of a long forward that meet the window together; no fewer than the window is long.
ROW_BLOCK = 256
#: Positions up to which angles in float32 are exact to about 0.002 radians; stored keys are turned back before.
REBASE_AT = 32_768


@dataclass(frozen=True, kw_only=True, eq=False)
class StreamingLLM(CachePolicy):
    """Attention sinks and a window: `headway.use(model, StreamingLLM(sinks=4, window=1020))`.

    sinks: first tokens that stay (S). window: last tokens that stay (W). positions: "cache" is the paper's rule, "text"
    leaves the sinks at their true distances. evict: "after" lets a step see its own token beside S + W stored ones, as
    the released code does; "before" holds it to S + W in all. rebase_at: host positions never grow beyond about this;
    None takes the host's own number of positions, at most 32,768.

    Raises ArgumentError for numbers that cannot be, and at the first forward for sinks + window beyond the positions of
    the host; HostError there for hosts without rotary positions or with frequencies that change with the length."""

    sinks: int = 4
    window: int = 1020
    positions: str = "cache"
    evict: str = "after"
    rebase_at: int | None = None

    def __post_init__(self) -> None:
        check_whole("sinks", self.sinks, 0)
        check_whole("window", self.window, 1)
        check_whole("rebase_at", self.rebase_at, 2 * self.capacity, optional=True)
        if self.positions not in ("cache", "text"):
            raise unknown("positions", self.positions, ("cache", "text"))
        if self.evict not in ("after", "before"):
            raise unknown("evict", self.evict, ("after", "before"))

    @property
    def capacity(self) -> int:
        """C = S + W."""
        return self.sinks + self.window

    @property
    def reach(self) -> int:
        """Largest distance of a window key."""
        return self.window if self.evict == "after" else self.window - 1

    def reach_at(self, call: AttentionCall) -> int:
        """The same at a layer of the host, which may have a shorter window of its own."""
        return self.reach if call.site.window is None else min(self.reach, call.site.window - 1)

    @property
    def moves_keys(self) -> bool:
        return self.positions == "cache"

    def make_cache(self, model: nn.Module) -> StreamingCache:
        return StreamingCache(self, model)

    def enter(self, cache: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """Host positions are those of the text without padding, less what was turned back."""
        given = inputs.get("input_ids", inputs.get("inputs_embeds"))
        if not isinstance(given, Tensor):
            return inputs
        mask = inputs.get("attention_mask")
        cache.learn_padding(mask, given.shape[0])
        start = cache.get_seq_length()
        places = torch.arange(start, start + given.shape[1], device=given.device)[None]
        places = places - cache.first.to(given.device)[:, None]
        return inputs | {"position_ids": (places - cache.turned_back).clamp(min=0)}

    def read(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        if call.site.kind != "self":
            return None
        require_plain_positions(call)
        cache = call.forward.cache
        if not isinstance(cache, StreamingCache):
            return self._read_whole(call)
        layer = cache.layers[call.site.layer]
        layer.reach = self.reach_at(call)
        if call.queries == 1 and layer.contiguous:
            return [self._read_step(call, layer, cache)]
        own = call.query_positions[None] - cache.first.to(call.query.device)[:, None]
        return self._two_parts(call, layer.sink_keys(), layer.window_keys(), own, cache.turned_back, layer.frequencies,
                               layer.layout)  # fmt: skip

    def settle(self, cache: Any) -> None:
        cache.settle()

    def _read_step(self, call: AttentionCall, layer: StreamingLayer, cache: StreamingCache) -> AttentionCall:
        """One query row: the sinks, placed anew, stand in front of the window in one buffer."""
        own = call.first_key + call.offset - cache.first
        oldest = layer.oldest - cache.first
        shift = self._shift(own, oldest, layer.reach) if self.positions == "cache" else torch.zeros_like(own)
        key, value = layer.with_sinks(shift - cache.turned_back)
        return call.replace(key=key, value=value, mask=None, causal=False, first_key=0, first_query=None)

    def _shift(self, own: Tensor, oldest: Tensor, reach: int) -> Tensor:
        """By how much a query stands further in the text than in the cache, where the window's oldest token has slot S
        and a query of a full cache S + reach: own − min(own, C) while the window fills by itself, less room after
        `evict_for_space`."""
        return torch.maximum(own - (self.sinks + reach), oldest - self.sinks).clamp(min=0)

    def _read_whole(self, call: AttentionCall) -> Sequence[AttentionCall]:
        """A forward without a cache: the same mathematics over its own tokens."""
        padding = call.forward.padding
        batch = call.query.shape[0]
        first = torch.zeros(batch, dtype=torch.long) if padding is None else first_tokens(padding).cpu()
        places = torch.arange(call.keys)[None] - first[:, None]
        order = (first[:, None] + torch.arange(self.sinks)).clamp(max=call.keys - 1)
        index = order.to(call.key.device)[:, None, :, None]
        sink_places = places.gather(1, order)
        sink = (
            call.key.gather(2, index.expand(-1, call.key.shape[1], -1, call.key.shape[3])),
            call.value.gather(2, index.expand(-1, call.key.shape[1], -1, call.value.shape[3])),
            torch.where(sink_places == torch.arange(self.sinks), sink_places, -1),
        )
        frequencies, layout = self._rotary(call)
        own = call.query_positions[None] - first.to(call.query.device)[:, None]
        return self._two_parts(call, sink, (call.key, call.value, places), own, 0, frequencies, layout)

    def _rotary(self, call: AttentionCall) -> tuple[Tensor | None, Layout]:
        """The host's frequencies at the layer of a call; worked out, with what a host must be, once per forward."""
        model, scratch = call.forward.model, call.forward.scratch
        if model is None:
            raise HostError(
                f"{call.site.name}: got an attention outside a forward of the model, expected one inside. Run the "
                "whole model."
            )
        if self not in scratch:
            scratch[self] = _rotary_layers(self, model)
        return scratch[self][call.site.layer]

    def _two_parts(
        self,
        call: AttentionCall,
        sink: tuple[Tensor, Tensor, Tensor],
        window: tuple[Tensor, Tensor, Tensor],
        own: Int[Tensor, "batch queries"],
        turned_back: int,
        frequencies: Tensor | None,
        layout: Layout,
    ) -> list[AttentionCall]:
        """Sinks for queries that are turned to their cache positions, and the window as it stands: the rows of a long
        forward in blocks, each with the keys within its reach, so that work and masks grow with the rows alone. Places
        are those in the text without padding; negative ones are no tokens."""
        common: dict[str, Any] = {"causal": False, "first_key": 0, "first_query": None}
        key, value, places = window
        sink_key, sink_value, sink_places = sink
        places, sink_places = places.to(own.device), sink_places.to(own.device)
        reach = self.reach_at(call)
        turned = call.query
        if self.sinks:
            turned = self._turned(call.query, own, places[:, :1], reach, turned_back, frequencies, layout)
        block = max(ROW_BLOCK, reach)
        parts = []
        for start in range(0, call.queries, block):
            stop = min(start + block, call.queries)
            rows = own[:, start:stop]
            common["of_rows"] = None if stop - start == call.queries else (start, stop)
            if self.sinks:
                seen = (sink_places >= 0)[:, None] & (sink_places[:, None] <= rows[:, :, None])
                parts.append(
                    call.replace(
                        query=turned[:, :, start:stop], key=sink_key, value=sink_value, mask=seen[:, None], sinks=None,
                        key_at=sink_places[:, None], **common,
                    )
                )  # fmt: skip
            # Columns count alike in every sequence: distances within one do not depend on its padding.
            column = int(rows[0, 0] - places[0, 0])
            near = slice(max(column - reach, 0), column + stop - start)
            distance = rows[:, :, None] - places[:, None, near]
            seen = (distance >= 0) & (distance <= reach) & (places[:, None, near] >= self.sinks)
            parts.append(
                call.replace(
                    query=call.query[:, :, start:stop], key=key[:, :, near], value=value[:, :, near],
                    mask=seen[:, None], key_at=places[:, None, near], **common,
                )
            )  # fmt: skip
        return parts

    def _turned(
        self,
        query: Tensor,
        own: Tensor,
        oldest: Tensor,
        reach: int,
        turned_back: int,
        frequencies: Tensor | None,
        layout: Layout,
    ) -> Float[Tensor, "batch heads queries dim"]:
        """The queries as they meet the sinks. They stand at own − turned_back; the sinks stand where they were first
        rotated."""
        if frequencies is None:
            return query
        if self.positions == "cache":
            return rotate(query, turned_back - self._shift(own, oldest, reach), frequencies, layout)
        return rotate(query, torch.full_like(own, turned_back), frequencies, layout) if turned_back else query


class StreamingCache(PolicyCache):
    """The cache of one stream. `first` is the column of the first real token of each row."""

    layers: list[StreamingLayer]  # type: ignore[assignment]

    def __init__(self, policy: StreamingLLM, model: nn.Module) -> None:
        layers = [StreamingLayer(policy.sinks, policy.reach, *rotary) for rotary in _rotary_layers(policy, model)]
        config = text_config(model)
        positions = getattr(config, "max_position_embeddings", None)
        limit = policy.rebase_at or max(min(positions or REBASE_AT, REBASE_AT), 2 * policy.capacity)
        windows = getattr(config, "sliding_window", None)
        if isinstance(windows, int) and windows < policy.reach and getattr(config, "use_sliding_window", True):
            log.warning(
                "StreamingLLM: layers with a window of %d tokens keep to it; %d was asked.", windows, policy.window
            )
        super().__init__(policy, list(layers))
        self.limit = limit
        self.turned_back = 0
        self.first = torch.zeros(1, dtype=torch.long)

    def learn_padding(self, mask: Any, batch: int) -> None:
        """Takes the left padding of each row from the host's mask: at the request's first forward, and for rows that
        were nothing but padding so far at the next ones."""
        seen = self.get_seq_length()
        if not seen:
            self.turned_back = 0
            self.first = torch.zeros(batch, dtype=torch.long)
        if isinstance(mask, Tensor) and mask.ndim == 2 and bool((self.first >= seen).any()):
            self.first = torch.where(self.first >= seen, first_tokens(mask).cpu(), self.first)
        for layer in self.layers:
            layer.first = self.first

    def settle(self) -> None:
        """Evicts, and turns the stored keys back when positions have grown far."""
        for layer in self.layers:
            layer.evict()
        ahead = self.get_seq_length() - int(self.first.max()) - self.turned_back
        if ahead > self.limit:
            back = ahead - self.policy.capacity
            for layer in self.layers:
                layer.turn_back(back)
            self.turned_back += back

    def contains(self, position: int) -> bool:
        """Whether the token at a position of the text (padding not counted) is still held in every row, by the layers
        that see farthest: those with a shorter window of the host's own drop it before."""
        check_whole("position", position, 0)
        filed = (layer for layer in self.layers if layer.seen)
        return any(bool((layer.held() == position).any(1).all()) for layer in filed)

    def evict_for_space(self, tokens: int) -> None:
        """Makes room for a turn of so many tokens before it comes: the window shrinks by as much."""
        check_whole("tokens", tokens, 0)
        left = self.policy.reach - tokens
        if left <= 0:
            log.warning(
                "StreamingLLM: a turn of %d tokens leaves nothing of a window of %d; only the sinks stay.",
                tokens, self.policy.window,
            )  # fmt: skip
        for layer in self.layers:
            layer.evict(min(max(left, 0), layer.reach))

    def move_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        self.first = move(self.first)
        for layer in self.layers:
            layer.first = self.first

    def reset(self) -> None:
        super().reset()
        self.turned_back = 0

    def stored_bytes(self) -> int:
        """Bytes of the keys and values that are held."""
        return sum(layer.sink_store.bytes + layer.window_bytes for layer in self.layers)


def _rotary_layers(policy: StreamingLLM, model: nn.Module) -> list[tuple[Tensor | None, Layout]]:
    """The rotary frequencies of every layer. Raises HostError for a host that cannot stream, ArgumentError for a cache
    beyond its positions."""
    require_plain_decoder(model)
    config = text_config(model)
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and policy.capacity > positions:
        raise ArgumentError(
            f"sinks, window: got {policy.sinks} + {policy.window} = {policy.capacity}, expected no more than the "
            f"{positions} positions of {type(model).__name__}. Use a smaller window."
        )
    found = [host_frequencies(model, index) for index in range(config.num_hidden_layers)]
    if all(frequencies is None for frequencies, _ in found):
        raise HostError(
            f"{type(model).__name__}: got a host without rotary positions, expected RoPE. Learned positions are part "
            "of every stored key, and a bias by distance (ALiBi) is made by the host for the text, not for the cache."
        )
    changing = changing_frequencies(model)
    if changing:
        raise HostError(
            f"{type(model).__name__}: got rotary frequencies that change with the length ({changing}), expected fixed "
            "ones: keys that were turned by others cannot be placed anew. Load it with fixed rope_parameters."
        )
    return found
