"""Sink levels over a corpus: how many tokens start to be sinks at which layer, and for how long.

    level = (start, lifetime) ;  table[level] = number of tokens ;  heat map = ln(1 + n)

In large models the levels cluster at a few points (the paper finds three in one 32B model, six in a 14B one).
Paper: arXiv 2512.22213.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from headway.errors import ArgumentError, unknown
from headway.methods.sinks.secondary_sinks.detection import FORMAT, LABELS, SinkMap, check_format, parse_json


@dataclass(frozen=True, kw_only=True)
class LevelTable:
    """Counts of tokens over (start, lifetime).

    `labels` says which tokens are counted, `texts` and `tokens` how much text was searched. `setting` is what must
    agree before two tables may be merged: threshold, way of counting lifetimes, label constants, candidate
    positions."""

    layers: int
    labels: tuple[str, ...]
    counts: dict[tuple[int, int], int]
    texts: int
    tokens: int
    setting: dict[str, Any]

    @classmethod
    def of(cls, sinks: SinkMap, labels: Sequence[str] = ("secondary",)) -> LevelTable:
        """The table of one text. Its counts add up to the number of tokens that carry one of the labels."""
        for label in labels:
            if label not in LABELS:
                raise unknown("labels", label, LABELS)
        counts = Counter((s.start, s.lifetime) for s in sinks.sinks if s.label in labels)
        setting = {
            "threshold": sinks.threshold,
            "lifetime": sinks.lifetime,
            "primary_min": sinks.rule.primary_min,
            "noise_max": sinks.rule.noise_max,
            "candidates": list(sinks.candidates),
        }
        return cls(
            layers=sinks.layers,
            labels=tuple(labels),
            counts=dict(sorted(counts.items())),
            texts=1,
            tokens=sinks.tokens,
            setting=setting,
        )

    @classmethod
    def merge(cls, *tables: LevelTable) -> LevelTable:
        """One table for several texts. Raises ArgumentError when they were made with different settings: text from a
        chat template, for one, has other candidate positions than plain text and must not be mixed with it."""
        if not tables:
            raise ArgumentError("tables: got none, expected at least one level table.")
        first = tables[0]
        for table in tables[1:]:
            for name in ("layers", "labels", "setting"):
                if getattr(table, name) != getattr(first, name):
                    raise ArgumentError(
                        f"tables: got {name} {getattr(table, name)} beside {getattr(first, name)}, expected the same "
                        "in all. Detect with one setting, on text made in one way."
                    )
        counts: Counter[tuple[int, int]] = Counter()
        for table in tables:
            counts.update(table.counts)
        return cls(
            layers=first.layers,
            labels=first.labels,
            counts=dict(sorted(counts.items())),
            texts=sum(t.texts for t in tables),
            tokens=sum(t.tokens for t in tables),
            setting=first.setting,
        )

    @property
    def total(self) -> int:
        """How many tokens are counted."""
        return sum(self.counts.values())

    def common(self, number: int | None = None) -> list[tuple[tuple[int, int], int]]:
        """The levels with their counts, most frequent first (earlier levels first among equals)."""
        return sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))[:number]

    def starts(self) -> dict[int, int]:
        """Number of counted tokens by the layer that creates them."""
        starts: Counter[int] = Counter()
        for (start, _), count in self.counts.items():
            starts[start] += count
        return dict(sorted(starts.items()))

    def heat(self) -> Float[Tensor, "layers lifetimes"]:
        """ln(1 + n) by start (row) and lifetime (column; column 0 stays empty), for a heat map."""
        heat = torch.zeros(self.layers, self.layers + 1)
        for (start, lifetime), count in self.counts.items():
            heat[start, lifetime] = count
        return heat.log1p()

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "layers": self.layers,
            "labels": list(self.labels),
            "levels": [{"start": s, "lifetime": n, "tokens": c} for (s, n), c in self.counts.items()],
            "texts": self.texts,
            "tokens": self.tokens,
            "setting": dict(self.setting),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LevelTable:
        """The table that `to_dict` wrote. Raises ArgumentError when the data are something else."""
        try:
            check_format(data)
            return cls(
                layers=data["layers"],
                labels=tuple(data["labels"]),
                counts={(level["start"], level["lifetime"]): level["tokens"] for level in data["levels"]},
                texts=data["texts"],
                tokens=data["tokens"],
                setting=dict(data["setting"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ArgumentError(
                f"data: got a dictionary that is no level table ({error!r}), expected what LevelTable.to_dict writes. "
                "Count the levels again."
            ) from None

    @classmethod
    def from_json(cls, text: str) -> LevelTable:
        """The table that `to_json` wrote; see `from_dict`."""
        return cls.from_dict(parse_json(text, "LevelTable"))
