"""`headway.look`: from a model and a text to a `Look`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, unknown
from headway.hosts import Text, default_text, positions_of, tokenize
from headway.look import summary
from headway.look.gather import Reading, main_stack, read, read_maps
from headway.look.maps import choose_heads
from headway.look.result import HeadMetric, Look
from headway.progress import Tell

#: Tokens of an ordinary look.
DEFAULT_TOKENS = 2048
#: Patterns and roles need some rows to say anything.
LEAST_TOKENS = 8


def look(
    model: nn.Module,
    tokenizer: Any,
    text: Text | str | None = None,
    *,
    tokens: int | None = None,
    rows: int | None = None,
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    seed: int = 0,
    name: str | None = None,
    allow_longer: bool = False,
    progress: Tell | None = None,
) -> Look:
    """What every attention head of a text model does on the first `tokens` tokens of a text.

    text: a string, a `Text`, or None for the documentation topics that ship with Python. tokens: 2,048 by default, or
    as many as the text and the model have. rows: query rows to sample on long inputs; statistics then carry intervals
    (by default all rows up to 8,192 tokens, 1,024 beyond). layers: which to report, all by default. heads: (layer,
    head) pairs for the inspector, by default the most telling ones. allow_longer: read more tokens than the model has
    positions for. progress: called with (what, done, total).

    Raises ArgumentError for unknown layers and heads, too few or too many tokens; InterceptionError for a host that the
    door cannot enter; NumericError for a model whose numbers are not finite."""
    start = time.perf_counter()
    given = default_text() if text is None else text if isinstance(text, Text) else Text.of(text, "the given text")
    positions = positions_of(model)
    wanted = tokens if tokens is not None else min(DEFAULT_TOKENS, positions or DEFAULT_TOKENS)
    ids = tokenize(tokenizer, given, wanted, positions=positions, needed=LEAST_TOKENS, allow_longer=allow_longer)
    _check_places(model, layers, heads)
    with evaluating(model):
        reading = read(model, tokenizer, ids, rows=rows, layers=layers, seed=seed, progress=progress)
        metrics = summary.head_metrics(reading)
        chosen = choose_heads(metrics) if heads is None else list(heads)
        read_maps(reading, model, list(chosen), progress)
    return Look(
        model=_model_facts(model, name, reading, positions),
        run=_run_facts(reading, given, seed, layers, time.perf_counter() - start),
        tokens=reading.pieces,
        heads=metrics,
        layers=summary.layer_series(reading),
        labels=summary.labels(reading),
        received=_received(reading),
        sinks=summary.sinks_section(reading),
        secondary=summary.secondary_section(reading),
        patterns=summary.patterns_section(reading),
        roles=summary.roles_section(reading),
        maps=reading.maps,
        findings=summary.findings(reading, metrics),
        warnings=_warnings(reading, given, positions, metrics),
    )


def _check_places(model: nn.Module, layers: Sequence[int] | None, heads: Sequence[tuple[int, int]] | None) -> None:
    """Refuses layers and heads that the model does not have, before anything is read."""
    if layers is None and heads is None:
        return
    from headway.door import Observer, observe

    class _Nothing(Observer):
        def observe(self, call: Any, output: Any, lse: Any = None) -> None: ...

    with observe(model, _Nothing()) as handle:
        sites, _ = main_stack(handle.sites)
    for layer in layers or ():
        if not 0 <= layer < len(sites):
            raise unknown("layers", layer, range(len(sites)))
    for layer, head in heads or ():
        if not 0 <= layer < len(sites):
            raise unknown("heads (layer)", layer, range(len(sites)))
        if not 0 <= head < sites[layer].heads:
            raise ArgumentError(f"heads: got head {head} of layer {layer}, expected 0..{sites[layer].heads - 1}.")


def _received(reading: Reading) -> list[list[float]]:
    empty = [math.nan] * reading.ids.shape[1]
    return [empty if r is None else r.mean(0).tolist() for r in reading.received]


def _model_facts(model: nn.Module, name: str | None, reading: Reading, positions: int | None) -> dict[str, Any]:
    site = reading.sites[0]
    parameter = next(model.parameters())
    return {
        "name": name or getattr(model, "name_or_path", "") or type(model).__name__,
        "class": type(model).__name__,
        "layers": len(reading.sites),
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "positions": positions,
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def _run_facts(reading: Reading, text: Text, seed: int, layers: Sequence[int] | None, seconds: float) -> dict[str, Any]:
    import transformers

    import headway

    return {
        "tokens": reading.ids.shape[1],
        "text": text.source,
        "text_sha256": text.sha256,
        "rows": "all" if reading.sample is None else reading.sample.index.numel(),
        "layers": "all" if layers is None else list(layers),
        "seed": seed,
        "seconds": round(seconds, 1),
        "seconds_by_part": {name: round(value, 1) for name, value in reading.seconds.items()},
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "headway": headway.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": str(reading.ids.device),
        "threads": torch.get_num_threads(),
    }


def _warnings(reading: Reading, text: Text, positions: int | None, metrics: Sequence[HeadMetric]) -> list[str]:
    notes = list(reading.notes)
    count = reading.ids.shape[1]
    if reading.sample is not None:
        notes.append(
            f"{reading.sample.index.numel()} of {count} query rows were read; role scores carry 95 % intervals, "
            "received mass is an unbiased estimate."
        )
    if positions is not None and count > positions:
        notes.append(f"The text has {count} tokens, the model {positions} positions: it was not trained for the rest.")
    if not any(np_any(m) for m in metrics):
        notes.append("No head metric could be measured.")
    return notes


def np_any(metric: HeadMetric) -> bool:
    return any(math.isfinite(value) for row in metric.values for value in row)
