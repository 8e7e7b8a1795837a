"""`headway.compare`: from a model, a text and some methods to a `Comparison`."""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headway.compare.cells import FAILED, LEFT_OUT, REFUSED, Cell, CellStore, cell_key, title
from headway.compare.judge import conclude
from headway.compare.methods import DENSE, Candidate, candidates, check_share
from headway.compare.quality import TASKS, Task, check_tasks
from headway.compare.recommend import SAVES
from headway.compare.result import Comparison
from headway.compare.setting import MODES, Setting, UnshowableError
from headway.compare.speed import SPEED, Counts, check_repeats, measure_speed
from headway.compare.texts import BLOCK
from headway.door import use
from headway.errors import ArgumentError, HeadwayError, unknown
from headway.hosts import Text, default_text, positions_of, tokenize
from headway.hosts.facts import model_facts, versions
from headway.progress import Tell
from headway.tasks.answering import chunks
from headway.tasks.samples import chat_frame

log = logging.getLogger(__name__)

DEFAULT_METHODS = ("streaming-llm", "flexprefill", "sinks-window", "random-blocks")
DEFAULT_BUDGETS = (0.5, 0.25, 0.125)
DEFAULT_TASKS = ("perplexity", "needle")
#: Tokens of an ordinary comparison.
DEFAULT_TOKENS = 1024
#: Two blocks of a perplexity's interval, and a few tokens.
LEAST_TOKENS = 2 * BLOCK + 32


def compare(
    model: nn.Module,
    tokenizer: Any,
    text: Text | str | None = None,
    *,
    methods: Sequence[Any] = DEFAULT_METHODS,
    budgets: Sequence[float] = DEFAULT_BUDGETS,
    tasks: Sequence[str] = DEFAULT_TASKS,
    tokens: int | None = None,
    count: int = 6,
    modes: Sequence[str] = MODES,
    chunk: int | None = None,
    chat: bool = False,
    repeats: int = 5,
    new_tokens: int = 16,
    tolerance: float = 0.05,
    save: str = "auto",
    seed: int = 0,
    name: str | None = None,
    out: str | Path | None = None,
    progress: Tell | None = None,
) -> Comparison:
    """Methods beside dense attention in one run: quality, prefill and decode time, KV bytes and density at each budget.

    methods: slugs of the catalogue, baselines ("window", "sinks-window", "random-blocks"), stages, or pairs (name,
    stages) and (name, at_budget). budgets: shares of the keys in (0, 1]. tasks: see `quality.TASKS`; times are always
    measured. tokens: how much of the text is read, and how long generated prompts are (1,024 by default, or what text
    and model have). count: samples of a task. modes: "blind" and "aware" of the question. chunk: prefill so many tokens
    at once. chat: put the prompts of generated questions into the tokenizer's chat template. repeats: pairs of timed
    runs; new_tokens: tokens decoded in each. tolerance: the loss that a recommended point may have. save: what it is to
    save, "time", "memory", or "auto" for time if any can be saved, else memory. out: a folder for finished cells; a
    second call with the same settings goes on from them.

    Raises ArgumentError for wrong arguments, HostError for a model without a cache. A method that refuses becomes a
    point with the reason."""
    start = time.perf_counter()
    check_tasks(tasks)
    check_choices(modes, save, count, chunk)
    if chat:
        chat_frame(tokenizer)
    tolerance = check_share(tolerance)
    given = default_text() if text is None else text if isinstance(text, Text) else Text.of(text, "the given text")
    positions = positions_of(model)
    wanted = tokens if tokens is not None else min(DEFAULT_TOKENS, positions or DEFAULT_TOKENS)
    ids = tokenize(tokenizer, given, wanted, positions=positions, needed=LEAST_TOKENS)
    check_repeats(repeats, new_tokens, ids.shape[1])
    setting = Setting(
        model=model,
        tokenizer=tokenizer,
        text=given,
        ids=ids,
        count=count,
        seed=seed,
        modes=tuple(dict.fromkeys(modes)),
        chunk=chunk,
        chat=chat,
    )
    chosen = candidates(methods, budgets, tokens=setting.tokens, model=model)
    load = _load()
    with _evaluating(model):
        work = _Work(setting, list(dict.fromkeys(tasks)), repeats, new_tokens, CellStore(_cells(out)), progress)
        work.total = sum(not candidate.refusal for candidate in chosen) * len(work.parts)
        cells = [work.cells_of(candidate) for candidate in chosen]
    facts = model_facts(model, name) | {"positions": positions}
    run = {
        "tokens": setting.tokens,
        "text": given.source,
        "text_sha256": given.sha256,
        "tasks": list(work.names),
        "budgets": [float(budget) for budget in budgets],
        "samples": count,
        "modes": list(setting.modes),
        "chat_template": chat,
        "prefill_chunk": chunk if chunk is not None else "whole prompt",
        "repeats": repeats,
        "new_tokens": new_tokens,
        "tolerance": tolerance,
        "save": save,
        "seed": seed,
        "cells_measured": work.measured,
        "cells_reused": work.reused,
        "seconds": round(time.perf_counter() - start, 1),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **versions(),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "load_average": load,
    }
    notes = [] if ids.shape[1] >= wanted else [
        f"The text has {ids.shape[1]:,} tokens, fewer than the {wanted:,} asked for; prompts are as long as the text."
    ]  # fmt: skip
    return conclude(chosen, cells, facts, run, notes)


@dataclass
class _Work:
    """The order of work: which cells there are, which are finished, and the measuring of the rest."""

    setting: Setting
    names: list[str]
    repeats: int
    new_tokens: int
    store: CellStore
    progress: Tell | None
    measured: int = 0
    reused: int = 0
    total: int = 0

    def __post_init__(self) -> None:
        self.material = {name: TASKS[name].prepare(self.setting) for name in self.names}
        self.common = _depends_on(self.setting)
        self.parts: list[tuple[str, str]] = [
            (name, mode) for name in self.names for mode in TASKS[name].modes or self.setting.modes
        ]
        self.parts.append((SPEED, ""))

    def cells_of(self, candidate: Candidate) -> list[Cell]:
        """Every task of a candidate, and its times."""
        if candidate.refusal:
            method, budget, reason = candidate.method, candidate.budget, candidate.refusal
            return [
                Cell(method=method, budget=budget, task=task, status=REFUSED, reason=reason)
                for task in [title(*part) for part in self.parts]
            ]
        return [self._cell(candidate, *part) for part in self.parts]

    def _cell(self, candidate: Candidate, task: str, mode: str) -> Cell:
        key = cell_key(title(task, mode).replace(", ", "-"), self._depends(candidate, task))
        found = self.store.get(key, method=candidate.method, budget=candidate.budget)
        if found is not None:
            self.reused += 1
            return found
        if self.progress is not None:
            self.progress(f"{candidate.label}: {title(task, mode)}", self.measured + self.reused, self.total)
        start = time.perf_counter()
        with _heard() as notes:
            cell = self._attempt(candidate, task, mode)
        cell = replace(cell, seconds=time.perf_counter() - start, notes=list(dict.fromkeys(notes)))
        self.store.put(key, cell)
        self.measured += 1
        return cell

    def _attempt(self, candidate: Candidate, task: str, mode: str) -> Cell:
        """The cell, or why there is none. What dense refuses, nothing can be compared with: that is raised."""
        where: dict[str, Any] = {"method": candidate.method, "budget": candidate.budget, "task": title(task, mode)}
        try:
            if task == SPEED:
                return measure_speed(self.setting, candidate, repeats=self.repeats, new_tokens=self.new_tokens)
            return self._measure(candidate, TASKS[task], mode, where)
        except UnshowableError as error:
            return Cell(**where, status=LEFT_OUT, reason=str(error))
        except HeadwayError as error:
            if candidate.method == DENSE:
                raise
            return Cell(**where, status=REFUSED, reason=str(error))
        except Exception as error:
            if candidate.method == DENSE:
                raise
            log.warning("%s broke on %s", candidate.label, title(task, mode), exc_info=True)
            return Cell(**where, status=FAILED, reason=f"{type(error).__name__}: {error}")

    def _measure(self, candidate: Candidate, task: Task, mode: str, where: dict[str, Any]) -> Cell:
        material = task.ready(self.material[task.name])
        if not candidate.stages:
            scores, held = task.measure(self.setting, material, mode, False)
            return Cell(**where, scores=scores, cache_bytes=held, density={"all": 1.0})
        with use(self.setting.model, *candidate.stages) as handle:
            scores, held = task.measure(self.setting, material, mode, candidate.drives)
            ran = Counts.of(handle)
        return Cell(**where, scores=scores, cache_bytes=held, density={"all": ran.density}, paths=dict(ran.paths))

    def _depends(self, candidate: Candidate, task: str) -> dict[str, Any]:
        settings: dict[str, Any] = {"stages": candidate.fingerprint(), **self.common}
        if task == SPEED:
            settings |= {"repeats": self.repeats, "new_tokens": self.new_tokens, "threads": torch.get_num_threads()}
        else:
            settings |= {"count": self.setting.count, "seed": self.setting.seed, "chat": self.setting.chat}
        return settings


def _depends_on(setting: Setting) -> dict[str, Any]:
    """What every cell depends on beside its stages."""
    return {
        "model": _fingerprint(setting.model),
        "text": setting.text.sha256,
        "ids": hashlib.sha256(setting.ids.numpy().tobytes()).hexdigest(),
        "chunk": setting.chunk,
        "device": str(next(setting.model.parameters()).device),
        "code": _code(),
        **versions(),
    }


@functools.lru_cache(maxsize=1)
def _code() -> str:
    """A digest of the code that measures: what is below the methods, and this package."""
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for room in ("door", "kernels", "tasks", "compare"):
        for path in sorted((root / room).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _fingerprint(model: nn.Module) -> str:
    """A digest of a model: its config, and name, shape, dtype and sum of every parameter."""
    config = getattr(model, "config", None)
    digest = hashlib.sha256(str(getattr(config, "to_dict", dict)()).encode())
    digest.update(str(getattr(config, "_attn_implementation", "")).encode())
    for name, parameter in model.named_parameters():
        total = float(parameter.detach().double().sum())
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {total!r}".encode())
    return digest.hexdigest()


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What methods log as warnings meanwhile, in place of a line for every scope that opens."""
    heard: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage())

    logger, listener = logging.getLogger("headway.methods"), Listener(logging.WARNING)
    before = logger.propagate
    logger.addHandler(listener)
    logger.propagate = False
    try:
        yield heard
    finally:
        logger.removeHandler(listener)
        logger.propagate = before


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_choices(modes: Sequence[str], save: str, count: int, chunk: int | None) -> None:
    """Refuses what is wrong whatever the model and the text are."""
    if isinstance(modes, str) or not modes:
        raise unknown("modes", modes, MODES, fix="Give at least one, as a list.")
    for mode in modes:
        if mode not in MODES:
            raise unknown("modes", mode, MODES)
    if save not in SAVES:
        raise unknown("save", save, SAVES)
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ArgumentError(f"count: got {count!r}, expected a whole number of at least 1.")
    next(chunks(torch.zeros(1, 1, dtype=torch.long), chunk))


def _cells(out: str | Path | None) -> Path | None:
    return None if out is None else Path(out) / "cells"


def _load() -> float | None:
    """The one-minute load average; None where the system has none."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
