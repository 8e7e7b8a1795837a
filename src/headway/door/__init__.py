"""The door: every attention operation of a host passes here, and here alone is it read or changed."""

from __future__ import annotations

from headway.door.attach import Handle, observe, use
from headway.door.call import AttentionCall, Forward, Site
from headway.door.selection import Blocks, BlockMask, Dense, Keys, Selection, Window
from headway.door.stages import Editor, Observer, Selector, Stage

__all__ = [
    "AttentionCall",
    "BlockMask",
    "Blocks",
    "Dense",
    "Editor",
    "Forward",
    "Handle",
    "Keys",
    "Observer",
    "Selection",
    "Selector",
    "Site",
    "Stage",
    "Window",
    "observe",
    "use",
]
