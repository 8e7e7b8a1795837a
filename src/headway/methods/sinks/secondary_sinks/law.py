"""The lifetime law: why the norm of the write decides how long a secondary sink lives.

    stream after creation = r·u + m + Σ_k w_k ,  w_k ⟂ u random with ‖w_k‖ = σ ,  m ⟂ u what was there before
    cos > c  while  ‖m‖² + k·σ² < (r·tan arccos c)²      so      lifetime ≈ ((r·tan arccos c)² − ‖m‖²) / σ²

At c = 0.9 the tangent is 0.484. The law is derived here for the setting of arXiv 2512.22213; the paper states only that
larger norms live longer.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError
from headway.methods.sinks.secondary_sinks.detection import THRESHOLD

#: A simulation may outlive the law by this factor before it is given up.
PATIENCE = 20


def lifetime_law(norm: float, write_norm: float, *, before: float = 0.0, threshold: float = THRESHOLD) -> float:
    """Layers that a sink of norm `norm` stays above `threshold` when each layer writes `write_norm` at a right angle.

    `before` is the norm, at a right angle to the sink's direction, that the stream has at creation. Never negative."""
    _check(write_norm, threshold)
    room = (norm * math.tan(math.acos(threshold))) ** 2 - before**2
    return max(room, 0.0) / write_norm**2


def norm_for_lifetime(
    lifetime: float, write_norm: float, *, before: float = 0.0, threshold: float = THRESHOLD
) -> float:
    """The norm that gives `lifetime`: the inverse of `lifetime_law`."""
    _check(write_norm, threshold)
    return math.sqrt(lifetime * write_norm**2 + before**2) / math.tan(math.acos(threshold))


def simulate_lifetimes(
    norm: float,
    write_norm: float,
    *,
    width: int = 256,
    runs: int = 64,
    threshold: float = THRESHOLD,
    generator: torch.Generator,
) -> Float[Tensor, " runs"]:
    """Lifetimes of `runs` simulated streams that start as norm·u and gain a random write orthogonal to u at each layer.

    The layer of creation counts, as it does in detection."""
    _check(write_norm, threshold)
    orthogonal = torch.zeros(runs, width - 1)
    lifetimes = torch.zeros(runs)
    alive = torch.ones(runs, dtype=torch.bool)
    reach = norm * math.tan(math.acos(threshold))
    for _ in range(PATIENCE * (math.ceil(lifetime_law(norm, write_norm, threshold=threshold)) + 1)):
        alive &= orthogonal.norm(dim=1) < reach
        if not bool(alive.any()):
            break
        lifetimes += alive
        writes = torch.randn(runs, width - 1, generator=generator)
        orthogonal += torch.nn.functional.normalize(writes, dim=1) * write_norm
    return lifetimes


def _check(write_norm: float, threshold: float) -> None:
    if not write_norm > 0:
        raise ArgumentError(
            f"write_norm: got {write_norm}, expected a positive norm: without writes a sink never ends."
        )
    if not 0 < threshold < 1:
        raise ArgumentError(f"threshold: got {threshold}, expected a cosine between 0 and 1, such as {THRESHOLD}.")
