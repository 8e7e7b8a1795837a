"""Attention as explanation: planted maps with known rollouts and flows, streaming, padding, and value zeroing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from tests.methods.song_hosts import VOCABULARY, bert, classifier, example, linear

from headway.errors import ArgumentError
from headway.methods.diagnosis.song_of_disagreement import (
    AttentiveLSTM,
    HostClassifier,
    RecurrentClassifier,
    attention_flow,
    attention_scores,
    rollout,
    value_zeroing,
)
from headway.methods.diagnosis.song_of_disagreement import attention_explanations as module
from headway.methods.diagnosis.song_of_disagreement.attention_explanations import KINDS, row_normalised, with_residual


def random_maps(layers: int, count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(count, count, generator=generator, dtype=torch.float64).softmax(-1) for _ in range(layers)]


@pytest.fixture(scope="module")
def host():
    return classifier()


@pytest.fixture(scope="module")
def maps(host):
    """All weights of the host on the example, by the host's own eager attention."""
    eager = bert()
    eager.set_attn_implementation("eager")
    found = eager(input_ids=example().ids[None], output_attentions=True).attentions
    return [layer[0].detach().double() for layer in found]


def test_rows_of_a_rollout_sum_to_one():
    assert torch.allclose(rollout(random_maps(5, 7)).sum(-1), torch.ones(7, dtype=torch.float64))


def test_attention_to_oneself_rolls_out_to_nothing_else():
    assert torch.equal(rollout([torch.eye(4)] * 3), torch.eye(4, dtype=torch.float64))


def test_one_layer_is_the_map_with_its_residual():
    (only,) = random_maps(1, 5)
    assert torch.allclose(rollout([only]), (only + torch.eye(5)) / 2)


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_uniform_attention_has_a_known_rollout(layers):
    count = 6
    found = rollout([torch.full((count, count), 1 / count)] * layers)
    kept = 0.5**layers
    wanted = kept * torch.eye(count) + (1 - kept) / count
    assert torch.allclose(found, wanted.double())


def test_a_rollout_moves_with_its_tokens():
    maps = random_maps(3, 6)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    moved = rollout([m[order][:, order] for m in maps])
    assert torch.allclose(moved, rollout(maps)[order][:, order])


def test_no_maps_are_refused():
    with pytest.raises(ArgumentError, match="layers: got none"):
        rollout([])
    with pytest.raises(ArgumentError, match="layers: got none"):
        attention_flow([])


def test_rows_of_padding_stay_nothing():
    assert row_normalised(torch.tensor([[0.0, 0.0], [1.0, 3.0]])).tolist() == [[0, 0], [0.25, 0.75]]


def test_flow_through_one_layer_is_the_row():
    only = with_residual(random_maps(1, 5)[0]).numpy()
    np.testing.assert_allclose(attention_flow([only]), only[0], atol=1e-5)
    row = np.full(5, 0.2)
    found = attention_flow([only], row)
    np.testing.assert_allclose(found, np.minimum(0.2, only).sum(0) / np.minimum(0.2, only).sum(), atol=1e-5)


def test_flow_takes_the_narrowest_pipe():
    """Token 0 reads 1 by .6 and 2 by .4; below, 1 reads 3 by .5 only, and 2 reads 3 wholly: .5 + .4 reach token 3."""
    top, below = np.zeros((4, 4)), np.zeros((4, 4))
    top[0, 1], top[0, 2] = 0.6, 0.4
    below[1, 3], below[1, 1], below[2, 3] = 0.5, 0.5, 1.0
    found = attention_flow([below, top])
    assert found[[0, 2]].tolist() == [0, 0]
    assert found[3] / found[1] == pytest.approx(0.9 / 0.5, rel=1e-5)
    assert found.sum() == pytest.approx(1)


@pytest.mark.parametrize("read", [None, [0.1, 0.4, 0.0, 0.3, 0.2]])
def test_a_flow_is_the_largest_flow_of_networkx(read):
    """The same pipes as a graph of named nodes, whole numbers left out."""
    networkx = pytest.importorskip("networkx")
    layers = [with_residual(m).numpy() for m in random_maps(3, 5, seed=4)]
    graph = networkx.DiGraph()
    for level, weights in enumerate(layers):
        for query, key in itertools.product(range(5), range(5)):
            graph.add_edge((level + 1, query), (level, key), capacity=float(weights[query, key]))
    for query, share in enumerate([1.0, 0, 0, 0, 0] if read is None else read):
        graph.add_edge("readout", (3, query), capacity=share)
    wanted = np.array([networkx.maximum_flow_value(graph, "readout", (0, token)) for token in range(5)])
    found = attention_flow(layers, None if read is None else np.array(read))
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=1e-5)


def test_a_flow_is_shared_out_and_moves_with_its_tokens():
    layers = [with_residual(m).numpy() for m in random_maps(3, 6)]
    found = attention_flow(layers)

    assert found.sum() == pytest.approx(1)
    assert (found >= 0).all()
    order = np.array([0, 3, 1, 5, 2, 4])
    moved = attention_flow([m[order][:, order] for m in layers])
    np.testing.assert_allclose(moved, found[order], atol=1e-5)


@pytest.mark.parametrize("wrong", [np.ones((2, 3)), -np.ones((3, 3)), np.full((3, 3), np.nan), np.ones((2, 2))])
def test_maps_that_are_no_maps_are_refused(wrong):
    with pytest.raises(ArgumentError, match="square maps of 3"):
        attention_flow([np.eye(3), wrong])


def test_streamed_scores_are_those_of_whole_maps(host, maps):
    found = attention_scores(host, example(), KINDS)
    means = [m.mean(0) for m in maps]
    stacked = torch.stack(means)
    np.testing.assert_allclose(found["last"], means[-1][0], atol=1e-6)
    np.testing.assert_allclose(found["mean"], stacked.mean(0)[0], atol=1e-6)
    np.testing.assert_allclose(found["peak"], stacked.mean(0).amax(-1), atol=1e-6)
    np.testing.assert_allclose(found["rollout"], rollout(means)[0], atol=1e-6)
    np.testing.assert_allclose(found["flow"], attention_flow([with_residual(m).numpy() for m in means]), atol=1e-5)
    for kind in ("last", "mean", "rollout", "flow", "values"):
        assert found[kind].sum() == pytest.approx(1, abs=1e-6), kind


def test_values_weigh_attention_by_what_is_carried(host, maps):
    values = []
    last = host.host.bert.encoder.layer[-1].attention.self.value
    handle = last.register_forward_hook(lambda module, args, output: values.append(output.detach().double()))
    host.outputs(host.embed(example().ids[None]), torch.ones(1, 9, dtype=torch.bool))
    handle.remove()
    length = values[-1][0].view(9, 4, -1).norm(dim=-1).T
    wanted = (maps[-1] * length[:, None]).square().sum(0).sqrt()[0]
    np.testing.assert_allclose(
        attention_scores(host, example(), ["values"])["values"], wanted / wanted.sum(), atol=1e-5
    )


def test_blocks_of_rows_change_nothing(host, monkeypatch):
    whole = attention_scores(host, example(), KINDS)
    monkeypatch.setattr(module, "BLOCK", 100)
    for kind, scores in attention_scores(host, example(), KINDS).items():
        np.testing.assert_allclose(scores, whole[kind], atol=1e-6)


@pytest.mark.parametrize("readout", ["first", "last", "mean"])
def test_the_readout_says_whose_rows_count(readout, maps):
    host = HostClassifier(bert().bert, head=torch.nn.Linear(24, 2), readout=readout)
    rows = {"first": slice(0, 1), "last": slice(8, 9), "mean": slice(0, 9)}[readout]
    wanted = maps[-1].mean(0)[rows].mean(0)
    np.testing.assert_allclose(attention_scores(host, example(), ["last"])["last"], wanted, atol=1e-6)
    padded = attention_scores(host, example().padded(0, 2), ["last"])["last"]
    np.testing.assert_allclose(padded, [*wanted, 0, 0], atol=1e-6)


def test_flow_on_a_long_text_is_refused(host):
    with pytest.raises(ArgumentError, match="cube of the length"):
        attention_scores(host, example(), ["flow"], flow_tokens=8)


def test_one_distribution_over_tokens_is_the_explanation():
    torch.manual_seed(0)
    model = RecurrentClassifier(AttentiveLSTM(VOCABULARY, width=8, hidden=8).eval())
    found = attention_scores(model, example().padded(0, 2), ["last"])["last"]
    assert found.sum() == pytest.approx(1)
    assert (found[-2:] == 0).all()
    with pytest.raises(ArgumentError, match="'last' alone"):
        attention_scores(model, example(), ["last", "rollout"])


def test_a_model_without_attention_says_so():
    with pytest.raises(ArgumentError, match="no attention to explain with"):
        attention_scores(linear(), example(), ["last"])
    with pytest.raises(ArgumentError, match="no host"):
        value_zeroing(linear(), example())


def test_an_unknown_kind_is_refused(host):
    with pytest.raises(ArgumentError, match="Did you mean 'rollout'"):
        attention_scores(host, example(), ["rollouts"])


def representation_without(host: HostClassifier, token: int, layers: range) -> torch.Tensor:
    """The first token behind each layer when one token's values are zeroed by hooks on the value projections."""
    handles = []

    def zero(module, args, output):
        output = output.clone()
        output[:, token] = 0
        return output

    for layer in layers:
        projection = host.host.bert.encoder.layer[layer].attention.self.value
        handles.append(projection.register_forward_hook(zero))
    with torch.no_grad():
        states = host.hidden(host.embed(example().ids[None]), torch.ones(1, 9, dtype=torch.bool))
    for handle in handles:
        handle.remove()
    return torch.stack(states)[:, 0].double()


def test_value_zeroing_is_what_zeroed_values_do(host):
    found = value_zeroing(host, example(), rows=4)
    before = representation_without(host, 0, range(0))[-1, 0]
    wanted = np.array([
        float(1 - torch.cosine_similarity(representation_without(host, token, range(3))[-1, 0], before, dim=0))
        for token in range(9)
    ])  # fmt: skip
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=1e-4)


def test_value_zeroing_by_layer_rolls_the_layers_out(host):
    found = value_zeroing(host, example(), by_layer=True, rows=5)
    rolled = torch.eye(9, dtype=torch.float64)
    plain = representation_without(host, 0, range(0))
    for layer, token in itertools.product(range(3), range(9)):
        if token == 0:
            change = torch.zeros(9, 9, dtype=torch.float64)
        after = representation_without(host, token, range(layer, layer + 1))[layer]
        change[:, token] = 1 - torch.cosine_similarity(after, plain[layer], dim=-1)
        if token == 8:
            rolled = row_normalised(change) @ rolled
    np.testing.assert_allclose(found, rolled[0], atol=1e-4)


def test_value_zeroing_ignores_padding(host):
    plain, padded = (value_zeroing(host, given) for given in (example(), example().padded(0, 3)))
    np.testing.assert_allclose(padded, [*plain, 0, 0, 0], atol=1e-5)
