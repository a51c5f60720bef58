"""How far tables reach: per catalog server and Azure mix, the largest share of the fluid boundary.

    python benchmarks/reach.py benchmarks/reach.csv

One line per server, workload, number of types and kind of table, with the reason why none exists above that share
(empty where one exists up to the boundary). Shares are exact to 0.001; overflow probability 0.01, no slack asked
for. The whole catalog takes seven minutes of one processor; `reach.md` sums it up.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterable, Iterator, Sequence

import fluidsched as fs
from fluidsched._files import write_whole
from fluidsched.policy import reach_curve

WORKLOADS = ("azure_conv", "azure_code")
TYPES = (1, 3, 12)
COLUMNS = ("server", "workload", "types", "kind", "largest_share", "reason_above")

Line = tuple[str, str, int, str, float, str | None]


def reach(
    servers: Iterable[fs.Server], workloads: Sequence[str] = WORKLOADS, types: Sequence[int] = TYPES
) -> Iterator[Line]:
    """Yield the table's lines."""
    for server in servers:
        for name in workloads:
            mixes = [fs.workloads.get(name).merged(count) for count in types]
            curve = reach_curve(mixes, server, kinds=("wait", "gated", "capped"))
            for count, kind, share, reason in zip(
                curve.types.tolist(), curve.kind, curve.share.tolist(), curve.reason, strict=True
            ):
                yield server.name, name, count, kind, round(share, 3), reason


def main(path: str) -> None:
    """Write the table for the whole catalog."""
    entries = fs.catalog.entries()
    servers = (fs.catalog.server(e.gpu, e.model, e.tensor_parallel, source=e.source) for e in entries)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    writer.writerows(reach(servers))
    write_whole(path, text.getvalue())


if __name__ == "__main__":
    main(sys.argv[1])
