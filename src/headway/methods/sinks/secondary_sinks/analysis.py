"""The whole analysis of secondary sinks on a model and a text, or a batch of texts.

One forward pass reads streams, keys and values; a second one, made only where there are sinks, reads the MLPs that
wrote them. Nothing larger than a few numbers per token and layer is kept. Paper: arXiv 2512.22213.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.methods.sinks.secondary_sinks.detection import (
    CHAT_CANDIDATES,
    MIN_JUMP,
    THRESHOLD,
    LabelRule,
    Primary,
    SinkMap,
    find_primary,
    map_sinks,
    massive_spans,
)
from headway.methods.sinks.secondary_sinks.levels import LevelTable
from headway.methods.sinks.secondary_sinks.measures import CHUNK, group_profile, sink_score
from headway.methods.sinks.secondary_sinks.origin import Origin, stage_profile, trace_origins
from headway.methods.sinks.secondary_sinks.stream import (
    Progress,
    Reading,
    Scan,
    candidate_positions,
    gather,
    read_streams,
    real_tokens,
    run,
)
from headway.methods.sinks.secondary_sinks.structure import Block
from headway.methods.sinks.secondary_sinks.triggers import (
    FEWEST,
    SCALES,
    SEED,
    Trigger,
    analyse_triggers,
    contrast_positions,
    has_tsne,
)

#: Most sinks per creating layer whose vectors are kept for the origin and trigger analyses.
SAMPLE = 256


@dataclass
class SecondarySinks:
    """What the analysis found in one text.

    `primary` is None where there is none; `reason` says so or gives its ground. `score` is attention received by group
    and layer (None when no attention was given), `norms[kind][group]` mean norms by layer for hidden, key and value,
    `other_ranges` are maps of further layer ranges in which the primary is massive and other tokens point its way (the
    paper's rule takes the largest rise alone); give such a range as `span` to analyse it in full.
    `entropy[layer]` the matrix entropy of each chunk. `references` are the MLP outputs that an intervention compares
    with: the primary's at its start layer ("source") and at each creating layer. `notes` say what was left out and
    why."""

    primary: Primary | None
    reason: str
    sinks: SinkMap
    levels: LevelTable
    other_ranges: list[SinkMap]
    score: dict[str, list[float]] | None
    origins: list[Origin]
    stages: dict[int, dict[str, float]]
    triggers: list[Trigger]
    norms: dict[str, dict[str, list[float]]]
    entropy: list[list[float]]
    references: dict[str | int, Float[Tensor, " width"]] = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the reference vectors, ready for strict JSON (NaN becomes None, keys are text)."""
        return _plain(
            {
                "primary": None if self.primary is None else asdict(self.primary),
                "reason": self.reason,
                "sinks": self.sinks.to_dict(),
                "levels": self.levels.to_dict(),
                "other_ranges": [sinks.to_dict() for sinks in self.other_ranges],
                "score": self.score,
                "origins": [asdict(o) | {"aligned": o.aligned} for o in self.origins],
                "stages": self.stages,
                "triggers": [asdict(t) for t in self.triggers],
                "norms": self.norms,
                "entropy": self.entropy,
                "notes": self.notes,
            }
        )


def analyse(
    model: nn.Module,
    input_ids: Int[Tensor, "1 tokens"],
    attention_mask: Tensor | None = None,
    *,
    received: Sequence[Any] | None = None,
    **options: Any,
) -> SecondarySinks:
    """Secondary sinks of one text in any decoder; options as in `analyse_rows`.

    `received[layer]`, (heads, tokens) or (tokens,), is the attention mass each token receives per query that can see it
    (None for layers without full attention); the door's capture gives it. Without it the sink score is left out."""
    ids, _ = real_tokens(input_ids, attention_mask)
    if ids.shape[0] != 1:
        raise ArgumentError(f"input_ids: got {ids.shape[0]} rows, expected one text. Use analyse_rows for a batch.")
    mask = None if attention_mask is None else attention_mask.reshape(ids.shape)
    return analyse_rows(model, ids, mask, received=None if received is None else [received], **options)[0]


@torch.no_grad()
def analyse_rows(
    model: nn.Module,
    input_ids: Int[Tensor, "batch tokens"],
    attention_mask: Tensor | None = None,
    *,
    reading: Reading | None = None,
    received: Sequence[Sequence[Any] | None] | None = None,
    chat_template: bool = False,
    candidates: Sequence[int] | None = None,
    threshold: float = THRESHOLD,
    lifetime: str = "count",
    rule: str | LabelRule = "auto",
    min_jump: float = MIN_JUMP,
    span: tuple[int, int] | None = None,
    labels: Sequence[str] = ("secondary",),
    entropy: str | None = "chunks",
    chunk: int = CHUNK,
    alpha: float = 1.0,
    key_value: bool = True,
    sample: int = SAMPLE,
    traced: int | None = None,
    seed: int = SEED,
    scales: Sequence[float] = SCALES,
    tsne: bool = False,
    progress: Progress | None = None,
) -> list[SecondarySinks]:
    """Secondary sinks of every row of a batch, each on its own; padding is left out and positions count real tokens.

    `reading`: what `read_streams` took from a forward pass that was made anyway; without it one is made here.
    `chat_template`: whether the text was made by one, which makes position 2 a candidate for the primary sink
    (`candidates` names positions by hand). `threshold`, `lifetime`, `rule`, `min_jump`, `span`: see `detect`. `labels`:
    which tokens enter the level table, the origins and the triggers. `entropy`: "chunks", "prefix" (slower) or None.
    `key_value=False` leaves key and value norms out. At most `sample` sinks per layer are traced to their origin, drawn
    with `seed`; `traced` limits them to the first tokens of a row, and the forward that traces them is then as short
    (None: all; every decoder reads those tokens alike without the rest). `received[row]` as in `analyse`, in the
    columns of the given row. `progress(done, all, what)` is called as layers finish. Raises HostError for a model whose
    blocks or MLPs cannot be found, ArgumentError for texts that are too short, NumericError for streams that are not
    finite."""
    ids, kept = real_tokens(input_ids, attention_mask)
    if received is not None and len(received) != len(kept):
        raise ArgumentError(f"received: got {len(received)} rows, expected {len(kept)}, one per row of input_ids.")
    if reading is None:
        with read_streams(
            model,
            ids,
            attention_mask,
            chat_template=chat_template,
            candidates=candidates,
            entropy=entropy,
            chunk=chunk,
            alpha=alpha,
            key_value=key_value,
            progress=progress,
        ) as reading:
            run(model, ids, attention_mask)
    _check_reading(reading, kept, candidate_positions(chat_template, candidates))
    results = []
    for row, streams in enumerate(reading.rows):
        detection = partial(_detect, streams, threshold=threshold, lifetime=lifetime, rule=rule, min_jump=min_jump)
        sinks = detection(span)
        spans = massive_spans(streams.norms, sinks.primary) if sinks.primary is not None and span is None else []
        further = [detection(other) for other in spans]
        result = _described(streams, sinks, [found for found in further if found.sinks], labels)
        result.notes += [*_stream_notes(streams, chat_template or candidates is not None), *reading.notes]
        _add_score(result, None if received is None else received[row], streams)
        _add_key_value(result, reading, row)
        results.append(result)
    _add_origins(
        model,
        reading,
        ids,
        attention_mask,
        results,
        _Tracing(tuple(labels), sample, traced, seed, tuple(scales), tsne),
        progress,
    )
    return results


@dataclass(frozen=True)
class _Tracing:
    """How origins and triggers are traced."""

    labels: tuple[str, ...]
    sample: int
    traced: int | None
    seed: int
    scales: tuple[float, ...]
    tsne: bool


def _check_reading(reading: Reading, kept: Sequence[Tensor], candidates: tuple[int, ...]) -> None:
    same = len(reading.rows) == len(kept) and all(
        row.candidates == candidates and torch.equal(row.kept, columns)
        for row, columns in zip(reading.rows, kept, strict=False)
    )
    if not same:
        raise ArgumentError(
            "reading: got one of another text or of other candidate positions, expected that of input_ids. Give "
            "read_streams and analyse_rows the same ids, mask and chat_template."
        )
    if any(bool(row.norms.isnan().any()) for row in reading.rows):
        raise ArgumentError(
            "reading: got one without a forward pass. Run the model inside read_streams, then leave it."
        )


def _detect(
    streams: Scan,
    span: tuple[int, int] | None,
    *,
    threshold: float,
    lifetime: str,
    rule: str | LabelRule,
    min_jump: float,
) -> SinkMap:
    primary, reason = find_primary(streams.norms, streams.candidates, min_jump=min_jump, span=span)
    return map_sinks(
        None if primary is None else streams.cosines[streams.candidates.index(primary.position)],
        primary,
        reason,
        layers=streams.norms.shape[0],
        tokens=streams.norms.shape[1],
        candidates=streams.candidates,
        threshold=threshold,
        lifetime=lifetime,
        rule=rule,
    )


def _described(streams: Scan, sinks: SinkMap, further: list[SinkMap], labels: Sequence[str]) -> SecondarySinks:
    notes = [
        f"Position {found.primary.position} is massive at layers {found.primary.start} to {found.primary.end - 1} as "
        f"well, with {len(found.sinks)} later tokens along it; trace them with span=({found.primary.start}, "
        f"{found.primary.end})."
        for found in further
        if found.primary is not None
    ]
    return SecondarySinks(
        primary=sinks.primary,
        reason=sinks.reason,
        sinks=sinks,
        levels=LevelTable.of(sinks, labels),
        other_ranges=further,
        score=None,
        origins=[],
        stages={},
        triggers=[],
        norms={"hidden": _lists(group_profile(streams.norms, sinks))},
        entropy=streams.entropy,
        references={},
        notes=notes,
    )


def _stream_notes(streams: Scan, chosen: bool) -> list[str]:
    notes = []
    if streams.normed:
        notes.append(
            f"{len(streams.normed)} layers return a normalised stream (post-norm host); it was read before that norm."
        )
    largest = int(streams.norms[:, : max(CHAT_CANDIDATES) + 1].mean(0).argmax())
    if not chosen and largest not in streams.candidates:
        notes.append(
            f"Position {largest} has a larger norm than the candidate positions {streams.candidates}. If the text was "
            "made by a chat template, say chat_template=True."
        )
    return notes


def _add_score(result: SecondarySinks, received: Sequence[Any] | None, streams: Scan) -> None:
    if received is None:
        result.notes.append("No received attention was given, so there is no sink score.")
        return
    columns = streams.kept
    real = [None if x is None else torch.as_tensor(x, dtype=torch.float32).cpu()[..., columns] for x in received]
    result.score = _lists(sink_score(real, result.sinks))
    skipped = [layer for layer, x in enumerate(received) if x is None]
    if skipped:
        result.notes.append(f"Layers {skipped} have no full attention, so they have no sink score.")


def _add_key_value(result: SecondarySinks, reading: Reading, row: int) -> None:
    streams = reading.rows[row]
    for i, kind in enumerate(("key", "value") if reading.key_value else ()):
        table = torch.full_like(streams.norms, torch.nan)
        for layer, norms in (reading.key_value or {}).items():
            if 0 <= layer < table.shape[0] and norms[i].shape[1] > int(streams.kept.max()):
                table[layer] = norms[i][row if norms[i].shape[0] > 1 else 0, streams.kept]
        result.norms[kind] = _lists(group_profile(table, result.sinks))


def _add_origins(
    model: nn.Module,
    reading: Reading,
    ids: Tensor,
    attention_mask: Tensor | None,
    results: Sequence[SecondarySinks],
    tracing: _Tracing,
    progress: Progress | None,
) -> None:
    chosen = {}
    wanted: dict[int, dict[int, list[int]]] = {}
    for row, (result, streams) in enumerate(zip(results, reading.rows, strict=True)):
        if result.primary is None:
            continue
        b = result.primary.position
        result.references["source"] = streams.outputs[result.primary.start][streams.candidates.index(b)]
        chosen[row] = _choose(result, ids[row, streams.kept.to(ids.device)], tracing)
        wanted[row] = {
            layer: streams.kept[[b, *sinks, *others]].tolist() for layer, (sinks, others) in chosen[row].items()
        }
        if not chosen[row]:
            among = "" if tracing.traced is None else f" among the first {tracing.traced}"
            result.notes.append(
                f"No token{among} is labelled {' or '.join(tracing.labels)}, so there are no origins to trace."
            )
        elif tracing.tsne and not has_tsne():
            result.notes.append("t-SNE was left out: it needs scikit-learn (pip install scikit-learn).")
    if not any(wanted.values()):
        return
    end = 1 + max(column for layers in wanted.values() for columns in layers.values() for column in columns)
    mask = None if attention_mask is None else attention_mask.reshape(ids.shape)[:, :end]
    found = gather(model, reading.blocks, ids[:, :end], mask, wanted, progress)
    for row, layers in found.items():
        result = results[row]
        for layer, (sinks, others) in sorted(chosen[row].items()):
            _trace_layer(result, reading.blocks[layer], layer, sinks, others, layers[layer], tracing)
        result.stages = stage_profile(result.origins)


def _choose(
    result: SecondarySinks, ids: Int[Tensor, " tokens"], tracing: _Tracing
) -> dict[int, tuple[list[int], list[int]]]:
    """For each creating layer, a sample of the sinks created there and as many tokens of the same ids never flagged."""
    ids = ids[: tracing.traced]
    starts: dict[int, list[int]] = {}
    for sink in result.sinks.sinks:
        if sink.label in tracing.labels and sink.position < ids.numel():
            starts.setdefault(sink.start, []).append(sink.position)
    flagged = result.sinks.positions()
    taken = [*flagged, *([] if result.primary is None else [result.primary.position])]
    random = np.random.default_rng(tracing.seed)
    chosen = {}
    for layer, positions in sorted(starts.items()):
        if len(positions) > tracing.sample:
            positions = sorted(random.choice(positions, size=tracing.sample, replace=False).tolist())
        chosen[layer] = (positions, contrast_positions(ids, positions, taken, seed=tracing.seed))
    return chosen


def _trace_layer(
    result: SecondarySinks,
    block: Block,
    layer: int,
    sinks: list[int],
    others: list[int],
    stages: Mapping[str, Tensor],
    tracing: _Tracing,
) -> None:
    by_position = {s.position: s.label for s in result.sinks.sinks}
    primary = {stage: values[0] for stage, values in stages.items()}
    written = {stage: values[1 : 1 + len(sinks)] for stage, values in stages.items()}
    contrast = {stage: values[1 + len(sinks) :] for stage, values in stages.items()}
    result.references[layer] = primary["down"]
    names = [by_position[p] for p in sinks]
    result.origins += trace_origins(sinks, names, layer, written, primary, result.references["source"])
    if len(sinks) < FEWEST or len(others) < FEWEST:
        result.notes.append(
            f"Layer {layer}: {len(sinks)} sinks and {len(others)} other tokens of the same ids; the trigger analysis "
            f"needs {FEWEST} of each."
        )
        return
    if block.mlp.why_not_alone:
        result.notes.append(f"Layer {layer}: no probes. {block.mlp.why_not_alone}")
    result.triggers.append(
        analyse_triggers(
            layer,
            sinks,
            others,
            written,
            contrast,
            None if block.mlp.why_not_alone else _runner(block),
            primary["down"],
            seed=tracing.seed,
            scales=tracing.scales,
            tsne=tracing.tsne,
        )
    )


def _runner(block: Block) -> Callable[[Tensor], Tensor]:
    parameter = next(block.module.parameters())
    return lambda x: block.mlp.apply(x.to(parameter.device, parameter.dtype))


def _lists(profile: Mapping[str, Tensor]) -> dict[str, list[float]]:
    return {name: values.tolist() for name, values in profile.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
