"""`inspect`: the table of a host's attention sites and what each of them allows."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import nn

from headway.door.attach import close_door, open_door
from headway.door.selftest import Probe, run_selftest
from headway.door.structure import hard_coded, mixer_kind
from headway.errors import InterceptionError

ALLOWED = "capture, select, edit"


@dataclass(frozen=True)
class SiteRow:
    """One attention site, or one module that mixes tokens without passing the door (`allows` is then empty and `why`
    says the reason)."""

    site: str
    layer: int | None
    kind: str
    reach: str
    heads: int | None
    kv_heads: int | None
    head_dim: int | None
    rope: bool | None
    softcap: float | None
    sinks: bool
    causal: bool | None
    allows: str
    why: str = ""


@dataclass(frozen=True)
class SiteTable:
    """The sites of one host; `refused` is the reason when it cannot be attached to as a whole."""

    host: str
    implementation: str
    rows: tuple[SiteRow, ...]
    refused: str = ""

    def to_dicts(self) -> list[dict[str, Any]]:
        return [asdict(row) for row in self.rows]

    def __rich__(self) -> Table:
        table = Table(title=f"{self.host} ({self.implementation})", caption=self.refused or None)
        for name in ("site", "layer", "kind", "heads", "dim", "rope", "soft cap", "sinks", "allows"):
            table.add_column(name, overflow="fold")
        for row in self.rows:
            heads = (
                ""
                if row.heads is None
                else f"{row.heads}" + (f" / {row.kv_heads}" if row.kv_heads != row.heads else "")
            )
            flags = ["yes" if flag else "" for flag in (row.rope, row.sinks)]
            table.add_row(
                row.site,
                "" if row.layer is None else str(row.layer),
                f"{row.kind} {row.reach}".strip(),
                heads,
                "" if row.head_dim is None else str(row.head_dim),
                flags[0],
                "" if row.softcap is None else f"{row.softcap:g}",
                flags[1],
                row.allows or row.why,
            )
        return table


def inspect(model: nn.Module, *, example: dict[str, Any] | None = None) -> SiteTable:
    """Every attention site of a model with its heads, reach, rotary embedding, soft cap, learned sinks and what the
    door allows there; modules that mix tokens in other ways are listed with the reason. Runs one tiny forward."""
    door = open_door(model)
    probe = Probe()
    refused = ""
    try:
        run_selftest(door, model, example, probe=probe)
    except InterceptionError as error:
        refused = str(error)
    finally:
        close_door(door)
    rows = []
    for call in probe.calls.values():
        module = call.module
        rows.append(
            SiteRow(
                site=call.site.name,
                layer=call.site.layer,
                kind=call.site.kind,
                reach=call.site.reach,
                heads=call.site.heads,
                kv_heads=call.site.kv_heads,
                head_dim=call.site.head_dim,
                rope=None if module is None else _has_rope(model, module),
                softcap=call.softcap,
                sinks=call.sinks is not None,
                causal=call.causal,
                allows="" if refused else ALLOWED,
                why=refused,
            )
        )
    for name, module in model.named_modules():
        kind = mixer_kind(module)
        if kind or hard_coded(module):
            why = f"{type(module).__name__}: {kind or 'hard-coded attention'}"
            rows.append(
                SiteRow(
                    name,
                    getattr(module, "layer_idx", None),
                    kind or "self",
                    "",
                    None,
                    None,
                    None,
                    None,
                    None,
                    False,
                    None,
                    "",
                    why,
                )
            )
    implementation = str(getattr(getattr(model, "config", None), "_attn_implementation", None))
    return SiteTable(type(model).__name__, implementation, tuple(rows), refused)


def _has_rope(model: nn.Module, module: nn.Module) -> bool:
    """A rotary embedding stands in the module or, shared, in its host, and the host's positions are not learned."""
    own = any("rotary" in name or "rope" in name for name, _ in module.named_modules())
    shared = any(isinstance(getattr(m, "inv_freq", None), torch.Tensor) for m in model.modules())
    return own or shared
