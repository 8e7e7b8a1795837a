"""Stratified samples of query rows, and what they say about all rows.

Rows are cut into contiguous strata of nearly equal length, from each of which the same number is drawn without
replacement. With N_s rows in stratum s, n_s of them drawn, the mean of a row statistic y is estimated without bias by

    ȳ = Σ_s (N_s / N) · ȳ_s ,   Var ȳ = Σ_s (N_s / N)² (1 − n_s/N_s) s_s² / n_s

(Cochran, Sampling Techniques, ch. 5). Where few strata hold most of the variance, few rows speak for it: the degrees of
freedom of the t interval are those of Satterthwaite (eq. 5.16), (Σ v_s)² / Σ v_s² / (n_s − 1) with v_s the terms of
Var ȳ. Three rows say little of the heavy tails of attention, so the same is done with groups of neighbouring strata
(collapsed strata, ch. 5A.12) in the place of s, and the wider of the two intervals is given. All rows drawn gives the
exact value with an interval of width zero.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from headway.errors import ArgumentError

#: Rows drawn per stratum: three give every stratum a variance with two degrees of freedom.
ROWS_PER_STRATUM = 3
#: Strata that share one estimate of the spread in the second of the two intervals.
STRATA_PER_GROUP = 8


@dataclass(frozen=True)
class RowSample:
    """Sorted row indices; `weight` is how many rows each one stands for, `stratum` which stratum it is from."""

    index: Int[Tensor, " rows"]
    weight: Float[Tensor, " rows"]
    stratum: Int[Tensor, " rows"]
    total: int

    @property
    def exact(self) -> bool:
        return self.index.numel() == self.total


@dataclass(frozen=True)
class Estimate:
    """A mean with its two-sided interval, elementwise over the leading dimensions of the row statistic."""

    mean: Float[Tensor, ...]
    low: Float[Tensor, ...]
    high: Float[Tensor, ...]


def all_rows(total: int) -> RowSample:
    """Every row, each standing for itself."""
    return RowSample(torch.arange(total), torch.ones(total), torch.arange(total), total)


def stratified_rows(total: int, sample: int, generator: torch.Generator | None = None) -> RowSample:
    """About `sample` of `total` rows, ROWS_PER_STRATUM from each contiguous stratum; all rows when `sample` ≥
    `total`."""
    if sample < 2 or total < 1:
        raise ArgumentError(f"sample: got {sample} of {total} rows, expected at least 2 rows. Ask for more rows.")
    if sample >= total:
        return all_rows(total)
    strata = max(sample // ROWS_PER_STRATUM, 1)
    edges = torch.linspace(0, total, strata + 1).round().long().tolist()
    index, weight, stratum = [], [], []
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        size = stop - start
        drawn = min(ROWS_PER_STRATUM, size)
        rows = torch.randperm(size, generator=generator)[:drawn].sort().values + start
        index.append(rows)
        weight.append(torch.full((drawn,), size / max(drawn, 1)))
        stratum.append(torch.full((drawn,), number))
    return RowSample(torch.cat(index), torch.cat(weight), torch.cat(stratum), total)


def estimate_mean(values: Float[Tensor, "... rows"], sample: RowSample, level: float = 0.95) -> Estimate:
    """The mean over all rows of a row statistic known on the sampled rows, with a Student-t interval of `level`.

    Rows whose statistic is NaN (nothing visible) are left out, strata re-weighted by their valid share."""
    values = values.double()
    if values.shape[-1] != sample.index.numel():
        raise ArgumentError(
            f"values: got {values.shape[-1]} rows, expected {sample.index.numel()} as in the sample. Pass the "
            "statistic of the sampled rows, in their order."
        )
    valid = ~values.isnan()
    filled = values.nan_to_num(0.0)
    if sample.exact:
        mean = filled.sum(-1) / valid.sum(-1)
        return Estimate(mean, mean, mean)
    device = values.device
    weights = sample.weight.to(device).double().expand_as(values)
    stratum = sample.stratum.to(device).expand_as(values)
    centre = _summed(filled, stratum) / _summed(valid.double(), stratum).clamp(min=1)
    size = _summed(weights * valid, stratum)
    mean = (size / size.sum(-1, keepdim=True) * centre).sum(-1)
    reach = torch.maximum(*(_reach(filled, valid, weights, stratum // size, level) for size in (1, STRATA_PER_GROUP)))
    return Estimate(mean, mean - reach, mean + reach)


def _reach(
    filled: Float[Tensor, "... rows"],
    valid: Bool[Tensor, "... rows"],
    weights: Float[Tensor, "... rows"],
    group: Int[Tensor, "... rows"],
    level: float,
) -> Float[Tensor, ...]:
    """Half the width of the t interval when the spread is taken within the given groups."""
    from scipy.stats import t

    count, size = _summed(valid.double(), group), _summed(weights * valid, group)
    drawn = count.clamp(min=1)
    centre = _summed(filled, group) / drawn
    spread = _summed(((filled - centre.gather(-1, group)) * valid) ** 2, group) / (count - 1).clamp(min=1)
    share = size / size.sum(-1, keepdim=True)
    part = share**2 * (1 - count / size.clamp(min=1)).clamp(min=0) * spread / drawn
    variance = part.sum(-1)
    freedom = (variance**2 / (part**2 / (count - 1).clamp(min=1)).sum(-1)).nan_to_num(1.0).clamp(min=1)
    quantile = torch.as_tensor(np.asarray(t.ppf(0.5 + level / 2, freedom.cpu().numpy())), device=filled.device)
    return quantile * variance.sqrt()


def _summed(x: Float[Tensor, "... rows"], group: Int[Tensor, "... rows"]) -> Float[Tensor, "... groups"]:
    """Sums over the rows of each group."""
    groups = int(group.max()) + 1
    return torch.zeros(*x.shape[:-1], groups, dtype=torch.float64, device=x.device).scatter_add_(-1, group, x)


def mean_of_samples(values: Float[Tensor, "samples ..."], level: float = 0.95) -> Estimate:
    """The mean over independent samples with a Student-t interval of `level`; of one sample the width is infinite."""
    from scipy.stats import t

    values = values.double()
    count, mean = values.shape[0], values.mean(0)
    if count < 2:
        return Estimate(mean, mean - torch.inf, mean + torch.inf)
    reach = float(t.ppf(0.5 + level / 2, count - 1)) * values.std(0) / count**0.5
    return Estimate(mean, mean - reach, mean + reach)
