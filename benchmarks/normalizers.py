"""What each normaliser and gate costs in the softmax layer, against the same layer with plain softmax."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import Comparison, compare, write_facts
from headway.methods.layers.softmax import SoftmaxAttention

WIDTH, HEADS, BATCH, TOKENS = 256, 4, 4, 512
#: The sheet's bound on the extra time of affine-scaled attention at 512 tokens.
AFFINE_BOUND = 1.10
#: Options of each layer; names that run fused come first.
LAYERS: dict[str, dict[str, Any]] = {
    "softmax_plus_one": {"normalizer": "softmax_plus_one"},
    "learned_denominator": {"normalizer": "learned_denominator"},
    "key_slot": {"normalizer": "key_slot"},
    "key_value_slot": {"normalizer": "key_value_slot"},
    "value_bias": {"normalizer": "value_bias"},
    "elastic_temperature": {"normalizer": "elastic", "normalizer_options": {"form": "temperature"}},
    "affine": {"normalizer": "affine"},
    "affine_length": {"normalizer": "affine", "normalizer_options": {"count": "length", "length": TOKENS}},
    "gate_head": {"gate": "head"},
    "gate_element": {"gate": "element"},
    "gate_value": {"gate": "value"},
    "clipped": {"normalizer": "clipped"},
    "elastic": {"normalizer": "elastic"},
    "softpick": {"normalizer": "softpick"},
    "sigmoid": {"normalizer": "sigmoid"},
    "elu": {"normalizer": "elu"},
    "kernel_elu": {"normalizer": "kernel_elu"},
    "kernel_mlp": {"normalizer": "kernel_mlp"},
}


def _layer(**options: Any) -> SoftmaxAttention:
    torch.manual_seed(0)
    return SoftmaxAttention(WIDTH, heads=HEADS, **options)


def _forward(layer: SoftmaxAttention, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        with torch.no_grad():
            layer(x)

    return run


def _both_passes(layer: SoftmaxAttention, x: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        layer(x)[0].sum().backward()

    return run


def _against_softmax(name: str, passes: str, make: Callable[..., Callable[[], None]]) -> Comparison:
    x = torch.randn(BATCH, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0))
    return compare(
        f"normalizer_{name}_{passes}",
        make(_layer(**LAYERS[name]), x),
        make(_layer(), x),
        labels=(name, "softmax"),
        repeats=9,
        warmup=2,
        settings={"width": WIDTH, "heads": HEADS, "batch": BATCH, "tokens": TOKENS, "passes": passes},
    )


def normalizer_forward() -> None:
    """A layer of 4 heads of 64 over 512 tokens, forward, with each normaliser and gate against plain softmax."""
    ratios = {name: _against_softmax(name, "forward", _forward).ratio for name in LAYERS}
    write_facts("normalizer_forward", {"tokens": TOKENS, "ratios": {name: r.to_dict() for name, r in ratios.items()}})


def normalizer_training() -> None:
    """The same, forward and backward."""
    ratios = {name: _against_softmax(name, "training", _both_passes).ratio for name in LAYERS}
    within = ratios["affine"].value <= AFFINE_BOUND
    print(f"affine-scaled within {AFFINE_BOUND:.0%} of softmax: {within}")
    facts = {name: r.to_dict() for name, r in ratios.items()}
    write_facts("normalizer_training", {"tokens": TOKENS, "ratios": facts, "affine_within_bound": within})


def normalizer_explicit() -> None:
    """Learned denominator and key slot by one extra column of the fused kernel against explicit weights, 2,048 tokens:
    what the algebra saves, in time and memory."""
    x = torch.randn(1, 2048, WIDTH, generator=torch.Generator().manual_seed(0))
    for name in ("learned_denominator", "key_slot", "affine"):
        layer = _layer(**LAYERS[name]).eval()

        def explicit(layer: SoftmaxAttention = layer) -> None:
            with torch.no_grad():
                layer(x, mode="reference")

        compare(
            f"normalizer_{name}_fused",
            _forward(layer, x),
            explicit,
            labels=(f"{name}, fused", f"{name}, explicit weights"),
            repeats=5,
            memory=True,
            settings={"width": WIDTH, "heads": HEADS, "tokens": 2048},
        )


def normalizer_decode() -> None:
    """32 decode steps behind 4,096 tokens: affine-scaled with its running sum of values against softmax."""
    x = torch.randn(1, 4096, WIDTH, generator=torch.Generator().manual_seed(0))
    steps = torch.randn(1, 32, WIDTH, generator=torch.Generator().manual_seed(1))

    def decoding(**options: Any) -> Callable[[], None]:
        layer = _layer(**options).eval()
        with torch.no_grad():
            _, start = layer(x, state=layer.init_state(1))

        def run() -> None:
            state = start
            with torch.no_grad():
                for token in steps.split(1, 1):
                    _, state = layer(token, state=state)

        return run

    compare(
        "normalizer_affine_decode",
        decoding(normalizer="affine"),
        decoding(),
        labels=("affine", "softmax"),
        repeats=5,
        settings={"width": WIDTH, "heads": HEADS, "keys": 4096, "steps": 32},
    )


NORMALIZERS = (normalizer_forward, normalizer_training, normalizer_explicit, normalizer_decode)
