"""What a checkpoint holds of a run, and how the run is put back: model, optimiser, randomness, data, callbacks.

A resumed run equals an uninterrupted one on the same machine bit for bit (on a CPU; a GPU where its kernels are
deterministic), so settings that would make it another run are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headway.errors import ArgumentError, HeadwayError
from headway.train.checkpoints import Checkpoint
from headway.train.run import Callback, Run
from headway.train.streams import Placed, Stream

#: Fields of a config that do not make it another model.
BY_THE_WAY = ("architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")


def parts_of(
    run: Run, stream: Placed, callbacks: Sequence[Callback], settings: dict[str, Any], *, shares: str, random: list[Any]
) -> dict[str, Any]:
    """The parts of a checkpoint. `random` has the generators of each process, by rank."""
    return {
        "model": model_state(run.model),
        "optimizer": run.optimizer.state_dict(),
        "random": random,
        "run": {
            "tokens": run.tokens,
            "seconds": run.seconds,
            "stopped": run.stopped,
            "stream": stream.state(),
            "callbacks": [callback.state() for callback in callbacks],
            "settings": settings,
            "shares": shares,
        },
    }


def restore(
    found: Checkpoint,
    run: Run,
    stream: Placed,
    callbacks: Sequence[Callback],
    settings: dict[str, Any],
    schedule: Callable[[int], float],
) -> None:
    """Puts everything but the random generators back into the place it had; checks first that it is the same run."""
    stored = found.parts["run"]
    check_same(stored["settings"], settings, found.folder)
    if stored["shares"] != shares_digest(schedule, found.step):
        raise ArgumentError(
            f"schedule: got other rates for the {found.step} steps that are done than {found.folder} was trained with. "
            "Use the same steps, warmup and schedule (constant and wsd may be made longer while they are stable)."
        )
    if len(stored["callbacks"]) != len(callbacks):
        raise ArgumentError(
            f"callbacks: got {len(callbacks)}, expected the {len(stored['callbacks'])} of the run in {found.folder}."
        )
    try:
        run.model.load_state_dict(found.parts["model"])
    except RuntimeError as error:
        raise ArgumentError(f"model: does not fit the checkpoint {found.folder}: {error}") from error
    restore_optimizer(run.optimizer, found.parts["optimizer"])
    stream.restore(stored["stream"])
    for callback, state in zip(callbacks, stored["callbacks"], strict=True):
        callback.restore(state)
    run.step, run.tokens, run.seconds = found.step, stored["tokens"], stored["seconds"]
    run.stopped = stored["stopped"]


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name."""
    state = model.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise HeadwayError(f"model: {strange[0]} is no tensor, so it cannot be stored without pickle.")
    return state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Loads the state with each tensor in the dtype it was stored in; torch casts to the parameter's own."""
    try:
        optimizer.load_state_dict(state)
    except ValueError as error:
        raise ArgumentError(f"optimizer: does not fit the checkpoint ({error}).") from error
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for number, values in state["state"].items():
        loaded = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor) and loaded[name].dtype != value.dtype:
                loaded[name] = value.to(loaded[name].device)


def settings_of(run: Run, stream: Placed, **others: Any) -> dict[str, Any]:
    """What makes a run this run: compared when it is resumed."""
    plain = (bool, int, float, str, type(None))
    groups = [
        {
            name: list(value) if isinstance(value, tuple | list) else value
            for name, value in group.items()
            if name not in ("params", "lr") and isinstance(value, (*plain, tuple, list))
        }
        for group in run.optimizer.param_groups
    ]
    shapes = repr([(name, tuple(p.shape), str(p.dtype)) for name, p in run.model.named_parameters()])
    return {
        **others,
        "optimizer": type(run.optimizer).__name__,
        "groups": groups,
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "model": hashlib.sha256(shapes.encode()).hexdigest()[:16],
        "config": _config_of(run.model),
        "batches": _plain(stream.made_of()) if isinstance(stream, Stream) else {},
    }


def check_same(stored: dict[str, Any], now: dict[str, Any], folder: Path) -> None:
    stored, now = _flat(stored), _flat(now)
    different = [name for name in {**stored, **now} if stored.get(name) != now.get(name)]
    if different:
        shown = "; ".join(f"{name} was {stored.get(name)!r} and is {now.get(name)!r}" for name in different)
        raise ArgumentError(
            f"resume: {folder} belongs to another run: {shown}. Use the settings of then, or another folder."
        )


def _config_of(model: nn.Module) -> dict[str, Any]:
    """The config of a transformers model, without what saving and the library's version write into it."""
    config: Any = getattr(model, "config", None)
    found = _plain(config.to_dict()) if hasattr(config, "to_dict") else {}
    return {name: value for name, value in found.items() if name not in BY_THE_WAY and not name.startswith("_")}


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The values as JSON keeps them; of anything that it cannot keep its type, as its text may name an address."""
    return json.loads(json.dumps(values, default=lambda value: type(value).__name__))


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of the config and of the batches beside the others, named config.width and the like."""
    nested = {name: value for name, value in settings.items() if isinstance(value, dict)}
    flat = {name: value for name, value in settings.items() if name not in nested}
    return flat | {f"{name}.{part}": value for name, parts in nested.items() for part, value in parts.items()}


def shares_digest(schedule: Callable[[int], float], steps: int) -> str:
    """A hash of the rates of the first `steps` steps: two schedules with the same one have trained alike so far."""
    return hashlib.sha256(",".join(float(schedule(i)).hex() for i in range(steps)).encode()).hexdigest()
