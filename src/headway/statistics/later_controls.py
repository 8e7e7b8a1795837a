"""Random head sets to compare with, for models whose layers have few heads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from headway.errors import ArgumentError

Head = tuple[int, int]


def later_controls(
    chosen: Sequence[Head],
    shape: tuple[int, int],
    generator: np.random.Generator | torch.Generator | int,
    *,
    draws: int = 20,
) -> list[list[Head]]:
    """As many random heads as chosen, none of them chosen, each from the layer of a chosen head or a later one.

    A chosen head is replaced by one of its own layer as long as that has others, then by one of the next layers. Heads
    of earlier layers are never drawn: what they write is what the chosen heads read, so masking them harms these too.
    `shape` is (layers, heads). Raises ArgumentError when the layers from there on do not have enough other heads."""
    layers, heads = shape
    picked = sorted((int(layer), int(head)) for layer, head in chosen)
    if not picked or len(set(picked)) != len(picked) or draws < 1:
        raise ArgumentError(
            f"chosen, draws: got {picked} and {draws}, expected distinct (layer, head) pairs and draws ≥ 1."
        )
    if any(not (0 <= layer < layers and 0 <= head < heads) for layer, head in picked):
        raise ArgumentError(f"chosen: got {picked}, expected layers < {layers} and heads < {heads}.")
    if isinstance(generator, torch.Generator):
        random = np.random.default_rng(int(torch.randint(2**62, (1,), generator=generator)))
    else:
        random = np.random.default_rng(generator)
    return [_draw(picked, layers, heads, random) for _ in range(draws)]


def _draw(picked: list[Head], layers: int, heads: int, random: np.random.Generator) -> list[Head]:
    free = {
        layer: random.permutation([head for head in range(heads) if (layer, head) not in picked]).tolist()
        for layer in range(layers)
    }
    found: list[Head] = []
    missing = 0
    for layer in range(picked[0][0], layers):
        wanted = sum(place == layer for place, _ in picked)
        taken, free[layer] = free[layer][:wanted], free[layer][wanted:]
        found += [(layer, head) for head in taken]
        missing += wanted - len(taken)
    # Heads that their own layer cannot replace come from later layers.
    spare = [(layer, head) for layer in range(picked[0][0] + 1, layers) for head in free[layer]]
    if missing > len(spare):
        raise ArgumentError(
            f"chosen: got {len(picked)} heads from layer {picked[0][0]} on, which has too few others for a control of "
            "its size; choose fewer heads."
        )
    found += [spare[i] for i in random.permutation(len(spare))[:missing]]
    return sorted(found)
