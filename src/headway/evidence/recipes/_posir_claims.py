"""The claims of the PosIR recipe: criteria, and how numbers answer them. What had been seen before stands in notes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import stats

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, between, interval_excludes
from headway.evidence.recipe import Context
from headway.statistics import Measurement, bootstrap, bootstrap_difference

FLAT = "50 at 0.7"
#: Level for the least p-value of four buckets.
OF_FOUR = 0.05 / 4
ABLE = at_least(0.4, of="ndcg", by="value", label="nDCG@10")
LEARNED = at_least(0.6, of="own", by="value", label="nDCG@10 of each encoder where it was trained")

CRITERIA = {
    "chance-is-taken-off": all_of(
        at_least(0.2, by="value", label="raw index of a flat truth, 50 queries a bin"),
        between(-0.03, 0.03, of="corrected", by="value", label="index beyond chance of flat truths"),
        at_most(0.1, of="alarms", by="value", label="share of flat truths called an effect"),
    ),
    "even-words-are-flat": all_of(
        at_least(OF_FOUR, label="least p-value of the four buckets"),
        at_most(1e-9, of="moved", label="slope of moved answers"),
        requires=ABLE,
    ),
    "bm25-is-flat": at_least(OF_FOUR, label="least p-value of BM25's four buckets", requires=ABLE),
    "cut-is-recovered": all_of(
        at_least(0.99, label="index of the third and fourth bucket, the lesser"),
        at_most(0.05, of="behind", by="value", label="nDCG of answers behind the cut"),
        at_least(0.3, of="corrected", label="five-bin index beyond chance, fourth bucket"),
        at_most(0.0, of="rise", label="rise of nDCG from any bucket to the next"),
    ),
    "directions-are-recovered": all_of(
        at_least(1.0, label="share of planted directions recovered"),
        at_least(1.0, of="order", label="ρ of decay and index beyond chance, the lesser of both signs"),
        at_most(0.01, of="p", label="largest p-value of the strongest decays"),
    ),
    "trained-bias-is-found": all_of(
        at_least(0.0, label="index beyond chance of the early encoder minus twice that of the other"),
        at_least(0.2, of="early", label="five-bin index beyond chance of the early encoder, longest documents"),
        at_least(1.0, of="primacy", label="share of early encoders found to prefer the start"),
        requires=LEARNED,
    ),
    "trained-alike-on-short": at_least(0.8, label="nDCG ratio on the shortest documents", requires=LEARNED),
    "saliency-shows-the-trained-bias": interval_excludes(
        0.0, side="above", label="first-fifth saliency of the early encoder above the other's", requires=LEARNED
    ),
    "minilm-prefers-the-start": interval_excludes(
        0.0, side="below", minimum_n=100, label="slope of nDCG over the place, longest documents read whole"
    ),
    "minilm-bias-grows": at_least(
        0.1, by="value", label="five-bin index beyond chance, longest read whole minus shortest documents"
    ),
    "minilm-falls-with-length": at_most(
        0.8, by="value", label="nDCG of the longest documents read whole over the shortest"
    ),
    "minilm-moved-answers": all_of(
        interval_excludes(0.0, side="below", label="slope of the cosine within a document"),
        at_most(1e-9, of="bm25", label="slope of BM25 within a document"),
    ),
    "minilm-cut-is-a-cut": at_most(0.05, by="value", label="nDCG of answers behind the 512th token"),
    "real-bm25-is-flat": at_least(OF_FOUR, label="least p-value of BM25's four buckets", requires=ABLE),
    "minilm-saliency-agrees": interval_excludes(
        0.0, side="above", label="first-fifth minus last-fifth saliency, answers in the middle"
    ),
    "saliency-is-bounded": all_of(
        at_most(1.0, label="bytes kept with 12 documents over those with 2, two at once"),
        at_most(2.1, of="twice", label="bytes kept four at once over two at once"),
        at_most(1e-3, of="apart", label="largest difference of curves, four at once and one by one"),
    ),
}


def chance_claim(chance: dict[str, Any]) -> Claim:
    every = [value for one in chance.values() for value in one["corrected"]]
    alarms = [value for one in chance.values() for value in one["alarms"]]
    raw = chance[FLAT]["raw"]
    return Claim(
        id="chance-is-taken-off",
        statement="Without any effect of the position the index is far above zero; beyond chance it is not.",
        paper=PaperValue("not reported: the index is given without a null"),
        measured=Measurement(float(np.mean(raw)), n=len(raw)),
        criterion=CRITERIA["chance-is-taken-off"],
        others={
            "corrected": Measurement(float(np.mean(every)), n=len(every)),
            "alarms": Measurement(float(np.mean(alarms)), n=len(alarms)),
        },
        details={name: {"raw": float(np.mean(one["raw"])), "95 %": float(np.quantile(one["raw"], 0.95))}
                 for name, one in chance.items()},
    )  # fmt: skip


def words_claims(words: dict[str, Any]) -> list[Claim]:
    encoders = words["encoders"]
    even, cut = encoders["even"], encoders["cut"]
    directed = {name: one["overall"] for name, one in encoders.items() if name.startswith("decay")}
    strongest = [max((n for n in directed if ("-" in n) == back), key=_decay) for back in (False, True)]
    right = [_direction(one) == ("primacy" if _decay_signed(n) > 0 else "recency") for n, one in directed.items()]
    sides = [
        {n: one for n, one in directed.items() if ("-" in n) == back} | {"decay 0": even["overall"]}
        for back in (False, True)
    ]
    falls = [one["ndcg"] for one in cut["buckets"] if one]
    return [
        _flat_claim(
            "even-words-are-flat",
            "Words pooled evenly show no effect of the position in any bucket.",
            even,
            {"moved": Measurement(abs(words["moved"]))},
        ),
        _flat_claim("bm25-is-flat", "BM25 shows no effect of the position on the same documents.", encoders["bm25"]),
        Claim(
            id="cut-is-recovered",
            statement="An encoder that reads 256 words never finds what stands behind them, and the index is 1.",
            paper=PaperValue("not reported"),
            measured=Measurement(min(_value(one, "psi") for one in cut["buckets"][2:])),
            criterion=CRITERIA["cut-is-recovered"],
            others={
                "behind": _mean(cut["behind"]),
                "corrected": Measurement(_excess(cut["buckets"][-1], "wide")),
                "rise": Measurement(max(np.diff(falls).max(), 0.0) if len(falls) > 1 else float("nan")),
            },
            details={"nDCG by bucket": falls, "reading": cut["reading"]},
        ),
        Claim(
            id="directions-are-recovered",
            statement="Planted primacy and recency are told by the sign, and the index beyond chance grows with "
            "the decay.",
            paper=PaperValue("primacy is common, some models show recency", where="abstract"),
            measured=Measurement(float(np.mean(right)), n=len(right)),
            criterion=CRITERIA["directions-are-recovered"],
            others={
                "order": _orders(sides, lambda one: _excess(one, "psi")),
                "order_with_chance": _orders(sides, lambda one: _value(one, "psi")),
                "order_of_five_bins": _orders(sides, lambda one: _excess(one, "wide")),
                "p": Measurement(max(_value(directed[name], "wide", "p_value") for name in strongest)),
            },
            details={n: {f: _excess(one, f) for f in ("psi", "linear", "wide")} for n, one in directed.items()},
            notes="The order is asked of the index beyond chance, which had given 0.4 before: so asked, the claim "
            "failed. Two other forms stood here, the five-bin index beyond chance, which failed at 0.8, and then the "
            "index with chance in it, which held at 1 and was recorded; both stand beside it.",
        ),
    ]  # fmt: skip


def toy_claims(context: Context, toys: Sequence[dict[str, Any]]) -> list[Claim]:
    own = {"own": Measurement(min(one["own"] for t in toys for one in t.values()), n=2 * len(toys))}
    early, even = ([_excess(t[arm]["buckets"][-1], "wide") for t in toys] for arm in ("early", "anywhere"))
    first = [[v for t in toys for v in t[arm]["first"]] for arm in ("early", "anywhere")]
    short = [_ndcg(t["early"]["buckets"][0]) / max(_ndcg(t["anywhere"]["buckets"][0]), 1e-9) for t in toys]
    primacy = [_direction(t["early"]["buckets"][-1]) == "primacy" for t in toys]
    note = (
        "Both encoders see the same documents and differ in which of three facts is asked for. A trial of one seed "
        "with longer documents had shown 0.64 beyond chance for the early encoder, 0.01 for the other, and a ratio of "
        "0.71 on the shortest. A run of 450 steps, after which the other encoder reached only 0.48 where it was "
        "trained, had shown 0.68, −0.01 and 0.68; the steps were then raised, the criteria were not touched."
    )
    return [
        Claim(
            id="trained-bias-is-found",
            statement="An encoder trained with early answers is sensitive to the position, its twin is not.",
            paper=PaperValue("not reported"),
            measured=Measurement(min(e - 2 * max(a, 0.0) for e, a in zip(early, even, strict=True)), n=len(toys)),
            baseline=Measurement(max(even), n=len(toys)),
            criterion=CRITERIA["trained-bias-is-found"],
            others=own
            | {"early": Measurement(min(early), n=len(toys)), "primacy": Measurement(float(np.mean(primacy)))},
            notes=note,
        ),
        Claim(
            id="trained-alike-on-short",
            statement="On the shortest documents the two find about equally well.",
            paper=PaperValue("not reported"),
            measured=Measurement(min(short), n=len(toys)),
            criterion=CRITERIA["trained-alike-on-short"],
            others=own,
            notes=note,
        ),
        Claim(
            id="saliency-shows-the-trained-bias",
            statement="With answers in the middle, the gradient of the early encoder lies more in the first fifth.",
            paper=PaperValue("saliency uncovers what drives the preference", where="abstract"),
            measured=bootstrap_difference(*first, paired=True, generator=context.generator("first")),
            baseline=bootstrap(first[1], generator=context.generator("even")),
            criterion=CRITERIA["saliency-shows-the-trained-bias"],
            others=own,
            notes=note,
        ),
    ]


def real_claims(context: Context, real: dict[str, Any]) -> list[Claim]:
    buckets = real["minilm"]["buckets"]
    short, long = buckets[0], buckets[2]
    trial = (
        "A run of the command on 120 documents of the text was seen before the criteria were written: nDCG 0.59 for "
        "the shortest and 0.10 for the longest that are read whole, a slope of −0.22 there, −0.055 for moved answers, "
        "0.05 where documents are cut, 16 % of the gradient in the first fifth, 20 % in the last, BM25 0.83, no effect."
    )
    slopes = {name: Measurement.from_dict(one["slope"]) for name, one in real["moved"].items()}
    bm25 = slopes.pop("bm25")
    moved = next(iter(slopes.values()))
    slope = Measurement(float("nan"), n=0)
    if long and long["slope"]:
        low, high = long["slope_interval"]
        slope = Measurement(long["slope"]["value"], low, high, n=long["queries"])
    grows = _excess(long, "wide") - _excess(short, "wide")
    behind = real["minilm"]["behind"]
    return [
        Claim(
            id="minilm-prefers-the-start",
            statement="MiniLM finds late answers less often.",
            paper=PaperValue("most models exhibit primacy bias", where="abstract"),
            measured=slope,
            criterion=CRITERIA["minilm-prefers-the-start"],
            notes=trial,
            details={"minilm": real["minilm"], "bm25": real["bm25"]},
        ),
        Claim(
            id="minilm-bias-grows",
            statement="The bias is larger in longer documents.",
            paper=PaperValue("bge-m3: .228 to .396; Qwen3-Embedding-0.6B: .100 to .393", "Q1 and Q4, English"),
            measured=Measurement(grows),
            criterion=CRITERIA["minilm-bias-grows"],
            notes=trial,
            others={"short": Measurement(_excess(short, "wide")), "long": Measurement(_excess(long, "wide"))},
        ),
        Claim(
            id="minilm-falls-with-length",
            statement="Long documents are found less often than short ones.",
            paper=PaperValue("bge-m3: .660 to .343", "Q1 and Q4, English"),
            measured=Measurement(_ndcg(long) / max(_ndcg(short), 1e-9)),
            criterion=CRITERIA["minilm-falls-with-length"],
            notes=trial,
            others={"short": Measurement(_ndcg(short)), "long": Measurement(_ndcg(long))},
        ),
        Claim(
            id="minilm-moved-answers",
            statement="The same sentence counts less to MiniLM where it stands later in the same document.",
            paper=PaperValue("not reported"),
            measured=moved,
            baseline=bm25,
            criterion=CRITERIA["minilm-moved-answers"],
            others={"bm25": Measurement(abs(bm25.value), n=bm25.n)},
            notes=trial,
            details=real["moved"],
        ),
        Claim(
            id="minilm-cut-is-a-cut",
            statement="Answers behind the 512 tokens that MiniLM reads are not found.",
            paper=PaperValue("not reported"),
            measured=_mean(behind),
            criterion=CRITERIA["minilm-cut-is-a-cut"],
            notes=trial,
        ),
        _flat_claim(
            "real-bm25-is-flat", "BM25 shows no effect of the position on the same prose.", real["bm25"], notes=trial
        ),
        Claim(
            id="minilm-saliency-agrees",
            statement="With answers in the middle, MiniLM's gradients lean to the start, as its scores do.",
            paper=PaperValue("saliency uncovers what drives the preference", where="abstract"),
            measured=bootstrap_difference(
                real["first"], real["last"], paired=True, generator=context.generator("saliency")
            ),
            criterion=CRITERIA["minilm-saliency-agrees"],
            notes=trial,
            details={"saliency": real["curve"], "attention": real["attention"]},
        ),
    ]


def memory_claim(memory: dict[str, Any]) -> Claim:
    kept = memory["kept"]
    return Claim(
        id="saliency-is-bounded",
        statement="What saliency keeps in memory depends on the batch and not on the number of documents.",
        paper=PaperValue("not reported: one document at a time"),
        measured=Measurement(kept["12 by 2"] / kept["2 by 2"]),
        criterion=CRITERIA["saliency-is-bounded"],
        others={
            "twice": Measurement(kept["12 by 4"] / kept["12 by 2"]),
            "apart": Measurement(memory["apart"]),
        },
        details=kept,
    )


def _flat_claim(
    name: str, statement: str, one: dict[str, Any], others: dict[str, Measurement] | None = None, notes: str = ""
) -> Claim:
    known = [_value(bucket, "psi", "p_value") for bucket in one["buckets"] if bucket and bucket["psi"]]
    return Claim(
        id=name,
        statement=statement,
        paper=PaperValue("not reported"),
        measured=Measurement(min(known, default=float("nan")), n=len(known)),
        criterion=CRITERIA[name],
        others={"ndcg": Measurement(one["overall"]["mean"])} | (others or {}),
        notes=notes,
        details={"beyond chance": [_excess(bucket, "psi") for bucket in one["buckets"]]},
    )


def _mean(scores: Sequence[float]) -> Measurement:
    return bootstrap(scores, generator=0) if len(scores) else Measurement(float("nan"), n=0)


def _value(one: dict[str, Any] | None, form: str, part: str = "value") -> float:
    return float(one[form][part]) if one and one[form] else float("nan")


def _excess(one: dict[str, Any] | None, form: str) -> float:
    return _value(one, form) - _value(one, form, "null_mean")


def _ndcg(one: dict[str, Any] | None) -> float:
    return float(one["ndcg"]) if one else float("nan")


def _direction(one: dict[str, Any] | None) -> str:
    if not one or not one["slope"] or one["slope"]["p_value"] >= 0.05:
        return "none"
    return "primacy" if one["slope"]["value"] < 0 else "recency"


def _decay_signed(name: str) -> float:
    return float(name.removeprefix("decay "))


def _decay(name: str) -> float:
    return abs(_decay_signed(name))


def _orders(sides: Sequence[dict[str, Any]], index: Callable[[dict[str, Any]], float]) -> Measurement:
    """The lesser order of both directions."""
    return Measurement(min(_order(side, index) for side in sides))


def _order(ones: dict[str, dict[str, Any]], index: Callable[[dict[str, Any]], float]) -> float:
    """ρ of decay and an index."""
    pairs = [(_decay(name), index(one)) for name, one in ones.items()]
    if any(not np.isfinite(value) for _, value in pairs):
        return float("nan")
    return float(np.round(stats.spearmanr(*zip(*pairs, strict=True)).statistic, 12))
