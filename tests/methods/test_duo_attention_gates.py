"""Gates of DuoAttention: how they are learned, scored, ranked and kept, against definitions and planted heads."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.contracts import cache_policy as contract
from tests.door.hosts import CAUSAL, decoder

import headway
from headway.door import Editor
from headway.door.stages import PHASES
from headway.errors import ArgumentError, HostError, NumericError
from headway.hosts.tiny import tiny_host
from headway.kernels.rope import rope_frequencies
from headway.methods.long_context.duo_attention import (
    DuoAttention,
    GateMix,
    Gates,
    GateSample,
    PasskeyData,
    learn_gates,
    mixed_loss,
    rate_factor,
    retrieval_count,
    rope_profile,
    score_heads,
    select_heads,
)
from headway.methods.long_context.duo_attention.passkeys import WORDS

S, R = 2, 5


class Characters:
    """One token per character."""

    chat_template = None

    def __call__(self, text, **_):
        return {"input_ids": [8 + ord(c) % 128 for c in text]}

    def decode(self, ids):
        return "".join(chr(i - 8) for i in ids)


TEXT = "So it goes on, and the river runs slow under the hill. " * 40


def data(**options) -> PasskeyData:
    given = {"tokenizer": Characters(), "text": TEXT, "lengths": (600, 700), "passkeys": 3, "words": 4}
    return PasskeyData(**given | options)


def sample(tokens: int = 20, seed: int = 0) -> GateSample:
    rows = torch.zeros(tokens, dtype=torch.bool)
    rows[-6:] = True
    return GateSample(contract.tokens(1, tokens, seed=seed), rows)


def loss_at(model, alpha, given, **options):
    """Both parts of the loss, and their gradient."""
    gates = alpha.clone().requires_grad_()
    mix = GateMix(gates, sinks=S, recent=R, **options)
    with headway.use(model, mix):
        distill, cost = mixed_loss(model, mix, given, 0.05)
        gradient = torch.autograd.grad(distill + cost, gates)[0]
    return distill.detach(), cost.detach(), gradient


@pytest.mark.parametrize("teacher_full", [True, False])
@pytest.mark.parametrize(
    "name", ["llama", "multi-query", "mistral sliding", "gemma2 soft cap", "gpt-oss learned sinks"]
)
def test_open_gates_are_the_teacher_and_their_gradient_is_the_penalty(name, teacher_full):
    model = CAUSAL[name]()
    heads = model.config.num_key_value_heads
    alpha = torch.ones(3, heads)
    distill, cost, gradient = loss_at(model, alpha, sample(), teacher_full=teacher_full)
    assert float(distill) < 1e-9
    assert float(cost) == pytest.approx(0.05)
    torch.testing.assert_close(gradient, torch.full((3, heads), 0.05 / (3 * heads)), atol=1e-4, rtol=0)


def test_closed_gates_are_streaming_heads():
    """α = 0 everywhere is the policy with every head streaming; the training window counts the token itself."""
    model = decoder("Llama")
    given = sample()
    distill, cost, _ = loss_at(model, torch.zeros(3, 2), given)
    policy = DuoAttention(gates=torch.zeros(3, 2), sparsity=1.0, sinks=S, recent=R - 1)
    with torch.no_grad():
        teacher = model.model(input_ids=given.ids, use_cache=False).last_hidden_state
        with headway.use(model, policy):
            student = model.model(input_ids=given.ids, use_cache=False).last_hidden_state
    want = (teacher - student)[:, given.supervised].square().mean()
    torch.testing.assert_close(distill, want, atol=1e-5, rtol=1e-4)
    assert float(cost) == 0


@pytest.mark.parametrize("teacher_full", [True, False])
def test_the_mixture_is_its_equation(teacher_full):
    """Every layer by hand: the teacher's full output in the one form, the student's own in the other."""
    model = decoder("Llama", num_hidden_layers=2)
    alpha = torch.tensor([[0.3, 0.8], [0.6, 0.1]])
    given = sample()
    distill, _, _ = loss_at(model, alpha, given, teacher_full=teacher_full)
    full: dict[int, torch.Tensor] = {}
    rows, columns = torch.arange(20)[:, None], torch.arange(20)[None]
    near = (columns <= rows) & ((columns < S) | (rows - columns < R))

    class Teach(Editor):
        def edit_output(self, call, output, lse):
            full[call.site.layer] = output.clone()
            return output

    class Mix(Editor):
        def edit_output(self, call, output, lse):
            weights = call.logits().masked_fill(~near, -torch.inf).softmax(-1)
            stream = weights @ call.value.repeat_interleave(call.groups, 1)
            gate = alpha[call.site.layer].repeat_interleave(2)[:, None, None]
            return gate * (full[call.site.layer] if teacher_full else output) + (1 - gate) * stream

    with torch.no_grad():
        with headway.use(model, Teach()):
            wanted = model.model(input_ids=given.ids, use_cache=False).last_hidden_state
        with headway.use(model, Mix()):
            got = model.model(input_ids=given.ids, use_cache=False).last_hidden_state
    want = (wanted - got)[:, given.supervised].square().mean()
    torch.testing.assert_close(distill, want, atol=1e-6, rtol=1e-4)
    assert float(distill) > 1e-3


def test_both_teachers_differ():
    model = decoder("Llama")
    alpha = torch.full((3, 2), 0.5)
    one, two = (loss_at(model, alpha, sample(), teacher_full=form)[0] for form in (True, False))
    assert abs(float(one - two)) > 1e-3


@pytest.mark.parametrize("teacher_full", [True, False])
def test_the_gradient_is_that_of_the_loss(teacher_full):
    model = decoder("Llama").double()
    alpha = torch.tensor([[0.3, 0.8], [0.6, 0.1], [0.5, 0.9]], dtype=torch.float64)
    _, _, gradient = loss_at(model, alpha, sample(), teacher_full=teacher_full)
    for place in ((0, 0), (1, 1), (2, 0)):
        step = torch.zeros_like(alpha)
        step[place] = 1e-4
        ahead, behind = (sum(loss_at(model, alpha + s, sample(), teacher_full=teacher_full)[:2]) for s in (step, -step))
        # mixed_loss compares states in float32, which bounds the difference quotient.
        assert float(gradient[place]) == pytest.approx(float(ahead - behind) / 2e-4, rel=0.05, abs=2e-3)


def test_gates_never_leave_their_range_and_the_model_is_given_back():
    model = decoder("Llama").train()
    model.lm_head.weight.requires_grad_(False)
    seen = []
    found = learn_gates(
        model, lambda step: sample(seed=step), steps=25, sinks=S, recent=R, learning_rate=0.3, penalty=2.0,
        report=lambda step, distill, penalty: seen.append((step, distill, penalty)),
    )  # fmt: skip
    assert float(found.gates.values.min()) >= 0
    assert float(found.gates.values.max()) <= 1
    assert [x[0] for x in seen] == list(range(25))
    assert [x[1] for x in seen] == found.distill
    assert all(0 <= x <= 2.0 for x in found.penalty)
    assert model.training
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen == ["lm_head.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert found.gates.source["how"] == "learned"
    found.gates.check(model)


def test_an_interrupted_run_goes_on_where_it_stood(tmp_path):
    model = decoder("Llama")
    options = {"steps": 10, "sinks": S, "recent": R, "learning_rate": 0.1}
    whole = learn_gates(model, lambda step: sample(seed=step), **options)
    path = tmp_path / "run.json"

    def stop(step, distill, penalty):
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn_gates(model, lambda step: sample(seed=step), keep=path, report=stop, **options)
    assert json.loads(path.read_text())["step"] == 5
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ArgumentError, match="keep: got"):
        learn_gates(model, lambda step: sample(seed=step), keep=path, **options | {"penalty": 0.5})
    with pytest.raises(HostError, match="made on another model"):
        learn_gates(decoder_with_other_weights(), lambda step: sample(seed=step), keep=path, **options)
    again = learn_gates(model, lambda step: sample(seed=step), keep=path, **options)
    torch.testing.assert_close(again.gates.values, whole.gates.values, atol=1e-6, rtol=0)
    assert again.distill == pytest.approx(whole.distill, abs=1e-6)
    assert not path.exists()


def test_a_file_that_is_no_run_is_neither_read_nor_removed(tmp_path):
    """The gates that an earlier run saved, say."""
    model, path = decoder("Llama"), tmp_path / "gates.json"
    Gates.of(model, torch.rand(3, 2)).save(path)
    before = path.read_text()
    with pytest.raises(ArgumentError, match=r"keep: got .*gates\.json, which is no run of learn_gates"):
        learn_gates(model, lambda step: sample(), steps=1, keep=path)
    assert path.read_text() == before


def test_planted_retrieval_heads_get_the_highest_gates():
    from headway.evidence.recipes import _planted_retrieval as planted

    model = planted.planted_model(7)

    def lookups(step):
        found = planted.lookup(500 + step)
        rows = torch.zeros(found.ids.shape[1], dtype=torch.bool)
        rows[found.rows] = True
        return GateSample(found.ids, rows)

    learned = learn_gates(model, lookups, steps=30, sinks=4, recent=32, learning_rate=0.1).gates
    chosen = select_heads(learned, threshold=0.5)
    assert {tuple(x) for x in chosen.nonzero().tolist()} == set(planted.planted_heads(7))


def test_the_rate_ramps_over_a_fifth_at_both_ends():
    assert [rate_factor(step, 100) for step in (0, 1, 9, 19, 50, 80, 90, 98, 99)] == pytest.approx(
        [0.1, 0.1, 0.5, 1.0, 1.0, 1.0, 0.5, 0.1, 0.1]
    )


def test_learning_says_what_is_wrong():
    model = decoder("Llama")
    for options in ({"steps": 0}, {"recent": 0}, {"sinks": -1}, {"learning_rate": 0.0}, {"penalty": -1.0}):
        with pytest.raises(ArgumentError, match="steps, sinks, recent"):
            learn_gates(model, lambda step: sample(), **{"steps": 1} | options)
    with pytest.raises(HostError, match="latent attention"):
        learn_gates(tiny_host("deepseek_v3")[0], lambda step: sample(), steps=1)
    broken = decoder("Llama")
    with torch.no_grad():
        broken.model.norm.weight.fill_(torch.inf)
    with pytest.raises(NumericError, match="loss at step 0"):
        learn_gates(broken, lambda step: sample(), steps=1)
    with pytest.raises(ArgumentError, match="supervised: got shape"):
        GateSample(contract.tokens(1, 6), torch.zeros(6, dtype=torch.bool))


# Generated data.


def test_every_pass_key_stands_once_in_the_haystack_and_once_in_its_answer():
    made = data()(0)
    text = Characters().decode(made.ids[0].tolist())
    cut = text.index("What is the first")
    for ordinal in ("first", "second", "third"):
        key = text.split(f"The {ordinal} pass-key is: ")[1].split(".")[0]
        words = key.split(" ")
        assert len(words) == 4
        assert all(word in WORDS for word in words)
        assert text[:cut].count(key) == 1
        assert text[cut:].count(f"The {ordinal} pass-key is: {key}") == 1
    places = [text.index(f"Remember this. The {o}") / cut for o in ("first", "second", "third")]
    assert places == sorted(places)
    assert places[0] > 0.02


def test_samples_have_their_length_and_are_the_same_again():
    made = [data()(step) for step in range(6)]
    assert all(x.ids.shape[1] % 16 == 0 for x in made)
    starts = {int(x.supervised.nonzero()[0]) // 100 for x in made}
    assert starts <= {6, 7}
    assert torch.equal(data()(3).ids, made[3].ids)
    assert not torch.equal(data(seed=1)(3).ids, made[3].ids)


class Opened(Characters):
    """The same with a token in front of every text."""

    bos_token_id = 3

    def __call__(self, text, add_special_tokens=True, **_):
        return {"input_ids": [3] * add_special_tokens + super().__call__(text)["input_ids"]}


def test_the_opening_token_counts_in_the_multiple_and_stands_once():
    for step in range(4):
        ids = data(tokenizer=Opened())(step).ids[0]
        assert ids.numel() % 16 == 0
        assert (ids == 3).nonzero()[:, 0].tolist() == [0]


def test_depths_differ_are_in_order_and_cover_the_range():
    """Where keys stand among the haystack alone, as shares of it: three different ones per sample, 0.05 to 0.95."""
    found = []
    for step in range(60):
        made = data()(step)
        text = Characters().decode(made.ids[0, : int(made.supervised.nonzero()[0])].tolist())
        needles = re.findall(r"\nRemember this\. The \w+ pass-key is: [^.]*\.\n", text)
        room = len(text) - sum(map(len, needles))
        places = [text.index(needle) - sum(map(len, needles[:i])) for i, needle in enumerate(needles)]
        assert len(needles) == 3
        assert places == sorted(places)
        found += [place / room for place in places]
    assert min(found) >= 0.04
    assert max(found) <= 0.96
    assert min(found) < 0.1
    assert max(found) > 0.9


def test_supervised_rows_are_the_suffix_or_those_that_predict_answers():
    suffix, answers = (data(supervise=name)(1) for name in ("suffix", "answers"))
    ids = suffix.ids[0]
    start = int(suffix.supervised.nonzero()[0])
    assert bool(suffix.supervised[start:].all())
    assert not bool(answers.supervised[:start].any())
    text = Characters().decode(ids.tolist())
    predicted = "".join(text[int(row) + 1] for row in answers.supervised.nonzero()[:, 0])
    keys = [text.split(f"The {o} pass-key is: ")[1].split(".")[0] for o in ("first", "second", "third")]
    assert predicted == "".join(f" {key}" for key in keys)


def test_bad_data_is_refused():
    for options, message in [
        ({"supervise": "all"}, "supervise"),
        ({"passkeys": 11}, "passkeys, words"),
        ({"words": 0}, "passkeys, words"),
        ({"depths": (0.9, 0.1)}, "depths"),
        ({"lengths": (100,)}, "lengths: got 100"),
        ({"text": ""}, "empty text"),
    ]:
        with pytest.raises(ArgumentError, match=message):
            data(**options)(0)


# Choice of heads.


@settings(max_examples=60, deadline=None)
@given(layers=st.integers(1, 6), kv_heads=st.integers(1, 8), sparsity=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_the_choice_is_the_released_quantile_for_different_gates(layers, kv_heads, sparsity, seed):
    gates = np.random.default_rng(seed).permutation(layers * kv_heads).reshape(layers, kv_heads) / (layers * kv_heads)
    chosen = select_heads(torch.tensor(gates), sparsity=sparsity)
    position = sparsity * (gates.size - 1)
    if abs(position - round(position)) > 1e-6:
        assert chosen.tolist() == (gates >= np.quantile(gates, sparsity)).tolist()
    assert int(chosen.sum()) == retrieval_count(gates.size, sparsity)


def test_counts_at_known_shares():
    assert retrieval_count(21, 0.5) == 11
    assert [retrieval_count(8, s) for s in (0, 0.25, 0.5, 0.75, 1)] == [8, 6, 4, 2, 0]
    assert retrieval_count(11, 0.1) == 10
    with pytest.raises(ArgumentError, match=r"sparsity: got 1\.5"):
        retrieval_count(8, 1.5)


def test_ties_go_by_layer_and_head():
    assert select_heads(torch.ones(2, 3), sparsity=0.5).tolist() == [[True, True, True], [False, False, False]]
    gates = torch.tensor([[0.5, 1.0, 0.5], [1.0, 0.5, 0.2]])
    assert select_heads(gates, sparsity=0.5).tolist() == [[True, True, False], [True, False, False]]


# Files.


def test_gates_come_back_from_their_file(tmp_path):
    model = decoder("Llama")
    gates = Gates.of(model, torch.rand(3, 2), how="tried")
    again = Gates.load(gates.save(tmp_path / "gates.json"))
    torch.testing.assert_close(again.values, gates.values, atol=1e-6, rtol=0)
    assert again.made_on == gates.made_on
    assert again.source == {"how": "tried"}
    again.check(model)
    again.check(decoder("Llama").to(torch.bfloat16))


def test_gates_of_another_model_are_refused():
    gates = Gates.of(decoder("Llama"), torch.rand(3, 2))
    with pytest.raises(HostError, match="weights: other numbers"):
        gates.check(decoder_with_other_weights())
    with pytest.raises(HostError, match="model_type: llama, qwen3"):
        gates.check(decoder("Qwen3"))
    with pytest.raises(ArgumentError, match=r"got shape \(3, 2\), expected \(3, 1\)"):
        gates.check(decoder("Llama", num_key_value_heads=1))
    with pytest.raises(ArgumentError, match=r"got shape \(2, 2\), expected \(3, 2\)"):
        Gates.of(decoder("Llama"), torch.rand(2, 2))


def decoder_with_other_weights():
    model = decoder("Llama")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def test_files_that_are_no_gates_are_refused(tmp_path):
    path = tmp_path / "gates.json"
    with pytest.raises(ArgumentError, match="there is none"):
        Gates.load(path)
    for content, message in [
        ("[0.1, ", "no JSON"),
        ("[]", "without format"),
        ('{"format": "headway duo-attention gates", "version": 9}', "version 1"),
        ('{"format": "headway duo-attention gates", "version": 1, "gates": [[1]]}', "missing or broken"),
    ]:
        path.write_text(content)
        with pytest.raises(ArgumentError, match=message):
            Gates.load(path)


def test_a_heat_map_in_text():
    gates = Gates.of(decoder("Llama"), torch.tensor([[0.0, 1.0], [0.5, 0.25], [2.0, -1.0]]))
    assert gates.to_text() == "  0  █\n  1 ▒░\n  2 █ "


# Scores without training.


def test_the_rope_profile_tells_far_from_near():
    """A query that is its key decays with distance; one turned by half a circle in slow pairs prefers what is far."""
    frequencies = rope_frequencies(16, 1e4)
    same = torch.zeros(16)
    same[:8] = 6.0
    slow = torch.zeros(16)
    slow[4] = 8.0
    query, key = torch.stack([same, slow, torch.zeros(16)]), torch.stack([same, -slow, torch.ones(16)])
    near, far, flat = rope_profile(query, key, frequencies, scale=16**-0.5, tokens=400).tolist()
    assert near < 0.3
    assert far > 0.6
    assert flat == pytest.approx(0.5 * (1 + 1 / 400))


def test_the_rope_profile_is_its_definition():
    from headway.kernels.rope import rotate

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 8, generator=generator), torch.randn(2, 8, generator=generator)
    frequencies = rope_frequencies(8, 100.0)
    found = rope_profile(query, key, frequencies, scale=0.5, tokens=30)
    for head in range(4):
        turned = rotate(query[head].expand(1, 30, 8), torch.arange(30), frequencies)[0]
        keys = rotate(key[head // 2].expand(1, 30, 8), torch.arange(30), frequencies)[0]
        weights = (0.5 * keys @ turned[-1]).softmax(0)
        assert float(found[head]) == pytest.approx(float(weights.cumsum(0).mean()), abs=1e-5)


def test_distant_mass_is_what_lies_outside_sinks_and_recent_keys():
    model = decoder("Llama")
    texts = [contract.tokens(1, 30, seed=seed) for seed in (1, 2)]
    found = score_heads(model, texts, scoring="distant_mass", sinks=S, recent=R)
    want = torch.zeros(3, 2)
    rows, columns = torch.arange(30)[:, None], torch.arange(30)[None]
    distant = (columns >= S) & (rows - columns > R)

    class Read(Editor):
        reads_parts = PHASES
        keeps_weights = True

        def edit_weights(self, call, weights, some):
            mass = (weights * distant[some]).sum(-1)[0][:, some > S + R].sum(-1) / (30 - S - R - 1)
            want[call.site.layer] += mass.view(2, 2).mean(1) / len(texts)
            return weights

    with headway.use(model, Read()), torch.no_grad():
        for ids in texts:
            model(input_ids=ids, use_cache=False)
    torch.testing.assert_close(found.values, want, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "multi-query", "qwen3"])
def test_rope_profiles_are_those_of_queries_and_keys_before_rotation(name):
    """The first layer by hand: projections, and the norms of q and k where the host has them."""
    model = CAUSAL[name]()
    ids = contract.tokens(1, 24)
    found = score_heads(model, [ids]).values[0]
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        stream = model.model.layers[0].input_layernorm(model.model.embed_tokens(ids))
        query, key = (p(stream).view(1, 24, -1, 8) for p in (attention.q_proj, attention.k_proj))
        if name == "qwen3":
            query, key = attention.q_norm(query), attention.k_norm(key)
        frequencies = model.model.rotary_emb.inv_freq
        want = rope_profile(query.mean(1)[0], key.mean(1)[0], frequencies, scale=8**-0.5)
    torch.testing.assert_close(found, want.view(found.numel(), -1).mean(1), atol=1e-4, rtol=0)


def test_sliding_layers_score_nothing():
    model = CAUSAL["gemma3 sliding"]()
    windows = [kind != "full_attention" for kind in model.config.layer_types]
    found = score_heads(model, [contract.tokens(1, 24)]).values
    assert all(bool((row == 0).all()) for row, sliding in zip(found, windows, strict=True) if sliding)


def test_scores_say_what_is_wrong():
    model = decoder("Llama")
    with pytest.raises(ArgumentError, match="scoring: got 'kurtosis'"):
        score_heads(model, [contract.tokens(1, 24)], scoring="kurtosis")
    with pytest.raises(ArgumentError, match="texts: got none"):
        score_heads(model, [])
    with pytest.raises(ArgumentError, match="expected more than sinks"):
        score_heads(model, [contract.tokens(1, 24)], scoring="distant_mass")
    with pytest.raises(HostError, match="rotary"):
        score_heads(CAUSAL["gpt2"](), [contract.tokens(1, 24)])


@pytest.mark.real
def test_gates_of_a_real_model_are_learned_and_used():
    from headway.hosts import default_text

    model, tokenizer = headway.load("smollm2")
    made = PasskeyData(tokenizer=tokenizer, text=default_text().text, lengths=(160,), passkeys=1, words=4)
    found = learn_gates(model, made, steps=2, sinks=8, recent=32, learning_rate=0.05)
    assert found.gates.values.shape == (30, 3)
    assert float(found.gates.values.max()) < 1
    ids = made(5).ids
    with headway.use(model, DuoAttention(gates=found.gates, sparsity=0.5, sinks=8, recent=32)), torch.no_grad():
        cache = model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values
    full = int(select_heads(found.gates, sparsity=0.5).sum())
    assert full == 90 - 45
    assert cache.stored_bytes() == 2 * 64 * 4 * (full * ids.shape[1] + (90 - full) * 40)
