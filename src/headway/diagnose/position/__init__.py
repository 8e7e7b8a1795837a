"""The verb `diagnose position`: does a retriever find an answer less often when it stands later in its document?

from headway.diagnose.position import diagnose_position
found = diagnose_position(sets, encoder)

Names are imported when they are asked for: the command line reads this package at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.diagnose.position.analysing import Options, diagnose_position
    from headway.diagnose.position.result import Position
    from headway.diagnose.position.sources import default_set, read_documents

_HOMES = {
    "Options": "analysing",
    "Position": "result",
    "default_set": "sources",
    "diagnose_position": "analysing",
    "read_documents": "sources",
}

__all__ = ["Options", "Position", "default_set", "diagnose_position", "read_documents"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
