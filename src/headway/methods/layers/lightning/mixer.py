"""The mixer: gated linear attention over the causal scan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from headway.door.mixer import Mixer, State, check_inputs, document_positions, register_mixer, segment_ids
from headway.door.own import Attend
from headway.errors import ArgumentError, unknown
from headway.kernels.norms import GATES, make_norm
from headway.kernels.scan import causal_scan, decay_powers
from headway.kernels.scan_blocks import BLOCK
from headway.kernels.slopes import head_slopes
from headway.methods.layers.lightning.lrpe import LRPE

LRPE_PLACES = ("first", "all", "none")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "elu_plus_one": lambda x: functional.elu(x) + 1,
    "none": lambda x: x,
}
#: What each preset says where an option is None.
PRESETS: dict[str, dict[str, Any]] = {
    "tnl": {"activation": "silu", "value_activation": "none", "norm": "srms", "gate": "identity", "lrpe": "first"},
    "minimax": {"activation": "silu", "value_activation": "silu", "norm": "rms", "gate": "sigmoid", "lrpe": "none"},
}
#: Variance of fresh projections times their inputs, as that of the softmax layers here.
INIT = 2 / 5


@dataclass(frozen=True)
class DecayWeighing:
    """weight_ij = logit_ij · λ_h^(real tokens from j to i). `at` is the running count of real tokens of one call, and
    None where all are real."""

    slopes: Float[Tensor, " heads"]
    at: Int[Tensor, "batch tokens"] | None = None
    name: str = "decay"
    whole: bool = False

    def __call__(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        at = torch.arange(logits.shape[-1], device=logits.device)[None] if self.at is None else self.at
        distance = at[:, positions][:, :, None] - at[:, None, :]
        decays = decay_powers(self.slopes.to(logits.device), distance.clamp(min=0)).to(logits.dtype)
        return torch.where(visible, logits * decays, 0.0)


@register_mixer
class Lightning(Mixer):
    """Gated linear attention with a fixed decay per head.

    preset: "tnl" or "minimax"; sets every option below that is None.
    head_dim, value_dim: sizes of a head of query and key, and of value and output; width / heads by default.
    decay, temperature: slopes of the heads and how they fall with the layer, see `headway.kernels.slopes`.
    lrpe: learned rotating positions in the "first" layer, in "all" or in "none".
    activation, value_activation: "silu", "elu_plus_one" or "none", of query and key, and of value.
    norm: of the output over all heads together, "srms", "rms", "layer" or "none". It comes before the gate.
    gate: "identity", "sigmoid" or "silu" of a projection of x, or "none". gate_rank: inner width of that projection;
        None is a full matrix.
    scale: of the products; 1 as in the released models. block: tokens per block.

    While something is attached, a call without earlier tokens passes the door as signed weights q·k·λ^distance. With
    earlier tokens in the state there are no keys to weigh any more: such a call warns and is not attached to."""

    slug = "lightning"

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        layer: int = 0,
        layers: int = 1,
        preset: str = "tnl",
        head_dim: int | None = None,
        value_dim: int | None = None,
        decay: str = "alibi",
        temperature: str | None = None,
        lrpe: str | None = None,
        activation: str | None = None,
        value_activation: str | None = None,
        norm: str | None = None,
        gate: str | None = None,
        gate_rank: int | None = None,
        scale: float = 1.0,
        block: int = BLOCK,
    ) -> None:
        super().__init__(width, heads=heads, layer=layer, layers=layers)
        if preset not in PRESETS:
            raise unknown("preset", preset, PRESETS)
        given = {"lrpe": lrpe, "activation": activation, "value_activation": value_activation}
        given |= {"norm": norm, "gate": gate}
        chosen = {name: PRESETS[preset][name] if value is None else value for name, value in given.items()}
        _check(chosen, head_dim, value_dim, gate_rank, block)
        self.head_dim = width // heads if head_dim is None else head_dim
        self.value_dim = self.head_dim if value_dim is None else value_dim
        self.scale, self.block = scale, block
        self.activation, self.value_activation = (
            ACTIVATIONS[chosen["activation"]],
            ACTIVATIONS[chosen["value_activation"]],
        )
        # No buffer: a model cast to half precision keeps its slopes.
        self.slopes = head_slopes(heads, family=decay, layer=layer, layers=layers, temperature=temperature)
        keys, values = heads * self.head_dim, heads * self.value_dim
        self.gate = None if chosen["gate"] == "none" else GATES[chosen["gate"]]
        whole = self.gate is not None and gate_rank is None
        self.sizes = [keys, keys, values, *([values] if whole else [])]
        self.project = nn.Linear(width, sum(self.sizes), bias=False)
        self.low_rank = None
        if self.gate is not None and gate_rank is not None:
            self.low_rank = nn.Sequential(
                nn.Linear(width, gate_rank, bias=False), nn.Linear(gate_rank, values, bias=False)
            )
        turned = chosen["lrpe"] == "all" or (chosen["lrpe"] == "first" and layer == 0)
        self.lrpe = LRPE(heads, self.head_dim) if turned else None
        self.norm = make_norm(chosen["norm"], values)
        self.output = nn.Linear(values, width, bias=False)
        self.attend = Attend(layer=layer, scale=scale, causal=True)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=(INIT / module.in_features) ** 0.5)

    def init_state(
        self, batch: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        wide = torch.promote_types(self.project.weight.dtype if dtype is None else dtype, torch.float32)
        dim = self.head_dim * (1 if self.lrpe is None else 2)
        return State(
            {"kv": torch.zeros(batch, self.heads, dim, self.value_dim, device=device, dtype=wide)},
            torch.zeros(batch, dtype=torch.long, device=device),
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
        positions, seen = document_positions(x, mask, resets, None if state is None else state.seen)
        query, key, value, gate = self._read(x, positions)
        scanned: list[tuple[Tensor, Tensor]] = []

        def native() -> Tensor:
            """The scan. Its output stays wide until it is normed, as sums without decay outgrow half precision."""
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            carried = None if state is None else state.tensors["kv"]
            options: dict[str, Any] = {"mask": mask, "resets": resets, "mode": mode, "block": self.block}
            scanned.append(causal_scan(query, key, wide, self.slopes, scale=self.scale, state=carried, **options))
            return scanned[0][0]

        out = self._pass_the_door(query, key, value, mask, resets, state, native)
        if state is not None and not scanned:
            native()
        normed = self.norm(out.transpose(1, 2).flatten(2)).to(x.dtype)
        y = self.output(normed if self.gate is None or gate is None else normed * self.gate(gate))
        if mask is not None:
            y = torch.where(mask[..., None], y, 0.0)
        return y, None if state is None else State({"kv": scanned[0][1]}, seen)

    @classmethod
    def example(cls, **changes: Any) -> Mixer:
        return cls(**{"width": 16, "heads": 2, "layers": 2, "block": 4, **changes})

    def _read(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Query, key and value by head, and what the gate is made of."""
        parts = self.project(x).split(self.sizes, -1)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts[:3])
        query, key, value = self.activation(query), self.activation(key), self.value_activation(value)
        if self.lrpe is not None:
            query, key = self.lrpe(query, positions), self.lrpe(key, positions)
        gate = parts[3] if len(parts) > 3 else None if self.low_rank is None else self.low_rank(x)
        return query, key, value, gate

    def _pass_the_door(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        resets: Tensor | None,
        state: State | None,
        native: Callable[[], Tensor],
    ) -> Float[Tensor, "batch heads tokens value_dim"]:
        continued = state is not None and bool(state.seen.any())
        if continued:
            self.attend.skip()
        if continued or not self.attend.watched or query.shape[2] == 0:
            return native()
        visible, at = None, None
        if mask is not None or resets is not None:
            real = query.new_ones(query.shape[0], query.shape[2], dtype=torch.bool) if mask is None else mask
            document = torch.zeros_like(real, dtype=torch.long) if resets is None else segment_ids(resets, mask)
            at = real.long().cumsum(1)
            same = document[:, :, None] == document[:, None, :]
            visible = (same & real[:, None, :] & real[:, :, None]).tril()[:, None]
        return self.attend(query, key, value, visible=visible, native=native, weighing=DecayWeighing(self.slopes, at))


def _check(
    chosen: dict[str, Any], head_dim: int | None, value_dim: int | None, gate_rank: int | None, block: int
) -> None:
    for name, valid in (
        ("lrpe", LRPE_PLACES),
        ("activation", tuple(ACTIVATIONS)),
        ("value_activation", tuple(ACTIVATIONS)),
        ("gate", (*GATES, "none")),
    ):
        if chosen[name] not in valid:
            raise unknown(name, chosen[name], valid)
    for name, size in (("head_dim", head_dim), ("value_dim", value_dim), ("gate_rank", gate_rank), ("block", block)):
        if size is not None and size < 1:
            raise ArgumentError(f"{name}: got {size}, expected at least 1.")
    if gate_rank is not None and chosen["gate"] == "none":
        raise ArgumentError(f"gate_rank: got {gate_rank} with gate='none', expected a gate to have a rank. Drop one.")
