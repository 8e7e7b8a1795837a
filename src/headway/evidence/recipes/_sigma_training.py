"""Small character models for the recipe of Sigma: arms that differ in heads or parameters, trained alike.

    fewer keys       2 key heads, 8 value heads     fewer values   8 key heads, 2 value heads      (baseline 8 and 8)
    smaller keys     key heads of half the size, absorbed into the query
    augmented query  A = width                      wider MLP      as many parameters more in the MLP

All arms of a seed start from the same random state and read the same batches.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from headway.evidence.parallel import side_by_side
from headway.evidence.recipe import Context
from headway.hosts import default_text
from headway.models import HeadwayConfig, HeadwayForCausalLM

WIDTH, HEADS, LAYERS, MLP_WIDTH = 64, 8, 2, 176
#: Characters beyond this one are read as it.
CHARACTERS = 128
#: 3·width·A parameters of the augmentation are as many as 3·width·δ of a gated MLP.
MORE = WIDTH

ARMS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "fewer keys": {"key_heads": HEADS // 4},
    "fewer values": {"value_heads": HEADS // 4},
    "smaller keys": {"key_dim": WIDTH // HEADS // 2, "key_expand": "absorbed"},
    "augmented query": {"aug_dim": MORE},
    "wider MLP": {},
}


def arms(context: Context) -> dict[str, Any]:
    """Held-out loss in nats per character of every arm and seed, the loss of a bigram model, and parameter counts. The
    arms of a seed are a stage."""
    count, *size = context.choose(smoke=(2, 3, 2, 32), small=(4, 250, 16, 96), full=(8, 4000, 64, 256))
    workers = context.choose(smoke=1, small=2, full=1)
    seeds = context.seeds(count)
    losses: dict[str, list[float]] = {name: [] for name in ARMS}
    parameters: dict[str, int] = {}
    for number, seed in enumerate(context.track(seeds, "character models")):
        calls = [(name, seed, *size) for name in ARMS]
        found = context.stage(f"training-{number}", partial(side_by_side, trained, calls, workers=workers))
        for name, (loss, size_of) in zip(ARMS, found, strict=True):
            losses[name].append(loss)
            parameters[name] = size_of
    train, held = _characters()
    return {
        "losses": losses,
        "bigram": _bigram(train, held),
        "parameters": parameters,
        "seeds": seeds,
        "steps": size[0],
    }


def trained(arm: str, seed: int, steps: int, batch: int, length: int) -> tuple[float, int]:
    """Held-out loss of one arm after training, and its number of parameters."""
    train, held = _characters()
    model = _model(arm, seed)
    _train(model, train, seed, steps, batch, length)
    return _loss(model, held, length), sum(p.numel() for p in model.parameters())


def _characters() -> tuple[Int[Tensor, " train"], Int[Tensor, " held"]]:
    """The default text as character codes; the last tenth is held out."""
    text = torch.tensor([min(ord(c), CHARACTERS - 1) for c in default_text().text])
    border = text.numel() * 9 // 10
    return text[:border], text[border:]


def _model(arm: str, seed: int) -> HeadwayForCausalLM:
    torch.manual_seed(seed)
    options = {"key_heads": HEADS, "value_heads": HEADS, "aug_dim": 0, "rope_base": 10_000.0} | ARMS[arm]
    return HeadwayForCausalLM(
        HeadwayConfig(
            vocab_size=CHARACTERS,
            width=WIDTH,
            heads=HEADS,
            layers=LAYERS,
            mlp_width=MLP_WIDTH + (MORE if arm == "wider MLP" else 0),
            mixer="diffqkv",
            mixer_options=options,
        )
    )


def _train(model: HeadwayForCausalLM, text: Tensor, seed: int, steps: int, batch: int, length: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    warmup = max(steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1.0) * (1 - 0.9 * step / steps)
    )
    model.train()
    for _ in range(steps):
        starts = torch.randint(0, text.numel() - length - 1, (batch,), generator=generator)
        piece = text[starts[:, None] + torch.arange(length + 1)]
        optimizer.zero_grad()
        _nll(model, piece).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _loss(model: HeadwayForCausalLM, text: Tensor, length: int, rows: int = 64) -> float:
    """Mean nll of `rows` windows spread evenly over a text."""
    model.eval()
    starts = torch.linspace(0, text.numel() - length - 2, rows).long()
    pieces = text[starts[:, None] + torch.arange(length + 1)]
    return float(torch.stack([_nll(model, piece) for piece in pieces.split(16)]).mean())


def _nll(model: HeadwayForCausalLM, piece: Int[Tensor, "batch characters"]) -> Tensor:
    logits = model(input_ids=piece[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten())


def _bigram(train: Tensor, held: Tensor) -> float:
    """Nats per character of held-out text under counts of pairs, one added to each."""
    pairs = torch.bincount(train[:-1] * CHARACTERS + train[1:], minlength=CHARACTERS**2).view(CHARACTERS, CHARACTERS)
    chances = (pairs + 1.0) / (pairs + 1.0).sum(1, keepdim=True)
    return float(-chances[held[:-1], held[1:]].log().mean())
