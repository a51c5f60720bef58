r"""Which policy to run, what it gains over the engines as they come, and when one more server is needed.

**Choice** (`choose`). Of the policies that keep up, and meet the targets if any does, those whose mean end-to-end
latency is within 5 % of the lowest are as good as each other; among these the simplest to deploy safely is taken, in
the order of `PREFERENCE`. Where none meets the targets, those nearest to them stand for those that do: with the
largest of the measures, each over its target, within 5 % of the least.

**Gain** (`gains_over`). For a measure m and an engine e the differences on the R common paths,

    D_r = ±(m_r(recommended) − m_r(e)),        r = 1 … R,

signed so that positive is better, are independent, and mean(D) ± t_{R−1, 0.975}·s_D/√R is their interval. It is
*better* or *worse* if the interval excludes zero and the mean is at least 1 % of the engine's own value (iteration
times are not known better than that), else *within noise*. Differences between measures that are lower bounds,
because requests were unfinished at the end, are marked; the longer queue is cut off more, so they understate.

**Reach** (`bracket`). No policy carries more than the fluid boundary, load 1. What the recommended table carries is
sought by simulation: with its numbers held fixed and the load rising, the same paths come faster. At each load it
*fails* if the backlog is found to grow (the 95 % interval of its growth lies above zero) or a target is missed with
confidence; it *holds* if growth of more than 0.5 % of the throughput is ruled out in the same way and every target is
met with confidence; else the runs cannot tell. Reported are the largest load at which it holds and the least at which
it fails, both refined by bisection; and the throughput in overload, which is what the policy completes when there is
always somebody waiting.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from fluidsched._display import Tabular
from fluidsched._files import to_jsonable
from fluidsched.comparison import WIDTH
from fluidsched.policy import PolicyTable
from fluidsched.simulation.measures import UNITS, Settled, in_words, interval
from fluidsched.simulation.result import aligned

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

    from fluidsched.simulation import SimulationResult

__all__ = [
    "Gain",
    "Reach",
    "Recommendation",
    "bracket",
    "choose",
    "gains_over",
    "judge",
    "keeps_up",
    "settled_until",
]

#: Between tables of nearly equal latency the earlier one is recommended: the compiled cap, a stock engine's flag
#: that also protects it when the load rises, then the other compiled tables, then the engines as they come.
PREFERENCE = ("capped", "gated", "wait", "vllm", "sarathi")

ENGINES = ("vllm", "sarathi")
"""Engines as they come, which a recommendation is held against."""

NEARLY_EQUAL = 1.05
"""Ratio of mean end-to-end latencies up to which two policies count as equally good."""

PRACTICAL = 0.01
"""Share of the engine's value below which a difference counts as noise, however narrow its interval."""

RESOLUTION = 0.005
"""Loads are told apart to this, as a share of the fluid boundary."""

GAINS = {
    "request_throughput": (1.0, "throughput"),
    "mean_ttft": (-1.0, "mean TTFT"),
    "p99_ttft": (-1.0, "p99 TTFT"),
    "mean_e2e": (-1.0, "mean E2E"),
}
"""Measures that gains are stated for: sign of better, and name for people."""

ENGINE_NAMES = {"vllm": "vLLM", "sarathi": "Sarathi"}


@dataclass(frozen=True)
class Gain:
    """What the recommended policy gains over one engine, in one measure, at one load.

    Attributes
    ----------
    engine : str
        "vllm" or "sarathi", as they come.
    load : float
        Share of the fluid boundary.
    arrival_rate : float
        Offered, req/s.
    measure, unit : str
        As in `SimulationResult.summary`.
    of_engine : float
        The engine's own value, mean over replications.
    gain, low, high : float
        Paired difference, positive where the recommended policy is better, and its 95 % interval (NaN with one
        replication).
    is_lower_bound : bool
        One of the two values is a lower bound.
    verdict : {"better", "worse", "within noise", "one run"}
    """

    engine: str
    load: float
    arrival_rate: float
    measure: str
    unit: str
    of_engine: float
    gain: float
    low: float
    high: float
    is_lower_bound: bool
    verdict: str

    def __str__(self) -> str:
        """The gain in per cent of the engine's own value, marked where it is beyond noise."""
        if not self.of_engine > 0.0:
            return "–"
        percent = 100.0 / self.of_engine
        half = percent * (self.high - self.low) / 2
        shown = round(percent * self.gain, 1) + 0.0  # no "-0.0"
        text = f"{shown:+.1f}" + ("" if math.isnan(half) else f" ± {half:.1f}")
        return f"{'~ ' if self.is_lower_bound else ''}{text}{' *' if self.verdict in ('better', 'worse') else '  '}"


@dataclass(frozen=True)
class Reach:
    """How far the load may rise before one more server is needed.

    Attributes
    ----------
    critical_rate : float
        Of the fluid program, req/s: more than any policy can carry.
    load : float
        The present one, as a share of the fluid boundary.
    holds : float
        Largest load at which the recommended policy kept up and met the targets; 0 where that was found at none, NaN
        where nothing was simulated.
    fails : float
        Least load at which it surely did not; infinite where none was found.
    overload_rate : float
        Throughput of the recommended policy at the highest load simulated, req/s, if that is beyond the boundary;
        else NaN.
    targets : mapping
        Measure → what it may be at most, s.
    """

    critical_rate: float
    load: float
    holds: float
    fails: float
    overload_rate: float
    targets: Mapping[str, float]

    @property
    def largest_load(self) -> float:
        """What one server is taken to carry, as a share of the boundary: `holds` where that is known.

        Else the least load at which it surely fails, at most 1, which it carries less than.
        """
        return min(self.holds if self.holds > 0.0 else self.fails, 1.0)

    @property
    def servers(self) -> int:
        """Servers of this kind that the present load needs, each with an equal share of every type.

        At least, where `holds` is not known.
        """
        return max(1, math.ceil(self.load / self.largest_load - 1e-9))

    @property
    def next_rate(self) -> float:
        """Offered rate from which on one server is not enough, req/s; at the latest, where `holds` is not known."""
        return self.critical_rate * self.largest_load

    def lines(self, policy: str) -> list[str]:
        """What it says, in sentences."""
        critical = f"{self.critical_rate:.2f} req/s"
        aim = (
            " with " + " and ".join(f"{in_words(name)} ≤ {limit:g} s" for name, limit in self.targets.items())
            if self.targets
            else ""
        )
        lines = [f"By the linear program no policy carries more than {critical} on one server."]
        if math.isnan(self.holds):
            lines.append("No other load was simulated.")
        elif self.holds == 0.0:
            text = (
                f"How much {policy} carries{aim} cannot be told from runs so short, so few or at such loads"
            )
            if math.isfinite(self.fails):
                text += f"; from {self._at(self.fails)} on it does not"
            lines.append(text + ".")
        else:
            text = f"By simulation {policy} keeps up{aim} as far as {self._at(self.holds)}"
            if math.isfinite(self.fails):
                text += f" and no more from {self._at(self.fails)} on"
                if self.fails - self.holds > 2 * RESOLUTION:
                    text += "; between the two the runs cannot tell"
            lines.append(text + ".")
        if not math.isnan(self.overload_rate):
            share = self.overload_rate / self.critical_rate
            lines.append(
                f"In overload it completes {self.overload_rate:.2f} req/s ({share:.3f} of the boundary)."
            )
        if self.servers > 1:
            each = self.load / self.servers
            lines.append(
                f"The present load, {self.load:.2f}, needs {self.in_servers()} of this kind ({each:.2f} each)."
            )
        elif self.load > 0.0:
            growth = self.next_rate / (self.load * self.critical_rate) - 1.0
            lines.append(
                f"One more server is needed {self.beyond()}, when the present "
                f"{self.load * self.critical_rate:.2f} req/s have grown by {growth:.0%}."
            )
        return lines

    def in_servers(self) -> str:
        """How many servers the present load needs, in words."""
        return f"{'' if self.holds > 0.0 else 'at least '}{self.servers} servers"

    def beyond(self) -> str:
        """From which rate on one server is not enough, in words."""
        return f"beyond {self.next_rate:.2f} req/s{'' if self.holds > 0.0 else ' at the latest'}"

    def _at(self, load: float) -> str:
        return f"{load * self.critical_rate:.2f} req/s ({load:.3f} of the boundary)"


@dataclass(frozen=True, repr=False)
class Recommendation(Tabular):
    """What to run, why, what it gains, and how far it goes.

    Attributes
    ----------
    table : PolicyTable
        What to run.
    reason : str
        Why, in sentences.
    gains : tuple of Gain
        Over each engine that is not the recommended policy itself, by load, `GAINS` each.
    reach : Reach
    replications : int
        R, of every difference.
    """

    table: PolicyTable
    reason: str
    gains: tuple[Gain, ...]
    reach: Reach
    replications: int

    @property
    def policy(self) -> str:
        """Name of the recommended table."""
        return self.table.name

    @property
    def stock_within_noise(self) -> bool | None:
        """Whether vLLM as it comes does as well at the present load, as far as the runs can tell.

        True also where vLLM itself is recommended; None with one replication, which has no noise to compare with.
        """
        now = self._now("vllm")
        if any(gain.verdict == "one run" for gain in now):
            return None
        return not any(gain.verdict == "better" for gain in now)

    @property
    def engine_command(self) -> str | None:
        """Start of a stock vLLM 0.33 with the table's numbers; None where the table sets nothing vLLM knows."""
        arguments = self.table.to_vllm_args()
        return f"vllm serve MODEL {arguments.command_line()}" if arguments.arguments else None

    def engine_commands(self) -> dict[str, tuple[str, str, tuple[str, ...]]]:
        """Engine → its start with the table's numbers, where the names are from, what of the table is lost.

        An engine is left out where the table sets nothing that it knows.
        """
        commands = {}
        if self.engine_command is not None:
            commands["vLLM"] = (
                self.engine_command,
                "Names of version 0.33, not tried on an engine",
                self.lost,
            )
        arguments = self.table.to_sglang_args()
        if arguments.arguments.keys() - {"schedule_policy"}:
            command = f"python -m sglang.launch_server --model-path MODEL {arguments.command_line()}"
            names = "Names of its server arguments of 2026, not tried on an engine"
            commands["SGLang"] = (command, names, arguments.lost)
        return commands

    @property
    def lost(self) -> tuple[str, ...]:
        """What a stock vLLM does differently from the table; the library's scheduler inside vLLM follows it."""
        return self.table.to_vllm_args().lost

    def to_frame(self) -> pd.DataFrame:
        """Tidy frame with the fields of `Gain` as columns."""
        import pandas as pd

        columns = [field.name for field in fields(Gain)]
        return pd.DataFrame(
            [[getattr(gain, name) for name in columns] for gain in self.gains], columns=columns
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; the table by name."""
        plain: dict[str, Any] = to_jsonable(
            {
                "policy": self.policy,
                "reason": self.reason,
                "stock_within_noise": self.stock_within_noise,
                "engine_command": self.engine_command,
                "engine_commands": {
                    engine: {"command": command, "lost": lost}
                    for engine, (command, _, lost) in self.engine_commands().items()
                },
                "lost": self.lost,
                "reach": self.reach,
                "next_rate": self.reach.next_rate,
                "servers": self.reach.servers,
                "replications": self.replications,
                "gains": self.gains,
            }
        )
        return plain

    def plot(self, measure: str = "mean_ttft", ax: Axes | None = None) -> Axes:
        """Draw the gain in one measure against the load; see `fluidsched.plots.gains`."""
        from fluidsched import plots

        return plots.gains(self, measure, ax=ax)

    def _now(self, engine: str) -> list[Gain]:
        return [
            gain for gain in self.gains if gain.engine == engine and abs(gain.load - self.reach.load) < 1e-9
        ]

    def stock_sentence(self) -> str:
        """Whether the engine as it comes does as well, now and when the load rises."""
        if self.policy == "vllm":
            return "That is vLLM as it comes: nothing has to be set."
        now = self._now("vllm")
        if not now:
            return ""
        if self.stock_within_noise is None:
            return "A single run tells no difference from noise."
        better, worse = (_shares(now, verdict) for verdict in ("better", "worse"))
        if better:
            tail = f"; worse: {worse}" if worse else ""
            return f"At the present load it is better than vLLM as it comes: {better}{tail}."
        text = f"is better, by {worse}" if worse else "is within noise of it"
        return f"At the present load vLLM as it comes {text}. {self._later()}".strip()

    def _later(self) -> str:
        """How it compares with vLLM at higher loads, in a sentence of its own."""
        higher = [
            gain for gain in self.gains if gain.engine == "vllm" and gain.load > self.reach.load + RESOLUTION
        ]
        better = {gain.load for gain in higher if gain.verdict == "better"}
        if not higher:
            return ""
        if not better:
            return f"Nor is {self.policy} better at a higher load: nothing is lost by leaving the engine as it is."
        last = max(better)
        where = f"from {min(better):.2f} of the boundary on" if len(better) > 1 else f"at {last:.2f}"
        gained = _shares([gain for gain in higher if gain.load == last], "better")
        text = f"{self.policy.capitalize()} pays when the load rises, {where}: at {last:.2f} by {gained}"
        for load in sorted({gain.load for gain in higher if gain.verdict == "worse"} - better, reverse=True):
            lost = _shares([gain for gain in higher if gain.load == load], "worse")
            return f"{text}; at {load:.2f} it is worse, by {lost}."
        return f"{text}."

    def __repr__(self) -> str:
        lines = textwrap.wrap(f"{self.reason} {self.stock_sentence()}".strip(), WIDTH)
        for engine in dict.fromkeys(gain.engine for gain in self.gains):
            lines += [
                "",
                f"Gain of {self.policy} over {ENGINE_NAMES[engine]} as it comes, in % of its value",
            ]
            lines.append(aligned(self.gain_rows(engine), last_is_number=True))
        if self.gains:
            lines += ["", *textwrap.wrap(self.notes(), WIDTH)]
        lines += ["", "When one more server is needed"]
        for line in self.reach.lines(self.policy):
            lines += textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="  ")
        lines += ["", *self.engine_lines()]
        return "\n".join(lines)

    def gain_rows(self, engine: str) -> list[list[str]]:
        """The gains over one engine as they are printed: rows of cells, a row per load, the header first."""
        rows = [["load", "req/s", *(f"{name}  " for _, name in GAINS.values())]]
        mine = [gain for gain in self.gains if gain.engine == engine]
        for load in sorted({gain.load for gain in mine}):
            here = {gain.measure: gain for gain in mine if gain.load == load}
            now = " now" if abs(load - self.reach.load) < 1e-9 else ""
            rate = next(iter(here.values())).arrival_rate
            cells = [str(here[measure]) if measure in here else "–" for measure in GAINS]
            rows.append([f"{load:.2f}{now}", f"{rate:.2f}", *cells])
        return rows

    def notes(self) -> str:
        """What the signs in `gain_rows` mean."""
        notes = "positive: better (less latency, more throughput)"
        if self.replications > 1:
            notes += (
                f"; ± half width of the 95 % interval, paired over {self.replications} paths; * beyond noise: the "
                f"interval excludes 0 and the gain is at least {PRACTICAL:.0%}"
            )
        else:
            notes += "; one run: no intervals"
        if any(gain.is_lower_bound for gain in self.gains):
            notes += "; ~ of latencies that are lower bounds, requests being unfinished at the end"
        return notes

    def engine_lines(self) -> list[str]:
        """How to run the table: on a stock engine, and in vLLM with the library's scheduler."""
        lines = []
        for engine, (command, names, lost) in self.engine_commands().items():
            lines.append(f"As arguments of {engine} ({names[0].lower()}{names[1:]}):")
            lines.append(f"  {command}")
            lines += [f"  but not: {sentence}" for sentence in lost]
        if self.lost:
            lines.append(f"Exactly, with the library's scheduler inside vLLM: {PLUGIN_COMMAND}")
        return lines

    def _repr_html_(self) -> str:
        head = f"<p>{html.escape(self.reason)} {html.escape(self.stock_sentence())}</p>"
        reach = "".join(f"<li>{html.escape(line)}</li>" for line in self.reach.lines(self.policy))
        return f"{head}{self.to_frame().to_html(index=False)}<ul>{reach}</ul>"


PLUGIN_COMMAND = (
    "vllm serve MODEL --scheduler-cls fluidsched.integrations.vllm.FluidScheduler "
    """--additional-config '{"fluidsched": {"policy": "policy.json"}}'"""
)
"""How vLLM 0.33 follows a table with the library's scheduler."""


def _shares(gains: list[Gain], verdict: str) -> str:
    """The gains of one verdict as shares of the engine's values, in words; empty where there is none."""
    words = []
    for gain in gains:
        if gain.verdict == verdict and gain.of_engine > 0.0:
            share = abs(gain.gain) / gain.of_engine
            size = f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"
            words.append(f"{'~ ' if gain.is_lower_bound else ''}{size} in {GAINS[gain.measure][1]}")
    return ", ".join(words)


# ------------------------------------------------------------------ choosing


def keeps_up(runs: SimulationResult, name: str) -> bool:
    """Whether at most one request in a hundred was left without a first token when a run ended."""
    return not runs.outcome(name).lower_bounds["p99_ttft"].any()


def choose(runs: SimulationResult, targets: Mapping[str, float] | None = None) -> str:
    """Return the name of the policy to run; see the module's statement.

    Parameters
    ----------
    runs : SimulationResult
    targets : mapping, optional
        Measure → what it may be at most, s. Policies that miss one in the mean are passed over while others do not;
        if all do, those further from the targets are.
    """
    candidates = [name for name in PREFERENCE if name in runs.policies]
    candidates = [name for name in candidates if keeps_up(runs, name)] or candidates
    if targets:
        candidates = _nearest(runs, candidates, targets)
    latency = {name: float(np.mean(runs.measures(name)["mean_e2e"])) for name in candidates}
    if any(np.isnan(value) for value in latency.values()):
        return candidates[0]  # some run measured no request: nothing tells the policies apart
    return next(name for name in candidates if latency[name] <= NEARLY_EQUAL * min(latency.values()))


def _nearest(runs: SimulationResult, names: list[str], targets: Mapping[str, float]) -> list[str]:
    """Those that meet the targets in the mean; if none does, those nearest to them."""
    ratio = {
        name: max(float(np.mean(runs.measures(name)[m])) / limit for m, limit in targets.items())
        for name in names
    }
    known = [value for value in ratio.values() if not math.isnan(value)]
    limit = max(1.0, NEARLY_EQUAL * min(known)) if known and min(known) > 1.0 else 1.0
    return [name for name in names if ratio[name] <= limit] or names


def gains_over(runs: SimulationResult, policy: str, load: float, arrival_rate: float) -> list[Gain]:
    """Return the gains of one policy over the engines among `runs`, `GAINS` each, at this load.

    Parameters
    ----------
    runs : SimulationResult
        On common paths.
    policy : str
        The recommended one.
    load : float
        Of these runs, as a share of the fluid boundary.
    arrival_rate : float
        Of these runs, req/s.
    """
    found = []
    mine = runs.outcome(policy)
    for engine in ENGINES:
        if engine == policy or engine not in runs.policies:
            continue
        other = runs.outcome(engine)
        for measure, (sign, _) in GAINS.items():
            gain, low, high = interval(sign * (mine.values[measure] - other.values[measure]))
            of_engine = interval(other.values[measure])[0]
            if math.isnan(gain):
                continue
            verdict = "within noise"
            if math.isnan(low):
                verdict = "one run"
            elif abs(gain) >= PRACTICAL * abs(of_engine) and not low <= 0.0 <= high:
                verdict = "better" if gain > 0.0 else "worse"
            censored = mine.lower_bounds[measure].any() or other.lower_bounds[measure].any()
            found.append(
                Gain(
                    engine,
                    load,
                    arrival_rate,
                    measure,
                    UNITS[measure],
                    of_engine,
                    gain,
                    low,
                    high,
                    bool(censored),
                    verdict,
                )
            )
    return found


# ------------------------------------------------------------------ reach


def settled_until(horizon: float, warmup: float) -> float:
    """Up to when requests arrive that targets are judged by, s: the last sixth may still be in service."""
    return horizon - (horizon - warmup) / 6


def judge(runs: SimulationResult, policy: str, targets: Mapping[str, float], settled: Settled) -> bool | None:
    """Whether a policy keeps up and meets the targets: True and False with confidence, None if it cannot be told.

    `settled`: the latencies that have targets, of the requests that arrived up to `settled_until`.
    """
    outcome = runs.outcome(policy)
    if "stuck" in outcome.verdicts:
        return False
    answers: list[bool | None] = [True]
    if "horizon" in outcome.verdicts:
        _, low, high = interval(outcome.values["backlog_growth"])
        tolerated = RESOLUTION * interval(outcome.values["request_throughput"])[0]
        answers = [True if high <= tolerated else False if low > 0.0 else None]
    for measure, limit in targets.items():
        judged = settled.of(policy, measure)
        estimate, low, high = interval(np.array([value for value, _ in judged]))
        censored = any(is_bound for _, is_bound in judged)
        if math.isnan(estimate):  # no request has it: none can be late
            answers.append(True)
        elif low > limit:
            answers.append(False)
        else:
            answers.append(True if high <= limit and not censored else None)
    if False in answers:
        return False
    return None if None in answers else True


def bracket(
    judged: Mapping[float, bool | None],
    at: Callable[[float], bool | None],
    *,
    resolution: float = RESOLUTION,
) -> tuple[float, float]:
    """Largest load that holds, and least load that fails with none that holds above it, refined by bisection.

    What a load carries, every lower one does: a verdict that a higher load contradicts was chance.

    Parameters
    ----------
    judged : mapping
        Load → what is known already.
    at : callable
        Judges another load.
    resolution : float
        Bisection stops when the neighbouring verdict is this near.

    Returns
    -------
    holds, fails : float
        0 where nothing holds, infinity where nothing fails.

    Examples
    --------
    >>> def exact(load):
    ...     return True if load < 0.97 else False if load > 0.99 else None
    >>> holds, fails = bracket({load: exact(load) for load in (0.5, 0.9, 1.1)}, exact)
    >>> 0.965 < holds < 0.97, 0.99 < fails < 0.996
    (True, True)
    """
    known = dict(judged)
    while True:
        fails = math.inf
        for load in sorted(known, reverse=True):
            if known[load] is True:
                break
            if known[load] is False:
                fails = load
        holds = max((load for load, held in known.items() if held and load < fails), default=0.0)
        gaps = []
        if holds > 0.0:
            gaps.append((holds, min((load for load in known if load > holds), default=holds)))
        if fails < math.inf:
            gaps.append((max((load for load in known if load < fails), default=fails), fails))
        wide = [(low, high) for low, high in gaps if high - low > resolution]
        if not wide:
            return holds, fails
        middle = sum(wide[0]) / 2
        known[middle] = at(middle)
