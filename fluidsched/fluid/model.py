"""The one-pool fluid program as labelled arrays.

In equilibrium type j is admitted at a_j requests per second and the server runs u iterations per second.
With the busy work w_j^(i), KV work W_j, iterations S_j and processed tokens τ_j of a request, the program
is

    max   Σ_j r_j a_j
    s.t.  Σ_j w_j^(i) a_j + c_i u ≤ 1          for every affine piece i of the iteration time      (time)
          Σ_j W_j a_j     − C u   ≤ 0          KV memory                                           (kv)
          Σ_j S_j a_j     − B u   ≤ 0          requests in a batch                                 (batch)
          Σ_j τ_j a_j     − N u   ≤ 0          tokens in an iteration                              (tokens)
          u ≥ 1/T_max                          mean iteration time f_j λ_j ≤ a_j ≤ λ_j fairness floors,
          demand

`FluidModel` holds one row per constraint: its name, its coefficients on the rates and on u, and its limit.
A row exists only where the server has that limit. KV work is rounded to blocks where the server pages its
memory, and C is then the capacity in whole blocks. With prompts prefilled in chunks, S_j and W_j count the
extra iterations and what they hold. Where types state cached prefixes, w_j and τ_j leave out what the cache
holds and W_j does not: the optimum then bounds servers whose residents share no blocks, and what it admits
fits into those whose residents do.

Source: the Charnes–Cooper form of the equilibrium of Ao, Luo, Simchi-Levi, Wang (arXiv 2504.11320).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fluidsched._checks import check_choice, check_count, check_real
from fluidsched.errors import InfeasibleError, InputError
from fluidsched.fluid.certificate import TOLERANCE
from fluidsched.fluid.coefficients import Stage, block_kv_work, busy_work, chunk_overhead
from fluidsched.server import Server
from fluidsched.workload import Workload
from fluidsched.workload.lengths import MAX_TOKENS

__all__ = ["TOLERANCE", "FluidModel", "Objective", "build_model"]

Objective = Literal["requests", "output_tokens", "total_tokens", "rewards"]


@dataclass(frozen=True, eq=False)
class FluidModel:
    """The program's data, but for the offered rates.

    Attributes
    ----------
    workload : Workload
        The types; their own rates are those of the first solve.
    server : Server
        Where the limits come from.
    objective : str
        What is maximised: "requests", "output_tokens", "total_tokens" (per second) or "rewards".
    reward : ndarray of shape (J,)
        r_j per request.
    row_names : tuple of str
        "time" (or "time[0]", "time[1]", … with several pieces), "kv", "batch", "tokens".
    matrix : ndarray of shape (R, J)
        Use of each row by one admitted request per second.
    rate_coefficient : ndarray of shape (R,)
        Coefficient of u: the base of the piece, s, or minus the capacity.
    limit : ndarray of shape (R,)
        Right-hand sides: 1 for time, 0 otherwise.
    kv_work : ndarray of shape (J,)
        W_j, rounded to blocks, token·iterations; also where memory is unlimited.
    iterations : ndarray of shape (J,)
        S_j, iterations a request is in the batch.
    fairness_floor : ndarray of shape (J,)
        f_j, the fraction of each type's demand that must be admitted.
    max_iteration_time : float
        T_max, s; inf for none.
    chunk_tokens : int or None
        Chunk of prefills, tokens; None: whole prompts.
    """

    workload: Workload
    server: Server
    objective: Objective
    reward: NDArray[np.float64]
    row_names: tuple[str, ...]
    matrix: NDArray[np.float64]
    rate_coefficient: NDArray[np.float64]
    limit: NDArray[np.float64]
    kv_work: NDArray[np.float64]
    iterations: NDArray[np.float64]
    fairness_floor: NDArray[np.float64]
    max_iteration_time: float
    chunk_tokens: int | None

    @cached_property
    def pieces(self) -> int:
        """Number of time rows, which come first."""
        return int(np.count_nonzero(self.limit))

    @cached_property
    def has_floors(self) -> bool:
        """Whether any type has a fairness floor."""
        return bool(self.fairness_floor.any())

    @cached_property
    def base(self) -> NDArray[np.float64]:
        """Bases c_i of the pieces, s."""
        return self.rate_coefficient[: self.pieces]

    @cached_property
    def resources(self) -> tuple[str, ...]:
        """What can run out: "time", then "kv", "batch", "tokens" and "iteration_time" where limited."""
        latency = ("iteration_time",) if math.isfinite(self.max_iteration_time) else ()
        return ("time", *self.row_names[self.pieces :], *latency)

    @cached_property
    def rate_alone(self) -> NDArray[np.float64]:
        """The largest rate of each type that the server carries without the others, shape (J,), req/s.

        For a type that uses nothing (one token in and out, where only KV costs time): 1/T(empty batch).
        """
        load = self.halfspaces.max(axis=0)
        return np.asarray(1.0 / np.where(load > 0.0, load, self.base.max()))

    def load(self, rate: ArrayLike) -> NDArray[np.float64]:
        """Return the load of every resource at these admitted or offered rates.

        Parameters
        ----------
        rate : array_like of shape (..., J)
            Requests per second.

        Returns
        -------
        ndarray of shape (..., len(resources))
            1/(the largest factor on all rates that the resource together with time allows); 0 without
            demand.
        """
        along = np.asarray(rate, dtype=np.float64) @ self.halfspaces.T
        return np.asarray(np.maximum.reduceat(along, self._first_halfspace, axis=-1))

    @cached_property
    def halfspaces(self) -> NDArray[np.float64]:
        """Normals g of the stability region {λ ≥ 0: g·λ ≤ 1 for every g}, shape (H, J), s.

        One for each way a resource and the time rows can meet once u is eliminated (module
        `closed_forms`).
        """
        return _frozen(np.concatenate(list(self._halfspaces.values())))

    @cached_property
    def halfspace_resources(self) -> tuple[str, ...]:
        """The resource each half-space belongs to, in the order of `resources`, shape (H,)."""
        return tuple(name for name, normals in self._halfspaces.items() for _ in normals)

    @cached_property
    def _halfspaces(self) -> dict[str, NDArray[np.float64]]:
        base, busy = self.base, self.matrix[: self.pieces]
        positive, negative = base > 0.0, base < 0.0
        alone = [*busy[base >= 0.0]]
        for c_n, w_n in zip(-base[negative], busy[negative], strict=True):
            for c_i, w_i in zip(base[positive], busy[positive], strict=True):
                alone.append((c_n * w_i + c_i * w_n) / (c_i + c_n))
        normals = {"time": np.array(alone)}
        for name, use, by_rate in zip(
            self.row_names[self.pieces :],
            self.matrix[self.pieces :],
            self.rate_coefficient[self.pieces :],
            strict=True,
        ):
            met = busy[positive] + np.outer(base[positive] / -by_rate, use)
            normals[name] = np.concatenate([met, normals["time"]])
        if math.isfinite(self.max_iteration_time):
            room = 1.0 - base[positive] / self.max_iteration_time
            normals["iteration_time"] = np.concatenate([busy[positive] / room[:, None], normals["time"]])
        return normals

    @cached_property
    def _first_halfspace(self) -> NDArray[np.intp]:
        counts = [len(normals) for normals in self._halfspaces.values()]
        return np.concatenate([[0], np.cumsum(counts[:-1])]).astype(np.intp)

    def iteration_rate(self, admitted_rate: NDArray[np.float64]) -> float:
        """Return the largest u the time rows allow: the server never idles between iterations."""
        matrix, base = self._positive_pieces
        return max(float(((1.0 - matrix @ admitted_rate) / base).min()), 0.0)

    @cached_property
    def _positive_pieces(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        positive = self.base > 0.0
        return self.matrix[: self.pieces][positive], self.base[positive]

    def check_floors(self, arrival_rate: NDArray[np.float64]) -> None:
        """Raise `InfeasibleError` if the floors alone exceed what the server carries."""
        floors = self.fairness_floor * arrival_rate
        load = self.load(floors)
        if load.max() <= 1.0 + TOLERANCE:
            return
        loads = zip(self.resources, load.tolist(), strict=True)
        over = [f"{name} {value:.3g}" for name, value in loads if value > 1.0 + TOLERANCE]
        raise InfeasibleError(
            f"the fairness floors alone load the server beyond 1 ({', '.join(over)}). These contradict each"
            f" other, and no fewer of them do: {', '.join(self.floor_contradiction(floors))}. The floors become"
            f" feasible when multiplied by {1 / load.max():.3g} or less.",
            "fairness_floor",
        )

    def floor_contradiction(self, floors: NDArray[np.float64]) -> tuple[str, ...]:
        """Return the names of an irreducible set of constraints that floors of shape (J,), req/s, cannot meet.

        "time", with another resource where time alone would do, and floors: dropping any one of them leaves
        constraints that can be met. () where the floors can be met.
        """
        load = dict(zip(self.resources, self.load(floors).tolist(), strict=True))
        worst = max(load, key=load.__getitem__)
        if load[worst] <= 1.0 + TOLERANCE:
            return ()
        resource = "time" if load["time"] > 1.0 + TOLERANCE else worst
        normals = self._halfspaces[resource] * floors
        total = normals.sum(axis=1)
        kept = []
        for j in np.argsort(normals.max(axis=0), kind="stable").tolist():  # the smallest are dropped first
            without = total - normals[:, j]
            if floors[j] > 0.0 and without.max() <= 1.0 + TOLERANCE:
                kept.append(j)
            else:
                total = without
        names = [f"fairness_floor[{self.workload.type_names[j]}]" for j in sorted(kept)]
        return ("time", *([] if resource == "time" else [resource]), *names)


def build_model(
    workload: Workload,
    server: Server,
    objective: str | ArrayLike = "requests",
    *,
    fairness_floor: ArrayLike | None = None,
    max_iteration_time: float | None = None,
    chunk_tokens: int | None = None,
    stage: Stage = "whole",
) -> FluidModel:
    """Assemble the program; see `FluidProgram` for the arguments, `coefficients` for stages."""
    if not isinstance(workload, Workload):
        raise InputError("workload", workload, "be a Workload")
    if not isinstance(server, Server):
        raise InputError("server", server, "be a Server")
    named, reward = _reward(workload, objective)
    work = busy_work(workload, server.iteration_time, stage)
    coefficients = server.iteration_time.require_coefficients("the fluid program")
    pieces = len(coefficients)
    names = ["time"] if pieces == 1 else [f"time[{i}]" for i in range(pieces)]
    rows = [*work]
    rate_coefficient = [*coefficients[:, 0]]
    kv_work = block_kv_work(workload, server.block_size, stage)
    prefilled, output = workload.mean_prefill_tokens, workload.mean_output_tokens
    iterations, tokens = {
        "whole": (output, workload.processed_tokens),
        "prefill": (np.ones_like(output), prefilled),
        "decode": (output - 1.0, output - 1.0),
    }[stage]
    if chunk_tokens is not None and stage != "decode":
        chunk_tokens = check_count("chunk_tokens", chunk_tokens, minimum=1, maximum=MAX_TOKENS)
        more_iterations, more_work = chunk_overhead(workload, chunk_tokens, server.block_size)
        kv_work, iterations = kv_work + more_work, iterations + more_iterations
    limits = {
        "kv": (kv_work, server.usable_kv_capacity),
        "batch": (iterations, server.max_batch_size),
        "tokens": (tokens, server.token_budget),
    }
    for name, (use, capacity) in limits.items():
        if capacity is not None and math.isfinite(capacity):
            names.append(name)
            rows.append(use)
            rate_coefficient.append(-float(capacity))
    slowest = math.inf
    if max_iteration_time is not None:
        slowest = check_real("max_iteration_time", max_iteration_time, above=0.0)
        empty = server.iteration_time.empty
        if slowest <= empty:
            raise InfeasibleError(
                f"max_iteration_time of {slowest:.4g} s cannot be kept by {server.name!r}, whose empty iteration"
                f" alone takes {empty:.4g} s. Allow more than that, or take a faster server.",
                "max_iteration_time",
            )
    return FluidModel(
        workload=workload,
        server=server,
        objective=named,
        reward=_frozen(reward),
        row_names=tuple(names),
        matrix=_frozen(np.array(rows)),
        rate_coefficient=_frozen(np.array(rate_coefficient)),
        limit=_frozen(np.repeat([1.0, 0.0], [pieces, len(names) - pieces])),
        kv_work=_frozen(kv_work),
        iterations=_frozen(iterations),
        fairness_floor=_frozen(_floors(workload, fairness_floor)),
        max_iteration_time=slowest,
        chunk_tokens=chunk_tokens,
    )


def _reward(workload: Workload, objective: str | ArrayLike) -> tuple[Objective, NDArray[np.float64]]:
    if isinstance(objective, str):
        named = [name for name in get_args(Objective) if name != "rewards"]
        check_choice("objective", objective, named, "Or give an array with one reward per type.")
        if objective == "requests":
            return "requests", np.ones(len(workload))
        if objective == "output_tokens":
            return "output_tokens", np.array(workload.mean_output_tokens)
        return "total_tokens", workload.mean_prompt_tokens + workload.mean_output_tokens
    return "rewards", _per_type("objective", workload, objective, math.inf)


def _floors(workload: Workload, floors: ArrayLike | None) -> NDArray[np.float64]:
    if floors is None:
        return np.zeros(len(workload))
    return _per_type("fairness_floor", workload, floors, 1.0)


def _per_type(argument: str, workload: Workload, given: ArrayLike, maximum: float) -> NDArray[np.float64]:
    try:
        array = np.array(given, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(argument, given, "hold one number per type") from None
    if array.ndim == 0:
        array = np.full(len(workload), array)
    if array.shape != (len(workload),):
        raise InputError(argument, f"shape {array.shape}", f"have one number per type, {len(workload)}")
    for name, value in zip(workload.type_names, array.tolist(), strict=True):
        check_real(f"{argument} of type {name!r}", value, minimum=0.0, maximum=maximum)
    return array


def _frozen(array: NDArray[np.float64]) -> NDArray[np.float64]:
    array.setflags(write=False)
    return array
