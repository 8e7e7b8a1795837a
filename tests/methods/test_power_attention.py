"""PowerAttention: the mask, its reach, and the model with it in every phase."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, OTHERS, decoder

import headway
from headway.door import AttentionCall, BlockMask
from headway.door.call import Forward
from headway.errors import ArgumentError, NumericError
from headway.kernels.block_sparse import block_sparse_attention
from headway.methods.long_context.power_attention import (
    CARD,
    PATTERNS,
    PowerAttention,
    at_budget,
    fine_tune,
    hops_to_all,
    hybrid_layers,
    key_blocks,
    mask_density,
    pattern_mask,
    power_mask,
    reach,
    reached,
)
from headway.methods.long_context.power_attention.training import rate


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
    assert int(mask.sum(1).max()) <= window + sink + (base - 1) * powers
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


def test_powers_alone_reach_everything_with_one_block_of_window_and_no_sink():
    """63 blocks back has six 1-bits, every other distance below 64 fewer: sums of 1, 6, 15, 20, 15, 6 and 1."""
    mask = power_mask(64, window=1, sink=0)
    assert reach(mask, 6) == [7, 22, 42, 57, 63, 64]
    assert not bool(reached(mask, 5)[-1][0])
    assert hops_to_all(mask) == 6


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


def test_the_defaults_are_the_papers_and_each_doubling_adds_one_block():
    method = PowerAttention()
    assert (method.block, method.window, method.sink, method.base) == (256, 5, 1, 2)
    degrees = [method.degree(256 * 2**k) for k in range(5, 12)]
    assert degrees == list(range(degrees[0], degrees[0] + 7))
    # Shorter than one block: the own block is everything.
    assert method.degree(9) == 1
    assert method.keys_read(9).tolist() == list(range(10))


@given(blocks=st.integers(2, 200), window=st.integers(1, 4), sink=st.integers(0, 2))
@settings(max_examples=30, deadline=None)
def test_log_many_layers_reach_everything_from_everywhere(blocks, window, sink):
    mask = power_mask(blocks, window=window, sink=sink)
    layers = (blocks - 1).bit_length()
    for start in {blocks - 1, blocks // 2}:
        assert reach(mask, layers, start)[-1] == start + 1


@given(blocks=st.integers(2, 90), base=st.integers(3, 5))
@settings(max_examples=20, deadline=None)
def test_in_base_p_a_distance_takes_as_many_hops_as_it_has_digits_that_are_not_zero(blocks, base):
    mask = power_mask(blocks, window=1, sink=0, base=base)
    distance, digits = blocks - 1, 0
    while distance:
        digits, distance = digits + (distance % base > 0), distance // base
    assert bool(reached(mask, max(digits, 1))[-1][0])


def test_longnet_segments_are_blind_across_their_borders_and_every_pattern_keeps_to_its_degree():
    segments = pattern_mask("segments", 64, degree=9, sink=0)
    assert hops_to_all(segments) is None
    # The largest segment has 4 · 3 blocks; the last block stands in the one that begins at 60.
    assert int(reached(segments, 64)[-1].nonzero().min()) == 60
    for pattern in PATTERNS:
        mask = pattern_mask(pattern, 64, degree=9)
        assert int(mask.sum(1).max()) <= 11
        assert not mask.triu(1).any()
        assert bool(mask.diagonal().all())


def test_the_hybrid_keeps_two_of_every_seven_layers():
    assert len(hybrid_layers(28)) == 8
    assert hybrid_layers(8) == (0, 1, 7)
    assert hybrid_layers(6, full=0) == ()
    with pytest.raises(ArgumentError, match="full, group: got 8 of 7"):
        hybrid_layers(28, full=8)


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
    with headway.use(model, small()):
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


@pytest.mark.parametrize("name", ["llama", "gpt-oss learned sinks", "gemma2 soft cap"])
@pytest.mark.parametrize("pads", [[0, 5], [3, 8], [0, 0]])
def test_padding_and_ragged_chunks_still_run_by_blocks_and_read_what_the_mask_says(name, pads):
    model = CAUSAL[name]()
    ids, mask = contract.padded_left(contract.tokens(2, 40), pads)
    method = PowerAttention(block=4, window=2, sink=1)
    with headway.use(model, method, layers=[1]) as handle:
        got = contract.run_in_chunks(model, ids, [27, 13], mask)
    assert set(handle.report()[0]["paths"]) == {"blocks"}
    for row, pad in enumerate(pads):
        with headway.use(model, method, layers=[1]):
            alone = contract.run_in_chunks(model, ids[row : row + 1, pad:], [1] * (40 - pad))
        torch.testing.assert_close(got[row, pad:], alone[0], atol=2e-4, rtol=0)


@pytest.mark.parametrize("sink", [0, 1, 3])
@pytest.mark.parametrize(("start", "queries"), [(0, 24), (8, 16), (9, 15), (21, 3), (23, 1), (13, 4)])
@pytest.mark.parametrize("pad", [0, 3])
def test_a_chunk_anywhere_reads_what_the_mask_says_row_by_row(sink, start, queries, pad):
    """Prefill, chunks and decoding, at a block's edge or not: every row reads the keys of its own position."""
    method = small(sink=sink)
    generator = torch.Generator().manual_seed(0)
    keys = start + queries
    query = torch.randn(1, 2, queries, 8, generator=generator)
    key = torch.randn(1, 2, keys, 8, generator=generator)
    padding = torch.arange(keys)[None] >= pad
    call = AttentionCall.from_tensors(query, key, key, causal=True, forward=Forward(padding=padding))
    chosen = method.select(call).to_bool(queries, keys, torch.device("cpu"))[0, 0]
    chosen = chosen & (torch.arange(keys) <= torch.arange(start, keys)[:, None])
    for row in range(queries):
        at = start + row - pad
        want = [at + pad] if at < 0 else [int(k) + pad for k in method.keys_read(at)]
        assert chosen[row].nonzero()[:, 0].tolist() == want, (row, at)
    assert queries < 3 or not bool(chosen.all())


@pytest.mark.parametrize("pads", [None, [3]])
@pytest.mark.parametrize("draft", ["lookup", "its own layers", "another model"])
def test_assisted_decoding_gives_the_greedy_text(pads, draft):
    """Guesses are checked in one forward, whose rows read what each of them would read alone."""
    model, ids = decoder("Llama"), contract.tokens(1, 6).repeat(1, 4)
    mask = None
    if pads:
        ids, mask = contract.padded_left(ids, pads)
    options = {"max_new_tokens": 16, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    guesses = {
        "lookup": {"prompt_lookup_num_tokens": 3},
        "its own layers": {"assistant_model": decoder("Llama")},
        "another model": {"assistant_model": decoder("Llama", num_hidden_layers=1)},
    }[draft]
    with headway.use(model, small()):
        want = model.generate(ids, **options)
        got = model.generate(ids, **guesses, **options)
    assert got.tolist() == want.tolist()
    assert want.tolist() != model.generate(ids, **options).tolist()


@pytest.mark.parametrize("pads", [[0, 0], [0, 5]])
@pytest.mark.parametrize("name", ["llama", "llama eager", "gpt2"])
def test_a_static_cache_gives_what_a_growing_one_gives(name, pads):
    """`generate` hands a host with a static cache masks of pairs: padding has to be read from those."""
    model = CAUSAL[name]()
    ids, mask = contract.padded_left(contract.tokens(2, 24), pads)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    with headway.use(model, small()):
        growing, static = (model.generate(ids, cache_implementation=c, **options) for c in ("dynamic", "static"))
    for got, want in zip(static.logits, growing.logits, strict=True):
        torch.testing.assert_close(got, want, atol=2e-4, rtol=0)


def test_narrowed_blocks_are_reported_with_the_density_of_what_was_read():
    model = decoder("Llama", num_hidden_layers=1)
    ids, mask = contract.padded_left(contract.tokens(1, 41), [5])
    method = PowerAttention(block=4, window=2, sink=1)
    with headway.use(model, method) as handle, torch.no_grad():
        model(input_ids=ids, attention_mask=mask)
    read = sum(method.keys_read(position).numel() for position in range(36))
    assert handle.report()[0]["density"] == pytest.approx(read / (36 * 37 / 2), abs=0.02)


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


@pytest.mark.parametrize("method", [PowerAttention(), PowerAttention(block=24, window=1, sink=0)], ids=["own", "least"])
@pytest.mark.parametrize("pads", [None, [0, 5]])
def test_a_text_shorter_than_one_block_is_the_hosts_own_bits(method, pads):
    """Whatever the window and the sink: its only block is its own."""
    model, (ids, mask) = decoder("Llama"), (contract.tokens(2, 20), None)
    if pads:
        ids, mask = contract.padded_left(ids, pads)
    for chunks in ([20], [9, 9, 1, 1]):
        native = contract.run_in_chunks(model, ids, chunks, mask)
        with headway.use(model, method) as handle:
            assert torch.equal(contract.run_in_chunks(model, ids, chunks, mask), native)
        assert {p for row in handle.report() for p in row["paths"]} == {"native"}


def test_full_layers_stay_dense():
    model = decoder("Llama")
    with headway.use(model, small(full_layers=[0, 2])) as handle, torch.no_grad():
        model(input_ids=contract.tokens(1, 20))
    assert [row["layer"] for row in handle.report()] == [1]
    with pytest.raises(ArgumentError, match="full_layers"):
        headway.use(model, small(full_layers=[3])).attach()


def test_layers_that_stay_dense_are_the_hosts_own_bits():
    model, ids = decoder("Llama"), contract.tokens(1, 20)
    with torch.no_grad():
        native = model(input_ids=ids, output_hidden_states=True).hidden_states
        with headway.use(model, small(full_layers=hybrid_layers(3))):
            mixed = model(input_ids=ids, output_hidden_states=True).hidden_states
    assert [torch.equal(a, b) for a, b in zip(native, mixed, strict=True)] == [True, True, True, False]


def test_a_mask_can_be_looked_at():
    mask = power_mask(6, window=1, sink=0)[None, None]
    assert BlockMask(mask, 12, 12, 2, 2).plot().splitlines()[-1] == "·█·███"


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


@pytest.mark.parametrize("form", ["masked", "gather", "flex"])
def test_every_form_of_the_executor_gives_the_same_output_and_gradients(form):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, 40, 8, generator=generator)
    key, value = (torch.randn(1, 2, 40, 8, generator=generator) for _ in range(2))
    mask = power_mask(10, window=2)[None, None]
    common = {"query_block": 4, "key_block": 4, "causal": True}
    output, lse = block_sparse_attention(query, key, value, mask, form=form, **common)
    wanted, wanted_lse = AttentionCall.from_tensors(
        query, key, value, causal=True, mask=mask.repeat_interleave(4, 2).repeat_interleave(4, 3)
    ).attend()
    torch.testing.assert_close(output, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, wanted_lse, atol=1e-5, rtol=1e-5)
    if form == "flex":
        # FlexAttention has no backward pass on the CPU; the executor says so before torch does.
        with pytest.raises(ArgumentError, match="form: got 'flex' with gradients on the CPU"):
            block_sparse_attention(query.clone().requires_grad_(), key, value, mask, form=form, **common)
        return
    grads = []
    for kind in ("masked", form):
        parts = [x.clone().requires_grad_() for x in (query, key, value)]
        block_sparse_attention(*parts, mask, form=kind, **common)[0].square().sum().backward()
        grads.append([x.grad for x in parts])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_queries_alone_can_be_trained():
    """As with adapters on the query projection: keys and values require no gradients."""
    model = decoder("Llama", num_hidden_layers=1).requires_grad_(False)
    projection = model.model.layers[0].self_attn.q_proj.weight.requires_grad_(True)
    ids = contract.tokens(2, 40)
    grads = []
    for masked in (False, True):
        projection.grad = None
        with headway.use(model, small(), selftest=False):
            scope = headway.capture(model, what=("entropy",)) if masked else nullcontext()
            with scope:
                model(input_ids=ids, labels=ids).loss.backward()
        grads.append(projection.grad.clone())
    torch.testing.assert_close(*grads, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "gemma2 soft cap", "gpt-oss learned sinks"])
@pytest.mark.parametrize("pads", [None, [0, 5]])
def test_gradients_through_the_executor_are_those_of_a_plain_mask(name, pads):
    """Beside the same loss with explicit weights, which an observer of weights makes the door compute."""
    model = CAUSAL[name]()
    ids, mask = contract.tokens(2, 22), None
    if pads:
        ids, mask = contract.padded_left(ids, pads)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    grads = []
    for explicit in (False, True):
        model.zero_grad()
        with headway.use(model, small(), selftest=False):
            if explicit:
                with headway.capture(model, what=("entropy",)):
                    model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
            else:
                model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        grads.append([p.grad.clone() for n, p in model.named_parameters() if "q_proj.weight" in n or "v_proj" in n])
    for one, other in zip(*grads, strict=True):
        assert float(one.abs().max()) > 0
        torch.testing.assert_close(one, other, atol=1e-4 * float(other.abs().max()), rtol=1e-3)


def repeated(batch: int, count: int, seed: int = 0):
    """Batches of one short pattern, which a tiny model learns at once."""
    row = contract.tokens(1, 6, seed=seed).repeat(batch, 4)
    return [row] * count


def test_fine_tuning_lowers_the_loss_and_leaves_everything_else_as_it_was():
    model = decoder("Llama", num_hidden_layers=2).eval()
    ids = repeated(2, 1)[0]
    found = fine_tune(model, repeated(2, 25), small(), steps=25, learning_rate=3e-3, warmup=3)
    assert found.steps == 25
    assert found.tokens == 25 * 48
    assert found.losses[-1] < 0.5 * found.losses[0]
    assert not model.training
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with headway.use(model, small()):
            assert not torch.equal(model(input_ids=ids).logits, native)
        assert torch.equal(model(input_ids=ids).logits, native)


def test_training_runs_through_the_sparse_executor_and_only_what_requires_gradients_moves():
    model = decoder("Llama", num_hidden_layers=2)
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    before = {n: p.clone() for n, p in model.named_parameters()}
    seen = []

    class Watching(PowerAttention):
        def select(self, call):
            chosen = super().select(call)
            seen.append((type(chosen).__name__, call.query.requires_grad))
            return chosen

    fine_tune(model, repeated(1, 2), Watching(block=2, window=2), steps=2, warmup=0)
    assert ("Blocks", True) in seen
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved
    assert all("layers.1" in n for n in moved)


def test_padded_batches_with_labels_train_too():
    model = decoder("Llama", num_hidden_layers=2)
    ids, mask = contract.padded_left(repeated(2, 1)[0], [0, 5])
    batch = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    found = fine_tune(model, [batch] * 15, small(), steps=15, learning_rate=3e-3, warmup=2)
    assert found.losses[-1] < found.losses[0]


def test_the_learning_rate_rises_and_falls():
    assert [rate(step, 10, 2) for step in (0, 1, 2, 10)] == [0.5, 1.0, 1.0, 0.0]
    assert rate(6, 10, 2) == pytest.approx(0.5)


def test_bad_training_is_refused_and_the_scope_is_left(caplog):
    model = decoder("Llama", num_hidden_layers=1)
    ids = repeated(1, 1)[0]
    with pytest.raises(ArgumentError, match="got 1, expected one for each of 2 steps"):
        fine_tune(model, [ids], small(), steps=2)
    assert "loses quality" not in caplog.text
    for options in (
        {"steps": 0},
        {"steps": 1, "learning_rate": 0},
        {"steps": 1, "warmup": -1},
        {"steps": 1, "clip": 0},
    ):
        with pytest.raises(ArgumentError, match="steps, learning_rate"):
            fine_tune(model, [ids], small(), **options)
    with pytest.raises(ArgumentError, match="input_ids and labels"):
        fine_tune(model, [{"input_ids": ids}], small(), steps=1)
    with pytest.raises(ArgumentError, match="no parameter that requires gradients"):
        fine_tune(model.requires_grad_(False), [ids], small(), steps=1)
    model.requires_grad_(True)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NumericError, match="loss at step 0"):
        fine_tune(model, [ids], small(), steps=1)
    assert not model.training
    with headway.use(model, small(), selftest=False) as handle:
        pass
    assert handle.report() == [] or all(not row["calls"] for row in handle.report())


@given(tokens=st.integers(20, 3000), share=st.floats(0.15, 0.9))
@settings(max_examples=25, deadline=None)
def test_a_budget_is_the_share_that_is_read(tokens, share):
    (method,) = at_budget(share, tokens=tokens, model=torch.nn.Identity())
    blocks = -(-tokens // method.block)
    density = mask_density(power_mask(blocks, window=method.window), tokens, method.block)
    if tokens >= 400:
        assert share - 0.25 < density <= share
    wider = mask_density(power_mask(blocks, window=method.window + 1), tokens, method.block)
    assert wider > share


def test_a_budget_in_a_model_is_the_density_of_the_report_and_all_of_it_is_dense():
    model = decoder("Llama")
    ids = contract.tokens(1, 120)
    with torch.no_grad():
        native = model(input_ids=ids).logits
        (method,) = at_budget(0.4, tokens=120, model=model)
        with headway.use(model, method) as handle:
            model(input_ids=ids)
        assert all(0.3 < row["density"] <= 0.4 for row in handle.report())
        with headway.use(model, *at_budget(1.0, tokens=120, model=model)):
            assert torch.equal(model(input_ids=ids).logits, native)
    for share, tokens in ((0, 100), (1.5, 100), (0.5, 0)):
        with pytest.raises(ArgumentError, match=r"share|tokens"):
            at_budget(share, tokens=tokens, model=model)


@pytest.mark.parametrize("name", ["llama", "multi-query", "gpt2"])
def test_generation_beams_and_taking_tokens_back_work(name):
    model = CAUSAL[name]()
    contract.check_generate(model, small, length=17)
    ids = contract.tokens(1, 20)
    with headway.use(model, small()), torch.no_grad():
        whole = model(input_ids=ids).logits
        cache = model(input_ids=ids[:, :18], use_cache=True).past_key_values
        cache.crop(-3)
        again = model(input_ids=ids[:, 15:], past_key_values=cache).logits
    torch.testing.assert_close(again, whole[:, 15:], atol=2e-4, rtol=0)


def test_a_host_that_looks_both_ways_is_refused():
    model, inputs = OTHERS["vit"]()
    with headway.use(model, small()), pytest.raises(ArgumentError, match="looks both ways"):
        model(**inputs)


def test_a_trained_model_gets_no_warning(caplog):
    with headway.use(decoder("Llama"), small(trained=True)):
        assert "loses quality" not in caplog.text


def test_bad_numbers_are_refused():
    for name, value in {"window": 0, "sink": -1, "base": 1, "block": 0}.items():
        with pytest.raises(ArgumentError, match=f"{name}: got {value}"):
            PowerAttention(**{name: value})
    with pytest.raises(ArgumentError, match="pattern"):
        pattern_mask("star", 8, degree=3)
    with pytest.raises(ArgumentError, match="degree"):
        pattern_mask("window", 8, degree=0)
    with pytest.raises(ArgumentError, match="mask: got shape"):
        reach(torch.ones(2, 3, dtype=torch.bool), 2)


@pytest.mark.parametrize("queries", [1, 12])
def test_a_cache_that_has_dropped_keys_keeps_what_is_left_of_the_mask(queries):
    """As in a sliding layer: key 0 stands at position 3, inside a block of 2."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 2, queries, 8, generator=generator)
    key, value = (torch.randn(1, 2, 27, 8, generator=generator) for _ in range(2))
    call = AttentionCall.from_tensors(query, key, value, first_key=3, first_query=30 - queries)
    chosen = small().select(call).to_bool(queries, 27)[0, 0]
    for row in range(queries):
        position = 30 - queries + row
        want = [k - 3 for k in small().keys_read(position).tolist() if k >= 3]
        assert chosen[row].nonzero()[:, 0].tolist() == want


@pytest.mark.real
def test_a_real_model_reads_the_mask_in_prefill_and_decoding():
    from headway.hosts import default_text, tokenize

    model, tokenizer = headway.load("smollm2")
    ids = tokenize(tokenizer, default_text(), 333)
    method = PowerAttention(block=16, window=3, sink=1)
    with headway.use(model, method) as handle:
        whole = contract.run_in_chunks(model, ids, [333])
    density = mask_density(power_mask(21, window=3), 333, 16)
    assert all(row["density"] == pytest.approx(density) for row in handle.report())
    with headway.use(model, method):
        pieces = contract.run_in_chunks(model, ids, [250, 79, 1, 1, 1, 1])
    torch.testing.assert_close(pieces, whole, atol=2e-2, rtol=0)
