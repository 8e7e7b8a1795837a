"""What a training step of a whole model costs, each mixer beside softmax attention at equal width."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.harness import compare
from headway.models import HeadwayConfig, HeadwayForCausalLM, mixers

TOKENS, FIELDS = 1024, {"vocab_size": 256, "layers": 2, "heads": 4, "width": 256}
#: Where a mixer has no default for what it must be told.
OPTIONS: dict[str, dict[str, Any]] = {
    "titans_mac": {"segment": 256},
    "titans_mag": {"window": 256},
    "titans_mal": {"window": 256},
}


def _step(mixer: str) -> Callable[[], None]:
    torch.manual_seed(0)
    model = HeadwayForCausalLM(HeadwayConfig(**FIELDS, mixer=mixer, mixer_options=OPTIONS.get(mixer, {})))
    ids = torch.randint(256, (1, TOKENS), generator=torch.Generator().manual_seed(0))

    def run() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()

    return run


def model_training() -> None:
    """Forward and backward of a model of two layers over 1,024 tokens: every mixer against softmax, equal width."""
    for mixer in mixers():
        if mixer == "softmax":
            continue
        found = compare(
            f"model_training_{mixer}",
            _step(mixer),
            _step("softmax"),
            labels=(mixer, "softmax"),
            repeats=5,
            settings={**FIELDS, **OPTIONS.get(mixer, {}), "tokens": TOKENS},
        )
        ours, softmax = (TOKENS / statistics.median(times) for times in (found.method, found.baseline))
        print(f"{mixer}: {ours:,.0f} tokens/s, softmax {softmax:,.0f}")
