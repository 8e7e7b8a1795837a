"""DuoAttention's cache: against masks written by definition, byte by byte, and through the contract of policies."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

import headway
from headway.door import AttentionCall, Editor, Selector, Window
from headway.door.stages import PHASES
from headway.errors import ArgumentError, ConflictError, HostError
from headway.hosts.tiny import tiny_host
from headway.kernels.dense import dense_attention
from headway.kernels.streaming import streaming_attention
from headway.methods.long_context.duo_attention import (
    DuoAttention,
    Gates,
    SinkRing,
    at_budget,
    reordered_heads,
    select_heads,
)

HOSTS = ["llama", "multi-query", "qwen3", "gpt2", "mistral sliding", "gemma2 soft cap", "gemma3 sliding",
         "gpt-oss learned sinks"]  # fmt: skip
PREFILL = ["streaming", "dense"]
S, R = 2, 4


def shape(model):
    config = model.config
    return config.num_hidden_layers, getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def mixed(model, seed: int = 0, **options) -> DuoAttention:
    """Random gates, half of them retrieval, unless told otherwise."""
    gates = torch.rand(shape(model), generator=torch.Generator().manual_seed(seed))
    options = {"sparsity": 0.5, "sinks": S, "recent": R} | options
    return DuoAttention(gates=gates, **options)


class Defined(Editor):
    """The whole sequence in one forward, each head with its mask by definition. `starts` are those of the chunks that
    came after the first, where a chunk is seen as a whole."""

    def __init__(self, policy: DuoAttention, pads=(0, 0), starts=None) -> None:
        self.policy, self.pads, self.starts = policy, pads, starts

    def edit_call(self, call):
        retrieval = self.policy.retrieval()[call.site.layer]
        mask = torch.zeros(call.query.shape[0], call.heads, call.queries, call.keys, dtype=torch.bool)
        for row in range(mask.shape[0]):
            first = self.pads[row]
            for head in range(call.heads):
                full = bool(retrieval[head // (call.heads // retrieval.numel())])
                for i in range(first, call.queries):
                    for j in range(first, i + 1):
                        near = i - j <= self.policy.recent or j - first < self.policy.sinks
                        if self.starts is not None:
                            start = max(s for s in self.starts if s <= i)
                            near = j >= start - self.policy.recent or j - first < self.policy.sinks or start == 0
                        inside = call.site.window is None or i - j < call.site.window
                        mask[row, head, i, j] = (full or near) and inside
        if any(self.pads):
            for row, first in enumerate(self.pads):
                mask[row, :, :first, 0] = True
        return call.replace(mask=mask, causal=False)


def defined(model, policy, ids, mask=None, pads=(0, 0), starts=None):
    inputs = {} if mask is None else {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with headway.use(model, Defined(policy, pads, starts)), torch.no_grad():
        return model(input_ids=ids, use_cache=False, **inputs).logits


def cached(model, policy, ids):
    with headway.use(model, policy), torch.no_grad():
        return model(input_ids=ids, use_cache=True).past_key_values


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("prefill", PREFILL)
def test_no_streaming_head_is_dense(name, prefill):
    model = CAUSAL[name]()
    limit = 1e-5 if name == "llama" else 1e-4
    contract.check_equals_dense(model, lambda: mixed(model, sparsity=0.0, prefill=prefill), atol=limit)


@pytest.mark.parametrize("prefill", PREFILL)
def test_no_streaming_head_leaves_the_first_forward_to_the_host(prefill):
    model = decoder("Llama")
    ids = contract.tokens(2, 20)
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with headway.use(model, mixed(model, sparsity=0.0, prefill=prefill)):
            assert torch.equal(model(input_ids=ids).logits, native)


@pytest.mark.parametrize("name", HOSTS)
def test_sinks_and_recent_tokens_that_cover_the_text_are_dense(name):
    model = CAUSAL[name]()
    limit = 1e-5 if name == "llama" else 1e-4
    contract.check_equals_dense(model, lambda: mixed(model, sparsity=1.0, sinks=5, recent=15), atol=limit)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("prefill", PREFILL)
@pytest.mark.parametrize(
    "check",
    [contract.check_causality, contract.check_requests_apart, contract.check_batch, contract.check_padding,
     contract.check_reorder_and_reset, contract.check_generate, contract.check_refuses_crop],
)  # fmt: skip
def test_it_meets_the_contract_of_cache_policies(name, prefill, check):
    model = CAUSAL[name]()
    check(model, lambda: mixed(model, prefill=prefill))


@pytest.mark.parametrize(
    "name", ["llama", "multi-query", "qwen3", "mistral sliding", "gemma2 soft cap", "gpt-oss learned sinks"]
)
@settings(max_examples=12, deadline=None)
@given(
    cuts=st.sets(st.integers(1, 17), max_size=6),
    sparsity=st.sampled_from([0.3, 0.5, 1.0]),
    numbers=st.tuples(st.integers(0, 4), st.integers(1, 7)),
    seed=st.integers(0, 3),
)
def test_any_split_equals_the_definition(name, cuts, sparsity, numbers, seed):
    model = CAUSAL[name]()
    policy = mixed(model, seed, sparsity=sparsity, sinks=numbers[0], recent=numbers[1])
    ids = contract.tokens(2, 18, seed=seed)
    edges = [0, *sorted(cuts), 18]
    with headway.use(model, policy):
        got = contract.run_in_chunks(model, ids, [b - a for a, b in itertools.pairwise(edges)])
    torch.testing.assert_close(got, defined(model, policy, ids), atol=1e-4, rtol=0)


@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(6, 17), max_size=4), pads=st.tuples(st.integers(0, 5), st.integers(0, 5)))
def test_padded_rows_equal_the_definition_in_any_split(cuts, pads):
    model = decoder("Llama")
    policy = mixed(model, sparsity=1.0)
    ids, mask = contract.padded_left(contract.tokens(2, 18), list(pads))
    edges = [0, *sorted(cuts), 18]
    with headway.use(model, policy):
        got = contract.run_in_chunks(model, ids, [b - a for a, b in itertools.pairwise(edges)], mask)
    want = defined(model, policy, ids, mask, pads)
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=0)


def test_long_prompts_in_row_blocks_equal_the_definition(monkeypatch):
    """Blocks of 256 rows are tried with blocks of 5."""
    from headway.kernels import streaming
    from headway.methods.long_context.duo_attention import reading as module

    model = decoder("Llama")
    spans = streaming.stream_spans
    monkeypatch.setattr(module, "ROW_BLOCK", 5)
    monkeypatch.setattr(module, "stream_spans", lambda rows, **options: spans(rows, block=5, **options))
    ids, mask = contract.padded_left(contract.tokens(2, 40), [0, 3])
    policy = mixed(model)
    for chunks in ([40], [17, 20, 1, 1, 1], [1] * 4 + [36]):
        with headway.use(model, policy):
            got = contract.run_in_chunks(model, ids, chunks, mask)
        want = defined(model, policy, ids, mask, (0, 3))
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=0)
    for chunks in ([40], [17, 20, 1, 1, 1]):
        starts = [sum(chunks[:i]) for i in range(len(chunks))]
        policy = mixed(model, prefill="dense")
        with headway.use(model, policy):
            got = contract.run_in_chunks(model, ids, chunks, mask)
        want = defined(model, policy, ids, mask, (0, 3), starts)
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("chunks", [[18], [7, 11], [5, 6, 4, 1, 1, 1], [9, 1, 8]])
def test_dense_prefill_sees_sinks_recent_and_the_same_chunk(chunks):
    model = decoder("Llama")
    policy = mixed(model, prefill="dense")
    ids = contract.tokens(2, 18)
    starts = [sum(chunks[:i]) for i in range(len(chunks))]
    with headway.use(model, policy):
        got = contract.run_in_chunks(model, ids, chunks)
    torch.testing.assert_close(got, defined(model, policy, ids, starts=starts), atol=1e-4, rtol=0)


def test_a_forward_without_a_cache_reads_the_same():
    model = CAUSAL["mistral sliding"]()
    ids, mask = contract.padded_left(contract.tokens(2, 18), [0, 4])
    policy = mixed(model, sinks=1, recent=3)
    inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with headway.use(model, policy), torch.no_grad():
        got = model(input_ids=ids, use_cache=False, **inputs).logits
    want = defined(model, policy, ids, mask, (0, 4))
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-4, rtol=0)


def test_query_heads_of_a_kv_head_share_its_decision():
    model = decoder("Llama", num_hidden_layers=1, num_key_value_heads=2)
    seen = []

    class Sites(Editor):
        reads_parts = PHASES

        def edit_weights(self, call, weights, rows):
            seen.append((call.of_heads.tolist(), call.keys))
            return weights

    policy = DuoAttention(gates=[[0.1, 0.9]], threshold=0.5, sinks=1, recent=2)
    with headway.use(model, policy, Sites()):
        contract.run_in_chunks(model, contract.tokens(1, 10), [9, 1])
    assert sorted(seen[-2:]) == [([0, 1], 4), ([2, 3], 10)]


@pytest.mark.parametrize("prefill", PREFILL)
def test_what_is_stored_is_the_formula_to_the_byte(prefill):
    """Σ over layers of 2·d·4·( full heads · t + streaming heads · min(t, S + R) ), after every forward."""
    model = decoder("Llama")
    policy = mixed(model, prefill=prefill)
    full = int(policy.retrieval().sum())
    streaming = policy.retrieval().numel() - full
    assert full == 3
    with headway.use(model, policy), torch.no_grad():
        cache, seen = None, 0
        for chunk in [3, 1, 1, 9, 1, 1, 30, 1]:
            cache = model(input_ids=contract.tokens(1, chunk), past_key_values=cache, use_cache=True).past_key_values
            seen += chunk
            assert cache.get_seq_length() == seen
            assert cache.stored_bytes() == 2 * 8 * 4 * (full * seen + streaming * min(seen, S + R))
            for layer, kept in zip(cache.layers, policy.retrieval(), strict=True):
                lengths = [x.held if isinstance(x, SinkRing) else x.length for x in layer.stores]
                assert sorted(lengths, reverse=True) == [seen] * bool(kept.any()) + [min(seen, S + R)] * bool(
                    (~kept).any()
                )


def test_buffers_of_streaming_heads_are_flat_over_thousands_of_tokens():
    model = decoder("Llama", num_hidden_layers=1)
    rooms = set()
    with headway.use(model, mixed(model, sparsity=1.0)), torch.no_grad():
        cache = None
        for turn in range(30):
            for chunk in (100, 1, 1):
                ids = contract.tokens(1, chunk, seed=turn)
                cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
            rooms.add(cache.layers[0].stores[0].reserved_bytes)
    assert cache.get_seq_length() == 30 * 102
    assert rooms == {(S + R + 1) * (2 * 2 * 8 * 4 + 8)}


def test_stored_and_logical_lengths():
    model = decoder("Llama")
    contract.check_lengths(model, lambda: mixed(model, sparsity=1.0), S + R)


def test_streaming_heads_meet_a_block_and_their_reach_alone(monkeypatch):
    """Work, not only masks: of 600 keys a row meets at most those of its block of 256, R and S; a step S + R + 1."""
    model = decoder("Llama", num_hidden_layers=1)
    seen = []
    read = DuoAttention.read
    monkeypatch.setattr(DuoAttention, "read", lambda self, call: seen.append(read(self, call)) or seen[-1])
    with headway.use(model, mixed(model, sparsity=1.0)) as handle:
        contract.run_in_chunks(model, contract.tokens(1, 1000), [600, 399, 1])
    prompt, chunk, step = seen
    assert [part.of_rows for part in prompt] == [(0, 256), (256, 512), (512, 600)]
    assert [part.of_rows for part in chunk] == [(0, 256), (256, 399)]
    assert max(part.keys for part in prompt) <= 256 + R + S
    assert max(part.keys for part in chunk) <= 256 + R + (S + R + 1)
    assert [part.keys for part in step] == [S + R + 1]
    assert handle.report()[0]["density"] < 0.5


def test_the_report_tells_streaming_heads_from_retrieval_heads():
    """A step behind 40 tokens: retrieval heads read all 41 keys, streaming heads S + R + 1 of them."""
    model = decoder("Llama", num_hidden_layers=1)
    policy = mixed(model)
    found = []
    for pieces in ([40], [40, 1]):
        with headway.use(model, policy, selftest=False) as handle:
            contract.run_in_chunks(model, contract.tokens(1, sum(pieces)), pieces)
        found.append(handle.report()[0]["density_by_head"])
    step = [2 * both - prompt for prompt, both in zip(*found, strict=True)]
    whole = policy.retrieval()[0].repeat_interleave(model.config.num_attention_heads // policy.retrieval().shape[1])
    assert 0 < int(whole.sum()) < len(whole)
    assert step == pytest.approx([1.0 if kept else (S + R + 1) / 41 for kept in whole.tolist()])


def test_room_can_be_made_at_once():
    model = decoder("Llama", num_hidden_layers=1)
    cache = cached(model, mixed(model, sparsity=0.0, reserve=500), contract.tokens(1, 12))
    assert cache.layers[0].stores[0]._key.shape[2] == 500
    assert cache.stored_bytes() == 12 * 2 * 2 * 8 * 4


def test_sinks_of_padded_rows_are_their_first_tokens():
    model = decoder("Llama", num_hidden_layers=1)
    ids, mask = contract.padded_left(contract.tokens(2, 20), [0, 6])
    with headway.use(model, mixed(model, sparsity=1.0)), torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    ring = cache.layers[0].stores[0]
    held = [sorted(x for x in row if x >= 0) for row in ring.positions.tolist()]
    assert held == [[0, 1, 15, 16, 17, 18, 19], [6, 7, 15, 16, 17, 18, 19]]


def test_sliding_layers_keep_no_more_than_their_window():
    model = CAUSAL["mistral sliding"]()
    with headway.use(model, mixed(model, sparsity=0.0)), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 30), use_cache=True).past_key_values
    assert {layer.stored for layer in cache.layers} == {5}
    cache = cached(model, mixed(model, sparsity=1.0, sinks=3, recent=50), contract.tokens(1, 30))
    assert {layer.stored for layer in cache.layers} == {5}


def test_tokens_can_be_taken_back_as_long_as_nothing_was_dropped():
    model = decoder("Llama")
    ids = contract.tokens(1, 12)
    with headway.use(model, mixed(model, sinks=4, recent=8)), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        cache.crop(-3)
        assert cache.get_seq_length() == 9
        got = model(input_ids=ids[:, 9:], past_key_values=cache).logits
        torch.testing.assert_close(got, model(input_ids=ids, use_cache=False).logits[:, 9:], atol=1e-4, rtol=0)
        model(input_ids=ids[:, :1], past_key_values=cache)
        with pytest.raises(ArgumentError, match="take back 1 tokens"):
            cache.crop(-1)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_reordered_heads_change_nothing_and_come_back(name):
    model = decoder({"llama": "Llama", "qwen3": "Qwen3"}[name], attention_bias=True, num_key_value_heads=4)
    ids = contract.tokens(2, 18)
    policy = mixed(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    chunks = [9, 6, 1, 1, 1]
    with torch.no_grad():
        native = model(input_ids=ids).logits
    with headway.use(model, policy):
        want = contract.run_in_chunks(model, ids, chunks)
    with reordered_heads(model, policy.retrieval()) as order:
        assert all(row.tolist() == sorted(row.tolist(), reverse=True) for row in order)
        biases = [k for k in before if k.endswith("o_proj.bias")]
        assert all(torch.equal(model.state_dict()[k], before[k]) for k in biases)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, native, atol=1e-5, rtol=0)
        with headway.use(model, DuoAttention(gates=order.float(), threshold=0.5, sinks=S, recent=R)):
            got = contract.run_in_chunks(model, ids, chunks)
        with pytest.raises(RuntimeError), reordered_heads(model, order.flip(1)):
            raise RuntimeError
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_hosts_without_separate_projections_are_not_reordered():
    model = CAUSAL["gpt2"]()
    with pytest.raises(HostError, match="separate projections"), reordered_heads(model, torch.ones(3, 4) > 0):
        pass


def test_a_selector_of_prefill_works_beside_dense_prefill():
    class Near(Selector):
        phases = frozenset({"prefill"})

        def select(self, call):
            return Window(1, 4)

    model = decoder("Llama")
    policy = mixed(model, prefill="dense")
    with headway.use(model, Near(), policy) as handle:
        contract.run_in_chunks(model, contract.tokens(1, 14), [12, 1, 1])
        with pytest.raises(ConflictError, match=r"Near.*DuoAttention"):
            contract.run_in_chunks(model, contract.tokens(1, 14), [8, 6])
    paths = {tuple(sorted(row["paths"].items())) for row in handle.report()[1:]}
    assert paths == {(("policy", 2), ("window", 2))}
    with pytest.raises(ConflictError, match=r"DuoAttention and Near.*selects keys in prefill"):
        headway.use(model, Near(), mixed(model)).attach()


def test_flexprefill_before_and_duo_attention_behind():
    from headway.methods.long_context.flexprefill import FlexPrefill

    model = decoder("Llama", max_position_embeddings=512)
    ids = contract.tokens(1, 300)
    with headway.use(model, FlexPrefill(block=32), mixed(model, prefill="dense", sinks=8, recent=32)) as handle:
        out = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (1, 303)
    assert all(row["paths"]["policy"] == 2 for row in handle.report())


@pytest.mark.parametrize("prefill", PREFILL)
@pytest.mark.parametrize("beams", [1, 3])
def test_padded_batches_generate_what_their_rows_do(prefill, beams):
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 16), [0, 5])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": beams}
    with headway.use(model, mixed(model, prefill=prefill)):
        both = model.generate(ids, attention_mask=mask, **options)
        alone = [model.generate(ids[row : row + 1, pads:], **options) for row, pads in enumerate((0, 5))]
    assert both[:, 16:].tolist() == [alone[0][0, 16:].tolist(), alone[1][0, 11:].tolist()]


def test_beams_with_all_heads_whole_are_the_hosts_own():
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 16), [0, 5])
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 3, "attention_mask": mask}
    native = model.generate(ids, **options)
    with headway.use(model, mixed(model, sparsity=0.0)):
        assert model.generate(ids, **options).tolist() == native.tolist()


def test_assisted_decoding_works_until_something_is_dropped():
    model = decoder("Llama")
    ids = contract.tokens(1, 6).repeat(1, 3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with headway.use(model, mixed(model, sinks=8, recent=60)):
        plain = model.generate(ids, **options)
        assert model.generate(ids, prompt_lookup_num_tokens=3, **options).tolist() == plain.tolist()
    with headway.use(model, mixed(model)), pytest.raises(ArgumentError, match="without assisted decoding"):
        model.generate(ids, prompt_lookup_num_tokens=3, **options)


def test_a_scope_over_some_layers_is_refused():
    model = decoder("Llama")
    with pytest.raises(ConflictError, match="expected the whole model"):
        headway.use(model, mixed(model), layers=[0]).attach()


def test_bad_numbers_are_refused():
    gates = torch.rand(3, 2)
    for options, message in [
        ({}, "got neither"),
        ({"sparsity": 0.5, "threshold": 0.5}, "got both"),
        ({"sparsity": 1.2}, "sparsity: got 1.2"),
        ({"sparsity": -0.1}, "sparsity: got -0.1"),
        ({"sparsity": 0.5, "recent": 0}, "recent: got 0"),
        ({"sparsity": 0.5, "sinks": -1}, "sinks: got -1"),
        ({"sparsity": 0.5, "prefill": "chunked"}, "prefill"),
        ({"sparsity": 0.5, "reserve": -1}, "reserve: got -1"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            DuoAttention(gates=gates, **options)
    with pytest.raises(ArgumentError, match="finite"):
        DuoAttention(gates=torch.full((3, 2), torch.nan), sparsity=0.5)
    with pytest.raises(TypeError):
        DuoAttention(gates, 0.5)


def test_a_threshold_alone_is_enough():
    assert DuoAttention(gates=[[0.2, 0.5], [0.7, 0.4]], threshold=0.5).retrieval().tolist() == [
        [False, True], [True, False],
    ]  # fmt: skip


def test_gates_of_another_shape_or_model_are_refused():
    model = decoder("Llama")
    ids = contract.tokens(1, 8)
    with pytest.raises(ArgumentError, match=r"got shape \(3, 4\), expected \(3, 2\)"):
        cached(model, DuoAttention(gates=torch.rand(3, 4), sparsity=0.5), ids)
    short = DuoAttention(gates=torch.rand(2, 2), sparsity=0.5)
    with headway.use(model, short), torch.no_grad(), pytest.raises(ArgumentError, match=r"got shape \(2, 2\)"):
        model(input_ids=ids, use_cache=False)
    gates = Gates.of(model, torch.rand(3, 2))
    assert cached(model, DuoAttention(gates=gates, sparsity=0.5), ids).get_seq_length() == 8
    other, _ = tiny_host("llama", num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
    with pytest.raises(HostError, match="made on another model"):
        cached(other, DuoAttention(gates=gates, sparsity=0.5), ids)


@pytest.mark.parametrize(
    ("architecture", "message"),
    [("deepseek_v3", "latent attention"), ("gemma3n_text", "share keys"), ("llama4_text", "chunked")],
)
def test_hosts_without_a_cache_per_head_are_refused(architecture, message):
    model, inputs = tiny_host(architecture)
    layers = getattr(model.config, "num_hidden_layers", 2)
    heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    with (
        pytest.raises(HostError, match=message),
        headway.use(model, DuoAttention(gates=torch.rand(layers, heads), sparsity=0.5)),
    ):
        model(**inputs | {"use_cache": True})


def test_a_position_bias_is_refused():
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3)]
    call = AttentionCall.from_tensors(*tensors, bias=torch.randn(1, 2, 4, 4, generator=generator))
    with pytest.raises(HostError, match="position bias"):
        DuoAttention(gates=torch.rand(1, 2), sparsity=0.5).read(call)


def test_a_free_mask_is_refused():
    model = decoder("Llama")
    with headway.use(model, mixed(model)), pytest.raises(ArgumentError, match="four dimensions"):
        model(input_ids=contract.tokens(1, 6), attention_mask=torch.ones(1, 1, 6, 6), use_cache=True)


@pytest.mark.parametrize("name", ["llama", "multi-query", "qwen3"])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 1.0])
def test_a_budget_is_the_stored_share(name, share):
    model = CAUSAL[name]()
    (stage,) = at_budget(share, tokens=100, model=model)
    with headway.use(model, stage), torch.no_grad():
        cache = model(input_ids=contract.tokens(1, 100), use_cache=True).past_key_values
    layers, kv_heads = shape(model)
    found = cache.stored_bytes() / (layers * kv_heads * 100 * 2 * 8 * 4)
    assert share - 1 / (layers * kv_heads) - 0.01 <= found <= share + 1e-9
    if share == 1:
        assert stage.retrieval().all()


def test_a_budget_for_a_host_without_rotary_positions():
    model = CAUSAL["gpt2"]()
    (stage,) = at_budget(0.5, tokens=100, model=model)
    assert 0 < int(select_heads(stage.gates, threshold=0.5).sum()) < 12


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, 40),
    sinks=st.integers(0, 6),
    reach=st.integers(0, 45),
    block=st.integers(1, 17),
    pads=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    capped=st.booleans(),
)
def test_streaming_attention_is_dense_attention_under_its_mask(tokens, sinks, reach, block, pads, capped):
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, 4, tokens, 8, generator=generator)
    key, value = (torch.randn(2, 2, tokens, 8, generator=generator) for _ in range(2))
    first = torch.tensor(pads).clamp(max=tokens - 1)
    i, j, f = torch.arange(tokens)[:, None], torch.arange(tokens)[None], first[:, None, None]
    seen = ((j <= i) & (j >= f) & ((j - f < sinks) | (i - j <= reach)))[:, None]
    options = {"softcap": 3.0, "sinks": torch.randn(4, generator=generator)} if capped else {}
    want, _ = dense_attention(query, key, value, mask=seen, empty_rows="zero", **options)
    got = streaming_attention(
        query, key, value, sinks=sinks, reach=reach, first=first, block=block,
        softcap=options.get("softcap"), sink_logits=options.get("sinks"),
    )  # fmt: skip
    real = (torch.arange(tokens) >= first[:, None])[:, None, :, None].expand_as(got)
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=0)


def test_streaming_attention_says_what_is_wrong():
    x = torch.randn(1, 2, 4, 8)
    with pytest.raises(ArgumentError, match="got -1, 3"):
        streaming_attention(x, x, x, sinks=-1, reach=3)
    with pytest.raises(ArgumentError, match="got 4 tokens for 2 queries"):
        streaming_attention(x[:, :, :2], x, x, sinks=1, reach=3)
