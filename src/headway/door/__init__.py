"""The door: every attention operation of a host passes here, and here alone is it read or changed."""

from __future__ import annotations

from headway.door.attach import Handle, observe, use
from headway.door.call import AttentionCall, Forward, Site
from headway.door.capture import Capture, Captured, CaptureSpec, capture
from headway.door.intervene import FixedPattern, HeadGate, SuppressBlocks, UniformHeads, ZeroValues
from headway.door.selection import BlockMask, Blocks, Dense, Keys, Selection, Window
from headway.door.sites import SiteTable, inspect
from headway.door.stages import Editor, Observer, Selector, Stage

__all__ = [
    "AttentionCall",
    "BlockMask",
    "Blocks",
    "Capture",
    "CaptureSpec",
    "Captured",
    "Dense",
    "Editor",
    "FixedPattern",
    "Forward",
    "Handle",
    "HeadGate",
    "Keys",
    "Observer",
    "Selection",
    "Selector",
    "Site",
    "SiteTable",
    "Stage",
    "SuppressBlocks",
    "UniformHeads",
    "Window",
    "ZeroValues",
    "capture",
    "inspect",
    "observe",
    "use",
]
