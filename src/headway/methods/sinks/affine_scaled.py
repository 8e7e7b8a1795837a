"""Affine-scaled attention: softmax weights scaled per token and head, and shifted so that rows may sum to anything.

    w_tj = α_t P_tj + (ᾱ − α_t) / N_t ,   α_t = clip(0.1 · x_t W_α + 0.5, 0, 1)

It is a normaliser (`headway.kernels.normalizers`, name "affine") of the softmax mixer and so of every model here:

    HeadwayConfig(mixer="softmax", mixer_options=mixer_options())
    HeadwayConfig(mixer="softmax", mixer_options=mixer_options("paper", length=2048))

Paper: Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention, arXiv 2602.23057; no released code.
The text leaves N_t open. The default counts the visible keys, so that decoding agrees with reading at once, and each
row sums to ᾱ. "paper" takes one N for all rows, the length of a training sequence: only then do the sums of rows vary
as in its figures. β is added at visible keys alone, or it would reopen the mask. Other variants of the same paper:
`activation="sigmoid"`, and a gate on the output beside it (`gated=True`).

A weight that the scale made small is no sink that is gone: the raw weight on the first token falls with α while its
share |w_1| / Σ|w| stays. `FirstTokenReading` reports both, and the mass; judge by the share.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.card import Card
from headway.door.call import AttentionCall, Site
from headway.door.stages import Observer
from headway.errors import ArgumentError, InterceptionError, unknown
from headway.kernels.normalizers import AffineScaled
from headway.kernels.normalizers.affine import saturation, scale_of
from headway.kernels.weighing import weighed_entropy

CARD = Card(
    slug="affine-scaled-attention",
    title="Affine-Scaled Attention: Towards Flexible and Stable Transformer Attention",
    year=2026,
    arxiv="2602.23057",
    family="sinks",
    stages=("Mixer", "Observer"),
    needs=("training, or fine-tuning from start='identity'",),
    knobs={
        "count": "whether N is the visible keys of a row or one number",
        "activation": "linear clipping or a sigmoid for α",
        "decay": "how slowly the running mean of α follows",
        "start": "W_α near zero, at zero, or such that the layer is softmax",
        "shift": "whether β is there at all",
    },
    summary="Trains attention whose rows need not sum to one: a scale and a shift per token and head on softmax "
    "weights, at width × heads more parameters per layer.",
)

FORMS = ("default", "paper")
#: Query rows per block of the observer.
ROWS = 128
#: Multiples of the median absolute deviation above which the paper calls a gradient norm a spike.
SPIKES = (6.0, 9.0)


def mixer_options(
    form: str = "default", *, length: int | None = None, gated: bool = False, **options: Any
) -> dict[str, Any]:
    """Options of the softmax mixer for affine-scaled attention: `mixer_options=` of a model.

    form "default" or "paper", which needs `length`, the tokens of a training sequence. `gated` adds the gate on every
    channel of the output. Further options are those of `AffineScaled`."""
    if form not in FORMS:
        raise unknown("form", form, FORMS)
    if form == "paper" and length is None:
        raise ArgumentError("length: got None for form='paper', expected the tokens of a training sequence: it is N.")
    published = {"count": "length", "length": length} if form == "paper" else {}
    found: dict[str, Any] = {"normalizer": "affine", "normalizer_options": {**published, **options}}
    return {**found, "gate": "element"} if gated else found


def scaled_layers(model: nn.Module) -> dict[str, AffineScaled]:
    """The affine normalisers of a model by module name. Raises ArgumentError when there is none."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, AffineScaled)}
    if not found:
        raise ArgumentError(
            f"model: got {type(model).__name__} without affine-scaled attention, expected a model built with "
            "mixer_options=mixer_options()."
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Scales:
    """What the scales of a model do on an input, by layer: `std` over all tokens and heads, `mean`, the running mean
    ᾱ of each head, and the share of scales at 0 or 1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    average: tuple[tuple[float, ...], ...]
    saturated: tuple[float, ...]


@contextmanager
def watching_scales(model: nn.Module) -> Iterator[dict[str, list[Float[Tensor, "batch heads tokens"]]]]:
    """Inside, every forward adds the scales of each affine layer to the lists that are given. Padding included."""
    layers = scaled_layers(model)
    found: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keeper(name: str) -> Any:
        def keep(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            z = output.detach().float() + layers[name].offset
            found[name].append(scale_of(z, layers[name].activation).transpose(1, 2))

        return keep

    hooks = [layer.map.register_forward_hook(keeper(name)) for name, layer in layers.items()]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def measure_scales(model: nn.Module, **inputs: Any) -> Scales:
    """Runs the model once, in evaluation mode, and tells what its scales were. `inputs` are those of its forward."""
    training = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with watching_scales(model) as found:
            model(**inputs)
    finally:
        for module, mode in training:
            module.training = mode
    alphas = [torch.cat(parts, 0) for parts in found.values()]
    return Scales(
        mean=tuple(float(a.mean()) for a in alphas),
        std=tuple(float(a.std()) for a in alphas),
        average=tuple(tuple(layer.average.tolist()) for layer in scaled_layers(model).values()),
        saturated=tuple(saturation(a) for a in alphas),
    )


@dataclass(frozen=True, kw_only=True)
class GradientSteadiness:
    """How steady gradient norms were: standard deviation over mean, variance, and spikes above median + k·MAD."""

    variation: float
    variance: float
    spikes: dict[float, int]


def gradient_steadiness(norms: Sequence[float], multiples: Sequence[float] = SPIKES) -> GradientSteadiness:
    """Of the gradient norms of consecutive steps. MAD is the median of |x − median|, not scaled."""
    values = torch.tensor(list(norms), dtype=torch.float64)
    if values.numel() < 2 or not bool(torch.isfinite(values).all()):
        raise ArgumentError(f"norms: got {values.numel()} numbers, expected at least two, all finite.")
    median = values.quantile(0.5)
    deviation = (values - median).abs().quantile(0.5)
    return GradientSteadiness(
        variation=float(values.std() / values.mean()),
        variance=float(values.var()),
        spikes={k: int((values > median + k * deviation).sum()) for k in multiples},
    )


@dataclass(frozen=True, kw_only=True)
class SiteReading:
    """What a site gives its first token, a number per head: means over later rows that see it.

    raw: w_1 as it is, of any sign; share: |w_1| / Σ|w|; mass: Σ w; entropy: of |w| / Σ|w| in nats; negative: share of
    visible weights below zero."""

    site: Site
    raw: Float[Tensor, " heads"]
    share: Float[Tensor, " heads"]
    mass: Float[Tensor, " heads"]
    entropy: Float[Tensor, " heads"]
    negative: Float[Tensor, " heads"]


@dataclass(frozen=True, kw_only=True)
class FirstTokenReading(Observer):
    """Weight, share, mass and entropy of any kind of weights, block by block. The first token of a sequence is its
    first visible key, so padding is left out; packed documents are not told apart."""

    reads_weights = True
    _found: dict[str, tuple[Site, Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self"

    def start(self) -> None:
        self._found.clear()

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        if call.first_query not in (None, call.first_key) or call.keys != call.queries:
            raise InterceptionError(
                f"{call.site.name}: got {call.queries} rows over {call.keys} keys, expected whole sequences. Run the "
                "model without a cache."
            )
        sums, counts = torch.zeros(5, call.heads, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        rows = torch.arange(call.queries, device=call.query.device)
        seen_by_any = torch.cat([call.visible(block).any(2, keepdim=True) for block in rows.split(ROWS)], 2).any(2)
        first = seen_by_any.any(1).long().argmax(-1)
        for block in rows.split(ROWS):
            visible = call.visible(block).expand(call.query.shape[0], -1, -1, -1)
            weights = call.weights(block)
            batch_first = first.expand(weights.shape[0])
            at = batch_first[:, None, None, None].expand(-1, call.heads, block.numel(), 1)
            sees = visible.expand_as(weights).gather(-1, at)[..., 0] & (block > batch_first[:, None])[:, None]
            size = weights.abs().sum(-1)
            raw = weights.gather(-1, at)[..., 0]
            parts = (
                raw,
                raw.abs() / size.clamp(min=torch.finfo(size.dtype).tiny),
                weights.sum(-1),
                weighed_entropy(weights),
                (weights < 0).sum(-1) / visible.sum(-1).clamp(min=1),
            )
            for number, part in enumerate(parts):
                sums[number] += torch.where(sees, part, 0.0).sum((0, 2)).double().cpu()
            counts += sees[:, 0].sum().double().cpu()
        site, before, count = self._found.get(call.site.name, (call.site, torch.zeros_like(sums), torch.zeros(1)))
        self._found[call.site.name] = site, before + sums, count + counts

    def result(self) -> list[SiteReading]:
        names = ("raw", "share", "mass", "entropy", "negative")
        return [
            SiteReading(site=site, **dict(zip(names, (sums / count).float(), strict=True)))
            for site, sums, count in sorted(self._found.values(), key=lambda entry: entry[0].layer)
        ]
