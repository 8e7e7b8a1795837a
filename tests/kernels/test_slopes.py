"""Slopes: both families, and the temperature of layers."""

from __future__ import annotations

import pytest
import torch

from headway.errors import ArgumentError
from headway.kernels.slopes import alibi_slopes, head_slopes, layer_temperature, linear_slopes


def test_alibi_slopes_of_a_power_of_two_halve_from_head_to_head():
    torch.testing.assert_close(alibi_slopes(8), 0.5 ** torch.arange(1.0, 9.0))


def test_other_head_counts_take_every_second_slope_of_the_doubled_set():
    expected = torch.cat([alibi_slopes(8), alibi_slopes(16)[[0, 2, 4, 6]]])
    torch.testing.assert_close(alibi_slopes(12), expected)
    torch.testing.assert_close(alibi_slopes(3), torch.tensor([2.0**-4, 2.0**-8, 2.0**-2]))


def test_linear_slopes_let_head_0_keep_everything():
    torch.testing.assert_close(linear_slopes(4), torch.tensor([0.0, 2.0, 4.0, 6.0]))


def test_the_released_temperature_leaves_the_last_layer_almost_no_decay():
    slopes = torch.stack([head_slopes(4, layer=layer, layers=6) for layer in range(6)])
    assert bool((slopes.diff(dim=0) < 0).all())
    torch.testing.assert_close(slopes[0], alibi_slopes(4) * (1 + 1e-5))
    torch.testing.assert_close(slopes[-1], alibi_slopes(4) * 1e-5, rtol=1e-4, atol=0)


def test_the_linear_family_comes_with_the_temperature_of_the_paper():
    torch.testing.assert_close(head_slopes(4, family="linear", layer=3, layers=4), linear_slopes(4) / 4)


@pytest.mark.parametrize("kind", ["released", "paper", "none"])
def test_a_single_layer_has_temperature_one(kind):
    assert layer_temperature(0, 1, kind) == 1


def test_no_family_is_no_decay():
    assert not bool(head_slopes(5, family="none", layer=1, layers=3).any())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": 0}, "heads: got 0"),
        ({"heads": 2, "family": "alibbi"}, "Did you mean 'alibi'"),
        ({"heads": 2, "layer": 3, "layers": 3}, "layer: got 3"),
        ({"heads": 2, "temperature": "hot"}, "temperature: got"),
    ],
)
def test_bad_input_names_the_argument(arguments, message):
    with pytest.raises(ArgumentError, match=message):
        head_slopes(**arguments)
