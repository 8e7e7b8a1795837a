"""The files that a recipe is made of, so that a changed part of it is noticed."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any


def source_digest(function: Callable[..., Any]) -> str | None:
    """Digest of the file that defines a function and of the private modules beside it (`_name.py`) that it imports,
    one through another; None where there is no file (an interactive session)."""
    try:
        source = inspect.getsourcefile(function)
    except TypeError:
        return None
    if not source or not Path(source).is_file():
        return None
    whole = hashlib.sha256()
    for file in sorted(own_files(Path(source))):
        whole.update(f"{file.name}\0".encode() + file.read_bytes() + b"\0")
    return whole.hexdigest()


def own_files(file: Path) -> set[Path]:
    """A file and the private modules of its folder that it imports."""
    found, left = {file}, [file]
    while left:
        for name in _imported(left.pop()):
            other = file.parent / f"{name}.py"
            if name.startswith("_") and other not in found and other.is_file():
                found.add(other)
                left.append(other)
    return found


def _imported(file: Path) -> set[str]:
    """Last names of all that a file imports: of modules, and of what is taken from packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_bytes())):
        if isinstance(node, ast.ImportFrom):
            names |= {alias.name for alias in node.names} | {(node.module or "").split(".")[-1]}
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[-1] for alias in node.names}
    return names - {"__init__", "__future__"}
