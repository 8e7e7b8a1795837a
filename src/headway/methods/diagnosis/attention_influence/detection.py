"""Which heads retrieve: the share of an answer that a head looks up, on questions whose answer is known.

    score_h = mean over samples of  |{i : argmax_j w^h_{p_i − 1, j} in V and holds a_i}| / m

a_1 … a_m is the answer, given to the model; token a_i at position p_i is predicted by row p_i − 1, and it is that row
whose strongest key is read. V is the answer's place in the object. Only samples that the model itself solves count:
heads of a model that does not copy say nothing. Only the strongest key of m rows is read per head, under any kernel.

Scores: Wu et al., arXiv 2404.15574, whose script adds up tokens while decoding and keeps answers with a ROUGE-1 recall
above one half. The top share of heads: AttentionInfluence, arXiv 2505.07293, 5 %. Few heads, each with a copy, make a
share of them do nothing: `threshold` takes every head above a score. Heads that hardly score are never chosen.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from headway.door import CaptureSpec, capture, use
from headway.door.evaluating import evaluating
from headway.errors import ArgumentError, HeadwayError
from headway.hosts import default_text, positions_of
from headway.hosts.fingerprint import Fingerprint, check_fingerprint, fingerprint
from headway.kernels.head_scores import retrieval_score
from headway.methods.diagnosis.attention_influence.influence import refuse_looking_ahead
from headway.statistics import Measurement, matched_controls, rank_correlation
from headway.statistics.later_controls import later_controls
from headway.tasks.answering import takes_logits_to_keep
from headway.tasks.copying import CopySample
from headway.tasks.retrieval_probe import KEY_LENGTH, probe_sentences, retrieval_probes

#: The share of heads that the paper masks.
FRACTION = 0.05
#: A sample counts when the model predicts more than this share of its answer tokens.
SOLVED = 0.5
#: A head below this score does not retrieve, whatever its rank.
LEAST_SCORE = 0.1
#: Fewer heads than this make "the top 5 %" one head or none.
FEW_HEADS = 32

Head = tuple[int, int]
Progress = Callable[[int, int], None]
FORMAT = "headway retrieval heads 1"


class NoRetrievalHeadsError(HeadwayError):
    """A model has no heads that retrieve, so masking them would rank texts by noise. `scores` holds what was found."""

    def __init__(self, message: str, scores: HeadScores) -> None:
        super().__init__(message)
        self.scores = scores


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadScores:
    """Retrieval scores of every query head.

    `per_sample[s, l, h]` is the score on sample s of head h at `layers[l]`, NaN where a layer has fewer heads.
    `accuracy[s]` is the share of answer tokens that the model itself predicts. Exactly one of `threshold` and
    `fraction` says which heads are chosen. `excluded` are layers without heads that could be masked, `chance` the score
    of a head whose strongest key falls anywhere, `host` the model, `settings` how the probes were made."""

    layers: tuple[int, ...]
    per_sample: Float[np.ndarray, "samples layers heads"]
    accuracy: Float[np.ndarray, " samples"]
    threshold: float | None = None
    fraction: float | None = None
    chance: float = 0.0
    excluded: tuple[int, ...] = ()
    host: Fingerprint | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice(self.threshold, self.fraction)

    @property
    def solved(self) -> Bool[np.ndarray, " samples"]:
        """The samples that count."""
        return self.accuracy > SOLVED

    @property
    def scores(self) -> Float[np.ndarray, "layers heads"]:
        """The mean over solved samples; over all when none is."""
        return self.per_sample[self.solved if self.solved.any() else slice(None)].mean(0)

    @property
    def chosen(self) -> list[Head]:
        """The (layer, head) pairs, highest score first; equal ones by layer and head."""
        ranked = self.ranking()
        scores = self.scores
        if self.threshold is not None:
            return [pair for pair, score in ranked if score >= max(self.threshold, LEAST_SCORE)]
        assert self.fraction is not None
        count = math.ceil(self.fraction * int(np.isfinite(scores).sum()) - 1e-9)
        return [pair for pair, score in ranked[:count] if score >= LEAST_SCORE]

    def ranking(self) -> list[tuple[Head, float]]:
        """Every head with its score, highest first."""
        pairs = [
            ((layer, head), float(score))
            for layer, row in zip(self.layers, self.scores, strict=True)
            for head, score in enumerate(row)
            if np.isfinite(score)
        ]
        return sorted(pairs, key=lambda each: (-each[1], each[0]))

    @property
    def mean_accuracy(self) -> float:
        return float(self.accuracy.mean())

    def halves(self, seed: int = 0) -> Measurement:
        """Spearman's ρ over heads between the scores on even and on odd solved samples; NaN with fewer than two."""
        table = self.per_sample[self.solved] if self.solved.any() else self.per_sample
        if len(table) < 2:
            return Measurement(math.nan)
        heads = np.isfinite(table[0])
        first, second = table[::2].mean(0)[heads], table[1::2].mean(0)[heads]
        return rank_correlation(first, second, generator=torch.Generator().manual_seed(seed))

    def controls(self, draws: int = 20, seed: int = 0, *, later: bool = False) -> list[list[Head]]:
        """Random head sets as large as the chosen one, without chosen heads: from the same layers, or, with `later`,
        from these and the next ones where a layer has too few others."""
        draw = later_controls if later else matched_controls
        # Layers without heads (`excluded`) must not be drawn from, so layers are counted among those that have some.
        chosen = [(self.layers.index(layer), head) for layer, head in self.chosen]
        shape = (len(self.layers), self.per_sample.shape[2])
        drawn = draw(chosen, shape, torch.Generator().manual_seed(seed), draws=draws)
        return [[(self.layers[index], head) for index, head in control] for control in drawn]

    def warnings(self) -> list[str]:
        """What a reader of the chosen heads must know."""
        found = []
        finite = int(np.isfinite(self.scores).sum())
        if self.fraction is not None and finite < FEW_HEADS:
            found.append(
                f"The model has {finite} heads: {self.fraction:.0%} of them is {len(self.chosen)}, and heads stand in "
                "for one another. Choose by a threshold of the score."
            )
        if self.mean_accuracy < SOLVED:
            found.append(
                f"The model predicts {self.mean_accuracy:.0%} of the answer tokens; {int(self.solved.sum())} of "
                f"{len(self.accuracy)} samples count."
            )
        if self.excluded:
            found.append(
                f"Layers {', '.join(map(str, self.excluded))} have no attention heads and are neither scored nor "
                "masked."
            )
        return found

    def check(self, model: nn.Module) -> None:
        """Raises HostError, with the differences, when the scores were made on another model."""
        if self.host is not None:
            check_fingerprint(self.host, model, "heads")

    def require(self) -> HeadScores:
        """Itself. Raises NoRetrievalHeadsError when there is nothing to mask."""
        reason = None
        highest = float(np.nanmax(self.scores))
        if not self.solved.any():
            reason = (
                f"the model predicts {self.mean_accuracy:.0%} of the answer tokens and solves none of "
                f"{len(self.accuracy)} samples, expected it to copy"
            )
        elif highest < LEAST_SCORE:
            reason = f"the highest score is {highest:.2f}, expected at least {LEAST_SCORE}"
        elif not self.chosen:
            reason = f"the highest score is {highest:.2f}, below the threshold {self.threshold}"
        if reason is not None:
            raise NoRetrievalHeadsError(
                f"model: no retrieval heads detected: {reason}. Use a larger model, shorter probes or a lower "
                "threshold; a ranking without such heads would be one of noise.",
                self,
            )
        return self

    def to_json(self) -> str:
        """JSON text; NaN becomes null."""
        data = {
            "format": FORMAT,
            **{f: getattr(self, f) for f in ("layers", "threshold", "fraction", "chance", "excluded", "settings")},
            "chosen": self.chosen,
            "accuracy": self.accuracy.tolist(),
            "per_sample": _without_nan(self.per_sample.tolist()),
            "host": None if self.host is None else asdict(self.host),
        }
        return json.dumps(data, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> HeadScores:
        """What `to_json` wrote. Raises ArgumentError for anything else."""
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                raise KeyError("format")
            return cls(
                layers=tuple(data["layers"]),
                per_sample=np.array(data["per_sample"], dtype=float),
                accuracy=np.array(data["accuracy"], dtype=float),
                threshold=data["threshold"],
                fraction=data["fraction"],
                chance=data["chance"],
                excluded=tuple(data["excluded"]),
                host=None if data["host"] is None else Fingerprint.from_dict(data["host"]),
                settings=data["settings"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"text: got no retrieval heads ({error!r}), expected what HeadScores.to_json writes. Detect them again."
            ) from error


def detect_heads(
    model: nn.Module,
    tokenizer: Any,
    *,
    samples: int = 16,
    tokens: int = 512,
    threshold: float | None = None,
    fraction: float | None = None,
    seed: int = 0,
    key_length: int = KEY_LENGTH,
    text: str | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """Retrieval heads by `samples` probes of up to `tokens` tokens, whose sentences come from `text` (the default one).

    `threshold` takes every head with at least that score, `fraction` the highest share (0.05 when neither is given).
    `progress(done, samples)` is called after each sample. The paper has 800 samples of 4,096 tokens. Raises
    NoRetrievalHeadsError when the model does not copy, or no head scores enough."""
    positions = positions_of(model)
    if positions is not None and tokens > positions:
        raise ArgumentError(f"tokens: got {tokens:,}, expected at most {positions:,}, the positions of the model.")
    sentences = probe_sentences(default_text().text if text is None else text, tokenizer)
    probes = retrieval_probes(tokenizer, sentences, count=samples, tokens=tokens, seed=seed, key_length=key_length)
    settings = {"samples": samples, "tokens": tokens, "seed": seed, "key_length": key_length}
    return measure_heads(
        model, probes, threshold=threshold, fraction=fraction, settings=settings, progress=progress
    ).require()


def measure_heads(
    model: nn.Module,
    probes: Sequence[CopySample],
    *,
    threshold: float | None = None,
    fraction: float | None = None,
    settings: dict[str, Any] | None = None,
    progress: Progress | None = None,
) -> HeadScores:
    """The scores of every head on probes of any making, whether or not there are heads to choose."""
    if threshold is None and fraction is None:
        fraction = FRACTION
    check_choice(threshold, fraction)
    if not probes:
        raise ArgumentError("probes: got none, expected at least one.")
    right: list[float] = []
    tables: list[dict[int, np.ndarray]] = []
    with evaluating(model), torch.no_grad(), use(model) as handle:
        refuse_looking_ahead(model)
        for done, probe in enumerate(probes, 1):
            found, accuracy = _one(model, probe)
            tables.append(found)
            right.append(accuracy)
            if progress is not None:
                progress(done, len(probes))
        layers = tuple(sorted({site.layer for site in handle.sites if site.kind == "self"}))
    most = max(len(row) for row in tables[0].values())
    table = np.full((len(probes), len(layers), most), np.nan)
    for sample, found in enumerate(tables):
        for index, layer in enumerate(layers):
            table[sample, index, : len(found[layer])] = found[layer]
    total = getattr(model.config.get_text_config(), "num_hidden_layers", 0)  # type: ignore[operator,union-attr]
    return HeadScores(
        layers=layers,
        per_sample=table,
        accuracy=np.array(right),
        threshold=threshold,
        fraction=fraction,
        chance=float(np.mean([retrieval_chance(probe) for probe in probes])),
        excluded=tuple(sorted(set(range(total)) - set(layers))),
        host=fingerprint(model),
        settings=settings or {},
    )


def _one(model: nn.Module, probe: CopySample) -> tuple[dict[int, np.ndarray], float]:
    """The score of every head on one probe by layer, and the share of answer tokens that the model predicts."""
    ids = probe.ids.to(next(model.parameters()).device)
    rows = probe.answer_rows
    keeps = takes_logits_to_keep(model)
    with capture(model, CaptureSpec(what=("argmax",), rows=rows)) as scope:
        inputs = {"logits_to_keep": rows.to(ids.device)} if keeps else {}
        logits = model(input_ids=ids, use_cache=False, **inputs).logits[0]
    predicted = (logits if keeps else logits[rows.to(logits.device)]).argmax(-1).cpu()
    captured, scores = scope.result(), {}
    for name, site in captured.sites.items():
        if site.kind == "self":
            argmax = captured[name]["argmax"][0].long().cpu()
            scores[site.layer] = retrieval_score(argmax, probe.ids[0], probe.answer, probe.value_span).numpy()
    return scores, float((predicted == probe.answer).double().mean())


def retrieval_chance(probe: CopySample) -> float:
    """The score of a head whose strongest key falls on any visible key with equal probability."""
    start, stop = probe.value_span
    holding: Tensor = (probe.ids[0, start:stop] == probe.answer[:, None]).sum(1)
    return float((holding / (probe.answer_rows + 1)).mean())


def check_choice(threshold: float | None, fraction: float | None) -> None:
    """Raises ArgumentError unless exactly one of both is given, within (0, 1]."""
    if (threshold is None) == (fraction is None):
        got = "neither" if threshold is None else f"{threshold} and {fraction}"
        raise ArgumentError(f"threshold, fraction: got {got}, expected one of them. Pass fraction=0.05, say.")
    name, value = ("threshold", threshold) if threshold is not None else ("fraction", fraction)
    if value is None or not 0 < value <= 1:
        raise ArgumentError(f"{name}: got {value}, expected a number in (0, 1].")


def _without_nan(values: Any) -> Any:
    if isinstance(values, list):
        return [_without_nan(value) for value in values]
    return None if math.isnan(values) else values
