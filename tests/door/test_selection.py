"""Selections: what they let through, pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.door import BlockMask, Blocks, Dense, Keys, Window
from headway.errors import ArgumentError


@st.composite
def grids(draw):
    queries, extra = draw(st.integers(1, 24)), draw(st.integers(0, 12))
    query_block, key_block = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    keys = queries + extra
    shape = (draw(st.integers(1, 2)), draw(st.integers(1, 3)), -(-queries // query_block), -(-keys // key_block))
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.4
    return BlockMask(blocks, queries, keys, query_block, key_block)


def visible(mask):
    return torch.ones(mask.queries, mask.keys, dtype=torch.bool).tril(mask.keys - mask.queries)


@settings(max_examples=60, deadline=None)
@given(grids())
def test_density_is_selected_over_visible_pairs(mask):
    pairs = mask.to_bool() & visible(mask)
    assert mask.density() == pytest.approx(float(pairs.double().mean((0, 1)).sum() / visible(mask).sum()), abs=1e-9)
    assert mask.density(causal=False) == pytest.approx(float(mask.to_bool().double().mean()), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(grids(), st.integers(1, 12))
def test_forced_sets_hold_every_pair_they_promise_and_no_future_block(mask, tokens):
    row = torch.arange(mask.queries)[:, None] + mask.offset
    column = torch.arange(mask.keys)[None]
    seen = visible(mask)
    assert (mask.with_sinks(tokens).to_bool() | ~(seen & (column < tokens))).all()
    assert (mask.with_local(tokens).to_bool() | ~(seen & (column > row - tokens))).all()
    assert (mask.with_diagonal().to_bool() | ~(row == column)).all()
    assert mask.causal().with_sinks(tokens).with_local(tokens).is_causal()
    assert (mask.with_sinks(tokens).blocks >= mask.blocks).all()


@settings(max_examples=30, deadline=None)
@given(grids())
def test_union_and_intersection_are_those_of_the_pairs(mask):
    other = BlockMask(~mask.blocks, mask.queries, mask.keys, mask.query_block, mask.key_block)
    assert mask.union(other).to_bool().all()
    assert not mask.intersection(other).to_bool().any()
    assert torch.equal(mask.union(mask).blocks, mask.blocks)


@settings(max_examples=30, deadline=None)
@given(grids())
def test_causal_drops_only_what_no_query_can_see(mask):
    assert torch.equal(mask.causal().to_bool() & visible(mask), mask.to_bool() & visible(mask))
    assert mask.causal().is_causal()


def test_plot_shows_read_skipped_and_future():
    blocks = torch.tensor([[[[True, False], [False, True]]]])
    assert BlockMask(blocks, 4, 4, 2, 2).plot() == "█ \n·█"


def test_window_keeps_sinks_and_the_last_keys_of_each_query():
    allowed = Window(1, 2).to_bool(3, 5)[0, 0]
    assert allowed.int().tolist() == [[1, 1, 1, 0, 0], [1, 0, 1, 1, 0], [1, 0, 0, 1, 1]]


def test_dense_keeps_everything():
    assert Dense().to_bool(3, 5).all()


def test_keys_keep_valid_indices_only():
    index = torch.tensor([[[[0, 2, 2]]]])
    valid = torch.tensor([[[[True, True, False]]]])
    assert Keys(index, valid).to_bool(2, 4)[0, 0].int().tolist() == [[1, 0, 1, 0]] * 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Window(-1, 4), "sinks ≥ 0"),
        (lambda: Window(0, 0), "window ≥ 1"),
        (lambda: BlockMask(torch.ones(1, 1, 2, 2), 4, 4, 2, 2), "bool"),
        (lambda: BlockMask(torch.ones(1, 1, 3, 2, dtype=torch.bool), 4, 4, 2, 2), r"\(batch, heads, 2, 2\)"),
        (lambda: BlockMask.full(4, 4, 2, 2).union(BlockMask.full(4, 4, 4, 4)), "one grid"),
        (lambda: Blocks(BlockMask.full(4, 4, 2, 2)).to_bool(5, 5), "expected 5"),
        (lambda: Keys(torch.tensor([[[[4]]]])).to_bool(2, 4), r"0\.\.3"),
    ],
)
def test_bad_input_names_what_came_and_what_was_expected(make, words):
    with pytest.raises(ArgumentError, match=words):
        make()
