"""Pass-keys at ten times the toy's length, where nearly all of a text is out of a window's reach.

As in the paper, lengths grow in stages: a model is trained dense through all of them, and then, from the same weights
on the same texts, under the mask and under a window of equal out-degree. Through four layers the mask's graph leads to
two thirds of the far tokens; what is asked is recall there, and that there is none elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from headway.door.stages import Selector
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import Criterion
from headway.evidence.parallel import side_by_side
from headway.evidence.recipe import Context
from headway.evidence.recipes._power_reach import Pattern, seed_of, tiny_lm
from headway.evidence.recipes._power_toys import CHANCE, LAYERS, NOISE, TOY, VALUES, passkeys, scope, stream
from headway.methods.long_context.power_attention import fine_tune, key_blocks, pattern_mask, power_mask, reached
from headway.statistics import bootstrap, bootstrap_difference
from headway.statistics.randomness import generator_of

#: Tokens and texts of a batch in each stage.
STAGES = ((48, 24), (160, 12), (512, 4))
TOKENS = STAGES[-1][0]
#: Learning rates of the first dense stage, which starts from random weights, and of all others.
START_RATE, RATE = 5e-3, 3e-3
DEGREE = len(key_blocks(TOKENS - 1)) - 1
#: A window of so many keys hands nothing on beyond this distance.
WINDOW_REACH = LAYERS * (DEGREE - 1)


def long_toys(context: Context) -> list[dict[str, Any]]:
    """One result per seed; two seeds at a time."""
    seeds = list(range(context.choose(smoke=1, small=3, full=10)))
    workers = context.choose(smoke=1, small=2, full=1)
    found = []
    for first in range(0, len(seeds), workers):
        calls = [(context.size, seed_of(context, f"length {seed}")) for seed in seeds[first : first + workers]]
        found += context.stage(f"length-{first}", partial(side_by_side, long_recall, calls, workers=workers))
    return found


def long_recall(size: str, seed: int) -> dict[str, Any]:
    """Far recall of one model, dense, and under the mask and a window where their graphs lead and where not."""
    dense_steps, steps, texts = {
        "smoke": ((2, 1, 1), (1, 1, 1), 2), "small": ((110, 30, 80), (100, 60, 120), 32),
        "full": ((600, 200, 300), (400, 200, 400), 256),
    }[size]  # fmt: skip
    model = tiny_lm(seed, vocabulary=VALUES + NOISE, tokens=TOKENS, layers=LAYERS)
    test = passkeys(generator_of(seed, 1), texts, tokens=TOKENS)
    _staged(model, None, dense_steps, generator_of(seed, 2))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found: dict[str, Any] = {"dense": far_recall(model, None, test)}
    methods: dict[str, Selector] = {"power": TOY, "window": Pattern(pattern="window", degree=DEGREE)}
    for name, method in methods.items():
        model.load_state_dict(start)
        _staged(model, method, steps, generator_of(seed, 3))
        found[name] = far_recall(model, method, test, long_reach(name))
    return found


def _staged(model: nn.Module, method: Selector | None, steps: Sequence[int], data: torch.Generator) -> None:
    for (tokens, batch), count in zip(STAGES, steps, strict=True):
        rate = START_RATE if method is None and tokens == STAGES[0][0] else RATE
        fine_tune(model, stream(data, batch, tokens), method, steps=count, learning_rate=rate)


def long_reach(name: str) -> Bool[Tensor, "rows tokens"]:
    """Which earlier tokens each row can be informed by through the layers."""
    mask = power_mask(TOKENS) if name == "power" else pattern_mask(name, TOKENS, degree=DEGREE)
    return torch.stack([reached(mask, LAYERS, row)[-1] for row in range(TOKENS)])


@torch.no_grad()
def far_recall(
    model: nn.Module, method: Selector | None, test: dict[str, Tensor], known: Tensor | None = None
) -> dict[str, float]:
    """Share of positions beyond a window's reach that name the pass-key: of all, of those to which a path of the graph
    leads from it, and of the others (NaN where there are none)."""
    with scope(model, method):
        said = cast(Any, model)(input_ids=test["input_ids"], use_cache=False).logits.argmax(-1)
    at = (test["labels"] == -100).sum(1) - 1
    rows = torch.arange(said.shape[1])
    right = (said == test["labels"][:, -1:]).double()
    far = rows - at[:, None] > WINDOW_REACH
    if known is None:
        return {"all": float(right[far].mean())}
    there = known[rows, at[:, None]]
    return {
        "all": float(right[far].mean()),
        "reachable": float(right[far & there].mean()),
        "unreachable": float(right[far & ~there].mean()),
    }


def length_claim(context: Context, toys: Sequence[dict[str, Any]], criterion: Criterion) -> Claim:
    random = context.generator("length intervals")
    power, window = ([toy[name][where] for toy in toys] for name, where in (("power", "reachable"), ("window", "all")))
    far = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) > WINDOW_REACH
    led = float(long_reach("power")[far].double().mean())
    return Claim(
        id="recall-at-length",
        statement="Where nearly all of a text is beyond a window's reach, the mask recalls pass-keys wherever its "
        "graph leads, and a window of equal degree none.",
        paper=PaperValue("5 to 40 % better than static patterns", "pass-key at 4k to 32k, in stages", "experiments"),
        measured=bootstrap(power, generator=random),
        baseline=bootstrap(window, generator=random),
        criterion=criterion,
        others={
            "no_path": bootstrap([toy["power"]["unreachable"] for toy in toys], generator=random),
            "difference": bootstrap_difference(
                [toy["power"]["all"] for toy in toys], window, paired=True, generator=random
            ),
            "dense": bootstrap([toy["dense"]["all"] for toy in toys], generator=random),
        },
        notes=f"{TOKENS} tokens, {LAYERS} layers, {DEGREE} keys and a sink per row; pass-keys more than {WINDOW_REACH} "
        f"tokens back, to {led:.0%} of which a path leads. Stages of {', '.join(str(n) for n, _ in STAGES)} tokens; "
        f"chance is {CHANCE}. Numbers of steps come from pilot runs on other seeds.",
        details={"by seed": list(toys)},
    )
