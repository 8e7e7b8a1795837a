"""`headway diagnose position`: sets from folders and texts, resumable parts, findings of planted encoders, the page."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from typer.testing import CliRunner

from headway.cli import app
from headway.diagnose.position import Options, Position, default_set, diagnose_position, read_documents
from headway.diagnose.position import command as module
from headway.diagnose.position.analysing import edges_for
from headway.errors import ArgumentError, HeadwayError, HostError
from headway.evidence.recipes import _posir_toy as toy
from headway.methods.diagnosis.posir import (
    Query,
    RetrievalSet,
    TransformersEncoder,
    WordEncoder,
    from_corpus,
    settle_positives,
    write_set,
)
from headway.tasks.positioned_evidence import topic_corpus

FAST = Options(edges=(12, 24, 36), resamples=60, moved=4, saliency=6, batch=2)


@pytest.fixture(scope="module")
def sets():
    return [
        from_corpus(toy.corpus(40, np.random.default_rng(seed), asked=3, others=0), name=name)
        for seed, name in enumerate(("law", "<img src=x onerror=alert(1)>"))
    ]


@pytest.fixture(scope="module")
def found(sets):
    return diagnose_position(sets, toy.bi_encoder(0, name="toy"), options=FAST, name="toy <b>model</b>")


def planted():
    return from_corpus(topic_corpus(300, np.random.default_rng(0), sizes=(40, 400), topics=5))


def test_every_part_is_there(found):
    assert [one.name for one in found.retrievers] == ["toy", "bm25"]
    for one in found.retrievers:
        assert one.overall["queries"] == 240
        assert list(one.buckets) == ["Q1 (0, 12]", "Q2 (12, 24]", "Q3 (24, 36]", "Q4 (36, ∞)"]
        assert set(one.measures) == {"ndcg", "map", "precision", "recall", "reciprocal_rank"}
    assert len(found.saliency["mean"]) == len(found.saliency["attention"]) == 100
    assert len(found.queries) == 240
    assert {row["domain"] for row in found.queries} == {"law", "<img src=x onerror=alert(1)>"}
    assert found.run["settings"]["edges"] == [12, 24, 36]


@pytest.mark.parametrize(("decay", "words"), [(6.0, "less often"), (-6.0, "more often")])
def test_findings_tell_a_planted_direction(decay, words):
    options = Options(edges=(100, 200, 300), resamples=100)
    found = diagnose_position([planted()], WordEncoder(decay=decay), options=options)
    told = next(line for line in found.findings if "(all lengths)" in line)
    assert words in told
    assert "more than chance" in told
    moved = next(line for line in found.findings if line.startswith("Moved from start"))
    assert ("by −" in moved) == (decay > 0)
    assert any("leaves the score of bm25" in line for line in found.findings)
    assert found.saliency is None
    assert any("No saliency" in line for line in found.warnings)


def test_a_model_that_cuts_is_named_and_not_called_biased():
    found = diagnose_position([planted()], WordEncoder(max_tokens=100), options=Options(resamples=50, moved=0))
    assert found.run["settings"]["edges"] == [25, 50, 100]
    (told,) = (line for line in found.warnings if "reads 100 tokens" in line)
    assert "Q4 (100, ∞)" in told
    assert found.retrievers[0].reading["Q4 (100, ∞)"][1] > 0.3
    assert not any("Q4" in line for line in found.findings)


def test_edges_are_the_papers_where_the_model_reads_beyond_them():
    assert edges_for(None) == edges_for(8192) == (512, 1024, 1536)
    assert edges_for(512) == (128, 256, 512)
    assert edges_for(3) == (1, 2, 3)


def test_a_result_survives_its_json_and_its_csv(found):
    again = Position.from_json(found.to_json())
    assert again.to_json() == found.to_json()
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert len(rows) == 240
    assert float(rows[5]["ndcg toy"]) == found.queries[5]["ndcg toy"]
    assert rows[0]["bucket"] in ("Q1", "Q2", "Q3", "Q4")


def test_an_interrupted_diagnosis_goes_on(sets, found, tmp_path):
    def stop(what, done, total):
        if "gradients" in what:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diagnose_position(sets, toy.bi_encoder(0, name="toy"), options=FAST, out=tmp_path, progress=stop)
    encoder = toy.bi_encoder(0, name="toy")
    encoder.encode = lambda texts, is_query: pytest.fail("encoded again")
    again = diagnose_position(sets, encoder, options=FAST, out=tmp_path)
    assert again.retrievers[0].overall["means"] == pytest.approx(found.retrievers[0].overall["means"], nan_ok=True)
    np.testing.assert_allclose(again.saliency["mean"], found.saliency["mean"], atol=1e-5)


def test_a_damaged_part_is_made_again(sets, found, tmp_path, caplog):
    diagnose_position(sets, toy.bi_encoder(0, name="toy"), options=FAST, out=tmp_path)
    parts = list((tmp_path / "parts").iterdir())
    assert {path.name.split("-")[0] for path in parts} == {"embeddings", "saliency"}
    for path in parts:
        path.write_bytes(path.read_bytes()[:-40])
    again = diagnose_position(sets, toy.bi_encoder(0, name="toy"), options=FAST, out=tmp_path)
    assert all(path.name in caplog.text for path in parts)
    assert again.retrievers[0].overall["means"] == pytest.approx(found.retrievers[0].overall["means"], nan_ok=True)
    np.testing.assert_allclose(again.saliency["mean"], found.saliency["mean"], atol=1e-5)


def test_the_page_holds_text_as_text(found):
    page = found.to_html()
    assert "<b>model</b>" not in page
    assert "<img src=x" not in page


def test_questions_are_made_from_a_folder_or_lines(tmp_path):
    text = " ".join(f"The {w} w{i} met a{i % 8} w{i + 40} n{i} today." for i, w in enumerate(["w1", "w2"] * 15))
    (tmp_path / "one.txt").write_text(text, "utf-8")
    (tmp_path / "two.md").write_text(text.replace("today", "then"), "utf-8")
    (tmp_path / "none.txt").write_text("", "utf-8")
    made = read_documents(tmp_path, toy.tokenizer(), questions=4)
    assert sorted(made.documents) == ["one.txt", "two.md"]
    assert made.dropped == {"document without text": 1}
    assert len(made.queries) == 8
    assert all(q.tokens and q.stop_token for q in made.queries)
    lines = tmp_path / "some.jsonl"
    good = json.dumps({"_id": "d", "text": text})
    lines.write_text(f"{good}\n\n{{\n{good}\n", "utf-8")
    with pytest.raises(HeadwayError, match=r"some\.jsonl:3: got .*no JSON"):
        read_documents(lines, toy.tokenizer())
    made = read_documents(lines, toy.tokenizer(), bad_rows="skip")
    assert list(made.documents) == ["d"]
    assert [line.split(": ")[0] for line in made.skipped] == [f"{lines}:3", f"{lines}:4"]
    found = diagnose_position([made], WordEncoder(), options=Options(resamples=20, edges=(12, 24)), baselines=())
    assert found.warnings[0].startswith("2 rows could not be used")


def test_a_file_that_is_no_text_is_refused_or_skipped_by_name(tmp_path):
    (tmp_path / "good.txt").write_bytes("\ufeffThe w1 w2 met a1 w3 n1 today.\r\n".encode() * 3)
    (tmp_path / "bad.txt").write_bytes(b"The w1 \xff met")
    with pytest.raises(ArgumentError, match=r"bad\.txt: byte 0xff at 7 is not UTF-8.*--bad-rows skip"):
        read_documents(tmp_path, toy.tokenizer())
    made = read_documents(tmp_path, toy.tokenizer(), bad_rows="skip")
    assert list(made.documents) == ["good.txt"]
    assert made.documents["good.txt"].startswith("The w1")
    assert [line.split(": ")[0] for line in made.skipped] == [str(tmp_path / "bad.txt")]


def test_a_model_in_bfloat16_is_measured_without_gradients(sets):
    encoder = toy.bi_encoder(0, name="toy")
    encoder.model.bfloat16()
    found = diagnose_position(sets, encoder, options=FAST, baselines=())
    assert found.saliency is None
    assert any("float32" in line for line in found.warnings)
    assert found.retrievers[0].overall["psi"] is not None


def test_bins_without_a_query_are_told():
    documents = {f"d{i}": " ".join([f"word{i}", *["filler"] * 19]) for i in range(30)}
    queries = tuple(
        Query(id=f"q{i}", text=f"word{i}", span=(i, i + 2), characters=len(documents[f"d{i}"]), tokens=20)
        for i in range(30)
    )
    data = RetrievalSet(
        name="early", queries=queries, documents=documents, judgements={f"q{i}": {f"d{i}": 1} for i in range(30)}
    )
    options = Options(edges=(5, 10), resamples=20, moved=0, saliency=0)
    found = diagnose_position([data], WordEncoder(), options=options, baselines=())
    assert max(query.position for query in queries) < 0.25
    (told,) = (line for line in found.warnings if line.startswith("Position bins without a query"))
    assert "Q3 (10, ∞) (15)" in told


def test_the_default_set_reaches_beyond_what_the_model_reads():
    made = default_set(toy.tokenizer(), 60, count=30, questions=1)
    lengths = made.lengths()
    assert lengths.min() < 50
    assert 60 < lengths.max() < 130
    assert isinstance(settle_positives(made), RetrievalSet)


def test_what_cannot_be_measured_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="at least one"):
        diagnose_position([], WordEncoder())
    for options in ({"bins": 3}, {"resamples": 2}, {"several": "all"}, {"edges": (5,)}, {"batch": 0}, {"moved": -1}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            Options(**options)
    with pytest.raises(HostError, match="no file or folder"):
        read_documents(tmp_path / "none", toy.tokenizer())
    with pytest.raises(ArgumentError, match="holds no text"):
        read_documents(tmp_path, toy.tokenizer())
    with pytest.raises(ArgumentError, match="bad_rows"):
        read_documents(tmp_path, toy.tokenizer(), bad_rows="drop")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "x", "--documents", "y"], "got both"),
        (["--corpus", "x"], "without --data"),
        (["--data", "/no/such/folder"], "no folder"),
        (["--edges", "a,b"], "--edges"),
        (["--edges", "9,3"], "growing"),
        (["--pooling", "max"], "--pooling"),
        (["--several", "all"], "several"),
        (["--bad-rows", "drop"], "--bad-rows"),
        (["--count", "0"], "--count"),
        (["--max-tokens", "2"], "--max-tokens"),
        (["--dtype", "int8"], "dtype"),
        (["--bins", "2"], "bins"),
        (["--saliency-batch", "0"], "batch"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line_before_the_model_is_loaded(arguments, words, tmp_path):
    done = CliRunner().invoke(app, ["diagnose", "position", "./no-such-model", *arguments, "--out", str(tmp_path)])
    assert isinstance(done.exception, HeadwayError), done.exception
    assert words in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.fixture
def loaded(monkeypatch):
    own = toy.bi_encoder(0)
    monkeypatch.setattr(module, "load", lambda name, **_: (own.model, own.tokenizer))


def test_the_command_reads_a_published_set_and_writes_page_numbers_and_queries(sets, loaded, tmp_path):
    write_set(sets[0], tmp_path / "eng" / "law")
    arguments = ["--data", str(tmp_path / "eng"), "--edges", "12,24,36", "--resamples", "30", "--saliency", "2"]
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["diagnose", "position", "toy", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.exception
    assert "nDCG@10 of toy over 120" in done.stdout
    assert {p.name for p in out.iterdir()} == {"position.html", "position.json", "position.csv", "parts"}
    again = CliRunner().invoke(
        app, ["diagnose", "position", "toy", *arguments, "--out", str(out), "--json", "--no-bm25"]
    )
    data = json.loads(again.stdout)
    assert [one["name"] for one in data["retrievers"]] == ["toy"]


def test_the_command_makes_a_set_and_keeps_it(loaded, tmp_path):
    arguments = ["--count", "12", "--questions", "1", "--resamples", "20", "--saliency", "0", "--moved", "0"]
    done = CliRunner().invoke(app, ["diagnose", "position", "toy", *arguments, "--out", str(tmp_path), "--json"])
    assert done.exit_code == 0, done.exception
    assert {p.name for p in (tmp_path / "set").iterdir()} == {"queries.jsonl", "corpus.jsonl", "qrels.jsonl"}
    run = json.loads(done.stdout)["run"]
    assert run["queries"] == 12
    assert run["tokens counted by"].startswith("toy")
    assert f"lengths in tokens of {run['tokens counted by']}" in (tmp_path / "position.html").read_text()


def test_a_model_that_reads_no_text_is_refused(loaded, monkeypatch, tmp_path):
    own = toy.bi_encoder(0)
    own.model.config.image_size = 224
    monkeypatch.setattr(module, "load", lambda name, **_: (own.model, own.tokenizer))
    done = CliRunner().invoke(app, ["diagnose", "position", "vit", "--count", "2", "--out", str(tmp_path)])
    assert isinstance(done.exception, HostError)
    assert "no text encoder" in str(done.exception)


def test_an_encoder_keeps_its_own_settings(sets):
    own = toy.bi_encoder(0)
    encoder = TransformersEncoder(model=own.model, tokenizer=own.tokenizer, pooling="cls", max_tokens=20, name="cls")
    found = diagnose_position(sets, encoder, options=Options(resamples=20, saliency=2, moved=0), baselines=())
    assert found.model["pooling"] == "cls"
    assert found.model["reads"] == 20
