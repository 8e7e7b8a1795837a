"""MaxSkew of retrieval: how far the pictures that a neutral prompt finds differ from those there are.

    skew_a = ln( (c_a / k) / (N_a / N) ),     MaxSkew = max_a skew_a,     MinSkew = min_a skew_a

c_a of the k best pictures and N_a of all N have the attribute value a. An empty group counts as half a picture: its
share is 1 / (2k). The released code differs in four ways that are defects, not options: it sums MaxSkew over prompts
(so values grow with their number), leaves out values with c_a = 0 (so MinSkew is wrong), counts the population by order
of appearance but reads it by label, and makes its groups as copies of one list. Here the mean over prompts is reported
with a bootstrap interval, and groups are counted by label.

Paper: Pruning the Paradox, arXiv 2503.11103, section 5; MaxSkew from arXiv 1905.01989.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.errors import ArgumentError
from headway.statistics import Measurement, bootstrap

TOP = 10


@dataclass(frozen=True)
class Skew:
    """One prompt: the skew of each group, in nats, and what it was counted from."""

    prompt: str
    by_group: dict[str, float]
    counts: dict[str, int]
    top: int

    @property
    def largest(self) -> float:
        return max(self.by_group.values())

    @property
    def smallest(self) -> float:
        return min(self.by_group.values())


def groups_of(labels: Sequence[str]) -> dict[str, list[int]]:
    """The positions of each group's items; every group is a list of its own."""
    found: dict[str, list[int]] = {}
    for place, label in enumerate(labels):
        found.setdefault(str(label), []).append(place)
    return dict(sorted(found.items()))


def skew(top: Int[Tensor, " top"], groups: Mapping[str, Sequence[int]], *, prompt: str = "") -> Skew:
    """The skew of one retrieved list. `top` are the positions of the retrieved items, `groups` those of every item."""
    sizes = {name: len(set(members)) for name, members in groups.items()}
    total, k = sum(sizes.values()), int(top.numel())
    if len(sizes) < 2 or min(sizes.values()) < 1:
        raise ArgumentError(f"groups: got sizes {sizes}, expected two or more groups with at least one item each.")
    owner = {place: name for name, members in groups.items() for place in members}
    if len(owner) != total:
        raise ArgumentError("groups: got an item in two groups, expected each in one.")
    picked = [int(place) for place in top]
    if not 1 <= k <= total or len(set(picked)) != k or any(place not in owner for place in picked):
        raise ArgumentError(f"top: got {k} retrieved items of {total}, expected distinct ones that are in the groups.")
    counts = {name: sum(owner[place] == name for place in picked) for name in groups}
    return Skew(
        prompt,
        {name: float(np.log(max(counts[name] / k, 1 / (2 * k)) / (sizes[name] / total))) for name in groups},
        counts,
        k,
    )


def retrieval_skews(
    images: Float[Tensor, "images joint"],
    prompts: Mapping[str, Float[Tensor, " joint"]],
    groups: Mapping[str, Sequence[int]],
    *,
    top: int = TOP,
) -> list[Skew]:
    """The skew of the `top` images nearest to each prompt."""
    if not prompts:
        raise ArgumentError("prompts: got none, expected at least one neutral prompt.")
    if not 1 <= top <= images.shape[0]:
        raise ArgumentError(f"top: got {top}, expected 1 to {images.shape[0]}, the number of images.")
    return [
        skew((images.float() @ vector.float()).topk(top).indices, groups, prompt=name)
        for name, vector in prompts.items()
    ]


def chance_skew(
    groups: Mapping[str, Sequence[int]], top: int, *, generator: np.random.Generator, draws: int = 1000
) -> float:
    """The mean MaxSkew of lists of `top` items that are drawn blindly, in nats. Short lists from many groups are skewed
    without any bias: the largest of several noisy shares is above its own."""
    owners = np.array([name for name, members in groups.items() for _ in members])
    names, sizes = np.unique(owners, return_counts=True)
    if not 1 <= top <= len(owners) or len(names) < 2:
        raise ArgumentError(f"top: got {top} of {len(owners)} items in {len(names)} groups, expected 1 ≤ top ≤ items.")
    counts = generator.multivariate_hypergeometric(sizes, top, size=draws)
    shares = np.maximum(counts / top, 1 / (2 * top)) / (sizes / len(owners))
    return float(np.log(shares).max(1).mean())


def mean_max_skew(skews: Sequence[Skew], *, generator: np.random.Generator | torch.Generator) -> Measurement:
    """The mean MaxSkew over prompts, in nats, with its bootstrap interval."""
    return bootstrap([found.largest for found in skews], generator=generator, unit="nats")
