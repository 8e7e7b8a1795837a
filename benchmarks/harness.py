"""Ratio benchmarks: two sides run interleaved in one process, so that drift of the machine hits both alike.

    from harness import compare
    compare("capture_4096", method=lambda: ..., baseline=lambda: ...)

Prints both sides and writes `benchmarks/results/<name>.json`. A single time says little on a shared machine; the ratio
of medians with its paired bootstrap interval is the result.
"""

from __future__ import annotations

import ctypes
import gc
import json
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from headway.errors import ArgumentError
from headway.evidence.environment import environment
from headway.evidence.timing import keep_freed_memory
from headway.files import write_atomically
from headway.statistics import Measurement, bootstrap_ratio, number

log = logging.getLogger(__name__)

RESULTS = Path(__file__).parent / "results"
#: One-minute load average above which something else is running and times mislead.
BUSY = 0.5


@dataclass(frozen=True, kw_only=True)
class Peak:
    """How far the resident memory rose above its level before the call, in bytes, and how it was read.

    `source` is "VmHWM" (the kernel's peak, reset before the call), "ru_maxrss" (a peak that cannot be reset, so `rise`
    is a lower bound), or "unknown" with a rise of None."""

    rise: int | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Seconds of every repeat of both sides in the order they were run, and the ratio method / baseline of medians."""

    name: str
    labels: tuple[str, str]
    method: tuple[float, ...]
    baseline: tuple[float, ...]
    ratio: Measurement
    load: float | None
    machine: dict[str, float]
    method_peak: Peak | None = None
    baseline_peak: Peak | None = None

    @property
    def ratio_of_minima(self) -> float:
        return min(self.method) / min(self.baseline)


def compare(
    name: str,
    method: Callable[[], Any],
    baseline: Callable[[], Any],
    *,
    labels: tuple[str, str] = ("method", "baseline"),
    repeats: int = 7,
    warmup: int = 1,
    memory: bool = False,
    settings: dict[str, Any] | None = None,
    results: str | Path = RESULTS,
) -> Comparison:
    """Times `method()` and `baseline()` `repeats` times each, alternating which goes first, after `warmup` unmeasured
    calls of both. `memory=True` adds one more call of each for its peak memory. `settings` (sizes, model) are stored
    with the result. Warns when the machine is busy."""
    if repeats < 2 or warmup < 0:
        raise ArgumentError(f"repeats, warmup: got {repeats} and {warmup}, expected repeats ≥ 2 and warmup ≥ 0.")
    load = warn_if_busy()
    keep_freed_memory()
    machine = machine_state()
    for _ in range(warmup):
        method()
        baseline()
    times: dict[str, list[float]] = {"method": [], "baseline": []}
    sides = [("method", method), ("baseline", baseline)]
    for repeat in range(repeats):
        for side, function in sides if repeat % 2 == 0 else reversed(sides):
            times[side].append(_seconds(function))
    ratio = bootstrap_ratio(times["method"], times["baseline"], paired=True, generator=0, statistic="median")
    comparison = Comparison(
        name=name,
        labels=labels,
        method=tuple(times["method"]),
        baseline=tuple(times["baseline"]),
        ratio=ratio,
        load=load,
        machine=machine,
        method_peak=peak_memory(method) if memory else None,
        baseline_peak=peak_memory(baseline) if memory else None,
    )
    show(comparison)
    write(comparison, settings or {}, results)
    return comparison


def peak_memory(function: Callable[[], Any]) -> Peak:
    """Calls `function` once and tells how far resident memory rose meanwhile, without psutil."""
    gc.collect()
    _return_freed_memory()
    before, reset = _status("VmRSS"), _reset_peak()
    if before is not None and reset:
        result = function()
        after = _status("VmHWM")
        del result
        if after is not None:
            return Peak(rise=max(after - before, 0), source="VmHWM")
    else:
        highest = _maxrss()
        result = function()
        after = _maxrss()
        del result
        if highest is not None and after is not None:
            return Peak(rise=after - highest, source="ru_maxrss")
    return Peak(rise=None, source="unknown")


def warn_if_busy(limit: float = BUSY) -> float | None:
    """The one-minute load average, with a warning when it is above `limit`; None where the system has none."""
    try:
        load = os.getloadavg()[0]
    except (AttributeError, OSError):
        return None
    if load > limit:
        log.warning("Load average is %.2f (above %.2f): something else is running, times may mislead.", load, limit)
    return load


def machine_state() -> dict[str, float]:
    """What the machine gives just now, best of several: GB/s of copying 64 MiB, and GFLOP/s of products of 1,024 rows
    and of 32 rows (by 64 x 512, as inside a fused attention kernel). A neighbour on the same core takes a third of
    the small products and nothing of the large ones, and shows in no load average."""
    source, target = torch.ones(2**24), torch.empty(2**24)
    left, right = torch.ones(1024, 1024), torch.ones(1024, 1024)
    rows, keys = torch.ones(32, 64), torch.ones(64, 512)
    copying = _fastest(lambda: target.copy_(source))
    product = _fastest(lambda: left @ right)
    small = _fastest(lambda: [rows @ keys for _ in range(200)]) / 200
    return {
        "copy_gb_per_s": 2 * 4 * 2**24 / copying / 1e9,
        "product_gflop_per_s": 2 * 1024**3 / product / 1e9,
        "small_product_gflop_per_s": 2 * 32 * 64 * 512 / small / 1e9,
    }


def _fastest(function: Callable[[], Any], repeats: int = 6) -> float:
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def show(comparison: Comparison) -> None:
    """Prints both sides and the ratio."""
    table = Table(title=comparison.name, title_justify="left")
    for column in ("side", "median s", "min s", "max s", "peak memory"):
        table.add_column(column, justify="left" if column == "side" else "right")
    peaks = (comparison.method_peak, comparison.baseline_peak)
    for label, seconds, peak in zip(comparison.labels, (comparison.method, comparison.baseline), peaks, strict=True):
        shown = "" if peak is None else "unknown" if peak.rise is None else f"+{peak.rise / 2**20:,.0f} MiB"
        table.add_row(label, *(number(float(f(seconds))) for f in (np.median, np.min, np.max)), shown)
    console = Console()
    console.print(table)
    console.print(
        f"{' / '.join(comparison.labels)}: {comparison.ratio} of medians, "
        f"{number(comparison.ratio_of_minima)} × of minima, n = {comparison.ratio.n}; "
        f"load {'unknown' if comparison.load is None else f'{comparison.load:.2f}'}, "
        + ", ".join(f"{name} {value:.1f}" for name, value in comparison.machine.items()),
        markup=False,
    )


def write(comparison: Comparison, settings: dict[str, Any], results: str | Path) -> Path:
    """Writes `<results>/<name>.json` with the environment."""
    content = {
        **asdict(comparison),
        "ratio": comparison.ratio.to_dict(),
        "ratio_of_minima": comparison.ratio_of_minima,
        "settings": settings,
        "environment": environment(),
    }
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return write_atomically(Path(results) / f"{comparison.name}.json", text)


def write_facts(name: str, facts: dict[str, Any], results: str | Path = RESULTS) -> Path:
    """Writes `<results>/<name>.json` for what is no ratio of two sides: shares, single long runs."""
    content = {"name": name, "load": warn_if_busy(), "machine": machine_state(), **facts, "environment": environment()}
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return write_atomically(Path(results) / f"{name}.json", text)


def _seconds(function: Callable[[], Any]) -> float:
    gc.collect()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _status(field: str) -> int | None:
    """A size from /proc/self/status in bytes (the file counts in KiB); None off Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(f"{field}:")]
    return int(values[0]) * 1024 if values else None


def _reset_peak() -> bool:
    """Sets VmHWM back to the present size: the value 5 of clear_refs, see proc(5)."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _maxrss() -> int | None:
    """Highest resident size of the process so far in bytes: getrusage counts in KiB on Linux, in bytes on macOS."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _return_freed_memory() -> None:
    """Gives freed heap back to the system where the C library can, or the next call would seem to need none."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):
        return
