"""Final answers out of generated text.

An extractor takes a text and returns the answer or None; a text without one counts as its own category (`NO_ANSWER`)
and is never dropped. Which of several boxed answers counts is a choice.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial

from headway.errors import ArgumentError, unknown

Extractor = Callable[[str], str | None]
#: The category of texts from which no answer could be taken. No extractor returns it.
NO_ANSWER = "(no answer)"
WHICH = ("first", "last")
#: A comma inside a number parts thousands; one behind it belongs to the sentence.
_NUMBER = r"-?\d(?:[\d,]*\d)?(?:\.\d+)?"


def boxed_answer(text: str, *, which: str = "last") -> str | None:
    r"""The normalised content of the first or last `\boxed{…}`, inner braces balanced; None without a complete one."""
    if which not in WHICH:
        raise unknown("which", which, WHICH)
    found = [a for a in (_braced(text, m.end()) for m in re.finditer(r"\\boxed\s*\{", text)) if a is not None]
    return normalised(found[0 if which == "first" else -1]) if found else None


def pattern_answer(pattern: str, *, which: str = "last") -> Extractor:
    """An extractor for the first group of a regular expression, such as r"answer is\\s+(\\S+)"; case is ignored."""
    if which not in WHICH:
        raise unknown("which", which, WHICH)
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise ArgumentError(f"pattern: got {pattern!r}, which is no regular expression ({error}).") from None
    if compiled.groups < 1:
        raise ArgumentError(f"pattern: got {pattern!r} without a group, expected one around the answer, as in (\\d+).")

    def extract(text: str) -> str | None:
        found = [m.group(1) for m in compiled.finditer(text)]
        return normalised(found[0 if which == "first" else -1]) if found else None

    return extract


def stated_answer(text: str, *, which: str = "last") -> str | None:
    """The last boxed answer; without one the number behind the last "answer is" or "answer:", else the last number.
    which: "first" takes the first of each."""
    boxed = boxed_answer(text, which=which)
    if boxed is not None:
        return boxed
    said = re.findall(rf"answer(?:\s+is|:)[^\d\-\n]{{0,40}}({_NUMBER})", text, re.IGNORECASE)
    numbers = said or re.findall(_NUMBER, text)
    return normalised(numbers[0 if which == "first" else -1]) if numbers else None


def answer_reader(pattern: str | None = None, which: str = "last") -> Extractor:
    """The extractor that a user asks for: by a regular expression, or `stated_answer` without one. Its `__name__` says
    what it takes."""
    if which not in WHICH:
        raise unknown("which", which, WHICH)
    chosen = partial(stated_answer, which=which) if pattern is None else pattern_answer(pattern, which=which)

    def extract(text: str) -> str | None:
        return chosen(text)

    extract.__name__ = f"{which} {'boxed or stated' if pattern is None else pattern}"
    return extract


def normalised(answer: str) -> str:
    """An answer with the differences taken off that mean nothing: spaces, a final point, dollar signs, thousands
    commas, \\text and \\dfrac, and zeros behind a decimal point."""
    text = re.sub(r"\\(?:text|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", answer)
    text = text.replace("\\dfrac", "\\frac").replace("\\tfrac", "\\frac").replace("\\left", "").replace("\\right", "")
    text = re.sub(r"[\s$]|\\[,;! ]", "", text).rstrip(".").lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    if re.fullmatch(r"-?\d+\.\d+", text):
        text = text.rstrip("0").rstrip(".")
    return text


def _braced(text: str, start: int) -> str | None:
    depth = 1
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None
