"""What the table costs inside vLLM: time of one scheduling step with many requests waiting, beside stock vLLM.

    bash scripts/make_vllm_environment.sh FOLDER
    PYTHONPATH=FOLDER/vllm FOLDER/environment/bin/python benchmarks/vllm_scheduler.py [--out FILE.json]

`waiting` requests wait and `running` are in service, in two kinds of step. *Steady*: nobody enters or leaves; the table
has no room for one more. *Changing*: before every step the oldest request's client leaves, and the next request enters:
lengths are equal and the first ones came one step apart, so this goes on for ever, and a table that looks ahead is
asked twice per step, once to say yes and once to say no. Stock and tables alternate in one run; a figure is the
difference of medians over the steps of a kind, of the processor time in what vLLM calls per step (`finish_requests`,
`schedule`, `update_from_output`), the model runner's answer left out.
"""

from __future__ import annotations

import argparse
import bisect
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests" / "integrations"))

from vllm import __version__ as vllm_version
from vllm.v1.request import RequestStatus
from vllm_engine import make_scheduler, reply, request_of

import fluidsched as fs
from fluidsched.policy.forecast import Forecast, Served
from fluidsched.policy.table import Lookahead, Match, PolicyTable, Segment, TableType

BLOCKS, BLOCK_SIZE = 200_000, 16
ROWS = 12  # of the tables that look at types
PROMPT = 200  # tokens, of the changing kind
LONG = 30_000  # output tokens of the steady kind: nobody ends, and nothing is near an end


def least_limit(lookahead: Lookahead, served: list[Served], newcomer: Served) -> int:
    """The least limit, in blocks, at which the newcomer may enter."""
    return bisect.bisect_left(
        range(BLOCKS), True, key=lambda limit: Forecast(lookahead, BLOCK_SIZE, limit, served).fits(newcomer)
    )


def looking_ahead(mode: str, output: int, served: list[Served], newcomer: Served) -> PolicyTable:
    """A table that has room for those in service, and not for the newcomer."""
    lookahead = {
        "known": Lookahead("known"),
        "law": Lookahead("law", 0.0, tuple(round(output * (0.6 + 0.05 * i)) for i in range(16))),
        "reserve": Lookahead("reserve", float(output)),
    }[mode]
    enough = least_limit(lookahead, served[1:], newcomer)
    too_much = least_limit(lookahead, served, newcomer)
    limit = float((enough + too_much) // 2 * BLOCK_SIZE)
    return PolicyTable(mode, "vllm", (TableType("*"),), kv_limit_tokens=limit, lookahead=lookahead)


def steady_tables(running: int) -> dict[str, PolicyTable | None]:
    """Tables that admit nobody more: a cap; windows full; a block; forecasts with room for those in service."""
    edges = [1 + 50 * j for j in range(ROWS)]
    each = running // ROWS
    gated = tuple(
        TableType(f"t{j}", Match((low, low + 49)), threshold=each, period=1_000_000)
        for j, low in enumerate(edges)
    )
    wait = tuple(
        TableType(f"t{j}", Match((low, low + 49)), threshold=each, gate=each) for j, low in enumerate(edges)
    )
    served = [Served(steady_prompt(i), 0, steady_prompt(i), LONG) for i in range(running)]
    return {
        "stock": None,
        "capped": PolicyTable("capped", "capped", (TableType("*"),), max_in_service=running),
        "gated": PolicyTable("gated", "gated", gated),
        "wait": PolicyTable("wait", "wait", wait, block_iterations=100_000, freeze=True),
        "nested": nested(running, block=100_000, at_once=running),
        **{mode: looking_ahead(mode, LONG, served, served[0]) for mode in ("known", "law", "reserve")},
    }


def changing_tables(running: int) -> dict[str, PolicyTable | None]:
    """Tables that let one request in per step, each staying for `running` steps, half of what it might."""
    rows = tuple(TableType(f"t{j}", Match(label=f"t{j}"), threshold=1, period=ROWS) for j in range(ROWS))
    served = [Served(PROMPT, k, PROMPT + k, 2 * running) for k in range(running, 0, -1)]
    newcomer = Served(PROMPT, 0, PROMPT, 2 * running)
    return {
        "stock": None,
        "capped": PolicyTable("capped", "capped", (TableType("*"),), max_in_service=running),
        "gated": PolicyTable("gated", "gated", rows),
        "wait": PolicyTable(
            "wait", "wait", (TableType("*", threshold=1, gate=1),), block_iterations=1, freeze=True
        ),
        "nested": nested(running, block=1, at_once=1),
        **{mode: looking_ahead(mode, 2 * running, served, newcomer) for mode in ("known", "law", "reserve")},
    }


def nested(running: int, *, block: int, at_once: int) -> PolicyTable:
    """Four segments over the stages of a request."""
    last = -(-LONG // block) * block
    cuts = (
        [running // 4, running // 2, 3 * running // 4, last]
        if block == 1
        else [last * k for k in (1, 2, 3, 4)]
    )
    segments = tuple(Segment(cut - 1, at_once) for cut in cuts)
    row = TableType("*", threshold=at_once, gate=at_once)
    return PolicyTable(
        "nested", "nested-wait", (row,), segments=segments, block_iterations=block, freeze=True
    )


def steady_prompt(i: int) -> int:
    return 50 * (i % ROWS) + 25


def new_scheduler(table: PolicyTable | None, running: int) -> Any:
    scheduler = make_scheduler(
        Path(tempfile.mkdtemp()),
        table,
        blocks=BLOCKS,
        block_size=BLOCK_SIZE,
        budget=40_960,
        slots=running if table is None else 256,
    )
    scheduler.clock = lambda: 0.0
    return scheduler


def steady(table: PolicyTable | None, waiting: int, running: int) -> Any:
    """A scheduler with `running` requests in service that do not end, and `waiting` behind them."""
    scheduler = new_scheduler(table, running)
    lengths = [steady_prompt(i) for i in range(waiting + running)]
    path = fs.ArrivalPath.from_arrays([0.0] * len(lengths), lengths, [LONG] * len(lengths))
    for i in range(running):
        scheduler.add_request(request_of(path, i))
    for _ in range(20):
        step(scheduler)
    for i in range(running, running + waiting):
        scheduler.add_request(request_of(path, i))
    return scheduler


def changing(table: PolicyTable | None, waiting: int, running: int) -> Any:
    """A scheduler with `running` requests in service of which one leaves per step, and `waiting` behind them."""
    scheduler = new_scheduler(table, running)
    count = waiting + 2 * running
    path = fs.ArrivalPath.from_arrays(
        [0.0] * count,
        [PROMPT] * count,
        [2 * running] * count,
        type=[i % ROWS for i in range(count)],
        type_names=[f"t{j}" for j in range(ROWS)],
    )
    for i in range(2 * running):  # the first round fills the server, the second has one leave per step
        scheduler.add_request(request_of(path, i))
        step(scheduler, leaves=i >= running)
    for i in range(2 * running, count):
        scheduler.add_request(request_of(path, i))
    return scheduler


def step(scheduler: Any, *, leaves: bool = False) -> float:
    """Seconds of processor time of one step's calls; whether the oldest in service leaves before it."""
    start = time.process_time()
    if leaves:
        scheduler.finish_requests([scheduler.running[0].request_id], RequestStatus.FINISHED_ABORTED)
    output = scheduler.schedule()
    middle = time.process_time()
    answer = reply(scheduler, output)
    again = time.process_time()
    scheduler.update_from_output(output, answer)
    return middle - start + time.process_time() - again


def measure(kind: str, waiting: int, running: int, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds per step of one kind: median of each, and what each table adds to stock."""
    prepare, tables = {
        "steady": (steady, steady_tables(running)),
        "changing": (changing, changing_tables(running)),
    }[kind]
    schedulers = {name: prepare(table, waiting, running) for name, table in tables.items()}
    leaves = kind == "changing"
    times: dict[str, list[float]] = {name: [] for name in schedulers}
    names = list(schedulers)
    for turn in range(steps):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:  # nobody is always the first
            scheduler = schedulers[name]
            there = len(scheduler.requests)
            times[name].append(step(scheduler, leaves=leaves))
            assert len(scheduler.running) == running, (kind, name, len(scheduler.running))
            assert len(scheduler.requests) == there - leaves, (kind, name)
    medians = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    return {
        "median_ms": medians,
        "added_ms": {name: medians[name] - medians["stock"] for name in medians if name != "stock"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--waiting", type=int, default=5_000)
    parser.add_argument("--running", type=int, default=96, help="a multiple of 12")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = {
        "waiting": arguments.waiting,
        "running": arguments.running,
        "steps": arguments.steps,
        "vllm": vllm_version,
        **{
            kind: measure(kind, arguments.waiting, arguments.running, arguments.steps)
            for kind in ("steady", "changing")
        },
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
