r"""A measured run beside the simulation of the same requests, and what would explain the difference.

`vllm bench serve --save-result --save-detailed` writes down when each request was sent, its lengths and its
times. The same arrivals are replayed on the server and table one believes in, and both sides are summed up in
the same way from requests, whatever the file's own summary says: TTFT, TPOT (decode time per token after the
first), E2E latency, request and output throughput.

**What would explain it.** Let m_i be the measured and s_i(f) the simulated means of TTFT, TPOT and E2E when one
coefficient of the iteration time is multiplied by f, everything else unchanged. For each coefficient the factor
that minimises

    e(f) = √( mean_i  ln²( m_i / s_i(f) ) )

is searched in [1/8, 8], and coefficients are ranked by what is left. One that leaves little explains the
difference alone. Several may, since at one load slow decodes look much alike whatever made them slow; at another load
they differ. If none does, it is not a matter of one coefficient: look at the engine's settings, at other load on the
machine, or calibrate anew (`fs.calibrate`).
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fluidsched import _files
from fluidsched._checks import LARGEST
from fluidsched._display import Tabular
from fluidsched._files import to_jsonable
from fluidsched.comparison import WIDTH
from fluidsched.errors import InputError
from fluidsched.policy import PolicyTable, baselines
from fluidsched.server import IterationTime, Server
from fluidsched.server.iteration import COEFFICIENTS
from fluidsched.simulation import simulate
from fluidsched.simulation.limits import never_fits
from fluidsched.simulation.result import aligned
from fluidsched.workload import ArrivalPath, read_trace
from fluidsched.workload.trace_rows import Rows

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Explanation", "MeasuredComparison", "compare_measured"]

FloatArray = NDArray[np.float64]

CLOSE = 0.05
"""Left over mean log ratio below which simulation and measurement are called equal, or explained."""

_LARGEST_FACTOR = 8.0


@dataclass(frozen=True)
class Explanation:
    """What one coefficient can explain.

    Attributes
    ----------
    coefficient : str
        One of `server.iteration.COEFFICIENTS`.
    factor : float
        What to multiply it by so that the simulation comes nearest to the measurement.
    left : float
        Root mean square of ln(measured / simulated) that is left then.
    """

    coefficient: str
    factor: float
    left: float


@dataclass(frozen=True, repr=False)
class MeasuredComparison(Tabular):
    """Measured and simulated, field by field.

    Attributes
    ----------
    source : str
        Name of the measured file.
    policy : str
        Name of the table simulated.
    measured, simulated : mapping
        Field name as in ``vllm bench serve`` → value; times in ms, rates per second.
    error : float
        Root mean square of ln(measured / simulated) over mean TTFT, TPOT and E2E.
    explanations : tuple of Explanation
        Best first; empty where the error is below 5 %.
    requests : int
        Requests compared.
    """

    source: str
    policy: str
    measured: Mapping[str, float]
    simulated: Mapping[str, float]
    error: float
    explanations: tuple[Explanation, ...]
    requests: int

    def to_frame(self) -> pd.DataFrame:
        """One row per field: measured, simulated, and measured over simulated."""
        import pandas as pd

        frame = pd.DataFrame({"measured": dict(self.measured), "simulated": dict(self.simulated)})
        frame["ratio"] = frame["measured"] / frame["simulated"]
        return frame.rename_axis("field")

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON values."""
        plain: dict[str, Any] = to_jsonable(self)
        return {"schema": "fluidsched.measured/1", **plain}

    def verdict(self) -> str:
        """What the comparison says, in a sentence."""
        if not self.explanations:
            return f"Measured and simulated latencies agree within {CLOSE:.0%} (root mean square {self.error:.1%})."
        best, *others = self.explanations
        text = f"{self._off()} {best.coefficient} × {best.factor:.3g} would leave {_apart(best.left)}"
        if best.left < CLOSE:
            also = [f"{one.coefficient} × {one.factor:.3g}" for one in others if one.left < CLOSE]
            if also:
                return (
                    f"{text}. Alone, {' or '.join(also)} would bring it within {CLOSE:.0%} too: for certainty, "
                    "measure at another load."
                )
            return f"{text}: that coefficient alone explains it."
        return (
            f"{text}: no single coefficient explains it. Compare the engine's settings with the table, "
            "or calibrate the server anew."
        )

    def _off(self) -> str:
        """What is off by how much."""
        ratios = {
            name: self.measured[field] / self.simulated[field]
            for name, field in (("TTFT", "mean_ttft_ms"), ("TPOT", "mean_tpot_ms"), ("E2E", "mean_e2el_ms"))
            if self.measured[field] > 0.0 and self.simulated[field] > 0.0
        }
        shown = ", ".join(f"{name} × {ratio:.3g}" for name, ratio in ratios.items())
        text = f"Measured over simulated means: {shown}."
        if ratios and 300.0 < min(ratios.values()) <= max(ratios.values()) < 3000.0:
            text += " About a thousand times each: are the file's times in milliseconds? They have to be in seconds."
        return text

    def __repr__(self) -> str:
        rows = [["field", "measured", "simulated", "ratio"]]
        for name, value in self.measured.items():
            other = self.simulated[name]
            ratio = value / other if other else math.nan
            cells = ((value, ",.4g"), (other, ",.4g"), (ratio, ".3f"))
            rows.append([name, *("–" if math.isnan(cell) else format(cell, form) for cell, form in cells)])
        count = "1 request" if self.requests == 1 else f"{self.requests:,} requests"
        parts = [f"{count} of {self.source} under {self.policy!r}", aligned(rows)]
        if self.explanations:
            found = [["one coefficient changed", "times", "difference left"]]
            found += [[one.coefficient, f"{one.factor:.3g}", _apart(one.left)] for one in self.explanations]
            parts += ["", aligned(found, last_is_number=True), ""]
        return "\n".join([*parts, fill(self.verdict(), WIDTH)])

    def _summary(self) -> list[tuple[str, str]]:
        return [("verdict", self.verdict())]


def compare_measured(
    result: str | os.PathLike[str], server: Server, table: PolicyTable | None = None
) -> MeasuredComparison:
    """Set a measured benchmark beside the simulation of the same requests.

    Parameters
    ----------
    result : path-like
        JSON of ``vllm bench serve --save-result --save-detailed``. Requests that failed are left out on both
        sides.
    server : Server
        Affine pieces; what is believed of the machine.
    table : PolicyTable, optional
        What the engine ran; `baselines.vllm()` by default.

    Returns
    -------
    MeasuredComparison

    Raises
    ------
    InputError
        If the file lacks what is needed, or the server's iteration time has no coefficients.

    Examples
    --------
    See ``fluidsched compare --measured``.
    """
    table = baselines.vllm() if table is None else table
    server.iteration_time.require_coefficients("a comparison with measurements")
    place = str(result)
    data = _files.loads(place, _files.read_text("measured result", result), strict=False)
    if not isinstance(data, Mapping):
        raise InputError(place, type(data).__name__, "hold one JSON object, a result of vllm bench serve")
    _list(place, data, "ttfts")
    path = read_trace(result)
    starts, ttft, e2e, output = _measured_times(place, data)
    measured = _summary(starts - starts.min(), ttft, e2e, output)
    path = dataclasses.replace(path, horizon=None)
    _check_fits(place, path, server, table)
    simulated, means = _simulated(path, server, table)
    target = _means(ttft, e2e, output)
    error = _error(target, means)
    explanations: tuple[Explanation, ...] = ()
    if error >= CLOSE:
        found = [_explain(name, path, server, table, target) for name in _present(server)]
        explanations = tuple(sorted(found, key=lambda explanation: explanation.left))
    return MeasuredComparison(
        Path(result).name, table.name, measured, simulated, error, explanations, len(path)
    )


def _apart(log_ratio: float) -> str:
    """A root mean square of log ratios for people: per cent where it is small, else a factor."""
    if log_ratio < 0.1:
        return f"{log_ratio:.1%}"
    return f"a factor of {math.exp(log_ratio):.3g}"


def _check_fits(place: str, path: ArrivalPath, server: Server, table: PolicyTable) -> None:
    """Refuse a measured run whose requests the server believed in could not have served."""
    too_long = never_fits(path, server, table)
    if not too_long.any():
        return
    i, count = int(too_long.argmax()), int(too_long.sum())
    others = f", and {count - 1:,} more of {len(path):,} requests" if count > 1 else ""
    raise InputError(
        place,
        f"a request of {path.prompt_tokens[i]:,} prompt and {path.output_tokens[i]:,} output tokens{others}",
        f"hold requests that {server.name!r} ({server.kv_capacity:,.0f} KV tokens) can serve under {table.name!r}",
        "They were served, so name the server and the table that were measured.",
    )


def _list(place: str, data: Mapping[str, Any], name: str, size: int | None = None) -> list[Any]:
    """A list of the result, of `size` entries if one is given."""
    remedy = "Run vllm bench serve with --save-detailed."
    if not isinstance(data.get(name), list):
        raise InputError(f"{place}, {name}", data.get(name, "nothing"), "be a list", remedy)
    values: list[Any] = data[name]
    if size is not None and len(values) != size:
        raise InputError(
            f"{place}, {name}", f"{len(values)} entries", f"have one per request, {size}", remedy
        )
    return values


def _measured_times(
    place: str, data: Mapping[str, Any]
) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray]:
    """Start, TTFT and E2E, s, and output tokens of the requests that succeeded, as the trace reader keeps them."""
    outputs = _list(place, data, "output_lens")
    errors = data.get("errors") or [""] * len(outputs)
    kept = [i for i, (tokens, error) in enumerate(zip(outputs, errors, strict=True)) if tokens and not error]
    rows = Rows(place, "record", [i + 1 for i in kept])

    def times(name: str) -> FloatArray:
        values = _list(place, data, name, len(outputs))
        return rows.times(name, [values[i] for i in kept])

    starts, ttft = times("start_times"), times("ttfts")
    if data.get("latencies") is not None or data.get("itls") is None:
        e2e = times("latencies")
    else:
        itls = _list(place, data, "itls", len(outputs))
        for index, i in enumerate(kept):
            if not isinstance(itls[i], list):
                rows.refuse(index, f"itls {itls[i]!r}", "be a list of seconds")
        gaps = [
            Rows(f"{place}, record {i + 1}", "gap", range(1, len(itls[i]) + 1)).times("itls", itls[i])
            for i in kept
        ]
        with np.errstate(over="ignore"):  # refused below
            e2e = ttft + np.array([each.sum() for each in gaps])
    for index in np.flatnonzero(~((ttft <= e2e) & (e2e > 0.0) & (e2e <= LARGEST)))[:1]:
        received = f"TTFT {ttft[index]:g} s and latency {e2e[index]:g} s"
        rows.refuse(int(index), received, f"have a latency above 0, at least its TTFT, at most {LARGEST:g} s")
    return starts, ttft, e2e, np.array([outputs[i] for i in kept], dtype=np.float64)


def _tpot(ttft: FloatArray, e2e: FloatArray, output: FloatArray) -> FloatArray:
    several = output > 1
    return (e2e[several] - ttft[several]) / (output[several] - 1.0)


def _means(ttft: FloatArray, e2e: FloatArray, output: FloatArray) -> FloatArray:
    """Mean TTFT, TPOT and E2E, s."""
    tpot = _tpot(ttft, e2e, output)
    return np.array([ttft.mean(), tpot.mean() if len(tpot) else math.nan, e2e.mean()])


def _summary(arrival: FloatArray, ttft: FloatArray, e2e: FloatArray, output: FloatArray) -> dict[str, float]:
    """Fields of ``vllm bench serve`` from per-request times."""
    duration = float((arrival + e2e).max())
    fields = {"request_throughput": len(ttft) / duration, "output_throughput": float(output.sum()) / duration}
    for name, values in (("ttft", ttft), ("tpot", _tpot(ttft, e2e, output)), ("e2el", e2e)):
        for word, value in (
            ("mean", values.mean() if len(values) else math.nan),
            ("median", np.quantile(values, 0.5) if len(values) else math.nan),
            ("p99", np.quantile(values, 0.99) if len(values) else math.nan),
        ):
            fields[f"{word}_{name}_ms"] = 1000.0 * float(value)
    return fields


def _simulated(path: ArrivalPath, server: Server, table: PolicyTable) -> tuple[dict[str, float], FloatArray]:
    runs = simulate(path, server, table)
    run = runs.run(table.name)
    if np.isnan(run.finish_s).any():
        raise InputError(
            "table",
            f"{table.name!r}, which leaves {int(np.isnan(run.finish_s).sum()):,} requests unserved",
            "serve every request of the measured run",
            "Give it a max_hold_s, or compare with the table the engine ran.",
        )
    ttft, e2e = run.first_token_s - path.arrival_s, run.finish_s - path.arrival_s
    output = path.output_tokens.astype(np.float64)
    return _summary(path.arrival_s, ttft, e2e, output), _means(ttft, e2e, output)


def _error(measured: FloatArray, simulated: FloatArray) -> float:
    """Root mean square of the log ratios; a mean that is 0 (an engine that sends all tokens at once) has none."""
    some = measured > 0.0
    return math.sqrt(float(np.mean(np.log(measured[some] / simulated[some]) ** 2)))


def _present(server: Server) -> list[str]:
    coefficients = server.iteration_time.require_coefficients("a comparison with measurements")
    return [name for k, name in enumerate(COEFFICIENTS) if (coefficients[:, k] != 0.0).any()]


def _explain(
    name: str, path: ArrivalPath, server: Server, table: PolicyTable, target: FloatArray
) -> Explanation:
    """The factor on one coefficient that brings the simulation nearest to the measured means."""
    from scipy.optimize import minimize_scalar

    coefficients = server.iteration_time.require_coefficients("a comparison with measurements")
    column = COEFFICIENTS.index(name)

    def left(log_factor: float) -> float:
        changed = coefficients.copy()
        changed[:, column] *= math.exp(log_factor)
        if changed[:, 0].max() <= 0.0:
            return math.inf
        time = IterationTime.pieces(changed.tolist())
        return _error(target, _simulated(path, dataclasses.replace(server, iteration_time=time), table)[1])

    edge = math.log(_LARGEST_FACTOR)
    # a coarse grid first: queueing makes the error flat on one side and steep on the other
    grid = np.linspace(-edge, edge, 13)
    errors = [left(float(point)) for point in grid]
    best = int(np.argmin(errors))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = minimize_scalar(left, bounds=(float(low), float(high)), method="bounded", options={"xatol": 1e-3})
    if found.fun < errors[best]:
        return Explanation(name, math.exp(float(found.x)), float(found.fun))
    return Explanation(name, math.exp(float(grid[best])), errors[best])
