"""What looking ahead costs in the kernel: nodes of the tree over ends that an update and a check look at."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fluidsched.simulation import compiled

# The kernel's own functions, interpreted.
_plant: Any = getattr(compiled._plant, "py_func", compiled._plant)
_first_excess: Any = getattr(compiled._first_excess, "py_func", compiled._first_excess)


class _Watched:
    """A tree that notes the nodes somebody looks at."""

    def __init__(self, leaves: int) -> None:
        self.tree = np.zeros(2 * leaves, compiled.NODE)
        self.leaves = leaves
        self.looked: set[int] = set()

    def __getitem__(self, node: int) -> Any:
        self.looked.add(node)
        return self.tree[node]

    def add(self, end: int, held: int) -> int:
        """Put in a resident that holds so much at reading 0; nodes looked at."""
        self.looked.clear()
        _plant(self, 0, self.leaves, end, 1, held, compiled.NOBODY)
        return len(self.looked)

    def check(self, limit: int) -> tuple[int, int]:
        """Reading ahead at which the limit is exceeded, and nodes looked at."""
        self.looked.clear()
        state = [SimpleNamespace(leaves=self.leaves, origin=0)]
        reading, _ = _first_excess(SimpleNamespace(state=state, tree=self), 1, -1, limit)
        return reading, len(self.looked)


def _level(leaves: int, spacing: int) -> tuple[list[int], list[int]]:
    """Residents whose ends keep the forecast level: each holds at its end what the others grow since the end before."""
    still = leaves // spacing
    ends, held = [leaves - 1] * still, [1] * still
    for end in range(leaves - 1 - spacing, 0, -spacing):
        ends.append(end)
        held.append(spacing * still - end)
        still += 1
    return ends, held


def _planted(leaves: int, ends: Any, held: Any) -> tuple[_Watched, int]:
    tree = _Watched(leaves)
    return tree, max(tree.add(int(end), int(tokens)) for end, tokens in zip(ends, held, strict=True))


def _forecast(leaves: int, ends: Any, held: Any) -> tuple[Any, Any]:
    """Memory at each reading at which somebody ends (else none), and ends at or after it, added up by hand."""
    number, tokens = (np.bincount(ends, weights, leaves) for weights in (None, held))
    after, held_after = (np.cumsum(x[::-1])[::-1] for x in (number, tokens))
    return np.where(number > 0, after * np.arange(leaves) + held_after, -math.inf), after


def _looked_into(leaves: int, memory: Any, after: Any, limit: int) -> int:
    """Nodes in which the forecast comes within N(w − 1) of the limit, N the ends in them and after them."""
    count, width = 0, 1
    while width <= leaves:
        largest = memory.reshape(-1, width).max(axis=1)
        count += int((largest + after[::width] * (width - 1) > limit).sum())
        width *= 2
    return count


@pytest.mark.parametrize("log_leaves", range(6, 14))
def test_an_update_is_one_path_and_a_check_few_where_memory_falls_off(log_leaves: int) -> None:
    """Sixteen residents that hold more than all of them grow by: a path and its siblings, whatever the length."""
    leaves = 1 << log_leaves
    ends = np.linspace(1, leaves - 1, 16).astype(np.int64)
    held = np.full(16, 20 * leaves)
    tree, path = _planted(leaves, ends, held)
    memory, _ = _forecast(leaves, ends, held)
    assert path == 2 * log_leaves + 1
    for limit, excess in ((int(memory.max()), False), (int(memory.max()) - 1, True)):
        reading, looked = tree.check(limit)
        assert (reading != compiled.NOBODY) == excess
        assert looked <= 2 * log_leaves + 1


@pytest.mark.parametrize("log_leaves", [6, 8, 10, 13])
def test_a_check_looks_only_where_the_forecast_is_near_the_limit(log_leaves: int) -> None:
    """Residents at random and the limit at their very maximum, where a check is longest: never more than derived."""
    leaves, rng = 1 << log_leaves, np.random.default_rng(log_leaves)
    for prompt in (100, 1_000):
        output = rng.integers(3, leaves + 1, 128)
        done = (rng.random(128) * (output - 2)).astype(np.int64)
        ends, held = output - done - 1, rng.integers(prompt // 2, 2 * prompt, 128) + done
        memory, after = _forecast(leaves, ends, held)
        limit = int(memory.max())
        tree, _ = _planted(leaves, ends, held)
        reading, looked = tree.check(limit)
        assert reading == compiled.NOBODY
        assert looked <= 2 * _looked_into(leaves, memory, after, limit) + 1
        assert looked <= 2 * log_leaves + 3 * math.isqrt(leaves)


@pytest.mark.parametrize(("log_leaves", "spacing"), [(6, 1), (8, 1), (9, 8), (11, 8)])
def test_a_level_forecast_is_the_worst_case(log_leaves: int, spacing: int) -> None:
    """Ends that keep memory at the limit: every node above one is looked at, and no more than derived."""
    leaves = 1 << log_leaves
    ends, held = _level(leaves, spacing)
    assert min(held) >= 1
    memory, after = _forecast(leaves, ends, held)
    tree, path = _planted(leaves, ends, held)
    assert path == 2 * log_leaves + 1
    assert np.unique(memory[np.isfinite(memory)]).size == 1
    reading, looked = tree.check(int(memory.max()))
    assert reading == compiled.NOBODY
    assert looked >= 2 * (leaves // spacing) - log_leaves
    assert looked <= 2 * _looked_into(leaves, memory, after, int(memory.max())) + 1
