"""Write the embedded workloads of `fluidsched.workloads` from the public traces.

    python scripts/make_embedded_workloads.py DATA_ROOT [--out DIRECTORY]

DATA_ROOT is the folder that holds ``traces/``. Each trace becomes 12 types (`ArrivalPath.to_workload`), and
the joint law of each type, hundreds of points, is replaced by at most 40 of them with new weights:

- candidates are the type's observed points (p, o) with their empirical frequencies f;
- one point each with the smallest and the largest p and o is kept with at least its frequency, so that the
  law has the same extremes;
- the new weights w ≥ 0 give the same total mass, the same moments E[p^i o^j] for i + j ≤ 3, and the same mass
  to each of up to 14 ranges of p and of o between quantiles of the empirical marginals: at most 36 linear
  equations. Degree 3 makes the mean and variance of KV held by a resident request exact (its second moment
  is E Σ_k (p + k − 1)²); the ranges keep the quantiles;
- among these weights the linear program takes those of least Σ w·(squared distance of the point from the
  centre of its ranges). A vertex of this polytope has at most 36 positive weights besides the kept points.

The solver only says *which* points carry weight. Their weights are then the solution of the equations in
rational arithmetic (all data are integers), rounded once: moments are conserved to the last bit of a double,
whatever the solver's tolerance. The same trace gives the same bytes.

Beside each workload, ``profiles/`` gets the trace's rate in steps of five minutes from its first arrival (requests
over seconds; a rest shorter than half a step joins the last one), as the recipe of `fs.arrivals.time_varying`.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path

import numpy as np
from scipy.optimize import linprog

import fluidsched as fs
from fluidsched._files import to_jsonable, write_whole

TYPES = 12
LEVELS = [*(np.arange(1, 12) / 12), 0.97, 0.99]
DEGREE = 3
STEP = 300.0
AZURE = "Microsoft Azure LLM inference trace 2023 ({}), CC-BY-4.0; Patel et al., Splitwise, ISCA 2024"
TRACES = {
    "azure_conv": (
        "AzureLLMInferenceTrace_conv.csv",
        "Conversations: one hour of an Azure LLM inference service on 2023-11-16",
        AZURE.format("conversation"),
    ),
    "azure_code": (
        "AzureLLMInferenceTrace_code.csv",
        "Code completion: one hour of an Azure LLM inference service on 2023-11-16",
        AZURE.format("code"),
    ),
    "mooncake_synthetic": (
        "mooncake_synthetic_trace.jsonl",
        "Long prompts: the synthetic trace published with the Mooncake server, prefix sharing not included",
        "Mooncake synthetic trace, Apache-2.0; Qin et al., Mooncake, FAST 2025",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("data_root", type=Path, help="folder that holds traces/")
    default = Path(fs.__file__).parent / "workload" / "embedded"
    parser.add_argument("--out", type=Path, default=default, help="folder to write to")
    arguments = parser.parse_args()
    for name, text in embedded_workloads(arguments.data_root).items():
        write_whole(arguments.out / f"{name}.json", text)
    for name, text in rate_profiles(arguments.data_root).items():
        write_whole(arguments.out / "profiles" / f"{name}.json", text)


def embedded_workloads(data_root: Path) -> dict[str, str]:
    """Name -> JSON text of each embedded workload."""
    texts = {}
    for name, (file, description, source) in TRACES.items():
        traced = fs.read_trace(data_root / "traces" / file).to_workload(TYPES)
        types = [
            fs.RequestType(
                t.name,
                t.arrival_rate,
                lengths=compressed(t.law),
                prompt_range=t.prompt_range,
                output_range=t.output_range,
            )
            for t in traced.types
        ]
        described = (
            f"{description}. {TYPES} types by prompt and output length, each with a law on 40 points at most "
            f"that has the extremes and moments up to degree {DEGREE} of the trace's requests of the type."
        )
        data = to_jsonable(fs.Workload(types, name, described, source).to_dict())
        head = {k: v for k, v in data.items() if k != "types"}
        rows = ",\n  ".join(json.dumps(t, allow_nan=False) for t in data["types"])
        opening = json.dumps(head, indent=1, ensure_ascii=False).removesuffix("\n}")
        texts[name] = f'{opening},\n "types": [\n  {rows}\n ]\n}}\n'
        fs.Workload.from_dict(json.loads(texts[name]))
    return texts


def rate_profiles(data_root: Path) -> dict[str, str]:
    """Name -> JSON text of the rate profile of each trace."""
    texts = {}
    for name, (file, _, _) in TRACES.items():
        path = fs.read_trace(data_root / "traces" / file)
        times, duration = path.arrival_s - path.arrival_s[0], path.duration
        edges = np.append(STEP * np.arange(max(1, round(duration / STEP))), duration)
        steps = np.diff(edges)
        rates = np.histogram(times, edges)[0] / steps
        texts[name] = json.dumps(to_jsonable(fs.arrivals.time_varying(rates, steps).to_dict())) + "\n"
    return texts


def compressed(law: fs.lengths.JointAtoms) -> fs.lengths.JointAtoms:
    """The law on few of its own points described at the head of this script."""
    p, o = law.prompt_tokens, law.output_tokens
    counts = law.given_weights.astype(np.int64)
    kept = sorted({extreme(p, counts), extreme(-p, counts), extreme(o, counts), extreme(-o, counts)})
    lower = np.zeros(len(p))
    lower[kept] = counts[kept] / counts.sum()

    x, y = ((v - v.mean()) / max(v.std(), 1.0) for v in (p, o))
    cells = [cell(p, counts), cell(o, counts)]
    rows = [x**i * y**j for i in range(DEGREE + 1) for j in range(DEGREE + 1 - i)]
    rows += [(c == k).astype(float) for c in cells for k in range(1, c.max() + 1)]
    matrix = np.array(rows)
    cost = np.zeros(len(p))
    for values, index in zip((x, y), cells, strict=True):
        centre = np.bincount(index, counts * values) / np.bincount(index, counts)
        cost += (values - centre[index]) ** 2
    solution = linprog(
        cost,
        A_eq=matrix,
        b_eq=matrix @ (counts / counts.sum()),
        bounds=np.column_stack([lower, np.ones(len(p))]),
        method="highs-ds",
        options={"dual_feasibility_tolerance": 1e-10, "primal_feasibility_tolerance": 1e-10},
    )
    if solution.status != 0:
        raise RuntimeError(f"no weights found: {solution.message}")
    basic = np.flatnonzero(solution.x > lower + 1e-9)
    weights = exact_weights(p, o, counts, cells, kept, basic)
    chosen = np.array(sorted(weights))
    values = [weights[i] for i in chosen.tolist()]
    if min(values) <= 0 or len(values) > 40:
        raise RuntimeError(f"{len(values)} points, smallest weight {float(min(values)):g}")
    return fs.lengths.joint(p[chosen], o[chosen], [float(v) for v in values])


def extreme(values: np.ndarray, counts: np.ndarray) -> int:
    """Index of the most frequent among the points with the smallest value (the first one on a tie)."""
    candidates = np.flatnonzero(values == values.min())
    return int(candidates[np.argmax(counts[candidates])])


def cell(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Index of each point's range; ranges end at the values at LEVELS of the empirical law, ties joined."""
    cuts = np.unique(np.quantile(np.repeat(values, counts), LEVELS, method="inverted_cdf"))
    return np.searchsorted(cuts[cuts < values.max()], values, side="left")


def exact_weights(p, o, counts, cells, kept, basic) -> dict[int, Fraction]:
    """Weights in rationals: kept points not basic at their frequency, basic ones from the equations."""
    total = int(counts.sum())
    fixed = {i: Fraction(int(counts[i]), total) for i in kept if i not in set(basic.tolist())}

    def equations(i: int) -> list[int]:
        a, b = int(p[i]), int(o[i])
        row = [a**k * b**m for k in range(DEGREE + 1) for m in range(DEGREE + 1 - k)]
        return row + [int(c[i] == k) for c in cells for k in range(1, c.max() + 1)]

    columns = {i: equations(i) for i in range(len(p))}
    size = len(columns[0])
    right = [Fraction(sum(int(counts[i]) * columns[i][r] for i in columns), total) for r in range(size)]
    for i, weight in fixed.items():
        right = [b - weight * a for b, a in zip(right, columns[i], strict=True)]
    matrix = [[Fraction(columns[i][r]) for i in basic.tolist()] + [right[r]] for r in range(size)]
    solved = solve(matrix, len(basic))
    return fixed | dict(zip(basic.tolist(), solved, strict=True))


def solve(matrix: list[list[Fraction]], unknowns: int) -> list[Fraction]:
    """Solve the consistent system [A | b] of full column rank by Gauss-Jordan elimination."""
    rows = list(matrix)
    for column in range(unknowns):
        pivot = next((r for r in range(column, len(rows)) if rows[r][column] != 0), None)
        if pivot is None:
            raise RuntimeError("the chosen points do not determine their weights")
        rows[column], rows[pivot] = rows[pivot], rows[column]
        lead = rows[column][column]
        rows[column] = [v / lead for v in rows[column]]
        for r in range(len(rows)):
            factor = rows[r][column]
            if r != column and factor != 0:
                rows[r] = [v - factor * w for v, w in zip(rows[r], rows[column], strict=True)]
    if any(row[-1] != 0 for row in rows[unknowns:]):
        raise RuntimeError("the chosen points do not satisfy all equations")
    return [row[-1] for row in rows[:unknowns]]


if __name__ == "__main__":
    main()
