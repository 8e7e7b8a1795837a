"""A training run as callbacks see it, and the callbacks that come with Headway."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from headway.errors import ArgumentError
from headway.train.randomness import undisturbed

logger = logging.getLogger(__name__)

Row = dict[str, Any]


@dataclass(kw_only=True)
class Run:
    """The state of a run between and inside steps.

    step: optimiser steps that are done; tokens: real tokens read so far (samples, where inputs are not token ids).
    row: the log row of the present step, to which a callback may add numbers; rows: all finished rows."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    steps: int
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    row: Row = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    stopped: str | None = None

    def stop(self, reason: str) -> None:
        """Ends the run after this step."""
        self.stopped = reason

    def gradient_norms(self) -> dict[str, float]:
        """The 2-norm of the gradient of each parameter that has one. True in `Callback.gradients`: before clipping."""
        named = [(name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None]
        return {name: float(torch.linalg.vector_norm(gradient)) for name, gradient in named}


class Callback:
    """What may happen around a run. Override what is needed; `state` and `restore` carry it over an interruption."""

    def start(self, run: Run) -> None:
        """Before the first step, and again when a run is resumed."""

    def gradients(self, run: Run) -> None:
        """The gradients of the whole step are there, to be read: their norm is taken, and they are not yet clipped."""

    def step(self, run: Run) -> None:
        """The parameters have moved, `run.row` is filled and not yet written."""

    def end(self, run: Run) -> None:
        """After the last step."""

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        pass


class EarlyStop(Callback):
    """Ends a run when `metric` has not improved by more than `least` in `patience` rows that have it."""

    def __init__(
        self, *, patience: int = 3, metric: str = "validation_loss", least: float = 0.0, larger: bool = False
    ) -> None:
        if patience < 1 or least < 0:
            raise ArgumentError(
                f"patience, least: got {patience}, {least}, expected at least 1 row and an improvement of at least 0."
            )
        self.patience, self.metric, self.least, self.larger = patience, metric, least, larger
        self.best, self.waited = -math.inf if larger else math.inf, 0

    def step(self, run: Run) -> None:
        if self.metric not in run.row:
            return
        value = float(run.row[self.metric])
        gain = value - self.best if self.larger else self.best - value
        if gain > self.least:
            self.best, self.waited = value, 0
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop(f"{self.metric} has not improved on {self.best:.6g} in {self.waited} rows")

    def end(self, run: Run) -> None:
        if not any(self.metric in row for row in run.rows):
            known = sorted({name for row in run.rows for name in row})
            logger.warning("EarlyStop never looked: no row has %r, they have %s", self.metric, ", ".join(known))

    def state(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def restore(self, state: dict[str, Any]) -> None:
        self.best, self.waited = float(state["best"]), int(state["waited"])


class Measure(Callback):
    """Adds `measure(model)`, a mapping of numbers, to the log every `every` steps and at the last one: in eval mode,
    without gradients, and without a trace in the random generators."""

    def __init__(self, measure: Callable[[nn.Module], Mapping[str, float]], *, every: int) -> None:
        if every < 1:
            raise ArgumentError(f"every: got {every}, expected at least 1 step.")
        self.measure, self.every = measure, every

    def step(self, run: Run) -> None:
        if run.step % self.every and run.step != run.steps:
            return
        with looking(run.model):
            run.row.update({name: float(value) for name, value in self.measure(run.model).items()})


class GradientNorms(Callback):
    """Adds the gradient norm of each parameter whose name contains `containing` as `grad/<name>`."""

    def __init__(self, containing: str = "") -> None:
        self.containing = containing

    def gradients(self, run: Run) -> None:
        norms = run.gradient_norms()
        run.row.update({f"grad/{name}": norm for name, norm in norms.items() if self.containing in name})


class looking:  # noqa: N801 - reads as a statement: with looking(model)
    """Eval mode, no gradients, and random generators that are put back; each module's own mode returns afterwards."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.modes = [(module, module.training) for module in self.model.modules()]
        self.scopes = (torch.no_grad(), undisturbed())
        for scope in self.scopes:
            scope.__enter__()
        self.model.eval()

    def __exit__(self, *error: Any) -> None:
        for module, mode in self.modes:
            module.training = mode
        for scope in reversed(self.scopes):
            scope.__exit__(*error)


class _Each(Callback):
    def __init__(self, function: Callable[[Run], None]) -> None:
        self.function = function

    def step(self, run: Run) -> None:
        self.function(run)


def callback(given: Callback | Callable[[Run], None]) -> Callback:
    """A callback as it is; a plain function is called after each step."""
    if isinstance(given, Callback):
        return given
    if not callable(given):
        raise ArgumentError(f"callbacks: got {type(given).__name__}, expected a Callback or a function of the run.")
    return _Each(given)
