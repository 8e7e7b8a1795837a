"""Bytes equal those of real caches; operations equal those that PyTorch counts; time is the roofline."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import headway
from headway.door.stages import Driver
from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.budget import budgeted, stages_at_budget
from headway.methods.long_context.duo_attention import DuoAttention, budget_split
from headway.methods.long_context.power_attention import PowerAttention
from headway.methods.long_context.recycled_attention import RecycledAttention
from headway.methods.long_context.tappa import TappaEviction
from headway.methods.sinks.streaming_llm import StreamingLLM
from headway.plan import (
    Hardware,
    Layer,
    config_of,
    footprint,
    hardware,
    kv_bytes,
    parse_tokens,
    plan,
    prompt,
    shape_of,
    step,
)  # fmt: skip
from headway.plan.check import held_bytes
from headway.plan.footprint import of_stages
from headway.plan.shape import meta_model, visible_pairs

SLOW = Hardware(name="slow", what="a toy", flops=100.0, bandwidth=10.0, memory=1e9, source="made up", type="float32")
ONE = {"dtype": "float32", "batch": 1, "devices": 1}


@cache
def llama(kv_heads: int = 2):
    """A tiny host; every test leaves it as it was."""
    return tiny_host("llama", num_key_value_heads=kv_heads)[0]


@cache
def shape_of_llama(kv_heads: int = 2):
    return shape_of(llama(kv_heads).config)


def filled(model, stages, tokens: int, chunks: int = 1) -> int:
    """Bytes that a real cache holds after so many tokens."""
    ids = torch.full((1, tokens), 9)
    past = None
    with headway.use(model, *stages), torch.no_grad():
        for piece in ids.chunk(chunks, 1):
            past = model(input_ids=piece, past_key_values=past, use_cache=True).past_key_values
    return held_bytes(past)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma2", "gemma3_text", "gemma3n_text", "phi", "gpt2"])
@pytest.mark.parametrize("tokens", [1, 4, 5, 6, 40])
def test_bytes_of_a_dense_cache_are_the_hosts(architecture, tokens):
    model, _ = tiny_host(architecture)
    shape = shape_of(model.config)
    used = footprint("dense", None, shape, tokens=tokens, model=model)
    assert kv_bytes(shape, used, dtype="float32") == filled(model, (), tokens)


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 6), st.integers(1, 20), st.sampled_from(["before", "after"]), st.integers(1, 3)
)
def test_bytes_of_streaming_llm_are_those_of_its_cache(tokens, sinks, window, evict, chunks):
    model = llama()
    stage = StreamingLLM(sinks=sinks, window=window, evict=evict)
    shape = shape_of_llama()
    used = of_stages("streaming-llm", 0.5, (stage,), shape, tokens)
    assert used.exact
    assert kv_bytes(shape, used, dtype="float32") == filled(model, (stage,), tokens, chunks)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(0, 6), st.integers(1, 20), st.integers(0, 15), st.integers(1, 3))
def test_bytes_of_duo_attention_are_those_of_its_cache(tokens, sinks, recent, heads, chunks):
    model = llama()
    gates = torch.tensor([[heads & 1, heads >> 1 & 1], [heads >> 2 & 1, heads >> 3 & 1]]).float()
    stage = DuoAttention(gates=gates, threshold=0.5, sinks=sinks, recent=recent)
    shape = shape_of_llama()
    used = of_stages("duo-attention", 0.5, (stage,), shape, tokens)
    assert used.exact
    assert kv_bytes(shape, used, dtype="float32") == filled(model, (stage,), tokens, chunks)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9])
def test_duo_attention_without_weights_takes_the_same_bytes(share):
    """Which heads keep everything needs weights; how many does not."""
    model = llama()
    shape = shape_of_llama()
    bare = footprint("duo-attention", share, shape, tokens=60, model=meta_model(model.config))
    stages = stages_at_budget("duo-attention", share, tokens=60, model=model)
    assert bare.exact
    assert kv_bytes(shape, bare, dtype="float32") == filled(model, stages, 60)
    assert budget_split(share, tokens=60, heads=4)[2] == int(stages[0].retrieval().sum())


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(3, 30), st.integers(1, 2))
def test_bytes_of_recycled_attention_are_those_of_its_cache(tokens, budget, stride):
    model = llama()
    stage = RecycledAttention(budget=budget, stride=stride + 1 if budget > stride + 1 else 1)
    shape = shape_of_llama()
    used = of_stages("recycled-attention", 0.5, (stage,), shape, tokens)
    if stage.stride == 1:
        return
    assert kv_bytes(shape, used, dtype="float32") == filled(model, (stage,), tokens)


SLIDING = {
    "streaming-llm, narrow": lambda kv: StreamingLLM(sinks=2, window=3),
    "streaming-llm, wide": lambda kv: StreamingLLM(sinks=2, window=10),
    "duo-attention, narrow": lambda kv: DuoAttention(gates=torch.eye(2, kv), threshold=0.5, sinks=1, recent=2),
    "duo-attention, wide": lambda kv: DuoAttention(gates=torch.eye(2, kv), threshold=0.5, sinks=2, recent=8),
    "recycled-attention": lambda kv: RecycledAttention(budget=5, stride=2),
}


@pytest.mark.parametrize("name", SLIDING)
@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text", "mistral"])
def test_bytes_in_sliding_layers_are_those_of_the_cache(architecture, name):
    model, _ = tiny_host(architecture)
    shape = shape_of(model.config)
    stage = SLIDING[name](shape.layers[0].kv_heads)
    for tokens in (3, 6, 12, 40):
        used = of_stages("x", 0.5, (stage,), shape, tokens)
        assert kv_bytes(shape, used, dtype="float32") == filled(model, (stage,), tokens), tokens


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 60), st.integers(2, 30), st.integers(1, 8))
def test_tappa_eviction_holds_its_budget_and_a_quarter_more_at_most(tokens, budget, window):
    """Layers share what the plan gives them as a mean; which of them let go early depends on the text."""
    stage = TappaEviction(budget=budget + window, window=window)
    used = of_stages("tappa", 0.5, (stage,), shape_of_llama(), tokens)
    planned = kv_bytes(shape_of_llama(), used, dtype="float32")
    # A quarter is of the share of the moment, so a key per layer and KV head may come on top of small budgets.
    queries = 2 * 4 * 16 * 4 * window + 2 * 2 * 32 * 4
    assert not used.exact
    assert planned <= filled(llama(), (stage,), tokens) <= 1.25 * planned + queries


def test_a_llama_of_70_billion_stores_328_gigabytes_at_a_million_tokens():
    planned = plan("llama-3.1-70b", tokens="1M", machine="h100")
    keys_and_values, kv_heads, dim, layers, bytes_each = 2, 8, 128, 80, 2
    assert planned.rows[0].kv_bytes == keys_and_values * kv_heads * dim * layers * bytes_each * 10**6
    assert planned.rows[0].devices_needed == 6
    assert planned.devices == 6


@given(st.integers(1, 60), st.one_of(st.none(), st.integers(1, 70)))
def test_visible_pairs_are_counted_pair_by_pair(tokens, window):
    rows, columns = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    seen = (columns <= rows) & (columns > rows - (window or tokens))
    assert visible_pairs(tokens, window) == int(seen.sum())
    layer = Layer(heads=1, kv_heads=1, key_dim=1, value_dim=1, window=window)
    assert layer.seen(tokens - 1) == int(seen[-1].sum())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "phi"])
def test_operations_of_the_weights_are_those_that_pytorch_counts(architecture):
    model, _ = tiny_host(architecture)
    shape = shape_of(model.config)
    used = footprint("dense", None, shape, tokens=24, model=model)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.full((2, 24), 9), logits_to_keep=1)
    counts = {str(op): count for op, count in counter.get_flop_counts()["Global"].items()}
    linear = sum(count for op, count in counts.items() if op in ("aten.mm", "aten.addmm"))
    found = prompt(shape, used, SLOW, dtype="float32", batch=2, devices=1)
    assert found.parts[0].flops == linear


def test_operations_of_attention_are_those_of_explicit_products():
    """Full attention multiplies all n² pairs; causal ones are n(n + 1)/2 of them."""
    model, _ = tiny_host("llama", attn_implementation="eager")
    shape = shape_of(model.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=torch.full((1, 24), 9), logits_to_keep=1)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.bmm]
    used = footprint("dense", None, shape, tokens=24, model=model)
    assert prompt(shape, used, SLOW, **ONE).parts[1].flops == products * 25 / 48


def test_a_step_reads_its_weights_and_its_cache_once():
    shape = shape_of(config_of("llama-3.1-8b"))
    used = footprint("dense", None, shape, tokens=999, model=None)
    found = step(shape, used, hardware("h100"), dtype="bfloat16", batch=1, devices=1)
    assert found.parts[0].bytes == 2 * (shape.dense_weights + shape.output_weights)
    assert found.parts[1].bytes == 2 * 32 * 8 * 256 * 1000
    assert found.parts[0].flops == found.parts[0].bytes
    assert found.bound == "weights, memory"


def test_time_is_that_of_the_slower_of_arithmetic_and_memory():
    shape = shape_of(config_of("smollm2"))
    used = footprint("dense", None, shape, tokens=64, model=None)
    for phase in (prompt, step):
        found = phase(shape, used, SLOW, **ONE)
        for part in found.parts:
            assert part.seconds == max(part.flops / 100, part.bytes / 10)
            assert part.bound == ("compute" if part.flops / 100 >= part.bytes / 10 else "memory")
        assert found.seconds == sum(part.seconds for part in found.parts)
        halved = phase(shape, used, SLOW, dtype="float32", batch=1, devices=2)
        assert halved.seconds == pytest.approx(found.seconds / 2)


def test_numbers_of_double_width_go_at_half_the_rate():
    shape = shape_of(config_of("smollm2"))
    used = footprint("dense", None, shape, tokens=4096, model=None)
    narrow, wide = (prompt(shape, used, hardware("a100"), dtype=d, batch=1, devices=1) for d in ("bfloat16", "float32"))
    assert wide.parts[1].seconds == pytest.approx(2 * narrow.parts[1].seconds)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 5), st.integers(1, 20), st.sampled_from(["before", "after"]))
def test_pairs_of_streaming_llm_are_those_of_its_mask(tokens, sinks, window, evict):
    stage = StreamingLLM(sinks=sinks, window=window, evict=evict)
    shape = shape_of_llama(4)
    used = of_stages("x", 0.5, (stage,), shape, tokens)
    rows, columns = torch.arange(tokens + 1)[:, None], torch.arange(tokens + 1)[None]
    seen = (columns <= rows) & ((columns < sinks) | (columns >= rows - stage.reach))
    assert used.layers[0].pairs == 4 * int(seen[:-1].sum())
    assert used.layers[0].read == 4 * int(seen[-1].sum())


@pytest.mark.parametrize("tokens", [40, 100, 257])
def test_power_attention_reads_the_keys_of_its_mask(tokens):
    stage = PowerAttention(block=8, window=2)
    used = of_stages("x", 0.5, (stage,), shape_of_llama(4), tokens)
    rows = [stage.keys_read(row).numel() for row in range(tokens + 1)]
    assert used.layers[0].pairs == pytest.approx(4 * sum(rows[:-1]))
    assert used.layers[0].read == 4 * rows[-1]


def plannable() -> list[str]:
    model = llama(4)
    found = []
    for slug in budgeted():
        stages = stages_at_budget(slug, 1.0, tokens=40, model=model)
        if not any(isinstance(stage, Driver) for stage in stages):
            found.append(slug)
    return found


@pytest.mark.parametrize("slug", plannable())
def test_share_one_reads_what_dense_attention_reads(slug):
    model = llama(4)
    shape = shape_of_llama(4)
    dense, used = (footprint(name, 1.0, shape, tokens=40, model=model) for name in ("dense", slug))
    assert [use.pairs for use in used.layers] == [use.pairs for use in dense.layers]
    assert [use.read for use in used.layers] == [use.read for use in dense.layers]


@pytest.mark.parametrize("slug", plannable())
def test_every_method_can_be_planned_without_weights(slug):
    planned = plan("llama-3.1-8b", tokens="1M", methods=[(slug, 0.1)])
    dense, row = planned.rows
    assert row.method == slug
    assert row.prompt.seconds <= dense.prompt.seconds * 1.01
    assert row.step.seconds <= dense.step.seconds * 1.01
    assert row.exact or row.note


def test_a_longer_context_costs_more_in_every_way():
    rows = [plan("llama-3.1-8b", tokens=n, devices=1).rows[0] for n in ("8k", "64k", "512k")]
    for one, more in pairwise(rows):
        assert one.kv_bytes * 8 == more.kv_bytes
        assert one.prompt.flops * 8 < more.prompt.flops
        assert one.step.seconds < more.step.seconds


def test_sliding_layers_stop_growing():
    short, long = (plan("gemma-3-27b", tokens=n).rows[0] for n in ("10k", "20k"))
    full_layers = 10
    assert long.kv_bytes - short.kv_bytes == full_layers * 16 * 256 * 2 * 10_000


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("4096", 4096), ("1M", 10**6), ("128k", 128_000), ("128Ki", 131_072), ("1.5k", 1500), ("100,000", 10**5), (7, 7)],
)
def test_lengths_are_read_as_they_are_written(text, tokens):
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-5", "many", "1.0001", "1e99", "5G", "nan", "99999999999999"])
def test_lengths_that_mean_nothing_are_refused(text):
    with pytest.raises(ArgumentError, match="128Ki"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"machine": "h10"}, "h100"),
        ({"dtype": "int4"}, "bfloat16"),
        ({"batch": 0}, "at least 1"),
        ({"devices": 0}, "at least 1"),
        ({"methods": [("flexprefil", 0.1)]}, "flexprefill"),
        ({"methods": [("sink-survey", 0.1)]}, "no form at a budget"),
        ({"methods": [("flexprefill", 0.0)]}, "budget"),
        ({"methods": [("flexprefill", float("nan"))]}, "budget"),
    ],
)
def test_plans_that_cannot_be_made_say_why(options, words):
    with pytest.raises(ArgumentError, match=words):
        plan("smollm2", tokens=100, **options)


def test_a_context_beyond_the_models_positions_and_memory_is_told():
    planned = plan("llama-3.1-70b", tokens="1M", devices=1)
    assert any("131,072 positions" in warning for warning in planned.warnings)
    assert any("do not fit into 1" in warning for warning in planned.warnings)
    assert plan("smollm2", tokens=100).warnings == ()
