"""What the page of every verb must do: draw all its plots in any light and width, quietly, and ask for nothing."""

from __future__ import annotations

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
