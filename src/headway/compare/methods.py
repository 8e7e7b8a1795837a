"""Which methods are compared: slugs of the catalogue, baselines, or stages that a caller made, each at its budgets."""

from __future__ import annotations

import hashlib
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from headway.compare.baselines import BASELINES
from headway.door import Stage
from headway.door.stages import Driver
from headway.errors import ArgumentError, HeadwayError, unknown

DENSE = "dense"


@dataclass(frozen=True, kw_only=True)
class Method:
    """A name, and either stages as they are (`stages`) or stages at a budget (`at_budget(share, tokens=, model=)`)."""

    name: str
    summary: str = ""
    at_budget: Callable[..., tuple[Stage, ...]] | None = None
    stages: tuple[Stage, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method at a budget (None: as it was given, or dense), ready to attach; or the reason why it cannot be."""

    method: str
    summary: str
    budget: float | None
    stages: tuple[Stage, ...] = ()
    refusal: str = ""

    @property
    def label(self) -> str:
        return label(self.method, self.budget)

    @property
    def drives(self) -> bool:
        """Whether it wraps `generate`, so that only whole generations show it."""
        return any(isinstance(stage, Driver) for stage in self.stages)

    def fingerprint(self) -> list[str]:
        """The stages with all that they were given, and the code they stand in."""
        return [f"{_identity(stage)} {_code(type(stage))}" for stage in self.stages]


def label(method: str, budget: float | None) -> str:
    return method if budget is None else f"{method} at {percent(budget)}"


def percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def candidates(methods: Sequence[Any], budgets: Sequence[float], *, tokens: int, model: nn.Module) -> list[Candidate]:
    """Dense, then every method at every budget, in the order given.

    A method that refuses a budget becomes a candidate with the reason."""
    check_budgets(budgets)
    found = [Candidate(method=DENSE, summary="the model as it is", budget=None)]
    for method in resolve(methods):
        if method.at_budget is None:
            found.append(Candidate(method=method.name, summary=method.summary, budget=None, stages=method.stages))
            continue
        for budget in budgets:
            refusal = ""
            stages: tuple[Stage, ...] = ()
            try:
                stages = tuple(method.at_budget(budget, tokens=tokens, model=model))
            except HeadwayError as error:
                refusal = str(error)
            found.append(
                Candidate(method=method.name, summary=method.summary, budget=budget, stages=stages, refusal=refusal)
            )
    return found


def check_budgets(budgets: Sequence[float]) -> None:
    if not budgets:
        raise ArgumentError("budgets: got none, expected at least one share of the keys in (0, 1].")
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget <= 1:
            raise ArgumentError(f"budgets: got {budget!r}, expected shares of the keys in (0, 1], such as 0.25.")
    if len(set(budgets)) < len(budgets):
        raise ArgumentError(f"budgets: got {list(budgets)}, expected each of them once.")


def resolve(methods: Sequence[Any]) -> list[Method]:
    """Names, stages and pairs as methods. Raises ArgumentError for unknown and repeated names."""
    if isinstance(methods, str) or not methods:
        raise ArgumentError(f"methods: got {methods!r}, expected a list of at least one, such as ['sinks-window'].")
    if DENSE in methods:
        raise ArgumentError("methods: got 'dense', which every comparison holds already; expected another name.")
    found = [_method(given) for given in methods]
    for method in found:
        if method.name == DENSE:
            raise ArgumentError("methods: got the name 'dense', which is taken; expected another name.")
        if sum(other.name == method.name for other in found) > 1:
            raise ArgumentError(
                f"methods: got {method.name!r} more than once, expected different names. Pass (name, stages) pairs."
            )
    return found


def _method(given: Any) -> Method:
    if isinstance(given, Method):
        return given
    if isinstance(given, str):
        return _named(given)
    if isinstance(given, Stage):
        return Method(name=given.title, stages=(given,))
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and given[0]:
        name, what = given
        stages = what if isinstance(what, tuple) else (what,)
        if stages and all(isinstance(stage, Stage) for stage in stages):
            return Method(name=name, stages=stages)
        if callable(what):
            return Method(name=name, at_budget=what)
    raise ArgumentError(
        f"methods: got {given!r}, expected a slug, a stage, or a pair of a name and a stage, a tuple of stages, or a "
        "function at_budget(share, *, tokens, model)."
    )


def _named(name: str) -> Method:
    if name in BASELINES:
        summary, at_budget = BASELINES[name]
        return Method(name=name, summary=summary, at_budget=at_budget)
    from headway.card import homes

    modules = homes()
    usable = [slug for slug, module in modules.items() if hasattr(module, "at_budget")]
    if name in modules and name not in usable:
        raise ArgumentError(
            f"methods: got {name!r}, which has no form at a budget and so cannot be compared by name; expected one of "
            f"{', '.join([*BASELINES, *usable])}. In Python, pass its stages as (name, stages)."
        )
    if name not in modules:
        raise unknown("methods", name, [*BASELINES, *usable])
    return Method(name=name, summary=modules[name].CARD.summary, at_budget=modules[name].at_budget)


def _identity(value: Any) -> str:
    """A text that is equal for equal values only. What cannot be put into words gets one that never comes again, so
    that nothing measured with it is taken for something else."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().float().numpy()
    if isinstance(value, np.ndarray):
        return f"{value.shape} {hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {_identity(part)}' for key, part in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"({', '.join(map(_identity, value))})"
    if is_dataclass(value) and not isinstance(value, type):
        return f"{type(value).__qualname__}{_identity({f.name: getattr(value, f.name) for f in fields(value)})}"
    if isinstance(value, Stage):
        return f"{type(value).__qualname__}{_identity(vars(value))}"
    words = repr(value)
    return f"{words} {uuid.uuid4()}" if " at 0x" in words else words


def _code(stage: type) -> str:
    """A digest of the folder or file that a stage's class is written in."""
    import sys

    file = getattr(sys.modules.get(stage.__module__), "__file__", None)
    if file is None:
        return ""
    path = Path(file)
    package = path.parent / "__init__.py"
    beside = package.exists() and "CARD" in package.read_text(encoding="utf-8")
    sources = sorted(path.parent.glob("*.py")) if beside else [path]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]


def check_share(share: float) -> float:
    """A tolerance or similar: a finite number of at least 0."""
    if isinstance(share, bool) or not isinstance(share, int | float) or not math.isfinite(share) or share < 0:
        raise ArgumentError(f"tolerance: got {share!r}, expected a number of at least 0, such as 0.05.")
    return float(share)
