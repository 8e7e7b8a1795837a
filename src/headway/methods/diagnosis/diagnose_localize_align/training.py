"""Alignment: preference pairs in, adapters on focal layers out.

    reference (adapters off, once)  →  log π_ref(y_t), attention credit c_t or reward r_t  →  weights w_t
    each step                       →  ρ_t = log π_θ(y_t) − log π_ref(y_t)  →  the loss of `preference`

The reference never changes, so it is read once before training; no second model is held. With a full model instead of
adapters the reference is the model as it stands at the start.

Released settings (arXiv 2509.23188): β 0.1, strength 0.5, rate 1e-5 with a cosine and a tenth of warm-up, one epoch,
batches of 1 accumulated 8 times, 1,024 tokens at most of which 512 prompt. Pairs are drawn there in a way that is not
published; `choose_pair` takes best and worst of K replies that differ by at least half a mark.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.methods.diagnosis.diagnose_localize_align import preference
from headway.methods.diagnosis.diagnose_localize_align.reference import Head, Reference, read_reference
from headway.progress import Tell
from headway.train import Callback, Loss, Run, Trained, train

log = logging.getLogger(__name__)

CUTOFF, PROMPT_CAP = 1024, 512
GAP = 0.5
#: Dropped pairs above this share are warned about.
MANY_DROPPED = 0.05


@dataclass(frozen=True, kw_only=True)
class PreferencePair:
    """Token ids of a prompt and of two answers, and where in the prompt the system's rule stands, [start, stop)."""

    prompt: Int[Tensor, " prompt"]
    chosen: Int[Tensor, " chosen"]
    rejected: Int[Tensor, " rejected"]
    system: tuple[int, int]

    def __post_init__(self) -> None:
        start, stop = self.system
        if not 0 <= start < stop <= self.prompt.numel():
            raise ArgumentError(
                f"system: got the span [{start}, {stop}) in a prompt of {self.prompt.numel()} tokens, expected a range "
                "inside it."
            )


@dataclass(frozen=True, kw_only=True)
class AlignSettings:
    """How to train; the defaults are the released ones. `weights`: uniform (DPO), attention, reward or constant.
    `clip_negative` bounds reward weights below by 0. `steps` replaces the count that one pass over the pairs takes."""

    weights: str = "attention"
    beta: float = preference.BETA
    strength: float = preference.STRENGTH
    largest: float = preference.LARGEST
    clip_negative: bool = False
    rescale: bool = False
    constant: float = 1.0
    learning_rate: float = 1e-5
    weight_decay: float = 0.0
    warmup: float = 0.1
    epochs: int = 1
    steps: int | None = None
    batch: int = 1
    accumulate: int = 8
    cutoff: int = CUTOFF
    prompt_cap: int = PROMPT_CAP
    seed: int = 0

    def __post_init__(self) -> None:
        if self.weights not in preference.MODES:
            raise unknown("weights", self.weights, preference.MODES)
        for name in ("epochs", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ArgumentError(f"{name}: got {getattr(self, name)}, expected at least 1.")
        if not 0 <= self.warmup < 1:
            raise ArgumentError(f"warmup: got {self.warmup}, expected a share of the steps in [0, 1).")
        if not 1 <= self.prompt_cap < self.cutoff:
            raise ArgumentError(
                f"prompt_cap, cutoff: got {self.prompt_cap} and {self.cutoff}, expected 1 ≤ prompt_cap < cutoff."
            )


@dataclass(frozen=True)
class Prepared:
    """Pairs that can be trained on, and how many were dropped for which reason."""

    pairs: tuple[PreferencePair, ...]
    dropped: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Aligned:
    """What an alignment did: the run of training, the dropped pairs, and the share of tokens with negative weight."""

    trained: Trained
    dropped: dict[str, int]
    negative_share: float
    steps: int


def align(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    settings: AlignSettings | None = None,
    *,
    heads: Sequence[Head] = (),
    reward_model: nn.Module | None = None,
    callbacks: Sequence[Callback | Callable[[Run], None]] = (),
    folder: str | Path | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    progress: bool | Tell = False,
) -> Aligned:
    """Trains the parameters of `model` that require gradients (see `add_lora`) on preference pairs.

    `heads` are the focal (layer, head) pairs that credit tokens, for attention weights; `reward_model` a causal model
    with the same vocabulary, for reward weights. `callbacks` as in `headway.train.train`. With `folder` the run keeps
    checkpoints and `resume` goes on.

    Raises ArgumentError when no pair is left, and for weights whose source is missing."""
    chosen = settings or AlignSettings()
    prepared = prepare_pairs(pairs, cutoff=chosen.cutoff, prompt_cap=chosen.prompt_cap)
    references = read_reference(model, prepared.pairs, chosen, heads=heads, reward_model=reward_model)
    count = len(prepared.pairs)
    per_step = chosen.batch * chosen.accumulate
    steps = chosen.steps if chosen.steps is not None else max(1, -(-count * chosen.epochs // per_step))
    order = _Order(count, chosen.batch, chosen.seed)

    def batch(index: int) -> dict[str, Tensor]:
        picked = order.batch(index)
        return collate([prepared.pairs[i] for i in picked], [references[i] for i in picked])

    trained = train(
        model,
        batch,
        steps=steps,
        loss=_Objective(chosen.beta),
        learning_rate=chosen.learning_rate,
        weight_decay=chosen.weight_decay,
        warmup=int(chosen.warmup * steps),
        accumulate=chosen.accumulate,
        seed=chosen.seed,
        callbacks=callbacks,
        folder=folder,
        checkpoint_every=checkpoint_every,
        resume=resume,
        progress=progress,
    )
    weights = torch.cat([side for one in references for side in one.weights])
    return Aligned(trained, prepared.dropped, float((weights < 0).float().mean()), steps)


def prepare_pairs(pairs: Sequence[PreferencePair], *, cutoff: int = CUTOFF, prompt_cap: int = PROMPT_CAP) -> Prepared:
    """Cuts pairs to length and drops those that teach nothing, with a count by reason and a warning above 5 %.

    A long prompt loses what stands behind the system's rule first, and keeps its end; answers are cut at `cutoff`
    tokens in all."""
    kept: list[PreferencePair] = []
    dropped: dict[str, int] = {}
    for pair in pairs:
        cut = _shortened(pair, cutoff, prompt_cap)
        reason = "the rule alone is longer than prompt_cap" if cut is None else _useless(cut)
        if reason:
            dropped[reason] = dropped.get(reason, 0) + 1
        elif cut is not None:
            kept.append(cut)
    if not kept:
        raise ArgumentError(f"pairs: got {len(pairs)}, none of which can be used ({dropped}); expected at least one.")
    lost = sum(dropped.values())
    if lost > MANY_DROPPED * len(pairs):
        log.warning("%d of %d preference pairs were dropped: %s.", lost, len(pairs), dropped)
    return Prepared(tuple(kept), dropped)


def choose_pair(
    replies: Sequence[Int[Tensor, " tokens"]], scores: Sequence[float], *, gap: float = GAP
) -> tuple[Int[Tensor, " chosen"], Int[Tensor, " rejected"]] | None:
    """Best and worst of several replies to one prompt, or None when their scores differ by less than `gap`."""
    if len(replies) != len(scores) or len(replies) < 2:
        raise ArgumentError(f"replies, scores: got {len(replies)} and {len(scores)}, expected as many, at least 2.")
    best, worst = max(range(len(scores)), key=scores.__getitem__), min(range(len(scores)), key=scores.__getitem__)
    return None if scores[best] - scores[worst] < gap else (replies[best], replies[worst])


def collate(pairs: Sequence[PreferencePair], references: Sequence[Reference]) -> dict[str, Tensor]:
    """Chosen answers first, then rejected ones, padded on the right."""
    sequences = [torch.cat([p.prompt, p.chosen]) for p in pairs] + [torch.cat([p.prompt, p.rejected]) for p in pairs]
    starts = [p.prompt.numel() for p in pairs] * 2
    logps = [r.logps[0] for r in references] + [r.logps[1] for r in references]
    weights = [r.weights[0] for r in references] + [r.weights[1] for r in references]
    shape = len(sequences), max(s.numel() for s in sequences)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "response": torch.zeros(shape, dtype=torch.bool),
        "reference": torch.zeros(shape),
        "weights": torch.zeros(shape),
    }
    for row, (ids, start) in enumerate(zip(sequences, starts, strict=True)):
        stop = ids.numel()
        batch["input_ids"][row, :stop] = ids
        batch["attention_mask"][row, :stop] = 1
        batch["response"][row, start:stop] = True
        batch["reference"][row, start:stop] = logps[row]
        batch["weights"][row, start:stop] = weights[row]
    return batch


class _Objective:
    """The loss of a batch, for the training loop."""

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def __call__(self, model: nn.Module, batch: Any) -> Loss:
        response = batch["response"].bool()
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
        ratios = (preference.token_logps(logits, batch["input_ids"], response) - batch["reference"]) * response
        (chosen, rejected), (up, down) = ratios.chunk(2), batch["weights"].chunk(2)
        found = preference.preference_loss(chosen, rejected, up, down, beta=self.beta)
        return Loss(found.loss, chosen.shape[0], found.metrics())


class _Order:
    """Which pairs make batch number i: every epoch its own permutation, a function of the seed alone."""

    def __init__(self, count: int, batch: int, seed: int) -> None:
        self.count, self.size, self.seed = count, batch, seed

    def batch(self, index: int) -> list[int]:
        places = range(index * self.size, (index + 1) * self.size)
        return [self._epoch(place // self.count)[place % self.count] for place in places]

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.count, generator=generator).tolist()


def _shortened(pair: PreferencePair, cutoff: int, prompt_cap: int) -> PreferencePair | None:
    prompt = pair.prompt
    if prompt.numel() > prompt_cap:
        stop = pair.system[1]
        if stop >= prompt_cap:
            return None
        prompt = torch.cat([prompt[:stop], prompt[prompt.numel() - (prompt_cap - stop) :]])
    room = cutoff - prompt.numel()
    return replace(pair, prompt=prompt, chosen=pair.chosen[:room], rejected=pair.rejected[:room])


def _useless(pair: PreferencePair) -> str:
    if min(pair.chosen.numel(), pair.rejected.numel()) == 0:
        return "an answer has no token"
    if torch.equal(pair.chosen, pair.rejected):
        return "chosen and rejected are the same"
    return ""
