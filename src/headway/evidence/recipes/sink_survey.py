"""The survey's mitigation arena, its quantised cache, its rules for using a sink, and its explanations of one.

The arena has a known answer: on a task that asks a head to be silent, softmax must grow a sink, a denominator with
something more in it need not, and a gate or an affine scale that could silence the head may leave the sink where it is.
The language-model arena is too short here for a sink to grow: it says so. On SmolLM2 a quantised cache with exact sinks
is read beside one without, and three explanations are tested. Survey: arXiv 2604.10098.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.door import use
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, equals
from headway.evidence.parallel import Together, processes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes._sink_arena import ARMS, run_arm
from headway.evidence.recipes._sink_utilization import (
    UTILIZATION_CRITERIA,
    behind,
    measure_caches,
    measure_editors,
    sizes,
    tokens_needed,
    utilization_claims,
    windows_of,
)
from headway.methods.sinks.sink_emergence import NO_SINK
from headway.methods.sinks.sink_survey import IntactKV
from headway.methods.sinks.sink_survey.comparison import measure_model
from headway.methods.sinks.sink_survey.interpretation import implicit_bias, no_op_of_model, outlier_circuit
from headway.statistics import Measurement, bootstrap, bootstrap_ratio
from headway.tasks.trigger_averaging import STEPS

_LEARNED = at_most(0.01, of="error", label="error as a share of always saying zero")
_SILENT = all_of(
    at_most(0.3, label="mass at unflagged items"),
    at_most(3.0, of="eviction", label="error without item 0 ÷ with it"),
    requires=(_LEARNED,),
)
_STAYS = all_of(at_least(0.5, label="share of the weights on item 0 at unflagged items"), requires=(_LEARNED,))

CRITERIA = {
    "arena-softmax": all_of(
        at_least(0.9, label="share of the weights on item 0 at unflagged items"),
        at_least(100.0, of="eviction", label="error without item 0 ÷ with it"),
        requires=(_LEARNED,),
    ),
    "arena-softmax-plus-one": _SILENT,
    "arena-learned-denominator": _SILENT,
    "arena-head-gate": _STAYS,
    "arena-affine": _STAYS,
    "arena-split": equals(len(ARMS), 0, label="arms on the side that the survey's check gives them"),
    "language-arena": at_most(
        0.2,
        label="largest Sink_1 of the arms ÷ that of softmax",
        requires=(
            at_least(NO_SINK, of="softmax", label="Sink_1 of softmax"),
            at_most(1.05, of="loss", label="largest loss ÷ that of softmax"),
        ),
    ),
    "quantised-cache": at_most(
        0.5,
        label="loss gap with exact sinks ÷ without",
        requires=(at_least(0.01, of="gap", label="loss gap of 4-bit keys without exact sinks, nats"),),
    ),
    "implicit-bias-sink": at_least(0.9, label="mean cosine across inputs of what the sink adds"),
    "implicit-bias-random": at_most(0.5, label="mean cosine across inputs of what a random token adds"),
    "no-op": at_most(
        0.3, label="‖A_S V_S‖ ÷ ‖A V‖ in heads that sink", requires=(at_least(0.3, of="share", label="share"),)
    ),
    "outlier-circuit": at_least(0.5, label="attention that the sink loses without its top coordinates"),
    **UTILIZATION_CRITERIA,
}
#: Arms of the language-model arena beside softmax.
LANGUAGE_ARMS = ("sigmoid", "softpick", "key_slot", "learned_denominator")


@dataclass(frozen=True)
class Settings:
    """How much is measured. `prompt` tokens are stored, `scored` ones read them; `groups` of `inputs` texts of `length`
    tokens each are the units of the explanations."""

    model: str
    seeds: int
    steps: int
    language_steps: int
    language_seeds: int
    language: dict[str, Any]
    windows: int
    prompt: int
    scored: int
    groups: int
    inputs: int
    length: int


@dataclass(frozen=True)
class Host:
    """A causal language model and the tokens of a text without special ones."""

    model: Any
    text: Int[Tensor, " tokens"]
    source: str


def run(context: Context) -> list[Claim]:
    tiny = {"width": 32, "layers": 2, "heads": 2, "length": 32, "batch": 4}
    small = {"width": 64, "layers": 2, "heads": 4, "length": 64, "batch": 8}
    settings = context.choose(
        smoke=Settings("tiny random Llama", 2, 8, 4, 1, tiny, 3, 24, 12, 2, 3, 16),
        small=Settings("smollm2", 5, STEPS, 250, 2, small, 8, 256, 96, 5, 4, 48),
        full=Settings(
            "meta-llama/Meta-Llama-3-8B",
            10,
            STEPS,
            20_000,
            3,
            {"layers": 6, "width": 128, "heads": 4, "length": 128, "batch": 16},
            32,
            1024,
            256,
            16,
            8,
            128,
        ),
    )
    seeds = context.seeds(settings.seeds)
    with processes(context.choose(smoke=1, small=2, full=1)) as together:
        arena = partial(_arena, seeds=seeds, steps=settings.steps, together=together)
        arms = {name: context.stage(f"arena-{name}", partial(arena, name)) for name in ARMS}
        with_bias = context.stage("arena-with-bias", partial(arena, "softmax-plus-one", bias=True))
        few = context.seeds(settings.language_seeds)
        language = context.stage("language-arena", lambda: _language(settings, few, together))
    host = cache(lambda: _host(settings, tokens_needed(sizes(context))))
    quantised = context.stage("quantised", lambda: _held(_quantised, host(), settings, context, "windows"))
    explained = context.stage("explained", lambda: _held(_explained, host(), settings, context, "inputs"))
    size = sizes(context)
    caches = context.stage("caches", lambda: _used(measure_caches, host(), size, context, "caches"))
    editors = context.stage("editors", lambda: _used(measure_editors, host(), size, context, "editors"))
    return [
        *_arena_claims(arms, with_bias, seeds, context),
        _language_claim(language, context),
        _quantised_claim(quantised, context),
        *_explanations(explained, context),
        *utilization_claims(caches, editors, context, explained["source"]),
    ]


def _host(settings: Settings, least: int) -> Host:
    from headway.hosts import default_text, load, tokenize

    text = default_text()
    if settings.model == "tiny random Llama":
        from headway.hosts.tiny import tiny_host

        model, _ = tiny_host("llama", num_key_value_heads=2, max_position_embeddings=256)
        ids = torch.tensor([8 + b % 100 for b in text.text[:5000].encode()])
        return Host(model, ids, f"random Llama, bytes of {text.source}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(settings.model, dtype="bfloat16" if device == "cuda" else "float32", device=device)
    wanted = max(
        settings.windows * (settings.prompt + settings.scored),
        settings.groups * settings.inputs * settings.length,
        least,
    )
    ids = tokenize(tokenizer, text, 2 * wanted, allow_longer=True)[0]
    ids = ids[~torch.isin(ids, torch.tensor(tuple(tokenizer.all_special_ids)))]
    return Host(model, ids, f"{model.name_or_path}, {text.source}")


def _held(measure: Callable[..., dict[str, Any]], host: Host, settings: Settings, context: Context, name: str) -> Any:
    """A measurement under one open scope, so that the door is tested once and not for every scope inside."""
    with use(host.model):
        return measure(host, settings, context.torch_generator(name))


def _used(measure: Callable[..., dict[str, Any]], host: Host, size: Any, context: Context, name: str) -> Any:
    """As `_held`, for a measurement of the rules that use a sink."""
    with use(host.model):
        return measure(host.model, host.text, size, context.torch_generator(name))


def _arena(name: str, *, seeds: Sequence[int], steps: int, together: Together, bias: bool = False) -> dict[str, Any]:
    """The numbers of `run_arm`, each seed by itself: seeds do not see each other."""
    runs = together(partial(run_arm, steps=steps, bias=bias), [(name, [seed]) for seed in seeds])
    return {
        key: [number for run in runs for number in run[key]] if isinstance(value, (list, tuple)) else value
        for key, value in runs[0].items()
    }


def _language(settings: Settings, seeds: Sequence[int], together: Together) -> dict[str, Any]:
    """Small language models on the bytes of a text: Sink_1 and loss of each arm by seed, judged on the same windows."""
    from headway.hosts import default_text

    ids = torch.frombuffer(bytearray(default_text().text.encode("utf-8")), dtype=torch.uint8).long()
    border, length = int(0.9 * len(ids)), settings.language["length"]
    judged = windows_of(ids[border:], 32, length, torch.Generator().manual_seed(0))
    names = ("softmax", *LANGUAGE_ARMS)
    runs = iter(
        together(_language_arm, [(name, settings, ids[:border], judged, seed) for name in names for seed in seeds])
    )
    found = {name: [next(runs) for _ in seeds] for name in names}
    return {name: {column: [run[column] for run in of] for column in of[0]} for name, of in found.items()}


def _language_arm(name: str, settings: Settings, text: Tensor, judged: Tensor, seed: int) -> dict[str, float]:
    """One byte-level model with a normaliser, trained with the weight decay that favours sinks most in the paper."""
    from headway.models import HeadwayConfig, HeadwayForCausalLM
    from headway.train import train

    sizes = dict(settings.language)
    length, batch = sizes.pop("length"), sizes.pop("batch")
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Iterator[Tensor]:
        while True:
            starts = torch.randint(0, len(text) - length, (batch,), generator=generator)
            yield text[starts[:, None] + torch.arange(length)]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = HeadwayForCausalLM(HeadwayConfig(vocab_size=256, mixer_options={"normalizer": name}, **sizes))
    steps = settings.language_steps
    train(model, draw(), steps=steps, learning_rate=1e-3, weight_decay=0.5, warmup=steps // 20, schedule="constant",
          seed=seed)  # fmt: skip
    return measure_model(model.eval(), [(judged, judged)], window=length // 4)


@torch.no_grad()
def _quantised(host: Host, settings: Settings, generator: torch.Generator) -> dict[str, Any]:
    """Mean −ln p of the tokens behind a prompt whose keys are exact, in 4 bits per tensor, and the same with exact
    sinks; by window."""
    ids = windows_of(host.text, settings.windows, settings.prompt + settings.scored, generator)
    four = partial(IntactKV, bits=4, key_per="tensor", value_per="exact", group=1)
    policies = {"exact": IntactKV(bits=None), "all": four(sinks=0), "sinks_exact": four(sinks=4)}
    losses: dict[str, list[float]] = {}
    for name, policy in policies.items():
        with use(host.model, policy):
            losses[name] = [behind(host.model, row[None], settings.prompt) for row in ids]
    return {"losses": losses, "source": host.source}


def _explained(host: Host, settings: Settings, generator: torch.Generator) -> dict[str, Any]:
    """The three explanations, group by group of texts."""
    found: dict[str, Any] = {"groups": [], "source": host.source}
    ids = windows_of(host.text, settings.groups * settings.inputs, settings.length, generator)
    for group in ids.split(settings.inputs):
        sink = implicit_bias(host.model, group)
        heads = [(row["layer"], row["head"]) for row in sink.details["heads"]]
        place = int(torch.randint(1, settings.length // 4, (1,), generator=generator))
        random = implicit_bias(host.model, group, sinks=(place,), heads=heads)
        silent = no_op_of_model(host.model, {"input_ids": group, "use_cache": False})
        circuit = outlier_circuit(host.model, group)
        found["groups"].append(
            {
                "sink": sink.value,
                "random": random.value,
                "heads": len(heads),
                "place": place,
                "contribution": silent.value,
                "share": silent.details["share"],
                "circuit": circuit.value,
                "trace": {k: circuit.details.get(k) for k in ("emergence", "vanish", "loss", "loss_without")},
            }
        )
    return found


def _arena_claims(arms: dict[str, Any], with_bias: dict[str, Any], seeds: list[int], context: Context) -> list[Claim]:
    planned = {
        "softmax": "share 0.99, eviction × 15,000",
        "softmax-plus-one": "mass 0.17, eviction × 1",
        "learned-denominator": "mass 0.02, eviction × 1",
        "head-gate": "share 0.98, the task is solved",
        "affine": "the sink stays",
    }
    statements = {
        "softmax": "Softmax is silent through a sink: all weight goes to item 0, and the task needs it.",
        "softmax-plus-one": "With softmax + 1 the head is silent without a sink, and item 0 can go.",
        "learned-denominator": "With a learned denominator the head is silent without a sink, and item 0 can go.",
        "head-gate": "A gate that could silence the head leaves its sink where it is.",
        "affine": "An affine scale that could silence the head leaves its sink where it is.",
    }
    claims = []
    for name, arm in arms.items():
        silent = name in ("softmax-plus-one", "learned-denominator")
        share = [e / c for e, c in zip(arm["error"], arm["chance_error"], strict=True)]
        values = {"error": share, "eviction": arm["eviction_ratio"]}
        measured = arm["mass"] if silent else arm["proxy_share"]
        claims.append(
            Claim(
                id=f"arena-{name}",
                statement=statements[name],
                paper=PaperValue(planned[name], "one seed, planned check of this project", "trigger-conditional task"),
                measured=_mean(measured, context, name, seeds=seeds),
                others={key: _mean(v, context, f"{name} {key}", seeds=seeds) for key, v in values.items()},
                criterion=CRITERIA[f"arena-{name}"],
                notes="The share is that of |weights|, as affine weights may be negative." if name == "affine" else "",
                details={
                    "per seed": arm,
                    **({"tried: projections with biases": with_bias} if name == "softmax-plus-one" else {}),
                },
            )
        )
    right = sum(claim.verdict == "holds" for claim in claims)
    learned = all(e <= 0.01 * c for a in arms.values() for e, c in zip(a["error"], a["chance_error"], strict=True))
    return [
        *claims,
        Claim(
            id="arena-split",
            statement="The table of the arena splits as it must: three kinds of weights, two that keep the sink.",
            paper=PaperValue("five of five", "planned check of this project", "trigger-conditional task"),
            measured=Measurement(float(right) if learned else float("nan"), n=len(claims)),
            criterion=CRITERIA["arena-split"],
            details={claim.id: str(claim.verdict) for claim in claims},
        ),
    ]


def _language_claim(language: dict[str, Any], context: Context) -> Claim:
    base = language["softmax"]
    worst = max(LANGUAGE_ARMS, key=lambda name: sum(language[name]["sink_1"]))
    dearest = max(LANGUAGE_ARMS, key=lambda name: sum(language[name]["loss"]))
    return Claim(
        id="language-arena",
        statement="In small language models sigmoid, softpick, key slot and learned denominator have at most a fifth "
        "of softmax's sink, at about its loss.",
        paper=PaperValue("18.18 % against 0.00 to 0.44 %", "60 M models", "tables of arXiv 2410.10781"),
        measured=_ratio(language[worst]["sink_1"], base["sink_1"], context, "language"),
        others={
            "softmax": _mean(base["sink_1"], context, "language softmax"),
            "loss": _ratio(language[dearest]["loss"], base["loss"], context, "language loss"),
        },
        criterion=CRITERIA["language-arena"],
        notes="Too few steps for a sink at this size unless softmax shows one; `headway lab sinks mitigation` trains "
        "longer.",
        details={"arms": language},
    )


def _quantised_claim(quantised: dict[str, Any], context: Context) -> Claim:
    losses = quantised["losses"]
    gaps = {
        name: [a - b for a, b in zip(losses[name], losses["exact"], strict=True)] for name in ("all", "sinks_exact")
    }
    return Claim(
        id="quantised-cache",
        statement="Keys in 4 bits with one step per tensor lose at most half as much when the sinks stay exact.",
        paper=PaperValue("loss gap at least halved", "planned check of this project", "quantised cache"),
        measured=_ratio(gaps["sinks_exact"], gaps["all"], context, "quantised"),
        others={"gap": _mean(gaps["all"], context, "gap")},
        criterion=CRITERIA["quantised-cache"],
        details={"losses": losses, "source": quantised["source"]},
    )


def _explanations(explained: dict[str, Any], context: Context) -> list[Claim]:
    groups = explained["groups"]

    def of(name: str) -> list[float]:
        return [g[name] for g in groups if g[name] is not None and g[name] == g[name]]

    planned = "planned check of this project"
    details = {"groups": groups, "source": explained["source"]}
    return [
        Claim(
            id="implicit-bias-sink",
            statement="What the sink adds to a head's output is nearly the same vector in different texts.",
            paper=PaperValue("near 1", "mean pairwise cosine", "implicit bias"),
            measured=_mean(of("sink"), context, "bias sink"),
            criterion=CRITERIA["implicit-bias-sink"],
            notes="Only pairs of different texts count: within one text one sink gives one direction by construction. "
            "Groups of texts are the units.",
            details=details,
        ),
        Claim(
            id="implicit-bias-random",
            statement="What an ordinary token adds in the same heads differs from text to text.",
            paper=PaperValue("< 0.5", planned, "implicit bias"),
            measured=_mean(of("random"), context, "bias random"),
            baseline=_mean(of("sink"), context, "bias sink again"),
            criterion=CRITERIA["implicit-bias-random"],
        ),
        Claim(
            id="no-op",
            statement="In heads that sink, most attention makes little of the output.",
            paper=PaperValue("small", "", "no-op"),
            measured=_mean(of("contribution"), context, "contribution"),
            others={"share": _mean(of("share"), context, "share")},
            criterion=CRITERIA["no-op"],
            notes="The survey gives no border for small; 0.3 is ours.",
        ),
        Claim(
            id="outlier-circuit",
            statement="The sink gets its attention from a few massive coordinates of one block's output.",
            paper=PaperValue("", "ablation of the top coordinates", "outlier circuit"),
            measured=_mean(of("circuit"), context, "circuit"),
            criterion=CRITERIA["outlier-circuit"],
            notes="Three coordinates are set to zero behind the first block whose output is massive (> 100 and ≥ 1000 "
            "× the median). The survey gives no border; one half is ours.",
        ),
    ]


def _mean(values: Sequence[float], context: Context, name: str, *, seeds: Sequence[int] = ()) -> Measurement:
    """The mean over independent units; NaN where there is none."""
    if not values:
        return Measurement(float("nan"), n=0)
    return bootstrap(values, generator=context.generator(name), seeds=tuple(seeds))


def _ratio(above: Sequence[float], below: Sequence[float], context: Context, name: str) -> Measurement:
    """Ratio of means over the same units; NaN where the mean below is 0."""
    if not sum(below):
        return Measurement(float("nan"), n=len(below))
    return bootstrap_ratio(above, below, paired=True, generator=context.generator(name))


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "an 8 B model and 20,000 steps per arm need a GPU. Run size small."
    return None


RECIPE = Recipe(
    slug="sink-survey",
    title="Attention Sink in Transformers: mitigation arena, exact sinks in a quantised cache, explanations",
    run=run,
    criteria=CRITERIA,
    obstacle=_obstacle,
)
