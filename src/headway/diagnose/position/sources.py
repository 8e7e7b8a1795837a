"""Where the queries come from: published sets, somebody's own documents, or a text that every Python carries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headway.errors import ArgumentError, HostError
from headway.hosts import default_text
from headway.hosts.rows import Account, check_policy, json_objects
from headway.methods.diagnosis.posir import RetrievalSet, count_tokens, from_corpus, from_documents
from headway.tasks.positioned_evidence import TEMPLATES, prose_corpus
from headway.tasks.words import prose

ENDINGS = (".txt", ".md")
#: Room that one planted fact takes, and how far documents go beyond what the model reads.
FACT_TOKENS, BEYOND = 24, 1.4


def default_set(
    tokenizer: Any, reads: int | None, *, count: int, questions: int = 2, seed: int = 0, name: str = ""
) -> RetrievalSet:
    """`count` documents of the default text with planted English facts, from a few sentences to 1.4 times what the
    model reads (at most 720 tokens), each with `questions` questions. `name` is that of the tokenizer in reports."""
    if count < 1 or questions < 1:
        raise ArgumentError(f"count, questions: got {count} and {questions}, expected 1 or more.")
    text = default_text()
    longest = int(min(reads or 512, 512) * BEYOND)
    shortest = min(FACT_TOKENS * questions, longest)
    corpus = prose_corpus(
        prose(text.text),
        count,
        np.random.default_rng(seed),
        sizes=(shortest, longest),
        facts=questions,
        count=lambda sentence: len(tokenizer(sentence, add_special_tokens=False)["input_ids"]),
        source=text.source,
    )
    made = from_corpus(corpus, name=f"{len(TEMPLATES)} kinds of facts in {text.source}")
    return count_tokens(made, tokenizer, name=name)


def read_documents(
    path: str | Path, tokenizer: Any, *, questions: int = 2, bad_rows: str = "refuse", seed: int = 0, name: str = ""
) -> RetrievalSet:
    """A set from somebody's own texts: a folder of .txt and .md files, or JSONL with `_id` and `text`. Questions are
    the rarest words of a sentence. Files and rows that cannot be used are refused by name and line, or listed in
    `skipped`; texts without a word are dropped and counted."""
    check_policy(bad_rows)
    home = Path(path).expanduser()
    texts, skipped = (_folder if home.is_dir() else _lines)(home, bad_rows)
    if not texts:
        raise ArgumentError(f"documents: {home} holds no text; give .txt or .md files, or JSONL with _id and text.")
    made = from_documents(texts, np.random.default_rng(seed), per_document=questions, name=home.name)
    return RetrievalSet(**{**vars(count_tokens(made, tokenizer, name=name)), "skipped": tuple(skipped)})


def _folder(home: Path, bad_rows: str) -> tuple[dict[str, str], list[str]]:
    account, texts = Account(bad_rows), dict[str, str]()
    for path in sorted(p for p in home.rglob("*") if p.suffix in ENDINGS and p.is_file()):
        try:
            texts[str(path.relative_to(home))] = path.read_bytes().decode("utf-8").removeprefix("\ufeff")
        except UnicodeDecodeError as error:
            account.bad(str(path), f"byte 0x{error.object[error.start]:02x} at {error.start:,} is not UTF-8.")
        except OSError as error:
            account.bad(str(path), f"it cannot be read ({error.strerror or error}).")
    return texts, account.skipped


def _lines(path: Path, bad_rows: str) -> tuple[dict[str, str], list[str]]:
    if not path.is_file():
        raise HostError(f"documents: there is no file or folder {path}; check the path.")
    account, texts = Account(bad_rows), dict[str, str]()

    def bad(number: int, why: str) -> None:
        account.bad(f"{path}:{number}", why)

    for number, row in json_objects(path.read_bytes().splitlines(), bad):
        name = str(row.get("_id", f"line {number}"))
        if not isinstance(row.get("text"), str):
            bad(number, "expected an object with a text.")
        elif name in texts:
            bad(number, f"document {name!r} occurs more than once; ids must differ.")
        else:
            texts[name] = row["text"]
    return texts, account.skipped
