"""reduce(full) == reduced, for every reduction and every kind of call."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.reductions import REDUCTIONS, reduce_attention
from headway.kernels.rows import RowSample, estimate_mean, stratified_rows

ALL = list(REDUCTIONS)
SPANS = [(0, 3), (3, 4), (4, 9)]


def make(batch: int = 2, heads: int = 4, kv_heads: int = 2, queries: int = 13, keys: int = 13, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads, queries, 8, generator=generator) * 2
    key = torch.randn(batch, kv_heads, keys, 8, generator=generator)
    return query, key


def left_padding(batch: int, keys: int) -> torch.Tensor:
    mask = torch.ones(batch, 1, keys, keys, dtype=torch.bool).tril()
    mask[0, :, :, :4] = False
    return mask


class Decaying:
    """Signed weights that fall with the distance; rows sum to anything."""

    name, whole = "decaying", False

    def __call__(self, logits, visible, *, positions, query, key):
        assert key.shape[2] == logits.shape[-1]
        assert query.shape[2] == positions.numel()
        distance = (positions[:, None] - torch.arange(logits.shape[-1])).abs()
        return torch.where(visible, logits * 0.9**distance, 0.0)


CALLS = {
    "weighed": {"causal": True, "weighing": Decaying()},
    "weighed and packed": {
        "mask": torch.block_diag(torch.ones(6, 6), torch.ones(7, 7)).bool().tril()[None, None],
        "weighing": Decaying(),
    },
    "causal": {"causal": True},
    "bidirectional": {},
    "sliding": {"mask": torch.ones(1, 1, 13, 13, dtype=torch.bool).tril().triu(-4)},
    "left-padded": {"mask": left_padding(2, 13)},
    "packed": {"mask": torch.block_diag(torch.ones(6, 6), torch.ones(7, 7)).bool().tril()[None, None]},
    "soft-capped": {"causal": True, "softcap": 3.0},
    "learned sinks": {"causal": True, "sinks": torch.tensor([0.0, 2.0, -3.0, 5.0])},
    "position bias": {"bias": torch.randn(1, 4, 13, 13, generator=torch.Generator().manual_seed(1))},
}


@pytest.mark.parametrize("call", CALLS, ids=str)
@pytest.mark.parametrize("block", [1, 5, 64])
def test_block_form_equals_reduction_of_the_full_matrix(call, block):
    query, key = make()
    full = reduce_attention(query, key, ALL, spans=SPANS, window=3, mode="reference", **CALLS[call])
    fast = reduce_attention(query, key, ALL, spans=SPANS, window=3, block=block, **CALLS[call])
    assert set(full) == set(fast)
    for name in full:
        torch.testing.assert_close(
            fast[name].float(), full[name].float(), rtol=1e-4, atol=2e-5, equal_nan=True, msg=name
        )


def test_the_largest_of_negative_weights_is_a_visible_key():
    query, key = torch.ones(1, 1, 5, 4), -torch.ones(1, 1, 5, 4)
    for mode in ("block", "reference"):
        found = reduce_attention(query, key, ["argmax", "top"], causal=True, weighing=Decaying(), top=2, mode=mode)
        assert found["argmax"][0, 0].tolist() == [0, 0, 0, 0, 0], "the furthest is the least negative"
        assert found["top_index"][0, 0].tolist() == [[0, -1], [0, 1], [0, 1], [0, 1], [0, 1]]
        assert bool((found["top"][0, 0, 1:] < 0).all())


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_equal_repeated_heads(kv_heads):
    query, key = make(kv_heads=kv_heads)
    repeated = key.repeat_interleave(4 // kv_heads, 1)
    one = reduce_attention(query, key, ["received", "entropy"], causal=True)
    other = reduce_attention(query, repeated, ["received", "entropy"], causal=True)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    queries=st.integers(1, 20),
    extra=st.integers(0, 12),
    batch=st.integers(1, 2),
    block=st.integers(1, 30),
    causal=st.booleans(),
    density=st.floats(0.2, 1.0),
    seed=st.integers(0, 1000),
)
def test_any_shape_mask_and_split_agree(queries, extra, batch, block, causal, density, seed):
    query, key = make(batch, 4, 2, queries, queries + extra, seed)
    mask = torch.rand(batch, 1, queries, queries + extra, generator=torch.Generator().manual_seed(seed)) < density
    options = {"causal": causal, "mask": mask, "spans": [(0, 1)], "window": 3}
    full = reduce_attention(query, key, ALL, mode="reference", **options)
    fast = reduce_attention(query, key, ALL, block=block, **options)
    for name in set(full) - {"argmax", "top_index"}:
        torch.testing.assert_close(
            fast[name].float(), full[name].float(), rtol=1e-3, atol=1e-4, equal_nan=True, msg=name
        )


def test_received_mass_of_all_keys_is_the_number_of_rows():
    query, key = make()
    received = reduce_attention(query, key, ["received"], causal=True)["received"]
    torch.testing.assert_close(received.sum(-1), torch.full((2, 4), 13.0))


def test_uniform_attention_has_known_entropy_and_distance():
    query, key = torch.zeros(1, 1, 9, 4), torch.randn(1, 1, 9, 4)
    found = reduce_attention(query, key, ["entropy", "distance"], causal=True)
    rows = torch.arange(1, 10.0)
    torch.testing.assert_close(found["entropy"][0, 0], rows.log())
    torch.testing.assert_close(found["distance"][0, 0], (rows - 1) / 2)


def test_padding_rows_add_nothing_to_received():
    query, key = make(batch=1)
    valid = torch.ones(1, 13, dtype=torch.bool)
    valid[0, 10:] = False
    cut = reduce_attention(query, key, ["received", "visible"], causal=True, row_valid=valid)
    short = reduce_attention(query[:, :, :10], key[:, :, :10], ["received", "visible"], causal=True)
    for name in short:
        torch.testing.assert_close(cut[name][..., :10], short[name].expand_as(cut[name][..., :10]))
        assert not cut[name][..., 10:].any()


def test_rows_that_see_nothing_are_nan_and_minus_one():
    query, key = make(batch=1)
    mask = torch.ones(1, 1, 13, 13, dtype=torch.bool).tril()
    mask[..., 2, :] = False
    found = reduce_attention(query, key, ["entropy", "argmax", "received"], mask=mask)
    assert found["entropy"][..., 2].isnan().all()
    assert (found["argmax"][..., 2] == -1).all()
    assert found["received"].isfinite().all()


def test_chunks_with_cache_equal_the_whole():
    query, key = make(batch=1)
    whole = reduce_attention(query, key, ["entropy", "first", "received"], causal=True)
    parts = [
        reduce_attention(query[:, :, a:b], key[:, :, :b], ["entropy", "first", "received"], causal=True)
        for a, b in [(0, 4), (4, 5), (5, 13)]
    ]
    torch.testing.assert_close(torch.cat([p["entropy"] for p in parts], -1), whole["entropy"], rtol=1e-4, atol=1e-5)
    total = sum(torch.nn.functional.pad(p["received"], (0, 13 - p["received"].shape[-1])) for p in parts)
    torch.testing.assert_close(total, whole["received"], rtol=1e-4, atol=1e-5)


def test_bfloat16_inputs_stay_close_to_float32():
    query, key = make()
    exact = reduce_attention(query, key, ["received", "entropy"], causal=True)
    rounded = reduce_attention(query.bfloat16(), key.bfloat16(), ["received", "entropy"], causal=True)
    for name in exact:
        torch.testing.assert_close(rounded[name], exact[name], rtol=5e-2, atol=5e-2)


def test_sampled_rows_estimate_received_without_bias():
    query, key = make(batch=1, queries=60, keys=60)
    exact = reduce_attention(query, key, ["received"], causal=True)["received"]
    generator = torch.Generator().manual_seed(3)
    draws = [
        reduce_attention(query, key, ["received"], causal=True, rows=stratified_rows(60, 18, generator))["received"]
        for _ in range(400)
    ]
    error = torch.stack(draws).mean(0) - exact
    spread = torch.stack(draws).std(0) / 400**0.5
    assert (error.abs() <= 5 * spread + 1e-4).all()


def test_all_rows_sampled_is_exact():
    sample = stratified_rows(20, 40)
    values = torch.rand(3, 20)
    found = estimate_mean(values, sample)
    torch.testing.assert_close(found.mean, values.double().mean(-1))
    assert torch.equal(found.low, found.high)


def test_interval_of_sampled_rows_covers_the_exact_mean():
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(500, generator=generator) ** 3 + torch.linspace(0, 1, 500)
    hits = 0
    for _ in range(300):
        sample = stratified_rows(500, 60, generator)
        found = estimate_mean(rows[sample.index], sample)
        hits += bool(found.low <= rows.double().mean() <= found.high)
    assert 0.9 <= hits / 300 <= 0.995


def test_interval_is_wide_where_few_strata_hold_the_spread():
    """Rows that are all alike but in one region: the rows drawn there, not all of them, tell how sure the mean is."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.zeros(900)
    rows[100:220] = torch.rand(120, generator=generator) ** 4
    hits = 0
    for _ in range(400):
        sample = stratified_rows(900, 90, generator)
        found = estimate_mean(rows[sample.index], sample)
        hits += bool(found.low <= rows.double().mean() <= found.high)
    assert hits / 400 >= 0.92


@settings(max_examples=50, deadline=None)
@given(total=st.integers(1, 300), sample=st.integers(2, 300))
def test_sample_weights_stand_for_all_rows(total, sample):
    drawn = stratified_rows(total, sample, torch.Generator().manual_seed(0))
    assert isinstance(drawn, RowSample)
    assert abs(float(drawn.weight.sum()) - total) < 1e-2
    assert torch.equal(drawn.index, drawn.index.unique())
    assert 0 <= int(drawn.index.min()) <= int(drawn.index.max()) < total


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"what": ["entropi"]}, "entropy"),
        ({"what": ["span_mass"]}, "spans"),
        ({"what": ["span_mass"], "spans": [(0, 4), (3, 6)]}, "overlap"),
        ({"what": ["span_mass"], "spans": [(5, 5)]}, "start < stop"),
        ({"what": ["span_mass"], "spans": [(5, 99)]}, "13"),
        ({"what": ["entropy"], "rows": torch.tensor([13])}, "0..12"),
        ({"what": ["entropy"], "mode": "fast"}, "reference"),
    ],
)
def test_bad_input_names_what_came_and_what_was_expected(options, words):
    query, key = make()
    with pytest.raises(ArgumentError, match=words.replace(".", r"\.")):
        reduce_attention(query, key, **options)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(ArgumentError, match="multiple"):
        reduce_attention(torch.randn(1, 3, 4, 8), torch.randn(1, 2, 4, 8), ["entropy"])
