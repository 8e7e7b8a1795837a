"""Retrieval sets with reference spans: what they hold, how they are read, and how one is made from documents.

A query points at characters [s, e) of its positive document, which has L characters:

    relative position = clip( (s + e) / 2 / L , 0, 1 )

Characters are code points of the text as stored; a text in another Unicode normalisation has other positions.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from headway.errors import ArgumentError, unknown
from headway.tasks.bm25 import words
from headway.tasks.positioned_evidence import PositionedCorpus
from headway.tasks.sentences import split_sentences

#: What to do with a query that has several positives, for which the relative position is ambiguous.
SEVERAL = ("error", "first", "best")
#: Words of a keyword question.
KEYWORDS = 5
#: Shortest sentence that is asked about, in words.
LEAST_WORDS = 6

Ask = Callable[[str], str | None]


@dataclass(frozen=True, kw_only=True)
class Query:
    """A question and where its answer stands.

    `span` are the characters [start, stop) of the answer in the positive document, `characters` that document's length,
    `tokens` its length in tokens (None until counted), `stop_token` the tokens up to the answer's end (None when not
    counted), `domain` the data set it came from."""

    id: str
    text: str
    span: tuple[int, int]
    characters: int
    tokens: int | None = None
    stop_token: int | None = None
    domain: str = ""

    def __post_init__(self) -> None:
        start, stop = self.span
        if self.characters < 1:
            raise ArgumentError(f"query {self.id!r}: its document has {self.characters} characters, expected some.")
        if stop < start:
            raise ArgumentError(f"query {self.id!r}: span [{start}, {stop}) is reversed, expected start ≤ stop.")
        if start < 0 or stop > self.characters:
            raise ArgumentError(
                f"query {self.id!r}: span [{start}, {stop}) lies outside its document of {self.characters} characters. "
                "Spans are in characters, not tokens or bytes."
            )
        if self.tokens is not None and self.tokens < 1:
            raise ArgumentError(f"query {self.id!r}: its document has {self.tokens} tokens, expected 1 or more.")

    @property
    def position(self) -> float:
        """The relative position of the answer, in [0, 1]."""
        return min(max(sum(self.span) / 2 / self.characters, 0.0), 1.0)


@dataclass(frozen=True, kw_only=True)
class RetrievalSet:
    """Queries, documents by id, and judgements {query: {document: relevance}}.

    `counted_by` names the tokenizer behind `tokens`; `dropped` counts queries left out, by reason; `skipped` are the
    rows left out on reading, as "file:line: reason"."""

    name: str
    queries: tuple[Query, ...]
    documents: Mapping[str, str]
    judgements: Mapping[str, Mapping[str, int]]
    counted_by: str = ""
    dropped: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.queries or not self.documents:
            raise ArgumentError(
                f"set {self.name!r}: got {len(self.queries)} queries and {len(self.documents)} documents, "
                "expected some of both."
            )
        twice = [name for name, times in Counter(q.id for q in self.queries).items() if times > 1]
        if twice:
            raise ArgumentError(f"set {self.name!r}: query {twice[0]!r} occurs more than once; ids must differ.")

    def positives(self, query: str) -> list[str]:
        """The documents judged relevant, the most relevant first, in the order of the file among equals."""
        judged = self.judgements.get(query, {})
        return sorted((name for name, value in judged.items() if value > 0), key=lambda name: -judged[name])

    def positions(self) -> Float[np.ndarray, " queries"]:
        return np.array([q.position for q in self.queries])

    def lengths(self) -> Int[np.ndarray, " queries"]:
        """Token lengths of the positives. Raises ArgumentError where they were not counted."""
        missing = [q.id for q in self.queries if q.tokens is None]
        if missing:
            raise ArgumentError(
                f"set {self.name!r}: {len(missing)} queries have no token length ({missing[0]!r} is the first). "
                "Count them with count_tokens(set, tokenizer)."
            )
        return np.array([q.tokens for q in self.queries])


def settle_positives(data: RetrievalSet, *, several: str = "error") -> RetrievalSet:
    """A set in which each query has at most one positive to be found.

    several: "error" refuses a query with more than one positive, "first" keeps the first of the most relevant, "best"
    keeps all of them, and the best-ranked one counts. Queries without a judged positive are dropped and counted."""
    if several not in SEVERAL:
        raise unknown("several", several, SEVERAL)
    kept, judgements, without = [], {}, 0
    for query in data.queries:
        found = data.positives(query.id)
        if not found:
            without += 1
            continue
        if len(found) > 1 and several == "error":
            raise ArgumentError(
                f"query {query.id!r}: got {len(found)} positives ({', '.join(found[:3])}…), so its relative "
                'position is ambiguous. Choose several="first" or "best".'
            )
        if several == "first":
            found = found[:1]
        kept.append(query)
        judgements[query.id] = {name: data.judgements[query.id][name] for name in found}
    if not kept:
        raise ArgumentError(f"set {data.name!r}: no query has a judged positive, expected qrels with a score above 0.")
    dropped = dict(data.dropped) | ({"no positive judged": without} if without else {})
    return replace(data, queries=tuple(kept), judgements=judgements, dropped=dropped)


def check_texts(data: RetrievalSet) -> None:
    """Raises ArgumentError where a query's document length is not that of the text, and says what else it may count.

    Not for cross-lingual sets, whose spans belong to the documents of another language."""
    for query in data.queries:
        wrong = mismatch(data, query)
        if wrong:
            raise ArgumentError(wrong)


def mismatch(data: RetrievalSet, query: Query) -> str:
    """What is wrong with the query's length of its first positive, and what it may count instead; empty for nothing."""
    name = next(iter(data.positives(query.id)), None)
    text = None if name is None else data.documents.get(name)
    if text is None or len(text) == query.characters:
        return ""
    forms = {form: len(unicodedata.normalize(form, text)) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    counted = [f"code points of its {form} form" for form, size in forms.items() if size == query.characters]
    if query.characters == len(text.encode("utf-8", "surrogatepass")):
        counted.append("UTF-8 bytes")
    if query.characters == query.tokens:
        counted.append("tokens")
    guess = f" {query.characters} is the number of {counted[0]}." if counted else ""
    return (
        f"query {query.id!r}: says its document {name!r} has {query.characters} characters, the text has {len(text)}."
        f"{guess} Count spans and lengths in code points of the stored text."
    )


def count_tokens(data: RetrievalSet, tokenizer: Any, *, name: str = "") -> RetrievalSet:
    """The set with token lengths of the positives by `tokenizer`, without special tokens, and the tokens that end
    before the answer does. The longest positive counts where there are several."""
    lengths: dict[str, tuple[int, list[tuple[int, int]]]] = {}

    def measured(document: str) -> tuple[int, list[tuple[int, int]]]:
        if document not in lengths:
            found = tokenizer(
                data.documents[document], add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            lengths[document] = (len(found["input_ids"]), found["offset_mapping"])
        return lengths[document]

    queries = []
    for query in data.queries:
        own = [d for d in data.positives(query.id) if d in data.documents]
        if not own:
            queries.append(query)
            continue
        tokens, offsets = max((measured(d) for d in own), key=lambda pair: pair[0])
        read = sum(stop <= query.span[1] for _, stop in offsets)
        queries.append(replace(query, tokens=max(tokens, 1), stop_token=read))
    known, kind = name or str(getattr(tokenizer, "name_or_path", "")), type(tokenizer).__name__
    by = f"{known} ({kind})" if known and hasattr(tokenizer, "all_special_ids") else known or kind
    return replace(data, queries=tuple(queries), counted_by=by)


def from_corpus(corpus: PositionedCorpus, *, name: str = "planted") -> RetrievalSet:
    """A set from documents whose questions know their place. Lengths are in words until a tokenizer counts them."""
    words_in = {key: len(text.split()) for key, text in corpus.documents.items()}
    queries = tuple(
        Query(
            id=q.id,
            text=q.text,
            span=(q.start, q.stop),
            characters=len(corpus.documents[q.document]),
            tokens=words_in[q.document],
            stop_token=len(corpus.documents[q.document][: q.stop].split()),
            domain=name,
        )
        for q in corpus.questions
    )
    judgements = {q.id: {q.document: 1} for q in corpus.questions}
    return RetrievalSet(
        name=name, queries=queries, documents=corpus.documents, judgements=judgements, counted_by="white space"
    )


def from_documents(
    documents: Mapping[str, str],
    random: np.random.Generator,
    *,
    ask: Ask | None = None,
    per_document: int = 4,
    name: str = "documents",
) -> RetrievalSet:
    """A set with reference spans from anybody's documents: sentences at stratified places become the evidence.

    `ask(sentence)` gives the question for a sentence, or None to pass it over; a language model belongs here. By
    default the question is the sentence's `KEYWORDS` rarest words in the corpus, in random order: an honest known-item
    query without a model, easy for word matching. Documents without a usable sentence are dropped and counted."""
    if per_document < 1:
        raise ArgumentError(f"per_document: got {per_document}, expected 1 or more.")
    questions = ask or keyword_questions(documents.values(), random)
    queries: list[Query] = []
    judgements: dict[str, dict[str, int]] = {}
    dropped: Counter[str] = Counter()
    for key, text in documents.items():
        if not text.strip():
            dropped["document without text"] += 1
            continue
        found = _asked(text, questions, per_document, random)
        if not found:
            dropped["document without a usable sentence"] += 1
        for number, (question, span) in enumerate(found):
            query = f"{key}-q{number}"
            queries.append(
                Query(id=query, text=question, span=span, characters=len(text), tokens=len(text.split()), domain=name)
            )
            judgements[query] = {key: 1}
    kept = {key: text for key, text in documents.items() if text.strip()}
    return RetrievalSet(
        name=name,
        queries=tuple(queries),
        documents=kept,
        judgements=judgements,
        counted_by="white space",
        dropped=dict(dropped),
    )


def keyword_questions(texts: Any, random: np.random.Generator, *, count: int = KEYWORDS) -> Ask:
    """Asks for a sentence by its `count` rarest words among `texts`, in random order; passes over short sentences."""
    spread: Counter[str] = Counter()
    for text in texts:
        spread.update(set(words(text)))

    def ask(sentence: str) -> str | None:
        own = list(dict.fromkeys(word for word in words(sentence) if not word.isdigit()))
        if len(own) < LEAST_WORDS:
            return None
        rare = sorted(own, key=lambda word: (spread[word], word))[:count]
        return " ".join(rare[i] for i in random.permutation(len(rare)))

    return ask


def _asked(text: str, ask: Ask, count: int, random: np.random.Generator) -> list[tuple[str, tuple[int, int]]]:
    """Up to `count` questions, one for each equal stretch of the document that holds a usable sentence."""
    spans = split_sentences(text)
    middles = [(start + stop) / 2 / len(text) for start, stop in spans]
    found = []
    for part in range(count):
        low, high = part / count, (part + 1) / count
        inside = [i for i, middle in enumerate(middles) if low <= middle < high]
        for i in random.permutation(inside).astype(int).tolist() if inside else []:
            start, stop = spans[i]
            question = ask(text[start:stop].strip())
            if question:
                found.append((question, (start, start + len(text[start:stop].rstrip()))))
                break
    return found
