"""How Headway's own modules pass the door: a child module that asks an attention registry, as hosts do.

A mixer whose output is Σ_j w_ij v_j hands its query, key and value to `Attend` together with the function that makes
the output in its fastest form. With nothing attached that function runs and nothing else does; inside a scope the door
sees an ordinary `AttentionCall`, whose `weighing` says how its logits become weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door.adapter import PREFIX, DoorName
from headway.door.attach import pass_by
from headway.kernels.weighing import Weighing

IMPLEMENTATION = "headway"


class _Config:
    """Holds the implementation name, which an open door replaces."""

    def __init__(self) -> None:
        self._attn_implementation_internal: str = IMPLEMENTATION

    @property
    def _attn_implementation(self) -> str:
        return self._attn_implementation_internal


class _Registry:
    """Finds the door's function for the name of an open door, the module's own one for every other."""

    def __contains__(self, name: object) -> bool:
        return True

    def __getitem__(self, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
        return own_attention

    def get_interface(self, name: str, default: Any = None) -> Callable[..., tuple[Tensor, Tensor | None]]:
        if isinstance(name, DoorName):
            from transformers import modeling_utils

            return modeling_utils.ALL_ATTENTION_FUNCTIONS[PREFIX + str.__str__(name)]
        return own_attention


ALL_ATTENTION_FUNCTIONS = _Registry()


def own_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    native: Callable[[], Tensor],
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """What runs with nothing attached: the module's own form."""
    return native().transpose(1, 2), None


class Attend(nn.Module):
    """The place of one attention operation in a module of ours.

    `weighing` is None for the softmax. `text_dim` is the size of heads where queries are wider, since keys in front of
    the text have channels of their own. `causal` is said of square calls without `visible`, whose rows see the keys up
    to their own; a single row without `visible` sees everything."""

    is_causal = False

    def __init__(
        self,
        *,
        layer: int = 0,
        scale: float = 1.0,
        causal: bool = True,
        weighing: Weighing | None = None,
        text_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.text_dim = text_dim
        self.layer_idx, self.scaling, self.causal, self.weighing = layer, scale, causal, weighing
        self.config = _Config()

    @property
    def watched(self) -> bool:
        """Whether a scope is open, so that calls meet its stages."""
        return isinstance(self.config._attn_implementation, DoorName)

    def skip(self) -> None:
        """Says that a call runs past the door, as its earlier keys are sums in a state by now and have no weights.

        The reports of open scopes tell so. Raises InterceptionError where a method was to act on the call."""
        if self.watched:
            pass_by(self)

    def forward(
        self,
        query: Float[Tensor, "batch heads queries dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
        value: Float[Tensor, "batch value_heads keys value_dim"],
        *,
        native: Callable[[], Float[Tensor, "batch heads queries value_dim"]],
        visible: Bool[Tensor, "#batch #heads queries keys"] | None = None,
        bias: Float[Tensor, "#batch #heads #queries keys"] | None = None,
        sinks: Float[Tensor, " heads"] | None = None,
        weighing: Weighing | None = None,
        front: int = 0,
        piece: tuple[int, int] | None = None,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        """The output. `bias` is added to the scaled logits, `sinks` are learned sink logits, `weighing` replaces that
        of the module for this call (one that holds parameters of the call).

        `front` keys stand before those of the text (softmax only). `piece` is (first row, rows of the whole text) of a
        module that reads one text in several calls; 0 rows say that it cannot tell."""
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation)
        if function is own_attention:
            return native()
        square = self.causal and visible is None and query.shape[2] == key.shape[2]
        output, _ = function(
            self,
            query,
            *matched_heads(key, value),
            visible,
            scaling=self.scaling,
            is_causal=square,
            position_bias=bias,
            s_aux=sinks,
            weighing=self.weighing if weighing is None else weighing,
            front=front,
            piece=piece,
            native=native,
        )
        return output.transpose(1, 2)


def matched_heads(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the least number of heads that the heads of either divide: never stored."""
    heads = math.lcm(key.shape[1], value.shape[1])
    key, value = (x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1) for x in (key, value))
    return key, value
