"""The evidence pages: complete, literal, deterministic, and equal to what is in the repository."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from headway.errors import ArgumentError
from headway.evidence import (
    EditedRecordError,
    Measurement,
    PaperValue,
    prove,
    record_run,
    render_html,
    render_markdown,
    write_evidence,
)

from .examples import CRITERIA, claim, recipe, two_claims

ROOT = Path(__file__).parents[2]
MALICIOUS = '<script>alert("x")</script> | [click](javascript:x) `code` <img src=x onerror=y> *bold* &amp;\nsecond line'


class Page(HTMLParser):
    """Tags and text of a page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture
def evidence(tmp_path):
    """A folder with two recorded papers: one claim each of holds, fails and inconclusive."""
    record_run(prove(recipe(), out=tmp_path / "runs", show_progress=False), tmp_path)
    failing = claim(measured=Measurement(0.2, 0.1, 0.3, n=5), baseline=Measurement(0.4), notes="Tried three seeds.")
    other = recipe(
        slug="another-paper", title="Another", run=lambda c: [failing], criteria={"larger": CRITERIA["larger"]}
    )
    record_run(prove(other, out=tmp_path / "runs", show_progress=False), tmp_path)
    return tmp_path / "evidence"


def record_malicious(folder: Path) -> None:
    bad = claim(
        statement=MALICIOUS,
        notes=MALICIOUS,
        paper=PaperValue(MALICIOUS),
        measured=Measurement(1.5, 1.4, 1.6, unit="<b>"),
    )
    made = recipe(title=MALICIOUS, run=lambda context: [bad, two_claims(context)[1]])
    record_run(prove(made, out=folder / "runs", show_progress=False), folder)


class TestMarkdown:
    def test_counts_stand_first_for_every_paper(self, evidence):
        lines = render_markdown(evidence).splitlines()
        assert [line for line in lines if line.startswith("| [")] == [
            f"| [Another](#another-paper) | 0 | 1 | 0 | small | {lines_date(lines)} |",
            f"| [A planted paper](#planted-paper) | 1 | 0 | 1 | small | {lines_date(lines)} |",
        ]
        assert "| **all** | **1** | **1** | **1** | | |" in lines

    def test_a_claim_shows_paper_measurement_criterion_and_verdict(self, evidence):
        text = render_markdown(evidence)
        assert (
            "| The method is larger. | 1.7 (7B model, Table 2) | 1.5 \\[1.4, 1.6\\] × (n = 20, 2 seeds) "
            "| measured ≥ 1.3 (whole interval) | **holds** |"
        ) in text

    def test_failures_and_doubts_are_shown_with_their_reasons(self, evidence):
        text = render_markdown(evidence)
        assert "| **fails** |" in text
        assert "- `larger` **fails**: measured is 0.2 \\[0.1, 0.3\\], not ≥ 1.3. Tried three seeds." in text
        assert "**inconclusive**: requirement not met: accuracy is 0.4, not ≥ 0.9. The toy did not learn." in text
        assert "baseline 0.4" in text

    def test_every_table_row_has_the_columns_of_its_header(self, tmp_path):
        record_malicious(tmp_path)
        width = None
        for line in render_markdown(tmp_path / "evidence").splitlines():
            if not line.startswith("|"):
                width = None
                continue
            cells = len(re.findall(r"(?<!\\)\|", line))
            width = width or cells
            assert cells == width, line

    def test_a_malicious_statement_is_text(self, tmp_path):
        record_malicious(tmp_path)
        text = render_markdown(tmp_path / "evidence")
        assert re.findall(r"(?<!\\)<(?!a id=\"planted-paper\">|/a>)", text) == []
        assert re.search(r"(?<!\\)\]\(javascript", text) is None

    def test_an_empty_folder_says_so(self, tmp_path):
        assert "Nothing is recorded yet" in render_markdown(tmp_path)

    def test_a_missing_folder_raises(self, tmp_path):
        with pytest.raises(ArgumentError, match="which is no folder"):
            render_markdown(tmp_path / "missing")

    def test_a_record_under_another_name_raises(self, evidence):
        (evidence / "another-paper.json").rename(evidence / "copy.json")
        with pytest.raises(ArgumentError, match=r"copy\.json: got the record of 'another-paper'"):
            render_markdown(evidence)

    def test_an_edited_record_is_not_rendered(self, evidence):
        path = evidence / "another-paper.json"
        path.write_text(path.read_text().replace('"verdict": "fails"', '"verdict": "holds"'))
        with pytest.raises(EditedRecordError, match="edited by hand"):
            render_markdown(evidence)


class TestHtml:
    def test_the_page_needs_no_network_and_no_script(self, evidence):
        page = Page(render_html(evidence))
        assert {tag for tag, _ in page.tags} & {"script", "link", "img", "iframe", "object"} == set()
        links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
        assert links == ["#another-paper", "#planted-paper"]
        assert [a["id"] for tag, a in page.tags if tag == "h2"] == ["another-paper", "planted-paper"]

    def test_every_verdict_is_shown(self, evidence):
        page = Page(render_html(evidence))
        shown = [a["class"] for tag, a in page.tags if tag == "td" and "verdict" in (a.get("class") or "")]
        assert shown == ["verdict fails", "verdict holds", "verdict inconclusive"]

    def test_both_pages_show_the_same_numbers(self, evidence):
        markdown = render_markdown(evidence).replace("\\", "")
        page = Page(render_html(evidence))
        cells = [text.strip() for text in page.text if text.strip() and "{" not in text]
        measured = [cell for cell in cells if "1.5 [1.4, 1.6]" in cell or "0.2 [0.1, 0.3]" in cell]
        assert measured
        assert all(cell.lstrip(": ") in markdown for cell in measured)

    def test_a_malicious_statement_is_text(self, tmp_path):
        record_malicious(tmp_path)
        page = Page(render_html(tmp_path / "evidence"))
        assert {"script", "img", "b"} & {tag for tag, _ in page.tags} == set()
        assert any('<script>alert("x")</script>' in text for text in page.text)

    def test_an_empty_folder_says_so(self, tmp_path):
        assert any("Nothing is recorded yet" in text for text in Page(render_html(tmp_path)).text)


class TestFiles:
    def test_the_same_records_give_the_same_bytes(self, evidence):
        assert render_markdown(evidence) == render_markdown(evidence)
        assert render_html(evidence) == render_html(evidence)

    def test_both_pages_are_written(self, evidence):
        root = evidence.parent
        markdown, page = write_evidence(root)
        assert (markdown, page) == (root / "EVIDENCE.md", root / "docs" / "evidence.html")
        assert markdown.read_text() == render_markdown(evidence)
        assert page.read_text() == render_html(evidence)

    def test_the_pages_in_the_repository_are_what_the_records_give(self):
        folder = ROOT / "evidence"
        recorded = folder.is_dir() and any(folder.glob("*.json"))
        for path, render in ((ROOT / "EVIDENCE.md", render_markdown), (ROOT / "docs" / "evidence.html", render_html)):
            if recorded or path.exists():
                folder.mkdir(exist_ok=True)
                assert path.read_text(encoding="utf-8") == render(folder), "run `headway evidence`"


def lines_date(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("| [Another]")).split("|")[-2].strip()
