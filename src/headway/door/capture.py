"""Capture: what to read at which sites, taken block by block from q and k while the host's own kernel makes the output.

A capture costs O(block × keys) memory beside its results, whatever the kernel of the host, and never changes the
output.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headway.door.attach import Handle
from headway.door.call import AttentionCall, Site
from headway.door.stages import Observer
from headway.errors import ArgumentError, unknown
from headway.kernels.reductions import REDUCTIONS, reduce_attention
from headway.kernels.rows import RowSample
from headway.kernels.weighing import part_of

TENSORS = ("query", "key", "value", "head_output")
WHAT = (*TENSORS, *REDUCTIONS)
#: What holds one entry per query row, joined over chunks along that axis.
ROW_WISE = frozenset(
    {
        "entropy",
        "distance",
        "argmax",
        "first",
        "previous",
        "recent",
        "span_mass",
        "top",
        "top_index",
        "query",
        "head_output",
    }
)
SUMS = frozenset({"received", "visible", "distance_histogram"})
#: A capture of whole maps above this many bytes per site is refused: reductions are what is meant.
MAP_LIMIT = 2 * 2**30


@dataclass(frozen=True, kw_only=True)
class CaptureSpec:
    """What to capture.

    `what`: names from WHAT. `layers`, `heads`: indices, all by default (`heads` are query heads; key and value come by
    their group). `rows`: query rows, or a RowSample that stands for all of them. `spans`: [start, stop) key ranges for
    span_mass and block_mean. `reduce`: "rows" takes the mean over query rows, "heads" over heads. `dtype`: of the
    results, float32 by default. `top`: entries per row for "top"."""

    what: tuple[str, ...]
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    rows: Any = None
    spans: tuple[tuple[int, int], ...] | None = None
    reduce: str | None = None
    dtype: torch.dtype = torch.float32
    top: int = 8

    def __post_init__(self) -> None:
        what = (self.what,) if isinstance(self.what, str) else tuple(self.what)
        for name in what:
            if name not in WHAT:
                raise unknown("what", name, WHAT)
        if not what:
            raise ArgumentError(f"what: got nothing, expected at least one of {', '.join(WHAT)}.")
        if self.reduce not in (None, "rows", "heads"):
            raise unknown("reduce", self.reduce, ("rows", "heads"))
        object.__setattr__(self, "what", what)
        for name in ("layers", "heads", "spans"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else tuple(value))


@dataclass
class Captured:
    """The results by layer: `captured[3]["entropy"]` joins all calls of a layer, `calls(3)` gives them one by one."""

    by_site: dict[str, list[dict[str, Tensor]]] = field(default_factory=dict)
    sites: dict[str, Site] = field(default_factory=dict)

    def names(self, layer: int) -> list[str]:
        names = [name for name, site in self.sites.items() if site.layer == layer]
        if not names:
            raise unknown("layer", layer, sorted({s.layer for s in self.sites.values()}))
        return names

    def calls(self, layer: int | str) -> list[dict[str, Tensor]]:
        """The captures of a layer (or a site by name), one entry per attention operation."""
        if isinstance(layer, str):
            if layer not in self.by_site:
                raise unknown("site", layer, self.by_site)
            return self.by_site[layer]
        names = self.names(layer)
        if len(names) > 1:
            raise ArgumentError(f"layer: got {layer}, which is {', '.join(names)}; expected one site. Name the site.")
        return self.by_site[names[0]]

    def __getitem__(self, layer: int | str) -> dict[str, Tensor]:
        return join_calls(self.calls(layer))

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_site)

    def __len__(self) -> int:
        return len(self.by_site)

    def stack(self, what: str) -> Tensor:
        """(sites, batch, heads, …) in the order the sites ran."""
        return torch.stack([join_calls(calls)[what] for calls in self.by_site.values()])


def join_calls(calls: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Chunks of one sequence as one: rows are put end to end, sums over rows are added, keys and values come from the
    last call (which sees them all). What cannot be joined is a list's last entry."""
    if len(calls) == 1:
        return calls[0]
    joined = {}
    for name in calls[-1]:
        parts = [call[name] for call in calls if name in call]
        if name in ROW_WISE and parts[0].ndim >= 3:
            joined[name] = torch.cat(parts, 2)
        elif name in SUMS:
            width = parts[-1].shape[-1]
            joined[name] = torch.stack([torch.nn.functional.pad(p, (0, width - p.shape[-1])) for p in parts]).sum(0)
        elif name in ("weights", "logits"):
            width, fill = parts[-1].shape[-1], 0.0 if name == "weights" else -torch.inf
            joined[name] = torch.cat(
                [torch.nn.functional.pad(p, (0, width - p.shape[-1]), value=fill) for p in parts], 2
            )
        else:
            joined[name] = parts[-1]
    return joined


class Capture(Observer):
    """The observer behind `headway.capture`."""

    def __init__(self, spec: CaptureSpec) -> None:
        self.spec = spec
        self.reads_weights = bool(set(spec.what) & set(REDUCTIONS))
        self.reads_keys = bool({"key", "value"} & set(spec.what))
        self.start()

    def start(self) -> None:
        self.captured = Captured()

    def prepare(self, sites: Sequence[Site]) -> None:
        layers = sorted({site.layer for site in sites})
        for layer in self.spec.layers or ():
            if sites and layer not in layers:
                raise unknown("layers", layer, layers)
        for site in sites:
            check_head_indices(self.spec.heads or (), site)

    def acts_at(self, site: Site) -> bool:
        return self.spec.layers is None or site.layer in self.spec.layers

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        spec = self.spec
        picked = pick_heads(call, spec.heads)
        results: dict[str, Tensor] = {}
        own = {"query": picked.query, "key": picked.key, "value": picked.value}
        own["head_output"] = output if spec.heads is None else output[:, list(spec.heads)]
        for name in spec.what:
            if name in TENSORS:
                rows = spec.rows.index if isinstance(spec.rows, RowSample) else spec.rows
                limited = rows is not None and name in ("query", "head_output")
                results[name] = (own[name][:, :, rows] if limited else own[name]).detach().to(spec.dtype).clone()
        names = [name for name in spec.what if name in REDUCTIONS]
        if names:
            results |= self._reduced(picked, names)
        if spec.reduce is not None:
            results = {name: _averaged(name, tensor, spec.reduce) for name, tensor in results.items()}
        self.captured.sites[call.site.name] = call.site
        self.captured.by_site.setdefault(call.site.name, []).append(results)

    def _reduced(self, call: AttentionCall, names: list[str]) -> dict[str, Tensor]:
        rows = self.spec.rows
        count = call.queries if rows is None else (rows.index if isinstance(rows, RowSample) else rows).numel()
        size = 4 * call.query.shape[0] * call.heads * count * call.keys
        if {"weights", "logits"} & set(names) and size > MAP_LIMIT:
            raise ArgumentError(
                f"what: got whole maps of {size / 2**30:.1f} GiB at {call.site.name}, expected at most "
                f"{MAP_LIMIT / 2**30:.0f} GiB. Ask for rows=…, heads=… or a reduction."
            )
        padded = call.padded_rows()
        spans, shift = self.spec.spans, call.first_key
        if shift and spans is not None:
            raise ArgumentError(
                f"spans: got spans of the whole sequence at {call.site.name}, whose cache has dropped the first "
                f"{shift} keys; "
                "expected a forward without a sliding cache. Run the whole text in one forward."
            )
        found = reduce_attention(
            call.query,
            call.key,
            names,
            sinks=call.sinks,
            rows=rows,
            row_valid=None if padded is None or not bool(padded.any()) else ~padded,
            spans=spans,
            top=self.spec.top,
            workspace=call.forward.scratch,
            **call.arguments(),
        )
        return {
            k: _in_sequence(k, v.to(self.spec.dtype) if v.is_floating_point() else v, shift) for k, v in found.items()
        }

    def result(self) -> Captured:
        return self.captured


class CaptureHandle(Handle):
    """A scope with one capture; `result()` gives what it read."""

    capture: Capture

    def result(self) -> Captured:
        return self.capture.result()

    def __enter__(self) -> CaptureHandle:
        self.attach()
        return self


def capture(
    model: nn.Module, spec: CaptureSpec | None = None, *, sites: Sequence[str] | None = None, **fields: Any
) -> CaptureHandle:
    """`with headway.capture(model, what=("entropy",)) as captured: model(ids)`, then `captured.result()[layer]`.

    Takes a CaptureSpec or its fields. Raises ArgumentError for unknown names, layers and heads."""
    if spec is not None and fields:
        raise ArgumentError(f"spec: got a CaptureSpec and also {', '.join(fields)}, expected one or the other.")
    options = {name: fields.pop(name) for name in ("selftest", "example") if name in fields}
    observer = Capture(spec if spec is not None else CaptureSpec(**fields))
    handle = CaptureHandle(model, (observer,), sites=sites, **options)
    handle.capture = observer
    return handle


def pick_heads(call: AttentionCall, heads: Sequence[int] | None) -> AttentionCall:
    """The call restricted to some query heads, with the key and value head of each."""
    if heads is None:
        return call
    index = list(heads)
    groups = call.groups
    owners = [h // groups for h in index]
    per_head: dict[str, Any] = {}
    for name in ("mask", "bias"):
        tensor = getattr(call, name)
        per_head[name] = tensor[:, index] if tensor is not None and tensor.shape[1] > 1 else tensor
    return call.replace(
        query=call.query[:, index],
        key=call.key[:, owners],
        value=call.value[:, owners],
        sinks=None if call.sinks is None else call.sinks[index],
        weighing=part_of(call.weighing, index, call.heads),
        **per_head,
    )


def check_head_indices(heads: Sequence[int], site: Site) -> None:
    """Raises ArgumentError for a head index out of range, saying the range and how query and key heads relate."""
    for head in heads:
        if not 0 <= head < site.heads:
            raise ArgumentError(
                f"heads: got {head} at {site.name}, expected query heads 0..{site.heads - 1} (it has "
                f"{site.kv_heads} key heads)."
            )


def _in_sequence(name: str, tensor: Tensor, first_key: int) -> Tensor:
    """Key indices and key axes as positions in the sequence, where a sliding cache has dropped the first keys."""
    if not first_key:
        return tensor
    if name in ("argmax", "top_index"):
        return torch.where(tensor >= 0, tensor + first_key, tensor)
    if name in ("received", "visible", "weights", "logits"):
        return torch.nn.functional.pad(tensor, (first_key, 0), value=-torch.inf if name == "logits" else 0.0)
    return tensor


def _averaged(name: str, tensor: Tensor, over: str) -> Tensor:
    if over == "heads":
        return tensor.float().mean(1) if name != "argmax" else tensor
    return tensor.float().nanmean(2) if name in ROW_WISE and name not in ("argmax", "top_index") else tensor
