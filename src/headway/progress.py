"""How long work tells where it is."""

from __future__ import annotations

from collections.abc import Callable

#: Called with (what, done, total).
Tell = Callable[[str, int, int], None]


def silent(what: str, done: int, total: int) -> None:
    """A Tell that says nothing."""
