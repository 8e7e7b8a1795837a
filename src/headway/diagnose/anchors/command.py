"""What `headway diagnose anchors` does: get traces, measure, write the page, print the headline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from headway.diagnose.anchors.analysing import Options, diagnose_anchors
from headway.diagnose.anchors.traces import QUESTIONS, read_traces, think
from headway.diagnose.hosts import check_continues_text
from headway.errors import ArgumentError
from headway.hosts import load
from headway.hosts.fingerprint import fingerprint
from headway.hosts.rows import check_policy
from headway.methods.diagnosis.thought_anchors import Trace, answer_reader, estimate, read_trace
from headway.pages.console import check_folder, deliver, going_on, progress_bar
from headway.parts import Parts
from headway.progress import Tell


def run(
    model: str,
    *,
    traces: Path | None = None,
    question: str | None = None,
    tokens: int = 200,
    rollouts: int = 0,
    answer: str | None = None,
    which: str = "last",
    settle: float | None = None,
    proximity: int = 4,
    top: int = 20,
    depth_control: bool = False,
    orders: int = 8,
    top_p: bool = False,
    bad_rows: str = "refuse",
    dtype: str = "float32",
    seed: int = 0,
    out: Path = Path("anchors-out"),
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """The command. Arguments are checked before the model is loaded. Traces that the model wrote, effects and rollouts
    are kept in `out` as they come; the page and its numbers are written last."""
    if traces is not None and question is not None:
        raise ArgumentError("--traces, --question: got both, expected one of them. A question makes a trace.")
    if traces is not None and str(traces) != "-" and not traces.expanduser().exists():
        raise ArgumentError(
            f"--traces: got {traces}, expected a file that is there. Check the path, or give - to pipe it."
        )
    check_policy(bad_rows, "--bad-rows")
    options = Options(
        rollouts=rollouts,
        settle=settle,
        extract=answer_reader(answer, which),
        tokens=tokens,
        proximity=proximity,
        top=top,
        depth_control=depth_control,
        orders=orders,
        baseline="top_p" if top_p else "full",
        seed=seed,
    )
    check_folder(out)
    console = Console(stderr=True)
    with going_on(out / "parts"), progress_bar(console) as tell:
        tell(f"loading {model}", 0, 1)
        host, tokenizer = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
        check_continues_text(host, tokenizer)
        given, left_out = _traces(host, tokenizer, traces, question, bad_rows, options, out, tell)
        if rollouts:
            for trace in given:
                cost = estimate(trace, rollouts=rollouts, max_tokens=tokens)
                console.print(f"{trace.name}: {cost}", soft_wrap=True, highlight=False)
        found = diagnose_anchors(host, tokenizer, given, options=options, out=out, name=model, progress=tell)
    if left_out:
        found.run["left out"] = left_out
        found.warnings.insert(0, f"{len(left_out)} rows could not be used and were left out: {left_out[0]}")
    deliver(found, out, "anchors", as_json=as_json)


def _traces(
    host: Any,
    tokenizer: Any,
    path: Path | None,
    question: str | None,
    bad_rows: str,
    options: Options,
    out: Path,
    tell: Tell,
) -> tuple[list[Trace], list[str]]:
    if path is not None:
        return read_traces(path, tokenizer, bad_rows=bad_rows)
    asked = QUESTIONS if question is None else (question,)
    found = []
    for number, one in enumerate(asked, 1):
        tell("the model thinks", number - 1, len(asked))
        found.append(_thought(host, tokenizer, one, f"thought {number}", options, out))
    return found, []


def _thought(host: Any, tokenizer: Any, question: str, name: str, options: Options, out: Path) -> Trace:
    """The model's reasoning, from the folder where it was drawn before under the same settings."""
    facts = [question, name, options.tokens, options.seed, list(fingerprint(host).weights),
             str(next(host.parameters()).dtype)]  # fmt: skip
    drawn: list[Trace] = []

    def draw() -> dict[str, Any]:
        drawn.append(think(host, tokenizer, question, name=name, tokens=options.tokens, seed=options.seed))
        return drawn[0].to_dict()

    data = Parts(out / "parts", prefix="thought-").data(facts, draw)
    if drawn:
        return drawn[0]
    return read_trace(
        data["text"],
        tokenizer,
        sentences=data["sentences"],
        name=name,
        add_special_tokens=not getattr(tokenizer, "chat_template", None),
    )
