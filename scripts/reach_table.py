"""Write how far tables reach: per catalog server and Azure mix, the largest share of the fluid boundary.

    python scripts/reach_table.py > reach.csv

One line per server, workload, number of types and kind of table, with the reason why none exists above that load
(empty where one exists up to the boundary). Shares are exact to 0.001; overflow probability 0.01, no slack asked
for. Takes about half an hour on two cores.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterable, Iterator, Sequence

import fluidsched as fs
from fluidsched.errors import InfeasibleError
from fluidsched.policy import largest_load

WORKLOADS = ("azure_conv", "azure_code")
TYPES = (1, 3, 12)
KINDS = ("wait", "gated", "capped")
ABOVE = 0.002  # of the boundary, where the reason is asked for
COLUMNS = ("server", "workload", "types", "kind", "largest_share", "reason_above")


def reach(
    servers: Iterable[fs.Server], workloads: Sequence[str] = WORKLOADS, types: Sequence[int] = TYPES
) -> Iterator[tuple[str, str, int, str, float, str | None]]:
    """Yield the table's lines."""
    for server in servers:
        for name in workloads:
            for count in types:
                workload = fs.workloads.get(name).merged(count)
                fluid = fs.solve_fluid(workload.at_load(0.5, server), server)
                for kind in KINDS:
                    share = largest_load(fluid, kind)
                    reason = None
                    try:
                        fs.compile_policy(
                            fs.solve_fluid(workload.at_load(share + ABOVE, server), server), kind
                        )
                    except InfeasibleError as error:
                        reason = error.reason
                    yield server.name, name, count, kind, round(share, 3), reason


def main() -> None:
    """Print the table for the whole catalog."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(COLUMNS)
    entries = fs.catalog.entries()
    servers = (fs.catalog.server(e.gpu, e.model, e.tensor_parallel, source=e.source) for e in entries)
    for line in reach(servers):
        writer.writerow(line)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
