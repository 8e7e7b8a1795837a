"""The page and the terminal: what they hold and what they escape. How the page behaves is in tests/browser."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from statistics import median

import pytest
from rich.console import Console

from headway.compare.cells import LEFT_OUT, REFUSED, Cell, Score
from headway.compare.report import SCRIPTS, STYLES, more_scores, number, payload, render, tied
from headway.compare.terminal import summarise
from headway.pages.shell import source
from tests.compare.made import made, made_cells, made_timing
from tests.look.synthetic import HOSTILE
from tests.pages.reading import Page

FAST = made_timing(0.5, 0.005)


def refused(method: str, reason: str) -> list[Cell]:
    tasks = ("perplexity", "needle, blind", "needle, aware", "speed")
    return [Cell(method=method, budget=0.5, task=task, status=REFUSED, reason=reason) for task in tasks]


@pytest.fixture(scope="module")
def comparison():
    return made(
        made_cells("a", 0.5, timing=FAST, cache_bytes=500, density=0.5),
        made_cells("a", 0.25, nll=2.4, timing=made_timing(0.3, 0.003), cache_bytes=250, density=0.25),
        refused("b", "got 3 heads, expected 4"),
    )


@pytest.fixture(scope="module")
def page(comparison):
    return render(comparison)


def test_the_page_holds_every_finding_and_warning(comparison, page):
    text = Page(page).text.replace("\u00a0", " ")
    head, _, rest = comparison.recommendation.sentence.partition(":")
    assert f"{head}:" in text
    for sentence in (rest, *comparison.findings[1:], *comparison.warnings):
        assert sentence in text


def test_the_table_has_dense_first_and_a_refused_row_with_its_reason(page):
    table = page[page.index('<table class="points">') : page.index('<table class="ran">')]
    assert table.index(">dense<") < table.index(">a<") < table.index(">b<")
    assert "refused: got 3 heads, expected 4" in table
    assert table.count("<tr") == 1 + 4
    assert table.count("use this") == 1


def test_the_table_tells_the_costs_of_each_row_as_the_json_has_them(comparison, page):
    """Seconds of prefill, milliseconds per token, KV bytes and both densities, on the page and in the terminal."""
    rows = [row for row in table_rows(page) if len(row) > 3][1:]
    out = io.StringIO()
    summarise(comparison, Console(file=out, width=200))
    lines = out.getvalue().splitlines()
    points = [point for point in json.loads(comparison.to_json())["points"] if point["timing"]]
    assert (
        [row[0].removesuffix("use this") for row in rows]
        == [point["method"] for point in points]
        == ["dense", "a", "a"]
    )
    for row, point in zip(rows, points, strict=True):
        prefill, decode = (median(point["timing"][name]) for name in ("prefill", "decode"))
        density = point["density"]
        shown = (
            number(prefill), number(1e3 * decode), number(point["cache_bytes"] / 1e6),
            f"{number(density['prefill'], 2)}, {number(density['decode'], 2)}",
        )  # fmt: skip
        ratios = ("", "", "", "")
        if point["method"] != "dense":
            ratios = (*(f"{number(point['costs'][name], 2)}×" for name in ("prefill", "decode", "memory")), "")
        assert row[-4:] == [f"{value}{ratio}" for value, ratio in zip(shown, ratios, strict=True)]
        cells = [f"{value} ({ratio})" if ratio else value for value, ratio in zip(shown, ratios, strict=True)]
        assert sum(re.sub(r"\s+", " ", line).strip().endswith(" ".join(cells)) for line in lines) == 1
    assert len({row[-4] for row in rows}) == len({row[-2] for row in rows}) == 3


def table_rows(page: str) -> list[list[str]]:
    """The text of the cells of the table of points, row by row."""
    table = page[page.index('<table class="points">') : page.index('<table class="ran">')]
    return [
        ["".join(Page(cell).text.split("\n")).strip() for cell in re.findall(r"<t[hd]\b.*?</t[hd]>", row, re.DOTALL)]
        for row in re.findall(r"<tr\b.*?</tr>", table, re.DOTALL)
    ]


def test_reasons_follow_one_another_as_sentences_and_tasks_with_a_mode_stay_apart():
    cells = refused("b", "got 3 heads, expected 4.")
    cells[1] = Cell(method="b", budget=0.5, task="needle, blind", status=REFUSED, reason="got 5 keys.")
    cells[2] = Cell(method="b", budget=0.5, task="needle, aware", status=LEFT_OUT, reason="a driver.")
    comparison = made(cells)
    page = Page(render(comparison)).text
    assert "partly measured: got 3 heads, expected 4; got 5 keys; a driver" in page
    assert "perplexity: got 3 heads, expected 4; needle, blind: got 5 keys; needle, aware: a driver" in page
    assert any("b at 50 % refused perplexity; needle, blind; speed: got 3" in s for s in comparison.warnings)


def test_the_payload_holds_the_numbers_and_the_frontier_of_every_pair_of_axes(comparison):
    data = payload(comparison)
    assert [point["label"] for point in data["points"]] == ["dense", "a at 50 %", "a at 25 %", "b at 50 %"]
    assert data["recommended"] == "a at 50 %"
    assert data["frontiers"]["worst loss|request"] == [2, 1]
    assert data["frontiers"]["needle, blind|memory"] == [2]
    assert data["points"][3]["costs"]["request"] is None
    assert len(data["frontiers"]) == len(data["qualities"]) * len(data["costs"]) == 4 * 5


def test_a_point_that_was_not_measured_on_everything_is_drawn_hollow_and_not_on_the_frontier():
    cells = made_cells("a", 0.5, timing=FAST)
    cells[1] = Cell(method="a", budget=0.5, task="needle, blind", status=REFUSED, reason="no")
    data = payload(made(cells))
    assert data["points"][1]["whole"] is False
    assert data["points"][1]["missing"] == ["needle, blind"]
    assert data["frontiers"]["worst loss|request"] == [0]


def test_hostile_names_and_reasons_stay_text():
    for words in HOSTILE:
        page = render(made(made_cells(f"m{words}", 0.5), refused("b", f"because {words}")))
        parsed = Page(page)
        assert [attributes.get("id") for attributes, _ in parsed.scripts] == ["data", "plotly", None]
        assert not [a for _, a in parsed.tags if any(name.startswith("on") for name in a)]


def test_the_page_refers_to_nothing_outside_itself(page):
    for _, attributes in Page(page).tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert "url(" not in "".join(source("headway.compare", name) for name in STYLES)
    assert len(page) < 2_500_000


def test_scripts_never_write_markup():
    for name in SCRIPTS:
        text = source("headway.compare", name)
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "</script", "fetch("):
            assert word not in text, f"{name} uses {word}"


def test_a_comparison_without_any_quality_or_time_renders():
    assert "refused" in render(made(refused("b", "no")))


def test_the_terminal_shows_the_table_and_marks_the_point_to_use(comparison):
    out = io.StringIO()
    summarise(comparison, Console(file=out, width=160))
    lines = out.getvalue().splitlines()
    assert any(line.strip().startswith("→") and " a " in line and "50 %" in line for line in lines)
    assert any("refused" in line and " b " in line for line in lines)
    assert "Use a at 50 %" in out.getvalue()


def test_numbers_are_short_and_missing_ones_a_dash():
    assert [number(x) for x in (0.123456, 12345.0, None, float("nan"), -2.5, 1e-9, 0.0)] == [
        "0.123", "12,345", "–", "–", "−2.5", "1.0e−09", "0",
    ]  # fmt: skip


def test_units_are_tied_to_their_numbers():
    assert tied("at 50 % for 0.5 × the time") == "at 50\u00a0% for 0.5\u00a0× the time"


def test_scores_beside_the_first_ones_have_a_table_of_their_own():
    cells = made_cells("a", 0.5)
    beside = Score(
        task="needle", name="nll of the value", mode="blind", value=0.125, low=0.1, high=0.2, n=8, primary=False,
        higher_is_better=False,
    )  # fmt: skip
    cells[1] = replace(cells[1], scores=[*cells[1].scores, beside])
    comparison = made(cells)
    assert more_scores(comparison) == (
        [("nll of the value", "needle, blind")],
        [("a at 50 %", [("0.125", "0.1 to 0.2")])],
    )
    assert "nll of the value" in Page(render(comparison)).text
    assert 'id="scores"' not in render(made(made_cells("a", 0.5)))
