"""The laboratory's page in a browser: it draws every plot, says nothing wrong, asks for nothing outside."""

from __future__ import annotations

import pytest

from tests.lab.test_sinks import made

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    lab = made({"softmax": 0.4, "softpick": 0.01, "gate by head": 0.39})
    return lab.save(tmp_path_factory.mktemp("page") / "sinks.html")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (420, "light")])
def test_the_page_draws_without_errors(open_file, path, width, scheme):
    opened = open_file(path, width=width, scheme=scheme)
    assert opened.errors == []
    assert opened.outside() == []
    page = opened.page
    assert page.locator(".js-plotly-plot").count() == page.locator(".plot").count() >= 10
    assert page.evaluate("document.documentElement.scrollWidth") <= width + 1


def test_the_mouse_over_a_point_names_its_arm(open_file, path):
    page = open_file(path).page
    points = page.locator("#against .scatterlayer .point")
    assert points.count() == 3
    page.locator("#against").scroll_into_view_if_needed()
    box = points.nth(1).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 40, y + 30)
    page.mouse.move(x, y, steps=5)
    tip = page.locator("#tip")
    tip.wait_for(state="visible")
    assert "softpick" in tip.inner_text()
    assert "Loss" in tip.inner_text()


def test_the_table_holds_the_numbers_without_scripts(open_file, path):
    page = open_file(path).page
    rows = page.locator("#table tbody tr")
    assert rows.count() == 3
    assert "1.1 %" in rows.nth(1).inner_text()
