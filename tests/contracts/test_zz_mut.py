"""Methods together: one per phase, editors over selections, and conflicts that name both sides."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.door import HeadGate, Window
from headway.door.stages import Editor, Selector
from headway.errors import ConflictError
from headway.methods.long_context.duo_attention import DuoAttention
from headway.methods.long_context.flexprefill import FlexPrefill
from headway.methods.long_context.power_attention import PowerAttention
from headway.methods.sinks.act import ACT
from headway.methods.sinks.streaming_llm import StreamingLLM
from tests.contracts import methods as contract
from tests.contracts.methods import TOKENS, host, read, tokens
from tests.contracts.test_generation import PROMPT, beams_apart

GENERATE = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
GATES = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def flex(share: float = 0.3) -> FlexPrefill:
    return FlexPrefill(density=share, block=16, min_budget=None, approximates=False)


def duo(**changes) -> DuoAttention:
    return DuoAttention(**({"gates": GATES, "threshold": 0.5, "sinks": 4, "recent": 20, "prefill": "dense"} | changes))


class Decode(Selector):
    """A window, asked in decoding only."""

    phases = frozenset({"decode"})

    def select(self, call):
        return Window(2, 10)


class ByHand(Editor):
    """FlexPrefill's blocks in prefill and DuoAttention's two kinds of heads in steps, as masks over a whole cache.

    Neither the block executor nor a cache policy nor a merge of parts is used."""

    def __init__(self, *, prefill: FlexPrefill | None = None, steps: DuoAttention | None = None) -> None:
        self.prefill, self.steps = prefill, steps

    def edit_call(self, call):
        if call.forward.phase == "prefill" and self.prefill is not None:
            seen = self.prefill.select(call).mask.to_bool()
        elif call.forward.phase == "decode" and self.steps is not None:
            back = call.query_positions[:, None] - call.key_positions
            near = (back < self.steps.recent) | (call.key_positions < self.steps.sinks)
            whole = self.steps.retrieval()[call.site.layer].repeat_interleave(call.groups)
            seen = near[None, None] | whole[None, :, None, None]
        else:
            return call
        return call.replace(mask=seen if call.mask is None else seen & call.mask)


def paths(handle) -> list[set[str]]:
    return [set(row["paths"]) for row in handle.report()]


def test_a_prompt_of_blocks_and_steps_of_two_kinds_of_heads():
    """FlexPrefill in prefill, DuoAttention in decoding: each acts where the other does not."""
    model, ids = host("llama"), tokens()
    with headway.use(model, flex(), duo()) as handle:
        both = read(model, ids, contract.decodes())
        out = model.generate(ids[:, :80], **GENERATE)
    assert all(found == {"blocks", "policy"} for found in paths(handle))
    assert out.shape == (1, 84)
    with headway.use(model, flex()):
        prompt = read(model, ids[:, :-3], [TOKENS - 3])
    contract.close(both[:, :-3], prompt, "the prompt is FlexPrefill's alone", share=1e-5)
    with headway.use(model, flex(1.0), duo(gates=torch.ones(2, 2))):
        whole = read(model, ids, contract.decodes())
    with torch.no_grad():
        contract.close(whole, model(input_ids=ids).logits, "all of it")


@pytest.mark.parametrize("scope", ["prompt", "causal"])
def test_act_calibrates_heads_of_a_policy_that_narrows_decoding(scope):
    """Where the policy drops nothing, its parts say what the host's own calls say; heads of both kinds are named."""
    model, ids = host("llama"), tokens()
    act = ACT(heads=[(0, 0), (0, 1), (0, 3), (1, 3)], beta=0.0, scope=scope, tau=0.01)
    with headway.use(model, act):
        alone = read(model, ids, contract.decodes())
    with headway.use(model, duo(recent=2 * TOKENS), act):
        contract.close(read(model, ids, contract.decodes()), alone, "nothing dropped")
    with headway.use(model, duo()):
        without = read(model, ids, contract.decodes())
    with headway.use(model, duo(), act):
        joined = read(model, ids, contract.decodes())
    assert not torch.allclose(joined[:, -1], without[:, -1])
    assert not torch.allclose(joined[:, -1], alone[:, -1])


@pytest.mark.parametrize("rules", ["prefill", "steps", "both"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["", "with ACT"])
def test_composed_methods_are_their_rules_applied_by_hand(rules, calibrated):
    """Blocks in prefill, two kinds of heads in steps, named heads calibrated in both."""
    model, ids = host("llama"), tokens()
    act = (ACT(heads=[(0, 0), (1, 3)], scope="causal", tau=0.01, beta=0.0),) if calibrated else ()
    prefill, steps = (flex() if rules != "steps" else None), (duo() if rules != "prefill" else None)
    acting = [method for method in (prefill, steps) if method is not None]
    with headway.use(model, *acting, *act):
        together = read(model, ids, contract.decodes(steps=5))
    with headway.use(model, ByHand(prefill=prefill, steps=steps), *act):
        by_hand = read(model, ids, contract.decodes(steps=5))
    contract.close(together, by_hand, "by hand")
    with torch.no_grad():
        assert not torch.allclose(together, model(input_ids=ids).logits, atol=1e-2)
    if calibrated:
        with headway.use(model, *acting):
            assert not torch.allclose(together, read(model, ids, contract.decodes(steps=5)), atol=1e-3)


def test_beams_of_three_methods_score_what_they_score_alone():
    """The caches of both kinds of heads, and what ACT remembers of a row, follow the beams."""
    model, ids = host("llama"), tokens(length=PROMPT)
    before = contract.snapshot(model)
    act = ACT(heads=[(0, 0), (1, 3)], scope="causal", tau=0.01, beta=0.0)
    beams, scores, alone = beams_apart(model, lambda: headway.use(model, flex(), duo(), act), ids)
    assert len({tuple(beam) for beam in beams.tolist()}) == 3
    assert scores == pytest.approx(alone, abs=1e-3)
    contract.same(before, contract.snapshot(model))


def test_act_beside_a_policy_that_narrows_the_prompt_is_refused_by_name():
    with pytest.raises(ConflictError, match=r"DuoAttention and ACT|ACT and DuoAttention"):
        headway.use(host("llama"), duo(prefill="streaming"), ACT(heads=[(0, 0)])).attach()


def test_act_calibrates_what_flexprefill_selected():
    model, ids = host("llama"), tokens()
    act = ACT(heads=[(0, 0), (1, 3)], beta=0.0)
    logits = {}
    for name, acting in {"flex": (flex(),), "act": (act,), "both": (flex(), act)}.items():
        with headway.use(model, *acting):
            logits[name] = read(model, ids, contract.decodes())
    assert not torch.allclose(logits["both"], logits["flex"])
    assert not torch.allclose(logits["both"], logits["act"])
    with headway.use(model, flex(1.0), act):
        contract.close(read(model, ids, contract.decodes()), logits["act"], "all keys, calibrated")


def test_selectors_of_different_phases_share_a_site():
    model, ids = host("llama"), tokens()
    with headway.use(model, flex(), Decode()) as handle:
        read(model, ids, contract.decodes())
    assert all(found == {"blocks", "window"} for found in paths(handle))


def test_selectors_of_one_phase_conflict_and_are_both_named():
    model = host("llama")
    for one, other in ((flex(), PowerAttention(block=16)), (Decode(), PowerAttention(block=16))):
        with pytest.raises(ConflictError, match=rf"{one.title} and {other.title}, expected one"):
            headway.use(model, one, other).attach()
    with headway.use(model, flex()), pytest.raises(ConflictError, match="FlexPrefill and PowerAttention"):
        headway.use(model, PowerAttention(block=16)).attach()


def test_selectors_at_different_layers_do_not_meet():
    model, ids = host("llama"), tokens()
    with headway.use(model, flex(), layers=[0]) as first, headway.use(model, PowerAttention(block=16), layers=[1]):
        read(model, ids, contract.decodes())
    assert [row["layer"] for row in first.report()] == [0]


def test_a_head_gate_acts_on_what_a_policy_read():
    """A silenced head is silent in prefill and in steps, whoever stores its keys."""
    model, ids = host("llama"), tokens()
    everything = HeadGate(gates={(layer, head): 0.0 for layer in range(2) for head in range(4)})
    with headway.use(model, StreamingLLM(sinks=4, window=30), everything):
        silent = read(model, ids, contract.decodes())
    with headway.use(model, everything):
        contract.close(silent, read(model, ids, contract.decodes()), "no head speaks")


def test_scopes_in_the_other_order_end_in_the_same_place():
    model, ids = host("llama"), tokens()
    before = contract.snapshot(model)
    logits = []
    for outer, inner in ((flex(), duo()), (duo(), flex())):
        with headway.use(model, outer), headway.use(model, inner):
            logits.append(read(model, ids, contract.decodes()))
        contract.same(before, contract.snapshot(model))
    contract.close(logits[0], logits[1], "order of scopes", share=1e-6)
