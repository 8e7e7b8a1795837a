"""TAPPA, the applications: the published order of layers, and pruning by query similarity beside pruning without it.

Every pruned model has as many layers. The passages that judge it are not those that were measured, and a passage is one
draw. KV budgets are in `_tappa_budgets`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_most, interval_excludes
from headway.evidence.recipe import Context
from headway.evidence.recipes import _tappa_budgets as budgets
from headway.methods.long_context.tappa import measure_layers, prune_order, without_attention, without_blocks
from headway.statistics import Measurement, bootstrap, bootstrap_difference
from headway.tasks.perplexity import negative_log_likelihood

#: Block influence and query similarity of Llama-2-7B and its order at β = 0.2, published with the code.
INFLUENCE = (
    .4139, .2746, .1726, .1703, .1856, .1599, .1545, .1465, .1363, .1302, .1229, .1110, .1098, .1129, .1103, .1120,
    .1125, .0897, .0813, .0667, .0695, .0491, .0479, .0393, .0373, .0351, .0359, .0357, .0365, .0362, .0656, .3505,
)  # fmt: skip
SIMILARITY = (
    .4622, .4972, .6256, .6124, .6302, .6287, .5858, .5734, .5841, .5824, .5874, .5765, .5930, .5904, .5812, .6141,
    .6095, .6146, .6107, .6217, .6128, .6156, .5961, .5878, .5888, .5674, .5760, .5723, .5700, .5789, .5857, .5781,
)  # fmt: skip
ORDER = (
    21, 24, 23, 29, 26, 27, 22, 25, 28, 19, 20, 30, 18, 17, 15, 16, 12, 13, 14, 11, 10, 9, 8, 5, 7, 6, 2, 3, 4, 1, 31,
    0,
)  # fmt: skip
#: β of the released Llama-2-7B setting; there is none for the model of this recipe.
BETA = 0.2
#: Other weights of similarity, whose loss is reported beside it.
SWEPT_BETAS = (0.1, 0.3, 0.5, 1.0)

CRITERIA = {
    "published-order": at_most(0, label="places that differ"),
    **budgets.CRITERIA,
    "pruning-against-influence": at_most(0.0, minimum_n=5, label="rise of the loss"),
    "influence-against-random": all_of(
        interval_excludes(
            0.0, side="above", minimum_n=5, label="loss with random layers left out above that with BI's"
        ),
        interval_excludes(0.0, of="over_draws", side="above", minimum_n=3, label="the same over draws of layers"),
    ),
}


def claims(context: Context) -> list[Claim]:
    """The claims, measured."""
    return [
        _order_claim(),
        *budgets.claims(context),
        *_pruning_claims(context, context.stage("pruning", lambda: _pruning(context))),
    ]


@torch.no_grad()
def _pruning(context: Context) -> dict[str, Any]:
    """Loss of each passage with layers left out in the order of BI', of BI, and at random."""
    length, chunks, passages, judged, amounts, draws = context.choose(
        smoke=(32, 2, 3, 24, (1, 2), 2), small=(512, 2, 6, 128, (3, 6), 5), full=(1024, 128, 32, 1024, (4, 8), 10)
    )
    model, _, ids = budgets.host(context, (chunks + passages) * max(length, judged))
    pieces = budgets.spread(ids, chunks + passages, max(length, judged))
    measures = measure_layers(model, [piece[None, :length] for piece in pieces[:chunks]])
    orders = {"similarity": measures.order(BETA), "influence": measures.order(0.0)}
    layers = len(measures.influence)
    random = context.torch_generator("random layers")
    orders |= {f"random_{i}": torch.randperm(layers, generator=random).tolist() for i in range(draws)}
    texts = pieces[chunks:, :judged]
    loss = {name: {n: _loss(model, texts, order[:n]) for n in amounts} for name, order in orders.items()}
    attention = {n: float(np.mean(_loss(model, texts, orders["similarity"][:n], attention=True))) for n in amounts}
    sweep = {beta: {n: _loss(model, texts, measures.order(beta)[:n]) for n in amounts} for beta in SWEPT_BETAS}
    return {
        "dense": _loss(model, texts, []),
        "loss": loss,
        "attention only": attention,
        "by beta": sweep,
        "orders": orders,
        "influence": measures.influence,
        "similarity": measures.similarity,
    }


@torch.no_grad()
def _loss(
    model: Any, texts: Int[Tensor, "passages tokens"], layers: Sequence[int], *, attention: bool = False
) -> list[float]:
    """Mean loss of each passage under a model without some layers."""
    leave_out = without_attention if attention else without_blocks
    with leave_out(model, layers):
        logits = (model(input_ids=text[None], use_cache=False).logits[0, :-1] for text in texts)
        return [float(negative_log_likelihood(x, y[1:]).mean()) for x, y in zip(logits, texts, strict=True)]


def _order_claim() -> Claim:
    found = prune_order(torch.tensor(INFLUENCE), torch.tensor(SIMILARITY), beta=BETA)
    return Claim(
        id="published-order",
        statement="The published measures of Llama-2-7B give the published order of its layers.",
        paper=PaperValue(" ".join(map(str, ORDER)), "β = 0.2", "released code"),
        measured=Measurement(sum(a != b for a, b in zip(found, ORDER, strict=True)), n=len(ORDER)),
        criterion=CRITERIA["published-order"],
    )


def _pruning_claims(context: Context, found: dict[str, Any]) -> list[Claim]:
    random = context.generator("pruning intervals")
    loss = {name: np.mean(list(by.values()), 0) for name, by in found["loss"].items()}
    swept = {beta: np.mean(list(by.values()), 0) for beta, by in found["by beta"].items()}
    drawn = np.array([values for name, values in loss.items() if name.startswith("random")])
    amounts = ", ".join(next(iter(found["loss"].values())))
    details = {key: found[key] for key in ("orders", "influence", "similarity", "attention only")}
    details["mean loss"] = {n: {k: float(np.mean(v)) for k, v in by.items()} for n, by in found["loss"].items()}
    details["mean loss by beta"] = {beta: float(values.mean()) for beta, values in swept.items()}
    note = f"Loss of passages that were not measured on, mean over {amounts} layers left out, passage by passage."

    def above(values: Any, baseline: Any) -> Measurement:
        return bootstrap_difference(values, baseline, paired=True, generator=random, unit="nats")

    return [
        Claim(
            id="pruning-against-influence",
            statement="Leaving layers out in the order of BI' loses no more than in the order of BI.",
            paper=PaperValue("up to +5.60 over ShortGPT", "Llama-3.1-8B, mean accuracy", "README"),
            measured=above(loss["similarity"], loss["influence"]),
            baseline=bootstrap(found["dense"], generator=random, unit="nats"),
            criterion=CRITERIA["pruning-against-influence"],
            others={f"beta_{beta}": above(values, loss["influence"]) for beta, values in swept.items()},
            notes=f"{note} β = {BETA}; none is published for this model, and the others of the sweep stand beside it. "
            f"{_scale_note(found)}",
            details=details,
        ),
        Claim(
            id="influence-against-random",
            statement="Leaving layers out at random loses more than in the order of BI.",
            paper=PaperValue("block influence tells which layers matter", where="ShortGPT, arXiv 2403.03853"),
            measured=above(drawn.mean(0), loss["influence"]),
            criterion=CRITERIA["influence-against-random"],
            others={"over_draws": bootstrap((drawn - loss["influence"]).mean(1), generator=random, unit="nats")},
            notes=f"{note} {_draws_note(found, drawn - loss['influence'])}",
        ),
    ]


def _scale_note(found: dict[str, Any]) -> str:
    """What min–max scaling makes of the two measures."""
    influence, similarity = np.array(found["influence"]), np.array(found["similarity"])
    scaled = (influence - influence.min()) / max(np.ptp(influence), 1e-12)
    return (
        f"Similarities run from {similarity.min():.2f} to {similarity.max():.2f} and are scaled to all of 0 to 1, "
        f"while the median influence is {np.median(scaled):.3f} of its own range, which one layer sets: a β of {BETA} "
        "then outweighs what influence says of most layers."
    )


def _draws_note(found: dict[str, Any], rise: Any) -> str:
    """What single draws of layers lose, and which of them took the first layer."""
    most = max(int(n) for n in next(iter(found["loss"].values())))
    orders = [order for name, order in found["orders"].items() if name.startswith("random")]
    first = [number for number, order in enumerate(orders, 1) if 0 in order[:most]]
    return (
        f"The mean of {len(rise)} draws, which lose {', '.join(f'{x:.2f}' for x in rise.mean(1))} nats more than BI's "
        f"layers; those that take the first layer are number {', '.join(map(str, first)) or 'none'}. `over_draws` "
        "takes the draw for what was drawn, not the passage, and came into the criterion before five draws were "
        "measured: one draw that loses far more than the others makes this interval wide."
    )
