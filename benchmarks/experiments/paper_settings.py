"""The paper's two server experiments: (512, 20), and 0.7 (512, 20) + 0.3 (512, 50), Llama-2-7B on one A100, 12–24 req/s.

arXiv 2504.11320 reports that vLLM, Sarathi and WAIT (chunk 512) stay stable up to about 19, 22 and 23 req/s. Here: WAIT in
blocks (with the largest slack a table can have, and with 2 %), the cap, vLLM and Sarathi, on two fits of this server in the
catalog: of Vidur's reconstructed profiles (the simulator the paper used) and of AIConfigurator's measurements.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from experiment import Found, boundary, estimate, look, new_figure, run, say, table_text

import fluidsched as fs
from fluidsched.errors import InfeasibleError

SEED = 7
RATES = tuple(range(12, 25))
POLICIES: dict[str, Any] = {
    "vllm v0": lambda fluid: fs.baselines.vllm_v0(),
    "vllm 2048": lambda fluid: fs.baselines.vllm(),
    "vllm 512": lambda fluid: fs.baselines.vllm(token_budget=512),
    "sarathi 512": lambda fluid: fs.baselines.sarathi(512),
    "wait": lambda fluid: fs.compile_policy(fluid, "wait"),
    "wait, slack 2 %": lambda fluid: fs.compile_policy(fluid, "wait", slack=0.02),
    "capped": lambda fluid: fs.compile_policy(fluid, "capped"),
}
SOURCES = ("vidur-recon", "aiconfigurator-vllm0.14.0")
PAPER = {"vLLM": 19, "Sarathi": 22, "WAIT": 23}


def workloads() -> dict[str, fs.Workload]:
    """One request/s of each mix; the paper's l' decodes are l' + 1 output tokens here."""
    short = fs.RequestType("short", 0.7, prompt_tokens=512, output_tokens=21)
    return {
        "one type": fs.Workload([fs.RequestType("chat", 1.0, prompt_tokens=512, output_tokens=21)]),
        "two types": fs.Workload([short, fs.RequestType("long", 0.3, prompt_tokens=512, output_tokens=51)]),
    }


def measure(smoke: bool) -> Found:
    rates = (12, 20) if smoke else RATES
    size = (200, 2) if smoke else (20_000, 8)
    found: dict[str, Any] = {}
    for source in SOURCES[:1] if smoke else SOURCES:
        server = fs.catalog.server("a100-80gb", "llama-2-7b", source=source)
        for name, workload in workloads().items():
            found[f"{name}, {source}"] = {
                "critical_rate": fs.solve_fluid(workload, server).critical_rate,
                "policies": {
                    policy: of_policy(workload, server, table_at, rates, *size, width=0.5 if smoke else 0.02)
                    for policy, table_at in POLICIES.items()
                },
            }
            say(name, source)
    return {"seed": SEED, "rates": list(rates), "settings": found}


def of_policy(
    workload: fs.Workload,
    server: fs.Server,
    table_at: Any,
    rates: tuple[int, ...],
    requests: int,
    replications: int,
    width: float,
) -> dict[str, Any]:
    """Latencies at each rate, None where no table exists, and the end of the stable range."""
    points: list[Any] = []
    for rate in rates:
        offered = workload.scaled(rate / workload.total_arrival_rate)
        fluid = fs.solve_fluid(offered, server)
        try:
            table = table_at(fluid)
        except InfeasibleError:
            table = None
        if table is None or (table.kind in ("wait", "capped") and not fluid.is_stable):
            points.append(None)
            continue
        runs = fs.simulate(
            offered, server, table, horizon=requests / rate, replications=replications, seed=SEED
        )
        values = runs.measures(table.name)
        points.append({key: estimate(values[key]) for key in ("mean_e2e", "mean_ttft", "request_throughput")})
    bracket = boundary(
        workload,
        server,
        table_at,
        requests=requests,
        replications=replications,
        seed=SEED,
        width=width,
        low=0.4,
    )
    return {"points": points, "boundary": bracket}


def draw(found: Found) -> Any:
    figure, axes = new_figure(2, rows=max(1, len(found["settings"]) // 2))
    for axis, (name, entry) in zip(axes, found["settings"].items(), strict=True):
        for position, (policy, one) in enumerate(entry["policies"].items()):
            here = [
                (rate, point["mean_e2e"]["estimate"])
                for rate, point in zip(found["rates"], one["points"], strict=True)
                if point is not None
            ]
            if here:
                axis.plot(*np.array(here).T, marker="o", markersize=3, label=policy, **look(position))
        axis.axvline(entry["critical_rate"], color="black", linewidth=1.0, label="fluid boundary")
        axis.set(xlabel="arrival rate (req/s)", ylabel="mean end-to-end latency (s)", yscale="log")
        axis.set_title(name, fontsize=9)
        axis.set_xlim(min(found["rates"]) - 0.5, max(max(found["rates"]), entry["critical_rate"]) + 0.5)
    axes[0].legend(fontsize=7)
    return figure


def text(found: Found) -> str:
    blocks = []
    for name, entry in found["settings"].items():
        critical = entry["critical_rate"]
        rows = []
        for policy, one in entry["policies"].items():
            bracket = one["boundary"]
            ends = [bracket["stable_to"], bracket["unstable_from"]]
            in_rate = "–".join("?" if x is None else f"{x * critical:.1f}" for x in ends)
            cells = []
            for rate, point in zip(found["rates"], one["points"], strict=True):
                if rate in (12, 16, 18, 20, 22):
                    cells.append("no table" if point is None else f"{point['mean_e2e']['estimate']:.2f}")
            rows.append([policy, in_rate, *cells])
        shown = [f"E2E at {rate}, s" for rate in found["rates"] if rate in (12, 16, 18, 20, 22)]
        blocks.append(
            f"**{name}**: fluid boundary {critical:.2f} req/s\n\n"
            + table_text(["policy", "stable range ends (req/s)", *shown], rows)
        )
    blocks_text = "\n\n".join(blocks)
    return f"""# The paper's settings

Fitted two-piece iteration times of the catalog (Llama-2-7B, A100-80GB); runs of 20,000 requests, 8 replications, seed {found["seed"]}.
The paper reports stable ranges that end near {", ".join(f"{rate} ({who})" for who, rate in PAPER.items())} req/s.

{blocks_text}

**Where we agree.** On Vidur's profiles, the simulator behind the paper's figures, the fluid boundary of the single type is
23.6 req/s and the stable ranges end at 22.4 to 23.8: the paper's 22 and 23. vLLM's first scheduler (v0, prompts before
decodes; the paper's baseline as we read it) ends first. WAIT ends after it, and for the single type it has the smaller
latency from about 18 req/s on, and smaller than today's vLLM with 2,048 tokens per iteration from about 20: beyond the knee
of these profiles big prefill batches are expensive, and a threshold caps them.

**Where we do not.** vLLM v0 ends at 22.4, not at 19. Sarathi is at least as good as WAIT in range and better in latency at
every rate, on both mixes; the same holds of today's vLLM with its budget set to 512, which is the same rule in all but name
here. So what helps near the boundary is the cap on the prefill of an iteration, not the wait: a budget caps it without
waiting. For two types WAIT's integer thresholds end its range before Sarathi's.

**Why it may differ.** A gap of 3 req/s to vLLM cannot come from the batching rule alone in this model, since a server that
always works loses only what its batches cost beyond the knee; Python overhead per iteration, preemption by swapping, or a
smaller memory in the paper's set-up could explain it, and we have not tested these. On AIConfigurator's measurements of a
newer engine the same server carries 32 req/s, and the order turns: with a higher knee a budget of 512 is too small, and
vLLM with 2,048 and WAIT go further than Sarathi. An order of policies is a property of the profile as much as of the rules.
WAIT's latency at low rates is that of its thresholds: with the largest slack tens of times the engines', with 2 % a few.
"""


if __name__ == "__main__":
    run("paper_settings", measure, draw, text)
