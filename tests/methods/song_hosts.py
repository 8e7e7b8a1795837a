"""Small classifiers for the tests of A Song of (Dis)agreement: a stock BERT, a decoder, and plain networks whose
explanations are known."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from headway.methods.diagnosis.song_of_disagreement import Classifier, Example, HostClassifier

VOCABULARY = 30


def bert(*, seed: int = 0, layers: int = 3, classes: int = 3) -> BertForSequenceClassification:
    """A random BERT whose weights are large enough that attention is not uniform."""
    torch.manual_seed(seed)
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, initializer_range=0.3, num_labels=classes, hidden_dropout_prob=0.2,
    )  # fmt: skip
    return BertForSequenceClassification(config).eval()


def classifier(**options) -> HostClassifier:
    return HostClassifier(bert(**options), mask_id=3)


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def reader_of_the_last(pad: int | None = 0) -> LlamaForSequenceClassification:
    """A decoder with classes of its own, which its last token decides."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3, num_labels=3, pad_token_id=pad,
    )  # fmt: skip
    return LlamaForSequenceClassification(config).eval()


def example(count: int = 9, *, seed: int = 0, label: int | None = None) -> Example:
    """[CLS] words [SEP], random ids."""
    ids = np.random.default_rng(seed).integers(5, VOCABULARY, size=count)
    ids[0], ids[-1] = 1, 2
    special = np.isin(np.arange(count), (0, count - 1))
    return Example(
        ids=torch.from_numpy(ids),
        tokens=tuple(f"t{i}" for i in ids),
        special=special,
        words=np.where(special, -1, np.arange(count)),
        label=label,
    )


class Plain(Classifier):
    """f = network(Σ_t e_t), one output that need not be a probability."""

    pad_id, mask_id = 0, 1

    def __init__(self, network: nn.Module, *, width: int = 6, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self._embedding = nn.Embedding(VOCABULARY, width)
        self.network = self.module = network

    @property
    def embedding(self) -> nn.Embedding:
        return self._embedding

    def outputs(self, embeddings, mask):
        return self.network((embeddings * mask[..., None]).sum(1))


def linear() -> Plain:
    torch.manual_seed(1)
    return Plain(nn.Linear(6, 2))


def rectified() -> Plain:
    torch.manual_seed(2)
    return Plain(nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2), nn.Tanh()))


def smooth() -> Plain:
    torch.manual_seed(3)
    return Plain(nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 2), nn.Sigmoid()))
