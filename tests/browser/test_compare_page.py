"""The page of `headway compare` in a real browser: it draws, answers to mouse and choice, and asks for nothing."""

from __future__ import annotations

import pytest

from headway.compare.report import render
from tests.compare.made import made, made_cells, made_timing
from tests.look.synthetic import HOSTILE

pytestmark = pytest.mark.browser

TIP = "#tip"
PLOT = "#frontier-body .plot"


def saved(comparison, folder, name: str):
    path = folder / f"{name}.html"
    path.write_text(render(comparison), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    points = [
        made_cells(method, budget, nll=2 + loss / budget, timing=made_timing(cost * budget + 0.4, 0.01), density=budget,
                   cache_bytes=int(1000 * budget))
        for method, loss, cost in (("good", 0.005, 0.6), ("poor", 0.1, 1.0))
        for budget in (0.5, 0.25, 0.125)
    ]  # fmt: skip
    return saved(made(*points), tmp_path_factory.mktemp("compare"), "compare")


@pytest.fixture(scope="module")
def opened(open_file, path):
    return open_file(path)


@pytest.fixture
def page(opened):
    opened.page.keyboard.press("Escape")
    opened.page.mouse.move(2, 2)
    opened.page.select_option("#pick-quality", "worst loss")
    opened.page.select_option("#pick-cost", "request")
    return opened.page


def test_it_draws_without_an_error_and_asks_for_nothing(opened):
    assert opened.errors == []
    assert opened.outside() == []
    assert opened.page.locator("#frontier-body .plot svg.main-svg").count() > 0
    assert opened.page.locator("#budgets-body .plot").count() == 4 + 5


def test_every_point_is_a_row_and_a_mark(page):
    assert page.locator("table.points tbody tr").count() == 7
    assert page.locator(f"{PLOT} .scatterlayer .point").count() == 7 + 1


def test_the_frontier_is_a_line_and_named_below_the_plot(page):
    said = page.inner_text("#on-frontier")
    assert said.startswith("On the frontier:")
    assert "good at 12.5 %" in said
    assert "poor" not in said
    assert page.locator(f"{PLOT} .scatterlayer .js-line").count() == 1


def test_another_quality_or_cost_draws_anew(page):
    before = page.text_content(f"{PLOT} .xtitle")
    page.select_option("#pick-cost", "memory")
    assert page.text_content(f"{PLOT} .xtitle") != before
    assert "KV bytes" in page.text_content(f"{PLOT} .xtitle")
    page.select_option("#pick-quality", "needle, blind")
    assert "exact match" in page.text_content(f"{PLOT} .ytitle")
    assert "On the frontier" in page.inner_text("#on-frontier")


def test_a_mark_tells_its_numbers(page):
    page.locator(PLOT).scroll_into_view_if_needed()
    page.wait_for_timeout(300)
    box = page.locator(f"{PLOT} .scatterlayer .point").nth(1).bounding_box()
    for step in range(10):
        page.mouse.move(box["x"] + box["width"] / 2 + step % 2, box["y"] + box["height"] / 2)
        page.wait_for_timeout(100)
        if page.is_visible(TIP):
            break
    text = page.inner_text(TIP)
    assert "good at 50 %" in text
    assert "perplexity" in text
    assert "×" in text


def test_the_recommended_row_is_marked(page):
    assert page.locator("tr.chosen").count() == 1
    assert "use this" in page.inner_text("tr.chosen")


def test_a_loss_beyond_all_measure_leaves_room_for_the_others(open_file, tmp_path):
    points = [made_cells("good", 0.5, nll=2.02, timing=made_timing(0.6)), made_cells("lost", 0.5, nll=7.0)]
    page = open_file(saved(made(*points), tmp_path, "lost")).page
    marks = page.locator(f"{PLOT} .scatterlayer .point")
    tops = [marks.nth(i).bounding_box()["y"] for i in range(3)]
    assert tops[1] - tops[0] > 20


@pytest.mark.parametrize("width", [360, 768, 1440])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_width_makes_the_page_scroll_sideways(open_file, path, width, scheme):
    opened = open_file(path, width=width, scheme=scheme)
    assert opened.errors == []
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


def test_hostile_names_stay_text(open_file, tmp_path):
    points = [made_cells(f"{i}{words}", 0.5) for i, words in enumerate(HOSTILE)]
    opened = open_file(saved(made(*points), tmp_path, "hostile"))
    assert opened.errors == []
    assert opened.outside() == []
    assert not opened.page.evaluate("Boolean(window.hacked)")
