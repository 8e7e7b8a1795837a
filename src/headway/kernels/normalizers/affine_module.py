"""Affine-scaled attention as a normaliser: W_α, the running mean of α, and how both start, change and are stored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.kernels.normalizers.affine import (
    ACTIVATIONS,
    COUNTS,
    DECAY,
    AffineWeighing,
    affine_attention,
    check_decay,
    saturation,
    scale_of,
    updated_average,
)
from headway.kernels.normalizers.base import Normalizer
from headway.kernels.normalizers.operation import Operation
from headway.kernels.weighing import Weighing

log = logging.getLogger(__name__)

STARTS = ("normal", "zeros", "identity")
#: Standard deviation of a fresh W_α.
STD = 0.02
#: Logit at which linear clipping reaches one, from where its gradient is still 0.1.
ONE = 5.0
#: Share of saturated scales from which on a warning is given, and how often training looks.
SATURATED, LOOK_EVERY = 0.9, 50


class AffineScaled(Normalizer):
    """w = α_t P + (ᾱ − α_t)/N at visible keys.

    `count`: N is the visible keys of the row ("visible", default; rows sum to ᾱ) or one number ("length", with which
    the paper's histograms of row sums agree): `length`, or without it the number of keys of a call that is a whole,
    unpadded sequence. `activation`: "clip" or "sigmoid". `mean`: ᾱ per "head" or one for the "layer". `start`: W_α
    "normal", "zeros" (α = 0.5), or "identity" (α = ᾱ = 1, which is softmax). `shift=False` leaves β out.
    `average_start`: ᾱ before the first step; with the paper's 0 the first outputs are mean-centred.
    `update`: "forward" moves ᾱ at every forward in train mode, "never" leaves that to `observe`."""

    name, fused, signed = "affine", True, True
    needs_value_mean = True
    average: Tensor
    offset: Tensor

    def __init__(
        self,
        *,
        count: str = "visible",
        length: int | None = None,
        activation: str = "clip",
        decay: float = DECAY,
        mean: str = "head",
        start: str = "normal",
        average_start: float = 0.0,
        shift: bool = True,
        update: str = "forward",
        **shape: Any,
    ) -> None:
        super().__init__(**shape)
        for argument, got, valid in (
            ("count", count, COUNTS),
            ("activation", activation, ACTIVATIONS),
            ("mean", mean, ("head", "layer")),
            ("start", start, STARTS),
            ("update", update, ("forward", "never")),
        ):
            if got not in valid:
                raise unknown(argument, got, valid)
        check_decay(decay)
        if length is not None and length < 1:
            raise ArgumentError(f"length: got {length}, expected at least 1, or None.")
        if start == "identity":
            _check_identity(activation)
        self.count, self.length, self.activation, self.decay = count, length, activation, decay
        self.start, self.average_start, self.shift, self.update = start, average_start, shift, update
        self.map = nn.Linear(self.width, self.heads, bias=False)
        self.register_buffer("average", torch.zeros(self.heads if mean == "head" else 1, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros(1, dtype=torch.float32))
        self._forwards, self._warned = 0, False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.map.weight, std=STD if self.start == "normal" else 0.0)
        self.average.fill_(1.0 if self.start == "identity" else self.average_start)
        self.offset.fill_(ONE if self.start == "identity" else 0.0)

    def start_at_softmax(self) -> None:
        """α = ᾱ = 1."""
        _check_identity(self.activation)
        nn.init.zeros_(self.map.weight)
        self.average.fill_(1.0)
        self.offset.fill_(ONE)

    def alpha(self, x: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch heads tokens"]:
        """The scales of the tokens, in float32 or better."""
        z = self.map(x)
        z = z if z.dtype == torch.float64 else z.float()
        return scale_of(z + self.offset.to(z.dtype), self.activation).transpose(1, 2)

    @torch.no_grad()
    def observe(
        self, alpha: Float[Tensor, "batch heads tokens"], mask: Bool[Tensor, "batch tokens"] | None = None
    ) -> None:
        """Moves ᾱ towards the mean of α over real tokens, and warns once when nearly all scales are saturated."""
        self.average.copy_(updated_average(self.average, alpha, mask, decay=self.decay))
        self._forwards += 1
        if not self._warned and self._forwards % LOOK_EVERY == 0:
            share = saturation(alpha if mask is None else alpha.transpose(1, 2)[mask])
            if share > SATURATED:
                self._warned = True
                log.warning(
                    "%.0f %% of the scales α are 0 or 1: linear clipping passes no gradient on to them. Lower the "
                    "learning rate, or use activation='sigmoid'.",
                    100 * share,
                )

    def bind(
        self,
        x: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        offset: int = 0,
        length: int | None = None,
    ) -> Weighing:
        alpha = self.alpha(x)
        if self.training and self.update == "forward" and not _recomputing():
            self.observe(alpha, mask)
        average = self.average.clone() if self.shift else None
        return AffineWeighing(alpha, average, offset=offset, length=self._row_count(length))

    def _row_count(self, length: int | None) -> int | None:
        if self.count == "visible":
            return None
        if self.length is None and length is None:
            raise ArgumentError(
                "length: got None with count='length' for a piece of a sequence, or a padded or packed one; expected a "
                "fixed number, or results depend on how the text is cut. Give normalizer_options={'length': tokens of "
                "a training sequence}."
            )
        return self.length if self.length is not None else length

    def forward(self, logits: Tensor, visible: Tensor, **_: Any) -> Tensor:
        raise ArgumentError(
            "weighing: got the affine normaliser itself, expected what `bind(x)` gives: its weights need the scales of "
            "the tokens."
        )

    def attend(self, call: Operation, weighing: Weighing) -> tuple[Tensor, Tensor | None]:
        if not isinstance(weighing, AffineWeighing):
            return super().attend(call, weighing)
        return affine_attention(call, weighing.alpha, weighing.average, length=weighing.length), None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AffineScaled:
        """Moves devices, and keeps ᾱ in float32 when the weights are cast."""
        kept = {name: getattr(self, name) for name in ("average", "offset")}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            now = getattr(self, name)
            if now.dtype != torch.float32:
                setattr(self, name, before.to(now.device, torch.float32))
        return self

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        missing = [name for name in ("average", "offset") if prefix + name not in state]
        if missing:
            raise ArgumentError(
                f"state_dict: got no {prefix}{missing[0]}, expected the running mean of α beside its weights: starting "
                "it at 0 would centre every output on its mean, unseen. Use a complete checkpoint, or load softmax "
                "weights by `load_softmax(…)`."
            )
        super()._load_from_state_dict(state, prefix, *rest)


def _check_identity(activation: str) -> None:
    if activation != "clip":
        raise ArgumentError(
            f"activation: got {activation!r} to start at softmax, expected 'clip': a sigmoid never reaches 1."
        )


def _recomputing() -> bool:
    """Whether this forward runs inside a backward pass: checkpointing repeats it, and its tokens were counted."""
    return torch._C._current_graph_task_id() != -1
