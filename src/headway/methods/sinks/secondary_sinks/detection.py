"""Which tokens become sinks, at which layers, for how long: the primary sink's range, then every other token beside it.

    n_l = ‖h_b^l‖ ,  Δ_l = n_l − n_{l−1} ,  start = argmax Δ ,  end = argmin Δ after the start
    token t is flagged at layer l   when   t > b ,  start ≤ l < end  and  |cos(h_t^l, h_b^l)| > 0.9

`h_t^l` is the residual stream after layer l (the embedding is not a layer), b the primary position. Paper: arXiv
2512.22213. The released code always returns a range and keeps end = argmin Δ even where the norm never falls; here a
flat norm profile means "no primary sink found", and a norm that never falls means that the range ends with the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from headway.errors import ArgumentError, NumericError, unknown

#: Cosine above which a token counts as a sink (angle below 25.8°), from the paper.
THRESHOLD = 0.9
#: Candidate positions of the primary sink in plain text, and in text made by a chat template (released code).
PLAIN_CANDIDATES = (0, 1)
CHAT_CANDIDATES = (0, 1, 2)
#: A primary sink must jump by this many times the median norm of the other tokens; not in the paper.
MIN_JUMP = 2.0
#: The paper's label constants, tuned on models of 28 to 64 layers: bos_sink from L − 15 layers on, noise up to 4.
PAPER_MARGIN, PAPER_NOISE, PAPER_DEPTH = 15, 4, 28
#: For shallower models (inferred): bos_sink from 60 % of the layers on; below 24 layers noise is up to an eighth of
#: them.
SCALED_SHARE, SCALED_NOISE_DEPTH, SCALED_NOISE_PART = 0.6, 24, 8
LABELS = ("bos_sink", "secondary", "noise")
LIFETIMES = ("count", "longest_run")
RULES = ("auto", "paper", "scaled")
NO_PRIMARY = "no primary sink found"
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Primary:
    """The primary sink: its position, the layers [start, end) it lives in, the jump of its norm at `start`, and the
    median norm of the other tokens there."""

    position: int
    start: int
    end: int
    jump: float
    typical: float


@dataclass(frozen=True, kw_only=True)
class LabelRule:
    """A token is `bos_sink` from `primary_min` layers on, `noise` up to `noise_max` layers, `secondary` between."""

    primary_min: int
    noise_max: int

    def label(self, lifetime: int) -> str:
        if lifetime >= self.primary_min:
            return "bos_sink"
        return "secondary" if lifetime > self.noise_max else "noise"


@dataclass(frozen=True, kw_only=True)
class TokenSink:
    """One flagged token: the layers it is flagged at, and its level (start, lifetime) with its label."""

    position: int
    layers: tuple[int, ...]
    start: int
    lifetime: int
    label: str


@dataclass(frozen=True, kw_only=True)
class SinkMap:
    """Every flagged token of one text.

    `layers` and `tokens` are the sizes of what was searched; positions count real tokens from 0 (padding left out).
    `primary` is None where there is none, and `reason` says why or on what ground it was accepted. Pass `at(layer)` to
    anything that must protect tokens at certain layers."""

    layers: int
    tokens: int
    primary: Primary | None
    reason: str
    threshold: float
    lifetime: str
    rule: LabelRule
    candidates: tuple[int, ...]
    sinks: tuple[TokenSink, ...]

    def positions(self, *labels: str) -> list[int]:
        """Positions of the tokens with one of the labels (all flagged tokens when none is named), in order."""
        for label in labels:
            if label not in LABELS:
                raise unknown("labels", label, LABELS)
        return [s.position for s in self.sinks if not labels or s.label in labels]

    def at(self, layer: int, *labels: str) -> list[int]:
        """Positions flagged at one layer, with one of the labels when some are named."""
        if not 0 <= layer < self.layers:
            raise unknown("layer", layer, range(self.layers))
        chosen = set(self.positions(*labels))
        return [s.position for s in self.sinks if s.position in chosen and layer in s.layers]

    def flags(self) -> Bool[Tensor, "layers tokens"]:
        """True where a token is flagged at a layer."""
        flags = torch.zeros(self.layers, self.tokens, dtype=torch.bool)
        for sink in self.sinks:
            flags[list(sink.layers), sink.position] = True
        return flags

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, **json.loads(json.dumps(asdict(self)))}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> SinkMap:
        """The map that `to_dict` wrote. Raises ArgumentError when the data are something else."""
        try:
            check_format(data)
            return cls(
                layers=data["layers"],
                tokens=data["tokens"],
                primary=None if data["primary"] is None else Primary(**data["primary"]),
                reason=data["reason"],
                threshold=data["threshold"],
                lifetime=data["lifetime"],
                rule=LabelRule(**data["rule"]),
                candidates=tuple(data["candidates"]),
                sinks=tuple(TokenSink(**{**s, "layers": tuple(s["layers"])}) for s in data["sinks"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"data: got a dictionary that is no sink map ({error!r}), expected what SinkMap.to_dict writes. "
                "Run the detection again."
            ) from None

    @classmethod
    def from_json(cls, text: str) -> SinkMap:
        """The map that `to_json` wrote; see `from_dict`."""
        return cls.from_dict(parse_json(text, "SinkMap"))


def token_norms(hidden: Float[Tensor, "*leading width"]) -> Float[Tensor, "*leading"]:
    """‖h‖ in float32, so that massive activations of half-precision streams do not overflow."""
    return torch.linalg.vector_norm(hidden.float(), dim=-1)


def stream_cosines(
    hidden: Float[Tensor, "... tokens width"], reference: Float[Tensor, "... width"]
) -> Float[Tensor, "... tokens"]:
    """cos(h_t, reference) in float32; zero where either vector is zero."""
    unit = torch.nn.functional.normalize(reference.float(), dim=-1)
    return (torch.nn.functional.normalize(hidden.float(), dim=-1) @ unit[..., None])[..., 0]


def find_primary(
    hidden: Float[Tensor, "layers tokens width"] | Float[Tensor, "layers tokens"],
    candidates: Sequence[int] = PLAIN_CANDIDATES,
    *,
    min_jump: float = MIN_JUMP,
    span: tuple[int, int] | None = None,
) -> tuple[Primary | None, str]:
    """The primary sink and its layer range from the stream after each layer, or from its norms; and the reason.

    The candidate with the largest norm averaged over layers is taken; its range starts at the largest increase of the
    norm and ends (exclusive) at the most negative one after that, or with the model when none is negative. There is no
    primary sink when the increase is below `min_jump` × the median norm of the other tokens at that layer (0 accepts
    any increase, as the released code does). `span` gives layers [start, end) to examine instead of the ones found: a
    model may have an earlier, weaker sink range that the largest increase passes over."""
    norms = token_norms(hidden) if hidden.ndim == 3 else hidden.float()
    _check_norms(norms, candidates)
    layers, tokens = norms.shape
    if span is not None:
        return _given_range(norms, candidates, span)
    position = max(candidates, key=lambda c: float(norms[:, c].mean()))
    steps = norms[:, position].diff()
    start = int(steps.argmax()) + 1
    jump = float(steps[start - 1])
    typical = float(norms[start, [t for t in range(tokens) if t not in candidates]].median())
    if jump <= 0 or jump < min_jump * typical:
        return None, (
            f"{NO_PRIMARY}: the norm of position {position} rises by at most {jump:.4g} (layer {start}), less than "
            f"{min_jump:g} × the median norm {typical:.4g} of the other tokens there."
        )
    after = steps[start:]
    falls = after.numel() > 0 and float(after.min()) < 0
    end = int(after.argmin()) + start + 1 if falls else layers
    reason = (
        f"position {position} is the primary sink: its norm rises by {jump:.4g} at layer {start}, where the median "
        f"norm of the other tokens is {typical:.4g}, and {f'falls at layer {end}' if falls else 'never falls again'}."
    )
    return Primary(position=position, start=start, end=end, jump=jump, typical=typical), reason


def massive_spans(
    norms: Float[Tensor, "layers tokens"], primary: Primary, *, min_jump: float = MIN_JUMP
) -> list[tuple[int, int]]:
    """Layers [start, end) outside the primary's range in which its norm stands out as well: at least 1 + `min_jump`
    times the median norm of the other tokens, for two layers or more.

    The rule of the paper takes one range, from the largest rise; a model may raise its first token twice."""
    others = [t for t in range(norms.shape[1]) if t != primary.position]
    massive = norms[:, primary.position] >= (1 + min_jump) * norms[:, others].median(1).values
    massive[primary.start : primary.end] = False
    spans, start = [], None
    for layer, stands_out in enumerate([*massive.tolist(), False]):
        if stands_out and start is None:
            start = layer
        elif not stands_out and start is not None:
            if layer - start > 1:
                spans.append((start, layer))
            start = None
    return spans


def label_rule(layers: int, rule: str | LabelRule = "auto") -> LabelRule:
    """The label constants for a model of `layers` layers.

    "paper": bos_sink from L − 15 layers on, noise up to 4. "scaled": bos_sink from max(⌈0.6·L⌉, L − 15) on, noise up
    to 4 (below 24 layers max(1, L // 8)). "auto": the paper's from 28 layers on, scaled below."""
    if isinstance(rule, LabelRule):
        return rule
    if rule not in RULES:
        raise unknown("rule", rule, RULES)
    if rule == "paper" or (rule == "auto" and layers >= PAPER_DEPTH):
        return LabelRule(primary_min=layers - PAPER_MARGIN, noise_max=PAPER_NOISE)
    noise = PAPER_NOISE if layers >= SCALED_NOISE_DEPTH else max(1, layers // SCALED_NOISE_PART)
    return LabelRule(primary_min=max(math.ceil(SCALED_SHARE * layers), layers - PAPER_MARGIN), noise_max=noise)


def detect(
    hidden: Float[Tensor, "layers tokens width"],
    *,
    candidates: Sequence[int] = PLAIN_CANDIDATES,
    threshold: float = THRESHOLD,
    lifetime: str = "count",
    rule: str | LabelRule = "auto",
    min_jump: float = MIN_JUMP,
    span: tuple[int, int] | None = None,
) -> SinkMap:
    """Every token whose stream points along the primary sink's, by layer.

    `hidden` is the stream after each layer of one text. `lifetime` counts all flagged layers ("count", the paper) or
    the longest run of them ("longest_run", where the level starts with that run). `rule`: see `label_rule`; `min_jump`,
    `span`: see `find_primary`. Raises ArgumentError for fewer than two layers or too few tokens, NumericError for NaN
    or infinity."""
    primary, reason = find_primary(hidden, candidates, min_jump=min_jump, span=span)
    cosines = None if primary is None else stream_cosines(hidden, hidden[:, primary.position])
    return map_sinks(
        cosines,
        primary,
        reason,
        layers=hidden.shape[0],
        tokens=hidden.shape[1],
        candidates=candidates,
        threshold=threshold,
        lifetime=lifetime,
        rule=rule,
    )


def map_sinks(
    cosines: Float[Tensor, "layers tokens"] | None,
    primary: Primary | None,
    reason: str,
    *,
    layers: int,
    tokens: int,
    candidates: Sequence[int] = PLAIN_CANDIDATES,
    threshold: float = THRESHOLD,
    lifetime: str = "count",
    rule: str | LabelRule = "auto",
) -> SinkMap:
    """The sink map from cosines to the primary's stream, which streaming keeps; `detect` starts from whole streams."""
    if not 0 < threshold < 1:
        raise ArgumentError(f"threshold: got {threshold}, expected a cosine between 0 and 1, such as {THRESHOLD}.")
    if lifetime not in LIFETIMES:
        raise unknown("lifetime", lifetime, LIFETIMES)
    constants = label_rule(layers, rule)
    sinks: list[TokenSink] = []
    if primary is not None and cosines is not None:
        flags = cosines.abs() > threshold
        flags[: primary.start] = False
        flags[primary.end :] = False
        flags[:, : primary.position + 1] = False
        for position in flags.any(0).nonzero()[:, 0].tolist():
            flagged = tuple(flags[:, position].nonzero()[:, 0].tolist())
            start, length = (flagged[0], len(flagged)) if lifetime == "count" else longest_run(flagged)
            label = constants.label(length)
            sinks.append(TokenSink(position=position, layers=flagged, start=start, lifetime=length, label=label))
    return SinkMap(
        layers=layers,
        tokens=tokens,
        primary=primary,
        reason=reason,
        threshold=float(threshold),
        lifetime=lifetime,
        rule=constants,
        candidates=tuple(int(c) for c in candidates),
        sinks=tuple(sinks),
    )


def longest_run(layers: Sequence[int]) -> tuple[int, int]:
    """First layer and length of the longest run of consecutive layers (the first of several), from a sorted list."""
    best, start = (layers[0], 1), layers[0]
    for before, layer in pairwise(layers):
        start = start if layer == before + 1 else layer
        best = max(best, (start, layer - start + 1), key=lambda run: run[1])
    return best


def parse_json(text: str, kind: str) -> dict[str, Any]:
    """The dictionary in a JSON text; ArgumentError when it is not one."""
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"text: got invalid JSON ({error}), expected what {kind}.to_json writes.") from None
    if not isinstance(data, dict):
        raise ArgumentError(f"text: got {type(data).__name__}, expected what {kind}.to_json writes.")
    return data


def check_format(data: Mapping[str, Any]) -> None:
    if data.get("format") != FORMAT:
        raise ArgumentError(f"format: got {data.get('format')!r}, expected {FORMAT}. Run the detection again.")


def check_candidates(candidates: Iterable[int], tokens: int) -> None:
    """Raises ArgumentError unless there are candidates, none negative, and the text has a token after them."""
    candidates = tuple(candidates)
    if not candidates or min(candidates) < 0:
        raise ArgumentError(
            f"candidates: got {candidates}, expected positions from 0 on, such as {PLAIN_CANDIDATES} for plain text."
        )
    if tokens <= max(candidates) + 1:
        raise ArgumentError(
            f"tokens: got a text of {tokens}, expected at least {max(candidates) + 2}: the candidate positions "
            f"{candidates} and one token after them. Give a longer text."
        )


def _given_range(
    norms: Float[Tensor, "layers tokens"], candidates: Sequence[int], span: tuple[int, int]
) -> tuple[Primary, str]:
    start, end = span
    if not 0 <= start < end <= norms.shape[0]:
        raise ArgumentError(f"span: got {span}, expected 0 ≤ start < end ≤ {norms.shape[0]}, the layers to examine.")
    position = max(candidates, key=lambda c: float(norms[start:end, c].mean()))
    before = float(norms[start - 1, position]) if start else 0.0
    typical = float(norms[start, [t for t in range(norms.shape[1]) if t not in candidates]].median())
    jump = float(norms[start, position]) - before
    primary = Primary(position=position, start=start, end=end, jump=jump, typical=typical)
    return primary, f"layers {start} to {end - 1} were given; position {position} has the largest norm in them."


def _check_norms(norms: Float[Tensor, "layers tokens"], candidates: Sequence[int]) -> None:
    if norms.ndim != 2 or norms.shape[0] < 2:
        raise ArgumentError(
            f"hidden: got shape {tuple(norms.shape)}, expected (layers, tokens, width) or norms (layers, tokens) with "
            "at least two layers. Stack the outputs of all decoder layers of one text."
        )
    check_candidates(candidates, norms.shape[1])
    if not bool(torch.isfinite(norms).all()):
        layer = int((~torch.isfinite(norms)).any(1).nonzero()[0])
        raise NumericError(
            f"hidden: got NaN or infinity after layer {layer}, expected finite numbers. Check the weights of the "
            "model, or load it in float32 or bfloat16 (float16 overflows at massive activations)."
        )
