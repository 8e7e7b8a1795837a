"""What every test may rely on."""

from __future__ import annotations

import signal

# A shell starts background jobs with interrupts ignored, and their children inherit it: tests of Ctrl-C would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)
