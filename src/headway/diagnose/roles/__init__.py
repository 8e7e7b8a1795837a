"""The verb `diagnose roles`: how agents keep their role, which heads a conflicting message moves, and what training on
their layers mends.

from headway.diagnose.roles import diagnose_roles
found = diagnose_roles(model, tokenizer)

Names are imported when they are asked for: the command line reads this package at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.diagnose.roles.analysing import Options, diagnose_roles
    from headway.diagnose.roles.result import Roles

_HOMES = {"Options": "analysing", "Roles": "result", "diagnose_roles": "analysing"}

__all__ = ["Options", "Roles", "diagnose_roles"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
