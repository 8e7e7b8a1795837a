"""Decoding the same true tokens with every method: the two versions of the method, their ablations, and rivals.

All read as many keys. `SnapKV` is one choice from the last rows of the prompt, which is what its authors do; as the
number of keys is fixed here, tokens that come later take the place of the worst.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.door.attach import use
from headway.door.call import AttentionCall
from headway.door.stages import CachePolicy
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import Criterion
from headway.evidence.recipe import Context
from headway.evidence.recipes._long_text import perplexity_of, perplexity_ratio
from headway.evidence.recipes._recycled_mass import SNAP_ROWS
from headway.evidence.recipes._recycled_toys import CHECK, SINKS, THRESHOLD
from headway.methods.long_context.recycled_attention import RecycledAttention
from headway.methods.sinks.sink_survey import H2O
from headway.methods.sinks.streaming_llm import StreamingLLM
from headway.statistics import Measurement, bootstrap_difference
from headway.tasks.perplexity import negative_log_likelihood

#: The stride of the paper's language-model runs.
STRIDE = 10


@dataclass(frozen=True, kw_only=True, eq=False)
class SnapKV(RecycledAttention):
    """The prompt's choice by the pooled attention of its last 32 rows, which stay themselves; nothing renews it.

    Paper: SnapKV: LLM Knows What You are Looking for Before Generation, arXiv 2404.14469."""

    stride: int | None = None

    def _scores(self, call: AttentionCall) -> Tensor:
        rows = torch.arange(max(call.queries - SNAP_ROWS, 0), call.queries, device=call.query.device)
        scores = self._ranked(call.weights(rows).sum(2).log(), call.key.shape[1])
        scores[..., -rows.numel() :] = scores[..., -rows.numel() :].masked_fill(
            scores[..., -rows.numel() :] > -torch.inf, torch.inf
        )
        return scores


def arms(budget: int) -> dict[str, CachePolicy | None]:
    """Every method at `budget` keys, dense first."""
    later = partial(RecycledAttention, budget=budget)
    return {
        "dense": None,
        "streaming": StreamingLLM(sinks=SINKS, window=budget - SINKS),
        "h2o": H2O(budget=budget, recent=budget // 2),
        "snapkv": SnapKV(budget=budget),
        "first version": later(stride=STRIDE, pool=1, victim="latest"),
        "recycled": later(stride=STRIDE),
        "dynamic": later(stride=None, threshold=THRESHOLD, check=CHECK),
        "one choice": later(stride=None),
        "attend": later(stride=STRIDE, full_step="attend"),
        "select": later(stride=STRIDE, full_step="select"),
    }


def decoded(
    context: Context, host: Callable[[], Any], *, texts: int, prompt: int, steps: int, budget: int
) -> dict[str, Any]:
    """Per-token nll and the likeliest next tokens, (texts, steps), of every method on the same texts; each is a stage
    of its own."""

    def one(name: str, policy: CachePolicy | None) -> dict[str, Any]:
        model, ids, _ = host()
        length = prompt + steps + 1
        pieces = ids[0, : texts * length].view(texts, length)
        # Chunks of StreamingLLM and of dense attention are exact; recycling and eviction happen in single steps alone.
        sizes = [steps] if name in ("dense", "streaming") else [1] * steps
        with nullcontext() if policy is None else use(model, policy):
            return _decode(model, pieces, prompt, sizes)

    found: dict[str, Any] = {"budget": budget}
    for name, policy in context.track(arms(budget).items(), "decoding"):
        found[name] = context.stage(f"decoding-{name.replace(' ', '-')}", partial(one, name, policy))
    return found


@torch.no_grad()
def _decode(model: Any, texts: Tensor, prompt: int, steps: Sequence[int]) -> dict[str, Any]:
    """Reads the prompt and then the true next tokens in pieces of `steps`."""
    cache = model(input_ids=texts[:, :prompt], use_cache=True, logits_to_keep=1).past_key_values
    start, nll, likeliest = prompt, [], []
    for step in steps:
        out = model(input_ids=texts[:, start : start + step], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        wanted = texts[:, start + 1 : start + 1 + step]
        loss = negative_log_likelihood(out.logits.flatten(0, 1), wanted.flatten())
        nll.append(loss.view(texts.shape[0], step))
        likeliest.append(out.logits.argmax(-1).cpu())
        start += step
    full = cache.full_steps().double().mean() if hasattr(cache, "full_steps") else torch.tensor(0.0)
    return {"nll": torch.cat(nll, 1).tolist(), "next": torch.cat(likeliest, 1).tolist(), "full": float(full)}


def decoding_claims(
    context: Context, found: dict[str, Any], model: str, prompt: int, criteria: Mapping[str, Criterion]
) -> list[Claim]:
    """Perplexity and agreement of the arms, each version of the method beside the figures of its own paper."""
    names = [name for name in found if name != "budget"]
    nll = {name: np.asarray(found[name]["nll"]).ravel().tolist() for name in names}
    block = max(len(found["dense"]["nll"][0]) // 4, 1)
    table = {
        "model": model,
        "context": prompt,
        "budget": found["budget"],
        "perplexity": {name: perplexity_of(nll[name]) for name in names},
        "full steps, mean over layers": {name: found[name]["full"] for name in names},
    }
    dense = np.asarray(found["dense"]["next"])
    agreement = {name: (np.asarray(found[name]["next"]) == dense).ravel().astype(float) for name in names}

    def ratio(method: str, baseline: str) -> Measurement:
        return perplexity_ratio(context, f"{method} {baseline}", nll[method], nll[baseline], block=block)

    def rise(method: str) -> str:
        return _rise_note(found["dense"]["nll"], found[method]["nll"])

    first = "Arxiv, 16k, K = 2048, S = 10, first version"
    later = "Arxiv, 16k, K = 2048, QC = 5, s = 0.8, later version"

    return [
        Claim(
            id="nearer-than-streaming",
            statement="At the same number of keys, recycling predicts better than sinks and a window.",
            paper=PaperValue("2.36 against 2.62", first, "language-model table"),
            measured=ratio("first version", "streaming"),
            criterion=criteria["nearer-than-streaming"],
            others={
                "later_version": ratio("recycled", "streaming"),
                "dynamic": ratio("dynamic", "streaming"),
                "one_choice": ratio("one choice", "streaming"),
            },
            notes="StreamingLLM here evicts in prefill too, as it is used; recycling always prefills densely. The "
            "first version of the method stands beside its own figure; it was the later one before. "
            f"{_blocks_note(found, block)}",
            details=table,
        ),
        Claim(
            id="nearer-than-snapkv",
            statement="At the same number of keys, recycling that is renewed on low similarity predicts better than "
            "SnapKV and H2O.",
            paper=PaperValue("2.27 against 2.54 and 2.48", later, "language-model table"),
            measured=ratio("dynamic", "snapkv"),
            criterion=criteria["nearer-than-snapkv"],
            others={
                "to_h2o": ratio("dynamic", "h2o"),
                "fixed_to_snapkv": ratio("recycled", "snapkv"),
                "snapkv_to_one_choice": ratio("snapkv", "one choice"),
            },
            notes="All prefill densely. SnapKV's keys give way to new tokens, so that their number stays the same. "
            f"{_blocks_note(found, block)}",
            details=table,
        ),
        Claim(
            id="close-to-dense",
            statement="Recycling predicts nearly as well as dense attention.",
            paper=PaperValue("2.36 against 2.22 (6 %)", first, "language-model table"),
            measured=ratio("first version", "dense"),
            criterion=criteria["close-to-dense"],
            others={
                "later_version": ratio("recycled", "dense"),
                "dynamic": ratio("dynamic", "dense"),
                "streaming": ratio("streaming", "dense"),
            },
            notes="The later version reports 2.27 with dynamic full steps (2 %). "
            f"{rise('first version')} The paper's share of keys is the same, an eighth, but there it is 2,048 keys.",
            details=table,
        ),
        Claim(
            id="agrees-with-dense",
            statement="Recycling names dense attention's likeliest next token more often than sinks and a window do.",
            paper=PaperValue("stated through task scores", "RULER at 32k, 63 against 22, first version", "RULER table"),
            measured=bootstrap_difference(
                agreement["recycled"], agreement["streaming"], paired=True, generator=context.generator("agreement")
            ),
            criterion=criteria["agrees-with-dense"],
            details=table | {"agreement": {name: float(same.mean()) for name, same in agreement.items()}},
        ),
        Claim(
            id="refresh-matters",
            statement="What full steps give is the choice that they renew: reading everything now and then is not it.",
            paper=PaperValue(
                "2.50 without refresh, 2.32 reading only the refreshed set", "Arxiv, later version", "ablation"
            ),
            measured=ratio("attend", "select"),
            criterion=criteria["refresh-matters"],
            others={
                "without_to_both": ratio("attend", "recycled"),
                "only_refreshed_to_both": ratio("select", "recycled"),
            },
            notes=f"{len(found['dense']['nll'][0])} tokens of each text, {found['recycled']['full']:.0f} of them in "
            "full steps: until the first of these every arm works with the prompt's choice. "
            f"{_blocks_note(found, block)}",
            details=table,
        ),
    ]


def _rise_note(dense: Sequence[Sequence[float]], other: Sequence[Sequence[float]]) -> str:
    """How the rise of the loss is spread over texts and over tokens."""
    rise = np.asarray(other) - np.asarray(dense)
    most = np.sort(rise.ravel())[::-1][: max(rise.size // 10, 1)]
    by_text = ", ".join(f"{np.exp(value):.2f}" for value in rise.mean(1))
    return (
        f"PPL ÷ dense by text: {by_text}. The tenth of the tokens that lose most lose {most.mean():.2f} nats each, the "
        f"others {(rise.sum() - most.sum()) / max(rise.size - most.size, 1):.2f} on the mean."
    )


def _blocks_note(found: dict[str, Any], block: int) -> str:
    texts = len(found["dense"]["nll"])
    return (
        f"The interval is over blocks of {block} tokens of {texts} texts; with four texts it held 1, and they became "
        "eight. The criterion stayed."
    )
