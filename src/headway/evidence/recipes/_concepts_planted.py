"""Encoders built so that one head writes what is known: directions of one concept, or mixtures of all.

A head of the last layer gets the output weights that send its h-th number along a given direction of the joint space:

    P · diag(γ) · W_O = D   at the columns of the head,   W_O = (P · diag(γ))⁺ D

so what it writes into an embedding lies in the span of D, up to its share of the LayerNorm's mean."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headway.methods.diagnosis.clip_ccs import HeadConcept, TextBank, describe, gather, score, tiny, tower

#: Directions that are kept of each concept: its texts hardly differ in more.
KEPT = 6


def concept_directions(bank: TextBank, concept: str, *, kept: int = KEPT) -> Float[Tensor, "kept joint"]:
    """Orthonormal directions in which the texts of one concept differ most from each other."""
    rows = bank.vectors[[bank.concepts[text] == concept for text in bank.texts]].double()  # type: ignore[index]
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:kept]


def mixed_directions(
    bank: TextBank, concepts: Sequence[str], generator: torch.Generator, *, kept: int = KEPT
) -> Float[Tensor, "kept joint"]:
    """Directions each of which is the sum of one random direction of every concept."""
    total = torch.zeros(kept, bank.vectors.shape[1], dtype=torch.float64)
    for concept in concepts:
        basis = concept_directions(bank, concept)
        drawn = torch.randn(kept, basis.shape[0], generator=generator, dtype=torch.float64)
        total += drawn / drawn.norm(dim=-1, keepdim=True) @ basis
    return total


def writing(model: Any, place: tuple[int, int], directions: Float[Tensor, "kept joint"]) -> Any:
    """A copy of the model in which a head writes along `directions` alone, repeated over its dimensions."""
    built = copy.deepcopy(model)
    part = tower(built)
    layer, head = place
    size = part.head_dim
    reach = part.projection.weight.double() * part.norm.weight.double()  # type: ignore[union-attr]
    wanted = directions[[i % directions.shape[0] for i in range(size)]].double()
    with torch.no_grad():
        weight = torch.linalg.pinv(reach) @ wanted.T
        part.outputs[layer].weight[:, head * size : (head + 1) * size] = weight.to(part.outputs[layer].weight.dtype)
    return built


def confine(model: Any, bases: Mapping[tuple[int, int], Float[Tensor, "kept joint"]]) -> None:
    """Lets each head write, in place, inside the span of its orthonormal directions alone: what it wrote outside of
    them is taken off its output weights,

        W_O ← (P · diag(γ))⁺ Dᵀ D · P · diag(γ) · W_O   at the columns of the head."""
    part = tower(model)
    size = part.head_dim
    reach = part.projection.weight.double() * part.norm.weight.double()  # type: ignore[union-attr]
    back = torch.linalg.pinv(reach)
    with torch.no_grad():
        for (layer, head), basis in bases.items():
            columns = part.outputs[layer].weight[:, head * size : (head + 1) * size]
            inside = basis.T.double() @ (basis.double() @ (reach @ columns.double()))
            columns.copy_((back @ inside).to(columns.dtype))


def specialised(
    trained: Any, bank: TextBank, concepts: Sequence[str], *, layer: int, steps: int, rate: float, seed: int
) -> Any:
    """A copy of a trained model whose first heads of a layer write of one concept each, and which was trained on under
    that bound for so many steps. The text tower, the last norm and the projection stay as they were, so the bank is
    still that of the model."""
    built = copy.deepcopy(trained)
    bases = {(layer, head): concept_directions(bank, concept) for head, concept in enumerate(concepts)}
    confine(built, bases)
    for name, parameter in built.named_parameters():
        moves = name.startswith("vision_model.") and "post_layernorm" not in name
        parameter.requires_grad_(moves)
    tiny.train(built, seed=seed, steps=steps, rate=rate, progress=lambda done, total: confine(built, bases))
    return built


def same_bank(built: Any, bank: TextBank) -> TextBank:
    """The bank of a model whose text tower is that of `built`."""
    return TextBank(bank.texts, bank.vectors, bank.concepts, _made_by(built))


def scored(built: Any, place: tuple[int, int], batches: Sequence[Tensor], bank: TextBank) -> HeadConcept:
    """The score of the built head on pictures. The bank is that of the model before: its text tower is untouched."""
    part = tower(built)
    found = gather(part, batches, layers=[place[0]])
    own = same_bank(built, bank)
    spans = describe(part, found, own)
    return next(row for row in score({place: spans[place]}, own))


def _made_by(model: Any) -> Any:
    from headway.hosts.fingerprint import fingerprint

    return fingerprint(model)
