"""Prompts in conflict and localisation from end to end: matched lengths, spans by offsets, kept pieces, margins."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tests.methods.roles_words import words_model, words_tokenizer

from headway.errors import ArgumentError
from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis import diagnose_localize_align as dla
from headway.methods.diagnosis.diagnose_localize_align.pairs import FACTS, encode, matched_pair, render
from headway.parts import Parts


@pytest.fixture(scope="module")
def tokenizer():
    return words_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return words_model(tokenizer)


@pytest.fixture(scope="module")
def items(tokenizer):
    return dla.conflict_items(tokenizer, count=2)


def test_there_are_seven_kinds_in_both_relations(items):
    assert len(dla.KINDS) == 7
    assert len(items) == 2 * 7 * 2
    assert {(item.kind, item.relation) for item in items} == {(k, r) for k in dla.KINDS for r in dla.RELATIONS}


def test_both_prompts_have_one_length_and_differ_in_the_clause_alone(items):
    for item in items:
        for pair in (item.pair, item.control):
            assert pair.neutral.numel() == pair.conflict.numel()
            changed = (pair.neutral != pair.conflict).nonzero()[:, 0]
            start, stop = pair.spans["other"][1]
            assert changed.numel() > 0
            assert int(changed.min()) >= start
            assert int(changed.max()) < stop
            system = pair.spans["system"][0]
            assert system[1] <= start


def test_the_control_has_the_clauses_of_its_pair_and_another_rule(items, tokenizer):
    for item in items:
        start, stop = item.pair.spans["other"][1]
        first, last = item.control.spans["other"][1]
        assert torch.equal(item.pair.conflict[start:stop], item.control.conflict[first:last])
        rules = [tokenizer.decode(pair.neutral[slice(*pair.spans["system"][0])]) for pair in (item.pair, item.control)]
        assert rules[0] != rules[1]


def test_rules_turn_around_from_item_to_item(tokenizer):
    even, odd = (
        dla.conflict_items(tokenizer, kinds=["language"], relations=["system-user"], first=n)[0] for n in (0, 1)
    )
    assert "always reply in English" in even.texts[1]
    assert "reply in French" in even.texts[1]
    assert "always reply in French" in odd.texts[1]
    assert "always reply in English" not in odd.texts[1]


def test_no_item_is_repeated_before_all_have_come(tokenizer):
    items = dla.conflict_items(tokenizer, kinds=["case", "secrecy"], relations=["peer-peer"], count=12)
    assert len({item.texts for item in items}) == 24
    assert items[12].rules.constraints == ("!7351",)
    assert items[14].rules.constraints == ("!7468",)


@pytest.mark.parametrize("kind", list(dla.KINDS))
def test_the_rule_judge_tells_the_two_answers_of_each_kind_apart(kind):
    known = dla.KINDS[kind]
    for fact in FACTS:
        for number, check in enumerate(known.checks):
            rules = dla.Rules(constraints=(check,))
            marks = [
                dla.RuleJudge()
                .judge(
                    dla.Turn(conversation="", index=0, role="assistant", reply=answer(fact), rules=rules),
                    dla.shipped_rubrics()["general"],
                )
                .scores["CC"]
                for answer in known.answers
            ]
            assert marks[number] == 5, (kind, fact.word)
            assert marks[1 - number] == 1, (kind, fact.word)


def test_parts_are_found_by_offsets_also_across_tokens():
    tokenizer = words_tokenizer()
    ids, spans = dla.locate(tokenizer, "You must always reply in French .", {"system": "ways rep"})
    assert tokenizer.decode(ids[slice(*spans["system"])]) == "always reply"


@pytest.mark.parametrize(
    ("part", "words"), [("missing words", "reads 'You must"), ("", "is not in"), ("   ", "is not in")]
)
def test_a_part_that_is_not_there_names_the_text(tokenizer, part, words):
    with pytest.raises(ArgumentError, match=words):
        dla.locate(tokenizer, "You must always reply .", {"system": part})


def test_a_part_without_tokens_and_a_slow_tokenizer_are_refused(tokenizer):
    with pytest.raises(ArgumentError, match="no token"):
        dla.locate(tokenizer, "You  must", {"system": "  "})
    with pytest.raises(ArgumentError, match="fast tokenizer"):
        dla.locate(object(), "x", {"system": "x"})


def test_a_template_that_drops_the_rule_is_told():
    dropping = words_tokenizer(
        "{% for m in messages %}{% if m.role != 'system' %}{{ m.content }} {% endif %}{% endfor %}"
    )
    with pytest.raises(ArgumentError, match="chat template"):
        dla.conflict_items(dropping, kinds=["case"], relations=["system-user"])


def test_without_a_template_prompts_are_plain_lines():
    assert render(words_tokenizer(None), [{"role": "user", "content": "x"}]) == "User: x\nAssistant:"
    assert dla.conflict_items(words_tokenizer(None), kinds=["case"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kinds": ["languag"]}, "language"),
        ({"relations": ["user-user"]}, "peer-peer"),
        ({"count": 0}, "count"),
        ({"count": 6, "first": 7}, "at most 12"),
        ({"first": -1}, "first"),
        ({"response_rows": 99}, "response_rows"),
    ],
)
def test_what_cannot_be_asked_is_refused(tokenizer, options, words):
    with pytest.raises(ArgumentError, match=words):
        dla.conflict_items(tokenizer, **options)


def test_clauses_that_never_meet_name_both_lengths(tokenizer, monkeypatch):
    from headway.methods.diagnosis.diagnose_localize_align import pairs

    monkeypatch.setattr(pairs, "CLAUSES", ("Please {}.",))
    monkeypatch.setitem(
        pairs.KINDS, "uneven", pairs.Kind("uneven", ("reply", "reply in French"), (str, str), ("a", "b"))
    )
    with pytest.raises(ArgumentError, match=r"give \d+ and \d+ tokens.*kinds="):
        pairs.conflict_items(tokenizer, kinds=["uneven"])


def test_a_pair_of_own_prompts_can_be_made(tokenizer):
    made = matched_pair(
        tokenizer, "You must reply . Please reply", "You must reply . Please write", encode(tokenizer, "Thank you"),
        system=("You must reply .",) * 2, other=("Please reply", "Please write"), kind="own",
    )  # fmt: skip
    assert made.rows == (-3, -2, -1)
    assert made.spans["other"] == ((4, 6), (4, 6))
    assert made.kind == "own"


def test_the_margin_is_the_difference_of_mean_log_probabilities(model, items):
    item = items[3]
    scores = []
    for answer in (item.obeys_rule, item.obeys_clause):
        ids = torch.cat([item.conflict, answer])[None]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, item.conflict.numel() - 1 : -1].log_softmax(-1)
        scores.append(float(logits.gather(-1, answer[:, None]).mean()))
    (found,) = dla.margins(model, [item])
    assert found == pytest.approx(scores[0] - scores[1], abs=1e-5)
    assert dla.margins(model, [item], "neutral")[0] != found
    with pytest.raises(ArgumentError, match="condition"):
        dla.margins(model, [item], "agreement")
    with pytest.raises(ArgumentError, match="without a token"):
        dla.answer_margin(model, item.conflict, item.obeys_rule[:0], item.obeys_clause)


def test_margins_and_replies_of_a_model_that_is_being_trained_are_the_same(tokenizer, items):
    host = tiny_host(
        "gpt2", num_hidden_layers=2, vocab_size=len(tokenizer), n_positions=512, resid_pdrop=0.5, embd_pdrop=0.5
    )[0]
    still = dla.margins(host, items[:2]), dla.replies(host, tokenizer, items[:1], new_tokens=6)
    host.train()
    assert (dla.margins(host, items[:2]), dla.replies(host, tokenizer, items[:1], new_tokens=6)) == still
    assert host.training


def test_a_window_wider_than_the_model_is_refused_before_heads_are_silenced(model, items, held):
    told = []
    with pytest.raises(ArgumentError, match=r"window: got 9, expected 1\.\.3 layers"):
        dla.localize(model, items[:1], held[:1], window=9, tell=lambda what, done, total: told.append(what))
    assert told == ["reading pairs"]


def test_replies_are_turns_that_judges_can_mark(model, tokenizer, items):
    found = dla.replies(model, tokenizer, items[:2], new_tokens=3)
    assert [(turn.conversation, turn.condition) for turn in found] == [
        (item.name, condition) for item in items[:2] for condition in ("neutral", "conflict")
    ]
    assert all(turn.reply for turn in found)
    assert found[0].rules == items[0].rules
    assert not any("<end>" in turn.reply for turn in found)


@pytest.fixture(scope="module")
def held(tokenizer):
    return dla.conflict_items(tokenizer, kinds=["case", "format"], first=2)


def test_localisation_has_every_part(model, items, held):
    found = dla.localize(model, items[:6], held, share=0.2, draws=2)
    assert found.scores.shape == found.control.shape == (3, 4)
    assert set(found.relations) == {"system-user"}
    assert len(found.focal) == 2
    assert set(found.focal_layers) <= {layer for layer, _ in found.focal}
    assert {(row["kind"], row["relation"]) for row in found.kinds} == {(i.kind, i.relation) for i in held}
    assert len(found.neutral) == len(found.conflict) == len(found.held_names) == len(held)
    assert len(found.gates.by_control) == 2
    assert found.specific.n == len(held)
    direct = dla.attention_drift(model, [item.pair for item in items[:6]])
    np.testing.assert_array_equal(found.scores, direct.scores())


def test_weights_of_pairs_change_the_scores(model, items, held):
    one = dla.localize(model, items[:3], held[:1], weights=[0, 0, 1], share=0.2, draws=1)
    alone = dla.localize(model, items[2:3], held[:1], share=0.2, draws=1)
    np.testing.assert_array_equal(one.scores, alone.scores)


def test_an_interrupted_localisation_goes_on_and_ends_the_same(model, items, held, tmp_path):
    whole = dla.localize(model, items[:3], held, share=0.2, draws=2)

    def stop(what, done, total):
        if what.startswith("silencing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dla.localize(model, items[:3], held, share=0.2, draws=2, kept=Parts(tmp_path), name="m", tell=stop)
    kept = Parts(tmp_path)
    again = dla.localize(model, items[:3], held, share=0.2, draws=2, kept=kept, name="m")
    assert kept.reused >= 2 * 3 + 2 * len(held) * 2 + 1
    assert again.scores.tolist() == whole.scores.tolist()
    assert again.gates == whole.gates
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    dla.localize(model, items[:3], held, share=0.2, draws=2, kept=Parts(tmp_path), name="m")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
