"""What silencing heads does to the answers of a model and to the skew of its retrieval."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headway.diagnose.concepts.pictures import Pictures
from headway.hosts.fingerprint import fingerprint
from headway.methods.diagnosis.clip_ccs import (
    TextBank,
    Tower,
    chance_skew,
    class_vectors,
    embed,
    groups_of,
    mean_max_skew,
    pruned,
    retrieval_skews,
    right,
)
from headway.methods.diagnosis.clip_ccs.bank import Tokenise
from headway.parts import Parts
from headway.progress import Tell
from headway.statistics import bootstrap_difference, proportion

if TYPE_CHECKING:
    from headway.diagnose.concepts.auditing import Settings

Head = tuple[int, int]
#: What silencing is measured by where pictures have no classes.
SAME = "nearest text unchanged"


class Runs:
    """Embeddings of all pictures with some heads silenced, kept on disk by what they depend on."""

    def __init__(self, part: Tower, pictures: Pictures, folder: Path | None, tell: Tell, total: int) -> None:
        self.part, self.pictures, self.tell, self.total = part, pictures, tell, total
        self.done = 0
        self.known: dict[tuple[Head, ...], Tensor] = {}
        self.kept = Parts(folder, prefix="pruned-")
        self.made_by = [fingerprint(part.model).to_dict(), *pictures.batches]

    def __call__(self, heads: Sequence[Head]) -> Float[Tensor, "pictures joint"]:
        key = tuple(sorted(heads))
        if key not in self.known:
            self.tell("silencing heads", min(self.done, self.total), self.total)
            found = self.kept.arrays([self.made_by, key], partial(self._run, key))
            self.known[key] = torch.from_numpy(found["embedding"])
        self.done += 1
        return self.known[key]

    def _run(self, heads: Sequence[Head]) -> dict[str, np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            scope: AbstractContextManager[Any] = pruned(self.part, heads) if heads else nullcontext()
        with scope:
            return {"embedding": embed(self.part, self.pictures.batches).cpu().numpy()}


class Measure:
    """Accuracy on every question, and the skew of retrieval, of silenced embeddings beside the plain ones."""

    def __init__(
        self, text: Tower, tokenise: Tokenise, pictures: Pictures, bank: TextBank, settings: Settings, runs: Runs
    ) -> None:
        self.pictures, self.bank, self.settings, self.runs = pictures, bank, settings, runs
        self.classes = {
            name: class_vectors(text, {c: tokenise(p) for c, p in question.prompts.items()})
            for name, question in pictures.questions.items()
        }
        self.neutral: dict[str, Tensor] = {}
        if pictures.neutral and pictures.groups is not None:
            vectors = class_vectors(text, {c: tokenise(p) for c, p in pictures.neutral.items()})
            self.neutral = dict(zip(pictures.neutral, vectors, strict=True))
        self.groups = None if pictures.groups is None else groups_of(pictures.groups)
        self.random = np.random.default_rng(settings.seed)
        self.before = self.right(())

    def right(self, heads: Sequence[Head]) -> dict[str, np.ndarray]:
        """By question whether each picture whose class is known is answered rightly."""
        embedding = self.runs(heads)
        found = {}
        for name, question in self.pictures.questions.items():
            known = question.labels >= 0
            found[name] = right(embedding[known], self.classes[name], question.labels[known]).numpy()
        if not found:
            nearest = [(e @ self.bank.vectors.T).argmax(-1) for e in (self.runs(()), embedding)]
            found[SAME] = (nearest[0] == nearest[1]).numpy()
        return found

    def base(self) -> dict[str, Any]:
        """Accuracy by question and skew with every head at work."""
        accuracy = {name: proportion(int(hits.sum()), hits.size).to_dict() for name, hits in self.before.items()}
        found = self.skew(())
        if found is not None and self.groups is not None:
            top = min(self.settings.top, len(self.pictures))
            found["chance"] = chance_skew(self.groups, top, generator=np.random.default_rng(self.settings.seed))
        return {"accuracy": accuracy, "skew": found}

    def drops(self, heads: Sequence[Head]) -> dict[str, dict[str, Any]]:
        """By question the accuracy that is left, and the drop [value, low, high]."""
        found = {}
        for name, hits in self.right(heads).items():
            before = self.before[name].astype(float)
            drop = bootstrap_difference(before, hits.astype(float), paired=True, generator=self.random)
            found[name] = {"accuracy": float(hits.mean()), "drop": [drop.value, drop.low, drop.high]}
        return found

    def equal(self, pairs: Sequence[tuple[Sequence[Head], Sequence[Head]]]) -> dict[str, Any] | None:
        """Draws of two sets of equally many heads: their number, and by question the drops of both."""
        if not pairs:
            return None
        drops: dict[str, list[list[float]]] = {}
        for pair in pairs:
            after = [self.right(heads) for heads in pair]
            for name, before in self.before.items():
                drops.setdefault(name, []).append([float(before.mean() - hits[name].mean()) for hits in after])
        return {"count": len(pairs[0][0]), "drops": drops}

    def skew(self, heads: Sequence[Head]) -> dict[str, Any] | None:
        """The mean MaxSkew over neutral prompts with heads silenced, and what it was counted from."""
        if not self.neutral or self.groups is None:
            return None
        embedding = self.runs(heads)
        top = min(self.settings.top, embedding.shape[0])
        skews = retrieval_skews(embedding, self.neutral, self.groups, top=top)
        return mean_max_skew(skews, generator=self.random).to_dict() | {
            "prompts": {s.prompt: {"skew": s.by_group, "counts": s.counts} for s in skews}
        }
