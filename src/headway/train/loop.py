"""The training loop of the whole project: one function for every model, loss and optimiser here.

    step t:   θ ← optimiser(θ, clip(Σ_m c_m ∇ℓ_m / Σ_m c_m)) ,   rate_t = peak · schedule(t)

m runs over the accumulated batches and c_m counts what each one scored, so accumulating equals one large batch. A run
with a folder keeps a log and checkpoints, and goes on exactly where it was after any kind of end, kill -9 included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headway.errors import ArgumentError
from headway.progress import Tell
from headway.train import schedules
from headway.train.checkpoints import KEEP
from headway.train.compiling import Compiled, Compiler
from headway.train.devices import devices_of
from headway.train.groups import BETAS, OptimizerFactory, adamw, trained_parameters
from headway.train.interrupts import Interrupts
from headway.train.keeping import Keeper
from headway.train.losses import LossFunction, model_loss
from headway.train.progress import telling
from headway.train.randomness import own_randomness
from headway.train.resuming import settings_of
from headway.train.run import Callback, Row, Run, callback
from headway.train.stepping import Stepper, check_validation, dtype_of
from headway.train.streams import Batch, placed

LEARNING_RATE = 3e-4
WEIGHT_DECAY = 0.1


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What a run did.

    losses: the loss before each step, nats for language models. rows: the log, one row per step. tokens: real tokens
    read (samples, where inputs are not token ids). seconds: time in steps and validation, over all parts of the run.
    stopped: why it ended before its last step, or None. resumed: the step at which this call took the run up."""

    rows: tuple[Row, ...]
    tokens: int
    seconds: float
    stopped: str | None = None
    resumed: int = 0
    compiled: Compiled | None = None
    folder: Path | None = None

    @property
    def steps(self) -> int:
        return len(self.rows)

    @property
    def losses(self) -> tuple[float, ...]:
        return self.column("loss")

    @property
    def loss(self) -> float:
        """The loss of the last step."""
        return self.losses[-1]

    def column(self, name: str) -> tuple[float, ...]:
        """The numbers of one column, from the rows that have it: `column("validation_loss")`."""
        return tuple(row[name] for row in self.rows if name in row)


def train(
    model: nn.Module,
    batches: Iterable[Batch] | Callable[[int], Batch],
    *,
    steps: int,
    loss: LossFunction = model_loss,
    optimizer: torch.optim.Optimizer | OptimizerFactory | None = None,
    learning_rate: float | None = None,
    weight_decay: float | None = None,
    betas: tuple[float, float] | None = None,
    schedule: str | schedules.Schedule = "cosine",
    warmup: int = 0,
    clip: float | None = 1.0,
    accumulate: int = 1,
    dtype: str = "float32",
    seed: int | None = 0,
    validation: Iterable[Batch] | Callable[[nn.Module], Mapping[str, float]] | None = None,
    validate_every: int | None = None,
    callbacks: Sequence[Callback | Callable[[Run], None]] = (),
    folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = KEEP,
    resume: bool = False,
    compile: bool = False,
    accelerator: Any = None,
    progress: bool | Tell = False,
) -> Trained:
    """Trains `model` in place for `steps` optimiser steps; its modes and the global random generators are as before.

    batches: a `Stream`, a function of the batch's number, or any iterable. A batch is token ids (batch, tokens), or
        named tensors with `labels`; −100 is not scored.
    loss: a function of model and batch; the model's own loss by default (`next_token_loss`, `classification_loss`, …).
    optimizer: an optimiser or a function that makes one for the model; AdamW over `parameter_groups` by default, with
        learning_rate (3e-4), weight_decay (0.1, not on norms and biases) and betas (0.9, 0.95).
    schedule: "cosine", "wsd", "linear" or "constant" with `warmup` steps, or a function step -> share of the peak.
    clip: largest 2-norm of the whole gradient; None does not clip. The norm is logged either way.
    accumulate: batches per step. dtype: "bfloat16" runs forward passes under autocast.
    seed: of dropout and the like; None uses the global generators as they are. Seed the model's initial weights
        before you make it.
    validation: batches (their means become `validation_loss`, …) or a function model -> numbers; every
        `validate_every` steps and at the end.
    callbacks: see `headway.train.Callback`; a plain function is called with the `Run` after each step.
    folder: for log.jsonl, log.csv, run.json and checkpoints/, which are written every `checkpoint_every` steps, at the
        end, and on Ctrl-C or SIGTERM; the newest `keep` stay.
    resume: go on from the newest checkpoint of the folder, or start when it has none. Without it, a folder that
        already holds a run is refused.
    compile: call the model through torch.compile; `Trained.compiled` tells how many graphs and breaks came of it.
    accelerator: an `accelerate.Accelerator`, or "auto", for several devices; each takes its rows of every batch.
    progress: True for a bar on the terminal, or a function (what, done, total).

    Raises ArgumentError for arguments that cannot be used and batches that end early, NumericError when a loss or
    gradient is not finite (the parameters are then those before the step), HeadwayError when the disk is full."""
    _check(steps, accumulate, clip, validate_every, checkpoint_every, folder, resume)
    parameters = trained_parameters(model)
    stream, asked = placed(batches), [callback(one) for one in callbacks]
    validation = check_validation(validation)
    if validate_every is not None and validation is None:
        raise ArgumentError("validate_every: got it without validation; give batches or a function as validation=.")
    rates = schedules.schedule(schedule, steps, warmup=warmup)
    devices = devices_of(model, accelerator)
    compiler = Compiler(active=compile)
    # An accelerator moves the model, and an optimiser must be made of the parameters where they are.
    forward = devices.prepare(model)
    chosen = _optimizer(model, optimizer, learning_rate, weight_decay, betas)
    stepper = Stepper(
        forward=compiler.wrap(forward),
        parameters=parameters,
        stream=stream,
        loss=loss,
        devices=devices,
        schedule=rates,
        accumulate=accumulate,
        clip=clip,
        dtype=dtype_of(dtype),
    )
    run = Run(model=model, optimizer=chosen, steps=steps)
    settings = settings_of(
        run, stream, accumulate=accumulate, clip=clip, dtype=dtype, seed=seed, processes=devices.world
    )
    place = None if folder is None else Path(folder)
    keeper = Keeper(place, run, stream, asked, rates, devices, settings, keep=keep)
    modes = [(module, module.training) for module in model.modules()]
    with ExitStack() as scopes:
        scopes.enter_context(own_randomness(None if seed is None else seed + devices.rank))
        scopes.callback(_leave, model, chosen, modes)
        interrupts = scopes.enter_context(Interrupts(active=place is not None))
        scopes.callback(keeper.close)
        resumed = keeper.take_up(resume=resume)
        tell = scopes.enter_context(telling(progress if devices.rank == 0 else False))
        model.train()
        for one in asked:
            one.start(run)
        while run.step < steps and run.stopped is None:
            began = time.perf_counter()
            run.row = {}
            with compiler.reporting(first=run.step == resumed):
                stepper.step(run, asked)
            if validation is not None and (run.step == steps or _due(run.step, validate_every)):
                run.row.update(stepper.validate(model, validation))
            for one in asked:
                one.step(run)
            run.seconds += time.perf_counter() - began
            run.row["seconds"] = round(run.seconds, 6)
            keeper.row()
            tell(_headline(run), run.step, steps)
            interrupted = devices.total(float(interrupts.asked is not None)) > 0
            if interrupted or _due(run.step, checkpoint_every):
                keeper.save()
            if interrupted:
                interrupts.act(f"the run is kept in {place}; resume=True goes on at step {run.step}")
        keeper.save()
        for one in asked:
            one.end(run)
        keeper.finish(compiler.found())
    return Trained(
        rows=tuple(run.rows),
        tokens=run.tokens,
        seconds=run.seconds,
        stopped=run.stopped,
        resumed=resumed,
        compiled=compiler.found(),
        folder=place,
    )


def _optimizer(
    model: nn.Module,
    given: torch.optim.Optimizer | OptimizerFactory | None,
    learning_rate: float | None,
    weight_decay: float | None,
    betas: tuple[float, float] | None,
) -> torch.optim.Optimizer:
    if given is not None:
        named = {"learning_rate": learning_rate, "weight_decay": weight_decay, "betas": betas}
        both = [name for name, value in named.items() if value is not None]
        if both:
            raise ArgumentError(f"{both[0]}: got it beside an optimizer, which has its own. Set it there.")
        made = given if isinstance(given, torch.optim.Optimizer) else given(model)
    else:
        peak = LEARNING_RATE if learning_rate is None else learning_rate
        decay = WEIGHT_DECAY if weight_decay is None else weight_decay
        if peak <= 0 or decay < 0:
            raise ArgumentError(f"learning_rate, weight_decay: got {peak}, {decay}, expected above 0, and at least 0.")
        made = adamw(model, learning_rate=peak, weight_decay=decay, betas=BETAS if betas is None else betas)
    if not isinstance(made, torch.optim.Optimizer):
        raise ArgumentError(
            f"optimizer: got {type(made).__name__}, expected a torch.optim.Optimizer, or what makes one."
        )
    for group in made.param_groups:
        group.setdefault("initial_lr", float(group["lr"]))
    return made


def _leave(model: nn.Module, optimizer: torch.optim.Optimizer, modes: list[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode
    optimizer.zero_grad(set_to_none=True)


def _headline(run: Run) -> str:
    speed = run.tokens / run.seconds if run.seconds else 0.0
    return f"loss {run.row['loss']:.4f}, rate {run.row['learning_rate']:.2e}, {speed:,.0f} tokens/s"


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0


def _check(
    steps: int,
    accumulate: int,
    clip: float | None,
    validate_every: int | None,
    checkpoint_every: int | None,
    folder: object,
    resume: bool,
) -> None:
    counts = {"steps": steps, "accumulate": accumulate, "validate_every": validate_every,
              "checkpoint_every": checkpoint_every}  # fmt: skip
    for name, count in counts.items():
        if count is None:
            continue
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ArgumentError(f"{name}: got {count!r}, expected a whole number of at least 1.")
    if clip is not None and not clip > 0:
        raise ArgumentError(f"clip: got {clip}, expected above 0, or None for no clipping.")
    if folder is None and (checkpoint_every is not None or resume):
        raise ArgumentError("folder: got None, expected one, since checkpoint_every and resume need it.")
