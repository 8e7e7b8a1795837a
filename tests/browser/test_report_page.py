"""The report in a real browser: it draws, answers to mouse and keyboard, asks for nothing and obeys no token."""

from __future__ import annotations

import base64
import math

import numpy as np
import pytest

from headway.look.report import render
from headway.look.result import Look
from tests.look.synthetic import HOSTILE, synthetic_look

pytestmark = pytest.mark.browser

GRID = "#head-grid"
TIP = "#tip"


def saved(look: Look, folder, name: str):
    path = folder / f"{name}.html"
    path.write_text(render(look), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def look() -> Look:
    return synthetic_look(layers=12, heads=6, tokens=512, maps=3, side=128)


@pytest.fixture(scope="module")
def path(look, tmp_path_factory):
    return saved(look, tmp_path_factory.mktemp("report"), "report")


@pytest.fixture(scope="module")
def opened(open_file, path):
    return open_file(path)


@pytest.fixture
def page(opened):
    opened.page.keyboard.press("Escape")
    opened.page.mouse.move(2, 2)
    opened.page.check("#metric-0")
    opened.page.select_option("#strip-layer", "-1")
    return opened.page


def cell(page, layer: int, head: int, layers: int = 12, heads: int = 6) -> tuple[float, float]:
    """The middle of a cell of the large grid, on the screen."""
    page.locator(GRID).scroll_into_view_if_needed()
    box = page.locator(f"{GRID} .xy .bg, {GRID} rect.nsewdrag").first.bounding_box()
    return box["x"] + (layer + 0.5) / layers * box["width"], box["y"] + (head + 0.5) / heads * box["height"]


def tip(page) -> str:
    page.wait_for_selector(f"{TIP}:not([hidden])")
    return page.inner_text(TIP)


def hover(page, x: float, y: float) -> str:
    """The tip at a place. A scroll that ends late hides a tip, as it should; then the mouse has to move on."""
    for step in range(20):
        page.mouse.move(x + step % 2, y)
        page.wait_for_timeout(100)
        if step and page.is_visible(TIP):
            break
    return tip(page)


def hover_head(page, layer: int, head: int, **size: int) -> str:
    """The tip of a cell of the large grid."""
    return hover(page, *cell(page, layer, head, **size))


def click_head(page, layer: int, head: int) -> None:
    """Clicks a cell of the large grid once its tip is there: Plotly clicks on what it hovers."""
    x, y = cell(page, layer, head)
    assert f"Layer {layer}, head {head}" in hover(page, x, y)
    page.mouse.click(x, y)


def until(page, condition: str) -> None:
    """Waits for a condition in the page. (Playwright's own way evaluates strings there, which the policy forbids.)"""
    page.evaluate(
        f"() => new Promise((done) => {{ const wait = () => ({condition}) ? done() : requestAnimationFrame(wait);"
        " wait(); })"
    )


def read_number(text: str) -> float:
    return float(text.replace("−", "-").replace(",", "").split("\xa0")[0])


def index_of(look: Look, name: str) -> int:
    return [metric.name for metric in look.heads].index(name)


def test_page_draws_without_console_errors_or_requests(opened, path):
    assert opened.errors == []
    assert opened.outside() == []
    assert opened.requests[0] == path.as_uri()
    assert sum(url.startswith("file:") for url in opened.requests) == 1
    assert opened.page.locator(".js-plotly-plot").count() >= 8
    assert "could not be drawn" not in opened.page.inner_text("body")


def test_policy_stops_a_script_that_is_not_ours(page):
    page.evaluate(
        "() => { const script = document.createElement('script');"
        " script.textContent = 'window.hacked = 3'; document.head.append(script); }"
    )
    page.evaluate(
        "() => { const i = new Image(); i.src = 'http://example.invalid/x.png'; document.body.append(i); i.remove(); }"
    )
    assert page.evaluate("window.hacked") is None


@pytest.mark.parametrize(("layer", "head"), [(3, 1), (0, 5), (11, 0)])
def test_hover_tells_layer_head_value_interval_and_pattern(page, look, layer, head):
    lines = hover_head(page, layer, head).split("\n")
    metric = look.heads[0]
    assert lines[0] == f"Layer {layer}, head {head}"
    name, value = lines[1].split(": ")
    assert name == metric.label
    assert read_number(value) == pytest.approx(metric.values[layer][head], rel=6e-3)
    low, high = (read_number(v) for v in lines[2].removeprefix("95 % interval ").split(" to "))
    assert low == pytest.approx(metric.low[layer][head], rel=6e-3, abs=1e-9)
    assert high == pytest.approx(metric.high[layer][head], rel=6e-3)
    assert lines[3] == f"pattern: {look.labels[0].values[layer][head]}"


def test_switching_the_metric_changes_grid_title_list_and_tip(page, look):
    index = index_of(look, "retrieval")
    before = page.locator("#top-heads").inner_text()
    page.check(f"#metric-{index}")
    assert page.inner_text("#metric-title") == "Retrieval score"
    assert page.locator("#top-heads").inner_text() != before
    assert "Layer 3, head 1" in page.locator("#top-heads li").first.inner_text()
    assert "Retrieval score: 0.987" in hover_head(page, 3, 1)
    drawn = page.evaluate(f"document.querySelector('{GRID}').data[0].z")
    np.testing.assert_allclose(np.array(drawn).T, look.heads[index].array(), rtol=5e-4)


def test_metric_is_switched_by_the_keyboard_too(page):
    page.focus("#metric-0")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#metric-title") == "Mass on the first token"


def test_cell_without_a_value_says_so(page, look):
    page.check(f"#metric-{index_of(look, 'period')}")
    assert "not measured here" in hover_head(page, 0, 2)
    assert "Empty cell: not measured there." in page.inner_text("#heads")


def test_word_grid_shows_words_and_marks_one_of_them(page, look):
    page.check(f"#metric-{len(look.heads)}")
    word = look.labels[0].values[4][2]
    assert word in hover_head(page, 4, 2)
    key = page.locator(".key", has_text=word).first
    key.click()
    assert page.locator(".key", has_text=word).first.get_attribute("aria-pressed") == "true"


def test_clicking_a_head_shows_all_its_measures(page, look):
    click_head(page, 7, 4)
    assert page.input_value("#pick-layer") == "7"
    assert page.input_value("#pick-head") == "4"
    rows = page.locator("#head-card .ranks tbody tr")
    assert rows.count() == len(look.heads)
    for i, metric in enumerate(look.heads):
        shown = read_number(rows.nth(i).locator("td").first.inner_text())
        assert shown == pytest.approx(metric.values[7][4], rel=6e-3), metric.name
    assert look.labels[0].values[7][4] in page.inner_text("#head-card")


def test_clicking_a_head_with_a_map_opens_it_in_the_inspector(page, look):
    for item in look.maps[::-1]:
        click_head(page, item.layer, item.head)
        assert page.input_value("#map-pick") == str(look.maps.index(item))


def test_choosing_a_map_chooses_its_head(page, look):
    page.select_option("#map-pick", "1")
    assert page.input_value("#pick-layer") == str(look.maps[1].layer)
    assert page.input_value("#pick-head") == str(look.maps[1].head)


def strip_colour(page, position: int) -> str:
    return page.evaluate(f"getComputedStyle(document.querySelector('#strip [data-i=\"{position}\"]')).backgroundColor")


def test_token_strip_follows_the_layer(page, look):
    position = 512 // 9
    mean = strip_colour(page, position)
    page.select_option("#strip-layer", "10")
    assert strip_colour(page, position) != mean
    token = page.locator(f'#strip [data-i="{position}"]')
    token.scroll_into_view_if_needed()
    box = token.bounding_box()
    shown = hover(page, box["x"] + 3, box["y"] + 8)
    assert f"Position {position}" in shown
    value = float(shown.split("receives ")[1].split(" ")[0])
    assert value == pytest.approx(look.received[10][position], rel=6e-3)
    assert "secondary" in shown


def test_token_strip_is_read_by_the_keyboard(page):
    page.focus("#strip")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#strip-reading").startswith("Position 1")


def test_sinks_are_marked_and_line_breaks_kept(page, look):
    assert page.locator('#strip [data-i="0"]').get_attribute("class") == "sink"
    assert page.locator("#strip .sink").count() == 1
    breaks = sum("\n" in token for token in look.tokens)
    assert page.locator("#strip br").count() == breaks > 0


def test_indentation_after_a_break_starts_the_next_line(unusual):
    token = unusual.page.locator('#strip [data-i="3"]')
    parts = token.evaluate("(span) => [...span.childNodes].map((part) => part.textContent || part.nodeName)")
    assert parts == ["↵", "BR", "    "]


def ramp_position(page, look: Look, layer: int, position: int) -> float:
    """Where a token's colour should stand between the quiet tokens and the strongest."""
    values = np.sort([v for row in look.received for v in row if v > 0])
    low, high = values[int(len(values) * 0.05)], values[-1]
    return math.log(look.received[layer][position] / low) / math.log(high / low)


def test_strip_colours_are_logarithmic(page, look):
    page.select_option("#strip-layer", "9")
    shown = []
    for position in (0, 7, 256, 300):
        channels = [int(c) for c in strip_colour(page, position).strip("rgba()").split(",")[:3]]
        shown.append((ramp_position(page, look, 9, position), sum(channels)))
    ordered = sorted((max(0.0, t), brightness) for t, brightness in shown if t > 0.05)
    assert len(ordered) >= 2
    assert [b for _, b in ordered] == sorted((b for _, b in ordered), reverse=True)


def test_detail_window_shows_every_weight_with_its_tokens(page, look):
    page.select_option("#map-pick", "0")
    item = look.maps[0]
    index = len(item.windows) - 1
    window = item.windows[index]
    page.locator(f'#map-whole [data-window="{index}"]').click()
    assert f"queries {window.row} to {window.row + window.size - 1}" in page.inner_text("#inspector")
    canvas = page.locator("#map-detail canvas")
    assert canvas.get_attribute("width") == str(window.size)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    row, column = window.size - 3, 5
    step = box["width"] / window.size
    shown = hover(page, box["x"] + (column + 0.3) * step, box["y"] + (row + 0.5) * step)
    weights = np.frombuffer(base64.b64decode(window.pixels), np.uint8).reshape(window.size, window.size)
    assert f"query {window.row + row:,}" in shown
    assert f"key {window.column + column:,}" in shown
    assert look.tokens[window.row + row].strip() in shown
    assert read_number_after(shown, "weight ") == pytest.approx((weights[row, column] / 255) ** 2, rel=6e-3)
    assert f"Query {window.row + row:,}" in page.inner_text("#map-context")


def read_number_after(text: str, word: str) -> float:
    shown = text.split(word)[1].split("\n")[0]
    digits, _, power = shown.partition("×10")
    return read_number(digits) * 10 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)


def test_whole_map_draws_the_bytes_it_was_given(page, look):
    page.select_option("#map-pick", "0")
    item = look.maps[0]
    bytes_ = np.frombuffer(base64.b64decode(item.pixels), np.uint8)
    drawn = page.evaluate(
        "() => { const c = document.querySelector('#map-whole canvas');"
        " return Array.from(c.getContext('2d').getImageData(0, 0, c.width, c.height).data); }"
    )
    brightness = np.array(drawn).reshape(-1, 4)[:, :3].sum(1)
    order = np.argsort(bytes_, kind="stable")
    assert (np.diff(brightness[order]) <= 6).all()
    assert brightness[bytes_.argmax()] < brightness[bytes_.argmin()] - 200


def test_map_is_read_by_the_keyboard(page):
    page.focus("#map-detail canvas")
    page.keyboard.press("ArrowDown")
    assert "Query" in page.inner_text("#map-context")


def test_strongest_pairs_and_keys_show_tokens(page, look):
    page.select_option("#map-pick", "2")
    item = look.maps[2]
    shown = page.inner_text("#inspector")
    query, key, _ = item.pairs[0]
    assert f"{query:,}" in shown
    assert f"{key:,}" in shown
    page.locator("#inspector table .link").first.click()
    assert page.inner_text("#map-context").startswith(f"Query {query:,}")
    assert "<|im_start|>" in shown


def test_secondary_and_pattern_sections_show_what_is_there(page, look):
    shown = page.inner_text("#secondary")
    assert look.secondary["sentence"] in shown
    for heading in (
        "Primary sink",
        "Lifetimes",
        "Levels",
        "Where it is written",
        "Does the norm decide?",
        "Sink score",
    ):
        assert heading in shown
    patterns = page.inner_text("#patterns")
    for word, count in look.patterns["counts"].items():
        assert word in patterns
        assert str(count) in patterns
    assert page.locator("#channel-energy .hm, #channel-energy image").count() >= 1


def test_every_control_has_a_name(page):
    nameless = page.evaluate(
        "() => [...document.querySelectorAll('input, select')].filter((n) => !n.labels.length)"
        ".concat([...document.querySelectorAll('button')].filter((n) => !(n.innerText.trim() || n.ariaLabel)))"
        ".map((n) => n.outerHTML)"
    )
    assert nameless == []


RAMP = f"document.querySelector('{GRID}').data[0].colorscale.map((c) => c[1])"


def luminances(colours: list[str]) -> list[float]:
    linear = [[(int(c[i : i + 2], 16) / 255) ** 2.2 for i in (1, 3, 5)] for c in colours]
    return [0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in linear]


def test_colours_run_away_from_the_page_in_both_themes_and_in_print(page):
    light = page.evaluate(RAMP)
    page.emulate_media(color_scheme="dark")
    until(page, f"{RAMP}[0] !== '{light[0]}'")
    dark = page.evaluate(RAMP)
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    printed = page.evaluate(RAMP)
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    page.emulate_media(color_scheme="light")
    until(page, f"{RAMP}[0] === '{light[0]}'")
    assert (np.diff(luminances(light)) < 0).all()
    assert (np.diff(luminances(dark)) > 0).all()
    assert printed == light
    assert sum(int(c) for c in paper.strip("rgb()").split(",")) > 700


@pytest.fixture(scope="module")
def hostile(open_file, tmp_path_factory):
    look = synthetic_look(layers=12, heads=4, tokens=256, maps=2, side=64, hostile=True)
    look.findings.append("1 " + "unbroken" * 60)
    return look, open_file(saved(look, tmp_path_factory.mktemp("hostile"), "hostile"), width=390)


def test_hostile_tokens_are_text_and_never_run(hostile):
    look, opened = hostile
    page = opened.page
    strip = page.inner_text("#strip")
    for token in HOSTILE[:4]:
        assert token in strip
    assert "⟨U+202E⟩evil" in strip
    assert "⟨U+D83D⟩" in strip
    assert HOSTILE[0] in hover_head(page, 1, 1, layers=12, heads=4)
    for index in range(len(look.heads) + 1):
        page.check(f"#metric-{index}")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, b > b, #strip script").count() == 0
    assert opened.errors == []
    assert opened.outside() == []


@pytest.mark.parametrize("width", [390, 820, 1280])
def test_nothing_runs_off_the_side_even_with_hostile_text(hostile, width):
    page = hostile[1].page
    page.set_viewport_size({"width": width, "height": 900})
    inside = f"(plot) => plot.getBoundingClientRect().right <= {width}"
    until(page, f"[...document.querySelectorAll('.main-svg')].every({inside})")
    assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.fixture(scope="module")
def unusual(open_file, tmp_path_factory):
    """A text longer than a page of the strip, with free-form results of other shapes than the usual ones."""
    look = synthetic_look(layers=4, heads=2, tokens=6000, maps=1, side=256)
    look.tokens[3] = "\n    "
    look.secondary = {
        "reason": "a reason",
        "primary": None,
        "levels": {"levels": [{"start": 1, "lifetime": 2, "tokens": 3}]},
        "stages": {"7": {"input": 0.1, "down": 0.99}, "9": {"input": 0.2, "down": None}},
        "triggers": [{"layer": 7, "spaces": {"down": {"separation": 0.9}}}],
        "norms": {"hidden": {"primary": [1.0, 2.0, 3.0, 4.0]}},
        "list": [[1, 2], [3]],
        "none": None,
    }
    look.patterns = {
        "counts": {"a": 1},
        "channels": {"energy": [[0.1, 0.9]]},
        "bounds": [{"layer": n, "change": 1.0 * n, "bound": 2.5 * n} for n in range(4)],
        "more": {"x": True},
    }
    return open_file(saved(look, tmp_path_factory.mktemp("unusual"), "unusual"))


def test_long_input_is_turned_in_pages(unusual):
    page = unusual.page
    assert page.locator("#strip span").count() == 4096
    page.select_option("#strip-page", "1")
    assert page.locator("#strip span").count() == 6000 - 4096
    assert page.locator('#strip [data-i="5999"]').count() == 1


def test_missing_things_leave_no_code_words_in_the_text(unusual):
    text = unusual.page.inner_text("body")
    for word in ("null", "undefined", "NaN", "[object"):
        assert word not in text


def test_free_form_results_of_other_shapes_are_shown(unusual):
    page = unusual.page
    shown = page.inner_text("#secondary")
    for text in ("a reason", "Levels", "Where it is written", "Separation"):
        assert text in shown
    page.locator("#secondary summary", has_text="More numbers").click()
    assert "[" not in page.inner_text("#secondary")
    assert page.locator("#secondary details .js-plotly-plot").count() == 1
    assert unusual.errors == []
    assert "could not be drawn" not in page.inner_text("body")


def test_sparse_look_says_what_is_missing(open_file, tmp_path):
    sparse = synthetic_look(layers=4, heads=2, tokens=16, maps=0)
    sparse.secondary = {"found": False}
    sparse.patterns = {}
    sparse.received = []
    sparse.layers = []
    sparse.labels = []
    opened = open_file(saved(sparse, tmp_path, "sparse"))
    text = opened.page.inner_text("main")
    assert "No secondary sink was found." in text
    assert "Received mass was not measured" in text
    assert "No maps were kept." in text
    assert opened.page.locator("#patterns, #layers, #inspector").count() == 0
    assert opened.errors == []
