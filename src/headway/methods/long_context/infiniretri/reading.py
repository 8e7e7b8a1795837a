"""`retrieve` and `answer`: a question about a text of any length, by a model with few positions.

The prompt is  template(context, question) , with `{context}` and `{question}` in it once each. Its parts are tokenized
apart, so where context and question stand is known and not searched for: any template works, and a question that also
stands in the text is no trouble. Nothing here needs eager attention.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headway.errors import ArgumentError
from headway.files import write_atomically
from headway.hosts.fingerprint import Fingerprint, fingerprint
from headway.methods.long_context.infiniretri.rows import HostRows
from headway.methods.long_context.infiniretri.scan import Frame, Pass, Retrieval, Scan
from headway.methods.long_context.infiniretri.sentences import Sentence, pack, sentences_of_text
from headway.methods.long_context.infiniretri.settings import ANSWER, Settings, positions
from headway.tasks.answering import ending_ids
from headway.tasks.samples import chat_frame, opening_ids, plain_ids

TEMPLATE = "Read the text and answer the question about it.\n\n{context}\n\nQuestion: {question}\nAnswer:"
#: Without a question the end of the text is it: so many characters, as in the released code.
QUESTION_CHARACTERS = 512


@dataclass(frozen=True, kw_only=True)
class LongAnswer:
    """The answer's text and tokens, and what it was given from."""

    text: str
    ids: tuple[int, ...]
    retrieval: Retrieval


def frame_of(
    tokenizer: Any, question: str, template: str = TEMPLATE, *, chat: bool = False, everything: bool = False
) -> Frame:
    """The tokens around the context. With `chat` the template is the user's message in the tokenizer's chat template.

    A question before the context cannot see it: then, and with `everything`, all that stands behind the context
    scores. Raises ArgumentError for a template without its two slots or with nothing behind the context."""
    for slot in ("{context}", "{question}"):
        if template.count(slot) != 1:
            raise ArgumentError(f"template: got {slot} {template.count(slot)} times in {template!r}, expected it once.")
    if not question.strip():
        raise ArgumentError("question: got an empty one, expected some words, or None for the end of the text.")
    head, tail = chat_frame(tokenizer) if chat else ("", "")
    opening = () if chat else tuple(opening_ids(tokenizer))
    before, _, after = template.partition("{context}")
    if "{question}" in before or everything:
        texts = [after.replace("{question}", question) + tail]
        before = before.replace("{question}", question)
        numbers = (0, 1)
    else:
        between, _, rest = after.partition("{question}")
        bare = between.rstrip()
        # White space goes with the question, so that its first token is that of running text.
        texts = [bare, between[len(bare) :] + question, rest + tail]
        numbers = (1, 2)
    pieces = [plain_ids(tokenizer, text) if text else [] for text in texts]
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    return Frame(
        before=(*opening, *plain_ids(tokenizer, head + before)),
        after=tuple(chain.from_iterable(pieces)),
        first=ends[numbers[0]],
        last=ends[numbers[1]],
    )


def retrieve(
    model: nn.Module,
    tokenizer: Any,
    context: str | Iterable[str],
    question: str | None,
    *,
    settings: Settings | None = None,
    template: str = TEMPLATE,
    chat: bool = False,
    max_new_tokens: int = ANSWER,
    progress: Callable[[Pass], None] | None = None,
    checkpoint: str | Path | None = None,
) -> Retrieval:
    """Reads a text, or the parts of one as they come, and keeps the sentences that the question attends to.

    Only the kept sentences, one chunk and a short record per pass are held. `max_new_tokens` is room left for an
    answer. `progress` is called after every pass. `checkpoint` is a file that holds the state after every pass: a run
    that was interrupted goes on from there when it is given the same text again, and raises ArgumentError when it is
    given another model, text, question or setting.

    Sizes are checked before anything runs: a pass or an answer never exceeds the model's positions."""
    settings = Settings() if settings is None else settings
    if max_new_tokens < 0:
        raise ArgumentError(f"max_new_tokens: got {max_new_tokens}, expected at least 0.")
    if isinstance(context, str) and not context.strip():
        raise ArgumentError("context: got an empty one, expected some text to read.")
    everything = question is None
    if question is None:
        context, question = _end_as_question(context)
    frame = frame_of(tokenizer, question, template, chat=chat, everything=everything)
    limit = positions(model, settings)
    budget = settings.budget_for(limit, frame.tokens, max_new_tokens)
    sentences = sentences_of_text(context, tokenizer, settings.longest(budget))
    reach = frame.tokens + budget + settings.window
    with HostRows(
        model, layer=settings.layer, heads=settings.heads, reach=reach, early_stop=settings.early_stop
    ) as rows:
        scan = Scan(settings=settings, frame=frame, attend=rows, budget=budget, limit=limit)
        record = None if checkpoint is None else _Checkpoint(Path(checkpoint), scan, fingerprint(model))
        for chunk in pack(sentences, settings.window):
            if record is not None and record.has(chunk):
                continue
            done = scan.step(chunk)
            if record is not None:
                record.write(chunk)
            if progress is not None:
                progress(done)
    if record is not None:
        record.check_end()
    if not scan.passes:
        raise ArgumentError("context: got an empty one, expected some text to read.")
    return scan.result()


def answer(
    model: nn.Module,
    tokenizer: Any,
    context: str | Iterable[str],
    question: str | None,
    *,
    max_new_tokens: int = ANSWER,
    temperature: float = 0.0,
    **options: Any,
) -> LongAnswer:
    """Retrieves (see `retrieve` for `options`), then answers from what was kept: greedily, or by sampling when
    `temperature` is above 0. The released code's temperature of 0.5 has no effect there, so greedy is the default."""
    if not temperature >= 0:
        raise ArgumentError(f"temperature: got {temperature}, expected 0 for greedy answers, or more.")
    found = retrieve(model, tokenizer, context, question, max_new_tokens=max_new_tokens, **options)
    ends = sorted(ending_ids(model, tokenizer))
    prompt = torch.tensor([found.prompt_ids], device=next(model.parameters()).device)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    generate: Any = model.generate
    out = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=max_new_tokens,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **sampling,
    )
    ids = tuple(token for token in out[0, prompt.shape[1] :].tolist() if token not in ends)
    return LongAnswer(text=tokenizer.decode(ids, skip_special_tokens=True), ids=ids, retrieval=found)


class _Checkpoint:
    """The state of a scan in a file, the model that read, and the digest of the text that it has read."""

    def __init__(self, path: Path, scan: Scan, model: Fingerprint) -> None:
        self.path, self.scan, self.model = path, scan, model
        self.run = hashlib.sha256(f"{scan.settings!r} {scan.frame!r} {scan.budget}".encode()).hexdigest()
        self.digest = hashlib.sha256()
        self.skip = self.skipped = 0
        self.expected = ""
        if path.exists():
            try:
                state = json.loads(path.read_text(encoding="utf-8"))
                run, stored, self.expected = state["run"], state["scan"], state["digest"]
                other = Fingerprint.from_dict(state["model"]).differences(model)
            except (ValueError, KeyError, TypeError) as error:
                raise self._other(f"no run at all ({type(error).__name__})") from error
            if run != self.run:
                raise self._other("other settings or another question")
            if other:
                raise self._other(f"another model ({'; '.join(other)})")
            scan.restore(stored)
            self.skip = len(scan.passes)

    def has(self, chunk: list[Sentence]) -> bool:
        """Whether a chunk was read before the interruption."""
        for sentence in chunk:
            self.digest.update(sentence.text.encode("utf-8", "surrogatepass"))
        if self.skipped == self.skip:
            return False
        self.skipped += 1
        if self.skipped == self.skip and self.digest.hexdigest() != self.expected:
            raise self._other("another text")
        return True

    def write(self, chunk: list[Sentence]) -> None:
        state = {
            "run": self.run,
            "model": self.model.to_dict(),
            "digest": self.digest.hexdigest(),
            "scan": self.scan.state(),
        }
        write_atomically(self.path, json.dumps(state))
        self.skip = self.skipped = len(self.scan.passes)

    def check_end(self) -> None:
        if self.skipped < self.skip:
            raise self._other("a longer text")

    def _other(self, what: str) -> ArgumentError:
        return ArgumentError(
            f"checkpoint: got {self.path.name}, which belongs to {what}, expected one of this run. Delete it to begin "
            "anew."
        )


def _end_as_question(context: str | Iterable[str]) -> tuple[str, str]:
    if not isinstance(context, str):
        raise ArgumentError("question: got None for a text that comes in parts, expected a question. Pass one.")
    rest, asked = context[:-QUESTION_CHARACTERS], context[-QUESTION_CHARACTERS:]
    if not rest.strip():
        raise ArgumentError(
            f"question: got None for a text of {len(context):,} characters, expected more than {QUESTION_CHARACTERS}, "
            "which stand for the question. Pass a question."
        )
    return rest, asked
