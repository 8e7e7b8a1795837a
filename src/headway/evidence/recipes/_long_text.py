"""What the recipes of cache policies share: a host with a long text, and ratios of perplexities with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.evidence.recipe import Context
from headway.statistics import Measurement, bootstrap_difference

#: Neighbouring tokens are not independent draws; blocks of so many nearly are.
BLOCK = 64


def host_and_text(name: str, tokens: int, *, positions: int | None = None) -> tuple[Any, Tensor, int]:
    """A model, the first `tokens` tokens of the default text, and the id of a line break. "tiny" is a random host on
    random tokens: it shows that a measurement runs, and nothing else. Large hosts go to the GPU in bfloat16."""
    if name == "tiny":
        from headway.hosts.tiny import tiny_host

        model, _ = tiny_host("llama", max_position_embeddings=positions or tokens)
        return model, torch.randint(8, 100, (1, tokens), generator=torch.Generator().manual_seed(0)), 8
    from headway.hosts import default_text, load, tokenize
    from headway.tasks.samples import plain_ids

    large = name not in ("smollm2",)
    model, tokenizer = load(name, device="cuda" if large else "cpu", dtype="bfloat16" if large else "float32")
    ids = tokenize(tokenizer, default_text(), tokens, allow_longer=True).to(model.device)
    return model, ids, plain_ids(tokenizer, "\n")[-1]


def no_gpu(size: str) -> str | None:
    """Why the paper's own size cannot run here."""
    if size == "full" and not torch.cuda.is_available():
        return "its model has billions of parameters and there is no GPU. Run --size small."
    return None


def perplexity_ratio(
    context: Context, name: str, method: Sequence[float], baseline: Sequence[float], *, block: int = BLOCK
) -> Measurement:
    """PPL(method) / PPL(baseline) from per-token nll of the same tokens, with a paired bootstrap over blocks."""
    means = [_block_means(nll, block) for nll in (method, baseline)]
    found = bootstrap_difference(*means, paired=True, generator=context.generator(name))
    low, high = (x if x is None else _exp(x) for x in (found.low, found.high))
    exact = _exp(float(np.mean(method)) - float(np.mean(baseline)))
    return Measurement(exact, low, high, n=found.n, unit="×")


def perplexity_of(nll: Sequence[float]) -> float:
    return _exp(float(np.mean(nll)))


def _block_means(nll: Sequence[float], block: int) -> np.ndarray:
    """Means of consecutive blocks; single tokens where there are too few for two of them."""
    values = np.asarray(nll, dtype=float)
    size = block if values.size >= 2 * block else 1
    whole = values.size // size * size
    return values[:whole].reshape(-1, size).mean(1)


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf
