"""What commands write: results on standard output, remarks and progress on standard error, an exit status."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from typer.models import OptionInfo

from fluidsched import _files
from fluidsched.errors import FluidschedError, InfeasibleError, InputError

EXIT_NO_ANSWER, EXIT_INPUT, EXIT_FAILURE, EXIT_INTERRUPTED = 1, 2, 3, 130

LIBRARY_NAMES = {
    "tensor_parallel": "tp",
    "directory": "out",
    "knobs": "knob",
    "max_iteration_time": "itl_target",
    "chunk_tokens": "chunk",
    "fairness_floor": "floor",
    "targets['p99_ttft']": "ttft_p99",
    "targets['p99_tpot']": "tpot_p99",
}
"""Arguments of the library whose option goes by another name."""

P = ParamSpec("P")
R = TypeVar("R")


def leave(message: str, status: int) -> NoReturn:
    print(f"fluidsched: {message}", file=sys.stderr)
    raise SystemExit(status)


def options_of(function: Callable[..., object]) -> dict[str, str]:
    """The option (`--itl-target`) by the name of its parameter, and by the option's own name in Python's letters."""
    found = {}
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        for info in getattr(parameter.annotation, "__metadata__", ()):
            if isinstance(info, OptionInfo):
                words = (
                    info.default,
                    *(info.param_decls or ()),
                )  # within Annotated the first lies in `default`
                long = [word for word in words if isinstance(word, str) and word.startswith("--")]
                option = long[0] if long else "--" + name.replace("_", "-")
                found[name] = found[option.removeprefix("--").replace("-", "_")] = option
    return found


def in_options(error: InputError, options: dict[str, str]) -> str:
    """The sentence of an error of the library, its argument called as on the command line."""
    argument = error.argument if error.argument in options else LIBRARY_NAMES.get(error.argument)
    if argument not in options:
        return str(error)
    return str(InputError(options[argument], error.received, error.required, error.remedy))


def answers(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the library's errors into a sentence on stderr and the documented exit status."""

    options = options_of(function)

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            leave(in_options(error, options), EXIT_INPUT)
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
            # policies of one simulation count towards one total: one bar, which says whose turn it is
            line = "simulate" if stage.startswith("simulate ") else stage
            if line not in tasks:
                tasks[line] = bar.add_task(stage, total=total)
            bar.update(tasks[line], completed=done, total=total, description=stage)

        yield report


def emit(text: str) -> None:
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def check_new(option: str, path: Path, force: bool) -> None:
    if not os.path.isdir(path.parent):
        raise InputError(option, str(path), "lie in an existing directory", "Create it first.")
    if os.path.exists(path) and not force:
        raise InputError(
            option, str(path), "name a file that does not exist", "Choose another, or add --force."
        )


def write_new(out: Path, text: str, force: bool) -> None:
    check_new("--out", out, force)
    _files.write_whole(out, text)


def show_values(values: dict[str, Any], text: str, out: Path | None, force: bool, as_json: bool) -> None:
    """Write plain values, schema first, as JSON to `out`, if given; show them as JSON, or the text for people."""
    document = _files.dumps(values)
    if out is not None:
        write_new(out, document, force)
    emit(document if as_json else text)
