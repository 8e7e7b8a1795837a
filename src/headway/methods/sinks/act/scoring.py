"""Scores for the head search on multiple-choice questions, with what does not change between trials computed once.

A trial that edits layer l leaves the layers before it as they were. So the hidden states that enter every layer are
kept from the baseline run, and a trial runs the layers from l on: about half of the work for heads spread over a model.
They take batch × tokens × width × layers numbers of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.door.attach import use
from headway.door.blocks import block_forms, recorded_inputs, starting_at
from headway.door.call import AttentionCall
from headway.door.stages import Observer
from headway.methods.sinks.act.detection import find_sinks, first_seen, received_mass
from headway.methods.sinks.act.editor import ACT, in_tower
from headway.tasks.choice import Choices, Question, choice_batches, score_batch

Head = tuple[int, int]
MEASURES = ("probability", "correct")


class ChoiceScore:
    """`search_heads(ChoiceScore(model, tokenizer, questions), …)`: scores by task, of one stage at a time.

    measure: "probability" of the right option among the options, which moves with every head, or "correct" (0 or 1), as
    the paper counts. Forwards run without a cache."""

    def __init__(
        self, model: nn.Module, tokenizer: Any, questions: Sequence[Question], *, measure: str = "probability"
    ) -> None:
        self.model, self.questions, self.measure = model, tuple(questions), measure
        self.batches = choice_batches(tokenizer, questions)
        self.forms = block_forms(model)
        self._inputs: list[list[Tensor]] = []

    @property
    def items(self) -> tuple[Question, ...]:
        """What is scored, so that a search and its report can be told apart."""
        return self.questions

    def __call__(self, stage: ACT | None) -> dict[str, Float[np.ndarray, " items"]]:
        found = self.choices(stage)
        return found.by_task(getattr(found, self.measure))

    def choices(self, stage: ACT | None) -> Choices:
        """The log-likelihoods of all options with a stage attached, or without one."""
        sums = [np.zeros(len(question.options)) for question in self.questions]
        if stage is None:
            self._inputs = []
        for number, batch in enumerate(self.batches):
            for question, option, value in self._run(stage, number, batch):
                sums[question][option] += value
        return Choices(questions=self.questions, scores=tuple(sums))

    def _run(self, stage: ACT | None, number: int, batch: Any) -> list[tuple[int, int, float]]:
        if stage is None:
            with recorded_inputs(self.model) as inputs:
                found = list(score_batch(self.model, batch))
            self._inputs.append(list(inputs))
            return found
        first = min((layer for layer, _ in stage.heads), default=0)
        with use(self.model, stage):
            if number >= len(self._inputs):
                return list(score_batch(self.model, batch))
            hidden = self._inputs[number][first]
            with starting_at(self.model, first, hidden, forms=self.forms):
                return list(score_batch(self.model, batch))


class HiddenSinks(Observer):
    """Counts, per head and sequence, the sinks behind the first token, and the attention they receive.

    `result()` maps (layer, head) to (number of sinks, mean share of a row on them) for every sequence seen. Options are
    those of `find_sinks`."""

    reads_weights = True

    def __init__(self, **options: Any) -> None:
        self.options = options

    def start(self) -> None:
        self._found: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.kind == "cross" or in_tower(call.site.name):
            return
        weights, seen = call.weights(), call.visible()
        padded = call.padded_rows()
        real = torch.ones(weights.shape[0], call.queries, dtype=torch.bool) if padded is None else ~padded
        mass, count = received_mass(weights, seen, real)
        allowed = torch.arange(call.keys, device=mass.device) != first_seen(count)[..., None]
        sinks = find_sinks(mass, count, allowed=allowed, **self.options)
        rows = real.sum(1).to(mass.device, mass.dtype)[:, None]
        self._found.setdefault(call.site.layer, []).append((sinks.sum(-1), (mass * sinks).sum(-1) / rows))

    def result(self) -> dict[Head, list[tuple[int, float]]]:
        found: dict[Head, list[tuple[int, float]]] = {}
        for layer, parts in self._found.items():
            number, share = (torch.cat(side).T.tolist() for side in zip(*parts, strict=True))
            for head, (counts, shares) in enumerate(zip(number, share, strict=True)):
                found[layer, head] = [(int(c), s) for c, s in zip(counts, shares, strict=True)]
        return found
