"""A model in which everything that a resumed run must restore has an effect, and runs of it in processes of their own.

`python -m tests.train.small FOLDER [--kill-at STEP] [--kill-writing STEP] [--resume]` trains it; the options end the
process by SIGKILL after a step, or in the middle of the checkpoint of a step.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from headway.train import Callback, EarlyStop, Trained, next_token_loss, train

VOCABULARY, WIDTH, STEPS, EVERY = 13, 16, 12, 4


class Small(nn.Module):
    """Tied embeddings, dropout, a norm, a running buffer that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.dropout = nn.Dropout(0.2)
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        self.head.weight = self.embedding.weight
        self.register_buffer("running", torch.zeros(WIDTH))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.dropout(self.embedding(ids))
        if self.training:
            self.running.mul_(0.9).add_(0.1 * x.detach().mean((0, 1)))
        return self.head(self.norm(x + self.running))


def model(seed: int = 0) -> Small:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Small()


def batch(index: int, rows: int = 4, tokens: int = 8) -> Tensor:
    """Rows that count up by one, from random starts."""
    generator = torch.Generator().manual_seed(1000 + index)
    return (torch.randint(0, VOCABULARY, (rows, 1), generator=generator) + torch.arange(tokens)) % VOCABULARY


class Noise(Callback):
    """Draws from every global generator, as a host's own data augmentation might."""

    def step(self, run) -> None:
        run.row["noise"] = random.random() + float(np.random.rand()) + float(torch.rand(()))


def run(folder: Path | None, *, resume: bool = False, callbacks=(), net: Small | None = None, **options) -> Trained:
    options = {"steps": STEPS, "checkpoint_every": EVERY if folder else None, **options}
    return train(
        model() if net is None else net,
        options.pop("batches", batch),
        loss=next_token_loss,
        learning_rate=1e-2,
        warmup=3,
        accumulate=2,
        validation=[batch(-1)],
        validate_every=3,
        callbacks=[Noise(), EarlyStop(patience=50), *callbacks],
        folder=folder,
        resume=resume,
        **options,
    )


def in_a_process(folder: Path, *arguments: str) -> int:
    """The exit code of a run in a process of its own; negative for a signal."""
    command = [sys.executable, "-m", "tests.train.small", str(folder), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, timeout=900, check=False, capture_output=True).returncode


def _die(*_) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kill-at", type=int)
    parser.add_argument("--kill-writing", type=int)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    if given.kill_writing is not None:
        from headway.train import checkpoints

        write, save = checkpoints.write_atomically, checkpoints.save_checkpoint.__globals__
        save["write_atomically"] = lambda path, content: (
            _die() if f'"step": {given.kill_writing},' in content else write(path, content)
        )

    def kill(run) -> None:
        if run.step == given.kill_at:
            _die()

    net = model()
    run(given.folder, resume=given.resume, callbacks=[kill], net=net)


if __name__ == "__main__":
    _main()
