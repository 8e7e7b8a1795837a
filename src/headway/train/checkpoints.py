"""Checkpoints: a folder per step of safetensors and JSON, whole or absent, the old ones removed.

    checkpoints/step-00000200/
      state.json             step, plain values, and size and SHA-256 of each file
      model.safetensors      one file of tensors per part: model, optimizer, random, …

A checkpoint is written beside its goal and renamed into place when all of it is on the disk. A kill at any moment
leaves the one before. Nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headway.errors import ArgumentError, HeadwayError
from headway.files import write_atomically
from headway.train.trees import join, split

logger = logging.getLogger(__name__)

FORMAT = 1
STATE = "state.json"
KEEP = 2
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Checkpoint:
    """The parts of a training run after `step` steps."""

    step: int
    parts: dict[str, Any]
    folder: Path


def checkpoint_steps(folder: str | Path) -> list[int]:
    """The steps of the checkpoints in a folder, oldest first."""
    folder = Path(folder)
    found = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in found if match)


def save_checkpoint(folder: str | Path, step: int, parts: Mapping[str, Any], *, keep: int = KEEP) -> Path:
    """Writes the parts (nested states of tensors and plain values) as the checkpoint of `step`; removes all but the
    newest `keep`, and what killed writers left."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if keep < 1:
        raise ArgumentError(f"keep: got {keep}, expected at least 1 checkpoint.")
    folder = Path(folder)
    goal = _path(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
        try:
            plain: dict[str, Any] = {}
            files: dict[str, dict[str, Any]] = {}
            for name, part in parts.items():
                plain[name], tensors = split(part)
                if tensors:
                    file = partial / f"{name}.safetensors"
                    save_file(tensors, file)
                    _settle(file)
                    files[file.name] = {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            state = {"format": FORMAT, "step": step, "files": files, "parts": plain}
            write_atomically(partial / STATE, json.dumps(state))
            partial.chmod(0o755)
            if goal.exists():
                shutil.rmtree(goal)
            os.replace(partial, goal)
            _settle(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise HeadwayError(
            f"checkpoint: step {step} cannot be written to {folder} ({reason}). Free some space or choose another "
            "folder; the checkpoint before is whole."
        ) from error
    for old in checkpoint_steps(folder)[:-keep]:
        shutil.rmtree(_path(folder, old), ignore_errors=True)
    return goal


def load_checkpoint(folder: str | Path, step: int | None = None) -> Checkpoint | None:
    """The newest whole checkpoint of a folder (or that of `step`), or None where there is none.

    A damaged one is passed over for the one before, with a warning. Raises HeadwayError when checkpoints are there but
    none of them is whole."""
    steps = checkpoint_steps(folder) if step is None else [step]
    faults = []
    for number in reversed(steps):
        path = _path(Path(folder), number)
        try:
            return _read(path, number)
        except (OSError, ValueError, KeyError, TypeError) as error:
            faults.append(f"{path.name}: {error}")
            logger.warning("checkpoint %s is damaged (%s); taking the one before", path, error)
    if faults:
        raise HeadwayError(f"checkpoint: none in {folder} is whole ({'; '.join(faults)}). Start again in a new folder.")
    return None


def _read(path: Path, step: int) -> Checkpoint:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    state = json.loads((path / STATE).read_text(encoding="utf-8"))
    if state["format"] != FORMAT or state["step"] != step:
        raise ValueError(f"format {state['format']} of step {state['step']}, expected {FORMAT} of {step}")
    tensors: dict[str, Any] = {}
    for name, facts in state["files"].items():
        file = path / name
        if file.stat().st_size != facts["bytes"] or _sha256(file) != facts["sha256"]:
            raise ValueError(f"{name} is not what was written")
        try:
            tensors[name.removesuffix(".safetensors")] = load_file(file)
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    parts = {name: join(plain, tensors.get(name, {})) for name, plain in state["parts"].items()}
    return Checkpoint(step=step, parts=parts, folder=path)


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _settle(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk; safetensors leaves files to their owner alone."""
    if path.is_file():
        path.chmod(0o644)
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(folder: Path) -> None:
    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale, ignore_errors=True)
