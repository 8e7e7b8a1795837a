"""Soft pruning: heads silenced at the door, beside equally many others.

    o_h ← g · o_h at the input of the output projection, g = 0; the projection's bias stays

which is what the released code reaches by zeroing a head's columns of `out_proj` (its query rows, which it zeroes too,
then no longer matter). Controls are equally many heads of the same layers, none of them of the pruned class: the
released code draws one list for "random", in one case from all layers, while its high heads lie in the last four.

Paper: Pruning the Paradox, arXiv 2503.11103, section 4.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door import use
from headway.door.attach import Handle
from headway.errors import ArgumentError
from headway.methods.diagnosis.clip_ccs.towers import Tower, TowerGate

Head = tuple[int, int]
#: Random draws of a control, as in the paper.
DRAWS = 5


def pruned(part: Tower, heads: Iterable[Head], *, gate: float = 0.0) -> Handle:
    """A scope in which heads of a tower are multiplied by `gate`; 1 is the identity.

    Raises ArgumentError for a layer or head that does not exist. Warns where all heads of a layer are silenced: the
    layer then writes its bias alone."""
    pairs = part.check_heads(heads)
    if not pairs:
        raise ArgumentError("heads: got none, expected at least one (layer, head) to prune.")
    if gate == 0:
        for layer in sorted({layer for layer, _ in pairs}):
            if sum(other == layer for other, _ in pairs) == part.heads:
                warnings.warn(
                    f"all {part.heads} heads of layer {layer} of the {part.kind} tower are pruned: its attention "
                    "writes a constant.",
                    stacklevel=2,
                )
    return use(part.model, TowerGate(part=part, gates={pair: float(gate) for pair in pairs}), sites=part.sites)


def equal_count(high: Sequence[Head], low: Sequence[Head], generator: torch.Generator) -> tuple[list[Head], list[Head]]:
    """Random subsets of both classes of the size of the smaller one."""
    size = min(len(high), len(low))
    if size == 0:
        raise ArgumentError(f"high, low: got {len(high)} and {len(low)} heads, expected at least one of each.")

    def some(heads: Sequence[Head]) -> list[Head]:
        return sorted(heads[i] for i in torch.randperm(len(heads), generator=generator)[:size].tolist())

    return some(high), some(low)


def layer_matched(
    chosen: Sequence[Head], others: Sequence[Head], generator: torch.Generator, *, draws: int = DRAWS
) -> list[tuple[list[Head], list[Head]]]:
    """`draws` pairs of random sets, one of `chosen` heads and one of `others`, with equally many heads in every layer:
    as many as the class that has fewer there. Where `others` has enough, the first set is all of `chosen`.

    Raises ArgumentError where the classes share a head, and where no layer holds heads of both."""
    shared = sorted(set(chosen) & set(others))
    if shared:
        raise ArgumentError(f"chosen, others: got {shared[0]} in both, expected each head in one of them.")
    layers = sorted({layer for layer, _ in chosen} & {layer for layer, _ in others})
    if not layers:
        raise ArgumentError(
            f"chosen, others: got {len(chosen)} and {len(others)} heads that share no layer, expected a layer with "
            "heads of both, so that they can be compared at equal count."
        )

    def some(heads: Sequence[Head], layer: int, count: int) -> list[Head]:
        pool = sorted(head for head in heads if head[0] == layer)
        return [pool[i] for i in torch.randperm(len(pool), generator=generator)[:count].tolist()]

    counts = {layer: min(sum(h[0] == layer for h in chosen), sum(h[0] == layer for h in others)) for layer in layers}
    return [
        (
            sorted(head for layer in layers for head in some(chosen, layer, counts[layer])),
            sorted(head for layer in layers for head in some(others, layer, counts[layer])),
        )
        for _ in range(draws)
    ]


def class_vectors(part: Tower, prompts: Mapping[str, Any]) -> Float[Tensor, "classes joint"]:
    """One unit vector per class: the mean of its prompts' unit embeddings. `prompts` maps a class to the tokenised
    prompts (`{"input_ids": …, "attention_mask": …}`)."""
    means = []
    with torch.no_grad():
        for given in prompts.values():
            vectors = torch.nn.functional.normalize(part.embed(given).float(), dim=-1)
            means.append(torch.nn.functional.normalize(vectors.mean(0), dim=-1))
    return torch.stack(means)


def right(
    images: Float[Tensor, "images joint"], classes: Float[Tensor, "classes joint"], labels: Int[Tensor, " images"]
) -> Bool[Tensor, " images"]:
    """Whether each image is nearest to the vector of its class."""
    if labels.shape[0] != images.shape[0] or bool((labels < 0).any()) or bool((labels >= classes.shape[0]).any()):
        raise ArgumentError(
            f"labels: got {labels.shape[0]} of {images.shape[0]} images in [{int(labels.min())}, {int(labels.max())}], "
            f"expected one per image in 0..{classes.shape[0] - 1}."
        )
    return (images.float() @ classes.T).argmax(-1) == labels
