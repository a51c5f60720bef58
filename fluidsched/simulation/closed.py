"""Closed systems: users who wait for their answers.

U users with the sequences of `fluidsched.workload.UserSequences`. User u asks for the m-th time at

    A_{u,m} = F_{u,m-1} + z_{u,m},        F_{u,-1} = 0,

F the end of the answer before *in this run*, z the think time; so a slow server slows its users down, and at most U
requests are in the system. Who asks at the end of an answer (z = 0) is seen by the decision of that instant, as every
arrival at an instant is; requests at one instant come in the order of the sequences. Nothing else differs from open
arrivals: a closed run is the open run on the path that it makes, and `check=True` replays it.

**The end.** At the horizon a run stops, as those of `simulate` do: nobody asks later, and the at most U requests in
the system are unfinished (their latencies censored). Without a horizon it goes on until all sequences are at their end.

**Interactive response time law.** In a window of T seconds let X be the answers per second, R the mean time from
question to answer and Z the mean think time. Every user always waits or thinks, so by Little's law

    U = X (R + Z)        up to what the two ends of the window cut, of the order of U/(X T),

whatever the policy (Denning and Buzen, 1978), and X ≤ min(U/(R₀ + Z), C) with R₀ the time alone and C the server's
capacity in requests per second, which the fluid program bounds. When does a closed system need this verb? Where U is
within a few times C (R + Z) of the boundary. For many users with long think times the stream is near Poisson, whose
rate does not depend on the answers, and `arrivals.closed_loop` with an assumed response time serves sweeps and fluid
programs, which take paths and rates.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from fluidsched._checks import check_choice, check_real
from fluidsched._display import Tabular
from fluidsched.errors import InputError, SimulationError
from fluidsched.policy.table import PolicyTable
from fluidsched.server import Server
from fluidsched.simulation.laws import Audit, check_agreement, check_laws
from fluidsched.simulation.limits import check_run, remark_on_memory, within_model_length
from fluidsched.simulation.records import EngineRun
from fluidsched.simulation.reference import Engine, run_reference
from fluidsched.simulation.result import Measured, SimulationResult
from fluidsched.simulation.run import (
    ENGINES,
    OCCUPANCY_POINTS,
    check_policies,
    check_warmup,
    refuse_oversize,
)
from fluidsched.workload import ArrivalPath, UserSequences

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["ClosedResult", "simulate_closed"]

_PER_REQUEST = ("admitted_s", "first_token_s", "finish_s", "left_s", "preemptions", "status")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, repr=False, eq=False)
class ClosedResult(Tabular):
    """Runs of several policies for the same users, in R replications.

    Attributes
    ----------
    sequences : tuple of UserSequences
        One per replication.
    results : tuple of SimulationResult
        One per policy, which has the paths that its own answers made: all that `SimulationResult` offers.
    sent : tuple
        `[k][r]`: which requests of the sequences were sent, in the order of the path; int64 arrays.
    """

    sequences: tuple[UserSequences, ...]
    results: tuple[SimulationResult, ...]
    sent: tuple[tuple[NDArray[np.int64], ...], ...]

    @property
    def policies(self) -> tuple[str, ...]:
        """Names of the policies, in the order given."""
        return tuple(result.policies[0] for result in self.results)

    def result(self, policy: str) -> SimulationResult:
        """The runs of one policy, each on the path it made."""
        check_choice("policy", policy, self.policies)
        return self.results[self.policies.index(policy)]

    def measures(self, policy: str) -> dict[str, NDArray[np.float64]]:
        """Measure → its value in each replication, shape (R,)."""
        return self.result(policy).measures(policy)

    def verdict(self, policy: str) -> str:
        """How the policy fared; see `SimulationResult.verdict`. A backlog of at most U requests does not grow."""
        return self.result(policy).verdict(policy)

    def requests(self, policy: str, replication: int = 0) -> pd.DataFrame:
        """One row per request sent: ``user``, ``turn``, ``think_s``, and the columns of `SimulationResult.requests`."""
        frame = self.result(policy).requests(policy, replication)
        asked = self.sequences[replication]
        index = self.sent[self.policies.index(policy)][replication]
        for place, name in enumerate(("user", "turn", "think_s")):
            frame.insert(place, name, getattr(asked, name)[index])
        return frame

    def summary(self) -> pd.DataFrame:
        """The measures of every policy, one below the other; see `SimulationResult.summary`."""
        import pandas as pd

        return pd.concat([result.summary() for result in self.results], ignore_index=True)

    def to_frame(self) -> pd.DataFrame:
        """The same as `summary`."""
        return self.summary()

    def __repr__(self) -> str:
        asked = self.sequences[0]
        users = f"{asked.users:,} users who wait for their answers, {len(self.sequences)} replication"
        return "\n".join([users + "s" * (len(self.sequences) != 1), *map(repr, self.results)])


def simulate_closed(
    sequences: UserSequences | Sequence[UserSequences],
    server: Server,
    policies: PolicyTable | Sequence[PolicyTable],
    *,
    horizon: float | None = None,
    warmup: float | None = None,
    engine: Literal["kernel", "reference"] = "kernel",
    check: bool = False,
    slo: Mapping[str, float] | None = None,
    progress: Progress | None = None,
) -> ClosedResult:
    """Run every policy for the same users, each of whom asks again once the answer has come and the user has thought.

    Parameters
    ----------
    sequences : UserSequences, or a sequence of them
        What the users will ask; of several each is a replication.
    server : Server
        Without timeouts: users wait.
    policies : PolicyTable, or a sequence of them
        With unique names.
    horizon : float, optional
        End of every run, s. None: until all users have had all their answers.
    warmup : float, optional
        Start of the measured window, s; a sixth of the horizon by default, 0 without one. At the start all users
        think.
    engine : {"kernel", "reference"}
        "kernel" is stopped and goes on where somebody could come who is not yet known, at most once an iteration;
        "reference" is the definition, in plain Python.
    check : bool
        Verify the laws in every run, and the law of the users: each asks think time after the answer. The first
        replication of every policy also runs on the reference engine, with the kernel they must agree, and the path
        made is replayed with every batch audited: the same run.
    slo : mapping, optional
        Latency name → limit per request, s, for `goodput`.
    progress : callable, optional
        Called as ``progress("simulate <policy>", runs done, runs in all)``.

    Returns
    -------
    ClosedResult

    Raises
    ------
    InputError
        As `simulate`; also for a server with timeouts, rules of the user's own, and, on the kernel, tables that order
        by length.
    SimulationError
        With `check`, if a run breaks a law.

    Examples
    --------
    Twice as many users than the server can serve at their pace; each of them gets slower:

    >>> import fluidsched as fs
    >>> workload = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=512, output_tokens=100)])
    >>> server = fs.Server(137_000, fs.IterationTime.paper(d0=0.01, d1=3.3e-7), max_batch_size=16)
    >>> asked = fs.UserSequences.draw(workload, users=64, think_mean=2.0, horizon=300.0, seed=7)
    >>> runs = fs.simulate_closed(asked, server, fs.baselines.vllm(), horizon=300.0)
    >>> x, r = (runs.measures("vllm")[name][0] for name in ("request_throughput", "mean_e2e"))
    >>> bool(abs(x * (r + 2.0) / 64 - 1) < 0.05)  # U = X (R + Z)
    True
    """
    check_choice("engine", engine, ENGINES)
    given = [sequences] if isinstance(sequences, UserSequences) else sequences
    if not isinstance(given, Sequence) or not len(given):
        raise InputError("sequences", sequences, "be UserSequences, or a sequence of them")
    for r, one in enumerate(given):
        if not isinstance(one, UserSequences):
            raise InputError(f"sequences[{r}]", one, "be UserSequences")
    if not isinstance(server, Server):
        raise InputError("server", server, "be a Server")
    for name in ("waiting_timeout", "total_timeout"):
        if getattr(server, name) is not None:
            raise InputError(
                f"server.{name}",
                getattr(server, name),
                "be None for users who wait",
                "Simulate an open path instead.",
            )
    tables: list[PolicyTable] = []
    for k, policy in enumerate(check_policies(policies, "reference")):
        if not isinstance(policy, PolicyTable):
            raise InputError(
                f"policies[{k}]", policy, "be a PolicyTable", "Rules in Python see open paths only."
            )
        tables.append(policy)
    if engine == "kernel":
        server.iteration_time.require_coefficients('engine="kernel"')
    if horizon is not None:
        horizon = check_real("horizon", horizon, above=0.0)
    asked = [within_model_length(one.as_columns(), server) for one in given]
    start = check_warmup(warmup, horizon, asked)
    for table in tables:
        remark_on_memory(server, table)
        for path in asked:
            check_run(path, server, table, horizon)
            refuse_oversize(path, server, table)

    results, sent = [], []
    for k, table in enumerate(tables):
        measured = Measured([table], server, warmup=start, slo=slo)
        paths, runs, of_table = [], [], []
        for r, (one, path) in enumerate(zip(given, asked, strict=True)):
            system = _Users(path, one, server, table, horizon, start)
            index, made, run = _closed_run(system, engine)
            if check:
                _check(system, index, made, run, engine, first=r == 0)
            measured.add(0, [made], [run])
            paths.append(made)
            runs.append(run)
            of_table.append(index)
            if progress is not None:
                progress(f"simulate {table.name}", k * len(given) + r + 1, len(tables) * len(given))
        results.append(
            SimulationResult.collect(
                measured, paths, [runs], horizon=horizon, seed=None, engine=engine, workload=given[0].name
            )
        )
        sent.append(tuple(of_table))
    return ClosedResult(tuple(given), tuple(results), tuple(sent))


@dataclass(frozen=True)
class _Users:
    """What one run starts from; `path` has the requests as the server takes them, user by user."""

    path: ArrivalPath
    asked: UserSequences
    server: Server
    table: PolicyTable
    horizon: float | None
    warmup: float


def _closed_run(system: _Users, engine: str) -> tuple[NDArray[np.int64], ArrivalPath, EngineRun]:
    """Which requests were sent, the path they made, and the run."""
    if engine == "kernel":
        from fluidsched.simulation.kernel import run_closed

        index, arrival_s, run = run_closed(
            system.path,
            system.asked.user,
            system.asked.think_s,
            system.server,
            system.table,
            horizon=system.horizon,
            warmup=system.warmup,
            occupancy_points=OCCUPANCY_POINTS,
        )
    else:
        index, arrival_s, run = _defined(system)
    index.flags.writeable = False
    made = dataclasses.replace(system.path.selected(index), arrival_s=arrival_s, horizon=system.horizon)
    return index, made, run


def _defined(system: _Users) -> tuple[NDArray[np.int64], NDArray[np.float64], EngineRun]:
    """The definition: the reference engine stops whenever somebody has got an answer, and hears when that user asks."""
    user, think = system.asked.user.tolist(), system.asked.think_s.tolist()
    engine = Engine(
        system.path,
        system.server,
        system.table,
        horizon=system.horizon,
        warmup=system.warmup,
        occupancy_points=OCCUPANCY_POINTS,
    )
    sent = [i for i, u in enumerate(user) if i == 0 or user[i - 1] != u]
    for i in sent:
        engine.send(i, think[i])
    while engine.verdict is None:
        engine.advance(math.inf, to_finish=True)
        if engine.verdict is None:
            now = engine.system.now
            for i in [request.index for request in engine.system.batch if not math.isnan(request.finish_s)]:
                if i + 1 < len(user) and user[i + 1] == user[i]:
                    engine.send(i + 1, now + think[i + 1])
                    sent.append(i + 1)
    late = {request.index for request in engine.arrivals}  # they would have asked after the horizon
    in_order = sorted((engine.requests[i].arrival_s, i) for i in sent if i not in late)
    index = np.array([i for _, i in in_order], dtype=np.int64)
    whole = engine.record()
    run = dataclasses.replace(whole, **{name: getattr(whole, name)[index] for name in _PER_REQUEST})
    return index, np.array([at for at, _ in in_order], dtype=np.float64), run


def _check(
    system: _Users, index: NDArray[np.int64], made: ArrivalPath, run: EngineRun, engine: str, *, first: bool
) -> None:
    """The laws of the run and of its users; of the first, both engines and the path made, replayed and audited."""
    server, table, horizon, warmup = system.server, system.table, system.horizon, system.warmup
    check_laws(made, server, run, warmup=warmup, lossless=table.preemption != "restart")
    _check_users(system.asked, index, made, run)
    if not first:
        return
    if engine == "kernel":
        defined, path, reference = _closed_run(system, "reference")
        if not np.array_equal(defined, index):
            raise SimulationError(
                "a run broke a law it must keep: the kernel's requests are sent in the reference's order"
            )
        check_agreement(run, reference)
        made, run = path, reference
    audit = Audit(made, server, table, horizon=horizon, warmup=warmup)
    replayed = run_reference(
        made,
        server,
        table,
        horizon=horizon,
        warmup=warmup,
        on_iteration=audit.observe,
        on_idle=audit.observe_idle,
    )
    audit.check(replayed)
    check_agreement(run, dataclasses.replace(replayed, occupancy=run.occupancy))


def _check_users(asked: UserSequences, index: NDArray[np.int64], made: ArrivalPath, run: EngineRun) -> None:
    """Everybody asks think time after time 0 or the answer before, exactly; nobody who could has not asked."""
    finish = np.full(len(asked) + 1, np.nan)
    finish[index] = run.finish_s
    begin = asked.turn == 0
    before = np.where(begin, 0.0, np.roll(finish, 1)[: len(asked)])
    due = before + asked.think_s
    end = math.inf if made.horizon is None else made.horizon
    was_sent = np.zeros(len(asked), dtype=np.bool_)
    was_sent[index] = True
    if not np.array_equal(due[index], made.arrival_s) or not np.array_equal(was_sent, due <= end):
        raise SimulationError(
            "a run broke a law it must keep: every user asks think time after the answer before"
        )
