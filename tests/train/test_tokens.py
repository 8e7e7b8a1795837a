"""Token files: what is written is what was read, whole after any end, and windows meet every token once."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.errors import ArgumentError, HostError
from headway.train import tokenizing
from headway.train.tokenizers import Encoder, byte_tokenizer, load_tokenizer, pieces
from headway.train.tokenizing import tokenize_folder
from headway.train.tokens import Packed, Tokens

TEXTS = {"b.txt": "Second file.\nÄ line.", "a.md": "# First\n\nparagraph", "deep/c.txt": "third", "empty.txt": " \n"}


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "texts"
    for name, text in TEXTS.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")
    (place / "d.jsonl").write_text(json.dumps({"text": "fourth"}) + "\n\n" + json.dumps({"text": "fifth"}) + "\n")
    (place / "other.bin").write_bytes(b"\xff\xfe")
    return place


ORDER = [TEXTS["a.md"], TEXTS["b.txt"], "fourth", "fifth", TEXTS["deep/c.txt"]]


def test_documents_come_back_in_the_order_of_their_names(folder, tmp_path):
    tokens = tokenize_folder(folder, tmp_path / "out")
    for number, text in enumerate(ORDER):
        assert bytes(tokens.document(number)[:-1].astype(np.uint8)).decode() == text
        assert tokens.document(number)[-1] == tokens.separator == 256
    assert tokens.documents == 5
    assert tokens.header["dtype"] == "uint16"
    assert len(tokens) == sum(len(text.encode()) + 1 for text in ORDER)


@pytest.mark.parametrize("shard", [1, 7, 20, 10**6])
def test_shards_change_nothing(folder, tmp_path, shard):
    whole = tokenize_folder(folder, tmp_path / "whole")
    parts = tokenize_folder(folder, tmp_path / "parts", shard_tokens=shard)
    assert np.array_equal(parts.read(0, len(parts)), whole.read(0, len(whole)))
    assert np.array_equal(parts.starts, whole.starts)
    for start in range(0, len(whole) - 5, 3):
        assert np.array_equal(parts.read(start, start + 5), whole.read(start, start + 5))
        assert np.array_equal(parts.begins(start, start + 5), whole.begins(start, start + 5))


def test_tokenizing_that_was_ended_goes_on_and_equals_one_that_was_not(folder, tmp_path, monkeypatch):
    whole = tokenize_folder(folder, tmp_path / "whole", shard_tokens=8)
    write, calls = tokenizing.write_atomically, []

    def dies(path, content):
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return write(path, content)

    monkeypatch.setattr(tokenizing, "write_atomically", dies)
    with pytest.raises(KeyboardInterrupt):
        tokenize_folder(folder, tmp_path / "out", shard_tokens=8)
    monkeypatch.setattr(tokenizing, "write_atomically", write)
    with pytest.raises(HostError, match="is not complete; run the same `headway data tokenize` again"):
        Tokens(tmp_path / "out")
    seen = []
    real = Encoder.__call__
    monkeypatch.setattr(Encoder, "__call__", lambda self, text: seen.append(text) or real(self, text))
    found = tokenize_folder(folder, tmp_path / "out", shard_tokens=8)
    assert 0 < len(seen) < 5
    assert found.header == whole.header
    assert np.array_equal(found.read(0, len(found)), whole.read(0, len(whole)))


def test_a_finished_folder_is_not_made_again(folder, tmp_path, monkeypatch):
    tokenize_folder(folder, tmp_path / "out")
    monkeypatch.setattr(Encoder, "__call__", lambda self, text: pytest.fail("tokenized again"))
    assert tokenize_folder(folder, tmp_path / "out").documents == 5


def test_other_settings_or_other_texts_are_refused(folder, tmp_path):
    tokenize_folder(folder, tmp_path / "out")
    with pytest.raises(ArgumentError, match="split was 'file' and is 'line'"):
        tokenize_folder(folder, tmp_path / "out", split="line")
    (folder / "new.txt").write_text("one more")
    with pytest.raises(ArgumentError, match="sources was 5 and is 6"):
        tokenize_folder(folder, tmp_path / "out")


@pytest.mark.parametrize(("split", "count"), [("file", 1), ("line", 3), ("paragraph", 2)])
def test_a_document_is_a_file_a_line_or_a_paragraph(tmp_path, split, count):
    (tmp_path / "text.txt").write_text("one\ntwo\n\nthree\n")
    assert tokenize_folder(tmp_path / "text.txt", tmp_path / split, split=split).documents == count


@given(st.text(st.characters(blacklist_categories=("Cs",)), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_the_byte_tokenizer_gives_bytes_and_gives_them_back(text):
    tokenizer = byte_tokenizer()
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode("utf-8"))
    assert tokenizer.decode(ids) == text
    assert Encoder("bytes")(text).tolist() == [*ids, 256]


def test_the_byte_tokenizer_saves_and_loads(tmp_path):
    byte_tokenizer().save_pretrained(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded("aä")["input_ids"] == list("aä".encode())
    assert len(loaded) == 257
    assert loaded.eos_token_id == 256


def test_any_saved_tokenizer_may_be_used(folder, tmp_path):
    byte_tokenizer().save_pretrained(tmp_path / "mine")
    found = tokenize_folder(folder, tmp_path / "out", tokenizer=str(tmp_path / "mine"))
    plain = tokenize_folder(folder, tmp_path / "plain")
    assert np.array_equal(found.read(0, len(found)), plain.read(0, len(plain)))


@given(st.text("ab\n", max_size=80), st.integers(1, 9))
def test_pieces_join_to_the_text_and_end_at_lines_where_they_can(text, size):
    found = pieces(text, size)
    assert "".join(found) == text
    assert all(len(piece) <= size for piece in found)
    assert all(piece.endswith("\n") or "\n" not in piece for piece in found[:-1])


def numbers(tmp_path, count: int, documents: int = 1) -> Tokens:
    """Token files in which document d is a run of `count` letters."""
    place = tmp_path / "made"
    place.mkdir(exist_ok=True)
    for d in range(documents):
        (place / f"{d:03d}.txt").write_text(chr(97 + d) * count)
    return tokenize_folder(place, tmp_path / f"out-{count}-{documents}")


class Starts(Packed):
    """Where windows begin, in place of what stands there."""

    def _at(self, starts):
        return starts


def test_an_epoch_reads_every_window_once_in_an_order_of_its_own(tmp_path):
    stream = Starts(numbers(tmp_path, 999), 10, rows=1, held_out=0.0)
    assert stream.windows == 99
    epochs = [[stream.batch(i)[0] for i in range(epoch * 99, epoch * 99 + 99)] for epoch in range(3)]
    for starts in epochs:
        assert np.diff(sorted(starts)).tolist() == [10] * 98
        assert min(starts) >= 0
        assert max(starts) + 10 <= 1000
    assert epochs[0] != epochs[1]
    assert len({min(starts) for starts in epochs}) > 1


def test_batches_depend_on_seed_and_number_alone(tmp_path):
    tokens = numbers(tmp_path, 50, documents=20)
    one, other = Packed(tokens, 8, rows=3), Packed(tokens.folder, 8, rows=3)
    forward = [one.batch(i)["input_ids"] for i in range(100)]
    backward = [other.batch(i)["input_ids"] for i in reversed(range(100))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(forward, backward, strict=True))
    assert not torch.equal(Packed(tokens, 8, rows=3, seed=1).batch(0)["input_ids"], forward[0])


def test_a_stream_tells_what_its_batches_are_made_of(tmp_path):
    tokens, others = numbers(tmp_path, 50, documents=20), numbers(tmp_path, 50, documents=21)
    about = Packed(tokens, 8, rows=3).made_of()
    assert about == Packed(tokens.folder, 8, rows=3).made_of()
    for other in (Packed(others, 8, rows=3), Packed(tokens, 9, rows=3), Packed(tokens, 8, rows=2),
                  Packed(tokens, 8, rows=3, seed=1), Packed(tokens, 8, rows=3, resets=True),
                  Packed(tokens, 8, rows=3, held_out=0.5)):  # fmt: skip
        assert other.made_of() != about


def test_held_out_windows_are_never_trained_on(tmp_path):
    (tmp_path / "count.txt").write_bytes(bytes(i % 128 for i in range(60)) + b"\x7f" * 40)
    tokens = tokenize_folder(tmp_path / "count.txt", tmp_path / "out")
    stream = Packed(tokens, 10, rows=2, held_out=0.4)
    assert stream.kept == 4
    assert all(int((stream.batch(i)["input_ids"] == 256).sum()) == 0 for i in range(30))
    kept = torch.cat([batch["input_ids"] for batch in stream.held_out(2)])
    assert torch.equal(kept.flatten(), torch.from_numpy(tokens.read(len(tokens) - 40, len(tokens))))
    with pytest.raises(ArgumentError, match="held_out: got batch 2, expected fewer than 2"):
        stream.held_out(3)


def test_resets_mark_where_documents_begin_and_their_first_token_is_not_scored(tmp_path):
    tokens = numbers(tmp_path, 4, documents=30)
    batch = Packed(tokens, 12, rows=4, resets=True).batch(0)
    ids, resets = batch["input_ids"], batch["resets"]
    after = torch.cat([torch.zeros(4, 1, dtype=torch.bool), ids[:, :-1] == 256], 1)
    assert torch.equal(resets[:, 1:], after[:, 1:])
    assert bool(resets.any())
    assert bool((batch["labels"][resets] == -100).all())
    assert torch.equal(batch["labels"][~resets], ids[~resets])


def test_a_damaged_shard_is_named(folder, tmp_path):
    tokenize_folder(folder, tmp_path / "out")
    shard = tmp_path / "out" / "shard-00000.npy"
    content = shard.read_bytes()
    shard.write_bytes(content[:-2] + b"zz")
    with pytest.raises(HostError, match="has another checksum"):
        Tokens(tmp_path / "out", verify=True)
    shard.write_bytes(content[:-20])
    with pytest.raises(HostError, match=r"shard-00000.npy .* make the token files again"):
        Tokens(tmp_path / "out")
    (tmp_path / "out" / "tokens.json").write_text("{")
    with pytest.raises(HostError, match="cannot be read"):
        Tokens(tmp_path / "out")


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda f, o: tokenize_folder(f / "none", o), HostError, "there is no folder or file"),
        (lambda f, o: tokenize_folder(f, o, patterns=["*.xyz"]), ArgumentError, r"has no file like \*.xyz"),
        (lambda f, o: tokenize_folder(f, o, patterns=["*.bin"]), HostError, "other.bin is not UTF-8 .byte 0xff"),
        (lambda f, o: tokenize_folder(f, o, patterns=["empty.txt"]), ArgumentError, "1 files with no text in them"),
        (lambda f, o: tokenize_folder(f, o, split="word"), ArgumentError, "split: got 'word'"),
        (lambda f, o: tokenize_folder(f, o, shard_tokens=0), ArgumentError, "shard_tokens: got 0"),
        (
            lambda f, o: tokenize_folder(f, o, separator=300),
            ArgumentError,
            r"separator: got 300, expected an id in 0..256",
        ),
        (
            lambda f, o: tokenize_folder(f, o, field="body"),
            HostError,
            "line 1 of .*expected an object with text under 'body'",
        ),
        (lambda f, o: tokenize_folder(f, o, tokenizer=str(f)), HostError, "tokenizer: .* cannot be loaded"),
        (lambda f, o: tokenize_folder(f, f / "b.txt"), ArgumentError, "out: got .*b.txt, which is a file"),
        (lambda f, o: Tokens(o), HostError, "make it with: headway data tokenize"),
        (lambda f, o: Packed(tokenize_folder(f, o), 500), ArgumentError, "length: got 500, but .* has 60 tokens"),
        (lambda f, o: Packed(tokenize_folder(f, o), 1), ArgumentError, "length, rows, held_out: got 1"),
        (lambda f, o: tokenize_folder(f, o).read(3, 99), ArgumentError, "start, end: got 3, 99"),
    ],
)
def test_what_cannot_be_used_is_named(folder, tmp_path, change, error, words):
    with pytest.raises(error, match=words):
        change(folder, tmp_path / "out")
