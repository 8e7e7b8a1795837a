"""The page of `headway diagnose concepts` in a browser: it draws every plot, follows a choice, asks nothing outside."""

from __future__ import annotations

import pytest

from tests.browser.drawing import draws, saved
from tests.diagnose.test_concepts import made

pytestmark = pytest.mark.browser


path = saved(made, "concepts")
test_the_page_draws_without_errors = draws(plots=4)


def test_a_chosen_head_shows_its_texts(open_file, path):
    page = open_file(path).page
    heads = page.locator(".grid button")
    assert heads.count() == 8
    assert heads.nth(0).get_attribute("aria-pressed") == "true"
    heads.nth(5).click()
    assert heads.nth(5).get_attribute("aria-pressed") == "true"
    assert "Layer 3, head 1" in page.locator(".chosen h3").inner_text()
    assert page.locator(".texts li.fit").count() == 3
    assert page.locator(".texts li.unfit").count() == 2


def test_words_of_a_bank_are_never_markup(open_file, path):
    page = open_file(path).page
    assert page.locator(".texts img").count() == 0
    assert "<img" in page.locator(".texts").inner_text()
    assert "<b>shape</b>" in page.locator(".grid").inner_text()
