"""`headway.look` on Headway's own layers: keys in front of the text, texts read in pieces, weights of one head."""

from __future__ import annotations

import base64

import numpy as np
import pytest
import torch

import headway
from headway.door import AttentionCall, Observer
from headway.door.text import text_call
from headway.errors import ArgumentError, InterceptionError
from headway.kernels.weighing import PartWeighing, part_of
from headway.look.maps import to_bytes
from headway.look.roles import RoleObserver
from headway.models import HeadwayConfig, HeadwayForCausalLM
from tests.look.tiny import TEXT, byte_tokenizer

TOKENS, HEADS = 75, 2
OPTIONS = {
    "titans_mag": {"window": 24, "persistent": 3},
    "titans_mal": {"window": 24, "persistent": 3},
    "titans_mac": {"segment": 32, "persistent": 3, "memory_tokens": 5},
    "titans_lmm": {},
    "softmax": {},
    "lightning": {},
    "local_linear": {},
}
IN_FRONT = ["titans_mag", "titans_mal", "titans_mac"]


def tiny(*mixers: str, seed: int = 0, **changes: object) -> HeadwayForCausalLM:
    torch.manual_seed(seed)
    options = {name: OPTIONS[name] for name in mixers}
    options[mixers[0]] = {**options[mixers[0]], **changes}
    hybrid = len(mixers) > 1
    config = HeadwayConfig(
        vocab_size=259,
        width=16,
        layers=2,
        heads=HEADS,
        mixer=list(mixers) if hybrid else mixers[0],
        mixer_options=options if hybrid else options[mixers[0]],
    )
    model = HeadwayForCausalLM(config).eval()
    with torch.no_grad():
        # Heads that differ from each other and from uniform attention.
        for parameter in model.parameters():
            parameter.add_(0.4 * torch.randn_like(parameter))
    return model


def looked(model: HeadwayForCausalLM, **options: object) -> headway.look.Look:
    return headway.look(model, byte_tokenizer(), TEXT, tokens=TOKENS, **options)


class Raw(Observer):
    """The weights of every call as it passed the door, put together by hand: (layer) -> whole rows' own part."""

    def start(self) -> None:
        self.own: dict[int, torch.Tensor] = {}
        self.front: dict[int, torch.Tensor] = {}

    def observe(self, call: AttentionCall, output: torch.Tensor, lse: torch.Tensor | None = None) -> None:
        layer = call.site.layer
        begin = 0 if call.piece is None else call.piece[0]
        if begin == 0:
            self.own[layer] = torch.zeros(call.heads, TOKENS, TOKENS)
            self.front[layer] = torch.zeros(call.heads, TOKENS)
        rows = slice(begin, begin + call.queries)
        weights = call.weights()[0]
        self.own[layer][:, rows, rows] = weights[..., call.front : call.front + call.queries]
        self.front[layer][:, rows] = weights[..., : call.front].sum(-1)

    def result(self) -> dict[int, torch.Tensor]:
        return self.own


def raw(model: HeadwayForCausalLM) -> Raw:
    ids = byte_tokenizer()(TEXT, return_tensors="pt")["input_ids"][:, :TOKENS]
    observer = Raw()
    with torch.no_grad(), headway.observe(model, observer):
        model(input_ids=ids, use_cache=False)
    return observer


@pytest.mark.parametrize("mixer", IN_FRONT)
def test_a_look_says_of_the_text_what_the_weights_of_its_own_keys_are(mixer):
    model = tiny(mixer)
    found, seen = looked(model), raw(model)
    gap = (torch.arange(TOKENS)[:, None] - torch.arange(TOKENS)).abs()
    for layer, own in seen.own.items():
        front = seen.front[layer]
        torch.testing.assert_close(own.sum(-1) + front, torch.ones_like(front), rtol=1e-5, atol=1e-5)
        for head in range(HEADS):
            weights = own[head]
            expected = {
                "front": front[head].mean(),
                "previous_token": weights.diagonal(-1).mean(),
                "distance": ((weights * gap).sum(-1) / weights.sum(-1)).mean(),
                "sink_mass": weights[:, :4].sum(-1).mean(),
            }
            if mixer == "titans_mac":
                # A row whose previous token is in an earlier segment has none to read.
                del expected["previous_token"]
            for name, value in expected.items():
                measured = found.metric(name).array()[layer, head]
                assert measured == pytest.approx(float(value), rel=1e-4), (name, layer, head)
    assert found.metric("front").unit == "share"
    assert found.model["head_dim"] == 16 // HEADS


@pytest.mark.parametrize("mixer", IN_FRONT)
def test_maps_and_received_mass_are_those_of_the_text(mixer):
    model = tiny(mixer)
    found, seen = looked(model, heads=[(0, 0), (0, 1), (1, 1)]), raw(model)
    for shown in found.maps:
        pixels = np.frombuffer(base64.b64decode(shown.pixels), dtype=np.uint8).reshape(shown.side, shown.side)
        expected = to_bytes(seen.own[shown.layer][shown.head].numpy())
        assert (shown.rows, shown.columns) == (TOKENS, TOKENS)
        assert int(np.abs(pixels.astype(int) - expected.astype(int)).max()) <= 1
    first = seen.own[0][:, :, 0]
    sees = 32 if mixer == "titans_mac" else 24
    assert found.received[0][0] == pytest.approx(float(first.sum(-1).mean() / sees), rel=1e-4)


@pytest.mark.parametrize("mixer", IN_FRONT)
def test_sampled_rows_are_positions_of_the_text(mixer):
    found = looked(tiny(mixer), rows=40)
    whole = looked(tiny(mixer))
    metric, exact = found.metric("front"), whole.metric("front")
    assert metric.low is not None
    assert metric.high is not None
    assert np.abs(metric.array() - exact.array()).max() < 0.1
    assert np.isfinite(metric.array()).all()


def test_nothing_in_front_has_no_such_score():
    found = looked(tiny("titans_mag", persistent=0))
    assert "front" not in {metric.name for metric in found.heads}
    assert np.isfinite(found.metric("distance").array()).all()


@pytest.mark.parametrize("query", ["previous", "self"])
def test_every_kind_of_memory_query_is_looked_at(query):
    model = tiny("titans_mac", memory_query=query)
    found, seen = looked(model), raw(model)
    expected = torch.stack([seen.front[layer].mean(-1) for layer in sorted(seen.front)]).numpy()
    np.testing.assert_allclose(found.metric("front").array(), expected, rtol=1e-4)


@pytest.mark.parametrize("other", ["softmax", "lightning"])
@pytest.mark.parametrize("mixer", IN_FRONT)
def test_hybrids_are_looked_at_and_only_some_layers_have_a_front(mixer, other):
    found = looked(tiny(mixer, other))
    front = found.metric("front").array()
    assert np.isfinite(front[0]).all()
    assert np.isnan(front[1]).all()
    assert np.isfinite(found.metric("sink_mass").array()).all()


def test_a_memory_beside_attention_leaves_the_attention_to_be_looked_at():
    found = looked(tiny("titans_lmm", "softmax"))
    assert found.metric("entropy").array().shape == (1, HEADS)


def test_a_model_without_any_weights_is_refused_and_told_what_is_needed():
    with pytest.raises(InterceptionError, match=r"NeuralMemory.*needs at least one layer that gives keys weights"):
        looked(tiny("titans_lmm"))


def test_pieces_of_a_padded_text_are_refused():
    model = tiny("titans_mac")
    ids = torch.arange(1, 41)[None]
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with (
        torch.no_grad(),
        headway.observe(model, RoleObserver()),
        pytest.raises(ArgumentError, match="padded, packed or continued"),
    ):
        model(input_ids=ids, attention_mask=mask, use_cache=False)


def test_a_call_without_a_front_is_its_own_text():
    call = AttentionCall.from_tensors(*torch.randn(3, 1, 2, 5, 4), causal=True)
    output = torch.zeros(())
    assert text_call(call, output) == (call, output)


@pytest.mark.parametrize("mixer", ["lightning", "local_linear"])
def test_the_map_of_a_head_has_that_heads_own_decay_or_ridge(mixer):
    model = tiny(mixer)
    seen = raw(model)
    found = looked(model, heads=[(0, 0), (0, 1)])
    for shown in found.maps:
        pixels = np.frombuffer(base64.b64decode(shown.pixels), dtype=np.uint8).reshape(shown.side, shown.side)
        expected = to_bytes(seen.own[0][shown.head].numpy())
        assert int(np.abs(pixels.astype(int) - expected.astype(int)).max()) <= 1


@pytest.mark.parametrize("heads", [[1], [2, 0], [3, 1, 2]])
@pytest.mark.parametrize("entry", [0, 1])
def test_a_part_of_a_weighing_is_that_part_of_its_weights(heads, entry):
    scale = torch.rand(2, 4, 1, 1)

    class Scaled:
        name, whole = "scaled", False

        def __call__(self, logits, visible, *, positions, query, key):
            assert logits.shape[:2] == query.shape[:2] == (2, 4)
            return torch.where(visible, logits * scale + key.sum(-1)[:, :, None], 0.0)

    logits, query, key = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3, 6), torch.randn(2, 4, 5, 6)
    visible, at = torch.rand(1, 1, 3, 5) > 0.3, torch.arange(3)
    whole = Scaled()(logits, visible, positions=at, query=query, key=key)
    part = part_of(Scaled(), heads, 4, entry=entry, batch=2)
    assert isinstance(part, PartWeighing)
    one = slice(entry, entry + 1)
    found = part(logits[one][:, heads], visible, positions=at, query=query[one][:, heads], key=key[one][:, heads])
    torch.testing.assert_close(found, whole[one][:, heads])
    assert part_of(Scaled(), None, 4).__class__ is Scaled
