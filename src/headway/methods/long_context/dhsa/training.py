"""Training the boundary predictor: record keys and labels of a frozen model on texts, then fit.

    loss = Σ_layers mean over valid gaps of (1 − p_y)^γ · BCE(logit, y) ,   positives weigh `positive` times

Adam, one step per text, as in the released code. Labels come from the model's own dense attention, see `labels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from headway.door.attach import observe
from headway.door.call import AttentionCall
from headway.door.stages import Observer
from headway.errors import ArgumentError, NumericError
from headway.hosts.fingerprint import fingerprint
from headway.methods.long_context.dhsa.boundaries import Piece
from headway.methods.long_context.dhsa.labels import RATIO, WINDOW, attention_ratio, boundary_targets
from headway.methods.long_context.dhsa.predictor import HEADS, BoundaryPredictor

EPOCHS, RATE = 2, 1e-4
FOCUS, POSITIVE = 2.0, 1.3
#: Share of the texts that are held out.
HELD_OUT = 0.2
#: Best gaps whose overlap with the labels' best is reported.
BEST = 500


@dataclass(frozen=True)
class Recorded:
    """One layer on one text: keys (tokens, width), the ratio ρ of every gap with `window` tokens on each side, and
    where it came from."""

    keys: Float[Tensor, "tokens width"]
    ratio: Float[Tensor, " tokens"]
    layer: int
    text: int
    window: int = WINDOW


@dataclass(frozen=True, kw_only=True)
class BoundaryScores:
    """How predicted gaps agree with labelled ones over valid gaps: at probability one half, and by the `best` highest
    ones of both. `rate` is the share of gaps labelled; a guess at that rate has F1 = rate."""

    precision: float
    recall: float
    f1: float
    overlap: float
    rate: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Trained:
    """A predictor, the mean loss of every epoch, and its scores on the texts that were held out."""

    predictor: BoundaryPredictor
    losses: tuple[float, ...]
    scores: BoundaryScores
    held_out: tuple[int, ...]


@dataclass(eq=False)
class BoundaryRecorder(Observer):
    """Notes keys and dense labels of every causal site it sees."""

    window: int = WINDOW
    found: list[tuple[Tensor, Tensor, int]] = field(default_factory=list)

    def start(self) -> None:
        self.found.clear()

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.site.kind != "self" or call.queries != call.keys or not call.causal:
            return
        every = torch.ones(call.query.shape[0], call.keys, dtype=torch.bool, device=call.key.device)
        joined = Piece(call.key, every, call).joined
        self.found.append((joined.cpu(), attention_ratio(call, window=self.window).cpu(), call.site.layer))

    def result(self) -> list[tuple[Tensor, Tensor, int]]:
        return list(self.found)


@torch.no_grad()
def record_boundaries(
    model: nn.Module,
    texts: Sequence[Int[Tensor, "1 tokens"]],
    *,
    layers: Sequence[int] | None = None,
    window: int = WINDOW,
) -> list[Recorded]:
    """Keys and labels of every layer (or some) on every text, one forward a text. Raises ArgumentError for a batch."""
    found = []
    for number, ids in enumerate(texts):
        if ids.ndim != 2 or ids.shape[0] != 1:
            raise ArgumentError(
                f"texts: got shape {tuple(ids.shape)}, expected (1, tokens) each. Pass rows one by one."
            )
        recorder = BoundaryRecorder(window)
        with observe(model, recorder, layers=layers):
            model(input_ids=ids, use_cache=False)
        for keys, ratio, layer in recorder.result():
            found.append(Recorded(keys[0], ratio[0], layer, number, window))
    if not found:
        raise ArgumentError("texts: got none that a causal layer read, expected at least one. Pass token ids.")
    return found


def train_predictor(
    model: nn.Module,
    recorded: Sequence[Recorded],
    *,
    epochs: int = EPOCHS,
    rate: float = RATE,
    ratio_at: float = RATIO,
    window: int = WINDOW,
    heads: int = HEADS,
    encoder: str = "attention",
    pool: str = "mean",
    seed: int = 0,
    **source: Any,
) -> Trained:
    """Fits a predictor for `model` to what `record_boundaries` found on it. The model itself is left alone.

    A fifth of the texts, at least one, is held out. Raises NumericError when the loss is not finite. `source` is kept
    in the predictor's file."""
    texts = sorted({sample.text for sample in recorded})
    if len(texts) < 2 or epochs < 1:
        raise ArgumentError(
            f"recorded, epochs: got {len(texts)} texts and {epochs} epochs, expected at least 2 texts (one is held "
            "out) and 1 epoch."
        )
    labelled = {sample.window for sample in recorded}
    if labelled != {window}:
        raise ArgumentError(
            f"window: got {window} for labels of {sorted(labelled)} tokens on each side, expected what they were "
            "recorded with. Pass the same window to record_boundaries."
        )
    generator = torch.Generator().manual_seed(seed)
    order = [texts[i] for i in torch.randperm(len(texts), generator=generator).tolist()]
    held = order[: max(round(HELD_OUT * len(texts)), 1)]
    kept = order[len(held) :]
    settings = {"epochs": epochs, "rate": rate, "ratio_at": ratio_at, "seed": seed, "texts": len(kept)}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        predictor = BoundaryPredictor(
            recorded[0].keys.shape[1],
            window=window,
            heads=heads,
            encoder=encoder,
            pool=pool,
            made_on=fingerprint(model),
            source=settings | source,
        )
    optimizer = torch.optim.Adam(predictor.parameters(), lr=rate)
    losses = []
    for _ in range(epochs):
        total = 0.0
        for place in torch.randperm(len(kept), generator=generator).tolist():
            samples = [sample for sample in recorded if sample.text == kept[place]]
            optimizer.zero_grad()
            for sample in samples:
                loss = _loss(predictor, sample, ratio_at)
                loss.backward()
                total += float(loss.detach()) / len(samples)
            optimizer.step()
        losses.append(total / len(kept))
        if not torch.isfinite(torch.tensor(losses[-1])):
            raise NumericError(f"loss: got {losses[-1]}, expected a finite number. Lower the rate.")
    predictor.eval()
    scores = score_predictor(predictor, [s for s in recorded if s.text in held], ratio_at=ratio_at)
    return Trained(predictor=predictor, losses=tuple(losses), scores=scores, held_out=tuple(held))


def focal_loss(
    logits: Float[Tensor, " gaps"],
    targets: Bool[Tensor, " gaps"],
    *,
    focus: float = FOCUS,
    positive: float = POSITIVE,
) -> Float[Tensor, " gaps"]:
    """(1 − p_y)^focus · BCE, the BCE of positives times `positive`. focus = 0, positive = 1 is the plain BCE of the
    paper's text."""
    y = targets.to(logits.dtype)
    cross_entropy = binary_cross_entropy_with_logits(
        logits, y, pos_weight=torch.tensor(positive, dtype=logits.dtype), reduction="none"
    )
    wrong = torch.sigmoid(torch.where(targets, -logits, logits))
    return wrong**focus * cross_entropy


@torch.no_grad()
def score_predictor(
    predictor: BoundaryPredictor, recorded: Sequence[Recorded], *, ratio_at: float = RATIO, best: int = BEST
) -> BoundaryScores:
    """Precision, recall, F1 and overlap over all valid gaps of all samples."""
    hits = claimed = true = valid = 0
    overlaps = []
    for sample in recorded:
        targets, counts = boundary_targets(sample.ratio[None], ratio_at=ratio_at, window=predictor.window)
        targets, counts = targets[0], counts[0]
        logits = predictor(sample.keys[None])[0].cpu()
        said = logits > 0
        hits += int((said & targets & counts).sum())
        claimed += int((said & counts).sum())
        true += int((targets & counts).sum())
        valid += int(counts.sum())
        size = min(best, int(counts.sum()) // 4)
        if size:
            tops = [x[counts].topk(size).indices for x in (logits, sample.ratio)]
            overlaps.append(float(torch.isin(*tops).double().mean()))
    return BoundaryScores(
        precision=hits / max(claimed, 1),
        recall=hits / max(true, 1),
        f1=2 * hits / max(claimed + true, 1),
        overlap=sum(overlaps) / max(len(overlaps), 1),
        rate=true / max(valid, 1),
    )


def _loss(predictor: BoundaryPredictor, sample: Recorded, ratio_at: float) -> Tensor:
    targets, counts = boundary_targets(sample.ratio[None], ratio_at=ratio_at, window=predictor.window)
    logits = predictor(sample.keys[None])
    if not bool(counts.any()):
        raise ArgumentError(
            f"recorded: got a text of {sample.keys.shape[0]} tokens, expected more than {4 * predictor.window}."
        )
    return focal_loss(logits[counts], targets[counts]).mean()
