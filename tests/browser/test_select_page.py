"""The page of `headway select` in a browser: it draws every plot, says nothing wrong, asks for nothing outside."""

from __future__ import annotations

import pytest

from tests.browser.drawing import drawn, in_every_light
from tests.select.made import made

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return made().save(tmp_path_factory.mktemp("page") / "select.html")


@in_every_light
def test_the_page_draws_without_errors(open_file, path, width, scheme):
    drawn(open_file, path, width=width, scheme=scheme, plots=4)


def test_a_text_that_looks_like_markup_is_a_text(open_file, path):
    page = open_file(path).page
    assert "<img src=x onerror=alert(1)>" in page.locator("#examples").inner_text()
    assert page.locator("#examples img").count() == 0


def test_the_table_holds_the_domains_without_scripts(open_file, path):
    rows = open_file(path).page.locator("#domains tbody tr")
    assert rows.count() == 2
    assert "6 of 30" in rows.nth(0).inner_text()
