"""DuoAttention at its edges: what it meets beside it, streaming heads alone, released settings, and hosts refused."""

from __future__ import annotations

import inspect

import pytest
import torch
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, bert, decoder

import headway
from headway.door import AttentionCall, Selector, Window
from headway.errors import ArgumentError, HostError
from headway.methods.long_context.duo_attention import (
    CARD,
    DuoAttention,
    Gates,
    PasskeyData,
    at_budget,
    budget_split,
    learn_gates,
    score_heads,
)
from headway.methods.long_context.duo_attention.passkeys import DEPTH_POINTS, LENGTHS, WORDS

S, R = 2, 4


def streaming(layers: int = 3, kv_heads: int = 2, **options) -> DuoAttention:
    """Every head streams."""
    return DuoAttention(gates=torch.zeros(layers, kv_heads), **{"sparsity": 1.0, "sinks": S, "recent": R} | options)


def half(**options) -> DuoAttention:
    gates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.2]])
    return DuoAttention(gates=gates, **{"threshold": 0.5, "sinks": S, "recent": R} | options)


class SinkWindow(Selector):
    """R recent keys beside the token itself, and S sinks."""

    def select(self, call):
        return Window(S, R + 1)


@pytest.mark.parametrize("check", contract.ONCE)
@pytest.mark.parametrize("prefill", ["streaming", "dense"])
def test_what_it_meets_beside_it(check, prefill):
    check(CAUSAL["llama"](), lambda: half(prefill=prefill))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "gpt-oss learned sinks"])
def test_streaming_heads_alone_are_the_selection_of_sinks_and_a_window(name):
    """An independent path: the selector's sparse kernel, against the ring cache token by token and in one forward."""
    model, ids = CAUSAL[name](), contract.tokens(2, 22)
    kv_heads = getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads
    with headway.use(model, SinkWindow()), torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    limit = 1e-4 * max(float(want.abs().max()), 1)
    for prefill, chunks in (("streaming", [1] * 22), ("dense", [1] * 22), ("streaming", [22]), ("streaming", [8, 14])):
        with headway.use(model, streaming(kv_heads=kv_heads, prefill=prefill)):
            got = contract.run_in_chunks(model, ids, chunks)
        torch.testing.assert_close(got, want, atol=limit, rtol=0, msg=lambda m, c=(prefill, chunks): f"{c}: {m}")


def test_a_first_chunk_is_dense_for_every_head_if_asked_and_pruned_behind_it():
    model, ids = decoder("Llama"), contract.tokens(1, 30)
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with headway.use(model, streaming(prefill="dense")):
            out = model(input_ids=ids, use_cache=True)
    assert torch.equal(out.logits, native)
    assert {layer.stored for layer in out.past_key_values.layers} == {S + R}


def test_taking_nothing_back_changes_nothing_behind_an_eviction():
    model, ids = decoder("Llama"), contract.tokens(1, 21)
    with headway.use(model, half()), torch.no_grad():
        want = contract.run_in_chunks(model, ids, [20, 1])[:, -1]
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        stored = cache.stored_bytes()
        cache.crop(0)
        assert (cache.get_seq_length(), cache.stored_bytes()) == (20, stored)
        torch.testing.assert_close(model(input_ids=ids[:, 20:], past_key_values=cache).logits[:, -1], want)


def test_gates_of_another_model_are_refused_without_a_cache_too():
    model, ids = decoder("Llama"), contract.tokens(1, 8)
    other = decoder("Llama")
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    policy = DuoAttention(gates=Gates.of(model, torch.rand(3, 2)), sparsity=0.5)
    with headway.use(model, policy), torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for cached in (True, False):
        with headway.use(other, policy), torch.no_grad(), pytest.raises(HostError, match="made on another model"):
            other(input_ids=ids, use_cache=cached)


def test_a_host_that_reads_both_ways_is_refused():
    model, inputs = bert()
    policy = streaming(2, 4)
    with headway.use(model, policy), torch.no_grad(), pytest.raises(HostError, match="sees the future"):
        model(**inputs, use_cache=False)
    tensors = [torch.zeros(1, 2, 4, 8)] * 3
    with pytest.raises(HostError, match="sees the future"):
        streaming(1, 2).read(AttentionCall.from_tensors(*tensors))


def test_a_row_of_padding_alone_reads_nothing_that_is_not_a_number():
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 12), [0, 12])
    with headway.use(model, streaming()), torch.no_grad():
        both = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        alone = model(input_ids=ids[:1], use_cache=False).logits
    torch.testing.assert_close(both[:1], alone, atol=1e-5, rtol=0)
    assert bool(both.isfinite().all())


def test_released_settings():
    """Training and deployment of the paper and its code; a sparsity has no default, as it depends on the model."""
    learning = {name: p.default for name, p in inspect.signature(learn_gates).parameters.items()}
    assert [learning[name] for name in ("steps", "sinks", "recent", "learning_rate", "penalty", "teacher_full")] == [
        2000, 128, 256, 0.02, 0.05, True,
    ]  # fmt: skip
    fields = DuoAttention.__dataclass_fields__
    assert [fields[name].default for name in ("sinks", "recent", "sparsity", "threshold")] == [64, 256, None, None]
    scoring = inspect.signature(score_heads).parameters
    assert [scoring[name].default for name in ("scoring", "sinks", "recent")] == ["rope_profile", 64, 256]
    data = PasskeyData.__dataclass_fields__
    assert [data[name].default for name in ("passkeys", "words", "depths", "supervise", "multiple")] == [
        10, 32, (0.05, 0.95), "suffix", 16,
    ]  # fmt: skip
    assert (len(LENGTHS), LENGTHS[0], LENGTHS[-1], len(WORDS), DEPTH_POINTS) == (50, 1000, 32_000, 26, 1000)
    assert set(CARD.knobs) <= set(fields)


def test_reported_operating_points_keep_a_quarter_and_a_half():
    mha, gqa = torch.rand(32, 32), torch.rand(32, 8)
    share = lambda gates, s: float(DuoAttention(gates=gates, sparsity=s).retrieval().float().mean())  # noqa: E731
    assert share(mha, 0.75) == pytest.approx(0.25, abs=1e-3)
    assert share(gqa, 0.5) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("share", "tokens"), [(0.5, 32_000), (0.25, 32_000), (0.9, 1000), (0.05, 100), (0.01, 10)])
def test_a_budget_is_split_so_that_the_formula_of_the_paper_gives_the_share(share, tokens):
    heads = 960
    sinks, recent, whole = budget_split(share, tokens=tokens, heads=heads)
    assert sinks >= 0
    assert recent >= 1
    if share * tokens < 2:
        return
    stored = whole / heads + (1 - whole / heads) * (sinks + recent) / tokens
    assert share - 1 / heads - 1 / tokens <= stored <= share + 1e-9


def test_bad_budgets_are_named():
    model = decoder("Llama")
    for options, message in (({"share": 0.0, "tokens": 5}, "share: got"), ({"share": 0.5, "tokens": 0}, "tokens: got")):
        with pytest.raises(ArgumentError, match=message):
            at_budget(**options, model=model)


def test_beams_and_repeats_carry_the_padding_of_their_rows():
    """What the cache knows of each row, its first token and its padding, moves with the keys."""
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 14), [0, 6])
    more, longer = contract.tokens(2, 1, seed=5), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    with headway.use(model, half()), torch.no_grad():
        want = contract.run_in_chunks(model, torch.cat([ids, more], 1), [14, 1], longer)[:, -1]
        for change, rows in (
            (lambda c: c.reorder_cache(torch.tensor([1, 0])), [1, 0]),
            (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
            (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1]),
        ):
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            cache = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).past_key_values
            change(cache)
            at = (longer.cumsum(1) - 1)[rows, -1:]
            got = model(
                input_ids=more[rows], attention_mask=longer[rows], position_ids=at, past_key_values=cache
            ).logits[:, -1]
            torch.testing.assert_close(got, want[rows], atol=1e-4, rtol=0)
