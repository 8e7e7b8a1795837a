"""What a method loses at each layer when every layer gets dense attention's own query, key and value.

    output error  e_l = ‖O_l^S − O_l‖_F / ‖O_l‖_F    O_l: dense output of layer l, O_l^S: with the method
    kept mass     m_i = Σ_{j ∈ S(i)} w_ij / Σ_j w_ij = exp(lse_i^S − lse_i)    w: dense weights, S(i): keys that i reads

Dense attention runs once and its outputs are recorded. In a second run a method is attached, and behind every site the
dense output is put back in place of the method's: what one layer loses does not reach the next, so that all of them
decide on recorded tensors. Any selector, policy or editor can be looked at that way, in prefill and in decoding. The
log-sum-exp of rows, which every kernel gives, makes the mass without a map of pairs; a learned sink's own mass is not
counted as a key's. A record keeps layers × tokens × width numbers.

`headway.tasks.fidelity` does the same for one recorded call and one selection.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from headway.door import AttentionCall, Editor, use
from headway.door.stages import PHASES, CachePolicy
from headway.errors import ArgumentError, HostError
from headway.tasks.answering import feed, prefill

#: Rows of a prompt at which mass is taken, evenly over it.
ROWS = 64
STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Record:
    """Dense attention on one text: `steps` of its tokens were fed one by one behind the rest. By site and number of
    its call: output (batch, heads, queries, value_dim), the log-sum-exp over keys of the rows looked at, and the sums
    of query and key, by which an edited call is known."""

    ids: Int[Tensor, "1 tokens"]
    steps: int
    chunk: int | None
    rows: int
    outputs: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    lse: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    sums: dict[tuple[str, int], tuple[float, float]] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PhaseLosses:
    """Of one phase, by layer in the order of the host: relative output error, and mean kept mass over heads and rows.

    The mass is NaN where logits are not those of dense attention: where a policy reads keys at other positions, an
    editor changes query or key, or weights are no softmax."""

    output_error: Float[Tensor, " layers"]
    kept_mass: Float[Tensor, " layers"]


@torch.no_grad()
def record_dense(
    model: nn.Module, ids: Int[Tensor, "1 tokens"], *, steps: int = STEPS, rows: int = ROWS, chunk: int | None = None
) -> Record:
    """Runs the model as it is on `ids`, the last `steps` of them token by token, and keeps every layer's output."""
    if not 0 <= steps < ids.shape[1]:
        raise ArgumentError(f"steps: got {steps} of {ids.shape[1]} tokens, expected at least 0 and fewer than all.")
    if rows < 1:
        raise ArgumentError(f"rows: got {rows}, expected at least 1.")
    record = Record(ids=ids, steps=steps, chunk=chunk, rows=rows)
    _read(model, record, _Recorder(record), steps)
    return record


@torch.no_grad()
def losses(model: nn.Module, record: Record, *, steps: int | None = None) -> dict[str, PhaseLosses]:
    """What the methods of the open scope lose, by phase ("prefill", and "decode" where there are steps).

    `steps` limits how many steps follow the prompt (None: those of the record). Raises HostError when the model does
    not run as it was recorded."""
    steps = record.steps if steps is None else min(steps, record.steps)
    beside = _Beside(record)
    _read(model, record, beside, steps)
    return {phase: beside.found(phase) for phase in ("prefill", "decode") if beside.norm[phase]}


def _read(model: nn.Module, record: Record, editor: Editor, steps: int) -> None:
    behind = record.ids.shape[1] - record.steps
    with use(model, editor, selftest=False):
        running = prefill(model, record.ids[:, :behind], chunk=record.chunk)
        for token in record.ids[0, behind : behind + steps]:
            feed(model, running, token.view(1, 1))


class _Recorder(Editor):
    """Keeps what every site gives; changes nothing."""

    def __init__(self, record: Record) -> None:
        self.record, self.calls = record, Counter[str]()

    def edit_output(self, call: AttentionCall, output: Tensor, lse: Tensor | None) -> Tensor:
        key = (call.site.name, self.calls[call.site.name])
        self.calls[call.site.name] += 1
        self.record.outputs[key] = output
        self.record.sums[key] = _sums(call)
        self.record.layers.setdefault(call.site.name, len(self.record.layers))
        if call.weighing is None:
            self.record.lse[key] = key_mass(call, lse, rows_of(output.shape[2], self.record.rows))
        return output


class _Beside(Editor):
    """Holds a method's output against the recorded one, and puts that in its place."""

    reads_parts = PHASES

    def __init__(self, record: Record) -> None:
        self.record, self.calls = record, Counter[str]()
        self.error: dict[str, defaultdict[str, float]] = {phase: defaultdict(float) for phase in PHASES}
        self.norm: dict[str, defaultdict[str, float]] = {phase: defaultdict(float) for phase in PHASES}
        self.kept: dict[str, defaultdict[str, list[Tensor]]] = {phase: defaultdict(list) for phase in PHASES}

    def edit_output(self, call: AttentionCall, output: Tensor, lse: Tensor | None) -> Tensor:
        site, phase = call.site.name, call.forward.phase
        key = (site, self.calls[site])
        self.calls[site] += 1
        dense = self.record.outputs.get(key)
        if dense is None or dense.shape != output.shape:
            raise HostError(
                f"{site}: got an attention of shape {tuple(output.shape)} that was not recorded, expected the forwards "
                "of the record. Record and compare with the same model, text and chunk."
            )
        self.error[phase][site] += float((output.double() - dense.double()).square().sum())
        self.norm[phase][site] += float(dense.double().square().sum())
        rows = rows_of(output.shape[2], self.record.rows)
        if key in self.record.lse and not self._moved(call, key):
            mass = (key_mass(call, lse, rows) - self.record.lse[key]).exp()
        else:
            mass = torch.full((rows.numel(),), torch.nan)
        self.kept[phase][site].append(mass.flatten())
        return dense

    def _moved(self, call: AttentionCall, key: tuple[str, int]) -> bool:
        """Whether logits differ from the recorded ones. A policy's calls hold other keys, so it has to say it."""
        policy = getattr(call.forward.cache, "policy", None)
        if isinstance(policy, CachePolicy):
            return policy.moves_keys
        return _sums(call) != self.record.sums[key]

    def found(self, phase: str) -> PhaseLosses:
        sites = sorted(self.norm[phase], key=self.record.layers.__getitem__)
        return PhaseLosses(
            output_error=torch.tensor([(self.error[phase][site] / self.norm[phase][site]) ** 0.5 for site in sites]),
            kept_mass=torch.stack([torch.cat(self.kept[phase][site]).double().mean() for site in sites]),
        )


def _sums(call: AttentionCall) -> tuple[float, float]:
    """Of query and key, with weights that rise from 1 to 2, so that an order that changed shows."""
    return _weighted_sum(call.query), _weighted_sum(call.key)


def _weighted_sum(tensor: Tensor) -> float:
    weights = torch.linspace(1, 2, tensor.numel(), dtype=torch.double, device=tensor.device)
    return float(tensor.double().flatten() @ weights)


def rows_of(queries: int, rows: int) -> Int[Tensor, " rows"]:
    """At most `rows` of the query rows, evenly from the first to the last."""
    return torch.linspace(0, queries - 1, min(rows, queries)).round().long().unique()


def key_mass(
    call: AttentionCall, lse: Float[Tensor, "batch heads queries"] | None, rows: Int[Tensor, " rows"]
) -> Float[Tensor, "batch heads rows"]:
    """ln Σ_j exp(logit_ij) over the keys that some rows read: from a kernel's log-sum-exp less the learned sink in it,
    or, where the host's own kernel ran and gave none, from the call."""
    rows = rows.to(call.query.device)
    if lse is None:
        return call.logits(rows).logsumexp(-1).cpu()
    found = lse[:, :, rows].float()
    if call.sinks is not None:
        found = found + torch.log1p(-(call.sinks.float()[None, :, None] - found).exp())
    return found.cpu()
