"""Piecewise linear regression in context, as a stream: pairs of vectors, then queries whose value is asked for.

    tokens [k_1; v_1; 0] … [k_n; v_n; 0] [q_1; 0; 1] … [q_m; 0; 1]  →  v at each query

The data are those of `headway.tasks.piecewise_regression`: every row has its own maps, so nothing can be learned but
how to fit the pairs of the row.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from headway.errors import ArgumentError
from headway.tasks.piecewise_regression import NOISE, PER_SEGMENT, QUERIES, SEGMENTS, SPREAD, piecewise_regression
from headway.train.losses import Loss
from headway.train.streams import Batch, Stream


@dataclass(kw_only=True)
class PiecewiseRegression(Stream):
    """`rows` sequences of `segments` × `per_segment` pairs of `dim` numbers each, and `queries` queries. A batch has
    `inputs` (rows, pairs + queries, width) and `targets` (rows, queries, dim), in float32."""

    name: ClassVar[str] = "piecewise-regression"

    dim: int = 8
    segments: int = SEGMENTS
    per_segment: int = PER_SEGMENT
    queries: int = QUERIES
    spread: float = SPREAD
    noise: float = NOISE
    rows: int = 32
    seed: int = 0
    position: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        if self.rows < 1 or self.queries < 1:
            raise ArgumentError(f"rows, queries: got {self.rows}, {self.queries}, expected at least 1 of each.")

    @property
    def width(self) -> int:
        """Numbers of a token: key, value, and whether it asks."""
        return 2 * self.dim + 1

    @property
    def length(self) -> int:
        return self.segments * self.per_segment + self.queries

    @property
    def chance(self) -> float:
        """Expected squared error of the answer 0, the best one without the row's pairs."""
        return 1 / self.dim

    def made_of(self) -> dict[str, Any]:
        return {"task": self.name} | {part.name: getattr(self, part.name) for part in fields(self) if part.compare}

    def batch(self, index: int) -> dict[str, Tensor]:
        # Held-out batches have negative numbers, which seeds cannot have: they get a stream of their own.
        state = np.random.SeedSequence([self.seed, int(index < 0), abs(index)]).generate_state(1, np.uint64)
        drawn = piecewise_regression(
            self.rows,
            self.dim,
            torch.Generator().manual_seed(int(state[0]) >> 1),
            segments=self.segments,
            per_segment=self.per_segment,
            queries=self.queries,
            spread=self.spread,
            noise=self.noise,
            dtype=torch.float32,
        )
        pairs = torch.cat([drawn.key, drawn.value, torch.zeros_like(drawn.key[..., :1])], 2)
        asked = torch.cat([drawn.query, torch.zeros_like(drawn.query), torch.ones_like(drawn.query[..., :1])], 2)
        return {"inputs": torch.cat([pairs, asked], 1), "targets": drawn.target}


def regression_loss(model: nn.Module, batch: Batch) -> Loss:
    """Mean squared error of a model (batch, tokens, width) → (batch, tokens, dim) at the last tokens, the queries."""
    if isinstance(batch, Tensor) or not {"inputs", "targets"} <= set(batch):
        got = "a tensor" if isinstance(batch, Tensor) else sorted(batch)
        raise ArgumentError(f"batch: got {got}, expected inputs and targets. PiecewiseRegression gives both.")
    targets = batch["targets"]
    found = model(batch["inputs"])[:, -targets.shape[1] :]
    if found.shape != targets.shape:
        raise ArgumentError(f"model: got {tuple(found.shape)} at the queries, expected {tuple(targets.shape)}.")
    return Loss(F.mse_loss(found.float(), targets), count=targets.shape[0])
