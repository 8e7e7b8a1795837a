"""Randomness of the planted task: whole seeds, and data apart from starting weights."""

from __future__ import annotations

import torch

from headway.evidence.recipes._affine_toys import ScaledTrigger
from headway.statistics import generator_of
from headway.tasks.trigger_averaging import WEIGHTS, TriggerAttention, data_generators, trigger_batch

SEEDS = (5, (1 << 32) + 5, (1 << 61) + 5)


def test_seeds_that_differ_above_their_32nd_bit_have_their_own_data_and_weights():
    batch, model = trigger_batch(data_generators(SEEDS), 3), TriggerAttention(SEEDS)
    for tensor in (batch.inputs, *model.maps.values(), ScaledTrigger(SEEDS, "affine").scale):
        assert not torch.equal(tensor[0], tensor[1])
        assert not torch.equal(tensor[0], tensor[2])


def test_sequences_are_not_drawn_from_the_stream_of_the_weights():
    """The first draw of a seed's data was once the first draw of its weights."""
    (data,) = data_generators([7])
    weights = generator_of(WEIGHTS, 7)
    assert not torch.equal(torch.rand(8, generator=data), torch.rand(8, generator=weights))


def test_a_seed_is_the_same_alone_and_among_others():
    together, alone = trigger_batch(data_generators(SEEDS), 3), trigger_batch(data_generators(SEEDS[2:]), 3)
    assert torch.equal(together.inputs[2], alone.inputs[0])
    assert torch.equal(TriggerAttention(SEEDS).maps["key"][2], TriggerAttention(SEEDS[2:]).maps["key"][0])
