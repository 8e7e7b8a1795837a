"""What a CLIP is audited on: pictures with classes and groups, a bank of texts, and neutral prompts, read from files or
drawn as attribute scenes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.errors import ArgumentError, HeadwayError, missing_extra
from headway.hosts.rows import Account, json_objects
from headway.methods.diagnosis.clip_ccs import tiny
from headway.methods.diagnosis.clip_ccs.judges import EVERYDAY
from headway.tasks.attribute_scenes import CONCEPTS, make_scenes, phrase_bank, prompts, values

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
FIELDS = ("picture", "labels", "group")
BATCH = 32
#: The question of pictures whose folder is their class.
FOLDER_QUESTION = "class"
#: Turns a list of PIL pictures into pixels.
Pixels = Callable[[list[Any]], Tensor]


@dataclass(frozen=True)
class Question:
    """A zero-shot question: prompts by class, and the class of each picture, −1 where that is not known."""

    prompts: dict[str, list[str]]
    labels: Tensor


@dataclass(frozen=True)
class Pictures:
    """What a model is audited on: pixel batches, zero-shot questions by name, and for bias the group of each picture
    and neutral prompts. `left_out` are the rows that could not be used."""

    batches: list[Tensor]
    questions: dict[str, Question] = field(default_factory=dict)
    groups: list[str] | None = None
    neutral: dict[str, list[str]] = field(default_factory=dict)
    what: str = "pictures"
    left_out: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(batch.shape[0] for batch in self.batches)


def scenes(count: int, *, seed: int) -> Pictures:
    """Attribute scenes with a question for each attribute. Shapes are the neutral prompts and colours the groups: a
    shape has no colour of its own."""
    made = make_scenes(count, seed=seed)
    return Pictures(
        batches=list(tiny.pixels(made.images).split(100)),
        questions={concept: Question(prompts(concept), made.of(concept)) for concept in CONCEPTS},
        groups=[values("colour")[int(i)] for i in made.of("colour")],
        neutral=prompts("shape"),
        what="attribute scenes",
    )


def scene_bank() -> dict[str, str]:
    """Every phrase of the scenes with its concept."""
    return {phrase.text: phrase.concept for phrase in phrase_bank()}


def everyday_bank() -> dict[str, str]:
    """The words of the lexicon as short captions, with their concepts: what is used where no bank is given."""
    return {f"a photo about {word}": concept for concept, words in EVERYDAY.items() for word in words}


def read_bank(path: str | Path, *, bad_rows: str = "refuse") -> tuple[dict[str, str | None], list[str]]:
    """Texts of a file with the concept of each (None where none is given), and what was left out. A line is a text, or
    a text, a tab and its concept; empty lines are passed over.

    Raises HeadwayError with the line of a text that stands there twice, or that has no words before its tab."""
    found: dict[str, str | None] = {}
    rows = _Rows(path, bad_rows, "--bank")
    for number, line in rows.lines():
        text, _, concept = line.partition("\t")
        text = " ".join(text.split())
        if not text:
            rows.bad(number, "got no text before the tab, expected words.")
        elif text in found:
            rows.bad(number, f"got {text!r} again, expected each text once.")
        else:
            found[text] = concept.strip() or None
    if not found:
        raise ArgumentError(f"--bank: got {path} without a text, expected one a line.")
    return found, rows.left_out


def read_neutral(path: str | Path) -> list[str]:
    """The neutral prompts of a text file, one a line. Raises ArgumentError for a file without any."""
    found = [" ".join(line.split()) for _, line in _Rows(path, "refuse", "--neutral").lines()]
    if not found:
        raise ArgumentError(f"--neutral: got {path} without a prompt, expected one a line.")
    return found


def read_pictures(
    path: str | Path,
    pixels: Pixels,
    *,
    template: str = "a photo of a {}.",
    bad_rows: str = "refuse",
    most: int | None = None,
    batch: int = BATCH,
) -> Pictures:
    """Pictures of a folder or of a JSONL.

    In a folder each sub-folder is a class; pictures beside them have none. A line of a JSONL is an object with
    `picture` (a path, from the file's own folder), and where known `labels` (question -> class) and `group`. Needs
    Pillow (extra `vision`). bad_rows: "refuse" raises HeadwayError with the first that cannot be used, "skip" lists
    them. most: an even selection of so many."""
    path = check_source(path, template)
    rows = _Rows(path, bad_rows)
    named = _folder(path) if path.is_dir() else _manifest(rows)
    if most is not None and len(named) > most:
        named = [named[i * len(named) // most] for i in range(most)]
    kept, opened = [], []
    for row in named:
        try:
            opened.append(_open(row.path))
            kept.append(row)
        except HeadwayError as error:
            if isinstance(error, ImportError):
                raise
            rows.bad(row.number, str(error))
    if not kept:
        raise ArgumentError(f"--pictures: got {path} without a picture, expected files {', '.join(SUFFIXES)}.")
    batches = [pixels(opened[i : i + batch]) for i in range(0, len(opened), batch)]
    grouped = all(row.group is not None for row in kept)
    return Pictures(
        batches=batches,
        questions=_questions(kept, template),
        groups=[str(row.group) for row in kept] if grouped else None,
        what=f"pictures of {path.name}",
        left_out=rows.left_out,
    )


def check_source(path: str | Path, template: str) -> Path:
    """The path. Raises ArgumentError where nothing is there, and for a template without a place for a class."""
    if "{}" not in template:
        raise ArgumentError(f"template: got {template!r}, expected words with {{}} for the name of a class.")
    path = Path(path)
    if not path.exists():
        raise ArgumentError(f"--pictures: got {path}, which is not there; expected a folder or a JSONL.")
    return path


@dataclass(frozen=True)
class _Row:
    path: Path
    labels: Mapping[str, str]
    group: str | None
    number: int | None


class _Rows:
    """The lines of a file, and the account of those that cannot be used."""

    def __init__(self, path: str | Path, policy: str, option: str = "--pictures") -> None:
        self.path, self.account, self.option = Path(path), Account(policy), option

    @property
    def left_out(self) -> list[str]:
        return [line.removeprefix(str(self.path)).lstrip(",: ") for line in self.account.skipped]

    def text(self) -> str:
        try:
            return self.path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(
                f"{self.option}: got {self.path}, which cannot be read as UTF-8 text ({error}). Name a text file."
            ) from None

    def lines(self) -> list[tuple[int, str]]:
        text = self.text()
        return [(i, line.rstrip("\r")) for i, line in enumerate(text.split("\n"), 1) if line.strip()]

    def bad(self, number: int | None, why: str) -> None:
        self.account.bad(str(self.path) if number is None else f"{self.path}, line {number}", why)


def _folder(path: Path) -> list[_Row]:
    return [
        _Row(file, {} if file.parent == path else {FOLDER_QUESTION: file.relative_to(path).parts[0]}, None, None)
        for file in sorted(path.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]


def _manifest(rows: _Rows) -> list[_Row]:
    found = []
    for number, row in json_objects(rows.text().split("\n"), rows.bad):
        if not isinstance(row.get("picture"), str) or set(row) - set(FIELDS):
            told = str(row)[:60]
            rows.bad(number, f"got {told!r}, expected an object with 'picture', and maybe 'labels' and 'group'.")
            continue
        labels = row.get("labels") or {}
        if not isinstance(labels, dict) or not all(isinstance(v, str) and v for v in labels.values()):
            rows.bad(number, f"got labels {str(labels)[:60]}, expected question -> class, both words.")
            continue
        group = row.get("group")
        found.append(_Row(rows.path.parent / row["picture"], labels, None if group is None else str(group), number))
    return found


def _open(path: Path) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise missing_extra("pillow", "vision", "reading pictures") from None
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise HeadwayError(f"got {path.name}, which cannot be read as a picture ({error}).") from None


def _questions(rows: Sequence[_Row], template: str) -> dict[str, Question]:
    found = {}
    for name in dict.fromkeys(name for row in rows for name in row.labels):
        classes = sorted({row.labels[name] for row in rows if name in row.labels})
        if len(classes) < 2:
            raise ArgumentError(
                f"labels: got one class, {classes[0]!r}, for the question {name!r}; expected two or more to tell apart."
            )
        labels = torch.tensor([classes.index(row.labels[name]) if name in row.labels else -1 for row in rows])
        found[name] = Question({c: [template.format(c.replace("_", " "))] for c in classes}, labels)
    return found
