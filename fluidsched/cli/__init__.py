"""The command line: `fluidsched plan`, the whole chain, and its steps one at a time.

Results go to standard output (a table for people, ``--json`` for programs), remarks and progress to standard error.
Exit statuses: 0 an answer was produced, 1 no answer exists, 2 the input was wrong, 3 a solver or internal failure,
130 interrupted (files written so far are whole).

One module per family of commands; each imports what it needs inside its functions, so that help and errors are quick.
`COMMANDS` lists them in the order in which the help shows them.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fluidsched import __version__
from fluidsched.cli import (
    capacity,
    fluid,
    installation,
    main_job,
    policies,
    servers,
    simulation,
    sweeps,
    tuning,
)
from fluidsched.cli.options import in_place
from fluidsched.cli.outputs import answers, emit

__all__ = ["app", "main"]

COMMANDS: dict[str, Callable[..., None]] = {
    "plan": main_job.plan,
    "solve": fluid.solve,
    "region": fluid.region,
    "transient": fluid.transient,
    "compile": policies.compile_,
    "simulate": simulation.simulate,
    "compare": simulation.compare,
    "capacity": capacity.capacity,
    "sweep": sweeps.sweep,
    "tune": tuning.tune,
    "catalog": servers.catalog,
    "calibrate": servers.calibrate,
    "doctor": installation.doctor,
}

app = typer.Typer(
    name="fluidsched",
    help="Decide with mathematics how an LLM server admits and schedules requests.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _print_version(value: bool) -> None:
    if value:
        emit(f"fluidsched {__version__}")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version and leave."),
    ] = False,
) -> None:
    pass


for _name, _command in COMMANDS.items():
    app.command(name=_name)(answers(in_place(_command)))


def main() -> None:
    """Entry point of the `fluidsched` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # where ≥ or ─ cannot be written: a question mark, not a traceback
            stream.reconfigure(errors="replace")
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    app()
