"""Planted heads of the TAPPA recipe: queries and keys whose class is known because they were built for it."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import unknown
from headway.kernels.rope import rope_frequencies, rotate


def planted_head(
    kind: str,
    generator: torch.Generator,
    *,
    tokens: int = 384,
    dim: int = 64,
    base: float = 1e4,
    noise: float = 0.1,
) -> tuple[Float[Tensor, "tokens dim"], Float[Tensor, "tokens dim"]]:
    """Query and key before RoPE (half layout) of a head whose pattern is known; RoPE with `base` completes it.

    retrieval: fresh directions at every step. re-access: one constant query, a few aligned keys, in pairs too slow to
    turn. sequential: equal energy in many pairs, peak at a fixed distance. periodic: nearly all energy in one pair.
    seasonal: random codes that repeat, in slow pairs. mixed: constant queries, keys too short to matter. `noise` is the
    length of what is added to every query and key, as a fraction of the length of the planted vector."""
    planters = {
        "retrieval": _plant_retrieval,
        "re-access": _plant_reaccess,
        "sequential": _plant_sequential,
        "periodic": _plant_periodic,
        "seasonal": _plant_seasonal,
        "mixed": _plant_mixed,
    }
    if kind not in planters:
        raise unknown("kind", kind, planters)
    query, key, logit = planters[kind](generator, tokens, dim, base)
    gain = (logit * dim**0.5) ** 0.5
    fuzzy = [gain * (x + noise * noise_vectors(generator, tokens, dim)) for x in (query, key)]
    return fuzzy[0], fuzzy[1]


#: Query and key, and the scaled logit of unit vectors that agree.
Plant = tuple[Tensor, Tensor, float]


def _plant_retrieval(generator: torch.Generator, tokens: int, dim: int, base: float) -> Plant:
    """Every row attends to a handful of random keys: the logits have a standard deviation of 25 / √dim."""
    return noise_vectors(generator, tokens, dim), noise_vectors(generator, tokens, dim), 25.0


def _plant_reaccess(generator: torch.Generator, tokens: int, dim: int, base: float) -> Plant:
    """A logit of 8 at key 0 and two more keys, about 0 elsewhere."""
    direction = _slow(torch.randn(dim, generator=generator))
    key = torch.zeros(tokens, dim)
    later = torch.randint(1, tokens // 8, (2,), generator=generator)
    key[torch.cat([torch.zeros(1, dtype=torch.long), later])] = direction
    return direction.expand(tokens, dim), key, 8.0


def _plant_sequential(generator: torch.Generator, tokens: int, dim: int, base: float) -> Plant:
    """A logit of 16 at one distance from 0 to 4, falling off on both sides; no pair dominates."""
    distance = int(torch.randint(0, 5, (1,), generator=generator))
    query = of_pairs(torch.arange(dim // 3), angles(generator, dim), dim).expand(tokens, dim)
    key = rotate(query[None], torch.full((tokens,), distance), rope_frequencies(dim, base))[0]
    return query, key, 16.0


def _plant_periodic(generator: torch.Generator, tokens: int, dim: int, base: float) -> Plant:
    """A logit of 5·cos(θ·distance + phase) in one pair with a period of 8 to 36 tokens (dim 64, base 1e4)."""
    pair = torch.randint(1, 7, (1,), generator=generator)
    query = of_pairs(pair, angles(generator, dim), dim).expand(tokens, dim)
    return query, of_pairs(pair, angles(generator, dim), dim).expand(tokens, dim), 5.0


def _plant_seasonal(generator: torch.Generator, tokens: int, dim: int, base: float) -> Plant:
    """Queries and keys repeat every 12 to 40 tokens; a phase attends to another phase, in random order."""
    period = int(torch.randint(12, 41, (1,), generator=generator))
    codes = _slow(torch.randn(period, dim, generator=generator))
    phase = torch.arange(tokens) % period
    partner = torch.randperm(period, generator=generator)
    return codes[partner[phase]], codes[phase], 10.0


def _plant_mixed(generator: torch.Generator, tokens: int, dim: int, base: float) -> Plant:
    """Attention close to uniform, whatever the queries say."""
    query = torch.nn.functional.normalize(torch.randn(dim, generator=generator), dim=-1)
    return query.expand(tokens, dim), torch.zeros(tokens, dim), 1.0


def noise_vectors(generator: torch.Generator, tokens: int, dim: int) -> Tensor:
    """Random vectors of length about 1."""
    return torch.randn(tokens, dim, generator=generator) / dim**0.5


def angles(generator: torch.Generator, dim: int) -> Tensor:
    return 2 * torch.pi * torch.rand(dim // 2, generator=generator)


def of_pairs(pairs: Tensor, angles: Tensor, dim: int) -> Float[Tensor, " dim"]:
    """A unit vector with equal energy in the given pairs (half layout), each at its angle."""
    length = torch.zeros(dim // 2).index_fill(0, pairs, 1.0)
    vector = torch.cat([length * angles.cos(), length * angles.sin()])
    return vector / vector.norm()


def _slow(x: Tensor) -> Tensor:
    """Only the slowest quarter of the pairs, which hardly turn within the sequence; unit length."""
    half = x.shape[-1] // 2
    kept = torch.arange(half) >= half - half // 4
    return torch.nn.functional.normalize(x * torch.cat([kept, kept]), dim=-1)
