"""LoRA on chosen layers, through peft, by exact module names.

    W x  →  W x + (α / r) B A x ,      A: r × d_in ,  B: d_out × r ,  B = 0 at the start

Layers are found by where attention runs (the door's sites), not by numbers inside names, and peft is given the full
names: a suffix with a layer index is silently dropped where a model names its layers in another way.

Released settings (Diagnose, Localize, Align, arXiv 2509.23188): r = 8, α = 16, no dropout, on the query, key, value and
output projections of the focal layers; everything else is frozen.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from headway.door import inspect
from headway.errors import ArgumentError, missing_extra, unknown

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 8, 16
#: Layers further apart than this are a typing error.
WIDEST = 10_000


@dataclass(frozen=True)
class Adapted:
    """A model with adapters on some layers: the peft model, the names of the adapted modules, and how many parameters
    are trained."""

    model: Any
    modules: tuple[str, ...]
    trainable: int


def parse_layers(text: str, count: int) -> list[int]:
    """Layers from text such as "19-23,24,25", both ends included. Raises ArgumentError that lists what is valid."""
    valid = f"expected layers within 0..{count - 1}, such as 1-{max(count - 1, 1)} or 0,2"
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:\s*-\s*(\d+))?\s*", part)
        if match is None:
            raise ArgumentError(f"layers: got {text!r}, {valid}. Write single layers and first-last with commas.")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ArgumentError(f"layers: got the reversed range {part.strip()!r}, {valid}. Write {last}-{first}.")
        if last >= count or last - first > WIDEST:
            raise ArgumentError(f"layers: got {part.strip()!r}, {valid}.")
        layers.extend(range(first, last + 1))
    return sorted(set(layers))


def projection_names(
    model: nn.Module, layers: Sequence[int] | str, *, projections: Sequence[str] = PROJECTIONS
) -> tuple[str, ...]:
    """Full names of the projections of self-attention in the given layers.

    Runs one tiny forward to see where attention happens. Raises ArgumentError for layers that are not there, and for a
    layer without any of the projections, naming the linear maps that it has."""
    sites = [row for row in inspect(model).rows if row.kind == "self" and row.allows and row.layer is not None]
    if not sites:
        raise ArgumentError("model: got one without self-attention that the door can see, expected attention layers.")
    known = sorted({row.layer for row in sites if row.layer is not None})
    chosen = parse_layers(layers, max(known) + 1) if isinstance(layers, str) else sorted(set(layers))
    if not chosen:
        raise ArgumentError(f"layers: got none, expected at least one of {known[0]}..{known[-1]}.")
    for layer in chosen:
        if layer not in known:
            raise unknown("layers", layer, known)
    modules = dict(model.named_modules())
    found: list[str] = []
    for row in sites:
        if row.layer not in chosen:
            continue
        here = [f"{row.site}.{name}" for name in projections if f"{row.site}.{name}" in modules]
        if not here:
            raise ArgumentError(
                f"projections: got {', '.join(projections)}, none of which is in {row.site}; it has "
                f"{', '.join(_linear_maps(modules[row.site])) or 'no linear map'}. Name these with projections=."
            )
        found += here
    return tuple(found)


def add_lora(
    model: nn.Module,
    layers: Sequence[int] | str,
    *,
    projections: Sequence[str] = PROJECTIONS,
    rank: int = RANK,
    alpha: float = ALPHA,
    dropout: float = 0.0,
    seed: int = 0,
) -> Adapted:
    """Puts LoRA on the projections of the layers, freezes everything else, and checks that just these are trained.

    `model` is changed in place and stands inside the peft model that is returned. The trained parameters number
    Σ r (d_in + d_out) over the modules."""
    import torch

    if rank < 1:
        raise ArgumentError(f"rank: got {rank}, expected at least 1.")
    if not (math.isfinite(alpha) and alpha > 0) or not 0 <= dropout < 1:
        raise ArgumentError(
            f"alpha, dropout: got {alpha} and {dropout}, expected a number above 0 and a share in [0, 1)."
        )
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise missing_extra("peft", "align", "LoRA") from None
    names = projection_names(model, layers, projections=projections)
    sizes = {name: _sizes(model.get_submodule(name)) for name in names}
    exact = "|".join(re.escape(name) for name in names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(
            model,
            # peft writes whole numbers and takes any: the factor is α / r.
            LoraConfig(r=rank, lora_alpha=_plain(alpha), lora_dropout=dropout, target_modules=exact, bias="none"),
        )
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    expected = sum(rank * (d_in + d_out) for d_in, d_out in sizes.values())
    if trainable != expected:
        raise ArgumentError(
            f"layers: LoRA has {trainable:,} trained parameters, expected {expected:,} for {len(names)} modules. The "
            "model holds adapters already; load it anew."
        )
    return Adapted(adapted, names, trainable)


def _plain(alpha: float) -> Any:
    return int(alpha) if float(alpha).is_integer() else alpha


def _linear_maps(module: nn.Module) -> list[str]:
    return [name for name, inner in module.named_modules() if name and hasattr(inner, "weight") and _is_map(inner)]


def _is_map(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _sizes(module: Any) -> tuple[int, int]:
    """(inputs, outputs) of a linear map."""
    if type(module).__name__ == "Conv1D":
        rows, columns = module.weight.shape
        return int(rows), int(columns)
    return int(module.in_features), int(module.out_features)
