"""Secondary sinks: in a model where they are planted, in the law that gives their life, and in a real model.

Paper: arXiv 2512.22213. The planted model (`headway.tasks.planted_sinks`) has a known answer for every claim about
detection, origin, trigger and intervention. The real model is SmolLM2 (small) or the paper's 14 B model (full). A model
may raise its first token in more than one range of layers, of which the paper's rule takes one; the claims about a real
model are measured in the range with the most secondary sinks, and those in the primary's own range are reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from headway.door import capture
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, between, equals
from headway.evidence.recipe import Context, Recipe
from headway.methods.sinks.secondary_sinks import (
    LevelTable,
    Primary,
    SecondarySinks,
    SinkMap,
    analyse,
    analyse_rows,
    lifetime_law,
    norm_for_lifetime,
    read_streams,
    rescale_writes,
    simulate_lifetimes,
)
from headway.methods.sinks.secondary_sinks.detection import MIN_JUMP
from headway.methods.sinks.secondary_sinks.stream import Scan
from headway.statistics import Measurement, bootstrap, bootstrap_ratio
from headway.tasks.planted_sinks import ORDINARY, VOCABULARY, PlantedSinks, planted_sinks

#: Lifetimes, in layers, whose norms are swept: eight that fit between the first creation layer and the range's end.
SWEPT_LIVES = (0.5, 2.0, 3.5, 5.0, 6.5, 8.0, 9.5, 11.0)
#: Norms of the simulated law, each with σ = 2 and 256 dimensions.
LAW_NORMS = (20.0, 40.0, 80.0, 160.0)
LAW_WRITE, LAW_WIDTH = 2.0, 256
#: Levels that may hold nearly all secondary sinks: the paper counts three in one model and six in another.
FEW_LEVELS = 3
#: Problems for the generations of the full size, in the manner of the paper's mathematics sets.
PROBLEMS = (
    "How many positive integers below 1000 are divisible by 7 but by neither 2 nor 5?",
    "The roots of x^2 - px + 36 = 0 are positive integers. Find the sum of all possible values of p.",
    "A fair die is thrown until the total reaches at least 4. What is the expected number of throws?",
    "In triangle ABC, AB = 13, BC = 14 and CA = 15. Find the radius of the circle through the midpoints of the sides.",
)

_FOUND = at_least(MIN_JUMP, of="primary", label="primary jump ÷ median norm")

CRITERIA = {
    "planted-detection": all_of(
        equals(1, 0, label="precision"),
        equals(1, 0, of="recall", label="recall"),
        equals(1, 0, of="start", label="share with the exact first layer"),
        equals(1, 0, of="range", label="share of primary ranges that are exact"),
    ),
    "same-ids-stay-clean": at_most(0, label="share of unflagged trigger ids that are called sinks"),
    "planted-lifetime": all_of(
        between(0.9, 1.1, label="early sinks: lifetime ÷ law"),
        between(0.9, 1.1, of="late", label="late sinks: lifetime ÷ law"),
    ),
    "score-rises-with-norm": at_least(0.9, label="Spearman of norm and sink score"),
    "lifetime-rises-with-norm": equals(1, 1e-9, label="Spearman of norm and lifetime"),
    "clamping-removes-the-sink": all_of(
        between(0.9, 1.1, label="score ÷ score of ordinary tokens in their place"),
        at_most(0, of="flags", label="share of the sinks still found"),
        at_most(0, of="change", label="largest change at other positions of the layer"),
        requires=(at_least(1.5, of="unclamped", label="score before ÷ score of ordinary tokens"),),
    ),
    "stage-profile": all_of(
        at_most(0.5, label="cosine at the input"), at_least(0.98, of="down", label="at the output")
    ),
    "trigger-component": all_of(
        at_least(0.98, label="cosine of MLP(s·PC₁)"),
        between(0.9, 1.1, of="norm", label="its norm ÷ the planted one"),
        at_most(0.5, of="other", label="largest norm of the other components ÷ the planted one"),
    ),
    "lifetime-law": all_of(
        *(between(0.95, 1.05, of=f"r{norm:g}", label=f"simulated ÷ law at r = {norm:g}") for norm in LAW_NORMS)
    ),
    "model-has-primary": at_least(MIN_JUMP, label="primary jump ÷ median norm"),
    "model-few-levels": at_least(0.9, label="share of secondary sinks at the most common levels", requires=(_FOUND,)),
    "model-stage-profile": all_of(
        at_most(0.5, label="cosine at the input"),
        at_least(0.98, of="down", label="at the output"),
        requires=(_FOUND,),
    ),
    "model-score": at_least(2.0, label="attention received by secondary sinks ÷ by the rest", requires=(_FOUND,)),
    "model-clamp": at_most(0.5, label="attention received after removing the write ÷ before", requires=(_FOUND,)),
}


@dataclass(frozen=True)
class Settings:
    """How much is measured: planted models by seed, simulated streams, and texts of the real model."""

    seeds: int
    runs: int
    model: str
    texts: int
    tokens: int


def run(context: Context) -> list[Claim]:
    """Planted claims, the law, and the real model."""
    settings = context.choose(
        smoke=Settings(2, 8, "tiny random Llama", 2, 64),
        small=Settings(6, 256, "smollm2", 12, 512),
        full=Settings(20, 1024, "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B", len(PROBLEMS), 16_384),
    )
    seeds = context.seeds(settings.seeds)
    planted = [context.stage(f"planted-{i}", partial(_planted, seed)) for i, seed in enumerate(seeds)]
    law = context.stage("law", lambda: _law(settings.runs, context.torch_generator("law")))
    model = context.stage("model", lambda: _model(settings, context))
    return [*_planted_claims(planted, seeds, context), _law_claim(law, context), *_model_claims(model, context)]


def _planted(seed: int) -> dict[str, Any]:
    """Everything that is measured in one planted model."""
    planted = planted_sinks(seed=seed)
    ids, truth = planted.text(generator=torch.Generator().manual_seed(seed))
    found = analyse(planted.model, ids, key_value=False, entropy=None)
    starts = {sink.position: sink.start for sink in found.sinks.sinks}
    triggers = [creation.token_id for creation in planted.creations]
    clean = [t for t, token in enumerate(ids[0].tolist()) if token in triggers and t not in truth]
    hits = [position for position in starts if position in truth]
    primary = found.primary
    return {
        "precision": len(hits) / max(len(starts), 1),
        "recall": len(hits) / len(truth),
        "start": sum(starts[p] == truth[p] for p in hits) / len(truth),
        "range": float(primary is not None and (primary.start, primary.end) == (planted.start, planted.end)),
        "dirty": sum(position in starts for position in clean) / len(clean),
        "lifetimes": _lifetimes(planted, found.sinks),
        "stages": found.stages,
        "sweep": _sweep(planted, ids, truth, found),
        "clamp": _clamp(planted, ids, truth, found),
        "trigger": _trigger(planted, found),
    }


def _lifetimes(planted: PlantedSinks, sinks: SinkMap) -> list[dict[str, float]]:
    rows = []
    for creation in planted.creations:
        lives = [s.lifetime for s in sinks.sinks if s.start == creation.layer]
        law = lifetime_law(creation.norm, planted.write_norm, before=creation.before)
        rows.append({"layer": creation.layer, "law": law, "measured": sum(lives) / max(len(lives), 1)})
    return rows


def _sweep(
    planted: PlantedSinks, ids: Int[Tensor, "1 tokens"], truth: dict[int, int], found: SecondarySinks
) -> list[dict[str, float]]:
    """Lifetime and sink score of the early sinks when their write is rescaled to different norms."""
    first = planted.creations[0]
    mine = [position for position, layer in truth.items() if layer == first.layer]
    rows = []
    for life in SWEPT_LIVES:
        norm = norm_for_lifetime(life, planted.write_norm, before=first.before)
        with rescale_writes(planted.model, first.layer, found.references[first.layer], norm):
            sinks, received, _ = _look(planted, ids)
        lives = [s.lifetime for s in sinks.sinks if s.position in mine]
        score = float(received[first.layer + 1 : planted.end][:, mine].mean())
        rows.append({"norm": norm, "lifetime": sum(lives) / len(mine), "score": score, "law": life})
    return rows


def _clamp(
    planted: PlantedSinks, ids: Int[Tensor, "1 tokens"], truth: dict[int, int], found: SecondarySinks
) -> dict[str, float]:
    """The early sinks without their write, and ordinary tokens in their place, which give the base level."""
    first = planted.creations[0]
    mine = [position for position, layer in truth.items() if layer == first.layer]
    others = [t for t in range(ids.shape[1]) if t not in mine]
    plain = ids.clone()
    plain[0, mine] = torch.randint(
        ORDINARY, VOCABULARY, (len(mine),), generator=torch.Generator().manual_seed(len(mine))
    )
    alive = slice(first.layer + 1, planted.end)
    _, base, _ = _look(planted, plain)
    _, before, stream_before = _look(planted, ids, layer=first.layer)
    with rescale_writes(planted.model, first.layer, found.references[first.layer], 0.0):
        sinks, after, stream_after = _look(planted, ids, layer=first.layer)
    level = float(base[alive][:, mine].mean())
    return {
        "score": float(after[alive][:, mine].mean()) / level,
        "unclamped": float(before[alive][:, mine].mean()) / level,
        "flags": sum(position in sinks.positions() for position in mine) / len(mine),
        "change": float((stream_after[others] - stream_before[others]).abs().max()),
    }


def _look(
    planted: PlantedSinks, ids: Int[Tensor, "1 tokens"], layer: int = 0
) -> tuple[SinkMap, Float[Tensor, "layers tokens"], Float[Tensor, "tokens width"]]:
    """The sink map, received attention, and the stream after one layer, from one forward."""
    streams: list[Tensor] = []
    block: Any = planted.model.model.layers[layer]  # type: ignore[union-attr, index]
    hook = block.register_forward_hook(lambda module, args, output: streams.append(output[0]))
    try:
        reading, received = _read(planted.model, ids)
    finally:
        hook.remove()
    result = analyse_rows(planted.model, ids, reading=reading, labels=())[0]
    return result.sinks, torch.stack(received), streams[0]


def _read(model: Any, ids: Int[Tensor, "1 tokens"], **options: Any) -> tuple[Any, list[Float[Tensor, " tokens"]]]:
    """One forward that reads the streams and, by layer, the attention that each token receives per query."""
    with (
        torch.no_grad(),
        capture(model, what=("received", "visible")) as handle,
        read_streams(model, ids, key_value=False, entropy=None, **options) as reading,
    ):
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    captured = handle.result()
    layers = [captured[layer] for layer in range(len(captured))]
    return reading, [(found["received"] / found["visible"])[0].mean(0).cpu() for found in layers]


def _trigger(planted: PlantedSinks, found: SecondarySinks) -> dict[str, float]:
    """The strongest output that the first component of the attention outputs gives, and that the others give."""
    first = planted.creations[0]
    probes = [p for trigger in found.triggers if trigger.layer == first.layer for p in trigger.probes]
    best = max((p for p in probes if p.component == 0), key=lambda p: p.norm)
    return {
        "cosine": best.cosine,
        "norm": best.norm / first.norm,
        "other": max(p.norm for p in probes if p.component > 0) / first.norm,
    }


def _planted_claims(planted: list[dict[str, Any]], seeds: list[int], context: Context) -> list[Claim]:
    def mean(name: str, values: Sequence[float], unit: str = "") -> Measurement:
        return bootstrap(values, generator=context.generator(name), seeds=tuple(seeds), unit=unit)

    def column(name: str, *path: Any) -> Measurement:
        values = []
        for row in planted:
            for key in path:
                row = row[key]
            values.append(float(row))  # type: ignore[arg-type]
        return mean(name, values)

    def ratios(i: int) -> list[float]:
        return [row["lifetimes"][i]["measured"] / row["lifetimes"][i]["law"] for row in planted]

    def ranks(of: str) -> list[float]:
        sweeps = [row["sweep"] for row in planted]
        return [float(spearmanr([s["norm"] for s in sweep], [s[of] for s in sweep]).statistic) for sweep in sweeps]

    def stage(name: str) -> list[float]:
        return [sum(s[name] for s in row["stages"].values()) / len(row["stages"]) for row in planted]

    ours = PaperValue("", "planted model with a known answer, ours", "")
    return [
        Claim(
            id="planted-detection",
            statement="Planted secondary sinks are found at their position and first layer, and nothing else is.",
            paper=ours,
            measured=column("precision", "precision"),
            others={name: column(name, name) for name in ("recall", "start", "range")},
            criterion=CRITERIA["planted-detection"],
        ),
        Claim(
            id="same-ids-stay-clean",
            statement="Tokens with the ids of the sinks, but without the flag that attention writes, are no sinks.",
            paper=PaperValue("same ids occur with and without a sink", "contrast set of the trigger analysis", ""),
            measured=column("dirty", "dirty"),
            criterion=CRITERIA["same-ids-stay-clean"],
        ),
        Claim(
            id="planted-lifetime",
            statement="A planted sink lives as long as the law says from its norm and what each layer writes.",
            paper=PaperValue("larger norms live longer", "the law itself is derived here", ""),
            measured=mean("early", ratios(0), "×"),
            others={"late": mean("late", ratios(1), "×")},
            criterion=CRITERIA["planted-lifetime"],
            notes="A lifetime is counted in whole layers and the law is not: with sinks that live four to eight layers "
            "one layer is 12 to 25 % of it.",
            details={"lifetimes": [row["lifetimes"] for row in planted]},
        ),
        Claim(
            id="score-rises-with-norm",
            statement="The larger the norm of the write, the more attention the sink receives.",
            paper=PaperValue("the norm decides the sink score", "norm intervention", ""),
            measured=mean("score", ranks("score")),
            criterion=CRITERIA["score-rises-with-norm"],
            details={"sweeps": [row["sweep"] for row in planted]},
        ),
        Claim(
            id="lifetime-rises-with-norm",
            statement="The larger the norm of the write, the longer the sink lives.",
            paper=PaperValue("the norm decides the lifetime", "norm intervention", ""),
            measured=mean("lifetime", ranks("lifetime")),
            criterion=CRITERIA["lifetime-rises-with-norm"],
            notes="Norms that differ little give the same whole number of layers, and ties keep the rank correlation "
            "below one.",
        ),
        Claim(
            id="clamping-removes-the-sink",
            statement="Without the write of that one MLP there is no sink, and no other position of the layer changes.",
            paper=PaperValue("", "causal check planned by this project", ""),
            measured=column("clamped score", "clamp", "score"),
            others={name: column(name, "clamp", name) for name in ("unclamped", "flags", "change")},
            criterion=CRITERIA["clamping-removes-the-sink"],
        ),
        Claim(
            id="stage-profile",
            statement="The MLP turns an unlike input into the direction of the primary sink.",
            paper=PaperValue("low at the input, ≈ 1 at the output", "MLP stages at the creation layer", ""),
            measured=mean("input", stage("input")),
            others={"down": mean("down", stage("down"))},
            criterion=CRITERIA["stage-profile"],
            details={"stages": [row["stages"] for row in planted]},
        ),
        Claim(
            id="trigger-component",
            statement="One principal component of the attention output, fed to the MLP, gives the primary's direction.",
            paper=PaperValue("cosine 0.992 at PC1 +", "DeepSeek-R1-Distill-Qwen-14B, layer 22", "released example"),
            measured=column("trigger", "trigger", "cosine"),
            others={name: column(f"trigger {name}", "trigger", name) for name in ("norm", "other")},
            criterion=CRITERIA["trigger-component"],
        ),
    ]


def _law(runs: int, generator: torch.Generator) -> dict[str, list[float]]:
    """Simulated lifetime ÷ law for each norm, by run. The layer of creation counts, which the law leaves out."""
    ratios = {}
    for norm in LAW_NORMS:
        lives = simulate_lifetimes(norm, LAW_WRITE, width=LAW_WIDTH, runs=runs, generator=generator)
        ratios[f"r{norm:g}"] = (lives / lifetime_law(norm, LAW_WRITE)).tolist()
    return ratios


def _law_claim(law: dict[str, list[float]], context: Context) -> Claim:
    measured = {name: bootstrap(values, generator=context.generator(name), unit="×") for name, values in law.items()}
    return Claim(
        id="lifetime-law",
        statement="A stream that gains random orthogonal writes stays a sink for (0.484·r/σ)² layers.",
        paper=PaperValue("23.5 / 93.8 / 375.3 / 1501.1 layers", "r = 20 / 40 / 80 / 160, σ = 2; derived here", ""),
        measured=measured[f"r{LAW_NORMS[0]:g}"],
        others=measured,
        criterion=CRITERIA["lifetime-law"],
    )


def _model(settings: Settings, context: Context) -> dict[str, Any]:
    """Every text of the real model: its primary, and the secondary sinks in each range in which it is massive."""
    model, name, texts = _host(settings, context)
    chat = settings.model.startswith("deepseek")
    tables: dict[str, list[LevelTable]] = {}
    rows = [_one_text(model, ids, chat, tables) for ids in context.track(texts, "texts")]
    return {"model": name, "texts": rows, "levels": {k: LevelTable.merge(*t).to_dict() for k, t in tables.items()}}


def _one_text(model: Any, ids: Int[Tensor, "1 tokens"], chat: bool, tables: dict[str, list[LevelTable]]) -> Any:
    reading, received = _read(model, ids, chat_template=chat)
    common = {"reading": reading, "received": [received], "chat_template": chat}
    main = analyse_rows(model, ids, **common)[0]
    if main.primary is None:
        return {"primary": None, "reason": main.reason, "ranges": []}
    found = [main]
    for other in main.other_ranges:
        if other.primary is not None:
            found += analyse_rows(model, ids, span=(other.primary.start, other.primary.end), **common)
    tables.setdefault("primary range", []).append(main.levels)
    for result in found[1:]:
        tables.setdefault("other ranges", []).append(result.levels)
    best = max(found, key=lambda result: result.levels.total)
    primary = main.primary
    return {
        "primary": {"position": primary.position, "start": primary.start, "end": primary.end},
        "jump": primary.jump / primary.typical,
        "closest cosine in the primary range": _closest(primary, reading.rows[0]),
        "ranges": [_range(result, ids) for result in found],
        "most": _range(best, ids) | _removed(model, ids, best, received, chat) if best.levels.total else None,
    }


def _closest(primary: Primary, row: Scan) -> float:
    """The largest |cosine| of a later token with the primary in its range: how far the text stays from a flag."""
    cosines = row.cosines[row.candidates.index(primary.position)]
    return float(cosines[primary.start : primary.end, primary.position + 1 :].abs().max())


def _range(result: SecondarySinks, ids: Int[Tensor, "1 tokens"]) -> dict[str, Any]:
    primary, score = result.primary, result.score
    if primary is None or score is None:
        return {}
    labels = Counter(sink.label for sink in result.sinks.sinks)
    members = [sink for sink in result.sinks.sinks if sink.label == "secondary"]
    alive = [i for i, value in enumerate(score["secondary_alive"]) if value == value]
    by_stage: dict[str, float] = {}
    if result.origins:
        names = set.intersection(*(set(o.cosines) for o in result.origins))
        by_stage = {n: sum(o.cosines[n] for o in result.origins) / len(result.origins) for n in sorted(names)}
    return {
        "layers": [primary.start, primary.end],
        "labels": dict(labels),
        "levels": [[s.start, s.lifetime] for s in members],
        "token ids": dict(Counter(int(ids[0, s.position]) for s in members)),
        "stages": by_stage,
        "received": sum(score["secondary_alive"][i] for i in alive) / max(len(alive), 1),
        "received by the rest": sum(score["rest"][i] for i in alive) / max(len(alive), 1),
    }


def _removed(
    model: Any, ids: Int[Tensor, "1 tokens"], result: SecondarySinks, received: list[Tensor], chat: bool
) -> dict[str, float]:
    """Attention received by the sinks of the most frequent creation layer with and without that layer's write."""
    layer = max(result.levels.starts().items(), key=lambda item: item[1])[0]
    mine = [s for s in result.sinks.sinks if s.label == "secondary" and s.start == layer]
    alive = range(layer + 1, min(max(s.layers[-1] for s in mine) + 2, len(received)))
    places = [s.position for s in mine]
    with rescale_writes(model, layer, result.references[layer], 0.0):
        reading, after = _read(model, ids, chat_template=chat)
    span = None if result.primary is None else (result.primary.start, result.primary.end)
    left = analyse_rows(model, ids, reading=reading, chat_template=chat, labels=(), span=span)[0].sinks
    return {
        "creation layer": layer,
        "before": float(torch.stack([received[i][places] for i in alive]).mean()),
        "after": float(torch.stack([after[i][places] for i in alive]).mean()),
        "still flagged": sum(p in left.positions() for p in places) / len(places),
    }


def _model_claims(model: dict[str, Any], context: Context) -> list[Claim]:
    rows = model["texts"]
    most = [row["most"] for row in rows if row.get("most")]
    jumps = [row["jump"] if row["primary"] else 0.0 for row in rows]
    primary = bootstrap(jumps, generator=context.generator("jump"), unit="×")
    ranges = Counter(f"{r['primary']['start']} to {r['primary']['end'] - 1}" for r in rows if r["primary"])
    counts: Counter[tuple[int, int]] = Counter(tuple(level) for found in most for level in found["levels"])
    top = [level for level, _ in counts.most_common(FEW_LEVELS)]

    def mean(name: str, values: Sequence[float]) -> Measurement:
        return bootstrap(values, generator=context.generator(name)) if values else Measurement(float("nan"), n=0)

    def ratio(name: str, above: str, below: str) -> Measurement:
        if not most:
            return Measurement(float("nan"), n=0)
        first, second = [m[above] for m in most], [m[below] for m in most]
        return bootstrap_ratio(first, second, paired=True, generator=context.generator(name))

    secondaries = sum(counts.values())
    gate = {"primary": primary}
    notes = (
        "Measured in the range with the most secondary sinks of each text. That ranges beside the primary's own are "
        "searched was decided after a first look at SmolLM2 on stretches of the same document."
    )
    where = PaperValue("", model["model"], "")
    return [
        Claim(
            id="model-has-primary",
            statement="The model has a primary sink in every text.",
            paper=PaperValue("layers 4–46 of 48", "DeepSeek-R1-Distill-Qwen-14B", "example"),
            measured=primary,
            criterion=CRITERIA["model-has-primary"],
            notes="That a primary sink is there had been seen before this was written. How many secondary sinks there "
            "are, and where, is reported and not judged.",
            details={
                "model": model["model"],
                "texts": len(rows),
                "primary range (layers: texts)": dict(ranges),
                "secondary sinks in the primary range": sum(
                    row["ranges"][0]["labels"].get("secondary", 0) for row in rows if row["ranges"]
                ),
                "secondary sinks in the range with the most": secondaries,
                "level tables": model["levels"],
                "by text": rows,
            },
        ),
        Claim(
            id="model-few-levels",
            statement=f"Nearly all secondary sinks of the model stand at {FEW_LEVELS} levels or fewer.",
            paper=PaperValue("three levels in QwQ-32B, six in Qwen3-14B", "generations on AIME24", "abstract"),
            measured=mean(
                "levels", [sum(tuple(v) in top for v in m["levels"]) / len(m["levels"]) for m in most if m["levels"]]
            ),
            criterion=CRITERIA["model-few-levels"],
            details={"levels (start, lifetime): tokens": {str(k): v for k, v in counts.most_common()}},
            others=gate,
            notes=notes + " A range of eight layers has room for few levels, so this is weak evidence there.",
        ),
        Claim(
            id="model-stage-profile",
            statement="In the real model, too, an MLP turns an unlike input into the direction of the primary sink.",
            paper=PaperValue("low at the input, ≈ 1 at the output", "MLP stages at the creation layer", ""),
            measured=mean("model input", [m["stages"]["input"] for m in most]),
            criterion=CRITERIA["model-stage-profile"],
            notes=notes,
            others={**gate, "down": mean("model down", [m["stages"]["down"] for m in most])},
            details={"stages": [m["stages"] for m in most]},
        ),
        Claim(
            id="model-score",
            statement="Secondary sinks receive more attention than the remaining tokens while they live.",
            paper=PaperValue("less than the primary, more than the rest", "sink score by layer", ""),
            measured=ratio("model score", "received", "received by the rest"),
            criterion=CRITERIA["model-score"],
            others=gate,
            notes=notes,
        ),
        Claim(
            id="model-clamp",
            statement="Without the write of the one MLP that makes them, they receive at most half of that attention.",
            paper=where,
            measured=ratio("model clamp", "after", "before"),
            criterion=CRITERIA["model-clamp"],
            details={"still flagged by cosine": [m["still flagged"] for m in most]},
            others=gate,
            notes=notes,
        ),
    ]


def _host(settings: Settings, context: Context) -> tuple[Any, str, list[Int[Tensor, "1 tokens"]]]:
    """Model, its name, and texts as token ids."""
    from headway.hosts import default_text, load, tokenize

    if settings.model == "tiny random Llama":
        return _tiny_host(settings)
    gpu = torch.cuda.is_available()
    model, tokenizer = load(settings.model, dtype="bfloat16" if gpu else "float32", device="cuda" if gpu else "cpu")
    if settings.model != "smollm2":
        return model, settings.model, [_generation(model, tokenizer, problem, settings.tokens) for problem in PROBLEMS]
    ids = tokenize(tokenizer, default_text(), 400 * settings.tokens, allow_longer=True)[0]
    windows = len(ids) // settings.tokens
    chosen = torch.randperm(windows, generator=context.torch_generator("windows"))[: settings.texts]
    texts = [ids[w * settings.tokens : (w + 1) * settings.tokens][None] for w in chosen.tolist()]
    return model, f"{model.name_or_path}, {default_text().source}", texts


def _generation(model: Any, tokenizer: Any, problem: str, tokens: int) -> Int[Tensor, "1 tokens"]:
    """A chat prompt with the model's own greedy answer."""
    chat = [{"role": "user", "content": problem}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    return model.generate(**prompt.to(model.device), max_new_tokens=tokens, do_sample=False)


def _tiny_host(settings: Settings) -> tuple[Any, str, list[Int[Tensor, "1 tokens"]]]:
    """A random model: shows the shape of the result, and nothing about sinks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
    )
    generator = torch.Generator().manual_seed(0)
    texts = [
        torch.randint(ORDINARY, VOCABULARY, (1, settings.tokens), generator=generator) for _ in range(settings.texts)
    ]
    return LlamaForCausalLM(config).eval(), "random Llama", texts


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "a 14 B model needs a GPU. Run size small."
    return None


RECIPE = Recipe(
    slug="secondary-sinks",
    title="On the Existence and Behaviour of Secondary Attention Sinks",
    run=run,
    criteria=CRITERIA,
    obstacle=_obstacle,
)
