"""What passes the door: one attention operation of one host, in one normal form, whoever the host is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import NumericError
from headway.kernels.dense import attention_logits, dense_attention, grouped_values, normalise, visible_keys
from headway.kernels.weighing import Weighing


@dataclass(frozen=True)
class Site:
    """A place in a host where attention happens.

    `name` is the module path, `layer` the module's own layer index. Where it has none, `layer` is the order in which
    the host ran its sites, counted through all towers of a host, so that (layer, head) names one head; `name` then says
    the tower and the layer within it.
    `kind` self, cross or joint; `reach` full, sliding or chunked."""

    name: str
    layer: int
    kind: str = "self"
    reach: str = "full"
    heads: int = 0
    kv_heads: int = 0
    head_dim: int = 0
    window: int | None = None
    module_class: str = ""

    @property
    def groups(self) -> int:
        return self.heads // max(self.kv_heads, 1)


@dataclass
class Forward:
    """What one forward pass of the host shares between its sites. `scratch` lives for that forward only; `model` is
    the module whose forward it is."""

    step: int = 0
    phase: str = "prefill"
    positions: Int[Tensor, "#batch queries"] | None = None
    padding: Bool[Tensor, "batch keys"] | None = None
    cache: Any = None
    grid: tuple[int, ...] | None = None
    timestep: Tensor | None = None
    model: torch.nn.Module | None = None
    inputs: dict[str, Any] = field(default_factory=dict)
    scratch: dict[Any, Any] = field(default_factory=dict)
    thread: int = field(default_factory=threading.get_ident)


@dataclass(frozen=True)
class AttentionCall:
    """One attention operation. Query is (batch, heads, queries, dim), key and value (batch, kv_heads, keys, dim), after
    rotary embedding and after the cache update.

    `mask` is True where a key is visible; `bias` is added to the scaled, soft-capped logits; `causal` says that row i
    sees keys up to i + `offset` on top of the mask; `sinks` are learned sink logits, one per head. `hidden` is the
    input of the attention module where the host gives one. `first_key` and `first_query` are the positions in the
    sequence of key 0 and query row 0: a sliding cache has dropped earlier keys. Slots that a static cache holds for
    later ones are left out.

    A cache policy may put calls over part of a site in place of the host's: `of_heads` then tells which of the site's
    query heads the rows of `query` are, `of_rows` which of its query rows (first, and behind the last; all for None),
    and `key_at` the position in the sequence of each key where they are not consecutive. Such a call is not `causal`;
    its mask says everything.

    `front` keys come before those of the text: learned tokens, or what a memory said, which have no place in it.
    `piece` is there where a module reads a text in several calls, each with its own keys behind the front: the first
    row of this one, and the rows of the whole text (0 where the module cannot tell). `door.text` joins them.

    `weighing` says how logits become weights where that is not the softmax (Headway's own modules). `tell` is a cache
    policy's listener: it is given the call's logits and their log-sum-exp, of which the output is then made."""

    site: Site
    query: Float[Tensor, "batch heads queries dim"]
    key: Float[Tensor, "batch kv_heads keys dim"]
    value: Float[Tensor, "batch kv_heads keys value_dim"]
    scale: float
    causal: bool = False
    mask: Bool[Tensor, "#batch #heads queries keys"] | None = None
    bias: Float[Tensor, "#batch #heads #queries keys"] | None = None
    softcap: float | None = None
    sinks: Float[Tensor, " heads"] | None = None
    dropout: float = 0.0
    hidden: Float[Tensor, "batch queries width"] | None = None
    module: torch.nn.Module | None = None
    first_key: int = 0
    first_query: int | None = None
    of_heads: Int[Tensor, " heads"] | None = None
    of_rows: tuple[int, int] | None = None
    key_at: Int[Tensor, "#batch #kv_heads keys"] | None = None
    front: int = 0
    piece: tuple[int, int] | None = None
    weighing: Weighing | None = None
    tell: Callable[[Tensor, Tensor], None] | None = None
    forward: Forward = field(default_factory=Forward)

    @property
    def queries(self) -> int:
        return self.query.shape[2]

    @property
    def keys(self) -> int:
        return self.key.shape[2]

    @property
    def heads(self) -> int:
        return self.query.shape[1]

    @property
    def groups(self) -> int:
        return self.heads // self.key.shape[1]

    @property
    def offset(self) -> int:
        """Key index of query row 0; queries are the last of the keys unless the host says otherwise."""
        return self.keys - self.queries if self.first_query is None else self.first_query - self.first_key

    @property
    def query_positions(self) -> Int[Tensor, " queries"]:
        """Positions of the query rows in the sequence."""
        return torch.arange(self.queries, device=self.query.device) + self.offset + self.first_key

    @property
    def key_positions(self) -> Int[Tensor, "... keys"]:
        """Positions of the keys in the sequence: (keys), or (batch, kv_heads, keys) of a policy's call."""
        if self.key_at is not None:
            return self.key_at
        return torch.arange(self.keys, device=self.query.device) + self.first_key

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments that kernels take beside query, key and value; `weighing` only where there is one,
        which the kernels of the softmax refuse."""
        arguments = {
            "scale": self.scale,
            "causal": self.causal,
            "offset": self.offset,
            "mask": self.mask,
            "bias": self.bias,
            "softcap": self.softcap,
        }
        return arguments if self.weighing is None else {**arguments, "weighing": self.weighing}

    def visible(self, rows: Int[Tensor, " rows"] | None = None) -> Bool[Tensor, "#batch #heads rows keys"]:
        """Which keys each query row may read, as a full boolean tensor for the given rows."""
        rows = torch.arange(self.queries, device=self.query.device) if rows is None else rows
        seen = visible_keys(rows, self.keys, causal=self.causal, offset=self.offset, mask=self.mask)
        if seen is None:
            seen = torch.ones(1, 1, rows.numel(), self.keys, dtype=torch.bool, device=self.query.device)
        if self.bias is not None:
            bias = self.bias[:, :, rows] if self.bias.shape[2] > 1 else self.bias
            seen = seen & (bias > -torch.inf)
        return seen

    def logits(self, rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "batch heads rows keys"]:
        """Scaled logits in float32 (float64 of a float64 host), -inf where not visible."""
        arguments = self.arguments()
        arguments.pop("weighing", None)
        return attention_logits(self.query, self.key, rows, **arguments)

    def weights(self, rows: Int[Tensor, " rows"] | None = None) -> Float[Tensor, "batch heads rows keys"]:
        """Attention weights in the dtype of the logits. Rows sum to one, or to less where the head has a learned sink;
        with a `weighing` to whatever it says."""
        if self.weighing is None:
            return normalise(self.logits(rows), self.sinks)[0]
        rows = torch.arange(self.queries, device=self.query.device) if rows is None else rows
        return self.weighing(
            self.logits(rows),
            self.visible(rows),
            positions=rows + self.offset,
            query=self.query[:, :, rows],
            key=self.key,
        )

    def attend(self, **options: Any) -> tuple[Tensor, Tensor]:
        """Dense output (batch, heads, queries, value_dim) and log-sum-exp by the door's own kernel. Of weights that are
        no softmax the second is ln Σ|w|; they take no options."""
        if self.weighing is not None:
            weights = self.weights()
            output = grouped_values(weights.to(self.value.dtype), self.value)
            seen = self.visible().any(-1).expand(weights.shape[:3])
            return output, weights.abs().sum(-1).clamp(min=1e-30).log().masked_fill(~seen, -torch.inf)
        return dense_attention(self.query, self.key, self.value, sinks=self.sinks, **self.arguments(), **options)

    def real_tokens(self, start: int, stop: int) -> Bool[Tensor, "batch tokens"] | None:
        """Which positions of the sequence from `start` up to `stop` hold tokens and no padding, where the host told;
        None when it did not. Positions that it did not speak of hold tokens."""
        padding = self.forward.padding
        if padding is None or padding.shape[0] != self.query.shape[0]:
            return None
        known = padding[:, start:stop].to(self.query.device).bool()
        return torch.nn.functional.pad(known, (0, stop - start - known.shape[1]), value=True)

    def padded_rows(self) -> Bool[Tensor, "batch queries"] | None:
        """Query rows that are padding, where the host told (batch, queries); None when it did not."""
        padding = self.forward.padding
        start = self.offset + self.first_key
        if padding is None or self.site.kind != "self":
            return None
        if padding.shape[0] != self.query.shape[0] or padding.shape[1] < start + self.queries:
            return None
        return ~padding[:, start : start + self.queries]

    def check_finite(self) -> None:
        """Raises NumericError naming the site when query, key or value is not finite."""
        for name in ("query", "key", "value"):
            tensor = getattr(self, name)
            if not bool(torch.isfinite(tensor).all()):
                raise NumericError(
                    f"{name} at {self.site.name}: got NaN or infinity, expected finite numbers. Check the weights of "
                    "the model, or load it in float32."
                )

    def replace(self, **changes: Any) -> AttentionCall:
        return replace(self, **changes)

    @classmethod
    def from_tensors(cls, query: Tensor, key: Tensor, value: Tensor, *, layer: int = 0, **fields: Any) -> AttentionCall:
        """A call without a host, for kernels, tests and recorded tensors. `scale` defaults to dim ** -0.5."""
        site = Site(
            name=fields.pop("name", f"layers.{layer}"),
            layer=layer,
            heads=query.shape[1],
            kv_heads=key.shape[1],
            head_dim=query.shape[3],
        )
        fields.setdefault("scale", query.shape[3] ** -0.5)
        return cls(site=site, query=query, key=key, value=value, **fields)
