"""What is minimised. A loss is a function of model and batch that gives a `Loss`, or a tensor of one number.

next token:       −1/|S| Σ_{i ∈ S} log p(x_i | x_<i)          S: the positions whose label is not −100
classification:   −1/n Σ log p(class)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from headway.errors import ArgumentError
from headway.train.streams import Batch

#: A label that is not scored, as in torch and transformers.
IGNORE = -100
#: Losses of transformers in which a label stands where it is predicted, not one place later.
UNSHIFTED = ("ForMaskedLM", "ForTokenClassification")


@dataclass(frozen=True)
class Loss:
    """A mean over `count` items, with further numbers for the log. Batches that are accumulated are weighted by their
    counts, which makes them equal to one large batch."""

    value: Tensor
    count: float = 1.0
    metrics: Mapping[str, float] = field(default_factory=dict)


LossFunction = Callable[[nn.Module, Batch], Loss | Tensor]


def model_loss(model: nn.Module, batch: Batch) -> Loss:
    """The loss that a transformers model computes from its own labels.

    A tensor is token ids that are their own labels; a mapping is given as keywords and needs `labels`."""
    inputs: dict[str, Tensor] = {"input_ids": batch, "labels": batch} if isinstance(batch, Tensor) else dict(batch)
    if "labels" not in inputs:
        raise ArgumentError(f"batch: got {sorted(inputs)}, expected labels among them. Add them, or pass loss=.")
    inner = getattr(model, "module", model)
    keywords = {"use_cache": False} if hasattr(getattr(inner, "config", None), "use_cache") else {}
    output = model(**inputs, **keywords)
    value = getattr(output, "loss", None)
    if not isinstance(value, Tensor):
        raise ArgumentError(
            f"model: got a {type(inner).__name__} that returns no loss, expected one that computes it from labels. "
            "Pass loss=: a function of model and batch, such as headway.train.classification_loss."
        )
    return Loss(value, scored(inputs["labels"], shift=getattr(inner, "loss_type", None) not in UNSHIFTED))


def next_token_loss(model: nn.Module, batch: Batch) -> Loss:
    """The next-token loss of a model that returns logits (batch, tokens, vocabulary), or an output that has them.

    A tensor is token ids; a mapping has `input_ids`, and `labels` of which −100 is not scored (the ids themselves when
    absent). Also gives `accuracy`: the share of scored tokens that the largest logit names."""
    inputs: dict[str, Tensor] = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    if "input_ids" not in inputs:
        raise ArgumentError(f"batch: got {sorted(inputs)}, expected input_ids among them.")
    ids = inputs.pop("input_ids")
    labels = inputs.pop("labels", ids)
    logits = logits_of(model(ids, **inputs))
    value, accuracy = token_loss(logits, labels)
    count = scored(labels)
    return Loss(value, count, {"accuracy": accuracy})


def token_loss(
    logits: Float[Tensor, "batch tokens vocabulary"], labels: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, ""], float]:
    """Mean loss in nats and accuracy of logits at i against the label at i + 1; labels of −100 are left out.

    In float32 at least. Nothing scored gives a loss of 0 that still has a gradient (of zeros)."""
    if labels.shape != logits.shape[:2]:
        raise ArgumentError(f"labels: got shape {tuple(labels.shape)}, expected {tuple(logits.shape[:2])} as logits.")
    given, wanted = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    real = wanted != IGNORE
    if not bool(real.any()):
        return given.sum() * 0.0, 0.0
    given, wanted = given[real], wanted[real]
    value = F.cross_entropy(given.to(torch.promote_types(given.dtype, torch.float32)), wanted)
    return value, float((given.detach().argmax(-1) == wanted).float().mean())


def classification_loss(model: nn.Module, batch: Batch) -> Loss:
    """Cross-entropy of class logits. A batch holds `labels` (batch,) and one tensor of inputs under any other name, or
    the model's keywords. Also gives `accuracy`."""
    if isinstance(batch, Tensor) or "labels" not in batch or len(batch) < 2:
        got = "a tensor" if isinstance(batch, Tensor) else sorted(batch)
        raise ArgumentError(f"batch: got {got}, expected a mapping with labels and the model's inputs.")
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"]
    logits = logits_of(model(*inputs.values()) if len(inputs) == 1 else model(**inputs))
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ArgumentError(
            f"labels: got shape {tuple(labels.shape)} beside logits {tuple(logits.shape)}, expected (batch,) beside "
            "(batch, classes)."
        )
    value = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)
    accuracy = float((logits.detach().argmax(-1) == labels).float().mean())
    return Loss(value, float(len(labels)), {"accuracy": accuracy})


def logits_of(output: object) -> Tensor:
    """The logits of what a model returned: itself, its field `logits`, or the first of a tuple."""
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        found = output[0]
    if not isinstance(found, Tensor):
        raise ArgumentError(f"model: got {type(output).__name__} from it, expected logits or an output that has them.")
    return found


def scored(labels: Tensor, *, shift: bool = True) -> float:
    """How many labels count: those that are not −100, without the first of a sequence when labels are shifted."""
    counted = labels[:, 1:] if shift and labels.ndim == 2 else labels
    return float((counted != IGNORE).sum()) if not counted.is_floating_point() else float(len(labels))
