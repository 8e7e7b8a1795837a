"""The norm-layer mask: massive dimensions are zero in what the norms give, from the block in which they emerge.

    norm_l(h)_d ← 0      d ∈ D, every norm of the blocks l ≥ l*          l* the first block with a massive output

The stream keeps its massive activations, but no attention and no MLP behind them reads the dimensions D, so that the
first token loses what marks it. Survey: arXiv 2604.10098, where it stands among the mitigations for inference alone. As
a row of zeros in each norm's weight it is free; here it is a hook that can be taken away. That it holds for all tokens
(a norm knows none of them), and that the norm behind the last block is left alone, is our reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.errors import ArgumentError, HostError
from headway.methods.sinks.sink_survey.metrics import MASSIVE_MAGNITUDE, MASSIVE_RATIO, massive_activations
from headway.methods.sinks.sink_survey.registers import block_list


@torch.no_grad()
def massive_dimensions(
    model: nn.Module,
    ids: Int[Tensor, "batch tokens"],
    *,
    magnitude: float = MASSIVE_MAGNITUDE,
    ratio: float = MASSIVE_RATIO,
) -> tuple[int | None, tuple[int, ...]]:
    """The first block whose output holds a massive activation, and the dimensions in which any block's output does;
    (None, ()) where no block's does. Unpadded input."""
    found: list[tuple[int, Tensor]] = []

    def reader(block: int) -> Any:
        def read(module: nn.Module, args: Any, result: Any) -> None:
            h = result if isinstance(result, Tensor) else result[0]
            found.append((block, massive_activations(h, magnitude=magnitude, ratio=ratio).flatten(0, -2).any(0)))

        return read

    hooks = [block.register_forward_hook(reader(number)) for number, block in enumerate(block_list(model))]
    try:
        model(input_ids=ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    massive = [block for block, dimensions in found if bool(dimensions.any())]
    if not massive:
        return None, ()
    together = torch.stack([dimensions for _, dimensions in found]).any(0)
    return min(massive), tuple(together.nonzero()[:, 0].tolist())


@contextmanager
def norm_mask(model: nn.Module, dimensions: Sequence[int], *, start: int = 0) -> Iterator[None]:
    """While the context is open, `dimensions` are zero in the output of every norm of the blocks from `start` on.

    `start, dimensions = massive_dimensions(model, ids)` finds them. Norms of single heads, which are narrower than the
    stream, are left alone. Raises ArgumentError for a block or dimension that is not there, HostError for blocks
    without a norm."""
    blocks = block_list(model)
    if not 0 <= start < len(blocks):
        raise ArgumentError(f"start: got {start}, expected a block in 0..{len(blocks) - 1}.")
    width = _width(model)
    outside = [d for d in dimensions if not 0 <= d < width]
    if outside:
        raise ArgumentError(f"dimensions: got {outside[0]}, expected 0..{width - 1}, the dimensions of the stream.")
    norms = [norm for block in list(blocks)[start:] for norm in _norms(block, width)]
    if not norms:
        raise HostError(f"{type(model).__name__}: got blocks without a norm over {width} dimensions, expected some.")
    columns = list(dimensions)

    def mask(module: nn.Module, args: Any, result: Tensor) -> Tensor:
        if not columns or result.shape[-1] != width:
            return result
        result = result.clone()
        result[..., columns] = 0
        return result

    hooks = [norm.register_forward_hook(mask) for norm in norms]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _width(model: nn.Module) -> int:
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    return int(table.weight.shape[1])


def _norms(block: nn.Module, width: int) -> list[nn.Module]:
    """The norms of a block over the stream: modules by that name whose weight is as wide, or one number, or none."""
    found = []
    for module in block.modules():
        weight = getattr(module, "weight", None)
        fits = weight is None or (isinstance(weight, Tensor) and weight.numel() in (1, width))
        if "norm" in type(module).__name__.lower() and fits:
            found.append(module)
    return found
