"""Titans: the four mixers against their equations, what must not be read, and every option under the contract."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load, save
from torch.nn.functional import linear, normalize

import headway
from headway.door import Observer
from headway.door.mixer import Mixer, State
from headway.errors import ArgumentError, NumericError
from headway.kernels.deep_memory import deep_memory
from headway.kernels.memory_net import MemoryState
from headway.kernels.rope import rope_frequencies, rotate
from headway.kernels.short_conv import short_conv
from headway.methods.layers.titans import CARD, MemoryOptions, TitansLMM, TitansMAC, TitansMAG, TitansMAL

ALL = (TitansLMM, TitansMAC, TitansMAG, TitansMAL)
TIGHT = {"rtol": 1e-8, "atol": 1e-9}


def make(cls: type[Mixer], **changes) -> Mixer:
    torch.manual_seed(0)
    mixer = cls.example(**changes).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return mixer


def tokens(count: int, seed: int = 1, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, count, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def fresh(mixer: Mixer, batch: int = 2) -> State:
    return mixer.init_state(batch, dtype=torch.float64)


def open_gate(mixer: TitansMAG | TitansMAC) -> None:
    """The gate of the join at exactly one, whatever the memory says."""
    with torch.no_grad():
        mixer.join.memory_norm.weight.zero_()
        mixer.join.bias.fill_(60.0)


def heads_of(x: torch.Tensor) -> torch.Tensor:
    return x.unflatten(-1, (2, 8)).transpose(1, 2)


def plain_attention(project: torch.nn.Linear, x: torch.Tensor, visible: torch.Tensor, positions: torch.Tensor):
    """Softmax attention with RoPE and a mask, written out; the heads side by side."""
    query, key, value = (heads_of(part) for part in linear(x, project.weight).chunk(3, -1))
    frequencies = rope_frequencies(8)
    query, key = (rotate(part, positions, frequencies) for part in (query, key))
    logits = torch.einsum("bhid,bhjd->bhij", query, key) / 8**0.5
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def test_card_names_the_paper():
    assert (CARD.slug, CARD.arxiv, CARD.family) == ("titans", "2501.00663", "layers")


class TestEquations:
    def test_queries_keys_and_values_are_those_of_the_paper(self):
        mixer, x = make(TitansLMM, depth=1, chunk=1), tokens(9)
        memory = mixer.memory
        mixed = torch.nn.functional.silu(short_conv(memory.project(x), memory.conv)[0])
        query, key, value = (heads_of(part) for part in mixed.chunk(3, -1))
        query, key = (normalize(part, dim=-1) for part in (query, key))
        net = memory.net
        said = deep_memory(query, key, value, memory.gates_of(x), net, chunk=1, mode="reference").output
        expected = said.transpose(1, 2).flatten(2)
        found = memory(x, position=torch.arange(9).expand(2, 9))[0]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)

    def test_mag_with_an_open_gate_is_sliding_window_attention(self):
        mixer, x = make(TitansMAG, persistent=0), tokens(17)
        open_gate(mixer)
        distance = torch.arange(17)[:, None] - torch.arange(17)
        visible = (distance >= 0) & (distance < 5)
        attended = plain_attention(mixer.attention.project, x, visible, torch.arange(17))
        torch.testing.assert_close(mixer(x)[0], mixer.out(mixer.join.attention_norm(attended)), **TIGHT)

    def test_mac_without_memory_and_persistent_tokens_is_attention_within_segments(self):
        mixer, x = make(TitansMAC, persistent=0, memory_tokens=0), tokens(19)
        open_gate(mixer)
        order = torch.arange(19)
        visible = (order[:, None] >= order) & (order[:, None] // 8 == order // 8)
        attended = plain_attention(mixer.segment.project, x, visible, order % 8)
        torch.testing.assert_close(mixer(x)[0], mixer.out(mixer.join.attention_norm(attended)), **TIGHT)

    def test_mac_is_ask_attend_learn_segment_by_segment(self):
        """Written out for one row with whole segments, without the module's own loop or state."""
        mixer, x = make(TitansMAC, persistent=2, memory_tokens=3), tokens(24, batch=1)
        memory, project = mixer.memory, mixer.segment.project
        written, outputs = [], []
        for number in range(3):
            piece = x[:, 8 * number : 8 * number + 8]
            state = memory.start(1, torch.float64)
            if written:
                past = torch.cat(written, 1)
                position = torch.arange(past.shape[1])[None]
                _, state = memory(past, position=position, seen=torch.zeros(1).long(), tensors=state, mode="step")
            weights = [state[f"weights.{layer}"] for layer in range(2)]
            asked = normalize(mixer.segment.queries, dim=-1)[None]
            answers = memory.net(weights, asked).transpose(1, 2).flatten(2)
            prefix = torch.cat([mixer.segment.persistent[None], answers], 1)
            written.append(self.attend(project, prefix, piece))
            whole = torch.cat(written, 1)
            read = memory(whole, position=torch.arange(whole.shape[1])[None], mode="reference")[0]
            outputs.append(mixer.out(mixer.join(written[-1], read[:, -8:])))
        torch.testing.assert_close(mixer(x)[0], torch.cat(outputs, 1), **TIGHT)

    @staticmethod
    def attend(project: torch.nn.Linear, prefix: torch.Tensor, piece: torch.Tensor) -> torch.Tensor:
        query, key, value = (heads_of(part) for part in project(piece).chunk(3, -1))
        _, first_key, first_value = (heads_of(part) for part in project(prefix).chunk(3, -1))
        turned, against = (rotate(part, torch.arange(8), rope_frequencies(8)) for part in (query, key))
        near = torch.einsum("bhid,bhjd->bhij", turned, against)
        near = near.masked_fill(~torch.ones(8, 8, dtype=torch.bool).tril(), -torch.inf)
        logits = torch.cat([torch.einsum("bhid,bhjd->bhij", query, first_key), near], -1) / 8**0.5
        return (logits.softmax(-1) @ torch.cat([first_value, value], 2)).transpose(1, 2).flatten(2)

    def test_mal_attends_to_what_the_memory_added(self):
        mixer, x = make(TitansMAL, persistent=0, window=4), tokens(11)
        read = mixer.memory(x, position=torch.arange(11).expand(2, 11), mode="reference")[0]
        below = mixer.norm(x + mixer.readout(x, read))
        distance = torch.arange(11)[:, None] - torch.arange(11)
        visible = (distance >= 0) & (distance < 4)
        attended = plain_attention(mixer.attention.project, below, visible, torch.arange(11))
        torch.testing.assert_close(mixer(x)[0], mixer.out(attended), **TIGHT)

    def test_joining_by_a_sum_adds_both_norms(self):
        mixer, x = make(TitansMAG, join="add"), tokens(9)
        position = torch.arange(9).expand(2, 9)
        attended = mixer.attention(x, position=position)[0]
        read = mixer.memory(x, position=position)[0]
        joined = mixer.join.attention_norm(attended) + mixer.join.memory_norm(read)
        torch.testing.assert_close(mixer(x)[0], mixer.out(joined), **TIGHT)

    @pytest.mark.parametrize(
        ("stability", "factor"), [("chunk", 0.25), ("momentum", 1.0), ("mean", 0.25), ("none", 1.0)]
    )
    def test_the_step_size_keeps_to_its_bound(self, stability, factor):
        memory = make(TitansLMM, stability=stability, step=3.0).memory
        gates = memory.gates_of(10 * tokens(200))
        slower = 1 - gates.eta if stability in ("chunk", "momentum") else torch.ones_like(gates.eta)
        bound = 3.0 * factor * slower
        assert bool((gates.theta <= bound * (1 + 1e-9)).all())
        assert float((gates.theta / bound)[slower > 0.01].max()) > 0.99

    def test_ablations_hold_their_gate_at_zero(self):
        gates = make(TitansLMM, momentum=False, forgetting=False).memory.gates_of(tokens(5))
        assert not gates.eta.any()
        assert not gates.alphas[0].any()

    def test_forgetting_by_channel_has_one_gate_per_output_of_each_layer(self):
        gates = make(TitansLMM, gate_granularity="channel").memory.gates_of(tokens(5))
        assert [a.shape for a in gates.alphas] == [(2, 2, 5, 16), (2, 2, 5, 8)]
        assert float(gates.alphas[0].std(-1).min()) > 0


VARIANTS = [
    (TitansLMM, {"gate_granularity": "channel"}),
    (TitansLMM, {"depth": 1, "chunk": 1, "read": "before"}),
    (TitansLMM, {"depth": 3, "conv": 1, "stability": "momentum", "clip": 1.0}),
    (TitansMAG, {"persistent": 0, "join": "add", "window": 1}),
    (TitansMAC, {"memory_query": "previous", "read": "before"}),
    (TitansMAC, {"memory_query": "self", "persistent": 0}),
    (TitansMAC, {"memory_tokens": 0, "segment": 4, "join": "add"}),
    (TitansMAL, {"depth": 1, "residual": True, "momentum": False}),
]


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
class TestOptionsKeepTheContract:
    def test_forms_splits_padding_and_packing_agree(self, cls, options):
        mixer, x = make(cls, **options), tokens(19)
        mask = torch.ones(2, 19, dtype=torch.bool)
        mask[0, [0, 1, 7, 12]] = False
        resets = torch.zeros(2, 19, dtype=torch.bool)
        resets[1, [5, 6, 14]] = True
        poisoned = torch.where(mask[..., None], x, torch.nan)
        expected = mixer(poisoned, mask=mask, resets=resets, mode="reference")[0]
        for mode in ("block", "step"):
            torch.testing.assert_close(mixer(poisoned, mask=mask, resets=resets, mode=mode)[0], expected, **TIGHT)
        alone = mixer(x[:1, mask[0]])[0]
        torch.testing.assert_close(expected[:1, mask[0]], alone, **TIGHT)
        for start, stop in itertools.pairwise((0, 5, 6, 14, 19)):
            torch.testing.assert_close(expected[1:, start:stop], mixer(x[1:, start:stop])[0], **TIGHT)
        state, parts = fresh(mixer), []
        for start, stop in itertools.pairwise((0, 3, 11, 12, 19)):
            piece = slice(start, stop)
            y, state = mixer(poisoned[:, piece], mask=mask[:, piece], resets=resets[:, piece], state=state)
            parts.append(y)
        torch.testing.assert_close(torch.cat(parts, 1), expected, **TIGHT)

    def test_state_is_of_constant_size(self, cls, options):
        mixer = make(cls, **options)
        sizes = {mixer(tokens(n), state=fresh(mixer))[1].bytes for n in (1, 16, 65)}
        assert sizes == {fresh(mixer).bytes}


class TestCausality:
    @pytest.mark.parametrize("query", ["learned", "previous", "self"])
    @pytest.mark.parametrize("changed", [3, 5, 10, 14])
    def test_nothing_within_a_segment_reads_ahead(self, query, changed):
        mixer, x = make(TitansMAC, memory_query=query), tokens(16)
        other = x.clone()
        other[:, changed] += 1.0
        before, after = mixer(x)[0], mixer(other)[0]
        torch.testing.assert_close(after[:, :changed], before[:, :changed], rtol=0, atol=1e-12)
        assert not torch.equal(after[:, changed], before[:, changed])

    def test_the_form_as_written_reads_ahead_within_the_segment_but_not_beyond(self):
        mixer, x = make(TitansMAC, causal=False), tokens(16)
        other = x.clone()
        other[:, 5] += 1.0
        moved = (mixer(other)[0] - mixer(x)[0]).abs().amax((0, 2)) > 1e-9
        assert bool(moved[:8].all())
        changed_late = x.clone()
        changed_late[:, 12] += 1.0
        torch.testing.assert_close(mixer(changed_late)[0][:, :8], mixer(x)[0][:, :8], **TIGHT)

    def test_the_form_as_written_has_no_state(self):
        mixer = make(TitansMAC, causal=False)
        with pytest.raises(ArgumentError, match="causal=False"):
            mixer(tokens(5), state=fresh(mixer))


class TestMemory:
    @pytest.mark.parametrize("cls", ALL)
    def test_every_parameter_is_learned(self, cls):
        mixer = make(cls)
        mixer(tokens(21))[0].square().sum().backward()
        for name, parameter in mixer.named_parameters():
            assert parameter.grad is not None, name
            assert bool(parameter.grad.abs().sum() > 0), name

    def test_what_is_learned_reaches_far_beyond_the_window(self):
        mixer, x = make(TitansMAG, window=3, persistent=0), tokens(40)
        other = x.clone()
        other[:, 0] += 1.0
        assert float((mixer(other)[0] - mixer(x)[0])[:, -1].abs().max()) > 1e-7

    def test_persistent_tokens_are_no_state(self):
        few, many = (make(TitansMAG, persistent=count) for count in (0, 8))
        assert fresh(few).bytes == fresh(many).bytes

    def test_a_state_can_be_saved_and_taken_up_again(self):
        mixer, x = make(TitansMAC), tokens(13)
        _, state = mixer(x, state=fresh(mixer))
        save({**fresh(mixer).detach().tensors})
        loaded = load(save({**state.detach().tensors, "seen": state.seen}))
        again = State({k: v for k, v in loaded.items() if k != "seen"}, loaded["seen"])
        torch.testing.assert_close(mixer(tokens(5), state=again)[0], mixer(tokens(5), state=state)[0], **TIGHT)

    @pytest.mark.parametrize("cls", ALL)
    def test_half_precision_models_learn_in_float32(self, cls):
        mixer = make(cls).to(torch.bfloat16)
        _, state = mixer(tokens(9).bfloat16(), state=mixer.init_state(2, dtype=torch.bfloat16))
        assert state.tensors["memory.weights.0"].dtype == torch.float32

    def test_the_memory_is_asked_in_float32_under_autocast(self):
        """Attention may be narrowed, what the memory says to the same queries not."""
        memory, asked = make(TitansMAC).float().memory, heads_of(tokens(6).float())
        weights = tuple(w[None].expand(2, -1, -1, -1) for w in memory.weights)
        expected = memory.retrieve(weights, asked)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(memory.retrieve(weights, asked), expected)

    @pytest.mark.parametrize("cls", ALL)
    def test_reading_updates_the_memory_without_a_graph(self, cls):
        mixer, x = make(cls), tokens(9)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                y, state = mixer(x, state=fresh(mixer))
            torch.testing.assert_close(y, mixer(x)[0].detach(), **TIGHT)
            assert not torch.equal(state.tensors["memory.weights.0"][0], mixer.memory.weights[0])

    def test_a_text_shorter_than_a_chunk_is_read_and_written(self):
        mixer, x = make(TitansLMM, chunk=64), tokens(3)
        other = x.clone()
        other[:, 0] += 1.0
        assert not torch.allclose(mixer(other)[0][:, 2], mixer(x)[0][:, 2])
        assert MemoryOptions().chunk == 16

    def test_what_is_not_finite_names_the_layer(self):
        mixer = make(TitansLMM, stability="none", step=1e200, layer=1, layers=2)
        with pytest.raises(NumericError, match="titans_lmm, layer 1: got NaN or infinity in chunk"):
            mixer(tokens(64))


class TestInspection:
    @pytest.mark.parametrize("cls", ALL)
    def test_surprise_and_gates_of_each_token_are_shown(self, cls):
        mixer, x = make(cls), tokens(21)
        mask = torch.ones(2, 21, dtype=torch.bool)
        mask[0, :6] = False
        shown = mixer.inspect(x, mask=mask)
        for part in shown.tensors():
            assert part.shape == (2, 2, 21)
            assert not part[0, :, :6].any()
            assert bool((part[:, :, 6:] > 0).all())
        alone = mixer.inspect(x[:1, 6:])
        for part, single in zip(shown.tensors(), alone.tensors(), strict=True):
            torch.testing.assert_close(part[:1, :, 6:], single, **TIGHT)

    @pytest.mark.parametrize("cls", ALL)
    def test_no_tokens_show_nothing(self, cls):
        assert [part.shape for part in make(cls).inspect(tokens(0)).tensors()] == [(2, 2, 0)] * 5

    def test_gates_are_those_of_the_memory(self):
        mixer, x = make(TitansLMM), tokens(7)
        gates, shown = mixer.memory.gates_of(x), mixer.inspect(x)
        torch.testing.assert_close(shown.theta, gates.theta)
        torch.testing.assert_close(shown.eta, gates.eta)
        torch.testing.assert_close(shown.alpha, gates.alphas[0])

    def test_a_repeated_token_surprises_less(self):
        mixer = make(TitansLMM, depth=1, forgetting=False)
        x = tokens(1).expand(2, 40, 16)
        surprise = mixer.inspect(x).surprise
        assert bool((surprise[..., -1] < 0.5 * surprise[..., 4]).all())


class _Shapes(Observer):
    def start(self):
        self.seen = []

    def observe(self, call, output, lse=None):
        rows = call.weights()
        self.seen.append((call.queries, call.keys, float((rows.sum(-1) - 1).abs().max())))

    def result(self):
        return self.seen


@pytest.mark.parametrize(("cls", "calls"), [(TitansMAG, 1), (TitansMAL, 1), (TitansMAC, 3)])
def test_attention_passes_the_door_and_is_not_changed_by_it(cls, calls):
    from headway.models import HeadwayConfig, HeadwayForCausalLM

    torch.manual_seed(0)
    options = {"chunk": 4, "persistent": 2, **({"segment": 8} if cls is TitansMAC else {"window": 5})}
    config = HeadwayConfig(vocab_size=32, width=16, layers=1, heads=2, mixer=cls.slug, mixer_options=options)
    model = HeadwayForCausalLM(config).eval()
    ids = torch.arange(20)[None]
    expected = model(input_ids=ids).logits
    watcher = _Shapes()
    with headway.observe(model, watcher), torch.no_grad():
        found = model(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert len(watcher.result()) == calls
    assert all(error < 1e-5 for _, _, error in watcher.result())


@pytest.mark.parametrize("cls", ALL)
def test_a_model_of_it_generates_with_padding_as_without(cls):
    from headway.models import HeadwayConfig, HeadwayForCausalLM

    torch.manual_seed(0)
    config = HeadwayConfig(vocab_size=32, width=16, layers=2, heads=2, mixer=cls.slug, mixer_options={"chunk": 4})
    model = HeadwayForCausalLM(config).eval()
    ids = torch.randint(3, 32, (1, 7), generator=torch.Generator().manual_seed(0))
    alone = model.generate(ids, max_new_tokens=6, do_sample=False)
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(10) >= 3).long()[None]
    both = model.generate(padded, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert both[0, 3:].tolist() == alone[0].tolist()


class TestBadInput:
    def test_a_chunk_that_does_not_divide_the_segment_is_named_with_it(self):
        with pytest.raises(ArgumentError, match="segment, chunk: got 10 and 4"):
            TitansMAC.example(segment=10)

    @pytest.mark.parametrize("cls", [TitansMAG, TitansMAL])
    def test_a_window_below_one_is_refused(self, cls):
        with pytest.raises(ArgumentError, match="window: got 0"):
            cls.example(window=0)

    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("depth", 0),
            ("chunk", 0),
            ("conv", 0),
            ("expansion", 0.0),
            ("step", -1.0),
            ("clip", 0.0),
            ("gate_granularity", "head"),
            ("read", "during"),
            ("stability", "chunks"),
        ],
    )
    def test_options_of_the_memory_are_checked(self, option, value):
        with pytest.raises(ArgumentError, match=f"{option}: got"):
            TitansLMM.example(**{option: value})

    def test_options_of_the_mixers_are_checked(self):
        with pytest.raises(ArgumentError, match="join: got 'sum'"):
            TitansMAG.example(join="sum")
        with pytest.raises(ArgumentError, match="memory_query: got 'next'"):
            TitansMAC.example(memory_query="next")
        with pytest.raises(ArgumentError, match="persistent: got -1"):
            TitansMAC.example(persistent=-1)
        with pytest.raises(ArgumentError, match="memory_tokens: got -1"):
            TitansMAC.example(memory_tokens=-1)
        with pytest.raises(ArgumentError, match="persistent: got -2"):
            TitansMAG.example(persistent=-2)


def test_the_memory_state_can_be_looked_at():
    mixer = make(TitansLMM)
    _, state = mixer(tokens(6), state=fresh(mixer))
    from headway.methods.layers.titans.memory import unpack

    inside = {name.removeprefix("memory."): t for name, t in state.tensors.items()}
    memory = unpack(inside, state.seen)
    assert isinstance(memory, MemoryState)
    assert memory.seen.tolist() == [6, 6]
    assert not memory.inputs[0][:, :, 2:].any(), "slots that are not filled hold nothing"
