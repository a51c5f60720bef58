"""The script that tabulates how far tables reach runs on one server."""

from __future__ import annotations

import runpy
from pathlib import Path

import fluidsched as fs

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "reach_table.py"


def test_reach_of_one_server_and_one_type():
    script = runpy.run_path(str(SCRIPT))
    server = fs.catalog.server("a100-80gb", "llama-2-7b")
    lines = list(script["reach"]([server], ["azure_conv"], [1]))
    assert [line[3] for line in lines] == ["wait", "gated", "capped"]
    assert all(0.9 < line[4] < 1.0 for line in lines)
    assert [line[5] for line in lines] == ["rounding", "memory", "time"]
