"""Run the sweep of the tests from a command line: `python sweep_driver.py DIRECTORY [options]`."""

from __future__ import annotations

import argparse
import resource
import sys

from fluidsched.errors import FluidschedError
from fluidsched.sweeps import SweepSpec, sweep


def the_spec(cells: int, seconds: float) -> SweepSpec:
    """The sweep that every process of a test runs."""
    return SweepSpec(
        grid={"x": range(cells // 2), "y": ["a", "b"]},
        base={"seconds": seconds},
        function="sweep_cells:draw",
        seed=11,
    )


def real_spec() -> SweepSpec:
    """Real simulations, some twenty milliseconds each."""
    server = {"gpu": "a100-80gb", "model": "llama-2-7b"}
    base = {"workload": "azure_conv", "server": server, "horizon": 600.0, "warmup": 100.0, "replications": 2}
    grid = {"seed": range(20), "workload.load": [0.5, 0.9], "policy": ["vllm", "sarathi", "capped"]}
    return SweepSpec(grid=grid, base=base)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory")
    parser.add_argument("--cells", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=0.01)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--real", action="store_true", help="simulations instead of made-up cells")
    parser.add_argument("--join", action="store_true")
    parser.add_argument("--most-bytes", type=int, help="size at which every file is full")
    arguments = parser.parse_args()
    if arguments.most_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (arguments.most_bytes, resource.RLIM_INFINITY))
    spec = real_spec() if arguments.real else the_spec(arguments.cells, arguments.seconds)
    try:
        sweep(spec, arguments.directory, workers=arguments.workers, join=arguments.join, format="csv")
    except FluidschedError as error:
        print(type(error).__name__, error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
