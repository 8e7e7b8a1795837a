"""The eight needle tasks of RULER: keys with values in a haystack, and the values of one or several keys asked for."""

from __future__ import annotations

from headway.tasks.ruler.setting import Setting
from headway.tasks.samples import Sample
from headway.tasks.words import FILLER, draw, essay, prose, spread

#: Times the filler is repeated at most in the place of one more needle.
LONGEST = 8


def needle_task(
    setting: Setting,
    *,
    haystack: str,
    key: str = "word",
    value: str = "number",
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Sample:
    """`keys` keys with `values` values each; the values of the first `asked` keys are wanted.

    `haystack` is "filler", "essay", or "needles": sentences of the same form about other keys."""
    random, kind = setting.random, "UUID" if value == "uuid" else value
    names = draw(key, random, keys)
    drawn = draw(value, random, keys * values)
    owned = {name: drawn[i * values : (i + 1) * values] for i, name in enumerate(names)}
    planted = [f"The secret {kind} of {name} is {one}." for name in names for one in owned[name]]
    depths = setting.depths(len(planted))
    seed = int(random.integers(2**31))
    wanted = names[:asked]
    found = list(FILLER) if haystack == "filler" else prose(setting.text) if haystack == "essay" else []
    start = int(random.integers(len(found))) if haystack == "essay" else 0
    question, prefix = _question(kind, wanted, values)

    def build(units: int, *, words: int) -> Sample:
        hay = essay(found, units, start) if found else _distractors(kind, key, value, units, seed, {*names, *drawn})
        rest = essay(found, 1, start + units)[0].split() if found else " ".join(FILLER * LONGEST).split()
        hay += [" ".join(rest[:words])] if words else []
        return setting.sample(
            f"Some secret {kind}s are hidden in the following text. Remember them.\n\n"
            f"{' '.join(spread(hay, planted, depths))}",
            question,
            prefix,
            [one for name in wanted for one in owned[name]],
            keys=names,
            depths=depths,
            units=units,
        )

    return setting.fill(build)


def _question(kind: str, wanted: list[str], values: int) -> tuple[str, str]:
    if len(wanted) > 1:
        listed = ", ".join(wanted[:-1]) + f" and {wanted[-1]}"
        return f"What are the secret {kind}s of {listed}?", f"The secret {kind} of {wanted[0]} is"
    if values > 1:
        return f"What are all the secret {kind}s of {wanted[0]}?", f"The secret {kind}s of {wanted[0]} are"
    return f"What is the secret {kind} of {wanted[0]}?", f"The secret {kind} of {wanted[0]} is"


def _distractors(kind: str, key: str, value: str, count: int, seed: int, taken: set[str]) -> list[str]:
    """`count` sentences about other keys; a smaller count gives the first of a larger one's."""
    import numpy as np

    names = draw(key, np.random.default_rng([seed, 0]), count + len(taken))
    drawn = draw(value, np.random.default_rng([seed, 1]), count + len(taken))
    names, drawn = ([word for word in words if word not in taken][:count] for words in (names, drawn))
    return [f"The secret {kind} of {name} is {one}." for name, one in zip(names, drawn, strict=True)]
