"""Normalisers that need explicit weights, as modules: their output is made in blocks of rows.

    clipped, elastic, softpick, sigmoid, elu, kernel_elu, kernel_identity, kernel_mlp

Elastic softmax by temperature is the exception: it is a softmax, and runs as one.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.kernels.normalizers.base import Normalizer
from headway.kernels.normalizers.operation import Operation, fused_softmax
from headway.kernels.normalizers.similarity import divided, kernel_weights
from headway.kernels.normalizers.softmax_family import CLIP_ALPHA, STRETCH, clipped_weights, elastic_weights
from headway.kernels.normalizers.unnormalised import (
    SIGMOID_SCALES,
    SOFTPICK_EPS,
    elu_weights,
    sigmoid_weights,
    softpick_weights,
)
from headway.kernels.weighing import Weighing

log = logging.getLogger(__name__)

#: T of γ = −α/T of clipped softmax where no length is given: the sequence length of small OPT recipes.
CLIP_LENGTH = 512
#: τ of a fresh elastic softmax.
ELASTIC_START = -1.0
#: Keys from which on plain sigmoid weights draw a warning; the paper trains with 2,048.
LONG = 2048


class Clipped(Normalizer):
    """clip((ζ − γ)·softmax + γ, 0, 1). γ is `gamma`, or −`alpha`/`length`."""

    name = "clipped"

    def __init__(
        self,
        *,
        gamma: float | None = None,
        alpha: float = CLIP_ALPHA,
        length: int = CLIP_LENGTH,
        stretch: float = STRETCH,
        **shape: Any,
    ) -> None:
        super().__init__(**shape)
        if length < 1 or alpha < 0:
            raise ArgumentError(f"alpha, length: got {alpha} and {length}, expected alpha ≥ 0 and length ≥ 1.")
        self.gamma, self.stretch = -alpha / length if gamma is None else gamma, stretch
        if self.gamma > 0 or stretch < 1:
            raise ArgumentError(f"gamma, stretch: got {self.gamma} and {stretch}, expected gamma ≤ 0 and stretch ≥ 1.")

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        return clipped_weights(logits, visible, gamma=self.gamma, stretch=self.stretch)


class Elastic(Normalizer):
    """relu(softmax(s) + τ_h/n) with τ learned per head, −1 at the start (arXiv 2601.00919), or, as the survey words it,
    softmax(s/T) with a fixed T > 1 (`form="temperature"`)."""

    name = "elastic"

    def __init__(self, *, form: str = "offset", temperature: float = 1.5, **shape: Any) -> None:
        super().__init__(**shape)
        if form not in ("offset", "temperature"):
            raise unknown("form", form, ("offset", "temperature"))
        if not temperature >= 1:
            raise ArgumentError(f"temperature: got {temperature}, expected at least 1, which is softmax.")
        self.form, self.whole = form, form == "temperature"
        self.temperature = temperature if form == "temperature" else 1.0
        self.offset = nn.Parameter(torch.full((self.heads,), ELASTIC_START)) if form == "offset" else None

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        return elastic_weights(logits, visible, temperature=self.temperature, offset=self.offset)

    def attend(self, call: Operation, weighing: Weighing) -> tuple[Tensor, Tensor | None]:
        if self.offset is not None:
            return super().attend(call, weighing)
        bias = None if call.bias is None else call.bias / self.temperature
        return fused_softmax(replace(call, scale=call.scale / self.temperature, bias=bias)), None

    def start_at_softmax(self) -> None:
        if self.offset is None:
            super().start_at_softmax()
        else:
            nn.init.zeros_(self.offset)

    def reset_parameters(self) -> None:
        if self.offset is not None:
            nn.init.constant_(self.offset, ELASTIC_START)


class Softpick(Normalizer):
    """relu(e^s − 1) / (Σ|e^s − 1| + ε)."""

    name = "softpick"

    def __init__(self, *, eps: float = SOFTPICK_EPS, **shape: Any) -> None:
        super().__init__(**shape)
        self.eps = eps

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        return softpick_weights(logits, visible, eps=self.eps)


class Sigmoid(Normalizer):
    """σ(s); `scaling` "none", "sum", "count" (over the visible keys) or "log_count" (off the logits)."""

    name = "sigmoid"

    def __init__(self, *, scaling: str = "none", **shape: Any) -> None:
        super().__init__(**shape)
        if scaling not in SIGMOID_SCALES:
            raise unknown("scaling", scaling, SIGMOID_SCALES)
        self.scaling, self.whole = scaling, scaling == "sum"
        self._warned = False

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        if self.scaling == "none" and logits.shape[-1] > LONG and not self._warned:
            self._warned = True
            log.warning(
                "Sigmoid weights over %d keys: a row sums to as much as that, and outputs grow with the length. "
                "scaling='count' or 'log_count' keeps them level.",
                logits.shape[-1],
            )
        return sigmoid_weights(logits, visible, scaling=self.scaling)


class Elu(Normalizer):
    """elu(s) + 1, or divided by its sum (`normalise`)."""

    name = "elu"

    def __init__(self, *, normalise: bool = False, **shape: Any) -> None:
        super().__init__(**shape)
        self.normalise = self.whole = normalise

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        return elu_weights(logits, visible, normalise=self.normalise)


class _Kernel(Normalizer):
    """φ(q)·φ(k)/√d, or divided by the size of the row (`normalise`)."""

    kernel: ClassVar[str]
    reads_logits = False

    def __init__(self, *, normalise: bool = False, **shape: Any) -> None:
        super().__init__(**shape)
        self.normalise = normalise
        self.signed = self.kernel != "elu"
        self.whole = normalise and not self.signed

    def maps(self) -> tuple[Tensor, Tensor] | None:
        return None

    def forward(self, logits: Tensor, visible: Tensor, *, query: Tensor, key: Tensor, **_: Any) -> Tensor:
        options: dict[str, Any] = {"kernel": self.kernel, "normalise": self.normalise, "maps": self.maps()}
        return kernel_weights(query, key, visible, scale=self.scale, **options).to(logits.dtype)


class KernelElu(_Kernel):
    """(elu(q) + 1)·(elu(k) + 1)/√d."""

    name, kernel = "kernel_elu", "elu"


class KernelIdentity(_Kernel):
    """s itself: linear attention without a feature map."""

    name, kernel = "kernel_identity", "identity"
    reads_logits = True

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        weights = torch.where(visible, logits, 0.0)
        return divided(weights, signed=True) if self.normalise else weights


class KernelMlp(_Kernel):
    """φ(x) = W₂ relu(W₁x), one pair of matrices per layer for queries and keys of all heads."""

    name, kernel = "kernel_mlp", "mlp"

    def __init__(self, *, normalise: bool = False, **shape: Any) -> None:
        super().__init__(normalise=normalise, **shape)
        self.first = nn.Linear(self.head_dim, self.head_dim, bias=False)
        self.second = nn.Linear(self.head_dim, self.head_dim, bias=False)

    def maps(self) -> tuple[Tensor, Tensor]:
        return self.first.weight, self.second.weight

    def reset_parameters(self) -> None:
        self.first.reset_parameters()
        self.second.reset_parameters()
