"""The rotary frequencies of a host: its own tables, the layout of its pairs, and which of them explain each site."""

from __future__ import annotations

import inspect
import logging
import sys
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.door.attach import observe as attach
from headway.door.call import AttentionCall
from headway.door.example import example_inputs
from headway.door.stages import Observer
from headway.errors import ArgumentError
from headway.kernels.rope import Layout, rotate

log = logging.getLogger(__name__)

#: Model types that turn interleaved pairs without a `rotate_half` that would show it (they multiply complex numbers).
INTERLEAVED_TYPES = frozenset({"llama4", "llama4_text"})
#: Parts of a multimodal host whose rotary embedding is not that of its language model.
OTHER_TOWERS = ("vision", "visual", "audio")
#: Positions by which the example is moved: most pairs turn by a good part of a circle.
SHIFT = 5
#: Relative error up to which a turn counts as explained; bfloat16 hosts reach 0.01.
MISFIT = 0.05


def host_frequencies(model: nn.Module, layer: int | None = None) -> tuple[Float[Tensor, " pairs"] | None, Layout]:
    """The rotary frequencies of a transformers model and the layout of its pairs; None when it has no rotary embedding.

    Frequencies are the host's own `inv_freq`, scaling included. Some hosts use other frequencies in other layers; then
    `layer` is needed. None is also given, with a warning, for heads whose rotated dimensions stand behind others
    (multi-head latent attention)."""
    tables = _tables(model)
    layout = _layout(model)
    if layer is not None and layer in _unrotated_layers(model):
        return None, layout
    if len(tables) < 2:
        return next(iter(tables.values()), None), layout
    kinds = getattr(_config(model), "layer_types", None) or []
    if layer is None or not 0 <= layer < len(kinds):
        raise ArgumentError(
            f"layer: got {layer} for a model with different frequencies per layer type ({', '.join(tables)}), expected "
            f"0 to {len(kinds) - 1}. Ask layer by layer, or use site_frequencies(model)."
        )
    return tables.get(kinds[layer]), layout


def changing_frequencies(model: nn.Module) -> str:
    """The kind of a host's rotary frequencies where they change with the length of what it reads ("dynamic",
    "longrope"); empty where they are fixed."""
    kinds = [getattr(module, "rope_type", "") for module in model.modules()]
    named = [name for kind in kinds for name in (kind.values() if isinstance(kind, dict) else [kind])]
    return next((str(name) for name in named if "dynamic" in str(name) or name == "longrope"), "")


def site_frequencies(model: nn.Module) -> tuple[dict[str, Tensor | None] | Tensor | None, Layout]:
    """The rotary frequencies of every site, tried out on the host, and the layout of the pairs.

    Moving all positions by a constant s leaves a host with rotary positions as it was, except that its queries turn by
    s·θ. So a small example is run at two places, and each site gets the host's frequencies that explain its turn: one
    of several tables, the opposite sense of rotation, or None where nothing turned. Sites that none explains get None
    with a warning. A host without `inv_freq`, or that takes no positions, gets the answer of `host_frequencies`."""
    tables, layout = _tables(model), _layout(model)
    if not tables or "position_ids" not in inspect.signature(type(model).forward).parameters:
        return host_frequencies(model)
    inputs = example_inputs(model)
    positions = torch.arange(inputs["input_ids"].shape[1], device=inputs["input_ids"].device)[None]
    before, after = (_queries(model, inputs | {"position_ids": positions + shift}) for shift in (0, SHIFT))
    candidates = [None, *tables.values(), *(-table for table in tables.values())]
    found: dict[str, Tensor | None] = {}
    for name, query in before.items():
        misfits = [_misfit(query, after[name], frequencies, layout) for frequencies in candidates]
        best = min(range(len(candidates)), key=misfits.__getitem__)
        if misfits[best] > MISFIT:
            log.warning("%s: its rotary positions are not understood; periods are left out there.", name)
            best = 0
        found[name] = candidates[best]
    return found, layout


def _queries(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """The queries of every self-attention site in one forward."""
    reader = _QueryReader()
    with attach(model, reader, selftest=False), torch.no_grad():
        model(**inputs)
    return reader.queries


class _QueryReader(Observer):
    def __init__(self) -> None:
        self.queries: dict[str, Tensor] = {}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.kind == "self":
            self.queries[call.site.name] = call.query.float()


def _misfit(before: Tensor, after: Tensor, frequencies: Tensor | None, layout: Layout) -> float:
    """‖turned − after‖ / ‖before‖ when the queries before are turned by SHIFT positions."""
    if frequencies is not None:
        if 2 * frequencies.numel() > before.shape[-1]:
            return float("inf")
        before = rotate(before, torch.full((before.shape[2],), SHIFT), frequencies, layout)
    return float((before - after).norm() / before.norm())


def _tables(model: nn.Module) -> dict[str, Tensor]:
    """Every `inv_freq` of the language model by layer type ("" where there is one for all)."""
    if getattr(_config(model), "qk_rope_head_dim", None):
        log.warning("%s rotates the last dimensions of its heads; periods are left out.", type(model).__name__)
        return {}
    tables: dict[str, Tensor] = {}
    for path, buffer in model.named_buffers():
        module, _, name = path.rpartition(".")
        ours = name.endswith("inv_freq") and "original" not in name and buffer.ndim == 1
        if ours and not any(tower in module for tower in OTHER_TOWERS):
            tables.setdefault(name.removesuffix("inv_freq").rstrip("_"), buffer.detach())
    distinct: list[Tensor] = []
    for table in tables.values():
        if not any(torch.equal(table, other) for other in distinct):
            distinct.append(table)
    return tables if len(distinct) > 1 else dict(list(tables.items())[:1])


def _layout(model: nn.Module) -> Layout:
    """Tries the host's own `rotate_half` on 0, 1, 2, 3: neighbours swap places when pairs are interleaved."""
    if getattr(_config(model), "model_type", "") in INTERLEAVED_TYPES:
        return "interleaved"
    for module in model.modules():
        turn = getattr(sys.modules.get(type(module).__module__), "rotate_half", None)
        if turn is not None:
            return "interleaved" if turn(torch.arange(4.0)).tolist() == [-1.0, 0.0, -3.0, 2.0] else "half"
    return "half"


def _unrotated_layers(model: nn.Module) -> set[int]:
    """Layers that a host leaves without rotation (SmolLM3, Llama 4), by the flag on its attention modules."""
    return {
        int(module.layer_idx)  # type: ignore[arg-type]
        for module in model.modules()
        if getattr(module, "use_rope", True) in (False, 0) and isinstance(getattr(module, "layer_idx", None), int)
    }


def _config(model: nn.Module) -> object:
    config = getattr(model, "config", None)
    return getattr(config, "text_config", None) or config
