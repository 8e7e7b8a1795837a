"""InfiniRetri without a model: sentences, scores, the loop over any source of attention."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError
from headway.methods.long_context.infiniretri import (
    Frame,
    Scan,
    Sentence,
    Settings,
    fill,
    frame_of,
    pack,
    phrase_smooth,
    question_weights,
    rank_sentences,
    sentences_of_ids,
    sentences_of_text,
    split_text,
    token_scores,
    top_tokens,
)
from headway.methods.long_context.infiniretri.sentences import token_texts

WILD = st.text(alphabet="ab .?!。\n\t,é1", max_size=120)


class Letters:
    """A tokenizer with a token for every character; `decode` loses the case."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [ord(character) for character in text]}

    def decode(self, ids, **_):
        return "".join(chr(i) for i in ids).lower()


class Bytes(Letters):
    """A token for every byte of UTF-8."""

    def __call__(self, text, **_):
        return {"input_ids": list(text.encode())}

    def decode(self, ids, **_):
        return bytes(ids).decode("utf-8", "replace")


def sentence(index: int, tokens: int, first: int) -> Sentence:
    return Sentence(
        index=index, ids=tuple(range(100 + first, 100 + first + tokens)), text=f"s{index}.", start=0, stop=0,
        first_token=first,
    )  # fmt: skip


def row_of(lengths) -> list[Sentence]:
    firsts = [sum(lengths[:i]) for i in range(len(lengths))]
    return [sentence(i, n, first) for i, (n, first) in enumerate(zip(lengths, firsts, strict=True))]


FRAME = Frame(before=(1, 2), after=(3, 4, 5), first=0, last=2)


def attends_to(*wanted: int, weight: float = 1.0, noise: float = 0.0):
    """A source of attention that puts its mass on given token ids."""

    def attend(ids, first, last):
        generator = torch.Generator().manual_seed(len(ids))
        rows = noise * torch.rand(last - first, len(ids), generator=generator)
        for number, token in enumerate(ids):
            rows[:, number] += weight * (token in wanted)
        rows[:, first:last] += weight
        return rows

    return attend


def scan(attend, budget=30, **changes) -> Scan:
    chosen = {"window": 20, "topk": 3, "phrase": 1} | changes
    return Scan(settings=Settings(**chosen), frame=FRAME, attend=attend, budget=budget)


@settings(deadline=None, max_examples=200)
@given(WILD, st.lists(st.integers(0, 120), max_size=4))
def test_sentences_are_the_text_and_do_not_depend_on_the_parts_it_comes_in(text, cuts):
    whole = list(split_text(text, 40))
    assert "".join(whole) == text
    edges = sorted({0, *(min(cut, len(text)) for cut in cuts), len(text)})
    parts = [text[a:b] for a, b in itertools.pairwise(edges)]
    assert list(split_text(iter(parts), 40)) == whole
    assert all(len(piece) <= 40 for piece in whole)


@settings(deadline=None, max_examples=200)
@given(WILD, st.integers(4, 30), st.integers(0, 20), st.sampled_from([Letters(), Bytes()]))
def test_chunks_lose_nothing_and_fit(text, longest, more, tokenizer):
    found = list(sentences_of_text(text, tokenizer, longest))
    assert "".join(s.text for s in found) == text
    assert [s.index for s in found] == list(range(len(found)))
    assert all(text[s.start : s.stop] == s.text and s.tokens <= longest for s in found)
    chunks = list(pack(found, longest + more))
    assert [s for chunk in chunks for s in chunk] == found
    assert all(sum(s.tokens for s in chunk) <= longest + more for chunk in chunks)
    for one, two in itertools.pairwise(chunks):
        assert sum(s.tokens for s in one) + two[0].tokens > longest + more


@settings(deadline=None, max_examples=100)
@given(WILD, st.integers(1, 30), st.sampled_from([None, Bytes()]))
def test_sentences_of_tokens_keep_every_token_in_order(text, longest, tokenizer):
    ids = list(text.encode())
    found = list(sentences_of_ids(ids, tokenizer, longest))
    assert [i for s in found for i in s.ids] == ids
    assert all(s.tokens <= longest and ids[s.first_token : s.first_token + s.tokens] == list(s.ids) for s in found)


def test_sentences_end_where_readers_end_them():
    text = "One is here. Two is 3.5 m long! Is it? 一句話。另一句話！ Last\n\nTitle\n\nMore text follows"
    assert list(split_text(text)) == [
        "One is here.",
        " Two is 3.5 m long!",
        " Is it?",
        " 一句話。",
        "另一句話！",
        " Last\n\n",
        "Title\n\n",
        "More text follows",
    ]


def test_initials_and_stray_marks_join_the_sentence_before():
    assert list(split_text("We met J. R. Ewing. ... \n\n Then we left the house.")) == [
        "We met J. R. Ewing. ... \n\n",
        " Then we left the house.",
    ]


def test_text_without_any_separator_is_cut_at_white_space_or_anywhere():
    words = list(sentences_of_text("word " * 200, Letters(), 32))
    assert all(s.tokens <= 32 and not s.text.endswith("wor") for s in words)
    assert {s.text.strip().split()[0] for s in words} == {"word"}
    solid = list(sentences_of_text("x" * 1000, Letters(), 32))
    assert all(16 <= s.tokens <= 32 for s in solid)


def test_a_long_sentence_is_halved_so_that_no_part_is_a_scrap():
    found = list(sentences_of_text("a b, c d " * 30, Letters(), 100))
    assert min(s.tokens for s in found) >= 50


def test_a_stream_holds_one_sentence_not_the_text():
    """A text without end is read as far as it is asked for."""

    def endless():
        while True:
            yield "A sentence of some words. "

    stream = sentences_of_text(endless(), Letters(), 50)
    first = [next(stream) for _ in range(500)]
    assert first[-1].index == 499
    solid = sentences_of_text(("x" * 7 for _ in iter(int, 1)), Letters(), 50)
    assert sum(next(solid).tokens for _ in range(100)) > 2000


def test_a_character_larger_than_a_sentence_may_be_is_refused():
    with pytest.raises(ArgumentError, match=r"character '€' takes 3"):
        list(sentences_of_text("€", Bytes(), 2))


def test_a_sentence_larger_than_the_window_is_refused_by_pack():
    with pytest.raises(ArgumentError, match="window: got 4 tokens for a sentence of 5"):
        list(pack(row_of([5]), 4))


def test_tokens_that_share_a_character_stay_together():
    ids = list("a。b".encode())
    assert token_texts(Bytes(), ids) == ["a", "。", "", "", "b"]
    assert [s.tokens for s in sentences_of_ids(ids, Bytes(), 10)] == [4, 1]


def test_white_space_that_a_tokenizer_drops_before_a_first_word_still_ends_sentences():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁One", "▁two", ".", "▁Three", "!", "▁a"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
    core.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")
    assert tokenizer.decode([1]) == "One"
    ids = [1, 2, 3, 4, 4, 4, 5]
    assert token_texts(tokenizer, ids) == [" One", " two", ".", " Three", " Three", " Three", "!"]
    assert [s.ids for s in sentences_of_ids(ids, tokenizer, 10)] == [(1, 2, 3), (4, 4, 4, 5)]


def test_ids_are_kept_though_the_tokenizer_does_not_give_the_text_back():
    text = "Upper Case. MORE of It."
    found = list(sentences_of_text(text, Letters(), 100))
    assert "".join(s.text for s in found) == text
    assert found[0].ids == tuple(map(ord, "Upper Case."))


@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
def test_smoothing_is_the_sum_over_a_window(width):
    scores = torch.rand(3, 20, dtype=torch.float64)
    before = (width - 1) // 2
    padded = torch.nn.functional.pad(scores, (before, width - 1 - before))
    wanted = torch.stack([padded[:, i : i + width].sum(-1) for i in range(20)], -1)
    torch.testing.assert_close(phrase_smooth(scores, width, centred=False), wanted)


@pytest.mark.parametrize("width", [1, 2, 3, 4, 8, 16])
def test_a_centred_window_is_symmetric_and_keeps_the_mass(width):
    scores = torch.zeros(41)
    scores[20] = 1.0
    smooth = phrase_smooth(scores, width)
    torch.testing.assert_close(smooth, smooth.flip(0))
    assert float(smooth.sum()) == pytest.approx(width)


def test_the_published_even_window_reaches_half_a_token_aside():
    scores = torch.zeros(41)
    scores[20] = 1.0
    shifted = phrase_smooth(scores, 8, centred=False)
    centre = float((shifted * torch.arange(41)).sum() / shifted.sum())
    assert abs(centre - 20) == 0.5


def test_a_window_wider_than_the_text_sums_all_of_it():
    scores = torch.rand(4)
    torch.testing.assert_close(phrase_smooth(scores, 9), scores.sum().expand(4))


def test_width_one_and_equal_weights_are_plain_column_sums():
    attention = torch.rand(5, 12)
    for scores in (
        token_scores(attention, torch.ones(5), phrase=1),
        token_scores(attention, None, phrase=1),
        token_scores(attention, torch.rand(5), phrase=1, power=0),
    ):
        torch.testing.assert_close(scores, attention.sum(0))


def test_token_scores_are_the_equation():
    attention, question = torch.rand(4, 30), torch.rand(4, 4)
    weights = question_weights(question)
    smooth = phrase_smooth(attention, 8)
    wanted = torch.stack([weights[i] ** 2 * smooth[i] for i in range(4)]).sum(0)
    torch.testing.assert_close(token_scores(attention, weights), wanted)


def test_weights_of_another_question_are_refused():
    with pytest.raises(ArgumentError, match="weights: got"):
        token_scores(torch.rand(4, 9), torch.rand(3))


def test_ties_go_to_the_earlier_token():
    assert top_tokens(torch.tensor([1.0, 2.0, 2.0, 1.0]), 3).tolist() == [1, 2, 0]
    ranked, _, places = rank_sentences(torch.zeros(6), [2, 2, 2])
    assert (ranked, places) == ([0, 1, 2], [0, 2, 4])


def test_kept_sentences_hold_the_best_tokens():
    scores = torch.tensor([0.0, 5.0, 1.0, 0.0, 0.0, 9.0])
    ranked, best, places = rank_sentences(scores, [2, 2, 2], 2)
    assert (ranked, best, places) == ([2, 0], [5.0, 1.0, 9.0], [1, 2, 5])
    assert fill(ranked, [2, 2, 2], 4) == [0, 2]
    assert fill(ranked, [2, 2, 2], 3) == [2]


def test_a_sentence_that_does_not_fit_gives_way_to_a_smaller_one():
    assert fill([1, 0, 2], [3, 5, 2], 6) == [1]
    assert fill([0, 1, 2], [3, 5, 2], 6) == [0, 2]


@pytest.mark.parametrize("lengths", [[2, 3], [2, 0, 4], []])
def test_sentences_must_fill_the_scores(lengths):
    with pytest.raises(ArgumentError, match="lengths: got"):
        rank_sentences(torch.rand(6), lengths)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=25), st.data())
def test_a_token_with_the_mass_keeps_its_sentence_whatever_the_chunking(lengths, data):
    source = row_of(lengths)
    target = data.draw(st.integers(0, sum(lengths) - 1))
    window = data.draw(st.integers(9, 40))
    phrase = data.draw(st.sampled_from([1, 3]))
    found = scan(attends_to(100 + target), window=window, phrase=phrase, topk=phrase).run(source)
    assert any(100 + target in item.sentence.ids for item in found.kept)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=25),
    st.integers(9, 40),
    st.integers(1, 12),
    st.sampled_from(["replace", "accumulate"]),
)
def test_kept_is_an_ordered_part_of_the_source_within_the_budget(lengths, window, topk, keep):
    source = row_of(lengths)
    found = scan(attends_to(noise=1.0), window=window, topk=topk, keep=keep, budget=25).run(source)
    numbers = [item.sentence.index for item in found.kept]
    assert numbers == sorted(set(numbers))
    assert all(item.sentence == source[item.sentence.index] for item in found.kept)
    assert found.kept_tokens <= 25
    if keep == "replace":
        assert len(numbers) <= topk
    assert found.tokens == sum(lengths)
    assert len(found.passes) == len(list(pack(source, window)))
    assert all(record.tokens <= FRAME.tokens + window + 25 for record in found.passes)
    assert list(found.prompt_ids[2:-3]) == [i for item in found.kept for i in item.sentence.ids]


def test_a_short_text_is_one_pass_and_with_enough_tokens_the_ordinary_prompt():
    source = row_of([4, 5, 3])
    found = scan(attends_to(noise=1.0), topk=12).run(source)
    assert len(found.passes) == 1
    assert found.prompt_ids == (1, 2, *range(100, 112), 3, 4, 5)


def test_scaling_attention_changes_nothing():
    source = row_of([3, 4, 5, 6, 2, 7, 3] * 3)
    kept = [
        [item.sentence.index for item in scan(attends_to(105, weight=w, noise=w), phrase=8).run(source).kept]
        for w in (1.0, 64.0)
    ]
    assert kept[0] == kept[1]


def test_every_kept_sentence_knows_where_it_came_from():
    source = row_of([5] * 12)
    found = scan(attends_to(107, 141), window=20).run(source)
    places = {item.sentence.index: (item.chunk, item.passes, item.token) for item in found.kept}
    assert places[1] == (0, 3, 7)
    assert places[8] == (2, 1, 41)
    first = found.passes[0]
    assert (first.tokens, first.new_tokens, first.kept_tokens, first.left) == (25, 20, 0, 0)
    assert found.passes[1].kept_tokens == 5 * first.entered
    assert found.read == sum(record.tokens for record in found.passes)
    assert found.density == found.kept_tokens / 60


def fading(ids, first, last):
    """Token 107 is what is asked for while nothing louder stands in the same pass."""
    rows = torch.zeros(last - first, len(ids))
    loud = {107: 1.0, 125: 5.0, 126: 5.0, 127: 5.0}
    for number, token in enumerate(ids):
        rows[:, number] = loud.get(token, 0.0)
    rows[:, first:last] = 1.0
    return rows


def test_replacing_forgets_what_a_louder_pass_does_not_choose_and_accumulating_does_not():
    source = row_of([5] * 8)
    replaced = scan(fading, window=20).run(source)
    assert [item.sentence.index for item in replaced.kept] == [5]
    accumulated = scan(fading, window=20, keep="accumulate").run(source)
    assert {1, 5} <= {item.sentence.index for item in accumulated.kept}


def test_accumulating_drops_the_weakest_share_when_it_is_full():
    source = row_of([5] * 8)
    found = scan(fading, window=20, keep="accumulate", budget=10).run(source)
    assert [item.sentence.index for item in found.kept] == [1, 5]


def test_too_much_is_trimmed_or_refused():
    source = row_of([9, 9, 2])
    attend = attends_to(101, 110, 119, noise=0.0)
    assert scan(attend, budget=12).run(source).kept_tokens <= 12
    with pytest.raises(ArgumentError, match=r"topk: got sentences of 20 tokens .* expected at most 12"):
        scan(attend, budget=12, overflow="raise").run(source)


def test_weights_are_frozen_on_the_first_pass_unless_refreshed():
    def attend(ids, first, last):
        rows = torch.zeros(last - first, len(ids))
        late = max(ids[2:-3]) >= 120
        # The first row asks for 101 and 121, the second for 106 and 126; which of them counts turns with the pass.
        for number, token in enumerate(ids[:-3]):
            rows[0, number] = token in (101, 121)
            rows[1, number] = token in (106, 126)
        rows[0, first] = 0.0 if late else 1.0
        rows[1, first] = 1.0 if late else 0.0
        return rows

    source = row_of([5] * 8)
    kept = {
        refresh: [item.sentence.index for item in scan(attend, topk=1, refresh=refresh).run(source).kept]
        for refresh in (False, True)
    }
    assert kept == {False: [0], True: [5]}


def test_the_plain_sum_of_the_paper_ignores_the_weights():
    def attend(ids, first, last):
        rows = torch.zeros(last - first, len(ids))
        for number, token in enumerate(ids[:-3]):
            rows[0, number] = 2.0 * (token == 101)
            rows[1, number] = 3.0 * (token == 106)
        rows[0, first], rows[1, first] = 1.0, 0.1
        return rows

    source = row_of([5] * 4)
    kept = {
        weighting: scan(attend, topk=1, weighting=weighting).run(source).kept[0].sentence.index
        for weighting in ("squared", "linear", "sum")
    }
    assert kept == {"squared": 0, "linear": 0, "sum": 1}


@pytest.mark.parametrize(("cue", "rows"), [(True, 3), (False, 2)])
def test_the_answer_cue_asks_too_unless_told_otherwise(cue, rows):
    asked = []

    def attend(ids, first, last):
        asked.append((first, last))
        return torch.ones(last - first, len(ids))

    scan(attend, cue=cue).run(row_of([4, 4]))
    assert asked == [(10, 10 + rows)]


def test_a_pass_beyond_the_limit_is_refused():
    short = dataclasses.replace(scan(attends_to(100)), limit=20)
    with pytest.raises(ArgumentError, match="window: got a pass of 25 tokens for 20 positions"):
        short.run(row_of([5] * 8))


def test_rows_of_a_wrong_shape_are_refused():
    with pytest.raises(ArgumentError, match="attend: got"):
        scan(lambda ids, first, last: torch.ones(1, 2)).run(row_of([4]))


def test_a_scan_goes_on_from_its_stored_state():
    source = row_of([5] * 20)
    chunks = list(pack(source, 20))
    whole = scan(attends_to(107, noise=0.5), keep="accumulate").run(source)
    first, second = (
        scan(attends_to(107, noise=0.5), keep="accumulate"),
        scan(attends_to(107, noise=0.5), keep="accumulate"),
    )
    for chunk in chunks[:2]:
        first.step(chunk)
    second.restore(json.loads(json.dumps(first.state())))
    for chunk in chunks[2:]:
        second.step(chunk)
    assert second.result() == whole


def test_frames_know_their_question_by_construction():
    frame = frame_of(Letters(), "who?", "Read. {context}\n\nQ: {question} A:")
    assert "".join(map(chr, frame.before)) == "Read. "
    assert "".join(map(chr, frame.after)) == "\n\nQ: who? A:"
    assert "".join(map(chr, frame.after[frame.first : frame.last])) == " who?"


def test_a_question_before_the_context_leaves_the_cue_to_ask():
    frame = frame_of(Letters(), "who?", "{question} {context} A:")
    assert "".join(map(chr, frame.after[frame.first : frame.last])) == " A:"
    with pytest.raises(ArgumentError, match="question: got tokens 0 to 0"):
        frame_of(Letters(), "who?", "{question} {context}")


def test_a_chat_template_stands_around_the_whole_and_its_cue_asks_too():
    class Templated(Letters):
        chat_template = "yes"

        def apply_chat_template(self, messages, **_):
            return f"<user>{messages[0]['content']}<end>bot:"

    frame = frame_of(Templated(), "who?", "Read. {context} Q: {question} A:", chat=True)
    assert "".join(map(chr, frame.before)) == "<user>Read. "
    assert "".join(map(chr, frame.after)) == " Q: who? A:<end>bot:"
    assert "".join(map(chr, frame.after[frame.first : frame.last])) == " who?"
    with pytest.raises(ArgumentError, match="chat: got True for a Letters without a chat template"):
        frame_of(Letters(), "who?", chat=True)


def test_braces_in_the_question_are_no_slots():
    frame = frame_of(Letters(), "what is {context} or {0}?", "{context} {question}")
    assert "".join(map(chr, frame.after)) == " what is {context} or {0}?"


@pytest.mark.parametrize("template", ["{context}", "{question}", "{context} {context} {question}", ""])
def test_a_template_without_its_slots_is_refused(template):
    with pytest.raises(ArgumentError, match="template: got"):
        frame_of(Letters(), "who?", template)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("topk", 0), ("topk", -1), ("phrase", 0), ("window", 0), ("budget", 0), ("limit", 0), ("topk", True),
        ("window", 2.0), ("window", None), ("keep", "all"), ("overflow", "cut"), ("weighting", "cubed"),
        ("layer", ()), ("layer", 1.5), ("layer", (1, 1)), ("heads", ()), ("heads", ((1,),)), ("heads", ((0, -1),)),
        ("heads", 3), ("heads", ((0, 1), (0, 1))),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_used_are_named(name, value):
    with pytest.raises(ArgumentError, match=f"{name}: got"):
        Settings(**{name: value})


def test_the_defaults_are_those_of_the_released_code():
    chosen = Settings()
    assert (chosen.window, chosen.topk, chosen.phrase, chosen.layer) == (1024, 300, 8, -1)
    assert (chosen.weighting, chosen.power, chosen.refresh, chosen.cue) == ("squared", 2, False, True)
    assert (chosen.keep, chosen.heads) == ("replace", None)


@pytest.mark.parametrize("count", [0, -2, 1.5, True])
def test_a_number_of_best_tokens_that_is_none_is_named(count):
    with pytest.raises(ArgumentError, match="topk: got"):
        rank_sentences(torch.rand(6), [2, 4], count)


@pytest.mark.parametrize("width", [0, -1, 2.0, True])
def test_a_width_that_is_none_is_named(width):
    with pytest.raises(ArgumentError, match="phrase: got"):
        phrase_smooth(torch.rand(6), width)


def test_sizes_that_exceed_the_model_are_added_up_before_anything_runs():
    with pytest.raises(ArgumentError, match=r"window 1,024 \+ kept 900 \+ template and question 60 exceeds .* 1,024"):
        Settings(budget=900).budget_for(1024, 60, 128)
    with pytest.raises(ArgumentError, match=r"answer 990 \+ kept 1 "):
        Settings(window=10).budget_for(1024, 60, 990)
    assert Settings().budget_for(8192, 60, 128) == 8192 - 60 - 1024
    assert Settings(window=64).budget_for(8192, 60, 128) == 8192 - 60 - 128
    assert Settings(budget=500).budget_for(8192, 60, 128) == 500
    assert Settings().budget_for(None, 60, 128) == 1024
