"""The state of every global random generator that a training step may draw from."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of Python's, numpy's and torch's global generators, on every device."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        # safetensors has no unsigned integers of 32 bits in every release; 64 hold them.
        "numpy": [kind, np.asarray(keys).astype(np.int64), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators back; those of devices that are not here are left out."""
    random.setstate(state["python"])
    kind, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((kind, np.asarray(keys).astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])


def seed_all(seed: int) -> None:
    """Seeds the three global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def own_randomness(seed: int | None) -> Iterator[None]:
    """Randomness that depends on `seed` alone inside, and is as it was afterwards. None leaves the generators alone."""
    if seed is None:
        yield
        return
    outside = random_state()
    seed_all(seed)
    try:
        yield
    finally:
        set_random_state(outside)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside leaves no trace: validation does not change a training run."""
    outside = random_state()
    try:
        yield
    finally:
        set_random_state(outside)
