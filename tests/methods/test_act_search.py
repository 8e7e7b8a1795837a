"""The head search of ACT: its rule, its shortcut through a model, and what its users must be told."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL

import headway
from headway.door.blocks import block_forms, recorded_inputs, starting_at
from headway.errors import ArgumentError, ConflictError
from headway.methods.sinks.act import (
    ACT,
    join_searches,
    judge_heads,
    profits,
    search_heads,
    split_items,
    warn_if_same,
)
from headway.methods.sinks.act.scoring import ChoiceScore, HiddenSinks
from headway.methods.sinks.streaming_llm import StreamingLLM
from headway.tasks.answering import copy_cache
from headway.tasks.choice import make_questions, score_choices

LOW = {"tau": 0.05, "least_rows": 2}


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text, **options):
        return {"input_ids": [3 + ord(letter) % 80 for letter in text[:60] + text[-60:]]}


class Words:
    """A tokenizer of words."""

    def __call__(self, text, **options):
        return {"input_ids": [3 + sum(map(ord, word)) % 85 for word in text.split()]}


def scores_of(effects):
    """A score that knows what each head is worth for each task."""

    def score(stage):
        heads = () if stage is None else stage.heads
        tasks = next(iter(effects.values()))
        return {task: np.full(10, 0.5 + sum(effects[h][task] for h in heads)) for task in tasks}

    return score


def test_heads_that_profit_are_selected_best_first():
    effects = {
        (0, 0): {"a": 0.2, "b": 0.2},
        (0, 1): {"a": 0.3, "b": -0.1},
        (1, 0): {"a": 0.05, "b": -0.1},
        (1, 1): {"a": -0.2, "b": -0.2},
        (1, 2): {"a": 0.0, "b": 0.0},
    }
    found = search_heads(scores_of(effects), list(effects))
    assert found.selected == ((0, 0), (0, 1))
    assert found.ranking() == [(0, 0), (0, 1), (1, 2), (1, 0), (1, 1)]
    assert found.gains[0, 1] == pytest.approx({"a": 0.3, "b": -0.1})
    assert found.baseline == {"a": 0.5, "b": 0.5}
    assert search_heads(scores_of(effects), list(effects), top_k=1).selected == ((0, 0),)


def test_the_rule_wants_a_mean_gain_and_no_loss_on_half_of_the_tasks():
    assert profits({"a": 0.1, "b": -0.05})
    assert not profits({"a": 0.9, "b": -0.1, "c": -0.1})
    assert not profits({"a": 0.1, "b": -0.2})
    assert not profits({"a": 0.0})


def test_settings_reach_the_stage_that_is_scored():
    seen = []

    def score(stage):
        seen.append(stage)
        return {"a": np.zeros(2)}

    search_heads(score, [(2, 1)], beta=0.1, scope="causal", threshold="relative")
    assert seen[0] is None
    assert (seen[1].heads, seen[1].beta, seen[1].scope, seen[1].threshold) == (((2, 1),), 0.1, "causal", "relative")


def test_bad_searches_are_named():
    score = scores_of({(0, 0): {"a": 0.0}})
    with pytest.raises(ArgumentError, match="heads: got 0"):
        search_heads(score, [])
    with pytest.raises(ArgumentError, match="heads: got 2 with 1"):
        search_heads(score, [(0, 0), (0, 0)])
    with pytest.raises(ArgumentError, match="top_k: got 0"):
        search_heads(score, [(0, 0)], top_k=0)
    with pytest.raises(ArgumentError, match=r"top_k: got 1\.5, expected a whole number"):
        search_heads(score, [(0, 0)], top_k=1.5)
    with pytest.raises(ArgumentError, match="at least one with items"):
        search_heads(lambda stage: {}, [(0, 0)])


def test_the_two_parts_are_disjoint_and_cover_everything():
    search, held = split_items(11, share=0.4)
    assert sorted(search + held) == list(range(11))
    assert len(search) == 4
    assert split_items(11, share=0.4) == (search, held)
    with pytest.raises(ArgumentError, match="count, share: got 1"):
        split_items(1)
    with pytest.raises(ArgumentError, match="share"):
        split_items(4, share=1.0)


def test_judging_on_what_was_searched_on_is_warned_of(caplog):
    with caplog.at_level(logging.WARNING):
        assert warn_if_same([1, 2], [3, 4]) == 0
        assert not caplog.text
        assert warn_if_same([1, 2], [2, 3]) == 1
    assert "held-out part" in caplog.text


def test_a_report_on_questions_of_the_search_is_warned_of(caplog):
    """The one whose items overlap warns with their number; the gain is that of the selected heads together."""
    effects = {(0, 0): {"a": 0.2}, (0, 1): {"a": 0.1}, (1, 0): {"a": -0.3}}

    class Items:
        def __init__(self, items):
            self.items = items
            self.run = scores_of(effects)

        def __call__(self, stage):
            return self.run(stage)

    found = search_heads(Items(("q1", "q2", "q3")), list(effects))
    assert found.items == ("q1", "q2", "q3")
    with caplog.at_level(logging.WARNING):
        assert judge_heads(found, Items(("q4", "q5"))) == pytest.approx({"a": 0.3})
        assert not caplog.text
        assert judge_heads(found, Items(("q2", "q3", "q4"))) == pytest.approx({"a": 0.3})
    assert "2 evaluation items were used in the head search" in caplog.text
    with pytest.raises(ArgumentError, match="selected no head"):
        judge_heads(search_heads(Items(()), [(1, 0)]), Items(("q4",)))


def test_a_score_of_questions_tells_them_so_that_the_same_ones_are_noticed(caplog):
    model, questions = CAUSAL["llama"](), make_questions("place", 4)
    score = ChoiceScore(model, Words(), questions[:2])
    found = search_heads(score, [(0, 1), (1, 2), (2, 0)], beta=0.0, **LOW)
    assert found.items == tuple(questions[:2])
    found = replace(found, selected=((1, 2),))
    with caplog.at_level(logging.WARNING):
        apart = judge_heads(found, ChoiceScore(model, Words(), questions[2:]), beta=0.0, **LOW)
        assert not caplog.text
        same = judge_heads(found, score, beta=0.0, **LOW)
    assert "2 evaluation items" in caplog.text
    assert same == pytest.approx(found.gains[1, 2], abs=1e-6)
    assert apart != same


def test_searches_over_parts_of_the_heads_join_to_the_whole_search():
    effects = {(0, 0): {"a": 0.2, "b": 0.2}, (0, 1): {"a": 0.3, "b": -0.1}, (1, 0): {"a": -0.2, "b": -0.2}}
    score = scores_of(effects)
    parts = [search_heads(score, [head]) for head in ((0, 1), (1, 0), (0, 0))]
    whole = search_heads(score, list(effects))
    assert join_searches(parts) == whole
    assert join_searches(parts, top_k=1).selected == ((0, 0),)
    with pytest.raises(ArgumentError, match="parts: got 2 heads with 1"):
        join_searches([parts[0], parts[0]])
    with pytest.raises(ArgumentError, match="parts: got 0"):
        join_searches([])
    other = replace(parts[1], baseline={"a": 0.4, "b": 0.5})
    with pytest.raises(ArgumentError, match="baselines"):
        join_searches([parts[0], other])


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2 soft cap"])
def test_a_host_run_from_the_middle_on_gives_the_same(name):
    model, ids = CAUSAL[name](), contract.tokens(2, 14)
    with torch.no_grad(), recorded_inputs(model) as inputs:
        want = model(input_ids=ids, use_cache=False).logits
    assert len(inputs) == 4
    ran = []
    hooks = [m.register_forward_hook(lambda m, a, o, n=n: ran.append(n)) for n, m in model.named_modules()]
    forms = block_forms(model)
    for layer in range(3):
        ran.clear()
        with torch.no_grad(), starting_at(model, layer, inputs[layer], forms=forms):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
        assert sum(n.endswith((".mlp", "mlp.down_proj")) for n in ran) <= 2 * (3 - layer)
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
    with pytest.raises(ArgumentError, match="layer: got 3"), starting_at(model, 3, inputs[0]):
        pass


def test_trials_through_the_shortcut_score_as_whole_runs_do():
    model, questions = CAUSAL["llama"](), make_questions("place", 6)
    score = ChoiceScore(model, Words(), questions)
    dense = score.choices(None)
    assert all(np.array_equal(a, b) for a, b in zip(dense.scores, score.choices(None).scores, strict=True))
    changed = 0
    for head in [(0, 1), (1, 2), (2, 3)]:
        act = ACT(heads=[head], **LOW)
        short = score.choices(act)
        with headway.use(model, act):
            whole = score_choices(model, Words(), questions)
        for a, b, c in zip(short.scores, whole.scores, dense.scores, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
            changed += not np.allclose(a, c, atol=1e-4)
    assert changed > 5
    assert set(score(None)) == {"place"}
    correct = ChoiceScore(model, Words(), questions, measure="correct")(None)["place"]
    assert set(correct.tolist()) <= {0.0, 1.0}


def test_a_search_on_questions_selects_heads_of_the_model():
    model = CAUSAL["llama"]()
    score = ChoiceScore(model, Words(), make_questions("place", 6))
    found = search_heads(score, [(0, 1), (1, 2)], beta=0.0, **LOW)
    assert set(found.selected) <= {(0, 1), (1, 2)}
    assert all(abs(g) > 1e-6 for gains in found.gains.values() for g in gains.values())


def test_later_sinks_are_counted_for_every_head_and_sequence():
    model, ids = CAUSAL["llama"](), contract.tokens(2, 30)
    ids, mask = contract.padded_left(ids, [0, 6])
    options = {"tau": 0.08, "least_rows": 3}
    counter = HiddenSinks(**options)
    with torch.no_grad(), headway.observe(model, counter):
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    both = counter.result()
    with torch.no_grad(), headway.observe(model, counter):
        model(input_ids=ids[1:, 6:])
    alone = counter.result()
    assert len(both) == 12
    assert sum(n for values in both.values() for n, _ in values) > 0
    for head, values in both.items():
        assert values[1][0] == alone[head][0][0]
        assert values[1][1] == pytest.approx(alone[head][0][1], abs=1e-5)
        assert 0 <= values[0][1] <= 1


def test_a_copy_of_a_request_goes_on_by_itself():
    model, ids = CAUSAL["llama"](), contract.tokens(1, 20)
    with headway.use(model, ACT(heads=[(0, 1), (1, 2)], scope="causal", **LOW)), torch.no_grad():
        cache = model(input_ids=ids[:, :16], use_cache=True).past_key_values
        other = copy_cache(cache, model)
        for i in range(16, 19):
            model(input_ids=ids[:, i : i + 1], past_key_values=other)
        got = [model(input_ids=ids[:, i : i + 1], past_key_values=cache).logits for i in range(16, 20)]
        want = model(input_ids=ids).logits[:, 16:]
        last = model(input_ids=ids[:, 19:], past_key_values=other).logits
    torch.testing.assert_close(torch.cat(got, 1), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(last, want[:, -1:], atol=1e-4, rtol=0)


@pytest.mark.real
def test_on_the_real_model_later_sinks_lose_attention():
    model, tokenizer = headway.load("smollm2")
    questions = make_questions("place", 2)
    score = ChoiceScore(model, tokenizer, questions)
    counter = HiddenSinks()
    with headway.observe(model, counter):
        dense = score.choices(None)
    mass = {head: np.mean([share for _, share in values]) for head, values in counter.result().items()}
    most = max((head for head in mass if 2 <= head[0] < 29), key=mass.__getitem__)
    assert mass[most] > 0.05
    changed = score.choices(ACT(heads=[most], beta=0.0))
    assert not np.allclose(changed.scores[0], dense.scores[0], atol=1e-4)


def test_sinks_are_not_counted_where_act_moves_them_or_a_policy_drops_keys():
    """The weights that q and k say would not be those that act."""
    model = CAUSAL["llama"]()
    for stage in (ACT(heads=[(0, 1)]), StreamingLLM(sinks=2, window=5)):
        with headway.use(model, stage), pytest.raises(ConflictError, match="HiddenSinks"):
            headway.observe(model, HiddenSinks()).attach()
