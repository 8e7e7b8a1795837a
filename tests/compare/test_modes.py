"""Question-blind and question-aware: what a host is shown, and when."""

from __future__ import annotations

import pytest
import torch

import headway
from headway.compare.baselines import PlainWindow
from headway.compare.quality import TASKS
from headway.compare.setting import Setting
from headway.hosts import default_text, tokenize
from headway.tasks.samples import Sample
from headway.tasks.turns import SharedContext
from tests.look.tiny import byte_tokenizer, tiny_llama
from tests.tasks.recaller import Recaller, TokenCache
from tests.tasks.test_samples import TEMPLATE

TOKENIZER = byte_tokenizer()
HOST = tiny_llama(num_hidden_layers=1, max_position_embeddings=2048)
ASKING = ["passkey", "needle", "recall", "turns", "niah_single_1", "niah_multikey_1", "qa_1"]
TOKENS = 1400


def setting_of(host: torch.nn.Module, *, chat: bool = False) -> Setting:
    text = default_text()
    tokenizer = byte_tokenizer() if chat else TOKENIZER
    tokenizer.chat_template = TEMPLATE if chat else None
    return Setting(
        model=host, tokenizer=tokenizer, text=text, ids=tokenize(TOKENIZER, text, TOKENS), count=1, seed=0,
        modes=("blind", "aware"), chunk=None, chat=chat,
    )  # fmt: skip


def samples_of(task: str, *, chat: bool = False) -> list[Sample]:
    found = TASKS[task].prepare(setting_of(HOST, chat=chat))
    return [s for one in found for s in (one.questions if isinstance(one, SharedContext) else [one])]


class Shown:
    """What a host is fed, request by request: the tokens of each forward since its cache was empty."""

    def __init__(self, host: torch.nn.Module) -> None:
        self.requests: list[list[torch.Tensor]] = []
        self.handle = host.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module, args, kwargs):
        if kwargs.get("past_key_values") is None:
            self.requests.append([])
        self.requests[-1].append(kwargs["input_ids"].clone())


def shown(task: str, mode: str) -> list[list[torch.Tensor]]:
    watch = Shown(HOST)
    try:
        headway.compare(
            HOST, TOKENIZER, default_text(), methods=[("window", PlainWindow(window=50))], tasks=[task], modes=[mode],
            tokens=TOKENS, count=1, repeats=2, new_tokens=2,
        )  # fmt: skip
    finally:
        watch.handle.remove()
    return watch.requests


@pytest.mark.parametrize("task", ASKING)
def test_blind_prefills_the_context_alone_and_aware_the_same_tokens_with_the_question(task):
    samples = samples_of(task)
    first = [request[0] for request in shown(task, "blind")]
    contexts = {tuple(s.context_ids[0].tolist()) for s in samples}
    prompts = {tuple(s.prompt_ids[0].tolist()) for s in samples}
    blind = {tuple(ids[0].tolist()) for ids in first}
    aware = {tuple(request[0][0].tolist()) for request in shown(task, "aware")}
    assert contexts <= blind
    assert not blind & prompts
    assert prompts <= aware
    assert not aware & contexts
    for ids in first:
        text = TOKENIZER.decode(ids[0])
        assert not any(sample.question.strip() in text for sample in samples)


@pytest.mark.parametrize("task", ASKING)
def test_in_a_chat_context_and_question_are_the_users_and_the_prefix_begins_the_answer(task):
    """Blind, the beginning of the template and the context are read first; the prompt is as long as without it."""
    for plain, sample in zip(samples_of(task), samples_of(task, chat=True), strict=True):
        text = TOKENIZER.decode(sample.prompt_ids[0], clean_up_tokenization_spaces=False)
        user, mark, said = text.partition("</u><a>")
        assert mark
        assert text.startswith("<u>")
        assert sample.context in user
        assert user.endswith(sample.question.rstrip())
        assert said == sample.prefix
        assert "<a>" not in TOKENIZER.decode(sample.context_ids[0])
        assert abs(sample.prompt_tokens - plain.prompt_tokens) < 0.1 * TOKENS


def test_cells_of_a_chat_are_others_and_times_are_the_same(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    options = {"tasks": ["passkey"], "modes": ["aware"], "tokens": 600, "count": 1, "repeats": 2, "new_tokens": 2}
    methods = [("window", PlainWindow(window=50))]
    reused = []
    for chat in (False, True):
        found = headway.compare(
            HOST, tokenizer, default_text(), methods=methods, out=tmp_path, chat=chat, **options
        )  # fmt: skip
        assert found.run["chat_template"] is chat
        reused.append((found.run["cells_measured"], found.run["cells_reused"]))
    assert reused == [(4, 0), (2, 2)]


class Peeking(Recaller):
    """Cheats: at the end of the first forward it keeps what stands where its last tokens stood before, and those."""

    AFTER = 24

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        output = super().forward(input_ids, past_key_values, use_cache, logits_to_keep)
        cache: TokenCache = output.past_key_values
        if past_key_values is None:
            tokens = cache.tokens.tolist()
            recent = tokens[-self.match :]
            places = [i for i in range(self.match, len(tokens)) if tokens[i - self.match : i] == recent]
            kept = [t for i in places for t in tokens[i - self.match : i + self.AFTER]]
            cache.tokens = torch.tensor(kept + recent)
        return output


@pytest.mark.parametrize("task", ["passkey", "needle", "turns", "niah_single_1", "niah_multikey_1"])
def test_a_cache_that_cheats_by_looking_at_the_question_is_right_when_aware_and_wrong_when_blind(task):
    task, scores = TASKS[task], {}
    for host in (Recaller(match=12), Peeking(match=12)):
        setting = setting_of(host)
        material = task.prepare(setting)
        scores[type(host)] = [task.measure(setting, material, mode, False)[0][0].value for mode in ("blind", "aware")]
    assert scores[Recaller] == [1.0, 1.0]
    assert scores[Peeking] == [0.0, 1.0]
