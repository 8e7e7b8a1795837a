"""Tests of explanations give the verdict that was planted."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.door.hosts import CAUSAL, tokens

from headway.errors import ArgumentError
from headway.methods.sinks.sink_survey.interpretation import (
    NO,
    UNCLEAR,
    YES,
    ConstantSink,
    dormant_head,
    drift_to_sink,
    geometry_of_model,
    implicit_bias,
    key_apart,
    matrix_entropy,
    mean_cosine,
    mix_compress_refine,
    no_op,
    no_op_of_model,
    normaliser_swap,
    outlier_circuit,
    over_mixing,
    positional_direction,
    positional_part,
    rescaling,
    rotary_decay,
    rotary_decay_of_model,
    spectral_energy,
    trace_circuit,
    visibility,
    without_coordinates,
)
from headway.methods.sinks.sink_survey.registers import block_list
from headway.tasks.planted_sinks import PlantedSinks, planted_sinks
from headway.tasks.trigger_averaging import TriggerAttention, trigger_batch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def planted() -> PlantedSinks:
    return planted_sinks()


def stripe(tokens: int, share: float) -> torch.Tensor:
    """Weights with `share` on key 0, the rest spread evenly over the past."""
    weights = torch.zeros(tokens, tokens)
    for i in range(tokens):
        weights[i, : i + 1] = (1 - share) / max(i, 1)
        weights[i, 0] = share if i else 1.0
    return weights[None, None]


class TestNoOp:
    def test_much_attention_on_a_drained_value_is_a_no_op(self):
        value = torch.randn(1, 1, 12, 8, generator=generator())
        value[:, :, 0] *= 0.001
        found = no_op(stripe(12, 0.9), value, torch.arange(12) == 0, rows=torch.arange(12)[None, None] > 0)
        assert found.verdict == YES
        assert found.value < 0.05
        assert found.details["share"] == pytest.approx(0.9)

    def test_much_attention_on_a_loud_value_is_none(self):
        value = torch.randn(1, 1, 12, 8, generator=generator())
        value[:, :, 0] *= 10
        found = no_op(stripe(12, 0.9), value, torch.arange(12) == 0, rows=torch.arange(12)[None, None] > 0)
        assert found.verdict == NO
        assert found.value == pytest.approx(1.0, abs=0.1)

    def test_without_a_sink_nothing_is_said(self):
        value = torch.randn(1, 1, 12, 8, generator=generator())
        found = no_op(stripe(12, 0.1), value, torch.arange(12) == 0, rows=torch.arange(12)[None, None] > 0)
        assert found.verdict == UNCLEAR
        assert "too little" in found.sentence

    def test_a_model_without_a_sink_is_unclear_and_names_no_head(self):
        found = no_op_of_model(CAUSAL["llama"](), {"input_ids": tokens(2, 40)})
        assert found.verdict == UNCLEAR
        assert found.details["heads"] == []

    def test_the_planted_toy_with_a_perfect_sink_is_a_no_op(self):
        model = TriggerAttention([0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.maps["query"][0, 10, 0], model.maps["query"][0, 8, 0] = 1.0, -2.0
            model.maps["key"][0, 9, 0] = 400.0
            model.maps["value"][0, :8, :8] = torch.eye(8)
            batch = trigger_batch([generator()], 50)
            _, weights, value = model(batch.inputs)
        unflagged = ~batch.flags[0][:, None]
        unflagged[..., 0] = False
        found = no_op(weights[0][:, None], value[0][:, None], torch.arange(16) == 0, rows=unflagged)
        # All weight on a value of zero: the output is nothing, and the sink adds nothing to it.
        assert found.details["share"] == pytest.approx(1.0)
        assert (found.verdict, found.value) == (YES, 0.0)
        flagged = batch.flags[0][:, None]
        assert no_op(weights[0][:, None], value[0][:, None], torch.arange(16) == 0, rows=flagged).verdict == UNCLEAR

    def test_another_normaliser_takes_the_sink_away(self):
        assert normaliser_swap([0.99, 0.98], [0.17, 0.02]).verdict == YES
        assert normaliser_swap([0.99, 0.98], [0.97, 0.99]).verdict == NO
        assert normaliser_swap([0.1, 0.1], [0.0, 0.0]).verdict == UNCLEAR
        with pytest.raises(ArgumentError, match="softmax, other"):
            normaliser_swap([0.9], [])


class TestCircuit:
    def test_the_planted_life_of_the_sink_is_traced(self, planted):
        ids, _ = planted.text(96, generator=generator())
        trace = trace_circuit(planted.model, ids, magnitude=20.0, ratio=10.0)
        assert (trace.emergence, trace.vanish) == (planted.start, planted.end)
        alive = trace.received[planted.start + 1 : planted.end + 1].mean()
        assert float(alive) > 2 * float(trace.received[: planted.start + 1].mean())
        assert trace.down_input.shape == trace.output.shape == (16,)

    def test_without_its_coordinates_the_planted_sink_loses_its_attention(self, planted):
        ids, _ = planted.text(96, generator=generator())
        found = outlier_circuit(planted.model, ids, coordinates=64, magnitude=20.0, ratio=10.0)
        assert found.verdict == YES
        assert found.value > 0.5
        assert found.details["rate_without"] < found.details["rate"]
        # One of 64 coordinates of a direction that is turned away from all axes is not the cause.
        few = outlier_circuit(planted.model, ids, coordinates=1, ablation="mean", magnitude=20.0, ratio=10.0)
        assert few.verdict == NO

    def test_a_model_without_massive_states_has_no_circuit(self):
        found = outlier_circuit(CAUSAL["llama"](), tokens(1, 20))
        assert found.verdict == UNCLEAR
        assert "no block" in found.sentence

    def test_the_hooks_are_gone_afterwards(self):
        model, ids = CAUSAL["llama"](), tokens(1, 10)
        with torch.no_grad():
            before = model(input_ids=ids).logits
            with without_coordinates(model, 1, [0], 8):
                assert not torch.allclose(model(input_ids=ids).logits, before)
            assert torch.equal(model(input_ids=ids).logits, before)
        with pytest.raises(ArgumentError, match="ablation: got 'noise'"):
            outlier_circuit(model, ids, ablation="noise")
        with pytest.raises(ArgumentError, match="sinks"):
            trace_circuit(model, ids, sinks=[40])


class TestBias:
    def test_mean_cosines_are_those_of_all_pairs(self):
        vectors = torch.randn(3, 4, 5, generator=generator())
        vectors[1, 2] = 0.0
        across, within = [], []
        unit = [[v / v.norm() if float(v.norm()) else None for v in row] for row in vectors]
        for a in range(3):
            for b in range(3):
                for i in range(4):
                    for j in range(4):
                        if (a, i) != (b, j) and unit[a][i] is not None and unit[b][j] is not None:
                            (within if a == b else across).append(float(unit[a][i] @ unit[b][j]))
        got = mean_cosine(vectors)
        assert float(got[0]) == pytest.approx(sum(across) / len(across), abs=1e-5)
        assert float(got[1]) == pytest.approx(sum(within) / len(within), abs=1e-5)

    def test_one_first_token_for_all_inputs_is_a_constant(self):
        """In the first layer the value of one and the same first token is one vector, whatever follows."""
        model, ids = CAUSAL["llama"](), tokens(4, 16)
        ids[:, 0] = 5
        found = implicit_bias(model, ids, heads=[(0, head) for head in range(4)])
        assert found.verdict == YES
        assert found.value == pytest.approx(1.0, abs=1e-4)

    def test_different_tokens_add_different_things(self):
        found = implicit_bias(CAUSAL["llama"](), tokens(6, 16), heads=[(0, head) for head in range(4)])
        assert found.verdict == NO
        assert abs(found.value) < 0.5
        assert all(row["within"] == pytest.approx(1.0, abs=1e-4) for row in found.details["heads"])

    def test_a_constant_in_its_place_costs_nothing_where_it_is_one(self):
        model, ids = CAUSAL["llama"](), tokens(4, 16)
        ids[:, 0] = 5
        with torch.no_grad():
            native = model(input_ids=ids).logits
        found = implicit_bias(model, ids, heads=[(0, 1)], loss=True)
        assert found.details["loss_with_constant"] != found.details["loss_without"]
        assert ConstantSink(means={0: {}}).edits == {"weights", "output"}
        from headway.door import use

        with torch.no_grad(), use(model, ConstantSink(means={0: {}})):
            torch.testing.assert_close(model(input_ids=ids).logits, native, atol=1e-4, rtol=0)

    def test_nothing_that_sinks_is_unclear_and_one_input_is_refused(self):
        model = CAUSAL["llama"]()
        assert implicit_bias(model, tokens(3, 40), heads=[]).verdict == UNCLEAR
        with pytest.raises(ArgumentError, match="ids: got 1 input"):
            implicit_bias(model, tokens(1, 10))


class TestGeometry:
    def test_a_planted_positional_direction_is_found(self):
        hidden = torch.randn(40, 12, 30, generator=generator())
        assert positional_direction(hidden).verdict == NO
        hidden[:, 0] += 30 * torch.nn.functional.normalize(torch.ones(30), dim=0)
        found = positional_direction(hidden)
        assert found.verdict == YES
        assert found.value > 0.9
        torch.testing.assert_close(positional_part(hidden).mean(0), torch.zeros(30), atol=1e-5, rtol=0)
        with pytest.raises(ArgumentError, match="at least 2"):
            positional_direction(hidden[:1])

    def test_a_planted_drift_is_found_and_a_standing_state_has_none(self):
        base = torch.randn(2, 9, 40, generator=generator())
        toward = [base + step * base[:, :1] for step in (0.0, 0.2, 0.5, 1.0, 2.0, 4.0)]
        found = drift_to_sink(toward)
        assert found.verdict == YES
        assert found.details["by_block"] == sorted(found.details["by_block"])
        assert drift_to_sink([base] * 6).verdict == NO
        with pytest.raises(ArgumentError, match="at least 4"):
            drift_to_sink([base] * 3)

    def test_a_key_against_the_mean_stands_apart(self):
        key = torch.randn(20, 8, generator=generator()) * 0.2
        key[:, 0] += 1.0
        assert key_apart(key).verdict == NO
        key[0] = -2 * key[1:].mean(0)
        found = key_apart(key)
        assert found.verdict == YES
        assert found.value < -0.9 < 0.5 < found.details["others"]

    def test_a_model_gives_both(self):
        """Of the states that enter the blocks; what leaves the last one is not among them."""
        model = planted_sinks(layers=8, end=7, creations=((3, 11.91),)).model
        ids = torch.randint(8, 60, (4, 20), generator=generator())
        entering = []
        hooks = [
            block.register_forward_pre_hook(lambda m, args: entering.append(args[0])) for block in block_list(model)
        ]
        found = geometry_of_model(model, ids)
        for hook in hooks:
            hook.remove()
        assert len(entering) == 8
        assert found["drift"].details["by_block"] == pytest.approx(drift_to_sink(entering).details["by_block"])
        assert found["position"].value == pytest.approx(positional_direction(entering[4]).value)


class TestOthers:
    def test_even_attention_is_explained_by_visibility_and_a_sink_is_not(self):
        even = torch.ones(40, 40).tril() / torch.arange(1, 41)[:, None]
        found = visibility(even.sum(0) / torch.arange(40, 0, -1))
        assert found.verdict == YES
        assert found.value == pytest.approx(1.0, abs=1e-4)
        assert visibility(torch.tensor([0.9] + [0.01] * 39)).verdict == NO

    def test_rotation_works_against_far_keys_and_no_rotation_does_not(self):
        assert rotary_decay(10_000.0 ** -torch.linspace(0, 1, 32)).verdict == YES
        assert rotary_decay(torch.zeros(4)).verdict == NO
        assert rotary_decay_of_model(CAUSAL["llama"]()).verdict == YES

    def test_mixing_is_calmed_by_a_token_that_takes_the_attention(self):
        class Mean(torch.nn.Module):
            """Four layers of even attention, of which a sink token in front takes a given share."""

            def __init__(self, share):
                super().__init__()
                self.embed, self.share = torch.nn.Embedding(20, 8), share
                self.embed.weight.data = torch.randn(20, 8, generator=generator())

            def get_input_embeddings(self):
                return self.embed

            def forward(self, inputs_embeds, output_hidden_states, use_cache):
                x, count = inputs_embeds, inputs_embeds.shape[1]
                weights = torch.ones(count, count).tril()
                weights = weights / weights.sum(-1, keepdim=True)
                if torch.equal(x[0, 0], self.embed.weight[7]):
                    weights = (1 - self.share) * weights
                    weights[:, 0] += self.share
                for _ in range(4):
                    x = x + weights @ x
                return SimpleNamespace(hidden_states=(x,))

        ids = torch.randint(8, 20, (3, 10), generator=generator(1))
        found = over_mixing(Mean(0.9), ids, sink=7)
        assert found.verdict == YES
        assert found.value < 0.1
        # One more token thins the mixing out a little, sink or not.
        assert over_mixing(Mean(0.0), ids, sink=7).verdict == NO
        ids[:, 0] = 7
        assert over_mixing(Mean(0.9), ids).verdict == YES

    def test_one_massive_token_rules_the_spectrum(self):
        hidden = torch.randn(30, 20, generator=generator())
        assert spectral_energy(hidden).verdict == NO
        hidden[0] *= 100
        assert spectral_energy(hidden).verdict == YES

    def test_a_head_that_is_silent_at_the_sink_is_dormant(self):
        share = torch.tensor([0.9, 0.9, 0.1, 0.2])
        output = torch.tensor([0.1, 0.1, 1.0, 1.0])[:, None] * torch.ones(4, 3)
        found = dormant_head(share, output)
        assert found.verdict == YES
        assert found.value == pytest.approx(0.1)
        assert dormant_head(share, torch.ones(4, 3)).verdict == NO
        assert dormant_head(torch.ones(4), output).verdict == UNCLEAR

    def test_matrix_entropy_of_one_direction_and_of_all(self):
        assert matrix_entropy(torch.ones(6, 4)) == pytest.approx(0.0, abs=1e-3)
        assert matrix_entropy(torch.eye(6)) == pytest.approx(1.0)

    def test_a_valley_is_mix_compress_refine(self):
        wide = torch.randn(20, 16, generator=generator())
        flat = torch.randn(20, 1, generator=generator()) @ torch.randn(1, 16, generator=generator()) + 0.01 * wide
        assert mix_compress_refine([wide, wide, flat, flat, flat, wide, wide, wide]).verdict == YES
        assert mix_compress_refine([wide] * 8).verdict == NO
        with pytest.raises(ArgumentError, match="at least 4"):
            mix_compress_refine([wide] * 2)

    def test_a_norm_layer_takes_the_lead_away(self):
        before = torch.randn(2, 10, 16, generator=generator())
        before[:, 0] *= 200
        after = before / before.norm(dim=-1, keepdim=True)
        found = rescaling(before, after)
        assert found.verdict == YES
        assert found.details["after"] == pytest.approx(1.0)
        assert rescaling(before, before).verdict == NO
