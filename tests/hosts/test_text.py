from __future__ import annotations

import encodings.aliases
import hashlib
import io
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError, HeadwayError, HostError
from headway.hosts import Text, default_text, positions_of, read_text, starts_with_special, tokenize
from headway.hosts import text as text_module

from .conftest import byte_pair_tokenizer


def test_the_default_text_is_the_same_every_time_and_names_its_source():
    first, second = default_text(), default_text()
    assert first == second
    assert first.source.startswith("pydoc_data.topics of ")
    assert first.sha256 == hashlib.sha256(first.text.encode()).hexdigest()


def test_the_default_text_is_long_and_reads_as_prose():
    text = default_text().text
    assert len(text) > 300_000
    assert "***" not in text.split("\n\n")[0]
    assert max(map(len, text.split("\n"))) > 400, "paragraphs stand on one line"


def test_the_default_text_keeps_every_word_of_the_topics():
    from pydoc_data.topics import topics

    words = default_text().text.split()
    rulers = set('*=~^-"')
    expected = [word for name in sorted(topics) for word in topics[name].split() if not set(word) <= rulers]
    assert [word for word in words if not set(word) <= rulers] == expected


def test_a_python_without_its_topics_names_the_option(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(HostError, match="--text FILE"):
        default_text()


@pytest.mark.parametrize("content", ["", " \n\t ", "\ufeff", "\u2003\n"])
def test_an_empty_text_is_an_error(tmp_path, content):
    (tmp_path / "t.txt").write_text(content, encoding="utf-8")
    with pytest.raises(ArgumentError, match="is empty"):
        read_text(tmp_path / "t.txt")


def test_a_text_that_is_not_utf8_names_the_byte_and_the_option(tmp_path):
    (tmp_path / "t.txt").write_bytes("four\nis café".encode("latin-1"))
    with pytest.raises(HostError, match=r"byte 0xe9 at offset 11; .*--encoding latin-1"):
        read_text(tmp_path / "t.txt")
    assert read_text(tmp_path / "t.txt", encoding="latin-1").text == "four\nis café"


def test_a_byte_order_mark_is_dropped_and_does_not_shift_the_offset(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert read_text(tmp_path / "t.txt").text == "hello"
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfh\xff")
    with pytest.raises(HostError, match="offset 4"):
        read_text(tmp_path / "t.txt")


@pytest.mark.parametrize("name", ["utf-9", "rot13", "hex", "", "utf-8\0"])
def test_an_unknown_encoding_is_an_error(tmp_path, name):
    (tmp_path / "t.txt").write_text("words")
    with pytest.raises(ArgumentError, match="encoding: got"):
        read_text(tmp_path / "t.txt", encoding=name)


def test_missing_file_folder_and_impossible_names_are_errors(tmp_path):
    with pytest.raises(HostError, match="there is no file"):
        read_text(tmp_path / "absent.txt")
    with pytest.raises(HostError, match="is a folder"):
        read_text(tmp_path)
    for name in ("a\0b", "x" * 5000, "~no-such-user-here/text"):
        with pytest.raises(HostError):
            read_text(name)


def test_a_dash_reads_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO("naïve".encode())))
    text = read_text("-")
    assert (text.text, text.source) == ("naïve", "standard input")


@settings(max_examples=200, deadline=None)
@given(data=st.one_of(st.binary(max_size=200), st.text(max_size=60).map(lambda s: s.encode("utf-8", "surrogatepass"))))
def test_any_bytes_give_their_text_or_a_clear_error(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "bytes.txt"
    file.write_bytes(data)
    try:
        expected = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        with pytest.raises(HostError, match=f"offset {error.start:,};"):
            read_text(file)
        return
    if expected.strip():
        assert read_text(file) == Text(expected, str(file), hashlib.sha256(expected.encode()).hexdigest())
    else:
        with pytest.raises(ArgumentError, match="is empty"):
            read_text(file)


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(min_size=1, max_size=40), encoding=st.sampled_from(sorted(set(encodings.aliases.aliases.values())))
)
def test_any_bytes_in_any_encoding_give_text_that_utf8_holds_or_an_error(tmp_path_factory, data, encoding):
    file = tmp_path_factory.getbasetemp() / "coded.txt"
    file.write_bytes(data)
    try:
        text = read_text(file, encoding=encoding)
    except HeadwayError:
        return
    assert text.sha256 == hashlib.sha256(text.text.encode("utf-8")).hexdigest()


def test_half_a_character_pair_is_an_error():
    with pytest.raises(ArgumentError, match=r"U\+D800 at character 2"):
        Text.of("ab\ud800", "here")


def test_tokens_are_the_first_of_the_whole_text(plain_tokenizer):
    text = default_text().text[:30_000]
    whole = plain_tokenizer(text)["input_ids"]
    for tokens in (1, 7, 500):
        assert tokenize(plain_tokenizer, text, tokens).tolist() == [whole[:tokens]]
    assert tokenize(plain_tokenizer, text).tolist() == [whole]


@settings(max_examples=40, deadline=None)
@given(
    words=st.lists(st.text(min_size=1, max_size=12), min_size=1, max_size=30),
    tokens=st.integers(1, 60),
    copies=st.integers(1, 60),
)
def test_reading_a_prefix_gives_the_same_tokens_as_reading_all(plain_tokenizer, words, tokens, copies):
    text = "a" + " ".join(words * copies)
    expected = plain_tokenizer(text, verbose=False)["input_ids"][:tokens]
    assert tokenize(plain_tokenizer, text, tokens).tolist() == [expected]


def test_the_cut_end_of_a_prefix_is_never_used(plain_tokenizer, monkeypatch):
    monkeypatch.setattr(text_module, "CHARACTERS_PER_TOKEN", 1)
    text = default_text().text[:5_000]
    whole = plain_tokenizer(text, verbose=False)["input_ids"]
    for tokens in range(1, 300, 3):
        assert tokenize(plain_tokenizer, text, tokens).tolist() == [whole[:tokens]]


def test_only_a_prefix_of_a_long_text_is_tokenized(plain_tokenizer):
    class Counting:
        all_special_ids: list[int] = []  # noqa: RUF012
        read = 0

        def __call__(self, text, **options):
            self.read += len(text)
            return plain_tokenizer(text, **options)

    counting = Counting()
    assert tokenize(counting, "word by word " * 300_000, 128).shape == (1, 128)
    assert counting.read < 20_000


def test_a_tokenizer_without_bos_starts_with_a_word(plain_tokenizer):
    ids = tokenize(plain_tokenizer, "hello there")
    assert not starts_with_special(plain_tokenizer, ids)
    assert plain_tokenizer.decode(ids[0]) == "hello there"


def test_a_bos_is_added_only_by_the_tokenizer_and_counts_as_a_token():
    tokenizer = byte_pair_tokenizer("<s> $A")
    ids = tokenize(tokenizer, default_text(), 20)
    assert starts_with_special(tokenizer, ids)
    assert ids.shape == (1, 20)
    assert ids[0, 0] == tokenizer.bos_token_id
    assert not torch.isin(ids[0, 1:], torch.tensor(tokenizer.all_special_ids)).any()


def test_an_encoder_keeps_its_closing_token():
    tokenizer = byte_pair_tokenizer("<s> $A </s>")
    ids = tokenize(tokenizer, default_text(), 20)[0].tolist()
    plain = tokenizer(default_text().text[:2000])["input_ids"]
    assert ids == [*plain[:19], tokenizer.eos_token_id]
    with pytest.raises(ArgumentError, match="expected at least 2"):
        tokenize(tokenizer, default_text(), 1)


def test_a_special_token_written_in_the_text_is_not_taken_for_the_closing_one():
    tokenizer = byte_pair_tokenizer("<s> $A")
    ids = tokenize(tokenizer, "one two three four </s>", 4)[0].tolist()
    assert ids == tokenizer("one two three four </s>")["input_ids"][:4]


def test_more_tokens_than_positions_names_limit_and_options(plain_tokenizer):
    with pytest.raises(ArgumentError, match=r"got 65, but the model has 64 positions; use --tokens 64, .*allow_longer"):
        tokenize(plain_tokenizer, default_text(), 65, positions=64)
    with pytest.raises(
        ArgumentError, match=r"more tokens than the model has positions \(64\).*--tokens 64.*allow_longer"
    ):
        tokenize(plain_tokenizer, default_text(), positions=64)
    assert tokenize(plain_tokenizer, default_text(), 64, positions=64).shape == (1, 64)
    assert tokenize(plain_tokenizer, default_text(), 65, positions=64, allow_longer=True).shape == (1, 65)


def test_a_text_that_just_fits_needs_no_option(plain_tokenizer):
    text = plain_tokenizer.decode(plain_tokenizer(default_text().text[:2000])["input_ids"][:64])
    count = len(plain_tokenizer(text)["input_ids"])
    assert tokenize(plain_tokenizer, text, positions=count).shape == (1, count)
    with pytest.raises(ArgumentError, match="more tokens than"):
        tokenize(plain_tokenizer, text, positions=count - 1)


def test_a_text_shorter_than_needed_is_an_error(plain_tokenizer):
    with pytest.raises(ArgumentError, match=r"the given text has \d tokens, expected at least 64"):
        tokenize(plain_tokenizer, "so short", needed=64)
    with pytest.raises(ArgumentError, match=r"got 8, expected at least 64 here; use --tokens 64"):
        tokenize(plain_tokenizer, default_text(), 8, needed=64)


@pytest.mark.parametrize("tokens", [0, -3, 2.5, True, "12"])
def test_tokens_must_be_a_positive_whole_number(plain_tokenizer, tokens):
    with pytest.raises(ArgumentError, match="tokens: got"):
        tokenize(plain_tokenizer, "words", tokens)


def test_a_text_without_any_token_is_an_error(plain_tokenizer):
    def closing_only(text, **options):
        return {"input_ids": [0, 1], "special_tokens_mask": [1, 1]}

    closing_only.all_special_ids = [0, 1]
    with pytest.raises(ArgumentError, match="finds no token"):
        tokenize(closing_only, "\u200b")
    with pytest.raises(ArgumentError, match="is empty"):
        tokenize(plain_tokenizer, "  ")


def test_an_image_processor_cannot_tokenize_and_a_processor_lends_its_tokenizer(plain_tokenizer):
    with pytest.raises(ArgumentError, match=r"got SimpleNamespace, which does not read text"):
        tokenize(SimpleNamespace(size=224), "words")
    both = SimpleNamespace(tokenizer=plain_tokenizer)
    assert torch.equal(tokenize(both, "some words"), tokenize(plain_tokenizer, "some words"))


def test_positions_are_those_the_model_has_room_for():
    from transformers import GPT2Config, GPT2Model, RobertaConfig, RobertaModel, T5Config, T5Model

    small = {"num_attention_heads": 2, "vocab_size": 20}
    gpt2 = GPT2Model(GPT2Config(n_positions=48, n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    roberta = RobertaModel(
        RobertaConfig(max_position_embeddings=34, hidden_size=8, num_hidden_layers=1, intermediate_size=8, **small)
    )
    t5 = T5Model(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=20))
    assert positions_of(gpt2) == 48
    assert positions_of(roberta) == 32
    assert positions_of(t5) is None
    roberta(torch.full((1, 32), 5))
    with pytest.raises((IndexError, RuntimeError)):
        roberta(torch.full((1, 33), 5))
