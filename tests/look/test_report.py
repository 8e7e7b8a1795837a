"""The report as a file: what it holds, what it escapes, how large it is. How it behaves is in tests/browser."""

from __future__ import annotations

import base64
import copy
import hashlib
import html
import io
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from headway.errors import ArgumentError
from headway.look.report import SCRIPTS, STYLES, pack_log, payload, render
from headway.look.result import HeadMetric, Look
from headway.look.terminal import head_grid, strongest, summarise
from headway.pages.shell import HOME, emphasised, script_safe, source, visible
from tests.look.synthetic import HOSTILE, synthetic_look
from tests.pages.reading import Page

EIGHT_MEGABYTES = 8_000_000


@pytest.fixture(scope="module")
def look() -> Look:
    return synthetic_look(layers=6, heads=4, tokens=96, maps=2, side=48)


@pytest.fixture(scope="module")
def page(look: Look) -> str:
    return render(look)


def unpack(packed: dict) -> np.ndarray:
    """The reading side of pack_log, as the page does it."""
    codes = np.frombuffer(base64.b64decode(packed["codes"]), dtype="<u2").astype(float)
    values = packed["low"] * (packed["high"] / packed["low"]) ** ((codes - 2) / 65533)
    return np.where(codes == 0, np.nan, np.where(codes == 1, 0, values)).reshape(packed["rows"], packed["columns"])


def test_summary_holds_every_finding_and_warning_as_text(look, page):
    text = Page(page).text
    for sentence in (*look.findings, *look.warnings):
        assert sentence in text


def test_header_says_what_was_read_when_and_with_what(look, page):
    text = Page(page).text
    for part in (look.model["name"], "6 layers × 4 heads", "134.5 million", "torch 2.13.0"):
        assert part in text
    assert f"text: {look.run['text']} · {look.run['date']}" in text


def test_payload_holds_every_head_value_to_four_digits(look, page):
    shown = Page(page).data()["heads"]
    for metric, sent in zip(look.heads, shown, strict=True):
        values = np.array([[np.nan if v is None else v for v in row] for row in sent["values"]], dtype=float)
        np.testing.assert_allclose(values, metric.array(), rtol=5e-4)


def test_missing_values_reach_the_page_as_null(page):
    period = next(m for m in Page(page).data()["heads"] if m["name"] == "period")
    assert period["values"][0] == [None] * 4


def test_whole_floats_travel_as_integers_and_long_ones_are_cut():
    small = synthetic_look(layers=2, heads=2, tokens=8, maps=0)
    small.heads[0].values = [[1.0, 0.123456789], [1234567.0, float("inf")]]
    assert payload(small)["heads"][0]["values"] == [[1, 0.1235], [1235000, None]]


def test_integers_are_never_rounded(look):
    assert payload(look)["model"]["parameters"] == 134_515_008


@given(st.lists(st.floats(0, 1e6) | st.just(float("nan")), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_packed_mass_keeps_zero_and_missing_exactly_and_the_rest_within_its_bound(values):
    array = np.array([values])
    finite = array[np.isfinite(array)]
    expected = np.where(array < 1e-12 * finite.max(initial=0), 0, array)
    back = unpack(pack_log(array))
    np.testing.assert_array_equal(np.isnan(back), np.isnan(array))
    np.testing.assert_array_equal(back == 0, expected == 0)
    np.testing.assert_allclose(back, expected, rtol=2.2e-4)


def test_packed_mass_of_one_value_is_that_value():
    np.testing.assert_allclose(unpack(pack_log(np.full((2, 3), 0.25))), 0.25, rtol=1e-12)


@given(st.lists(st.text(max_size=12) | st.sampled_from(HOSTILE), min_size=1, max_size=8))
@settings(max_examples=60, deadline=None)
def test_any_token_comes_back_from_the_page_unchanged(tokens):
    small = synthetic_look(layers=1, heads=1, tokens=len(tokens), maps=0)
    small.tokens = tokens
    page = f'<title>x</title><script id="data">{script_safe(payload(small))}</script><p>end</p>'
    assert Page(page).data()["tokens"] == tokens
    assert Page(page).text == "xend"


def test_hostile_text_adds_no_element():
    clean = synthetic_look(layers=3, heads=2, tokens=40, maps=1, side=8)
    hostile = synthetic_look(layers=3, heads=2, tokens=40, maps=1, side=8, hostile=True)
    hostile.findings, hostile.warnings = ([*HOSTILE], [*HOSTILE])
    clean.findings, clean.warnings = (["1 thing"] * len(HOSTILE), ["1 thing"] * len(HOSTILE))

    def frame(page: str) -> list[str]:
        return [tag for tag, _ in Page(page).tags if tag != "b"]

    rendered = render(hostile)
    rendered.encode("utf-8")
    assert frame(rendered) == frame(render(clean))
    assert HOSTILE[0] in Page(rendered).text


def test_every_script_that_may_run_is_named_by_its_hash(page):
    parsed = Page(page)
    policy = next(a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    running = [content for attributes, content in parsed.scripts if "type" not in attributes]
    assert len(running) == 1
    digest = base64.b64encode(hashlib.sha256(running[0].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert "'unsafe-inline'" not in policy.split("script-src")[1].split(";")[0]
    assert policy.startswith("default-src 'none'")


def test_page_refers_to_nothing_outside_itself(page):
    for _tag, attributes in Page(page).tags:
        assert "src" not in attributes
        assert attributes.get("href", "#").startswith("#")
    assert "@import" not in page
    assert "url(" not in source(HOME, "page.css") + "".join(source("headway.look", name) for name in STYLES)


def test_scripts_never_write_markup():
    shared = [(HOME, name) for name in ("base.js", "colour.js", "plots.js", "end.js")]
    for place, name in [*shared, *(("headway.look", name) for name in SCRIPTS)]:
        text = source(place, name)
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "</script", "fetch("):
            assert word not in text, f"{name} uses {word}"


def test_plotly_is_carried_once_and_packed(page):
    packed = [content for attributes, content in Page(page).scripts if attributes.get("id") == "plotly"]
    assert len(packed) == 1
    assert len(packed[0]) < 2_200_000


def test_report_of_4096_tokens_stays_under_eight_megabytes():
    size = len(render(synthetic_look(layers=30, heads=9, tokens=4096, maps=8, side=512)).encode("utf-8"))
    assert size < EIGHT_MEGABYTES


def test_a_look_with_nothing_but_tokens_renders():
    empty = Look(
        model={}, run={}, tokens=["a"], heads=[], layers=[], labels=[], received=[], sinks={}, secondary={},
        patterns={}, roles={}, maps=[], findings=[],
    )  # fmt: skip
    parsed = Page(render(empty))
    assert parsed.data()["received"] is None
    assert "no findings" in parsed.text


def test_same_look_gives_the_same_bytes(look, page):
    assert render(copy.deepcopy(look)) == page


@pytest.mark.parametrize(
    ("spoil", "names"),
    [
        (lambda k: k.heads[1].values.pop(), "received_first"),
        (lambda k: k.heads[0].low[0].pop(), "sink_rate"),
        (lambda k: k.labels[0].values[0].pop(), "pattern"),
        (lambda k: k.received[2].pop(), "received"),
        (lambda k: k.layers[0].values.pop(), "first"),
        (lambda k: setattr(k.maps[0], "side", 7), "map of layer"),
        (lambda k: setattr(k.maps[0].windows[0], "size", 7), "detail window of layer"),
    ],
)
def test_parts_that_contradict_each_other_are_named(look, spoil, names):
    spoiled = copy.deepcopy(look)
    spoil(spoiled)
    with pytest.raises(ArgumentError, match=f"{names}.*got.*expected"):
        render(spoiled)


def test_first_number_of_a_sentence_is_set_apart():
    assert emphasised("About 1,204.5 of <b>9</b>") == "About <b>1,204.5</b> of &lt;b&gt;9&lt;/b&gt;"
    assert "<b>61.4 %</b>" in emphasised("61.4 % of all")
    assert emphasised("Position 0 of layers 3 to 9: 7 sinks") == "Position 0 of layers 3 to 9: <b>7</b> sinks"
    assert "<b>" not in emphasised("A long way into the sentence, where no reader looks for a headline, 7 stands")
    assert emphasised("none") == "none"


@given(st.text() | st.sampled_from(HOSTILE))
@settings(max_examples=60, deadline=None)
def test_emphasis_changes_no_text_and_only_adds_its_own_tag(sentence):
    marked = str(emphasised(sentence))
    assert html.unescape(re.sub(r"</?b>", "", marked)) == visible(sentence)


def test_invisible_characters_become_visible_and_encodable():
    shown = visible("a\x00\u202eb\ud83d\n")
    assert shown == "a⟨U+0000⟩⟨U+202E⟩b⟨U+D83D⟩\n"
    shown.encode("utf-8")


def printed(look: Look, width: int, **options: str) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    summarise(look, console, **options)
    return console.file.getvalue()


def test_terminal_prints_findings_warnings_and_the_planted_head():
    full = synthetic_look(tokens=64, maps=0)
    words = " ".join(printed(full, 200).split())
    for sentence in (*full.findings, *full.warnings):
        assert sentence in words
    assert "3.1 0.987" in words


def test_terminal_leaves_the_grid_out_where_it_does_not_fit():
    full = synthetic_look(tokens=64, maps=0)
    assert "Sink rate" in printed(full, 65)
    assert "Sink rate" not in printed(full, 64)


def test_terminal_shows_markup_as_text_and_control_characters_harmless():
    full = synthetic_look(tokens=64, maps=0)
    full.findings = ["[red]1[/red] \x1b[31mhead"]
    shown = printed(full, 100)
    assert "[red]1[/red] ⟨U+001B⟩[31mhead" in shown
    assert "\x1b" not in shown


def test_terminal_names_the_valid_metrics_when_one_is_unknown(look):
    with pytest.raises(ArgumentError, match="sink_rate"):
        summarise(look, Console(file=io.StringIO()), metric="sink_rates")


def test_strongest_heads_skip_missing_values_and_use_size_where_diverging():
    values = [[0.1, float("nan")], [-0.9, 0.5]]
    metric = HeadMetric(name="m", label="m", family="roles", unit="", description="", values=values)
    assert strongest(metric, 2) == [(1, 1, 0.5), (0, 0, 0.1)]
    metric.scale = "diverging"
    assert strongest(metric, 2) == [(1, 0, -0.9), (1, 1, 0.5)]
    assert len(strongest(metric, 9)) == 3


def test_grid_puts_layers_in_columns_and_shades_by_value():
    metric = HeadMetric(
        name="m",
        label="m",
        family="roles",
        unit="",
        description="",
        values=[[0.0, 1.0], [float("nan"), 0.5], [1.0, 0.0]],
    )
    _, first, second, _ = head_grid(metric, colours=False).plain.split("\n")
    assert first[5:] == "  · ██"
    assert second[5:] == "██▒▒  "


def test_grid_colours_the_largest_value_with_the_last_colour():
    metric = HeadMetric(name="m", label="m", family="roles", unit="", description="", values=[[0.0], [2.0]])
    colours = [
        span.style.bgcolor.name for span in head_grid(metric, colours=True).spans if hasattr(span.style, "bgcolor")
    ]
    assert colours == ["#1f2030", "#ecf999"]
