"""OrthoAdam is Adam in another basis; Muon and AdamW share one model; states go through a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from headway.errors import ArgumentError
from headway.train.optimizers import MuonWithAdamW, OrthoAdam, make_optimizer, random_rotation


class Small(nn.Module):
    """An embedding, two hidden matrices, a norm and a head that shares the embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(7, 6)
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 6, bias=False)
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 7, bias=False)
        self.head.weight = self.embedding.weight

    def get_output_embeddings(self):
        return self.head

    def forward(self, ids):
        return self.head(self.norm(self.second(self.first(self.embedding(ids)).relu())))


def steps(model, optimizer, count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        ids = torch.randint(7, (4,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()
    return model


def same(first, second, **options):
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(one, other, **options)


def test_a_rotation_is_orthogonal_and_depends_on_the_seed_alone():
    rotation = random_rotation(9, 3)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(9), atol=1e-6, rtol=0)
    assert torch.equal(rotation, random_rotation(9, 3))
    assert not torch.equal(rotation, random_rotation(9, 4))


def test_without_rotation_it_is_adamw():
    model, other = Small(), Small()
    steps(model, OrthoAdam(model.parameters(), lr=0.01, weight_decay=0.1, rotate=False))
    steps(other, torch.optim.AdamW(other.parameters(), lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)))
    same(model, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(6,), (6, 4)])
def test_it_is_adam_on_rotated_parameters(shape):
    """OrthoAdam on f(θ) moves as Adam on φ ↦ f(Qφ) with θ = Qφ."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    target = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    theta = nn.Parameter(start.clone())
    ortho = OrthoAdam([theta], lr=0.05)
    rotation = random_rotation(6, 1)
    phi = nn.Parameter(rotation.T @ start)
    adam = torch.optim.Adam([phi], lr=0.05, betas=(0.9, 0.95))
    for _ in range(6):
        for optimizer, value in ((ortho, lambda: theta), (adam, lambda: rotation @ phi)):
            optimizer.zero_grad()
            (value() - target).pow(4).sum().backward()
            optimizer.step()
    torch.testing.assert_close(theta.detach(), (rotation @ phi).detach(), rtol=1e-4, atol=1e-5)


def test_no_channel_is_special_to_it():
    """One channel with a gradient: Adam moves that one; OrthoAdam spreads the move."""
    for rotate, spread in ((False, 0), (True, 7)):
        theta = nn.Parameter(torch.zeros(8))
        optimizer = OrthoAdam([theta], lr=0.1, rotate=rotate)
        theta.grad = torch.zeros(8)
        theta.grad[2] = 1.0
        optimizer.step()
        assert int((theta.detach().abs() > 1e-4).sum()) == 1 + spread


def test_long_axes_are_left_alone():
    for shape, size in (((9, 4), 4), ((4, 9), 4), ((9, 9), None)):
        theta = nn.Parameter(torch.zeros(shape))
        theta.grad = torch.ones(shape)
        optimizer = OrthoAdam([theta], largest=8)
        optimizer.step()
        rotation = optimizer.state[theta].get("rotation")
        assert (None if rotation is None else rotation.shape[0]) == size


@pytest.mark.parametrize("name", ["adamw", "orthoadam", "muon"])
def test_training_goes_on_from_a_stored_state_exactly(name):
    whole, cut = Small(), Small()
    optimizer = make_optimizer(name, whole, learning_rate=0.01)
    steps(whole, optimizer)
    steps(whole, optimizer, seed=2)
    before = make_optimizer(name, cut, learning_rate=0.01)
    steps(cut, before)
    after = make_optimizer(name, cut, learning_rate=0.5)
    after.load_state_dict(copy.deepcopy(before.state_dict()))
    steps(cut, after, seed=2)
    same(whole, cut, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["adamw", "orthoadam", "muon"])
def test_a_loss_falls(name):
    model = Small()
    ids = torch.arange(7)
    before = float(nn.functional.cross_entropy(model(ids), ids.flip(0)))
    optimizer = make_optimizer(name, model, learning_rate=0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids), ids.flip(0)).backward()
        optimizer.step()
    assert float(nn.functional.cross_entropy(model(ids), ids.flip(0))) < 0.7 * before


def test_muon_takes_hidden_matrices_and_nothing_else():
    model = Small()
    optimizer = make_optimizer("muon", model)
    by_method = {
        method: [p for g in optimizer.param_groups if g["method"] == method for p in g["params"]]
        for method in ("muon", "adamw")
    }
    assert {id(p) for p in by_method["muon"]} == {id(model.first.weight), id(model.second.weight)}
    assert sum(len(v) for v in by_method.values()) == len(list(model.parameters()))
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay[id(model.norm.weight)] == 0.0
    assert decay[id(model.embedding.weight)] == 0.1


def test_both_parts_of_muon_step_as_those_of_torch():
    model, other = Small(), Small()
    optimizer = MuonWithAdamW(model, lr=0.02, weight_decay=0.0)
    steps(model, optimizer, count=3)
    matrices = [other.first.weight, other.second.weight]
    rest = [p for p in other.parameters() if all(p is not m for m in matrices)]
    pair = (
        torch.optim.Muon(matrices, lr=0.02, weight_decay=0.0),
        torch.optim.AdamW(rest, lr=0.02, weight_decay=0.0, betas=(0.9, 0.95)),
    )

    class Both:
        def zero_grad(self):
            other.zero_grad()

        def step(self):
            for one in pair:
                one.step()

    steps(other, Both(), count=3)
    same(model, other, rtol=0, atol=0)


def test_a_rate_set_on_the_groups_reaches_both():
    model = Small()
    kept = copy.deepcopy(model.state_dict())
    optimizer = make_optimizer("muon", model, learning_rate=0.1)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    steps(model, optimizer, count=2)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[name]), name


def test_unknown_names_and_bad_numbers_are_refused():
    with pytest.raises(ArgumentError, match=r"optimizer: got 'muonn'.*Did you mean 'muon'"):
        make_optimizer("muonn", Small())
    with pytest.raises(ArgumentError, match="betas"):
        OrthoAdam(Small().parameters(), betas=(1.0, 0.9))
