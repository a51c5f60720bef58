"""What waiting buys and costs: gates 0 … n of one threshold rule, with and without freezing, against load.

One type, (512, 21) tokens, Llama-2-7B on one A100-80GB. A gated table admits when at least g requests wait, at most n = 16
in an iteration (which never binds): g = 0 never waits, g = n waits for a full threshold. Those in service keep running.
WAIT in blocks of iterations, as compiled, also freezes whoever is in service while it waits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from experiment import Found, estimate, look, new_figure, run, say, table_text

import fluidsched as fs
from fluidsched.errors import InfeasibleError
from fluidsched.policy import Match, TableType

SEED = 6
THRESHOLD = 16
GATES = (0, 2, 4, 8, 16)
LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)


def servers() -> dict[str, fs.Server]:
    """The fitted two-piece model, and the paper's model, where iterations cost only their memory traffic."""
    return {
        "fitted": fs.catalog.server("a100-80gb", "llama-2-7b"),
        "paper's model": fs.Server(
            137_000, fs.IterationTime.paper(d0=0.010042382503853812, d1=3.342175435455382e-7)
        ),
    }


def gated(gate: int) -> fs.PolicyTable:
    """Admit when `gate` wait, at most n per iteration."""
    row = TableType("chat", Match(label="chat"), threshold=THRESHOLD, gate=gate, period=1)
    return fs.PolicyTable(f"gate {gate}", "gated", (row,), token_budget=16_384)


def measure(smoke: bool) -> Found:
    chat = fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=512, output_tokens=21)])
    loads = (0.4, 0.8) if smoke else LOADS
    requests, replications = (200, 2) if smoke else (20_000, 8)
    found: dict[str, Any] = {}
    for name, server in servers().items():
        points = []
        for load in loads:
            offered = chat.at_load(load, server)
            fluid = fs.solve_fluid(offered, server)
            tables = [gated(gate) for gate in GATES]
            try:
                tables.append(fs.compile_policy(fluid, "wait"))
            except InfeasibleError:
                say(name, load, "no WAIT table")
            horizon = requests / offered.total_arrival_rate
            runs = fs.simulate(offered, server, tables, horizon=horizon, replications=replications, seed=SEED)
            points.append(
                {
                    table.name: {
                        measure_name: estimate(runs.measures(table.name)[measure_name])
                        for measure_name in ("mean_ttft", "mean_e2e", "busy_fraction", "mean_batch_size")
                    }
                    | {"verdict": runs.verdict(table.name)}
                    for table in tables
                }
            )
        found[name] = {"critical_rate": fluid.critical_rate, "points": points}
        say(name)
    return {"seed": SEED, "loads": list(loads), "servers": found}


def draw(found: Found) -> Any:
    figure, axes = new_figure(2, rows=len(found["servers"]))
    for row, (name, entry) in enumerate(found["servers"].items()):
        for column, (measure_name, label) in enumerate(
            (("mean_ttft", "mean TTFT (s)"), ("mean_e2e", "mean E2E (s)"))
        ):
            axis = axes[2 * row + column]
            for position, policy in enumerate([*(f"gate {g}" for g in GATES), "wait"]):
                here = [
                    (load, point[policy][measure_name]["estimate"])
                    for load, point in zip(found["loads"], entry["points"], strict=True)
                    if policy in point
                ]
                if here:
                    axis.plot(*np.array(here).T, marker="o", markersize=3, label=policy, **look(position))
            axis.set(xlabel="load, share of the fluid boundary", ylabel=label, yscale="log", title=name)
    axes[0].legend(fontsize=7)
    return figure


def text(found: Found) -> str:
    blocks, crossings = [], []
    for name, entry in found["servers"].items():
        policies = [*(f"gate {g}" for g in GATES), "wait"]
        for measure_name, title in (("mean_ttft", "mean TTFT"), ("mean_e2e", "mean end-to-end latency")):
            rows = []
            for load, point in zip(found["loads"], entry["points"], strict=True):
                cells = []
                for policy in policies:
                    if policy not in point:
                        cells.append("no table")
                        continue
                    mark = "" if point[policy]["verdict"] == "stable" else f" ({point[policy]['verdict']})"
                    cells.append(f"{1e3 * point[policy][measure_name]['estimate']:,.0f}{mark}")
                rows.append([f"{load:g}", *cells])
            blocks.append(
                f"**{name}** (boundary {entry['critical_rate']:.1f} req/s), {title}, ms\n\n"
                + table_text(["load", *policies], rows)
            )
        for load, point in zip(found["loads"], entry["points"], strict=True):
            never = point["gate 0"]["mean_e2e"]
            for policy in policies[1:]:
                if policy in point and (point[policy]["mean_e2e"]["high"] or 0.0) < (never["low"] or 0.0):
                    crossings.append(f"{policy} at {load:g} ({name})")
    blocks_text = "\n\n".join(blocks)
    return f"""# What waiting buys and costs

Threshold n = {THRESHOLD}, gates 0 to {THRESHOLD}, and WAIT in blocks as compiled; runs of 20,000 requests, 8 replications, seed {found["seed"]}.

{blocks_text}

Cells where waiting has the smaller end-to-end latency, intervals apart: {"; ".join(crossings) if crossings else "none"}.

**What was found.** A gate with everybody in service running on costs (g − 1)/2 arrivals' time before the first token, and
the longer iteration in which g prompts are then prefilled together. It buys nothing: its cost fades with the load, since g
requests wait anyway, but never turns into a gain in either model. There is no crossover: not waiting is best at every load tried. With one affine piece this is theory (a rule
that always works cannot be beaten on throughput); past the knee of the fitted model prefilling together costs more per
token, not less. WAIT as compiled for the largest slack has end-to-end latencies several times larger (least
so near the boundary, where its rows fill quickly): those in service stand still while a threshold fills. What WAIT does
offer is its certificate, a bound on memory and queue. ("unstable" in single cells is the verdict's 2.5 % false alarms; the
neighbours are stable.)
"""


if __name__ == "__main__":
    run("waiting", measure, draw, text)
