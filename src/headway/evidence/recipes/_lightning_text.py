"""Byte-level language models of one size and one text: TNL, softmax, linear attention, TNL without a part."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from headway.evidence.parallel import processes
from headway.evidence.recipe import Context
from headway.hosts import default_text
from headway.methods.layers.lightning import tnl_fields
from headway.models import HeadwayConfig, HeadwayForCausalLM
from headway.train import train

ARMS = ("tnl", "softmax", "linear", "no gate", "no decay")
VOCABULARY, HEADS = 256, 4
#: Share of the text, from its end, that is held out.
HELD_OUT = 0.1


def languages(context: Context) -> dict[str, Any]:
    """Validation loss in nats per byte of every arm and seed, and the entropy of the bytes themselves."""
    width, layers, steps = context.choose(smoke=(16, 1, 3), small=(64, 3, 200), full=(512, 12, 20_000))
    batch, tokens = context.choose(smoke=(2, 32), small=(8, 128), full=(64, 1024))
    count, windows = context.choose(smoke=(2, 4), small=(3, 160), full=(5, 40))
    data = torch.tensor(list(default_text().text.encode()), dtype=torch.long)
    cut = int(len(data) * (1 - HELD_OUT))
    held_out = data[cut:].unfold(0, tokens + 1, tokens)[:windows]
    seeds = context.seeds(count)
    found: dict[str, Any] = {"seeds": seeds, "unigram": unigram(data[:cut], held_out), "parameters": {}, "steps": steps}
    one = partial(trained, data=data[:cut], held_out=held_out, size=(width, layers), batch=(batch, tokens), steps=steps)
    with processes(context.choose(smoke=1, small=2, full=1)) as together:
        for arm in context.track(ARMS, "language models"):
            runs = context.stage(f"language-{arm.replace(' ', '-')}", partial(together, one, [(arm, s) for s in seeds]))
            found[arm] = [loss for loss, _ in runs]
            found["parameters"][arm] = runs[0][1]
    return found


def trained(
    arm: str, seed: int, *, data: Tensor, held_out: Tensor, size: tuple[int, int], batch: tuple[int, int], steps: int
) -> tuple[float, int]:
    """Held-out loss of one arm after training, and its number of parameters."""
    torch.manual_seed(seed)
    model = build(arm, *size)
    train(
        model,
        partial(window, data, seed, *batch),
        steps=steps,
        learning_rate=3e-3,
        betas=(0.9, 0.95),
        warmup=max(steps // 20, 1),
        seed=seed,
    )
    return validation(model, held_out), sum(p.numel() for p in model.parameters())


def build(arm: str, width: int, layers: int) -> HeadwayForCausalLM:
    """One arm. A layer has 11·width² weights in each: MLPs make up for what mixers lack."""
    fields: dict[str, Any] = {"vocab_size": VOCABULARY, "layers": layers, "heads": HEADS, "width": width}
    without = round(7 / 3 * width)
    if arm in ("softmax", "linear"):
        options = {} if arm == "softmax" else {"feature": "elu_plus_one"}
        fields |= {"mixer": arm, "mixer_options": options, "tie": False, "mlp": "swiglu", "mlp_width": without}
    else:
        changes = {"tnl": {}, "no gate": {"gate": "none"}, "no decay": {"decay": "none"}}[arm]
        fields |= tnl_fields(width=width, **changes)
        fields |= {"mlp_width": without} if arm == "no gate" else {}
    return HeadwayForCausalLM(HeadwayConfig(**fields))


def window(data: Tensor, seed: int, batch: int, tokens: int, index: int) -> Tensor:
    """Batch number `index` of a seed: the same for every arm."""
    generator = torch.Generator().manual_seed((seed + index) % 2**62)
    starts = torch.randint(len(data) - tokens - 1, (batch,), generator=generator)
    return torch.stack([data[s : s + tokens + 1] for s in starts.tolist()])


@torch.no_grad()
def validation(model: HeadwayForCausalLM, windows: Tensor) -> float:
    model.eval()
    losses = [float(model(input_ids=part, labels=part).loss) * len(part) for part in windows.split(32)]
    return sum(losses) / len(windows)


def unigram(data: Tensor, held_out: Tensor) -> float:
    """Cross-entropy of the held-out bytes under the frequencies of the others: what a model without context can do."""
    frequencies = (torch.bincount(data, minlength=VOCABULARY) + 1.0).log()
    frequencies = frequencies - frequencies.logsumexp(0)
    return float(-frequencies[held_out].mean())
