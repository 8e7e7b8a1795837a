"""Tasks on the text itself: its perplexity in prefill and in decoding, agreement with dense attention, and what each
layer loses on dense attention's own query, key and value."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from headway.compare.cells import Score
from headway.compare.setting import Setting, bootstrap_mean, refuse_driver, share_score
from headway.tasks.agreement import Reference, agree, record
from headway.tasks.answering import feed, prefill
from headway.tasks.perplexity import negative_log_likelihood, perplexity
from headway.tasks.undisturbed import STEPS, Record, losses, record_dense

#: Tokens of a block that counts as one draw when an interval of a perplexity is made.
BLOCK = 64
#: Tokens whose perplexity is taken one by one, and those of a block of them.
DECODED = 128
DECODED_BLOCK = 16
PHASES = ("prefill", "decode")
AGREEMENT_TOKENS = 16
AGREEMENT_ROWS = 32


def measure_perplexity(setting: Setting, _: Any, phase: str, drives: bool) -> tuple[list[Score], int | None]:
    """Prefill: of the whole text at once. Decode: of its last tokens, given one by one after the rest was prefilled,
    which shows what a policy that drops keys after the prompt has lost."""
    refuse_driver(drives, "perplexity")
    if phase == "prefill":
        found = perplexity(setting.model, setting.ids, chunk=setting.chunk or setting.tokens)
        nll, block, held = found.nll, BLOCK, found.cache_bytes
    else:
        nll, held = _decoded_nll(setting, min(DECODED, setting.tokens // 2))
        block = DECODED_BLOCK
    whole = nll.numel() // block * block
    parts = nll[:whole].double().view(-1, block).mean(1).tolist()
    low, high = (math.exp(x) for x in bootstrap_mean(parts))
    score = Score(
        task="perplexity",
        name="perplexity",
        mode=phase,
        value=math.exp(float(nll.double().mean())),
        low=low,
        high=high,
        n=nll.numel(),
        unit="per token",
        higher_is_better=False,
        parts=parts,
    )
    return [score], held


@torch.no_grad()
def _decoded_nll(setting: Setting, count: int) -> tuple[Float[Tensor, " count"], int]:
    """−ln p of the last `count` tokens, each given as the decoder gives its own."""
    ids = setting.ids
    running = prefill(setting.model, ids[:, :-count], chunk=setting.chunk)
    nll = []
    for token in ids[0, -count:]:
        nll.append(negative_log_likelihood(running.logits[-1:], token.view(1)))
        if len(nll) < count:
            feed(setting.model, running, token.view(1, 1))
    return torch.cat(nll), running.cache_bytes


def dense_reference(setting: Setting) -> Callable[[], Reference]:
    """Dense's own answer, recorded when it is first asked for."""

    @functools.cache
    def recorded() -> Reference:
        return record(
            setting.model,
            setting.ids,
            max_new_tokens=AGREEMENT_TOKENS,
            rows=AGREEMENT_ROWS,
            prefill_chunk=setting.chunk or setting.tokens,
        )

    return recorded


def measure_agreement(
    setting: Setting, reference: Reference, mode: str, drives: bool
) -> tuple[list[Score], int | None]:
    refuse_driver(drives, "agreement")
    found = agree(setting.model, reference, prefill_chunk=setting.chunk or setting.tokens)
    same, kl = found.same.double().tolist(), found.kl.double().tolist()
    tokens = Score(
        task="agreement", name="greedy tokens", value=found.token_agreement, low=math.nan, high=math.nan,
        n=found.answer_ids.numel(), primary=False,
    )  # fmt: skip
    low, high = bootstrap_mean(kl)
    divergence = Score(
        task="agreement", name="KL from dense", value=found.mean_kl, low=low, high=high, n=len(kl), unit="nats",
        higher_is_better=False, primary=False, parts=kl,
    )  # fmt: skip
    return [share_score("agreement", "same next token", "", same), tokens, divergence], None


def dense_record(setting: Setting) -> Callable[[], Record]:
    """Dense attention's outputs at every layer, recorded when they are first asked for."""

    @functools.cache
    def recorded() -> Record:
        return record_dense(setting.model, setting.ids, steps=min(STEPS, setting.tokens // 2), chunk=setting.chunk)

    return recorded


def measure_fidelity(setting: Setting, record: Record, phase: str, drives: bool) -> tuple[list[Score], int | None]:
    """The relative error of attention's output, and beside it the kept mass; means over layers, which are the parts."""
    refuse_driver(drives, "fidelity")
    found = losses(setting.model, record, steps=None if phase == "decode" else 0)[phase]
    error, kept = found.output_error.tolist(), found.kept_mass.tolist()
    low, high = bootstrap_mean(error)
    common: dict[str, Any] = {"task": "fidelity", "mode": phase, "n": len(error)}
    scores = [
        Score(**common, name="output error", value=float(np.mean(error)), low=low, high=high, higher_is_better=False,
              parts=error)
    ]  # fmt: skip
    if not any(map(math.isnan, kept)):
        low, high = bootstrap_mean(kept)
        scores.append(
            Score(**common, name="kept mass", value=float(np.mean(kept)), low=low, high=high, primary=False, parts=kept)
        )
    return scores, None
