"""Input gradients by position, against encoders whose curve is known and against finite differences."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch
from torch import nn

from headway.errors import ArgumentError, HostError, NumericError
from headway.evidence.recipes import _posir_toy as toy
from headway.methods.diagnosis.posir import (
    Query,
    TransformersEncoder,
    WordEncoder,
    middle_evidence,
    pooling_attention,
    saliency,
)
from headway.methods.diagnosis.posir.saliency import POINTS, curve, token_gradients

QUERY = "q1 n4"
DOCUMENTS = ["w1 w2 n4 a1 w3 w4 w5", "n9 a2 " + " ".join(f"w{i}" for i in range(40)), "w7 w8 w9", "n1 a1 n2 a2 n3"]
PAIRS = [(QUERY, document) for document in DOCUMENTS]


class Embedded(nn.Module):
    """Token embeddings as last hidden states: whatever is pooled is known."""

    def __init__(self, dtype=torch.float64, calls=1):
        super().__init__()
        self.table = nn.Embedding(len(toy.tokenizer()), 12, dtype=dtype)
        self.calls = calls

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, attention_mask=None, **_):
        for _ in range(self.calls):
            hidden = self.table(input_ids)
        return types.SimpleNamespace(last_hidden_state=hidden)


class Placed(Embedded):
    """As `Embedded`, with token t weighted by exp(−t / 4)."""

    def forward(self, input_ids, attention_mask=None, **_):
        weight = torch.exp(-torch.arange(input_ids.shape[1]) / 4.0)
        return types.SimpleNamespace(last_hidden_state=self.table(input_ids) * weight[None, :, None])


def encoder(model=None, **options):
    torch.manual_seed(0)
    return TransformersEncoder(
        model=Embedded() if model is None else model, tokenizer=toy.tokenizer(), name="known", **options
    )


def norms(own, pairs=PAIRS, **options):
    return {number: (g, keep) for number, g, keep, _ in token_gradients(own, pairs, **options)}


def test_mean_pooling_of_embeddings_is_flat():
    found = saliency(encoder(), PAIRS)
    np.testing.assert_allclose(found.curves, 1.0, atol=1e-9)
    assert found.mass(0, 0.2) == pytest.approx(np.full(4, 0.2))


def test_the_last_token_holds_everything_when_it_alone_is_pooled():
    for g, _ in norms(encoder(pooling="last")).values():
        assert g[-1] > 0
        np.testing.assert_array_equal(g[:-1], 0)
    found = saliency(encoder(pooling="last"), PAIRS)
    assert found.silent == 4
    np.testing.assert_array_equal(found.curves, 0)


def test_a_planted_preference_for_the_start_is_seen():
    found = saliency(encoder(Placed()), PAIRS)
    assert (np.diff(found.curves[1]) <= 1e-12).all()
    assert found.mass(0, 0.2)[1] > 0.7


def test_gradients_are_those_of_finite_differences():
    own = toy.bi_encoder(0)
    own.model.double()
    g = norms(own)[0][0]
    inputs = own.tokenized([DOCUMENTS[0]], is_query=False)
    with torch.no_grad():
        asked = own.pooled(own.tokenized([QUERY], is_query=True))
        table = own.model.get_input_embeddings()
        x = table(inputs["input_ids"])

        def score(embedded):
            hidden = own.model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).last_hidden_state
            return torch.cosine_similarity(hidden.mean(1), asked)[0]

        step, numeric = 1e-5, torch.zeros_like(x)
        for t in range(x.shape[1]):
            for k in range(x.shape[2]):
                moved = torch.zeros_like(x)
                moved[0, t, k] = step
                numeric[0, t, k] = (score(x + moved) - score(x - moved)) / (2 * step)
    np.testing.assert_allclose(g, numeric[0].norm(dim=-1).numpy(), rtol=1e-3)


def test_a_scaled_query_leaves_the_curve():
    model = Placed()
    own = encoder(model)
    plain = saliency(own, PAIRS).curves
    pooled = own.pooled

    def scaled(inputs):
        found = pooled(inputs)
        return found * 7 if not torch.is_grad_enabled() else found

    own.pooled = scaled
    np.testing.assert_allclose(saliency(own, PAIRS).curves, plain, atol=1e-12)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_change_nothing(pooling, side):
    own = toy.bi_encoder(2, pooling=pooling)
    single = saliency(own, PAIRS, batch=1).curves
    own.tokenizer.padding_side = side
    try:
        np.testing.assert_allclose(saliency(own, PAIRS, batch=3).curves, single, atol=1e-4)
    finally:
        own.tokenizer.padding_side = "right"


@pytest.mark.parametrize("count", [1, 2, 7, 99, 100, 350])
def test_curves_have_one_length_whatever_the_document(count):
    found = curve(np.ones(count))
    assert found.shape == (POINTS,)
    assert found[0] == 1


def test_extremes_are_clipped_at_the_percentile():
    values = np.ones(400)
    values[7] = 1000
    np.testing.assert_allclose(curve(values), 1.0)
    alone = np.zeros(400)
    alone[0] = 5
    assert curve(alone)[0] == 1
    np.testing.assert_array_equal(curve(np.zeros(9)), 0)


def test_nothing_behind_the_cut_is_ever_salient():
    long = " ".join(f"w{i}" for i in range(100))
    own = encoder(max_tokens=27)
    found = saliency(own, [(QUERY, long)])
    assert found.read == pytest.approx([0.25])
    x = np.linspace(0, 1, POINTS)
    np.testing.assert_array_equal(found.curves[0][x > 0.25], 0)
    assert (found.curves[0][x <= 0.25] > 0).all()
    as_read = saliency(own, [(QUERY, long)], axis="read")
    np.testing.assert_allclose(as_read.curves, 1.0, atol=1e-9)
    shorter = saliency(encoder(), [(QUERY, long)], max_tokens=52)
    assert shorter.read == pytest.approx([0.5])


def test_special_tokens_are_left_out_and_unknown_words_are_not():
    found = norms(encoder(), [(QUERY, "w1 never-seen"), (QUERY, "never-seen w1")])
    for g, keep in found.values():
        assert g.shape == (4,)
        assert keep.tolist() == [False, True, True, False]


def test_the_model_is_left_as_it_was():
    own = toy.bi_encoder(0)
    own.model.train()
    frozen = next(own.model.parameters())
    frozen.requires_grad_(False)
    saliency(own, PAIRS)
    assert own.model.training
    assert not frozen.requires_grad
    assert all(p.requires_grad and p.grad is None for p in list(own.model.parameters())[1:])
    assert not own.model.get_input_embeddings()._forward_hooks


def kept_bytes(own, pairs, batch):
    """The most bytes that any one batch keeps for its backward pass."""
    sizes = {}

    def keep(tensor):
        sizes[-1] = sizes.get(-1, 0) + tensor.numel() * tensor.element_size()
        return tensor

    peaks = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for _ in token_gradients(own, pairs, batch=batch):
            if sizes:
                peaks.append(sizes.pop(-1))
    return max(peaks)


def test_memory_is_bounded_by_the_batch_and_not_by_the_documents():
    own = toy.bi_encoder(0)
    text = " ".join(f"w{i}" for i in range(50))
    few, many = (kept_bytes(own, [(QUERY, text)] * count, 2) for count in (2, 16))
    assert many == few
    weights = sum(p.numel() * p.element_size() for p in own.model.parameters())
    assert kept_bytes(own, [(QUERY, text)] * 16, 8) < 4 * few + weights


def test_long_documents_with_answers_in_their_middle_are_chosen():
    def query(name, span, tokens):
        return Query(id=name, text="x", span=span, characters=1000, tokens=tokens)

    given = [query("yes", (480, 520), 2000), query("short", (480, 520), 1000), query("early", (0, 20), 2000),
             query("uncounted", (480, 520), None)]  # fmt: skip
    assert [q.id for q in middle_evidence(given)] == ["yes"]
    assert [q.id for q in middle_evidence(given, least_tokens=500)] == ["yes", "short"]


def test_what_cannot_be_differentiated_is_refused():
    with pytest.raises(NumericError, match="float32"):
        saliency(encoder(Embedded(torch.bfloat16)), PAIRS)
    with pytest.raises(ArgumentError, match="gradients go through"):
        saliency(WordEncoder(), PAIRS)
    with pytest.raises(ArgumentError, match="batch"):
        saliency(encoder(), PAIRS, batch=0)
    with pytest.raises(ArgumentError, match="pairs"):
        saliency(encoder(), [])
    with pytest.raises(ArgumentError, match="axis"):
        saliency(encoder(), PAIRS, axis="time")
    with pytest.raises(HostError, match="2 times"):
        saliency(encoder(Embedded(calls=2)), PAIRS)
    without = Embedded()
    without.get_input_embeddings = None
    with pytest.raises(HostError, match="no token embedding"):
        saliency(encoder(without), PAIRS)
    broken = Embedded()
    with torch.no_grad():
        broken.table.weight[:] = float("nan")
    with pytest.raises(NumericError, match="NaN"):
        saliency(encoder(broken), PAIRS)


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_pooling_attention_is_that_of_the_maps(pooling):
    own = toy.bi_encoder(3, pooling=pooling)
    text = DOCUMENTS[1]
    found = pooling_attention(own, [text])
    inputs = own.tokenized([text], is_query=False)
    own.model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = own.model(**inputs, output_attentions=True).attentions
    size = inputs["input_ids"].shape[1]
    rows = {"cls": [0], "last": [size - 1], "mean": list(range(size))}[pooling]
    for layer, weights in enumerate(maps):
        mass = weights[0].mean(0)[rows].mean(0).double().numpy()
        inner = mass[1:-1] / mass[1:-1].mean()
        expected = np.interp(np.linspace(0, 1, POINTS), np.linspace(0, 1, size - 2), inner)
        np.testing.assert_allclose(found.layers[layer], expected, rtol=1e-4)
        assert found.special[layer] == pytest.approx(mass[[0, -1]].sum(), abs=1e-5)
    np.testing.assert_allclose(found.mean, found.layers.mean(0))


def test_attention_needs_a_document_with_words():
    with pytest.raises(ArgumentError, match="documents"):
        pooling_attention(toy.bi_encoder(0), [])
    with pytest.raises(ArgumentError, match="number 1 has 1 tokens"):
        pooling_attention(toy.bi_encoder(0), ["w1 w2", "w1"])
