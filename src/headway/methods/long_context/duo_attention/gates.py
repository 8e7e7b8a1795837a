"""Gates: one number per KV head, how they choose retrieval heads, and their file.

    retrieval(ℓ, h)  ⇔  α_{ℓ,h} is among the N − ⌈s·(N − 1)⌉ largest of all N gates        (0 < s < 1)

s is the sparsity, the share of streaming heads; the count is that of the released code's quantile, the order by rank:
equal gates go by layer, then head, where the released code adds noise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door.policy_hosts import require_plain_decoder, text_config
from headway.errors import ArgumentError, HostError, is_number
from headway.files import write_atomically
from headway.hosts.fingerprint import Fingerprint, check_fingerprint, fingerprint

FORMAT = "headway duo-attention gates"
VERSION = 1
#: Rounding of s·(N − 1) that must not count as one head more.
SLACK = 1e-9
SHADES = " ░▒▓█"


@dataclass(frozen=True, eq=False)
class Gates:
    """α of every (layer, KV head), the fingerprint of the model they belong to, and how they were made.

    Learned gates lie in [0, 1]; training-free scores may be any numbers, larger for retrieval."""

    values: Float[Tensor, "layers kv_heads"]
    made_on: Fingerprint
    source: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _matrix(self.values))

    @classmethod
    def of(cls, model: nn.Module, values: Float[Tensor, "layers kv_heads"], **source: Any) -> Gates:
        """Gates of a model. Raises ArgumentError for a matrix of another shape, with both shapes."""
        check_shape(_matrix(values), kv_geometry(model))
        return cls(values, fingerprint(model), source)

    def check(self, model: nn.Module) -> None:
        """Raises ArgumentError for a model of another shape, HostError for other weights, with every difference."""
        check_shape(self.values, kv_geometry(model))
        check_fingerprint(self.made_on, model, "gates")

    def save(self, path: str | Path) -> Path:
        """Writes JSON; the file is never seen half written."""
        content = {
            "format": FORMAT,
            "version": VERSION,
            "made_on": self.made_on.to_dict(),
            "source": dict(self.source),
            "gates": [[round(float(x), 7) for x in row] for row in self.values.tolist()],
        }
        return write_atomically(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Gates:
        """The gates that `save` wrote. Raises ArgumentError for anything else."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArgumentError(f"path: got {path}, expected a file that Gates.save wrote; there is none.") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ArgumentError(f"path: got {path}, which is no JSON ({error}); expected a file of gates.") from None
        if not isinstance(data, dict) or data.get("format") != FORMAT or data.get("version") != VERSION:
            raise ArgumentError(
                f"path: got {path} without format {FORMAT!r} and version {VERSION}, expected a file that Gates.save "
                "wrote."
            )
        try:
            return cls(torch.tensor(data["gates"]), Fingerprint.from_dict(data["made_on"]), data["source"])
        except (KeyError, TypeError, ValueError) as error:
            raise ArgumentError(f"path: got {path} with fields missing or broken ({error!r}).") from None

    def to_text(self) -> str:
        """A heat map: one line per layer, one shade per KV head, dark for 1."""
        clipped = self.values.clamp(0, 1)
        shades = (clipped * (len(SHADES) - 1)).round().int().tolist()
        return "\n".join(f"{layer:3d} {''.join(SHADES[x] for x in row)}" for layer, row in enumerate(shades))


def retrieval_count(heads: int, sparsity: float) -> int:
    """How many of `heads` keep everything: all at sparsity 0, none at 1, N − ⌈s·(N − 1)⌉ between."""
    if not (is_number(sparsity) and 0 <= sparsity <= 1):
        raise ArgumentError(f"sparsity: got {sparsity!r}, expected the share of streaming heads, from 0 to 1.")
    if sparsity in (0, 1):
        return 0 if sparsity else heads
    return heads - math.ceil(sparsity * (heads - 1) - SLACK)


def select_heads(
    gates: Gates | Float[Tensor, "layers kv_heads"],
    *,
    sparsity: float | None = None,
    threshold: float | None = None,
) -> Bool[Tensor, "layers kv_heads"]:
    """True for retrieval heads: those of the highest gates at a sparsity, or with a gate of at least `threshold`.

    Raises ArgumentError unless exactly one of both is given."""
    values = _matrix(gates.values if isinstance(gates, Gates) else gates)
    if (sparsity is None) == (threshold is None):
        got = "neither" if sparsity is None else "both"
        raise ArgumentError(f"sparsity, threshold: got {got}, expected one of them. Pass sparsity=0.5, say.")
    if threshold is not None:
        if not is_number(threshold):
            raise ArgumentError(f"threshold: got {threshold!r}, expected a number such as 0.5.")
        return values >= threshold
    assert sparsity is not None
    return top_heads(values, retrieval_count(values.numel(), sparsity))


def top_heads(values: Float[Tensor, "layers kv_heads"], count: int) -> Bool[Tensor, "layers kv_heads"]:
    """True for the `count` heads of the highest gates; equal ones in the order of layers and heads."""
    best = values.flatten().argsort(descending=True, stable=True)[:count]
    chosen = torch.zeros(values.numel(), dtype=torch.bool)
    chosen[best] = True
    return chosen.view(values.shape)


def kv_geometry(model: nn.Module) -> tuple[int, int]:
    """(layers, KV heads) of a decoder. Raises HostError for hosts whose caches do not hold keys per head and layer."""
    require_plain_decoder(model)
    config, name = text_config(model), type(model).__name__
    if getattr(config, "kv_lora_rank", None):
        raise HostError(f"{name}: got multi-head latent attention, expected keys and values per KV head.")
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    if kinds - {"full_attention", "sliding_attention"}:
        raise HostError(f"{name}: got layers of kind {', '.join(sorted(kinds))}, expected full or sliding attention.")
    layers = getattr(config, "num_hidden_layers", None)
    kv_heads = next(
        (x for n in ("num_key_value_heads", "num_kv_heads", "num_attention_heads") if (x := getattr(config, n, None))),
        None,
    )
    if getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False):
        kv_heads = 1
    if not isinstance(layers, int) or not isinstance(kv_heads, int):
        raise HostError(
            f"{name}: got {layers} layers and {kv_heads} KV heads in its config, expected one number of each."
        )
    return layers, kv_heads


def check_shape(values: Tensor, expected: tuple[int, int]) -> None:
    """Raises ArgumentError with both shapes."""
    if tuple(values.shape) != expected:
        raise ArgumentError(
            f"gates: got shape {tuple(values.shape)}, expected {expected}, one number per (layer, KV head). Learn them "
            "on this model."
        )


def _matrix(values: Tensor | Sequence[Sequence[float]]) -> Float[Tensor, "layers kv_heads"]:
    matrix = torch.as_tensor(values).detach().float().cpu()
    if matrix.ndim != 2 or not matrix.numel() or not bool(torch.isfinite(matrix).all()):
        raise ArgumentError(f"gates: got shape {tuple(matrix.shape)}, expected finite numbers (layers, KV heads).")
    return matrix
