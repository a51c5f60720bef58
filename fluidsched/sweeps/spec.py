"""What a sweep asks: a base of parameters, and the cells that vary it.

A cell is a flat mapping from dotted names to values, say ``workload.load`` → 0.8. The cells of a spec are the
product

    cells × grid[axis 1] × … × grid[axis A],        the last axis varying fastest,

each laid over `base`; a spec without `cells` has one empty entry there. Cell i is found by mixed radix from i
alone, so a spec of a million cells takes no more memory than its axes.

The random numbers of a cell depend on what it is, not on where it stands or when it runs: its SeedSequence
has the sweep's seed as entropy and as spawn key the SHA-256 of the parameters, those of the groups named in
`paired` left out. Cells that differ only there (by default in server, policy or how long and often to
simulate) meet the same arrivals: common random numbers, which make differences between them sharp.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import numbers
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from fluidsched import _files
from fluidsched._checks import check_count, check_text
from fluidsched._toml import locating, read_toml
from fluidsched.errors import InputError

__all__ = ["OWN_COLUMNS", "CellFunction", "Parameters", "SweepSpec", "resolve_function"]

SCHEMA = "fluidsched.sweep/1"
MOST_CELLS = 10**8
PAIRED = ("server", "policy", "horizon", "warmup", "replications", "engine")
OWN_COLUMNS = ("cell", "status", "diagnosis")
"""Columns of the result that are neither parameters nor values of cells."""
BUILT_IN = {"simulate": "fluidsched.sweeps.cells:simulate_cell"}

Parameters: TypeAlias = dict[str, Any]
CellFunction: TypeAlias = Callable[[Parameters, np.random.SeedSequence], Mapping[str, Any]]


def resolve_function(function: str) -> CellFunction:
    """Return the cell function called `function`: "simulate", or "module:name" of one's own."""
    module_name, colon, name = BUILT_IN.get(function, function).partition(":")
    required = 'be "simulate" or "module:name" of a function that can be imported'
    if not colon:
        raise InputError("function", function, required)
    try:
        found = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as error:
        raise InputError("function", function, required, f"{error}.") from None
    if not callable(found):
        raise InputError("function", function, required)
    return found  # type: ignore[no-any-return]  # what it returns is checked cell by cell


def _function_name(function: str | CellFunction) -> str:
    if isinstance(function, str):
        return function
    name = f"{getattr(function, '__module__', '?')}:{getattr(function, '__qualname__', '?')}"
    try:
        importable = resolve_function(name) is function
    except InputError:
        importable = False
    if not importable:
        remedy = "Define it at the top level of a module that the workers can import."
        raise InputError("function", name, "be found again by its module and name", remedy)
    return name


def _plain(argument: str, value: Any) -> Any:
    """Turn objects of the pipeline and NumPy values into plain ones; refuse what cannot be written down."""
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(argument, value.tolist())
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(f"{argument}.{key}", item) for key, item in value.items()}
    if isinstance(value, (list, tuple, range)):
        return [_plain(f"{argument}[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, str) and value.strip():
        return check_text(argument, value)
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, numbers.Real) and not math.isnan(value):
        return float(value)
    raise InputError(argument, value, "be a number, a string, a list or mapping of them, or have to_dict()")


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted names and values. A mapping with a "schema" is an object: a value, not a group."""
    for key, value in mapping.items():
        name = prefix + key
        if isinstance(value, dict) and "schema" not in value:
            yield from _flat(value, name + ".")
        else:
            yield name, value


def _label(value: Any) -> Any:
    """What stands for a value in the result: scalars themselves, objects their name, the rest as JSON."""
    if isinstance(value, dict) and isinstance(value.get("name"), str):
        return value["name"]
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else value


def _canonical(value: Any) -> Any:
    """Equal numbers get equal text: 1 and 1.0 are the same parameter."""
    if isinstance(value, dict):
        return {key: _canonical(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_canonical(item) for item in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_file(name: str) -> bool:
    return name.rpartition(".")[2] == "file"


def _mapping(argument: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(argument, value, "be a mapping from parameters to values")
    plain: dict[str, Any] = _plain(argument, value)
    return plain


def _flat_once(argument: str, value: Any) -> Parameters:
    flat: Parameters = {}
    for name, item in _flat(_mapping(argument, value)):
        if name in flat:
            raise InputError(f"{argument}.{name}", "the parameter twice", "be given once")
        flat[name] = item
    return flat


@dataclass(frozen=True, repr=False)
class SweepSpec:
    """Grid, list, or both, over any parameter.

    Parameters
    ----------
    grid : mapping from parameter to sequence of values
        The axes; cells are their product, the last one varying fastest. A value may be a mapping, which
        sets several parameters at once: ``{"policy": ["vllm", {"kind": "capped", "overflow_probability":
        0.05}]}``.
    cells : sequence of mappings
        A list of cells, each crossed with the grid.
    base : mapping
        Parameters that every cell starts from. Nested mappings are groups: ``{"server": {"gpu":
        "h100-80gb"}}`` is ``{"server.gpu": "h100-80gb"}``. Objects such as a `Workload`, `Server` or
        `PolicyTable` are values.
    seed : int
        Seed of the whole sweep.
    paired : sequence of str
        Groups of parameters that do not enter a cell's seed.
    function : str or callable
        "simulate", or a function f(parameters, seed_sequence) that returns a flat mapping of numbers and
        strings; as "module:name" or the function itself, importable where the cells run.
    name : str
        A label.
    folder : path-like
        What relative paths (parameters called ``file``, as in ``workload.file``) are relative to. The spec's
        fingerprint and seeds know files by their contents, not by their paths.

    Raises
    ------
    InputError
        If an axis is empty or has two values with the same label, a parameter is set twice, a file is
        missing, or the function cannot be imported.

    Examples
    --------
    >>> server = {"gpu": "a100-80gb", "model": "llama-2-7b"}
    >>> spec = SweepSpec(
    ...     grid={"workload.load": [0.5, 0.9], "policy": ["vllm", "sarathi"]},
    ...     base={"workload": "azure_conv", "server": server},
    ... )
    >>> len(spec), spec.labels(2)
    (4, {'workload.load': 0.9, 'policy': 'vllm'})
    >>> spec.seed_sequence(2).spawn_key == spec.seed_sequence(3).spawn_key  # the policy is paired
    True
    """

    grid: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    cells: Sequence[Mapping[str, Any]] = ()
    base: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    paired: Sequence[str] = PAIRED
    function: str | CellFunction = "simulate"
    name: str = "sweep"
    folder: str | os.PathLike[str] = field(default=".", compare=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "seed", check_count("seed", self.seed))
        if not isinstance(self.name, str):
            raise InputError("name", self.name, "be a string")
        if isinstance(self.paired, str) or not all(isinstance(word, str) for word in self.paired):
            raise InputError("paired", self.paired, "be a list of names of groups of parameters")
        put(self, "paired", tuple(self.paired))
        put(self, "function", _function_name(self.function))
        resolve_function(str(self.function))
        put(self, "base", _flat_once("base", self.base))
        if isinstance(self.cells, (str, Mapping)) or not isinstance(self.cells, Sequence):
            raise InputError("cells", self.cells, "be a list of mappings")
        put(self, "cells", tuple(_flat_once(f"cells[{i}]", cell) for i, cell in enumerate(self.cells)))
        axes = dict(_flat(_mapping("grid", self.grid)))
        put(self, "grid", {name: self._axis(name, values) for name, values in axes.items()})
        self._check_overlap()
        if not self.cells and not self.grid:
            raise InputError("spec", "neither grid nor cells", "say what varies", "Give grid or cells.")
        for name in self.columns:
            if name in OWN_COLUMNS:
                raise InputError(
                    "spec", f"a parameter called {name}", "use other names: the table has that column"
                )
        check_count("number of cells", len(self), minimum=1, maximum=MOST_CELLS)
        for index in range(len(self.cells)):
            self._digest_files(self.cells[index])
        self._digest_files(self.base)
        for name, values in self.grid.items():
            for value in values:
                self._digest_files(dict(_flat({name: value})))

    @staticmethod
    def _axis(name: str, values: Any) -> tuple[Any, ...]:
        if not isinstance(values, list) or not values:
            raise InputError(f"grid.{name}", values, "be a list of at least one value")
        labels = Counter(json.dumps(_canonical(_label(value))) for value in values)
        label, count = labels.most_common(1)[0]
        if count > 1:
            remedy = "Values with the same name cannot be told apart in the result; give them names."
            raise InputError(f"grid.{name}", f"{label} {count} times", "have distinct values", remedy)
        return tuple(values)

    def _check_overlap(self) -> None:
        setter: dict[str, str] = {key: "cells" for cell in self.cells for key in cell}
        for name, values in self.grid.items():
            for key in {key for value in values for key, _ in _flat({name: value})}:
                if key in setter:
                    raise InputError(f"grid.{name}", f"{key}, which {setter[key]} sets too", "be set once")
                setter[key] = f"grid.{name}"

    def _digest_files(self, parameters: Mapping[str, Any]) -> None:
        for name, value in parameters.items():
            if _is_file(name) and self._path(value) not in self._digests:
                try:
                    self._digests[self._path(value)] = _files.fingerprint(
                        Path(self._path(value)).read_bytes()
                    )
                except OSError as error:
                    raise InputError(name, f"{value} ({error.strerror})", "name a readable file") from None

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {}

    def _path(self, value: Any) -> str:
        return os.path.abspath(os.path.join(self.folder, str(value)))

    def __len__(self) -> int:
        return math.prod((len(values) for values in self.grid.values()), start=max(1, len(self.cells)))

    def _position(self, index: int) -> tuple[int, dict[str, int]]:
        """Positions of cell `index` in `cells` and on each axis."""
        if not 0 <= index < len(self):
            raise IndexError(f"cell {index} of {len(self)}")
        positions: dict[str, int] = {}
        for name in reversed(list(self.grid)):
            index, positions[name] = divmod(index, len(self.grid[name]))
        return index, positions

    def _choice(self, index: int) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Entry of `cells` and value on each axis, of cell `index`."""
        listed, positions = self._position(index)
        chosen = {name: values[positions[name]] for name, values in self.grid.items()}
        return (self.cells[listed] if self.cells else {}), chosen

    @cached_property
    def columns(self) -> tuple[str, ...]:
        """Parameters that vary, in the order of the result's columns."""
        return tuple(dict.fromkeys([key for cell in self.cells for key in cell] + list(self.grid)))

    def labels(self, index: int) -> dict[str, Any]:
        """Return what the result says of the parameters that vary; None where a listed cell says nothing."""
        listed, chosen = self._choice(index)
        both = {**listed, **chosen}
        return {name: _label(both.get(name)) for name in self.columns}

    def parameters(self, index: int) -> Parameters:
        """Return all parameters of cell `index`, files as absolute paths."""
        listed, chosen = self._choice(index)
        return {
            name: self._path(value) if _is_file(name) else value
            for name, value in {**self.base, **listed, **dict(_flat(chosen))}.items()
        }

    def _identity(self, parameters: Mapping[str, Any]) -> Parameters:
        """Parameters as they count: files by contents, equal numbers equal, objects by fingerprint."""
        identity: Parameters = {}
        for name, value in parameters.items():
            if _is_file(name):
                identity[name] = self._digests[self._path(value)]
            else:
                plain = _files.to_jsonable(_canonical(value))
                identity[name] = _files.fingerprint(plain) if isinstance(plain, (dict, list)) else plain
        return identity

    @cached_property
    def _identities(self) -> tuple[Parameters, list[Parameters], dict[str, list[Parameters]]]:
        """`_identity` of the base, of each listed cell, of each value on each axis."""
        axes = {
            name: [self._identity(dict(_flat({name: value}))) for value in values]
            for name, values in self.grid.items()
        }
        return self._identity(self.base), [self._identity(cell) for cell in self.cells], axes

    def seed_sequence(self, index: int) -> np.random.SeedSequence:
        """Return the randomness of cell `index`: the same for cells that differ only in `paired` groups."""
        base, cells, axes = self._identities
        listed, positions = self._position(index)
        identity = base | (cells[listed] if cells else {})
        for name, position in positions.items():
            identity |= axes[name][position]
        drawn = {name: value for name, value in identity.items() if name.partition(".")[0] not in self.paired}
        text = json.dumps(drawn, sort_keys=True, separators=(",", ":"))
        words = np.frombuffer(hashlib.sha256(text.encode()).digest()[:16], dtype="<u4")
        return np.random.SeedSequence(self.seed, spawn_key=tuple(words.tolist()))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of everything that defines the cells and their results, contents of files included."""
        base, cells, axes = self._identities
        return _files.fingerprint(self.to_dict() | {"base": base, "cells": cells, "grid": list(axes.items())})

    def __repr__(self) -> str:
        axes = " × ".join(f"{len(values)} {name}" for name, values in self.grid.items())
        listed = f"{len(self.cells)} listed" if self.cells else ""
        return f"SweepSpec({self.name!r}, {len(self):,} cells: {' × '.join(filter(None, [listed, axes]))})"

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, schema first, groups as dotted names."""
        return {
            "schema": SCHEMA,
            "name": self.name,
            "function": self.function,
            "seed": self.seed,
            "paired": list(self.paired),
            "base": dict(self.base),
            "cells": [dict(cell) for cell in self.cells],
            "grid": {name: list(values) for name, values in self.grid.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], folder: str | os.PathLike[str] = ".") -> SweepSpec:
        """Read a mapping with any of the fields of a spec; an unknown one is an error."""
        if not isinstance(data, Mapping):
            raise InputError("spec", data, "be a mapping with grid, cells, base, seed, …")
        fields = {key: value for key, value in data.items() if key != "schema"}
        if data.get("schema", SCHEMA) != SCHEMA:
            raise InputError("spec.schema", data["schema"], f"be {SCHEMA!r}")
        known = ("grid", "cells", "base", "seed", "paired", "function", "name")
        for key in fields:
            if key not in known:
                raise InputError(f"spec.{key}", fields[key], f"be left out: a spec has {', '.join(known)}")
        return cls(**fields, folder=folder)

    @classmethod
    def from_toml(cls, path: str | os.PathLike[str], function: str | CellFunction = "simulate") -> SweepSpec:
        """Read a TOML file with the fields of a spec; relative paths in it are relative to its folder.

        A cell function of one's own is an argument: files say what to compute with, never what code to run.
        """
        data = read_toml("spec", path)
        with locating(path):
            if data.get("function", "simulate") not in BUILT_IN:
                raise InputError(
                    "function",
                    data["function"],
                    'be "simulate" or left out: a file may not name code to run',
                    "Give it on the command line (--function MODULE:NAME) or to SweepSpec.from_toml.",
                )
            named = {} if function == "simulate" else {"function": function}
            return cls.from_dict(data | named, folder=Path(path).parent)
