"""Rotary embedding: the hosts' own formulas, relative positions, inverses, energies."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.rope import (
    LAYOUTS,
    as_pairs,
    channel_energies,
    pair_norms,
    periods,
    rope_frequencies,
    rotate,
    unrotate,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_frequencies_start_at_one_and_end_before_one_over_base():
    frequencies = rope_frequencies(128, 1e6)
    assert frequencies[0] == 1
    assert frequencies[-1].item() == pytest.approx(1e6 ** (-126 / 128))


@pytest.mark.parametrize(("base", "pair", "period"), [(1e6, 2, 9.7), (1e6, 3, 12.0), (1e6, 5, 18.5), (1e5, 5, 15.4)])
def test_periods_are_those_of_the_paper(base, pair, period):
    assert float(periods(rope_frequencies(128, base))[pair]) == pytest.approx(period, abs=0.05)


def test_a_pair_that_does_not_turn_has_an_infinite_period():
    assert periods(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([2 * math.pi, math.inf])


def test_rotation_by_a_quarter_circle_swaps_the_two_dimensions_of_a_pair():
    x = torch.tensor([[[1.0, 2.0, 0.0, 0.0]]])
    quarter = torch.tensor([math.pi / 2, 0.0])
    half = rotate(x, torch.tensor([1]), quarter, "half")[0, 0]
    assert torch.allclose(half, torch.tensor([0.0, 2.0, 1.0, 0.0]), atol=1e-6)
    interleaved = rotate(x, torch.tensor([1]), quarter, "interleaved")[0, 0]
    assert torch.allclose(interleaved, torch.tensor([-2.0, 1.0, 0.0, 0.0]), atol=1e-6)


@pytest.mark.parametrize(("host", "layout"), [("llama", "half"), ("cohere", "interleaved")])
def test_rotate_agrees_with_the_formula_of_a_host(host, layout):
    if host == "llama":
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
    else:
        from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb
    x, positions = random(2, 3, 7, 16).float(), torch.arange(7) + 40
    frequencies = rope_frequencies(16, 1e4).float()
    angle = positions[:, None] * frequencies
    spread = torch.cat([angle, angle], -1) if layout == "half" else angle.repeat_interleave(2, -1)
    theirs, _ = apply_rotary_pos_emb(x, x, spread.cos()[None], spread.sin()[None])
    assert torch.allclose(rotate(x, positions, frequencies, layout), theirs, atol=1e-5)


def test_partial_rotary_agrees_with_the_formula_of_a_host():
    from transformers.models.glm.modeling_glm import apply_rotary_pos_emb

    x, positions, frequencies = random(1, 2, 5, 16).float(), torch.arange(5), rope_frequencies(8, 1e4).float()
    angle = positions[:, None] * frequencies
    spread = torch.cat([angle, angle], -1)
    theirs, _ = apply_rotary_pos_emb(x, x, spread.cos()[None], spread.sin()[None])
    assert torch.allclose(rotate(x, positions, frequencies, "interleaved"), theirs, atol=1e-5)


@given(
    pairs=st.integers(1, 8),
    rest=st.integers(0, 5),
    tokens=st.integers(1, 9),
    start=st.integers(0, 5000),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_unrotate_undoes_rotate_and_lengths_stay(pairs, rest, tokens, start, layout, seed):
    x = random(2, 2, tokens, 2 * pairs + rest, seed=seed)
    frequencies = rope_frequencies(2 * pairs, 1e4)
    positions = torch.arange(tokens) + start
    turned = rotate(x, positions, frequencies, layout)
    assert torch.allclose(unrotate(turned, positions, frequencies, layout), x, atol=1e-9)
    assert torch.allclose(pair_norms(turned, pairs, layout), pair_norms(x, pairs, layout), atol=1e-9)
    assert torch.equal(turned[..., 2 * pairs :], x[..., 2 * pairs :])


@given(offset=st.integers(1, 3000), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=20, deadline=None)
def test_logits_depend_on_relative_positions_only(offset, layout):
    query, key, frequencies = random(1, 1, 6, 8), random(1, 1, 6, 8, seed=1), rope_frequencies(8, 1e4)
    here, there = torch.arange(6), torch.arange(6) + offset
    products = [
        rotate(query, at, frequencies, layout) @ rotate(key, at, frequencies, layout).transpose(-1, -2)
        for at in (here, there)
    ]
    assert torch.allclose(*products, atol=1e-9)


@given(first=st.integers(0, 4000), second=st.integers(-4000, 4000), layout=st.sampled_from(LAYOUTS))
@settings(max_examples=20, deadline=None)
def test_turning_on_from_one_place_to_another_is_turning_there_at_once(first, second, layout):
    """R(b − a) R(a) k = R(b) k, by which keys are placed anew in a cache."""
    key, frequencies = random(1, 2, 5, 10), rope_frequencies(8, 1e4)
    at, there = torch.full((5,), first), torch.full((5,), second)
    moved = rotate(rotate(key, at, frequencies, layout), there - at, frequencies, layout)
    assert torch.allclose(moved, rotate(key, there, frequencies, layout), atol=1e-9)


def test_positions_per_batch_row_rotate_each_row_by_its_own():
    x, frequencies = random(2, 3, 4, 8), rope_frequencies(8, 1e4)
    positions = torch.stack([torch.arange(4), torch.arange(4) + 9])
    both = rotate(x, positions, frequencies)
    assert torch.equal(both[1], rotate(x[1:], positions[1], frequencies)[0])


def test_bfloat16_stays_bfloat16_and_rounds_only_at_the_end():
    x = random(1, 1, 300, 8).bfloat16()
    turned = rotate(x, torch.arange(300), rope_frequencies(8, 1e4))
    exact = rotate(x.float(), torch.arange(300), rope_frequencies(8, 1e4))
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, exact.bfloat16())


def test_channel_energies_find_the_pair_that_was_given_the_energy():
    query, key = torch.zeros(1, 2, 5, 8), torch.zeros(1, 1, 5, 8)
    query[..., 1], query[:, 1, :, 6], key[..., 5] = 3.0, 1.0, 2.0
    key[..., 6] = 1.0
    shares = channel_energies(query, key)
    assert shares[0, 0].tolist() == pytest.approx([0, 1, 0, 0])
    assert shares[0, 1].tolist() == pytest.approx([0, 6 / 7, 1 / 7, 0])


def test_channel_energies_equal_the_mean_over_all_pairs_of_tokens():
    query, key = random(1, 2, 5, 8), random(1, 2, 7, 8, seed=1)
    products = (pair_norms(query)[:, :, :, None] * pair_norms(key)[:, :, None]).mean((2, 3))
    assert torch.allclose(channel_energies(query, key), products / products.sum(-1, keepdim=True))


def test_channel_energies_of_a_fully_rotated_head_sum_to_one_and_of_a_partial_one_to_less():
    query, key = random(1, 4, 5, 12), random(1, 2, 5, 12, seed=1)
    assert torch.allclose(channel_energies(query, key).sum(-1), torch.ones(1, 4, dtype=torch.float64))
    assert bool((channel_energies(query, key, 4).sum(-1) < 1).all())


def test_zero_vectors_have_no_energy_and_no_nan():
    assert channel_energies(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4)).tolist() == [[[0.0, 0.0]]]


def test_pairs_of_both_layouts():
    x = torch.arange(6.0)
    assert as_pairs(x, layout="half").tolist() == [[0, 3], [1, 4], [2, 5]]
    assert as_pairs(x, layout="interleaved").tolist() == [[0, 1], [2, 3], [4, 5]]
    assert as_pairs(x, 2, "half").tolist() == [[0, 2], [1, 3]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: rope_frequencies(7), "dim: got 7"),
        (lambda x: rope_frequencies(8, 0), "base: got 0"),
        (lambda x: periods(None), "frequencies: got None"),
        (lambda x: rotate(x, torch.arange(3), None), "frequencies: got None"),
        (lambda x: rotate(x, torch.arange(3), torch.tensor([1.0, math.nan])), "finite"),
        (lambda x: rotate(x, torch.arange(2), rope_frequencies(8)), "positions: got 2 positions for 3 tokens"),
        (lambda x: rotate(x, torch.arange(3), rope_frequencies(16)), "pairs: got 8"),
        (lambda x: rotate(x, torch.arange(3), rope_frequencies(8), "neox"), "layout: got 'neox'"),
        (lambda x: channel_energies(x.repeat(1, 3, 1, 1), x.repeat(1, 2, 1, 1)), "query heads"),
    ],
)
def test_bad_input_names_what_came(call, message):
    with pytest.raises(ArgumentError, match=message):
        call(torch.zeros(1, 1, 3, 8))
