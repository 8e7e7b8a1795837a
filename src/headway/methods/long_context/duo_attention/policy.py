"""The cache policy: retrieval heads read everything, streaming heads read sinks and recent tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import pad

from headway.door.caches import PolicyCache, first_tokens
from headway.door.call import AttentionCall
from headway.door.policy_hosts import require_plain_positions
from headway.door.stages import PHASES, CachePolicy
from headway.errors import ArgumentError, check_whole, unknown
from headway.methods.long_context.duo_attention.gates import Gates, check_shape, kv_geometry, select_heads
from headway.methods.long_context.duo_attention.reading import (
    chunk,
    everything,
    first_parts,
    step,
)
from headway.methods.long_context.duo_attention.store import DuoLayer

PREFILL = ("streaming", "dense")


@dataclass(frozen=True, kw_only=True, eq=False)
class DuoAttention(CachePolicy):
    """Two caches in one: `headway.use(model, DuoAttention(gates=Gates.load("gates.json"), sparsity=0.5))`.

    gates: `Gates` (learned, or from `score_heads`), whose fingerprint must be the model's, or a bare matrix (layers,
    KV heads). sparsity: share of streaming heads, 0 (dense) to 1; or threshold: heads with a gate of at least this keep
    everything. sinks, recent: what a streaming head keeps beside the token itself (S and R; the paper serves with 64
    and 256). prefill: "streaming" reads every prompt row as a decoding step would, so that any split into chunks gives
    the same; "dense" leaves the first forward to the host (or to a selector of prefill) and prunes behind it, later
    chunks then read what is kept and themselves, which is the released code. reserve: tokens for which retrieval heads
    make room at once.

    Raises ArgumentError for numbers that cannot be; at the first forward ArgumentError for gates of another shape and
    HostError for gates of another model, position biases, and hosts without a cache of keys per head."""

    gates: Gates | Float[Tensor, "layers kv_heads"]
    sparsity: float | None = None
    threshold: float | None = None
    sinks: int = 64
    recent: int = 256
    prefill: str = "streaming"
    reserve: int = 0

    def __post_init__(self) -> None:
        check_whole("sinks", self.sinks, 0)
        check_whole("recent", self.recent, 1)
        check_whole("reserve", self.reserve, 0)
        if self.prefill not in PREFILL:
            raise unknown("prefill", self.prefill, PREFILL)
        self.retrieval()

    @property
    def narrows(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"decode"}) if self.prefill == "dense" else PHASES

    def retrieval(self) -> Bool[Tensor, "layers kv_heads"]:
        """Which KV heads are retrieval heads."""
        return select_heads(self.gates, sparsity=self.sparsity, threshold=self.threshold)

    def make_cache(self, model: nn.Module) -> DuoCache:
        if isinstance(self.gates, Gates):
            self.gates.check(model)
        else:
            check_shape(torch.as_tensor(self.gates), kv_geometry(model))
        return DuoCache(self, self.retrieval())

    def enter(self, cache: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        cache.learn_padding(inputs.get("attention_mask"))
        return inputs

    def settle(self, cache: Any) -> None:
        for layer in cache.layers:
            layer.fold()

    def read(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        if call.site.kind != "self":
            return None
        require_plain_positions(call)
        cache = call.forward.cache
        if not isinstance(cache, DuoCache):
            return self._read_whole(call)
        layer = cache.layers[call.site.layer]
        layer.learn_window(call.site.window)
        past = layer.seen - call.queries
        if past == 0:
            if self.prefill == "dense":
                return None
            return first_parts(call, layer.groups, layer.kv_heads, cache.first)
        parts: list[AttentionCall] = []
        for group in layer.groups:
            if group.recent is None:
                parts += everything(call, group, layer.kv_heads, cache)
            elif call.queries == 1:
                parts.append(step(call, group, layer.kv_heads, cache))
            else:
                parts += chunk(call, group, layer, cache, past, same_chunk=self.prefill == "dense")
        return parts

    def _read_whole(self, call: AttentionCall) -> Sequence[AttentionCall] | None:
        """A forward without a cache: the same mathematics over its own tokens."""
        if self.prefill == "dense":
            return None
        retrieval = self.retrieval()
        index, kv_heads = call.site.layer, retrieval.shape[1]
        if call.forward.model is not None and isinstance(self.gates, Gates) and self not in call.forward.scratch:
            self.gates.check(call.forward.model)
            call.forward.scratch[self] = True
        if index >= retrieval.shape[0] or call.key.shape[1] % kv_heads:
            raise ArgumentError(
                f"gates: got shape {tuple(retrieval.shape)}, expected a row for layer {index} and {call.key.shape[1]} "
                f"KV heads ({call.site.name}). Use gates that were made for this model."
            )
        layer = DuoLayer(retrieval[index].tolist(), self.sinks, self.recent, 0)
        layer.learn_window(call.site.window)
        padding = call.forward.padding
        first = None if padding is None else first_tokens(padding)
        return first_parts(call, layer.groups, kv_heads, first)


class DuoCache(PolicyCache):
    """The cache of one request. `first` is the position of each sequence's first token, `real` tells tokens from
    padding where there is any."""

    layers: list[DuoLayer]  # type: ignore[assignment]

    def __init__(self, policy: DuoAttention, retrieval: Bool[Tensor, "layers kv_heads"]) -> None:
        layers = [DuoLayer(row, policy.sinks, policy.recent, policy.reserve) for row in retrieval.tolist()]
        super().__init__(policy, list(layers))
        self.first = torch.zeros(1, dtype=torch.long)
        self.begun = False
        self.real: Bool[Tensor, "batch tokens"] | None = None

    def learn_padding(self, mask: Any) -> None:
        """Takes padding from the mask of a forward; the first one of a request says where its sequences begin."""
        real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if real is not None:
            self.real = None if bool(real.all()) else real
        if not self.get_seq_length():
            self.begun = False
            if real is None:
                self.real = None
        if not self.begun:
            self._find_first()

    def _find_first(self) -> None:
        """Where sequences begin; behind what came so far for one that is all padding yet."""
        if self.real is None:
            self.begun = True
            self._learn_first(torch.zeros(1, dtype=torch.long))
            return
        self.begun = bool(self.real.any(1).all())
        self._learn_first(first_tokens(self.real))

    def hides(self, columns: Int[Tensor, "#batch keys"]) -> Bool[Tensor, "batch 1 1 keys"] | None:
        """True where a key at a position is a token; None where all are."""
        if self.real is None:
            return None
        need = int(columns.max()) + 1
        real = pad(self.real, (0, max(need - self.real.shape[1], 0)), value=True).to(columns.device)
        return real.gather(1, columns.clamp(min=0).expand(real.shape[0], -1))[:, None, None]

    def _learn_first(self, first: Int[Tensor, " batch"]) -> None:
        self.first = first.cpu()
        for layer in self.layers:
            layer.learn_first(self.first)

    def move_rows(self, move: Callable[[Tensor], Tensor]) -> None:
        if self.real is not None:
            self.real = move(self.real)
            self._learn_first(move(self.first))

    def reset(self) -> None:
        super().reset()
        self.real = None
        self._learn_first(torch.zeros(1, dtype=torch.long))
