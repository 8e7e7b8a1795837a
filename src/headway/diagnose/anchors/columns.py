"""Rows of the causal matrix on disk, so that an interrupted run goes on behind the last finished sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from headway.parts import Parts


class Columns:
    """Sentence -> the effects of hiding it, in a folder, for one setting: `asked` is everything they depend on."""

    def __init__(self, folder: Path, *asked: Any) -> None:
        self.parts, self.asked = Parts(folder, prefix="effects-"), list(asked)

    def get(self, sentence: int) -> np.ndarray | None:
        """The effects, or None where they are not there."""
        found = self.parts.stored([*self.asked, sentence])
        return None if found is None else found["effects"]

    def __setitem__(self, sentence: int, effects: np.ndarray) -> None:
        self.parts.arrays([*self.asked, sentence], lambda: {"effects": effects}, anew=True)
