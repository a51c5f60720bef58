"""The cell of a simulation sweep: from dotted parameters to the measures of one policy on one workload.

=========================================  ==================================================================
parameter                                  meaning
=========================================  ==================================================================
``workload``                               name of an embedded workload, or a `Workload`
``workload.file``                          a trace, or the JSON of a workload
``workload.types``                         types that a trace is binned into (12)
``workload.replay``                        true: replay the trace as it is, instead of sampling the workload
``workload.scale``, ``workload.load``      all rates times this; or rates at this share of the fluid boundary
``workload.<type>.<field>``                a field of one request type, e.g. ``workload.chat.arrival_rate``
``server``, ``server.file``                a `Server`, or its JSON
``server.gpu``, ``server.model``, …        arguments of `catalog.server`
``server.iteration_time.<form>.<c>``       arguments of ``IterationTime.<form>``, e.g. ``….paper.d1``
``server.<field>``                         a field of the server, e.g. ``server.max_batch_size``
``policy``, ``policy.kind``                a baseline ("vllm", …) or a kind to compile ("capped", "wait", …)
``policy``, ``policy.file``                a `PolicyTable`, or its JSON
``policy.<argument>``                      an argument of the baseline or of `compile_policy`
``policy.<field>``, ``policy.<type>.<f>``  a field of the table, or of one row of it
``slo.<latency>``                          limit per request, s; adds goodput
``objective``                              of the fluid program
``horizon``, ``warmup``, …                 arguments of `simulate`
``seed``                                   any value; another one means other random numbers
=========================================  ==================================================================
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any, TypeVar

import numpy as np

from fluidsched import _files
from fluidsched._toml import read_toml
from fluidsched.errors import InputError
from fluidsched.fluid import FluidSolution, solve_fluid
from fluidsched.policy import PolicyTable, baselines, compile_policy
from fluidsched.server import IterationTime, Server, catalog
from fluidsched.simulation import simulate
from fluidsched.simulation.measures import UNITS
from fluidsched.simulation.run import replication_seeds
from fluidsched.workload import ArrivalPath, Workload, read_trace, workloads
from fluidsched.workload.path import DrawnPaths

__all__ = ["simulate_cell"]

CACHED = 64  # workloads, servers, solutions kept per process
MOST_REQUESTS_KEPT = 4_000_000  # of the paths kept for the next cell, some 40 bytes each
WHOLE = ""  # key of a group's own value

Made = TypeVar("Made")


def simulate_cell(parameters: Mapping[str, Any], seed: np.random.SeedSequence) -> dict[str, Any]:
    """Simulate one cell.

    Parameters
    ----------
    parameters : mapping
        Dotted names, as listed above.
    seed : SeedSequence
        Of the arrival paths.

    Returns
    -------
    dict
        offered_rate, critical_rate, fluid_load; every measure of `simulate` (with its unit where that is s or
        tokens) as estimate, ``…_low`` and ``…_high`` of the 95 % interval across replications; lower_bounds:
        the measures that are lower bounds because of requests unfinished at the end; verdict.

    Raises
    ------
    InputError
        If a parameter is unknown or wrong.
    """
    groups: dict[str, dict[str, Any]] = {"workload": {}, "server": {}, "policy": {}, "slo": {}}
    options: dict[str, Any] = {}
    for name, value in parameters.items():
        group, _, key = name.partition(".")
        if group in groups:
            groups[group][key] = value
        else:
            options[name] = value
    options.pop("seed", None)
    program = (
        json.dumps(groups["workload"]),
        json.dumps(groups["server"]),
        options.pop("objective", "requests"),
    )
    given_here = (
        "workload",
        "server",
        "policies",
        "seed",
        "slo",
        "progress",
        "kept_replications",
        "on_run",
    )
    _check_known("", options, ["objective", *_arguments(simulate, *given_here)])

    workload, path = _demand(*program[:2])
    server, fluid = _server(program[1]), _solution(*program)
    table = _table(json.dumps(groups["policy"]), *program)
    demand: Workload | ArrivalPath | Sequence[ArrivalPath] = workload if path is None else path
    if options.get("records", True):
        options["kept_replications"] = 0  # measures are all that a cell returns
    if path is None and options.get("records", True):
        of_server = program[1] if "load" in groups["workload"] else ""
        drawn = (options.get("horizon"), options.pop("replications", None))
        demand = _paths(program[0], of_server, *drawn, seed.entropy, seed.spawn_key)
    runs = simulate(demand, server, table, seed=seed, slo=groups["slo"], **options)
    outcome = runs.outcomes[0]
    row: dict[str, Any] = {
        "offered_rate": workload.total_arrival_rate,
        "critical_rate": fluid.critical_rate,
        "fluid_load": float(fluid.load.max()),
    }
    bounds = []
    for measure, *ends in zip(outcome.values, *map(np.ndarray.tolist, outcome.intervals()), strict=True):
        unit = UNITS[measure]
        name = f"{measure}_{unit}" if unit in ("s", "tokens") and not measure.endswith(unit) else measure
        row[name], row[f"{name}_low"], row[f"{name}_high"] = ends
        if outcome.lower_bounds[measure].any():
            bounds.append(name)
    row["lower_bounds"] = " ".join(bounds)
    row["verdict"] = runs.verdict(table.name)
    return row


@cache
def _arguments(function: Callable[..., Any], *without: str) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in without]


def _made(place: str, make: Callable[..., Made], given: Mapping[str, Any]) -> Made:
    """Call `make` with the arguments given; one that is missing is named."""
    for name, parameter in inspect.signature(make).parameters.items():
        if parameter.default is parameter.empty and name not in given:
            raise InputError(f"{place}.{name}", "nothing", "be given")
    return make(**given)


def _check_known(group: str, given: Mapping[str, Any], known: list[str]) -> None:
    for name, value in given.items():
        if name not in known:
            raise InputError(f"{group}{name}", value, f"be left out: known are {', '.join(known)}")


def _take(group: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: group.pop(name) for name in names if name in group}


def _replaced(place: str, thing: Any, changes: Mapping[str, Any]) -> Any:
    """Return `thing` with fields changed: its own, or as "<type>.<field>" those of one of its types."""
    own = [field.name for field in dataclasses.fields(thing) if field.init and field.name != "types"]
    types = {item.name: item for item in getattr(thing, "types", ())}
    fields: dict[str, Any] = {}
    for name, value in changes.items():
        type_name, dot, field = name.rpartition(".")
        if dot and type_name in types:
            _check_known(
                f"{place}.{type_name}.",
                {field: value},
                [f.name for f in dataclasses.fields(types[type_name]) if f.init],
            )
            types[type_name] = dataclasses.replace(types[type_name], **{field: value})
        else:
            _check_known(f"{place}.", {name: value}, own + [f"{item}.…" for item in types])
            fields[name] = value
    if types:
        fields["types"] = tuple(types.values())
    return dataclasses.replace(thing, **fields) if changes else thing


def _document(argument: str, file: str) -> Any:
    if file.lower().endswith(".toml"):
        return read_toml(argument, file)
    return _files.loads(file, _files.read_text(argument, file))


def _one_of(group: str, **given: Any) -> str:
    """Name of the one that is given."""
    named = [name for name, value in given.items() if value not in (None, {})]
    if len(named) != 1:
        received = " and ".join(named) or "nothing that makes one"
        raise InputError(group, received, f"be given by one of {', '.join(given)}")
    return named[0]


@lru_cache(maxsize=CACHED)
def _server(text: str) -> Server:
    group = json.loads(text)
    whole, file = group.pop(WHOLE, None), group.pop("file", None)
    named = _take(group, _arguments(catalog.server)) if {"gpu", "model"} & group.keys() else {}
    form = _take(group, [key for key in group if key.startswith("iteration_time.")])
    if form:
        group["iteration_time"] = _iteration_time(form)
    own = {} if whole or file or named else _take(group, _arguments(Server))
    match _one_of("server", value=whole, file=file, catalog=named, fields=own):
        case "value":
            server = Server.from_dict(whole)
        case "file":
            server = Server.from_dict(_document("server.file", file))
        case "catalog":
            server = _made("server", catalog.server, named)
        case _:
            server = _made("server", Server, own)
    replaced: Server = _replaced("server", server, group)
    return replaced


def _iteration_time(form: Mapping[str, Any]) -> IterationTime:
    forms: dict[str, Callable[..., IterationTime]] = {
        "affine": IterationTime.affine,
        "paper": IterationTime.paper,
        "two_piece": IterationTime.two_piece,
    }
    words = [name.split(".") for name in form]
    if len({word for _, word, *_ in words}) != 1 or any(len(parts) != 3 for parts in words):
        raise InputError(
            "server.iteration_time", ", ".join(form), "be the arguments of one form, as in ….paper.d0"
        )
    _check_known("server.iteration_time.", {words[0][1]: form}, list(forms))
    make = forms[words[0][1]]
    arguments = {parts[2]: value for parts, value in zip(words, form.values(), strict=True)}
    place = f"server.iteration_time.{words[0][1]}"
    _check_known(f"{place}.", arguments, _arguments(make))
    return _made(place, make, arguments)


@lru_cache(maxsize=CACHED)
def _demand(text: str, server_text: str) -> tuple[Workload, ArrivalPath | None]:
    """The workload, and the path to replay if it is to be replayed."""
    group = json.loads(text)
    whole, file = group.pop(WHOLE, None), group.pop("file", None)
    types, replay = group.pop("types", 12), group.pop("replay", False)
    scale, load = group.pop("scale", None), group.pop("load", None)
    path = None
    if _one_of("workload", value=whole, file=file) == "value":
        workload = workloads.get(whole) if isinstance(whole, str) else Workload.from_dict(whole)
    elif file.lower().endswith((".json", ".toml")):
        workload = Workload.from_dict(_document("workload.file", file))
    else:
        path = read_trace(file)
        workload = path.to_workload(types=types)
    if replay:
        if path is None or scale is not None or load is not None or group:
            raise InputError("workload.replay", replay, "come with a trace and no change of it")
        return workload, path
    workload = _replaced("workload", workload, group)
    if scale is not None and load is not None:
        raise InputError("workload", "scale and load", "be given at most one of them")
    if scale is not None:
        workload = workload.scaled(scale)
    if load is not None:
        workload = workload.at_load(load, _server(server_text))
    return workload, None


@lru_cache(maxsize=2)
def _paths(
    text: str,
    server_text: str,
    horizon: float | None,
    replications: int | None,
    entropy: int,
    spawn_key: tuple[int, ...],
) -> Sequence[ArrivalPath]:
    """The paths of a cell: neighbours that differ in the policy only meet the same ones, drawn once if they are few."""
    workload, _ = _demand(text, server_text)
    seed = np.random.SeedSequence(entropy, spawn_key=spawn_key)
    end, seeds = replication_seeds(horizon, replications, seed)
    paths = DrawnPaths(len(seeds), lambda r: workload.sample(end, seeds[r]))
    few = workload.total_arrival_rate * end * len(seeds) <= MOST_REQUESTS_KEPT
    return tuple(paths) if few else paths


@lru_cache(maxsize=CACHED)
def _solution(workload_text: str, server_text: str, objective: Any) -> FluidSolution:
    workload, _ = _demand(workload_text, server_text)
    return solve_fluid(workload, _server(server_text), objective=objective)


@lru_cache(maxsize=CACHED)
def _table(text: str, workload_text: str, server_text: str, objective: Any) -> PolicyTable:
    group = json.loads(text)
    whole, kind, file = group.pop(WHOLE, None), group.pop("kind", None), group.pop("file", None)
    name = whole if isinstance(whole, str) else None
    match _one_of("policy", value=None if name else whole, name=name, kind=kind, file=file):
        case "value":
            table = PolicyTable.from_dict(whole)
        case "file":
            table = PolicyTable.from_dict(_document("policy.file", file))
        case _ if (name or kind) in baselines.__all__:
            make = getattr(baselines, name or kind)
            table = _made("policy", make, _take(group, _arguments(make)))
        case _:
            fluid = _solution(workload_text, server_text, objective)
            arguments = _take(group, _arguments(compile_policy, "fluid", "kind"))
            table = compile_policy(fluid, str(name or kind), **arguments)
    replaced: PolicyTable = _replaced("policy", table, group)
    return replaced
