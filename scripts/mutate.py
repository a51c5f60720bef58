"""Sampled mutation testing: how many small errors, put into a room at random, do its tests notice?

    pip install coverage
    python scripts/mutate.py fluid --mutants 150 --seed 1 --log fluid.jsonl
    python scripts/mutate.py fluid --mutants 150 --seed 1 --log fluid.jsonl   # after an interruption: goes on
    python scripts/mutate.py fluid --again fluid.jsonl     # only those that survived, after writing tests

**Sample.** A line is drawn uniformly among the lines of the room that hold code inside functions (no docstrings,
texts, messages of errors and warnings, annotations, `strict=` of zip, `__repr__` and its kin, `plot` functions), then
one of the changes possible there: a comparison moved by its boundary or negated, a condition negated, `and` and `or`
exchanged, an arithmetic operator exchanged, a number one more or one less, a truth value or a side exchanged, two
arguments swapped, min for max (ceil for floor, any for all, ...), a sign or a `not` dropped, a statement or a `raise`
removed, a returned value negated or replaced by None. Lines outside functions (constants of modules, defaults) run at
import and are not sampled.

**Tests.** The default tests of the room that pass, interpreted, within `--longest` seconds of processor time. Each is
run once in a process of its own that notes the lines it executes; a mutant is then met by the tests that execute its
statement, fastest first, until one fails. A test that takes five times as long as before (and five seconds) has failed.

**Speed.** One warm process imports everything and collects the tests; every mutant is a fork of it in which the code
objects of one function are exchanged, so it costs little more than the tests it meets. Compiled functions are
interpreted (NUMBA_DISABLE_JIT), hypothesis does not shrink what it finds.

**Hangs.** A fork is over when its process has ended, whatever processes of the test still hold its pipe; the parent
ends the whole group, by force where it outlives ten times what its tests may take. The log has a line for every test of
the baseline and for every mutant, so that an interrupted run costs what was in flight.

What survives is listed with its line: each is equivalent to the original, or changes nothing that can be observed
(a guess the search starts from, work saved), or lacks a test.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import gc
import hashlib
import importlib
import io
import json
import os
import pickle
import pkgutil
import random
import resource
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

os.environ["NUMBA_DISABLE_JIT"] = "1"
for library in ("OMP", "OPENBLAS", "MKL"):
    os.environ[f"{library}_NUM_THREADS"] = "1"

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

#: The packages of each sample, and the folders of tests that answer for them.
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "fluid": (("fluid",), ("fluid",)),
    "policy": (("policy", "queues", "bounds"), ("policy", "queues", "bounds")),
    "simulation": (("simulation",), ("simulation",)),
    "server": (("server", "workload"), ("server", "workload")),
}
MEMORY = 6 << 30  # bytes a mutant may use
SIGNATURE = ("annotation", "returns", "args", "decorator_list")
TEXTS = ("__repr__", "__str__", "__format__", "_repr_html_")

# --------------------------------------------------------------------------- mutations

COMPARISONS: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),  # codespell:ignore
    ast.NotIn: (ast.In,),  # codespell:ignore
}
OPERATORS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
PAIRS = (
    ("min", "max"),
    ("minimum", "maximum"),
    ("fmin", "fmax"),
    ("argmin", "argmax"),
    ("ceil", "floor"),
    ("any", "all"),
    ("nanmin", "nanmax"),
    ("zeros", "ones"),
    ("sum", "max"),
)
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])} | {"max": "min"}


@dataclass(frozen=True)
class Site:
    """A change that can be made to a tree, in place."""

    line: int
    function: str
    statement: ast.stmt
    change: Callable[[], None]


def _setter(node: ast.AST, field: str, value: object) -> Callable[[], None]:
    return lambda: setattr(node, field, value)


def _placer(values: list[Any], index: int, value: object) -> Callable[[], None]:
    def change() -> None:
        values[index] = value

    return change


def _is_text(node: ast.AST) -> bool:
    """Whether a call only makes a message: an exception, a warning, a line of a log."""
    if isinstance(node, ast.JoinedStr):
        return True
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name.endswith(("Error", "Warning")) or name in ("warn", "debug", "info", "warning")


def sites(tree: ast.Module) -> Iterator[Site]:
    """Every change possible inside functions, in the order of the source."""

    def inside(node: ast.AST, function: str, statement: ast.stmt) -> Iterator[Site]:
        for field, value in ast.iter_fields(node):
            children = value if isinstance(value, list) else [value]
            for index, child in enumerate(children):
                if not isinstance(child, ast.AST) or (field in SIGNATURE and not isinstance(node, ast.Call)):
                    continue
                place = (
                    (lambda new, values=value, index=index: _placer(values, index, new))
                    if isinstance(value, list)
                    else (lambda new, node=node, field=field: _setter(node, field, new))
                )
                yield from visit(child, place, function, statement)

    def visit(
        node: ast.AST, place: Callable[[object], Callable[[], None]], function: str, statement: ast.stmt
    ) -> Iterator[Site]:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield from scope(node, function)
            return
        if _is_text(node) or (isinstance(node, ast.keyword) and node.arg == "strict"):
            return
        if isinstance(node, ast.stmt):
            statement = node
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                return
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                return

        def site(change: Callable[[], None]) -> Site:
            return Site(getattr(node, "lineno", statement.lineno), function, statement, change)

        def copy(new: ast.AST) -> ast.AST:
            return ast.copy_location(new, node)

        match node:
            case ast.Raise():
                yield site(place(copy(ast.Pass())))
                return
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Continue() | ast.Break():
                yield site(place(copy(ast.Pass())))
            case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
                yield site(place(copy(ast.Pass())))
            case ast.Return(value=ast.Compare() | ast.BoolOp() | ast.UnaryOp(op=ast.Not())):
                yield site(_setter(node, "value", copy(ast.UnaryOp(ast.Not(), node.value))))
            case ast.Return(value=value) if value is not None and not isinstance(value, ast.Constant):
                yield site(_setter(node, "value", copy(ast.Constant(None))))
            case ast.If() | ast.While() | ast.IfExp():
                yield Site(
                    node.test.lineno,
                    function,
                    statement,
                    _setter(node, "test", copy(ast.UnaryOp(ast.Not(), node.test))),
                )
        match node:
            case ast.Compare():
                for index, op in enumerate(node.ops):
                    for other in COMPARISONS[type(op)]:
                        yield site(_placer(node.ops, index, other()))
            case ast.BinOp() | ast.AugAssign() if type(node.op) in OPERATORS:
                yield site(_setter(node, "op", OPERATORS[type(node.op)]()))
            case ast.BoolOp():
                yield site(_setter(node, "op", ast.Or() if isinstance(node.op, ast.And) else ast.And()))
            case ast.UnaryOp(op=ast.Not() | ast.USub()):
                yield site(place(node.operand))
            case ast.Constant(value=bool()):
                yield site(_setter(node, "value", not node.value))
            case ast.Constant(value=int() | float()):
                yield site(_setter(node, "value", node.value + 1))
                yield site(_setter(node, "value", node.value - 1))
            case ast.Constant(value="left" | "right"):
                yield site(_setter(node, "value", {"left": "right", "right": "left"}[node.value]))
            case ast.Call():
                if isinstance(node.func, ast.Name) and node.func.id in NAMES:
                    yield site(_setter(node.func, "id", NAMES[node.func.id]))
                if isinstance(node.func, ast.Attribute) and node.func.attr in NAMES:
                    yield site(_setter(node.func, "attr", NAMES[node.func.attr]))
                plain = len(node.args) > 1 and not any(isinstance(a, ast.Starred) for a in node.args[:2])
                commutes = getattr(node.func, "id", getattr(node.func, "attr", "")) in {*NAMES, "isinstance"}
                if plain and not commutes and ast.dump(node.args[0]) != ast.dump(node.args[1]):
                    yield site(_setter(node, "args", [node.args[1], node.args[0], *node.args[2:]]))
        yield from inside(node, function, statement)

    def scope(node: ast.AST, outer: str) -> Iterator[Site]:
        """Sites of a module, a class or a function; only what is in a function counts."""
        name = getattr(node, "name", "")
        if isinstance(node, ast.FunctionDef) and (name in TEXTS or name.lstrip("_").startswith("plot")):
            return
        is_function = isinstance(node, ast.FunctionDef)
        function = f"{outer}.{name}" if outer else name
        for index, child in enumerate(node.body):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield from scope(child, f"{function}.<locals>" if is_function else function)
            elif is_function:
                place = lambda new, values=node.body, index=index: _placer(values, index, new)  # noqa: E731
                yield from visit(child, place, function, child)

    yield from scope(tree, "")


def _header(statement: ast.stmt) -> str:
    """One line of source: the statement, or the head of a compound one."""
    text = ast.unparse(statement)
    if isinstance(statement, (ast.If, ast.While, ast.For, ast.With, ast.Try)):
        text = text.split("\n")[0]
    return " ".join(text.split())


@dataclass(frozen=True)
class Mutant:
    """One changed function: the lines of the statement, which is the site-th change of the file, and both versions."""

    path: str
    line: int
    first: int
    last: int
    function: str
    before: str
    after: str
    site: int

    @property
    def name(self) -> str:
        """Which change of which file."""
        return f"{self.path}:{self.line}:{self.site}"

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What stays the same when lines move."""
        return self.path, self.function, self.before, self.after


def _applied(source: str, number: int) -> tuple[ast.Module, Site, str, str]:
    tree = ast.parse(source)
    site = next(s for index, s in enumerate(sites(tree)) if index == number)
    before = _header(site.statement)
    holder = [site.statement]
    for parent in ast.walk(
        tree
    ):  # a removed statement is replaced in its parent: find what stands there then
        for _, value in ast.iter_fields(parent):
            if isinstance(value, list) and site.statement in value:
                holder = [value, value.index(site.statement)]
    site.change()
    ast.fix_missing_locations(tree)
    after = _header(holder[0][holder[1]] if len(holder) == 2 else site.statement)
    return tree, site, before, after


def _mutant(path: Path, number: int) -> Mutant:
    _, site, before, after = _applied(path.read_text(), number)
    statement = site.statement
    body = getattr(statement, "body", None)  # of a compound statement the head counts
    last = max(statement.lineno, body[0].lineno - 1) if body else statement.end_lineno or statement.lineno
    name = str(path.relative_to(ROOT))
    return Mutant(name, site.line, statement.lineno, last, site.function, before, after, number)


def population(files: list[Path]) -> dict[tuple[Path, int], list[int]]:
    """The changes possible at each line of code."""
    lines: dict[tuple[Path, int], list[int]] = {}
    for path in files:
        for number, site in enumerate(sites(ast.parse(path.read_text()))):
            lines.setdefault((path, site.line), []).append(number)
    return lines


def sample(lines: dict[tuple[Path, int], list[int]], count: int, seed: int) -> list[Mutant]:
    """`count` distinct mutants: lines drawn uniformly, then one change each."""
    rng = random.Random(seed)
    chosen: dict[tuple[Path, int], None] = {}
    places = list(lines)
    while len(chosen) < min(count, sum(map(len, lines.values()))):
        place = rng.choice(places)
        chosen[place[0], rng.choice(lines[place])] = None
    return [_mutant(path, number) for path, number in chosen]


# --------------------------------------------------------------------------- running them


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def exchange(mutant: Mutant, live: dict[str, list[FunctionType]]) -> bool:
    """Give every live function around the change its mutated code; whether there was one."""
    path = ROOT / mutant.path
    tree, *_ = _applied(path.read_text(), mutant.site)
    new = {(c.co_qualname, c.co_firstlineno): c for c in _codes(compile(tree, str(path), "exec"))}
    found = False
    for function in live.get(str(path), []):
        code = function.__code__
        name = code.co_qualname
        around = mutant.function == name or mutant.function.startswith(f"{name}.<locals>.")
        if around and (name, code.co_firstlineno) in new:
            function.__code__ = new[name, code.co_firstlineno]
            found = True
    return found


@dataclass
class Known:
    """What the baseline says of a test: processor time, s, and the lines it executes, by path."""

    seconds: float
    lines: dict[str, list[int]]


class Log:
    """JSON lines of what is known of a sample: its header, tests, mutants; in memory only without a path."""

    def __init__(self, path: str | None, header: dict[str, Any]) -> None:
        self.entries: list[dict[str, Any]] = []
        self._stream = None
        if path is None:
            return
        if Path(path).exists():
            first, *lines = Path(path).read_text().splitlines() or ["null"]
            if json.loads(first) != header:
                raise SystemExit(f"{path} is of another sample, or of other source files: name another file")
            for line in lines:
                with contextlib.suppress(json.JSONDecodeError):  # cut by an interruption
                    self.entries.append(json.loads(line))
        else:
            Path(path).write_text(json.dumps(header) + "\n")
        self._stream = open(path, "a", buffering=1)  # noqa: SIM115

    def add(self, **entry: Any) -> None:
        """Note one thing more."""
        self.entries.append(entry)
        if self._stream is not None:
            self._stream.write(json.dumps(entry) + "\n")

    def of(self, kind: str) -> list[dict[str, Any]]:
        """Everything known of one kind: "test" or "mutant"."""
        return [entry for entry in self.entries if kind in entry]


class Runner:
    """A pytest plugin that forks instead of running the tests."""

    def __init__(
        self, options: argparse.Namespace, files: list[Path], log: Log, report: Callable[[str], None]
    ) -> None:
        self.options, self.files, self.log, self.report = options, files, log, report
        self.nowhere = open(os.devnull, "w")  # noqa: SIM115
        self.failed = False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed

    def passes(self, item: Any, following: Any) -> bool:
        self.failed = False
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return not self.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        items = {item.nodeid: item for item in session.items}
        _never_shrink(session.items, self.options.examples)
        terminal = session.config.pluginmanager.get_plugin("terminalreporter")
        terminal._tw._file = self.nowhere  # what the forks would print
        live: dict[str, list[FunctionType]] = {}
        for function in gc.get_objects():
            if isinstance(function, FunctionType):
                live.setdefault(function.__code__.co_filename, []).append(function)
        gc.collect()
        gc.freeze()
        known = self.baseline(items)
        by_line: dict[tuple[str, int], list[str]] = {}
        for name, test in known.items():
            for path, numbers in test.lines.items():
                for number in numbers:
                    by_line.setdefault((path, number), []).append(name)
        drawn = self.mutants()
        judged = {entry["mutant"]: entry for entry in self.log.of("mutant")}
        mutants = [m for m in drawn if m.name not in judged]
        self.report(f"{len(drawn) - len(mutants)} of {len(drawn)} mutants are in the log")

        def attempt(mutant: Mutant) -> Callable[[Any], None]:
            path, lines = str(ROOT / mutant.path), range(mutant.first, mutant.last + 1)
            met = {name for line in lines for name in by_line.get((path, line), ())}
            names = sorted(met, key=lambda name: known[name].seconds)

            def child(send: Callable[[object], None]) -> None:
                resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
                if not exchange(mutant, live):
                    send({"outcome": "not exchanged"})
                    return
                spent = 0.0
                for index, name in enumerate(names):
                    limit = 5 * known[name].seconds + 5
                    _limit(limit)
                    send({"outcome": "timeout", "by": name})  # holds if nothing follows
                    following = items[names[index + 1]] if index + 1 < len(names) else None
                    if not self.passes(items[name], following):
                        send({"outcome": "killed", "by": name})
                        return
                    spent += known[name].seconds
                    if spent > self.options.budget:
                        send({"outcome": "survived", "tests": index + 1, "of": len(names)})
                        return
                send({"outcome": "survived" if names else "not run", "tests": len(names)})

            return child

        def done(mutant: Mutant, answer: list[Any]) -> None:
            last = answer[-1] if answer else {"outcome": "crashed"}
            outcome = {"outcome": "crashed", "by": last} if isinstance(last, str) else last
            result = {"mutant": mutant.name} | asdict(mutant) | outcome
            self.log.add(**result)
            if result["outcome"] in ("survived", "not run", "not exchanged"):
                self.report(f"{result['outcome']}: {mutant.path}:{mutant.line} {mutant.function}")
                self.report(f"    {mutant.before}\n    {mutant.after}")
            count = len(self.log.of("mutant"))
            if count % 25 == 0:
                self.report(f"-- {count} of {len(drawn)} after {time.monotonic() - start:.0f} s")

        start = time.monotonic()
        longest = 10 * (self.options.budget + 5 * self.options.longest + 5)
        forked([(m, attempt(m)) for m in mutants], self.options.workers, longest, done)
        return True

    def mutants(self) -> list[Mutant]:
        lines = population(self.files)
        self.report(f"{len(lines)} lines, {sum(map(len, lines.values()))} changes")
        if self.options.again is None:
            return sample(lines, self.options.mutants, self.options.seed)
        earlier = [json.loads(line) for line in Path(self.options.again).read_text().splitlines()]
        wanted = {
            (m["path"], m["function"], m["before"], m["after"])
            for m in earlier
            if m.get("outcome") in ("survived", "not run")
        }
        heads = {(path, function, before) for path, function, before, _ in wanted}
        found: dict[tuple[str, str, str, str], Mutant] = {}
        for path in self.files:
            name = str(path.relative_to(ROOT))
            for number, site in enumerate(sites(ast.parse(path.read_text()))):
                if (name, site.function, _header(site.statement)) in heads:
                    mutant = _mutant(path, number)
                    if mutant.key in wanted:
                        found.setdefault(mutant.key, mutant)
        self.report(f"{len(found)} of {len(wanted)} survivors found again in the source")
        return list(found.values())

    def baseline(self, items: dict[str, Any]) -> dict[str, Known]:
        """Run every test by itself: those that pass in time, their time and their lines."""
        import coverage

        tracer = coverage.Coverage(data_file=None, config_file=False, include=[str(f) for f in self.files])
        tracer.set_option(
            "run:disable_warnings", ["no-data-collected"]
        )  # by a test that never enters the room
        seen = {entry["test"] for entry in self.log.of("test")}

        def attempt(item: Any) -> Callable[[Any], None]:
            def child(send: Callable[[object], None]) -> None:
                _limit(2 * self.options.longest)
                tracer.start()
                begun = time.process_time()
                good = self.passes(item, None)
                seconds = time.process_time() - begun
                tracer.stop()
                data = tracer.get_data()
                lines = {path: sorted(data.lines(path) or ()) for path in data.measured_files()}
                send((good, seconds, lines))

            return child

        def done(name: str, answer: list[Any]) -> None:
            if answer and isinstance(answer[-1], str):
                raise RuntimeError(answer[-1])
            if answer and answer[-1][0] and answer[-1][1] <= self.options.longest:
                self.log.add(test=name, seconds=answer[-1][1], lines=answer[-1][2])
            else:
                self.log.add(test=name, left_out="fails" if answer and not answer[-1][0] else "slow")

        jobs = [(name, attempt(item)) for name, item in items.items() if name not in seen]
        forked(jobs, self.options.workers, 20 * self.options.longest + 60, done)
        entries = [entry for entry in self.log.of("test") if entry["test"] in items]
        known = {e["test"]: Known(e["seconds"], e["lines"]) for e in entries if "left_out" not in e}
        total = sum(test.seconds for test in known.values())
        self.report(
            f"{len(known)} tests, {total:.0f} s of processor time; left out {len(items) - len(known)}:"
        )
        for entry in entries:
            if "left_out" in entry:
                self.report(f"    {entry['test']} ({entry['left_out']})")
        return known


def _limit(seconds: float) -> None:
    """End this process after so much processor time, or ten times as long on the clock."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, 10 * seconds)


def _never_shrink(items: list[Any], examples: int) -> None:
    """A failure is enough: hypothesis neither shrinks it nor looks for others. And so many examples are."""
    from hypothesis import Phase, settings

    field = "_hypothesis_internal_use_settings"
    for item in items:
        function = getattr(item.obj, "__func__", item.obj)
        if hasattr(function, field):
            asked = getattr(function, field)
            chosen = settings(
                asked,
                phases=(Phase.explicit, Phase.generate),
                report_multiple_bugs=False,
                max_examples=min(examples, asked.max_examples),
            )
            setattr(function, field, chosen)


@dataclass
class Fork:
    """A job running in a fork: its process, its pipe, what came through it, and when it is ended by force."""

    pid: int
    pipe: int
    label: Any
    until: float
    received: bytearray

    def has_ended(self) -> bool:
        """Whether the process has; then whatever it started is ended too, and its pipe read to the end."""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self.pipe, 1 << 20):
                self.received += piece
        ended = os.waitpid(self.pid, os.WNOHANG)[0] == self.pid
        if ended or time.monotonic() > self.until:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)  # the fork, and processes the test had started
        if ended:
            with contextlib.suppress(BlockingIOError):
                while piece := os.read(self.pipe, 1 << 20):
                    self.received += piece
            os.close(self.pipe)
        return ended


def forked(
    jobs: list[tuple[Any, Callable[[Any], None]]],
    workers: int,
    longest: float,
    done: Callable[[Any, list[Any]], None],
) -> None:
    """Run every job in a fork of this process, `workers` at a time; `done(label, what it sent)` after each.

    None runs longer than `longest` seconds on the clock, even where the timers it set for itself did not end it.
    """
    queue = list(reversed(jobs))
    running: list[Fork] = []
    while queue or running:
        while queue and len(running) < workers:
            label, job = queue.pop()
            reading, writing = os.pipe()
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                os.close(reading)
                null = os.open(os.devnull, os.O_RDWR)
                for stream in (0, 1, 2):
                    os.dup2(null, stream)
                try:
                    with os.fdopen(writing, "wb", buffering=0) as pipe:
                        try:
                            job(lambda message, pipe=pipe: pipe.write(pickle.dumps(message)))
                        except BaseException:
                            pipe.write(pickle.dumps(traceback.format_exc()))
                finally:
                    os._exit(0)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, pid)  # whoever comes first
            os.close(writing)
            os.set_blocking(reading, False)
            running.append(Fork(pid, reading, label, time.monotonic() + longest, bytearray()))
        select.select([fork.pipe for fork in running], [], [], 0.1)
        time.sleep(0.002)  # a closed pipe is always ready, and its process about to end
        for fork in list(running):
            if fork.has_ended():
                running.remove(fork)
                done(fork.label, list(_messages(bytes(fork.received))))


def _messages(received: bytes) -> Iterator[Any]:
    stream = io.BytesIO(received)
    while True:
        try:
            yield pickle.load(stream)
        except (EOFError, pickle.UnpicklingError):
            return


def main() -> int:
    """Draw the mutants of a room, run them, and say which survive."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("room", choices=ROOMS)
    parser.add_argument("--mutants", type=int, default=150)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--longest", type=float, default=2.0, help="processor time of a test, s")
    parser.add_argument("--budget", type=float, default=60.0, help="processor time of a survivor's tests, s")
    parser.add_argument("--examples", type=int, default=100, help="most examples of a random test")
    parser.add_argument("--modules", nargs="*", help="only these of the room's modules, by name")
    parser.add_argument("--tests", nargs="*", help="only these of the room's test files, by name")
    parser.add_argument("--log", help="file of JSON lines: every test and mutant and what became of it")
    parser.add_argument("--again", help="the log of an earlier sample: run its survivors only")
    options = parser.parse_args()

    packages, folders = ROOMS[options.room]
    files = [path for name in packages for path in sorted((ROOT / "fluidsched" / name).glob("*.py"))]
    tests = [path for name in folders for path in sorted((ROOT / "tests" / name).glob("test_*.py"))]
    if options.tests:
        tests = [path for path in tests if path.stem in options.tests]
    if options.modules:
        files = [path for path in files if path.stem in options.modules]
    stream = os.fdopen(os.dup(1), "w", buffering=1)

    import coverage  # noqa: F401  (missing, it would end the plugin only)
    import highspy  # noqa: F401
    import pytest
    import scipy.optimize
    import scipy.stats

    for name in packages:
        package = importlib.import_module(f"fluidsched.{name}")
        for module in pkgutil.iter_modules(package.__path__, f"fluidsched.{name}."):
            importlib.import_module(module.name)
    header = {
        key: getattr(options, key)
        for key in ("room", "mutants", "seed", "longest", "examples", "modules", "tests", "again")
    }
    header["source"] = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()
    log = Log(options.log, header)
    runner = Runner(options, files, log, lambda text: print(text, file=stream))
    arguments = [
        *(str(path) for path in tests),
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
    ]
    pytest.main(arguments, plugins=[runner])

    results = [m for m in log.of("mutant") if m["outcome"] != "not exchanged"]
    if not results:
        print("no mutant was run", file=stream)
        return 1
    killed = sum(r["outcome"] in ("killed", "timeout", "crashed") for r in results)
    interval = scipy.stats.binomtest(killed, len(results)).proportion_ci(method="exact")
    print(f"{killed} of {len(results)} killed: {killed / len(results):.1%}", file=stream, end=" ")
    print(f"(95 % interval {interval.low:.1%} to {interval.high:.1%})", file=stream)
    return 0


if __name__ == "__main__":
    sys.exit(main())
