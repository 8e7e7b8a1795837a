"""Rescaling the write that makes a sink: does its norm decide how much attention the sink gets, and for how long?

    y_t ← r · y_t / ‖y_t‖    for every token t ≥ skip with cos(y_t, y_ref) > 0.98

y is the MLP output of one layer, y_ref a stored output of the primary sink. r = 0 removes the sink, r = ‖y_t‖ changes
nothing. Paper: arXiv 2512.22213 (there positions 0–2 are left out, and r is called the steering threshold, 100).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.methods.sinks.secondary_sinks.detection import stream_cosines, token_norms
from headway.methods.sinks.secondary_sinks.origin import ALIGNED
from headway.methods.sinks.secondary_sinks.structure import check_layer, find_structure, first_tensor

#: Positions at the start of the text that are never touched, from the released code.
SKIPPED = 3


@dataclass
class Rescaled:
    """What an intervention touched: (row, position, norm before) of every token, in the order of the forward passes.
    Empty after a forward when no token's output lay along the reference."""

    touched: list[tuple[int, int, float]] = field(default_factory=list)

    @property
    def positions(self) -> list[int]:
        return sorted({position for _, position, _ in self.touched})

    @property
    def norms(self) -> list[float]:
        return [norm for _, _, norm in self.touched]


@contextmanager
def rescale_writes(
    model: nn.Module,
    layer: int,
    reference: Float[Tensor, " width"],
    norm: float,
    *,
    threshold: float = ALIGNED,
    skip: int = SKIPPED,
) -> Iterator[Rescaled]:
    """While the context is open, the MLP output of `layer` has norm `norm` wherever its cosine with `reference` is
    above `threshold`, except at the first `skip` real tokens of each row.

    Works for whole texts and for decoding with a cache; an MLP that is run outside a forward of the model is left
    alone. Leaving removes the hooks, also after an exception. Raises ArgumentError for a layer the model lacks, a
    negative norm, or a reference of another width or without length."""
    if not norm >= 0:
        raise ArgumentError(f"norm: got {norm}, expected 0 (removes the sink) or a positive norm.")
    if not 0 < threshold < 1:
        raise ArgumentError(f"threshold: got {threshold}, expected a cosine between 0 and 1, such as {ALIGNED}.")
    if reference.ndim != 1 or not float(reference.float().norm()) > 0:
        raise ArgumentError(
            f"reference: got shape {tuple(reference.shape)}, expected one vector with a length: an MLP output of the "
            "primary sink, as in SecondarySinks.references."
        )
    blocks = find_structure(model)
    check_layer(layer, len(blocks))
    record = Rescaled()
    inside: list[Tensor | None] = []
    hooks: list[Any] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inside.append(_positions(args, kwargs))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        inside.pop()

    def rescale(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = first_tensor(output)
        if not inside:
            return output
        if y.shape[-1] != reference.numel():
            raise ArgumentError(
                f"reference: got width {reference.numel()}, expected {y.shape[-1]}, the width of the MLP output at "
                f"layer {layer}."
            )
        positions = _innermost(inside).to(y.device)
        rows = y.reshape(*positions.shape, y.shape[-1])
        chosen = (stream_cosines(rows, reference.to(y.device)) > threshold) & (positions >= skip)
        norms = token_norms(rows.detach())
        for row, column in chosen.nonzero().tolist():
            record.touched.append((row, int(positions[row, column]), float(norms[row, column])))
        factor = torch.where(chosen, norm / norms, torch.ones_like(norms))
        changed = torch.where(chosen[..., None], (rows.float() * factor[..., None]).to(y.dtype), rows).reshape(y.shape)
        return changed if isinstance(output, Tensor) else (changed, *output[1:])

    try:
        for ancestor in _ancestors(model, blocks[layer].name):
            hooks.append(ancestor.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(ancestor.register_forward_hook(leave, always_call=True))
        hooks.append(blocks[layer].mlp.exit.register_forward_hook(rescale))
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _ancestors(model: nn.Module, path: str) -> list[nn.Module]:
    """The modules around a block that may be called in its place: the model, and the decoder inside it."""
    parts = path.split(".")
    around = [model.get_submodule(".".join(parts[:i])) for i in range(len(parts))]
    return [module for module in around if not isinstance(module, nn.ModuleList)]


def _innermost(positions: list[Tensor | None]) -> Int[Tensor, "batch queries"]:
    known = [p for p in positions if p is not None]
    if not known:
        raise ArgumentError("model: got a forward without input_ids or inputs_embeds, expected one of them.")
    return known[-1]


def _positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Int[Tensor, "batch queries"] | None:
    """Index of each query among the real tokens of its row (−1 for padding), from the arguments of a forward."""
    inputs = next((x for x in (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None), None)
    if inputs is None:
        return None
    batch, queries = inputs.shape[:2]
    cache = kwargs.get("past_key_values")
    past = int(cache.get_seq_length()) if cache is not None else 0
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == past + queries:
        return ((mask != 0).long().cumsum(-1) - 1).masked_fill(mask == 0, -1)[:, past:]
    return (torch.arange(queries, device=inputs.device) + past)[None].expand(batch, -1)
