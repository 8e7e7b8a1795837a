"""InfiniRetri around `generate`: a prompt that is too long is read in chunks first, and answered from what was kept.

    prompt = head  context  question     →   generate( head  kept sentences  question ) ,  new tokens behind the prompt

The driver works on the prompt's own tokens: what is generated from is a subsequence of them.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from headway.door.call import Site
from headway.door.stages import Driver
from headway.errors import ArgumentError, HostError, check_whole, is_number
from headway.methods.budget import check_share
from headway.methods.long_context.infiniretri.rows import HostRows, scoring_sites
from headway.methods.long_context.infiniretri.scan import Frame, Retrieval, Scan
from headway.methods.long_context.infiniretri.sentences import RUN, sentences_of_ids, token_texts
from headway.methods.long_context.infiniretri.settings import ANSWER, TOPK, WINDOW, Settings, positions
from headway.tasks.samples import chat_frame, opening_ids, plain_ids

#: Tokens at the end of a prompt that may be its question: about the 512 characters of the released code.
QUESTION_TOKENS = 128
#: Unless it is told, the question takes at most this share of a prompt.
QUESTION_SHARE = 0.25


@dataclass(frozen=True, kw_only=True)
class InfiniRetri(Settings, Driver):
    """Settings (see there), and how a prompt is taken apart.

    tokenizer: tells sentences apart; without one sentences are runs of 16 tokens.
    question: tokens at the prompt's end that ask. None: the last paragraph, at most 128 tokens and a quarter of the
        prompt (the tokenizer tells paragraphs; without one, so many tokens).
    head: tokens at the prompt's start that always stay. None: the special tokens and the chat template's opening.
    share: part of the prompt's tokens that is answered from, question and head included, in place of `budget`; 1 is
        the plain model.
    above: prompts of up to so many tokens go to the plain model.
    found: a list of the caller's, to which the Retrieval of every prompt that was read is appended."""

    tokenizer: Any = None
    question: int | None = None
    head: int | None = None
    share: float | None = None
    above: int = 0
    found: list[Retrieval] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("question", 1), ("head", 0), ("above", 0)):
            check_whole(name, getattr(self, name), least, optional=name != "above")
        if self.share is not None and not (is_number(self.share) and 0 < self.share <= 1):
            raise ArgumentError(f"share: got {self.share!r}, expected a part in (0, 1]; 1 is the plain model.")
        if self.share is not None and self.budget is not None:
            raise ArgumentError(f"share, budget: got {self.share} and {self.budget}, expected one of them.")

    def prepare(self, sites: Sequence[Site]) -> None:
        """Refuses layers and heads that cannot score."""
        if sites and self.share != 1:
            scoring_sites(sites, self.layer, self.heads, self.window + (self.budget or 0))

    def generate(self, model: nn.Module, generate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The host's own output, whose sequences begin with the whole prompt. Scores, attentions and hidden states in
        it are those of the shorter one. A batch is read row by row and answered as one. Assisted decoding guesses and
        checks on the shorter prompt, and gives the greedy answer."""
        named = _named(model, args) | kwargs
        ids = _prompt(named)
        if self.share == 1 or ids is None:
            return generate(*args, **kwargs)
        _refuse(model, named)
        mask = named.get("attention_mask")
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        rows = [row[seen].tolist() for row, seen in zip(ids, real, strict=True)]
        options, answer = _lengths(model, named, ids.shape[1])
        found = [self.read(model, row, answer=answer) for row in rows]
        if all(item is None for item in found):
            return generate(*args, **kwargs)
        if self.found is not None:
            self.found.extend(item for item in found if item is not None)
        prompts = [row if item is None else list(item.prompt_ids) for row, item in zip(rows, found, strict=True)]
        shorter, shorter_mask = _batch(prompts, ids)
        options |= {"attention_mask": shorter_mask}
        if options.get("streamer") is not None:
            options["streamer"] = _WholePrompt(options["streamer"], ids)
        out = generate(shorter, **options)
        return _with_whole_prompt(out, ids, shorter.shape[1])

    def read(self, model: nn.Module, ids: Sequence[int], *, answer: int = ANSWER) -> Retrieval | None:
        """What is kept of one prompt of tokens; None when it goes to the plain model as it is."""
        if len(ids) <= self.above or self.share == 1:
            return None
        question = self._question(ids)
        head = min(self._head(ids), len(ids) - question)
        context = list(ids[head : len(ids) - question])
        if not context:
            return None
        frame = Frame(before=tuple(ids[:head]), after=tuple(ids[len(ids) - question :]), first=0, last=question)
        settings, budget = self._sizes(model, len(ids), frame.tokens, answer)
        limit = positions(model, self)
        with HostRows(
            model,
            layer=self.layer,
            heads=self.heads,
            reach=frame.tokens + budget + settings.window,
            early_stop=self.early_stop,
            title=self.title,
        ) as rows:
            scan = Scan(settings=settings, frame=frame, attend=rows, budget=budget, limit=limit)
            return scan.run(sentences_of_ids(context, self.tokenizer, settings.longest(budget)))

    def _sizes(self, model: nn.Module, tokens: int, fixed: int, answer: int) -> tuple[Settings, int]:
        """Settings and budget for one prompt. At a share the window gives way so that both fit the model."""
        limit = positions(model, self)
        if self.share is None:
            return self, self.budget_for(limit, fixed, answer)
        budget = int(self.share * tokens) - fixed
        if budget < 1:
            raise ArgumentError(
                f"share: got {self.share:g} of {tokens:,} tokens with {fixed:,} of head and question, expected room to "
                "keep a sentence. Give a larger share, or tell the question's tokens with question=…."
            )
        room = self.window if limit is None else min(self.window, limit - fixed - budget)
        if room < min(self.window, RUN):
            raise ArgumentError(
                f"share: got {self.share:g} of {tokens:,} tokens, which leaves {max(room, 0)} of {limit:,} positions "
                "for new text, expected room for a sentence. Give a smaller share."
            )
        settings = replace(self, share=None, budget=budget, window=room)
        return settings, settings.budget_for(limit, fixed, answer)

    def _question(self, ids: Sequence[int]) -> int:
        if self.question is not None:
            if self.question >= len(ids):
                raise ArgumentError(
                    f"question: got {self.question} tokens for a prompt of {len(ids)}, expected fewer. Put the context "
                    "before the question."
                )
            return self.question
        most = max(min(QUESTION_TOKENS, int(QUESTION_SHARE * len(ids))), 1)
        if self.tokenizer is None:
            return most
        texts = token_texts(self.tokenizer, list(ids[-most:]))
        text, at = "".join(texts), 0
        start = text.rstrip().rfind("\n\n")
        if start < 0:
            return most
        for number, piece in enumerate(texts):
            if at >= start:
                return most - number
            at += len(piece)
        return most

    def _head(self, ids: Sequence[int]) -> int:
        if self.head is not None:
            return self.head
        if self.tokenizer is None:
            return 0
        openings = [opening_ids(self.tokenizer)]
        if getattr(self.tokenizer, "chat_template", None):
            openings.append(plain_ids(self.tokenizer, chat_frame(self.tokenizer)[0]))
        return max(len(opening) if list(ids[: len(opening)]) == opening else 0 for opening in openings)


def at_budget(share: float, *, tokens: int, model: nn.Module) -> tuple[InfiniRetri, ...]:
    """A driver that answers from about `share` of the prompt's tokens; share 1 is the plain model.

    It knows no tokenizer, so its sentences are runs of tokens; give it one with `dataclasses.replace`."""
    check_share(share, tokens)
    return (InfiniRetri(share=float(share), topk=None if share < 1 else TOPK, window=min(WINDOW, tokens)),)


class _WholePrompt:
    """Gives a streamer the prompt that the caller gave, then the new tokens."""

    def __init__(self, streamer: Any, ids: Tensor) -> None:
        self.streamer, self.ids, self.begun = streamer, ids, False

    def put(self, value: Tensor) -> None:
        self.streamer.put(value if self.begun else self.ids.cpu())
        self.begun = True

    def end(self) -> None:
        self.streamer.end()


def _named(model: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments of `generate` by the names that the host gives them; the first is the prompt."""
    host: Any = type(model)
    return dict(zip(["inputs", *[*inspect.signature(host.generate).parameters][2:]], args, strict=False))


def _prompt(named: dict[str, Any]) -> Tensor | None:
    """The prompt's tokens; None where there are none."""
    given = named.get("inputs")
    if given is None:
        given = named.get("input_ids")
    if named.get("inputs_embeds") is not None:
        raise ArgumentError("inputs_embeds: got embeddings, expected input_ids: InfiniRetri keeps sentences of tokens.")
    if isinstance(given, Tensor) and (given.ndim != 2 or given.is_floating_point()):
        raise ArgumentError(
            f"inputs: got {given.dtype} of shape {tuple(given.shape)}, expected tokens (batch, tokens)."
        )
    return given if isinstance(given, Tensor) and given.shape[1] else None


def _refuse(model: nn.Module, kwargs: dict[str, Any]) -> None:
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise HostError(
            f"model: got {type(model).__name__}, an encoder-decoder; expected a decoder that reads context and "
            "question in one prompt."
        )
    cache = kwargs.get("past_key_values")
    if cache is not None and int(cache.get_seq_length()):
        raise ArgumentError(
            f"past_key_values: got a cache with {int(cache.get_seq_length()):,} tokens, expected none: InfiniRetri "
            "reads the whole prompt. Pass the whole conversation as the prompt."
        )
    for name in ("position_ids", "token_type_ids"):
        if kwargs.get(name) is not None:
            raise ArgumentError(f"{name}: got one for the whole prompt, expected none: the answer has a shorter one.")


def _lengths(model: nn.Module, named: dict[str, Any], prompt: int) -> tuple[dict[str, Any], int]:
    """The options for the shorter prompt, and the most tokens of an answer: total lengths, which count the prompt,
    become counts of new tokens. The caller's config is not touched."""
    options = {k: v for k, v in named.items() if k not in ("inputs", "input_ids", "attention_mask")}
    own: Any = getattr(model, "generation_config", None)
    config: Any = options.get("generation_config")
    if config is not None:
        config = options["generation_config"] = copy.deepcopy(config)
    for total, new, least in (("max_length", "max_new_tokens", 1), ("min_length", "min_new_tokens", 0)):
        given = options.pop(total, None)
        if given is not None and options.get(new) is None:
            options[new] = max(int(given) - prompt, least)
        elif config is not None and getattr(config, new, None) is None and getattr(config, total, None):
            setattr(config, new, max(int(getattr(config, total)) - prompt, least))
            setattr(config, total, None)
    counts = [options.get("max_new_tokens"), *(getattr(held, "max_new_tokens", None) for held in (config, own))]
    found = next((count for count in counts if count), None)
    longest = getattr(own, "max_length", None) or 0
    if found is None and longest > prompt:
        # The model's own limit. A prompt beyond it is one that the plain model would refuse: there it is no measure.
        found = options["max_new_tokens"] = longest - prompt
    return options, found or ANSWER


def _batch(prompts: Sequence[Sequence[int]], like: Tensor) -> tuple[Int[Tensor, "batch tokens"], Tensor]:
    """Prompts of different lengths as one batch, padded on the left, and its attention mask."""
    longest = max(len(prompt) for prompt in prompts)
    ids = like.new_zeros(len(prompts), longest)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long, device=like.device)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(list(prompt), device=like.device)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


def _with_whole_prompt(out: Any, ids: Tensor, shorter: int) -> Any:
    """The output with the whole prompt in front of the new tokens (of every beam or sample of a row)."""
    sequences = out if isinstance(out, Tensor) else out.sequences
    each = sequences.shape[0] // ids.shape[0]
    whole = torch.cat([ids.repeat_interleave(each, 0).to(sequences), sequences[:, shorter:]], 1)
    if isinstance(out, Tensor):
        return whole
    out.sequences = whole
    return out
