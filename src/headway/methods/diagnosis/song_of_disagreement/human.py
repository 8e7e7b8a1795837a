"""The comparison sheet: people say which of two explanations helps, without knowing whose they are.

`make_sheet` pairs methods on texts, hides their names behind A and B in random order, and repeats some items to see
whether a person answers the same twice. `Sheet.csv()` is what people fill in (columns item, text, A, B, answer,
person), `Sheet.html()` shows the same texts with marked words, and `Sheet.key()` says which method was where: it
stays with the asker. `read_answers` takes filled-in files back and `judge` gives wins per pair with Wilson
intervals, agreement between people (Krippendorff's α, nominal), agreement of each with itself, and how often the
left one was chosen.
"""

from __future__ import annotations

import csv
import html
import io
import itertools
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError, HostError, unknown
from headway.methods.diagnosis.song_of_disagreement.classifier import Example
from headway.statistics import Measurement, proportion

ANSWERS = ("A", "B", "tie")
COLUMNS = ("item", "predicted", "text", "A", "B", "answer", "person")
#: Characters at the start of a cell that a spreadsheet would run as a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


@dataclass(frozen=True, kw_only=True)
class Item:
    """One question. `words` are the text's words, `a` and `b` the numbers of the words that each side marks."""

    id: str
    text: int
    words: tuple[str, ...]
    predicted: str
    a: tuple[int, ...]
    b: tuple[int, ...]
    method_a: str
    method_b: str
    repeat_of: str = ""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one person said about one item, and the line it stood on."""

    item: str
    person: str
    answer: str
    line: int


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """The questions in the order in which they are asked."""

    items: tuple[Item, ...]
    question: str = "Which marked words show better why the model decided as it did?"

    def csv(self) -> str:
        """The sheet to fill in. Marked words are in their order in the text; nothing tells a method."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(COLUMNS)
        for item in self.items:
            marked = [" | ".join(item.words[i] for i in side) for side in (item.a, item.b)]
            row = [item.id, item.predicted, " ".join(item.words), *marked, "", ""]
            writer.writerow([_cell(value) for value in row])
        return out.getvalue()

    def html(self) -> str:
        """The same questions for reading: one self-contained page without scripts."""
        blocks = "\n".join(self._block(item) for item in self.items)
        return _PAGE.format(question=html.escape(self.question), blocks=blocks, count=len(self.items))

    def _block(self, item: Item) -> str:
        sides = "".join(
            f'<div class="side"><b>{name}</b><p dir="auto">{_marked(item.words, chosen)}</p></div>'
            for name, chosen in (("A", item.a), ("B", item.b))
        )
        return (
            f'<section id="{html.escape(item.id)}"><h2>{html.escape(item.id)}</h2><p class="predicted">The model says: '
            f"<b>{html.escape(item.predicted)}</b></p>{sides}</section>"
        )

    def key(self) -> str:
        """JSON that says which method was A and B of each item: not for those who answer."""
        return json.dumps(
            {"question": self.question, "items": [asdict(item) for item in self.items]}, ensure_ascii=False
        )

    @classmethod
    def from_key(cls, text: str) -> Sheet:
        """The sheet that `key` wrote. Raises ArgumentError for anything else."""
        try:
            data = json.loads(text)
            return cls(items=tuple(_item(fields) for fields in data["items"]), question=data["question"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"key: got something else ({error!r}), expected the JSON that Sheet.key wrote."
            ) from None


def make_sheet(
    examples: Sequence[Example],
    scores: Mapping[str, Sequence[Float[np.ndarray, " tokens"]]],
    *,
    predicted: Sequence[str],
    texts: int = 20,
    top: int = 4,
    repeats: float = 0.1,
    seed: int = 0,
) -> Sheet:
    """A blinded sheet over up to `texts` texts and all pairs of methods.

    Words are joined sub-words; each side marks the `top` words with the largest scores, ties by earlier place. Pairs
    that mark the same words are left out: there is nothing to choose. A share `repeats` of the items is asked again,
    sides exchanged. Raises ArgumentError for fewer than two methods, and when no item is left."""
    if len(scores) < 2:
        raise ArgumentError(f"scores: got {len(scores)} methods, expected at least two to compare.")
    if top < 1 or texts < 1 or not 0 <= repeats <= 1:
        raise ArgumentError(
            f"top, texts, repeats: got {top}, {texts}, {repeats}, expected ≥ 1, ≥ 1 and a share in [0, 1]."
        )
    for name, rows in scores.items():
        if len(rows) != len(examples) or len(predicted) != len(examples):
            raise ArgumentError(
                f"scores[{name!r}]: got {len(rows)} examples, expected {len(examples)}, as of predicted."
            )
    random = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    for text in random.permutation(len(examples))[:texts].tolist():
        words, numbers = words_of(examples[text])
        for pair in itertools.combinations(scores, 2):
            names = pair if random.random() < 0.5 else pair[::-1]
            marks = [_top_words(scores[name][text], numbers, len(words), top) for name in names]
            if marks[0] != marks[1]:
                made.append(
                    {"text": text, "words": words, "predicted": predicted[text], "a": marks[0], "b": marks[1],
                     "method_a": names[0], "method_b": names[1]}
                )  # fmt: skip
    if not made:
        raise ArgumentError(
            "scores: every pair of methods marks the same words, so there is nothing to ask. Use a smaller top."
        )
    made = [made[i] for i in random.permutation(len(made))]
    items = [Item(id=f"q{number + 1:03d}", **fields) for number, fields in enumerate(made)]
    again = random.permutation(len(items))[: round(repeats * len(items))].tolist()
    for number, i in enumerate(again):
        items.append(_exchanged(items[i], f"q{len(made) + number + 1:03d}"))
    return Sheet(items=tuple(items))


def words_of(example: Example) -> tuple[tuple[str, ...], list[int]]:
    """(words of a text, the word of each token or −1). Sub-word marks of WordPiece and byte-level BPE are taken off."""
    order: dict[int, int] = {}
    words: list[str] = []
    numbers = []
    for token, word, real in zip(example.tokens, example.words.tolist(), example.real.tolist(), strict=True):
        if word < 0 or not real:
            numbers.append(-1)
            continue
        if word not in order:
            order[word] = len(words)
            words.append("")
        words[order[word]] += token.removeprefix("##").lstrip("Ġ▁")
        numbers.append(order[word])
    return tuple(words), numbers


def read_answers(
    path: str | Path, sheet: Sheet, *, person: str | None = None, bad_rows: Literal["refuse", "skip"] = "refuse"
) -> tuple[list[Answer], list[str]]:
    """(answers, complaints) of one filled-in CSV. Rows without an answer are not answered yet and no complaint.

    `person` names who filled it in where the column is empty (default: the file's name). A row with an unknown item,
    another answer than A, B or tie, or a second answer by the same person is a complaint with its line: refused, or
    skipped and returned. Raises HostError for a file that cannot be read, ArgumentError for missing columns."""
    if bad_rows not in ("refuse", "skip"):
        raise unknown("bad_rows", bad_rows, ("refuse", "skip"))
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise HostError(f"answers: {path} cannot be read ({error}); save it as CSV in UTF-8.") from None
    rows = csv.DictReader(io.StringIO(text))
    for column in ("item", "answer"):
        if column not in (rows.fieldnames or ()):
            raise ArgumentError(
                f"{path}: got columns {rows.fieldnames}, expected {', '.join(COLUMNS)}. Keep the first line."
            )
    known = {item.id for item in sheet.items}
    answers: list[Answer] = []
    complaints: list[str] = []
    seen: set[tuple[str, str]] = set()
    for row in rows:
        given = (row.get("answer") or "").strip()
        if not given:
            continue
        item, who = (row.get("item") or "").strip(), (row.get("person") or "").strip() or person or path.stem
        answer = {"a": "A", "b": "B"}.get(given.lower(), given.lower())
        wrong = (
            f"unknown item {item!r}" if item not in known
            else f"answer {given!r}, expected A, B or tie" if answer not in ANSWERS
            else f"{who} answered {item} before" if (who, item) in seen
            else ""
        )  # fmt: skip
        if wrong:
            complaints.append(f"{path.name} line {rows.line_num}: {wrong}")
            continue
        seen.add((who, item))
        answers.append(Answer(item=item, person=who, answer=answer, line=rows.line_num))
    if complaints and bad_rows == "refuse":
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        raise ArgumentError(f"{complaints[0]}{more}. Mend the file, or read it with bad_rows='skip'.")
    return answers, complaints


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What people said. `preferred[method]`: share of decided comparisons that it won; `pairs`: (first, second) → share
    won by the first; `alpha`: Krippendorff's α over items that two or more answered, NaN without any; `consistency`:
    share of repeated items that a person answered the same; `left`: share of decided answers for A, 0.5 when the
    side decides nothing."""

    people: tuple[str, ...]
    answers: int
    ties: int
    preferred: dict[str, Measurement]
    pairs: dict[tuple[str, str], Measurement]
    alpha: float
    consistency: Measurement | None
    left: Measurement | None


def judge(sheet: Sheet, answers: Sequence[Answer]) -> Judgement:
    """Unblinds answers and sums them up. Repeats count for consistency alone. Raises ArgumentError without answers."""
    if not answers:
        raise ArgumentError("answers: got none, expected at least one. Fill in the column 'answer' with A, B or tie.")
    items = {item.id: item for item in sheet.items}
    for answer in answers:
        if answer.item not in items:
            raise ArgumentError(
                f"answers: got item {answer.item!r}, which is not on this sheet. Give the sheet's own key."
            )
    for (who, asked), times in Counter((answer.person, answer.item) for answer in answers).items():
        if times > 1:
            raise ArgumentError(f"answers: got {times} of {who} to {asked}, expected one. Leave the others out.")
    wins: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    pairs: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
    by_item: dict[str, list[str]] = defaultdict(list)
    said: dict[tuple[str, str], str] = {}
    sides: Counter[str] = Counter()
    for answer in answers:
        item = items[answer.item]
        methods = {"A": item.method_a, "B": item.method_b}
        said[answer.person, item.id] = methods.get(answer.answer, "tie")
        sides[answer.answer] += 1
        if item.repeat_of:
            continue
        by_item[item.id].append(methods.get(answer.answer, "tie"))
        if answer.answer == "tie":
            continue
        winner = methods[answer.answer]
        first, second = sorted(methods.values())
        pairs[first, second][0] += winner == first
        pairs[first, second][1] += 1
        for method in methods.values():
            wins[method][0] += method == winner
            wins[method][1] += 1
    again = [
        (said[who, item], said[who, items[item].repeat_of])
        for who, item in said
        if items[item].repeat_of and (who, items[item].repeat_of) in said
    ]
    decided = sides["A"] + sides["B"]
    return Judgement(
        people=tuple(sorted({answer.person for answer in answers})),
        answers=len(answers),
        ties=sides["tie"],
        preferred={name: proportion(won, count) for name, (won, count) in sorted(wins.items())},
        pairs={pair: proportion(won, count) for pair, (won, count) in sorted(pairs.items())},
        alpha=krippendorff_alpha(list(by_item.values())),
        consistency=proportion(sum(a == b for a, b in again), len(again)) if again else None,
        left=proportion(sides["A"], decided) if decided else None,
    )


def krippendorff_alpha(units: Sequence[Sequence[str]]) -> float:
    """α = 1 − D_observed / D_expected for nominal answers; units with one answer are left out, NaN where all agree
    on one category or no unit has two answers.

        D_o = Σ_u Σ_{c≠k} n_uc n_uk / (m_u − 1) / n ,   D_e = Σ_{c≠k} n_c n_k / (n (n − 1))"""
    counts = [Counter(unit) for unit in units if len(unit) > 1]
    total: Counter[str] = sum(counts, Counter())
    n = sum(total.values())
    if n < 2:
        return math.nan
    observed = sum(
        (sum(c.values()) ** 2 - sum(v * v for v in c.values())) / (sum(c.values()) - 1) for c in counts
    ) / n  # fmt: skip
    expected = (n * n - sum(v * v for v in total.values())) / (n * (n - 1))
    return 1 - observed / expected if expected else math.nan


def _top_words(scores: np.ndarray, numbers: Sequence[int], count: int, top: int) -> tuple[int, ...]:
    totals = np.zeros(count)
    for score, number in zip(scores, numbers, strict=True):
        if number >= 0:
            totals[number] += score
    return tuple(sorted(np.argsort(-totals, kind="stable")[:top].tolist()))


def _item(fields: Mapping[str, Any]) -> Item:
    lists: dict[str, Any] = {name: tuple(fields[name]) for name in ("words", "a", "b")}
    return Item(**{**fields, **lists})


def _exchanged(item: Item, name: str) -> Item:
    return Item(
        id=name, text=item.text, words=item.words, predicted=item.predicted, a=item.b, b=item.a,
        method_a=item.method_b, method_b=item.method_a, repeat_of=item.id,
    )  # fmt: skip


def _cell(value: str) -> str:
    return f"'{value}" if value.startswith(FORMULA) else value


def _marked(words: Sequence[str], chosen: Sequence[int]) -> str:
    shown = (f"<mark>{html.escape(w)}</mark>" if i in set(chosen) else html.escape(w) for i, w in enumerate(words))
    return " ".join(shown)


_PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>Comparison sheet</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
section {{ border-top: 1px solid #8886; padding: .5rem 0 1rem; }} h2 {{ font-size: 1rem; margin: .5rem 0 0; }}
.side {{ display: grid; grid-template-columns: 2rem 1fr; }} .side p {{ margin: .3rem 0; }}
mark {{ background: #ffd54a; color: #111; padding: 0 .15em; border-radius: .2em; }}
</style></head><body><h1>{question}</h1>
<p>{count} questions. Write A, B or tie into the column “answer” of the CSV file, and your name into “person”.</p>
{blocks}
</body></html>
"""
