from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headway
from headway.door import AttentionCall, Selector, Window
from headway.door.selection import BlockMask, Blocks, Dense, Keys
from headway.errors import ArgumentError, EmptyRowError
from headway.tasks.agreement import agree, kl_divergence, record
from headway.tasks.fidelity import fidelity, selected_keys
from tests.door.hosts import tokens
from tests.look.tiny import tiny_llama

HOST = tiny_llama()
IDS = tokens(1, 30)


class Narrow(Selector):
    def __init__(self, window: int) -> None:
        self.window = window

    def select(self, call):
        return Window(0, self.window)


def test_dense_agrees_with_itself_wholly():
    found = agree(HOST, record(HOST, IDS, max_new_tokens=6, rows=10))
    assert (found.token_agreement, found.common_prefix, found.next_token_rate) == (1.0, 6, 1.0)
    assert found.mean_kl < 1e-6


def test_chunked_prefill_agrees_with_the_whole():
    found = agree(HOST, record(HOST, IDS, max_new_tokens=6, rows=10), prefill_chunk=7)
    assert found.common_prefix == 6
    assert found.mean_kl < 1e-5


def test_the_log_probabilities_of_a_reference_are_those_of_one_forward():
    reference = record(HOST, IDS, max_new_tokens=5, rows=8, prefill_chunk=11)
    with torch.no_grad():
        logits = HOST(torch.cat([IDS, reference.answer_ids[None]], 1)).logits[0]
    assert reference.rows[-4:].tolist() == [30, 31, 32, 33]
    assert reference.rows[7] == 29
    wanted = logits[reference.rows].log_softmax(-1)
    torch.testing.assert_close(reference.log_probabilities, wanted, atol=1e-3, rtol=1e-3)
    assert reference.answer_ids.tolist() == logits[29:34].argmax(-1).tolist()


def test_a_method_is_held_against_dense_on_the_same_text():
    reference = record(HOST, IDS, max_new_tokens=8, rows=12)
    with headway.use(HOST, Narrow(3)):
        found = agree(HOST, reference)
        with torch.no_grad():
            text = torch.cat([IDS, reference.answer_ids[None]], 1)
            logits = HOST(text, use_cache=False).logits[0]
    here = logits[reference.rows].log_softmax(-1)
    torch.testing.assert_close(found.kl, kl_divergence(reference.log_probabilities, here), atol=2e-3, rtol=1e-2)
    assert found.mean_kl > 0.05
    assert found.next_token_rate < 1
    assert found.common_prefix <= round(found.token_agreement * 8)
    assert found.in_answer.sum() == 8


def test_a_window_as_wide_as_the_text_is_dense():
    reference = record(HOST, IDS, max_new_tokens=4)
    with headway.use(HOST, Narrow(64)):
        assert agree(HOST, reference).mean_kl < 1e-5


def test_kl_is_zero_for_equals_and_known_for_a_known_pair():
    p = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    q = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = kl_divergence(p, q)
    assert found[1] == 0
    assert torch.isclose(found[0], torch.tensor(0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)))


def test_nothing_to_compare_is_refused():
    with pytest.raises(ArgumentError, match="max_new_tokens, rows: got 0, 64"):
        record(HOST, IDS, max_new_tokens=0)


def recorded(queries: int = 40, keys: int = 40, *, seed: int = 0, **fields) -> AttentionCall:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, queries, 8, generator=generator)
    key, value = (torch.randn(2, 2, keys, 8, generator=generator) for _ in range(2))
    return AttentionCall.from_tensors(query, key, value, **{"causal": True, **fields})


@settings(max_examples=30, deadline=None)
@given(
    queries=st.integers(1, 24),
    extra=st.integers(0, 12),
    size=st.integers(1, 9),
    kind=st.sampled_from(["dense", "window", "blocks", "keys", "one list"]),
    seed=st.integers(0, 99),
)
def test_selected_keys_of_some_rows_are_those_rows_of_the_whole_mask(queries, extra, size, kind, seed):
    keys = queries + extra
    generator = torch.Generator().manual_seed(seed)
    grid = (1, 2, -(-queries // size), -(-keys // size))
    index = torch.randint(keys, (1, 2, queries if kind == "keys" else 1, 3), generator=generator)
    selection = {
        "dense": Dense(),
        "window": Window(2, size),
        "blocks": Blocks(BlockMask(torch.rand(grid, generator=generator) < 0.5, queries, keys, size, size)),
        "keys": Keys(index, torch.rand(index.shape, generator=generator) < 0.7),
        "one list": Keys(index),
    }[kind]
    rows = torch.randperm(queries, generator=generator)[: max(queries // 2, 1)]
    whole = selection.to_bool(queries, keys).expand(-1, -1, queries, -1)
    found = selected_keys(selection, rows, queries, keys).expand(-1, -1, rows.numel(), -1)
    assert torch.equal(found, whole[:, :, rows])


@pytest.mark.parametrize("block", [7, 128])
@pytest.mark.parametrize(
    "fields", [{}, {"softcap": 3.0}, {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}, {"causal": False}]
)
def test_fidelity_equals_its_definition_on_the_full_matrix(block, fields):
    call, selection = recorded(**fields), Window(2, 9)
    found = fidelity(call, selection, block=block)
    mask = selection.to_bool(40, 40) & call.visible()
    weights = call.weights()
    dense = call.attend()[0]
    narrowed = call.replace(mask=mask).attend()[0]
    torch.testing.assert_close(found.kept_mass, (weights * mask).sum(-1) / weights.sum(-1))
    torch.testing.assert_close(found.error, (narrowed - dense).norm(dim=-1) / dense.norm(dim=-1), atol=1e-5, rtol=1e-4)
    assert abs(found.output_error - float((narrowed - dense).norm() / dense.norm())) < 1e-5
    assert abs(found.density - float(mask.double().mean() / call.visible().double().mean())) < 1e-9


def test_dense_keeps_all_mass_and_loses_nothing():
    found = fidelity(recorded(30, 40), Dense())
    assert torch.allclose(found.kept_mass, torch.tensor(1.0))
    assert found.output_error < 1e-6
    assert found.density == 1.0


def test_a_planted_row_keeps_the_mass_that_was_planted():
    logits = torch.tensor([0.7, 0.2, 0.1]).log()
    call = AttentionCall.from_tensors(
        torch.ones(1, 1, 1, 1), logits.view(1, 1, 3, 1), torch.eye(3)[None, None], scale=1
    )
    found = fidelity(call, Keys(torch.tensor([[[[0, 1]]]])))
    assert torch.isclose(found.kept_mass[0, 0, 0], torch.tensor(0.9))
    dense, kept = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([7 / 9, 2 / 9, 0])
    assert torch.isclose(found.error[0, 0, 0], (kept - dense).norm() / dense.norm())


def test_summaries_are_over_all_rows_of_all_heads_and_the_last_block():
    found = fidelity(recorded(), Window(1, 6))
    assert abs(found.mean_mass() - float(found.kept_mass.mean())) < 1e-6
    assert found.mass_quantile(0.05) <= found.mean_mass()
    assert abs(found.last_mass(8) - float(found.kept_mass[..., -8:].mean())) < 1e-6
    assert found.head_error.shape == (2, 4)


def test_rows_can_be_sampled():
    call, rows = recorded(), torch.tensor([3, 17, 39])
    some, every = fidelity(call, Window(1, 6), rows=rows), fidelity(call, Window(1, 6))
    torch.testing.assert_close(some.kept_mass, every.kept_mass[..., rows])


def test_rows_that_see_nothing_are_left_out():
    mask = torch.ones(1, 1, 40, 40, dtype=torch.bool)
    mask[:, :, 5] = False
    found = fidelity(recorded(mask=mask), Dense())
    assert found.kept_mass[..., 5].isnan().all()
    assert found.mean_mass() == pytest.approx(1.0)


def test_a_row_that_keeps_nothing_is_refused_by_number():
    far = Keys(torch.tensor([39]).view(1, 1, 1, 1))
    with pytest.raises(EmptyRowError, match="query 0 keeps no key"):
        fidelity(recorded(), far)


def test_bad_fidelity_input_is_refused():
    with pytest.raises(ArgumentError, match="block, rows: got 0"):
        fidelity(recorded(), Dense(), block=0)
    with pytest.raises(ArgumentError, match="block mask: got one for 8 queries"):
        fidelity(recorded(), Blocks(BlockMask.full(8, 8, 4, 4)))
    with pytest.raises(ArgumentError, match="selection: got str"):
        fidelity(recorded(), "dense")
