"""The paper's recurrent family: a bidirectional LSTM whose attention is one distribution over tokens.

    u_t = tanh(W h_t) ,  a = activation(v · u) ,  c = Σ_t a_t h_t ,  logits = D c
    pair of texts:  D [c1; c2; |c1 − c2|; c1 ⊙ c2]  with one encoder for both

activation: softmax, uniform, or entmax_α, which is sparsemax at α = 2 and may learn α:

    p_i = [(α − 1) z_i − τ]_+^{1 / (α − 1)} ,   τ such that Σ p = 1        (arXiv 1905.05702)
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from headway.errors import ArgumentError, unknown
from headway.methods.diagnosis.song_of_disagreement.classifier import Classifier, Probabilities

ACTIVATIONS = ("softmax", "uniform", "sparsemax", "entmax", "learned")
HALVINGS = 50


def entmax(logits: Float[Tensor, "... tokens"], alpha: Float[Tensor, ""] | float) -> Float[Tensor, "... tokens"]:
    """α-entmax over the last axis, α > 1; entries of −inf get nothing. Gradients reach logits and α.

    τ is found by halving, without a graph; one Newton step with a graph then carries the exact implicit gradient."""
    alpha = torch.as_tensor(alpha, dtype=logits.dtype)
    if not float(alpha.detach()) > 1:
        raise ArgumentError(f"alpha: got {float(alpha.detach())}, expected more than 1 (1 is softmax).")
    scaled = (alpha - 1) * logits
    power = 1 / (alpha - 1)
    with torch.no_grad():
        high = scaled.amax(-1, keepdim=True)
        low = high - 1
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            over = ((scaled - middle).clamp(min=0) ** power).sum(-1, keepdim=True) >= 1
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        inside = scaled > low

    def weights(threshold: Tensor) -> tuple[Tensor, Tensor]:
        gap = torch.where(inside, scaled - threshold, torch.ones_like(scaled)).clamp(min=1e-12)
        zero = torch.zeros_like(gap)
        return torch.where(inside, gap**power, zero), torch.where(inside, power * gap ** (power - 1), zero)

    found, slope = weights(low)
    newton = low + (found.sum(-1, keepdim=True) - 1) / slope.sum(-1, keepdim=True)
    return weights(newton)[0]


class AttentiveLSTM(nn.Module):
    """The network. `split` is where the second text of a pair begins, None for single texts. Padding stands behind."""

    def __init__(
        self,
        vocabulary: int,
        *,
        classes: int = 2,
        width: int = 32,
        hidden: int = 32,
        activation: str = "softmax",
        split: int | None = None,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        self.activation, self.split = activation, split
        self.embedding = nn.Embedding(vocabulary, width)
        self.encoder = nn.LSTM(width, hidden, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * hidden, hidden)
        # One module for each text: rules that are hooked on activation modules hold one state in each.
        self.bend = nn.ModuleList(nn.Tanh() for _ in range(1 if split is None else 2))
        self.vector = nn.Linear(hidden, 1, bias=False)
        self.decoder = nn.Linear(2 * hidden * (1 if split is None else 4), classes)
        self.sharpness = nn.Parameter(torch.zeros(())) if activation == "learned" else None

    def read(
        self, embeddings: Tensor, mask: Tensor, text: int = 0
    ) -> tuple[Float[Tensor, "batch width"], Float[Tensor, "batch tokens"]]:
        """(context, weights) of one text, the first or second."""
        packed = nn.utils.rnn.pack_padded_sequence(
            embeddings, mask.sum(1).cpu(), batch_first=True, enforce_sorted=False
        )
        states, _ = nn.utils.rnn.pad_packed_sequence(
            self.encoder(packed)[0], batch_first=True, total_length=embeddings.shape[1]
        )
        weights = self.weigh(self.vector(self.bend[text](self.project(states)))[..., 0], mask)
        return (weights[..., None] * states).sum(1), weights

    def weigh(self, logits: Float[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        if self.activation == "uniform":
            return mask / mask.sum(1, keepdim=True)
        logits = logits.masked_fill(~mask, -torch.inf)
        if self.activation == "softmax":
            return logits.softmax(-1)
        if self.sharpness is not None:
            return entmax(logits, 1 + torch.sigmoid(self.sharpness))
        return entmax(logits, 2.0 if self.activation == "sparsemax" else 1.5)

    def forward(self, embeddings: Tensor, mask: Tensor) -> tuple[Float[Tensor, "batch classes"], Tensor]:
        """(logits, weights over tokens); of a pair each text's weights sum to one."""
        if self.split is None:
            context, weights = self.read(embeddings, mask)
            return self.decoder(context), weights
        first, a = self.read(embeddings[:, : self.split], mask[:, : self.split])
        second, b = self.read(embeddings[:, self.split :], mask[:, self.split :], 1)
        both = torch.cat([first, second, (first - second).abs(), first * second], -1)
        return self.decoder(both), torch.cat([a, b], 1)


class RecurrentClassifier(Classifier):
    """An AttentiveLSTM as a classifier."""

    def __init__(self, network: AttentiveLSTM, *, pad_id: int = 0, mask_id: int | None = None) -> None:
        self.network, self.link = network, Probabilities()
        self.module = nn.ModuleList([network, self.link])
        self.pad_id, self.mask_id = pad_id, mask_id

    @property
    def embedding(self) -> nn.Embedding:
        return self.network.embedding

    def outputs(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return self.link(self.network(embeddings, mask)[0])

    def token_weights(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        return self.network(embeddings, mask)[1]

    def logits(self, ids: Int[Tensor, "batch tokens"], mask: Bool[Tensor, "batch tokens"]) -> Tensor:
        return self.network(self.embedding(ids), mask)[0]
