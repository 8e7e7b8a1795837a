"""One arm: builds its model, trains it, measures it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from headway.door import Observer, observe
from headway.door.call import AttentionCall
from headway.hosts import Text
from headway.lab.arms import VOCABULARY, Arm
from headway.lab.data import ByteSequences, Split, held_out, split_bytes
from headway.lab.measures import measure_arm, parameters_of
from headway.lab.result import ArmResult
from headway.models import HeadwayConfig, HeadwayForCausalLM
from headway.progress import Tell
from headway.train import Batch, Loss, model_loss, train
from headway.train.losses import scored
from headway.train.optimizers import make_optimizer
from headway.train.sink_losses import decorrelation_loss, head_balance_loss, non_sink_mass, tail_penalty

#: Held-out sequences that every arm is measured on.
EVALUATION = 64
#: A checkpoint is written so often in a run.
CHECKPOINTS = 10


def build(arm: Arm, seed: int) -> HeadwayForCausalLM:
    """The untrained model of an arm. Seeds give the same weights to arms of the same shape, but for what an arm
    adds."""
    attention = {
        "normalizer": arm.normalizer,
        "normalizer_options": dict(arm.normalizer_options),
        "gate": arm.gate,
        "gate_options": dict(arm.gate_options),
        "position": arm.position,
        "window": arm.window,
        "prefix": arm.prefix,
        "kv_heads": arm.kv_heads,
        "max_positions": arm.length,
    }
    config = HeadwayConfig(
        vocab_size=VOCABULARY, width=arm.width, layers=arm.layers, heads=arm.heads, mixer="softmax",
        mixer_options=attention, mlp=arm.mlp, norm=arm.norm, norm_place=arm.norm_place, positions=arm.length,
        embed_projection=arm.embed_projection,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HeadwayForCausalLM(config)


def run_arm(
    arm: Arm,
    seed: int,
    text: Text | Split,
    *,
    folder: Path | None = None,
    evaluation: int = EVALUATION,
    progress: Tell | None = None,
) -> ArmResult:
    """Trains one arm with one seed and measures it. With a folder the training goes on where it was interrupted; what
    it kept there is removed once the arm is measured."""
    split = text if isinstance(text, Split) else split_bytes(text)
    model = build(arm, seed)
    judged = held_out(split, arm, evaluation)
    trained = train(
        model,
        ByteSequences(split, arm, seed),
        steps=arm.steps,
        loss=partial(loss_with_terms, terms=arm.terms) if arm.terms else model_loss,
        optimizer=partial(
            make_optimizer, arm.optimizer, learning_rate=arm.learning_rate, weight_decay=arm.weight_decay
        ),
        warmup=min(arm.warmup, arm.steps - 1),
        schedule=arm.schedule,
        clip=arm.clip,
        seed=seed,
        folder=folder,
        resume=folder is not None,
        checkpoint_every=None if folder is None else max(arm.steps // CHECKPOINTS, 1),
        keep=1,
        progress=(lambda what, done, total: progress(f"{arm.name}: {what}", done, total)) if progress else False,
    )
    model.eval()
    course = trained.losses
    numbers = measure_arm(model, arm, judged)
    numbers["params"] = float(parameters_of(model))
    numbers["ms_per_step"] = 1e3 * trained.seconds / trained.steps
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    return ArmResult(arm=arm.name, group=arm.group, seed=seed, numbers=numbers, course=thinned(course))


class HeadMass(Observer):
    """What every head of every layer gives to keys behind the first one, with its gradient."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.mass: list[Tensor] = []

    def observe(self, call: AttentionCall, output: Tensor, lse: Tensor | None = None) -> None:
        # The door keeps observers out of the graph; this one is there for its gradient.
        with torch.enable_grad():
            self.mass.append(non_sink_mass(call.weights()))

    def result(self) -> list[Tensor]:
        return self.mass


def loss_with_terms(model: nn.Module, batch: Batch, *, terms: Mapping[str, float]) -> Loss:
    """The model's loss and weighted terms, each the mean over layers: on the states between blocks, and of
    `head-balance` on attention weights, whose sink is the first key. The log keeps the terms apart."""
    assert not isinstance(batch, Tensor)
    reader = HeadMass()
    with observe(model, reader, selftest=False) if "head-balance" in terms else nullcontext():
        output = model(**batch, output_hidden_states=True, use_cache=False)
    states = output.hidden_states[1:-1] or output.hidden_states[:1]
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Sequence[Tensor]]] = {
        "decorrelation": (decorrelation_loss, states),
        "tail": (tail_penalty, states),
        # The first query sees the sink alone.
        "head-balance": (head_balance_loss, [mass[:, :, 1:] for mass in reader.mass]),
    }
    values = {}
    for name in terms:
        function, tensors = functions[name]
        values[name] = torch.stack([function(x) for x in tensors]).mean()
    total = output.loss + sum(weight * values[name] for name, weight in terms.items())
    metrics = {name: float(value.detach()) for name, value in values.items()}
    return Loss(total, scored(batch["labels"]), {"own_loss": float(output.loss.detach()), **metrics})


def thinned(losses: tuple[float, ...], most: int = 100) -> list[float]:
    """Training losses, each the mean of an equal stretch of steps."""
    size = max(-(-len(losses) // most), 1)
    return [sum(losses[i : i + size]) / len(losses[i : i + size]) for i in range(0, len(losses), size)]
