"""Head roles: what a head does, as one number per role, each beside what uniform attention would score.

Over query positions i with weights w_ij (keys j):

    previous token     mean_i w_{i,i−1}
    duplicate token    mean_i w_{i,e(i)} ,  e(i) the last earlier place of token i; on repeated random tokens,
    induction          mean_i w_{i,e(i)+1}  rows of the repeat only
    retrieval          |{i : argmax_j w_{p_i−1,j} in V and holds a_i}| / m ; on key-value copies (tasks.copying)
    sink mass          mean_i Σ_{j<S} w_ij
    streaming          mean_i Σ_{j<S or i−j<W} w_ij
    entropy            mean_i −Σ_j w_ij ln w_ij ,  normalised: each row over ln(keys it can see)
    distance           mean_i Σ_j w_ij |i − j|
    receiver           Fisher kurtosis over sentences j of v_j = mean_{i≥j+p} B_ij ,  B_ij the mean weight from sentence
                       i to sentence j

Retrieval: Wu et al., arXiv 2404.15574; the row is the one that predicts the answer token, the answer is teacher-forced.
Streaming: the complement of the "distant mass" that tells DuoAttention's (arXiv 2410.10819) retrieval heads apart.
Receiver: Thought Anchors, arXiv 2506.19143, with p = 4; an unterminated last sentence is kept here. Induction: Olsson
et al., arXiv 2209.11895. All scores are functions of arrays, usable alone; `RoleObserver` and the two `measure_`
functions collect the arrays through the door, block by block.

In Thought Anchors a prompt stands before the sentences. In a text without one, the sentence that holds the sinks would
decide every receiver score, so `RoleObserver` leaves out the sentences that begin within the first S tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.stages import Observer
from headway.errors import ArgumentError, InterceptionError
from headway.kernels.reductions import BLOCK_ELEMENTS, check_spans, reduce_attention
from headway.kernels.rows import Estimate, RowSample, all_rows, estimate_mean
from headway.look.result import HeadMetric
from headway.tasks.copying import CopySample, key_value_copy, repeated_random_tokens

#: Sinks and recent keys of a streaming head: 4 sinks as in StreamingLLM (arXiv 2309.17453), 64 recent keys so that the
#: score still tells heads apart in texts of some hundred tokens (DuoAttention serves with 64 and 256).
SINKS = 4
WINDOW = 64
#: Sentences this near are left out of the receiver score (Thought Anchors, `proximity_ignore`).
PROXIMITY = 4
#: Shorter sentences join their neighbour (Thought Anchors).
SHORTEST_SENTENCE = 10
#: Below this share of answer tokens predicted right, a model does not copy and its retrieval scores mean nothing (Wu et
#: al. keep answers with a ROUGE-1 recall above one half).
LEAST_ACCURACY = 0.5

ROW_STATISTICS = ("previous_token", "sink_mass", "streaming", "entropy", "normalised_entropy", "distance")

Progress = Callable[[int, int], None]


def mass_at(
    weights: Float[Tensor, "batch heads rows keys"],
    targets: Int[Tensor, " rows"],
    visible: Bool[Tensor, "#batch #heads rows keys"] | None = None,
) -> Float[Tensor, "batch heads rows"]:
    """The weight of one key per row. NaN where the target is negative (none) or not visible."""
    column = targets.clamp(min=0)[None, None, :, None]
    found = weights.gather(-1, column.expand(*weights.shape[:2], -1, 1))[..., 0]
    missing = (targets < 0).expand_as(found)
    if visible is not None:
        seen = visible.gather(-1, column.expand(*visible.shape[:2], -1, 1))[..., 0]
        missing = missing | ~seen
    return found.masked_fill(missing, torch.nan)


def earlier_places(ids: Int[Tensor, " tokens"]) -> Int[Tensor, " tokens"]:
    """For every token the last earlier position that holds the same id, −1 where there is none."""
    last: dict[int, int] = {}
    places = []
    for position, token in enumerate(ids.tolist()):
        places.append(last.get(token, -1))
        last[token] = position
    return torch.tensor(places, dtype=torch.long)


def previous_token_score(
    weights: Float[Tensor, "batch heads rows keys"], positions: Int[Tensor, " rows"]
) -> Float[Tensor, "batch heads"]:
    """mean_i w_{i,i−1}; the first position has no previous token and is left out."""
    return mass_at(weights, positions - 1).nanmean(-1)


def duplicate_score(
    weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"], ids: Int[Tensor, " tokens"]
) -> Float[Tensor, "batch heads"]:
    """Mean weight on the last earlier place of the row's own token, over the rows whose token stood before."""
    return mass_at(weights, earlier_places(ids)[rows.cpu()].to(rows.device)).nanmean(-1)


def induction_score(
    weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"], ids: Int[Tensor, " tokens"]
) -> Float[Tensor, "batch heads"]:
    """Mean weight on the token after the last earlier place of the row's own token, over the rows that have one."""
    places = earlier_places(ids)[rows.cpu()].to(rows.device)
    return mass_at(weights, torch.where(places < 0, places, places + 1)).nanmean(-1)


def retrieval_score(
    argmax: Int[Tensor, "*leading answer"],
    ids: Int[Tensor, " tokens"],
    answer: Int[Tensor, " answer"],
    value_span: tuple[int, int],
) -> Float[Tensor, "*leading"]:
    """Hits over answer tokens. `argmax[..., i]` is the most attended key of the row that predicts `answer[i]`; it hits
    when it lies in `value_span` and its token is `answer[i]`."""
    start, stop = value_span
    inside = (argmax >= start) & (argmax < stop)
    held = ids.to(argmax.device)[argmax.clamp(min=0)]
    return (inside & (held == answer.to(argmax.device))).double().mean(-1)


def retrieval_chance(sample: CopySample) -> float:
    """The retrieval score of a head whose arg-max falls on any visible key with equal probability."""
    start, stop = sample.value_span
    holding = (sample.ids[0, start:stop] == sample.answer[:, None]).sum(1)
    return float((holding / (sample.answer_rows + 1)).mean())


def streaming_mass(
    weights: Float[Tensor, "batch heads rows keys"],
    positions: Int[Tensor, " rows"],
    *,
    sinks: int = SINKS,
    window: int = WINDOW,
    first: Int[Tensor, " batch"] | None = None,
    both_sides: bool = False,
) -> tuple[Float[Tensor, "batch heads rows"], Float[Tensor, "batch heads rows"]]:
    """Mass on the first `sinks` keys, and mass on those or the last `window` keys up to the row's own position.

    `first` is the first key that is a token (after left padding). `both_sides` takes the keys closer than `window` on
    either side, for bidirectional hosts."""
    batch, heads, rows, keys = weights.shape
    device = weights.device
    first = torch.zeros(batch, dtype=torch.long, device=device) if first is None else first.to(device)
    gap = torch.arange(1 - window, window if both_sides else 1, device=device)
    sink = (first[:, None] + torch.arange(sinks, device=device))[:, None].expand(-1, rows, -1)
    near = (positions[:, None] + gap).expand(batch, -1, -1)
    columns = torch.cat([sink, near], -1)
    valid = (columns >= 0) & (columns < keys)
    valid[..., sinks:] &= near >= first[:, None, None] + sinks
    index = columns.clamp(0, keys - 1)[:, None].expand(-1, heads, -1, -1)
    found = weights.gather(-1, index) * valid[:, None]
    return found[..., :sinks].sum(-1), found.sum(-1)


def row_entropy(weights: Float[Tensor, "*rows keys"]) -> Float[Tensor, "*rows"]:
    """−Σ_j w_j ln w_j, nats."""
    return torch.special.entr(weights).sum(-1)


def normalised_entropy(
    entropy: Float[Tensor, "batch heads rows"], visible: Float[Tensor, "#batch #heads rows"]
) -> Float[Tensor, "batch heads rows"]:
    """Entropy over ln(visible keys): 1 is uniform attention. NaN where only one key is visible."""
    return torch.where(visible > 1, entropy / visible.clamp(min=2).log(), torch.nan)


def mean_distance(
    weights: Float[Tensor, "batch heads rows keys"], positions: Int[Tensor, " rows"]
) -> Float[Tensor, "batch heads rows"]:
    """Σ_j w_ij |i − j|, tokens."""
    gap = (positions[:, None] - torch.arange(weights.shape[-1], device=weights.device)).abs()
    return torch.linalg.vecdot(weights, gap.to(weights.dtype)[None, None])


def vertical_scores(
    block_means: Float[np.ndarray, "*heads sentences sentences"], *, proximity: int = PROXIMITY, ranks: bool = False
) -> Float[np.ndarray, "*heads sentences"]:
    """v_j = mean of B_ij over the sentences i ≥ j + proximity; NaN for the last `proximity` sentences.

    `ranks` replaces each row by its ranks over its count first, which takes out how weights shrink with depth."""
    from scipy.stats import rankdata

    means = np.array(block_means, dtype=float)
    count = means.shape[-1]
    if proximity < 1 or count <= proximity:
        raise ArgumentError(
            f"proximity: got {proximity} for {count} sentences, expected at least 1 and less than their number. Pass a "
            "longer text."
        )
    means[..., np.triu(np.ones((count, count), dtype=bool), 1 - proximity)] = np.nan
    if ranks:
        known = np.maximum((~np.isnan(means)).sum(-1, keepdims=True), 1)
        means = rankdata(means, axis=-1, nan_policy="omit") / known
    known = ~np.isnan(means)
    total = np.where(known, means, 0.0).sum(-2)
    return np.divide(total, known.sum(-2), out=np.full(total.shape, np.nan), where=known.any(-2))


def receiver_score(
    block_means: Float[np.ndarray, "*heads sentences sentences"], *, proximity: int = PROXIMITY, ranks: bool = False
) -> Float[np.ndarray, "*heads"]:
    """Fisher kurtosis (biased) of the vertical scores: large when later sentences look back at a few. A head that
    looks at all alike has no kurtosis and gets −inf. Raises ArgumentError for fewer than 2 · proximity sentences."""
    from scipy.stats import kurtosis

    means = np.asarray(block_means, dtype=float)
    if means.shape[-1] < 2 * proximity:
        raise ArgumentError(
            f"block_means: got {means.shape[-1]} sentences, expected at least {2 * proximity}, twice the proximity. "
            "Pass a longer text, or leave the receiver score out."
        )
    scores = vertical_scores(means, proximity=proximity, ranks=ranks)
    spread = np.nanmax(scores, -1) - np.nanmin(scores, -1)
    flat = spread <= 1e-7 * np.abs(np.nanmax(scores, -1))
    varied = np.where(flat[..., None], np.arange(scores.shape[-1]), scores)
    return np.where(flat, -np.inf, kurtosis(varied, axis=-1, fisher=True, bias=True, nan_policy="omit"))


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Character ranges of the sentences, which join to the whole text.

    A sentence ends at `.`, `?` or `!` before white space, or at a blank line, and takes that white space along. Ones
    shorter than SHORTEST_SENTENCE join the next, the last one the one before. Text after the last mark is kept."""
    ends = [m.end() for m in re.finditer(r"[.?!]\s+|\n[^\S\n]*\n\s*", text)]
    spans: list[tuple[int, int]] = []
    start = 0
    for end in dict.fromkeys([*ends, len(text)]):
        if len(text[start:end].strip()) >= SHORTEST_SENTENCE:
            spans.append((start, end))
            start = end
    if start < len(text):
        spans = [*spans[:-1], (spans[-1][0], len(text))] if spans else [(0, len(text))]
    return spans


def sentence_spans(text: str, offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Token ranges of the sentences of `text`, from the (start, stop) characters of its tokens.

    A token belongs to the sentence of its last character; empty ones (special tokens) to none. Sentences that own no
    token are left out. Raises ArgumentError when the offsets do not run forward through the text."""
    places = [(i, stop - 1) for i, (start, stop) in enumerate(offsets) if stop > start]
    characters = [c for _, c in places]
    if characters != sorted(characters) or (characters and characters[-1] >= len(text)):
        raise ArgumentError(
            "offsets: got character ranges that run backwards or beyond the text, expected those of one text. Pass the "
            "offset_mapping of the tokenizer for this very text, or use piece_offsets."
        )
    spans = []
    for start, stop in split_sentences(text):
        inside = [i for i, c in places if start <= c < stop]
        if inside:
            spans.append((inside[0], inside[-1] + 1))
    return spans


def piece_offsets(pieces: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Text and offsets from the text of each token, for tokenizers without an offset map."""
    ends = np.cumsum([len(p) for p in pieces], dtype=int).tolist()
    return "".join(pieces), list(zip([0, *ends], ends, strict=False))


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

    `rows` limits the work to sampled query rows; the scores then are estimates with 95 % intervals. `block` is the
    number of query rows whose weights are held at a time. Only self-attention has roles; other sites are left out. Each
    site may run once while attached: chunked or cached decoding raises ArgumentError."""

    sentences: Sequence[tuple[int, int]] = ()
    rows: RowSample | None = None
    sinks: int = SINKS
    window: int = WINDOW
    proximity: int = PROXIMITY
    block: int | None = None
    reads_weights = True
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
        _refuse_second(call, self._sites)
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
            parts.append(self._statistics(call, found, rows, visible, first, dropped))
            even = {"weights": uniform, "entropy": row_entropy(uniform), "distance": mean_distance(uniform, rows)}
            uniform_parts.append(self._statistics(call, even, rows, visible, first, dropped))
        scores = {name: _over_rows([p[name] for p in parts], sample) for name in ROW_STATISTICS}
        even_scores = {
            name: float(_over_rows([p[name] for p in uniform_parts], sample).mean.nanmean()) for name in ROW_STATISTICS
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
            block_means=means,
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
            )
            scratch[token] = _block_means(plain, torch.zeros_like(call.query[:, :1]), sentences, sample, padded)
        return scratch[token]

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


@dataclass(frozen=True, kw_only=True)
class RetrievalResult:
    """Retrieval scores on key-value copies. `scores[s]` is (heads,) at `sites[s]`, the mean over samples, and
    `per_sample[s]` (samples, heads). `accuracy` is the share of answer tokens that the model itself predicts, `solved`
    the share of answers predicted whole, `chance` the score of an arg-max that falls anywhere."""

    sites: list[Site]
    scores: list[Float[Tensor, " heads"]]
    per_sample: list[Float[Tensor, "samples heads"]]
    accuracy: float
    solved: float
    chance: float

    @property
    def usable(self) -> bool:
        """Whether the model copies well enough for its scores to mean something."""
        return self.accuracy >= LEAST_ACCURACY

    def halves(self) -> float:
        """Spearman correlation over heads between the scores of even and odd samples; NaN for a single sample."""
        from scipy.stats import spearmanr

        table = torch.cat(self.per_sample, 1).numpy()
        if len(table) < 2:
            return float("nan")
        return float(spearmanr(table[::2].mean(0), table[1::2].mean(0)).statistic)

    def warning(self) -> str | None:
        """What to tell the reader when the scores mean nothing."""
        if self.usable:
            return None
        return (
            f"The model predicts {self.accuracy:.0%} of the answer tokens of the copy task, expected at least "
            f"{LEAST_ACCURACY:.0%}: the model does not solve the copy task, so retrieval scores say nothing."
        )


@dataclass(frozen=True, kw_only=True)
class InductionResult:
    """Scores on repeated random tokens, `induction[s]` and `duplicate[s]` (heads,) at `sites[s]`. `accuracy` is the
    share of repeated tokens that the model predicts, `chance` the score of uniform attention on either."""

    sites: list[Site]
    induction: list[Float[Tensor, " heads"]]
    duplicate: list[Float[Tensor, " heads"]]
    accuracy: float
    chance: float


def measure_retrieval(
    model: torch.nn.Module,
    tokenizer: Any,
    *,
    samples: int = 8,
    records: int = 10,
    demonstrations: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> RetrievalResult:
    """Runs the model on `samples` key-value copies and scores every query head. `progress(done, samples)` is called
    after each. Raises ArgumentError when the model has no next-token logits or too few positions."""
    generator = torch.Generator().manual_seed(seed)
    tasks = [
        key_value_copy(tokenizer, records, generator, demonstrations=demonstrations) for _ in range(_positive(samples))
    ]
    kept: dict[str, list[Tensor]] = {}
    right: list[Tensor] = []
    rows = _Rows("argmax")
    with _under_the_door(model, rows):
        for done, task in enumerate(tasks, 1):
            logits = _logits(model, task.ids, rows, task.answer_rows)
            right.append(logits.argmax(-1).cpu() == task.answer)
            for name, argmax in rows.found.items():
                score = retrieval_score(argmax[0], task.ids[0], task.answer, task.value_span)
                kept.setdefault(name, []).append(score.cpu())
            if progress is not None:
                progress(done, samples)
    per_sample = [torch.stack(tables) for tables in kept.values()]
    return RetrievalResult(
        sites=[rows.sites[name] for name in kept],
        scores=[table.mean(0) for table in per_sample],
        per_sample=per_sample,
        accuracy=float(torch.cat(right).double().mean()),
        solved=float(np.mean([bool(r.all()) for r in right])),
        chance=float(np.mean([retrieval_chance(task) for task in tasks])),
    )


def measure_induction(
    model: torch.nn.Module,
    vocabulary: Sequence[int] | Int[Tensor, " size"],
    *,
    length: int = 128,
    samples: int = 4,
    prefix: Sequence[int] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> InductionResult:
    """Runs the model on `samples` rows of `length` random tokens, each given twice, and scores every head on the rows
    of the second half. `prefix` ids (a BOS token) come first. `progress` as in `measure_retrieval`."""
    generator = torch.Generator().manual_seed(seed)
    second = torch.arange(length, 2 * length) + len(prefix)
    kept: dict[str, list[Tensor]] = {}
    right: list[float] = []
    rows = _Rows("weights")
    with _under_the_door(model, rows):
        for done in range(1, _positive(samples) + 1):
            ids = repeated_random_tokens(vocabulary, length, 2, generator, prefix=prefix)
            predicted = _logits(model, ids, rows, second)[:-1].argmax(-1).cpu()
            right.append(float((predicted == ids[0, second[1:]]).double().mean()))
            for name, weights in rows.found.items():
                scores = [score(weights, rows.rows, ids[0])[0].cpu() for score in (induction_score, duplicate_score)]
                kept.setdefault(name, []).append(torch.stack(scores))
            if progress is not None:
                progress(done, samples)
    means = [torch.stack(tables).double().mean(0) for tables in kept.values()]
    return InductionResult(
        sites=[rows.sites[name] for name in kept],
        induction=[m[0] for m in means],
        duplicate=[m[1] for m in means],
        accuracy=float(np.mean(right)),
        chance=float((1 / (second + 1).double()).mean()),
    )


class _Rows(Observer):
    """One reduction over a few query rows of each forward, per site."""

    reads_weights = True

    def __init__(self, what: str) -> None:
        self.what = what
        self.rows = torch.zeros(0, dtype=torch.long)
        self.sites: dict[str, Site] = {}
        self.found: dict[str, Tensor] = {}

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def turn_to(self, rows: Tensor) -> None:
        self.rows = rows
        self.found = {}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if not call.causal and call.mask is None and call.bias is None:
            raise ArgumentError(
                f"model: got bidirectional attention at {call.site.name}, expected a causal language model. Leave the "
                "retrieval and induction scores out for this host."
            )
        _refuse_second(call, self.found)
        rows = self.rows.to(call.query.device)
        reduced = reduce_attention(call.query, call.key, (self.what,), rows=rows, sinks=call.sinks, **call.arguments())
        self.sites[call.site.name] = call.site
        self.found[call.site.name] = reduced[self.what]


@contextmanager
def _under_the_door(model: torch.nn.Module, rows: _Rows) -> Iterator[None]:
    """The observer attached, no gradients, no dropout; the training mode comes back."""
    from headway.door import observe

    training = [m for m in model.modules() if m.training]
    model.eval()
    try:
        with torch.no_grad(), observe(model, rows):
            yield
    finally:
        for module in training:
            module.training = True


def _logits(model: torch.nn.Module, ids: Tensor, observer: _Rows, rows: Tensor) -> Float[Tensor, "rows vocabulary"]:
    """The model's logits of the given rows, with the observer turned to them."""
    from headway.hosts import positions_of

    positions = positions_of(model)
    if positions is not None and ids.shape[1] > positions:
        raise ArgumentError(
            f"length, records: got a task of {ids.shape[1]} tokens, expected at most {positions}, the positions of the "
            "model. Ask for shorter rows or fewer records."
        )
    device = next(model.parameters()).device
    observer.turn_to(rows.to(device))
    output = model(input_ids=ids.to(device), use_cache=False)
    logits = getattr(output, "logits", None)
    if logits is None or logits.shape[:2] != ids.shape:
        raise ArgumentError(
            f"model: got {type(model).__name__} without next-token logits, expected a causal language model. Load it "
            "with its language-model head."
        )
    if not observer.found:
        raise InterceptionError(
            f"model: got no self-attention of {type(model).__name__} at the door, expected at least one."
        )
    return logits[0, rows.to(logits.device)]


def _positive(samples: int) -> int:
    if samples < 1:
        raise ArgumentError(f"samples: got {samples}, expected at least 1.")
    return samples


def _refuse_second(call: AttentionCall, seen: dict[str, Any]) -> None:
    if call.site.name in seen:
        raise ArgumentError(
            f"forward: got a second one at {call.site.name}, expected one over the whole text. Do not generate or "
            "split the input while this observer is attached."
        )


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
    given where rows were sampled. The description ends with the level of chance. `sinks` and `window` only name what
    the observer was given."""
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
    for name in ROW_STATISTICS if roles else ():
        tables = [{r.site.name: getattr(r.scores[name], bound) for r in roles} for bound in bounds]
        metrics.append(metric(name, float(np.mean([r.uniform[name] for r in roles])), *tables))
    received = {r.site.name: r.receiver for r in roles if r.receiver is not None}
    if received:
        chances = [r.uniform["receiver"] for r in roles if r.receiver is not None]
        metrics.append(metric("receiver", float(np.mean(chances)), received))
    if retrieval is not None:
        metrics.append(metric("retrieval", retrieval.chance, _named(retrieval.sites, retrieval.scores)))
    if induction is not None:
        metrics.append(metric("induction", induction.chance, _named(induction.sites, induction.induction)))
        metrics.append(metric("duplicate_token", induction.chance, _named(induction.sites, induction.duplicate)))
    return metrics


def _named(sites: Sequence[Site], tables: Sequence[Tensor]) -> dict[str, Tensor]:
    return {site.name: table for site, table in zip(sites, tables, strict=True)}


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
