"""Rollouts: exact resumption, honest answers, importance with intervals, and a sampler that batches rightly."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from headway.errors import ArgumentError, HeadwayError
from headway.evidence.recipes._anchors_scripted import GUESSES, script, scripted
from headway.evidence.recipes._anchors_toy import Words, decoder, draw_ids, planted
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis.thought_anchors import (
    NO_ANSWER,
    LocalSampler,
    Prefix,
    Rollout,
    RolloutCache,
    answer_reader,
    boxed_answer,
    collect,
    effect,
    estimate,
    exact_encoder,
    normalised,
    pattern_answer,
    sentence_importance,
    sentence_to_sentence,
    settled_starts,
    stated_answer,
)
from headway.methods.diagnosis.thought_anchors.rollouts import answers_of
from headway.methods.diagnosis.thought_anchors.sampling import draw
from headway.statistics.categorical import answer_divergence, kl_divergence, same_answers, smoothed

ANSWER = pattern_answer(r"answer is (\w+)")


@pytest.fixture(scope="module")
def trace():
    return script(coin="heads", guess=GUESSES[0])


@pytest.fixture(scope="module")
def drawn(trace):
    return collect(trace, scripted, rollouts=60, seed=0)


@pytest.fixture(scope="module")
def found(trace, drawn):
    forced = collect(trace, scripted, rollouts=60, kind="forced", force="Answer now: ")
    return sentence_importance(trace, drawn, extract=ANSWER, encoder=exact_encoder, forced=forced)


def test_the_sentence_that_decides_the_answer_ranks_first(trace, found):
    values = [one.counterfactual.divergence.value for one in found]
    coin = next(i for i, s in enumerate(trace.sentences) if "coin" in s)
    assert int(np.nanargmax(values)) == coin
    assert found[coin].resampling.p_value < 0.01
    assert found[coin].counterfactual.divergence.low > 0


def test_sentences_without_a_choice_are_zero_within_their_interval(trace, found):
    for one in found:
        if "coin" not in trace.sentences[one.sentence]:
            assert one.resampling.divergence.low == pytest.approx(0, abs=1e-9)
            assert one.resampling.p_value > 0.05
    fixed = found[0]
    assert fixed.different == 0
    assert math.isnan(fixed.counterfactual.divergence.value)
    assert fixed.overdetermined == pytest.approx(1 - 1 / 60)


def test_a_forced_answer_takes_a_guess_that_is_never_used_for_what_matters(trace, found):
    guess = next(i for i, s in enumerate(trace.sentences) if "guess" in s)
    coin = next(i for i, s in enumerate(trace.sentences) if "coin" in s)
    assert found[guess].forced.divergence.value > found[coin].forced.divergence.value
    assert found[guess].counterfactual.divergence.value < found[coin].counterfactual.divergence.value


def test_accuracy_is_positive_where_the_sentence_helps(trace, drawn):
    right = sentence_importance(trace, drawn, extract=ANSWER, encoder=exact_encoder, check=lambda a: a == "seven")
    coin = next(i for i, s in enumerate(trace.sentences) if "coin" in s)
    assert right[coin].counterfactual.accuracy.value == pytest.approx(1.0)
    assert 0.2 < right[coin].resampling.accuracy.value < 0.8


def test_counterfactual_is_resampling_where_every_resample_differs():
    without = [Rollout(0, s, f"Something else {s} entirely. The answer is {a}.") for s, a in enumerate("ababb")]
    kept = [Rollout(1, s, "Then we stop here. The answer is a.") for s in range(5)]
    trace = script(coin="heads", guess=GUESSES[0])
    one = sentence_importance(trace, {0: without, 1: kept}, extract=ANSWER, encoder=exact_encoder)[0]
    assert one.different == 1
    assert one.counterfactual.divergence.value == one.resampling.divergence.value > 0


def test_the_same_answers_have_no_effect():
    found = effect(list("aabbc"), list("cbbaa"), 0)
    assert found.divergence.value == 0
    assert found.divergence.low == 0
    assert found.p_value > 0.5


def test_answers_by_other_names_have_the_same_divergence():
    names = {"a": "x", "b": "a", "c": "q"}
    first, second = list("aaabc"), list("abbbb")
    renamed = [[names[x] for x in side] for side in (first, second)]
    assert effect(first, second, 0).divergence.value == pytest.approx(effect(*renamed, 0).divergence.value)


def test_divergences_are_never_negative_and_unseen_answers_stay_finite():
    random = np.random.default_rng(0)
    for _ in range(50):
        p, q = (smoothed(random.integers(0, 9, 5)) for _ in range(2))
        assert kl_divergence(p, q) >= 0
    assert answer_divergence(["a"] * 50, ["b"] * 50, generator=0).value < 10


def test_intervals_of_one_distribution_reach_zero():
    random = np.random.default_rng(1)
    hits = sum(
        answer_divergence(random.choice(3, 40).tolist(), random.choice(3, 40).tolist(), generator=i, resamples=300).low
        < 1e-3
        for i in range(60)
    )
    assert hits >= 54


def test_the_null_of_one_distribution_is_level():
    random = np.random.default_rng(2)
    p = [
        same_answers(random.choice(3, 40).tolist(), random.choice(3, 40).tolist(), generator=i, resamples=200).p_value
        for i in range(80)
    ]
    assert np.mean(np.array(p) < 0.1) < 0.25
    assert same_answers(["a"] * 20, ["b"] * 20, generator=0).p_value < 0.01


def test_one_rollout_says_nothing_about_spread():
    assert effect(["a"], ["b"], 0).divergence.high == math.inf
    assert math.isnan(effect([], ["b"], 0).divergence.value)


def test_a_text_without_an_answer_is_its_own_category():
    rollouts = [Rollout(0, 0, "I give up here."), Rollout(0, 1, "The answer is five.")]
    assert answers_of(rollouts, ANSWER) == [NO_ANSWER, "five"]


def test_behind_the_sentence_that_answers_the_answer_stands(trace):
    silent = [Rollout(len(trace), 0, ""), Rollout(2, 1, ""), Rollout(len(trace), 2, "", kind="forced")]
    assert answers_of(silent, ANSWER, trace) == ["seven", NO_ANSWER, NO_ANSWER]


@pytest.mark.parametrize(
    ("text", "which", "wanted"),
    [
        (r"\boxed{3} or \boxed{4}", "last", "4"),
        (r"\boxed{3} or \boxed{4}", "first", "3"),
        (r"\boxed{\dfrac{1}{2}}", "last", r"\frac{1}{2}"),
        (r"\boxed{1,200.00 }", "last", "1200"),
        (r"\boxed{\text{Yes}.}", "last", "yes"),
        (r"\boxed{3", "last", None),
        ("nothing", "last", None),
    ],
)
def test_boxed_answers(text, which, wanted):
    assert boxed_answer(text, which=which) == wanted


def test_stated_answers_and_choices_that_are_none():
    assert stated_answer("We get 12. The answer is 1,500 dollars, not 3.") == "1500"
    assert stated_answer("2 and then 9") == "9"
    assert stated_answer("none") is None
    assert normalised("$ 5 $.") == "5"
    with pytest.raises(ArgumentError, match="which"):
        boxed_answer("x", which="middle")
    with pytest.raises(ArgumentError, match="group"):
        pattern_answer("answer")
    with pytest.raises(ArgumentError, match="regular expression"):
        pattern_answer("(answer")


def test_keeping_a_sentence_makes_what_follows_from_it_likelier(trace, drawn):
    matrix = sentence_to_sentence(trace, drawn, exact_encoder)
    coin = next(i for i, s in enumerate(trace.sentences) if "coin" in s)
    last = len(trace) - 1
    assert matrix[last, coin] > 0.3
    assert matrix[last, 0] == pytest.approx(0, abs=0.25)
    assert np.isnan(np.triu(matrix)[np.triu_indices(len(trace))]).all()


def test_the_same_seed_draws_the_same_rollouts(trace, drawn):
    assert collect(trace, scripted, rollouts=60, seed=0) == drawn
    assert collect(trace, scripted, rollouts=60, seed=5) != drawn


def test_an_interrupted_collection_goes_on_without_loss_or_repetition(trace, tmp_path):
    asked = []

    def breaks(prefix, seeds):
        asked.extend(seeds)
        if len(asked) > 25:
            raise KeyboardInterrupt
        return scripted(prefix, seeds)

    with pytest.raises(KeyboardInterrupt):
        collect(trace, breaks, rollouts=10, batch=5, cache=RolloutCache(tmp_path, trace, {"t": 1}))
    stored = RolloutCache(tmp_path, trace, {"t": 1})
    assert len(stored.rollouts) == 25
    again = []

    def counts(prefix, seeds):
        again.extend(seeds)
        return scripted(prefix, seeds)

    found = collect(trace, counts, rollouts=10, batch=5, cache=stored)
    assert not {r.seed for r in stored.rollouts.values()} - set(asked[:25]) - set(again)
    assert len(again) == 10 * (len(trace) + 1) - 25
    assert not set(again) & set(asked[:25])
    assert found == collect(trace, scripted, rollouts=10, batch=5)
    assert len(stored.path.read_text().splitlines()) == 10 * (len(trace) + 1)


def test_other_settings_have_another_file(trace, tmp_path):
    assert RolloutCache(tmp_path, trace, {"t": 1}).path != RolloutCache(tmp_path, trace, {"t": 2}).path


def test_a_line_cut_by_a_crash_is_drawn_again_and_a_broken_one_is_named(trace, tmp_path, caplog):
    cache = RolloutCache(tmp_path, trace, {})
    cache.add([Rollout(0, 1, "one"), Rollout(0, 2, "two")])
    whole = cache.path.read_bytes()
    cache.path.write_bytes(whole[:-7])
    again = RolloutCache(tmp_path, trace, {})
    assert [r.seed for r in again.rollouts.values()] == [1]
    assert "cut short" in caplog.text
    again.add([Rollout(0, 2, "two")])
    assert cache.path.read_bytes() == whole
    cache.path.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(HeadwayError, match="line 1"):
        RolloutCache(tmp_path, trace, {})


def test_what_is_settled_draws_no_more(trace):
    stop = settled_starts(trace, extract=ANSWER, width=0.6)
    found = collect(trace, scripted, rollouts=200, batch=20, settled=stop)
    sizes = [len(found[i]) for i in range(len(trace) + 1)]
    coin = next(i for i, s in enumerate(trace.sentences) if "coin" in s)
    assert min(sizes) < 200
    assert sizes[coin] >= max(sizes[-1], sizes[0])


def test_the_cost_is_known_before(trace, caplog):
    cost = estimate(trace, rollouts=100, max_tokens=50, tokens_per_second=1000)
    assert (cost.rollouts, cost.tokens) == (100 * (len(trace) + 1), 5000 * (len(trace) + 1))
    assert "minutes" in str(cost)
    from headway.methods.diagnosis.thought_anchors import rollouts as module

    small, module.MANY_SENTENCES = module.MANY_SENTENCES, 2
    try:
        collect(trace, scripted, rollouts=2, max_tokens=50)
    finally:
        module.MANY_SENTENCES = small
    assert "rollouts of" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rollouts": 0}, "at least 1"),
        ({"sentences": [99]}, "0 to"),
        ({"kind": "forced"}, "forced"),
        ({"force": "now"}, "forced"),
    ],
)
def test_collections_that_cannot_be_are_refused(trace, options, words):
    with pytest.raises(ArgumentError, match=words):
        collect(trace, scripted, **({"rollouts": 2} | options))


def test_a_sampler_that_returns_too_little_is_refused(trace):
    with pytest.raises(ArgumentError, match="one text each"):
        collect(trace, lambda prefix, seeds: ["x"], rollouts=3)


@pytest.fixture(scope="module")
def small():
    return decoder(0).eval(), planted(draw_ids(1, np.random.default_rng(0))[0].tolist())


def test_a_rollout_does_not_depend_on_its_batch(small):
    model, made = small
    sampler = LocalSampler(model, Words(), max_tokens=12, temperature=1.0)
    prefix = made.trace.prefix(4)
    together = sampler(prefix, [1, 2, 3, 4])
    assert [sampler(prefix, [s])[0] for s in (1, 2, 3, 4)] == together
    assert len(set(together)) > 1


def test_stopped_rollouts_leave_the_batch_and_change_nothing(small):
    model, made = small
    free = LocalSampler(model, Words(), max_tokens=12, temperature=1.0)
    stops = LocalSampler(model, Words(), max_tokens=12, temperature=1.0, stop=tuple(range(60)))
    prefix = made.trace.prefix(4)
    for whole, cut in zip(free(prefix, [1, 2, 3]), stops(prefix, [1, 2, 3]), strict=True):
        assert whole.startswith(cut)


def test_text_alone_is_prefix_enough(small):
    model, made = small
    sampler = LocalSampler(model, Words(), max_tokens=4)
    prefix = made.trace.prefix(4)
    assert sampler(prefix, [3]) == sampler(Prefix((), prefix.text), [3])


def test_tokens_are_drawn_from_the_nucleus_in_proportion():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(3000, -1)
    generators = [torch.Generator().manual_seed(i) for i in range(3000)]
    found = torch.bincount(draw(logits, generators, temperature=1.0, top_p=0.75), minlength=4) / 3000
    np.testing.assert_allclose(found.numpy(), [0.625, 0.375, 0, 0], atol=0.03)


def test_a_temperature_of_zero_is_refused(small):
    with pytest.raises(ArgumentError, match="all rollouts are the same"):
        LocalSampler(small[0], Words(), temperature=0.0)
    with pytest.raises(ArgumentError, match="top_p"):
        LocalSampler(small[0], Words(), top_p=0.0)


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        (r"\boxed{3} or \boxed{4}", "3", "4"),
        ("The answer is 5. No, the answer is 6, of 7.", "5", "6"),
        ("2 and then 9", "2", "9"),
    ],
)
def test_which_of_several_answers_counts_is_a_choice(text, first, last):
    assert (answer_reader(which="first")(text), answer_reader()(text)) == (first, last)
    assert answer_reader(r"(\d)", "first")("a 1 b 2") == "1"
    assert answer_reader(r"(\d)", "first").__name__ == r"first (\d)"
    with pytest.raises(ArgumentError, match="which"):
        answer_reader(which="middle")


def test_rollouts_end_where_the_model_has_no_position_left(small, monkeypatch):
    from headway.methods.diagnosis.thought_anchors import sampling

    model, made = small
    prefix = made.trace.prefix(4)
    free = LocalSampler(model, Words(), max_tokens=12, temperature=1.0)(prefix, [1])[0]
    monkeypatch.setattr(sampling, "positions_of", lambda model: len(prefix.ids) + 4)
    cut = LocalSampler(model, Words(), max_tokens=12, temperature=1.0)(prefix, [1])[0]
    assert free.startswith(cut)
    assert len(cut.split()) == 5
    monkeypatch.setattr(sampling, "positions_of", lambda model: len(prefix.ids) - 1)
    with pytest.raises(ArgumentError, match="positions"):
        LocalSampler(model, Words(), max_tokens=12)(prefix, [1])


def test_the_last_position_of_a_learned_table_is_used_and_none_beyond():
    model = tiny_host("gpt2", n_positions=12)[0]
    prefix = Prefix(tuple(range(5, 13)), "")
    assert len(LocalSampler(model, Numbers(), max_tokens=20, stop=())(prefix, [0])[0].split()) == 5


class Numbers:
    """Tokens are their numbers."""

    eos_token_id = None

    def decode(self, ids, **options):
        return " ".join(map(str, ids))
