"""One optimiser step, and one pass over validation data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import ArgumentError, NumericError, unknown
from headway.train.devices import OneDevice
from headway.train.losses import Loss, LossFunction
from headway.train.run import Callback, Run, looking
from headway.train.streams import Batch, Placed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(kw_only=True)
class Stepper:
    """What a step needs: where batches come from, how a loss is made of one, and how its gradient is used."""

    forward: nn.Module
    parameters: list[nn.Parameter]
    stream: Placed
    loss: LossFunction
    devices: OneDevice
    schedule: Callable[[int], float]
    accumulate: int
    clip: float | None
    dtype: torch.dtype

    def step(self, run: Run, callbacks: Sequence[Callback]) -> None:
        """Reads `accumulate` batches and moves the parameters once; fills `run.row`, counts `run.step` and tokens."""
        share = self.schedule(run.step)
        if not math.isfinite(share):
            raise NumericError(f"schedule: got {share} at step {run.step}, expected a finite share of the peak rate.")
        for group in run.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * share
        run.optimizer.zero_grad(set_to_none=True)
        batches = [self._next(run, read) for read in range(self.accumulate)]
        mean = self._backward(batches, run)
        norm = self._norm(run)
        run.row.update(step=run.step + 1, loss=mean.pop("loss"))
        run.row["learning_rate"] = run.optimizer.param_groups[0]["lr"]
        run.row["gradient_norm"] = norm
        run.row.update(mean)
        for callback in callbacks:
            callback.gradients(run)
        if self.clip is not None:
            nn.utils.clip_grads_with_norm_(self.parameters, self.clip, torch.tensor(norm))
        run.optimizer.step()
        run.step += 1
        run.tokens += sum(count_tokens(batch) for batch in batches)
        run.row["tokens"] = run.tokens

    def _next(self, run: Run, read: int) -> Batch:
        try:
            return next(self.stream)
        except StopIteration:
            got, each = run.step * self.accumulate + read, "one" if self.accumulate == 1 else str(self.accumulate)
            raise ArgumentError(
                f"batches: got {got}, expected {each} for each of {run.steps} steps. Give more, or fewer steps."
            ) from None

    def _backward(self, batches: list[Batch], run: Run) -> dict[str, float]:
        """Adds the gradients of the batches, each weighted by how many items it scored; returns the means."""
        weighted = len(batches) > 1 or self.devices.world > 1
        means = Means()
        for i, batch in enumerate(batches):
            with self.devices.last_of(self.forward, i + 1 == len(batches)):
                with self.autocast():
                    loss = as_loss(self.loss(self.forward, self.devices.place(batch)))
                value = float(loss.value.detach())
                if not math.isfinite(value):
                    peak = run.optimizer.param_groups[0]["lr"]
                    raise NumericError(
                        f"loss at step {run.step}: got {value}, expected a finite number. Lower the learning rate "
                        f"({peak:.3g}), warm up longer, or check the batch. The parameters are those before the step."
                    )
                if not loss.value.requires_grad:
                    raise ArgumentError("loss: got a tensor without a gradient; expected one that needs the model.")
                (loss.value * loss.count if weighted else loss.value).backward()
            means.add(loss, value)
        total = self.devices.total(means.count)
        if weighted and total > 0:
            # Several processes average their gradients, which divides by their number once already.
            scale = self.devices.world / total
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(scale)
        return means.over(self.devices)

    def _norm(self, run: Run) -> float:
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ArgumentError("model: no gradient reached a parameter; expected a loss that depends on the model.")
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            names = [
                name for name, p in run.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()
            ]
            raise NumericError(
                f"gradient at step {run.step}: got a norm of {norm} (in {', '.join(names[:3]) or 'the sum'}), expected "
                "a finite one. Lower the learning rate, or train in float32. The parameters are those before the step."
            )
        return norm

    def validate(self, model: nn.Module, batches: Iterable[Batch] | Callable[[nn.Module], Mapping[str, float]]) -> dict:
        """Means over all items of the batches as `validation_<name>`, or what a function of the model measures."""
        with looking(model):
            if callable(batches):
                return {name: float(value) for name, value in batches(model).items()}
            means = Means()
            for batch in batches:
                placed, share = self.devices.judge(batch)
                with self.autocast():
                    loss = as_loss(self.loss(self.forward, placed))
                means.add(replace(loss, count=loss.count * share), float(loss.value))
        return {f"validation_{name}": value for name, value in means.over(self.devices).items()}

    def autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.devices.device.type, dtype=self.dtype)


class Means:
    """Means of a loss and its metrics, weighted by counts."""

    def __init__(self) -> None:
        self.count = 0.0
        self.sums: dict[str, float] = {}

    def add(self, loss: Loss, value: float) -> None:
        self.count += loss.count
        for name, number in {"loss": value, **loss.metrics}.items():
            self.sums[name] = self.sums.get(name, 0.0) + float(number) * loss.count

    def over(self, devices: OneDevice) -> dict[str, float]:
        count = devices.total(self.count)
        if not self.sums or count == 0:
            return {"loss": 0.0} if self.sums else {}
        return {name: devices.total(value) / count for name, value in self.sums.items()}


def as_loss(given: Loss | Tensor) -> Loss:
    loss = given if isinstance(given, Loss) else Loss(given)
    if not isinstance(loss.value, Tensor) or loss.value.numel() != 1:
        got = tuple(loss.value.shape) if isinstance(loss.value, Tensor) else type(loss.value).__name__
        raise ArgumentError(f"loss: got {got}, expected a tensor of one number. Take the mean.")
    return Loss(loss.value.reshape(()), loss.count, loss.metrics)


def count_tokens(batch: Batch) -> int:
    """Real tokens of a batch; its samples where there are no token ids."""
    if isinstance(batch, Tensor):
        return batch.numel() if not batch.is_floating_point() else len(batch)
    for name in ("attention_mask", "mask"):
        mask = batch.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            return int((mask != 0).sum())
    ids = batch.get("input_ids")
    return ids.numel() if isinstance(ids, Tensor) else len(next(iter(batch.values())))


def check_validation(batches: Any) -> Any:
    """Validation data as given; an iterator would be empty, or without end, the second time."""
    if batches is None or callable(batches):
        return batches
    if isinstance(batches, Iterator) or not isinstance(batches, Iterable) or isinstance(batches, Tensor | Mapping):
        raise ArgumentError(
            f"validation: got {type(batches).__name__}, expected a list of batches (stream.held_out(8) gives one) or a "
            "function of the model."
        )
    return batches


def dtype_of(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise unknown("dtype", name, DTYPES)
    return DTYPES[name]
