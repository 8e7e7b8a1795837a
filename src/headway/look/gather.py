"""Reads what every head of a model does on one text: a few forwards under the door, numbers kept, never whole maps."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door import AttentionCall, Observer, Site, observe
from headway.errors import ArgumentError, HeadwayError, HostError
from headway.hosts import starts_with_special
from headway.kernels.reductions import reduce_attention
from headway.kernels.rows import RowSample, stratified_rows
from headway.look.maps import MapObserver
from headway.look.probes import InductionResult, RetrievalResult, measure_induction, measure_retrieval
from headway.look.result import HeadMap
from headway.look.roles import RoleObserver, SiteRoles
from headway.methods.long_context.tappa import HeadPatterns, PatternObserver, PatternProfile, classify
from headway.methods.sinks.secondary_sinks import (
    ALIGNED,
    SecondarySinks,
    analyse,
    find_structure,
    read_streams,
    rescale_writes,
)
from headway.methods.sinks.sink_emergence import SinkMeasurement, alpha_from_received, measure_sinks
from headway.progress import Tell, silent
from headway.tasks.copying import ordinary_ids
from headway.tasks.sentences import piece_offsets, sentence_spans

#: Sequences of 64 tokens for the sink rates; the paper takes 100, which is as many again as the default text has.
SINK_SEQUENCES = 32
SINK_LENGTH = 64
#: Tokens from which an ordinary look samples its query rows, and how many it then reads.
SAMPLE_FROM = 8192
SAMPLED_ROWS = 1024
#: Tokens in which sinks of a sampled look are traced to the MLPs that wrote them, and of which its maps are drawn: both
#: need a further forward, whose cost would grow with the square of the text.
TRACED_TOKENS = 4096
MAP_TOKENS = 8192
#: Tokens of the text on which the norm intervention on secondary sinks runs, and the norms it tries, as shares of the
#: measured one.
INTERVENTION_TOKENS = 512
INTERVENTION_SHARES = (0.0, 0.5, 1.0, 2.0)
PATTERN_ROWS = 512


@dataclass
class Reading:
    """Everything that was read, before it is put into words. `sites` are the self-attention sites of the host's main
    stack; a list that runs over layers follows them, with None where a layer was left out."""

    sites: list[Site]
    ids: Int[Tensor, "1 tokens"]
    pieces: list[str]
    sample: RowSample | None
    received: list[Float[Tensor, "heads tokens"] | None]
    roles: list[SiteRoles]
    profiles: list[PatternProfile]
    patterns: list[HeadPatterns]
    sinks: SinkMeasurement | None = None
    secondary: list[SecondarySinks] = field(default_factory=list)
    intervention: list[dict[str, float]] = field(default_factory=list)
    left_out: str = ""
    retrieval: RetrievalResult | None = None
    induction: InductionResult | None = None
    maps: list[HeadMap] = field(default_factory=list)
    streams: Streams = field(default_factory=lambda: Streams())
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def telling(self) -> SecondarySinks | None:
        """The analysis that found secondary sinks, else the one of the primary's own range."""
        return next((s for s in self.secondary if s.sinks.positions("secondary")), next(iter(self.secondary), None))


@dataclass
class Streams:
    """The residual streams of the forward over the text, or why they could not be read."""

    found: Any = None
    error: HostError | None = None


@contextmanager
def _streams_too(model: nn.Module, ids: Tensor) -> Iterator[Streams]:
    """Reads the residual streams of the one forward inside; a host without readable blocks only leaves an error."""
    streams = Streams()
    try:
        find_structure(model)
    except HostError as error:
        streams.error = error
        yield streams
        return
    try:
        with read_streams(model, ids) as streams.found:
            yield streams
    except HostError as error:
        streams.error = error


class ReceivedMass(Observer):
    """The mass each token receives per query that can see it, by head."""

    reads_weights = True
    on_text = True

    def __init__(self, sample: RowSample | None) -> None:
        self.sample = sample
        self.start()

    def start(self) -> None:
        self.found: dict[str, Tensor] = {}

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        reduced = reduce_attention(
            call.query,
            call.key,
            ("received", "visible"),
            sinks=call.sinks,
            rows=self.sample,
            workspace=call.forward.scratch,
            **call.arguments(),
        )
        self.found[call.site.name] = alpha_from_received(reduced["received"], reduced["visible"])[0].cpu()

    def result(self) -> dict[str, Float[Tensor, "heads tokens"]]:
        return self.found


def read(
    model: nn.Module,
    tokenizer: Any,
    ids: Int[Tensor, "1 tokens"],
    *,
    rows: int | None = None,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    progress: Tell | None = None,
) -> Reading:
    """All numbers of a look. What a host cannot give (no next-token logits, no MLP to be found) becomes a note."""
    tell = progress or silent
    device = next(model.parameters()).device
    ids = ids.to(device)
    tokens = ids.shape[1]
    if rows is None and tokens > SAMPLE_FROM:
        rows = SAMPLED_ROWS
    sample = (
        None if rows is None or rows >= tokens else stratified_rows(tokens, rows, torch.Generator().manual_seed(seed))
    )
    pieces = [tokenizer.decode([token]) for token in ids[0].tolist()]
    reading = _read_text(model, ids, pieces, sample, layers, tell)
    _timed(reading, "sinks", lambda: _read_sinks(reading, model, tokenizer, tell))
    _timed(reading, "secondary sinks", lambda: _read_secondary(reading, model, ids, tell))
    _timed(reading, "roles", lambda: _read_roles(reading, model, tokenizer, seed, tell))
    return reading


def read_maps(
    reading: Reading, model: nn.Module, heads: Sequence[tuple[int, int]], progress: Tell | None = None
) -> None:
    """Draws the maps of some (layer, head) pairs, by one more forward."""
    if not heads:
        return
    if progress is not None:
        progress("drawing maps", 0, 1)
    names = {layer: site.name for layer, site in enumerate(reading.sites)}
    observer = MapObserver(heads=tuple((reading.sites[layer].layer, head) for layer, head in heads))
    ids = reading.ids
    if reading.sample is not None and ids.shape[1] > MAP_TOKENS:
        ids = ids[:, :MAP_TOKENS]
        reading.notes.append(f"The maps show the first {MAP_TOKENS} tokens.")
    with torch.no_grad(), observe(model, observer, sites=sorted({names[layer] for layer, _ in heads})):
        _forward(model, ids)
    reading.maps = observer.result()
    if progress is not None:
        progress("drawing maps", 1, 1)


def _timed(reading: Reading, what: str, work: Callable[[], None]) -> None:
    start = time.perf_counter()
    try:
        work()
    except HeadwayError as error:
        reading.notes.append(f"{what[0].upper()}{what[1:]} were not measured: {error}")
    reading.seconds[what] = time.perf_counter() - start


def _read_text(
    model: nn.Module,
    ids: Tensor,
    pieces: list[str],
    sample: RowSample | None,
    layers: Sequence[int] | None,
    tell: Tell,
) -> Reading:
    """One forward over the text with every observer that needs no task of its own."""
    start = time.perf_counter()
    text, offsets = piece_offsets(pieces)
    received = ReceivedMass(sample)
    roles = RoleObserver(sentences=sentence_spans(text, offsets), rows=sample, keep_block_means=False)
    patterns = PatternObserver.of(model, max_rows=PATTERN_ROWS)
    ticker = _Ticker(tell)
    with (
        torch.no_grad(),
        observe(model, received, roles, patterns, ticker, layers=layers) as handle,
        _streams_too(model, ids) as streams,
    ):
        everything = handle._door.sites.values() if handle._door is not None else ()
        sites, note = main_stack(list(everything))
        ticker.total = len(handle.sites)
        _forward(model, ids)
    names = [site.name for site in sites]
    profiles = sorted((p for p in patterns.result() if p.site in names), key=lambda p: names.index(p.site))
    reading = Reading(
        sites=sites,
        ids=ids,
        pieces=pieces,
        sample=sample,
        received=[received.found.get(name) for name in names],
        roles=[r for r in roles.result() if r.site.name in names],
        profiles=profiles,
        patterns=classify(profiles) if profiles else [],
        streams=streams,
        notes=[note] if note else [],
    )
    reading.seconds["text"] = time.perf_counter() - start
    return reading


def main_stack(sites: Sequence[Site]) -> tuple[list[Site], str]:
    """The self-attention sites of the longest stack of a host (a decoder's when two are as long), and a note when
    others are left out. Raises ArgumentError for a host without self-attention."""
    stacks: dict[str, list[Site]] = {}
    for site in sites:
        if site.kind == "self":
            stacks.setdefault(re.split(r"\.\d+", site.name)[0], []).append(site)
    if not stacks:
        raise ArgumentError("model: got no self-attention site, expected at least one. Look at a decoder or encoder.")
    best = max(stacks, key=lambda name: (len(stacks[name]), "decoder" in name))
    others = [name for name in stacks if name != best]
    note = f"Only the stack {best} is shown; the host also attends in {', '.join(others)}." if others else ""
    return stacks[best], note


class _Ticker(Observer):
    """Tells the progress of one forward by the sites it has passed."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self.total = 0
        self.start()

    def start(self) -> None:
        self.done = 0

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        self.done += 1
        self.tell("reading the text", self.done, max(self.total, self.done))


def _read_sinks(reading: Reading, model: nn.Module, tokenizer: Any, tell: Tell) -> None:
    ids = reading.ids
    count = min(ids.shape[1] // SINK_LENGTH, SINK_SEQUENCES)
    length = SINK_LENGTH if count else None
    sequences = ids[0, : count * SINK_LENGTH].view(count, SINK_LENGTH) if count else ids
    if not count:
        reading.notes.append(
            f"Sink rates come from one sequence of {ids.shape[1]} tokens; the measure is meant for {SINK_LENGTH} "
            "or more."
        )
    reading.sinks = measure_sinks(
        model,
        sequences,
        length=length,
        special_ids=set(tokenizer.all_special_ids),
        progress=lambda done, total: tell("measuring sinks", done, total),
    )


def _read_secondary(reading: Reading, model: nn.Module, ids: Tensor, tell: Tell) -> None:
    """The analysis in the primary's own range and, where that has no secondary sinks, in the further ranges in which
    the primary is massive; one forward serves all of them."""
    received = [None if r is None else r.mean(0) for r in reading.received]

    def progress(done: int, total: int, what: str) -> None:
        tell(f"secondary sinks: {what}", done, total)

    streams = reading.streams
    if streams.error is not None:
        raise streams.error
    options = {"received": received, "reading": streams.found, "progress": progress}
    if reading.sample is not None and ids.shape[1] > TRACED_TOKENS:
        options["traced"] = TRACED_TOKENS
        reading.notes.append(f"Secondary sinks were traced to their origin in the first {TRACED_TOKENS} tokens.")
    found = analyse(model, ids, **options)
    reading.secondary = [found]
    if not found.sinks.positions("secondary"):
        for further in found.other_ranges:
            if further.primary is not None and further.positions("secondary"):
                span = (further.primary.start, further.primary.end)
                reading.secondary.append(analyse(model, ids, span=span, **options))
    _try_norms(reading, model, ids[:, :INTERVENTION_TOKENS], tell)


def _try_norms(reading: Reading, model: nn.Module, ids: Tensor, tell: Tell) -> None:
    """The norm intervention at the layer that writes most secondary sinks along the primary's direction."""
    found = reading.telling
    if found is None or found.primary is None or not found.origins:
        return
    along = [o for o in found.origins if abs(o.cosines["down"]) > ALIGNED and o.layer in found.references]
    aligned = Counter(o.layer for o in along)
    if not aligned:
        best = max(abs(o.cosines["down"]) for o in found.origins)
        reading.left_out = (
            f"No norm intervention: no MLP writes a secondary sink with a cosine above {ALIGNED} to the primary's "
            f"output (the largest is {best:.3f})."
        )
        return
    layer = aligned.most_common(1)[0][0]
    origins = [o for o in along if o.layer == layer]
    usual = sum(o.write_norm for o in origins) / len(origins)
    span = (found.primary.start, found.primary.end)
    for turn, share in enumerate(INTERVENTION_SHARES):
        tell("secondary sinks: norm intervention", turn, len(INTERVENTION_SHARES))
        reading.intervention.append(_intervene(model, ids, layer, found, span, usual * share))


def _intervene(
    model: nn.Module, ids: Tensor, layer: int, found: SecondarySinks, span: tuple[int, int], norm: float
) -> dict[str, float]:
    """Sink score and lifetime of the tokens that one layer writes along the primary's direction, at one norm."""
    received = ReceivedMass(None)
    with rescale_writes(model, layer, found.references[layer], norm) as touched, torch.no_grad():
        with (
            observe(model, received),
            read_streams(model, ids, entropy=None, key_value=False) as streams,
        ):
            _forward(model, ids)
        positions = touched.positions
        after = analyse(model, ids, reading=streams, entropy=None, key_value=False, span=span)
    later = [alpha.mean(0) for alpha in received.found.values()][layer + 1 : span[1]]
    score = torch.stack(later)[:, positions].nanmean() if positions and later else torch.tensor(torch.nan)
    lives = {s.position: s.lifetime for s in after.sinks.sinks}
    lifetime = sum(lives.get(p, 0) for p in positions) / max(len(positions), 1)
    return {"norm": norm, "score": float(score), "lifetime": lifetime, "tokens": len(positions)}


def _read_roles(reading: Reading, model: nn.Module, tokenizer: Any, seed: int, tell: Tell) -> None:
    reading.retrieval = measure_retrieval(
        model, tokenizer, seed=seed, progress=lambda done, total: tell("copy task", done, total)
    )
    warning = reading.retrieval.warning()
    if warning:
        reading.notes.append(warning)
    opening = [int(reading.ids[0, 0])] if starts_with_special(tokenizer, reading.ids) else []
    reading.induction = measure_induction(
        model,
        ordinary_ids(tokenizer),
        prefix=opening,
        seed=seed,
        progress=lambda done, total: tell("repeated tokens", done, total),
    )


def _forward(model: nn.Module, ids: Tensor) -> None:
    """One forward without a cache and, where the host can leave them out, without logits."""
    import inspect

    accepted = inspect.signature(model.forward).parameters
    options = {"use_cache": False, "logits_to_keep": 1}
    model(input_ids=ids, **{name: value for name, value in options.items() if name in accepted})
