"""A learnable sink token with its tokenizer: added, saved and loaded with the checkpoint, and used in a stream."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from tests.door.hosts import DECODER, decoder
from tokenizers import processors

import headway
from headway.errors import ArgumentError
from headway.methods.sinks.streaming_llm import StreamingLLM, add_sink_token, sink_token_of, streaming_perplexity
from headway.methods.sinks.streaming_llm.sink_token import SINK
from headway.train.tokenizers import END, byte_tokenizer

TEXT = "The keys of the first tokens stay for ever. " * 3


def host(vocabulary: int = 257):
    return decoder("Llama", vocab_size=vocabulary, num_hidden_layers=2)


def test_every_text_begins_with_it_and_decoding_hides_it():
    model, tokenizer = host(), byte_tokenizer()
    token = add_sink_token(model, tokenizer)
    assert token == 257 == sink_token_of(tokenizer)
    assert model.get_input_embeddings().num_embeddings == model.config.vocab_size == 258
    assert tokenizer("abc").input_ids == [257, 97, 98, 99]
    assert tokenizer("abc", "d").input_ids == [257, 97, 98, 99, 100]
    assert tokenizer("abc", add_special_tokens=False).input_ids == [97, 98, 99]
    assert tokenizer.decode([257, 97, 98], skip_special_tokens=True) == "ab"
    assert tokenizer(f"a{SINK}b", add_special_tokens=False).input_ids == [97, 257, 98]


def test_it_stands_before_what_a_tokenizer_puts_in_front_already():
    model, tokenizer = host(), byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END}:0 $A:0", pair=f"{END}:0 $A:0 $B:1", special_tokens=[(END, 256)]
    )
    add_sink_token(model, tokenizer)
    assert tokenizer("ab").input_ids == [257, 256, 97, 98]


def test_a_row_in_reserve_is_taken_before_the_table_grows():
    model, tokenizer = host(300), byte_tokenizer()
    before = model.get_input_embeddings().weight.detach().clone()
    assert add_sink_token(model, tokenizer, seed=3) == 257
    after = model.get_input_embeddings().weight.detach()
    assert after.shape == before.shape
    changed = (after != before).any(1).nonzero()[:, 0].tolist()
    assert changed == [257]
    assert (after[257] - before[:257].mean(0)).abs().max() < 0.05 * before[:257].std(0).max()


def test_checkpoint_and_tokenizer_keep_it_and_it_is_the_sink_of_a_stream(tmp_path):
    model, tokenizer = host(), byte_tokenizer()
    token = add_sink_token(model, tokenizer)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] += 1.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, reader = tf.AutoModelForCausalLM.from_pretrained(tmp_path), tf.AutoTokenizer.from_pretrained(tmp_path)
    assert sink_token_of(reader) == token
    assert torch.equal(again.get_input_embeddings().weight[token], model.get_input_embeddings().weight[token])
    ids = reader(TEXT, return_tensors="pt").input_ids
    assert ids[0, 0] == token
    assert ids.shape[1] == len(TEXT) + 1
    with headway.use(again.eval(), StreamingLLM(sinks=1, window=12)), torch.no_grad():
        cache = again(input_ids=ids, use_cache=True).past_key_values
        layer = cache.layers[0]
        out = again.generate(ids, max_new_tokens=30, min_new_tokens=30, do_sample=False, pad_token_id=256)
    attention, block = again.model.layers[0].self_attn, again.model.layers[0]
    with torch.no_grad():
        alone = attention.v_proj(block.input_layernorm(again.model.embed_tokens(torch.tensor([[token]]))))
    torch.testing.assert_close(
        layer.sink_store.value, alone.view(1, 1, DECODER["num_key_value_heads"], 8).transpose(1, 2)
    )
    assert cache.contains(0)
    assert not cache.contains(1)
    assert out.shape[1] == ids.shape[1] + 30


def test_what_a_stream_predicts_depends_on_the_token_for_ever():
    """Far behind the window the sink is still read: another row there changes the scores, an evicted byte does not."""
    model, tokenizer = decoder("Llama", vocab_size=257, num_hidden_layers=1), byte_tokenizer()
    token = add_sink_token(model, tokenizer)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    options = {"sinks": 1, "window": 8, "chunk": 16, "skip": 60}
    first = streaming_perplexity(model, ids, **options).nll
    other = ids.clone()
    other[0, 20:30] = 97
    torch.testing.assert_close(streaming_perplexity(model, other, **options).nll, first, atol=1e-5, rtol=0)
    with torch.no_grad():
        model.get_input_embeddings().weight[token] = model.get_input_embeddings().weight[98]
    assert (streaming_perplexity(model, ids, **options).nll - first).abs().mean() > 1e-3


def test_training_moves_the_row():
    model, tokenizer = host(), byte_tokenizer()
    token = add_sink_token(model, tokenizer)
    before = model.get_input_embeddings().weight[token].detach().clone()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    model(input_ids=ids, labels=ids).loss.backward()
    assert float(model.get_input_embeddings().weight.grad[token].norm()) > 0
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert not torch.equal(before, model.get_input_embeddings().weight[token])


def test_tokenizers_that_cannot_carry_it_are_named():
    model, tokenizer = host(), byte_tokenizer()
    with pytest.raises(ArgumentError, match="without the token"):
        sink_token_of(tokenizer)
    add_sink_token(model, tokenizer)
    with pytest.raises(ArgumentError, match="has the token"):
        add_sink_token(model, tokenizer)
    with pytest.raises(ArgumentError, match="got object, expected one of the tokenizers library"):
        add_sink_token(host(), object())
    assert model.get_input_embeddings().num_embeddings == 258
