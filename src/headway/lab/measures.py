"""The measures of `sink_survey.comparison` on what an arm reads."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from headway.lab.arms import Arm
from headway.lab.data import labelled
from headway.methods.sinks.sink_survey.comparison import measure_model

#: Sequences per forward.
BATCH = 16
#: A streaming window is this share of a sequence.
WINDOW_SHARE = 0.25


def measure_arm(model: Any, arm: Arm, ids: Int[Tensor, "sequences length"], *, batch: int = BATCH) -> dict[str, float]:
    """Every number of the table but those of training, on held-out sequences. The model is in eval mode."""
    batches = [(part, labelled(part, arm)["labels"]) for part in ids.split(batch)]
    return measure_model(model, batches, window=max(int(arm.length * WINDOW_SHARE), 1))


def parameters_of(model: nn.Module) -> int:
    """Trained numbers, tied ones once."""
    return sum({id(p): p.numel() for p in model.parameters()}.values())
