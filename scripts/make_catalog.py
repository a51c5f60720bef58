"""Write the package's catalog of servers from the table of fitted iteration-time profiles.

    python scripts/make_catalog.py DATA_ROOT [OUTPUT]

DATA_ROOT holds profiles.csv: non-negative least-squares fits to iteration times, one row per (source, GPU,
model, tensor parallel). The catalog keeps the coefficients of the three forms the library offers, their
errors, the KV capacity and the bytes of KV per token; names become canonical. The output depends on the table
alone.
"""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

from fluidsched._files import write_whole
from fluidsched.server import catalog

OUTPUT = Path(__file__).resolve().parent.parent / "fluidsched" / "server" / "catalog.json"

# In order of preference.
SOURCES = [
    {
        "name": "aiconfigurator-vllm0.14.0",
        "licence": "Apache-2.0",
        "citation": "NVIDIA aiconfigurator, operator measurements for vLLM 0.14.0",
    },
    {
        "name": "vidur-recon",
        "licence": "MIT",
        "citation": "operator profiles of Vidur (Agrawal et al., MLSys 2024), put together to iterations",
    },
    {
        "name": "splitwise-measured-e2e",
        "licence": "MIT",
        "citation": "whole iterations measured by Patel et al., Splitwise, ISCA 2024",
    },
]

COLUMNS = [
    "gpu",
    "model",
    "tensor_parallel",
    "source",
    "kv_capacity_tokens",
    "kv_bytes_per_token",
    "two_piece",
    "affine",
    "paper",
    "mean_error",
    "largest_error",
    "remark",
]


def make_catalog(data_root: Path) -> str:
    """Return the text of the catalog made from `data_root`/profiles.csv."""
    preference = [source["name"] for source in SOURCES]
    with open(data_root / "profiles.csv", newline="", encoding="utf-8") as stream:
        rows = [entry(row) for row in csv.DictReader(stream)]
    rows.sort(key=lambda row: (row[0], row[1], row[2], preference.index(row[3])))
    lines = ",\n".join("  " + json.dumps(row, allow_nan=False) for row in rows)
    return (
        f'{{\n "schema": "{catalog.SCHEMA}",\n "sources": {json.dumps(SOURCES)},\n'
        f' "columns": {json.dumps(COLUMNS)},\n "entries": [\n{lines}\n ]\n}}\n'
    )


def entry(row: dict[str, str]) -> list[object]:
    """Return one row of the catalog, in the order of `COLUMNS`."""

    def numbers(*names: str) -> list[float]:
        values = [float(row[name]) for name in names]
        if not all(map(math.isfinite, values)):
            raise ValueError(f"{row['source']}, {row['gpu']}, {row['model']}, tp {row['tp']}: no {names}")
        return values

    # On the A40 Vidur profiled only the decodes of one multi-head model.
    remark = "prefill and grouped-query decodes extrapolated from the A100" if row["gpu"] == "a40" else ""
    return [
        catalog.canonical_gpu(row["gpu"]),
        catalog.canonical_model(row["model"]),
        int(row["tp"]),
        row["source"],
        int(row["kv_capacity_tokens"]),
        int(row["kv_bytes_per_token"]),
        numbers("pw_g0_s", "pw_g1_s", "pw_nb", "pw_g2_s", "pw_c_kv_s", "pw_c_pre_s"),
        numbers("b512_c0_s", "b512_c_tok_s", "b512_c_kv_s"),
        numbers("d0_s", "d1_s"),
        numbers("pw_mre", "b512_mre", "dec2_mre"),
        numbers("pw_maxre", "b512_maxre", "dec2_maxre"),
        remark,
    ]


def main(arguments: list[str]) -> int:
    """Write the catalog; the command line of this script."""
    if len(arguments) not in (1, 2):
        print("usage: make_catalog.py DATA_ROOT [OUTPUT]", file=sys.stderr)
        return 2
    output = Path(arguments[1]) if len(arguments) == 2 else OUTPUT
    write_whole(output, make_catalog(Path(arguments[0])))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
