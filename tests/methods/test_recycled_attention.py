"""Recycled Attention: the contract of cache policies, and the invariants and bad input of its own."""

from __future__ import annotations

import itertools

import pytest
import torch
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder, t5, whisper

import headway
from headway.door import AttentionCall
from headway.door.call import Forward
from headway.door.execute import execute_parts
from headway.errors import ArgumentError, ConflictError, HostError
from headway.hosts.tiny import tiny_host
from headway.methods.long_context import recycled_attention as method
from headway.methods.long_context.recycled_attention import (
    CARD,
    RecycledAttention,
    RecycledTraining,
    at_budget,
    full_steps,
    ideal_speedup,
)

HOSTS = {name: make for name, make in CAUSAL.items() if name != "llama eager"} | {
    "phi, partly rotated": lambda: decoder("Phi", num_key_value_heads=4, partial_rotary_factor=0.5),
}
SCHEDULES = {
    "fixed": {"stride": 3},
    "dynamic": {"stride": None, "threshold": 0.4, "check": 2},
    "both": {"stride": 5, "threshold": 0.4, "check": 2},
    "one choice": {"stride": None},
    "first version": {"stride": 3, "pool": 1, "victim": "latest"},
    "first step full": {"stride": 3, "first": "full", "group": "mean"},
    "reads without choosing": {"stride": 3, "full_step": "attend"},
    "chooses and reads that": {"stride": 3, "full_step": "select", "sinks": 1},
}


def small(schedule: str = "fixed", budget: int = 7) -> RecycledAttention:
    return RecycledAttention(budget=budget, **SCHEDULES[schedule])


def decode(model, policy, ids, prompt, mask=None):
    """Logits of a prompt and its single steps, and the cache."""
    caches = []
    with headway.use(model, policy):
        hook = model.register_forward_hook(lambda m, a, out: caches.append(out.past_key_values))
        logits = contract.run_in_chunks(model, ids, [prompt] + [1] * (ids.shape[1] - prompt), mask)
        hook.remove()
    return logits, caches[-1]


def test_card_names_the_paper_and_the_text_says_that_memory_stays():
    assert (CARD.slug, CARD.arxiv, CARD.family) == ("recycled-attention", "2411.05787", "long_context")
    assert "memory is not reduced" in (method.__doc__ or "")


def test_the_defaults_are_the_papers_language_model_runs_by_its_later_version():
    policy = RecycledAttention()
    assert (policy.budget, policy.stride, policy.threshold, policy.check) == (2048, 10, None, 5)
    assert (policy.pool, policy.group, policy.victim, policy.sinks) == (7, "max", "refresh", 0)
    assert (policy.first, policy.full_step) == ("recycled", "both")


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_budget_of_everything_is_dense(name, schedule):
    contract.check_equals_dense(HOSTS[name](), lambda: small(schedule, 60), atol=2e-4)


@pytest.mark.parametrize("name", HOSTS)
def test_a_full_step_every_time_is_dense(name):
    contract.check_equals_dense(HOSTS[name](), lambda: RecycledAttention(budget=2, stride=1), atol=2e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    "check",
    [contract.check_causality, contract.check_requests_apart, contract.check_batch, contract.check_padding,
     contract.check_reorder_and_reset, contract.check_generate],
)  # fmt: skip
def test_the_contract(schedule, check):
    check(HOSTS["llama"](), lambda: small(schedule))


@pytest.mark.parametrize("name", ["gpt2", "gemma3 sliding", "gpt-oss learned sinks", "gemma2 soft cap"])
@pytest.mark.parametrize("check", [contract.check_batch, contract.check_padding, contract.check_reorder_and_reset])
def test_the_contract_on_other_hosts(name, check):
    check(HOSTS[name](), small)


@pytest.mark.parametrize("name", ["llama", "multi-query", "qwen3", "gpt2", "phi, partly rotated"])
@pytest.mark.parametrize("options", [{}, {"pool": 1, "group": "mean"}, {"budget": 40}])
def test_steps_equal_the_parallel_form(name, options):
    """Decoding behind a prompt and one masked pass over everything are two ways to the same logits."""
    model = HOSTS[name]()
    ids, prompt = contract.tokens(2, 26), 20
    options = {"budget": 8} | options
    got, cache = decode(model, RecycledAttention(stride=7, **options), ids, prompt)
    with headway.use(model, RecycledTraining(split=prompt, **options)), torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    assert not bool(cache.full_steps().any())


def test_the_cache_keeps_every_token_and_never_more_than_the_budget_a_second_time():
    model = decoder("Llama")
    ids = contract.tokens(2, 30)
    with torch.no_grad():
        dense = model(input_ids=ids, use_cache=True).past_key_values
    for schedule in SCHEDULES:
        cache = None
        with headway.use(model, small(schedule)), torch.no_grad():
            for start, stop in itertools.pairwise([0, 3, *range(10, 31)]):
                cache = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True).past_key_values
                assert cache.get_seq_length() == stop
                for layer in cache.layers:
                    assert layer.full.length == stop
                    # Up to the budget the full cache is the small one.
                    assert layer.small.length == (7 if stop > 7 else 0)
                    assert layer.score.shape[2] == min(stop, 7)
                    if stop <= 7:
                        continue
                    places = layer.small.positions
                    assert all(len(set(row)) == len(row) for head in places.tolist() for row in head)
                    at = places[..., None].expand(-1, -1, -1, 8)
                    torch.testing.assert_close(layer.small.key, layer.full.key.gather(2, at))
                    torch.testing.assert_close(layer.small.value, layer.full.value.gather(2, at))
        # The first layer's inputs are the same under any schedule.
        torch.testing.assert_close(cache.layers[0].full.key, dense.layers[0].keys, atol=1e-5, rtol=0)
        torch.testing.assert_close(cache.layers[0].full.value, dense.layers[0].values, atol=1e-5, rtol=0)


def test_memory_is_that_of_dense_attention_and_the_budget_on_top():
    model = decoder("Llama")
    _, cache = decode(model, small(), contract.tokens(1, 30), 20)
    assert cache.stored_bytes() == 3 * 2 * (30 + 7) * 8 * 2 * 4
    assert cache.small_bytes() == 3 * 2 * 7 * 8 * 2 * 4


@pytest.mark.parametrize("schedule", ["fixed", "dynamic", "both", "first version", "chooses and reads that"])
def test_tokens_since_the_last_full_step_are_all_in_the_small_cache(schedule):
    model = decoder("Llama")
    ids = contract.tokens(2, 40)
    with headway.use(model, small(schedule, 9)), torch.no_grad():
        cache = model(input_ids=ids[:, :15], use_cache=True).past_key_values
        for step in range(15, 40):
            model(input_ids=ids[:, step : step + 1], past_key_values=cache)
            for layer in cache.layers:
                for row in range(2):
                    since = set(range(int(layer.full_at[row]) + 1, step + 1))
                    assert all(since <= set(head) for head in layer.small.positions[row].tolist())


@pytest.mark.parametrize("first", ["recycled", "full"])
def test_full_steps_come_as_the_stride_says(first):
    model = decoder("Llama")
    with headway.use(model, RecycledAttention(budget=8, stride=4, first=first)) as handle, torch.no_grad():
        contract.run_in_chunks(model, contract.tokens(2, 33), [20] + [1] * 13)
        cache = model(input_ids=contract.tokens(2, 20), use_cache=True).past_key_values
        for step in range(13):
            before = cache.full_steps()
            model(input_ids=contract.tokens(2, 1), past_key_values=cache)
            full = step in full_steps(13, 4, first=first)
            assert torch.equal(cache.full_steps() - before, torch.full((3, 2), int(full)))
    assert {path for row in handle.report() for path in row["paths"]} == {"native", "policy"}


class Counting(RecycledAttention):
    """Notes how many keys each layer reads in each step."""

    def read(self, call):
        parts = super().read(call)
        call.forward.cache.__dict__.setdefault("reads", []).extend(part.keys for part in parts or ())
        return parts


@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sinks": torch.tensor([0.5, -1.0, 0.0, 2.0])}])
@pytest.mark.parametrize("hidden", [0, 3])
def test_a_full_step_reads_keys_once_for_its_output_and_its_choice(options, hidden):
    """Output, log-sum-exp and scores are those of the reference and of `key_scores` by themselves."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 8, generator=generator)
    key, value = (torch.randn(2, 2, 30, 8, generator=generator) for _ in range(2))
    mask = (torch.arange(30) >= torch.tensor([0, hidden])[:, None])[:, None, None]
    call = AttentionCall.from_tensors(query, key, value, mask=mask, **options)
    policy = RecycledAttention(budget=6, stride=3)
    layer = method.store.RecycledLayer(6)
    layer.update(key, value)
    done = execute_parts(call, [policy._choosing(call, call, layer)], [], "", 0.0)
    output, lse = call.attend()
    torch.testing.assert_close(done.output, output, atol=1e-5, rtol=0)
    torch.testing.assert_close(done.lse, lse, atol=1e-5, rtol=0)
    scores = method.key_scores(method.selection.log_weights(call, 0), 2)
    chosen = method.top_keys(scores, 6)
    assert layer.small.positions.tolist() == chosen.tolist()
    torch.testing.assert_close(layer.score, scores.gather(2, chosen), atol=1e-5, rtol=0)
    assert int(chosen[1].min()) >= hidden


def test_a_step_reads_the_budget_and_a_full_one_everything():
    model = decoder("Llama")
    tokens, steps, budget = 60, 8, 8
    with headway.use(model, Counting(budget=budget, stride=4)) as handle, torch.no_grad():
        cache = model(input_ids=contract.tokens(1, tokens), use_cache=True).past_key_values
        for _ in range(steps):
            model(input_ids=contract.tokens(1, 1), past_key_values=cache)
    by_step = [cache.reads[3 * step : 3 * step + 3] for step in range(steps)]
    assert by_step == [[64 if step == 3 else 68 if step == 7 else budget] * 3 for step in range(steps)]
    read = sum(budget / (61 + step) for step in range(steps) if step not in (3, 7)) + 2
    assert [row["density"] for row in handle.report()] == [pytest.approx((1 + read) / 9)] * 3


def test_a_recycled_step_reads_nothing_but_the_small_cache():
    """Every key outside it is poisoned: a step that looked at one would not be finite."""
    model = decoder("Llama")
    ids = contract.tokens(1, 24)
    with headway.use(model, RecycledAttention(budget=8, stride=6)), torch.no_grad():
        clean = contract.run_in_chunks(model, ids, [20] + [1] * 4)
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        for layer in cache.layers:
            layer.full.key.fill_(torch.nan)
            layer.full.value.fill_(torch.nan)
        steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 24)]
    torch.testing.assert_close(torch.cat(steps, 1), clean[:, 20:])


def test_the_order_of_the_small_cache_does_not_matter():
    model = decoder("Llama")
    ids = contract.tokens(2, 26)
    logits = []
    for shuffled in (False, True):
        with headway.use(model, RecycledAttention(budget=8, stride=None, threshold=-1.0)), torch.no_grad():
            cache = model(input_ids=ids[:, :22], use_cache=True).past_key_values
            if shuffled:
                for layer in cache.layers:
                    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
                    layer.small.key.copy_(layer.small.key[:, :, order])
                    layer.small.value.copy_(layer.small.value[:, :, order])
                    layer.small.positions.copy_(layer.small.positions[..., order])
                    layer.score = layer.score[..., order]
            steps = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(22, 25)]
        logits.append(torch.cat(steps, 1))
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)


def test_a_threshold_of_one_is_a_full_step_at_every_check_and_minus_one_never():
    model = decoder("Llama")
    ids = contract.tokens(2, 32)
    _, cache = decode(model, RecycledAttention(budget=40, stride=None, threshold=1.0, check=3), ids, 20)
    assert torch.equal(cache.full_steps(), torch.full((3, 2), 4))
    _, cache = decode(model, RecycledAttention(budget=40, stride=None, threshold=-1.0, check=3), ids, 20)
    assert not bool(cache.full_steps().any())


def test_fresh_tokens_that_fill_half_the_budget_call_for_a_full_step():
    model = decoder("Llama")
    _, cache = decode(model, RecycledAttention(budget=8, stride=None, threshold=-1.0), contract.tokens(1, 32), 20)
    assert torch.equal(cache.full_steps(), torch.full((3, 1), 3))


def test_layers_and_sequences_decide_alone_and_both_schedules_may_call():
    model = decoder("Llama")
    ids = contract.tokens(4, 60)
    policy = RecycledAttention(budget=20, stride=None, threshold=0.3, check=2)
    _, cache = decode(model, policy, ids, 20)
    found = cache.full_steps()
    assert len({tuple(row) for row in found.tolist()}) > 1
    assert any(len(set(row)) > 1 for row in found.tolist())
    both = RecycledAttention(budget=20, stride=7, threshold=0.3, check=2)
    _, cache = decode(model, both, ids, 20)
    assert bool((cache.full_steps() >= 40 // 7).all())
    assert bool((cache.full_steps() > 40 // 7).any())


def test_sequences_that_decide_differently_give_what_they_give_alone():
    model = decoder("Llama")
    ids = contract.tokens(3, 48)
    make = lambda: RecycledAttention(budget=12, stride=None, threshold=0.3, check=2, victim="latest")  # noqa: E731
    together, cache = decode(model, make(), ids, 20)
    assert any(len(set(row)) > 1 for row in cache.full_steps().tolist())
    for row in range(3):
        alone, own = decode(model, make(), ids[row : row + 1], 20)
        assert own.full_steps()[:, 0].tolist() == cache.full_steps()[:, row].tolist()
        torch.testing.assert_close(together[row], alone[0], atol=1e-4, rtol=0)


def test_without_a_schedule_the_prefills_choice_stays_in_half_the_budget():
    model = decoder("Llama")
    _, cache = decode(model, small("one choice", 8), contract.tokens(1, 50), 20)
    assert not bool(cache.full_steps().any())
    for layer in cache.layers:
        for head in layer.small.positions[0].tolist():
            assert sum(place < 20 for place in head) == 4
            assert set(range(46, 50)) <= set(head)


def test_a_full_step_that_does_not_choose_changes_nothing_behind_it():
    """The ablation of the paper: with `full_step="attend"` recycled steps are those of a choice that stays."""
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 34)
    attend, _ = decode(model, small("reads without choosing", 8), ids, 20)
    once, _ = decode(model, small("one choice", 8), ids, 20)
    dense, _ = decode(model, RecycledAttention(budget=8, stride=1), ids, 20)
    full = [20 + step for step in full_steps(14, 3)]
    others = [place for place in range(20, 34) if place not in full]
    torch.testing.assert_close(attend[:, others], once[:, others], atol=1e-5, rtol=0)
    torch.testing.assert_close(attend[:, full], dense[:, full], atol=1e-5, rtol=0)
    assert not torch.allclose(attend[:, full], once[:, full], atol=1e-3)


def test_a_full_step_that_only_chooses_reads_its_choice():
    model = decoder("Llama", num_hidden_layers=1)
    ids = contract.tokens(1, 23)
    got, cache = decode(model, RecycledAttention(budget=8, stride=3, full_step="select"), ids, 20)
    dense, _ = decode(model, RecycledAttention(budget=8, stride=1), ids, 20)
    assert cache.full_steps().tolist() == [[1]]
    assert not torch.allclose(got[:, -1], dense[:, -1], atol=1e-3)


def layer_with(scores: list[float], budget: int) -> method.store.RecycledLayer:
    layer = method.store.RecycledLayer(budget)
    count = len(scores)
    key = torch.arange(count, dtype=torch.float32).view(1, 1, count, 1).expand(1, 1, count, 4)
    layer.update(key, key)
    layer.refresh(torch.tensor([[scores]]).double(), torch.ones(1, 1, 1, 4))
    return layer


def test_nothing_is_copied_while_the_budget_holds_everything_or_every_step_is_full():
    model = decoder("Llama")
    ids = contract.tokens(1, 30)
    for policy in (RecycledAttention(budget=30, stride=4), RecycledAttention(budget=8, stride=1)):
        _, cache = decode(model, policy, ids, 20)
        assert cache.small_bytes() == 0
        assert cache.full_steps().tolist() == [[10 if policy.stride == 1 else 2]] * 3


def add(layer, number: float, most_fresh: int = 99) -> list[int]:
    layer.update(torch.full((1, 1, 1, 4), number), torch.full((1, 1, 1, 4), number))
    layer.push(most_fresh)
    return sorted(layer.small.positions[0, 0].tolist())


def test_the_lowest_score_goes_first_and_fresh_tokens_stay():
    layer = layer_with([1.0, 5.0, 3.0, 4.0], 3)
    assert sorted(layer.small.positions[0, 0].tolist()) == [1, 2, 3]
    assert add(layer, 4.0) == [1, 3, 4]
    assert add(layer, 5.0) == [1, 4, 5]
    assert add(layer, 6.0) == [4, 5, 6]
    assert add(layer, 7.0) == [5, 6, 7]
    assert sorted(layer.small.key[0, 0, :, 0].tolist()) == [5.0, 6.0, 7.0]


def test_beyond_its_room_the_oldest_fresh_token_goes():
    layer = layer_with([1.0, 5.0, 3.0, 4.0], 4)
    assert add(layer, 4.0, 2) == [1, 2, 3, 4]
    assert add(layer, 5.0, 2) == [1, 3, 4, 5]
    assert add(layer, 6.0, 2) == [1, 3, 5, 6]


def test_an_empty_slot_is_taken_before_any_token():
    layer = layer_with([-torch.inf, 5.0, 3.0, -torch.inf], 3)
    assert sorted(layer.small.positions[0, 0].tolist()) == [-1, 1, 2]
    assert add(layer, 4.0, 1) == [1, 2, 4]
    assert add(layer, 5.0, 1) == [1, 2, 5]


def test_the_first_version_drops_what_was_least_attended_last():
    model = decoder("Llama", num_hidden_layers=1, num_key_value_heads=4)
    ids = contract.tokens(1, 23)
    with headway.use(model, RecycledAttention(budget=6, stride=4, pool=1, victim="latest")), torch.no_grad():
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        layer = cache.layers[0]
        model(input_ids=ids[:, 20:21], past_key_values=cache)
        before, scores = layer.small.positions.clone(), layer.score.clone()
        assert bool((scores <= 0)[scores.isfinite()].all())
        # With one head per group a score is a log-weight: those of the old entries and the fresh one fill the row.
        assert bool((scores.exp().masked_fill(~scores.isfinite(), 0).sum(-1) < 1).all())
        model(input_ids=ids[:, 21:22], past_key_values=cache)
        gone = before.gather(2, scores.argmin(-1, keepdim=True))[0, :, 0].tolist()
        for head, place in enumerate(gone):
            assert place not in layer.small.positions[0, head].tolist()


def test_forced_sinks_are_always_chosen_and_stay():
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 34), [0, 3])
    _, cache = decode(model, RecycledAttention(budget=8, stride=5, sinks=2), ids, 20, mask)
    for layer in cache.layers:
        for row, first in ((0, 0), (1, 3)):
            assert all({first, first + 1} <= set(head) for head in layer.small.positions[row].tolist())


def test_padding_is_never_chosen():
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(3, 20), [0, 6, 14])
    with headway.use(model, small()), torch.no_grad():
        cache = model(input_ids=ids, attention_mask=mask, use_cache=True).past_key_values
    for layer in cache.layers:
        for row, pads in ((1, 6), (2, 14)):
            places = layer.small.positions[row]
            assert bool(((places >= pads) | (places == -1)).all())
        # The third row has six tokens for seven slots.
        assert bool(((layer.small.positions[2] >= 0).sum(-1) == 6).all())


def test_padding_that_comes_step_by_step_is_never_read():
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 20), [0, 12])
    _, cache = decode(model, RecycledAttention(budget=6, stride=5), ids, 1, mask)
    for layer in cache.layers:
        assert bool(((layer.small.positions[1] >= 12) | (layer.small.positions[1] == -1)).all())
    got, _ = decode(model, RecycledAttention(budget=30, stride=5), ids, 1, mask)
    with torch.no_grad():
        alone = model(input_ids=ids[1:, 12:]).logits
    torch.testing.assert_close(got[1:, 12:], alone, atol=1e-4, rtol=0)


def test_a_prompt_shorter_than_the_budget_starts_dense():
    model = decoder("Llama")
    ids = contract.tokens(1, 22)
    got, _ = decode(model, RecycledAttention(budget=10, stride=9), ids, 2)
    with torch.no_grad():
        dense = model(input_ids=ids).logits
    torch.testing.assert_close(got[:, :10], dense[:, :10], atol=1e-4, rtol=0)
    assert not torch.allclose(got[:, 10:], dense[:, 10:], atol=1e-3)


def test_forwards_of_several_tokens_are_dense():
    model = decoder("Llama")
    ids = contract.tokens(2, 40)
    with headway.use(model, small()), torch.no_grad():
        got = contract.run_in_chunks(model, ids, [10, 1, 1, 10, 1, 17])
        want = model(input_ids=ids, use_cache=False).logits
    torch.testing.assert_close(got[:, :10], want[:, :10], atol=1e-4, rtol=0)
    whole = decoder("Llama", num_hidden_layers=1)
    with headway.use(whole, small()), torch.no_grad():
        got = contract.run_in_chunks(whole, ids, [10, 1, 1, 10, 1, 17])
        want = whole(input_ids=ids, use_cache=False).logits
    several = [*range(10), *range(12, 22), *range(23, 40)]
    torch.testing.assert_close(got[:, several], want[:, several], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma3 sliding"])
def test_tokens_can_be_taken_back(name):
    model = HOSTS[name]()
    ids = contract.tokens(1, 30)
    with headway.use(model, RecycledAttention(budget=8, stride=4)), torch.no_grad():
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        for step in range(20, 23):
            model(input_ids=ids[:, step : step + 1] + 1, past_key_values=cache)
        assert cache.is_croppable
        cache.crop(-3)
        assert cache.get_seq_length() == 20
        got = model(input_ids=ids[:, 20:21], past_key_values=cache).logits
    with torch.no_grad():
        torch.testing.assert_close(got[:, 0], model(input_ids=ids[:, :21]).logits[:, -1], atol=2e-4, rtol=0)


def test_assisted_decoding_gives_the_greedy_answer_where_everything_is_kept():
    model = decoder("Llama")
    ids = contract.tokens(1, 8).repeat(1, 3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = model.generate(ids, **options)
        for policy in (RecycledAttention(budget=60, stride=4), RecycledAttention(budget=5, stride=1)):
            for guesses in (
                {"prompt_lookup_num_tokens": 3},
                {"assistant_model": decoder("Llama", num_hidden_layers=1)},
            ):
                with headway.use(model, policy):
                    got = model.generate(ids, **guesses, **options)
                assert got.tolist() == want.tolist(), (policy, guesses)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_assisted_decoding_is_refused_under_a_budget_that_does_not_hold_everything(schedule):
    """Guesses are checked by a dense forward: the text would be neither the method's nor dense attention's."""
    contract.check_refuses_assisted_decoding(decoder("Llama"), lambda: small(schedule))


def test_assisted_decoding_is_refused_though_every_guess_is_right():
    """A draft of the model itself guesses what dense attention says, so nothing would ever be taken back."""
    model, ids = decoder("Llama"), contract.tokens(1, 24)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with headway.use(model, small()), pytest.raises(ArgumentError, match=r"take back 0 of the .* one forward"):
        model.generate(ids, assistant_model=decoder("Llama"), **options)


def test_assisted_decoding_is_refused_when_the_text_outgrows_the_budget():
    model, ids = decoder("Llama"), contract.tokens(1, 6).repeat(1, 3)
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None, "prompt_lookup_num_tokens": 3}
    policy = RecycledAttention(budget=26, stride=4)
    with torch.no_grad(), headway.use(model, policy):
        short = model.generate(ids, max_new_tokens=4, **options)
        assert short.tolist() == model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0).tolist()
        with pytest.raises(ArgumentError, match="more than 26 tokens"):
            model.generate(ids, max_new_tokens=30, **options)


def test_whole_forwards_and_single_steps_can_be_taken_back_under_a_small_budget():
    model, ids = decoder("Llama"), contract.tokens(1, 30)
    with headway.use(model, small()), torch.no_grad():
        cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
        with pytest.raises(ArgumentError, match="take back 3 of the 20 tokens"):
            cache.crop(-3)
        assert cache.get_seq_length() == 20
        model(input_ids=ids[:, 20:25], past_key_values=cache)
        cache.crop(-5)
        model(input_ids=ids[:, 20:21], past_key_values=cache)
        cache.crop(-1)
        assert cache.get_seq_length() == 20


@pytest.mark.parametrize("num_beams", [1, 3])
def test_generate_on_padded_prompts_equals_prompts_alone(num_beams):
    model = decoder("Llama")
    ids, mask = contract.padded_left(contract.tokens(2, 16), [0, 5])
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": num_beams}
    with headway.use(model, small()), torch.no_grad():
        both = model.generate(ids, attention_mask=mask, **options)
        for row, pads in ((0, 0), (1, 5)):
            alone = model.generate(ids[row : row + 1, pads:], **options)
            assert both[row, 16:].tolist() == alone[0, 16 - pads :].tolist()


def test_beam_search_over_everything_finds_the_beams_of_dense_attention():
    model = decoder("Llama")
    ids = contract.tokens(2, 10)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "num_beams": 3}
    with torch.no_grad():
        want = model.generate(ids, **options)
        with headway.use(model, RecycledAttention(budget=5, stride=1)):
            assert model.generate(ids, **options).tolist() == want.tolist()


def test_sliding_layers_stay_as_they_are_and_keep_no_more_than_they_need(caplog):
    model = HOSTS["mistral sliding"]()
    ids = contract.tokens(2, 60)
    got, cache = decode(model, small(), ids, 12)
    assert "window of their own" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(got, model(input_ids=ids).logits, atol=2e-4, rtol=0)
    assert all(layer.full.length <= 3 * 6 and layer.small.empty for layer in cache.layers)
    with pytest.raises(ArgumentError, match="older tokens are gone"):
        cache.crop(-17)


def test_a_prefill_selector_works_beside_it_and_one_of_decoding_is_refused():
    class Prefill(headway.door.Selector):
        phases = frozenset({"prefill"})

        def select(self, call):
            return headway.door.Window(1, 4)

    class Both(Prefill):
        phases = frozenset({"prefill", "decode"})

    model = decoder("Llama")
    with headway.use(model, Prefill(), small()) as handle:
        contract.run_in_chunks(model, contract.tokens(1, 12), [10, 1, 1])
    assert {tuple(sorted(row["paths"].items())) for row in handle.report()} == {(("policy", 2), ("window", 1))}
    with pytest.raises(ConflictError, match="RecycledAttention and Both"):
        headway.use(model, Both(), small()).attach()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 0}, "budget: got 0"),
        ({"budget": 32, "stride": 50}, "got 32, which cannot hold the 49 tokens generated between refreshes"),
        ({"budget": 8, "stride": 8}, "expected more than 8"),
        ({"budget": 8, "stride": 5, "sinks": 3}, "plus 3 sinks"),
        ({"budget": 8, "stride": None, "threshold": 0.5, "sinks": 4}, "the 3 tokens .* plus 4 sinks"),
        ({"budget": 1, "stride": None}, "budget: got 1"),
        ({"stride": 0}, "stride: got 0"),
        ({"threshold": 1.2}, "threshold: got 1.2"),
        ({"threshold": -1.5}, "threshold: got -1.5"),
        ({"check": 0}, "check: got 0"),
        ({"pool": 2}, "pool: got 2"),
        ({"pool": 0}, "pool: got 0"),
        ({"group": "sum"}, "group"),
        ({"victim": "oldest"}, "victim"),
        ({"first": "none"}, "first"),
        ({"full_step": "never"}, "full_step"),
        ({"full_step": "attend", "threshold": 0.8}, "full_step: got 'attend' with a threshold"),
        ({"sinks": -1}, "sinks: got -1"),
    ],
)
def test_bad_numbers_are_refused(options, message):
    with pytest.raises(ArgumentError, match=message):
        RecycledAttention(**options)


def test_hosts_it_cannot_serve_are_refused_by_name():
    for model, inputs in (t5(), whisper()):
        with headway.use(model, small()), torch.no_grad(), pytest.raises(HostError, match="encoder-decoder"):
            model(**inputs, use_cache=True)
    model, inputs = tiny_host("llama4_text")
    with headway.use(model, small()), torch.no_grad(), pytest.raises(HostError, match="reads in chunks"):
        model(**inputs | {"use_cache": True})
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3)]
    assert small().read(AttentionCall.from_tensors(*tensors)) is None
    call = AttentionCall.from_tensors(*tensors, bias=torch.zeros(1, 2, 4, 4))
    call = call.replace(forward=Forward(cache=small().make_cache(decoder("Llama"))))
    with pytest.raises(HostError, match="position bias"):
        small().read(call)


def test_training_reaches_every_weight_through_the_recycled_pattern():
    model = decoder("Llama")
    model.train()
    ids = contract.tokens(2, 20)
    with headway.use(model, RecycledTraining(split=16, budget=6)):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())
    assert float(model.model.layers[0].self_attn.k_proj.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("side", ["left", "right"])
def test_training_on_a_padded_batch_is_training_on_its_rows(side):
    """Pads in front move the split of a row back by as many tokens; they are never chosen."""
    model, ids, mask = decoder("Llama"), contract.tokens(2, 24), torch.ones(2, 24).long()
    mask[1, slice(0, 5) if side == "left" else slice(21, 24)] = 0
    real = mask[1].bool()
    options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    with headway.use(model, RecycledTraining(split=18, budget=9)), torch.no_grad():
        both = model(input_ids=ids * mask, **options).logits
    with headway.use(model, RecycledTraining(split=13 if side == "left" else 18, budget=9)), torch.no_grad():
        alone = model(input_ids=ids[1:, real], use_cache=False).logits
    torch.testing.assert_close(both[1:, real], alone, atol=1e-4, rtol=0)
    with torch.no_grad():
        assert not torch.allclose(alone, model(input_ids=ids[1:, real]).logits, atol=1e-2)


def test_training_refuses_samples_without_a_second_part_or_too_long_a_one():
    model = decoder("Llama")
    with pytest.raises(ArgumentError, match="split: got 0"):
        RecycledTraining(split=0, budget=5)
    with headway.use(model, RecycledTraining(split=16, budget=6)), torch.no_grad():
        with pytest.raises(ArgumentError, match="split: got 16 for 16 queries"):
            model(input_ids=contract.tokens(1, 16), use_cache=False)
        with pytest.raises(ArgumentError, match="tokens since the full step must stay"):
            model(input_ids=contract.tokens(1, 22), use_cache=False)


@pytest.mark.parametrize(("share", "tokens"), [(0.05, 8000), (0.1, 4000), (0.25, 2000), (0.5, 4000), (0.9, 500)])
def test_a_budget_share_is_the_share_of_keys_read(share, tokens):
    (policy,) = at_budget(share, tokens=tokens, model=decoder("Llama"))
    assert 1 / ideal_speedup(tokens, policy.budget, policy.stride) == pytest.approx(share, abs=0.01)
    # No more than half of it goes into full steps.
    assert (policy.stride - 1) * policy.budget >= 0.95 * tokens


def test_a_short_context_gets_the_nearest_share_and_all_of_it_is_dense():
    model = decoder("Llama")
    (policy,) = at_budget(0.5, tokens=24, model=model)
    assert 1 / ideal_speedup(24, policy.budget, policy.stride) == pytest.approx(0.5, abs=0.06)
    contract.check_equals_dense(model, lambda: at_budget(1.0, tokens=4, model=model)[0])
    for bad in ({"share": 0.0, "tokens": 5}, {"share": 1.5, "tokens": 5}, {"share": 0.5, "tokens": 0}):
        with pytest.raises(ArgumentError, match=r"share|tokens"):
            at_budget(**bad, model=model)


def test_half_precision_recycles_as_well():
    model = decoder("Llama").bfloat16()
    ids = contract.tokens(2, 30)
    got, cache = decode(model, RecycledAttention(budget=8, stride=1), ids, 20)
    with torch.no_grad():
        want = model(input_ids=ids).logits
    assert float((got - want).abs().mean()) < 0.05 * float(want.abs().mean())
    got, cache = decode(model, small("both", 9), ids, 20)
    assert bool(got.isfinite().all())
    assert cache.layers[0].small.key.dtype == torch.bfloat16


@pytest.mark.real
def test_a_real_model_answers_as_it_does_densely_where_the_budget_holds_everything():
    from headway.hosts import default_text, load, tokenize

    model, tokenizer = load("smollm2")
    ids = tokenize(tokenizer, default_text(), 96)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        want = model.generate(ids, **options)
        for policy in (RecycledAttention(budget=120, stride=4), RecycledAttention(budget=32, stride=1)):
            with headway.use(model, policy):
                assert model.generate(ids, **options).tolist() == want.tolist()
        with headway.use(model, RecycledAttention(budget=32, stride=4)) as handle:
            model.generate(ids, **options)
    # A prefill, two full steps and nine recycled ones of 32 keys.
    assert all(row["density"] < 0.6 for row in handle.report())
