"""What the numbers of a selection say, in sentences, and what to know before trusting them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from headway.select.records import ONE_DOMAIN
from headway.select.result import CorpusSelection
from headway.statistics import rank_correlation

#: Columns of the sample that influence is held against.
COLUMNS = {"length": 1, "repetition": 2, "base loss": 3}
#: A correlation that is worth a warning.
STRONG = 0.5
#: Resamples of the intervals of correlations, and fewest records for one.
RESAMPLES, LEAST = 200, 10
#: Fewer ranked records than this make a share of a domain a matter of a few.
FEW = 20


def correlations(sample: Sequence[Sequence[float]], seed: int) -> dict[str, list[float]]:
    """Spearman's ρ of influence with length, repetition and base loss over the sample, within domains: ranks are taken
    inside each domain, so that differences between domains do not count."""
    rows = np.asarray(sample, float).reshape(-1, 6)
    if len(rows) < LEAST:
        return {}
    influence = _ranks_within(rows[:, 0], rows[:, 4])
    found = {}
    for name, column in COLUMNS.items():
        measured = rank_correlation(
            influence,
            _ranks_within(rows[:, column], rows[:, 4]),
            generator=torch.Generator().manual_seed(seed),
            resamples=RESAMPLES,
        )
        low, high = (measured.value if bound is None else bound for bound in (measured.low, measured.high))
        found[name] = [measured.value, low, high]
    return found


def _ranks_within(values: np.ndarray, domains: np.ndarray) -> np.ndarray:
    """Average ranks inside each domain, scaled to (0, 1)."""
    from scipy import stats

    ranks = np.zeros(len(values))
    for domain in np.unique(domains):
        here = domains == domain
        ranks[here] = stats.rankdata(values[here]) / (here.sum() + 1)
    return ranks


def conclude(found: CorpusSelection) -> tuple[list[str], list[str]]:
    """Findings and warnings."""
    return _findings(found), [*_about_domains(found), *_about_records(found), *_about_controls(found)]


def _findings(found: CorpusSelection) -> list[str]:
    tokens, kept = sum(d.tokens for d in found.domains), sum(d.selected_tokens for d in found.domains)
    count = len(found.domains)
    where = "of the corpus" if count == 1 else f"of each of {count:,} domains"
    findings = [
        f"{found.selected:,} of {found.ranked:,} ranked records are kept, the top {percent(found.run['share'])} "
        f"{where}: "
        f"{kept:,} of {tokens:,} tokens ({percent(kept / tokens if tokens else math.nan)})."
    ]
    if not found.selected:
        return findings
    all_, own = found.total("influence", "ranked"), found.total("selected_influence", "selected")
    masked = f"{len(found.heads)} head{'s' if len(found.heads) > 1 else ''}"
    findings.append(
        f"{signed(own)} is how much masking {masked} changes the loss on kept records on average, "
        f"{signed(all_)} on all."
    )
    lengths = found.total("length", "ranked"), found.total("selected_length", "selected")
    findings.append(
        f"{lengths[1] / lengths[0]:.2f}\u00a0× as long as the average record is a kept one ({lengths[1]:,.0f} tokens)."
    )
    known = [c for c in found.controls if math.isfinite(_number(c["control"]))]
    if known:
        chosen = float(np.mean([c["chosen"] for c in known]))
        controls = [c["control"] for c in known]
        spread = f" ({signed(min(controls))} to {signed(max(controls))})" if len(controls) > 1 else ""
        findings.append(
            f"{signed(chosen)} with these heads, {signed(float(np.mean(controls)))}{spread} with as many other heads "
            f"from the same layers on, on {known[0]['records']} records scored with both."
        )
    return findings


def _about_domains(found: CorpusSelection) -> list[str]:
    warnings = []
    if len(found.domains) == 1 and found.domains[0].name == ONE_DOMAIN and found.run["domain_field"] is None:
        warnings.append(
            "All records are one domain. Losses differ in scale between kinds of text, and scores compare only within "
            "one: where the corpus is mixed, name the field that tells with --domain-field, or @folder or @file."
        )
    few = [d.name for d in found.domains if 0 < d.ranked < FEW]
    if few:
        warnings.append(
            f"{len(few):,} {'domain has' if len(few) == 1 else 'domains have'} fewer than {FEW} ranked records "
            f"({', '.join(few[:5])}{', …' if len(few) > 5 else ''}): the choice there hangs on a few."
        )
    empty = [d.name for d in found.domains if d.ranked == 0]
    if empty:
        warnings.append(f"{len(empty):,} domains have no record that can be ranked ({', '.join(empty[:5])}).")
    return warnings


def _about_records(found: CorpusSelection) -> list[str]:
    warnings = []
    flags: Counter[str] = Counter()
    for domain in found.domains:
        flags.update(domain.flags)
    short = flags.pop("short", 0)
    if short:
        warnings.append(
            f"{short:,} of {found.records:,} records have fewer than {found.run['floor']} tokens to predict. Their "
            "scores are mostly noise: they are in the scores file and not ranked (--floor 0 ranks them)."
        )
    if flags:
        listed = ", ".join(f"{name} {number:,}" for name, number in sorted(flags.items()))
        warnings.append(f"Flags on records: {listed}. The scores file has them by record.")
    bad, copies = found.left_out.get("bad", 0), found.left_out.get("copy", 0)
    if bad:
        warnings.append(
            f"{bad:,} of {found.corpus['rows']:,} rows could not be used and were skipped, as asked: "
            f"{'; '.join(found.left_out['named'])}. All are in {found.left_out['file']}."
        )
    if copies:
        warnings.append(
            f"{copies:,} records are copies of earlier ones and were left out; {found.left_out['file']} lists them."
        )
    ignored = found.left_out.get("ignored", [])
    if ignored:
        warnings.append(
            f"{len(ignored):,} files are of no kind that is read and were passed by: {', '.join(ignored[:5])}."
        )
    for name, (value, *_) in found.correlations.items():
        if name != "base loss" and abs(value) > STRONG:
            fix = " --repetition-weight takes repetition off." if name == "repetition" else ""
            warnings.append(
                f"Influence goes with {name} (Spearman ρ {value:.2f}".replace("-", "−")
                + f" within domains): the choice is partly one by {name}.{fix}"
            )
    return warnings


def _about_controls(found: CorpusSelection) -> list[str]:
    if not found.controls:
        return ["No control heads were scored, so nothing here says that it is these heads."]
    warnings = []
    beaten = [c for c in found.controls if _number(c["control"]) >= _number(c["chosen"])]
    if beaten:
        warnings.append(
            f"{len(beaten)} of {len(found.controls)} sets of other heads change the loss as much as the chosen heads "
            "do: the scores are not about retrieval alone."
        )
    alike = [c["correlation"] for c in found.controls if _number(c["correlation"]) > STRONG]
    if alike:
        warnings.append(
            f"Other heads rank the records much as the chosen ones do (Spearman ρ up to {max(alike):.2f}): part of the "
            "order is not about retrieval."
        )
    return warnings


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def percent(share: float) -> str:
    return f"{100 * share:.3g}\u00a0%" if math.isfinite(share) else "–"


def signed(share: float) -> str:
    """A relative change in percent with its sign."""
    return f"{100 * share:+.2f}\u00a0%".replace("-", "−") if math.isfinite(share) else "–"
