"""The page of `headway diagnose agreement` in a browser: it draws every plot, follows a choice, asks for nothing."""

from __future__ import annotations

import pytest

from tests.browser.drawing import draws, saved
from tests.diagnose.test_agreement import made

pytestmark = pytest.mark.browser


path = saved(made, "agreement")
test_the_page_draws_without_errors = draws(plots=2)


def test_tokens_are_marked_and_never_markup(open_file, path):
    page = open_file(path).page
    rows = page.locator(".rows .words")
    assert rows.count() == 6
    assert page.locator(".rows img").count() == 0
    assert "splendid <img src=x>" in rows.nth(0).inner_text()
    assert page.locator(".rows .words").nth(0).locator(".decides").count() == 2
    assert page.locator(".rows .words").nth(0).locator(".out").count() == 2


def test_another_text_and_the_top_of_the_tokens_can_be_seen(open_file, path):
    page = open_file(path).page
    page.locator("#texts select").select_option(label="two")
    assert "it is “complains”" in page.locator(".verdict").inner_text()
    page.locator("#agreement details summary").click()
    # Waiting by a function is evaluated in the page, which its policy forbids.
    page.locator(".js-plotly-plot").nth(2).wait_for()
    assert page.locator(".js-plotly-plot").count() == 3
