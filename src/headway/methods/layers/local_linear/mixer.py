"""The mixer `local_linear`: local linear attention between projections; each head learns its ridge and its bandwidth.

    q, k, v = x W_q, x W_k, x W_v ,   λ_h = unit · (softplus(θ_h) + 10⁻⁴) ,   s_h = s exp(γ_h) ,
    y = LLA(q, k, v; λ, s) W_o

Queries and keys are brought to one length first, or one ridge would mean something else in every head. The bandwidth is
learned apart, as a longer query would also be one elsewhere among the keys. With rotary positions "linear in k" refers
to the rotated keys. The state is the stored keys and values.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn.functional import normalize, softplus

from headway.door.key_value_state import append, crop_keys, empty_keys
from headway.door.mixer import Mixer, State, check_inputs, document_positions, register_mixer, segment_ids, steps
from headway.door.own import Attend
from headway.errors import ArgumentError, unknown
from headway.kernels.local_linear import local_linear_attention, sloped_attention
from headway.kernels.local_linear.arguments import MAX_ITERATIONS, RIDGE, SOLVERS
from headway.kernels.rope import rope_frequencies, rotate
from headway.methods.layers.local_linear.weighing import LocalLinearWeighing, SlopedWeighing

NORMS = ("l2", "rms", "none")
POSITIONS = ("rope", "none")
VARIANTS = ("solve", "parallax")
#: Smallest ridge in units of squared key length, so that float32 can always solve.
LEAST_RIDGE = 1e-4


@register_mixer
class LocalLinearMixer(Mixer):
    """Multi-head local linear attention.

    kv_heads, head_dim: as in softmax attention. ridge: λ at the start, for keys of length one (times head_dim with
    other norms). scale, the inverse bandwidth at the start: √head_dim for qk_norm "l2", 1/√head_dim otherwise.
    learn_ridge, learn_scale: whether heads learn theirs.
    position: "rope" or "none". variant: "solve", or "parallax" with a learned probe that starts at zero, at softmax.
    solver, tolerance, max_iterations, jacobi, detach_ridge_weight, strict: see `local_linear_attention`."""

    slug: ClassVar[str] = "local_linear"
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
        ridge: float = RIDGE,
        learn_ridge: bool = True,
        scale: float | None = None,
        learn_scale: bool = True,
        qk_norm: str = "l2",
        position: str = "rope",
        rope_base: float = 10_000.0,
        variant: str = "solve",
        solver: str = "auto",
        tolerance: float | None = None,
        max_iterations: int = MAX_ITERATIONS,
        jacobi: bool = False,
        detach_ridge_weight: bool = False,
        strict: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers, causal=causal)
        for name, got, valid in (
            ("qk_norm", qk_norm, NORMS),
            ("position", position, POSITIONS),
            ("variant", variant, VARIANTS),
            ("solver", solver, SOLVERS),
        ):
            if got not in valid:
                raise unknown(name, got, valid)
        self.kv_heads = heads if kv_heads is None else kv_heads
        if self.kv_heads < 1 or heads % self.kv_heads:
            raise ArgumentError(f"kv_heads: got {kv_heads}, expected a number that divides the {heads} heads.")
        if not ridge > LEAST_RIDGE:
            raise ArgumentError(
                f"ridge: got {ridge}, expected more than {LEAST_RIDGE:g}, what stays when a head learns it away."
            )
        self.head_dim = width // heads if head_dim is None else head_dim
        self.qk_norm, self.position, self.rope_base, self.variant = qk_norm, position, rope_base, variant
        self.can_crop = causal  # type: ignore[misc]
        if position == "rope":
            rope_frequencies(self.head_dim, rope_base)
        root = math.sqrt(self.head_dim)
        self.scale = scale if scale is not None else root if qk_norm == "l2" else 1 / root
        self.unit = 1.0 if qk_norm == "l2" else float(self.head_dim)
        self.query = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.key = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.value = nn.Linear(width, self.kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(heads * self.head_dim, width, bias=bias)
        self.query_norm = nn.RMSNorm(self.head_dim) if qk_norm == "rms" else None
        self.key_norm = nn.RMSNorm(self.head_dim) if qk_norm == "rms" else None
        self.options: dict[str, Any] = {
            "solver": solver,
            "tolerance": tolerance,
            "max_iterations": max_iterations,
            "jacobi": jacobi,
            "detach_ridge_weight": detach_ridge_weight,
            "strict": strict,
        }
        if variant == "parallax":
            self.probe = nn.Linear(width, heads * self.head_dim, bias=False)
            nn.init.zeros_(self.probe.weight)
        else:
            wanted = ridge - LEAST_RIDGE
            start = torch.full((heads,), wanted + math.log(-math.expm1(-wanted)))
            self.raw_ridge = nn.Parameter(start, requires_grad=learn_ridge)
        self.log_gain = nn.Parameter(torch.zeros(heads), requires_grad=learn_scale)
        self.attend = Attend(layer=layer, scale=self.scale, causal=causal)

    @property
    def ridge(self) -> Float[Tensor, "heads 1"]:
        """λ of every head."""
        return self.unit * (softplus(self.raw_ridge) + LEAST_RIDGE)[:, None]

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        if not self.causal:
            raise ArgumentError("state: got a request with causal=False, expected a causal layer: it reads both ways.")
        return empty_keys(
            batch,
            key_heads=self.kv_heads,
            key_dim=self.head_dim,
            value_heads=self.kv_heads,
            value_dim=self.head_dim,
            device=device,
            dtype=self.query.weight.dtype if dtype is None else dtype,
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
        if x.shape[1] == 0:
            return x, state
        if mode == "step":
            return self._steps(x, mask, resets, state)
        positions, _ = document_positions(x, mask, resets, None if state is None else state.seen)
        query, key = (
            self._placed(project(x), norm, positions)
            for project, norm in ((self.query, self.query_norm), (self.key, self.key_norm))
        )
        value, after = _by_head(self.value(x), self.head_dim), None
        if self.causal:
            added = append(state, key, value, mask, resets)
            key, value, visible, after = added.key, added.value, added.visible, added.state
            hidden = visible if "real" in after.tensors else None
        else:
            hidden = visible = _both_ways(mask, resets)
        output = self._attended(query, key, value, visible, hidden, x, positions, mode)
        y = self.output(output.transpose(1, 2).flatten(2))
        return y if mask is None else torch.where(mask[..., None], y, 0.0), after if state is not None else None

    def crop(self, state: State, tokens: int) -> State:
        return crop_keys(state, tokens) if self.can_crop else super().crop(state, tokens)

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        return cls(**{"width": 16, "heads": 4, "kv_heads": 2, **changes})

    def _attended(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        visible: Tensor | None,
        hidden: Tensor | None,
        x: Tensor,
        positions: Tensor,
        mode: str,
    ) -> Tensor:
        """The heads' outputs. `visible` says everything, `hidden` only what the causal order does not."""
        gain = self.log_gain.exp()[:, None]
        loud = query * gain[..., None].to(query.dtype)
        shared: dict[str, Any] = {"scale": self.scale * gain, "causal": self.causal, "visible": hidden, "mode": mode}
        if self.variant == "parallax":
            slope = -self._turned(_by_head(self.probe(x), self.head_dim), positions)
            weighing: Any = SlopedWeighing(slope, key.shape[2] - query.shape[2])
            return self.attend(
                loud,
                key,
                value,
                visible=visible,
                weighing=weighing,
                native=lambda: sloped_attention(query, key, value, slope, **shared),
            )
        ridge = self.ridge
        return self.attend(
            loud,
            key,
            value,
            visible=visible,
            weighing=LocalLinearWeighing(ridge[None], gain[None]),
            native=lambda: local_linear_attention(query, key, value, ridge=ridge, **shared, **self.options),
        )

    def _placed(self, x: Tensor, norm: nn.Module | None, positions: Tensor) -> Tensor:
        """Heads of queries or keys, of one length and rotated."""
        heads = _by_head(x, self.head_dim)
        if self.qk_norm == "l2":
            wide = torch.promote_types(heads.dtype, torch.float32)
            heads = normalize(heads.to(wide), dim=-1).to(heads.dtype)
        elif norm is not None:
            heads = norm(heads)
        return self._turned(heads, positions)

    def _turned(self, heads: Tensor, positions: Tensor) -> Tensor:
        if self.position == "none":
            return heads
        return rotate(heads, positions, rope_frequencies(self.head_dim, self.rope_base))

    def _steps(
        self, x: Tensor, mask: Tensor | None, resets: Tensor | None, state: State | None
    ) -> tuple[Tensor, State | None]:
        current = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        outputs = []
        for token, real, opens in steps(x, mask, resets):
            output, after = self.forward(token, mask=real, resets=opens, state=current)
            outputs.append(output)
            current = current if after is None else after
        return torch.cat(outputs, 1), None if state is None else current


def _by_head(x: Float[Tensor, "batch tokens width"], dim: int) -> Float[Tensor, "batch heads tokens dim"]:
    return x.unflatten(-1, (-1, dim)).transpose(1, 2)


def _both_ways(mask: Tensor | None, resets: Tensor | None) -> Bool[Tensor, "batch 1 tokens tokens"] | None:
    """What each token sees when it reads both ways: the real tokens of its document."""
    seen = None if mask is None else mask[:, :, None] & mask[:, None, :]
    if resets is not None:
        document = segment_ids(resets, mask)
        same = document[:, :, None] == document[:, None, :]
        seen = same if seen is None else seen & same
    return None if seen is None else seen[:, None]
