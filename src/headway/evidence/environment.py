"""Where a number was measured: versions, threads, device, commit. No host names, users or paths."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("headway", "transformers", "numpy", "scipy")


def environment() -> dict[str, Any]:
    """The settings of this process that a result depends on, ready for JSON."""
    commit, dirty = source_state()
    return {
        "commit": commit,
        "dirty": dirty,
        "python": platform.python_version(),
        # The package's own word names the build (CPU, CUDA), its metadata does not always.
        "torch": str(torch.__version__),
        **{name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.machine()}",
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "dtype": str(torch.get_default_dtype()).removeprefix("torch."),
    }


def source_state() -> tuple[str | None, bool | None]:
    """The commit that Headway's own source stands at, and whether the source differs from it.

    None twice when the source is not tracked by git (an installed wheel) or git is missing."""
    folder = Path(__file__).resolve().parents[1]
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", ".")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    result = subprocess.run([program, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
