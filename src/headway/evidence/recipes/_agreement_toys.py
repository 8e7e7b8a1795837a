"""Classifiers trained on planted texts, whose deciding words are known: a stock BERT and the paper's recurrent network.

Both are trained on fresh texts of one rule, short ones first, until they are sure of it: on long texts alone the small
BERT does not find a rule that joins two words. The recurrent network of the rule "pair" reads
its two texts one by one with one encoder, as the paper's does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from headway.methods.diagnosis.song_of_disagreement import (
    AttentiveLSTM,
    Classifier,
    Example,
    HostClassifier,
    RecurrentClassifier,
)
from headway.tasks.planted_rationale import (
    MASK,
    PAD,
    PAIR_SPLIT,
    VOCABULARY,
    PlantedText,
    make_texts,
    pad_batch,
)

LAYERS, HEADS, WIDTH = 3, 4, 48
BATCH, RATE, WARM = 64, 1e-3, 50
#: Share of right answers over so many steps at which texts get longer. At the end training stops, where other texts
#: confirm it.
LEARNED, SURE = 0.985, 20
#: Words of a training text at the end, and before it.
LENGTHS = (12, 40)
SHORTER = ((5, 7), (5, 14))
CHECKED = 400


def transformer(seed: int) -> HostClassifier:
    """An untrained stock BERT with three layers."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH, max_position_embeddings=LENGTHS[1] + 8, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, pad_token_id=PAD, initializer_range=0.08,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HostClassifier(BertForSequenceClassification(config), mask_id=MASK)


def recurrent(seed: int, *, pair: bool = False, activation: str = "softmax") -> RecurrentClassifier:
    """An untrained bidirectional LSTM with attention over its states."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = AttentiveLSTM(VOCABULARY, activation=activation, split=PAIR_SPLIT if pair else None)
        return RecurrentClassifier(network, pad_id=PAD, mask_id=MASK)


def train(classifier: Classifier, rule: str, steps: int, seed: int) -> float:
    """Trains in place, at most `steps` steps; the accuracy on fresh texts."""
    random = np.random.default_rng(seed)
    module, logits = classifier.module.train(), _logits(classifier)
    optimiser = torch.optim.AdamW(module.parameters(), lr=RATE, weight_decay=1e-5, amsgrad=True)
    left, right = [*SHORTER, LENGTHS], list[float]()
    for step in range(steps):
        if len(right) >= SURE and np.mean(right[-SURE:]) >= LEARNED:
            right = []
            if len(left) == 1 and _accuracy(classifier, rule, np.random.default_rng([seed, 3, step])) >= LEARNED:
                break
            left = left[1:] or left
        ids, mask, labels = pad_batch(make_texts(rule, BATCH, random, lengths=left[0]))
        for group in optimiser.param_groups:
            group["lr"] = RATE * min((step + 1) / WARM, 1.0)
        found = logits(ids, mask)
        optimiser.zero_grad()
        nn.functional.cross_entropy(found, labels).backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        right.append(float((found.argmax(-1) == labels).float().mean()))
    module.eval()
    return _accuracy(classifier, rule, np.random.default_rng([seed, 1]))


def _accuracy(classifier: Classifier, rule: str, random: np.random.Generator) -> float:
    ids, mask, labels = pad_batch(make_texts(rule, CHECKED, random, lengths=LENGTHS))
    with torch.no_grad():
        return float((_logits(classifier)(ids, mask).argmax(-1) == labels).float().mean())


def example_of(text: PlantedText) -> Example:
    """A planted text as a classifier reads it."""
    return Example(
        ids=text.ids,
        tokens=text.tokens,
        special=text.special,
        words=np.where(text.special, -1, np.arange(len(text.ids))),
        label=text.label,
        rationale=text.rationale,
    )


def examples(rule: str, count: int, seed: int, *, lengths: tuple[int, int] = (12, 24)) -> list[Example]:
    """Texts with a known rationale that no training text was drawn with."""
    random = np.random.default_rng([seed, 2])
    found: list[Example] = []
    while len(found) < count:
        made = make_texts(rule, 2 * count, random, lengths=lengths)
        found += [example_of(text) for text in made if text.rationale is not None]
    return found[:count]


def _logits(classifier: Classifier) -> Callable[[Tensor, Tensor], Tensor]:
    if isinstance(classifier, RecurrentClassifier):
        return classifier.logits
    host: Any = classifier.host
    return lambda ids, mask: host(input_ids=ids, attention_mask=mask.long()).logits
