"""The survey's editors and masks, its registers and prefixes, and its losses."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, tokens
from torch import nn

import headway
from headway.door.call import AttentionCall
from headway.errors import ArgumentError, HostError
from headway.hosts.tiny import tiny_host
from headway.methods.sinks.sink_survey import (
    HeadBroadcast,
    LogitLever,
    PrefixTokens,
    Redistribution,
    SinkMask,
    VisualRedistribution,
    activation_error,
    attraction,
    densest_heads,
    dimension_sinks,
    find_register_neurons,
    lever,
    moved_to,
    position_distillation,
    prefix_search,
    redistribute_to,
    redistribute_to_image,
    register_behind,
    run_with_register,
    self_distilled_registers,
    sink_density,
    sink_divergence,
    tune_lever,
)
from headway.methods.sinks.sink_survey.masks import at_budget
from headway.methods.sinks.sink_survey.registers import down_projections

EDITORS = {
    "lever": LogitLever(bias=-1.5),
    "lever of heads": LogitLever(bias={(0, 1): 1.0, 2: -torch.inf}),
    "broadcast": HeadBroadcast(sources={0: 1, 2: 0}),
    "broadcast to one": HeadBroadcast(sources={1: 1}, heads={1: [3]}),
    "redistribution": Redistribution(alpha=0.3),
    "reduction": Redistribution(alpha=0.5, beta=0.0, heads=[(1, 2)]),
    "visual": VisualRedistribution(image=range(2, 6), sinks=(0, 3)),
}
MASKS = {
    "lambda": SinkMask(sinks=2, window=4),
    "vertical_slash": SinkMask(pattern="vertical_slash", sinks=1, verticals=(4, 5), slashes=(0, 1, 3)),
    "block": SinkMask(pattern="block", sinks=2, block=3, keep=1),
}


def random_weights(seed: int = 0, keys: int = 9) -> torch.Tensor:
    scores = torch.randn(2, 3, keys, keys, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return scores.masked_fill(~torch.ones(keys, keys, dtype=torch.bool).tril(), -torch.inf).softmax(-1)


class TestEveryRule:
    @pytest.mark.parametrize("name", EDITORS)
    def test_a_padded_batch_equals_its_rows_alone_and_decoding_equals_prefill(self, name):
        self._check(EDITORS[name])

    @pytest.mark.parametrize("name", MASKS)
    def test_a_padded_batch_equals_its_rows_alone_and_decoding_equals_prefill_under_a_mask(self, name):
        self._check(MASKS[name])

    def _check(self, stage):
        model = CAUSAL["llama"]()
        ids, mask = contract.padded_left(tokens(2, 16), [0, 5])
        with headway.use(model, stage):
            for chunks in ([16], [12, 1, 1, 1, 1], [11, 5]):
                both = contract.run_in_chunks(model, ids, chunks, mask)
                whole = contract.run_in_chunks(model, ids[:1], [16])
                short = contract.run_in_chunks(model, ids[1:, 5:], [11])
                torch.testing.assert_close(both[:1], whole, atol=1e-4, rtol=0)
                torch.testing.assert_close(both[1:, 5:], short, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("name", [*EDITORS, *MASKS])
    def test_no_row_depends_on_a_later_token(self, name):
        contract.check_causality(CAUSAL["llama"](), lambda: {**EDITORS, **MASKS}[name])

    @pytest.mark.parametrize("host", ["gemma2 soft cap", "gpt-oss learned sinks", "mistral sliding"])
    @pytest.mark.parametrize("name", EDITORS)
    def test_other_hosts_are_served(self, name, host):
        model, ids = CAUSAL[host](), tokens(1, 12)
        with torch.no_grad():
            native = model(input_ids=ids).logits
            with headway.use(model, EDITORS[name]):
                got = model(input_ids=ids).logits
        assert bool(torch.isfinite(got).all())
        assert not torch.allclose(got, native)

    @pytest.mark.parametrize(
        "stage",
        [
            LogitLever(bias=0.0),
            LogitLever(bias={}),
            Redistribution(alpha=1.0),
            VisualRedistribution(image=(1,), moved=0.0),
        ],
    )
    def test_a_setting_that_changes_nothing_runs_the_hosts_own_kernel(self, stage):
        model, ids = CAUSAL["llama"](), tokens()
        with torch.no_grad():
            native = model(input_ids=ids).logits
            with headway.use(model, stage):
                assert torch.equal(model(input_ids=ids).logits, native)

    @pytest.mark.parametrize(
        "stage",
        [LogitLever(bias={(0, 9): 1.0}), HeadBroadcast(sources={7: 0}), Redistribution(heads=[(0, 4)]),
         LogitLever(bias={5: 1.0})],
    )  # fmt: skip
    def test_a_layer_or_head_that_is_not_there_is_named_on_attach(self, stage):
        with pytest.raises(ArgumentError, match=r"head|layer"), headway.use(CAUSAL["llama"](), stage):
            pass

    def test_weights_that_are_no_softmax_are_refused(self):
        from headway.models import HeadwayConfig, HeadwayForCausalLM

        config = HeadwayConfig(vocab_size=90, width=32, layers=2, heads=2, mixer_options={"normalizer": "sigmoid"})
        model = HeadwayForCausalLM(config).eval()
        with torch.no_grad(), headway.use(model, LogitLever(bias=1.0)), pytest.raises(HostError, match="softmax"):
            model(input_ids=tokens())


class TestLever:
    @settings(max_examples=25, deadline=None)
    @given(st.floats(-30, 30), st.integers(0, 2**31))
    def test_it_is_a_bias_on_the_logit(self, bias, seed):
        scores = torch.randn(1, 2, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), -torch.inf)
        column = torch.zeros(1, 1, 1, 7, dtype=torch.bool)
        column[..., 0] = True
        moved = scores.clone()
        moved[..., 0] += bias
        got = lever(scores.softmax(-1), column, torch.tensor([bias, bias]))
        torch.testing.assert_close(got, moved.softmax(-1), atol=1e-9, rtol=1e-6)

    def test_minus_infinity_masks_the_token_where_another_is_left(self):
        weights = random_weights()
        column = torch.arange(9).eq(0)[None, None, None]
        got = lever(weights, column, torch.full((3,), -torch.inf))
        without = weights.masked_fill(column, 0.0)
        torch.testing.assert_close(got[:, :, 1:], (without / without.sum(-1, keepdim=True))[:, :, 1:])
        torch.testing.assert_close(got[:, :, 0], weights[:, :, 0])

    def test_on_a_host_with_learned_sinks_it_is_a_bias_as_well(self):
        model, ids = CAUSAL["gpt-oss learned sinks"](), tokens(1, 10)

        class Biased(headway.Editor if hasattr(headway, "Editor") else headway.door.Editor):
            def edit_call(self, call):
                bias = torch.zeros(1, 1, 1, call.keys)
                bias[..., 0] = -1.0
                return call.replace(bias=bias)

        with torch.no_grad():
            with headway.use(model, Biased()):
                expected = model(input_ids=ids).logits
            with headway.use(model, LogitLever(bias=-1.0)):
                got = model(input_ids=ids).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

    def test_tuning_finds_the_least_loss_and_keeps_zero_on_ties(self):
        stage, seen = tune_lever(lambda s: abs(s.bias + 1.0), candidates=(-2, -1, 1))
        assert stage.bias == -1
        assert set(seen) == {0.0, -2, -1, 1}
        assert tune_lever(lambda s: 1.0)[0].bias == 0.0
        stage, table = tune_lever(
            lambda s: (s.bias.get(0, 0) - 1) ** 2 + (s.bias.get((1, 2), 0) + 2) ** 2,
            groups=[[0], [(1, 2)]],
            candidates=(-2, 1),
        )
        assert stage.bias == {0: 1, (1, 2): -2}
        assert len(table) == 2

    def test_bad_biases_are_named(self):
        for bias in (float("nan"), float("inf")):
            with pytest.raises(ArgumentError, match="bias, token"):
                LogitLever(bias=bias)


class TestRedistribution:
    @settings(max_examples=25, deadline=None)
    @given(st.floats(0, 1), st.integers(0, 2**31))
    def test_rows_keep_their_sum_when_both_shares_make_one(self, alpha, seed):
        weights = random_weights(seed)
        sinks = torch.arange(9).eq(0) | torch.arange(9).eq(4)
        seen = torch.ones(9, 9, dtype=torch.bool).tril()
        got = redistribute_to(weights, sinks, seen, alpha=alpha)
        torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 9, dtype=torch.float64))
        assert bool((got >= 0).all())

    def test_alpha_one_is_the_identity(self):
        weights = random_weights()
        sinks, seen = torch.arange(9).eq(0), torch.ones(9, 9, dtype=torch.bool).tril()
        torch.testing.assert_close(redistribute_to(weights, sinks, seen, alpha=1.0), weights)

    def test_the_formula_by_hand(self):
        weights = torch.tensor([[0.6, 0.1, 0.2, 0.1]])
        sinks, targets = torch.tensor([True, False, False, False]), torch.tensor([True, True, True, False])
        got = redistribute_to(weights, sinks, targets, alpha=0.5)
        torch.testing.assert_close(got, torch.tensor([[0.3, 0.25, 0.35, 0.1]]))
        got = redistribute_to(weights, sinks, targets, alpha=0.5, beta=0.0)
        torch.testing.assert_close(got, torch.tensor([[0.3, 0.1, 0.2, 0.1]]))
        got = redistribute_to(weights, sinks, sinks, alpha=0.0)
        torch.testing.assert_close(got, weights)

    def test_only_rows_that_look_at_the_image_move(self):
        weights = torch.tensor([[0.5, 0.1, 0.3, 0.1], [0.5, 0.4, 0.05, 0.05]])
        sinks, image = torch.tensor([True, True, False, False]), torch.tensor([False, True, True, False])
        got = redistribute_to_image(weights, sinks, image, least_ratio=0.5, moved=0.5)
        torch.testing.assert_close(got[0], torch.tensor([0.25, 0.05, 0.6, 0.1]))
        torch.testing.assert_close(got[1], weights[1])
        torch.testing.assert_close(got.sum(-1), torch.ones(2))

    def test_sinks_are_found_in_their_dimensions(self):
        hidden = torch.randn(1, 5, 400, generator=torch.Generator().manual_seed(0))
        hidden[0, 2, 17] = 500.0
        assert dimension_sinks(hidden, [17, 30], threshold=15.0).nonzero().tolist() == [[0, 2]]
        with pytest.raises(ArgumentError, match="dimensions"):
            dimension_sinks(hidden, [400])

    def test_bad_shares_are_named(self):
        with pytest.raises(ArgumentError, match=r"alpha, beta: got 0\.7, 0\.6"):
            Redistribution(alpha=0.7, beta=0.6)
        with pytest.raises(ArgumentError, match="least_ratio, moved"):
            VisualRedistribution(image=(1,), moved=1.5)
        with (
            pytest.raises(ArgumentError, match=r"sinks: got torch\.int64"),
            headway.use(CAUSAL["llama"](), Redistribution(sinks=torch.zeros(2, 3, dtype=torch.long))) as handle,
            torch.no_grad(),
        ):
            handle.model(input_ids=tokens())


class TestBroadcast:
    def test_heads_get_the_map_of_the_source(self):
        model, ids = CAUSAL["multi-query"](), tokens(1, 10)
        with headway.capture(model, what=("weights", "value")) as captured, torch.no_grad():
            model(input_ids=ids)
        layer = captured.result()[0]

        class Heard(headway.door.Observer):
            def observe(self, call, output, lse=None):
                self.output = output

            def result(self):
                return self.output

        heard = Heard()
        with (
            headway.use(model, HeadBroadcast(sources={0: 2}), layers=[0]),
            headway.observe(model, heard, layers=[0]),
            torch.no_grad(),
        ):
            model(input_ids=ids)
        wanted = layer["weights"][:, 2:3] @ layer["value"]
        torch.testing.assert_close(heard.output, wanted.expand(-1, 4, -1, -1), atol=1e-5, rtol=0)

    def test_the_densest_head_has_most_attention_on_the_sinks(self):
        model, ids = CAUSAL["llama"](), tokens(2, 12)
        with headway.capture(model, what=("weights",)) as captured, torch.no_grad():
            model(input_ids=ids)
        density = sink_density(model, {"input_ids": ids})
        for layer in range(3):
            mean = captured.result()[layer]["weights"][:, :, 1:, 0].mean((0, 2))
            torch.testing.assert_close(density[layer], mean, atol=1e-5, rtol=0)
            assert densest_heads(model, {"input_ids": ids})[layer] == int(mean.argmax())
        assert densest_heads(model, {"input_ids": ids}, least=1.1) == {}

    def test_padding_does_not_count(self):
        model = CAUSAL["llama"]()
        ids, mask = contract.padded_left(tokens(1, 12), [4])
        padded = sink_density(model, {"input_ids": ids, "attention_mask": mask})
        alone = sink_density(model, {"input_ids": ids[:, 4:]})
        for layer in range(3):
            torch.testing.assert_close(padded[layer], alone[layer], atol=1e-5, rtol=0)


class TestMasks:
    def test_every_row_reads_the_sinks_and_itself(self):
        for stage in MASKS.values():
            chosen = stage.mask(20)
            assert bool(chosen.diagonal().all())
            assert not bool(chosen.triu(1).any())
            for sink in range(stage.sinks):
                assert bool(chosen[sink:, sink].all())

    def test_patterns_are_their_formulas(self):
        row, column = torch.arange(20)[:, None], torch.arange(20)[None]
        causal = column <= row
        wanted = {
            "lambda": (row - column < 4) | (column < 2),
            "vertical_slash": (column < 1) | torch.isin(column, torch.tensor([4, 5]))
            | torch.isin(row - column, torch.tensor([0, 1, 3])),
            "block": (column < 2) | (column // 3 >= row // 3 - 1),
        }  # fmt: skip
        for name, stage in MASKS.items():
            assert torch.equal(stage.mask(20), wanted[name] & causal), name

    @pytest.mark.parametrize("name", MASKS)
    def test_the_host_reads_what_the_mask_says(self, name):
        model, ids = CAUSAL["llama"](), tokens(1, 20)

        class Hidden(headway.door.Editor):
            def edit_call(self, call):
                return call.replace(mask=MASKS[name].mask(20)[None, None])

        with torch.no_grad():
            with headway.use(model, Hidden()):
                expected = model(input_ids=ids).logits
            with headway.use(model, MASKS[name]):
                got = model(input_ids=ids).logits
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)

    def test_its_budget_is_a_share_of_the_keys(self):
        (stage,) = at_budget(0.25, tokens=80, model=nn.Linear(1, 1))
        assert int(stage.mask(80)[-1].sum()) == 20
        assert at_budget(1.0, tokens=80, model=nn.Linear(1, 1)) == ()
        with pytest.raises(ArgumentError, match="pattern: got 'lambd'"):
            SinkMask(pattern="lambd")
        with pytest.raises(ArgumentError, match="verticals, slashes"):
            SinkMask(slashes=(-1,))


class TestRegisters:
    def test_down_projections_are_found_in_decoders_and_image_models(self):
        for name, modules in (("llama", "down_proj"), ("gpt2", "c_proj")):
            found = down_projections(CAUSAL[name]())
            assert len(found) == 3
            model = CAUSAL[name]()
            names = [n for n, m in model.named_modules() if any(m is f for f in down_projections(model))]
            assert all(modules in n and "mlp" in n for n in names)
        with pytest.raises(HostError, match="list of blocks"):
            down_projections(nn.Linear(2, 2))

    def test_values_move_from_the_sources_to_the_register(self):
        model = CAUSAL["llama"]()
        seen = []
        hook = down_projections(model)[1].register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
        ids = tokens(2, 8)
        with torch.no_grad():
            model(input_ids=ids)
            with moved_to(model, [(1, 5), (1, 7)], 0, sources=torch.tensor([[2, 3], [4, 4]])):
                model(input_ids=ids)
        hook.remove()
        # The hook that reads stands before the one that moves: read the moved input by another.
        before = seen[0]
        caught = []
        with moved_to(model, [(1, 5), (1, 7)], 0, sources=torch.tensor([[2, 3], [4, 4]])), torch.no_grad():
            late = down_projections(model)[1].register_forward_pre_hook(lambda m, a: caught.append(a[0].clone()))
            model(input_ids=ids)
            late.remove()
        after = caught[0]
        for row, places in enumerate(([2, 3], [4])):
            for neuron in (5, 7):
                largest = max((float(before[row, p, neuron]) for p in places), key=abs)
                assert float(after[row, 0, neuron]) == pytest.approx(largest)
                assert all(float(after[row, p, neuron]) == 0 for p in places)
        untouched = [n for n in range(before.shape[-1]) if n not in (5, 7)]
        torch.testing.assert_close(after[..., untouched], before[..., untouched])
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits)

    def test_planted_neurons_are_found(self):
        model = CAUSAL["llama"]()
        planted = {(0, 11), (2, 4)}

        def plant(neuron):
            def change(module, args):
                x = args[0].clone()
                x[:, 0, neuron] = 60.0
                return (x,)

            return change

        hooks = [down_projections(model)[layer].register_forward_pre_hook(plant(n)) for layer, n in planted]
        found = find_register_neurons(model, {"input_ids": tokens(2, 10)}, [0], count=2)
        for hook in hooks:
            hook.remove()
        assert set(found) == planted

    def test_a_register_in_front_is_batch_correct_and_hidden_from_the_outputs(self):
        model = CAUSAL["llama"]()
        neurons = [(0, 3), (1, 9)]
        ids, mask = contract.padded_left(tokens(2, 12), [0, 4])
        with torch.no_grad():
            both = run_with_register(model, ids, neurons, attention_mask=mask, output_hidden_states=True)
            whole = run_with_register(model, ids[:1], neurons).logits
            short = run_with_register(model, ids[1:, 4:], neurons).logits
        assert both.logits.shape[1] == both.hidden_states[0].shape[1] == 12
        torch.testing.assert_close(both.logits[:1], whole, atol=1e-4, rtol=0)
        torch.testing.assert_close(both.logits[1:, 4:], short, atol=1e-4, rtol=0)
        other = ids.clone()
        other[:, -2:] = 40
        with torch.no_grad():
            changed = run_with_register(model, other, neurons, attention_mask=mask).logits
        torch.testing.assert_close(changed[:1, :-2], both.logits[:1, :-2], atol=1e-5, rtol=0)

    def test_an_image_model_gets_one_more_token(self):
        model, inputs = tiny_host("ViTModel")
        with torch.no_grad():
            before = model(**inputs).last_hidden_state
            with register_behind(model, [(0, 1)]):
                wide = model(**inputs).last_hidden_state
            after = model(**inputs).last_hidden_state
        assert wide.shape[1] == before.shape[1] + 1
        torch.testing.assert_close(after, before)
        with pytest.raises(HostError, match="embeddings"), register_behind(CAUSAL["llama"](), []):
            pass
        with pytest.raises(ArgumentError, match=r"neurons: got \(0, 999\)"), moved_to(model, [(0, 999)], 0):
            pass


class TestPrefix:
    def test_a_prefix_is_read_in_front_and_can_be_cached_once(self):
        model = CAUSAL["llama"]()
        prefix, ids = PrefixTokens(2, model), tokens(2, 6)
        with torch.no_grad():
            whole = model(**prefix.inputs(model, ids)).logits[:, 2:]
            past = copy.deepcopy(prefix.cache(model, batch=2))
            cached = model(
                input_ids=ids, past_key_values=past, attention_mask=torch.ones(2, 8, dtype=torch.long),
                position_ids=torch.arange(2, 8).expand(2, -1),
            ).logits  # fmt: skip
        torch.testing.assert_close(cached, whole, atol=1e-4, rtol=0)

    def test_padding_stays_apart_and_the_vectors_learn(self):
        model = CAUSAL["llama"]()
        prefix = PrefixTokens(2, model)
        ids, mask = contract.padded_left(tokens(2, 10), [0, 3])
        both = model(**prefix.inputs(model, ids, mask)).logits
        alone = model(**prefix.inputs(model, ids[1:, 3:])).logits
        torch.testing.assert_close(both[1, 5:], alone[0, 2:], atol=1e-4, rtol=0)
        both.sum().backward()
        assert float(prefix.vectors.grad.abs().sum()) > 0

    def test_the_search_takes_the_best_token_while_it_helps(self):
        worth = {3: 0.5, 4: 0.8, 5: 0.9}
        loss = lambda prefix: float(torch.tensor([worth[t] for t in dict.fromkeys(prefix)]).prod()) if prefix else 1.0  # noqa: E731
        assert prefix_search([4, 3, 5], loss, longest=2)[0] == (3, 4)
        assert prefix_search([4, 3, 5], loss, longest=3, least_gain=0.15)[0] == (3, 4)
        chosen, path = prefix_search([3], lambda p: 1.0)
        assert chosen == ()
        assert path == [1.0]

    def test_the_error_that_it_lowers_is_that_of_the_text_alone(self):
        model, ids = CAUSAL["llama"](), tokens(1, 8)
        plain, behind = activation_error(model, ids), activation_error(model, ids, (5, 6), bits=4)
        assert 0 < plain < 0.1 < behind < 1


class TestLosses:
    def test_distillation_is_zero_for_equal_maps_and_a_divergence_else(self):
        a = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]])
        b = torch.tensor([[0.25, 0.5, 0.25], [0.5, 0.25, 0.25]])
        assert float(position_distillation(a, a)) == pytest.approx(0.0, abs=1e-6)
        expected = (torch.special.xlogy(a, a) - torch.special.xlogy(a, b)).sum(-1).mean()
        torch.testing.assert_close(position_distillation(a, b), expected)

    def test_attraction_falls_as_the_prefix_takes_the_mass(self):
        even = torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None]
        held = torch.zeros(6, 6)
        held[:, 0] = 1.0
        assert float(attraction(held, 2)) == pytest.approx(0.0, abs=1e-6)
        assert float(attraction(even, 2)) == pytest.approx(
            -float(torch.tensor([2 / n for n in range(3, 7)]).log().mean())
        )
        assert float(attraction(even, torch.arange(6) < 2)) == pytest.approx(float(attraction(even, 2)))

    def test_registers_are_not_compared(self):
        teacher = torch.randn(2, 5, 3, requires_grad=True)
        student = torch.cat([teacher.detach() + 1, torch.full((2, 2, 3), 99.0)], 1).requires_grad_(True)
        loss = self_distilled_registers(teacher, student)
        loss.backward()
        assert loss.item() == pytest.approx(1.0)
        assert teacher.grad is None
        assert not student.grad[:, 5:].any()

    def test_divergence_counts_heads_that_sink_more_on_harmful_samples(self):
        harmful, refusing = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.5, 0.5], [0.3, 0.5]])
        assert float(sink_divergence(harmful, refusing, weight=2.0)) == pytest.approx(2 * 0.5 / 2)
        assert float(sink_divergence(refusing[:, :1], harmful[:, :1])) == 0.0

    def test_shapes_that_do_not_fit_are_named(self):
        with pytest.raises(ArgumentError, match="start, target"):
            position_distillation(torch.ones(2, 3), torch.ones(2, 4))
        with pytest.raises(ArgumentError, match="prefix: got 6 of 6"):
            attraction(torch.ones(6, 6), 6)
        with pytest.raises(ArgumentError, match="student"):
            self_distilled_registers(torch.ones(1, 5, 3), torch.ones(1, 4, 3))
        with pytest.raises(ArgumentError, match="harmful, refusing"):
            sink_divergence(torch.ones(1, 3), torch.ones(1, 2))


def test_a_call_over_some_heads_is_levered_by_their_own_bias():
    """A cache policy's call holds some heads: their numbers are in `of_heads`."""
    query, key = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 5, 4)
    call = AttentionCall.from_tensors(query, key, key, causal=True).replace(of_heads=torch.tensor([3, 1]))
    stage = LogitLever(bias={(0, 1): -torch.inf, (0, 3): 0.0})
    weights = call.weights()
    got = stage.edit_weights(call, weights, torch.arange(5))
    torch.testing.assert_close(got[:, 0], weights[:, 0])
    assert float(got[:, 1, 1:, 0].abs().max()) == 0
