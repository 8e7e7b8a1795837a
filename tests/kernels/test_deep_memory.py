"""A network that learns while it reads: three forms, limits with known answers, and what must not matter."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from headway.door.mixer import document_positions
from headway.errors import ArgumentError, NumericError
from headway.kernels.deep_memory import Gates, MemoryRead, deep_memory
from headway.kernels.document_chunks import document_chunks
from headway.kernels.memory_net import MemoryNet, MemoryState, errors

BATCH, HEADS, DIM = 2, 2, 4


def network(depth: int = 2, *, residual: bool = True, clip: float | None = None, seed: int = 0) -> MemoryNet:
    generator = torch.Generator().manual_seed(seed)
    sizes = [DIM, *[2 * DIM] * (depth - 1), DIM]
    weights = tuple(
        (torch.randn(HEADS, a, b, dtype=torch.float64, generator=generator) / a**0.5).requires_grad_()
        for a, b in itertools.pairwise(sizes)
    )
    if not residual:
        return MemoryNet(weights, clip=clip)
    gain = 0.5 + torch.rand(HEADS, DIM, dtype=torch.float64, generator=generator)
    shift = 0.1 * torch.randn(HEADS, DIM, dtype=torch.float64, generator=generator)
    return MemoryNet(weights, True, gain, shift, clip)


def stream(tokens: int, seed: int = 1, batch: int = BATCH) -> list[torch.Tensor]:
    """Query and key of unit length, and values."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(batch, HEADS, tokens, DIM, dtype=torch.float64, generator=generator) for _ in range(3)]
    return [x.requires_grad_() for x in (normalize(made[0], dim=-1), normalize(made[1], dim=-1), made[2])]


def draw_gates(tokens: int, net: MemoryNet | None = None, *, seed: int = 2, batch: int = BATCH) -> Gates:
    """θ up to 0.05, η up to 0.6, α up to 0.2; per channel where a network is given."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(batch, HEADS, tokens, *shape, dtype=torch.float64, generator=generator)

    theta, eta = 0.05 * rand(), 0.6 * rand()
    return Gates(theta, eta, 0.2 * rand() if net is None else tuple(0.2 * rand(w.shape[2]) for w in net.weights))


def constant(tokens: int, theta: float, eta: float = 0.0, alpha: float = 0.0) -> Gates:
    like = torch.ones(BATCH, HEADS, tokens, dtype=torch.float64)
    return Gates(theta * like, eta * like, alpha * like)


def run(parts: list[torch.Tensor], gates: Gates, net: MemoryNet, **options) -> MemoryRead:
    chunk = options.pop("chunk", 4)
    channels = gates.channels
    start = MemoryState.start(net, parts[0].shape[0], chunk, channels=channels)
    return deep_memory(*parts, gates, net, chunk=chunk, **{"state": start, **options})


def packed(tokens: int) -> dict[str, torch.Tensor]:
    """Padding and documents drawn at random, as the call wants them."""
    generator = torch.Generator().manual_seed(7)
    mask = torch.rand(BATCH, tokens, generator=generator) > 0.2
    resets = torch.rand(BATCH, tokens, generator=generator) < 0.15
    return {"mask": mask, "position": document_positions((BATCH, tokens), mask, resets, None)[0]}


CASES = [
    (1, False, 4, False, "after", None),
    (1, True, 1, False, "before", None),
    (2, True, 4, False, "after", None),
    (2, False, 3, True, "before", 1.5),
    (3, True, 12, True, "after", 1.5),
]


@pytest.mark.parametrize(("depth", "residual", "chunk", "channels", "reads", "clip"), CASES)
def test_the_dual_form_is_automatic_differentiation_and_is_the_step(depth, residual, chunk, channels, reads, clip):
    net = network(depth, residual=residual, clip=clip)
    parts, gates = stream(13), draw_gates(13, net if channels else None)
    found, slopes = {}, {}
    for mode in ("reference", "block", "step"):
        read = run(parts, gates, net, chunk=chunk, reads=reads, mode=mode, **packed(13))
        found[mode] = read
        score = (read.output * torch.linspace(-1, 1, DIM, dtype=torch.float64)).sum()
        score = score + sum(w.square().sum() + s.sum() for w, s in zip(*read.state.now(), strict=True))
        slopes[mode] = torch.autograd.grad(score, [*parts, *net.weights])
    for mode in ("block", "step"):
        a, b = found[mode], found["reference"]
        torch.testing.assert_close(a.output, b.output, rtol=1e-10, atol=1e-12)
        assert torch.equal(a.state.seen, b.state.seen)
        for name in ("weights", "momentum", "inputs", "errors"):
            for x, y in zip(getattr(a.state, name), getattr(b.state, name), strict=True):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-11, msg=name)
        for x, y in zip(slopes[mode], slopes["reference"], strict=True):
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-8)


@given(cuts=st.lists(st.integers(0, 19), max_size=4), chunk=st.sampled_from([1, 4, 7]), seed=st.integers(0, 5))
@settings(max_examples=15, deadline=None)
def test_any_split_is_one_call(cuts, chunk, seed):
    net, gates = network(2), draw_gates(19)
    parts = stream(19, seed)
    whole = run(parts, gates, net, chunk=chunk)
    state = MemoryState.start(net, BATCH, chunk)
    outputs, modes = [], ["block", "step"]
    edges = [0, *sorted(cuts), 19]
    for number, (start, stop) in enumerate(itertools.pairwise(edges)):
        piece = slice(start, stop)
        read = deep_memory(
            *(x[:, :, piece] for x in parts),
            gates.part(piece),
            net,
            chunk=chunk,
            state=state,
            mode=modes[number % 2],
        )
        outputs.append(read.output)
        state = read.state
    torch.testing.assert_close(torch.cat(outputs, 2), whole.output, rtol=1e-9, atol=1e-11)
    for a, b in zip(state.now()[0], whole.state.now()[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def delta_rule(query, key, value, beta, keep, reads="after"):
    """S ← keep · S − β k (kᵀS − v), the outer products kᵀv of a linear memory; gradient at the undecayed S."""
    state = torch.zeros(DIM, DIM, dtype=torch.float64)
    outputs = []
    for t in range(query.shape[0]):
        wrong = key[t] @ state - value[t]
        state = keep * state - beta * torch.outer(key[t], wrong)
        outputs.append(query[t] @ state)
    return torch.stack(outputs)


@pytest.mark.parametrize("alpha", [0.0, 0.1])
def test_one_linear_layer_without_momentum_is_the_delta_rule(alpha):
    """β = 2θ; with forgetting the decay stands before the state, and the gradient is taken at the undecayed one."""
    net = MemoryNet((torch.zeros(HEADS, DIM, DIM, dtype=torch.float64),))
    parts = [x.detach() for x in stream(10)]
    found = run(parts, constant(10, 0.3, 0.0, alpha), net, chunk=1).output
    for row in range(BATCH):
        for head in range(HEADS):
            expected = delta_rule(*(x[row, head] for x in parts), 0.6, 1 - alpha)
            torch.testing.assert_close(found[row, head], expected, rtol=1e-10, atol=1e-12)


def test_without_a_step_the_memory_only_decays():
    net, alpha = network(2), 0.1
    state = run(stream(9), constant(9, 0.0, 0.5, alpha), net).state
    for now, first in zip(state.now()[0], net.weights, strict=True):
        torch.testing.assert_close(now, first.expand_as(now) * (1 - alpha) ** 9, rtol=1e-12, atol=1e-14)


def test_when_all_is_forgotten_the_memory_is_its_momentum():
    weights, momentum = run(stream(9), constant(9, 0.02, 0.5, 1.0), network(2)).state.now()
    for w, s in zip(weights, momentum, strict=True):
        torch.testing.assert_close(w, s, rtol=1e-10, atol=1e-12)


def test_a_repeated_pair_is_learned():
    net = MemoryNet((torch.zeros(HEADS, DIM, DIM, dtype=torch.float64),))
    key = normalize(torch.ones(BATCH, HEADS, 40, DIM, dtype=torch.float64), dim=-1)
    value = torch.arange(DIM, dtype=torch.float64).expand_as(key)
    found = run([key, key, value], constant(40, 0.1), net, inspect=True)
    torch.testing.assert_close(found.output[:, :, -1], value[:, :, -1], rtol=1e-2, atol=1e-2)
    losses = found.loss[0, 0, ::4]
    assert bool((losses.diff() < 0).all()), "the loss falls from chunk to chunk"
    assert float(found.surprise[0, 0, -1]) < 0.05 * float(found.surprise[0, 0, 0])


def test_surprise_is_the_length_of_the_gradient():
    net, parts = network(2), stream(1)
    found = run(parts, constant(1, 0.1), net, inspect=True, chunk=1)
    state = MemoryState.start(net, BATCH, 1)
    weights = [w.detach().clone().requires_grad_() for w in state.weights]
    loss = (net(weights, parts[1].detach()) - parts[2].detach()).square().sum()
    squares = sum(g.square().sum((-1, -2)) for g in torch.autograd.grad(loss, weights))
    torch.testing.assert_close(found.surprise[:, :, 0], squares.sqrt())


def test_rows_of_a_batch_have_memories_of_their_own():
    net, parts, gates = network(2), stream(9), draw_gates(9)
    together = run(parts, gates, net).output
    other = [torch.cat([x[:1], x[1:] + 1.0]) for x in parts]
    torch.testing.assert_close(run(other, gates, net).output[:1], together[:1], rtol=0, atol=0)
    assert not torch.allclose(run(other, gates, net).output[1:], together[1:])


def test_a_gradient_longer_than_the_clip_is_cut_to_it():
    net = network(1, residual=False, clip=0.5)
    parts = stream(6)
    _, deltas, _ = errors(net, [w.expand(BATCH, *w.shape) for w in net.weights], parts[1], 100 * parts[2])
    torch.testing.assert_close(deltas[-1].norm(dim=-1), torch.full((BATCH, HEADS, 6), 0.5, dtype=torch.float64))


def test_learning_needs_no_graph():
    net, parts, gates = network(2), stream(9), draw_gates(9)
    expected = run(parts, gates, net).output.detach()
    for context in (torch.no_grad, torch.inference_mode):
        for mode in ("block", "step", "reference"):
            with context():
                found = run(parts, gates, net, mode=mode).output
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mode", ["block", "step", "reference"])
def test_a_memory_that_blows_up_says_where(mode):
    net = MemoryNet((torch.zeros(HEADS, DIM, DIM),))
    key = normalize(torch.ones(BATCH, HEADS, 400, DIM), dim=-1)
    gates = constant(400, 9.0)
    with pytest.raises(NumericError, match=r"layer 3: got NaN or infinity in chunk 15 of 25 \(largest θ 9"):
        run([key, key, key], gates.to(torch.float32), net, chunk=16, name="layer 3", mode=mode)


@pytest.mark.parametrize("mode", ["block", "step", "reference"])
def test_autocast_does_not_narrow_the_learning(mode):
    """Trained under bfloat16 autocast, the memory of a few dozen tokens was another one."""
    net, gates = network(2).to(torch.float32), draw_gates(40).to(torch.float32)
    parts = [x.detach().float().requires_grad_() for x in stream(40)]
    exact = run(parts, gates, net, mode=mode)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = run(parts, gates, net, mode=mode)
        assert all(torch.equal(a, b) for a, b in zip(found.state.now()[0], exact.state.now()[0], strict=True))
    assert torch.equal(found.output, exact.output)
    gradients = [torch.autograd.grad(read.output.sum(), parts) for read in (found, exact)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("chunk", [1, 4, 16, 64])
def test_a_step_bounded_by_momentum_and_chunk_is_stable_for_keys_that_repeat(chunk):
    """θ = (1 − η) / chunk on one key over and over, the worst case; unbounded θ = 0.03, η = 0.8 blows up from 16 on."""
    net = MemoryNet((torch.zeros(HEADS, DIM, DIM, dtype=torch.float64),))
    key = normalize(torch.ones(BATCH, HEADS, 512, DIM, dtype=torch.float64), dim=-1)
    value = torch.ones_like(key)
    found = run([key, key, value], constant(512, 0.2 / chunk, 0.8), net, chunk=chunk, inspect=True)
    assert float(found.loss.max()) <= 4.0 * DIM
    assert float(found.loss[..., -1].max()) < float(found.loss[..., 0].min())


def test_half_precision_is_worked_in_float32():
    net, gates = network(2), draw_gates(9)
    parts = [x.detach().to(torch.float16) for x in stream(9)]
    found = run(parts, gates, net.to(torch.float32))
    assert found.output.dtype == torch.float32
    assert all(w.dtype == torch.float32 for w in found.state.weights)


def test_masked_tokens_leave_the_whole_state_as_it_was():
    net, gates = network(2), draw_gates(6)
    state = run(stream(6), gates, net).state
    nothing = torch.zeros(BATCH, 5, dtype=torch.bool)
    for mode in ("block", "step", "reference"):
        after = deep_memory(*stream(5, 9), draw_gates(5), net, chunk=4, mask=nothing, state=state, mode=mode)
        assert not after.output.any()
        for name in ("weights", "momentum", "inputs", "errors"):
            for a, b in zip(getattr(after.state, name), getattr(state, name), strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0)
        for a, b in zip(after.state.running[0].tensors(), state.running[0].tensors(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradcheck_through_the_learning():
    net = network(2)
    parts = [x[:1, :, :5].detach().requires_grad_() for x in stream(5)]
    gates = draw_gates(5, batch=1)

    def score(*given: torch.Tensor) -> torch.Tensor:
        return run(list(given[:3]), gates, MemoryNet(given[3:], True, net.gain, net.shift), chunk=2).output

    assert torch.autograd.gradcheck(score, (*parts, *net.weights), fast_mode=True)


def test_chunks_of_split_packed_padded_rows():
    position = torch.tensor([[2, 3, 0, 1, 2, 3, 4], [0, 0, 1, 1, 2, 0, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1, 1]], dtype=torch.bool)
    chunks = document_chunks(position, 4, mask=mask, seen=torch.tensor([2, 0]))
    assert chunks.token.tolist() == [
        [[-1, -1, 0, 1], [2, 3, 4, 5], [6, -1, -1, -1]],
        [[1, 2, 4, -1], [5, 6, -1, -1], [-1, -1, -1, -1]],
    ]
    assert chunks.closes.tolist() == [[True, True, False], [False, False, False]]
    assert chunks.opens.tolist() == [[False, True, False], [True, True, False]]
    assert chunks.stays.tolist() == [[False, False, True], [False, True, False]]
    x = torch.arange(14.0).view(2, 7, 1)
    torch.testing.assert_close(chunks.scatter(chunks.gather(x))[mask], x[mask])


def test_bad_arguments_are_named():
    net, parts, gates = network(2), stream(5), draw_gates(5)
    with pytest.raises(ArgumentError, match="reads"):
        run(parts, gates, net, reads="during")
    with pytest.raises(ArgumentError, match="mode"):
        run(parts, gates, net, mode="fast")
    with pytest.raises(ArgumentError, match="key: got shape"):
        run([parts[0], parts[1][..., :3], parts[2]], gates, net)
    with pytest.raises(ArgumentError, match="chunk: got 0"):
        deep_memory(*parts, gates, net, chunk=0)
    with pytest.raises(ArgumentError, match="state: got one for chunks of 4"):
        deep_memory(*parts, gates, net, chunk=8, state=MemoryState.start(net, BATCH, 4))
    with pytest.raises(ArgumentError, match="alpha: got"):
        run(parts, Gates(gates.theta, gates.eta, (gates.theta[..., None],) * 2), net)
    with pytest.raises(ArgumentError, match="weights: got layers of 4×8, 8×5"):
        MemoryNet((torch.zeros(1, 4, 8), torch.zeros(1, 8, 5)))
    with pytest.raises(ArgumentError, match="weights: got none"):
        MemoryNet(())
