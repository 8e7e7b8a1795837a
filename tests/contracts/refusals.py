"""What each method refuses, in which situation and on which host: the whole list.

Whatever is not here has to work, and whatever is here has to be refused in these words: a refusal that is new and one
that is gone both fail. The rows of `situation` are those of the contract tests; "*" stands for every host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from headway.errors import HeadwayError

#: The tiny Mistral has a window in every layer: InfiniRetri has no layer to read a whole prompt's weights from.
_NO_WIDE_LAYER = {"mistral": r"none of which sees \d+ tokens back"}
#: Drafts are read several in one forward, after which these leave other keys than after single steps, or read others.
_BY_FORWARD = {"*": "got assisted decoding beside"}
#: Right drafts are welcome; to take a wrong one back, what it pushed out would have to return.
_DROPPED = {"*": r"got a request to take back \d+ tokens, expected none: what was dropped cannot come back"}

#: (method, situation) -> host -> what the refusal says.
REFUSED: dict[tuple[str, str], dict[str, str]] = {
    **{("infiniretri", share): _NO_WIDE_LAYER for share in ("share 0.3", "share 0.5", "chunks")},
    **{("infiniretri", drafts): _NO_WIDE_LAYER for drafts in ("right drafts", "wrong drafts")},
    **{
        (slug, drafts): _BY_FORWARD
        for slug in ("a2sf", "dhsa", "flexprefill", "h2o", "intactkv", "keydiff", "orthorank", "tappa")
        for drafts in ("right drafts", "wrong drafts")
    },
    **{(slug, "wrong drafts"): _DROPPED for slug in ("duo-attention", "streaming-llm")},
    ("act", "wrong drafts"): {"*": "what the attached method learned from them cannot be unlearned"},
    **{
        ("recycled-attention", drafts): {"*": r"got a request to take back \d+ of the \d+ tokens of one forward"}
        for drafts in ("right drafts", "wrong drafts")
    },
}
#: Pairs of methods that act together at half a budget each; all others want the same thing at a site.
TOGETHER = frozenset(
    {("act", slug) for slug in ("dhsa", "flexprefill", "power-attention", "recycled-attention")}
    | {("flexprefill", "recycled-attention")}
    | {("dhsa", "infiniretri"), ("flexprefill", "infiniretri"), ("infiniretri", "power-attention")}
)


def reason(slug: str, situation: str, name: str) -> str | None:
    """The words of the refusal that is due, None where the method has to work."""
    by_host = REFUSED.get((slug, situation), {})
    return by_host.get(name, by_host.get("*"))


@contextmanager
def as_listed(slug: str, situation: str, name: str) -> Iterator[None]:
    """Whatever happens inside has to be what the list says: a refusal in its words, or none."""
    due = reason(slug, situation, name)
    if due is None:
        yield
        return
    with pytest.raises(HeadwayError, match=due):
        yield
