"""What commands write: results on standard output, remarks and progress on standard error, an exit status."""

from __future__ import annotations

import functools
import inspect
import os
import re
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


_MENTIONED = re.compile(
    r"""(?<![\w.'"\[-])            # no part of a longer name, a path, a subscript or a literal
    (?P<mark>`?)(?P<name>[a-z]\w*)(?P=mark)
    (?:=(?P<value>"[^"]*"|[\d,.]*\d|\w+))?
    (?![\w'"\]])""",
    re.VERBOSE,
)
"""A word of a sentence that may be an argument of the library, as `slo`, token_budget or load=0.8."""


def option_for(argument: str, options: dict[str, str]) -> str | None:
    """The option for an argument of the library, or for an entry of one (`knobs['gate']`: --knob gate)."""
    name = argument if argument in options else LIBRARY_NAMES.get(argument)
    if name in options:
        return options[name]
    entry = re.fullmatch(r"(\w+)\['(\w+)'\]", argument)
    whole = None if entry is None else option_for(entry[1], options)
    return None if entry is None or whole is None else f"{whole} {entry[2]}"


def in_options(text: str, options: dict[str, str]) -> str:
    """A sentence of the library with its arguments called as on the command line.

    A word counts as an argument if it is in backquotes, has a value, or has an underscore, as no word of English.
    """

    def called(found: re.Match[str]) -> str:
        meant = found["mark"] or found["value"] or "_" in found["name"]
        option = option_for(found["name"], options) if meant else None
        if option is None:
            return found[0]
        value = (found["value"] or "").strip('"').replace(",", "")
        return f"{option} {value}".rstrip()

    return _MENTIONED.sub(called, text)


def in_command_words(error: InputError, options: dict[str, str]) -> str:
    """The sentence of an error of the library as the command says it."""
    argument = option_for(error.argument, options) or error.argument
    return str(
        InputError(
            argument, error.received, in_options(error.required, options), in_options(error.remedy, options)
        )
    )


def answers(function: Callable[P, R]) -> Callable[P, R]:
    """Turn the library's errors into a sentence on stderr and the documented exit status."""

    options = options_of(function)

    @functools.wraps(function)
    def command(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return function(*args, **kwargs)
        except InputError as error:
            leave(in_command_words(error, options), EXIT_INPUT)
        except InfeasibleError as error:
            leave(in_options(str(error), options), EXIT_NO_ANSWER)
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
