"""Eviction collapse: what filling memory without headroom costs near the boundary, and what prevents it.

The Azure conversation mix (12 types) on Llama-2-7B, one A100-80GB, at 0.8 to 1.02 of the fluid boundary: mean latency,
preemptions and wasted work; where each policy leaves the stable range; and a load ramp up and down, for hysteresis.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from experiment import Found, boundary, bracket_text, estimate, look, new_figure, run, say, table_text

import fluidsched as fs
from fluidsched.errors import InfeasibleError

SEED = 5
LOADS = (0.8, 0.84, 0.88, 0.9, 0.92, 0.94, 0.96, 0.98, 1.0, 1.02)
RAMP = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05, 1.0, 0.95, 0.9, 0.85, 0.8)
DRAWN = (
    "vllm 2048",
    "vllm 2048, first chunk",
    "vllm 2048, watermark 5 %",
    "sarathi",
    "capped",
    "look-ahead, law",
    "gated",
    "wait",
)


def _vllm(budget: int, whole: bool = True, watermark: float = 0.0) -> Any:
    return lambda fluid: fs.baselines.vllm(
        token_budget=budget, whole_prompt_admission=whole, watermark=watermark
    )


POLICIES: dict[str, Any] = {
    **{f"vllm {budget}": _vllm(budget) for budget in (512, 2048, 8192)},
    **{f"vllm {budget}, first chunk": _vllm(budget, whole=False) for budget in (512, 2048, 8192)},
    "vllm 2048, watermark 1 %": _vllm(2048, watermark=0.01),
    "vllm 2048, watermark 5 %": _vllm(2048, watermark=0.05),
    "sarathi": lambda fluid: fs.baselines.sarathi(),
    "capped": lambda fluid: fs.compile_policy(fluid, "capped"),
    "look-ahead, law": lambda fluid: fs.compile_policy(fluid, "lookahead", mode="law"),
    "look-ahead, known": lambda fluid: fs.compile_policy(fluid, "lookahead", mode="known"),
    "gated": lambda fluid: fs.compile_policy(fluid, "gated"),
    "wait": lambda fluid: fs.compile_policy(fluid, "wait"),
}


def point(runs: fs.SimulationResult) -> dict[str, Any]:
    """Latency, preemptions per request and wasted share of the tokens, with intervals."""
    name = runs.policies[0]
    values = runs.measures(name)
    arrived = np.array([len(path) for path in runs.paths], dtype=float)
    processed = np.array([runs.run(name, r).batch_token_sum for r in range(runs.replications)], dtype=float)
    return {
        "mean_e2e_s": estimate(values["mean_e2e"]),
        "mean_ttft_s": estimate(values["mean_ttft"]),
        "preemptions_per_request": estimate(values["preemptions"] / arrived),
        "wasted_share": estimate(values["wasted_tokens"] / processed),
        "backlog_growth": estimate(values["backlog_growth"] / (arrived / (runs.horizon or 1.0))),
    }


def ramp_path(workload: fs.Workload, server: fs.Server, step: float, seed: int) -> fs.ArrivalPath:
    """The mix at the loads of `RAMP`, each for `step` seconds."""
    parts = [
        workload.at_load(load, server).sample(step, np.random.SeedSequence([seed, k]))
        for k, load in enumerate(RAMP)
    ]
    arrival = np.concatenate([part.arrival_s + k * step for k, part in enumerate(parts)])
    return fs.ArrivalPath.from_arrays(
        arrival,
        np.concatenate([part.prompt_tokens for part in parts]),
        np.concatenate([part.output_tokens for part in parts]),
    )


def ramp(
    workload: fs.Workload, server: fs.Server, table: fs.PolicyTable, step: float, replications: int
) -> Any:
    """Mean TTFT and preemptions of the requests that arrive in each step of the ramp, averaged over paths."""
    ttft, preempted = [], []
    for r in range(replications):
        path = ramp_path(workload, server, step, SEED + r)
        record = fs.simulate(path, server, table).run(table.name)
        of_step = np.minimum((path.arrival_s / step).astype(int), len(RAMP) - 1)
        count = np.bincount(of_step, minlength=len(RAMP))
        ttft.append(np.bincount(of_step, record.first_token_s - path.arrival_s, len(RAMP)) / count)
        preempted.append(np.bincount(of_step, record.preemptions, len(RAMP)) / count)
    return {"ttft_s": np.mean(ttft, axis=0).tolist(), "preemptions": np.mean(preempted, axis=0).tolist()}


def measure(smoke: bool) -> Found:
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    workload = fs.workloads.azure_conv()
    loads = (0.8, 1.0) if smoke else LOADS
    requests, replications = (300, 2) if smoke else (20_000, 8)
    chosen = {name: POLICIES[name] for name in ("vllm 2048", "look-ahead, law")} if smoke else POLICIES
    found: dict[str, Any] = {}
    for name, table_at in chosen.items():
        points: list[Any] = []
        for load in loads:
            offered = workload.at_load(load, server)
            try:
                table = table_at(fs.solve_fluid(offered, server))
            except InfeasibleError:
                points.append(None)
                continue
            horizon = requests / offered.total_arrival_rate
            points.append(
                point(
                    fs.simulate(offered, server, table, horizon=horizon, replications=replications, seed=SEED)
                )
            )
        bracket = boundary(
            workload,
            server,
            table_at,
            requests=requests,
            replications=replications,
            seed=SEED,
            width=0.5 if smoke else 0.02,
            low=0.6,
            high=1.02,
        )
        found[name] = {"points": points, "boundary": bracket}
        say(name, bracket_text(bracket))
    ramps = {}
    for name in (
        ("vllm 2048",)
        if smoke
        else ("vllm 2048", "vllm 2048, first chunk", "vllm 2048, watermark 5 %", "capped", "look-ahead, law")
    ):
        table = POLICIES[name](fs.solve_fluid(workload.at_load(0.8, server), server))
        ramps[name] = ramp(workload, server, table, 60.0 if smoke else 1200.0, 2 if smoke else 12)
    return {
        "seed": SEED,
        "loads": list(loads),
        "policies": found,
        "ramp_loads": list(RAMP),
        "ramps": ramps,
    }


def draw(found: Found) -> Any:
    figure, axes = new_figure(2, rows=2)
    panels = (
        ("mean_e2e_s", "mean end-to-end latency (s)"),
        ("preemptions_per_request", "preemptions per request"),
    )
    for axis, (measure_name, label) in zip(axes, panels, strict=False):
        drawn = [name for name in DRAWN if name in found["policies"]]
        for position, name in enumerate(drawn):
            points = [
                (load, entry[measure_name]["estimate"])
                for load, entry in zip(found["loads"], found["policies"][name]["points"], strict=True)
                if entry is not None
            ]
            if points:
                axis.plot(*np.array(points).T, marker="o", markersize=3, label=name, **look(position))
        axis.set(xlabel="load, share of the fluid boundary", ylabel=label)
    axes[0].set_yscale("log")
    axes[0].legend(fontsize=7)
    axes[1].set_yscale("symlog", linthresh=1e-3)
    axes[1].set_ylim(bottom=0.0)
    top = found["ramp_loads"].index(max(found["ramp_loads"]))
    for axis, key, label in (
        (axes[2], "ttft_s", "mean TTFT (s)"),
        (axes[3], "preemptions", "preemptions per request"),
    ):
        for position, (name, entry) in enumerate(found["ramps"].items()):
            colour = look(position)["color"]
            axis.plot(
                found["ramp_loads"][: top + 1],
                entry[key][: top + 1],
                color=colour,
                marker=">",
                markersize=4,
                label=name,
            )
            axis.plot(
                found["ramp_loads"][top:],
                entry[key][top:],
                color=colour,
                linestyle="--",
                marker="<",
                markersize=4,
            )
        axis.set(xlabel="load on the ramp (solid up, dashed down)", ylabel=label)
    axes[2].legend(fontsize=7)
    return figure


def text(found: Found) -> str:
    def value(entry: Any, key: str, digits: str) -> str:
        return "no table" if entry is None else format(entry[key]["estimate"], digits)

    at = [k for k, load in enumerate(found["loads"]) if load in (0.8, 0.9, 0.94, 0.96, 0.98, 1.0)]
    header = ["policy", "stable range ends at", *(f"{found['loads'][k]:g}" for k in at)]
    blocks = []
    for key, title, digits in (
        ("mean_e2e_s", "Mean end-to-end latency, s", ".1f"),
        ("preemptions_per_request", "Preemptions per request", ".3f"),
        ("wasted_share", "Wasted share of all tokens processed", ".2%"),
    ):
        rows = [
            [name, bracket_text(entry["boundary"]), *(value(entry["points"][k], key, digits) for k in at)]
            for name, entry in found["policies"].items()
        ]
        blocks.append(f"**{title}**\n\n{table_text(header, rows)}")
    top = found["ramp_loads"].index(max(found["ramp_loads"]))
    up, down = (
        found["ramp_loads"].index(0.9),
        len(found["ramp_loads"]) - 1 - found["ramp_loads"][::-1].index(0.9),
    )
    ramp_rows = [
        [
            name,
            f"{entry['ttft_s'][up]:.2f}",
            f"{entry['ttft_s'][top]:.1f}",
            f"{entry['ttft_s'][down]:.1f}",
            f"{entry['ttft_s'][-1]:.2f}",
            f"{entry['preemptions'][up]:.3f}",
            f"{entry['preemptions'][down]:.3f}",
        ]
        for name, entry in found["ramps"].items()
    ]
    ramp_header = [
        "policy",
        "TTFT 0.9 up",
        "at the top",
        "0.9 down",
        "0.8 at the end",
        "preemptions 0.9 up",
        "0.9 down",
    ]
    return "\n\n".join(
        [
            "# Eviction collapse",
            "Azure conversation mix, Llama-2-7B on one A100-80GB; loads are shares of the linear program's boundary, "
            f"runs of 20,000 requests, 8 replications, seed {found['seed']}. Ranges are brackets: stable to – unstable from.",
            *blocks,
            "**Load ramp** 0.8 → 1.05 → 0.8 in steps of 0.05, 20 minutes each, 12 paths; TTFT in seconds of the requests "
            "that arrive in a step.\n\n" + table_text(ramp_header, ramp_rows),
            CONCLUSION,
        ]
    )


CONCLUSION = """**What was found**

- The collapse is strong where a prompt enters chunk by chunk and only its first chunk must fit: with 2,048 tokens per
  iteration the range ends at 0.88–0.89, a quarter of all work is wasted beyond, and after the ramp the server is still lost
  at 0.8, a load it carries from an empty start: it is metastable. With 8,192 tokens nearly every prompt is one chunk, so
  the two kinds of admission agree; with 512 the budget itself lets in so little at a time that memory is not overdrawn.
- When the whole prompt must fit the collapse is mild: vLLM as it comes wastes up to 9 % at the boundary, its range ends at
  0.96–0.98, and it recovers after the ramp, later than the others.
- Little headroom prevents it: a watermark of 1 % (about one mean request) nearly ends preemption and carries the range to the
  boundary within the bracket; 5 % is no better on this mix. The cap, sized for 1 % of overflow by the exact tail of the lengths'
  law, preempts one request in a thousand and its range ends at 0.97–0.99. Small budgets (Sarathi's 512) protect as well, as long
  as prompts are short enough for them.
- Look-ahead preempts nobody. Knowing the lengths it is as fast as a watermark of 1 % and reaches as far: it gains nothing visible
  over so little headroom. Knowing only their law costs headroom: it is where the cap is, in latency, range and after the ramp.
- Gated tables and WAIT in blocks waste nothing, but their ranges end earlier, since no 12-type table exists (rounding and
  memory), and below they are slower: WAIT doubles the end-to-end latency at 0.8. In this setting protection does not need
  them.
"""


if __name__ == "__main__":
    run("eviction_collapse", measure, draw, text)
