"""The AttentionInfluence recipe at smoke size, and its toy texts."""

from __future__ import annotations

import pytest
import torch

from headway.evidence import prove
from headway.evidence.recipes import _influence_toy as toy
from headway.evidence.recipes import attention_influence as recipe
from headway.evidence.recipes._influence_stages import Letters, _list_text, _without_object
from headway.tasks.retrieval_probe import retrieval_probe


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("attention-influence", size="smoke", seed=1, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(recipe.CRITERIA)
    assert smoke.planned


def test_what_has_not_learned_proves_nothing(smoke):
    for name in ("few-stable-heads", "masking-ends-copying", "toy-masking-ends-recall", "toy-recall-ranks-first"):
        assert claim(smoke, name).verdict == "inconclusive"


def test_controls_are_as_many_as_the_heads_and_others(smoke):
    details = claim(smoke, "masking-ends-copying").details
    heads = {tuple(pair) for pair in details["heads"]}
    assert len(details["right"]["masked"]) == len(details["right"]["intact"]) == 2
    assert all(
        tuple(pair) not in heads or len(control) < len(heads) for control in details["controls"] for pair in control
    )


def test_a_toy_whose_layers_have_too_few_other_heads_has_no_controls():
    import numpy as np

    from headway.evidence.recipes._influence_stages import _later_controls
    from headway.methods.diagnosis.attention_influence import HeadScores

    def found(scores):
        return HeadScores(layers=(0, 1, 2), per_sample=np.array([scores]), accuracy=np.ones(1), threshold=0.5)

    (control,) = _later_controls(found([[0.9, 0.8], [0.1, 0.0], [0.1, 0.2]]), 1, 0)
    assert len(control) == 2
    assert {layer for layer, _ in control} <= {1, 2}
    assert _later_controls(found([[0.1, 0.1], [0.9, 0.0], [0.9, 0.9]]), 1, 0) == []


def test_planted_heads_are_found_at_any_size(smoke):
    assert claim(smoke, "planted-heads-found").verdict == "holds"
    assert claim(smoke, "planted-heads-found").others["wrong"].value == 0


def test_every_question_of_a_record_has_its_answer_in_the_first_part():
    for row in toy.records(50, torch.Generator().manual_seed(0)).tolist():
        pairs, asked = row[: toy.KEYS], row[toy.KEYS + toy.GAP :]
        assert sorted(pair // toy.VALUES for pair in pairs) == list(range(toy.KEYS))
        assert set(asked[1::2]) == set(pairs)
        assert [pair // toy.VALUES for pair in asked[1::2]] == [key - toy.ASK for key in asked[::2]]


def test_guessed_answers_change_answers_alone():
    ids = toy.records(50, torch.Generator().manual_seed(0))
    changed = toy.guessed(ids, torch.Generator().manual_seed(1)) != ids
    kept = torch.ones(toy.LENGTH, dtype=torch.bool)
    kept[toy.ANSWERS] = False
    assert not changed[:, kept].any()
    assert float(changed[:, toy.ANSWERS].double().mean()) > 0.8


@pytest.mark.parametrize("kind", toy.KINDS)
def test_texts_of_every_kind_have_one_length_and_their_own_ids(kind):
    ids = toy.documents(kind, 40, torch.Generator().manual_seed(0))
    assert ids.shape == (40, toy.LENGTH)
    symbols = ids >= toy.SYMBOL
    assert torch.equal(symbols.any(0).nonzero()[:, 0], torch.arange(toy.KEYS, toy.KEYS + toy.GAP)) or kind != "recall"
    assert kind == "recall" or bool(symbols.all())
    assert 0 <= int(ids.min()) <= int(ids.max()) < toy.VOCABULARY


@pytest.mark.parametrize(("kind", "distance"), [("chain", 1), ("skip-gram", 2)])
def test_symbols_of_a_chain_follow_from_one_place_alone(kind, distance):
    """The share of symbols that are the likeliest behind the symbol so many places before."""
    ids = toy.chains(200, torch.Generator().manual_seed(0), distance=distance) - toy.SYMBOL

    def told(places):
        counts = torch.zeros(toy.SYMBOLS, toy.SYMBOLS)
        counts.index_put_((ids[:, :-places].flatten(), ids[:, places:].flatten()), torch.tensor(1.0), accumulate=True)
        return float(counts.amax(1).sum() / counts.sum())

    other = 3 - distance
    assert told(distance) > 0.3
    assert told(distance) > told(other) + 0.08
    even = toy.chains(200, torch.Generator().manual_seed(0), distance=distance, noise=1.0) - toy.SYMBOL
    assert even.unique().numel() == toy.SYMBOLS
    assert toy.documents(kind, 3, torch.Generator().manual_seed(0)).shape == (3, toy.LENGTH)


def test_both_texts_of_a_pair_have_the_same_words_and_only_one_is_true():
    import numpy as np

    right, wrong = _list_text(np.random.default_rng(0))
    known = dict(
        line.split(" Street has number ") for line in right.splitlines() if "has number" in line.split("?")[0][10:]
    )
    asked = [line for line in right.splitlines() if line.startswith("Which")]
    assert len(asked) == 4
    for line in asked:
        name, number = line.split("has ")[1].split(" Street")[0], line.split("It is ")[1]
        assert known[name] == number
    assert right.split("Which")[0] == wrong.split("Which")[0]
    assert all(line not in wrong for line in asked)


def test_the_floor_leaves_the_object_out():
    sentences = [f"no {i} says {3 * i} times" for i in range(12)]
    probe = retrieval_probe(Letters(), sentences, tokens=900, key_length=8)
    short = _without_object(Letters(), probe)
    assert short.shape[1] < probe.ids.shape[1] - len(probe.object) + 5
    assert torch.equal(short[0, -len(probe.answer) :], probe.answer)
