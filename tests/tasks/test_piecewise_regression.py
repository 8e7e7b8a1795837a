"""Piecewise linear regression: what is generated, and that each estimator is right where it should be."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError
from headway.tasks.piecewise_regression import (
    linear_attention_estimate,
    local_linear_estimate,
    piecewise_regression,
    ridge_estimate,
    softmax_estimate,
    squared_errors,
)


def data(**changes):
    return piecewise_regression(**{"batch": 3, "dim": 6, "generator": torch.Generator().manual_seed(0), **changes})


def test_keys_and_queries_have_length_one():
    made = data()
    for x in (made.key, made.query):
        torch.testing.assert_close(x.norm(dim=-1), torch.ones(x.shape[:2], dtype=x.dtype))


def test_without_noise_one_segment_is_one_linear_map():
    made = data(segments=1, noise=0.0)
    torch.testing.assert_close(ridge_estimate(made, ridge=1e-12), made.target, rtol=1e-6, atol=1e-6)


def test_several_segments_are_no_linear_map():
    made = data(noise=0.0)
    assert float(squared_errors(ridge_estimate(made, ridge=1e-12), made).mean()) > 1e-3


def test_queries_lie_among_the_keys_of_their_segment():
    made = data(spread=0.05, segments=2)
    nearest = (made.query @ made.key.transpose(1, 2)).amax(-1)
    assert float(nearest.min()) > 0.99


def test_noise_is_on_values_alone():
    quiet, loud = data(noise=0.0), data(noise=0.5)
    assert torch.equal(quiet.key, loud.key)
    assert torch.equal(quiet.target, loud.target)
    assert float((loud.value - quiet.value).std()) == pytest.approx(0.5, rel=0.05)


def test_a_seed_gives_the_same_data():
    assert torch.equal(data().value, data().value)


def test_a_narrow_softmax_gives_the_value_of_the_nearest_key():
    made = data()
    nearest = (made.query @ made.key.transpose(1, 2)).argmax(-1)
    expected = torch.stack([value[index] for value, index in zip(made.value, nearest, strict=True)])
    torch.testing.assert_close(softmax_estimate(made, scale=1e6), expected)


def test_a_large_ridge_makes_the_local_fit_a_softmax():
    made = data()
    torch.testing.assert_close(local_linear_estimate(made, scale=8.0, ridge=1e9), softmax_estimate(made, scale=8.0))


def test_both_solvers_of_the_local_fit_agree():
    made = data()
    direct, iterated = (local_linear_estimate(made, scale=8.0, ridge=0.01, solver=s) for s in ("direct", "cg"))
    torch.testing.assert_close(direct, iterated, rtol=1e-8, atol=1e-9)


def test_the_local_fit_beats_both_extremes_on_pieces():
    made = data(batch=40, dim=8)
    errors = {
        "softmax": squared_errors(softmax_estimate(made, scale=10.0), made).mean(),
        "local": squared_errors(local_linear_estimate(made, scale=10.0, ridge=1e-3), made).mean(),
        "ridge": squared_errors(ridge_estimate(made, ridge=1e-3), made).mean(),
    }
    assert min(errors, key=lambda name: float(errors[name])) == "local"


def test_linear_attention_averages_values():
    made = data(noise=0.0)
    constant = torch.ones_like(made.value)
    estimate = linear_attention_estimate(type(made)(key=made.key, value=constant, query=made.query, target=made.target))
    torch.testing.assert_close(estimate, torch.ones_like(estimate))


@pytest.mark.parametrize("name", ["batch", "dim", "segments", "per_segment"])
def test_sizes_below_one_are_named(name):
    with pytest.raises(ArgumentError, match=name):
        data(**{name: 0})
