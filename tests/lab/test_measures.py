"""Data and measures of the laboratory on models whose sink is planted."""

from __future__ import annotations

import pytest
import torch

from headway.door import observe
from headway.errors import ArgumentError
from headway.hosts import default_text
from headway.lab import Arm
from headway.lab.arms import EXTRA_ID
from headway.lab.data import ByteSequences, Split, held_out, labelled, split_bytes, with_first
from headway.lab.measures import measure_arm
from headway.lab.training import HeadMass, build, loss_with_terms, run_arm, thinned
from headway.methods.sinks.sink_survey.comparison import in_int8, narrowed
from headway.train.sink_losses import head_balance_loss

SMALL = {"width": 32, "layers": 2, "heads": 2, "length": 16, "batch": 4, "steps": 6, "warmup": 1}


@pytest.fixture(scope="module")
def split():
    return split_bytes(default_text())


def arm(**changes) -> Arm:
    return Arm(**{"name": "x", **SMALL, **changes})


def judged(split, given: Arm, model=None):
    model = build(given, 0).eval() if model is None else model
    return measure_arm(model, given, held_out(split, given, 6))


def planted_even(given: Arm):
    """A model whose queries and keys are zero: every row spreads its weight evenly over what it sees."""
    model = build(given, 0).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.mixer.query.weight.zero_()
            layer.mixer.key.weight.zero_()
    return model


class TestData:
    def test_batches_depend_on_seed_and_number_alone(self, split):
        stream = ByteSequences(split, arm(), 3)
        first = [next(stream)["input_ids"] for _ in range(3)]
        again = ByteSequences(split, arm(), 3)
        assert torch.equal(again.batch(2)["input_ids"], first[2])
        assert not torch.equal(ByteSequences(split, arm(), 4).batch(2)["input_ids"], first[2])

    def test_a_text_shorter_than_a_sequence_is_refused(self):
        with pytest.raises(ArgumentError, match="text: got 8 bytes to train on, expected at least 17"):
            ByteSequences(Split(torch.zeros(8), torch.zeros(8)), Arm(length=16), 0)

    def test_training_never_meets_what_is_held_out(self, split):
        whole = torch.cat([split.train, split.held_out])
        assert bytes(whole.tolist()) == default_text().text.encode()
        small = ByteSequences(split, arm(data=64), 0)
        assert small.ids.numel() == 64

    def test_all_arms_of_a_length_are_judged_on_the_same_text(self, split):
        assert torch.equal(held_out(split, arm(), 8), held_out(split, arm(normalizer="softpick", steps=9), 8))
        windows = held_out(split, arm(), 8)
        assert windows.unique(dim=0).shape[0] == 8
        with pytest.raises(ArgumentError, match="held-out sequences"):
            held_out(split, arm(), 10**6)

    def test_what_stands_in_front(self, split):
        ids = torch.arange(40).view(2, 20)
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(with_first(ids, arm(), generator), ids)
        random = with_first(ids, arm(first="random"), generator)
        assert torch.equal(random[:, 1:], ids[:, 1:])
        for place in (0, 1, 2):
            fixed = with_first(ids, arm(first="fixed", place=place), generator)
            assert fixed[:, place].tolist() == [EXTRA_ID] * 2
            assert torch.equal(fixed[:, place + 1 :], ids[:, place:-1])
        some = with_first(ids.repeat(500, 1), arm(first="fixed", fraction=0.25), generator)
        assert 0.15 < float((some[:, 0] == EXTRA_ID).float().mean()) < 0.35
        assert with_first(ids, arm(first="learned"), generator)[:, 0].tolist() == [EXTRA_ID] * 2

    def test_prefix_and_own_token_are_not_scored(self):
        ids = torch.tensor([[EXTRA_ID, 1, 2, 3, 4, 5, 6, 7]])
        assert labelled(ids, arm())["labels"][0].tolist() == [-100, 1, 2, 3, 4, 5, 6, 7]
        assert labelled(ids, arm(prefix=3))["labels"][0].tolist() == [-100, -100, -100, 3, 4, 5, 6, 7]


class TestMeasures:
    def test_even_attention_has_no_sink_and_a_known_share(self, split):
        """Queries of zero: every row is even over what it sees."""
        found = judged(split, arm(), planted_even(arm()))
        assert found["sink_1"] == 0.0
        assert found["mass"] == pytest.approx(1.0)
        assert found["first_share"] == pytest.approx(sum(1 / n for n in range(2, 17)) / 15, rel=1e-4)

    def test_a_window_of_two_makes_the_first_token_a_sink_of_its_few_rows(self, split):
        """Rows 0 and 1 alone see it: 1 and 1/2."""
        found = judged(split, arm(window=2), planted_even(arm(window=2)))
        assert found["sink_1"] == 1.0
        assert found["first_share"] == pytest.approx(0.5)

    def test_softmax_plus_one_leaves_a_share_for_the_slot(self, split):
        given = arm(normalizer="softmax_plus_one")
        found = judged(split, given, planted_even(given))
        expected = sum(n / (n + 1) for n in range(2, 17)) / 15
        assert found["mass"] == pytest.approx(expected, rel=1e-4)
        assert found["slot"] == pytest.approx(1 - sum(n / (n + 1) for n in range(1, 17)) / 16, rel=1e-4)
        assert found["first_share"] == pytest.approx(sum(1 / (n + 1) for n in range(2, 17)) / 15, rel=1e-4)

    def test_weights_that_are_no_distribution_are_read_through_the_proxy_beside_their_mass(self, split):
        given = arm(normalizer="sigmoid")
        found = judged(split, given, planted_even(given))
        assert found["mass"] == pytest.approx(sum(n / 2 for n in range(2, 17)) / 15, rel=1e-4)
        assert found["first_share"] == pytest.approx(sum(1 / n for n in range(2, 17)) / 15, rel=1e-4)
        assert found["slot"] == 0.0

    def test_the_loss_is_that_of_the_model(self, split):
        given = arm()
        model, ids = build(given, 0).eval(), held_out(split, given, 6)
        with torch.no_grad():
            expected = float(model(input_ids=ids, labels=ids).loss)
        assert judged(split, given, model)["loss"] == pytest.approx(expected, rel=1e-5)

    def test_a_window_as_long_as_the_text_costs_nothing_and_is_taken_back(self, split):
        model, ids = build(arm(), 0).eval(), held_out(split, arm(), 2)
        with torch.no_grad():
            native = model(input_ids=ids).logits
            with narrowed(model, 16):
                torch.testing.assert_close(model(input_ids=ids).logits, native)
            with narrowed(model, 3):
                changed = model(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, native)
        torch.testing.assert_close(changed[:, :3], native[:, :3])
        assert not torch.allclose(changed[:, 5:], native[:, 5:])
        with pytest.raises(ArgumentError, match="window"), narrowed(model, 0):
            pass

    def test_int8_changes_little_and_is_taken_back(self, split):
        model, ids = build(arm(), 0).eval(), held_out(split, arm(), 2)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            native = model(input_ids=ids).logits
            with in_int8(model):
                eight = model(input_ids=ids).logits
            with in_int8(model, bits=2):
                two = model(input_ids=ids).logits
            assert torch.equal(model(input_ids=ids).logits, native)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        errors = [float((x - native).norm() / native.norm()) for x in (eight, two)]
        assert 0 < errors[0] < 0.1 < errors[1]

    @pytest.mark.parametrize("changes", [{"prefix": 3}, {"gate": "head"}, {"normalizer": "kernel_identity"},
                                         {"position": "alibi"}, {"first": "learned"}, {"optimizer": "muon"},
                                         {"optimizer": "orthoadam"},
                                         {"terms": {"tail": 0.5, "decorrelation": 0.1}},
                                         {"terms": {"head-balance": 0.1}}])  # fmt: skip
    def test_every_kind_of_arm_gives_every_number(self, split, changes):
        found = run_arm(arm(**changes), 0, split, evaluation=4).numbers
        assert set(found) >= {"loss", "sink_1", "first_share", "mass", "kurtosis", "inf_norm", "massive_ratio",
                              "int8_gap", "streaming_gap", "params", "ms_per_step"}  # fmt: skip
        assert all(torch.isfinite(torch.tensor(list(found.values()))))
        assert found["mass"] == pytest.approx(1.0) or "normalizer" in changes

    def test_terms_are_added_with_their_weights(self, split):
        model, batch = build(arm(), 0), ByteSequences(split, arm(), 0).batch(0)
        plain = loss_with_terms(model, batch, terms={"tail": 0.0})
        more = loss_with_terms(model, batch, terms={"decorrelation": 0.5, "tail": 2.0})
        with torch.no_grad():
            own = float(model(**batch).loss)
        assert plain.value.item() == pytest.approx(own)
        expected = own + 0.5 * more.metrics["decorrelation"] + 2 * more.metrics["tail"]
        assert more.value.item() == pytest.approx(expected, rel=1e-5)
        assert more.metrics["own_loss"] == pytest.approx(own)

    def test_head_balance_is_that_of_the_weights_and_trains_them(self, split):
        model, batch = build(arm(), 0), ByteSequences(split, arm(), 0).batch(0)
        found = loss_with_terms(model, batch, terms={"head-balance": 1.0})
        reader = HeadMass()
        with observe(model, reader), torch.no_grad():
            own = float(model(**batch).loss)
        balance = torch.stack([head_balance_loss(mass[:, :, 1:]) for mass in reader.mass]).mean()
        assert found.metrics["head-balance"] == pytest.approx(float(balance))
        assert found.value.item() == pytest.approx(own + float(balance))
        queries = model.layers[0].mixer.query.weight
        plain = loss_with_terms(model, batch, terms={"head-balance": 0.0})
        gradients = [torch.autograd.grad(loss.value, queries)[0] for loss in (found, plain)]
        assert not torch.allclose(*gradients)

    def test_a_course_is_thinned_to_means(self):
        assert thinned((1.0, 3.0, 5.0, 7.0, 9.0), most=3) == [2.0, 6.0, 9.0]
        assert thinned((1.0, 2.0)) == [1.0, 2.0]
