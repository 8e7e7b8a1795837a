"""The contract of token mixers, run for every registered one: forms agree, whatever the split, padding or packing."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from headway.door.mixer import Mixer, State
from headway.errors import ArgumentError
from headway.models.mixers import mixers

SLUGS = sorted(mixers())
TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def example(slug: str, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: object) -> Mixer:
    torch.manual_seed(seed)
    mixer = mixers()[slug].example(**changes).to(dtype).eval()
    with torch.no_grad():
        # Asymmetric weights, so that what is only right for zeros or identities shows.
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def inputs(mixer: Mixer, tokens: int, batch: int = 2, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    dtype = next(mixer.parameters()).dtype
    return torch.randn(batch, tokens, mixer.width, generator=generator, dtype=torch.float64).to(dtype)


def fresh(mixer: Mixer, batch: int) -> State:
    return mixer.init_state(batch, dtype=next(mixer.parameters()).dtype)


@pytest.fixture(params=SLUGS)
def slug(request: pytest.FixtureRequest) -> str:
    return request.param


def is_causal(slug: str) -> bool:
    return example(slug).causal


def skip_unless_causal(slug: str) -> None:
    if not is_causal(slug):
        pytest.skip("reads both ways")


class TestForms:
    @pytest.mark.parametrize("tokens", [1, 2, 7, 19, 33])
    def test_reference_is_block_is_step(self, slug, tokens):
        mixer = example(slug)
        x = inputs(mixer, tokens)
        reference = mixer(x, mode="reference")[0]
        torch.testing.assert_close(mixer(x, mode="block")[0], reference, **TIGHT)
        if mixer.causal:
            torch.testing.assert_close(mixer(x, mode="step")[0], reference, **TIGHT)

    def test_their_gradients_agree(self, slug):
        mixer = example(slug)
        found = []
        for mode in ("reference", "block", *(("step",) if mixer.causal else ())):
            x = inputs(mixer, 11).requires_grad_()
            y = mixer(x, mode=mode)[0]
            leaves = [x, *mixer.parameters()]
            weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
            found.append(torch.autograd.grad((y * weight).sum(), leaves, allow_unused=True))
        for other in found[1:]:
            for first, second in zip(found[0], other, strict=True):
                first = torch.zeros(()) if first is None else first
                second = torch.zeros(()) if second is None else second
                torch.testing.assert_close(second, first.expand_as(second), rtol=1e-6, atol=1e-8)

    def test_no_tokens_give_none(self, slug):
        mixer = example(slug)
        x = inputs(mixer, 0)
        assert mixer(x)[0].shape == (2, 0, mixer.width)
        if mixer.causal:
            y, state = mixer(x, state=fresh(mixer, 2))
            assert y.shape == (2, 0, mixer.width)
            assert state is not None
            assert state.seen.tolist() == [0, 0]

    def test_gradcheck(self, slug):
        mixer = example(slug)
        x = inputs(mixer, 5, batch=1).requires_grad_()
        parameters = [p for p in mixer.parameters() if p.requires_grad]

        def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            return mixer(x)[0]

        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True, atol=1e-5)

    @pytest.mark.parametrize("mode", ["block", "step"])
    def test_gradcheck_with_a_carried_state_padding_and_documents(self, slug, mode):
        """Of both pieces of a text, so that gradients also cross from the second one to what the state was made of."""
        mixer = example(slug)
        parameters = [p for p in mixer.parameters() if p.requires_grad]
        mask = torch.tensor([[1, 1, 0, 1, 1, 0, 1, 1], [0, 1, 1, 1, 1, 1, 1, 0]], dtype=torch.bool)
        resets = torch.zeros(2, 8, dtype=torch.bool)
        resets[0, 6] = resets[1, 3] = True
        x = inputs(mixer, 8).requires_grad_()

        def run(x: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
            if not mixer.causal:
                return mixer(x, mask=mask)[0]
            first, state = mixer(x[:, :4], mask=mask[:, :4], resets=resets[:, :4], state=fresh(mixer, 2), mode=mode)
            second, _ = mixer(x[:, 4:], mask=mask[:, 4:], resets=resets[:, 4:], state=state, mode=mode)
            return torch.cat([first, second], 1)

        assert torch.autograd.gradcheck(run, (x, *parameters), fast_mode=True, atol=1e-5)
        if mixer.causal:
            back = torch.autograd.grad(run(x)[1, 4:].sum(), x)[0]
            assert bool(back[1, 3].any()), "what was read before the cut is told of what came behind it"

    def test_bfloat16_is_near_float32(self, slug):
        mixer = example(slug, dtype=torch.float32)
        x = inputs(mixer, 19)
        exact = mixer(x)[0]
        rough = mixer.to(torch.bfloat16)(x.bfloat16())[0]
        assert rough.dtype == torch.bfloat16
        assert float((rough.float() - exact).norm() / exact.norm()) < 3e-2

    def test_uninitialised_memory_is_not_read(self, slug, monkeypatch):
        mixer = example(slug)
        x = inputs(mixer, 19)
        exact = [mixer(x, mode=mode)[0] for mode in ("reference", "block")]

        def poisoned(make):
            def call(*args, **kwargs):
                found = make(*args, **kwargs)
                return found.fill_(torch.nan) if found.is_floating_point() and not found.is_meta else found

            return call

        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
        for mode, expected in zip(("reference", "block"), exact, strict=True):
            torch.testing.assert_close(mixer(x, mode=mode)[0], expected, **TIGHT)

    def test_an_unknown_mode_is_refused(self, slug):
        mixer = example(slug)
        with pytest.raises(ArgumentError, match="mode"):
            mixer(inputs(mixer, 3), mode="blok")

    def test_a_wrong_width_is_refused(self, slug):
        mixer = example(slug)
        with pytest.raises(ArgumentError, match="x: got"):
            mixer(torch.randn(1, 3, mixer.width + 1, dtype=torch.float64))

    def test_a_mask_of_another_shape_is_refused(self, slug):
        mixer = example(slug)
        with pytest.raises(ArgumentError, match="mask"):
            mixer(inputs(mixer, 3), mask=torch.ones(2, 1, 3, 3, dtype=torch.bool))


class TestState:
    @pytest.mark.parametrize("cuts", [(5,), (1, 2), (16,), (8, 17), (18,)])
    @pytest.mark.parametrize("mode", ["block", "step", "reference"])
    def test_any_split_is_one_call(self, slug, cuts, mode):
        skip_unless_causal(slug)
        mixer = example(slug)
        x = inputs(mixer, 19)
        whole, end = mixer(x, state=fresh(mixer, 2))
        state, parts = fresh(mixer, 2), []
        for start, stop in itertools.pairwise((0, *cuts, 19)):
            part, state = mixer(x[:, start:stop], state=state, mode=mode)
            parts.append(part)
        torch.testing.assert_close(torch.cat(parts, 1), whole, **TIGHT)
        after = inputs(mixer, 3, seed=5)
        torch.testing.assert_close(mixer(after, state=state)[0], mixer(after, state=end)[0], **TIGHT)

    def test_a_call_leaves_the_given_state_as_it_was(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        _, state = mixer(inputs(mixer, 6), state=fresh(mixer, 2))
        kept = state.clone()
        mixer(inputs(mixer, 4, seed=3), state=state)
        for name, tensor in kept.tensors.items():
            assert torch.equal(tensor, state.tensors[name]), name

    def test_without_a_state_none_is_given_back(self, slug):
        mixer = example(slug)
        assert mixer(inputs(mixer, 4))[1] is None

    def test_rows_can_be_reordered_and_repeated(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        x, after = inputs(mixer, 9), inputs(mixer, 4, seed=3)
        _, state = mixer(x, state=fresh(mixer, 2))
        straight = mixer(after, state=state)[0]
        turned = mixer(after.flip(0), state=state.reorder(torch.tensor([1, 0])))[0]
        torch.testing.assert_close(turned.flip(0), straight, **TIGHT)
        double = mixer(after.repeat_interleave(2, 0), state=state.repeat(2))[0]
        torch.testing.assert_close(double[::2], straight, **TIGHT)

    def test_a_detached_state_cuts_the_graph(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        x = inputs(mixer, 6).requires_grad_()
        _, state = mixer(x, state=fresh(mixer, 2))
        after = inputs(mixer, 3, seed=3)
        flowed = torch.autograd.grad(mixer(after, state=state)[0].sum(), x, allow_unused=True)[0]
        assert flowed is not None
        assert bool(flowed.abs().sum() > 0)
        y = mixer(after, state=state.detach())[0]
        assert torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None

    def test_bytes_are_constant_where_the_mixer_says_so(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        sizes = [mixer(inputs(mixer, n), state=fresh(mixer, 2))[1].bytes for n in (64, 128, 192)]
        assert (len(set(sizes)) == 1) == mixer.constant_state

    def test_tokens_are_taken_back_or_refused_by_name(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        x = inputs(mixer, 9)
        _, state = mixer(x, state=fresh(mixer, 2))
        if not mixer.can_crop:
            with pytest.raises(ArgumentError, match=slug):
                mixer.crop(state, 2)
            return
        again = mixer(x[:, 7:], state=mixer.crop(state, 2))[0]
        torch.testing.assert_close(again, mixer(x)[0][:, 7:], **TIGHT)

    def test_a_state_of_another_batch_is_refused(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        with pytest.raises(ArgumentError, match="state"):
            mixer(inputs(mixer, 3), state=fresh(mixer, 3))


def masks() -> Iterator[tuple[str, list[int]]]:
    yield "left", [0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]
    yield "right", [1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    yield "inside", [1, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1]


class TestPadding:
    @pytest.mark.parametrize(("place", "pattern"), list(masks()))
    @pytest.mark.parametrize("mode", ["block", "reference", "step"])
    def test_padded_is_unpadded(self, slug, place, pattern, mode):
        mixer = example(slug)
        if mode == "step" and not mixer.causal:
            pytest.skip("reads both ways")
        x = inputs(mixer, len(pattern))
        mask = torch.tensor([pattern, [1] * len(pattern)], dtype=torch.bool)
        poisoned = torch.where(mask[..., None], x, torch.nan)
        y = mixer(poisoned, mask=mask, mode=mode)[0]
        assert not bool(y[~mask].any()), "a masked row gives zeros"
        for row in range(2):
            alone = mixer(x[row : row + 1, mask[row]], mode="reference")[0]
            torch.testing.assert_close(y[row, mask[row]][None], alone, **TIGHT)

    @pytest.mark.parametrize("mode", ["block", "step"])
    def test_a_masked_step_is_the_identity_on_the_state(self, slug, mode):
        skip_unless_causal(slug)
        mixer = example(slug)
        x, after = inputs(mixer, 7), inputs(mixer, 5, seed=3)
        _, state = mixer(x, state=fresh(mixer, 2))
        nothing = torch.zeros(2, 3, dtype=torch.bool)
        _, same = mixer(inputs(mixer, 3, seed=4), mask=nothing, state=state, mode=mode)
        assert torch.equal(same.seen, state.seen)
        if mixer.constant_state:
            for name, tensor in state.tensors.items():
                assert torch.equal(same.tensors[name], tensor), name
        torch.testing.assert_close(mixer(after, state=same)[0], mixer(after, state=state)[0], **TIGHT)

    def test_gradients_do_not_see_padding(self, slug):
        mixer = example(slug)
        mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1]] * 2, dtype=torch.bool)
        x = torch.where(mask[..., None], inputs(mixer, 7), torch.nan).requires_grad_()
        leaves = [x, *mixer.parameters()]
        found = torch.autograd.grad(mixer(x, mask=mask)[0].pow(2).sum(), leaves, allow_unused=True)
        assert all(bool(torch.isfinite(g).all()) for g in found if g is not None)
        assert not bool(found[0][~mask].any())


class TestDocuments:
    @pytest.mark.parametrize("mode", ["block", "reference", "step"])
    def test_packed_is_separate(self, slug, mode):
        skip_unless_causal(slug)
        mixer = example(slug)
        x = inputs(mixer, 17)
        resets = torch.zeros(2, 17, dtype=torch.bool)
        resets[0, [0, 5, 6, 13]] = True
        y = mixer(x, resets=resets, mode=mode)[0]
        for start, stop in itertools.pairwise((0, 5, 6, 13, 17)):
            torch.testing.assert_close(y[:1, start:stop], mixer(x[:1, start:stop], mode="reference")[0], **TIGHT)
        torch.testing.assert_close(y[1:], mixer(x[1:])[0], **TIGHT)

    def test_a_reset_forgets_a_carried_state(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        _, state = mixer(inputs(mixer, 9), state=fresh(mixer, 2))
        x = inputs(mixer, 6, seed=3)
        resets = torch.zeros(2, 6, dtype=torch.bool)
        resets[:, 0] = True
        y, after = mixer(x, resets=resets, state=state)
        torch.testing.assert_close(y, mixer(x)[0], **TIGHT)
        assert after.seen.tolist() == [6, 6]

    def test_packed_and_padded(self, slug):
        skip_unless_causal(slug)
        mixer = example(slug)
        x = inputs(mixer, 12, batch=1)
        mask = torch.tensor([[0, 1, 1, 0, 1, 1, 0, 0, 1, 1, 1, 0]], dtype=torch.bool)
        resets = torch.zeros(1, 12, dtype=torch.bool)
        resets[0, [1, 5]] = True
        y = mixer(x, mask=mask, resets=resets)[0]
        for start, stop in ((0, 5), (5, 12)):
            real = mask[0, start:stop]
            alone = mixer(x[:, start:stop][:, real], mode="reference")[0]
            torch.testing.assert_close(y[:, start:stop][:, real], alone, **TIGHT)


class TestIndependence:
    def test_a_batch_of_two_is_two_singles(self, slug):
        mixer = example(slug)
        x = inputs(mixer, 13)
        together = mixer(x)[0]
        for row in range(2):
            torch.testing.assert_close(together[row : row + 1], mixer(x[row : row + 1])[0], **TIGHT)

    @pytest.mark.parametrize("changed", [0, 4, 9, 12])
    def test_nothing_looks_ahead(self, slug, changed):
        skip_unless_causal(slug)
        mixer = example(slug)
        earlier, own = moved_by(mixer, changed)
        assert earlier < 1e-11
        assert own > 0

    @pytest.mark.parametrize("peek", ["next", "mean", "last"])
    def test_a_mixer_that_looks_ahead_is_caught(self, peek):
        """The control of the test above: a millionth of what is to come is enough."""
        mixer = Peeking(16, heads=2, peek=peek).double()
        assert moved_by(mixer, 12 if peek != "next" else 9)[0] > 1e-9
        assert moved_by(Peeking(16, heads=2, peek="nothing").double(), 9)[0] == 0


def moved_by(mixer: Mixer, changed: int) -> tuple[float, float]:
    """How far outputs of earlier tokens move, and that of the token itself, when a token of 13 is another."""
    x = inputs(mixer, 13)
    other = x.clone()
    other[:, changed] += 1.0
    with torch.no_grad():
        moved = (mixer(other)[0] - mixer(x)[0]).abs().amax((0, 2))
    return max(moved[:changed].tolist(), default=0.0), float(moved[changed])


class Peeking(Mixer):
    """Gives its input back, with a little of what comes later."""

    slug = "peeking"

    def __init__(self, width: int, *, heads: int, peek: str) -> None:
        super().__init__(width, heads=heads, layer=0, layers=1)
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.peek = peek

    def forward(self, x, *, mask=None, resets=None, state=None, mode="block", grid=None):
        ahead = {
            "next": x.roll(-1, 1),
            "mean": x.mean(1, keepdim=True),
            "last": x[:, -1:],
            "nothing": torch.zeros_like(x),
        }
        return self.scale * x + 1e-6 * ahead[self.peek], None
