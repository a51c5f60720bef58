"""What commands write: results on standard output, remarks and progress on standard error, an exit status."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from fluidsched import _files
from fluidsched.errors import FluidschedError, InfeasibleError, InputError

EXIT_NO_ANSWER, EXIT_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED = 1, 2, 3, 130

P = ParamSpec("P")
R = TypeVar("R")


def leave(message: str, status: int) -> NoReturn:
    print(f"fluidsched: {message}", file=sys.stderr)
    raise SystemExit(status)


def answers(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the library's errors into a sentence on stderr and the documented exit status."""

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            leave(str(error), EXIT_INPUT)
        except InfeasibleError as error:
            leave(str(error), EXIT_NO_ANSWER)
        except FluidschedError as error:
            leave(f"{type(error).__name__}: {error}", EXIT_FAILURE)
        except KeyboardInterrupt:
            leave("interrupted; files written so far are whole.", EXIT_INTERRUPTED)

    return command


@contextmanager
def progress_bar(quiet: bool) -> Iterator[Callable[[str, int, int], None] | None]:
    """A progress bar on stderr while it is a terminal; otherwise nothing."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total)
            bar.update(tasks[stage], completed=done, total=total)

        yield report


def emit(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def write_new(out: Path, text: str, force: bool) -> None:
    if out.exists() and not force:
        raise InputError(
            "--out", str(out), "name a file that does not exist", "Choose another, or add --force."
        )
    _files.write_whole(out, text)


def show(result: Any, out: Path | None, force: bool, as_json: bool) -> None:
    """Write a step's result as JSON to `out`, if given, and show it: for people, or as JSON."""
    show_values(result.to_dict(), repr(result), out, force, as_json)


def show_values(values: dict[str, Any], text: str, out: Path | None, force: bool, as_json: bool) -> None:
    """The same of plain values, schema first, and of the text that people read."""
    document = _files.dumps(values)
    if out is not None:
        write_new(out, document, force)
    emit(document if as_json else text)
