"""TAPPA on a trained model: do heads with alike queries have predictable rows, of weights and of logits?

Each text is read once and gives one number per head and measure. The claims speak of all heads of a model, so texts are
what was drawn: the measured coefficient is the mean over texts of that over heads. Its interval over heads, of measures
averaged over texts, stands beside it and has to agree, as two texts share their heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from headway.door import observe
from headway.door.call import AttentionCall
from headway.door.stages import Observer
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, rank_correlation_at_least
from headway.evidence.recipe import Context
from headway.evidence.recipes._tappa_budgets import spread
from headway.kernels.dense import normalise
from headway.methods.long_context.tappa import PatternObserver, classify, predictability
from headway.statistics import Measurement, bootstrap, rank_correlation

#: The similarity of the claims on planted queries and on a real model: the one of the paper's theory.
READING = "adjacent_pre_rope"
#: Fewest heads of a real model for a claim about "all heads", and fewest texts.
FEWEST_HEADS, FEWEST_TEXTS = 100, 3

_EACH = all_of(
    rank_correlation_at_least(0.3, minimum_n=FEWEST_TEXTS, label="rank correlation, over texts"),
    rank_correlation_at_least(0.3, of="over_heads", minimum_n=FEWEST_HEADS, label="rank correlation, over heads"),
)
CRITERIA = {"real-weights": _EACH, "real-logits": _EACH}


def claims(context: Context) -> list[Claim]:
    """The two claims; every text is a stage."""
    name, texts, tokens = context.choose(
        smoke=("tiny", 2, 192), small=("smollm2", 4, 512), full=("Qwen/Qwen2.5-7B-Instruct", 8, 8192)
    )
    ready = cache(partial(_host, context, name, texts * tokens))
    found = [
        context.stage(f"real-{number}", partial(_part, name, ready, number, texts, tokens))
        for number in context.track(range(texts), "a real model's heads")
    ]
    return [_weights_claim(context, found), _logits_claim(context, found)]


def _part(
    name: str, ready: Callable[[], tuple[Any, Int[Tensor, "1 tokens"]]], number: int, texts: int, tokens: int
) -> dict[str, Any]:
    return {"model": name, **_read(*ready(), number, texts, tokens)}


def _read(model: Any, ids: Int[Tensor, "1 tokens"], number: int, texts: int, tokens: int) -> dict[str, Any]:
    """Similarity and predictability of every head of a trained model on one text."""
    patterns, steps = PatternObserver.of(model), _StepObserver()
    with observe(model, patterns, steps), torch.no_grad():
        model(input_ids=spread(ids, texts, tokens)[number, None])
    profiles = patterns.result()
    similarity = {
        f"{pairs}_{stage}": np.concatenate([p.query_similarity.pick(pairs, stage) for p in profiles])
        for pairs in ("all", "adjacent")
        for stage in ("pre_rope", "post_rope")
    }
    rows = {name: np.concatenate([getattr(p, name) for p in profiles]) for name in ("vertical", "overlap")}
    rows |= {name: np.concatenate([site[name] for site in steps.result()]) for name in ("steadiness", "without_first")}
    labels = Counter(label for site in classify(profiles) for label in site.labels)
    tightness = np.concatenate([p.vertical_bound.tightness for p in profiles])
    return {
        "tokens": tokens,
        "similarity": similarity,
        "rows": rows,
        "labels": dict(labels),
        "largest_tightness": float(np.nanmax(tightness)),
    }


class _StepObserver(Observer):
    """Per head, over the last rows: minus the largest change of a logit in one step, and r_0 without the first key."""

    ROWS = 256

    def start(self) -> None:
        self._sites: list[dict[str, np.ndarray]] = []

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        first = max(call.queries - self.ROWS, 0)
        logits = call.logits(torch.arange(first, call.queries, device=call.query.device))
        both = (logits[:, :, 1:] > -torch.inf) & (logits[:, :, :-1] > -torch.inf)
        change = (logits[:, :, 1:] - logits[:, :, :-1]).abs().masked_fill(~both, 0.0).amax(-1).mean(-1)
        others = predictability(normalise(logits[..., 1:])[0])
        self._sites.append({"steadiness": -change[0].cpu().numpy(), "without_first": others[0].cpu().numpy()})

    def result(self) -> list[dict[str, np.ndarray]]:
        return self._sites


def _host(context: Context, name: str, tokens: int) -> tuple[Any, Int[Tensor, "1 tokens"]]:
    """A model and a text of at least so many tokens; "tiny" is a random host, to see that the measurement runs."""
    if name == "tiny":
        from headway.hosts.tiny import tiny_host

        model, _ = tiny_host("llama", max_position_embeddings=tokens)
        return model, torch.randint(8, 100, (1, tokens), generator=context.torch_generator("tokens"))
    from headway.hosts import default_text, load, tokenize

    large = context.size == "full"
    model, tokenizer = load(name, device="cuda" if large else "cpu", dtype="bfloat16" if large else "float32")
    return model, tokenize(tokenizer, default_text(), needed=tokens, allow_longer=True).to(model.device)


def _over_texts(context: Context, found: Sequence[dict[str, Any]], reading: str, rows: str) -> Measurement:
    """The mean over texts of the rank correlation over heads."""
    generator = context.generator(f"{reading} {rows} over texts")
    pairs = [(text["similarity"][reading], text["rows"][rows]) for text in found]
    return bootstrap(
        [rank_correlation(*pair, generator=generator, resamples=100).value for pair in pairs], generator=generator
    )


def _over_heads(context: Context, found: Sequence[dict[str, Any]], reading: str, rows: str) -> Measurement:
    """The rank correlation over heads of measures averaged over texts."""
    means = [_mean([text[side][name] for text in found]) for side, name in (("similarity", reading), ("rows", rows))]
    return rank_correlation(*means, generator=context.generator(f"{reading} {rows} over heads"))


def _mean(by_text: Sequence[Sequence[float]]) -> Float[np.ndarray, " heads"]:
    return np.mean(np.asarray(by_text, dtype=float), 0)


def _details(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    first = found[0]
    return {"model": first["model"], "tokens": first["tokens"], "texts": len(found)}


def _weights_claim(context: Context, found: Sequence[dict[str, Any]]) -> Claim:
    others = {
        f"{reading}.{name}": _over_texts(context, found, reading, name)
        for reading in found[0]["similarity"]
        for name in ("vertical", "overlap", "without_first")
        if (reading, name) != (READING, "vertical")
    }
    return Claim(
        id="real-weights",
        statement="In a trained model, heads with more alike queries have more alike adjacent attention rows.",
        paper=PaperValue("stated without a number", where="section 4"),
        measured=_over_texts(context, found, READING, "vertical"),
        criterion=CRITERIA["real-weights"],
        others={"over_heads": _over_heads(context, found, READING, "vertical"), **others},
        notes="The same two numbers as in the claim on planted queries: adjacent queries before RoPE, and r_0, the "
        "mean cosine of adjacent rows. The others are every other similarity (the released code takes all pairs after "
        "RoPE), rows by shared mass (overlap), and r_0 when the first key is left out (without_first), which tells "
        "how much of an agreement is the attention sink. The best of so many readings proves nothing.",
        details={**_details(found), "labels": [text["labels"] for text in found]},
    )


def _logits_claim(context: Context, found: Sequence[dict[str, Any]]) -> Claim:
    others = {
        reading: _over_texts(context, found, reading, "steadiness")
        for reading in found[0]["similarity"]
        if reading != READING
    }
    return Claim(
        id="real-logits",
        statement="In a trained model, heads with more alike queries have logits that move less in one step.",
        paper=PaperValue("‖a_{t+1} − a_t‖_∞ ≥ c₁‖q_{t+1} − q_t‖ − c₂", where="proposition 4.1"),
        measured=_over_texts(context, found, READING, "steadiness"),
        criterion=CRITERIA["real-logits"],
        others={"over_heads": _over_heads(context, found, READING, "steadiness"), **others},
        notes="Against minus the largest change of a logit in one step, averaged over the last 256 rows. This claim "
        "was added when the one on weights had been measured on SmolLM2, so on that model it is exploratory.",
        details={
            **_details(found),
            "largest change / bound": max(text["largest_tightness"] for text in found),
        },
    )
