"""The softmax and what is softmax with one more column, as modules: all run through the platform's fused kernel.

softmax, softmax_plus_one, learned_denominator, key_slot, key_value_slot, value_bias
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.kernels.normalizers.base import Normalizer
from headway.kernels.normalizers.operation import Operation, fused_softmax, fused_with_column
from headway.kernels.normalizers.softmax_family import softmax_weights
from headway.kernels.weighing import Weighing

#: Learned logit at which a denominator is softmax to 2·10⁻⁹ of its largest weight, with a gradient that is not zero.
FAR_BELOW = -20.0
#: Standard deviation of fresh slots (arXiv 2410.10781).
STD = 0.02


class Softmax(Normalizer):
    """w = e^s / Σ e^s."""

    name, fused, whole = "softmax", True, True

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        return softmax_weights(logits, visible)

    def attend(self, call: Operation, weighing: Weighing) -> tuple[Tensor, Tensor | None]:
        return fused_softmax(call), None

    @property
    def is_softmax(self) -> bool:
        return True

    def start_at_softmax(self) -> None:
        """It is there already."""


class SoftmaxPlusOne(Softmax):
    """w = e^s / (1 + Σ e^s)."""

    name, whole = "softmax_plus_one", False
    start_at_softmax = Normalizer.start_at_softmax

    def sinks(self, like: Tensor) -> Float[Tensor, " heads"]:
        return torch.zeros(self.heads, device=like.device)

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        return softmax_weights(logits, visible, self.sinks(logits).view(1, -1, 1, 1))

    def attend(self, call: Operation, weighing: Weighing) -> tuple[Tensor, Tensor | None]:
        return fused_with_column(call, logit=self.sinks(call.query))


class LearnedDenominator(SoftmaxPlusOne):
    """w = e^s / (e^b + Σ e^s) with b learned per head, 0 at the start: then it is softmax_plus_one."""

    name = "learned_denominator"

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        self.logit = nn.Parameter(torch.zeros(self.heads))

    def sinks(self, like: Tensor) -> Float[Tensor, " heads"]:
        return self.logit

    def start_at_softmax(self) -> None:
        nn.init.constant_(self.logit, FAR_BELOW)

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.logit)


class KeySlot(Normalizer):
    """One more key k* per key head, learned, not rotated, seen by every query, with a value of zero.

    `shared` uses one for all heads. (The survey writes K + K_bias; the released code appends.)"""

    name, fused = "key_slot", True

    def __init__(self, *, shared: bool = False, **shape: Any) -> None:
        super().__init__(**shape)
        self.shared = shared
        self.key = nn.Parameter(torch.empty(1 if shared else self.kv_heads, self.head_dim))
        nn.init.normal_(self.key, std=STD)

    def slot(self) -> Float[Tensor, "kv_heads dim"]:
        return self.key.expand(self.kv_heads, -1)

    def forward(self, logits: Tensor, visible: Tensor, *, query: Tensor, **_: Any) -> Tensor:
        slot = self.slot().repeat_interleave(self.heads // self.kv_heads, 0)
        extra = (query.to(logits.dtype) * slot[:, None].to(logits.dtype)).sum(-1, keepdim=True) * self.scale
        return softmax_weights(logits, visible, extra)

    def attend(self, call: Operation, weighing: Weighing) -> tuple[Tensor, Tensor | None]:
        return fused_with_column(call, key=self.slot(), mass=self.needs_mass)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.key, std=STD)


class KeyValueSlot(KeySlot):
    """A key slot with a value v*: learned, or fixed at m·(1, 0, …, 0) by `fixed_value=m`."""

    name, needs_mass = "key_value_slot", True

    def __init__(self, *, fixed_value: float | None = None, **shape: Any) -> None:
        super().__init__(**shape)
        self.fixed_value = fixed_value
        self.value = None if fixed_value is not None else nn.Parameter(torch.empty_like(self.key))
        self.reset_parameters()

    def slot_value(self, like: Tensor) -> Float[Tensor, "heads 1 dim"]:
        value = like.new_zeros(1, self.head_dim) if self.value is None else self.value.to(like.dtype)
        if self.fixed_value is not None:
            value[:, 0] = self.fixed_value
        return value.expand(self.kv_heads, -1).repeat_interleave(self.heads // self.kv_heads, 0)[:, None]

    def finish(self, output: Tensor, mass: Tensor | None) -> Tensor:
        if mass is None:
            raise ArgumentError("mass: got None, expected Σ_j w_ij of the rows: the slot gets what is left of them.")
        return output + (1 - mass)[..., None].to(output.dtype) * self.slot_value(output)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.value is not None:
            nn.init.normal_(self.value, std=STD)


class ValueBias(Softmax):
    """Softmax, and v* added to the output of every head."""

    name = "value_bias"

    def __init__(self, *, shared: bool = False, **shape: Any) -> None:
        super().__init__(**shape)
        self.value = nn.Parameter(torch.empty(1 if shared else self.heads, self.head_dim))
        nn.init.normal_(self.value, std=STD)

    def finish(self, output: Tensor, mass: Tensor | None) -> Tensor:
        return output + self.value[:, None].to(output.dtype)

    def start_at_softmax(self) -> None:
        nn.init.zeros_(self.value)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.value, std=STD)
