"""RULER's tracing and counting tasks: variables assigned to one another, common words, frequent coded words."""

from __future__ import annotations

import numpy as np

from headway.tasks.ruler.setting import DEPTHS, Setting
from headway.tasks.samples import Sample, largest_fit
from headway.tasks.words import ADJECTIVES, FILLER, NOUNS, coded_words, draw, essay, spread, word_pairs

HOPS = 4
COMMON = 10
#: How often common and uncommon words stand in the list; the second pair below SHORT tokens, too few for 300 words.
REPEATS, SHORT_REPEATS, SHORT = (30, 3), (10, 1), 4096
ALPHA = 2.0
FREQUENT = 3
CODED_LETTERS = 6
#: Words below which the counts of the most frequent words and the one after them are not all different.
LEAST_CODED = 80


def variable_tracking(setting: Setting) -> Sample:
    """One chain X1 = number, X2 = X1, … over four hops, in order, in repeated filler; all five names are wanted."""
    random = setting.random
    value = draw("number", random, 1, digits=5)[0]
    names = [word.upper() for word in coded_words(random, HOPS + 1, 5)]
    chain = _chain(names, value)
    depths = sorted(DEPTHS[i] for i in random.permutation(len(DEPTHS))[: HOPS + 1])
    other = [word.upper() for word in coded_words(random, HOPS + 1, 5)]
    shown = draw("number", random, 1, digits=5)[0]
    example = " ".join(spread(essay(FILLER, HOPS), _chain(other, shown), [100 * i / HOPS for i in range(HOPS + 1)]))

    def build(units: int) -> Sample:
        return setting.sample(
            "Follow the assignments of variables that are hidden in the text.\n\n"
            f"{example}\n\n{_ask(shown)}\n{_lead(shown)} {', '.join(other)}.\n\n"
            f"{' '.join(spread(essay(FILLER, units), chain, depths))}",
            _ask(value),
            _lead(value),
            names,
            depths=depths,
            value=value,
        )

    return largest_fit(build, setting.tokens)


def _chain(names: list[str], value: str) -> list[str]:
    return [f"VAR {a} = {b}." for a, b in zip(names, [value, *(f"VAR {name}" for name in names)], strict=False)]


def _ask(value: str) -> str:
    return f"Which variables have the value {value}, directly or through other variables?"


def _lead(value: str) -> str:
    return f"The {HOPS + 1} variables with the value {value} are"


def common_words(setting: Setting) -> Sample:
    """A numbered list in random order in which ten words stand ten times as often as all the others.

    30 and 3 times from 4,096 tokens on, 10 times and once below. Single words as long as they last, else pairs."""
    often, seldom = SHORT_REPEATS if setting.tokens < SHORT else REPEATS
    seed = int(setting.random.integers(2**31))
    for words in ([*NOUNS, *ADJECTIVES], word_pairs()):
        order = [words[i] for i in np.random.default_rng([seed, 0]).permutation(len(words))]
        common, others = order[:COMMON], order[COMMON:]

        def build(units: int, common: list[str] = common, others: list[str] = others) -> Sample:
            listed = common * often + others[:units] * seldom
            mixed = [listed[i] for i in np.random.default_rng([seed, 1]).permutation(len(listed))]
            return setting.sample(
                "Some words in this numbered list appear often, others seldom.\n\n"
                + " ".join(f"{number}. {word}" for number, word in enumerate(mixed, 1)),
                f"Which are the {COMMON} most common words in the list?",
                f"The {COMMON} most common words are",
                common,
                often=often,
                seldom=seldom,
                uncommon=min(units, len(others)),
            )

        sample = largest_fit(build, setting.tokens)
        if sample.meta["uncommon"] < len(others):
            break
    return sample


def frequent_words(setting: Setting) -> Sample:
    """A text of coded words whose counts follow a zeta law, n · r^−2 / ζ(2); the most frequent one is noise ("..."),
    and the three after it are wanted."""
    seed = int(setting.random.integers(2**31))

    def build(units: int) -> Sample:
        counts = zeta_counts(units)
        coded = ["...", *coded_words(np.random.default_rng([seed, 0]), len(counts) - 1, CODED_LETTERS)]
        mixed = [word for word, count in zip(coded, counts, strict=True) for _ in range(count)]
        order = np.random.default_rng([seed, 1]).permutation(len(mixed))
        return setting.sample(
            'The words of this text are in code. The dots "..." are not a word.\n\n'
            + " ".join(mixed[i] for i in order),
            f"Which are the {FREQUENT} words of the coded text that appear most often?",
            f"The {FREQUENT} most frequent words, separated by commas, are",
            coded[1 : FREQUENT + 1],
            words=len(mixed),
        )

    return largest_fit(build, setting.tokens, least=LEAST_CODED)


def zeta_counts(words: int, alpha: float = ALPHA) -> list[int]:
    """How often the word of each rank 1, 2, … stands in a text of about `words` words: round(n r^−α / ζ(α)), as long as
    that is at least one."""
    from scipy.special import zeta

    ranks = np.arange(1, words + 1)
    counts = np.rint(words * ranks**-alpha / zeta(alpha)).astype(int)
    return [int(count) for count in counts if count]
