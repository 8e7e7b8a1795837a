"""The InfiniRetri recipe at smoke size, its parts, and that its measurements can fail."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from headway.evidence import Context, NotRunnableError, load_recipe, prove
from headway.evidence.recipes import _infiniretri_planted as measures
from headway.evidence.recipes._infiniretri_claims import exponent, grid_claim
from headway.evidence.recipes._infiniretri_measures import chosen_layer, hide, last_and_best
from headway.evidence.recipes._infiniretri_planted import truncated
from headway.evidence.recipes.infiniretri import CRITERIA
from headway.hosts import default_text
from headway.methods.long_context.infiniretri import Settings, split_text
from headway.statistics import bootstrap_difference, rank_correlation
from headway.tasks.planted_retrieval import answering_host, planted_host


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    return prove("infiniretri", size="smoke", seed=3, out=tmp_path_factory.mktemp("runs"), show_progress=False)


def claim(run, name):
    return next(found for found in run.claims if found.id == name)


def test_every_planned_claim_is_measured(smoke):
    assert [found.id for found in smoke.claims] == list(CRITERIA)
    assert smoke.planned


def test_planted_needles_are_kept_where_truncation_and_chance_lose_them(smoke):
    found = claim(smoke, "planted-flat")
    assert found.measured.value == 1
    assert max(found.others[name].value for name in ("random", "tail", "head")) < 1
    assert claim(smoke, "planted-flat").verdict == "inconclusive"


def test_passes_do_not_grow_with_the_text(smoke):
    assert claim(smoke, "linear-cost").details["largest pass"] <= 512
    assert claim(smoke, "linear-cost").verdict == "holds"


def test_rows_and_spans_are_exact(smoke):
    assert claim(smoke, "rows-exact").verdict == "holds"
    assert claim(smoke, "provenance").measured.value == 0


def test_every_layer_is_judged(smoke):
    details = claim(smoke, "last-layers").details
    assert len(details["hit rate by layer"]) == 4
    assert 0 <= details["best layer"] < 4


def test_few_cases_prove_nothing(smoke):
    for name in (
        "needles-64k",
        "needles-64k-gain",
        "bm25-64k",
        "planted-answers",
        "not-below-bm25",
        "in-window-accuracy",
        "two-hop",
        "phrase-grid",
        "last-layers",
    ):
        assert claim(smoke, name).verdict == "inconclusive"


def test_the_layers_are_drawn(smoke):
    assert (smoke.folder / "plots" / "layers.html").exists()


def test_truncation_keeps_whole_sentences_of_one_or_both_ends():
    sizes = [3, 4, 5, 2, 3]
    assert truncated(sizes, 8, "head") == [0, 1]
    assert truncated(sizes, 6, "tail") == [3, 4]
    assert truncated(sizes, 8, "middle") == [0, 3, 4]
    assert truncated(sizes, 99, "middle") == [0, 1, 2, 3, 4]
    assert truncated(sizes, 2, "head") == []


def test_hidden_needles_stand_in_the_text_once_each():
    _, tokenizer = planted_host()
    source = list(split_text(default_text().text[:40_000]))
    hidden = hide(tokenizer, source, 500, 3, np.random.default_rng(0))
    assert all(hidden.text.count(needle) == 1 for needle in hidden.needles)
    assert all(key in hidden.question for key in hidden.keys)
    assert not any(value in hidden.question for value in hidden.values)


def test_a_host_that_attends_to_nothing_in_particular_loses_needles(tmp_path, monkeypatch):
    def blind(**options):
        model, tokenizer = planted_host(**options)
        with torch.no_grad():
            model.transformer.h[-1].attn.c_attn.weight[:, :256] = 0
        return model, tokenizer

    monkeypatch.setattr(measures, "planted_host", blind)
    rows = measures.measure_planted(Context(size="smoke", seed=0, out=tmp_path))
    assert sum(row["kept"] for row in rows) <= 3


def test_the_answering_host_answers_any_length_and_a_vote_of_chunks_does_not(smoke):
    found = claim(smoke, "planted-answers")
    assert found.others["answer"].value == found.others["in_window"].value == 1
    assert found.others["majority"].value == 0
    assert found.baseline.value < 1


def test_a_host_that_hands_no_word_on_answers_nothing(tmp_path, monkeypatch):
    def mute(**options):
        model, tokenizer = answering_host(**options)
        with torch.no_grad():
            model.transformer.h[0].attn.c_proj.weight.zero_()
        return model, tokenizer

    monkeypatch.setattr(measures, "answering_host", mute)
    rows = measures.measure_answers(Context(size="smoke", seed=0, out=tmp_path))
    assert sum(row["answer"] + row["in_window"] for row in rows) == 0


def test_a_vote_goes_to_the_answer_of_most_chunks():
    """A name with a value in every chunk wins over one that stands in a single chunk."""
    model, tokenizer = answering_host()
    filler = "w1 w2 w3 ."
    text = f"the code of n5 is v7 . {filler} " * 200
    assert measures._majority(model, tokenizer, text, "the code of n5") == "v7"
    assert measures._said(model, tokenizer, text[:300] + " the code of n9 is v8 .", "the code of n9") == "v8"


def test_the_layer_is_that_of_the_largest_margin_and_the_last_of_equal_ones():
    assert chosen_layer([[0.0, 2.0, 1.0], [0.0, 2.0, 1.0]]) == 1
    assert chosen_layer([[-1.0, 2.0, 2.0, 0.5]]) == 2
    assert chosen_layer([[5.0, 1.0, 0.0], [-9.0, 1.0, 1.5]]) == 1


def test_the_last_layers_stand_beside_the_quarter_that_other_texts_choose():
    """Eight layers, so quarters of two. Text 0's needles are found by layers 0 and 1, text 1's by layers 4 and 5: each
    text is judged by the quarter that serves the other, which finds none of its own."""
    first = [True, True, False, False, False, False, False, True]
    second = [False, False, False, False, True, True, True, True]
    last, best = last_and_best([first, first, second], [0, 0, 1])
    assert last.tolist() == [0.5, 0.5, 1.0]
    assert best.tolist() == [0.0, 0.0, 0.0]
    assert last_and_best([first, second, second], [0, 0, 0])[1].tolist() == [0.0, 1.0, 1.0]


def test_the_last_layers_are_judged_by_what_they_lose_to_the_best_before():
    """Needles that layers 12 to 28 find and the last two do not: a positive rank correlation, and yet a failure."""
    layers, needles = 30, 16
    hits = [[12 <= layer < 28 for layer in range(layers)] for _ in range(needles)]
    last, best = last_and_best(hits, [number // 4 for number in range(needles)])
    random = np.random.default_rng(0)
    assert rank_correlation(range(layers), np.mean(hits, axis=0), generator=random).low > 0
    lost = bootstrap_difference(last, best, paired=True, generator=random)
    assert CRITERIA["last-layers"].judge({"measured": lost}).verdict == "fails"
    same = bootstrap_difference(best, best, paired=True, generator=random)
    assert CRITERIA["last-layers"].judge({"measured": same}).verdict == "holds"


def test_the_phrase_grid_asks_every_length_for_its_own_width(tmp_path):
    context = Context(size="small", seed=0, out=tmp_path)
    own = {f"{n} {w}": [n == w] * 100 + [False] * 20 for n in measures.WIDTHS for w in measures.WIDTHS}
    assert judged(grid_claim(context, own, CRITERIA["phrase-grid"])) == "holds"
    turned = own | {"16 8": [True] * 120, "16 16": [True] * 90 + [False] * 30}
    assert judged(grid_claim(context, turned, CRITERIA["phrase-grid"])) == "fails"


def judged(found):
    return found.criterion.judge({"measured": found.measured, **found.others}).verdict


def test_an_exponent_is_that_of_a_power():
    found = {str(n): {"linear": 3.0 * n, "square": 0.1 * n**2} for n in (10, 40, 70)}
    assert exponent(found, "linear") == pytest.approx(1)
    assert exponent(found, "square") == pytest.approx(2)


def test_time_is_told_beside_a_dense_forward(smoke):
    found = claim(smoke, "linear-time")
    assert found.others["dense_pairs"].value == pytest.approx(2, abs=0.01)
    assert found.others["pairs"].value < 1.5


def test_a_narrow_window_finds_fewer_phrases(tmp_path):
    found = measures.measure_phrases(Context(size="small", seed=0, out=tmp_path))
    assert np.mean(found["8 8"]) > np.mean(found["8 1"]) + 0.1


def test_the_last_layer_of_the_papers_form_is_the_default():
    assert Settings().layer == -1
    assert measures.PLANTED.layer == -1


def test_the_paper_setting_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(NotRunnableError, match="without a GPU"):
        load_recipe("infiniretri").check_runnable("full")
    load_recipe("infiniretri").check_runnable("small")
