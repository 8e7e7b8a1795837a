"""Where the sink of a real model stands and what carries it, a planted task that needs one, and what makes it grow.

Measuring part of arXiv 2410.10781: Sink_1 by kind of data, by length and by first token; the companion statistics of
the heads that sink. The first token of every sequence is an ordinary token of the text unless a claim says otherwise.
The planted task (`headway.tasks.trigger_averaging`) has a known answer: softmax cannot be silent without a sink.
Small language models with one thing changed are trained in `_sink_training`; `_sink_back_copy` is a caution about toys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most, between, interval_excludes
from headway.evidence.parallel import processes
from headway.evidence.recipe import Context, Recipe
from headway.evidence.recipes._sink_back_copy import CAUTION_CRITERIA, caution_claims
from headway.evidence.recipes._sink_planted import PLANTED_CRITERIA, planted_claims
from headway.evidence.recipes._sink_training import TRAINING_CRITERIA, training_claims
from headway.methods.sinks.sink_emergence import (
    EPSILON,
    NO_SINK,
    SinkMeasurement,
    measure_sinks,
    uniform_alpha,
    verdict,
)
from headway.statistics import Measurement, bootstrap, bootstrap_ratio
from headway.tasks.trigger_averaging import STEPS

#: Sink_1 of the paper's own 60 M model with softmax: the least that counts as a sink of a trained model here.
PAPER_SMALL_MODEL = 0.1818
#: How far Sink_1 may move before it is called unstable in length, or dependent on the first token. Our choice.
STABLE = 0.2
CRITERIA = {
    "sink-on-first-token": all_of(
        at_least(PAPER_SMALL_MODEL, label="Sink_1"),
        at_most(NO_SINK, of="next", label="highest rate at another token"),
    ),
    "sink-on-random-tokens": at_least(PAPER_SMALL_MODEL, label="Sink_1 on random tokens"),
    "no-sink-on-repeated-token": at_most(NO_SINK, label="Sink_1 on a repeated token"),
    "sink-without-special-token": at_least(1 - STABLE, label="Sink_1 with a random first token ÷ with a special one"),
    "stable-in-length": between(1 - STABLE, 1 + STABLE, label="Sink_1 at the longest length ÷ at the paper's 64"),
    "cosine-not-norm": all_of(
        interval_excludes(0, side="above", label="cos(q, k_1) − cos(q, k)"),
        at_most(1.0, of="key_norm", label="‖k_1‖ ÷ mean ‖k‖"),
    ),
    "value-drain": at_most(0.5, label="‖v_1‖ ÷ mean ‖v‖"),
    "massive-activation": at_least(10.0, label="largest ‖h_1‖ ÷ mean ‖h‖ over layers"),
    **PLANTED_CRITERIA,
    **CAUTION_CRITERIA,
    **TRAINING_CRITERIA,
}


_SEEN = (
    "This bound was set after exploratory numbers of this model had been seen: read the verdict as a description of "
    "this model and text until another one repeats it."
)


@dataclass(frozen=True)
class Settings:
    """How much is measured. `lengths` includes `length`; the sequences of all lengths start at the same tokens."""

    model: str
    sequences: int
    length: int
    lengths: tuple[int, ...]
    long_sequences: int
    seeds: int
    steps: int


@dataclass(frozen=True)
class Host:
    """A causal language model, the tokens of a text, the ids that are special, and which of these opens a document."""

    model: Any
    text: Int[Tensor, " tokens"]
    special: tuple[int, ...]
    opener: int
    source: str


def run(context: Context) -> list[Claim]:
    """All claims: first those about the model, then those about the planted task."""
    settings = context.choose(
        smoke=Settings("tiny random Llama", 4, 16, (8, 16, 24), 3, 2, 10),
        small=Settings("smollm2", 16, 64, (16, 64, 256, 512), 6, 6, STEPS),
        full=Settings("meta-llama/Meta-Llama-3-8B", 100, 64, (16, 32, 64, 128, 256, 512, 1024), 32, 10, STEPS),
    )
    host = cache(lambda: _host(settings))
    data = context.stage("data", lambda: _by_data(host(), settings, context.torch_generator("data")))
    first = context.stage("first-token", lambda: _by_first_token(host(), settings, context.torch_generator("first")))
    length = context.stage("length", lambda: _by_length(host(), settings, context.torch_generator("length")))
    seeds = context.seeds(settings.seeds)
    with processes(context.choose(smoke=1, small=2, full=1)) as together:
        planted = planted_claims(context, seeds, settings.steps, together)
        caution, training = caution_claims(context, together), training_claims(context, together)
    return [
        *_data_claims(data, context),
        _first_token_claim(first, context),
        _length_claim(length, settings, context),
        *_companion_claims(data["natural"], context),
        *planted,
        *caution,
        *training,
    ]


def _host(settings: Settings) -> Host:
    from headway.hosts import default_text, load, tokenize

    if settings.model == "tiny random Llama":
        return _tiny_host()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load(settings.model, dtype="bfloat16" if device == "cuda" else "float32", device=device)
    # Room for every sequence of the longest length, so that windows need not overlap.
    wanted = max(settings.sequences * settings.length, settings.long_sequences * max(settings.lengths)) * 2
    ids = tokenize(tokenizer, default_text(), wanted, allow_longer=True)[0]
    special = tuple(tokenizer.all_special_ids)
    opener = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else special[0]
    text = ids[~torch.isin(ids, torch.tensor(special))]
    return Host(model, text, special, opener, f"{model.name_or_path}, {default_text().source}")


def _tiny_host() -> Host:
    """A random model on the bytes of the default text: shows the shape of the result, and nothing about sinks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from headway.hosts import default_text

    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=259,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=258,
    )
    text = default_text()
    ids = torch.tensor(list(text.text[:20_000].encode()), dtype=torch.long)
    return Host(LlamaForCausalLM(config).eval(), ids, (256, 257, 258), 256, f"random Llama, bytes of {text.source}")


def _windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Int[Tensor, "count length"]:
    """`count` stretches of the text that do not overlap."""
    places = torch.randperm(len(text) // length, generator=generator)[:count]
    return torch.stack([text[p * length : (p + 1) * length] for p in places.tolist()])


def _random_tokens(host: Host, count: int, length: int, generator: torch.Generator) -> Int[Tensor, "count length"]:
    """Tokens drawn evenly from the vocabulary without its special ids."""
    vocabulary = torch.arange(host.model.config.get_text_config().vocab_size)
    ordinary = vocabulary[~torch.isin(vocabulary, torch.tensor(host.special))]
    return ordinary[torch.randint(len(ordinary), (count, length), generator=generator)]


def _measure(host: Host, sequences: Tensor) -> SinkMeasurement:
    return measure_sinks(host.model, sequences, length=None, special_ids=host.special, batch=8)


def _by_data(host: Host, settings: Settings, generator: torch.Generator) -> dict[str, Any]:
    count, length = settings.sequences, settings.length
    random = _random_tokens(host, count, length, generator)
    kinds = {
        "natural": _windows(host.text, count, length, generator),
        "random": random,
        "repeated": random[:, :1].expand(-1, length).contiguous(),
    }
    return {name: _numbers(_measure(host, ids)) for name, ids in kinds.items()} | {"source": host.source}


def _by_first_token(host: Host, settings: Settings, generator: torch.Generator) -> dict[str, Any]:
    """The same text behind different first tokens: its own, a random one, each special one."""
    ids = _windows(host.text, settings.sequences, settings.length, generator)
    random = _random_tokens(host, len(ids), 1, generator)
    behind = {
        f"special {token}": torch.full_like(random, token) for token in dict.fromkeys((host.opener, *host.special))
    }
    variants = {"natural": ids, "random": torch.cat([random, ids[:, 1:]], 1)} | {
        name: torch.cat([first, ids[:, 1:]], 1) for name, first in behind.items()
    }
    measured = {name: _numbers(_measure(host, variant)) for name, variant in variants.items()}
    return {"opener": f"special {host.opener}", "variants": measured}


def _by_length(host: Host, settings: Settings, generator: torch.Generator) -> dict[str, Any]:
    """Prefixes of the same sequences."""
    ids = _windows(host.text, settings.long_sequences, max(settings.lengths), generator)
    return {str(length): _numbers(_measure(host, ids[:, :length])) for length in settings.lengths}


def _numbers(measurement: SinkMeasurement) -> dict[str, Any]:
    """What the claims need of a measurement: per sequence where an interval is taken, else the summary."""
    rates = measurement.supported_rates[1:]
    rates = rates[~rates.isnan()]
    return {
        "sink": measurement.by_sequence(),
        "next": float(rates.max()),
        "hidden_ratio": measurement.hidden_ratio.amax(1),
        "verdict": verdict(measurement),
        "summary": measurement.summary(),
        **_of_sinking_heads(measurement),
    }


def _of_sinking_heads(measurement: SinkMeasurement) -> dict[str, list[float]]:
    """Per sequence, means over the heads that sink into the first token; sequences without such a head are left out."""
    chosen = torch.cat([site.alpha[..., 0] > EPSILON for site in measurement.sites], 1)

    def mean(per_site: Sequence[Tensor]) -> list[float]:
        values = torch.cat(list(per_site), 1)
        some = chosen.any(1)
        return ((values * chosen).sum(1)[some] / chosen.sum(1)[some]).tolist()

    sites = measurement.sites
    parts = [site.decomposition for site in sites]
    return {
        "cosine_gap": mean([d.first_cosine - d.other_cosine for d in parts]),
        "first_cosine": mean([d.first_cosine for d in parts]),
        "other_cosine": mean([d.other_cosine for d in parts]),
        "key_norm": mean([s.key_ratio.repeat_interleave(s.site.groups, 1) for s in sites]),
        "value_norm": mean([s.value_ratio.repeat_interleave(s.site.groups, 1) for s in sites]),
    }


def _data_claims(data: dict[str, Any], context: Context) -> list[Claim]:
    natural, random, repeated = data["natural"], data["random"], data["repeated"]
    details = {
        "source": data["source"],
        "uniform attention would give the first token": float(uniform_alpha(natural["summary"]["length"])[0]),
        **{name: data[name]["verdict"] for name in ("natural", "random", "repeated")},
    }
    sink = _mean(natural["sink"], context, "natural")
    return [
        Claim(
            id="sink-on-first-token",
            statement="On natural text without a special first token, heads sink into the first token and no other.",
            paper=PaperValue("Sink_1 99.02 %", "Llama-3-8B, natural text, T = 64, ε = 0.3", "open-source models"),
            measured=sink,
            criterion=CRITERIA["sink-on-first-token"],
            others={"next": Measurement(natural["next"])},
            notes=f"The bound of {PAPER_SMALL_MODEL:.2%} is the paper's own 60 M model with softmax. {_SEEN}",
            details={**details, "summary": natural["summary"]},
        ),
        Claim(
            id="sink-on-random-tokens",
            statement="Tokens drawn at random from the vocabulary have the sink as well.",
            paper=PaperValue("sinks exist with various inputs", "autoregressive language models", "abstract"),
            measured=_mean(random["sink"], context, "random"),
            baseline=sink,
            criterion=CRITERIA["sink-on-random-tokens"],
            notes=_SEEN,
            details={"summary": random["summary"]},
        ),
        Claim(
            id="no-sink-on-repeated-token",
            statement="One token repeated has no sink: without absolute positions all its vectors are the same.",
            paper=PaperValue("", "a control with a known answer, derived here", ""),
            measured=_mean(repeated["sink"], context, "repeated"),
            baseline=sink,
            criterion=CRITERIA["no-sink-on-repeated-token"],
            notes=_SEEN,
            details={"summary": repeated["summary"]},
        ),
    ]


def _first_token_claim(first: dict[str, Any], context: Context) -> Claim:
    variants, opener = first["variants"], first["opener"]
    ratio = _ratio(variants["random"]["sink"], variants[opener]["sink"], context, "first token")
    return Claim(
        id="sink-without-special-token",
        statement="The sink needs no special token: a random first token gets it before the same text.",
        paper=PaperValue("≈ 27 % against 18.18 %", "60 M model, random first token in training", "data distribution"),
        measured=ratio,
        criterion=CRITERIA["sink-without-special-token"],
        notes=f"The paper's figure is from training with random first tokens; here a trained model meets one. {_SEEN}",
        details={name: v["verdict"] for name, v in variants.items()},
    )


def _length_claim(length: dict[str, Any], settings: Settings, context: Context) -> Claim:
    longest = str(max(settings.lengths))
    ratio = _ratio(length[longest]["sink"], length[str(settings.length)]["sink"], context, "length")
    return Claim(
        id="stable-in-length",
        statement=f"With ε = 0.3 Sink_1 at {longest} tokens is within {STABLE:.0%} of that at {settings.length}.",
        paper=PaperValue("ε = 0.3 is strict enough to be stable in T", "", "the metric"),
        measured=ratio,
        criterion=CRITERIA["stable-in-length"],
        notes=_SEEN,
        details={
            "sink_rate_first": {t: v["summary"]["sink_rate_first"] for t, v in length.items()},
            "sink_rate_first_by_layer": {t: v["summary"]["sink_rate_first_by_layer"] for t, v in length.items()},
            "mean alpha_first": {t: _plain_mean(v["summary"]["alpha_first"]) for t, v in length.items()},
        },
    )


def _companion_claims(natural: dict[str, Any], context: Context) -> list[Claim]:
    by_layer = natural["summary"]
    return [
        Claim(
            id="cosine-not-norm",
            statement="In heads that sink, queries meet the first key at a larger cosine, though that key is shorter.",
            paper=PaperValue("large cosine, small ‖k_1‖", "", "decomposition of q_t · k_1"),
            measured=_mean(natural["cosine_gap"], context, "cosine gap"),
            others={"key_norm": _mean(natural["key_norm"], context, "key norm", unit="×")},
            criterion=CRITERIA["cosine-not-norm"],
            notes=_SEEN,
            details={name: by_layer[name] for name in ("first_cosine", "other_cosine", "key_norm_ratio")},
        ),
        Claim(
            id="value-drain",
            statement="In heads that sink, the value of the first token is small.",
            paper=PaperValue("‖v_1‖ small", "", "companion statistics"),
            measured=_mean(natural["value_norm"], context, "value norm", unit="×"),
            criterion=CRITERIA["value-drain"],
            notes=_SEEN,
            details={"value_norm_ratio": by_layer["value_norm_ratio"]},
        ),
        Claim(
            id="massive-activation",
            statement="The hidden state of the first token is massive in some layer.",
            paper=PaperValue("‖h_1‖ far above the mean", "", "companion statistics"),
            measured=_mean(natural["hidden_ratio"], context, "hidden ratio", unit="×"),
            criterion=CRITERIA["massive-activation"],
            notes=_SEEN,
            details={"hidden_norm_ratio": by_layer["hidden_norm_ratio"]},
        ),
    ]


def _mean(
    values: Sequence[float], context: Context, name: str, *, unit: str = "", seeds: Sequence[int] = ()
) -> Measurement:
    """The mean over independent units; NaN where there is none (no head sinks)."""
    if not values:
        return Measurement(float("nan"), n=0)
    return bootstrap(values, generator=context.generator(name), unit=unit, seeds=tuple(seeds))


def _ratio(above: Sequence[float], below: Sequence[float], context: Context, name: str) -> Measurement:
    """Ratio of means over the same sequences; NaN where nothing sinks at all."""
    if not any(below):
        return Measurement(float("nan"), n=len(below))
    return bootstrap_ratio(above, below, paired=True, generator=context.generator(name))


def _plain_mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _obstacle(size: str) -> str | None:
    if size == "full" and not torch.cuda.is_available():
        return "an 8 B model needs a GPU. Run size small."
    return None


RECIPE = Recipe(
    slug="sink-emergence",
    title="When Attention Sink Emerges in Language Models",
    run=run,
    criteria=CRITERIA,
    obstacle=_obstacle,
)
