"""A small byte model trained on Python's documentation, with and without a token of its own in front of every sample.

Both are trained at one length and then read a held-out text many times as long: dense, through a window alone, through
a window with sinks, and with every window read afresh. Their perplexities are of the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from headway.door.capture import capture
from headway.evidence.claims import Claim, PaperValue
from headway.evidence.criteria import all_of, at_least, at_most
from headway.evidence.parallel import side_by_side
from headway.evidence.recipe import Context
from headway.evidence.recipes._long_text import perplexity_of, perplexity_ratio
from headway.methods.sinks.streaming_llm import (
    add_sink_token,
    streaming_perplexity,
    with_sink,
)
from headway.statistics import Measurement
from headway.tasks.perplexity import perplexity, recompute_perplexity

#: The model with the token in front of every sample, which is the token it always begins with, and the one without.
ARMS = (WITH, WITHOUT) = ("with token", "without")
SINKS = (0, 1, 4)
#: Windows read afresh together.
TOGETHER = 64

_LEARNED = at_most(1, of="to_bigrams", label="PPL within the trained length ÷ that of counted pairs of bytes")
_HAS_SINK = at_least(0.1, of="sink_share", label="mean attention on the first token")
BYTE_CRITERIA = {
    "bytes-match-recomputation": at_most(
        1.03, minimum_n=16, label="PPL of one sink and a window ÷ that of recomputation", requires=_LEARNED
    ),
    "bytes-window-alone": at_least(
        1.1, minimum_n=16, label="PPL of a window alone ÷ with one sink", requires=(_LEARNED, _HAS_SINK)
    ),
    "bytes-dense-beyond": at_least(
        1, minimum_n=16, label="PPL of dense attention beyond twice the trained length ÷ of one sink and a window",
        requires=_LEARNED,
    ),
    "one-sink-token": all_of(
        at_most(1.02, label="with a sink token: PPL at one sink ÷ at four"),
        at_least(1.02, of="without_token", label="without one"),
        requires=at_least(1.1, of="window_alone", label="PPL of a window alone ÷ with four sinks, without a token"),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Bytes:
    """`length` is that of the samples and of the longest cache, `held_out` the bytes streamed, of which every `every`th
    is also predicted from a window that is read afresh."""

    layers: int
    width: int
    length: int
    steps: int
    held_out: int
    every: int
    rows: int = 16
    rate: float = 3e-3

    @property
    def capacities(self) -> tuple[int, int]:
        return self.length // 2, self.length

    @property
    def skip(self) -> int:
        """Where scoring starts: twice the trained length, behind one more token."""
        return 2 * self.length + 1


def arms_of(context: Context, setting: Bytes, workers: int) -> dict[str, Any]:
    """What every arm measured, by name; each is trained in a process of its own where there is more than one."""
    seed = context.seeds(1)[0]
    return dict(zip(ARMS, side_by_side(trained, [(arm, setting, seed) for arm in ARMS], workers=workers), strict=True))


def trained(arm: str, setting: Bytes, seed: int) -> dict[str, Any]:
    """One arm after its training: nll (nats per byte) of held-out bytes by way of reading, and its sink."""
    train, held_out = _texts(setting)
    model, token = _model(setting, seed)
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=setting.rate, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, setting.rate, total_steps=setting.steps + 1)
    for _ in range(setting.steps):
        starts = torch.randint(train.numel() - setting.length, (setting.rows,), generator=generator)
        batch = torch.stack([train[start : start + setting.length] for start in starts.tolist()])
        batch = with_sink(batch, token) if arm == WITH else batch
        optimiser.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
    model.eval()
    front = torch.tensor([token]) if arm == WITH else None
    ids = with_sink(held_out[None], token) if arm == WITH else held_out[None]
    return _read(model, ids, front, setting) | {
        "bigrams": _bigram_nll(train, held_out, [p - int(arm == WITH) for p in _places(setting, ids)])
    }


def _read(model: Any, ids: Tensor, front: Tensor | None, setting: Bytes) -> dict[str, Any]:
    places = _places(setting, ids)
    found: dict[str, Any] = {
        "places": places,
        "dense": perplexity(model, ids, chunk=setting.length, skip=setting.skip).nll.tolist(),
        "sink share": _sink_share(model, ids, setting),
    }
    for capacity in setting.capacities:
        for sinks in SINKS:
            found[f"{sinks} sinks, cache {capacity}"] = streaming_perplexity(
                model, ids, chunk=setting.length, skip=setting.skip, sinks=sinks, window=capacity - sinks
            ).nll.tolist()
        found[f"afresh, cache {capacity}"] = recompute_perplexity(
            model, ids, places, length=capacity, batch=TOGETHER, front=front
        ).tolist()
    return found


def _places(setting: Bytes, ids: Tensor) -> list[int]:
    return list(range(setting.skip, ids.shape[1], setting.every))


@torch.no_grad()
def _sink_share(model: Any, ids: Tensor, setting: Bytes) -> float:
    """Mean attention weight on the first token, over all heads and the later rows of a sample."""
    rows = torch.arange(setting.length // 4, setting.length)
    with capture(model, what=("first",), rows=rows) as reading:
        model(input_ids=ids[:, : setting.length], use_cache=False)
    return float(reading.result().stack("first").double().mean())


def _texts(setting: Bytes) -> tuple[Tensor, Tensor]:
    """The bytes to train on, and those behind them that are held out."""
    from headway.hosts import default_text

    data = torch.tensor(list(default_text().text.encode()))
    return data[: -setting.held_out], data[-setting.held_out :]


def _model(setting: Bytes, seed: int) -> tuple[Any, int]:
    """A small Llama over bytes with one more token; the same weights for every arm."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed % 2**31)
        config = LlamaConfig(
            vocab_size=256, hidden_size=setting.width, intermediate_size=3 * setting.width,
            num_hidden_layers=setting.layers, num_attention_heads=4, num_key_value_heads=4,
            max_position_embeddings=4 * setting.length, pad_token_id=None, bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        model = LlamaForCausalLM(config)
    return model, add_sink_token(model, seed=seed % 2**31)


def _bigram_nll(train: Tensor, held_out: Tensor, places: Sequence[int]) -> list[float]:
    """−ln p(byte | byte before) from counts of the training bytes plus one."""
    counts = torch.ones(256, 256, dtype=torch.float64)
    counts.index_put_((train[:-1], train[1:]), torch.ones(train.numel() - 1, dtype=torch.float64), accumulate=True)
    logs = (counts / counts.sum(1, keepdim=True)).log()
    at = torch.tensor(list(places))
    return (-logs[held_out[at - 1], held_out[at]]).tolist()


def byte_claims(context: Context, setting: Bytes, arms: dict[str, Any]) -> list[Claim]:
    """The four claims; all but the last are about the model with the token."""
    found, long = arms[WITH], setting.length
    one = _stream(found, 1, long)
    gates = {
        "to_bigrams": perplexity_ratio(context, "bigrams", found[f"afresh, cache {long}"], found["bigrams"]),
        "sink_share": Measurement(found["sink share"], unit="of attention"),
    }
    details = {name: _details(arm, setting) for name, arm in arms.items()}
    at_places = [one[place - setting.skip] for place in found["places"]]
    half = setting.capacities[0]
    at_half = [_stream(found, 1, half)[place - setting.skip] for place in found["places"]]
    setup = f"trained here on {setting.length} bytes, {setting.steps} steps"
    return [
        Claim(
            id="bytes-match-recomputation",
            statement="A small byte model predicts through one sink and a window as if every window were read afresh.",
            paper=PaperValue("5.40 against 5.43", "Llama-2-13B, PG19, cache 1024", "table 1"),
            measured=perplexity_ratio(context, "bytes afresh", at_places, found[f"afresh, cache {long}"]),
            criterion=BYTE_CRITERIA["bytes-match-recomputation"],
            others=gates
            | {"at_half_the_cache": perplexity_ratio(context, "bytes half", at_half, found[f"afresh, cache {half}"])},
            notes=f"A cache as long as the samples ({setup}); every window begins with the model's own first token.",
            details=details,
        ),
        Claim(
            id="bytes-window-alone",
            statement="A byte model that puts attention on its first token predicts worse through a window alone.",
            paper=PaperValue("5158.07 against 5.40", "Llama-2-13B, PG19, cache 1024", "table 1"),
            measured=perplexity_ratio(context, "bytes alone", _stream(found, 0, long), one),
            criterion=BYTE_CRITERIA["bytes-window-alone"],
            others=gates,
            notes="How much is lost depends on how strong a sink the model grew, which is given beside it. It has "
            f"{setting.layers} layers of width {setting.width} and is trained for {setting.steps} steps on samples of "
            f"{setting.length} bytes.",
            details=details,
        ),
        Claim(
            id="bytes-dense-beyond",
            statement="Beyond twice the length it was trained at, dense attention predicts worse than one sink and a "
            "window.",
            paper=PaperValue("5641 against 5.40", "Llama-2-13B, PG19, 65 thousand tokens", "table 1"),
            measured=perplexity_ratio(context, "bytes dense", found["dense"], one),
            criterion=BYTE_CRITERIA["bytes-dense-beyond"],
            others=gates,
            details=details,
        ),
        _token_claim(context, setting, arms, details),
    ]


def _token_claim(context: Context, setting: Bytes, arms: dict[str, Any], details: dict[str, Any]) -> Claim:
    def ratio(arm: str, sinks: int) -> Measurement:
        found = arms[arm]
        return perplexity_ratio(
            context, f"{arm} {sinks}", _stream(found, sinks, setting.length), _stream(found, 4, setting.length)
        )

    return Claim(
        id="one-sink-token",
        statement="A model trained with a token of its own in front needs one sink; one trained without needs more.",
        paper=PaperValue("18.01 with one learnable sink against 18.05 with four", "160 M parameters", "table 3"),
        measured=ratio(WITH, 1),
        criterion=BYTE_CRITERIA["one-sink-token"],
        others={
            "without_token": ratio(WITHOUT, 1),
            "window_alone": ratio(WITHOUT, 0),
            "window_alone_with_token": ratio(WITH, 0),
        },
        notes=f"Two byte models of {setting.steps} steps: where the one without the token grows no sink, the claim "
        "says nothing.",
        details=details,
    )


def _stream(found: dict[str, Any], sinks: int, capacity: int) -> list[float]:
    nll: list[float] = found[f"{sinks} sinks, cache {capacity}"]
    return nll


def _details(found: dict[str, Any], setting: Bytes) -> dict[str, Any]:
    """Perplexities per byte by way of reading, and the sink."""
    table = {name: perplexity_of(nll) for name, nll in found.items() if name not in ("places", "sink share")}
    return {
        "perplexity per byte": table,
        "mean attention on the first token": found["sink share"],
        "bytes scored": len(found["dense"]),
        "of them afresh": len(found["places"]),
        "bits per byte, windows afresh": float(np.mean(found[f"afresh, cache {setting.length}"]) / np.log(2)),
    }
