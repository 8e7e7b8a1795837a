"""StreamingLLM: the contract of cache policies, and the invariants and bad input of its own."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, DECODER, decoder, t5, whisper

import headway
from headway.door import AttentionCall
from headway.errors import ArgumentError, ConflictError, HostError
from headway.hosts.tiny import tiny_host
from headway.kernels.dense import dense_attention
from headway.kernels.rope import rotate
from headway.methods.sinks.streaming_llm import (
    CARD,
    StreamingLLM,
    ZeroSink,
    add_sink_token,
    at_budget,
    streaming_perplexity,
    with_sink,
)
from headway.tasks.perplexity import perplexity, recompute_perplexity

HOSTS = {
    "llama": CAUSAL["llama"],
    "multi-query": CAUSAL["multi-query"],
    "qwen3": CAUSAL["qwen3"],
    "mistral sliding": CAUSAL["mistral sliding"],
    "gemma3 sliding": CAUSAL["gemma3 sliding"],
    "gemma2 soft cap": CAUSAL["gemma2 soft cap"],
    "gpt-oss learned sinks": CAUSAL["gpt-oss learned sinks"],
    "olmo2": lambda: decoder("Olmo2"),
    "phi, partly rotated": lambda: decoder("Phi", num_key_value_heads=4, partial_rotary_factor=0.5),
}


def small() -> StreamingLLM:
    return StreamingLLM(sinks=2, window=5)


def test_card_names_the_paper():
    assert (CARD.slug, CARD.arxiv, CARD.stages) == ("streaming-llm", "2309.17453", ("CachePolicy", "Editor"))


#: Their sliding layers keep to their own window, beyond which sinks would be added to what the host reads.
SLIDING = ("mistral sliding", "gemma3 sliding", "gemma2 soft cap", "gpt-oss learned sinks")


@pytest.mark.parametrize("name", HOSTS)
def test_a_window_as_long_as_the_text_is_dense(name):
    sinks = 0 if name in SLIDING else 2
    limit = 1e-5 if name == "llama" else 2e-4
    contract.check_equals_dense(HOSTS[name](), lambda: StreamingLLM(sinks=sinks, window=60), atol=limit)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral sliding", "gpt-oss learned sinks"])
@pytest.mark.parametrize(
    "check",
    [contract.check_causality, contract.check_requests_apart, contract.check_batch, contract.check_padding,
     contract.check_reorder_and_reset, contract.check_generate, contract.check_refuses_crop],
)  # fmt: skip
def test_the_contract(name, check):
    check(HOSTS[name](), small)


def test_lengths():
    contract.check_lengths(decoder("Llama"), small, 7)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3 sliding", "phi, partly rotated"])
@pytest.mark.parametrize(
    "options", [{}, {"evict": "before"}, {"positions": "text"}, {"sinks": 0}, {"sinks": 1, "window": 1}]
)
def test_token_by_token_chunked_and_parallel_forms_agree(name, options):
    model = HOSTS[name]()
    ids = contract.tokens(2, 40)
    make = lambda: StreamingLLM(**{"sinks": 2, "window": 5, **options})  # noqa: E731
    with headway.use(model, make()), torch.no_grad():
        want = contract.run_in_chunks(model, ids, [1] * 40)
        for chunks in ([40], [7] * 5 + [5], [16, 16, 8], [3, 30, 1, 1, 5]):
            torch.testing.assert_close(contract.run_in_chunks(model, ids, chunks), want, atol=1e-4, rtol=0)
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(whole, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("evict", ["after", "before"])
def test_a_step_equals_attention_over_slots_of_the_cache(evict):
    """One layer by hand: raw keys, rotated by slot, as the paper writes it."""
    model = decoder("Llama", num_hidden_layers=1)
    sinks, window = 2, 4
    ids = contract.tokens(1, 20)
    with headway.use(model, StreamingLLM(sinks=sinks, window=window, evict=evict)), torch.no_grad():
        got = contract.run_in_chunks(model, ids, [1] * 20)
    layer, inner = model.model.layers[0], model.model
    frequencies = inner.rotary_emb.inv_freq
    with torch.no_grad():
        stream = inner.embed_tokens(ids)
        normed = layer.input_layernorm(stream)
        heads = lambda x, n: x.view(1, 20, n, 8).transpose(1, 2)  # noqa: E731
        q = heads(layer.self_attn.q_proj(normed), 4)
        k, v = heads(layer.self_attn.k_proj(normed), 2), heads(layer.self_attn.v_proj(normed), 2)
        past = window if evict == "after" else window - 1
        rows = []
        for t in range(20):
            kept = [j for j in range(t + 1) if j < sinks or t - j <= past]
            slots = torch.arange(len(kept))
            keys = rotate(k[:, :, kept], slots, frequencies).repeat_interleave(2, 1)
            query = rotate(q[:, :, t : t + 1], slots[-1:], frequencies)
            weights = (query @ keys.transpose(-1, -2) * 8**-0.5).softmax(-1)
            rows.append(weights @ v[:, :, kept].repeat_interleave(2, 1))
        out = torch.cat(rows, 2).transpose(1, 2).reshape(1, 20, -1)
        hidden = stream + layer.self_attn.o_proj(out)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        want = model.lm_head(inner.norm(hidden))
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_sinks_stay_for_ever_and_evicted_tokens_change_nothing():
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 30)
    other = ids.clone()
    other[0, 5:20] = (other[0, 5:20] + 11) % 80 + 3
    with headway.use(model, small()), torch.no_grad():
        a, b = (contract.run_in_chunks(model, x, [25, 1, 1, 1, 1, 1]) for x in (ids, other))
        cache = model(input_ids=ids, use_cache=True).past_key_values
    torch.testing.assert_close(a[:, 26:], b[:, 26:], atol=1e-6, rtol=0)
    assert not torch.allclose(a[:, 20], b[:, 20])
    assert [cache.contains(p) for p in (0, 1, 2, 24, 25, 29)] == [True, True, False, False, True, True]
    assert cache.layers[0].held().tolist() == [[0, 1, 25, 26, 27, 28, 29]]


@pytest.mark.parametrize("chunk", [1, 9])
def test_positions_stay_bounded_and_nothing_drifts_when_keys_are_turned_back(chunk):
    model = decoder("Llama")
    ids = contract.tokens(2, 150)
    chunks = [chunk] * (150 // chunk) + ([150 % chunk] if 150 % chunk else [])
    ids, mask = contract.padded_left(ids, [0, 3])
    with headway.use(model, StreamingLLM(sinks=2, window=6, rebase_at=10_000)):
        want = contract.run_in_chunks(model, ids, chunks, mask)
    seen = []
    with headway.use(model, StreamingLLM(sinks=2, window=6, rebase_at=20)):
        hook = model.model.rotary_emb.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(int(kwargs.get("position_ids", args[-1]).max())), with_kwargs=True
        )
        got = contract.run_in_chunks(model, ids, chunks, mask)
        hook.remove()
    # The row without padding stands three positions further than the other.
    assert max(seen) <= 20 + chunk + 3
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-4, rtol=0)


def test_bytes_and_buffers_are_flat_over_thousands_of_tokens():
    model = decoder("Llama", num_hidden_layers=1)
    held, rooms = set(), set()
    with headway.use(model, StreamingLLM(sinks=4, window=60)), torch.no_grad():
        cache = None
        for turn in range(40):
            out = model(input_ids=contract.tokens(1, 100, seed=turn), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            for _ in range(3):
                out = model(input_ids=contract.tokens(1, 1), past_key_values=cache)
            held.add(cache.stored_bytes())
            rooms.add(cache.layers[0]._key.shape[2])
    assert cache.get_seq_length() == 40 * 103
    assert held == {64 * 2 * 2 * 8 * 4}
    assert max(rooms) <= 4 + 61 + 64 + 100


def test_generate_runs_past_the_positions_of_the_host():
    model = decoder("Llama", num_hidden_layers=1)
    with headway.use(model, StreamingLLM(sinks=2, window=20)) as handle:
        out = model.generate(
            contract.tokens(1, 5), max_new_tokens=400, min_new_tokens=400, do_sample=False, pad_token_id=0
        )
        logits = contract.run_in_chunks(model, out[:, :-1], [7] * 57 + [5])
    logits[..., 2] = -torch.inf
    assert out[0, 5:].tolist() == logits[0, 4:].argmax(-1).tolist()
    assert len(set(out[0, 300:].tolist())) > 1
    assert {p for row in handle.report() for p in row["paths"]} == {"policy"}


def test_room_for_a_turn(caplog):
    model = decoder("Llama", num_hidden_layers=1)
    with headway.use(model, StreamingLLM(sinks=2, window=8)), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 30), use_cache=True).past_key_values
        cache.evict_for_space(5)
        assert cache.layers[0].held().tolist() == [[0, 1, 27, 28, 29]]
        cache.evict_for_space(8)
        assert cache.layers[0].held().tolist() == [[0, 1]]
        assert "only the sinks stay" in caplog.text
        model(input_ids=contract.tokens(1, 3), past_key_values=cache)
        assert cache.layers[0].held().tolist() == [[0, 1, 30, 31, 32]]
        with pytest.raises(ArgumentError, match="tokens: got -1"):
            cache.evict_for_space(-1)


def test_a_prompt_shorter_than_the_sinks_fills_them_as_tokens_come():
    model = decoder("Llama")
    ids = contract.tokens(1, 12)
    with headway.use(model, StreamingLLM(sinks=4, window=30)), torch.no_grad():
        got = contract.run_in_chunks(model, ids, [2] + [1] * 10)
    with torch.no_grad():
        torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-4, rtol=0)


def test_bad_numbers_and_hosts_are_refused():
    with pytest.raises(ArgumentError, match="sinks: got -1"):
        StreamingLLM(sinks=-1, window=5)
    with pytest.raises(ArgumentError, match="window: got 0"):
        StreamingLLM(sinks=2, window=0)
    with pytest.raises(ArgumentError, match="positions"):
        StreamingLLM(positions="slots")
    with pytest.raises(ArgumentError, match="evict"):
        StreamingLLM(evict="never")
    with pytest.raises(ArgumentError, match="rebase_at: got 10"):
        StreamingLLM(sinks=4, window=4, rebase_at=10)
    with pytest.raises(ArgumentError, match=r"4 \+ 1020 = 1024, expected no more than the 128 positions"):
        _run(decoder("Llama"), StreamingLLM())
    with pytest.raises(HostError, match="without rotary positions"):
        _run(CAUSAL["gpt2"](), small())
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3)]
    call = AttentionCall.from_tensors(*tensors, bias=torch.randn(1, 2, 4, 4, generator=generator))
    with pytest.raises(HostError, match="position bias"):
        small().read(call)


def _run(model, policy):
    with headway.use(model, policy), torch.no_grad():
        model(input_ids=contract.tokens(1, 12), use_cache=True)


def test_layers_with_a_narrower_window_keep_to_it(caplog):
    model = CAUSAL["mistral sliding"]()
    ids = contract.tokens(1, 30)
    with headway.use(model, StreamingLLM(sinks=0, window=40)), torch.no_grad():
        got = contract.run_in_chunks(model, ids, [10] * 3)
        want = model(input_ids=ids, use_cache=False)
    assert "keep to it" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(got, model(input_ids=ids).logits, atol=1e-4, rtol=0)
    assert torch.isfinite(want.logits).all()


def test_perplexity_of_a_stream_does_not_depend_on_chunks_and_equals_dense_when_nothing_goes():
    model = decoder("Llama")
    ids = contract.tokens(1, 60)
    by_token = streaming_perplexity(model, ids, chunk=1, sinks=2, window=10)
    by_chunk = streaming_perplexity(model, ids, chunk=13, sinks=2, window=10)
    torch.testing.assert_close(by_token.nll, by_chunk.nll, atol=1e-4, rtol=0)
    assert by_token.cache_bytes < perplexity(model, ids, chunk=13).cache_bytes
    dense = perplexity(model, ids, chunk=60)
    whole = streaming_perplexity(model, ids, chunk=13, sinks=2, window=60)
    torch.testing.assert_close(whole.nll, dense.nll, atol=1e-4, rtol=0)


def test_recomputation_reads_every_window_afresh():
    model = decoder("Llama")
    ids = contract.tokens(1, 30)
    found = recompute_perplexity(model, ids, [12, 29], length=12, batch=1)
    with torch.no_grad():
        logits = model(input_ids=ids[:, 17:29]).logits[0, -1]
    assert float(found[1]) == pytest.approx(float(-logits.log_softmax(-1)[ids[0, 29]]), abs=1e-5)
    with pytest.raises(ArgumentError, match="windows of 12 and runs of 1 in 30 tokens"):
        recompute_perplexity(model, ids, [11], length=12)


def test_a_run_shares_a_reading_and_its_contexts_begin_at_one_token():
    """Runs of one are single windows; in a run of four the contexts are two shorter to one longer than asked for."""
    model = decoder("Llama")
    ids = contract.tokens(1, 40)
    single = torch.cat([recompute_perplexity(model, ids, [20 + i], length=10 + i) for i in range(4)])
    run = recompute_perplexity(model, ids, [20, 30], length=12, run=4, batch=3)
    torch.testing.assert_close(run[:4], single, atol=1e-5, rtol=0)
    assert run.shape == (8,)
    assert not torch.allclose(run[:4], recompute_perplexity(model, ids, range(20, 24), length=12), atol=1e-3)
    for places, options in (([37], {"run": 4}), ([9], {"run": 4}), ([20], {"run": 0}), ([20], {"run": 24})):
        with pytest.raises(ArgumentError, match="windows of 12 and runs of"):
            recompute_perplexity(model, ids, places, length=12, **options)


def test_windows_read_afresh_can_begin_with_a_token_of_the_models_own():
    model = decoder("Llama")
    ids = contract.tokens(1, 40)
    front = torch.tensor([1])
    found = recompute_perplexity(model, ids, [20], length=9, front=front)
    with torch.no_grad():
        logits = model(input_ids=torch.cat([front[None], ids[:, 12:20]], 1)).logits[0, -1]
    assert float(found[0]) == pytest.approx(float(-logits.log_softmax(-1)[ids[0, 20]]), abs=1e-5)


def test_a_sink_token_is_one_more_row_that_training_moves(tmp_path):
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))
    token = add_sink_token(model)
    assert token == 90
    assert model.get_input_embeddings().weight.shape[0] == 91
    ids = with_sink(contract.tokens(2, 10), token)
    assert ids[:, 0].tolist() == [90, 90]
    before = model.get_input_embeddings().weight[token].detach().clone()
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.5
    assert not torch.allclose(before, model.get_input_embeddings().weight[token])
    model.save_pretrained(tmp_path)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again.get_input_embeddings().weight[token], model.get_input_embeddings().weight[token])
    with headway.use(model, StreamingLLM(sinks=1, window=6)), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    assert cache.contains(0)


@pytest.mark.parametrize("name", ["qwen2", "stablelm", "starcoder2", "smollm3", "cohere2"])
def test_more_rotary_hosts_stream_alike_in_chunks_and_steps(name):
    model, _ = tiny_host(name)
    ids = contract.tokens(1, 24, vocabulary=min(model.config.vocab_size, 90))
    with headway.use(model, small()):
        steps, chunk = (contract.run_in_chunks(model, ids, c) for c in ([1] * 24, [24]))
    torch.testing.assert_close(steps, chunk, atol=2e-4, rtol=0)


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_agree_far_beyond_the_cache(chunk):
    model = decoder("Llama")
    ids = contract.tokens(1, 200)
    chunks = [chunk] * (200 // chunk) + ([200 % chunk] if 200 % chunk else [])
    with headway.use(model, small()), torch.no_grad():
        got = contract.run_in_chunks(model, ids, chunks)
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("options", [{}, {"sinks": 0}, {"positions": "text"}, {"rebase_at": 60}])
def test_a_long_forward_in_blocks_of_rows_equals_small_chunks(options, monkeypatch):
    """Also behind padding, with sinks in the middle of a block, and behind tokens that are there already."""
    from headway.methods.sinks.streaming_llm import policy

    monkeypatch.setattr(policy, "ROW_BLOCK", 8)
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 90), [0, 10])
    make = lambda: StreamingLLM(**{"sinks": 3, "window": 9, **options})  # noqa: E731
    with headway.use(model, make()):
        want = contract.run_in_chunks(model, ids, [5] * 18, mask)
        for chunks in ([90], [37, 53], [1, 88, 1]):
            got = contract.run_in_chunks(model, ids, chunks, mask)
            torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=2e-4, rtol=0)


def test_a_prompt_in_one_call_meets_the_window_alone():
    """No mask of rows × keys: each part is a block of rows with the keys in reach."""
    model = decoder("Llama", num_hidden_layers=1, max_position_embeddings=4096)
    sizes = []

    class Watching(StreamingLLM):
        def read(self, call):
            parts = super().read(call)
            sizes.extend((part.queries, part.keys) for part in parts)
            return parts

    with headway.use(model, Watching(sinks=4, window=100)) as handle, torch.no_grad():
        model(input_ids=contract.tokens(1, 3000), use_cache=True)
    assert max(queries for queries, _ in sizes) == 256
    assert max(keys for _, keys in sizes) == 256 + 100
    assert handle.report()[0]["density"] < 0.13


def test_without_sinks_it_is_the_hosts_own_sliding_window():
    """A window of W past tokens and the token itself is a sliding window of W + 1."""
    sliding = decoder("Mistral", sliding_window=6)
    free = decoder("Mistral", sliding_window=None)
    ids = contract.tokens(2, 40)
    with torch.no_grad():
        want = sliding(input_ids=ids).logits
    with headway.use(free, StreamingLLM(sinks=0, window=5)):
        got = contract.run_in_chunks(free, ids, [20] + [1] * 20)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[40], [20] + [1] * 20, [7] * 5 + [5]])
def test_a_hosts_shorter_window_is_the_window_and_the_sinks_stand_before_it(chunks):
    """Effective W = min(W, the host's): a wider one changes neither what is read nor how far away the sinks seem."""
    sliding, free = decoder("Mistral", sliding_window=6), decoder("Mistral", sliding_window=None)
    ids = contract.tokens(1, 40)
    with headway.use(sliding, StreamingLLM(sinks=2, window=30)):
        got = contract.run_in_chunks(sliding, ids, chunks)
    with headway.use(free, StreamingLLM(sinks=2, window=5)):
        want = contract.run_in_chunks(free, ids, chunks)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def test_the_sinks_hold_the_first_tokens_for_ever_in_every_row_and_no_padding():
    model = decoder("Llama", num_hidden_layers=1)
    ids, mask = contract.padded_left(contract.tokens(2, 60), [0, 7])
    with headway.use(model, StreamingLLM(sinks=3, window=6, rebase_at=20)), torch.no_grad():
        first = model(input_ids=ids[:, :12], attention_mask=mask[:, :12], use_cache=True).past_key_values
        layer = first.layers[0]
        key, value = layer.sink_store.key.clone(), layer.sink_store.value.clone()
        for step in range(12, 60):
            model(input_ids=ids[:, step : step + 1], attention_mask=mask[:, : step + 1], past_key_values=first)
    assert torch.equal(layer.sink_store.key, key)
    assert torch.equal(layer.sink_store.value, value)
    assert layer.sink_store.positions.tolist() == [[0, 1, 2], [0, 1, 2]]
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        normed = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids[1:, 7:10]))
        own = attention.v_proj(normed).view(1, 3, 2, 8).transpose(1, 2)
    torch.testing.assert_close(value[1:], own, atol=1e-6, rtol=0)


def test_nothing_drifts_in_ten_thousand_steps():
    """One layer sees tokens alone: the end of a long stream equals that of a short one with the same ends."""
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 10_050)
    short = torch.cat([ids[:, :2], ids[:, -40:]], 1)
    with headway.use(model, StreamingLLM(sinks=2, window=9, rebase_at=30)), torch.no_grad():
        chunks = [50] * 200 + [1] * 50
        long = contract.run_in_chunks(model, ids, chunks)[:, -20:]
        near = contract.run_in_chunks(model, short, [2] + [1] * 40)[:, -20:]
    torch.testing.assert_close(long, near, atol=1e-4, rtol=0)


@pytest.mark.parametrize("window", [8, 64, 256])
def test_only_the_sinks_are_turned_at_a_step_however_long_the_window(window):
    model = decoder("Llama", num_hidden_layers=1, max_position_embeddings=1024)
    with headway.use(model, StreamingLLM(sinks=3, window=window)), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, window + 20), use_cache=True).past_key_values
        before = cache.layers[0].turned
        for _ in range(10):
            model(input_ids=contract.tokens(1, 1), past_key_values=cache)
    assert cache.layers[0].turned - before == 3 * 10


def test_a_buffer_takes_what_it_needs_and_not_what_a_long_window_might():
    model = decoder("Llama", num_hidden_layers=1, max_position_embeddings=100_000)
    with headway.use(model, StreamingLLM(sinks=4, window=90_000)), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 20), use_cache=True).past_key_values
    assert cache.layers[0]._key.shape[2] < 200


def test_a_zero_sink_is_one_more_key_with_logit_and_value_zero():
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 6, 8, generator=generator) for _ in range(3))
    call = ZeroSink().edit_call(AttentionCall.from_tensors(query, key, value, causal=True))
    got, _ = call.attend()
    zero = torch.zeros(1, 2, 1, 8)
    mask = torch.cat([torch.ones(6, 1), torch.ones(6, 6).tril()], 1).bool()[None, None]
    want, _ = dense_attention(query, torch.cat([zero, key], 2), torch.cat([zero, value], 2), mask=mask)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    with pytest.raises(HostError, match="learned sinks"):
        ZeroSink().edit_call(call)


def test_a_zero_sink_trains():
    model = decoder("Llama")
    ids = contract.tokens(2, 12)
    with headway.use(model, ZeroSink()):
        model(input_ids=ids, labels=ids).loss.backward()
    assert all(bool(p.grad.isfinite().all()) for p in model.parameters())


def test_other_hosts_that_cannot_stream_are_refused():
    for model, inputs in (t5(), whisper()):
        with headway.use(model, small()), torch.no_grad(), pytest.raises(HostError, match="encoder-decoder"):
            model(**inputs, use_cache=True)
    model, inputs = tiny_host("llama4_text")
    with headway.use(model, small()), torch.no_grad(), pytest.raises(HostError, match="reads in chunks"):
        model(**inputs | {"use_cache": True})
    for name, message in (("gemma3n_text", "share keys"), ("jamba", "layers of type linear_attention")):
        model, inputs = tiny_host(name)
        with headway.use(model, small()), torch.no_grad(), pytest.raises(HostError, match=message):
            model(**inputs | {"use_cache": True})


def test_a_scope_over_some_layers_is_refused():
    with pytest.raises(ConflictError, match="expected the whole model"):
        headway.use(decoder("Llama"), small(), layers=[1]).attach()


@pytest.mark.parametrize(("share", "tokens"), [(0.5, 100), (0.1, 1000), (0.02, 100), (0.01, 100)])
def test_a_budget_share_is_the_share_of_tokens_stored(share, tokens):
    model = decoder("Llama", num_hidden_layers=1)
    (policy,) = at_budget(share, tokens=tokens, model=model)
    assert policy.capacity == round(share * tokens)
    if tokens > 100:
        return
    with headway.use(model, policy), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, tokens), use_cache=True).past_key_values
    assert cache.layers[0].stored == policy.capacity


def test_all_of_the_budget_is_dense_and_bad_shares_are_named():
    model = decoder("Llama")
    contract.check_equals_dense(model, lambda: at_budget(1.0, tokens=4, model=model)[0], atol=1e-5)
    for bad in ({"share": 0.0, "tokens": 5}, {"share": 1.5, "tokens": 5}, {"share": 0.5, "tokens": 0}):
        with pytest.raises(ArgumentError, match="share, tokens"):
            at_budget(**bad, model=model)


@pytest.mark.real
def test_a_real_model_needs_its_first_tokens():
    from headway.hosts import default_text, load, tokenize

    model, tokenizer = load("smollm2")
    ids = tokenize(tokenizer, default_text(), 400)
    with_sinks = streaming_perplexity(model, ids, chunk=100, skip=200, sinks=4, window=92)
    alone = streaming_perplexity(model, ids, chunk=100, skip=200, sinks=0, window=96)
    assert alone.perplexity > 1.5 * with_sinks.perplexity
