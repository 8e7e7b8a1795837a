"""Adapters against sinks: what a trained softmax host needs to do without one, beside its weights, trained alone.

    bias     w_hj = e^{s_j} / (e^{b_h} + Σ e^{s_j})           normalizer="learned_denominator"
    affine   w_hj = α_h P_j + (ᾱ_h − α_h) / n                normalizer="affine", arXiv 2602.23057
    gate     o_h ← σ(x W_g)_h o_h ,  2 σ(x W_c)_h o_h , …     gate="head", "element", "conditional", "value", "context"

The survey, arXiv 2604.10098, asks for adapters that are put on a pretrained model; a prefix is in `prefix`. Every part
starts where it changes nothing, or so little as its options say, and is that of `headway.kernels.normalizers`.

    adapter = SinkAdapter(model, gate="context")
    with headway.use(model, adapter.stage()):
        model(input_ids=ids, labels=ids).loss.backward()  # gradients of adapter.parameters(), and of the host's own
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from headway.door.call import AttentionCall, Site
from headway.door.policy_hosts import require_plain_decoder, text_config
from headway.door.stages import Editor
from headway.errors import ArgumentError, HostError, unknown
from headway.kernels.normalizers import AffineScaled, Operation, make_gate, make_normalizer, options_by_gate
from headway.kernels.normalizers.affine import AffineWeighing, affine_output
from headway.kernels.normalizers.gates import OPEN

#: Normalisers that a softmax host can be given from outside, as they start as softmax and need no other weights.
NORMALIZERS = ("learned_denominator", "affine")
#: Gates that open by a bias, which they all get here.
BIASED = ("head", "element", "value")


class SinkAdapter(nn.Module):
    """A normaliser, gates, or both for every layer of a decoder of transformers.

    normalizer: "learned_denominator", "affine" or None. gate: a name of `headway.kernels.normalizers.GATES`, several,
    or None. normalizer_options, gate_options: theirs; with several gates the second maps each name to its own. opened:
    start at the host; False leaves the parts as they start fresh, gates with a bias at one half. At the host such a
    gate has a bias of 12 and passes little gradient on (σ' = 6·10⁻⁶): start it lower, by `gate_options={"bias": 4.0}`
    with `opened=False`, or take "context", which is one at zero with a gradient of a half.

    The host is left as it is: freeze it, and give `adapter.parameters()` to an optimiser. `train` and `eval` of the
    adapter say whether the running mean of affine scales moves. `state_dict` is what there is to keep.

    Raises ArgumentError for names that are unknown or nothing to adapt, HostError for hosts that are no decoders."""

    def __init__(
        self,
        model: nn.Module,
        *,
        normalizer: str | None = None,
        gate: str | Sequence[str] | None = None,
        normalizer_options: Mapping[str, Any] | None = None,
        gate_options: Mapping[str, Any] | None = None,
        opened: bool = True,
    ) -> None:
        super().__init__()
        chosen = options_by_gate(gate, gate_options)
        if normalizer is None and not chosen:
            raise ArgumentError("normalizer, gate: got neither, expected at least one of them to adapt the host by.")
        if normalizer is not None and normalizer not in NORMALIZERS:
            raise unknown("normalizer", normalizer, NORMALIZERS, fix="Others are no softmax at the start.")
        shapes = _shapes(model)
        weight = next(model.parameters())
        self.normalizers = nn.ModuleList(
            make_normalizer(normalizer, **shape, **(normalizer_options or {})) for shape in shapes if normalizer
        )
        self.gates = nn.ModuleDict(
            {
                name: nn.ModuleList(
                    make_gate(name, **shape, **({"bias": OPEN if opened else 0.0} if name in BIASED else {}) | given)
                    for shape in shapes
                )
                for name, given in chosen.items()
            }
        )
        self.layers = len(shapes)
        if opened:
            self.open()
        self.to(device=weight.device, dtype=weight.dtype)

    def open(self) -> None:
        """Every part at what changes nothing, as nearly as it can."""
        parts: list[Any] = [*self.normalizers]
        for normalizer in parts:
            normalizer.start_at_softmax()
        gates: list[Any] = [gate for layers in self.gates.values() for gate in layers]  # type: ignore[attr-defined]
        for gate in gates:
            gate.open()

    def stage(self) -> AdapterStage:
        """What `headway.use` takes."""
        return AdapterStage(adapter=self)


@dataclass(frozen=True, kw_only=True, eq=False)
class AdapterStage(Editor):
    """The adapter at work: a denominator and gates of values before attention, the rest on its output. It reads whole
    calls, and is refused beside a cache policy."""

    adapter: SinkAdapter

    def acts_at(self, site: Site) -> bool:
        return site.kind == "self" and site.layer < self.adapter.layers

    def edit_call(self, call: AttentionCall) -> AttentionCall:
        changes: dict[str, Any] = {}
        for gate in self._gates(call, "value"):
            changes["value"] = gate(call.hidden, changes.get("value", call.value))
        normalizer = self._normalizer(call)
        if normalizer is not None and not isinstance(normalizer, AffineScaled):
            if call.sinks is not None:
                raise HostError(
                    f"{call.site.name}: got a host with learned sinks, expected a softmax whose rows sum to one. It "
                    "has a denominator of its own; adapt it by a gate."
                )
            changes["sinks"] = normalizer.sinks(call.query)
        return call.replace(**changes) if changes else call

    def edit_output(
        self,
        call: AttentionCall,
        output: Float[Tensor, "batch heads queries value_dim"],
        lse: Float[Tensor, "batch heads queries"] | None,
    ) -> Float[Tensor, "batch heads queries value_dim"]:
        normalizer = self._normalizer(call)
        if isinstance(normalizer, AffineScaled):
            padded = call.padded_rows()
            weighing = normalizer.bind(_hidden(call), None if padded is None else ~padded, offset=call.offset)
            assert isinstance(weighing, AffineWeighing)
            found = affine_output(_operation(call), output, weighing.alpha, weighing.average, length=weighing.length)
            output = found.to(output.dtype)
        for gate in self._gates(call, "output"):
            output = gate(_hidden(call), output)
        return output

    def _normalizer(self, call: AttentionCall) -> Any:
        return self.adapter.normalizers[call.site.layer] if len(self.adapter.normalizers) else None

    def _gates(self, call: AttentionCall, place: str) -> list[Any]:
        found: list[Any] = [layers[call.site.layer] for layers in self.adapter.gates.values()]  # type: ignore[index]
        return [gate for gate in found if gate.place == place]


def _shapes(model: nn.Module) -> list[dict[str, int]]:
    """Width, heads and head dimension of every layer."""
    require_plain_decoder(model)
    config = text_config(model)
    width, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    layers = getattr(config, "num_hidden_layers", None)
    if not all(isinstance(x, int) for x in (width, heads, layers)):
        raise HostError(
            f"{type(model).__name__}: got width {width}, {heads} heads and {layers} layers in its config, expected one "
            "number of each."
        )
    assert isinstance(width, int)
    assert isinstance(heads, int)
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or width // heads
    return [{"width": width, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}] * int(layers or 0)


def _hidden(call: AttentionCall) -> Tensor:
    if call.hidden is None or call.hidden.ndim != 3 or call.hidden.shape[1] != call.queries:
        raise HostError(
            f"{call.site.name}: got no hidden state of {call.queries} tokens for the attention module, expected its "
            "input. Adapt the host by a learned denominator, which needs none."
        )
    return call.hidden


def _operation(call: AttentionCall) -> Operation:
    """The call as the kernels of normalisers read it: running sums where a causal call says no more."""
    plain = call.causal and call.mask is None and call.bias is None and call.queries == call.keys and not call.offset
    # A bias of distances differs between heads, and hides the same keys in all of them.
    seen = None if plain else call.visible().any(1, keepdim=True)
    return Operation(
        query=call.query,
        key=call.key,
        value=call.value,
        scale=call.scale,
        causal=plain,
        visible=seen,
    )
