"""Documents in which the answer to each question stands at a known place.

A corpus is made of filler sentences with facts put in between them; every fact has one question whose words are
partly others, and its character range in the document is kept. Two makers draw everything from a generator:

- `topic_corpus`: words without meaning in topics; documents of a topic share their filler, so they are each other's
  distractors; a fact names something unique, and its question uses another word for the attribute.
- `prose_corpus`: sentences of a real text as filler, facts and questions in English, for real models.

`moved` puts one fact into the same filler at several places: everything but its position stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from headway.errors import ArgumentError
from headway.tasks.words import ADJECTIVES, NOUNS, coded_words, essay

Sizes = tuple[int, int]
Count = Callable[[str], int]

#: Attributes as documents say them and as questions do.
SYNONYMS = {
    "hue": "colour",
    "cost": "price",
    "site": "place",
    "maker": "builder",
    "age": "years",
    "mass": "weight",
    "span": "length",
    "chief": "leader",
}
TOPICS, TOPIC_WORDS, FILLER_WORDS = 20, 300, (6, 12)
#: Statement and question; `{thing}` is unique in its corpus, `{detail}` a noun.
TEMPLATES = (
    (
        "The {thing} project was paid for by the guild of {detail} merchants.",
        "Who gave the money for the {thing} undertaking?",
    ),
    (
        "A storm in March damaged the roof of the {thing} library near the {detail}.",
        "What did bad weather do to {thing}?",
    ),
    (
        "Visitors reach the {thing} museum by walking past the old {detail}.",
        "How do guests get to the {thing} collection?",
    ),
    (
        "The recipe called {thing} needs three spoons of {detail} extract.",
        "Which ingredient goes into the {thing} dish?",
    ),
    (
        "Doctor {thing} first described the fever that starts after eating {detail}.",
        "What illness did {thing} discover?",
    ),
    (
        "The ship {thing} sank with a cargo of {detail} crates on board.",
        "What was lost when the vessel {thing} went down?",
    ),
    (
        "Rent for the {thing} apartment rose after the {detail} shop opened.",
        "Why did living at {thing} get more expensive?",
    ),
    ("The song {thing} was written on a {detail} during a train ride.", "How was the tune {thing} composed?"),
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question, the document that answers it, and the characters [start, stop) of the answer in it."""

    id: str
    text: str
    document: str
    start: int
    stop: int


@dataclass(frozen=True, kw_only=True)
class PositionedCorpus:
    """Documents by id, their questions, and what they were made from."""

    documents: dict[str, str]
    questions: tuple[Question, ...]
    about: str = ""

    def __post_init__(self) -> None:
        for question in self.questions:
            text = self.documents.get(question.document)
            if text is None or not 0 <= question.start < question.stop <= len(text):
                raise ArgumentError(
                    f"questions: {question.id!r} points at characters {question.start} to {question.stop} of document "
                    f"{question.document!r}, expected a range inside one of the documents."
                )


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A sentence and the question it answers."""

    statement: str
    question: str


def topic_corpus(
    documents: int,
    random: np.random.Generator,
    *,
    sizes: Sizes = (150, 1200),
    facts: int = 1,
    where: tuple[float, float] = (0.0, 1.0),
    decoys: int = 0,
    topics: int = TOPICS,
) -> PositionedCorpus:
    """Documents of `sizes` words with `facts` facts each, placed at random inside `where` (shares of the document);
    `decoys` more stand anywhere and nobody asks for them."""
    _check(documents, sizes, facts, where)
    vocabulary = coded_words(random, topics * TOPIC_WORDS + documents * (facts + decoys) * 2, 7)
    names = iter(vocabulary[topics * TOPIC_WORDS :])
    attributes = list(SYNONYMS)

    def fact() -> Fact:
        attribute = attributes[int(random.integers(len(attributes)))]
        name = next(names)
        statement = f"{name} has {attribute} : {attribute} of {name} is {next(names)} ."
        return Fact(statement=statement, question=f"{SYNONYMS[attribute]} {name}")

    def filler(topic: int) -> Callable[[], str]:
        own = vocabulary[topic * TOPIC_WORDS : (topic + 1) * TOPIC_WORDS]

        def sentence() -> str:
            count = int(random.integers(*FILLER_WORDS))
            return " ".join(own[i] for i in random.integers(TOPIC_WORDS, size=count)) + " ."

        return sentence

    texts: dict[str, str] = {}
    questions: list[Question] = []
    for number in range(documents):
        sentences = _until(filler(number % topics), int(random.integers(sizes[0], sizes[1] + 1)), _words)
        asked, others = [fact() for _ in range(facts)], [fact().statement for _ in range(decoys)]
        sentences = scattered(sentences, others, random)
        text, found = placed(f"d{number:06d}", sentences, asked, where, random)
        texts[f"d{number:06d}"] = text
        questions += found
    return PositionedCorpus(
        documents=texts, questions=tuple(questions), about=f"{documents} documents of {topics} topics of made-up words"
    )


def prose_corpus(
    sentences: Sequence[str],
    documents: int,
    random: np.random.Generator,
    *,
    sizes: Sizes = (100, 900),
    facts: int = 4,
    where: tuple[float, float] = (0.0, 1.0),
    count: Count | None = None,
    source: str = "",
) -> PositionedCorpus:
    """Documents of consecutive `sentences` of a real text, from a random one on, with English facts put in.

    `sizes` are counted by `count`, words by default; pass a tokenizer's count to have them in its tokens."""
    _check(documents, sizes, facts, where)
    if not sentences:
        raise ArgumentError("sentences: got none, expected the sentences of a text, such as tasks.words.prose(text).")
    given = english_facts(documents * facts, random)
    counted = count or _words
    length = [counted(sentence) for sentence in sentences]
    texts: dict[str, str] = {}
    questions: list[Question] = []
    for number in range(documents):
        target, start = int(random.integers(sizes[0], sizes[1] + 1)), int(random.integers(len(sentences)))
        asked = given[number * facts : (number + 1) * facts]
        size, taken = sum(counted(fact.statement) for fact in asked), 0
        while size < target:
            size += max(length[(start + taken) % len(sentences)], 1)
            taken += 1
        own = essay(sentences, max(taken, 1), start)
        text, found = placed(f"d{number:06d}", own, asked, where, random)
        texts[f"d{number:06d}"] = text
        questions += found
    about = f"{documents} documents of sentences from {source or 'a text'}, with {facts} planted facts each"
    return PositionedCorpus(documents=texts, questions=tuple(questions), about=about)


def english_facts(count: int, random: np.random.Generator) -> list[Fact]:
    """`count` facts about different things, from TEMPLATES in turn."""
    room = len(ADJECTIVES) * len(NOUNS)
    if count > room:
        raise ArgumentError(f"facts: got {count:,} in all, expected at most {room:,}. Make fewer documents.")
    found = []
    for number, pair in enumerate(random.permutation(room)[:count].tolist()):
        thing = f"{ADJECTIVES[pair // len(NOUNS)]} {NOUNS[pair % len(NOUNS)]}"
        detail = NOUNS[int(random.integers(len(NOUNS)))]
        statement, question = TEMPLATES[number % len(TEMPLATES)]
        found.append(
            Fact(statement=statement.format(thing=thing, detail=detail), question=question.format(thing=thing))
        )
    return found


def moved(sentences: Sequence[str], statement: str, positions: int = 10) -> list[tuple[str, tuple[int, int]]]:
    """The same document `positions` times, with the statement moved from its start to its end in equal steps of
    sentences: text and the statement's characters. All texts have the same sentences and the same length."""
    if positions < 2:
        raise ArgumentError(f"positions: got {positions}, expected 2 or more.")
    if len(sentences) < positions - 1:
        raise ArgumentError(
            f"sentences: got {len(sentences)}, expected {positions - 1} or more for {positions} different places."
        )
    places = [round(step * len(sentences) / (positions - 1)) for step in range(positions)]
    found = []
    for place in places:
        text, spans = join_marked([*sentences[:place], statement, *sentences[place:]], [place])
        found.append((text, spans[0]))
    return found


def join_marked(sentences: Sequence[str], marked: Sequence[int]) -> tuple[str, list[tuple[int, int]]]:
    """Sentences joined by spaces, and the character ranges of those whose numbers are `marked`."""
    starts = np.cumsum([0, *(len(s) + 1 for s in sentences)]).tolist()
    return " ".join(sentences), [(starts[i], starts[i] + len(sentences[i])) for i in marked]


def placed(
    name: str, filler: list[str], facts: Sequence[Fact], where: tuple[float, float], random: np.random.Generator
) -> tuple[str, list[Question]]:
    """Facts at stratified random places: the i-th of k in the i-th k-th of `where`."""
    low, high = where
    shares = low + (high - low) * (np.arange(len(facts)) + random.random(len(facts))) / max(len(facts), 1)
    before = np.minimum((shares * (len(filler) + 1)).astype(int), len(filler))
    order = random.permutation(len(facts))
    sentences, marked = list(filler), []
    for shift, place in enumerate(before.tolist()):
        sentences.insert(place + shift, facts[order[shift]].statement)
        marked.append(place + shift)
    text, spans = join_marked(sentences, marked)
    questions = [
        Question(id=f"{name}-q{i}", text=facts[order[i]].question, document=name, start=start, stop=stop)
        for i, (start, stop) in enumerate(spans)
    ]
    return text, questions


def scattered(sentences: list[str], others: Sequence[str], random: np.random.Generator) -> list[str]:
    out = list(sentences)
    for other in others:
        out.insert(int(random.integers(len(out) + 1)), other)
    return out


def _until(sentence: Callable[[], str], target: int, count: Count) -> list[str]:
    found: list[str] = []
    size = 0
    while size < target:
        found.append(sentence())
        size += count(found[-1])
    return found


def _words(text: str) -> int:
    return len(text.split())


def _check(documents: int, sizes: Sizes, facts: int, where: tuple[float, float]) -> None:
    if documents < 1 or facts < 0:
        raise ArgumentError(
            f"documents, facts: got {documents} and {facts}, expected 1 or more documents and 0 or more facts."
        )
    if not 1 <= sizes[0] <= sizes[1]:
        raise ArgumentError(f"sizes: got {sizes}, expected 1 ≤ shortest ≤ longest.")
    if not 0 <= where[0] < where[1] <= 1:
        raise ArgumentError(f"where: got {where}, expected a range of shares in [0, 1], such as (0.0, 0.2).")
