"""Who says what a head is about: labellers name the concept that texts share, judges say whether a text fits it.

A labeller is a callable texts → concept, a judge a callable (concept, text) → answer. Answers are True, False, "yes" or
"no" (a full stop and upper case are allowed); everything else is an abstention and counted as one. Lexicon judges are
exact and need no network. `PromptJudge` and `PromptLabeller` wrap any callable prompt → reply, such as a language
model.

Paper: arXiv 2503.11103 asks ChatGPT for labels and GPT-4o, Gemini 1.5 Pro and Claude for verdicts. Its prompts are not
published; those here are ours.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from headway.errors import ArgumentError

Judge = Callable[[str, str], object]
Labeller = Callable[[Sequence[str]], str]
_YES = re.compile(r"\s*yes\s*[.!]?\s*", re.IGNORECASE)
_NO = re.compile(r"\s*no\s*[.!]?\s*", re.IGNORECASE)
#: The label of a head whose texts share nothing that the labeller knows.
UNKNOWN = "none"

#: Words by concept for texts whose concepts are not given: enough for everyday captions.
EVERYDAY: dict[str, tuple[str, ...]] = {
    concept: tuple(words.split())
    for concept, words in {
        "colour": (
            "red green blue yellow orange purple violet pink magenta cyan teal brown black white grey gray golden "
            "silver beige crimson scarlet navy turquoise colour color colourful colorful hue tint monochrome"
        ),
        "shape": (
            "circle circular round square rectangle rectangular triangle triangular oval cross curved spiral ball "
            "box cube cylinder pyramid diamond star disc ring shape shaped outline"
        ),
        "texture": (
            "striped stripes dotted dots checkered smooth rough shiny glossy matte fuzzy woven wooden metallic "
            "pattern texture textured surface fabric knitted plain"
        ),
        "position": ("left right top bottom upper lower above below beneath behind beside centre center corner edge"),
        "number": "one two three four five six seven eight nine ten single double pair triple dozen several many",
        "location": (
            "city street beach mountain forest desert country island village park harbour harbor bridge airport "
            "station france italy japan china india africa europe america london paris tokyo york outdoor indoor "
            "landscape"
        ),
        "animal": (
            "animal dog cat bird horse cow sheep fish lion tiger elephant bear rabbit monkey snake insect "
            "butterfly puppy kitten wildlife pet"
        ),
        "person": (
            "person people man woman men women child children boy girl baby portrait face crowd worker player family"
        ),
        "food": "food meal fruit bread cake pizza soup salad coffee drink vegetable apple banana cheese dessert",
        "object": (
            "car bicycle bus train boat plane chair table lamp phone book bottle cup clock tool building house "
            "window door vehicle furniture object"
        ),
        "season or time": "winter summer spring autumn night day morning evening sunset sunrise snow rain",
        "medium": "photo photograph painting drawing sketch cartoon illustration poster render print film",
    }.items()
}


def parse_answer(answer: object) -> bool | None:
    """True or False; None for anything but a bare yes or no."""
    if isinstance(answer, bool):
        return answer
    if isinstance(answer, str):
        if _YES.fullmatch(answer):
            return True
        if _NO.fullmatch(answer):
            return False
    return None


@dataclass(frozen=True)
class Lexicon:
    """Labels and judges by words. `concepts` maps a text to its concept where that is known (exact); other texts are
    searched for the `words` of each concept.

    As a judge it abstains on a text that neither side knows; `label` takes the concept of most texts, the one that
    comes first where several share the lead."""

    concepts: Mapping[str, str] | None = None
    words: Mapping[str, Sequence[str]] | None = None

    def concepts_of(self, text: str) -> tuple[str, ...]:
        """Every concept that a text is known to speak of."""
        if self.concepts is not None and text in self.concepts:
            return (self.concepts[text],)
        said = set(re.findall(r"[\w'-]+", text.lower()))
        return tuple(name for name, words in (self.words or {}).items() if said & set(words))

    def __call__(self, concept: str, text: str) -> bool | None:
        found = self.concepts_of(text)
        return concept in found if found else None

    def label(self, texts: Sequence[str]) -> str:
        counts = Counter(concept for text in texts for concept in self.concepts_of(text))
        return max(counts, key=lambda c: (counts[c], -list(counts).index(c))) if counts else UNKNOWN


def lexicon(concepts: Mapping[str, str] | None = None) -> Lexicon:
    """Known concepts where given, everyday words beside them."""
    return Lexicon(concepts, EVERYDAY)


@dataclass(frozen=True)
class PromptJudge:
    """A judge that asks a model: `ask` takes a prompt and gives its reply."""

    ask: Callable[[str], str]
    template: str = (
        "A part of a vision model was described by short texts, and the theme they share was named “{concept}”. Does "
        "the text “{text}” belong to that theme? Answer with one word, yes or no."
    )

    def __call__(self, concept: str, text: str) -> object:
        return self.ask(self.template.format(concept=concept, text=text))


@dataclass(frozen=True)
class PromptLabeller:
    """A labeller that asks a model for the one theme of a list of texts. The reply's first line, without quotes, is the
    label; an empty reply or one of more than `longest` words is refused with ArgumentError."""

    ask: Callable[[str], str]
    longest: int = 6
    examples: Sequence[tuple[Sequence[str], str]] = (
        (("a red coat", "green leaves", "bluish light", "an orange wall", "something pink"), "colour"),
        (("a herd of sheep", "a sleeping cat", "two birds", "a fishing boat", "a horse"), "animal"),
    )

    def __call__(self, texts: Sequence[str]) -> str:
        shown = [f"Texts: {'; '.join(given)}\nTheme: {theme}" for given, theme in self.examples]
        prompt = "Name the one theme that most of the texts share, in a word or two.\n\n" + "\n\n".join(
            [*shown, f"Texts: {'; '.join(texts)}\nTheme:"]
        )
        reply = str(self.ask(prompt)).strip()
        label = reply.splitlines()[0].strip().strip("\"'“”.").lower() if reply else ""
        if not label or len(label.split()) > self.longest:
            raise ArgumentError(
                f"labeller: got the reply {reply[:80]!r}, expected a theme of 1 to {self.longest} words. Ask a model "
                "that follows the prompt, or label with a lexicon."
            )
        return label
