"""Training a host with the mask in place: the paper's light continued training, at any size.

The ordinary language-model loss, through the door: gradients flow through the sparse executor, so a step costs what
the mask reads. The paper trains Qwen2-7B on 1 billion tokens of SlimPajama, and for pass-keys 200 steps at each length
from 4k to 32k tokens (a curriculum is a stream of batches whose length grows). Its learning rate and batch size are not
given; those here are the usual ones of fine-tuning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from headway.door import use
from headway.door.stages import Selector
from headway.errors import ArgumentError
from headway.methods.long_context.power_attention.selector import PowerAttention
from headway.train import Batch, train
from headway.train.groups import trained_parameters


@dataclass(frozen=True, kw_only=True)
class FineTuned:
    """The loss before each step in nats, and how many real tokens were read."""

    losses: tuple[float, ...]
    tokens: int

    @property
    def steps(self) -> int:
        return len(self.losses)


def fine_tune(
    model: nn.Module,
    batches: Iterable[Batch],
    method: Selector | None = None,
    *,
    steps: int,
    learning_rate: float = 3e-4,
    warmup: int = 20,
    weight_decay: float = 0.01,
    clip: float = 1.0,
) -> FineTuned:
    """Trains `model` in place for `steps` batches with `method` attached (None: as it is) and leaves it as it was found
    in everything but its weights: mode, hooks, and the host's own attention.

    A batch is ids (batch, tokens), or keyword inputs with `labels` (-100 is not scored) and, for padding,
    `attention_mask`. AdamW on the parameters that require gradients; the rate rises over `warmup` steps and falls to
    zero by a cosine. Raises ArgumentError for numbers out of range or too few batches, NumericError when the loss is
    not finite."""
    if steps < 1 or learning_rate <= 0 or warmup < 0 or clip <= 0:
        raise ArgumentError(
            f"steps, learning_rate, warmup, clip: got {steps}, {learning_rate}, {warmup}, {clip}; expected steps ≥ 1, "
            "warmup ≥ 0, and the others above 0."
        )
    optimizer = torch.optim.AdamW(trained_parameters(model), lr=learning_rate, weight_decay=weight_decay)
    if isinstance(method, PowerAttention):
        method = replace(method, trained=True)
    with nullcontext() if method is None else use(model, method):
        found = train(
            model,
            (_inputs(batch) for batch in batches),
            steps=steps,
            optimizer=optimizer,
            schedule=lambda step: rate(step, steps, warmup),
            clip=clip,
            seed=None,
        )
    return FineTuned(losses=found.losses, tokens=found.tokens)


def rate(step: int, steps: int, warmup: int) -> float:
    """The share of the learning rate at a step: linear up to 1, then a cosine to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1)))


def _inputs(batch: Batch) -> Batch:
    if not isinstance(batch, Tensor) and not {"input_ids", "labels"} <= set(batch):
        raise ArgumentError(f"batch: got {sorted(batch)}, expected input_ids and labels among them.")
    return batch
