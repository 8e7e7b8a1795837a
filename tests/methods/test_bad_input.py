"""What is no whole number or no number at all is refused by every method when it is made: got, expected, a fix."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch

import headway
from headway.door.stages import Stage
from headway.errors import ArgumentError, check_whole, is_number
from headway.methods.long_context.power_attention import PowerAttention
from headway.methods.long_context.tappa import ExpectedAttention
from headway.methods.sinks.act import ACT

DUO = partial(headway.DuoAttention, gates=torch.rand(2, 2, generator=torch.Generator().manual_seed(0)))
ACTING = partial(ACT, heads=[(0, 1)])
#: Of each method: how it is made, arguments that are whole numbers, those of them that may be None, and other numbers.
METHODS: dict[str, tuple[Callable[..., Stage], tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "streaming-llm": (headway.StreamingLLM, ("sinks", "window", "rebase_at"), ("rebase_at",), ()),
    "duo-attention": (partial(DUO, sparsity=0.5), ("sinks", "recent", "reserve"), (), ("sparsity",)),
    "flexprefill": (
        headway.FlexPrefill, ("min_budget", "max_budget", "block"), ("min_budget", "max_budget"),
        ("gamma", "density", "tau"),
    ),
    "dhsa": (
        headway.DHSA, ("budget", "decode_budget", "block", "local_tokens", "global_tokens", "suffix"),
        ("budget", "decode_budget"), (),
    ),
    "power-attention": (PowerAttention, ("block", "window", "sink", "base"), (), ()),
    "recycled-attention": (
        headway.RecycledAttention, ("budget", "stride", "check", "pool", "sinks"), ("stride",), ("threshold",)
    ),
    "infiniretri": (
        headway.InfiniRetri, ("window", "topk", "phrase", "budget", "limit", "question", "head", "above"),
        ("topk", "budget", "limit", "question", "head"), ("share",),
    ),
    "tappa": (headway.TappaEviction, ("budget", "window", "pool", "slack", "seed"), ("slack",), ("gamma", "alpha")),
    "act": (ACTING, ("least_rows",), (), ("beta", "tau", "alpha")),
}  # fmt: skip
WHOLE = [(slug, name) for slug, (_, whole, _, _) in METHODS.items() for name in whole]
NUMBERS = [(slug, name) for slug, (_, _, _, numbers) in METHODS.items() for name in numbers]


@pytest.mark.parametrize("value", [2.5, 64.0, math.nan, math.inf, True, "64", -1, (1, 2)], ids=repr)
@pytest.mark.parametrize(("slug", "name"), WHOLE)
def test_what_is_no_whole_number_is_refused(slug, name, value):
    with pytest.raises(ArgumentError) as caught:
        METHODS[slug][0](**{name: value})
    text = str(caught.value)
    assert text.startswith(f"{name}: got {value!r}, expected a whole number of at least ")
    assert f"Pass {name}=" in text


@pytest.mark.parametrize(("slug", "name"), WHOLE)
def test_none_is_refused_unless_it_means_something(slug, name):
    make, _, optional, _ = METHODS[slug]
    if name in optional:
        make(**{name: None})
        return
    with pytest.raises(ArgumentError, match=f"{name}: got None, expected a whole number"):
        make(**{name: None})


@pytest.mark.parametrize("value", [math.nan, math.inf, True, "0.5"], ids=repr)
@pytest.mark.parametrize(("slug", "name"), NUMBERS)
def test_what_is_no_number_is_refused(slug, name, value):
    with pytest.raises(ArgumentError, match=rf"{name}: got {value!r}, expected "):
        METHODS[slug][0](**{name: value})


@pytest.mark.parametrize("tau", [(0, 1), (1, 0), (1, -1), (math.nan, 1), (1,), (1, 2, 3), (True, 1), 1.0], ids=repr)
def test_temperatures_that_cannot_be_roots_are_refused(tau):
    with pytest.raises(ArgumentError, match=r"tau: got .* expected two temperatures above 0, or None"):
        headway.TappaEviction(preference="mixed", tau=tau)


@pytest.mark.parametrize("heads", [[(0.5, 1)], [(0, True)], [(0, -1)], [(math.nan, 1)]], ids=repr)
def test_heads_that_are_no_numbers_are_refused(heads):
    with pytest.raises(ArgumentError, match=r"(layer|head): got .* expected a whole number of at least 0"):
        ACT(heads=heads)


def test_what_else_takes_such_numbers_refuses_them():
    for make, name, value in (
        (ExpectedAttention, "future", 2.5),
        (ExpectedAttention, "epsilon", math.nan),
        (partial(PowerAttention), "full_layers", (1.5,)),
        (partial(DUO), "threshold", math.nan),
    ):
        with pytest.raises(ArgumentError, match=f"{name}: got"):
            make(**{name: value})


def test_whole_numbers_of_other_libraries_are_welcome():
    check_whole("block", np.int64(4), 1)
    assert headway.StreamingLLM(window=np.int32(9)).capacity == 13
    assert is_number(Fraction(1, 2))
    assert is_number(10**400)
    assert not is_number(1j)


def test_the_fix_is_the_nearest_number_that_can_be():
    for value, near in ((7.9, 7), (-3.5, 2), (0, 2), (math.nan, 2), ("8", 2)):
        with pytest.raises(ArgumentError, match=rf"of at least 2, or None\. Pass block={near}, say\.$"):
            check_whole("block", value, 2, optional=True)
