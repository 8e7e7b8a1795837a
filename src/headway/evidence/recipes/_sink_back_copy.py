"""A caution: a language model with other ways to be silent, on a chain with a copying rule, needs no sink.

    x_{t+1} = x_{t−1}  where x_t is a trigger,   else a draw from P[x_t]        (x_0 opens the sequence)

One layer of attention must read the token before a trigger and do nothing elsewhere, which softmax could solve with a
sink on x_0. But a residual stream and an MLP are there, and a token may attend to itself. The other way round, the
proxy that turns weights which sum to anything into shares can point at x_0 where the weights on it are small. The task
is the bigram-backcopy one of arXiv 2410.13835, small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import at_least, at_most
from headway.evidence.parallel import Together
from headway.evidence.recipe import Context
from headway.methods.sinks.sink_emergence import EPSILON
from headway.methods.sinks.sink_survey.comparison import measure_model
from headway.models import HeadwayConfig, HeadwayForCausalLM
from headway.statistics import Measurement, bootstrap, generator_of, mixed_seed
from headway.train import train

#: The token that opens every sequence, the triggers, and the other symbols behind them.
FIRST, TRIGGERS, SYMBOLS = 0, 3, 16
LENGTH, WIDTH, BATCH, STEPS = 24, 32, 32, 2500
LEARNING_RATE = 3e-3
#: Fresh sequences that a trained model is judged on.
EVALUATION = 128
#: Streams of randomness of one seed: the chain, the sequences.
CHAIN, DATA = 1, 2

_COPIES = at_least(0.9, of="copied", label="share of copies that the model gets right")
CAUTION_CRITERIA = {
    "caution-no-sink": at_most(EPSILON, label="mean weight on the first token", requires=(_COPIES,)),
    "caution-proxy": at_least(EPSILON, label="mean proxy on the first token", requires=(_COPIES,)),
}


@dataclass(frozen=True)
class Caution:
    """How much is trained."""

    seeds: int
    steps: int


def caution_claims(context: Context, together: Together) -> list[Claim]:
    """Trains the model with softmax and with sigmoid, and judges where their weights go."""
    settings = context.choose(smoke=Caution(2, 8), small=Caution(3, STEPS), full=Caution(10, STEPS))
    seeds = context.seeds(settings.seeds)
    found = {
        name: context.stage(f"caution-{name}", partial(_arm, name, seeds, settings.steps, together))
        for name in ("softmax", "sigmoid")
    }

    def mean(name: str, column: str) -> Measurement:
        generator = context.generator(f"caution {name} {column}")
        return bootstrap(found[name][column], generator=generator, seeds=tuple(seeds))

    return [
        Claim(
            id="caution-no-sink",
            statement="A one-layer model with a residual and an MLP learns to copy on cue and grows no sink.",
            paper=PaperValue("share 0.06", "2,500 steps, one seed, planned check of this project", ""),
            measured=mean("softmax", "first_share"),
            others={"copied": mean("softmax", "copied")},
            criterion=CAUTION_CRITERIA["caution-no-sink"],
            notes="A toy without a sink shows nothing about sinks: use one that forces them, or a real model.",
            details={"per seed": found["softmax"]},
        ),
        Claim(
            id="caution-proxy",
            statement="With sigmoid in the same model the proxy makes a sink of the first token.",
            paper=PaperValue("proxy 0.49", "2,500 steps, one seed, planned check of this project", ""),
            measured=mean("sigmoid", "first_share"),
            others={"copied": mean("sigmoid", "copied")},
            criterion=CAUTION_CRITERIA["caution-proxy"],
            notes="`mass` in the details is the sum of the weights, which the proxy hides.",
            details={"per seed": found["sigmoid"]},
        ),
    ]


def transitions(seed: int) -> Float[Tensor, "symbols symbols"]:
    """The chain of a seed: each symbol is followed by a few of the others, and never by `FIRST`."""
    logits = 2.0 * torch.randn(SYMBOLS, SYMBOLS, generator=generator_of(CHAIN, seed))
    logits[:, FIRST] = -torch.inf
    return logits.softmax(-1)


def back_copy_batch(
    chain: Float[Tensor, "symbols symbols"], count: int, generator: torch.Generator
) -> Int[Tensor, "count length"]:
    """Fresh sequences. Triggers are the symbols 1 to `TRIGGERS`; a trigger right behind the first token copies
    nothing."""
    ids = torch.full((count, LENGTH), FIRST)
    for place in range(1, LENGTH):
        before = ids[:, place - 1]
        ids[:, place] = torch.multinomial(chain[before], 1, generator=generator)[:, 0]
        if place > 2:
            ids[:, place] = torch.where(is_trigger(before), ids[:, place - 2], ids[:, place])
    return ids


def is_trigger(ids: Int[Tensor, "*shape"]) -> Tensor:
    return (ids > FIRST) & (ids <= TRIGGERS)


def share_copied(model: HeadwayForCausalLM, ids: Int[Tensor, "count length"]) -> float:
    """Share of the triggers with a token to copy behind which the model's best guess is that token."""
    with torch.no_grad():
        guesses = model(input_ids=ids, use_cache=False).logits[:, 2:-1].argmax(-1)
    asked = is_trigger(ids[:, 2:-1])
    return float((guesses == ids[:, 3:])[asked].float().mean())


def _arm(normalizer: str, seeds: Sequence[int], steps: int, together: Together) -> dict[str, list[float]]:
    runs = together(_train, [(normalizer, seed, steps) for seed in seeds])
    return {name: [run[name] for run in runs] for name in runs[0]}


def _train(normalizer: str, seed: int, steps: int) -> dict[str, float]:
    chain = transitions(seed)
    generator = generator_of(DATA, seed)
    config = HeadwayConfig(
        vocab_size=SYMBOLS, width=WIDTH, layers=1, heads=1, mixer_options={"normalizer": normalizer}, positions=LENGTH
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(mixed_seed(seed))
        model = HeadwayForCausalLM(config)
    draws = iter(lambda: back_copy_batch(chain, BATCH, generator), None)
    train(model, draws, steps=steps, learning_rate=LEARNING_RATE, warmup=min(100, steps // 4), seed=seed)
    ids = back_copy_batch(chain, EVALUATION, generator)
    numbers = measure_model(model.eval(), [(ids, ids)], window=LENGTH // 4)
    kept = ("first_share", "mass", "sink_1", "loss")
    return {"copied": share_copied(model, ids), **{name: numbers[name] for name in kept}}
