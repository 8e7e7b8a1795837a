"""All explanations by name, and a run of many methods over many examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from headway.errors import ArgumentError, HeadwayError, NumericError, unknown
from headway.methods.diagnosis.song_of_disagreement import attributions, deep_rules
from headway.methods.diagnosis.song_of_disagreement.attention_explanations import (
    KINDS,
    attention_scores,
    value_zeroing,
)
from headway.methods.diagnosis.song_of_disagreement.attributions import Explanation, Problem, Settings, prepare
from headway.methods.diagnosis.song_of_disagreement.classifier import Classifier, Example

Family = Literal["attention", "gradient", "perturbation"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """`random`: another seed gives other scores. `words`: what it is, for a reader."""

    name: str
    family: Family
    words: str
    run: Callable[[Problem], Explanation]
    random: bool = False
    needs_host: bool = False
    needs_captum: bool = False


def _attention(kind: str) -> Callable[[Problem], Explanation]:
    def run(problem: Problem) -> Explanation:
        found = attention_scores(
            problem.classifier, problem.example, (kind,), flow_tokens=problem.settings.flow_tokens
        )[kind]
        return attributions.explained(problem, f"attention_{kind}", found, promises=False)

    return run


def _zeroing(problem: Problem) -> Explanation:
    found = value_zeroing(problem.classifier, problem.example, rows=problem.rows)
    return attributions.explained(problem, "value_zeroing", found, promises=False)


def _of(name: str, family: Family, words: str, run: Callable[[Problem], Explanation], **options: bool) -> Method:
    return Method(name=name, family=family, words=words, run=run, **options)


_ATTENTION_WORDS = {
    "last": "attention of the last layer",
    "mean": "attention, mean over layers",
    "peak": "largest mean weight of each token's own row (the released code's plain average)",
    "rollout": "attention rollout",
    "flow": "attention flow",
    "values": "attention of the last layer times the length of the values",
}
METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        *(
            _of(f"attention_{kind}", "attention", _ATTENTION_WORDS[kind], _attention(kind), needs_host=kind != "last")
            for kind in KINDS
        ),
        _of("value_zeroing", "attention", "value zeroing in all layers", _zeroing, needs_host=True),
        _of("gradient", "gradient", "gradient", attributions.gradient),
        _of("input_x_gradient", "gradient", "input × gradient", attributions.input_x_gradient),
        _of(
            "integrated_gradients", "gradient", "integrated gradients", attributions.integrated_gradients,
            needs_captum=True,
        ),
        _of("grad_shap", "gradient", "Grad-SHAP", attributions.grad_shap, random=True),
        _of("deep_lift", "gradient", "DeepLIFT (rescale)", deep_rules.deep_lift, needs_captum=True),
        _of("deep_shap", "gradient", "Deep-SHAP", deep_rules.deep_shap, needs_captum=True),
        _of("lime", "perturbation", "LIME", attributions.lime, random=True),
        _of("ablation", "perturbation", "leave one token out", attributions.ablation, needs_captum=True),
    )
}  # fmt: skip


def method_named(name: str) -> Method:
    """A method by name. Raises ArgumentError with the nearest match."""
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def explain(
    classifier: Classifier,
    example: Example,
    methods: Sequence[str],
    settings: Settings | None = None,
    *,
    seed: int = 0,
) -> dict[str, Explanation]:
    """Explanations of one example by several methods, all of the same class. `seed` is that of LIME and Grad-SHAP.

    Raises ArgumentError for an unknown method and for one that the classifier cannot be explained by (its reason), and
    NumericError for scores that are not finite."""
    chosen = [method_named(name) for name in methods]
    if len({method.name for method in chosen}) != len(chosen):
        raise ArgumentError(f"methods: got {', '.join(methods)}, expected each once.")
    problem = prepare(classifier, example, settings or Settings(), seed=seed)
    found = {}
    for method in chosen:
        problem.generator.manual_seed(seed)
        found[method.name] = result = method.run(problem)
        if not np.isfinite(result.scores).all():
            raise NumericError(
                f"{method.name}: got scores that are not finite, expected numbers. Check the classifier."
            )
    return found


def usable_methods(
    classifier: Classifier, example: Example, methods: Sequence[str], settings: Settings | None = None
) -> tuple[list[str], dict[str, str]]:
    """(methods that work on this classifier, reason of each that does not), tried on one example."""
    good, refused = [], {}
    for name in methods:
        method_named(name)
        try:
            explain(classifier, example, [name], settings)
        except HeadwayError as error:
            refused[name] = str(error)
        else:
            good.append(name)
    return good, refused


def relative_errors(explanations: Sequence[Explanation]) -> Float[np.ndarray, " examples"]:
    """|Σ attribution − (f(x) − f(x0))| / max(|f(x) − f(x0)|, 0.01) of each explanation that promises completeness."""
    rows = [e for e in explanations if e.error is not None and e.baseline_value is not None]
    return np.array([abs(e.error or 0.0) / max(abs(e.value - (e.baseline_value or 0.0)), 0.01) for e in rows])
