"""PowerAttention: the mask, its reach, and the model with it in every phase."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

import headway
from headway.door import AttentionCall
from headway.errors import ArgumentError
from headway.methods.long_context.power_attention import (
    CARD,
    PowerAttention,
    hops_to_all,
    key_blocks,
    pattern_mask,
    power_mask,
    reach,
    reached,
)


def small(**options) -> PowerAttention:
    return PowerAttention(**{"block": 2, "window": 2, "sink": 1, **options})


def test_card_names_the_paper():
    assert (CARD.slug, CARD.arxiv) == ("power-attention", "2503.03588")


@given(blocks=st.integers(1, 80), window=st.integers(1, 6), sink=st.integers(0, 3), base=st.integers(2, 4))
@settings(max_examples=60, deadline=None)
def test_mask_is_causal_keeps_its_own_block_and_its_degree(blocks, window, sink, base):
    mask = power_mask(blocks, window=window, sink=sink, base=base)
    assert not mask.triu(1).any()
    assert bool(mask.diagonal().all())
    powers = 1
    while base**powers < blocks:
        powers += 1
    assert int(mask.sum(1).max()) <= window + sink + (base - 1) * powers + 1
    rows = [key_blocks(i, window=window, sink=sink, base=base) for i in range(blocks)]
    assert [row.nonzero()[:, 0].tolist() for row in mask] == rows
    if blocks <= window:
        assert bool((mask == torch.ones_like(mask).tril()).all())


@given(blocks=st.integers(2, 60), shift=st.integers(1, 10))
@settings(max_examples=30, deadline=None)
def test_away_from_the_sink_a_row_only_knows_distances(blocks, shift):
    mask = power_mask(blocks + shift, window=3, sink=0)
    torch.testing.assert_close(mask[shift:, shift:], power_mask(blocks, window=3, sink=0))


@given(distance=st.integers(1, 500))
@settings(max_examples=40, deadline=None)
def test_a_distance_takes_as_many_hops_as_it_has_one_bits(distance):
    blocks = distance + 1
    sets = reached(power_mask(blocks, window=1, sink=0), distance.bit_length())
    assert bool(sets[distance.bit_count() - 1][0])


@pytest.mark.parametrize(("blocks", "hops", "window_hops"), [(64, 5, 7), (128, 6, 14), (256, 7, 29), (512, 8, 57)])
def test_hops_to_all_blocks_are_the_exact_ones(blocks, hops, window_hops):
    assert hops_to_all(power_mask(blocks)) == hops
    assert hops_to_all(pattern_mask("window", blocks, degree=10)) == window_hops


def test_coverage_by_layer_at_128_blocks():
    assert reach(power_mask(128), 6) == [10, 35, 75, 110, 126, 128]
    assert reach(pattern_mask("window", 128, degree=10), 6) == [11, 20, 29, 38, 47, 56]
    odd = reached(pattern_mask("dilated", 65, degree=5, sink=0), 40)[-1]
    assert not odd[1::2].any()
    assert hops_to_all(pattern_mask("dilated", 65, degree=5, sink=0)) is None


def test_at_32k_a_query_reads_at_most_ten_blocks_and_a_seventh_of_the_triangle():
    method = PowerAttention()
    assert method.degree(32_768) == 10
    mask = power_mask(128)
    assert float(mask.sum()) / (128 * 129 / 2) == pytest.approx(0.138, abs=0.004)
    assert method.keys_read(32_767).numel() == 2_560


def test_gradients_reach_exactly_the_reachable_embeddings():
    """Message passing: the last output depends on a token if and only if its block is within so many hops."""
    model = decoder("Llama", num_hidden_layers=2)
    method = PowerAttention(block=1, window=2, sink=0)
    ids = contract.tokens(1, 40)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with headway.use(model, method):
        model(inputs_embeds=embedded, use_cache=False).logits[0, -1].sum().backward()
    moved = embedded.grad[0].abs().sum(-1) > 0
    assert torch.equal(moved, reached(power_mask(40, window=2, sink=0), 2)[-1])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2 soft cap", "gpt-oss learned sinks", "gpt2"])
@pytest.mark.parametrize("pads", [None, [0, 4]])
def test_prefill_chunks_and_decoding_agree(name, pads):
    model = CAUSAL[name]()
    ids, mask = contract.tokens(2, 27), None
    if pads:
        ids, mask = contract.padded_left(ids, pads)
    with headway.use(model, small(), sites=None if "oss" not in name and "gemma" not in name else ["*layers.1.*"]):
        whole = contract.run_in_chunks(model, ids, [27], mask)
        for chunks in ([1] * 27, [8, 8, 11], [5, 9, 1, 12]):
            got = contract.run_in_chunks(model, ids, chunks, mask)
            rows = torch.ones_like(ids).bool() if mask is None else mask.bool()
            torch.testing.assert_close(got[rows], whole[rows], atol=2e-4, rtol=0)


def test_the_model_reads_what_the_mask_says():
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 40)
    method = PowerAttention(block=4, window=2, sink=1)
    with headway.use(model, method), headway.capture(model, what=("weights",)) as captured, torch.no_grad():
        model(input_ids=ids)
    weights = captured.result()[0]["weights"][0]
    for row in (0, 17, 39):
        read = (weights[:, row] > 0).any(0).nonzero()[:, 0]
        assert torch.equal(read, method.keys_read(row))


@pytest.mark.parametrize("block", [2, 3])
def test_blocks_are_counted_from_the_first_real_token(block):
    contract.check_padding(decoder("Llama"), lambda: small(block=block), length=24)


def test_the_user_is_told_what_a_fixed_mask_costs(caplog):
    with headway.use(CAUSAL["mistral sliding"](), small()):
        assert "loses quality" in caplog.text
        assert "window of their own" in caplog.text


def test_short_texts_and_wide_windows_are_the_hosts_own_bits():
    model = decoder("Llama")
    ids = contract.tokens(1, 20)
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with headway.use(model, PowerAttention(block=4, window=5)) as handle:
            assert torch.equal(model(input_ids=ids).logits, native)
    assert {p for row in handle.report() for p in row["paths"]} == {"native"}


def test_full_layers_stay_dense():
    model = decoder("Llama")
    with headway.use(model, small(full_layers=[0, 2])) as handle, torch.no_grad():
        model(input_ids=contract.tokens(1, 20))
    assert [row["layer"] for row in handle.report()] == [1]
    with pytest.raises(ArgumentError, match="full_layers"):
        headway.use(model, small(full_layers=[3])).attach()


def test_without_its_powers_the_mask_is_a_window_with_sinks():
    distance = torch.arange(30)[:, None] - torch.arange(30)
    window = ((distance < 3) | (torch.arange(30) < 1)) & (distance >= 0)
    powers = sum((distance == 2**k) for k in range(5)).bool()
    assert torch.equal(power_mask(30, window=3, sink=1) & ~(powers & ~window), window)


def test_gradients_of_the_masked_and_gathered_forms_agree():
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 21)
    grads = []
    for observed in (False, True):
        model.zero_grad()
        scope = headway.capture(model, what=("entropy",)) if observed else None
        with headway.use(model, small()):
            if scope is not None:
                with scope:
                    model(input_ids=ids, labels=ids).loss.backward()
            else:
                model(input_ids=ids, labels=ids).loss.backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    torch.testing.assert_close(grads[0], grads[1], atol=1e-5, rtol=1e-3)


def test_bad_numbers_are_refused():
    for options in ({"window": 0}, {"sink": -1}, {"base": 1}):
        with pytest.raises(ArgumentError, match="window, sink, base"):
            PowerAttention(**options)
    with pytest.raises(ArgumentError, match="block: got 0"):
        PowerAttention(block=0)
    with pytest.raises(ArgumentError, match="pattern"):
        pattern_mask("star", 8, degree=3)
    with pytest.raises(ArgumentError, match="degree"):
        pattern_mask("window", 8, degree=0)
    with pytest.raises(ArgumentError, match="mask: got shape"):
        reach(torch.ones(2, 3, dtype=torch.bool), 2)


def test_a_cache_that_starts_inside_a_block_is_refused():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, 1, 8, generator=generator)
    key, value = (torch.randn(1, 2, 9, 8, generator=generator) for _ in range(2))
    call = AttentionCall.from_tensors(query, key, value, first_key=3, first_query=11)
    with pytest.raises(ArgumentError, match="first key stands at 3"):
        small().select(call)
