import pytest
import torch

from headway.door.key_value_state import ROOM, append, crop_keys, empty_keys
from headway.door.mixer import Mixer, State, document_positions, register_mixer, segment_ids
from headway.errors import ArgumentError


class TestPositions:
    def test_tokens_are_counted_from_what_was_seen(self):
        positions, seen = document_positions((2, 3), None, None, torch.tensor([0, 4]))
        assert positions.tolist() == [[0, 1, 2], [4, 5, 6]]
        assert seen.tolist() == [3, 7]

    def test_padding_has_no_position(self):
        mask = torch.tensor([[False, True, False, True]])
        positions, seen = document_positions((1, 4), mask, None, None)
        assert positions[0, [1, 3]].tolist() == [0, 1]
        assert seen.tolist() == [2]

    def test_a_reset_starts_over(self):
        resets = torch.tensor([[False, False, True, False, True]])
        positions, seen = document_positions((1, 5), None, resets, torch.tensor([7]))
        assert positions.tolist() == [[7, 8, 0, 1, 0]]
        assert seen.tolist() == [1]

    def test_a_reset_at_padding_is_ignored(self):
        mask = torch.tensor([[True, False, True]])
        resets = torch.tensor([[False, True, False]])
        positions, _ = document_positions((1, 3), mask, resets, None)
        assert positions[0, [0, 2]].tolist() == [0, 1]
        assert segment_ids(resets, mask).tolist() == [[0, 0, 0]]

    def test_no_tokens_leave_what_was_seen(self):
        positions, seen = document_positions((1, 0), None, None, torch.tensor([5]))
        assert positions.shape == (1, 0)
        assert seen.tolist() == [5]


def keys(tokens: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, 2, tokens, 4, generator=generator), torch.randn(1, 1, tokens, 3, generator=generator)


class TestKeysAndValues:
    def start(self) -> State:
        return empty_keys(1, key_heads=2, key_dim=4, value_heads=1, value_dim=3)

    def test_plain_tokens_need_no_mask(self):
        found = append(self.start(), *keys(5))
        assert found.visible is None
        assert found.causal
        one = append(found.state, *keys(1))
        assert one.visible is None
        assert not one.causal
        assert one.key.shape == (1, 2, 6, 4)

    def test_a_chunk_sees_the_past_and_itself_in_order(self):
        found = append(append(self.start(), *keys(2)).state, *keys(3))
        assert found.visible[0, 0].int().tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]

    def test_padding_and_other_documents_are_not_seen(self):
        mask = torch.tensor([[True, False, True, True]])
        resets = torch.tensor([[True, False, False, True]])
        found = append(self.start(), *keys(4), mask, resets)
        assert found.visible[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 1]]
        after = append(found.state, *keys(1))
        assert after.visible[0, 0].int().tolist() == [[0, 0, 0, 1, 1]]

    def test_bytes_are_those_of_the_two(self):
        state = append(self.start(), *keys(5)).state
        assert state.bytes == 5 * (2 * 4 + 1 * 3) * 4 + 8

    def test_the_last_tokens_can_be_taken_back(self):
        state = append(self.start(), *keys(5)).state
        cropped = crop_keys(state, 2)
        assert cropped.tensors["key"].shape[2] == 3
        assert cropped.seen.tolist() == [3]

    def test_more_than_there_is_cannot_be_taken_back(self):
        with pytest.raises(ArgumentError, match=r"expected 0\.\.5"):
            crop_keys(append(self.start(), *keys(5)).state, 6)

    @torch.no_grad()
    def test_steps_do_not_copy_the_past(self):
        first = append(append(self.start(), *keys(5)).state, *keys(1, seed=1))
        state, places = first.state, set()
        for step in range(ROOM):
            state = append(state, *keys(1, seed=2 + step)).state
            places.add(state.tensors["key"].data_ptr())
        assert places == {first.state.tensors["key"].data_ptr()}
        assert append(state, *keys(1)).key.data_ptr() not in places

    @torch.no_grad()
    def test_two_continuations_of_one_past_do_not_meet(self):
        past = append(append(self.start(), *keys(5)).state, *keys(1, seed=1)).state
        one, two = append(past, *keys(1, seed=2)), append(past, *keys(1, seed=3))
        assert torch.equal(one.key[:, :, -1:], keys(1, seed=2)[0])
        assert torch.equal(two.key[:, :, -1:], keys(1, seed=3)[0])
        cropped = append(crop_keys(one.state, 1), *keys(1, seed=4))
        assert torch.equal(one.key[:, :, -1:], keys(1, seed=2)[0])
        assert torch.equal(cropped.key[:, :, :-1], past.tensors["key"])

    def test_what_was_written_without_gradients_can_be_read_and_continued_with_them(self):
        with torch.no_grad():
            past = append(append(self.start(), *keys(5)).state, *keys(1, seed=1)).state
        key, value = (x.requires_grad_() for x in keys(1, seed=2))
        found = append(past, key, value)
        found.key.sum().backward()
        assert torch.equal(key.grad, torch.ones_like(key))


class TestRegistry:
    def test_a_name_is_given_once(self):
        class Softmax(Mixer):
            slug = "softmax"

        from headway.models import mixers

        if "softmax" not in mixers():
            pytest.skip("no softmax mixer")
        with pytest.raises(ArgumentError, match="already"):
            register_mixer(Softmax)

    def test_a_mixer_needs_a_name(self):
        class Nameless(Mixer):
            pass

        with pytest.raises(ArgumentError, match="slug"):
            register_mixer(Nameless)

    def test_heads_divide_the_width(self):
        with pytest.raises(ArgumentError, match="heads divide"):
            Mixer(10, heads=4)
