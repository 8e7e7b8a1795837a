"""Methods on models of ours: what selects, edits and observes acts on the weights that the mixer really has."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import headway
from headway.door import Editor, HeadGate, Selector, Window
from headway.errors import HostError
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
@torch.no_grad()
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
        with headway.use(model, HeadGate({(0, 1): 0.0})), headway.capture(model, what=("head_output",)) as captured:
            model(ids())
        assert not bool(captured.result()[0]["head_output"][:, 1].any())


@torch.no_grad()
def test_a_cache_policy_for_keys_is_refused():
    model, policy = model_of("lightning"), headway.StreamingLLM(sinks=1, window=4)
    with headway.use(model, policy), pytest.raises(HostError, match="model of mixers"):
        model(ids())
