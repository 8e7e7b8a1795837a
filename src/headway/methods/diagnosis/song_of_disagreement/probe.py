"""A classifier out of a bare encoder: logistic regression on what its tokens are pooled into.

    p(c | E) = softmax_c(W v + b) ,   v = pooled(E) / ‖pooled(E)‖ ,   min_{W, b}  mean −log p(label) + λ ‖W‖²

The encoder stays as it is. What is explained is then the encoder and the probe as one function of word embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.errors import ArgumentError
from headway.methods.diagnosis.song_of_disagreement.classifier import (
    Classifier,
    Example,
    HostClassifier,
    Readout,
    inputs_of,
)

#: λ: weak enough to separate what can be separated, strong enough that probabilities stay away from 0 and 1.
PENALTY = 1e-4
ITERATIONS = 200


def fit_probe(
    host: nn.Module,
    examples: Sequence[Example],
    *,
    readout: Readout = "mean",
    penalty: float = PENALTY,
    pad_id: int | None = None,
    mask_id: int | None = None,
) -> HostClassifier:
    """The host with a probe fitted on labelled examples, by L-BFGS in float64; nothing is drawn.

    Raises ArgumentError for examples without a label, for labels that are not 0, 1, …, and for one class alone."""
    labels = labels_of(examples)
    classes = int(labels.max()) + 1
    seen = set(labels.tolist())
    if classes < 2 or seen != set(range(classes)):
        raise ArgumentError(f"examples: got labels {sorted(seen)}, expected every class of 0, 1, … at least once.")
    bare = HostClassifier(host, head=nn.Identity(), readout=readout, pad_id=pad_id, normalise=True)
    with torch.no_grad():
        vectors = torch.cat([bare.pooled(*inputs_of(bare, example)) for example in examples])
    head = _logistic_regression(vectors.double().cpu(), torch.from_numpy(labels), classes, penalty)
    head = head.to(vectors).requires_grad_(False)
    return HostClassifier(host, head=head, readout=readout, pad_id=pad_id, mask_id=mask_id, normalise=True)


def accuracy(classifier: Classifier, examples: Sequence[Example]) -> float:
    """Share of labelled examples whose label has the largest output."""
    return float((classifier.predict(examples).argmax(1) == labels_of(examples)).mean())


def labels_of(examples: Sequence[Example]) -> np.ndarray:
    """The labels of examples. Raises ArgumentError where there are none."""
    without = [i for i, example in enumerate(examples) if example.label is None or example.label < 0]
    if not examples or without:
        raise ArgumentError(
            f"examples: got {len(examples)}, {len(without)} of them without a label, expected at least one and a class "
            "number for each."
        )
    return np.array([example.label for example in examples], int)


def _logistic_regression(vectors: Tensor, labels: Tensor, classes: int, penalty: float) -> nn.Linear:
    head = nn.Linear(vectors.shape[1], classes, dtype=torch.float64)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    optimiser = torch.optim.LBFGS(head.parameters(), max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Any:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(head(vectors), labels) + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    return head
