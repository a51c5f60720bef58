"""Every experiment still runs: its smoke form writes its three files."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent / "experiments"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "experiment")


@pytest.mark.parametrize("name", NAMES)
def test_experiment(
    name: str, benchmark: Any, note: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A figure, plain JSON with the seed, and a text."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    script = importlib.import_module(name)
    command = importlib.import_module("experiment").run
    arguments = ["--smoke", "--out", str(tmp_path)]
    benchmark.pedantic(
        command, args=(name, script.measure, script.draw, script.text, arguments), rounds=1, iterations=1
    )
    found = json.loads((tmp_path / f"{name}.json").read_text())
    right = (
        found["seed"] == script.SEED
        and (tmp_path / f"{name}.png").stat().st_size > 10_000
        and (tmp_path / f"{name}.md").read_text().startswith("# ")
    )
    note(seed=script.SEED, right=right)
    assert right
