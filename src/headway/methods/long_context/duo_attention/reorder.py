"""Head order: rows of the q, k, v projections and columns of the output projection permuted, so that retrieval heads
come first and both groups are slices.

    W_o · concat_h(out_h) + b  =  W_o P⁻¹ · P concat_h(out_h) + b

The permutation is neutral, so the bias of the output projection, which belongs to no head, stays. Groups that are
slices need no copy of queries and keys at every step; the policy works without it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from headway.errors import HostError
from headway.methods.long_context.duo_attention.gates import check_shape, kv_geometry


@contextmanager
def reordered_heads(
    model: nn.Module, retrieval: Bool[Tensor, "layers kv_heads"]
) -> Iterator[Bool[Tensor, "layers kv_heads"]]:
    """Puts the retrieval heads of every layer first for the length of the block, and back after it.

    Yields the retrieval mask in the new order: pass it as gates with `threshold=0.5`. Raises HostError for attention
    modules without separate q, k, v and o projections."""
    check_shape(retrieval, kv_geometry(model))
    modules = [(m, getattr(m, "layer_idx", None)) for m in model.modules() if hasattr(m, "k_proj")]
    found = {index: module for module, index in modules if isinstance(index, int)}
    if sorted(found) != list(range(retrieval.shape[0])) or not all(_separate(m) for m in found.values()):
        raise HostError(
            f"{type(model).__name__}: got attention without q_proj, k_proj, v_proj and o_proj in every layer, expected "
            "separate projections. DuoAttention works without reordering."
        )
    orders = {index: torch.argsort(~retrieval[index], stable=True) for index in found}
    done: list[int] = []
    try:
        for index, order in orders.items():
            _permute(found[index], order)
            done.append(index)
        yield torch.stack([retrieval[index][orders[index]] for index in sorted(orders)])
    finally:
        for index in done:
            _permute(found[index], torch.argsort(orders[index]))


def _separate(module: Any) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in ("q_proj", "k_proj", "v_proj", "o_proj"))


@torch.no_grad()
def _permute(module: Any, order: Int[Tensor, " kv_heads"]) -> None:
    """KV heads, with their query heads, in the given order."""
    kv_heads = order.numel()
    for name in ("q_proj", "k_proj", "v_proj"):
        for tensor in (getattr(module, name).weight, getattr(module, name).bias):
            if tensor is not None:
                rows = tensor.unflatten(0, (kv_heads, -1))
                tensor.copy_(rows[order.to(tensor.device)].flatten(0, 1))
    weight = module.o_proj.weight
    weight.copy_(weight.unflatten(1, (kv_heads, -1))[:, order.to(weight.device)].flatten(1, 2))
    sinks = getattr(module, "sinks", None)
    if isinstance(sinks, Tensor):
        sinks.copy_(sinks.unflatten(0, (kv_heads, -1))[order.to(sinks.device)].flatten(0, 1))
