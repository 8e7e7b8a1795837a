"""The norm-layer mask: planted massive dimensions are found, and no block behind their birth reads them."""

from __future__ import annotations

import pytest
import torch
from tests.door.hosts import CAUSAL, tokens
from torch import nn

from headway.errors import ArgumentError, HostError
from headway.methods.sinks.sink_survey import massive_dimensions, norm_mask
from headway.methods.sinks.sink_survey.registers import block_list


def with_massive(model, block, dimension, size):
    """Makes the output of a block massive at the first token; the handle takes it away again."""

    def grow(module, args, result):
        h = (result if isinstance(result, torch.Tensor) else result[0]).clone()
        h[:, 0, dimension] = size
        return h if isinstance(result, torch.Tensor) else (h, *result[1:])

    return block_list(model)[block].register_forward_hook(grow)


@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_planted_dimensions_are_found_from_the_block_that_makes_them(host):
    model = CAUSAL[host]()
    handle = with_massive(model, 1, 5, -900.0)
    found = massive_dimensions(model, tokens(2, 8), magnitude=100.0, ratio=50.0)
    handle.remove()
    assert found == (1, (5,))
    assert massive_dimensions(model, tokens(2, 8)) == (None, ())


def test_what_attention_adds_does_not_depend_on_the_sign_of_a_masked_dimension():
    """The root mean square feels the size alone: with the mask attention reads the same for both signs."""
    model, ids = CAUSAL["llama"](), tokens(2, 8)

    def added(size, dimensions):
        found = []
        handles = [
            with_massive(model, 0, 5, size),
            model.model.layers[1].self_attn.register_forward_hook(lambda m, a, r: found.append(r[0])),
        ]
        with torch.no_grad(), norm_mask(model, dimensions, start=1):
            model(input_ids=ids)
        for handle in handles:
            handle.remove()
        return found[0]

    torch.testing.assert_close(added(7.0, [5]), added(-7.0, [5]), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(added(7.0, []), added(-7.0, []), atol=1e-3)


@pytest.mark.parametrize("host", ["llama", "gpt2", "gpt-oss learned sinks"])
def test_the_norms_of_later_blocks_give_zero_there_and_earlier_ones_do_not(host):
    model = CAUSAL[host]()
    seen: dict[int, list[torch.Tensor]] = {0: [], 1: [], 2: []}
    with torch.no_grad(), norm_mask(model, [3, 6], start=1):
        handles = [
            module.register_forward_hook(lambda m, a, r, block=block: seen[block].append(r[..., [3, 6]].abs().max()))
            for block in (0, 1, 2)
            for module in block_list(model)[block].modules()
            if "norm" in type(module).__name__.lower()
        ]
        model(input_ids=tokens(1, 6))
    for handle in handles:
        handle.remove()
    assert len(seen[0]) == len(seen[1]) == 2
    assert all(value > 0 for value in seen[0])
    assert all(value == 0 for block in (1, 2) for value in seen[block])


def test_without_dimensions_and_afterwards_the_model_is_itself():
    model, ids = CAUSAL["llama"](), tokens()
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with norm_mask(model, []):
            assert torch.equal(model(input_ids=ids).logits, native)
        with norm_mask(model, [2]):
            assert not torch.allclose(model(input_ids=ids).logits, native)
        assert torch.equal(model(input_ids=ids).logits, native)


def test_bad_places_are_named():
    model = CAUSAL["llama"]()
    with (
        pytest.raises(ArgumentError, match=r"start: got 3, expected a block in 0\.\.2"),
        norm_mask(model, [1], start=3),
    ):
        pass
    with pytest.raises(ArgumentError, match="dimensions: got 4096"), norm_mask(model, [4096]):
        pass
    with pytest.raises(HostError, match="list of blocks"), norm_mask(nn.Linear(2, 2), [0]):
        pass
