"""Arrival processes: when the requests of one type come.

A process draws the times 0 ≤ t_1 ≤ t_2 ≤ ... < H of one type from a random stream. It is a *shape*: the type's
arrival rate λ sets the mean number of requests per second, the process how they are spread. Write N(h) for the
number of arrivals in a window of h seconds. Every process here has E N(h) = λh for every window that starts
at 0, so rates, and the fluid program, see only λ (a time-varying profile: over whole periods). How far from
Poisson a process is shows in the *index of dispersion* I(h) = Var N(h) / E N(h); `ArrivalProcess.dispersion`
is its limit for long windows, 1 for Poisson.

====================  ========================================================  ==============================
process               what comes                                                I(∞)
====================  ========================================================  ==============================
`poisson`             independent exponential gaps                              1
`renewal`             independent gamma gaps of given cv (0: equal gaps)        cv²
`markov_modulated`    Poisson whose rate jumps with a Markov chain              1 + 2 π R D r / λ
`time_varying`        Poisson whose rate follows a periodic profile             1 (given the profile)
`batches`             several requests at each epoch of another process         Var B / E B + E B · I_epochs
`closed_loop`         users who wait for an answer, think, and ask again        cv² of a user's cycle
`superposition`       several independent processes together                    Σ_i share_i · I_i
====================  ========================================================  ==============================

(D is the deviation matrix of the modulating chain, π its stationary law, r its rates, R = diag(r).)

Renewal-like processes and modulating chains start in their stationary state: the first gap has the density
P(gap > x)/E[gap], the first state its long-run share of time. Otherwise E N(h) = λh would fail for short h.

Rules kept by every process, so that runs can share random numbers:

- a longer horizon only adds arrivals (the earlier ones stay);
- *speeding up* by ζ, i.e. rate ζλ with the process `accelerated` by ζ, divides every time by ζ. Processes
  without a clock of their own (`poisson`, `renewal`, `batches` of them, `closed_loop`) are their own accelerated
  version; `markov_modulated` and `time_varying` state durations in seconds, which are divided by ζ.

Time-varying and modulated rates are inverted, not thinned: unit-rate Poisson times s_n are mapped by
t_n = Λ⁻¹(s_n), Λ(t) = ∫_0^t λ(u) du, which is exact for piecewise constant rates.
"""

from __future__ import annotations

import abc
import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from fluidsched._checks import check_count, check_real, check_scale
from fluidsched.errors import InputError
from fluidsched.workload import lengths
from fluidsched.workload.lengths import FloatArray, LengthLaw
from fluidsched.workload.path import seed_sequence
from fluidsched.workload.recipes import Makers, read_recipe

__all__ = [
    "ArrivalProcess",
    "batches",
    "closed_loop",
    "from_dict",
    "markov_modulated",
    "poisson",
    "renewal",
    "superposition",
    "time_varying",
]

MAX_REQUESTS = 10**8
"""Largest expected number of requests, or of jumps of a modulating chain, of one draw."""

MIN_CV, MAX_CV = 1e-6, 100.0
"""Largest coefficient of variation of a gap."""

MAX_USERS = 10**7
"""Largest number of users of one closed loop."""


class ArrivalProcess(abc.ABC):
    """How the arrivals of a type are spread over time; made by the functions of `fluidsched.arrivals`."""

    @property
    def has_constant_rate(self) -> bool:
        """Whether every window of the same length expects the same number of requests."""
        return True

    def sample(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        """Arrival times on [0, horizon).

        Parameters
        ----------
        rate : float
            λ, mean requests per second, at least 0.
        horizon : float
            Length of the window in seconds, positive.
        rng : numpy.random.Generator
            Stream to draw from; advanced.

        Returns
        -------
        float64[N]
            Times in seconds since the start of the window, ascending.

        Examples
        --------
        >>> poisson().sample(2.0, 3.0, np.random.default_rng(1)).round(3)
        array([0.537, 0.691])
        """
        rate = check_scale("rate", rate)
        horizon = check_scale("horizon", horizon, zero=False)
        if rate * horizon == 0:
            return np.empty(0)
        _check_expected(rate * horizon, "requests")
        return self._times(rate, horizon, rng)

    @abc.abstractmethod
    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        """The times of `sample`, without an end, in pieces of about `size`, so that they need not all be kept.

        The numbers are the same, bit by bit, however they are cut; no piece is empty. The rate is above 0.

        Examples
        --------
        >>> times = poisson().pieces(2.0, np.random.default_rng(1), size=2)
        >>> next(times).round(3), next(times).round(3)
        (array([0.537, 0.691]), array([3.378, 3.562]))
        """

    @abc.abstractmethod
    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        """As `sample`, with checked arguments and a positive expected number."""

    @abc.abstractmethod
    def dispersion(self, rate: float) -> float:
        """I(∞) = lim Var N(h) / E N(h) at `rate` requests per second; 1 for Poisson.

        Examples
        --------
        >>> batches(lengths.fixed(4)).dispersion(rate=2.0)
        4.0
        """

    @abc.abstractmethod
    def accelerated(self, zeta: float) -> ArrivalProcess:
        """The process on a clock `zeta` times as fast: durations in seconds divided by `zeta` > 0."""

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """The arguments it was made with, as plain data with the maker's name; read back by `from_dict`."""


@dataclass(frozen=True)
class _Poisson(ArrivalProcess):
    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        return _before(_sums(rng.standard_exponential, rate * horizon) / rate, horizon)

    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        for sums in _sum_pieces(rng.standard_exponential, size):
            yield sums / rate

    def dispersion(self, rate: float) -> float:
        return 1.0

    def accelerated(self, zeta: float) -> ArrivalProcess:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"process": "poisson"}

    def __repr__(self) -> str:
        return "poisson()"


def poisson() -> ArrivalProcess:
    """Poisson arrivals: independent exponential gaps, the default of every request type.

    Examples
    --------
    >>> len(poisson().sample(100.0, 60.0, np.random.default_rng(7)))
    6010
    """
    return _Poisson()


@dataclass(frozen=True)
class _Renewal(ArrivalProcess):
    cv: float

    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        return _renewal_times(rate, horizon, rng, sources=1, cv=self.cv, offset=0.0)

    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        return _renewal_pieces(rate, rng, size, sources=1, cv=self.cv, offset=0.0)

    def dispersion(self, rate: float) -> float:
        return self.cv**2

    def accelerated(self, zeta: float) -> ArrivalProcess:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"process": "renewal", "cv": self.cv}

    def __repr__(self) -> str:
        return f"renewal(cv={self.cv:g})"


def renewal(cv: float) -> ArrivalProcess:
    """Independent gamma gaps with coefficient of variation `cv`: smoother than Poisson below 1, burstier above.

    The gap is Gamma(k)/(kλ) with k = 1/cv²; at cv = 1 the process is Poisson, at cv = 0 all gaps are 1/λ and
    only the phase is random, uniform. The first gap has the stationary excess law: U·Gamma(k + 1)/(kλ), U
    uniform on [0, 1).

    Parameters
    ----------
    cv : float
        Standard deviation of a gap over its mean, 0 to 100. vLLM's ``--burstiness`` is 1/cv².

    Examples
    --------
    >>> times = renewal(cv=0).sample(2.0, 3.0, np.random.default_rng(1))
    >>> np.diff(times)
    array([0.5, 0.5, 0.5, 0.5, 0.5])
    >>> renewal(cv=3).dispersion(rate=2.0)
    9.0
    """
    return _Renewal(_check_cv("cv", cv))


@dataclass(frozen=True)
class _ClosedLoop(ArrivalProcess):
    users: int
    think_cv: float
    response_share: float

    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        return _renewal_times(
            rate, horizon, rng, sources=self.users, cv=self.think_cv, offset=self.response_share
        )

    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        return _renewal_pieces(
            rate, rng, size, sources=self.users, cv=self.think_cv, offset=self.response_share
        )

    def dispersion(self, rate: float) -> float:
        return ((1 - self.response_share) * self.think_cv) ** 2

    def accelerated(self, zeta: float) -> ArrivalProcess:
        return self

    def to_dict(self) -> dict[str, Any]:
        return {
            "process": "closed_loop",
            "users": self.users,
            "think_cv": self.think_cv,
            "response_share": self.response_share,
        }

    def __repr__(self) -> str:
        return (
            f"closed_loop(users={self.users}, think_cv={self.think_cv:g}, "
            f"response_share={self.response_share:g})"
        )


def closed_loop(users: int, think_cv: float = 1.0, response_share: float = 0.0) -> ArrivalProcess:
    """A fixed number of users, each asking, waiting for the answer, thinking, and asking again.

    Each user asks at the epochs of an own stationary renewal process with gap = response time + think time.
    The mean gap is users/λ, so give the type the rate λ = users / (mean response + mean think time). The
    response takes the constant share `response_share` of the mean gap; the think time is gamma with
    coefficient of variation `think_cv` (1: exponential, 0: constant).

    **What is approximated.** Paths are drawn before the simulation, so the answer's real time cannot feed back:
    the assumed response time stands for it. In a true closed loop at most `users` requests are in the system,
    and a slow server slows its users down; here a slow server meets an unchanged stream, queues grow, and a
    user may ask again before the answer has come. So throughput and latency near and above capacity are
    those of an open system. Exact are: the long-run rate, when `response_share` is right; that a user's requests
    are at least the assumed response time apart, so no user sends bursts; and the limit of many users, which
    is Poisson. Users are not labelled in the path and prompts do not grow from turn to turn.

    **What it is for.** Whatever takes rates or paths: fluid programs, sweeps, fleets, bounds. Where the answers'
    times matter, near and above capacity, run the users themselves: `UserSequences` and `simulate_closed`.

    Parameters
    ----------
    users : int
        Number of users, at least 1.
    think_cv : float, optional
        Coefficient of variation of the think time, 0 to 100.
    response_share : float, optional
        Assumed response time over mean gap, in [0, 1).

    Examples
    --------
    40 users who think 18 s on average and wait 2 s for an answer:

    >>> process = closed_loop(users=40, think_cv=1.0, response_share=2 / 20)
    >>> process.dispersion(rate=40 / 20)
    0.81
    """
    return _ClosedLoop(
        check_count("users", users, minimum=1, maximum=MAX_USERS),
        _check_cv("think_cv", think_cv),
        check_real("response_share", response_share, minimum=0, maximum=math.nextafter(1.0, 0.0)),
    )


@dataclass(frozen=True)
class _MarkovModulated(ArrivalProcess):
    relative_rate: tuple[float, ...]
    mean_sojourn: tuple[float, ...]
    transition: tuple[tuple[float, ...], ...] | None

    @cached_property
    def _jumps(self) -> FloatArray:
        """Jump probabilities, float64[K, K]."""
        if self.transition is not None:
            return np.array(self.transition)
        count = len(self.relative_rate)
        return (1 - np.eye(count)) / (count - 1)

    @cached_property
    def _shares(self) -> FloatArray:
        """π, long-run share of time in each state, float64[K]."""
        jumps = self._jumps
        count = len(jumps)
        equations = np.vstack([jumps.T - np.eye(count), np.ones(count)])
        visits = np.linalg.lstsq(equations, np.append(np.zeros(count), 1.0), rcond=None)[0]
        time = visits * np.array(self.mean_sojourn)
        return np.asarray(time / time.sum())

    @cached_property
    def _unit_rate(self) -> FloatArray:
        """Rate in each state when λ = 1, float64[K]."""
        relative = np.array(self.relative_rate)
        return np.asarray(relative / (self._shares @ relative))

    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        visits = horizon * float((self._shares / np.array(self.mean_sojourn)).sum())
        _check_expected(visits, "changes of the rate")
        chain, clock = _streams(rng, 2)
        walk = self._walk(chain, int(visits + 4 * math.sqrt(visits)) + 4)
        ends, masses = next(walk)
        while ends[-1] <= horizon:
            further = next(walk)
            ends, masses = np.append(ends, further[0][1:]), np.append(masses, further[1][1:])
        return _inverted(ends, masses, rate, horizon, clock)

    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        chain, clock = _streams(rng, 2)
        mean_sojourn = 1.0 / float((self._shares / np.array(self.mean_sojourn)).sum())
        walk = self._walk(chain, int(min(max(size / (rate * mean_sojourn), 4.0), size)) + 4)
        ends, masses = next(walk)
        for sums in _sum_pieces(clock.standard_exponential, size):
            blocks = [(ends, masses)]
            while rate * blocks[-1][1][-1] <= sums[-1]:
                further = next(walk)
                blocks.append((further[0][1:], further[1][1:]))
            ends, masses = (np.concatenate(column) for column in zip(*blocks, strict=True))
            yield np.interp(sums, rate * masses, ends)
            first = max(int(np.searchsorted(rate * masses, sums[-1], side="right")) - 1, 0)
            ends, masses = ends[first:], masses[first:]

    def _walk(self, chain: np.random.Generator, size: int) -> Iterator[tuple[FloatArray, FloatArray]]:
        """Ends of the chain's stays and the cumulative unit rate at them, `size` stays and then fewer at a time.

        Each block begins with the last entry of the one before; the first one with 0.
        """
        sojourns = np.array(self.mean_sojourn)
        cumulative = np.cumsum(self._jumps, axis=1)
        rows = [row[: int(np.argmax(row >= row[-1])) + 1].tolist() for row in cumulative]
        start = np.cumsum(self._shares)
        state = int(np.searchsorted(start / start[-1], chain.random(), side="right"))
        ends, masses = np.zeros(1), np.zeros(1)
        while True:
            uniforms = chain.random((size, 2))
            size = size // 4 + 4
            states = np.empty(len(uniforms), dtype=np.int64)
            for index, uniform in enumerate(uniforms[:, 1].tolist()):
                states[index] = state
                row = rows[state]
                state = min(bisect_right(row, uniform * row[-1]), len(row) - 1)
            stay = -np.log1p(-uniforms[:, 0]) * sojourns[states]
            mass = stay * self._unit_rate[states]
            ends = np.cumsum(np.concatenate([ends[-1:], stay]))
            masses = np.cumsum(np.concatenate([masses[-1:], mass]))
            yield ends, masses

    def dispersion(self, rate: float) -> float:
        jumps, sojourns, shares = self._jumps, np.array(self.mean_sojourn), self._shares
        generator = (jumps - np.eye(len(jumps))) / sojourns[:, None]
        deviation = np.linalg.inv(np.outer(np.ones(len(jumps)), shares) - generator) - shares
        rates = rate * self._unit_rate
        return 1.0 + 2.0 * float((shares * rates) @ deviation @ self._unit_rate)

    def accelerated(self, zeta: float) -> ArrivalProcess:
        return markov_modulated(
            self.relative_rate, tuple(s / zeta for s in self.mean_sojourn), self.transition
        )

    def to_dict(self) -> dict[str, Any]:
        data: dict[str, Any] = {
            "process": "markov_modulated",
            "relative_rate": list(self.relative_rate),
            "mean_sojourn": list(self.mean_sojourn),
        }
        if self.transition is not None:
            data["transition"] = [list(row) for row in self.transition]
        return data

    def __repr__(self) -> str:
        rates, stays = (", ".join(f"{v:g}" for v in row) for row in (self.relative_rate, self.mean_sojourn))
        return f"markov_modulated([{rates}], mean_sojourn=[{stays}] s)"


def markov_modulated(
    relative_rate: ArrayLike, mean_sojourn: ArrayLike, transition: ArrayLike | None = None
) -> ArrivalProcess:
    """Poisson arrivals whose rate jumps between K levels with a Markov chain: quiet times and bursts.

    In state i requests come at a rate proportional to `relative_rate[i]` (scaled so that the mean is λ) for an
    exponential time of mean `mean_sojourn[i]`. Each type has a chain of its own: types do not burst together.

    Parameters
    ----------
    relative_rate : float[K]
        Rates of the states up to a common factor, at least 0, not all 0; K ≥ 2.
    mean_sojourn : float[K]
        Mean time of a visit to each state, seconds, positive.
    transition : float[K, K], optional
        Probabilities of the next state: zero diagonal, rows of sum 1, every state reachable from every other.
        By default all other states are equally likely.

    Examples
    --------
    Ten times the rate for half a minute every five minutes or so:

    >>> process = markov_modulated([1, 10], mean_sojourn=[270, 30])
    >>> round(process.dispersion(rate=4.0), 1)
    437.2
    """
    relative = _number_row("relative_rate", relative_rate)
    if len(relative) < 2:
        raise InputError("relative_rate", f"{len(relative)} states", "have at least 2", "Or use poisson().")
    sojourns = _number_row("mean_sojourn", mean_sojourn, zero=False, size=len(relative))
    if max(relative) == 0:
        raise InputError("relative_rate", "all zero", "have a positive entry")
    rows = None
    if transition is not None:
        given = list(transition) if isinstance(transition, (Sequence, np.ndarray)) else []
        if len(given) != len(relative):
            raise InputError("transition", transition, f"be {len(relative)} rows of {len(relative)} numbers")
        rows = tuple(_number_row(f"transition[{i}]", row, size=len(relative)) for i, row in enumerate(given))
        for index, row in enumerate(rows):
            if row[index] != 0 or abs(math.fsum(row) - 1) > 1e-9:
                raise InputError(
                    f"transition[{index}]", list(row), f"sum to 1 with 0 in place {index} (a jump leaves)"
                )
        reached = np.linalg.matrix_power((np.array(rows) > 0) + np.eye(len(rows)), len(rows)) > 0
        if not reached.all():
            source, target = np.argwhere(~reached)[0].tolist()
            raise InputError(
                "transition",
                f"no way from state {source} to {target}",
                "lead from every state to every other",
            )
    return _MarkovModulated(relative, sojourns, rows)


@dataclass(frozen=True)
class _TimeVarying(ArrivalProcess):
    relative_rate: tuple[float, ...]
    step: tuple[float, ...]

    @property
    def has_constant_rate(self) -> bool:
        return len(set(self.relative_rate)) == 1

    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        edges, mass = self._profile()
        whole, rest = divmod(horizon, edges[-1])
        expected = rate * float(whole * mass[-1] + np.interp(rest, edges, mass))
        _check_expected(expected, "requests")
        times = self._at(_sums(rng.standard_exponential, expected), rate)
        return _before(np.maximum.accumulate(times), horizon)

    def _profile(self) -> tuple[FloatArray, FloatArray]:
        """Ends of the steps, s, and the cumulative rate at them where the mean rate is 1."""
        steps = np.array(self.step)
        edges = np.concatenate([[0.0], np.cumsum(steps)])
        mass = np.concatenate([[0.0], np.cumsum(np.array(self.relative_rate) * steps)])
        mass *= edges[-1] / mass[-1]
        return edges, mass

    def _at(self, sums: FloatArray, rate: float) -> FloatArray:
        """The times at which the cumulative rate reaches `sums`."""
        edges, mass = self._profile()
        turns, rests = np.divmod(sums, rate * mass[-1])
        return np.asarray(turns * edges[-1] + np.interp(rests, rate * mass, edges))

    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        last = 0.0
        for sums in _sum_pieces(rng.standard_exponential, size):
            times = np.maximum.accumulate(np.maximum(self._at(sums, rate), last))
            last = float(times[-1])
            yield times

    def dispersion(self, rate: float) -> float:
        return 1.0

    def accelerated(self, zeta: float) -> ArrivalProcess:
        return time_varying(self.relative_rate, tuple(s / zeta for s in self.step))

    def to_dict(self) -> dict[str, Any]:
        step = self.step[0] if len(set(self.step)) == 1 else list(self.step)
        return {"process": "time_varying", "relative_rate": list(self.relative_rate), "step": step}

    def __repr__(self) -> str:
        return f"time_varying({len(self.step)} steps, period {math.fsum(self.step):g} s)"


def time_varying(relative_rate: ArrayLike, step: float | ArrayLike) -> ArrivalProcess:
    """Poisson arrivals whose rate follows a piecewise constant profile, repeated for ever.

    Only the shape of the profile matters: it is scaled so that its mean over a period is λ. Over windows that
    are not whole periods the expected number is the profile's, not λ times the window. A smooth rate is given by
    its means over short steps. Types that share a profile rise and fall together.

    Parameters
    ----------
    relative_rate : float[K]
        Rates of the steps up to a common factor, at least 0, not all 0.
    step : float or float[K]
        Duration of each step, seconds, positive; one number for equal steps.

    Examples
    --------
    >>> hours = np.arange(24)
    >>> day = time_varying(1 - 0.8 * np.cos(2 * np.pi * (hours + 0.5) / 24), step=3600)
    >>> times = day.sample(1.0, 86400, np.random.default_rng(1))
    >>> np.histogram(times, bins=4, range=(0, 86400))[0]
    array([10530, 32707, 32880, 10606])
    """
    relative = _number_row("relative_rate", relative_rate)
    if max(relative) == 0:
        raise InputError("relative_rate", "all zero", "have a positive entry")
    if np.ndim(step) == 0:
        steps = (check_scale("step", step, zero=False),) * len(relative)
    else:
        steps = _number_row("step", step, zero=False, size=len(relative))
    return _TimeVarying(relative, steps)


@dataclass(frozen=True)
class _Batches(ArrivalProcess):
    size: LengthLaw
    epochs: ArrivalProcess

    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        clock, sizes = _streams(rng, 2)
        times = self.epochs.sample(rate / self.size.mean, horizon, clock)
        return np.repeat(times, self.size.sample(sizes, len(times)))

    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        clock, sizes = _streams(rng, 2)
        mean = self.size.mean
        for times in self.epochs.pieces(rate / mean, clock, max(int(size / mean), 1)):
            yield np.repeat(times, self.size.sample(sizes, len(times)))

    def dispersion(self, rate: float) -> float:
        mean = self.size.mean
        variance = self.size.moment(2) - mean**2
        return variance / mean + mean * self.epochs.dispersion(rate / mean)

    def accelerated(self, zeta: float) -> ArrivalProcess:
        return _Batches(self.size, self.epochs.accelerated(zeta))

    def to_dict(self) -> dict[str, Any]:
        return {"process": "batches", "size": self.size.to_dict(), "epochs": self.epochs.to_dict()}

    def __repr__(self) -> str:
        return f"batches({self.size!r}, epochs={self.epochs!r})"


def batches(size: int | LengthLaw, epochs: ArrivalProcess | None = None) -> ArrivalProcess:
    """Requests that come several at a time: batch b brings B_b requests at one instant.

    Parameters
    ----------
    size : int or LengthLaw
        Law of the number of requests in a batch, from `fluidsched.lengths` (at least 1 each).
    epochs : ArrivalProcess, optional
        When batches come, at rate λ/E[B]; Poisson by default.

    Examples
    --------
    >>> batches(3).sample(3.0, 2.0, np.random.default_rng(3)).round(2)
    array([0.38, 0.38, 0.38, 1.08, 1.08, 1.08])
    """
    if epochs is None:
        epochs = poisson()
    if not isinstance(epochs, ArrivalProcess):
        raise InputError("epochs", epochs, "be an arrival process", "Make one with fluidsched.arrivals.")
    if not isinstance(size, LengthLaw):
        size = lengths.fixed(check_count("size", size, minimum=1, remedy="Or give a law from lengths."))
    return _Batches(size, epochs)


@dataclass(frozen=True)
class _Superposition(ArrivalProcess):
    processes: tuple[ArrivalProcess, ...]
    shares: tuple[float, ...]

    @property
    def has_constant_rate(self) -> bool:
        return all(process.has_constant_rate for process in self.processes)

    def _times(self, rate: float, horizon: float, rng: np.random.Generator) -> FloatArray:
        streams = _streams(rng, len(self.processes))
        parts = zip(self.processes, self._fractions, streams, strict=True)
        times = [process.sample(rate * share, horizon, stream) for process, share, stream in parts]
        return np.sort(np.concatenate(times))

    def pieces(self, rate: float, rng: np.random.Generator, size: int) -> Iterator[FloatArray]:
        streams = _streams(rng, len(self.processes))
        parts = [
            process.pieces(rate * share, stream, max(int(size * share), 1))
            for process, share, stream in zip(self.processes, self._fractions, streams, strict=True)
        ]
        ahead = [next(part) for part in parts]
        while True:
            known = min(times[-1] for times in ahead)  # nobody comes before that any more
            splits = [int(np.searchsorted(times, known)) for times in ahead]
            if any(splits):
                yield np.sort(np.concatenate([times[:k] for times, k in zip(ahead, splits, strict=True)]))
            ahead = [times[k:] for times, k in zip(ahead, splits, strict=True)]
            ahead = [
                np.concatenate([times, next(part)]) if times[-1] == known else times
                for times, part in zip(ahead, parts, strict=True)
            ]

    @cached_property
    def _fractions(self) -> list[float]:
        total = math.fsum(self.shares)
        return [share / total for share in self.shares]

    def dispersion(self, rate: float) -> float:
        parts = zip(self.processes, self._fractions, strict=True)
        return math.fsum(share * process.dispersion(rate * share) for process, share in parts)

    def accelerated(self, zeta: float) -> ArrivalProcess:
        return _Superposition(tuple(p.accelerated(zeta) for p in self.processes), self.shares)

    def to_dict(self) -> dict[str, Any]:
        return {
            "process": "superposition",
            "processes": [p.to_dict() for p in self.processes],
            "shares": list(self.shares),
        }

    def __repr__(self) -> str:
        return f"superposition({len(self.processes)} processes)"


def superposition(processes: Sequence[ArrivalProcess], shares: ArrayLike) -> ArrivalProcess:
    """Several independent processes together; what joined types (`Workload.merged`) bring.

    Parts without a share are left out. Where all others are Poisson, or follow one profile, so does the whole:
    then that process is returned.

    Parameters
    ----------
    processes : sequence of ArrivalProcess
        The parts, at least one.
    shares : float[I]
        Each part's share of the rate, up to a common factor: at least 0, not all 0.

    Examples
    --------
    >>> superposition([renewal(0), renewal(2)], shares=[3, 1]).dispersion(rate=1.0)
    1.0
    >>> superposition([poisson(), poisson()], shares=[3, 1])
    poisson()
    """
    parts = tuple(processes)
    for index, part in enumerate(parts):
        if not isinstance(part, ArrivalProcess):
            raise InputError(f"processes[{index}]", part, "be an arrival process")
    weights = _number_row("shares", shares, size=len(parts))
    if max(weights) == 0:
        raise InputError("shares", "all zero", "have a positive entry")
    present, kept = zip(*((p, w) for p, w in zip(parts, weights, strict=True) if w > 0), strict=True)
    if len(present) == 1 or (len(set(present)) == 1 and isinstance(present[0], (_Poisson, _TimeVarying))):
        whole: ArrivalProcess = present[0]
        return whole
    return _Superposition(present, kept)


_MAKERS: Makers[ArrivalProcess] = {
    "poisson": (poisson, (), ()),
    "renewal": (renewal, ("cv",), ()),
    "markov_modulated": (markov_modulated, ("relative_rate", "mean_sojourn"), ("transition",)),
    "time_varying": (time_varying, ("relative_rate", "step"), ()),
    "batches": (batches, ("size",), ("epochs",)),
    "closed_loop": (closed_loop, ("users",), ("think_cv", "response_share")),
    "superposition": (superposition, ("processes", "shares"), ()),
}


def from_dict(argument: str, data: object) -> ArrivalProcess:
    """Read a process from plain data, ``{"process": "renewal", "cv": 2.0}``; errors name the field.

    Examples
    --------
    >>> from_dict("arrivals", {"process": "renewal", "cv": 2.0})
    renewal(cv=2)
    """
    readers = {"size": lengths.from_dict, "epochs": from_dict, "processes": _list_from_dicts}
    return read_recipe(argument, data, "process", _MAKERS, readers)


def _list_from_dicts(argument: str, data: object) -> list[ArrivalProcess]:
    if not isinstance(data, (list, tuple)):
        raise InputError(argument, data, "be a list")
    return [from_dict(f"{argument}[{i}]", part) for i, part in enumerate(data)]


def _number_row(
    argument: str, given: ArrayLike, *, zero: bool = True, size: int | None = None
) -> tuple[float, ...]:
    """Return a row of non-negative numbers (positive without `zero`) as a tuple; `size`: how many there must be."""
    if not isinstance(given, (Sequence, np.ndarray)) or isinstance(given, str):
        raise InputError(argument, given, "be a list of numbers")
    values = list(given)
    if not values or (size is not None and len(values) != size):
        raise InputError(argument, f"{len(values)} numbers", f"hold {size or 'at least one'}")
    return tuple(check_scale(f"{argument}[{i}]", v, zero=zero) for i, v in enumerate(values))


def _check_cv(argument: str, cv: float) -> float:
    """A coefficient of variation, 0 or such that its square is a number like others."""
    number = check_real(argument, cv, minimum=0.0, maximum=MAX_CV)
    if 0.0 < number < MIN_CV:
        raise InputError(argument, cv, f"be 0 or at least {MIN_CV:g}", "Use 0 for equal gaps.")
    return number


def _check_expected(expected: float, what: str) -> None:
    if expected > MAX_REQUESTS:
        remedy = "Use a shorter horizon or a lower rate."
        raise InputError(
            "horizon", f"{expected:.3g} expected {what}", f"give at most {MAX_REQUESTS:,}", remedy
        )


def _streams(rng: np.random.Generator, count: int) -> list[np.random.Generator]:
    """Independent streams seeded from the next numbers of `rng`."""
    return [np.random.default_rng(child) for child in seed_sequence(rng).spawn(count)]


def _before(times: FloatArray, horizon: float) -> FloatArray:
    """The ascending times below the horizon."""
    return times[: np.searchsorted(times, horizon)]


def _sums(draw: Callable[[int], FloatArray], total: float, first: FloatArray | float = 0.0) -> FloatArray:
    """Partial sums of successive draws of mean 1 added to `first`, along axis 0, until all are above `total`.

    `draw(n)` gives the next n draws (rows). How many are drawn at a time does not change the sums.
    """
    enough = total * (1 + 1e-12)  # what is drawn too many is cut off later; too few would lose arrivals
    gaps = draw(int(total + 4 * math.sqrt(total)) + 4)
    gaps[0] += first
    sums = np.cumsum(gaps, axis=0)
    while sums[-1].min() <= enough:
        gaps = np.concatenate([gaps, draw(len(gaps) // 4 + 4)])
        sums = np.cumsum(gaps, axis=0)
    return sums


def _sum_pieces(
    draw: Callable[[int], FloatArray], size: int, first: FloatArray | float = 0.0
) -> Iterator[FloatArray]:
    """The partial sums of `_sums` without end, `size` at a time: cumulative sums add up in order, so they are equal."""
    before = first
    while True:
        gaps = draw(size)
        gaps[0] += before
        sums = np.cumsum(gaps, axis=0)
        before = sums[-1]
        yield sums


def _renewal_gaps(
    rng: np.random.Generator, sources: int, cv: float, offset: float
) -> tuple[FloatArray, Callable[[int], FloatArray]]:
    """First gaps and a function that draws rows of further ones, of stationary renewal processes of mean gap 1.

    Gaps are offset + (1 − offset) G, E[G] = 1. The first one is a uniform share of a *length-biased* gap: with
    probability `offset` an ordinary one, otherwise one with the length-biased gamma (shape k + 1 for k) in place
    of G.
    """

    def gamma(shape: float, size: tuple[int, ...]) -> FloatArray:
        if cv == 0:
            return np.ones(size)
        return rng.standard_gamma(shape, size) * cv**2

    def gap(variable: FloatArray) -> FloatArray:
        return offset + (1 - offset) * variable

    shape = 1 / cv**2 if cv > 0 else math.inf
    uniforms = rng.random((sources, 2))
    plain, biased = gamma(shape, (sources,)), gamma(shape + 1, (sources,))
    first = uniforms[:, 0] * gap(np.where(uniforms[:, 1] < offset, plain, biased))
    return first, lambda rows: gap(gamma(shape, (rows, sources)))


def _renewal_times(
    rate: float, horizon: float, rng: np.random.Generator, *, sources: int, cv: float, offset: float
) -> FloatArray:
    """Superposition of stationary renewal processes, each with mean gap sources/rate; see `_renewal_gaps`."""
    first, draw = _renewal_gaps(rng, sources, cv, offset)
    cycle = sources / rate
    later = _sums(draw, horizon / cycle, first)
    times = np.concatenate([first, later.ravel()]) * cycle
    return np.sort(times[times < horizon])


def _renewal_pieces(
    rate: float, rng: np.random.Generator, size: int, *, sources: int, cv: float, offset: float
) -> Iterator[FloatArray]:
    """The times of `_renewal_times` in pieces: what every source has passed is complete."""
    first, draw = _renewal_gaps(rng, sources, cv, offset)
    cycle = sources / rate
    ahead = first * cycle
    for sums in _sum_pieces(draw, max(size // sources, 1), first):
        ahead = np.sort(np.concatenate([ahead, sums.ravel() * cycle]))
        split = int(np.searchsorted(ahead, sums[-1].min() * cycle))
        if split:
            yield ahead[:split]
            ahead = ahead[split:]


def _inverted(
    knots: FloatArray, mass: FloatArray, rate: float, horizon: float, rng: np.random.Generator
) -> FloatArray:
    """Poisson arrivals with the piecewise linear cumulative rate that is rate·mass at `knots` (beyond horizon)."""
    expected = rate * float(np.interp(horizon, knots, mass))
    _check_expected(expected, "requests")
    return _before(np.interp(_sums(rng.standard_exponential, expected), rate * mass, knots), horizon)
