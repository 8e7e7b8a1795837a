"""The page of `headway diagnose anchors` in a browser: it draws every plot, follows a choice, asks nothing outside."""

from __future__ import annotations

import pytest

from tests.browser.drawing import draws, saved
from tests.diagnose.test_anchors import made

pytestmark = pytest.mark.browser


path = saved(made, "anchors")
test_the_page_draws_without_errors = draws(plots=4)


def test_a_chosen_sentence_shows_what_it_rests_on(open_file, path):
    page = open_file(path).page
    rows = page.locator(".sentences li")
    assert rows.count() == 6
    rows.nth(2).click()
    assert rows.nth(2).get_attribute("aria-pressed") == "true"
    assert "source" in rows.nth(0).get_attribute("class")
    assert "target" in rows.nth(5).get_attribute("class")
    assert "rests most on 0" in page.locator(".detail").inner_text()
    rows.nth(2).press("Enter")
    assert page.locator(".detail").inner_text() == "No sentence is chosen."


def test_another_trace_can_be_chosen(open_file, path):
    page = open_file(path).page
    page.locator(".sentences li").nth(1).click()
    page.locator("#trace select").select_option(label="two")
    assert page.locator('.sentences li[aria-pressed="true"]').count() == 0
    assert page.locator(".js-plotly-plot").count() == 4


def test_words_of_a_trace_are_never_markup(open_file, path):
    page = open_file(path).page
    assert page.locator(".sentences img").count() == 0
    assert "<img" in page.locator(".sentences li").nth(5).inner_text()
