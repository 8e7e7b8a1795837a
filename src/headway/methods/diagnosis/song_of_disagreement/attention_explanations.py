"""Attention as an explanation: one score per token from the weights of a host, read through the door.

    A_l     mean over heads of layer l's weights (queries × keys);   r: weight of each query row in the output
    last        r A_L                                     what the readout attends to in the last layer
    mean        r (Σ_l A_l) / L
    peak        max_j (Σ_l A_l)_ij / L                    the released code's plain average: token i's largest weight
    rollout     r R_L ,  R_l = Ã_l R_{l−1} ,  Ã = rownorm(A + I) ,  R_0 = I       (arXiv 2005.00928)
    flow        largest flow from the readout through capacities Ã to each token  (arXiv 2005.00928)
    values      as `last`, with √Σ_h ‖α_ij v_j‖² in place of the mean of α_ij     (arXiv 2004.10102, before W_O)
    zeroing     change of the representation when a token's values are zero       (arXiv 2301.12971)

Maps are folded in as they pass: rollout holds two n × n matrices at any depth, `last`, `mean` and `peak` one. Flow
needs one per layer and is refused above a length, because its cost grows with the cube of the tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.door import observe, use
from headway.door.call import AttentionCall, Site
from headway.door.evaluating import evaluating
from headway.door.stages import Editor, Observer
from headway.errors import ArgumentError, unknown
from headway.methods.diagnosis.song_of_disagreement.classifier import Classifier, Example, inputs_of, readout_weights
from headway.methods.diagnosis.song_of_disagreement.flow import FLOW_TOKENS, attention_flow

KINDS = ("last", "mean", "peak", "rollout", "flow", "values")
#: Elements of one block of per-head weights that is alive at a time (16 MB of float32).
BLOCK = 4_000_000


def row_normalised(weights: Float[Tensor, "... rows keys"]) -> Float[Tensor, "... rows keys"]:
    """Rows that sum to one; rows of nothing (padding) stay nothing."""
    total = weights.sum(-1, keepdim=True)
    return weights / torch.where(total > 0, total, torch.ones_like(total))


def with_residual(weights: Float[Tensor, "... tokens tokens"]) -> Float[Tensor, "... tokens tokens"]:
    """Ã = rownorm(A + I): half of each row is the token itself, for the residual stream."""
    return row_normalised(weights + torch.eye(weights.shape[-1], dtype=weights.dtype, device=weights.device))


def rollout_step(
    rolled: Float[Tensor, "batch tokens tokens"], weights: Float[Tensor, "batch tokens tokens"]
) -> Float[Tensor, "batch tokens tokens"]:
    """R_l = Ã_l R_{l−1}."""
    return with_residual(weights) @ rolled


def rollout(layers: Sequence[Float[Tensor, "tokens tokens"]]) -> Float[Tensor, "tokens tokens"]:
    """R of a list of head-mean maps, first layer first. Rows sum to one."""
    if not layers:
        raise ArgumentError("layers: got none, expected at least one map.")
    rolled = torch.eye(layers[0].shape[-1], dtype=torch.float64)
    for weights in layers:
        rolled = with_residual(weights.double()) @ rolled
    return rolled


class MapObserver(Observer):
    """Folds head-mean maps of all self-attention sites into what the kinds asked for need: the last map, the sum, the
    rolled-out product, the last map of value-weighted norms, and for flow alone every map."""

    reads_weights = True
    reads_keys = True

    def __init__(self, kinds: Sequence[str]) -> None:
        for kind in kinds:
            if kind not in KINDS:
                raise unknown("kind", kind, KINDS)
        self.kinds = tuple(kinds)
        self.start()

    def start(self) -> None:
        self.layers = 0
        self.last: Tensor | None = None
        self.total: Tensor | None = None
        self.rolled: Tensor | None = None
        self.values: Tensor | None = None
        self.stack: list[Tensor] = []

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.queries != call.keys:
            raise ArgumentError(
                f"attention at {call.site.name}: got {call.queries} queries over {call.keys} keys, expected one "
                "forward of the whole text. Run without a cache."
            )
        weights = head_mean(call)
        self.layers += 1
        self.last = weights
        if {"mean", "peak"} & set(self.kinds):
            self.total = weights if self.total is None else self.total + weights
        if "rollout" in self.kinds:
            start = torch.eye(call.keys, dtype=torch.float64, device=weights.device).expand_as(weights)
            self.rolled = rollout_step(start if self.rolled is None else self.rolled, weights)
        if "flow" in self.kinds:
            self.stack.append(weights)
        if "values" in self.kinds:
            self.values = row_normalised(head_mean(call, norms=True))

    def result(self) -> dict[str, Tensor]:
        if self.last is None:
            raise ArgumentError("host: no self-attention passed the door in this forward, so there is nothing to read.")
        return {"last": self.last}


@torch.no_grad()
def head_mean(call: AttentionCall, *, norms: bool = False) -> Float[Tensor, "batch queries keys"]:
    """Mean over heads of the weights, or √Σ_h ‖α v‖² , in float64, by blocks of rows; padded rows are zero."""
    batch, heads, count, keys = call.query.shape[0], call.heads, call.queries, call.keys
    size = max(1, BLOCK // (batch * heads * keys))
    length = None
    if norms:
        length = call.value.double().norm(dim=-1).repeat_interleave(call.groups, 1)[:, :, None]
    parts = []
    for start in range(0, count, size):
        rows = torch.arange(start, min(start + size, count))
        weights = call.weights(rows).double()
        parts.append(weights.mean(1) if length is None else (weights * length).square().sum(1).sqrt())
    found = torch.cat(parts, 1).nan_to_num(0.0)
    real = call.real_tokens(0, keys)
    return found if real is None else found * real[:, :, None] * real[:, None, :]


def attention_scores(
    classifier: Classifier,
    example: Example,
    kinds: Sequence[str] = ("last",),
    *,
    flow_tokens: int = FLOW_TOKENS,
) -> dict[str, Float[np.ndarray, " tokens"]]:
    """Token scores of several attention explanations from one forward. Never negative; padding gets zero.

    A classifier with one distribution over tokens has the kind "last" alone. Raises ArgumentError for other kinds
    there, for a classifier without attention, and for flow on more than `flow_tokens` tokens."""
    kinds = tuple(kinds)
    embeddings, mask = inputs_of(classifier, example)
    if classifier.host is None:
        return _token_scores(classifier, embeddings, mask, kinds)
    if "flow" in kinds and int(mask.sum()) > flow_tokens:
        raise ArgumentError(
            f"flow: got {int(mask.sum())} tokens, expected at most {flow_tokens}: one largest flow per token grows "
            "with the cube of the length. Use rollout, shorter texts, or raise flow_tokens."
        )
    observer = MapObserver(kinds)
    with evaluating(classifier.module), observe(classifier.host, observer), torch.no_grad():
        classifier.outputs(embeddings, mask)
    # A classifier that reads the last token was not given the padding behind it.
    read = observer.result()["last"].shape[-1]
    row, real = readout_weights(classifier.readout, mask)[0, :read].double(), mask[0, :read]
    behind = (0, mask.shape[1] - read)
    return {kind: np.pad(_read(observer, kind, row, real).cpu().numpy(), behind) for kind in kinds}


def _read(observer: MapObserver, kind: str, row: Tensor, mask: Tensor) -> Tensor:
    if kind == "flow":
        real = mask.nonzero()[:, 0]
        scores = torch.zeros(len(row), dtype=torch.float64)
        layers = [with_residual(m[0][real][:, real]).cpu().numpy() for m in observer.stack]
        scores[real.cpu()] = torch.from_numpy(attention_flow(layers, row[real].cpu().numpy()))
        return scores
    if kind == "peak":
        assert observer.total is not None
        return (observer.total[0] / observer.layers).amax(-1) * mask
    maps = {"last": observer.last, "values": observer.values, "rollout": observer.rolled, "mean": observer.total}
    found: Any = maps[kind]
    return (row @ found[0]) / (observer.layers if kind == "mean" else 1) * mask


def _token_scores(classifier: Classifier, embeddings: Tensor, mask: Tensor, kinds: Sequence[str]) -> dict[str, Any]:
    with torch.no_grad(), evaluating(classifier.module):
        weights = classifier.token_weights(embeddings, mask)
    if weights is None:
        raise ArgumentError(
            f"classifier: {type(classifier).__name__} has neither a host that passes the door nor token weights, so it "
            "has no attention to explain with. Leave attention methods out."
        )
    if set(kinds) - {"last"}:
        raise ArgumentError(
            f"kinds: got {', '.join(kinds)} for one distribution over tokens, expected 'last' alone: there are no "
            "layers."
        )
    return {kind: (weights[0] * mask[0]).double().cpu().numpy() for kind in kinds}


@dataclass(frozen=True, kw_only=True)
class ZeroValueOfRow(Editor):
    """Row b of the batch has the values of key `positions[b]` zeroed, in all heads: a text is tried with every token
    left out of the mixing at once."""

    positions: Int[Tensor, " batch"]
    keeps_weights = True

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def edit_weights(
        self, call: AttentionCall, weights: Float[Tensor, "batch heads rows keys"], rows: Int[Tensor, " rows"]
    ) -> Float[Tensor, "batch heads rows keys"]:
        weights = weights.clone()
        weights[torch.arange(len(self.positions)), :, :, self.positions] = 0.0
        return weights


@torch.no_grad()
def value_zeroing(
    classifier: Classifier, example: Example, *, by_layer: bool = False, rows: int = 16
) -> Float[np.ndarray, " tokens"]:
    """1 − cos between the readout's representation and itself with the values of token j zero, for each real token j.

    `by_layer=False` zeroes in all layers at once: one row of a forward per token, and reads the last layer.
    `by_layer=True` is the paper's: C_l,ij is the change of token i behind layer l when j is zeroed in layer l alone;
    the row-normalised C_l are multiplied as in rollout. It costs one row per token and layer. `rows` bounds the
    batch."""
    if classifier.host is None:
        raise ArgumentError("value zeroing: the classifier has no host that passes the door; leave this method out.")
    embeddings, mask = inputs_of(classifier, example)
    real = mask[0].nonzero()[:, 0]
    row = readout_weights(classifier.readout, mask)[0].double()
    with evaluating(classifier.module), use(classifier.host):
        before = [state[0].double() for state in classifier.hidden(embeddings, mask)]
        layers: list[int | None] = list(range(len(before))) if by_layer else [None]
        rolled = torch.eye(mask.shape[1], dtype=torch.float64, device=mask.device)
        for layer in layers:
            change = torch.zeros_like(rolled)
            for start in range(0, len(real), rows):
                some = real[start : start + rows]
                at = -1 if layer is None else layer
                several = embeddings.expand(len(some), -1, -1), mask.expand(len(some), -1)
                with use(classifier.host, ZeroValueOfRow(positions=some), layers=None if layer is None else [layer]):
                    after = classifier.hidden(*several)[at].double()
                change[:, some] = 1 - torch.cosine_similarity(after, before[at][None], dim=-1).T
            rolled = row_normalised(change.clamp(min=0) * mask[0][:, None]) @ rolled
    return ((row @ rolled) * mask[0]).cpu().numpy()
