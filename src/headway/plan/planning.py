"""`plan`: what a method would save on a model at a length, without the model's weights."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from headway.errors import ArgumentError
from headway.plan.cost import Phase, kv_bytes, number_bytes, prompt, step, weight_bytes
from headway.plan.footprint import footprint
from headway.plan.hardware import Hardware, hardware
from headway.plan.shape import ModelShape, config_of, meta_model, shape_of

_SCALE = {"": 1, "k": 10**3, "m": 10**6, "ki": 2**10, "mi": 2**20}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A method on the model: bytes of keys and values held after the prompt, the devices that weights and they need,
    and what a prompt and a step cost. `exact` says that bytes are the method's own to the byte."""

    method: str
    budget: float | None
    kv_bytes: int
    devices_needed: int | None
    prompt: Phase
    step: Phase
    exact: bool
    note: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of methods, dense first, and what they were planned for. `warnings` concern the whole plan."""

    shape: ModelShape
    machine: Hardware
    tokens: int
    batch: int
    dtype: str
    devices: int
    weight_bytes: int
    rows: tuple[Row, ...]
    warnings: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain numbers: bytes, operations, seconds."""
        model = asdict(self.shape)
        model["layers"] = len(self.shape.layers)
        return {
            "model": model | {"active_weights": self.shape.active_weights},
            "hardware": asdict(self.machine),
            "tokens": self.tokens,
            "batch": self.batch,
            "dtype": self.dtype,
            "devices": self.devices,
            "weight_bytes": self.weight_bytes,
            "rows": [asdict(row) | {"prompt": row.prompt.to_dict(), "step": row.step.to_dict()} for row in self.rows],
            "warnings": list(self.warnings),
        }


def plan(
    model: Any,
    *,
    tokens: int | str,
    methods: Sequence[tuple[str, float]] = (),
    machine: str | Hardware = "h100",
    devices: int | None = None,
    dtype: str = "bfloat16",
    batch: int = 1,
) -> Plan:
    """The cost of a prompt of `tokens`, of a step behind it and of the cache, for dense attention and other methods.

    model: a built-in name such as "llama-3.1-70b", a folder, a hub id, or a transformers config. tokens: a number, or
    text such as "128k" (1k is 1,000; 1Ki is 1,024). methods: pairs of a slug and a share in (0, 1] of the keys.
    devices: how many share the work evenly (None: as many as weights and the dense cache need). No weights are
    loaded.

    Raises ArgumentError and HostError for what cannot be planned."""
    length = parse_tokens(tokens)
    if batch < 1 or (devices is not None and devices < 1):
        raise ArgumentError(f"batch, devices: got {batch}, {devices}; expected at least 1.")
    number_bytes(dtype)
    wanted = hardware(machine) if isinstance(machine, str) else machine
    config = config_of(model) if isinstance(model, str) else model
    bare = meta_model(config)
    shape = shape_of(config, model if isinstance(model, str) else "", model=bare)
    weights = weight_bytes(shape, dtype)
    used = [footprint("dense", None, shape, tokens=length, model=bare)]
    for slug, share in methods:
        if not (isinstance(share, int | float) and 0 < share <= 1):
            raise ArgumentError(f"budget: got {share}, expected a share of the keys in (0, 1], such as 0.1.")
        if slug != "dense":
            used.append(footprint(slug, share, shape, tokens=length, model=bare))
    held = [kv_bytes(shape, one, dtype=dtype, batch=batch) for one in used]
    needed = [None if wanted.memory is None else math.ceil((weights + one) / wanted.memory) for one in held]
    count = devices or needed[0] or 1
    common: dict[str, Any] = {"dtype": dtype, "batch": batch, "devices": count}
    rows = tuple(
        Row(
            method=one.method,
            budget=one.budget,
            kv_bytes=size,
            devices_needed=need,
            prompt=prompt(shape, one, wanted, **common),
            step=step(shape, one, wanted, **common),
            exact=one.exact,
            note=one.note,
        )
        for one, size, need in zip(used, held, needed, strict=True)
    )
    return Plan(
        shape=shape, machine=wanted, tokens=length, weight_bytes=weights, rows=rows,
        warnings=tuple(_warnings(shape, length, wanted, rows, count)), **common,
    )  # fmt: skip


def parse_tokens(tokens: int | str) -> int:
    """A number of tokens from a number or a text such as 1M, 128k, 128Ki or 100,000."""
    text = str(tokens).strip().lower().replace(",", "").replace("_", "")
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(ki|mi|k|m|)", text)
    number = float(match[1]) * _SCALE[match[2]] if match else 0
    if number < 1 or number != int(number) or number > 10**10:
        raise ArgumentError(f"tokens: got {tokens!r}, expected a number such as 4096, 128k, 128Ki or 1M.")
    return int(number)


def _warnings(shape: ModelShape, tokens: int, machine: Hardware, rows: tuple[Row, ...], devices: int) -> list[str]:
    found = []
    if shape.positions is not None and tokens > shape.positions:
        found.append(
            f"{shape.name} has {shape.positions:,} positions; {tokens:,} tokens need a version that was extended."
        )
    short = [row.method for row in rows if row.devices_needed is not None and row.devices_needed > devices]
    if short:
        found.append(f"{', '.join(short)}: weights and cache do not fit into {devices} × {machine.what}.")
    return found
