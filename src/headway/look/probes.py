"""Roles that show only on a task: retrieval on key-value copies, induction and duplicates on repeated random tokens.

The answer of a copy is teacher-forced, and beside the scores stands whether the model itself solves the task: the heads
of a model that does not copy say nothing. Formulas and sources: `kernels.head_scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.door.call import AttentionCall, Site
from headway.door.evaluating import evaluating
from headway.door.stages import Observer
from headway.errors import ArgumentError, InterceptionError
from headway.kernels.head_scores import duplicate_score, induction_score, retrieval_score
from headway.kernels.reductions import reduce_attention
from headway.kernels.rows import Estimate, mean_of_samples
from headway.tasks.copying import CopySample, key_value_copy, repeated_random_tokens

#: Below this share of answer tokens predicted right, a model does not copy and its retrieval scores mean nothing (Wu et
#: al., arXiv 2404.15574, keep answers with a ROUGE-1 recall above one half).
LEAST_ACCURACY = 0.5

Progress = Callable[[int, int], None]


def retrieval_chance(sample: CopySample) -> float:
    """The retrieval score of a head whose arg-max falls on any visible key with equal probability."""
    start, stop = sample.value_span
    holding = (sample.ids[0, start:stop] == sample.answer[:, None]).sum(1)
    return float((holding / (sample.answer_rows + 1)).mean())


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

    def estimates(self) -> list[Estimate]:
        """The mean over samples with its interval, by site."""
        return [mean_of_samples(table) for table in self.per_sample]

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
    """Scores on repeated random tokens: `per_sample[s]` is (samples, 2, heads) at `sites[s]`, induction and duplicate;
    `induction[s]` and `duplicate[s]` are their means (heads,). `accuracy` is the share of repeated tokens that the
    model predicts, `chance` the score of uniform attention on either."""

    sites: list[Site]
    per_sample: list[Float[Tensor, "samples 2 heads"]]
    accuracy: float
    chance: float

    @property
    def induction(self) -> list[Float[Tensor, " heads"]]:
        return [table[:, 0].mean(0) for table in self.per_sample]

    @property
    def duplicate(self) -> list[Float[Tensor, " heads"]]:
        return [table[:, 1].mean(0) for table in self.per_sample]

    def estimates(self, which: int) -> list[Estimate]:
        """The mean over samples of induction (0) or duplicate (1) with its interval, by site."""
        return [mean_of_samples(table[:, which]) for table in self.per_sample]


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
    return InductionResult(
        sites=[rows.sites[name] for name in kept],
        per_sample=[torch.stack(tables).double() for tables in kept.values()],
        accuracy=float(np.mean(right)),
        chance=float((1 / (second + 1).double()).mean()),
    )


class _Rows(Observer):
    """One reduction over a few query rows of each forward, per site."""

    reads_weights = True
    on_text = True

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
        refuse_second(call, self.found)
        rows = self.rows.to(call.query.device)
        reduced = reduce_attention(call.query, call.key, (self.what,), rows=rows, sinks=call.sinks, **call.arguments())
        self.sites[call.site.name] = call.site
        self.found[call.site.name] = reduced[self.what]


@contextmanager
def _under_the_door(model: torch.nn.Module, rows: _Rows) -> Iterator[None]:
    """The observer attached, no gradients, no dropout; the training mode comes back."""
    from headway.door import observe

    with evaluating(model), torch.no_grad(), observe(model, rows):
        yield


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


def refuse_second(call: AttentionCall, seen: dict[str, Any]) -> None:
    if call.site.name in seen:
        raise ArgumentError(
            f"forward: got a second one at {call.site.name}, expected one over the whole text. Do not generate or "
            "split the input while this observer is attached."
        )
