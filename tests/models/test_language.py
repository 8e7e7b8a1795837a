"""Every mixer as a language model: what `transformers` does with a host, it does with these."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

import headway
from headway.errors import ArgumentError
from headway.models import HeadwayConfig, HeadwayForCausalLM, mixers

SLUGS = sorted(mixers())
#: Weights large enough that what a model writes depends on what it read.
STD = 0.5


def model_of(mixer: str | list[str], **options: object) -> HeadwayForCausalLM:
    torch.manual_seed(0)
    fields = {"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "init_std": STD, **options}
    return HeadwayForCausalLM(HeadwayConfig(mixer=mixer, **fields)).eval()


def tokens(batch: int, count: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(5, 97, (batch, count), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=SLUGS)
def model(request: pytest.FixtureRequest) -> HeadwayForCausalLM:
    return model_of(request.param)


@pytest.mark.usefixtures("without_gradients")
class TestEveryMixer:
    def test_chunks_and_steps_with_a_cache_give_the_logits_of_one_forward(self, model):
        ids = tokens(2, 13)
        whole = model(ids).logits
        cache, parts = None, []
        for start, stop in pairwise((0, 5, 6, 12, 13)):
            out = model(ids[:, start:stop], past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
        assert cache.get_seq_length() == 13

    def test_left_padded_rows_generate_what_bare_ones_do(self, model):
        ids = tokens(2, 11)
        mask = torch.ones(2, 11, dtype=torch.long)
        mask[0, :4] = 0
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        together = model.generate(ids, attention_mask=mask, **options)
        for row, start in ((0, 4), (1, 0)):
            alone = model.generate(ids[row : row + 1, start:], **options)
            assert together[row, 11:].tolist() == alone[0, 11 - start :].tolist()

    def test_beams_with_a_cache_are_beams_without(self, model):
        options = {"max_new_tokens": 5, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
        cached = model.generate(tokens(2, 7), **options)
        assert torch.equal(cached, model.generate(tokens(2, 7), use_cache=False, **options))

    def test_a_second_turn_goes_on_from_the_cache_of_the_first(self, model):
        options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
        first = model.generate(tokens(1, 9), return_dict_in_generate=True, **options)
        text = torch.cat([first.sequences, tokens(1, 5, seed=2)], 1)
        second = model.generate(text, past_key_values=first.past_key_values, **options)
        assert torch.equal(second, model.generate(text, **options))

    def test_under_autocast_it_is_near_float32_and_decodes_what_it_reads(self, model):
        ids = tokens(2, 24)
        exact = model(ids).logits
        with torch.autocast("cpu", dtype=torch.bfloat16):
            whole, cache = model(ids).logits, model(ids[:, :19], use_cache=True).past_key_values
            steps = [model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits for i in range(19, 24)]
        for found, truth in ((whole, exact), (torch.cat(steps, 1), exact[:, 19:])):
            assert float((found.float() - truth).norm() / truth.norm()) < 0.05

    def test_saved_and_loaded_it_is_the_same(self, model, tmp_path):
        model.save_pretrained(tmp_path)
        for auto in (AutoModelForCausalLM, AutoModel):
            again = auto.from_pretrained(tmp_path).eval()
            assert type(again) is HeadwayForCausalLM
            assert torch.equal(again(tokens(1, 9)).logits, model(tokens(1, 9)).logits)
        assert AutoConfig.from_pretrained(tmp_path).mixer == model.config.mixer

    def test_the_door_reads_the_weights_behind_its_output(self, model):
        """Σ_j w_ij v_j of what is captured is the output of each head, whatever the rule that makes the weights."""
        if model.config.mixer == "titans_lmm":
            with pytest.raises(headway.errors.InterceptionError):
                headway.use(model).attach()
            return
        with headway.capture(model, what=("weights", "value", "head_output")) as captured:
            model(tokens(1, 9))
        for site in captured.result():
            for call in captured.result().calls(site):
                groups = call["weights"].shape[1] // call["value"].shape[1]
                value = call["value"].repeat_interleave(groups, 1)
                torch.testing.assert_close(call["weights"] @ value, call["head_output"], rtol=1e-3, atol=1e-4)

    def test_the_loss_reaches_every_parameter(self, model):
        with torch.enable_grad():
            model.zero_grad()
            ids = tokens(2, 24)
            model(ids, labels=ids).loss.backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        model.zero_grad()
        assert idle == []


@pytest.mark.usefixtures("without_gradients")
class TestModel:
    def test_a_hybrid_stack_has_the_mixers_of_its_config(self):
        model = model_of(["lightning", "softmax"], mixer_options={"softmax": {"window": 8}})
        assert [block.mixer.slug for block in model.layers] == ["lightning", "softmax"]
        assert model.layers[1].mixer.window == 8

    def test_states_of_every_kind_go_along_in_a_hybrid_stack(self, tmp_path):
        """A cache in which only some layers had a memory went out of step elsewhere."""
        mixer = ["lightning", "titans_mac", "diffqkv", "titans_lmm", "softmax"]
        options = {"titans_mac": {"segment": 8, "chunk": 4}, "titans_lmm": {"chunk": 4}, "softmax": {"window": 4}}
        model = model_of(mixer, layers=5, mixer_options=options)
        ids, mask = tokens(2, 11), torch.ones(2, 11, dtype=torch.long)
        mask[0, :4] = 0
        asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        found = model.generate(ids, attention_mask=mask, **asked)
        assert torch.equal(found, model.generate(ids, attention_mask=mask, use_cache=False, **asked))
        assert found[0, 11:].tolist() == model.generate(ids[:1, 4:], **asked)[0, 7:].tolist()
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert [block.mixer.slug for block in again.layers] == mixer
        assert torch.equal(again(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)

    def test_packed_documents_are_read_apart(self):
        model = model_of(["lightning", "softmax"])
        ids = tokens(1, 12)
        resets = torch.zeros(1, 12, dtype=torch.bool)
        resets[0, [0, 5]] = True
        packed = model(ids, resets=resets).logits
        apart = torch.cat([model(ids[:, :5]).logits, model(ids[:, 5:]).logits], 1)
        torch.testing.assert_close(packed, apart, rtol=1e-4, atol=1e-4)

    def test_recurrent_caches_are_of_one_size_at_any_length(self):
        model = model_of("lightning")
        sizes = [model(tokens(1, n), use_cache=True).past_key_values.bytes for n in (8, 64, 256)]
        assert len(set(sizes)) == 1

    def test_a_look_works_on_a_model_of_ours(self):
        from headway.look import Look
        from tests.look.tiny import byte_tokenizer

        model = model_of(["lightning", "softmax"], vocab_size=300)
        found = headway.look(model, byte_tokenizer(), "The quick brown fox jumps over the lazy dog. " * 6, tokens=128)
        assert isinstance(found, Look)
        assert found.model["layers"] == 2
        entropy = next(m for m in found.heads if m.name == "entropy")
        assert all(value == value for row in entropy.values for value in row)

    def test_embeddings_can_be_scaled_and_untied(self):
        tied, untied = model_of("softmax"), model_of("softmax", tie=False, embed_scale=True)
        assert tied.lm_head.weight is tied.embed_tokens.weight
        assert untied.lm_head.weight is not untied.embed_tokens.weight

    def test_embedding_projections_start_as_rotations_around_the_stack(self):
        model = model_of("softmax", embed_projection=True)
        eye = torch.eye(model.config.width)
        for projection in (model.embed_in, model.embed_out):
            torch.testing.assert_close(projection.weight @ projection.weight.T, eye, atol=1e-5, rtol=0)
        ids = tokens(1, 6)
        states = model(ids, output_hidden_states=True)
        torch.testing.assert_close(states.hidden_states[0], model.embed_tokens(ids) @ model.embed_in.weight.T)
        torch.testing.assert_close(
            states.logits, states.hidden_states[-1] @ model.embed_out.weight.T @ model.lm_head.weight.T
        )
        assert model_of("softmax").embed_in is None

    @pytest.mark.parametrize("norm", ["rms", "srms", "layer", "single_scale"])
    @pytest.mark.parametrize("place", ["pre", "post"])
    def test_norms(self, norm, place):
        assert bool(torch.isfinite(model_of("softmax", norm=norm, norm_place=place)(tokens(1, 6)).logits).all())

    @pytest.mark.parametrize(
        ("mlp", "hidden"),
        [
            ("swiglu", lambda gate, up: functional.silu(gate) * up),
            ("geglu", lambda gate, up: functional.gelu(gate) * up),
            ("reglu", lambda gate, up: gate.relu() * up),
            ("sglu", lambda gate, up: gate * up),
            ("gelu", lambda _, up: functional.gelu(up)),
            ("relu", lambda _, up: up.relu()),
            ("swish", lambda _, up: up * up.sigmoid()),
        ],
    )
    def test_mlps_by_their_formulas(self, mlp, hidden):
        made, x = model_of("softmax", mlp=mlp).layers[0].mlp, torch.randn(2, 3, 32)
        gate = None if made.gate is None else x @ made.gate.weight.T
        torch.testing.assert_close(made(x), hidden(gate, x @ made.up.weight.T) @ made.down.weight.T)

    def test_a_model_may_do_without_mlps(self):
        assert model_of("softmax", mlp="none").layers[0].mlp is None


class TestBadInput:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"mixer": "lightening"}, "lightning"),
            ({"mixer": ["softmax"]}, "1 names for 2 layers"),
            ({"mixer": ["softmax", "lightening"]}, "mixer of layer 1: got 'lightening'.* Did you mean 'lightning'"),
            ({"mixer": ["softmax", "linear"], "mixer_options": {"linear": 3}}, "mixer_options: got 3 for linear"),
            ({"mixer": ["softmax", "linear"], "mixer_options": {"softmx": {}}}, "mixer_options: got 'softmx'"),
            ({"norm": "rmsnorm"}, "rms"),
            ({"mlp": "swigloo"}, "swiglu"),
            ({"layers": 0}, "layers"),
            ({"mixer_options": {"windov": 3}}, "window"),
            ({"width": 30}, "heads divide"),
        ],
    )
    def test_a_config_that_cannot_be_built_says_why(self, fields, message):
        with pytest.raises(ArgumentError, match=message):
            model_of(**{"mixer": "softmax", **fields})

    def test_weights_of_other_head_counts_are_sent_to_the_converter(self, tmp_path):
        model_of("diffqkv", mixer_options={"key_heads": 4}).save_pretrained(tmp_path)
        config = AutoConfig.from_pretrained(tmp_path)
        config.mixer_options = {"key_heads": 2}
        with pytest.raises(ArgumentError, match=r"config: asks for other shapes .* pool_heads"):
            AutoModelForCausalLM.from_pretrained(tmp_path, config=config)

    def test_a_cache_of_keys_is_refused(self):
        with pytest.raises(ArgumentError, match="HeadwayCache"):
            model_of("softmax")(tokens(1, 3), past_key_values=DynamicCache())

    def test_a_static_cache_cannot_be_asked_for(self):
        with pytest.raises(ArgumentError, match="cache_implementation"):
            model_of("softmax").generate(tokens(1, 3), max_new_tokens=2, cache_implementation="static")

    def test_a_mask_over_pairs_is_refused(self):
        with pytest.raises(ArgumentError, match="attention_mask"):
            model_of("softmax")(tokens(1, 3), attention_mask=torch.ones(1, 1, 3, 3))

    def test_a_recurrent_cache_cannot_be_cropped(self):
        model = model_of("lightning")
        cache = model(tokens(1, 5), use_cache=True).past_key_values
        assert not cache.is_croppable
        with pytest.raises(ArgumentError, match="lightning"):
            cache.crop(-2)

    def test_ids_and_embeddings_exclude_each_other(self):
        with pytest.raises(ArgumentError, match="inputs_embeds"):
            model_of("softmax")()


@pytest.mark.usefixtures("without_gradients")
class TestOutputAttentions:
    @pytest.mark.parametrize("mixer", ["softmax", "lightning", "diffqkv"])
    def test_they_are_the_weights_that_the_door_reads_and_the_logits_stay(self, mixer, caplog):
        model, ids = model_of(mixer), tokens(2, 9)
        plain = model(ids)
        assert plain.attentions is None
        found = model(ids, output_attentions=True)
        assert "tokens²" in caplog.text
        torch.testing.assert_close(found.logits, plain.logits, rtol=1e-4, atol=1e-5)
        with headway.capture(model, what=("weights",)) as captured:
            model(ids)
        assert len(found.attentions) == 2
        for layer, weights in enumerate(found.attentions):
            assert weights.shape == (2, 4, 9, 9)
            assert not weights.triu(1).any()
            assert torch.equal(weights, captured.result()[layer]["weights"])
        assert model(ids).attentions is None

    def test_weights_of_padding_are_zero(self):
        model, ids = model_of("softmax"), tokens(2, 9)
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        found = model(ids, attention_mask=mask, output_attentions=True).attentions
        assert not found[0][0, :, 3:, :3].any()
        alone = model(ids[:1, 3:], output_attentions=True).attentions
        torch.testing.assert_close(found[1][:1, :, 3:, 3:], alone[1], rtol=1e-4, atol=1e-6)

    def test_behind_a_cache_and_without_weights_they_are_refused(self):
        model = model_of("lightning")
        past = model(tokens(1, 5), use_cache=True).past_key_values
        with pytest.raises(ArgumentError, match="output_attentions: got True behind 5 cached tokens"):
            model(tokens(1, 1), past_key_values=past, output_attentions=True)
        with pytest.raises(headway.errors.HeadwayError):
            model_of("titans_lmm")(tokens(1, 5), output_attentions=True)
