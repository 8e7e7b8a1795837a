"""StreamingLLM at its edges: what is stored token by token, the row that loses a key first, room for a turn, hosts with
scaled rotary frequencies, and hosts that cannot stream."""

from __future__ import annotations

import pytest
import torch
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, bert, decoder, whisper

import headway
from headway.door import AttentionCall, Editor
from headway.errors import ArgumentError, HostError
from headway.kernels.rope import rotate
from headway.methods.sinks.streaming_llm import StreamingLLM, ZeroSink


def small(**options) -> StreamingLLM:
    return StreamingLLM(**{"sinks": 2, "window": 5} | options)


@pytest.mark.parametrize("check", contract.ONCE)
def test_what_it_meets_beside_it(check):
    check(CAUSAL["llama"](), small)


def test_the_defaults_are_those_of_the_third_party_library():
    policy = StreamingLLM()
    assert (policy.sinks, policy.window, policy.capacity) == (4, 1020, 1024)
    assert (policy.positions, policy.evict) == ("cache", "after")


@pytest.mark.parametrize(("evict", "most"), [("after", 7), ("before", 6)])
def test_all_tokens_are_stored_up_to_the_capacity_and_then_as_many(evict, most):
    """A step sees its own token beside what is stored, so "before" stores one less."""
    model = decoder("Llama")
    with headway.use(model, small(evict=evict)), torch.no_grad():
        cache, seen = None, 0
        for chunk in [1, 1, 1, 2, 1, 1, 1, 1, 9, 1]:
            cache = model(input_ids=contract.tokens(1, chunk), past_key_values=cache, use_cache=True).past_key_values
            seen += chunk
            assert {layer.stored for layer in cache.layers} == {min(seen, most)}
            assert cache.stored_bytes() == 3 * 2 * 2 * 8 * 4 * min(seen, most) or seen < 3


@pytest.mark.parametrize(("evict", "whole"), [("after", 8), ("before", 7)])
@pytest.mark.parametrize("chunks", ["steps", "one"])
def test_the_first_row_that_differs_from_dense_is_the_one_behind_a_full_cache(evict, whole, chunks):
    model = decoder("Llama")
    ids = contract.tokens(1, whole + 1)
    with headway.use(model, small(evict=evict)):
        got = contract.run_in_chunks(model, ids, [whole + 1] if chunks == "one" else [1] * (whole + 1))
    with torch.no_grad():
        dense = model(input_ids=ids).logits
    torch.testing.assert_close(got[:, :whole], dense[:, :whole], atol=1e-4, rtol=0)
    assert not torch.allclose(got[:, whole], dense[:, whole], atol=1e-2)


@pytest.mark.parametrize(("evict", "reach"), [("after", 5), ("before", 4)])
def test_a_token_is_seen_for_as_many_rows_as_the_window_is_long(evict, reach):
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 24)
    other = ids.clone()
    other[0, 10] = (other[0, 10] + 7) % 80 + 3
    with headway.use(model, small(evict=evict)):
        a, b = (contract.run_in_chunks(model, x, [8] + [1] * 16) for x in (ids, other))
    differs = ((a - b).abs().amax(-1)[0] > 1e-6).nonzero()[:, 0].tolist()
    assert differs == list(range(10, 10 + reach + 1))


class Lambda(Editor):
    """The mask of sinks and window, at the positions of the text."""

    def edit_call(self, call):
        i, j = torch.arange(call.queries)[:, None], torch.arange(call.keys)[None]
        return call.replace(mask=((j <= i) & ((j < 2) | (i - j <= 5)))[None, None], causal=False)


def test_positions_of_the_text_are_a_mask_and_positions_of_the_cache_are_not():
    model = decoder("Llama")
    ids = contract.tokens(2, 30)
    with headway.use(model, Lambda()), torch.no_grad():
        masked = model(input_ids=ids, use_cache=False).logits
    with headway.use(model, small(positions="text")):
        torch.testing.assert_close(contract.run_in_chunks(model, ids, [9, 1, 20]), masked, atol=1e-4, rtol=0)
    with headway.use(model, small()):
        got = contract.run_in_chunks(model, ids, [9, 1, 20])
    torch.testing.assert_close(got[:, :8], masked[:, :8], atol=1e-4, rtol=0)
    assert not torch.allclose(got[:, 20:], masked[:, 20:], atol=1e-2)


def by_hand(model, ids, kept: list[list[int]]) -> torch.Tensor:
    """Logits of a host of one layer whose row t sees the tokens kept[t], itself last, each at its slot in the list."""
    layer, inner = model.model.layers[0], model.model
    frequencies, count = inner.rotary_emb.inv_freq, ids.shape[1]
    with torch.no_grad():
        stream = inner.embed_tokens(ids)
        normed = layer.input_layernorm(stream)
        heads = lambda x, n: x.view(1, count, n, 8).transpose(1, 2)  # noqa: E731
        q = heads(layer.self_attn.q_proj(normed), 4)
        k, v = heads(layer.self_attn.k_proj(normed), 2), heads(layer.self_attn.v_proj(normed), 2)
        rows = []
        for t, tokens in enumerate(kept):
            slots = torch.arange(len(tokens))
            keys = rotate(k[:, :, tokens], slots, frequencies).repeat_interleave(2, 1)
            weights = (rotate(q[:, :, t : t + 1], slots[-1:], frequencies) @ keys.mT * 8**-0.5).softmax(-1)
            rows.append(weights @ v[:, :, tokens].repeat_interleave(2, 1))
        hidden = stream + layer.self_attn.o_proj(torch.cat(rows, 2).transpose(1, 2).reshape(1, count, -1))
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
        return model.lm_head(inner.norm(hidden))


@pytest.mark.parametrize("room", [3, 5, 8])
@pytest.mark.parametrize("chunks", [[1] * 14, [6, 1, 7], [14]])
def test_behind_room_for_a_turn_positions_are_slots_of_what_is_left(room, chunks):
    """Slots stay without a gap: the turn moves up to the sinks, until the window is full again."""
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 44)
    with headway.use(model, StreamingLLM(sinks=2, window=8)), torch.no_grad():
        cache = model(input_ids=ids[:, :30], use_cache=True).past_key_values
        cache.evict_for_space(room)
        got, start = [], 30
        for chunk in chunks:
            out = model(input_ids=ids[:, start : start + chunk], past_key_values=cache)
            got.append(out.logits)
            start += chunk
    oldest = 30 - (8 - room)
    kept = [[j for j in range(t + 1) if j < 2 or t - j <= 8] for t in range(30)]
    kept += [[0, 1, *range(max(oldest, t - 8), t + 1)] for t in range(30, 44)]
    torch.testing.assert_close(torch.cat(got, 1), by_hand(model, ids, kept)[:, 30:], atol=1e-4, rtol=0)


def test_a_row_with_fewer_tokens_than_sinks_keeps_them_all_and_no_padding():
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 12), [0, 11])
    chunks = [12] + [1] * 14
    more = contract.tokens(2, 14, seed=3)
    whole, real = torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)
    with headway.use(model, StreamingLLM(sinks=4, window=6)):
        got = contract.run_in_chunks(model, whole, chunks, real)
        alone = contract.run_in_chunks(model, whole[1:, 11:], [1] * 15)
    torch.testing.assert_close(got[1, 11:], alone[0], atol=1e-4, rtol=0)


SCALED = {
    "linear": {"factor": 2.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 64},
}
CHANGING = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 64, "factor": 2.0,
    },
}  # fmt: skip


def scaled(kind: str, **options):
    return decoder("Llama", rope_parameters={"rope_type": kind, "rope_theta": 1e4, **options})


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_frequencies_are_the_hosts_own(kind):
    model = scaled(kind, **SCALED[kind])
    ids = contract.tokens(1, 150)
    with headway.use(model, small()):
        steps, chunks = (contract.run_in_chunks(model, ids, c) for c in ([1] * 150, [50] * 3))
    torch.testing.assert_close(steps, chunks, atol=2e-4, rtol=0)
    contract.check_equals_dense(model, lambda: StreamingLLM(sinks=2, window=60))


@pytest.mark.parametrize("kind", CHANGING)
def test_frequencies_that_change_with_the_length_are_refused(kind):
    """A key turned by one table cannot be moved by another."""
    model = scaled(kind, **CHANGING[kind])
    for cached in (True, False):
        with headway.use(model, small()), torch.no_grad(), pytest.raises(HostError, match=rf"length \({kind}\)"):
            model(input_ids=contract.tokens(1, 12), use_cache=cached)


def test_hosts_that_cannot_stream_are_refused_without_a_cache_too():
    for model, policy, error, message in (
        (CAUSAL["gpt2"](), small(), HostError, "without rotary positions"),
        (decoder("Llama"), StreamingLLM(), ArgumentError, "no more than the 128 positions"),
    ):
        with headway.use(model, policy), torch.no_grad(), pytest.raises(error, match=message):
            model(input_ids=contract.tokens(1, 12), use_cache=False)
    for (model, inputs), message in ((whisper(), "sees the future"), (bert(), "sees the future")):
        inputs = inputs | {"use_cache": False}
        with headway.use(model, small()), torch.no_grad(), pytest.raises(HostError, match=message):
            model(**inputs)


def test_attention_outside_a_forward_of_the_model_is_refused():
    tensors = [torch.zeros(1, 2, 4, 8)] * 3
    with pytest.raises(HostError, match="outside a forward"):
        small().read(AttentionCall.from_tensors(*tensors, causal=True))


def test_a_zero_sink_streams_along():
    """Trained and run with one: before the cache is full it is the dense host with a zero sink, and chunks agree."""
    model = decoder("Llama")
    ids = contract.tokens(2, 40)
    with headway.use(model, ZeroSink()), torch.no_grad():
        dense = model(input_ids=ids, use_cache=False).logits
    with headway.use(model, StreamingLLM(sinks=2, window=60), ZeroSink()):
        torch.testing.assert_close(contract.run_in_chunks(model, ids, [20] + [1] * 20), dense, atol=1e-4, rtol=0)
    with headway.use(model, small(), ZeroSink()):
        steps, chunk = (contract.run_in_chunks(model, ids, c) for c in ([1] * 40, [17, 23]))
    torch.testing.assert_close(steps, chunk, atol=1e-4, rtol=0)
    with headway.use(model, small()):
        assert not torch.allclose(contract.run_in_chunks(model, ids, [17, 23]), chunk, atol=1e-2)


def test_room_and_places_that_cannot_be_are_named_and_an_empty_cache_holds_nothing():
    """A sink that has not come stands at −1 in the store; no token is there."""
    model = decoder("Llama", num_hidden_layers=1)
    assert not small().make_cache(model).contains(0)
    with headway.use(model, small(sinks=4)), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 2), use_cache=True).past_key_values
    assert [cache.contains(place) for place in range(4)] == [True, True, False, False]
    for call, message in (
        (lambda: cache.evict_for_space(-1), "tokens: got -1"),
        (lambda: cache.evict_for_space(1.5), "tokens: got 1.5"),
        (lambda: cache.contains(-1), "position: got -1"),
    ):
        with pytest.raises(ArgumentError, match=message):
            call()


def test_a_row_whose_tokens_begin_in_a_later_chunk_is_that_row_alone():
    """Its first chunks are padding; its sinks are its own first tokens all the same, also with a step between."""
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 40), [0, 13])
    chunks = [6, 1, 5, 9] + [1] * 19
    with headway.use(model, small(rebase_at=20)):
        both = contract.run_in_chunks(model, ids, chunks, mask)
        for row, rest in ((0, chunks), (1, [8] + [1] * 19)):
            alone = contract.run_in_chunks(model, ids[row : row + 1, 40 - sum(rest) :], rest)
            torch.testing.assert_close(both[row, 40 - sum(rest) :], alone[0], atol=2e-4, rtol=0)
