"""First come, first served at C = M*, and the cascade: what is lost when preempted requests restart, and when not.

The two instances of `fluidsched.examples`, under two rules. *Engine*: vLLM's, which admits nobody in an iteration that
preempts. *Plain*: newcomers fill what a preemption leaves at once. Each with restart (tokens lost) and with tokens kept.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
from experiment import Found, estimate, look, new_figure, run, table_text

import fluidsched as fs

SEED = 3
SLOPES = (0.0, 0.025, 0.05, 0.075, 0.1)


def plain_rule(seed: int, horizon: float, warmup: float, d1: float, keep: bool) -> np.ndarray:
    """Completions per second of the types (1, 2) and (1, 3) under the plain rule, one iteration at a time."""
    rng = np.random.default_rng(seed)
    count = int(2.2 * horizon) + 100
    arrival, output = np.cumsum(rng.exponential(0.5, count)), rng.integers(2, 4, count)
    produced = np.zeros(count, dtype=np.int64)
    queue: deque[int] = deque()
    served: list[int] = []
    now, seen, done = 0.0, 0, np.zeros(2)
    while now < horizon:
        while arrival[seen] <= now:
            queue.append(seen)
            seen += 1
        if not queue and not served:
            now = float(arrival[seen])
            continue
        while sum(1 + int(produced[i]) for i in served) > 9:
            last = served.pop()
            if not keep:
                produced[last] = 0
            queue.appendleft(last)
        used = sum(1 + int(produced[i]) for i in served)
        while queue and used + 1 + produced[queue[0]] <= 9:
            used += 1 + int(produced[queue[0]])
            served.append(queue.popleft())
        now += 1.0 - 9.0 * d1 + d1 * used
        for i in served:
            produced[i] += 1
            if produced[i] == output[i] and now > warmup:
                done[output[i] - 2] += 1
        served = [i for i in served if produced[i] < output[i]]
    return done / (horizon - warmup)


def cascade(rounds: int) -> dict[str, list[int]]:
    """Completions in each round, from the second on, under every table of the example."""
    example = fs.examples.cascade(rounds=rounds)
    runs = fs.simulate(example.requests, example.server, example.tables, horizon=float(rounds))
    counts = {}
    for policy in runs.policies:
        finish = runs.requests(policy)["finish_s"].dropna().round().astype(int)
        counts[policy] = np.bincount(finish, minlength=rounds + 1)[2 : rounds + 1].tolist()
    return counts


def at_capacity(d1: float, horizon: float, replications: int) -> dict[str, Any]:
    """Completions per second of the two types together, under both rules."""
    example = fs.examples.fcfs_at_capacity(d1)
    runs = fs.simulate(
        example.requests,
        example.server,
        example.tables,
        horizon=horizon,
        warmup=horizon / 3,
        replications=replications,
        seed=SEED,
    )
    found = {
        f"engine, {name}": estimate(runs.measures(name)["request_throughput"] / 2.0) for name in runs.policies
    }
    short = min(horizon, 6000.0)
    for name, keep in (("restart", False), ("kept", True)):
        rates = [plain_rule(seed, short, short / 3, d1, keep) for seed in range(replications)]
        found[f"plain, {name}"] = estimate(np.mean(rates, axis=1))
        found[f"plain, {name}"]["of_type"] = np.mean(rates, axis=0).tolist()
    return found


def measure(smoke: bool) -> Found:
    horizon, replications = (300.0, 2) if smoke else (60_000.0, 8)
    return {
        "seed": SEED,
        "horizon_s": horizon,
        "replications": replications,
        "slopes": list(SLOPES),
        "cascade": cascade(20 if smoke else 100),
        "at_capacity": [at_capacity(d1, horizon, replications) for d1 in SLOPES],
    }


def draw(found: Found) -> Any:
    figure, (left, right) = new_figure(2)
    for position, (policy, counts) in enumerate(found["cascade"].items()):
        done = np.cumsum(counts)
        left.plot(
            np.arange(2, len(done) + 2),
            done / (4.0 * np.arange(1, len(done) + 1)),
            label=policy,
            **look(position),
        )
    left.set(xlabel="round", ylabel="completed / offered, cumulated", ylim=(0.0, 1.3))
    left.legend(title="the cascade, C = 12")
    for position, name in enumerate(found["at_capacity"][0]):
        points = [point[name] for point in found["at_capacity"]]
        mean = np.array([p["estimate"] for p in points])
        error = np.array([(p["high"] or p["estimate"]) - p["estimate"] for p in points])
        right.errorbar(found["slopes"], mean, yerr=error, label=name, capsize=2, **look(position))
    right.set(xlabel="d1 (s per KV token)", ylabel="completions per second and type", ylim=(0.75, 1.03))
    right.axhline(1.0, color="black", linewidth=1.0)
    right.legend(title="first come, first served at C = M*", ncols=2)
    return figure


def text(found: Found) -> str:
    names = list(found["at_capacity"][0])

    def value(entry: dict[str, Any]) -> str:
        half = 0.0 if entry["high"] is None else entry["high"] - entry["estimate"]
        return f"{entry['estimate']:.3f} ± {half:.3f}"

    rows = [
        [f"{d1:g}", *(value(point[name]) for name in names)]
        for d1, point in zip(found["slopes"], found["at_capacity"], strict=True)
    ]
    means = {
        name: np.mean(counts[3 : 3 + (len(counts) - 3) // 2 * 2]) for name, counts in found["cascade"].items()
    }
    first = " ".join(map(str, found["cascade"]["restart"][:8]))
    kept = " ".join(map(str, found["cascade"]["kept"][:8]))
    plain = found["at_capacity"][2]["plain, restart"]["of_type"]
    plain_kept = found["at_capacity"][2]["plain, kept"]["of_type"]
    return f"""# First come, first served at C = M*, and the cascade

**The cascade** (4 requests arrive per round and fit). Restart completes {first} … ({means["restart"]:.2f} of 4 per round for ever),
tokens kept {kept} … ({means["kept"]:.2f}), at most four admitted per round {means["spaced"]:.2f}.

**C = M*** (completions per second and type, offered 1; {found["replications"]} runs, engine rule over {found["horizon_s"]:,.0f} s, plain rule over
6,000 s, first third left out, 95 % intervals, seed {found["seed"]}):

{table_text(["d1", *names], rows)}

Under the plain rule restart completes {plain[0]:.3f} and {plain[1]:.3f} of the two types at d1 = 0.05 whatever d1, since the memory is
always full and every iteration lasts 1 s; with tokens kept {plain_kept[0]:.3f} and {plain_kept[1]:.3f}. vLLM's clause (no admission in an
iteration that preempts) loses more with restart, the less the larger d1: emptier iterations are shorter. With tokens
kept 0.3 to 2 % is still missing after such horizons, under either rule, less the larger d1: at C = M* the queue is
critical, so a backlog remains at the end.
"""


if __name__ == "__main__":
    run("fcfs_at_capacity", measure, draw, text)
