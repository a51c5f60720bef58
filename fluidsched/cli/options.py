"""Options that several commands share, in groups.

A command takes a group as one parameter, ``on: ServerChoice``; `in_place` puts the group's options into the command
line in its stead, and the group's methods make of them what the command needs. So an option is written down once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from fluidsched.cli import inputs, outputs

if TYPE_CHECKING:
    from fluidsched.server import Server
    from fluidsched.workload import Workload

__all__ = [
    "Answer",
    "Demand",
    "ForceOption",
    "ItlOption",
    "Limits",
    "Sampling",
    "ServerChoice",
    "Shown",
    "TpotOption",
    "TtftOption",
    "WarmupOption",
    "WorkloadOption",
    "in_place",
]

R = TypeVar("R")


def _workloads(incomplete: str) -> list[str]:
    """Embedded workloads and files that begin so, for the shell."""
    from glob import escape, glob

    from fluidsched.workload import workloads

    files = glob(escape(incomplete) + "*")
    return [name for name in workloads.names() if name.startswith(incomplete)] + sorted(files)


def _gpus(incomplete: str) -> list[str]:
    from fluidsched.server import catalog

    return sorted({e.gpu for e in catalog.entries() if e.gpu.startswith(incomplete)})


def _models(incomplete: str) -> list[str]:
    from fluidsched.server import catalog

    return sorted({e.model for e in catalog.entries() if e.model.startswith(incomplete)})


WorkloadOption = Annotated[
    str | None,
    typer.Option(
        "--workload",
        "-w",
        metavar="NAME|TRACE|SPEC",
        help="azure_conv (the default), azure_code or mooncake_synthetic, a trace file, or a .toml/.json spec.",
        autocompletion=_workloads,
    ),
]


def _silence(context: typer.Context, quiet: bool) -> bool:
    """Only errors are logged while a command with --quiet runs."""
    if quiet:
        root = logging.getLogger()
        context.call_on_close(functools.partial(root.setLevel, root.level))
        root.setLevel(logging.ERROR)
    return quiet


JsonOption = Annotated[bool, typer.Option("--json", help="Machine-readable result on standard output.")]
QuietOption = Annotated[
    bool,
    typer.Option("--quiet", "-q", callback=_silence, help="No progress and no remarks on standard error."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Write over files that are there.")]
WarmupOption = Annotated[
    float | None, typer.Option(help="Seconds left out of the measures (default: a sixth of the horizon).")
]
TtftOption = Annotated[float | None, typer.Option("--ttft-p99", help="p99 TTFT at most, s.")]
TpotOption = Annotated[float | None, typer.Option("--tpot-p99", help="p99 TPOT at most, s.")]
ItlOption = Annotated[float | None, typer.Option("--itl-target", help="Mean time between tokens at most, s.")]
ChunkOption = Annotated[int | None, typer.Option("--chunk", help="Prefill in chunks of so many tokens.")]


class Group:
    """What `in_place` recognises; a subclass is a dataclass whose fields are options."""


@dataclass(frozen=True)
class ServerChoice(Group):
    """A server of the catalog, or a spec."""

    gpu: Annotated[
        str | None,
        typer.Option("--gpu", help="GPU of the catalog (default a100-80gb).", autocompletion=_gpus),
    ] = None
    model: Annotated[
        str | None,
        typer.Option("--model", help="Model of the catalog (default llama-2-7b).", autocompletion=_models),
    ] = None
    tp: Annotated[int | None, typer.Option("--tp", help="Tensor-parallel degree (default 1).")] = None
    server: Annotated[
        Path | None,
        typer.Option("--server", metavar="SPEC", help="A server spec (.toml/.json) instead of the catalog."),
    ] = None

    def load(self) -> Server:
        """The server chosen."""
        return inputs.load_server(self.gpu, self.model, self.tp, self.server)

    def given(self) -> dict[str, object]:
        """Option → value, of those that were given."""
        options = {"--gpu": self.gpu, "--model": self.model, "--tp": self.tp, "--server": self.server}
        return {option: value for option, value in options.items() if value is not None}


@dataclass(frozen=True)
class Demand(Group):
    """A workload and the load it is scaled to."""

    workload: WorkloadOption = None
    load: Annotated[
        float | None,
        typer.Option("--load", help="Scale to this share of the fluid boundary (embedded default: 0.8)."),
    ] = None

    def types(self, server: Server) -> Workload:
        """Its request types, a trace turned into 12, scaled."""
        return inputs.typed_workload(self.workload, self.load, server)


@dataclass(frozen=True)
class Sampling(Group):
    """How long and how often to simulate."""

    horizon: Annotated[
        float | None, typer.Option("--horizon", help="Simulated seconds per replication (default 3600).")
    ] = None
    replications: Annotated[
        int | None,
        typer.Option(
            "--replications", help="Independent arrival paths, common to all policies (default 16)."
        ),
    ] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of the arrival paths (default 7).")] = None

    def given(self, *, replay: bool, warmup: float | str | None) -> dict[str, Any]:
        """The options that were given, a warm-up too; none may be where the trace itself is replayed."""
        return inputs.sampling_options(replay, **dataclasses.asdict(self), warmup=warmup)


@dataclass(frozen=True)
class Limits(Group):
    """What the fluid program may be asked beside the server's own limits."""

    itl_target: ItlOption = None
    chunk: ChunkOption = None

    def arguments(self) -> dict[str, Any]:
        """As arguments of the library."""
        return {"max_iteration_time": self.itl_target, "chunk_tokens": self.chunk}


@dataclass(frozen=True)
class Shown(Group):
    """How results are shown; at the end of every command's options."""

    as_json: JsonOption = False
    quiet: QuietOption = False


@dataclass(frozen=True)
class Answer(Group):
    """Where a result goes and how it is shown; at the end of a command's options."""

    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the result as JSON to this file.")
    ] = None
    force: ForceOption = False
    as_json: JsonOption = False
    quiet: QuietOption = False

    def check_new(self) -> None:
        """Refuse a file that exists before anything is computed."""
        if self.out is not None:
            outputs.check_new("--out", self.out, self.force)

    def show(self, result: Any) -> None:
        """Write a step's result to --out and show it: for people, or as JSON."""
        self.show_values(result.to_dict(), repr(result))

    def show_values(self, values: dict[str, Any], text: str) -> None:
        """The same of plain values, schema first, and of the text that people read."""
        outputs.show_values(values, text, self.out, self.force, self.as_json)


def in_place(function: Callable[..., R]) -> Callable[..., R]:
    """The command with the options of its groups in place of the groups themselves."""
    members: dict[str, type[Group]] = {}
    flat: list[inspect.Parameter] = []
    last: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function, eval_str=True).parameters.items():
        kind = parameter.annotation
        if not (isinstance(kind, type) and issubclass(kind, Group)):
            flat.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        members[name] = kind
        hints = get_type_hints(kind, include_extras=True)
        (last if kind in (Answer, Shown) else flat).extend(
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=field.default,
                annotation=hints[field.name],
            )
            for field in dataclasses.fields(kind)  # type: ignore[arg-type]  # every group is a dataclass
        )

    @functools.wraps(function)
    def command(**given: Any) -> R:
        for name, kind in members.items():
            own = [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
            given[name] = kind(**{option: given.pop(option) for option in own if option in given})
        return function(**given)

    signature = inspect.Signature([*flat, *last])
    command.__signature__ = signature  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
    return command
