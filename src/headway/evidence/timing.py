"""What measurements of time need beside a clock."""

from __future__ import annotations

import contextlib
import ctypes

#: Numbers of two settings of glibc's mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Lets glibc's allocator keep what is freed, for the rest of the process: the steady state of a long run.

    By default it takes tensors above 32 MB from the system at every call, and zeroing their pages can cost more than a
    kernel that is linear in the length. Does nothing where there is no glibc."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
