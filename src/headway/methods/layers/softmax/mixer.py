"""Softmax attention as a mixer, the baseline of every other one; its normaliser, gates and positions are options.

    q, k, v = x W_q, x W_k, x W_v          heads of q share the heads of k and v in groups (arXiv 2305.13245)
    y = ( Σ_{j visible} w(s_ij) v_j ) W_o ,   s_ij = q_i·k_j / √d  (+ bias of the distance)

`normalizer` says what w is (`headway.kernels.normalizers`), `gate` what is multiplied beside it, `position` how places
are told: rope, none, alibi, relative (T5), learned or sinusoidal (added to what queries and keys are made of).
`window` shows each token itself and the tokens before it up to that many in all, and the state keeps no more than that.
`prefix` lets the first tokens of a document see each other whichever comes first. `qk_norm` brings every query and key
to one length (arXiv 2010.04245, by a root-mean-square norm with a weight per channel).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door.key_value_state import append, crop_keys, empty_keys
from headway.door.mixer import Mixer, State, check_inputs, document_positions, register_mixer, steps
from headway.door.normalised import normalised_attention
from headway.door.own import Attend
from headway.errors import ArgumentError, unknown
from headway.kernels.normalizers import Operation, make_gate, make_normalizer, options_by_gate
from headway.kernels.norms import RMSNorm
from headway.kernels.position_bias import BUCKETS, alibi_bias, relative_buckets, sinusoids
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.layers.softmax.columns import both_ways, orders, running_mean, trimmed, with_prefix

log = logging.getLogger(__name__)

#: Variance of fresh projections times their inputs: the "small" start of the models of arXiv 2410.10781.
INIT = 2 / 5
#: Standard deviation of fresh tables of positions or distances.
TABLE_STD = 0.02
POSITIONS = ("rope", "none", "alibi", "relative", "learned", "sinusoidal")


@register_mixer
class SoftmaxAttention(Mixer):
    """Multi-head attention with stored keys and values.

    kv_heads: heads of keys and values (default: as many as of queries). head_dim: width / heads by default. bias: of
    the four projections. max_positions: size of the table of `position="learned"`. Options of the normaliser and of a
    gate go into dictionaries; with several gates `gate_options` maps each name to its own."""

    slug: ClassVar[str] = "softmax"
    constant_state: ClassVar[bool] = False

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        causal: bool = True,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        scale: float | None = None,
        position: str = "rope",
        rope_base: float = 10_000.0,
        max_positions: int = 2048,
        window: int | None = None,
        prefix: int = 0,
        normalizer: str | Sequence[str] = "softmax",
        normalizer_options: Mapping[str, Any] | None = None,
        gate: str | Sequence[str] | None = None,
        gate_options: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers, causal=causal)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ArgumentError(f"kv_heads: got {kv_heads}, expected a number that divides the {heads} heads.")
        self.head_dim = width // heads if head_dim is None else head_dim
        if position not in POSITIONS:
            raise unknown("position", position, POSITIONS)
        if window is not None and window < 1:
            raise ArgumentError(f"window: got {window}, expected at least 1: the token itself. None is no window.")
        if prefix < 0 or (prefix and not causal):
            raise ArgumentError(f"prefix: got {prefix} with causal={causal}, expected 0 or more, and causal=True.")
        self.position, self.rope_base, self.window, self.prefix = position, rope_base, window, prefix
        self.can_crop = causal and window is None  # type: ignore[misc]
        self.scale = self.head_dim**-0.5 if scale is None else scale
        shape = {"width": width, "heads": heads, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        self.query = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.key = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(heads * self.head_dim, width, bias=bias)
        self.query_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.key_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.normalizer = make_normalizer(normalizer, scale=self.scale, **shape, **(normalizer_options or {}))
        self.gates = nn.ModuleDict(
            {name: make_gate(name, **shape, **given) for name, given in options_by_gate(gate, gate_options).items()}
        )
        self.attend = Attend(layer=layer, scale=self.scale, causal=causal)
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.normal_(linear.weight, std=(INIT / linear.in_features) ** 0.5)
            if linear.bias is not None:
                nn.init.zeros_(linear.bias)
        if position == "learned":
            self.table = nn.Embedding(max_positions, width)
        if position == "relative":
            self.table = nn.Embedding(BUCKETS, heads)
        if position in ("learned", "relative"):
            nn.init.normal_(self.table.weight, std=TABLE_STD)
        if position == "rope":
            rope_frequencies(self.head_dim, rope_base)
        if position in ("alibi", "relative") and not self.normalizer.reads_logits:
            raise ArgumentError(
                f"position: got {position!r} with the normaliser {self.normalizer.name!r}, which has no logits to add "
                "a bias to. Use 'rope', 'none', 'learned' or 'sinusoidal'."
            )

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        if not self.causal:
            raise ArgumentError("state: got a request with causal=False, expected a causal layer: it reads both ways.")
        dtype = self.query.weight.dtype if dtype is None else dtype
        sizes = {"key_heads": self.kv_heads, "key_dim": self.head_dim}
        sizes |= {"value_heads": self.kv_heads, "value_dim": self.head_dim}
        state = empty_keys(batch, device=device, dtype=dtype, **sizes)
        if not self._keeps_sum:
            return state
        work = torch.promote_types(dtype, torch.float32)
        return state.replace(value_sum=torch.zeros(batch, self.kv_heads, self.head_dim, device=device, dtype=work))

    def forward(
        self,
        x: Float[Tensor, "batch tokens width"],
        *,
        mask: Bool[Tensor, "batch tokens"] | None = None,
        resets: Bool[Tensor, "batch tokens"] | None = None,
        state: State | None = None,
        mode: str = "block",
        grid: tuple[int, int] | None = None,
    ) -> tuple[Float[Tensor, "batch tokens width"], State | None]:
        x = check_inputs(self, x, mask, resets, state, mode)
        if x.shape[1] == 0:
            return x, state
        if mode == "step":
            return self._steps(x, mask, resets, state)
        positions, _ = document_positions(x, mask, resets, None if state is None else state.seen)
        query, key, value = self._project(x, positions)
        call, after = self._operation(query, key, value, positions, mask, resets, state)
        whole = mask is None and resets is None and state is None
        output = normalised_attention(
            self.attend, self.normalizer, call, x, mask, whole=whole, by_rows=mode == "reference"
        )
        output = self._gated("output", x, output)
        y = self.output(output.transpose(1, 2).flatten(2))
        return y if mask is None else torch.where(mask[..., None], y, 0.0), after if state is not None else None

    def crop(self, state: State, tokens: int) -> State:
        if not self.can_crop:
            return super().crop(state, tokens)
        sums = state.tensors.get("value_sum")
        if sums is None:
            return crop_keys(state, tokens)
        rest = State({name: t for name, t in state.tensors.items() if name != "value_sum"}, state.seen)
        kept = rest.tensors["value"].shape[2] - tokens
        gone = rest.tensors["value"][:, :, kept:].to(sums.dtype)
        if "real" in rest.tensors:
            gone = torch.where(rest.tensors["real"][:, None, kept:, None], gone, 0.0)
        return crop_keys(rest, tokens).replace(value_sum=sums - gone.sum(2))

    def load_softmax(self, weights: Mapping[str, Tensor], *, start: str = "softmax") -> None:
        """Takes the projections of a softmax layer (names as here: query.weight, …) into this one.

        `start="softmax"` also sets normaliser and gates so that the layer gives what the softmax layer gave, and
        raises ArgumentError for a normaliser that cannot; "fresh" leaves them as they start. Both warn, for the layer
        has to be trained to be more than softmax, or anything at all."""
        if start not in ("softmax", "fresh"):
            raise unknown("start", start, ("softmax", "fresh"))
        own = ("normalizer.", "gates.")
        wanted = {name for name in self.state_dict() if not name.startswith(own)}
        if set(weights) != wanted:
            differing = sorted(wanted ^ set(weights))
            raise ArgumentError(
                f"weights: got other names than expected: {', '.join(differing[:6])}. Pass the state_dict of a "
                "'softmax' layer with the same options and the normaliser 'softmax'."
            )
        if start == "softmax":
            self.normalizer.start_at_softmax()
            for gate in self.gates.values():
                gate.open()  # type: ignore[operator]
        changed = [self.normalizer.name] * (self.normalizer.name != "softmax") + list(self.gates)
        if changed:
            log.warning(
                "Softmax weights in a layer with %s: it %s. Train it before you judge it.",
                " and ".join(changed),
                "starts as softmax" if start == "softmax" else "was never trained like that and gives nothing useful",
            )
        self.load_state_dict({**{n: t for n, t in self.state_dict().items() if n.startswith(own)}, **weights})

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        return cls(**{"width": 16, "heads": 4, "kv_heads": 2, **changes})

    @property
    def _keeps_sum(self) -> bool:
        """Whether the state carries Σ v of the document, which affine-scaled rows need."""
        return self.normalizer.needs_value_mean and self.causal and self.window is None and not self.prefix

    def _steps(
        self, x: Tensor, mask: Tensor | None, resets: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        if self.prefix > 1:
            raise ArgumentError(
                f"mode: got 'step' with prefix={self.prefix}, expected 'block': tokens of a prefix see later ones."
            )
        current = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        outputs = []
        for token, real, opens in steps(x, mask, resets):
            output, after = self.forward(token, mask=real, resets=opens, state=current)
            outputs.append(output)
            current = current if after is None else after
        return torch.cat(outputs, 1), None if state is None else current

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query, key and value, with positions, norms and value gates in them."""
        placed = x
        if self.position == "learned":
            if int(positions.max()) >= self.table.num_embeddings:
                raise ArgumentError(
                    f"x: got position {int(positions.max())}, expected less than {self.table.num_embeddings}, the size "
                    "of the learned table. Build the layer with more max_positions."
                )
            placed = x + self.table(positions)
        elif self.position == "sinusoidal":
            placed = x + sinusoids(positions, self.width).to(x.dtype)
        query = self.query(placed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (
            f(source).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
            for f, source in ((self.key, placed), (self.value, x))
        )
        if self.query_norm is not None and self.key_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.position == "rope":
            frequencies = rope_frequencies(self.head_dim, self.rope_base)
            query, key = (rotate(t, positions, frequencies) for t in (query, key))
        return query, key, self._gated("value", x, value)

    def _gated(self, place: str, x: Tensor, gated: Tensor) -> Tensor:
        for gate in self.gates.values():
            if gate.place == place:
                gated = gate(x, gated)
        return gated

    def _operation(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        positions: Tensor,
        mask: Tensor | None,
        resets: Tensor | None,
        state: State | None,
    ) -> tuple[Operation, State | None]:
        """The attention operation of this call, and the state behind it."""
        tokens = key.shape[2]
        if not self.causal:
            visible, causal = both_ways(mask, resets, tokens), False
            places = orders(mask, tokens, key.device)
            after = None
        else:
            added = append(state, key, value, mask, resets)
            key, value, visible, causal, after = added.key, added.value, added.visible, added.causal, added.state
            places = orders(after.tensors.get("real"), key.shape[2], key.device)
        mean = None
        if self._keeps_sum:
            before = None if state is None else state.tensors["value_sum"]
            mean, total = running_mean(value[:, :, -tokens:], positions, mask, resets, before)
            after = None if after is None else after.replace(value_sum=total)
        call = Operation(
            query=query, key=key, value=value, scale=self.scale, causal=causal, visible=visible, value_mean=mean
        )
        call = self._narrowed(call, places, positions, mask, resets, state)
        if after is not None and self.window is not None:
            after = trimmed(after, self.window - 1)
        return call, after

    def _narrowed(
        self,
        call: Operation,
        places: Int[Tensor, "#batch keys"],
        positions: Tensor,
        mask: Tensor | None,
        resets: Tensor | None,
        state: State | None,
    ) -> Operation:
        """The operation with the window, the prefix and the bias of distances."""
        tokens = call.query.shape[2]
        changes: dict[str, Any] = {}
        window = None if self.window is None or self.window >= call.key.shape[2] else self.window
        plain = call.causal and call.visible is None and self.position not in ("alibi", "relative")
        if window is not None and plain and not self.prefix:
            return replace(call, window=window)
        if window is None and not self.prefix and self.position not in ("alibi", "relative"):
            return call
        distance = places[:, -tokens:, None] - places[:, None, :]
        seen = call.seen()
        if window is not None:
            seen = seen & (distance.abs() < window)[:, None]
        if self.prefix:
            seen = with_prefix(seen, self.prefix, positions, mask, resets, state)
        if window is not None or self.prefix:
            changes |= {"visible": seen, "causal": False}
        if self.position == "alibi":
            changes["bias"] = alibi_bias(distance, self.heads, torch.promote_types(call.query.dtype, torch.float32))
        elif self.position == "relative":
            buckets = relative_buckets(distance, causal=self.causal)
            changes["bias"] = self.table(buckets).permute(0, 3, 1, 2)
        return replace(call, **changes)
