"""The verb `diagnose anchors`: which sentences of a chain of thought the rest hangs on.

from headway.diagnose.anchors import diagnose_anchors
found = diagnose_anchors(model, tokenizer, traces)

Names are imported when they are asked for: the command line reads this package at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.diagnose.anchors.analysing import Options, diagnose_anchors
    from headway.diagnose.anchors.result import Anchors, TraceAnchors
    from headway.diagnose.anchors.traces import read_traces, think

_HOMES = {
    "Anchors": "result",
    "Options": "analysing",
    "TraceAnchors": "result",
    "diagnose_anchors": "analysing",
    "read_traces": "traces",
    "think": "traces",
}

__all__ = ["Anchors", "Options", "TraceAnchors", "diagnose_anchors", "read_traces", "think"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
