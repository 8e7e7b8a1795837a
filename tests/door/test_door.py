"""What the door promises, on a tiny host of every kind."""

from __future__ import annotations

import copy
import gc
import threading
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import headway
from headway.door import (
    Dense,
    Editor,
    FixedPattern,
    HeadGate,
    Observer,
    Selector,
    SuppressBlocks,
    UniformHeads,
    Window,
    ZeroValues,
)
from headway.errors import ArgumentError, ConflictError, EmptyRowError, InterceptionError, NumericError
from tests.door.hosts import CAUSAL, OTHERS, decoder, sharpen, tokens


class Identity(Editor):
    """Forces the door's own kernel and changes nothing."""

    def edit_weights(self, call, weights, rows):
        return weights


class Record(Observer):
    def start(self):
        self.calls = []

    def observe(self, call, output, lse=None):
        self.calls.append((call, output))


def first(output):
    return output.to_tuple()[0]


@pytest.fixture(scope="module", params=[*CAUSAL, *OTHERS])
def host(request):
    if request.param in CAUSAL:
        mask = torch.ones(2, 14, dtype=torch.long)
        mask[0, :4] = 0
        return CAUSAL[request.param](), {"input_ids": tokens(), "attention_mask": mask, "use_cache": False}
    return OTHERS[request.param]()


@torch.no_grad()
def test_observers_leave_the_output_bit_for_bit(host):
    model, inputs = host
    plain = first(model(**inputs))
    with headway.capture(model, what=("entropy", "received", "argmax")) as captured:
        assert torch.equal(first(model(**inputs)), plain)
    assert len(captured.result()) > 0


@torch.no_grad()
def test_own_kernel_gives_the_hosts_output(host):
    model, inputs = host
    plain = first(model(**inputs))
    with headway.use(model, Identity()) as handle:
        own = first(model(**inputs))
    valid = (
        inputs["attention_mask"].bool()
        if plain.ndim == 3 and "attention_mask" in inputs
        else torch.ones(plain.shape[:1], dtype=torch.bool)
    )
    torch.testing.assert_close(own[valid], plain[valid], rtol=2e-4, atol=2e-4 * float(plain.abs().max()))
    assert all("edited" in row["paths"] for row in handle.report())


@torch.no_grad()
def test_after_the_scope_everything_is_as_it_was(host):
    model, inputs = host
    before = state_of(model)
    plain = first(model(**inputs))
    with headway.use(model, HeadGate(gates={(0, 0): 0.0})):
        changed = first(model(**inputs))
    assert not torch.equal(changed, plain)
    assert state_of(model) == before
    assert torch.equal(first(model(**inputs)), plain)


@torch.no_grad()
def test_reduced_equals_reduce_of_the_captured_weights(host):
    model, inputs = host
    with headway.capture(model, what=("weights", "entropy", "received", "argmax", "first")) as captured:
        model(**inputs)
    for site in captured.result():
        got = captured.result()[site]
        weights = got["weights"].nan_to_num(0.0)
        torch.testing.assert_close(
            torch.special.entr(weights).sum(-1), got["entropy"].nan_to_num(0.0), rtol=1e-3, atol=1e-4
        )
        seen = got["argmax"] >= 0
        assert torch.equal(weights.argmax(-1)[seen], got["argmax"][seen])
        torch.testing.assert_close(weights[..., 0], got["first"].nan_to_num(0.0), rtol=1e-4, atol=1e-5)
        assert bool((weights.sum(-1) <= 1 + 1e-4).all())


def state_of(model):
    names = [
        str(m.config._attn_implementation)
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation")
    ]
    kinds = [
        type(m.config._attn_implementation)
        for m in model.modules()
        if hasattr(getattr(m, "config", None), "_attn_implementation")
    ]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    keys = [sorted(vars(m)) for m in model.modules()]
    tensors = [(n, t.data_ptr(), t._version) for n, t in [*model.named_parameters(), *model.named_buffers()]]
    return names, kinds, hooks, keys, tensors


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_causality_by_perturbation(name):
    model = CAUSAL[name]()
    ids = tokens(1)
    other = ids.clone()
    other[0, -1] = (other[0, -1] + 7) % 80 + 3
    with headway.use(model, Identity()):
        one, two = first(model(ids)), first(model(other))
    torch.testing.assert_close(one[:, :-1], two[:, :-1])
    assert not torch.allclose(one[:, -1], two[:, -1])


@pytest.mark.parametrize("name", CAUSAL)
@torch.no_grad()
def test_left_padded_batch_equals_single_sequences(name):
    model = CAUSAL[name]()
    long, short = tokens(1, 14), tokens(1, 9, seed=1)
    ids = torch.cat([long, torch.cat([torch.zeros(1, 5, dtype=torch.long), short], 1)])
    mask = torch.ones(2, 14, dtype=torch.long)
    mask[1, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with headway.capture(model, what=("entropy", "received")) as batch:
        model(ids, attention_mask=mask, position_ids=positions)
    with headway.capture(model, what=("entropy", "received")) as single:
        model(short)
    for site in single.result():
        padded, alone = batch.result()[site], single.result()[site]
        torch.testing.assert_close(padded["entropy"][1:, :, 5:], alone["entropy"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(padded["received"][1:, :, 5:], alone["received"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "llama eager", "gpt-oss learned sinks"])
@torch.no_grad()
def test_right_padding_adds_nothing_to_received_mass(name):
    model = CAUSAL[name]()
    ids = tokens(1, 14)
    mask = torch.ones(1, 14, dtype=torch.long)
    mask[0, 9:] = 0
    with headway.capture(model, what=("received", "visible")) as padded:
        model(ids, attention_mask=mask)
    with headway.capture(model, what=("received", "visible")) as alone:
        model(ids[:, :9])
    for site in alone.result():
        for what in ("received", "visible"):
            torch.testing.assert_close(
                padded.result()[site][what][..., :9],
                alone.result()[site][what].expand_as(padded.result()[site][what][..., :9]),
                rtol=1e-3, atol=1e-4,
            )  # fmt: skip


@torch.no_grad()
def test_packed_sequences_equal_separate_ones():
    model = CAUSAL["llama"]()
    one, two = tokens(1, 6), tokens(1, 8, seed=1)
    positions = torch.cat([torch.arange(6), torch.arange(8)])[None]
    with headway.capture(model, what=("entropy",)) as packed:
        model(torch.cat([one, two], 1), position_ids=positions, use_cache=False)
    with headway.capture(model, what=("entropy",)) as alone:
        model(two, use_cache=False)
    for site in alone.result():
        torch.testing.assert_close(
            packed.result()[site]["entropy"][..., 6:], alone.result()[site]["entropy"], rtol=1e-3, atol=1e-4
        )


INTERVENTIONS = {
    "gate": HeadGate(gates={(0, 0): 0.0, (1, 2): 0.5}),
    "uniform": UniformHeads(heads=[(0, 1), (1, 3)]),
    "suppress": SuppressBlocks(blocks=[((6, 99), (2, 5))]),
    "suppress in heads": SuppressBlocks(blocks=[((6, 99), (2, 5))], heads=[(1, 0)]),
    "zero values": ZeroValues(positions=[0, 3]),
}


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("kind", INTERVENTIONS)
@torch.no_grad()
def test_cached_decode_and_chunks_equal_one_forward_under_an_intervention(name, kind):
    model, ids = CAUSAL[name](), tokens(1, 12)
    with headway.use(model, INTERVENTIONS[kind]):
        whole = model(ids, use_cache=False).logits
        step = model(ids[:, :5], use_cache=True)
        parts = [step.logits]
        for start, stop in [(5, 9), (9, 10), (10, 11), (11, 12)]:
            step = model(ids[:, start:stop], past_key_values=step.past_key_values, use_cache=True)
            parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_chunked_capture_equals_one_forward():
    model, ids = CAUSAL["llama"](), tokens(2, 12)
    with headway.capture(model, what=("entropy", "received", "first", "argmax", "weights")) as whole:
        model(ids, use_cache=False)
    with headway.capture(model, what=("entropy", "received", "first", "argmax", "weights")) as parts:
        step = model(ids[:, :7], use_cache=True)
        model(ids[:, 7:], past_key_values=step.past_key_values, use_cache=True)
    for site in whole.result():
        for name, expected in whole.result()[site].items():
            torch.testing.assert_close(parts.result()[site][name], expected, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_generate_with_a_scope_equals_stepwise_greedy():
    model, ids = CAUSAL["llama"](), tokens(1, 6)
    with headway.use(model, INTERVENTIONS["suppress"]):
        made = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        slow = ids
        for _ in range(5):
            slow = torch.cat([slow, model(slow, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, slow)


@torch.no_grad()
def test_static_cache_prefill_reads_only_its_own_tokens():
    from transformers import StaticCache

    model, ids = CAUSAL["llama"](), tokens(1, 8)
    cache = StaticCache(config=model.config, max_cache_len=20)
    with headway.capture(model, what=("received",)) as captured:
        model(ids, past_key_values=cache, use_cache=True)
    assert captured.result()[0]["received"].sum() == pytest.approx(8 * 4, rel=1e-4)


def test_phase_step_and_positions_are_known_inside_a_call():
    model, record = CAUSAL["llama"](), Record()
    with torch.no_grad(), headway.observe(model, record):
        model.generate(
            tokens(1, 5), attention_mask=torch.ones(1, 5), max_new_tokens=3, do_sample=False, eos_token_id=None
        )
    calls = [call for call, _ in record.calls if call.site.layer == 0]
    assert [c.forward.phase for c in calls] == ["prefill", "decode", "decode"]
    assert [c.forward.step for c in calls] == [0, 1, 2]
    assert [c.offset for c in calls] == [0, 5, 6]
    assert calls[0].hidden.shape == (1, 5, 32)


def test_scratch_lives_for_one_forward():
    class Counts(Observer):
        def start(self):
            self.seen = []

        def observe(self, call, output, lse=None):
            call.forward.scratch["n"] = call.forward.scratch.get("n", 0) + 1
            self.seen.append(call.forward.scratch["n"])

    model, counts = CAUSAL["llama"](), Counts()
    with torch.no_grad(), headway.observe(model, counts):
        model(tokens())
        model(tokens())
    assert counts.seen == [1, 2, 3, 1, 2, 3]


def test_a_modules_inputs_are_let_go_when_it_has_run():
    model, record = CAUSAL["llama"](), Record()
    alive = []

    class Watch(Observer):
        def observe(self, call, output, lse=None):
            alive.append(len(handle._door._local.hidden))

    with torch.no_grad(), headway.observe(model, record, Watch()) as handle:
        model(tokens())
    assert alive == [1, 1, 1]


def test_exception_in_a_forward_restores_everything():
    class Fails(Observer):
        def observe(self, call, output, lse=None):
            raise RuntimeError("planted")

    model = CAUSAL["llama"]()
    before, plain = state_of(model), model(tokens()).logits
    with pytest.raises(RuntimeError, match="planted"), headway.observe(model, Fails()):
        model(tokens())
    assert state_of(model) == before
    assert torch.equal(model(tokens()).logits, plain)


def test_nested_scopes_compose_and_leave_in_order():
    model, ids = CAUSAL["llama"](), tokens()
    with torch.no_grad():
        with headway.use(model, HeadGate(gates={(0, 0): 0.5})):
            with headway.use(model, HeadGate(gates={(0, 0): 0.5})):
                both = model(ids).logits
            half = model(ids).logits
        with headway.use(model, HeadGate(gates={(0, 0): 0.25})):
            torch.testing.assert_close(model(ids).logits, both)
        with headway.use(model, HeadGate(gates={(0, 0): 0.5})):
            assert torch.equal(model(ids).logits, half)
    assert type(model.config._attn_implementation) is str


def test_two_models_that_share_a_config_do_not_touch_each_other():
    model = CAUSAL["llama"]()
    twin = sharpen(type(model)(model.config), seed=1)
    with torch.no_grad():
        plain = twin(tokens()).logits
        with headway.use(model, HeadGate(gates={(0, 0): 0.0})):
            assert torch.equal(twin(tokens()).logits, plain)
            with headway.use(twin, HeadGate(gates={(0, 0): 0.0})):
                assert not torch.equal(twin(tokens()).logits, plain)
        assert torch.equal(twin(tokens()).logits, plain)
    assert type(model.config._attn_implementation) is str


def test_a_copy_made_inside_a_scope_is_an_ordinary_model():
    model = CAUSAL["llama"]()
    with torch.no_grad(), headway.use(model, HeadGate(gates={(0, 0): 0.0})):
        clone = copy.deepcopy(model)
    with torch.no_grad():
        assert type(clone.config._attn_implementation) is str
        assert torch.equal(clone(tokens()).logits, model(tokens()).logits)


def test_two_threads_with_two_models_keep_apart():
    results, plain = {}, {}
    models = {name: CAUSAL[name]() for name in ("llama", "qwen3")}
    for name, model in models.items():
        with torch.no_grad(), headway.capture(model, what=("entropy",)) as captured:
            model(tokens())
        plain[name] = captured.result().stack("entropy")

    def work(name):
        with torch.no_grad():
            for _ in range(5):
                with headway.capture(models[name], what=("entropy",)) as captured:
                    models[name](tokens())
            results[name] = captured.result().stack("entropy")

    threads = [threading.Thread(target=work, args=(name,)) for name in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name in models:
        torch.testing.assert_close(results[name], plain[name])


def test_a_streaming_thread_runs_under_the_scope_that_started_it():
    model, out = CAUSAL["llama"](), {}

    def generate():
        with torch.no_grad():
            out["logits"] = model(tokens()).logits

    with torch.no_grad(), headway.use(model, HeadGate(gates={(0, 0): 0.0})):
        thread = threading.Thread(target=generate)
        thread.start()
        thread.join()
        assert torch.equal(out["logits"], model(tokens()).logits)


def test_a_second_scope_from_another_thread_is_refused():
    model, errors = CAUSAL["llama"](), []

    def attach():
        try:
            headway.use(model, HeadGate(gates={(0, 0): 0.0})).attach()
        except ConflictError as error:
            errors.append(str(error))

    with headway.use(model, HeadGate(gates={(0, 0): 0.0})):
        thread = threading.Thread(target=attach)
        thread.start()
        thread.join()
    assert "thread" in errors[0]


def test_a_handle_attached_twice_is_refused():
    model = CAUSAL["llama"]()
    handle = headway.use(model, HeadGate(gates={(0, 0): 0.0}))
    with handle, pytest.raises(ConflictError, match="attached already"):
        handle.attach()
    assert type(model.config._attn_implementation) is str


@dataclass(frozen=True)
class SinkWindow(Selector):
    sinks: int = 1
    window: int = 4

    def select(self, call):
        return Window(self.sinks, self.window)


class All(Selector):
    def select(self, call):
        return Dense()


@torch.no_grad()
def test_dense_selection_is_the_hosts_output_and_density_one():
    model = CAUSAL["llama"]()
    with headway.use(model, All()) as handle:
        out = model(tokens()).logits
    torch.testing.assert_close(out, model(tokens()).logits, rtol=1e-4, atol=1e-4)
    assert all(row["density"] == 1.0 for row in handle.report())


@torch.no_grad()
def test_selection_reports_its_density_and_reads_nothing_else():
    model = CAUSAL["llama"]()
    with headway.use(model, SinkWindow()) as handle, headway.capture(model, what=("weights",)) as captured:
        model(tokens(1, 14))
    weights = captured.result()[1]["weights"]
    allowed = Window(1, 4).to_bool(14, 14).expand_as(weights)
    assert not weights[~allowed].any()
    visible = torch.ones(14, 14).tril().bool()
    expected = float((allowed[0, 0] & visible).sum() / visible.sum())
    assert handle.report()[0]["density"] == pytest.approx(expected)
    assert handle.report()[0]["paths"] == {"masked": 1}


def test_two_selectors_on_one_site_name_both():
    model = CAUSAL["llama"]()
    with pytest.raises(ConflictError, match="SinkWindow and All"):
        headway.use(model, SinkWindow(), All()).attach()
    with headway.use(model, SinkWindow()), pytest.raises(ConflictError, match="two selectors"):
        headway.use(model, All()).attach()
    with headway.use(model, SinkWindow(), layers=[0]), headway.use(model, All(), layers=[1]):
        pass


def test_reading_weights_that_an_editor_replaces_is_refused():
    model = CAUSAL["llama"]()
    pattern = FixedPattern(patterns={(0, 0): torch.eye(20)})
    with headway.use(model, pattern), pytest.raises(ConflictError, match=r"Capture.*FixedPattern"):
        headway.capture(model, what=("entropy",)).attach()
    with headway.use(model, pattern), headway.capture(model, what=("head_output",)):
        pass


@torch.no_grad()
def test_gate_is_linear_at_the_output_projection():
    model, seen = CAUSAL["llama"](), {}
    projection = model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_hook(
        lambda module, args, output: seen.setdefault("out", []).append((args[0], output))
    )
    for gate in (0.0, 0.5, 1.0):
        with headway.use(model, HeadGate(gates={(1, 2): gate}), selftest=False):
            model(tokens(1))
    hook.remove()
    (zero_in, zero), (_, half), (_, one) = seen["out"]
    torch.testing.assert_close(half, (zero + one) / 2)
    assert not zero_in.view(1, 14, 4, 8)[:, :, 2].any()


@torch.no_grad()
def test_uniform_head_is_the_mean_of_visible_values():
    for name in ("llama", "llama eager", "mistral sliding"):
        model = CAUSAL[name]()
        with headway.capture(model, what=("value",)) as plain:
            model(tokens(1))
        with (
            headway.use(model, UniformHeads(heads=[(0, 1)])),
            headway.capture(model, what=("head_output",)) as captured,
        ):
            model(tokens(1))
        value, made = plain.result()[0]["value"][:, 0], captured.result()[0]["head_output"][:, 1]
        torch.testing.assert_close(made[:, 0], value[:, 0])
        reach = 6 if "sliding" in name else 14
        torch.testing.assert_close(made[:, 13], value[:, 14 - reach :].mean(1))


@torch.no_grad()
def test_suppressed_columns_get_exactly_nothing_and_rows_renormalise():
    model = CAUSAL["llama"]()
    with (
        headway.use(model, SuppressBlocks(blocks=[((6, 14), (0, 3))])),
        headway.capture(model, what=("weights",)) as captured,
    ):
        model(tokens(1))
    weights = captured.result()[1]["weights"]
    assert not weights[..., 6:, :3].any()
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 4, 14))
    assert not weights.triu(1).any()


@torch.no_grad()
def test_a_row_with_nothing_left_raises_and_restores():
    model = CAUSAL["llama"]()
    with pytest.raises(EmptyRowError, match="query 0"), headway.use(model, SuppressBlocks(blocks=[((0, 1), (0, 1))])):
        model(tokens(1))
    assert type(model.config._attn_implementation) is str


@torch.no_grad()
def test_pattern_swap_between_runs():
    model, one, two = CAUSAL["llama"](), tokens(1), tokens(1, seed=5)
    with headway.capture(model, what=("weights",)) as recorded:
        model(two)
    heads = [(1, h) for h in range(4)]
    swap = FixedPattern.recorded(recorded.result(), heads)
    with headway.use(model, swap):
        swapped = model(one).logits
        torch.testing.assert_close(model(two).logits, model_plain(model, two), rtol=1e-3, atol=1e-4)
    assert not torch.allclose(swapped, model(one).logits, atol=1e-3)


def model_plain(model, ids):
    return copy.deepcopy(model)(ids).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@torch.no_grad()
def test_low_precision_hosts_pass_the_door(dtype):
    model = CAUSAL["llama"]().to(dtype)
    plain = model(tokens()).logits
    with headway.capture(model, what=("entropy",)) as captured:
        assert torch.equal(model(tokens()).logits, plain)
    assert captured.result()[0]["entropy"].dtype == torch.float32


@torch.no_grad()
def test_a_model_cast_inside_a_scope_still_passes():
    model = CAUSAL["llama"]()
    with headway.capture(model, what=("received",)) as captured:
        model.to(torch.bfloat16)
        model(tokens(1))
    assert captured.result()[0]["received"].sum() == pytest.approx(14 * 4, rel=1e-2)


def test_gradients_flow_through_an_edited_site():
    model = CAUSAL["llama"]()
    with headway.use(model, Identity()):
        model(tokens()).logits.sum().backward()
    assert all(
        p.grad is not None and torch.isfinite(p.grad).all() for p in model.model.layers[0].self_attn.parameters()
    )


def test_inspect_lists_every_site_with_what_it_allows():
    table = headway.inspect(CAUSAL["gemma2 soft cap"]())
    assert [row.layer for row in table.rows] == [0, 1, 2]
    assert {row.softcap for row in table.rows} == {5.0}
    assert [row.reach for row in table.rows] == ["sliding", "full", "sliding"]
    assert (table.rows[0].heads, table.rows[0].kv_heads, table.rows[0].head_dim, table.rows[0].rope) == (4, 2, 8, True)
    assert all("edit" in row.allows for row in table.rows)
    assert headway.inspect(CAUSAL["gpt-oss learned sinks"]()).rows[0].sinks
    assert not headway.inspect(CAUSAL["gpt2"]()).rows[0].rope
    assert {row.kind for row in headway.inspect(OTHERS["whisper (cross-attention)"]()[0]).rows} == {"self", "cross"}


def test_one_module_used_in_three_layers_is_three_sites():
    model, inputs = OTHERS["albert (one module, three layers)"]()
    with torch.no_grad(), headway.capture(model, what=("entropy",)) as captured:
        model(**inputs)
        model(**inputs)
    assert len(captured.result()) == 3
    assert {len(captured.result().calls(name)) for name in captured.result()} == {2}


def test_hosts_without_interceptable_attention_say_why():
    import transformers as tf

    mamba = tf.MambaForCausalLM(tf.MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=50, state_size=4))
    with pytest.raises(InterceptionError, match="state-space"):
        headway.use(mamba, Identity()).attach()
    with pytest.raises(InterceptionError, match="config"):
        headway.use(torch.nn.Linear(2, 2), Identity()).attach()
    with pytest.raises(ArgumentError, match="torch module"):
        headway.use("model", Identity()).attach()


def test_changing_the_implementation_inside_a_scope_is_noticed():
    model = CAUSAL["llama"]()
    with headway.use(model, Identity()):
        model.config._attn_implementation_internal = "eager"
        with pytest.raises(InterceptionError, match="no attention passed"):
            model(tokens())
    assert model.config._attn_implementation == "eager"


def test_weights_that_are_not_numbers_are_named():
    model = decoder("Llama")
    with torch.no_grad():
        model.model.layers[1].self_attn.q_proj.weight[0, 0] = float("nan")
    with pytest.raises((InterceptionError, NumericError), match=r"layers\.1"):
        headway.use(model, Identity()).attach()


@pytest.mark.parametrize(
    ("attach", "words"),
    [
        (lambda m: headway.capture(m, what=("entropi",)), "entropy"),
        (lambda m: headway.capture(m, what=()), "at least one"),
        (lambda m: headway.capture(m, what=("entropy",), layers=[3]).attach(), "0, 1, 2"),
        (lambda m: headway.capture(m, what=("entropy",), heads=[4]).attach(), r"0\.\.3"),
        (lambda m: headway.use(m, HeadGate(gates={(9, 0): 0.0})).attach(), "layer"),
        (lambda m: headway.use(m, UniformHeads(heads=[(0, 4)])).attach(), "2 key heads"),
        (lambda m: headway.use(m, Identity(), sites=["model.layrs.*"]).attach(), "model.layers.0"),
        (lambda m: headway.use(m, "flexprefill"), "instances"),
        (lambda m: headway.observe(m, Identity()), "observers only"),
        (lambda m: SuppressBlocks(blocks=[((3, 3), (0, 1))]), "start < stop"),
        (lambda m: FixedPattern(patterns={(0, 0): torch.ones(4, 4)}), "sum to one"),
    ],
)
def test_bad_input_names_what_came_and_what_was_expected(attach, words):
    with pytest.raises(ArgumentError, match=words):
        attach(CAUSAL["llama"]())


def test_a_fixed_pattern_must_stay_inside_the_mask_and_cover_the_sequence():
    model = CAUSAL["llama"]()
    future = torch.zeros(14, 14)
    future[:, 13] = 1
    with (
        torch.no_grad(),
        pytest.raises(ArgumentError, match="cannot see"),
        headway.use(model, FixedPattern(patterns={(0, 0): future})),
    ):
        model(tokens(1))
    with (
        torch.no_grad(),
        pytest.raises(ArgumentError, match="at least"),
        headway.use(model, FixedPattern(patterns={(0, 0): torch.eye(3)})),
    ):
        model(tokens(1))


def test_a_thousand_scopes_leave_nothing_behind():
    import resource

    model = CAUSAL["llama"]()
    with torch.no_grad():
        for turn in range(1000):
            if turn == 200:
                gc.collect()
                start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            with headway.capture(model, what=("entropy",)):
                model(tokens(1, 4))
    gc.collect()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start < 20_000


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 16),
    left=st.integers(0, 6),
    right=st.integers(0, 6),
    split=st.integers(0, 16),
    name=st.sampled_from(sorted(CAUSAL)),
)
def test_any_padding_and_split_agree_with_the_host(length, left, right, split, name):
    model = _CACHE.setdefault(name, CAUSAL[name]())
    total = left + length + right
    mask = torch.zeros(1, total, dtype=torch.long)
    mask[:, left : left + length] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    inputs = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        plain = model(tokens(1, total), **inputs).logits
        with headway.use(model, Identity()):
            own = model(tokens(1, total), **inputs).logits
            torch.testing.assert_close(own[mask.bool()], plain[mask.bool()], rtol=1e-3, atol=1e-3)
            if 0 < split < length and not right:
                step = model(
                    tokens(1, total)[:, : left + split],
                    attention_mask=mask[:, : left + split],
                    position_ids=positions[:, : left + split],
                )
                rest = model(
                    tokens(1, total)[:, left + split :], attention_mask=mask, position_ids=positions[:, left + split :],
                    past_key_values=step.past_key_values,
                )  # fmt: skip
                torch.testing.assert_close(rest.logits, plain[:, left + split :], rtol=1e-3, atol=1e-3)


_CACHE: dict = {}


class Calls(headway.door.Observer):
    """Notes what every call says of its keys, rows and padding."""

    def __init__(self):
        self.found = []

    def observe(self, call, output, lse=None):
        padding = call.forward.padding
        self.found.append((call.keys, call.offset, call.causal, None if padding is None else padding.tolist()))


@pytest.mark.parametrize("name", ["llama", "llama eager", "gpt2"])
def test_a_static_cache_has_no_empty_slots_at_the_door_and_its_mask_tells_the_padding(name):
    """`generate` hands such a host masks of pairs over all slots instead of the mask of positions."""
    model, calls = CAUSAL[name](), Calls()
    ids, mask = tokens(2, 9), torch.ones(2, 9, dtype=torch.long)
    ids[1, :4], mask[1, :4] = 0, 0
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    with headway.observe(model, calls):
        model.generate(ids, attention_mask=mask, cache_implementation="static", **options)
    by_step = calls.found[:: len(calls.found) // 3]
    real = [[True] * 12, [False] * 4 + [True] * 8]
    for step, (keys, offset, causal, padding) in enumerate(by_step):
        assert (keys, offset, causal) == (9 + step, 9 + step - (1 if step else 9), step == 0)
        assert padding == [row[:keys] for row in real]


@torch.no_grad()
def test_a_mask_of_pairs_that_hides_more_than_padding_tells_no_padding():
    """Two packed texts: the last row does not see the first, which is no padding all the same."""
    model, calls = CAUSAL["llama"](), Calls()
    own = (torch.arange(10) >= 6)[:, None] == (torch.arange(10) >= 6)
    packed = (own & torch.ones(10, 10, dtype=torch.bool).tril())[None, None]
    with headway.observe(model, calls):
        model(tokens(1, 10), attention_mask=packed)
    assert {repr(padding) for *_, padding in calls.found} == {"None"}
