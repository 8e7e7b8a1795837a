"""Methods on models of ours: what selects, edits and observes acts on the weights that the mixer really has."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import headway
from headway.door import Editor, HeadGate, Selector, Window
from headway.errors import HostError, InterceptionError
from headway.models import HeadwayConfig, HeadwayForCausalLM

OWN_WEIGHTS = [
    ("lightning", {}),
    ("inline", {}),
    ("local_linear", {}),
    ("softmax", {"normalizer": "softpick"}),
    ("softmax", {"normalizer": "sigmoid"}),
    ("softmax", {}),
]


def model_of(mixer: str, **options: object) -> HeadwayForCausalLM:
    torch.manual_seed(0)
    config = HeadwayConfig(vocab_size=97, width=32, layers=2, heads=4, mixer=mixer, mixer_options=options, init_std=0.5)
    return HeadwayForCausalLM(config).eval()


def ids(count: int = 12) -> torch.Tensor:
    return torch.randint(5, 97, (1, count), generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True, kw_only=True)
class Near(Selector):
    """The first key and the last `window`."""

    window: int

    def select(self, call):
        return Window(1, self.window)


class Same(Editor):
    """Weights as they are, so that they are made and used."""

    edits = frozenset({"weights"})

    def edit_weights(self, call, weights, rows):
        return weights


@pytest.mark.parametrize(("mixer", "options"), OWN_WEIGHTS)
@pytest.mark.usefixtures("without_gradients")
class TestOwnWeights:
    def test_editing_nothing_changes_nothing(self, mixer, options):
        model = model_of(mixer, **options)
        before = model(ids()).logits
        with headway.use(model, Same()):
            torch.testing.assert_close(model(ids()).logits, before, rtol=1e-3, atol=1e-4)
        assert torch.equal(model(ids()).logits, before)

    def test_a_selection_hides_keys_before_they_are_weighed(self, mixer, options):
        model = model_of(mixer, **options)
        before = model(ids()).logits
        with headway.use(model, Near(window=12)):
            torch.testing.assert_close(model(ids()).logits, before, rtol=1e-3, atol=1e-4)
        with headway.use(model, Near(window=3)) as handle, headway.capture(model, what=("weights",)) as captured:
            after = model(ids()).logits
        rows, columns = torch.arange(12)[:, None], torch.arange(12)
        near = ((rows - columns < 3) | (columns == 0)) & (columns <= rows)
        for site in captured.result():
            weights = captured.result().calls(site)[0]["weights"]
            assert not bool(weights[..., ~near].any())
        assert not torch.allclose(after, before)
        assert all(row["density"] < 1 for row in handle.report())

    def test_a_silenced_head_is_gone(self, mixer, options):
        model = model_of(mixer, **options)
        with (
            headway.use(model, HeadGate(gates={(0, 1): 0.0})),
            headway.capture(model, what=("head_output",)) as captured,
        ):
            model(ids())
        assert not bool(captured.result()[0]["head_output"][:, 1].any())


RECURRENT = ["lightning", "inline", "linear"]


@pytest.mark.parametrize("mixer", RECURRENT)
@pytest.mark.usefixtures("without_gradients")
class TestFilledStates:
    """Behind a filled state a recurrence has no keys: observers miss its tokens and say so, methods refuse."""

    def test_generating_is_observed_up_to_the_prompt(self, mixer):
        model = model_of(mixer)
        expected = model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)
        with headway.capture(model, what=("entropy",)) as captured:
            found = model.generate(ids(), max_new_tokens=3, do_sample=False, pad_token_id=0)
        assert torch.equal(found, expected)
        assert captured.result()[0]["entropy"].shape[2] == 12
        for row in captured.report():
            assert row["calls"] == 3
            assert sum(count for path, count in row["paths"].items() if "past the door" in path) == 2

    def test_a_method_that_acts_is_refused_there(self, mixer):
        model = model_of(mixer)
        with headway.use(model, HeadGate(gates={(0, 1): 0.0})):
            model(ids())
            with pytest.raises(InterceptionError, match="use_cache=False"):
                model.generate(ids(), max_new_tokens=2, do_sample=False, pad_token_id=0)
            model.generate(ids(), max_new_tokens=2, do_sample=False, pad_token_id=0, use_cache=False)


@torch.no_grad()
def test_a_decoding_step_of_stored_keys_is_observed_with_its_own_key():
    model = model_of("softmax")
    cache = model(ids(), use_cache=True).past_key_values
    with headway.capture(model, what=("weights", "value", "head_output")) as captured:
        model(ids(1), past_key_values=cache, use_cache=True)
    for site in captured.result():
        call = captured.result().calls(site)[0]
        assert call["weights"].shape[-1] == 13
        torch.testing.assert_close(call["weights"] @ call["value"], call["head_output"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("key_heads", "value_heads"), [(2, 3), (3, 2), (1, 6), (6, 6)])
@torch.no_grad()
def test_keys_and_values_of_any_heads_pass_the_door(key_heads, value_heads):
    torch.manual_seed(0)
    options = {"key_heads": key_heads, "value_heads": value_heads}
    config = HeadwayConfig(vocab_size=97, width=48, layers=1, heads=6, mixer="diffqkv", mixer_options=options)
    model = HeadwayForCausalLM(config).eval()
    before = model(ids()).logits
    with headway.use(model, Near(window=12)):
        torch.testing.assert_close(model(ids()).logits, before, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_a_cache_policy_for_keys_is_refused():
    model, policy = model_of("lightning"), headway.StreamingLLM(sinks=1, window=4)
    with headway.use(model, policy), pytest.raises(HostError, match="model of mixers"):
        model(ids())
