"""What InfiniRetri costs on this machine: reading by rows and early stop, and growth with the text.

Functions only; `benchmarks.run` lists what `make bench` runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import headway
from benchmarks.harness import compare
from headway.hosts import default_text
from headway.methods.long_context.infiniretri import HostRows, Settings, retrieve
from headway.tasks.samples import plain_ids

QUESTION = "What does the import statement do?"
#: Tokens of a pass and question rows of the scoring benchmarks.
TOKENS, ROWS = 2048, 32


def _host(**options: Any) -> tuple[Any, Any, list[int]]:
    model, tokenizer = headway.load("smollm2", **options)
    return model, tokenizer, plain_ids(tokenizer, default_text().text)


def _scored(rows: HostRows, ids: list[int]) -> Callable[[], Any]:
    return lambda: rows(ids, len(ids) - ROWS, len(ids))


def infiniretri_rows() -> None:
    """One scoring pass at 2,048 tokens by the question's rows of the last layer, against full maps of every layer
    (eager attention, as the released package scores), time and memory."""
    model, _, ids = _host()
    eager, _, _ = _host(attn_implementation="eager")
    part = ids[:TOKENS]
    inputs = torch.tensor([part])

    def full() -> torch.Tensor:
        with torch.no_grad():
            maps = eager(inputs, output_attentions=True, use_cache=False, logits_to_keep=1).attentions
        return maps[-1][0, :, -ROWS:].sum(0)

    with HostRows(model) as rows:
        worst = float((_scored(rows, part)() - full()).abs().max())
        compare(
            "infiniretri_rows",
            _scored(rows, part),
            full,
            labels=("question's rows of one layer", "full maps of every layer"),
            repeats=5,
            memory=True,
            settings={"model": "smollm2", "tokens": TOKENS, "rows": ROWS, "largest_difference": worst},
        )


def infiniretri_early_stop() -> None:
    """A pass that ends behind layer 18 of 30, against one that runs to the end."""
    model, _, ids = _host()
    part = ids[:TOKENS]
    with HostRows(model, layer=18) as short, HostRows(model, layer=18, early_stop=False) as whole:
        compare(
            "infiniretri_early_stop",
            _scored(short, part),
            _scored(whole, part),
            labels=("stop behind layer 18", "whole forward"),
            repeats=5,
            settings={"model": "smollm2", "tokens": TOKENS, "layer": 18},
        )


def infiniretri_linear() -> None:
    """Retrieval over 8,192 tokens of text against 4,096 (a ratio of 2 is linear), and against one forward of 8,192."""
    model, tokenizer, ids = _host(dtype="bfloat16")
    text = default_text().text
    characters = len(text) / len(ids)
    settings = Settings(window=1024, budget=512, layer=18)

    def read(tokens: int) -> Callable[[], Any]:
        part = text[: int(tokens * characters)]
        return lambda: retrieve(model, tokenizer, part, QUESTION, settings=settings)

    def forward() -> None:
        with torch.no_grad():
            model(torch.tensor([ids[:8192]]), use_cache=True, logits_to_keep=1)

    facts = {"model": "smollm2", "dtype": "bfloat16", "window": 1024, "budget": 512, "layer": 18}
    compare(
        "infiniretri_linear",
        read(8192),
        read(4096),
        labels=("8,192 tokens", "4,096 tokens"),
        repeats=3,
        memory=True,
        settings=facts,
    )
    compare(
        "infiniretri_prefill",
        read(8192),
        forward,
        labels=("InfiniRetri over 8,192 tokens", "dense prefill of 8,192"),
        repeats=3,
        memory=True,
        settings=facts,
    )
