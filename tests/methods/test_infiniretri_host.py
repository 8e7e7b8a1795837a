"""InfiniRetri on hosts: rows of real attention, planted needles, streams, interruptions, and the driver."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from tests.contracts.methods import same, snapshot
from tests.door.hosts import CAUSAL, decoder, t5
from transformers import GenerationConfig

import headway
from headway.errors import ArgumentError, HeadwayError, HostError, InterceptionError
from headway.hosts.tiny import tiny_host
from headway.methods.long_context.infiniretri import (
    HostRows,
    InfiniRetri,
    Settings,
    answer,
    at_budget,
    frame_of,
    retrieve,
)
from headway.tasks.planted_retrieval import planted_host, planted_text
from headway.tasks.samples import plain_ids

MODEL, TOKENIZER = planted_host(positions=256)
TEMPLATE = "{context} {question} answer :"
SMALL = Settings(window=100, budget=60, topk=12)
GREEDY = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def planted(tokens: int = 600, depths=(0.3,), seed: int = 0):
    return planted_text(tokens, depths, np.random.default_rng(seed))


def find(text, question, settings=SMALL, model=MODEL, **options):
    options = {"template": TEMPLATE, "max_new_tokens": 4} | options
    return retrieve(model, TOKENIZER, text, question, settings=settings, **options)


def prompt_of(hidden) -> torch.Tensor:
    return torch.tensor([plain_ids(TOKENIZER, f"{hidden.text} {hidden.question} answer :")])


def question_tokens(hidden) -> int:
    return len(plain_ids(TOKENIZER, f"{hidden.question} answer :"))


class Counting:
    """Counts the forwards of a module."""

    def __init__(self, module) -> None:
        self.calls, self.lengths = 0, []
        self.hook = module.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs) -> None:
        self.calls += 1
        ids = kwargs.get("input_ids")
        if ids is not None:
            self.lengths.append(ids.shape[1])

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()


@pytest.mark.parametrize("name", ["llama", "multi-query", "qwen3", "gemma2 soft cap", "gpt-oss learned sinks", "gpt2"])
def test_rows_are_those_of_the_full_map(name):
    model = CAUSAL[name]()
    ids = list(range(5, 45))
    with HostRows(model, layer=-1, reach=0) as rows:
        got = rows(ids, 30, 40)
        layer = next(site.layer for site in rows.handle.sites if site.name in rows.observer.sites)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        full = model(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions[layer]
    torch.testing.assert_close(got, full[0, :, 30:40].sum(0), atol=1e-5, rtol=0)


def test_chosen_heads_and_layers_are_added_up():
    model, ids = decoder("Llama"), list(range(5, 30))
    model.set_attn_implementation("eager")
    with torch.no_grad():
        full = model(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    with HostRows(model, heads=((0, 3), (2, 1), (2, 2))) as rows:
        wanted = full[0][0, 3] + full[2][0, 1] + full[2][0, 2]
        torch.testing.assert_close(rows(ids, 20, 25), wanted[20:25], atol=1e-5, rtol=0)
    with HostRows(model, layer=(0, -1)) as rows:
        wanted = full[0][0].sum(0) + full[2][0].sum(0)
        torch.testing.assert_close(rows(ids, 20, 25), wanted[20:25], atol=1e-5, rtol=0)


def test_a_pass_ends_behind_the_layer_that_is_read():
    model, ids = decoder("Llama"), list(range(5, 30))
    for stop, later in ((True, 0), (False, 1)):
        with Counting(model.model.layers[2]) as count, HostRows(model, layer=1, early_stop=stop) as rows:
            rows(ids, 20, 25)
            before = count.calls
            got = rows(ids, 20, 25)
            assert count.calls - before == later
        if stop:
            first = got
    torch.testing.assert_close(first, got)


def test_a_scoring_pass_never_runs_the_language_head():
    model, ids = decoder("Llama"), list(range(5, 30))
    with HostRows(model, layer=-1) as rows:
        rows(ids, 20, 25)
        with Counting(model.lm_head) as head, Counting(model.model.layers[2]) as last:
            rows(ids, 20, 25)
    assert (head.calls, last.calls) == (0, 1)


def test_no_pass_reads_more_than_the_questions_rows(monkeypatch):
    """Weights are taken of the rows that ask, in blocks, and of no other."""
    from headway.door import AttentionCall

    asked = []
    plain = AttentionCall.weights
    with HostRows(decoder("Llama"), layer=-1) as rows:
        monkeypatch.setattr(AttentionCall, "weights", lambda c, rows: asked.extend(rows.tolist()) or plain(c, rows))
        rows(list(range(5, 85)), 3, 80)
    assert asked == list(range(3, 80))


def test_stopping_early_leaves_no_trace():
    model, ids = decoder("Llama"), torch.arange(5, 30)[None]
    with torch.no_grad():
        native = model(input_ids=ids).logits
        with HostRows(model, layer=0) as rows:
            rows(ids[0].tolist(), 20, 25)
            assert torch.equal(model(input_ids=ids).logits, native)
        assert torch.equal(model(input_ids=ids).logits, native)
    assert type(model.config._attn_implementation_internal) is str
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_two_readers_of_one_model_do_not_stop_each_other():
    model, ids = decoder("Llama"), list(range(5, 30))
    with HostRows(model, layer=0) as low, HostRows(model, layer=2) as high:
        first = [rows(ids, 20, 25) for rows in (low, high, low, high)]
    torch.testing.assert_close(first[:2], first[2:])
    with HostRows(model, layer=2) as alone:
        torch.testing.assert_close(alone(ids, 20, 25), first[1])


def test_a_model_in_training_is_read_in_evaluation_and_given_back():
    model = decoder("Llama", attention_dropout=0.5)
    with HostRows(model) as rows:
        model.train()
        first, second = (rows(list(range(5, 30)), 20, 25) for _ in range(2))
    torch.testing.assert_close(first, second)
    assert model.training


def test_a_module_that_its_owner_keeps_in_evaluation_stays_there():
    """As of a frozen part of a model in training."""
    model = decoder("Llama")
    with HostRows(model) as rows:
        model.train()
        model.model.layers[1].eval()
        modes = [module.training for module in model.modules()]
        rows(list(range(5, 30)), 20, 25)
    assert [module.training for module in model.modules()] == modes


def test_the_last_layer_is_the_last_that_sees_everything():
    model, _ = tiny_host("gemma3_text", max_position_embeddings=256)
    kinds = model.config.layer_types
    with HostRows(model, layer=-1, reach=100) as rows:
        rows(list(range(8, 60)), 40, 45)
        number = next(site.layer for site in rows.handle.sites if site.name in rows.observer.sites)
    assert kinds[number] == "full_attention"
    sliding = kinds.index("sliding_attention")
    with pytest.raises(ArgumentError, match=f"heads: got layer {sliding}, which slides"):
        HostRows(model, heads=((sliding, 0),), reach=100).handle.attach()


@torch.no_grad()
def test_the_last_layer_of_a_host_that_ends_in_a_state_is_its_last_with_attention():
    kinds = ["full_attention", "conv", "full_attention", "conv"]
    model, _ = tiny_host(
        "lfm2", max_position_embeddings=256, layer_types=kinds, num_hidden_layers=4, attn_implementation="eager"
    )
    ids = list(range(8, 60))
    with HostRows(model, layer=-1) as rows:
        got = rows(ids, 40, 45)
        assert [site.layer for site in rows.handle.sites if site.name in rows.observer.sites] == [2]
    maps = model(input_ids=torch.tensor([ids]), output_attentions=True, use_cache=False).attentions
    torch.testing.assert_close(got, [full for full in maps if full is not None][-1][0, :, 40:45].sum(0))


def test_a_host_whose_layers_all_slide_is_refused_on_attach():
    model = decoder("Mistral", sliding_window=6)
    with pytest.raises(HostError, match="none of which sees"):
        headway.use(model, InfiniRetri(window=20, limit=100)).attach()


@pytest.mark.parametrize(("layer", "heads", "what"), [(7, None, "layer"), (-4, None, "layer"), (-1, ((9, 0),), "heads"),
                                                      (-1, ((0, 4),), "heads")])  # fmt: skip
def test_a_layer_or_head_that_is_not_there_is_refused_on_attach(layer, heads, what):
    with pytest.raises(ArgumentError, match=f"{what}: got"):
        headway.use(decoder("Llama"), InfiniRetri(layer=layer, heads=heads, window=20)).attach()


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("window", [60, 100])
def test_the_planted_needle_is_kept_at_any_depth(depth, window):
    hidden = planted(depths=(depth,), seed=int(depth * 4))
    found = find(hidden.text, hidden.question, dataclasses.replace(SMALL, window=window))
    assert hidden.sentences[hidden.needles[0]] in found.text
    assert len(found.passes) > 5


def test_the_known_retrieval_head_alone_finds_it_and_another_head_does_not():
    hidden = planted(depths=(0.1,), seed=3)
    needle = hidden.sentences[hidden.needles[0]]
    assert needle in find(hidden.text, hidden.question, dataclasses.replace(SMALL, heads=((1, 0),))).text
    assert needle not in find(hidden.text, hidden.question, dataclasses.replace(SMALL, heads=((0, 1),))).text


def test_several_needles_are_found_in_one_run():
    hidden = planted(tokens=900, depths=(0.1, 0.4, 0.9), seed=5)
    found = find(hidden.text, hidden.question, dataclasses.replace(SMALL, topk=40))
    assert all(hidden.sentences[number] in found.text for number in hidden.needles)


def test_kept_sentences_are_spans_of_the_source_with_the_best_token_inside():
    hidden = planted(seed=2)
    found = find(hidden.text, hidden.question)
    ids = plain_ids(TOKENIZER, hidden.text)
    for item in found.kept:
        one = item.sentence
        assert hidden.text[one.start : one.stop] == one.text
        assert ids[one.first_token : one.first_token + one.tokens] == list(one.ids)
        assert one.first_token <= item.token < one.first_token + one.tokens
    best = max(found.kept, key=lambda item: item.score)
    assert best.sentence.text.strip() == hidden.sentences[hidden.needles[0]]


def test_no_pass_and_no_answer_exceeds_the_models_positions():
    hidden = planted(tokens=2000)
    with Counting(MODEL) as count:
        found = find(hidden.text, hidden.question, Settings(window=120, topk=None), max_new_tokens=20)
    assert max(count.lengths) <= 256
    assert len(found.prompt_ids) + 20 <= 256


def test_as_many_forwards_as_chunks_and_one_answer(monkeypatch):
    """Behind the passes one `generate`: a forward over the kept prompt, and one for each token after the first."""
    hidden = planted()
    answers, plain = [], MODEL.generate
    monkeypatch.setattr(MODEL, "generate", lambda *a, **options: answers.append(a) or plain(*a, **options))
    find(hidden.text, hidden.question)
    with Counting(MODEL) as count:
        found = find(hidden.text, hidden.question)
        assert count.calls == len(found.passes)
    assert not answers
    with Counting(MODEL) as count:
        said = answer(
            MODEL, TOKENIZER, hidden.text, hidden.question, settings=SMALL, template=TEMPLATE, max_new_tokens=4
        )
    assert said.retrieval == found
    assert len(answers) == 1
    prompt = len(found.prompt_ids)
    assert count.lengths[len(found.passes) :] == [prompt, 1, 1, 1]
    assert len(said.ids) == 4


def test_a_short_text_keeps_the_ordinary_prompt():
    hidden = planted(tokens=50)
    frame = frame_of(TOKENIZER, hidden.question, TEMPLATE)
    found = find(hidden.text, hidden.question, Settings(window=150, topk=150))
    assert len(found.passes) == 1
    assert found.prompt_ids == (*frame.before, *plain_ids(TOKENIZER, hidden.text), *frame.after)


def test_a_stream_is_read_like_the_text():
    hidden = planted(seed=4)
    parts = (hidden.text[i : i + 7] for i in range(0, len(hidden.text), 7))
    assert find(parts, hidden.question) == find(hidden.text, hidden.question)


def test_two_runs_give_the_same_and_change_nothing_of_the_callers():
    hidden = planted(seed=6)
    parts, layers, heads = [hidden.text[:900], hidden.text[900:]], [0, 1], [[1, 0]]
    chosen = Settings(window=100, budget=60, topk=12, layer=layers)
    narrow = Settings(window=100, budget=60, topk=12, heads=heads)
    before, words, state = snapshot(MODEL), _told(TOKENIZER), torch.get_rng_state()
    for settings in (chosen, narrow):
        assert find(parts, hidden.question, settings) == find(parts, hidden.question, settings)
        assert find(parts, hidden.question, settings).kept
    assert (parts, layers, heads) == ([hidden.text[:900], hidden.text[900:]], [0, 1], [[1, 0]])
    same(before, snapshot(MODEL))
    assert _told(TOKENIZER) == words
    assert torch.equal(torch.get_rng_state(), state)


def _told(tokenizer) -> str:
    """What a tokenizer is set to: its rules, special tokens, sides and limits."""
    rules = tokenizer.backend_tokenizer.to_str()
    return f"{rules} {tokenizer.init_kwargs} {tokenizer.padding_side} {tokenizer.truncation_side} {tokenizer}"


def test_a_question_that_stands_in_the_text_is_no_trouble():
    hidden = planted(seed=7)
    text = f"{hidden.question} {hidden.text} {hidden.question}"
    assert hidden.sentences[hidden.needles[0]] in find(text, hidden.question).text


def test_the_end_of_the_text_asks_when_there_is_no_question():
    hidden = planted(tokens=700, depths=(0.1,), seed=8)
    name = hidden.question.split()[-2]
    text = hidden.text + f"{name} " * (512 // (len(name) + 1)) + " " * (512 % (len(name) + 1))
    found = find(text, None, model=planted_host(positions=512)[0])
    assert hidden.sentences[hidden.needles[0]] in found.text


@pytest.mark.parametrize(
    ("context", "question", "message"),
    [
        ("", "who ?", "context: got an empty one"),
        (" \n ", "who ?", "context: got an empty one"),
        (iter([]), "who ?", "context: got an empty one"),
        ("the text .", "", "question: got an empty one"),
        ("the text .", " ", "question: got an empty one"),
        ("the text .", None, "question: got None for a text of 10 characters"),
        (iter(["a"]), None, "question: got None for a text that comes in parts"),
    ],
)
def test_nothing_to_read_or_to_ask_is_refused(context, question, message):
    with pytest.raises(ArgumentError, match=message):
        find(context, question)


def test_sizes_are_refused_before_anything_runs():
    with Counting(MODEL) as count, pytest.raises(ArgumentError, match=r"window 200 \+ kept 90 .* 256 positions"):
        find("the w1 .", "what is w1 ?", Settings(window=200, budget=90))
    assert count.calls == 0


def test_an_interrupted_run_goes_on_where_it_was(tmp_path):
    hidden = planted(seed=9)
    whole = find(hidden.text, hidden.question)
    file = tmp_path / "state" / "run.json"

    def interrupt(record):
        if record.chunk == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        find(hidden.text, hidden.question, checkpoint=file, progress=interrupt)
    seen = []
    again = find(hidden.text, hidden.question, checkpoint=file, progress=seen.append)
    assert again == whole
    assert [record.chunk for record in seen] == list(range(3, len(whole.passes)))
    with Counting(MODEL) as count:
        assert find(hidden.text, hidden.question, checkpoint=file) == whole
    assert count.calls == 0


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    hidden, file = planted(seed=9), tmp_path / "run.json"
    find(hidden.text, hidden.question, checkpoint=file)
    for text, question, settings in (
        (hidden.text, "what is w1 ?", SMALL),
        (hidden.text, hidden.question, dataclasses.replace(SMALL, topk=5)),
        ("w1 " + hidden.text, hidden.question, SMALL),
        (hidden.text[:600], hidden.question, SMALL),
    ):
        with pytest.raises(ArgumentError, match=r"checkpoint: got run\.json, which belongs to"):
            find(text, question, settings, checkpoint=file)


def test_a_checkpoint_that_another_model_made_is_refused(tmp_path):
    """Its kept sentences are what that model attended to, and go with its tokenizer as well as with this one's."""
    hidden, file = planted(seed=9), tmp_path / "run.json"
    other = planted_host(positions=256, seed=1)[0]
    find(hidden.text, hidden.question, checkpoint=file)
    with pytest.raises(ArgumentError, match=r"run\.json, which belongs to another model \(weights: other numbers\)"):
        find(hidden.text, hidden.question, checkpoint=file, model=other)
    assert find(hidden.text, hidden.question, checkpoint=file).kept


@pytest.mark.parametrize("content", ["", "{}", "[1]", "{broken"])
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path, content):
    file = tmp_path / "run.json"
    file.write_text(content)
    with pytest.raises(ArgumentError, match="which belongs to no run at all"):
        find("the w1 .", "what is w1 ?", checkpoint=file)


def test_progress_tells_every_pass():
    hidden, seen = planted(), []
    found = find(hidden.text, hidden.question, progress=seen.append)
    assert tuple(seen) == found.passes
    needle = next(
        item.chunk for item in found.kept if item.sentence.text.strip() == hidden.sentences[hidden.needles[0]]
    )
    assert max(seen, key=lambda record: record.best_new).chunk == needle


def test_answers_are_the_models_own_on_what_was_kept():
    hidden = planted()
    got = answer(
        MODEL, TOKENIZER, hidden.text, hidden.question, settings=SMALL, template=TEMPLATE, max_new_tokens=4
    )  # fmt: skip
    prompt = torch.tensor([got.retrieval.prompt_ids])
    native = MODEL.generate(prompt, **GREEDY | {"max_new_tokens": 4, "min_new_tokens": 0})[
        0, prompt.shape[1] :
    ].tolist()
    assert [token for token in native if token != 1] == list(got.ids)


def test_a_temperature_samples_and_a_negative_one_is_refused():
    hidden = planted()
    options = {"settings": SMALL, "template": TEMPLATE, "max_new_tokens": 12}
    torch.manual_seed(0)
    hot = {answer(MODEL, TOKENIZER, hidden.text, hidden.question, temperature=50.0, **options).ids for _ in range(3)}
    assert len(hot) > 1
    with pytest.raises(ArgumentError, match="temperature: got -1"):
        answer(MODEL, TOKENIZER, hidden.text, hidden.question, temperature=-1, **options)


def driver(hidden, **changes) -> InfiniRetri:
    chosen = {"window": 100, "budget": 60, "topk": 12, "tokenizer": TOKENIZER, "question": question_tokens(hidden)}
    return InfiniRetri(**chosen | changes)


def test_a_driven_prompt_longer_than_the_model_is_answered_from_the_needle():
    hidden, found = planted(tokens=1000, seed=11), []
    ids = prompt_of(hidden)
    with headway.use(MODEL, driver(hidden, found=found)):
        out = MODEL.generate(ids, **GREEDY)
    assert torch.equal(out[:, : ids.shape[1]], ids)
    assert out.shape[1] == ids.shape[1] + 5
    needle = hidden.sentences[hidden.needles[0]]
    assert needle in TOKENIZER.decode([token for item in found[0].kept for token in item.sentence.ids])
    prompt = torch.tensor([found[0].prompt_ids])
    assert torch.equal(MODEL.generate(prompt, **GREEDY)[:, prompt.shape[1] :], out[:, ids.shape[1] :])


def test_what_is_answered_from_is_a_part_of_the_prompt_in_order():
    hidden = planted(tokens=1000, seed=12)
    ids = prompt_of(hidden)[0].tolist()
    for tokenizer in (TOKENIZER, None):
        got = driver(hidden, tokenizer=tokenizer, head=3).read(MODEL, ids)
        rest = iter(ids)
        assert all(token in rest for token in got.prompt_ids)
        assert list(got.prompt_ids[:3]) == ids[:3]
        asked = question_tokens(hidden)
        assert list(got.prompt_ids[-asked:]) == ids[-asked:]


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_share_is_never_exceeded(share):
    hidden = planted(tokens=400, seed=13)
    ids = prompt_of(hidden)[0].tolist()
    got = driver(hidden, budget=None, share=share, topk=None).read(MODEL, ids, answer=4)
    assert 0.5 * share * len(ids) < len(got.prompt_ids) <= share * len(ids)
    assert max(record.tokens for record in got.passes) <= 256


def test_share_one_and_short_prompts_are_the_plain_model():
    hidden = planted(tokens=100)
    ids = prompt_of(hidden)
    native = MODEL.generate(ids, **GREEDY, num_beams=2)
    for stage in (*at_budget(1.0, tokens=100, model=MODEL), driver(hidden, above=ids.shape[1])):
        with Counting(MODEL) as count, headway.use(MODEL, stage, selftest=False):
            assert torch.equal(MODEL.generate(ids, **GREEDY, num_beams=2), native)
        assert max(count.lengths) == ids.shape[1]


def test_a_batch_is_its_rows_alone():
    hidden, model = [planted(tokens=n, seed=n) for n in (500, 800)], decoder("Llama", vocab_size=900)
    asked = question_tokens(hidden[0])
    rows = [prompt_of(one)[0] for one in hidden]
    longest = max(map(len, rows))
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    stage = InfiniRetri(window=50, budget=30, topk=8, question=asked, tokenizer=TOKENIZER)
    with headway.use(model, stage):
        both = model.generate(ids, attention_mask=mask, **GREEDY)
        alone = [model.generate(row[None], **GREEDY) for row in rows]
    assert torch.equal(both[:, :longest], ids)
    for number, single in enumerate(alone):
        assert both[number, -5:].tolist() == single[0, -5:].tolist()


class Heard:
    def __init__(self) -> None:
        self.pieces, self.ended = [], False

    def put(self, value) -> None:
        self.pieces.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_whole_prompt_and_then_the_new_tokens():
    hidden, heard = planted(), Heard()
    ids = prompt_of(hidden)
    with headway.use(MODEL, driver(hidden)):
        out = MODEL.generate(ids, streamer=heard, **GREEDY)
    assert heard.pieces[0] == ids[0].tolist()
    assert [token for piece in heard.pieces[1:] for token in piece] == out[0, -5:].tolist()
    assert heard.ended


@pytest.mark.parametrize(
    ("options", "rows"),
    [
        ({"num_beams": 3}, 1),
        ({"num_beams": 3, "num_return_sequences": 2}, 2),
        ({"do_sample": True, "num_return_sequences": 3}, 3),
        ({"return_dict_in_generate": True, "output_scores": True}, 1),
    ],
)
def test_every_kind_of_generation_has_the_whole_prompt_in_front(options, rows):
    hidden = planted()
    ids = prompt_of(hidden)
    with headway.use(MODEL, driver(hidden)):
        out = MODEL.generate(input_ids=ids, **GREEDY | options)
    sequences = out if isinstance(out, torch.Tensor) else out.sequences
    assert torch.equal(sequences[:, : ids.shape[1]], ids.expand(rows, -1))
    assert sequences.shape == (rows, ids.shape[1] + 5)


@pytest.mark.parametrize(
    "guesses", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": planted_host(seed=1)[0]}], ids=["lookup", "draft"]
)
def test_assisted_decoding_gives_the_greedy_answer(guesses):
    """Guesses are made for the shorter prompt, so that they are checked on what was kept."""
    hidden = planted(tokens=1000, seed=11)
    ids = prompt_of(hidden)
    with headway.use(MODEL, driver(hidden)):
        want = MODEL.generate(ids, **GREEDY)
        with Counting(MODEL) as count:
            got = MODEL.generate(ids, **GREEDY, **guesses)
    assert got.tolist() == want.tolist()
    assert max(count.lengths) < 256 < ids.shape[1]


@pytest.mark.parametrize("by", ["keyword", "config", "position"])
def test_total_lengths_count_the_whole_prompt(by):
    hidden = planted()
    ids = prompt_of(hidden)
    total = {"max_length": ids.shape[1] + 3, "min_length": ids.shape[1] + 3}
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=1, **total)
    options = {"do_sample": False, "pad_token_id": 0, **total} if by == "keyword" else {"generation_config": config}
    given = dict(options)
    with headway.use(MODEL, driver(hidden)):
        out = MODEL.generate(ids, config) if by == "position" else MODEL.generate(ids, **options)
    assert out.shape[1] == ids.shape[1] + 3
    assert options == given
    assert (config.max_length, config.max_new_tokens) == (ids.shape[1] + 3, None)


@pytest.mark.parametrize("beyond", [3, -400])
def test_a_models_own_total_length_counts_the_whole_prompt_unless_that_is_longer(beyond, monkeypatch):
    """A prompt longer than the model's own limit is what the method is for: then the limit is that of the answer."""
    hidden, found = planted(), []
    ids = prompt_of(hidden)
    monkeypatch.setattr(MODEL.generation_config, "max_length", ids.shape[1] + beyond)
    with headway.use(MODEL, driver(hidden, found=found)):
        out = MODEL.generate(ids, do_sample=False, pad_token_id=0, eos_token_id=None)
    counted = ids.shape[1] if beyond > 0 else len(found[0].prompt_ids)
    assert out.shape[1] - ids.shape[1] == ids.shape[1] + beyond - counted > 0


def test_room_is_left_for_the_answer_that_a_config_allows():
    """Kept text, question and answer stay within the model's positions, whoever says how long the answer may be."""
    hidden = planted(tokens=1000, seed=11)
    ids = prompt_of(hidden)
    length = {"max_new_tokens": 150, "min_new_tokens": 150}
    config = GenerationConfig(do_sample=False, pad_token_id=0, eos_token_id=None, **length)
    for options in ({"generation_config": config}, {"do_sample": False, "pad_token_id": 0, **length}):
        found = []
        with headway.use(MODEL, driver(hidden, budget=None, topk=None, found=found)):
            out = MODEL.generate(ids, **options)
        assert out.shape[1] == ids.shape[1] + 150
        assert 80 < len(found[0].prompt_ids) <= 256 - 150


def test_the_last_paragraph_asks_when_a_tokenizer_can_tell_it():
    _, tokenizer = planted_host()

    class Paragraphs:
        chat_template = None

        def __call__(self, text, **_):
            return {"input_ids": [ord(c) for c in text]}

        def decode(self, ids, **_):
            return "".join(map(chr, ids))

    ids = [ord(c) for c in "text. " * 30 + "\n\nwho?\nIt is"]
    assert InfiniRetri(tokenizer=Paragraphs())._question(ids) == len("\n\nwho?\nIt is")
    assert InfiniRetri(tokenizer=tokenizer)._question(list(range(20, 60))) == 10
    assert InfiniRetri()._question(list(range(2000))) == 128


def test_special_and_template_tokens_at_the_start_always_stay():
    class Templated:
        chat_template = "yes"

        def __call__(self, text, add_special_tokens=True, **_):
            return {"input_ids": [7] * add_special_tokens + [ord(c) for c in text]}

        def apply_chat_template(self, messages, **_):
            return f"<user>{messages[0]['content']}<end>"

    stage = InfiniRetri(tokenizer=Templated())
    assert stage._head([ord(c) for c in "<user>text"]) == 6
    assert stage._head([7, *(ord(c) for c in "text")]) == 1
    assert stage._head([ord(c) for c in "text"]) == 0


def test_what_cannot_be_driven_is_refused():
    hidden = planted()
    ids = prompt_of(hidden)
    with headway.use(MODEL, driver(hidden)):
        with pytest.raises(ArgumentError, match="inputs_embeds: got"):
            MODEL.generate(inputs_embeds=torch.randn(1, 4, 128), **GREEDY)
        with pytest.raises(ArgumentError, match="position_ids: got"):
            MODEL.generate(ids, position_ids=torch.arange(ids.shape[1])[None], **GREEDY)
        with torch.no_grad():
            cache = MODEL(ids[:, :10], use_cache=True).past_key_values
        with pytest.raises(ArgumentError, match="past_key_values: got a cache with 10 tokens"):
            MODEL.generate(ids, past_key_values=cache, **GREEDY)
        with pytest.raises(ArgumentError, match=r"inputs: got torch\.float32"):
            MODEL.generate(torch.randn(1, 4), **GREEDY)
    with headway.use(MODEL, driver(hidden, question=ids.shape[1])), pytest.raises(ArgumentError, match="question: got"):
        MODEL.generate(ids, **GREEDY)
    with headway.use(MODEL, driver(hidden, window=230)), pytest.raises(ArgumentError, match="exceeds the model's 256"):
        MODEL.generate(ids, **GREEDY)
    with (
        headway.use(MODEL, driver(hidden, budget=None, share=0.01)),
        pytest.raises(ArgumentError, match="expected room to keep a sentence"),
    ):
        MODEL.generate(ids, **GREEDY)


def test_a_share_that_leaves_no_room_for_new_text_is_refused():
    hidden = planted(tokens=400)
    stage = driver(hidden, budget=None, share=0.6)
    with pytest.raises(ArgumentError, match=r"share: got 0\.6 of .* leaves 0 of 256 positions"):
        stage.read(MODEL, prompt_of(hidden)[0].tolist() * 2)


def test_a_host_without_attention_is_refused():
    model, _ = tiny_host("mamba")
    with pytest.raises(InterceptionError, match="state-space"):
        headway.use(model, InfiniRetri()).attach()


def test_an_encoder_decoder_is_refused():
    model, inputs = t5()
    with pytest.raises(HeadwayError), headway.use(model, InfiniRetri(window=20, limit=100), example=inputs):
        model.generate(inputs["input_ids"], max_new_tokens=2)


@pytest.mark.parametrize(
    "options",
    [{"question": 0}, {"head": -1}, {"above": -1}, {"share": 0.0}, {"share": 1.5}, {"share": 0.5, "budget": 9}],
)
def test_driver_settings_that_cannot_be_used_are_named(options):
    with pytest.raises(ArgumentError, match=f"{next(iter(options))}.*: got"):
        InfiniRetri(**options)


@pytest.mark.real
def test_a_middle_layer_of_a_real_model_keeps_a_needle_that_its_window_would_not_hold():
    from headway.hosts import default_text, load

    model, tokenizer = load("smollm2", dtype="bfloat16")
    text = default_text().text
    needle = " The secret code of the violin is 48271."
    source = text[:2000] + needle + text[2000:6000]
    found = retrieve(
        model,
        tokenizer,
        source,
        "What is the secret code of the violin?",
        settings=Settings(window=400, budget=120, topk=40, layer=21, limit=700),
        max_new_tokens=8,
    )
    assert len(found.passes) >= 3
    assert needle.strip() in found.text
    assert all(source[item.sentence.start : item.sentence.stop] == item.sentence.text for item in found.kept)
