"""The command `headway plan`: its arguments, its tables, its JSON."""

from __future__ import annotations

import json
import sys
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from headway.errors import ArgumentError
from headway.methods.budget import parse_shares
from headway.plan.check import Check, check
from headway.plan.cost import Phase
from headway.plan.planning import Plan, Row, parse_tokens, plan
from headway.plan.shape import config_from_sizes

#: Length of a check, and of a plan, when none is given.
CHECK_TOKENS = 1024
PLAN_TOKENS = 131_072


def run(
    model: str | None,
    *,
    tokens: str | None,
    methods: str,
    budgets: str,
    hardware: str | None,
    devices: int | None,
    dtype: str | None,
    batch: int,
    sizes: dict[str, int | None],
    measure: bool,
    as_json: bool,
) -> None:
    """Plans, or with `measure` checks the plan on this machine, and prints."""
    chosen = _pairs(methods, budgets)
    given = {name: value for name, value in sizes.items() if value is not None}
    if model is not None and given:
        raise ArgumentError(
            f"model: got {model!r} and {_flag(next(iter(given)))}, expected a name or sizes. Leave one of them out."
        )
    if measure:
        if given or batch != 1 or devices is not None or hardware is not None:
            raise ArgumentError(
                "--check: got sizes, --batch, --devices or --hardware, expected a model that can be run here, such as "
                "smollm2: it measures one sequence on this machine. Leave them out."
            )
        found = _check(model or "smollm2", tokens, chosen, dtype or "float32")
        _print(found.to_dict(), check_table(found), as_json)
        return
    config: Any = config_from_sizes(**sizes) if given else (model or "llama-3.1-70b")
    planned = plan(
        config,
        tokens=PLAN_TOKENS if tokens is None else tokens,
        methods=chosen,
        machine=hardware or "h100",
        devices=devices,
        dtype=dtype or "bfloat16",
        batch=batch,
    )
    _print(planned.to_dict(), plan_table(planned), as_json)


def plan_table(planned: Plan) -> Table:
    """A row per method; ratios are to dense attention."""
    shape = planned.shape
    table = Table(
        title=f"{shape.name}: {planned.tokens:,} tokens, batch {planned.batch}, {planned.dtype}, "
        f"{planned.devices} × {planned.machine.what}",
        caption="\n".join([_legend(planned), *planned.warnings, *_notes(planned.rows)]),
        caption_justify="left",
        box=SIMPLE_HEAD,
    )
    for name in ("method", "KV cache", "fits", "prompt", "step"):
        table.add_column(
            name,
            justify="left" if name == "method" else "right",
            no_wrap=True,
            min_width=18 if name in ("method", "prompt", "step") else None,
        )
    first = planned.rows[0]
    for row in planned.rows:
        held = size(row.kv_bytes) + ("" if row.exact else " ≈")
        table.add_row(
            _title(row.method, row.budget),
            held + _times(first.kv_bytes, row.kv_bytes, row is first).replace(" ", "\n"),
            "" if row.devices_needed is None else str(row.devices_needed),
            *(
                f"{duration(own.seconds)}{_times(dense.seconds, own.seconds, row is first)}\n{_limit(own)}"
                for own, dense in ((row.prompt, first.prompt), (row.step, first.step))
            ),
        )
    return table


def check_table(found: Check) -> Table:
    """A row per method and phase."""
    machine = found.machine
    rate = machine.attention_flops or machine.flops
    table = Table(
        title=f"Predicted and measured here, {found.tokens:,} tokens",
        caption=f"Measured in this run: {quantity(machine.flops)}FLOP/s, {quantity(rate)}FLOP/s in attention, "
        f"{size(machine.bandwidth)}/s, {duration(machine.overhead)} per layer beside. A ratio below 1 is time that the "
        "model leaves out.",
        caption_justify="left",
    )
    for name in ("method", "phase", "predicted", "measured", "ratio", "KV predicted", "KV held"):
        table.add_column(name, justify="left" if name in ("method", "phase") else "right")
    for row in found.rows:
        table.add_row(
            _title(row.method, row.budget),
            row.phase,
            duration(row.predicted),
            duration(row.measured),
            f"{row.ratio:.2f}",
            size(row.predicted_bytes),
            size(row.held_bytes),
        )
    return table


def quantity(number: float) -> str:
    """1,230,000 as "1.23 M", with a space for the unit."""
    for scale, name in ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= scale:
            return f"{number / scale:.3g} {name}"
    return f"{number:.3g} "


def size(count: float) -> str:
    return f"{quantity(count)}B"


def duration(seconds: float) -> str:
    for scale, name in ((86_400, "d"), (3_600, "h"), (60, "min"), (1, "s"), (1e-3, "ms")):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {name}"
    return f"{seconds * 1e6:.3g} µs"


def _check(model: str, tokens: str | None, methods: list[tuple[str, float]], dtype: str) -> Check:
    from headway.hosts import load

    length = CHECK_TOKENS if tokens is None else parse_tokens(tokens)
    host, _ = load(model, dtype=dtype)
    return check(host, tokens=length, methods=methods)


def _pairs(methods: str, budgets: str) -> list[tuple[str, float]]:
    """Every method at every budget. "dense" is always there and needs no naming."""
    names = list(dict.fromkeys(part.strip() for part in methods.split(",") if part.strip()))
    shares = parse_shares("--budgets", budgets)
    return [(name, share) for name in names if name != "dense" for share in shares]


def _print(found: dict[str, Any], table: Table, as_json: bool) -> None:
    if as_json:
        sys.stdout.write(json.dumps(found, indent=2) + "\n")
    else:
        Console().print(table)


def _title(method: str, budget: float | None) -> str:
    return method if budget is None else f"{method}\nat {100 * budget:.4g} %"


def _times(dense: float, now: float, first: bool) -> str:
    return "" if first or now <= 0 else f" ({dense / now:.3g}×)"


def _limit(phase: Phase) -> str:
    part, bound = phase.bound.split(", ")
    return f"{part}: {bound}"


def _legend(planned: Plan) -> str:
    shape = planned.shape
    active = "" if shape.experts == 1 else f", {quantity(shape.active_weights + shape.output_weights)} active"
    return (
        f"{quantity(shape.parameters).strip()} parameters{active} ({size(planned.weight_bytes)}). Times are the least "
        f"that the data sheet allows ({planned.machine.source}); real ones are longer. (n×): dense over method. "
        "fits: devices that weights and cache need. Below times: what takes most of them."
    )


def _notes(rows: tuple[Row, ...]) -> list[str]:
    return list(dict.fromkeys(f"≈ {row.method}: {row.note}." for row in rows if row.note))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
