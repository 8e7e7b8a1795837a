"""The survey's cache policies: H2O, A2SF, KeyDiff, OrthoRank, and a quantised cache with exact sinks."""

from __future__ import annotations

import logging
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

import headway
from headway.door.call import AttentionCall
from headway.errors import ArgumentError, HostError
from headway.hosts.tiny import tiny_host
from headway.methods.sinks.sink_survey import A2SF, H2O, IntactKV, KeyDiff, OrthoRank, key_difference, quantise
from headway.methods.sinks.sink_survey.packed import PackedTokens, pack_pairs, unpack_pairs
from headway.methods.sinks.sink_survey.ranked import accumulated

RANKED = {"h2o": H2O, "a2sf": A2SF, "keydiff": KeyDiff, "orthorank": OrthoRank}
SMALL = {name: partial(policy, budget=9, recent=3, sinks=2) for name, policy in RANKED.items()}
QUANTISED = {
    "channel": partial(IntactKV, bits=4, sinks=2, group=4),
    "tensor": partial(IntactKV, bits=8, sinks=1, group=3, key_per="tensor", value_per="tensor"),
    "token": partial(IntactKV, bits=8, sinks=0, group=1, key_per="token"),
}
POLICIES = SMALL | {f"intactkv {name}": make for name, make in QUANTISED.items()}
HOSTS = ["llama", "multi-query", "mistral sliding", "gemma2 soft cap", "gpt-oss learned sinks"]


def gated(projection: str) -> torch.nn.Module:
    """A decoder with an output gate where hosts keep its weights: in a module of its own, or in the second half of the
    query projection. What it does to outputs is left out, so that keys and their scores are those of the plain host."""
    model = CAUSAL["llama"]()
    for layer in model.model.layers:
        attention, query = layer.self_attn, layer.self_attn.q_proj
        gate = torch.nn.Linear(query.in_features, query.out_features, bias=False)
        setattr(attention, projection, Doubled(query) if projection == "q_proj" else gate)
    return model


class Doubled(torch.nn.Linear):
    """A query projection of twice the size, of which the second half is a gate that its host would take off."""

    def __init__(self, query: torch.nn.Linear) -> None:
        super().__init__(query.in_features, 2 * query.out_features, bias=False)
        self.weight.data[: query.out_features] = query.weight.data

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x)[..., : self.out_features // 2]


class TestContract:
    @pytest.mark.parametrize("name", RANKED)
    @pytest.mark.parametrize("host", HOSTS)
    def test_a_budget_for_everything_is_dense(self, name, host):
        contract.check_equals_dense(CAUSAL[host](), partial(RANKED[name], budget=64, recent=4, sinks=2))

    @pytest.mark.parametrize("host", HOSTS)
    def test_an_exact_cache_is_dense(self, host):
        contract.check_equals_dense(CAUSAL[host](), partial(IntactKV, bits=None))

    @pytest.mark.parametrize("name", POLICIES)
    @pytest.mark.parametrize(
        "check",
        [contract.check_padding, contract.check_causality, contract.check_requests_apart, contract.check_batch,
         contract.check_reorder_and_reset, contract.check_generate, contract.check_refuses_crop],
    )  # fmt: skip
    def test_the_contract_of_cache_policies(self, name, check):
        # A value halfway between two steps is rounded up or down by the last bit, which differs between machines: in
        # double precision none is that close.
        host = CAUSAL["llama"]()
        check(host.double() if "intactkv" in name else host, POLICIES[name])

    @pytest.mark.parametrize("name", ["h2o", "intactkv channel"])
    @pytest.mark.parametrize("check", contract.ONCE)
    def test_refusals_and_static_caches(self, name, check):
        # A value halfway between two steps is rounded up or down by the last bit, which differs between machines: in
        # double precision none is that close.
        host = CAUSAL["llama"]()
        check(host.double() if "intactkv" in name else host, POLICIES[name])

    @pytest.mark.parametrize("name", RANKED)
    def test_the_budget_is_respected_after_every_forward(self, name):
        contract.check_lengths(CAUSAL["llama"](), SMALL[name], 9)


class TestWhatStays:
    @pytest.mark.parametrize("name", RANKED)
    @pytest.mark.parametrize("pads", [[0, 0], [0, 5], [3, 0]])
    def test_sinks_and_recent_tokens_stay_and_places_are_sorted(self, name, pads):
        ids, mask = contract.padded_left(contract.tokens(2, 24), pads)
        with headway.use(CAUSAL["llama"](), SMALL[name]()) as handle, torch.no_grad():
            past, start = None, 0
            for chunk in (18, 3, 1, 1, 1):
                stop = start + chunk
                past = handle.model(
                    input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=past, use_cache=True
                ).past_key_values
                start = stop
                for places in past.held():
                    for row, pad in enumerate(pads):
                        for head in places[row]:
                            held = head[head >= 0].tolist()
                            assert held == sorted(set(held))
                            assert len(held) == min(9, stop - pad)
                            assert {pad, pad + 1} <= set(held)
                            assert set(range(stop - 3, stop)) <= set(held)
                            assert min(held) >= pad

    def test_h2o_keeps_the_keys_with_most_attention(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 16)
        kept = {}
        with headway.capture(model, what=("weights",)) as captured, torch.no_grad():
            model(input_ids=ids)
        for layer in range(3):
            weights = captured.result()[layer]["weights"]
            received = weights.sum(2).view(1, 2, 2, 16).mean(2)[0]
            received[:, -2:] = torch.inf
            received[:, 0] = torch.inf
            kept[layer] = [sorted(r.topk(7).indices.tolist()) for r in received]
        with headway.use(model, H2O(budget=7, recent=2, sinks=1)), torch.no_grad():
            past = model(input_ids=ids, use_cache=True).past_key_values
        for layer, places in enumerate(past.held()):
            assert places[0].tolist() == kept[layer]

    def test_without_forgetting_a2sf_is_h2o(self):
        model, ids = CAUSAL["llama"](), contract.tokens(2, 20)
        options = {"budget": 8, "recent": 2, "sinks": 1}
        found = []
        for policy in (H2O(**options), A2SF(forgetting=1.0, **options)):
            with headway.use(model, policy):
                found.append(contract.run_in_chunks(model, ids, [12, 5, 1, 1, 1]))
        assert torch.equal(*found)

    def test_forgetting_is_the_recursion(self):
        """score ← γ·score + A_t, query by query."""
        generator = torch.Generator().manual_seed(0)
        query, key = (torch.randn(2, h, 10, 4, generator=generator) for h in (4, 2))
        call = AttentionCall.from_tensors(query, key, key, causal=True)
        score = torch.zeros(2, 2, 10)
        for t in range(10):
            score = 0.7 * score + call.weights(torch.tensor([t]))[:, :, 0].unflatten(1, (2, 2)).mean(2)
        torch.testing.assert_close(accumulated(call, 2, forgetting=0.7, block=3), score)

    def test_forgetting_lets_an_old_favourite_go(self):
        """Key 3 gets all attention of nine rows, key 9 that of the eight behind: plain sums keep 3, fading ones 9, also
        where the scores of a first forward fade in a second one."""
        query, key = torch.zeros(1, 1, 20, 2), torch.zeros(1, 1, 20, 2)
        query[..., 3:12, 0] = query[..., 12:, 1] = 200.0
        key[..., 3, 0] = key[..., 9, 1] = 1.0
        whole = AttentionCall.from_tensors(query, key, key, causal=True)
        assert int(accumulated(whole, 1).argmax()) == 3
        assert int(accumulated(whole, 1, forgetting=0.6).argmax()) == 9
        first = AttentionCall.from_tensors(query[:, :, :12], key[:, :, :12], key[:, :, :12], causal=True)
        for policy, kept in ((H2O(), 3), (A2SF(forgetting=0.6), 9)):
            layer = SimpleNamespace(score=torch.zeros(1, 1, 12))
            layer.score = torch.nn.functional.pad(policy.rank(first, layer, first, None), (0, 8))
            rest = AttentionCall.from_tensors(query[:, :, 12:], key, key, causal=True)
            assert int(policy.rank(rest, layer, rest, None).argmax()) == kept

    def test_keydiff_gives_the_odd_key_the_highest_score(self):
        key = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1], [1.0, -0.1], [1.0, 0.0], [-1.0, 0.2]]), dim=-1)
        for anchor in ("mean", "direction"):
            score = key_difference(key, anchor=anchor)
            assert score.argmax() == 3
            assert score.min() >= 0
        torch.testing.assert_close(key_difference(3 * key), key_difference(key))

    def test_orthorank_keeps_tokens_orthogonal_to_the_first_one(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 16)
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
            expected = []
            for layer, hidden in zip(model.model.layers, states, strict=False):
                h = layer.input_layernorm(hidden)[0]
                score = 1 - torch.nn.functional.cosine_similarity(h, h[:1]).abs()
                score[:1], score[-2:] = torch.inf, torch.inf
                expected.append(sorted(score.topk(7).indices.tolist()))
            with headway.use(model, OrthoRank(budget=7, recent=2, sinks=1)):
                past = model(input_ids=ids, use_cache=True).past_key_values
        # Eviction comes after the forward of a prompt, so every layer still sees the host's own states.
        for places, wanted in zip(past.held(), expected, strict=True):
            assert places[0].tolist() == [wanted] * 2

    def test_a_host_with_learned_sinks_is_told_that_nothing_is_protected(self, caplog):
        model = CAUSAL["gpt-oss learned sinks"]()
        with headway.use(model, H2O(budget=6, recent=2, sinks=2)), caplog.at_level(logging.WARNING), torch.no_grad():
            model(input_ids=contract.tokens(1, 14), use_cache=True)
        assert sum("learned sinks" in record.message for record in caplog.records) == 1

    @pytest.mark.parametrize("projection", ["gate_proj", "g_proj", "q_proj"])
    def test_a_gated_host_is_told_that_nothing_is_protected(self, projection, caplog):
        """Its first tokens stay or go by their score alone, as with no sinks asked for."""

        def held(model: torch.nn.Module, sinks: int) -> list:
            caplog.clear()
            with headway.use(model, KeyDiff(budget=8, recent=2, sinks=sinks)), caplog.at_level(logging.WARNING):
                with torch.no_grad():
                    past = model(input_ids=contract.tokens(2, 20), use_cache=True).past_key_values
                return [places.tolist() for places in past.held()]

        free = held(gated(projection), 0)
        assert not caplog.records
        assert held(gated(projection), 4) == free
        assert sum("has a gate on the output of attention, so its first" in r.message for r in caplog.records) == 1
        assert held(CAUSAL["llama"](), 4) != free, "the same host without a gate keeps its first tokens"

    @pytest.mark.parametrize("name", RANKED)
    def test_a_prompt_shorter_than_sinks_and_window_is_left_whole(self, name):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 4)
        with torch.no_grad():
            native = model(input_ids=ids).logits
            with headway.use(model, SMALL[name]()):
                got = contract.run_in_chunks(model, ids, [2, 1, 1])
        torch.testing.assert_close(got, native, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("host", ["deepseek_v3", "minicpm3"])
    @pytest.mark.parametrize("name", ["h2o", "keydiff", "intactkv channel"])
    def test_keys_that_are_stored_compressed_are_refused(self, host, name):
        """Multi-head latent attention: what is stored is no key, and has another size than one."""
        model, given = tiny_host(host)
        told = r"self_attn: got keys of 24 dimensions, 16 in the cache.*latent"
        with torch.no_grad(), headway.use(model, POLICIES[name]()), pytest.raises(HostError, match=told):
            model(input_ids=given["input_ids"], use_cache=True)
        with torch.no_grad():
            model(input_ids=given["input_ids"], use_cache=True)

    def test_bad_numbers_are_named(self):
        with pytest.raises(ArgumentError, match="budget, recent, sinks: got 4, 3, 2"):
            H2O(budget=4, recent=3, sinks=2)
        with pytest.raises(ArgumentError, match=r"forgetting: got 0.*expected a factor in \(0, 1\]"):
            A2SF(forgetting=0.0)
        with pytest.raises(ArgumentError, match="anchor: got 'median', expected one of mean, direction"):
            KeyDiff(anchor="median")
        with pytest.raises(ArgumentError, match="sinks: got 0, expected at least 1"):
            OrthoRank(sinks=0)
        with pytest.raises(ArgumentError, match="bits: got 3"):
            IntactKV(bits=3)
        with pytest.raises(ArgumentError, match="key_per: got 'head'"):
            IntactKV(key_per="head")


class TestQuantisedCache:
    @settings(max_examples=30, deadline=None)
    @given(st.integers(1, 9), st.integers(0, 2**31))
    def test_pairs_come_back(self, dim, seed):
        codes = torch.randint(-8, 8, (2, 3, dim), generator=torch.Generator().manual_seed(seed)).to(torch.int8)
        packed = pack_pairs(codes)
        assert packed.shape[-1] == -(-dim // 2)
        assert torch.equal(unpack_pairs(packed, dim), codes)

    @pytest.mark.parametrize("per", ["tensor", "channel", "token"])
    @pytest.mark.parametrize("bits", [4, 8])
    def test_what_is_stored_is_absmax_quantisation(self, per, bits):
        x = torch.randn(2, 3, 12, 5, generator=torch.Generator().manual_seed(1))
        every = torch.ones(2, 12, dtype=torch.bool)
        half = PackedTokens(bits=bits, per=per)
        closed = half.close(x, every, every)
        group = torch.zeros(2, 12, dtype=torch.long)
        half.pack(closed[:, :, :7], group)
        half.pack(closed[:, :, 7:], group)
        got = half.unpack(group, torch.float32)
        largest = 2 ** (bits - 1) - 1
        over = {"tensor": (1, 2, 3), "channel": (2,), "token": (3,)}[per]
        step = x.abs().amax(over, keepdim=True) / largest
        torch.testing.assert_close(got, torch.round(x / step) * step)
        if per == "tensor":
            torch.testing.assert_close(got[0], quantise(x[0], bits=bits))

    def test_a_sink_stays_exact_and_out_of_the_scale(self):
        """An outlier key at the first token: exact sinks keep the rest sharp."""
        model, ids = CAUSAL["llama"](), contract.tokens(1, 17)
        stored = {}
        for sinks in (0, 1):
            policy = IntactKV(bits=4, sinks=sinks, group=4, key_per="tensor", value_per="tensor")
            with headway.use(model, policy), torch.no_grad():
                past = model(input_ids=ids[:, :16], use_cache=True).past_key_values
                layer = past.layers[1]
                stored[sinks] = layer.everything()
        with torch.no_grad():
            exact = model(input_ids=ids[:, :16], use_cache=True).past_key_values.layers[1].keys
        assert torch.equal(stored[1][0][:, :, 0], exact[:, :, 0])
        rest = quantise(exact[:, :, 1:].flatten(1, 2)[0], bits=4).view(2, 15, 8)
        torch.testing.assert_close(stored[1][0][0, :, 2:], rest)
        assert stored[1][2][0].tolist() == [0, -1, *range(1, 16)]
        assert not torch.equal(stored[0][0][:, :, 0], exact[:, :, 0])

    def test_bytes_are_really_saved(self):
        model = decoder("Llama", hidden_size=128, head_dim=32, num_key_value_heads=4)
        ids = contract.tokens(1, 80)
        held = {}
        for bits in (None, 8, 4):
            with headway.use(model, IntactKV(bits=bits, group=16)), torch.no_grad():
                cache = model(input_ids=ids, use_cache=True).past_key_values
                held[bits] = cache.stored_bytes()
                layer = cache.layers[0]
                own = [t for half in layer.halves for t in (half.codes, half.steps) if t is not None]
                own += [t for store in layer.stores if not store.empty for t in (store.key, store.value)]
                assert held[bits] == 3 * sum(t.numel() * t.element_size() for t in own)
        assert held[None] == 3 * 2 * 80 * 4 * 32 * 4
        assert held[8] < 0.36 * held[None]
        assert held[4] < 0.25 * held[None]

    def test_a_host_without_sinks_is_told_once_that_none_need_be_exact(self, caplog):
        for model, instead in (
            (CAUSAL["gpt-oss learned sinks"](), "learned sinks"),
            (gated("g_proj"), "a gate on the output of attention"),
        ):
            caplog.clear()
            with headway.use(model, IntactKV(sinks=2)), caplog.at_level(logging.WARNING), torch.no_grad():
                contract.run_in_chunks(model, contract.tokens(1, 14), [12, 1, 1])
            told = [r.message for r in caplog.records if r.message.startswith("IntactKV")]
            assert told == [f"IntactKV: the host has {instead}, so its first tokens need not be exact."]
        caplog.clear()
        with headway.use(gated("g_proj"), IntactKV(sinks=0)) as handle, torch.no_grad():
            handle.model(input_ids=contract.tokens(1, 14), use_cache=True)
        assert not caplog.records

    def test_a_short_prompt_waits_exact(self):
        model, ids = CAUSAL["llama"](), contract.tokens(2, 10)
        with torch.no_grad():
            native = model(input_ids=ids).logits
        with headway.use(model, IntactKV(bits=4, group=20)):
            got = contract.run_in_chunks(model, ids, [5, 3, 1, 1])
        torch.testing.assert_close(got, native, atol=1e-4, rtol=0)

    def test_decoded_tokens_turn_into_codes_once_a_group_is_full(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
        lengths = []
        with headway.use(model, IntactKV(bits=4, sinks=1, group=4)), torch.no_grad():
            past = None
            for start, stop in [(0, 9), *((t, t + 1) for t in range(9, 20))]:
                past = model(input_ids=ids[:, start:stop], past_key_values=past, use_cache=True).past_key_values
                lengths.append((past.layers[0].halves[0].tokens, past.layers[0].exact.length))
        assert lengths == [(9, 0), (9, 1), (9, 2), (9, 3), (13, 0), (13, 1), (13, 2), (13, 3), (17, 0), (17, 1),
                           (17, 2), (17, 3)]  # fmt: skip
        assert past.get_seq_length() == 20

    def test_many_bits_change_little(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 24)
        with torch.no_grad():
            native = model(input_ids=ids).logits
        error = {}
        for bits in (4, 8):
            with headway.use(model, IntactKV(bits=bits, group=4)):
                got = contract.run_in_chunks(model, ids, [12, *[1] * 12])
            error[bits] = float((got - native).norm() / native.norm())
        assert error[8] < 0.05 < 1
        assert error[8] < 0.5 * error[4]


@pytest.mark.parametrize("module", ["h2o", "a2sf", "keydiff", "orthorank", "intactkv"])
def test_share_one_is_a_budget_for_every_position(module):
    from headway.card import homes

    home = homes()[module]
    model = CAUSAL["llama"]()
    (stage,) = home.at_budget(1.0, tokens=40, model=model)
    assert getattr(stage, "bits", None) is None if module == "intactkv" else stage.budget == 128
    (stage,) = home.at_budget(0.25, tokens=40, model=model)
    assert stage.bits == 8 if module == "intactkv" else stage.budget == 10
    with pytest.raises(ArgumentError, match="share"):
        home.at_budget(0.0, tokens=40, model=model)
