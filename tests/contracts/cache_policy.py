"""What every cache policy must do, as checks to call with a policy and a host.

`check_equals_dense` takes a policy whose options cover the whole input (budget ≥ length, sparsity 0, window ≥ length);
the others take a policy as users would run it. Hosts are causal language models of transformers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import headway
from headway.door import FixedPattern, SuppressBlocks, UniformHeads, ZeroValues
from headway.door.stages import CachePolicy
from headway.errors import ArgumentError, ConflictError, HeadwayError

MakePolicy = Callable[[], CachePolicy]


def tokens(batch: int, length: int, vocabulary: int = 90, seed: int = 0) -> Tensor:
    return torch.randint(3, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded_left(ids: Tensor, pads: list[int]) -> tuple[Tensor, Tensor]:
    """Tokens with pads in front, and the mask; row b has `pads[b]` pads and loses as many of its last tokens."""
    out, mask = torch.zeros_like(ids), torch.ones_like(ids)
    for row, count in enumerate(pads):
        out[row, count:] = ids[row, : ids.shape[1] - count]
        mask[row, :count] = 0
    return out, mask


@torch.no_grad()
def run_in_chunks(model: nn.Module, ids: Tensor, chunks: list[int], mask: Tensor | None = None) -> Tensor:
    """Logits of all tokens, read through the cache in chunks; ones at the end are decoding steps."""
    assert sum(chunks) == ids.shape[1]
    cache, start, logits = None, 0, []
    for chunk in chunks:
        inputs = {} if mask is None else {"attention_mask": mask[:, : start + chunk]}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, start : start + chunk]
            inputs["position_ids"] = positions
        out = model(input_ids=ids[:, start : start + chunk], past_key_values=cache, use_cache=True, **inputs)
        cache, start = out.past_key_values, start + chunk
        logits.append(out.logits)
    return torch.cat(logits, 1)


def check_equals_dense(model: nn.Module, make: MakePolicy, *, length: int = 20, atol: float = 1e-4) -> None:
    """One prefill, prefill in chunks and decoding give the host's own logits when nothing needs to be dropped."""
    ids = tokens(2, length)
    with torch.no_grad():
        native = model(input_ids=ids).logits
    for chunks in ([length], [length - 3, 1, 1, 1], [7, length - 9, 1, 1], [1] * length):
        with headway.use(model, make()):
            got = run_in_chunks(model, ids, chunks)
        torch.testing.assert_close(got, native, atol=atol, rtol=0, msg=lambda m, c=chunks: f"chunks {c}: {m}")


def check_padding(model: nn.Module, make: MakePolicy, *, length: int = 18, atol: float = 1e-4) -> None:
    """Left-padded rows of a batch give the logits of the same rows alone, in prefill and decoding."""
    pads = [0, 4]
    ids, mask = padded_left(tokens(2, length), pads)
    for chunks in ([length], [length - 4, 1, 1, 1, 1]):
        with headway.use(model, make()):
            got = run_in_chunks(model, ids, chunks, mask)
            for row, count in enumerate(pads):
                alone = run_in_chunks(model, ids[row : row + 1, count:], [chunks[0] - count, *chunks[1:]])
                torch.testing.assert_close(
                    got[row, count:], alone[0], atol=atol, rtol=0, msg=lambda m, r=row, c=chunks: f"row {r} {c}: {m}"
                )


def check_causality(model: nn.Module, make: MakePolicy, *, length: int = 18) -> None:
    """A later token changes nothing before it, read in chunks."""
    ids = tokens(1, length)
    other = ids.clone()
    other[0, -2:] = (other[0, -2:] + 7) % 80 + 3
    chunks = [length - 6, 4, 1, 1]
    with headway.use(model, make()):
        first, second = (run_in_chunks(model, x, chunks) for x in (ids, other))
    torch.testing.assert_close(first[:, :-2], second[:, :-2], atol=1e-5, rtol=0)
    assert not torch.allclose(first[:, -2:], second[:, -2:])


def check_requests_apart(model: nn.Module, make: MakePolicy, *, length: int = 16) -> None:
    """Two requests that take turns under one scope do not see each other."""
    a, b = tokens(1, length, seed=1), tokens(1, length, seed=2)
    chunks = [length - 3, 1, 1, 1]
    with headway.use(model, make()), torch.no_grad():
        alone = run_in_chunks(model, a, chunks), run_in_chunks(model, b, chunks)
        caches: list[object] = [None, None]
        logits: list[list[Tensor]] = [[], []]
        start = 0
        for chunk in chunks:
            for turn, ids in enumerate((a, b)):
                out = model(input_ids=ids[:, start : start + chunk], past_key_values=caches[turn], use_cache=True)
                caches[turn] = out.past_key_values
                logits[turn].append(out.logits)
            start += chunk
    for turn in (0, 1):
        torch.testing.assert_close(torch.cat(logits[turn], 1), alone[turn], atol=1e-5, rtol=0)


def check_batch(model: nn.Module, make: MakePolicy, *, length: int = 16, atol: float = 1e-4) -> None:
    """A batch of two gives what its rows give alone."""
    ids = tokens(2, length)
    chunks = [length - 3, 1, 1, 1]
    with headway.use(model, make()):
        both = run_in_chunks(model, ids, chunks)
        for row in (0, 1):
            alone = run_in_chunks(model, ids[row : row + 1], chunks)
            torch.testing.assert_close(both[row], alone[0], atol=atol, rtol=0)


def check_reorder_and_reset(model: nn.Module, make: MakePolicy, *, length: int = 14, atol: float = 1e-4) -> None:
    """Swapping the rows of a cache swaps what follows; a reset cache is as good as new; copies for beams agree."""
    ids, more = tokens(2, length), tokens(2, 2, seed=9)
    with headway.use(model, make()), torch.no_grad():
        straight = model(input_ids=ids.flip(0), use_cache=True).past_key_values
        expected = [model(input_ids=more[:, i : i + 1], past_key_values=straight).logits for i in (0, 1)]
        turned = model(input_ids=ids, use_cache=True).past_key_values
        turned.reorder_cache(torch.tensor([1, 0]))
        for i in (0, 1):
            got = model(input_ids=more[:, i : i + 1], past_key_values=turned).logits
            torch.testing.assert_close(got, expected[i], atol=atol, rtol=0)
        turned.reset()
        assert turned.get_seq_length() == 0
        again = model(input_ids=ids.flip(0), past_key_values=turned).past_key_values
        got = model(input_ids=more[:, :1], past_key_values=again).logits
        torch.testing.assert_close(got, expected[0], atol=atol, rtol=0)
        beams = model(input_ids=ids[:1], use_cache=True).past_key_values
        beams.batch_repeat_interleave(2)
        got = model(input_ids=more[:, :1], past_key_values=beams).logits
        one = model(input_ids=ids[:1], use_cache=True).past_key_values
        single = model(input_ids=more[:1, :1], past_key_values=one).logits
        torch.testing.assert_close(got[:1], single, atol=atol, rtol=0)


def check_lengths(model: nn.Module, make: MakePolicy, most: int, *, length: int = 24) -> None:
    """The logical length counts every token, the stored length never exceeds `most` after a forward."""
    ids = tokens(1, length)
    with headway.use(model, make()), torch.no_grad():
        cache, start = None, 0
        for chunk in [length - 8, 3, 1, 1, 1, 1, 1]:
            cache = model(
                input_ids=ids[:, start : start + chunk], past_key_values=cache, use_cache=True
            ).past_key_values
            start += chunk
            assert cache.get_seq_length() == start
            assert max(layer.stored for layer in cache.layers) <= most


def check_generate(model: nn.Module, make: MakePolicy, *, length: int = 12, new: int = 5) -> None:
    """Greedy `generate` equals a hand-made loop over the same policy, also in a second turn that goes on with the
    cache of the first; beam search runs."""
    ids, more = tokens(1, length), tokens(1, 4, seed=6)
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    with headway.use(model, make()), torch.no_grad():
        first = model.generate(ids, return_dict_in_generate=True, **options)
        turn = torch.cat([first.sequences, more], 1)
        second = model.generate(turn, past_key_values=first.past_key_values, **options)
        cache, step, produced = None, ids, []
        for number in range(2 * new):
            out = model(input_ids=step, past_key_values=cache, use_cache=True)
            out.logits[..., 2] = -torch.inf
            cache, step = out.past_key_values, out.logits[:, -1:].argmax(-1)
            produced.append(int(step))
            step = torch.cat([step, more], 1) if number == new - 1 else step
        beams = model.generate(ids, num_beams=2, **options)
    assert first.sequences[0, length:].tolist() == produced[:new]
    assert second[0, turn.shape[1] :].tolist() == produced[new:]
    assert beams.shape[1] == length + new


def check_refuses_crop(model: nn.Module, make: MakePolicy) -> None:
    """Taking tokens back, as assisted decoding does, is refused by name."""
    with headway.use(model, make()), torch.no_grad():
        cache = model(input_ids=tokens(1, 12), use_cache=True).past_key_values
        with pytest.raises(ArgumentError, match="take back"):
            cache.crop(-2)


def check_refuses_assisted_decoding(model: nn.Module, make: MakePolicy) -> None:
    """Assisted decoding takes tokens back as soon as a guess is wrong; the refusal says what to do."""
    ids = tokens(1, 6).repeat(1, 3)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    with headway.use(model, make()), pytest.raises(HeadwayError, match="without assisted decoding"):
        model.generate(ids, prompt_lookup_num_tokens=3, **options)


def check_static_cache(model: nn.Module, make: MakePolicy) -> None:
    """`generate` with a static cache, whose mask is one of pairs, gives what it gives without, also behind padding."""
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    for pads in ([0, 0], [0, 5]):
        ids, mask = padded_left(tokens(2, 16), pads)
        with headway.use(model, make()):
            plain = model.generate(ids, attention_mask=mask, **options)
            static = model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
        assert static.tolist() == plain.tolist(), pads


def check_refuses_gaps(model: nn.Module, make: MakePolicy) -> None:
    """A batch padded on the right is read as its rows are alone; to go on behind its pads is refused, for they would
    count among a row's last tokens."""
    ids, mask, count = tokens(2, 18), torch.ones(2, 18, dtype=torch.long), 11
    mask[1, count:] = 0
    step, longer = tokens(2, 1, seed=5), torch.cat([mask, torch.ones(2, 1, dtype=torch.long)], 1)
    with headway.use(model, make()), torch.no_grad():
        alone = model(input_ids=ids[1:, :count], use_cache=True).logits
        out = model(input_ids=ids, attention_mask=mask, use_cache=True)
        torch.testing.assert_close(out.logits[1, :count], alone[0], atol=1e-4, rtol=0)
        message = "attention_mask: got a token at column 18 of row 1 behind padding .* Pad on the left"
        with pytest.raises(ArgumentError, match=message):
            model(input_ids=step, attention_mask=longer, past_key_values=out.past_key_values)
        with pytest.raises(ArgumentError, match=message):
            model(input_ids=torch.cat([ids, step], 1), attention_mask=longer, use_cache=False)


def check_refuses_free_masks(model: nn.Module, make: MakePolicy) -> None:
    """A mask of pairs that hides more than padding and the future would stand over the wrong keys."""
    free = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    free[..., 5, 2] = False
    with headway.use(model, make()), torch.no_grad():
        for cached in (True, False):
            with pytest.raises(ArgumentError, match="attention_mask: got a mask of four dimensions"):
                model(input_ids=tokens(1, 8), attention_mask=free, use_cache=cached)


def check_refuses_blind_editors(model: nn.Module, make: MakePolicy) -> None:
    """Editors that read keys, values, masks or weights of whole calls are refused on attach, and both are named."""
    blind = [
        UniformHeads(heads=[(0, 0)]),
        ZeroValues(positions=[0]),
        SuppressBlocks(blocks=[((3, 9), (0, 2))]),
        FixedPattern(patterns={(0, 0): torch.eye(20)}),
    ]
    policy = make()
    for editor in blind:
        with pytest.raises(ConflictError, match=rf"{policy.title} and {editor.title}, which needs all keys"):
            headway.use(model, policy, editor).attach()
        with headway.use(model, policy), pytest.raises(ConflictError, match=editor.title):
            headway.use(model, editor).attach()
        with (
            headway.use(model, make(), editor, selftest=False),
            torch.no_grad(),
            pytest.raises(ConflictError, match=editor.title),
        ):
            model(input_ids=tokens(1, 12), use_cache=True)


def check_whole_model_only(model: nn.Module, make: MakePolicy) -> None:
    """A scope over some layers or sites is refused, also where the sites are not known before the first forward."""
    for options in ({"layers": [1]}, {"sites": ["*.0.*"]}):
        for selftest in (True, False):
            with pytest.raises(ConflictError, match="expected the whole model"):
                headway.use(model, make(), selftest=selftest, **options).attach()


#: What has nothing to do with a host's kind of attention: one host is enough.
ONCE = [
    check_refuses_assisted_decoding,
    check_static_cache,
    check_refuses_gaps,
    check_refuses_free_masks,
    check_refuses_blind_editors,
    check_whole_model_only,
]
