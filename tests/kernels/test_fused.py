"""The fused kernel and the merge of parts against dense attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.kernels.dense import dense_attention
from headway.kernels.fused import fused_attention, merge_attention


def _tensors(seed, batch, kv_heads, groups, queries, keys, dim=8, value_dim=8):
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, queries, dim, generator=generator)
    key = torch.randn(batch, kv_heads, keys, dim, generator=generator)
    return query, key, torch.randn(batch, kv_heads, keys, value_dim, generator=generator), generator


@given(
    seed=st.integers(0, 1000),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 2),
    groups=st.integers(1, 3),
    queries=st.integers(1, 9),
    past=st.integers(0, 9),
    causal=st.booleans(),
    masked=st.sampled_from(["none", "shared", "heads", "batch"]),
    value_dim=st.sampled_from([8, 4]),
)
@settings(max_examples=60, deadline=None)
def test_fused_equals_dense(seed, batch, kv_heads, groups, queries, past, causal, masked, value_dim):
    keys = queries + past
    query, key, value, generator = _tensors(seed, batch, kv_heads, groups, queries, keys, value_dim=value_dim)
    mask = None
    if masked != "none":
        shape = (batch if masked == "batch" else 1, kv_heads * groups if masked == "heads" else 1, queries, keys)
        mask = torch.rand(shape, generator=generator) > 0.4
    got, got_lse = fused_attention(query, key, value, causal=causal, mask=mask)
    want, want_lse = dense_attention(query, key, value, causal=causal, mask=mask, empty_rows="zero")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    torch.testing.assert_close(got_lse, want_lse, atol=1e-5, rtol=0)


@given(seed=st.integers(0, 1000), cut=st.integers(1, 10))
@settings(max_examples=25, deadline=None)
def test_parts_of_a_softmax_merge_to_the_whole(seed, cut):
    query, key, value, generator = _tensors(seed, 2, 2, 2, 5, 11)
    mask = torch.rand(2, 1, 5, 11, generator=generator) > 0.5
    whole, lse = dense_attention(query, key, value, mask=mask, empty_rows="zero")
    parts = [
        fused_attention(query, key[:, :, s], value[:, :, s], mask=mask[..., s]) for s in (slice(0, cut), slice(cut, 11))
    ]
    merged, total = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(merged, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(total, lse, atol=1e-5, rtol=0)


def test_merging_nothing_and_more_queries_than_keys_are_refused():
    with pytest.raises(ArgumentError, match="at least one"):
        merge_attention([], [])
    query, key, value, _ = _tensors(0, 1, 1, 1, 5, 3)
    with pytest.raises(ArgumentError, match="no more than keys"):
        fused_attention(query, key, value, causal=True)
