"""The page of `headway diagnose roles` in a browser."""

from __future__ import annotations

import json

import pytest

from headway.diagnose.roles import diagnose_roles
from headway.methods.diagnosis import diagnose_localize_align as dla
from tests.browser.drawing import draws, saved
from tests.diagnose.test_roles import FEW, ROWS, Harsh
from tests.methods.roles_words import words_model, words_tokenizer

pytestmark = pytest.mark.browser


def made():
    tokenizer = words_tokenizer()
    log = dla.read_conversations(map(json.dumps, ROWS))
    options = type(FEW)(**{**vars(FEW), "align": 2})
    return diagnose_roles(
        words_model(tokenizer), tokenizer, conversations=log, judges=[dla.RuleJudge(), Harsh()], options=options
    )


path = saved(made, "roles")
test_the_page_draws_without_errors = draws(plots=4)


def test_turns_stand_with_the_lowest_marks_first_and_as_text(open_file, path):
    page = open_file(path).page
    turns = page.locator("#turns .turns li")
    assert turns.count() == len(ROWS)
    assert "<img" in turns.nth(0).inner_text()
    assert page.locator(".turns img").count() == 0
    assert "GA 1.00" in turns.nth(0).inner_text()


def test_another_measure_of_drift_can_be_chosen(open_file, path):
    page = open_file(path).page
    page.locator("#heads select").select_option(label="Direction: turn of the output")
    first = page.evaluate("document.querySelector('#heads .plot').data[0].z[0][0]")
    page.locator("#heads select").select_option(label="Drift score")
    assert page.evaluate("document.querySelector('#heads .plot').data[0].z[0][0]") != first
    assert page.locator(".js-plotly-plot").count() == 4
