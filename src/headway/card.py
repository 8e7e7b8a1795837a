"""Cards: what each implemented paper is, in one record. The catalogue and every table of methods is made from them."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass
from types import ModuleType

FAMILIES = ("sinks", "long_context", "layers", "diagnosis", "diffusion", "recommend", "gaze", "learners")


@dataclass(frozen=True, kw_only=True)
class Card:
    """One paper: slug, title, year, arXiv id, family (folder under `methods/`), stages it uses, what it needs of a
    host, its knobs (name -> what it does) and one sentence that says what it is for."""

    slug: str
    title: str
    year: int
    arxiv: str
    family: str
    stages: tuple[str, ...]
    summary: str
    needs: tuple[str, ...] = ()
    knobs: dict[str, str] | None = None

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family: got {self.family!r}, expected one of {', '.join(FAMILIES)}.")


def catalogue() -> dict[str, Card]:
    """All cards by slug, found by importing every module under `headway.methods` that defines `CARD`."""
    return {slug: module.CARD for slug, module in homes().items()}


def homes() -> dict[str, ModuleType]:
    """The module of each method by slug: the one that defines its card."""
    package = importlib.import_module("headway.methods")
    found: dict[str, ModuleType] = {}
    for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        module = importlib.import_module(info.name)
        card = getattr(module, "CARD", None)
        if card is not None:
            found.setdefault(card.slug, module)
    return dict(sorted(found.items()))
