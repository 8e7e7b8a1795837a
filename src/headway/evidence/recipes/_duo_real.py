"""DuoAttention on a real model: gates learned on generated pass-keys, scores without training, and needles.

Needles stand in another half of the text than the pass-keys, at several lengths, out of reach of all streaming heads.
Functions take a `Setting` and plain values, so that they can run in processes of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from headway.door import use
from headway.methods.long_context.duo_attention import DuoAttention, PasskeyData, learn_gates, score_heads
from headway.tasks.samples import Sample

#: Share of streaming heads: what the paper uses for models with grouped queries.
SPARSITY = 0.5
#: Where needles stand, per cent of the text.
DEPTHS = (10.0, 30.0)


@dataclass(frozen=True)
class Setting:
    """One real model: contexts and numbers of learning, and the needles that judge it, so many at each length."""

    model: str
    lengths: tuple[int, ...]
    passkeys: int
    words: int
    steps: int
    rate: float
    train: tuple[int, int]
    serve: tuple[int, int]
    needles: int
    tokens: tuple[int, ...]
    digits: int
    score_texts: int
    score_tokens: int


#: The short runs learn faster per step, or no gate could come from 1 to 0: the paper's 0.02 a step needs 2,000 steps.
SETTINGS = {
    "smoke": Setting("tiny", (160,), 1, 2, 2, 0.05, (4, 16), (4, 16), 1, (360, 480), 3, 2, 96),
    "small": Setting("smollm2", (224, 256, 288), 2, 6, 40, 0.05, (16, 64), (16, 64), 3, (320, 448, 576), 5, 5, 384),
    "full": Setting(
        "gradientai/Llama-3-8B-Instruct-Gradient-1048k",
        tuple(int(x) for x in np.linspace(1_000, 32_000, 50)),
        10, 32, 2_000, 0.02, (128, 256), (64, 256), 10, tuple(int(x) for x in np.linspace(1_000, 32_000, 13)), 7, 50,
        4_096,
    ),
}  # fmt: skip


@lru_cache(maxsize=1)
def host(name: str) -> tuple[Any, Any, str]:
    """Model, tokenizer, text."""
    from headway.hosts import default_text, load

    text = default_text().text
    if name == "tiny":
        from headway.hosts.tiny import tiny_host

        model, _ = tiny_host("llama", vocab_size=_Characters.size, max_position_embeddings=1024)
        return model, _Characters(), text[:20_000]
    large = name != "smollm2"
    model, tokenizer = load(name, device="cuda" if large else "cpu", dtype="bfloat16" if large else "float32")
    return model, tokenizer, text


def learn_on_passkeys(setting: Setting, seed: int, folder: Path, report: Callable[..., None]) -> dict[str, Any]:
    """Gates of the model, kept in `folder` while they are learned and behind it."""
    model, tokenizer, text = host(setting.model)
    data = PasskeyData(
        tokenizer=tokenizer, text=text[: len(text) // 2], lengths=setting.lengths, passkeys=setting.passkeys,
        words=setting.words, seed=seed,
    )  # fmt: skip
    found = learn_gates(
        model, data, steps=setting.steps, sinks=setting.train[0], recent=setting.train[1], learning_rate=setting.rate,
        keep=folder / "gates.partial.json", report=report,
    )  # fmt: skip
    found.gates.save(folder / "gates.json")
    return {
        "gates": found.gates.values,
        "distill": found.distill,
        "penalty": found.penalty,
        "mean": float(found.gates.values.mean()),
        "above half": float((found.gates.values > 0.5).double().mean()),
    }


def scored(setting: Setting, scoring: str) -> Any:
    """Scores of the KV heads without training."""
    model, tokenizer, text = host(setting.model)
    sinks, recent = setting.serve
    ids = tokenizer(text[: 40 * setting.score_texts * setting.score_tokens], verbose=False)["input_ids"]
    pieces = torch.tensor(ids).split(setting.score_tokens)[: setting.score_texts]
    found = score_heads(model, [piece[None] for piece in pieces], scoring=scoring, sinks=sinks, recent=recent)
    return found.values.tolist()


def needle_scores(setting: Setting, seed: int, arm: str, gates: Sequence[Sequence[float]]) -> list[dict[str, float]]:
    """Score of every needle under one choice of heads: "full", "everywhere", or by the gates.

    "everywhere" makes all heads streaming heads, with a window that takes the memory of half of the heads whole."""
    from headway.tasks.needle import planted_score

    model, tokenizer, _ = host(setting.model)
    found = []
    for tokens in setting.tokens:
        policy = _policy(setting, arm, gates, tokens)
        with nullcontext() if policy is None else use(model, policy):
            for sample in needles(setting, seed, tokens):
                score = planted_score(model, tokenizer, sample, question_aware=True)
                found.append({"tokens": tokens, "nll": score.mean_nll, "rank_one": score.rank_one_rate,
                              "exact": float(score.rank_one.all())})  # fmt: skip
    return found


def needles(setting: Setting, seed: int, tokens: int) -> list[Sample]:
    """The needles of one length."""
    from headway.tasks.needle import needle_sample

    _, tokenizer, text = host(setting.model)
    random = np.random.default_rng([seed, tokens])
    return [
        needle_sample(
            tokenizer, tokens, float(random.uniform(*DEPTHS)), random, text=text[len(text) // 2 :],
            digits=setting.digits,
        )
        for _ in range(setting.needles)
    ]  # fmt: skip


def _policy(setting: Setting, arm: str, gates: Sequence[Sequence[float]], tokens: int) -> DuoAttention | None:
    sinks, recent = setting.serve
    values = torch.tensor(gates)
    if arm == "full":
        return None
    if arm == "everywhere":
        near = min((sinks + recent) / tokens, 1.0)
        window = round((SPARSITY * near + 1 - SPARSITY) * tokens) - sinks
        return DuoAttention(gates=values, sparsity=1.0, sinks=sinks, recent=window)
    return DuoAttention(gates=values, sparsity=SPARSITY, sinks=sinks, recent=recent)


class _Characters:
    """A tokenizer of single characters, for runs that only show that everything runs."""

    size = 136
    chat_template = None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [8 + ord(c) % 128 for c in text]}
