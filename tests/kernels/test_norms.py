"""Norms: by their formulas, in wide statistics."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError
from headway.kernels.norms import GatedNorm, RMSNorm, SimpleRMSNorm, SingleScaleRMSNorm, make_norm, rms_norm

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_a_row_has_a_mean_square_of_one():
    expected = X / (X.norm(dim=-1, keepdim=True) / 8**0.5)
    torch.testing.assert_close(rms_norm(X, eps=0), expected)
    torch.testing.assert_close(SimpleRMSNorm()(X), expected, rtol=1e-4, atol=1e-5)
    assert not list(SimpleRMSNorm().parameters())


def test_the_weighted_norm_is_that_of_torch():
    ours, theirs = RMSNorm(8).double(), torch.nn.RMSNorm(8, eps=1e-6).double()
    with torch.no_grad():
        ours.weight.copy_(torch.linspace(-1, 2, 8))
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(X), theirs(X))


def test_one_weight_scales_all_channels_alike():
    norm = SingleScaleRMSNorm().double()
    assert norm.weight.shape == (1,)
    with torch.no_grad():
        norm.weight.fill_(3.0)
    torch.testing.assert_close(norm(X), 3 * rms_norm(X))


def test_half_precision_neither_overflows_nor_changes_the_type():
    large = torch.full((1, 4), 60_000.0, dtype=torch.float16)
    assert torch.equal(rms_norm(large), torch.ones(1, 4, dtype=torch.float16))


@pytest.mark.parametrize(
    ("gate", "function"),
    [("identity", lambda g: g), ("sigmoid", torch.sigmoid), ("silu", torch.nn.functional.silu)],
)
def test_the_gate_multiplies_behind_the_norm(gate, function):
    other = X.flip(0)
    torch.testing.assert_close(GatedNorm(8, norm="srms", gate=gate)(X, other), rms_norm(X) * function(other))


def test_groups_are_normed_apart():
    got = GatedNorm(8, norm="srms", gate="identity", groups=2)(X, torch.ones_like(X))
    torch.testing.assert_close(got, torch.cat([rms_norm(X[..., :4]), rms_norm(X[..., 4:])], -1))


@pytest.mark.parametrize("name", ["rms", "srms", "single_scale", "layer", "none"])
def test_every_name_makes_a_norm_of_that_width(name):
    assert make_norm(name, 8).double()(X).shape == X.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_norm("rmss", 8), "Did you mean 'rms'"),
        (lambda: GatedNorm(8, gate="tanh"), "gate: got 'tanh'"),
        (lambda: GatedNorm(8, groups=3), "groups: got 3"),
    ],
)
def test_bad_input_names_the_argument(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
