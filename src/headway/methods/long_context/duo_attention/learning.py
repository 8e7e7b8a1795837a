"""Learning gates: the host with every KV head half full, half streaming, against itself.

    out_h = α_h · Full_h + (1 − α_h) · Stream_h ,     Stream: j < S or i − j < R
    L = mean over supervised rows and dimensions of (h_teacher − h_mixed)²  +  λ · mean |α|

h is the last hidden state after the final norm. `teacher_full=True` takes Full_h from the teacher's pass at the same
layer, as the released code does; False computes it on the student's own queries and keys, as the paper writes it. The
host's weights are frozen; the gates are all that learns. One sample at a time: the teacher runs first, without a
gradient, and leaves its head outputs; the released code runs both in one batch of two, which is the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from headway.door.attach import use
from headway.door.call import AttentionCall
from headway.door.stages import Editor
from headway.errors import ArgumentError, HostError, NumericError
from headway.files import write_atomically
from headway.hosts.fingerprint import Fingerprint, check_fingerprint, fingerprint
from headway.kernels.streaming import streaming_attention
from headway.methods.long_context.duo_attention.gates import Gates, kv_geometry
from headway.methods.long_context.duo_attention.passkeys import GateSample

#: The released settings.
STEPS, LEARNING_RATE, PENALTY = 2_000, 0.02, 0.05
TRAIN_SINKS, TRAIN_RECENT = 128, 256
#: Share of the steps in which the rate rises, and again falls; and its floor.
RAMP, FLOOR = 0.2, 0.1


@dataclass(frozen=True)
class Learned:
    """Gates, and both parts of the loss at every step."""

    gates: Gates
    distill: list[float]
    penalty: list[float]


def learn_gates(
    model: nn.Module,
    samples: Callable[[int], GateSample],
    *,
    steps: int = STEPS,
    sinks: int = TRAIN_SINKS,
    recent: int = TRAIN_RECENT,
    learning_rate: float = LEARNING_RATE,
    penalty: float = PENALTY,
    teacher_full: bool = True,
    keep: str | Path | None = None,
    report: Callable[[int, float, float], None] | None = None,
) -> Learned:
    """Gates of a model by distillation on `samples(step)`, such as `PasskeyData`.

    `recent` counts the token itself here (the released training mask). `keep` names a file from which a run that was
    interrupted goes on; it is written every tenth of the steps and removed at the end. `report(step, distill, penalty)`
    is called after every step. Raises ArgumentError for numbers that cannot be, HostError for hosts without a hidden
    state to compare, NumericError when the loss is not finite."""
    if steps < 1 or recent < 1 or sinks < 0 or not learning_rate > 0 or penalty < 0:
        raise ArgumentError(
            f"steps, sinks, recent, learning_rate, penalty: got {steps}, {sinks}, {recent}, {learning_rate}, "
            f"{penalty}; expected steps and recent ≥ 1, a rate above 0, the others ≥ 0."
        )
    shape = kv_geometry(model)
    settings = {"sinks": sinks, "recent": recent, "learning_rate": learning_rate, "penalty": penalty,
                "teacher_full": teacher_full, "steps": steps}  # fmt: skip
    state = _Progress.load(keep, model, shape, settings)
    alpha = state.alpha.to(next(model.parameters()).device).requires_grad_()
    optimiser = torch.optim.AdamW([alpha], lr=learning_rate, weight_decay=0.0)
    state.restore(optimiser, alpha)
    mix = GateMix(alpha, sinks=sinks, recent=recent, teacher_full=teacher_full)
    with _frozen(model), use(model, mix):
        for step in range(state.step, steps):
            distill, cost = mixed_loss(model, mix, samples(step), penalty)
            if not bool(torch.isfinite(distill + cost)):
                raise NumericError(f"loss at step {step}: got {distill.item()}, expected a number. Load it in float32.")
            for group in optimiser.param_groups:
                group["lr"] = learning_rate * rate_factor(step, steps)
            optimiser.zero_grad()
            (distill + cost).backward()
            optimiser.step()
            with torch.no_grad():
                alpha.clamp_(0, 1)
            state.note(step + 1, float(distill.detach()), float(cost.detach()))
            if report is not None:
                report(step, state.distill[-1], state.penalty[-1])
            if keep is not None and (step + 1) % max(steps // 10, 1) == 0:
                state.save(keep, model, optimiser, alpha)
    if keep is not None:
        Path(keep).unlink(missing_ok=True)
    gates = Gates.of(model, alpha.detach(), how="learned", **settings)
    return Learned(gates, state.distill, state.penalty)


def rate_factor(step: int, steps: int) -> float:
    """min(1, max((step + 1)/r, 0.1), max((T − step)/r, 0.1)) with r = T/5: up, flat, down."""
    ramp = RAMP * steps
    return min(1.0, max((step + 1) / ramp, FLOOR), max((steps - step) / ramp, FLOOR))


def mixed_loss(model: nn.Module, mix: GateMix, sample: GateSample, penalty: float) -> tuple[Tensor, Tensor]:
    """L_distill and λ · mean |α| of one sample, with a gradient for the gates. `mix` must be attached to the model."""
    ids = sample.ids.to(next(model.parameters()).device)
    rows = sample.supervised.to(ids.device)
    with torch.no_grad(), mix.teaching():
        wanted = _hidden(model, ids)[:, rows]
    with torch.enable_grad():
        got = _hidden(model, ids)[:, rows]
        distill = (wanted.float() - got.float()).square().mean()
        return distill, penalty * mix.alpha.abs().mean()


class GateMix(Editor):
    """Replaces head outputs by α · full + (1 − α) · streaming. `alpha` is (layers, KV heads).

    In layers with a sliding window the streaming form has no sinks and no more than the window, so where R covers it
    nothing depends on the gate and the penalty alone closes it."""

    def __init__(
        self, alpha: Float[Tensor, "layers kv_heads"], *, sinks: int, recent: int, teacher_full: bool = True
    ) -> None:
        self.alpha, self.sinks, self.recent, self.teacher_full = alpha, sinks, recent, teacher_full
        self._teaching = False
        self._taught: dict[str, Tensor] = {}

    @contextmanager
    def teaching(self) -> Iterator[None]:
        """While it teaches, outputs pass unchanged and are remembered."""
        self._taught.clear()
        self._teaching = True
        try:
            yield
        finally:
            self._teaching = False

    def edit_output(
        self,
        call: AttentionCall,
        output: Float[Tensor, "batch heads queries value_dim"],
        lse: Float[Tensor, "batch heads queries"] | None,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        if call.site.kind != "self":
            return output
        if self._teaching:
            if self.teacher_full:
                self._taught[call.site.name] = output.detach()
            return output
        _refuse_unmixable(call)
        full = self._taught[call.site.name] if self.teacher_full else output
        reach = self.recent - 1 if call.site.window is None else min(self.recent, call.site.window) - 1
        stream = streaming_attention(
            call.query,
            call.key,
            call.value,
            sinks=self.sinks if call.site.window is None else 0,
            reach=reach,
            scale=call.scale,
            softcap=call.softcap,
            sink_logits=call.sinks,
        )
        gate = self.alpha[call.site.layer].clamp(0, 1).to(output.dtype)
        gate = gate.repeat_interleave(call.heads // gate.numel())[:, None, None]
        return gate * full + (1 - gate) * stream


@dataclass
class _Progress:
    """Where a run stands: the gates, the optimiser's moments, and the losses so far."""

    settings: dict[str, Any]
    alpha: Tensor
    step: int = 0
    moments: list[Tensor] = field(default_factory=list)
    distill: list[float] = field(default_factory=list)
    penalty: list[float] = field(default_factory=list)

    @classmethod
    def load(
        cls, path: str | Path | None, model: nn.Module, shape: tuple[int, int], settings: dict[str, Any]
    ) -> _Progress:
        if path is None or not Path(path).exists():
            return cls(settings, torch.ones(shape))
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            alpha, moments = torch.tensor(data["alpha"]), [torch.tensor(x) for x in data["moments"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ArgumentError(
                f"keep: got {path}, which is no run of learn_gates ({error!r}); expected a file that it wrote, or a "
                "name that is free. Name another file."
            ) from None
        if data["settings"] != settings or tuple(alpha.shape) != shape:
            raise ArgumentError(
                f"keep: got {path}, a run with {data['settings']} on gates {tuple(alpha.shape)}; expected {settings} "
                f"on {shape}. Name another file, or remove this one."
            )
        check_fingerprint(Fingerprint.from_dict(data["made_on"]), model, f"keep ({path})")
        return cls(settings, alpha, data["step"], moments, data["distill"], data["penalty"])

    def restore(self, optimiser: torch.optim.Optimizer, alpha: Tensor) -> None:
        if self.moments:
            first, second = (x.to(alpha.device) for x in self.moments)
            optimiser.state[alpha] = {
                "step": torch.tensor(float(self.step)), "exp_avg": first, "exp_avg_sq": second,
            }  # fmt: skip

    def note(self, step: int, distill: float, penalty: float) -> None:
        self.step = step
        self.distill.append(distill)
        self.penalty.append(penalty)

    def save(self, path: str | Path, model: nn.Module, optimiser: torch.optim.Optimizer, alpha: Tensor) -> None:
        moments = [optimiser.state[alpha][name].tolist() for name in ("exp_avg", "exp_avg_sq")]
        content = {
            "made_on": fingerprint(model).to_dict(),
            "settings": self.settings,
            "alpha": alpha.tolist(),
            "step": self.step,
            "moments": moments,
            "distill": self.distill,
            "penalty": self.penalty,
        }
        write_atomically(path, json.dumps(content))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No weight takes a gradient, and nothing is dropped out; both are given back."""
    asked = [p for p in model.parameters() if p.requires_grad]
    training = model.training
    model.eval()
    try:
        for parameter in asked:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)
        model.train(training)


def _hidden(model: nn.Module, ids: Tensor) -> Float[Tensor, "1 tokens width"]:
    """The last hidden state after the final norm, without the work of the head on top."""
    inner = getattr(model, "base_model", model)
    hidden = getattr(inner(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None:
        raise HostError(f"{type(model).__name__}: got no last hidden state, expected a decoder of transformers.")
    return hidden


def _refuse_unmixable(call: AttentionCall) -> None:
    if call.bias is not None or not (call.causal or call.mask is not None):
        raise HostError(
            f"{call.site.name}: got a position bias or attention that sees the future, expected causal attention. Its "
            "heads have no streaming form."
        )
