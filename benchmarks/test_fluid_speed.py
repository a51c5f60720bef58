"""The fluid toolkit's speed; `fluid_speed.py` asks at full size."""

from __future__ import annotations

import json
from pathlib import Path

from fluid_speed import main


def test_every_question_in_small(tmp_path: Path) -> None:
    """All answers are right, the file holds what was measured, and the picture is there."""
    out = tmp_path / "speed.json"
    found = main(["--smoke", "--out", str(out)])
    assert json.loads(out.read_text()) == found
    assert all(found[name]["right"] for name in ("resolve", "closed_form", "assembly"))
    assert all(row["right"] for row in found["growth"])
    assert out.with_suffix(".png").stat().st_size > 1000
