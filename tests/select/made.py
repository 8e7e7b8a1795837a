"""A selection without a model, for pages and round trips."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from headway.select.conclusions import conclude
from headway.select.result import CorpusSelection, DomainResult, Example


def domain(name: str, **changes: Any) -> DomainResult:
    fields: dict[str, Any] = {
        "name": name, "records": 32, "ranked": 30, "selected": 6, "threshold": 0.21, "tokens": 3000,
        "selected_tokens": 700, "influence": 0.1, "selected_influence": 0.3, "length": 100.0, "selected_length": 117.0,
        "base_loss": 2.5, "selected_base_loss": 2.1, "repetition": 0.05, "selected_repetition": 0.08,
        "flags": {"short": 2},
    }  # fmt: skip
    return DomainResult(**fields | changes)


def made() -> CorpusSelection:
    random = np.random.default_rng(0)
    lengths, repeated = random.integers(64, 400, 60).tolist(), (random.random(60) * 0.2).tolist()
    sample = [[0.1 * (n % 7) - 0.2, float(lengths[n]), repeated[n], 2.5, n % 2, float(n % 5 == 0)] for n in range(60)]
    example = Example(
        domain="law", id="r<1>", place="a.jsonl:3", end="high", influence=0.4, base_loss=2.0, masked_loss=2.8,
        tokens=120, repetition=0.1, text="A <img src=x onerror=alert(1)> text.",
    )  # fmt: skip
    found = CorpusSelection(
        model={"name": "tiny", "layers": 3, "heads": 4, "kv_heads": 2, "parameters": 1000, "dtype": "float32"},
        corpus={"given": ["corpus"], "files": 2, "rows": 64, "scored": 64, "megabytes": 0.1, "sha256": "0"},
        heads=[[1, 2]],
        head_scores=np.round(random.random((3, 4)), 3).tolist(),
        domains=[domain("law"), domain("<b>code</b>", selected=0, threshold=math.nan, selected_influence=math.nan)],
        sample=sample,
        correlations={"length": [0.6, 0.4, 0.8], "repetition": [0.1, -0.1, 0.3], "base loss": [-0.2, -0.4, 0.0]},
        examples=[example],
        controls=[{"heads": [[1, 0]], "records": 32, "chosen": 0.1, "control": 0.02, "correlation": 0.3}],
        left_out={
            "bad": 1,
            "copy": 2,
            "named": ["line 3 of a.jsonl: not JSON"],
            "file": "left_out.jsonl",
            "ignored": [],
        },
        files={"scores": "scores.jsonl", "selected": "selected.jsonl"},
        run={"share": 0.2, "domain_field": "kind", "floor": 64, "date": "2026-01-01", "engine": "local"},
    )
    found.findings, found.warnings = conclude(found)
    return found
