"""ACT on hosts that see and hear: the language model is edited, picture tokens are keys, towers stay as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

import headway
from headway.door import Observer, observe
from headway.errors import ArgumentError
from headway.hosts.tiny import randomise, tiny_host
from headway.methods.sinks.act import ACT, HiddenSinks, candidate_heads

IMAGE, PIECES = 5, 16
PICTURE = range(3, 3 + PIECES)
LOW = {"tau": 0.05, "least_rows": 2}


@pytest.fixture(scope="module")
def host() -> tuple[Any, dict[str, Any]]:
    """A LLaVA of three layers in each tower, and a prompt with a picture of sixteen tokens in it."""
    vision = tf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=4
    )
    text = tf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=120, head_dim=8, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    config = tf.LlavaConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model: Any = tf.LlavaForConditionalGeneration(config).eval()
    generator = torch.Generator().manual_seed(0)
    randomise(model, generator)
    ids = torch.randint(8, 110, (1, 30), generator=generator)
    ids[:, list(PICTURE)] = IMAGE
    return model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 16, 16, generator=generator)}


class Weights(Observer):
    """The attention weights of one layer of the language model, and the head outputs of the towers."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.towers: dict[str, torch.Tensor] = {}

    def observe(self, call, output, lse=None):
        if "vision" in call.site.name:
            self.towers[call.site.name] = output
        elif call.site.layer == self.layer:
            self.weights = call.weights()


def run(host, *stages) -> torch.Tensor:
    model, inputs = host
    with torch.no_grad(), headway.use(model, *stages, example=inputs):
        return model(**inputs).logits


def test_heads_are_those_of_the_language_model(host):
    assert candidate_heads(host[0], skip_first=0, skip_last=0) == [(i, h) for i in range(3) for h in range(4)]
    sinks = HiddenSinks(**LOW)
    with torch.no_grad(), observe(host[0], sinks, example=host[1]):
        host[0](**host[1])
    assert set(sinks.result()) == set(candidate_heads(host[0], skip_first=0, skip_last=0))


def test_towers_are_left_alone_where_their_layers_have_the_same_numbers(host):
    alone, beside = Weights(0), Weights(0)
    want = run(host, alone)
    got = run(host, ACT(heads=[(layer, head) for layer in range(3) for head in range(4)], beta=0.0, **LOW), beside)
    assert len(alone.towers) == 3
    assert all(torch.equal(beside.towers[name], output) for name, output in alone.towers.items())
    assert not torch.allclose(got, want, atol=1e-3)


def test_a_picture_token_can_be_a_sink_and_words_can_be_spared(host):
    """Head (0, 1) is scaled at picture tokens alone, by hand and by the stage."""
    read = Weights(0)
    run(host, read)
    weights = read.weights[0, 1]
    received = weights.sum(0) / (30 - torch.arange(30))
    pictures = torch.zeros(30, dtype=torch.bool)
    pictures[list(PICTURE)] = True
    flagged = (received > LOW["tau"]) & (30 - torch.arange(30) >= LOW["least_rows"])
    flagged[0] = False
    assert bool((flagged & pictures).any())
    assert bool((flagged & ~pictures).any())
    changed = {}

    class Read(Observer):
        def observe(self, call, output, lse=None):
            if call.site.layer == 0 and "vision" not in call.site.name:
                changed["output"], changed["value"] = output[0, 1], call.value[0, 0]

    for candidates in (PICTURE, pictures[None]):
        run(host, ACT(heads=[(0, 1)], candidates=candidates, beta=0.0, **LOW), Read())
        kept = torch.where(flagged & pictures, 0.0, weights)
        rest = kept.sum(-1, keepdim=True)
        want = torch.where(rest > 1e-6, kept / rest, weights) @ changed["value"]
        torch.testing.assert_close(changed["output"], want, atol=1e-5, rtol=1e-4)


def test_decoding_behind_a_picture_equals_prefill_in_the_causal_scope(host):
    model, inputs = host
    stage = ACT(heads=[(1, 0), (2, 3)], scope="causal", **LOW)
    with torch.no_grad(), headway.use(model, stage):
        whole = model(**inputs).logits
        first = model(input_ids=inputs["input_ids"][:, :24], pixel_values=inputs["pixel_values"], use_cache=True)
        rows, cache = [first.logits], first.past_key_values
        for at in range(24, 30):
            step = model(input_ids=inputs["input_ids"][:, at : at + 1], past_key_values=cache, use_cache=True)
            rows.append(step.logits)
            cache = step.past_key_values
    torch.testing.assert_close(torch.cat(rows, 1), whole, atol=2e-4, rtol=0)


def test_two_stacks_of_layers_are_refused_until_one_is_named():
    model, inputs = tiny_host("WhisperModel")
    with pytest.raises(ArgumentError, match=r"sites: got self-attention in encoder\.layers and decoder\.layers"):
        headway.use(model, ACT(heads=[(0, 0)])).attach()
    with pytest.raises(ArgumentError, match="self-attention in encoder"):
        candidate_heads(model, skip_first=0, skip_last=0)
    with torch.no_grad(), headway.use(model, ACT(heads=[(0, 0)], beta=0.0), sites=["decoder*"]) as handle:
        model(**inputs)
        assert [row["site"] for row in handle.report()] == ["decoder.layers.0.self_attn"]
