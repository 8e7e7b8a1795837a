"""What the affine-scaled recipe trains: paired tiny language models on bytes, and heads on trigger averaging.

Every arm of a language model starts from the same weights as softmax with that seed, where it has the same ones, and
reads the same batches in the same order. The planted task is `headway.tasks.trigger_averaging`; several seeds train
side by side, the seed being the leading dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.kernels.normalizers.affine import affine_weights, scale_of, updated_average
from headway.kernels.normalizers.softmax_family import softmax_weights
from headway.methods.sinks.affine_scaled import (
    FirstTokenReading,
    gradient_steadiness,
    measure_scales,
    mixer_options,
)
from headway.statistics import generator_of, mixed_seed
from headway.tasks.trigger_averaging import (
    EVALUATION,
    HEAD_DIM,
    ITEMS,
    WIDTH,
    TriggerAttention,
    TriggerBatch,
    data_generators,
    judge,
    trigger_batch,
)
from headway.tasks.trigger_averaging import train as train_trigger

#: Normaliser and gates of each arm of the language model.
LM_ARMS: dict[str, dict[str, Any]] = {
    "base": {},
    "denominator": {"normalizer": "learned_denominator"},
    "affine": mixer_options(),
    "sigmoid": mixer_options(activation="sigmoid"),
    "gated": {"gate": "element"},
    "affine_gated": mixer_options(gated=True),
}
TRIGGER_ARMS = ("softmax", "affine", "affine_length", "scale_only", "head_gate")
#: Steps over which the paper counts gradient norms.
EARLY = 500
#: Streams of randomness of a seed: the batches of a language model, the scales of a head of the planted task.
BATCHES, SCALES = 1, 2
#: Share of the text that no training batch reads.
HELD_OUT = 0.1
#: The token behind the bytes that opens a sequence.
OPENER = 256


@dataclass(frozen=True, kw_only=True)
class LMSettings:
    """Sizes of the language models and of their training. `arms` are names of `LM_ARMS`; with `opener` every sequence
    starts with one token of its own, which small models make a sink of."""

    arms: tuple[str, ...]
    seeds: int
    width: int
    layers: int
    heads: int
    tokens: int
    batch: int
    steps: int
    warmup: int
    validation: int
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    opener: bool = False


def byte_text(characters: int | None = None) -> Int[Tensor, " bytes"]:
    """The bytes of the default text."""
    from headway.hosts import default_text

    return torch.tensor(list(default_text().text[:characters].encode()), dtype=torch.long)


def unigram_entropy(text: Int[Tensor, " bytes"]) -> float:
    """Nats per byte of always guessing by frequency: the loss of a model that has learned nothing of order."""
    share = torch.bincount(text, minlength=256).double() / len(text)
    return float(torch.special.entr(share).sum())


def run_language_model(arm: str, seed: int, settings: LMSettings, text: Int[Tensor, " bytes"]) -> dict[str, Any]:
    """Trains one arm with one seed, and measures it on held-out text."""
    from headway.door import observe
    from headway.train import train

    model = _model(arm, seed, settings)
    cut = int(len(text) * (1 - HELD_OUT))

    def batch(number: int) -> Int[Tensor, "batch tokens"]:
        generator = generator_of(BATCHES, seed, number)
        starts = torch.randint(cut - settings.tokens, (settings.batch,), generator=generator)
        return opened(torch.stack([text[s : s + settings.tokens] for s in starts.tolist()]), settings)

    trained = train(
        model,
        batch,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        schedule="wsd",
        warmup=settings.warmup,
        seed=seed,
    )
    held = text[cut:]
    count = min(settings.validation, len(held) // settings.tokens)
    windows = opened(held[: count * settings.tokens].view(count, settings.tokens), settings)
    model.eval()
    reading = FirstTokenReading()
    with torch.no_grad(), observe(model, reading):
        losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(16)]
    sites = reading.result()
    steadiness = gradient_steadiness(trained.column("gradient_norm")[:EARLY])
    return {
        "validation": sum(losses) / count,
        "training": trained.loss,
        "variation": steadiness.variation,
        "variance": steadiness.variance,
        "spikes": steadiness.spikes,
        **{
            name: float(torch.stack([getattr(site, name) for site in sites]).mean())
            for name in ("raw", "share", "mass", "entropy", "negative")
        },
        "largest_share": float(torch.stack([site.share for site in sites]).max()),
        "parameters": sum(p.numel() for p in model.parameters()),
        "scales": asdict(measure_scales(model, input_ids=windows[:16]))
        if "normalizer_options" in LM_ARMS[arm]
        else None,
    }


def opened(windows: Int[Tensor, "batch tokens"], settings: LMSettings) -> Int[Tensor, "batch tokens"]:
    """The windows behind the opener, where there is one; the last token is pushed out."""
    if not settings.opener:
        return windows
    return torch.cat([torch.full_like(windows[:, :1], OPENER), windows[:, :-1]], 1)


def _model(arm: str, seed: int, settings: LMSettings) -> Any:
    from headway.models import HeadwayConfig, HeadwayForCausalLM

    def make(options: dict[str, Any]) -> Any:
        torch.manual_seed(mixed_seed(seed))
        config = HeadwayConfig(
            vocab_size=OPENER + settings.opener,
            width=settings.width,
            layers=settings.layers,
            heads=settings.heads,
            mixer="softmax",
            mixer_options=options,
        )
        return HeadwayForCausalLM(config)

    model, base = make(LM_ARMS[arm]), make({})
    with torch.no_grad():
        own = dict(model.named_parameters())
        for name, parameter in base.named_parameters():
            own[name].copy_(parameter)
    return model


class ScaledTrigger(TriggerAttention):
    """The head of the planted task with affine-scaled weights, their scale alone, or a gate on its output.

    α and the gate read the same input as the projections; ᾱ is one number per seed."""

    average: Tensor

    def __init__(self, seeds: Sequence[int], arm: str) -> None:
        super().__init__(seeds)
        self.normalizer = arm
        generators = [generator_of(SCALES, seed) for seed in seeds]
        self.scale = nn.Parameter(torch.stack([0.02 * torch.randn(WIDTH, generator=g) for g in generators]))
        self.register_buffer("average", torch.zeros(len(seeds)))

    def forward(
        self, inputs: Float[Tensor, "seeds sequences items width"], *, without_first: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (self.project(name, inputs) for name in ("query", "key", "value"))
        items = inputs.shape[2]
        visible = torch.ones(items, items, dtype=torch.bool).tril()
        if without_first:
            visible[1:, 0] = False
        weights = softmax_weights(query @ key.transpose(-1, -2) * HEAD_DIM**-0.5, visible[None, None])
        logits = (inputs * self.scale[:, None, None]).sum(-1)
        attended = weights @ value
        if self.normalizer == "head_gate":
            return self.project("output", attended * logits.sigmoid()[..., None]), weights, value
        if self.normalizer == "softmax":
            return self.project("output", attended), weights, value
        alpha = scale_of(logits).transpose(0, 1)
        if self.training:
            self.average.copy_(updated_average(self.average, alpha))
        weights = affine_weights(
            weights.transpose(0, 1),
            visible[None, None],
            alpha,
            None if self.normalizer == "scale_only" else self.average,
            length=ITEMS if self.normalizer == "affine_length" else None,
        ).transpose(0, 1)
        return self.project("output", weights @ value), weights, value


def run_trigger(
    arm: str, seeds: Sequence[int], *, steps: int, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Trains one head per seed, and tells what it does with item 0 at unflagged items: raw weight and share."""
    model = ScaledTrigger(seeds, arm)
    generators = data_generators(seeds)
    train_trigger(model, generators, steps=steps, progress=progress)
    model.eval()
    batch = trigger_batch(generators, EVALUATION)
    found = judge(model, batch, seeds=seeds, steps=steps)
    return {
        "error": [e / c for e, c in zip(found.error, found.chance_error, strict=True)],
        "eviction": found.eviction_ratio,
        "value_ratio": found.value_ratio,
        "average": model.average.tolist(),
        **_first_item(model, batch),
    }


@torch.no_grad()
def _first_item(model: ScaledTrigger, batch: TriggerBatch) -> dict[str, list[float]]:
    """w_0, |w_0| / Σ|w| and Σw at unflagged items behind item 0, per seed."""
    _, weights, _ = model(batch.inputs)
    unflagged = ~batch.flags
    unflagged[:, :, 0] = False
    size = weights.abs().sum(-1).clamp(min=torch.finfo(weights.dtype).tiny)
    parts = {"raw": weights[..., 0], "share": weights[..., 0].abs() / size, "mass": weights.sum(-1)}
    return {name: ((x * unflagged).sum((1, 2)) / unflagged.sum((1, 2))).tolist() for name, x in parts.items()}


def uniform_first_share(tokens: int) -> float:
    """What the first token gets of attention spread evenly: the mean of 1/i over rows 2 … tokens."""
    return math.fsum(1 / i for i in range(2, tokens + 1)) / (tokens - 1)
