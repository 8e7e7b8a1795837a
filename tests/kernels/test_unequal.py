"""Attention with unequal head counts: its forms agree, it is what repeating heads gives, and nothing large is made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from headway.errors import ArgumentError
from headway.kernels.dense import dense_attention
from headway.kernels.unequal import (
    covered_mass,
    safe_softmax,
    selective_attention,
    shared_head,
    strongest,
    unequal_attention,
)

COUNTS = [(8, 1, 4), (8, 4, 1), (8, 2, 8), (12, 4, 6), (6, 2, 3), (4, 4, 4), (4, 2, 2), (6, 1, 1)]


def drawn(heads=(8, 2, 4), queries=21, keys=21, dim=6, value_dim=6, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], queries, dim), (heads[1], keys, dim), (heads[2], keys, value_dim))
    return tuple(torch.randn(batch, *size, generator=generator, dtype=dtype) for size in sizes)


def repeated(query, key, value, causal=True):
    """The textbook form in one line, heads repeated to those of the query."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)


@pytest.mark.parametrize("heads", COUNTS)
@pytest.mark.parametrize("mode", ["reference", "grouped", "block"])
def test_every_form_is_attention_with_repeated_heads(heads, mode):
    tensors = drawn(heads)
    torch.testing.assert_close(
        unequal_attention(*tensors, causal=True, mode=mode), repeated(*tensors), atol=1e-12, rtol=0
    )


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from(COUNTS),
    queries=st.integers(1, 20),
    past=st.integers(0, 9),
    value_dim=st.sampled_from([4, 6]),
    seed=st.integers(0, 99),
    block=st.integers(1, 9),
)
def test_forms_agree_for_any_mask(heads, queries, past, value_dim, seed, block):
    tensors = drawn(heads, queries, queries + past, value_dim=value_dim, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    visible = torch.rand(2, 1, queries, queries + past, generator=generator) < 0.6
    for causal in (False, True):
        truth = unequal_attention(*tensors, causal=causal, visible=visible, mode="reference")
        for mode in ("block", "grouped"):
            got = unequal_attention(*tensors, causal=causal, visible=visible, mode=mode, block=block)
            torch.testing.assert_close(got, truth, atol=1e-12, rtol=0)


def test_a_mask_per_head_is_kept_apart():
    tensors = drawn((8, 2, 4), 16, 16)
    visible = torch.rand(1, 8, 16, 16, generator=torch.Generator().manual_seed(1)) < 0.5
    truth = unequal_attention(*tensors, visible=visible, mode="reference")
    torch.testing.assert_close(unequal_attention(*tensors, visible=visible), truth, atol=1e-12, rtol=0)


def test_equal_counts_are_grouped_query_attention():
    query, key, value = drawn((8, 2, 2))
    truth, _ = dense_attention(query.float(), key.float(), value.float(), causal=True)
    torch.testing.assert_close(
        unequal_attention(query.float(), key.float(), value.float(), causal=True), truth, atol=1e-6, rtol=0
    )


def test_head_i_reads_key_head_and_value_head_of_its_own_group():
    assert shared_head(32, 4).tolist() == [i // 8 for i in range(32)]
    assert shared_head(32, 16).tolist() == [i // 2 for i in range(32)]
    query, key, value = drawn((4, 2, 4), 3, 5)
    changed = key.clone()
    changed[:, 1] += 1
    moved = (unequal_attention(query, changed, value) - unequal_attention(query, key, value)).abs().amax((0, 2, 3)) > 0
    assert moved.tolist() == [False, False, True, True]


@pytest.mark.parametrize("queries", [1, 12])
@pytest.mark.parametrize("mode", ["grouped", "block"])
def test_gradients_are_those_of_the_reference(queries, mode):
    tensors = [x.requires_grad_() for x in drawn((6, 1, 3), queries, 12)]
    visible = torch.rand(2, 1, queries, 12, generator=torch.Generator().manual_seed(0)) < 0.7
    visible[0, 0, 0] = False
    found = []
    for form in ("reference", mode):
        output = unequal_attention(*tensors, visible=visible, mode=form)
        found.append(torch.autograd.grad(output.square().sum(), tensors))
    for got, truth in zip(*found, strict=True):
        torch.testing.assert_close(got, truth, atol=1e-11, rtol=0)


def test_a_row_that_sees_nothing_is_zero_and_has_no_gradient():
    query, key, value = (x.requires_grad_() for x in drawn((4, 1, 2), 12, 12))
    visible = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    visible[:, :, 3] = False
    for mode in ("reference", "grouped", "block"):
        output = unequal_attention(query, key, value, visible=visible, mode=mode)
        assert not output[:, :, 3].any()
        (gradient,) = torch.autograd.grad(output.sum(), query, retain_graph=True)
        assert torch.isfinite(gradient).all()
        assert not gradient[:, :, 3].any()


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation gives with memory of its own."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        known = {x.untyped_storage().data_ptr() for x in tree_flatten(args)[0] if isinstance(x, torch.Tensor)}
        for x in tree_flatten(out)[0]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("queries", [1, 64])
def test_no_key_or_value_is_ever_expanded(queries):
    """With 8 value and 2 key heads of 64, an expanded K would hold 8·t·64 numbers. Nothing as large is made."""
    tokens = 512
    tensors = drawn((8, 2, 8), queries, tokens, dim=64, value_dim=64, batch=1, dtype=torch.float32)
    visible = torch.ones(1, 1, queries, tokens, dtype=torch.bool)
    with torch.no_grad(), _Largest() as watch:
        unequal_attention(*tensors, visible=visible)
    assert 0 < watch.elements <= max(8 * queries * tokens // (1 if queries == 1 else 2), 8 * queries * 64)
    assert watch.elements < 8 * tokens * 64
    with torch.no_grad(), _Largest() as watch:
        unequal_attention(*tensors, visible=visible, mode="reference")
    assert watch.elements >= 8 * tokens * 64


@pytest.mark.parametrize("renormalize", [True, False])
def test_enough_values_are_dense(renormalize):
    tensors = drawn((8, 2, 4))
    got = selective_attention(*tensors, top=21, causal=True, renormalize=renormalize)
    torch.testing.assert_close(got, repeated(*tensors), atol=1e-12, rtol=0)


def test_selected_values_are_those_of_the_largest_weights():
    query, key, value = drawn((4, 1, 2), 5, 9)
    weights = safe_softmax(query @ key.expand(-1, 4, -1, -1).transpose(2, 3) * 6**-0.5)
    cut = weights * (weights >= weights.sort(-1, descending=True).values[..., 2:3])
    spread = value.repeat_interleave(2, 1)
    got = selective_attention(query, key, value, top=3, renormalize=False)
    torch.testing.assert_close(got, cut @ spread, atol=1e-12, rtol=0)
    got = selective_attention(query, key, value, top=3)
    torch.testing.assert_close(got, cut / cut.sum(-1, keepdim=True) @ spread, atol=1e-12, rtol=0)


def test_hidden_values_are_never_read_even_when_few_are_visible():
    query, key, value = drawn((4, 1, 2), 3, 9)
    visible = torch.zeros(1, 1, 3, 9, dtype=torch.bool)
    visible[..., 2:4] = True
    value[:, :, 5:] = torch.nan
    got = selective_attention(query, key, value, top=6, visible=visible)
    truth = unequal_attention(query, key[:, :, 2:4], value[:, :, 2:4])
    torch.testing.assert_close(got, truth, atol=1e-12, rtol=0)


def test_ties_are_broken_alike_every_time():
    weights = torch.full((1, 1, 4, 50), 0.02)
    assert torch.equal(strongest(weights, 7)[1], strongest(weights.clone(), 7)[1])


def test_covered_mass_of_a_planted_row():
    weights = torch.tensor([[0.5, 0.1, 0.3, 0.1]])
    assert [round(float(covered_mass(weights, k)), 6) for k in (1, 2, 9)] == [0.5, 0.8, 1.0]


@pytest.mark.parametrize("heads", [(8, 3, 4), (8, 4, 3), (8, 16, 8)])
def test_counts_that_do_not_divide_name_all_three(heads):
    query, key, value = (torch.zeros(1, n, 2, 4) for n in heads)
    with pytest.raises(ArgumentError, match=f"{heads[0]} query, {heads[1]} key and {heads[2]} value"):
        unequal_attention(query, key, value)


def test_bad_arguments_are_named():
    query, key, value = drawn()
    with pytest.raises(ArgumentError, match="key: got heads of size 4 for queries of size 6"):
        unequal_attention(query, key[..., :4], value)
    with pytest.raises(ArgumentError, match="mode: got 'fast'"):
        unequal_attention(query, key, value, mode="fast")
    for top in (0, -1, 2.5, True):
        with pytest.raises(ArgumentError, match="top: got"):
            selective_attention(query, key, value, top=top)


def test_no_queries_give_no_rows():
    query, key, value = drawn(queries=0, keys=4)
    assert unequal_attention(query, key, value).shape == (2, 8, 0, 6)
