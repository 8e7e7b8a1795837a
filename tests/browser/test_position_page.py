"""The page of `headway diagnose position` in a browser: it draws every plot, follows a choice, asks nothing outside."""

from __future__ import annotations

import numpy as np
import pytest

from headway.diagnose.position import Options, diagnose_position
from headway.evidence.recipes import _posir_toy as toy
from headway.methods.diagnosis.posir import count_tokens, from_corpus
from headway.tasks.positioned_evidence import prose_corpus
from tests.browser.drawing import draws, saved

pytestmark = pytest.mark.browser
OPTIONS = Options(edges=(20, 40, 62), resamples=60, moved=4, saliency=4, batch=2)


def made():
    random = np.random.default_rng(0)
    sentences = [" ".join(f"w{i}" for i in random.integers(toy.FILLERS, size=4)) + "." for _ in range(80)]
    corpus = prose_corpus(sentences, 150, random, sizes=(16, 70), facts=1)
    data = count_tokens(from_corpus(corpus, name="<b>set</b>"), toy.tokenizer(), name="toy")
    return diagnose_position([data], toy.bi_encoder(0, name="<img src=x>"), options=OPTIONS)


path = saved(made, "position")
test_the_page_draws_without_errors = draws(plots=4)


def test_another_retriever_can_be_chosen(open_file, path):
    page = open_file(path).page
    means = "JSON.stringify(document.querySelector('#places .js-plotly-plot').data[0].z)"
    before = page.evaluate(means)
    page.locator("#places select").select_option(label="bm25")
    assert page.evaluate(means) != before


def test_the_table_holds_every_group_of_queries(open_file, path):
    page = open_file(path).page
    assert page.locator("#index tbody tr").count() == 10
    assert "all lengths" in page.locator("#index tbody tr").first.inner_text()
