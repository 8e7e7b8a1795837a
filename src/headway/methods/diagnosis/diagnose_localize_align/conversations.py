"""Conversation logs of agents: JSON lines in, turns out.

One line is one conversation (one query). Formats of common frameworks are told apart by their fields:

    turns      {"question", "turns": [{"role", "reply"}]}                         the plain form; all fields below too
    messages   {"messages": [{"role": "system|user|assistant", "content", "name"?}]}       chat interfaces
    sharegpt   {"conversations": [{"from": "human|gpt", "value"}]}                         data sets of chats
    langchain  {"messages": [{"type": "human|ai|system", "content", "name"?}]}             LangChain, LangGraph; the
                                                                                           fields may stand in "data"
    autogen    {"question", "chat_history": [{"name" or "source", "content"}]}             round 0 is the task itself
    dylan      {"question", "replies": [{"role", "reply"}]}
    macnet     {"question", "nodes": [{"system_message", "actor_prompt", "actor_response"}]}
    consistency {"question", "responses": [{"content"}]}                                   Self-Consistency; round 0 too
    crewai     {"question", "tasks_output": [{"agent", "raw", "description"?}]}

Any line may carry "id", "condition" (compared in the result, such as neutral and conflict; one id may stand once under
each), and "rules" for the rule judge. A malformed line is an error that names it, or is left out and told, as the
caller chose; never lost in silence. Turns without a role or without a reply are not scored and are counted.

The extraction follows the released code of arXiv 2509.23188 for AutoGen, DyLAN, MacNet and Self-Consistency.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headway.errors import ArgumentError, unknown
from headway.hosts.rows import check_policy

FORMATS = (
    "auto", "turns", "messages", "sharegpt", "langchain", "autogen", "dylan", "macnet", "consistency", "crewai",
)  # fmt: skip
#: Formats that the field of their turns tells.
_KEYS = {
    "turns": "turns", "autogen": "chat_history", "dylan": "replies", "macnet": "nodes", "consistency": "responses",
    "crewai": "tasks_output", "sharegpt": "conversations",
}  # fmt: skip
#: Bad lines that an error lists.
LISTED = 5


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the rule judge checks. `constraints` are regular expressions that a reply must match (a leading "!" turns
    one around: it must not), `forbidden` terms must not occur, `lexicon` are words of the role, `answers` accepted
    answers."""

    constraints: tuple[str, ...] = ()
    forbidden: tuple[str, ...] = ()
    lexicon: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rules:
        if not isinstance(data, Mapping):
            raise ValueError(f"rules: got {type(data).__name__}, expected a dictionary")
        names = cls.__dataclass_fields__
        for name in data:
            if name not in names:
                raise ValueError(f"rules: got {name!r}, expected one of {', '.join(names)}")
        found = cls(**{name: _texts(name, value) for name, value in data.items()})
        for pattern in found.constraints:
            try:
                re.compile(pattern.removeprefix("!"))
            except re.error as error:
                raise ValueError(f"rules.constraints: {pattern!r} is no regular expression ({error})") from None
        return found


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of one agent. `conversation` is the id of its query, `index` its number there, `line` where it was
    read."""

    conversation: str
    index: int
    role: str
    reply: str
    question: str = ""
    condition: str = ""
    rules: Rules = field(default_factory=Rules)
    line: int = 0


@dataclass(frozen=True)
class BadRow:
    """A line that could not be read, and why."""

    line: int
    reason: str


@dataclass(frozen=True)
class Conversations:
    """The turns of a log, the lines that were left out, and how many turns had no role or no reply."""

    turns: tuple[Turn, ...]
    bad: tuple[BadRow, ...] = ()
    empty: int = 0


def read_conversations(
    source: str | Path | Iterable[str], *, form: str = "auto", bad_rows: str = "refuse"
) -> Conversations:
    """Turns from a JSON-lines file, or from lines of text.

    bad_rows: "refuse" raises ArgumentError with the line numbers of malformed rows, "skip" leaves them out and lists
    them in the result. Raises ArgumentError for a file that cannot be read or holds no turn."""
    if form not in FORMATS:
        raise unknown("form", form, FORMATS)
    check_policy(bad_rows)
    turns: list[Turn] = []
    bad: list[BadRow] = []
    seen: dict[tuple[str, str], int] = {}
    empty = 0
    for number, text in enumerate(_lines(source), 1):
        if not text.strip():
            continue
        try:
            found, without = _conversation(json.loads(text), form, number)
            for name in {(turn.conversation, turn.condition) for turn in found}:
                if name in seen:
                    raise ValueError(f"id {name[0]!r} was used in line {seen[name]} already")
                seen[name] = number
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = f"lacks the field {error}" if isinstance(error, KeyError) else str(error)
            bad.append(BadRow(number, reason))
            continue
        turns += found
        empty += without
    if bad and bad_rows == "refuse":
        shown = "; ".join(f"line {row.line}: {row.reason}" for row in bad[:LISTED])
        more = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise ArgumentError(f"conversations: got {len(bad)} malformed rows ({shown}{more}). Mend them, or skip them.")
    if not turns:
        raise ArgumentError("conversations: got no turn with a role and a reply, expected at least one.")
    return Conversations(tuple(turns), tuple(bad), empty)


def _lines(source: str | Path | Iterable[str]) -> Iterable[str]:
    if not isinstance(source, str | Path):
        return source
    try:
        return Path(source).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(
            f"conversations: {source} cannot be read ({error}); expected a UTF-8 file of JSON lines."
        ) from None


def _conversation(row: Any, form: str, line: int) -> tuple[list[Turn], int]:
    """The turns of one line, and how many were empty."""
    if not isinstance(row, Mapping):
        raise ValueError(f"got {type(row).__name__}, expected a JSON object")
    chosen = _form_of(row) if form == "auto" else form
    # A field that is null is one that was not given: exports write both.
    given = {name: value for name, value in row.items() if value is not None}
    rules = Rules.from_dict(given.get("rules", {}))
    shared: dict[str, Any] = {
        "conversation": str(given.get("id", f"line {line}")),
        "condition": str(given.get("condition", "")),
        "rules": rules,
        "line": line,
    }
    turns: list[Turn] = []
    empty = 0
    for role, question, reply in _READERS[chosen](row):
        if not role.strip() or not reply.strip():
            empty += 1
            continue
        turns.append(Turn(index=len(turns), role=role, question=question, reply=reply, **shared))
    return turns, empty


def _form_of(row: Mapping[str, Any]) -> str:
    for name, key in _KEYS.items():
        if key in row:
            return name
    if "messages" in row:
        first: Mapping[str, Any] = next(iter(_list(row, "messages")), {})
        if "role" in first:
            return "messages"
        if "source" in first:
            return "autogen"
        return "langchain" if "type" in first else "autogen" if "name" in first else "messages"
    raise ValueError(f"no known form: got the fields {', '.join(sorted(map(str, row)))}; expected turns or messages")


Read = Iterable[tuple[str, str, str]]


def _read_turns(row: Mapping[str, Any]) -> Read:
    for turn in _list(row, "turns"):
        yield _text(turn, "role"), _text(turn, "question", _text(row, "question", "")), _text(turn, "reply")


def _read_messages(row: Mapping[str, Any], role_key: str = "role", agents: tuple[str, ...] = ("assistant",)) -> Read:
    question = _text(row, "question", "")
    asked = question
    for message in _list(row, "messages"):
        role, content = _text(message, role_key), _content(message)
        if role in agents:
            yield _text(message, "name", "") or "assistant", asked, content
        elif role in ("user", "human", "HumanMessage") and not question:
            asked = content


def _read_sharegpt(row: Mapping[str, Any]) -> Read:
    messages = [{"role": _text(m, "from"), "content": _text(m, "value")} for m in _list(row, "conversations")]
    return _read_messages({**row, "messages": messages}, agents=("gpt", "assistant", "chatgpt"))


def _read_langchain(row: Mapping[str, Any]) -> Read:
    messages = [{**m, **m["data"]} if isinstance(m.get("data"), Mapping) else m for m in _list(row, "messages")]
    return _read_messages({**row, "messages": messages}, "type", ("ai", "AIMessage", "AIMessageChunk"))


def _read_autogen(row: Mapping[str, Any]) -> Read:
    messages = _list(row, "chat_history" if "chat_history" in row else "messages")
    question = _text(row, "question", "") or (_content(messages[0]) if messages else "")
    for message in messages[1:]:
        role = _text(message, "name", "") or _text(message, "source", "") or _text(message, "role", "")
        yield role, question, _content(message)


def _read_dylan(row: Mapping[str, Any]) -> Read:
    for turn in _list(row, "replies"):
        yield _text(turn, "role"), _text(row, "question", ""), _text(turn, "reply")


def _read_macnet(row: Mapping[str, Any]) -> Read:
    for node in _list(row, "nodes"):
        role = f"{_text(node, 'system_message', '')}\n{_text(node, 'actor_prompt', '')}".strip()
        yield role, _text(row, "question", ""), _text(node, "actor_response")


def _read_consistency(row: Mapping[str, Any]) -> Read:
    for answer in _list(row, "responses")[1:]:
        yield _text(answer, "role", "assistant"), _text(row, "question", ""), _content(answer)


def _read_crewai(row: Mapping[str, Any]) -> Read:
    for task in _list(row, "tasks_output"):
        yield _text(task, "agent"), _text(row, "question", "") or _text(task, "description", ""), _text(task, "raw")


_READERS: dict[str, Callable[[Mapping[str, Any]], Read]] = {
    "turns": _read_turns,
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "langchain": _read_langchain,
    "autogen": _read_autogen,
    "dylan": _read_dylan,
    "macnet": _read_macnet,
    "consistency": _read_consistency,
    "crewai": _read_crewai,
}


def _list(row: Mapping[str, Any], name: str) -> list[Any]:
    value = row[name]
    if not isinstance(value, list):
        raise ValueError(f"{name}: got {type(value).__name__}, expected a list")
    for place, entry in enumerate(value):
        if not isinstance(entry, Mapping):
            raise ValueError(f"{name}[{place}]: got {type(entry).__name__}, expected an object")
    return value


def _text(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    value = row.get(name, default) if default is not None else row[name]
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{name}: got {type(value).__name__}, expected text")
    return value


def _content(message: Mapping[str, Any]) -> str:
    """The text of a message, whose content may be a list of parts, or nothing beside a call of a tool."""
    value = message.get("content") if "tool_calls" in message else message["content"]
    if isinstance(value, list):
        parts = [part if isinstance(part, str) else part.get("text", "") for part in value]
        return "".join(part for part in parts if isinstance(part, str))
    return _text(message, "content", "")


def _texts(name: str, value: Any) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(f"rules.{name}: got {value!r}, expected a list of texts")
    if not all(entry.removeprefix("!").strip() for entry in entries):
        raise ValueError(f"rules.{name}: got an empty text, which every reply holds; leave it out")
    return tuple(entries)
