"""The task `streaming`: a text that goes on far beyond the prompts of a comparison, read piece by piece.

    PPL( x_i , i ≥ tokens | what the method keeps of x_0 … x_i−1 ) ,   the text being TIMES · tokens long

Dense attention keeps everything. Beside every method stands its ratio to windows of as many tokens as a prompt has that
are read afresh for every token: what a stream costs without any method, and what one has to match (Xiao et al., arXiv
2309.17453). A method at a budget of the keys has a share of that window only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.compare.cells import Score
from headway.compare.setting import Setting, bootstrap_mean, refuse_driver
from headway.compare.texts import BLOCK
from headway.door.rotary import host_frequencies
from headway.errors import ArgumentError
from headway.hosts import positions_of, tokenize
from headway.tasks.perplexity import perplexity, recompute_perplexity

#: A stream is so many times as long as a prompt.
TIMES = 4
#: Runs of tokens that are also read afresh, and their length: a run shares one reading.
RUNS, RUN = 12, 16


@dataclass
class Stream:
    """The text of a stream, where scoring starts, and the nll of some of its tokens from windows read afresh, which is
    measured when a cell first asks for it, with nothing attached."""

    model: nn.Module
    ids: Int[Tensor, "1 tokens"]
    window: int
    places: tuple[int, ...]
    afresh: Float[Tensor, " places*run"] | None = field(default=None)

    def ready(self) -> Stream:
        if self.afresh is None:
            self.afresh = recompute_perplexity(
                self.model, self.ids, self.places, length=self.window, batch=1, run=RUN
            ).double()  # fmt: skip
        return self


def prepare(setting: Setting) -> Stream:
    """Raises ArgumentError for a text that does not go on beyond a prompt by two blocks, or a model that cannot."""
    wanted, positions = TIMES * setting.tokens, positions_of(setting.model)
    if positions is not None and host_frequencies(setting.model, 0)[0] is None:
        wanted = min(wanted, positions)
    ids = tokenize(setting.tokenizer, setting.text, wanted, allow_longer=True)
    scored = ids.shape[1] - setting.tokens
    if scored < 2 * BLOCK:
        raise ArgumentError(
            f"tokens: got {setting.tokens:,} for a stream of {ids.shape[1]:,} (what text and model have), expected at "
            f"least {2 * BLOCK} tokens more in the stream. Give fewer tokens or a longer text, or leave out the task "
            "streaming."
        )
    runs = min(RUNS, scored // RUN)
    places = torch.linspace(setting.tokens, ids.shape[1] - RUN, runs).long().tolist()
    return Stream(setting.model, ids, setting.tokens, tuple(places))


def measure(setting: Setting, stream: Stream, mode: str, drives: bool) -> tuple[list[Score], int | None]:
    """Perplexity behind the length of a prompt, read in the prefill chunks of the comparison or in blocks; and its
    ratio to that of windows read afresh, at the same tokens."""
    refuse_driver(drives, "streaming")
    found = perplexity(setting.model, stream.ids, chunk=setting.chunk or BLOCK, skip=stream.window)
    nll = found.nll.double()
    parts = nll[: nll.numel() // BLOCK * BLOCK].view(-1, BLOCK).mean(1).tolist()
    low, high = (math.exp(x) for x in bootstrap_mean(parts))
    common: dict[str, Any] = {"task": "streaming", "higher_is_better": False}
    scores = [
        Score(
            **common, name="perplexity", value=math.exp(float(nll.mean())), low=low, high=high, n=nll.numel(),
            unit="per token", parts=parts,
        )
    ]  # fmt: skip
    if stream.afresh is not None:
        at = torch.tensor(stream.places)[:, None] + torch.arange(RUN) - stream.window
        rises = (nll[at] - stream.afresh.view(-1, RUN)).mean(1).tolist()
        low, high = (math.exp(x) for x in bootstrap_mean(rises))
        scores.append(
            Score(
                **common, name=f"perplexity ÷ windows of {stream.window:,} afresh",
                value=math.exp(sum(rises) / len(rises)), low=low, high=high, n=at.numel(), unit="×", primary=False,
                parts=rises,
            )
        )  # fmt: skip
    return scores, found.cache_bytes
