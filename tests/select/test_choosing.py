"""Choosing: ceil(share · n) of every domain, the highest, ties by the order of the corpus."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.select.choosing import KEY, check_share, choose_keys, numbers_of, ordered_keys

numbers = st.floats(-1e6, 1e6) | st.sampled_from([0.0, -0.0, 1.0, math.nan])


@given(st.lists(st.floats(allow_nan=False), min_size=2, max_size=40))
def test_keys_have_the_order_of_the_numbers(values):
    values = np.array(values)
    assert np.array_equal(np.argsort(ordered_keys(values), kind="stable"), np.argsort(values + 0.0, kind="stable"))
    assert np.array_equal(numbers_of(ordered_keys(values)), values + 0.0)


def chosen(tmp_path, values, domains, share):
    rows = np.empty(len(values), KEY)
    rows["key"], rows["domain"] = ordered_keys(np.array(values, np.float64)), domains
    (tmp_path / "keys").write_bytes(rows.tobytes())
    names = [f"d{n}" for n in range(max(domains) + 1)]
    found = choose_keys(tmp_path / "keys", names, share=share, flags=tmp_path / "flags")
    return found, found.selected(0, len(values))


@given(data=st.lists(st.tuples(numbers, st.integers(0, 2)), min_size=1, max_size=60), share=st.floats(0.01, 1))
@settings(max_examples=80, deadline=None)
def test_the_choice_is_that_of_sorting(tmp_path_factory, data, share):
    values, domains = [v for v, _ in data], [d for _, d in data]
    found, taken = chosen(tmp_path_factory.mktemp("choice"), values, domains, share)
    for number, domain in enumerate(found.domains):
        mine = [i for i, d in enumerate(domains) if d == number and not math.isnan(values[i])]
        wanted = math.ceil(round(share * len(mine), 9))
        best = sorted(mine, key=lambda i: (-values[i], i))[:wanted]
        assert sorted(i for i in mine if taken[i]) == sorted(best)
        assert domain.selected == wanted
        assert domain.ranked == len(mine)
    assert not any(t for t, v in zip(taken, values, strict=True) if math.isnan(v))


def test_a_shift_of_one_domain_changes_nothing(tmp_path):
    values, domains = list(np.random.default_rng(0).normal(size=50)), [n % 2 for n in range(50)]
    _, before = chosen(tmp_path, values, domains, 0.3)
    _, after = chosen(tmp_path, [v + 100 * d for v, d in zip(values, domains, strict=True)], domains, 0.3)
    assert before == after


@pytest.mark.parametrize(("share", "weight"), [(0, 0), (1.1, 0), (math.nan, 0), (0.2, -1), (0.2, math.nan)])
def test_a_share_or_weight_that_cannot_be_is_refused(share, weight):
    with pytest.raises(ArgumentError, match="expected"):
        check_share(share, weight)
