"""An interpreter of a small part of Python, for programs that nobody trusts: it walks the syntax tree.

Python itself never runs the program. Known are functions, assignments, if, for, while, return, break, continue,
numbers, texts, lists, tuples, sets, dictionaries, comprehensions, f-strings, arithmetic, comparisons and the calls in
`CALLS` and `METHODS`. There are no imports, no attributes beside these methods, no classes and no names from outside,
so a program reaches nothing but its own values; steps, sizes, depth and output are bounded, so it ends.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from headway.tasks.aimicius.optiflow.known import (
    BINARY,
    CALLS,
    COMPARE,
    DEPTH,
    LARGEST,
    METHODS,
    NESTING,
    OUTPUT,
    PROGRAM,
    SHALLOW,
    SIZE,
    STEPS,
    UNARY,
    ProgramError,
)


class _Return(Exception):  # noqa: N818
    def __init__(self, value: Any) -> None:
        self.value = value


class _Break(Exception):  # noqa: N818
    pass


class _Continue(Exception):  # noqa: N818
    pass


def run_program(code: str, function: str, arguments: Sequence[int]) -> str:
    """What `function(*arguments)` of a program prints. Raises ProgramError, with the reason and line."""
    if len(code) > PROGRAM:
        raise ProgramError(f"program: got {len(code)} characters, expected at most {PROGRAM}.")
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ProgramError(f"program: cannot be read ({error}).") from None
    if _nesting(tree) > NESTING:
        raise ProgramError(f"program: got more than {NESTING} levels of nesting, expected fewer.")
    machine = _Machine()
    for statement in tree.body:
        if isinstance(statement, ast.FunctionDef):
            machine.functions[statement.name] = statement
        elif isinstance(statement, ast.Assign):
            machine.run([statement], machine.shared)
    if function not in machine.functions:
        raise ProgramError(f"program: got no function {function!r}, expected one.")
    try:
        machine.call(machine.functions[function], list(arguments))
    except (ArithmeticError, TypeError, ValueError, LookupError) as error:
        raise ProgramError(f"program: failed with {type(error).__name__}: {error}") from None
    except (_Break, _Continue):
        raise ProgramError("program: got break or continue outside of a loop.") from None
    return "".join(machine.printed)


def _nesting(tree: ast.AST) -> int:
    deepest, waiting = 0, [(tree, 0)]
    while waiting:
        node, depth = waiting.pop()
        deepest = max(deepest, depth)
        waiting += [(child, depth + 1) for child in ast.iter_child_nodes(node)]
    return deepest


Names = dict[str, Any]


class _Machine:
    """Runs statements on names; counts what it does."""

    def __init__(self) -> None:
        self.functions: dict[str, ast.FunctionDef] = {}
        self.shared: Names = {}
        self.printed: list[str] = []
        self.characters = self.steps = self.depth = 0

    def call(self, function: ast.FunctionDef, arguments: list[Any]) -> Any:
        given = function.args
        names = [argument.arg for argument in given.args]
        if given.vararg or given.kwarg or given.kwonlyargs or given.posonlyargs or function.decorator_list:
            raise self.refused(function, "arguments with stars or decorators")
        missing = len(names) - len(arguments)
        if missing < 0 or missing > len(given.defaults):
            raise self.refused(function, f"{len(arguments)} arguments for {len(names)}")
        defaults = [self.value(node, {}) for node in given.defaults[len(given.defaults) - missing :]]
        self.depth += 1
        if self.depth > DEPTH:
            raise ProgramError(f"program: got calls more than {DEPTH} deep, expected fewer.")
        try:
            self.run(function.body, dict(zip(names, arguments + defaults, strict=True)))
        except _Return as result:
            return result.value
        finally:
            self.depth -= 1
        return None

    def run(self, body: Iterable[ast.stmt], names: Names) -> None:
        for statement in body:
            self.step()
            self.statement(statement, names)

    def statement(self, node: ast.stmt, names: Names) -> None:
        match node:
            case ast.Expr():
                self.value(node.value, names)
            case ast.Assign():
                value = self.value(node.value, names)
                for target in node.targets:
                    self.store(target, value, names)
            case ast.AugAssign():
                held = self.value(_loaded(node.target), names)
                self.store(node.target, self.binary(node, node.op, held, self.value(node.value, names)), names)
            case ast.If():
                self.run(node.body if self.value(node.test, names) else node.orelse, names)
            case ast.For():
                self.loop(self.items(self.value(node.iter, names)), node, names)
            case ast.While():
                self.loop(self.trues(node.test, names), node, names)
            case ast.Return():
                raise _Return(None if node.value is None else self.value(node.value, names))
            case ast.Break():
                raise _Break
            case ast.Continue():
                raise _Continue
            case ast.Pass():
                pass
            case _:
                raise self.refused(node, type(node).__name__)

    def loop(self, turns: Iterator[Any], node: ast.For | ast.While, names: Names) -> None:
        for item in turns:
            if isinstance(node, ast.For):
                self.store(node.target, item, names)
            try:
                self.run(node.body, names)
            except _Break:
                return
            except _Continue:
                continue
        self.run(node.orelse, names)

    def trues(self, test: ast.expr, names: Names) -> Iterator[None]:
        while self.value(test, names):
            self.step()
            yield None

    def items(self, values: Iterable[Any]) -> Iterator[Any]:
        for item in values:
            self.step()
            yield item

    def store(self, target: ast.expr, value: Any, names: Names) -> None:
        match target:
            case ast.Name():
                names[target.id] = value
            case ast.Tuple() | ast.List():
                parts = list(self.items(value))
                if len(parts) != len(target.elts):
                    raise self.refused(target, f"{len(parts)} values for {len(target.elts)} names")
                for part, item in zip(target.elts, parts, strict=True):
                    self.store(part, item, names)
            case ast.Subscript():
                held = self.value(target.value, names)
                if type(held) not in (list, dict):
                    raise self.refused(target, f"an item of {type(held).__name__} to change")
                held[self.walk(self.value(target.slice, names))] = value
                self.bounded(held)
            case _:
                raise self.refused(target, type(target).__name__)

    def value(self, node: ast.expr, names: Names) -> Any:
        self.step()
        return self.bounded(self.evaluate(node, names))

    def evaluate(self, node: ast.expr, names: Names) -> Any:
        match node:
            case ast.Constant() if node.value is None or isinstance(node.value, bool | int | float | str):
                return node.value
            case ast.Name():
                return self.named(node, names)
            case ast.List() | ast.Tuple() | ast.Set():
                parts = [self.value(part, names) for part in node.elts]
                if isinstance(node, ast.Set):
                    return set(self.walk(parts))
                return parts if isinstance(node, ast.List) else tuple(parts)
            case ast.Dict():
                if None in node.keys:
                    raise self.refused(node, "a dictionary with stars")
                keys = self.walk([self.value(key, names) for key in node.keys if key is not None])
                return dict(zip(keys, (self.value(part, names) for part in node.values), strict=True))
            case ast.BinOp():
                return self.binary(node, node.op, self.value(node.left, names), self.value(node.right, names))
            case ast.UnaryOp() if type(node.op) in UNARY:
                return UNARY[type(node.op)](self.value(node.operand, names))
            case ast.BoolOp():
                return self.together(node, names)
            case ast.Compare():
                return self.compare(node, names)
            case ast.IfExp():
                return self.value(node.body if self.value(node.test, names) else node.orelse, names)
            case ast.Subscript():
                return self.value(node.value, names)[self.walk(self.value(node.slice, names))]
            case ast.Slice():
                bounds = (node.lower, node.upper, node.step)
                return slice(*(None if part is None else self.value(part, names) for part in bounds))
            case ast.JoinedStr():
                return "".join(self.value(part, names) for part in node.values)
            case ast.FormattedValue() if node.format_spec is None and node.conversion == -1:
                return str(self.walk(self.value(node.value, names)))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                found = list(self.comprehended(node.elt, node.generators, names))
                return set(self.walk(found)) if isinstance(node, ast.SetComp) else found
            case ast.Call():
                return self.called(node, names)
        raise self.refused(node, type(node).__name__)

    def named(self, node: ast.Name, names: Names) -> Any:
        for known in (names, self.shared):
            if node.id in known:
                return known[node.id]
        raise self.refused(node, f"the name {node.id!r}")

    def binary(self, node: ast.AST, kind: ast.operator, left: Any, right: Any) -> Any:
        if type(kind) not in BINARY:
            raise self.refused(node, type(kind).__name__)
        if isinstance(kind, ast.Mod) and isinstance(left, str):
            raise self.refused(node, "a text with %")
        for held, times in ((left, right), (right, left)):
            if isinstance(kind, ast.Mult) and isinstance(held, str | list | tuple) and isinstance(times, int):
                self.limit(len(held) * max(times, 0))
        return BINARY[type(kind)](left, right)

    def together(self, node: ast.BoolOp, names: Names) -> Any:
        value: Any = None
        for part in node.values:
            value = self.value(part, names)
            if bool(value) is isinstance(node.op, ast.Or):
                break
        return value

    def compare(self, node: ast.Compare, names: Names) -> bool:
        left = self.value(node.left, names)
        for kind, part in zip(node.ops, node.comparators, strict=True):
            right = self.value(part, names)
            self.walk(left, right)
            if not COMPARE[type(kind)](left, right):
                return False
            left = right
        return True

    def comprehended(self, element: ast.expr, generators: list[ast.comprehension], names: Names) -> Iterator[Any]:
        first, *rest = generators
        if first.is_async:
            raise self.refused(element, "an async comprehension")
        inner = dict(names)
        for item in self.items(self.value(first.iter, inner)):
            self.store(first.target, item, inner)
            if all(self.value(test, inner) for test in first.ifs):
                if rest:
                    yield from self.comprehended(element, rest, inner)
                else:
                    yield self.value(element, inner)

    def called(self, node: ast.Call, names: Names) -> Any:
        arguments: list[Any] = []
        for part in node.args:
            if isinstance(part, ast.Starred):
                arguments += list(self.items(self.value(part.value, names)))
            else:
                arguments.append(self.value(part, names))
        options = {str(option.arg): self.value(option.value, names) for option in node.keywords}
        if isinstance(node.func, ast.Attribute):
            return self.method(node.func, arguments, options, names)
        if not isinstance(node.func, ast.Name):
            raise self.refused(node, "a call of something without a name")
        name = node.func.id
        if name in self.functions and not options:
            return self.call(self.functions[name], arguments)
        if name == "print" and set(options) <= {"sep", "end"}:
            return self.print(arguments, **options)
        allowed = {"sorted": {"reverse"}, "enumerate": {"start"}}.get(name, set())
        if name not in CALLS or not set(options) <= allowed:
            raise self.refused(node, f"a call of {name!r} with {sorted(options)}" if options else f"a call of {name!r}")
        self.step(sum(len(a) for a in arguments if isinstance(a, list | tuple | set | dict | str | range)))
        if name not in SHALLOW:
            self.walk(*arguments)
        found = CALLS[name](*arguments, **options)
        if isinstance(found, enumerate | zip) or name == "reversed":
            # One item more than may be kept: enough to be refused, never enough to fill memory.
            found = [item for item, _ in zip(found, range(SIZE + 1), strict=False)]
        return found

    def method(self, node: ast.Attribute, arguments: list[Any], options: Names, names: Names) -> Any:
        held = self.value(node.value, names)
        if node.attr not in METHODS.get(type(held), ()) or not set(options) <= {"reverse"}:
            raise self.refused(node, f"the method {node.attr!r} of {type(held).__name__}")
        self.step(len(held) // 16)
        if node.attr not in SHALLOW:
            self.walk(held, *arguments)
        found = getattr(held, node.attr)(*arguments, **options)
        self.bounded(held)
        return list(found) if node.attr in ("items", "keys", "values") else found

    def print(self, values: list[Any], sep: str = " ", end: str = "\n") -> None:
        text = str(sep).join(str(self.walk(value)) for value in values) + str(end)
        self.characters += len(text)
        if self.characters > OUTPUT:
            raise ProgramError(f"program: printed more than {OUTPUT} characters, expected fewer.")
        self.printed.append(text)

    def step(self, count: int = 1) -> None:
        self.steps += count
        if self.steps > STEPS:
            raise ProgramError(f"program: took more than {STEPS} steps, expected to end before.")

    def limit(self, size: int) -> None:
        if size > SIZE:
            raise ProgramError(f"program: made a value of {size} elements, expected at most {SIZE}.")

    def walk(self, *values: Any) -> Any:
        """The first value; refuses values that hold too much for Python to print, compare or hash. Lists that hold one
        another several times are counted as often, as Python would walk through them."""
        waiting, count = list(values), 0
        while waiting:
            value = waiting.pop()
            if isinstance(value, list | tuple | set | dict):
                inside = [*value, *value.values()] if isinstance(value, dict) else value
                count += len(inside)
                self.limit(count)
                waiting += inside
        self.step(count)
        return values[0] if values else None

    def bounded(self, value: Any) -> Any:
        """The value itself; refuses what is too large to go on with."""
        if isinstance(value, str | list | tuple | set | dict):
            self.limit(len(value))
        elif isinstance(value, int) and abs(value) > LARGEST:
            raise ProgramError(f"program: made a number beyond {LARGEST}, expected indices.")
        return value

    def refused(self, node: ast.AST, what: str) -> ProgramError:
        return ProgramError(
            f"program, line {getattr(node, 'lineno', 0)}: got {what}, expected the small part of Python that is known."
        )


def _loaded(target: ast.expr) -> ast.expr:
    return ast.copy_location(
        ast.Name(target.id, ast.Load())
        if isinstance(target, ast.Name)
        else ast.Subscript(target.value, target.slice, ast.Load())
        if isinstance(target, ast.Subscript)
        else target,
        target,
    )
