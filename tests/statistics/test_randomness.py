"""Randomness from whole seeds."""

from __future__ import annotations

import torch

from headway.statistics import generator_of, mixed_seed


def draw(*numbers: int) -> tuple[float, ...]:
    return tuple(torch.rand(4, generator=generator_of(*numbers)).tolist())


def test_bits_above_the_32nd_count():
    """A seed given to torch itself is cut there, which is why this exists."""
    cut = [torch.rand(4, generator=torch.Generator().manual_seed(seed)) for seed in (5, (1 << 32) + 5)]
    assert torch.equal(*cut)
    assert len({draw(5), draw((1 << 32) + 5), draw((1 << 62) + 5)}) == 3


def test_streams_of_a_seed_and_seeds_of_a_stream_differ():
    assert len({draw(stream, seed) for stream in range(4) for seed in range(8)}) == 32
    assert draw(1, 2) != draw(2, 1)


def test_the_same_numbers_give_the_same_draws_and_negative_ones_are_taken():
    assert draw(3, 7) == draw(3, 7)
    assert len({mixed_seed(0, n) for n in (-2, -1, 0, 1)}) == 4
