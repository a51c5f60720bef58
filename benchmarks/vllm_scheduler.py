"""What the table costs inside vLLM: time of one scheduling step with many requests waiting, beside stock vLLM.

    bash scripts/make_vllm_environment.sh FOLDER
    PYTHONPATH=FOLDER/vllm FOLDER/environment/bin/python benchmarks/vllm_scheduler.py [--out FILE.json]

`waiting` requests wait and `running` are in service; each scheduler takes `steps` decode steps of the same
state. Stock and table alternate in one run, and the figure is the difference of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "integrations"))

from vllm import __version__ as vllm_version
from vllm_engine import make_scheduler, reply, request_of

import fluidsched as fs
from fluidsched.policy.table import Lookahead, Match, PolicyTable, TableType


def tables() -> dict[str, PolicyTable | None]:
    """Stock vLLM, its slots full, and tables that admit nobody more: a cap; windows of 12 rows full; a block; a
    forecast that has room for 96 of these requests."""
    edges = [1 + 50 * j for j in range(12)]
    gated = tuple(
        TableType(f"t{j}", Match((low, low + 49)), threshold=8, gate=0, period=1_000_000)
        for j, low in enumerate(edges)
    )
    wait = tuple(
        TableType(f"t{j}", Match((low, low + 49)), threshold=8, gate=8) for j, low in enumerate(edges)
    )
    return {
        "stock": None,
        "capped": PolicyTable("capped", "capped", (TableType("*"),), max_in_service=96),
        "gated": PolicyTable("gated", "gated", gated),
        "wait": PolicyTable("wait", "wait", wait, block_iterations=100_000, freeze=True),
        "known": PolicyTable("known", "vllm", (TableType("*"),), lookahead=Lookahead("known", 280_000.0)),
    }


def prepare(table: PolicyTable | None, waiting: int, running: int) -> Any:
    """A scheduler with `running` requests in service and `waiting` behind them."""
    folder = Path(tempfile.mkdtemp())
    slots = running if table is None else 256
    scheduler = make_scheduler(folder, table, blocks=200_000, block_size=16, budget=40_960, slots=slots)
    scheduler.clock = lambda: 0.0
    lengths = [50 * (i % 12) + 25 for i in range(waiting + running)]
    path = fs.ArrivalPath.from_arrays([0.0] * len(lengths), lengths, [30_000] * len(lengths))
    for i in range(running):
        scheduler.add_request(request_of(path, i))
    for _ in range(20):
        output = scheduler.schedule()
        scheduler.update_from_output(output, reply(scheduler, output))
    assert len(scheduler.running) == running, (len(scheduler.running), running)
    for i in range(running, running + waiting):
        scheduler.add_request(request_of(path, i))
    return scheduler


def step(scheduler: Any) -> float:
    """Seconds of processor time of one call of `schedule`; the tokens are handed in outside."""
    start = time.process_time()
    output = scheduler.schedule()
    elapsed = time.process_time() - start
    scheduler.update_from_output(output, reply(scheduler, output))
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=5_000)
    parser.add_argument("--running", type=int, default=96)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    schedulers = {
        name: prepare(table, arguments.waiting, arguments.running) for name, table in tables().items()
    }
    times: dict[str, list[float]] = {name: [] for name in schedulers}
    for _ in range(arguments.steps):
        for name, scheduler in schedulers.items():
            times[name].append(step(scheduler))
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    result = {
        "waiting": arguments.waiting,
        "running": arguments.running,
        "steps": arguments.steps,
        "vllm": vllm_version,
        "median_ms": medians,
        "added_ms": {name: medians[name] - medians["stock"] for name in medians if name != "stock"},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
