"""The verb `diagnose agreement`: do explanations of a classifier agree, and which of them is right.

from headway.diagnose.agreement import diagnose_agreement
found = diagnose_agreement(classifier, examples)

Names are imported when they are asked for: the command line reads this package at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.diagnose.agreement.analysing import Options, diagnose_agreement
    from headway.diagnose.agreement.classifying import Ready, make_ready
    from headway.diagnose.agreement.result import Agreement
    from headway.diagnose.agreement.texts import Row, read_rows

_HOMES = {
    "Agreement": "result",
    "Options": "analysing",
    "Ready": "classifying",
    "Row": "texts",
    "diagnose_agreement": "analysing",
    "make_ready": "classifying",
    "read_rows": "texts",
}

__all__ = ["Agreement", "Options", "Ready", "Row", "diagnose_agreement", "make_ready", "read_rows"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
