"""Ctrl-C and SIGTERM during training: the step is finished and kept first. A second one ends at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """While open, the first signal only sets `asked`; the handlers from before return on leaving, and at the first
    signal, so that a second one does what it always does. Signals reach the main thread alone; elsewhere nothing is
    changed."""

    def __init__(self, *, active: bool) -> None:
        self.active = active and threading.current_thread() is threading.main_thread()
        self.asked: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        if self.active:
            for number in SIGNALS:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        self._give_back()

    def act(self, note: str) -> None:
        """Does what the signal asked for: KeyboardInterrupt with a note for Ctrl-C, the usual end for SIGTERM."""
        if self.asked is None:
            return
        self._give_back()
        if self.asked == signal.SIGTERM:
            signal.raise_signal(signal.SIGTERM)
        interrupt = KeyboardInterrupt()
        interrupt.add_note(note)
        raise interrupt

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        self._give_back()

    def _give_back(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
