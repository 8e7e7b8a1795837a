"""Gates: factors in (0, 1) on what a head gives or reads, so that it can be silent though its weights sum to one.

    head         o_h ⊙ σ(x W_g)_h              one factor per token and head            before the output projection
    element      o_h ⊙ σ(x W_g)_h              one factor per token, head and channel
    conditional  o_h · σ(f_h(x_h))             f_h reads the head's own slice x_h of x; σ = 0.25 at the start
    value        σ(v G_h) ⊙ v                  before attention, from the value itself
    context      S_c(x)_h · o_h                S_c = 2 σ(x W_c), 1 at zero: a factor in (0, 2)

All are computed from the input of the layer. The released code of gated attention, arXiv 2505.06708, takes the gate
from the matrix of the query projection; it has a matrix of its own here, and `split_query_gate` takes a joint one
apart. Conditional gates are those of arXiv 2306.12929. Value gates and context scaling are named by the survey, arXiv
2604.10098, which leaves the shape of G and the range of S_c open: a matrix per key-value head, and 2σ, are our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown

#: σ of a fresh conditional gate in the released recipe.
CONDITIONAL_START = 0.25
#: Logit of an open gate: σ(12) = 1 − 6·10⁻⁶.
OPEN = 12.0
#: Standard deviation of fresh gate matrices.
STD = 0.02


class Gate(nn.Module):
    """Base of gates. `place` is "output" (what attention gives) or "value" (what it reads)."""

    name: ClassVar[str] = ""
    place: ClassVar[str] = "output"

    def forward(
        self, x: Float[Tensor, "batch tokens width"], gated: Float[Tensor, "batch heads tokens dim"]
    ) -> Float[Tensor, "batch heads tokens dim"]:
        """`gated` times its factors; x is the input of the attention layer."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Fresh weights."""
        raise NotImplementedError

    def open(self) -> None:
        """Sets all factors to one as nearly as the gate allows, which leaves the layer as it was without the gate."""
        raise NotImplementedError


class _Projected(Gate):
    """A gate whose logits are a linear map of the layer's input."""

    def __init__(self, *, width: int, heads: int, kv_heads: int, head_dim: int, bias: float | None = None) -> None:
        super().__init__()
        self.heads, self.start = heads, bias
        self.map = nn.Linear(width, heads * self.channels(head_dim), bias=bias is not None)
        self.reset_parameters()

    def channels(self, head_dim: int) -> int:
        return 1

    def reset_parameters(self) -> None:
        nn.init.normal_(self.map.weight, std=STD)
        if self.start is not None:
            nn.init.constant_(self.map.bias, self.start)

    def open(self) -> None:
        if self.start is None:
            raise ArgumentError(
                f"gate: got {self.name!r} without a bias, expected one to open it with. Build it with "
                f"gate_options={{'bias': {OPEN}}}."
            )
        nn.init.zeros_(self.map.weight)
        nn.init.constant_(self.map.bias, OPEN)

    def logits(self, x: Tensor) -> Float[Tensor, "batch heads tokens channels"]:
        return self.map(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, gated: Tensor) -> Tensor:
        return gated * torch.sigmoid(self.logits(x)).to(gated.dtype)


class HeadGate(_Projected):
    """σ(x W_g), one factor per head. `bias` adds one to the logits, with that starting value."""

    name = "head"


class ElementGate(_Projected):
    """σ(x W_g), one factor per channel of each head: width × heads × head_dim more parameters."""

    name = "element"

    def channels(self, head_dim: int) -> int:
        return head_dim


class ContextScale(_Projected):
    """2 σ(x W_c), one factor per head, 1 where the logit is zero."""

    name = "context"

    def open(self) -> None:
        nn.init.zeros_(self.map.weight)
        if self.start is not None:
            nn.init.zeros_(self.map.bias)

    def forward(self, x: Tensor, gated: Tensor) -> Tensor:
        return gated * (2 * torch.sigmoid(self.logits(x))).to(gated.dtype)


class ConditionalGate(Gate):
    """σ of a linear map (`hidden=0`) or of a small relu network per head, which reads the head's slice of x alone."""

    name = "conditional"

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        hidden: int = 0,
        start: float = CONDITIONAL_START,
    ) -> None:
        super().__init__()
        if width % heads:
            raise ArgumentError(f"width: got {width}, expected a multiple of the {heads} heads: each reads its slice.")
        if not 0 < start < 1:
            raise ArgumentError(f"start: got {start}, expected a share in (0, 1); the released recipe has 0.25.")
        self.heads, self.start = heads, start
        slice_width = width // heads
        self.first = nn.Parameter(torch.empty(heads, slice_width, hidden)) if hidden else None
        self.last = nn.Parameter(torch.empty(heads, hidden or slice_width))
        self.bias = nn.Parameter(torch.empty(heads))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.first is not None:
            nn.init.normal_(self.first, std=STD)
        nn.init.normal_(self.last, std=STD)
        nn.init.constant_(self.bias, math.log(self.start / (1 - self.start)))

    def open(self) -> None:
        nn.init.zeros_(self.last)
        nn.init.constant_(self.bias, OPEN)

    def forward(self, x: Tensor, gated: Tensor) -> Tensor:
        slices = x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        if self.first is not None:
            slices = torch.relu(slices @ self.first.to(x.dtype))
        logits = (slices @ self.last.to(x.dtype)[..., None]) + self.bias.to(x.dtype)[:, None, None]
        return gated * torch.sigmoid(logits).to(gated.dtype)


class ValueGate(Gate):
    """σ(v G_h) ⊙ v with a matrix per key-value head: a token can take its own value out of every sum."""

    name, place = "value", "value"

    def __init__(self, *, width: int, heads: int, kv_heads: int, head_dim: int, bias: float | None = None) -> None:
        super().__init__()
        self.start = bias
        self.map = nn.Parameter(torch.empty(kv_heads, head_dim, head_dim))
        self.bias = nn.Parameter(torch.empty(kv_heads, 1, head_dim)) if bias is not None else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.map, std=STD)
        if self.bias is not None and self.start is not None:
            nn.init.constant_(self.bias, self.start)

    def open(self) -> None:
        if self.bias is None:
            raise ArgumentError(
                "gate: got 'value' without a bias, expected one to open it with. Build it with "
                f"gate_options={{'bias': {OPEN}}}."
            )
        nn.init.zeros_(self.map)
        nn.init.constant_(self.bias, OPEN)

    def forward(self, x: Tensor, gated: Tensor) -> Tensor:
        logits = gated @ self.map.to(gated.dtype)
        if self.bias is not None:
            logits = logits + self.bias.to(gated.dtype)
        return torch.sigmoid(logits) * gated


GATES: dict[str, type[Gate]] = {
    cls.name: cls for cls in (HeadGate, ElementGate, ConditionalGate, ValueGate, ContextScale)
}


def make_gate(name: str, **options: Any) -> Gate:
    """The gate of that name. Raises ArgumentError for an unknown name or an option it does not have."""
    if name not in GATES:
        raise unknown("gate", name, GATES)
    try:
        return GATES[name](**options)
    except TypeError as error:
        raise ArgumentError(f"gate_options: got {sorted(options)} for {name!r}: {error}.") from None


def options_by_gate(gate: str | Sequence[str] | None, options: Mapping[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The options of every gate asked for, by name; those of a single one may be given without its name.

    Raises ArgumentError for a gate named twice and for options of a gate that was not asked for."""
    names = [] if gate is None else [gate] if isinstance(gate, str) else list(gate)
    if len(set(names)) != len(names):
        raise ArgumentError(f"gate: got {names}, expected each gate once.")
    given = dict(options or {})
    if len(names) == 1 and names[0] not in given:
        given = {names[0]: given}
    for name in set(given) - set(names):
        raise unknown("gate_options", name, names, fix="Map each gate to its options.")
    return {name: dict(given.get(name, {})) for name in names}


def split_query_gate(
    joint: Float[Tensor, "rows ..."], gate: str, *, heads: int, kv_heads: int, head_dim: int
) -> tuple[Float[Tensor, "query_rows ..."], Float[Tensor, "gate_rows ..."]]:
    """The query projection and the gate out of one matrix (or bias) that holds both, as released gated models do.

    Their rows go by groups of heads that share a key: the queries of a group, then its gates, one per head ("head") or
    per channel ("element"). Raises ArgumentError when the rows are not as many: then there is no gate in it, or it is
    tied in another way."""
    if gate not in ("head", "element"):
        raise unknown("gate", gate, ("head", "element"))
    if kv_heads < 1 or heads % kv_heads:
        raise ArgumentError(f"kv_heads: got {kv_heads}, expected a number that divides the {heads} heads.")
    groups = heads // kv_heads
    queries, gates = groups * head_dim, groups * (1 if gate == "head" else head_dim)
    if joint.shape[0] != kv_heads * (queries + gates):
        raise ArgumentError(
            f"joint: got {joint.shape[0]} rows, expected {kv_heads * (queries + gates)}: {heads} queries of {head_dim} "
            f"and the gates of {gate!r}. A matrix without gates goes to the query alone."
        )
    apart = joint.unflatten(0, (kv_heads, queries + gates))
    return apart[:, :queries].flatten(0, 1), apart[:, queries:].flatten(0, 1)
