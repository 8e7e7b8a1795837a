"""Headway: see what attention does in a real model, change it, train new kinds of it, and test what papers claim."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from headway.compare import Comparison, compare
    from headway.door import CaptureSpec, capture, inspect, observe, use
    from headway.evidence import prove
    from headway.hosts import load
    from headway.look import Look, look
    from headway.methods.long_context.dhsa import DHSA
    from headway.methods.long_context.duo_attention import DuoAttention
    from headway.methods.long_context.flexprefill import FlexPrefill
    from headway.methods.long_context.infiniretri import InfiniRetri
    from headway.methods.long_context.power_attention import PowerAttention
    from headway.methods.long_context.recycled_attention import RecycledAttention
    from headway.methods.long_context.tappa import TappaEviction
    from headway.methods.sinks.act import ACT
    from headway.methods.sinks.streaming_llm import StreamingLLM

__version__ = "0.1.0"

_HOMES = {
    "load": "headway.hosts",
    "look": "headway.look",
    "Look": "headway.look",
    "compare": "headway.compare",
    "Comparison": "headway.compare",
    "use": "headway.door",
    "inspect": "headway.door",
    "prove": "headway.evidence",
    "observe": "headway.door",
    "capture": "headway.door",
    "CaptureSpec": "headway.door",
    "ACT": "headway.methods.sinks.act",
    "DHSA": "headway.methods.long_context.dhsa",
    "DuoAttention": "headway.methods.long_context.duo_attention",
    "FlexPrefill": "headway.methods.long_context.flexprefill",
    "InfiniRetri": "headway.methods.long_context.infiniretri",
    "PowerAttention": "headway.methods.long_context.power_attention",
    "RecycledAttention": "headway.methods.long_context.recycled_attention",
    "StreamingLLM": "headway.methods.sinks.streaming_llm",
    "TappaEviction": "headway.methods.long_context.tappa",
}
__all__ = [
    "ACT",
    "DHSA",
    "CaptureSpec",
    "Comparison",
    "DuoAttention",
    "FlexPrefill",
    "InfiniRetri",
    "Look",
    "PowerAttention",
    "RecycledAttention",
    "StreamingLLM",
    "TappaEviction",
    "capture",
    "compare",
    "inspect",
    "load",
    "look",
    "observe",
    "prove",
    "use",
]


def __getattr__(name: str) -> Any:
    """Public names load on first use, so that `import headway` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'headway' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
