"""What `headway diagnose roles` does: mark the log, look into the model, write the page, print the headline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console

from headway.diagnose.hosts import check_continues_text
from headway.diagnose.roles.analysing import Options, diagnose_roles
from headway.errors import ArgumentError, unknown
from headway.hosts import load
from headway.methods.diagnosis import diagnose_localize_align as method
from headway.methods.diagnosis.diagnose_localize_align import Judge, ModelJudge, RuleJudge, read_conversations
from headway.pages.console import check_folder, deliver, going_on, progress_bar

JUDGES = ("rules", "model")


def run(
    model: str,
    *,
    log: Path | None = None,
    form: str = "auto",
    bad_rows: str = "refuse",
    judge: str = "rules",
    localize: bool | None = None,
    kinds: str = "all",
    relations: str = "all",
    items: int = 1,
    held_out: int = 1,
    share: float = 0.1,
    cover: float = 0.5,
    window: int | None = None,
    draws: int = 5,
    weigh: str = "even",
    reply_tokens: int = 24,
    align: int = 0,
    weights: str = "attention",
    rank: int = 8,
    learning_rate: float = 2e-4,
    dtype: str = "float32",
    seed: int = 0,
    out: Path = Path("roles-out"),
    as_json: bool = False,
    trust_remote_code: bool = False,
) -> None:
    """The command. Arguments and the log are read before a model is loaded. Marks, replies and readings are kept in
    `out` as they come; the page and its numbers are written last."""
    wanted = _named("--judge", judge, JUDGES)
    looked_into = log is None if localize is None else localize
    if log is None and not looked_into:
        raise ArgumentError("--log, --no-localize: got no log and nothing to look into, expected either. Give a log.")
    if align and not looked_into:
        raise ArgumentError("--align: got steps without --localize, expected both: focal layers come from there.")
    options = Options(
        kinds=tuple(method.KINDS) if kinds == "all" else _named("--kinds", kinds, tuple(method.KINDS)),
        relations=method.RELATIONS if relations == "all" else _named("--relations", relations, method.RELATIONS),
        items=items,
        held_out=held_out,
        share=share,
        cover=cover,
        window=window,
        draws=draws,
        weigh=weigh,
        new_tokens=reply_tokens,
        align=align,
        weights=weights,
        rank=rank,
        learning_rate=learning_rate,
        seed=seed,
    )
    conversations = None if log is None else read_conversations(log, form=form, bad_rows=bad_rows)
    check_folder(out)
    with going_on(out / "parts"), progress_bar(Console(stderr=True)) as tell:
        host: Any = None
        tokenizer: Any = None
        if looked_into or "model" in wanted:
            tell(f"loading {model}", 0, 1)
            host, tokenizer = load(model, dtype=dtype, trust_remote_code=trust_remote_code)
            check_continues_text(host, tokenizer)
        judges: list[Judge] = [RuleJudge() if name == "rules" else ModelJudge(host, tokenizer) for name in wanted]
        found = diagnose_roles(
            host,
            tokenizer,
            conversations=conversations,
            judges=judges,
            localize=looked_into,
            options=options,
            out=out,
            name=log.name if log is not None and host is None else model,
            progress=tell,
        )
    places = []
    if found.alignment is not None:
        places.append(f"Adapters of the focal layers: {out / found.alignment['rows'][0]['adapter']}")
    deliver(found, out, "roles", as_json=as_json, places=places)


def _named(option: str, text: str, valid: tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas between them, each once."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for name in names:
        if name not in valid:
            raise unknown(option, name, valid)
    return names
