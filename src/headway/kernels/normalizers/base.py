"""What a normaliser is: a module that turns the logits of a layer into weights, found by name.

A `Normalizer` is a `Weighing`: called with logits and what is visible it gives explicit weights. `attend` gives the
output in the fastest form there is: fused where the algebra allows, explicit weights in blocks of rows elsewhere.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.kernels.normalizers.operation import Operation, explicit_attention
from headway.kernels.weighing import Weighing

log = logging.getLogger(__name__)

_NORMALIZERS: dict[str, type[Normalizer]] = {}


class Normalizer(nn.Module):
    """How the logits of a layer become weights. `whole`: rows sum to one. `signed`: weights may be negative.

    `reads_logits` is False where weights come from query and key by another product, so that no bias can be added."""

    name: ClassVar[str] = ""
    fused: ClassVar[bool] = False
    reads_logits: ClassVar[bool] = True
    needs_mass: ClassVar[bool] = False
    needs_value_mean: ClassVar[bool] = False
    whole: bool = False
    signed: bool = False

    def __init__(self, *, width: int, heads: int, kv_heads: int, head_dim: int, scale: float | None = None) -> None:
        super().__init__()
        self.width, self.heads, self.kv_heads, self.head_dim = width, heads, kv_heads, head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.register_load_state_dict_pre_hook(_warn_of_other_weights)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.name:
            _NORMALIZERS[cls.name] = cls

    def forward(
        self,
        logits: Float[Tensor, "batch heads rows keys"],
        visible: Bool[Tensor, "#batch #heads rows keys"],
        *,
        positions: Int[Tensor, " rows"],
        query: Float[Tensor, "batch heads rows dim"],
        key: Float[Tensor, "batch kv_heads keys dim"],
    ) -> Float[Tensor, "batch heads rows keys"]:
        """The weights; exactly zero where not visible."""
        raise NotImplementedError

    def bind(
        self,
        x: Float[Tensor, "batch tokens width"],
        mask: Bool[Tensor, "batch tokens"] | None = None,
        *,
        offset: int = 0,
        length: int | None = None,
    ) -> Weighing:
        """The weighing of one call, whose row 0 stands at key index `offset`. x is the input of the layer, `length` the
        number of keys where the call is the whole sequence (None: a piece of one, or padded or packed)."""
        return self

    def attend(
        self, call: Operation, weighing: Weighing
    ) -> tuple[Float[Tensor, "batch heads queries value_dim"], Float[Tensor, "batch heads queries"] | None]:
        """Σ_j w_ij v_j in its fastest form, and Σ_j w_ij where `needs_mass`."""
        return explicit_attention(call, weighing)

    def finish(self, output: Tensor, mass: Tensor | None) -> Float[Tensor, "batch heads queries value_dim"]:
        """What the layer adds to the weighted sum."""
        return output

    def sinks(self, like: Tensor) -> Float[Tensor, " heads"] | None:
        """Learned sink logits, for those whose weights are a softmax with such sinks."""
        return None

    @property
    def is_softmax(self) -> bool:
        """Whether the weights on keys are the softmax, with or without `sinks`, so that they need no weighing."""
        return False

    def start_at_softmax(self) -> None:
        """Sets the parameters so that the layer does what softmax does; raises ArgumentError where none do."""
        raise ArgumentError(
            f"normalizer: got {self.name!r}, which is softmax for no value of its parameters. Start it fresh "
            "(start='fresh') and train, or choose one that has a softmax limit."
        )

    def reset_parameters(self) -> None:
        """Fresh parameters."""


def _warn_of_other_weights(module: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    own = list(module.state_dict(keep_vars=True))
    if own and not any(prefix + name in state for name in own):
        log.warning(
            "The weights hold nothing for the normaliser %r at %r: they were trained with another one, and the layer "
            "needs training before it means anything. `load_softmax(…, start='softmax')` starts it as softmax.",
            getattr(module, "name", ""),
            prefix.rstrip("."),
        )


def normalizers() -> dict[str, type[Normalizer]]:
    """The classes by name."""
    return dict(_NORMALIZERS)


def make_normalizer(name: str | Sequence[str], **options: Any) -> Normalizer:
    """The normaliser of that name. Raises ArgumentError for two of them, an unknown name or an unknown option."""
    if not isinstance(name, str) or "+" in name:
        names = name.split("+") if isinstance(name, str) else list(name)
        raise ArgumentError(
            f"normalizer: got {len(names)} ({', '.join(map(str, names))}), expected one: each says alone what the "
            "weights of a row sum to. Take one of them; gates may be added to any."
        )
    if name not in _NORMALIZERS:
        raise unknown("normalizer", name, sorted(_NORMALIZERS))
    try:
        return _NORMALIZERS[name](**options)
    except TypeError as error:
        raise ArgumentError(f"normalizer_options: got {sorted(options)} for {name!r}: {error}.") from None
