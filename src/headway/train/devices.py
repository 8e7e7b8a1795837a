"""Where a run computes: on the model's own device, or spread over processes by Hugging Face Accelerate.

With several processes each takes its rows of every batch, so the run reads what one process would have read; gradients
are averaged with the weight of what each process scored.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import ArgumentError, missing_extra
from headway.train.streams import Batch


class OneDevice:
    """The device on which the model is."""

    rank, world = 0, 1

    def __init__(self, model: nn.Module) -> None:
        self.device = next(model.parameters()).device

    def prepare(self, model: nn.Module) -> nn.Module:
        """The module to call for a forward pass."""
        return model

    def place(self, batch: Batch) -> Batch:
        return on(batch, lambda tensor: tensor.to(self.device, non_blocking=True))

    def judge(self, batch: Batch) -> tuple[Batch, float]:
        """A batch of validation, and for which share of it this process counts."""
        return self.place(batch), 1.0

    def last_of(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        """Around each backward pass of an accumulated step; only the last one needs gradients of other processes."""
        return nullcontext()

    def total(self, value: float) -> float:
        """The sum over processes."""
        return value

    def all(self, tree: Any) -> list[Any]:
        """The values of all processes, by rank."""
        return [tree]

    def wait(self) -> None:
        """Until every process is here."""


class ManyDevices(OneDevice):
    """The processes of an `accelerate.Accelerator` that keep a whole copy of the model each."""

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator
        self.device = accelerator.device
        self.rank, self.world = accelerator.process_index, accelerator.num_processes
        kind = getattr(accelerator.distributed_type, "value", str(accelerator.distributed_type))
        if kind not in ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_NPU", "MULTI_MLU", "MULTI_XPU"):
            raise ArgumentError(
                f"accelerator: got one of type {kind}, which splits the model; expected one whole copy in each process "
                "(data parallel). Run `accelerate config` without FSDP and DeepSpeed."
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        model.to(self.device)
        return self.accelerator.prepare_model(model)

    def place(self, batch: Batch) -> Batch:
        def rows(tensor: Tensor) -> Tensor:
            if len(tensor) % self.world:
                raise ArgumentError(
                    f"batch: got {len(tensor)} rows, expected a multiple of the {self.world} processes."
                )
            return tensor.chunk(self.world)[self.rank].to(self.device, non_blocking=True)

        return on(batch, rows)

    def judge(self, batch: Batch) -> tuple[Batch, float]:
        """Its rows, where they can be shared out; else all of them, with each process for an equal share."""
        tensors = [batch] if isinstance(batch, Tensor) else [x for x in batch.values() if isinstance(x, Tensor)]
        if all(len(tensor) % self.world == 0 for tensor in tensors):
            return self.place(batch), 1.0
        return super().place(batch), 1 / self.world

    def last_of(self, model: nn.Module, last: bool) -> AbstractContextManager[Any]:
        return nullcontext() if last else self.accelerator.no_sync(model)

    def total(self, value: float) -> float:
        return float(self.accelerator.reduce(torch.tensor(value, device=self.device, dtype=torch.float32), "sum"))

    def all(self, tree: Any) -> list[Any]:
        from accelerate.utils import gather_object

        return gather_object([tree])

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def devices_of(model: nn.Module, accelerator: Any) -> OneDevice:
    """`accelerator`: None for the model's device, "auto" for an Accelerator made here, or one that is given."""
    if accelerator is None:
        return OneDevice(model)
    if accelerator == "auto":
        try:
            from accelerate import Accelerator
        except ImportError:
            raise missing_extra("accelerate", "train", "training on several devices") from None
        accelerator = Accelerator()
    if not hasattr(accelerator, "prepare_model"):
        raise ArgumentError(
            f"accelerator: got {type(accelerator).__name__}, expected an accelerate.Accelerator, 'auto' or None."
        )
    return ManyDevices(accelerator)


def on(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """The batch with each of its tensors changed."""
    if isinstance(batch, Tensor):
        return change(batch)
    return {name: change(value) if isinstance(value, Tensor) else value for name, value in batch.items()}
