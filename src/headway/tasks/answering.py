"""`answer`: greedy answers to samples through whatever cache a model brings, question-aware or question-blind.

    blind   cache = model(context) ;  logits = model(question | cache) ;  then one token at a time
    aware   logits, cache = model(context question) ;  then one token at a time

The cache is the one that the model returns from its first forward: an attached method that brings its own is measured
with it. Nothing is kept of the logits but the last row of a forward.

A prompt can be fed in chunks (`prefill_chunk`), which bounds memory and shows methods that need the whole prompt at
once. `answer(..., through="generate")` calls `model.generate` instead, for methods that wrap it.
"""

from __future__ import annotations

import copy
import inspect
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, HostError, unknown
from headway.tasks.samples import Sample

THROUGH = ("forward", "generate")


@dataclass(kw_only=True)
class Running:
    """A request under way: its cache, the logits of the last token fed, tokens fed, seconds spent, peak bytes."""

    cache: Any
    logits: Float[Tensor, "rows vocabulary"]
    tokens: int
    seconds: float
    cache_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Answer:
    """What came out of a sample and what it cost.

    `score` is the sample's own, between 0 and 1. `prefill_seconds` is the time to the first token that lies in the
    context (question-blind) or in the whole prompt (aware), `question_seconds` that of the question after it (0 when
    aware). `decode_seconds` is per token, NaN when no forward was needed. `cache_bytes` is the most that the cache held
    after any forward. Through `generate` the whole time is in `prefill_seconds`, other times are NaN and bytes None."""

    sample: Sample
    text: str
    ids: Int[Tensor, " new"]
    score: float
    question_aware: bool
    prefill_seconds: float
    question_seconds: float
    decode_seconds: float
    cache_bytes: int | None

    @property
    def new_tokens(self) -> int:
        return self.ids.numel()


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    sample: Sample,
    *,
    question_aware: bool,
    prefill_chunk: int | None = None,
    full_length: bool = False,
    through: str = "forward",
) -> Answer:
    """A greedy answer of at most `sample.max_new_tokens` tokens.

    Decoding ends at an end-of-sequence token, at a stop string of the sample, and when the score cannot change any more
    (`full_length=True`: only at an end-of-sequence token, for timings). `through="generate"` runs `model.generate` on
    the whole prompt, so it is question-aware and takes no chunk."""
    if through not in THROUGH:
        raise unknown("through", through, THROUGH)
    if through == "generate":
        return _through_generate(model, tokenizer, sample, question_aware, prefill_chunk)
    running = prefill(model, sample.prompt_ids if question_aware else sample.context_ids, chunk=prefill_chunk)
    seconds = running.seconds
    if not question_aware:
        feed(model, running, sample.question_ids, chunk=prefill_chunk)
    return decode(
        model,
        tokenizer,
        sample,
        running,
        question_aware,
        seconds,
        question_seconds=running.seconds - seconds,
        full_length=full_length,
    )


@torch.no_grad()
def decode(
    model: nn.Module,
    tokenizer: Any,
    sample: Sample,
    running: Running,
    question_aware: bool,
    prefill_seconds: float,
    *,
    question_seconds: float,
    full_length: bool = False,
) -> Answer:
    """The greedy answer from a request whose last fed token is that before the answer; `running` goes on with it."""
    ends, start = ending_ids(model, tokenizer), running.seconds
    ids: list[int] = []
    forwards = 0
    while True:
        token = int(running.logits[-1].argmax())
        if token in ends:
            break
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if len(ids) == sample.max_new_tokens or (not full_length and _finished(sample, text)):
            break
        feed(model, running, torch.tensor([[token]]))
        forwards += 1
    text = _cut(sample, tokenizer.decode(ids, skip_special_tokens=True))
    return Answer(
        sample=sample,
        text=text,
        ids=torch.tensor(ids, dtype=torch.long),
        score=sample.score(text),
        question_aware=question_aware,
        prefill_seconds=prefill_seconds,
        question_seconds=question_seconds,
        decode_seconds=(running.seconds - start) / forwards if forwards else math.nan,
        cache_bytes=running.cache_bytes,
    )


@torch.no_grad()
def prefill(model: nn.Module, ids: Int[Tensor, "1 tokens"], *, chunk: int | None = None, rows: int = 1) -> Running:
    """A request from its first tokens on, fed whole or in chunks; keeps the logits of the last `rows` tokens fed."""
    running = Running(cache=None, logits=torch.empty(0, 0), tokens=0, seconds=0.0, cache_bytes=0)
    feed(model, running, ids, chunk=chunk, rows=rows)
    return running


@torch.no_grad()
def feed(
    model: nn.Module, running: Running, ids: Int[Tensor, "1 tokens"], *, chunk: int | None = None, rows: int = 1
) -> None:
    """Feeds more tokens to a request, in place. The last `rows` of them, at most those of the last chunk, leave logits.

    Raises HostError when the model returns no cache."""
    for piece in chunks(ids, chunk):
        start = clock(model)
        running.logits, running.cache = forward(model, piece, running.cache, keep=rows)
        running.seconds += clock(model) - start
        running.tokens += piece.shape[1]
        running.cache_bytes = max(running.cache_bytes, cache_bytes(running.cache))


def forward(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], cache: Any, *, keep: int | None = None
) -> tuple[Float[Tensor, "rows vocabulary"], Any]:
    """Logits of the last `keep` tokens (of all for None) in float32, and the cache that the model returned."""
    options: dict[str, Any] = {"use_cache": True}
    if cache is not None:
        options["past_key_values"] = cache
    if keep is not None and takes_logits_to_keep(model):
        options["logits_to_keep"] = keep
    output = model(input_ids=ids.to(next(model.parameters()).device), **options)
    logits, returned = getattr(output, "logits", None), getattr(output, "past_key_values", None)
    if logits is None or returned is None:
        missing = "logits" if logits is None else "cache (past_key_values)"
        raise HostError(
            f"model: {type(model).__name__} returned no {missing}, expected a causal language model that keeps keys "
            "and values; choose a text model such as smollm2."
        )
    return logits[0, -(keep or logits.shape[1]) :].float(), returned


def takes_logits_to_keep(model: nn.Module) -> bool:
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def chunks(ids: Int[Tensor, "1 tokens"], chunk: int | None) -> Iterator[Int[Tensor, "1 part"]]:
    """The tokens in pieces of `chunk`, the last one ragged; in one piece for None."""
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] == 0:
        raise ArgumentError(f"ids: got shape {tuple(ids.shape)}, expected (1, tokens) with at least one token.")
    if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int) or chunk < 1):
        raise ArgumentError(f"chunk: got {chunk!r}, expected a whole number of at least 1, or None for one piece.")
    yield from ids.split(chunk or ids.shape[1], 1)


def cache_bytes(cache: Any) -> int:
    """Bytes that a cache holds: its own `stored_bytes()` where it has one, else the storage of every tensor in its
    layers, each storage counted once (a view of a larger buffer counts as the buffer)."""
    if hasattr(cache, "stored_bytes"):
        return int(cache.stored_bytes())
    storages: dict[int, int] = {}
    _gather_storages(cache, storages, set())
    return sum(storages.values())


def copy_cache(cache: Any, model: nn.Module) -> Any:
    """A cache that can be continued apart from the first. Tensors are copied; the model, its config and a cache's
    policy are shared."""
    shared = [*model.modules(), *model.parameters(), getattr(model, "config", None), getattr(cache, "policy", None)]
    memo = {id(thing): thing for thing in shared if thing is not None}
    return copy.deepcopy(cache, memo)


def fork(running: Running, model: nn.Module) -> Running:
    """A request that starts where `running` is and leaves it alone; its time and peak go on from there."""
    return Running(
        cache=copy_cache(running.cache, model),
        logits=running.logits,
        tokens=running.tokens,
        seconds=running.seconds,
        cache_bytes=running.cache_bytes,
    )


def ending_ids(model: nn.Module, tokenizer: Any) -> set[int]:
    """Every token at which the model or its tokenizer ends a text."""
    found: set[int] = set()
    for holder in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ends = getattr(holder, "eos_token_id", None)
        found.update(ends if isinstance(ends, list | tuple) else [] if ends is None else [ends])
    return found


def _through_generate(
    model: nn.Module, tokenizer: Any, sample: Sample, question_aware: bool, chunk: int | None
) -> Answer:
    if not question_aware or chunk is not None:
        raise ArgumentError(
            f"through: got 'generate' with question_aware={question_aware} and prefill_chunk={chunk}, expected True "
            "and None: generate takes the whole prompt at once. Use through='forward' for the other mode."
        )
    ends = sorted(ending_ids(model, tokenizer))
    prompt = sample.prompt_ids.to(next(model.parameters()).device)
    start = clock(model)
    generate: Any = model.generate
    out = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=sample.max_new_tokens,
        do_sample=False,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    spent = clock(model) - start
    if not torch.equal(out[:, : prompt.shape[1]], prompt):
        raise HostError(
            f"generate: got {tuple(out.shape)} tokens that do not begin with the prompt's {prompt.shape[1]:,}, "
            "expected the prompt and the new tokens behind it, as transformers returns them."
        )
    new = out[0, prompt.shape[1] :].cpu()
    new = new[[int(token) not in ends for token in new]]
    text = _cut(sample, tokenizer.decode(new, skip_special_tokens=True))
    return Answer(
        sample=sample,
        text=text,
        ids=new,
        score=sample.score(text),
        question_aware=True,
        prefill_seconds=spent,
        question_seconds=math.nan,
        decode_seconds=math.nan,
        cache_bytes=None,
    )


def _finished(sample: Sample, text: str) -> bool:
    return sample.settled(text) or _cut(sample, text) != text


def _cut(sample: Sample, text: str) -> str:
    """The text up to the first stop string that has words before it."""
    for stop in sample.stop:
        lead = len(text) - len(text.lstrip())
        at = text.find(stop, lead)
        text = text if at < 0 else text[:at]
    return text


def clock(model: nn.Module) -> float:
    """Seconds on a monotonic clock, after the model's device has finished what was asked of it."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _gather_storages(thing: Any, storages: dict[int, int], seen: set[int]) -> None:
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, dict):
        for value in thing.values():
            _gather_storages(value, storages, seen)
    elif isinstance(thing, list | tuple):
        for value in thing:
            _gather_storages(value, storages, seen)
    elif hasattr(thing, "layers") or hasattr(thing, "get_mask_sizes") or hasattr(thing, "self_attention_cache"):
        _gather_storages(vars(thing), storages, seen)
