"""Perplexity over long text, in chunks through a cache, so that memory does not grow with the logits.

    nll_i = −ln p(x_i | what the cache gives of x_0 … x_i−1) ,   PPL = exp(mean nll) ,   bits/byte = Σ nll / (ln 2 · B)

B is the number of UTF-8 bytes of the scored tokens. The first token is not predicted. One chunk of n tokens is one
forward of n rows; `chunk=1` streams token by token, as StreamingLLM is measured (Xiao et al., arXiv 2309.17453). The
cache is the one passed, or the one the model returns: a cache policy that is attached decides what it keeps. The
baseline of a stream, windows that are read afresh for every token, stands beside it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.tasks.answering import cache_bytes, clock, forward
from headway.tasks.samples import plain_ids

DEFAULT_CHUNK = 512
#: Rows of logits that are normalised at once: 64 rows of 50,000 float32 are 13 MB beside those the model returned.
LOGIT_ROWS = 64


@dataclass(frozen=True)
class StreamStep:
    """One forward of a stream: tokens fed before it, nll of the tokens it made known (nats), its seconds, and the
    bytes of the cache after it."""

    start: int
    nll: Float[Tensor, " scored"]
    seconds: float
    cache_bytes: int


@dataclass(frozen=True)
class Bucket:
    """Positions [start, stop), how many tokens were scored there, and their perplexity."""

    start: int
    stop: int
    tokens: int
    perplexity: float


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Per-token nll in nats; `positions[i]` is the place in the text of the token it belongs to.

    `text_bytes` is None when no tokenizer was given. `seconds` are those of the forwards, `cache_bytes` the most that
    the cache held after any of them."""

    nll: Float[Tensor, " tokens"]
    positions: Int[Tensor, " tokens"]
    text_bytes: int | None
    seconds: float
    cache_bytes: int

    @property
    def tokens(self) -> int:
        return self.nll.numel()

    @property
    def mean_nll(self) -> float:
        return float(self.nll.double().mean())

    @property
    def perplexity(self) -> float:
        """exp of the mean nll; infinite where that is beyond a float."""
        return _exp(self.mean_nll)

    @property
    def bits_per_byte(self) -> float | None:
        if not self.text_bytes:
            return None
        return float(self.nll.double().sum()) / math.log(2) / self.text_bytes

    def buckets(self, edges: Iterable[int] | None = None) -> list[Bucket]:
        """Perplexity by position. `edges` are inner and outer borders; by default 0, 64, 128, 256, … in doublings."""
        last = int(self.positions[-1]) + 1
        borders = sorted(set(edges)) if edges is not None else [0, *_doublings(64, last)]
        if len(borders) < 2:
            raise ArgumentError(f"edges: got {borders}, expected at least two different positions.")
        found = []
        for start, stop in itertools.pairwise(borders):
            inside = self.nll[(self.positions >= start) & (self.positions < stop)].double()
            if inside.numel():
                found.append(Bucket(start, stop, inside.numel(), _exp(float(inside.mean()))))
        return found

    def block_means(self, block: int = 64) -> Float[Tensor, " blocks"]:
        """Mean nll of consecutive blocks of `block` tokens (a ragged last one is left out): nearly independent draws,
        which neighbouring tokens are not."""
        if block < 1 or self.tokens < 2 * block:
            raise ArgumentError(
                f"block: got {block} for {self.tokens} scored tokens, expected at least two whole blocks. Use a "
                "smaller block or a longer text."
            )
        whole = self.tokens // block * block
        return self.nll[:whole].double().view(-1, block).mean(1)

    def interval(
        self, *, block: int = 64, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> tuple[float, float]:
        """A bootstrap percentile interval of the perplexity over blocks of tokens."""
        import numpy as np
        from scipy.stats import bootstrap

        drawn = bootstrap(
            (self.block_means(block).numpy(),),
            np.mean,
            n_resamples=resamples,
            confidence_level=level,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        return _exp(drawn.confidence_interval.low), _exp(drawn.confidence_interval.high)


def perplexity(
    model: nn.Module,
    ids: Int[Tensor, "1 tokens"],
    *,
    chunk: int = DEFAULT_CHUNK,
    skip: int = 0,
    cache: Any = None,
    tokenizer: Any = None,
) -> Perplexity:
    """Perplexity of the tokens from position max(`skip`, 1) on, given all before them. `chunk=1` streams.

    `tokenizer` counts the bytes of the scored tokens. Raises ArgumentError when nothing is left to score."""
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ArgumentError(f"ids: got shape {tuple(ids.shape)}, expected (1, tokens) with at least two tokens.")
    if not 0 <= skip < ids.shape[1]:
        raise ArgumentError(f"skip: got {skip}, expected 0..{ids.shape[1] - 1} for {ids.shape[1]} tokens.")
    steps = list(stream(model, ids[0], chunk=chunk, cache=cache))
    first = max(skip, 1)
    return Perplexity(
        nll=torch.cat([step.nll for step in steps])[first - 1 :],
        positions=torch.arange(first, ids.shape[1]),
        text_bytes=None if tokenizer is None else text_bytes(tokenizer, ids[0], first),
        seconds=sum(step.seconds for step in steps),
        cache_bytes=max(step.cache_bytes for step in steps),
    )


@torch.no_grad()
def recompute_perplexity(
    model: nn.Module,
    ids: Int[Tensor, "1 tokens"],
    places: Iterable[int],
    *,
    length: int,
    batch: int = 4,
    run: int = 1,
    front: Int[Tensor, " front"] | None = None,
) -> Float[Tensor, " places*run"]:
    """−ln p of the tokens at `places`, each given the `length` tokens before it, read afresh: the sliding window with
    recomputation, O(length²) per token.

    `run` tokens in a row may share one reading, p to p + run − 1 for each place p: their contexts begin at the same
    token and are `length` − ⌊run / 2⌋ tokens long for the first, `length` for the middle one, and so on. That gives
    `run` scores for the price of one, at nearly the context asked for where `run` is small beside `length`.

    `front` are tokens that every context begins with and that count in its `length`, as the one that a model was
    trained to begin with. Raises ArgumentError for a place that has no such context or lies behind the text."""
    chosen = list(places)
    front = ids[0, :0] if front is None else front.to(ids)
    before = length - run // 2 - front.numel()
    if run < 1 or before < 1 or not chosen or min(chosen) < before or max(chosen) + run > ids.shape[1]:
        raise ArgumentError(
            f"places: got {chosen[:3]}… for windows of {length} and runs of {run} in {ids.shape[1]} tokens, expected "
            f"positions from {max(before, 1)} to {ids.shape[1] - run}, and runs of at least 1 that leave a window."
        )
    found = []
    for start in range(0, len(chosen), batch):
        some = chosen[start : start + batch]
        windows = torch.stack([torch.cat([front, ids[0, place - before : place + run - 1]]) for place in some])
        targets = torch.stack([ids[0, place : place + run] for place in some])
        logits = model(input_ids=windows, use_cache=False, logits_to_keep=run).logits[:, -run:]
        found.append(negative_log_likelihood(logits.flatten(0, 1), targets.flatten()))
    return torch.cat(found)


@torch.no_grad()
def stream(model: nn.Module, ids: Iterable[int], *, chunk: int = 1, cache: Any = None) -> Iterator[StreamStep]:
    """Feeds a text of any length chunk by chunk and yields what each forward made known.

    `ids` may be an iterator that never ends. Each token is scored once, by the forward after which it is known: the
    first of a chunk from the last row of the chunk before. Nothing grows but what the cache keeps."""
    if isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1:
        raise ArgumentError(f"chunk: got {chunk!r}, expected a whole number of at least 1.")
    last: Tensor | None = None
    start = 0
    for piece in _pieces(ids, chunk):
        began = clock(model)
        logits, cache = forward(model, piece[None], cache)
        seconds = clock(model) - began
        known = [] if last is None else [negative_log_likelihood(last, piece[:1])]
        known.append(negative_log_likelihood(logits[:-1], piece[1:]))
        last = logits[-1:].clone()
        del logits
        yield StreamStep(start, torch.cat(known), seconds, cache_bytes(cache))
        start += piece.numel()


def negative_log_likelihood(
    logits: Float[Tensor, "rows vocabulary"], targets: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """−ln softmax(logits)[target] of each row, in float32 on the CPU, LOGIT_ROWS at a time."""
    found = [torch.empty(0)]
    for rows, wanted in zip(logits.split(LOGIT_ROWS), targets.to(logits.device).split(LOGIT_ROWS), strict=True):
        rows = rows.float()
        found.append((rows.logsumexp(-1) - rows.gather(1, wanted[:, None])[:, 0]).cpu())
    return torch.cat(found)


def text_bytes(tokenizer: Any, ids: Int[Tensor, " tokens"], first: int = 1) -> int:
    """UTF-8 bytes that the tokens from `first` on add to the text of those before them."""
    whole = tokenizer.decode(ids, skip_special_tokens=True)
    before = tokenizer.decode(ids[:first], skip_special_tokens=True)
    return len(whole.encode()) - len(before.encode())


def stream_ids(tokenizer: Any, texts: Iterable[str]) -> Iterator[int]:
    """The tokens of texts one after the other, without special tokens: a stream of any length."""
    for text in texts:
        yield from plain_ids(tokenizer, text)


def _pieces(ids: Iterable[int], chunk: int) -> Iterator[Int[Tensor, " part"]]:
    if isinstance(ids, Tensor):
        if ids.ndim != 1:
            raise ArgumentError(f"ids: got shape {tuple(ids.shape)}, expected one row of tokens. Pass ids[0].")
        yield from ids.split(chunk) if ids.numel() else ()
        return
    part: list[int] = []
    for token in ids:
        part.append(token)
        if len(part) == chunk:
            yield torch.tensor(part)
            part = []
    if part:
        yield torch.tensor(part)


def _doublings(first: int, last: int) -> list[int]:
    edges = [first]
    while edges[-1] < last:
        edges.append(edges[-1] * 2)
    return edges


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
