"""The verb `select`: score a corpus with a model's attention and keep the best part of every domain.

    from headway.select import select
    found = select("corpus/", "smollm2", out="select-out")

Names are imported when they are asked for: the command line reads this package at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.select.recipe import Detection
    from headway.select.records import Reading
    from headway.select.result import CorpusSelection
    from headway.select.selecting import select

_HOMES = {"CorpusSelection": "result", "Detection": "recipe", "Reading": "records", "select": "selecting"}

__all__ = ["CorpusSelection", "Detection", "Reading", "select"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
