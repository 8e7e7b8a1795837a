"""The recipe at smoke size, and the planted task behind it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from headway.errors import ArgumentError
from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _sink_back_copy as back_copy
from headway.evidence.recipes import _sink_training as training
from headway.evidence.recipes import sink_emergence as recipe
from headway.lab.arms import Arm
from headway.lab.data import Split
from headway.lab.training import build
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


TINY = training.Training(Arm(steps=20), 3, 4)


def arms_with(**changes):
    """Numbers of trained arms as the paper's table has them, by seed; `changes` replace those of an arm."""
    sink = {"softmax": 0.4, "decay-0": 0.15, "decay-0.1": 0.18, "key-slot": 0.0, "sigmoid": 0.004, "slow": 0.06,
            "little-data": 0.0, "window": 0.01, "prefix": 0.05, "place": 0.0, "no-position": 0.2}  # fmt: skip
    spread = (0.98, 1.0, 1.02)
    found = {
        name: {
            "sink_1": [value * s for s in spread],
            "loss": [3.7 * s for s in spread],
            "sink_slot": [0.73] * 3,
            "first_share": [0.1] * 3,
            "mass": [0.2] * 3,
            "sink_prefix": [0.2] * 3,
            "sink_2": [0.3] * 3,
            "course": [[0.0, value]] * 3,
        }
        for name, value in sink.items()
    }
    for name, columns in changes.items():
        found[name.replace("_", "-")].update(columns)
    return found


@pytest.fixture
def judged(tmp_path):
    context = Context(size="smoke", seed=0, out=tmp_path)

    def judge_arms(found):
        return {claim.id: claim for claim in training._claims(found, [1, 2, 3], TINY, context)}

    return judge_arms


class TestTraining:
    def test_without_a_sink_no_comparison_counts(self, smoke):
        claims = [claim for claim in smoke.claims if claim.id in training.TRAINING_CRITERIA]
        assert len(claims) == len(training.TRAINING_CRITERIA)
        for claim in claims:
            assert claim.verdict == "inconclusive"
            assert "requirement not met: least Sink_1 of the softmax models" in claim.reason
            assert "2 of 2 softmax models" in claim.notes

    def test_the_table_of_the_paper_holds(self, judged):
        assert {claim.verdict for claim in judged(arms_with()).values()} == {"holds"}

    def test_one_softmax_model_without_a_sink_is_enough_to_say_nothing(self, judged):
        claims = judged(arms_with(softmax={"sink_1": [0.4, 0.4, 0.04]}))
        assert {claim.verdict for claim in claims.values()} == {"inconclusive"}

    @pytest.mark.parametrize(
        ("claim", "arm", "columns"),
        [
            ("trained-emergence", "softmax", {"course": [[0.3, 0.4]] * 3}),
            ("trained-weight-decay", "decay_0", {"sink_1": [0.6, 0.6, 0.61]}),
            ("trained-key-slot", "key_slot", {"sink_1": [0.3, 0.3, 0.31]}),
            ("trained-key-slot", "key_slot", {"sink_slot": [0.0, 0.0, 0.0]}),
            ("trained-sigmoid", "sigmoid", {"sink_1": [0.3, 0.3, 0.31]}),
            ("trained-loss", "sigmoid", {"loss": [4.0, 4.1, 4.2]}),
            ("trained-loss", "decay_0", {"loss": [3.4, 3.45, 3.5]}),
            ("trained-small-rate", "slow", {"sink_1": [0.6, 0.6, 0.61]}),
            ("trained-little-data", "little_data", {"sink_1": [0.3, 0.3, 0.31]}),
            ("trained-window", "window", {"sink_1": [0.6, 0.6, 0.61]}),
            ("trained-prefix", "prefix", {"sink_prefix": [0.0, 0.0, 0.0]}),
            ("trained-place", "place", {"sink_2": [0.0, 0.0, 0.0], "sink_1": [0.3, 0.3, 0.31]}),
            ("trained-no-position", "no_position", {"sink_1": [0.0, 0.0, 0.01]}),
        ],
    )
    def test_a_claim_fails_when_its_arm_says_otherwise(self, judged, claim, arm, columns):
        claims = judged(arms_with(**{arm: columns}))
        assert {name for name, c in claims.items() if c.verdict != "holds"} == {claim}
        assert claims[claim].verdict == "fails"

    def test_every_arm_changes_one_thing_of_the_reference(self):
        arms = training.training_arms(Arm(steps=100), Split(torch.zeros(100_000), torch.zeros(10)))
        reference = arms.pop("softmax").settings()
        changed = {name: {k for k, v in a.settings().items() if v != reference[k]} for name, a in arms.items()}
        assert changed == {
            "decay-0": {"weight_decay"},
            "decay-0.1": {"weight_decay"},
            "key-slot": {"normalizer"},
            "sigmoid": {"normalizer"},
            "slow": {"learning_rate", "steps"},
            "little-data": {"data"},
            "window": {"window"},
            "prefix": {"prefix"},
            "place": {"first", "place"},
            "no-position": {"position"},
        }
        assert arms["little-data"].data == 4000
        assert arms["slow"].learning_rate * arms["slow"].steps == pytest.approx(1e-3 * 100)

    def test_weights_are_drawn_as_the_paper_draws_them(self):
        model = build(Arm(width=128, layers=3, heads=4), 0)
        training.draw_weights(model, 7)
        for name, weight in model.named_parameters():
            if weight.ndim < 2:
                continue
            fan_in = weight.shape[1]
            expected = 1 / (math.sqrt(fan_in) * 3) if "down" in name else math.sqrt(2 / (5 * fan_in))
            assert float(weight.std()) == pytest.approx(expected, rel=0.03), name
            assert abs(float(weight.mean())) < 0.03 * expected, name

    def test_drawing_depends_on_the_seed_alone_and_leaves_slots_as_they_are(self):
        plain = Arm(width=32, layers=2, heads=2)
        slotted = build(replace(plain, normalizer="key_slot"), 3)
        slots = {n: p.detach().clone() for n, p in slotted.named_parameters() if "normalizer" in n}
        other = build(plain, 4)
        for model in (slotted, other):
            training.draw_weights(model, 7)
        drawn = dict(slotted.named_parameters())
        assert len(slots) == 2
        assert all(torch.equal(drawn[name], slots[name]) for name in slots)
        for name, weight in other.named_parameters():
            assert torch.equal(drawn[name], weight), name


class TestCaution:
    def test_behind_a_trigger_stands_the_token_before_it(self):
        ids = back_copy.back_copy_batch(back_copy.transitions(0), 200, torch.Generator().manual_seed(0))
        asked = back_copy.is_trigger(ids[:, 2:-1])
        assert int(asked.sum()) > 100
        assert torch.equal(ids[:, 3:][asked], ids[:, 1:-2][asked])
        assert bool((ids[:, 0] == back_copy.FIRST).all())
        assert bool((ids[:, 1:] != back_copy.FIRST).all())

    def test_behind_other_symbols_the_chain_goes_on(self):
        chain = back_copy.transitions(3)
        ids = back_copy.back_copy_batch(chain, 4000, torch.Generator().manual_seed(1))
        symbol = back_copy.TRIGGERS + 2
        followers = ids[:, 3:][ids[:, 2:-1] == symbol]
        found = torch.bincount(followers, minlength=back_copy.SYMBOLS) / len(followers)
        torch.testing.assert_close(found, chain[symbol], atol=0.03, rtol=0)

    def test_seeds_have_chains_of_their_own(self):
        assert not torch.equal(back_copy.transitions(0), back_copy.transitions(1))
        assert torch.equal(back_copy.transitions(5), back_copy.transitions(5))

    def test_a_model_that_knows_the_rule_copies_everything(self):
        class Rule(torch.nn.Module):
            def __init__(self, back):
                super().__init__()
                self.back = back

            def forward(self, input_ids, use_cache):
                logits = torch.nn.functional.one_hot(input_ids.roll(self.back, 1), back_copy.SYMBOLS).float()
                return type("Output", (), {"logits": logits})

        ids = back_copy.back_copy_batch(back_copy.transitions(0), 100, torch.Generator().manual_seed(0))
        assert back_copy.share_copied(Rule(1), ids) == 1.0
        assert back_copy.share_copied(Rule(2), ids) < 0.5

    def test_a_model_that_has_not_learned_to_copy_says_nothing(self, smoke):
        for claim in smoke.claims:
            if claim.id.startswith("caution"):
                assert claim.verdict == "inconclusive"
                assert "share of copies" in claim.reason
