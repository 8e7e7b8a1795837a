"""The detection metrics of the survey on maps and vectors whose values are known exactly."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from headway.errors import ArgumentError, NumericError
from headway.methods.sinks.sink_survey import (
    CARD,
    cosine_to_mean,
    cumulative_sinks,
    first_token_share,
    infinity_norm,
    kurtosis,
    massive_activations,
    norm_ratio,
    quantisation_error,
    quantise,
    row_entropy,
    top_to_median,
)

TOKENS = 16


def stripe(key: int = 0) -> torch.Tensor:
    weights = torch.zeros(TOKENS, TOKENS)
    weights[torch.arange(TOKENS), torch.arange(TOKENS).clamp(max=key)] = 1.0
    return weights


def uniform() -> torch.Tensor:
    return torch.ones(TOKENS, TOKENS).tril() / torch.arange(1, TOKENS + 1)[:, None]


def test_card_names_the_survey() -> None:
    assert (CARD.slug, CARD.arxiv, CARD.year, CARD.family) == ("sink-survey", "2604.10098", 2026, "sinks")


def test_cumulative_rule_finds_the_stripe_and_only_it() -> None:
    found = cumulative_sinks(stripe().sum(0))
    assert found.nonzero().flatten().tolist() == [0]


def test_cumulative_rule_finds_a_stripe_at_any_key() -> None:
    bidirectional = torch.zeros(TOKENS, TOKENS)
    bidirectional[:, 11] = 1.0
    assert cumulative_sinks(bidirectional.sum(0)).nonzero().flatten().tolist() == [11]


def test_cumulative_rule_finds_nothing_on_a_diagonal() -> None:
    assert not cumulative_sinks(torch.eye(TOKENS).sum(0), threshold=1.5).any()


def test_plain_sums_favour_early_keys_and_visible_counts_correct_it_less_than_half() -> None:
    received = uniform().sum(0)
    counts = torch.arange(TOKENS, 0, -1.0)
    assert cumulative_sinks(received, threshold=3.0).nonzero().flatten().tolist() == [0]
    assert not cumulative_sinks(received, threshold=3.0, visible_counts=counts).any()


def test_a_late_sink_is_only_found_with_visible_counts() -> None:
    weights = torch.eye(TOKENS)
    weights[12:, 12], weights[13:, 13:] = 1.0, 0.0
    weights[:12] = uniform()[:12]
    received, counts = weights.sum(0), torch.arange(TOKENS, 0, -1.0)
    assert not cumulative_sinks(received, threshold=5.0)[12]
    assert cumulative_sinks(received, threshold=5.0, visible_counts=counts)[12]


def test_keys_that_no_query_sees_do_not_lower_the_mean() -> None:
    received = torch.tensor([[3.0, 1.0, 1.0, 0.0, 0.0, 0.0]])
    counts = torch.tensor([[3.0, 3.0, 3.0, 0.0, 0.0, 0.0]])
    assert cumulative_sinks(received, threshold=2.0).tolist()[0][0]
    assert not cumulative_sinks(received, threshold=2.0, visible_counts=counts).any()


def test_threshold_that_no_key_can_reach_is_refused() -> None:
    with pytest.raises(ArgumentError, match=r"threshold: got 1000 for 16 keys, expected .* below 16"):
        cumulative_sinks(stripe().sum(0), threshold=1000)
    with pytest.raises(ArgumentError, match="threshold: got 16"):
        cumulative_sinks(stripe().sum(0), threshold=16)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 2**31))
def test_no_map_ever_reaches_a_threshold_of_its_length(keys: int, seed: int) -> None:
    weights = torch.rand(keys, keys, generator=torch.Generator().manual_seed(seed)).pow(8).tril() + 1e-9
    received = (weights / weights.sum(-1, keepdim=True)).sum(0)
    assert bool((received <= keys * received.mean() * (1 + 1e-5)).all())


def test_first_token_share_of_stripe_diagonal_and_uniform() -> None:
    assert first_token_share(stripe()) == 1.0
    assert first_token_share(torch.eye(TOKENS)) == 0.0
    expected = sum(1 / i for i in range(2, TOKENS + 1)) / (TOKENS - 1)
    assert float(first_token_share(uniform())) == pytest.approx(expected)


def test_first_token_share_counts_only_rows_that_see_it() -> None:
    window = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril().triu(-3)
    weights = stripe().where(window, torch.zeros(()))
    assert first_token_share(weights, visible=window) == 1.0
    assert float(first_token_share(weights)) == pytest.approx(3 / 15)


def test_first_token_share_of_bidirectional_rows_takes_all_but_its_own() -> None:
    weights = torch.full((4, 4), 0.25)
    weights[0] = torch.tensor([1.0, 0, 0, 0])
    assert first_token_share(weights, visible=torch.ones(4, 4, dtype=torch.bool)) == 0.25


def test_row_entropy_is_zero_on_one_key_and_log_n_on_n() -> None:
    assert torch.equal(row_entropy(stripe()), torch.zeros(TOKENS))
    expected = torch.arange(1, TOKENS + 1).float().log()
    torch.testing.assert_close(row_entropy(uniform()), expected)


def test_norm_ratio_is_the_planted_one() -> None:
    vectors = torch.nn.functional.normalize(torch.randn(2, TOKENS, 8), dim=-1)
    vectors[0, 3] *= 7.0
    vectors[1, 3] *= 0.25
    torch.testing.assert_close(norm_ratio(vectors, [3]), torch.tensor([7.0, 0.25]))


def test_norm_ratio_leaves_padding_out() -> None:
    vectors = torch.ones(TOKENS, 4)
    vectors[0] *= 3.0
    vectors[8:] *= 1000.0
    valid = torch.arange(TOKENS) < 8
    assert norm_ratio(vectors, valid=valid) == 3.0
    assert float(norm_ratio(vectors)) < 0.01


def test_norm_ratio_survives_massive_float16_states() -> None:
    hidden = torch.ones(4, 64, dtype=torch.float16)
    hidden[0] = 60000.0
    assert float(norm_ratio(hidden)) == pytest.approx(60000.0, rel=1e-3)


def test_norm_ratio_refuses_positions_outside() -> None:
    with pytest.raises(ArgumentError, match=r"sinks: got position 16, expected 0\.\.15"):
        norm_ratio(torch.ones(TOKENS, 4), [16])
    with pytest.raises(ArgumentError, match="got a mask over 3 tokens"):
        norm_ratio(torch.ones(TOKENS, 4), torch.ones(3, dtype=torch.bool))


def test_cosine_to_mean_separates_the_key_that_points_away() -> None:
    key = torch.zeros(8, 2)
    key[:, 0] = 1.0
    key[0] = torch.tensor([-1.0, 0.0])
    assert cosine_to_mean(key).tolist() == [-1.0, *[1.0] * 7]


def test_cosine_to_mean_leaves_padding_out_of_the_mean() -> None:
    key = torch.tensor([[1.0, 0], [0, 1.0], [0, 900.0]])
    valid = torch.tensor([True, True, False])
    torch.testing.assert_close(cosine_to_mean(key, valid=valid)[:2], torch.full((2,), math.sqrt(0.5)))


def test_massive_activation_is_the_planted_entry() -> None:
    hidden = torch.randn(2, TOKENS, 32).sign() * 0.5
    hidden[1, 0, 5] = -600.0
    assert massive_activations(hidden).nonzero().tolist() == [[1, 0, 5]]


def test_massive_activation_needs_both_size_and_ratio() -> None:
    small = torch.full((TOKENS, 32), 0.01)
    small[0, 5] = 90.0
    assert not massive_activations(small).any()
    assert massive_activations(small, magnitude=50).any()
    broad = torch.full((TOKENS, 32), 1.0)
    broad[0, 5] = 500.0
    assert not massive_activations(broad).any()
    assert massive_activations(broad, ratio=400).any()


def test_infinity_norm_and_top_to_median_are_exact() -> None:
    vectors = torch.tensor([[1.0, -2.0, 3.0, -8.0, 2.0], [0.5, 0.5, 0.5, 0.5, 0.5]])
    assert infinity_norm(vectors).tolist() == [8.0, 0.5]
    assert top_to_median(vectors).tolist() == [4.0, 1.0]


@settings(max_examples=20, deadline=None)
@given(st.integers(3, 60), st.integers(0, 2**31), st.floats(1e-4, 1e3))
def test_kurtosis_is_scipys_at_any_scale(dim: int, seed: int, scale: float) -> None:
    vector = torch.randn(dim, generator=torch.Generator().manual_seed(seed)) * scale
    assert float(kurtosis(vector)) == pytest.approx(stats.kurtosis(vector.double().numpy(), fisher=False), rel=1e-3)


def test_kurtosis_of_a_lone_spike_nears_the_dimension_and_of_a_constant_is_zero() -> None:
    spike = torch.zeros(1000)
    spike[3] = 500.0
    assert float(kurtosis(spike)) == pytest.approx(1000, rel=0.01)
    assert kurtosis(torch.full((8,), 2.0)) == 0.0


def test_quantise_hits_the_grid_exactly() -> None:
    x = torch.tensor([[7.0, -3.4], [0.6, 2.0]])
    assert quantise(x, bits=4).tolist() == [[7.0, -3.0], [1.0, 2.0]]


def test_quantise_per_channel_gives_each_channel_its_own_step() -> None:
    x = torch.tensor([[7.0, 0.07], [1.0, 0.01]])
    torch.testing.assert_close(quantise(x, bits=4, per="channel"), x)
    assert quantise(x, bits=4)[:, 1].tolist() == [0.0, 0.0]


def test_quantise_keeps_zeros() -> None:
    assert quantise(torch.zeros(3, 2)).tolist() == torch.zeros(3, 2).tolist()
    assert quantisation_error(torch.zeros(3, 2)).rest == 0.0


def test_one_sink_destroys_the_rest_until_it_is_kept_exact() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    x[0] *= 1000.0
    error = quantisation_error(x, bits=8)
    assert error.rest > 0.9
    assert error.rest_sinks_exact < 0.02
    assert error.everything < error.rest
    assert error.gain == pytest.approx(error.rest / error.rest_sinks_exact)


def test_without_a_sink_keeping_a_token_exact_gains_nothing() -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(0)).clamp(-2, 2)
    assert quantisation_error(x, [5], bits=4).gain == pytest.approx(1.0, abs=0.01)


def test_more_bits_lose_less() -> None:
    x = torch.randn(2, 64, 32, generator=torch.Generator().manual_seed(0))
    assert quantisation_error(x, bits=8).rest < quantisation_error(x, bits=4).rest / 8


def test_quantisation_refuses_bad_arguments() -> None:
    x = torch.ones(4, 2)
    with pytest.raises(ArgumentError, match="per: got 'row', expected one of tensor, channel"):
        quantise(x, per="row")
    with pytest.raises(ArgumentError, match="bits: got 1"):
        quantise(x, bits=1)
    with pytest.raises(ArgumentError, match="sinks: got all 4 tokens"):
        quantisation_error(x, range(4))
    x[1, 1] = torch.nan
    with pytest.raises(NumericError, match="x: got NaN"):
        quantisation_error(x)
