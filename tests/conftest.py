"""What every test may rely on."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

# A shell starts background jobs with interrupts ignored, and their children inherit it: tests of Ctrl-C would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def without_gradients() -> Iterator[None]:
    """For a class of tests; `torch.no_grad()` on a class makes a function of it, of which no test is collected."""
    with torch.no_grad():
        yield
