"""The task `streaming` of a comparison: what is scored, against what, and where it cannot be."""

from __future__ import annotations

import math

import pytest
import torch
import transformers as tf

import headway
from headway.compare import streaming
from headway.compare.quality import TASKS
from headway.compare.recommend import loss_words
from headway.compare.result import Loss
from headway.compare.setting import Setting
from headway.errors import ArgumentError
from headway.hosts import Text, tokenize
from headway.methods.sinks.streaming_llm import StreamingLLM
from headway.tasks.perplexity import perplexity
from tests.compare.test_comparing import LONG, TOKENIZER, Plain
from tests.look.tiny import byte_tokenizer, tiny_llama

HOST = tiny_llama(num_hidden_layers=2)
TOKENS = 160
QUICK = {"tokens": TOKENS, "tasks": ["streaming"], "count": 1, "repeats": 2, "new_tokens": 2}


def setting(host=HOST, text: str = LONG, tokens: int = TOKENS) -> Setting:
    given = Text.of(text, "a text")
    ids = tokenize(TOKENIZER, given, tokens)
    return Setting(
        model=host, tokenizer=TOKENIZER, text=given, ids=ids, count=1, seed=0, modes=("blind",), chunk=None
    )  # fmt: skip


@pytest.fixture(scope="module")
def found():
    return headway.compare(
        HOST, byte_tokenizer(), LONG,
        methods=["streaming-llm", ("all of it", StreamingLLM(sinks=2, window=700))], budgets=[0.25], **QUICK,
    )  # fmt: skip


def test_the_stream_is_four_prompts_long_and_scored_behind_the_first(found):
    dense = found.dense.score("streaming")
    assert dense.n == 3 * TOKENS
    assert len(dense.parts) == 3 * TOKENS // 64
    assert found.judged == [("streaming", "")]
    assert not TASKS["streaming"].modes[0]


def test_a_method_that_keeps_everything_is_dense_and_a_short_cache_is_not(found):
    whole, short = found.point("all of it"), found.point("streaming-llm", 0.25)
    assert whole.losses[0].value == pytest.approx(0, abs=1e-4)
    assert abs(short.losses[0].value) > 1e-3
    assert short.score("streaming").value == pytest.approx(by_hand(0.25), rel=1e-4)


def by_hand(share: float) -> float:
    stream = streaming.prepare(setting())
    with headway.use(HOST, StreamingLLM(sinks=4, window=round(share * TOKENS) - 4)):
        return perplexity(HOST, stream.ids, chunk=1, skip=TOKENS).perplexity


def test_beside_it_stands_the_ratio_to_windows_read_afresh(found):
    """The tokens of a run are those behind its place, each given about as many as a prompt has."""
    ratio = next(s for s in found.dense.scores if not s.primary)
    stream = streaming.prepare(setting()).ready()
    place, before = stream.places[-1], TOKENS - streaming.RUN // 2
    with torch.no_grad():
        logits = HOST(input_ids=stream.ids[:, place - before : place + 3]).logits[0, before - 1 : -1]
    want = -logits.log_softmax(-1).gather(1, stream.ids[0, place : place + 3, None])[:, 0].double()
    torch.testing.assert_close(stream.afresh.view(-1, streaming.RUN)[-1, :3], want, atol=1e-4, rtol=0)
    dense = perplexity(HOST, stream.ids, skip=TOKENS).nll.double()
    at = torch.tensor(stream.places)[:, None] + torch.arange(streaming.RUN) - TOKENS
    assert ratio.value == pytest.approx(math.exp(float(dense[at].flatten().sub(stream.afresh).mean())), rel=1e-4)
    assert ratio.name == "perplexity ÷ windows of 160 afresh"


def test_a_perfect_tie_is_a_ratio_of_one():
    """A window afresh as long as the stream so far is dense attention: the first run is, but for half a run."""
    stream = streaming.prepare(setting()).ready()
    scores, held = streaming.measure(setting(), stream, "", False)
    assert len(scores[1].parts) == len(stream.places) == streaming.RUNS
    assert held == perplexity(HOST, stream.ids, chunk=64).cache_bytes
    stream.afresh = (
        perplexity(HOST, stream.ids, skip=TOKENS)
        .nll.double()[torch.tensor(stream.places)[:, None] + torch.arange(streaming.RUN) - TOKENS]
        .flatten()
    )
    assert streaming.measure(setting(), stream, "", False)[0][1].value == pytest.approx(1, abs=1e-4)


def test_texts_and_models_without_room_are_named():
    with pytest.raises(ArgumentError, match="stream of 200"):
        streaming.prepare(setting(text=LONG[:200]))
    learned = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=259, n_positions=256)).eval()
    with pytest.raises(ArgumentError, match="stream of 256"):
        streaming.prepare(setting(host=learned))
    assert streaming.prepare(setting(host=learned, tokens=100)).ids.shape[1] == 256


def test_a_driver_is_left_out():
    found = headway.compare(HOST, TOKENIZER, LONG, methods=[("drives", Plain())], **QUICK)
    assert found.point("drives").states["streaming"] == "left out"


def test_its_loss_is_a_share():
    loss = Loss(task="streaming", mode="", value=0.07, low=0.05, high=0.09)
    assert loss_words(loss) == "raises streaming by 7 % (5 to 9 %)"
