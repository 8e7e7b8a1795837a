"""TAPPA at work: budgets, the cache policy that keeps to them, and the order of pruning."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, OTHERS, decoder

import headway
from headway.door.blocks import host_blocks, without_attention, without_blocks
from headway.door.caches import PolicyCache
from headway.door.call import AttentionCall
from headway.errors import ArgumentError, ConflictError, HostError
from headway.hosts.tiny import tiny_host
from headway.methods.long_context.tappa import (
    TappaEviction,
    adjusted_influence,
    allocate,
    at_budget,
    block_influence,
    measure_layers,
    preferences,
    prune_order,
    query_similarity,
    text_chunks,
    token_scores,
)
from headway.methods.long_context.tappa.budget import dispersion, shift, temperatures

#: Block influence and query similarity of the 32 layers of Llama-2-7B as published with the code, and its order.
INFLUENCE = """
    .4139 .2746 .1726 .1703 .1856 .1599 .1545 .1465 .1363 .1302 .1229 .1110 .1098 .1129 .1103 .1120 .1125 .0897 .0813
    .0667 .0695 .0491 .0479 .0393 .0373 .0351 .0359 .0357 .0365 .0362 .0656 .3505
"""
SIMILARITY = """
    .4622 .4972 .6256 .6124 .6302 .6287 .5858 .5734 .5841 .5824 .5874 .5765 .5930 .5904 .5812 .6141 .6095 .6146 .6107
    .6217 .6128 .6156 .5961 .5878 .5888 .5674 .5760 .5723 .5700 .5789 .5857 .5781
"""
ORDER = "21 24 23 29 26 27 22 25 28 19 20 30 18 17 15 16 12 13 14 11 10 9 8 5 7 6 2 3 4 1 31 0"
#: What TAPPA drops in these tests: prompts of 20 and more tokens.
SMALL = {"budget": 10, "window": 4}


def numbers(text: str) -> torch.Tensor:
    return torch.tensor([float(x) for x in text.split()])


def small(**options) -> TappaEviction:
    return TappaEviction(**SMALL | options)


@torch.no_grad()
def cache_after(model, ids, policy, chunks=None, **inputs):
    with headway.use(model, policy):
        cache, start = None, 0
        for chunk in chunks or [ids.shape[1]]:
            out = model(input_ids=ids[:, start : start + chunk], past_key_values=cache, use_cache=True, **inputs)
            cache, start = out.past_key_values, start + chunk
        return cache


class TestBudgets:
    @settings(max_examples=80, deadline=None)
    @given(wish=st.lists(st.floats(0, 2), min_size=1, max_size=12), total=st.integers(0, 400), seed=st.integers(0, 99))
    def test_budgets_are_whole_within_their_caps_and_sum_exactly(self, wish, total, seed):
        caps = torch.randint(0, 60, (len(wish),), generator=torch.Generator().manual_seed(seed))
        found = allocate(torch.tensor(wish), total, caps)
        assert found.dtype == torch.long
        assert bool((found >= 0).all())
        assert bool((found <= caps).all())
        assert int(found.sum()) == min(total, int(caps.sum()))

    @settings(max_examples=60, deadline=None)
    @given(wish=st.lists(st.floats(0, 2), min_size=2, max_size=12), total=st.integers(0, 400))
    def test_more_preference_never_means_fewer_keys(self, wish, total):
        exact = torch.tensor(wish, dtype=torch.float64)
        found = allocate(exact, total, torch.full((len(wish),), 50)).tolist()
        ranked = [b for _, b in sorted(zip(wish, found, strict=True), key=lambda pair: pair[0])]
        by_wish = {w: [b for x, b in zip(wish, found, strict=True) if x == w] for w in wish}
        assert all(max(values) - min(values) <= 1 for values in by_wish.values())
        assert all(a <= b + (wish_a == wish_b) for a, b, wish_a, wish_b in zip(
            ranked, ranked[1:], sorted(wish), sorted(wish)[1:], strict=False
        ))  # fmt: skip

    @settings(max_examples=60, deadline=None)
    @given(wish=st.lists(st.floats(0.01, 2), min_size=2, max_size=10), total=st.integers(1, 300))
    def test_the_cascade_never_drops_below_what_it_ends_with(self, wish, total):
        """Shares of the layers so far, rounded up, hold at least the exact shares of all layers."""
        caps = torch.full((len(wish),), 40)
        last = allocate(torch.tensor(wish), total, caps)
        before = caps
        for seen in range(1, len(wish)):
            now = allocate(torch.tensor(wish[:seen]), total, caps[:seen], exact=False)
            assert bool((now <= before[:seen]).all())
            assert bool((now >= last[:seen]).all())
            before = torch.cat([now, caps[seen:]])

    def test_known_shares(self):
        caps = torch.full((3,), 100)
        assert allocate(torch.tensor([1.0, 1.0, 2.0]), 40, caps).tolist() == [10, 10, 20]
        assert allocate(torch.tensor([0.0, 0.0, 0.0]), 31, caps).tolist() == [11, 10, 10]
        assert allocate(torch.tensor([1.0, 1.0, 8.0]), 100, torch.tensor([60, 60, 20])).tolist() == [40, 40, 20]
        assert allocate(torch.tensor([1.0, 3.0]), 1000, torch.tensor([7, 9])).tolist() == [7, 9]

    def test_bad_totals_are_named(self):
        with pytest.raises(ArgumentError, match="got -1"):
            allocate(torch.ones(2), -1, torch.ones(2, dtype=torch.long))
        with pytest.raises(ArgumentError, match="nan"):
            allocate(torch.tensor([1.0, float("nan")]), 3, torch.ones(2, dtype=torch.long))
        with pytest.raises(ArgumentError, match="caps: got"):
            allocate(torch.ones(2), 3, torch.ones(3, dtype=torch.long))

    def test_preferences_are_what_they_say(self):
        similarity = torch.tensor([[0.9, 0.1, -0.2]], dtype=torch.float64)
        assert preferences("similarity", similarity).tolist() == [pytest.approx([0.1, 0.9, 1.2])]
        assert preferences("inverted", similarity).tolist() == [pytest.approx([0.9, 0.1, 0.0])]
        assert preferences("uniform", similarity).tolist() == [[1, 1, 1]]
        again = [preferences("random", similarity, seed=s).tolist() for s in (1, 1, 2)]
        assert again[0] == again[1] != again[2]
        spread, variance = torch.tensor([[4.0, 1.0, 1.0]]), torch.tensor([[9.0, 1.0, 1.0]])
        cake = preferences("cake", similarity, spread, variance, tau=(2.0, 2.0), normalise=False)
        assert cake.tolist() == [[6.0, 1.0, 1.0]]
        mixed = preferences("mixed", similarity, spread, variance, tau=(2.0, 2.0), alpha=10.0, normalise=False)
        assert mixed.tolist() == [pytest.approx([7.0, 10.0, 13.0])]
        level = preferences("mixed", similarity, 1e6 * spread, variance, tau=(2.0, 2.0))
        assert level.tolist() == [
            pytest.approx(preferences("mixed", similarity, spread, variance, tau=(2.0, 2.0))[0].tolist())
        ]
        with pytest.raises(ArgumentError, match="preference"):
            preferences("other", similarity)
        with pytest.raises(ArgumentError, match="spread, variance: got none"):
            preferences("cake", similarity)

    def test_released_temperatures(self):
        assert temperatures("llama", 1024) == (1.6, 0.4)
        assert temperatures("qwen2", 100) == (0.4, 0.6)
        assert temperatures("gemma2", 512) == (1.0, 1.0)

    def test_scores_are_mean_plus_variance_pooled_over_neighbours_and_heads(self):
        weights = torch.rand(1, 4, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        found = token_scores(weights, 2, gamma=7.0, pool=3)
        raw = weights.mean(2) + 7 * ((weights - weights.mean(2, keepdim=True)) ** 2).mean(2)
        want = (raw[0, 2:, 3:6].mean(-1)).mean()
        assert float(found[0, 1, 4]) == pytest.approx(float(want))
        assert float(found[0, 0, 0]) == pytest.approx(float(raw[0, :2, :2].sum(-1).mean() / 3))
        for options in ({"pool": 4}, {"pool": 0}):
            with pytest.raises(ArgumentError, match="pool: got"):
                token_scores(weights, 2, **options)

    def test_zero_weights_have_no_entropy(self):
        weights = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
        assert float(dispersion(weights)) == pytest.approx(0.6931, abs=1e-4)
        assert float(shift(weights)) == pytest.approx(2 * 0.0625)


KINDS = [{"level": "layer", "preference": "mixed"}, {"level": "head"}]


class TestPolicy:
    @pytest.mark.parametrize(
        "name", ["llama", "multi-query", "qwen3", "mistral sliding", "gpt-oss learned sinks", "gpt2"]
    )
    @pytest.mark.parametrize("level", ["layer", "head"])
    def test_a_budget_beyond_the_text_is_dense(self, name, level):
        contract.check_equals_dense(CAUSAL[name](), lambda: TappaEviction(budget=60, window=8, level=level))

    @pytest.mark.parametrize("options", KINDS, ids=str)
    @pytest.mark.parametrize(
        "check",
        [contract.check_causality, contract.check_requests_apart, contract.check_batch, contract.check_padding,
         contract.check_reorder_and_reset, contract.check_generate, contract.check_refuses_crop],
    )  # fmt: skip
    def test_it_meets_the_contract(self, check, options):
        check(CAUSAL["llama"](), lambda: TappaEviction(budget=6, window=3, **options))

    @pytest.mark.parametrize("name", ["qwen3", "mistral sliding", "multi-query"])
    def test_more_hosts_drop_in_batches_with_padding(self, name):
        contract.check_padding(CAUSAL[name](), lambda: TappaEviction(budget=6, window=3, level="head"))

    @pytest.mark.parametrize("level", ["layer", "head"])
    def test_the_total_is_kept_exactly_and_the_window_stays(self, level):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 80)
        cache = cache_after(model, ids, small(budget=40, level=level))
        held = cache.held()
        layers, _, heads = held.shape
        assert int(held.sum()) == 40 * layers * heads
        assert len(set(held.flatten().tolist())) > 1
        for layer in cache.layers:
            for store in layer.parts:
                for places in store.positions[0].tolist():
                    assert set(range(76, 80)) <= set(places)
                    assert places == sorted(places)
        assert cache.stored_bytes() == int(held.sum()) * 2 * 8 * 4
        assert cache.get_seq_length() == 80
        assert isinstance(cache, PolicyCache)

    def test_storage_is_ragged_over_kv_heads(self):
        cache = cache_after(CAUSAL["llama"](), contract.tokens(1, 40), small(level="head"))
        lengths = [[store.length for store in layer.parts] for layer in cache.layers]
        assert any(a != b for a, b in lengths)
        assert lengths == cache.held()[:, 0].tolist()

    @pytest.mark.parametrize("level", ["layer", "head"])
    def test_budgets_follow_one_minus_similarity(self, level):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 40)
        cache = cache_after(model, ids, small(level=level))
        similarity = []

        class Read(headway.door.Observer):
            def observe(self, call, output, lse=None):
                found = query_similarity(call.query, window=4)[0]
                similarity.extend([found.mean()] if level == "layer" else found.view(2, 2).mean(1))

        with torch.no_grad(), headway.observe(model, Read()):
            model(input_ids=ids)
        stores = 1 if level == "layer" else 2
        want = allocate(1 - torch.stack(similarity), 6 * 3 * stores, torch.full((3 * stores,), 36))
        got = [store.length - 4 for layer in cache.layers for store in layer.parts]
        assert got == want.tolist()

    def test_the_cascade_ends_where_one_allocation_at_the_end_would(self):
        """Kept keys are the best of each layer by scores that nothing evicted before has changed."""
        model, ids = CAUSAL["llama"](), contract.tokens(1, 40)
        cache = cache_after(model, ids, small())
        calls = {}

        class Keep(headway.door.Observer):
            def observe(self, call, output, lse=None):
                calls[call.site.layer] = call

        with torch.no_grad(), headway.observe(model, Keep()):
            model(input_ids=ids)
        for number, layer in enumerate(cache.layers):
            weights = calls[number].weights(torch.arange(36, 40))[..., :36]
            score = token_scores(weights, 2)[0]
            budget = layer.parts[0].length - 4
            for head in range(2):
                best = score[head].argsort(descending=True, stable=True)[:budget].sort().values.tolist()
                assert layer.parts[0].positions[0, head].tolist() == [*best, 36, 37, 38, 39]

    def test_what_is_read_after_eviction_is_what_was_kept(self):
        """A step over the ragged cache equals attention with everything else masked out."""
        model, ids = decoder("Llama", num_hidden_layers=1), contract.tokens(1, 40)
        more = contract.tokens(1, 1, seed=4)
        policy = small(level="head")
        with headway.use(model, policy), torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            kept = [store.positions[0, 0].tolist() for store in cache.layers[0].parts]
            got = model(input_ids=more, past_key_values=cache).logits[0, -1]

        class Only(headway.door.Editor):
            def edit_call(self, call):
                mask = torch.ones(1, 4, call.queries, call.keys, dtype=torch.bool)
                for head in range(4):
                    gone = [p for p in range(40) if p not in kept[head // 2]]
                    mask[0, head, -1, gone] = False
                return call.replace(mask=mask if call.mask is None else mask & call.mask)

        with headway.use(model, Only()), torch.no_grad():
            want = model(input_ids=torch.cat([ids, more], 1)).logits[0, -1]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)

    def test_prompts_up_to_budget_and_window_are_left_whole(self):
        model = CAUSAL["llama"]()
        assert cache_after(model, contract.tokens(1, 14), small()).held().min() == 14
        assert cache_after(model, contract.tokens(1, 15), small()).held().max() < 15

    def test_decoding_keeps_to_the_budget(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 60)
        with headway.use(model, small(slack=0)), torch.no_grad():
            cache = model(input_ids=ids[:, :40], use_cache=True).past_key_values
            held = cache.held()
            for i in range(40, 60):
                model(input_ids=ids[:, i : i + 1], past_key_values=cache)
                assert torch.equal(cache.held(), held)
                assert int(cache.layers[0].parts[0].positions.max()) == i
        assert cache.get_seq_length() == 60

    def test_decoding_adds_no_more_than_the_slack(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 60)
        with headway.use(model, small(slack=3)), torch.no_grad():
            cache = model(input_ids=ids[:, :40], use_cache=True).past_key_values
            start, extra = cache.held(), []
            for i in range(40, 60):
                model(input_ids=ids[:, i : i + 1], past_key_values=cache)
                extra.append(sorted(set((cache.held() - start).flatten().tolist())))
        assert extra[:5] == [[1], [2], [3], [0], [1]]
        assert small(budget=512).room == 32

    @pytest.mark.parametrize("slack", [0, 3])
    def test_a_batch_in_which_one_sequence_is_cut_while_another_decodes(self, slack):
        model = CAUSAL["llama"]()
        ids, mask = contract.padded_left(contract.tokens(2, 30), [0, 12])
        chunks = [24, 1, 1, 1, 1, 1, 1]
        with headway.use(model, small(level="head", slack=slack)):
            both = contract.run_in_chunks(model, ids, chunks, mask)
            for row, pads in enumerate((0, 12)):
                alone = contract.run_in_chunks(model, ids[row : row + 1, pads:], [24 - pads, *chunks[1:]])
                torch.testing.assert_close(both[row, pads:], alone[0], atol=1e-4, rtol=0)

    def test_hosts_without_rotary_positions_are_cut_by_queries_as_they_are(self):
        cache = cache_after(CAUSAL["gpt2"](), contract.tokens(1, 40), small(level="head"))
        assert int(cache.held().sum()) == 10 * 3 * 4

    def test_a_prompt_that_comes_token_by_token_is_cut_like_one_that_comes_at_once(self):
        """The last queries are remembered until the request is cut, so the chunks do not matter."""
        model, ids = CAUSAL["llama"](), contract.tokens(1, 15)
        whole = cache_after(model, ids, small())
        steps = cache_after(model, ids, small(), chunks=[5, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1])
        assert torch.equal(whole.held(), steps.held())
        for a, b in zip(whole.layers, steps.layers, strict=True):
            assert torch.equal(a.parts[0].positions, b.parts[0].positions)
            assert a.recent is None
            assert b.recent is None

    def test_queries_are_remembered_only_near_the_budget(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 14)
        with headway.use(model, small()), torch.no_grad():
            cache = model(input_ids=ids[:, :10], use_cache=True).past_key_values
            assert cache.layers[0].recent is None
            for i in range(10, 14):
                model(input_ids=ids[:, i : i + 1], past_key_values=cache)
        assert cache.layers[0].recent.shape == (1, 4, 4, 8)
        assert cache.stored_bytes() == 3 * (14 * 2 * 2 + 4 * 4) * 8 * 4

    def test_a_second_turn_shares_out_anew(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 60)
        cache = cache_after(model, ids, small(), chunks=[40, 20])
        assert int(cache.held().sum()) == 10 * 3 * 2
        assert int(cache.layers[0].parts[0].positions.max()) == 59

    def test_a_batch_keeps_what_its_sequences_keep_alone(self):
        model = CAUSAL["llama"]()
        ids, mask = contract.padded_left(contract.tokens(2, 40), [0, 9])
        both = cache_after(model, ids, small(level="head"), attention_mask=mask)
        alone = cache_after(model, ids[1:, 9:], small(level="head"))
        assert torch.equal(both.held()[:, 1], alone.held()[:, 0])
        for a, b in zip(both.layers, alone.layers, strict=True):
            for left, right in zip(a.parts, b.parts, strict=True):
                places = left.positions[1, 0]
                assert (places[places >= 0] - 9).tolist() == right.positions[0, 0].tolist()

    def test_pre_rope_similarity_and_adjacent_pairs_can_be_asked_for(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 100)
        found = [
            cache_after(model, ids, small(budget=60, stage=stage, pairs=pairs)).held().tolist()
            for stage in ("pre_rope", "post_rope") for pairs in ("all", "adjacent")
        ]  # fmt: skip
        assert len({str(held) for held in found}) > 1
        with pytest.raises(HostError, match="pre_rope"):
            cache_after(CAUSAL["gpt2"](), ids, small(stage="pre_rope"))

    def test_bad_numbers_and_hosts_are_refused(self):
        for options, match in (
            ({"budget": 4, "window": 4}, "got 4, 4"), ({"window": 0}, "window: got 0"), ({"level": "row"}, "level"),
            ({"preference": "best"}, "preference"), ({"pairs": "some"}, "pairs"), ({"stage": "rope"}, "stage"),
            ({"pool": 2}, "pool"), ({"gamma": -1.0}, "gamma"), ({"slack": -1}, "slack"),
        ):  # fmt: skip
            with pytest.raises(ArgumentError, match=match):
                small(**options)
        generator = torch.Generator().manual_seed(0)
        tensors = [torch.randn(1, 2, 4, 8, generator=generator) for _ in range(3)]
        call = AttentionCall.from_tensors(*tensors, bias=torch.randn(1, 2, 4, 4, generator=generator))
        call.forward.cache = small().make_cache(CAUSAL["llama"]())
        with pytest.raises(HostError, match="position bias"):
            small().read(call)

    def test_half_precision_hosts_keep_half_precision_keys(self):
        model, ids = CAUSAL["llama"]().to(torch.bfloat16), contract.tokens(1, 40)
        cache = cache_after(model, ids, small(level="head"), chunks=[38, 1, 1])
        assert {store.key.dtype for layer in cache.layers for store in layer.parts} == {torch.bfloat16}

    @pytest.mark.parametrize(
        ("name", "why"),
        [("deepseek_v3", "stores its keys compressed"), ("jamba", "expected"), ("gemma3n_text", "share keys")],
    )
    def test_hosts_that_store_something_else_are_refused(self, name, why):
        model, inputs = tiny_host(name)
        with headway.use(model, small()), pytest.raises(HostError, match=why), torch.no_grad():
            model(input_ids=inputs["input_ids"], use_cache=True)

    def test_a_share_of_the_context(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 60)
        for share in (0.25, 0.5):
            (policy,) = at_budget(share, tokens=60, model=model)
            held = cache_after(model, ids, policy).held()
            assert float(held.double().mean()) == 60 * share
        contract.check_equals_dense(model, lambda: at_budget(1.0, tokens=20, model=model)[0])


class TestPruning:
    def test_the_published_order_of_llama_2(self):
        influence, similarity = numbers(INFLUENCE), numbers(SIMILARITY)
        assert " ".join(map(str, prune_order(influence, similarity, beta=0.2))) == ORDER
        assert prune_order(influence, similarity, beta=0.0)[:11] == [25, 27, 26, 29, 28, 24, 23, 22, 21, 30, 19]

    def test_without_similarity_it_is_the_order_of_influence(self):
        influence = torch.tensor([0.4, 0.1, 0.3, 0.1])
        assert prune_order(influence, torch.rand(4), beta=0.0) == [1, 3, 2, 0]

    @settings(max_examples=30, deadline=None)
    @given(layers=st.integers(1, 20), beta=st.floats(0, 3), seed=st.integers(0, 99))
    def test_an_order_is_a_permutation(self, layers, beta, seed):
        generator = torch.Generator().manual_seed(seed)
        measures = [torch.rand(layers, generator=generator) for _ in range(2)]
        assert sorted(prune_order(*measures, beta=beta)) == list(range(layers))

    def test_equal_measures_scale_to_zero(self):
        assert adjusted_influence(torch.ones(3), torch.ones(3), beta=0.5).tolist() == [0.5, 0.5, 0.5]

    def test_bad_measures_are_named(self):
        for beta in (-1, float("nan")):
            with pytest.raises(ArgumentError, match=f"beta: got {beta}"):
                prune_order(torch.ones(3), torch.ones(3), beta=beta)
        with pytest.raises(ArgumentError, match="influence, similarity: got shapes"):
            prune_order(torch.ones(3), torch.ones(2))
        with pytest.raises(ArgumentError, match="NaN"):
            prune_order(torch.tensor([1.0, float("nan")]), torch.ones(2))

    def test_influence_is_one_minus_the_mean_cosine(self):
        stream = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
        assert block_influence(stream, 3 * stream) == pytest.approx(0, abs=1e-9)
        assert block_influence(stream, -stream) == pytest.approx(2)
        other = stream.clone()
        other[0, 0] *= -1
        valid = torch.ones(2, 5, dtype=torch.bool)
        valid[0, 0] = False
        assert block_influence(stream, other) == pytest.approx(0.2)
        assert block_influence(stream, other, valid) == pytest.approx(0, abs=1e-9)

    def test_measures_are_those_of_the_hosts_own_layers(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 24)
        found = measure_layers(model, [ids])
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            queries = model.model.layers[0].self_attn.q_proj(model.model.layers[0].input_layernorm(states[0]))
        assert float(found.influence[0]) == pytest.approx(block_influence(states[0], states[1]), abs=1e-6)
        want = query_similarity(queries.view(1, 24, 4, 8).transpose(1, 2)).mean()
        assert float(found.similarity[0]) == pytest.approx(float(want), abs=1e-4)
        assert sorted(found.order()) == [0, 1, 2]
        with pytest.raises(ArgumentError, match="chunks: got none"):
            measure_layers(model, [])

    @pytest.mark.parametrize(("name", "projection"), [("phi3", "qkv_proj"), ("gpt2", "c_attn")])
    def test_hosts_with_one_projection_for_all_are_measured_by_their_queries(self, name, projection):
        """Queries stand first in both; GPT-2 turns none, so its queries are measured as they are."""
        model, inputs = tiny_host(name)
        raw = []
        modules = [m for path, m in model.named_modules() if path.endswith(projection)]
        found = measure_layers(model, [inputs["input_ids"]])
        hooks = [m.register_forward_hook(lambda m, args, out: raw.append(out)) for m in modules]
        with torch.no_grad():
            model(input_ids=inputs["input_ids"], use_cache=False)
        for hook in hooks:
            hook.remove()
        heads, width = model.config.num_attention_heads, model.config.hidden_size
        for layer, out in enumerate(raw):
            query = out[..., :width].unflatten(-1, (heads, -1)).transpose(1, 2)
            assert float(found.similarity[layer]) == pytest.approx(float(query_similarity(query).mean()), abs=1e-4)

    def test_chunks_cover_a_text(self):
        ids = torch.arange(20)[None]
        assert [chunk[0, 0].item() for chunk in text_chunks(ids, length=8, stride=4)] == [0, 4, 8, 12]
        assert len(text_chunks(ids, length=8, stride=4, most=2)) == 2
        with pytest.raises(ArgumentError, match="20 tokens"):
            text_chunks(ids, length=21)


class TestLeavingOut:
    @pytest.mark.parametrize("name", ["llama", "qwen3", "mistral sliding", "gemma2 soft cap", "gpt2"])
    @pytest.mark.parametrize("layers", [[0], [1], [2, 0]])
    def test_the_rest_is_the_model_of_the_remaining_layers_also_with_a_cache(self, name, layers):
        model, ids = CAUSAL[name](), contract.tokens(2, 16)
        kept = [i for i in range(3) if i not in layers]
        smaller = CAUSAL[name]()
        inner = smaller.transformer if name == "gpt2" else smaller.model
        field = "h" if name == "gpt2" else "layers"
        blocks = torch.nn.ModuleList(getattr(inner, field)[i] for i in kept)
        for number, block in enumerate(blocks):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number
        setattr(inner, field, blocks)
        smaller.config.num_hidden_layers = len(kept)
        if getattr(smaller.config, "layer_types", None):
            smaller.config.layer_types = [smaller.config.layer_types[i] for i in kept]
        with torch.no_grad():
            native, want = model(input_ids=ids).logits, smaller(input_ids=ids).logits
            with without_blocks(model, layers):
                torch.testing.assert_close(model(input_ids=ids).logits, want)
                parts = contract.run_in_chunks(model, ids, [12, 1, 1, 1, 1])
                torch.testing.assert_close(
                    parts, contract.run_in_chunks(smaller, ids, [12, 1, 1, 1, 1]), atol=1e-5, rtol=0
                )
            assert torch.equal(model(input_ids=ids).logits, native)
        assert [m.layer_idx for m in model.modules() if hasattr(m, "layer_idx")][-1] == 2
        assert model.config.num_hidden_layers == 3

    @pytest.mark.parametrize("name", ["llama", "gpt2"])
    def test_attention_that_is_left_out_adds_nothing_and_is_not_computed(self, name):
        model, ids = CAUSAL[name](), contract.tokens(1, 16)
        blocks = host_blocks(model)
        with torch.no_grad():
            native = model(input_ids=ids).logits
            hook = getattr(blocks[1], "attn" if name == "gpt2" else "self_attn").register_forward_hook(
                lambda m, args, out: (torch.zeros_like(out[0]), *out[1:])
            )
            want = model(input_ids=ids).logits
            hook.remove()
            ran = []
            hooks = [m.register_forward_hook(lambda m, a, o, n=n: ran.append(n)) for n, m in model.named_modules()]
            with without_attention(model, [1]):
                ran.clear()
                torch.testing.assert_close(model(input_ids=ids).logits, want)
                seen = [n for n in ran if n.endswith(("q_proj", "c_attn"))]
                parts = contract.run_in_chunks(model, ids, [12, 1, 1, 1, 1])
                torch.testing.assert_close(parts, want, atol=1e-4, rtol=0)
            for hook in hooks:
                hook.remove()
            assert len(seen) == 2
            assert torch.equal(model(input_ids=ids).logits, native)

    def test_attention_of_the_first_layer_can_go_too(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 16)
        with without_attention(model, [0, 1]):
            with torch.no_grad():
                want = model(input_ids=ids).logits
            parts = contract.run_in_chunks(model, ids, [10, 1, 5])
        torch.testing.assert_close(parts, want, atol=1e-4, rtol=0)

    def test_scopes_work_inside(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 40)
        with without_blocks(model, [1]):
            cache = cache_after(model, ids, small())
            assert len(cache.layers) == 2
            assert int(cache.held().sum()) == 10 * 2 * 2

    def test_generation_works_inside_and_nothing_stays_after_an_error(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 8)
        with torch.no_grad():
            native = model(input_ids=ids).logits
            with without_blocks(model, [0]):
                out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
            assert out.shape == (1, 12)
            for context in (without_blocks, without_attention):
                with pytest.raises(RuntimeError, match="inside"), context(model, [1]):
                    raise RuntimeError("inside")
            assert torch.equal(model(input_ids=ids).logits, native)

    def test_bad_layers_are_named(self):
        model = CAUSAL["llama"]()
        for context in (without_blocks, without_attention):
            with pytest.raises(ArgumentError, match="layers: got 3"), context(model, [3]):
                pass
            with pytest.raises(ArgumentError, match="each layer once"), context(model, [1, 1]):
                pass
            with pytest.raises(ArgumentError, match="got all 3"), context(model, [0, 1, 2]):
                pass
            with headway.use(model), pytest.raises(ConflictError, match="while a scope is open"), context(model, [1]):
                pass

    def test_hosts_that_cannot_be_cut_say_why(self):
        with pytest.raises(HostError, match="layers are of kinds"), without_attention(CAUSAL["gemma2 soft cap"](), [0]):
            pass
        with pytest.raises(HostError, match="num_kv_shared_layers"), without_blocks(tiny_host("gemma3n_text")[0], [0]):
            pass
        model, _ = OTHERS["t5 (position bias)"]()
        with pytest.raises(HostError, match="lists of blocks that all attend"), without_blocks(model, [0]):
            pass
