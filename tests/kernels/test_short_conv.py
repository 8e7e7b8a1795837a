"""The short convolution is conv1d on each document, whatever stands between its tokens and wherever it is split."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import conv1d

from headway.errors import ArgumentError
from headway.kernels.short_conv import short_conv

CHANNELS, TAPS = 3, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


WEIGHT, BIAS = draw(CHANNELS, TAPS, seed=1), draw(CHANNELS, seed=2)


def by_conv1d(x: torch.Tensor) -> torch.Tensor:
    padded = torch.nn.functional.pad(x.transpose(1, 2), (TAPS - 1, 0))
    return conv1d(padded, WEIGHT[:, None], BIAS, groups=CHANNELS).transpose(1, 2)


@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 4, 9])
def test_it_is_conv1d_over_a_line_that_starts_with_zeros(tokens):
    x = draw(2, tokens, CHANNELS)
    y, tail = short_conv(x, WEIGHT, BIAS)
    torch.testing.assert_close(y, by_conv1d(x) if tokens else x)
    line = torch.cat([x.new_zeros(2, TAPS - 1, CHANNELS), x], 1)
    assert torch.equal(tail, line[:, -(TAPS - 1) :])


@given(tokens=st.integers(0, 9), split=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_any_split_with_padding_and_documents_is_conv1d_on_each_document(tokens, split, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, tokens, generator=generator) < 0.7
    resets = torch.rand(2, tokens, generator=generator) < 0.3
    x = torch.where(mask[:, :, None], draw(2, tokens, CHANNELS, seed=seed), torch.nan)
    split = min(split, tokens)
    first, tail = short_conv(x[:, :split], WEIGHT, BIAS, mask=mask[:, :split], resets=resets[:, :split])
    rest, tail = short_conv(x[:, split:], WEIGHT, BIAS, tail=tail, mask=mask[:, split:], resets=resets[:, split:])
    y = torch.cat([first, rest], 1)
    assert torch.equal(y[~mask], torch.zeros_like(y[~mask]))
    for row in range(2):
        document = (resets & mask)[row].long().cumsum(0)[mask[row]]
        real, got = x[row][mask[row]], y[row][mask[row]]
        for number in document.unique():
            here = document == number
            torch.testing.assert_close(got[here], by_conv1d(real[here][None])[0])
        present = real[document == document[-1]] if len(real) else real
        line = torch.cat([torch.zeros(TAPS - 1, CHANNELS, dtype=x.dtype), present])
        assert torch.equal(tail[row], line[-(TAPS - 1) :])


def test_gradients_are_right_with_a_tail_padding_and_documents():
    mask = torch.tensor([[True, False, True, True, True]])
    resets = torch.tensor([[False, False, False, True, False]])

    def function(x, weight, bias, tail):
        return short_conv(x, weight, bias, tail=tail, mask=mask, resets=resets)

    inputs = [
        t.clone().requires_grad_() for t in (draw(1, 5, CHANNELS), WEIGHT, BIAS, draw(1, TAPS - 1, CHANNELS, seed=3))
    ]
    assert torch.autograd.gradcheck(function, inputs)


def test_one_tap_has_an_empty_tail():
    x = draw(2, 5, CHANNELS)
    y, tail = short_conv(x, WEIGHT[:, :1])
    torch.testing.assert_close(y, x * WEIGHT[:, 0])
    assert tail.shape == (2, 0, CHANNELS)


def test_the_tail_is_not_changed_in_place():
    tail = draw(1, TAPS - 1, CHANNELS)
    before = tail.clone()
    short_conv(draw(1, 2, CHANNELS), WEIGHT, tail=tail)
    assert torch.equal(tail, before)


def test_bfloat16_sums_in_float32():
    x = draw(2, 40, CHANNELS).bfloat16()
    y, tail = short_conv(x, WEIGHT.bfloat16())
    exact, _ = short_conv(x.double(), WEIGHT.bfloat16().double())
    assert y.dtype == tail.dtype == torch.bfloat16
    assert torch.equal(y, exact.float().bfloat16())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 5)}, "x: got shape"),
        ({"weight": torch.zeros(CHANNELS, 1, TAPS)}, r"squeeze\(1\)"),
        ({"bias": torch.zeros(2)}, "bias: got shape"),
        ({"tail": torch.zeros(2, TAPS, CHANNELS)}, "tail: got shape"),
        ({"mask": torch.ones(2, 4, dtype=torch.bool)}, "mask: got shape"),
        ({"mask": torch.ones(2, 5)}, "expected bool"),
        ({"resets": torch.ones(2, 5)}, "expected bool"),
    ],
)
def test_bad_input_names_the_argument(changes, message):
    arguments = {"x": torch.zeros(2, 5, CHANNELS), "weight": torch.zeros(CHANNELS, TAPS)} | changes
    with pytest.raises(ArgumentError, match=message):
        short_conv(**arguments)
