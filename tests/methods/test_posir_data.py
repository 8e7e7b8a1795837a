"""Sets with reference spans: what a query may say, the public layout in and out, sets made from documents."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest

from headway.errors import ArgumentError, HostError
from headway.methods.diagnosis.posir import (
    Query,
    RetrievalSet,
    check_texts,
    count_tokens,
    from_corpus,
    from_documents,
    read_set,
    read_sets,
    settle_positives,
    write_set,
)
from headway.tasks.positioned_evidence import topic_corpus
from headway.tasks.sentences import split_sentences

TEXT = "One bird sang here. Two foxes ran over the wet field at dawn. Three boats lay still."


def query(name="q", span=(20, 61), text="foxes", **changes):
    return Query(**{"id": name, "text": text, "span": span, "characters": len(TEXT), **changes})


def made(*queries, documents=None, judgements=None):
    own = queries or (query(),)
    return RetrievalSet(
        name="made",
        queries=own,
        documents=documents or {"d": TEXT, "other": "Nothing."},
        judgements=judgements or {q.id: {"d": 1} for q in own},
    )


def test_the_position_is_that_of_the_middle_of_the_span():
    assert query(span=(0, 10), characters=100).position == 0.05
    assert query(span=(0, 0), characters=100).position == 0
    assert query(span=(100, 100), characters=100).position == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"span": (30, 20)}, "reversed"),
        ({"span": (-1, 20)}, "outside"),
        ({"span": (5, len(TEXT) + 1)}, "characters, not tokens"),
        ({"characters": 0, "span": (0, 0)}, "0 characters"),
        ({"tokens": 0}, "1 or more"),
    ],
)
def test_a_wrong_span_names_its_query(changes, words):
    with pytest.raises(ArgumentError, match="query 'q7'") as error:
        query("q7", **changes)
    assert words in str(error.value)


def test_a_set_has_queries_documents_and_each_id_once():
    with pytest.raises(ArgumentError, match="more than once"):
        made(query(), query())
    with pytest.raises(ArgumentError, match="some of both"):
        RetrievalSet(name="x", queries=(), documents={"d": "x"}, judgements={})


def test_several_positives_need_a_policy():
    data = made(judgements={"q": {"other": 1, "d": 2, "third": 2, "no": 0}})
    assert data.positives("q") == ["d", "third", "other"]
    with pytest.raises(ArgumentError, match="'q': got 3 positives"):
        settle_positives(data)
    assert dict(settle_positives(data, several="first").judgements["q"]) == {"d": 2}
    assert set(settle_positives(data, several="best").judgements["q"]) == {"d", "third", "other"}
    with pytest.raises(ArgumentError, match="several"):
        settle_positives(data, several="all")


def test_queries_without_a_positive_are_dropped_and_counted():
    data = made(query("a"), query("b"), query("c"), judgements={"a": {"d": 1}, "b": {"d": 0}})
    settled = settle_positives(data)
    assert [q.id for q in settled.queries] == ["a"]
    assert settled.dropped == {"no positive judged": 2}


@pytest.mark.parametrize(
    ("text", "characters", "tokens", "words"),
    [
        ("café noir", 10, None, "NFD form"),
        ("cafe\u0301 noir", 9, None, "NFC form"),
        ("日本語", 9, None, "UTF-8 bytes"),
        ("one two three", 3, 3, "number of tokens"),
        ("one two three", 12, None, "has 12 characters, the text has 13"),
    ],
)
def test_lengths_that_count_something_else_are_recognised(text, characters, tokens, words):
    data = made(query(span=(0, 1), characters=characters, tokens=tokens), documents={"d": text})
    with pytest.raises(ArgumentError, match="query 'q'") as error:
        check_texts(data)
    assert words in str(error.value)
    check_texts(made())


def test_token_lengths_and_what_ends_before_the_answer_does():
    def words(text, **options):
        spans, at = [], 0
        for word in text.split():
            at = text.index(word, at)
            spans.append((at, at + len(word)))
            at += len(word)
        return {"input_ids": list(range(len(spans))), "offset_mapping": spans}

    data = made()
    with pytest.raises(ArgumentError, match="count_tokens"):
        data.lengths()
    counted = count_tokens(data, words, name="white space")
    assert counted.lengths().tolist() == [len(TEXT.split())]
    assert counted.queries[0].stop_token == len(TEXT[:61].split())
    assert counted.counted_by == "white space"


def test_sets_are_made_from_anybodys_documents():
    random = np.random.default_rng(0)
    nouns = [f"thing{i}" for i in range(400)]
    documents = {
        f"d{i}": " ".join(
            f"The {nouns[j]} met a {nouns[j + 40]} beside the old river." for j in random.permutation(300)[:12]
        )
        for i in range(20)
    } | {"empty": "  ", "short": "No. Yes. Perhaps so."}
    data = from_documents(documents, np.random.default_rng(1), per_document=3)
    check_texts(data)
    assert data.dropped == {"document without text": 1, "document without a usable sentence": 1}
    assert set(data.documents) == set(documents) - {"empty"}
    assert len(data.queries) == 60
    for one in data.queries:
        (name,) = data.positives(one.id)
        evidence = documents[name][slice(*one.span)]
        assert any(evidence == documents[name][a:b].strip() for a, b in split_sentences(documents[name]))
        assert set(one.text.split()) <= set(evidence.lower().replace(".", "").split())
    thirds = np.histogram(data.positions(), bins=3, range=(0, 1))[0]
    assert thirds.tolist() == [20, 20, 20]


def test_the_asker_may_be_given_and_may_pass_sentences_over():
    text = " ".join(f"This is sentence number {i} of the text." for i in range(30))
    asked = []

    def ask(sentence):
        asked.append(sentence)
        return None if "number 3 " in sentence else f"what of {sentence.split()[4]}?"

    data = from_documents({"d": text}, np.random.default_rng(2), ask=ask, per_document=30)
    assert len(data.queries) <= 30
    assert all("number 3 " not in text[slice(*q.span)] for q in data.queries)
    assert all(q.text == f"what of {text[slice(*q.span)].split()[4]}?" for q in data.queries)
    with pytest.raises(ArgumentError, match="per_document"):
        from_documents({"d": text}, np.random.default_rng(0), per_document=0)


@pytest.fixture
def planted():
    return from_corpus(topic_corpus(6, np.random.default_rng(3), sizes=(20, 60)))


def test_the_public_layout_survives_a_round_trip(planted, tmp_path):
    home = write_set(planted, tmp_path / "eng" / "law")
    found = read_set(home)
    assert found.documents == planted.documents
    assert found.judgements == planted.judgements
    assert [(q.id, q.text, q.span, q.tokens) for q in found.queries] == [
        (q.id, q.text, q.span, q.tokens) for q in planted.queries
    ]


def test_parquet_as_published_and_many_domains(planted, tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for domain in ("law", "art"):
        home = tmp_path / "eng-Latn" / domain
        lines = write_set(planted, tmp_path / "lines")
        (home / "qrels").mkdir(parents=True)
        for name, target in (("queries", "queries"), ("corpus", "corpus"), ("qrels", "qrels/test")):
            rows = [json.loads(line) for line in (lines / f"{name}.jsonl").read_text("utf-8").splitlines()]
            parquet.write_table(pyarrow.Table.from_pylist(rows), home / f"{target}.parquet")
    found = read_sets(tmp_path / "eng-Latn")
    assert [data.name for data in found] == ["art", "law"]
    assert [q.span for q in found[0].queries] == [q.span for q in planted.queries]
    assert {q.domain for q in found[1].queries} == {"law"}


def test_queries_may_be_in_a_folder_and_gzipped(planted, tmp_path):
    home = write_set(planted, tmp_path / "set")
    for name in ("queries", "corpus"):
        data = (home / f"{name}.jsonl").read_bytes()
        (home / f"{name}.jsonl").unlink()
        (home / name).mkdir()
        (home / name / f"{name}-0.jsonl.gz").write_bytes(gzip.compress(data))
    (found,) = read_sets(tmp_path)
    assert found.documents == planted.documents
    assert len(found.queries) == len(planted.queries)


def test_cross_lingual_queries_meet_the_documents_of_another_language(planted, tmp_path):
    write_set(planted, tmp_path / "fra" / "law")
    english = write_set(planted, tmp_path / "eng" / "law")
    rows = [json.loads(line) for line in (english / "corpus.jsonl").read_text("utf-8").splitlines()]
    text = "".join(json.dumps({**row, "text": f"{row['text']} And more."}) + "\n" for row in rows)
    (english / "corpus.jsonl").write_text(text, "utf-8")
    (found,) = read_sets(tmp_path / "fra", corpus=tmp_path / "eng")
    assert all(text.endswith("And more.") for text in found.documents.values())
    assert [q.characters for q in found.queries] == [q.characters for q in planted.queries]


def rewrite(home, name, change):
    """Changes the second row of a file."""
    path = home / f"{name}.jsonl"
    lines = path.read_bytes().splitlines()
    lines[1] = change(lines[1])
    path.write_bytes(b"\n".join(lines) + b"\n")


def field(**changes):
    return lambda line: json.dumps({k: v for k, v in {**json.loads(line), **changes}.items() if v != "gone"}).encode()


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("queries", lambda line: b"{", "no JSON"),
        ("queries", lambda line: b"[1]", "expected an object"),
        ("queries", lambda line: line[:-3] + b"\xff\xfe}", "UTF-8"),
        ("queries", field(text="gone"), "expected _id and text"),
        ("queries", field(pos_char_span="gone"), "pos_char_span is None"),
        ("queries", field(pos_char_span=[9, 3]), "reversed"),
        ("queries", field(pos_char_span=[1.5, 3]), "in characters"),
        ("queries", field(pos_char_span=[3, 10**6]), "outside"),
        ("queries", field(pos_char_length="long"), "pos_char_length"),
        ("queries", field(pos_char_length=10**6), "the text has"),
        ("queries", field(pos_token_length=True), "pos_token_length"),
        ("queries", field(pos_token_length=0), "0 tokens"),
        ("queries", field(_id="d000000-q0"), "more than once"),
        ("corpus", field(_id="d000000"), "more than once"),
        ("corpus", field(text=None), "expected _id and text"),
        ("qrels", field(score="high"), "whole score"),
        ("qrels", field(**{"query-id": "gone"}), "expected query-id"),
    ],
)
def test_a_row_that_cannot_be_used_is_refused_or_skipped_by_its_line(planted, tmp_path, name, change, words):
    home = write_set(planted, tmp_path / "set")
    rewrite(home, name, change)
    with pytest.raises(ArgumentError, match=rf"{name}\.jsonl:2: ") as error:
        read_set(home)
    assert words in str(error.value)
    assert "bad_rows" in str(error.value)
    found = read_set(home, bad_rows="skip")
    assert [line.split(": ")[0] for line in found.skipped] == [f"{home / name}.jsonl:2"]
    assert len(found.queries) == len(planted.queries) - (name == "queries")


def test_an_empty_document_is_dropped_and_counted(planted, tmp_path):
    home = write_set(planted, tmp_path / "set")
    rewrite(home, "queries", field(pos_char_length=0))
    found = read_set(home)
    assert found.dropped == {"empty document": 1}
    assert len(found.queries) == 5


def test_folders_without_a_set_are_refused(planted, tmp_path):
    with pytest.raises(HostError, match="no folder"):
        read_sets(tmp_path / "none")
    with pytest.raises(HostError, match="holds no queries"):
        read_sets(tmp_path)
    home = write_set(planted, tmp_path / "set")
    (home / "qrels.jsonl").unlink()
    with pytest.raises(HostError, match="no qrels"):
        read_set(home)
    with pytest.raises(ArgumentError, match="bad_rows"):
        read_set(home, bad_rows="drop")


def test_a_file_that_is_no_parquet_is_refused(planted, tmp_path):
    pytest.importorskip("pyarrow")
    home = write_set(planted, tmp_path / "set")
    (home / "corpus.parquet").write_bytes(b"nothing of the kind")
    with pytest.raises(HostError, match="no Parquet file"):
        read_set(home)
