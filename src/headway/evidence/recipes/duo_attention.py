"""DuoAttention: are the learned heads the ones that retrieve, and is the memory really saved?

First on small decoders: one with three planted retrieval heads among twelve, where the truth is known, and one that has
learned to retrieve by itself; then on a real model, where gates are learned on generated pass-keys and judged on
needles in another half of the text, out of reach of all streaming heads. Small models seldom give a planted value
outright, so the score is the nll of its tokens, each given those before it; the share of tokens that come first stands
beside it.

Paper: DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads, arXiv 2410.10819.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headway.door import use
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import Measurement, at_least, at_most, interval_excludes
from headway.evidence.parallel import Together, processes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes import _duo_trained as trained
from headway.evidence.recipes._duo_decode import DECODE_CRITERIA, SHARES, decode_claims, decode_costs
from headway.evidence.recipes._duo_real import SETTINGS, SPARSITY, learn_on_passkeys, needle_scores, scored
from headway.evidence.recipes._duo_toy import RANDOM_DRAWS, toy_run
from headway.evidence.recipes._duo_toy_claims import COMPARABLE, TOY_CRITERIA, planted_claims, trained_claims
from headway.evidence.recipes._stages import in_stages
from headway.methods.long_context.duo_attention import DuoAttention
from headway.statistics import bootstrap, bootstrap_difference, rank_correlation

CRITERIA = {
    **TOY_CRITERIA,
    "bytes": at_most(0, minimum_n=6, label="bytes off the formula"),
    **DECODE_CRITERIA,
    "learned-beats-random": interval_excludes(0.0, side="above", label="nll with random − with learned heads"),
    "inverted-is-worse": interval_excludes(0.0, side="above", label="nll with inverted − with learned heads"),
    "learned-near-full": at_least(
        -COMPARABLE,
        label="first-place rate with learned heads − with full attention",
        requires=at_least(0.5, of="full", by="value", label="first-place rate with full attention"),
    ),
    "streaming-everywhere": interval_excludes(
        0.0, side="above", label="nll with all heads streaming at the same memory − with learned heads"
    ),
    "rope-profile": interval_excludes(0.0, side="above", label="rank correlation with learned gates"),
    "distant-mass": interval_excludes(0.0, side="above", label="rank correlation with learned gates"),
}


def run(context: Context) -> list[Claim]:
    workers = context.choose(smoke=1, small=2, full=1)
    sizes = context.stage("bytes", lambda: _bytes(context))
    costs = context.stage("decode", lambda: _decode(context))
    gates = context.stage("gates", lambda: _gates(context))
    with processes(workers) as together:
        planted = _planted_toys(context, together, workers)
        own = _trained_toys(context, together, workers)
        names = ("rope_profile", "distant_mass")
        setting = SETTINGS[context.size]
        scores = context.stage("scores", lambda: together(scored, [(setting, name) for name in names]))
        needles = _needles(context, together, workers, gates["gates"])
    return [
        *planted_claims(context, planted),
        *trained_claims(context, own),
        _bytes_claim(sizes),
        *decode_claims(costs, context.generator("decode")),
        *_needle_claims(context, needles, gates),
        *(_score_claim(context, name, found, gates["gates"]) for name, found in zip(names, scores, strict=True)),
    ]


def _planted_toys(context: Context, together: Together, workers: int) -> list[dict[str, Any]]:
    """The planted decoders, as many to a stage as there are processes."""
    seeds = context.seeds(context.choose(smoke=2, small=5, full=20))
    size = context.choose(smoke=(12, 3), small=(40, 10), full=(200, 50))
    return in_stages(context, "planted", together, toy_run, [(seed, *size) for seed in seeds], size=workers)


def _trained_toys(context: Context, together: Together, workers: int) -> list[dict[str, Any]]:
    """The decoders that are trained here."""
    seeds = context.seeds(context.choose(smoke=1, small=4, full=20))
    size = context.choose(smoke=(4, 2, 4), small=(500, 200, 100), full=(2_000, 500, 1_000))
    return in_stages(context, "trained", together, trained.run, [(seed, *size) for seed in seeds], size=workers)


def _needles(
    context: Context, together: Together, workers: int, gates: Sequence[Sequence[float]]
) -> dict[str, list[dict[str, float]]]:
    """Score of every needle under every choice of heads."""
    values = torch.tensor(gates)
    generator = context.torch_generator("random heads")
    choices = {"full": values, "learned": values, "inverted": -values, "everywhere": values}
    choices |= {f"random {draw}": torch.rand(values.shape, generator=generator) for draw in range(RANDOM_DRAWS)}
    seed = context.seeds(1)[0]
    calls = [(SETTINGS[context.size], seed, arm, chosen.tolist()) for arm, chosen in choices.items()]
    found = in_stages(context, "needles", together, needle_scores, calls, size=workers)
    return dict(zip(choices, found, strict=True))


def _gates(context: Context) -> dict[str, Any]:
    setting = SETTINGS[context.size]
    task = context.progress.add_task("learning gates", total=setting.steps)
    return learn_on_passkeys(setting, context.seed, context.out, lambda *_: context.progress.advance(task))


def _decode(context: Context) -> dict[str, Any]:
    """Costs of decoding steps with some of the heads whole and with all of them."""
    lengths, rounds, steps = context.choose(
        smoke=((1024, 2048), 2, 1),
        small=((4_096, 12_288, 20_480), 9, 4),
        full=((4_096, 16_384, 65_536), 15, 8),
    )
    return {"rows": decode_costs(lengths, (*SHARES, 1.0), rounds, steps), "threads": torch.get_num_threads(),
            "steps": steps}  # fmt: skip


def _bytes(context: Context) -> list[dict[str, Any]]:
    """Stored bytes of a small host by length and share, beside 2·d·b·Σ( full·t + streaming·min(t, S + R) )."""
    from headway.hosts.tiny import tiny_host

    lengths = context.choose(smoke=(200, 700), small=(320, 1024, 4096), full=(1024, 8192, 32_768))
    model, _ = tiny_host("llama", num_hidden_layers=2, max_position_embeddings=max(lengths) + 1)
    config: Any = model.config
    shape = (config.num_hidden_layers, config.num_key_value_heads)
    generator = context.torch_generator("bytes")
    per_token = 2 * config.head_dim * 4
    found = []
    for sparsity in (0.0, 0.5, 1.0):
        policy = DuoAttention(gates=torch.rand(shape, generator=generator), sparsity=sparsity)
        full = int(policy.retrieval().sum())
        with use(model, policy), torch.no_grad():
            cache: Any = None
            seen = 0
            for length in lengths:
                while seen < length:
                    ids = torch.randint(8, 100, (1, min(512, length - seen)), generator=generator)
                    cache = model(input_ids=ids, past_key_values=cache, use_cache=True).past_key_values
                    seen += ids.shape[1]
                near = min(seen, policy.sinks + policy.recent)
                dense = per_token * shape[0] * shape[1] * seen
                formula = per_token * (full * seen + (shape[0] * shape[1] - full) * near)
                stored = cache.stored_bytes()
                found.append({"sparsity": sparsity, "tokens": seen, "stored": stored, "formula": formula,
                              "reduction": dense / stored})  # fmt: skip
    return found


def _bytes_claim(found: Sequence[dict[str, Any]]) -> Claim:
    off = [abs(row["stored"] - row["formula"]) for row in found]
    halved = [row for row in found if row["sparsity"] == SPARSITY]
    return Claim(
        id="bytes",
        statement="The cache holds r + (1 − r)(S + R)/t of the bytes of a full one, r the share of retrieval heads.",
        paper=PaperValue(
            "2.55× (25 % retrieval heads), 1.67× (50 %)", "whole memory of two models, long contexts", "abstract"
        ),
        measured=Measurement(max(off), n=len(off), unit="bytes"),
        criterion=CRITERIA["bytes"],
        others={"reduction at half": Measurement(halved[-1]["reduction"], unit="×")},
        notes="Bytes of keys and values after every length of a text read in chunks, S = 64, R = 256. The paper's "
        "numbers include weights and activations.",
        details={"rows": list(found)},
    )


def _needle_claims(context: Context, found: dict[str, list[dict[str, float]]], learned: dict[str, Any]) -> list[Claim]:
    generator = context.generator("needle intervals")

    def values(name: str, score: str) -> list[float]:
        if name != "random":
            return [row[score] for row in found[name]]
        draws = [[row[score] for row in rows] for key, rows in found.items() if key.startswith("random")]
        return [float(x) for x in np.mean(draws, axis=0)]

    def mean(name: str, score: str) -> Measurement:
        return bootstrap(values(name, score), generator=generator)

    setting = SETTINGS[context.size]
    names = ("full", "learned", "random", "inverted", "everywhere")
    details = {"setting": vars(setting), "by length": _by_length(found), "gates": learned["gates"],
               "mean gate": learned["mean"], "gates above half": learned["above half"],
               "distill": learned["distill"]}  # fmt: skip
    scores = {f"{score} {name}": mean(name, score) for score in ("nll", "rank_one", "exact") for name in names}

    def worse(claim: str, name: str, statement: str, paper: PaperValue, notes: str = "") -> Claim:
        return Claim(
            id=claim,
            statement=statement,
            paper=paper,
            measured=bootstrap_difference(
                values(name, "nll"), values("learned", "nll"), paired=True, generator=generator, unit="nats per token"
            ),
            criterion=CRITERIA[claim],
            others=scores if claim == "learned-beats-random" else {},
            notes=notes,
            details=details if claim == "learned-beats-random" else {},
        )

    comparable = PaperValue("comparable to full attention", "needles, 50 % retrieval heads (GQA)", "figures")
    return [
        worse(
            "learned-beats-random",
            "random",
            "At the same share, learned heads keep a far value better than random heads.",
            PaperValue("stated without a number", where="section 2"),
            f"Mean of {RANDOM_DRAWS} random choices per needle, {setting.needles} needles at each of "
            f"{len(setting.tokens)} lengths up to {max(setting.tokens):,} tokens. Gates of {setting.steps} steps on "
            f"contexts of {min(setting.lengths)} to {max(setting.lengths)} tokens, not of the paper's 2,000 on up "
            "to 32,000 tokens.",
        ),
        worse(
            "inverted-is-worse",
            "inverted",
            "At the same share, the heads with the lowest gates keep a far value worse than those with the highest.",
            PaperValue("stated without a number", where="section 2"),
        ),
        Claim(
            id="learned-near-full",
            statement="With half of the KV heads streaming by their learned gates, far values are recalled as with "
            "full attention.",
            paper=comparable,
            measured=bootstrap_difference(
                values("learned", "rank_one"), values("full", "rank_one"), paired=True, generator=generator
            ),
            criterion=CRITERIA["learned-near-full"],
            others={"full": mean("full", "rank_one"), "learned": mean("learned", "rank_one")},
        ),
        worse(
            "streaming-everywhere",
            "everywhere",
            "At the same memory, a window in all heads keeps a far value worse than retrieval heads do.",
            PaperValue("StreamingLLM fails on needles outside its window", where="figures of needles"),
        ),
    ]  # fmt: skip


def _by_length(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Mean scores of every choice of heads at every length of the needles."""
    lengths = sorted({row["tokens"] for row in found["full"]})
    return [
        {"tokens": length, "heads": name}
        | {score: float(np.mean([r[score] for r in rows if r["tokens"] == length])) for score in ("nll", "rank_one")}
        for length in lengths
        for name, rows in found.items()
    ]


def _score_claim(context: Context, name: str, scores: list[list[float]], gates: list[list[float]]) -> Claim:
    claim = name.replace("_", "-")
    what = {
        "rope_profile": "mean queries and keys under RoPE",
        "distant_mass": "attention outside sinks and recent keys",
    }
    return Claim(
        id=claim,
        statement=f"Scores without training ({what[name]}) rank heads as learned gates do.",
        paper=PaperValue("not in the paper; a third party reports it better than gates", where="kvpress"),
        measured=rank_correlation(np.ravel(gates), np.ravel(scores), generator=context.generator(f"{name} interval")),
        criterion=CRITERIA[claim],
        notes=f"By thirds of the layers, the first ones first, the mean gate is {_thirds(gates)} and the mean score "
        f"{_thirds(scores)}. Gates are learned on pass-keys, scores read from running text, which asks for little that "
        "is far.",
        details={"scores": scores},
    )


def _thirds(values: Sequence[Sequence[float]]) -> str:
    """Means over the first, the middle and the last third of the layers (of fewer than three, over each)."""
    return ", ".join(f"{part.mean():.2f}" for part in np.array_split(np.asarray(values), min(3, len(values))))


def _plots(context: Context, claims: Sequence[Claim]) -> None:
    import plotly.graph_objects as go

    found: Any = next(claim for claim in claims if claim.id == "learned-beats-random").details["gates"]
    figure = go.Figure(go.Heatmap(z=found, zmin=0, zmax=1, colorscale="Blues"))
    figure.update_layout(title="Learned gates", xaxis_title="KV head", yaxis_title="layer")
    context.save_plot(figure, "gates")


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "its model has 8 billion parameters and there is no GPU. Run --size small."
    return None


RECIPE = Recipe(
    slug="duo-attention",
    title="DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads",
    run=run,
    criteria=CRITERIA,
    plots=_plots,
    obstacle=_obstacle,
)
