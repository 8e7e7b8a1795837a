"""The verb `diagnose concepts`: what each attention head of a CLIP writes, in words, and what silencing it costs.

from headway.diagnose.concepts import audit
found = audit(model, tokenise, pictures, bank)

Names are imported when they are asked for: the command line reads this package at every start.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.diagnose.concepts.auditing import Settings, audit
    from headway.diagnose.concepts.pictures import Pictures, Question, read_bank, read_pictures, scenes
    from headway.diagnose.concepts.result import Concepts, Effect

_HOMES = {
    "Concepts": "result",
    "Effect": "result",
    "Pictures": "pictures",
    "Question": "pictures",
    "Settings": "auditing",
    "audit": "auditing",
    "read_bank": "pictures",
    "read_pictures": "pictures",
    "scenes": "pictures",
}

__all__ = [
    "Concepts",
    "Effect",
    "Pictures",
    "Question",
    "Settings",
    "audit",
    "read_bank",
    "read_pictures",
    "scenes",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
