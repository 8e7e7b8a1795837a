"""The planted task of the sink-emergence recipe: one head that must average or be silent, with each normaliser.

The answer is known: softmax can only be silent through a sink on item 0, the others need none. The task is
`headway.tasks.trigger_averaging`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most
from headway.evidence.parallel import Together
from headway.evidence.recipe import Context
from headway.statistics import Measurement, bootstrap
from headway.tasks.trigger_averaging import NORMALIZERS, run_trigger_averaging

#: Normalisers for which it matters how the projections are parametrised; they are trained with biases as well.
SENSITIVE = ("softmax_plus_one", "learned_denominator")

_LEARNED = at_most(0.01, of="error", label="error as a share of always saying zero")
_SILENT = all_of(
    at_most(0.3, label="mass at unflagged items"),
    at_most(3.0, of="eviction", label="error without item 0 ÷ with it"),
    requires=(_LEARNED,),
)

PLANTED_CRITERIA = {
    "planted-softmax": at_least(0.6, label="mean weight on item 0", requires=(_LEARNED,)),
    **{f"planted-{name.replace('_', '-')}": _SILENT for name in NORMALIZERS if name != "softmax"},
}


def planted_claims(context: Context, seeds: Sequence[int], steps: int, together: Together) -> list[Claim]:
    """Trains a head with each normaliser, a stage each, and judges them."""
    train = partial(_planted, seeds=seeds, steps=steps, together=together)
    arms = {name: context.stage(f"planted-{name}", partial(train, name)) for name in NORMALIZERS}
    with_bias = {
        name: context.stage(f"planted-{name}-with-bias", partial(train, name, bias=True)) for name in SENSITIVE
    }

    def mean(values: Sequence[float], name: str) -> Measurement:
        return bootstrap(values, generator=context.generator(name), seeds=tuple(seeds))

    own_check = {
        "softmax": "mean weight 0.75, eviction × 15,000",
        "softmax_plus_one": "mass 0.17, eviction × 1",
        "learned_denominator": "mass 0.02, eviction × 1",
        "sigmoid": "mass 0.00, eviction × 1",
    }
    claims = []
    for name, arm in arms.items():
        share = [e / c for e, c in zip(arm["error"], arm["chance_error"], strict=True)]
        others = {"error": share, "eviction": arm["eviction_ratio"]}
        softmax = name == "softmax"
        identifier = f"planted-{name.replace('_', '-')}"
        claims.append(
            Claim(
                id=identifier,
                statement=_STATEMENTS[softmax].format(name=name.replace("_", " ")),
                paper=PaperValue(own_check[name], "one seed, planned check of this project", "planted task"),
                measured=mean(arm["alpha_first"] if softmax else arm["mass"], name),
                others={key: mean(v, f"{name} {key}") for key, v in others.items()},
                criterion=PLANTED_CRITERIA[identifier],
                details={
                    "per seed": arm,
                    "error without item 0 as a share of always saying zero": [
                        s * e for s, e in zip(share, arm["eviction_ratio"], strict=True)
                    ],
                    **({"tried: projections with biases": with_bias[name]} if name in with_bias else {}),
                },
            )
        )
    return claims


_STATEMENTS = {
    True: "Trained to average or be silent, a {name} head makes item 0 its sink.",
    False: "With {name} the same head is silent without a sink: little weight, and item 0 can go.",
}


def _planted(name: str, *, seeds: Sequence[int], steps: int, together: Together, bias: bool = False) -> dict[str, Any]:
    """The numbers of `TriggerResult`. Seeds do not see each other, so they are trained in two halves."""
    border = (len(seeds) + 1) // 2
    run = partial(run_trigger_averaging, name, steps=steps, bias=bias)
    parts = [asdict(part) for part in together(run, [(half,) for half in (seeds[:border], seeds[border:]) if half])]
    columns = {key: [part[key] for part in parts] for key, value in parts[0].items() if isinstance(value, tuple)}
    return parts[0] | {key: sum(values, ()) for key, values in columns.items()}
