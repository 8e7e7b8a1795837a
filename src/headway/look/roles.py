"""Head roles that show in any text, beside what uniform attention would score: previous token, sink mass, streaming,
entropy, distance and the receiver score (formulas: `kernels.head_scores`).

In Thought Anchors (arXiv 2506.19143) a prompt stands before the sentences. In a text without one, the sentence that
holds the sinks would decide every receiver score, so `RoleObserver` leaves out the sentences that begin within the
first S tokens. An unterminated last sentence is kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.stages import Observer
from headway.door.text import BehindFront
from headway.errors import ArgumentError, InterceptionError
from headway.kernels.head_scores import (
    PROXIMITY,
    SINKS,
    WINDOW,
    mass_at,
    mean_distance,
    normalised_entropy,
    receiver_score,
    row_entropy,
    streaming_mass,
)
from headway.kernels.reductions import BLOCK_ELEMENTS, check_spans, reduce_attention
from headway.kernels.rows import Estimate, RowSample, all_rows, estimate_mean
from headway.look.probes import InductionResult, RetrievalResult, refuse_second
from headway.look.result import HeadMetric

ROW_STATISTICS = ("previous_token", "sink_mass", "streaming", "entropy", "normalised_entropy", "distance")
#: The share of keys in front of the text, at sites that have some; everything else is about the keys of the text.
FRONT = "front"


@dataclass(frozen=True, kw_only=True)
class SiteRoles:
    """Role scores of the heads of one site.

    `scores[name]` is an estimate over rows, (heads,), without an interval when all rows were read (`exact`);
    `uniform[name]` is what uniform attention over the visible keys scores. `block_means` and `receiver` are None when
    the text has fewer than twice `proximity` sentences after its sinks."""

    site: Site
    scores: dict[str, Estimate]
    uniform: dict[str, float]
    exact: bool = True
    block_means: Float[Tensor, "heads sentences sentences"] | None = None
    receiver: Float[Tensor, " heads"] | None = None


@dataclass(kw_only=True, eq=False)
class RoleObserver(Observer):
    """Reads the roles that show in any text, from one forward: previous token, sink mass, streaming, entropy, distance
    and (with `sentences`, token ranges) the receiver score.

    Where a layer reads keys in front of its text (`AttentionCall.front`) everything is about the keys of the text:
    shares are shares of the whole row, distance and entropy those of the part within the text, and the share of the
    front is a score of its own, "front".

    `rows` limits the work to sampled query rows; the scores then are estimates with 95 % intervals. `block` is the
    number of query rows whose weights are held at a time. `keep_block_means=False` drops the tables behind the receiver
    score, heads × sentences² per site. Only self-attention has roles; other sites are left out. Each
    site may run once while attached: chunked or cached decoding raises ArgumentError."""

    sentences: Sequence[tuple[int, int]] = ()
    rows: RowSample | None = None
    sinks: int = SINKS
    window: int = WINDOW
    proximity: int = PROXIMITY
    block: int | None = None
    keep_block_means: bool = True
    reads_weights = True
    on_text = True
    _sites: dict[str, SiteRoles] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.window < 1:
            raise ArgumentError(f"sinks, window: got {self.sinks}, {self.window}; expected sinks ≥ 0 and window ≥ 1.")
        if self.block is not None and self.block < 1:
            raise ArgumentError(f"block: got {self.block}, expected at least 1 row.")

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def start(self) -> None:
        self._sites.clear()

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        refuse_second(call, self._sites)
        sample = all_rows(call.queries) if self.rows is None else self.rows
        if sample.total != call.queries or call.offset != 0:
            raise ArgumentError(
                f"rows at {call.site.name}: got {call.queries} query rows on {call.keys} keys for a sample of "
                f"{sample.total}, expected one forward over the whole text. Sample the rows of this text."
            )
        call.check_finite()
        if self.sentences:
            check_spans(self.sentences, call.keys)
        self._sites[call.site.name] = self._read(call, sample)

    def result(self) -> list[SiteRoles]:
        """One entry per site, in the order in which they ran."""
        if not self._sites:
            raise InterceptionError("roles: got no self-attention while attached, expected one forward of the model.")
        return list(self._sites.values())

    def _read(self, call: AttentionCall, sample: RowSample) -> SiteRoles:
        device = call.query.device
        parts: list[dict[str, Tensor]] = []
        uniform_parts: list[dict[str, Tensor]] = []
        first = _first_tokens(call)
        padded = call.padded_rows()
        step = self.block or max(BLOCK_ELEMENTS // max(call.query.shape[0] * call.heads * call.keys, 1), 16)
        call = call.replace(key=call.key.float())
        for begin in range(0, sample.index.numel(), step):
            rows = sample.index[begin : begin + step].to(device)
            dropped = None if padded is None else padded[:, rows]
            found = reduce_attention(
                call.query,
                call.key,
                ("weights", "entropy", "distance"),
                rows=rows,
                block=rows.numel(),
                sinks=call.sinks,
                **call.arguments(),
            )
            visible = call.visible(rows)
            uniform = visible / visible.sum(-1, keepdim=True)
            ahead = call.weighing.seen[:, None, rows] if isinstance(call.weighing, BehindFront) else 0
            parts.append(self._statistics(call, found, rows, visible, first, dropped))
            shares = visible / (visible.sum(-1) + ahead)[..., None]
            even = {"weights": shares, "entropy": row_entropy(uniform), "distance": mean_distance(shares, rows)}
            uniform_parts.append(self._statistics(call, even, rows, visible, first, dropped))
        scores = {name: _over_rows([p[name] for p in parts], sample) for name in parts[0]}
        even_scores = {
            name: float(_over_rows([p[name] for p in uniform_parts], sample).mean.nanmean()) for name in parts[0]
        }
        sentences = [span for span in self.sentences if span[0] >= self.sinks]
        if len(sentences) < 2 * self.proximity:
            return SiteRoles(site=call.site, scores=scores, uniform=even_scores, exact=sample.exact)
        means = _block_means(call, call.query, sentences, sample, padded)
        even_means = self._uniform_block_means(call, sentences, sample, padded)
        receiver = torch.from_numpy(receiver_score(means.numpy(), proximity=self.proximity))
        even_scores["receiver"] = float(receiver_score(even_means.numpy(), proximity=self.proximity)[0])
        return SiteRoles(
            site=call.site,
            scores=scores,
            uniform=even_scores,
            exact=sample.exact,
            block_means=means if self.keep_block_means else None,
            receiver=receiver,
        )

    def _uniform_block_means(
        self, call: AttentionCall, sentences: Sequence[tuple[int, int]], sample: RowSample, padded: Tensor | None
    ) -> Float[Tensor, "1 sentences sentences"]:
        """What uniform attention over the visible keys gives: queries of zero. Sites with the same mask share it."""
        token = ("uniform block means", id(self), id(call.mask), call.causal, call.queries, call.keys)
        scratch = call.forward.scratch
        if token not in scratch:
            plain = call.replace(
                key=call.key[:, :1],
                mask=None if call.mask is None else call.mask[:, :1],
                bias=None,
                softcap=None,
                sinks=None,
                weighing=None,
            )
            means = _block_means(plain, torch.zeros_like(call.query[:, :1]), sentences, sample, padded)
            # The mask is kept with them: an id says which mask it is only as long as the mask lives.
            scratch[token] = call.mask, means
        return scratch[token][1]

    def _statistics(
        self,
        call: AttentionCall,
        found: dict[str, Tensor],
        rows: Tensor,
        visible: Tensor,
        first: Tensor | None,
        dropped: Tensor | None,
    ) -> dict[str, Tensor]:
        """The row statistics of a block, (batch, heads, rows), NaN in rows that do not count."""
        weights = found["weights"]
        sink_mass, streaming = streaming_mass(
            weights.expand(call.query.shape[0], -1, -1, -1),
            rows,
            sinks=self.sinks,
            window=self.window,
            first=first,
            both_sides=not call.causal,
        )
        rows_of = {
            "previous_token": mass_at(weights, rows - 1, visible),
            "sink_mass": sink_mass,
            "streaming": streaming,
            "entropy": found["entropy"],
            "normalised_entropy": normalised_entropy(found["entropy"], visible.sum(-1).float()),
            "distance": found["distance"],
        }
        if isinstance(call.weighing, BehindFront):
            within = weights.sum(-1)
            rows_of["distance"] = found["distance"] / within
            rows_of[FRONT] = (1 - within).clamp(min=0)
        if dropped is None:
            return rows_of
        return {
            name: x.expand(dropped.shape[0], -1, -1).masked_fill(dropped[:, None], torch.nan)
            for name, x in rows_of.items()
        }


def _block_means(
    call: AttentionCall,
    query: Tensor,
    sentences: Sequence[tuple[int, int]],
    sample: RowSample,
    padded: Bool[Tensor, "batch queries"] | None,
) -> Float[Tensor, "heads sentences sentences"]:
    """Mean weight between sentences over the pairs that are visible, averaged over the batch, on the CPU."""
    found = reduce_attention(
        query,
        call.key,
        ("block_mean",),
        spans=sentences,
        rows=None if sample.exact else sample,
        row_valid=None if padded is None else ~padded,
        sinks=call.sinks,
        **call.arguments(),
    )
    return found["block_mean"].nanmean(0).cpu()


def _first_tokens(call: AttentionCall) -> Int[Tensor, " batch"] | None:
    """The first key of each batch entry that is not padding, where the host told."""
    padded = call.padded_rows()
    return None if padded is None else (~padded).int().argmax(-1)


def _over_rows(parts: Sequence[Tensor], sample: RowSample) -> Estimate:
    """The mean over rows, batch entries taken together, on the CPU."""
    return estimate_mean(torch.cat(list(parts), -1).nanmean(0).cpu(), sample)


@dataclass(frozen=True)
class _Role:
    label: str
    unit: str
    description: str
    chance: str = "Uniform attention scores"
    scale: str = "sequential"


ROLES = {
    "previous_token": _Role("Previous token", "share", "Mean weight on the token right before."),
    "sink_mass": _Role("Sink mass", "share", "Mean weight on the first {sinks} tokens."),
    "streaming": _Role("Streaming", "share", "Mean weight on the first {sinks} and the last {window} tokens."),
    "entropy": _Role("Entropy", "nats", "Mean entropy of a row of weights."),
    "normalised_entropy": _Role("Relative entropy", "share", "Mean entropy of a row over the most it could have."),
    "distance": _Role("Distance", "tokens", "Mean distance between a query and what it reads, by weight."),
    FRONT: _Role(
        "Before the text",
        "share",
        "Mean weight on what stands before the text: learned tokens, and what a memory says.",
    ),
    "receiver": _Role(
        "Receiver",
        "kurtosis",
        "How much later sentences single out a few sentences to look back at (Fisher kurtosis).",
        scale="diverging",
    ),
    "retrieval": _Role(
        "Retrieval",
        "share",
        "How often the strongest key is the token to copy, on generated key-value questions.",
        chance="A random key scores",
    ),
    "induction": _Role(
        "Induction",
        "share",
        "Mean weight on the token after the earlier place of the present one, on repeated random tokens.",
    ),
    "duplicate_token": _Role(
        "Duplicate token", "share", "Mean weight on the earlier place of the present token, on repeated random tokens."
    ),
}


def role_metrics(
    roles: Sequence[SiteRoles] = (),
    retrieval: RetrievalResult | None = None,
    induction: InductionResult | None = None,
    *,
    sites: Sequence[Site] | None = None,
    sinks: int = SINKS,
    window: int = WINDOW,
) -> list[HeadMetric]:
    """The scores as head metrics, one grid row per entry of `sites` (by default those of the first argument given).

    Sites without a score, and heads that a site does not have, are NaN; so is a receiver score of −inf. Intervals are
    given where rows were sampled, and over the samples of a task. The description ends with the level of chance.
    `sinks` and `window` only name what the observer was given."""
    measured = retrieval.sites if retrieval is not None else induction.sites if induction is not None else []
    order = list(sites) if sites is not None else [r.site for r in roles] or list(measured)

    def metric(name: str, chance: float, *tables: dict[str, Tensor]) -> HeadMetric:
        role = ROLES[name]
        text = role.description.format(sinks=sinks, window=window)
        text += f" {role.chance} {chance:.3g}." if np.isfinite(chance) else ""
        values, low, high = (
            [_grid(order, t) for t in tables] if len(tables) == 3 else [_grid(order, tables[0]), None, None]
        )
        return HeadMetric(name, role.label, "roles", role.unit, text, values or [], low, high, role.scale)

    metrics = []
    bounds = ("mean",) if all(r.exact for r in roles) else ("mean", "low", "high")
    for name in (*ROW_STATISTICS, FRONT):
        having = [r for r in roles if name in r.scores]
        if having:
            tables = [{r.site.name: getattr(r.scores[name], bound) for r in having} for bound in bounds]
            metrics.append(metric(name, float(np.mean([r.uniform[name] for r in having])), *tables))
    received = {r.site.name: r.receiver for r in roles if r.receiver is not None}
    if received:
        chances = [r.uniform["receiver"] for r in roles if r.receiver is not None]
        metrics.append(metric("receiver", float(np.mean(chances)), received))
    if retrieval is not None:
        metrics.append(metric("retrieval", retrieval.chance, *_named(retrieval.sites, retrieval.estimates())))
    if induction is not None:
        for which, name in enumerate(("induction", "duplicate_token")):
            metrics.append(metric(name, induction.chance, *_named(induction.sites, induction.estimates(which))))
    return metrics


def _named(sites: Sequence[Site], found: Sequence[Estimate]) -> list[dict[str, Tensor]]:
    """Mean, low and high by site."""
    return [
        {site.name: getattr(estimate, bound) for site, estimate in zip(sites, found, strict=True)}
        for bound in ("mean", "low", "high")
    ]


def _grid(order: Sequence[Site], tables: dict[str, Tensor]) -> list[list[float]]:
    """Layer × head, finite or NaN."""
    heads = max((site.heads for site in order), default=0)
    rows = []
    for site in order:
        row = [float("nan")] * heads
        for head, value in enumerate(tables[site.name].tolist() if site.name in tables else ()):
            row[head] = value if np.isfinite(value) else float("nan")
        rows.append(row)
    return rows
