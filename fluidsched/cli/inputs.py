"""What options name: the workload, server, solution or table, read and checked."""

from __future__ import annotations

import os
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fluidsched import _files
from fluidsched._checks import check_real
from fluidsched._toml import locating, read_toml
from fluidsched.errors import InputError

if TYPE_CHECKING:
    from fluidsched.fluid import FluidSolution
    from fluidsched.policy import PolicyTable
    from fluidsched.server import Server
    from fluidsched.workload import ArrivalPath, Workload

R = TypeVar("R")


def read_spec(argument: str, path: Path) -> dict[str, Any]:
    """Read a TOML or JSON file into a dictionary."""
    if path.suffix.lower() == ".toml":
        return read_toml(argument, path)
    data = _files.loads(str(path), _files.read_text(argument, path))
    if not isinstance(data, dict):
        raise InputError(f"{argument} {path}", type(data).__name__, "hold one JSON object")
    return data


def read_as(argument: str, path: Path, reader: Callable[[dict[str, Any]], R]) -> R:
    """What `reader` makes of a spec file; its complaints name the file and, of TOML, the line."""
    data = read_spec(argument, path)
    with locating(path):
        return reader(data)


def load_workload(
    name: str, *, prefix_cache_tokens: float | Literal["shared"] | None = None
) -> Workload | ArrivalPath:
    """An embedded workload by name, a spec by its suffix, else a trace, read with a prefix cache if one is given."""
    from fluidsched.workload import Workload, read_trace, workloads
    from fluidsched.workload.model import SCHEMA
    from fluidsched.workload.traces import is_json_trace

    if name in workloads.names():
        return workloads.get(name)
    path = Path(name)
    if not os.path.exists(path):
        near = get_close_matches(name, workloads.names(), n=3)
        hint = (
            f"Did you mean {' or '.join(near)}?" if near else f"Embedded are {', '.join(workloads.names())}."
        )
        raise InputError(
            "--workload", name, "name an embedded workload or an existing trace or spec file", hint
        )
    if path.suffix.lower() == ".toml" or (path.suffix.lower() == ".json" and not is_json_trace(path)):
        named = {"schema": SCHEMA, "name": path.stem}
        return read_as("--workload", path, lambda given: Workload.from_dict(named | given))
    return read_trace(path, prefix_cache_tokens=prefix_cache_tokens)


def load_server(gpu: str | None, model: str | None, tp: int | None, spec: Path | None) -> Server:
    from fluidsched.server import Server, catalog

    if spec is not None:
        if gpu is not None or model is not None or tp is not None:
            raise InputError("--server", str(spec), "stand alone", "Leave out --gpu, --model and --tp.")
        stem = spec.stem
        return read_as("--server", spec, lambda given: Server.from_dict(_with_server_defaults(given, stem)))
    return catalog.server(gpu or "a100-80gb", model or "llama-2-7b", tensor_parallel=1 if tp is None else tp)


def _with_server_defaults(given: dict[str, Any], name: str) -> dict[str, Any]:
    """A server's spec with what a person may leave out, as in `Server`; TOML cannot say null."""
    from fluidsched.server.iteration import SCHEMA as ITERATION_SCHEMA
    from fluidsched.server.server import SCHEMA as SERVER_SCHEMA

    limits = dict.fromkeys(("max_batch_size", "token_budget", "block_size"))
    spec: dict[str, Any] = {"schema": SERVER_SCHEMA, "name": name, "source": "", **limits} | given
    pieces = spec.get("iteration_time")
    if isinstance(pieces, dict):
        spec["iteration_time"] = {"schema": ITERATION_SCHEMA} | pieces
    return spec


def check_load(load: float | None) -> float | None:
    return load if load is None else check_real("--load", load, above=0.0)


def typed_workload(name: str | None, load: float | None, server: Server) -> Workload:
    """The workload of `--workload` and `--load`, a trace turned into 12 request types."""
    from fluidsched.planning import types_for
    from fluidsched.workload import ArrivalPath, workloads

    given = load_workload("azure_conv" if name is None else name)
    if isinstance(given, ArrivalPath):
        given = given.to_workload(types=types_for(given))
    elif load is None and (name is None or name in workloads.names()):
        load = 0.8
    load = check_load(load)
    return given if load is None else given.at_load(load, server)


def server_and_number(option: str, text: str, model: str | None, what: str) -> tuple[Server, float]:
    """The server and the number of GPU=NUMBER, GPU:TP=NUMBER or SPEC=NUMBER."""
    name, equals, given = text.rpartition("=")
    try:
        number = float(given)
    except ValueError:
        number = -1.0
    if not equals or not 0.0 < number < float("inf"):
        raise InputError(option, text, f"be GPU={what}, GPU:TP={what} or SPEC={what}, a positive number")
    if Path(name).suffix.lower() in (".toml", ".json"):
        return load_server(None, None, None, Path(name)), number
    gpu, colon, degree = name.partition(":")
    if colon and not degree.isdecimal():
        raise InputError(option, text, "have a whole tensor-parallel degree after the colon")
    try:
        return load_server(gpu, model, int(degree) if colon else None, None), number
    except InputError as error:
        if error.argument == "model":
            raise
        named = f"{option} {text}: {error.argument}"
        raise InputError(named, error.received, error.required, error.remedy) from None


def per_type(option: str, given: list[str], names: tuple[str, ...], rest: float | None) -> list[float]:
    """One number per type from VALUE (every type) and TYPE=VALUE (that one); `rest` for types without."""
    values = dict.fromkeys(names, rest)
    for text in sorted(given, key=lambda one: "=" in one):  # a value for all is overruled by one for a type
        name, equals, number = text.rpartition("=")
        if equals and name not in values:
            raise InputError(option, text, f"name a type of the workload: {', '.join(names)}")
        try:
            value = float(number)
        except ValueError:
            raise InputError(option, text, "be VALUE or TYPE=VALUE with a number") from None
        values.update({name: value} if equals else dict.fromkeys(names, value))
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise InputError(
            option, f"nothing for {missing[0]!r}", "give every type a value", "Add VALUE for the rest."
        )
    return [value for value in values.values() if value is not None]


def own_rate_workload(name: str) -> Workload:
    """The workload at its own rate; a trace as request types."""
    from fluidsched.planning import types_for
    from fluidsched.workload import ArrivalPath

    given = load_workload(name)
    return given.to_workload(types=types_for(given)) if isinstance(given, ArrivalPath) else given


def sampling_options(replay: bool, **options: float | str | None) -> dict[str, Any]:
    """The sampling options that were given; none may be where the trace itself is replayed."""
    given = {name: value for name, value in options.items() if value is not None}
    if replay and given:
        name, value = next(iter(given.items()))
        raise InputError(
            f"--{name}",
            value,
            "be left out where --replay runs the trace alone",
            "That run is one, whole.",
        )
    return given


def latency_targets(ttft_p99: float | None, tpot_p99: float | None) -> dict[str, float]:
    """Measure → limit of the targets given."""
    given = {"p99_ttft": ttft_p99, "p99_tpot": tpot_p99}
    return {measure: limit for measure, limit in given.items() if limit is not None}


def load_solution(path: Path, argument: str = "solution") -> FluidSolution:
    from fluidsched.fluid import FluidSolution

    return read_as(argument, path, FluidSolution.from_dict)


def load_table(name: str) -> PolicyTable:
    """A stock engine by name, else a table file (.json or .csv)."""
    from fluidsched.policy import PolicyTable, baselines

    makers = (
        baselines.vllm,
        baselines.sarathi,
        baselines.vllm_v0,
        baselines.mc_sf,
        baselines.a_max,
        baselines.a_min,
    )
    stock = {table.name: table for table in (make() for make in makers)}
    if name in stock:
        return stock[name]
    path = Path(name)
    if not os.path.exists(path):
        near = get_close_matches(name, stock, n=1)
        raise InputError(
            "table",
            name,
            f"be one of {', '.join(stock)} or an existing .json or .csv table file",
            f"Did you mean {near[0]!r}?" if near else "",
        )
    if path.suffix.lower() == ".csv":
        return PolicyTable.from_csv(path)
    return read_as("table", path, PolicyTable.from_dict)
