"""Arms from YAML: what is read, what is refused, and that equal settings have equal names."""

from __future__ import annotations

import pytest

from headway.errors import ArgumentError
from headway.lab import Arm, Experiment, load_experiment, shipped_experiments
from headway.lab.arms import parse_experiment
from headway.lab.training import build


def test_every_shipped_experiment_is_read_and_starts_with_its_baseline():
    shipped = shipped_experiments()
    assert {"mitigation", "emergence", "attention", "factors", "quick"} <= set(shipped)
    for name, about in shipped.items():
        experiment = load_experiment(name)
        assert about
        assert experiment.baseline.normalizer == "softmax"
        assert len({arm.name for arm in experiment.arms}) == len(experiment.arms)


@pytest.mark.parametrize("name", ["mitigation", "attention", "factors"])
def test_every_arm_of_the_sheets_can_be_built(name):
    for arm in load_experiment(name).arms:
        assert sum(p.numel() for p in build(arm, 0).parameters()) > 10_000


def test_the_factors_of_the_issue_are_all_there():
    mitigation = {arm.normalizer for arm in load_experiment("mitigation").arms}
    assert {"softmax", "softmax_plus_one", "learned_denominator", "key_slot", "key_value_slot", "clipped", "softpick",
            "sigmoid", "elastic", "affine"} <= mitigation  # fmt: skip
    assert {arm.gate for arm in load_experiment("mitigation").arms} >= {"head", "element", "conditional", "value"}
    factors = load_experiment("factors").arms
    changed = {key for arm in factors for key in arm.changes()}
    assert {"learning_rate", "weight_decay", "data", "prefix", "window", "width", "layers"} <= changed
    assert {arm.position for arm in factors} == {"rope", "none", "sinusoidal", "learned", "relative", "alibi"}
    assert {arm.mlp for arm in factors} == {"swiglu", "relu", "gelu", "swish", "reglu", "geglu"}
    assert {arm.place for arm in factors if arm.first == "fixed"} == {0, 1, 2}


def test_clipped_softmax_stretches_by_the_length_of_its_sequences():
    """γ = −α/T with T the sequences that the arm reads, not those of another recipe."""
    (arm,) = (arm for arm in load_experiment("mitigation").arms if arm.normalizer == "clipped")
    for layer in build(arm, 0).layers:
        assert layer.mixer.normalizer.gamma == -12 / arm.length


def test_base_arms_and_grid_are_put_together():
    experiment = parse_experiment(
        """
        about: A question.
        seeds: [3, 4]
        base: {steps: 7, learning_rate: 1e-3}
        arms: [{name: a}, {name: b, normalizer: softpick, steps: 9}]
        grid: {weight_decay: [0, 0.5]}
        """,
        name="mine",
    )
    assert [arm.name for arm in experiment.arms] == ["a, weight_decay 0", "a, weight_decay 0.5", "b, weight_decay 0",
                                                     "b, weight_decay 0.5"]  # fmt: skip
    assert [arm.steps for arm in experiment.arms] == [7, 7, 9, 9]
    assert experiment.arms[0].learning_rate == 0.001
    assert experiment.arms[3].changes() == {"normalizer": "softpick", "steps": 9, "weight_decay": 0.5}
    assert experiment.seeds == (3, 4)


def test_a_switch_is_true_or_false():
    (arm,) = parse_experiment("arms: [{name: osp, embed_projection: true}]", name="x").arms
    assert build(arm, 0).embed_in is not None
    with pytest.raises(ArgumentError, match="embed_projection of arm 'osp': got 1"):
        parse_experiment("arms: [{name: osp, embed_projection: 1}]", name="x")


def test_without_arms_there_is_softmax():
    assert [arm.name for arm in parse_experiment("base: {steps: 3}", name="x").arms] == ["softmax"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("arm: [{name: a}]", "Did you mean 'arms'"),
        ("arms: [{name: a, weight_decy: 1}]", "Did you mean 'weight_decay'"),
        ("arms: [{name: a, steps: many}]", "steps of arm 'a': got 'many'"),
        ("arms: [{name: a, steps: 1.5}]", "steps of arm 'a': got 1.5"),
        ("arms: [{name: a, window: 0.5}]", "window of arm 'a'"),
        ("arms: [{name: a, normalizer_options: 3}]", "expected a mapping"),
        ("arms: [{name: a, layers: 0}]", "layers of arm 'a': got 0, expected at least 1"),
        ("arms: [{name: a, place: 128}]", "place, fraction of arm 'a': got 128"),
        ("arms: [{name: a, fraction: 0}]", "place, fraction of arm 'a': got 0, 0"),
        ("arms: [{name: a, first: bos}]", "first of arm 'a': got 'bos'"),
        ("arms: [{name: a, length: 4}]", "length of arm 'a'"),
        ("arms: [{name: a, prefix: 200}]", "prefix of arm 'a'"),
        ("arms: [{name: a, data: 100}]", "data of arm 'a'"),
        ("arms: [{name: a, learning_rate: 0}]", "learning_rate"),
        ("arms: [{name: a, optimizer: sgd}]", "optimizer of arm 'a': got 'sgd'"),
        ("arms: [{name: a, schedule: cosin}]", "Did you mean 'cosine'"),
        ("arms: [{name: a, terms: {tails: 1}}]", "Did you mean 'tail'"),
        ("arms: [{name: a, terms: {tail: much}}]", "expected a mapping"),
        ("arms: [{name: a}, {name: a}]", "arms: got"),
        ("arms: {name: a}", "list of mappings"),
        ("seeds: 3", "seeds: got 3"),
        ("seeds: [1, 1]", "each once"),
        ("grid: {steps: 3}", "grid: got 3 for steps"),
        ("base: [1]", "base: got list"),
        ("- a", "expected a mapping"),
        ("a: [", "no YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(text, words):
    with pytest.raises(ArgumentError) as error:
        parse_experiment(text, name="x")
    assert words in str(error.value)


def test_an_unknown_experiment_or_file_is_named(tmp_path):
    with pytest.raises(ArgumentError, match="Did you mean 'mitigation'"):
        load_experiment("mitigations")
    with pytest.raises(ArgumentError, match="which is no file"):
        load_experiment(tmp_path / "none.yaml")
    (tmp_path / "own.yaml").write_text("arms: [{name: a}]")
    assert load_experiment(tmp_path / "own.yaml").name == "own"


def test_keys_follow_from_settings_and_seed_alone():
    first, second = Arm(name="a"), Arm(name="b", group="g")
    assert first.key(0).split("-", 1)[1] == second.key(0).split("-", 1)[1]
    assert first.key(0) != first.key(1)
    assert first.key(0) != Arm(name="a", weight_decay=0.2).key(0)
    assert "/" not in Arm(name="../../x y").key(0)


def test_an_experiment_needs_an_arm():
    with pytest.raises(ArgumentError, match="arms"):
        Experiment(name="x", arms=())
