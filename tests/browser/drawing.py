"""What the page of every verb must do: draw all its plots in any light and width, quietly, and ask for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

#: Width and colour scheme; 420 pixels are a phone.
in_every_light = pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (420, "light")])


def drawn(open_file, path, *, width: int, scheme: str, plots: int):
    """The opened page, once it is certain that it drew `plots` plots without an error, a request or a sideways
    scroll."""
    opened = open_file(path, width=width, scheme=scheme)
    assert opened.errors == []
    assert opened.outside() == []
    page = opened.page
    assert page.locator(".js-plotly-plot").count() == page.locator(".plot").count() == plots
    assert page.evaluate("document.documentElement.scrollWidth") <= width + 1
    return page


def saved(make: Callable[[], Any], verb: str) -> Any:
    """A fixture for a module: the page of `make()`, as the verb saves it."""

    @pytest.fixture(scope="module")
    def path(tmp_path_factory):
        return make().save(tmp_path_factory.mktemp("page") / f"{verb}.html")

    return path


def draws(plots: int) -> Any:
    """A test for a module with the fixture `path`: the page draws `plots` plots in every light, and no word of a text
    or a name became a picture."""

    @in_every_light
    def test_the_page_draws_without_errors(open_file, path, width, scheme):
        page = drawn(open_file, path, width=width, scheme=scheme, plots=plots)
        assert page.locator("main img").count() == 0

    return test_the_page_draws_without_errors
