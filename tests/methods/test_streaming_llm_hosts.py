"""StreamingLLM on the paper's families of hosts, on hosts whose layers have shorter windows of their own, and for
thousands of steps: in each of them what the cache holds is what a step reads."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, DECODER, decoder, sharpen

import headway
from headway.errors import HostError, InterceptionError
from headway.hosts.tiny import tiny_host
from headway.methods.sinks.streaming_llm import StreamingLLM


def pythia():
    return tiny_host("gpt_neox", num_hidden_layers=2)[0]


def test_pythia_turns_a_part_of_its_heads_and_streams():
    model = pythia()
    ids = contract.tokens(2, 120, vocabulary=min(model.config.vocab_size, 90))
    with headway.use(model, StreamingLLM(sinks=2, window=5, rebase_at=30)), torch.no_grad():
        steps, chunks = (contract.run_in_chunks(model, ids, c) for c in ([1] * 120, [50, 7, 63]))
        whole = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(steps, chunks, atol=2e-4, rtol=0)
    torch.testing.assert_close(steps, whole, atol=2e-4, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(steps[:, 20:], model(input_ids=ids).logits[:, 20:], atol=1e-2)


@pytest.mark.parametrize(
    "check",
    [contract.check_causality, contract.check_batch, contract.check_padding, contract.check_reorder_and_reset,
     contract.check_generate],
)  # fmt: skip
def test_pythia_keeps_the_contract(check):
    check(pythia(), lambda: StreamingLLM(sinks=2, window=5))
    contract.check_equals_dense(pythia(), lambda: StreamingLLM(sinks=2, window=18))


@pytest.mark.parametrize(
    ("name", "options", "module"),
    [("falcon", {}, "FalconAttention"), ("falcon", {"alibi": True}, "FalconAttention"), ("mpt", {}, "MptAttention")],
)
def test_hosts_that_compute_attention_themselves_say_so(name, options, module):
    """Nothing could be streamed there, with rotary positions or ALiBi."""
    model, inputs = tiny_host(name, **options)
    with pytest.raises(InterceptionError, match=rf"hard-coded attention \({module}\)"):
        headway.use(model, StreamingLLM(sinks=2, window=5)).attach()
    with torch.no_grad():
        assert torch.isfinite(model(**inputs).logits).all()


def test_learned_positions_are_refused_with_what_cannot_be_moved():
    model = CAUSAL["gpt2"]()
    message = r"part of every stored key, and a bias by distance \(ALiBi\)"
    with headway.use(model, StreamingLLM(sinks=2, window=5)), torch.no_grad(), pytest.raises(HostError, match=message):
        model(input_ids=contract.tokens(1, 12), use_cache=True)


def gemma3():
    """Its middle layer reads all, with rotary frequencies of its own."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = tf.Gemma3TextConfig(**DECODER, sliding_window=6, query_pre_attn_scalar=8, layer_types=kinds)
    return sharpen(tf.Gemma3ForCausalLM(config))


#: Layers of these hosts read 6 tokens, their own among them, but for some of `gemma3` and gpt-oss.
NARROW = {
    "mistral": lambda: decoder("Mistral", sliding_window=6),
    "gemma3": gemma3,
    "gpt-oss": CAUSAL["gpt-oss learned sinks"],
}


@pytest.mark.parametrize("name", NARROW)
def test_layers_with_a_shorter_window_store_what_they_can_read(name):
    model = NARROW[name]()
    kinds = getattr(model.config, "layer_types", None) or ["sliding_attention"] * 3
    held = [2 + (5 if kind == "sliding_attention" else 40) for kind in kinds]
    token = 2 * DECODER["num_key_value_heads"] * DECODER["head_dim"] * 4
    for chunks in ([60], [50] + [1] * 10, [1] * 60):
        with headway.use(model, StreamingLLM(sinks=2, window=40)), torch.no_grad():
            cache, start = None, 0
            for chunk in chunks:
                ids = contract.tokens(1, 60)[:, start : start + chunk]
                cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
                start += chunk
            assert [layer.stored for layer in cache.layers] == held
            assert cache.stored_bytes() == token * sum(held)
            room = max(layer._key.shape[2] for layer, count in zip(cache.layers, held, strict=True) if count == 7)
            assert room <= 2 + 6 + 2 * 64


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("options", [{}, {"evict": "before"}, {"positions": "text"}, {"rebase_at": 50}])
def test_with_shorter_windows_steps_chunks_and_the_whole_agree(name, options):
    """Also the single step, which reads a narrow layer from its own buffer."""
    model = NARROW[name]()
    ids = contract.tokens(2, 60)
    with headway.use(model, StreamingLLM(**{"sinks": 2, "window": 20, **options})), torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for chunks in ([1] * 60, [30] + [1] * 30, [7] * 8 + [4]):
            got = contract.run_in_chunks(model, ids, chunks)
            torch.testing.assert_close(got, whole, atol=2e-4, rtol=0)


def test_padded_rows_agree_with_rows_alone_where_windows_are_short():
    contract.check_padding(gemma3(), lambda: StreamingLLM(sinks=2, window=20), length=50)


def test_a_token_is_held_as_long_as_any_layer_can_read_it_and_room_leaves_short_windows_whole():
    model = gemma3()
    with headway.use(model, StreamingLLM(sinks=2, window=20)), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 40), use_cache=True).past_key_values
        assert [cache.contains(place) for place in (1, 2, 19, 20, 39)] == [True, False, False, True, True]
        before = [layer.stored for layer in cache.layers]
        cache.evict_for_space(10)
    assert set(before) == {7, 22}
    assert [layer.stored for layer in cache.layers] == [min(count, 12) for count in before]


STEPS, EVERY = 2400, 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_thousands_of_single_steps_equal_reading_what_the_cache_holds(dtype):
    """One layer sees tokens alone: each looked-at step is the host on the held tokens, at positions without a gap. In
    bfloat16 the error stays that of reading afresh, however often keys were turned back."""
    exact = decoder("Llama", num_hidden_layers=1)
    model = decoder("Llama", num_hidden_layers=1).to(dtype)
    ids = contract.tokens(1, STEPS)
    errors, floor = [], []
    policy = StreamingLLM(sinks=2, window=9, evict="before", rebase_at=25)
    with torch.no_grad():
        with headway.use(model, policy):
            cache, rows, held = None, [], []
            for step in range(STEPS):
                out = model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                if step >= 20 and step % EVERY == 0:
                    rows.append(out.logits[0, -1].float())
                    held.append([0, 1, *range(step - 8, step + 1)])
        assert cache.turned_back > STEPS - 50
        assert cache.layers[0].held()[0].tolist() == [0, 1, *range(STEPS - 8, STEPS)]
        for row, kept in zip(rows, held, strict=True):
            want = exact(input_ids=ids[:, kept], use_cache=False).logits[0, -1]
            errors.append(float((row - want).norm() / want.norm()))
            again = model(input_ids=ids[:, kept], use_cache=False).logits[0, -1].float()
            floor.append(float((again - want).norm() / want.norm()))
    early, late = (torch.tensor(part).mean() for part in (errors[:50], errors[-50:]))
    if dtype == torch.float32:
        assert max(errors) < 1e-4
    else:
        assert late < 1.3 * early
        assert torch.tensor(errors).mean() < 1.5 * torch.tensor(floor).mean()
        assert 1e-4 < max(errors) < 0.1
