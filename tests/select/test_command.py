"""The command on a tiny model: what it writes, that a second call finds it, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.errors import HeadwayError
from headway.select import CorpusSelection
from headway.select.command import parse_heads
from tests.look.tiny import byte_tokenizer, tiny_llama
from tests.select.made import made
from tests.select.standins import text, write_corpus


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(num_hidden_layers=2).save_pretrained(folder)
    byte_tokenizer(bos=True).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("corpus"), records=20)


def call(*arguments):
    return CliRunner().invoke(app, ["select", *map(str, arguments)])


def select(corpus, model, out, *more):
    options = ["--model", model, "--heads", "1.0,1.1", "--id-field", "id", "--domain-field", "kind", "--out", out]
    return call(corpus, *options, "--floor", "0", *more)


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_fifth_of_each_domain_is_written_with_its_own_fields(corpus, model, tmp_path):
    done = select(corpus, model, tmp_path)
    assert done.exit_code == 0, done.output
    table, kept = rows(tmp_path / "scores.jsonl"), rows(tmp_path / "selected.jsonl")
    assert len(table) == 20
    assert len(kept) == 4
    for kind in ("even", "odd"):
        mine = sorted((r for r in table if r["domain"] == kind), key=lambda r: -r["influence"])
        assert [r["selected"] for r in mine] == [True] * 2 + [False] * 8
        assert {r["id"] for r in kept if r["kind"] == kind} == {r["id"] for r in mine[:2]}
    one = kept[0]
    assert one["text"] == text(int(one["id"][1:]))
    assert one["extra"] == [int(one["id"][1:])]
    assert (tmp_path / "select.html").exists()


def test_a_second_call_scores_nothing_and_writes_the_same(corpus, model, tmp_path):
    select(corpus, model, tmp_path)
    before = (tmp_path / "scores.jsonl").read_bytes(), (tmp_path / "selected.jsonl").read_bytes()
    done = select(corpus, model, tmp_path, "--json")
    found = CorpusSelection.from_json(done.stdout)
    assert found.run["shards_found"] == found.run["shards"]
    assert before == ((tmp_path / "scores.jsonl").read_bytes(), (tmp_path / "selected.jsonl").read_bytes())


def test_a_run_inside_its_corpus_is_found_again(model, tmp_path):
    folder = write_corpus(tmp_path, records=20)
    first, again = (CorpusSelection.from_json(select(folder, model, folder / "out", "--json").stdout) for _ in range(2))
    assert again.corpus == first.corpus
    assert again.run["shards_found"] == again.run["shards"]


def test_parquet_in_is_parquet_out(model, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "c").mkdir()
    table = pyarrow.table({"text": [text(n) for n in range(10)], "n": list(range(10))})
    parquet.write_table(table, tmp_path / "c" / "a.parquet")
    done = call(tmp_path / "c", "--model", model, "--heads", "1.0", "--floor", "0", "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    kept = parquet.read_table(tmp_path / "out" / "selected.parquet").to_pylist()
    assert len(kept) == 2
    assert all(row["text"] == text(row["n"]) for row in kept)


def test_a_model_without_retrieval_heads_is_refused(corpus, model, tmp_path):
    options = ["--probes", "2", "--probe-tokens", "700", "--out", tmp_path]
    done = call(corpus, "--model", model, *options)
    assert done.exit_code == 1
    assert "retrieval heads" in str(done.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--share", "0"], "share"),
        (["--engine", "spark"], "local, ray"),
        (["--write", "csv"], "jsonl"),
        (["--split", "page"], "paragraph"),
        (["--bad-rows", "drop"], "refuse, skip"),
        (["--dedup", "some"], "exact"),
        (["--heads", "one"], "layer.head"),
        (["--heads", "9.9"], "9"),
        (["--heads", "none.json"], "no file"),
        (["--heads", "1.0", "--threshold", "0.3"], "--threshold"),
        (["--text-field", "words"], "no field 'words'"),
        (["--domain-field", "place"], "no domain under 'place'"),
        (["--controls", "-1"], "controls"),
        (["--threads", "0"], "threads"),
        (["--engine", "ray", "--workers", "0"], "workers"),
        (["--probes", "0"], "samples"),
        (["--repetition-weight", "-1"], "repetition_weight"),
    ],
)
def test_wrong_arguments_are_refused_with_what_was_expected(corpus, model, tmp_path, options, words):
    options = options if "--heads" in options else [*options, "--heads", "1.0"]
    done = call(corpus, "--model", model, "--out", tmp_path / "out", *options)
    assert done.exit_code == 1
    assert isinstance(done.exception, HeadwayError)
    assert words in str(done.exception)


@pytest.mark.parametrize(
    ("options", "words"),
    [(["--context", "1"], "context: got 1"), (["--batch-tokens", "0"], "batch_tokens"), (["--floor", "-1"], "floor")],
)
def test_wrong_numbers_are_refused_before_heads_are_looked_for(corpus, model, tmp_path, options, words, monkeypatch):
    monkeypatch.setattr("headway.select.selecting.find_heads", lambda *_: pytest.fail("heads were looked for"))
    done = call(corpus, "--model", model, "--out", tmp_path, *options)
    assert isinstance(done.exception, HeadwayError)
    assert words in str(done.exception)


def test_heads_are_read_as_layer_and_head():
    assert parse_heads("18.6, 3.10") == [(18, 6), (3, 10)]


def test_a_result_survives_its_json():
    found = made()
    again = CorpusSelection.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    assert math.isnan(again.domains[1].threshold)


def test_findings_say_what_was_kept_and_warnings_what_to_doubt():
    found = made()
    assert found.findings[0].startswith("6 of 60 ranked records are kept")
    assert any("Influence goes with length" in warning for warning in found.warnings)
    assert any("line 3 of a.jsonl" in warning for warning in found.warnings)
