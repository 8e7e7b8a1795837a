"""ACT: which keys are sinks, what happens to a row, and the stage in running hosts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, OTHERS, decoder

import headway
from headway.door import AttentionCall, Editor, Observer, UniformHeads
from headway.errors import ArgumentError, ConflictError, HostError
from headway.hosts.tiny import tiny_host
from headway.kernels.dense import dense_attention
from headway.methods.sinks.act import (
    ACT,
    HeadSet,
    at_budget,
    candidate_heads,
    find_sinks,
    interpolate,
    received_mass,
    redistribute,
    without_first_flagged,
)

EVERY = [(layer, head) for layer in range(3) for head in range(4)]
LOW = {"tau": 0.05, "least_rows": 2}


def causal_weights(batch=1, heads=2, tokens=12, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(batch, heads, tokens, tokens, generator=generator, dtype=dtype)
    future = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    return logits.masked_fill(future, -torch.inf).softmax(-1)


def planted(tokens=20, sink=4, mass=0.6):
    """One head whose rows from `sink` on give `mass` to it and share the rest evenly."""
    weights = torch.zeros(1, 1, tokens, tokens, dtype=torch.float64)
    for row in range(tokens):
        if row <= sink:
            weights[0, 0, row, : row + 1] = 1 / (row + 1)
        else:
            weights[0, 0, row, : row + 1] = (1 - mass) / row
            weights[0, 0, row, sink] = mass
    return weights


class TestDetection:
    def test_received_mass_is_the_mean_over_rows_that_see_the_key(self):
        weights = causal_weights(tokens=7)
        mass, count = received_mass(weights)
        assert count[0, 0].tolist() == [7, 6, 5, 4, 3, 2, 1]
        for key in range(7):
            assert float(mass[0, 1, key]) == pytest.approx(float(weights[0, 1, key:, key].sum()))

    def test_a_planted_sink_is_found_and_nothing_else(self):
        mass, count = received_mass(planted())
        assert find_sinks(mass, count, tau=0.3)[0, 0].nonzero()[:, 0].tolist() == [4]

    def test_both_thresholds_agree_at_fifty_tokens(self):
        mass, count = received_mass(causal_weights(heads=6, tokens=50))
        absolute = find_sinks(mass, count, least_rows=1)
        assert torch.equal(absolute, find_sinks(mass, count, threshold="relative", least_rows=1))
        mass, count = received_mass(causal_weights(heads=6, tokens=20))
        relative = find_sinks(mass, count, threshold="relative", least_rows=1)
        assert torch.equal(relative, find_sinks(mass, count, tau=0.25, least_rows=1))

    def test_keys_that_few_rows_see_are_no_sinks(self):
        """A last key is seen by its own row alone, which attends to itself for no reason of sinking."""
        weights = planted()
        weights[0, 0, 19] = 0
        weights[0, 0, 19, 19] = 1
        mass, count = received_mass(weights)
        assert bool(find_sinks(mass, count, tau=0.3, least_rows=1)[0, 0, 19])
        assert not bool(find_sinks(mass, count, tau=0.3)[0, 0, 19])

    def test_padded_rows_and_keys_do_not_count(self):
        weights = planted()
        padded = torch.nn.functional.pad(weights, (3, 0, 3, 0))
        padded[0, 0, :3, :3] = torch.eye(3)
        visible = torch.ones(23, 23, dtype=torch.bool).tril()[None, None]
        visible[..., 3:, :3] = False
        real = torch.tensor([[False] * 3 + [True] * 20])
        want, got = received_mass(weights), received_mass(padded, visible, real)
        for a, b in zip(want, got, strict=True):
            torch.testing.assert_close(a, b[..., 3:])
            assert float(b[..., :3].abs().sum()) == 0

    def test_the_released_rule_spares_the_first_flagged_key(self):
        flags = torch.tensor([[False, True, False, True, True]])
        assert without_first_flagged(flags).tolist() == [[False, False, False, True, True]]

    @pytest.mark.parametrize(
        ("options", "match"),
        [
            ({"tau": 0.0}, "tau: got 0.0"), ({"tau": 1.0}, "tau: got 1.0"), ({"alpha": 0.0}, "alpha: got 0.0"),
            ({"alpha": -1.0}, "alpha"), ({"threshold": "other"}, "threshold"),
        ],
    )  # fmt: skip
    def test_bad_thresholds_are_named(self, options, match):
        mass, count = received_mass(planted())
        with pytest.raises(ArgumentError, match=match):
            find_sinks(mass, count, **options)
        with pytest.raises(ArgumentError, match=match):
            ACT(heads=[(0, 0)], **options)


class TestCalibration:
    @settings(max_examples=40, deadline=None)
    @given(tokens=st.integers(2, 14), beta=st.floats(0, 1), seed=st.integers(0, 1000))
    def test_rows_keep_their_sum_and_causal_zeros(self, tokens, beta, seed):
        weights = causal_weights(tokens=tokens, seed=seed)
        sinks = torch.rand(1, 2, 1, tokens, generator=torch.Generator().manual_seed(seed)) < 0.4
        changed = redistribute(weights, sinks, beta=beta)
        torch.testing.assert_close(changed.sum(-1), weights.sum(-1), atol=1e-12, rtol=0)
        assert bool((changed >= 0).all())
        assert bool((changed[weights == 0] == 0).all())

    def test_beta_one_or_no_sinks_change_nothing(self):
        weights = causal_weights(dtype=torch.float32)
        some = torch.zeros(1, 2, 1, 12, dtype=torch.bool)
        assert torch.equal(redistribute(weights, some, beta=0.0), weights)
        some[..., 3] = True
        torch.testing.assert_close(redistribute(weights, some, beta=1.0), weights, atol=1e-6, rtol=0)

    def test_ratios_between_other_keys_stay(self):
        weights = causal_weights()
        sinks = torch.zeros(1, 2, 1, 12, dtype=torch.bool)
        sinks[..., 2] = True
        changed = redistribute(weights, sinks, beta=0.3)
        ratio = changed[..., 11, 5] / changed[..., 11, 7]
        torch.testing.assert_close(ratio, weights[..., 11, 5] / weights[..., 11, 7])
        torch.testing.assert_close(changed[..., 11, 2], 0.3 * weights[..., 11, 2])

    @pytest.mark.parametrize("beta", [0.0, 0.4, 1.0])
    def test_act_interpolates_between_all_keys_and_the_keys_without_sinks(self, beta):
        generator = torch.Generator().manual_seed(1)
        query, key, value = (torch.randn(2, 3, 16, 8, generator=generator) for _ in range(3))
        sinks = torch.zeros(2, 3, 1, 16, dtype=torch.bool)
        sinks[:, :, :, [3, 6]] = True
        dense, _ = dense_attention(query, key, value, causal=True)
        masked, _ = dense_attention(query, key, value, causal=True, mask=~sinks)
        edited, _ = dense_attention(
            query, key, value, causal=True, edit=lambda weights, rows: redistribute(weights, sinks, beta=beta)
        )
        torch.testing.assert_close(edited, interpolate(dense, masked, strength=1 - beta), atol=1e-5, rtol=0)

    def test_a_row_with_all_its_mass_on_sinks_stays(self):
        weights = torch.tensor([[[[0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]]])
        sinks = torch.tensor([[[[False, True, False]]]])
        changed = redistribute(weights, sinks, beta=0.0)
        assert changed[0, 0].tolist() == [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]

    @pytest.mark.parametrize("beta", [0.0, 0.4])
    @pytest.mark.parametrize("rest", [1e-3, 1e-5, 2e-6])
    def test_rows_with_nearly_all_mass_on_sinks_keep_their_sum_in_single_precision(self, rest, beta):
        """What is left beside the sinks is summed: 1 − σ in float32 is wrong by a tenth there."""
        others = rest * causal_weights(heads=1, tokens=40)
        weights = torch.cat([torch.full((1, 1, 40, 1), 1 - rest, dtype=torch.float64), others], -1)
        sinks = torch.arange(41) == 0
        exact, single = (redistribute(x, sinks, beta=beta) for x in (weights, weights.float()))
        torch.testing.assert_close(single.sum(-1), torch.ones(1, 1, 40), atol=1e-6, rtol=0)
        torch.testing.assert_close(single.double(), exact, atol=1e-6, rtol=0)
        assert float(single[..., 1:].sum(-1).min()) > 0.5 * (1 - beta)

    @pytest.mark.parametrize("beta", [-0.1, 1.1])
    def test_beta_out_of_range_is_named(self, beta):
        with pytest.raises(ArgumentError, match="beta: got"):
            redistribute(torch.ones(1, 1, 1, 1), torch.ones(1, 1, 1, 1, dtype=torch.bool), beta=beta)
        with pytest.raises(ArgumentError, match="beta: got"):
            ACT(heads=[(0, 0)], beta=beta)
        with pytest.raises(ArgumentError, match="strength: got"):
            interpolate(torch.ones(1), torch.ones(1), strength=beta)


@torch.no_grad()
def logits(model, ids, *stages, **inputs):
    with headway.use(model, *stages):
        return model(input_ids=ids, **inputs).logits


class TestStage:
    @pytest.mark.parametrize("name", ["llama", "qwen3", "mistral sliding", "gemma2 soft cap", "gpt-oss learned sinks"])
    @pytest.mark.parametrize("scope", ["prompt", "causal"])
    def test_beta_one_and_no_heads_are_dense_and_other_settings_are_not(self, name, scope):
        model, ids = CAUSAL[name](), contract.tokens(2, 20)
        with torch.no_grad():
            native = model(input_ids=ids).logits
        assert torch.equal(logits(model, ids, ACT(heads=EVERY, beta=1.0, scope=scope)), native)
        assert torch.equal(logits(model, ids, ACT(heads=(), scope=scope)), native)
        assert not torch.allclose(logits(model, ids, ACT(heads=EVERY, scope=scope, **LOW)), native, atol=1e-3)

    def test_heads_outside_the_set_are_untouched(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
        outputs = []
        for stages in ((), (ACT(heads=[(1, 2)], beta=0.0, **LOW),)):
            with torch.no_grad(), headway.capture(model, what=("head_output",)) as capture, headway.use(model, *stages):
                model(input_ids=ids)
            outputs.append(capture.result()[1]["head_output"])
        change = (outputs[0] - outputs[1]).abs().amax((0, 2, 3))
        assert float(change[2]) > 1e-3
        assert float(change[[0, 1, 3]].max()) < 1e-6

    def test_what_the_stage_does_is_detection_and_redistribution(self):
        model, ids = CAUSAL["llama"](), contract.tokens(2, 30)
        keep = {}

        class Keep(Observer):
            def observe(self, call, output, lse=None):
                keep.setdefault(call.site.layer, (call, output))

        with torch.no_grad(), headway.use(model, ACT(heads=[(0, 1), (0, 2)], beta=0.2, **LOW), Keep()):
            model(input_ids=ids)
        call, output = keep[0]
        weights = call.weights()
        mass, count = received_mass(weights)
        allowed = torch.arange(30) != 0
        sinks = find_sinks(mass, count, allowed=allowed, **LOW)[:, [1, 2]]
        assert bool(sinks.any())
        want = (
            redistribute(weights[:, [1, 2]], sinks[:, :, None], beta=0.2)
            @ call.value.repeat_interleave(2, 1)[:, [1, 2]]
        )
        torch.testing.assert_close(output[:, [1, 2]], want, atol=1e-5, rtol=0)

    @pytest.mark.parametrize("threshold", ["absolute", "relative"])
    def test_causal_scope_in_prefill_equals_any_chunks_and_decoding(self, threshold):
        model, ids = CAUSAL["llama"](), contract.tokens(2, 24)
        act = ACT(heads=EVERY, scope="causal", threshold=threshold, tau=0.05, alpha=2.0, least_rows=3)
        with headway.use(model, act):
            whole = contract.run_in_chunks(model, ids, [24])
            for chunks in ([1] * 24, [10, 5, 1, 1, 7], [23, 1]):
                torch.testing.assert_close(contract.run_in_chunks(model, ids, chunks), whole, atol=1e-4, rtol=0)
        with torch.no_grad():
            assert not torch.allclose(whole, model(input_ids=ids).logits, atol=1e-3)

    @pytest.mark.parametrize("tokens", [130, 257])
    def test_causal_scope_carries_over_blocks_of_rows(self, tokens):
        model, ids = decoder("Llama", max_position_embeddings=512), contract.tokens(1, tokens)
        with headway.use(model, ACT(heads=EVERY, scope="causal", tau=0.02)):
            whole = contract.run_in_chunks(model, ids, [tokens])
            parts = contract.run_in_chunks(model, ids, [100, tokens - 101, 1])
        torch.testing.assert_close(whole, parts, atol=1e-4, rtol=0)

    def test_causal_scope_does_not_look_ahead_and_prompt_scope_does(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 24)
        other = ids.clone()
        other[0, -6:] = (other[0, -6:] + 7) % 80 + 3
        causal = [logits(model, x, ACT(heads=EVERY, scope="causal", **LOW)) for x in (ids, other)]
        torch.testing.assert_close(causal[0][:, :-6], causal[1][:, :-6], atol=1e-5, rtol=0)
        prompt = [logits(model, x, ACT(heads=EVERY, scope="prompt", **LOW)) for x in (ids, other)]
        assert not torch.allclose(prompt[0][:, :-6], prompt[1][:, :-6], atol=1e-4)

    def test_prompt_sinks_stay_in_decoding_and_new_keys_join(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 40)
        act = ACT(heads=[(0, 1)], tau=0.05, least_rows=4)
        with headway.use(model, act), torch.no_grad():
            cache = model(input_ids=ids[:, :20], use_cache=True).past_key_values
            kept = next(iter(cache._headway_rows.owned.values()))
            prompt = kept["fixed"].clone()
            for i in range(20, 40):
                model(input_ids=ids[:, i : i + 1], past_key_values=cache)
            assert torch.equal(kept["fixed"], prompt)
            assert kept["count"][0, 0].tolist() == [float(40 - k) for k in range(40)]
        with torch.no_grad(), headway.capture(model, what=("weights",)) as capture:
            model(input_ids=ids)
        mass = capture.result()[0]["weights"][0, 1].sum(0)
        torch.testing.assert_close(kept["mass"][0, 0], mass.float(), atol=1e-4, rtol=0)

    @pytest.mark.parametrize("scope", ["prompt", "causal"])
    def test_left_padding_and_batch_order_do_not_matter(self, scope):
        model = CAUSAL["llama"]()
        ids, mask = contract.padded_left(contract.tokens(2, 24), [0, 5])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        act = ACT(heads=EVERY, scope=scope, protect=(3,), **LOW)
        both = logits(model, ids, act, attention_mask=mask, position_ids=positions)
        alone = logits(model, ids[1:, 5:], act)
        torch.testing.assert_close(both[1, 5:], alone[0], atol=1e-4, rtol=0)
        turned = logits(model, ids.flip(0), act, attention_mask=mask.flip(0), position_ids=positions.flip(0))
        torch.testing.assert_close(turned.flip(0)[mask.bool()], both[mask.bool()], atol=1e-5, rtol=0)

    def test_right_padding_does_not_matter(self):
        model = CAUSAL["llama"]()
        ids = contract.tokens(2, 24)
        mask = torch.ones_like(ids)
        mask[1, 18:] = 0
        act = ACT(heads=EVERY, **LOW)
        both = logits(model, ids, act, attention_mask=mask)
        torch.testing.assert_close(both[1, :18], logits(model, ids[1:, :18], act)[0], atol=1e-4, rtol=0)

    def test_the_first_token_and_protected_keys_are_never_scaled_down(self):
        weights = causal_weights(heads=1, tokens=30, dtype=torch.float32)
        logit = weights.clamp(min=1e-9).log()
        call = AttentionCall.from_tensors(*[torch.zeros(1, 1, 30, 1)] * 3, bias=logit, causal=True, layer=0)
        for protect in ((5, 9), torch.zeros(1, 30, dtype=torch.bool).index_fill(1, torch.tensor([5, 9]), True)):
            act = ACT(heads=[(0, 0)], beta=0.0, tau=0.001, least_rows=1, protect=protect)
            changed = act.edit_weights(call, weights, torch.arange(30))
            down = (changed < weights - 1e-6).any(2)[0, 0].nonzero()[:, 0].tolist()
            assert not {0, 5, 9} & set(down)
            assert len(down) > 15

    def test_only_candidates_are_scaled_down_and_the_first_token_if_asked(self):
        weights = causal_weights(heads=1, tokens=30, dtype=torch.float32)
        call = AttentionCall.from_tensors(
            *[torch.zeros(1, 1, 30, 1)] * 3, bias=weights.clamp(min=1e-9).log(), causal=True, layer=0
        )
        options = {"heads": [(0, 0)], "beta": 0.5, "tau": 0.001, "least_rows": 1}
        changed = ACT(candidates=(0, 4), initial="none", **options).edit_weights(call, weights, torch.arange(30))
        down = (changed < weights - 1e-6).any(2)[0, 0].nonzero()[:, 0].tolist()
        assert down == [0, 4]
        fresh = call.replace(forward=type(call.forward)())
        changed = ACT(candidates=(0, 4), **options).edit_weights(fresh, weights, torch.arange(30))
        assert (changed < weights - 1e-6).any(2)[0, 0].nonzero()[:, 0].tolist() == [4]

    def test_the_released_rule_spares_another_key_when_token_zero_is_not_flagged(self):
        """The defect that the corrected form exists for."""
        weights = planted(sink=4).float()
        call = AttentionCall.from_tensors(
            *[torch.zeros(1, 1, 20, 1)] * 3, bias=weights.clamp(min=1e-9).log(), causal=True, layer=0
        )
        rows = torch.arange(20)
        released = ACT(heads=[(0, 0)], tau=0.3, initial="first_flagged").edit_weights(call, weights, rows)
        torch.testing.assert_close(released, weights)
        fresh = call.replace(forward=type(call.forward)())
        ours = ACT(heads=[(0, 0)], tau=0.3).edit_weights(fresh, weights, rows)
        assert float(ours[0, 0, 19, 4]) == pytest.approx(0.4 * 0.6, abs=1e-5)

    def test_beams_reorder_what_was_learned(self):
        model, ids = CAUSAL["llama"](), contract.tokens(2, 16)
        more = contract.tokens(2, 3, seed=5)
        act = ACT(heads=EVERY, scope="causal", **LOW)
        with headway.use(model, act), torch.no_grad():
            straight = model(input_ids=ids.flip(0), use_cache=True).past_key_values
            turned = model(input_ids=ids, use_cache=True).past_key_values
            turned.reorder_cache(torch.tensor([1, 0]))
            for i in range(3):
                want = model(input_ids=more[:, i : i + 1], past_key_values=straight).logits
                got = model(input_ids=more[:, i : i + 1], past_key_values=turned).logits
                torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        contract.check_generate(model, lambda: act)
        contract.check_reorder_and_reset(model, lambda: act)
        contract.check_requests_apart(model, lambda: ACT(heads=EVERY, scope="causal", **LOW))

    def test_taking_tokens_back_is_refused(self):
        contract.check_refuses_crop(CAUSAL["llama"](), lambda: ACT(heads=EVERY, **LOW))

    def test_decoding_without_the_statistics_of_the_prompt_is_refused(self):
        """In the released code a single decoding row is its own statistic, and a row then sums to 1.89."""
        model, ids = CAUSAL["llama"](), contract.tokens(1, 12)
        with torch.no_grad():
            cache = model(input_ids=ids, use_cache=True).past_key_values
            with headway.use(model, ACT(heads=EVERY)), pytest.raises(ConflictError, match="has not seen"):
                model(input_ids=ids[:, :1], past_key_values=cache)

    def test_a_single_token_has_nothing_to_calibrate(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 1)
        with torch.no_grad():
            torch.testing.assert_close(logits(model, ids, ACT(heads=EVERY, **LOW)), model(input_ids=ids).logits)

    def test_encoders_and_vision_models_are_calibrated_too(self):
        for name in ("bert", "vit"):
            model, inputs = OTHERS[name]()
            with torch.no_grad():
                native = model(**inputs).last_hidden_state
                with headway.use(model, ACT(heads=[(0, 1), (1, 0)], least_rows=2, tau=0.06)):
                    changed = model(**inputs).last_hidden_state
            assert torch.isfinite(changed).all()
            assert not torch.allclose(native, changed, atol=1e-4)

    def test_heads_and_layers_that_are_not_there_are_named(self):
        model = CAUSAL["llama"]()
        with pytest.raises(ArgumentError, match=r"head.*got 4"):
            headway.use(model, ACT(heads=[(0, 4)])).attach()
        with pytest.raises(ArgumentError, match=r"layer: got 3, expected a number from 0 to 2"):
            headway.use(model, ACT(heads=[(3, 0)])).attach()
        for options, match in (
            ({"scope": "row"}, "scope"),
            ({"initial": "bos"}, "initial"),
            ({"least_rows": 0}, "least_rows"),
        ):
            with pytest.raises(ArgumentError, match=match):
                ACT(heads=[(0, 0)], **options)
        with pytest.raises(ArgumentError, match="protect: got"):
            logits(model, contract.tokens(2, 8), ACT(heads=[(0, 0)], protect=torch.zeros(3, 8, dtype=torch.bool)))

    def test_it_meets_another_editor_on_other_heads(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 20)

        class Halve(Editor):
            def edit_weights(self, call, weights, rows):
                return weights / 2

        both = logits(model, ids, ACT(heads=EVERY, **LOW), Halve(), UniformHeads(heads=[(2, 0)]))
        assert torch.isfinite(both).all()

    def test_only_the_named_heads_get_explicit_weights(self):
        model, ids, seen = CAUSAL["llama"](), contract.tokens(1, 20), []

        class Watch(ACT):
            def edit_weights(self, call, weights, rows):
                seen.append((call.site.layer, weights.shape[1], call.of_heads.tolist()))
                return super().edit_weights(call, weights, rows)

        logits(model, ids, Watch(heads=[(0, 2), (1, 0), (1, 3)], **LOW))
        assert seen == [(0, 1, [2]), (1, 2, [0, 3])]

    def test_half_precision_hosts_are_calibrated_in_float32_and_stay_half(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
        act = ACT(heads=EVERY, scope="causal", **LOW)
        want = logits(model, ids, act)
        got = logits(model.to(torch.bfloat16), ids, act)
        assert got.dtype == torch.bfloat16
        assert float((got.float() - want).abs().max()) < 0.1 * float(want.abs().max())

    def test_gradients_pass(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
        with headway.use(model, ACT(heads=[(1, 1)], **LOW)):
            model(input_ids=ids, labels=ids).loss.backward()
        grads = [p.grad for p in model.parameters()]
        assert all(g is not None and bool(torch.isfinite(g).all()) for g in grads)


class TestHeadSets:
    def test_a_saved_set_comes_back_and_fits_only_its_model(self, tmp_path):
        model = CAUSAL["llama"]()
        act = ACT(heads=[(1, 2), (0, 3)], beta=0.25, scope="causal")
        path = HeadSet.of(model, act, tasks=["place"]).save(tmp_path / "heads.json")
        back = HeadSet.load(path)
        assert back.heads == ((0, 3), (1, 2))
        assert back.notes == {"tasks": ["place"]}
        again = back.stage(model)
        assert (again.heads, again.beta, again.scope) == (act.heads, 0.25, "causal")
        back.stage(model.to(torch.bfloat16))
        other, _ = tiny_host("llama", num_hidden_layers=5)
        with pytest.raises(HostError, match="layers: 3, 5"):
            back.stage(other)
        same_shape = decoder("Llama")
        torch.nn.init.normal_(same_shape.model.layers[1].mlp.up_proj.weight)
        torch.nn.init.normal_(same_shape.lm_head.weight)
        with pytest.raises(HostError, match="weights: other numbers"):
            back.stage(same_shape)

    def test_a_file_that_is_something_else_is_refused(self, tmp_path):
        (tmp_path / "other.json").write_text("{}")
        with pytest.raises(HostError, match="holds no head set"):
            HeadSet.load(tmp_path / "other.json")
        with pytest.raises(HostError, match="cannot be read"):
            HeadSet.load(tmp_path / "missing.json")

    def test_candidates_leave_out_the_first_and_last_layers(self):
        model = decoder("Llama", num_hidden_layers=6)
        assert {layer for layer, _ in candidate_heads(model)} == {2, 3, 4}
        assert len(candidate_heads(model)) == 12
        with pytest.raises(ArgumentError, match="skip_first, skip_last: got 5, 1"):
            candidate_heads(model, skip_first=5, skip_last=1)

    def test_share_one_is_dense(self):
        model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
        with torch.no_grad():
            native = model(input_ids=ids).logits
        assert torch.equal(logits(model, ids, *at_budget(1.0, tokens=20, model=model)), native)
        (half,) = at_budget(0.5, tokens=20, model=model)
        assert len(half.heads) == 12
        assert half.scope == "causal"
        with pytest.raises(ArgumentError, match="share: got 0"):
            at_budget(0.0, tokens=20, model=model)
