"""What a selection loses: known weights with known losses, and every selection against its own mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.door import AttentionCall, BlockMask, Blocks, Dense, Keys, Window
from headway.errors import ArgumentError, EmptyRowError
from headway.tasks.fidelity import fidelity, selected_keys


def call(
    queries: int = 40, keys: int | None = None, *, heads: int = 4, kv_heads: int = 2, seed: int = 0, **fields
) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    keys = queries if keys is None else keys
    query = torch.randn(1, heads, queries, 8, generator=generator)
    key, value = (torch.randn(1, kv_heads, keys, 8, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, **({"causal": True} | fields))


def even_call(tokens: int) -> AttentionCall:
    """Every visible key has the same weight; key j has the value (1, j)."""
    zeros = torch.zeros(1, 1, tokens, 2)
    value = torch.stack([torch.ones(tokens), torch.arange(tokens).float()], 1)[None, None]
    return AttentionCall.from_tensors(zeros, zeros, value, causal=True)


def some_blocks(queries: int, keys: int, *, heads: int = 4, block: int = 8, seed: int = 0) -> Blocks:
    shape = (1, heads, -(-queries // block), -(-keys // block))
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    return Blocks(BlockMask(blocks, queries, keys, block, block).with_diagonal())


def some_keys(queries: int, keys: int, *, heads: int = 1, lists: int | None = None) -> Keys:
    generator = torch.Generator().manual_seed(3)
    lists = queries if lists is None else lists
    index = torch.randint(0, keys, (1, heads, lists, 6), generator=generator)
    valid = torch.rand(index.shape, generator=generator) < 0.7
    index[..., 0], valid[..., 0] = 0, True
    return Keys(index, valid)


def test_dense_keeps_all_mass_and_loses_nothing():
    found = fidelity(call(), Dense())
    torch.testing.assert_close(found.kept_mass, torch.ones(1, 4, 40))
    assert float(found.error.abs().max()) < 1e-6
    assert (found.density, found.output_error) == (1.0, pytest.approx(0, abs=1e-6))


def test_even_weights_keep_the_share_of_the_keys_and_move_the_mean_of_the_values():
    """Row i sees keys 0 … i with weight 1 / (i + 1); a window of 4 keeps 4, whose mean is i − 1.5, not i / 2."""
    found = fidelity(even_call(20), Window(0, 4))
    row = torch.arange(20).float()
    kept = (4 / (row + 1)).clamp(max=1)
    torch.testing.assert_close(found.kept_mass[0, 0], kept)
    moved = (row - 1.5 - row / 2).clamp(min=0)
    torch.testing.assert_close(found.error[0, 0], moved / (1 + (row / 2) ** 2).sqrt())
    assert found.density == pytest.approx((4 * 20 - 6) / 210)


def test_a_sink_that_holds_the_mass_is_all_that_has_to_be_kept():
    zeros = torch.zeros(1, 1, 32, 2)
    key = zeros.clone()
    key[0, 0, 0, 0] = 50.0
    query = zeros.clone()
    query[..., 0] = 1.0
    sunk = AttentionCall.from_tensors(query, key, torch.randn(1, 1, 32, 2), causal=True)
    assert fidelity(sunk, Window(1, 2)).output_error < 1e-6
    assert fidelity(sunk, Window(0, 2)).mean_mass() < 0.2


@pytest.mark.parametrize("block", [1, 7, 16, 1000])
def test_the_block_of_rows_changes_nothing(block):
    whole, parts = fidelity(call(), Window(2, 5)), fidelity(call(), Window(2, 5), block=block)
    torch.testing.assert_close(parts.kept_mass, whole.kept_mass)
    torch.testing.assert_close(parts.error, whole.error)
    assert parts.density == pytest.approx(whole.density)
    assert parts.output_error == pytest.approx(whole.output_error)


SELECTIONS = {
    "window": lambda q, k: Window(2, 5),
    "blocks": some_blocks,
    "blocks of one head": lambda q, k: some_blocks(q, k, heads=1),
    "keys by row": some_keys,
    "keys by row and kv head": lambda q, k: some_keys(q, k, heads=2),
    "keys for all rows": lambda q, k: some_keys(q, k, lists=1),
}


@pytest.mark.parametrize("kind", SELECTIONS)
@pytest.mark.parametrize("shape", [(40, 40), (10, 40), (1, 33)])
def test_every_selection_loses_what_its_mask_loses(kind, shape):
    queries, keys = shape
    here, selection = call(queries, keys), SELECTIONS[kind](queries, keys)
    found = fidelity(here, selection, block=16)
    mask = selection.to_bool(queries, keys)
    mask = mask.repeat_interleave(2, 1) if mask.shape[1] == 2 else mask.expand(1, 4, -1, -1)
    weights = here.weights()
    torch.testing.assert_close(found.kept_mass, (weights * mask).sum(-1), atol=1e-6, rtol=1e-5)
    dense, narrowed = here.attend()[0], here.replace(mask=here.visible() & mask).attend()[0]
    difference = (narrowed - dense).double()
    assert found.output_error == pytest.approx(float(difference.norm() / dense.double().norm()), rel=1e-4)
    torch.testing.assert_close(
        found.error, (difference.norm(dim=-1) / dense.norm(dim=-1)).float(), atol=1e-5, rtol=1e-4
    )
    seen = here.visible().expand_as(mask)
    assert found.density == pytest.approx(float((mask & seen).sum() / seen.sum()))


@given(
    queries=st.integers(1, 30),
    past=st.integers(0, 20),
    kind=st.sampled_from(sorted(SELECTIONS)),
    data=st.data(),
)
@settings(max_examples=60, deadline=None)
def test_the_rows_of_a_selection_are_those_of_its_whole_mask(queries, past, kind, data):
    keys = queries + past
    selection = SELECTIONS[kind](queries, keys)
    rows = torch.tensor(data.draw(st.lists(st.integers(0, queries - 1), min_size=1, max_size=8)))
    got = selected_keys(selection, rows, queries, keys)
    whole = selection.to_bool(queries, keys)
    wanted = whole[:, :, rows] if whole.shape[2] > 1 else whole.expand(-1, -1, rows.numel(), -1)
    assert torch.equal(got.expand_as(wanted), wanted)


def test_some_rows_are_those_of_all_rows():
    rows = torch.tensor([3, 39, 17])
    some, everything = fidelity(call(), Window(1, 6), rows=rows), fidelity(call(), Window(1, 6))
    torch.testing.assert_close(some.kept_mass, everything.kept_mass[..., rows])
    assert torch.equal(some.rows, rows)


def test_a_learned_sink_takes_its_share_in_both_and_kept_mass_is_of_the_keys():
    sinks = torch.tensor([3.0, 0.0, -3.0, 1.0])
    with_sinks, without = fidelity(call(sinks=sinks), Window(2, 5)), fidelity(call(), Window(2, 5))
    torch.testing.assert_close(with_sinks.kept_mass, without.kept_mass)
    assert fidelity(call(sinks=sinks), Dense()).output_error == pytest.approx(0, abs=1e-6)
    assert not torch.allclose(with_sinks.error, without.error)


def test_rows_that_see_nothing_are_nan_and_count_nowhere():
    mask = torch.ones(1, 1, 10, 10, dtype=torch.bool)
    mask[..., :3] = False
    found = fidelity(call(10, mask=mask), Window(0, 2))
    assert found.kept_mass[..., :3].isnan().all()
    assert not found.kept_mass[..., 3:].isnan().any()
    assert found.mean_mass() == pytest.approx(float(found.kept_mass[..., 3:].mean()))
    assert torch.isfinite(found.squared_error).all()
    assert found.density == pytest.approx((1 + 2 * 6) / (7 * 8 / 2))


def test_a_row_that_keeps_nothing_of_what_it_sees_is_refused_by_name():
    none = Keys(torch.tensor([[[[9]]]]))
    with pytest.raises(EmptyRowError, match="query 0 keeps no key"):
        fidelity(call(10), none)
    assert fidelity(call(10), none, rows=torch.tensor([9])).kept_mass.shape == (1, 4, 1)


def test_summaries_are_of_all_heads_and_of_each():
    found = fidelity(call(), Window(1, 3))
    assert found.output_error == pytest.approx(float((found.squared_error.sum() / found.squared_norm.sum()).sqrt()))
    assert float(found.head_error.min()) <= found.output_error <= float(found.head_error.max())
    assert found.mass_quantile(0) == pytest.approx(float(found.kept_mass.min()))
    assert found.mass_quantile(0.5) == pytest.approx(float(found.kept_mass.double().quantile(0.5)))
    assert found.last_mass(4) == pytest.approx(float(found.kept_mass[..., -4:].mean()))
    assert found.last_mass(4) < found.mean_mass()


def test_a_bidirectional_call_counts_the_future_as_visible():
    found = fidelity(call(12, causal=False), Keys(torch.tensor([[[[0, 5, 11]]]])))
    assert found.density == pytest.approx(3 / 12)


def test_bad_arguments_are_refused():
    with pytest.raises(ArgumentError, match="block, rows"):
        fidelity(call(), Dense(), block=0)
    with pytest.raises(ArgumentError, match="block, rows"):
        fidelity(call(), Dense(), rows=torch.tensor([], dtype=torch.long))
    with pytest.raises(ArgumentError, match="expected 40 and 40"):
        fidelity(call(), some_blocks(32, 32))
    with pytest.raises(ArgumentError, match="expected Dense, Window, Blocks or Keys"):
        fidelity(call(), "window")
