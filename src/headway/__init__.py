"""Headway: see what attention does in a real model, change it, train new kinds of it, and test what papers claim."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.door import CaptureSpec, capture, inspect, observe, use
    from headway.evidence import prove
    from headway.hosts import load
    from headway.look import Look, look

__version__ = "0.1.0"

_HOMES = {
    "load": "headway.hosts",
    "look": "headway.look",
    "Look": "headway.look",
    "use": "headway.door",
    "inspect": "headway.door",
    "prove": "headway.evidence",
    "observe": "headway.door",
    "capture": "headway.door",
    "CaptureSpec": "headway.door",
}
__all__ = ["CaptureSpec", "Look", "capture", "inspect", "load", "look", "observe", "prove", "use"]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `import headway` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headway' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
