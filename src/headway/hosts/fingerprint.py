"""Which model something was measured on: its shape, and a few of its weights.

Weights are compared to within the rounding of bfloat16, so that one model has one fingerprint in every precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from headway.errors import HostError

#: Parameters that are sampled, and numbers taken from each.
SAMPLED, NUMBERS = 6, 4
#: Relative distance within which two samples are the same number: bfloat16 keeps eight bits.
TOLERANCE = 2**-7


@dataclass(frozen=True)
class Fingerprint:
    """A model type, its sizes (None where the config does not tell) and some of its weights."""

    model_type: str
    layers: int | None
    heads: int | None
    kv_heads: int | None
    width: int | None
    vocabulary: int | None
    weights: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"weights": list(self.weights)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Fingerprint:
        return cls(**{**data, "weights": tuple(data["weights"])})

    def differences(self, other: Fingerprint) -> list[str]:
        """What tells two models apart, as "name: mine, theirs"; empty for one and the same."""
        mine, theirs = self.to_dict(), other.to_dict()
        found = [f"{name}: {mine[name]}, {theirs[name]}" for name in mine if name != "weights"]
        found = [line for line, name in zip(found, mine, strict=False) if mine[name] != theirs[name]]
        scale = max((abs(x) for x in self.weights), default=0.0)
        near = len(self.weights) == len(other.weights) and all(
            abs(a - b) <= TOLERANCE * abs(a) + 1e-6 * scale for a, b in zip(self.weights, other.weights, strict=True)
        )
        return found if near else [*found, "weights: other numbers"]


def fingerprint(model: nn.Module) -> Fingerprint:
    """The fingerprint of a transformers model."""
    config: Any = getattr(model, "config", None)
    text = getattr(config, "text_config", None) or config

    def size(name: str) -> int | None:
        value = getattr(text, name, None)
        return value if isinstance(value, int) else None

    return Fingerprint(
        model_type=str(getattr(config, "model_type", type(model).__name__)),
        layers=size("num_hidden_layers"),
        heads=size("num_attention_heads"),
        kv_heads=size("num_key_value_heads"),
        width=size("hidden_size"),
        vocabulary=size("vocab_size"),
        weights=_sample(model),
    )


def check_fingerprint(stored: Fingerprint, model: nn.Module, what: str) -> None:
    """Raises HostError, naming every difference, when `what` was made on another model."""
    found = stored.differences(fingerprint(model))
    if found:
        raise HostError(
            f"{what}: got one that was made on another model ({'; '.join(found)}), expected one made on this "
            f"{type(model).__name__}. Make it anew on this model."
        )


def _sample(model: nn.Module) -> tuple[float, ...]:
    """Evenly spaced numbers of evenly spaced parameters, in the order of their names."""
    named = sorted((name, p) for name, p in model.named_parameters() if p.is_floating_point() and p.numel() >= NUMBERS)
    chosen = [named[i * (len(named) - 1) // max(SAMPLED - 1, 1)] for i in range(SAMPLED)] if named else []
    numbers = []
    for _, parameter in chosen:
        flat = parameter.detach().flatten()
        at = [i * (flat.numel() - 1) // (NUMBERS - 1) for i in range(NUMBERS)]
        numbers += flat[at].float().tolist()
    return tuple(round(x, 8) for x in numbers)
