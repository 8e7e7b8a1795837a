"""NL2KQL: a request to a Kusto query, cluster("…").database("…").Table | where … | summarize … by …

    syntax    the query is one of the small grammar below       jaccard   shared over all distinct tokens
    cluster, database, table, column recall   the share of the gold query's names that the answer has

Grammar: a source, then pipes of where, extend, project, distinct, summarize, order/sort by, top, take/limit, count;
in them expressions with and, or, not, comparisons, text operators, in, between, arithmetic, calls and literals. A
name that the gold query does not need costs nothing in recall. Metrics of Sigma, arXiv 2501.13629; tables and
requests are made up.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from headway.errors import HeadwayError

_TOKENS = re.compile(
    r"""(?P<space>\s+|//[^\n]*)|(?P<text>"(?:[^"\\\n]|\\.)*"|'(?:[^'\\\n]|\\.)*')"""
    r"""|(?P<number>\d+(?:\.\d+)?(?:ms|[smhd])?\b)|(?P<name>!?[A-Za-z_]\w*)"""
    r"""|(?P<sign>==|!=|<=|>=|=~|!~|\.\.|[=<>+\-*/%(),.|])""",
    re.VERBOSE,
)
_COMPARISONS = (
    "==", "!=", "<", ">", "<=", ">=", "=~", "!~", "contains", "!contains", "has", "!has", "startswith", "endswith",
)  # fmt: skip
_WORDS = frozenset({"and", "or", "not", "in", "between", "by", "asc", "desc", "true", "false", *_COMPARISONS})
#: Deepest nesting of parentheses that is read.
DEPTH = 40


class KustoError(HeadwayError):
    """A text is no query of the grammar; the message says where and what was expected."""


@dataclass
class Query:
    """What a query names: its source, and the columns that its pipes read (names it defines itself left out)."""

    cluster: str = ""
    database: str = ""
    table: str = ""
    columns: set[str] = field(default_factory=set)
    defined: set[str] = field(default_factory=set)

    @property
    def read(self) -> frozenset[str]:
        return frozenset(self.columns - self.defined)


@dataclass(frozen=True)
class Request:
    """A request and its query."""

    request: str
    query: str


_SOURCE = 'cluster("infra").database("Fleet")'
_SAMPLES = (
    Request(
        "Which nodes of cluster infra, database Fleet, reported GPU errors in the last day?",
        f"{_SOURCE}.GpuErrors | where Timestamp > ago(1d) | distinct NodeId",
    ),
    Request(
        "Count the jobs of each state in Fleet's table Jobs on cluster infra, most frequent first.",
        f"{_SOURCE}.Jobs | summarize Total = count() by State | order by Total desc",
    ),
    Request(
        "Show the ten longest jobs (JobId and DurationSeconds) of Fleet on cluster infra that did not fail.",
        f'{_SOURCE}.Jobs | where State != "Failed" | top 10 by DurationSeconds desc | project JobId, DurationSeconds',
    ),
    Request(
        "From cluster infra, database Fleet: the average Temperature of each GpuModel in NodeMetrics above 80 degrees.",
        f"{_SOURCE}.NodeMetrics | where Temperature > 80 | summarize avg(Temperature) by GpuModel",
    ),
    Request(
        "How many rows of Tickets (cluster support, database Cases) mention NCCL or RCCL in their Title?",
        'cluster("support").database("Cases").Tickets | where Title has "NCCL" or Title has "RCCL" | count',
    ),
    Request(
        "Cluster support, database Cases: open tickets of severity 1 or 2 from the last week, newest first.",
        'cluster("support").database("Cases").Tickets | where Status == "Open" and Severity in (1, 2) '
        "| where Created > ago(7d) | order by Created desc",
    ),
    Request(
        "For each hour, the largest BusBandwidth in gigabits in NetworkTests (cluster net, database Bench).",
        'cluster("net").database("Bench").NetworkTests | extend Gigabits = BusBandwidth * 8 '
        "| summarize max(Gigabits) by bin(Timestamp, 1h)",
    ),
    Request(
        "Cluster net, database Bench: runs of NetworkTests with between 8 and 64 ranks whose Tool starts with nccl.",
        'cluster("net").database("Bench").NetworkTests | where Ranks between (8 .. 64) and Tool startswith "nccl" '
        "| take 100",
    ),
)


def samples() -> tuple[Request, ...]:
    return _SAMPLES


def question(sample: Request, answers: Sequence[str] = ()) -> str:
    return f"{sample.request}\nAnswer with one Kusto query and nothing else."


def gold(sample: Request) -> tuple[str]:
    return (sample.query,)


def score(sample: Request, answers: Sequence[str]) -> dict[str, float]:
    text = query_in(answers[0])
    wanted = parse(sample.query)
    try:
        parse(text)
        syntax = 1.0
    except KustoError:
        syntax = 0.0
    said, names = set(_lenient(text)), _source_in(text)
    asked = set(_lenient(sample.query))
    return {
        "syntax": syntax,
        "jaccard": len(said & asked) / len(said | asked) if said | asked else 1.0,
        "cluster recall": float(names[0] == wanted.cluster),
        "database recall": float(names[1] == wanted.database),
        "table recall": float(names[2] == wanted.table),
        "column recall": _recall(wanted.read, said),
    }


def parse(text: str) -> Query:
    """What a query names. Raises KustoError where the text leaves the grammar."""
    return _Reader(_tokens(text)).query()


def query_in(text: str) -> str:
    """The query of an answer: its code block, or itself."""
    fenced = re.search(r"```[\w-]*\n(.*?)```", text, re.DOTALL)
    return (fenced.group(1) if fenced else text).strip().strip("`").removesuffix(";").strip()


def _recall(wanted: frozenset[str], said: set[str]) -> float:
    return len(wanted & said) / len(wanted) if wanted else 1.0


def _lenient(text: str) -> list[str]:
    """The tokens of any text, what is no token left out."""
    return [match.group() for match in _TOKENS.finditer(text) if match.lastgroup != "space"]


def _source_in(text: str) -> tuple[str, str, str]:
    """Cluster, database and table as far as a text names them, also where the rest of it is no query."""
    said = [re.search(rf"\b{word}\(\s*[\"']([^\"']*)[\"']\s*\)", text) for word in ("cluster", "database")]
    head = re.sub(r"\b(cluster|database)\([^)]*\)", "", text).split("|")[0]
    table = re.fullmatch(r"[.\s]*([A-Za-z_]\w*)\s*", head)
    return said[0].group(1) if said[0] else "", said[1].group(1) if said[1] else "", table.group(1) if table else ""


def _tokens(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text):
        match = _TOKENS.match(text, at)
        if match is None:
            raise KustoError(f"query: got {text[at]!r} at character {at}, expected a token of the grammar.")
        if match.lastgroup != "space":
            found.append((str(match.lastgroup), match.group()))
        at = match.end()
    return found


class _Reader:
    """Recursive descent over the tokens."""

    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens, self.at, self.depth = tokens, 0, 0
        self.found = Query()

    def query(self) -> Query:
        self.found.cluster = self._named("cluster")
        self._take(".")
        self.found.database = self._named("database")
        self._take(".")
        self.found.table = self._name()
        while self._next("|"):
            self._pipe()
        if self.at < len(self.tokens):
            raise self._unexpected("| or the end")
        return self.found

    def _pipe(self) -> None:
        word = self._name()
        if word == "where":
            self._expression()
        elif word in ("extend", "project", "distinct"):
            self._assignments()
        elif word == "summarize":
            self._assignments()
            if self._next("by"):
                self._assignments()
        elif word in ("order", "sort"):
            self._take("by")
            self._ordered()
            while self._next(","):
                self._ordered()
        elif word == "top":
            self._number()
            self._take("by")
            self._ordered()
        elif word in ("take", "limit"):
            self._number()
        elif word != "count":
            self.at -= 1
            raise self._unexpected("an operator such as where or summarize")

    def _assignments(self) -> None:
        self._assignment()
        while self._next(","):
            self._assignment()

    def _assignment(self) -> None:
        if self._kind() == "name" and self._peek(1) == "=":
            self.found.defined.add(self._name())
            self._take("=")
        self._expression()

    def _ordered(self) -> None:
        self._expression()
        if not self._next("asc"):
            self._next("desc")

    def _expression(self) -> None:
        self.depth += 1
        if self.depth > DEPTH:
            raise KustoError(f"query: got parentheses nested more than {DEPTH} deep, expected fewer.")
        self._all()
        while self._next("or"):
            self._all()
        self.depth -= 1

    def _all(self) -> None:
        self._comparison()
        while self._next("and"):
            self._comparison()

    def _comparison(self) -> None:
        if self._peek() == "not" and self._peek(1) == "(":
            self.at += 1
        self._sum()
        word = self._peek()
        if word in _COMPARISONS:
            self.at += 1
            self._sum()
        elif word in ("in", "!in"):
            self.at += 1
            self._list()
        elif word == "between":
            self.at += 1
            self._take("(")
            self._sum()
            self._take("..")
            self._sum()
            self._take(")")

    def _sum(self) -> None:
        self._term()
        while self._peek() in ("+", "-", "*", "/", "%"):
            self.at += 1
            self._term()

    def _term(self) -> None:
        kind, word = self._kind(), self._peek()
        if word == "-":
            self.at += 1
            self._number()
        elif word == "(":
            self.at += 1
            self._expression()
            self._take(")")
        elif kind in ("text", "number") or word in ("true", "false"):
            self.at += 1
        else:
            name = self._name()
            if self._peek() == "(":
                self._list(empty=True)
            else:
                self.found.columns.add(name)

    def _list(self, *, empty: bool = False) -> None:
        self._take("(")
        if empty and self._next(")"):
            return
        self._expression()
        while self._next(","):
            self._expression()
        self._take(")")

    def _named(self, word: str) -> str:
        self._take(word)
        self._take("(")
        if self._kind() != "text":
            raise self._unexpected(f"the name of a {word} in quotes")
        text = self.tokens[self.at][1]
        self.at += 1
        self._take(")")
        return text[1:-1]

    def _name(self) -> str:
        if self._kind() != "name" or self._peek() in _WORDS:
            raise self._unexpected("a name")
        self.at += 1
        return self.tokens[self.at - 1][1]

    def _number(self) -> None:
        if self._kind() != "number":
            raise self._unexpected("a number")
        self.at += 1

    def _take(self, word: str) -> None:
        if not self._next(word):
            raise self._unexpected(repr(word))

    def _next(self, word: str) -> bool:
        found = self._peek() == word
        self.at += found
        return found

    def _peek(self, ahead: int = 0) -> str:
        at = self.at + ahead
        return self.tokens[at][1] if at < len(self.tokens) else ""

    def _kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else "end"

    def _unexpected(self, wanted: str) -> KustoError:
        return KustoError(f"query: got {self._peek() or 'the end'!r} as token {self.at + 1}, expected {wanted}.")
