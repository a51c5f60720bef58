"""What documents show and what running them gives, compared: words equal, numbers but for their last digits."""

from __future__ import annotations

import re

import pytest

NUMBER = re.compile(r"[-+]?\d[\d,]*\.?\d*(?:e[-+]?\d+)?")


def numbers(text: str) -> list[float]:
    return [float(match.replace(",", "")) for match in NUMBER.findall(text)]


def assert_same_text(shown: str, given: str) -> None:
    """Seeds are fixed, so only last digits may move: 1e-3 relative."""
    assert NUMBER.sub("#", given) == NUMBER.sub("#", shown)
    assert numbers(given) == pytest.approx(numbers(shown), rel=1e-3, abs=1e-9)
