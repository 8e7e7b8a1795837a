"""The recipe at smoke size, and the planted task behind it."""

from __future__ import annotations

import math

import pytest
import torch

from headway.errors import ArgumentError
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import sink_emergence as recipe
from headway.methods.sinks.sink_emergence import received_mean
from headway.tasks.trigger_averaging import (
    CONTENT,
    NORMALIZERS,
    TriggerAttention,
    judge,
    run_trigger_averaging,
    train,
    trigger_batch,
)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("sink-emergence", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


class TestRecipe:
    def test_every_planned_claim_is_measured(self, smoke):
        assert {claim.id for claim in smoke.claims} == set(recipe.CRITERIA)
        assert smoke.planned

    def test_a_random_host_is_not_said_to_have_a_sink(self, smoke):
        claims = {claim.id: claim for claim in smoke.claims}
        assert claims["sink-on-first-token"].verdict == "fails"
        assert claims["sink-on-first-token"].details["natural"].startswith("No attention sink")

    def test_a_repeated_token_spreads_attention_evenly_whatever_the_weights(self, smoke):
        claim = next(c for c in smoke.claims if c.id == "no-sink-on-repeated-token")
        assert claim.measured.value == 0
        assert claim.details["summary"]["hidden_norm_ratio"] == pytest.approx([1.0] * 3, abs=1e-4)

    def test_an_untrained_toy_proves_nothing(self, smoke):
        planted = [claim for claim in smoke.claims if claim.id.startswith("planted")]
        assert len(planted) == len(NORMALIZERS)
        for claim in planted:
            assert claim.verdict == "inconclusive"
            assert "requirement not met" in claim.reason

    def test_planted_claims_count_seeds_as_units(self, smoke):
        claim = next(c for c in smoke.claims if c.id == "planted-softmax")
        assert claim.measured.n == len(claim.measured.seeds) == 2

    def test_the_same_seed_measures_the_same(self, smoke, tmp_path):
        again = prove("sink-emergence", size="smoke", seed=1, out=tmp_path, show_progress=False)
        assert [str(c.measured) for c in again.claims] == [str(c.measured) for c in smoke.claims]

    def test_full_size_asks_for_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(NotRunnableError, match="needs a GPU"):
            load_recipe("sink-emergence").check_runnable("full")

    def test_windows_of_the_text_do_not_overlap(self):
        windows = recipe._windows(torch.arange(100), 5, 16, torch.Generator().manual_seed(0))
        assert windows.unique().numel() == 5 * 16
        assert bool((windows.diff(dim=1) == 1).all())

    def test_random_tokens_are_never_special(self):
        host = recipe._tiny_host()
        ids = recipe._random_tokens(host, 200, 50, torch.Generator().manual_seed(0))
        assert not torch.isin(ids, torch.tensor(host.special)).any()
        assert ids.unique().numel() == 256

    def test_no_sinking_head_gives_no_number(self, tmp_path):
        context = Context(size="smoke", seed=0, out=tmp_path)
        assert math.isnan(recipe._mean([], context, "none").value)
        assert math.isnan(recipe._ratio([0.1], [0.0], context, "none").value)


class TestTask:
    def test_targets_are_running_means_at_flags_and_zero_elsewhere(self):
        batch = trigger_batch(generators(0), 50)
        content = batch.inputs[..., :CONTENT]
        for sequence in range(50):
            for item in range(16):
                expected = (
                    content[0, sequence, 1 : item + 1].mean(0) if batch.flags[0, sequence, item] else torch.zeros(8)
                )
                torch.testing.assert_close(batch.targets[0, sequence, item], expected)

    def test_the_first_item_has_a_mark_no_flag_and_no_content(self):
        batch = trigger_batch(generators(0, 1), 50)
        assert batch.inputs[:, :, 0].unique(dim=1).tolist() == [[[0.0] * 9 + [1.0, 1.0]]] * 2
        assert not batch.inputs[:, :, 1:, 9].any()
        assert 0.25 < float(batch.flags[:, :, 1:].float().mean()) < 0.35

    def test_seeds_train_as_if_alone(self):
        together = run_trigger_averaging("softmax_plus_one", [3, 8], steps=15)
        alone = run_trigger_averaging("softmax_plus_one", [8], steps=15)
        assert together.error[1] == pytest.approx(alone.error[0], rel=1e-4)
        assert together.mass[1] == pytest.approx(alone.mass[0], rel=1e-4)
        assert together.error[0] != pytest.approx(together.error[1], rel=1e-3)

    @pytest.mark.parametrize("normalizer", NORMALIZERS)
    def test_every_normaliser_is_causal_and_evicts_item_0_from_later_rows_only(self, normalizer):
        model = TriggerAttention([0], normalizer=normalizer)
        batch = trigger_batch(generators(0), 4)
        _, weights, _ = model(batch.inputs)
        assert not weights.triu(1).any()
        _, evicted, _ = model(batch.inputs, without_first=True)
        assert not evicted[..., 1:, 0].any()
        torch.testing.assert_close(evicted[..., 0, 0], weights[..., 0, 0])

    def test_normalisers_are_their_formulas(self):
        scores = torch.tensor([[[[0.5, -torch.inf], [1.0, -2.0]]]])
        b = torch.full((1, 1, 1, 1), 0.7)
        row = scores[0, 0, 1].exp()
        expected = {
            "softmax": row / row.sum(),
            "softmax_plus_one": row / (1 + row.sum()),
            "learned_denominator": row / (math.exp(0.7) + row.sum()),
            "sigmoid": torch.sigmoid(scores[0, 0, 1]),
        }
        for name, weights in expected.items():
            torch.testing.assert_close(NORMALIZERS[name](scores, b)[0, 0, 1], weights)

    def test_a_learned_denominator_of_zero_is_softmax_plus_one(self):
        batch = trigger_batch(generators(0), 4)
        weights = [
            TriggerAttention([5], normalizer=n)(batch.inputs)[1] for n in ("learned_denominator", "softmax_plus_one")
        ]
        assert torch.equal(*weights)

    def test_the_judge_reads_a_layer_planted_with_a_perfect_sink(self):
        """Flagged items see the content evenly, the others item 0, whose value is zero: a sink solves the task."""
        model = TriggerAttention([0])
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
            model.maps["query"][0, 10, 0], model.maps["query"][0, 8, 0] = 1.0, -2.0
            model.maps["key"][0, 9, 0] = 400.0
            model.maps["value"][0, :CONTENT, :CONTENT] = torch.eye(CONTENT)
            model.maps["output"][0, :CONTENT] = torch.eye(CONTENT)
        batch = trigger_batch(generators(0), 300)
        result = judge(model, batch, seeds=[0], steps=0)
        assert result.first_share == pytest.approx([1.0])
        assert result.mass == pytest.approx([1.0])
        assert result.value_ratio == (0.0,)
        assert result.error[0] < 1e-10
        assert result.eviction_ratio[0] > 1e6
        weights = model(batch.inputs)[1].detach()
        assert result.alpha_first[0] == pytest.approx(float(received_mean(weights)[..., 0].mean()), rel=1e-4)
        assert result.alpha_next[0] == pytest.approx(
            float(received_mean(weights)[..., 1:].mean((0, 1)).max()), rel=1e-4
        )

    def test_a_layer_that_is_always_silent_has_the_error_of_chance(self):
        model = TriggerAttention([0])
        with torch.no_grad():
            model.maps["output"].zero_()
        result = judge(model, trigger_batch(generators(0), 50), seeds=[0], steps=0)
        assert result.error == pytest.approx(result.chance_error)
        assert result.eviction_ratio == pytest.approx([1.0])

    def test_training_turns_softmax_towards_its_sink(self):
        model = TriggerAttention([0, 1])
        batch = trigger_batch(generators(10, 11), 200)
        before = judge(model, batch, seeds=[0, 1], steps=0)
        train(model, generators(20, 21), steps=400)
        after = judge(model, batch, seeds=[0, 1], steps=400)
        for seed in range(2):
            assert after.error[seed] < 0.1 * after.chance_error[seed]
            assert after.first_share[seed] > 0.8 > before.first_share[seed]
            assert after.eviction_ratio[seed] > 10

    def test_biases_are_only_there_when_asked_for(self):
        assert len(list(TriggerAttention([0]).biases)) == 0
        assert len(list(TriggerAttention([0], bias=True).biases)) == 4

    def test_bad_arguments_are_named(self):
        with pytest.raises(
            ArgumentError, match="normalizer: got 'softmax1', expected one of softmax, softmax_plus_one"
        ):
            TriggerAttention([0], normalizer="softmax1")
        with pytest.raises(ArgumentError, match=r"seeds: got \[1, 1\]"):
            TriggerAttention([1, 1])
        with pytest.raises(ArgumentError, match="steps: got 0"):
            run_trigger_averaging("softmax", [0], steps=0)
        with pytest.raises(ArgumentError, match="items: got 1"):
            trigger_batch(generators(0), 2, items=1)
