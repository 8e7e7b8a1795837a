"""The public layout of a retrieval set, in and out: queries, corpus and judgements as Parquet or JSON lines.

A folder holds `queries`, `corpus` and `qrels`, each as `<name>.parquet`, `<name>.jsonl` (also gzipped), or a folder of
such files:

    queries   _id, text, pos_char_span = [start, stop), pos_char_length, pos_token_length
    corpus    _id, text
    qrels     query-id, corpus-id, score

`read_sets` walks a tree of such folders (`<language>/<domain>` in the public data). Rows that cannot be read are
refused with file and line, or skipped and listed, as the caller chose.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from headway.errors import ArgumentError, HostError, missing_extra
from headway.files import write_atomically
from headway.hosts.rows import Account, json_objects
from headway.methods.diagnosis.posir.data import Query, RetrievalSet, mismatch

ENDINGS = (".parquet", ".jsonl", ".jsonl.gz")
Row = tuple[str, dict[str, Any]]


class _Rows(Account):
    """Reads rows and keeps account of those that cannot be used."""

    def read(self, folder: Path, name: str) -> Iterator[Row]:
        for path in _files(folder, name):
            if path.suffix == ".parquet":
                yield from _parquet_rows(path)
            else:
                yield from self._json_rows(path)

    def _json_rows(self, path: Path) -> Iterator[Row]:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rb") as lines:
            for number, row in json_objects(lines, lambda number, why: self.bad(f"{path}:{number}", why)):
                yield f"{path}:{number}", row


def read_set(
    folder: str | Path, *, corpus: str | Path | None = None, bad_rows: str = "refuse", name: str = ""
) -> RetrievalSet:
    """The set in a folder. `corpus` is another folder for the documents (cross-lingual: queries of one language against
    the documents of another, under the same ids); the lengths of texts are then not compared.

    bad_rows: "refuse" raises ArgumentError at the first row that cannot be used, "skip" lists them in `skipped`.
    A query whose document is empty is dropped and counted."""
    home = Path(folder).expanduser()
    documents_home = home if corpus is None else Path(corpus).expanduser()
    rows = _Rows(bad_rows)
    own = name or home.name
    documents = _documents(rows, documents_home)
    placed, empty = _queries(rows, home, own)
    found = RetrievalSet(
        name=own,
        queries=tuple(query for _, query in placed),
        documents=documents,
        judgements=_judgements(rows, home),
        counted_by="the data set's own tokenizer",
        dropped={"empty document": empty} if empty else {},
    )
    if corpus is None:
        kept = []
        for where, query in placed:
            wrong = mismatch(found, query)
            if wrong:
                rows.bad(where, wrong)
            else:
                kept.append(query)
        found = replace(found, queries=tuple(kept))
    return replace(found, skipped=tuple(rows.skipped))


def read_sets(root: str | Path, *, corpus: str | Path | None = None, bad_rows: str = "refuse") -> list[RetrievalSet]:
    """Every set below a folder (one per domain, any number), in the order of their paths.

    `corpus` is the folder of another language with the same domains, for cross-lingual retrieval."""
    top = Path(root).expanduser()
    if not top.is_dir():
        raise HostError(f"data: there is no folder {top}; give one with queries, corpus and qrels.")
    named = (p for p in top.rglob("queries*") if p.parent.name != "queries" or p.parent == top)
    homes = sorted({p.parent for p in named if p.name == "queries" or p.name.endswith(ENDINGS)})
    if not homes:
        raise HostError(f"data: {top} holds no queries.parquet or queries.jsonl; give a folder of the public layout.")
    return [
        read_set(
            home,
            corpus=None if corpus is None else Path(corpus).expanduser() / home.relative_to(top),
            bad_rows=bad_rows,
            name=str(home.relative_to(top)) if home != top else "",
        )
        for home in homes
    ]


def write_set(data: RetrievalSet, folder: str | Path) -> Path:
    """Writes a set in the public layout, as JSON lines."""
    home = Path(folder)
    queries = [
        {
            "_id": q.id,
            "text": q.text,
            "pos_char_span": list(q.span),
            "pos_char_length": q.characters,
            "pos_token_length": q.tokens,
        }
        for q in data.queries
    ]
    judgements = [
        {"query-id": query, "corpus-id": document, "score": value}
        for query, judged in data.judgements.items()
        for document, value in judged.items()
    ]
    corpus = [{"_id": key, "text": text} for key, text in data.documents.items()]
    for name, rows in (("queries", queries), ("corpus", corpus), ("qrels", judgements)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(home / f"{name}.jsonl", text)
    return home


def _documents(rows: _Rows, home: Path) -> dict[str, str]:
    documents: dict[str, str] = {}
    for where, row in rows.read(home, "corpus"):
        if row.get("_id") is None or not isinstance(row.get("text"), str):
            rows.bad(where, f"got the fields {', '.join(row)}, expected _id and text.")
        elif str(row["_id"]) in documents:
            rows.bad(where, f"document {row['_id']!r} occurs more than once; ids must differ.")
        else:
            documents[str(row["_id"])] = row["text"]
    return documents


def _queries(rows: _Rows, home: Path, domain: str) -> tuple[list[tuple[str, Query]], int]:
    """Queries with the place of their row, and how many had an empty document."""
    found: dict[str, tuple[str, Query]] = {}
    empty = 0
    for where, row in rows.read(home, "queries"):
        if row.get("pos_char_length") == 0:
            empty += 1
            continue
        try:
            query = _query(row, domain)
        except ArgumentError as error:
            rows.bad(where, str(error))
            continue
        if query.id in found:
            rows.bad(where, f"query {query.id!r} occurs more than once; ids must differ.")
        else:
            found[query.id] = (where, query)
    return list(found.values()), empty


def _judgements(rows: _Rows, home: Path) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for where, row in rows.read(home, "qrels"):
        try:
            query, document, value = str(row["query-id"]), str(row["corpus-id"]), int(row["score"])
        except (KeyError, TypeError, ValueError):
            rows.bad(where, f"got the fields {', '.join(row)}, expected query-id, corpus-id and a whole score.")
            continue
        found.setdefault(query, {})[document] = value
    return found


def _query(row: dict[str, Any], domain: str) -> Query:
    name = row.get("_id")
    if name is None or not isinstance(row.get("text"), str):
        raise ArgumentError(f"got the fields {', '.join(row)}, expected _id and text.")
    span, length, tokens = row.get("pos_char_span"), row.get("pos_char_length"), row.get("pos_token_length")
    if not isinstance(span, list) or [type(x) for x in span] != [int, int]:
        raise ArgumentError(f"query {name!r}: pos_char_span is {span!r}, expected [start, stop) in characters.")
    if not isinstance(length, int) or isinstance(length, bool):
        raise ArgumentError(f"query {name!r}: pos_char_length is {length!r}, expected the characters of its document.")
    if tokens is not None and (not isinstance(tokens, int) or isinstance(tokens, bool)):
        raise ArgumentError(f"query {name!r}: pos_token_length is {tokens!r}, expected a whole number.")
    return Query(
        id=str(name), text=row["text"], span=(span[0], span[1]), characters=length, tokens=tokens, domain=domain
    )


def _files(folder: Path, name: str) -> list[Path]:
    for ending in ENDINGS:
        if (folder / f"{name}{ending}").is_file():
            return [folder / f"{name}{ending}"]
    inner = folder / name
    found = sorted(p for p in inner.glob("*") if p.name.endswith(ENDINGS)) if inner.is_dir() else []
    if not found:
        raise HostError(f"data: {folder} has no {name}.parquet, {name}.jsonl or folder {name}/ with such files.")
    return found


def _parquet_rows(path: Path) -> Iterator[Row]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "scale", "reading Parquet files") from error
    try:
        file = parquet.ParquetFile(path)
    except ArrowInvalid as error:
        raise HostError(f"data: {path} is no Parquet file ({error}).") from None
    number = 0
    for batch in file.iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield f"{path}:{number}", row
