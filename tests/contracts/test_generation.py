"""Every method under `generate`: streams, beams, drafts, requests that take turns, and compiled models.

What a method refuses stands in `refusals`; everything else has to write what the same method writes step by step.
"""

from __future__ import annotations

from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import headway
from headway.door.stages import Driver
from headway.errors import InterceptionError
from headway.methods.budget import stages_at_budget
from headway.tasks.answering import copy_cache
from tests.contracts import methods as contract
from tests.contracts.methods import SLUGS, TOKENS, host, read, stages, tokens
from tests.contracts.refusals import as_listed

METHOD = pytest.mark.parametrize("slug", SLUGS)
FAMILY = pytest.mark.parametrize("name", contract.FAMILIES)
PROMPT, NEW = 80, 6
GENERATE = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


class Heard:
    """A streamer that keeps what it is given, and may do something else in between."""

    def __init__(self, between=None) -> None:
        self.ids: list[int] = []
        self.ended = False
        self.between = between

    def put(self, value) -> None:
        self.ids += value.flatten().tolist()
        if self.between is not None:
            self.between()

    def end(self) -> None:
        self.ended = True


def acting(slug, name, share=0.5):
    return stages(slug, name, share, PROMPT)


def drives(slug) -> bool:
    """Whether a method stands in front of `generate`, so that steps by hand say nothing of it."""
    return contract.acts_on(acting(slug, "llama"), Driver)


@torch.no_grad()
def by_hand(model, ids, steps=NEW) -> list[int]:
    """Greedy tokens from forwards alone."""
    cache, step, found = None, ids, []
    for _ in range(steps):
        out = model(input_ids=step, past_key_values=cache, use_cache=True)
        logits = out.logits[:, -1].clone()
        logits[:, 2] = -torch.inf
        cache, step = out.past_key_values, logits.argmax(-1, keepdim=True)
        found.append(int(step))
    return found


@METHOD
@FAMILY
def test_a_streamed_greedy_answer_is_that_of_steps_by_hand(slug, name):
    """At share 1 it is the host's own."""
    model, ids = host(name), tokens(length=PROMPT)
    native = model.generate(ids, **GENERATE)
    with as_listed(slug, "share 1", name), headway.use(model, *acting(slug, name, 1.0)):
        assert model.generate(ids, **GENERATE).tolist() == native.tolist()
    heard = Heard()
    with as_listed(slug, "share 0.5", name), headway.use(model, *acting(slug, name)):
        got = model.generate(ids, streamer=heard, **GENERATE)[0].tolist()
        assert heard.ended
        assert heard.ids[-NEW:] == got[-NEW:]
        assert got[:PROMPT] == ids[0].tolist()
        if not drives(slug):
            assert got[PROMPT:] == by_hand(model, ids)


@METHOD
@FAMILY
def test_beams_at_share_one_are_the_hosts_own(slug, name):
    model, ids = host(name), tokens(2, length=PROMPT)
    options = GENERATE | {"num_beams": 3}
    native = model.generate(ids, **options)
    with as_listed(slug, "beams", name), headway.use(model, *acting(slug, name, 1.0)):
        assert model.generate(ids, **options).tolist() == native.tolist()


def beams_apart(model, scope_of, ids, prompt=PROMPT):
    """Score of every beam of a search, and what its tokens score read alone, step by step, under the same methods."""
    options = GENERATE | {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0}
    with scope_of():
        found = model.generate(ids, output_scores=True, return_dict_in_generate=True, **options)
        alone = []
        for beam in found.sequences:
            logits = read(model, beam[None, :-1], [prompt] + [1] * (NEW - 1))[0, prompt - 1 :]
            alone.append(float(logits.log_softmax(-1).gather(-1, beam[prompt:, None]).sum()))
    return found.sequences, found.sequences_scores.tolist(), alone


@METHOD
@FAMILY
def test_each_beam_scores_what_it_scores_alone(slug, name):
    """Below the full budget every beam has dropped other keys: its cache has to have followed it."""
    model, ids = host(name), tokens(length=PROMPT)
    if drives(slug):
        with as_listed(slug, "share 0.5", name), headway.use(model, *acting(slug, name)):
            beams = model.generate(ids, **GENERATE | {"num_beams": 3, "num_return_sequences": 3})
            assert len({tuple(beam) for beam in beams.tolist()}) == 3
            assert model.generate(ids, **GENERATE | {"num_beams": 3}).tolist() == beams[:1].tolist()
        return
    with as_listed(slug, "share 0.5", name):
        beams, scores, alone = beams_apart(model, lambda: headway.use(model, *acting(slug, name)), ids)
        assert len({tuple(beam) for beam in beams.tolist()}) == 3
        assert scores == pytest.approx(alone, abs=1e-3)


@METHOD
@FAMILY
def test_what_is_remembered_of_rows_follows_their_order(slug, name):
    model, ids, order = host(name), tokens(3, length=PROMPT), torch.tensor([2, 0, 0])
    more = tokens(3, length=2, seed=9)
    with as_listed(slug, "share 0.5", name), headway.use(model, *acting(slug, name)), torch.no_grad():
        found = []
        for rows, turn in ((ids[order], None), (ids, order), (ids, None)):
            cache, logits = model(input_ids=rows, use_cache=True).past_key_values, []
            if turn is not None:
                cache.reorder_cache(turn)
            for at in (0, 1):
                out = model(input_ids=more[:, at : at + 1], past_key_values=cache, use_cache=True)
                logits.append(out.logits)
            found.append(torch.cat(logits, 1))
        contract.close(found[1], found[0], "reordered")
        assert not torch.allclose(found[2], found[0], atol=1e-2)


@METHOD
@FAMILY
def test_copies_of_a_prefix_go_on_apart(slug, name):
    """As prompts with one beginning share its cache: each copy is as good as a prefill of its own, whatever is read
    from the other in between."""
    model, prefix = host(name), tokens(length=PROMPT)
    ends = [tokens(length=5, seed=seed) for seed in (3, 4)]
    with as_listed(slug, "share 0.5", name), headway.use(model, *acting(slug, name)), torch.no_grad():
        alone = [read(model, torch.cat([prefix, end], 1), [PROMPT, 3, 1, 1])[:, PROMPT:] for end in ends]
        first = model(input_ids=prefix, use_cache=True).past_key_values
        caches, logits = [first, copy_cache(first, model)], [[], []]
        for chunk in ((0, 3), (3, 4), (4, 5)):
            for turn, end in enumerate(ends):
                out = model(input_ids=end[:, slice(*chunk)], past_key_values=caches[turn], use_cache=True)
                caches[turn] = out.past_key_values
                logits[turn].append(out.logits)
        for turn in (0, 1):
            contract.close(torch.cat(logits[turn], 1), alone[turn], f"copy {turn}", share=1e-5)


@contextmanager
def drafting(draft):
    """Assisted decoding with the drafts that a function of the tokens so far gives."""

    def candidates(self, input_ids, *args, **kwargs):
        room = PROMPT + 2 * NEW - 1 - input_ids.shape[1]
        guess = draft(input_ids.shape[1])[: max(room, 0)]
        return torch.cat([input_ids, torch.tensor([guess], dtype=torch.long)], 1), None

    with mock.patch.object(PromptLookupCandidateGenerator, "get_candidates", candidates):
        yield


@METHOD
@FAMILY
@pytest.mark.parametrize("drafts", ["right drafts", "wrong drafts"])
def test_drafts_change_no_text_or_are_refused(slug, name, drafts):
    """Right drafts are read several in one forward; wrong ones have to be taken back."""
    model, ids = host(name), tokens(length=PROMPT)
    options = GENERATE | {"max_new_tokens": 2 * NEW, "min_new_tokens": 2 * NEW}
    with as_listed(slug, drafts, name), headway.use(model, *acting(slug, name)):
        greedy = model.generate(ids, **options)[0].tolist()

        def draft(start):
            known = greedy[start : start + 3]
            return known if drafts == "right drafts" else [*known[:1], *((token + 1) % 90 + 8 for token in known[1:])]

        with drafting(draft):
            assert model.generate(ids, prompt_lookup_num_tokens=3, **options)[0].tolist() == greedy


@METHOD
@FAMILY
def test_a_request_that_takes_turns_with_generate_is_alone(slug, name):
    """Between any two tokens of one answer a token of another request is read, by the same scope."""
    model, ids, other = host(name), tokens(length=PROMPT, seed=1), tokens(length=PROMPT, seed=2)
    with as_listed(slug, "share 0.5", name), headway.use(model, *acting(slug, name)):
        answer = model.generate(ids, **GENERATE).tolist()
        chunks = [PROMPT - 4, 1, 1, 1, 1]
        alone = read(model, other, chunks)
        state = {"cache": None, "start": 0, "logits": []}

        def step():
            chunk = chunks[len(state["logits"])] if len(state["logits"]) < len(chunks) else 0
            if not chunk:
                return
            with torch.no_grad():
                out = model(
                    input_ids=other[:, state["start"] : state["start"] + chunk],
                    past_key_values=state["cache"],
                    use_cache=True,
                )
            state["cache"], state["start"] = out.past_key_values, state["start"] + chunk
            state["logits"].append(out.logits)

        heard = Heard(step)
        assert model.generate(ids, streamer=heard, **GENERATE).tolist() == answer
        assert len(state["logits"]) == len(chunks)
        contract.close(torch.cat(state["logits"], 1), alone, "taking turns", share=1e-5)


@METHOD
@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_a_compiled_model_is_refused(slug, how):
    model = contract.fresh("llama")
    acts = stages_at_budget(slug, 0.5, tokens=TOKENS, model=model)
    compiled = contract.compiled(model, how)
    with pytest.raises(InterceptionError, match="compiled"):
        headway.use(compiled, *acts).attach()


@pytest.mark.parametrize("how", ["wrapped", "in place", "forward"])
def test_a_model_that_is_compiled_while_a_scope_is_open_is_refused(how):
    """Whatever is attached: a trace would go on with the first forward's caches and positions."""
    model, ids = contract.fresh("llama"), tokens(length=32)
    with headway.use(model, *stages("streaming-llm", "llama", 0.3, 32)):
        compiled = contract.compiled(model, how, backend="eager")
        with pytest.raises(InterceptionError, match="compiled model while a scope is open"):
            read(compiled, ids, [32])
