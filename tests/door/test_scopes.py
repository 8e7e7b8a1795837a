"""What a scope checks when it opens and when a site turns up later: editors and selectors beside a cache policy,
narrowed policies, masks, and models whose blocks were left out in between."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.door import Editor, HeadGate, Observer, Selector, UniformHeads, Window
from headway.door.blocks import without_blocks
from headway.door.caches import first_tokens
from headway.errors import ArgumentError, ConflictError, HostError
from tests.contracts.cache_policy import padded_left, run_in_chunks, tokens
from tests.contracts.test_cache_policy import KeepLast
from tests.door.hosts import CAUSAL, clip, decoder


class Doubled(Editor):
    """Doubles values before attention."""

    def edit_call(self, call):
        return call.replace(value=2 * call.value)


class Near(Selector):
    def select(self, call):
        return Window(1, 4)


@pytest.mark.parametrize("editor", [Doubled(), UniformHeads(heads=[(0, 0)])])
def test_editors_of_keys_and_values_are_refused_beside_a_policy(editor):
    """A policy reads what it stored; an editor sees the new keys alone and would be wrong without a word."""
    model = decoder("Llama")
    with pytest.raises(ConflictError, match=rf"KeepLast and {editor.title}, which needs all keys of all heads"):
        headway.use(model, KeepLast(3), editor).attach()
    with headway.use(model, editor), pytest.raises(ConflictError, match=editor.title):
        headway.use(model, KeepLast(3)).attach()


@torch.no_grad()
def test_a_head_gate_is_right_beside_a_policy():
    """It reads nothing but the output: a gate of one half on every head is half of what attention adds."""
    model, ids = decoder("Llama", num_hidden_layers=1), tokens(2, 12)
    seen = {}

    class Keep(Observer):
        def start(self):
            seen[self] = []

        def observe(self, call, output, lse=None):
            seen[self].append(output)

    plain, gated = Keep(), Keep()
    with headway.use(model, KeepLast(3), plain):
        run_in_chunks(model, ids, [8, 1, 3])
    with headway.use(model, KeepLast(3), HeadGate(gates={(0, head): 0.5 for head in range(4)}), gated):
        run_in_chunks(model, ids, [8, 1, 3])
    for half, whole in zip(seen[gated], seen[plain], strict=True):
        torch.testing.assert_close(half, whole / 2)


@pytest.mark.parametrize(
    ("stages", "named"),
    [
        ((KeepLast(3), Doubled()), "KeepLast and Doubled"),
        ((KeepLast(3), Near()), "KeepLast and Near"),
        ((Near(), Near()), "two selectors"),
    ],
)
def test_what_conflicts_is_refused_at_the_first_forward_of_a_scope_without_a_self_test(stages, named):
    model = decoder("Llama")
    with (
        headway.use(model, *stages, selftest=False),
        torch.no_grad(),
        pytest.raises(ConflictError, match=named),
    ):
        model(input_ids=tokens(1, 8), use_cache=True)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens(1, 8)).logits).all()


@pytest.mark.parametrize("selftest", [True, False])
@pytest.mark.parametrize("options", [{"layers": [0]}, {"sites": ["*.1.*"]}])
def test_a_policy_serves_the_whole_model(options, selftest):
    with pytest.raises(ConflictError, match=r"for KeepLast, expected the whole model"):
        headway.use(decoder("Llama"), KeepLast(3), selftest=selftest, **options).attach()


def test_naming_every_layer_is_the_whole_model():
    model, ids = decoder("Llama"), tokens(1, 9)
    with headway.use(model, KeepLast(3), layers=[0, 1, 2]):
        some = run_in_chunks(model, ids, [6, 1, 1, 1])
    with headway.use(model, KeepLast(3)):
        torch.testing.assert_close(some, run_in_chunks(model, ids, [6, 1, 1, 1]))


def test_a_mask_of_pairs_that_says_padding_is_read_as_padding():
    model = decoder("Llama")
    ids, mask = padded_left(tokens(2, 12), [0, 4])
    pairs = mask.bool()[:, None, None] & torch.ones(12, 12, dtype=torch.bool).tril()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with headway.use(model, KeepLast(3)), torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True).logits
        got = model(input_ids=ids, attention_mask=pairs, position_ids=positions, use_cache=True).logits
        torch.testing.assert_close(got[mask.bool()], want[mask.bool()], atol=1e-5, rtol=0)
        other = pairs.clone()
        other[:, :, 9, 6] = False
        with pytest.raises(ArgumentError, match="four dimensions that hides more"):
            model(input_ids=ids, attention_mask=other, use_cache=True)


def test_sites_are_those_of_the_model_as_it_is_also_when_blocks_were_left_out_in_between():
    """Gemma 2 has windows in every other layer; without its first block the numbers move and the windows with them."""
    model, seen = CAUSAL["gemma2 soft cap"](), []

    class Windows(Observer):
        def observe(self, call, output, lse=None):
            seen.append((call.site.layer, call.site.window, call.module.layer_idx, call.module.sliding_window))

    def windows():
        seen.clear()
        with torch.no_grad(), headway.observe(model, Windows()):
            model(input_ids=tokens(1, 9))
        assert all((layer, window) == own for layer, window, *rest in seen for own in [tuple(rest)])
        return [window for _, window, _, _ in seen]

    whole = windows()
    with without_blocks(model, [0]):
        assert windows() == whole[1:]
        with pytest.raises(ArgumentError, match="layers: got 2"):
            headway.use(model, Near(), layers=[2]).attach()
    assert windows() == whole
    assert len(set(whole)) == 2


def test_first_tokens_of_padded_rows():
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [0, 0, 0]])
    assert first_tokens(mask).tolist() == [0, 1, 3]


def test_reads_of_a_policy_see_no_future():
    from headway.door import AttentionCall
    from headway.door.policy_hosts import require_plain_positions

    tensors = [torch.zeros(1, 2, 4, 8)] * 3
    require_plain_positions(AttentionCall.from_tensors(*tensors, causal=True))
    with pytest.raises(HostError, match="sees the future"):
        require_plain_positions(AttentionCall.from_tensors(*tensors))


def test_packed_sequences_are_refused_and_numbered_padding_is_not():
    model, ids = decoder("Llama"), tokens(1, 9)
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]])
    with headway.use(model, KeepLast(3)), torch.no_grad():
        for cached in (True, False):
            with pytest.raises(ArgumentError, match="start again at column 4"):
                model(input_ids=ids, position_ids=packed, use_cache=cached)
        mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]])
        numbered = torch.tensor([[1, 1, 0, 1, 2, 3, 4, 5, 6]])
        assert torch.isfinite(model(input_ids=ids, attention_mask=mask, position_ids=numbered).logits).all()


@pytest.mark.parametrize("what", ["entropy", "key", "value"])
def test_captures_of_weights_keys_and_values_are_refused_beside_a_policy(what):
    """A policy's call holds some of them, at other places; outputs and queries are whole."""
    model = decoder("Llama")
    with headway.use(model, KeepLast(3)):
        with pytest.raises(ConflictError, match=r"KeepLast and Capture"):
            headway.capture(model, what=(what,)).attach()
        with headway.capture(model, what=("head_output", "query")) as captured:
            run_in_chunks(model, tokens(1, 12), [8, 1, 3])
    assert captured.result()[0]["head_output"].shape == (1, 4, 12, 8)
    assert captured.result()[0]["query"].shape == (1, 4, 12, 8)


def test_towers_are_addressed_by_their_paths_and_layer_numbers_name_one_site():
    model, inputs = clip()
    with headway.use(model, Counting()) as handle:
        model(**inputs)
    numbers = [site.layer for site in handle.sites]
    assert sorted(numbers) == list(range(len(numbers)))
    for tower, layers in (("vision_model", 2), ("text_model", 2)):
        for layer in range(layers):
            seen = Counting()
            with headway.use(model, seen, sites=[f"{tower}.encoder.layers.{layer}.*"]):
                model(**inputs)
            assert seen.names == [f"{tower}.encoder.layers.{layer}.self_attn"]


class Counting(Observer):
    """The names of the sites that it saw."""

    def start(self):
        self.names = []

    def observe(self, call, output, lse=None):
        self.names.append(call.site.name)

    def result(self):
        return self.names
