"""Files that are written in pieces and appear whole."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from headway.errors import HeadwayError


@contextmanager
def replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file to write in pieces; it takes its name when the block ends well, and is gone otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise HeadwayError(
            f"--out: {path} cannot be written ({error.strerror or error}). Make room, or name another folder."
        ) from error
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
