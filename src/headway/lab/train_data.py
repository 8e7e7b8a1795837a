"""What `headway train lm --data` may name: token files, texts, or a generated task with its settings."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import nn

from headway.errors import ArgumentError, unknown
from headway.files import write_atomically
from headway.hosts import default_text
from headway.progress import Tell
from headway.train.generated import TASKS, Task
from headway.train.losses import LossFunction, model_loss, next_token_loss
from headway.train.regression import PiecewiseRegression, regression_loss
from headway.train.streams import Batch, Stream
from headway.train.tokenizers import load_tokenizer
from headway.train.tokenizing import tokenize_folder
from headway.train.tokens import HEADER, Packed, Tokens

#: Name of the built-in text.
DEFAULT = "default"
#: Batches of a validation pass.
VALIDATION = 8


@dataclass(frozen=True, kw_only=True)
class LanguageData:
    """Where batches come from, and what they are judged by.

    chance: accuracy of a guess, for tasks that have one; of tasks about numbers, the squared error of answering zero.
    tokenizer: None for tasks whose tokens are no text. numbers: how many a token has and how many are asked for, where
    tokens are no ids."""

    about: str
    stream: Stream
    vocabulary: int
    length: int
    loss: LossFunction
    validation: list[Batch] | Callable[[nn.Module], Mapping[str, float]] | None
    chance: float | None = None
    tokenizer: Any = None
    separator: int | None = None
    numbers: tuple[int, int] | None = None


def language_data(
    name: str, *, length: int, rows: int, seed: int, tokenizer: str, folder: Path, tell: Tell
) -> LanguageData:
    """The data that `name` means:

    "default": the built-in text; a folder with token files; a text file or a folder of texts, which are tokenized into
        `folder` first; a generated task, with settings behind a colon: "recall:pairs=4,gap=64", "state:group=S5".

    Rows of texts have `length` tokens; tasks have a length of their own (that of "recall" is `length` unless it has a
    gap). Tokens of "piecewise-regression:dim=4" are numbers, not ids.

    Raises ArgumentError for a name that is none of these, and for unknown settings."""
    task, _, settings = name.partition(":")
    if task in TASKS:
        return _task(task, settings, length, rows, seed)
    if task == PiecewiseRegression.name:
        return _regression(settings, rows, seed)
    path = Path(name).expanduser()
    if name != DEFAULT and not path.exists():
        raise unknown(
            "data", name, [DEFAULT, *TASKS, PiecewiseRegression.name], fix="Or give a file or folder that exists."
        )
    if name != DEFAULT and (path / HEADER).is_file():
        tokens = Tokens(path)
    else:
        tokens = _tokenized(None if name == DEFAULT else path, folder, tokenizer, tell)
    stream = Packed(tokens, length, rows=rows, seed=seed, resets=tokens.documents > 1)
    return LanguageData(
        about=f"{name}: {len(tokens):,} tokens in {tokens.documents:,} documents, {tokens.header['tokenizer']}",
        stream=stream,
        vocabulary=tokens.vocabulary,
        length=length,
        loss=model_loss,
        validation=stream.held_out(min(stream.held_out_batches, VALIDATION)),
        tokenizer=load_tokenizer(tokens.folder / "tokenizer"),
        separator=tokens.separator,
    )


def _tokenized(path: Path | None, folder: Path, tokenizer: str, tell: Tell) -> Tokens:
    """Token files of a text in `folder`; made once, by one of several processes."""
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / ".lock"):
        if path is None:
            path = folder / "default.txt"
            if not path.exists():
                write_atomically(path, default_text().text)
        return tokenize_folder(path, folder / "tokens", tokenizer=tokenizer, tell=tell)


def _task(name: str, settings: str, length: int, rows: int, seed: int) -> LanguageData:
    cls = TASKS[name]
    given, known = _settings_of(cls, settings)
    if "tokens" in known and not {"tokens", "gap"} & set(given):
        given["tokens"] = length
    task: Task = cls(**{"rows": rows, "seed": seed, **given})
    return LanguageData(
        about=f"{name}, {task.vocabulary} different tokens",
        stream=task,
        vocabulary=task.vocabulary,
        length=task.length,
        loss=next_token_loss,
        validation=task.scorer(VALIDATION),
        chance=task.chance,
    )


def _regression(settings: str, rows: int, seed: int) -> LanguageData:
    given, _ = _settings_of(PiecewiseRegression, settings)
    task = PiecewiseRegression(**{"rows": rows, "seed": seed, **given})
    return LanguageData(
        about=f"{task.name}, {task.segments} maps of {task.dim} numbers to as many",
        stream=task,
        vocabulary=0,
        length=task.length,
        loss=regression_loss,
        validation=list(task.held_out(VALIDATION)),
        chance=task.chance,
        numbers=(task.width, task.dim),
    )


def _settings_of(cls: type[Task] | type[PiecewiseRegression], settings: str) -> tuple[dict[str, Any], list[str]]:
    """What was said of a task, and what can be said of it."""
    given = parse_settings("data", settings)
    known = [field.name for field in fields(cls) if field.name not in ("rows", "seed", "position")]
    for setting in given:
        if setting not in known:
            raise unknown(f"data {cls.name}", setting, known)
    return given, known


def parse_settings(argument: str, text: str) -> dict[str, Any]:
    """Settings from text such as "pairs=4,group=S5": values are JSON where they can be, else text."""
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise ArgumentError(f"{argument}: got {part!r}, expected name=value.")
        found[name.strip().replace("-", "_")] = parse_value(value.strip())
    return found


def parse_value(text: str) -> Any:
    """A value as JSON where it is some (numbers, true, null, lists), else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return text
