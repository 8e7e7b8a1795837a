"""Randomness from whole seeds, and from several numbers at once."""

from __future__ import annotations

import numpy as np
import torch

_WORD = 0xFFFFFFFFFFFFFFFF


def mixed_seed(*numbers: int) -> int:
    """A seed of 32 bits in which every bit of every number counts, and their order (numpy's `SeedSequence`).

    torch's generator on the CPU reads the low 32 bits of a seed alone: two seeds that differ above them, or a stream
    told apart by a bit up there, would give the same numbers. Negative numbers count by their two's complement."""
    words = [int(number) & _WORD for number in numbers]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


def generator_of(*numbers: int) -> torch.Generator:
    """A torch generator on the CPU that depends on all the numbers given: a stream and a seed, a seed and a step."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))
