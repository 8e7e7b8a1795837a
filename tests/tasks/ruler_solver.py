"""Answers to RULER-like prompts by reading them: what a perfect model would say, from nothing but the prompt's text.

`solving` makes a host give these answers token by token, through its own forward and whatever cache it runs with."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

#: Logit of the answer's next token above all others.
SURE = 30.0


def asked(prompt: str) -> tuple[str, str, str] | None:
    """Context, question and answer prefix of a prompt; None for a text that does not end with a question."""
    context, found, end = prompt.rpartition("\n\n")
    question, line, prefix = end.partition("\n")
    return (context, question, prefix) if found and line and "?" in question else None


def solve(context: str, question: str) -> list[str]:
    """The strings that the question wants."""
    if found := re.fullmatch(r"What (?:is|are)(?: all)? the secret (\w+?)s? of (.+)\?", question):
        wanted = re.split(r", | and ", found[2])
        return [v for name in wanted for v in re.findall(rf"The secret {found[1]} of {name} is ([\w-]+)\.", context)]
    if found := re.match(r"Which variables have the value (\w+),", question):
        names: list[str] = []
        for name, value in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)\.", context):
            if value in (found[1], *names):
                names.append(name)
        return names
    if question.startswith("Which are the 10 most common words"):
        return [word for word, _ in Counter(re.findall(r"\d+\. (\S+)", context)).most_common(10)]
    if question.startswith("Which are the 3 words of the coded text"):
        return [word for word, _ in Counter(context.split("\n\n")[1].split()).most_common(4)[1:]]
    description = question.partition("described like this? ")[2]
    (name,) = re.findall(rf"{re.escape(description)} The name of the function is ([\w.]+)\.(?:\s|$)", context)
    if question.startswith("Which function"):
        return [name.rpartition(".")[2]]
    return re.findall(rf"Where things are: {re.escape(name)} is kept on the shelf ([\w-]+)\.", context)


@contextmanager
def solving(host: nn.Module, tokenizer: Any, change: Callable[[list[str]], list[str]] = list) -> Iterator[nn.Module]:
    """The host says what `solve` finds in the tokens it was fed since its cache was empty, after `change`."""

    def say(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        cache = output.past_key_values
        if cache is None or "input_ids" not in kwargs:
            return
        cache.fed = [*getattr(cache, "fed", []), *kwargs["input_ids"][0].tolist()]
        text = tokenizer.decode(cache.fed, clean_up_tokenization_spaces=False)
        parts = asked(text)
        if parts is None:
            return
        context, question, said = parts
        prefix = re.match(r".*? (?:is|are)(?= |$)", said)
        if prefix is None:
            return
        whole = prefix[0] + " " + " ".join(change(solve(context, question)))
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        at = len(tokenizer(said, add_special_tokens=False)["input_ids"])
        output.logits[0, -1] = 0.0
        output.logits[0, -1, ids[at] if at < len(ids) else tokenizer.eos_token_id] = SURE

    handle = host.register_forward_hook(say, with_kwargs=True)
    try:
        yield host
    finally:
        handle.remove()
