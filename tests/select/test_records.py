"""Reading a corpus: every record with its place, and no row that is dropped in silence."""

from __future__ import annotations

import gzip
import json

import pytest

from headway.errors import ArgumentError, HostError
from headway.select.records import BadRow, Cursor, Reading, find_sources, rows_of
from headway.select.shards import make_plan
from tests.select.standins import text, write_corpus


def scan(path, **reading):
    sources, _ = find_sources([path])
    return [row for source in sources for row in rows_of(source, Reading(**reading)).scan()]


class TestJsonLines:
    def test_a_record_knows_its_line_id_and_domain(self, tmp_path):
        write_corpus(tmp_path, records=4, files=1)
        found = scan(tmp_path, id_field="id", domain_field="kind")
        assert [(r.line, r.id, r.domain) for r in found] == [
            (1, "r0", "even"), (2, "r1", "odd"), (3, "r2", "even"), (4, "r3", "odd")]  # fmt: skip

    def test_gzip_reads_as_its_content(self, tmp_path):
        write_corpus(tmp_path / "plain", records=5, files=1)
        packed = tmp_path / "packed"
        packed.mkdir()
        with gzip.open(packed / "a.jsonl.gz", "wb") as file:
            file.write((tmp_path / "plain" / "part-0.jsonl").read_bytes())
        assert [r.text for r in scan(packed)] == [r.text for r in scan(tmp_path / "plain")]

    @pytest.mark.parametrize(
        ("line", "reason"),
        [
            (b"{not json", "not JSON"),
            (b"[1, 2]", "a JSON list"),
            (b'{"words": "x"}', "no field 'text'"),
            (b'{"text": 7}', "int under 'text'"),
            (b'{"text": "  "}', "empty"),
            (b'{"text": "\xff"}', "not UTF-8"),
            (b'{"text": "\\ud800"}', "half of a character pair"),
        ],
    )
    def test_a_bad_row_is_named_by_its_line(self, tmp_path, line, reason):
        (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "good too"}\n')
        rows = scan(tmp_path)
        bad = [row for row in rows if isinstance(row, BadRow)]
        assert [row.line for row in bad] == [3]
        assert reason in bad[0].reason
        assert [row.text for row in rows if not isinstance(row, BadRow)] == ["good", "good too"]

    def test_a_record_is_found_again_by_its_place(self, tmp_path):
        write_corpus(tmp_path, records=9, files=2)
        sources, _ = find_sources([tmp_path])
        cursor = Cursor(Reading())
        for source in reversed(sources):
            for row in reversed(list(rows_of(source, Reading()).scan())):
                assert cursor.fetch(source, row.line, row.offset) == row

    def test_a_damaged_gzip_gives_what_is_whole_and_says_where_it_ends(self, tmp_path):
        whole = gzip.compress(b"".join(json.dumps({"text": text(n)}).encode() + b"\n" for n in range(2000)))
        (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
        rows = scan(tmp_path)
        assert isinstance(rows[-1], BadRow)
        assert "cannot be read from here on" in rows[-1].reason


class TestTexts:
    def test_paragraphs_and_lines_are_records(self, tmp_path):
        (tmp_path / "a.txt").write_text("One line.\nStill one.\n\n\nAnother.\n", encoding="utf-8")
        assert [r.text for r in scan(tmp_path, split="paragraph")] == ["One line.\nStill one.", "Another."]
        assert [(r.line, r.text) for r in scan(tmp_path, split="line")] == [
            (1, "One line."), (2, "Still one."), (5, "Another.")]  # fmt: skip
        assert len(scan(tmp_path, split="file")) == 1

    def test_the_folder_can_be_the_domain(self, tmp_path):
        for name in ("law", "code"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "a.txt").write_text(f"About {name}.", encoding="utf-8")
        assert [r.domain for r in scan(tmp_path, domain_field="@folder")] == ["code", "law"]


class TestParquet:
    def test_rows_come_with_all_their_columns_when_asked(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"text": [text(n) for n in range(700)], "n": list(range(700))})
        parquet.write_table(table, tmp_path / "a.parquet", row_group_size=300)
        found = scan(tmp_path)
        assert [r.line for r in found] == list(range(1, 701))
        sources, _ = find_sources([tmp_path])
        cursor = Cursor(Reading(), whole=True)
        assert cursor.fetch(sources[0], 650, 0).row["n"] == 649
        assert cursor.fetch(sources[0], 2, 0).row["n"] == 1

    def test_a_bad_row_is_named_by_its_number(self, tmp_path):
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        table = pyarrow.table({"text": ["good", None, " ", "good too"], "kind": ["a", "b", "c", None]})
        parquet.write_table(table, tmp_path / "a.parquet")
        bad = {row.line: row.reason for row in scan(tmp_path, domain_field="kind") if isinstance(row, BadRow)}
        assert set(bad) == {2, 3, 4}
        assert "NoneType under 'text'" in bad[2]
        assert "empty" in bad[3]
        assert "no domain under 'kind'" in bad[4]

    def test_a_file_that_is_no_parquet_is_a_bad_row(self, tmp_path):
        pytest.importorskip("pyarrow")
        (tmp_path / "a.parquet").write_bytes(b"nothing of the kind")
        (bad,) = scan(tmp_path)
        assert "cannot be read" in bad.reason


class TestPlan:
    def plan(self, folder, out, **options):
        sources, _ = find_sources([folder])
        return make_plan(sources, Reading(), out, **options)

    def test_bad_rows_are_refused_with_their_lines(self, tmp_path):
        folder = write_corpus(tmp_path / "c", records=6, files=1)
        with open(folder / "part-0.jsonl", "a", encoding="utf-8") as file:
            file.write('{"other": 1}\nbroken\n')
        with pytest.raises(ArgumentError, match=r"2 of 8 rows.*line 7 of part-0.jsonl.*line 8.*--bad-rows skip"):
            self.plan(folder, tmp_path / "out")
        plan = self.plan(folder, tmp_path / "out", bad_rows="skip")
        assert (plan.rows, plan.kept, plan.left_out["bad"]) == (8, 6, 2)
        listed = [json.loads(line) for line in plan.left_out_file.read_text().splitlines()]
        assert [(row["file"], row["line"], row["why"]) for row in listed] == [
            ("part-0.jsonl", 7, "bad"), ("part-0.jsonl", 8, "bad")]  # fmt: skip

    def test_copies_are_left_out_and_listed(self, tmp_path):
        folder = write_corpus(tmp_path / "c", records=6, files=1)
        with open(folder / "part-0.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps({"text": text(2)}) + "\n")
        plan = self.plan(folder, tmp_path / "out")
        assert plan.kept == 6
        (row,) = [json.loads(line) for line in plan.left_out_file.read_text().splitlines()]
        assert (row["line"], row["why"], row["detail"]["line"]) == (7, "copy", 3)
        assert self.plan(folder, tmp_path / "out", dedup="none").kept == 7

    def test_near_copies_are_found(self, tmp_path):
        long = " ".join(f"word{n}" for n in range(200))
        (tmp_path / "c").mkdir()
        texts = [long, long.replace("word7 ", "other "), " ".join(f"else{n}" for n in range(200))]
        (tmp_path / "c" / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
        assert self.plan(tmp_path / "c", tmp_path / "out").kept == 3
        assert self.plan(tmp_path / "c", tmp_path / "out", dedup="near").kept == 2

    def test_the_same_corpus_gives_the_same_plan_and_a_changed_one_another(self, tmp_path):
        folder = write_corpus(tmp_path / "c", records=300)
        first, again = (self.plan(folder, tmp_path / "out") for _ in range(2))
        assert first == again
        assert sum(first.sizes()) == 300
        (folder / "part-0.jsonl").open("a").write(json.dumps({"text": "one more"}) + "\n")
        assert self.plan(folder, tmp_path / "out").sha256 != first.sha256

    def test_a_corpus_without_a_usable_record_is_refused(self, tmp_path):
        (tmp_path / "a.jsonl").write_text('{"text": ""}\n')
        with pytest.raises(ArgumentError, match="no usable record"):
            self.plan(tmp_path, tmp_path / "out", bad_rows="skip")


@pytest.mark.parametrize(("given", "words"), [("-", "twice"), ("nowhere", "no file or folder")])
def test_a_corpus_that_is_not_there_is_refused(given, words):
    with pytest.raises((ArgumentError, HostError), match=words):
        find_sources([given])


def test_a_folder_without_texts_says_what_is_read(tmp_path):
    (tmp_path / "a.pdf").write_bytes(b"x")
    with pytest.raises(ArgumentError, match=r"a\.pdf.*\.jsonl"):
        find_sources([tmp_path])


def test_a_file_named_twice_is_refused(tmp_path):
    write_corpus(tmp_path, records=2, files=1)
    with pytest.raises(ArgumentError, match="twice"):
        find_sources([tmp_path, tmp_path / "part-0.jsonl"])


def test_what_a_run_writes_is_no_part_of_its_corpus(tmp_path):
    write_corpus(tmp_path / "corpus", records=2, files=1)
    out = write_corpus(tmp_path / "corpus" / "out" / "state", records=3, files=1).parent
    names = [source.name for source in find_sources([tmp_path / "corpus"], out=out)[0]]
    assert names == ["part-0.jsonl"]
    assert len(find_sources([tmp_path / "corpus"])[0]) == 2
    beside = find_sources([tmp_path / "corpus"], out=tmp_path)[0]
    assert len(beside) == 2, "a corpus inside the folder of the run is read whole"


def test_a_run_does_not_overwrite_its_corpus(tmp_path):
    (tmp_path / "selected.jsonl").write_text('{"text": "words"}\n', encoding="utf-8")
    for given in (tmp_path, tmp_path / "selected.jsonl"):
        with pytest.raises(ArgumentError, match="Name another folder with --out"):
            find_sources([given], out=tmp_path)
    assert len(find_sources([tmp_path / "selected.jsonl"], out=tmp_path / "out")[0]) == 1
