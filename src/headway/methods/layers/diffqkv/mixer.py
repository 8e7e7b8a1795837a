"""The DiffQKV layer as a token mixer: own head counts and sizes for Q, K and V, all the way into the state."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.door.key_value_state import Appended, append, crop_keys, empty_keys
from headway.door.mixer import Mixer, State, check_inputs, document_positions, register_mixer, segment_ids, steps
from headway.door.normalised import normalised_attention
from headway.door.own import Attend, matched_heads
from headway.errors import ArgumentError, ConflictError, unknown
from headway.kernels.normalizers import Normalizer, Operation, make_normalizer
from headway.kernels.rope import rope_frequencies, rotate
from headway.kernels.unequal import check_top, selective_attention, unequal_attention
from headway.kernels.weighing import Weighing
from headway.methods.layers.diffqkv.heads import HeadLayout
from headway.methods.layers.diffqkv.key_size import AbsorbedKey, ExpandedKey
from headway.methods.layers.diffqkv.query import AugmentedQuery
from headway.methods.layers.diffqkv.selective import TopWeights

KEY_EXPANSIONS = ("absorbed", "mlp")
#: Width of the augmentation over the width of the model: the best of the paper's settings.
AUG_RATIO = 1.5
#: Base of the rotation in Sigma-1.5B; Sigma-10B has 500,000.
ROPE_BASE = 50_000.0


@register_mixer
class DiffQKV(Mixer):
    """Attention with `key_heads` keys and `value_heads` values for `heads` queries.

    `key_heads` defaults to an eighth of the heads and `value_heads` to half of them (Sigma: 32, 4, 16). `head_dim` is
    the size of query heads, width / heads unless given; `key_dim` and `value_dim` default to it. A smaller `key_dim`
    needs `key_expand`: "absorbed" or "mlp" (see `key_size`; `share_absorbed` has one projection for all key heads).
    `aug_dim` is the width of the query's augmentation: None is 1.5 × width, 0 none; `aug_residual` adds its input.
    `rope_base` None turns rotation off. `normalizer` and its options say how logits become weights, as in the mixer
    "softmax"; for another one than softmax a call repeats key or value heads to one count (the state never does), and
    there is no selection of values.

    `selective_values` reads that many values per query head, by largest weight, and makes the weights of these sum to
    one unless `renormalize=False`. It is meant for inference; training under it raises unless `selective_training`."""

    slug = "diffqkv"
    can_crop = True
    constant_state = False

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        causal: bool = True,
        key_heads: int | None = None,
        value_heads: int | None = None,
        head_dim: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        key_expand: str | None = None,
        share_absorbed: bool = False,
        aug_dim: int | None = None,
        aug_residual: bool = False,
        rope_base: float | None = ROPE_BASE,
        selective_values: int | None = None,
        renormalize: bool = True,
        selective_training: bool = False,
        normalizer: str | Sequence[str] = "softmax",
        normalizer_options: Mapping[str, Any] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers, causal=causal)
        size = width // heads if head_dim is None else head_dim
        self.layout = HeadLayout(
            query_heads=heads,
            key_heads=_eighth(heads) if key_heads is None else key_heads,
            value_heads=_half(heads) if value_heads is None else value_heads,
            query_dim=size,
            key_dim=size if key_dim is None else key_dim,
            value_dim=size if value_dim is None else value_dim,
        )
        _check_key_size(self.layout, key_expand)
        if selective_values is not None:
            check_top(selective_values)
        self.key_expand, self.rope_base = key_expand, rope_base
        self.selective_values, self.renormalize = selective_values, renormalize
        self.selective_training = selective_training
        self.q_proj = nn.Linear(width, heads * size, bias=bias)
        self.k_proj = nn.Linear(width, self.layout.key_heads * self.layout.key_dim, bias=bias)
        self.v_proj = nn.Linear(width, self.layout.value_heads * self.layout.value_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.layout.value_dim, width, bias=bias)
        hidden = round(AUG_RATIO * width) if aug_dim is None else aug_dim
        self.augment = AugmentedQuery(heads * size, hidden, residual=aug_residual) if hidden else None
        self.absorb: AbsorbedKey | None = None
        self.expand: ExpandedKey | None = None
        if key_expand == "absorbed":
            self.absorb = AbsorbedKey(heads, self.layout.key_heads, size, self.layout.key_dim, shared=share_absorbed)
        if key_expand == "mlp":
            self.expand = ExpandedKey(self.layout.key_dim, size)
        self.product_dim = size if key_expand == "mlp" else self.layout.key_dim
        self.scale = self.product_dim**-0.5
        self.normalizer = self._normalizer(normalizer, normalizer_options)
        weighing: Weighing | None = None
        if selective_values is not None:
            weighing = TopWeights(selective_values, renormalize=renormalize)
        self.attend = Attend(layer=layer, scale=self.scale, causal=causal, weighing=weighing)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        return empty_keys(
            batch,
            key_heads=self.layout.key_heads,
            key_dim=self.layout.key_dim,
            value_heads=self.layout.value_heads,
            value_dim=self.layout.value_dim,
            device=self.k_proj.weight.device if device is None else device,
            dtype=self.k_proj.weight.dtype if dtype is None else dtype,
        )

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
        self._refuse_training_selection()
        if not x.shape[1]:
            return x, state
        if mode == "step":
            return self._steps(x, mask, resets, state)
        y, after = self._mix(x, mask, resets, state, mode)
        return y, None if state is None else after

    def crop(self, state: State, tokens: int) -> State:
        return crop_keys(state, tokens)

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        return cls(**{"width": 16, "heads": 4, "key_heads": 1, "value_heads": 2, "aug_dim": 8, **changes})

    def _steps(
        self, x: Tensor, mask: Tensor | None, resets: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        now = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        outputs = []
        for token, real, opens in steps(x, mask, resets):
            y, now = self._mix(token, real, opens, now, "block")
            outputs.append(y)
        return torch.cat(outputs, 1), None if state is None else now

    def _mix(
        self, x: Tensor, mask: Tensor | None, resets: Tensor | None, state: State | None, mode: str
    ) -> tuple[Tensor, State]:
        layout = self.layout
        positions, _ = document_positions(x, mask, resets, None if state is None else state.seen)
        query = self.q_proj(x)
        if self.augment is not None:
            query = self.augment(query)
        query = _heads(query, layout.query_heads)
        if self.absorb is not None:
            query = self.absorb(query)
        query = self._turn(query, positions)
        key, value = _heads(self.k_proj(x), layout.key_heads), _heads(self.v_proj(x), layout.value_heads)
        if self.expand is None:
            key = self._turn(key, positions)
        stored = append(state, key, value, mask, resets)
        key = stored.key
        if self.expand is not None:
            key = self._turn(self.expand(key), _column_positions(stored))
        visible = stored.visible if self.causal else _both_ways(x, mask, resets)
        if self.normalizer is None:
            mixed = self.attend(
                query,
                key,
                stored.value,
                visible=visible,
                native=lambda: self._native(query, key, stored, visible, mode),
            )
        else:
            keys, values = matched_heads(key, stored.value)
            causal = self.causal and stored.causal
            call = Operation(query=query, key=keys, value=values, scale=self.scale, causal=causal, visible=visible)
            whole = mask is None and resets is None and state is None
            mixed = normalised_attention(
                self.attend, self.normalizer, call, x, mask, whole=whole, by_rows=mode == "reference"
            )
        y = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return y if mask is None else torch.where(mask[..., None], y, 0.0), stored.state

    def _native(
        self, query: Tensor, key: Tensor, stored: Appended, visible: Tensor | None, mode: str
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        options: dict[str, Any] = {
            "scale": self.scale,
            "causal": self.causal and stored.causal,
            "visible": visible,
        }
        if self.selective_values is None:
            return unequal_attention(query, key, stored.value, mode=mode, **options)
        return selective_attention(
            query, key, stored.value, top=self.selective_values, renormalize=self.renormalize, **options
        )

    def _normalizer(self, name: str | Sequence[str], options: Mapping[str, Any] | None) -> Normalizer | None:
        """The module of the normaliser; None for softmax, which has forms of its own here."""
        if name == "softmax" and not options:
            return None
        layout = self.layout
        if self.selective_values is not None:
            raise ConflictError(
                f"normalizer: got {name!r} with selective_values={self.selective_values}, expected 'softmax': the "
                "values read are those of the largest softmax weights. Leave one of the two out."
            )
        if layout.value_dim != self.product_dim:
            raise ArgumentError(
                f"value_dim: got {layout.value_dim} with keys of size {self.product_dim} and the normaliser {name!r}, "
                "expected equal sizes: normalisers may add keys and values of their own. Use 'softmax' or equal sizes."
            )
        heads = math.lcm(layout.key_heads, layout.value_heads)
        shape = {"width": self.width, "heads": self.heads, "kv_heads": heads, "head_dim": self.product_dim}
        return make_normalizer(name, scale=self.scale, **shape, **(options or {}))

    def _turn(self, x: Tensor, positions: Int[Tensor, "batch tokens"]) -> Tensor:
        # Made anew and not a buffer, which a cast of the module to bfloat16 would spoil.
        return x if self.rope_base is None else rotate(x, positions, rope_frequencies(self.product_dim, self.rope_base))

    def _refuse_training_selection(self) -> None:
        if self.selective_values is None or self.selective_training:
            return
        if self.training and torch.is_grad_enabled():
            raise ConflictError(
                f"selective_values: got {self.selective_values} while training, expected None: which values are read "
                "has no gradient. Call eval(), or pass selective_training=True to train under it on purpose."
            )

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        for name, heads, size in (
            ("k_proj", self.layout.key_heads, self.layout.key_dim),
            ("v_proj", self.layout.value_heads, self.layout.value_dim),
        ):
            given = state_dict.get(f"{prefix}{name}.weight")
            if given is not None and given.shape != getattr(self, name).weight.shape:
                raise ArgumentError(
                    f"{prefix}{name}.weight: got shape {tuple(given.shape)}, expected "
                    f"{tuple(getattr(self, name).weight.shape)} ({heads} heads of {size}). A checkpoint with other "
                    "head counts is turned by headway.methods.layers.diffqkv.convert, or its weight by pool_heads."
                )
        super()._load_from_state_dict(state_dict, prefix, *others)


def _check_key_size(layout: HeadLayout, key_expand: str | None) -> None:
    if key_expand is not None and key_expand not in KEY_EXPANSIONS:
        raise unknown("key_expand", key_expand, KEY_EXPANSIONS, fix="None is for keys as large as queries.")
    if layout.key_dim != layout.query_dim and key_expand is None:
        raise ArgumentError(
            f"key_dim: got {layout.key_dim} for queries of size {layout.query_dim}, expected equal sizes or a "
            "projection between them. Pass key_expand='absorbed' (or 'mlp')."
        )


def _eighth(heads: int) -> int:
    return max(heads // 8, 1) if heads % max(heads // 8, 1) == 0 else 1


def _half(heads: int) -> int:
    return heads // 2 if heads % 2 == 0 else heads


def _heads(x: Float[Tensor, "batch tokens size"], heads: int) -> Float[Tensor, "batch heads tokens dim"]:
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


def _both_ways(x: Tensor, mask: Tensor | None, resets: Tensor | None) -> Bool[Tensor, "#batch 1 tokens keys"] | None:
    """All real tokens of the own document; None where that is everything."""
    if mask is None and resets is None:
        return None
    seen = torch.ones(x.shape[0], 1, x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
    if mask is not None:
        seen = seen & mask[:, None, None, :] & mask[:, None, :, None]
    if resets is not None:
        document = segment_ids(resets, mask)
        seen = seen & (document[:, None, None, :] == document[:, None, :, None])
    return seen


def _column_positions(stored: Appended) -> Int[Tensor, "batch keys"]:
    """The position of every stored column in its document."""
    key, tensors = stored.key, stored.state.tensors
    if "real" not in tensors:
        return torch.arange(key.shape[2], device=key.device).expand(key.shape[0], -1)
    document = tensors["document"]
    opens = torch.zeros_like(tensors["real"])
    opens[:, 1:] = document[:, 1:] != document[:, :-1]
    return document_positions(key.transpose(1, 2), tensors["real"], opens, None)[0]
