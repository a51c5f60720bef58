"""The assembled program for other eyes and other tools: labelled frames, LP and MPS files, a HiGHS model.

All of these hold the program in its own units, exactly as `fluidsched.fluid.model` writes it: columns
``admitted_rate[<type>]`` (req/s) and ``iteration_rate`` (1/s), rows by their names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import highspy
import numpy as np
from numpy.typing import NDArray

from fluidsched import _files
from fluidsched._checks import check_choice
from fluidsched.errors import SolverError
from fluidsched.fluid._highs import column_wise, new_highs
from fluidsched.fluid.model import FluidModel

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["column_frame", "column_names", "row_frame", "to_highs", "write_program"]


def column_names(model: FluidModel) -> tuple[str, ...]:
    """Return the names of the columns: one admitted rate per type, then the iteration rate."""
    return (*(f"admitted_rate[{name}]" for name in model.workload.type_names), "iteration_rate")


def row_frame(model: FluidModel) -> pd.DataFrame:
    """Return the constraint rows: index row names, one column per variable, then ``limit``; each row is ≤ limit.

    Parameters
    ----------
    model : FluidModel
        `FluidProgram.model` or `FluidSolution.model`.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 12.0, prompt_tokens=10, output_tokens=3)])
    >>> program = fs.FluidProgram(workload, fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6)))
    >>> row_frame(program.model).loc["kv"].tolist()
    [33.0, -1000.0, 0.0]
    """
    import pandas as pd

    body = np.column_stack([model.matrix, model.rate_coefficient, model.limit])
    return pd.DataFrame(body, index=list(model.row_names), columns=[*column_names(model), "limit"])


def column_frame(model: FluidModel, arrival_rate: NDArray[np.float64] | None = None) -> pd.DataFrame:
    """Return the variables: index column names; their reward, lower and upper bound.

    Parameters
    ----------
    model : FluidModel
        The program.
    arrival_rate : ndarray of shape (J,), optional
        Offered rates, req/s; default the workload's.
    """
    import pandas as pd

    lower, upper = _bounds(model, arrival_rate)
    reward = np.append(model.reward, 0.0)
    return pd.DataFrame({"reward": reward, "lower": lower, "upper": upper}, index=list(column_names(model)))


def to_highs(model: FluidModel, arrival_rate: NDArray[np.float64] | None = None) -> highspy.Highs:
    """Return a silent HiGHS object holding the program, with names, to be maximised, not yet solved.

    Parameters
    ----------
    model : FluidModel
        The program.
    arrival_rate : ndarray of shape (J,), optional
        Offered rates, req/s; default the workload's.

    Examples
    --------
    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 12.0, prompt_tokens=10, output_tokens=3)])
    >>> program = fs.FluidProgram(workload, fs.Server(1000, fs.IterationTime.paper(0.01, 1e-6)))
    >>> highs = to_highs(program.model)
    >>> _ = highs.run()
    >>> highs.getInfo().objective_function_value
    12.0
    """
    matrix = np.column_stack([model.matrix, model.rate_coefficient])
    program = highspy.HighsLp()
    program.num_row_, program.num_col_ = matrix.shape
    program.col_cost_ = np.append(model.reward, 0.0)
    program.col_lower_, program.col_upper_ = _bounds(model, arrival_rate)
    program.row_lower_ = np.full(len(matrix), -np.inf)
    program.row_upper_ = model.limit
    program.sense_ = highspy.ObjSense.kMaximize
    column_wise(program, matrix)
    program.row_names_ = _plain(model.row_names)
    program.col_names_ = _plain(column_names(model))
    highs = new_highs()
    if highs.passModel(program) == highspy.HighsStatus.kError:
        raise SolverError("HiGHS refused the program")
    return highs


def write_program(
    model: FluidModel, path: str | os.PathLike[str], arrival_rate: NDArray[np.float64] | None = None
) -> None:
    """Write the program to an LP or MPS file, whole or not at all.

    Characters of type names that these formats do not allow become underscores.

    Parameters
    ----------
    model : FluidModel
        The program.
    path : path-like
        Ends in ".lp" or ".mps".
    arrival_rate : ndarray of shape (J,), optional
        Offered rates, req/s; default the workload's.

    Raises
    ------
    InputError
        If the ending is another.
    SolverError
        If HiGHS cannot write.
    """
    check_choice("ending of path", Path(path).suffix, (".lp", ".mps"))
    with _files.whole_file(path) as temporary:
        if to_highs(model, arrival_rate).writeModel(str(temporary)) == highspy.HighsStatus.kError:
            raise SolverError(f"HiGHS could not write {path}")


def _bounds(
    model: FluidModel, arrival_rate: NDArray[np.float64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rate = model.workload.arrival_rate if arrival_rate is None else np.asarray(arrival_rate, dtype=np.float64)
    lower = np.append(model.fairness_floor * rate, 1.0 / model.max_iteration_time)
    return lower, np.append(rate, np.inf)


def _plain(names: tuple[str, ...]) -> list[str]:
    plain = [re.sub(r"[^A-Za-z0-9_.]", "_", name.rstrip("]")) for name in names]
    return [name if plain.count(name) == 1 else f"{name}_{i}" for i, name in enumerate(plain)]
