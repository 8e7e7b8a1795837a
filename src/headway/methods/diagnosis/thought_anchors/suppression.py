"""The causal matrix: what every later sentence's predictions lose when attention to one sentence is blocked.

    k_jt = KL( softmax(z_t / τ) ‖ softmax(z_t^(j) / τ) )        the prediction of token t, with sentence j hidden
    R_ij = mean over tokens t of s_i of ln(k_jt + 1e-9)           i > j
    E_ij = R_ij − mean over j' < i of R_ij'                       rows sum to zero

Paper: Thought Anchors, arXiv 2506.19143. What differs from the released code, and why:

- The divergence is over the whole vocabulary. Kept top-p entries with a missing one at −1e9 give KL near 1e9; the
  `baseline="top_p"` form here puts everything that is not kept into one event instead, which is a lower bound.
- Only rows behind the sentence are blocked. Blocking its own rows too leaves rows at the start without any key, whose
  softmax then spreads over the future.
- The prediction of token t is made at row t − 1, and the last token counts. The first token behind s_j is predicted by
  a row of s_j itself, which is not blocked: it says nothing about j and is left out of the mean.
- Rows before the end of s_j cannot change. They are computed once, and each sentence runs from there on: sentences of
  equal length cost about half a forward each.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door import SuppressBlocks, use
from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, HostError, unknown

log = logging.getLogger(__name__)
Span = tuple[int, int]
Head = tuple[int, int]
#: Sampling temperature of the paper, at which distributions are compared.
TEMPERATURE = 0.6
#: Added before the logarithm (the released code).
FLOOR = 1e-9
#: The released code keeps this much of each distribution, in at most so many entries.
TOP_P, TOP_ENTRIES = 0.9999, 100
#: Entries of logits handled at once.
CHUNK = 16_000_000
#: Logits of two ways to read one text may differ by this much of the largest: rounding of bfloat16 stays below it.
APART = 0.02
#: Baseline distributions larger than this are refused; `baseline="top_p"` needs a few hundred numbers a token.
BASELINE_BYTES = 4 * 2**30


class Store(Protocol):
    """Where rows of the matrix are kept by sentence; a dictionary will do."""

    def get(self, sentence: int, /) -> np.ndarray | None: ...

    def __setitem__(self, sentence: int, effects: np.ndarray, /) -> None: ...


@dataclass(frozen=True)
class Suppression:
    """`tokens[j, t]` is the effect of hiding sentence j on the prediction of token t in nats, NaN where it cannot have
    one; `raw` R and `normalised` E as above, NaN on and above the diagonal. `forwards` is the work in whole forward
    passes, rows computed over rows of the text; `reused` whether the prefix came from the cache of one pass."""

    tokens: Float[np.ndarray, "sentences tokens"]
    raw: Float[np.ndarray, "sentences sentences"]
    normalised: Float[np.ndarray, "sentences sentences"]
    forwards: float
    reused: bool


def suppression_matrix(
    model: nn.Module,
    ids: Int[Tensor, "1 tokens"],
    spans: Sequence[Span],
    *,
    temperature: float = TEMPERATURE,
    heads: Sequence[Head] | None = None,
    baseline: str = "full",
    reuse_prefix: bool = True,
    store: Store | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Suppression:
    """The matrix of a causal language model for the sentences at token ranges `spans`.

    heads: hides the sentence from these (layer, head) pairs alone; None hides it everywhere. baseline: "full", or
    "top_p" to keep little of each distribution. reuse_prefix: False runs every sentence from the first token on. store:
    rows of `tokens` by sentence, read and filled, so that an interrupted run goes on. progress: called with (done,
    total).

    Raises ArgumentError for spans that are empty, out of order or beyond the text, and for a text of several rows."""
    _check(model, ids, spans, temperature, baseline)
    length = ids.shape[1]
    rows = {} if store is None else {j: store.get(j) for j in range(len(spans))}
    kept = {j: row for j, row in rows.items() if row is not None}
    missing = [j for j in range(len(spans)) if j not in kept and spans[j][1] < length]
    work, reused = 0.0, False
    with torch.no_grad(), evaluating(model), use(model):
        if missing:
            before = _Baseline(model, ids, temperature, baseline)
            work += length
            starts = _Prefixes(model, ids, before.cache, before.last) if reuse_prefix else None
            reused = starts is not None and starts.sound
            work += 0 if starts is None else starts.rows
            starts = starts if reused else None
            for done, (j, cache) in enumerate(_with_caches(starts, [(j, spans[j][1]) for j in missing])):
                if progress is not None:
                    progress(done, len(missing))
                first = spans[j][1]
                logits = _suppressed(model, ids, spans[j], cache, heads)
                effect = np.full(length, np.nan)
                effect[first + 1 :] = before.divergence(logits[:-1], first)
                kept[j] = effect
                if store is not None:
                    store[j] = effect
                work += length - first if reused else length
            work += starts.rows - starts.tried if starts is not None else 0
    tokens = np.stack([kept.get(j, np.full(length, np.nan)) for j in range(len(spans))])
    raw = sentence_effects(tokens, spans)
    return Suppression(tokens, raw, row_normalised(raw), work / length, reused)


def sentence_effects(
    tokens: Float[np.ndarray, "sentences tokens"], spans: Sequence[Span]
) -> Float[np.ndarray, "sentences sentences"]:
    """R: row i the sentence that is affected, column j the one that was hidden; NaN for j ≥ i and where no token of
    s_i is predicted from behind s_j."""
    count = len(spans)
    raw = np.full((count, count), np.nan)
    logs = np.log(tokens + FLOOR)
    for i, (start, stop) in enumerate(spans):
        for j in range(i):
            inside = logs[j, start:stop]
            if np.isfinite(inside).any():
                raw[i, j] = np.nanmean(inside)
    return raw


def row_normalised(raw: Float[np.ndarray, "n n"]) -> Float[np.ndarray, "n n"]:
    """Each row minus its mean over the entries it has."""
    known = np.isfinite(raw)
    mean = np.where(known, raw, 0.0).sum(1) / np.maximum(known.sum(1), 1)
    return raw - mean[:, None]


def divergence(
    before: Float[Tensor, "tokens words"], after: Float[Tensor, "tokens words"], *, temperature: float = TEMPERATURE
) -> Float[Tensor, " tokens"]:
    """KL( softmax(before / τ) ‖ softmax(after / τ) ) of logits over the whole vocabulary, in nats, never below 0."""
    p = torch.log_softmax(before.float() / temperature, -1)
    q = torch.log_softmax(after.float() / temperature, -1)
    return (p.exp() * (p - q)).sum(-1).clamp(min=0)


class _Baseline:
    """One forward of the whole text: its cache, and its distributions at the temperature."""

    def __init__(self, model: nn.Module, ids: Tensor, temperature: float, form: str) -> None:
        output = model(input_ids=ids, use_cache=True)
        self.cache = getattr(output, "past_key_values", None)
        self.temperature = temperature
        logits = output.logits[0]
        self.last = logits[-1].float()
        self.logits = logits if form == "full" else None
        if form == "top_p":
            self.index, self.kept, self.rest = _top_p(logits, temperature)

    def divergence(self, after: Float[Tensor, "rows words"], first: int) -> np.ndarray:
        """The effect at rows `first`, `first` + 1, …, whose logits are now `after`."""
        step = max(1, CHUNK // after.shape[1])
        return np.concatenate(
            [self._chunk(after[i : i + step], first + i).double().numpy(force=True) for i in range(0, len(after), step)]
            or [np.zeros(0)]
        )

    def _chunk(self, after: Tensor, first: int) -> Tensor:
        rows = slice(first, first + len(after))
        if self.logits is not None:
            return divergence(self.logits[rows], after, temperature=self.temperature)
        q = torch.log_softmax(after.float() / self.temperature, -1).gather(1, self.index[rows])
        p = self.kept[rows]
        q = q.masked_fill(p == -torch.inf, -torch.inf)
        rest_p = self.rest[rows]
        rest_q = torch.log1p(-q.exp().sum(-1).clamp(max=1 - 1e-7))
        inside = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0).sum(-1)
        return (inside + rest_p.exp() * (rest_p - rest_q)).clamp(min=0)


def _top_p(logits: Tensor, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The likeliest entries of each row up to TOP_P of the mass: index, log-probability (−inf for unused places), and
    the log-probability of everything else together."""
    count = min(TOP_ENTRIES, logits.shape[1] - 1)
    indices, values, rests = [], [], []
    step = max(1, CHUNK // logits.shape[1])
    for start in range(0, len(logits), step):
        logp = torch.log_softmax(logits[start : start + step].float() / temperature, -1)
        top = logp.topk(count, -1)
        before = top.values.exp().cumsum(-1) - top.values.exp()
        kept = top.values.masked_fill(before >= TOP_P, -torch.inf)
        indices.append(top.indices)
        values.append(kept)
        rests.append(torch.log1p(-kept.exp().sum(-1).clamp(max=1 - 1e-7)))
    return torch.cat(indices), torch.cat(values), torch.cat(rests)


class _Prefixes:
    """Caches of the first tokens of a text: cut from the cache of the whole where all of its layers kept every token,
    else made anew in one walk through the text (`rows` counts that).

    Layers that keep a state in place of tokens may lose it when several tokens go on from it at once. Where there are
    such, the second half of the text goes on from the first, and the last row must be that of the whole (`sound`)."""

    def __init__(self, model: nn.Module, ids: Tensor, cache: Any, last: Tensor) -> None:
        if cache is None or not hasattr(cache, "layers"):
            raise HostError(
                f"model: got {type(model).__name__}, which returned no key-value cache, expected one to start from. "
                "Use reuse_prefix=False."
            )
        from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

        self.model, self.ids, self.cache = model, ids, cache
        self.whole = all(type(x) is DynamicLayer and x.get_seq_length() == ids.shape[1] for x in cache.layers)
        self.rows = self.tried = 0
        plain = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in cache.layers)
        self.sound = plain or self._goes_on(last)

    def _goes_on(self, last: Float[Tensor, " words"]) -> bool:
        from transformers import DynamicCache

        length = self.ids.shape[1]
        running = DynamicCache(config=self.model.config)  # type: ignore[arg-type]
        for part in (self.ids[:, : length // 2], self.ids[:, length // 2 :]):
            logits = self.model(input_ids=part, past_key_values=running, use_cache=True).logits
        self.rows = self.tried = length
        apart = float((logits[0, -1].float() - last).abs().max())
        if apart <= APART * float(last.abs().max()):
            return True
        log.warning(
            "%s goes on from its cache unlike it reads a text at once (logits differ by %.2g), so every sentence runs "
            "from the first token on.",
            type(self.model).__name__,
            apart,
        )
        return False

    def walk(self, lengths: Sequence[int]) -> Iterator[Any]:
        """A cache of the first n tokens for each n, which grow. Each may be written to."""
        from transformers import DynamicCache

        if self.whole:
            for length in lengths:
                pairs = [(x.keys[:, :, :length], x.values[:, :, :length]) for x in self.cache.layers]
                yield DynamicCache(ddp_cache_data=pairs)
            return
        running, at = DynamicCache(config=self.model.config), 0  # type: ignore[arg-type]
        for length in lengths:
            if length > at:
                self.model(input_ids=self.ids[:, at:length], past_key_values=running, use_cache=True)
                self.rows, at = self.rows + length - at, length
            yield copy.deepcopy(running)


def _with_caches(starts: _Prefixes | None, wanted: list[tuple[int, int]]) -> Iterator[tuple[int, Any]]:
    caches = iter([None] * len(wanted)) if starts is None else starts.walk([length for _, length in wanted])
    for j, _ in wanted:
        yield j, next(caches)


def _suppressed(
    model: nn.Module, ids: Tensor, span: Span, cache: Any, heads: Sequence[Head] | None
) -> Float[Tensor, "rows words"]:
    """Logits of the rows behind the sentence while they cannot read it."""
    start, stop = span
    blocks = (((stop, ids.shape[1]), (start, stop)),) if start < stop else ()
    with use(model, SuppressBlocks(blocks=blocks, heads=None if heads is None else tuple(heads))):
        if cache is None:
            return model(input_ids=ids, use_cache=False).logits[0, stop:]
        return model(input_ids=ids[:, stop:], past_key_values=cache, use_cache=True).logits[0]


def _check(model: nn.Module, ids: Tensor, spans: Sequence[Span], temperature: float, baseline: str) -> None:
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ArgumentError(f"ids: got shape {tuple(ids.shape)}, expected (1, tokens): one trace at a time.")
    if baseline not in ("full", "top_p"):
        raise unknown("baseline", baseline, ("full", "top_p"))
    if not temperature > 0:
        raise ArgumentError(f"temperature: got {temperature}, expected a number above 0; the paper compares at 0.6.")
    if not spans:
        raise ArgumentError("spans: got none, expected the token ranges of at least one sentence.")
    before = 0
    for start, stop in spans:
        if not before <= start <= stop <= ids.shape[1]:
            raise ArgumentError(
                f"spans: got [{start}, {stop}) behind {before}, expected ranges in order and apart within the "
                f"{ids.shape[1]} tokens. Use the `tokens` of a Trace."
            )
        before = stop
    words = getattr(model.config.get_text_config(), "vocab_size", 0)  # type: ignore[operator,union-attr]
    size = ids.shape[1] * words * 4
    if baseline == "full" and size > BASELINE_BYTES:
        raise ArgumentError(
            f"baseline: got 'full' for {ids.shape[1]:,} tokens of {words:,} words, {size / 2**30:.1f} GiB of logits; "
            "expected at most 4 GiB. Use baseline='top_p', or a shorter trace."
        )
