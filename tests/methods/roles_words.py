"""A tiny chat model whose tokens are words, for tests of prompts in conflict."""

from __future__ import annotations

import re
from typing import Any

from headway.hosts.tiny import tiny_host
from headway.methods.diagnosis.diagnose_localize_align.pairs import CLAUSES, FACTS, KINDS, RESPONSE

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}<assistant>"


def words_tokenizer(template: str | None = TEMPLATE) -> Any:
    """A fast tokenizer of whole words and signs, with a chat template."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    texts = [
        RESPONSE,
        *CLAUSES,
        "You are a helpful assistant . must always Planner Always Critic :",
        "Assistant System",
    ]
    texts += [
        "You are one of several agents . Answer the question .",
        "< > / system user assistant end User Mark 1 2 3 4 5",
    ]
    for kind in KINDS.values():
        texts += [*kind.rules, kind.question, *(answer(fact) for fact in FACTS for answer in kind.answers)]
    texts += [fact.question for fact in FACTS]
    words = sorted({word for text in texts for word in re.findall(r"\w+|[^\w\s]", text)})
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "isolated")]
    )
    found = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")
    found.chat_template = template
    return found


def words_model(tokenizer: Any, **options: Any) -> Any:
    return tiny_host(
        "llama",
        **{"num_hidden_layers": 3, "vocab_size": len(tokenizer), "max_position_embeddings": 512, **options},
    )[0].eval()
