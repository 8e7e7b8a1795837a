"""The folder of a run: its log, its checkpoints, and the facts about it."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from headway.errors import ArgumentError, ConflictError, HeadwayError
from headway.files import write_atomically
from headway.train.checkpoints import checkpoint_steps, load_checkpoint, save_checkpoint
from headway.train.compiling import Compiled
from headway.train.devices import OneDevice
from headway.train.log import Log, read_log
from headway.train.randomness import random_state, set_random_state
from headway.train.resuming import parts_of, restore, shares_digest
from headway.train.run import Callback, Run
from headway.train.schedules import Schedule
from headway.train.streams import Placed

CHECKPOINTS = "checkpoints"
FACTS = "run.json"
LOCK = ".lock"


class Keeper:
    """Writes what a run leaves in its folder, from the first process; does nothing without a folder."""

    def __init__(
        self,
        folder: Path | None,
        run: Run,
        stream: Placed,
        callbacks: Sequence[Callback],
        schedule: Schedule,
        devices: OneDevice,
        settings: dict[str, Any],
        *,
        keep: int,
    ) -> None:
        self.folder, self.run, self.stream, self.callbacks = folder, run, stream, callbacks
        self.schedule, self.devices, self.settings = schedule, devices, settings
        self.keep, self.saved = keep, 0
        self._log: Log | None = None
        self._lock: Any = None

    def take_up(self, *, resume: bool) -> int:
        """Puts the run where its newest checkpoint left it and opens the log; returns that step, 0 for a new run."""
        if self.folder is None:
            return 0
        if checkpoint_steps(self.folder / CHECKPOINTS) and not resume:
            raise ArgumentError(
                f"folder: {self.folder} holds a run already. Pass resume=True to go on with it, or another folder."
            )
        found = load_checkpoint(self.folder / CHECKPOINTS) if resume else None
        if found is not None:
            restore(found, self.run, self.stream, self.callbacks, self.settings, self.schedule)
            set_random_state(found.parts["random"][self.devices.rank])
            self.run.rows = read_log(self.folder, until=found.step)
            if len(self.run.rows) != found.step:
                raise HeadwayError(
                    f"resume: the log of {self.folder} has {len(self.run.rows)} of {found.step} rows. Put log.jsonl "
                    "back, or start again in another folder."
                )
            self.saved = found.step
        self.devices.wait()
        if self.devices.rank == 0:
            self._lock_folder(self.folder)
            self._log = Log(self.folder, self.run.rows)
        return self.saved

    def row(self) -> None:
        """Adds the row of the present step to the log."""
        self.run.rows.append(self.run.row)
        if self._log is not None:
            self._log.append(self.run.row)

    def save(self) -> None:
        """Writes the checkpoint of this step, unless it is there, and the log as a table."""
        if self.folder is None or self.saved == self.run.step:
            return
        random = self.devices.all(random_state())
        if self._log is not None:
            digest = shares_digest(self.schedule, self.run.step)
            parts = parts_of(self.run, self.stream, self.callbacks, self.settings, shares=digest, random=random)
            save_checkpoint(self.folder / CHECKPOINTS, self.run.step, parts, keep=self.keep)
            self._log.write_table(self.run.rows)
        self.saved = self.run.step
        self.devices.wait()

    def finish(self, compiled: Compiled | None) -> None:
        """Writes what the run was: settings, environment, how it ended."""
        if self.folder is None or self._log is None:
            return
        facts = {
            **self.settings,
            "compiled": None if compiled is None else vars(compiled),
            "steps": self.run.steps,
            "step": self.run.step,
            "stopped": self.run.stopped,
            "tokens": self.run.tokens,
            "seconds": self.run.seconds,
            "device": str(self.devices.device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "machine": platform.machine(),
        }
        write_atomically(self.folder / FACTS, json.dumps(facts, indent=1) + "\n")

    def close(self) -> None:
        if self._log is not None:
            self._log.close()
        if self._lock is not None:
            self._lock.release()

    def _lock_folder(self, folder: Path) -> None:
        """Keeps a second process from training into the same folder; the system frees the lock of a killed one."""
        from filelock import FileLock, Timeout

        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ConflictError(f"folder: another process trains in {folder}. Wait for it, or name another.") from None
        self._lock = lock
